"""MeGuide: subgraphs guided by a graph's own metrics.

small     python -m train --config configs/meguide.py --workdir runs/meguide
          scikit-learn's digits as a nearest-neighbor graph, 20 labels a class, 2-layer GCN.
"""

from train.defaults import default_config

PRESETS = ("small", "deep", "cochange", "citation", "paper")


def get_config(preset: str = "small"):
    """The experiment `preset`."""
    if preset not in PRESETS:
        raise ValueError(f"configs/meguide.py: no preset {preset!r}; known: {', '.join(PRESETS)}")
    config = default_config()
    config.task = "node_classification"
    config.model = "graphs.gnn"
    config.data.name = "node_graphs"
    config.optimizer.name = "adam"
    config.optimizer.decay_mask = "all"
    config.schedule.update(name="constant", peak=0.01)
    config.batch_size = 4
    config.eval.batch_size = 1
    config.parallel.data = 1
    globals()[f"_{preset}"](config)
    return config


def _small(config):
    config.model_args = {"kind": "gcn", "in_features": 64, "hidden": 64, "out": 10, "dropout": 0.5}
    config.data.name = "node_graphs:digits"
    config.data.options = {"sampler": "guided", "size": 600, "hops": 10, "ratio": 0.5}
    config.optimizer.weight_decay = 5e-4
    config.steps = 200
    config.log_every, config.eval.every, config.checkpoint.every = 50, 100, 100
