"""Handwritten digits bundled with scikit-learn: 1797 images of 8x8, ten classes.

The split is a stratified 25 % for testing with a fixed seed. Images are resized bilinearly to
32x32 or 64x64, given three equal channels, and standardized with the training split's mean and
standard deviation, or left as pixels in [0, 1] (`standardize` false, for attacks on pixels).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from train.data import array_source, image_augmentation, preparation

# One reading thread: these maps hold the interpreter lock, so that more of them are slower.
OPTIONS: dict[str, Any] = {
    "image_size": 32,
    "augment": False,
    "noise": 0.0,  # in training: standard deviation, in units of the images
    "standardize": True,
    "threads": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {}
SPLITS = ("train", "test")
NUM_CLASSES = 10
SIZES = {"train": 1347, "test": 450}

_SPLIT_SEED = 0
_LEVELS = 16.0  # scikit-learn stores ink as 0..16


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of scikit-learn's digits with our fixed stratified split."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Stratified 25 % test split."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=NUM_CLASSES),
                    "index": tfds.features.Scalar(dtype=np.int32),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits().images.astype(np.uint8), load_digits().target
        train, test = train_test_split(
            np.arange(len(labels)), test_size=0.25, random_state=_SPLIT_SEED, stratify=labels
        )
        return {
            "train": self._generate_examples(images, labels, np.sort(train)),
            "test": self._generate_examples(images, labels, np.sort(test)),
        }

    def _generate_examples(self, images, labels, chosen):
        for i in chosen:
            yield int(i), {"image": images[i], "label": int(labels[i]), "index": int(i)}


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`image` float32 [S, S, 3] with mean 0 and std 1, `label` int32 []."""
    size = options["image_size"]
    if not isinstance(size, int) or size < 8:
        raise ValueError(f"data.options.image_size must be an integer >= 8, not {size!r}")
    return {
        "image": jax.ShapeDtypeStruct((size, size, 3), np.float32),
        "label": jax.ShapeDtypeStruct((), np.int32),
    }


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Number of examples of each split."""
    del options
    return dict(SIZES)


def source(split: str, options: Mapping[str, Any]) -> array_source.ArraySource:
    """Resized, standardized images float32 [S, S] and labels int32 []."""
    size = element_spec(options)["image"].shape[0]
    directory = str(preparation.data_directory(options["path"]))
    return _source(split, size, directory, bool(options["standardize"]))


@functools.lru_cache(maxsize=8)
def _source(split: str, size: int, directory: str, standardize: bool) -> array_source.ArraySource:
    arrays = array_source.read_split(preparation.prepare(SklearnDigits, directory), split)
    images = arrays["image"] / np.float32(_LEVELS)
    return array_source.ArraySource(
        {
            "image": _resized(images, size, directory, standardize),
            "label": arrays["label"].astype(np.int32),
        }
    )


def _resized(images: np.ndarray, size: int, directory: str, standardize: bool) -> np.ndarray:
    """Images [N, H, W] of values 0..1, resized; standardized as the training split if asked."""
    resized = image_augmentation.bilinear_resize(images, (size, size))
    if not standardize:
        return resized.astype(np.float32)
    mean, std = _statistics(size, directory)
    return ((resized - mean) / std).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _statistics(size: int, directory: str) -> tuple[np.floating, np.floating]:
    train = array_source.read_split(preparation.prepare(SklearnDigits, directory), "train")
    images = train["image"] / np.float32(_LEVELS)
    resized = image_augmentation.bilinear_resize(images, (size, size))
    return resized.mean(), resized.std()


def read_image(path: str | os.PathLike, options: Mapping[str, Any]) -> np.ndarray:
    """One image file as evaluation sees it, float32 [S, S, 3]; ink is bright, paper dark."""
    with Image.open(path) as image:
        gray = np.asarray(image.convert("L"), np.float32)[None] / np.float32(255)
    size = element_spec(options)["image"].shape[0]
    directory = str(preparation.data_directory(options["path"]))
    gray = _resized(gray, size, directory, bool(options["standardize"]))[0]
    return np.repeat(gray[..., None], 3, axis=-1)


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Optional small random rotation, scaling and shift, three equal channels, optional noise.

    Noise is of every pixel and channel its own; `pixels` are kept in [0, 1].
    """

    augment: bool
    noise: float = 0.0
    pixels: bool = False

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image = example["image"]
        if self.augment:
            image = image_augmentation.random_affine(
                rng, image, degrees=10.0, scale=(0.9, 1.1), shift=0.07, fill=float(image.min())
            )
        image = np.repeat(image[..., None], 3, axis=-1)
        if self.noise:
            image = image + self.noise * rng.standard_normal(image.shape, dtype=np.float32)
            image = image.clip(0, 1) if self.pixels else image
        return {"image": image.astype(np.float32), "label": example["label"]}


def eval_transform(options: Mapping[str, Any]):
    """Three equal channels."""
    del options
    return _to_channels


def train_transform(options: Mapping[str, Any]) -> TrainTransform:
    """The training transform of these options."""
    return TrainTransform(
        augment=bool(options["augment"]),
        noise=float(options.get("noise", 0.0)),  # faces share this transform, not all its options
        pixels=not options.get("standardize", True),
    )


def _to_channels(example: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image": np.repeat(example["image"][..., None], 3, axis=-1),
        "label": example["label"],
    }


def baseline(data: Mapping[str, Any]) -> float:
    """Test accuracy of logistic regression on the 8x8 pixels of the same split (about 0.97)."""
    from sklearn.linear_model import LogisticRegression

    options = data.get("options") or {}
    builder = preparation.prepare(SklearnDigits, options.get("path"))
    train, test = (array_source.read_split(builder, split) for split in SPLITS)

    def pixels(part: Mapping[str, np.ndarray]) -> np.ndarray:
        return part["image"].reshape(len(part["image"]), -1) / _LEVELS

    model = LogisticRegression(max_iter=2000).fit(pixels(train), train["label"])
    return float(model.score(pixels(test), test["label"]))
