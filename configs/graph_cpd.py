"""Change points of dynamic graphs by latent evolution, with LAD beside it.

small     python -m train --config configs/graph_cpd.py --workdir runs/graph_cpd
          four blocks of 100 nodes whose members are permuted at seven of 151 snapshots: Hits@7
          1.00, LAD 0.10 (mean of three sequences); half a minute on two cores.
evolving, hard, simulated_reviews: other sequences made on the spot, as quick.
reviews   --config.data.options.path=HISTORY.csv --config.data.options.releases=RELEASES.csv
          author -> reviewer graphs by month, release months as events.
git       --config.data.options.path=CLONE: the same from `git log` and tags of a local clone.
us_senate, uci: the published sets as files t,u,v,w (path), with LAD's published settings.
edges     any file t,u,v[,w]: path, num_nodes, directed, weighted, events or events_path.
paper     the block-model files of the literature: 500 nodes, 151 snapshots, w 5, k 10.

A step is a batch of targets, so steps x batch_size must reach the number of targets (T - w); the
report says when it does not. `config.seed` draws the starting factors, `data.options.sequence_seed`
the sequence.
"""

from jaxmodels.graphs.laplacian_change import SETTINGS
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
_OFFICIAL_EVENTS = (16, 31, 61, 76, 91, 106, 136)


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
    # There is no gradient and no step size: an update is a number of sweeps.
    config.optimizer.name = "sgd"
    config.schedule.update(name="constant", peak=0.0)
    config.log_every = 1
    config.batch_size, config.steps = 16, 10
    config.checkpoint.every = 5
    variant = {"small": "shuffle", "paper": "edges"}.get(preset, preset)
    config.data.name = f"dynamic_graphs:{variant}"
    config.data.options = {}
    if preset == "paper":
        config.data.options = {
            "path": "",
            "num_nodes": 500,
            "snapshots": 151,
            "events": _OFFICIAL_EVENTS,
        }
    elif preset == "us_senate":
        config.data.options = {"path": ""}
        config.task_args.lad = _lad("us_senate")
        config.batch_size, config.steps = 10, 1
    elif preset == "uci":
        # A day has some hundred of 1,901 people: sums over edges, not n x n products.
        config.data.options = {"path": "", "sparse": True}
        config.task_args.lad = _lad("uci")
        config.steps = 12
    elif preset in ("reviews", "git"):
        config.data.options = {"path": "" if preset == "reviews" else ".", "sparse": True}
        config.task_args.lad = {"num_eigen": 50}
        config.steps = 12
    elif preset == "simulated_reviews":
        config.task_args.lad = {"num_eigen": 50}
        config.steps = 6
    return config


def _lad(name: str) -> dict[str, int]:
    """LAD's published windows and signature size."""
    return {k: v for k, v in SETTINGS[name].items() if k != "share"}
