"""Face or not: the 200 gray patches of 25x25 bundled with scikit-image (`lfw_subset`).

The first hundred are faces of Labeled Faces in the Wild (label 1), the rest are not (label 0). The
split is a stratified 25 % for testing with a fixed seed.
"""

from __future__ import annotations

import functools
import importlib.resources
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from train.data import array_source, digits, image_augmentation, preparation

OPTIONS: dict[str, Any] = {"image_size": 32, "augment": False, "threads": 1}
VARIANTS: dict[str, dict[str, Any]] = {}
SPLITS = ("train", "test")
NUM_CLASSES = 2
SIZES = {"train": 150, "test": 50}

_SPLIT_SEED = 0


class LfwSubset(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of scikit-image's `lfw_subset` with our fixed stratified split."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Stratified 25 % test split."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(25, 25), dtype=np.float32),
                    "label": tfds.features.ClassLabel(names=("other", "face")),
                    "index": tfds.features.Scalar(dtype=np.int32),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        from sklearn.model_selection import train_test_split

        file = importlib.resources.files("skimage") / "data" / "lfw_subset.npy"
        with file.open("rb") as stream:
            images = np.load(stream).astype(np.float32)
        labels = (np.arange(len(images)) < 100).astype(int)
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
    """`image` float32 [S, S, 3] with mean 0 and std 1, `label` int32 []: 1 for a face."""
    size = options["image_size"]
    if not isinstance(size, int) or size < 25:
        raise ValueError(f"data.options.image_size must be an integer >= 25, not {size!r}")
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
    return _source(split, size, str(preparation.data_directory(options["path"])))


@functools.lru_cache(maxsize=4)
def _source(split: str, size: int, directory: str) -> array_source.ArraySource:
    part = array_source.read_split(preparation.prepare(LfwSubset, directory), split)
    mean, std = _statistics(size, directory)
    resized = image_augmentation.bilinear_resize(part["image"], (size, size))
    return array_source.ArraySource(
        {
            "image": ((resized - mean) / std).astype(np.float32),
            "label": part["label"].astype(np.int32),
        }
    )


@functools.lru_cache(maxsize=8)
def _statistics(size: int, directory: str) -> tuple[np.floating, np.floating]:
    train = array_source.read_split(preparation.prepare(LfwSubset, directory), "train")
    resized = image_augmentation.bilinear_resize(train["image"], (size, size))
    return resized.mean(), resized.std()


def read_image(path: str | os.PathLike, options: Mapping[str, Any]) -> np.ndarray:
    """One image file as evaluation sees it, gray and resized, float32 [S, S, 3]."""
    size = element_spec(options)["image"].shape[0]
    with Image.open(path) as image:
        gray = image.convert("L").resize((25, 25), Image.Resampling.BOX)
    pixels = np.asarray(gray, np.float32) / np.float32(255)
    mean, std = _statistics(size, str(preparation.data_directory(options["path"])))
    resized = image_augmentation.bilinear_resize(pixels, (size, size))
    return np.repeat(((resized - mean) / std)[..., None], 3, axis=-1).astype(np.float32)


# Gray images of one size are treated as digits are.
train_transform = digits.train_transform
eval_transform = digits.eval_transform


def baseline(data: Mapping[str, Any]) -> float:
    """Test accuracy of logistic regression on the 25x25 pixels of the same split."""
    from sklearn.linear_model import LogisticRegression

    options = data.get("options") or {}
    builder = preparation.prepare(LfwSubset, options.get("path"))
    train, test = (array_source.read_split(builder, split) for split in SPLITS)

    def pixels(part: Mapping[str, np.ndarray]) -> np.ndarray:
        return part["image"].reshape(len(part["image"]), -1)

    model = LogisticRegression(max_iter=2000).fit(pixels(train), train["label"])
    return float(model.score(pixels(test), test["label"]))
