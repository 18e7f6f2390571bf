"""LEAD: a small dual encoder and its teacher, distilled layer by layer, both trained.

small     python -m train --config configs/lead.py --workdir runs/lead
          API documentation: warm-up of a 2x128 dual-encoder teacher, negatives mined by it, warm-up
          of the 2x64 student on them, LEAD from both.
late      the same with a late-interaction (ColBERT) teacher; cross with a 4x64 cross encoder.
paper     python -m train --config configs/lead.py:paper --workdir DIR
              --config.data.options.path=/path/to/msmarco
              --config.stages.W_student.changes.task_args.start_from=distilbert-base-uncased.bin ...
          (W_miner and W_teacher from co-condenser-marco.bin; without files they begin untrained)
          12-layer dual encoder to 6-layer DistilBERT; paper_late and paper_cross for 12CB and 12CE,
          paper_large for 24CB to 12 layers (published MRR@10: 12CB to 6 37.8, 24CB to 12 40.4).

student     the DistilBERT dual encoder alone, student_large the 12-layer one of paper_large, for a
          checkpoint of it (those published, 24_to_12_TASK.ckpt, are of the latter):
          python -m train.retrieve --config configs/lead.py:student_large --checkpoint FILE
              --output DIR --config.data.options.path=/path/to/msmarco

One command runs every stage, skips what is finished and goes on in the middle of a stage. The
config itself is the last stage (`order=()` trains that alone, from `task_args.student_from` and
`teacher_from`; `dry_run` compiles it):

W_miner, M   the negative miner, and the 100 negatives of every training query that it finds
W_teacher, W_student   warm-up of both models alone, on those negatives
L            LEAD
"""

from configs.distilled_encoders import (
    ERNIE,
    SMALL,
    mining,
    stage,
    student_alone,
    student_config,
    tower,
    training,
)

PRESETS = (
    "small",
    "late",
    "cross",
    "paper",
    "paper_late",
    "paper_cross",
    "paper_large",
    "student",
    "student_large",
)
TEACHERS = {
    "dual": "retrieval.dual_encoder",
    "late": "retrieval.late_interaction",
    "cross": "retrieval.cross_encoder",
}


def get_config(preset: str = "small"):
    """The experiment `preset`."""
    if preset not in PRESETS:
        raise ValueError(f"configs/lead.py: no preset {preset!r}; known: {', '.join(PRESETS)}")
    config = student_config("lead", seed=888)
    config.optimizer.clip_groups = ("teacher",)
    kind = {"late": "late", "cross": "cross", "paper_late": "late", "paper_cross": "cross"}
    kind = kind.get(preset, "late" if preset == "paper_large" else "dual")
    config.task_args = {
        "teacher": TEACHERS[kind],
        "teacher_args": {},
        "student_from": "",
        "teacher_from": "",
        "layers": 5,
        "selection": "random",
        "reselect_every": 10,
        "temperature": 1.0,
        "layer_temperature": 10.0,
        "reweight": True,
        "train_teacher": True,
        "student_scale": 1.0,
        "teacher_scale": 1.0,
    }
    rows = () if kind == "dual" else (kind,)
    config.data.options = {"layout": "lead", "rows": rows}
    paper = preset.startswith(("paper", "student"))
    (_paper if paper else _small)(config, preset, kind)
    if preset.startswith("student"):
        student_alone(config)
    return config


def _small(config, preset, kind):
    del preset
    shared = {**SMALL, "share_weight": True}
    config.model_args = tower(64, 2, 4, **shared)
    # Wider, not deeper: from scratch more blocks learn the training pairs by heart.
    miner = tower(128, 2, 4, **shared)
    teacher = tower(64, 4, 4, **SMALL) if kind == "cross" else miner
    config.task_args.update(
        layers=2,
        teacher_args=teacher,
        student_scale=64**-0.25,
        teacher_scale=teacher["hidden_size"] ** -0.25,
    )
    config.data.options.update(query_length=20, document_length=40, number_neg=1)
    if kind == "cross":
        config.data.options.number_neg = 3
    config.log_every = 25
    config.steps, config.batch_size = 100, 64
    config.schedule.update(peak=1e-3, warmup_steps=10)
    _stages(config, kind, teacher, miner, {"miner": 250, "warm": 150}, 3e-3, 64**-0.5)


def _paper(config, preset, kind):
    large = preset.endswith("large")
    bert = {"vocab_size": 30522, "max_position_embeddings": 512, "remat": True, "scan_layers": True}
    if large:
        config.model_args = tower(768, 12, 12, **bert, share_weight=True)
        teacher = tower(1024, 24, 16, **bert, **ERNIE)
    else:
        config.model_args = tower(768, 6, 12, **bert, architecture="distilbert", share_weight=True)
        teacher = tower(768, 12, 12, **bert)
    miner = tower(768, 12, 12, **bert, share_weight=True)
    if kind == "cross":
        teacher["binary_head"] = False
        config.optimizer.accumulate = 10
    else:
        teacher["share_weight"] = True
    config.task_args.teacher_args = teacher
    config.data.name = "ranked_lists"
    config.data.options.update(
        collection="psgs",
        lists="train.json",
        vocabulary="vocab.txt",
        query_length=32,
        document_length=256,
        number_neg=7 if kind == "cross" else 1,
        workers=8,
    )
    config.steps = 100_000 if kind == "cross" else 50_000
    # Eight GPUs with the scripts' default of 8 queries each, times the micro-batches.
    config.batch_size = 64 * config.optimizer.accumulate
    peak = 2e-5 if kind == "late" else 5e-5
    config.schedule.update(peak=peak, warmup_steps=config.steps // 10)
    config.log_every = 100
    config.checkpoint.every = 1000
    rate = 1e-5 if kind == "cross" or large else 2e-5
    _stages(config, kind, teacher, miner, {"miner": 20_000, "warm": 20_000}, rate, 1.0)


def _stages(config, kind, teacher, miner, steps, rate, scale):
    """Order of work of the official README: negatives, warm-ups, then LEAD."""

    def warm(name, count, uses, peak, rows=(), **changes):
        config.stages[name] = training(
            uses,
            count,
            peak,
            count // 10,
            task="ranking",
            task_args={"score_scale": scale, "start_from": ""},
            optimizer={"clip_groups": (), "accumulate": changes.pop("accumulate", 1)},
            data={"options": {"rows": rows}},
            **changes,
        )

    mined = {"data": {"options": {"lists": "M"}}}
    # Student and miner at 2e-5; cross encoders and large teachers at half of it.
    others = rate if scale != 1.0 else 2e-5
    batch = config.batch_size // config.optimizer.accumulate
    warm("W_miner", steps["miner"], {}, others, model_args=miner, batch_size=batch)
    config.stages.M = mining("W_miner")
    # From scratch the dual-encoder teacher goes on from the miner, which is the same network.
    same = {"task_args": {"start_from": "W_miner"}} if scale != 1.0 and kind == "dual" else {}
    warm(
        "W_teacher",
        steps["warm"],
        {**mined, **same},
        rate,
        () if kind == "dual" else (kind,),
        model=TEACHERS[kind],
        model_args=teacher,
        accumulate=config.optimizer.accumulate,
    )
    warm("W_student", steps["warm"], mined, others, batch_size=batch)
    finished = {"student_from": "W_student", "teacher_from": "W_teacher"}
    config.stages.L = stage("train", {"task_args": finished, **mined})
    config.order = ("W_miner", "M", "W_teacher", "W_student", "L")
