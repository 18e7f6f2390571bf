"""Forecasters of an ego stack: where will the others be?

Both take what the ego tracked, history [A, To, 2] of road coordinates with the ego first, and give
the others' next T places [A - 1, T, 2]. `observed` (To) and `horizon` (T) are steps of the
simulation, `replan` the number of steps after which the ego asks again.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxmodels.driving.traced_vectorization import to_road, vectorize_tracks
from jaxmodels.security.driving_simulator import LANE, Traffic

PIECE, PIECE_POINTS = 45.0, 10  # m of a lane in one polyline, as the traffic simulator cuts them
_VELOCITY_STEPS = 10


@struct.dataclass
class ConstantVelocity:
    """Everyone goes on at the mean velocity of the last second."""

    observed: int = struct.field(pytree_node=False, default=20)
    horizon: int = struct.field(pytree_node=False, default=30)
    replan: int = struct.field(pytree_node=False, default=5)

    def __call__(self, history: jax.Array, traffic: Traffic) -> jax.Array:
        """[A, To, 2] -> [A - 1, T, 2]."""
        del traffic
        others = history[1:]
        back = min(_VELOCITY_STEPS, history.shape[1] - 1)
        velocity = (others[:, -1] - others[:, -1 - back]) / back
        return others[:, -1:] + velocity[:, None] * jnp.arange(1, self.horizon + 1)[:, None]


@struct.dataclass
class NetworkForecaster:
    """VectorNet, or another network of its inputs, on the tracks and the road's lanes.

    `radius` to `columns` are those its scenes were made with (`vectorization.vectorize`).
    """

    variables: Any
    module: nn.Module = struct.field(pytree_node=False)
    observed: int = struct.field(pytree_node=False, default=20)
    replan: int = struct.field(pytree_node=False, default=5)
    radius: float = struct.field(pytree_node=False, default=65.0)
    heading_min_disp: float = struct.field(pytree_node=False, default=0.3)
    max_polylines: int = struct.field(pytree_node=False, default=12)
    max_vectors: int = struct.field(pytree_node=False, default=19)
    columns: int = struct.field(pytree_node=False, default=0)

    @property
    def horizon(self) -> int:
        """T of the network."""
        return self.module.horizon

    def __call__(self, history: jax.Array, traffic: Traffic) -> jax.Array:
        """[A, To, 2] -> [A - 1, T, 2]."""
        lanes = road_lanes(history[0, -1, 0], traffic, self.radius)
        return self.of_tracks(history, lanes, jnp.arange(1, len(history)), traffic.dt)

    def of_tracks(
        self, tracks: jax.Array, lanes: jax.Array, targets: jax.Array, dt: float = 0.1
    ) -> jax.Array:
        """Forecasts [K, T, 2] of `targets` (int [K]) from tracks [A, To, 2], lanes [L, N, 2]."""
        scenes = vectorize_tracks(
            tracks,
            lanes,
            jnp.zeros((len(lanes), 3)),
            targets,
            dt=dt,
            radius=self.radius,
            heading_min_disp=self.heading_min_disp,
            max_polylines=self.max_polylines,
            max_vectors=self.max_vectors,
            columns=self.columns or None,
        )
        first = jnp.zeros(len(targets), jnp.int32)
        found = self.module.apply(self.variables, scenes.vectors, scenes.vector_mask, first)
        return to_road(found.positions, scenes)


def road_lanes(x: jax.Array, traffic: Traffic, radius: float) -> jax.Array:
    """Middle lines of the straight road's lanes [L, 10, 2], in pieces of 45 m.

    They cover all that a vehicle within sight of an ego at `x` counts as near.
    """
    reach = radius + traffic.sight
    pieces = int(np.ceil(2 * reach / PIECE)) + 1
    first = jnp.floor((x - reach) / PIECE)
    starts = PIECE * (first + jnp.arange(pieces))
    along = starts[:, None] + jnp.linspace(0.0, PIECE, PIECE_POINTS)
    middle = LANE * (jnp.arange(traffic.lanes) + 0.5)
    shape = (traffic.lanes, pieces, PIECE_POINTS)
    x, y = jnp.broadcast_to(along, shape), jnp.broadcast_to(middle[:, None, None], shape)
    return jnp.stack([x, y], -1).reshape(-1, PIECE_POINTS, 2)
