"""What retrieval progressions do between trainings: mine negatives, rerank, choose queries.

Every function writes `lists.json` (or what its `result` says) into its stage's folder and returns
the numbers that tell what it did; arguments are paths of earlier stages' results or settings. Of
several processes all compute the same, and the first one writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxmodels.retrieval import prod
from jaxmodels.retrieval.answers import contains_answer
from train.data import judged_texts, ranked_lists
from train.naming import ConfigError
from train.ranker_search import (
    evaluate_split,
    evaluation_split,
    ranker_of_run,
    relevance,
    search,
)


class Kind(NamedTuple):
    """A kind of stage: the function, and what below its folder later stages get."""

    run: Callable
    result: str


def mine(
    folder: Path, *, encoder: Path, depth: int = 200, count: int = 100, queries: int = 0
) -> dict[str, float]:
    """Hard negatives of the training queries: what a trained dual encoder retrieves.

    Args:
      encoder: the run directory of a dual encoder (or of LEAD or PROD: its student).
      depth: documents retrieved. count: negatives kept, the first that are not relevant.
      queries: only so many training queries (0: all).
    """
    ranker = ranker_of_run(encoder)
    texts = ranker.texts
    ids = list(texts.queries["train"])[: queries or None]
    if not ids:
        raise ConfigError(
            f"{encoder}: collection {ranker.options['collection']!r} in {ranker.options['path']} "
            "has no training queries to mine negatives for (psgs, nq: train.json)"
        )
    asked = [texts.queries["train"][i] for i in ids]
    ranking = search(ranker, [ranker.rows.rows.query(text) for text in asked], depth)
    relevant = judged_texts.positives_of(texts, "train", ids)
    judged = (relevant >= 0).any(-1)
    hits = prod.first_hits(ranking, relevant)
    usable = ranking
    if texts.answers:
        # What contains an answer is no negative, judged or not.
        found = answer_hits(texts, ids, ranking)
        usable = np.where(found, -1, ranking)
        hits = np.where(found.any(-1), found.argmax(-1), prod.ABSENT)
    negatives, kept = prod.hard_negatives(usable, relevant, judged, count)
    lists = ranked_lists.ranked_lists(ids, asked, relevant, negatives, kept)
    if not lists:
        raise ConfigError(f"{encoder}: no training query has a positive and a mined negative")
    if jax.process_index() == 0:
        judged_texts.write_lists(folder / "lists.json", lists, texts)
        np.savez(folder / "ranking.npz", ranking=ranking, query_ids=np.array(ids))
    return {
        "queries": len(lists),
        "negatives": float(np.mean([len(e.negatives) for e in lists])),
        "train_mrr@10": float(
            np.where((hits >= 0) & (hits < 10), 1 / np.maximum(hits + 1.0, 1.0), 0).mean()
        ),
    }


def answer_hits(
    texts: judged_texts.JudgedTexts, queries: Sequence[str], ranking: np.ndarray
) -> np.ndarray:
    """Which ranked documents [Q, K] (-1: none) contain an answer of their query: bool [Q, K]."""
    hits = np.zeros(ranking.shape, bool)
    for q, k in np.argwhere(ranking >= 0):
        answers = texts.answers.get(queries[q], ())
        hits[q, k] = contains_answer(texts.texts[int(ranking[q, k])], answers)
    return hits


def select(
    folder: Path,
    *,
    lists: Path,
    reranker: Path,
    rule: str = "marco",
    window: int = 15,
    depth: int = 200,
    only_candidates: bool = False,
) -> dict[str, float]:
    """The confusing queries of mined lists: right for the teacher, almost right for the student.

    The student's ranking is the one `mine` left beside `lists`; the teacher's is a reordering of it
    by the cross encoder of the run `reranker`.

    A document is relevant by the judgments or, where the collection has answers, by containing one.

    Args:
      rule: marco | nq. window: ranks that count as almost right.
      depth: how much of the student's ranking is reranked.
      only_candidates: rerank only queries that the student's ranks leave a chance under `marco`;
        the same selection, but the teacher's buckets are of those queries alone.

    Raises ConfigError when no query is selected.
    """
    with np.load(Path(lists).parent / "ranking.npz") as stored:
        ids, ranking = stored["query_ids"].tolist(), stored["ranking"][:, :depth]
    ranker = ranker_of_run(reranker)
    texts = ranker.texts
    relevant = judged_texts.positives_of(texts, "train", ids)
    judged = (relevant >= 0).any(-1)
    if texts.answers:
        relevant = np.where(answer_hits(texts, ids, ranking), ranking, prod.ABSENT)
    student = prod.first_hits(ranking, relevant)
    asked = np.ones(len(ids), bool)
    if only_candidates and rule == "marco":
        asked = (student >= 1) & (student < window)
    chosen = np.flatnonzero(asked)
    queries = [ranker.rows.rows.query(texts.queries["train"][ids[i]]) for i in chosen]
    teacher = np.full(len(ids), prod.ABSENT)
    if len(chosen):
        order = prod.rerank(ranking[chosen], relevance(ranker, queries, ranking[chosen]))
        teacher[chosen] = prod.first_hits(order, relevant[chosen])
    selected = prod.confusing_queries(student, teacher, judged, rule=rule, window=window)
    wanted = {ids[i] for i in np.flatnonzero(selected)}
    if not wanted:
        raise ConfigError(
            f"no confusing query among {len(ids)} (rule {rule}, window {window}): the teacher puts "
            "none right that the student has almost right; a wider window takes in more"
        )
    entries = {e.query_id: e for e in judged_texts.read_lists(lists, texts)}
    missing = sorted(wanted - entries.keys())
    if missing:
        raise ConfigError(f"{lists}: selected query {missing[0]!r} is not in it")
    kept = [entries[i] for i in ids if i in wanted]
    tables = {
        who: prod.bucket_masks(hits, judged & asked)
        for who, hits in (("student", student), ("teacher", teacher))
    }
    sizes = {
        **{f"{who}.{name}": int(m.sum()) for who, t in tables.items() for name, m in t.items()},
        **{
            f"both.{name}": int((tables["student"][name] & tables["teacher"][name]).sum())
            for name in prod.BUCKETS
        },
    }
    if jax.process_index() == 0:
        judged_texts.write_lists(folder / "lists.json", kept, texts)
        (folder / "buckets.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    return {"selected": len(kept), "of": len(ids), "reranked": len(chosen)}


def evaluate(folder: Path, *, encoder: Path, split: str = "") -> dict[str, float]:
    """Measures of a run's (student's) dual encoder on a split, by default the test queries."""
    ranker = ranker_of_run(encoder)
    split = split or evaluation_split(ranker.texts)
    numbers = evaluate_split(ranker, split)
    if ranker.options["collection"] == "docstrings":
        numbers |= ranker.retrieval_set(split).baseline()
    if jax.process_index() == 0:
        text = json.dumps(numbers, indent=1) + "\n"
        (folder / "measures.json").write_text(text, encoding="utf-8")
    return numbers


KINDS: dict[str, Kind] = {
    "mine": Kind(mine, "lists.json"),
    "select": Kind(select, "lists.json"),
    "evaluate": Kind(evaluate, "measures.json"),
}
