"""Xception as forgery detectors use it (FaceForensics++ variant).

F. Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", arXiv 1610.02357.
Structure and names after SCLBD/DeepfakeBench@8a4a7bf (`training/networks/xception.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.layers.normalization import BatchNorm
from jaxmodels.vision.resnet import max_pool

# Outputs of conv1, conv2, block1, block2, block3 (and all middle blocks), block12, conv3, conv4.
CHANNELS = (32, 64, 128, 256, 728, 1024, 1536, 2048)
MODES = ("original", "adjust_channel", "adjust_channel_iid", "shallow_xception")
_LAST_BLOCK = 12
_FIRST_MIDDLE = 4


class SeparableConv(nn.Module):
    """Depthwise 3x3 (`conv1`), then 1x1 (`pointwise`), nothing between; [B, H, W, I] -> [.., O]."""

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Conv(x.shape[-1], 3, groups=x.shape[-1], name="conv1", **types)(x)
        return Conv(self.features, name="pointwise", **types)(x)


class XceptionBlock(nn.Module):
    """`widths` units of (ReLU, separable convolution, BN), a max-pool where strided, plus skip.

    x [B, H, W, I] -> [B, H / stride, W / stride, widths[-1]]. Children are named `rep.{i}`, i
    counting ReLUs and the pool as the checkpoint does.
    """

    widths: tuple[int, ...]
    stride: int = 1
    start_with_relu: bool = True
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = dict(axis_name=self.bn_axis_name, **types)
        y, i = x, 0
        for unit, features in enumerate(self.widths):
            if unit or self.start_with_relu:
                y, i = nn.relu(y), i + 1
            y = SeparableConv(features, name=f"rep.{i}", **types)(y)
            y = BatchNorm(name=f"rep.{i + 1}", **norm)(y, train)
            i += 2
        if self.stride > 1:
            y = max_pool(y, 3, self.stride, 1)
        if self.stride > 1 or x.shape[-1] != self.widths[-1]:
            x = Conv(self.widths[-1], 1, self.stride, name="skip", **types)(x)
            x = BatchNorm(name="skipbn", **norm)(x, train)
        return y + x


class Xception(nn.Module):
    """Images [B, H, W, inc], scaled to [-1, 1] -> logits [B, num_classes].

    Attributes:
      channels: outputs of conv1, conv2, block1, block2, block3 (all middle blocks), block12, conv3
        and conv4.
      n_middle: middle blocks (8 officially), named block4, block5, ... before block12.
      mode: `original`; `adjust_channel` and `adjust_channel_iid` classify a 1x1 reduction of the
        features to `adjusted_channels`; `shallow_xception` leaves out the middle blocks.
      inc: input channels, more than 3 with a bank of fixed frequency filters before the network.
    """

    channels: tuple[int, ...] = CHANNELS
    n_middle: int = 8
    num_classes: int = 2
    mode: str = "original"
    adjusted_channels: int = 512
    inc: int = 3
    dropout: float = 0.0
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"Xception mode {self.mode!r}; known: {', '.join(MODES)}")
        if len(self.channels) != len(CHANNELS):
            raise ValueError(f"Xception channels are {len(CHANNELS)} widths, got {self.channels}")
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, 71, 71, inc]."""
        return (jax.ShapeDtypeStruct((1, 71, 71, self.inc), jnp.float32),)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits [B, num_classes]."""
        return self.intermediates(x, train)["logits"]

    @nn.compact
    def intermediates(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """`part1` (after conv2), `part2` (block3), `part4` (block12), `features`, `logits`.

        `features` [B, H / 32, W / 32, C] is taken before the last ReLU.
        """
        if x.ndim != 4 or x.shape[-1] != self.inc or min(x.shape[1:3]) < 32:
            raise ValueError(
                f"Xception takes images [batch, height, width, {self.inc}] of at least 32x32, "
                f"got shape {x.shape}"
            )
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = dict(axis_name=self.bn_axis_name, **types)
        c1, c2, b1, b2, b3, b12, c3, c4 = self.channels
        x = Conv(c1, 3, 2, padding=0, name="conv1", **types)(x)
        x = nn.relu(BatchNorm(name="bn1", **norm)(x, train))
        x = Conv(c2, 3, padding=0, name="conv2", **types)(x)
        x = nn.relu(BatchNorm(name="bn2", **norm)(x, train))
        maps = {"part1": x}

        def block(y, number, widths, stride, **arguments):
            made = XceptionBlock(
                widths, stride, name=f"block{number}", bn_axis_name=self.bn_axis_name,
                **arguments, **types,
            )  # fmt: skip
            return made(y, train)

        x = block(x, 1, (b1, b1), 2, start_with_relu=False)
        x = block(x, 2, (b2, b2), 2)
        x = maps["part2"] = block(x, 3, (b3, b3), 2)
        middle = 0 if self.mode == "shallow_xception" else self.n_middle
        for i in range(middle):
            # More than eight would meet block12's name.
            number = _FIRST_MIDDLE + i + (_FIRST_MIDDLE + i >= _LAST_BLOCK)
            x = block(x, number, (b3, b3, b3), 1)
        x = maps["part4"] = block(x, _LAST_BLOCK, (b3, b12), 2)
        x = SeparableConv(c3, name="conv3", **types)(x)
        x = nn.relu(BatchNorm(name="bn3", **norm)(x, train))
        x = SeparableConv(c4, name="conv4", **types)(x)
        x = BatchNorm(name="bn4", **norm)(x, train)
        if _adjusts(self):
            x = Conv(self.adjusted_channels, use_bias=True, name="adjust_channel.0", **types)(x)
            x = nn.relu(BatchNorm(name="adjust_channel.1", **norm)(x, train))
        maps["features"] = x
        x = nn.relu(x).mean((1, 2))
        name = "last_linear"
        if self.dropout:
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            name = "last_linear.1"
        maps["logits"] = Linear(self.num_classes, name=name, **types)(x)
        return maps


def _adjusts(module: nn.Module) -> bool:
    return getattr(module, "mode", "original").startswith("adjust_channel")


MODEL = Xception

VARIANTS: dict[str, dict[str, Any]] = {"xception": {}}


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """Unused channel reduction, ImageNet's `fc`."""
    last = "last_linear.1" if getattr(module, "dropout", 0) else "last_linear"
    rules: dict[str, Any] = {
        "spellings": [(r"(^|\.)(?:fc|last_linear(?:\.1)?)\.(weight|bias)$", rf"\g<1>{last}.\g<2>")]
    }
    if not _adjusts(module):
        rules["travels"] = [r"adjust_channel\..*"]
    if getattr(module, "mode", "original") == "shallow_xception":
        rules["travels"].append(rf"block([{_FIRST_MIDDLE}-9]|1[01])\..*")
    return rules


def upgrade_checkpoint(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """ImageNet files of this network store pointwise weights [O, I]: give them their 1x1 axes."""
    del module
    return {
        key: np.reshape(value, (*np.shape(value), 1, 1))
        if key.endswith("pointwise.weight") and np.ndim(value) == 2
        else value
        for key, value in state.items()
    }
