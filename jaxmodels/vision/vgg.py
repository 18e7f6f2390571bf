"""VGG with batch normalization for 32x32 images.

K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
arXiv 1409.1556. Layout and names after kuangliu/pytorch-cifar@49b7aa9 (`models/vgg.py`):
`features.{i}` counts convolutions (with bias), BatchNorms, ReLUs and pools in sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.layers.normalization import BatchNorm
from jaxmodels.vision.images import check_images
from jaxmodels.vision.resnet import max_pool

VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
VGG13 = (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
VGG16 = (
    *(64, 64, "M", 128, 128, "M", 256, 256, 256, "M"),
    *(512, 512, 512, "M", 512, 512, 512, "M"),
)
VGG19 = (
    *(64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M"),
    *(512, 512, 512, 512, "M", 512, 512, 512, 512, "M"),
)


def pools_of(cfg: Sequence[int | str]) -> tuple[str, ...]:
    """Names of the maps after each max-pool: `pool1`, `pool2`, ..."""
    return tuple(f"pool{i + 1}" for i in range(sum(item == "M" for item in cfg)))


def check_vgg(cfg: Sequence[int | str], x: jax.Array) -> None:
    """Refuse layouts that are none and images that some max-pool would leave nothing of."""
    wrong = [item for item in cfg if item != "M" and not (isinstance(item, int) and item > 0)]
    if wrong or "M" not in cfg:
        raise ValueError(f'VGG cfg is widths and "M" for max-pools, got {tuple(cfg)}')
    check_images(x)
    unit = 2 ** len(pools_of(cfg))
    if x.shape[1] % unit or x.shape[2] % unit:
        raise ValueError(
            f"VGG with {len(pools_of(cfg))} max-pools needs sides that are multiples of {unit} "
            f"(at least {unit}), got {x.shape[1]}x{x.shape[2]}"
        )


def vgg_maps(
    x: jax.Array, cfg: Sequence[int | str], train: bool, norm: dict[str, Any], types: dict[str, Any]
) -> list[jax.Array]:
    """Maps after each max-pool, x [B, H, W, 3]; layers become children of the calling module.

    `norm` are the BatchNorms' arguments, `types` the two dtypes.
    """
    maps, i = [], 0
    for item in cfg:
        if item == "M":
            x = max_pool(x, 2, 2)
            maps.append(x)
            i += 1
            continue
        x = Conv(item, 3, use_bias=True, name=f"features.{i}", **types)(x)
        x = nn.relu(BatchNorm(name=f"features.{i + 1}", **norm, **types)(x, train))
        i += 3
    return maps


class VGG(nn.Module):
    """Images [B, H, W, 3] -> logits [B, num_classes] (the last map averaged over space).

    pytorch-cifar flattens the last map, which at 32x32 is 1x1: there the two agree.
    `features_only` returns the maps after each max-pool.
    """

    cfg: tuple[int | str, ...] = VGG16
    num_classes: int = 10
    dropout: float = 0.0
    features_only: bool = False
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, 32, 32, 3]."""
        return (jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, sample_dropout: bool = False):
        check_vgg(self.cfg, x)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = dict(epsilon=self.bn_eps, momentum=self.bn_momentum, axis_name=self.bn_axis_name)
        maps = vgg_maps(x, self.cfg, train, norm, types)
        if self.features_only:
            return tuple(maps)
        x = maps[-1].mean((1, 2))
        silent = not (train or sample_dropout)
        x = nn.Dropout(self.dropout, deterministic=silent)(x)
        return Linear(self.num_classes, name="classifier", **types)(x)


MODEL = VGG

VARIANTS: dict[str, dict[str, Any]] = {
    "vgg11_bn_cifar": {"cfg": VGG11},
    "vgg13_bn_cifar": {"cfg": VGG13},
    "vgg16_bn_cifar": {"cfg": VGG16},
    "vgg19_bn_cifar": {"cfg": VGG19},
}


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """A network without a classifier leaves the classifier's keys unread."""
    return {"drops": [r"classifier\..*"]} if getattr(module, "features_only", False) else {}
