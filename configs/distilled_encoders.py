"""What `lead` and `prod` share: a small dual encoder taught by larger networks, stage by stage.

No experiment of its own.
"""

from train.defaults import default_config
from train.encoding import retrieve_keys

# BERT's sizes for the presets that learn from scratch.
SMALL = {
    "vocab_size": 4000,
    "max_position_embeddings": 96,
    "pooler": False,
    # Small and from scratch: BERT's 0.02 leaves nearly nothing of a text in its vector.
    "initializer_range": 0.125,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

# What the published ERNIE 2.0 encoders have other than BERT's.
ERNIE = {"type_vocab_size": 4, "layer_norm_eps": 1e-5}


def student_config(task: str, seed: int):
    """The default config with both papers' optimizer, schedule and kind of data."""
    config = default_config()
    config.task = task
    config.model = "retrieval.dual_encoder"
    config.data.name = "ranked_lists"
    config.optimizer.name = "adam"  # the published AdamW has weight decay 0
    config.optimizer.args.eps = 1e-8
    config.optimizer.clip_norm = 2.0
    config.schedule.update(name="polynomial", end=0.0, power=1.0, warmup_inside=False)
    config.seed = seed
    config.eval.split = "validation"
    config.retrieve = retrieve_keys()
    return config


def student_alone(config) -> None:
    """Turns the config into one of the student's network without a teacher, for its checkpoints."""
    config.task, config.task_args, config.order = "ranking", {"start_from": ""}, ()


def tower(width: int, blocks: int, heads: int, **others) -> dict:
    """Arguments of a BERT of these sizes."""
    return {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        **others,
    }


def stage(kind: str, uses: dict, **changes) -> dict:
    """An entry of `config.stages`."""
    return {"kind": kind, "given": "", "uses": uses, "changes": changes}


def training(uses: dict, steps: int, rate: float, warmup: int, **changes) -> dict:
    """A stage that trains with a schedule of its own."""
    schedule = {"peak": rate, "warmup_steps": warmup}
    return stage("train", uses, steps=steps, schedule=schedule, **changes)


def mining(encoder: str) -> dict:
    """The stage that finds 100 negatives of every training query with the stage `encoder`."""
    return stage("mine", {"encoder": encoder}, depth=200, count=100, queries=0)
