"""IResNet, the face-recognition ResNet of InsightFace, with its 112x112 embedding head.

J. Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", arXiv 1801.07698.
Structure and names after deepinsight/insightface@7fadd42
(`recognition/arcface_torch/backbones/iresnet.py`); pixels are `(x / 255 - 0.5) / 0.5`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.layers.normalization import BatchNorm
from jaxmodels.vision.images import check_images
from jaxmodels.vision.resnet import stages_of

FINAL_STRIDE = 16


class PReLU(nn.Module):
    """max(x, 0) + weight * min(x, 0) with one learned slope a channel, x [..., C]."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(0.25)
        weight = self.param("weight", init, (x.shape[-1],), self.param_dtype)
        return jnp.where(x >= 0, x, x * weight.astype(self.dtype))


def _embedding_conv(std: float = 0.1):
    # The official initialization of every convolution.
    return nn.initializers.normal(std)


class IBasicBlock(nn.Module):
    """BN, conv3x3, BN, PReLU, conv3x3(stride), BN, plus the shortcut; no activation after it.

    x [B, H, W, I] -> [B, H / stride, W / stride, features].
    """

    features: int
    stride: int = 1
    project: bool = False
    bn_eps: float = 1e-5
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def norm(y, name):
            bn = BatchNorm(self.bn_eps, axis_name=self.bn_axis_name, name=name, **types)
            return bn(y, train)

        init = _embedding_conv()
        y = norm(x, "bn1")
        y = Conv(self.features, 3, kernel_init=init, name="conv1", **types)(y)
        y = PReLU(name="prelu", **types)(norm(y, "bn2"))
        y = Conv(self.features, 3, self.stride, kernel_init=init, name="conv2", **types)(y)
        y = norm(y, "bn3")
        if self.project:
            x = Conv(self.features, 1, self.stride, kernel_init=init, name="downsample.0", **types)(
                x
            )
            x = norm(x, "downsample.1")
        return y + x


class IResNet(nn.Module):
    """Aligned faces [B, 112, 112, 3], scaled to [-1, 1] -> embeddings [B, num_features].

    Every stage halves the side, rounded up, in its first block. The final map is flattened in the
    checkpoint's order (C, H, W). The last BatchNorm's weight stays 1 (`features.weight`): freeze it
    with `config.optimizer.freeze`. Embeddings are not normalized; see
    `margin_losses.cosine_logits`.

    Attributes:
      layers: blocks of the four stages. width: channels of the stem and the first stage.
      input: (height, width) that the linear layer is built for.
    """

    layers: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    num_features: int = 512
    input: tuple[int, int] = (112, 112)
    dropout: float = 0.0
    bn_eps: float = 1e-5
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        height, width = self.input
        if min(height, width) < FINAL_STRIDE:
            raise ValueError(
                f"IResNet input sides must be at least {FINAL_STRIDE}, got {height}x{width}"
            )
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: faces [1, *input, 3]."""
        return (jax.ShapeDtypeStruct((1, *self.input, 3), jnp.float32),)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Embeddings [B, num_features]."""
        return self.intermediates(x, train)["embedding"]

    @nn.compact
    def intermediates(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """`stem`, `layer1` .. `layer4` (maps before `bn2`) and `embedding`."""
        check_images(x)
        if tuple(x.shape[1:3]) != tuple(self.input):
            raise ValueError(
                f"this IResNet takes aligned faces of {self.input[0]}x{self.input[1]} pixels, "
                f"got {x.shape[1]}x{x.shape[2]}"
            )
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = dict(axis_name=self.bn_axis_name, **types)
        maps = {}
        x = Conv(self.width, 3, kernel_init=_embedding_conv(), name="conv1", **types)(x)
        x = BatchNorm(self.bn_eps, name="bn1", **norm)(x, train)
        x = maps["stem"] = PReLU(name="prelu", **types)(x)
        for stage, (name, blocks) in enumerate(zip(stages_of(self.layers), self.layers)):
            for i in range(blocks):
                x = IBasicBlock(
                    self.width * 2**stage,
                    2 if i == 0 else 1,
                    i == 0,
                    self.bn_eps,
                    self.bn_axis_name,
                    name=f"{name}.{i}",
                    **types,
                )(x, train)
            maps[name] = x
        x = BatchNorm(self.bn_eps, name="bn2", **norm)(x, train)
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = Linear(self.num_features, name="fc", **types)(x)
        x = BatchNorm(self.bn_eps, name="features", **norm)(x, train)
        maps["embedding"] = x
        return maps


MODEL = IResNet

VARIANTS: dict[str, dict[str, Any]] = {
    "iresnet18": {"layers": (2, 2, 2, 2)},
    "iresnet34": {"layers": (3, 4, 6, 3)},
    "iresnet50": {"layers": (3, 4, 14, 3)},
    "iresnet100": {"layers": (3, 13, 30, 3)},
    "iresnet200": {"layers": (6, 26, 60, 6)},
}
