"""Editing pose and expression through 3-D coordinates: a network that moves the low codes.

Part of Video2StyleGAN (arXiv 2206.13078), whose abstract alone could be read: the network is our
reconstruction. Landmarks of the source and target mesh, and the difference of their parameters,
become one condition vector that modulates Transformer blocks over the low codes. A gate that is
zero for equal codes makes the edit exactly nothing when nothing is asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.convolution import Linear
from jaxmodels.layers.normalization import LayerNorm
from jaxmodels.video import face_mesh
from jaxmodels.video.face_mesh import FaceModel, MeshCode
from jaxmodels.video.video_encoder import Heads
from jaxmodels.video.vit import Mlp, SelfAttention


def control_vector(code: MeshCode) -> jax.Array:
    """(pose 6, expression E, camera 3) [B, 9 + E] of a mesh code."""
    return jnp.concatenate([code.pose, code.expression, code.camera], -1)


class Modulated(nn.Module):
    """Layer norm scaled and shifted by a condition, at first not at all.

    x [B, T, D], condition [B, C] -> [B, T, D].
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        zeros = nn.initializers.zeros
        both = Linear(
            2 * x.shape[-1], kernel_init=zeros, bias_init=zeros, name="modulation", **types
        )(condition)
        gamma, beta = jnp.split(both[:, None], 2, -1)
        return LayerNorm(self.epsilon, name="norm", **types)(x) * (1 + gamma) + beta


class ModulatedBlock(nn.Module):
    """Pre-norm block whose layer norms are scaled and shifted by a condition.

    x [B, T, D], condition [B, C] -> [B, T, D].
    """

    heads: int
    mlp_ratio: int = 4
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        y = Modulated(name="norm1", **types)(x, condition)
        x = x + SelfAttention(self.heads, name="attention", **types)(y)
        y = Modulated(name="norm2", **types)(x, condition)
        return x + Mlp(self.mlp_ratio * x.shape[-1], name="mlp", **types)(y)


# Where the gate begins: a turn of six degrees opens it by nine tenths. With weights of either sign
# it would pass through zero wherever parts of a change cancel, and no movement could make up.
_GATE = 15.0


class PoseControl(nn.Module):
    """w_low' = w_low + f(w_low, c) g, for source and target faces.

    Args of the call: w_low [B, n_low, w_dim]; source, target [B, P] (`control_vector`);
    points_source, points_target [B, K, 3], projected landmarks. The order of the K points does not
    matter. Returns [B, n_low, w_dim], exactly w_low where source and target are equal.

    The last norm is modulated as well and every layer has an output map of its own, so that the
    condition reaches each layer's code by a short way.
    """

    n_low: int = 8
    w_dim: int = 512
    condition_size: int = 256
    num_layers: int = 6
    num_heads: int = 8
    code_size: int = 6 + face_mesh.EXPRESSION + 3
    landmarks: int = 68
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with."""
        shapes = ((self.n_low, self.w_dim), (self.code_size,), (self.code_size,))
        points = (self.landmarks, 3)
        return tuple(jax.ShapeDtypeStruct((1, *s), jnp.float32) for s in (*shapes, points, points))

    @nn.compact
    def __call__(
        self,
        w_low: jax.Array,
        source: jax.Array,
        target: jax.Array,
        points_source: jax.Array,
        points_target: jax.Array,
    ) -> jax.Array:
        if w_low.ndim != 3 or w_low.shape[1:] != (self.n_low, self.w_dim):
            raise ValueError(
                f"low codes must be [batch, {self.n_low}, {self.w_dim}], got {w_low.shape}"
            )
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        size = self.condition_size
        change = target - source
        points = jnp.concatenate([points_source, points_target - points_source], -1)
        points = nn.gelu(Linear(size, name="points.0", **types)(points))
        points = nn.gelu(Linear(size, name="points.1", **types)(points))
        condition = jnp.concatenate(
            [points.max(1), points.mean(1), change.astype(points.dtype)], -1
        )
        condition = nn.gelu(Linear(size, name="condition.0", **types)(condition))
        condition = Linear(size, name="condition.1", **types)(condition)

        shape = (1, self.n_low, self.w_dim)
        place = self.param(
            "layer_embeddings", nn.initializers.normal(0.02), shape, self.param_dtype
        )
        x = w_low.astype(self.dtype) + place.astype(self.dtype)
        for i in range(self.num_layers):
            x = ModulatedBlock(self.num_heads, name=f"blocks.{i}", **types)(x, condition)
        x = Modulated(name="norm", **types)(x, condition)
        move = Heads(self.n_low, self.w_dim, equalized=False, name="output", **types)(x)
        open_gate = nn.initializers.constant(_GATE)
        gate = Linear(self.w_dim, use_bias=False, kernel_init=open_gate, name="gate", **types)(
            jnp.abs(change)
        )
        return w_low + (move * jnp.tanh(gate)[:, None]).astype(w_low.dtype)


class PoseEditor(NamedTuple):
    """The control network with everything it needs to edit codes.

    Attributes:
      module, variables: a `PoseControl` and its parameters. face: the mesh model.
    """

    module: PoseControl
    variables: Any
    face: FaceModel

    def drive(self, ws: jax.Array, source: MeshCode, target: MeshCode) -> jax.Array:
        """Codes [B, n, D] (or the low ones alone) moved from one face to another.

        Codes from n_low on are returned untouched, bit for bit.
        """
        low, high = ws[:, : self.module.n_low], ws[:, self.module.n_low :]
        low = apply_control(self.module, self.variables, self.face, low, source, target)
        return jnp.concatenate([low, high], 1)

    def set_pose(
        self,
        ws: jax.Array,
        mesh: MeshCode,
        yaw: float | jax.Array | None = None,
        pitch: float | jax.Array | None = None,
        roll: float | jax.Array | None = None,
        relative: bool = False,
    ) -> jax.Array:
        """Codes with the head turned; angles in degrees, None leaves one as it is.

        `relative` adds to the present angles instead of replacing them.
        """
        return self.drive(ws, mesh, turned(mesh, yaw, pitch, roll, relative))

    def set_expression(
        self, ws: jax.Array, mesh: MeshCode, expression: jax.Array, relative: bool = False
    ) -> jax.Array:
        """Codes with another expression [E] or [B, E]."""
        expression = jnp.broadcast_to(expression, mesh.expression.shape)
        expression = mesh.expression + expression if relative else expression
        return self.drive(ws, mesh, mesh._replace(expression=expression))

    def reenact(
        self, w_source: jax.Array, mesh_source: MeshCode, driving: MeshCode, relative: bool = True
    ) -> jax.Array:
        """Codes [T, n, D]: one source [1, n, D] driven by a sequence of T faces.

        `relative` applies the driver's change since its first frame to the source's own pose,
        expression and camera; otherwise the driver's are taken as they are. The shape stays the
        source's.
        """
        count = len(driving.pose)
        source = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), mesh_source)
        ws = jnp.broadcast_to(w_source, (count, *w_source.shape[1:]))

        if relative:
            return self.drive(ws, source, followed(source, driving, first_of(driving)))
        target = {name: getattr(driving, name) for name in FOLLOWED}
        return self.drive(ws, source, source._replace(**target))


# What of a face follows a driver's; its shape stays its own.
FOLLOWED = ("pose", "expression", "camera")


def first_of(faces: MeshCode) -> MeshCode:
    """The first of a sequence of faces, [1, ...]."""
    return jax.tree.map(lambda x: x[:1], faces)


def followed(mesh: MeshCode, driving: MeshCode, first: MeshCode) -> MeshCode:
    """A face moved as a driver moved since its first frame; itself, exactly, if it did not."""

    def moved(name):
        return getattr(mesh, name) + (getattr(driving, name) - getattr(first, name))

    return mesh._replace(**{name: moved(name) for name in FOLLOWED})


def turned(
    mesh: MeshCode,
    yaw: float | jax.Array | None = None,
    pitch: float | jax.Array | None = None,
    roll: float | jax.Array | None = None,
    relative: bool = False,
) -> MeshCode:
    """A face with its head turned, angles as in `PoseEditor.set_pose`; itself without any."""
    if yaw is None and pitch is None and roll is None:
        return mesh
    present = face_mesh.axis_angle_to_euler(mesh.pose[:, :3])
    asked = []
    for now, angle in zip(present, (yaw, pitch, roll)):
        if angle is None:
            asked.append(now)
        else:
            asked.append(now + angle if relative else jnp.broadcast_to(angle, now.shape))
    rotation = face_mesh.euler_to_axis_angle(*asked)
    return mesh._replace(pose=jnp.concatenate([rotation, mesh.pose[:, 3:]], -1))


def apply_control(
    module: PoseControl,
    variables: Any,
    face: FaceModel,
    low: jax.Array,
    source: MeshCode,
    target: MeshCode,
) -> jax.Array:
    """Low codes [B, n_low, D] moved from `source` to `target` by the network."""
    return module.apply(
        variables,
        low,
        control_vector(source),
        control_vector(target),
        face_mesh.projected_landmarks(face, source),
        face_mesh.projected_landmarks(face, target),
    )


MODEL = PoseControl
