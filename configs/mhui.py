"""MH-UI: heads at several depths, whose disagreement gives attacked images away.

small       python -m train --config configs/mhui.py --workdir runs/mhui
            scikit-learn's digits at 16x16; accuracy .996, AUROC of telling attacked from natural
            images .971 (FGSM .1) and .988 (PGD .05), the last head's confidence .922 and .374 (five
            seeds); 42 CPU seconds, about a minute on two cores.
softmax, mc_dropout, ensemble, dpn_forward, dpn_reverse
            the methods it is compared with, on the same data; .990 to .993; a minute each, the
            ensemble of five two.
vgg         a VGG16 of an eighth of its width at 32x32, five heads; accuracy .998 in one run,
            67 CPU seconds without attacks.
textures    crops of scikit-image's photographs at 32x32, labeled by the photograph; accuracy .833
            in one run, 150 CPU seconds without attacks; textures_softmax, the plain network.
paper       python -m train --config configs/mhui.py:paper --workdir DIR
                --config.data.options.path=/path/with/cifar-10-batches-py
            CIFAR-10, ResNet-18, the same group's DS-UI recipe: Adam, 100 epochs, batch 256.
paper_vgg   the same with VGG16.
paper_sgd   the same with pytorch-cifar's recipe: SGD, cosine, 200 epochs, batch 128.
"""

from train.defaults import default_config

# MH-UI on another network, and on other data.
OTHERS = ("vgg", "textures", "textures_softmax")
METHODS = ("softmax", "mc_dropout", "ensemble", "dpn_forward", "dpn_reverse")
PAPER = ("paper", "paper_vgg", "paper_sgd")
PRESETS = ("small", *METHODS, *OTHERS, *PAPER)


_NARROW_VGG16 = tuple(
    layer
    for width, count in ((8, 2), (16, 2), (32, 3), (64, 3), (64, 3))
    for layer in (*[width] * count, "M")
)


def get_config(preset: str = "small"):
    """The experiment `preset`."""
    if preset not in PRESETS:
        raise ValueError(f"configs/mhui.py: no preset {preset!r}; known: {', '.join(PRESETS)}")
    config = default_config()
    config.task = "adversarial_detection"
    config.optimizer.name = "adam"
    config.optimizer.args.eps = 1e-8
    if preset in PAPER:
        _paper(config, preset)
    else:
        _small(config, preset)
    return config


def _small(config, preset):
    network = {"width": 12, "layers": (1, 1, 1, 1), "leaky": 0.2, "num_classes": 10}
    if preset in ("small", *OTHERS[:2]):
        config.model = "security.mhui:MHUIResNet"
        config.model_args = {**network, "head_features": 32}
        config.task_args.method = "mhui"
    else:
        config.model = "vision.resnet"
        dropout = 0.5 if preset == "mc_dropout" else 0.0
        config.model_args = {**network, "dropout": dropout}
        config.task_args.method = preset.removeprefix("textures_")
    config.task_args.attacks = ("fgsm:0.05", "fgsm:0.2", "fgsm:0.1", "pgd:0.05", "adaptive:0.05")
    config.data.name = "digits"
    config.data.options = {"image_size": 16, "standardize": False}
    config.steps, config.batch_size = 300, 64
    config.schedule.update(name="cosine", peak=4e-3, end=4e-5, warmup_steps=60)
    config.log_every = 50
    config.eval.batch_size = 150
    config.checkpoint.every = 150
    if preset == "vgg":
        config.model = "security.mhui:MHUIVGG"
        # VGG16 at an eighth of its width; its five pools need images of 32.
        config.model_args = {"cfg": _NARROW_VGG16, "head_features": 32, "num_classes": 10}
        config.data.options.image_size = 32
    if preset.startswith("textures"):
        config.data.name = "textures"
        config.data.options = {"image_size": 32, "standardize": False}
        config.model_args.num_classes = 15
        config.steps, config.schedule.warmup_steps = 600, 100


def _paper(config, preset):
    config.model = "security.mhui:mhui_resnet18"
    if preset == "paper_vgg":
        config.model = "security.mhui:mhui_vgg16"
    config.model_args = {"num_classes": 10}
    budgets = tuple(f"{name}:{eps / 255}" for name in ("fgsm", "pgd") for eps in (2, 4, 8, 16))
    others = ("pgd_l2:0.25", "pgd_l2:0.5", "pgd_l2:1.0", "cw", f"adaptive:{8 / 255}")
    config.task_args.attacks = (*budgets, *others)
    config.data.name = "cifar"
    config.optimizer.weight_decay = 5e-4
    config.optimizer.decay_mask = "all"
    if preset == "paper_sgd":
        config.batch_size = 128
        epoch = 50000 // 128
        config.steps = 200 * epoch
        config.optimizer.name = "sgd"
        config.optimizer.args = {"momentum": 0.9}
        config.schedule.update(name="cosine", peak=0.1, end=0.0, hold_for=epoch)
    else:
        config.batch_size = 256
        epoch = 50000 // 256
        config.steps = 100 * epoch
        # The rate goes up from a tenth and down to it in 35 epochs each, then to 1e-6.
        config.schedule.update(
            name="linear_segments",
            boundaries=(0, 35 * epoch, 70 * epoch, 100 * epoch),
            rates=(7.5e-5, 7.5e-4, 7.5e-5, 1e-6),
            hold_for=epoch,
        )
    config.log_every = 50
    config.eval.every = epoch
    config.eval.batch_size = 500
    config.checkpoint.update(every=epoch, best_metric="accuracy")
