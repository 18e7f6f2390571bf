"""Single face images in [-1, 1]: what a generator is trained on, and an encoder's first stage.

Kinds (`data.options.kind`): `lfw`, the 100 faces of scikit-image's `lfw_subset` (25x25, gray, three
equal channels, the last 20 for testing); `folder`, images below `path` as FFHQ's PNGs lie there
(`00000/00000.png`, ...; square), of which the last `held_out` share by name is the test split.
Examples hold `image` float32 [S, S, 3].
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train import video_files
from train.data import array_source, face_clips, image_augmentation
from train.naming import ConfigError

OPTIONS: dict[str, Any] = {
    "kind": "lfw",
    "image_size": 32,
    "held_out": 0.02,
    "flip": True,
    "threads": 0,
}
VARIANTS: dict[str, dict[str, Any]] = {"ffhq": {"kind": "folder", "image_size": 1024}}
SPLITS = ("train", "test")
KINDS = ("lfw", "folder")
FACES, TEST_FACES = 100, 20


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`image` float32 [S, S, 3]."""
    if options["kind"] not in KINDS:
        raise ValueError(f"data.options.kind: {options['kind']!r}; known: {', '.join(KINDS)}")
    size = options["image_size"]
    return {"image": jax.ShapeDtypeStruct((size, size, 3), np.float32)}


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Number of images of each split."""
    return {split: len(source(split, options)) for split in SPLITS}


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files, read where they are needed."""

    files: tuple[str, ...]
    size: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        image = video_files.read_image(self.files[index])
        if image.shape[0] != image.shape[1]:
            raise ValueError(
                f"{self.files[index]} is {image.shape[1]}x{image.shape[0]}; aligned faces are "
                "square"
            )
        return {"image": video_files.to_unit(face_clips.resized(image, self.size))}


def source(split: str, options: Mapping[str, Any]) -> Sequence[dict[str, np.ndarray]]:
    """Images of a split. Raises ConfigError for a folder without images."""
    element_spec(options)
    size = options["image_size"]
    if options["kind"] == "lfw":
        return _lfw(split, size)
    path = options["path"]
    if not path or not Path(path).is_dir():
        raise ConfigError(f"data.options.path: no folder of images {path!r}")
    files = sorted(str(p) for p in Path(path).rglob("*") if p.suffix.lower() in video_files.IMAGES)
    if len(files) < 2:
        raise ConfigError(f"data.options.path: {path} holds {len(files)} images; at least 2")
    held = max(1, round(len(files) * options["held_out"]))
    chosen = files[:-held] if split == "train" else files[-held:]
    return Files(tuple(chosen), size)


@functools.lru_cache(maxsize=4)
def _lfw(split: str, size: int) -> array_source.ArraySource:
    file = importlib.resources.files("skimage") / "data" / "lfw_subset.npy"
    with file.open("rb") as stream:
        images = np.load(stream).astype(np.float32)[:FACES]
    images = images[:-TEST_FACES] if split == "train" else images[-TEST_FACES:]
    resized = image_augmentation.bilinear_resize(images, (size, size))
    gray = np.clip(resized * 2 - 1, -1, 1).astype(np.float32)
    return array_source.ArraySource({"image": np.repeat(gray[..., None], 3, -1)})


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Mirror images with probability one half, as StyleGAN2's `mirror` does."""

    flip: bool

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image = example["image"]
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        return {"image": np.ascontiguousarray(image)}


def train_transform(options: Mapping[str, Any]) -> TrainTransform:
    """The training transform of these options."""
    return TrainTransform(bool(options["flip"]))


def eval_transform(options: Mapping[str, Any]):
    """Images as they are."""
    del options
    return dict
