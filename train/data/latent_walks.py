"""Clips that a generator makes: fixed high codes and a walk of the low ones, as latents and noise.

The stand-in for talking-head video that ships nowhere: a task with a frozen generator turns each
example into frames, so that the truth satisfies the reuse of high codes and is known. Examples hold

- `z` [z_dim]: the latent whose code, pulled towards the mean, all frames of the clip share;
- `key_noise`, `frame_noise` [n_low, w_dim]: what is added to the low codes of the two frames
  (`key_noise` is zero unless `both`);
- with `mesh`, `source` and `target` [9 + expression]: pose, expression and camera that drive the
  low codes of the two frames instead (`train.tasks.pose_control`); some of them may be equal.

Examples are functions of (seed, split, index) alone; evaluation never sees training latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

OPTIONS: dict[str, Any] = {
    "z_dim": 32,
    "w_dim": 32,
    "n_low": 5,
    "std": 0.35,  # of the noise on the low codes
    "both": False,  # noise on the key frame as well
    "mesh": False,
    "expression": 50,
    "yaw": 0.5,  # radians, largest turn of a mesh; pitch and roll turn half as far
    "examples": 1 << 16,
    "eval_examples": 64,
    "data_seed": 0,
    "threads": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {"mesh": {"mesh": True}}
SPLITS = ("train", "test")

_SMALL = 0.15  # standard deviation of expressions, jaws and cameras


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one example; see the module."""
    for name in ("z_dim", "w_dim", "n_low", "expression", "examples", "eval_examples"):
        if int(options[name]) < 1:
            raise ValueError(f"data.options.{name} must be at least 1, got {options[name]}")
    spec = {"z": (options["z_dim"],)}
    if options["mesh"]:
        code = (9 + options["expression"],)
        spec |= {"source": code, "target": code}
    else:
        low = (options["n_low"], options["w_dim"])
        spec |= {"key_noise": low, "frame_noise": low}
    return {k: jax.ShapeDtypeStruct(tuple(s), np.float32) for k, s in spec.items()}


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Number of examples of each split."""
    return {"train": int(options["examples"]), "test": int(options["eval_examples"])}


@dataclasses.dataclass(frozen=True)
class Walks:
    """Random-access examples of one split."""

    options: tuple[tuple[str, Any], ...]
    stream: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        options = dict(self.options)
        rng = np.random.default_rng((options["data_seed"], self.stream, int(index)))
        example = {"z": rng.standard_normal(options["z_dim"])}
        if options["mesh"]:
            source, target = mesh_code(rng, options), mesh_code(rng, options)
            example |= {"source": source, "target": partly(rng, source, target)}
        else:
            shape = (options["n_low"], options["w_dim"])
            noise = options["std"] * rng.standard_normal((2, *shape))
            example |= {"key_noise": noise[0] * bool(options["both"]), "frame_noise": noise[1]}
        return {k: np.asarray(v, np.float32) for k, v in example.items()}


def mesh_code(rng: np.random.Generator, options: Mapping[str, Any]) -> np.ndarray:
    """Pose (global and jaw rotations), expression and camera [9 + E] of a random face."""
    yaw = rng.uniform(-1, 1) * options["yaw"]
    pitch, roll = rng.uniform(-1, 1, 2) * options["yaw"] / 2
    jaw = np.array([abs(rng.normal()) * _SMALL, 0, 0])
    expression = rng.normal(size=options["expression"]) * _SMALL
    camera = np.array([8.0, 0, 0]) + rng.normal(size=3) * np.array([0.4, 0.004, 0.004])
    return np.concatenate([[pitch, yaw, roll], jaw, expression, camera])


def partly(rng: np.random.Generator, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """`after` with some of turn, face (jaw and expression) and camera left as they were before.

    An edit asks for one of them: a network that only ever saw all of them move would not know it.
    """
    groups = np.zeros(len(before), int)
    groups[3:-3], groups[-3:] = 1, 2
    moves = rng.random(3) < 0.6
    moves[rng.integers(3)] = True
    return np.where(moves[groups], after, before)


def source(split: str, options: Mapping[str, Any]) -> Walks:
    """Examples of a split."""
    known = {k: options[k] for k in OPTIONS}
    return Walks(tuple(known.items()), SPLITS.index(split), split_sizes(options)[split])


def train_transform(options: Mapping[str, Any]):
    """Examples as they are: they are random already."""
    del options
    return _with_rng


def eval_transform(options: Mapping[str, Any]):
    """Examples as they are."""
    del options
    return _unchanged


def _with_rng(example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    del rng
    return dict(example)


def _unchanged(example: Mapping[str, Any]) -> dict[str, Any]:
    return dict(example)
