"""A run of a few seconds through the real command, for tests of what happens when it is stopped."""

from pathlib import Path

import train.tasks
from train.defaults import default_config

_TASKS = str(Path(__file__).parent / "tasks")
if _TASKS not in train.tasks.__path__:
    train.tasks.__path__.append(_TASKS)


def get_config(preset: str = "small"):
    """Preset `small` only."""
    config = default_config()
    config.task = "tiny"
    config.model = "tiny"
    config.data.name = "digits"
    config.optimizer.name = "sgd"
    config.optimizer.args.momentum = 0.9
    config.schedule.update(name="constant", peak=0.05)
    config.ema.decay = 0.9
    config.steps, config.batch_size = 60, 32
    config.log_every = 1
    config.checkpoint.update(every=4, keep=2)
    return config
