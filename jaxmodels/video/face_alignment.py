"""Aligned crops of faces: the FFHQ rule, smoothed over time, and the way back into the frame.

T. Karras et al., arXiv 1812.04948 (FFHQ's alignment); smoothing as rotemtzaban/STIT@fac087f, whose
sigmas of centers and axes are separate.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from jaxmodels.video.landmarks import LEFT_EYE, MOUTH_CORNERS, RIGHT_EYE

_SMALLEST = 1e-3  # pixels; equal points differ by rounding


class Quad(NamedTuple):
    """Square crops: centers and half axes in pixels, each [T, 2] (x, y).

    Corners are c - x - y (upper left), c - x + y, c + x + y, c + x - y.
    """

    center: np.ndarray
    x: np.ndarray
    y: np.ndarray

    def corners(self) -> np.ndarray:
        """[T, 4, 2]: upper left, lower left, lower right, upper right."""
        c, x, y = self
        return np.stack([c - x - y, c - x + y, c + x + y, c + x - y], -2)


def check_landmarks(landmarks: np.ndarray, frames: int) -> None:
    """Refuse landmarks that are not one set of 68 a frame, and those with gaps.

    Raises ValueError with the frame's number.
    """
    if landmarks.ndim != 3 or landmarks.shape[1:] != (68, 2):
        raise ValueError(f"landmarks must be [frames, 68, 2], got {landmarks.shape}")
    if len(landmarks) != frames:
        raise ValueError(
            f"{len(landmarks)} sets of landmarks for {frames} frames; frame "
            f"{min(len(landmarks), frames)} has no counterpart"
        )
    bad = ~np.isfinite(landmarks).all((1, 2))
    if bad.any():
        raise ValueError(f"landmarks of frame {int(np.argmax(bad))} are not finite")


def ffhq_quads(landmarks: np.ndarray) -> Quad:
    """Crops of landmarks [T, 68, 2] in pixels.

    With e = right eye - left eye and m = mouth - middle of the eyes: x = e - rot90(m), as long as
    max(2 |e|, 1.8 |m|); y = rot90(x); center = middle of the eyes + 0.1 m.

    Raises ValueError with the frame's number where eyes and mouth give no direction.
    """
    points = np.asarray(landmarks, np.float64)
    left, right = points[:, LEFT_EYE].mean(1), points[:, RIGHT_EYE].mean(1)
    mouth = points[:, MOUTH_CORNERS].mean(1)
    middle, eyes = (left + right) / 2, right - left
    down = mouth - middle
    x = eyes - np.stack([-down[:, 1], down[:, 0]], -1)
    lengths = np.linalg.norm(eyes, axis=1) * 2, np.linalg.norm(down, axis=1) * 1.8
    norms, sides = np.linalg.norm(x, axis=1), np.maximum(*lengths)
    sizes = np.minimum(norms, sides)
    if (sizes < _SMALLEST).any():
        raise ValueError(
            f"landmarks of frame {int(np.argmin(sizes))} make no crop: eyes and mouth are one point"
        )
    x = x * (sides / norms)[:, None]
    return Quad(middle + 0.1 * down, x, np.stack([-x[:, 1], x[:, 0]], -1))


def smooth_quads(quads: Quad, center_sigma: float = 0.0, axes_sigma: float = 0.0) -> Quad:
    """Crops whose centers and axes are smoothed over time by Gaussians (sigmas in frames).

    Ends repeat the first and last frame. Sigma 0 leaves a part as it is.
    """
    from scipy.ndimage import gaussian_filter1d

    def smooth(values, sigma):
        return gaussian_filter1d(values, sigma, axis=0, mode="nearest") if sigma > 0 else values

    x = smooth(quads.x, axes_sigma)
    return Quad(smooth(quads.center, center_sigma), x, smooth(quads.y, axes_sigma))


def crop_quad(frame: jax.Array, quad: Quad, size: int) -> jax.Array:
    """One frame [H, W, C] -> its crop [size, size, C], bilinear; outside the frame edges repeat.

    quad: arrays [2] of one frame. Crops much larger than `size` are averaged over a finer grid.
    """
    center, x, y = (jnp.asarray(a, jnp.float32) for a in quad)
    # Samples a pixel and axis, so that large crops do not alias.
    fine = int(np.clip(np.ceil(2 * float(np.linalg.norm(np.asarray(quad.x))) / size), 1, 8))
    return _cropped(frame, center, x, y, size, fine)


@functools.partial(jax.jit, static_argnames=("size", "fine"))
def _cropped(frame, center, x, y, size: int, fine: int) -> jax.Array:
    place = (jnp.arange(size * fine) + 0.5) / (size * fine) * 2 - 1
    points = center + place[None, :, None] * x + place[:, None, None] * y
    crop = _sampled(frame, points[..., 1] - 0.5, points[..., 0] - 0.5)
    return crop.reshape(size, fine, size, fine, -1).mean((1, 3))


def _sampled(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """image [H, W, C] at places [...] in pixels -> [..., C]: bilinear, edges repeat."""
    at = functools.partial(map_coordinates, coordinates=[rows, columns], order=1, mode="nearest")
    return jax.vmap(at, -1, -1)(image.astype(jnp.float32))


def paste_quad(frame: jax.Array, crop: jax.Array, quad: Quad, feather: float = 0.05) -> jax.Array:
    """The frame [H, W, C] with `crop` [s, s, C] put back where `crop_quad` took it from.

    The border of the crop fades over the share `feather` of its half width. A crop of more pixels
    than its place in the frame is averaged down first.
    """
    center, x, y = (jnp.asarray(a, jnp.float32) for a in quad)
    size = crop.shape[0]
    shrink = max(int(size / (2 * float(np.linalg.norm(np.asarray(quad.x))))), 1)
    shrink = next(n for n in range(shrink, 0, -1) if size % n == 0)
    return _pasted(frame, crop, center, x, y, feather, shrink)


@functools.partial(jax.jit, static_argnames="shrink")
def _pasted(frame, crop, center, x, y, feather, shrink: int) -> jax.Array:
    height, width = frame.shape[:2]
    size = crop.shape[0] // shrink
    crop = crop.reshape(size, shrink, size, shrink, -1).mean((1, 3))
    rows, columns = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
    offset = jnp.stack([columns, rows], -1) - center
    # Axes need not stay orthogonal after smoothing: the 2x2 system is solved.
    determinant = x[0] * y[1] - x[1] * y[0]
    u = (offset[..., 0] * y[1] - offset[..., 1] * y[0]) / determinant
    v = (x[0] * offset[..., 1] - x[1] * offset[..., 0]) / determinant
    placed = _sampled(crop, (v + 1) / 2 * size - 0.5, (u + 1) / 2 * size - 0.5)
    inside = 1 - jnp.maximum(jnp.abs(u), jnp.abs(v))
    alpha = jnp.clip(inside / jnp.maximum(feather, 1e-6), 0, 1)[..., None]
    return frame * (1 - alpha) + placed.astype(frame.dtype) * alpha
