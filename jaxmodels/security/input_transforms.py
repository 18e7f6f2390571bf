"""Random input transformations for transferable attacks: (key, x [B, H, W, C]) -> the same shape.

C. Xie et al., "Improving Transferability of Adversarial Examples with Input Diversity", arXiv
1803.06978 (torchattacks' and RobFR's conventions); Y. Dong et al., "Evading Defenses ... by
Translation-Invariant Attacks", arXiv 1904.02884; X. Yang et al., "Delving into the Adversarial
Robustness on Face Recognition" (RobFR), arXiv 2007.04118 (cutout and landmark masks).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

Transform = Callable[[jax.Array, jax.Array], jax.Array]
RESIZES = ("bilinear", "nearest")
FIRST_INNER_LANDMARK = 17  # 0 .. 16 are the jaw


def gaussian_kernel(length: int, sigmas: float = 3.0) -> jax.Array:
    """[length, length], sum 1: outer product of the normal density at linspace(-s, s, length)."""
    line = np.exp(-0.5 * np.linspace(-sigmas, sigmas, length) ** 2)
    kernel = np.outer(line, line)
    return jnp.asarray(kernel / kernel.sum(), jnp.float32)


def smooth(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Every channel of x [B, H, W, C] convolved with kernel [k, k], zeros beyond the border."""
    from jaxmodels.layers.depthwise import depthwise_conv

    k = kernel.shape[0]
    full = jnp.broadcast_to(kernel[:, :, None, None], (*kernel.shape, 1, x.shape[-1]))
    pad = ((k - 1) // 2, k // 2)
    return depthwise_conv(x, full.astype(x.dtype), (1, 1), (pad, pad))


def _axis_weights(size: int, length, start, mode: str) -> jax.Array:
    """[size, size]: row i reads the axis as seen when it is resized to `length` at `start`."""
    place = jnp.arange(size) - start
    inside = (place >= 0) & (place < length)
    if mode == "nearest":
        source = jnp.clip(jnp.floor(place * size / length), 0, size - 1)
        weights = source[:, None] == jnp.arange(size)
    else:
        source = jnp.clip((place + 0.5) * size / length - 0.5, 0, size - 1)
        weights = jnp.maximum(0, 1 - jnp.abs(source[:, None] - jnp.arange(size)))
    return jnp.where(inside[:, None], weights, 0).astype(jnp.float32)


def shrink(x: jax.Array, height, width, top, left, mode: str = "bilinear") -> jax.Array:
    """x [B, H, W, C] resized to height x width, placed at (top, left), zeros around it.

    The sizes and the place may be traced: both axes are matrix products.
    """
    if mode not in RESIZES:
        raise ValueError(f"resize mode {mode!r}; known: {', '.join(RESIZES)}")
    rows = _axis_weights(x.shape[1], height, top, mode).astype(x.dtype)
    columns = _axis_weights(x.shape[2], width, left, mode).astype(x.dtype)
    return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns)


def diverse_input(
    key: jax.Array,
    x: jax.Array,
    *,
    rate: float = 0.9,
    probability: float = 0.5,
    mode: str = "bilinear",
) -> jax.Array:
    """With `probability`, resize to a side in [rate H, H) and pad with zeros to the old size.

    One draw for the batch. RobFR's form is rate 0.9, probability 1, mode `nearest`.
    """
    coin, size, down, right = jax.random.split(key, 4)
    least = int(x.shape[1] * rate)
    side = jax.random.randint(size, (), least, max(x.shape[1], least + 1))
    width = (side * x.shape[2]) // x.shape[1]
    top = jax.random.randint(down, (), 0, x.shape[1] - side + 1)
    left = jax.random.randint(right, (), 0, x.shape[2] - width + 1)
    small = shrink(x, side, width, top, left, mode)
    return jnp.where(jax.random.uniform(coin) < probability, small, x)


def cutout(key: jax.Array, x: jax.Array, *, side: int = 8) -> jax.Array:
    """x with a square of zeros at a uniform center, clipped at the border; one for each image."""
    rows, columns = jax.random.split(key)
    batch, height, width, _ = x.shape
    y0 = jax.random.randint(rows, (batch, 1), 0, height)
    x0 = jax.random.randint(columns, (batch, 1), 0, width)
    in_rows = jnp.abs(jnp.arange(height) - y0 + 0.5 * (side % 2 == 0)) <= side / 2
    in_columns = jnp.abs(jnp.arange(width) - x0 + 0.5 * (side % 2 == 0)) <= side / 2
    hole = in_rows[:, :, None] & in_columns[:, None, :]
    return x * ~hole[..., None]


def landmark_cutout(
    key: jax.Array,
    x: jax.Array,
    landmarks: jax.Array,
    *,
    count: int = 4,
    sigma: float = 1.0,
    threshold: float = 0.01,
) -> jax.Array:
    """x with zeros around `count` random landmarks that are not of the jaw.

    Args:
      landmarks: [B, L, 2] as (column, row) in pixels, L > 17.
      sigma: of the Gaussian blob at each chosen landmark; pixels where it exceeds `threshold` go.

    Raises ValueError when there are no inner landmarks.
    """
    inner = landmarks.shape[1] - FIRST_INNER_LANDMARK
    if inner < count:
        raise ValueError(
            f"LGC draws {count} landmarks of index >= {FIRST_INNER_LANDMARK}, got "
            f"{landmarks.shape[1]} landmarks"
        )
    keys = jax.random.split(key, x.shape[0])
    draw = partial(jax.random.choice, a=inner, shape=(count,), replace=False)
    chosen = jax.vmap(lambda k: draw(k))(keys) + FIRST_INNER_LANDMARK
    centers = jnp.take_along_axis(landmarks, chosen[..., None], axis=1)
    columns = jnp.arange(x.shape[2]) - centers[..., 0, None]
    rows = jnp.arange(x.shape[1]) - centers[..., 1, None]
    squared = rows[..., :, None] ** 2 + columns[..., None, :] ** 2
    hole = (jnp.exp(-squared / (2 * sigma**2)) > threshold).any(1)
    return x * ~hole[..., None]


def physical_jitter(
    key: jax.Array,
    x: jax.Array,
    *,
    degrees: float = 6.0,
    scale: tuple[float, float] = (0.95, 1.05),
    shift: float = 0.04,
    contrast: tuple[float, float] = (0.8, 1.2),
    brightness: float = 0.1,
    noise: float = 0.02,
    high: float = 1.0,
) -> jax.Array:
    """x [B, H, W, C] in [0, high] seen again: turned, scaled, moved, in other light, with noise.

    For expectations over what a camera makes of a printed patch (EOT). `shift` is in half sides;
    `brightness` and `noise` in units of `high`.
    """
    from jaxmodels.security import patches

    place, grain = jax.random.split(key)
    found = patches.sample_placements(
        place,
        x.shape[0],
        shift=shift,
        scale=scale,
        degrees=degrees,
        contrast=contrast,
        brightness=brightness,
    )
    size = x.shape[1:3]
    moved = patches.warp(x / high, patches.affine_matrices(found, size, size), size)
    return high * patches.with_noise(grain, patches.colored(moved, found), noise)


def compose(*transforms: Transform) -> Transform:
    """The transforms one after the other, each with its own key."""

    def composed(key: jax.Array, x: jax.Array) -> jax.Array:
        for transform, k in zip(transforms, jax.random.split(key, len(transforms))):
            x = transform(k, x)
        return x

    return composed
