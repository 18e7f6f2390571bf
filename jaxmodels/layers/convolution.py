"""Convolution and linear layers with PyTorch's padding, initialization and leaf names."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxmodels.layers.conv2d import conv2d, output_size
from jaxmodels.layers.depthwise import depthwise_conv, unfused
from jaxmodels.layers.initializers import Initializer, torch_bias, torch_kernel

# A network's first convolution sees an image's three channels.
_FEW_CHANNELS = 4
# Up to this many input channels a 1x1 convolution is faster as multiply-adds on a CPU.
_NARROW = 8
# Up to this many filters a stem is faster as multiply-adds than as one matrix product.
_FEW_FILTERS = 16


def _xla_conv(x, kernel, strides, padding, groups):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _gathered_conv(x: jax.Array, kernel: jax.Array, stride: int, pad: int) -> jax.Array:
    """Convolution with a stride over few channels as one matrix product.

    A window's row is contiguous in memory, `kw * C` values every `stride * C`: whole steps of the
    row are taken by reshaping. On a CPU this takes 0.5 to 0.9 of the time of XLA's convolution over
    3 channels (`benchmarks/results/convolution.md`).
    """
    batch, height, width, channels = x.shape
    kh, kw, _, features = kernel.shape
    out_h, out_w = ((n + 2 * pad - k) // stride + 1 for n, k in ((height, kh), (width, kw)))
    steps = -(-kw // stride)
    columns = max(width + 2 * pad, (out_w - 1 + steps) * stride)
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, columns - width - pad), (0, 0)))
    rows = x.reshape(batch, height + 2 * pad, columns * channels)
    step, windows = stride * channels, []
    for i in range(kh):
        row = rows[:, i : i + (out_h - 1) * stride + 1 : stride]
        for j in range(steps):
            taken = row[:, :, j * step : (j + out_w) * step].reshape(batch, out_h, out_w, step)
            windows.append(taken[..., : min(stride, kw - j * stride) * channels])
    return jnp.concatenate(windows, -1) @ kernel.reshape(-1, features)


def _windowed_conv(x: jax.Array, kernel: jax.Array, strides: tuple, padding: tuple) -> jax.Array:
    """Convolution as one matrix product over copies of all windows, for maps of a few pixels.

    XLA's CPU backend leaves its fast path where a map is smaller than the kernel: 2x2 pixels of 512
    channels took 136 ms by it and 1.5 ms so (`benchmarks/results/convolution.md`).
    """
    kh, kw, _, features = kernel.shape
    out = output_size(x.shape[1:3], kernel.shape, strides, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    ends = [(n - 1) * s + 1 for n, s in zip(out, strides)]
    windows = [
        x[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
        for i in range(kh)
        for j in range(kw)
    ]
    return jnp.concatenate(windows, -1) @ kernel.reshape(-1, features)


def _dense_conv(x: jax.Array, kernel: jax.Array, strides: tuple, padding: tuple) -> jax.Array:
    """XLA's convolution; on a CPU the matrix product where the result is smaller than the kernel.

    That is where the convolution itself, or the one that is its gradient, falls off the fast path.
    """
    out = output_size(x.shape[1:3], kernel.shape, strides, padding)
    if kernel.shape[:2] == (1, 1) or all(n >= k for n, k in zip(out, kernel.shape[:2])):
        return conv2d(x, kernel, strides, padding)
    return lax.platform_dependent(
        x,
        kernel,
        cpu=partial(_windowed_conv, strides=strides, padding=padding),
        default=partial(conv2d, strides=strides, padding=padding),
    )


@unfused(2, 3)
def _tapped_conv(x: jax.Array, kernel: jax.Array, stride: int, pad: int) -> jax.Array:
    """Convolution over few channels as one fused loop of multiply-adds over the filters.

    A quarter to a half of the time of the matrix product on a CPU up to 16 filters
    (`benchmarks/results/convolution.md`), and the order of additions (row, column, channel) of
    PyTorch's CPU kernels.
    """
    batch, height, width, channels = x.shape
    kh, kw = kernel.shape[:2]
    out_h, out_w = ((n + 2 * pad - k) // stride + 1 for n, k in ((height, kh), (width, kw)))
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    y = None
    for i in range(kh):
        for j in range(kw):
            last = (batch, i + (out_h - 1) * stride + 1, j + (out_w - 1) * stride + 1, channels)
            window = lax.slice(x, (0, i, j, 0), last, (1, stride, stride, 1))
            for c in range(channels):
                term = window[..., c : c + 1] * kernel[i, j, c]
                # The new product first: of two products the first is the one that is fused.
                y = term if y is None else term + y
    return y


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _stem_conv(x: jax.Array, kernel: jax.Array, stride: int, pad: int) -> jax.Array:
    few = kernel.shape[-1] <= _FEW_FILTERS and x.dtype == jnp.float32
    return _by_platform(x, kernel, stride, pad, _tapped_conv if few else _gathered_conv)


def _by_platform(x, kernel, stride, pad, on_cpu):
    strides, padding = (stride, stride), ((pad, pad), (pad, pad))
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: on_cpu(x, kernel, stride, pad),
        default=partial(_xla_conv, strides=strides, padding=padding, groups=1),
    )


def _linear_parts(form, primals, tangents):
    """Tangent of a bilinear `form` of two arrays; a symbolic zero costs nothing."""
    parts = []
    for at, tangent in enumerate(tangents):
        if not isinstance(tangent, SymbolicZero):
            parts.append(form(*(tangent if k == at else primals[k] for k in (0, 1))))
    return sum(parts[1:], start=parts[0])


@partial(_stem_conv.defjvp, symbolic_zeros=True)
def _stem_conv_jvp(stride, pad, primals, tangents):
    # The kernel's gradient is a matrix product whatever the forward pass was.
    form = partial(_by_platform, stride=stride, pad=pad, on_cpu=_gathered_conv)
    return _stem_conv(*primals, stride, pad), _linear_parts(form, primals, tangents)


@unfused()
def _summed_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    y = None
    for c in range(x.shape[-1]):
        term = x[..., c : c + 1] * kernel[c]
        y = term if y is None else term + y
    return y


@jax.custom_jvp
def _pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x [..., I] @ kernel [I, O]`; with few channels one fused loop on a CPU.

    There it takes 0.6 to 0.9 of the matrix product's time and adds channels in PyTorch's order.
    """
    if x.shape[-1] > _NARROW or x.dtype not in (jnp.float32, jnp.float64):
        return x @ kernel
    return lax.platform_dependent(x, kernel, cpu=_summed_product, default=jnp.matmul)


@partial(_pointwise.defjvp, symbolic_zeros=True)
def _pointwise_jvp(primals, tangents):
    return _pointwise(*primals), _linear_parts(jnp.matmul, primals, tangents)


class Conv(nn.Module):
    """2-D convolution, x [B, H, W, I] -> [B, H', W', O], kernel [kh, kw, I / groups, O].

    `padding` is symmetric and numerical as in PyTorch (never XLA's "SAME"); None means
    kernel_size // 2. A 1x1 kernel stays 4-D and is computed as `x @ kernel[0, 0]`; groups equal
    to the number of channels take the depthwise form; a stem (few channels, a stride) is a fused
    loop or a matrix product on a CPU; maps smaller than the kernel are a matrix product there.
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
            y = _pointwise(x, kernel[0, 0])
        elif self.groups == channels == self.features:
            y = depthwise_conv(x, kernel, strides, padding)
        elif self.groups == 1 and 1 < self.strides and k > 1 and channels <= _FEW_CHANNELS:
            y = _stem_conv(x, kernel, self.strides, pad)
        elif self.groups == 1:
            y = _dense_conv(x, kernel, strides, padding)
        else:
            y = _xla_conv(x, kernel, strides, padding, self.groups)
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
