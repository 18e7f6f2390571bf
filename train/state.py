"""The state of a run: everything a step reads and writes, as one pytree."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

Pytree = Any

# The collections whose averages belong beside those of the parameters: running statistics. All
# others (raw buffers, a graph, counters, frozen networks) are used as they are.
AVERAGED = ("batch_stats",)


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds.

    Attributes:
      step: [] int32, updates made so far; also the position in the data.
      params: nested dict of parameters (float32 master copies).
      extra: the model's other collections, such as `batch_stats`.
      opt_state: Optax state.
      rng: [] typed PRNG key; step t uses `fold_in(rng, t)`.
      ema: `{"params", "extra"}` averages, or None.
      bad_step: [] int32, the first step whose loss or gradient was not finite, else -1. From that
        step on updates are no-ops, so that the last sound parameters survive until the loop looks.
    """

    step: jax.Array
    params: Pytree
    extra: Pytree
    opt_state: Pytree
    rng: jax.Array
    ema: Pytree
    bad_step: jax.Array

    @property
    def variables(self) -> dict[str, Pytree]:
        """The collections `Module.apply` takes."""
        return {"params": self.params, **self.extra}

    @property
    def eval_variables(self) -> dict[str, Pytree]:
        """The averaged collections where there are averages, else the present ones."""
        if self.ema is None:
            return self.variables
        return {"params": self.ema["params"], **self.extra, **self.ema["extra"]}


def create_state(params, extra, optimizer, rng, *, ema: bool) -> TrainState:
    """A state at step 0; the averages start at the initial values."""
    average = {"params": params, "extra": _statistics(extra)} if ema else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        extra=extra,
        opt_state=optimizer.init(params),
        rng=rng,
        # A copy: donated buffers must not be shared between two leaves.
        ema=jax.tree.map(jnp.copy, average),
        bad_step=jnp.full((), -1, jnp.int32),
    )


def update_ema(ema, params, extra, decay: float):
    """`e <- decay * e + (1 - decay) * p` over parameters and running statistics."""
    new = {"params": params, "extra": _statistics(extra)}
    return jax.tree.map(lambda e, p: (decay * e + (1.0 - decay) * p).astype(e.dtype), ema, new)


def _statistics(extra: dict) -> dict:
    return {k: v for k, v in extra.items() if k in AVERAGED}
