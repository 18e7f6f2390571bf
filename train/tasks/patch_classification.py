"""What a patch of the camera image shows, at the sizes the LiDAR-first pipeline cuts patches to.

A batch is divided over `sizes`: each part is scaled to one of them, so that one network serves
every bucket. Smoothed cross-entropy, and smooth L1 on the box where the model has a box head.
Prediction runs the whole pipeline over frames: detections in the order of their danger.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels.driving.depth_clustering import ClusteringOptions
from jaxmodels.driving.patch_classifier import BACKGROUND, CLASSES, refine_boxes
from train.building import build_model
from train.naming import ConfigError

COLUMNS = tuple("file place class score x1 y1 x2 y2 depth rank source finish_ms".split())


@dataclasses.dataclass(frozen=True)
class PatchClassification:
    """`model(image [B, S, S, 3]) -> logits [B, 5]` or (logits, deltas [B, 4]).

    Attributes:
      sizes: to which parts of the batch are scaled; none leaves the data's size.
      box_weight: of the smooth L1 loss of the box.
      pipeline: fields of `PipelineOptions` for prediction.
      detector, detector_model, detector_size: run directory or checkpoint of the full-frame
        detector for prediction, its model's name, its input's side; empty for none.
    """

    model: nn.Module
    label_smoothing: float = 0.1
    sizes: tuple[int, ...] = ()
    box_weight: float = 1.0
    pipeline: tuple[tuple[str, Any], ...] = ()
    detector: str = ""
    detector_model: str = "driving.frame_detector:detector_tiny"
    detector_size: int = 320

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Parameters and batch statistics."""
        variables = self.model.init(rng, batch["image"][:1], train=False)
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def _parts(self, batch):
        """(size, rows of the batch) for each of `sizes`; every device keeps its own rows.

        Raises ValueError when the sizes do not divide the rows.
        """
        rows = len(batch["label"])
        sizes = self.sizes or (batch["image"].shape[1],)
        if rows % len(sizes):
            raise ValueError(
                f"task_args.sizes: {len(sizes)} sizes do not divide a batch of {rows} rows"
            )
        grouped = {k: x.reshape(-1, len(sizes), *x.shape[1:]) for k, x in batch.items()}
        for i, size in enumerate(sizes):
            yield size, {key: x[:, i] for key, x in grouped.items()}

    def loss(self, params, extra, batch, rng):
        """Mean loss over the batch; accuracy and the parts of the loss."""
        del rng  # the order of a batch is random already
        total = {"cross_entropy": 0.0, "box": 0.0, "accuracy": 0.0}
        rows = len(batch["label"])
        for size, part in self._parts(batch):
            image, label = part["image"], part["label"]
            if size != image.shape[1]:
                image = jax.image.resize(image, (len(image), size, size, 3), "linear")
            outputs, updated = self.model.apply(
                {"params": params, **extra},
                image,
                train=True,
                mutable=["batch_stats"],
                method="intermediates",
            )
            extra = {**extra, **updated}
            logits = outputs["logits"].astype(jnp.float32)
            targets = optax.smooth_labels(
                jax.nn.one_hot(label, logits.shape[-1]), self.label_smoothing
            )
            total["cross_entropy"] += optax.softmax_cross_entropy(logits, targets).sum() / rows
            total["accuracy"] += (logits.argmax(-1) == label).sum() / rows
            if "deltas" in outputs:
                found = outputs["deltas"].astype(jnp.float32)
                error = optax.huber_loss(found, part["deltas"]).sum(-1)
                total["box"] += (error * (label != BACKGROUND)).sum() / rows
        loss = total["cross_entropy"] + self.box_weight * total["box"]
        return loss, (extra, total)

    def evaluate(self, variables, batch):
        """Sums of loss, hits (at the data's size and at the smallest of `sizes`) and box IoU."""
        label, mask = batch["label"], batch["mask"]
        outputs = self.model.apply(variables, batch["image"], method="intermediates")
        logits = outputs["logits"].astype(jnp.float32)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        objects = mask * (label != BACKGROUND)
        sums = {
            "loss": (nll * mask).sum(),
            "accuracy": ((logits.argmax(-1) == label) * mask).sum(),
            "object_accuracy|objects": ((logits.argmax(-1) == label) * objects).sum(),
            "objects": objects.sum(),
            "count": mask.sum(),
        }
        if self.sizes and min(self.sizes) != batch["image"].shape[1]:
            least = min(self.sizes)
            small = jax.image.resize(
                batch["image"], (len(label), least, least, 3), "linear", antialias=True
            )
            hits = self.model.apply(variables, small, method="intermediates")["logits"].argmax(-1)
            sums[f"accuracy_{least}px"] = ((hits == label) * mask).sum()
        if "deltas" in outputs:
            unit = jnp.tile(jnp.asarray([[0.0, 0.0, 1.0, 1.0]]), (len(label), 1))
            truth = refine_boxes(unit, batch["deltas"])
            found = refine_boxes(unit, outputs["deltas"].astype(jnp.float32))
            sums["box_iou|objects"] = (_paired_iou(found, truth) * objects).sum()
            sums["patch_iou|objects"] = (_paired_iou(unit, truth) * objects).sum()
        return sums

    def report(self, variables, sums, config):
        """The two baselines to beat."""
        from train.data import driving_patches, pipeline

        _, options = pipeline.resolve(config.data)
        return driving_patches.baselines(options)

    def predict(self, variables, path, config):
        """Detections of every frame (`.npz` files of `driving_frames.save_frame`) below `path`.

        Rows are in the order in which detections became known: file, place, class, score, box in
        pixels, depth in meters, risk rank, source, finish in milliseconds.
        """
        from jaxmodels.driving import lidar_camera

        files = frame_files(path)
        classifier_pipeline = self.build_pipeline(variables, config)
        from train.data import driving_frames

        frames = [driving_frames.load_frame(file) for file in files]
        state = classifier_pipeline.warm_up(frames[0])
        rows = [COLUMNS]
        sources = {
            lidar_camera.FROM_PATCH: "patch",
            lidar_camera.FROM_FRAME: "frame",
            lidar_camera.FROM_LIDAR: "lidar",
        }
        for file, frame in zip(files, frames):
            result, state = classifier_pipeline(frame, state)
            found = result.detections
            for k in range(len(found.classes)):
                unknown = found.classes[k] == lidar_camera.UNKNOWN
                rows.append(
                    (
                        file.name,
                        k,
                        "unknown" if unknown else CLASSES[found.classes[k]],
                        round(float(found.scores[k]), 4),
                        *np.round(found.boxes[k], 1).tolist(),
                        round(float(found.depth[k]), 2),
                        int(found.rank[k]),
                        sources[int(found.source[k])],
                        round(float(found.finish_ms[k]), 2),
                    )
                )
        return rows

    def build_pipeline(self, variables, config):
        """The pipeline with these variables and, where `detector` names one, the detector."""
        del config
        import jaxmodels
        from jaxmodels.driving import lidar_camera
        from jaxmodels.interop import catalog
        from train.checkpoints import load_params

        given = dict(self.pipeline)
        try:
            if "clustering" in given:
                given["clustering"] = ClusteringOptions(**dict(given["clustering"]))
            options = lidar_camera.PipelineOptions(**given)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config.task_args.pipeline: {error}") from None
        detector = None
        if self.detector:
            found = Path(self.detector)
            if found.is_dir():
                module = catalog.find(self.detector_model).build()
                loaded = load_params(found, ema=False)
            else:
                module, loaded = jaxmodels.load(self.detector_model, found)
            detector = lidar_camera.make_detector(module, loaded, self.detector_size)
        return lidar_camera.Pipeline(
            self.model, jax.tree.map(jnp.asarray, variables), options=options, detector=detector
        )


def _paired_iou(a, b):
    low, high = jnp.maximum(a[:, :2], b[:, :2]), jnp.minimum(a[:, 2:], b[:, 2:])
    common = jnp.maximum(high - low, 0).prod(-1)
    size = (a[:, 2:] - a[:, :2]).prod(-1) + (b[:, 2:] - b[:, :2]).prod(-1)
    return common / jnp.maximum(size - common, 1e-9)


def frame_files(path) -> list[Path]:
    path = Path(path)
    files = sorted(path.rglob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"--input {path}: no frames (*.npz)")
    return files


def from_config(config) -> PatchClassification:
    """The task of a config: its model and `task_args`."""
    args = dict(config.task_args)
    pipeline = dict(args.pop("pipeline", {}))
    if "buckets" in pipeline:
        pipeline["buckets"] = tuple(pipeline["buckets"])
    if "sizes" in args:
        args["sizes"] = tuple(args["sizes"])
    return PatchClassification(
        model=build_model(config), pipeline=tuple(sorted(pipeline.items())), **args
    )
