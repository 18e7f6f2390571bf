"""A ScaleNet space of two stages that compiles in seconds."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.interop import catalog
from jaxmodels.search import scalenet_space

MULTIPLIERS = ((1.0,), (1.1, 1.2), (1.4, 1.6))
ARGUMENTS = {
    "backbone": scalenet_space.backbone(
        (6, 4, 6), (1, 2), (1, 2), 2, 8, ("id", "ir_3x3_se", "ir_5x5_nse")
    ),
    "head": {"linear1": {"dim_in": 8, "dim_out": 3}},
    "depth_multiplier": MULTIPLIERS,
    "channel_multiplier": MULTIPLIERS,
    "resolution_multiplier": ((12,), (12, 13), (14, 16)),
    "max_scaling_stage": 2,
}
SPACE = scalenet_space.make_space(**ARGUMENTS)


# Programs that run once: most of their time would go to optimizing.
CHEAP = {"xla_backend_optimization_level": 0}


def drawn_variables(module, seed: int = 0):
    """Random variables without compiling `init`; variances and scales about one."""
    shapes = catalog.shapes(module)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("var", "scale"):
            return jnp.asarray(0.7 + 0.6 * rng.random(leaf.shape), leaf.dtype)
        size = 0.3 if name in ("mean", "bias", "cls_token", "pos_embed") else (
            np.prod(leaf.shape[-4:-1]) ** -0.5
        )  # fmt: skip
        return jnp.asarray(size * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)
