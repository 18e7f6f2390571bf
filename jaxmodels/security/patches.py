"""Adversarial patches: affine placement, compositing, printability; expectation over placements.

A. Athalye et al., arXiv 1707.07397 (EOT); T. Brown et al., arXiv 1712.09665 (patches); M. Sharif et
al., "Accessorize to a Crime" (2016), non-printability and total variation. Sampling follows
PyTorch's `affine_grid` and `grid_sample` (bilinear, zeros outside, align_corners False).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Placement(NamedTuple):
    """Where and how patches lie, each [B].

    `tx`, `ty`: center in image coordinates -1 .. 1 (x right, y down); `scale` multiplies the
    patch's nominal size in pixels; `angle` in radians; `brightness` is added to and `contrast`
    multiplied with the patch's colors about 0.5.
    """

    tx: jax.Array
    ty: jax.Array
    scale: jax.Array
    angle: jax.Array
    brightness: jax.Array
    contrast: jax.Array


def sample_placements(
    key: jax.Array,
    batch: int,
    *,
    center: tuple[float, float] = (0.0, 0.0),
    shift: float = 0.1,
    scale: tuple[float, float] = (0.7, 1.4),
    degrees: float = 30.0,
    contrast: tuple[float, float] = (0.8, 1.2),
    brightness: float = 0.1,
) -> Placement:
    """Uniform draws around `center`."""
    u = jax.random.uniform(key, (6, batch))
    span = lambda row, low, high: low + (high - low) * u[row]  # noqa: E731
    turn = np.deg2rad(degrees)
    return Placement(
        tx=center[0] + span(0, -shift, shift),
        ty=center[1] + span(1, -shift, shift),
        scale=span(2, *scale),
        angle=span(3, -turn, turn),
        brightness=span(4, -brightness, brightness),
        contrast=span(5, *contrast),
    )


def affine_matrices(
    placement: Placement, image_size: tuple[int, int], patch_size: tuple[int, int]
) -> jax.Array:
    """[B, 2, 3]: from normalized output (x, y, 1) to normalized patch coordinates.

    A = diag(2 / (scale pw), 2 / (scale ph)) R(angle) diag(W / 2, H / 2), translation -A (tx, ty).
    """
    (height, width), (ph, pw) = image_size, patch_size
    cos, sin = jnp.cos(placement.angle), jnp.sin(placement.angle)
    rotation = jnp.stack([jnp.stack([cos, sin], -1), jnp.stack([-sin, cos], -1)], -2)
    to_patch = jnp.stack([2 / (placement.scale * pw), 2 / (placement.scale * ph)], -1)
    matrix = to_patch[..., None] * rotation * jnp.asarray([width / 2, height / 2])
    center = jnp.stack([placement.tx, placement.ty], -1)
    shift = -(matrix * center[:, None, :]).sum(-1)
    return jnp.concatenate([matrix, shift[..., None]], -1)


def pixel_centers(size: tuple[int, int]) -> jax.Array:
    """Normalized (x, y) of every pixel's center [H, W, 2], align_corners False."""
    height, width = size
    x = (2 * jnp.arange(width) + 1) / width - 1
    y = (2 * jnp.arange(height) + 1) / height - 1
    return jnp.stack(jnp.meshgrid(x, y), -1)


def grid_sample(source: jax.Array, points: jax.Array) -> jax.Array:
    """Bilinear samples of source [h, w, C] at points [..., 2] in -1 .. 1, zeros outside."""
    h, w, _ = source.shape
    x = ((points[..., 0] + 1) * w - 1) / 2
    y = ((points[..., 1] + 1) * h - 1) / 2
    x0, y0 = jnp.floor(x), jnp.floor(y)
    total = 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            column, row = x0 + dx, y0 + dy
            weight = (1 - jnp.abs(x - column)) * (1 - jnp.abs(y - row))
            inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
            rows = jnp.clip(row, 0, h - 1).astype(jnp.int32)
            columns = jnp.clip(column, 0, w - 1).astype(jnp.int32)
            total = total + jnp.where(inside, weight, 0)[..., None] * source[rows, columns]
    return total


def warp(source: jax.Array, matrices: jax.Array, image_size: tuple[int, int]) -> jax.Array:
    """Patches [B, h, w, C] (or one [h, w, C]) seen in images [B, H, W, C] through matrices."""
    grid = pixel_centers(image_size)
    points = jnp.einsum("bij,hwj->bhwi", matrices[..., :2], grid) + matrices[:, None, None, :, 2]
    return jax.vmap(grid_sample, in_axes=(0 if source.ndim == 4 else None, 0))(source, points)


def colored(patch: jax.Array, placement: Placement) -> jax.Array:
    """Patch [h, w, 3] in each placement's light: clip((p - 0.5) contrast + 0.5 + brightness)."""
    contrast = placement.contrast[:, None, None, None]
    brightness = placement.brightness[:, None, None, None]
    lit = (patch - 0.5) * contrast + 0.5 + brightness
    # Not `clip`, which halves the gradient of colors that are 0 or 1 exactly.
    return jnp.where(lit < 0, 0, jnp.where(lit > 1, 1, lit))


class Composition(NamedTuple):
    """`images` with patches, and what was laid over them, all [B, H, W, .]."""

    images: jax.Array
    patches: jax.Array
    masks: jax.Array


def compose_patch(
    images: jax.Array, patch: jax.Array, mask: jax.Array, placement: Placement
) -> Composition:
    """Images [B, H, W, 3] with the patch [h, w, 3] where the mask [h, w, 1] says, both warped.

    img (1 - m) + p m, differentiable in the patch.
    """
    size = images.shape[1:3]
    matrices = affine_matrices(placement, size, patch.shape[:2])
    patches = warp(colored(patch, placement), matrices, size)
    masks = warp(mask, matrices, size)
    return Composition(images * (1 - masks) + patches * masks, patches, masks)


def total_variation(patch: jax.Array) -> jax.Array:
    """Mean sqrt(dx^2 + dy^2 + 1e-8) of patch [h, w, C] over its upper left (h-1) x (w-1)."""
    corner = patch[:-1, :-1]
    dx, dy = patch[:-1, 1:] - corner, patch[1:, :-1] - corner
    return jnp.sqrt(dx**2 + dy**2 + 1e-8).mean()


def printable_palette(count: int = 30) -> jax.Array:
    """`count` colors [count, 3] that a printer reproduces: low-discrepancy, less than saturated."""
    # The additive recurrence of the plastic number fills the cube evenly.
    phi = 1.22074408460575947536
    steps = np.array([phi**-1, phi**-2, phi**-3])
    return jnp.asarray(0.05 + 0.85 * ((0.5 + np.outer(np.arange(count), steps)) % 1), jnp.float32)


def non_printability(patch: jax.Array, palette: jax.Array) -> jax.Array:
    """Sum over pixels of the distance to the nearest palette color; patch [h, w, 3]."""
    squared = jnp.square(patch[:, :, None, :] - palette).sum(-1)
    return jnp.sqrt(squared.min(-1) + 1e-12).sum()


def with_noise(key: jax.Array, images: jax.Array, sigma: float = 0.02) -> jax.Array:
    """Images with Gaussian sensor noise, clipped to [0, 1]."""
    noise = sigma * jax.random.normal(key, images.shape, images.dtype)
    return jnp.clip(images + noise, 0, 1)
