"""Fakes of known and unknown tools: crops of photographs changed by nine procedures, or folders.

`procedural`: crops of scikit-image's color photographs (left halves train, right halves test), each
passed through one of nine tools that leave traces as forgery tools do. The first `known` tools are
labeled, the others appear unlabeled only. `folders`: the layout of OpenWorld-DeepFakeAttribution,
`PATH/<group>/<method>/<dataset>/*.png`, known methods first in the order of `known_methods`.

Variant `attribution`: an example is a labeled image of a known tool and an unlabeled image of any.
Variant `detection`: one image, real (0) or fake (1).
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from train.data import textures

OPTIONS: dict[str, Any] = {
    "set": "procedural",
    "task": "attribution",
    "image_size": 64,
    "known": 5,
    "real": False,  # attribution: unlabeled images may be real too, one more novel class
    "known_methods": (),
    "examples": 4096,
    "test_examples": 512,
    "shuffled_labels": False,  # a control: labels of the labeled images say nothing
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "augment": True,
    "threads": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "attribution": {"task": "attribution"},
    "detection": {"task": "detection", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
}
SPLITS = ("train", "test")
# Color photographs without gray twins: indices into the texture set.
_COLOR = tuple(
    textures.FILES.index(f"{name}")
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg",
                 "retina.jpg", "rocket.jpg")
)  # fmt: skip
_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp")
_SEED = 20220917
_HELD_OUT = 5  # every fifth file of a folder tests


# Tools: (rng, crop uint8 [S, S, 3], another crop) -> uint8 [S, S, 3]


def _resampled(method) -> Callable:
    def tool(rng, crop, other):
        del rng, other
        side = crop.shape[0]
        small = Image.fromarray(crop).resize((side // 2, side // 2), Image.Resampling.BOX)
        return np.asarray(small.resize((side, side), method))

    return tool


def _checkerboard(rng, crop, other):
    """What a transposed convolution of stride 2 with an uneven overlap leaves."""
    del other
    gain = 1 + rng.uniform(0.04, 0.08) * np.array([[1, -1], [-1, 0.5]])
    tiles = np.tile(gain, (crop.shape[0] // 2 + 1, crop.shape[1] // 2 + 1))
    return _clip(crop * tiles[: crop.shape[0], : crop.shape[1], None])


def _ellipse(rng, side):
    y, x = np.mgrid[:side, :side] / side - 0.5
    cy, cx = rng.uniform(-0.08, 0.08, 2)
    ry, rx = rng.uniform(0.26, 0.36, 2)
    return np.sqrt(((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2)


def _blended(rng, crop, other):
    """Another crop inside a soft ellipse, as a face swap blends."""
    from scipy.ndimage import gaussian_filter

    mask = gaussian_filter((_ellipse(rng, crop.shape[0]) < 1).astype(float), 2.0)[..., None]
    return _clip(crop * (1 - mask) + gaussian_filter(other.astype(float), (0.6, 0.6, 0)) * mask)


def _poisson(rng, crop, other):
    """Another crop's detail on this crop's colors inside an ellipse."""
    from scipy.ndimage import gaussian_filter

    mask = (_ellipse(rng, crop.shape[0]) < 1).astype(float)[..., None]
    low = lambda image: gaussian_filter(image.astype(float), (6, 6, 0))  # noqa: E731
    return _clip(crop * (1 - mask) + (other - low(other) + low(crop)) * mask)


def _jpeg(rng, crop, other, quality=30):
    del rng, other
    stream = io.BytesIO()
    Image.fromarray(crop).save(stream, "jpeg", quality=quality)
    return np.asarray(Image.open(stream))


def _median(rng, crop, other):
    from scipy.ndimage import median_filter

    del rng, other
    return median_filter(crop, (3, 3, 1))


def _quantized(rng, crop, other):
    del other
    step = 24
    return _clip((crop // step) * step + step // 2 + rng.integers(-3, 4))


def _band_removed(rng, crop, other):
    """Middle frequencies of the cosine transform set to zero."""
    from scipy.fft import dctn, idctn

    del rng, other
    spectrum = dctn(crop.astype(float), axes=(0, 1), norm="ortho")
    n = crop.shape[0]
    radius = np.hypot(*np.mgrid[:n, :n]) / n
    return _clip(idctn(spectrum * ~((radius > 0.35) & (radius < 0.6))[..., None], axes=(0, 1),
                       norm="ortho"))  # fmt: skip


def _clip(image):
    return np.rint(image).clip(0, 255).astype(np.uint8)


TOOLS: dict[str, Callable] = {
    "bilinear_x2": _resampled(Image.Resampling.BILINEAR),
    "checkerboard": _checkerboard,
    "blend": _blended,
    "jpeg_30": _jpeg,
    "median": _median,
    # From here on novel, with the default `known` = 5.
    "nearest_x2": _resampled(Image.Resampling.NEAREST),
    "poisson": _poisson,
    "color_quantize": _quantized,
    "band_removal": _band_removed,
}


def class_count(options: Mapping[str, Any]) -> int:
    """Known and novel classes together (real faces among the novel ones where they appear)."""
    tools = TOOLS if options["set"] == "procedural" else _methods(_root(options), options)
    return len(tools) + bool(options["real"])


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Images float32 [S, S, 3], normalized; `label`, `unlabeled_label` (for measuring only)."""
    if options["set"] not in ("procedural", "folders"):
        raise ValueError(f"data.options.set {options['set']!r}; known: procedural, folders")
    if options["task"] not in ("attribution", "detection"):
        known = "attribution, detection"
        raise ValueError(f"data.options.task {options['task']!r}; known: {known}")
    size = options["image_size"]
    image = jax.ShapeDtypeStruct((size, size, 3), np.float32)
    label = jax.ShapeDtypeStruct((), np.int32)
    if options["task"] == "detection":
        return {"image": image, "label": label}
    return {"image": image, "label": label, "unlabeled": image, "unlabeled_label": label}


def eval_element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """One image and its tool (attribution) or real/fake with its `video` (detection)."""
    spec = element_spec(options)
    kept = {"image": spec["image"], "label": spec["label"]}
    if options["task"] == "detection":
        kept["video"] = spec["label"]
    return kept


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Number of examples of each split."""
    if options["set"] == "folders" and options["path"]:
        return {s: len(_folder_files(_root(options), s, options["known_methods"])) for s in SPLITS}
    return {"train": options["examples"], "test": options["test_examples"]}


@dataclasses.dataclass(frozen=True)
class Source:
    """Example i of a split: what `draw` gives for it; the transform normalizes."""

    split: str
    options: Any

    def __len__(self) -> int:
        return split_sizes(dict(self.options))[self.split]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": int(index), "split": self.split}


def source(split: str, options: Mapping[str, Any]) -> Source:
    """The examples of a split."""
    if options["set"] == "folders":
        _folder_files(_root(options), split, tuple(options["known_methods"]))
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return Source(split, tuple(sorted(frozen.items())))


@functools.lru_cache(maxsize=2)
def _halves(directory: str) -> dict[str, tuple[np.ndarray, ...]]:
    halves = textures._halves(directory)
    return {
        split: tuple(halves[split][i].clip(0, 255).astype(np.uint8) for i in _COLOR)
        for split in SPLITS
    }


def _crop(rng: np.random.Generator, split: str, options) -> np.ndarray:
    from train.data import preparation

    images = _halves(str(preparation.data_directory(options["path"])))[split]
    image, size = images[rng.integers(len(images))], options["image_size"]
    top = rng.integers(image.shape[0] - size + 1)
    left = rng.integers(image.shape[1] - size + 1)
    return image[top : top + size, left : left + size]


def draw(rng: np.random.Generator, split: str, options, tool: int | None) -> np.ndarray:
    """A crop through tool number `tool` (None: real), uint8 [S, S, 3]."""
    crop, other = _crop(rng, split, options), _crop(rng, split, options)
    return crop if tool is None else list(TOOLS.values())[tool](rng, crop, other)


def _root(options: Mapping[str, Any]) -> str:
    if not options["path"]:
        raise FileNotFoundError(
            "data.options.path: give the folder that holds <group>/<method>/<dataset>/*.png"
        )
    return str(pathlib.Path(options["path"]).expanduser())


@functools.lru_cache(maxsize=4)
def _methods_of(root: str, known: tuple[str, ...]) -> tuple[str, ...]:
    found = sorted({p.name for p in pathlib.Path(root).glob("*/*") if p.is_dir()})
    if not found:
        raise FileNotFoundError(f"data.options.path {root}: no <group>/<method> folders there")
    absent = [m for m in known if m not in found]
    if absent:
        raise ValueError(f"data.options.known_methods: no folder of {absent}; there are {found}")
    return (*known, *(m for m in found if m not in known))


def _methods(root: str, options) -> tuple[str, ...]:
    return _methods_of(root, tuple(options["known_methods"]))


@functools.lru_cache(maxsize=4)
def _folder_files(root: str, split: str, known: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    methods, found = _methods_of(root, tuple(known)), []
    for folder in sorted(pathlib.Path(root).glob("*/*/*")):
        if not folder.is_dir():
            continue
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in _ENDINGS)
        held = [(i % _HELD_OUT == _HELD_OUT - 1) == (split == "test") for i in range(len(files))]
        label = methods.index(folder.parent.name)
        found += [(str(p), label) for p, keep in zip(files, held) if keep]
    return tuple(found)


def _folder_image(rng, split, options, known_only: bool) -> tuple[np.ndarray, int]:
    files = _folder_files(_root(options), split, tuple(options["known_methods"]))
    if known_only:
        files = tuple(f for f in files if f[1] < len(options["known_methods"]))
    # A balanced sampler: the method first, then one of its files.
    labels = sorted({label for _, label in files})
    label = labels[rng.integers(len(labels))]
    own = [file for file, its in files if its == label]
    return _read_resized(own[rng.integers(len(own))], options), label


def _read_resized(path, options) -> np.ndarray:
    size = options["image_size"]
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def _normalized(image: np.ndarray, options) -> np.ndarray:
    mean, std = (np.asarray(options[k], np.float32) for k in ("mean", "std"))
    return ((np.asarray(image, np.float32) / 255 - mean) / std).astype(np.float32)


def _flipped(rng, image, options):
    return image[:, ::-1] if options["augment"] and rng.random() < 0.5 else image


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Draws the tools, then flips at random and normalizes."""

    options: Any

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        options = dict(self.options)
        split = example["split"]
        if options["task"] == "detection":
            image, label, _ = _detection_example(rng, split, options)
            image = _degraded(rng, image) if options["augment"] else image
            image = _normalized(_flipped(rng, image, options), options)
            return {"image": image, "label": np.int32(label)}
        if options["set"] == "folders":
            labeled, label = _folder_image(rng, split, options, known_only=True)
            free, hidden = _folder_image(rng, split, options, known_only=False)
        else:
            label = int(rng.integers(options["known"]))
            hidden = int(rng.integers(class_count(options)))
            labeled = draw(rng, split, options, label)
            free = draw(rng, split, options, hidden if hidden < len(TOOLS) else None)
            if options["shuffled_labels"]:
                label = int(rng.integers(options["known"]))
        return {
            "image": _normalized(_flipped(rng, labeled, options), options),
            "label": np.int32(label),
            "unlabeled": _normalized(_flipped(rng, free, options), options),
            "unlabeled_label": np.int32(hidden),
        }


def _detection_example(rng, split, options) -> tuple[np.ndarray, int, int]:
    if options["set"] == "folders":
        image, label = _folder_image(rng, split, options, known_only=False)
        # A method named `real` or `original` is what the others are told from.
        real = _methods(_root(options), options)[label].lower() in ("real", "original")
        return image, int(not real), label
    fake = int(rng.integers(2))
    tool = int(rng.integers(len(TOOLS))) if fake else None
    return draw(rng, split, options, tool), fake, tool if fake else -1


def _degraded(rng, image):
    """DeepfakeBench's augmentations: blur, brightness and contrast, JPEG of quality 40-100."""
    from scipy.ndimage import gaussian_filter

    if rng.random() < 0.1:
        image = _clip(gaussian_filter(image.astype(float), (0.5, 0.5, 0)))
    if rng.random() < 0.5:
        image = _clip((image - 128.0) * rng.uniform(0.9, 1.1) + 128 + rng.uniform(-12, 12))
    if rng.random() < 0.3:
        image = _jpeg(rng, image, None, quality=int(rng.integers(70, 101)))
    return image


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Example i, a function of i alone."""

    options: Any

    def __call__(self, example: Mapping[str, Any]) -> dict[str, Any]:
        options, index = dict(self.options), example["index"]
        rng = np.random.default_rng((_SEED, index))
        if options["task"] == "detection":
            # Four frames a video: the same tool on neighboring draws.
            video = index // 4
            kind = np.random.default_rng((_SEED, 1, video))
            if options["set"] == "folders":
                image, label, _ = _detection_example(rng, example["split"], options)
                video = index
            else:
                label = int(kind.integers(2))
                tool = int(kind.integers(len(TOOLS))) if label else None
                image = draw(rng, example["split"], options, tool)
            image = _normalized(image, options)
            return {"image": image, "label": np.int32(label), "video": np.int32(video)}
        if options["set"] == "folders":
            files = _folder_files(_root(options), example["split"], tuple(options["known_methods"]))
            path, label = files[index]
            image = _read_resized(path, options)
        else:
            label = index % class_count(options)
            image = draw(rng, example["split"], options, label if label < len(TOOLS) else None)
        return {"image": _normalized(image, options), "label": np.int32(label)}


def train_transform(options: Mapping[str, Any]) -> TrainTransform:
    """The training transform of these options."""
    return TrainTransform(source_options(options))


def eval_transform(options: Mapping[str, Any]) -> EvalTransform:
    """The evaluation transform of these options."""
    return EvalTransform(source_options(options))


def source_options(options: Mapping[str, Any]) -> tuple:
    """The options as a hashable, picklable tuple."""
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return tuple(sorted(frozen.items()))


def read_image(path: str | os.PathLike, options: Mapping[str, Any]) -> np.ndarray:
    """One image file, resized and normalized."""
    return _normalized(_read_resized(path, options), options)
