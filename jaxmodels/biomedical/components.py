"""Connected components and morphology of masks, on the host with scipy and in pure JAX.

Connectivity counts the axes in which neighbors may differ: 1 is faces, ndim everything that
touches (8 in 2-D, 26 in 3-D; nnU-Net's).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def structure(ndim: int, connectivity: int | str = "full") -> np.ndarray:
    """Structuring element bool [3] * ndim; `face` is 1 and `full` is ndim.

    Raises ValueError for a connectivity outside 1 .. ndim.
    """
    from scipy.ndimage import generate_binary_structure

    number = {"face": 1, "full": ndim}.get(connectivity, connectivity)
    if not isinstance(number, int | np.integer) or not 1 <= number <= ndim:
        raise ValueError(f"connectivity {connectivity!r} is not face, full or 1 .. {ndim}")
    return generate_binary_structure(ndim, int(number))


def label_components(
    mask: np.ndarray, connectivity: int | str = "full"
) -> tuple[np.ndarray, np.ndarray]:
    """Labels int32 [*S] (0 is background) and the components' sizes int64 [n] in their order."""
    from scipy.ndimage import label

    mask = np.asarray(mask, bool)
    labels, count = label(mask, structure(mask.ndim, connectivity))
    return labels, np.bincount(labels.reshape(-1), minlength=count + 1)[1:]


def largest_component(mask: np.ndarray, connectivity: int | str = "full") -> np.ndarray:
    """The mask's largest component; on a tie all components of that size (nnU-Net's rule)."""
    labels, sizes = label_components(mask, connectivity)
    if not sizes.size:
        return np.zeros_like(labels, bool)
    return np.concatenate([[False], sizes == sizes.max()])[labels]


def remove_small(mask: np.ndarray, voxels: int, connectivity: int | str = "full") -> np.ndarray:
    """The mask's components of at least `voxels` voxels."""
    labels, sizes = label_components(mask, connectivity)
    return np.concatenate([[False], sizes >= voxels])[labels]


def fill_holes(mask: np.ndarray, connectivity: int | str = "face") -> np.ndarray:
    """The mask with the background filled that does not reach the border.

    `connectivity` is how the background spreads.
    """
    from scipy.ndimage import binary_fill_holes

    mask = np.asarray(mask, bool)
    return binary_fill_holes(mask, structure(mask.ndim, connectivity))


def erode(mask: np.ndarray, connectivity: int | str = "face", times: int = 1) -> np.ndarray:
    """Voxels whose neighbors all are set; beyond the border nothing is."""
    from scipy.ndimage import binary_erosion

    mask = np.asarray(mask, bool)
    return binary_erosion(mask, structure(mask.ndim, connectivity), iterations=times)


def dilate(mask: np.ndarray, connectivity: int | str = "face", times: int = 1) -> np.ndarray:
    """Voxels with a neighbor that is set."""
    from scipy.ndimage import binary_dilation

    mask = np.asarray(mask, bool)
    return binary_dilation(mask, structure(mask.ndim, connectivity), iterations=times)


def opened(mask: np.ndarray, connectivity: int | str = "full", times: int = 1) -> np.ndarray:
    """Erosion, then dilation: what is thinner than the element goes."""
    from scipy.ndimage import binary_opening

    mask = np.asarray(mask, bool)
    return binary_opening(mask, structure(mask.ndim, connectivity), iterations=times)


def closed(mask: np.ndarray, connectivity: int | str = "full", times: int = 1) -> np.ndarray:
    """Dilation, then erosion: gaps thinner than the element close."""
    from scipy.ndimage import binary_closing

    mask = np.asarray(mask, bool)
    # A margin, or the erosion would eat from the border what lies on it.
    padded = np.pad(mask, times)
    result = binary_closing(padded, structure(mask.ndim, connectivity), iterations=times)
    return result[tuple(slice(times, times + n) for n in mask.shape)]


def distance_transform(mask: np.ndarray, spacing: Sequence[float] | None = None) -> np.ndarray:
    """Distance of every set voxel to the nearest voxel that is not, float64 [*S], in mm."""
    from scipy.ndimage import distance_transform_edt

    return distance_transform_edt(np.asarray(mask, bool), sampling=spacing)


@functools.partial(jax.jit, static_argnames=("connectivity",))
def propagate_labels(mask: jax.Array, connectivity: int | str = "full") -> jax.Array:
    """Component of every voxel in pure JAX: 1 + the smallest flat index in it, 0 for background.

    Minimum of the neighbors' labels, then a jump to the label's own label, until nothing changes.
    mask bool [*S] -> int32 [*S].
    """
    ndim = mask.ndim
    element = structure(ndim, connectivity)
    offsets = [tuple(int(i) - 1 for i in o) for o in np.argwhere(element) if any(o != 1)]
    size = mask.size
    start = jnp.where(mask, jnp.arange(size, dtype=jnp.int32).reshape(mask.shape), size)

    def spread(labels):
        padded = jnp.pad(labels, 1, constant_values=size)
        best = labels
        for offset in offsets:
            window = tuple(slice(1 + o, 1 + o + n) for o, n in zip(offset, mask.shape))
            best = jnp.minimum(best, padded[window])
        best = jnp.where(mask, best, size)
        # The voxel a label points at may know a smaller one by now.
        table = jnp.append(best.reshape(-1), size)
        return table[best]

    def changed(pair):
        return jnp.any(pair[0] != pair[1])

    def advance(pair):
        return pair[1], spread(pair[1])

    _, labels = jax.lax.while_loop(changed, advance, (start, spread(start)))
    return jnp.where(mask, labels + 1, 0)
