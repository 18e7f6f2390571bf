"""Detection files of the risk-ranked-recall code: whatever detector made them.

JSON: segment -> `<context>_<frame>_<camera>` -> list of [x1, y1, x2, y2, class confidence,
objectness, COCO id] (CPS-IL/risk-ranked-recall@21f8fd48). Waymo's frames are counted from 0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxmodels.driving.box_overlap import check_boxes
from jaxmodels.driving.patch_classifier import CLASSES

# COCO id -> class; other ids are left out. Counted from 0 as in YOLO's lists. Waymo labels
# motorcycles as vehicles.
COCO = {
    0: "pedestrian",
    1: "cyclist",
    2: "vehicle",
    3: "vehicle",
    5: "vehicle",
    7: "vehicle",
    11: "sign",
}
_FIELDS = 7


class FileDetections(NamedTuple):
    """Detections of one image, N rows.

    Attributes:
      boxes: [N, 4] pixels. scores: [N], class confidence times objectness.
      classes: int32 [N], -1 for ids without a class (`every_class`).
      objectness: [N], which the published recall by rank (`rrr.py`) takes for the confidence;
        give it to `detection_metrics.recall_by_rank` to compare with its curves.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    objectness: np.ndarray


def read_detections(
    path: str | os.PathLike, names: Mapping[int, str] = COCO, *, every_class: bool = False
) -> dict[tuple[str, int, str], FileDetections]:
    """Detections by (context, frame, camera).

    `every_class` keeps detections whose id is none of `names`, as the published class-agnostic
    recall does: a truck that is taken for a train is found.

    Raises ValueError naming the file and the entry: no such structure, a row of other length,
    boxes or scores out of order.
    """
    with open(path, encoding="utf-8") as file:
        try:
            stored = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: no JSON ({error})") from None
    found = {}
    for segment, entries in stored.items():
        for key, rows in entries.items():
            parts = key.rsplit("_", 2)
            if len(parts) != 3 or not parts[1].isdigit():
                raise ValueError(f"{path}: {segment}: {key!r} is not <context>_<frame>_<camera>")
            try:
                found[(parts[0], int(parts[1]), parts[2])] = _decoded(rows, names, every_class)
            except ValueError as error:
                raise ValueError(f"{path}: {segment}: {key}: {error}") from None
    return found


def _decoded(rows: list[Any], names: Mapping[int, str], every_class: bool) -> FileDetections:
    if any(len(row) != _FIELDS for row in rows):
        raise ValueError(f"a detection has {_FIELDS} numbers")
    table = np.asarray(rows, np.float64).reshape(-1, _FIELDS)
    boxes, scores = table[:, :4], table[:, 4] * table[:, 5]
    check_boxes(boxes, scores)
    kept = np.asarray([every_class or int(i) in names for i in table[:, 6]], bool)
    known = {i: CLASSES.index(name) for i, name in names.items()}
    classes = [known.get(int(i), -1) for i in table[kept, 6]]
    return FileDetections(boxes[kept], scores[kept], np.asarray(classes, np.int32), table[kept, 5])
