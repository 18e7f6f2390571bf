"""What the rules of a track may say, checked before anything is trained: minutes later is too late.

A misspelled key would be a rule that silently does not hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxmodels.security.attribution import METRICS
from jaxmodels.security.driving_simulator import Traffic
from jaxmodels.security.face_track import GOALS, MASKS
from jaxmodels.security.knot_search import METHODS
from jaxmodels.security.perturbations import NORMS
from jaxmodels.security.texture_attack import TextureAttack
from jaxmodels.security.trajectory_attack import TrajectoryAttack
from train.naming import ConfigError, nearest

KINDS = ("pixels", "patch")
TRANSFORMS = ("di", "cim")
_MEMBER = (("name", "config"), ("set", "require", "limit"))
_RECIPE = (
    ("name", "steps"),
    ("momentum", "models", "transforms", "kernel", "draws", "eot", "step", "smoothness"),
)


def check_rules(track: str, rules: Mapping[str, Any]) -> None:
    """Raises ConfigError naming the key of `rules` that is missing, unknown or cannot be."""
    _CHECKS[track](rules)


def _keys(where: str, found: Any, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    required, known = tuple(required), (*required, *optional)
    if not isinstance(found, Mapping):
        raise ConfigError(f"rules: {where or 'they'} must be a mapping, got {found!r}")
    prefix = f"{where}." if where else ""
    for key in found:
        if key not in known:
            raise ConfigError(f"rules: {prefix}{key}: no such key; {nearest(str(key), known)}")
    missing = [key for key in required if found.get(key) is None]
    if missing:
        raise ConfigError(f"rules: {prefix}{missing[0]} is missing")


def _choice(where: str, value: Any, known: Iterable[str]) -> None:
    if value not in known:
        raise ConfigError(f"rules: {where} is {value!r}; {nearest(str(value), known)}")


def _positive(where: str, value: Any, kind: type | tuple[type, ...] = int) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
        raise ConfigError(f"rules: {where} must be a positive number, got {value!r}")


def _members(where: str, found: Any) -> list[str]:
    """Names of the entries."""
    if not isinstance(found, list) or not found:
        raise ConfigError(f"rules: {where} must be a list of members, got {found!r}")
    for i, entry in enumerate(found):
        _keys(f"{where}[{i}]", entry, *_MEMBER)
    names = [entry["name"] for entry in found]
    if len(set(names)) != len(names):
        raise ConfigError(f"rules: {where} has a name twice: {names}")
    return names


def _fields(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


def _deepfake(rules) -> None:
    _keys("", rules, ("metric", "clusters", "seed", "members"), ("deadline",))
    _choice("metric", rules["metric"], METRICS)
    _positive("clusters", rules["clusters"])
    _members("members", rules["members"])


def _face(rules) -> None:
    _keys(
        "",
        rules,
        (
            *("goal", "pairs", "seed", "batch", "budget", "distance_weight"),
            *("recipes", "surrogates", "victims"),
        ),
        ("deadline", "minimal"),
    )
    _choice("goal", rules["goal"], GOALS)
    for key in ("pairs", "batch"):
        _positive(key, rules[key])
    names = _members("surrogates", rules["surrogates"])
    _members("victims", rules["victims"])
    budget = rules["budget"]
    _keys("budget", budget, ("kind",), ("norm", "eps", "mask", "area"))
    _choice("budget.kind", budget["kind"], KINDS)
    if budget["kind"] == "pixels":
        _keys("budget", budget, ("kind", "eps"), ("norm",))
        _choice("budget.norm", budget.get("norm", NORMS[0]), NORMS)
        _positive("budget.eps", budget["eps"], (int, float))
    else:
        _keys("budget", budget, ("kind", "mask", "area"))
        _choice("budget.mask", budget["mask"], MASKS)
        _positive("budget.area", budget["area"], (int, float))
    if not isinstance(rules["recipes"], list) or not rules["recipes"]:
        raise ConfigError("rules: recipes must be a list of at least one")
    for i, recipe in enumerate(rules["recipes"]):
        where = f"recipes[{i}]"
        _keys(where, recipe, *_RECIPE)
        _positive(f"{where}.steps", recipe["steps"])
        for name in recipe.get("models", []):
            _choice(f"{where}.models", name, names)
        for name in recipe.get("transforms", []):
            _choice(f"{where}.transforms", name, TRANSFORMS)
    minimal = rules.get("minimal")
    if minimal:
        _keys("minimal", minimal, ("models", "largest", "steps"), ("rounds",))
        for name in minimal["models"]:
            _choice("minimal.models", name, names)


def _driving(rules) -> None:
    counts = ("drives", "frames", "scenes", "vehicles", "draws")
    _keys(
        "",
        rules,
        ("seed", "paint", "texture_attack", "search", "detectors", "hidden_detector", *counts),
        ("deadline", "traffic", "perception", "ego", "trajectory_attack"),
    )
    for key in counts:
        _positive(key, rules[key])
    _keys("texture_attack", rules["texture_attack"], (), _fields(TextureAttack))
    _keys("traffic", rules.get("traffic") or {}, (), _fields(Traffic))
    options = ("restarts", "iterations", "learning_rate", "deception")
    _keys("search", rules["search"], ("methods",), options)
    known = ("world", "image_scale", "frames", "confidence")
    _keys("perception", rules.get("perception") or {}, (), known)
    _keys("ego", rules.get("ego") or {}, (), ("forecaster", "replan"))
    tracks = rules.get("trajectory_attack")
    if tracks:
        own = (*_fields(TrajectoryAttack), "methods")
        _keys("trajectory_attack", tracks, ("scenes",), [k for k in own if k != "method"])
    for where, given in (("search", rules["search"]), ("trajectory_attack", tracks or {})):
        for name in given.get("methods", ["gradient"]) or [None]:
            _choice(f"{where}.methods", name, METHODS)
    _members("detectors", rules["detectors"])
    _members("hidden_detector", rules["hidden_detector"])


_CHECKS: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "deepfake": _deepfake,
    "driving": _driving,
    "face": _face,
}
