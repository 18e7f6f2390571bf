"""Mixup and CutMix of a whole batch, whose partner is the batch reversed (as in timm).

Facts of xiusu/ViTAS@066bb20 (util/mixup.py); H. Zhang et al., arXiv 1710.09412; S. Yun et al.,
arXiv 1905.04899. Pure functions of arrays; `mix` draws.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def mixup(images: jax.Array, lam: Any) -> jax.Array:
    """lam x + (1 - lam) x reversed, images [B, H, W, C]."""
    lam = jnp.asarray(lam, images.dtype)
    return lam * images + (1 - lam) * images[::-1]


def mixed_targets(label: jax.Array, lam: Any, classes: int, smoothing: float = 0.1) -> jax.Array:
    """[B] -> [B, K]: lam of the label and 1 - lam of the partner's.

    A label is `1 - s + s / K` on its class and `s / K` elsewhere (not `s / (K - 1)`).
    """
    off = smoothing / classes
    hot = jax.nn.one_hot(label, classes) * (1 - smoothing) + off
    lam = jnp.asarray(lam, hot.dtype)
    return lam * hot + (1 - lam) * hot[::-1]


def cut_box(size: tuple[int, int], lam: Any, row: Any, column: Any) -> tuple[jax.Array, jax.Array]:
    """`(box int32 [y0, y1, x0, x1], lam)`: the box about a center, clipped, and lam of its area.

    The sides are `int(H sqrt(1 - lam))` and `int(W sqrt(1 - lam))`; lam becomes the share outside
    the clipped box.
    """
    height, width = size
    if isinstance(lam, float | np.floating):
        # Doubles, whose products fall on either side of a whole number.
        ratio = np.sqrt(1 - np.float64(lam))
        h, w = int(height * ratio), int(width * ratio)
    else:
        ratio = jnp.sqrt(1 - jnp.asarray(lam, jnp.float32))
        # A float32 product can fall just short of the whole number that doubles reach.
        h = jnp.floor(height * ratio + 1e-5).astype(jnp.int32)
        w = jnp.floor(width * ratio + 1e-5).astype(jnp.int32)
    y0, y1 = jnp.clip(row - h // 2, 0, height), jnp.clip(row + h // 2, 0, height)
    x0, x1 = jnp.clip(column - w // 2, 0, width), jnp.clip(column + w // 2, 0, width)
    inside = (y1 - y0) * (x1 - x0)
    return jnp.stack([y0, y1, x0, x1]), 1 - inside / (height * width)


def cutmix(images: jax.Array, box: jax.Array) -> jax.Array:
    """The partner's pixels inside the box `[y0, y1, x0, x1]`."""
    rows, columns = jnp.arange(images.shape[1])[:, None], jnp.arange(images.shape[2])[None]
    inside = (rows >= box[0]) & (rows < box[1]) & (columns >= box[2]) & (columns < box[3])
    return jnp.where(inside[None, :, :, None], images[::-1], images)


def mix(
    rng: jax.Array,
    images: jax.Array,
    label: jax.Array,
    classes: int,
    *,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    switch: float = 0.5,
    smoothing: float = 0.1,
) -> tuple[jax.Array, jax.Array]:
    """`(images, targets [B, K])` of one batch; an alpha of 0 turns its kind off.

    lam is Beta(alpha, alpha); with both kinds on, CutMix is taken with probability `switch`.
    """
    kind, first, second, place = jax.random.split(rng, 4)
    if not mixup_alpha and not cutmix_alpha:
        return images, mixed_targets(label, 1.0, classes, smoothing)
    cut = jnp.asarray(bool(cutmix_alpha))
    if mixup_alpha and cutmix_alpha:
        cut = jax.random.uniform(kind) < switch
    lam = jax.random.beta(first, mixup_alpha or 1.0, mixup_alpha or 1.0)
    cut_lam = jax.random.beta(second, cutmix_alpha or 1.0, cutmix_alpha or 1.0)
    size = images.shape[1:3]
    center = jax.random.randint(place, (2,), 0, jnp.asarray(size))
    box, cut_lam = cut_box(size, cut_lam, center[0], center[1])
    mixed = jnp.where(cut, cutmix(images, box), mixup(images, lam))
    return mixed, mixed_targets(label, jnp.where(cut, cut_lam, lam), classes, smoothing)
