"""Track 1 of AIM 2022: pictures shrunk by Pillow's bicubic and compressed by JPEG.

Folders as DIV2K has them: `PATH/DIV2K_train_HR/0001.png`, low-resolution JPEGs under the same stem
in a folder of their own, or none: then crops are degraded on the fly, equal to the crops of the
degraded picture. Without a path six of scikit-image's color photographs train and the upper left
384x384 pixels of `astronaut` and `coffee` are the test; they are copied out of the installed
package into such folders, never downloaded.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from train.data import degradation, image_pairs, preparation
from train.data.image_pairs import Pair, Reader

# hr, lr, val_hr, val_lr: folders below `path` (hr may be several, separated by commas; an empty
# lr means on the fly). quality: a number, or several of which each example draws one; 0 is no JPEG
# (classical super-resolution). patch, grid:
# side and grid of training crops in low-resolution pixels (JPEG's blocks are 8). scale 1: artifact
# removal. kept: pictures held decoded in memory. crops: examples a picture counts for in an epoch.
OPTIONS: dict[str, Any] = {
    "hr": "DIV2K_train_HR",
    "lr": "",
    "val_hr": "DIV2K_valid_HR",
    "val_lr": "",
    "scale": 4,
    "quality": 10,
    "val_quality": 10,
    "patch": 48,
    "grid": 8,
    "augment": True,
    "gray": False,
    "modcrop": True,
    "kept": 16,
    "crops": 64,
    "bundled": False,
    "threads": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {"skimage": {"bundled": True}}
SPLITS = ("train", "test")
PUBLISHED_SIZES = {"train": 800, "test": 100}
SCALES = (1, 2, 3, 4, 8)

TRAINED = (
    "chelsea.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
HELD_OUT, HELD_OUT_SIDE = ("astronaut.png", "coffee.png"), 384
_FOLDER = "skimage_compressed_images"


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`lr` float32 [p, p, C] and `hr` [p * scale, p * scale, C], both in [0, 1]."""
    patch, scale = options["patch"], options["scale"]
    if scale not in SCALES:
        raise ValueError(f"data.options.scale must be one of {SCALES}, not {scale!r}")
    if not isinstance(patch, int) or patch < 8:
        raise ValueError(f"data.options.patch must be an integer of at least 8, not {patch!r}")
    if options["grid"] < 1:
        raise ValueError(f"data.options.grid must be at least 1, not {options['grid']!r}")
    channels = 1 if options["gray"] else 3
    return {
        "lr": jax.ShapeDtypeStruct((patch, patch, channels), np.float32),
        "hr": jax.ShapeDtypeStruct((patch * scale, patch * scale, channels), np.float32),
    }


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Training crops of an epoch and test pictures; DIV2K's where no data is on disk."""
    if options["bundled"]:
        return {"train": len(TRAINED) * options["crops"], "test": len(HELD_OUT)}
    if not options["path"] or not pathlib.Path(options["path"]).expanduser().is_dir():
        return {**PUBLISHED_SIZES, "train": PUBLISHED_SIZES["train"] * options["crops"]}
    return {split: len(source(split, options)) for split in SPLITS}


@dataclasses.dataclass(frozen=True)
class PairSource:
    """Example i is the pair of files `i % n`; where its crop lies is the transform's business."""

    pairs: tuple[Pair, ...]
    crops: int

    def __len__(self) -> int:
        return len(self.pairs) * self.crops

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index % len(self.pairs)]


def source(split: str, options: Mapping[str, Any]) -> PairSource:
    """The pairs of one split.

    Raises FileNotFoundError naming `data.options.path`, or the pictures without a partner.
    """
    options = _with_folder(options)
    if split == "test":
        hr, lr = (image_pairs.option_path(options, name) for name in ("val_hr", "val_lr"))
        return PairSource(tuple(image_pairs.pair_files(hr, lr, "data.options.val_hr")), 1)
    pairs: list[Pair] = []
    large, small = (str(options[name]).split(",") for name in ("hr", "lr"))
    if small != [""] and len(small) != len(large):
        raise ValueError("data.options.lr must name as many folders as data.options.hr")
    root = pathlib.Path(options["path"]).expanduser()
    for number, folder in enumerate(large):
        lr = None if small == [""] else root / small[number].strip()
        pairs += image_pairs.pair_files(root / folder.strip(), lr, "data.options.hr")
    return PairSource(tuple(pairs), options["crops"])


def _with_folder(options: Mapping[str, Any]) -> dict[str, Any]:
    if options["bundled"]:
        folder = preparation.prepare_folder(_FOLDER, options["path"], _copy_photographs)
        return {**options, "path": str(folder)}
    if not options["path"] or not pathlib.Path(options["path"]).expanduser().is_dir():
        raise FileNotFoundError(
            f"no pictures at data.options.path = {options['path'] or ''!r}: set it to the folder "
            f"that holds {options['hr']}/*.png and {options['val_hr']}/*.png"
        )
    return dict(options)


def photograph(file: str) -> np.ndarray:
    """uint8 [H, W, 3] of a picture in the installed scikit-image package."""
    with (importlib.resources.files("skimage") / "data" / file).open("rb") as stream:
        return np.asarray(Image.open(stream).convert("RGB"))


def _copy_photographs(folder: pathlib.Path) -> None:
    for name, files in ((OPTIONS["hr"], TRAINED), (OPTIONS["val_hr"], HELD_OUT)):
        (folder / name).mkdir()
        for file in files:
            pixels = photograph(file)
            if files is HELD_OUT:
                pixels = pixels[:HELD_OUT_SIDE, :HELD_OUT_SIDE]
            stem = file.partition(".")[0]
            Image.fromarray(pixels).save(folder / name / f"{stem}.png", compress_level=1)


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """A crop of both pictures, degraded if need be, and one of the eight symmetries of both.

    Half of the crops that a gray model sees of color pictures are of the full-range luma (KAIR).
    """

    reader: Reader
    scale: int
    qualities: tuple[int, ...]
    patch: int
    grid: int
    augment: bool

    def __call__(self, pair: Pair, rng: np.random.Generator) -> dict[str, np.ndarray]:
        from jaxmodels.restoration import inference

        scale, patch = self.scale, self.patch
        mixed = self.augment and self.reader.gray and pair.lr is None
        hr = self.reader.high(pair.hr, mixed and rng.random() < 0.5)
        rows, columns = hr.shape[0] // scale - patch, hr.shape[1] // scale - patch
        if min(rows, columns) < 0:
            raise ValueError(
                f"{pair.stem}: {hr.shape[0]}x{hr.shape[1]} pixels at scale {scale} are fewer than "
                f"data.options.patch = {patch}"
            )
        top, left = (int(rng.integers(n // self.grid + 1)) * self.grid for n in (rows, columns))
        quality = self.qualities[int(rng.integers(len(self.qualities)))]
        if pair.lr is None:
            lr = image_pairs.degraded_crop(hr, top, left, patch, scale, quality)
        else:
            small = self.reader.low(pair.lr)
            image_pairs.check_pair(small, hr, scale, pair.stem)
            lr = small[top : top + patch, left : left + patch]
        hr = hr[top * scale : (top + patch) * scale, left * scale : (left + patch) * scale]
        if self.augment:
            mode = int(rng.integers(8))
            lr, hr = inference.augment(lr, mode), inference.augment(hr, mode)
        return {"lr": image_pairs.to_floats(lr), "hr": image_pairs.to_floats(hr)}


def _qualities(value: Any) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    if not values or not all(isinstance(q, int) and 0 <= q <= 100 for q in values):
        raise ValueError(
            f"data.options.quality must be numbers from 1 to 100, or 0 for no JPEG, not {value!r}"
        )
    return values


def _reader(options: Mapping[str, Any]) -> Reader:
    return Reader(
        int(options["kept"]), options["scale"], bool(options["gray"]), bool(options["modcrop"])
    )


def train_transform(options: Mapping[str, Any]) -> TrainTransform:
    """The training transform of these options."""
    return TrainTransform(
        _reader(options),
        options["scale"],
        _qualities(options["quality"]),
        options["patch"],
        options["grid"],
        bool(options["augment"]),
    )


def eval_transform(options: Mapping[str, Any]):
    """A fixed crop of each test picture; pictures as a whole come from `eval_images`."""
    transform = dataclasses.replace(train_transform(options), augment=False)
    return image_pairs.FirstDraw(transform)


def eval_images(options: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(stem, low resolution, high resolution) uint8 [H, W, C] of every test picture, as a whole."""
    reader, scale = _reader({**options, "kept": 1}), options["scale"]
    for pair in source("test", options).pairs:
        hr = reader.high(pair.hr)
        if pair.lr is None:
            lr = image_pairs.degrade(hr, scale, _qualities(options["val_quality"])[0])
        else:
            lr = reader.low(pair.lr)
        image_pairs.check_pair(lr, hr, scale, pair.stem)
        yield pair.stem, lr, hr


def shortest_side(options: Mapping[str, Any]) -> int | None:
    """Pixels of the shortest side of a test picture, from the files' heads; None without files."""
    if options["bundled"]:
        return HELD_OUT_SIDE
    folder = options["path"] and image_pairs.option_path(options, "val_hr")
    if not folder or not folder.is_dir():
        return None
    sides = []
    for file in image_pairs.files_by_stem(folder, "data.options.val_hr").values():
        with Image.open(file) as image:
            sides.append(min(image.size))
    return min(sides) // options["scale"] * options["scale"]


def read_image(path, options: Mapping[str, Any]) -> np.ndarray:
    """A compressed low-resolution picture for prediction, uint8 [h, w, C]."""
    return image_pairs.read_rgb(path, bool(options["gray"]))


def upsample(lr: np.ndarray, scale: int) -> np.ndarray:
    """Pillow's bicubic of color or gray pictures: the baseline."""
    if scale == 1:
        return lr
    if lr.shape[-1] == 1:
        return degradation.upsample(lr[..., 0], scale)[..., None]
    return degradation.upsample(lr, scale)
