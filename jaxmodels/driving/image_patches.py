"""Image patches of clusters: grown and merged boxes, sizes of few buckets, crop and resize."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.driving import box_overlap

BUCKETS = (32, 64, 96, 128, 192, 256)


def grow_boxes(
    boxes: jax.Array, width: int, height: int, share: float = 0.15, least: float = 8.0
) -> jax.Array:
    """Boxes [N, 4] grown at every edge by `share` of the side, at least `least` pixels, clipped."""
    side = boxes[:, 2:] - boxes[:, :2]
    margin = jnp.maximum(side * share, least)
    limit = jnp.asarray([width, height] * 2, boxes.dtype)
    grown = jnp.concatenate([boxes[:, :2] - margin, boxes[:, 2:] + margin], axis=-1)
    return jnp.clip(grown, 0, limit)


class Patches(NamedTuple):
    """Regions of the image to look at, in the order of their clusters' distance.

    Attributes:
      boxes: [N, 4] pixels. valid: bool [N]. members: bool [N, N], clusters of each patch; a
        patch has the index of its nearest cluster.
    """

    boxes: jax.Array
    valid: jax.Array
    members: jax.Array


def merge_patches(
    boxes: jax.Array,
    distance: jax.Array,
    valid: jax.Array,
    *,
    over_smaller: float = 0.6,
    over_union: float = 0.4,
    min_height: float = 12.0,
    max_patches: int = 64,
) -> Patches:
    """Join grown boxes that show nearly the same pixels, greedily, nearest first.

    A later box joins a patch when their intersection over the smaller exceeds `over_smaller` or
    their IoU exceeds `over_union`; the patch then covers both, and is compared anew. Patches
    shorter than `min_height` pixels are dropped, and all but the nearest `max_patches`.

    Args:
      boxes: [N, 4]. distance: [N]. valid: bool [N].
    """
    boxes, distance, valid = map(jnp.asarray, (boxes, distance, valid))
    n = len(boxes)
    order = jnp.argsort(jnp.where(valid, distance, jnp.inf), stable=True)
    ranked = boxes[order]
    place = jnp.arange(n)

    def overlaps(box, free):
        one = box[None]
        share = box_overlap.over_smaller(one, ranked)[0]
        return free & ((share > over_smaller) | (box_overlap.iou(one, ranked)[0] > over_union))

    def visit(i, state):
        free, merged, members = state

        def unfinished(inner):
            box, free, _ = inner
            return overlaps(box, free).any()

        def join(inner):
            box, free, mine = inner
            more = overlaps(box, free)
            low = jnp.where(more[:, None], ranked[:, :2], jnp.inf).min(0)
            high = jnp.where(more[:, None], ranked[:, 2:], -jnp.inf).max(0)
            box = jnp.concatenate([jnp.minimum(box[:2], low), jnp.maximum(box[2:], high)])
            return box, free & ~more, mine | more

        head = free[i]
        rest = free & (place != i)
        start = (ranked[i], rest & head, (place == i) & head)
        box, left, mine = jax.lax.while_loop(unfinished, join, start)
        free = jnp.where(head, left, free)
        return free, merged.at[i].set(box), members.at[i].set(mine)

    start = (valid[order], ranked, jnp.zeros((n, n), bool))
    _, merged, members = jax.lax.fori_loop(0, n, visit, start)
    kept = members.any(1) & (merged[:, 3] - merged[:, 1] >= min_height)
    kept &= jnp.cumsum(kept) <= max_patches
    back = jnp.argsort(order)
    return Patches(merged[back], kept[back], members[back][:, back])


def bucket_of(boxes, buckets: tuple[int, ...] = BUCKETS):
    """The smallest bucket that holds the longer side of each box [N, 4], else the largest; int."""
    xp = boxes.__array_namespace__()
    side = (boxes[:, 2:] - boxes[:, :2]).max(-1)
    sizes = xp.asarray(np.asarray(buckets))
    # Places past the end are the largest bucket.
    place = (side[:, None] > sizes[None]).sum(-1)
    return sizes[place.clip(0, len(buckets) - 1)]


def letterboxed(boxes: jax.Array) -> jax.Array:
    """Boxes [N, 4] widened to squares about their centers, so that a crop keeps its aspect."""
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).max(-1, keepdims=True) / 2
    return jnp.concatenate([center - half, center + half], axis=-1)


@functools.partial(jax.jit, static_argnames=("size",))
def crop_and_resize(image: jax.Array, boxes: jax.Array, size: int) -> jax.Array:
    """Crops [N, S, S, C] in 0..1 of one image [H, W, C], uint8 or float.

    Bilinear, half-pixel centers, no antialiasing; samples are clamped to the image.

    Args:
      boxes: x1 y1 x2 y2 [N, 4] in pixel edges: pixel i covers [i, i + 1].
    """
    height, width, channels = image.shape
    boxes = jnp.asarray(boxes, jnp.float32)
    share = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size

    def sample(low, high, limit):
        at = low[:, None] + share * (high - low)[:, None] - 0.5
        at = jnp.clip(at, 0, limit - 1)
        floor = jnp.floor(at)
        first = floor.astype(jnp.int32)
        return first, jnp.minimum(first + 1, limit - 1), at - floor

    x0, x1, fx = sample(boxes[:, 0], boxes[:, 2], width)
    y0, y1, fy = sample(boxes[:, 1], boxes[:, 3], height)
    pixels = image.reshape(height * width, channels)

    def gather(y, x):
        return pixels[y[:, :, None] * width + x[:, None, :]].astype(jnp.float32)

    fx, fy = fx[:, None, :, None], fy[:, :, None, None]
    upper = gather(y0, x0) * (1 - fx) + gather(y0, x1) * fx
    lower = gather(y1, x0) * (1 - fx) + gather(y1, x1) * fx
    crops = upper * (1 - fy) + lower * fy
    return crops / 255 if image.dtype == jnp.uint8 else crops
