"""Sliding-window inference of segmentation networks, in memory and streamed through files."""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.biomedical import ensembling, sliding_window
from train.data.medical_files import DataError, _nibabel


@dataclasses.dataclass(frozen=True)
class Windows:
    """How a network is slid over a volume.

    Attributes:
      tile: voxels per axis; two axes for networks that see slices.
      classes: output channels. regions: sigmoid outputs instead of softmax.
      step: of windows, in tiles. mirror_axes: spatial axes (of the tile) of test-time mirroring.
      context: neighbor slices on each side. view: axis whose slices a flat network sees.
      batch: windows at once.
    """

    tile: tuple[int, ...]
    classes: int
    regions: bool = False
    step: float = 0.5
    mirror_axes: tuple[int, ...] = ()
    context: int = 0
    view: int = 0
    batch: int = 4

    @property
    def volume_tile(self) -> tuple[int, ...]:
        """The tile over z, y, x."""
        return self.tile if len(self.tile) == 3 else (1, *self.tile)


@functools.lru_cache(maxsize=32)
def compiled(module: nn.Module, flat: bool, mirror_axes: tuple[int, ...]):
    """`(variables, tiles [B, *tile, C]) -> logits`, mirrored; one compilation a shape."""

    def logits(variables, tiles):
        found = module.apply(variables, tiles)
        found = found[0] if isinstance(found, tuple) else found
        return found.astype(jnp.float32)

    run = sliding_window.mirrored(logits, mirror_axes)

    def whole(variables, tiles):
        if flat:
            return run(variables, tiles[:, 0])[:, None]
        return run(variables, tiles)

    return jax.jit(whole)


def _predictor(module, variables, windows: Windows):
    call = compiled(module, len(windows.tile) == 2, windows.mirror_axes)
    return functools.partial(call, variables)


def predict_logits(
    module: nn.Module, variables: Any, image: np.ndarray, windows: Windows
) -> np.ndarray:
    """Logits float32 [z, y, x, K] of an image [z, y, x, C]."""
    found, _ = sliding_window.sliding_window(
        _predictor(module, variables, windows),
        np.moveaxis(image, windows.view, 0) if windows.view else image,
        windows.volume_tile,
        classes=windows.classes,
        step=windows.step,
        batch=windows.batch,
        context=windows.context,
    )
    return np.moveaxis(found, 0, windows.view) if windows.view else found


def to_probabilities(logits: np.ndarray, regions: bool = False) -> np.ndarray:
    """Softmax over classes, or a sigmoid of every region."""
    if regions:
        return 1 / (1 + np.exp(-logits))
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def predict_probabilities(
    module: nn.Module, members: Sequence[Any], image: np.ndarray, windows: Windows
) -> np.ndarray:
    """Probabilities [z, y, x, K] averaged over the variables of identical models."""
    return ensembling.average(
        [
            to_probabilities(predict_logits(module, v, image, windows), windows.regions)
            for v in members
        ]
    )


# -- volumes larger than memory --------------------------------------------------------------------


class FileArray:
    """An array in a file of which only the blocks at hand are in memory.

    Blocks are read and written by position: a memory map would count every page around the rows
    it touches as resident.
    """

    def __init__(self, path: str | os.PathLike, shape, dtype, offset: int = 0, order: str = "C"):
        self.path, self.shape, self.dtype = Path(path), tuple(shape), np.dtype(dtype)
        self.offset, self.order = offset, order

    @classmethod
    def create(cls, path, shape, dtype, offset: int = 0) -> FileArray:
        """A file of zeros; it takes disk space only where it is written."""
        size = offset + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        with open(path, "r+b" if Path(path).exists() else "w+b") as file:
            file.truncate(size)
        return cls(path, shape, dtype, offset)

    def _ranges(self, where) -> list[range]:
        where = where if isinstance(where, tuple) else (where,)
        where = (*where, *(slice(None),) * (len(self.shape) - len(where)))
        return [range(*w.indices(n)) for w, n in zip(where, self.shape)]

    def _runs(self, ranges: list[range]):
        """(index into the block, byte offset) of every run that is contiguous in the file."""
        whole = len(ranges)
        while whole > 1 and len(ranges[whole - 1]) == self.shape[whole - 1]:
            whole -= 1
        # Axes before `leading` are walked; the run covers the rest.
        leading = whole - 1
        strides = np.cumprod([1, *self.shape[:0:-1]], dtype=np.int64)[::-1] * self.dtype.itemsize
        last = sum(int(r.start * s) for r, s in zip(ranges[leading:], strides[leading:]))
        for index in np.ndindex(*(len(r) for r in ranges[:leading])):
            place = sum(int(r[i] * s) for r, i, s in zip(ranges, index, strides))
            yield index, self.offset + place + last

    def __getitem__(self, where) -> np.ndarray:
        if self.order != "C":
            flipped = FileArray(self.path, self.shape[::-1], self.dtype, self.offset)
            where = where if isinstance(where, tuple) else (where,)
            where = (*where, *(slice(None),) * (len(self.shape) - len(where)))
            return flipped[where[::-1]].transpose()
        ranges = self._ranges(where)
        block = np.empty([len(r) for r in ranges], self.dtype)
        if block.size:
            with open(self.path, "rb", buffering=0) as file:
                for index, place in self._runs(ranges):
                    run = memoryview(block[index]).cast("B")
                    if os.preadv(file.fileno(), [run], place) != run.nbytes:
                        raise DataError(f"{self.path}: the file ends too early")
        return block

    def __setitem__(self, where, values) -> None:
        ranges = self._ranges(where)
        shape = [len(r) for r in ranges]
        block = np.ascontiguousarray(np.broadcast_to(values, shape), self.dtype)
        if block.size:
            with open(self.path, "r+b", buffering=0) as file:
                for index, place in self._runs(ranges):
                    os.pwritev(file.fileno(), [memoryview(block[index]).cast("B")], place)


class LazyVolume:
    """A volume [z, y, x, 1] on disk that is read block by block and normalized on the way.

    .npy and uncompressed .nii; `shift` and `scale` are applied as (x - shift) / scale.

    Raises DataError for compressed and unknown formats.
    """

    def __init__(self, path: str | os.PathLike, shift: float = 0.0, scale: float = 1.0):
        self.path, self.shift, self.scale = Path(path), shift, scale
        name = self.path.name.lower()
        self.affine, self.spacing = np.eye(4), (1.0, 1.0, 1.0)
        if name.endswith(".npy"):
            header = np.load(self.path, mmap_mode="r", allow_pickle=False)
            order = "F" if header.flags.f_contiguous and not header.flags.c_contiguous else "C"
            self._blocks = FileArray(self.path, header.shape, header.dtype, header.offset, order)
            self._transposed = False
        elif name.endswith(".nii"):
            image = _nibabel().load(self.path, mmap=False)
            self._blocks, self._transposed = image.dataobj, True
            self.affine = image.affine
            self.spacing = tuple(float(z) for z in image.header.get_zooms()[:3][::-1])
        else:
            raise DataError(
                f"{path}: streaming reads .npy and uncompressed .nii; decompress the file first"
            )
        shape = tuple(self._blocks.shape)
        if len(shape) != 3:
            raise DataError(f"{path}: streaming needs a volume of 3 axes, got {shape}")
        self.shape = (*(shape[::-1] if self._transposed else shape), 1)

    def __getitem__(self, where: tuple[slice, ...]) -> np.ndarray:
        where = tuple(where)[:3]
        if self._transposed:
            block = np.transpose(np.asarray(self._blocks[where[::-1]]), (2, 1, 0))
        else:
            block = self._blocks[where]
        return ((np.asarray(block, np.float32) - self.shift) / self.scale)[..., None]

    def standardized(self, planes: int = 8) -> LazyVolume:
        """The same volume with mean 0 and deviation 1, from one pass over it.

        Raises DataError for NaN or infinite voxels.
        """
        total = squares = 0.0
        count = int(np.prod(self.shape))
        for z in range(0, self.shape[0], planes):
            part = self[z : z + planes, :, :].astype(np.float64)
            total += float(part.sum())
            squares += float(np.square(part).sum())
        if not np.isfinite(squares):
            raise DataError(f"{self.path}: the volume has NaN or infinite voxels")
        mean = total / count
        deviation = max(max(squares / count - mean**2, 0.0) ** 0.5, 1e-8)
        return LazyVolume(self.path, self.shift + mean * self.scale, self.scale * deviation)


def label_file(path: str | os.PathLike, volume: LazyVolume) -> FileArray:
    """An empty uint8 label map [z, y, x] (or .nii, x fastest) to be written block by block.

    Raises DataError for an ending other than .npy and .nii.
    """
    path, shape = Path(path), volume.shape[:3]
    if path.suffix == ".npy":
        array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        offset = array.offset
        del array
        return FileArray(path, shape, np.uint8, offset)
    if path.suffix != ".nii":
        raise DataError(f"{path}: streamed labels are written as .npy or .nii")
    nibabel = _nibabel()
    header = nibabel.Nifti1Image(np.zeros((1, 1, 1), np.uint8), volume.affine).header
    header.set_data_shape(shape[::-1])
    header["vox_offset"] = 352
    with open(path, "wb") as file:
        file.write(header.binaryblock)
        file.write(b"\0" * 4)
    # NIfTI's x runs fastest: [z, y, x] in C order.
    return FileArray.create(path, shape, np.uint8, 352)


def stream_labels(
    module: nn.Module,
    members: Sequence[Any],
    volume: Any,
    output: str | os.PathLike,
    windows: Windows,
    scratch: str | os.PathLike | None = None,
) -> int:
    """Labels of a volume that need not fit into memory, written as they are finished.

    Memory holds a few windows; sums of the row of windows at hand are in a file below `scratch`
    (by default beside the output). `members` are averaged on logits. The output has a temporary
    name until it is complete.

    Args:
      volume: a `LazyVolume` (or an array [z, y, x, C]), already normalized.

    Returns the number of windows.
    """
    output = Path(output)
    part = output.with_name("part." + output.name)
    labels = label_file(part, volume)

    def write(where, logits, weights):
        del weights
        if windows.regions:
            raise ValueError("streaming writes exclusive classes, not regions")
        labels[where] = logits.argmax(-1).astype(np.uint8)

    calls = [_predictor(module, v, windows) for v in members]

    def predict(tiles):
        return sum(np.asarray(call(tiles)) for call in calls) / len(calls)

    with tempfile.TemporaryDirectory(dir=scratch or output.parent, prefix=".scratch.") as folder:

        def make(shape):
            return FileArray.create(Path(folder) / "sums", shape, np.float32)

        count = sliding_window.stream(
            predict,
            volume,
            windows.volume_tile,
            write,
            classes=windows.classes,
            step=windows.step,
            batch=windows.batch,
            context=windows.context,
            scratch=make,
        )
    part.replace(output)
    return count
