"""The driving systems' own networks as victims: what a picture shows -> `Predictions`.

A full-frame detector (`driving.frame_detector`) finds boxes by itself. A patch classifier
(`driving.patch_classifier`) is told where to look: in the LiDAR-first pipeline paint does not move
the clusters, so that its patches stay where the vehicle is and only their inspection is attacked.
Both know `vehicle` as class 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.driving.frame_detector import STRIDES, decode, resize_image
from jaxmodels.driving.image_patches import crop_and_resize, grow_boxes
from jaxmodels.driving.patch_classifier import BACKGROUND, refine_boxes
from jaxmodels.security.driving_renderer import Rendered
from jaxmodels.security.vehicle_detector import Predictions

Victim = Callable[[Rendered], Predictions]


def frame_victim(module: nn.Module, variables: Any, size: int) -> Victim:
    """All predictions of a `FrameDetector` on images stretched to `size` x `size`, as it is used.

    Boxes are in the images' own pixels.
    """

    def predict(rendered: Rendered) -> Predictions:
        images = rendered.images
        height, width = images.shape[1:3]
        small = jax.vmap(lambda image: resize_image(image, size))(images)
        heads = module.apply(variables, small)
        scale = jnp.asarray([width, height, width, height], jnp.float32) / size
        parts = []
        for raw, anchors, stride in zip(heads, module.anchors, STRIDES):
            raw = raw.astype(jnp.float32)
            boxes = decode(raw, jnp.asarray(anchors, jnp.float32), stride)[0]
            grid = raw.reshape(*raw.shape[:3], len(anchors), -1).transpose(0, 3, 1, 2, 4)
            rows = grid.reshape(len(raw), boxes.shape[1], -1)
            parts.append((rows[..., 4], rows[..., 5:], boxes * scale))
        return Predictions(*(jnp.concatenate(part, 1) for part in zip(*parts)))

    return predict


def patch_victim(module: nn.Module, variables: Any, size: int) -> Victim:
    """What a `PatchClassifier` says of the patch around each vehicle's box, scaled to `size`.

    One prediction an image: its confidence in a class is the classifier's probability, its box the
    patch as refined by the box head, or the cluster's own without one.
    """

    def predict(rendered: Rendered) -> Predictions:
        images, boxes = rendered
        height, width = images.shape[1:3]
        grown = grow_boxes(boxes, width, height)
        crops = jax.vmap(lambda image, box: crop_and_resize(image, box[None], size)[0])(
            images, grown
        )
        outputs = module.apply(variables, crops, method="intermediates")
        logits = outputs["logits"].astype(jnp.float32)
        kinds = logits[:, :BACKGROUND]
        any_kind = jax.nn.logsumexp(kinds, axis=-1)
        found = boxes
        if "deltas" in outputs:
            found = refine_boxes(grown, outputs["deltas"].astype(jnp.float32))
        # Sigmoids whose product is the softmax: an object at all, and then of this kind.
        others = jax.nn.logsumexp(
            jnp.where(jnp.eye(BACKGROUND, dtype=bool), -jnp.inf, kinds[:, None]), axis=-1
        )
        objectness = (any_kind - logits[:, BACKGROUND])[:, None]
        return Predictions(objectness, (kinds - others)[:, None], found[:, None])

    return predict
