"""Post-processing that is chosen on out-of-fold predictions and only kept where it helps.

nnU-Net's rule (nnunetv2 2.8.1, `postprocessing/remove_connected_components.py`): keep the largest
component of all foreground, then of each class, if the mean Dice improves and no class gets worse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.biomedical import components
from jaxmodels.biomedical.metrics import dice

SMALL_SIZES = (5, 10, 20, 50, 100, 200, 500, 1000)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One step: `name`, the classes it treats as one mask, and its arguments (JSON values)."""

    name: str
    labels: tuple[int, ...]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As `postprocessing.json` holds it."""
        return {"name": self.name, "labels": list(self.labels), "arguments": dict(self.arguments)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Operation:
        """Raises ValueError for an operation that does not exist."""
        if content["name"] not in OPERATIONS:
            raise ValueError(
                f"no post-processing operation {content['name']!r}; known: {', '.join(OPERATIONS)}"
            )
        return cls(content["name"], tuple(content["labels"]), dict(content["arguments"]))


def _keep(segmentation, labels, kept):
    return np.where(np.isin(segmentation, labels) & ~kept, 0, segmentation)


def _largest(segmentation, labels, connectivity="full"):
    mask = np.isin(segmentation, labels)
    return _keep(segmentation, labels, components.largest_component(mask, connectivity))


def _remove_small(segmentation, labels, voxels, connectivity="full"):
    mask = np.isin(segmentation, labels)
    return _keep(segmentation, labels, components.remove_small(mask, voxels, connectivity))


def _add(segmentation, labels, mask):
    """Background that joins a class: only one class can say which."""
    (label,) = labels
    return np.where(mask & (segmentation == 0), label, segmentation)


def _fill(segmentation, labels, connectivity="face"):
    mask = np.isin(segmentation, labels)
    return _add(segmentation, labels, components.fill_holes(mask, connectivity))


def _opening(segmentation, labels, connectivity="full"):
    mask = np.isin(segmentation, labels)
    return _keep(segmentation, labels, components.opened(mask, connectivity))


def _closing(segmentation, labels, connectivity="full"):
    mask = np.isin(segmentation, labels)
    return _add(segmentation, labels, components.closed(mask, connectivity))


def _size_prior(segmentation, labels, low, high):
    """A class outside the volumes seen in training is a mistake and goes as a whole."""
    mask = np.isin(segmentation, labels)
    inside = low <= int(mask.sum()) <= high
    return segmentation if inside else _keep(segmentation, labels, np.zeros_like(mask))


OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "largest_component": _largest,
    "remove_small": _remove_small,
    "fill_holes": _fill,
    "opening": _opening,
    "closing": _closing,
    "size_prior": _size_prior,
}


def apply(segmentation: np.ndarray, operations: Sequence[Operation]) -> np.ndarray:
    """Label map int [*S] after all operations, in order."""
    result = np.asarray(segmentation)
    for operation in operations:
        result = OPERATIONS[operation.name](result, operation.labels, **operation.arguments)
    return result.astype(segmentation.dtype)


def class_dice(
    predictions: Sequence[np.ndarray], references: Sequence[np.ndarray], labels: Sequence[int]
) -> np.ndarray:
    """Mean Dice over cases of every label [labels], without cases where neither map has it."""
    table = np.asarray(
        [[dice(r == k, p == k) for k in labels] for p, r in zip(predictions, references)], float
    ).reshape(len(predictions), len(labels))
    counts = np.isfinite(table).sum(0)
    return np.where(counts, np.nansum(table, 0) / np.maximum(counts, 1), np.nan)


def search(
    predictions: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    labels: Sequence[int],
    *,
    optional: bool = False,
    sizes: Sequence[int] = SMALL_SIZES,
) -> tuple[list[Operation], list[dict[str, Any]]]:
    """The operations that help on out-of-fold predictions, and a record of every trial.

    A step is kept if the mean foreground Dice rises and no class falls; later steps start from
    what is kept. `optional` also tries removing small objects, holes, opening and closing, and a
    size prior from the references.

    Args:
      predictions, references: label maps int [*S], one pair a case; the predictions must come from
        models that have not seen their case.
      labels: foreground classes.

    Raises ValueError: no cases, or pairs of different shapes.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    for number, (p, r) in enumerate(zip(predictions, references)):
        if p.shape != r.shape:
            raise ValueError(f"case {number}: prediction {p.shape}, reference {r.shape}")
    current = [np.asarray(p) for p in predictions]
    best = class_dice(current, references, labels)
    kept: list[Operation] = []
    record: list[dict[str, Any]] = []

    def trial(candidates: Sequence[Operation]) -> None:
        """Keep the best candidate of a family if it helps."""
        nonlocal current, best
        winner = None
        for operation in candidates:
            after = [apply(p, [operation]) for p in current]
            values = class_dice(after, references, labels)
            both = np.isfinite(values) & np.isfinite(best)
            worse = bool((values[both] < best[both]).any() or (~np.isfinite(values) & both).any())
            gain = float(np.nanmean(values) - np.nanmean(best)) if both.any() else 0.0
            helps = gain > 0 and not worse
            record.append({**operation.to_json(), "gain": gain, "worse_class": worse})
            if helps and (winner is None or gain > winner[0]):
                winner = (gain, operation, after, values)
        if winner is not None:
            _, operation, current, best = winner
            kept.append(operation)
            for row in record:
                if row["name"] == operation.name and row["labels"] == list(operation.labels):
                    row["kept"] = dict(operation.arguments) == row["arguments"]

    everything = tuple(int(k) for k in labels)
    if len(everything) > 1:
        trial([Operation("largest_component", everything)])
    for label in everything:
        trial([Operation("largest_component", (label,))])
    if optional:
        for label in everything:
            one = (label,)
            trial([Operation("remove_small", one, {"voxels": int(v)}) for v in sizes])
            trial([Operation("fill_holes", one)])
            trial([Operation("opening", one)])
            trial([Operation("closing", one)])
            volumes = [int((r == label).sum()) for r in references]
            volumes = [v for v in volumes if v]
            if volumes:
                limits = {"low": min(volumes) // 2, "high": 2 * max(volumes)}
                trial([Operation("size_prior", one, limits)])
    return kept, record


THRESHOLDS = np.linspace(0, 1, 101)


def threshold_counts(
    scores: np.ndarray, labels: np.ndarray, thresholds: np.ndarray = THRESHOLDS
) -> tuple[np.ndarray, np.ndarray, int]:
    """(overlap, predicted, positives) of `scores >= t` with binary `labels`, int64 [thresholds].

    What several cases have adds up. Raises ValueError for different shapes.
    """
    scores, labels = np.asarray(scores), np.asarray(labels).astype(bool)
    if scores.shape != labels.shape:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} differ in shape")
    order = np.argsort(thresholds, kind="stable")
    # How many thresholds a score reaches.
    reached = np.searchsorted(np.asarray(thresholds)[order], scores.reshape(-1), side="right")
    counts = []
    for part in (reached[labels.reshape(-1)], reached):
        histogram = np.bincount(part, minlength=len(order) + 1)
        at_least = histogram[::-1].cumsum()[::-1][1:]
        counts.append(at_least[np.argsort(order, kind="stable")])
    return counts[0], counts[1], int(labels.sum())


def best_threshold(
    overlap: np.ndarray, predicted: np.ndarray, positives: int, thresholds: np.ndarray = THRESHOLDS
) -> tuple[np.ndarray, float]:
    """Dice at every threshold of summed `threshold_counts`, and the first best; no voxel is 0."""
    total = predicted + positives
    values = np.where(total > 0, 2 * overlap / np.maximum(total, 1), 0.0)
    return values, float(np.asarray(thresholds)[int(np.argmax(values))])


def threshold_sweep(
    scores: np.ndarray, labels: np.ndarray, thresholds: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """Dice of `scores >= t` against binary `labels` at 101 thresholds of [0, 1]; the first best.

    Two empty sets count as 0.

    Args:
      scores: probabilities, any shape. labels: {0, 1} of the same shape.

    Raises ValueError for different shapes.
    """
    thresholds = THRESHOLDS if thresholds is None else np.asarray(thresholds)
    return best_threshold(*threshold_counts(scores, labels, thresholds), thresholds)
