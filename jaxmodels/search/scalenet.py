"""ScaleNet's super-supernet: one network of fixed shapes in which every sub-network is an array.

J. Xie et al., "ScaleNet: Searching for the Model to Scale", ECCV 2022, arXiv 2207.07267; facts of
luminolx/ScaleNet@22487c8 (core/search_space/ops.py, core/model/net.py).

A sub-network uses the first ("left") or last ("right") rows and columns of every weight. Here each
layer's active channels always stand first in a buffer of the widest sub-network, the weights are
moved to them, and what lies behind is masked: op choices, widths, sides and the resolution are
arguments of one compiled function, never Python structure. `sliced=True` is the same code with
whole numbers in the place of arrays: slices of just the size, compiled for one sub-network.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmodels.layers.depthwise import depthwise_conv, depthwise_conv_grouped
from jaxmodels.layers.squeeze_excite import hard_sigmoid
from jaxmodels.search import scalenet_space
from jaxmodels.search.scalenet_space import ChoiceBlock, ChoiceOp, Space

BN_EPSILON = 1e-5
BN_MOMENTUM = 0.1
SIDES = ("left", "right")
WIDTH_ARITHMETIC = ("float64", "float32")


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


def make_subnet(
    space: Space, ops: Sequence[int], width: float, arithmetic: str = "float64"
) -> Subnet:
    """The arrays of an encoding (op indices [genes], width multiplier).

    `arithmetic` of `ceil(c w)`: "float64" as in the search and in exact numbers, "float32" as the
    official training has it, where the multiplier passes through a float tensor and ceil(40 x 1.2)
    is 49.

    Raises ValueError for an index out of range and a width beyond the built one.
    """
    if arithmetic not in WIDTH_ARITHMETIC:
        raise ValueError(f"width arithmetic {arithmetic!r}; known: {', '.join(WIDTH_ARITHMETIC)}")
    space.check_width(width)
    width = float(np.float32(width)) if arithmetic == "float32" else float(width)
    ops = np.asarray(ops, np.int64)
    if len(ops) not in (space.genes, len(space.blocks)):
        raise ValueError(f"a sub-network has {space.genes} op indices, not {len(ops)}")
    rows = []
    for block, op in zip(space.blocks, ops):
        if not 0 <= op < len(block.ops):
            raise ValueError(
                f"{block.stage}[{block.position}]: op index {op} is not in 0..{len(block.ops) - 1}"
            )
        hidden = block.hidden_width(op, width)
        rows.append((op, block.input_width(width), block.output_width(width), hidden))
    return Subnet(*(np.array(column, np.int32) for column in zip(*rows)))


def advance(counters: Any, subnet: Subnet, coupling: int) -> tuple[Any, Any]:
    """`(right, counters)` of one forward pass: which side each block uses, and the counters after.

    Every dynamic layer of the official network counts its calls modulo `coupling` and uses the
    right slices at odd counts; the layers of one op always run together, so a counter stands for
    an op of a block: int32 [L, ops]. Layers that do not run keep their counts.
    """
    rows = jnp.arange(counters.shape[0])
    chosen = counters[rows, subnet.ops]
    after = (chosen + 1) % coupling if coupling else chosen
    return chosen % 2 == 1, counters.at[rows, subnet.ops].set(after)


# Slices of a weight as moves to the front


def _window(x: jax.Array, axis: int, span: _Span) -> jax.Array:
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


def _put_window(x: jax.Array, part: jax.Array, span: _Span) -> jax.Array:
    """`x` [C] with `part` [M] written at the offset; what falls behind the end is dropped."""
    if span.offset is None:
        return part
    behind = 0 if isinstance(span.count, int) else span.most
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, behind, 0)])
    put = lax.dynamic_update_slice(padded, part, (span.offset,), allow_negative_indices=False)
    return put[: x.shape[0]]


class _Span(NamedTuple):
    """The channels of one axis: a buffer of `most`, `count` of them active, from `offset` of the
    weight on; an offset of None is the whole weight."""

    most: int
    count: Any
    offset: Any

    def mask(self) -> Any:
        if isinstance(self.count, int):
            return 1.0
        return (jnp.arange(self.most) < self.count).astype(jnp.float32)


def _span(full: Any, most: int, count: Any, right: Any) -> _Span:
    if isinstance(count, int):
        return _Span(count, count, jnp.where(right, full - count, 0) if full != count else None)
    return _Span(most, count, jnp.where(right, full - count, 0))


def _whole(size: int) -> _Span:
    return _Span(size, size, None)


class _Area(NamedTuple):
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

    def strided(self, stride: int) -> _Area:
        if self.height is None or stride == 1:
            return self
        return _Area((self.height - 1) // stride + 1, (self.width - 1) // stride + 1)


class _Setting(NamedTuple):
    """What every layer needs beside its weights."""

    train: bool
    depthwise: Callable
    one_kernel: bool


def _pointwise(x, kernel, into: _Span, out: _Span):
    """1x1 convolution with the slice of `kernel` [1, 1, I, O] for these spans."""
    w = _window(_window(kernel[0, 0], 0, into), 1, out)
    return x @ w.astype(x.dtype)


def _batch_norm(x, norm, span: _Span, area: _Area, setting: _Setting):
    """`(y, (mean, var))`: normalized x [B, H, W, M], masked, and the whole running statistics."""
    scale, bias, mean, var = (
        _window(norm[k], 0, span) for k in ("scale", "bias", "mean", "var")
    )
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
        statistics = tuple(
            _put_window(
                whole,
                old + (BN_MOMENTUM * keep) * (new - old),
                span,
            )
            for whole, old, new in ((norm["mean"], old_mean, mean), (norm["var"], old_var, unbiased))
        )
    y = (wide - mean) * (lax.rsqrt(var + BN_EPSILON) * scale * keep) + bias * keep
    return y.astype(x.dtype), statistics


def _within(x, area: _Area):
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
                       gene: Subnet, which, right, area: _Area, setting: _Setting):  # fmt: skip
    """The chosen inverted residual of a block: `(y, {norm: new statistics})`."""
    into = _span(block.full_in, x.shape[-1], gene.inputs, right)
    full = np.asarray(found.full_hidden, np.int32)
    full = int(full[which]) if isinstance(which, int) else jnp.asarray(full)[which]
    hidden = _span(full, found.most_hidden, gene.hidden, right)
    out = _span(block.full_out, block.output_width(widest), gene.outputs, right)
    new: dict[str, Any] = {}

    def norm(y, name, span, area):
        y, (mean, var) = _batch_norm(y, layers[name], span, area, setting)
        new[name] = {"mean": mean, "var": var}
        return y

    y = x
    if found.expands:
        y = _pointwise(y, layers["conv1"]["kernel"], into, hidden)
        y = _within(hard_swish(norm(y, "bn1", hidden, area)), area)
    y = _depthwise(y, layers[found.depthwise]["kernel"], block.stride, hidden, which, setting)
    area = area.strided(block.stride)
    y = norm(_within(y, area), "bn1_2" if found.expands else "bn1", hidden, area)
    y = _within(hard_swish(y), area)
    squeezes = [op.squeeze for op in found.ops]
    if any(squeezes):
        squeezed = _span(full // 4, found.most_hidden // 4, gene.hidden // 4, right)
        gated = _squeeze_excite(y, layers, hidden, squeezed, area)
        if isinstance(which, int):
            y = gated if squeezes[which] else y
        else:
            y = gated if all(squeezes) else jnp.where(jnp.asarray(squeezes)[which], gated, y)
    y = _pointwise(y, layers["conv2"]["kernel"], hidden, out)
    y = _within(norm(y, "bn2", out, area), area)
    return (y + x if block.full_in == block.full_out and block.stride == 1 else y), new


def _depthwise(y, kernels, stride: int, span: _Span, which, setting: _Setting):
    """The chosen depthwise convolution; of several kernels one branch runs."""

    def run(kernel):
        def branch(y):
            pad = kernel.shape[0] // 2
            w = _window(kernel, 3, span).astype(y.dtype)
            return setting.depthwise(y, w, (stride, stride), ((pad, pad), (pad, pad)))

        return branch

    if not isinstance(kernels, tuple):
        return run(kernels)(y)
    return lax.switch(which, [run(kernel) for kernel in kernels], y)


def _squeeze_excite(x, layers, span: _Span, squeezed: _Span, area: _Area):
    z = x.sum((1, 2)) / area.pixels(x)
    first, second = layers["se.squeeze_conv"], layers["se.excite_conv"]
    z = _pointwise(z, first["kernel"], span, squeezed)
    z = nn.relu(z + _window(first["bias"], 0, squeezed).astype(z.dtype))
    z = _pointwise(z * jnp.asarray(squeezed.mask(), z.dtype), second["kernel"], squeezed, span)
    z = hard_sigmoid(z + _window(second["bias"], 0, span).astype(z.dtype))
    return x * z[:, None, None, :]


def _projection(x, weights, block, widest, gene, right, area, setting):
    """The identity of a block that strides or changes channels: strided 1x1 convolution and BN."""
    into = _span(block.full_in, x.shape[-1], gene.inputs, right)
    out = _span(block.full_out, block.output_width(widest), gene.outputs, right)
    area = area.strided(block.stride)
    y = _pointwise(x[:, :: block.stride, :: block.stride], weights["conv"]["kernel"], into, out)
    y, (mean, var) = _batch_norm(_within(y, area), weights["bn"], out, area, setting)
    return _within(y, area), {"bn": {"mean": mean, "var": var}}


class _Choice(NamedTuple):
    """A block (or a stack of equal ones) made ready: what one position needs, and how to finish."""

    layers: Any
    which: Any
    run: Callable
    finish: Callable


def _choice(weights, block: ChoiceBlock, widest: float, genes: Subnet, area: _Area,
            setting: _Setting, lead: int) -> _Choice:  # fmt: skip
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

    return _Choice(layers, which, run, finish)


def _known(values) -> list[int]:
    """Plain numbers; ValueError while they are still to be computed."""
    if isinstance(values, jax.core.Tracer):
        raise ValueError("sliced=True needs the sub-network as numbers, not traced")
    return np.asarray(values).tolist()


# Parameters


class _Layer(nn.Module):
    """Parameters of one layer, shapes with any leading stack; returns them as a dict."""

    shapes: tuple[tuple[str, tuple[int, ...], Callable], ...]
    norm: tuple[int, ...] | None = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        found = {
            leaf: self.param(leaf, init, shape, self.param_dtype)
            for leaf, shape, init in self.shapes
        }
        if self.norm is not None:
            wide = jnp.promote_types(jnp.float32, self.param_dtype)
            for leaf, make in (("mean", jnp.zeros), ("var", jnp.ones)):
                found[leaf] = self.variable("batch_stats", leaf, make, self.norm, wide).value
        return found


def _normal_fan_out(key, shape, dtype=jnp.float32):
    """N(0, sqrt(2 / (k k C_out))), C_out the full one for depthwise kernels too."""
    std = math.sqrt(2 / (shape[-4] * shape[-3] * shape[-1]))
    return std * jax.random.normal(key, shape, dtype)


_zeros, _ones = nn.initializers.zeros, nn.initializers.ones


def _layer_shapes(block: ChoiceBlock, op: ChoiceOp, hidden: int) -> dict[str, Any]:
    """`{layer path: shapes of its leaves}` of one op of a block, without stacks."""
    norm_of: Callable[[int], tuple] = lambda c: (("scale", (c,), _ones), ("bias", (c,), _zeros))  # noqa: E731

    def conv(k, i, o, bias=False):
        leaves = [("kernel", (k, k, i, o), _normal_fan_out)]
        return (*leaves, ("bias", (o,), _zeros)) if bias else tuple(leaves)

    if op.kind in ("conv", "identity"):
        kernel = conv(op.kernel, block.full_in, block.full_out)
        return {"conv": kernel, "bn": norm_of(block.full_out)}
    shapes = {}
    if op.expansion == 1:
        shapes |= {"conv1": conv(op.kernel, 1, hidden), "bn1": norm_of(hidden)}
    else:
        shapes |= {"conv1": conv(1, block.full_in, hidden), "bn1": norm_of(hidden)}
        shapes |= {"conv1_2": conv(op.kernel, 1, hidden), "bn1_2": norm_of(hidden)}
    if op.squeeze:
        shapes["se.squeeze_conv"] = conv(1, hidden, hidden // 4, bias=True)
        shapes["se.excite_conv"] = conv(1, hidden // 4, hidden, bias=True)
    return shapes | {"conv2": conv(1, hidden, block.full_out), "bn2": norm_of(block.full_out)}


class SuperSupernet(nn.Module):
    """ScaleNet's super-supernet, images [B, H, W, 3] and a `Subnet` -> logits [B, classes].

    `backbone` and `head` are the official configuration form (`scalenet_space.make_space`), None
    the published one; so are the multipliers. `n_laterally_coupling` 2 slices from both sides, 0
    and 1 from the left only; the weights are the same. `depthwise` is "fast" (chosen by platform)
    or "grouped" (XLA's convolution, smaller kernels in the largest's place: compiles faster, runs
    slower).

    `sliced` computes one sub-network on slices of just its size, as the official code does: the
    sub-network must then be known while tracing, and each is compiled anew.

    Raises ValueError for `n_laterally_coupling` over 2 and for what `make_space` refuses.
    """

    backbone: Any = None
    head: Any = None
    depth_multiplier: Any = scalenet_space.PUBLISHED_MULTIPLIERS
    channel_multiplier: Any = scalenet_space.PUBLISHED_MULTIPLIERS
    resolution_multiplier: Any = scalenet_space.PUBLISHED_RESOLUTIONS
    max_scaling_stage: int = 3
    n_laterally_coupling: int = 2
    depthwise: str = "fast"
    sliced: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.n_laterally_coupling not in (0, 1, 2):
            raise ValueError(
                f"n_laterally_coupling {self.n_laterally_coupling}: only 0, 1 and 2 are defined"
            )
        if self.depthwise not in ("fast", "grouped"):
            raise ValueError(f"depthwise {self.depthwise!r}; known: fast, grouped")
        super().__post_init__()

    @property
    def space(self) -> Space:
        """The search space of this configuration."""
        return scalenet_space.make_space(
            self.backbone,
            self.head,
            self.depth_multiplier,
            self.channel_multiplier,
            self.resolution_multiplier,
            self.max_scaling_stage,
        )

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, 64, 64, 3]."""
        return (jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32),)

    def counters(self) -> jax.Array:
        """Call counters of a fresh network, int32 [L, ops]; see `advance`."""
        blocks = self.space.blocks
        return jnp.zeros((len(blocks), max(len(b.ops) for b in blocks)), jnp.int32)

    def default_subnet(self) -> Subnet:
        """The deepest sub-network at width 1 with the last op everywhere."""
        space = self.space
        return make_subnet(space, [len(b.ops) - 1 for b in space.blocks], 1.0)

    def __call__(
        self,
        x: jax.Array,
        subnet: Subnet | None = None,
        right: Any = False,
        train: bool = False,
        size: tuple[Any, Any] | None = None,
    ) -> jax.Array:
        """Logits [B, classes].

        Args:
          x: images, zero outside `size` where that is given.
          subnet: `make_subnet`'s arrays; None is `default_subnet`.
          right: bool [] or [L], whether a block takes the last rows and columns (`advance`).
          train: batch statistics; running ones move where `batch_stats` is mutable.
          size: `(height, width)` of the image within x, arrays: one compiled function then serves
            every resolution, as if x had been cut to that size.
        """
        return self.intermediates(x, subnet, right, train, size)["logits"]

    @nn.compact
    def intermediates(
        self,
        x: jax.Array,
        subnet: Subnet | None = None,
        right: Any = False,
        train: bool = False,
        size: tuple[Any, Any] | None = None,
    ) -> dict[str, jax.Array]:
        """`block_I` for the first block of each stage, `pool` [B, C], `logits`; widths are padded."""
        space = self.space
        subnet = self.default_subnet() if subnet is None else subnet
        blocks = space.blocks
        if self.sliced:
            subnet = Subnet(*(_known(a) for a in subnet))
            right = jnp.broadcast_to(jnp.asarray(right, bool), (len(blocks),))
        else:
            subnet = Subnet(*(jnp.asarray(a, jnp.int32) for a in subnet))
            right = jnp.broadcast_to(jnp.asarray(right, bool), (len(blocks),))
        form = depthwise_conv if self.depthwise == "fast" else depthwise_conv_grouped
        setting = _Setting(train, form, self.depthwise == "grouped")
        area = _Area() if size is None else _Area(*size)
        x = jnp.asarray(x, self.dtype)
        maps: dict[str, jax.Array] = {}
        start = 0
        while start < len(blocks):
            stop = start + 1
            while stop < len(blocks) and blocks[stop].stage == blocks[start].stage:
                stop += 1
            genes = Subnet(*(a[start:stop] for a in subnet))
            entry, x, area = self._stage(
                x, blocks[start:stop], space.max_width, genes, right[start:stop], area, setting
            )
            maps[f"block_{start}"] = entry
            start = stop
        x = x.sum((1, 2)) / area.pixels(x)
        maps["pool"] = x
        for name, dim_in, dim_out in space.linear:
            shapes = (
                ("kernel", (dim_in, dim_out), nn.initializers.normal(0.01)),
                ("bias", (dim_out,), _zeros),
            )
            layer = _Layer(shapes, param_dtype=self.param_dtype, name=f"net.head_{name}.0.module.0")()
            x = x @ layer["kernel"].astype(x.dtype) + layer["bias"].astype(x.dtype)
        maps["logits"] = x
        return maps

    def _stage(self, x, blocks, widest, genes, right, area, setting):
        first, rest = blocks[0], blocks[1:]
        prefix = f"net.backbone_{first.stage}"
        weights, norms = self._weights(f"{prefix}_0", first, ())
        gene = Subnet(*(a[0] for a in genes))
        if first.ops[0].kind == "conv":
            if rest:
                raise ValueError(f"{first.stage}: a stage of plain convolutions has one block")
            x, new = self._plain(x, weights["0"], first, widest, gene, right[0], area, setting)
            new = {"0": new}
        else:
            block = _choice(weights, first, widest, gene, area, setting, 0)
            x, new = block.run(x, block.layers, gene, block.which, right[0])
            new = block.finish(new)
        self._track(norms, new)
        entry, area = x, area.strided(first.stride)
        if not rest:
            return entry, x, area
        weights, norms = self._weights(f"{prefix}.rest.*", rest[0], (len(rest),))
        if self.sliced:
            stacked = []
            for i in range(len(rest)):
                one = jax.tree.map(lambda a, i=i: a[i], weights)
                gene = Subnet(*(a[1 + i] for a in genes))
                block = _choice(one, rest[0], widest, gene, area, setting, 0)
                x, new = block.run(x, block.layers, gene, block.which, right[1 + i])
                stacked.append(block.finish(new))
            self._track(norms, jax.tree.map(lambda *a: jnp.stack(a), *stacked))
            return entry, x, area
        tail = Subnet(*(a[1:] for a in genes))
        block = _choice(weights, rest[0], widest, tail, area, setting, 1)
        stack = (block.layers, tail, block.which, right[1:])
        x, new = lax.scan(lambda x, one: block.run(x, *one), x, stack)
        self._track(norms, block.finish(new))
        return entry, x, area

    def _weights(self, prefix, block, lead):
        """`({op: {layer: leaves}}, {(op, layer): module})` of a block, or a stack of equal ones."""
        weights: dict[str, Any] = {}
        norms = {}
        for i, op in enumerate(block.ops):
            if op.kind == "identity" and not block.projects(i):
                continue
            hidden = block.full_hidden(i)
            layers: dict[str, Any] = {}
            for name, shapes in _layer_shapes(block, op, hidden).items():
                shapes = tuple((leaf, (*lead, *shape), init) for leaf, shape, init in shapes)
                is_norm = shapes[0][0] == "scale"
                module = _Layer(
                    shapes,
                    norm=shapes[0][1] if is_norm else None,
                    param_dtype=self.param_dtype,
                    name=f"{prefix}.{i}.{name}",
                )
                layers[name] = module()
                if is_norm:
                    norms[str(i), name] = module
            weights[str(i)] = layers
        return weights, norms

    def _track(self, norms, new) -> None:
        if not self.is_mutable_collection("batch_stats") or self.is_initializing():
            return
        for (op, name), module in norms.items():
            for leaf, value in new.get(op, {}).get(name, {}).items():
                module.put_variable("batch_stats", leaf, value)

    def _plain(self, x, layers, block, widest, gene, right, area, setting):
        """Stem and last convolution: conv, BN, hard swish; their fixed ends are whole."""
        op, stride = block.ops[0], block.stride
        into = _span(block.full_in, x.shape[-1], gene.inputs, right)
        out = _span(block.full_out, block.output_width(widest), gene.outputs, right)
        into = into if block.scaled_in else _whole(block.full_in)
        out = out if block.scaled_out else _whole(block.full_out)
        kernel = _window(_window(layers["conv"]["kernel"], 2, into), 3, out).astype(x.dtype)
        pad = op.kernel // 2
        if op.kernel == 1 and stride == 1:
            y = x @ kernel[0, 0]
        else:
            y = lax.conv_general_dilated(
                *(x, kernel, (stride, stride), ((pad, pad), (pad, pad))),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        area = area.strided(stride)
        y, (mean, var) = _batch_norm(_within(y, area), layers["bn"], out, area, setting)
        return _within(hard_swish(y), area), {"bn": {"mean": mean, "var": var}}


MODEL = SuperSupernet


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """Blocks 1, 2, ... of a stage are one stack here and have numbers of their own in files."""
    names = []
    for block in module.space.blocks:
        if block.position:
            ours = f"net.backbone_{block.stage}.rest.{block.position - 1}."
            names.append((ours, f"net.backbone_{block.stage}_{block.position}."))
    return {"names": names}


VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    # Reduced spaces of the specification, for digits of 16 to 28 pixels.
    "digits": {
        "backbone": scalenet_space.backbone((8, 4, 8, 8, 12, 12, 16, 20), expansion=2, out=32),
        "head": {"linear1": {"dim_in": 32, "dim_out": 10}},
        "resolution_multiplier": ((16,), (16, 17, 18), (19, 20, 21), (23, 24, 25)),
    },
}
