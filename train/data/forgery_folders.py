"""Faces in the folders of OpenWorld-DeepFakeAttribution: `PATH/<group>/<method>/<dataset>/*.png`.

Rules after TencentYoutuResearch/OpenWorld-DeepFakeAttribution@22e2584 (`owdfa/datasets/dfa.py`,
`scripts/preprocess/create_academic_meta.ipynb`), draws there are places in order here: a class is a
method with its data set (StyleGAN2 of two data sets are two classes), a fifth of every class tests,
three quarters of the rest of a known class are labeled. Files are named `...-VIDEO-FRAME.png`, or
lie in folders of videos below the data set's.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp")
REAL = ("real", "original")  # names of methods that are none
# Labeled methods of protocol 1; protocol 2 adds `Real/faceforensics`.
KNOWN_METHODS = (
    *("Deepfakes", "Face2Face", "DeepFaceLab", "FOMM"),
    *("MaskGAN", "FaceAPP", "StyleGAN", "CycleGAN"),
)
_TESTS, _UNLABELED = 5, 4  # every fifth file (or video) tests, every fourth of a known class


@dataclasses.dataclass(frozen=True)
class Face:
    """One file: its class, the number of its video, and whether training knows its class."""

    path: str
    label: int
    video: int
    labeled: bool


@dataclasses.dataclass(frozen=True)
class Folders:
    """What of a root is used.

    Attributes:
      known: methods (`StyleGAN`, or `StyleGAN2/ForgeryNet` of one data set) whose classes come
        first and are labeled. real: whether methods named `real` or `original` are classes.
      by_video: split whole videos, or single files as officially in attribution.
    """

    root: str
    known: tuple[str, ...] = ()
    real: bool = True
    by_video: bool = False

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """`METHOD/DATASET` of every class, known ones first in the order of `known`.

        Raises FileNotFoundError without any, ValueError for known methods that are not there.
        """
        found = sorted({f"{p.parent.name}/{p.name}" for p in self._folders()})
        if not found:
            raise FileNotFoundError(
                f"data.options.path {self.root}: no <group>/<method>/<dataset> folders there"
            )
        chosen = []
        for name in self.known:
            own = [c for c in found if name in (c, c.split("/")[0])]
            if not own:
                raise ValueError(
                    f"data.options.known_methods: no folder of {name!r}; there are {found}"
                )
            chosen += [c for c in own if c not in chosen]
        return (*chosen, *(c for c in found if c not in chosen))

    @functools.cached_property
    def known_count(self) -> int:
        """How many classes are known."""
        return sum(bool({c, c.split("/")[0]} & set(self.known)) for c in self.classes)

    def is_real(self, label: int) -> bool:
        """Whether a class is of real faces."""
        return self.classes[label].split("/")[0].lower() in REAL

    def _folders(self) -> list[Path]:
        folders = sorted(p for p in Path(self.root).glob("*/*/*") if p.is_dir())
        return [p for p in folders if self.real or p.parent.name.lower() not in REAL]

    def faces(self, split: str) -> tuple[Face, ...]:
        """The files of `train` or `test`, class by class."""
        return _faces(self, split)

    def by_class(self, split: str, labeled: bool) -> tuple[tuple[Face, ...], ...]:
        """Files of each class that has any: the labeled ones, or those without a label."""
        return _by_class(self, split, labeled)


def folders(root: str, known: tuple[str, ...], real: bool, by_video: bool) -> Folders:
    """The same object for the same arguments, so that folders are listed once."""
    return _folders(root, known, real, by_video)


_folders = functools.lru_cache(maxsize=8)(Folders)


@functools.lru_cache(maxsize=8)
def _faces(source: Folders, split: str) -> tuple[Face, ...]:
    found, videos = [], {}
    places = {name: label for label, name in enumerate(source.classes)}
    for folder in source._folders():
        label = places[f"{folder.parent.name}/{folder.name}"]
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS)
        names = [_video(folder, p) for p in files]
        units = {name: i for i, name in enumerate(dict.fromkeys(names))}
        trained = 0
        for i, (path, name) in enumerate(zip(files, names)):
            number = units[name] if source.by_video else i
            tests = number % _TESTS == _TESTS - 1
            trained += not tests
            if tests != (split == "test"):
                continue
            video = videos.setdefault((label, name), len(videos))
            known = label < source.known_count and trained % _UNLABELED != 0
            found.append(Face(str(path), label, video, known))
    return tuple(found)


@functools.lru_cache(maxsize=16)
def _by_class(source: Folders, split: str, labeled: bool) -> tuple[tuple[Face, ...], ...]:
    rows: dict[int, list[Face]] = {}
    for face in source.faces(split):
        if face.labeled == labeled:
            rows.setdefault(face.label, []).append(face)
    return tuple(tuple(rows[label]) for label in sorted(rows))


def _video(folder: Path, path: Path) -> str:
    """Which video of a data set a file is a frame of; a still is its own."""
    inner = path.parent.relative_to(folder)
    if inner.parts:
        return str(inner)
    name, dash, frame = path.stem.rpartition("-")
    return name if dash and frame.isdigit() else path.stem
