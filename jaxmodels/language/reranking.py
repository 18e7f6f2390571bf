"""Re-ranking of a model's beam by another model (CoditT5, arXiv 2208.05446, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def best_indices(
    base: np.ndarray | Sequence[Sequence[float]],
    reranker: np.ndarray | Sequence[Sequence[float]],
    *,
    weight: float = 1.0,
) -> np.ndarray:
    """Index of the best hypothesis of each row `[N]`: argmax of base + weight * reranker `[N, K]`.

    Scores are minus the mean token NLL of each hypothesis, both recomputed by teacher forcing; the
    paper's weight is 1. Ties go to the first.

    Raises ValueError for score lists of different shapes.
    """
    rows = [list(map(len, scores)) for scores in (base, reranker)]
    if rows[0] != rows[1] or len(set(rows[0])) > 1:
        raise ValueError(
            f"scores of {rows[0]} and {rows[1]} hypotheses an input: wanted as many of every "
            "input, from both models"
        )
    base, reranker = np.asarray(base, np.float64), np.asarray(reranker, np.float64)
    if base.shape != reranker.shape or base.ndim != 2 or not base.size:
        raise ValueError(
            f"scores of shapes {base.shape} and {reranker.shape}: wanted one row an input and one "
            "column a hypothesis, from both models"
        )
    return np.argmax(base + weight * reranker, axis=1)


def grouped(hypotheses: Sequence[str], beams: int) -> list[list[str]]:
    """Flat hypotheses, `beams` an input, as one list an input.

    Raises ValueError when `beams` does not divide their number.
    """
    if beams < 1 or len(hypotheses) % beams:
        raise ValueError(f"{len(hypotheses)} hypotheses do not divide by {beams} beams")
    return [list(hypotheses[i : i + beams]) for i in range(0, len(hypotheses), beams)]
