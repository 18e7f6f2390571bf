"""Search for the best of many parameter sets: gradients, cross-entropy method, chance.

All three look at the same number of candidates, `restarts * iterations` (a gradient counts as one,
though it costs about three in time).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

METHODS = ("gradient", "cem", "random")
_ELITES = 0.15


def check_search(method: str, restarts: int, iterations: int) -> None:
    """Refuse unknown methods and empty searches."""
    if method not in METHODS:
        raise ValueError(f"search method {method!r}; known: {', '.join(METHODS)}")
    if restarts < 1 or iterations < 1:
        raise ValueError(
            f"restarts and iterations must be positive, got {restarts} and {iterations}"
        )


def search_knots(
    key: jax.Array,
    evaluate: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    shape: tuple[int, ...],
    spread: np.ndarray,
    *,
    method: str = "gradient",
    restarts: int = 64,
    iterations: int = 40,
    learning_rate: float = 0.15,
) -> jax.Array:
    """The best knots [*shape] met: the highest score, among equals the lowest objective.

    Args:
      evaluate: knots [*shape] -> (objective to lower, score to raise), scalars; candidates whose
        objective is not finite are never kept.
      spread: standard deviation of the first candidates, broadcast to `shape`.
    """
    check_search(method, restarts, iterations)
    shape = (restarts, *shape)

    def keep(best, knots, values, scores):
        """The better of `best` = (rank, knots) and this batch's best."""
        rank = jnp.where(jnp.isfinite(values), scores * 1e4 - values, -jnp.inf)
        top = rank.argmax()
        better = rank[top] > best[0]
        return jnp.where(better, rank[top], best[0]), jnp.where(better, knots[top], best[1])

    first = spread * jax.random.normal(key, shape)
    nothing = (-jnp.inf, jnp.zeros(shape[1:]))
    if method == "gradient":
        optimizer = optax.adam(learning_rate)
        slope = jax.vmap(jax.value_and_grad(evaluate, has_aux=True))

        def advance(carry, _):
            knots, state, best = carry
            (values, scores), grads = slope(knots)
            best = keep(best, knots, values, scores)
            grads = jnp.where(jnp.isfinite(grads), grads, 0.0)
            updates, state = optimizer.update(grads, state)
            return (knots + updates, state, best), None

        carry = (first, optimizer.init(first), nothing)
        (_, _, best), _ = jax.lax.scan(advance, carry, length=iterations)
        return best[1]
    count = max(2, int(_ELITES * restarts))

    def resample(carry, k):
        mean, deviation, best = carry
        knots = mean + deviation * jax.random.normal(k, shape)
        values, scores = jax.vmap(evaluate)(knots)
        best = keep(best, knots, values, scores)
        if method == "cem":
            values = jnp.where(jnp.isfinite(values), values, jnp.inf)
            elite = knots[jnp.argsort(values)[:count]]
            mean = elite.mean(0)
            deviation = jnp.maximum(elite.std(0), 0.05)
        return (mean, deviation, best), None

    start = (jnp.zeros(shape[1:]), jnp.broadcast_to(spread, shape[1:]), nothing)
    (_, _, best), _ = jax.lax.scan(resample, start, jax.random.split(key, iterations))
    return best[1]
