"""PROD: a small dual encoder distilled by ever better teachers, then on confusing queries.

small     python -m train --config configs/prod.py --workdir runs/prod
          the whole progression on API documentation, reduced: student 2x64 (dual encoder), teachers
          2x128 (dual encoder), 3x64 and 4x96 (cross encoders).
paper     python -m train --config configs/prod.py:paper --workdir DIR
              --config.data.options.path=/path/to/marco
              --config.stages.W1_teacher.changes.task_args.start_from=ernie-2.0-base-en.bin ...
          MS MARCO passages (PROD's files), 6-layer student, ERNIE 2.0 teachers of 12 and 24 layers;
          published MRR@10 39.3 against 31.7 of the 6-layer student alone.

student   the 6-layer dual encoder alone, for a published checkpoint:
          python -m train.retrieve --config configs/prod.py:student --checkpoint FILE --output DIR

One command runs every stage, skips what is finished, goes on in the middle of a stage, and runs a
stage again when its settings or what it reads changed. The config itself is stage T3 (`order=()`
trains that alone, `dry_run` compiles it); `stages` say what differs in the others:

W1, W2  warm-up of teacher 1 and student on BM25's, then on mined negatives (M1)
T1      distillation by the dual encoder, over the documents of the batch
C1, T2  training of the 12-layer cross encoder on M2's negatives; distillation by it
C2, T3  the 24-layer cross encoder on M3's; distillation by it
D1, D2  the queries that C2's model puts right and T3's student almost right (M4); distillation on
        them, hardest negatives first
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

PRESETS = ("small", "paper", "student")
# What the checkpoints begin with: BERT of 12 and 24 blocks; the student is its first blocks.
_ORIGINAL = ("W1_teacher", "W1_student")
_ORDER = (
    *_ORIGINAL,
    "M1",
    "W2_teacher",
    "W2_student",
    "T1",
    "M2",
    "C1",
    "T2",
    "M3",
    "C2",
    "T3",
    "M4",
    "D1",
    "D2",
)


def get_config(preset: str = "small"):
    """The experiment `preset` `small`, `paper` or `student`."""
    if preset not in PRESETS:
        raise ValueError(f"configs/prod.py: no preset {preset!r}; known: {', '.join(PRESETS)}")
    config = student_config("prod", seed=42)
    sizes = _small(config) if preset == "small" else _paper(config)
    _stages(config, sizes)
    if preset == "student":
        student_alone(config)
        config.data.options.rows = ()
    return config


def _small(config):
    # One tower: from scratch two of them have no words in common, and rank hardly above chance.
    shared = {**SMALL, "share_weight": True}
    config.model_args = tower(64, 2, 4, **shared)
    config.data.options = {
        "query_length": 24,
        "document_length": 48,
        "number_neg": 3,
        "rows": ("cross",),
    }
    config.log_every = 25
    return {
        # Wider, not deeper: from scratch more blocks learn the training pairs by heart.
        "dual": tower(128, 2, 4, **shared),
        "cross_1": tower(64, 3, 4, **SMALL),
        "cross_2": tower(96, 4, 4, **SMALL),
        "student_scale": 64**-0.25,
        "teacher_scale": 128**-0.25,
        "score_scale": 64**-0.5,
        "batch": {"dual": 64, "group": 16, "cross": 16, "accumulate": 1},
        "negatives": {"dual": 1, "group": 3},
        "rates": {"warm": 3e-3, "distil": 1e-3, "cross_1": 1e-3, "cross_2": 1e-3, "last": 3e-4},
        "steps": {"W1": 200, "W2": 50, "T": 200, "C": 150, "D2": 20},
        "warmup": {"W1": 20, "W2": 5, "T": 20, "C1": 15, "C2": 15, "D2": 2},
        "document": {"cross": 48},
        "select": {"depth": 20, "only_candidates": True},
    }


def _paper(config):
    base = {"vocab_size": 30522, "max_position_embeddings": 512, **ERNIE}
    config.model_args = tower(768, 6, 12, **base, remat=True, scan_layers=True)
    config.precision = "bfloat16"
    config.data.name = "ranked_lists:marco"
    config.data.options = {
        "lists": "marco_train.json",
        "vocabulary": "vocab.txt",  # both in the folder `path`, unless they are paths
        "query_length": 32,
        "document_length": 144,
        "number_neg": 15,
        "rows": ("cross",),
        "workers": 8,
    }
    config.log_every = 100
    config.checkpoint.every = 1000
    return {
        "dual": tower(768, 12, 12, **base, remat=True, scan_layers=True),
        "cross_1": tower(768, 12, 12, **base, remat=True, scan_layers=True),
        "cross_2": tower(1024, 24, 16, **base, remat=True, scan_layers=True),
        "student_scale": 1.0,
        "teacher_scale": 1.0,
        "score_scale": 1.0,
        # 8 GPUs: 16 queries each, 8 in cross-encoder stages, 4 with 8 micro-batches.
        "batch": {"dual": 128, "group": 64, "cross": 256, "accumulate": 8},
        "negatives": {"dual": 1, "group": 15},
        "rates": {"warm": 2e-5, "distil": 5e-5, "cross_1": 1e-5, "cross_2": 5e-6, "last": 1e-5},
        "steps": {"W1": 40000, "W2": 10000, "T": 40000, "C": 6000, "D2": 2000},
        "warmup": {"W1": 4000, "W2": 1000, "T": 4000, "C1": 1000, "C2": 600, "D2": 200},
        "document": {"cross": 160},
        "select": {"depth": 200},
    }


def _stages(config, sizes):
    """The stages of the official pipeline (README of PROD), by the sizes of a preset."""
    steps, warmup, rates = sizes["steps"], sizes["warmup"], sizes["rates"]
    objective = {
        "kd_type": "KD_softmax",
        "temperature": 4.0,
        "ce_weight": 0.1,
        "kd_weight": 0.9,
        "embedding_scale": sizes["student_scale"],
    }
    config.task_args = {
        **objective,
        "lwf": True,
        "lwf_weight": 1.0,
        "teacher": "retrieval.cross_encoder",
        "teacher_args": sizes["cross_2"],
        "student_from": "",
        "teacher_from": "",
    }
    config.steps, config.batch_size = steps["T"], sizes["batch"]["group"]
    config.schedule.update(peak=rates["distil"], warmup_steps=warmup["T"])
    config.order = _ORDER

    def train(name, count, warm, rate, batch, **changes):
        data = {"number_neg": sizes["negatives"]["group"], **changes.pop("data", {})}
        optimizer = {"accumulate": changes.pop("accumulate", 1)}
        uses = changes.pop("uses", {})
        config.stages[name] = training(
            uses,
            count,
            rate,
            warm,
            batch_size=batch,
            optimizer=optimizer,
            data={"options": data},
            **changes,
        )

    def ranking(name, count, warm, rate, args, uses):
        # Dual encoders alone: in-batch negatives, one hard negative.
        train(
            name,
            count,
            warm,
            rate,
            sizes["batch"]["dual"],
            task="ranking",
            task_args={"score_scale": sizes["score_scale"], "start_from": ""},
            data={"number_neg": sizes["negatives"]["dual"], "rows": ()},
            uses=uses,
            **({"model_args": args} if args else {}),
        )

    def reranker(name, warm, rate, args, lists):
        train(
            name,
            steps["C"],
            warm,
            rate,
            sizes["batch"]["cross"],
            accumulate=sizes["batch"]["accumulate"],
            task="ranking",
            model="retrieval.cross_encoder",
            model_args=args,
            task_args={"start_from": ""},
            data={"document_length": sizes["document"]["cross"]},
            uses={"data": {"options": {"lists": lists}}},
        )

    def distil(name, count, warm, rate, teacher, student, lists, **changes):
        uses = {
            "task_args": {"teacher_from": teacher, "student_from": student},
            "data": {"options": {"lists": lists}},
        }
        train(name, count, warm, rate, sizes["batch"]["group"], uses=uses, **changes)

    mined = {"data": {"options": {"lists": "M1"}}}
    for who, args in (("teacher", sizes["dual"]), ("student", {})):
        ranking(f"W1_{who}", steps["W1"], warmup["W1"], rates["warm"], args, {})
        ranking(
            f"W2_{who}",
            steps["W2"],
            warmup["W2"],
            rates["warm"],
            args,
            {"task_args": {"start_from": f"W1_{who}"}, **mined},
        )
    config.stages.M1 = mining("W1_teacher")
    train(
        "T1",
        steps["T"],
        warmup["T"],
        rates["distil"],
        sizes["batch"]["dual"],
        task_args={
            **objective,
            "teacher_scale": sizes["teacher_scale"],
            "teacher": "retrieval.dual_encoder",
            "teacher_args": sizes["dual"],
            "student_from": "",
            "teacher_from": "",
        },
        data={"number_neg": sizes["negatives"]["dual"], "rows": ()},
        uses={"task_args": {"teacher_from": "W2_teacher", "student_from": "W2_student"}, **mined},
    )
    config.stages.M2 = mining("W2_teacher")
    reranker("C1", warmup["C1"], rates["cross_1"], sizes["cross_1"], "M2")
    first = {**config.task_args.to_dict(), "teacher_args": sizes["cross_1"]}
    distil("T2", steps["T"], warmup["T"], rates["distil"], "C1", "T1", "M2", task_args=first)
    config.stages.M3 = mining("T2")
    reranker("C2", warmup["C2"], rates["cross_2"], sizes["cross_2"], "M3")
    distil("T3", steps["T"], warmup["T"], rates["distil"], "C2", "T2", "M3")
    # The framework figure has three rounds of data progression, the official commands one: `order`
    # may go on with M4_2, D1_2, D2_2 and M4_3, D1_3, D2_3, each with the newest student.
    newest = "T3"
    for suffix in ("", "_2", "_3"):
        lists, selected, name = f"M4{suffix}", f"D1{suffix}", f"D2{suffix}"
        config.stages[lists] = mining(newest)
        config.stages[selected] = stage(
            "select",
            {"lists": lists, "reranker": "C2"},
            **{"rule": "marco", "window": 15, **sizes["select"]},
        )
        distil(
            name,
            steps["D2"],
            warmup["D2"],
            rates["last"],
            "C2",
            newest,
            selected,
            # Few enough that none are held out.
            data={"sampling": "descend", "held_out": 0},
        )
        newest = name
