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

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmodels.layers.conv2d import conv2d
from jaxmodels.layers.depthwise import depthwise_conv, depthwise_conv_grouped
from jaxmodels.search import scalenet_space
from jaxmodels.search.choice_blocks import ChoiceBlock, ChoiceOp
from jaxmodels.search.scalenet_blocks import (
    Area,
    Setting,
    Subnet,
    batch_norm,
    choice,
    hard_swish,
    span_of,
    whole,
    window,
    within,
)
from jaxmodels.search.scalenet_space import Space

SIDES = ("left", "right")
WIDTH_ARITHMETIC = ("float64", "float32")


def make_subnet(
    space: Space,
    ops: Sequence[int],
    width: float,
    arithmetic: str = "float64",
    holes: bool = False,
) -> Subnet:
    """The arrays of an encoding (op indices [genes], width multiplier).

    `arithmetic` of `ceil(c w)`: "float64" as in the search and in exact numbers, "float32" as the
    official training has it, where the multiplier passes through a float tensor and ceil(40 x 1.2)
    is 49.

    Raises ValueError for an index out of range, a width beyond the built one and, unless `holes`,
    an identity where `Space.check_ops` allows none.
    """
    if arithmetic not in WIDTH_ARITHMETIC:
        raise ValueError(f"width arithmetic {arithmetic!r}; known: {', '.join(WIDTH_ARITHMETIC)}")
    space.check_width(width)
    width = float(np.float32(width)) if arithmetic == "float32" else float(width)
    ops = np.asarray(ops, np.int64)
    if ops.shape == (len(space.blocks),):  # pooling and linear layers have no choice
        ops = np.pad(ops, (0, space.genes - len(ops)))
    rows = []
    for block, op in zip(space.blocks, space.check_ops(ops, holes)):
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


def normal_fan_out(key, shape, dtype=jnp.float32):
    """N(0, sqrt(2 / (k k C_out))), C_out the full one for depthwise kernels too."""
    std = math.sqrt(2 / (shape[-4] * shape[-3] * shape[-1]))
    return std * jax.random.normal(key, shape, dtype)


_zeros, _ones = nn.initializers.zeros, nn.initializers.ones


def _layer_shapes(block: ChoiceBlock, op: ChoiceOp, hidden: int) -> dict[str, Any]:
    """`{layer path: shapes of its leaves}` of one op of a block, without stacks."""
    norm_of: Callable[[int], tuple] = lambda c: (("scale", (c,), _ones), ("bias", (c,), _zeros))  # noqa: E731

    def conv(k, i, o, bias=False):
        leaves = [("kernel", (k, k, i, o), normal_fan_out)]
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
        """`block_I` for each stage's first block, `pool` [B, C], `logits`; widths are padded."""
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
        setting = Setting(train, form, self.depthwise == "grouped")
        area = Area() if size is None else Area(*size)
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
            name = f"net.head_{name}.0.module.0"
            layer = _Layer(shapes, param_dtype=self.param_dtype, name=name)()
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
            block = choice(weights, first, widest, gene, area, setting, 0)
            run = block.run if self.sliced else jax.checkpoint(block.run)
            x, new = run(x, block.layers, gene, block.which, right[0])
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
                block = choice(one, rest[0], widest, gene, area, setting, 0)
                x, new = block.run(x, block.layers, gene, block.which, right[1 + i])
                stacked.append(block.finish(new))
            self._track(norms, jax.tree.map(lambda *a: jnp.stack(a), *stacked))
            return entry, x, area
        tail = Subnet(*(a[1:] for a in genes))
        block = choice(weights, rest[0], widest, tail, area, setting, 1)
        stack = (block.layers, tail, block.which, right[1:])
        # Computed again for the gradient: else every op's branch keeps its own values for every
        # block.
        again = jax.checkpoint(block.run, prevent_cse=False)
        x, new = lax.scan(lambda x, one: again(x, *one), x, stack)
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
        into = span_of(block.full_in, x.shape[-1], gene.inputs, right)
        out = span_of(block.full_out, block.output_width(widest), gene.outputs, right)
        into = into if block.scaled_in else whole(block.full_in)
        out = out if block.scaled_out else whole(block.full_out)
        kernel = window(window(layers["conv"]["kernel"], 2, into), 3, out).astype(x.dtype)
        pad = op.kernel // 2
        if op.kernel == 1 and stride == 1:
            y = x @ kernel[0, 0]
        else:
            y = conv2d(x, kernel, (stride, stride), ((pad, pad), (pad, pad)))
        area = area.strided(stride)
        y, (mean, var) = batch_norm(within(y, area), layers["bn"], out, area, setting)
        return within(hard_swish(y), area), {"bn": {"mean": mean, "var": var}}


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
    "digits": {
        **scalenet_space.DIGITS,
        "resolution_multiplier": scalenet_space.DIGITS_RESOLUTIONS,
    },
    # All seven stages and three kernels at reduced width, as slow to compile as the published one.
    "digits_seven_stages": {
        "backbone": scalenet_space.backbone((8, 4, 8, 8, 12, 12, 16, 20), expansion=2, out=32),
        "head": {"linear1": {"dim_in": 32, "dim_out": 10}},
        "resolution_multiplier": scalenet_space.DIGITS_RESOLUTIONS,
    },
}
