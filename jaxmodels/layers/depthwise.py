"""Depthwise convolution."""

from __future__ import annotations

import jax
from jax import lax


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: int | tuple[int, int] = 1,
    padding: int | tuple[tuple[int, int], tuple[int, int]] = 0,
) -> jax.Array:
    """Convolve every channel of `x` [B, H, W, C] with its own kernel [kh, kw, 1, C]."""
    strides = (strides, strides) if isinstance(strides, int) else strides
    if isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
