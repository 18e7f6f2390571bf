"""Change points of dynamic graphs by latent evolution, with LAD beside it.

python -m train --config configs/graph_cpd.py[:PRESET] --workdir DIR [--config.seed=SEED]
"""

from train.defaults import default_config

PRESETS = (
    "small",
    "evolving",
    "hard",
    "simulated_reviews",
    "reviews",
    "git",
    "us_senate",
    "uci",
    "edges",
    "paper",
)


def get_config(preset: str = "small"):
    """The experiment `preset`."""
    if preset not in PRESETS:
        raise ValueError(f"configs/graph_cpd.py: no preset {preset!r}; known: {', '.join(PRESETS)}")
    config = default_config()
    config.task = "change_points"
    config.model = "graphs.latent_evolution"
    config.task_args = {
        "rank": 10,
        "alpha": 0.5,
        "gamma": 1.0,
        "lam": 0.0,
        "iters": 50,
        "tol": 1e-5,
        "scorer": "frobenius",
        "warm_start": False,
        "baselines": ("lad",),
        "lad": {},
    }
    # There is no gradient: a step is a batch of targets.
    config.optimizer.name = "sgd"
    config.schedule.update(name="constant", peak=0.0)
    config.log_every = 1
    config.batch_size = 16
    config.steps = 10
    config.checkpoint.every = 5
    config.data.name = "dynamic_graphs:" + {"small": "shuffle", "paper": "edges"}.get(
        preset, preset
    )
    config.data.options = {}
    if preset == "paper":
        # The SBM files of the literature: t,u,v, 500 nodes, 151 snapshots, seven changes.
        config.data.options = {
            "path": "",
            "num_nodes": 500,
            "snapshots": 151,
            "events": (16, 31, 61, 76, 91, 106, 136),
        }
    return config
