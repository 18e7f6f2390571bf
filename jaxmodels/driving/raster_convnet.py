"""The rasterized ConvNet that VectorNet is compared with.

Baseline of arXiv 2005.04259, section 4.2: bird's-eye rasters of the last N frames, stacked, through
a shortened ResNet-18, a crop of the final map round the target and one linear layer. The paper's
sizes (all parameters and FLOPs of its Table 2) determine the structure; names are ours.
"""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.layers.normalization import BatchNorm

STRIDE = 4


class BasicBlock(nn.Module):
    """Two KxK convolutions with BatchNorm, x [B, H, W, C] -> same; `proj` is a 1x1 shortcut."""

    width: int
    kernel: int
    projection: bool
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = dict(axis_name=self.bn_axis_name, **types)
        y = Conv(self.width, self.kernel, name="conv1", **types)(x)
        y = nn.relu(BatchNorm(name="bn1", **norm)(y, train))
        y = Conv(self.width, self.kernel, name="conv2", **types)(y)
        y = BatchNorm(name="bn2", **norm)(y, train)
        if self.projection:
            x = Conv(self.width, 1, name="proj.0", **types)(x)
            x = BatchNorm(name="proj.1", **norm)(x, train)
        return nn.relu(x + y)


class RasterConvNet(nn.Module):
    """Rasters [B, H, W, 3N] and the target's cells -> absolute coordinates [B, T, 2].

    Attributes:
      in_ch: 3N channels. width: 64 as published. kernel: 3, 5 or 7, of the residual blocks.
      horizon: T. crop: `c1`, `c3`, ...: mean of the KxK cells centered on the target's last cell,
        always over K*K (zeros outside the map); `traj`: mean of the 1x1 features at the cells of
        all observed steps.

    Coordinates are metres in the raster's frame. One pass over the map serves any number of
    targets: `cells` [B, M, N, 2] gives [B, M, T, 2].
    """

    in_ch: int = 60
    width: int = 64
    kernel: int = 3
    horizon: int = 30
    crop: str = "traj"
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        crop_size(self.crop)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel = {self.kernel} must be odd")
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: image [1, 400, 400, 3N], cells [1, 1, 2]."""
        return (
            jax.ShapeDtypeStruct((1, 400, 400, self.in_ch), jnp.float32),
            jax.ShapeDtypeStruct((1, 1, 2), jnp.int32),
        )

    def __call__(self, image: jax.Array, cells: jax.Array, train: bool = False) -> jax.Array:
        """Coordinates of one target [B, T, 2], or of several [B, M, T, 2]."""
        return self.intermediates(image, cells, train)["coords"]

    @nn.compact
    def intermediates(
        self, image: jax.Array, cells: jax.Array, train: bool = False
    ) -> dict[str, jax.Array]:
        """`feature_map` [B, H/4, W/4, C], `vehicle` [B, (M,) C], `coords` [B, (M,) T, 2].

        image [B, H, W, 3N] (integers are taken as they are: 0 and 1); cells [B, (M,) N, 2] integer
        (column, row) of the stride-4 map, the last one being the current one.
        """
        if image.ndim != 4 or image.shape[-1] != self.in_ch:
            raise ValueError(
                f"image must be [B, H, W, {self.in_ch}], got {tuple(image.shape)}: "
                f"{image.shape[-1]} channels for in_ch = {self.in_ch}"
            )
        if cells.shape[-1] != 2 or cells.ndim not in (3, 4) or cells.shape[0] != len(image):
            raise ValueError(f"cells must be [B, N, 2] or [B, M, N, 2], got {tuple(cells.shape)}")
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = dict(axis_name=self.bn_axis_name, **types)
        x = jnp.asarray(image, self.dtype)
        x = Conv(self.width, 7, strides=2, padding=3, name="conv1", **types)(x)
        x = nn.relu(BatchNorm(name="bn1", **norm)(x, train))
        x = lax.reduce_window(
            x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
        )
        block = dict(bn_axis_name=self.bn_axis_name, **types)
        for i in range(2):
            name = f"layer1.{i}"
            x = BasicBlock(self.width, self.kernel, i == 0, name=name, **block)(x, train)
        vehicle = crop_features(x, cells, self.crop)
        coords = Linear(2 * self.horizon, name="fc", **types)(vehicle)
        coords = coords.astype(jnp.promote_types(self.dtype, jnp.float32))
        coords = coords.reshape(*vehicle.shape[:-1], self.horizon, 2)
        return {"feature_map": x, "vehicle": vehicle, "coords": coords}


def crop_size(crop: str) -> int:
    """K of the crop `cK`, 0 for `traj`. Raises ValueError for anything else."""
    if crop == "traj":
        return 0
    found = re.fullmatch(r"c(\d+)", crop)
    if not found or int(found[1]) % 2 == 0:
        raise ValueError(f"crop {crop!r}; known: traj, c1, c3, c5, ... (odd sizes)")
    return int(found[1])


def crop_features(feature_map: jax.Array, cells: jax.Array, crop: str) -> jax.Array:
    """Mean feature of each target's crop, map [B, h, w, C], cells [B, (M,) N, 2] -> [B, (M,) C].

    Cells outside the map count as zeros. A weighted sum over the map: its gradient needs no
    scatter.
    """
    size = crop_size(crop)
    height, width = feature_map.shape[1:3]
    chosen = cells if size == 0 else cells[..., -1:, :]
    reach = size // 2
    columns = jnp.abs(jnp.arange(width) - chosen[..., :1]) <= reach
    rows = jnp.abs(jnp.arange(height) - chosen[..., 1:]) <= reach
    kind = feature_map.dtype
    counted = size * size if size else cells.shape[-2]
    weights = jnp.einsum("...nh,...nw->...hw", rows.astype(kind), columns.astype(kind)) / counted
    if cells.ndim == 3:
        return jnp.einsum("bhw,bhwc->bc", weights, feature_map)
    return jnp.einsum("bmhw,bhwc->bmc", weights, feature_map)


def count_parameters(in_ch: int = 30, kernel: int = 3, width: int = 64) -> int:
    """Parameters without the decoder, as the paper counts them (246,400 for 30 channels, k3)."""
    convolutions = width * (49 * in_ch + width + 4 * width * kernel**2)
    return convolutions + 6 * 2 * width


def count_flops(resolution: int = 400, in_ch: int = 30, kernel: int = 3, width: int = 64) -> int:
    """2 x multiply-accumulates of the convolutions of one pass over a square raster."""
    half = (resolution + 6 - 7) // 2 + 1
    quarter = (half + 2 - 3) // 2 + 1
    stem = half**2 * width * 49 * in_ch
    return 2 * (stem + quarter**2 * width * (width + 4 * width * kernel**2))


MODEL = RasterConvNet

VARIANTS: dict[str, dict[str, Any]] = {
    f"raster_k{kernel}_{crop}": {"kernel": kernel, "crop": crop}
    for kernel in (3, 5, 7)
    for crop in ("c1", "c3", "c5", "traj")
}
