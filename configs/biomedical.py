"""Biomedical challenges: U-Nets after nnU-Net on real pictures; the whole pipeline of a challenge.

small     python -m train --config configs/biomedical.py --workdir runs/coins
          scikit-image's coins under corrupted light, left half to right half: Dice 0.974 (three
          seeds; the best classical threshold 0.909), about 25 s of CPU time.
pipeline  python -m train.challenge --config configs/biomedical.py:pipeline --workdir runs/challenge
          from a folder of images and labels to a submission: fingerprint, plan, folds, ensembles,
          post-processing, ranking. Without `--config.data.options.path=FOLDER` it writes a small
          challenge of corrupted coins and solves that: Dice 0.972, about 5 minutes.
brain     python -m train --config configs/biomedical.py:brain --workdir runs/brain
              [--config.data.options.wheel=nilearn-0.14.1-py3-none-any.whl]
          gray and white matter in slices of the MNI152 template (nilearn's), lower to upper half:
          Dice 0.90 (three seeds; asked 0.85), about a minute.
brain_pipeline  python -m train.challenge --config configs/biomedical.py:brain_pipeline
              --workdir runs/brain_challenge [--config.challenge.nilearn=WHEEL]
          the same template as a challenge of half slabs; T1 standardized by pooled statistics.
paper     python -m train --config configs/biomedical.py:paper --workdir DIR
              --config.data.options.path=/path/to/nnUNet_raw/DatasetXXX
          nnU-Net's recipe: 3d_fullres at 128^3, batch 2, 1000 epochs of 250 iterations. The
          published means over five folds are in docs/systems/biomedical.md.
"""

from ml_collections import ConfigDict

from train.defaults import default_config

PRESETS = ("small", "brain", "pipeline", "brain_pipeline", "paper")


def get_config(preset: str = "small"):
    """The experiment `preset`, one of `PRESETS`."""
    if preset not in PRESETS:
        raise ValueError(
            f"configs/biomedical.py: no preset {preset!r}; known: {', '.join(PRESETS)}"
        )
    config = default_config()
    config.task = "segmentation"
    config.optimizer.name = "sgd"
    config.optimizer.args.momentum = 0.99
    config.optimizer.args.nesterov = True
    # PyTorch's coupled decay, on all parameters.
    config.optimizer.weight_decay = 3e-5
    config.optimizer.decay_mask = "all"
    config.optimizer.clip_norm = 12.0
    config.schedule.update(name="polynomial", power=0.9, end=0.0, peak=1e-2)
    build = {
        "small": _small,
        "brain": _brain,
        "pipeline": _pipeline,
        "brain_pipeline": _brain_pipeline,
        "paper": _paper,
    }
    build[preset](config)
    return config


def network(ndim: int, features: int, stages: int, cap: int = 320):
    """Constructor arguments of a U-Net that halves every axis at every stage."""
    return {
        "features_per_stage": tuple(min(cap, features * 2**i) for i in range(stages)),
        "kernel_sizes": ((3,) * ndim,) * stages,
        "strides": ((1,) * ndim, *((2,) * ndim,) * (stages - 1)),
        "n_conv_per_stage": (2,) * stages,
        "n_conv_per_stage_decoder": (2,) * (stages - 1),
        "deep_supervision": True,
    }


def _small(config):
    config.model = "biomedical.unet"
    config.model_args = {"input_channels": 1, "num_classes": 2, **network(2, 8, 4)}
    config.data.name = "coins"
    config.data.options = {"patch_size": 64}
    config.task_args = {"augment": "mirror"}
    config.steps, config.batch_size = 250, 8
    # A momentum of 0.99 needs thousands of steps; 250 take 0.9 and the same product with the rate.
    config.optimizer.args.momentum = 0.9
    config.schedule.peak = 0.1
    config.log_every = 25
    config.eval.every = 125
    config.checkpoint.every = 125


def _brain(config):
    _small(config)
    config.model_args["num_classes"] = 3
    config.data.name = "brain_slices"
    config.data.options = {"patch_size": 64}
    config.steps = 500  # 250 end at 0.864 and 0.846
    config.eval.batch_size = 8
    config.task_args["inference_batch"] = 8


def _paper(config):
    epoch, epochs = 250, 1000
    config.model = "biomedical.unet:plain_unet_3d"
    config.model_args = {"input_channels": 1, "num_classes": 3, "deep_supervision": True}
    config.data.name = "medical_patches"
    config.data.options = {
        "configuration": "3d_fullres",
        "patch_size": (128, 128, 128),
        "batch_size": 2,
        "channels": 1,
        "augmentation": "full",
    }
    config.task_args = {"augment": "full", "batch_dice": True}
    config.steps, config.batch_size = epoch * epochs, 2
    config.schedule.hold_for = epoch
    config.precision = "bfloat16"
    config.log_every = 50
    config.eval.every = epoch
    config.checkpoint.update(every=epoch, best_metric="pseudo_dice", best_smoothing=0.9)


def _pipeline(config):
    # What every fold trains; model and patch come from the plan.
    config.model = "biomedical.unet"
    config.data.name = "medical_patches"
    config.steps, config.batch_size = 200, 8
    config.optimizer.args.momentum = 0.9
    config.schedule.peak = 0.1
    config.log_every = 50
    config.checkpoint.update(every=100, keep=1)
    config.task_args = {"augment": "mirror"}
    config.challenge = ConfigDict(
        {
            "bundled": "coins",  # the data without a path: coins | brain (needs nilearn)
            "nilearn": "",  # its wheel, where it is not installed
            "configurations": ("2d",),  # 2d | 2.5d | 3d_fullres | 3d_lowres | 3d_cascade
            "folds": 5,
            "seeds": 1,  # models of every fold
            "group_regex": "",  # what names the patient in a case id
            "steps": (),  # ((configuration, training steps), ...), in place of config.steps
            "plan": {  # medical_preparation.plan
                "kind": "plain",
                "memory_gb": 0.1,
                "base_features": 8,
                "cap_batch": False,
                "batch_size": 8,
                "lowres_share": 0.25,
                "schemes": (),  # normalizations in place of those of the channels' names
            },
            "mirroring": True,
            "step": 0.5,
            "ensemble": True,  # search singles and pairs; False: the first configuration
            "weights": "uniform",  # of an ensemble's members: uniform | least_squares
            "postprocessing": True,
            "optional_postprocessing": True,
            "tolerance": (2.0,),  # mm, of the surface Dice: of all targets, or one each
            "ranking": "aggregate_then_rank",
            "bootstrap": 1000,
            "inference_batch": 8,
        }
    )


def _brain_pipeline(config):
    _pipeline(config)
    config.steps = 250
    config.challenge.bundled = "brain"
    config.challenge.folds = 3
    config.challenge.plan.batch_size = 6
    # Slabs of one scan share its scale: what each holds of gray and white must not set its own.
    config.challenge.plan.schemes = ("CT",)
