"""Ensembles of identical and of different models, fitted and chosen on out-of-fold predictions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np


def check_members(members: Sequence[np.ndarray]) -> None:
    """Raises ValueError when probability arrays differ in shape or in their number of classes."""
    if not members:
        raise ValueError("an ensemble needs at least one member")
    shapes = [np.shape(m) for m in members]
    if len({s[-1] for s in shapes}) > 1:
        raise ValueError(f"ensemble members differ in classes: {[s[-1] for s in shapes]}")
    if len(set(shapes)) > 1:
        raise ValueError(f"ensemble members differ in shape: {shapes}")


def average(members: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> np.ndarray:
    """Weighted mean of probabilities [..., K], uniform by default; weights are normalized."""
    check_members(members)
    if weights is None:
        return np.mean(np.stack(members), 0)
    weights = np.asarray(weights, float)
    if weights.shape != (len(members),) or (weights < 0).any() or weights.sum() == 0:
        raise ValueError(f"weights {weights} do not fit {len(members)} members")
    return np.tensordot(weights / weights.sum(), np.stack(members), 1)


def median(members: Sequence[np.ndarray]) -> np.ndarray:
    """Median of probabilities [..., K], normalized over classes again."""
    check_members(members)
    middle = np.median(np.stack(members), 0)
    return middle / np.maximum(middle.sum(-1, keepdims=True), 1e-12)


def rank_average(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Mean rank of scores [N], scaled to [0, 1]: for metrics that only see the order."""
    from scipy.stats import rankdata

    check_members([np.asarray(s)[:, None] for s in scores])
    ranks = np.mean([rankdata(s) for s in scores], 0)
    return (ranks - 1) / max(len(ranks) - 1, 1)


def least_squares_weights(
    members: Sequence[np.ndarray], labels: np.ndarray, ridge: float = 1e-6
) -> np.ndarray:
    """Non-negative weights [members], sum 1, of the best fit of probabilities to one-hot labels.

    Fit on out-of-fold predictions only. members [..., K] each, labels int [...].
    """
    from scipy.optimize import nnls

    check_members(members)
    classes = members[0].shape[-1]
    columns = np.stack([np.asarray(m, float).reshape(-1) for m in members], 1)
    target = np.eye(classes)[np.asarray(labels).reshape(-1)].reshape(-1)
    # Normal equations: the design has one row a voxel and class.
    gram = columns.T @ columns + ridge * len(columns) * np.eye(len(members))
    root = np.linalg.cholesky(gram)
    weights, _ = nnls(root.T, np.linalg.solve(root, columns.T @ target))
    if weights.sum() == 0:
        return np.full(len(members), 1 / len(members))
    return weights / weights.sum()


def fit_stacking(members: Sequence[np.ndarray], labels: np.ndarray, seed: int = 0):
    """Logistic regression from the members' log-odds [N, K] to labels [N]; has `predict_proba`.

    Fit on out-of-fold predictions only.
    """
    from sklearn.linear_model import LogisticRegression

    check_members(members)
    return LogisticRegression(max_iter=2000, random_state=seed).fit(_log_odds(members), labels)


def stacked(model, members: Sequence[np.ndarray]) -> np.ndarray:
    """Probabilities [N, K] of a fitted stacking."""
    check_members(members)
    return model.predict_proba(_log_odds(members))


def _log_odds(members) -> np.ndarray:
    p = np.clip(np.concatenate([np.asarray(m, float) for m in members], -1), 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen members and the score of every candidate, name -> mean foreground Dice."""

    members: tuple[str, ...]
    scores: Mapping[str, float]


def candidates(names: Sequence[str]) -> list[tuple[str, ...]]:
    """All single configurations, then all pairs."""
    return [(n,) for n in names] + list(itertools.combinations(names, 2))


def choose(scores: Mapping[tuple[str, ...], float]) -> Choice:
    """The best of singles and pairs on out-of-fold scores; ties go to the one with fewer members.

    Raises ValueError when no candidate has a finite score.
    """
    finite = {members: s for members, s in scores.items() if np.isfinite(s)}
    if not finite:
        raise ValueError("no candidate has a finite out-of-fold score")
    best = min(finite, key=lambda members: (-finite[members], len(members)))
    return Choice(best, {"+".join(m): float(s) for m, s in scores.items()})


def assert_out_of_fold(recorded: Mapping[str, int], folds: Sequence[Sequence[str]]) -> None:
    """Every case was predicted once, by the model of the fold that held it out.

    `recorded` is case -> fold of the model that predicted it. Raises ValueError naming the case.
    """
    wanted = {case: number for number, held in enumerate(folds) for case in held}
    for case, number in wanted.items():
        if case not in recorded:
            raise ValueError(f"case {case!r} has no out-of-fold prediction")
        if recorded[case] != number:
            raise ValueError(
                f"case {case!r} was predicted by the model of fold {recorded[case]}, which was "
                f"trained on it; fold {number} held it out"
            )
    extra = set(recorded) - set(wanted)
    if extra:
        raise ValueError(f"predictions of cases that no fold holds out: {sorted(extra)[:5]}")
