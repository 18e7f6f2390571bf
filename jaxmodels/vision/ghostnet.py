"""GhostNet, the baseline RepGhost measures itself against.

K. Han, Y. Wang, Q. Tian, J. Guo, C. Xu, C. Xu, "GhostNet: More Features from Cheap Operations",
CVPR 2020. Structure and names after the official code, iamhankai/ghostnet.pytorch@4be1c5b
(`ghost_net.py`).
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.layers.initializers import kaiming_normal_fan_out
from jaxmodels.layers.normalization import BatchNorm
from jaxmodels.layers.rounding import make_divisible
from jaxmodels.vision.images import check_images, check_network

# (kernel, expansion, out, squeeze-and-excite, stride) at width 1.
BLOCKS: tuple[tuple[int, int, int, bool, int], ...] = (
    (3, 16, 16, False, 1),
    (3, 48, 24, False, 2),
    (3, 72, 24, False, 1),
    (5, 72, 40, True, 2),
    (5, 120, 40, True, 1),
    (3, 240, 80, False, 2),
    (3, 200, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 480, 112, True, 1),
    (3, 672, 112, True, 1),
    (5, 672, 160, True, 2),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
)
# Features (stem is 0) that end strides 4, 8, 16 and 32.
FEATURE_BLOCKS = (3, 5, 11, 16)
HEAD_FEATURES = 1280


class GhostModule(nn.Module):
    """Half the maps by a convolution (a pointwise one by default), the rest by a depthwise one.

    x [B, H, W, inp] -> [B, H', W', oup], sizes over `stride` rounded up:
    concat(relu(bn(primary)), relu(bn(depthwise))) cut to `oup`.
    """

    inp: int
    oup: int
    relu: bool = True
    ratio: int = 2
    dw_size: int = 3
    kernel_size: int = 1
    stride: int = 1
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: x [1, 8, 8, inp]."""
        return (jax.ShapeDtypeStruct((1, 8, 8, self.inp), jnp.float32),)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = dict(axis_name=self.bn_axis_name, **types)
        conv = dict(kernel_init=kaiming_normal_fan_out(), **types)
        act = nn.relu if self.relu else lambda y: y
        primary = math.ceil(self.oup / self.ratio)
        cheap = primary * (self.ratio - 1)
        x1 = Conv(primary, self.kernel_size, self.stride, name="primary_conv.0", **conv)(x)
        x1 = act(BatchNorm(name="primary_conv.1", **norm)(x1, train))
        x2 = Conv(cheap, self.dw_size, groups=primary, name="cheap_operation.0", **conv)(x1)
        x2 = act(BatchNorm(name="cheap_operation.1", **norm)(x2, train))
        return jnp.concatenate([x1, x2], axis=-1)[..., : self.oup]


class GhostSqueezeExcite(nn.Module):
    """Gate clipped to [0, 1], from linear C -> C // 4 -> ReLU -> C, x [B, H, W, C]."""

    features: int
    reduction: int = 4
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: x [1, 8, 8, C]."""
        return (jax.ShapeDtypeStruct((1, 8, 8, self.features), jnp.float32),)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        z = x.mean((1, 2))
        z = nn.relu(Linear(self.features // self.reduction, name="fc.0", **types)(z))
        z = Linear(self.features, name="fc.2", **types)(z)
        return x * jnp.clip(z, 0, 1)[:, None, None, :]


class GhostBottleneck(nn.Module):
    """Ghost module, strided depthwise convolution, squeeze-and-excitation, linear ghost module."""

    inp: int
    mid: int
    oup: int
    kernel_size: int = 3
    stride: int = 1
    se: bool = False
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: x [1, 8, 8, inp]."""
        return (jax.ShapeDtypeStruct((1, 8, 8, self.inp), jnp.float32),)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        ghost = dict(bn_axis_name=self.bn_axis_name, **types)

        def conv_bn(y, name, bn_name, features, **arguments):
            init = kaiming_normal_fan_out()
            y = Conv(features, kernel_init=init, name=name, **arguments, **types)(y)
            return BatchNorm(axis_name=self.bn_axis_name, name=bn_name, **types)(y, train)

        strided = dict(kernel_size=self.kernel_size, strides=self.stride)
        y = GhostModule(self.inp, self.mid, relu=True, name="conv.0", **ghost)(x, train)
        if self.stride > 1:
            y = conv_bn(y, "conv.1.0", "conv.1.1", self.mid, groups=self.mid, **strided)
        if self.se:
            y = GhostSqueezeExcite(self.mid, name="conv.2", **types)(y)
        y = GhostModule(self.mid, self.oup, relu=False, name="conv.3", **ghost)(y, train)
        if self.stride == 1 and self.inp == self.oup:
            return y + x
        z = conv_bn(x, "shortcut.0.0", "shortcut.0.1", self.inp, groups=self.inp, **strided)
        return y + conv_bn(z, "shortcut.1", "shortcut.2", self.oup)


class GhostNet(nn.Module):
    """GhostNet, images [B, H, W, 3] -> logits [B, num_classes]; options as RepGhostNet's."""

    width: float = 1.0
    num_classes: int = 1000
    dropout: float = 0.2
    features_only: bool = False
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        check_network(self.width, self.num_classes, VARIANTS)
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, 224, 224, 3]."""
        return (jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),)

    def __call__(self, x: jax.Array, train: bool = False):
        """Logits [B, num_classes], or the maps of strides 4, 8, 16, 32 under `features_only`."""
        if self.features_only:
            return self.features(x, train)
        return self.intermediates(x, train)["logits"]

    def features(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        """Maps [B, H / s, W / s, C] of strides s = 4, 8, 16, 32 (sizes rounded up)."""
        maps = self._run(x, train, head=False)
        return tuple(maps[f"features.{block}"] for block in FEATURE_BLOCKS)

    def intermediates(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """Every named stage: `features.0` (stem) .. `features.16`, `head` [B, 1280], `logits`."""
        return self._run(x, train, head=True)

    @nn.compact
    def _run(self, x: jax.Array, train: bool, head: bool) -> dict[str, jax.Array]:
        check_images(x)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def conv_bn_relu(y, name, bn_name, features, **arguments):
            init = kaiming_normal_fan_out()
            y = Conv(features, kernel_init=init, name=name, **arguments, **types)(y)
            return nn.relu(BatchNorm(axis_name=self.bn_axis_name, name=bn_name, **types)(y, train))

        maps: dict[str, jax.Array] = {}
        channels = make_divisible(16 * self.width)
        x = conv_bn_relu(x, "features.0.0", "features.0.1", channels, kernel_size=3, strides=2)
        maps["features.0"] = x
        for i, (k, mid, out, se, stride) in enumerate(BLOCKS, start=1):
            mid, out = make_divisible(mid * self.width), make_divisible(out * self.width)
            x = GhostBottleneck(
                channels,
                mid,
                out,
                kernel_size=k,
                stride=stride,
                se=se,
                bn_axis_name=self.bn_axis_name,
                name=f"features.{i}",
                **types,
            )(x, train)
            channels = out
            maps[f"features.{i}"] = x
        if not head:
            return maps
        final = make_divisible(BLOCKS[-1][1] * self.width)
        x = conv_bn_relu(x, "squeeze.0", "squeeze.1", final).mean((1, 2))
        x = Linear(HEAD_FEATURES, use_bias=False, name="classifier.0", **types)(x)
        x = nn.relu(BatchNorm(axis_name=self.bn_axis_name, name="classifier.1", **types)(x, train))
        maps["head"] = x
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        maps["logits"] = Linear(self.num_classes, name="classifier.4", **types)(x)
        return maps


MODEL = GhostNet

VARIANTS: dict[str, dict[str, Any]] = {
    "ghostnet_0_5x": {"width": 0.5},
    "ghostnet_1_0x": {"width": 1.0},
    "ghostnet_1_3x": {"width": 1.3},
}


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """What the naming rule cannot know: a network without a head leaves the head's keys unread."""
    if not getattr(module, "features_only", False):
        return {}
    return {"drops": [r"(squeeze|classifier)\..*"]}
