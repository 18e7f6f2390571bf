"""Drawing ScaleNet's sub-networks inside `jit`: tables of whole numbers, and two laws.

Hierarchical sampling (HSS) is that of luminolx/ScaleNet@22487c8
(core/searcher/uniform_searcher.py).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.search.scalenet import WIDTH_ARITHMETIC, Subnet
from jaxmodels.search.scalenet_space import Space

LAWS = ("hierarchical", "uniform")


class Draw(NamedTuple):
    """One sub-network by numbers; width, depth and resolution count over all stages' lists.

    Attributes:
      ops: int32 [L]. stage, width, depth, resolution: int32 [].
    """

    ops: Any
    stage: Any
    width: Any
    depth: Any
    resolution: Any


class Tables(NamedTuple):
    """What a draw's numbers mean, arrays indexed by them.

    Attributes:
      inputs, outputs: channels by width and block, int32 [W, L]; hidden: and op, [W, L, O].
      reach: depth after scaling by depth multiplier and base depth, int32 [D, n + 1].
      sizes: pixels by resolution, int32 [R].
      first: number of the first multiplier and resolution of each stage, int32 [S, 2].
      counts: multipliers and resolutions of each stage, int32 [S, 2].
      widths, depths: the multipliers themselves, float64.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    hidden: np.ndarray
    reach: np.ndarray
    sizes: np.ndarray
    first: np.ndarray
    counts: np.ndarray
    widths: np.ndarray
    depths: np.ndarray


@functools.lru_cache(maxsize=16)
def tables(space: Space, arithmetic: str = "float64") -> Tables:
    """The tables of a space; `arithmetic` as in `make_subnet`."""
    if arithmetic not in WIDTH_ARITHMETIC:
        raise ValueError(f"width arithmetic {arithmetic!r}; known: {', '.join(WIDTH_ARITHMETIC)}")
    stages = range(space.max_scaling_stage + 1)
    widths = [w for s in stages for w in space.widths[s]]
    depths = [d for s in stages for d in space.depths[s]]
    sizes = [r for s in stages for r in space.resolutions[s]]
    counts = [(len(space.widths[s]), len(space.resolutions[s])) for s in stages]
    if any(len(space.depths[s]) != len(space.widths[s]) for s in stages):
        raise ValueError("depth and width multipliers share one list in every scaling stage")
    ops = int(space.op_counts.max())
    hidden = np.zeros((len(widths), len(space.blocks), ops), np.int32)
    inputs, outputs = hidden[..., 0].copy(), hidden[..., 0].copy()
    for i, w in enumerate(widths):
        w = float(np.float32(w)) if arithmetic == "float32" else float(w)
        for j, block in enumerate(space.blocks):
            inputs[i, j], outputs[i, j] = block.input_width(w), block.output_width(w)
            for k in range(len(block.ops)):
                hidden[i, j, k] = block.hidden_width(k, w)
    most = max(base for base, _ in space.depth_stage)
    reach = [[math.ceil(n * d) for n in range(most + 1)] for d in depths]
    counts = np.array(counts, np.int32)
    first = np.concatenate([np.zeros((1, 2), np.int32), np.cumsum(counts, 0)[:-1]])
    return Tables(
        *(inputs, outputs, hidden, np.array(reach, np.int32), np.array(sizes, np.int32)),
        *(first.astype(np.int32), counts, np.array(widths), np.array(depths)),
    )


def sample(space: Space, key: jax.Array, law: str = "hierarchical") -> Draw:
    """One random sub-network; fixed shapes, so that nothing is compiled twice.

    "hierarchical": a scaling stage in proportion to its number of multipliers, then width, depth
    and resolution uniform and independent within it. "uniform": each of the three uniform over all
    stages' values, whatever the others are (our baseline). Then an op for every block, uniform
    over those that are not the identity, and a base depth uniform in 1..n for every stage; what
    lies behind it up to the scaled depth repeats the last op.
    """
    if law not in LAWS:
        raise ValueError(f"sampling law {law!r}; known: {', '.join(LAWS)}")
    t = tables(space)
    keys = jax.random.split(key, 6)
    stage = jax.random.choice(keys[0], len(t.counts), p=jnp.asarray(t.counts[:, 0] / len(t.widths)))
    stage = stage.astype(jnp.int32)

    def number(key, column):
        if law == "uniform":
            return jax.random.randint(key, (), 0, int(t.counts[:, column].sum()))
        count = jnp.asarray(t.counts)[stage, column]
        return jnp.asarray(t.first)[stage, column] + jax.random.randint(key, (), 0, count)

    width, depth, resolution = number(keys[1], 0), number(keys[2], 0), number(keys[3], 1)
    blocks = len(space.blocks)
    many = jnp.asarray([max(len(b.ops) - 1, 1) for b in space.blocks])
    ops = jax.random.randint(keys[4], (blocks,), 0, many) + 1
    ops = jnp.where(jnp.asarray([len(b.ops) for b in space.blocks]) > 1, ops, 0)
    depths = jax.random.split(keys[5], len(space.depth_stage))
    for part, (first, base, full) in zip(depths, space.stage_slices()):
        if base == full:
            continue
        leading = jax.random.randint(part, (), 1, base + 1)
        end = jnp.asarray(t.reach)[depth, leading]
        places = jnp.arange(full)
        here = ops[first : first + full]
        here = jnp.where(places < leading, here, here[leading - 1])
        ops = ops.at[first : first + full].set(jnp.where(places < end, here, 0))
    return Draw(ops.astype(jnp.int32), stage, width, depth, resolution)


def subnet_of(t: Tables, ops: Any, width: Any) -> Subnet:
    """The arrays of ops [L] at the width of this number, traced or not."""
    hidden = jnp.asarray(t.hidden)[width]
    return Subnet(
        jnp.asarray(ops, jnp.int32),
        jnp.asarray(t.inputs)[width],
        jnp.asarray(t.outputs)[width],
        jnp.take_along_axis(hidden, jnp.asarray(ops)[:, None], axis=1)[:, 0],
    )


def encode(t: Tables, ops: Any, width: float, resolution: int) -> tuple[Any, int, int]:
    """`(ops, number of the width, number of the resolution)`; KeyError lists the resolutions."""
    if int(resolution) not in t.sizes:
        raise KeyError(
            f"no images at resolution {resolution}; there are {sorted(set(t.sizes.tolist()))}"
        )
    near = np.flatnonzero(np.isclose(t.widths, width, rtol=1e-6, atol=0))
    if not near.size:
        raise ValueError(f"width multiplier {width:g} is none of {t.widths.tolist()}")
    return ops, int(near[0]), int(np.flatnonzero(t.sizes == int(resolution))[0])


def resized(images: jax.Array, size: Any, canvas: int) -> jax.Array:
    """Images [B, H, W, C] shrunk or grown to `size` pixels in a corner of [B, canvas, canvas, C].

    Bilinear with antialiasing; `size` may be traced, so that one function serves all resolutions.
    """
    shape = (images.shape[0], canvas, canvas, images.shape[3])
    scale = jnp.asarray([size / images.shape[1], size / images.shape[2]], jnp.float32)
    out = jax.image.scale_and_translate(
        images, shape, (1, 2), scale, jnp.zeros(2), "linear", antialias=True
    )
    rows = jnp.arange(canvas) < size
    return jnp.where((rows[:, None] & rows[None, :])[None, :, :, None], out, 0)
