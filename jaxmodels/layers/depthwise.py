"""Depthwise convolution that is fast on a CPU too, with its own gradient.

XLA's grouped convolution runs 50 to 90 times slower than shifted multiply-adds on a CPU, and the
automatic gradient of the shifts loses that again. On a CPU the image is therefore flattened to
`[B, H, W*C]`, so that one long contiguous axis vectorizes whatever C is, and each tap of the
kernel is one shifted multiply-add with the tap repeated W times. TPU and GPU use XLA's grouped
convolution. The form is chosen by platform and by shape from the measurements committed in
`benchmarks/results/depthwise.md`; nothing is timed at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]

# From this many elements of one image's output on, and this many rows, the weight gradient as a
# loop over blocks of rows beat one variadic reduction in sweeps of a prototype; the committed table
# (benchmarks/results/depthwise.md) covers only some of the shapes in between.
_LOOP_ELEMENTS = 8192
_LOOP_ROWS = 14
_ROWS_PER_STEP = 8


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Pair = (1, 1),
    padding: Padding = ((1, 1), (1, 1)),
) -> jax.Array:
    """Convolve every channel with its own kernel, zeros outside the image.

    y[b,h,w,c] = sum_ij x[b, sh h + i - top, sw w + j - left, c] kernel[i,j,0,c].

    Args:
        x: `[B, H, W, C]`, any floating dtype; half precision is accumulated in float32.
        kernel: `[kh, kw, 1, C]`, the layout of Flax for `feature_group_count = C`.
        strides: steps along H and W.
        padding: zeros `((top, bottom), (left, right))`; PyTorch's p is `((p, p), (p, p))`.

    Returns:
        `[B, H', W', C]` in the dtype of `x`, `H' = (H + top + bottom - kh) // strides[0] + 1`.

    Reverse-mode derivatives of any order, `jit`, `vmap` and sharding over B work. Forward-mode
    (`jax.jvp`, `jax.jacfwd`, `jax.hessian`) is refused by JAX's `custom_vjp`; differentiate
    `depthwise_conv_grouped` for that.

    Raises:
        ValueError: shapes do not fit together or the output would be empty.
    """
    if x.ndim != 4 or kernel.ndim != 4:
        raise ValueError(
            f"wanted x [B,H,W,C] and kernel [kh,kw,1,C], got {x.shape} and {kernel.shape}"
        )
    if kernel.shape[2] != 1 or kernel.shape[3] != x.shape[3]:
        raise ValueError(
            f"kernel {kernel.shape} does not fit x {x.shape}: wanted [kh,kw,1,{x.shape[3]}]"
        )
    strides = (int(strides[0]), int(strides[1]))
    padding = tuple((int(low), int(high)) for low, high in padding)
    for axis in (0, 1):
        if x.shape[1 + axis] + sum(padding[axis]) < kernel.shape[axis]:
            raise ValueError(
                f"input {x.shape} padded by {padding} is smaller than the kernel {kernel.shape}"
            )
    return _depthwise_conv(x, kernel.astype(x.dtype), strides, padding)


def depthwise_conv_grouped(
    x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding
) -> jax.Array:
    """The same function as XLA's grouped convolution, differentiable in every mode."""
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3],
    )


# The three functions below are linear in each argument and each other's transposes, so that
# gradients of gradients never differentiate through the loops that compute them. Each is jitted,
# so that without `jit` around it, it is compiled once a shape and not once an operation.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
@partial(jax.jit, static_argnums=(2, 3))
def _depthwise_conv(x, kernel, strides, padding):
    return lax.platform_dependent(
        x,
        kernel,
        cpu=partial(_shifted, strides=strides, padding=padding),
        default=partial(depthwise_conv_grouped, strides=strides, padding=padding),
    )


def _depthwise_conv_forward(x, kernel, strides, padding):
    return _depthwise_conv(x, kernel, strides, padding), (x, kernel)


def _depthwise_conv_backward(strides, padding, saved, dy):
    x, kernel = saved
    dx = _input_gradient(dy, kernel, x.shape[1:3], strides, padding)
    dkernel = _kernel_gradient(x, dy, kernel.shape[:2], strides, padding)
    return dx, dkernel


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
@partial(jax.jit, static_argnums=(2, 3, 4))
def _input_gradient(dy, kernel, size, strides, padding):
    """The gradient with respect to x `[B, *size, C]`."""
    return lax.platform_dependent(
        dy,
        kernel,
        cpu=partial(_shifted_transpose, size=size, strides=strides, padding=padding),
        default=partial(_grouped_transpose, size=size, strides=strides, padding=padding),
    )


def _input_gradient_forward(dy, kernel, size, strides, padding):
    return _input_gradient(dy, kernel, size, strides, padding), (dy, kernel)


def _input_gradient_backward(size, strides, padding, saved, ddx):
    dy, kernel = saved
    return (
        _depthwise_conv(ddx, kernel, strides, padding),
        _kernel_gradient(ddx, dy, kernel.shape[:2], strides, padding),
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
@partial(jax.jit, static_argnums=(2, 3, 4))
def _kernel_gradient(x, dy, kernel_size, strides, padding):
    """The gradient with respect to the kernel `[kh, kw, 1, C]`."""
    return lax.platform_dependent(
        x,
        dy,
        cpu=partial(_shifted_products, kernel_size=kernel_size, strides=strides, padding=padding),
        default=partial(
            _grouped_products, kernel_size=kernel_size, strides=strides, padding=padding
        ),
    )


def _kernel_gradient_forward(x, dy, kernel_size, strides, padding):
    return _kernel_gradient(x, dy, kernel_size, strides, padding), (x, dy)


def _kernel_gradient_backward(kernel_size, strides, padding, saved, ddkernel):
    x, dy = saved
    return (
        _input_gradient(dy, ddkernel, x.shape[1:3], strides, padding),
        _depthwise_conv(x, ddkernel, strides, padding),
    )


_depthwise_conv.defvjp(_depthwise_conv_forward, _depthwise_conv_backward)
_input_gradient.defvjp(_input_gradient_forward, _input_gradient_backward)
_kernel_gradient.defvjp(_kernel_gradient_forward, _kernel_gradient_backward)


# Accelerators: XLA's grouped convolution and its transposes.


def _grouped_transpose(dy, kernel, size, strides, padding):
    x = jax.ShapeDtypeStruct((dy.shape[0], *size, dy.shape[3]), dy.dtype)
    (dx,) = jax.linear_transpose(lambda x: depthwise_conv_grouped(x, kernel, strides, padding), x)(
        dy
    )
    return dx


def _grouped_products(x, dy, kernel_size, strides, padding):
    kernel = jax.ShapeDtypeStruct((*kernel_size, 1, x.shape[3]), x.dtype)
    (dkernel,) = jax.linear_transpose(
        lambda kernel: depthwise_conv_grouped(x, kernel, strides, padding), kernel
    )(dy)
    return dkernel


# CPU: shifted multiply-adds on [B, H, W*C].


def unfused(*static: int) -> Callable[[Callable], Callable]:
    """Compile a function apart, so that its arguments and results really are written to memory.

    XLA's CPU pipeline drops optimization barriers before it fuses: without this it computes a whole
    convolution again, element by element, in every normalization and gradient that reads it.
    `static` are the positions of arguments that are not arrays.
    """

    def decorate(function: Callable) -> Callable:
        @partial(jax.jit, static_argnums=static)
        @wraps(function)
        def fused_inside(*arguments):
            with set_xla_metadata(inlineable="true"):
                return function(*arguments)

        @wraps(function)
        def call(*arguments):
            with set_xla_metadata(inlineable="false"):
                return fused_inside(*arguments)

        return call

    return decorate


def _accumulation_dtype(dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def _output_size(size: Pair, kernel_size: Pair, strides: Pair, padding: Padding) -> Pair:
    return tuple(
        (n + low + high - k) // stride + 1
        for n, k, stride, (low, high) in zip(size, kernel_size, strides, padding, strict=True)
    )


def _taps(size: int, outputs: int, kernel: int, stride: int, low: int) -> tuple[int, ...]:
    """The taps of one axis that meet the image at all; on tiny maps the others see only padding."""
    return tuple(
        tap
        for tap in range(kernel)
        if any(0 <= out * stride + tap - low < size for out in range(outputs))
    )


@unfused(1, 2, 3, 4, 5)
def _padded_rows(x, outputs, kernel_size, strides, padding, dtype):
    """Pad exactly as far as windows reach: `[B, rows, columns * C]` (columns with stride 1).

    Padding on the flattened axis is cheaper than on four axes.
    """
    batch, height, width, channels = x.shape
    (top, _), (left, _) = padding
    rows = (outputs[0] - 1) * strides[0] + kernel_size[0]
    columns = outputs[1] - 1 + kernel_size[1]
    return lax.pad(
        x.astype(dtype).reshape(batch, height, width * channels),
        jnp.zeros((), dtype),
        (
            (0, 0, 0),
            (top, rows - height - top, 0),
            (left * channels, (columns - width - left) * channels, 0),
        ),
    )


@unfused(1, 2, 3, 4, 5)
def _padded_image(x, outputs, kernel_size, strides, padding, dtype):
    """Pad exactly as far as windows reach: `[B, rows, columns, C]`, for columns with a stride."""
    reach = [
        (n - 1) * stride + k for n, stride, k in zip(outputs, strides, kernel_size, strict=True)
    ]
    pads = [
        (low, wanted - size - low, 0)
        for wanted, size, (low, _) in zip(reach, x.shape[1:3], padding, strict=True)
    ]
    return lax.pad(x.astype(dtype), jnp.zeros((), dtype), ((0, 0, 0), *pads, (0, 0, 0)))


def _window(padded, tap, outputs, strides):
    """What one tap meets: `[B, H', W', C]` of a padded image."""
    (i, j), (out_h, out_w) = tap, outputs
    last = (i + (out_h - 1) * strides[0] + 1, j + (out_w - 1) * strides[1] + 1)
    return lax.slice(
        padded, (0, i, j, 0), (padded.shape[0], *last, padded.shape[3]), (1, *strides, 1)
    )


@unfused(1, 2)
def _repeated_taps(kernel, width, dtype):
    """Every tap repeated along a row, `[kh, kw, width * C]`."""
    kh, kw, _, channels = kernel.shape
    taps = jnp.broadcast_to(kernel.astype(dtype), (kh, kw, width, channels))
    return taps.reshape(kh, kw, width * channels)


@unfused(2, 3, 4, 5, 6)
def _multiply_add(rows, taps, shape, strides, tap_rows, tap_columns, dtype):
    batch, out_h, out_w, channels = shape
    total = None
    for i in tap_rows:
        for j in tap_columns:
            start = j * channels
            window = lax.slice(
                rows,
                (0, i, start),
                (batch, i + (out_h - 1) * strides[0] + 1, start + out_w * channels),
                (1, strides[0], 1),
            )
            term = window * taps[i, j]
            # The new product first: of two products the first is the one that is fused, and
            # PyTorch's CPU kernels round the first tap and fuse the second.
            total = term if total is None else term + total
    if total is None:
        return jnp.zeros(shape, dtype)
    return total.reshape(shape).astype(dtype)


@unfused(2, 3, 4, 5, 6)
def _strided_multiply_add(padded, kernel, outputs, strides, tap_rows, tap_columns, dtype):
    """One fused loop over the output. Splitting columns into phases first costs 4 to 5 times it."""
    total = jnp.zeros((padded.shape[0], *outputs, padded.shape[3]), padded.dtype)
    for i in tap_rows:
        for j in tap_columns:
            total = _window(padded, (i, j), outputs, strides) * kernel[i, j, 0] + total
    return total.astype(dtype)


def _shifted(x, kernel, strides, padding):
    dtype = _accumulation_dtype(x.dtype)
    batch, height, width, channels = x.shape
    kernel_size = kernel.shape[:2]
    outputs = _output_size((height, width), kernel_size, strides, padding)
    tap_rows = _taps(height, outputs[0], kernel_size[0], strides[0], padding[0][0])
    tap_columns = _taps(width, outputs[1], kernel_size[1], strides[1], padding[1][0])
    how = (outputs, kernel_size, strides, padding, dtype)
    if strides[1] > 1:
        return _strided_multiply_add(
            _padded_image(x, *how),
            kernel.astype(dtype),
            outputs,
            strides,
            tap_rows,
            tap_columns,
            x.dtype,
        )
    return _multiply_add(
        _padded_rows(x, *how),
        _repeated_taps(kernel, outputs[1], dtype),
        (batch, *outputs, channels),
        strides,
        tap_rows,
        tap_columns,
        x.dtype,
    )


def _shifted_transpose(dy, kernel, size, strides, padding):
    kh, kw = kernel.shape[:2]
    (top, _), (left, _) = padding
    out_h, out_w = dy.shape[1:3]
    spread = ((out_h - 1) * strides[0] + 1, (out_w - 1) * strides[1] + 1)
    back = (
        (kh - 1 - top, size[0] + top - spread[0]),
        (kw - 1 - left, size[1] + left - spread[1]),
    )
    return _shifted(_dilated(dy, strides), kernel[::-1, ::-1], (1, 1), back)


@unfused(1)
def _dilated(dy, strides):
    """Zeros between the elements along H and W, `strides - 1` of them."""
    if strides == (1, 1):
        return dy
    gaps = ((0, 0, 0), (0, 0, strides[0] - 1), (0, 0, strides[1] - 1), (0, 0, 0))
    return lax.pad(dy, jnp.zeros((), dy.dtype), gaps)


def _shifted_products(x, dy, kernel_size, strides, padding):
    dtype = _accumulation_dtype(x.dtype)
    _, height, width, channels = x.shape
    out_h, out_w = dy.shape[1:3]
    tap_rows = _taps(height, out_h, kernel_size[0], strides[0], padding[0][0])
    tap_columns = _taps(width, out_w, kernel_size[1], strides[1], padding[1][0])
    if not tap_rows or not tap_columns:
        return jnp.zeros((*kernel_size, 1, channels), x.dtype)
    how = ((out_h, out_w), kernel_size, strides, padding, dtype)
    if strides[1] > 1:
        form, padded = _products_by_image, _padded_image(x, *how)
    else:
        looped = out_h >= _LOOP_ROWS and out_h * out_w * channels >= _LOOP_ELEMENTS
        form = _products_by_loop if looped else _products_by_reduction
        padded = _padded_rows(x, *how)
    return form(padded, dy, kernel_size, strides, tap_rows, tap_columns, dtype).astype(x.dtype)


def _sums(products, axes):
    """All products summed over `axes` in one pass."""
    zero = jnp.zeros((), products[0].dtype)
    return lax.reduce(
        products,
        [zero] * len(products),
        lambda a, b: [u + v for u, v in zip(a, b, strict=True)],
        axes,
    )


def _kernel_of(sums, kernel_size, channels, dtype):
    """`{(i, j): [C]}` -> `[kh, kw, 1, C]`, zeros where a tap met nothing."""
    nothing = jnp.zeros((channels,), dtype)
    taps = [(i, j) for i in range(kernel_size[0]) for j in range(kernel_size[1])]
    return jnp.stack([sums.get(tap, nothing) for tap in taps]).reshape(*kernel_size, 1, channels)


@unfused(2, 3, 4, 5, 6)
def _products_by_image(padded, dy, kernel_size, strides, tap_rows, tap_columns, dtype):
    """One variadic reduction over (H, W) for all taps, then over B: shorter sums round less."""
    outputs, channels = dy.shape[1:3], dy.shape[3]
    dy = dy.astype(dtype)
    taps = [(i, j) for i in tap_rows for j in tap_columns]
    sums = _sums([_window(padded, tap, outputs, strides) * dy for tap in taps], (1, 2))
    sums = dict(zip(taps, (total.sum(0) for total in sums), strict=True))
    return _kernel_of(sums, kernel_size, channels, dtype)


@unfused(2, 3, 4, 5, 6)
def _products_by_reduction(rows, dy, kernel_size, strides, tap_rows, tap_columns, dtype):
    """One variadic reduction over (B, H) for all taps, so that x and dy are read once."""
    batch, out_h, out_w, channels = dy.shape
    dy = dy.astype(dtype).reshape(batch, out_h, out_w * channels)
    taps = [(i, j) for i in tap_rows for j in tap_columns]
    products = [
        lax.slice(
            rows,
            (0, i, j * channels),
            (batch, i + (out_h - 1) * strides[0] + 1, (j + out_w) * channels),
            (1, strides[0], 1),
        )
        * dy
        for i, j in taps
    ]
    sums = [total.reshape(out_w, channels).sum(0) for total in _sums(products, (0, 1))]
    return _kernel_of(dict(zip(taps, sums, strict=True)), kernel_size, channels, dtype)


@unfused(2, 3, 4, 5, 6)
def _products_by_loop(rows, dy, kernel_size, strides, tap_rows, tap_columns, dtype):
    """A loop over blocks of rows; the running sums, `[kh, W*C]` a kernel column, stay in cache.

    The block of the next step is part of the carry: a slice taken and used in the same step would
    be fused into the products, which keeps them from vectorizing.
    """
    del tap_rows, tap_columns  # maps this large meet every tap
    batch, out_h, out_w, channels = dy.shape
    length = out_w * channels
    dy = dy.astype(dtype).reshape(batch, out_h, length)
    kh, kw = kernel_size
    down = strides[0]
    block = next(n for n in range(_ROWS_PER_STEP, 0, -1) if out_h % n == 0)
    blocks = out_h // block
    height = (block - 1) * down + kh

    def load(index):
        image, row = index // blocks, index % blocks * block
        windows = lax.dynamic_slice(rows, (image, row * down, 0), (1, height, rows.shape[2]))[0]
        return windows, lax.dynamic_slice(dy, (image, row, 0), (1, block, length))[0]

    def advance(index, carry):
        sums, (windows, outer) = carry
        sums = list(sums)
        for j in range(kw):
            start = j * channels
            for row in range(block):
                top = row * down
                window = lax.slice(windows, (top, start), (top + kh, start + length))
                sums[j] = sums[j] + window * outer[row]
        return tuple(sums), load(index + 1)

    sums = tuple(jnp.zeros((kh, length), dtype) for _ in range(kw))
    sums, _ = lax.fori_loop(0, batch * blocks, advance, (sums, load(0)))
    columns = [total.reshape(kh, out_w, channels).sum(1) for total in sums]
    return jnp.stack(columns, axis=1).reshape(kh, kw, 1, channels)
