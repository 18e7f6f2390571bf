"""Where training patches are cut: at random, and a third of them around foreground.

After nnunetv2 2.8.1, `training/dataloading/data_loader.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

OVERSAMPLE = 0.33
# The key, among classes, of voxels that somebody looked at (where a label says "ignore").
ANNOTATED = -1


def is_forced(index: int, batch_size: int, oversample: float = OVERSAMPLE) -> bool:
    """Whether sample `index` of a batch must contain foreground: index >= round(B (1 - share))."""
    return index >= round(batch_size * (1 - oversample))


def patch_start(
    shape: Sequence[int],
    patch: Sequence[int],
    rng: np.random.Generator,
    locations: Mapping[int, np.ndarray] | None = None,
    need_to_pad: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """First voxel of a patch; negative and overhanging starts mean padding.

    Without `locations` uniform in [-ceil(pad / 2), shape - patch + ceil(pad / 2)], pad the larger
    of `need_to_pad` and what the image lacks. With them a class is drawn among those present, one
    of its voxels, and the patch is centered on it, clipped at the lower bound only.

    Args:
      shape: of the image. patch: of the patch, voxels per axis.
      locations: class -> its voxels int [N, axes]; classes without voxels are absent.
      need_to_pad: voxels by which patches were enlarged for augmentation.
    """
    extra = [0] * len(shape) if need_to_pad is None else list(need_to_pad)
    pad = [max(e, p - n) for e, p, n in zip(extra, patch, shape)]
    low = [-p // 2 for p in pad]  # minus first, then halved downwards
    high = [n + p // 2 + p % 2 - q for n, p, q in zip(shape, pad, patch)]
    present = sorted(k for k, v in (locations or {}).items() if len(v))
    if not present:
        # Nothing to center on: an empty case is cropped at random.
        return tuple(int(rng.integers(a, b + 1)) for a, b in zip(low, high))
    chosen = locations[present[int(rng.integers(len(present)))]]
    voxel = chosen[int(rng.integers(len(chosen)))]
    return tuple(max(int(a), int(v) - q // 2) for a, v, q in zip(low, voxel, patch))


def cut(
    image: np.ndarray, start: Sequence[int], patch: Sequence[int], fill: float = 0
) -> np.ndarray:
    """The patch [*patch, ...] of an image [*S, ...]; what lies outside is `fill`."""
    axes = len(patch)
    inside, padding = [], []
    for s, p, n in zip(start, patch, image.shape):
        low, high = min(max(0, s), n), max(0, min(n, s + p))
        high = max(low, high)
        inside.append(slice(low, high))
        before = min(max(0, -s), p)
        padding.append((before, p - (high - low) - before))
    padding += [(0, 0)] * (image.ndim - axes)
    part = np.asarray(image[tuple(inside)])
    if any(p != (0, 0) for p in padding):
        part = np.pad(part, padding, constant_values=fill)
    return part


def chosen_locations(
    places: Mapping[int, np.ndarray], forced: bool
) -> Mapping[int, np.ndarray] | None:
    """Which locations a patch is centered on: None for a patch anywhere.

    Forced ones those of the foreground classes; where `places` has ANNOTATED voxels, others lie on
    one of these, and forced ones without any foreground as well.
    """
    seen = {k: v for k, v in places.items() if k == ANNOTATED and len(v)}
    foreground = {k: v for k, v in places.items() if k != ANNOTATED and len(v)}
    return (foreground if forced and foreground else seen) or None


def class_locations(
    label: np.ndarray,
    labels: Sequence[int],
    rng: np.random.Generator,
    limit: int = 10000,
    least_share: float = 0.01,
) -> dict[int, np.ndarray]:
    """Voxels int32 [N, axes] of every class that occurs, at most `limit` (or 1 %) of them each."""
    found = {}
    for k in labels:
        flat = np.flatnonzero(label.reshape(-1) == k)
        if not flat.size:
            continue
        count = min(flat.size, max(limit, int(np.ceil(flat.size * least_share))))
        chosen = np.sort(rng.choice(flat, count, replace=False))
        found[int(k)] = np.stack(np.unravel_index(chosen, label.shape), -1).astype(np.int32)
    return found


def slice_locations(
    locations: Mapping[int, np.ndarray], rng: np.random.Generator
) -> tuple[int, dict[int, np.ndarray]]:
    """A slice that holds foreground, and the places [N, 2] of the drawn class in it.

    The class is drawn first, then one of its voxels: its first coordinate is the slice. Raises
    ValueError without any location.
    """
    present = sorted(k for k, v in locations.items() if len(v))
    if not present:
        raise ValueError("no class has a voxel to choose a slice by")
    k = present[int(rng.integers(len(present)))]
    chosen = locations[k]
    z = int(chosen[int(rng.integers(len(chosen)))][0])
    return z, {k: chosen[chosen[:, 0] == z][:, 1:]}
