"""What every restoration network checks before it computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def check_unit_range(x: jax.Array, model: str) -> None:
    """Refuse integers, and values that can only be 0..255.

    Values are looked at only where they are known, that is outside `jit`.

    Raises ValueError "expects [0,1]".
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{model} expects [0,1] floats, got {x.dtype}; divide by 255")
    if isinstance(x, jax.core.Tracer) or x.size == 0:
        return
    largest = float(np.max(np.asarray(x, np.float32)))
    if largest > 2:
        raise ValueError(f"{model} expects [0,1], got values up to {largest:g}; divide by 255")
