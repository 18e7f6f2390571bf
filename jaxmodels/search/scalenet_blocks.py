"""The layers of ScaleNet's super-supernet on slices that are arrays, or numbers.

A span is the part of an axis that a sub-network uses. Where its count is an array, the active
channels are moved to the front of a buffer of the widest sub-network and what lies behind them is
masked; where it is a number, the slice has just its size. Facts of luminolx/ScaleNet@22487c8
(core/search_space/ops.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmodels.layers.squeeze_excite import hard_sigmoid
from jaxmodels.search.choice_blocks import ChoiceBlock, ChoiceOp

BN_EPSILON = 1e-5
BN_MOMENTUM = 0.1


def hard_swish(x: jax.Array) -> jax.Array:
    """x relu6(x + 3) / 6."""
    return x * hard_sigmoid(x)


class Subnet(NamedTuple):
    """A sub-network as arrays; a leading axis makes it a batch of them.

    Attributes:
      ops: op index of every backbone block, int32 [L].
      inputs: channels that enter a block, int32 [L]. outputs: channels that leave it, int32 [L].
      hidden: hidden channels of the chosen op, int32 [L].
    """

    ops: Any
    inputs: Any
    outputs: Any
    hidden: Any


# Slices of a weight as moves to the front


def window(x: jax.Array, axis: int, span: Span) -> jax.Array:
    """The buffer of an axis of full width: `most` entries from `offset`, zeros behind the end."""
    if span.offset is None:
        return x
    if not isinstance(span.count, int):
        pads = [(0, 0, 0)] * x.ndim
        pads[axis] = (0, span.most, 0)
        x = lax.pad(x, jnp.zeros((), x.dtype), pads)
    start = [0] * x.ndim
    start[axis] = span.offset
    shape = [span.most if i == axis else n for i, n in enumerate(x.shape)]
    return lax.dynamic_slice(x, start, shape, allow_negative_indices=False)


def _put_window(x: jax.Array, part: jax.Array, span: Span) -> jax.Array:
    """`x` [C] with `part` [M] written at the offset; what falls behind the end is dropped."""
    if span.offset is None:
        return part
    behind = 0 if isinstance(span.count, int) else span.most
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, behind, 0)])
    put = lax.dynamic_update_slice(padded, part, (span.offset,), allow_negative_indices=False)
    return put[: x.shape[0]]


class Span(NamedTuple):
    """The channels of one axis: a buffer of `most`, `count` of them active, from `offset` of the
    weight on; an offset of None is the whole weight."""

    most: int
    count: Any
    offset: Any

    def mask(self) -> Any:
        if isinstance(self.count, int):
            return 1.0
        return (jnp.arange(self.most) < self.count).astype(jnp.float32)


def span_of(full: Any, most: int, count: Any, right: Any) -> Span:
    if isinstance(count, int):
        return Span(count, count, jnp.where(right, full - count, 0) if full != count else None)
    return Span(most, count, jnp.where(right, full - count, 0))


def whole(size: int) -> Span:
    return Span(size, size, None)


class Area(NamedTuple):
    """The part of a map that belongs to the image, `height` x `width`; None: all of it."""

    height: Any = None
    width: Any = None

    def mask(self, x: jax.Array) -> Any:
        """[1, H, W, 1] or None when the whole map is image."""
        if self.height is None:
            return None
        rows = jnp.arange(x.shape[1])[:, None] < self.height
        return (rows & (jnp.arange(x.shape[2])[None, :] < self.width))[None, :, :, None]

    def pixels(self, x: jax.Array) -> Any:
        return x.shape[1] * x.shape[2] if self.height is None else self.height * self.width

    def strided(self, stride: int) -> Area:
        if self.height is None or stride == 1:
            return self
        return Area((self.height - 1) // stride + 1, (self.width - 1) // stride + 1)


class Setting(NamedTuple):
    """What every layer needs beside its weights."""

    train: bool
    depthwise: Callable
    one_kernel: bool


def pointwise(x, kernel, into: Span, out: Span):
    """1x1 convolution with the slice of `kernel` [1, 1, I, O] for these spans."""
    w = window(window(kernel[0, 0], 0, into), 1, out)
    return x @ w.astype(x.dtype)


def batch_norm(x, norm, span: Span, area: Area, setting: Setting):
    """`(y, (mean, var))`: normalized x [B, H, W, M], masked, and the whole running statistics."""
    scale, bias, mean, var = (window(norm[k], 0, span) for k in ("scale", "bias", "mean", "var"))
    keep = span.mask()
    wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    statistics = norm["mean"], norm["var"]
    if setting.train:
        count = x.shape[0] * area.pixels(x)
        old_mean, old_var = mean, var
        mean = wide.sum((0, 1, 2)) / count
        centered = wide - mean
        here = area.mask(x)
        if here is not None:
            centered = jnp.where(here, centered, 0)
        var = jnp.square(centered).sum((0, 1, 2)) / count
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        moves = ((norm["mean"], old_mean, mean), (norm["var"], old_var, unbiased))
        statistics = tuple(
            _put_window(whole, old + (BN_MOMENTUM * keep) * (new - old), span)
            for whole, old, new in moves
        )
    y = (wide - mean) * (lax.rsqrt(var + BN_EPSILON) * scale * keep) + bias * keep
    return y.astype(x.dtype), statistics


def within(x, area: Area):
    here = area.mask(x)
    return x if here is None else jnp.where(here, x, 0)


# Blocks


class _Residuals(NamedTuple):
    """The residual ops of a block: their numbers among its ops, the ops, their widths."""

    numbers: tuple[int, ...]
    ops: tuple[ChoiceOp, ...]
    full_hidden: tuple[int, ...]
    most_hidden: int

    @property
    def expands(self) -> bool:
        return self.ops[0].expansion != 1

    @property
    def depthwise(self) -> str:
        """The depthwise convolution's name in the checkpoint."""
        return "conv1_2" if self.expands else "conv1"


def _residuals(block: ChoiceBlock, widest: float) -> _Residuals:
    numbers = tuple(i for i, op in enumerate(block.ops) if op.kind == "residual")
    return _Residuals(
        numbers,
        tuple(block.ops[i] for i in numbers),
        tuple(block.full_hidden(i) for i in numbers),
        max(block.hidden_width(i, widest) for i in numbers),
    )


def _picked(which, arrays: Sequence[jax.Array], lead: int) -> jax.Array:
    """`arrays[which]`, shapes padded to a common one; `which` has the `lead` leading axes."""
    if isinstance(which, int):
        return arrays[which]
    shape = np.max([a.shape for a in arrays], axis=0)
    arrays = [jnp.pad(a, [(0, int(n) - m) for m, n in zip(a.shape, shape)]) for a in arrays]
    if len(arrays) == 1:
        return arrays[0]
    which = which.reshape(which.shape + (1,) * (len(shape) - lead))
    return lax.select_n(jnp.broadcast_to(which, shape), *arrays)


def _centered(kernel: jax.Array, size: int) -> jax.Array:
    """A kernel [..., k, k, 1, C] with zeros around it up to `size`: the same convolution."""
    margin = (size - kernel.shape[-4]) // 2
    return jnp.pad(kernel, [(0, 0)] * (kernel.ndim - 4) + [(margin, margin)] * 2 + [(0, 0)] * 2)


def _chosen(weights, found: _Residuals, which, lead: int, one_kernel: bool) -> dict[str, Any]:
    """Layers of the chosen op, with `lead` leading axes (a stack of blocks or none).

    The kernels of the depthwise convolution stay a tuple unless `one_kernel`.
    """
    parts = [weights[str(i)] for i in found.numbers]
    layers: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        # An op without squeeze-and-excitation is told apart later; its gate is any other's.
        owners = [part.get(name) or next(p[name] for p in parts if name in p) for part in parts]
        leaves: dict[str, Any] = {}
        for leaf in owners[0]:
            arrays = [owner[leaf] for owner in owners]
            if name == found.depthwise and leaf == "kernel":
                arrays = [jnp.asarray(a) for a in arrays]
                if not one_kernel and not isinstance(which, int):
                    leaves[leaf] = tuple(arrays)
                    continue
                if not isinstance(which, int):
                    most = max(a.shape[lead] for a in arrays)
                    arrays = [_centered(a, most) for a in arrays]
            leaves[leaf] = _picked(which, arrays, lead)
        layers[name] = leaves
    return layers


def _spread(weights, found: _Residuals, which, new) -> dict[str, Any]:
    """Running statistics of every op: the chosen one's are `new`, the others stay."""
    out: dict[str, Any] = {}
    for k, number in enumerate(found.numbers):
        for name, statistics in new.items():
            old = weights[str(number)][name]
            for leaf, value in statistics.items():
                if isinstance(which, int):
                    kept = value if which == k else old[leaf]
                else:
                    hit = (which == k).reshape((*which.shape, 1))
                    kept = jnp.where(hit, value[..., : old[leaf].shape[-1]], old[leaf])
                out.setdefault(str(number), {}).setdefault(name, {})[leaf] = kept
    return out


def _inverted_residual(x, layers, block: ChoiceBlock, found: _Residuals, widest: float,
                       gene: Subnet, which, right, area: Area, setting: Setting):  # fmt: skip
    """The chosen inverted residual of a block: `(y, {norm: new statistics})`."""
    into = span_of(block.full_in, x.shape[-1], gene.inputs, right)
    full = np.asarray(found.full_hidden, np.int32)
    full = int(full[which]) if isinstance(which, int) else jnp.asarray(full)[which]
    hidden = span_of(full, found.most_hidden, gene.hidden, right)
    out = span_of(block.full_out, block.output_width(widest), gene.outputs, right)
    new: dict[str, Any] = {}

    def norm(y, name, span, area):
        y, (mean, var) = batch_norm(y, layers[name], span, area, setting)
        new[name] = {"mean": mean, "var": var}
        return y

    y = x
    if found.expands:
        y = pointwise(y, layers["conv1"]["kernel"], into, hidden)
        y = within(hard_swish(norm(y, "bn1", hidden, area)), area)
    y = _depthwise(y, layers[found.depthwise]["kernel"], block.stride, hidden, which, setting)
    area = area.strided(block.stride)
    y = norm(within(y, area), "bn1_2" if found.expands else "bn1", hidden, area)
    y = within(hard_swish(y), area)
    squeezes = [op.squeeze for op in found.ops]
    if any(squeezes):
        squeezed = span_of(full // 4, found.most_hidden // 4, gene.hidden // 4, right)
        gated = _squeeze_excite(y, layers, hidden, squeezed, area)
        if isinstance(which, int):
            y = gated if squeezes[which] else y
        else:
            y = gated if all(squeezes) else jnp.where(jnp.asarray(squeezes)[which], gated, y)
    y = pointwise(y, layers["conv2"]["kernel"], hidden, out)
    y = within(norm(y, "bn2", out, area), area)
    return (y + x if block.full_in == block.full_out and block.stride == 1 else y), new


def _depthwise(y, kernels, stride: int, span: Span, which, setting: Setting):
    """The chosen depthwise convolution; of several kernels one branch runs."""

    def run(kernel):
        def branch(y):
            pad = kernel.shape[0] // 2
            w = window(kernel, 3, span).astype(y.dtype)
            return setting.depthwise(y, w, (stride, stride), ((pad, pad), (pad, pad)))

        return branch

    if not isinstance(kernels, tuple):
        return run(kernels)(y)
    return lax.switch(which, [run(kernel) for kernel in kernels], y)


def _squeeze_excite(x, layers, span: Span, squeezed: Span, area: Area):
    z = x.sum((1, 2)) / area.pixels(x)
    first, second = layers["se.squeeze_conv"], layers["se.excite_conv"]
    z = pointwise(z, first["kernel"], span, squeezed)
    z = nn.relu(z + window(first["bias"], 0, squeezed).astype(z.dtype))
    z = pointwise(z * jnp.asarray(squeezed.mask(), z.dtype), second["kernel"], squeezed, span)
    z = hard_sigmoid(z + window(second["bias"], 0, span).astype(z.dtype))
    return x * z[:, None, None, :]


def _projection(x, weights, block, widest, gene, right, area, setting):
    """The identity of a block that strides or changes channels: strided 1x1 convolution and BN."""
    into = span_of(block.full_in, x.shape[-1], gene.inputs, right)
    out = span_of(block.full_out, block.output_width(widest), gene.outputs, right)
    area = area.strided(block.stride)
    y = pointwise(x[:, :: block.stride, :: block.stride], weights["conv"]["kernel"], into, out)
    y, (mean, var) = batch_norm(within(y, area), weights["bn"], out, area, setting)
    return within(y, area), {"bn": {"mean": mean, "var": var}}


class Choice(NamedTuple):
    """A block (or a stack of equal ones) made ready: what one position needs, and how to finish."""

    layers: Any
    which: Any
    run: Callable
    finish: Callable


def choice(weights, block: ChoiceBlock, widest: float, genes: Subnet, area: Area,
            setting: Setting, lead: int) -> Choice:  # fmt: skip
    """Blocks whose ops are residuals and perhaps an identity.

    `run(x, layers, gene, which, right) -> (y, new)` is one position; `finish(new)` spreads its
    statistics over the ops. The choice is made for a whole stack at once, before any loop.
    """
    found = _residuals(block, widest)
    identities = tuple(i for i, op in enumerate(block.ops) if op.kind == "identity")
    table = np.clip(np.searchsorted(found.numbers, np.arange(len(block.ops))), 0,
                    len(found.numbers) - 1)  # fmt: skip
    sliced = isinstance(genes.ops, int)
    which = int(table[genes.ops]) if sliced else jnp.asarray(table, jnp.int32)[genes.ops]
    layers = {"chosen": _chosen(weights, found, which, lead, setting.one_kernel)}
    projected = [i for i in identities if block.projects(i)]
    if projected:
        layers["identity"] = weights[str(projected[0])]

    def statistics(names):
        return {
            name: {"mean": layer["mean"], "var": layer["var"]}
            for name, layer in names.items()
            if "mean" in layer
        }

    def run(x, layers, gene, which, right):
        def residual(x):
            y, new = _inverted_residual(
                x, layers["chosen"], block, found, widest, gene, which, right, area, setting
            )
            kept = statistics(layers["identity"]) if projected else {}
            return y, {"chosen": new, "identity": kept} if setting.train else {}

        def identity(x):
            kept = {"chosen": statistics(layers["chosen"]), "identity": {}}
            if projected:
                x, kept["identity"] = _projection(
                    x, layers["identity"], block, widest, gene, right, area, setting
                )
            return x, kept if setting.train else {}

        if not identities:
            return residual(x)
        if sliced:
            return identity(x) if gene.ops in identities else residual(x)
        skipped = functools.reduce(jnp.logical_or, [gene.ops == i for i in identities])
        return lax.cond(skipped, identity, residual, x)

    def finish(new):
        if not new:
            return {}
        spread = _spread(weights, found, which, new["chosen"])
        if projected:
            spread[str(projected[0])] = new["identity"]
        return spread

    return Choice(layers, which, run, finish)
