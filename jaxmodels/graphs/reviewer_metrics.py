"""How good a list of recommended reviewers is: top-k accuracy, reciprocal rank, project sizes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

TOP_K = (1, 3, 5, 7)
# Number of developers of a repository: the paper's strata.
SMALL_BELOW, LARGE_ABOVE = 25, 100
PROJECT_SIZES = ("small", "medium", "large")


def first_ranks(
    recommendations: Iterable[Sequence[str]], truth: Iterable[Collection[str]]
) -> np.ndarray:
    """[queries] int64: 1-based rank of the first true reviewer, 0 where the list has none."""
    ranks = []
    for recommended, right in zip(recommendations, truth, strict=True):
        right = set(right)
        ranks.append(next((i for i, who in enumerate(recommended, 1) if who in right), 0))
    return np.array(ranks, np.int64)


def ranking_metrics(ranks: np.ndarray, top: Sequence[int] = TOP_K) -> dict[str, float]:
    """`top1`, ... (share of queries with a true reviewer among the first k) and `mrr`.

    Args:
      ranks: [queries], 0 for no hit, which counts 0 in both.

    Raises:
      ValueError: no queries.
    """
    ranks = np.asarray(ranks)
    if ranks.size == 0:
        raise ValueError("no queries to evaluate")
    hit = ranks > 0
    numbers = {f"top{k}": float(np.mean(hit & (ranks <= k))) for k in top}
    numbers["mrr"] = float(np.mean(np.where(hit, 1.0 / np.maximum(ranks, 1), 0.0)))
    return numbers


def project_size(developers: int) -> str:
    """`small` (fewer than 25 developers), `medium` (25 to 100) or `large`."""
    if developers < SMALL_BELOW:
        return "small"
    return "large" if developers > LARGE_ABOVE else "medium"


def by_project_size(
    ranks: Mapping[str, np.ndarray], repos: Sequence[str], developers: Mapping[str, int]
) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics of several models, stratified by the size of the query's repository.

    Args:
      ranks: model -> [queries] ranks of the same queries.
      repos: [queries] their repositories.
      developers: repository -> people seen in it (0 where it is unknown).

    Returns: size -> model -> `ranking_metrics` and `queries`; sizes without queries are left out.
    """
    sizes = np.array([project_size(developers.get(repo, 0)) for repo in repos])
    table = {}
    for size in PROJECT_SIZES:
        chosen = sizes == size
        if chosen.any():
            table[size] = {
                model: {**ranking_metrics(r[chosen]), "queries": int(chosen.sum())}
                for model, r in ranks.items()
            }
    return table


def fisher_exact(ranks: np.ndarray, others: np.ndarray, k: int = 3) -> float:
    """Two-sided p that two models hit among the first k equally often (as the paper tests)."""
    from scipy.stats import fisher_exact as test

    def row(r):
        hits = int(np.sum((r > 0) & (r <= k)))
        return [hits, len(r) - hits]

    return float(test([row(np.asarray(ranks)), row(np.asarray(others))]).pvalue)
