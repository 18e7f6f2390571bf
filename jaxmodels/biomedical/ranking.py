"""Challenge rankings, their tests and how stable they are.

M. Wiesenfarth et al., "Methods and open-source toolkit for analyzing and visualizing challenge
results", Scientific Reports 2021; rules of wiesenfa/challengeR@beb3b67 (`R/rankingMethods.R`,
`R/rankNA2.R`, `R/testBased.R`). Scores are [algorithms, cases], NaN where a result is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

AGGREGATES: dict[str, Callable[..., np.ndarray]] = {"mean": np.mean, "median": np.median}
SCHEMES = ("aggregate_then_rank", "rank_then_aggregate", "test_based")


def _scores(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2:
        raise ValueError(f"scores must be [algorithms, cases], got {scores.shape}")
    if scores.shape[0] < 2:
        raise ValueError("ranking one algorithm is not sensible")
    return scores


def rank_values(
    values: np.ndarray, larger_better: bool = True, ties: str = "min", axis: int = 0
) -> np.ndarray:
    """Ranks from 1 (best) along an axis; missing values come last.

    Ties get the `min` (default), `max`, `average` or `dense` rank. NaN gets the largest rank plus
    one (under `average` the mean of the places left).
    """
    from scipy.stats import rankdata

    values = np.moveaxis(np.asarray(values, np.float64), axis, -1)
    signed = -values if larger_better else values
    result = np.empty(values.shape, np.float64)
    for place in np.ndindex(*values.shape[:-1]):
        row = signed[place]
        missing = np.isnan(row)
        ranks = np.empty(row.shape)
        present = rankdata(row[~missing], method=ties)
        last = present.max(initial=0)
        ranks[~missing] = present
        extra = (missing.sum() + 1) / 2 if ties == "average" else 1
        if missing.any():
            ranks[missing] = last + extra
        result[place] = ranks
    return np.moveaxis(result, -1, axis)


def replace_missing(scores: np.ndarray, value: float | str | None) -> np.ndarray:
    """Scores with NaN replaced by `value`; `na.rm` (or None) keeps them to be left out."""
    if value is None or value == "na.rm":
        return np.asarray(scores, np.float64)
    return np.where(np.isnan(scores), float(value), scores)


def _aggregate(scores: np.ndarray, aggregate: str, axis: int = -1) -> np.ndarray:
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate {aggregate!r} is not one of {', '.join(AGGREGATES)}")
    if np.isnan(scores).any():
        return getattr(np, f"nan{aggregate}")(scores, axis)
    return AGGREGATES[aggregate](scores, axis)


def aggregate_then_rank(
    scores: np.ndarray,
    aggregate: str = "mean",
    *,
    larger_better: bool = True,
    missing: float | str | None = 0.0,
    ties: str = "min",
) -> np.ndarray:
    """Ranks [algorithms] of the mean or median score; missing scores are replaced first."""
    values = _aggregate(replace_missing(_scores(scores), missing), aggregate)
    return rank_values(values, larger_better, ties)


def per_case_ranks(
    scores: np.ndarray, *, larger_better: bool = True, ties: str = "min"
) -> np.ndarray:
    """Ranks of the algorithms in every case [algorithms, cases]; missing scores rank last."""
    return rank_values(_scores(scores), larger_better, ties)


def rank_then_aggregate(
    scores: np.ndarray,
    aggregate: str = "mean",
    *,
    larger_better: bool = True,
    ties: str = "min",
) -> np.ndarray:
    """Ranks [algorithms] of the mean or median rank over cases."""
    ranks = per_case_ranks(scores, larger_better=larger_better, ties=ties)
    return rank_values(_aggregate(ranks, aggregate), larger_better=False, ties=ties)


def signed_rank_p_value(a: np.ndarray, b: np.ndarray, larger_better: bool = True) -> float:
    """One-sided paired Wilcoxon test that `a` is better than `b`, by the normal approximation.

    p = 1 - Phi((V - n (n + 1) / 4 - 1/2) / s) with s^2 = n (n + 1) (2 n + 1) / 24 - sum(t^3 - t)
    / 48, zeros dropped, V the sum of positive ranks. NaN when all differences are zero. Pairs with
    a missing value are left out.
    """
    from scipy.stats import norm, rankdata

    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    difference = difference[np.isfinite(difference) & (difference != 0)]
    if not larger_better:
        difference = -difference
    n = difference.size
    if n == 0:
        return float("nan")
    ranks = rankdata(np.abs(difference))
    v = ranks[difference > 0].sum()
    _, ties = np.unique(ranks, return_counts=True)
    variance = n * (n + 1) * (2 * n + 1) / 24 - (ties.astype(float) ** 3 - ties).sum() / 48
    return float(norm.sf((v - n * (n + 1) / 4 - 0.5) / np.sqrt(variance)))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's adjustment of a vector of p-values; NaN stay and do not count."""
    p = np.asarray(p_values, np.float64)
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    running = 0.0
    for place, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - place) * p[index]))
        adjusted[index] = running
    return adjusted


def pairwise_tests(
    scores: np.ndarray,
    *,
    larger_better: bool = True,
    missing: float | str | None = 0.0,
    adjust: str = "none",
) -> np.ndarray:
    """p-values [algorithms, algorithms] that row i is better than column j; 1 on the diagonal.

    `adjust` is none or holm (over all ordered pairs).
    """
    values = replace_missing(_scores(scores), missing)
    count = len(values)
    p = np.ones((count, count))
    for i in range(count):
        for j in range(count):
            if i != j:
                p[i, j] = signed_rank_p_value(values[i], values[j], larger_better)
    if adjust == "holm":
        off = ~np.eye(count, dtype=bool)
        p[off] = holm(p[off])
    elif adjust != "none":
        raise ValueError(f"adjust {adjust!r} is not one of none, holm")
    return p


def significance(p_values: np.ndarray, alpha: float = 0.05) -> np.ndarray:
    """Whether row i is significantly better than column j: p <= alpha, never where p is NaN."""
    return np.asarray(p_values) <= alpha


def test_based(
    scores: np.ndarray,
    *,
    larger_better: bool = True,
    missing: float | str | None = 0.0,
    alpha: float = 0.05,
    adjust: str = "none",
    ties: str = "min",
) -> np.ndarray:
    """Ranks [algorithms] of the number of algorithms that one is significantly better than."""
    p = pairwise_tests(scores, larger_better=larger_better, missing=missing, adjust=adjust)
    return rank_values(significance(p, alpha).sum(1), True, ties)


test_based.__test__ = False  # not a test, whatever pytest reads into the name


def rank(scores: np.ndarray, scheme: str = "aggregate_then_rank", **arguments) -> np.ndarray:
    """Ranks [algorithms] by one of `SCHEMES`; `arguments` are the scheme's own."""
    functions = {
        "aggregate_then_rank": aggregate_then_rank,
        "rank_then_aggregate": rank_then_aggregate,
        "test_based": test_based,
    }
    if scheme not in functions:
        raise ValueError(f"no ranking scheme {scheme!r}; known: {', '.join(functions)}")
    return functions[scheme](scores, **arguments)


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Rankings of resampled cases.

    Attributes:
      ranks: [samples, algorithms].
      full: ranks of all cases [algorithms].
      tau: Kendall's tau-b of every resampled ranking against `full` [samples].
    """

    ranks: np.ndarray
    full: np.ndarray
    tau: np.ndarray

    @property
    def median(self) -> np.ndarray:
        """Median rank [algorithms]."""
        return np.median(self.ranks, 0)

    def interval(self, level: float = 0.95) -> np.ndarray:
        """Percentile interval of every rank [2, algorithms]."""
        return np.percentile(self.ranks, [50 * (1 - level), 50 * (1 + level)], axis=0)

    def frequencies(self) -> np.ndarray:
        """Share of samples in which an algorithm (row) has rank 1, 2, ... (column)."""
        count = self.full.size
        return np.stack([(self.ranks == r).mean(0) for r in range(1, count + 1)], 1)


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b of two rankings; NaN where one of them is all ties."""
    from scipy.stats import kendalltau

    return float(kendalltau(a, b).statistic)


def bootstrap_ranking(
    scores: np.ndarray,
    scheme: str = "aggregate_then_rank",
    *,
    samples: int = 1000,
    seed: int = 0,
    index: np.ndarray | None = None,
    **arguments,
) -> Bootstrap:
    """Rank again on cases drawn with replacement.

    Args:
      scores: [algorithms, cases]. scheme, arguments: see `rank`.
      index: the drawn cases [samples, cases], in place of a draw with `seed`.

    Raises ValueError with one algorithm or one case.
    """
    scores = _scores(scores)
    cases = scores.shape[1]
    if cases < 2:
        raise ValueError("bootstrapping with one case is not sensible")
    if index is None:
        index = np.random.default_rng(seed).integers(0, cases, (samples, cases))
    full = rank(scores, scheme, **arguments)
    ranks = np.stack([rank(scores[:, row], scheme, **arguments) for row in np.asarray(index)])
    return Bootstrap(ranks, full, np.asarray([kendall_tau(full, row) for row in ranks]))


def ranking_table(
    scores: np.ndarray, names: Sequence[str], bootstrap: Bootstrap, aggregate: str = "mean"
) -> list[dict[str, float | str]]:
    """One row an algorithm, best first: rank, score, median rank and 95 % interval."""
    values = _aggregate(np.asarray(scores, np.float64), aggregate)
    low, high = bootstrap.interval()
    rows = [
        {
            "algorithm": str(names[i]),
            "rank": float(bootstrap.full[i]),
            aggregate: float(values[i]),
            "median_rank": float(bootstrap.median[i]),
            "low": float(low[i]),
            "high": float(high[i]),
        }
        for i in range(len(names))
    ]
    return sorted(rows, key=lambda row: (row["rank"], row["algorithm"]))
