"""ImageNet through JSON indices, as luminolx/ScaleNet@22487c8 reads it (core/dataset).

An index is `{KEY: [{"img_info": {"filename": F}, "annos": {"imagenet": {"classification": L}}}]}`;
the first key counts. Images are `PREFIX/F`. The training index, the one held out for the search
(a minival) and the test index are files of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.data import imagenet

# train, minival, test: index files, under `path` where they are not absolute. prefix: the folder of
# training and minival images, test_prefix of test images ("": the same). task, type: keys of the
# label below `annos`. The others are those of `imagenet`.
OPTIONS: dict[str, Any] = {
    **{k: v for k, v in imagenet.OPTIONS.items() if k != "reader"},
    "train": "train.json",
    "minival": "minival.json",
    "test": "val.json",
    "prefix": "train",
    "test_prefix": "val",
    "task": "imagenet",
    "type": "classification",
}
VARIANTS: dict[str, dict[str, Any]] = {}
SPLITS = ("train", "minival", "test")

element_spec = imagenet.element_spec
train_transform = imagenet.train_transform
eval_transform = imagenet.eval_transform
read_image = imagenet.read_image


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Number of images in every index that is there; ImageNet's own where no path is given."""
    if not options["path"]:
        sizes = imagenet.PUBLISHED_SIZES
        return {"train": sizes["train"], "test": sizes["validation"]}
    return {s: len(source(s, options)) for s in SPLITS if _file(options, s).is_file()}


def num_classes(options: Mapping[str, Any]) -> int | None:
    """One more than the largest label of the training index; None without it."""
    if not options["path"] or not _file(options, "train").is_file():
        return None
    return int(source("train", options).labels.max(initial=-1)) + 1


def source(split: str, options: Mapping[str, Any]) -> IndexSource:
    """Encoded images `{"bytes", "label", "name"}` of one index.

    Raises:
      FileNotFoundError: no such index. ValueError: it has another form; both in one line.
    """
    if not options["path"]:
        raise FileNotFoundError(
            "no ImageNet at data.options.path = '': set it to the folder that holds "
            f"data.options.train = {options['train']} and the folder of its images"
        )
    file = _file(options, split)
    if not file.is_file():
        raise FileNotFoundError(f"no index {file} (data.options.{split}, below data.options.path)")
    prefix = options["test_prefix"] if split == "test" else ""
    root = os.path.join(_folder(options), prefix or options["prefix"])
    return _read(str(file), root, options["task"], options["type"])


def _folder(options: Mapping[str, Any]) -> pathlib.Path:
    return pathlib.Path(options["path"]).expanduser()


def _file(options: Mapping[str, Any], split: str) -> pathlib.Path:
    return _folder(options) / options[split]


@dataclasses.dataclass(frozen=True)
class IndexSource(Sequence):
    """Images of one index, in its order.

    Attributes:
      root: folder of the images. names: file names below it, as bytes. labels: int32, by example.
    """

    root: str
    names: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = os.path.join(self.root, os.fsdecode(bytes(self.names[index])))
        try:
            encoded = pathlib.Path(path).read_bytes()
        except OSError as error:
            raise OSError(f"cannot read image {path}: {error.strerror}") from error
        return {"bytes": encoded, "label": self.labels[index], "name": path}


@functools.lru_cache(maxsize=8)
def _read(file: str, root: str, task: str, kind: str) -> IndexSource:
    try:
        rows = next(iter(json.loads(pathlib.Path(file).read_text(encoding="utf-8")).values()))
    except (ValueError, AttributeError, StopIteration):
        raise ValueError(f"{file}: no JSON index {{key: [images]}}") from None
    names, labels = [], []
    for i, row in enumerate(rows):
        try:
            names.append(os.fsencode(row["img_info"]["filename"]))
            labels.append(int(row["annos"][task][kind]))
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{file}: entry {i} has no img_info.filename and annos.{task}.{kind} (a whole "
                "number)"
            ) from None
    if not names:
        raise ValueError(f"{file}: no images in it")
    if min(labels) < 0:
        raise ValueError(f"{file}: entry {int(np.argmin(labels))} has the label {min(labels)}")
    # Byte strings: a quarter of the memory, which every worker process holds too.
    return IndexSource(root, np.array(names), np.array(labels, np.int32))
