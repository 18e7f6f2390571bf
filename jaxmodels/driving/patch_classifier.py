"""ResNet on image patches: what an object is, and optionally how its box should be corrected.

K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning", CVPR 2016, with the names and the layout
of huggingface/transformers `models/resnet` (a bottleneck's stride sits in its 3x3); torchvision's
names are read too. The paper of the pipeline, arXiv 2111.09799, does not say which network it ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.layers.activations import ACTIVATIONS
from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.layers.normalization import BatchNorm
from jaxmodels.vision.images import IMAGENET_MEAN, IMAGENET_STD, check_images

CLASSES = ("vehicle", "pedestrian", "cyclist", "sign", "background")
BACKGROUND = CLASSES.index("background")
LAYER_TYPES = ("basic", "bottleneck")
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, activation; x [B, H, W, I] -> [B, H', W', features]."""

    features: int
    kernel_size: int = 3
    strides: int = 1
    activation: str | None = "relu"
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Conv(
            self.features,
            self.kernel_size,
            self.strides,
            kernel_init=_KERNEL_INIT,
            name="convolution",
            **types,
        )(x)
        norm = BatchNorm(axis_name=self.bn_axis_name, name="normalization", **types)
        x = norm(x, train)
        return x if self.activation is None else ACTIVATIONS[self.activation](x)


class ResidualLayer(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 at a quarter of the width, beside a shortcut.

    x [B, H, W, I] -> [B, ceil(H / strides), ceil(W / strides), features]. `activation` follows the
    sum; within the layer it is ReLU always, as in huggingface's.
    """

    features: int
    strides: int = 1
    layer_type: str = "basic"
    activation: str = "relu"
    reduction: int = 4
    downsample_in_bottleneck: bool = False
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(bn_axis_name=self.bn_axis_name, dtype=self.dtype, param_dtype=self.param_dtype)
        if self.layer_type == "basic":
            layers = [
                ConvNorm(self.features, 3, self.strides, name="layer.0", **types),
                ConvNorm(self.features, 3, activation=None, name="layer.1", **types),
            ]
        else:
            narrow = self.features // self.reduction
            first, second = (
                (self.strides, 1) if self.downsample_in_bottleneck else (1, self.strides)
            )
            layers = [
                ConvNorm(narrow, 1, first, name="layer.0", **types),
                ConvNorm(narrow, 3, second, name="layer.1", **types),
                ConvNorm(self.features, 1, activation=None, name="layer.2", **types),
            ]
        y = x
        for layer in layers:
            y = layer(y, train)
        if x.shape[-1] != self.features or self.strides != 1:
            x = ConvNorm(self.features, 1, self.strides, activation=None, name="shortcut", **types)(
                x, train
            )
        return ACTIVATIONS[self.activation](x + y)


class ResNet(nn.Module):
    """Stem and four stages; images [B, H, W, C] -> tuple of maps, the stem's first.

    Strides of the maps: 4, 4, 8, 16, 32 (with `downsample_in_first_stage` 4, 8, 16, 32, 64).
    """

    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    layer_type: str = "basic"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        types = dict(bn_axis_name=self.bn_axis_name, dtype=self.dtype, param_dtype=self.param_dtype)
        x = ConvNorm(
            self.embedding_size,
            7,
            2,
            activation=self.hidden_act,
            name="embedder.embedder",
            **types,
        )(x, train)
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        maps = [x]
        for stage, (features, depth) in enumerate(zip(self.hidden_sizes, self.depths)):
            halves = stage > 0 or self.downsample_in_first_stage
            for block in range(depth):
                x = ResidualLayer(
                    features,
                    2 if halves and block == 0 else 1,
                    self.layer_type,
                    self.hidden_act,
                    downsample_in_bottleneck=self.downsample_in_bottleneck and block == 0,
                    name=f"encoder.stages.{stage}.layers.{block}",
                    **types,
                )(x, train)
            maps.append(x)
        return tuple(maps)


class PatchClassifier(nn.Module):
    """Image patches [B, S, S, 3] -> class logits [B, num_labels].

    The last class is the background. With `box_head` the result is (logits, deltas [B, 4]): shift
    of the center over the size, log of the ratio of sizes (x, y each), see `refine_boxes`.
    `normalize` takes images in 0..1 and standardizes them as ImageNet recipes do. `bn_axis_name`
    synchronizes BatchNorm over a mapped axis (`pmap`).

    Raises ValueError for widths, depths or a layer type that cannot be meant.
    """

    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    layer_type: str = "basic"
    num_labels: int = len(CLASSES)
    hidden_act: str = "relu"
    num_channels: int = 3
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False
    box_head: bool = False
    normalize: bool = False
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        check_resnet(self)
        if self.num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {self.num_labels}")
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: patches [1, 64, 64, 3]."""
        return (jax.ShapeDtypeStruct((1, 64, 64, self.num_channels), jnp.float32),)

    def __call__(self, x: jax.Array, train: bool = False):
        """Logits [B, num_labels], with `box_head` also deltas [B, 4]."""
        maps = self.intermediates(x, train)
        return (maps["logits"], maps["deltas"]) if self.box_head else maps["logits"]

    @nn.compact
    def intermediates(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """`hidden_0` (stem) to `hidden_4`, `logits`, with `box_head` `deltas`."""
        if self.num_channels == 3:
            check_images(x)
        if self.normalize:
            x = standardize(x)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        maps = ResNet(
            self.embedding_size,
            tuple(self.hidden_sizes),
            tuple(self.depths),
            self.layer_type,
            self.hidden_act,
            self.downsample_in_first_stage,
            self.downsample_in_bottleneck,
            self.bn_axis_name,
            name="resnet",
            **types,
        )(x, train)
        outputs = {f"hidden_{i}": y for i, y in enumerate(maps)}
        pooled = maps[-1].mean((1, 2))
        outputs["logits"] = Linear(self.num_labels, name="classifier.1", **types)(pooled)
        if self.box_head:
            # Fresh heads leave boxes as they are.
            zeros = dict(kernel_init=nn.initializers.zeros, bias_init=nn.initializers.zeros)
            outputs["deltas"] = Linear(4, name="box_head", **zeros, **types)(pooled)
        return outputs


def check_resnet(module: Any) -> None:
    """Refuse widths, depths, layer types and activations that no network has."""
    if len(module.hidden_sizes) != len(module.depths):
        raise ValueError(
            f"hidden_sizes {tuple(module.hidden_sizes)} and depths {tuple(module.depths)} must "
            "have one entry a stage"
        )
    if min((module.embedding_size, *module.hidden_sizes, *module.depths)) < 1:
        raise ValueError("embedding_size, hidden_sizes and depths must be positive")
    if module.layer_type not in LAYER_TYPES:
        raise ValueError(f"layer_type {module.layer_type!r}: known are {', '.join(LAYER_TYPES)}")
    if module.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act {module.hidden_act!r}: known are {', '.join(ACTIVATIONS)}")


def standardize(x: jax.Array) -> jax.Array:
    """Images in 0..1 with ImageNet's mean and deviation taken out, channels last."""
    mean, std = jnp.asarray(IMAGENET_MEAN, x.dtype), jnp.asarray(IMAGENET_STD, x.dtype)
    return (x - mean) / std


def box_deltas(boxes: jax.Array, targets: jax.Array) -> jax.Array:
    """What `box_head` should say so that `refine_boxes(boxes, ...)` gives `targets`; [N, 4]."""
    xp = boxes.__array_namespace__()
    center, size = _center_size(boxes)
    aim, extent = _center_size(targets)
    size = xp.maximum(size, 1e-3)
    ratio = xp.maximum(extent, 1e-3) / size
    return xp.concatenate([(aim - center) / size, xp.log(ratio)], axis=-1)


def refine_boxes(boxes: jax.Array, deltas: jax.Array) -> jax.Array:
    """Boxes [N, 4] moved by deltas [N, 4]: center + d size, size exp(d)."""
    center, size = _center_size(boxes)
    center = center + deltas[:, :2] * size
    half = size * jnp.exp(jnp.clip(deltas[:, 2:], -4, 4)) / 2
    return jnp.concatenate([center - half, center + half], axis=-1)


def _center_size(boxes):
    return (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]


MODEL = PatchClassifier

VARIANTS: dict[str, dict[str, Any]] = {
    "patch_resnet18": {"normalize": True},
    "patch_tiny": {
        "embedding_size": 16,
        "hidden_sizes": (16, 32, 64, 128),
        "depths": (1, 1, 1, 1),
        "normalize": True,
    },
}


def torchvision_names(depths: tuple[int, ...]) -> list[tuple[str, str]]:
    """(torchvision's, huggingface's) prefixes of every layer of a ResNet."""
    pairs = [
        ("conv1", "resnet.embedder.embedder.convolution"),
        ("bn1", "resnet.embedder.embedder.normalization"),
        ("fc", "classifier.1"),
    ]
    for stage, depth in enumerate(depths):
        for block in range(depth):
            theirs = f"layer{stage + 1}.{block}"
            ours = f"resnet.encoder.stages.{stage}.layers.{block}"
            pairs += [
                (f"{theirs}.downsample.0", f"{ours}.shortcut.convolution"),
                (f"{theirs}.downsample.1", f"{ours}.shortcut.normalization"),
            ]
            for i in range(3):
                pairs += [
                    (f"{theirs}.conv{i + 1}", f"{ours}.layer.{i}.convolution"),
                    (f"{theirs}.bn{i + 1}", f"{ours}.layer.{i}.normalization"),
                ]
    return pairs


def upgrade_checkpoint(state: Mapping[str, Any], module: Any) -> Mapping[str, Any]:
    """torchvision's state dicts under huggingface's names; any other is returned as it is."""
    if "conv1.weight" not in state or not hasattr(module, "depths"):
        return state
    return _renamed(state, dict(torchvision_names(tuple(module.depths))))


def to_torchvision(state: Mapping[str, np.ndarray], depths: tuple[int, ...]) -> dict[str, Any]:
    """An exported state dict under torchvision's names."""
    return _renamed(state, {ours: theirs for theirs, ours in torchvision_names(depths)})


def _renamed(state, names: Mapping[str, str]) -> dict[str, Any]:
    renamed = {}
    for key, value in state.items():
        prefix, _, leaf = key.rpartition(".")
        renamed[f"{names.get(prefix, prefix)}.{leaf}"] = value
    return renamed
