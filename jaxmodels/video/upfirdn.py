"""Resampling by zero insertion, a FIR filter and decimation, as StyleGAN2 defines it.

The semantics are those of NVlabs/stylegan2-ada-pytorch@d72cc7d (`torch_utils/ops/upfirdn2d.py`),
for images [B, H, W, C]. Everything is shifted multiply-adds: XLA's depthwise convolution is far
slower on a CPU, elsewhere the shifts fuse into one loop. Derivatives of any order work.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pair = int | Sequence[int]
BINOMIAL = (1, 3, 3, 1)


def setup_filter(
    f: Sequence | np.ndarray | jax.Array | None,
    *,
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
):
    """Taps as the official `setup_filter` prepares them: [n] (separable) or [fh, fw].

    Fewer than 8 taps become a 2-D filter by their outer product unless `separable` says otherwise;
    `normalize` divides by the sum; `gain` multiplies by `gain` in 2-D.
    """
    f = np.asarray(1 if f is None else f, np.float32)
    f = f[None] if f.ndim == 0 else f
    if f.ndim not in (1, 2) or f.size == 0:
        raise ValueError(f"a filter has one or two axes and is not empty, got shape {f.shape}")
    separable = (f.ndim == 1 and f.size >= 8) if separable is None else separable
    if f.ndim == 1 and not separable:
        f = np.outer(f, f)
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = np.flip(f)
    return f * np.float32(gain ** (f.ndim / 2))


def upfirdn2d(
    x: jax.Array,
    f: np.ndarray | jax.Array | None,
    *,
    up: Pair = 1,
    down: Pair = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> jax.Array:
    """Insert up - 1 zeros after each pixel, pad, convolve with f, keep every down-th pixel.

    Args:
      x: [B, H, W, C].
      f: [fh, fw], or [n] applied along both axes, or None (identity).
      up, down: one number or (x, y).
      padding: one number, (x, y), or (x0, x1, y0, y1) in pixels of the up-sampled image; negative
        numbers crop.
      flip_filter: False is a true convolution, True a correlation.
      gain: multiplies the result.

    Returns: [B, H', W', C], H' = (H up + y0 + y1 - fh) // down + 1.

    Raises: ValueError for wrong shapes or an empty result.
    """
    if x.ndim != 4:
        raise ValueError(f"images must be [batch, height, width, channels], got {x.shape}")
    up_x, up_y = _pair(up, "up")
    down_x, down_y = _pair(down, "down")
    x0, x1, y0, y1 = _padding(padding)
    f = np.ones((1, 1), np.float32) if f is None else f
    if f.ndim not in (1, 2):
        raise ValueError(f"filter must be [n] or [fh, fw], got {f.shape}")
    fh, fw = (f.shape[0], f.shape[0]) if f.ndim == 1 else f.shape
    height = (x.shape[1] * up_y + y0 + y1 - fh) // down_y + 1
    width = (x.shape[2] * up_x + x0 + x1 - fw) // down_x + 1
    if height < 1 or width < 1:
        raise ValueError(
            f"filter {fh}x{fw} and padding {(x0, x1, y0, y1)} leave nothing of {x.shape}"
        )
    f = f * np.asarray(gain ** (f.ndim / 2), f.dtype)
    if f.ndim == 2 and isinstance(f, np.ndarray):
        f = _separated(f)
    if not isinstance(f, tuple):
        f = (f, f) if f.ndim == 1 else f
    rows, columns = (y0, y1, up_y, down_y, height), (x0, x1, up_x, down_x, width)
    if isinstance(f, tuple):
        # The axis that shrinks first, or that grows last, has the smaller intermediate.
        x = _along(x, f[0], 1, *rows, flip_filter)
        return _along(x, f[1], 2, *columns, flip_filter)
    x = _stretched(_stretched(x, 1, y0, y1, up_y), 2, x0, x1, up_x)
    taps = jnp.asarray(f if flip_filter else f[::-1, ::-1], x.dtype)
    y = None
    for i in range(fh):
        for j in range(fw):
            window = x[
                :,
                i : i + (height - 1) * down_y + 1 : down_y,
                j : j + (width - 1) * down_x + 1 : down_x,
            ]
            y = window * taps[i, j] if y is None else y + window * taps[i, j]
    return y


def upsample2d(x: jax.Array, f, up: int = 2, gain: float = 1) -> jax.Array:
    """Twice (`up` times) the size, aligned as the generator's image skips: [B, up H, up W, C]."""
    fh, fw = _filter_size(f)
    padding = ((fw + up - 1) // 2, (fw - up) // 2, (fh + up - 1) // 2, (fh - up) // 2)
    return upfirdn2d(x, f, up=up, padding=padding, gain=gain * up * up)


def downsample2d(x: jax.Array, f, down: int = 2, gain: float = 1) -> jax.Array:
    """Half (1 / `down`) the size, aligned as the discriminator's: [B, H / down, W / down, C]."""
    fh, fw = _filter_size(f)
    padding = (
        (fw - down + 1) // 2,
        (fw - down) // 2,
        (fh - down + 1) // 2,
        (fh - down) // 2,
    )
    return upfirdn2d(x, f, down=down, padding=padding, gain=gain)


def filter2d(x: jax.Array, f, gain: float = 1) -> jax.Array:
    """Filtered at the same size, [B, H, W, C]."""
    fh, fw = _filter_size(f)
    return upfirdn2d(x, f, padding=(fw // 2, (fw - 1) // 2, fh // 2, (fh - 1) // 2), gain=gain)


def _filter_size(f) -> tuple[int, int]:
    return (1, 1) if f is None else (f.shape[0], f.shape[-1])


def _along(x, taps, axis, before, after, up, down, size, flip_filter):
    x = _stretched(x, axis, before, after, up)
    taps = taps if flip_filter else taps[::-1]
    y = None
    for i in range(len(taps)):
        window = lax.slice_in_dim(x, i, i + (size - 1) * down + 1, down, axis)
        term = window * jnp.asarray(taps[i], x.dtype)
        y = term if y is None else y + term
    return y


def _stretched(x, axis, before, after, up):
    """`up - 1` zeros after every pixel of one axis, then padding (negative: cropping)."""
    if before == after == 0 and up == 1:
        return x
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (before, after + up - 1, up - 1)
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _separated(f: np.ndarray):
    """(rows, columns) of a filter of rank one, else the filter."""
    i, j = np.unravel_index(np.abs(f).argmax(), f.shape)
    if f[i, j] == 0:
        return f
    # Balanced, so that neither factor over- or underflows in half precision.
    scale = np.sqrt(np.abs(f[i, j]))
    rows, columns = f[:, j] / f[i, j] * scale, f[i] / scale
    exact = np.allclose(np.outer(rows, columns), f, rtol=1e-6, atol=1e-7 * np.abs(f).max())
    return (rows.astype(f.dtype), columns.astype(f.dtype)) if exact else f


def _pair(value: Pair, name: str) -> tuple[int, int]:
    pair = (value, value) if np.ndim(value) == 0 else tuple(value)
    if len(pair) != 2 or any(int(v) != v or v < 1 for v in pair):
        raise ValueError(f"{name} is one positive integer or two (x, y), got {value!r}")
    return int(pair[0]), int(pair[1])


def _padding(value: Pair) -> tuple[int, int, int, int]:
    numbers = (value,) if np.ndim(value) == 0 else tuple(value)
    if len(numbers) == 1:
        numbers = numbers * 4
    elif len(numbers) == 2:
        numbers = (numbers[0], numbers[0], numbers[1], numbers[1])
    if len(numbers) != 4:
        raise ValueError(f"padding is one number, (x, y) or (x0, x1, y0, y1), got {value!r}")
    return tuple(int(n) for n in numbers)
