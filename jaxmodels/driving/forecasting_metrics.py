"""Displacement errors and miss rates of trajectory forecasts.

K-guess metrics follow argoai/argoverse-api@77972cae, `argoverse/evaluation/eval_forecasting.py`:
`minADE` is the average error *of the guess with the smallest final error*, not the smallest average
error; a miss is a final error strictly above the threshold.
"""

from __future__ import annotations

import numpy as np

LOWEST_PROBABILITY = 0.05
MISS_THRESHOLD = 2.0  # metres


def errors_of(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Euclidean distances, [..., T, c] and [..., T, c] -> [..., T]."""
    return np.sqrt(np.square(np.asarray(predicted) - np.asarray(truth)).sum(-1))


def displacement_errors(
    predicted: np.ndarray, truth: np.ndarray, seconds: int = 3
) -> dict[str, float]:
    """`DE@1s` .. `DE@{seconds}s` and `ADE`, means over N forecasts, predicted and truth [N, T, c].

    The T steps cover `seconds` seconds: DE@ts is the error at (1-based) step round(T t / seconds).
    """
    errors = errors_of(predicted, truth)
    found = {
        f"DE@{t}s": float(errors[:, step - 1].mean())
        for t, step in steps_at_seconds(errors.shape[-1], seconds).items()
    }
    return {**found, "ADE": float(errors.mean())}


def steps_at_seconds(steps: int, seconds: int = 3) -> dict[int, int]:
    """{t: 1-based step} at each whole second of `steps` steps that cover `seconds` seconds."""
    return {t: max(round(steps * t / seconds), 1) for t in range(1, seconds + 1)}


def guess_metrics(
    predicted: np.ndarray,
    truth: np.ndarray,
    *,
    guesses: int,
    horizon: int | None = None,
    probability: np.ndarray | None = None,
    miss_threshold: float = MISS_THRESHOLD,
) -> dict[str, float]:
    """Means over N agents of the best of several guesses.

    Args:
      predicted: [N, K, T, c]. truth: [N, T, c].
      guesses: how many count: the first ones, or with probabilities the most probable ones, which
        are then renormalized; all of them when there are fewer.
      horizon: steps that count, None for all.
      probability: [N, K].

    Returns: minADE, minFDE, MR; with probabilities also p-minADE, p-minFDE (the metric plus
      min(-ln p, -ln 0.05)), p-MR (1 - p unless missed, then 1), brier-minADE and brier-minFDE (plus
      (1 - p)^2).

    Raises ValueError: guesses below 1, shapes that do not fit, probabilities that are negative, not
      finite, or all zero for an agent.
    """
    predicted, truth = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
    if guesses < 1:
        raise ValueError(f"guesses = {guesses} must be at least 1")
    if predicted.ndim != 4 or truth.shape != (len(predicted), *predicted.shape[2:]):
        raise ValueError(
            f"predicted must be [N, K, T, c] and truth [N, T, c], got {predicted.shape} and "
            f"{truth.shape}"
        )
    if len(predicted) == 0:
        raise ValueError("no forecasts to average over")
    rows = np.arange(len(predicted))
    order = np.tile(np.arange(predicted.shape[1]), (len(rows), 1))
    if probability is not None:
        probability = np.asarray(probability, np.float64)
        _check_probability(probability, predicted.shape[:2])
        order = np.argsort(-probability, axis=1, kind="stable")
    order = order[:, :guesses]
    errors = errors_of(predicted[rows[:, None], order], truth[:, None])[..., :horizon]
    best = errors[..., -1].argmin(1)
    ade, fde = errors[rows, best].mean(-1), errors[rows, best, -1]
    missed = fde > miss_threshold
    found = {"minADE": ade, "minFDE": fde, "MR": missed}
    if probability is not None:
        kept = probability[rows[:, None], order]
        p = (kept / kept.sum(1, keepdims=True))[rows, best]
        with np.errstate(divide="ignore"):
            penalty = np.minimum(-np.log(p), -np.log(LOWEST_PROBABILITY))
        brier = np.square(1 - p)
        found |= {
            "p-minADE": ade + penalty,
            "p-minFDE": fde + penalty,
            "p-MR": np.where(missed, 1.0, 1 - p),
            "brier-minADE": ade + brier,
            "brier-minFDE": fde + brier,
        }
    return {name: float(np.mean(values)) for name, values in found.items()}


def smallest_average_error(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean over N of the smallest average error of any guess [N, K, T, c]; not what (api) reports.

    Other data sets' minADE.
    """
    return float(errors_of(predicted, np.asarray(truth)[:, None]).mean(-1).min(1).mean())


def _check_probability(probability: np.ndarray, shape: tuple[int, int]) -> None:
    if probability.shape != shape:
        raise ValueError(f"probability must be [N, K] = {shape}, got {probability.shape}")
    if not np.isfinite(probability).all() or (probability < 0).any():
        raise ValueError("probabilities must be finite and not negative")
    empty = np.flatnonzero(probability.sum(1) <= 0)
    if len(empty):
        raise ValueError(f"probabilities of agent {empty[0]} are all zero")
