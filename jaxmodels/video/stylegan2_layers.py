"""StyleGAN2's layers: equalized learning rates, modulated convolution, leaky ReLU times sqrt 2.

T. Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", arXiv 1912.04958, after
NVlabs/stylegan2-ada-pytorch@d72cc7d (`training/networks.py`, `torch_utils/ops`). Weights are
stored as drawn from a unit normal and scaled where they are used.
"""

from __future__ import annotations

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


def transposed_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed convolution with stride 2 and no padding, out[2 i + k] += x[i] kernel[k].

    x [B, H, W, I], kernel [3, 3, I, O] in a convolution's own layout -> [B, 2 H + 1, 2 W + 1, O].
    On a CPU it is four small convolutions, one for each parity of row and column: XLA's dilated
    convolution multiplies the zeros.
    """
    if kernel.shape[:2] != (3, 3):
        return _dilated(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=_by_parity, default=_dilated)


def _dilated(x, kernel):
    k = kernel.shape[0]
    return lax.conv_general_dilated(
        x,
        kernel[::-1, ::-1],
        (1, 1),
        ((k - 1, k - 1), (k - 1, k - 1)),
        lhs_dilation=(2, 2),
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

    `up` 2: transposed convolution, then the filter with gain 4. `down` 2: the filter, then a
    convolution with stride 2. The filter `f` [fh, fw] is aligned as in the official
    `conv2d_resample`.
    """
    k = kernel.shape[0]
    pad = k // 2
    if up == down == 1:
        return conv2d(x, kernel, pad)
    fh, fw = f.shape
    if down > 1 and up == 1:
        sides = [(n - down + 1) // 2 for n in (fw, fh)], [(n - down) // 2 for n in (fw, fh)]
        around = (sides[0][0], sides[1][0], sides[0][1], sides[1][1])
        if k == 1:
            return conv2d(upfirdn2d(x, f, down=down, padding=around), kernel)
        return conv2d(upfirdn2d(x, f, padding=tuple(p + pad for p in around)), kernel, 0, down)
    before = [pad + (n + up - 1) // 2 for n in (fw, fh)]
    after = [pad + (n - up) // 2 for n in (fw, fh)]
    if k == 1:
        around = (before[0], after[0], before[1], after[1])
        return upfirdn2d(conv2d(x, kernel), f, up=up, down=down, padding=around, gain=up * up)
    if up == 2:
        around = (
            before[0] - (k - 1),
            after[0] - (k - up),
            before[1] - (k - 1),
            after[1] - (k - up),
        )
        y = transposed_conv(x, kernel)
        return upfirdn2d(y, f, padding=around, down=down, gain=up * up)
    around = (before[0], after[0], before[1], after[1])
    y = conv2d(upfirdn2d(x, f, up=up, padding=around, gain=up * up), kernel)
    return upfirdn2d(y, None, down=down) if down > 1 else y


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
      f: resampling filter [fh, fw]; None is [1, 3, 3, 1].
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
