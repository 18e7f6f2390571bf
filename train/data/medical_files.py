"""Challenge data on disk: nnU-Net's raw layout, its image formats, and what can be wrong with it.

    imagesTr/CASE_0000.EXT, CASE_0001.EXT, ...   one file a channel
    labelsTr/CASE.EXT                            integers
    imagesTs/..., labelsTs/...                   test cases; labels are optional
    dataset.json   {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1},
                    "numTraining": 20, "file_ending": ".nii.gz"}

A label may be a list of values (a region; then `regions_class_order` says what each region writes)
and the highest may be called `ignore`. Formats: .npy and .npz (spacing in a .json beside it),
.png, .tif (spacing 1), .nii and .nii.gz (extra `medical`). Arrays come as z, y, x.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.biomedical.preprocessing import NO_AXIS
from train.data.stored_arrays import mapped_array

ENDINGS = (".nii.gz", ".nii", ".npy", ".npz", ".png", ".tif", ".tiff")


class DataError(ValueError):
    """Files that do not make a data set; the message names the case and what is wrong."""


def _ending_of(path: Path) -> str:
    for ending in ENDINGS:
        if path.name.lower().endswith(ending):
            return ending
    raise DataError(f"{path}: unknown ending; known are {', '.join(ENDINGS)}")


def _nibabel():
    try:
        import nibabel
    except ImportError:
        raise ImportError(
            'NIfTI files need nibabel: install the extra, pip install "jaxmodels[medical]"'
        ) from None
    return nibabel


def _side_spacing(path: Path, ending: str, axes: int) -> tuple[float, ...]:
    side = path.with_name(path.name[: -len(ending)] + ".json")
    if not side.exists():
        return (1.0,) * axes
    try:
        spacing = tuple(float(s) for s in json.loads(side.read_text())["spacing"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{side}: no readable spacing ({error})") from None
    if len(spacing) != axes:
        raise DataError(f"{side}: spacing {spacing} for an array of {axes} axes")
    return spacing


def read_volume(path: str | os.PathLike) -> tuple[np.ndarray, tuple[float, ...]]:
    """(array [z, y, x] or [z, y, x, channels], spacing (z, y, x) in mm) of one file.

    Flat images get an axis z of one slice with a spacing of 999. Raises DataError for files that
    cannot be read and spacings that are not positive.
    """
    path = Path(path)
    ending = _ending_of(path)
    try:
        array, spacing = _read(path, ending)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not all(np.isfinite(s) and s > 0 for s in spacing):
        raise DataError(f"{path}: spacing {spacing} must be positive")
    return array, spacing


def _read(path: Path, ending: str) -> tuple[np.ndarray, tuple[float, ...]]:
    if ending in (".nii", ".nii.gz"):
        image = _nibabel().load(path)
        array = np.asanyarray(image.dataobj)
        if array.ndim not in (3, 4):
            raise DataError(f"{path}: {array.ndim} axes; a volume has 3 (or 4 with channels)")
        zooms = [float(z) for z in image.header.get_zooms()[:3]]
        return np.transpose(array, (2, 1, 0, *range(3, array.ndim))), tuple(zooms[::-1])
    if ending in (".npy", ".npz"):
        if ending == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            with np.load(path, allow_pickle=False) as stored:
                array = stored[stored.files[0]]
        if array.ndim == 2:
            return array[None], (NO_AXIS, *_side_spacing(path, ending, 2))
        if array.ndim == 3:
            return array, _side_spacing(path, ending, 3)
        raise DataError(f"{path}: an array of {array.ndim} axes, wanted 2 or 3")
    if ending == ".png":
        from PIL import Image

        with Image.open(path) as image:
            array = np.asarray(image)
        # [H, W] or [H, W, channels]; an alpha channel says nothing about the picture.
        array = array[..., :3] if array.ndim == 3 and array.shape[-1] == 4 else array
        return array[None], (NO_AXIS, 1.0, 1.0)
    import tifffile

    array = tifffile.imread(path)
    if array.ndim == 2:
        return array[None], (NO_AXIS, 1.0, 1.0)
    if array.ndim == 3 and array.shape[-1] in (3, 4):
        return array[None, ..., :3], (NO_AXIS, 1.0, 1.0)
    return array, (1.0, 1.0, 1.0)


def write_labels(
    path: str | os.PathLike, labels: np.ndarray, like: str | os.PathLike | None = None
) -> None:
    """A label map [z, y, x] in the format of the path's ending; NIfTI takes the affine of `like`.

    Written to a temporary name first. Raises DataError for labels that the format cannot hold.
    """
    path = Path(path)
    ending = _ending_of(path)
    labels = np.asarray(labels)
    kind = np.uint8 if labels.max(initial=0) < 256 else np.int16
    labels = labels.astype(kind)
    flat = labels[0] if labels.shape[0] == 1 else labels
    part = path.with_name("." + path.name[: -len(ending)] + ".part" + ending)
    if ending in (".nii", ".nii.gz"):
        nibabel = _nibabel()
        affine = nibabel.load(like).affine if like else np.eye(4)
        nibabel.save(nibabel.Nifti1Image(np.transpose(labels, (2, 1, 0)), affine), part)
    elif ending == ".npy":
        np.save(part, flat)
    elif ending == ".npz":
        np.savez_compressed(part, flat)
    elif ending == ".png":
        from PIL import Image

        if flat.ndim != 2:
            raise DataError(f"{path}: a PNG holds one slice, the labels are {labels.shape}")
        Image.fromarray(flat).save(part)
    else:
        import tifffile

        tifffile.imwrite(part, flat)
    part.replace(path)


@dataclasses.dataclass(frozen=True)
class RawDataset:
    """A folder in nnU-Net's raw layout.

    Attributes:
      channels: names by number. labels: name -> value or values. ending: of all files.
      region_order: what each region writes, where labels are regions.
    """

    root: Path
    channels: tuple[str, ...]
    labels: dict[str, int | tuple[int, ...]]
    ending: str
    region_order: tuple[int, ...] = ()

    @classmethod
    def open(cls, root: str | os.PathLike) -> RawDataset:
        """Raises DataError: no or a broken dataset.json, labels that are not 0, 1, 2, ..."""
        root = Path(root)
        file = root / "dataset.json"
        if not file.is_file():
            raise DataError(f"{root}: no dataset.json; see nnU-Net's raw layout in the docs")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            names = content["channel_names"]
            channels = tuple(str(names[key]) for key in sorted(names, key=int))
            labels = {
                str(name): tuple(int(v) for v in value) if isinstance(value, list) else int(value)
                for name, value in content["labels"].items()
            }
            ending = str(content["file_ending"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file}: {type(error).__name__} {error}") from None
        if ending not in ENDINGS:
            raise DataError(f"{file}: file_ending {ending!r}; known: {', '.join(ENDINGS)}")
        order = tuple(int(v) for v in content.get("regions_class_order", ()))
        found = cls(root, channels, labels, ending, order)
        found._check_labels(file)
        return found

    def _check_labels(self, file: Path) -> None:
        values = sorted({v for value in self.labels.values() for v in np.atleast_1d(value)})
        if values != list(range(len(values))) or self.labels.get("background") != 0:
            raise DataError(
                f"{file}: labels must be background 0 and then 1, 2, ... without gaps, not "
                f"{[int(v) for v in values]}"
            )
        if "ignore" in self.labels and self.labels["ignore"] != values[-1]:
            raise DataError(f"{file}: the ignore label must be the highest, {int(values[-1])}")
        if self.has_regions and len(self.region_order) != len(self.targets):
            raise DataError(f"{file}: regions_class_order must name {len(self.targets)} values")

    @property
    def has_regions(self) -> bool:
        """Whether some label is a list of values."""
        return any(isinstance(v, tuple) for v in self.labels.values())

    @property
    def ignore_label(self) -> int | None:
        """The value that marks unannotated voxels."""
        return self.labels.get("ignore")

    @property
    def values(self) -> tuple[int, ...]:
        """Every value that a label map may hold."""
        return tuple(sorted({int(v) for x in self.labels.values() for v in np.atleast_1d(x)}))

    @property
    def targets(self) -> dict[str, tuple[int, ...]]:
        """What is evaluated: name -> values, background and ignore left out."""
        return {
            name: tuple(int(v) for v in np.atleast_1d(value))
            for name, value in self.labels.items()
            if name not in ("background", "ignore")
        }

    @property
    def outputs(self) -> int:
        """Channels of a network: regions, or classes with the background."""
        return len(self.targets) + (0 if self.has_regions else 1)

    def cases(self, split: str = "Tr") -> list[str]:
        """Sorted ids of `imagesTr` or `imagesTs`.

        Raises DataError: no such folder (training), ids that occur twice.
        """
        folder = self.root / f"images{split}"
        if not folder.is_dir():
            if split == "Tr":
                raise DataError(f"{folder}: no such folder")
            return []
        pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(self.ending)}")
        found = [m for f in sorted(folder.iterdir()) if (m := pattern.fullmatch(f.name))]
        if not found and split == "Tr":
            raise DataError(f"{folder}: no files CASE_0000{self.ending}")
        first = Counter(m[1].lower() for m in found if m[2] == "0000")
        double = [name for name, n in first.items() if n > 1]
        if double:
            raise DataError(f"{folder}: case ids occur twice (but for their case): {double[:5]}")
        return sorted({m[1] for m in found})

    def image_files(self, case: str, split: str = "Tr") -> list[Path]:
        """The case's files in the order of channels. Raises DataError when their number differs."""
        folder = self.root / f"images{split}"
        files = sorted(folder.glob(f"{case}_[0-9][0-9][0-9][0-9]{self.ending}"))
        if len(files) != len(self.channels) and not (len(files) == 1 and self._is_flat()):
            raise DataError(
                f"case {case}: {len(files)} channel files, dataset.json has "
                f"{len(self.channels)} channels {self.channels}"
            )
        return files

    def _is_flat(self) -> bool:
        return self.ending in (".png", ".tif", ".tiff")

    def image(self, case: str, split: str = "Tr") -> tuple[np.ndarray, tuple[float, ...]]:
        """Image float32 [z, y, x, C] and spacing (z, y, x).

        Raises DataError: channels that differ in number, shape or spacing; NaN or infinite voxels.
        """
        parts, geometry = [], None
        for file in self.image_files(case, split):
            array, spacing = read_volume(file)
            array = array[..., None] if array.ndim == 3 else array
            here = (array.shape[:3], spacing)
            if geometry is not None and not _same_geometry(geometry, here):
                raise DataError(
                    f"case {case}: channels differ: shape {geometry[0]} spacing {geometry[1]} and "
                    f"shape {here[0]} spacing {here[1]} ({file.name})"
                )
            geometry = geometry or here
            parts.append(np.asarray(array, np.float32))
        image = np.concatenate(parts, -1)
        if image.shape[-1] != len(self.channels):
            raise DataError(
                f"case {case}: {image.shape[-1]} channels, dataset.json has {len(self.channels)}"
            )
        if not np.isfinite(image).all():
            raise DataError(f"case {case}: the image has NaN or infinite voxels")
        return image, geometry[1]

    def label_file(self, case: str, split: str = "Tr") -> Path:
        """Where the case's label map is."""
        return self.root / f"labels{split}" / f"{case}{self.ending}"

    def label(self, case: str, split: str = "Tr") -> tuple[np.ndarray, tuple[float, ...]]:
        """Label map int16 [z, y, x] and spacing.

        Raises DataError: no file, fractions, values that dataset.json does not have.
        """
        file = self.label_file(case, split)
        if not file.is_file():
            raise DataError(f"case {case}: no label file {file}")
        array, spacing = read_volume(file)
        if array.ndim != 3:
            raise DataError(f"case {case}: label map of shape {array.shape}")
        if array.dtype.kind == "f":
            fractions = np.unique(array[array != np.round(array)])
            if fractions.size:
                shown = [float(v) for v in fractions[:5]]
                raise DataError(f"case {case}: label values must be integers, got {shown}")
        outside = sorted(set(np.unique(array).astype(int).tolist()) - set(self.values))
        if outside:
            raise DataError(
                f"case {case}: label values {outside} are not in dataset.json, which has "
                f"{list(self.values)}"
            )
        return np.asarray(array).astype(np.int16), spacing

    def training_case(self, case: str, split: str = "Tr"):
        """(image, label, spacing). Raises DataError when image and label map do not match."""
        image, spacing = self.image(case, split)
        label, label_spacing = self.label(case, split)
        if not _same_geometry((image.shape[:3], spacing), (label.shape, label_spacing)):
            raise DataError(
                f"case {case}: image shape {image.shape[:3]} spacing {spacing}, label shape "
                f"{label.shape} spacing {label_spacing}"
            )
        return image, label, spacing

    def to_json(self) -> dict[str, Any]:
        """What prepared folders keep of it."""
        return {
            "channels": self.channels,
            "labels": self.labels,
            "targets": self.targets,
            "ending": self.ending,
            "regions": self.has_regions,
            "region_order": self.region_order,
            "ignore_label": self.ignore_label,
            "outputs": self.outputs,
        }


def _same_geometry(a, b) -> bool:
    return tuple(a[0]) == tuple(b[0]) and np.allclose(a[1], b[1], rtol=1e-3, atol=1e-4)


def write_dataset(
    root: str | os.PathLike,
    cases: Sequence[tuple[str, np.ndarray, np.ndarray, Sequence[float]]],
    *,
    channels: Sequence[str],
    labels: dict[str, Any],
    split: str = "Tr",
) -> None:
    """Cases (id, image [*S, C], label [*S], spacing) as .npy files in the raw layout."""
    root = Path(root)
    (root / f"images{split}").mkdir(parents=True, exist_ok=True)
    (root / f"labels{split}").mkdir(parents=True, exist_ok=True)
    for name, image, label, spacing in cases:
        side = json.dumps({"spacing": [float(s) for s in spacing]})
        for c in range(image.shape[-1]):
            stem = root / f"images{split}" / f"{name}_{c:04d}"
            np.save(stem.with_suffix(".npy"), image[..., c].astype(np.float32))
            stem.with_suffix(".json").write_text(side)
        stem = root / f"labels{split}" / name
        np.save(stem.with_suffix(".npy"), label.astype(np.uint8))
        stem.with_suffix(".json").write_text(side)
    if split == "Tr":
        content = {
            "channel_names": {str(i): name for i, name in enumerate(channels)},
            "labels": labels,
            "numTraining": len(cases),
            "file_ending": ".npy",
        }
        (root / "dataset.json").write_text(json.dumps(content, indent=1))


@functools.lru_cache(maxsize=512)
def mapped(path: str) -> np.ndarray:
    """A .npy file, memory-mapped once."""
    return mapped_array(path)
