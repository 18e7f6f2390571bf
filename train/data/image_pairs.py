"""Reading pairs of high- and low-resolution pictures: folders, stems, checks, crops of both.

Pairing is by stem: `DIV2K_train_HR/0001.png` belongs to `LR/0001.jpg`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from jaxmodels.restoration import metrics
from train.data import degradation

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
# JPEG codes 16x16 pixels together at 4:2:0, and a cubic resize reaches 2 pixels beyond a crop:
# a crop degraded with this margin around it, on this grid, equals the degraded picture's crop.
MARGIN = 16


def read_rgb(path: str | pathlib.Path, gray: bool = False, full_range: bool = False) -> np.ndarray:
    """uint8 [H, W, 3] of an image file; with `gray` the luma [H, W, 1] of it.

    The luma of a color picture is BT.601's studio-range Y, rounded, on which published gray results
    are measured; with `full_range` it is JPEG's own Y.

    Raises ValueError for gray pictures where color is wanted, and for pictures with an alpha
    channel or a palette, which are never flattened silently.
    """
    with Image.open(path) as image:
        if image.mode == "L" and gray:
            return np.asarray(image)[..., None]
        if image.mode != "RGB":
            kind = {"L": "a grayscale picture", "RGBA": "a picture with transparency (RGBA)"}
            raise ValueError(
                f"{path}: {kind.get(image.mode, 'a picture of mode ' + image.mode)}; wanted "
                + ("RGB or L" if gray else "RGB; for gray ones use a model with in_chans=1")
            )
        pixels = np.asarray(image.convert("L") if gray and full_range else image)
    if gray and not full_range:
        pixels = np.rint(metrics.luma(pixels)).astype(np.uint8)
    return pixels[..., None] if gray else pixels


def files_by_stem(folder: pathlib.Path, key: str) -> dict[str, pathlib.Path]:
    """{stem: file} of a folder's pictures, sorted. Raises FileNotFoundError naming the option."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} ({key})")
    found = {f.stem: f for f in sorted(folder.iterdir()) if f.suffix.lower() in SUFFIXES}
    if not found:
        raise FileNotFoundError(f"no pictures in {folder} ({key})")
    return found


@dataclasses.dataclass(frozen=True)
class Pair:
    """One picture: its high-resolution file and, unless it is degraded on the fly, its partner."""

    stem: str
    hr: str
    lr: str | None


def pair_files(hr: pathlib.Path, lr: pathlib.Path | None, key: str) -> list[Pair]:
    """Pairs of two folders by stem.

    Raises FileNotFoundError listing up to five pictures without a partner.
    """
    large = files_by_stem(hr, key)
    if lr is None:
        return [Pair(stem, str(file), None) for stem, file in large.items()]
    small = files_by_stem(lr, key)
    alone = [stem for stem in large if stem not in small]
    if alone:
        shown = ", ".join(alone[:5]) + (f" and {len(alone) - 5} more" if alone[5:] else "")
        raise FileNotFoundError(f"no low-resolution partner in {lr} for: {shown}")
    return [Pair(stem, str(file), str(small[stem])) for stem, file in large.items()]


def check_pair(lr: np.ndarray, hr: np.ndarray, scale: int, stem: str) -> None:
    """Raises ValueError with both shapes and the stem where LR * scale is not HR."""
    if (lr.shape[0] * scale, lr.shape[1] * scale) != hr.shape[:2]:
        raise ValueError(
            f"{stem}: low resolution {lr.shape[0]}x{lr.shape[1]} times scale {scale} is not "
            f"{hr.shape[0]}x{hr.shape[1]}"
        )


class Reader:
    """Decoded pictures, the last `kept` of them in memory; travels to workers without them."""

    def __init__(self, kept: int, scale: int, gray: bool, crop: bool):
        self.arguments = (kept, scale, gray, crop)
        self._read = functools.lru_cache(maxsize=kept)(self._decode)

    @property
    def gray(self) -> bool:
        """Whether pictures are read as their luma."""
        return self.arguments[2]

    def __reduce__(self):
        return Reader, self.arguments

    def __eq__(self, other) -> bool:
        return isinstance(other, Reader) and self.arguments == other.arguments

    def __hash__(self) -> int:
        return hash(self.arguments)

    def high(self, path: str, full_range: bool = False) -> np.ndarray:
        """The picture, sides multiples of the scale; `full_range` as in `read_rgb`."""
        return self._read(path, True, full_range)

    def low(self, path: str) -> np.ndarray:
        """The partner as it is."""
        return self._read(path, False, False)

    def _decode(self, path: str, high: bool, full_range: bool) -> np.ndarray:
        _, scale, gray, crop = self.arguments
        image = read_rgb(path, gray, full_range)
        if not high:
            return image
        if crop:
            return degradation.modcrop(image, scale)
        degradation.check_multiple(image, scale, path)
        return image


def degrade(hr: np.ndarray, scale: int, quality: int) -> np.ndarray:
    """`degradation.degrade_image` for color [H, W, 3] and gray [H, W, 1]."""
    if hr.shape[-1] == 1:
        return degradation.degrade_image(hr[..., 0], scale, quality)[..., None]
    return degradation.degrade_image(hr, scale, quality)


def degraded_crop(
    hr: np.ndarray, top: int, left: int, patch: int, scale: int, quality: int
) -> np.ndarray:
    """The crop [patch, patch] at (top, left) of the degraded picture, without degrading all of it.

    hr: uint8 [H, W, C]; top, left, patch in low-resolution pixels.
    """
    height, width = hr.shape[0] // scale, hr.shape[1] // scale

    def span(first: int, size: int) -> tuple[int, int]:
        low = max(0, (first - MARGIN) // MARGIN * MARGIN)
        high = min(size, -(-(first + patch + MARGIN) // MARGIN) * MARGIN)
        return low, high

    (a, b), (c, d) = span(top, height), span(left, width)
    region = hr[a * scale : b * scale, c * scale : d * scale]
    small = degrade(np.ascontiguousarray(region), scale, quality)
    return small[top - a : top - a + patch, left - c : left - c + patch]


@dataclasses.dataclass(frozen=True)
class FirstDraw:
    """A training transform as a fixed one: what it draws from generator 0."""

    transform: Callable[[Any, np.random.Generator], dict[str, np.ndarray]]

    def __call__(self, example: Any) -> dict[str, np.ndarray]:
        return self.transform(example, np.random.default_rng(0))


def to_floats(image: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [0, 1]."""
    return np.ascontiguousarray(image, np.float32) / np.float32(255)


def option_path(options: Mapping[str, Any], name: str) -> pathlib.Path | None:
    """`path / options[name]`, None where the option is empty."""
    folder = options[name]
    return pathlib.Path(options["path"]).expanduser() / folder if folder else None
