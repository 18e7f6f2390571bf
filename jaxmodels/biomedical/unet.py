"""U-Nets of nnU-Net: plain and residual encoders in two and three dimensions.

F. Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image
segmentation", Nature Methods 2021, and "nnU-Net Revisited", arXiv 2404.09556. Structure and names
after dynamic-network-architectures 0.4.4 (`architectures/unet.py`, `building_blocks/`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.layers.convolution import Linear
from jaxmodels.layers.volumes import InstanceNorm, UpConv, VolumeConv, average_pool


def _ceil_to(size: int, divisor: int) -> int:
    return -(-size // divisor) * divisor


class ConvNormAct(nn.Module):
    """Convolution, instance normalization and (unless `activate` is off) LeakyReLU.

    x [B, *S, I] -> [B, *(S / strides), features]; children `conv` and `norm`.
    """

    features: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    use_bias: bool = True
    activate: bool = True
    epsilon: float = 1e-5
    negative_slope: float = 0.01
    zero_scale: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        conv = (self.features, self.kernel_size, self.strides, self.use_bias)
        x = VolumeConv(*conv, name="conv", **types)(x)
        init = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        x = InstanceNorm(self.epsilon, init, name="norm", **types)(x)
        return nn.leaky_relu(x, self.negative_slope) if self.activate else x


class UNet(nn.Module):
    """Encoder, decoder with skips, a segmentation layer at every decoder stage.

    images [B, *S, input_channels] -> logits [B, *S, num_classes]; with `deep_supervision` the
    logits of all decoder stages, full resolution first. Lists run from the full resolution down,
    but `n_conv_per_stage_decoder` from the deepest decoder stage up, as checkpoints have it.
    `image_classes` adds a linear head on the mean of the deepest features (image-level tasks).

    Raises ValueError for lists of different lengths, and for images that the strides do not divide.
    """

    input_channels: int = 1
    num_classes: int = 2
    features_per_stage: tuple[int, ...] = (32, 64, 128, 256, 512, 512)
    kernel_sizes: tuple[tuple[int, ...], ...] = ((3, 3),) * 6
    strides: tuple[tuple[int, ...], ...] = ((1, 1), *((2, 2),) * 5)
    n_conv_per_stage: tuple[int, ...] = (2,) * 6
    n_conv_per_stage_decoder: tuple[int, ...] = (2,) * 5
    conv_bias: bool = True
    deep_supervision: bool = False
    image_classes: int = 0
    epsilon: float = 1e-5
    negative_slope: float = 0.01
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    residual = False

    def __post_init__(self) -> None:
        for name in ("kernel_sizes", "strides"):
            rows = tuple(tuple(int(n) for n in row) for row in getattr(self, name))
            object.__setattr__(self, name, rows)
        for name in ("features_per_stage", "n_conv_per_stage", "n_conv_per_stage_decoder"):
            object.__setattr__(self, name, tuple(int(n) for n in getattr(self, name)))
        stages = len(self.features_per_stage)
        for name, wanted in (
            ("kernel_sizes", stages),
            ("strides", stages),
            ("n_conv_per_stage", stages),
            ("n_conv_per_stage_decoder", stages - 1),
        ):
            if len(getattr(self, name)) != wanted:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for {stages} stages; "
                    f"it needs {wanted}"
                )
        dims = {len(row) for row in (*self.kernel_sizes, *self.strides)}
        if len(dims) != 1:
            raise ValueError(f"kernel_sizes and strides differ in their dimensions: {sorted(dims)}")
        if stages < 2:
            raise ValueError("a U-Net needs at least two stages")
        super().__post_init__()

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.strides[0])

    @property
    def divisor(self) -> tuple[int, ...]:
        """What every spatial axis must be a multiple of."""
        return tuple(math.prod(s[a] for s in self.strides) for a in range(self.ndim))

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: the smallest image."""
        shape = (1, *(2 * d for d in self.divisor), self.input_channels)
        return (jax.ShapeDtypeStruct(shape, jnp.float32),)

    def check_patch(self, spatial: tuple[int, ...]) -> None:
        """Raises ValueError with the next valid size when the strides do not divide `spatial`."""
        if len(spatial) != self.ndim:
            raise ValueError(f"a {self.ndim}-D network got images of {len(spatial)} spatial axes")
        if any(n % d for n, d in zip(spatial, self.divisor)):
            valid = tuple(_ceil_to(n, d) for n, d in zip(spatial, self.divisor))
            raise ValueError(
                f"patch {tuple(spatial)} is not divisible by the strides {self.divisor}; "
                f"the next valid patch is {valid}"
            )

    def _norm(self) -> dict[str, Any]:
        return dict(
            use_bias=self.conv_bias,
            epsilon=self.epsilon,
            negative_slope=self.negative_slope,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    def __call__(self, x: jax.Array, train: bool = False):
        """Logits, or a tuple of them under `deep_supervision`."""
        maps = self.intermediates(x, train)
        logits = tuple(maps[f"ds{i}"] for i in range(len(self.strides) - 1) if f"ds{i}" in maps)
        return logits if self.deep_supervision else logits[0]

    def encode(self, x: jax.Array) -> list[jax.Array]:
        """Feature maps of every encoder stage, full resolution first."""
        raise TypeError("UNet has no encoder; use PlainConvUNet or ResidualEncoderUNet")

    @nn.compact
    def intermediates(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """`skip0` .., the encoder's maps; `ds0` .., logits (only `ds0` without deep supervision).

        With `image_classes` also `image_logits` [B, image_classes].
        """
        del train  # nothing here behaves differently in training
        self.check_patch(x.shape[1:-1])
        if x.shape[-1] != self.input_channels:
            raise ValueError(
                f"the network takes {self.input_channels} channels, the image has {x.shape[-1]}"
            )
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        skips = self.encode(x.astype(self.dtype))
        maps = {f"skip{i}": y for i, y in enumerate(skips)}
        if self.image_classes:
            pooled = skips[-1].mean(tuple(range(1, self.ndim + 1)))
            maps["image_logits"] = Linear(self.image_classes, name="classification_head", **types)(
                pooled
            )
        y, stages = skips[-1], len(self.strides)
        ones = (1,) * self.ndim
        for k in range(stages - 1):
            level = stages - 2 - k
            features = self.features_per_stage[level]
            up = UpConv(
                features,
                self.strides[level + 1],
                name=f"decoder.transpconvs.{k}",
                use_bias=self.conv_bias,
                **types,
            )
            y = jnp.concatenate([up(y), skips[level]], -1)
            for i in range(self.n_conv_per_stage_decoder[k]):
                name = f"decoder.stages.{k}.convs.{i}"
                kernel = self.kernel_sizes[level]
                y = ConvNormAct(features, kernel, ones, name=name, **self._norm())(y)
            if level == 0 or self.deep_supervision or self.is_initializing():
                # Checkpoints hold every segmentation layer, whether it is used or not.
                seg = VolumeConv(
                    self.num_classes, ones, ones, name=f"decoder.seg_layers.{k}", **types
                )(y)
                if level == 0 or self.deep_supervision:
                    maps[f"ds{level}"] = seg
        return maps


class PlainConvUNet(UNet):
    """U-Net whose encoder stages are `n_conv_per_stage` convolutions, the first of them strided."""

    def encode(self, x: jax.Array) -> list[jax.Array]:
        skips, ones = [], (1,) * self.ndim
        for s, features in enumerate(self.features_per_stage):
            for i in range(self.n_conv_per_stage[s]):
                strides = self.strides[s] if i == 0 else ones
                name = f"encoder.stages.{s}.0.convs.{i}"
                x = ConvNormAct(features, self.kernel_sizes[s], strides, name=name, **self._norm())(
                    x
                )
            skips.append(x)
        return skips


class ResidualBlock(nn.Module):
    """BasicBlockD: two convolutions and a skip that averages before it projects.

    x [B, *S, I] -> [B, *(S / strides), features]. The skip is average pooling (where a stride is
    not 1), then a 1x1 convolution without bias and a norm (where channels differ).
    """

    features: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    use_bias: bool = True
    epsilon: float = 1e-5
    negative_slope: float = 0.01
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = dict(epsilon=self.epsilon, negative_slope=self.negative_slope, **types)
        ones = (1,) * len(self.strides)
        conv = dict(use_bias=self.use_bias, **norm)
        size = self.kernel_size
        y = ConvNormAct(self.features, size, self.strides, name="conv1", **conv)(x)
        # The last norm starts at zero: every block begins as its skip.
        y = ConvNormAct(
            self.features, size, ones, activate=False, zero_scale=True, name="conv2", **conv
        )(y)
        pooled = any(s != 1 for s in self.strides)
        skip = average_pool(x, self.strides) if pooled else x
        if x.shape[-1] != self.features:
            skip = ConvNormAct(
                self.features,
                ones,
                ones,
                use_bias=False,
                activate=False,
                name=f"skip.{int(pooled)}",
                **norm,
            )(skip)
        return nn.leaky_relu(y + skip, self.negative_slope)


class ResidualEncoderUNet(UNet):
    """U-Net whose encoder is a stem and `n_conv_per_stage` residual blocks a stage.

    `stem_channels` 0 means the first stage's width.
    """

    stem_channels: int = 0

    residual = True

    def encode(self, x: jax.Array) -> list[jax.Array]:
        skips, ones = [], (1,) * self.ndim
        stem = self.stem_channels or self.features_per_stage[0]
        x = ConvNormAct(
            stem, self.kernel_sizes[0], ones, name="encoder.stem.convs.0", **self._norm()
        )(x)
        for s, features in enumerate(self.features_per_stage):
            for b in range(self.n_conv_per_stage[s]):
                strides = self.strides[s] if b == 0 else ones
                name = f"encoder.stages.{s}.blocks.{b}"
                x = ResidualBlock(
                    features, self.kernel_sizes[s], strides, name=name, **self._norm()
                )(x)
            skips.append(x)
        return skips


MODEL = PlainConvUNet


def _variant(cls: str, ndim: int, features: int, cap: int, blocks, decoder: int, stages: int):
    return {
        "cls": cls,
        "features_per_stage": tuple(min(cap, features * 2**i) for i in range(stages)),
        "kernel_sizes": ((3,) * ndim,) * stages,
        "strides": ((1,) * ndim, *((2,) * ndim,) * (stages - 1)),
        "n_conv_per_stage": tuple(blocks[:stages]),
        "n_conv_per_stage_decoder": (decoder,) * (stages - 1),
    }


_RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6)
VARIANTS: dict[str, dict[str, Any]] = {
    # nnU-Net's default shapes: six stages, capped at 512 features in 2-D and 320 in 3-D.
    "plain_unet_2d": _variant("PlainConvUNet", 2, 32, 512, (2,) * 6, 2, 6),
    "plain_unet_3d": _variant("PlainConvUNet", 3, 32, 320, (2,) * 6, 2, 6),
    "resenc_unet_2d": _variant("ResidualEncoderUNet", 2, 32, 512, _RESIDUAL_BLOCKS, 1, 6),
    "resenc_unet_3d": _variant("ResidualEncoderUNet", 3, 32, 320, _RESIDUAL_BLOCKS, 1, 6),
}


# -- checkpoints -----------------------------------------------------------------------------------


def _transposed_to_flax(x: np.ndarray) -> np.ndarray:
    """[I, O, *k] -> [*k, I, O], not flipped: the windows of a stride-sized kernel are disjoint."""
    return np.moveaxis(x, (0, 1), (-2, -1))


def _transposed_to_torch(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, (-2, -1), (0, 1))


def _units(module: UNet) -> Iterator[tuple[str, bool]]:
    """(name, has a convolution bias) of every convolution with its norm."""
    bias = module.conv_bias
    widths = module.features_per_stage
    if module.residual:
        yield "encoder.stem.convs.0", bias
        before = module.stem_channels or widths[0]
        for s, features in enumerate(widths):
            for b in range(module.n_conv_per_stage[s]):
                block = f"encoder.stages.{s}.blocks.{b}"
                yield f"{block}.conv1", bias
                yield f"{block}.conv2", bias
                if before != features:
                    pooled = b == 0 and any(n != 1 for n in module.strides[s])
                    yield f"{block}.skip.{int(pooled)}", False
                before = features
    else:
        for s in range(len(widths)):
            for i in range(module.n_conv_per_stage[s]):
                yield f"encoder.stages.{s}.0.convs.{i}", bias
    for k, count in enumerate(module.n_conv_per_stage_decoder):
        for i in range(count):
            yield f"decoder.stages.{k}.convs.{i}", bias


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """What the naming rule cannot know: every tensor stands twice, the encoder's four times.

    A checkpoint has `X.conv` again as `X.all_modules.0`, `X.norm` as `X.all_modules.1`, and the
    whole encoder again below `decoder.encoder`. Copies must equal the originals.
    """
    if not isinstance(module, UNet):
        return {}
    aliases: dict[str, str] = {}
    for name, bias in _units(module):
        for part, index in (("conv", 0), ("norm", 1)):
            for leaf in ("weight", "bias") if bias or part == "norm" else ("weight",):
                source = f"{name}.{part}.{leaf}"
                copies = [f"{name}.all_modules.{index}.{leaf}"]
                if name.startswith("encoder."):
                    copies += [f"decoder.{source}", f"decoder.{copies[0]}"]
                aliases.update(dict.fromkeys(copies, source))
    weights = r"decoder\.transpconvs\.\d+\.weight"
    return {
        "aliases": aliases,
        "arrays": [(weights, _transposed_to_flax, _transposed_to_torch)],
    }


def check_checkpoint(keys: Mapping[str, tuple[int, ...]] | Iterable[str], module: nn.Module):
    """Refuse weights of another dimension or kind, and files without a segmentation layer.

    Raises ValueError naming the key, its shape, and what the network has.
    """
    if not isinstance(module, UNet) or not isinstance(keys, Mapping):
        return
    stems = {key: shape for key, shape in keys.items() if key.startswith("encoder.")}
    residual = any(".blocks." in key for key in stems)
    if stems and residual != module.residual:
        found, wanted = ("residual", "plain")[:: 1 if residual else -1]
        raise ValueError(
            f"checkpoint is of a {found} encoder ({next(iter(stems))}), the network has a "
            f"{wanted} one; load it with {'Residual' if residual else 'PlainConv'}"
            f"{'EncoderUNet' if residual else 'UNet'}"
        )
    for key, shape in stems.items():
        if key.endswith("conv.weight") and len(shape) != module.ndim + 2:
            raise ValueError(
                f"checkpoint is {len(shape) - 2}-D ({key} {list(shape)}), the network is "
                f"{module.ndim}-D: strides {module.strides}"
            )
    for k in range(len(module.strides) - 1):
        key = f"decoder.seg_layers.{k}.weight"
        if stems and key not in keys:
            raise ValueError(f"checkpoint lacks {key}: every decoder stage has a seg layer")
