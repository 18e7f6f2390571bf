"""The driving track's ego with a forecaster of the project: VectorNet, trained as a member.

`ego: {forecaster: ENTRY, replan: STEPS}` in the rules, ENTRY as for every member (of
`configs/vectornet.py:highway`), or `constant_velocity`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.driving.vectorization import to_frame
from jaxmodels.security.ego_forecasts import ConstantVelocity, NetworkForecaster
from jaxmodels.security.trajectory_attack import TrajectoryAttack, attack_track
from train.competition.roster import Member, train_members
from train.data import motion_scenes, pipeline
from train.naming import ConfigError

_SCENE_OPTIONS = ("radius", "heading_min_disp", "max_polylines", "max_vectors", "columns")
_NOWHERE = 1e5  # m; padding of scenes with fewer vehicles or lanes, beyond any radius


def forecaster_of(rules: dict[str, Any], workdir: Path):
    """(forecaster or None, its member or None) of the rules' ego."""
    ego = rules.get("ego") or {}
    entry = ego.get("forecaster")
    if entry is None:
        return None, None
    steps = {"replan": ego["replan"]} if "replan" in ego else {}
    if entry == "constant_velocity":
        return ConstantVelocity(**steps), None
    if isinstance(entry, str):
        raise ConfigError(
            f"rules: ego.forecaster is {entry!r}; known: constant_velocity, or a member's entry"
        )
    (member,) = train_members([entry], workdir)
    return network_forecaster(member, **steps), member


def network_forecaster(member: Member, replan: int = 5) -> NetworkForecaster:
    """The member's network on scenes made as its own were."""
    _, options = pipeline.resolve(member.config.data)
    if options["inputs"] != "vectors" or not options["use_agents"] or not options["use_map"]:
        raise ConfigError(
            f"{member.name}: an ego's forecaster takes vectors of all agents and of the map"
        )
    return NetworkForecaster(
        jax.tree.map(jnp.asarray, member.variables),
        member.task.model,
        observed=options["obs"],
        replan=replan,
        **{key: options[key] for key in _SCENE_OPTIONS},
    )


def observed_scenes(member: Member, count: int) -> dict[str, np.ndarray]:
    """Held-out scenes: `tracks` [N, A, To, 2] with the target first, `lanes` [N, L, n, 2], `truth`
    [N, T, 2], around the target's last observed place."""
    _, options = pipeline.resolve(member.config.data)
    if options["kind"] != "simulator" or options["crossing"]:
        raise ConfigError(f"{member.name}: tracks to attack are those of simulated roads")
    found = motion_scenes.simulated_scenes("val", options)[:count]
    obs, last = options["obs"], options["obs"] + options["horizon"]
    agents = max(len(scene.tracks) for scene in found)
    lanes = max(len(scene.lanes) for scene in found)
    parts = {"tracks": [], "lanes": [], "truth": []}
    for scene in found:
        moved = to_frame(scene.tracks, scene.tracks[0, obs - 1], 0.0)
        tracks = np.full((agents, obs, 2), _NOWHERE)
        tracks[: len(moved)] = moved[:, :obs]
        own = np.stack([to_frame(lane, scene.tracks[0, obs - 1], 0.0) for lane in scene.lanes])
        roads = np.full((lanes, *own.shape[1:]), _NOWHERE)
        roads[: len(own)] = own
        for name, part in (("tracks", tracks), ("lanes", roads), ("truth", moved[0, obs:last])):
            parts[name].append(part.astype(np.float32))
    return {name: np.stack(part) for name, part in parts.items()}


def attack_forecasts(rules: dict[str, Any], forecaster, member: Member) -> dict[str, float]:
    """Displacement errors of the forecaster on held-out tracks, as driven and as attacked.

    `trajectory_attack` of the rules: `scenes`, `methods`, and options of `TrajectoryAttack`.
    """
    options = dict(rules["trajectory_attack"])
    count, methods = options.pop("scenes"), options.pop("methods", ["gradient"])
    scenes = observed_scenes(member, count)
    target = jnp.zeros(1, jnp.int32)
    numbers: dict[str, float] = {}
    for method in methods:
        cfg = TrajectoryAttack(method=method, **options)

        @jax.jit
        def attacked(keys, scenes, forecaster, cfg=cfg):
            def one(key, tracks, lanes, truth):
                def forecast(tracks):
                    return forecaster.of_tracks(tracks, lanes, target)[0]

                return attack_track(key, forecast, tracks, truth, cfg)

            # One after another: the search itself is a batch.
            return jax.lax.map(lambda row: one(*row), (keys, *scenes))

        keys = jax.random.split(jax.random.key(rules["seed"]), len(scenes["tracks"]))
        given = tuple(jnp.asarray(scenes[name]) for name in ("tracks", "lanes", "truth"))
        found = jax.device_get(attacked(keys, given, forecaster))
        numbers |= {
            "forecast_ade/clean": float(found.clean_average.mean()),
            "forecast_fde/clean": float(found.clean_final.mean()),
            f"forecast_ade/{method}": float(found.average.mean()),
            f"forecast_fde/{method}": float(found.final.mean()),
        }
    return numbers
