"""Swin2SR: SwinV2 transformer for super-resolution of compressed images.

M. V. Conde, U.-J. Choi, M. Burchi, R. Timofte, "Swin2SR: SwinV2 Transformer for Compressed Image
Super-Resolution and Restoration", arXiv 2209.11345. Structure and names after the official code,
mv-lab/swin2sr@6f25d76 (`models/network_swin2sr.py`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.layers.activations import gelu
from jaxmodels.layers.attention import attend, merge_heads
from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.layers.dropout import drop_path, dropout
from jaxmodels.layers.normalization import LayerNorm
from jaxmodels.restoration.inputs import check_unit_range
from jaxmodels.restoration.resampling import (
    nearest_upsample,
    pixel_shuffle,
    reflect_pad,
    resize,
)
from jaxmodels.restoration.windows import (
    merge_windows,
    partition_windows,
    relative_coords_table,
    relative_position_index,
    shifted_window_mask,
)

UPSAMPLERS = (
    "pixelshuffle",
    "pixelshuffle_aux",
    "pixelshuffledirect",
    "nearest+conv",
    "pixelshuffle_hf",
    "",
)
SCALES = (2, 3, 4, 8)
RGB_MEAN = (0.4488, 0.4371, 0.4040)
CPB_RANGE = 16.0
MAX_LOGIT_SCALE = float(np.log(100.0))

_LINEAR_INIT = nn.initializers.truncated_normal(0.02)
_ZEROS = nn.initializers.zeros


class _PositionBias(nn.Module):
    """The two-layer network from relative coordinates to a number for each head."""

    heads: int
    hidden: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, table: jax.Array) -> jax.Array:
        types = dict(kernel_init=_LINEAR_INIT, dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = nn.relu(Linear(self.hidden, bias_init=_ZEROS, name="0", **types)(table))
        return Linear(self.heads, use_bias=False, name="2", **types)(hidden)


class WindowAttention(nn.Module):
    """Scaled cosine attention within windows, windows [B, N, w*w, C] -> the same shape.

    Logits are cos(q, k) exp(min(logit_scale, log 100)) + 16 sigmoid(position bias) + mask;
    `mask` is [N, w*w, w*w].
    """

    window: int
    heads: int
    qkv_bias: bool = True
    attn_drop_rate: float = 0.0
    drop_rate: float = 0.0
    cpb_hidden: int = 512
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool = False) -> jax.Array:
        channels, heads, n = x.shape[-1], self.heads, self.window**2
        types = dict(kernel_init=_LINEAR_INIT, dtype=self.dtype, param_dtype=self.param_dtype)
        qkv = Linear(3 * channels, use_bias=False, name="qkv", **types)(x)
        if self.qkv_bias:
            q_bias = self.param("q_bias", _ZEROS, (channels,), self.param_dtype)
            v_bias = self.param("v_bias", _ZEROS, (channels,), self.param_dtype)
            qkv = qkv + jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(qkv.dtype)
        query, key, value = jnp.moveaxis(
            qkv.reshape(*qkv.shape[:-1], 3, heads, channels // heads), -3, 0
        )
        scale = self.param(
            "logit_scale", nn.initializers.constant(np.log(10.0)), (heads, 1, 1), self.param_dtype
        )
        scale = jnp.exp(jnp.minimum(scale, MAX_LOGIT_SCALE))[:, 0]
        query, key = _unit(query) * scale.astype(query.dtype), _unit(key)

        table = jnp.asarray(relative_coords_table(self.window).reshape(-1, 2), self.dtype)
        bias = _PositionBias(heads, self.cpb_hidden, self.dtype, self.param_dtype, name="cpb_mlp")(
            table
        )
        bias = bias.astype(jnp.promote_types(bias.dtype, jnp.float32))
        bias = bias[relative_position_index(self.window).reshape(-1)].reshape(n, n, heads)
        bias = CPB_RANGE * jax.nn.sigmoid(bias).transpose(2, 0, 1)[None]  # [1, heads, n, n]
        if mask is not None:
            bias = bias + jnp.asarray(mask, bias.dtype)[:, None]
        rngs = None
        if train and self.attn_drop_rate:
            rngs = jax.random.split(self.make_rng("dropout"), x.shape[0])

        def one_image(query, key, value, rng):
            return attend(
                query,
                key,
                value,
                bias=bias,
                scale=1.0,
                dropout_rate=self.attn_drop_rate,
                rng=rng,
            )

        axes = (0, 0, 0, None if rngs is None else 0)
        y = merge_heads(jax.vmap(one_image, axes)(query, key, value, rngs))
        y = Linear(channels, bias_init=_ZEROS, name="proj", **types)(y)
        return dropout(y, self.drop_rate, self.make_rng("dropout") if self._drops(train) else None)

    def _drops(self, train: bool) -> bool:
        return train and self.drop_rate > 0


def _unit(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12) over the last axis, in float32 or wider, with a finite gradient at 0."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.square(wide).sum(-1, keepdims=True)
    safe = jnp.where(square > 0, square, 1)
    norm = jnp.where(square > 0, jnp.sqrt(safe), 0)
    return (wide / jnp.maximum(norm, 1e-12)).astype(x.dtype)


class SwinBlock(nn.Module):
    """x + LN(attention), then x + LN(MLP); map [B, H, W, C], H and W multiples of the window."""

    heads: int
    window: int
    shift: int = 0
    mlp_ratio: float = 2.0
    qkv_bias: bool = True
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    cpb_hidden: int = 512
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        linear = dict(kernel_init=_LINEAR_INIT, bias_init=_ZEROS, **types)
        height, width, channels = x.shape[1:]

        def rng(rate: float):
            return self.make_rng("dropout") if train and rate else None

        mask = None
        y = x
        if self.shift:
            mask = shifted_window_mask(height, width, self.window, self.shift)
            y = jnp.roll(y, (-self.shift, -self.shift), (1, 2))
        y = WindowAttention(
            self.window,
            self.heads,
            self.qkv_bias,
            self.attn_drop_rate,
            self.drop_rate,
            self.cpb_hidden,
            name="attn",
            **types,
        )(partition_windows(y, self.window), mask, train)
        y = merge_windows(y, self.window, height, width)
        if self.shift:
            y = jnp.roll(y, (self.shift, self.shift), (1, 2))
        y = LayerNorm(name="norm1", **types)(y)
        x = x + drop_path(y, self.drop_path_rate, rng(self.drop_path_rate))

        y = gelu(Linear(int(channels * self.mlp_ratio), name="mlp.fc1", **linear)(x))
        y = dropout(y, self.drop_rate, rng(self.drop_rate))
        y = Linear(channels, name="mlp.fc2", **linear)(y)
        y = dropout(y, self.drop_rate, rng(self.drop_rate))
        y = LayerNorm(name="norm2", **types)(y)
        return x + drop_path(y, self.drop_path_rate, rng(self.drop_path_rate))


def _residual_conv(x: jax.Array, kind: str, name: str, types: Mapping[str, Any]) -> jax.Array:
    """The convolution before a residual sum: one 3x3, or 3x3, 1x1, 3x3 through a quarter of C."""
    channels = x.shape[-1]
    if kind == "1conv":
        return Conv(channels, 3, use_bias=True, name=name, **types)(x)
    narrow = channels // 4
    x = nn.leaky_relu(Conv(narrow, 3, use_bias=True, name=f"{name}.0", **types)(x), 0.2)
    x = nn.leaky_relu(Conv(narrow, 1, use_bias=True, name=f"{name}.2", **types)(x), 0.2)
    return Conv(channels, 3, use_bias=True, name=f"{name}.4", **types)(x)


class ResidualGroup(nn.Module):
    """RSTB: blocks, a convolution, a 1x1 convolution of its own, and the group's input added."""

    heads: int
    window: int
    shifts: tuple[int, ...]
    drop_path_rates: tuple[float, ...]
    mlp_ratio: float = 2.0
    qkv_bias: bool = True
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    resi_connection: str = "1conv"
    use_checkpoint: bool = False
    cpb_hidden: int = 512
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        block = nn.remat(SwinBlock, static_argnums=(2,)) if self.use_checkpoint else SwinBlock
        y = x
        for j, (shift, rate) in enumerate(zip(self.shifts, self.drop_path_rates)):
            y = block(
                self.heads,
                self.window,
                shift,
                self.mlp_ratio,
                self.qkv_bias,
                self.drop_rate,
                self.attn_drop_rate,
                rate,
                self.cpb_hidden,
                name=f"residual_group.blocks.{j}",
                **types,
            )(y, train)
        y = _residual_conv(y, self.resi_connection, "conv", types)
        return Conv(x.shape[-1], 1, use_bias=True, name="patch_embed.proj", **types)(y) + x


class Swin2SR(nn.Module):
    """Swin2SR, images [B, H, W, in_chans] in [0, 1] -> [B, s H, s W, in_chans].

    The official arguments, of which `img_size` matters only for whether windows are shifted (and
    for the masks in an exported checkpoint): any input size works with any weights. Returns by
    `upsampler`: `pixelshuffle_aux` (sr, aux), aux [B, H', W', 3] at the input's padded size;
    `pixelshuffle_hf` (base, sr, high frequencies); all others sr. The input is padded below and
    to the right by reflection to a multiple of the window, and the output cropped.

    `faithful_padding`: in `pixelshuffle_aux` the official code resizes the *padded* input to the
    size of the unpadded output, which shrinks it a little where H or W is no multiple of the
    window; False resizes it to the padded output's size and crops last. Callers that pad first, as
    the official test script does, see no difference.

    `ape`, which no published variant has, adds a learned vector for every pixel of `img_size`
    after the patch embedding; inputs must then have that size once padded.

    `num_feat` and `cpb_hidden` are the widths of the reconstruction and of the networks behind the
    position biases, which the official class fixes at 64 and 512.

    Raises ValueError for arguments that do not fit together, for inputs that are not floats in
    [0, 1], and for a number of channels that is not `in_chans`.
    """

    img_size: int | tuple[int, int] = 64
    in_chans: int = 3
    embed_dim: int = 96
    depths: tuple[int, ...] = (6, 6, 6, 6)
    num_heads: tuple[int, ...] = (6, 6, 6, 6)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.1
    ape: bool = False
    patch_norm: bool = True
    use_checkpoint: bool = False
    upscale: int = 2
    img_range: float = 1.0
    upsampler: str = ""
    resi_connection: str = "1conv"
    faithful_padding: bool = True
    num_feat: int = 64
    cpb_hidden: int = 512
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name in ("depths", "num_heads", "img_size"):
            value = getattr(self, name)
            if not isinstance(value, int):
                object.__setattr__(self, name, tuple(value))
        if self.upsampler is None:
            object.__setattr__(self, "upsampler", "")
        _check_arguments(self)
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: two windows square, `img_size` with `ape`."""
        sides = _pair(self.img_size) if self.ape else (2 * self.window_size,) * 2
        return (jax.ShapeDtypeStruct((1, *sides, self.in_chans), jnp.float32),)

    @property
    def block_window(self) -> int:
        """Side of the blocks' windows: smaller than `window_size` for models of tiny images."""
        return min(self.window_size, *_pair(self.img_size))

    def shift_of(self, block: int) -> int:
        """The cyclic shift of the block with this number in its group."""
        if min(_pair(self.img_size)) <= self.window_size or block % 2 == 0:
            return 0
        return self.window_size // 2

    def __call__(self, x: jax.Array, train: bool = False):
        """The reconstruction, a tuple for the heads that return more."""
        return self.intermediates(x, train)["output"]

    @nn.compact
    def intermediates(self, x: jax.Array, train: bool = False) -> dict[str, Any]:
        """`conv_first`, `patch_embed`, `layers.0` ..., `conv_after_body` as maps, and `output`."""
        if x.ndim != 4 or x.shape[-1] != self.in_chans:
            raise ValueError(
                f"Swin2SR: images must be [batch, height, width, {self.in_chans}], got {x.shape}"
                + ("; a gray image needs a model with in_chans=1" if x.shape[-1] == 1 else "")
            )
        check_unit_range(x, "Swin2SR")
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        height, width = x.shape[1:3]
        s, window = self.upscale, self.window_size
        mean = jnp.asarray(RGB_MEAN if self.in_chans == 3 else (0.0,), x.dtype)
        x = reflect_pad(x, -height % window, -width % window)
        if x.shape[1] % self.block_window or x.shape[2] % self.block_window:
            raise ValueError(
                f"Swin2SR: a {height}x{width} image padded to {x.shape[1]}x{x.shape[2]} does not "
                f"divide into windows of {self.block_window} (the smaller side of img_size)"
            )
        if self.ape and x.shape[1:3] != _pair(self.img_size):
            raise ValueError(
                f"Swin2SR: with ape=True images must have img_size {self.img_size} once padded, "
                f"not {x.shape[1]}x{x.shape[2]}"
            )
        x = (x - mean) * self.img_range
        maps: dict[str, Any] = {}

        def conv(y, features, name, kernel=3):
            return Conv(features, kernel, use_bias=True, name=name, **types)(y)

        def upsampled(y, name):
            if s == 3:
                return pixel_shuffle(conv(y, 9 * self.num_feat, f"{name}.0"), 3)
            for i in range(s.bit_length() - 1):
                y = pixel_shuffle(conv(y, 4 * self.num_feat, f"{name}.{2 * i}"), 2)
            return y

        def restored(y):
            y = y.astype(jnp.promote_types(y.dtype, x.dtype))
            return (y / self.img_range + mean)[:, : height * s, : width * s]

        first = maps["conv_first"] = conv(x, self.embed_dim, "conv_first")
        # The high-frequency trunk shares these with the first.
        embed = Conv(self.embed_dim, 1, use_bias=True, name="patch_embed.proj", **types)
        embed_norm = LayerNorm(name="patch_embed.norm", **types) if self.patch_norm else None
        norm = LayerNorm(name="norm", **types)
        places = None
        if self.ape:
            shape = (1, x.shape[1] * x.shape[2], self.embed_dim)
            places = self.param("absolute_pos_embed", _LINEAR_INIT, shape, self.param_dtype)

        def trunk(y, layers):
            y = embed(y)
            if embed_norm is not None:
                y = embed_norm(y)
            maps.setdefault("patch_embed", y)
            if places is not None:
                y = y + places.reshape(1, *y.shape[1:]).astype(y.dtype)
            y = dropout(
                y, self.drop_rate, self.make_rng("dropout") if train and self.drop_rate else None
            )
            for i, group in enumerate(self._groups(layers, types)):
                y = group(y, train)
                maps[f"{layers}.{i}"] = y
            return norm(y)

        body = _residual_conv(
            trunk(first, "layers"), self.resi_connection, "conv_after_body", types
        )
        maps["conv_after_body"] = body
        y = body + first

        if self.upsampler == "":
            output = restored(x + conv(y, self.in_chans, "conv_last"))
        elif self.upsampler == "pixelshuffledirect":
            output = restored(pixel_shuffle(conv(y, s * s * self.in_chans, "upsample.0"), s))
        elif self.upsampler == "pixelshuffle":
            y = nn.leaky_relu(conv(y, self.num_feat, "conv_before_upsample.0"), 0.01)
            output = restored(conv(upsampled(y, "upsample"), self.in_chans, "conv_last"))
        elif self.upsampler == "pixelshuffle_aux":
            y = nn.leaky_relu(conv(y, self.num_feat, "conv_before_upsample.0"), 0.01)
            aux = conv(y, self.in_chans, "conv_aux")
            y = nn.leaky_relu(conv(aux, self.num_feat, "conv_after_aux.0"), 0.01)
            target = (height * s, width * s)
            if not self.faithful_padding:
                target = (x.shape[1] * s, x.shape[2] * s)
            y = upsampled(y, "upsample")[:, : target[0], : target[1]]
            y = y + conv(resize(x, target, "bicubic"), self.num_feat, "conv_bicubic")
            sr = restored(conv(y, self.in_chans, "conv_last"))
            output = (sr, aux.astype(sr.dtype) / self.img_range + mean)
        elif self.upsampler == "pixelshuffle_hf":
            before = nn.leaky_relu(conv(y, self.num_feat, "conv_before_upsample.0"), 0.01)
            base = conv(upsampled(before, "upsample"), self.in_chans, "conv_last")
            y = nn.leaky_relu(conv(before, self.embed_dim, "conv_first_hf.0"), 0.01)
            y = conv(trunk(y, "layers_hf"), self.embed_dim, "conv_after_body_hf") + y
            y = nn.leaky_relu(conv(y, self.num_feat, "conv_before_upsample_hf.0"), 0.01)
            high = conv(upsampled(y, "upsample_hf"), self.in_chans, "conv_last_hf")
            output = (restored(base), restored(base + high), restored(high))
        else:
            y = nn.leaky_relu(conv(y, self.num_feat, "conv_before_upsample.0"), 0.01)
            y = nn.leaky_relu(conv(nearest_upsample(y, 2), self.num_feat, "conv_up1"), 0.2)
            y = nn.leaky_relu(conv(nearest_upsample(y, 2), self.num_feat, "conv_up2"), 0.2)
            y = nn.leaky_relu(conv(y, self.num_feat, "conv_hr"), 0.2)
            output = restored(conv(y, self.in_chans, "conv_last"))
        maps["output"] = output
        return maps

    def _groups(self, prefix: str, types: Mapping[str, Any]):
        total = sum(self.depths)
        rates = np.linspace(0, self.drop_path_rate, total).tolist() if total else []
        start = 0
        for i, (depth, heads) in enumerate(zip(self.depths, self.num_heads)):
            yield ResidualGroup(
                heads,
                self.block_window,
                tuple(self.shift_of(j) for j in range(depth)),
                tuple(rates[start : start + depth]),
                self.mlp_ratio,
                self.qkv_bias,
                self.drop_rate,
                self.attn_drop_rate,
                self.resi_connection,
                self.use_checkpoint,
                self.cpb_hidden,
                name=f"{prefix}.{i}",
                **types,
            )
            start += depth


def sr_of(output):
    """The super-resolved image of what a model returned: of tuples the one meant for use."""
    if isinstance(output, tuple):
        return output[1] if len(output) == 3 else output[0]
    return output


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _check_arguments(module: Swin2SR) -> None:
    if module.upsampler not in UPSAMPLERS:
        raise ValueError(
            f"upsampler {module.upsampler!r}; known: "
            + ", ".join(repr(name) for name in UPSAMPLERS)
        )
    if module.upsampler == "":
        if module.upscale != 1:
            raise ValueError(
                f"upscale must be 1 without an upsampler (artifact removal), not {module.upscale}"
            )
    elif module.upscale not in SCALES:
        raise ValueError(f"upscale must be one of {SCALES}, not {module.upscale}")
    if module.upsampler == "nearest+conv" and module.upscale != 4:
        raise ValueError(f"upsampler 'nearest+conv' is for upscale 4 only, not {module.upscale}")
    if module.upsampler == "pixelshuffle_aux" and module.in_chans != 3:
        raise ValueError(f"upsampler 'pixelshuffle_aux' needs in_chans 3, not {module.in_chans}")
    if module.resi_connection not in ("1conv", "3conv"):
        raise ValueError(
            f"resi_connection must be '1conv' or '3conv', not {module.resi_connection!r}"
        )
    if len(module.depths) != len(module.num_heads):
        raise ValueError(
            f"depths {module.depths} and num_heads {module.num_heads} must have one number a group"
        )
    for heads in module.num_heads:
        if module.embed_dim % heads:
            raise ValueError(
                f"embed_dim {module.embed_dim} must divide by num_heads {heads} of every group"
            )
    if module.block_window < 2:
        raise ValueError(
            f"img_size {module.img_size} and window_size {module.window_size} must be at least 2"
        )


MODEL = Swin2SR

_LARGE = {"embed_dim": 180, "depths": (6,) * 6, "num_heads": (6,) * 6, "mlp_ratio": 2.0}
_X4 = {**_LARGE, "window_size": 8, "upscale": 4}
_JPEG = {**_LARGE, "window_size": 7, "upscale": 1, "upsampler": "", "img_range": 255.0}

VARIANTS: dict[str, dict[str, Any]] = {
    "compressed_sr_x4_48": {**_X4, "img_size": 48, "upsampler": "pixelshuffle_aux"},
    "classical_sr_x2_64": {**_X4, "upscale": 2, "img_size": 64, "upsampler": "pixelshuffle"},
    "classical_sr_x4_64": {**_X4, "img_size": 64, "upsampler": "pixelshuffle"},
    "lightweight_x2_64": {
        "embed_dim": 60,
        "depths": (6,) * 4,
        "num_heads": (6,) * 4,
        "mlp_ratio": 2.0,
        "window_size": 8,
        "upscale": 2,
        "img_size": 64,
        "upsampler": "pixelshuffledirect",
    },
    "realworld_sr_x4_64": {**_X4, "img_size": 64, "upsampler": "nearest+conv"},
    "realworld_sr_x4_64_large": {
        "embed_dim": 240,
        "depths": (6,) * 9,
        "num_heads": (8,) * 9,
        "mlp_ratio": 2.0,
        "window_size": 8,
        "upscale": 4,
        "img_size": 64,
        "upsampler": "nearest+conv",
        "resi_connection": "3conv",
    },
    "jpeg_gray": {**_JPEG, "img_size": 126, "in_chans": 1},
    "jpeg_color": {**_JPEG, "img_size": 126, "in_chans": 3},
}

# What the official modules register as buffers, all functions of the constructor arguments.
_BUFFER = re.compile(r".*\.(attn\.relative_coords_table|attn\.relative_position_index|attn_mask)$")


def upgrade_checkpoint(state: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """The state dict without the buffers, which are recomputed; those given are verified.

    `attn_mask` has the size of the training images and is dropped unread. Raises ValueError where a
    buffer belongs to another window.
    """
    if not isinstance(module, Swin2SR):
        return state
    window = module.block_window
    kept = {}
    for key, value in state.items():
        if not _BUFFER.match(f".{key}"):
            kept[key] = value
            continue
        if key.endswith("relative_coords_table"):
            wanted, close = relative_coords_table(window), 1e-5
        elif key.endswith("relative_position_index"):
            wanted, close = relative_position_index(window), 0
        else:
            continue
        value = np.asarray(value)
        if value.shape != wanted.shape or not np.allclose(value, wanted, rtol=0, atol=close):
            raise ValueError(
                f"checkpoint buffer {key} {list(value.shape)} is not that of window_size "
                f"{window} (img_size {module.img_size}), which has {list(wanted.shape)}"
            )
    return kept


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """The buffers that a strict PyTorch load wants back, recomputed on export."""
    if not isinstance(module, Swin2SR):
        return {}
    fresh: dict[str, Any] = {}
    window = module.block_window
    height, width = _pair(module.img_size)
    trunks = ("layers", "layers_hf") if module.upsampler == "pixelshuffle_hf" else ("layers",)
    for trunk in trunks:
        for i, depth in enumerate(module.depths):
            for j in range(depth):
                block = f"{trunk}.{i}.residual_group.blocks.{j}"
                fresh[f"{block}.attn.relative_coords_table"] = relative_coords_table(window)
                fresh[f"{block}.attn.relative_position_index"] = relative_position_index(window)
                shift = module.shift_of(j)
                if shift and height % window == 0 and width % window == 0:
                    fresh[f"{block}.attn_mask"] = functools.partial(
                        _mask_buffer, height, width, window, shift
                    )
    return {"fresh": fresh}


def _mask_buffer(height, width, window, shift, variables) -> np.ndarray:
    del variables
    return np.asarray(shifted_window_mask(height, width, window, shift), np.float32)
