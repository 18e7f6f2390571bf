"""Patches that mislead a network wherever they lie: optimized over random placements and light.

T. Brown et al., "Adversarial Patch", arXiv 1712.09665; A. Athalye et al., arXiv 1707.07397 (EOT).
One patch for all given images, signed steps with momentum on the mean gradient over draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxmodels.security import perturbations
from jaxmodels.security.patches import (
    Placement,
    compose_patch,
    non_printability,
    printable_palette,
    sample_placements,
    total_variation,
    with_noise,
)
from jaxmodels.security.perturbations import Loss, cross_entropy


@struct.dataclass
class PatchAttack:
    """Options; pixels are in [0, 1].

    Attributes:
      step_size: of each signed step. smoothness: weight of the total variation. printability: of
        the mean distance to printable colors.
      steps, draws: steps, and placements of every image at each. momentum: mu.
      varied: False optimizes for the middle of all ranges alone (the baseline without EOT).
      targeted: `y` is wanted. loss: `(output, y) -> [B]`.
      center, shift, scale, degrees, contrast, brightness: see `sample_placements`. noise: sigma of
        the camera's.
    """

    step_size: Any = 2 / 255
    smoothness: Any = 0.0
    printability: Any = 0.0
    steps: int = struct.field(pytree_node=False, default=300)
    draws: int = struct.field(pytree_node=False, default=8)
    momentum: float = struct.field(pytree_node=False, default=0.9)
    varied: bool = struct.field(pytree_node=False, default=True)
    targeted: bool = struct.field(pytree_node=False, default=False)
    loss: Loss = struct.field(pytree_node=False, default=cross_entropy)
    center: tuple[float, float] = struct.field(pytree_node=False, default=(0.0, 0.0))
    shift: float = struct.field(pytree_node=False, default=0.1)
    scale: tuple[float, float] = struct.field(pytree_node=False, default=(0.7, 1.4))
    degrees: float = struct.field(pytree_node=False, default=30.0)
    contrast: tuple[float, float] = struct.field(pytree_node=False, default=(0.8, 1.2))
    brightness: float = struct.field(pytree_node=False, default=0.1)
    noise: float = struct.field(pytree_node=False, default=0.02)


def placements(key: jax.Array, batch: int, cfg: PatchAttack) -> Placement:
    """Placements [B] from cfg's ranges."""
    return sample_placements(
        key,
        batch,
        center=cfg.center,
        shift=cfg.shift,
        scale=cfg.scale,
        degrees=cfg.degrees,
        contrast=cfg.contrast,
        brightness=cfg.brightness,
    )


def with_patch(
    key: jax.Array, images: jax.Array, patch: jax.Array, mask: jax.Array, cfg: PatchAttack
) -> jax.Array:
    """Images [B, H, W, 3] with the patch at random places, in random light, seen with noise."""
    place, noise = jax.random.split(key)
    laid = compose_patch(images, patch, mask, placements(place, images.shape[0], cfg)).images
    return with_noise(noise, laid, cfg.noise)


def optimize_patch(
    key: jax.Array,
    apply_fn: Callable[[jax.Array], Any],
    images: jax.Array,
    y: Any,
    patch: jax.Array,
    mask: jax.Array,
    cfg: PatchAttack,
) -> jax.Array:
    """A patch [h, w, 3] in [0, 1] that raises the loss (lowers a targeted one) on all images.

    Args:
      apply_fn: images to what `cfg.loss` takes. images: [B, H, W, 3] in [0, 1].
      y: labels or targets [B]. patch: to begin from. mask: of 0 and 1 [h, w, 1].
    """
    if cfg.steps < 1 or cfg.draws < 1:
        raise ValueError(
            f"patch attack: steps and draws must be positive, got {cfg.steps} and {cfg.draws}"
        )
    perturbations.check_pixels(images)
    perturbations.check_targets(None, y, cfg.targeted)
    perturbations.check_mask(mask)
    images, palette = jnp.asarray(images), printable_palette()
    batch, (height, width) = images.shape[0], patch.shape[:2]
    middle = Placement(
        *(jnp.full(batch, v) for v in (*cfg.center, sum(cfg.scale) / 2, 0.0, 0.0, 1.0))
    )
    sign = -1.0 if cfg.targeted else 1.0

    def total(patch, key):
        if cfg.varied:
            seen = with_patch(key, images, patch, mask, cfg)
        else:
            seen = compose_patch(images, patch, mask, middle).images
        value = sign * cfg.loss(apply_fn(seen), y).mean()
        printable = non_printability(patch, palette) / (height * width)
        return value - cfg.smoothness * total_variation(patch) - cfg.printability * printable

    def advance(carry, step_key):
        patch, history = carry
        keys = jax.random.split(step_key, cfg.draws if cfg.varied else 1)
        add = lambda acc, k: (acc + jax.grad(total)(patch, k), None)  # noqa: E731
        g, _ = lax.scan(add, jnp.zeros_like(patch), keys)
        mean = jnp.abs(g).mean()
        history = cfg.momentum * history + g / jnp.where(mean > 0, mean, 1)
        patch = jnp.clip(patch + cfg.step_size * jnp.sign(history), 0, 1)
        return (patch, history), None

    start = jnp.asarray(patch, images.dtype)
    keys = jax.random.split(key, cfg.steps)
    (patch, _), _ = lax.scan(advance, (start, jnp.zeros_like(start)), keys)
    return patch


def patch_success(
    key: jax.Array,
    apply_fn: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    y: jax.Array,
    patch: jax.Array,
    mask: jax.Array,
    cfg: PatchAttack,
    *,
    draws: int = 16,
) -> jax.Array:
    """Share of images and fresh placements that are misclassified (classified as `y`, targeted)."""

    def one(_, k):
        found = apply_fn(with_patch(k, images, patch, mask, cfg)).argmax(-1)
        return None, ((found == y) == cfg.targeted).mean()

    _, shares = lax.scan(one, None, jax.random.split(key, draws))
    return shares.mean()
