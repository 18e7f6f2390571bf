"""What every image network checks before it computes."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_images(x: jax.Array, channels: int = 3) -> None:
    """Refuse anything but non-empty floating images [B, H, W, channels]."""
    wanted = f"[batch, height, width, {channels}]"
    if x.ndim != 4:
        raise ValueError(f"images must be {wanted}, got shape {x.shape}")
    if x.shape[-1] != channels:
        nchw = x.shape[1] == channels
        turned = " (NCHW?); transpose with x.transpose(0, 2, 3, 1)" if nchw else ""
        raise ValueError(f"images must be {wanted}, got shape {x.shape}{turned}")
    if 0 in x.shape:
        raise ValueError(f"images must not be empty, got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"images must be floating point and normalized, got {x.dtype}; set preprocess=True to "
            "have 0..255 images normalized by the network"
        )


def preprocess_images(x: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Integer images 0..255 to ImageNet-normalized floats; floating images pass unchanged."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    mean, std = jnp.asarray(IMAGENET_MEAN, jnp.float32), jnp.asarray(IMAGENET_STD, jnp.float32)
    return ((x.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def check_network(width: float, num_classes: int, variants: Iterable[str]) -> None:
    """Refuse widths and class counts that no network has, listing the named variants."""
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}; variants: {', '.join(variants)}")
    if num_classes < 1:
        raise ValueError(
            f"num_classes must be at least 1, got {num_classes}; variants: {', '.join(variants)}"
        )
