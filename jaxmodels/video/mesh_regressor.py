"""A face's mesh code from one image: ResNet and two linear layers, as DECA's coarse encoder.

Y. Feng et al., "Learning an Animatable Detailed 3D Face Model from In-The-Wild Images", arXiv
2012.04012, after YadiraF/DECA@f5b6b42 (`decalib/models/encoders.py`, `resnet.py`); weights stand
below `E_flame.` of `deca_model.tar`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.layers.normalization import BatchNorm
from jaxmodels.video import face_mesh
from jaxmodels.video.face_mesh import MeshCode
from jaxmodels.vision.ir_se import narrowed

PARTS = (
    ("shape", face_mesh.SHAPE),
    ("texture", face_mesh.TEXTURE),
    ("expression", face_mesh.EXPRESSION),
    ("pose", face_mesh.POSE),
    ("camera", face_mesh.CAMERA),
    ("light", face_mesh.LIGHT),
)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 of four times the width, each with BatchNorm."""

    width: int
    stride: int = 1
    project: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        y = Conv(self.width, name="conv1", **types)(x)
        y = nn.relu(BatchNorm(name="bn1", **types)(y, train))
        y = Conv(self.width, 3, self.stride, name="conv2", **types)(y)
        y = nn.relu(BatchNorm(name="bn2", **types)(y, train))
        y = Conv(4 * self.width, name="conv3", **types)(y)
        y = BatchNorm(name="bn3", **types)(y, train)
        if self.project:
            x = x[:, :: self.stride, :: self.stride]
            x = Conv(4 * self.width, name="downsample.0", **types)(x)
            x = BatchNorm(name="downsample.1", **types)(x, train)
        return nn.relu(y + x)


class ResNetTrunk(nn.Module):
    """ResNet without its classifier, images [B, S, S, 3] -> means [B, 2048 / width_divisor]."""

    stages: tuple[int, ...] = (3, 4, 6, 3)
    width_divisor: int = 1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Conv(narrowed(64, self.width_divisor), 7, 2, name="conv1", **types)(x)
        x = nn.relu(BatchNorm(name="bn1", **types)(x, train))
        window, strides, pads = (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
        x = lax.reduce_window(x, -jnp.inf, lax.max, window, strides, pads)
        for i, count in enumerate(self.stages):
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                width = narrowed(64 * 2**i, self.width_divisor)
                block = Bottleneck(width, stride, j == 0, name=f"layer{i + 1}.{j}", **types)
                x = block(x, train)
        return x.mean((1, 2))


class MeshRegressor(nn.Module):
    """Faces [B, 224, 224, 3] in [0, 1] -> parameters [B, 236].

    They are shape 100, texture 50, expression 50, pose 6, camera 3, light 27.

    `stages`, `width_divisor` and `sizes` (the six lengths) make small ones.
    """

    stages: tuple[int, ...] = (3, 4, 6, 3)
    width_divisor: int = 1
    sizes: tuple[int, ...] = tuple(size for _, size in PARTS)
    hidden: int = 1024
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: faces [1, 64, 64, 3]."""
        return (jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32),)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        trunk = ResNetTrunk(tuple(self.stages), self.width_divisor, name="encoder", **types)
        y = nn.relu(Linear(self.hidden, name="layers.0", **types)(trunk(x, train)))
        return Linear(sum(self.sizes), name="layers.2", **types)(y)

    def parts(self, parameters: jax.Array) -> dict[str, jax.Array]:
        """{part: [B, size]} of the parameters."""
        found, start = {}, 0
        for (name, _), size in zip(PARTS, self.sizes):
            found[name] = parameters[:, start : start + size]
            start += size
        return found

    def mesh_code(self, parameters: jax.Array) -> MeshCode:
        """What a posed mesh needs of the parameters."""
        parts = self.parts(parameters)
        return MeshCode(*(parts[name] for name in MeshCode._fields))


MODEL = MeshRegressor

VARIANTS: dict[str, dict[str, Any]] = {"deca_coarse": {}}


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """deca_model.tar also holds a detail encoder and decoder, which are not used here."""
    return {
        "prefixes": ["E_flame"],
        "drops": [r"(E_detail|D_detail|E_flame\.encoder\.fc)\..*"],
    }
