"""`python -m train.retrieve --config FILE --checkpoint PATH --output DIR`.

Encodes a collection in shards (a killed run goes on where it stopped), searches it with queries,
writes a TREC run and, where there are judgments, the measures. The collection is the config's data
set, or the files that `config.retrieve` names:

    --config.retrieve.documents=corpus.tsv   id, title, text (train/data/retrieval_files.py)
    --config.retrieve.queries=queries.tsv    --config.retrieve.judgments=qrels.txt
    --config.retrieve.layout=beir            a folder of BEIR: corpus.jsonl, queries.jsonl and
                                             qrels/test.tsv under the three names above
    --config.retrieve.pseudo_queries=file    expansion of these documents
    --config.retrieve.answers=qa.csv         questions with answers: success@k by passages that
                                             contain one (Natural Questions)
    --config.retrieve.index=faiss:HNSW32     another index than the exact one (extra `retrieval`)
    --config.retrieve.negatives=100          write negatives.json: documents that are found but not
                                             relevant, by query, to train the next stage on
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from jaxmodels.platform_choice import choose_platform

choose_platform()

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from jaxmodels.retrieval import capstone, metrics  # noqa: E402
from jaxmodels.retrieval.answers import first_hit  # noqa: E402
from jaxmodels.retrieval.index import ExactIndex, FaissIndex  # noqa: E402
from train.command_line import read_flags, stop_with_one_line  # noqa: E402
from train.data import expansion, pipeline, retrieval_files  # noqa: E402
from train.data.retrieval_set import RetrievalSet  # noqa: E402
from train.encoding import Encoder, ShardedVectors, mean_view  # noqa: E402
from train.naming import ConfigError  # noqa: E402

FLAGS = {
    "checkpoint": "a run directory of ours or a PyTorch checkpoint file",
    "output": "the folder for vectors, run and measures",
}


def main(argv: list[str]) -> int:
    """Encode what is missing, search, write the run, print the measures."""
    config, paths = read_flags(argv, need_workdir=False, strings=FLAGS)
    if "retrieve" not in config:
        raise ConfigError("config.retrieve is missing: this config is not one of a retriever")
    from train.initialization import starting_variables
    from train.loop import Plan
    from train.parallel import start_processes
    from train.process import prepare_process

    start_processes(config.parallel)
    prepare_process()
    if not Path(paths["checkpoint"]).exists():
        raise ConfigError(f"--checkpoint {paths['checkpoint']}: no such file or directory")
    with config.unlocked():
        config.init_from = paths["checkpoint"]
    keys, (family, options) = config.retrieve, pipeline.resolve(config.data)
    found = _set(config, family, options)
    output = Path(paths["output"])
    output.mkdir(parents=True, exist_ok=True)
    plan = Plan(config)
    params, extra = starting_variables(config, plan.abstract, plan.task, plan.make)
    size = config.eval.batch_size or config.batch_size
    everywhere = NamedSharding(plan.mesh, PartitionSpec())
    variables = jax.device_put({"params": params, **extra}, everywhere)

    def encoder(method: str, longest: int) -> Encoder:
        return plan.task.encoder(variables, method, longest, size, plan.mesh)

    identity = {
        "model": config.model,
        "model_args": config.model_args.to_dict(),
        "checkpoint": _identity(Path(paths["checkpoint"])),
        "data": {k: v for k, v in options.items() if k not in ("part", "workers", "threads")},
        "retrieve": {k: keys[k] for k in ("documents", "layout", "pseudo_queries")},
    }
    stores = _encode(
        output,
        found,
        options,
        keys,
        identity,
        encoder("encode_documents", options["document_length"]),
    )
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("vectors are written")
        if jax.process_index():
            return 0
    asked = encoder("encode_queries", options["query_length"])(found.query_rows)
    depth = min(keys.depth, len(found.document_ids))
    beir = _of_beir(keys)
    scores, rows = _search(stores, asked, min(depth + beir, len(found.document_ids)), keys.index)
    if beir:
        rows = _without_themselves(rows, found, depth)
    run = metrics.run_from_scores(found.query_ids, rows, scores, found.document_ids)
    if keys.from_ranking:
        run = metrics.run_from_ranking(found.query_ids, rows, found.document_ids)
    retrieval_files.write_run(output / "run.trec", run, from_ranking=keys.from_ranking)
    print(f"{len(run)} queries, {depth} documents each, in {output / 'run.trec'}")
    if keys.negatives:
        count = _write_negatives(output / "negatives.json", found, rows, keys.negatives)
        print(f"negatives of {count} queries in {output / 'negatives.json'}")
    if keys.answers:
        _evaluate_answers(output, rows, found, keys)
    elif found.judgments:
        _evaluate(output, run, found, keys)
    return 0


def _set(config, family, options) -> RetrievalSet:
    """The collection and queries of the config, or those of the files it names."""
    keys = config.retrieve
    split = keys.split or config.eval.split or pipeline.eval_split(config.data)
    if not keys.documents:
        found = family.retrieval_set(options, split)
    elif not hasattr(family, "collection"):
        raise ConfigError(
            f"config.retrieve.documents: data {config.data.name!r} has documents of its own, in "
            "config.data.options.path"
        )
    else:
        c = family.collection(options)
        corpus = retrieval_files.Corpus(keys.documents, keys.layout)
        texts = _Texts(corpus, c.tokenizer, keys.pseudo_queries, family.EMPTY_TITLES)
        if options["expansion"] and not keys.pseudo_queries:
            raise ConfigError(
                "config.retrieve.pseudo_queries: this model's documents are expanded; name the file"
            )
        layout = expansion.Layout.of(options, c.tokenizer)
        found = RetrievalSet(
            document_ids=corpus.ids,
            document_row=lambda row, view: expansion.view_row(texts, layout, row, view, options),
            views=options["views"] if options["expansion"] else 1,
            query_ids=[],
            query_rows=[],
            judgments={},
            document_text=lambda row: corpus.document(row)[1],
        )
        if not (keys.queries or keys.answers):
            raise ConfigError("config.retrieve.queries: queries for these documents are wanted")
    judged = retrieval_files.read_judgments(keys.judgments) if keys.judgments else {}
    if keys.queries or keys.answers:
        if keys.answers:
            rows = retrieval_files.read_questions_csv(keys.answers)
            given = {name: question for question, _, name in rows}
        else:
            given = retrieval_files.read_queries(keys.queries)
        if judged and _of_beir(keys):
            # Its queries are those of all splits.
            given = {name: text for name, text in given.items() if name in judged}
        found = dataclasses.replace(
            found,
            query_ids=list(given),
            query_rows=[family.query_row(t, options) for t in given.values()],
            judgments={},
            graded=None,
        )
    if keys.judgments:
        found = dataclasses.replace(found, judgments=judged, graded=None)
    return found


def _of_beir(keys) -> bool:
    return bool(keys.documents) and keys.layout == "beir"


def _without_themselves(rows: np.ndarray, found: RetrievalSet, depth: int) -> np.ndarray:
    """Rows [queries, any] with -1 for a document of the query's own id, and behind the first
    `depth` others: in BEIR's sets whose queries are documents these are not answers."""
    rows = np.array(rows)
    for best, query in zip(rows, found.query_ids):
        own = [r >= 0 and found.document_ids[r] == query for r in best.tolist()]
        best[own] = -1
        best[np.flatnonzero(best >= 0)[depth:]] = -1
    return rows


class _Texts:
    """`expansion.Documents` of a corpus file, with pseudo queries where there is a file of them.

    `empty_titles`: whether the model was trained on a field for the title even where it is empty.
    """

    def __init__(self, corpus, tokenizer, pseudo: str, empty_titles: bool):
        self._corpus, self._tokenizer, self._empty_titles = corpus, tokenizer, empty_titles
        self._pseudo = retrieval_files.PseudoQueries(pseudo, corpus.index) if pseudo else None

    def __len__(self) -> int:
        return len(self._corpus)

    def fields(self, row: int) -> list[list[int]]:
        title, text = self._corpus.document(row)
        fields = [title.strip(), text.strip()]
        return self._tokenizer.pieces_of(fields if self._empty_titles or fields[0] else fields[1:])

    def pseudo(self, row: int) -> list[list[int]]:
        texts = capstone.candidates_of(None, self._pseudo[row], self._corpus.ids[row])
        return self._tokenizer.pieces_of(texts)


def _identity(path: Path) -> dict[str, Any]:
    """What tells one checkpoint from another without reading it."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    files = [f for f in files if path.is_file() or "checkpoints" in f.parts]
    newest = max((f.stat().st_mtime_ns for f in files), default=0)
    return {"path": str(path.resolve()), "files": len(files), "newest": newest}


def _encode(output, found, options, keys, identity, encoder) -> list[ShardedVectors]:
    """The folders of vectors, one (averaged over views) or, for the maximum, one a view."""
    maximum = options.get("view_reduce", "mean") == "max" and found.views > 1
    stores = []
    for view in range(found.views if maximum else 1):
        folder = output / "vectors" / (f"view-{view:02d}" if maximum else "")
        own = {**identity, "view": view if maximum else "mean"}
        store = ShardedVectors(folder, len(found.document_ids), keys.shard_size, own)
        left = store.missing(jax.process_index(), jax.process_count())
        if len(left) < len(store):
            print(f"{len(store) - len(left)} of {len(store)} shards are there already")
        for shard in left:
            if maximum:
                vectors = mean_view(
                    encoder,
                    lambda row, _, view=view: found.document_row(row, view),
                    store.rows(shard),
                    1,
                )
            else:
                vectors = mean_view(encoder, found.document_row, store.rows(shard), found.views)
            store.write(shard, vectors)
            print(f"shard {shard + 1}/{len(store)}: {len(vectors)} documents", flush=True)
        stores.append(store)
    return stores


def _search(stores, asked: np.ndarray, depth: int, kind: str):
    results = []
    for store in stores:
        if kind == "exact":
            index = ExactIndex()
        elif kind.startswith("faiss:"):
            index = FaissIndex(asked.shape[1], kind.removeprefix("faiss:"))
        else:
            raise ConfigError(f"config.retrieve.index: {kind!r}; known: exact, faiss:DESCRIPTION")
        for vectors in store.read():
            index.add(vectors)
        results.append(index.search(asked, depth))
    if len(results) == 1:
        return results[0]
    scores, rows = (np.concatenate(part, axis=1) for part in zip(*results))
    return capstone.merge_best(scores, rows, depth)


def _write_negatives(path: Path, found: RetrievalSet, rows: np.ndarray, count: int) -> int:
    """The first `count` documents found for each query that are not judged relevant."""
    mined = {}
    for query, best in zip(found.query_ids, rows):
        relevant = {d for d, grade in found.judgments.get(query, {}).items() if grade > 0}
        names = [found.document_ids[r] for r in best if r >= 0]
        kept = [n for n in names if n not in relevant][:count]
        # A query without ground truth or without negatives teaches nothing.
        if relevant and kept:
            mined[query] = kept
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(mined, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return len(mined)


def _evaluate(output: Path, run, found: RetrievalSet, keys) -> None:
    try:
        names = [m.strip() for m in keys.measures.split(",") if m.strip()]
        result = metrics.evaluate(
            run,
            found.judgments,
            names,
            relevance_level=keys.relevance_level,
            missing=keys.missing,
        )
        graded = metrics.evaluate(
            run,
            found.graded or found.judgments,
            [n for n in names if n.startswith("ndcg")] or ["ndcg@10"],
            missing=keys.missing,
        )
    except ValueError as error:
        raise ConfigError(f"config.retrieve: {error}") from None
    numbers = {**result.mean, **graded.mean}
    absent = len(result.missing)
    report = {"measures": numbers, "missing_queries": absent, "queries": len(result.per_query)}
    (output / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(["| measure | value |", "|---|---|"]))
    print("\n".join(f"| {k} | {v:.6g} |" for k, v in numbers.items()))
    if absent:
        rule = "counted as 0" if keys.missing == "zero" else "left out"
        print(f"{absent} judged queries are not in the run; {rule}")


def _evaluate_answers(output: Path, rows: np.ndarray, found: RetrievalSet, keys) -> None:
    """Share of questions with an answer among the first k passages."""
    if found.document_text is None:
        raise ConfigError("config.retrieve.answers: this collection keeps no texts to look into")
    answers = [a for _, a, _ in retrieval_files.read_questions_csv(keys.answers)]
    hits = [
        first_hit((found.document_text(r) for r in best if r >= 0), own)
        for best, own in zip(rows.tolist(), answers)
    ]
    cuts = [k for k in (1, 5, 10, 20, 50, 100, 1000) if k <= rows.shape[1]]
    numbers = {f"success@{k}": sum(h is not None and h < k for h in hits) / len(hits) for k in cuts}
    (output / "metrics.json").write_text(json.dumps({"measures": numbers}, indent=1) + "\n")
    print("\n".join(["| measure | value |", "|---|---|"]))
    print("\n".join(f"| {k} | {v:.6g} |" for k, v in numbers.items()))


if __name__ == "__main__":
    sys.exit(stop_with_one_line(main, sys.argv))
