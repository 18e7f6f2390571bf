"""A small anchor-free one-stage detector, its training loss, and objectives that attack it.

Z. Tian et al., "FCOS", arXiv 1904.01355; Z. Ge et al., "YOLOX", arXiv 2107.08430 (decoupled
objectness, class and box outputs at strides 8 and 16).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels.layers.convolution import Conv
from jaxmodels.layers.normalization import BatchNorm
from jaxmodels.security.tiny_conv import ACTIVATIONS
from jaxmodels.vision.images import check_images

STRIDES = (8, 16)
CLASSES = ("vehicle", "sign")
# Boxes whose longer side reaches this many pixels belong to the coarser level.
_LEVEL_BORDER = 28.0
_PRIOR = 0.02
OBJECTIVES = ("hide", "vanish", "appear", "mislocalize")


class Predictions(NamedTuple):
    """P predictions an image: `objectness` logits [B, P], `classes` logits [B, P, C], `boxes`
    [B, P, 4] in pixels (x0, y0, x1, y1)."""

    objectness: jax.Array
    classes: jax.Array
    boxes: jax.Array

    def confidence(self) -> jax.Array:
        """Objectness times class probability [B, P, C]."""
        return nn.sigmoid(self.objectness)[..., None] * nn.sigmoid(self.classes)


class VehicleDetector(nn.Module):
    """Images [B, H, W, 3] in [0, 1], sides multiples of 16 -> `Predictions`.

    Attributes:
      width: channels of the first stage, doubled at each of the next three. act: the activation.
    """

    width: int = 12
    act: str = "silu"
    classes: int = len(CLASSES)
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, 64, 96, 3]."""
        return (jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32),)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> Predictions:
        check_images(x)
        if x.shape[1] % STRIDES[-1] or x.shape[2] % STRIDES[-1]:
            raise ValueError(
                f"detector images need sides that are multiples of {STRIDES[-1]}, got "
                f"{x.shape[1]}x{x.shape[2]}"
            )
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        act = ACTIVATIONS[self.act]

        def unit(y, features, stride, name):
            y = Conv(features, 3, stride, name=f"{name}.conv", **types)(y)
            bn = BatchNorm(axis_name=self.bn_axis_name, name=f"{name}.bn", **types)
            return act(bn(y, train))

        x = 2 * x - 1
        maps = []
        for stage in range(4):
            features = self.width * 2 ** min(stage, 3)
            x = unit(x, features, 2, f"stage{stage}.0")
            x = unit(x, features, 1, f"stage{stage}.1")
            if stage >= 2:
                maps.append(x)
        parts = []
        for level, (y, stride) in enumerate(zip(maps, STRIDES)):
            y = unit(y, 2 * self.width, 1, f"head{level}")
            bias = nn.initializers.constant(float(np.log(_PRIOR / (1 - _PRIOR))))
            outputs = dict(use_bias=True, **types)
            objectness = Conv(1, bias_init=bias, name=f"objectness{level}", **outputs)(y)
            classes = Conv(self.classes, name=f"classes{level}", **outputs)(y)
            sides = Conv(4, name=f"boxes{level}", **outputs)(y)
            # Distances to the four sides, at least a fraction of a pixel and never infinite.
            sides = 1.5 * stride * jnp.exp(jnp.clip(sides.astype(jnp.float32), -6, 4))
            centers = cell_centers(y.shape[1], y.shape[2], stride)
            boxes = jnp.concatenate([centers - sides[..., :2], centers + sides[..., 2:]], -1)
            flat = lambda z: z.reshape(z.shape[0], -1, z.shape[-1])  # noqa: E731
            parts.append((flat(objectness)[..., 0], flat(classes), flat(boxes)))
        return Predictions(*(jnp.concatenate(p, 1).astype(jnp.float32) for p in zip(*parts)))


MODEL = VehicleDetector


def cell_centers(rows: int, columns: int, stride: int) -> jax.Array:
    """Pixel (x, y) of every cell's center [rows, columns, 2]."""
    x, y = ((jnp.arange(n) + 0.5) * stride for n in (columns, rows))
    return jnp.stack(jnp.meshgrid(x, y), -1)


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union of boxes [..., 4], broadcast; 0 for empty ones."""
    low = jnp.maximum(a[..., :2], b[..., :2])
    high = jnp.minimum(a[..., 2:], b[..., 2:])
    inner = jnp.maximum(high - low, 0).prod(-1)
    area = lambda box: jnp.maximum(box[..., 2:] - box[..., :2], 0).prod(-1)  # noqa: E731
    return inner / jnp.maximum(area(a) + area(b) - inner, 1e-6)


def assign(boxes: jax.Array, present: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Which object each prediction is for: int [B, P], -1 for background.

    A cell belongs to the object in whose middle half (in both axes, at least one cell wide) its
    center lies, on the level for the object's size. boxes [B, N, 4], present bool [B, N].
    """
    owners = []
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    extent = boxes[..., 2:] - boxes[..., :2]
    coarse = extent.max(-1) >= _LEVEL_BORDER
    for level, stride in enumerate(STRIDES):
        centers = cell_centers(size[0] // stride, size[1] // stride, stride).reshape(-1, 2)
        reach = jnp.maximum(extent / 4, 0.5 * stride + 1e-3)
        near = jnp.abs(centers[None, :, None] - middle[:, None]) <= reach[:, None]
        own = near.all(-1) & (present & (coarse == (level == 1)))[:, None]
        owners.append(jnp.where(own.any(-1), own.argmax(-1), -1))
    return jnp.concatenate(owners, 1)


def detection_loss(
    found: Predictions,
    boxes: jax.Array,
    labels: jax.Array,
    present: jax.Array,
    size: tuple[int, int],
) -> dict[str, jax.Array]:
    """Focal objectness, class cross-entropy and 1 - IoU of the cells that own an object; scalars.

    boxes [B, N, 4], labels int [B, N], present bool [B, N], size (H, W) of the images.
    """
    owner = assign(boxes, present, size)
    positive = owner >= 0
    index = jnp.maximum(owner, 0)
    target = jnp.take_along_axis(boxes, index[..., None], axis=1)
    label = jnp.take_along_axis(labels, index, axis=1)
    count = jnp.maximum(positive.sum(), 1)
    focal = optax.sigmoid_focal_loss(
        found.objectness, positive.astype(jnp.float32), alpha=0.5, gamma=1.0
    )
    one_hot = jax.nn.one_hot(label, found.classes.shape[-1])
    kind = optax.sigmoid_binary_cross_entropy(found.classes, one_hot).sum(-1)
    overlap = iou(found.boxes, target)
    scale = jnp.asarray([size[1], size[0], size[1], size[0]], jnp.float32)
    away = jnp.abs(found.boxes - target).sum(-1) / scale.mean()
    losses = {
        "objectness": 2 * focal.sum() / count,
        "class": (kind * positive).sum() / count,
        # The absolute distance teaches boxes that do not overlap their object yet.
        "box": ((1 - overlap + away) * positive).sum() / count,
    }
    return losses


def detected(
    found: Predictions,
    boxes: jax.Array,
    kind: int = 0,
    confidence: float = 0.5,
    overlap: float = 0.5,
) -> jax.Array:
    """Bool [B]: a prediction of class `kind` is this sure and overlaps boxes [B, 4] this much."""
    sure = found.confidence()[..., kind] >= confidence
    return (sure & (iou(found.boxes, boxes[:, None]) >= overlap)).any(-1)


def attack_objective(
    found: Predictions, boxes: jax.Array, objective: str = "hide", kind: int = 0
) -> jax.Array:
    """What an attacker lowers, [B], for target boxes [B, 4].

    `hide`: logsumexp of the log-confidences of predictions that overlap the box by more than 0.3;
    `vanish`: the sum of their -log(1 - confidence);
    `appear`: minus the largest objectness of class `kind` whose center lies in the box;
    `mislocalize`: the confidence-weighted IoU with the box.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r}; known: {', '.join(OBJECTIVES)}")
    overlap = iou(found.boxes, boxes[:, None])
    log_sure = nn.log_sigmoid(found.objectness) + nn.log_sigmoid(found.classes[..., kind])
    inside = jax.lax.stop_gradient(overlap) > 0.3
    if objective == "hide":
        return jax.nn.logsumexp(jnp.where(inside, log_sure, -20.0), axis=-1)
    if objective == "vanish":
        # Cross-entropy of "nothing here": its slope is the confidence, where that of `hide` is what
        # is missing to 1. What the detector is sure of pulls, what is hidden already does not.
        nothing = jax.nn.log1mexp(jnp.maximum(-log_sure, 1e-20))
        return -jnp.where(inside, nothing, 0.0).sum(-1)
    if objective == "appear":
        middle = (found.boxes[..., :2] + found.boxes[..., 2:]) / 2
        within = ((middle > boxes[:, None, :2]) & (middle < boxes[:, None, 2:])).all(-1)
        return -jnp.where(within, log_sure, -20.0).max(-1)
    sure = found.confidence()[..., kind]
    weight = sure / jnp.maximum(sure.sum(-1, keepdims=True), 1e-6)
    return (weight * overlap).sum(-1)
