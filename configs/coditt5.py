"""CoditT5: learning to mend statements of Python's library; the published recipes.

small        python -m train --config configs/coditt5.py --workdir runs/coditt5
             statements with a bug, plan and repair written by a T5 of 1.05 M parameters: exact
             match 88 to 91 on files not trained on (five seeds; copying the input: 0), ten
             minutes of a core.
generator    the same with a plain T5 of that size that writes the repair alone: 89 to 92.
pretrain     CoditT5's corruption of the library's code and docstrings, from scratch.
git          the edits of a repository: --config.data.options.repository=/path/to/repository
             (on SQLAlchemy's: exact match 30, and 30 with --config.data.options.target=sequence,
             the plain generator, which copies more; 22 minutes of a core).
paper        fine-tuning of CoditT5 (222.9 M) on a published data set:
             python -m train --config configs/coditt5.py:paper --workdir DIR
                 --config.init_from=/path/to/CoditT5/pytorch_model.bin
                 --config.data.options.path=/path/to/data
                 --config.data.options.dataset=bf-small
                 --config.data.options.tokenizer=/path/to/CoditT5
             Epochs are bf-small's 972 steps: other data sets want their own steps and hold_for.
             (CodeT5, the baseline: --config.data.options.target=sequence and its own files.)
paper_pretrain  the published pre-training, from codet5-base resized by 24 rows:
             --config.init_from=/path/to/codet5-base/pytorch_model.bin and the data as above.
"""

from train.defaults import default_config

PRESETS = ("small", "generator", "pretrain", "git", "paper", "paper_pretrain")
VOCABULARY = 1024
# A history's own, so that the names in it have few pieces.
HISTORY_VOCABULARY = 4096


def get_config(preset: str = "small"):
    """The experiment `preset`."""
    if preset not in PRESETS:
        raise ValueError(f"configs/coditt5.py: no preset {preset!r}; known: {', '.join(PRESETS)}")
    config = default_config()
    config.task = "editing"
    if preset.startswith("paper"):
        _paper(config, preset)
    else:
        _small(config, preset)
    return config


def _small(config, preset):
    history = preset == "git"
    vocabulary = HISTORY_VOCABULARY if history else VOCABULARY
    config.model = "language.t5"
    config.model_args = {
        "vocab_size": vocabulary,
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 512,
        "num_layers": 2,
        "num_heads": 4,
        "eos_token_id": 2,
        "dropout_rate": 0.0,
    }
    config.data.name = {"pretrain": "edits:pretraining", "git": "edits:git"}.get(
        preset, "edits:repairs"
    )
    sizes = {
        "edits:repairs": {"words": (4, 9), "max_source": 40, "max_target": 48, "context": False},
        "edits:pretraining": {"words": (5, 16), "max_source": 56, "max_target": 80},
        "edits:git": {"words": (3, 12), "max_source": 48, "max_target": 56},
    }
    config.data.options = {
        **sizes[config.data.name],
        "vocabulary": vocabulary,
        "vocabulary_of": "data" if history else "library",
        "truncate": True,
        "evaluated": 256,
        "target": "sequence" if preset == "generator" else "plan",
    }
    config.task_args = {"eval_beams": 1, "test_beams": 5}
    # T5's optimizer. Its initialization gives tensors sizes from .01 to 1, and a step of Adafactor
    # is a share of them: with AdamW the same networks learn to copy more slowly.
    config.optimizer.name = "adafactor"
    config.optimizer.args = {}
    config.optimizer.clip_norm = 1.0
    config.schedule.update(name="cosine", peak=3e-2, end=0.0, warmup_steps=100)
    config.steps, config.batch_size = 6000 if history else 4000, 16
    config.log_every = 200
    config.eval.update(every=2000, batch_size=64)
    config.checkpoint.every = 1000


def _paper(config, preset):
    pretraining = preset == "paper_pretrain"
    config.model = "language.t5:coditt5"
    # A file of CodeT5 gets rows for the 24 edit tokens; CoditT5's has them.
    config.model_args.resize_checkpoint = True
    config.data.name = "edits:published"
    config.data.options = {
        "dataset": "pretrain" if pretraining else "bf-small",
        "max_source": 512,
        "max_target": 512,
    }
    config.batch_size = 1024 if pretraining else 48
    examples = 454_451 + 401_402 if pretraining else 46_680
    epoch, epochs = examples // config.batch_size, 50
    config.steps = epochs * epoch
    peak = 2e-4 if pretraining else 5e-5
    config.optimizer.name = "hf_adamw"
    config.optimizer.args = {
        "eps": 1e-8,
        "weight_decay": 0.01,
        # There names with "bias" and "LayerNorm.weight" do not decay: of T5's parameters the tables
        # of relative_attention_bias alone, for its norms are called layer_norm.
        "no_decay": "bias",
        "cycled_b1": (0.95, 0.85),
        "cycle_steps": epochs,
        "pct_start": 0.1,
        "hold_for": epoch,
    }
    # Stepped once an epoch: flat for the first five, then linear to a ten-thousandth.
    config.schedule.update(name="one_cycle", peak=peak, end=peak / 1e4, pct_start=0.1)
    config.schedule.hold_for = epoch
    config.task_args = {"eval_beams": 5, "test_beams": 20, "example_mean": True}
    if pretraining:
        # It has no test split.
        config.task_args.report_split = ""
        # 64 rows at a time: the logits of more fill 16 chips of 16 GiB. Blocks are not recomputed
        # (`model_args.remat`): libtpu's compiler ends in a stack overflow on them.
        config.optimizer.accumulate = 16
    config.precision = "bfloat16"
    config.log_every = 100
    config.eval.every = epoch // 2 if pretraining else epoch
    config.checkpoint.update(every=config.eval.every, best_metric="output_bleu4")
    if not pretraining:
        config.checkpoint.update(patience=5, report_best=True)
