"""Axial slices of the MNI152 template: gray and white matter from T1, lower half to upper half.

Unlike the slabs of `brain_template.write_challenge`, the whole scan is one case with one z-score.
Training patches are flat cuts of slices of the lower half of the head, test pictures the slices of
the upper half. Slices without tissue are left out. Volumes come with the package nilearn: install
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
from jaxmodels.biomedical.patches import cut
from train.data import brain_template
from train.naming import ConfigError

OPTIONS: dict[str, Any] = {
    "wheel": "",  # nilearn's, where it is not installed
    "step": 2,  # mm
    "patch_size": 64,
    "test_size": (128, 112),  # whole slices of the template at 2 mm, with a margin
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


def _spec(shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "image": jax.ShapeDtypeStruct((*shape, 1), np.float32),
        "label": jax.ShapeDtypeStruct(shape, np.int32),
    }


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`image` float32 [S, S, 1] and `label` int32 [S, S]."""
    return _spec((_size(options),) * 2)


def eval_element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Whole slices, padded to `test_size`."""
    return _spec(tuple(int(n) for n in options["test_size"]))


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Draws that count as a pass, and the number of test slices."""
    return {"train": EXAMPLES, "test": len(_half("test", options).label)}


@dataclasses.dataclass(frozen=True)
class _Slices:
    """Test slices, or the numbers of training draws."""

    split: str
    count: int
    wheel: str
    step: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if self.split == "train":
            return {"index": np.int64(index)}
        half = halves(self.wheel, self.step)["test"]
        return {"image": half.image[index][..., None], "label": half.label[index].astype(np.int32)}


def source(split: str, options: Mapping[str, Any]) -> _Slices:
    """Training draws, or the slices of the upper half.

    Raises DataError where the template is not there.
    """
    count = EXAMPLES if split == "train" else len(_half(split, options).label)
    _half(split, options)
    return _Slices(split, count, str(options["wheel"]), int(options["step"]))


def _cut(image: np.ndarray, start, shape) -> np.ndarray:
    """A cut whose outside is air, the least value of the slice."""
    return cut(image, start, shape, image.min())


@dataclasses.dataclass(frozen=True)
class _Draw:
    wheel: str
    step: int
    size: int

    def __call__(self, example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        del example
        half = halves(self.wheel, self.step)["train"]
        z = int(rng.integers(len(half.label)))
        label = half.label[z]
        start = [int(rng.integers(0, max(n - self.size, 0) + 1)) for n in label.shape]
        shape = (self.size, self.size)
        return {
            "image": _cut(half.image[z], start, shape)[..., None],
            "label": cut(label, start, shape).astype(np.int32),
        }


def train_transform(options: Mapping[str, Any]) -> _Draw:
    """A patch of a random slice of the lower half."""
    return _Draw(str(options["wheel"]), int(options["step"]), _size(options))


@dataclasses.dataclass(frozen=True)
class _Whole:
    shape: tuple[int, ...]

    def __call__(self, example) -> dict[str, np.ndarray]:
        image, label = example["image"][..., 0], example["label"]
        if any(n > m for n, m in zip(label.shape, self.shape)):
            raise ConfigError(
                f"data.options.test_size: {self.shape} does not hold slices of {label.shape}"
            )
        start = [-((m - n) // 2) for n, m in zip(label.shape, self.shape)]
        return {
            "image": _cut(image, start, self.shape)[..., None],
            "label": cut(label, start, self.shape).astype(np.int32),
        }


def eval_transform(options: Mapping[str, Any]) -> _Whole:
    """A whole slice in the middle of `test_size`."""
    return _Whole(tuple(int(n) for n in options["test_size"]))


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
