"""ViTAS's stand-alone networks of the DeiT-based space, and the published ones.

X. Su et al., "ViTAS: Vision Transformer Architecture Search", ECCV 2022, arXiv 2106.13700; facts of
xiusu/ViTAS@066bb20 (core/search_space, config/inference, README).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.layers.activations import gelu
from jaxmodels.layers.attention import attend, merge_heads, split_heads
from jaxmodels.layers.convolution import Linear
from jaxmodels.layers.dropout import drop_path
from jaxmodels.layers.initializers import torch_bias, torch_kernel
from jaxmodels.layers.normalization import LayerNorm
from jaxmodels.restoration.resampling import resize
from jaxmodels.search.vitas_space import Space

BLOCK_EPSILON = 1e-6
NORM_EPSILON = 1e-5

kernel_init = nn.initializers.truncated_normal(0.02)
bias_init = nn.initializers.truncated_normal(1e-6)
_zeros = nn.initializers.zeros


class Layer(nn.Module):
    """Parameters of one layer as a dict; a leading stack of blocks is part of the shapes."""

    shapes: tuple
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return {
            leaf: self.param(leaf, init, shape, self.param_dtype)
            for leaf, shape, init in self.shapes
        }


def embed_patches(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Convolution with stride = kernel as a matrix product: [B, H, W, I] -> [B, H W / p p, O]."""
    p = kernel.shape[0]
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // p, p, width // p, p, channels).swapaxes(2, 3)
    x = x.reshape(batch, (height // p) * (width // p), p * p * channels)
    return x @ kernel.reshape(-1, kernel.shape[-1]).astype(x.dtype) + bias.astype(x.dtype)


class ViTAS(nn.Module):
    """A searched network on its own, images [B, H, W, 3] -> logits [B, classes].

    `blocks` has `(heads, attention width, MLP width)` or None (identity) for every position;
    `vitas_space.Space.decode` makes it from a genome. Drop path grows linearly over positions,
    identities counted. The softmax's scale is (dim // heads) ** -0.5, which is not the head width.
    `resize_checkpoint` fits a file's position table to another image size.

    Raises ValueError for an attention width that 3 x heads do not divide, no block at all, and an
    image size that the patch does not divide.
    """

    patch_size: int = 16
    dim: int = 230
    blocks: Sequence[Any] = ((3, 432, 720),) * 12
    classes: int = 1000
    image_size: int = 224
    channels: int = 3
    drop_path_rate: float = 0.0
    resize_checkpoint: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image size {self.image_size} is not divisible by patch {self.patch_size}"
            )
        if all(block is None for block in self.blocks):
            raise ValueError("all blocks are the identity: the network would be an embedding")
        for i, block in enumerate(self.blocks):
            if block is not None and block[1] % (3 * block[0]):
                raise ValueError(
                    f"block {i}: attention width {block[1]} is not divisible by "
                    f"3 x {block[0]} heads"
                )
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with."""
        size = self.image_size
        return (jax.ShapeDtypeStruct((1, size, size, self.channels), jnp.float32),)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits [B, classes]; training draws drop path from the rng `dropout`."""
        return self.intermediates(x, train)["logits"]

    @nn.compact
    def intermediates(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """`embed` [B, N, D], `block_I` [B, D] (class token), `norm` [B, D], `logits`."""
        if x.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"images are {x.shape[1]}x{x.shape[2]}, the position table is of "
                f"{self.image_size}x{self.image_size}"
            )
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        linear = dict(kernel_init=kernel_init, bias_init=bias_init, **types)
        p, d = self.patch_size, self.dim
        stem = "net.backbone_init_stem_Patch_init_0.0"
        conv = (
            ("kernel", (p, p, self.channels, d), torch_kernel()),
            ("bias", (d,), torch_bias(self.channels * p * p)),
        )
        tokens = (self.image_size // p) ** 2 + 1
        own = (("cls_token", (1, 1, d), _zeros), ("pos_embed", (1, tokens, d), _zeros))
        conv = Layer(conv, self.param_dtype, name=f"{stem}.patch_embed.proj")()
        own = Layer(own, self.param_dtype, name=stem)()
        x = embed_patches(jnp.asarray(x, self.dtype), conv["kernel"], conv["bias"])
        first = jnp.broadcast_to(own["cls_token"], (len(x), 1, d)).astype(x.dtype)
        x = jnp.concatenate([first, x], axis=1) + own["pos_embed"].astype(x.dtype)
        maps = {"embed": x}
        rates = np.linspace(0, self.drop_path_rate, len(self.blocks))
        for i, block in enumerate(self.blocks):
            if block is not None:
                prefix = f"net.backbone_Block_Block_{i}.0"
                heads, attention, mlp = block

                def dropped(y, rate=float(rates[i])):
                    active = train and rate > 0
                    return drop_path(y, rate, self.make_rng("dropout") if active else None)

                y = LayerNorm(BLOCK_EPSILON, name=f"{prefix}.norm1", **types)(x)
                y = Linear(attention, name=f"{prefix}.attn.qkv", **linear)(y)
                parts = (split_heads(a, heads) for a in jnp.split(y, 3, axis=-1))
                y = merge_heads(attend(*parts, scale=(d // heads) ** -0.5))
                x = x + dropped(Linear(d, name=f"{prefix}.attn.proj", **linear)(y))
                y = LayerNorm(BLOCK_EPSILON, name=f"{prefix}.norm2", **types)(x)
                y = gelu(Linear(mlp, name=f"{prefix}.mlp.fc1", **linear)(y))
                x = x + dropped(Linear(d, name=f"{prefix}.mlp.fc2", **linear)(y))
            maps[f"block_{i}"] = x[:, 0]
        x = LayerNorm(NORM_EPSILON, name="net.backbone_Norm_Norm_0.0", **types)(x)[:, 0]
        maps["norm"] = x
        maps["logits"] = Linear(self.classes, name="net.backbone_FC_FC_0.0.module.0", **linear)(x)
        return maps


def resize_positions(table: Any, side: int) -> Any:
    """A position table [1, 1 + n n, D] for `side` x `side` patches, the class slot kept.

    Bicubic with the kernel of PyTorch's `interpolate(mode="bicubic")`; the same side gives the
    table back. Raises ValueError for a table of no square grid.
    """
    count = table.shape[1] - 1
    old = math.isqrt(count)
    if old * old != count:
        raise ValueError(f"a position table of 1 + {count} tokens has no square grid")
    if old == side:
        return table
    grid = np.asarray(table)[:, 1:].reshape(1, old, old, -1)
    grid = np.asarray(resize(grid, (side, side), "bicubic"))
    return np.concatenate([np.asarray(table)[:, :1], grid.reshape(1, side * side, -1)], axis=1)


def standalone_arguments(space: Space, genome: Sequence[int]) -> dict[str, Any]:
    """Constructor arguments of `ViTAS` for a genome."""
    patch, dim, blocks = space.decode(space.check(genome))
    return {
        "patch_size": patch,
        "dim": dim,
        "blocks": blocks,
        "classes": space.classes,
        "image_size": space.image_size,
        "channels": space.channels,
    }


def _published(patch: int, dim: int, blocks: dict[int, tuple[int, int, int]], depth: int, rate):
    return {
        "cls": "ViTAS",
        "patch_size": patch,
        "dim": dim,
        "blocks": tuple(blocks.get(i) for i in range(depth)),
        "drop_path_rate": rate,
    }


def _at(positions: Sequence[int], heads, attention, mlp):
    return {i: one for i, one in zip(positions, zip(heads, attention, mlp))}


# The README's searched networks; positions matter for key names.
PUBLISHED: dict[str, dict[str, Any]] = {
    "vitas_858m": _published(
        16, 154,
        _at((0, 2, 5, 6, 8, 13, 14), (12, 16, 6, 16, 16, 16, 16),
            (288, 720, 288, 1008, 1152, 864, 1440), (1008, 576, 1296, 720, 1008, 1152, 1296)),
        16, 0.1,
    ),
    "vitas_1g": _published(
        16, 192,
        _at((0, 3, 5, 8, 9, 11, 12, 15), (16, 16, 16, 12, 12, 12, 16, 6),
            (288, 432, 432, 1152, 1008, 864, 432, 864), (864, 576, 1008, 864, 720, 576, 1296, 864)),
        16, 0.1,
    ),
    "vitas_1_3g": _published(
        16, 230, _at(range(12), (3,) * 12, (432,) * 12, (720,) * 12), 12, 0.0
    ),
    "vitas_2_7g": _published(
        16, 346,
        _at((0, 2, 4, 5, 7, 9, 10, 11, 13, 14, 15), (16, 16, 16, 6, 3, 12, 6, 12, 12, 6, 12),
            (720, 1008, 864, 864, 576, 1296, 1296, 720, 1440, 576, 1152),
            (720, 864, 1008, 1008, 720, 1296, 1152, 144, 864, 1008, 1296)),
        16, 0.0,
    ),
    "vitas_4_9g": _published(
        16, 307,
        _at(range(13), (16,) * 13,
            (864, 288, 1728, 1152, 2016, 1440, 2592, 1440, 2304, 2016, 2016, 1440, 1728),
            (1728, 2304, 864, 2016, 864, 1440, 2304, 2016, 864, 576, 2016, 2304, 2304)),
        13, 0.0,
    ),
}  # fmt: skip
