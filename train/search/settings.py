"""What a search begins with: its options checked, its supernet loaded, its settings kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from train.building import build_task
from train.data import pipeline
from train.initialization import variables_from
from train.naming import ConfigError
from train.search.scaling_strategy import FORMS

# What a kind of search searches: the task that trained the supernet.
TASKS = {"mcea": "supernet", "genome": "superformer"}

# What may change while a search goes on.
_FREE = ("chunk", "compare", "keep", "strategy")
# Options of data that say how fast they come, not what they are.
_FREE_DATA = ("threads", "workers")
# Arguments of models that change how a number is computed, or a file read, and not which number.
_FREE_MODEL = (
    *("parent", "name", "dtype", "param_dtype", "depthwise", "sliced"),
    "resize_checkpoint",
)
_LEAST = {
    "population": 1, "generations": 0, "keep": 1, "chunk": 1, "base_models": 1, "iterations": 1,
    "tries": 1, "batch_size": 0, "seed": 0, "flops_min": 0, "base_error": 0, "scale_error": 0,
}  # fmt: skip
_POSITIVE = ("budget", "ratio")


def check_options(config) -> None:
    """ConfigError for a `config.search` that would fail, or find nothing, later on."""
    search = config.search
    if search.kind not in TASKS:
        raise ConfigError(f"config.search.kind: {search.kind!r}; known: {', '.join(TASKS)}")
    if config.task != TASKS[search.kind]:
        raise ConfigError(
            f"config.task: {search.kind} searches what the task {TASKS[search.kind]} trained, "
            f"not {config.task}"
        )
    for key, least in _LEAST.items():
        if key in search and not search[key] >= least:
            raise ConfigError(f"config.search.{key}: {search[key]}; it must be at least {least}")
    for key in _POSITIVE:
        if key in search and not search[key] > 0:
            raise ConfigError(f"config.search.{key}: {search[key]}; it must be positive")
    if "strategy" in search and search.strategy not in FORMS:
        raise ConfigError(f"config.search.strategy: {search.strategy!r}; known: {', '.join(FORMS)}")
    pipeline.check_split(config.data, search.split, "config.search.split")


def check_reach(config, task) -> None:
    """ConfigError where the task's networks cannot be what `config.search` asks for."""
    search, space = config.search, task.model.space
    if search.kind == "genome":
        try:
            space.check_budget(search.flops_min, search.budget)
        except ValueError as error:
            raise ConfigError(f"config.search.budget: {error}") from None
        return
    needed = FORMS[search.get("strategy", "linear")]
    if space.max_scaling_stage < needed:
        raise ConfigError(
            f"config.search.strategy: it is fitted to at least {needed} searched stages, "
            f"config.model_args.max_scaling_stage is {space.max_scaling_stage}"
        )


def load_supernet(config, task, checkpoint: str) -> dict[str, Any]:
    """Variables that score networks, of a run directory or a PyTorch supernet file.

    Raises ConfigError where the run was of another network or trained otherwise, naming the first
    key that differs, and for names and shapes that are not the model's.
    """
    _check_run(config, task, Path(checkpoint))
    spec = pipeline.element_spec(config.data)
    batch = {k: jax.ShapeDtypeStruct((1, *s.shape), s.dtype) for k, s in spec.items()}
    params, extra = jax.eval_shape(task.init, jax.random.key(0), batch)
    # Call counters belong to training: a score has both sides.
    wanted = {"params": params, **{k: v for k, v in extra.items() if k == "batch_stats"}}
    return variables_from(checkpoint, config.model, task.model, wanted, key="--checkpoint")


def _check_run(config, task, checkpoint: Path) -> None:
    """Compare a run's own config with this one, as objects: however their values are spelled."""
    folders = (checkpoint, checkpoint.parent) if checkpoint.is_dir() else ()
    file = next((f / "config.json" for f in folders if (f / "config.json").is_file()), None)
    if file is None:
        return
    own = ConfigDict(json.loads(file.read_text(encoding="utf-8")))
    trained = build_task(own) if own.get("task") == config.task else None
    if trained is None or type(trained.model) is not type(task.model):
        raise ConfigError(
            f"--checkpoint {checkpoint}: a run of {own.get('task')} with {own.get('model')}, "
            f"not of {config.task} with {config.model}"
        )
    now, before = _arguments(task), _arguments(trained)
    for key, value in now.items():
        if value != before[key]:
            raise ConfigError(
                f"--checkpoint {checkpoint}: it was trained with config.{key} {before[key]!r}, "
                f"now {value!r}"
            )
    now, before = _data_of(config), _data_of(own)
    differing = [k for k in {**now, **before} if now.get(k) != before.get(k)]
    if differing:
        print(
            f"--checkpoint {checkpoint}: it was trained on other data (config.data."
            f"{differing[0]}: {before.get(differing[0])!r}, now {now.get(differing[0])!r}); images "
            "that are held out here may have been among them",
            file=sys.stderr,
        )


def _arguments(task) -> dict[str, Any]:
    """What scores depend on of a task and its model, by config key, as JSON has it."""
    found = {}
    for prefix, one, free in (
        ("task_args", task, ("model", *task.training_only)),
        ("model_args", task.model, _FREE_MODEL),
    ):
        names = [f.name for f in dataclasses.fields(one) if f.name not in free]
        found |= {f"{prefix}.{name}": _plain(getattr(one, name)) for name in names}
    return found


def _data_of(config) -> dict[str, Any]:
    return dict(_flat(_without(_plain(config.data), (*_FREE_DATA, "path"))))


def keep_settings(workdir: Path, config, task, variables) -> None:
    """Write `settings.json`; where a search has begun, refuse to go on with other settings.

    What it found so far would be passed off as theirs. Raises ConfigError naming the first that
    differs.
    """
    settings = {
        "search": _without(_plain(config.search), _FREE),
        "task": config.task,
        "task_args": _without(_plain(config.task_args), task.training_only),
        "model": config.model,
        "model_args": _plain(config.model_args),
        "precision": config.precision,
        "data": _without(_plain(config.data), _FREE_DATA),
        "weights": _digest(variables),
    }
    path = workdir / "settings.json"
    if (workdir / "search.json").exists() and path.exists():
        before, now = dict(_flat(json.loads(path.read_text()))), dict(_flat(settings))
        for key in {**now, **before}:
            if now.get(key) != before.get(key):
                what = "the supernet's weights" if key == "weights" else f"config.{key}"
                other = (
                    "others" if key == "weights" else f"{now.get(key)!r}, not {before.get(key)!r}"
                )
                raise ConfigError(
                    f"{workdir} holds a search begun with other settings ({what}: now {other}); "
                    "take another --workdir"
                )
    part = path.with_suffix(".part")
    part.write_text(json.dumps(settings, indent=2) + "\n")
    part.replace(path)


def _plain(value: Any) -> Any:
    """As it comes back from a JSON file."""

    def other(value):
        return value.to_dict() if hasattr(value, "to_dict") else dict(value)

    return json.loads(json.dumps(value, default=other))


def _without(value: Any, names) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {k: _without(v, names) for k, v in value.items() if k not in names}


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted key, value)` of a tree of dictionaries."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, inner


def _digest(variables) -> str:
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(variables):
        found.update(np.ascontiguousarray(leaf))
    return found.hexdigest()
