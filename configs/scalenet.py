"""ScaleNet: a super-supernet on real digits and its search; the published recipe.

small     python -m train --config configs/scalenet.py --workdir runs/scalenet
          scikit-learn's digits at 16 to 25 pixels, the reduced space, four fifths of the training
          images: 0.940 of the test digits, the mean over one sub-network of each scaling stage,
          about 7 minutes on two cores; then
          python -m train.search --config configs/scalenet.py --checkpoint runs/scalenet
              --workdir runs/scalenet_search
          searches base model and scalings on the other fifth: 99.0 %, as many random networks
          98.8, 7 minutes.
uniform   the same with uniform instead of hierarchical sampling: after 800 steps 0.75, hierarchical
          0.82 (five seeds).
retrain   python -m train --config configs/scalenet.py:retrain --workdir DIR
          a base model of the small space trained on its own: 0.987 after 300 steps (logistic
          regression 0.969).
paper     python -m train --config configs/scalenet.py:paper --workdir DIR
              --config.data.options.inner.path=/path/to/imagenet
          ImageNet-1k, 750k steps. The repository says 8 images a GPU and not how many GPUs: 256
          images here. Validation images are one training image in 25 (a minival).
paper_index  the same through the official JSON indices: train.json, minival.json and val.json below
          --config.data.options.path, images below train/ and val/ there (data.options.prefix).
paper_net python -m train --config configs/scalenet.py:paper_net --workdir DIR
              --config.data.options.path=/path/to/imagenet
          a base model of 309 M multiply-adds retrained from scratch; a found one by its row of
          found.json (model_args.stages, model_args.width, data.options.image_size).
"""

from ml_collections import ConfigDict

from train.defaults import default_config

PRESETS = ("small", "uniform", "retrain", "paper", "paper_index", "paper_net")
IMAGENET = 1281167
# Official weight decay: the linear layer's weight and bias, convolutions' weights twice as much,
# their biases and BatchNorm not at all.
DECAYED = r"(kernel|net\.head_.*bias)$"
CONV_KERNELS = r"backbone.*\.kernel$"


def get_config(preset: str = "small"):
    """The experiment `preset`."""
    if preset not in PRESETS:
        raise ValueError(f"configs/scalenet.py: no preset {preset!r}; known: {', '.join(PRESETS)}")
    config = default_config()
    config.task = "supernet"
    config.optimizer.name = "sgd"
    config.optimizer.args.momentum = 0.9
    config.optimizer.args.nesterov = True
    config.optimizer.weight_decay = 4e-5
    config.optimizer.decay_mask = DECAYED
    config.optimizer.decay_factors = ((CONV_KERNELS, 2.0),)
    config.schedule.update(name="cosine", warmup_inside=False)
    config.search = ConfigDict(
        {
            "kind": "mcea",
            "budget": 306e6,
            "base_error": 25e6,
            "scale_error": 50e6,
            "population": 64,
            "generations": 40,
            "base_models": 20,
            "iterations": 8,
            "ratio": 1.0,
            "multi_objective": False,
            "strategy": "linear",  # of ln multiplier in the stage, or quadratic
            "seed": 0,
            "split": "minival",
            "batch_size": 0,  # of held-out images, each with its own statistics; 0 for all at once
            "chunk": 16,
            "compare": True,  # random search at the same number of scored networks beside it
        }
    )
    if preset in ("paper", "paper_index"):
        _paper(config, preset)
    elif preset == "paper_net":
        _paper_net(config)
    else:
        _small(config, preset)
    return config


def _small(config, preset):
    config.model = "search.scalenet:digits"
    config.task_args.law = "uniform" if preset == "uniform" else "hierarchical"
    # Drifting sides, as published, are 2^blocks networks that must agree: 0.20 on average after 800
    # steps, where both sides in every step reach 0.46 after 400.
    config.task_args.synchronous = True
    config.data.name = "held_out"
    config.data.options = {
        "of": "digits",
        "every": 5,
        "inner": {"image_size": 25, "augment": True},
    }
    config.steps, config.batch_size = 1500, 64
    config.schedule.update(peak=0.1, warmup_steps=50)
    config.log_every, config.eval.every, config.checkpoint.every = 100, 1500, 500
    # Batch statistics: the test's 450 images without padding rows.
    config.eval.batch_size = 150
    config.eval.split = "test"
    config.search.update(
        budget=1.1e5, base_error=1.5e4, scale_error=2.5e4, population=16, generations=6,
        base_models=4, iterations=2,
    )  # fmt: skip
    if preset == "retrain":
        config.task = "classification"
        config.task_args = {"label_smoothing": 0.1}
        config.model = "search.scalenet_nets:digits_base"
        config.model_args = {}
        config.data.options.inner.image_size = 16
        config.steps = 400
        config.schedule.peak = 0.1
        config.eval.every = 400


def _paper(config, preset):
    config.model = "search.scalenet"
    # Random resized crops and flips only; crops are made at the largest resolution.
    images = {
        "image_size": 354, "color_jitter": 0.0, "erasing": 0.0,
        "crop_interpolation": "bilinear", "interpolation": "bilinear",
    }  # fmt: skip
    config.data.name = "held_out"
    config.data.options = {"of": "imagenet", "every": 25, "threads": 16, "inner": images}
    if preset == "paper_index":
        config.data.name = "imagenet_index"
        config.data.options = {**images, "threads": 16}
    config.search.batch_size = 64
    config.batch_size, config.steps = 256, 750000
    config.schedule.update(peak=0.12, warmup_steps=375)
    config.seed = 42
    config.precision = "bfloat16"
    config.log_every = 100
    # Batch statistics: no padding rows in 50,000 images on up to 16 devices.
    config.eval.batch_size = 400
    config.eval.split = "test"
    config.eval.every = 10000
    config.checkpoint.every = 5000


def _paper_net(config):
    config.task = "classification"
    config.task_args = {"label_smoothing": 0.1}
    config.model = "search.scalenet_nets:base_309m"
    # Larger networks take more dropout.
    config.model_args = {"dropout": 0.2, "drop_path_rate": 0.2}
    config.data.name = "imagenet"
    config.data.options = {
        "image_size": 224, "rand_augment": "rand-m9-mstd0.5", "erasing": 0.2, "workers": 16,
    }  # fmt: skip
    config.batch_size, epoch = 1024, IMAGENET // 1024
    config.steps = 400 * epoch
    config.optimizer.decay_mask, config.optimizer.decay_factors = "matrices", ()
    config.schedule.update(peak=0.4, warmup_steps=5 * epoch)
    config.ema.decay = 0.9999
    config.precision = "bfloat16"
    config.log_every = 100
    config.eval.update(batch_size=1000, every=epoch)
    config.checkpoint.every = epoch
