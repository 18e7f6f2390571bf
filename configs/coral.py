"""CORAL: reviewer recommendation on a socio-technical graph.

small     python -m train --config configs/coral.py --workdir runs/coral
          a simulated history (3,000 changes, 120 people), 40 s on two busy cores: MRR 0.40 beside
          0.46 of the rule-based model, 0.22 of popularity and 0.05 of chance (seed 0).
git       python -m train --config configs/coral.py:git --workdir runs/mine
              --config.data.options.git_dir=/path/to/any/clone
          `git log` of a local clone with review trailers; identities are hashed.
csv       python -m train --config configs/coral.py:csv --workdir runs/csv
              --config.data.options.path=history.csv.gz
          a review history in a file.
paper     python -m train --config configs/coral.py:paper --workdir DIR
              --config.data.options.path=history.jsonl
          one-hot input, 128 wide, random split, until the loss stops falling (3,200 steps at most,
          200 epochs of 13 million edges); the paper's 332 repositories are not public.
          `:paper_shapes --config.dry_run=v5e:4x4` compiles a step of that scale.
"""

from ml_collections import ConfigDict

from train.defaults import default_config

PRESETS = ("small", "git", "csv", "paper", "paper_shapes")


def get_config(preset: str = "small"):
    """The experiment `preset`, one of PRESETS."""
    if preset not in PRESETS:
        raise ValueError(f"configs/coral.py: no preset {preset!r}; known: {', '.join(PRESETS)}")
    config = default_config()
    config.task = "reviewer_recommendation"
    config.task_args.update(pr_user_fraction=0.2, patience=10, min_decrease=1e-3)
    config.model = "graphs.coral"
    config.data.name = "code_review"
    config.optimizer.name = "adam"
    config.schedule.update(name="constant", peak=1e-2)
    # Recommended people a change, for `python -m train.predict`.
    config.predict = ConfigDict({"k": 5})
    # An example is a block of 256 edges, or of 256 test changes.
    config.eval.batch_size = 2
    if preset.startswith("paper"):
        _paper(config, shapes=preset == "paper_shapes")
    else:
        _small(config, preset)
    return config


def _small(config, preset):
    config.model_args = {"dims": (64, 64), "input": "embedding", "embed": 64}
    config.batch_size = 64
    config.steps = 60
    config.log_every = 20
    if preset != "small":
        config.steps = 300
        config.schedule.name = "cosine"
        config.eval.every = 100
        config.checkpoint.every = 100
    if preset == "csv":
        config.data.options.path = "history.csv.gz"
    if preset == "git":
        config.data.options.git_dir = "."


def _paper(config, shapes):
    config.model_args = {"dims": (128, 128), "input": "onehot"}
    config.data.options.path = "history.jsonl"
    config.batch_size = 4096
    # Patience ends the training. 16 steps are an epoch of 13 million edges, `pr_user` left out; for
    # a history of fewer edges than a batch (a million) take a smaller batch_size.
    config.steps = 3200
    config.log_every = 20
    config.eval.every = 400
    config.checkpoint.every = 400
    if shapes:
        # The platform has 37.4 M nodes and 128.7 M edges of 6,500 repositories; these are 332.
        config.data.options.path = None
        config.data.options.sizes = {
            "nodes": 2**21,
            "edges": 2**23,
            "users": 2**15,
            "repositories": 332,
            "queries": 2**15,
            "neighbors": 64,
        }
