"""A superformer of the Twins-based space, its networks, and cutting them out (all inferred).

Every stage shares its token channels on its own: from the left, from the right, or cyclically.
Hidden widths are the first rows. Names are official Twins-SVT's, so that the widest network is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.layers.activations import gelu
from jaxmodels.layers.depthwise import depthwise_conv
from jaxmodels.search import vitas_space
from jaxmodels.search.masked_layers import active_rows, affine, head_layout, masked_norm
from jaxmodels.search.twins import (
    PATCH_EPSILON,
    conv_init,
    from_windows,
    kernel_init,
    position_init,
    to_windows,
)
from jaxmodels.search.twins_space import IDENTITY, Space
from jaxmodels.search.vitas_nets import Layer, embed_patches

EPSILON = 1e-6
SIDES = ("left", "right", "cyclic")

_zeros, _ones = nn.initializers.zeros, nn.initializers.ones


class StageChoice(NamedTuple):
    """One stage of a sub-network: `dim` token channels from `offset` on, and by block `ops`,
    attention widths `attention` and MLP widths `mlp`."""

    dim: Any
    offset: Any
    ops: Any
    attention: Any
    mlp: Any


def choices(space: Space, genes: Any, side: Any) -> tuple[StageChoice, ...]:
    """The arrays of a genome [genes], which may be traced; `side`: 0 left, 1 right, 2 cyclic."""
    genes = jnp.asarray(genes, jnp.int32)
    out = []
    for s in range(len(space.dims)):
        gene, ops, attention, mlp = space.split(genes, s)
        widths = np.array(space.token_widths(s))
        offsets = np.stack(
            [
                np.zeros_like(widths),
                space.dims[s] - widths,
                vitas_space.cyclic_offsets(widths, space.dims[s]),
            ]
        )
        out.append(
            StageChoice(
                jnp.asarray(widths)[gene],
                jnp.asarray(offsets)[side, gene],
                ops,
                jnp.asarray(space.attention_widths(s))[attention],
                jnp.asarray(space.mlp_widths(s))[mlp],
            )
        )
    return tuple(out)


def _norm(features):
    return (("scale", (features,), _ones), ("bias", (features,), _zeros))


def _linear(inputs, features):
    return (("kernel", (inputs, features), kernel_init), ("bias", (features,), _zeros))


def _conv(kernel, inputs, features, init=conv_init):
    return (("kernel", (kernel, kernel, inputs, features), init), ("bias", (features,), _zeros))


class TwinsSuperformer(nn.Module):
    """The weight-sharing Twins network, images [B, H, W, 3] and `choices` -> logits [B, K]."""

    dims: Sequence[int] = (96, 192, 384, 768)
    heads: Sequence[int] = (2, 4, 8, 16)
    depths: Sequence[int] = (2, 2, 10, 4)
    windows: Sequence[int] = (7, 7, 7, 7)
    sr_ratios: Sequence[int] = (8, 4, 2, 1)
    patch_size: int = 4
    classes: int = 1000
    image_size: int = 224
    channels: int = 3
    steps: int = 10
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def space(self) -> Space:
        """The search space these weights serve."""
        lists = (self.dims, self.heads, self.depths, self.windows, self.sr_ratios)
        return Space(
            *(tuple(v) for v in lists),
            *(self.patch_size, self.classes, self.image_size, self.channels, self.steps),
        )

    def choices(self, genes: Any, side: Any) -> tuple[StageChoice, ...]:
        """The arrays of a genome [genes]; `side`: 0 left, 1 right, 2 cyclic."""
        return choices(self.space, genes, side)

    def standalone(self, genome: Sequence[int]) -> tuple[str, dict[str, Any]]:
        """Name and constructor arguments of the network that a genome is on its own.

        Raises ValueError for an illegal genome.
        """
        same = ("windows", "sr_ratios", "patch_size", "classes", "image_size", "channels")
        stages = self.space.decode(self.space.check(genome))
        arguments = {"stages": stages, **{name: getattr(self, name) for name in same}}
        return "search.twins:TwinsNet", arguments

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with."""
        size = self.image_size
        return (jax.ShapeDtypeStruct((1, size, size, self.channels), jnp.float32),)

    def _layer(self, name, shapes):
        return Layer(shapes, self.param_dtype, name=name)()

    @nn.compact
    def __call__(self, x: jax.Array, choice: tuple[StageChoice, ...] | None = None) -> jax.Array:
        """Logits [B, classes]; `choice` None is the widest network with half the base heads."""
        space = self.space
        if choice is None:
            high = space.bounds()[1]
            for place in space.stages():
                high[place.start + 1 : place.stop : 3] = 0
            choice = choices(space, high, 0)
        if x.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"images are {x.shape[1]}x{x.shape[2]}, the superformer's are "
                f"{self.image_size}x{self.image_size}"
            )
        x = jnp.asarray(x, self.dtype)
        channels = self.channels
        for s, stage in enumerate(choice):
            dim, side = self.dims[s], space.side(s)
            behind = (jnp.arange(dim) - stage.offset) % dim
            mask = (behind < stage.dim).astype(x.dtype)
            patch = self.patch_size if s == 0 else 2
            conv = self._layer(f"patch_embeds.{s}.proj", _conv(patch, channels, dim))
            x = embed_patches(x, conv["kernel"], conv["bias"]) * mask
            norm = self._layer(f"patch_embeds.{s}.norm", _norm(dim))
            x = masked_norm(x, norm, mask, stage.dim, PATCH_EPSILON)
            for i in range(self.depths[s]):
                weights = self._block_weights(s, i)
                gene = StageChoice(stage.dim, stage.offset, *(a[i] for a in stage[2:]))

                def run(x, s=s, i=i, weights=weights, gene=gene, mask=mask):
                    return self._block(x, s, i % 2 == 1, weights, gene, mask)

                # The first two of a stage are never left out.
                x = run(x) if i < 2 else jax.lax.cond(gene.ops == IDENTITY, lambda x: x, run, x)
                if i == 0:
                    grid = x.reshape(-1, side, side, dim)
                    position = self._layer(f"pos_block.{s}.proj.0", _conv(3, 1, dim, position_init))
                    moved = depthwise_conv(grid, position["kernel"].astype(x.dtype))
                    moved = (moved + position["bias"].astype(x.dtype)) * mask
                    x = (moved + grid).reshape(-1, side * side, dim)
            x = x.reshape(-1, side, side, dim)
            channels = dim
        norm = self._layer("norm", _norm(channels))
        x = masked_norm(x, norm, mask, stage.dim, EPSILON).mean((1, 2))
        return affine(x, self._layer("head", _linear(channels, self.classes)))

    def _block_weights(self, s, i):
        dim, prefix = self.dims[s], f"blocks.{s}.{i}"
        shapes = {
            "norm1": _norm(dim),
            "norm2": _norm(dim),
            "attn.proj": _linear(dim, dim),
            "mlp.fc1": _linear(dim, 4 * dim),
            "mlp.fc2": _linear(4 * dim, dim),
        }
        if i % 2 == 0:
            shapes["attn.qkv"] = _linear(dim, 3 * dim)
        else:
            shapes |= {"attn.q": _linear(dim, dim), "attn.kv": _linear(dim, 2 * dim)}
            if self.sr_ratios[s] > 1:
                shapes |= {"attn.sr": _conv(self.sr_ratios[s], dim, dim), "attn.norm": _norm(dim)}
        return {name: self._layer(f"{prefix}.{name}", shape) for name, shape in shapes.items()}

    def _block(self, x, s, everywhere, weights, gene, mask):
        dim, side = self.dims[s], self.space.side(s)
        layout = head_layout(self.space.head_counts(s), dim, gene.ops, gene.attention)
        y = masked_norm(x, weights["norm1"], mask, gene.dim, EPSILON)
        scale = jax.lax.rsqrt((gene.attention // layout.heads).astype(jnp.float32))
        if everywhere:
            q = layout.pick(weights["attn.q"], 0, y)
            if self.sr_ratios[s] > 1:
                conv = weights["attn.sr"]
                y = embed_patches(y.reshape(-1, side, side, dim), conv["kernel"], conv["bias"])
                y = masked_norm(y * mask, weights["attn.norm"], mask, gene.dim, PATCH_EPSILON)
            k, v = (layout.pick(weights["attn.kv"], first, y) for first in (0, dim))
            y = layout.attend(q * scale.astype(q.dtype), k, v)
        else:
            window = self.windows[s]
            y = to_windows(y, side, side, window)
            parts = [layout.pick(weights["attn.qkv"], first, y) for first in (0, dim, 2 * dim)]
            y = layout.attend(parts[0] * scale.astype(y.dtype), *parts[1:])
            y = from_windows(y, side, side, window)
        x = x + layout.back(weights["attn.proj"], 0, y) * mask
        y = masked_norm(x, weights["norm2"], mask, gene.dim, EPSILON)
        active = active_rows(4 * dim, gene.mlp, False).astype(y.dtype)
        return x + affine(gelu(affine(y, weights["mlp.fc1"])) * active, weights["mlp.fc2"]) * mask


def extract(
    module: TwinsSuperformer, variables: Mapping[str, Any], genome: Sequence[int], side: str
) -> tuple[Any, dict[str, Any]]:
    """`(network, variables)` of a genome: a `twins.TwinsNet` that computes the same.

    Raises ValueError for an illegal genome or another side than left, right and cyclic.
    """
    from jaxmodels.interop.catalog import export, find, import_state

    if side not in SIDES:
        raise ValueError(f"side {side!r}; known: {', '.join(SIDES)}")
    space = module.space
    genome = space.check(genome)
    state = export("search.twins_superformer", module, variables)
    decoded, chosen = space.decode(genome), choices(space, genome, SIDES.index(side))
    cut, before, tokens = {}, np.arange(module.channels), np.arange(0)
    for s, (dim, blocks) in enumerate(decoded):
        full = module.dims[s]
        tokens = (int(chosen[s].offset) + np.arange(dim)) % full
        weight = state[f"patch_embeds.{s}.proj.weight"]
        cut[f"patch_embeds.{s}.proj.weight"] = weight[tokens][:, before]
        for name in (f"patch_embeds.{s}.proj.bias", f"patch_embeds.{s}.norm.weight",
                     f"patch_embeds.{s}.norm.bias", f"pos_block.{s}.proj.0.weight",
                     f"pos_block.{s}.proj.0.bias"):  # fmt: skip
            cut[name] = state[name][tokens]
        for i, block in enumerate(blocks):
            if block is not None:
                cut |= _cut_block(state, f"blocks.{s}.{i}", full, block, tokens)
        before = tokens
    for name in ("norm.weight", "norm.bias"):
        cut[name] = state[name][tokens]
    cut["head.weight"], cut["head.bias"] = state["head.weight"][:, tokens], state["head.bias"]
    name, arguments = module.standalone(genome)
    network = find(name).build(**arguments)
    return network, import_state(find(name), network, cut)[0]


def _cut_block(state, prefix, full, block, tokens):
    _, attention, mlp = block
    inner, hidden = np.arange(attention), np.arange(mlp)
    rows = {
        "norm1": (tokens, None), "norm2": (tokens, None), "attn.norm": (tokens, None),
        "attn.q": (inner, tokens), "attn.sr": (tokens, tokens), "attn.proj": (tokens, inner),
        "attn.kv": (np.concatenate([inner, full + inner]), tokens),
        "attn.qkv": (np.concatenate([k * full + inner for k in range(3)]), tokens),
        "mlp.fc1": (hidden, tokens), "mlp.fc2": (tokens, hidden),
    }  # fmt: skip
    out = {}
    for name, (outputs, inputs) in rows.items():
        for leaf in ("weight", "bias"):
            key = f"{prefix}.{name}.{leaf}"
            if key in state:
                value = state[key][outputs]
                out[key] = value[:, inputs] if leaf == "weight" and inputs is not None else value
    return out


MODEL = TwinsSuperformer

VARIANTS: dict[str, dict[str, Any]] = {
    "twins_superformer_small": {},
    # For 32-pixel digits.
    "digits_twins": {
        "dims": (24, 48), "heads": (2, 2), "depths": (2, 4), "windows": (4, 2),
        "sr_ratios": (4, 2), "classes": 10, "image_size": 32,
    },
}  # fmt: skip
