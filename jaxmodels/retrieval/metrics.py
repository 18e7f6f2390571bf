"""Retrieval metrics by trec_eval's rules, in NumPy: rankings, ties, levels, absent queries.

A run is `{query id: {document id: score}}`, judgments are `{query id: {document id: grade}}`.
Documents are ranked by score, descending, compared in float32; ties by document id, descending in
byte order; the order in which a run lists its documents is ignored. Verified against
pytrec_eval-terrier 0.5.11.

Measures, k any cut-off: `ndcg@k` (gain is the grade, discount 1/log2(rank + 1), ideal over all
judged documents; negative grades count 0), `mrr@k` and `mrr` (reciprocal rank of the first
relevant document), `map@k` and `map` (over all relevant documents), `recall@k` (of the relevant
documents), `success@k` (any relevant document: DPR's top-k accuracy), `precision@k`, `hole@k`
(share of the top k that is unjudged). `relevance_level` is the least grade that is relevant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxmodels.spelling import did_you_mean

Run = Mapping[str, Mapping[str, float]]
Judgments = Mapping[str, Mapping[str, int]]
DEFAULT_MEASURES = ("mrr@10", "ndcg@10", "map", "recall@100", "recall@1000", "success@10")
MISSING = ("zero", "skip")


def ranking(scores: Mapping[str, float]) -> list[str]:
    """Document ids of one query in evaluation order."""
    single = {doc: np.float32(score) for doc, score in scores.items()}
    by_id = sorted(single, key=lambda doc: doc.encode(), reverse=True)
    return sorted(by_id, key=lambda doc: -single[doc])


def _ndcg(ranked, judged, level, k):
    del level
    ideal = np.sort(np.maximum(judged, 0))[::-1][:k]
    best = (ideal / np.log2(np.arange(len(ideal)) + 2)).sum()
    gains = np.maximum(np.nan_to_num(ranked[:k]), 0)
    return (gains / np.log2(np.arange(len(gains)) + 2)).sum() / best if best > 0 else 0.0


def _mrr(ranked, judged, level, k):
    del judged
    hits = np.flatnonzero(ranked[:k] >= level)
    return 1.0 / (hits[0] + 1) if hits.size else 0.0


def _map(ranked, judged, level, k):
    relevant = (judged >= level).sum()
    hits = ranked[:k] >= level
    precision = hits.cumsum() / (np.arange(len(hits)) + 1)
    return (precision * hits).sum() / relevant if relevant else 0.0


def _recall(ranked, judged, level, k):
    relevant = (judged >= level).sum()
    return (ranked[:k] >= level).sum() / relevant if relevant else 0.0


def _success(ranked, judged, level, k):
    del judged
    return float((ranked[:k] >= level).any())


def _precision(ranked, judged, level, k):
    del judged
    return (ranked[:k] >= level).sum() / k


def _hole(ranked, judged, level, k):
    del judged, level
    top = ranked[:k]
    return np.isnan(top).mean() if len(top) else 0.0


_MEASURES = {
    "ndcg": _ndcg,
    "mrr": _mrr,
    "map": _map,
    "recall": _recall,
    "success": _success,
    "precision": _precision,
    "hole": _hole,
}
_WITHOUT_CUT = ("ndcg", "mrr", "map")


def _parse(measure: str):
    found = re.fullmatch(r"([a-z]+)(?:@([1-9]\d*))?", measure)
    if not found or found[1] not in _MEASURES or (not found[2] and found[1] not in _WITHOUT_CUT):
        known = [f"{m}@k" for m in _MEASURES] + list(_WITHOUT_CUT)
        raise ValueError(
            f"no measure {measure!r}{did_you_mean(measure, known)}; known: {', '.join(known)}"
        )
    return _MEASURES[found[1]], int(found[2]) if found[2] else None


@dataclass(frozen=True)
class Evaluation:
    """Measures of a run.

    Attributes:
      mean: measure -> average over the queries counted.
      per_query: query id -> measure -> value.
      missing: judged queries that the run does not list.
      unjudged: queries of the run without judgments, which are left out.
    """

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]
    missing: list[str]
    unjudged: list[str]


def evaluate(
    run: Run,
    judgments: Judgments,
    measures: Iterable[str] = DEFAULT_MEASURES,
    *,
    relevance_level: int = 1,
    missing: str = "zero",
) -> Evaluation:
    """Measures of `run` for every judged query.

    Args:
      missing: "zero" counts judged queries that the run leaves out as 0 (MS MARCO's rule), "skip"
        averages over the queries that both have (trec_eval's rule).

    Raises ValueError for an unknown measure or `missing`, NaN scores, or no query in common.
    """
    if missing not in MISSING:
        raise ValueError(f"missing {missing!r}; known: {', '.join(MISSING)}")
    parsed = {measure: _parse(measure) for measure in measures}
    absent = [q for q in judgments if not run.get(q)]
    queries = [q for q in judgments if run.get(q)] if missing == "skip" else list(judgments)
    if not queries or not any(q in judgments for q in run):
        raise ValueError(
            f"the run has none of the judged queries: 0 of its {len(run)} queries judged"
        )
    per_query = {}
    for query in queries:
        grades = judgments[query]
        scores = run.get(query, {})
        wrong = [doc for doc, score in scores.items() if np.isnan(score)]
        if wrong:
            raise ValueError(f"query {query}: the score of document {wrong[0]!r} is not a number")
        order = ranking(scores)
        ranked = np.array([grades.get(doc, np.nan) for doc in order], np.float64)
        judged = np.array(list(grades.values()), np.float64)
        per_query[query] = {
            name: float(f(ranked, judged, relevance_level, k)) for name, (f, k) in parsed.items()
        }
    mean = {m: float(np.mean([v[m] for v in per_query.values()])) for m in parsed}
    return Evaluation(mean, per_query, absent, [q for q in run if q not in judgments])


def run_from_ranking(
    queries: Sequence[str], rows: np.ndarray, ids: Sequence[str]
) -> dict[str, dict[str, float]]:
    """A run without ties that keeps an index's own order: the score is minus the rank.

    Args:
      queries: Q query ids. rows: int [Q, k] document rows, -1 for none. ids: ids of all rows.
    """
    return {
        query: {ids[row]: -float(rank) for rank, row in enumerate(found) if row >= 0}
        for query, found in zip(queries, np.asarray(rows).tolist())
    }


def run_from_scores(
    queries: Sequence[str], rows: np.ndarray, scores: np.ndarray, ids: Sequence[str]
) -> dict[str, dict[str, float]]:
    """A run of an index's scores [Q, k]; ties are then broken by document id, as trec_eval does."""
    return {
        query: {ids[r]: float(s) for r, s in zip(found, values) if r >= 0}
        for query, found, values in zip(
            queries, np.asarray(rows).tolist(), np.asarray(scores).tolist()
        )
    }


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """(mean, half width) of Student's t interval over repeated runs; half width 0 for one value."""
    from scipy import stats

    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()), 0.0
    width = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values)
    return float(values.mean()), float(width)
