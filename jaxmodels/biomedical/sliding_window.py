"""Prediction by overlapping windows, weighted by a Gaussian and mirrored, streamed row by row.

After nnunetv2 2.8.1, `inference/sliding_window_prediction.py` and `predict_from_raw_data.py`.
Windows are read from anything that can be sliced (a memory-mapped file as well), sums are kept for
one row of windows only, and every finished block is handed on at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def window_starts(size: Sequence[int], tile: Sequence[int], step: float = 0.5) -> list[list[int]]:
    """First voxels of the windows along every axis, evenly spread from 0 to `size - tile`.

    Windows are at most `tile * step` apart, positions rounded half to even. An axis of tile 1 is
    visited voxel by voxel (slices). Axes smaller than the tile start at 0.

    Raises ValueError: `step` not in (0, 1].
    """
    if not 0 < step <= 1:
        raise ValueError(f"step {step} is not in (0, 1]")
    starts = []
    for n, t in zip(size, tile):
        if n <= t:
            starts.append([0])
        elif t == 1:
            starts.append(list(range(n)))
        else:
            count = math.ceil((n - t) / (t * step)) + 1
            actual = (n - t) / (count - 1)
            starts.append([int(np.round(actual * i)) for i in range(count)])
    return starts


def gaussian_weights(
    tile: Sequence[int], sigma_scale: float = 1 / 8, value_scaling_factor: float = 10.0
) -> np.ndarray:
    """Weight of every voxel of a window, float32 [*tile]: a Gaussian with sigma `tile / 8`.

    A unit at `tile // 2`, filtered (truncated at 4 sigma), scaled to the maximum
    `value_scaling_factor`; zeros become the smallest value that is not.
    """
    from scipy.ndimage import gaussian_filter

    unit = np.zeros(tuple(tile), np.float64)
    unit[tuple(t // 2 for t in tile)] = 1
    weights = gaussian_filter(unit, [t * sigma_scale for t in tile], mode="constant", cval=0)
    weights *= value_scaling_factor / weights.max()
    weights[weights == 0] = weights[weights > 0].min()
    return weights.astype(np.float32)


def mirrored(apply: Callable[..., jax.Array], axes: Sequence[int]) -> Callable[..., jax.Array]:
    """`apply(*arguments, tiles [B, *S, C])` averaged over mirroring along all subsets of `axes`.

    `axes` count spatial axes from 0. Logits are averaged after they are mirrored back. One scan
    over the subsets: the network is compiled once.
    """
    axes = tuple(axes)
    if not axes:
        return apply
    flags = jnp.asarray(list(itertools.product((False, True), repeat=len(axes))))

    def flip(x, chosen):
        for i, axis in enumerate(axes):
            x = jnp.where(chosen[i], jnp.flip(x, axis + 1), x)
        return x

    def run(*arguments):
        *others, tiles = arguments

        def add(total, chosen):
            return total + flip(apply(*others, flip(tiles, chosen)), chosen), None

        shape = jax.eval_shape(apply, *arguments)
        total, _ = jax.lax.scan(add, jnp.zeros(shape.shape, shape.dtype), flags)
        return total / len(flags)

    return run


def _read(image: Any, start: Sequence[int], tile: Sequence[int], offset, context: int):
    """One window [*tile, C] of the padded image; with `context`, neighbor slices as channels."""
    size = image.shape[:-1]
    if context:
        slices = []
        for k in range(-context, context + 1):
            # The first and the last slice stand for those beyond the ends.
            z = min(max(start[0] + k - offset[0], 0), size[0] - 1) + offset[0]
            slices.append(_read(image, (z, *start[1:]), tile, offset, 0))
        return np.concatenate(slices, -1)
    low = [s - o for s, o in zip(start, offset)]
    inside = tuple(slice(max(0, a), min(n, a + t)) for a, t, n in zip(low, tile, size))
    window = np.asarray(image[inside], np.float32)
    padding = [(s.start - a, a + t - s.stop) for s, a, t in zip(inside, low, tile)]
    if any(p != (0, 0) for p in padding):
        window = np.pad(window, [*padding, (0, 0)])
    return window


def stream(
    predict: Callable[[np.ndarray], jax.Array],
    image: Any,
    tile: Sequence[int],
    write: Callable[[tuple[slice, ...], np.ndarray, np.ndarray], None],
    *,
    classes: int,
    step: float = 0.5,
    weights: np.ndarray | None = None,
    batch: int = 1,
    context: int = 0,
    scratch: Callable[[tuple[int, ...]], Any] | None = None,
) -> int:
    """Slide a window over `image` [*S, C] and `write` every finished block; number of windows.

    Args:
      predict: tiles float32 [batch, *tile, C] -> logits [batch, *tile, classes], one static shape.
      image: an array, or anything with `shape` and slicing. What is smaller than a tile is padded
        with zeros around it.
      write: called with (slices into S, weighted mean logits [*block, classes], sums of weights
        [*block]); blocks are no larger than a tile and cover S once.
      weights: of a window's voxels [*tile]; by default `gaussian_weights(tile)`.
      batch: windows predicted at once; the last batch is filled up with zeros.
      context: neighbor slices on each side along the first axis, taken as channels (2.5-D).
      scratch: makes the zero-filled array of a given shape that holds the sums (a file, where the
        image does not fit into memory); by default an array in memory.

    Raises ValueError for a step outside (0, 1] and tiles of another dimension.
    """
    size, tile = tuple(image.shape[:-1]), tuple(int(t) for t in tile)
    if len(size) != len(tile):
        raise ValueError(f"tile {tile} has other axes than the image {size}")
    padded = tuple(max(n, t) for n, t in zip(size, tile))
    offset = tuple((p - n) // 2 for p, n in zip(padded, size))
    starts = window_starts(padded, tile, step)
    weights = gaussian_weights(tile) if weights is None else np.asarray(weights, np.float32)
    make = scratch or (lambda shape: np.zeros(shape, np.float32))
    # Rows of windows along the first axis share a ring of `tile[0]` planes: plane z lives at
    # z % tile[0]. The last channel sums the weights.
    ring = make((tile[0], *padded[1:], classes + 1))
    count = 0

    def add(start, logits):
        rows = start[0] % tile[0]
        update = np.concatenate([logits * weights[..., None], weights[..., None]], -1)
        update = np.roll(update, rows, axis=0)
        where = (slice(None), *(slice(s, s + t) for s, t in zip(start[1:], tile[1:])))
        ring[where] = ring[where] + update

    for number, first in enumerate(starts[0]):
        row = list(itertools.product([first], *starts[1:]))
        for i in range(0, len(row), batch):
            chosen = row[i : i + batch]
            tiles = np.stack([_read(image, s, tile, offset, context) for s in chosen])
            if len(chosen) < batch:
                fill = [(0, batch - len(chosen))] + [(0, 0)] * (tiles.ndim - 1)
                tiles = np.pad(tiles, fill)
            logits = np.asarray(predict(tiles), np.float32)
            for start, one in zip(chosen, logits):
                add(start, one)
            count += len(chosen)
        after = starts[0][number + 1] if number + 1 < len(starts[0]) else first + tile[0]
        for z, block in _blocks(first, after, padded[1:], tile):
            _finish(ring, z, block, write, size, offset, tile[0])
    return count


def _blocks(first: int, after: int, size, tile) -> Iterator[tuple[slice, tuple[slice, ...]]]:
    """Blocks of at most a tile that cover planes [first, after) of the padded image."""
    ranges = [[slice(a, min(n, a + t)) for a in range(0, n, t)] for n, t in zip(size, tile[1:])]
    # A run of planes that does not wrap around the ring.
    while first < after:
        end = min(after, (first // tile[0] + 1) * tile[0])
        for block in itertools.product(*ranges):
            yield slice(first, end), block
        first = end


def _finish(ring, z: slice, block, write, size, offset, depth: int) -> None:
    place = z.start % depth
    where = (slice(place, place + z.stop - z.start), *block)
    sums = np.array(ring[where])
    ring[where] = np.zeros_like(sums)
    # What padding put around the image is cut off.
    inside, target = [], []
    for s, n, o in zip((z, *block), size, offset):
        low, high = max(s.start, o), min(s.stop, o + n)
        if low >= high:
            return
        inside.append(slice(low - s.start, high - s.start))
        target.append(slice(low - o, high - o))
    sums = sums[tuple(inside)]
    total = sums[..., -1]
    write(tuple(target), sums[..., :-1] / total[..., None], total)


def sliding_window(
    predict: Callable[[np.ndarray], jax.Array],
    image: Any,
    tile: Sequence[int],
    *,
    classes: int,
    **arguments: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean logits float32 [*S, classes] and sums of weights [*S] in memory; see `stream`."""
    size = tuple(image.shape[:-1])
    logits = np.empty((*size, classes), np.float32)
    totals = np.empty(size, np.float32)

    def write(where, block, weight):
        logits[where] = block
        totals[where] = weight

    stream(predict, image, tile, write, classes=classes, **arguments)
    return logits, totals
