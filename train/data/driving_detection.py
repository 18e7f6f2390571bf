"""Whole camera images with the boxes of their objects, for the full-frame detector."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxmodels.driving.frame import Frame
from jaxmodels.driving.patch_classifier import BACKGROUND
from train.data import driving_frames

OPTIONS: dict[str, Any] = {
    **driving_frames.OPTIONS,
    "image_size": 320,
    "max_boxes": 32,
    "shift": 0.2,
    "color": 0.3,
    "threads": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "waymo": {"source": "waymo", "image_size": 416, "max_boxes": 64},
    "kitti": {"source": "kitti", "image_size": 416},
    "nuscenes": {"source": "nuscenes", "image_size": 416},
    "npz": {"source": "npz"},
}
SPLITS = driving_frames.SPLITS


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`image` float32 [S, S, 3] in 0..1; `boxes` [N, 4] in its pixels, `classes`, `present` [N]."""
    size, count = options["image_size"], options["max_boxes"]
    if not isinstance(size, int) or size < 64 or size % 32:
        raise ValueError(f"data.options.image_size must be a multiple of 32, >= 64, not {size!r}")
    return {
        "image": jax.ShapeDtypeStruct((size, size, 3), np.float32),
        "boxes": jax.ShapeDtypeStruct((count, 4), np.float32),
        "classes": jax.ShapeDtypeStruct((count,), np.int32),
        "present": jax.ShapeDtypeStruct((count,), np.float32),
    }


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Number of frames of each split."""
    if options["source"] == "simulated":
        return {split: options[f"{split}_frames"] for split in SPLITS}
    return {split: len(source(split, options)) for split in SPLITS}


@dataclasses.dataclass(frozen=True)
class FrameSource:
    """Frames as dictionaries of an image and its labels."""

    frames: Any

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> dict[str, Any]:
        frame: Frame = self.frames[index]
        kept = frame.labels2d.classes != BACKGROUND
        return {
            "image": frame.image,
            "boxes": frame.labels2d.boxes[kept],
            "classes": frame.labels2d.classes[kept],
        }


def source(split: str, options: Mapping[str, Any]) -> FrameSource:
    """The frames of a split."""
    return _source(split, tuple(sorted(options.items())))


@functools.lru_cache(maxsize=4)
def _source(split: str, options: tuple) -> FrameSource:
    return FrameSource(driving_frames.frames(dict(options), split))


@dataclasses.dataclass(frozen=True)
class Transform:
    """The image stretched to a square; training cuts, mirrors and recolors it first.

    Attributes:
      shift: largest share cut away on each side. color: largest relative change of brightness.
    """

    image_size: int
    max_boxes: int
    shift: float = 0.0
    color: float = 0.0

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator | None = None):
        image, boxes = example["image"], np.asarray(example["boxes"], np.float32)
        classes = example["classes"]
        height, width = image.shape[:2]
        window = np.asarray([0, 0, width, height], np.float32)
        mirrored = False
        if rng is not None:
            cut = rng.uniform(0, self.shift, 4) * np.asarray([width, height] * 2)
            window = np.round(window + cut * [1, 1, -1, -1]).astype(np.float32)
            mirrored = rng.random() < 0.5
        size = self.image_size
        pixels = Image.fromarray(image).resize(
            (size, size), Image.Resampling.BILINEAR, box=tuple(window.tolist())
        )
        pixels = np.asarray(pixels, np.float32) / 255
        scale = (window[2:] - window[:2]) / size
        moved = (boxes - np.tile(window[:2], 2)) / np.tile(scale, 2)
        area = (moved[:, 2:] - moved[:, :2]).prod(-1)
        moved = np.clip(moved, 0, size)
        shown = (moved[:, 2:] - moved[:, :2]).prod(-1)
        kept = np.flatnonzero(shown > 0.3 * np.maximum(area, 1e-6))
        # Where there is no room for all, the smallest are left out.
        kept = np.sort(kept[np.argsort(-shown[kept], kind="stable")][: self.max_boxes])
        moved = moved[kept]
        if mirrored:
            pixels = pixels[:, ::-1]
            moved = moved[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [size, 0, size, 0]
        if rng is not None:
            pixels = np.clip(pixels * rng.uniform(1 - self.color, 1 + self.color), 0, 1)
        out = {
            "image": np.ascontiguousarray(pixels, np.float32),
            "boxes": np.zeros((self.max_boxes, 4), np.float32),
            "classes": np.zeros(self.max_boxes, np.int32),
            "present": np.zeros(self.max_boxes, np.float32),
        }
        out["boxes"][: len(kept)] = moved
        out["classes"][: len(kept)] = classes[kept]
        out["present"][: len(kept)] = 1
        return out


def train_transform(options: Mapping[str, Any]) -> Transform:
    """The training transform of these options."""
    keys = ("image_size", "max_boxes", "shift", "color")
    return Transform(**{key: options[key] for key in keys})


def eval_transform(options: Mapping[str, Any]) -> Transform:
    """The evaluation transform of these options."""
    return Transform(options["image_size"], options["max_boxes"])
