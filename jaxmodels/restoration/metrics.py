"""PSNR, SSIM and PSNR-B of images on [0, 255], in float64.

Definitions of mv-lab/swin2sr@6f25d76 (`utils/util_calculate_psnr_ssim.py`), for RGB images rather
than its BGR. The challenge measures PSNR on RGB without cropping borders; the Swin2SR script crops
`scale` pixels and reports luma (Y) as well.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_Y_WEIGHTS, _Y_OFFSET = np.array([65.481, 128.553, 24.966]), 16.0
_BLOCK = 8


def luma(image: np.ndarray) -> np.ndarray:
    """BT.601 studio-range Y of RGB [..., 3] in [0, 255], float64 in [16, 235], not rounded.

    Not the full-range Y of JPEG.
    """
    return np.asarray(image, np.float64) @ _Y_WEIGHTS / 255 + _Y_OFFSET


def psnr(
    restored: np.ndarray, reference: np.ndarray, crop: int = 0, *, y_channel: bool = False
) -> float:
    """20 log10(255 / sqrt(mse)) in dB of [H, W] or [H, W, C] images; inf when they are equal.

    Args: `crop`: pixels left out at each border. `y_channel`: of the luma of RGB images.

    Raises ValueError for different shapes, and for a crop that leaves nothing.
    """
    a, b = _prepared(restored, reference, crop, y_channel)
    mse = np.mean(np.square(a - b))
    return float("inf") if mse == 0 else float(20 * np.log10(255 / np.sqrt(mse)))


def ssim(
    restored: np.ndarray, reference: np.ndarray, crop: int = 0, *, y_channel: bool = False
) -> float:
    """Mean structural similarity: 11x11 Gaussian of sigma 1.5, valid area, mean over channels.

    C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2, biased covariances. Arguments as in `psnr`; images
    must have 11 pixels a side after cropping.
    """
    a, b = _prepared(restored, reference, crop, y_channel)
    if min(a.shape[:2]) < 11:
        raise ValueError(f"ssim needs 11x11 pixels after cropping, got {a.shape[:2]}")
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    var_a = _window_mean(a * a) - mean_a**2
    var_b = _window_mean(b * b) - mean_b**2
    covariance = _window_mean(a * b) - mean_a * mean_b
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    denominator = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return float(np.mean(numerator / denominator))


def psnr_b(
    restored: np.ndarray, reference: np.ndarray, crop: int = 0, *, y_channel: bool = False
) -> float:
    """PSNR with a blocking penalty: mse + BEF on [0, 1], mean over channels, in dB.

    BEF = log2(8) / log2(min(H, W)) max(0, D_b - D_n): mean squared steps across edges of 8-pixel
    blocks over those elsewhere, of the restored image only. Arguments as in `psnr`.
    """
    a, b = _prepared(restored, reference, crop, y_channel)
    values = []
    for c in range(a.shape[2]):
        mse = np.mean(np.square((a[..., c] - b[..., c]) / 255))
        total = mse + blocking_effect(a[..., c] / 255)
        values.append(float("inf") if total == 0 else float(10 * np.log10(1 / total)))
    return float(np.mean(values))


def blocking_effect(image: np.ndarray) -> float:
    """The blocking-effect factor of one channel [H, W] on [0, 1]; both sides at least 16."""
    height, width = image.shape
    steps_x, steps_y = np.square(np.diff(image, axis=1)), np.square(np.diff(image, axis=0))
    edges_x, edges_y = (np.arange(n - 1) % _BLOCK == _BLOCK - 1 for n in (width, height))
    at_edges = steps_x[:, edges_x].sum() + steps_y[edges_y].sum()
    elsewhere = steps_x[:, ~edges_x].sum() + steps_y[~edges_y].sum()
    count_x, count_y = height * (width // _BLOCK - 1), width * (height // _BLOCK - 1)
    if count_x + count_y <= 0:
        raise ValueError(f"psnr_b needs two blocks of 8 pixels a side, got {height}x{width}")
    others = height * (width - 1) - count_x + width * (height - 1) - count_y
    difference = at_edges / (count_x + count_y) - elsewhere / others
    return float(np.log2(_BLOCK) / np.log2(min(height, width)) * max(0.0, difference))


def mean_psnr(values: Iterable[float]) -> float:
    """The mean in dB; inf, not NaN, as soon as one image equals its reference."""
    return float(np.mean(np.asarray(list(values), np.float64)))


def gain(ours: float, baseline: float) -> float:
    """Difference of two PSNRs in dB; 0, not NaN, where both pictures equal the reference."""
    return 0.0 if ours == baseline else ours - baseline


def to_uint8(image: np.ndarray) -> np.ndarray:
    """[0, 1] floats clamped and rounded to uint8, as results are stored and measured."""
    return np.rint(np.clip(np.asarray(image, np.float64), 0, 1) * 255).astype(np.uint8)


def _prepared(restored, reference, crop, y_channel):
    a, b = (np.asarray(x, np.float64) for x in (restored, reference))
    if a.shape != b.shape or a.ndim not in (2, 3):
        raise ValueError(
            f"images must have one shape [H, W] or [H, W, C], got {a.shape} and {b.shape}"
        )
    if crop < 0 or 2 * crop >= min(a.shape[:2]):
        raise ValueError(f"crop_border {crop} leaves nothing of an image of {a.shape[:2]} pixels")
    if y_channel:
        if a.ndim != 3 or a.shape[2] != 3:
            raise ValueError(f"y_channel needs RGB images [H, W, 3], got {a.shape}")
        a, b = luma(a), luma(b)
    a, b = (x if x.ndim == 3 else x[..., None] for x in (a, b))
    if crop:
        a, b = (x[crop:-crop, crop:-crop] for x in (a, b))
    return a, b


def _window_mean(x: np.ndarray) -> np.ndarray:
    """Gaussian-weighted means of all 11x11 windows inside [H, W, C]."""
    weights = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    weights /= weights.sum()
    height, width = x.shape[0] - 10, x.shape[1] - 10
    x = sum(w * x[k : k + height] for k, w in enumerate(weights))
    return sum(w * x[:, k : k + width] for k, w in enumerate(weights))
