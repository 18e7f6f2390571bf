"""What StyleGAN2's discriminator is made of: its convolutions, blocks, and the end at 4x4.

Sources as in `jaxmodels.video.stylegan2`.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.video.stylegan2_layers import (
    EPSILON,
    EqualizedConv,
    EqualizedLinear,
)
from jaxmodels.video.upfirdn import BINOMIAL, downsample2d, setup_filter


def minibatch_deviation(x: jax.Array, group_size: int | None = 4, channels: int = 1) -> jax.Array:
    """x [B, H, W, C] with `channels` more maps: the mean standard deviation within groups.

    Group g holds samples g, g + B/G, g + 2 B/G, ... (strided), G = min(B, group_size). Variances
    are biased, plus 1e-8. Raises ValueError when G does not divide B.
    """
    batch, height, width, features = x.shape
    group = batch if group_size is None else min(group_size, batch)
    if batch % group:
        raise ValueError(
            f"batch {batch} does not divide into groups of {group} (minibatch standard deviation); "
            f"use a multiple of {group} or another mbstd_group_size"
        )
    wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
    y = wide.reshape(group, batch // group, height, width, channels, features // channels)
    y = y - y.mean(0)
    y = jnp.sqrt(jnp.square(y).mean(0) + EPSILON).mean((1, 2, 4))
    y = jnp.tile(y, (group, 1))[:, None, None]
    y = jnp.broadcast_to(y, (batch, height, width, channels)).astype(x.dtype)
    return jnp.concatenate([x, y], -1)


class DiscriminatorBlock(nn.Module):
    """Block of half the resolution, `x, image -> x, image`.

    "resnet" adds a shortcut, which is not clamped, and divides by sqrt 2; "skip" adds the image
    and halves it, the others see it (not None) at the first resolution only.
    """

    features: int
    out: int
    architecture: str = "resnet"
    conv_clamp: float | None = None
    resample_filter: tuple[float, ...] = BINOMIAL
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array | None, image: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        conv = dict(
            conv_clamp=self.conv_clamp,
            resample_filter=self.resample_filter,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        if image is not None:
            y = EqualizedConv(self.features, 1, name="fromrgb", **conv)(image)
            x = y if x is None else x + y
            half = downsample2d(image, setup_filter(self.resample_filter))
            image = half if self.architecture == "skip" else None
        if self.architecture != "resnet":
            x = EqualizedConv(self.features, 3, name="conv0", **conv)(x)
            return EqualizedConv(self.out, 3, 2, name="conv1", **conv)(x), image
        half = math.sqrt(0.5)
        plain = {**conv, "conv_clamp": None, "use_bias": False, "activation": False}
        skip = EqualizedConv(self.out, 1, 2, name="skip", **plain)(x, half)
        x = EqualizedConv(self.features, 3, name="conv0", **conv)(x)
        return EqualizedConv(self.out, 3, 2, name="conv1", **conv)(x, half) + skip, image


class DiscriminatorEpilogue(nn.Module):
    """Minibatch deviation, 3x3 convolution and two linear maps: [B, 4, 4, C] -> [B, 1].

    An image (architecture "skip") is added first; with mapped labels [B, D] the logit is
    the product with them, divided by sqrt D.
    """

    mbstd_group_size: int | None = 4
    mbstd_num_channels: int = 1
    conv_clamp: float | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, image: jax.Array | None = None, mapped: jax.Array | None = None
    ) -> jax.Array:
        features, kind = x.shape[-1], self.param_dtype
        x = jnp.asarray(x, kind)
        if image is not None:
            # Not clamped, unlike the other resolutions' in the official code.
            rgb = EqualizedConv(features, 1, name="fromrgb", dtype=kind, param_dtype=kind)
            x = x + rgb(image)
        if self.mbstd_num_channels > 0:
            x = minibatch_deviation(x, self.mbstd_group_size, self.mbstd_num_channels)
        types = dict(dtype=kind, param_dtype=kind)
        x = EqualizedConv(features, conv_clamp=self.conv_clamp, name="conv", **types)(x)
        # Checkpoints flatten channels first.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = EqualizedLinear(features, activation="lrelu", name="fc", **types)(x)
        if mapped is None:
            return EqualizedLinear(1, name="out", **types)(x)
        width = mapped.shape[-1]
        x = EqualizedLinear(width, name="out", **types)(x)
        return (x * mapped).sum(-1, keepdims=True) / math.sqrt(width)
