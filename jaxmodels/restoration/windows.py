"""Windows of Swin transformers: partition, positions within a window, masks of shifted windows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Added to the logits of pixels that a cyclic shift brought together.
SEPARATED = -100.0


@functools.lru_cache(maxsize=32)
def relative_coords_table(window: int) -> np.ndarray:
    """Log-spaced relative positions float32 [1, 2w-1, 2w-1, 2], in [-1, 1] at the ends of 8."""
    offsets = np.arange(-(window - 1), window, dtype=np.float32)
    table = np.stack(np.meshgrid(offsets, offsets, indexing="ij"), -1) / np.float32(window - 1) * 8
    table = np.sign(table) * np.log2(np.abs(table) + 1) / np.log2(8)
    return _constant(table[None].astype(np.float32))


@functools.lru_cache(maxsize=32)
def relative_position_index(window: int) -> np.ndarray:
    """int64 [w*w, w*w]: where the pair (query, key) stands in the table of relative positions."""
    rows, columns = np.divmod(np.arange(window * window), window)
    dy = rows[:, None] - rows[None] + window - 1
    dx = columns[:, None] - columns[None] + window - 1
    return _constant(dy * (2 * window - 1) + dx)


def shifted_window_mask(height: int, width: int, window: int, shift: int) -> jax.Array:
    """float32 [windows, w*w, w*w]: 0 where both pixels were neighbors before the roll, else -100.

    The image rolled by -shift has nine regions; pixels of different regions must not mix. Windows
    run row by row. Under `jit` it is computed by the program: for large images a constant of this
    size would be much of it.
    """

    def regions(n: int) -> jax.Array:
        index = jnp.arange(n)
        return (index >= n - window).astype(jnp.int32) + (index >= n - shift)

    region = regions(height)[:, None] * 3 + regions(width)[None]
    region = region.reshape(height // window, window, width // window, window)
    region = region.transpose(0, 2, 1, 3).reshape(-1, window * window)
    return jnp.where(region[:, :, None] == region[:, None], 0.0, SEPARATED)


def _constant(array: np.ndarray) -> np.ndarray:
    """The array, shared by all who ask for it, and so not to be written to."""
    array.setflags(write=False)
    return array


def partition_windows(x: jax.Array, window: int) -> jax.Array:
    """[B, H, W, C] -> [B, windows, w*w, C], windows row by row."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, window * window, channels)


def merge_windows(x: jax.Array, window: int, height: int, width: int) -> jax.Array:
    """[B, windows, w*w, C] -> [B, H, W, C]."""
    batch, channels = x.shape[0], x.shape[-1]
    x = x.reshape(batch, height // window, width // window, window, window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)
