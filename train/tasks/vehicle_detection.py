"""A detector of vehicles and signs, trained on scenes that the step itself renders."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.security import driving_renderer as renderer
from jaxmodels.security.vehicle_detector import CLASSES, detected, detection_loss
from train.building import build_model


@dataclasses.dataclass(frozen=True)
class VehicleDetection:
    """`model(images [B, H, W, 3]) -> Predictions`."""

    model: nn.Module

    def init(self, rng, batch):
        """Parameters and batch statistics."""
        variables = dict(self.model.init(rng, batch["background"][:1]))
        return variables.pop("params"), variables

    def loss(self, params, extra, batch, rng):
        """Sum of the objectness, class and box losses."""
        images, boxes, labels, present = render_scenes(batch, rng)
        found, updated = self.model.apply(
            {"params": params, **extra}, images, train=True, mutable=["batch_stats"]
        )
        losses = detection_loss(found, boxes, labels, present, images.shape[1:3])
        return sum(losses.values()), ({**extra, **updated}, losses)

    def evaluate(self, variables, batch):
        """Recall of both classes at confidence 0.5 and IoU 0.5, false alarms an empty scene."""
        images, boxes, _, present = render_scenes(batch, None)
        found = self.model.apply(variables, images)
        mask = batch["mask"]
        sums = {"count": mask.sum()}
        for i, name in enumerate(CLASSES):
            there = present[:, i] * mask
            hit = detected(found, boxes[:, i], i)
            sums[f"{name}_recall|{name}_count"] = (hit * there).sum()
            sums[f"{name}_count"] = there.sum()
            alarm = (found.confidence()[..., i] >= 0.5).any(-1)
            sums[f"{name}_false_alarm|{name}_absent"] = (alarm * (1 - present[:, i]) * mask).sum()
            sums[f"{name}_absent"] = ((1 - present[:, i]) * mask).sum()
        return sums


def render_scenes(batch, rng=None, noise: float = 0.02):
    """Images [B, H, W, 3], boxes [B, 2, 4], labels [B, 2], present [B, 2] of a batch of scenes."""
    present = batch["present"]
    side = renderer.TEXTURE_SIDE
    images = renderer.road_scene(batch["background"], batch["gray"])

    def enlarged(texture):
        return jax.image.resize(texture, (texture.shape[0], side, side, 3), "nearest")

    sign = renderer.Pose(*batch["sign"].T)
    # Signs are framed in red on white; what they show inside is the board's texture.
    y, x = (np.mgrid[:side, :side] + 0.5) / side - 0.5
    ring = (np.hypot(x, y) < 0.5)[..., None].astype(np.float32)
    inside = (np.hypot(x, y) < 0.36)[..., None].astype(np.float32)
    board = 0.35 * enlarged(batch["board"]) + 0.6
    board = inside * board + (1 - inside) * jnp.asarray([0.8, 0.08, 0.08])
    images, sign_boxes = _where(
        present[:, 1], renderer.paint(images, board, ring, "billboard", sign), images
    )
    vehicle = renderer.Pose(*batch["vehicle"].T)
    rear = renderer.dressed(enlarged(batch["paint"]))
    images, vehicle_boxes = _where(
        present[:, 0], renderer.paint(images, rear, renderer.rear_alpha(), "rear", vehicle), images
    )
    if rng is not None:
        images = images + noise * jax.random.normal(rng, images.shape)
    boxes = jnp.stack([vehicle_boxes, sign_boxes], 1)
    labels = jnp.broadcast_to(jnp.arange(len(CLASSES)), present.shape)
    # What lies mostly outside the picture is not asked for.
    extent = (boxes[..., 2:] - boxes[..., :2]).min(-1)
    return jnp.clip(images, 0, 1), boxes, labels, (present > 0) & (extent > 2.0)


def _where(present, rendered, images):
    keep = present[:, None, None, None] > 0
    return jnp.where(keep, rendered.images, images), rendered.boxes


def from_config(config) -> VehicleDetection:
    """The task of a config: its model and `task_args`."""
    return VehicleDetection(model=build_model(config), **config.task_args)
