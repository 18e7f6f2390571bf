"""RepGhost: a small classifier on real digits; the published ImageNet recipe.

small     python -m train --config configs/repghost.py --workdir runs/repghost
          scikit-learn's digits at 32x32, width 0.25: folded test accuracy 0.994 (three
          seeds; logistic regression 0.969), about 2 minutes on two cores.
textures  python -m train --config configs/repghost.py:textures --workdir runs/textures
          crops of scikit-image's pictures; the right halves of the pictures are the test:
          0.79 (logistic regression 0.47), about 2 minutes.
paper     python -m train --config configs/repghost.py:paper --workdir DIR
              --config.data.options.path=/path/to/imagenet
          ImageNet-1k, 300 epochs, batch 1024; published top-1 66.95 (0.5x) to 78.81 (2.0x).
"""

from train.defaults import default_config

PRESETS = ("small", "textures", "paper")


def get_config(preset: str = "small"):
    """The experiment `preset` (small, textures or paper)."""
    if preset not in PRESETS:
        raise ValueError(f"configs/repghost.py: no preset {preset!r}; known: {', '.join(PRESETS)}")
    config = default_config()
    config.task = "classification"
    config.task_args.label_smoothing = 0.1
    config.optimizer.name = "sgd"
    config.optimizer.args.momentum = 0.9
    config.optimizer.args.nesterov = True
    config.schedule.name = "cosine"
    if preset == "paper":
        _paper(config)
    else:
        _small(config, preset)
    return config


def _small(config, preset):
    config.model = "vision.repghost"
    config.model_args = {"width": 0.25, "num_classes": 10, "dropout": 0.0}
    config.data.name = "digits"
    config.data.options = {"image_size": 32, "augment": True}
    config.steps, config.batch_size = 400, 128
    config.optimizer.weight_decay = 1e-4
    config.schedule.update(peak=0.1, end=0.0, warmup_steps=20)
    if preset == "textures":
        config.model_args.num_classes = 15
        config.data.name = "textures"
        config.data.options = {"image_size": 48}
        config.steps, config.batch_size = 400, 64
    config.log_every = 50
    config.eval.every = 200
    config.checkpoint.every = 200


def _paper(config):
    config.model = "vision.repghost:repghostnet_1_0x"
    config.model_args = {"num_classes": 1000, "dropout": 0.2}
    config.data.name = "imagenet"
    # For widths 1.3 and up add rand_augment="rand-m9-mstd0.5", as the published runs did.
    config.data.options = {"image_size": 224, "workers": 16}
    epoch = 1281167 // 1024
    config.batch_size = 1024
    config.steps = 300 * epoch
    config.optimizer.weight_decay = 1e-5
    # timm: 5 warm-up epochs inside the 300, the rate held for an epoch at a time.
    config.schedule.update(
        peak=0.6, end=1e-5, warmup_steps=5 * epoch, warmup_init=1e-4, hold_for=epoch
    )
    config.ema.decay = 0.9999
    config.precision = "bfloat16"
    config.seed = 42
    config.log_every = 100
    config.eval.every = epoch
    # The published numbers are the best averaged checkpoint's.
    config.checkpoint.update(every=epoch, best_metric="accuracy", report_best=True)
