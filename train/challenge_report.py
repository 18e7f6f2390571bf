"""The report of a challenge: metrics, what every practice was worth, rankings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.biomedical import metrics, ranking, surface_distance
from jaxmodels.biomedical.folds import patient_of
from jaxmodels.biomedical.preprocessing import NO_AXIS, annotated, image_diagonal, labels_of
from train import survey
from train.data import medical_preparation as preparation
from train.data.medical_files import RawDataset


def case_metrics(
    prediction: np.ndarray, reference: np.ndarray, spacing, known, tolerance
) -> dict[str, dict[str, float]]:
    """Dice, IoU, HD95 and surface Dice (NSD) of every target; surfaces by elements, in mm.

    `tolerance` (mm) is of the surface Dice, one for all targets or one each.
    HD95 of one empty mask is the image's diagonal, of two it is missing.
    """
    rows = {}
    prediction, reference = annotated(prediction, reference, known["ignore_label"])
    if spacing[0] == NO_AXIS:
        prediction, reference, spacing = prediction[0], reference[0], spacing[1:]
    tolerances = np.broadcast_to(np.atleast_1d(tolerance), len(known["targets"]))
    for (name, values), own in zip(known["targets"].items(), tolerances):
        pair = np.isin(reference, values), np.isin(prediction, values)
        found = surface_distance.surface_distances(*pair, spacing)
        distance = surface_distance.hausdorff(found, 95)
        if all(found.empty):
            distance = float("nan")
        elif not np.isfinite(distance):
            distance = image_diagonal(reference.shape, spacing)
        rows[name] = {
            "dice": metrics.dice(*pair),
            "iou": metrics.iou(*pair),
            "hd95": distance,
            "nsd": surface_distance.surface_dice(found, float(own)),
        }
    return rows


def test_metrics(
    methods: Mapping[str, list[np.ndarray]],
    final: np.ndarray,
    reference: np.ndarray,
    spacing,
    known,
    order,
    tolerance,
) -> dict[str, Any]:
    """`metrics` and `ece` of every method on one case.

    A method is a list of probabilities [z, y, x, K]: of several single models it is the mean of
    their metrics. `final` is the post-processed label map.
    """

    def measure(labels):
        return case_metrics(labels, reference, spacing, known, tolerance)

    found, calibration = {"final": measure(final)}, {}
    for method, parts in methods.items():
        each = [measure(labels_of(p, order)) for p in parts]
        found[method] = {
            target: {m: float(np.mean([e[target][m] for e in each])) for m in each[0][target]}
            for target in each[0]
        }
        if not known["regions"]:
            seen = reference != (-1 if known["ignore_label"] is None else known["ignore_label"])
            errors = [metrics.expected_calibration_error(reference[seen], p[seen]) for p in parts]
            calibration[method] = float(np.mean(errors))
    return {"metrics": found, "ece": calibration}


test_metrics.__test__ = False  # a step of the test stage, not a test


def _calibration(folder: Path) -> dict[str, float]:
    """Method -> mean expected calibration error over test cases."""
    found: dict[str, list[float]] = {}
    for file in sorted((folder / "details").glob("*.json")):
        for method, value in preparation.read_json(file).get("ece", {}).items():
            found.setdefault(method, []).append(value)
    return {method: float(np.mean(values)) for method, values in found.items()}


def _scores(folder: Path, measure: str) -> dict[str, dict[str, float]]:
    """Method -> case -> mean over targets, from the test stage's details."""
    found: dict[str, dict[str, float]] = {}
    for file in sorted((folder / "details").glob("*.json")):
        content = preparation.read_json(file)
        for method, targets in content.get("metrics", {}).items():
            values = np.asarray([t[measure] for t in targets.values()], float)
            mean = float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
            found.setdefault(method, {})[file.stem] = mean
    return found


def _mean_rows(rows: Mapping[str, list[float]]) -> dict[str, float]:
    """Case -> mean over targets of stored Dice rows (NaN became null or NaN in JSON)."""
    result = {}
    for case, values in rows.items():
        array = np.asarray(values, float)
        result[case] = float(np.nanmean(array)) if np.isfinite(array).any() else float("nan")
    return result


def patients_of(cases: Sequence[str], group_regex: str) -> list[str] | None:
    """The patient of every case, None without a `group_regex`; who does not match is alone."""
    if not group_regex:
        return None
    found = []
    for case in cases:
        try:
            found.append(patient_of(case, group_regex))
        except ValueError:
            found.append(case)
    return found


def _gain(before: Mapping[str, float], after: Mapping[str, float], group_regex: str) -> str:
    """Intervals draw whole patients where these are known."""
    groups = patients_of(sorted(set(before) & set(after)), group_regex)
    mean, low, high = metrics.paired_interval(before, after, groups=groups)
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _cross_validation(known, settings, rows, test, first, held) -> tuple[str, str, str, str]:
    """What the folds tell beforehand: all cases' estimate of a single model, and one fold's."""
    means = _mean_rows(rows)
    told = f"estimate {np.nanmean(list(means.values())):.4f} from all folds, "
    told += f"{np.nanmean([means[c] for c in held[0]]):.4f} from one"
    singles = test.get(f"{first}, single models")
    if singles:
        told += f"; single models on the test cases {np.nanmean(list(singles.values())):.4f}"
    title = f"k-fold cross-validation ({settings.folds} folds)"
    return title, known["cross_validation"].text(), "on", told


def sees_patches(plans: Mapping[str, Any], name: str) -> bool:
    """Whether a configuration sees less than a whole median case at once."""
    own = plans["configurations"][name]
    shape = own["median_shape"][-len(own["patch_size"]) :]
    return any(p < n for p, n in zip(own["patch_size"], shape))


def practices(settings, plans, chosen, stored, test, held) -> list[tuple[str, str, str, str]]:
    """(practice, survey, on or off, gain in Dice with its interval) of every surveyed practice.

    Gains are over cases: on the test cases where their labels are known, else out of fold. They
    compare two ways to predict that differ in the practice.
    """
    known = survey.load()
    regex = settings.content["group_regex"]
    oof = {name: _mean_rows(rows) for name, rows in chosen["per_case"].items()}
    table = test or oof
    names = list(settings.configurations)
    rows = []

    def add(title, entry, on, before=None, after=None):
        gain = "-"
        if before in table and after in table:
            gain = f"{_gain(table[before], table[after], regex)} ({after} - {before})"
        rows.append((title, known[entry].text(), "on" if on else "off", gain))

    patched = any(sees_patches(plans, name) for name in names)
    add("patch-based training", "patches", patched, "3d_lowres", "3d_fullres")
    add("downsampling", "downsampling", "3d_lowres" in names, "3d_fullres", "3d_cascade")
    flat = [
        n for n in names if n.startswith("2") and plans["configurations"][n]["spacing"][0] < 999
    ]
    add("3D as 2D slices", "slices", bool(flat), "3d_fullres", flat[0] if flat else None)
    first = chosen["members"][0]
    rows.append(_cross_validation(known, settings, chosen["per_case"][first], test, first, held))
    identical = settings.folds * settings.seeds
    add(f"identical ensemble ({identical} models)", "ensemble_identical", True,
        f"{first}, single models", first)  # fmt: skip
    several = len(chosen["members"]) > 1
    pair = "ensemble" if test else "+".join(chosen["members"])
    singles = {n: s for n, s in chosen["scores"].items() if n in names}
    best = max(singles, key=lambda n: singles[n])
    add("heterogeneous ensemble", "ensemble_heterogeneous", several, best, pair)
    on = bool(stored["operations"] or stored.get("thresholds"))
    if test:
        add("post-processing", "postprocessing", on, "ensemble", "final")
    else:
        gain = _gain(_mean_rows(stored["before"]), _mean_rows(stored["after"]), regex)
        rows.append(
            ("post-processing", known["postprocessing"].text(), "on" if on else "off", gain)
        )
    mirrored = f"{first}, first model"
    if f"{mirrored}, no mirroring" in table:
        rows.append(
            (
                "test-time mirroring",
                "not asked",
                "on",
                _gain(table[f"{mirrored}, no mirroring"], table[mirrored], regex),
            )
        )
    augmented = settings.augmentation != "none"
    add("augmentation", "winners_augmentation", augmented)
    add("preprocessing (crop, normalize, resample)", "winners_preprocessing", True)
    add("multi-stage pipeline (cascade)", "winners_multi_stage", "3d_cascade" in names)
    return rows


def _table(header, rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(c) for c in line) + " |\n" for line in lines)


def _ranking(scores: Mapping[str, Mapping[str, float]], settings, folder: Path) -> str:
    """A table of ranks with intervals, and a picture of how often each rank came up."""
    names = sorted(scores)
    cases = sorted(set.intersection(*(set(v) for v in scores.values())))
    if len(names) < 2 or len(cases) < 2:
        return "Fewer than two methods or cases: bootstrapping with one case is not sensible.\n"
    values = np.asarray([[scores[n][c] for c in cases] for n in names])
    # Nobody is missing: a method without a number found nothing where nothing is.
    values = np.where(np.isnan(values), 1.0, values)
    found = ranking.bootstrap_ranking(
        values, settings.content["ranking"], samples=settings.content["bootstrap"]
    )
    rows = [
        (
            row["algorithm"],
            f"{row['rank']:g}",
            f"{row['mean']:.4f}",
            f"{row['median_rank']:g} [{row['low']:g}, {row['high']:g}]",
        )
        for row in ranking.ranking_table(values, names, found)
    ]
    draw_ranks(names, found, folder / "ranking.png")
    tau = float(np.nanmean(found.tau)) if np.isfinite(found.tau).any() else float("nan")
    return (
        _table(("method", "rank", "mean Dice", "median rank [95 %]"), rows)
        + f"\n{settings.content['ranking']}, {len(found.ranks)} bootstrap samples of {len(cases)} "
        f"cases (nothing found where nothing is counts 1); mean Kendall tau to the full ranking "
        f"{tau:.2f}. ![ranks](ranking.png)\n"
    )


def draw_ranks(names, found: ranking.Bootstrap, path: Path) -> None:
    """Blob plot: how often each method (row) had each rank (column); the cross is the full rank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    order = np.argsort(found.full, kind="stable")
    share = found.frequencies()[order]
    figure, axes = plt.subplots(figsize=(2 + 0.5 * len(names), 1.2 + 0.4 * len(names)))
    row, column = np.nonzero(share)
    axes.scatter(column + 1, row, s=400 * share[row, column], alpha=0.5)
    axes.plot(found.full[order], np.arange(len(names)), "kx")
    axes.set_yticks(range(len(names)), [names[i] for i in order])
    axes.set_xticks(range(1, len(names) + 1))
    axes.set_xlabel("rank")
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_report(folder: Path, uses, settings, raw_name: str, command: str) -> dict[str, float]:
    """`report.md`, `ranking.png` and `practices.json`."""
    raw = RawDataset.open(uses[raw_name])
    plans = preparation.read_json(uses["prepared"] / "plans.json")
    chosen = preparation.read_json(uses["ensemble"] / "ensemble.json")
    stored = preparation.read_json(uses["postprocessing"] / "postprocessing.json")
    test = _scores(uses["test"], "dice")
    numbers: dict[str, Any] = {"oof_dice": chosen["scores"]["+".join(chosen["members"])]}
    parts = [f"# Challenge: {raw.root.name}\n\n    {command}\n"]
    rows = [(name, f"{score:.4f}") for name, score in chosen["scores"].items()]
    parts.append("## Out of fold\n\n" + _table(("configuration", "mean Dice"), rows))
    parts.append(f"Chosen: {' + '.join(chosen['members'])}, weights {chosen['weights']}.\n")
    if test:
        measured = {m: _scores(uses["test"], m) for m in ("dice", "iou", "hd95", "nsd")}
        rows, calibrated = [], _calibration(uses["test"])
        for method in sorted(test):
            cells = []
            for measure in measured.values():
                values = measure[method]
                if not np.isfinite(list(values.values())).any():
                    cells.append("-")
                    continue
                mean, low, high = metrics.bootstrap_interval(
                    np.asarray(list(values.values())),
                    groups=patients_of(list(values), settings.content["group_regex"]),
                )
                cells.append(f"{mean:.4f} [{low:.4f}, {high:.4f}]")
            cells.append(f"{calibrated[method]:.4f}" if method in calibrated else "-")
            rows.append((method, *cells))
        parts.append(
            f"## Test cases ({len(test['final'])})\n\n"
            + _table(("method", "Dice", "IoU", "HD95 (mm)", "NSD", "ECE"), rows)
        )
        numbers["test_dice"] = float(np.nanmean(list(test["final"].values())))
    held = preparation.read_json(uses["prepared"] / "splits.json")
    told = practices(settings, plans, chosen, stored, test, held)
    parts.append(
        "## Practices\n\nThe survey's figure is of its base, the gain is in Dice with a 95 % "
        "interval over cases (patients, where `group_regex` names them). `single models` is the "
        "mean over the models of all folds.\n\n"
        + _table(("practice", "survey", "here", "gain"), told)
    )
    scores = test or {n: _mean_rows(r) for n, r in chosen["per_case"].items()}
    parts.append("## Ranking\n\n" + _ranking(scores, settings, folder))
    names = [f"{o['name']} {o['labels']} {o['arguments']}" for o in stored["operations"]]
    if stored.get("thresholds"):
        names.insert(0, f"thresholds {dict(zip(raw.targets, stored['thresholds']))}")
    parts.append("## Post-processing\n\n" + ("\n".join(f"- {n}" for n in names) or "None helped."))
    (folder / "report.md").write_text("\n".join(parts) + "\n", encoding="utf-8")
    preparation.write_json(folder / "practices.json", [list(row) for row in told])
    return numbers
