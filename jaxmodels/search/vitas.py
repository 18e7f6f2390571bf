"""ViTAS: the superformer of the DeiT-based space, and its stand-alone networks.

X. Su et al., "ViTAS: Vision Transformer Architecture Search", ECCV 2022, arXiv 2106.13700; facts of
xiusu/ViTAS@066bb20 (core/search_space/ops.py, core/model/net.py), which is the paper's first
version: two-sided weight sharing, private class tokens and attention maps. `compat="official"`
keeps its quirks, "corrected" does without. Cyclic sharing is our reconstruction.

A sub-network is a `Choice` of arrays. Token channels stay where they are in the full width and the
others are masked, so that one compiled function serves every genome.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmodels.layers.activations import gelu
from jaxmodels.layers.initializers import torch_bias, torch_kernel
from jaxmodels.search import vitas_space
from jaxmodels.search.masked_layers import active_rows, affine, head_layout, masked_norm
from jaxmodels.search.vitas_nets import (
    BLOCK_EPSILON,
    NORM_EPSILON,
    PUBLISHED,
    Layer,
    ViTAS,
    bias_init,
    embed_patches,
    kernel_init,
    resize_positions,
    standalone_arguments,
)
from jaxmodels.search.vitas_space import Space

SIDES = ("left", "right", "cyclic")
COMPAT = ("official", "corrected")

_zeros, _ones = nn.initializers.zeros, nn.initializers.ones


class Choice(NamedTuple):
    """A sub-network of the superformer as arrays.

    Attributes:
      patch: index of the patch size, [] int32; a Python int keeps padding tokens away.
      ops: op of every block, [depth]. dim: active token channels, []. offset: the first of them
        on the circle of all, [].
      qk, v, mlp: active rows of the blocks' fused q and k, of v, of the MLP, [depth].
      right: whether hidden widths take the last rows, []. last_position: whether one position
        vector, the table's last, serves all tokens (official quirk), [].
    """

    patch: Any
    ops: Any
    dim: Any
    offset: Any
    qk: Any
    v: Any
    mlp: Any
    right: Any
    last_position: Any


def choices(space: Space, genes: Any, side: Any, compat: str = "official") -> Choice:
    """The arrays of a genome [genes], which may be traced.

    Args:
      side: 0 left, 1 right, 2 cyclic (its hidden widths are ordinal), an int or an int array.
      compat: "official" gives width genes in order to the blocks that are not identities and one
        position vector to all tokens; "corrected" gives each position its own and the whole table.
    """
    if compat not in COMPAT:
        raise ValueError(f"compat {compat!r}; known: {', '.join(COMPAT)}")
    genes = jnp.asarray(genes, jnp.int32)
    patch, ops, dim, attention, mlp = space.split(genes)
    if compat == "official":
        place = jnp.maximum(jnp.cumsum(ops < space.identity_index) - 1, 0)
        attention, mlp = attention[place], mlp[place]
    third = space.attention // 3

    def looked_up(table, index):
        return jnp.asarray(table, jnp.int32)[index]

    # Only cyclic sharing needs widths that ascend.
    sharing = "ordinal" if isinstance(side, int) and side < 2 else "cyclic"
    offsets = vitas_space.sharing_offsets(space, sharing)
    return Choice(
        patch=patch,
        ops=ops,
        dim=looked_up(space.table(space.dim), dim),
        offset=looked_up(offsets, (side, dim)),
        qk=looked_up(space.table(2 * third), attention),
        v=looked_up(space.table(third), attention),
        mlp=looked_up(space.table(space.mlp), mlp),
        right=jnp.asarray(side == 1),
        last_position=jnp.asarray(compat == "official"),
    )


def make_choice(
    space: Space, genome: Sequence[int], side: str | None, compat: str = "official"
) -> Choice:
    """The arrays of a genome, checked, with the patch index a number.

    Args:
      side: "left", "right", "cyclic", or None for a genome of full width, where it is not needed.

    Raises ValueError for an illegal genome and for a narrow genome without a side.
    """
    genome = space.check(genome, empty=True, widths=False)
    if side is not None and side not in SIDES:
        raise ValueError(f"side {side!r}; known: {', '.join(SIDES)}")
    _, ops, *widths = space.split(genome)
    active = ops < space.identity_index
    if side is None:
        used = [widths[0], *widths[1][active], *widths[2][active]]
        if any(w != len(space.percent) - 1 for w in used) or space.percent[-1] != 1:
            raise ValueError("a genome narrower than the superformer needs a side")
    choice = choices(space, genome, SIDES.index(side or "left"), compat)
    qk, v = np.asarray(choice.qk), np.asarray(choice.v)
    for i in np.flatnonzero(active):
        if qk[i] != 2 * v[i]:
            raise ValueError(
                f"block {i}: {qk[i]} rows of q and k and {v[i]} of v of attention width "
                f"{space.attention} are no equal q, k and v"
            )
        space.check_heads(3 * int(v[i]), space.heads[ops[i]], f"block {i}")
    last = choice.last_position & (side is not None)
    return choice._replace(patch=int(genome[0]), last_position=last)


def token_indices(choice: Choice, channels: int) -> np.ndarray:
    """Active token channels in the order of the stand-alone network, int64 [dim]."""
    return (int(choice.offset) + np.arange(int(choice.dim))) % channels


class Superformer(nn.Module):
    """The weight-sharing vision transformer, images [B, H, W, 3] and a `Choice` -> logits [B, K].

    `qkv` 2 has a q and k projection of its own for every head choice and one v, 1 one of q and k
    and a v for every head choice, 0 one fused projection. `block_name` is the last op's name in
    the configuration, which official checkpoints have in their keys. `resize_checkpoint` fits a
    file's position tables to another image size.

    Raises ValueError for unknown `qkv` or `compat` and an image size no patch divides.
    """

    patches: Sequence[int] = (14, 16, 32)
    heads: Sequence[int] = (3, 6, 12, 16)
    dim: int = 384
    attention: int = 1440
    mlp: int = 1440
    depth: int = 16
    classes: int = 1000
    identity: bool = True
    percent: Sequence[float] = vitas_space.PERCENT
    image_size: int = 224
    channels: int = 3
    qkv: int = 2
    compat: str = "official"
    resize_checkpoint: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.qkv not in (0, 1, 2):
            raise ValueError(f"qkv mode {self.qkv}; known: 0, 1, 2")
        if self.compat not in COMPAT:
            raise ValueError(f"compat {self.compat!r}; known: {', '.join(COMPAT)}")
        super().__post_init__()

    @property
    def space(self) -> Space:
        """The search space these weights serve."""
        return _space(
            *(tuple(self.patches), tuple(self.heads), self.dim, self.attention, self.mlp),
            *(self.depth, self.classes, self.identity, tuple(self.percent), self.image_size),
            self.channels,
        )

    def choices(self, genes: Any, side: Any) -> Choice:
        """The arrays of a genome [genes]; `side`: 0 left, 1 right, 2 cyclic."""
        return choices(self.space, genes, side, self.compat)

    def standalone(self, genome: Sequence[int]) -> tuple[str, dict[str, Any]]:
        """Name and constructor arguments of the network that a genome is on its own."""
        return "search.vitas:ViTAS", standalone_arguments(self.space, genome)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with."""
        size = self.image_size
        return (jax.ShapeDtypeStruct((1, size, size, self.channels), jnp.float32),)

    def __call__(self, x: jax.Array, choice: Choice | None = None) -> jax.Array:
        """Logits [B, K]; `choice` None is the full width with the first patch size and heads."""
        return self.intermediates(x, choice)["logits"]

    @nn.compact
    def intermediates(self, x: jax.Array, choice: Choice | None = None) -> dict[str, jax.Array]:
        """`embed` [B, N, D], `blocks` [depth, B, D] (class tokens), `norm` [B, D], `logits`."""
        space = self.space
        if choice is None:
            genome = np.zeros(space.genes, np.int64)
            genome[space.model_genes :] = len(space.percent) - 1
            choice = choices(space, genome, 0, "corrected")._replace(patch=0)
        if x.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"images are {x.shape[1]}x{x.shape[2]}, the position tables are of "
                f"{self.image_size}x{self.image_size}"
            )
        behind = (jnp.arange(self.dim) - choice.offset) % self.dim
        mask = (behind < choice.dim).astype(jnp.float32)
        embeddings = self._embeddings(choice, mask.astype(self.dtype))
        ops, weights = jnp.asarray(choice.ops), self._blocks()
        genes = (ops, choice.qk, choice.v, choice.mlp)
        norm = self._layer("net.backbone_Norm_Norm_0.0", _norm_shapes(self.dim))
        head = self._layer(
            "net.backbone_FC_FC_0.0.module.0", _linear_shapes(self.dim, self.classes)
        )

        def body(x, per_block):
            layers, (op, qk, v, mlp) = per_block
            rows = _Rows(qk, v, mlp, choice.right)

            # Kept, the intermediate values of every head count's branch would be written (zeros
            # where it did not run) for every block: most of a training step on a CPU.
            @functools.partial(jax.checkpoint, prevent_cse=False)
            def run(x):
                return self._block(x, layers, op, rows, mask, choice.dim)

            if self.identity:
                x = lax.cond(op == space.identity_index, lambda x: x, run, x)
            else:
                x = run(x)
            return x, x[:, 0]

        def after(embed):
            """The network behind one patch size, on as many tokens as it has."""

            def run(x):
                maps = {"embed": embed(x)}
                x, maps["blocks"] = lax.scan(body, maps["embed"], (weights, genes))
                x = masked_norm(x, norm, mask, choice.dim, NORM_EPSILON)[:, 0]
                maps["norm"] = x
                logits = x @ head["kernel"].astype(x.dtype) + head["bias"].astype(x.dtype)
                return {**maps, "logits": logits}

            return run

        x = jnp.asarray(x, self.dtype)
        networks = [after(embed) for embed in embeddings]
        if isinstance(choice.patch, int):
            return networks[choice.patch](x)
        most = max((self.image_size // p) ** 2 + 1 for p in self.patches)

        def padded(network):
            def run(x):
                maps = network(x)
                behind = most - maps["embed"].shape[1]
                return {**maps, "embed": jnp.pad(maps["embed"], ((0, 0), (0, behind), (0, 0)))}

            return run

        return lax.switch(choice.patch, [padded(network) for network in networks], x)

    def _layer(self, name, shapes, lead=()):
        shapes = tuple((leaf, (*lead, *shape), init) for leaf, shape, init in shapes)
        return Layer(shapes, self.param_dtype, name=name)()

    def _embeddings(self, choice, mask):
        """A function `images -> tokens [B, N, D]` for every patch size."""
        parts = []
        for i, p in enumerate(self.patches):
            prefix = f"net.backbone_init_stem_Patch_init_0.{i}"
            fan_in = self.channels * p * p
            conv = (
                ("kernel", (p, p, self.channels, self.dim), torch_kernel()),
                ("bias", (self.dim,), torch_bias(fan_in)),
            )
            tokens = (self.image_size // p) ** 2 + 1
            own = (
                ("cls_token", (1, 1, self.dim), _zeros),
                ("pos_embed", (1, tokens, self.dim), _zeros),
            )
            parts.append(
                (self._layer(f"{prefix}.patch_embed.proj", conv), self._layer(prefix, own))
            )

        def embed(number):
            conv, own = parts[number]

            def run(x):
                y = embed_patches(x, conv["kernel"], conv["bias"])
                first = jnp.broadcast_to(own["cls_token"], (len(y), 1, self.dim))
                y = jnp.concatenate([first.astype(y.dtype), y], axis=1)
                table = own["pos_embed"]
                table = jnp.where(choice.last_position, table[:, -1:], table)
                return (y + table.astype(y.dtype)) * mask

            return run

        return [embed(i) for i in range(len(self.patches))]

    def _blocks(self) -> dict[str, Any]:
        """Weights of all blocks, one stack."""
        d, third = self.dim, self.attention // 3
        private = len(self.heads)
        names = {
            0: {"qkv": 3 * third},
            1: {"qk": 2 * third, **{f"v{i}": third for i in range(private)}},
            2: {**{f"qk{i}": 2 * third for i in range(private)}, "v": third},
        }[self.qkv]
        shapes = {
            "norm1": _norm_shapes(d),
            "norm2": _norm_shapes(d),
            **{f"attn.{name}": _linear_shapes(d, rows) for name, rows in names.items()},
            "attn.proj": _linear_shapes(third, d),
            "mlp.fc1": _linear_shapes(d, self.mlp),
            "mlp.fc2": _linear_shapes(self.mlp, d),
        }
        prefix = f"net.backbone_Block_{'id' if self.identity else 'Block'}.*.0"
        return {k: self._layer(f"{prefix}.{k}", v, (self.depth,)) for k, v in shapes.items()}

    def _block(self, x, layers, op, rows, mask, dim):
        mask = mask.astype(x.dtype)
        y = masked_norm(x, layers["norm1"], mask, dim, BLOCK_EPSILON)
        x = x + self._attention(y, layers, op, rows, dim) * mask
        y = masked_norm(x, layers["norm2"], mask, dim, BLOCK_EPSILON)
        hidden = affine(y, layers["mlp.fc1"])
        active = active_rows(self.mlp, rows.mlp, rows.right)
        y = affine(gelu(hidden) * active.astype(x.dtype), layers["mlp.fc2"])
        return x + y * mask

    def _attention(self, y, layers, op, rows, dim):
        """Attention of `heads[op]` heads over the block's active rows."""
        third = self.attention // 3
        layout = head_layout(tuple(self.heads), third, op, rows.v)
        tail = jnp.where(rows.right, third - rows.v, 0)
        q_row, k_row = self._qk_rows(rows)
        v_row = tail
        if self.qkv == 0:
            v_row = q_row + 2 * rows.v if self.compat == "official" else 2 * third + tail

        def project(name, first):
            # The chosen op's own weights where it has some.
            own = [k for k in layers if k.removeprefix(f"attn.{name}").isdigit()]
            if own:
                leaves = (lax.select_n(layout.op.astype(jnp.int32), *(layers[k][leaf] for k in own))
                          for leaf in ("kernel", "bias"))  # fmt: skip
                return layout.pick(dict(zip(("kernel", "bias"), leaves)), first, y)
            return layout.pick(layers[f"attn.{name}"], first, y)

        fused, value = {0: ("qkv", "qkv")}.get(self.qkv, ("qk", "v"))
        q, k, v = project(fused, q_row), project(fused, k_row), project(value, v_row)
        if self.compat == "official":
            q = q * (self.dim // 3) ** -0.5
        else:
            wide = jnp.maximum(dim // layout.heads, 1).astype(jnp.float32)
            q = q * lax.rsqrt(wide).astype(q.dtype)
        return layout.back(layers["attn.proj"], tail, layout.attend(q, k, v))

    def _qk_rows(self, rows):
        """First row of q and of k in their fused weight."""
        third = self.attention // 3
        if self.compat == "official":
            # A prefix or suffix of the fused rows, halved: a narrow net's k rows are q rows of a
            # wide one.
            full, used = (3 * third, 3 * rows.v) if self.qkv == 0 else (2 * third, rows.qk)
            start = jnp.where(rows.right, full - used, 0)
            return start, start + rows.v
        start = jnp.where(rows.right, third - rows.v, 0)
        return start, third + start


class _Rows(NamedTuple):
    """Active hidden rows of one block, and whether they are the last ones."""

    qk: Any
    v: Any
    mlp: Any
    right: Any


def _norm_shapes(features):
    return (("scale", (features,), _ones), ("bias", (features,), _zeros))


def _linear_shapes(inputs, features):
    return (("kernel", (inputs, features), kernel_init), ("bias", (features,), bias_init))


@functools.lru_cache(maxsize=64)
def _space(*fields) -> Space:
    return Space(*fields)


MODEL = Superformer


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """The superformer's blocks are one stack here and have numbers in files."""
    if not isinstance(module, Superformer):
        return {}
    stem = f"net.backbone_Block_{'id' if module.identity else 'Block'}"
    return {"names": [(f"{stem}.{i}.", f"{stem}_{i}.") for i in range(module.depth)]}


def check_checkpoint(keys: Iterable[str], module: nn.Module) -> None:
    """Refuse a superformer's file for a stand-alone network and the reverse, by their keys."""
    names = [key.rsplit(".", 1)[0] for key in keys]
    shared = any(name.endswith((".attn.qk0", ".attn.qk")) for name in names)
    single = any(name.endswith(".attn.qkv") for name in names)
    if isinstance(module, ViTAS) and shared:
        raise ValueError(
            "the checkpoint is a superformer's (attn.qk0 or attn.qk) and the model a stand-alone "
            "network (attn.qkv); load it as search.vitas and extract a genome"
        )
    if isinstance(module, Superformer) and single and module.qkv != 0:
        raise ValueError(
            "the checkpoint is a stand-alone network's (attn.qkv) and the model a superformer "
            "(attn.qk0); load it as search.vitas:ViTAS"
        )


def upgrade_checkpoint(state: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """With `resize_checkpoint`, a state dict whose position tables fit the module's image size.

    Raises ValueError with both sizes where tables do not fit and that is not asked for.
    """
    patches = module.patches if isinstance(module, Superformer) else (module.patch_size,)
    out = dict(state)
    for i, patch in enumerate(patches):
        key = f"net.backbone_init_stem_Patch_init_0.{i}.pos_embed"
        side = module.image_size // patch
        # Another rank is no position table: loading says what does not fit.
        if key not in state or np.ndim(state[key]) != 3:
            continue
        tokens = state[key].shape[1]
        if tokens == side * side + 1:
            continue
        if not module.resize_checkpoint:
            raise ValueError(
                f"{key} has {tokens} positions, image size {module.image_size} in patches of "
                f"{patch} wants {side * side + 1}; resize_checkpoint=True fits it"
            )
        out[key] = resize_positions(state[key], side)
    return out


VARIANTS: dict[str, dict[str, Any]] = {
    "superformer": {},
    "superformer_4_9g": {
        "dim": 768, "attention": 2880, "mlp": 2880, "depth": 13, "identity": False,
    },
    **PUBLISHED,
    # For 32-pixel digits.
    "digits": {
        "patches": (4, 8, 16), "heads": (1, 2, 3, 4), "dim": 48, "attention": 360, "mlp": 96,
        "depth": 4, "classes": 10, "image_size": 32, "compat": "corrected",
    },
    "digits_net": {
        "cls": "ViTAS", "patch_size": 8, "dim": 34, "blocks": ((3, 252, 67),) * 3, "classes": 10,
        "image_size": 32,
    },
}  # fmt: skip
