"""CAPSTONE: document expansion with a curriculum of pseudo queries, on API documentation.

small     python -m train --config configs/capstone.py --workdir runs/capstone
"""

from train.defaults import default_config

PRESETS = ("small", "paper")


def get_config(preset: str = "small"):
    """The experiment `preset`."""
    if preset not in PRESETS:
        raise ValueError(f"configs/capstone.py: no preset {preset!r}; known: {', '.join(PRESETS)}")
    config = default_config()
    config.task = "dense_retrieval"
    config.model = "retrieval.dual_encoder"
    config.optimizer.name = "adam"
    config.optimizer.clip_norm = 2.0
    config.schedule.update(name="polynomial", end=0.0, power=1.0, warmup_inside=False)
    _small(config)
    return config


def _small(config):
    config.model_args = {
        "vocab_size": 8192,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "max_position_embeddings": 144,
        "pooler": False,
        "share_weight": True,
        "initializer_range": 0.09,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config.task_args.scale = 128**-0.5
    config.data.name = "docstrings"
    config.data.options = {
        "query_length": 24,
        "document_length": 64,
        "body_length": 48,
        "negatives": 1,
        "expansion": "gradual",
        "n_parts": 3,
        "views": 5,
        "curriculum_steps": 400,
    }
    config.steps, config.batch_size = 400, 64
    config.schedule.update(peak=1e-3, warmup_steps=40)
    config.eval.split = "test"
    config.eval.batch_size = 256
    config.log_every = 20
