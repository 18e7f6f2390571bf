"""CAPSTONE: document expansion with a curriculum of pseudo queries.

small     python -m train --config configs/capstone.py --workdir runs/capstone
          synopses of API documentation find their bodies: test MRR@10 0.08, success@10 0.15 (seed
          0; BM25 0.466 and 0.649), about 4 minutes on two shared cores.
stage2    python -m train.retrieve --config configs/capstone.py --checkpoint runs/capstone
              --output runs/mined --config.retrieve.split=train --config.retrieve.depth=200
              --config.retrieve.negatives=200
          python -m train --config configs/capstone.py:stage2 --workdir runs/capstone2
              --config.data.options.negatives_file=runs/mined/negatives.json
          the same with negatives that the first stage found, and four parts.
paper     python -m train --config configs/capstone.py:paper --workdir DIR
              --config.data.options.path=/path/to/marco --config.init_from=co-condenser-marco.bin
          MS MARCO passages, 8 GPUs' batch; paper_stage2 for the second stage. Training evaluates
          with one view of a document: add --config.data.options.views=10 where negatives are mined
          and where the index is measured.
"""

from train.defaults import default_config
from train.encoding import retrieve_keys

PRESETS = ("small", "stage2", "paper", "paper_stage2")


def get_config(preset: str = "small"):
    """The experiment `preset`."""
    if preset not in PRESETS:
        raise ValueError(f"configs/capstone.py: no preset {preset!r}; known: {', '.join(PRESETS)}")
    config = default_config()
    config.task = "dense_retrieval"
    config.model = "retrieval.dual_encoder"
    config.optimizer.name = "adam"  # the published AdamW has weight decay 0
    config.optimizer.args.eps = 1e-8
    config.optimizer.clip_norm = 2.0
    config.schedule.update(name="polynomial", end=0.0, power=1.0, warmup_inside=False)
    config.retrieve = retrieve_keys()
    if preset.startswith("paper"):
        _paper(config, preset)
    else:
        _small(config, preset)
    # Follows `--config.steps=...`: all parts come, whatever the length of the run.
    config.data.options.curriculum_steps = config.get_oneway_ref("steps")
    return config


def _small(config, preset):
    width = 128
    config.model_args = {
        "vocab_size": 8192,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 64,
        "pooler": False,
        "share_weight": True,
        # From scratch: 0.02 at this width would leave nearly nothing of a text in its vector.
        "initializer_range": 0.09,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config.task_args.scale = width**-0.5
    config.data.name = "docstrings"
    config.data.options = {
        "query_length": 20,
        "document_length": 56,
        "body_length": 42,
        "negatives": 1,
        "expansion": "gradual",
        "n_parts": 4 if preset == "stage2" else 3,
        "views": 4,
    }
    config.steps, config.batch_size = 150, 64
    config.schedule.update(peak=2e-3, warmup_steps=15)
    config.eval.split = "test"
    config.eval.batch_size = 256
    config.log_every = 25
    config.checkpoint.every = 75
    config.retrieve.shard_size = 2048


def _paper(config, preset):
    config.model = "retrieval.dual_encoder:co-condenser-marco"
    config.model_args = {"share_weight": False, "scan_layers": True, "remat": True}
    config.data.name = "msmarco"
    config.data.options = {
        "query_length": 32,
        "document_length": 144,
        "negatives": 31,
        "random_positive": preset == "paper",
        "expansion": "gradual",
        "n_parts": 3 if preset == "paper" else 4,
        "views": 1,  # in training's own evaluation; 10 for the index that is reported
        "workers": 16,
    }
    config.batch_size = 64
    config.steps, warmup = (20_000, 2_000) if preset == "paper" else (25_000, 2_500)
    config.schedule.update(peak=5e-6, warmup_steps=warmup)
    config.precision = "bfloat16"
    config.seed = 42
    config.log_every = 100
    config.checkpoint.update(every=1_000, keep=4)
    config.eval.batch_size = 512
