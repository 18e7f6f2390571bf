"""ImageNet-1k (ILSVRC 2012), from plain folders or TFDS, with timm's training augmentation.

Folders: `PATH/train/<wnid>/*.JPEG` and `PATH/val/<wnid>/*.JPEG`; a class is the place of its wnid
in the sorted list of the training folders, which is also TFDS's and torchvision's order. TFDS:
`imagenet2012` prepared to array_record under `PATH`. JPEGs are decoded by Pillow either way.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from train.data import image_augmentation, preparation

# reader: "auto" takes folders where they are, TFDS else. color_jitter: strength, 0 for none; as in
# timm it is left out when rand_augment is on, unless jitter_too. rand_augment: timm's name for it,
# or "". crop_interpolation: of training crops, bilinear, bicubic, or "random" for either. erasing:
# probability. crop_fraction, interpolation: of the evaluation.
OPTIONS: dict[str, Any] = {
    "image_size": 224,
    "reader": "auto",
    "augment": True,
    "scale": (0.08, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "color_jitter": 0.4,
    "rand_augment": "",
    "jitter_too": False,
    "crop_interpolation": "random",
    "erasing": 0.2,
    "crop_fraction": 0.875,
    "interpolation": "bicubic",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "folders": {"reader": "folders"},
    "imagenet2012": {"reader": "tfds"},
}
SPLITS = ("train", "validation")
PUBLISHED_SIZES = {"train": 1281167, "validation": 50000}

_FOLDERS = {"train": "train", "validation": "val"}
_IMAGE_ENDINGS = (".jpeg", ".jpg", ".png")
_INTERPOLATIONS = {
    "bilinear": image_augmentation.BILINEAR,
    "bicubic": image_augmentation.BICUBIC,
}


class Imagenet2012Folders(tfds.core.GeneratorBasedBuilder):
    """TFDS builder that packs ImageNet folders into array_record, JPEG bytes untouched.

    Same features as TFDS's `imagenet2012`, without its manual download and without TensorFlow.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "JPEG bytes as they are in the folders."}

    def __init__(self, *, folders: str, **arguments):
        self._folders = str(pathlib.Path(folders).expanduser())
        super().__init__(**arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=list(_classes(self._folders))),
                    "file_name": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        files = FolderSource.scan(self._folders, split)
        for i in range(len(files)):
            path = pathlib.Path(files.path(i))
            yield (
                f"{path.parent.name}/{path.name}",
                {
                    "image": path.read_bytes(),
                    "label": int(files.labels[i]),
                    "file_name": path.name,
                },
            )


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`image` float32 [S, S, 3], normalized with ImageNet's mean and std; `label` int32 []."""
    size = options["image_size"]
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"data.options.image_size must be a positive integer, not {size!r}")
    return {
        "image": jax.ShapeDtypeStruct((size, size, 3), np.float32),
        "label": jax.ShapeDtypeStruct((), np.int32),
    }


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Number of images of each split; the published numbers where no data is on disk."""
    if not options["path"] or not pathlib.Path(options["path"]).expanduser().is_dir():
        return dict(PUBLISHED_SIZES)
    return {split: len(source(split, options)) for split in SPLITS}


def num_classes(options: Mapping[str, Any]) -> int | None:
    """Number of classes; None where no data is on disk."""
    try:
        folder, as_folders = _located(options)
        if as_folders:
            return len(_classes(str(folder)))
        return TfdsSource.open(folder, SPLITS[0]).classes
    except FileNotFoundError:
        return None


def source(split: str, options: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    """Encoded images `{"bytes", "label", "name"}` of one split.

    Raises:
      FileNotFoundError: one line naming `data.options.path` and what was looked for there.
      ValueError: unknown `data.options.reader`.
    """
    folder, as_folders = _located(options)
    return FolderSource.scan(str(folder), split) if as_folders else TfdsSource.open(folder, split)


def _located(options: Mapping[str, Any]) -> tuple[pathlib.Path, bool]:
    """The data's folder, and whether it holds folders of images."""
    reader = options["reader"]
    if reader not in ("auto", "folders", "tfds"):
        raise ValueError(f"data.options.reader must be auto, folders or tfds, not {reader!r}")
    path = options["path"]
    if not path and reader != "folders":
        path = preparation.data_directory()
    if not path or not pathlib.Path(path).expanduser().is_dir():
        raise FileNotFoundError(
            f"no ImageNet at data.options.path = {str(path) if path else ''!r}: set it to the "
            "folder that holds train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, or to a TFDS folder "
            "with imagenet2012"
        )
    folder = pathlib.Path(path).expanduser()
    return folder, reader == "folders" or (reader == "auto" and (folder / "train").is_dir())


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Images of one split in `ROOT/<wnid>/` folders, in the order of wnid and file name.

    Attributes:
      root: the split's folder. wnids: sorted. names: file names; labels: int32, by example.
    """

    root: str
    wnids: tuple[str, ...]
    names: np.ndarray
    labels: np.ndarray

    @classmethod
    def scan(cls, path: str, split: str) -> FolderSource:
        """Lists a split's files; the classes are those of the training folders."""
        wnids = _classes(path)
        root = os.path.join(path, _FOLDERS[split])
        names: list[str] = []
        labels: list[int] = []
        present = set(_subfolders(root))
        unknown = sorted(present - set(wnids))
        if unknown:
            raise FileNotFoundError(
                f"{root}/{unknown[0]} has no counterpart in {path}/train (data.options.path); "
                "val/ must hold one folder for each class, as train/ does"
            )
        for label, wnid in enumerate(wnids):
            if wnid not in present:
                continue
            files = sorted(
                file
                for file in os.listdir(os.path.join(root, wnid))
                if file.lower().endswith(_IMAGE_ENDINGS)
            )
            names += files
            labels += [label] * len(files)
        if not names:
            raise FileNotFoundError(f"no images in {root}/<wnid>/*.JPEG (data.options.path)")
        # Byte strings: a quarter of the memory, which every worker process holds too.
        encoded = np.array([os.fsencode(name) for name in names])
        return cls(root, wnids, encoded, np.array(labels, np.int32))

    def path(self, index: int) -> str:
        """Full path of an example's file."""
        name = os.fsdecode(bytes(self.names[index]))
        return os.path.join(self.root, self.wnids[self.labels[index]], name)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.path(index)
        try:
            encoded = pathlib.Path(path).read_bytes()
        except OSError as error:
            raise OSError(f"cannot read image {path}: {error.strerror}") from error
        return {"bytes": encoded, "label": self.labels[index], "name": path}


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """Encoded images of one split of a prepared TFDS data set.

    Attributes:
      directory: the version's folder, which holds `dataset_info.json`. split: TFDS's name.
    """

    directory: str
    split: str

    @classmethod
    def open(cls, path: pathlib.Path, split: str) -> TfdsSource:
        """Finds the newest prepared version at or below `path`; checks that Grain can read it."""
        prepared = [path] if (path / "dataset_info.json").is_file() else []
        for name in ("imagenet2012", "imagenet2012_folders"):
            versions = [info.parent for info in path.glob(f"{name}/*.*.*/dataset_info.json")]
            prepared += sorted(versions, key=_version, reverse=True)
        if not prepared:
            raise FileNotFoundError(
                f"no prepared imagenet2012 in {path} (data.options.path): neither train/<wnid>/ "
                "folders nor imagenet2012/<version>/dataset_info.json are there"
            )
        directory = prepared[0]
        stored = json.loads((directory / "dataset_info.json").read_text()).get("fileFormat")
        if stored != "array_record":
            raise ValueError(
                f"{directory} (data.options.path) is stored as {stored or 'tfrecord'}; prepare it "
                "as array_record: tfds build imagenet2012 --file_format=array_record"
            )
        return cls(str(directory), split)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return tfds.builder_from_directory(self.directory).info.features["label"].num_classes

    @functools.cached_property
    def _records(self) -> Sequence[dict[str, Any]]:
        builder = tfds.builder_from_directory(self.directory)
        # The image stays encoded: Pillow decodes it in the transform, where errors can be named.
        decoders = {"image": tfds.decode.SkipDecoding()}
        return builder.as_data_source(self.split, decoders=decoders)

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to worker processes; each opens its own.
        return {"directory": self.directory, "split": self.split}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        name = record.get("file_name", f"example {index}")
        name = name.decode() if isinstance(name, bytes) else str(name)
        return {
            "bytes": record["image"],
            "label": np.int32(record["label"]),
            "name": f"{name} in {self.directory}",
        }


def decode(encoded: bytes, name: str) -> Image.Image:
    """An RGB image from JPEG or PNG bytes.

    Raises:
      ValueError: one line naming the file.
    """
    try:
        return Image.open(io.BytesIO(encoded)).convert("RGB")
    except Exception as error:
        # Pillow raises many types for damaged files (OSError, SyntaxError, struct.error, ...), and
        # some of their texts show an object's address.
        reason = str(error).partition("<_io")[0].strip() or type(error).__name__
        raise ValueError(f"cannot decode image {name}: {reason}") from error


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """timm's ImageNet training transform; the attributes are the options of the same names."""

    image_size: int
    augment: bool
    scale: tuple[float, float]
    ratio: tuple[float, float]
    color_jitter: float
    rand_augment: tuple[float, float, bool] | None
    jitter_too: bool
    crop_interpolations: tuple[Image.Resampling, ...]
    erasing: float

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image = decode(example["bytes"], example["name"])
        image = image_augmentation.random_resized_crop(
            rng, image, self.image_size, self.scale, self.ratio, self.crop_interpolations
        )
        image = image_augmentation.random_horizontal_flip(rng, image)
        if self.augment and self.rand_augment:
            image = image_augmentation.rand_augment(rng, image, *self.rand_augment)
        if self.augment and self.color_jitter and (self.jitter_too or not self.rand_augment):
            image = image_augmentation.color_jitter(rng, image, self.color_jitter)
        pixels = image_augmentation.normalize(image)
        if self.augment:
            pixels = image_augmentation.random_erasing(rng, pixels, self.erasing)
        return {"image": pixels, "label": np.int32(example["label"])}


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Shorter side resized, center crop, normalization."""

    image_size: int
    crop_fraction: float
    interpolation: Image.Resampling

    def __call__(self, example: Mapping[str, Any]) -> dict[str, Any]:
        image = decode(example["bytes"], example["name"])
        image = image_augmentation.center_crop(
            image, self.image_size, self.crop_fraction, self.interpolation
        )
        return {
            "image": image_augmentation.normalize(image),
            "label": np.int32(example["label"]),
        }


def train_transform(options: Mapping[str, Any]) -> TrainTransform:
    """The training transform of these options."""
    name = options["crop_interpolation"]
    if name != "random" and name not in _INTERPOLATIONS:
        raise ValueError(
            f"data.options.crop_interpolation must be one of random, {', '.join(_INTERPOLATIONS)}, "
            f"not {name!r}"
        )
    drawn = image_augmentation.INTERPOLATIONS
    return TrainTransform(
        image_size=options["image_size"],
        augment=bool(options["augment"]),
        scale=tuple(options["scale"]),
        ratio=tuple(options["ratio"]),
        color_jitter=float(options["color_jitter"]),
        rand_augment=parse_rand_augment(options["rand_augment"]),
        jitter_too=bool(options["jitter_too"]),
        crop_interpolations=drawn if name == "random" else (_INTERPOLATIONS[name],),
        erasing=float(options["erasing"]),
    )


def eval_transform(options: Mapping[str, Any]) -> EvalTransform:
    """The evaluation transform of these options."""
    name = options["interpolation"]
    if name not in _INTERPOLATIONS:
        raise ValueError(
            f"data.options.interpolation must be one of {', '.join(_INTERPOLATIONS)}, not {name!r}"
        )
    return EvalTransform(
        options["image_size"], float(options["crop_fraction"]), _INTERPOLATIONS[name]
    )


def read_image(path: str | os.PathLike, options: Mapping[str, Any]) -> np.ndarray:
    """One image file as evaluation sees it, float32 [S, S, 3]."""
    example = {"bytes": pathlib.Path(path).read_bytes(), "name": os.fspath(path), "label": 0}
    return eval_transform(options)(example)["image"]


def parse_rand_augment(text: str) -> tuple[float, float, bool] | None:
    """(magnitude, its std, increasing) of timm's `rand-mM-mstdS-inc1`; None for the empty string.

    Raises:
      ValueError: another form.
    """
    if not text:
        return None
    magnitude, std, increasing = 10.0, 0.0, False
    policy, *sections = text.split("-")
    try:
        if policy != "rand":
            raise ValueError
        for section in sections:
            if section.startswith("mstd"):
                std = float(section[4:])
            elif section in ("inc0", "inc1"):
                increasing = section == "inc1"
            elif section.startswith("m"):
                magnitude = float(section[1:])
            else:
                raise ValueError
    except ValueError:
        raise ValueError(
            f"data.options.rand_augment must look like rand-m9-mstd0.5, not {text!r}"
        ) from None
    return magnitude, std, increasing


def _subfolders(root: str) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no folder {root} (data.options.path must hold train/<wnid>/*.JPEG and "
            "val/<wnid>/*.JPEG)"
        ) from None


def _classes(path: str) -> tuple[str, ...]:
    return tuple(_subfolders(os.path.join(path, _FOLDERS["train"])))


def _version(directory: pathlib.Path) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in directory.name.split("."))
