"""Search for dangerous scenes: gradients through the simulator, cross-entropy method, chance.

All three spend the same number of rollouts: `restarts * iterations` in all.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmodels.security.driving_simulator import (
    Outcome,
    Scene,
    Traffic,
    check_scene,
    forecast_errors,
    judge,
    objective,
    simulate,
)
from jaxmodels.security.knot_search import METHODS, check_search, search_knots

__all__ = ["METHODS", "Found", "search"]

# Of the first knots (acceleration, steering), before tanh: wilder steering leaves the road at once.
_SPREAD = np.array([0.7, 0.3], np.float32)


class Found(NamedTuple):
    """`knots` [N, K, 2] of the best scenario, its `outcome`, `tried` rollouts."""

    knots: jax.Array
    outcome: Outcome
    tried: int


def search(
    key: jax.Array,
    scene: Scene,
    traffic: Traffic = Traffic(),  # noqa: B008
    forecaster: Any = None,
    *,
    method: str = "gradient",
    restarts: int = 64,
    iterations: int = 40,
    learning_rate: float = 0.15,
    deception: float = 0.0,
) -> Found:
    """The knots with the highest score (the lowest objective among equals) met on the way.

    `forecaster` is the ego's (see `simulate`); `deception` then weighs the error of its forecasts
    in meters, which the adversary raises beside closing the gap.

    Raises ValueError, outside `jit`, for vehicles that overlap at the start.
    """
    check_search(method, restarts, iterations)
    check_scene(scene.states)
    knots, outcome = _search(
        key, scene, forecaster, traffic, method, restarts, iterations, learning_rate, deception
    )
    return Found(knots, outcome, restarts * iterations)


@partial(jax.jit, static_argnums=(3, 4, 5, 6, 7, 8))
def _search(
    key, scene, forecaster, traffic, method, restarts, iterations, learning_rate, deception
):
    vehicles = scene.states.shape[0] - 1

    def evaluate(knots):
        rollout = simulate(scene, knots, traffic, forecaster)
        value = objective(rollout, traffic)
        if deception and forecaster is not None:
            value = value - deception * forecast_errors(rollout, forecaster).average
        return value, judge(rollout, traffic).score

    best = search_knots(
        key,
        evaluate,
        (vehicles, traffic.knots, 2),
        _SPREAD,
        method=method,
        restarts=restarts,
        iterations=iterations,
        learning_rate=learning_rate,
    )
    return best, judge(simulate(scene, best, traffic, forecaster), traffic)
