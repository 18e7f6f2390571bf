"""The MNI152 template as a challenge: T1 to gray and white matter, slabs of slices as cases.

The three volumes (1 mm) come with the package nilearn, which is not a dependency: install it, or
name its wheel. Tissue is the largest of the probability maps of gray matter, white matter and the
rest. Slabs of the lower half of the head, each cut into a left and a right case, are training
cases, those of the upper half test cases.
"""

from __future__ import annotations

import importlib.util
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from train.data import medical_files
from train.data.medical_files import DataError

FILES = {k: f"mni_icbm152_{k}_tal_nlin_sym_09a_converted.nii.gz" for k in ("t1", "gm", "wm")}
_FOLDER = "nilearn/datasets/data/"


def volumes(wheel: str | Path | None = None) -> dict[str, np.ndarray]:
    """`t1`, `gm`, `wm` float32 [z, y, x] at 1 mm, from installed nilearn or from its wheel.

    Raises DataError when neither is there.
    """
    if wheel is not None:
        with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
            archive.extractall(folder, [_FOLDER + name for name in FILES.values()])
            return _read(Path(folder) / _FOLDER)
    spec = importlib.util.find_spec("nilearn")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the brain template comes with nilearn: pip install nilearn")
    return _read(Path(spec.submodule_search_locations[0]) / "datasets" / "data")


def _read(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for key, name in FILES.items():
        found[key] = np.asarray(medical_files.read_volume(folder / name)[0], np.float32)
    return found


def _every(array: np.ndarray, step: int) -> np.ndarray:
    """Means over blocks of `step` voxels along every axis."""
    size = [n // step * step for n in array.shape]
    blocks = array[tuple(slice(0, n) for n in size)]
    shape = [m for n in size for m in (n // step, step)]
    return blocks.reshape(shape).mean((1, 3, 5))


def tissue(wheel: str | Path | None = None, step: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """T1 float32 and labels uint8 (0 rest, 1 gray, 2 white matter), both [z, y, x] at `step` mm."""
    found = {k: _every(v, step) for k, v in volumes(wheel).items()}
    gray, white = found["gm"], found["wm"]
    scale = max(float(gray.max()), float(white.max()))
    rest = np.maximum(0, scale - gray - white)
    return found["t1"], np.stack([rest, gray, white]).argmax(0).astype(np.uint8)


def write_challenge(
    root: str | Path, wheel: str | Path | None = None, *, step: int = 2, thickness: int = 8
) -> None:
    """A raw challenge folder: slabs of `thickness` slices at `step` mm.

    Slabs without tissue are left out.
    """
    t1, label = tissue(wheel, step)
    middle = t1.shape[0] // 2
    for split, first, after in (("Ts", middle, t1.shape[0]), ("Tr", 0, middle)):
        cases = []
        for z in range(first, after - thickness + 1, thickness):
            part = slice(z, z + thickness)
            if (label[part] > 0).mean() < 0.02:
                continue
            half = t1.shape[-1] // 2
            for side, columns in (("a", slice(0, half)), ("b", slice(half, 2 * half))):
                box = (part, slice(None), columns)
                case = (t1[box][..., None], label[box], (float(step),) * 3)
                cases.append((f"slab{z:03d}{side}", *case))
        medical_files.write_dataset(
            root,
            cases,
            channels=("T1",),
            labels={"background": 0, "gray matter": 1, "white matter": 2},
            split=split,
        )
