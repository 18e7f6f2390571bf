"""Many runs at once with the runs along the vector lanes: arrays [n_j, n_{j-1}, lanes].

A product of small matrices leaves most of a vector unit idle; with the lanes last, each entry of
the product is a sum of elementwise vector products over all runs. Two things decide whether XLA's
CPU backend makes good code of it (both measured, see `benchmarks/results/dmf.md`): the rows must
be computed in two blocks that are concatenated, since the plain form of three broadcast axes is
emitted element by element, and vectors should be 512 bits wide where the machine has them.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from theory.optimizers import Optimizer

# Largest width for which lanes are faster last than first, by backend (benchmarks/dmf.py). On
# accelerators the batched matrix product is the better form at every width.
LAST_UP_TO = {"cpu": 32}
# Methods whose update is elementwise, or a scalar a run: they take lanes last as they are.
ELEMENTWISE = ("gd", "momentum", "nesterov", "group_rmsprop", "rmsprop", "adam")
MULTIPLE = 16  # lanes of one device: two vectors of float64, so that no lane is left to scalar code


def lanes_last(dims: tuple[int, ...], kind: str, optimizer: Optimizer, backend: str) -> bool:
    """Whether runs of these widths [n_0..n_L] should have their lanes last while they advance."""
    small = max(dims) <= LAST_UP_TO.get(backend, 0)
    return small and kind in ("reconstruction", "completion") and optimizer.name in ELEMENTWISE


def compiler_options(backend: str) -> dict[str, Any] | None:
    """Options for `jax.jit` under which the lanes are vectorized best."""
    return {"xla_cpu_prefer_vector_width": 512} if backend == "cpu" else None


def matmul(left: jax.Array, right: jax.Array) -> jax.Array:
    """Matrix products of all lanes, [i, k, lanes] and [k, j, lanes] to [i, j, lanes]."""
    half = -(-left.shape[0] // 2)
    blocks = [
        functools.reduce(
            operator.add,
            (left[i : i + half, k, None] * right[None, k] for k in range(left.shape[1])),
        )
        for i in range(0, left.shape[0], half)
    ]
    # The barrier keeps XLA from computing a product again inside every user of it.
    return jax.lax.optimization_barrier(jnp.concatenate(blocks))
