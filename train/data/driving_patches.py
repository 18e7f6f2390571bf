"""Image patches of LiDAR clusters with the class and the box of what they show.

The pipeline's own first half (clustering, projection, merging) runs over every frame of
`driving_frames`; a patch has the class of the label that its unpadded box overlaps by IoU 0.5 or
more, is background below 0.3, and is left out in between. Training adds patches around the labels
themselves, grown as the pipeline grows boxes. Patches are kept with a margin, so that training can
shift and scale its window by up to 15 %.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds

from jaxmodels.driving import box_overlap, image_patches, patch_classifier
from jaxmodels.driving.frame import Frame
from jaxmodels.driving.lidar_objects import PipelineOptions, find_objects, frame_arrays, no_tracks
from jaxmodels.driving.patch_classifier import BACKGROUND, CLASSES
from train.data import array_source, driving_frames, preparation

OPTIONS: dict[str, Any] = {
    **driving_frames.OPTIONS,
    "image_size": 64,
    "label_patches": True,
    "every": 1,
    "jitter": 0.15,
    "color": 0.3,
    "threads": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    # The front camera sees 25 degrees to either side; the published code cuts at 26.
    "waymo": {"source": "waymo", "every": 5, "image_size": 256, "half_angle": 26.0},
    "kitti": {"source": "kitti"},
    "nuscenes": {"source": "nuscenes"},
    "npz": {"source": "npz"},
}
SPLITS = driving_frames.SPLITS
NUM_CLASSES = len(CLASSES)

MARGIN = 0.25  # of a patch, kept on every side
_POSITIVE, _NEGATIVE = 0.5, 0.3
_CLUSTERS, _LABELS = 0, 1


class DrivingPatches(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of patches cut from frames of any source."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Clusters and labels, with a margin of a quarter."}

    def __init__(self, *, options: tuple[tuple[str, Any], ...] = (), **arguments):
        self._options = dict(options)
        super().__init__(**arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        side = stored_size(self._options.get("image_size", OPTIONS["image_size"]))
        scalar = tfds.features.Scalar
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "index": scalar(dtype=np.int32),
                    "image": tfds.features.Tensor(shape=(side, side, 3), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                    "box": tfds.features.Tensor(shape=(4,), dtype=np.float32),
                    "origin": scalar(dtype=np.int32),
                    "frame": scalar(dtype=np.int32),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        options = self._options
        found = driving_frames.frames(options, split)
        count = 0
        for number in range(0, len(found), options["every"]):
            frame = found[number]
            labels = split == "train" and options["label_patches"]
            for patch in patches_of(frame, options["image_size"], labels=labels):
                yield count, {**patch, "index": count, "frame": number}
                count += 1


def stored_size(image_size: int) -> int:
    """Side of a stored patch with its margin."""
    return round(image_size * (1 + 2 * MARGIN))


def patches_of(frame: Frame, image_size: int, *, labels: bool) -> list[dict[str, Any]]:
    """Patches of one frame: uint8 images, classes and boxes in units of the patch (0..1).

    Args:
      labels: also patches around the 2-D labels.
    """
    options = PipelineOptions()
    height, width = frame.image.shape[:2]
    objects = jax.device_get(
        find_objects(
            frame_arrays(frame),
            no_tracks(options),
            options=options,
            wraps=frame.wraps,
            width=width,
            height=height,
        )
    )
    truth = np.asarray(frame.labels2d.boxes, np.float64)
    rows = []
    for i in np.flatnonzero(objects.patches.valid):
        flat = objects.flat.boxes[objects.patches.members[i]]
        own = np.concatenate([flat[:, :2].min(0), flat[:, 2:].max(0)])
        box = objects.patches.boxes[i]
        overlap = box_overlap.iou(own[None].astype(np.float64), truth)[0]
        best = int(overlap.argmax()) if len(truth) else -1
        if best >= 0 and overlap[best] >= _POSITIVE:
            rows.append((box, int(frame.labels2d.classes[best]), truth[best], _CLUSTERS))
        elif best < 0 or overlap[best] < _NEGATIVE:
            rows.append((box, BACKGROUND, box, _CLUSTERS))
    if labels and len(truth):
        grown = np.asarray(image_patches.grow_boxes(truth.astype(np.float32), width, height))
        rows += [
            (grown[i], int(frame.labels2d.classes[i]), truth[i], _LABELS)
            for i in range(len(truth))
            if (grown[i, 2:] - grown[i, :2]).min() > 1
        ]
    if not rows:
        return []
    boxes = np.stack([row[0] for row in rows]).astype(np.float32)
    margin = (boxes[:, 2:] - boxes[:, :2]) * MARGIN
    windows = np.concatenate([boxes[:, :2] - margin, boxes[:, 2:] + margin], axis=-1)
    # A fixed number of rows at a time, so that frames do not recompile.
    size = options.max_patches + driving_frames.MAX_LABELS
    windows = np.concatenate([windows, np.zeros((-len(rows) % size, 4), np.float32)])
    crops = np.concatenate(
        [
            image_patches.crop_and_resize(frame.image, part, stored_size(image_size))
            for part in windows.reshape(-1, size, 4)
        ]
    )
    crops = np.round(crops * 255).astype(np.uint8)
    out = []
    for (box, label, target, origin), crop in zip(rows, crops):
        side = np.tile(box[2:] - box[:2], 2)
        local = (np.asarray(target) - np.tile(box[:2], 2)) / side
        out.append(
            {
                "image": crop,
                "label": label,
                "box": local.astype(np.float32),
                "origin": origin,
            }
        )
    return out


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`image` float32 [S, S, 3] in 0..1, `label` int32 [], `deltas` float32 [4] of the box."""
    size = options["image_size"]
    if not isinstance(size, int) or size < 16:
        raise ValueError(f"data.options.image_size must be an integer >= 16, not {size!r}")
    if options["source"] not in driving_frames.KINDS:
        raise ValueError(
            f"data.options.source {options['source']!r}: known are "
            f"{', '.join(driving_frames.KINDS)}"
        )
    return {
        "image": jax.ShapeDtypeStruct((size, size, 3), np.float32),
        "label": jax.ShapeDtypeStruct((), np.int32),
        "deltas": jax.ShapeDtypeStruct((4,), np.float32),
    }


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Number of patches of each split; prepares them."""
    return {split: len(source(split, options)) for split in SPLITS}


def source(split: str, options: Mapping[str, Any]) -> array_source.ArraySource:
    """Stored patches of a split."""
    element_spec(options)
    driving_frames.check_source(options)
    # What training alone decides is no matter of the stored data.
    left_out = {"jitter", "color", "threads", "workers"}
    if options["source"] == "simulated":  # a front view already
        left_out.add("half_angle")
    kept = {k: v for k, v in options.items() if k not in left_out}
    return _source(split, tuple(sorted(kept.items())))


@functools.lru_cache(maxsize=4)
def _source(split: str, options: tuple) -> array_source.ArraySource:
    chosen = dict(options)
    # Of a data set's files the patches are kept beside them.
    directory = preparation.data_directory(chosen["path"])
    name = "patches_" + "_".join(str(v) for k, v in options if k != "path")
    builder = preparation.prepare(DrivingPatches, str(directory / name), options=options)
    arrays = array_source.read_split(builder, split)
    return array_source.ArraySource({**arrays, "label": arrays["label"].astype(np.int32)})


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """The patch itself, as the pipeline cuts it."""

    image_size: int

    def __call__(self, example: Mapping[str, Any]) -> dict[str, Any]:
        return _cut(example, np.asarray([0.0, 0.0, 1.0, 1.0]), self.image_size)


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """A window shifted and scaled by up to `jitter`, mirrored at random, colors changed.

    Attributes:
      jitter: largest move of every edge, in sides of the patch.
      color: largest relative change of brightness, contrast and saturation.
    """

    image_size: int
    jitter: float
    color: float

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        jitter = min(self.jitter, MARGIN)
        window = np.asarray([0.0, 0.0, 1.0, 1.0]) + rng.uniform(-jitter, jitter, 4)
        cut = _cut(example, window, self.image_size)
        image, deltas = cut["image"], cut["deltas"]
        if rng.random() < 0.5:
            image = image[:, ::-1]
            deltas = deltas * np.float32([-1, 1, 1, 1])
        image = _changed_colors(image, self.color, rng)
        return {**cut, "image": np.ascontiguousarray(image), "deltas": deltas}


def _cut(example: Mapping[str, Any], window: np.ndarray, size: int) -> dict[str, Any]:
    stored = example["image"]
    # Window in the stored picture's pixels: the patch is its inner part.
    scale = stored.shape[0] / (1 + 2 * MARGIN)
    low, high = (window[:2] + MARGIN) * scale, (window[2:] + MARGIN) * scale
    columns = _weights(low[0], high[0], stored.shape[1], size)
    rows = _weights(low[1], high[1], stored.shape[0], size)
    pixels = stored.astype(np.float32) / np.float32(255)
    image = (rows @ pixels.reshape(len(pixels), -1)).reshape(size, -1, 3)
    image = np.matmul(columns, image)
    deltas = patch_classifier.box_deltas(window[None].astype(np.float32), example["box"][None])
    return {
        "image": image,
        "label": np.int32(example["label"]),
        "deltas": np.asarray(deltas, np.float32)[0],
    }


def _weights(low: float, high: float, count: int, size: int) -> np.ndarray:
    """Bilinear weights [size, count] of samples at half-pixel centers, clamped to the edge."""
    at = np.clip(low + (np.arange(size) + 0.5) * (high - low) / size - 0.5, 0, count - 1)
    floor = np.minimum(at.astype(int), count - 2)
    share = (at - floor).astype(np.float32)
    weights = np.zeros((size, count), np.float32)
    weights[np.arange(size), floor] = 1 - share
    weights[np.arange(size), floor + 1] = share
    return weights


def _changed_colors(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    image = image * np.float32(brightness)
    mean = image.mean()
    image = (image - mean) * np.float32(contrast) + mean
    gray = image.mean(-1, keepdims=True)
    return np.clip((image - gray) * np.float32(saturation) + gray, 0, 1)


def train_transform(options: Mapping[str, Any]) -> TrainTransform:
    """The training transform of these options."""
    return TrainTransform(options["image_size"], options["jitter"], options["color"])


def eval_transform(options: Mapping[str, Any]) -> EvalTransform:
    """The evaluation transform of these options."""
    return EvalTransform(options["image_size"])


def baselines(options: Mapping[str, Any]) -> dict[str, float]:
    """Test accuracy of the training set's most frequent class and of the nearest mean color."""
    parts: dict[str, Sequence] = {split: source(split, options).arrays for split in SPLITS}
    train, test = parts["train"], parts["test"]
    counted = train["label"][train["origin"] == _CLUSTERS]
    majority = np.bincount(counted, minlength=NUM_CLASSES).argmax()
    colors = {split: part["image"].mean((1, 2)) for split, part in parts.items()}
    present = np.unique(train["label"])
    means = np.stack([colors["train"][train["label"] == c].mean(0) for c in present])
    apart = ((colors["test"][:, None] - means[None]) ** 2).sum(-1)
    return {
        "majority_class": float((test["label"] == majority).mean()),
        "nearest_mean_color": float((test["label"] == present[apart.argmin(1)]).mean()),
    }
