"""The stages of a challenge: what each reads, writes, and how it is made."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.biomedical import ensembling, postprocessing, ranking
from jaxmodels.biomedical.preprocessing import (
    Geometry,
    labels_of,
    resample,
    restore_probabilities,
)
from train.challenge_choices import choose_members, choose_postprocessing, region_order
from train.data import brain_template, coins, medical_patches
from train.data import medical_preparation as preparation
from train.data.medical_files import RawDataset, write_labels
from train.naming import ConfigError, nearest
from train.progression import Stage
from train.segmentation_inference import predict_probabilities

LOWRES, CASCADE = "3d_lowres", "3d_cascade"
# Options of the patches that a challenge takes from its config.
DATA_OPTIONS = ("oversample", "validation_batches", "threads", "workers")


@dataclasses.dataclass(frozen=True)
class Settings:
    """`config.challenge`, checked."""

    configurations: tuple[str, ...]
    folds: int
    seeds: int
    content: Mapping[str, Any]
    augmentation: str = "full"

    @classmethod
    def of(cls, config) -> Settings:
        """Raises ConfigError for unknown configurations, keys' values and counts."""
        content = config.challenge.to_dict()
        wanted = tuple(content["configurations"])
        for name in wanted:
            if name not in preparation.CONFIGURATIONS:
                known = nearest(name, preparation.CONFIGURATIONS)
                raise ConfigError(f"config.challenge.configurations: {name!r}; {known}")
        if not wanted or len(set(wanted)) != len(wanted):
            raise ConfigError(f"config.challenge.configurations: {wanted} must be different names")
        if CASCADE in wanted and LOWRES not in wanted:
            raise ConfigError(f"config.challenge.configurations: {CASCADE} needs {LOWRES} as well")
        if content["weights"] not in ("uniform", "least_squares"):
            raise ConfigError(
                f"config.challenge.weights: {content['weights']!r}; known: uniform, least_squares"
            )
        if content["bundled"] not in ("coins", "brain"):
            raise ConfigError(
                f"config.challenge.bundled: {content['bundled']!r}; known: coins, brain"
            )
        if content["ranking"] not in ranking.SCHEMES:
            raise ConfigError(
                f"config.challenge.ranking: {content['ranking']!r}; known: "
                f"{', '.join(ranking.SCHEMES)}"
            )
        try:
            steps = {str(name): int(count) for name, count in dict(content["steps"]).items()}
        except (TypeError, ValueError):
            steps = {"": 0}
        for name, count in steps.items():
            if name not in wanted or count < 1:
                raise ConfigError(
                    f"config.challenge.steps: {content['steps']!r}, wanted (configuration, steps) "
                    f"pairs like (('{wanted[0]}', 500),)"
                )
        tolerance = np.atleast_1d(content["tolerance"])
        if tolerance.ndim != 1 or not np.isfinite(tolerance).all() or (tolerance < 0).any():
            raise ConfigError(
                f"config.challenge.tolerance: {content['tolerance']}, wanted millimeters, one for "
                "all targets or one each"
            )
        if content["folds"] < 2 or content["seeds"] < 1:
            raise ConfigError("config.challenge: at least 2 folds and 1 seed")
        for key in config.model_args:
            raise ConfigError(
                f"config.model_args.{key}: networks follow from config.challenge.plan"
            )
        for key in config.data.options:
            if key not in ("path", *DATA_OPTIONS):
                raise ConfigError(
                    f"config.data.options.{key}: the challenge decides it; known: path, "
                    f"{', '.join(DATA_OPTIONS)}"
                )
        # The cascade reads what the low resolution predicts: that comes first.
        order = sorted(wanted, key=lambda name: name == CASCADE)
        augment = config.task_args.get("augment", "full")
        counts = int(content["folds"]), int(content["seeds"])
        return cls(tuple(order), *counts, content, augment)

    def members(self):
        """(seed, fold) of every model of a configuration."""
        return [(s, k) for s in range(self.seeds) for k in range(self.folds)]


def steps_of(given, name: str, default: int) -> int:
    """Training steps of a configuration; `given` are ((configuration, steps), ...)."""
    return int(dict(given).get(name, default))


def member_name(configuration: str, seed: int, fold: int) -> str:
    """Name of the stage that trains one model."""
    return f"train_{configuration}_seed{seed}_fold{fold}"


def stages_of_challenge(config, command: str = "") -> list[Stage]:
    """All stages in order."""
    settings = Settings.of(config)
    stages = []
    path = config.data.options.get("path") or ""
    raw = "data"
    if not path:
        chosen = {k: settings.content[k] for k in ("bundled", "nilearn")}
        stages.append(
            Stage(
                "data",
                {"kind": "bundled data", **chosen},
                (),
                lambda folder, uses: _write_bundled(folder, **chosen),
            )
        )
    else:
        if not Path(path).is_dir():
            raise ConfigError(f"config.data.options.path: no folder {path!r}")
        listing = {"kind": "given data", "files": _listing(Path(path))}
        stages.append(Stage("data", listing, (), lambda folder, uses: {}, given=str(path)))

    plan = dict(settings.content["plan"])
    stages.append(
        Stage(
            "prepared",
            {
                "kind": "fingerprint, plan, folds",
                "plan": plan,
                "folds": settings.folds,
                "group_regex": settings.content["group_regex"],
                # A folder given from outside is known by its files.
                "data": _listing(Path(path)) if path else settings.content["bundled"],
            },
            (raw,),
            lambda folder, uses: _prepare(folder, uses[raw], settings),
        )
    )
    for name in settings.configurations:
        prior = (f"oof_{LOWRES}",) if name == CASCADE else ()
        members = []
        for seed, fold in settings.members():
            stages.append(_train_stage(config, settings, name, seed, fold, prior, raw))
            members.append(stages[-1].name)
        stages.append(_oof_stage(config, settings, name, tuple(members), prior, raw))
    oof = tuple(f"oof_{name}" for name in settings.configurations)
    choice = {"ensemble": settings.content["ensemble"], "weights": settings.content["weights"]}
    stages.append(
        Stage(
            "ensemble",
            {"kind": "ensemble search", **choice},
            ("prepared", *oof, raw),
            lambda folder, uses: choose_members(folder, uses, settings, raw),
        )
    )
    keys = ("postprocessing", "optional_postprocessing")
    stages.append(
        Stage(
            "postprocessing",
            {"kind": "post-processing search", **{k: settings.content[k] for k in keys}},
            ("prepared", *oof, "ensemble", raw),
            lambda folder, uses: choose_postprocessing(folder, uses, settings, raw),
        )
    )
    models = tuple(
        member_name(name, s, k) for name in settings.configurations for s, k in settings.members()
    )
    keys = ("mirroring", "step", "tolerance")
    stages.append(
        Stage(
            "test",
            {"kind": "test prediction", **{k: settings.content[k] for k in keys}},
            ("prepared", *models, "ensemble", "postprocessing", raw),
            lambda folder, uses: _test(folder, uses, config, settings, raw),
        )
    )
    from train.challenge_report import write_report

    stages.append(
        Stage(
            "report",
            {
                "kind": "metrics and ranking",
                **{k: settings.content[k] for k in ("ranking", "bootstrap")},
            },
            ("prepared", *oof, "ensemble", "postprocessing", "test", raw),
            lambda folder, uses: write_report(folder, uses, settings, raw, command),
        )
    )
    return stages


def _listing(path: Path) -> str:
    rows = [
        f"{f.relative_to(path)} {f.stat().st_size} {f.stat().st_mtime_ns}"
        for f in sorted(path.rglob("*"))
        if f.is_file()
    ]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _write_bundled(folder: Path, bundled: str, nilearn: str) -> dict[str, float]:
    if bundled == "coins":
        coins.write_challenge(folder)
    else:
        brain_template.write_challenge(folder, nilearn or None)
    return {"cases": len(RawDataset.open(folder).cases("Tr"))}


def _prepare(folder: Path, raw_folder: Path, settings: Settings) -> dict[str, float]:
    raw = RawDataset.open(raw_folder)
    cases = raw.cases("Tr")
    if len(np.atleast_1d(settings.content["tolerance"])) not in (1, len(raw.targets)):
        raise ConfigError(
            f"config.challenge.tolerance: {settings.content['tolerance']} for "
            f"{len(raw.targets)} targets ({', '.join(raw.targets)})"
        )
    if not (folder / "splits.json").exists():
        regex = settings.content["group_regex"]
        groups = None
        if regex:
            from jaxmodels.biomedical.folds import patient_of

            groups = {case: patient_of(case, regex) for case in cases}
        preparation.write_splits(folder, cases, settings.folds, groups=groups)
    if not (folder / "fingerprint.json").exists():
        preparation.fingerprint(raw, folder)
    if not (folder / "plans.json").exists():
        preparation.plan(folder, **settings.content["plan"])
    plans = preparation.read_json(folder / "plans.json")
    for name in settings.configurations:
        preparation.configuration_of(plans, name)
    return {"cases": len(cases)}


# -- training --------------------------------------------------------------------------------------


def fold_config(
    config, prepared: Path, name: str, fold: int, seed: int = 0, prior: Path | None = None
):
    """The config of one model: network, patch and batch of the plan, data of the fold."""
    plans = preparation.read_json(prepared / "plans.json")
    known = preparation.read_json(prepared / "dataset.json")
    own = preparation.configuration_of(plans, name)
    result = config.copy_and_resolve_references()
    result.unlock()
    steps = steps_of(result.challenge.steps, name, result.steps)
    labels = len(known["targets"]) if prior is not None else 0
    patch = tuple(own["patch_size"])
    channels = len(known["channels"]) * (2 * own["context"] + 1) + labels
    del result.challenge
    result.model = f"biomedical.unet:{own['model']}"
    result.model_args = {
        "input_channels": channels,
        "num_classes": known["outputs"],
        **{k: _tuples(v) for k, v in own["network"].items()},
        "deep_supervision": True,
    }
    augment = result.task_args.get("augment", "full")
    options = {
        "path": str(prepared),
        "configuration": name,
        "patch_size": patch,
        "channels": len(known["channels"]),
        "batch_size": int(own["batch_size"]),
        "fold": fold,
        "context": own["context"],
        "view": own["view"],
        "augmentation": augment,
        "prior": str(prior) if prior is not None else "",
        "prior_labels": labels,
        "validation_batches": 4,
    }
    given = {k: v for k, v in result.data.options.items() if k in DATA_OPTIONS}
    result.data.options = {**options, **given}
    regions = tuple(tuple(v) for v in known["targets"].values()) if known["regions"] else ()
    result.task_args.update(
        {
            "augment": augment,
            "batch_dice": bool(own["batch_dice"]),
            "regions": regions,
            "region_order": tuple(known["region_order"]),
            "ignore_label": known["ignore_label"],
            "prior_labels": labels,
            "context": own["context"],
            "view": own["view"],
            "report_cases": False,  # the next stage predicts them
        }
    )
    result.steps, result.batch_size = int(steps), int(own["batch_size"])
    result.seed = config.seed + 1000 * seed + fold
    return result


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _train_stage(config, settings: Settings, name, seed, fold, prior, raw) -> Stage:
    def run(folder, uses):
        from train.loop import fit

        # Another configuration must not invalidate what is trained: each prepares its own cases.
        preparation.preprocess_all(RawDataset.open(uses[raw]), uses["prepared"], name)
        path = uses[prior[0]] / "prior" if prior else None
        own = fold_config(config, uses["prepared"], name, fold, seed, path)
        return fit(own, folder, command=f"stage {folder.name}") or None

    important = config.copy_and_resolve_references()
    important.unlock()
    del important.challenge
    content = important.to_dict()
    for key in ("log_every", "tensorboard", "profile", "parallel", "checkpoint", "eval"):
        content.pop(key)
    content["data"]["options"].pop("path", None)
    steps = steps_of(settings.content["steps"], name, config.steps)
    told = {"kind": "train", "configuration": name, "fold": fold, "seed": seed, "steps": steps}
    return Stage(
        member_name(name, seed, fold), {**told, "config": content}, ("prepared", raw, *prior), run
    )


def _member(config, uses, settings: Settings, name: str, seed: int, fold: int, prior=None):
    """(task, variables) of one trained model."""
    from train.building import build_task
    from train.checkpoints import load_params

    own = fold_config(config, uses["prepared"], name, fold, seed, prior)
    with own.unlocked():
        own.task_args.mirror = bool(settings.content["mirroring"])
        own.task_args.step = float(settings.content["step"])
        own.task_args.inference_batch = int(settings.content["inference_batch"])
    variables = load_params(uses[member_name(name, seed, fold)])
    return build_task(own), variables, own


# -- out-of-fold predictions -----------------------------------------------------------------------


def _oof_stage(config, settings: Settings, name, members, prior, raw) -> Stage:
    def run(folder, uses):
        return _predict_held_out(folder, uses, config, settings, name, prior, raw)

    keys = ("mirroring", "step")
    told = {"kind": "out-of-fold prediction", "configuration": name}
    told |= {k: settings.content[k] for k in keys}
    # The first stage of a cascade also writes what the second reads.
    told["cascade"] = name == LOWRES and CASCADE in settings.configurations
    return Stage(f"oof_{name}", told, ("prepared", raw, *members, *prior), run)


def _predict_held_out(
    folder, uses, config, settings: Settings, name, prior, raw
) -> dict[str, float]:
    """`CASE.npy` float16 probabilities on the original grid, and which fold's model made them."""
    prepared = uses["prepared"]
    known = preparation.read_json(prepared / "dataset.json")
    held = preparation.read_json(prepared / "splits.json")
    plans = preparation.read_json(prepared / "plans.json")
    path = uses[prior[0]] / "prior" if prior else None
    feeds_cascade = name == LOWRES and CASCADE in settings.configurations
    if feeds_cascade:
        preparation.preprocess_all(RawDataset.open(uses[raw]), prepared, CASCADE)
    (folder / "prior").mkdir(exist_ok=True)
    recorded = {}
    for fold, cases in enumerate(held):
        models = [
            _member(config, uses, settings, name, s, fold, path) for s in range(settings.seeds)
        ]
        if not all((folder / f"{case}.npy").exists() for case in cases):
            task, _, own = models[0]
            options = dict(medical_patches.OPTIONS) | own.data.options.to_dict()
            for case, image, _, geometry in medical_patches.held_out(options):
                if (folder / f"{case}.npy").exists():
                    continue
                p = predict_probabilities(task.model, [m[1] for m in models], image, task.windows())
                if feeds_cascade:
                    _write_prior(folder / "prior", case, p, geometry, prepared, plans, known)
                restored = restore_probabilities(p, geometry, known["regions"])
                _save(folder / f"{case}.npy", restored.astype(np.float16))
        recorded |= dict.fromkeys(cases, fold)
    ensembling.assert_out_of_fold(recorded, held)
    preparation.write_json(folder / "folds.json", recorded)
    return {"cases": len(recorded)}


def _save(path: Path, array: np.ndarray) -> None:
    part = path.with_name("part." + path.name)
    np.save(part, array)
    part.replace(path)


def _write_prior(folder, case, p, geometry, prepared, plans, known) -> None:
    """The first stage's labels on the grid of the second."""
    fullres = plans["configurations"][CASCADE]["identifier"]
    target = Geometry.from_json(preparation.read_json(prepared / fullres / f"{case}.json"))
    _save(folder / f"{case}.npy", prior_labels(p, geometry, target, known))


def prior_labels(p: np.ndarray, geometry: Geometry, target: Geometry, known) -> np.ndarray:
    """Labels int8 of low-resolution probabilities, resampled to another case geometry."""
    moved = resample(
        p, target.target_shape, geometry.target_spacing, target.target_spacing, order=1
    )
    return labels_of(moved, region_order(known)).astype(np.int8)


# -- test cases ------------------------------------------------------------------------------------


def _test(folder: Path, uses, config, settings: Settings, raw_name: str) -> dict[str, float]:
    """`submission/CASE.EXT`, and where labels are known the Dice of every way to predict."""
    raw = RawDataset.open(uses[raw_name])
    known = preparation.read_json(uses["prepared"] / "dataset.json")
    plans = preparation.read_json(uses["prepared"] / "plans.json")
    chosen = preparation.read_json(uses["ensemble"] / "ensemble.json")
    stored = preparation.read_json(uses["postprocessing"] / "postprocessing.json")
    operations = [postprocessing.Operation.from_json(o) for o in stored["operations"]]
    thresholds = stored.get("thresholds")
    submission, details = folder / "submission", folder / "details"
    submission.mkdir(parents=True, exist_ok=True)
    details.mkdir(exist_ok=True)
    predict = _TestPredictor(config, uses, settings, plans, known)
    cases = raw.cases("Ts")
    for case in cases:
        target, mark = submission / f"{case}{raw.ending}", details / f"{case}.json"
        if target.exists() and mark.exists():
            continue
        image, spacing = raw.image(case, "Ts")
        singles, p = predict(image, spacing)
        order = region_order(known)
        combined = ensembling.average([p[m] for m in chosen["members"]], chosen["weights"])
        final = postprocessing.apply(labels_of(combined, order, thresholds), operations)
        content: dict[str, Any] = {"spacing": spacing}
        if raw.label_file(case, "Ts").exists():
            from train.challenge_report import test_metrics

            methods = {**{n: [q] for n, q in p.items()}, **singles, "ensemble": [combined]}
            content |= test_metrics(
                methods,
                final,
                raw.label(case, "Ts")[0],
                spacing,
                known,
                order,
                settings.content["tolerance"],
            )
        write_labels(target, final, raw.image_files(case, "Ts")[0])
        preparation.write_json(mark, content)
    return {"cases": len(cases)}


class _TestPredictor:
    """For one image: probabilities of single models by method, and of every configuration."""

    def __init__(self, config, uses, settings: Settings, plans, known):
        self.settings, self.plans, self.known = settings, plans, known
        self.models = {}
        for name in settings.configurations:
            # Any path says that there is a prior; the test's own is made below.
            prior = uses["prepared"] if name == CASCADE else None
            self.models[name] = [
                _member(config, uses, settings, name, s, k, prior)[:2]
                for s, k in settings.members()
            ]

    def __call__(self, image: np.ndarray, spacing):
        singles, found, low = {}, {}, None
        for name in self.settings.configurations:
            array, _, geometry = preparation.prepared_case(self.plans, name, image, spacing)
            if name == CASCADE:
                p_low, low_geometry = low
                prior = prior_labels(p_low, low_geometry, geometry, self.known)
                array = medical_patches.with_prior(array, prior, len(self.known["targets"]))
            task, first = self.models[name][0]
            windows = task.windows()
            members = [
                predict_probabilities(task.model, [v], array, windows) for _, v in self.models[name]
            ]
            if name == LOWRES:
                low = (ensembling.average(members), geometry)

            def restored(p, geometry=geometry):
                return restore_probabilities(p, geometry, self.known["regions"])

            found[name] = restored(ensembling.average(members))
            singles[f"{name}, single models"] = [restored(p) for p in members]
            if windows.mirror_axes:
                plain = dataclasses.replace(windows, mirror_axes=())
                p = predict_probabilities(task.model, [first], array, plain)
                singles[f"{name}, first model"] = [restored(members[0])]
                singles[f"{name}, first model, no mirroring"] = [restored(p)]
        return singles, found
