"""Distances between surfaces in two definitions: surface elements, and boundary voxels.

`surface_*`: elements of the dual grid with areas, as google-deepmind/surface-distance@1f805ce
(`surface_distance/metrics.py`). `voxel_*`: voxels that a face erosion removes, each counting once,
as monai 1.6.1 (`metrics/{hausdorff_distance,surface_distance,surface_dice}.py`). Both take
distances from Euclidean distance transforms with spacing. Masks are bool [*S] of 2 or 3 axes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from jaxmodels.biomedical.surface_table import NEIGHBOR_NORMALS


def _check(reference, prediction, spacing) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    reference, prediction = np.asarray(reference), np.asarray(prediction)
    if reference.shape != prediction.shape:
        raise ValueError(
            f"masks differ in shape: {reference.shape} (reference) and {prediction.shape}"
        )
    if reference.ndim not in (2, 3):
        raise ValueError(f"surfaces are of masks of 2 or 3 axes, got {reference.ndim}")
    spacing = (1.0,) * reference.ndim if spacing is None else tuple(float(s) for s in spacing)
    if len(spacing) != reference.ndim or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing {spacing} does not fit masks of {reference.ndim} axes")
    return reference.astype(bool), prediction.astype(bool), spacing


def area_table(spacing: Sequence[float], normals: np.ndarray = NEIGHBOR_NORMALS) -> np.ndarray:
    """Area of the surface in a 2x2x2 neighborhood of every code, float64 [256], in spacing units.

    A triangle's normal (its length the area at unit spacing) scales with the product of the two
    spacings across its axis. `normals` [256, triangles, 3].
    """
    a, b, c = (float(s) for s in spacing)
    return np.linalg.norm(np.asarray(normals) * (b * c, a * c, a * b), axis=-1).sum(-1)


def length_table(spacing: Sequence[float]) -> np.ndarray:
    """Length of the contour in a 2x2 neighborhood of every code, float64 [16]."""
    a, b = (float(s) for s in spacing)
    diagonal = 0.5 * np.hypot(a, b)
    table = np.zeros(16)
    table[[1, 2, 4, 8, 7, 11, 13, 14]] = diagonal
    table[[6, 9]] = 2 * diagonal
    table[[3, 12]] = b
    table[[5, 10]] = a
    return table


def neighbor_codes(mask: np.ndarray) -> np.ndarray:
    """Which of the 2^n voxels around every corner of the dual grid are set, int [*(S + 1)].

    Entry x looks at voxels x - 1 and x on every axis, outside counts as 0; the corner of all
    x - 1 is the most significant bit, the last axis runs fastest.
    """
    mask = np.asarray(mask, bool)
    padded = np.pad(mask, 1).astype(np.uint8)
    codes = np.zeros(tuple(n + 1 for n in mask.shape), np.uint8)
    corners = list(np.ndindex(*(2,) * mask.ndim))
    for bit, corner in enumerate(corners):
        part = padded[tuple(slice(c, c + n + 1) for c, n in zip(corner, mask.shape))]
        codes |= part << (len(corners) - 1 - bit)
    return codes


@functools.lru_cache(maxsize=64)
def _element_sizes(spacing: tuple[float, ...]) -> np.ndarray:
    return length_table(spacing) if len(spacing) == 2 else area_table(spacing)


@dataclasses.dataclass(frozen=True)
class SurfaceDistances:
    """Distances of surface elements to the other surface and the elements' sizes.

    Direction 0 is from the reference to the prediction, 1 the reverse; each sorted by (distance,
    size). `weighted` says whether sizes are areas (surface definition) or ones (voxels). All in
    units of `spacing` (mm).
    """

    distances: tuple[np.ndarray, np.ndarray]
    sizes: tuple[np.ndarray, np.ndarray]
    weighted: bool

    @property
    def empty(self) -> tuple[bool, bool]:
        """Whether the reference and the prediction have no surface."""
        return self.distances[0].size == 0, self.distances[1].size == 0


def _box(*masks: np.ndarray) -> tuple[slice, ...]:
    """Bounding box of the union: nothing outside changes a distance."""
    union = masks[0] | masks[1]
    box = []
    for axis in range(union.ndim):
        line = union.any(tuple(a for a in range(union.ndim) if a != axis))
        hits = np.flatnonzero(line)
        box.append(slice(hits[0], hits[-1] + 1) if hits.size else slice(0, 1))
    return tuple(box)


def _distances(edges: tuple[np.ndarray, np.ndarray], spacing) -> list[np.ndarray]:
    from scipy.ndimage import distance_transform_edt

    found = []
    for own, other in (edges, edges[::-1]):
        if not own.any():
            found.append(np.zeros(0))
        elif not other.any():
            found.append(np.full(int(own.sum()), np.inf))
        else:
            found.append(distance_transform_edt(~other, sampling=spacing)[own])
    return found


def surface_distances(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float] | None = None
) -> SurfaceDistances:
    """Distances between the dual-grid surfaces of two masks, weighted by element size.

    Distances to an empty mask are infinite. Raises ValueError for other shapes or spacings.
    """
    reference, prediction, spacing = _check(reference, prediction, spacing)
    box = _box(reference, prediction)
    codes = [neighbor_codes(mask[box]) for mask in (reference, prediction)]
    full = 2 ** (2**reference.ndim) - 1
    edges = tuple((code != 0) & (code != full) for code in codes)
    table = _element_sizes(spacing)
    distances = _distances(edges, spacing)
    sizes = [table[code[edge]] for code, edge in zip(codes, edges)]
    order = [np.lexsort((s, d)) for d, s in zip(distances, sizes)]
    return SurfaceDistances(
        tuple(d[o] for d, o in zip(distances, order)),
        tuple(s[o] for s, o in zip(sizes, order)),
        weighted=True,
    )


def voxel_distances(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float] | None = None
) -> SurfaceDistances:
    """Distances between the boundary voxels of two masks: those that a face erosion removes."""
    from scipy.ndimage import binary_erosion

    reference, prediction, spacing = _check(reference, prediction, spacing)
    box = _box(reference, prediction)
    # Beyond the mask's box (and the image's border) everything is background.
    edges = tuple(mask[box] ^ binary_erosion(mask[box]) for mask in (reference, prediction))
    distances = [np.sort(d) for d in _distances(edges, spacing)]
    return SurfaceDistances(
        tuple(distances), tuple(np.ones(d.size) for d in distances), weighted=False
    )


def hausdorff(found: SurfaceDistances, percent: float = 100.0) -> float:
    """Percentile of the distances of each direction, the larger of the two.

    Surface elements: the first distance whose cumulated share of area reaches `percent`. Voxels:
    the linear percentile. Both empty: 0; one empty: infinity.
    """
    values = []
    for distances, sizes in zip(found.distances, found.sizes):
        if distances.size == 0:
            values.append(0.0 if all(found.empty) else np.inf)
        elif not np.isfinite(distances[-1]):
            values.append(np.inf)
        elif found.weighted:
            share = np.cumsum(sizes) / sizes.sum()
            index = int(np.searchsorted(share, percent / 100))
            values.append(float(distances[min(index, distances.size - 1)]))
        else:
            values.append(float(np.percentile(distances, percent)))
    return max(values)


def average_surface_distance(found: SurfaceDistances) -> np.ndarray:
    """Size-weighted mean distance, [2]: reference to prediction, prediction to reference.

    Infinite when one mask is empty, NaN when both are.
    """
    if all(found.empty):
        return np.full(2, np.nan)
    means = [
        np.inf if d.size == 0 else float((d * s).sum() / s.sum())
        for d, s in zip(found.distances, found.sizes)
    ]
    return np.asarray(means)


def symmetric_surface_distance(found: SurfaceDistances) -> float:
    """Mean distance over both directions together (ASSD). Empty masks as in the average."""
    if all(found.empty):
        return float("nan")
    if any(found.empty):
        return float("inf")
    d, s = np.concatenate(found.distances), np.concatenate(found.sizes)
    return float((d * s).sum() / s.sum())


def surface_dice(found: SurfaceDistances, tolerance: float) -> float:
    """NSD: share of both surfaces that lies within `tolerance` (mm) of the other; NaN without any.

    Raises ValueError for a negative tolerance.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance {tolerance} is negative")
    total = sum(float(s.sum()) for s in found.sizes)
    if total == 0:
        return float("nan")
    within = sum(float(s[d <= tolerance].sum()) for d, s in zip(found.distances, found.sizes))
    return within / total
