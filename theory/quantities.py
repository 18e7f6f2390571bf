"""Recorded quantities of a trajectory: what one row of `theory.simulate` holds.

Every entry of `QUANTITIES` is a pure function of a `Point`; the spectral ones are public, since
they serve any singular values [..., k].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from theory import decompositions, landscape
from theory.factorization import Factors, balancedness
from theory.optimizers import Optimizer, gradients, squared_norm
from theory.problem import Problem


class Point(NamedTuple):
    """One recorded point, as the quantities see it."""

    problem: Problem
    optimizer: Optimizer
    lr: Any
    state: Any  # dynamics.State
    loss: jax.Array
    product: jax.Array
    grads: Factors
    svd: tuple[jax.Array, jax.Array, jax.Array] | None
    singular_values: jax.Array
    inertia_tolerance: Any = 0.0


def effective_rank(s: jax.Array) -> jax.Array:
    """exp(-sum p ln p), p = s / sum s over [..., k]; the zero matrix gives 0."""
    total = jnp.sum(s, axis=-1, keepdims=True)
    p = s / jnp.where(total > 0, total, 1.0)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0.0)


def stable_rank(s: jax.Array) -> jax.Array:
    """||W||_F^2 / ||W||_2^2 from singular values [..., k]; the zero matrix gives 0."""
    top = jnp.max(s, axis=-1, keepdims=True)
    ratio = s / jnp.where(top > 0, top, 1.0)
    return jnp.sum(ratio * ratio, axis=-1)


def numerical_rank(s: jax.Array, tau_rel: float = 1e-3, tau_abs: float = 0.0) -> jax.Array:
    """Number of s_i > max(tau_abs, tau_rel s_1), [..., k] to [...]."""
    level = jnp.maximum(tau_abs, tau_rel * jnp.max(s, axis=-1, keepdims=True))
    return jnp.sum(s > level, axis=-1)


def nuclear_norm(s: jax.Array) -> jax.Array:
    """sum s over [..., k]."""
    return jnp.sum(s, axis=-1)


def schatten(s: jax.Array, depth: int) -> jax.Array:
    """sum s^(2/L) over [..., k]."""
    return jnp.sum(s ** (2.0 / depth), axis=-1)


def _test_loss(point: Point) -> jax.Array:
    return jnp.mean((point.product - point.problem.target) ** 2)


def _alignment(point: Point) -> dict[str, jax.Array]:
    # As the Arora code: the gradient without the 2 that the plain mean brings.
    gradient = point.problem.gradient(point.product)
    if point.problem.loss_norm == "mean":
        gradient = 0.5 * gradient
    left, _, right = point.svd
    matrix = jnp.abs(left.T @ gradient @ right.T)
    size = matrix.shape[0]
    diagonal = jnp.diagonal(matrix)
    off = ~jnp.eye(size, dtype=bool)
    count = max(size * (size - 1), 1)
    off_mean = jnp.sum(jnp.where(off, matrix, 0.0)) / count
    off_var = jnp.sum(jnp.where(off, (matrix - off_mean) ** 2, 0.0)) / max(count - 1, 1)
    return {
        "diag_mean": jnp.mean(diagonal),
        "diag_std": jnp.std(diagonal, ddof=min(1, size - 1)),
        "off_diag_mean": off_mean,
        "off_diag_std": jnp.sqrt(off_var),
    }


def _mode_strengths(point: Point) -> dict[str, jax.Array]:
    left, _, right = decompositions.svd(point.problem.target)
    matrix = left.T @ point.product @ right.T
    diagonal = jnp.diagonal(matrix)
    return {
        "mode_strengths": diagonal,
        "off_diagonal": jnp.sqrt(
            jnp.maximum(jnp.sum(point.product**2) - jnp.sum(diagonal**2), 0.0)
        ),
    }


def _rank_distances(point: Point) -> jax.Array:
    left, s, right = decompositions.svd(point.problem.target)
    levels = jnp.arange(len(s) + 1)

    def distance(r):
        best = (left * jnp.where(jnp.arange(len(s)) < r, s, 0.0)) @ right
        return jnp.linalg.norm(point.product - best)

    return jax.vmap(distance)(levels) / jnp.linalg.norm(point.problem.target)


def _gradient_cosine(point: Point) -> jax.Array:
    dot = sum(jnp.sum(a * b) for a, b in zip(point.state.previous, point.grads))
    norm = jnp.sqrt(squared_norm(point.state.previous) * squared_norm(point.grads))
    return jnp.where(norm > 0, dot / jnp.where(norm > 0, norm, 1.0), 0.0)


def _relative_balancedness(point: Point) -> jax.Array:
    weight = jnp.max(jnp.stack([jnp.sum(w * w) for w in point.state.factors]))
    return balancedness(point.state.factors) / jnp.where(weight > 0, weight, 1.0)


def _adjusted_lr(point: Point) -> jax.Array:
    rate = point.state.slots.get("adjusted_lr", point.lr)
    return jnp.asarray(rate, point.product.dtype)


def _hessian(point: Point) -> dict[str, jax.Array]:
    matrix = landscape.hessian(point.problem, point.state.factors)
    values, vectors = decompositions.eigh(matrix)
    tau = jnp.maximum(1e-10 * values[-1], point.inertia_tolerance)
    flat = jnp.concatenate([g.ravel() for g in point.grads])
    norm = jnp.linalg.norm(flat)
    return {
        "lambda_min": values[0],
        "lambda_max": values[-1],
        "inertia": jnp.stack(
            [jnp.sum(values < -tau), jnp.sum(abs(values) <= tau), jnp.sum(values > tau)]
        ),
        "step_sharpness": _adjusted_lr(point) * values[-1],
        "escape_overlap": jnp.abs(vectors[:, 0] @ flat) / jnp.where(norm > 0, norm, 1.0),
    }


QUANTITIES: dict[str, Callable[[Point], Any]] = {
    "loss": lambda p: p.loss,
    "test_loss": _test_loss,
    "grad_norm": lambda p: jnp.sqrt(squared_norm(p.grads)),
    "grad_rms": lambda p: jnp.sqrt(squared_norm(p.grads) / sum(g.size for g in p.grads)),
    "singular_values": lambda p: p.singular_values,
    "factor_singular_values": lambda p: {
        f"singular_values_W{j}": decompositions.singular_values(w)
        for j, w in enumerate(p.state.factors, start=1)
    },
    "mode_strengths": _mode_strengths,
    "alignment": _alignment,
    "effective_rank": lambda p: effective_rank(p.singular_values),
    "stable_rank": lambda p: stable_rank(p.singular_values),
    "numerical_rank": lambda p: numerical_rank(p.singular_values),
    "nuclear_norm": lambda p: nuclear_norm(p.singular_values),
    "schatten": lambda p: schatten(p.singular_values, len(p.state.factors)),
    "gap_ratio": lambda p: (
        p.singular_values[1:] / jnp.where(p.singular_values[:-1] > 0, p.singular_values[:-1], 1.0)
    ),
    "rank_distances": _rank_distances,
    "balancedness": lambda p: balancedness(p.state.factors),
    "relative_balancedness": _relative_balancedness,
    "gradient_cosine": _gradient_cosine,
    "weight_norms": lambda p: jnp.stack([jnp.linalg.norm(w) for w in p.state.factors]),
    "adjusted_lr": _adjusted_lr,
    "hessian": _hessian,
    "gradients": lambda p: {f"grad_W{j}": g for j, g in enumerate(p.grads, start=1)},
    "factors": lambda p: {f"W{j}": w for j, w in enumerate(p.state.factors, start=1)},
    "product": lambda p: p.product,
}
NEED_TARGET = ("test_loss", "mode_strengths", "rank_distances")
DEFAULT_RECORD = (
    "loss",
    "test_loss",
    "grad_norm",
    "singular_values",
    "effective_rank",
    "stable_rank",
    "numerical_rank",
    "nuclear_norm",
    "schatten",
    "balancedness",
    "weight_norms",
    "adjusted_lr",
)


def measure(
    problem: Problem,
    optimizer: Optimizer,
    lr: Any,
    state: Any,
    record: Sequence[str],
    inertia_tolerance: Any = 0.0,
) -> dict[str, jax.Array]:
    """The recorded row at a state: a flat dict of arrays (pure)."""
    loss, product, grads = gradients(problem, state.factors)
    vectors = None
    if "alignment" in record:
        vectors = decompositions.svd(product)
        s = vectors[1]
    else:
        s = decompositions.singular_values(product)
    point = Point(
        problem, optimizer, lr, state, loss, product, grads, vectors, s, inertia_tolerance
    )
    row: dict[str, jax.Array] = {"step": state.step}
    for name in record:
        value = QUANTITIES[name](point)
        row.update(value if isinstance(value, dict) else {name: value})
    return row
