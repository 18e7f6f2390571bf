"""Residual networks: the 32x32 variants of CIFAR papers and the ImageNet form.

K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", arXiv 1512.03385.
CIFAR stem and names after kuangliu/pytorch-cifar@49b7aa9 (`models/resnet.py`, projections named
`shortcut`, classifier `linear`) and PRIS-CV/DS-UI@cd6ca57 (`model_resnet.py`, LeakyReLU 0.2,
projections named `downsample`); the ImageNet form has torchvision's and timm's names (`fc`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.layers.initializers import kaiming_normal_fan_out
from jaxmodels.layers.normalization import BatchNorm
from jaxmodels.vision.images import check_images

STEMS = ("cifar", "imagenet")
BLOCKS = ("basic", "bottleneck")
PROJECTIONS = ("downsample", "shortcut")


def stages_of(layers: Sequence[int]) -> tuple[str, ...]:
    """Names of the maps after each stage: `layer1`, `layer2`, ..."""
    return tuple(f"layer{i + 1}" for i in range(len(layers)))


def rectifier(x: jax.Array, leaky: float) -> jax.Array:
    """ReLU, or LeakyReLU with slope `leaky` below zero."""
    return nn.leaky_relu(x, leaky) if leaky else nn.relu(x)


class ResidualBlock(nn.Module):
    """x [B, H, W, I] -> [B, H / stride, W / stride, features * expansion].

    `basic`: conv3x3(stride), BN, act, conv3x3, BN. `bottleneck`: conv1x1, BN, act,
    conv3x3(stride), BN, act, conv1x1 to four times the width, BN. Then the identity, or a
    projection (1x1 convolution with the stride, BN) where shapes differ, and the activation.
    """

    features: int
    stride: int = 1
    block: str = "basic"
    leaky: float = 0.0
    projection: str = "downsample"
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        bottleneck = self.block == "bottleneck"
        out = self.features * (4 if bottleneck else 1)

        def conv(y, name, features, size, stride=1):
            init = kaiming_normal_fan_out()
            return Conv(features, size, stride, kernel_init=init, name=name, **types)(y)

        def norm(y, name):
            bn = dict(epsilon=self.bn_eps, momentum=self.bn_momentum, axis_name=self.bn_axis_name)
            return BatchNorm(name=name, **bn, **types)(y, train)

        if bottleneck:
            y = rectifier(norm(conv(x, "conv1", self.features, 1), "bn1"), self.leaky)
            y = conv(y, "conv2", self.features, 3, self.stride)
            y = rectifier(norm(y, "bn2"), self.leaky)
            y = norm(conv(y, "conv3", out, 1), "bn3")
        else:
            y = conv(x, "conv1", self.features, 3, self.stride)
            y = rectifier(norm(y, "bn1"), self.leaky)
            y = norm(conv(y, "conv2", out, 3), "bn2")
        if self.stride > 1 or x.shape[-1] != out:
            x = conv(x, f"{self.projection}.0", out, 1, self.stride)
            x = norm(x, f"{self.projection}.1")
        return rectifier(y + x, self.leaky)


class ResNet(nn.Module):
    """Images [B, H, W, 3] -> logits [B, num_classes], or the maps of all stages.

    Attributes:
      layers: blocks of each stage, officially four.
      width: channels of the stem and of the first stage's blocks; doubled at each later stage.
      stem: `cifar` (3x3 convolution, stride 1, no pooling) or `imagenet` (7x7, stride 2, max-pool).
      leaky: slope of the activation below zero; 0 is ReLU.
      projection: the checkpoint's name of projections, `downsample` or `shortcut`; files with
        either are read.
      classifier: the checkpoint's name of the classifier, `linear` or `fc`.
      dropout: before the classifier; with `rngs={"dropout": ...}` and `train=False`,
        `sample_dropout` still draws it (Monte Carlo dropout).
      features_only: return the maps of layer1, layer2, ... and have no classifier.
    """

    layers: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    block: str = "basic"
    stem: str = "cifar"
    leaky: float = 0.0
    projection: str = "shortcut"
    classifier: str = "linear"
    num_classes: int = 10
    dropout: float = 0.0
    features_only: bool = False
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for what, value, known in (
            ("block", self.block, BLOCKS),
            ("stem", self.stem, STEMS),
            ("projection", self.projection, PROJECTIONS),
        ):
            if value not in known:
                raise ValueError(f"ResNet {what} {value!r}; known: {', '.join(known)}")
        if not self.layers or min(self.layers) < 1:
            raise ValueError(f"ResNet layers must be positive counts, got {self.layers}")
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, 32, 32, 3]."""
        return (jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, sample_dropout: bool = False):
        check_images(x)
        least = 2 ** len(self.layers)
        if min(x.shape[1:3]) < least:
            raise ValueError(
                f"a ResNet of {len(self.layers)} stages needs images of at least {least}x{least}, "
                f"got {x.shape[1]}x{x.shape[2]}"
            )
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        bn = dict(bn_eps=self.bn_eps, bn_momentum=self.bn_momentum, bn_axis_name=self.bn_axis_name)
        size, stride = (3, 1) if self.stem == "cifar" else (7, 2)
        init = kaiming_normal_fan_out()
        x = Conv(self.width, size, stride, kernel_init=init, name="conv1", **types)(x)
        x = BatchNorm(self.bn_eps, self.bn_momentum, self.bn_axis_name, name="bn1", **types)(
            x, train
        )
        x = rectifier(x, self.leaky)
        if self.stem == "imagenet":
            x = max_pool(x, 3, 2, 1)
        maps = []
        for stage, (name, blocks) in enumerate(zip(stages_of(self.layers), self.layers)):
            for i in range(blocks):
                x = ResidualBlock(
                    self.width * 2**stage,
                    2 if i == 0 and stage else 1,
                    self.block,
                    self.leaky,
                    self.projection,
                    name=f"{name}.{i}",
                    **bn,
                    **types,
                )(x, train)
            maps.append(x)
        if self.features_only:
            return tuple(maps)
        x = x.mean((1, 2))
        silent = not (train or sample_dropout)
        x = nn.Dropout(self.dropout, deterministic=silent)(x)
        return Linear(self.num_classes, name=self.classifier, **types)(x)


def max_pool(x: jax.Array, size: int, stride: int, pad: int = 0) -> jax.Array:
    """PyTorch's max-pool of x [B, H, W, C], padded with minus infinity."""
    return nn.max_pool(x, (size, size), (stride, stride), ((pad, pad), (pad, pad)))


def projection_spelling(projection: str) -> list[tuple[str, str]]:
    """`spellings` of TORCH_RULES that read projections under either name."""
    return [(r"(^|\.)(?:shortcut|downsample)\.(\d+)\.", rf"\g<1>{projection}.\g<2>.")]


MODEL = ResNet

VARIANTS: dict[str, dict[str, Any]] = {
    "resnet18_cifar": {},
    "resnet18_dsui": {"leaky": 0.2, "projection": "downsample"},
    "resnet34_cifar": {"layers": (3, 4, 6, 3)},
    "resnet50_cifar": {"layers": (3, 4, 6, 3), "block": "bottleneck"},
    "resnet50": {
        "layers": (3, 4, 6, 3),
        "block": "bottleneck",
        "stem": "imagenet",
        "projection": "downsample",
        "classifier": "fc",
        "num_classes": 1000,
    },
}


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """Both names of projections; a network without a classifier leaves the classifier unread."""
    rules: dict[str, Any] = {
        "spellings": projection_spelling(getattr(module, "projection", "downsample"))
    }
    if getattr(module, "features_only", False):
        rules["drops"] = [r"(linear|fc|classifier)\..*"]
    return rules
