"""Depthwise convolution."""

from __future__ import annotations

import jax
from jax import lax


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int] = (1, 1),
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1)),
) -> jax.Array:
    """Convolve every channel of `x` [B, H, W, C] with its own kernel [kh, kw, 1, C]."""
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
