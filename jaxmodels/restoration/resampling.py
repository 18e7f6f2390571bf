"""Resizing with PyTorch's conventions, pixel shuffle, and sampling along a flow field.

A resize is a fixed linear map of each axis, so it is two small matrix products whose matrices are
computed in float64 while tracing. `jax.image.resize` has another cubic kernel (a = -0.5,
renormalized at borders) and no `align_corners`, hence this file.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

METHODS = ("bilinear", "bicubic", "bicubic_antialias")
# PyTorch's bicubic kernel; Pillow and other antialiased resizes have -0.5.
_CUBIC_TORCH, _CUBIC_PILLOW = -0.75, -0.5


def _cubic(t: np.ndarray, a: float) -> np.ndarray:
    t = np.abs(t)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = a * (((t - 5) * t + 8) * t - 4)
    return np.where(t < 1, near, np.where(t < 2, far, 0.0))


@functools.lru_cache(maxsize=256)
def resize_matrix(
    source: int, target: int, method: str, align_corners: bool = False, scale: float | None = None
) -> np.ndarray:
    """The matrix [target, source] float64 of a resize of one axis.

    `bilinear` and `bicubic` (a = -0.75, edges repeated, no antialiasing) are those of
    `torch.nn.functional.interpolate`; `scale` is its `scale_factor`, which PyTorch uses for the
    coordinates in place of target / source when it was given. `bicubic_antialias` is Pillow's
    BICUBIC without its 8-bit rounding: a = -0.5, the support widened by source / target, weights
    normalized over the pixels inside the image.

    Raises ValueError for another method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown resize method {method!r}; known: {', '.join(METHODS)}")
    positions = np.arange(target)
    if align_corners:
        step = (source - 1) / (target - 1) if target > 1 else 0.0
        center = positions * step
    else:
        step = source / target if scale is None else 1 / scale
        center = (positions + 0.5) * step - 0.5
    if method == "bicubic_antialias":
        widen = max(step, 1.0)
        offsets = (np.arange(source)[None] - center[:, None]) / widen
        weights = _cubic(offsets, _CUBIC_PILLOW)
        return weights / weights.sum(1, keepdims=True)
    if method == "bilinear":
        center = np.maximum(center, 0.0)
        low = np.minimum(np.floor(center).astype(int), source - 1)
        part = center - low
        taps = [(low, 1 - part), (np.minimum(low + 1, source - 1), part)]
    else:
        low = np.floor(center).astype(int)
        part = center - low
        taps = [
            (np.clip(low + k, 0, source - 1), _cubic(part - k, _CUBIC_TORCH)) for k in range(-1, 3)
        ]
    matrix = np.zeros((target, source))
    for index, weight in taps:
        np.add.at(matrix, (positions, index), weight)
    return matrix


def resize(
    x: jax.Array,
    size: tuple[int, int],
    method: str = "bilinear",
    *,
    align_corners: bool = False,
    scale: float | None = None,
) -> jax.Array:
    """Images [..., H, W, C] -> [..., *size, C]; methods and arguments as in `resize_matrix`."""
    height, width = x.shape[-3:-1]
    rows, columns = (
        jnp.asarray(resize_matrix(n, m, method, align_corners, scale), x.dtype)
        for n, m in zip((height, width), size)
    )
    exact = lax.Precision.HIGHEST
    x = jnp.einsum("ow,...hwc->...hoc", columns, x, precision=exact)
    return jnp.einsum("oh,...hwc->...owc", rows, x, precision=exact)


def nearest_upsample(x: jax.Array, scale: int) -> jax.Array:
    """Every pixel of [B, H, W, C] repeated: [B, s H, s W, C]."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, scale, width, scale, channels))
    return x.reshape(batch, height * scale, width * scale, channels)


def pixel_shuffle(x: jax.Array, scale: int) -> jax.Array:
    """[B, H, W, C s^2] -> [B, s H, s W, C] with PyTorch's channel order (c, row, column)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, channels // scale**2, scale, scale)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height * scale, width * scale, -1)


def average_pool_2(x: jax.Array) -> jax.Array:
    """Means of 2x2 blocks of [B, H, W, C], sides even."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def reflect_pad(x: jax.Array, bottom: int, right: int) -> jax.Array:
    """Pad [B, H, W, C] below and to the right by reflection without the edge (torch `reflect`).

    Raises ValueError where the image has too few pixels to reflect.
    """
    height, width = x.shape[1:3]
    if bottom >= height or right >= width:
        raise ValueError(
            f"a {height}x{width} image cannot be padded by reflection by {bottom} rows and {right} "
            "columns; it needs more pixels than that"
        )
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="reflect")


def sample_bilinear(x: jax.Array, rows: jax.Array, columns: jax.Array, border: str) -> jax.Array:
    """Values of x at real-valued pixel coordinates, bilinearly.

    Args:
      x: [N, H, W, C].
      rows, columns: [N, P] coordinates in pixels, 0 the center of the first.
      border: "zeros": pixels outside contribute 0; "border": coordinates are clamped.

    Returns: [N, P, C]. Gradients flow to x and to the coordinates.
    """
    height, width = x.shape[1:3]
    if border not in ("zeros", "border"):
        raise ValueError(f"border must be 'zeros' or 'border', not {border!r}")
    if border == "border":
        rows, columns = jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)
    else:
        # Anything farther out is 0 as well, and stays within the range of integers.
        rows, columns = jnp.clip(rows, -2, height + 1), jnp.clip(columns, -2, width + 1)
    top, left = jnp.floor(rows), jnp.floor(columns)
    down, right = rows - top, columns - left
    i, j = top.astype(jnp.int32), left.astype(jnp.int32)
    flat = x.reshape(x.shape[0], height * width, x.shape[-1])
    total = None
    for di, wi in ((0, 1 - down), (1, down)):
        for dj, wj in ((0, 1 - right), (1, right)):
            r, c = i + di, j + dj
            weight = wi * wj
            if border == "zeros":
                inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
                weight = jnp.where(inside, weight, 0)
            index = jnp.clip(r, 0, height - 1) * width + jnp.clip(c, 0, width - 1)
            value = jax.vmap(lambda a, k: a.at[k].get(mode="promise_in_bounds"))(flat, index)
            part = value * weight[..., None].astype(x.dtype)
            total = part if total is None else total + part
    return total


def flow_warp(x: jax.Array, flow: jax.Array, border: str = "zeros") -> jax.Array:
    """x [B, H, W, C] sampled at pixel grid + flow [B, H, W, 2] (x, y), in pixels.

    `grid_sample(align_corners=True)` of PyTorch; `border` as in `sample_bilinear`.
    """
    batch, height, width, channels = x.shape
    rows = flow[..., 1] + jnp.arange(height, dtype=flow.dtype)[:, None]
    columns = flow[..., 0] + jnp.arange(width, dtype=flow.dtype)
    sampled = sample_bilinear(x, rows.reshape(batch, -1), columns.reshape(batch, -1), border)
    return sampled.reshape(batch, height, width, channels)
