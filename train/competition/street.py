"""Perception of the driving track on the project's own driving systems.

The world is the simulated street of the LiDAR-first pipeline with its camera renderer; victims are
its full-frame detector and its patch classifier (`configs/lidar_camera.py`), trained as members.
`perception` of the rules: `world: street`, `image_scale` of the camera, `frames` to optimize on,
`confidence` from which a vehicle counts as found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.driving import camera_renderer, driving_scene
from jaxmodels.security import street_renderer as street
from jaxmodels.security import texture_attack
from jaxmodels.security.camera_victims import Victim, frame_victim, patch_victim
from jaxmodels.security.vehicle_detector import detected
from train.competition.roster import Member, train_members
from train.data import pipeline
from train.naming import ConfigError

_SEEDS = {"train": 50_000_000, "test": 60_000_000}  # of streets that no member was trained on
_HIDDEN = 7919


def victim_of(member: Member) -> Victim:
    """A member as a victim, by its task."""
    model = member.task.model
    _, options = pipeline.resolve(member.config.data)
    makers = {"frame_detection": frame_victim, "patch_classification": patch_victim}
    if member.config.task not in makers:
        raise ConfigError(
            f"{member.name}: task {member.config.task!r} is no victim of the street; known: "
            f"{', '.join(makers)}"
        )
    variables = jax.tree.map(jnp.asarray, member.variables)
    return makers[member.config.task](model, variables, options["image_size"])


def _options(rules: dict[str, Any]) -> dict[str, Any]:
    return {"image_scale": 0.2, "frames": 48, "confidence": 0.5} | dict(rules["perception"])


def _traced(rules, split: str, poses, seeds) -> street.StreetFrames:
    camera = camera_renderer.front_camera(_options(rules)["image_scale"])
    scenes = [driving_scene.sample_scene(_SEEDS[split] + int(seed)) for seed in seeds]
    return street.trace_frames(scenes, poses, camera, np.asarray(rules["paint"]))


def optimize(rules: dict[str, Any], workdir: Path, base: jax.Array) -> jax.Array:
    """The texture [side, side, 3] found on the white-box members."""
    members = train_members(rules["detectors"], workdir)
    cfg = texture_attack.TextureAttack(**rules["texture_attack"])
    count = _options(rules)["frames"]
    rng = np.random.default_rng((rules["seed"], 3))
    poses = [street.sample_pose(rng) for _ in range(count)]
    if not cfg.poses_vary:
        poses = [street.LeadPose(12.0)] * count
    frames = _traced(rules, "train", poses, rng.integers(1_000_000, size=count))
    victims = [victim_of(member) for member in members]

    @jax.jit
    def run(key, frames, base):
        return texture_attack.optimize_in_scenes(
            key,
            victims,
            lambda key, texture: street.sample_photographs(key, frames, texture, cfg.batch),
            base,
            cfg,
        )

    return run(jax.random.key(rules["seed"]), frames, base)


def _look(victim: Victim, confidence: float):
    """Which frames' vehicles a victim finds, bool [B]."""
    return jax.jit(
        lambda rendered: detected(victim(rendered), rendered.boxes, confidence=confidence)
    )


def detection_tables(
    rules: dict[str, Any], members: list[Member], textures: dict[str, jax.Array]
) -> list[dict[str, np.ndarray]]:
    """Of each member, bool [drives, frames] a texture: found on drive-ups no optimization saw."""
    drives, count = rules["drives"], rules["frames"]
    confidence = _options(rules)["confidence"]
    rng = np.random.default_rng((_HIDDEN, 1))
    looks = [_look(victim_of(member), confidence) for member in members]
    take = jax.jit(street.photograph)
    found = {name: [[] for _ in members] for name in textures}
    for drive in range(drives):
        lateral, yaw = rng.uniform(-1, 1), float(np.deg2rad(rng.uniform(-10, 10)))
        light, seed = rng.uniform(*street.LIGHT), int(rng.integers(1_000_000))
        poses = street.drive_up(count, lateral, yaw)
        frames = _traced(rules, "test", poses, [seed] * count)
        noise = jax.random.normal(jax.random.key(drive), frames.base.shape)
        exposure = jnp.full(count, light, jnp.float32)
        for name, one in textures.items():
            rendered = take(frames, one, exposure, noise)
            for rows, look in zip(found[name], looks):
                rows.append(np.asarray(look(rendered)))
    return [{name: np.stack(rows[i]) for name, rows in found.items()} for i in range(len(members))]


def score(rules: dict[str, Any], workdir: Path, textures: dict[str, jax.Array]) -> dict[str, float]:
    """Detection by every hidden member on drive-ups that no optimization saw.

    The perception score is the mean over the hidden members of the share of frames that the texture
    `attacked` hides among those in which the vehicle is found with its own paint (`clean`), minus
    the naturalness penalty. The tables are of the first member, others under their names.
    """
    hidden = train_members(rules["hidden_detector"], workdir)
    numbers: dict[str, float] = {}
    scores = []
    for number, tables in enumerate(detection_tables(rules, hidden, textures)):
        mark = f"{hidden[number].name}/" if number else ""
        for name, rows in tables.items():
            numbers[f"{mark}detection_rate/{name}"] = float(rows.mean())
        for i, part in enumerate(np.array_split(np.arange(rules["frames"]), 3)):
            own = tables["clean"][:, part]
            hit = own & ~tables["attacked"][:, part]
            where = ("30-22m", "22-14m", "14-6m")[i]
            numbers[f"{mark}attack_success/{where}"] = float(hit.sum() / max(own.sum(), 1))
        clean = tables["clean"]
        still = jnp.asarray(tables["attacked"][clean] if clean.any() else np.ones(1, bool))
        scores.append(
            float(texture_attack.texture_score(still, textures["attacked"], textures["clean"]))
        )
    return {"perception_score": float(np.mean(scores)), **numbers}
