"""StyleGAN2: mapping and synthesis networks, and the residual discriminator.

T. Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", arXiv 1912.04958, in the
form of NVlabs/stylegan2-ada-pytorch@d72cc7d (`training/networks.py`), with its labels, its names of
state dicts and its architectures ("skip" for G and "resnet" for D unless told otherwise).
rosinality/stylegan2-pytorch@bef283a's names are read as well (`jaxmodels.video.stylegan2_names`),
and written by `to_rosinality` there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.video import stylegan2_names
from jaxmodels.video.stylegan2_discriminator import DiscriminatorBlock, DiscriminatorEpilogue
from jaxmodels.video.stylegan2_layers import (
    EPSILON,
    EqualizedConv,
    EqualizedLinear,
    clamped,
    leaky_relu,
    modulated_conv2d,
)
from jaxmodels.video.upfirdn import BINOMIAL, setup_filter, upsample2d

NOISE_MODES = ("const", "random", "none")
ARCHITECTURES = ("orig", "skip", "resnet")
SMALLEST = 8


def num_latents(size: int) -> int:
    """Codes of a W+ latent for images of `size` pixels: 2 log2(size) - 2 (18 at 1024).

    Raises ValueError unless size is a power of two of at least 8.
    """
    if int(size) != size or size < SMALLEST or int(size) & (int(size) - 1):
        raise ValueError(f"generator size must be a power of two of at least 8, got {size}")
    return 2 * int(math.log2(size)) - 2


def channels_of(
    resolution: int, base: int, largest: int, given: Mapping[Any, int] | None = None
) -> int:
    """Feature maps at a resolution: `given[resolution]`, else min(base / resolution, largest)."""
    if given:
        table = {int(k): int(v) for k, v in dict(given).items()}
        if resolution not in table:
            raise ValueError(f"channels has no entry for {resolution}; it has {sorted(table)}")
        return table[resolution]
    return min(base // resolution, largest)


def check_wplus(ws, layers: int) -> None:
    """Refuse a W+ code [B, n, w_dim] whose n is not the generator's."""
    if ws.ndim != 3 or ws.shape[1] != layers:
        raise ValueError(
            f"W+ codes must be [batch, {layers}, w_dim] for this generator "
            f"({layers} latents), got {ws.shape}"
        )


def _check_architecture(name: str) -> None:
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture is one of {', '.join(ARCHITECTURES)}, got {name!r}")


def normalize_second_moment(x: jax.Array) -> jax.Array:
    """x / sqrt(mean over the last axis of x^2 + 1e-8)."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON)


def truncate(
    ws: jax.Array, w_avg: jax.Array, psi: float | jax.Array, cutoff: int | None = None
) -> jax.Array:
    """w_avg + psi (w - w_avg), on the first `cutoff` layers only when it is given.

    ws [B, n, D] or [B, D] (no cutoff), w_avg [D] -> like ws.
    """
    moved = w_avg + (ws - w_avg) * psi
    if cutoff is None:
        return moved
    return jnp.where((jnp.arange(ws.shape[1]) < cutoff)[:, None], moved, ws)


class MappingNetwork(nn.Module):
    """z [B, z_dim] -> w [B, w_dim]: normalization, then layers of linear and leaky ReLU.

    With `c_dim` > 0 labels c [B, c_dim] are embedded, normalized and put behind z; z may then be
    None. `track_average` keeps the mean latent.
    """

    w_dim: int = 512
    num_layers: int = 8
    layer_features: int | None = None
    lr_multiplier: float = 0.01
    w_avg_beta: float = 0.995
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    c_dim: int = 0
    embed_features: int | None = None
    track_average: bool = True

    @nn.compact
    def __call__(
        self, z: jax.Array | None, update_average: bool = False, c: jax.Array | None = None
    ) -> jax.Array:
        """w; with `update_average` the batch's mean moves the buffer `w_avg` (mutable)."""
        parts = []
        if z is not None:
            parts.append(normalize_second_moment(jnp.asarray(z, self.param_dtype)))
        if self.c_dim:
            if c is None and self.is_initializing():
                c = jnp.zeros((1 if z is None else len(z), self.c_dim))
            if c is None or c.shape[-1] != self.c_dim:
                found = "none" if c is None else f"{c.shape}"
                raise ValueError(f"labels c must be [batch, {self.c_dim}], got {found}")
            embed = EqualizedLinear(
                self.w_dim if self.embed_features is None else self.embed_features,
                dtype=self.param_dtype,
                param_dtype=self.param_dtype,
                name="embed",
            )
            parts.append(normalize_second_moment(embed(jnp.asarray(c, self.param_dtype))))
        x = jnp.concatenate(parts, -1)
        hidden = self.layer_features or self.w_dim
        for i in range(self.num_layers):
            x = EqualizedLinear(
                self.w_dim if i == self.num_layers - 1 else hidden,
                lr_multiplier=self.lr_multiplier,
                activation="lrelu",
                dtype=self.param_dtype,
                param_dtype=self.param_dtype,
                name=f"fc{i}",
            )(x)
        if not self.track_average:
            return x
        average = self.variable("buffers", "w_avg", jnp.zeros, (self.w_dim,), self.param_dtype)
        if update_average and not self.is_initializing():
            mean = jax.lax.stop_gradient(x.mean(0))
            average.value = mean + self.w_avg_beta * (average.value - mean)
        return x


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution + noise + bias + leaky ReLU, x [B, H, W, I] -> [B, r, r, O]."""

    features: int
    resolution: int
    up: int = 1
    use_noise: bool = True
    conv_clamp: float | None = None
    resample_filter: tuple[float, ...] = BINOMIAL
    fused: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        w: jax.Array,
        noise_mode: str,
        noise: jax.Array | None = None,
        gain: float = 1.0,
    ) -> jax.Array:
        inputs, r, kind = x.shape[-1], self.resolution, self.param_dtype
        shape = (3, 3, inputs, self.features)
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape, kind)
        styles = EqualizedLinear(inputs, bias_init=1, dtype=kind, param_dtype=kind, name="affine")
        bias = self.param("bias", nn.initializers.zeros, (self.features,), kind)
        if self.use_noise:
            const = self.variable(
                "buffers", "noise_const", lambda: jax.random.normal(self.make_rng("params"), (r, r))
            )
            strength = self.param("noise_strength", nn.initializers.zeros, (), kind)
            if noise is not None:
                noise = noise * strength
            elif noise_mode == "const":
                noise = (const.value * strength)[None, :, :, None]
            elif noise_mode == "random":
                shape = (x.shape[0], r, r, 1)
                noise = jax.random.normal(self.make_rng("noise"), shape, kind) * strength
        y = modulated_conv2d(
            x,
            kernel,
            styles(w),
            noise=noise if self.use_noise else None,
            f=setup_filter(self.resample_filter),
            up=self.up,
            fused=self.fused,
        )
        return leaky_relu(y, bias, gain, self.conv_clamp)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution without demodulation, x [B, H, W, I] -> [B, H, W, channels]."""

    features: int = 3
    conv_clamp: float | None = None
    fused: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        inputs, kind = x.shape[-1], self.param_dtype
        shape = (1, 1, inputs, self.features)
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape, kind)
        styles = EqualizedLinear(inputs, bias_init=1, dtype=kind, param_dtype=kind, name="affine")
        bias = self.param("bias", nn.initializers.zeros, (self.features,), kind)
        scaled = styles(w) / math.sqrt(inputs)
        y = modulated_conv2d(x, kernel, scaled, demodulate=False, fused=self.fused)
        return clamped(y + bias.astype(y.dtype), self.conv_clamp).astype(kind)


class SynthesisBlock(nn.Module):
    """One resolution: (up-)convolutions and the running image, `x, image -> x, image`.

    Only "skip" adds to the image at every resolution; the others have one at the `last` alone.
    "resnet" adds an up-sampled 1x1 shortcut, both sides divided by sqrt 2.
    """

    features: int
    resolution: int
    img_channels: int = 3
    first: bool = False
    last: bool = False
    architecture: str = "skip"
    image_filter: tuple[float, ...] | None = None
    use_noise: bool = True
    conv_clamp: float | None = None
    resample_filter: tuple[float, ...] = BINOMIAL
    fused: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array | None,
        image: jax.Array | None,
        ws: jax.Array,
        noise_mode: str,
        noises: tuple[jax.Array | None, ...],
    ) -> tuple[jax.Array, jax.Array | None]:
        """ws [B, 2 (first) or 3, w_dim]: the codes of the convolutions and of to-RGB."""
        kind = self.param_dtype
        layer = dict(
            features=self.features,
            resolution=self.resolution,
            use_noise=self.use_noise,
            conv_clamp=self.conv_clamp,
            resample_filter=self.resample_filter,
            fused=self.fused,
            dtype=self.dtype,
            param_dtype=kind,
        )
        shortcut, gain = None, 1.0
        if self.first:
            shape = (self.features, self.resolution, self.resolution)
            const = self.param("const", nn.initializers.normal(1.0), shape, kind)
            x = jnp.broadcast_to(const.transpose(1, 2, 0), (ws.shape[0], *shape[1:], shape[0]))
            x = x.astype(self.dtype)
        else:
            if self.architecture == "resnet":
                gain = math.sqrt(0.5)
                shortcut = EqualizedConv(
                    self.features, 1, up=2, use_bias=False, activation=False, name="skip",
                    resample_filter=self.resample_filter, dtype=self.dtype, param_dtype=kind,
                )(x, gain)  # fmt: skip
            x = SynthesisLayer(up=2, name="conv0", **layer)(x, ws[:, 0], noise_mode, noises[0])
        x = SynthesisLayer(name="conv1", **layer)(x, ws[:, -2], noise_mode, noises[-1], gain)
        x = x if shortcut is None else shortcut + x
        if not self.last and self.architecture != "skip":
            return x, image
        rgb = ToRGB(self.img_channels, self.conv_clamp, self.fused, self.dtype, kind, name="torgb")(
            x, ws[:, -1]
        )
        if image is not None:
            f = self.image_filter or self.resample_filter
            rgb = upsample2d(image, setup_filter(f)) + rgb
        return x, rgb


class SynthesisNetwork(nn.Module):
    """W+ [B, n, w_dim] -> features and running image of every resolution."""

    img_resolution: int
    img_channels: int = 3
    channel_base: int = 32768
    channel_max: int = 512
    channels: Mapping[Any, int] | None = None
    use_noise: bool = True
    conv_clamp: float | None = None
    resample_filter: tuple[float, ...] = BINOMIAL
    fused: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    architecture: str = "skip"
    image_filter: tuple[float, ...] | None = None

    @nn.compact
    def __call__(
        self, ws: jax.Array, noise_mode: str = "const", noises: tuple | None = None
    ) -> dict[str, jax.Array]:
        layers = num_latents(self.img_resolution)
        check_wplus(ws, layers)
        if noise_mode not in NOISE_MODES:
            raise ValueError(f"noise_mode is one of {', '.join(NOISE_MODES)}, got {noise_mode!r}")
        if noises is not None and len(noises) != layers - 1:
            raise ValueError(f"{layers - 1} noise maps are needed, got {len(noises)}")
        noises = (None,) * (layers - 1) if noises is None else noises
        x = image = None
        maps: dict[str, jax.Array] = {}
        for b in range(int(math.log2(self.img_resolution)) - 1):
            resolution = 4 * 2**b
            first = max(2 * b - 1, 0)
            x, image = SynthesisBlock(
                channels_of(resolution, self.channel_base, self.channel_max, self.channels),
                resolution,
                self.img_channels,
                first=b == 0,
                last=resolution == self.img_resolution,
                architecture=self.architecture,
                image_filter=self.image_filter,
                use_noise=self.use_noise,
                conv_clamp=self.conv_clamp,
                resample_filter=self.resample_filter,
                fused=self.fused,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"b{resolution}",
            )(x, image, ws[:, first : 2 * b + 2], noise_mode, noises[first : 2 * b + 1])
            maps[f"x_b{resolution}"] = x
            if image is not None:
                maps[f"rgb_b{resolution}"] = image
        maps["image"] = image
        return maps


class Generator(nn.Module):
    """StyleGAN2's generator, z [B, z_dim] -> images [B, S, S, 3], roughly in [-1, 1], not clamped.

    `channels` {resolution: maps} replaces min(channel_base / resolution, channel_max);
    `conv_clamp` is 256 for NVlabs networks trained in mixed precision; `fused` convolves with a
    weight for every sample; `dtype` is that of the feature maps, styles and images stay in
    `param_dtype`. With `c_dim` > 0 every mapping takes labels c [B, c_dim] as well. The running
    image is enlarged by `image_filter` (None: by `resample_filter`).

    Raises ValueError for sizes that are not powers of two of at least 8.
    """

    z_dim: int = 512
    w_dim: int = 512
    img_resolution: int = 1024
    img_channels: int = 3
    mapping_layers: int = 8
    mapping_features: int | None = None
    lr_multiplier: float = 0.01
    w_avg_beta: float = 0.995
    channel_base: int = 32768
    channel_max: int = 512
    channels: Mapping[Any, int] | None = None
    use_noise: bool = True
    conv_clamp: float | None = None
    resample_filter: tuple[float, ...] = BINOMIAL
    fused: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    architecture: str = "skip"
    c_dim: int = 0
    embed_features: int | None = None
    image_filter: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        num_latents(self.img_resolution)
        _check_architecture(self.architecture)
        super().__post_init__()

    @property
    def num_latents(self) -> int:
        """Codes of a W+ latent."""
        return num_latents(self.img_resolution)

    def setup(self) -> None:
        self.mapping = MappingNetwork(
            self.w_dim,
            self.mapping_layers,
            self.mapping_features,
            self.lr_multiplier,
            self.w_avg_beta,
            self.dtype,
            self.param_dtype,
            self.c_dim,
            self.embed_features,
        )
        self.synthesis = SynthesisNetwork(
            self.img_resolution,
            self.img_channels,
            self.channel_base,
            self.channel_max,
            self.channels,
            self.use_noise,
            self.conv_clamp,
            tuple(self.resample_filter),
            self.fused,
            self.dtype,
            self.param_dtype,
            self.architecture,
            None if self.image_filter is None else tuple(self.image_filter),
        )

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: z [1, z_dim]."""
        return (jax.ShapeDtypeStruct((1, self.z_dim), jnp.float32),)

    def __call__(
        self,
        z: jax.Array,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: str = "const",
        c: jax.Array | None = None,
    ) -> jax.Array:
        """Images of latents; `noise_mode` "random" draws from the rng "noise"."""
        ws = self.map_latents(z, truncation_psi, truncation_cutoff, c=c)
        return self.synthesize(ws, noise_mode)

    def to_w(
        self, z: jax.Array, update_average: bool = False, c: jax.Array | None = None
    ) -> jax.Array:
        """w [B, w_dim] of z, not truncated."""
        return self.mapping(z, update_average, c)

    def map_latents(
        self,
        z: jax.Array,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        z2: jax.Array | None = None,
        mixing_index: int | None = None,
        c: jax.Array | None = None,
    ) -> jax.Array:
        """W+ [B, n, w_dim] of z; from layer `mixing_index` on the styles of z2."""
        w = self.mapping(z, c=c)
        ws = jnp.repeat(w[:, None], self.num_latents, 1)
        if z2 is not None:
            late = (jnp.arange(self.num_latents) >= mixing_index)[:, None]
            ws = jnp.where(late, self.mapping(z2, c=c)[:, None], ws)
        if truncation_psi == 1.0:
            return ws
        return truncate(ws, self.average(), truncation_psi, truncation_cutoff)

    def average(self) -> jax.Array:
        """The mean latent `w_avg` [w_dim]."""
        return self.mapping.get_variable("buffers", "w_avg")

    def synthesize(
        self, ws: jax.Array, noise_mode: str = "const", noises: tuple | None = None
    ) -> jax.Array:
        """Images of W+ codes [B, n, w_dim]; `noises` replaces the n - 1 noise maps."""
        return self.synthesis(ws, noise_mode, noises)["image"]

    def intermediates(self, ws: jax.Array, noise_mode: str = "const") -> dict[str, jax.Array]:
        """`x_b{r}`, `rgb_b{r}`: features and running image after each resolution; `image`."""
        return self.synthesis(ws, noise_mode)


class Discriminator(nn.Module):
    """StyleGAN2's residual discriminator, images [B, S, S, 3] in [-1, 1] -> logits [B, 1].

    Arguments as for `Generator`; `mbstd_group_size` samples share a minibatch deviation (None: all
    of the batch), `mbstd_num_channels` 0 leaves it out. With `c_dim` > 0 labels c [B, c_dim] are
    mapped to `cmap_dim` numbers (None: as many as there are maps at 4x4) by a mapping network
    without a mean latent.
    """

    img_resolution: int = 1024
    img_channels: int = 3
    channel_base: int = 32768
    channel_max: int = 512
    channels: Mapping[Any, int] | None = None
    mbstd_group_size: int | None = 4
    mbstd_num_channels: int = 1
    conv_clamp: float | None = None
    resample_filter: tuple[float, ...] = BINOMIAL
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    architecture: str = "resnet"
    c_dim: int = 0
    cmap_dim: int | None = None
    mapping_layers: int = 8
    mapping_features: int | None = None
    embed_features: int | None = None
    lr_multiplier: float = 0.01

    def __post_init__(self) -> None:
        num_latents(self.img_resolution)
        _check_architecture(self.architecture)
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, S, S, channels]."""
        shape = (1, self.img_resolution, self.img_resolution, self.img_channels)
        return (jax.ShapeDtypeStruct(shape, jnp.float32),)

    @nn.compact
    def __call__(self, image: jax.Array, c: jax.Array | None = None) -> jax.Array:
        size = self.img_resolution
        if image.ndim != 4 or image.shape[1:] != (size, size, self.img_channels):
            raise ValueError(
                f"images must be [batch, {size}, {size}, {self.img_channels}], got {image.shape}"
            )

        def maps(resolution: int) -> int:
            return channels_of(resolution, self.channel_base, self.channel_max, self.channels)

        x, resolution = None, size
        while resolution > 4:
            x, image = DiscriminatorBlock(
                maps(resolution),
                maps(resolution // 2),
                self.architecture,
                self.conv_clamp,
                tuple(self.resample_filter),
                self.dtype,
                self.param_dtype,
                name=f"b{resolution}",
            )(x, image)
            resolution //= 2
        mapped = None
        if self.c_dim:
            mapped = MappingNetwork(
                maps(4) if self.cmap_dim is None else self.cmap_dim,
                self.mapping_layers,
                self.mapping_features,
                self.lr_multiplier,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                c_dim=self.c_dim,
                embed_features=self.embed_features,
                track_average=False,
                name="mapping",
            )(None, c=c)
        return DiscriminatorEpilogue(
            self.mbstd_group_size,
            self.mbstd_num_channels,
            self.conv_clamp,
            self.dtype,
            self.param_dtype,
            name="b4",
        )(x, image, mapped)


MODEL = Generator

VARIANTS: dict[str, dict[str, Any]] = {
    "stylegan2_1024": {"img_resolution": 1024},
    "stylegan2_256": {"img_resolution": 256},
    "stylegan2_discriminator_1024": {"cls": "Discriminator", "img_resolution": 1024},
    "stylegan2_discriminator_256": {"cls": "Discriminator", "img_resolution": 256},
}


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """Resampling filters travel along: they are the constructor's, not the checkpoint's."""
    if not isinstance(module, (Generator, Discriminator)):
        return {}
    f = setup_filter(module.resample_filter)
    fresh = {key: f for key in stylegan2_names.filter_keys(module)}
    if getattr(module, "image_filter", None) is not None:
        # The blocks' own filters are the running image's.
        image = setup_filter(module.image_filter)
        fresh |= {k: image for k in fresh if re.fullmatch(r"synthesis\.b\d+\.resample_filter", k)}
    return {"travels": [r"(.*\.)?resample_filter"], "fresh": fresh}


def check_checkpoint(keys: Iterable[str], module: nn.Module) -> None:
    """Refuse files of another naming with a sentence that says which one it is."""
    if isinstance(module, (Generator, Discriminator)):
        stylegan2_names.check(keys, module)


def upgrade_checkpoint(state: Mapping[str, np.ndarray], module: nn.Module) -> dict[str, Any]:
    """Any known naming -> NVlabs's."""
    if isinstance(module, (Generator, Discriminator)):
        return stylegan2_names.to_nvlabs(state, module)
    return dict(state)
