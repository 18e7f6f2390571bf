"""2-D convolution whose gradients are fast inside loops and branches on a CPU too.

XLA's CPU backend brings a convolution into the layout of its fast path in a module's entry only
(its pass `ConvCanonicalization`). The gradients that JAX derives have other layouts, so that in
the body of a `scan` or a `switch` they took nine times as long (`benchmarks/results/
convolution.md`). Here the tangents are written in the layouts whose transposes, which are the
gradients, have the fast one already; arrays are transposed around them.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

# From this many input channels and output pixels on the kernel's gradient goes by blocks of about
# so many pixels (`benchmarks/results/convolution.md`).
_BLOCKED_CHANNELS, _BLOCKED_PIXELS, _BLOCK_PIXELS = 32, 256, 256

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]


def output_size(
    size: tuple[int, ...], kernel: tuple[int, ...], strides: Pair, padding: Padding
) -> tuple[int, int]:
    """(H', W') of images of `size` (H, W), the first two of `kernel`'s sides counting."""
    sides = zip(size, kernel[:2], strides, padding, strict=True)
    return tuple((n + sum(p) - k) // s + 1 for n, k, s, p in sides)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def conv2d(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
    """x [B, H, W, I] with kernel [kh, kw, I, O] -> [B, H', W', O], H' = (H + p - kh) // s + 1.

    `padding` is ((top, bottom), (left, right)). Derivatives of every mode and order work; other
    platforms than a CPU get those that JAX derives.
    """
    return _by_xla(x, kernel, strides, padding)


def _by_xla(x, kernel, strides, padding):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)


@partial(conv2d.defjvp, symbolic_zeros=True)
def _conv2d_jvp(strides, padding, primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents
    parts = []
    if not isinstance(dx, SymbolicZero):
        parts.append(_tangent(_by_image, dx, kernel, strides, padding))
    if not isinstance(dkernel, SymbolicZero):
        parts.append(_tangent(_by_kernel, x, dkernel, strides, padding))
    return conv2d(x, kernel, strides, padding), sum(parts[1:], start=parts[0])


def _tangent(on_cpu, x, kernel, strides, padding):
    options = {"strides": strides, "padding": padding}
    return lax.platform_dependent(
        x, kernel, cpu=partial(on_cpu, **options), default=partial(_by_xla, **options)
    )


def _by_image(dx, kernel, strides, padding):
    """Transposed with respect to `dx`, this is a convolution of [N, H, W, C] with [H, W, I, O]."""
    numbers = ("NHWC", "HWOI", "NHWC")
    kernel = jnp.swapaxes(kernel, 2, 3)
    return lax.conv_general_dilated(dx, kernel, strides, padding, dimension_numbers=numbers)


def _by_kernel(x, dkernel, strides, padding):
    """Of `dkernel`: transposed it is the kernel's gradient, by blocks or as one convolution."""
    out = output_size(x.shape[1:3], dkernel.shape, strides, padding)
    windowed = dkernel.shape[0] * dkernel.shape[1] > 1 and x.shape[3] >= _BLOCKED_CHANNELS
    blocked = windowed and math.prod(out) >= _BLOCKED_PIXELS and x.dtype == jnp.float32
    form = _by_blocks if blocked else _by_channels
    return form(x, dkernel, strides, padding)


def _by_channels(x, dkernel, strides, padding):
    """Channels are the batch, images the channels of the transposed convolution."""
    x, dkernel = jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(dkernel, (2, 0, 1, 3))
    numbers = ("CHWN", "IHWO", "HWNC")
    y = lax.conv_general_dilated(x, dkernel, strides, padding, dimension_numbers=numbers)
    return jnp.transpose(y, (2, 0, 1, 3))


def _by_blocks(x, dkernel, strides, padding):
    """Matrix products over windows of a few rows, which stay in the processor's cache.

    Windows are copied anew when the loop is transposed (`checkpoint`): kept, they would be as many
    times the image as the kernel has taps.
    """
    (batch, height, width, channels), (kh, kw, _, features) = x.shape, dkernel.shape
    (top, bottom), (left, right) = padding
    out_h, out_w = output_size((height, width), dkernel.shape, strides, padding)
    rows = min(max(_BLOCK_PIXELS // out_w, 1), out_h)
    blocks = -(-out_h // rows)
    # Rows behind the last window are never read or belong to results that are cut off.
    missing = (blocks * rows - 1) * strides[0] + kh - (height + top + bottom)
    x = jnp.pad(x, ((0, 0), (top, bottom + max(missing, 0)), (left, right), (0, 0)))
    reach = (rows - 1) * strides[0] + kh
    ends = [(n - 1) * s + 1 for n, s in zip((rows, out_w), strides, strict=True)]
    # [O, kh kw I]: the transposed product reads both of its arguments along their rows.
    flat = dkernel.reshape(-1, features).T

    @partial(jax.checkpoint, prevent_cse=False)
    def block(x, flat, at):
        image, row = at // blocks, at % blocks * (rows * strides[0])
        part = lax.dynamic_slice(x, (image, row, 0, 0), (1, reach, x.shape[2], channels))[0]
        windows = [
            part[i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
            for i in range(kh)
            for j in range(kw)
        ]
        return jnp.concatenate(windows, -1).reshape(rows * out_w, -1) @ flat.T

    y = lax.scan(lambda _, at: (None, block(x, flat, at)), None, jnp.arange(batch * blocks))[1]
    return y.reshape(batch, blocks * rows, out_w, features)[:, :out_h]
