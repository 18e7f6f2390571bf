"""Small collections in the published formats, and configs reduced to fit them."""

import json
from pathlib import Path

import numpy as np

MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]", "[unused2]", "-")
WORDS = (*MARKS, *(f"w{i}" for i in range(24)))
DOCUMENTS, QUERIES = 24, 12
TOWER = {
    "vocab_size": len(WORDS),
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 24,
    "pooler": False,
}


def texts():
    """(document texts, query texts): query i shares its words with document i."""
    rng = np.random.default_rng(0)
    documents = [[f"w{w}" for w in rng.choice(24, 6, replace=False)] for _ in range(DOCUMENTS)]
    queries = [" ".join(d[:3]) for d in documents[:QUERIES]]
    return [" ".join(d) for d in documents], queries


def write_marco(folder: Path) -> Path:
    """PROD's files of MS MARCO passages, with a vocabulary and training lists."""
    documents, queries = texts()
    files = {
        "para.txt": [f"{i}\t{t}" for i, t in enumerate(documents)],
        "para.title.txt": [f"{i}\tw{i % 24}" for i in range(0, DOCUMENTS, 2)],
        "train.query.txt": [f"{100 + i}\t{q}" for i, q in enumerate(queries)],
        "dev.query.txt": [f"{200 + i}\t{q}" for i, q in enumerate(queries[:4])],
        "qrels.train.tsv": [f"{100 + i}\t0\t{i}\t1" for i in range(QUERIES)],
        "qrels.dev.tsv": [f"{200 + i}\t{i}" for i in range(4)],
        "vocab.txt": WORDS,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    lists = [
        {
            "query_id": str(100 + i),
            "query_string": q,
            "pos_id": [str(i)],
            "neg_id": [str((i + k) % DOCUMENTS) for k in range(1, 6)],
        }
        for i, q in enumerate(queries)
    ]
    (folder / "marco_train.json").write_text(json.dumps(lists), encoding="utf-8")
    return folder


def write_psgs(folder: Path) -> Path:
    """LEAD's files: ids one too high in `psgs_w100.tsv`, training lists by id."""
    documents, queries = texts()
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["id\ttext\ttitle", *(f"{i + 1}\t{t}\tw{i % 24}" for i, t in enumerate(documents))]
    (folder / "psgs_w100.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    tests = [f"{q}\t['{i}']" for i, q in enumerate(queries[:4])]
    (folder / "test.csv").write_text("\n".join(tests) + "\n", encoding="utf-8")
    lists = [
        {
            "question": q,
            "answers": [],
            "positive_ctxs": [str(i)],
            "hard_negative_ctxs": [str((i + k) % DOCUMENTS) for k in range(1, 6)],
            "negative_ctxs": [],
        }
        for i, q in enumerate(queries)
    ]
    (folder / "train.json").write_text(json.dumps(lists), encoding="utf-8")
    return folder


def write_nq(folder: Path) -> Path:
    """DPR's files of Natural Questions: ids as they are, contexts with their texts, answers."""
    documents, queries = texts()
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["id\ttext\ttitle", *(f"{i + 1}\t{t}\tw{i % 24}" for i, t in enumerate(documents))]
    (folder / "psgs_w100.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")

    def context(row):
        row %= DOCUMENTS
        return {"title": "", "text": documents[row], "passage_id": str(row + 1)}

    lists = [
        {
            "question": q,
            "answers": [documents[i].split()[4]],
            "positive_ctxs": [context(i)],
            "hard_negative_ctxs": [context(i + k) for k in range(1, 6)],
            "negative_ctxs": [],
        }
        for i, q in enumerate(queries)
    ]
    (folder / "train.json").write_text(json.dumps(lists), encoding="utf-8")
    return folder


def write_marcodoc(folder: Path) -> Path:
    """MS MARCO documents in their published files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "msmarco-docs.tsv": ["D7\tw1\tw2 \tw3 w4", "D8\tw5\tw6", "D9\tw7\t\t"],
        "msmarco-doctrain-queries.tsv": ["1\tw1"],
        "msmarco-doctrain-qrels.tsv": ["1 0 D7 1"],
        "msmarco-docdev-queries.tsv": ["2\tw5"],
        "msmarco-docdev-qrels.tsv": ["2 0 D8 1"],
        "vocab.txt": (*WORDS, "<", "sep", ">"),
    }
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    lists = [{"query_id": 1, "query_string": "w1", "pos_id": [7], "neg_id": [8, "D9"]}]
    (folder / "train.json").write_text(json.dumps(lists), encoding="utf-8")
    return folder


def reduce(config, folder: Path, *, batch: int = 4, negatives: int = 2):
    """A paper config, and its stages, at a size for tests."""
    config.data.options.update(
        path=str(folder), query_length=8, document_length=12, number_neg=negatives, workers=0
    )
    config.precision = "float32"
    config.parallel.data = 1
    config.log_every, config.checkpoint.every, config.eval.every = 5, 0, 0
    config.batch_size = batch
    config.optimizer.accumulate = 1
    parts = [config, *(s.changes for s in config.stages.values() if s.kind == "train")]
    for part in parts:
        if part is not config and "steps" not in part:
            continue  # a stage that is the config itself
        if "model_args" in part:
            part.model_args = _reduced(part.model_args)
        if "teacher_args" in part.get("task_args", {}):
            part.task_args.teacher_args = _reduced(part.task_args.teacher_args)
        if part is not config:
            part.update(steps=2, batch_size=batch)
            part.optimizer.accumulate = 1
            options = part.data.options
            if "document_length" in options:
                del options.document_length
            options.number_neg = negatives
        part.schedule.update(peak=1e-2, warmup_steps=1)
    return config


def _reduced(arguments):
    kept = ("architecture", "share_weight", "scan_layers")  # a scanned tower compiles one block
    kept = {k: v for k, v in arguments.items() if k in kept}
    if arguments.get("binary_head") is False:
        kept["binary_head"] = False
    deeper = arguments["num_hidden_layers"] > 6
    return {**TOWER, **kept, "num_hidden_layers": 3 if deeper else 2}
