"""Variables of tiny networks, drawn without compiling an initialization."""

import jax
import jax.numpy as jnp
import numpy as np


def drawn(module, seed: int = 0):
    """Variables of a module with its shapes: norms near 1, kernels of unit gain."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            return jnp.asarray(values * np.prod(leaf.shape[:-1]) ** -0.5, leaf.dtype)
        return jnp.asarray(0.1 * values + (path[-1].key == "scale"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, dict(shapes))
