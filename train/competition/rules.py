"""What the rules of a track may say, checked before anything is trained: minutes later is too late.

A misspelled key would be a rule that silently does not hold, and so would many a wrong value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxmodels.security.attribution import METRICS
from jaxmodels.security.driving_simulator import Traffic, sample_scene
from jaxmodels.security.face_track import GOALS, MASKS, face_mask
from jaxmodels.security.knot_search import METHODS
from jaxmodels.security.perturbations import NORMS, check_mask
from jaxmodels.security.texture_attack import TextureAttack, check_texture_attack
from jaxmodels.security.trajectory_attack import TrajectoryAttack, check_trajectory_attack
from train.competition.roster import member_config
from train.competition.submissions import read_time
from train.data import pipeline
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
    if rules.get("deadline") is not None:
        _sound("deadline", lambda: read_time(rules["deadline"]))
    _number("seed", rules["seed"], 0, kind=int)


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


def _number(where: str, value: Any, low: float, high: float = float("inf"), kind=(int, float)):
    """Refuse what is no number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        limits = f"from {low:g} to {high:g}" if high < float("inf") else f"of at least {low:g}"
        raise ConfigError(f"rules: {where} must be a number {limits}, got {value!r}")


def _sound(where: str, build: Callable[[], Any]) -> Any:
    """What `build` gives; its complaint, as one of the rules at `where`."""
    try:
        return build()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"rules: {where}: {error}") from None


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
    _number("distance_weight", rules["distance_weight"], 0, 1)
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
        config = member_config(rules["surrogates"][0], Path("members"))
        size = pipeline.element_spec(config.data)["image"].shape[:2]
        mask = face_mask(budget["mask"], size)
        _sound("budget.area", lambda: check_mask(mask, budget["area"]))
    if not isinstance(rules["recipes"], list) or not rules["recipes"]:
        raise ConfigError("rules: recipes must be a list of at least one")
    for i, recipe in enumerate(rules["recipes"]):
        where = f"recipes[{i}]"
        _keys(where, recipe, *_RECIPE)
        for key in ("steps", "kernel", "draws"):
            _positive(f"{where}.{key}", recipe.get(key, 1))
        _positive(f"{where}.step", recipe.get("step", 1), (int, float))
        for key in ("momentum", "smoothness"):
            _number(f"{where}.{key}", recipe.get(key, 0), 0)
        if not isinstance(recipe.get("eot", True), bool):
            raise ConfigError(f"rules: {where}.eot must be true or false, got {recipe['eot']!r}")
        for name in recipe.get("models", []):
            _choice(f"{where}.models", name, names)
        for name in recipe.get("transforms", []):
            _choice(f"{where}.transforms", name, TRANSFORMS)
    minimal = rules.get("minimal")
    if minimal:
        _keys("minimal", minimal, ("models", "largest", "steps"), ("rounds",))
        _positive("minimal.largest", minimal["largest"], (int, float))
        for key in ("steps", "rounds"):
            _positive(f"minimal.{key}", minimal.get(key, 1))
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
    _sound("paint", lambda: _check_paint(rules["paint"]))
    given = rules["texture_attack"]
    _keys("texture_attack", given, (), _fields(TextureAttack))
    _sound("texture_attack", lambda: check_texture_attack(TextureAttack(**given)))
    traffic = rules.get("traffic") or {}
    _keys("traffic", traffic, (), _fields(Traffic))
    for seed in range(rules["scenes"]):
        _sound("traffic", lambda s=seed: sample_scene(s, Traffic(**traffic), rules["vehicles"]))
    _search("search", rules["search"], ("learning_rate", "deception"))
    perception = rules.get("perception") or {}
    _keys("perception", perception, (), ("world", "image_scale", "frames", "confidence"))
    _positive("perception.frames", perception.get("frames", 1))
    _positive("perception.image_scale", perception.get("image_scale", 1), (int, float))
    _number("perception.confidence", perception.get("confidence", 0.5), 0, 1)
    ego = rules.get("ego") or {}
    _keys("ego", ego, (), ("forecaster", "replan"))
    _positive("ego.replan", ego.get("replan", 1))
    tracks = rules.get("trajectory_attack")
    if tracks:
        own = [name for name in _fields(TrajectoryAttack) if name != "method"]
        _search("trajectory_attack", tracks, ("scenes", *own))
        _positive("trajectory_attack.scenes", tracks.get("scenes"))
        options = {key: tracks[key] for key in own if key in tracks}
        _sound("trajectory_attack", lambda: check_trajectory_attack(TrajectoryAttack(**options)))
    _members("detectors", rules["detectors"])
    _members("hidden_detector", rules["hidden_detector"])


def _search(where: str, found: Any, optional: Iterable[str]) -> None:
    """A search by several methods; `methods` of the tracks' attack may be left to its default."""
    _keys(where, found, (), ("methods", "restarts", "iterations", *optional))
    methods = found.get("methods", METHODS[:1] if where != "search" else None)
    if not isinstance(methods, list | tuple) or not methods:
        raise ConfigError(f"rules: {where}.methods must be a list of at least one")
    for name in methods:
        _choice(f"{where}.methods", name, METHODS)
    for key in ("restarts", "iterations"):
        _positive(f"{where}.{key}", found.get(key, 1))
    _positive(f"{where}.learning_rate", found.get("learning_rate", 1), (int, float))
    _number(f"{where}.deception", found.get("deception", 0), 0)


def _check_paint(paint: Any) -> None:
    if len(paint) != 3 or not all(0 <= color <= 1 for color in paint):
        raise ValueError(f"a color is three numbers of 0 to 1, got {paint}")


_CHECKS: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "deepfake": _deepfake,
    "driving": _driving,
    "face": _face,
}
