"""Twins-SVT, the backbone family of ViTAS's second space.

X. Chu et al., "Twins: Revisiting the Design of Spatial Attention in Vision Transformers", NeurIPS
2021, arXiv 2104.13840; Meituan-AutoML/Twins@c1ff671 (gvt.py). Blocks alternate attention within
windows (even) and attention to sub-sampled tokens of the whole map (odd).
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
from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.layers.dropout import drop_path
from jaxmodels.layers.initializers import kaiming_normal_fan_out
from jaxmodels.layers.normalization import LayerNorm

PATCH_EPSILON = 1e-5

# Those of the official backbone; its fan out of a depthwise kernel is that of one group.
kernel_init = nn.initializers.truncated_normal(0.02)
conv_init = kaiming_normal_fan_out()
position_init = nn.initializers.normal(math.sqrt(2 / 9))
_zeros = nn.initializers.zeros


def check_windows(height: int, width: int, window: int, where: str) -> None:
    """ValueError unless windows tile a map."""
    if height % window or width % window:
        raise ValueError(
            f"{where}: a {height}x{width} map does not divide into windows of {window}"
        )


def to_windows(x: jax.Array, height: int, width: int, window: int) -> jax.Array:
    """[B, H W, C] -> [B windows, window window, C]."""
    batch, _, channels = x.shape
    rows, columns = height // window, width // window
    x = x.reshape(batch, rows, window, columns, window, channels).swapaxes(2, 3)
    return x.reshape(batch * rows * columns, window * window, channels)


def from_windows(x: jax.Array, height: int, width: int, window: int) -> jax.Array:
    """The reverse of `to_windows`."""
    rows, columns = height // window, width // window
    x = x.reshape(-1, rows, columns, window, window, x.shape[-1]).swapaxes(2, 3)
    return x.reshape(x.shape[0], height * width, x.shape[-1])


class TwinsNet(nn.Module):
    """A Twins network of any widths, images [B, H, W, 3] -> logits [B, classes].

    `stages` has `(token dim, blocks)`, a block being `(heads, attention width, MLP width)` or None
    where its position is left out; positions at even places attend within windows. `epsilon` is
    that of the blocks' and the last LayerNorm; those of patch embedding and sub-sampling are 1e-5.
    `image_size` is a side or (height, width).

    Raises ValueError when an image does not divide into patches and windows.
    """

    stages: Sequence[Any] = ()
    windows: Sequence[int] = (7, 7, 7, 7)
    sr_ratios: Sequence[int] = (8, 4, 2, 1)
    patch_size: int = 4
    classes: int = 1000
    qkv_bias: bool = True
    epsilon: float = 1e-6
    image_size: int | Sequence[int] = 224
    channels: int = 3
    drop_path_rate: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def plan(self) -> Sequence[Any]:
        """Token dims and blocks by stage."""
        return self.stages

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with."""
        size = self.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        return (jax.ShapeDtypeStruct((1, *size, self.channels), jnp.float32),)

    def sees_everything(self, stage: int, place: int) -> bool:
        """Whether a block attends to the whole map."""
        return place % 2 == 1

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits [B, classes]; training draws drop path from the rng `dropout`."""
        return self.intermediates(x, train)["logits"]

    @nn.compact
    def intermediates(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """`block_I` [B, H W, C] before the stage's positional convolution, `pooled`, `logits`."""
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        linear = dict(kernel_init=kernel_init, bias_init=_zeros, **types)
        biased = dict(use_bias=True, bias_init=_zeros, **types)
        maps: dict[str, jax.Array] = {}
        count = sum(len(blocks) for _, blocks in self.plan)
        rates = iter(np.linspace(0, self.drop_path_rate, count))
        number = 0
        x = jnp.asarray(x, self.dtype)
        for s, (dim, blocks) in enumerate(self.plan):
            p = self.patch_size if s == 0 else 2
            batch, height, width, _ = x.shape
            if height % p or width % p:
                raise ValueError(f"stage {s}: a {height}x{width} map does not divide by {p}")
            height, width = height // p, width // p
            check_windows(height, width, self.windows[s], f"stage {s}")
            name = f"patch_embeds.{s}.proj"
            conv = Conv(dim, p, p, 0, kernel_init=conv_init, name=name, **biased)
            x = conv(x).reshape(batch, height * width, dim)
            x = LayerNorm(PATCH_EPSILON, name=f"patch_embeds.{s}.norm", **types)(x)
            for i, block in enumerate(blocks):
                rate = float(next(rates))
                if block is not None:
                    x = self._block(x, s, i, block, (height, width), rate, train, linear)
                    maps[f"block_{number}"] = x
                number += 1
                if i == 0:
                    grid = x.reshape(batch, height, width, dim)
                    name = f"pos_block.{s}.proj.0"
                    own = dict(kernel_init=position_init, name=name, **biased)
                    position = Conv(dim, 3, 1, 1, dim, **own)
                    x = (position(grid) + grid).reshape(batch, height * width, dim)
            x = x.reshape(batch, height, width, dim)
        x = LayerNorm(self.epsilon, name="norm", **types)(x)
        x = x.mean((1, 2))
        maps["pooled"] = x
        maps["logits"] = Linear(self.classes, name="head", **linear)(x)
        return maps

    def _block(self, x, stage, place, block, size, rate, train, linear):
        heads, attention, hidden = block
        dim, name = x.shape[-1], f"blocks.{stage}.{place}"
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def dropped(y):
            active = train and rate > 0
            return drop_path(y, rate, self.make_rng("dropout") if active else None)

        y = LayerNorm(self.epsilon, name=f"{name}.norm1", **types)(x)
        everywhere = self.sees_everything(stage, place)
        y = self._attention(y, stage, everywhere, heads, attention, size, f"{name}.attn", linear)
        x = x + dropped(Linear(dim, name=f"{name}.attn.proj", **linear)(y))
        y = LayerNorm(self.epsilon, name=f"{name}.norm2", **types)(x)
        y = gelu(Linear(hidden, name=f"{name}.mlp.fc1", **linear)(y))
        return x + dropped(Linear(dim, name=f"{name}.mlp.fc2", **linear)(y))

    def _attention(self, x, stage, everywhere, heads, width, size, name, linear):
        dim = x.shape[-1]
        biased = {**linear, "use_bias": self.qkv_bias}
        if not everywhere:
            window = self.windows[stage]
            y = Linear(3 * width, name=f"{name}.qkv", **biased)(to_windows(x, *size, window))
            parts = (split_heads(a, heads) for a in jnp.split(y, 3, axis=-1))
            return from_windows(merge_heads(attend(*parts)), *size, window)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        ratio = self.sr_ratios[stage]
        q = Linear(width, name=f"{name}.q", **biased)(x)
        if ratio > 1:
            grid = x.reshape(x.shape[0], *size, dim)
            own = dict(use_bias=True, kernel_init=conv_init, bias_init=_zeros, **types)
            x = Conv(dim, ratio, ratio, 0, name=f"{name}.sr", **own)(grid)
            x = x.reshape(x.shape[0], -1, dim)
            x = LayerNorm(PATCH_EPSILON, name=f"{name}.norm", **types)(x)
        k, v = jnp.split(Linear(2 * width, name=f"{name}.kv", **biased)(x), 2, axis=-1)
        return merge_heads(attend(*(split_heads(a, heads) for a in (q, k, v))))


class TwinsSVT(TwinsNet):
    """Twins-SVT: attention as wide as the tokens; everything by stage.

    Where windows are single tokens all blocks attend to the whole map, as officially.

    Raises as `TwinsNet`.
    """

    dims: Sequence[int] = (64, 128, 256, 512)
    heads: Sequence[int] = (2, 4, 8, 16)
    mlp_ratios: Sequence[int] = (4, 4, 4, 4)
    depths: Sequence[int] = (2, 2, 10, 4)

    @property
    def plan(self) -> Sequence[Any]:
        """Token dims and blocks by stage."""
        sizes = zip(self.dims, self.heads, self.mlp_ratios, self.depths)
        return [(d, [(h, d, int(d * r))] * depth) for d, h, r, depth in sizes]

    def sees_everything(self, stage: int, place: int) -> bool:
        return place % 2 == 1 or self.windows[stage] == 1


MODEL = TwinsSVT

VARIANTS: dict[str, dict[str, Any]] = {
    "twins_svt_small": {},
    "twins_svt_base": {
        "dims": (96, 192, 384, 768), "heads": (3, 6, 12, 24), "depths": (2, 2, 18, 2),
    },
    "twins_svt_large": {
        "dims": (128, 256, 512, 1024), "heads": (4, 8, 16, 32), "depths": (2, 2, 18, 2),
    },
}  # fmt: skip
