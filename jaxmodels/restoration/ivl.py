"""The IVL entry of the AIM 2022 challenge: deformable fusion of five luma frames, then x4.

claudiom4sir/SuperResolutionOfCompressedVideos@69e844d (`net_stdf.py`), after the spatio-temporal
deformable fusion of J. Deng, L. Wang, S. Pu, C. Zhuo, AAAI 2020.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.interop.conversion import TRANSPOSED_CONVOLUTION
from jaxmodels.layers.convolution import Conv
from jaxmodels.layers.initializers import Initializer, torch_kernel
from jaxmodels.layers.transposed_convolution import TransposedConv
from jaxmodels.restoration.deformable import modulated_deform_conv2d
from jaxmodels.restoration.inputs import check_unit_range
from jaxmodels.restoration.resampling import resize

SCALE = 4
# He initialization of kernels; a transposed convolution of stride 2 adds up a quarter of its taps.
_HE = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")
_HE_TRANSPOSED = nn.initializers.variance_scaling(8.0, "fan_in", "truncated_normal")


def _starts(he_init: bool) -> tuple[Initializer, Initializer]:
    """Initializers of hidden convolutions and of transposed ones."""
    return (_HE, _HE_TRANSPOSED) if he_init else (torch_kernel(), torch_kernel())


class DeformableFusion(nn.Module):
    """Frames [B, H, W, tmp] -> features [B, H, W, out_nc]; H and W multiples of 2 ** nb_unet.

    A U-net over `initial_maps` maps gives offsets and masks with which each of these maps is
    convolved deformably, every map by filters of its own.
    """

    initial_maps: int = 8
    nf: int = 32
    nb_unet: int = 3
    offset_groups: int = 8
    out_nc: int = 64
    he_init: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        start, start_up = _starts(self.he_init)

        def conv(y, name, features=self.nf, stride=1, kernel_init=start):
            init = {"use_bias": True, "kernel_init": kernel_init}
            return Conv(features, 3, stride, name=name, **init, **types)(y)

        def up(y, name):
            return nn.relu(TransposedConv(self.nf, name=name, kernel_init=start_up, **types)(y))

        maps = nn.relu(conv(x, "initial_conv.0", self.initial_maps))
        levels = [nn.relu(conv(maps, "in_conv.0"))]
        for i in range(1, self.nb_unet):
            y = nn.relu(conv(levels[-1], f"dn_conv{i}.0", stride=2))
            levels.append(nn.relu(conv(y, f"dn_conv{i}.2")))
        y = nn.relu(conv(levels[-1], "tr_conv.0", stride=2))
        y = up(nn.relu(conv(y, "tr_conv.2")), "tr_conv.4")
        for i in range(self.nb_unet - 1, 0, -1):
            y = nn.relu(conv(jnp.concatenate([y, levels[i]], -1), f"up_conv{i}.0"))
            y = up(y, f"up_conv{i}.2")
        y = nn.relu(conv(y, "out_conv.0"))
        offset = conv(y, "offset", 18 * self.offset_groups, kernel_init=torch_kernel())
        mask = conv(y, "mask", 9 * self.offset_groups, kernel_init=torch_kernel())
        mask = jax.nn.sigmoid(mask)
        kernel = self.param(
            "weights", nn.initializers.uniform(1.0), (self.out_nc, 1, 3, 3), self.param_dtype
        )
        kernel = jnp.transpose(kernel, (2, 3, 1, 0)).astype(self.dtype)
        fused = modulated_deform_conv2d(
            maps,
            offset,
            mask,
            kernel,
            padding=1,
            groups=self.initial_maps,
            deform_groups=self.offset_groups,
        )
        return nn.relu(fused)


class PlainCNN(nn.Module):
    """Features [B, H, W, I] -> [B, 4H, 4W, 1]: convolutions and two transposed convolutions."""

    nf: int = 32
    nb: int = 8
    he_init: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        start, start_up = _starts(self.he_init)

        def conv(y, name, features=self.nf, kernel_init=start):
            init = {"use_bias": True, "kernel_init": kernel_init}
            return Conv(features, 3, name=name, **init, **types)(y)

        x = nn.relu(conv(x, "in_conv.0"))
        for stage in (1, 2):
            for i in range(self.nb - 2):
                x = nn.relu(conv(x, f"hid_conv_{stage}.{2 * i}"))
            x = TransposedConv(self.nf, name=f"up{stage}", kernel_init=start_up, **types)(x)
        return conv(x, "out_conv", 1, kernel_init=torch_kernel())


class MFVQESRY(nn.Module):
    """Luma of `tmp` neighboring frames [B, H, W, tmp] in [0, 1] -> center frame [B, 4H, 4W, 1].

    The center is frame `tmp // 2`, of an even number the later one of the two in the middle. The
    network adds to its bicubic x4 (corners aligned). With PyTorch's
    initial weights, the entry's, gradients shrink 2.5 times a layer and a short training learns a
    constant; `he_init` keeps their size.

    Raises ValueError for another number of frames and sides that do not divide by 2 ** nb_unet.
    """

    tmp: int = 5
    initial_maps: int = 8
    nf: int = 32
    nb_unet: int = 3
    offset_groups: int = 8
    out_nc: int = 64
    cnn_nf: int = 32
    cnn_nb: int = 8
    he_init: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.tmp < 1:
            raise ValueError(f"tmp must be a number of frames, not {self.tmp}")
        if self.initial_maps % self.offset_groups or self.out_nc % self.initial_maps:
            raise ValueError(
                f"initial_maps {self.initial_maps} must divide by offset_groups "
                f"{self.offset_groups}, and out_nc {self.out_nc} by initial_maps"
            )
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: the smallest frame."""
        side = 2**self.nb_unet
        return (jax.ShapeDtypeStruct((1, side, side, self.tmp), jnp.float32),)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The super-resolved center frame."""
        return self.intermediates(x, train)["output"]

    @nn.compact
    def intermediates(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """`fused` features [B, H, W, out_nc] and the `output`."""
        del train
        multiple = 2**self.nb_unet
        if x.ndim != 4 or x.shape[-1] != self.tmp:
            raise ValueError(
                f"IVL: luma frames must be [batch, height, width, {self.tmp}], got {x.shape}"
            )
        check_unit_range(x, "IVL")
        height, width = x.shape[1:3]
        if height % multiple or width % multiple:
            raise ValueError(f"IVL: sides must divide by {multiple}, got {height}x{width}")
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        fused = DeformableFusion(
            self.initial_maps,
            self.nf,
            self.nb_unet,
            self.offset_groups,
            self.out_nc,
            self.he_init,
            name="ffnet",
            **types,
        )(x)
        y = PlainCNN(self.cnn_nf, self.cnn_nb, self.he_init, name="qenet", **types)(fused)
        middle = self.tmp // 2
        base = resize(
            x[..., middle : middle + 1],
            (height * SCALE, width * SCALE),
            "bicubic",
            align_corners=True,
        )
        return {"fused": fused, "output": y.astype(base.dtype) + base}


def frame_windows(frames: int, tmp: int = 5) -> np.ndarray:
    """Frame numbers [T, tmp] around each frame, the first and last frame repeated at the ends."""
    around = np.arange(frames)[:, None] + np.arange(tmp) - tmp // 2
    return np.clip(around, 0, frames - 1)


# The entry's own constants, on [0, 1]; studio range as BT.601, but rounded.
_TO_YCBCR = np.array([[0.257, 0.504, 0.098], [-0.148, -0.291, 0.439], [0.439, -0.368, -0.071]])
_OFFSET = np.array([0.063, 0.502, 0.502])


def rgb_to_ycbcr(rgb: jax.Array) -> jax.Array:
    """RGB [..., 3] in [0, 1] -> YCbCr [..., 3] with the entry's constants."""
    matrix = jnp.asarray(_TO_YCBCR.T, rgb.dtype)
    exact = jax.lax.Precision.HIGHEST
    return jnp.matmul(rgb, matrix, precision=exact) + jnp.asarray(_OFFSET, rgb.dtype)


def ycbcr_to_rgb(ycbcr: jax.Array) -> jax.Array:
    """The inverse of `rgb_to_ycbcr`, clamped to [0, 1]."""
    matrix = jnp.asarray(np.linalg.inv(_TO_YCBCR).T, ycbcr.dtype)
    exact = jax.lax.Precision.HIGHEST
    rgb = jnp.matmul(ycbcr - jnp.asarray(_OFFSET, ycbcr.dtype), matrix, precision=exact)
    return jnp.clip(rgb, 0, 1)


def restore_rgb(module: MFVQESRY, variables, frames: jax.Array) -> jax.Array:
    """RGB frames [B, tmp, H, W, 3] around one -> that frame [B, 4H, 4W, 3].

    Luma by the network, chroma bicubic with corners aligned. (The released script converts the
    interpolated picture instead of the restored one; this returns the restored one.) Sides are
    padded by repeating the edge to what the network divides by, and cropped.
    """
    multiple = 2**module.nb_unet
    height, width = frames.shape[2:4]
    more = ((0, -height % multiple), (0, -width % multiple))
    frames = jnp.pad(frames, ((0, 0), (0, 0), *more, (0, 0)), mode="edge")
    ycbcr = rgb_to_ycbcr(frames)
    y = module.apply(variables, jnp.moveaxis(ycbcr[..., 0], 1, -1))
    chroma = ycbcr[:, module.tmp // 2, ..., 1:]
    chroma = resize(chroma, y.shape[1:3], "bicubic", align_corners=True)
    rgb = ycbcr_to_rgb(jnp.concatenate([y.astype(chroma.dtype), chroma], -1))
    return rgb[:, : height * SCALE, : width * SCALE]


MODEL = MFVQESRY

VARIANTS: dict[str, dict[str, Any]] = {"ivl_aim2022": {}}

TORCH_RULES: dict[str, Any] = {
    "arrays": [(r"(.*\.)?(up_conv\d+\.2|tr_conv\.4|up[12])\.weight", *TRANSPOSED_CONVOLUTION)]
}
