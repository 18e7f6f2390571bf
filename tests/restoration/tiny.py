"""Small restoration models and cheap compilation for the tests beside this file."""

import jax
import numpy as np

from jaxmodels.restoration.swin2sr import Swin2SR

HEADS = {
    "pixelshuffle": 2,
    "pixelshuffle_aux": 4,
    "pixelshuffledirect": 3,
    "nearest+conv": 4,
    "pixelshuffle_hf": 2,
    "": 1,
}


def compiled(function, *arguments):
    """The function's value, by a quick compilation."""
    return quickly(function, *arguments)(*arguments)


def quickly(function, *arguments):
    """The function compiled for these shapes without optimization: tests run it a few times."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function).lower(*arguments).compile(compiler_options=options)


def swin2sr(upsampler="pixelshuffledirect", **changes):
    """One group of two blocks, four channels."""
    arguments = {
        "upscale": HEADS[upsampler],
        "upsampler": upsampler,
        "img_size": 16,
        "window_size": 4,
        "embed_dim": 4,
        "depths": (2,),
        "num_heads": (2,),
        "mlp_ratio": 1.0,
        "num_feat": 4,
        "cpb_hidden": 8,
    }
    return Swin2SR(**{**arguments, **changes})


def random_like(shapes, seed=0, scale=0.2):
    """Random leaves, so that no term is zero by its initialization."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(scale=scale, size=s.shape).astype(s.dtype), shapes)


def variables_of(module, seed=0, scale=0.2):
    """Random parameters of a module; buffers (means and deviations of pictures) at a half."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())
    variables = {"params": random_like(shapes["params"], seed, scale)}
    if "buffers" in shapes:
        half = lambda s: np.full(s.shape, 0.5, s.dtype)  # noqa: E731
        variables["buffers"] = jax.tree.map(half, shapes["buffers"])
    return variables


def image(*shape, seed=0):
    """Random floats in [0, 1]."""
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)
