"""ConvNeXt with timm's names; the authors' own files are read as well.

Z. Liu et al., "A ConvNet for the 2020s", arXiv 2201.03545. Structure and names after timm 1.0.31
(`models/convnext.py`); facebookresearch/ConvNeXt's names differ and are translated on loading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.activations import gelu
from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.layers.dropout import drop_path
from jaxmodels.layers.normalization import LayerNorm
from jaxmodels.vision.images import check_images

EPSILON = 1e-6
LAYER_SCALE = 1e-6  # of `gamma` when fresh
_INIT = dict(
    kernel_init=nn.initializers.truncated_normal(0.02), bias_init=nn.initializers.zeros
)  # not PyTorch's defaults


class ConvNeXt(nn.Module):
    """Images [B, H, W, 3] -> logits [B, num_classes].

    Attributes:
      depths, dims: blocks and channels of the stages; each but the first halves the map before it.
      patch_size: kernel and stride of the stem (4).
      num_classes: 0 leaves the head out, and a call then gives the pooled, normalized feature.
      dropout: before the classifier. drop_path_rate: stochastic depth, growing linearly to this
        rate at the last block.
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    num_classes: int = 1000
    patch_size: int = 4
    dropout: float = 0.0
    drop_path_rate: float = 0.0
    bn_axis_name: str | None = None  # taken for uniformity: there is no batch normalization
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.dims) or min((*self.depths, *self.dims)) < 1:
            raise ValueError(
                f"depths {tuple(self.depths)} and dims {tuple(self.dims)} must be positive, one "
                "entry a stage"
            )
        super().__post_init__()

    @property
    def stride(self) -> int:
        """Of the last map."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, 64, 64, 3]."""
        return (jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32),)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits [B, num_classes], or the feature [B, dims[-1]] without a head."""
        maps = self.intermediates(x, train)
        return maps["logits"] if self.num_classes else maps["feature"]

    @nn.compact
    def intermediates(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """`stem`, `stages.0` .. (maps), `feature` and, with classes, `logits`."""
        check_images(x)
        if min(x.shape[1:3]) < self.stride:
            raise ValueError(
                f"ConvNeXt with {len(self.depths)} stages needs images of at least "
                f"{self.stride}x{self.stride}, got {x.shape[1]}x{x.shape[2]}"
            )
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def patches(y, features, size, name):
            return Conv(features, size, size, 0, use_bias=True, name=name, **_INIT, **types)(y)

        x = patches(x, self.dims[0], self.patch_size, "stem.0")
        x = LayerNorm(EPSILON, name="stem.1", **types)(x)
        maps = {"stem": x}
        total, done = sum(self.depths), 0
        for s, (depth, width) in enumerate(zip(self.depths, self.dims)):
            if s:
                x = LayerNorm(EPSILON, name=f"stages.{s}.downsample.0", **types)(x)
                x = patches(x, width, 2, f"stages.{s}.downsample.1")
            for b in range(depth):
                drop = self.drop_path_rate * done / max(total - 1, 1)
                x = _Block(drop, name=f"stages.{s}.blocks.{b}", **types)(x, train)
                done += 1
            maps[f"stages.{s}"] = x
        feature = LayerNorm(EPSILON, name="head.norm", **types)(x.mean((1, 2)))
        maps["feature"] = feature
        if self.num_classes:
            kept = nn.Dropout(self.dropout, deterministic=not train)(feature)
            maps["logits"] = Linear(self.num_classes, name="head.fc", **_INIT, **types)(kept)
        return maps


class _Block(nn.Module):
    """x + gamma * fc2(gelu(fc1(LN(depthwise 7x7 of x)))), x [B, H, W, C], hidden width 4 C."""

    drop: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        width = x.shape[-1]
        y = Conv(width, 7, groups=width, use_bias=True, name="conv_dw", **_INIT, **types)(x)
        y = LayerNorm(EPSILON, name="norm", **types)(y)
        y = gelu(Linear(4 * width, name="mlp.fc1", **_INIT, **types)(y))
        y = Linear(width, name="mlp.fc2", **_INIT, **types)(y)
        start = nn.initializers.constant(LAYER_SCALE)
        y = y * self.param("gamma", start, (width,), self.param_dtype).astype(self.dtype)
        drawn = self.make_rng("dropout") if train and self.drop else None
        return x + drop_path(y, self.drop, drawn)


MODEL = ConvNeXt

VARIANTS: dict[str, dict[str, Any]] = {
    "convnext_tiny": {},
    "convnext_small": {"depths": (3, 3, 27, 3)},
    "convnext_base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
    "convnext_large": {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)},
    "convnext_xlarge": {"depths": (3, 3, 27, 3), "dims": (256, 512, 1024, 2048)},
}

# facebookresearch/ConvNeXt -> timm, in this order.
_OFFICIAL = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^downsample_layers\.(\d+)\.(\d+)\.", r"stages.\1.downsample.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^norm\.", "head.norm."),
)


def upgrade_checkpoint(state: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """The authors' names as timm's; other files are returned as they are."""
    del module
    if "downsample_layers.0.0.weight" not in state:
        return state
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in _OFFICIAL:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed
