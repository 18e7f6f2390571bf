"""IR-SE: the residual face network of ArcFace in the form that StyleGAN encoders build on.

omertov/encoder4editing@99ea505 (`models/encoders/helpers.py`, `model_irse.py`,
`criteria/id_loss.py`), after J. Deng et al., "ArcFace", arXiv 1801.07698, and J. Hu et al.,
"Squeeze-and-Excitation Networks", arXiv 1709.01507. Names are those of `model_ir_se50.pth`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.layers.normalization import BatchNorm

# Units of each stage; a stage's first unit halves the image. Depths 18 and 34 are
# those of InsightFace (`fresnet.py`).
STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    152: (3, 8, 36, 3),
}
DEPTHS = (64, 128, 256, 512)
MODES = ("ir", "ir_se")
INPUT_SIZES = (112, 224)
# The face in an aligned 256-pixel image, and the size that ArcFace was trained at.
CROP_ROWS, CROP_COLUMNS, ID_SIZE = (35, 223), (32, 220), 112


class PReLU(nn.Module):
    """max(x, 0) + a min(x, 0) with a slope for every channel, x [..., C], param `weight` [C]."""

    initial: float = 0.25
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(self.initial)
        slope = self.param("weight", init, (x.shape[-1],), self.param_dtype)
        return jnp.where(x >= 0, x, x * slope.astype(x.dtype))


class SqueezeExciteModule(nn.Module):
    """x * sigmoid(fc2(relu(fc1(mean of x)))), 1x1 convolutions without bias."""

    features: int
    reduction: int = 16
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        if self.features < self.reduction:
            raise ValueError(
                f"se_reduction {self.reduction} leaves nothing of {self.features} channels"
            )
        z = x.mean((1, 2), keepdims=True)
        z = nn.relu(Conv(self.features // self.reduction, name="fc1", **types)(z))
        return x * nn.sigmoid(Conv(self.features, name="fc2", **types)(z))


class BottleneckUnit(nn.Module):
    """BN, 3x3, PReLU, 3x3 with stride, BN (, SE) beside a shortcut: [B, H, W, C] -> depth maps."""

    depth: int
    stride: int = 1
    squeeze: bool = True
    se_reduction: int = 16
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        if x.shape[-1] == self.depth:
            shortcut = x[:, :: self.stride, :: self.stride]
        else:
            strided = x[:, :: self.stride, :: self.stride]
            shortcut = Conv(self.depth, name="shortcut_layer.0", **types)(strided)
            shortcut = BatchNorm(name="shortcut_layer.1", **types)(shortcut, train)
        y = BatchNorm(name="res_layer.0", **types)(x, train)
        y = Conv(self.depth, 3, name="res_layer.1", **types)(y)
        y = PReLU(name="res_layer.2", **types)(y)
        y = Conv(self.depth, 3, self.stride, name="res_layer.3", **types)(y)
        y = BatchNorm(name="res_layer.4", **types)(y, train)
        if self.squeeze:
            se = SqueezeExciteModule(self.depth, self.se_reduction, name="res_layer.5", **types)
            y = se(y)
        return y + shortcut


def units(num_layers: int, width_divisor: int = 1) -> list[tuple[int, int]]:
    """(depth, stride) of every unit. Raises ValueError for depths that are not published."""
    if num_layers not in STAGES:
        raise ValueError(f"num_layers is one of {sorted(STAGES)}, got {num_layers}")
    found = []
    for depth, count in zip(DEPTHS, STAGES[num_layers]):
        found += [(narrowed(depth, width_divisor), 2)] + [(narrowed(depth, width_divisor), 1)] * (
            count - 1
        )
    return found


def narrowed(width: int, divisor: int) -> int:
    """width / divisor. Raises ValueError when it is no positive integer."""
    if divisor < 1 or width % divisor:
        raise ValueError(f"width_divisor {divisor} does not divide {width}")
    return width // divisor


def body(
    x: jax.Array,
    num_layers: int,
    mode: str,
    width_divisor: int,
    se_reduction: int,
    train: bool,
    types,
) -> list[jax.Array]:
    """Outputs of every unit; call it inside a compact method, the layers are named there."""
    if mode not in MODES:
        raise ValueError(f"mode is one of {', '.join(MODES)}, got {mode!r}")
    x = Conv(narrowed(64, width_divisor), 3, name="input_layer.0", **types)(x)
    x = BatchNorm(name="input_layer.1", **types)(x, train)
    x = PReLU(name="input_layer.2", **types)(x)
    outputs = []
    for i, (depth, stride) in enumerate(units(num_layers, width_divisor)):
        x = BottleneckUnit(depth, stride, mode == "ir_se", se_reduction, name=f"body.{i}", **types)(
            x, train
        )
        outputs.append(x)
    return outputs


class Backbone(nn.Module):
    """ArcFace embedding, faces [B, S, S, 3] in [-1, 1] -> unit vectors [B, 512 / width_divisor].

    `input_size` is 112 or 224, `mode` "ir_se" or "ir" (no squeeze-and-excitation), `drop_ratio`
    the dropout before the last linear map, `affine` whether the last BatchNorm has weights.

    Raises ValueError for sizes, depths and modes that are not published.
    """

    input_size: int = 112
    num_layers: int = 50
    mode: str = "ir_se"
    drop_ratio: float = 0.4
    affine: bool = True
    width_divisor: int = 1
    se_reduction: int = 16
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.input_size not in INPUT_SIZES:
            raise ValueError(f"input_size is one of {INPUT_SIZES}, got {self.input_size}")
        units(self.num_layers, self.width_divisor)
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: faces [1, S, S, 3]."""
        return (jax.ShapeDtypeStruct((1, self.input_size, self.input_size, 3), jnp.float32),)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if x.ndim != 4 or x.shape[1:] != (self.input_size, self.input_size, 3):
            raise ValueError(
                f"faces must be [batch, {self.input_size}, {self.input_size}, 3], got {x.shape}"
            )
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        args = (self.num_layers, self.mode, self.width_divisor, self.se_reduction)
        x = body(x, *args, train, types)[-1]
        x = BatchNorm(name="output_layer.0", **types)(x, train)
        x = nn.Dropout(self.drop_ratio, deterministic=not train)(x)
        # Checkpoints flatten channels first.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = Linear(narrowed(512, self.width_divisor), name="output_layer.3", **types)(x)
        if self.affine:
            x = BatchNorm(name="output_layer.4", **types)(x, train)
        else:
            x = PlainBatchNorm(name="output_layer.4", dtype=self.dtype)(x, train)
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)


class PlainBatchNorm(nn.Module):
    """BatchNorm1d without weights; its statistics alone are in checkpoints."""

    epsilon: float = 1e-5
    momentum: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        features = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        center, spread = mean.value, var.value
        if train and not self.is_initializing():
            center, spread = x.mean(0), x.var(0)
            if self.is_mutable_collection("batch_stats"):
                unbiased = spread * len(x) / max(len(x) - 1, 1)
                mean.value += self.momentum * (center - mean.value)
                var.value += self.momentum * (unbiased - var.value)
        return ((x - center) * jax.lax.rsqrt(spread + self.epsilon)).astype(self.dtype)


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """PyTorch's AdaptiveAvgPool2d: bin i averages rows floor(i H / size) .. ceil((i + 1) H / size).

    x [B, H, W, C] -> [B, size, size, C]. As two matrix products, which differentiate cheaply.
    """

    def bins(length: int) -> jax.Array:
        starts = jnp.arange(size) * length // size
        ends = -(-(jnp.arange(1, size + 1) * length) // size)
        place = jnp.arange(length)
        inside = (place >= starts[:, None]) & (place < ends[:, None])
        return inside / (ends - starts)[:, None]

    if x.shape[1:3] == (size, size):
        return x
    x = jnp.einsum("ph,bhwc->bpwc", bins(x.shape[1]).astype(x.dtype), x)
    return jnp.einsum("qw,bpwc->bpqc", bins(x.shape[2]).astype(x.dtype), x)


def face_crop(x: jax.Array) -> jax.Array:
    """What ArcFace sees of aligned images: [B, S, S, 3] -> [B, 112, 112, 3].

    Images of another size than 256 are first averaged to 256 (larger ones) or cut at the same
    fractions (smaller ones, which no checkpoint was trained for).
    """
    size = x.shape[1]
    if size > 256:
        x, size = adaptive_average_pool(x, 256), 256
    rows, columns = ([round(n * size / 256) for n in cut] for cut in (CROP_ROWS, CROP_COLUMNS))
    x = x[:, rows[0] : rows[1], columns[0] : columns[1]]
    return adaptive_average_pool(x, ID_SIZE)


def embed_faces(module: Backbone, variables: Any, images: jax.Array) -> jax.Array:
    """Identity vectors [B, D] of aligned images [B, S, S, 3] in [-1, 1], BatchNorm in eval mode."""
    return module.apply(variables, face_crop(images))


def identity_loss(embedding: jax.Array, target: jax.Array) -> jax.Array:
    """mean over the batch of 1 - <f(y_hat), f(y)>; the target carries no gradient."""
    return (1 - (embedding * jax.lax.stop_gradient(target)).sum(-1)).mean()


MODEL = Backbone

VARIANTS: dict[str, dict[str, Any]] = {
    "ir_se50": {"num_layers": 50, "mode": "ir_se"},
    "ir50": {"num_layers": 50, "mode": "ir"},
    "ir_se101": {"num_layers": 100, "mode": "ir_se"},
    "ir_se152": {"num_layers": 152, "mode": "ir_se"},
}


def check_checkpoint(keys: Iterable[str], module: nn.Module) -> None:
    """Refuse files of another naming, as an IResNet's or a StyleGAN's."""
    if not isinstance(module, Backbone):
        return
    keys = list(keys)
    if any(k.endswith("output_layer.3.weight") for k in keys):
        return
    found = (
        "IResNet names (layer1.0.bn1, ...)"
        if any("layer1.0" in k for k in keys)
        else (
            "an encoder without the embedding head"
            if any("styles.0" in k for k in keys)
            else ", ".join(sorted(keys)[:3])
        )
    )
    raise ValueError(
        f"the checkpoint holds {found}; an ArcFace IR-SE file (model_ir_se50.pth) has "
        "input_layer.0.weight, body.0.res_layer.0.weight, output_layer.3.weight"
    )
