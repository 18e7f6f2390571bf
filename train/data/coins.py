"""Coins on a table under bad light: scikit-image's picture, segmented from corrupted patches.

The reference mask is classical (watershed of the Sobel image from two thresholds, holes filled) on
the clean picture. Every patch gets a random linear illumination ramp and noise, in units of the
picture's standard deviation, so that no global threshold serves. Training patches come from the
left half of the picture, test patches from the right.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodels.biomedical.metrics import dice
from train.data import medical_files
from train.naming import ConfigError

OPTIONS: dict[str, Any] = {
    "patch_size": 64,
    "test_size": 128,  # networks are fully convolutional: tests see more of the picture
    "ramp": 1.5,
    "noise": 0.8,
    "repeats": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {}
SPLITS = ("train", "test")
EXAMPLES = 4096  # draws that count as one pass


@functools.cache
def _picture() -> tuple[np.ndarray, np.ndarray]:
    """Standardized picture float32 [H, W] and its reference mask."""
    from scipy.ndimage import binary_fill_holes
    from skimage import data, filters, segmentation

    raw = data.coins()
    markers = np.zeros(raw.shape, int)
    markers[raw < 30], markers[raw > 150] = 1, 2
    mask = binary_fill_holes(segmentation.watershed(filters.sobel(raw), markers) == 2)
    x = raw.astype(np.float32)
    return (x - x.mean()) / x.std(), mask


def half(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Left half (train) or right half (test) of the standardized picture and the mask."""
    image, mask = _picture()
    middle = image.shape[1] // 2
    columns = slice(0, middle) if split == "train" else slice(middle, None)
    return image[:, columns], mask[:, columns]


def corrupt(
    image: np.ndarray, rng: np.random.Generator, ramp: float = 1.5, noise: float = 0.8
) -> np.ndarray:
    """A linear ramp of random direction, from `-ramp` to `ramp`, and Gaussian noise, [H, W]."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape), indexing="ij")
    slope = ramp * (math.cos(angle) * x + math.sin(angle) * y)
    return (image + slope + noise * rng.normal(size=image.shape)).astype(np.float32)


def _size(options: Mapping[str, Any], key: str = "patch_size") -> int:
    size = options[key]
    if not isinstance(size, int) or not 8 <= size <= 192:
        raise ConfigError(f"data.options.{key}: {size!r} must be a size from 8 to 192")
    return size


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`image` float32 [S, S, 1] and `label` int32 [S, S]."""
    return _spec(_size(options))


def eval_element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The same at the size of test patches."""
    return _spec(_size(options, "test_size"))


def _spec(size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "image": jax.ShapeDtypeStruct((size, size, 1), np.float32),
        "label": jax.ShapeDtypeStruct((size, size), np.int32),
    }


def _test_places(options: Mapping[str, Any]) -> list[tuple[int, int]]:
    size, (height, width) = _size(options, "test_size"), half("test")[0].shape
    return [
        (y, x) for y in range(0, height - size + 1, size) for x in range(0, width - size + 1, size)
    ]


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Draws that count as a pass; test patches times the repeats with other light and noise."""
    return {"train": EXAMPLES, "test": len(_test_places(options)) * int(options["repeats"])}


@dataclasses.dataclass(frozen=True)
class _Patches:
    """Test patches, or the numbers of training draws."""

    split: str
    count: int
    size: int
    places: tuple[tuple[int, int], ...]
    ramp: float
    noise: float

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if self.split == "train":
            return {"index": np.int64(index)}
        image, mask = half("test")
        y, x = self.places[index % len(self.places)]
        box = (slice(y, y + self.size), slice(x, x + self.size))
        rng = np.random.default_rng((11, index))
        return _example(corrupt(image[box], rng, self.ramp, self.noise), mask[box])


def _example(image: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    return {"image": image[..., None], "label": mask.astype(np.int32)}


def source(split: str, options: Mapping[str, Any]) -> _Patches:
    """Training draws, or the corrupted test patches."""
    return _Patches(
        split,
        split_sizes(options)[split],
        _size(options, "test_size"),
        tuple(_test_places(options)),
        float(options["ramp"]),
        float(options["noise"]),
    )


@dataclasses.dataclass(frozen=True)
class _Draw:
    size: int
    ramp: float
    noise: float

    def __call__(self, example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        del example
        image, mask = half("train")
        y, x = (int(rng.integers(0, n - self.size + 1)) for n in image.shape)
        box = (slice(y, y + self.size), slice(x, x + self.size))
        return _example(corrupt(image[box], rng, self.ramp, self.noise), mask[box])


def train_transform(options: Mapping[str, Any]) -> _Draw:
    """A corrupted patch of the left half."""
    return _Draw(_size(options), float(options["ramp"]), float(options["noise"]))


def eval_transform(options: Mapping[str, Any]):
    """Test patches as they are."""
    del options
    return dict


def baselines(data: Mapping[str, Any]) -> dict[str, float]:
    """Pooled Dice of Otsu, Otsu after smoothing, and a local threshold, on the test patches."""
    from skimage import filters

    from train.data import pipeline

    _, options = pipeline.resolve(data)
    patches = source("test", options)

    def otsu(x):
        return x > filters.threshold_otsu(x)

    def smooth(x):
        return filters.gaussian(x, 2)

    methods = {
        "otsu": otsu,
        "smoothed_otsu": lambda x: otsu(smooth(x)),
        "local_threshold": lambda x: smooth(x) > filters.threshold_local(smooth(x), 101),
    }
    rows = [patches[i] for i in range(len(patches))]
    labels = np.stack([r["label"] > 0 for r in rows])
    return {
        f"{name}_dice": dice(labels, np.stack([method(r["image"][..., 0]) for r in rows]))
        for name, method in methods.items()
    }


def write_challenge(
    root: str | Path, *, train: int = 20, test: int = 12, size: int = 96, seed: int = 0
) -> None:
    """A raw challenge folder of corrupted crops: training cases left, test cases right.

    Crops overlap within a half; a case's light and noise are its own.
    """
    root = Path(root)
    for split, count in (("test", test), ("train", train)):
        rng = np.random.default_rng((seed, count, len(split)))
        image, mask = half(split)
        cases = []
        for number in range(count):
            y, x = (int(rng.integers(0, n - size + 1)) for n in image.shape)
            box = (slice(y, y + size), slice(x, x + size))
            case = (corrupt(image[box], rng)[..., None], mask[box].astype(np.uint8))
            cases.append((f"coins{number:03d}", *case, (1.0, 1.0)))
        medical_files.write_dataset(
            root,
            cases,
            channels=("light",),
            labels={"background": 0, "coin": 1},
            split="Tr" if split == "train" else "Ts",
        )
