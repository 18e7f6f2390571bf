"""Crop, normalize and resample images, and undo it for predictions.

After nnunetv2 2.8.1, `preprocessing/{cropping,normalization,resampling}` and
`experiment_planning/dataset_fingerprint`. Images are float [*S, C], label maps int [*S] with
spatial axes in z, y, x; spacings in mm per axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.biomedical.planning import ANISOTROPY

FOREGROUND_SAMPLES = 10000
# Spacing of the axis that a single slice does not have.
NO_AXIS = 999.0
# Cropping more than a quarter away means that the outside is not part of the image.
MASK_BELOW = 3 / 4


def nonzero_box(image: np.ndarray) -> tuple[tuple[slice, ...], np.ndarray]:
    """Bounding box of voxels that are not zero in some channel, and their mask with holes filled.

    image [*S, C] -> slices, bool [*S]. An image of zeros keeps its whole extent.
    """
    from scipy.ndimage import binary_fill_holes

    mask = binary_fill_holes((image != 0).any(-1))
    if not mask.any():
        return tuple(slice(0, n) for n in mask.shape), np.ones_like(mask)
    box = []
    for axis in range(mask.ndim):
        hits = np.flatnonzero(mask.any(tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(hits[0]), int(hits[-1]) + 1))
    return tuple(box), mask


def foreground_samples(
    image: np.ndarray, label: np.ndarray, rng: np.random.Generator, count: int = FOREGROUND_SAMPLES
) -> np.ndarray:
    """Intensities [count, C] of foreground voxels drawn with replacement, [0, C] without any."""
    places = np.flatnonzero(label.reshape(-1) > 0)
    flat = image.reshape(-1, image.shape[-1])
    if not places.size:
        return np.zeros((0, image.shape[-1]), np.float32)
    return flat[rng.choice(places, count, replace=True)].astype(np.float32)


def intensity_statistics(pooled: np.ndarray) -> list[dict[str, float]]:
    """Per channel of pooled intensities [N, C]: mean, std, median, min, max, percentiles."""
    rows = []
    for channel in np.asarray(pooled, np.float64).T:
        low, high = np.percentile(channel, [0.5, 99.5])
        rows.append(
            {
                "mean": float(channel.mean()),
                "std": float(channel.std()),
                "median": float(np.median(channel)),
                "min": float(channel.min()),
                "max": float(channel.max()),
                "percentile_00_5": float(low),
                "percentile_99_5": float(high),
            }
        )
    return rows


# -- normalization ---------------------------------------------------------------------------------


def _ct(image, statistics, mask):
    del mask
    low, high = statistics["percentile_00_5"], statistics["percentile_99_5"]
    return (np.clip(image, low, high) - statistics["mean"]) / max(statistics["std"], 1e-8)


def _z_score(image, statistics, mask):
    del statistics
    if mask is None:
        return (image - image.mean()) / max(float(image.std()), 1e-8)
    inside = image[mask]
    result = np.zeros_like(image)
    result[mask] = (inside - inside.mean()) / max(float(inside.std()), 1e-8)
    return result


def _rescale(image, statistics, mask):
    del statistics, mask
    low = image.min()
    return (image - low) / max(float(image.max() - low), 1e-8)


def _none(image, statistics, mask):
    del statistics, mask
    return image


def _rgb(image, statistics, mask):
    del statistics, mask
    if image.min() < 0 or image.max() > 255:
        raise ValueError(f"rgb_to_0_1 needs values of 0..255, got {image.min()}..{image.max()}")
    return image / 255


NORMALIZATIONS = {
    "CT": _ct,
    "zscore": _z_score,
    "rescale_to_0_1": _rescale,
    "noNorm": _none,
    "rgb_to_0_1": _rgb,
}


def normalization_of(channel_name: str) -> str:
    """The scheme a channel's name asks for: its own name where it is one, else `zscore`."""
    names = {key.lower(): key for key in NORMALIZATIONS}
    return names.get(str(channel_name).lower(), "zscore")


def normalize(
    image: np.ndarray,
    schemes: Sequence[str],
    statistics: Sequence[Mapping[str, float]],
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Every channel by its scheme, float32 [*S, C].

    Args:
      schemes: names of `NORMALIZATIONS`. statistics: pooled foreground statistics per channel.
      mask: bool [*S]: z-scores are taken inside it, outside becomes 0.

    Raises ValueError for an unknown scheme or a number of schemes other than channels.
    """
    if len(schemes) != image.shape[-1]:
        raise ValueError(f"{len(schemes)} normalizations for {image.shape[-1]} channels")
    channels = []
    for c, scheme in enumerate(schemes):
        if scheme not in NORMALIZATIONS:
            raise ValueError(f"no normalization {scheme!r}; known: {', '.join(NORMALIZATIONS)}")
        stats = statistics[c] if c < len(statistics) else {}
        channels.append(NORMALIZATIONS[scheme](image[..., c].astype(np.float32), stats, mask))
    return np.stack(channels, -1).astype(np.float32)


# -- resampling ------------------------------------------------------------------------------------


def separate_axis(spacing: Sequence[float], new_spacing: Sequence[float]) -> int | None:
    """The axis to resample on its own: the one much coarser than the others, before or after."""
    for one in (spacing, new_spacing):
        one = np.asarray(one, np.float64)
        if one.max() / one.min() > ANISOTROPY:
            coarse = np.flatnonzero(one == one.max())
            return int(coarse[0]) if coarse.size == 1 else None
    return None


def _resize(channel: np.ndarray, shape, order: int) -> np.ndarray:
    from skimage.transform import resize

    return resize(
        channel, shape, order=order, mode="edge", clip=order > 1, anti_aliasing=False,
        preserve_range=True,
    )  # fmt: skip


def _resample_channel(channel: np.ndarray, shape, axis: int | None, order: int, order_z: int):
    if axis is None:
        return _resize(channel, shape, order)
    plane = tuple(n for a, n in enumerate(shape) if a != axis)
    moved = np.moveaxis(channel, axis, 0)
    if moved.shape[1:] != plane:
        moved = np.stack([_resize(one, plane, order) for one in moved])
    if moved.shape[0] != shape[axis]:
        from scipy.ndimage import map_coordinates

        old = moved.shape[0]
        centers = (np.arange(shape[axis]) + 0.5) * old / shape[axis] - 0.5
        if order_z == 0:
            # As `map_coordinates` of order 0 rounds: half to even.
            moved = moved[np.clip(np.round(centers).astype(int), 0, old - 1)]
        else:
            grid = np.meshgrid(centers, *(np.arange(n) for n in plane), indexing="ij")
            moved = map_coordinates(moved, grid, order=order_z, mode="nearest")
    return np.moveaxis(moved, 0, axis)


def resample(
    image: np.ndarray,
    shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    *,
    order: int = 3,
    order_z: int = 0,
) -> np.ndarray:
    """Image [*S, C] on a grid of another shape; a much coarser axis is resampled by `order_z`.

    Order 3 for images, 1 for probabilities.
    """
    shape = tuple(int(n) for n in shape)
    if image.shape[:-1] == shape:
        return image
    axis = separate_axis(spacing, new_spacing)
    channels = [
        _resample_channel(image[..., c].astype(np.float64), shape, axis, order, order_z)
        for c in range(image.shape[-1])
    ]
    return np.stack(channels, -1).astype(np.float32)


def resample_labels(
    label: np.ndarray,
    shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    *,
    order: int = 1,
    order_z: int = 0,
) -> np.ndarray:
    """Label map [*S] on another grid: each class by `order`, kept where it reaches one half.

    Order 0 takes the nearest voxel. Later classes win ties.
    """
    shape = tuple(int(n) for n in shape)
    if label.shape == shape:
        return label
    axis = separate_axis(spacing, new_spacing)
    if order == 0:
        return _resample_channel(label, shape, axis, 0, 0).round().astype(label.dtype)
    result = np.zeros(shape, label.dtype)
    for k in np.unique(label):
        share = _resample_channel((label == k).astype(np.float64), shape, axis, order, order_z)
        result[share >= 0.5] = k
    return result


# -- one case --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What was done to a case, enough to undo it. Shapes and boxes are in transposed axes."""

    transpose: tuple[int, ...]
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    box: tuple[tuple[int, int], ...]
    target_spacing: tuple[float, ...]
    target_shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """As a case's properties are stored."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Geometry:
        """From stored properties."""

        def frozen(value):
            return tuple(frozen(v) for v in value) if isinstance(value, list | tuple) else value

        return cls(**{f.name: frozen(content[f.name]) for f in dataclasses.fields(cls)})


def preprocess(
    image: np.ndarray,
    spacing: Sequence[float],
    *,
    transpose: Sequence[int],
    target_spacing: Sequence[float],
    schemes: Sequence[str],
    statistics: Sequence[Mapping[str, float]],
    use_mask: bool,
    label: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None, Geometry]:
    """Transpose, crop, normalize, resample: in this order.

    Args:
      image: [*S, C]. spacing: mm of its axes. label: int [*S].
      target_spacing: in transposed axes.
      use_mask: whether z-scores are taken inside the non-zero mask; background outside it is then
        labeled -1, so that training can keep the image 0 there.

    Returns: image float32 [*S', C], label int [*S'] or None, and what undoes it.
    """
    image = np.transpose(image, (*transpose, image.ndim - 1))
    spacing = tuple(float(spacing[a]) for a in transpose)
    box, mask = nonzero_box(image)
    shape = image.shape[:-1]
    image, mask = image[box], mask[box]
    image = normalize(image, schemes, statistics, mask if use_mask else None)
    target = tuple(float(s) for s in target_spacing)
    new_shape = tuple(round(n * s / t) for n, s, t in zip(image.shape[:-1], spacing, target))
    new_shape = tuple(max(1, n) for n in new_shape)
    geometry = Geometry(
        tuple(int(a) for a in transpose),
        shape,
        spacing,
        tuple((s.start, s.stop) for s in box),
        target,
        new_shape,
    )
    image = resample(image, new_shape, spacing, target)
    if label is not None:
        label = np.transpose(label, transpose)[box]
        if use_mask:
            label = np.where((label == 0) & ~mask, -1, label).astype(label.dtype)
        label = resample_labels(label, new_shape, spacing, target)
    return image, label, geometry


def restore_probabilities(
    probabilities: np.ndarray, geometry: Geometry, regions: bool = False
) -> np.ndarray:
    """Probabilities [*S', K] of a preprocessed case on the original grid [*S, K].

    Resampled by order 1; outside the crop everything is background: class 0 with probability 1,
    or none of the `regions`.
    """
    cropped = tuple(high - low for low, high in geometry.box)
    inside = resample(probabilities, cropped, geometry.target_spacing, geometry.spacing, order=1)
    full = np.zeros((*geometry.shape, probabilities.shape[-1]), np.float32)
    full[..., 0] = 0 if regions else 1
    full[tuple(slice(low, high) for low, high in geometry.box)] = inside
    inverse = tuple(int(i) for i in np.argsort(geometry.transpose))
    return np.transpose(full, (*inverse, full.ndim - 1))


def annotated(
    prediction: np.ndarray, reference: np.ndarray, ignore_label: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Both label maps with background where the reference says that nobody looked."""
    if ignore_label is None:
        return prediction, reference
    unknown = reference == ignore_label
    return np.where(unknown, 0, prediction), np.where(unknown, 0, reference)


def labels_of(
    probabilities: np.ndarray,
    regions: Sequence[int] | None = None,
    thresholds: Sequence[float] | None = None,
) -> np.ndarray:
    """Label map int32 [*S] of probabilities [*S, K]: the largest, or regions above 1/2 in order.

    Args:
      regions: the labels that the channels write where they exceed one half; later ones overwrite
        earlier ones.
      thresholds: one a region, or one of the only foreground class, reached in place of 1/2.

    Raises ValueError for another number of thresholds.
    """
    if thresholds is not None:
        channels = probabilities if regions is not None else probabilities[..., 1:]
        if channels.shape[-1] != len(thresholds):
            raise ValueError(
                f"{len(thresholds)} thresholds for {channels.shape[-1]} regions or classes"
            )
        if regions is None and len(thresholds) != 1:
            raise ValueError("exclusive classes take a threshold only where there is one")
        above = channels >= np.asarray(thresholds, np.float64)
    elif regions is None:
        return probabilities.argmax(-1).astype(np.int32)
    else:
        above = probabilities > 0.5
    result = np.zeros(probabilities.shape[:-1], np.int32)
    for channel, label in enumerate(regions or (1,)):
        result[above[..., channel]] = label
    return result


def image_diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Length of the image's diagonal in mm: what a missing surface counts in rankings."""
    return math.sqrt(sum((n * s) ** 2 for n, s in zip(shape, spacing)))
