"""Identities to verify: rendered Latin letters under affine jitter, or folders of aligned faces.

`glyphs`: 52 identities, the letters of Pillow's built-in font, each example turned, scaled, moved,
recolored and noisy; nothing is read from disk. With `held_out` that many of them, spread over the
alphabets, are verified and the others trained, as faces are; without, all are both. `folders`:
`PATH/train/<identity>/*.jpg` and `PATH/test/<identity>/*.jpg`, aligned faces. Pixels are scaled to
[-1, 1].
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import string
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

OPTIONS: dict[str, Any] = {
    "set": "glyphs",
    "image_size": 112,
    "flip": True,
    "held_out": 0,
    "examples": 5200,
    "test_examples": 520,
    "threads": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    # Letters have no mirror images.
    "glyphs": {"set": "glyphs", "flip": False},
    "folders": {"set": "folders"},
}
SPLITS = ("train", "test")
GLYPHS = string.ascii_uppercase + string.ascii_lowercase

_SEEDS = {"train": 1, "test": 2}
_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp")
_MARGIN = 0.18  # of the side, around a letter


def num_classes(options: Mapping[str, Any]) -> int:
    """Number of training identities; for folders these must be there."""
    if options["set"] == "glyphs":
        return len(_letters("train", options["held_out"]))
    return len(_identities(_root(options), "train"))


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`image` float32 [S, S, 3] in [-1, 1], `label` int32 []."""
    if options["set"] not in ("glyphs", "folders"):
        raise ValueError(f"data.options.set {options['set']!r}; known: glyphs, folders")
    if options["set"] == "folders" and options["held_out"]:
        raise ValueError("data.options.held_out is for letters; folders have a test part")
    size = options["image_size"]
    return {
        "image": jax.ShapeDtypeStruct((size, size, 3), np.float32),
        "label": jax.ShapeDtypeStruct((), np.int32),
    }


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Number of examples of each split."""
    if options["set"] == "glyphs":
        return {"train": options["examples"], "test": options["test_examples"]}
    return {split: len(_files(_root(options), split)) for split in SPLITS}


@dataclasses.dataclass(frozen=True)
class GlyphSource:
    """Example i is a picture of `letters[i mod n]`, a function of (split, i, letter); uint8 pixels.

    The label is the letter's place in `letters`.
    """

    split: str
    size: int
    count: int
    letters: tuple[int, ...]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = int(index) % len(self.letters)
        rng = np.random.default_rng((_SEEDS[self.split], int(index)))
        image = draw_glyph(rng, self.letters[label], self.size)
        return {"image": image, "label": np.int32(label)}


def _letters(split: str, held_out: int) -> tuple[int, ...]:
    """The letters of a split. Raises ValueError where one split would have fewer than two."""
    every = range(len(GLYPHS))
    if not held_out:
        return tuple(every)
    if not 2 <= held_out <= len(every) - 2:
        raise ValueError(f"data.options.held_out: {held_out}; 0, or 2 to {len(every) - 2} letters")
    kept = {i * len(every) // held_out for i in range(held_out)}
    return tuple(i for i in every if (i in kept) == (split == "test"))


@functools.lru_cache(maxsize=256)
def _letter(label: int, size: int) -> np.ndarray:
    """Ink of a letter in [0, 1], centered in [size, size]."""
    font = ImageFont.load_default(size=size * (1 - 2 * _MARGIN))
    canvas = Image.new("L", (size, size), 0)
    ImageDraw.Draw(canvas).text(
        (size / 2, size / 2), GLYPHS[label], fill=255, font=font, anchor="mm"
    )
    return np.asarray(canvas, np.float32) / 255


def draw_glyph(rng: np.random.Generator, label: int, size: int) -> np.ndarray:
    """A letter turned +-12 degrees, scaled 0.85-1.15, moved +-6 %, in random colors; uint8."""
    from train.data.image_augmentation import random_affine

    ink = random_affine(
        rng, _letter(label, size), degrees=12.0, scale=(0.85, 1.15), shift=0.06, fill=0.0
    )[..., None]
    paper, color = rng.uniform(0.55, 0.95, 3), rng.uniform(0.05, 0.45, 3)
    image = paper * (1 - ink) + color * ink + rng.normal(0, 0.04, (size, size, 3))
    return (255 * image.clip(0, 1)).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Aligned faces in folders, one an identity; the label is the folder's place in order."""

    files: tuple[tuple[str, int], ...]
    size: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.files[int(index)]
        with Image.open(path) as image:
            pixels = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
            return {"image": np.asarray(pixels), "label": np.int32(label)}


def _root(options: Mapping[str, Any]) -> str:
    if not options["path"]:
        raise FileNotFoundError(
            "data.options.path: give the folder that holds train/<identity>/*.jpg"
        )
    return str(pathlib.Path(options["path"]).expanduser())


@functools.lru_cache(maxsize=8)
def _identities(root: str, split: str) -> tuple[str, ...]:
    folder = pathlib.Path(root) / split
    if not folder.is_dir():
        raise FileNotFoundError(f"data.options.path {root}: no folder {split} of identities there")
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir()))


@functools.lru_cache(maxsize=8)
def _files(root: str, split: str) -> tuple[tuple[str, int], ...]:
    found = []
    for label, name in enumerate(_identities(root, split)):
        folder = pathlib.Path(root) / split / name
        found += [(str(p), label) for p in sorted(folder.iterdir()) if p.suffix.lower() in _ENDINGS]
    return tuple(found)


def source(split: str, options: Mapping[str, Any]) -> GlyphSource | FolderSource:
    """The examples of a split."""
    size = element_spec(options)["image"].shape[0]
    if options["set"] == "glyphs":
        letters = _letters(split, options["held_out"])
        return GlyphSource(split, size, split_sizes(options)[split], letters)
    return FolderSource(_files(_root(options), split), size)


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """A left-right flip at random where asked, then pixels in [-1, 1]."""

    flip: bool

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image = example["image"]
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        return _scaled({**example, "image": image})


def train_transform(options: Mapping[str, Any]) -> TrainTransform:
    """The training transform of these options."""
    return TrainTransform(bool(options["flip"]))


def eval_transform(options: Mapping[str, Any]):
    """Pixels in [-1, 1]."""
    del options
    return _scaled


def _scaled(example: Mapping[str, Any]) -> dict[str, Any]:
    image = np.ascontiguousarray(example["image"], np.float32)
    return {"image": (image / np.float32(255) - 0.5) / np.float32(0.5), "label": example["label"]}


def read_image(path: str | os.PathLike, options: Mapping[str, Any]) -> np.ndarray:
    """One aligned face as evaluation sees it."""
    size = element_spec(options)["image"].shape[0]
    return _scaled(FolderSource(((str(path), 0),), size)[0])["image"]


def pairs(labels: np.ndarray, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(rows [count, 2], same bool [count]): half of one identity, none a picture with itself."""
    rng = np.random.default_rng(seed)
    rows, same = [], []
    by_label = {label: np.flatnonzero(labels == label) for label in np.unique(labels)}
    several = [label for label, where in by_label.items() if len(where) > 1]
    names = list(by_label)
    if not several or len(names) < 2:
        raise ValueError("pairs need two identities, and one with two pictures")
    for i in range(count):
        if i % 2 == 0:
            a, b = rng.choice(by_label[several[rng.integers(len(several))]], 2, replace=False)
        else:
            first, second = rng.choice(len(names), 2, replace=False)
            a, b = rng.choice(by_label[names[first]]), rng.choice(by_label[names[second]])
        rows.append((a, b))
        same.append(i % 2 == 0)
    return np.asarray(rows), np.asarray(same)
