"""Ranger: rectified Adam, Lookahead and centralized gradients in one, as pSp and e4e were trained.

After `training/ranger.py` (version 20.4.11) of omertov/encoder4editing@99ea505 and
eladrich/pixel2style2pixel@5cfff38; L. Liu et al., "On the Variance of the Adaptive Learning Rate",
arXiv 1908.03265, M. Zhang et al., "Lookahead Optimizer", arXiv 1907.08610, H. Yong et al.,
"Gradient Centralization", arXiv 2004.01461. Optax has the first two, but its RAdam puts epsilon
after the bias correction, which at Ranger's epsilon is another optimizer, and its Lookahead wants
parameters in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class State(NamedTuple):
    """Steps made, the moments, and Lookahead's slow weights."""

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    slow: optax.Params


def ranger(
    learning_rate: Callable | float,
    b1: float = 0.95,
    b2: float = 0.999,
    eps: float = 1e-5,
    weight_decay: float = 0.0,
    alpha: float = 0.5,
    sync_period: int = 6,
    threshold: float = 5.0,
    centralize: bool = True,
) -> optax.GradientTransformation:
    """g <- g - mean(g); m, v as Adam; p <- p - lr wd p; p <- p - lr r_t m / (sqrt(v) + eps).

    r_t = rectification * sqrt(1 - b2^t) / (1 - b1^t). While the effective length of v's average is
    at most `threshold` (the first five steps), p <- p - lr m / (1 - b1^t) instead. At each
    `sync_period`-th step slow <- slow + alpha (p - slow), and p begins again at slow.

    Args:
      centralize: whether every output's gradient of a matrix or a convolution loses its mean over
        inputs and taps.

    Raises ValueError for a share, a period, or an epsilon that cannot be meant.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"ranger: alpha must lie within 0 .. 1, got {alpha}")
    if sync_period < 1:
        raise ValueError(f"ranger: sync_period must be at least 1, got {sync_period}")
    if not eps > 0:
        raise ValueError(f"ranger: eps must be positive, got {eps}")

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        copies = jax.tree.map(jnp.copy, (zeros, params))
        return State(jnp.zeros((), jnp.int32), zeros, *copies)

    def update(updates, state, params):
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        if centralize:
            updates = jax.tree_util.tree_map_with_path(centralized, updates)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        count = state.count + 1
        t = count.astype(jnp.float32)
        length, longest = average_length(t, b2), _longest(b2)
        adapts = length > threshold
        ratio = (length - 4) * (length - 2) / length
        ratio = ratio / ((longest - 4) * (longest - 2) / longest)
        # 1 - b^t without its digits cancelling.
        first, second = (-jnp.expm1(t * math.log(b)) for b in (b1, b2))
        size = rate / first
        rectified = size * jnp.sqrt(jnp.where(adapts, ratio, 0) * second)
        synchronizes = count % sync_period == 0

        def moved(p, m, v):
            step = jnp.where(adapts, rectified * m / (jnp.sqrt(v) + eps), size * m)
            return p - rate * weight_decay * p - step

        fast = jax.tree.map(moved, params, mu, nu)
        slow = jax.tree.map(
            lambda s, p: jnp.where(synchronizes, s + alpha * (p - s), s), state.slow, fast
        )
        new = jax.tree.map(
            lambda p, f, s: (jnp.where(synchronizes, s, f) - p).astype(p.dtype), params, fast, slow
        )
        return new, State(count, mu, nu, slow)

    return optax.GradientTransformation(init, update)


def centralized(path, grad: jax.Array) -> jax.Array:
    """A gradient less its mean over all but the output axis; vectors and scalars as they are.

    The output axis is the last one of a `kernel` and the first one of everything else (PyTorch's
    layout); layers stacked by a scan (a name with "*") are centralized one by one.
    """
    names = [str(getattr(k, "key", k)) for k in path]
    stacked = int(any("*" in name for name in names))
    if grad.ndim - stacked < 2:
        return grad
    axes = range(stacked, grad.ndim)
    output = axes[-1] if names[-1] == "kernel" else axes[0]
    return grad - grad.mean([a for a in axes if a != output], keepdims=True)


def _longest(b2: float) -> float:
    return 2 / (1 - b2) - 1


def average_length(t: jax.Array, b2: float) -> jax.Array:
    """RAdam's length of the moving average after t steps, 2 / (1 - b2) - 1 - 2 t b2^t / (1 - b2^t).

    At first that is a small difference of large numbers: the large parts are taken away by hand,
    1 / (e^x - 1) = 1 / x - 1 / 2 + x / 12 - ..., so that float32 keeps its digits.
    """
    c = -math.log(b2)
    x = c * t
    series = x / 12 - x**3 / 720 + x**5 / 30240
    early = (_longest(b2) - 2 / c) + t - 2 * t * series
    return jnp.where(x < 0.5, early, _longest(b2) - 2 * t / jnp.expm1(x))
