"""Scenes of a road: backgrounds cut from photographs, and the numbers that place what stands on it.

The pictures themselves are rendered inside the training step (`jaxmodels.security.
driving_renderer`). An example is a background, poses and colors; whether a vehicle and a sign are
there is drawn with it. Left halves of the photographs train, right halves test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from train.data import forgeries, preparation

OPTIONS: dict[str, Any] = {
    "height": 64,
    "width": 96,
    "examples": 8192,
    "test_examples": 256,
    "texture": 16,  # side of the random textures, enlarged by the renderer
    "threads": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {}
SPLITS = ("train", "test")
_SEEDS = {"train": 11, "test": 12}


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Background, pose of the vehicle and of the sign, textures, presence of both."""
    f = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)  # noqa: E731
    side = options["texture"]
    return {
        "background": f(options["height"], options["width"], 3),
        "gray": f(),
        "vehicle": f(4),  # distance, lateral, yaw, light
        "sign": f(4),
        "paint": f(side, side, 3),
        "board": f(side, side, 3),
        "present": f(2),
    }


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Number of scenes of each split."""
    return {"train": options["examples"], "test": options["test_examples"]}


@dataclasses.dataclass(frozen=True)
class Source:
    """Scene i of a split; everything is drawn by the transform."""

    split: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"split": self.split, "index": int(index)}


def source(split: str, options: Mapping[str, Any]) -> Source:
    """The scenes of a split."""
    return Source(split, split_sizes(options)[split])


def background(rng: np.random.Generator, split: str, options: Mapping[str, Any]) -> np.ndarray:
    """A photograph's crop, resized to the image, float32 [H, W, 3] in [0, 1]."""
    photos = forgeries._halves(str(preparation.data_directory(options["path"])))[split]
    photo = photos[rng.integers(len(photos))]
    height, width = options["height"], options["width"]
    scale = rng.uniform(1.0, min(photo.shape[0] / height, photo.shape[1] / width, 2.5))
    h, w = int(height * scale), int(width * scale)
    top, left = rng.integers(photo.shape[0] - h + 1), rng.integers(photo.shape[1] - w + 1)
    crop = Image.fromarray(np.ascontiguousarray(photo[top : top + h, left : left + w]))
    return np.asarray(crop.resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255


def random_paint(rng: np.random.Generator, side: int) -> np.ndarray:
    """A plain color, stripes, or blocks of random colors, float32 [side, side, 3]."""
    color = rng.uniform(0.05, 0.95, 3)
    kind = rng.integers(4)
    if kind < 2:
        paint = np.broadcast_to(color, (side, side, 3))
    elif kind == 2:
        stripes = (np.arange(side) // max(1, int(rng.integers(1, 6)))) % 2
        other = rng.uniform(0.05, 0.95, 3)
        rows = np.where(stripes[:, None], color, other)[:, None]
        paint = np.broadcast_to(rows, (side, side, 3))
        paint = paint.swapaxes(0, 1) if rng.random() < 0.5 else paint
    else:
        cells = int(rng.choice([2, 4, side // 2, side]))
        blocks = rng.uniform(0, 1, (cells, cells, 3))
        paint = blocks.repeat(-(-side // cells), 0).repeat(-(-side // cells), 1)[:side, :side]
    return (paint + rng.normal(0, 0.02, (side, side, 3))).clip(0, 1).astype(np.float32)


def _scene(rng: np.random.Generator, split: str, options) -> dict[str, Any]:
    def pose(lateral):
        return np.float32(
            [
                rng.uniform(6, 30),
                rng.uniform(-lateral, lateral),
                np.deg2rad(rng.uniform(-10, 10)),
                rng.uniform(0.7, 1.3),
            ]
        )

    side = options["texture"]
    return {
        "background": background(rng, split, options),
        "gray": np.float32(rng.uniform(0.25, 0.5)),
        "vehicle": pose(2.0),
        "sign": pose(0.8),
        "paint": random_paint(rng, side),
        "board": random_paint(rng, side),
        "present": (rng.random(2) < (0.7, 0.4)).astype(np.float32),
    }


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Draws a scene."""

    options: Any

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return _scene(rng, example["split"], dict(self.options))


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Scene i, a function of (split, i) alone."""

    options: Any

    def __call__(self, example: Mapping[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng((_SEEDS[example["split"]], example["index"]))
        return _scene(rng, example["split"], dict(self.options))


def train_transform(options: Mapping[str, Any]) -> TrainTransform:
    """The training transform of these options."""
    return TrainTransform(tuple(sorted(options.items())))


def eval_transform(options: Mapping[str, Any]) -> EvalTransform:
    """The evaluation transform of these options."""
    return EvalTransform(tuple(sorted(options.items())))
