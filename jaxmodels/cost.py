"""Multiply-accumulates and parameters of a module, counted without computing anything.

Counting rule of the RepGhost and GhostNet authors' profilers: a convolution costs
out_elements * (in / groups * kh * kw + [has bias]), a linear layer in * out (its bias is free),
and BatchNorm, activations, pooling, additions and gating cost nothing. One multiply-accumulate
is one operation here, as in most papers' "FLOPs".

Every layer leaves a mark with its cost in the traced program, and the marks are added up there: a
layer inside `nn.scan` or `lax.scan` counts as often as the loop runs.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive
from jax.interpreters import batching, mlir

from jaxmodels.layers.convolution import Conv, Linear

_CONVOLUTIONS = (Conv, nn.Conv, nn.ConvTranspose)
_LINEARS = (Linear, nn.Dense)


# The identity; `path` is the layer's, `macs` its cost for an output of `size` elements. It can be
# compiled, since functions that cache what they traced may run later with the mark inside.
_mark = Primitive("layer_cost")
_mark.def_impl(lambda x, **_: x)
_mark.def_abstract_eval(lambda x, **_: x)
batching.defvectorized(_mark)
mlir.register_lowering(_mark, lambda context, x, **_: [x])


class Cost(NamedTuple):
    """Cost of one forward pass.

    Attributes:
      macs: multiply-accumulates, the sum of `layers`.
      parameters: trainable ones.
      layers: the share of every layer by path.
      per_trip: the same for layers inside a `while_loop`, one trip each. How many trips there are
        only the data decide, so that these are not part of `macs`.
    """

    macs: int
    parameters: int
    layers: dict[str, int]
    per_trip: dict[str, int]


def count_cost(module: nn.Module, *inputs: jax.ShapeDtypeStruct, resolution=None) -> Cost:
    """Count `module` in evaluation mode on `inputs`, batch included.

    `inputs` default to `module.example_inputs()` (batch 1); `resolution` (pixels, or a pair
    height, width) replaces the size of that image. Parameters include BatchNorm's scale and bias
    and exclude running statistics.

    Convolutions and linear layers of this package and of Flax are counted; arithmetic that a
    module does by hand (attention, graph sums) is not. A scan counts its length times, `vmap` its
    axis, and of the branches of `lax.cond` or `switch` the dearest counts.
    """
    inputs = inputs or module.example_inputs()
    if resolution is not None:
        height, width = resolution if isinstance(resolution, tuple) else (resolution, resolution)
        batch, _, _, channels = inputs[0].shape
        image = jax.ShapeDtypeStruct((batch, height, width, channels), inputs[0].dtype)
        inputs = (image, *inputs[1:])

    def mark(next_fun, args, kwargs, context):
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
            y = _mark.bind(y, path=".".join(layer.path), macs=macs, size=y.size)
        return y

    def init(*arrays):
        with nn.intercept_methods(mark):
            return module.init(jax.random.key(0), *arrays)

    program, shapes = jax.make_jaxpr(init, return_shape=True)(*inputs)
    layers, per_trip = Counter(), Counter()
    _add(program.jaxpr, 1, layers, per_trip)
    parameters = sum(math.prod(p.shape) for p in jax.tree.leaves(shapes.get("params", {})))
    return Cost(layers.total(), parameters, dict(layers), dict(per_trip))


def _programs(params: dict) -> list[Jaxpr]:
    """The programs that an equation runs: values of its parameters, alone or in tuples."""
    values = jax.tree.leaves(list(params.values()), is_leaf=lambda v: isinstance(v, ClosedJaxpr))
    return [
        value.jaxpr if isinstance(value, ClosedJaxpr) else value
        for value in values
        if isinstance(value, (ClosedJaxpr, Jaxpr))
    ]


def _add(program: Jaxpr, times: int, layers: Counter, per_trip: Counter) -> None:
    """Adds what `times` runs of `program` cost."""
    for step in program.eqns:
        inner = _programs(step.params)
        if step.primitive is _mark:
            path, macs, size = (step.params[k] for k in ("path", "macs", "size"))
            # Under `vmap` the output has more elements than the layer saw.
            layers[path] += times * macs * (step.outvars[0].aval.size // max(size, 1))
        elif step.primitive.name == "cond":
            branches = [(Counter(), Counter()) for _ in inner]
            for branch, found in zip(inner, branches):
                _add(branch, times, *found)
            dearest = max(branches, key=lambda found: found[0].total() + found[1].total())
            layers.update(dearest[0])
            per_trip.update(dearest[1])
        elif step.primitive.name == "while":
            for part in inner:
                _add(part, times, per_trip, per_trip)
        else:
            length = step.params["length"] if step.primitive.name == "scan" else 1
            for part in inner:
                _add(part, times * length, layers, per_trip)


def count_parameters(variables: dict) -> int:
    """Number of trainable parameters in a variable tree (the `params` collection)."""
    return sum(int(jnp.size(leaf)) for leaf in jax.tree.leaves(variables["params"]))
