"""Pixel losses of restoration networks; every one is a mean over all elements."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.restoration.resampling import resize

# KAIR's eps is added to the square as it is; BasicVSR++'s is smaller.
CHARBONNIER_KAIR, CHARBONNIER_BASICVSR = 1e-9, 1e-12


def l1_loss(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """mean |prediction - target|."""
    return jnp.abs(prediction - target).mean()


def charbonnier_loss(
    prediction: jax.Array, target: jax.Array, eps: float = CHARBONNIER_KAIR
) -> jax.Array:
    """mean sqrt((prediction - target)^2 + eps): `eps`, not its square."""
    return jnp.sqrt(jnp.square(prediction - target) + eps).mean()


def downsample_bicubic(x: jax.Array, scale: int = 4) -> jax.Array:
    """Antialiased bicubic [B, H, W, C] -> [B, H / s, W / s, C], Pillow's without its rounding."""
    return resize(x, (x.shape[-3] // scale, x.shape[-2] // scale), "bicubic_antialias")


def auxiliary_loss(prediction: jax.Array, target: jax.Array, scale: int = 4) -> jax.Array:
    """mean |D(target) - D(prediction)|, D the bicubic downsampling (Swin2SR, section 3.1)."""
    return jnp.abs(downsample_bicubic(prediction - target, scale)).mean()


def gaussian_blur(x: jax.Array, size: int = 5, sigma: float = 1.0) -> jax.Array:
    """Gaussian blur of [B, H, W, C], borders reflected without the edge."""
    reach = size // 2
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).tolist()
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="reflect")
    x = sum(w * x[:, k : k + height] for k, w in enumerate(weights))
    return sum(w * x[:, :, k : k + width] for k, w in enumerate(weights))


def high_frequency_loss(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """mean |(y - b * y) - (y' - b * y')|, b a 5x5 Gaussian (Swin2SR; sigma 1 is our choice)."""
    difference = prediction - target
    return jnp.abs(difference - gaussian_blur(difference)).mean()
