"""Search for dangerous scenes: gradients through the simulator, cross-entropy method, chance.

All three spend the same number of rollouts: `restarts * iterations` in all (a gradient counts as
one, though it costs about three in time).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels.security.driving_simulator import (
    Outcome,
    Scene,
    Traffic,
    judge,
    objective,
    simulate,
)

METHODS = ("gradient", "cem", "random")
# Of the first knots (acceleration, steering), before tanh: wilder steering leaves the road at once.
_SPREAD = np.array([0.7, 0.3], np.float32)
_ELITES = 0.15


class Found(NamedTuple):
    """`knots` [N, K, 2] of the best scenario, its `outcome`, `tried` rollouts."""

    knots: jax.Array
    outcome: Outcome
    tried: int


def search(
    key: jax.Array,
    scene: Scene,
    traffic: Traffic = Traffic(),  # noqa: B008
    *,
    method: str = "gradient",
    restarts: int = 64,
    iterations: int = 40,
    learning_rate: float = 0.15,
) -> Found:
    """The knots with the highest score (the lowest objective among equals) met on the way."""
    if method not in METHODS:
        raise ValueError(f"search method {method!r}; known: {', '.join(METHODS)}")
    knots, outcome = _search(key, scene, traffic, method, restarts, iterations, learning_rate)
    return Found(knots, outcome, restarts * iterations)


@partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _search(key, scene, traffic, method, restarts, iterations, learning_rate):
    vehicles = scene.states.shape[0] - 1
    shape = (restarts, vehicles, traffic.knots, 2)

    def evaluate(knots):
        rollout = simulate(scene, knots, traffic)
        return objective(rollout, traffic), judge(rollout, traffic).score

    def keep(best, knots, values, scores):
        """The better of `best` = (rank, knots) and this batch's best."""
        rank = jnp.where(jnp.isfinite(values), scores * 1e4 - values, -jnp.inf)
        top = rank.argmax()
        better = rank[top] > best[0]
        return jnp.where(better, rank[top], best[0]), jnp.where(better, knots[top], best[1])

    first = _SPREAD * jax.random.normal(key, shape)
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
    else:
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

        start = (jnp.zeros(shape[1:]), jnp.broadcast_to(_SPREAD, shape[1:]), nothing)
        (_, _, best), _ = jax.lax.scan(resample, start, jax.random.split(key, iterations))
    return best[1], judge(simulate(scene, best[1], traffic), traffic)
