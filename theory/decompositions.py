"""Matrix decompositions that may be batched inside a program of many devices.

jaxlib before 0.11.2 spreads a batched LAPACK call over XLA's own thread pool and waits for it
there: as many calls at a time as the pool has threads (a sweep over that many host devices, or
independent calls of one program) wait for each other forever. Under `jax.vmap` these therefore take
one matrix after another on a CPU, as later versions do; on accelerators they are batched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def _one_at_a_time_on_cpu(function: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    sequential = jax.custom_batching.sequential_vmap(function)

    @functools.wraps(function)
    def decompose(matrix: jax.Array) -> Any:
        if matrix.ndim != 2:
            raise ValueError(f"matrix: expected two axes, got {matrix.shape}; use jax.vmap")
        return jax.lax.platform_dependent(matrix, cpu=sequential, default=function)

    return decompose


@_one_at_a_time_on_cpu
def singular_values(matrix: jax.Array) -> jax.Array:
    """Singular values [min(m, n)], descending, of a matrix [m, n]."""
    return jnp.linalg.svd(matrix, compute_uv=False)


@_one_at_a_time_on_cpu
def svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Thin singular value decomposition (U [m, k], s [k], Vh [k, n]) of a matrix [m, n]."""
    return tuple(jnp.linalg.svd(matrix, full_matrices=False))


@_one_at_a_time_on_cpu
def qr(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Thin QR factors (Q [m, k], R [k, n]) of a matrix [m, n]."""
    return tuple(jnp.linalg.qr(matrix))


@_one_at_a_time_on_cpu
def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues [n], ascending, and eigenvectors [n, n] (columns) of a symmetric matrix."""
    return tuple(jnp.linalg.eigh(matrix))


@_one_at_a_time_on_cpu
def eigvalsh(matrix: jax.Array) -> jax.Array:
    """Eigenvalues [n], ascending, of a symmetric matrix [n, n]."""
    return jnp.linalg.eigvalsh(matrix)


def spectral_norm(matrix: jax.Array) -> jax.Array:
    """Largest singular value of a matrix [m, n]."""
    return singular_values(matrix)[0]
