"""Small plain convolutional networks: attack references, surrogates and victims."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.vision.images import check_images

ACTIVATIONS = {
    "tanh": jnp.tanh,
    "relu": nn.relu,
    "leaky_relu": lambda x: nn.leaky_relu(x, 0.01),
    "elu": nn.elu,
    "softplus": nn.softplus,
    "sigmoid": nn.sigmoid,
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
}
# How face networks scale pixels of 0..255 (the last one: of 0..1) before their first layer.
INPUT_SCALINGS = {
    "x": lambda x: x,
    "x/255": lambda x: x / 255,
    "(x-127.5)/128": lambda x: (x - 127.5) / 128,
    "(x-127.5)/127.5": lambda x: (x - 127.5) / 127.5,
    "(x/255-0.5)/0.5": lambda x: (x / 255 - 0.5) / 0.5,
    "(x-0.5)/0.5": lambda x: (x - 0.5) / 0.5,
}


def _choice(what: str, value: str, known: dict) -> Any:
    if value not in known:
        raise ValueError(f"{what} {value!r}; known: {', '.join(known)}")
    return known[value]


def _trunk(module, x: jax.Array) -> jax.Array:
    """Three convolutions of stride 2, flattened in the order (C, H, W); children of `module`."""
    for i in range(3):
        conv = Conv(
            module.width * 2**i,
            3,
            2,
            use_bias=True,
            dtype=module.dtype,
            param_dtype=module.param_dtype,
            name=f"conv{i + 1}",
        )
        x = ACTIVATIONS[module.act](conv(x))
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)


class TinyConvClassifier(nn.Module):
    """Three 3x3 convolutions of stride 2 with an activation, flattened (C, H, W), one linear map.

    Images [B, H, W, 3] -> logits [B, classes]; channels are width, 2 width, 4 width. `size` is the
    side of the images that `example_inputs` and thus checkpoints are for.
    """

    width: int = 6
    classes: int = 10
    act: str = "tanh"
    size: int = 32
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        _choice("TinyConvClassifier act", self.act, ACTIVATIONS)
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, size, size, 3]."""
        return (jax.ShapeDtypeStruct((1, self.size, self.size, 3), jnp.float32),)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train
        check_images(x)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = _trunk(self, x)
        return Linear(self.classes, name="fc", **types)(x)


class TinyConvEmbedder(nn.Module):
    """The same trunk with pixels scaled as `input_scaling` says -> unit embeddings [B, dim]."""

    width: int = 6
    dim: int = 16
    act: str = "tanh"
    input_scaling: str = "x"
    size: int = 32
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        _choice("TinyConvEmbedder act", self.act, ACTIVATIONS)
        _choice("TinyConvEmbedder input_scaling", self.input_scaling, INPUT_SCALINGS)
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, size, size, 3]."""
        return (jax.ShapeDtypeStruct((1, self.size, self.size, 3), jnp.float32),)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train
        check_images(x)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = INPUT_SCALINGS[self.input_scaling](x)
        x = _trunk(self, x)
        x = Linear(self.dim, name="fc", **types)(x)
        # As torch's `normalize`: norms below 1e-12 divide by that.
        return x / jnp.maximum(jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24)), 1e-12)


MODEL = TinyConvClassifier
