"""CIFAR-10, CIFAR-100 and SVHN from their published files: 32x32 color images, pixels in [0, 1].

`PATH/cifar-10-batches-py/data_batch_1` .. `_5` and `test_batch`, `PATH/cifar-100-python/train` and
`test` (Python pickles: rows of 3072 are the red, green and blue planes), `PATH/train_32x32.mat` and
`test_32x32.mat` (X [32, 32, 3, N], label 10 meaning digit 0). Pickles are read without calling
anything they name but NumPy's array construction.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import pathlib
import pickle
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from train.data import array_source, image_augmentation

OPTIONS: dict[str, Any] = {"set": "cifar10", "augment": True, "padding": 4, "threads": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "cifar10": {"set": "cifar10"},
    "cifar100": {"set": "cifar100"},
    # Digits have a side that is left and one that is right: no mirroring.
    "svhn": {"set": "svhn"},
}
SPLITS = ("train", "test")
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10}
PUBLISHED_SIZES = {
    "cifar10": {"train": 50000, "test": 10000},
    "cifar100": {"train": 50000, "test": 10000},
    "svhn": {"train": 73257, "test": 26032},
}
SIDE = 32
PIXELS = True  # images are pixels in [0, 1], as attacks want them
_FILES = {
    "cifar10": {
        "train": tuple(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)),
        "test": ("cifar-10-batches-py/test_batch",),
    },
    "cifar100": {"train": ("cifar-100-python/train",), "test": ("cifar-100-python/test",)},
    "svhn": {"train": ("train_32x32.mat",), "test": ("test_32x32.mat",)},
}


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`image` float32 [32, 32, 3] in [0, 1], `label` int32 []."""
    _set_of(options)
    return {
        "image": jax.ShapeDtypeStruct((SIDE, SIDE, 3), np.float32),
        "label": jax.ShapeDtypeStruct((), np.int32),
    }


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Published sizes without data, those of the files otherwise."""
    if not options["path"]:
        return dict(PUBLISHED_SIZES[_set_of(options)])
    return {split: len(source(split, options)) for split in SPLITS}


def _set_of(options: Mapping[str, Any]) -> str:
    if options["set"] not in _FILES:
        raise ValueError(f"data.options.set {options['set']!r}; known: {', '.join(_FILES)}")
    return options["set"]


def source(split: str, options: Mapping[str, Any]) -> array_source.ArraySource:
    """uint8 images [32, 32, 3] and int32 labels.

    Raises FileNotFoundError naming the file and `data.options.path`.
    """
    name = _set_of(options)
    folder = pathlib.Path(options["path"] or ".").expanduser()
    for file in _FILES[name][split]:
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"data.options.path {options['path']}: no file {file} of {name} there"
            )
    return _source(name, split, str(folder))


@functools.lru_cache(maxsize=4)
def _source(name: str, split: str, folder: str) -> array_source.ArraySource:
    parts = [_read(name, os.path.join(folder, file)) for file in _FILES[name][split]]
    images, labels = (np.concatenate(column) for column in zip(*parts))
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= NUM_CLASSES[name]:
        raise ValueError(f"{name}: labels must lie in [0, {NUM_CLASSES[name]})")
    return array_source.ArraySource({"image": images, "label": labels.astype(np.int32)})


def _read(name: str, path: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "svhn":
        from scipy.io import loadmat

        found = loadmat(path)
        return found["X"].transpose(3, 0, 1, 2), found["y"].ravel().astype(np.int64) % 10
    with open(path, "rb") as file:
        found = _ArrayUnpickler(io.BytesIO(file.read()), encoding="bytes").load()
    labels = found.get(b"labels", found.get(b"fine_labels"))
    rows = found.get(b"data")
    if labels is None or rows is None or rows.ndim != 2 or rows.shape[1] != 3 * SIDE * SIDE:
        raise ValueError(f"{path}: not a CIFAR batch (data [N, 3072] and labels)")
    images = rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.asarray(labels, np.int64)


class _ArrayUnpickler(pickle.Unpickler):
    """Dicts, lists, strings, numbers and NumPy arrays; any other name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.ndarray.__reduce__(np.zeros(0))[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module == "_codecs" and name == "encode":
            import _codecs

            return _codecs.encode
        raise pickle.UnpicklingError(f"a CIFAR file names {module}.{name}, which is not read")


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """A random crop of the zero-padded image and, but for digits, a random left-right flip."""

    augment: bool
    padding: int
    flip: bool

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image = example["image"]
        if self.augment:
            p = self.padding
            padded = np.pad(image, ((p, p), (p, p), (0, 0)))
            image = image_augmentation.random_crop(rng, padded, (SIDE, SIDE))
            if self.flip and rng.random() < 0.5:
                image = image[:, ::-1]
        return _to_pixels({"image": image, "label": example["label"]})


def train_transform(options: Mapping[str, Any]) -> TrainTransform:
    """The training transform of these options."""
    flip = options["set"] != "svhn"
    return TrainTransform(bool(options["augment"]), int(options["padding"]), flip)


def eval_transform(options: Mapping[str, Any]):
    """Pixels in [0, 1]."""
    del options
    return _to_pixels


def _to_pixels(example: Mapping[str, Any]) -> dict[str, Any]:
    image = np.ascontiguousarray(example["image"], np.float32) / np.float32(255)
    return {"image": image, "label": example["label"]}


def read_image(path: str | os.PathLike, options: Mapping[str, Any]) -> np.ndarray:
    """One image file, resized to 32x32, float32 [32, 32, 3] in [0, 1]."""
    del options
    with Image.open(path) as image:
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        return np.asarray(small, np.float32) / np.float32(255)
