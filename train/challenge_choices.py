"""What a challenge chooses on out-of-fold predictions: members, thresholds, post-processing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmodels.biomedical import ensembling, metrics, postprocessing
from jaxmodels.biomedical.preprocessing import annotated, labels_of
from train.data import medical_preparation as preparation
from train.data.medical_files import RawDataset
from train.naming import ConfigError

if TYPE_CHECKING:
    from train.challenge_stages import Settings


def region_order(known) -> tuple[int, ...] | None:
    """What each region writes; None for exclusive classes."""
    return tuple(known["region_order"]) if known["regions"] else None


def dice_rows(predictions: Mapping[str, np.ndarray], references, known) -> dict[str, list[float]]:
    """Case -> Dice of every target."""
    from train.tasks.segmentation import case_dice

    targets, ignored = list(known["targets"].values()), known["ignore_label"]
    return {
        c: case_dice(*annotated(predictions[c], references[c], ignored), targets)
        for c in predictions
    }


def mean_dice(rows: Mapping[str, list[float]]) -> float:
    """Mean over cases per class, then over classes."""
    return metrics.mean_over_cases(np.asarray(list(rows.values())), warn=False)[1]


def _combined(folders: Mapping[str, Path], case: str, members, weights=None) -> np.ndarray:
    parts = [np.load(folders[m] / f"{case}.npy").astype(np.float32) for m in members]
    return ensembling.average(parts, weights)


def _oof_folders(uses, settings) -> dict[str, Path]:
    return {name: uses[f"oof_{name}"] for name in settings.configurations}


class _Lazy(Mapping):
    """Case -> what a function makes of it, anew each time: probabilities fill the memory."""

    def __init__(self, cases: Sequence[str], make: Callable[[str], np.ndarray]):
        self._cases, self._make = list(cases), make

    def __getitem__(self, case: str) -> np.ndarray:
        return self._make(case)

    def __iter__(self) -> Iterator[str]:
        return iter(self._cases)

    def __len__(self) -> int:
        return len(self._cases)


def choose_members(folder: Path, uses, settings: Settings, raw_name: str) -> dict[str, float]:
    """`ensemble.json`: members, their weights, and the scores of all candidates."""
    raw = RawDataset.open(uses[raw_name])
    known = preparation.read_json(uses["prepared"] / "dataset.json")
    folders = _oof_folders(uses, settings)
    cases = [c for one in preparation.read_json(uses["prepared"] / "splits.json") for c in one]
    references = {c: raw.label(c)[0] for c in cases}
    order = region_order(known)
    names = list(settings.configurations)
    searched = settings.content["ensemble"]
    scores, per_case = {}, {}
    for members in ensembling.candidates(names) if searched else [(n,) for n in names]:
        predicted = {c: labels_of(_combined(folders, c, members), order) for c in cases}
        rows = dice_rows(predicted, references, known)
        scores[members], per_case["+".join(members)] = mean_dice(rows), rows
    choice = ensembling.choose(scores if searched else {(names[0],): scores[(names[0],)]})
    weights = None
    if settings.content["weights"] == "least_squares" and len(choice.members) > 1:
        if known["regions"]:
            raise ConfigError("config.challenge.weights: least_squares is for classes, not regions")
        # Only voxels that somebody labeled.
        seen = {c: references[c] != known["ignore_label"] for c in cases}
        stacked = [
            np.concatenate([_combined(folders, c, (m,))[seen[c]] for c in cases])
            for m in choice.members
        ]
        labels = np.concatenate([references[c][seen[c]] for c in cases])
        weights = ensembling.least_squares_weights(stacked, labels).tolist()
    preparation.write_json(
        folder / "ensemble.json",
        {
            "members": choice.members,
            "weights": weights,
            "scores": {"+".join(m): s for m, s in scores.items()},
            "per_case": per_case,
        },
    )
    return {f"oof_dice {'+'.join(choice.members)}": scores[choice.members]}


def choose_thresholds(
    probabilities: Mapping[str, np.ndarray], references: Mapping[str, np.ndarray], known
) -> tuple[list[float] | None, list[dict[str, Any]]]:
    """Thresholds of the regions, or of a single foreground class, and a record of every trial.

    For each in turn the first best of 101 on all voxels together; kept if the mean Dice of the
    cases rises and no target falls. None where none is kept, or where several classes exclude each
    other.
    """
    targets = list(known["targets"].items())
    if not known["regions"] and len(targets) != 1:
        return None, []
    order, first = region_order(known), 0 if known["regions"] else 1

    def rows(thresholds):
        found = {c: labels_of(p, order, thresholds) for c, p in probabilities.items()}
        return np.asarray(list(dice_rows(found, references, known).values()))

    kept, record = None, []
    best, best_mean = metrics.mean_over_cases(rows(None), warn=False)
    for place, (name, values) in enumerate(targets):
        counts = [0, 0, 0]
        for case, p in probabilities.items():
            seen = references[case] != known["ignore_label"]
            own = postprocessing.threshold_counts(
                p[..., first + place][seen], np.isin(references[case], values)[seen]
            )
            counts = [a + b for a, b in zip(counts, own)]
        _, threshold = postprocessing.best_threshold(*counts)
        tried = list(kept or [0.5] * len(targets))
        tried[place] = threshold
        after, mean = metrics.mean_over_cases(rows(tried), warn=False)
        both = np.isfinite(after) & np.isfinite(best)
        worse = bool((after[both] < best[both]).any() or (np.isfinite(best) & ~both).any())
        helps = bool(mean > best_mean) and not worse
        record.append(
            {
                "name": "threshold",
                "labels": [name],
                "arguments": {"threshold": threshold},
                "gain": float(mean - best_mean),
                "worse_class": worse,
                "kept": helps,
            }
        )
        if helps:
            kept, best, best_mean = tried, after, mean
    return kept, record


def choose_postprocessing(
    folder: Path, uses, settings: Settings, raw_name: str
) -> dict[str, float]:
    """`postprocessing.json`: thresholds, operations, a record of trials, Dice before and after."""
    raw = RawDataset.open(uses[raw_name])
    known = preparation.read_json(uses["prepared"] / "dataset.json")
    chosen = preparation.read_json(uses["ensemble"] / "ensemble.json")
    folders = _oof_folders(uses, settings)
    held = preparation.read_json(uses["prepared"] / "splits.json")
    for members in chosen["members"]:
        # What is chosen here must not have been seen by the models.
        recorded = preparation.read_json(folders[members] / "folds.json")
        ensembling.assert_out_of_fold(recorded, held)
    cases = [c for one in held for c in one]
    order = region_order(known)

    def combined(case):
        return _combined(folders, case, chosen["members"], chosen["weights"])

    predicted = {c: labels_of(combined(c), order) for c in cases}
    references = {c: raw.label(c)[0] for c in cases}
    before = dice_rows(predicted, references, known)
    operations, record, thresholds = [], [], None
    if settings.content["postprocessing"]:
        if settings.content["optional_postprocessing"]:
            thresholds, record = choose_thresholds(_Lazy(cases, combined), references, known)
            if thresholds is not None:
                predicted = {c: labels_of(combined(c), order, thresholds) for c in cases}
        foreground = sorted({v for values in known["targets"].values() for v in values})
        pairs = [annotated(predicted[c], references[c], known["ignore_label"]) for c in cases]
        foreground = [v for v in foreground if v != known["ignore_label"]]
        operations, trials = postprocessing.search(
            [p for p, _ in pairs],
            [r for _, r in pairs],
            foreground,
            optional=settings.content["optional_postprocessing"],
        )
        record = [*record, *trials]
    after = dice_rows(
        {c: postprocessing.apply(p, operations) for c, p in predicted.items()}, references, known
    )
    preparation.write_json(
        folder / "postprocessing.json",
        {
            "thresholds": thresholds,
            "operations": [o.to_json() for o in operations],
            "trials": record,
            "before": before,
            "after": after,
        },
    )
    return {
        "operations": len(operations),
        "oof_dice_before": mean_dice(before),
        "oof_dice_after": mean_dice(after),
    }
