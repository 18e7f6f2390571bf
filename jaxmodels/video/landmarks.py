"""FAN: a stack of hourglass networks that draws a heat map for every facial landmark.

A. Bulat, G. Tzimiropoulos, "How far are we from solving the 2D & 3D Face Alignment problem?", arXiv
1703.07332, after 1adrianb/face-alignment@608505f (`face_alignment/models/fan.py`, `utils.py`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.convolution import Conv
from jaxmodels.layers.normalization import BatchNorm
from jaxmodels.vision.ir_se import narrowed

LANDMARKS = 68
HOURGLASS_DEPTH = 4
# The 68-point scheme: both eyes, and the mouth.
EYES, MOUTH = slice(36, 48), slice(48, 68)
LEFT_EYE, RIGHT_EYE, MOUTH_CORNERS = slice(36, 42), slice(42, 48), (48, 54)


def average_pool(x: jax.Array) -> jax.Array:
    """2x2 means with stride 2, [B, H, W, C] -> [B, H // 2, W // 2, C]."""
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def upsample_nearest(x: jax.Array) -> jax.Array:
    """Every pixel twice along both axes."""
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)


class ConvBlock(nn.Module):
    """Three pre-activated 3x3 convolutions (O/2, O/4, O/4), concatenated, beside a shortcut."""

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        parts, y = [], x
        for i, share in enumerate((2, 4, 4), 1):
            y = nn.relu(BatchNorm(name=f"bn{i}", **types)(y, train))
            y = Conv(narrowed(self.features, share), 3, name=f"conv{i}", **types)(y)
            parts.append(y)
        if x.shape[-1] != self.features:
            x = nn.relu(BatchNorm(name="downsample.0", **types)(x, train))
            x = Conv(self.features, name="downsample.2", **types)(x)
        return jnp.concatenate(parts, -1) + x


class HourGlass(nn.Module):
    """Blocks on the way down to 1 / 2^depth and up again, x [B, H, W, C] -> the same shape."""

    features: int
    depth: int = HOURGLASS_DEPTH
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def block(name, x):
            return ConvBlock(self.features, name=name, **types)(x, train)

        def level(n, x):
            up = block(f"b1_{n}", x)
            low = block(f"b2_{n}", average_pool(x))
            low = level(n - 1, low) if n > 1 else block(f"b2_plus_{n}", low)
            return up + upsample_nearest(block(f"b3_{n}", low))

        return level(self.depth, x)


class FAN(nn.Module):
    """Heat maps of landmarks, images [B, S, S, 3] in [0, 1] -> num_modules x [B, S/4, S/4, 68].

    S is a multiple of 64 (256 for published weights). `width_divisor` divides every width,
    `n_landmarks` is the number of maps.
    """

    num_modules: int = 4
    n_landmarks: int = LANDMARKS
    width_divisor: int = 1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, 64, 64, 3]."""
        return (jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32),)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> list[jax.Array]:
        if x.ndim != 4 or x.shape[3] != 3 or x.shape[1] % 64 or x.shape[2] % 64:
            raise ValueError(
                f"images must be [batch, S, S, 3] with S a multiple of 64, got {x.shape}"
            )
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        widths = [narrowed(w, self.width_divisor) for w in (64, 128, 128, 256)]
        conv = dict(use_bias=True, **types)

        x = Conv(widths[0], 7, 2, name="conv1", **conv)(x)
        x = nn.relu(BatchNorm(name="bn1", **types)(x, train))
        x = average_pool(ConvBlock(widths[1], name="conv2", **types)(x, train))
        x = ConvBlock(widths[2], name="conv3", **types)(x, train)
        x = ConvBlock(widths[3], name="conv4", **types)(x, train)

        heat_maps = []
        for i in range(self.num_modules):
            y = HourGlass(widths[3], name=f"m{i}", **types)(x, train)
            y = ConvBlock(widths[3], name=f"top_m_{i}", **types)(y, train)
            y = Conv(widths[3], name=f"conv_last{i}", **conv)(y)
            y = nn.relu(BatchNorm(name=f"bn_end{i}", **types)(y, train))
            heat = Conv(self.n_landmarks, name=f"l{i}", **conv)(y)
            heat_maps.append(heat)
            if i < self.num_modules - 1:
                x = x + Conv(widths[3], name=f"bl{i}", **conv)(y)
                x = x + Conv(widths[3], name=f"al{i}", **conv)(heat)
        return heat_maps


def decode_heat_maps(heat: jax.Array) -> jax.Array:
    """Landmarks [B, K, 2] (x, y) in heat-map pixels, the official way, of maps [B, h, w, K].

    The maximum, moved by a quarter towards the larger neighbor (inside the border), counted from 1,
    minus one half. Not differentiable; `soft_landmarks` is.
    """
    batch, height, width, count = heat.shape
    flat = heat.reshape(batch, height * width, count)
    place = flat.argmax(1)
    x, y = place % width, place // width

    def at(rows, columns):
        index = jnp.clip(rows, 0, height - 1) * width + jnp.clip(columns, 0, width - 1)
        return jnp.take_along_axis(flat, index[:, None], 1)[:, 0]

    inside = (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
    shift_x = jnp.sign(at(y, x + 1) - at(y, x - 1))
    shift_y = jnp.sign(at(y + 1, x) - at(y - 1, x))
    shift = jnp.where(inside[..., None], jnp.stack([shift_x, shift_y], -1) * 0.25, 0)
    return jnp.stack([x, y], -1) + 1 + shift - 0.5


def soft_landmarks(heat: jax.Array, beta: float = 100.0) -> jax.Array:
    """Landmarks [B, K, 2] (x, y) as means under softmax(beta h), in heat-map pixels + 0.5.

    The offset makes them agree with `decode_heat_maps`.
    """
    batch, height, width, count = heat.shape
    flat = heat.reshape(batch, height * width, count).astype(jnp.float32)
    share = jax.nn.softmax(beta * flat, 1).reshape(batch, height, width, count)
    x = (share.sum(1) * jnp.arange(width)[:, None]).sum(1)
    y = (share.sum(2) * jnp.arange(height)[:, None]).sum(1)
    return jnp.stack([x, y], -1) + 0.5


def landmark_weights(count: int = LANDMARKS) -> jax.Array:
    """1, and 3 for the eyes and the mouth of the 68-point scheme; [K]."""
    weights = jnp.ones(count)
    if count == LANDMARKS:
        weights = weights.at[EYES].set(3.0).at[MOUTH].set(3.0)
    return weights


def landmark_loss(points: jax.Array, target: jax.Array, size: float = 64.0) -> jax.Array:
    """mean over points of a_j |l_j - t_j|_1 / size, points [..., K, 2]; no gradient to the target.

    `size` is the width of the frame in which the points are given (64 for heat maps).
    """
    distance = jnp.abs(points - jax.lax.stop_gradient(target)).sum(-1)
    return (distance * landmark_weights(points.shape[-2])).mean() / size


MODEL = FAN

VARIANTS: dict[str, dict[str, Any]] = {
    "fan_4": {"num_modules": 4},
    "fan_2": {"num_modules": 2},
    "fan_1": {"num_modules": 1},
}
