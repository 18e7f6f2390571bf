"""Multiply-accumulates and parameters of a module, counted without computing anything.

Counting rule of the RepGhost and GhostNet authors' profilers: a convolution costs
out_elements * (in / groups * kh * kw + [has bias]), a linear layer in * out (its bias is free),
and BatchNorm, activations, pooling, additions and gating cost nothing. One multiply-accumulate
is one operation here, as in most papers' "FLOPs".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.convolution import Conv, Linear

_CONVOLUTIONS = (Conv, nn.Conv, nn.ConvTranspose)
_LINEARS = (Linear, nn.Dense)


class Cost(NamedTuple):
    """`macs` of one forward pass, trainable `parameters`, and the share of every layer by path."""

    macs: int
    parameters: int
    layers: dict[str, int]


def count_cost(module: nn.Module, *inputs: jax.ShapeDtypeStruct, resolution=None) -> Cost:
    """Count `module` in evaluation mode on `inputs`, batch included.

    `inputs` default to `module.example_inputs()` (batch 1); `resolution` (pixels, or a pair
    height, width) replaces the size of that image. Parameters include BatchNorm's scale and bias
    and exclude running statistics.

    Convolutions and linear layers of this package and of Flax are counted; arithmetic that a
    module does by hand (attention, graph sums) is not.
    """
    inputs = inputs or module.example_inputs()
    if resolution is not None:
        height, width = resolution if isinstance(resolution, tuple) else (resolution, resolution)
        batch, _, _, channels = inputs[0].shape
        image = jax.ShapeDtypeStruct((batch, height, width, channels), inputs[0].dtype)
        inputs = (image, *inputs[1:])
    layers: dict[str, int] = {}

    def count(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, _CONVOLUTIONS + _LINEARS):
            params = layer.variables["params"]
            kernel = params["kernel"].shape
            if isinstance(layer, _LINEARS):
                macs = math.prod(y.shape[:-1]) * math.prod(kernel)
            elif isinstance(layer, nn.ConvTranspose):
                macs = math.prod(args[0].shape[:-1]) * math.prod(kernel)
                macs += y.size * ("bias" in params)
            else:
                macs = y.size * (math.prod(kernel[:-1]) + ("bias" in params))
            path = ".".join(layer.path)
            layers[path] = layers.get(path, 0) + macs
        return y

    def init(*arrays):
        with nn.intercept_methods(count):
            return module.init(jax.random.key(0), *arrays)

    shapes = jax.eval_shape(init, *inputs)
    parameters = sum(math.prod(p.shape) for p in jax.tree.leaves(shapes.get("params", {})))
    return Cost(sum(layers.values()), parameters, layers)


def count_parameters(variables: dict) -> int:
    """Number of trainable parameters in a variable tree (the `params` collection)."""
    return sum(int(jnp.size(leaf)) for leaf in jax.tree.leaves(variables["params"]))
