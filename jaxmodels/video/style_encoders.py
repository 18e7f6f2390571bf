"""The encoders that a video encoder is compared with: pSp and e4e, an image at a time.

E. Richardson et al., "Encoding in Style", arXiv 2008.00951 (pSp), and O. Tov et al., "Designing
an Encoder for StyleGAN Image Manipulation", arXiv 2102.02766 (e4e), after
omertov/encoder4editing@99ea505 (`models/encoders/psp_encoders.py`, `models/discriminator.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.video.stylegan2 import num_latents
from jaxmodels.video.stylegan2_layers import EqualizedLinear
from jaxmodels.vision.ir_se import body, narrowed, units

# Styles below the first take the coarsest map, below the second the middle one.
MIDDLE, FINE = 3, 7
# Units whose outputs are the three maps, by depth of the network (ends of stages 2, 3 and 4).
TAPS = {18: (3, 5, 7), 34: (6, 12, 15), 50: (6, 20, 23), 100: (15, 45, 48), 152: (10, 46, 49)}
SLOPE = 0.01


class StyleBlock(nn.Module):
    """map2style: stride-2 convolutions down to one pixel, then an equalized linear map.

    x [B, s, s, C] with s a power of two -> [B, features]; `spatial` is s.
    """

    features: int
    spatial: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        steps = int(math.log2(self.spatial))
        if 2**steps != self.spatial or x.shape[1:3] != (self.spatial, self.spatial):
            raise ValueError(
                f"{'/'.join(self.path)}: a {self.spatial}x{self.spatial} map (a power of two) is "
                f"wanted, got {x.shape}; the encoder's images are 256x256"
            )
        for i in range(steps):
            conv = Conv(self.features, 3, 2, use_bias=True, name=f"convs.{2 * i}", **types)
            x = nn.leaky_relu(conv(x), SLOPE)
        x = x.reshape(x.shape[0], self.features)
        return EqualizedLinear(self.features, name="linear", **types)(x)


def resize_aligned(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bilinear resizing with aligned corners (PyTorch's align_corners=True), [B, h, w, C]."""

    def weights(old: int, new: int) -> jax.Array:
        place = jnp.arange(new) * ((old - 1) / max(new - 1, 1))
        return jnp.maximum(0, 1 - jnp.abs(place[:, None] - jnp.arange(old)))

    x = jnp.einsum("ph,bhwc->bpwc", weights(x.shape[1], size[0]).astype(x.dtype), x)
    return jnp.einsum("qw,bpwc->bpqc", weights(x.shape[2], size[1]).astype(x.dtype), x)


def feature_pyramid(
    x: jax.Array,
    num_layers: int,
    mode: str,
    width_divisor: int,
    se_reduction: int,
    train: bool,
    types: dict[str, Any],
) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    """(output of every unit, (c3, p2, p1): maps of one width, coarse to fine).

    Call it inside a compact method: the trunk and `latlayer1`, `latlayer2` are named there.
    """
    outputs = body(x, num_layers, mode, width_divisor, se_reduction, train, types)
    c1, c2, c3 = (outputs[i] for i in TAPS[num_layers])
    width = narrowed(512, width_divisor)

    def add_up(coarse, fine, name):
        lateral = Conv(width, use_bias=True, name=name, **types)(fine)
        return resize_aligned(coarse, lateral.shape[1:3]) + lateral

    p2 = add_up(c3, c2, "latlayer1")
    return outputs, (c3, p2, add_up(p2, c1, "latlayer2"))


class GradualStyleEncoder(nn.Module):
    """pSp: images [B, 256, 256, 3] in [-1, 1] -> W+ offsets [B, n, 512], to which w_avg is added.

    `stylegan_size` decides n (18 at 1024). `width_divisor` divides every width, the codes' too.
    """

    num_layers: int = 50
    mode: str = "ir_se"
    stylegan_size: int = 1024
    width_divisor: int = 1
    se_reduction: int = 16
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    progressive = False

    def __post_init__(self) -> None:
        num_latents(self.stylegan_size)
        units(self.num_layers, self.width_divisor)
        super().__post_init__()

    @property
    def num_styles(self) -> int:
        """Codes of a W+ latent."""
        return num_latents(self.stylegan_size)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, 256, 256, 3]."""
        return (jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32),)

    def __call__(
        self, x: jax.Array, stage: int | jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Codes [B, n, D]; `stage` (e4e only) is how many deltas are on, None all of them."""
        return self.intermediates(x, stage, train)["w"]

    @nn.compact
    def intermediates(
        self, x: jax.Array, stage: int | jax.Array | None = None, train: bool = False
    ) -> dict[str, jax.Array]:
        """`body{i}` [B, h, w, C], the output of every unit, and `w` [B, n, D]."""
        if x.ndim != 4 or x.shape[1] != x.shape[2] or x.shape[1] % 16:
            raise ValueError(f"images must be [batch, 256, 256, 3], got {x.shape}")
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        args = (self.num_layers, self.mode, self.width_divisor, self.se_reduction)
        outputs, (c3, p2, p1) = feature_pyramid(x, *args, train, types)
        width = narrowed(512, self.width_divisor)
        codes = []
        for i in range(self.num_styles):
            features = c3 if i < MIDDLE else p2 if i < FINE else p1
            style = StyleBlock(width, features.shape[1], name=f"styles.{i}", **types)
            codes.append(style(features))
        w = jnp.stack(codes, 1)
        if self.progressive:
            w = at_stage(w[:, :1] + w.at[:, 0].set(0), stage)
        elif stage is not None:
            raise ValueError("pSp has no progressive stages; stage belongs to Encoder4Editing")
        return {**{f"body{i}": y for i, y in enumerate(outputs)}, "w": w}


class Encoder4Editing(GradualStyleEncoder):
    """e4e: the first code for all layers, and for layers i > 0 a delta added to it.

    At progressive stage s only deltas 1 .. s are on (0: all codes equal); None is inference.
    """

    progressive = True


def at_stage(w: jax.Array, stage: int | jax.Array | None) -> jax.Array:
    """e4e's codes [B, n, D] at a progressive stage, from those of inference: codes i > stage are
    w_0. None leaves every delta on."""
    if stage is None:
        return w
    return jnp.where((jnp.arange(w.shape[1]) <= stage)[:, None], w, w[:, :1])


class LatentCodesDiscriminator(nn.Module):
    """Tells mapped latents from encoded ones: w [B, D] -> logit [B, 1], leaky ReLU 0.2 between."""

    style_dim: int = 512
    n_mlp: int = 4
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: w [1, style_dim]."""
        return (jax.ShapeDtypeStruct((1, self.style_dim), jnp.float32),)

    @nn.compact
    def __call__(self, w: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        for i in range(self.n_mlp - 1):
            w = nn.leaky_relu(Linear(self.style_dim, name=f"mlp.{2 * i}", **types)(w), 0.2)
        return Linear(1, name=f"mlp.{2 * (self.n_mlp - 1)}", **types)(w)


def progressive_stage(step: jax.Array | int, start: int = 20000, every: int = 2000) -> jax.Array:
    """How many deltas of e4e are on at a step: none before `start`, then one more each `every`."""
    step = jnp.asarray(step)
    return jnp.where(step < start, 0, 1 + (step - start) // every).astype(jnp.int32)


def query_pool(
    pool: jax.Array, filled: jax.Array, codes: jax.Array, rng: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Past codes in place of some of the present ones: (codes [B, D], pool [P, D], filled []).

    Row by row: while fewer than P are held a code is put into the pool and given back; from then
    on, with probability one half, it changes places with a random one of the pool. e4e's
    discriminator learns from what comes back (`models/latent_codes_pool.py`).
    """
    size = len(pool)
    draw, place = jax.random.split(rng)
    swaps = jax.random.uniform(draw, (len(codes),)) > 0.5
    places = jax.random.randint(place, (len(codes),), 0, size)

    def one(carry, row):
        pool, filled = carry
        code, swap, place = row
        full = filled >= size
        place = jnp.where(full, place, filled)
        held = pool[place]
        given = jnp.where(full & swap, held, code)
        pool = pool.at[place].set(jnp.where(full & ~swap, held, code))
        return (pool, jnp.minimum(filled + 1, size)), given

    (pool, filled), given = jax.lax.scan(one, (pool, filled), (codes, swaps, places))
    return given, pool, filled


MODEL = GradualStyleEncoder

VARIANTS: dict[str, dict[str, Any]] = {
    "psp_ffhq": {"stylegan_size": 1024},
    "e4e_ffhq": {"cls": "Encoder4Editing", "stylegan_size": 1024},
}


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """pSp and e4e files keep the mean latent beside the encoder."""
    return {"drops": [r"latent_avg"]} if isinstance(module, GradualStyleEncoder) else {}


def check_checkpoint(keys: Iterable[str], module: nn.Module) -> None:
    """Refuse files of another naming with what was found and what is wanted."""
    if not isinstance(module, GradualStyleEncoder):
        return
    keys = list(keys)
    if any(k.endswith("styles.0.linear.weight") for k in keys):
        return
    found = ", ".join(sorted(keys)[:3])
    if any(k.endswith("output_layer.3.weight") for k in keys):
        found = f"an ArcFace IR-SE network without style heads ({found})"
    raise ValueError(
        f"the checkpoint holds {found}; a pSp or e4e encoder has input_layer.0.weight, "
        "body.0.res_layer.0.weight, styles.0.linear.weight"
    )
