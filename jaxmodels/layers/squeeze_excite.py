"""Squeeze-and-excitation, as mobile networks have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.convolution import Conv
from jaxmodels.layers.initializers import Initializer, torch_kernel
from jaxmodels.layers.rounding import make_divisible


def hard_sigmoid(x: jax.Array) -> jax.Array:
    """relu6(x + 3) / 6."""
    return jnp.clip(x + 3, 0, 6) / 6


class SqueezeExcite(nn.Module):
    """x * gate(expand(relu(reduce(mean over H, W of x)))), x [B, H, W, C].

    The bottleneck has `make_divisible((base or features) * ratio, divisor)` channels; both maps are
    1x1 convolutions with bias, named by `names` after the checkpoint at hand.
    """

    features: int
    ratio: float = 0.25
    divisor: int = 4
    base: int | None = None
    names: tuple[str, str] = ("conv_reduce", "conv_expand")
    gate: Callable[[jax.Array], jax.Array] = hard_sigmoid
    kernel_init: Initializer = torch_kernel()
    bias_init: Initializer | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: x [1, 8, 8, C]."""
        return (jax.ShapeDtypeStruct((1, 8, 8, self.features), jnp.float32),)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        convolution = dict(
            use_bias=True,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        reduced = make_divisible((self.base or self.features) * self.ratio, self.divisor)
        z = x.mean((1, 2), keepdims=True)
        z = nn.relu(Conv(reduced, name=self.names[0], **convolution)(z))
        z = Conv(self.features, name=self.names[1], **convolution)(z)
        return x * self.gate(z)
