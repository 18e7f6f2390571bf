"""Inference procedures of restoration networks: padding, tiles, the x8 self-ensemble, two stages.

An `apply` here is a function from images [B, h, w, C] in [0, 1] to images [B, s h, s w, C'].
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Apply = Callable[[jax.Array], jax.Array]

# (quarter turns counterclockwise, then upside down) of the augmentation modes 0 to 7 of
# cszn/KAIR@fc1732f (`utils/utils_image.py`).
AUGMENTATIONS = (
    (0, False),
    (1, True),
    (0, True),
    (3, False),
    (2, True),
    (1, False),
    (2, False),
    (3, True),
)


def augment(image, mode: int):
    """One of the eight symmetries of the square: of H and W in [H, W] or [..., H, W, C].

    Raises ValueError for a mode outside 0 to 7.
    """
    turns, flip = _symmetry(mode)
    library = np if isinstance(image, np.ndarray) else jnp
    axes = _rows_and_columns(image)
    image = library.rot90(image, turns, axes) if turns else image
    return library.flip(image, axes[0]) if flip else image


def undo_augment(image, mode: int):
    """The inverse of `augment`."""
    turns, flip = _symmetry(mode)
    library = np if isinstance(image, np.ndarray) else jnp
    axes = _rows_and_columns(image)
    image = library.flip(image, axes[0]) if flip else image
    return library.rot90(image, -turns, axes) if turns else image


def _rows_and_columns(image) -> tuple[int, int]:
    """The axes H and W; a gray image [H, W] has no channels behind them."""
    return (0, 1) if image.ndim == 2 else (-3, -2)


def _symmetry(mode: int) -> tuple[int, bool]:
    if not 0 <= mode < len(AUGMENTATIONS):
        raise ValueError(f"augmentation mode must be 0 to 7, not {mode}")
    return AUGMENTATIONS[mode]


def self_ensemble(apply: Apply) -> Apply:
    """`apply` averaged over the eight symmetries of its input, each undone on the output.

    The average is of floats, before any rounding; it also turns with the input exactly.
    """

    def averaged(x):
        total = None
        for mode in range(len(AUGMENTATIONS)):
            y = undo_augment(apply(augment(x, mode)), mode)
            total = y if total is None else total + y
        return total / len(AUGMENTATIONS)

    return averaged


def two_stage(remove_artifacts: Apply, upscale: Apply) -> Apply:
    """Artifact removal at low resolution, clamped to [0, 1], then super-resolution ("CI2")."""
    return lambda x: upscale(jnp.clip(remove_artifacts(x), 0.0, 1.0))


def padded(apply: Apply, multiple: int = 8, scale: int = 4) -> Apply:
    """`apply` on the input mirrored up to the *next* multiple of `multiple`, output cropped.

    As the official test script: mirrored with the edge pixel, and by a whole `multiple` where the
    side is one already.
    """

    def run(x):
        height, width = x.shape[1:3]
        more_h, more_w = multiple - height % multiple, multiple - width % multiple
        y = apply(jnp.pad(x, ((0, 0), (0, more_h), (0, more_w), (0, 0)), mode="symmetric"))
        return y[:, : height * scale, : width * scale]

    return run


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the tiles along one side; the last tile ends with the image."""
    return [*range(0, size - tile, tile - overlap), size - tile]


BLENDS = ("taper", "mean")


def tile_weights(starts: list[int], tile: int, scale: int, blend: str) -> list[np.ndarray]:
    """What each tile along one side counts, float32 [scale tile] a tile.

    "taper": from (nearly) nothing at a border that a neighbor covers to 1 where the overlap with
    this neighbor ends, so that neither tile's border shows. "mean": 1.
    """
    weights = []
    for k, start in enumerate(starts):
        own = np.ones(tile * scale, np.float32)
        if blend == "taper":
            for other, direction in ((k - 1, 1), (k + 1, -1)):
                if 0 <= other < len(starts):
                    shared = (tile - abs(starts[other] - start)) * scale
                    ramp = (np.arange(shared, dtype=np.float32) + 0.5) / shared
                    side = own[::direction][:shared]
                    np.minimum(side, ramp, out=side)
        weights.append(own)
    return weights


def tiled(
    apply: Apply,
    image: np.ndarray,
    *,
    tile: int,
    scale: int = 4,
    window: int = 8,
    overlap: int = 32,
    blend: str = "taper",
) -> np.ndarray:
    """`apply` tile by tile, overlaps averaged.

    A network sees zeros beyond a tile's border and errs most there. Counting tiles less toward
    borders that a neighbor covers hides where they meet; the official script counts all alike.

    Args:
      image: [H, W, C] on the host, both sides multiples of `window` (`padded` sees to that).
      tile: side of a tile, a multiple of `window`; images smaller than it are one tile.
      scale: output pixels for an input pixel. overlap: input pixels shared by neighboring tiles.
      blend: "taper", or "mean" as the official script averages.

    Returns: float32 [s H, s W, C']. Only one tile is on the device at a time, and all tiles have
    one shape, so that `apply` is compiled once.

    Raises ValueError for a tile that is no multiple of the window or not larger than the overlap,
    and for an unknown blend.
    """
    if blend not in BLENDS:
        raise ValueError(f"tile_blend {blend!r}; known: {', '.join(BLENDS)}")
    height, width = image.shape[:2]
    if tile % window:
        raise ValueError(f"tile {tile} must be a multiple of the window {window}")
    if not 0 <= overlap < tile:
        raise ValueError(f"tile_overlap {overlap} must be at least 0 and less than tile {tile}")
    tile_h, tile_w = min(tile, height), min(tile, width)
    total = count = None
    tops = tile_starts(height, tile_h, min(overlap, tile_h - 1))
    lefts = tile_starts(width, tile_w, min(overlap, tile_w - 1))
    down = tile_weights(tops, tile_h, scale, blend)
    across = tile_weights(lefts, tile_w, scale, blend)
    for top, of_rows in zip(tops, down):
        for left, of_columns in zip(lefts, across):
            part = image[top : top + tile_h, left : left + tile_w]
            y = np.asarray(apply(jnp.asarray(part)[None])[0], np.float32)
            if total is None:
                total = np.zeros((height * scale, width * scale, y.shape[-1]), np.float32)
                count = np.zeros((height * scale, width * scale, 1), np.float32)
            rows = slice(top * scale, (top + tile_h) * scale)
            columns = slice(left * scale, (left + tile_w) * scale)
            weight = (of_rows[:, None] * of_columns)[..., None]
            total[rows, columns] += weight * y
            count[rows, columns] += weight
    return total / count
