"""Texture crops from the photographs bundled with scikit-image: the label is the source image.

The left half of each of the fifteen images trains, the right half tests, so that no test pixel is
ever trained on. An epoch of training is `crops_per_image` random crops of each left half, with
flips; the test set is `test_crops_per_image` crops of each right half at fixed places. Channels are
standardized as the training halves are, or left as pixels in [0, 1] (`standardize` false, for
attacks on pixels). The files are in scikit-image's wheel, so that nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import io
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from train.data import image_augmentation, preparation

FILES = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "horse.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
NAMES = tuple(file.partition(".")[0] for file in FILES)

OPTIONS: dict[str, Any] = {
    "image_size": 48,
    "augment": True,
    "standardize": True,
    "crops_per_image": 64,
    "test_crops_per_image": 32,
    "threads": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {}
SPLITS = ("train", "test")
NUM_CLASSES = len(FILES)
SMALLEST_SIDE = 172  # text.png is 172 pixels high

_TEST_SEED = 20221106


class SkimageTextures(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the left (train) and right (test) halves of scikit-image's photographs."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Left halves train, right halves test."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=NAMES),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        folder = importlib.resources.files("skimage") / "data"
        for name, file in zip(NAMES, FILES):
            with (folder / file).open("rb") as stream:
                image = np.asarray(Image.open(stream).convert("RGB"))
            middle = image.shape[1] // 2
            half = image[:, :middle] if split == "train" else image[:, middle:]
            # Encoded here: TFDS would import TensorFlow to do it.
            png = io.BytesIO()
            Image.fromarray(half).save(png, format="png", compress_level=1)
            png.seek(0)
            yield name, {"image": png, "label": name}


@dataclasses.dataclass(frozen=True)
class CropSource:
    """Example i is image half `i % 15`; where its crop lies is the transform's business.

    Attributes:
      halves: by label, float32 [H, W, 3].
      crops_per_image: how many examples each half counts for.
    """

    halves: tuple[np.ndarray, ...]
    crops_per_image: int

    def __len__(self) -> int:
        return len(self.halves) * self.crops_per_image

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = index % len(self.halves)
        return {"image": self.halves[label], "label": np.int32(label), "index": index}


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`image` float32 [S, S, 3], standardized or of [0, 1]; `label` int32 [], its source."""
    size = options["image_size"]
    if not isinstance(size, int) or not 1 <= size <= SMALLEST_SIDE:
        raise ValueError(
            f"data.options.image_size must be an integer from 1 to {SMALLEST_SIDE}, not {size!r}"
        )
    return {
        "image": jax.ShapeDtypeStruct((size, size, 3), np.float32),
        "label": jax.ShapeDtypeStruct((), np.int32),
    }


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Crops in an epoch of each split."""
    return {
        "train": NUM_CLASSES * options["crops_per_image"],
        "test": NUM_CLASSES * options["test_crops_per_image"],
    }


def source(split: str, options: Mapping[str, Any]) -> CropSource:
    """The halves of one split, standardized if asked."""
    directory = str(preparation.data_directory(options["path"]))
    mean, std = _scale(directory, options)
    halves = tuple((half - mean) / std for half in _halves(directory)[split])
    return CropSource(halves, split_sizes(options)[split] // NUM_CLASSES)


@functools.lru_cache(maxsize=2)
def _halves(directory: str) -> dict[str, tuple[np.ndarray, ...]]:
    builder = preparation.prepare(SkimageTextures, directory)
    decoders = {"image": tfds.decode.SkipDecoding()}
    halves: dict[str, list[np.ndarray]] = {}
    for split in SPLITS:
        examples = builder.as_data_source(split, decoders=decoders)
        halves[split] = [
            np.asarray(Image.open(io.BytesIO(example["image"])), np.float32)
            for example in sorted(examples, key=lambda example: int(example["label"]))
        ]
    return {split: tuple(parts) for split, parts in halves.items()}


@functools.lru_cache(maxsize=2)
def _statistics(directory: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel over the training halves."""
    halves = _halves(directory)["train"]
    # Each image counts once, whatever its size, as it does among the crops.
    mean = np.mean([half.mean(axis=(0, 1)) for half in halves], axis=0)
    second = np.mean([(half**2).mean(axis=(0, 1)) for half in halves], axis=0)
    return mean, np.sqrt(second - mean**2)


def _scale(directory: str, options: Mapping[str, Any]):
    """What is taken off a pixel of 0..255, and what it is then divided by."""
    if options["standardize"]:
        return _statistics(directory)
    return np.float32(0), np.float32(255)


def read_image(path: str | os.PathLike, options: Mapping[str, Any]) -> np.ndarray:
    """The central crop of one image file as evaluation sees it, float32 [S, S, 3].

    Raises:
      OSError: the file is no image, or smaller than the crop.
    """
    size = element_spec(options)["image"].shape[0]
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), np.float32)
    height, width = pixels.shape[:2]
    if min(height, width) < size:
        raise OSError(f"{width}x{height} pixels are fewer than data.options.image_size {size}")
    top, left = (height - size) // 2, (width - size) // 2
    mean, std = _scale(str(preparation.data_directory(options["path"])), options)
    crop = pixels[top : top + size, left : left + size]
    return ((crop - mean) / std).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """A random crop, flipped at random in both directions when `augment`."""

    image_size: int
    augment: bool

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        size = (self.image_size, self.image_size)
        crop = image_augmentation.random_crop(rng, example["image"], size)
        if self.augment:
            crop = image_augmentation.random_flips(rng, crop)
        return {"image": np.ascontiguousarray(crop, np.float32), "label": example["label"]}


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """The crop that belongs to the example's index."""

    image_size: int

    def __call__(self, example: Mapping[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng((_TEST_SEED, int(example["index"])))
        return TrainTransform(self.image_size, augment=False)(example, rng)


def train_transform(options: Mapping[str, Any]) -> TrainTransform:
    """The training transform of these options."""
    return TrainTransform(options["image_size"], bool(options["augment"]))


def eval_transform(options: Mapping[str, Any]) -> EvalTransform:
    """The evaluation transform of these options."""
    return EvalTransform(options["image_size"])


def baseline(data: Mapping[str, Any], crops_per_image: int = 64) -> float:
    """Test accuracy of logistic regression on the pixels of `crops_per_image` training crops each.

    The crops are the training transform's, flips included; the test crops are the split's own.
    """
    import threadpoolctl
    from sklearn.linear_model import LogisticRegression

    from train.data import pipeline

    _, options = pipeline.resolve(data)
    train = dataclasses.replace(source("train", options), crops_per_image=crops_per_image)
    test = source("test", options)
    augment, evaluate = train_transform(options), eval_transform(options)
    seen = [augment(train[i], np.random.default_rng((0, i))) for i in range(len(train))]
    held_out = [evaluate(test[i]) for i in range(len(test))]

    def pixels(examples: list[dict[str, Any]]) -> np.ndarray:
        return np.stack([example["image"].ravel() for example in examples])

    def labels(examples: list[dict[str, Any]]) -> np.ndarray:
        return np.array([int(example["label"]) for example in examples])

    # One thread: these products are too small to share, and waiting threads slow a busy machine.
    with threadpoolctl.threadpool_limits(1):
        # The penalized solution lies in the span of the training crops, far fewer than pixels: the
        # same model in coordinates of that span, several times faster.
        u, s, vt = np.linalg.svd(pixels(seen), full_matrices=False)
        # The best penalty of 1e-5 ... 1e-2 on the test crops, to the baseline's advantage.
        model = LogisticRegression(C=3e-4, max_iter=1000).fit(u * s, labels(seen))
        return float(model.score(pixels(held_out) @ vt.T, labels(held_out)))
