"""Fakes of known and unknown tools: crops of photographs changed by nine procedures, or folders.

`procedural`: crops of scikit-image's color photographs (left halves train, right halves test), each
passed through one of nine tools that leave traces as forgery tools do. The first `known` tools are
labeled, the others appear unlabeled only. `folders`: the layout of OpenWorld-DeepFakeAttribution,
`PATH/<group>/<method>/<dataset>/*.png`, cropped faces (see `forgery_folders`).

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

from train.data import forgery_folders, textures

OPTIONS: dict[str, Any] = {
    "set": "procedural",
    "task": "attribution",
    "image_size": 64,
    "known": 5,
    "real": False,  # attribution: there are real images too; of procedures one more novel class
    "known_methods": forgery_folders.KNOWN_METHODS,
    "examples": 4096,
    "test_examples": 512,
    "shuffled_labels": False,  # a control: labels of the labeled images say nothing
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "augment": True,  # a flip, and the following: the share of images, and the range
    "resized_crop": 0.0,
    "resized_crop_scale": (0.5, 1.0),  # area of the part
    "blur": 0.0,
    "blur_sigma": (0.5, 0.5),
    "light": 0.0,
    "brightness": 0.2,  # at most so much of white is added or taken
    "contrast": 0.2,
    "jpeg": 0.0,
    "jpeg_quality": (70, 100),
    "threads": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "attribution": {"task": "attribution"},
    # Milder than published: some of the procedures are a blur and a JPEG themselves.
    "detection": {
        "task": "detection",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "blur": 0.1,
        "light": 0.5,
        "brightness": 12 / 255,
        "contrast": 0.1,
        "jpeg": 0.3,
    },
}
SPLITS = ("train", "test")
# Color photographs without gray twins: indices into the texture set.
_COLOR = tuple(
    textures.FILES.index(f"{name}")
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg",
                 "retina.jpg", "rocket.jpg")
)  # fmt: skip
_SEED = 20220917


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
    if options["set"] == "folders":
        return len(_folders(options).classes)
    return len(TOOLS) + bool(options["real"])


def known_count(options: Mapping[str, Any]) -> int:
    """Classes that are labeled; they come first."""
    return _folders(options).known_count if options["set"] == "folders" else options["known"]


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
        return {split: len(_folders(options).faces(split)) for split in SPLITS}
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
        _check_folders(options)
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


def _folders(options) -> forgery_folders.Folders:
    detection = options["task"] == "detection"
    return forgery_folders.folders(
        _root(options),
        () if detection else tuple(options["known_methods"]),
        real=detection or bool(options["real"]),
        by_video=detection,
    )


def _check_folders(options) -> None:
    """Refuse folders without what the task needs."""
    found = _folders(options)
    if options["task"] == "detection":
        kinds = {found.is_real(label) for label in range(len(found.classes))}
        if kinds != {True, False}:
            raise ValueError(
                f"data.options.path: detection needs a method named real (or original) and fakes, "
                f"got {list(found.classes)}"
            )
    elif not found.by_class("train", True):
        raise ValueError(
            f"data.options.known_methods: no labeled images; there are {list(found.classes)}"
        )


def _folder_face(rng, split, options, labeled: bool) -> forgery_folders.Face:
    """A balanced sampler: the class first, then one of its files."""
    rows = _folders(options).by_class(split, labeled)
    own = rows[rng.integers(len(rows))]
    return own[rng.integers(len(own))]


def _read_resized(path, options) -> np.ndarray:
    size = options["image_size"]
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def _normalized(image: np.ndarray, options) -> np.ndarray:
    mean, std = (np.asarray(options[k], np.float32) for k in ("mean", "std"))
    return ((np.asarray(image, np.float32) / 255 - mean) / std).astype(np.float32)


def _augmented(rng, image, options):
    """What training sees of an image uint8 [S, S, 3]."""
    if not options["augment"]:
        return image
    image = _degraded(rng, image, options)
    image = image[:, ::-1] if rng.random() < 0.5 else image
    share = options["resized_crop"]
    return _resized_crop(rng, image, options) if share and rng.random() < share else image


def _resized_crop(rng, image, options):
    """A random part of the image, sides at most 3:4 of each other, at its full size."""
    side, scale = image.shape[0], options["resized_crop_scale"]
    area = rng.uniform(*scale) * side**2
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    height, width = (min(round(float(np.sqrt(area * r))), side) for r in (1 / ratio, ratio))
    top, left = rng.integers(side - height + 1), rng.integers(side - width + 1)
    part = Image.fromarray(np.ascontiguousarray(image[top : top + height, left : left + width]))
    return np.asarray(part.resize((side, side), Image.Resampling.BILINEAR))


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Draws the tools (or files), augments and normalizes."""

    options: Any

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        options = dict(self.options)
        split = example["split"]
        if options["task"] == "detection":
            image, label = _detection_example(rng, split, options)
            image = _normalized(_augmented(rng, image, options), options)
            return {"image": image, "label": np.int32(label)}
        if options["set"] == "folders":
            faces = [_folder_face(rng, split, options, labeled) for labeled in (True, False)]
            labeled, free = (_read_resized(face.path, options) for face in faces)
            label, hidden = (face.label for face in faces)
        else:
            label = int(rng.integers(options["known"]))
            hidden = int(rng.integers(class_count(options)))
            labeled = draw(rng, split, options, label)
            free = draw(rng, split, options, hidden if hidden < len(TOOLS) else None)
            if options["shuffled_labels"]:
                label = int(rng.integers(options["known"]))
        return {
            "image": _normalized(_augmented(rng, labeled, options), options),
            "label": np.int32(label),
            "unlabeled": _normalized(_augmented(rng, free, options), options),
            "unlabeled_label": np.int32(hidden),
        }


def _detection_example(rng, split, options) -> tuple[np.ndarray, int]:
    if options["set"] == "folders":
        face = _folder_face(rng, split, options, labeled=False)
        return _read_resized(face.path, options), int(not _folders(options).is_real(face.label))
    fake = int(rng.integers(2))
    tool = int(rng.integers(len(TOOLS))) if fake else None
    return draw(rng, split, options, tool), fake


def _degraded(rng, image, options):
    """Blur, brightness and contrast, JPEG, each of a share of the images."""
    from scipy.ndimage import gaussian_filter

    if options["blur"] and rng.random() < options["blur"]:
        low, high = options["blur_sigma"]
        sigma = rng.uniform(low, high) if high > low else low
        image = _clip(gaussian_filter(image.astype(float), (sigma, sigma, 0)))
    if options["light"] and rng.random() < options["light"]:
        gain = rng.uniform(1 - options["contrast"], 1 + options["contrast"])
        shift = 255 * options["brightness"]
        image = _clip((image - 128.0) * gain + 128 + rng.uniform(-shift, shift))
    if options["jpeg"] and rng.random() < options["jpeg"]:
        low, high = options["jpeg_quality"]
        image = _jpeg(rng, image, None, quality=int(rng.integers(low, high + 1)))
    return image


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Example i, a function of i alone."""

    options: Any

    def __call__(self, example: Mapping[str, Any]) -> dict[str, Any]:
        options, index = dict(self.options), example["index"]
        rng = np.random.default_rng((_SEED, index))
        if options["set"] == "folders":
            face = _folders(options).faces(example["split"])[index]
            image, label = _read_resized(face.path, options), face.label
            video = face.video
            if options["task"] == "detection":
                label = int(not _folders(options).is_real(label))
        elif options["task"] == "detection":
            # Four frames a video: the same tool on neighboring draws.
            video = index // 4
            kind = np.random.default_rng((_SEED, 1, video))
            label = int(kind.integers(2))
            tool = int(kind.integers(len(TOOLS))) if label else None
            image = draw(rng, example["split"], options, tool)
        else:
            label = index % class_count(options)
            image = draw(rng, example["split"], options, label if label < len(TOOLS) else None)
        found = {"image": _normalized(image, options), "label": np.int32(label)}
        return {**found, "video": np.int32(video)} if options["task"] == "detection" else found


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
