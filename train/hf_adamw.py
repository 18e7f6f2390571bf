"""AdamW as huggingface/transformers had it until v4 (`optimization.AdamW`), and OneCycle's phases.

The CoditT5 recipe used both. Unlike `torch.optim.AdamW`, epsilon joins sqrt(v) before the bias
correction, and the decay is taken of the parameter after its step.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


def one_cycle(
    step, start: float, peak: float, end: float, *, steps: int, pct_start: float
) -> jax.Array:
    """PyTorch's `OneCycleLR` with linear phases: start -> peak over pct_start * steps - 1, -> end.

    `step` runs from 0 to steps - 1; later ones stay at `end`.
    """
    turn = pct_start * steps - 1
    t = jnp.minimum(jnp.asarray(step, jnp.float32), steps - 1)
    rising = start + (peak - start) * t / max(turn, 1e-9)
    falling = peak + (end - peak) * (t - turn) / max(steps - 1 - turn, 1e-9)
    return jnp.where(t <= turn, rising, falling)


class State(NamedTuple):
    """Steps made, and the moments."""

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def hf_adamw(
    learning_rate: Callable | float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    no_decay: str = "",
    cycled_b1: tuple[float, float] | None = None,
    cycle_steps: int = 50,
    pct_start: float = 0.1,
    hold_for: int = 1,
) -> optax.GradientTransformation:
    """m, v as Adam; p <- p - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps); p <- p - lr wd p.

    Args:
      no_decay: regular expression over dotted paths; what it matches is not decayed.
      cycled_b1: (high, low): `b1` falls from high to low and rises again as OneCycle's momentum
        does, over `cycle_steps` cycles of `hold_for` updates (an epoch); the bias correction uses
        the present value, as there.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return State(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(updates, state, params):
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        first = b1
        if cycled_b1 is not None:
            high, low = cycled_b1
            epoch = state.count // hold_for
            first = one_cycle(epoch, high, low, high, steps=cycle_steps, pct_start=pct_start)
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: first * m + (1 - first) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        t = count.astype(jnp.float32)
        size = rate * jnp.sqrt(1 - b2**t) / (1 - first**t)

        def new(path, p, m, v):
            step = -size * m / (jnp.sqrt(v) + eps)
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            decay = 0.0 if no_decay and re.search(no_decay, name) else weight_decay
            return (step - rate * decay * (p + step)).astype(p.dtype)

        return jax.tree_util.tree_map_with_path(new, params, mu, nu), State(count, mu, nu)

    return optax.GradientTransformation(init, update)
