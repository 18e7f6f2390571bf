"""Several white-box models attacked as one: logits, features or losses averaged with weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.security.perturbations import Loss

Apply = Callable[[jax.Array], jax.Array]


def _weights(count: int, weights: Sequence[float] | None) -> jax.Array:
    if not count:
        raise ValueError("an ensemble needs at least one model")
    if weights is None:
        return jnp.full(count, 1 / count)
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} models")
    return jnp.asarray(weights, jnp.float32)


def average_outputs(apply_fns: Sequence[Apply], weights: Sequence[float] | None = None) -> Apply:
    """Weighted mean of the members' logits or features, [B, D].

    Raises ValueError when the members' outputs differ in size.
    """
    shares = _weights(len(apply_fns), weights)

    def apply(x: jax.Array) -> jax.Array:
        outputs = [fn(x) for fn in apply_fns]
        sizes = [out.shape[-1] for out in outputs]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"ensemble members have outputs of sizes {sizes}: averaging features needs one "
                "size; average losses instead"
            )
        return sum(w * out for w, out in zip(shares, outputs))

    return apply


def stack_outputs(apply_fns: Sequence[Apply]) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """All members' outputs, for `average_losses`."""
    return lambda x: tuple(fn(x) for fn in apply_fns)


def average_losses(losses: Loss | Sequence[Loss], weights: Sequence[float] | None = None) -> Loss:
    """Loss of a tuple of outputs: the weighted mean of each member's own.

    `y` is shared by the members, or a tuple with one entry each (target features).
    """

    def loss(outputs: tuple[jax.Array, ...], y: Any) -> jax.Array:
        shares = _weights(len(outputs), weights)
        own = losses if isinstance(losses, (list, tuple)) else [losses] * len(outputs)
        ys = y if isinstance(y, tuple) else (y,) * len(outputs)
        return sum(w * fn(out, t) for w, fn, out, t in zip(shares, own, outputs, ys))

    return loss


def each_member(function: Callable, *stacked: Any) -> Any:
    """`function` of every member; arguments and results are stacked on their first axis.

    At once, or one after another when compiled for a CPU: convolutions with kernels of their own
    become one grouped convolution under `vmap`, which takes several times the members' own time
    there.
    """

    def one_by_one(*stacked):
        return jax.lax.map(lambda arguments: function(*arguments), stacked)

    return jax.lax.platform_dependent(*stacked, cpu=one_by_one, default=jax.vmap(function))


def same_architecture(apply: Callable[[Any, jax.Array], jax.Array], stacked: Any) -> Apply:
    """Mean output of members of one architecture, variables `stacked` [M, ...]."""
    return lambda x: each_member(lambda variables: apply(variables, x), stacked).mean(0)
