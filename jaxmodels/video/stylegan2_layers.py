"""StyleGAN2's layers: equalized learning rates, modulated convolution, leaky ReLU times sqrt 2.

T. Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", arXiv 1912.04958, after
NVlabs/stylegan2-ada-pytorch@d72cc7d (`training/networks.py`, `torch_utils/ops`). Weights are
stored as drawn from a unit normal and scaled where they are used.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmodels.layers.conv2d import conv2d as plain_conv2d
from jaxmodels.video.upfirdn import BINOMIAL, setup_filter, upfirdn2d

SLOPE = 0.2
SQRT2 = math.sqrt(2.0)
EPSILON = 1e-8


def leaky_relu(
    x: jax.Array, bias: jax.Array | None = None, gain: float = 1.0, clamp: float | None = None
) -> jax.Array:
    """clip(sqrt(2) gain lrelu_0.2(x + bias), +- clamp gain), x [..., C], bias [C]."""
    x = x if bias is None else x + bias.astype(x.dtype)
    return clamped(nn.leaky_relu(x, SLOPE) * (SQRT2 * gain), clamp, gain)


def clamped(x: jax.Array, clamp: float | None, gain: float = 1.0) -> jax.Array:
    """x within +- clamp * gain; None leaves it alone (`conv_clamp` of NVlabs networks)."""
    return x if clamp is None else jnp.clip(x, -clamp * gain, clamp * gain)


class EqualizedLinear(nn.Module):
    """y = x W lr / sqrt(I) + b lr, x [..., I] -> [..., features]; W ~ N(0, 1) / lr.

    `bias_init` is the bias's starting value (divided by nothing: it is used times lr), `zero_init`
    starts W at zero, `activation` is "linear" or "lrelu".
    """

    features: int
    use_bias: bool = True
    bias_init: float = 0.0
    lr_multiplier: float = 1.0
    activation: str = "linear"
    zero_init: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        deviation = 0.0 if self.zero_init else 1 / self.lr_multiplier
        kernel = self.param(
            "kernel",
            nn.initializers.normal(deviation) if deviation else nn.initializers.zeros,
            (x.shape[-1], self.features),
            self.param_dtype,
        )
        scale = self.lr_multiplier / math.sqrt(x.shape[-1])
        y = jnp.asarray(x, self.dtype) @ jnp.asarray(kernel * scale, self.dtype)
        if self.use_bias:
            init = nn.initializers.constant(self.bias_init)
            bias = self.param("bias", init, (self.features,), self.param_dtype)
            y = y + jnp.asarray(bias * self.lr_multiplier, self.dtype)
        if self.activation == "lrelu":
            return leaky_relu(y)
        if self.activation != "linear":
            raise ValueError(f"activation is linear or lrelu, got {self.activation!r}")
        return y


def conv2d(x: jax.Array, kernel: jax.Array, padding: int = 0, stride: int = 1) -> jax.Array:
    """Plain correlation, x [B, H, W, I], kernel [k, k, I, O], symmetric numeric padding."""
    if kernel.shape[0] == 1 and stride == 1 and padding == 0:
        return x @ kernel[0, 0]
    return plain_conv2d(x, kernel, (stride, stride), ((padding, padding), (padding, padding)))


def transposed_conv(x: jax.Array, kernel: jax.Array, stride: int = 2) -> jax.Array:
    """Transposed convolution without padding, out[s i + k] += x[i] kernel[k].

    x [B, H, W, I], kernel [k, k, I, O] in a convolution's own layout -> [B, s (H - 1) + k, .., O].
    On a CPU that of 3x3 kernels and stride 2 is four small convolutions, one for each parity of row
    and column: XLA's dilated convolution multiplies the zeros.
    """
    dilated = functools.partial(_dilated, stride=stride)
    if kernel.shape[:2] != (3, 3) or stride != 2:
        return dilated(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=_by_parity, default=dilated)


def _dilated(x, kernel, stride=2):
    k = kernel.shape[0]
    return lax.conv_general_dilated(
        x,
        kernel[::-1, ::-1],
        (1, 1),
        ((k - 1, k - 1), (k - 1, k - 1)),
        lhs_dilation=(stride, stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _by_parity(x, kernel):
    batch, height, width, _ = x.shape
    out = kernel.shape[-1]
    # Even positions see two input pixels (taps 2 and 0), odd ones a single one (tap 1).
    taps = ((2, 0), (1,))
    parts = []
    for row in taps:
        for column in taps:
            k = kernel[jnp.asarray(row)][:, jnp.asarray(column)]
            pads = tuple((len(t) - 1, len(t) - 1) for t in (row, column))
            y = plain_conv2d(x, k, (1, 1), pads)
            missing = ((0, 0), (0, height + 1 - y.shape[1]), (0, width + 1 - y.shape[2]), (0, 0))
            parts.append(jnp.pad(y, missing))
    y = jnp.stack(parts, 3).reshape(batch, height + 1, width + 1, 2, 2, out)
    y = y.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height + 2, 2 * width + 2, out)
    return y[:, :-1, :-1]


def conv2d_resample(
    x: jax.Array, kernel: jax.Array, f: np.ndarray | None, *, up: int = 1, down: int = 1
) -> jax.Array:
    """Convolution with padding k // 2 at another resolution: [B, H, W, I] -> [B, H', W', O].

    `up`: transposed convolution, then the filter with gain up^2 and, with `down` too, once more
    on the way down. `down` alone: the filter, then a convolution with stride. The filter `f`
    ([fh, fw], or [n] along both axes) is aligned as in the official `conv2d_resample`.
    """
    k = kernel.shape[0]
    pad = k // 2
    if up == down == 1:
        return conv2d(x, kernel, pad)
    taps = (f.shape[-1], f.shape[0])
    before, after = [pad, pad], [pad, pad]
    for axis, n in enumerate(taps):
        if up > 1:
            before[axis] += (n + up - 1) // 2
            after[axis] += (n - up) // 2
        if down > 1:
            before[axis] += (n - down + 1) // 2
            after[axis] += (n - down) // 2

    def filtered(y, moved_before=0, moved_after=0, **arguments):
        around = [(b - moved_before, a - moved_after) for b, a in zip(before, after)]
        return upfirdn2d(y, f, padding=sum(around, ()), **arguments)

    if up == 1:
        if k == 1:
            return conv2d(filtered(x, down=down), kernel)
        return conv2d(filtered(x), kernel, 0, down)
    if k == 1 and down == 1:
        return filtered(conv2d(x, kernel), up=up, gain=up * up)
    y = filtered(transposed_conv(x, kernel, up), k - 1, k - up, gain=up * up)
    return upfirdn2d(y, f, down=down) if down > 1 else y


def modulated_conv2d(
    x: jax.Array,
    kernel: jax.Array,
    styles: jax.Array,
    *,
    noise: jax.Array | None = None,
    f: np.ndarray | None = None,
    up: int = 1,
    down: int = 1,
    demodulate: bool = True,
    fused: bool = False,
) -> jax.Array:
    """Convolution whose weights are scaled per sample: W'' = W s / sqrt(sum_{i,k} (W s)^2 + 1e-8).

    Args:
      x: [B, H, W, I]. kernel: [k, k, I, O], unscaled. styles: [B, I], scales of input channels.
      noise: broadcastable to the output [B, H', W', 1], added after demodulation.
      f: resampling filter [fh, fw] or [n]; None is [1, 3, 3, 1].
      up, down: resampling, see `conv2d_resample`.
      demodulate: False leaves out the division (to-RGB).
      fused: weights of every sample and one convolution each; False scales the input by s, runs
        one shared convolution and scales the output, which is what accelerators want. The two
        agree to rounding.

    Returns: [B, H', W', O]. Demodulation runs in float32 or wider.
    """
    f = setup_filter(BINOMIAL) if f is None else f
    wide = jnp.promote_types(jnp.float32, x.dtype)
    kernel, styles = jnp.asarray(kernel, wide), jnp.asarray(styles, wide)
    if x.dtype == jnp.float16 and demodulate:
        # Half precision overflows at 65504: weights and styles are brought to order one, which
        # demodulation undoes.
        fan_in = math.prod(kernel.shape[:3])
        largest = jnp.abs(kernel).max((0, 1, 2), keepdims=True)
        kernel = kernel / (math.sqrt(fan_in) * largest)
        styles = styles / jnp.abs(styles).max(1, keepdims=True)
    if demodulate:
        squares = jnp.square(kernel).sum((0, 1))
        factor = lax.rsqrt(jnp.square(styles) @ squares + EPSILON)
    if fused:
        weights = kernel[None] * styles[:, None, None, :, None]
        if demodulate:
            weights = weights * factor[:, None, None, None, :]

        def one(image, weight):
            return conv2d_resample(image[None], weight.astype(x.dtype), f, up=up, down=down)[0]

        y = jax.vmap(one)(x, weights)
    else:
        y = x * styles[:, None, None].astype(x.dtype)
        y = conv2d_resample(y, kernel.astype(x.dtype), f, up=up, down=down)
        if demodulate:
            y = y * factor[:, None, None].astype(x.dtype)
    return y if noise is None else y + noise.astype(y.dtype)


class EqualizedConv(nn.Module):
    """Equalized convolution, optional down- or up-sampling, bias and leaky ReLU."""

    features: int
    kernel_size: int = 3
    down: int = 1
    up: int = 1
    use_bias: bool = True
    activation: bool = True
    conv_clamp: float | None = None
    resample_filter: tuple[float, ...] = BINOMIAL
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, gain: float = 1.0) -> jax.Array:
        k, inputs = self.kernel_size, x.shape[-1]
        shape = (k, k, inputs, self.features)
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape, self.param_dtype)
        kernel = jnp.asarray(kernel / math.sqrt(math.prod(shape[:3])), self.dtype)
        y = conv2d_resample(
            jnp.asarray(x, self.dtype),
            kernel,
            setup_filter(self.resample_filter),
            up=self.up,
            down=self.down,
        )
        bias = None
        if self.use_bias:
            init = nn.initializers.zeros
            bias = self.param("bias", init, (self.features,), self.param_dtype)
        if self.activation:
            return leaky_relu(y, bias, gain, self.conv_clamp)
        y = y if bias is None else y + bias.astype(y.dtype)
        return clamped(y * gain, self.conv_clamp, gain)
