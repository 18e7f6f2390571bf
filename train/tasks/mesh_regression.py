"""Learning a face's mesh code from its picture, on clips that a generator makes from such codes.

DECA's weights do this for real faces. Where no real faces and no licensed basis may be used,
`train.data.latent_walks:mesh` draws codes, `drive` turns them into low codes of a frozen generator,
and a small regressor learns the way back: the critic of `train.tasks.pose_control`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.video import face_mesh
from jaxmodels.video.face_mesh import FaceModel, MeshCode
from jaxmodels.video.mesh_regressor import MeshRegressor
from jaxmodels.video.video_encoder import join_codes
from train.building import build_model, build_named
from train.naming import ConfigError
from train.tasks.video_inversion import load_generator
from train.video_critics import load_face_model, pool, resize

# What codes are divided by: their spread in `latent_walks`.
_TURN, _SMALL, _SCALE, _SHIFT, _CAMERA = 0.3, 0.15, 0.4, 0.004, 8.0
_WEAK = 0.3  # strength of everything but yaw, pitch and roll


@dataclasses.dataclass(frozen=True)
class Drive:
    """From control vectors [B, 9 + E] to low codes: w_avg + A p, p in units of its spread.

    The matrix is a function of the seed; turns move the picture most.
    """

    n_low: int
    w_dim: int
    expression: int
    std: float = 0.35
    seed: int = 7

    def scales(self) -> tuple[jax.Array, jax.Array]:
        """(offset, spread) [9 + E] of control vectors."""
        spread = [_TURN, _TURN, _TURN, _SMALL, _SMALL, _SMALL, *[_SMALL] * self.expression]
        spread = jnp.asarray([*spread, _SCALE, _SHIFT, _SHIFT])
        return jnp.zeros(len(spread)).at[-3].set(_CAMERA), spread

    def matrix(self) -> jax.Array:
        """[9 + E, n_low, w_dim]."""
        count = 9 + self.expression
        rows = jax.random.normal(jax.random.key(self.seed), (count, self.n_low, self.w_dim))
        weak = _WEAK / jnp.sqrt(self.expression)
        return rows * jnp.where(jnp.arange(count) < 3, 1.0, weak)[:, None, None] * self.std

    def low_codes(self, control: jax.Array, average: jax.Array) -> jax.Array:
        """[B, n_low, w_dim]."""
        offset, spread = self.scales()
        return average + jnp.einsum("bp,pnd->bnd", (control - offset) / spread, self.matrix())


def split_control(control: jax.Array, shape: int = face_mesh.SHAPE) -> MeshCode:
    """The mesh code of control vectors [B, 9 + E], with a neutral shape."""
    neutral = jnp.zeros((len(control), shape), control.dtype)
    return MeshCode(neutral, control[:, 6:-3], control[:, :6], control[:, -3:])


def driven_frames(
    generator: nn.Module, variables: Any, drive: Drive, z: jax.Array, *controls: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """(images of every control in turn [k B, S, S, 3], their W+ codes): high codes of z, low codes
    of the drive."""
    average = variables["buffers"]["mapping"]["w_avg"]
    w = generator.apply(variables, z, method="to_w")[:, None]
    high = jnp.broadcast_to(w, (len(w), generator.num_latents - drive.n_low, w.shape[-1]))
    codes = [join_codes(drive.low_codes(c, average), high) for c in controls]
    images = generator.apply(variables, jnp.concatenate(codes), "const", method="synthesize")
    return pool(images), codes


@dataclasses.dataclass(frozen=True)
class MeshRegression:
    """Batches `z`, `source`, `target`; loss: mean squared error of codes in units of their spread,
    turns counted ten times, and of projected vertices.

    Attributes:
      model: the regressor. generator, generator_from: frozen. drive: from codes to latents.
      face: the mesh model. size: pixels at which the regressor looks.
    """

    model: MeshRegressor
    generator: nn.Module
    drive: Drive
    face: FaceModel
    generator_from: str = ""
    size: int = 224

    frozen = ("generator",)

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """The regressor's parameters and statistics; the collection `generator`."""
        del batch
        own, other = jax.random.split(rng)
        variables = dict(self.model.init(own, jnp.zeros((1, self.size, self.size, 3))))
        params = variables.pop("params")
        generator = dict(self.generator.init(other, jnp.zeros((1, self.generator.z_dim))))
        return params, {**variables, "generator": generator}

    def start(self, params, extra):
        """The generator from its file."""
        if self.generator_from:
            generator = load_generator(self.generator_from, self.generator, extra["generator"])
            extra = {**extra, "generator": generator}
        return params, extra

    def _predicted(self, variables, images, train: bool):
        faces = resize((images + 1) / 2, self.size)
        if not train:
            return self.model.mesh_code(self.model.apply(variables, faces)), {}
        found, moved = self.model.apply(variables, faces, train=True, mutable=["batch_stats"])
        return self.model.mesh_code(found), moved

    def _errors(self, code: MeshCode, control: jax.Array):
        """(weighted squared error [B], yaw error in degrees [B])."""
        offset, spread = self.drive.scales()
        found = jnp.concatenate([code.pose, code.expression, code.camera], -1)
        weights = jnp.where(jnp.arange(len(spread)) < 3, 10.0, 1.0)
        weights = weights / weights.sum()
        squared = (jnp.square((found - offset - control + offset) / spread) * weights).sum(-1)
        yaw = face_mesh.axis_angle_to_euler(code.pose[:, :3])[0]
        wanted = face_mesh.axis_angle_to_euler(control[:, :3])[0]
        return squared, yaw - wanted

    def loss(self, params, extra, batch, rng):
        """The error of both frames' codes."""
        del rng
        controls = jnp.concatenate([batch["source"], batch["target"]])
        frozen = jax.lax.stop_gradient(extra["generator"])
        images, _ = driven_frames(
            self.generator, frozen, self.drive, batch["z"], batch["source"], batch["target"]
        )
        variables = {"params": params, "batch_stats": extra["batch_stats"]}
        code, moved = self._predicted(variables, images, True)
        squared, yaw = self._errors(code, controls)
        return squared.mean(), ({**extra, **moved}, {"yaw_error": jnp.abs(yaw).mean()})

    def evaluate(self, variables, batch):
        """Sums of the error and of the yaw's error beside that of always answering zero."""
        images, _ = driven_frames(
            self.generator, variables["generator"], self.drive, batch["z"], batch["target"]
        )
        code, _ = self._predicted(variables, images, False)
        squared, yaw = self._errors(code, batch["target"])
        zero = face_mesh.axis_angle_to_euler(batch["target"][:, :3])[0]
        mask = batch["mask"]
        return {
            "loss": (squared * mask).sum(),
            "yaw_error": (jnp.abs(yaw) * mask).sum(),
            "yaw_error_of_zero": (jnp.abs(zero) * mask).sum(),
            "count": mask.sum(),
        }


def build_drive(config, args: dict, generator) -> Drive:
    """The drive of a config: `drive_seed`, `drive_std`, and the shapes of its data."""
    options = config.data.options
    return Drive(
        n_low=options.get("n_low", 5),
        w_dim=generator.w_dim,
        expression=options.get("expression", 50),
        std=args.pop("drive_std", 0.35),
        seed=args.pop("drive_seed", 7),
    )


def from_config(config) -> MeshRegression:
    """`task_args`: `generator_args`, `generator_from`, `face_model_from`, `drive_seed`,
    `drive_std`, `size`."""
    args = dict(config.task_args)
    generator = build_named(
        config,
        "video.stylegan2",
        dict(args.pop("generator_args", {})),
        "config.task_args.generator_args",
    )
    drive = build_drive(config, args, generator)
    face = load_face_model(
        args.pop("face_model_from", ""), "config.task_args.face_model_from=''", drive.expression
    )
    model = build_model(config)
    if model.sizes[2] != drive.expression:
        raise ConfigError(
            f"config.model_args.sizes: {model.sizes[2]} expressions, the data has "
            f"{drive.expression}"
        )
    return MeshRegression(model=model, generator=generator, drive=drive, face=face, **args)
