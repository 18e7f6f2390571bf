"""ScaleNet's super-supernet: one network of fixed shapes in which every sub-network is an array.

J. Xie et al., "ScaleNet: Searching for the Model to Scale", ECCV 2022, arXiv 2207.07267; facts of
luminolx/ScaleNet@22487c8 (core/search_space/ops.py, core/model/net.py).

A sub-network uses the first ("left") or last ("right") rows and columns of every weight. Here each
layer's active channels always stand first in a buffer of the widest sub-network, the weights are
moved to them, and what lies behind is masked: op choices, widths, sides and the resolution are
arguments of one compiled function, never Python structure.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
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


def _window(x: jax.Array, axis: int, offset: Any, size: int) -> jax.Array:
    """`size` entries of an axis from `offset` on, zeros behind the end."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, size)
    return lax.dynamic_slice_in_dim(jnp.pad(x, pads), offset, size, axis)


def _put_window(x: jax.Array, part: jax.Array, offset: Any) -> jax.Array:
    """`x` [C] with `part` [M] written at `offset`; what falls behind the end is dropped."""
    padded = jnp.pad(x, (0, part.shape[0]))
    return lax.dynamic_update_slice(padded, part, (offset,))[: x.shape[0]]


class _Span(NamedTuple):
    """The channels of one axis: full weight `full`, buffer `most`, `count` active from `offset`."""

    full: int
    most: int
    count: Any
    offset: Any

    def mask(self) -> jax.Array:
        return (jnp.arange(self.most) < self.count).astype(jnp.float32)


def _span(full: Any, most: int, count: Any, right: Any) -> _Span:
    return _Span(full, most, count, jnp.where(right, full - count, 0))


def _whole(size: int) -> _Span:
    return _Span(size, size, size, 0)


class _Area(NamedTuple):
    """The part of a map that belongs to the image: `height`, `width` of a larger canvas, or None."""

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
    dtype: Any
    depthwise: Callable


def _pointwise(x, kernel, into: _Span, out: _Span):
    """1x1 convolution with the slice of `kernel` [1, 1, I, O] for these spans."""
    w = kernel[0, 0]
    w = _window(_window(w, 0, into.offset, into.most), 1, out.offset, out.most)
    return x @ w.astype(x.dtype)


def _batch_norm(x, norm, span: _Span, area: _Area, setting: _Setting):
    """`(y, (mean, var))`: normalized x [B, H, W, M], masked, and the whole running statistics."""
    scale, bias, mean, var = (
        _window(norm[k], 0, span.offset, span.most) for k in ("scale", "bias", "mean", "var")
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
                jnp.where(keep > 0, (1 - BN_MOMENTUM) * old + BN_MOMENTUM * new, old),
                span.offset,
            )
            for whole, old, new in ((norm["mean"], old_mean, mean), (norm["var"], old_var, unbiased))
        )
    y = (wide - mean) * (lax.rsqrt(var + BN_EPSILON) * scale * keep) + bias * keep
    return y.astype(x.dtype), statistics


def _within(x, area: _Area):
    here = area.mask(x)
    return x if here is None else jnp.where(here, x, 0)


def _squeeze_excite(x, weights, span: _Span, right, full_squeezed, most: int, area: _Area):
    squeezed = _span(full_squeezed, most, span.count // 4, right)
    z = x.sum((1, 2)) / area.pixels(x)
    names = (("squeeze_conv", span, squeezed), ("excite_conv", squeezed, span))
    for i, (name, into, out) in enumerate(names):
        part = weights[name]
        z = _pointwise(z, part["kernel"], into, out)
        z = z + _window(part["bias"], 0, out.offset, out.most).astype(z.dtype)
        z = nn.relu(z) * out.mask().astype(z.dtype) if i == 0 else hard_sigmoid(z)
    return x * z[:, None, None, :]


# Blocks


def _padded(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Arrays of one rank, zero-padded at their ends to a common shape."""
    shape = np.max([a.shape for a in arrays], axis=0)
    return [jnp.pad(a, [(0, int(n) - m) for m, n in zip(a.shape, shape)]) for a in arrays]


def _picked(which, arrays: Sequence[jax.Array]) -> jax.Array:
    if len(arrays) == 1:
        return arrays[0]
    return lax.select_n(which, *_padded(arrays))


class _Residuals(NamedTuple):
    """The residual ops of a block, in gene order: their numbers among the ops, and the ops."""

    numbers: tuple[int, ...]
    ops: tuple[ChoiceOp, ...]

    @property
    def depthwise_name(self) -> str:
        return "conv1" if self.ops[0].expansion == 1 else "conv1_2"


def _residuals(block: ChoiceBlock) -> _Residuals:
    numbers = tuple(i for i, op in enumerate(block.ops) if op.kind == "residual")
    return _Residuals(numbers, tuple(block.ops[i] for i in numbers))


def _inverted_residual(x, weights, block: ChoiceBlock, space: Space, gene: Subnet, right, area,
                       setting: _Setting):  # fmt: skip
    """The chosen inverted residual of a block, `(y, area, new statistics by op)`."""
    found = _residuals(block)
    numbers, ops = found.numbers, found.ops
    which = jnp.asarray(np.searchsorted(numbers, np.arange(len(block.ops)))).astype(jnp.int32)[
        gene.ops
    ]
    which = jnp.clip(which, 0, len(numbers) - 1)
    widest = space.max_width
    full_hidden = np.array([block.full_hidden(i) for i in numbers])
    most_hidden = max(block.hidden_width(i, widest) for i in numbers)
    into = _span(block.full_in, x.shape[-1], gene.inputs, right)
    hidden = _span(jnp.asarray(full_hidden)[which], most_hidden, gene.hidden, right)
    out = _span(block.full_out, block.output_width(widest), gene.outputs, right)
    new: list[dict[str, Any]] = [{} for _ in numbers]

    def layer(name):
        parts = [weights[str(i)][name] for i in numbers]
        return {leaf: _picked(which, [p[leaf] for p in parts]) for leaf in parts[0]}

    def norm(y, name, span, area):
        y, (mean, var) = _batch_norm(y, layer(name), span, area, setting)
        if setting.train:
            for k, i in enumerate(numbers):
                old = weights[str(i)][name]
                new[k][name] = {
                    "mean": jnp.where(which == k, mean[: old["mean"].shape[0]], old["mean"]),
                    "var": jnp.where(which == k, var[: old["var"].shape[0]], old["var"]),
                }
        return y

    y = x
    if ops[0].expansion != 1:
        y = _pointwise(y, layer("conv1")["kernel"], into, hidden)
        y = _within(hard_swish(norm(y, "bn1", hidden, area)), area)

    def depthwise(k):
        kernel = weights[str(numbers[k])][found.depthwise_name]["kernel"]
        size, stride = kernel.shape[0], block.stride
        padding = ((size // 2, size // 2), (size // 2, size // 2))

        def run(y):
            w = _window(kernel, 3, hidden.offset, hidden.most).astype(y.dtype)
            return setting.depthwise(y, w, (stride, stride), padding)

        return run

    # One branch runs: the three kernels' convolutions have no weights in common.
    y = lax.switch(which, [depthwise(k) for k in range(len(numbers))], y)
    area = area.strided(block.stride)
    y = norm(_within(y, area), "bn1" if ops[0].expansion == 1 else "bn1_2", hidden, area)
    y = _within(hard_swish(y), area)
    squeezes = [op.squeeze for op in ops]
    if any(squeezes):
        full_squeezed = jnp.asarray(full_hidden // 4)[which]
        with_se = [k for k, s in enumerate(squeezes) if s]
        parts = [weights[str(numbers[k])]["se"] for k in with_se]
        place = jnp.asarray([with_se.index(k) if k in with_se else 0 for k in range(len(ops))])
        chosen = {
            conv: {
                leaf: _picked(place[which], [p[conv][leaf] for p in parts]) for leaf in parts[0][conv]
            }
            for conv in parts[0]
        }
        gated = _squeeze_excite(y, chosen, hidden, right, full_squeezed, most_hidden // 4, area)
        y = gated if all(squeezes) else jnp.where(jnp.asarray(squeezes)[which], gated, y)
    y = _pointwise(y, layer("conv2")["kernel"], hidden, out)
    y = _within(norm(y, "bn2", out, area), area)
    if block.full_in == block.full_out and block.stride == 1:
        y = y + x
    return y, area, {str(i): part for i, part in zip(numbers, new)}


def _projection(x, weights, block, space, gene, right, area, setting):
    """The identity of a block that strides or changes channels: strided 1x1 convolution and BN."""
    into = _span(block.full_in, x.shape[-1], gene.inputs, right)
    out = _span(block.full_out, block.output_width(space.max_width), gene.outputs, right)
    area = area.strided(block.stride)
    y = _pointwise(x[:, :: block.stride, :: block.stride], weights["conv"]["kernel"], into, out)
    y, (mean, var) = _batch_norm(_within(y, area), weights["bn"], out, area, setting)
    return _within(y, area), {"bn": {"mean": mean, "var": var}} if setting.train else {}


def _choice_block(x, weights, block, space, gene, right, area, setting):
    """Any block with residual ops: `(y, area, statistics like the weights' own)`."""
    identities = [i for i, op in enumerate(block.ops) if op.kind == "identity"]
    own = _statistics(weights) if setting.train else {}
    after = area.strided(block.stride)

    def residual(x):
        y, _, new = _inverted_residual(x, weights, block, space, gene, right, area, setting)
        return y, {**own, **new} if setting.train else {}

    def identity(x):
        number = identities[0]
        if not block.projects(number):
            return x, own
        name = str(number)
        y, new = _projection(x, weights[name], block, space, gene, right, area, setting)
        return y, {**own, name: new} if setting.train else {}

    if not identities:
        y, new = residual(x)
    else:
        skipped = functools.reduce(lambda a, b: a | b, [gene.ops == i for i in identities])
        y, new = lax.cond(skipped, identity, residual, x)
    return y, after, new


def _statistics(weights: Mapping[str, Any]) -> dict[str, Any]:
    """`{op: {norm: {mean, var}}}` of a block's weights."""
    return {
        op: {
            name: {"mean": leaf["mean"], "var": leaf["var"]}
            for name, leaf in layers.items()
            if "mean" in leaf
        }
        for op, layers in weights.items()
    }


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


def _layer_shapes(block: ChoiceBlock, op: ChoiceOp, hidden: int, bias_free=True) -> dict[str, Any]:
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
    or "grouped" (XLA's convolution: compiles faster, runs slower on a CPU).

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
        subnet = Subnet(*(jnp.asarray(a, jnp.int32) for a in subnet))
        blocks = space.blocks
        right = jnp.broadcast_to(jnp.asarray(right, bool), (len(blocks),))
        form = depthwise_conv if self.depthwise == "fast" else depthwise_conv_grouped
        setting = _Setting(train, self.dtype, form)
        area = _Area() if size is None else _Area(*size)
        x = jnp.asarray(x, self.dtype)
        maps: dict[str, jax.Array] = {}
        start = 0
        while start < len(blocks):
            stop = start + 1
            while stop < len(blocks) and blocks[stop].stage == blocks[start].stage:
                stop += 1
            genes = Subnet(*(a[start:stop] for a in subnet))
            x, area = self._stage(x, blocks[start:stop], space, genes, right[start:stop], area,
                                  setting, maps, start)  # fmt: skip
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

    def _stage(self, x, blocks, space, genes, right, area, setting, maps, start):
        first, rest = blocks[0], blocks[1:]
        stage = first.stage
        gene = Subnet(*(a[0] for a in genes))
        weights, norms = self._weights(f"net.backbone_{stage}_0", first, space, None)
        if first.ops[0].kind == "conv":
            if rest:
                raise ValueError(f"{stage}: a stage of plain convolutions has one block")
            x, area, new = self._plain(x, weights, first, space, gene, right[0], area, setting)
        else:
            x, area, new = _choice_block(x, weights, first, space, gene, right[0], area, setting)
        self._track(norms, new)
        maps[f"block_{start}"] = x
        if not rest:
            return x, area
        weights, norms = self._weights(f"net.backbone_{stage}.rest.*", rest[0], space, len(rest))
        tail = Subnet(*(a[1:] for a in genes))

        def body(x, per_block):
            weights, gene, side = per_block
            y, _, new = _choice_block(x, weights, rest[0], space, gene, side, area, setting)
            return y, new

        x, new = lax.scan(body, x, (weights, tail, right[1:]))
        self._track(norms, new)
        return x, area

    def _weights(self, prefix, block, space, stack):
        """`({op: {layer: leaves}}, {(op, layer): module})` of a block, or a stack of equal ones."""
        lead = () if stack is None else (stack,)
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
                parent, _, child = name.rpartition(".")
                (layers.setdefault(parent, {}) if parent else layers)[child] = module()
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

    def _plain(self, x, weights, block, space, gene, right, area, setting):
        """Stem and last convolution: conv, BN, hard swish; their fixed ends are whole."""
        layers, op = weights["0"], block.ops[0]
        into = (
            _span(block.full_in, x.shape[-1], gene.inputs, right)
            if block.scaled_in
            else _whole(block.full_in)
        )
        most = block.output_width(space.max_width)
        out = _span(block.full_out, most, gene.outputs, right)
        kernel = layers["conv"]["kernel"]
        if block.scaled_in:
            kernel = _window(kernel, 2, into.offset, into.most)
        if block.scaled_out:
            kernel = _window(kernel, 3, out.offset, out.most)
        pad, s = op.kernel // 2, block.stride
        if op.kernel == 1 and s == 1:
            y = x @ kernel[0, 0].astype(x.dtype)
        else:
            y = lax.conv_general_dilated(
                *(x, kernel.astype(x.dtype), (s, s), ((pad, pad), (pad, pad))),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        area = area.strided(s)
        y, (mean, var) = _batch_norm(_within(y, area), layers["bn"], out, area, setting)
        y = _within(hard_swish(y), area)
        return y, area, {"0": {"bn": {"mean": mean, "var": var}}} if setting.train else {}


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
