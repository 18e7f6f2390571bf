"""MobileNetV3-Large and -Small, baselines of RepGhost.

A. Howard et al., "Searching for MobileNetV3", ICCV 2019 (tables 1 and 2). Names of the parameters
are torchvision's (`mobilenet_v3_large`, `mobilenet_v3_small`), whose checkpoints are the ones in
use; so are its BatchNorm (eps 1e-3, momentum 0.01) and its initializers.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.layers.initializers import kaiming_normal_fan_out
from jaxmodels.layers.normalization import BatchNorm
from jaxmodels.layers.rounding import make_divisible
from jaxmodels.layers.squeeze_excite import SqueezeExcite, hard_sigmoid
from jaxmodels.vision.images import check_images, check_network

# (kernel, expansion, out, squeeze-and-excite, hard swish, stride) at width 1.
LARGE: tuple[tuple[int, int, int, bool, bool, int], ...] = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)
SMALL: tuple[tuple[int, int, int, bool, bool, int], ...] = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)
DIVISOR = 8


def hard_swish(x: jax.Array) -> jax.Array:
    """x * relu6(x + 3) / 6."""
    return x * hard_sigmoid(x)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise k x k, squeeze-and-excite, project 1x1; residual where shapes allow.

    x [B, H, W, inp] -> [B, ceil(H / stride), ceil(W / stride), oup]. No expansion convolution
    where `mid == inp`.
    """

    inp: int
    mid: int
    oup: int
    kernel_size: int = 3
    stride: int = 1
    se: bool = False
    hard: bool = False
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: x [1, 8, 8, inp]."""
        return (jax.ShapeDtypeStruct((1, 8, 8, self.inp), jnp.float32),)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        act = hard_swish if self.hard else nn.relu
        index = 0

        def conv_bn(y, features, **arguments):
            return _conv_bn(
                y, train, f"block.{index}", features, self.bn_axis_name, types, **arguments
            )

        y = x
        if self.mid != self.inp:
            y = act(conv_bn(y, self.mid))
            index += 1
        strided = dict(kernel_size=self.kernel_size, strides=self.stride, groups=self.mid)
        y = act(conv_bn(y, self.mid, **strided))
        index += 1
        if self.se:
            y = SqueezeExcite(
                self.mid,
                divisor=DIVISOR,
                names=("fc1", "fc2"),
                kernel_init=kaiming_normal_fan_out(),
                bias_init=nn.initializers.zeros,
                name=f"block.{index}",
                **types,
            )(y)
            index += 1
        y = conv_bn(y, self.oup)
        return x + y if self.stride == 1 and self.inp == self.oup else y


def _conv_bn(y, train, name, features, axis_name, types, **arguments) -> jax.Array:
    init = kaiming_normal_fan_out()
    y = Conv(features, kernel_init=init, name=f"{name}.0", **arguments, **types)(y)
    return BatchNorm(1e-3, 0.01, axis_name=axis_name, name=f"{name}.1", **types)(y, train)


class MobileNetV3(nn.Module):
    """MobileNetV3, images [B, H, W, 3] -> logits [B, num_classes]; options as RepGhostNet's.

    `small` chooses the table and the head: 1280 features for Large, 1024 for Small.
    """

    width: float = 1.0
    num_classes: int = 1000
    dropout: float = 0.2
    small: bool = False
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
        blocks = SMALL if self.small else LARGE
        # The last block before each further halving, and the last of all.
        ends = [i for i in range(1, len(blocks)) if blocks[i][-1] == 2] + [len(blocks)]
        return tuple(maps[f"features.{i}"] for i in ends[-4:])

    def intermediates(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """Every named stage: `features.0` (stem), blocks, last convolution, `head`, `logits`."""
        return self._run(x, train, head=True)

    @nn.compact
    def _run(self, x: jax.Array, train: bool, head: bool) -> dict[str, jax.Array]:
        check_images(x)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        blocks = SMALL if self.small else LARGE

        def rounded(channels: int) -> int:
            return make_divisible(channels * self.width, DIVISOR)

        def conv_bn(y, name, features, **arguments):
            y = _conv_bn(y, train, name, features, self.bn_axis_name, types, **arguments)
            return hard_swish(y)

        maps: dict[str, jax.Array] = {}
        channels = rounded(16)
        x = maps["features.0"] = conv_bn(x, "features.0", channels, kernel_size=3, strides=2)
        for i, (k, mid, out, se, hard, stride) in enumerate(blocks, start=1):
            mid, out = rounded(mid), rounded(out)
            x = maps[f"features.{i}"] = InvertedResidual(
                channels,
                mid,
                out,
                kernel_size=k,
                stride=stride,
                se=se,
                hard=hard,
                bn_axis_name=self.bn_axis_name,
                name=f"features.{i}",
                **types,
            )(x, train)
            channels = out
        if not head:
            return maps
        last = f"features.{len(blocks) + 1}"
        x = maps[last] = conv_bn(x, last, 6 * channels)
        linear = dict(
            kernel_init=nn.initializers.normal(0.01), bias_init=nn.initializers.zeros, **types
        )
        hidden = make_divisible((1024 if self.small else 1280) * self.width, DIVISOR)
        x = x.mean((1, 2))
        x = maps["head"] = hard_swish(Linear(hidden, name="classifier.0", **linear)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        maps["logits"] = Linear(self.num_classes, name="classifier.3", **linear)(x)
        return maps


MODEL = MobileNetV3

VARIANTS: dict[str, dict[str, Any]] = {
    "mobilenet_v3_large": {},
    "mobilenet_v3_small": {"small": True},
}


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """What the naming rule cannot know: a network without a head leaves the head's keys unread."""
    if not getattr(module, "features_only", False):
        return {}
    last = len(SMALL if module.small else LARGE) + 1
    return {"drops": [rf"(features\.{last}|classifier)\..*"]}
