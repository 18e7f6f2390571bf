"""T5's relative position buckets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def bucket_table(buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every distance 0..max_distance, int32 `[max_distance + 1]`.

    Half of the buckets hold one distance each, the others grow logarithmically up to
    `max_distance`; farther distances share the last.

    Raises ValueError when there is no room for the logarithmic half.
    """
    exact = buckets // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"{buckets} buckets up to distance {max_distance}: wanted at least 2 buckets and a "
            f"distance above {exact}"
        )
    distance = np.arange(max_distance + 1)
    # In float32 and in this order, as the reference has it: edges fall on exact powers.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(np.log(max_distance / exact)) * (buckets - exact)).astype(
        np.int32
    )
    return np.where(distance < exact, distance, np.minimum(far, buckets - 1)).astype(np.int32)


def relative_buckets(
    relative: jax.Array, *, bidirectional: bool, buckets: int = 32, max_distance: int = 128
) -> jax.Array:
    """Bucket of key position minus query position, int32 of the shape of `relative`.

    Bidirectional: half of the buckets for keys behind the query, half for keys before it.
    Causal: keys behind the query share bucket 0.
    (Raffel et al., 2020, section 2.1; `relative_attention_bias` in checkpoints.)
    """
    if bidirectional:
        table = jnp.asarray(bucket_table(buckets // 2, max_distance))
        base, distance = jnp.where(relative > 0, buckets // 2, 0), jnp.abs(relative)
    else:
        table = jnp.asarray(bucket_table(buckets, max_distance))
        base, distance = 0, jnp.maximum(-relative, 0)
    return base + table[jnp.minimum(distance, max_distance)]
