"""LPIPS: distance of images in the features of a classification network.

R. Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv
1801.03924, after richzhang/PerceptualSimilarity@082bb24 (`lpips/lpips.py`). The published file
holds the `lin` weights alone; the trunk is torchvision's VGG-16 or AlexNet: give `load` the union
of both state dicts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmodels.layers.convolution import Conv
from jaxmodels.vision.ir_se import narrowed

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10

# By slice: (torchvision index, width, kernel, stride, padding) of convolutions, "pool" between.
TRUNKS: dict[str, tuple[tuple, ...]] = {
    "vgg": (
        ((0, 64), (2, 64)),
        ("pool", (5, 128), (7, 128)),
        ("pool", (10, 256), (12, 256), (14, 256)),
        ("pool", (17, 512), (19, 512), (21, 512)),
        ("pool", (24, 512), (26, 512), (28, 512)),
    ),
    "alex": (
        ((0, 64, 11, 4, 2),),
        ("pool", (3, 192, 5, 1, 2)),
        ("pool", (6, 384)),
        ((8, 256),),
        ((10, 256),),
    ),
}
# (window, stride) of the trunk's pools; no padding, incomplete windows dropped.
POOLS = {"vgg": (2, 2), "alex": (3, 2)}
# Of the original release ("0.0"), which left the scaling of its inputs out, and the corrected one.
VERSIONS = ("0.0", "0.1")
# Smallest images of which every tap keeps a pixel.
SMALLEST = {"vgg": 16, "alex": 31}


def max_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    """Maximum of windows without padding, x [B, H, W, C]."""
    shape, strides = (1, window, window, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, shape, strides, "VALID")


class Trunk(nn.Module):
    """The five feature maps of VGG-16 (`vgg`) or AlexNet (`alex`), each after its ReLU."""

    net: str = "alex"
    width_divisor: int = 1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        taps = []
        for k, part in enumerate(TRUNKS[self.net], 1):
            for layer in part:
                if layer == "pool":
                    x = max_pool(x, *POOLS[self.net])
                    continue
                index, width, *rest = layer
                kernel, stride, padding = rest or (3, 1, 1)
                x = nn.relu(
                    Conv(
                        narrowed(width, self.width_divisor),
                        kernel,
                        stride,
                        padding,
                        use_bias=True,
                        dtype=self.dtype,
                        param_dtype=self.param_dtype,
                        name=f"slice{k}.{index}",
                    )(x)
                )
            taps.append(x)
        return taps


class LPIPS(nn.Module):
    """Perceptual distance of images x, y [B, H, W, 3] in [-1, 1] -> [B].

    `net` is "alex" or "vgg", `width_divisor` narrows the trunk, `version` "0.0" does not scale the
    images. `normalize` in the call takes images in [0, 1]. Differentiable at equal and at black
    features.
    """

    net: str = "alex"
    width_divisor: int = 1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    version: str = "0.1"

    def __post_init__(self) -> None:
        if self.net not in TRUNKS:
            raise ValueError(f"net is one of {', '.join(TRUNKS)}, got {self.net!r}")
        if self.version not in VERSIONS:
            raise ValueError(f"version is one of {', '.join(VERSIONS)}, got {self.version!r}")
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: two images [1, 64, 64, 3]."""
        return (jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32),) * 2

    def setup(self) -> None:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.trunk = Trunk(self.net, self.width_divisor, name="net", **types)
        for k in range(5):
            setattr(self, f"lin{k}", NonNegative(name=f"lin{k}.model.1", **types))

    def __call__(self, x: jax.Array, y: jax.Array, normalize: bool = False) -> jax.Array:
        return sum(self.layers(x, y, normalize))

    def layers(self, x: jax.Array, y: jax.Array, normalize: bool = False) -> list[jax.Array]:
        """The five summands, each [B]."""
        if x.shape != y.shape or x.ndim != 4 or x.shape[-1] != 3:
            raise ValueError(f"two images [batch, height, width, 3], got {x.shape}, {y.shape}")
        return self.distances(self.features(x, normalize), self.features(y, normalize))

    def features(self, x: jax.Array, normalize: bool = False) -> list[jax.Array]:
        """Five maps of unit vectors [B, h, w, C], of which `distances` takes two lists."""
        if min(x.shape[1:3]) < SMALLEST[self.net]:
            raise ValueError(
                f"LPIPS with {self.net} needs images of at least {SMALLEST[self.net]} pixels, got "
                f"{x.shape[1]}x{x.shape[2]}"
            )
        x = 2 * x - 1 if normalize else x
        if self.version != "0.0":
            x = (x - jnp.asarray(SHIFT, x.dtype)) / jnp.asarray(SCALE, x.dtype)
        return [_unit(f.astype(jnp.promote_types(f.dtype, jnp.float32))) for f in self.trunk(x)]

    def distances(self, a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
        """Spatial means of the weighted squared differences, each [B]."""
        found = []
        for k, (f, g) in enumerate(zip(a, b)):
            found.append(getattr(self, f"lin{k}")(jnp.square(f - g)).mean((1, 2, 3)))
        return found


class NonNegative(nn.Module):
    """The 1x1 linear map of a tap, [B, h, w, C] -> [B, h, w, 1]; dropout is off.

    Training clips the weights at zero, here as in the official `clamp_weights`.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (1, 1, x.shape[-1], 1)
        init = nn.initializers.constant(1 / x.shape[-1])
        return x @ self.param("kernel", init, shape, self.param_dtype)[0, 0].astype(x.dtype)


def _unit(f: jax.Array) -> jax.Array:
    """f / (|f| + 1e-10) along channels, with a gradient of zero (not NaN) where f is zero."""
    squares = jnp.square(f).sum(-1, keepdims=True)
    norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    return f / (norm + EPSILON)


MODEL = LPIPS

VARIANTS: dict[str, dict[str, Any]] = {"lpips_alex": {"net": "alex"}, "lpips_vgg": {"net": "vgg"}}


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """`lins.k` is `lin{k}` again; shift and scale travel along."""
    if not isinstance(module, LPIPS):
        return {}
    shape = (1, 3, 1, 1)
    return {
        "aliases": {f"lins.{k}.model.1.weight": f"lin{k}.model.1.weight" for k in range(5)},
        "travels": [r"scaling_layer\.(shift|scale)"],
        "fresh": {
            "scaling_layer.shift": np.asarray(SHIFT, np.float32).reshape(shape),
            "scaling_layer.scale": np.asarray(SCALE, np.float32).reshape(shape),
        },
        "drops": [r"classifier\..*"],
    }


def check_checkpoint(keys: Any, module: nn.Module) -> None:
    """Say which half is missing when a file has only the trunk or only the linear maps."""
    if not isinstance(module, LPIPS):
        return
    trunk = any(re.match(r"(net\.slice|features\.)", k) for k in keys)
    linear = any(re.match(r"lins?\.?\d", k) for k in keys)
    if trunk and linear:
        return
    if not trunk and not linear:
        raise ValueError(
            f"the checkpoint holds {', '.join(sorted(keys)[:3])}; LPIPS has lin0.model.1.weight, "
            "net.slice1.0.weight (or torchvision's features.0.weight)"
        )
    half, other = (
        ("lin0.model.1.weight", "trunk") if trunk else ("features.0.weight", "linear maps")
    )
    raise ValueError(
        f"the checkpoint holds the {other} alone; LPIPS needs {half} ... as well: load the union "
        "of the lpips file and torchvision's trunk"
    )


def upgrade_checkpoint(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """torchvision's `features.N` -> `net.slice{k}.N`."""
    if not isinstance(module, LPIPS):
        return dict(state)
    slices = {
        layer[0]: k
        for k, part in enumerate(TRUNKS[module.net], 1)
        for layer in part
        if layer != "pool"
    }

    def renamed(key: str) -> str:
        found = re.fullmatch(r"features\.(\d+)\.(weight|bias)", key)
        if found and int(found[1]) in slices:
            return f"net.slice{slices[int(found[1])]}.{found[1]}.{found[2]}"
        return key

    return {renamed(key): value for key, value in state.items()}
