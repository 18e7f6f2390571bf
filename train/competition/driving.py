"""Driving track: a texture that hides a vehicle from a detector, scenarios that crash the ego.

By default in the track's own small world. With `perception: {world: street}` and `ego` in the rules
(`configs/rules/driving_systems.yaml`) the victims are the project's driving systems: modules
`street` and `ego`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.security import driving_renderer as renderer
from jaxmodels.security import texture_attack
from jaxmodels.security.driving_simulator import (
    REASONS,
    Scene,
    Traffic,
    check_scene,
    forecast_errors,
    judge,
    route_metrics,
    sample_scene,
    simulate,
)
from jaxmodels.security.scenario_search import search
from train.competition import ego, street
from train.competition.roster import Member, train_members
from train.competition.submissions import check_files, read_arrays, read_head, refuse, write_head
from train.data import pipeline
from train.naming import ConfigError, nearest

FILES = ("texture.npz", "scenarios.npz")
WORLDS = ("drive_up", "street")
_HIDDEN = 7919  # the scorer's own draws: poses, backgrounds, perception


def _detector(member: Member):
    model, variables = member.task.model, member.variables
    return lambda images: model.apply(variables, images)


def base_texture(rules: dict[str, Any]) -> jax.Array:
    """The vehicle's own paint [64, 64, 3]."""
    side = renderer.TEXTURE_SIDE
    return jnp.broadcast_to(jnp.asarray(rules["paint"], jnp.float32), (side, side, 3))


def _backgrounds(member: Member, split: str, count: int, seed: int) -> jax.Array:
    family, options = pipeline.resolve(member.config.data)
    rng = np.random.default_rng((seed, family.SPLITS.index(split)))
    photos = np.stack([family.background(rng, split, options) for _ in range(count)])
    gray = rng.uniform(0.25, 0.5, count).astype(np.float32)
    return renderer.road_scene(jnp.asarray(photos), jnp.asarray(gray))


def scenes(rules: dict[str, Any]) -> list[Scene]:
    """The scenes of the planning part, all checked."""
    traffic = Traffic(**(rules.get("traffic") or {}))
    found = [sample_scene(seed, traffic, rules["vehicles"]) for seed in range(rules["scenes"])]
    for scene in found:
        check_scene(scene.states)
    return found


def attempt(rules: dict[str, Any], workdir: Path, folder: Path) -> dict[str, float]:
    """Optimize a texture on the white-box detectors and a scenario for every scene; submit both."""
    world = _world(rules)
    forecaster, member = ego.forecaster_of(rules, workdir)
    base = base_texture(rules)
    key = jax.random.key(rules["seed"])
    if world == "street":
        texture = street.optimize(rules, workdir, base)
    else:
        texture = optimize(rules, workdir, base)

    traffic = Traffic(**(rules.get("traffic") or {}))
    options = {k: v for k, v in rules["search"].items() if k != "methods"}
    numbers = white_box_rates(rules, workdir, texture)
    for method in rules["search"]["methods"]:
        found = [
            search(jax.random.fold_in(key, i), scene, traffic, forecaster, method=method, **options)
            for i, scene in enumerate(scenes(rules))
        ]
        rate = np.mean([bool(f.outcome.collision) for f in found])
        numbers[f"collision_rate/{method}"] = float(rate)
        if method == rules["search"]["methods"][0]:
            best = found
    if member is not None and rules.get("trajectory_attack"):
        numbers |= ego.attack_forecasts(rules, forecaster, member)
    write_head(folder, "driving")
    np.savez(folder / FILES[0], texture=np.asarray(texture, np.float32))
    knots = {f"scene{i:03d}": np.asarray(f.knots, np.float32) for i, f in enumerate(best)}
    np.savez(folder / FILES[1], **knots)
    return {**score(rules, workdir, folder), **numbers}


def _world(rules: dict[str, Any]) -> str:
    world = (rules.get("perception") or {}).get("world", WORLDS[0])
    if world not in WORLDS:
        raise ConfigError(f"rules: perception.world is {world!r}; {nearest(world, WORLDS)}")
    return world


def optimize(rules: dict[str, Any], workdir: Path, base: jax.Array) -> jax.Array:
    """The texture [side, side, 3] found on the track's own detectors."""
    detectors = train_members(rules["detectors"], workdir)
    cfg = texture_attack.TextureAttack(**rules["texture_attack"])
    backgrounds = _backgrounds(detectors[0], "train", 64, rules["seed"])
    white_box = [_detector(m) for m in detectors]
    run = jax.jit(
        lambda key, backgrounds, base: texture_attack.optimize_texture(
            key, white_box, backgrounds, base, cfg
        )
    )
    return run(jax.random.key(rules["seed"]), backgrounds, base)


def score(rules: dict[str, Any], workdir: Path, folder: Path) -> dict[str, float]:
    """Mean of the perception and planning scores, times 100, and the tables behind them."""
    read_head(folder, "driving", rules.get("deadline"))
    check_files(folder, FILES)
    side = renderer.TEXTURE_SIDE
    texture = read_arrays(folder, FILES[0], {"texture": (side, side, 3)})["texture"]
    if texture.min() < 0 or texture.max() > 1:
        refuse([f"texture: colors from {texture.min():g} to {texture.max():g}, not 0..1"])
    world, traffic = _world(rules), Traffic(**(rules.get("traffic") or {}))
    listed = scenes(rules)
    shape = (rules["vehicles"], traffic.knots, 2)
    knots = read_arrays(folder, FILES[1], {f"scene{i:03d}": shape for i in range(len(listed))})
    if world == "street":
        perception = street.score(rules, workdir, judged_textures(rules, jnp.asarray(texture)))
    else:
        perception = _perception(rules, workdir, jnp.asarray(texture))
    forecaster, _ = ego.forecaster_of(rules, workdir)
    planning = _planning(rules, listed, list(knots.values()), traffic, forecaster)
    return {**_combined(perception, planning), **perception, **planning}


def _combined(perception, planning) -> dict[str, float]:
    return {"score": 50 * (perception["perception_score"] + planning["planning_score"])}


def detection_tables(
    rules: dict[str, Any], member: Member, textures: dict[str, jax.Array]
) -> dict[str, np.ndarray]:
    """Bool [drives, frames] a texture: found on drive-ups that no optimization saw."""
    drives, frames = rules["drives"], rules["frames"]
    backgrounds = _backgrounds(member, "test", drives, _HIDDEN)
    rng = np.random.default_rng((_HIDDEN, 1))
    draws = [
        (rng.uniform(-1, 1), np.deg2rad(rng.uniform(-10, 10)), rng.uniform(0.7, 1.3))
        for _ in range(drives)
    ]
    detect = jax.jit(
        lambda backgrounds, texture, pose: texture_attack.detection_rate(
            _detector(member), backgrounds, texture, pose
        )
    )
    found = {name: [] for name in textures}
    for background, (lateral, yaw, light) in zip(backgrounds, draws):
        pose = renderer.drive_up(frames, lateral, yaw, light)
        many = jnp.broadcast_to(background, (frames, *background.shape))
        for name, one in textures.items():
            found[name].append(np.asarray(detect(many, one, pose)))
    return {name: np.stack(rows) for name, rows in found.items()}


def judged_textures(rules: dict[str, Any], texture: jax.Array) -> dict[str, jax.Array]:
    """The attack's texture beside what it has to be better than."""
    base = base_texture(rules)
    chance = np.random.default_rng((_HIDDEN, 2)).uniform(size=base.shape).astype(np.float32)
    return {"clean": base, "random": jnp.asarray(chance), "attacked": texture}


def _perception(rules, workdir, texture) -> dict[str, float]:
    """Detection by the hidden detector."""
    (hidden,) = train_members(rules["hidden_detector"], workdir)
    tables = detection_tables(rules, hidden, judged_textures(rules, texture))
    numbers = {f"detection_rate/{name}": float(rows.mean()) for name, rows in tables.items()}
    for i, part in enumerate(np.array_split(np.arange(rules["frames"]), 3)):
        where = ("30-22m", "22-14m", "14-6m")[i]
        numbers[f"attack_success/{where}"] = float(1 - tables["attacked"][:, part].mean())
    found = jnp.asarray(tables["attacked"])
    value = texture_attack.texture_score(found, texture, base_texture(rules))
    return {"perception_score": float(value), **numbers}


def white_box_rates(rules: dict[str, Any], workdir: Path, texture: jax.Array) -> dict[str, float]:
    """Detection by the detectors that were attacked, mean over them, on the scorer's drive-ups."""
    textures = judged_textures(rules, texture)
    members = train_members(rules["detectors"], workdir)
    if _world(rules) == "street":
        tables = street.detection_tables(rules, members, textures)
    else:
        tables = [detection_tables(rules, member, textures) for member in members]
    return {
        f"white_box_rate/{name}": float(np.mean([t[name].mean() for t in tables]))
        for name in tables[0]
    }


@functools.partial(jax.jit, static_argnums=3)
def _judged(scene, knots, forecaster, traffic):
    """Verdict, route metrics and the forecasts' errors (None without a forecaster)."""
    rollout = simulate(scene, knots, traffic, forecaster)
    errors = None if forecaster is None else forecast_errors(rollout, forecaster)
    return judge(rollout, traffic), route_metrics(rollout, scene.lane_y, traffic), errors


def _planning(rules, listed, knots, traffic, forecaster=None) -> dict[str, float]:
    """Mean verdict over the scenes, each under fresh draws of the ego's perception.

    With a forecaster also the errors of its forecasts in the loop, under the submitted scenarios
    and with nobody steering.
    """

    outcomes, routes, errors = [], [], {"attacked": [], "calm": []}
    for i, (scene, own) in enumerate(zip(listed, knots)):
        for draw in range(rules["draws"]):
            rng = np.random.default_rng((_HIDDEN, i, draw))
            fresh = scene._replace(
                noise=jnp.asarray(rng.standard_normal(scene.noise.shape), jnp.float32),
                missed=jnp.asarray(rng.uniform(size=scene.missed.shape), jnp.float32),
            )
            outcome, route, wrong = jax.device_get(
                _judged(fresh, jnp.asarray(own), forecaster, traffic)
            )
            outcomes.append(outcome)
            routes.append(route)
            if forecaster is not None:
                *_, calm = jax.device_get(_judged(fresh, jnp.zeros_like(own), forecaster, traffic))
                errors["attacked"].append(wrong)
                errors["calm"].append(calm)
    scores = np.asarray([o.score for o in outcomes])
    valid = np.asarray([o.collision for o in outcomes])
    reasons = np.asarray([o.reason for o in outcomes])
    times = np.asarray([o.time for o in outcomes])[valid]
    forecasts = {
        f"in_loop_{short}/{name}": float(np.mean([getattr(e, part) for e in rows]))
        for name, rows in errors.items()
        if rows
        for short, part in (("ade", "average"), ("fde", "final"))
    }
    return {
        "planning_score": float(scores.mean()),
        "collision_rate": float(valid.mean()),
        "min_ttc": float(np.median([o.min_ttc for o in outcomes])),
        "time_to_collision": float(times.mean()) if len(times) else traffic.horizon,
        "off_road_length": float(np.mean([r.off_road for r in routes])),
        "distance_to_route": float(np.mean([r.distance for r in routes])),
        "incomplete_route": float(np.mean([r.incomplete for r in routes])),
        "running_time": float(np.mean([r.time for r in routes])),
        **{f"share/{name}": float((reasons == i).mean()) for i, name in enumerate(REASONS)},
        **forecasts,
    }
