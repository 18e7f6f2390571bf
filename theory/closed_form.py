"""Exact references: scalar modes, their flow and half-rise times, the separability index.

In an aligned run each mode's strength s = a^L obeys a <- a - eta a^(L-1) (a^L - sigma); as
eta -> 0 this is ds/dt = L s^p (sigma - s) with p = 2 - 2/L (Saxe et al. 2014 for L = 2).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import hyp2f1

# Empirical: a Gaussian start of product scale alpha acts as s_0 = 0.3 alpha (measured at d = 10).
START_FACTOR = 0.3


def exponent(depth: float) -> float:
    """p = 2 - 2/L."""
    return 2.0 - 2.0 / depth


def _flow_integral(log_odds: np.ndarray, depth: float) -> np.ndarray:
    """F_p(u) at u = 1 / (1 + exp(-log_odds)), accurate near u = 0 and u = 1."""
    y = np.asarray(log_odds, dtype=np.float64)
    if depth == 2:
        return y
    u = 1.0 / (1.0 + np.exp(-y))
    if np.isinf(depth):
        return y - 1.0 / u
    if depth == 4:
        root = np.sqrt(u)
        # ln((1 + sqrt u) / (1 - sqrt u)) with 1 - sqrt u = (1 - u) / (1 + sqrt u)
        return -2.0 / root + 2.0 * np.log1p(root) + np.logaddexp(0.0, y)
    p = exponent(depth)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = u ** (1.0 - p) / (1.0 - p) * hyp2f1(1.0, 1.0 - p, 2.0 - p, u)
    # Near u = 1, F_p(u) = -ln(1 - u) + const + O(1 - u): continued from u = 1 - 1e-9.
    edge = np.log(1e9)
    far = y > edge
    if np.any(far):
        anchor = 1.0 / (1.0 + np.exp(-edge))
        at_edge = anchor ** (1.0 - p) / (1.0 - p) * hyp2f1(1.0, 1.0 - p, 2.0 - p, anchor)
        values = np.where(far, at_edge + (y - edge), values)
    return values


def _log_odds(fraction: Any) -> np.ndarray:
    u = np.asarray(fraction, dtype=np.float64)
    return np.log(u) - np.log1p(-u)


def flow_time(start: Any, end: Any, sigma: Any, depth: float) -> np.ndarray:
    """Time of the flow from s = start to s = end (both in (0, sigma)); broadcasts."""
    start, end, sigma = (np.asarray(v, np.float64) for v in (start, end, sigma))
    if np.any(start <= 0) or np.any(sigma <= 0):
        raise ValueError("flow_time: start and sigma must be positive")
    p = 2.0 if np.isinf(depth) else exponent(depth)
    rate = sigma**p * (1.0 if np.isinf(depth) else depth)
    difference = _flow_integral(_log_odds(end / sigma), depth) - _flow_integral(
        _log_odds(start / sigma), depth
    )
    return difference / rate


def mode_flow(t: Any, start: float, sigma: float, depth: float) -> np.ndarray:
    """s(t) of one mode under gradient flow from s(0) = start in (0, sigma); t [n] to s [n].

    sigma = 0 is a null mode. Relative error about 1e-12 (the closed form inverted by bisection).
    """
    t = np.asarray(t, dtype=np.float64)
    if sigma == 0 and start > 0:
        return null_mode_flow(t, start, depth)
    if not 0 < start < sigma:
        raise ValueError(f"start: {start} must lie between 0 and sigma = {sigma}")
    y0 = _log_odds(start / sigma)
    rate = depth * sigma ** exponent(depth)
    goal = _flow_integral(y0, depth) + rate * t
    low = np.full(t.shape, float(y0))
    high = np.full(t.shape, 1.0)
    high = np.maximum(low + 1.0, high)
    for _ in range(200):
        short = _flow_integral(high, depth) < goal
        if not short.any():
            break
        high = np.where(short, low + 2.0 * (high - low), high)
    for _ in range(100):
        middle = 0.5 * (low + high)
        below = _flow_integral(middle, depth) < goal
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return sigma / (1.0 + np.exp(-0.5 * (low + high)))


def half_rise_time(start: Any, sigma: Any, depth: float) -> np.ndarray:
    """Time from s = start to s = sigma / 2 (L = 2: ln(sigma/s_0 - 1) / (2 sigma))."""
    return flow_time(start, np.asarray(sigma, np.float64) / 2.0, sigma, depth)


def null_mode_flow(t: Any, start: float, depth: float) -> np.ndarray:
    """s(t) of a mode with sigma = 0: (s_0^-p + L p t)^(-1/p), a power law."""
    p = exponent(depth)
    # ds/dt = -L s^(p+1)
    return (start**-p + depth * p * np.asarray(t, np.float64)) ** (-1.0 / p)


def mode_descent(start: Any, sigma: Any, depth: int, lr: float, steps: int) -> np.ndarray:
    """s at steps 0..steps of the discrete mode recursion; start, sigma [R] to [steps + 1, R]."""
    start, sigma = np.broadcast_arrays(np.asarray(start, float), np.asarray(sigma, float))
    a = start ** (1.0 / depth)
    rows = np.empty((steps + 1, *a.shape))
    rows[0] = a**depth
    for t in range(steps):
        a = a - lr * a ** (depth - 1) * (a**depth - sigma)
        rows[t + 1] = a**depth
    return rows


def separability(
    sigma: Sequence[float],
    depth: int,
    alpha: float | None = None,
    *,
    start: float | None = None,
    delta: float = 0.1,
) -> float:
    """S = min_r t_{r+1}^+ / t_r^-: >= 1.25 expects R separate stages, < 0.8 fewer.

    sigma: target spectrum, descending; start s_0, default 0.3 alpha (an empirical factor).
    Infinite for R = 1. 0 where a mode starts above its own delta level.
    """
    sigma = np.asarray(sigma, np.float64)
    if start is None:
        if alpha is None:
            raise ValueError("separability: give alpha or start")
        start = START_FACTOR * alpha
    if depth < 2 or len(sigma) < 2:
        return float("inf")
    if start >= delta * sigma[1:].min():
        return 0.0
    done = flow_time(start, (1.0 - delta) * sigma[:-1], sigma[:-1], depth)
    begun = flow_time(start, delta * sigma[1:], sigma[1:], depth)
    return float(np.min(begun / done))


def warn_separability(value: float) -> None:
    """Warn where the index does not promise separate stages (S < 1.25)."""
    if value < 1.25:
        expect = "fewer stages than R" if value < 0.8 else "R stages or fewer"
        warnings.warn(
            f"separability index S = {value:.2f} < 1.25: expect {expect}; a smaller alpha or a "
            "wider gap separates the stages",
            stacklevel=2,
        )


def step_cap(sigma: Sequence[float], depth: int, alpha: float, lr: float) -> int:
    """Benchmark cap 6 (1.5 t_R + 500): t_R = steps of mode R from 0.3 alpha to 0.999 sigma_R."""
    last = float(np.asarray(sigma)[-1])
    start = min(START_FACTOR * alpha, 0.5 * last)
    t_r = float(flow_time(start, 0.999 * last, last, depth)) / lr
    return int(np.ceil(6.0 * (1.5 * t_r + 500.0)))


def lr_from_eta_hat(eta_hat: float, depth: int, sigma_1: float) -> float:
    """eta = eta_hat / (L sigma_1^(2 - 2/L)); eta_hat = eta lambda_max at the balanced minimum."""
    return eta_hat / (depth * sigma_1 ** exponent(depth))


def null_mode_floor(depth: int, dim: int, rank: int, alpha: float) -> float:
    """Scale of the slowly decaying loss of the d - R null modes, (d - R) alpha^2 / 2."""
    return 0.5 * (dim - rank) * alpha**2
