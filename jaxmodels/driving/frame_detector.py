"""Full-frame detector: a YOLOv3-style head over the patch classifier's backbone.

J. Redmon, A. Farhadi, "YOLOv3: An Incremental Improvement", arXiv 1804.02767: three anchors at
each of the strides 8, 16, 32, finer maps seeing upsampled coarser ones. It is the baseline "camera
inference only" and the safety net that finds what LiDAR clusters miss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels.driving import box_overlap
from jaxmodels.driving.patch_classifier import CLASSES, ConvNorm, ResNet, check_resnet, standardize
from jaxmodels.layers.convolution import Conv
from jaxmodels.vision.images import check_images

STRIDES = (8, 16, 32)
# YOLOv3's anchors at 416 px, width and height, three a stride.
ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
DETECTED = CLASSES[:-1]  # background is no class of a detector
SIZES = (320, 416, 608)
_IGNORE_IOU = 0.5
_PRIOR = -4.6  # logit of 1 %: fresh detectors see nothing, as few cells hold an object
_LARGEST_LOG = 30.0  # the area of such a box is still a float32


def decode(
    raw: jax.Array, anchors: jax.Array, stride: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Boxes of one head, in (anchor, row, column) order.

    `b = ((sigmoid(t_xy) + cell) stride, anchor exp(t_wh))`.

    Args:
      raw: [B, H, W, A (5 + C)], per anchor x y w h objectness classes.
      anchors: pixels [A, 2].

    Returns: boxes x1 y1 x2 y2 [B, A H W, 4], scores objectness * class [B, A H W, C] and
      objectness [B, A H W].
    """
    batch, height, width, channels = raw.shape
    count = len(anchors)
    raw = raw.reshape(batch, height, width, count, channels // count)
    raw = raw.transpose(0, 3, 1, 2, 4)
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]
    x = (jax.nn.sigmoid(raw[..., 0]) + columns) * stride
    y = (jax.nn.sigmoid(raw[..., 1]) + rows) * stride
    anchors = jnp.asarray(anchors, raw.dtype)[None, :, None, None]
    half = anchors * jnp.exp(jnp.minimum(raw[..., 2:4], _LARGEST_LOG)) / 2
    center = jnp.stack([x, y], axis=-1)
    boxes = jnp.concatenate([center - half, center + half], axis=-1)
    objectness = jax.nn.sigmoid(raw[..., 4])
    scores = objectness[..., None] * jax.nn.sigmoid(raw[..., 5:])
    total = count * height * width
    return (
        boxes.reshape(batch, total, 4),
        scores.reshape(batch, total, -1),
        objectness.reshape(batch, total),
    )


class FrameDetector(nn.Module):
    """Images [B, H, W, 3] in 0..1 -> raw heads, one [B, H / s, W / s, A (5 + C)] for each stride.

    H and W must be multiples of 32. `anchors` are pixels of this image size. `bn_axis_name`
    synchronizes BatchNorm over a mapped axis (`pmap`).
    """

    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    layer_type: str = "basic"
    hidden_act: str = "relu"
    num_labels: int = len(DETECTED)
    anchors: tuple = ANCHORS
    normalize: bool = True
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        check_resnet(self)
        if len(self.hidden_sizes) != 4 or np.shape(self.anchors)[0] != len(STRIDES):
            raise ValueError("a detector needs four stages and anchors for strides 8, 16, 32")
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, 320, 320, 3]."""
        return (jax.ShapeDtypeStruct((1, 320, 320, 3), jnp.float32),)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        check_images(x)
        if x.shape[1] % STRIDES[-1] or x.shape[2] % STRIDES[-1]:
            raise ValueError(f"image sides must be multiples of 32, got {x.shape[1:3]}")
        if self.normalize:
            x = standardize(x)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = dict(bn_axis_name=self.bn_axis_name, **types)
        maps = ResNet(
            self.embedding_size,
            tuple(self.hidden_sizes),
            tuple(self.depths),
            self.layer_type,
            self.hidden_act,
            name="resnet",
            **norm,
        )(x, train)[2:]
        heads, coarser = [], None
        for level in reversed(range(len(STRIDES))):
            y = maps[level]
            width = self.hidden_sizes[level + 1]
            if coarser is not None:
                up = ConvNorm(width // 2, 1, name=f"neck.{level}.reduce", **norm)(coarser, train)
                up = up.repeat(2, axis=1).repeat(2, axis=2)
                y = jnp.concatenate([y, up], axis=-1)
            y = ConvNorm(width, 1, name=f"neck.{level}.mix", **norm)(y, train)
            y = coarser = ConvNorm(width, 3, name=f"neck.{level}.conv", **norm)(y, train)
            count = len(self.anchors[level])
            outputs = count * (5 + self.num_labels)
            raw = Conv(outputs, 1, use_bias=True, name=f"head.{level}", **types)(y)
            prior = np.zeros((count, 5 + self.num_labels), np.float32)
            prior[:, 4] = _PRIOR
            heads.append(raw + jnp.asarray(prior.reshape(-1), raw.dtype))
        return tuple(reversed(heads))


MODEL = FrameDetector

VARIANTS: dict[str, dict[str, Any]] = {
    "detector_resnet18": {},
    "detector_tiny": {
        "embedding_size": 16,
        "hidden_sizes": (16, 32, 64, 128),
        "depths": (1, 1, 1, 1),
    },
}


class Candidates(NamedTuple):
    """Detections of a frame in rows of a fixed number, by descending score.

    boxes: [N, 4] pixels of the network's input. scores: [N]. classes: int32 [N]. valid: bool [N].
    """

    boxes: jax.Array
    scores: jax.Array
    classes: jax.Array
    valid: jax.Array


def candidates(
    heads: tuple[jax.Array, ...],
    anchors: Any,
    *,
    max_candidates: int = 256,
    min_score: float = 0.05,
    iou_threshold: float = 0.5,
) -> Candidates:
    """Decoded, suppressed detections of one image (the first of the batch); `vmap` for more."""
    parts = [decode(raw, np.asarray(a), s) for raw, a, s in zip(heads, anchors, STRIDES)]
    boxes = jnp.concatenate([p[0][0] for p in parts])
    scores = jnp.concatenate([p[1][0] for p in parts])
    best, classes = scores.max(-1), scores.argmax(-1).astype(jnp.int32)
    best, rows = jax.lax.top_k(best, min(max_candidates, len(best)))
    boxes, classes = boxes[rows], classes[rows]
    valid = best >= min_score
    kept = box_overlap.suppress(boxes, best, iou_threshold, classes, valid)
    return Candidates(boxes, best, classes, kept)


def detection_loss(
    heads: tuple[jax.Array, ...],
    boxes: jax.Array,
    classes: jax.Array,
    mask: jax.Array,
    anchors: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """YOLOv3's loss, mean over images; see arXiv 1804.02767, section 2.

    Each object belongs to the anchor (of all nine) whose shape fits best and to the cell of its
    center there: squared error of the center's offset and of the log size (weighted 2 - relative
    area), binary cross-entropy of its class and of the objectness. Predictions that overlap some
    object by more than 0.5 without owning one are left out of the objectness.

    Args:
      boxes: [B, N, 4] pixels of the input. classes: int [B, N]. mask: bool [B, N].
    """
    boxes, classes, mask = map(jnp.asarray, (boxes, classes, mask))
    sizes = boxes[..., 2:] - boxes[..., :2]
    center = (boxes[..., :2] + boxes[..., 2:]) / 2
    mask = mask & (sizes > 0).all(-1)
    flat = np.concatenate([np.asarray(a, np.float32) for a in anchors])
    common = jnp.minimum(sizes[:, :, None], flat).prod(-1)
    shape_iou = common / (sizes.prod(-1)[:, :, None] + flat.prod(-1) - common + 1e-9)
    owner = shape_iou.argmax(-1)
    image_area = float(heads[0].shape[1] * heads[0].shape[2] * STRIDES[0] ** 2)
    total = {"center": 0.0, "size": 0.0, "objectness": 0.0, "class": 0.0}
    first = 0
    rows = jnp.arange(len(boxes))[:, None]
    for raw, own_anchors, stride in zip(heads, anchors, STRIDES):
        own = jnp.asarray(own_anchors, jnp.float32)
        batch, height, width, _ = raw.shape
        raw = raw.astype(jnp.float32)
        grid = raw.reshape(batch, height, width, len(own), -1)
        predicted = jax.lax.stop_gradient(decode(raw, own, stride)[0])
        mine = mask & (owner >= first) & (owner < first + len(own))
        anchor = jnp.clip(owner - first, 0, len(own) - 1)
        cell = jnp.floor(center / stride).astype(jnp.int32)
        column = jnp.clip(cell[..., 0], 0, width - 1)
        row = jnp.clip(cell[..., 1], 0, height - 1)
        at = grid[rows, row, column, anchor]  # [B, N, 5 + C]
        weight = mine.astype(jnp.float32)
        offset = center / stride - jnp.stack([column, row], axis=-1)
        scale = jnp.log(jnp.maximum(sizes, 1e-3) / own[anchor])
        area_weight = weight * (2 - sizes.prod(-1) / image_area)
        center_error = jnp.square(jax.nn.sigmoid(at[..., :2]) - offset).sum(-1)
        size_error = jnp.square(at[..., 2:4] - scale).sum(-1)
        total["center"] += (area_weight * center_error).sum()
        total["size"] += (area_weight * size_error).sum() / 2
        one_hot = jax.nn.one_hot(classes, at.shape[-1] - 5)
        class_error = optax.sigmoid_binary_cross_entropy(at[..., 5:], one_hot).sum(-1)
        total["class"] += (weight * class_error).sum()

        overlap = jax.vmap(box_overlap.iou)(predicted, boxes)
        overlap = jnp.where(mask[:, None], overlap, 0).max(-1)
        overlap = overlap.reshape(batch, len(own), height, width).transpose(0, 2, 3, 1)
        # Padding rows write past the grid and are dropped.
        place = jnp.where(mine, row, height)
        owned = jnp.zeros((batch, height, width, len(own)), bool)
        owned = owned.at[rows, place, column, anchor].set(True, mode="drop")
        counts = owned | (overlap <= _IGNORE_IOU)
        error = optax.sigmoid_binary_cross_entropy(grid[..., 4], owned.astype(jnp.float32))
        total["objectness"] += (error * counts).sum()
        first += len(own)
    terms = {name: value / len(boxes) for name, value in total.items()}
    return sum(terms.values()), terms


def resize_image(image: jax.Array, size: int) -> jax.Array:
    """An image [H, W, 3], uint8 or in 0..1, as the detector takes it: [size, size, 3] in 0..1."""
    scaled = image.astype(jnp.float32)
    scaled = scaled / 255 if image.dtype == jnp.uint8 else scaled
    return jax.image.resize(scaled, (size, size, image.shape[2]), "linear", antialias=True)
