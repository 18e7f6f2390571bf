"""The keys that every configuration shares, and their values when a config says nothing."""

from __future__ import annotations

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def default_config() -> ConfigDict:
    """Shared keys of a run; a config file sets what it needs and may add keys of its own.

    Units: `steps`, `*_every`, `warmup_steps` count optimizer steps; `batch_size` counts examples
    of the global batch, over all devices and processes.
    """
    return ConfigDict(
        {
            "task": "classification",  # train/tasks/<task>.py
            "task_args": ConfigDict(),  # fields of the task
            "model": "",  # jaxmodels.<family>.<module>[:variant]
            "model_args": ConfigDict(),  # constructor arguments of the model
            "data": ConfigDict({"name": "", "options": ConfigDict()}),
            "optimizer": ConfigDict(
                {
                    "name": "sgd",  # any optax optimizer
                    "args": ConfigDict(),  # its arguments besides the learning rate
                    "weight_decay": 0.0,
                    "decay_mask": "matrices",  # matrices (ndim > 1) | all | a regular expression
                    "decay_factors": (),  # ((regular expression, factor), ...), not decoupled
                    "decoupled": False,  # True: AdamW's way; False: added to the gradient
                    "clip_norm": 0.0,  # 0: no clipping of the global norm
                    "clip_groups": (),  # regular expressions: clipped each on its own; !...: never
                    "accumulate": 1,  # micro-batches per step
                    "freeze": "",  # regular expression over parameter paths
                    # ((regular expression, factor of the learning rate, first step it moves), ...)
                    "groups": (),
                }
            ),
            "schedule": ConfigDict(
                {
                    # constant | cosine | step | polynomial | one_cycle | inverse_sqrt |
                    # linear_segments
                    "name": "cosine",
                    "peak": 0.1,
                    "end": 0.0,
                    "warmup_steps": 0,
                    "warmup_init": 0.0,
                    # timm counts the warm-up inside the cosine; others start the cosine after it.
                    "warmup_inside": True,
                    "hold_for": 1,  # steps for which the rate stays put (timm: one epoch)
                    "boundaries": (),  # step: steps at which the rate is multiplied
                    "factor": 0.1,
                    "rates": (),  # linear_segments: the rates at `boundaries`
                    "power": 1.0,  # polynomial
                    "pct_start": 0.1,  # one_cycle: the share of it before the rate falls
                }
            ),
            "ema": ConfigDict({"decay": 0.0}),  # 0: none
            "steps": 0,
            "batch_size": 0,
            "seed": 0,
            "precision": "float32",  # compute dtype; parameters stay float32
            "parallel": ConfigDict(
                {
                    "mode": "jit",  # jit | pmap
                    "data": -1,  # devices along each mesh axis; -1: all that are left
                    "fsdp": 1,
                    "model": 1,
                    "rules": (),  # ((regular expression, dimension), ...) for the `model` axis
                    "sync_batch_norm": True,  # pmap only: under jit the batch is global anyway
                    "coordinator": "",  # host:port of process 0; empty: one process, or a TPU pod
                    "num_processes": 1,
                    "process_id": 0,
                    "start_timeout": 300,  # seconds to wait for the other processes
                }
            ),
            "checkpoint": ConfigDict(
                {
                    "every": 0,
                    "keep": 3,
                    "best_metric": "",
                    "best_mode": "max",
                    "best_smoothing": 0.0,  # share of the past in the metric's moving average
                    "report_best": False,  # report the best checkpoint, not the last step
                    "patience": 0,  # evaluations without a better one that end the run; 0: never
                }
            ),
            "eval": ConfigDict({"every": 0, "batch_size": 0, "split": ""}),
            "log_every": 50,
            "tensorboard": False,
            "profile": ConfigDict({"start": -1, "steps": 5}),
            "probe": ConfigDict({"rank": ()}),  # parameter paths whose spectra are logged
            "init_from": placeholder(str),  # a checkpoint of ours or of PyTorch
            "init_skip": "",  # regular expression: parameters left at their initialization
            "init_prefix": "",  # before the names of a PyTorch file, where it is no usual one
            "order": (),  # names of `stages` to run one after the other (train/progression.py)
            "stages": ConfigDict(),
            "eval_only": False,
            "dry_run": "",  # host | a TPU topology such as v5e:4x4
        }
    )
