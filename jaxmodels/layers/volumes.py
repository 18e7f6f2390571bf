"""Convolution, transposed convolution and instance normalization over any number of axes."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxmodels.layers.conv2d import conv2d
from jaxmodels.layers.initializers import Initializer

_LETTERS = "DHWXYZ"


def kaiming_normal(negative_slope: float = 0.01) -> Initializer:
    """Normal with variance 2 / ((1 + a^2) fan_in) for kernels `[*spatial, in, out]`."""
    return nn.initializers.variance_scaling(2 / (1 + negative_slope**2), "fan_in", "normal")


def transposed_kaiming_normal(negative_slope: float = 0.01) -> Initializer:
    """The same for a transposed convolution: PyTorch counts `out * prod(spatial)` as its fan."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        fan = shape[-1] * math.prod(shape[:-2])
        return jax.random.normal(key, shape, dtype) * math.sqrt(2 / ((1 + negative_slope**2) * fan))

    return init


def _xla_convolve(x, kernel, strides, padding):
    n = len(strides)
    if n == 2:
        return conv2d(x, kernel, tuple(strides), tuple((p, p) for p in padding))
    letters = _LETTERS[:n]
    layout = f"N{letters}C"
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        tuple((p, p) for p in padding),
        dimension_numbers=(layout, f"{letters}IO", layout),
    )


def _convolve_slices(x, kernel, strides, padding):
    """A 3-D convolution as a 2-D one over slices, the neighbors in depth being channels.

    XLA's 3-D convolutions run at a few GFLOP/s on a CPU, its 2-D ones near the peak (32^3, 8 to 8
    channels, one thread: 52 -> 4 ms, gradients 150 -> 10 ms).
    """
    batch, depth, *plane, channels = x.shape
    taps = kernel.shape[0]
    out = (depth + 2 * padding[0] - taps) // strides[0] + 1
    if taps > 1 or padding[0]:
        x = jnp.pad(x, ((0, 0), (padding[0],) * 2, (0, 0), (0, 0), (0, 0)))
    last = (out - 1) * strides[0] + 1
    parts = [lax.slice_in_dim(x, t, t + last, strides[0], axis=1) for t in range(taps)]
    x = parts[0] if taps == 1 else jnp.concatenate(parts, -1)
    x = x.reshape(batch * out, *plane, taps * channels)
    # [kd, kh, kw, I, O] -> [kh, kw, kd I, O]
    flat = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], -1, kernel.shape[-1])
    y = _xla_convolve(x, flat, strides[1:], padding[1:])
    return y.reshape(batch, out, *y.shape[1:])


def convolve(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[int, ...]
) -> jax.Array:
    """x [B, *S, I] with kernel [*k, I, O] -> [B, *S', O]; `padding` is symmetric on each axis."""
    if len(strides) != 3:
        return _xla_convolve(x, kernel, strides, padding)
    form = dict(strides=strides, padding=padding)
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_convolve_slices, **form),
        default=functools.partial(_xla_convolve, **form),
    )


class VolumeConv(nn.Module):
    """Convolution over n = len(kernel_size) axes, x [B, *S, I] -> [B, *S', O].

    Every axis has its kernel size and stride; padding is `(k - 1) // 2`. Param `kernel`
    [*k, I, O], `bias` [O].
    """

    features: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    use_bias: bool = True
    kernel_init: Initializer = kaiming_normal()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype).astype(self.dtype)
        x = x.astype(self.dtype)
        if all(k == 1 for k in self.kernel_size) and all(s == 1 for s in self.strides):
            y = x @ kernel.reshape(shape[-2:])
        else:
            y = convolve(x, kernel, self.strides, tuple((k - 1) // 2 for k in self.kernel_size))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y + bias.astype(self.dtype)
        return y


class UpConv(nn.Module):
    """Transposed convolution whose kernel equals its stride, x [B, *S, I] -> [B, *(S s), O].

    Windows do not overlap, so it is one matrix product and a rearrangement. Param `kernel`
    [*s, I, O], not flipped; `bias` [O].
    """

    features: int
    strides: tuple[int, ...]
    use_bias: bool = True
    kernel_init: Initializer = transposed_kaiming_normal()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, (batch, *spatial, channels) = len(self.strides), x.shape
        shape = (*self.strides, channels, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype).astype(self.dtype)
        # [I, *s, O]: every input voxel becomes a block of output voxels.
        flat = jnp.moveaxis(kernel, n, 0).reshape(channels, -1)
        y = (x.astype(self.dtype) @ flat).reshape(batch, *spatial, *self.strides, self.features)
        order = [0]
        for axis in range(n):
            order += [1 + axis, 1 + n + axis]
        y = y.transpose(*order, 1 + 2 * n)
        y = y.reshape(batch, *(s * k for s, k in zip(spatial, self.strides)), self.features)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y + bias.astype(self.dtype)
        return y


def _statistics(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    axes = tuple(range(1, x.ndim - 1))
    mean = x.mean(axes, keepdims=True)
    variance = jnp.square(x - mean).mean(axes, keepdims=True)
    return mean, lax.rsqrt(variance + epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def instance_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """`(x - mean) / sqrt(var + epsilon) * scale + bias` per sample and channel, x [B, *S, C].

    Biased variance in two passes. Its gradient is written out: two sums and one pass over x,
    where differentiating through the statistics takes about twice the memory traffic.
    """
    mean, inverse = _statistics(x, epsilon)
    return (x - mean) * (inverse * scale) + bias


def _instance_norm_forward(x, scale, bias, epsilon):
    mean, inverse = _statistics(x, epsilon)
    return (x - mean) * (inverse * scale) + bias, (x, mean, inverse, scale)


def _instance_norm_backward(epsilon, saved, dy):
    del epsilon
    x, mean, inverse, scale = saved
    axes = tuple(range(1, x.ndim - 1))
    voxels = math.prod(x.shape[1:-1])
    plain = dy.sum(axes, keepdims=True)
    # sum of dy (x - mean) inverse, without an array of its own
    along = (dy * (x - mean)).sum(axes, keepdims=True) * inverse
    correction = (plain + (x - mean) * (inverse * along)) / voxels
    dx = (dy - correction) * (inverse * scale)
    rest = tuple(range(x.ndim - 1))
    return dx, along.sum(rest), plain.sum(rest)


instance_norm.defvjp(_instance_norm_forward, _instance_norm_backward)


class InstanceNorm(nn.Module):
    """Normalize every sample and channel over its own voxels, x [B, *S, C]; no running statistics.

    Biased variance in float32 or wider; params `scale`, `bias` [C].
    """

    epsilon: float = 1e-5
    scale_init: Initializer = nn.initializers.ones
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, features, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, features, self.param_dtype)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        x, scale, bias = (a.astype(wide) for a in (x, scale, bias))
        return instance_norm(x, scale, bias, self.epsilon).astype(self.dtype)


def average_pool(x: jax.Array, strides: tuple[int, ...]) -> jax.Array:
    """Mean over blocks of `strides` voxels, x [B, *S, C]; a remainder is dropped."""
    batch, *spatial, channels = x.shape
    whole = tuple(slice(0, n // s * s) for n, s in zip(spatial, strides))
    x = x[(slice(None), *whole)]
    shape, axes = [batch], []
    for n, s in zip(spatial, strides):
        axes.append(len(shape) + 1)
        shape += [n // s, s]
    return x.reshape(*shape, channels).mean(tuple(axes))
