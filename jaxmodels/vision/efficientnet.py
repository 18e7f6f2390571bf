"""EfficientNet B0 to B8 and L2 with timm's names.

M. Tan, Q. Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
arXiv 1905.11946. Structure and names after timm 1.0.31 (`models/efficientnet.py`,
`_gen_efficientnet`); `tf_` variants are TensorFlow's weights: SAME padding and eps 1e-3.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.layers.normalization import BatchNorm
from jaxmodels.layers.rounding import make_divisible
from jaxmodels.vision.images import check_images

# (blocks, kernel, stride, expansion, channels) of every stage of B0.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_FEATURES, HEAD_FEATURES, SQUEEZE = 32, 1280, 0.25


def _round_channels(channels: int, multiplier: float, divisor: int, limit: float) -> int:
    value = channels * multiplier
    rounded = make_divisible(value, divisor)
    if limit == 0.9:  # the shared rounding's own limit
        return rounded
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < limit * value else rounded


class _Squeeze(nn.Module):
    """x * sigmoid(expand(silu(reduce(mean of x)))), x [B, H, W, C]; `reduced` bottleneck width."""

    reduced: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(use_bias=True, dtype=self.dtype, param_dtype=self.param_dtype)
        z = x.mean((1, 2), keepdims=True)
        z = nn.silu(Conv(self.reduced, name="conv_reduce", **types)(z))
        return x * nn.sigmoid(Conv(x.shape[-1], name="conv_expand", **types)(z))


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class EfficientNet(nn.Module):
    """Images [B, H, W, in_chans] -> logits [B, num_classes].

    Attributes:
      num_classes: 0 leaves the classifier out.
      channel_multiplier, depth_multiplier: compound scaling; blocks of a stage are
        ceil(base * depth_multiplier), channels a multiple of `divisor`, one step up where rounding
        lost more than 1 - `round_limit` of them.
      same_padding: TensorFlow's padding (more on the right and below) in place of PyTorch's.
      drop_path_rate: stochastic depth, growing linearly to this rate at the last block (timm).
    """

    channel_multiplier: float = 1.0
    depth_multiplier: float = 1.0
    num_classes: int = 1000
    in_chans: int = 3
    dropout: float = 0.2
    drop_path_rate: float = 0.0
    divisor: int = 8
    round_limit: float = 0.9
    bn_eps: float = 1e-5
    same_padding: bool = False
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, 64, 64, in_chans]."""
        return (jax.ShapeDtypeStruct((1, 64, 64, self.in_chans), jnp.float32),)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits [B, num_classes], or the mean [B, C] of the last map without a classifier."""
        maps = self.intermediates(x, train)
        return maps["logits"] if self.num_classes else maps["head"].mean((1, 2))

    @nn.compact
    def intermediates(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """`stem`, `blocks.0` .. `blocks.6`, `head` (map after conv_head) and `logits`."""
        check_images(x, self.in_chans)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        width = lambda c: _round_channels(  # noqa: E731
            c, self.channel_multiplier, self.divisor, self.round_limit
        )

        def conv(y, features, kernel, stride, **arguments):
            if self.same_padding and kernel > 1:
                pads = [_same_padding(n, kernel, stride) for n in y.shape[1:3]]
                y = jnp.pad(y, ((0, 0), *pads, (0, 0)))
                arguments["padding"] = 0
            return Conv(features, kernel, stride, **arguments, **types)(y)

        def norm(y, name):
            bn = BatchNorm(self.bn_eps, axis_name=self.bn_axis_name, name=name, **types)
            return bn(y, train)

        channels = width(STEM_FEATURES)
        x = nn.silu(norm(conv(x, channels, 3, 2, name="conv_stem"), "bn1"))
        maps = {"stem": x}
        depths = [math.ceil(stage[0] * self.depth_multiplier) for stage in STAGES]
        done = 0
        for s, ((_, kernel, stride, expansion, out), depth) in enumerate(zip(STAGES, depths)):
            for b in range(depth):
                block = _InvertedResidual(
                    width(out), kernel, stride if b == 0 else 1, expansion,
                    drop=self.drop_path_rate * done / sum(depths), bn_eps=self.bn_eps,
                    same_padding=self.same_padding, bn_axis_name=self.bn_axis_name,
                    name=f"blocks.{s}.{b}", **types,
                )  # fmt: skip
                x = block(x, train)
                done += 1
            maps[f"blocks.{s}"] = x
        x = nn.silu(norm(conv(x, width(HEAD_FEATURES), 1, 1, name="conv_head"), "bn2"))
        maps["head"] = x
        if not self.num_classes:
            return maps
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        maps["logits"] = Linear(self.num_classes, name="classifier", **types)(x)
        return maps


class _InvertedResidual(nn.Module):
    """Expand 1x1, depthwise, squeeze-and-excitation, project 1x1, plus identity where it fits.

    Without expansion (stage 0) the block is depthwise separable, with timm's names for it.
    The squeeze width counts from the block's input channels.
    """

    features: int
    kernel: int
    stride: int
    expansion: int
    drop: float = 0.0
    bn_eps: float = 1e-5
    same_padding: bool = False
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        inputs = x.shape[-1]
        middle = make_divisible(inputs * self.expansion, 8) if self.expansion > 1 else inputs

        def norm(y, name):
            bn = BatchNorm(self.bn_eps, axis_name=self.bn_axis_name, name=name, **types)
            return bn(y, train)

        y = x
        if self.expansion > 1:
            y = nn.silu(norm(Conv(middle, name="conv_pw", **types)(y), "bn1"))
        padding = {}
        if self.same_padding:
            pads = [_same_padding(n, self.kernel, self.stride) for n in y.shape[1:3]]
            y, padding = jnp.pad(y, ((0, 0), *pads, (0, 0))), {"padding": 0}
        y = Conv(
            middle, self.kernel, self.stride, groups=middle, name="conv_dw", **padding, **types
        )(y)
        y = nn.silu(norm(y, "bn2" if self.expansion > 1 else "bn1"))
        reduced = round(middle * (SQUEEZE / self.expansion))
        y = _Squeeze(reduced, name="se", **types)(y)
        last, bn = ("conv_pwl", "bn3") if self.expansion > 1 else ("conv_pw", "bn2")
        y = norm(Conv(self.features, name=last, **types)(y), bn)
        if self.stride > 1 or inputs != self.features:
            return y
        if self.drop:
            # The same draw for all of an example's features: stochastic depth.
            shape = (0, 1, 2, 3)[1:]
            y = nn.Dropout(self.drop, broadcast_dims=shape, deterministic=not train)(y)
        return x + y


MODEL = EfficientNet

_SCALING = {
    "b0": (1.0, 1.0, 0.2),
    "b1": (1.0, 1.1, 0.2),
    "b2": (1.1, 1.2, 0.3),
    "b3": (1.2, 1.4, 0.3),
    "b4": (1.4, 1.8, 0.4),
    "b5": (1.6, 2.2, 0.4),
    "b6": (1.8, 2.6, 0.5),
    "b7": (2.0, 3.1, 0.5),
    "b8": (2.2, 3.6, 0.5),
    "l2": (4.3, 5.3, 0.5),
}
VARIANTS: dict[str, dict[str, Any]] = {
    f"{prefix}efficientnet_{size}": {
        "channel_multiplier": width,
        "depth_multiplier": depth,
        "dropout": dropout,
        **arguments,
    }
    for prefix, arguments in (("", {}), ("tf_", {"bn_eps": 1e-3, "same_padding": True}))
    for size, (width, depth, dropout) in _SCALING.items()
}
