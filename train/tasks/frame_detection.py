"""Detection in whole camera images: the baseline of the LiDAR-first pipeline and its safety net."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from PIL import Image

from jaxmodels.driving import detection_metrics, frame_detector
from jaxmodels.driving.frame_detector import DETECTED
from jaxmodels.driving.lidar_camera import make_detector
from train.building import build_model
from train.data import pipeline
from train.data.image_folder import image_files
from train.parallel import batch_sharding, global_batch


@dataclasses.dataclass(frozen=True)
class FrameDetection:
    """`model(image [B, S, S, 3]) -> raw heads`, trained with YOLOv3's loss.

    Attributes:
      max_candidates: detections kept of an image. min_score: the least score that is kept.
    """

    model: nn.Module
    max_candidates: int = 64
    min_score: float = 0.02

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Parameters and batch statistics."""
        variables = self.model.init(rng, batch["image"][:1], train=False)
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss(self, params, extra, batch, rng):
        """The mean loss of an image and its parts."""
        del rng
        heads, updated = self.model.apply(
            {"params": params, **extra}, batch["image"], train=True, mutable=["batch_stats"]
        )
        loss, terms = frame_detector.detection_loss(
            heads, batch["boxes"], batch["classes"], batch["present"] > 0, self.model.anchors
        )
        return loss, ({**extra, **updated}, terms)

    def measure(self, variables, config, mesh) -> dict[str, float]:
        """The loss of an image, average precision of every class and their mean (mAP)."""
        size = config.eval.batch_size or config.batch_size
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        size = -(-size // parts) * parts
        split = config.eval.split or pipeline.eval_split(config.data)
        rows, everywhere = batch_sharding(mesh), jax.NamedSharding(mesh, jax.P())
        step = jax.jit(self._detect, out_shardings=everywhere)
        found, truth, loss, count, frame = [], [], 0.0, 0.0, 0
        for batch in pipeline.eval_batches(
            config.data,
            split,
            batch_size=size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ):
            # Every process gets the whole answer.
            answer = step(variables, global_batch(batch, rows))
            detected, labels, losses, mask = jax.tree.map(
                lambda x: np.asarray(x.addressable_data(0)), answer
            )
            loss, count = loss + float((losses * mask).sum()), count + float(mask.sum())
            for i in np.flatnonzero(mask > 0):
                kept, own = detected["valid"][i], labels["present"][i] > 0
                found.append(_rows(detected, i, kept, ("boxes", "scores", "classes"), frame))
                truth.append(_rows(labels, i, own, ("boxes", "classes"), frame))
                frame += 1
        numbers = {"loss": loss / max(count, 1.0)}
        return numbers | average_precisions(_joined(found), _joined(truth))

    def _detect(self, variables, batch):
        heads = self.model.apply(variables, batch["image"])

        def one(boxes, classes, present, *maps):
            maps = tuple(m[None] for m in maps)
            loss, _ = frame_detector.detection_loss(
                maps, boxes[None], classes[None], present[None] > 0, self.model.anchors
            )
            found = frame_detector.candidates(
                maps,
                self.model.anchors,
                max_candidates=self.max_candidates,
                min_score=self.min_score,
            )
            return loss, found

        labels = {key: batch[key] for key in ("boxes", "classes", "present")}
        losses, found = jax.vmap(one)(*labels.values(), *heads)
        return found._asdict(), labels, losses, batch["mask"]

    def predict(self, variables, path, config):
        """Detections in every image below `path`: file, class, score and box in its pixels."""
        files = image_files(path)
        _, options = pipeline.resolve(config.data)
        detect = make_detector(self.model, variables, options["image_size"])
        rows = [("file", "class", "score", "x1", "y1", "x2", "y2")]
        for file in files:
            with Image.open(file) as image:
                found = jax.device_get(detect(np.asarray(image.convert("RGB"))))
            for i in np.flatnonzero(found.valid):
                box = np.round(found.boxes[i], 1).tolist()
                score = round(float(found.scores[i]), 4)
                rows.append((str(file), DETECTED[found.classes[i]], score, *box))
        return rows


def average_precisions(
    found: dict[str, np.ndarray], truth: dict[str, np.ndarray]
) -> dict[str, float]:
    """`ap_CLASS` at IoU 0.5, `mAP` over the classes there are, `ap_vehicle_0.7`.

    Args:
      found: `boxes`, `scores`, `classes`, `frames` of all detections, suppressed.
      truth: `boxes`, `classes`, `frames` of all labels.
    """
    numbers: dict[str, float] = {}
    for threshold in (0.5, 0.7):
        matches = detection_metrics.match_detections(
            *(found[key] for key in ("boxes", "scores", "classes", "frames")),
            *(truth[key] for key in ("boxes", "classes", "frames")),
            threshold=threshold,
        )
        table = detection_metrics.class_average_precisions(
            matches, found["scores"], found["classes"], truth["classes"], len(DETECTED)
        )
        present = [c for c in range(len(DETECTED)) if (truth["classes"] == c).any()]
        if threshold == 0.5:
            numbers |= {f"ap_{DETECTED[c]}": float(table[c, 0]) for c in present}
            numbers["mAP"] = float(np.mean(table[present, 0])) if present else 0.0
        elif 0 in present:
            numbers["ap_vehicle_0.7"] = float(table[0, 0])
    return numbers


def _rows(part, i: int, kept: np.ndarray, keys, frame: int) -> dict[str, np.ndarray]:
    rows = {key: part[key][i][kept] for key in keys}
    return {**rows, "frames": np.full(int(kept.sum()), frame)}


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def from_config(config) -> FrameDetection:
    """The task of a config: its model and `task_args`."""
    return FrameDetection(model=build_model(config), **config.task_args)
