"""Axial slices of the MNI152 template: gray and white matter from T1, lower half to upper half.

Unlike the slabs of `brain_template.write_challenge`, the whole scan is one case with one z-score.
Training patches are flat cuts of slices of the lower half of the head, a third of them around a
pixel of a class drawn evenly (nnU-Net's oversampling); evaluation cuts the slices of the upper half
into tiles of the same size, and the report slides over that half as a whole. Networks with instance
norms must see tiles: whole slices have other statistics than the patches they were trained on.
Slices without tissue are left out. Volumes come with the package nilearn: install
it, or name its wheel in `data.options.wheel`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxmodels.biomedical import preprocessing
from jaxmodels.biomedical.metrics import dice
from jaxmodels.biomedical.patches import OVERSAMPLE, class_locations, cut, patch_start
from jaxmodels.biomedical.preprocessing import Geometry
from jaxmodels.biomedical.sliding_window import window_starts
from train.data import brain_template
from train.naming import ConfigError

OPTIONS: dict[str, Any] = {
    "wheel": "",  # nilearn's, where it is not installed
    "step": 2,  # mm
    "patch_size": 64,
    "oversample": OVERSAMPLE,
}
VARIANTS: dict[str, dict[str, Any]] = {}
SPLITS = ("train", "test")
EXAMPLES = 4096  # draws that count as one pass
_LEAST_TISSUE = 0.02  # of a slice


@dataclasses.dataclass(frozen=True)
class Scan:
    """Slices [z, y, x] with tissue of one half: z-scored T1, raw T1 (0 outside), labels 0..2."""

    image: np.ndarray
    raw: np.ndarray
    label: np.ndarray


@functools.lru_cache(maxsize=4)
def halves(wheel: str, step: int) -> dict[str, Scan]:
    """`train` (lower) and `test` (upper) slices of the one standardized scan."""
    t1, label = brain_template.tissue(wheel or None, step)
    image = preprocessing.normalize(t1[..., None], ("zscore",), ())[..., 0]
    middle, found = len(t1) // 2, {}
    for split, part in (("train", slice(0, middle)), ("test", slice(middle, None))):
        kept = (label[part] > 0).mean((1, 2)) >= _LEAST_TISSUE
        found[split] = Scan(image[part][kept], t1[part][kept], label[part][kept])
    return found


def _half(split: str, options: Mapping[str, Any]) -> Scan:
    return halves(str(options["wheel"]), int(options["step"]))[split]


def _size(options: Mapping[str, Any]) -> int:
    size = options["patch_size"]
    if not isinstance(size, int) or size < 8:
        raise ConfigError(f"data.options.patch_size: {size!r} must be a size of at least 8")
    return size


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`image` float32 [S, S, 1] and `label` int32 [S, S]."""
    size = _size(options)
    return {
        "image": jax.ShapeDtypeStruct((size, size, 1), np.float32),
        "label": jax.ShapeDtypeStruct((size, size), np.int32),
    }


@functools.lru_cache(maxsize=4)
def _tiles(wheel: str, step: int, size: int) -> tuple[tuple[int, int, int], ...]:
    """(slice, y, x) of tiles that cover every test slice."""
    shape = halves(wheel, step)["test"].label.shape
    starts = window_starts(shape[1:], (size, size), 1.0)
    return tuple((z, y, x) for z in range(shape[0]) for y in starts[0] for x in starts[1])


@functools.lru_cache(maxsize=4)
def _places(wheel: str, step: int) -> dict[int, np.ndarray]:
    """Pixels [N, 3] of every class of the training half."""
    label = halves(wheel, step)["train"].label
    return class_locations(label, (1, 2), np.random.default_rng(0), limit=label.size)


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Draws that count as a pass, and the number of test tiles."""
    found = _tiles(str(options["wheel"]), int(options["step"]), _size(options))
    return {"train": EXAMPLES, "test": len(found)}


def _example(half: Scan, place, size: int) -> dict[str, np.ndarray]:
    z, start = place[0], place[1:]
    image, shape = half.image[z], (size, size)
    # Beyond the edge is air, the least value of the slice.
    part = cut(image, start, shape, image.min())
    label = cut(half.label[z], start, shape)
    return {"image": part[..., None].astype(np.float32), "label": label.astype(np.int32)}


@dataclasses.dataclass(frozen=True)
class _Slices:
    """Test tiles, or the numbers of training draws."""

    split: str
    count: int
    wheel: str
    step: int
    size: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if self.split == "train":
            return {"index": np.int64(index)}
        place = _tiles(self.wheel, self.step, self.size)[index]
        return _example(halves(self.wheel, self.step)["test"], place, self.size)


def source(split: str, options: Mapping[str, Any]) -> _Slices:
    """Training draws, or the tiles of the upper half.

    Raises DataError where the template is not there.
    """
    count = split_sizes(options)[split]
    return _Slices(split, count, str(options["wheel"]), int(options["step"]), _size(options))


@dataclasses.dataclass(frozen=True)
class _Draw:
    wheel: str
    step: int
    size: int
    oversample: float

    def __call__(self, example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        del example
        half = halves(self.wheel, self.step)["train"]
        shape, places = (self.size, self.size), None
        z = int(rng.integers(len(half.label)))
        if rng.random() < self.oversample:
            found = _places(self.wheel, self.step)[1 + int(rng.integers(2))]
            z, *pixel = found[int(rng.integers(len(found)))]
            places = {1: np.asarray([pixel])}
        start = patch_start(half.label.shape[1:], shape, rng, places)
        return _example(half, (z, *start), self.size)


def train_transform(options: Mapping[str, Any]) -> _Draw:
    """A patch of a random slice of the lower half."""
    where = str(options["wheel"]), int(options["step"])
    return _Draw(*where, _size(options), float(options["oversample"]))


def eval_transform(options: Mapping[str, Any]):
    """Tiles as they are."""
    del options
    return dict


def dataset(options: Mapping[str, Any]) -> dict[str, Any]:
    """Label values of the classes that are scored."""
    del options
    return {"targets": {"gray matter": [1], "white matter": [2]}}


def held_out(options: Mapping[str, Any]):
    """The upper half as one case: (name, image [z, y, x, 1], label [z, y, x], geometry)."""
    half = _half("test", options)
    shape, spacing = half.label.shape, (float(options["step"]),) * 3
    box = tuple((0, n) for n in shape)
    geometry = Geometry((0, 1, 2), shape, spacing, box, spacing, shape)
    yield "upper half", half.image[..., None], half.label, geometry


def baselines(data: Mapping[str, Any]) -> dict[str, float]:
    """Dice of Otsu's two thresholds inside the brain of the test half (which it thereby knows)."""
    from skimage.filters import threshold_multiotsu

    from train.data import pipeline

    half = _half("test", pipeline.resolve(data)[1])
    brain = half.raw > 0
    levels = np.digitize(half.raw, threshold_multiotsu(half.raw[brain], 3))
    found = [dice(half.label == k, brain & (levels == k)) for k in (1, 2)]
    return {
        "multi_otsu_dice": float(np.mean(found)),
        "multi_otsu_dice_1": found[0],
        "multi_otsu_dice_2": found[1],
    }
