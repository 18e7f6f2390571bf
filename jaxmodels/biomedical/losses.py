"""Segmentation losses of nnU-Net: cross-entropy and soft Dice, with deep supervision.

After nnunetv2 2.8.1, `training/loss/{compound_losses,dice,deep_supervision,robust_ce_loss}.py`.
Logits [B, *S, K]; targets int [B, *S] (classes) or {0, 1} [B, *S, K] (regions).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

SMOOTH = 1e-5


def _voxel_axes(x: jax.Array, batch_dice: bool) -> tuple[int, ...]:
    return (*((0,) if batch_dice else ()), *range(1, x.ndim - 1))


def _sums(probabilities, reference, mask, batch_dice):
    axes = _voxel_axes(probabilities, batch_dice)
    if mask is not None:
        probabilities, reference = probabilities * mask[..., None], reference * mask[..., None]
    return (
        (probabilities * reference).sum(axes),
        probabilities.sum(axes),
        reference.sum(axes),
    )


def soft_dice_loss(
    probabilities: jax.Array,
    reference: jax.Array,
    *,
    smooth: float = SMOOTH,
    batch_dice: bool = True,
    background: bool = False,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Minus the mean of (2 sum p g + smooth) / (sum g + sum p + smooth), in [-1, 0].

    The mean is over classes, and over samples unless `batch_dice` adds up the batch first. Without
    `background` class 0 is left out. A class that a sample does not have contributes
    smooth / (sum p + smooth).

    Args:
      probabilities: [B, *S, K]. reference: {0, 1} [B, *S, K].
      mask: [B, *S], 0 where a voxel does not count.
    """
    if not background:
        probabilities, reference = probabilities[..., 1:], reference[..., 1:]
    overlap, predicted, present = _sums(probabilities, reference, mask, batch_dice)
    return -((2 * overlap + smooth) / jnp.maximum(present + predicted + smooth, 1e-8)).mean()


def tversky_loss(
    probabilities: jax.Array,
    reference: jax.Array,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    smooth: float = SMOOTH,
    batch_dice: bool = True,
    background: bool = False,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Minus the mean of (TP + s) / (TP + alpha FP + beta FN + s); alpha = beta = 1/2 is Dice.

    Arguments as in `soft_dice_loss`. Salehi et al., arXiv 1706.05721.
    """
    if not background:
        probabilities, reference = probabilities[..., 1:], reference[..., 1:]
    overlap, predicted, present = _sums(probabilities, reference, mask, batch_dice)
    weighed = overlap + alpha * (predicted - overlap) + beta * (present - overlap)
    return -((overlap + smooth) / jnp.maximum(weighed + smooth, 1e-8)).mean()


def voxel_cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] of every voxel, [B, *S]."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]


def cross_entropy(logits: jax.Array, target: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean over voxels (over those of `mask` [B, *S]); 0 where the mask is empty."""
    losses = voxel_cross_entropy(logits, target)
    if mask is None:
        return losses.mean()
    return (losses * mask).sum() / jnp.maximum(mask.sum(), 1)


def topk_cross_entropy(
    logits: jax.Array, target: jax.Array, mask: jax.Array | None = None, k: float = 10.0
) -> jax.Array:
    """Mean of the `k` percent of all voxels of the batch with the largest cross-entropy."""
    losses = voxel_cross_entropy(logits, target)
    if mask is not None:
        losses = losses * mask
    flat = losses.reshape(-1)
    return jax.lax.top_k(flat, max(1, int(flat.size * k / 100)))[0].mean()


def focal_cross_entropy(
    logits: jax.Array, target: jax.Array, mask: jax.Array | None = None, gamma: float = 2.0
) -> jax.Array:
    """Mean of (1 - p)^gamma times the cross-entropy. Lin et al., arXiv 1708.02002."""
    losses = voxel_cross_entropy(logits, target)
    losses = losses * (1 - jnp.exp(-losses)) ** gamma
    if mask is None:
        return losses.mean()
    return (losses * mask).sum() / jnp.maximum(mask.sum(), 1)


VOXEL_LOSSES = {
    "cross_entropy": cross_entropy,
    "topk": topk_cross_entropy,
    "focal": focal_cross_entropy,
}
OVERLAP_LOSSES = {"dice": soft_dice_loss, "tversky": tversky_loss}


def segmentation_loss(
    logits: jax.Array,
    target: jax.Array,
    *,
    batch_dice: bool = True,
    background: bool = False,
    ignore_label: int | None = None,
    smooth: float = SMOOTH,
    voxel_loss: str = "cross_entropy",
    overlap_loss: str = "dice",
) -> jax.Array:
    """Voxel loss plus overlap loss of exclusive classes; at best -1.

    Args:
      logits: [B, *S, K]. target: int [B, *S]; `ignore_label` marks voxels that count in neither.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    mask = None
    if ignore_label is not None:
        mask = (target != ignore_label).astype(logits.dtype)
        target = jnp.where(target == ignore_label, 0, target)
    reference = jax.nn.one_hot(target, logits.shape[-1], dtype=logits.dtype)
    overlap = OVERLAP_LOSSES[overlap_loss](
        jax.nn.softmax(logits),
        reference,
        smooth=smooth,
        batch_dice=batch_dice,
        background=background,
        mask=mask,
    )
    return VOXEL_LOSSES[voxel_loss](logits, target, mask) + overlap


def region_loss(
    logits: jax.Array,
    regions: jax.Array,
    *,
    batch_dice: bool = True,
    mask: jax.Array | None = None,
    smooth: float = SMOOTH,
) -> jax.Array:
    """Binary cross-entropy plus soft Dice of overlapping regions, [B, *S, K] each.

    Every region counts: there is no background among them. `mask` [B, *S] excludes voxels.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    regions = regions.astype(logits.dtype)
    losses = jnp.maximum(logits, 0) - logits * regions + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    if mask is None:
        binary = losses.mean()
    else:
        binary = (losses * mask[..., None]).sum() / jnp.maximum(mask.sum() * logits.shape[-1], 1)
    overlap = soft_dice_loss(
        jax.nn.sigmoid(logits),
        regions,
        smooth=smooth,
        batch_dice=batch_dice,
        background=True,
        mask=mask,
    )
    return binary + overlap


def deep_supervision_weights(levels: int) -> np.ndarray:
    """1, 1/2, 1/4, ... of the outputs, full resolution first; the last 0; they add up to 1.

    A single output has weight 1.
    """
    weights = 0.5 ** np.arange(levels)
    if levels > 1:
        weights[-1] = 0
    return weights / weights.sum()


def nearest_downsample(target: jax.Array, shape: Sequence[int]) -> jax.Array:
    """target [B, *S] at a lower resolution [B, *shape]: the voxel nearest to each new center.

    Old index floor((i + 1/2) old / new), PyTorch's `nearest-exact`: at an even factor the upper of
    the two middle voxels.
    """
    for axis, (old, new) in enumerate(zip(target.shape[1:], shape), start=1):
        if old != new:
            index = np.floor((np.arange(new) + 0.5) * old / new).astype(np.int32)
            target = jnp.take(target, np.clip(index, 0, old - 1), axis=axis)
    return target


def deep_supervision_loss(
    loss, logits: Sequence[jax.Array], targets: Sequence[jax.Array], weights=None
) -> jax.Array:
    """Weighted sum of `loss(logits[i], targets[i])`; outputs of weight 0 are not evaluated."""
    weights = deep_supervision_weights(len(logits)) if weights is None else weights
    if not len(logits) == len(targets) == len(weights):
        raise ValueError(
            f"{len(logits)} outputs, {len(targets)} targets and {len(weights)} weights"
        )
    total = 0.0
    for w, y, t in zip(weights, logits, targets):
        if w:
            total = total + w * loss(y, t)
    return total
