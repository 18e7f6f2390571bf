"""CORAL."""

from ml_collections import ConfigDict

from train.defaults import default_config

PRESETS = ("small",)


def get_config(preset: str = "small"):
    config = default_config()
    config.task = "reviewer_recommendation"
    config.model = "graphs.coral"
    config.data.name = "code_review"
    config.optimizer.name = "adam"
    config.predict = ConfigDict({"k": 5})
    config.model_args = {"dims": (64, 64), "input": "embedding", "embed": 64}
    config.schedule.update(name="constant", peak=1e-2)
    config.steps, config.batch_size = 60, 16384
    config.log_every = 10
    return config
