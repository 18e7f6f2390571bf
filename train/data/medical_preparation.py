"""From a raw folder to training arrays: fingerprint, plans, preprocessed cases, folds.

Every step writes one file (or one a case) and is skipped where it is finished:

    fingerprint.json   plans.json   splits.json   dataset.json
    IDENTIFIER/CASE.image.npy float32 [z, y, x, C]   CASE.label.npy int16   CASE.npz (locations)
    IDENTIFIER/CASE.json   the geometry; written last, so that it marks a finished case
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.biomedical import folds, patches, planning, preprocessing
from train.data.medical_files import DataError, RawDataset

CONFIGURATIONS = (
    "2d",
    "2d_coronal",  # slices of the second and of the third axis: with "2d" the three planes
    "2d_sagittal",
    "2.5d",
    "3d_fullres",
    "3d_lowres",
    "3d_cascade",
)
VIEWS = {"2d_coronal": 1, "2d_sagittal": 2}
# Neighbor slices on each side that a 2.5-D network sees.
CONTEXT = 2
_SEED = 1234


def write_json(path: Path, content: Any) -> None:
    """Indented, under a temporary name first."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")
    part.replace(path)


def _plain(value):
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not for JSON")


def read_json(path: Path) -> Any:
    """Raises DataError naming a file that is not there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; the folder is not prepared") from None


def fingerprint(raw: RawDataset, folder: Path) -> dict[str, Any]:
    """Check every training case and write what planning needs to know.

    Raises DataError for a case that cannot be used; ValueError when no case has foreground.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cases = raw.cases("Tr")
    rng = np.random.default_rng(_SEED)
    rows, pooled = {}, []
    ignored = raw.ignore_label
    for case in cases:
        image, label, spacing = raw.training_case(case)
        box, _ = preprocessing.nonzero_box(image)
        cropped = tuple(s.stop - s.start for s in box)
        known = label if ignored is None else np.where(label == ignored, 0, label)
        pooled.append(preprocessing.foreground_samples(image[box], known[box], rng))
        rows[case] = {
            "shape": label.shape,
            "shape_after_crop": cropped,
            "spacing": spacing,
            "foreground": int((known > 0).sum()),
        }
    intensities = np.concatenate(pooled)
    if not len(intensities):
        raise ValueError(f"{raw.root}: no foreground in any of {len(cases)} training cases")
    content = {
        "cases": rows,
        "statistics": preprocessing.intensity_statistics(intensities),
    }
    write_json(folder / "dataset.json", raw.to_json())
    write_json(folder / "fingerprint.json", content)
    return content


def plan(
    folder: Path,
    *,
    kind: str = "plain",
    memory_gb: float = planning.REFERENCE_GB,
    base_features: int = planning.BASE_FEATURES,
    cap_batch: bool = True,
    batch_size: int = 0,
    lowres_share: float = planning.LOWRES_SHARE,
    schemes: Sequence[str] = (),
) -> dict[str, Any]:
    """`plans.json` from the fingerprint: every configuration that the data allow.

    Arguments as in `planning.plan_network`; `batch_size` other than 0 replaces the planned one,
    `schemes` (of `preprocessing.NORMALIZATIONS`, one a channel) those that the channels' names ask
    for: "CT" standardizes by statistics pooled over all cases, for intensities on one scale.

    Raises ValueError for schemes that are unknown or of another number.
    """
    seen, raw = read_json(folder / "fingerprint.json"), read_json(folder / "dataset.json")
    rows = list(seen["cases"].values())
    spacings = np.asarray([r["spacing"] for r in rows], float)
    shapes = np.asarray([r["shape_after_crop"] for r in rows], float)
    target = planning.target_spacing(spacings, shapes)
    transpose = planning.coarsest_axis_first(target)
    full_shapes = np.round(shapes * spacings / target)
    spacing = tuple(float(target[a]) for a in transpose)
    median = np.median(full_shapes, 0)[list(transpose)]
    original = np.asarray([np.prod(r["shape"]) for r in rows], float)
    share = float(np.median(np.prod(shapes, 1) / original))
    arguments = dict(
        channels=len(raw["channels"]),
        classes=raw["outputs"],
        kind=kind,
        memory_gb=memory_gb,
        base_features=base_features,
        cap_batch=cap_batch,
    )
    voxels = float(np.prod(median)) * len(rows)
    shape = [float(n) for n in median]
    found: dict[str, Any] = {}

    def add(name, network, own_spacing, own_shape, identifier, **more):
        found[name] = {
            "identifier": identifier,
            "spacing": own_spacing,
            "median_shape": own_shape,
            "patch_size": network.patch_size,
            "batch_size": batch_size or network.batch_size,
            "model": _CLASSES[network.kind],
            "network": network.network(),
            "estimate": network.estimate,
            "context": 0,
            "view": VIEWS.get(name, 0),
            **more,
        }

    flat = planning.plan_network(spacing[-2:], shape[-2:], dataset_voxels=voxels, **arguments)
    add("2d", flat, spacing, shape, "fullres", batch_dice=planning.uses_batch_dice("2d", False))
    if shape[0] > 1:
        add("2.5d", flat, spacing, shape, "fullres", batch_dice=True)
        found["2.5d"]["context"] = CONTEXT
        for name, view in VIEWS.items():
            plane = [a for a in range(3) if a != view]
            across = planning.plan_network(
                [spacing[a] for a in plane],
                [shape[a] for a in plane],
                dataset_voxels=voxels,
                **arguments,
            )
            add(name, across, spacing, shape, "fullres", batch_dice=True)
        full = planning.plan_network(spacing, shape, dataset_voxels=voxels, **arguments)
        low = planning.plan_lowres(
            spacing, shape, full, dataset_voxels=voxels, share=lowres_share, **arguments
        )
        batch_dice = planning.uses_batch_dice("3d_fullres", low is not None)
        add("3d_fullres", full, spacing, shape, "fullres", batch_dice=batch_dice)
        if low is not None:
            network, low_spacing, low_shape = low
            add("3d_lowres", network, low_spacing, low_shape, "lowres", batch_dice=False)
            add("3d_cascade", full, spacing, shape, "fullres", batch_dice=True)
    content = {
        "transpose": transpose,
        "schemes": _schemes(raw["channels"], schemes),
        # Cropping that takes more than a quarter away leaves an outside that is no image.
        "use_mask": share < preprocessing.MASK_BELOW,
        "statistics": seen["statistics"],
        "configurations": found,
    }
    write_json(folder / "plans.json", content)
    return content


def _schemes(channels: Sequence[str], given: Sequence[str]) -> list[str]:
    if not given:
        return [preprocessing.normalization_of(name) for name in channels]
    if len(given) != len(channels):
        raise ValueError(f"plan.schemes: {len(given)} normalizations for {len(channels)} channels")
    for scheme in given:
        if scheme not in preprocessing.NORMALIZATIONS:
            known = ", ".join(preprocessing.NORMALIZATIONS)
            raise ValueError(f"plan.schemes: no normalization {scheme!r}; known: {known}")
    return list(given)


_CLASSES = {"plain": "PlainConvUNet", "resenc": "ResidualEncoderUNet"}


def prepared_case(
    plans: Mapping[str, Any], configuration: str, image, spacing, label=None
) -> tuple[np.ndarray, np.ndarray | None, preprocessing.Geometry]:
    """One case as the configuration sees it."""
    own = plans["configurations"][configuration]
    target = list(own["spacing"])
    if image.shape[0] == 1 or own["spacing"][0] == preprocessing.NO_AXIS:
        # A single slice has no spacing to resample to.
        target[0] = spacing[plans["transpose"][0]]
    return preprocessing.preprocess(
        image,
        spacing,
        transpose=plans["transpose"],
        target_spacing=target,
        schemes=plans["schemes"],
        statistics=plans["statistics"],
        use_mask=plans["use_mask"],
        label=label,
    )


def preprocess_all(raw: RawDataset, folder: Path, configuration: str) -> int:
    """Training arrays of a configuration's identifier; the number of cases."""
    plans = read_json(folder / "plans.json")
    own = configuration_of(plans, configuration)
    output = folder / own["identifier"]
    output.mkdir(parents=True, exist_ok=True)
    labels = [v for v in raw.values if v not in (0, raw.ignore_label)]
    cases = raw.cases("Tr")
    for number, case in enumerate(cases):
        mark = output / f"{case}.json"
        if mark.exists():
            continue
        image, label, spacing = raw.training_case(case)
        image, label, geometry = prepared_case(plans, configuration, image, spacing, label)
        rng = np.random.default_rng((_SEED, number))
        places = patches.class_locations(label, labels, rng)
        if raw.ignore_label is not None:
            seen = (label != raw.ignore_label).astype(np.int8)
            places[patches.ANNOTATED] = patches.class_locations(seen, (1,), rng).get(1, np.zeros(0))
        np.save(output / f"{case}.image.npy", image)
        np.save(output / f"{case}.label.npy", label)
        np.savez(output / f"{case}.npz", **{str(k): v for k, v in places.items()})
        write_json(mark, geometry.to_json())
    return len(cases)


def configuration_of(plans: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if name not in plans["configurations"]:
        raise ValueError(
            f"no plan for configuration {name!r}; the data allow "
            f"{', '.join(plans['configurations'])}"
        )
    return plans["configurations"][name]


def write_splits(
    folder: Path,
    cases: Sequence[str],
    count: int = 5,
    groups: Mapping[str, str] | None = None,
    group_regex: str | None = None,
) -> list[list[str]]:
    """`splits.json`: the held-out cases of every fold. Errors as `folds.cross_validation`."""
    held = folds.cross_validation(cases, count, groups=groups, group_regex=group_regex)
    folds.check_leakage(held, groups)
    write_json(folder / "splits.json", held)
    return held


def prepare(raw_folder: Path, folder: Path, configuration: str, fold_count: int = 5) -> None:
    """Everything for one configuration, each step once; what `data.options.path` may stand for."""
    raw = RawDataset.open(raw_folder)
    if not (folder / "fingerprint.json").exists():
        fingerprint(raw, folder)
    if not (folder / "plans.json").exists():
        plan(folder)
    if not (folder / "splits.json").exists():
        write_splits(folder, raw.cases("Tr"), fold_count)
    preprocess_all(raw, folder, configuration)
