"""Runs of several stages: each with its own folder, resumable, invalidated by what it reads.

A config with a non-empty `order` is a progression. `config.stages.NAME` says of each stage

- `kind`: `train` (a run of `fit`), or a function of `train/progression_stages.py`;
- `changes`: for `train` what differs from the config itself, nested as the config is (`model_args`
  and `task_args` replace the config's, everything else is merged into it); else the arguments of
  the function;
- `uses`: config key (nested likewise) or argument -> the earlier stage whose result it gets;
- `given`: a result from elsewhere (a run directory, a checkpoint, a data file) instead of a run.

`workdir/NAME` holds the stage's result, and `stage.json` when it is finished: its settings, its
metrics and a manifest of its files. A stage is run again when its settings, or the stages it uses,
are others than those of the result at hand; the old result is kept as `NAME.outdated`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from train.building import build_task
from train.naming import ConfigError, nearest

MANIFEST = "stage.json"
_STARTED = "started.json"
# How a run is watched and where it runs does not change what it computes.
UNIMPORTANT = (
    "log_every",
    "tensorboard",
    "profile",
    "parallel",
    "checkpoint",
    "eval.every",
    "eval.batch_size",
    "data.options.path",
    "data.options.threads",
    "data.options.workers",
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: what decides its result (`settings`, JSON), what it reads, how it is made.

    `run(folder, results) -> metrics` writes into `folder`; `results` maps the names in `uses` to
    paths. It returns None when it was asked to stop. `result` is the path, below the folder, that
    later stages get ("" is the folder). `given` is a path that stands for the result.
    """

    name: str
    settings: Mapping[str, Any]
    uses: tuple[str, ...]
    run: Callable[[Path, Mapping[str, Path]], Mapping[str, float] | None]
    result: str = ""
    given: str = ""


def run_stages(
    stages: list[Stage], workdir: Path, say: Callable[[str], None] = print
) -> dict[str, dict[str, Any]] | None:
    """Run what is not finished, in order; name -> manifest, or None when asked to stop.

    Raises ValueError for a stage that uses one which does not come before it.
    """
    workdir = Path(workdir)
    fingerprints: dict[str, str] = {}
    results: dict[str, Path] = {}
    done: dict[str, dict[str, Any]] = {}
    for stage in stages:
        unknown = [u for u in stage.uses if u not in results]
        if unknown:
            raise ConfigError(
                f"config.stages.{stage.name}.uses: {unknown[0]!r} does not come before it; "
                f"{nearest(unknown[0], results) if results else 'it is the first stage'}"
            )
        if stage.given:
            results[stage.name] = _given(stage)
            fingerprints[stage.name] = _fingerprint({"given": str(results[stage.name])}, {})
            say(f"{stage.name}: given, {stage.given}")
            continue
        print_ = _fingerprint(stage.settings, {u: fingerprints[u] for u in stage.uses})
        folder = workdir / stage.name
        fingerprints[stage.name], results[stage.name] = print_, folder / stage.result
        manifest = _read(folder / MANIFEST)
        if manifest and manifest["fingerprint"] == print_ and _complete(folder, manifest):
            say(f"{stage.name}: finished before, {_line(manifest['metrics'])}")
            done[stage.name] = manifest
            continue
        _make_way(folder, print_, say)
        say(f"{stage.name}: {stage.settings.get('kind', 'runs')}")
        began = time.monotonic()
        metrics = stage.run(folder, {u: results[u] for u in stage.uses})
        if metrics is None:
            say(f"{stage.name}: stopped; the same command goes on here")
            return None
        manifest = {
            "stage": stage.name,
            "fingerprint": print_,
            "settings": stage.settings,
            "uses": {u: fingerprints[u] for u in stage.uses},
            "metrics": dict(metrics),
            "seconds": round(time.monotonic() - began, 1),
            "files": _files(folder),
        }
        if jax.process_index() == 0:
            _write(folder / MANIFEST, manifest)
        say(f"{stage.name}: {_line(metrics)} ({manifest['seconds']} s)")
        done[stage.name] = manifest
    return done


def _given(stage: Stage) -> Path:
    path = Path(stage.given)
    if not path.exists():
        raise ConfigError(f"config.stages.{stage.name}.given: no file or directory {stage.given!r}")
    # A stage folder given from another progression stands for that stage's result.
    return path / stage.result if stage.result and path.is_dir() else path


def _fingerprint(settings: Mapping[str, Any], uses: Mapping[str, str]) -> str:
    text = json.dumps([settings, uses], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _make_way(folder: Path, fingerprint: str, say: Callable[[str], None]) -> None:
    """The folder for a stage of this fingerprint: its own unfinished one, or a new one."""
    if jax.process_index() == 0:
        started = _read(folder / _STARTED)
        if folder.exists() and (started or {}).get("fingerprint") != fingerprint:
            aside = folder.with_name(f"{folder.name}.outdated")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            say(f"{folder.name}: its settings or what it uses changed; the old result is {aside}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        _write(folder / _STARTED, {"fingerprint": fingerprint})
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"stage {folder.name}")


def _files(folder: Path) -> dict[str, int]:
    """Name -> bytes of the files of a stage, its own records aside."""
    return {
        str(p.relative_to(folder)): p.stat().st_size
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in (MANIFEST, _STARTED)
    }


def _complete(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether every file of the manifest is still there, with its size."""
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in manifest["files"].items()
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    part.replace(path)


def _line(metrics: Mapping[str, Any]) -> str:
    shown = [f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, int | float)]
    return ", ".join(shown[:8]) or "done"


# -- from a config ---------------------------------------------------------------------------------


def stages_of(config) -> list[Stage]:
    """The stages of `config.order` that `config.stages` describes.

    Raises ConfigError for an unknown name, kind or key.
    """
    from train import progression_stages

    kinds = {**progression_stages.KINDS, "train": None}
    found = []
    for name in config.order:
        if name not in config.stages:
            raise ConfigError(f"config.order: no stage {name!r}; {nearest(name, config.stages)}")
        spec = config.stages[name]
        if spec.kind not in kinds:
            raise ConfigError(
                f"config.stages.{name}.kind: {spec.kind!r}; {nearest(spec.kind, kinds)}"
            )
        uses = dict(_leaves(spec.get("uses", {})))
        if spec.kind == "train":
            stage = _train_stage(config, name, spec, uses)
        else:
            stage = _function_stage(kinds[spec.kind], name, spec, uses)
        found.append(stage)
    return found


def _function_stage(kind, name, spec, uses) -> Stage:
    arguments = _plain(spec.get("changes", {}))

    def run(folder, results):
        return kind.run(
            folder, **arguments, **{argument: results[stage] for argument, stage in uses.items()}
        )

    settings = {"kind": spec.kind, "changes": arguments, "uses": uses}
    return Stage(
        name, settings, tuple(uses.values()), run, kind.result, spec.get("given", "") or ""
    )


def _train_stage(config, name, spec, uses) -> Stage:
    own = stage_config(config, name)
    settings = {"kind": "train", "config": _important(_plain(own)), "uses": uses}
    # Unlike the rest of `checkpoint` these move the end, or what it reports.
    deciding = [key for key in ("patience", "report_best") if own.checkpoint.get(key)]
    if deciding:
        settings["ends by"] = {
            key: own.checkpoint[key] for key in (*deciding, "best_metric", "best_mode")
        }

    def run(folder, results):
        from train.loop import fit

        ready = own.copy_and_resolve_references()
        with ready.unlocked():
            for key, stage in uses.items():
                _assign(ready, key, str(results[stage]), f"config.stages.{name}.uses")
        return fit(ready, folder, command=f"stage {name}") or None

    return Stage(name, settings, tuple(uses.values()), run, "", spec.get("given", "") or "")


def stage_config(config, name: str):
    """The config of one `train` stage: the progression's own with the stage's changes."""
    own = config.copy_and_resolve_references()
    own.unlock()
    changes = config.stages[name].get("changes", {})
    del own.order, own.stages
    for key, value in _flat(changes):
        _assign(own, key, value, f"config.stages.{name}.changes")
    return own


# A stage that names another model or task gets that one's arguments, not a mixture.
_REPLACED = ("model_args", "task_args")
_FREE = (*_REPLACED, "optimizer.args", "data.options")


def _assign(config, dotted: str, value: Any, where: str) -> None:
    *parents, last = dotted.split(".")
    node = config
    for parent in parents:
        if parent not in node:
            raise ConfigError(f"{where}: no key {dotted!r} in the config")
        node = node[parent]
    if last not in node and not dotted.startswith(_FREE):
        raise ConfigError(f"{where}: no key {dotted!r} in the config; {nearest(last, node)}")
    try:
        node[last] = value
    except TypeError:
        raise ConfigError(f"{where}: {dotted} = {value!r} is not of the key's type") from None


def _flat(changes, prefix: str = ""):
    """(dotted key, value) of nested changes; arguments of models and tasks stay whole."""
    for key in changes:
        path, value = f"{prefix}{key}", changes[key]
        if hasattr(value, "items") and path not in _REPLACED:
            yield from _flat(value, f"{path}.")
        else:
            yield path, value


def _leaves(tree, prefix: str = ""):
    """(dotted key, value) of nested mappings."""
    for key in tree:
        if hasattr(tree[key], "items"):
            yield from _leaves(tree[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", tree[key]


def _plain(config) -> dict[str, Any]:
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _important(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    kept = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if path in UNIMPORTANT:
            continue
        kept[key] = _important(value, f"{path}.") if isinstance(value, Mapping) else value
    return kept


def run_progression(config, workdir, *, command: str = "") -> dict[str, float]:
    """Run the stages of a config; the last stage's metrics, every stage's with its name before.

    `workdir/report.md` tells every stage's numbers and time.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    stages = stages_of(config)
    for name in config.order:
        spec = config.stages[name]
        if spec.kind == "train" and not spec.get("given"):
            build_task(stage_config(config, name))  # a late stage's mistake is said at once
    done = run_stages(stages, workdir)
    if done is None:
        return {}
    rows = ["| stage | seconds | metrics |", "|---|---|---|"]
    for name, manifest in done.items():
        rows.append(f"| {name} | {manifest['seconds']} | {_line(manifest['metrics'])} |")
    if jax.process_index() == 0:
        text = f"# {config.task}: {', '.join(config.order)}\n\n    {command}\n\n"
        (workdir / "report.md").write_text(text + "\n".join(rows) + "\n", encoding="utf-8")
    return {
        f"{name}.{key}": value
        for name, manifest in done.items()
        for key, value in manifest["metrics"].items()
        if isinstance(value, int | float)
    }
