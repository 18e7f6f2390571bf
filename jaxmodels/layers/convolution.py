"""Convolution and linear layers with PyTorch's padding, initialization and leaf names."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxmodels.layers.depthwise import depthwise_conv
from jaxmodels.layers.initializers import Initializer, torch_bias, torch_kernel


class Conv(nn.Module):
    """2-D convolution, x [B, H, W, I] -> [B, H', W', O], kernel [kh, kw, I / groups, O].

    `padding` is symmetric and numerical as in PyTorch (never XLA's "SAME"); None means
    kernel_size // 2. A 1x1 kernel stays 4-D and is computed as `x @ kernel[0, 0]`; groups equal
    to the number of channels take the depthwise form.
    """

    features: int
    kernel_size: int = 1
    strides: int = 1
    padding: int | None = None
    groups: int = 1
    use_bias: bool = False
    kernel_init: Initializer = torch_kernel()
    bias_init: Initializer | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k, channels = self.kernel_size, x.shape[-1]
        if channels % self.groups or self.features % self.groups:
            raise ValueError(
                f"{'/'.join(self.path)}: {self.groups} groups do not divide "
                f"{channels} input or {self.features} output channels"
            )
        shape = (k, k, channels // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        kernel = jnp.asarray(kernel, self.dtype)
        x = jnp.asarray(x, self.dtype)
        pad = k // 2 if self.padding is None else self.padding
        strides, padding = (self.strides, self.strides), ((pad, pad), (pad, pad))
        if k == 1 and self.strides == 1 and self.groups == 1 and pad == 0:
            y = x @ kernel[0, 0]
        elif self.groups == channels == self.features:
            y = depthwise_conv(x, kernel, strides, padding)
        else:
            y = lax.conv_general_dilated(
                x,
                kernel,
                strides,
                padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=self.groups,
            )
        if self.use_bias:
            init = self.bias_init or torch_bias(math.prod(shape[:-1]))
            y = y + self.param("bias", init, (self.features,), self.param_dtype).astype(self.dtype)
        return y


class Linear(nn.Module):
    """Affine map of the last axis, x [..., I] -> [..., O], kernel [I, O]."""

    features: int
    use_bias: bool = True
    kernel_init: Initializer = torch_kernel()
    bias_init: Initializer | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        y = jnp.asarray(x, self.dtype) @ jnp.asarray(kernel, self.dtype)
        if self.use_bias:
            init = self.bias_init or torch_bias(shape[0])
            y = y + self.param("bias", init, (self.features,), self.param_dtype).astype(self.dtype)
        return y
