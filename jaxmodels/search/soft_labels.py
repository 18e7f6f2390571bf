"""Cross-entropy against soft labels as the two official repositories define it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def check_labels(label, classes: int, least: int = 0) -> None:
    """ValueError for fewer than two classes or, outside `jit`, a label outside `least`..K-1.

    Inside it, that labels fit the head is the data's promise: `train.building.check_classes`.
    """
    if classes < 2:
        raise ValueError(f"a loss over classes needs at least 2 classes, not {classes}")
    if isinstance(label, jax.core.Tracer):
        return
    values = np.asarray(label)
    if values.size and (values.min() < least or values.max() >= classes):
        wrong = values[(values < least) | (values >= classes)].ravel()[0]
        raise ValueError(f"label {wrong} is not in {least}..{classes - 1}")


def smoothed_targets(label: jax.Array, classes: int, smoothing: float = 0.1) -> jax.Array:
    """[B] -> [B, K]: `1 - s` on the label and `s / (K - 1)` on each other class.

    Raises ValueError for a label outside 0..K-1 and for K = 1, where `s / (K - 1)` has no value.
    """
    check_labels(label, classes)
    hot = jax.nn.one_hot(label, classes)
    return hot * (1 - smoothing) + (1 - hot) * (smoothing / (classes - 1))


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over the batch of `-sum_k t_k log p_k`, [B, K] and [B, K] -> []."""
    log_p = jax.nn.log_softmax(jnp.asarray(logits, jnp.promote_types(logits.dtype, jnp.float32)))
    return -(targets * log_p).sum(-1).mean()


def classification_loss(logits: jax.Array, label: jax.Array, kind: str = "s-softmax") -> jax.Array:
    """ScaleNet's `loss_type`: "s-softmax" (0.9 on the label, 0.1 / (K - 1) elsewhere) or "softmax".

    "softmax" leaves labels of -1 out of the mean. Raises ValueError for another kind, fewer than
    two classes, and labels that are none.
    """
    if kind == "s-softmax":
        return soft_cross_entropy(logits, smoothed_targets(label, logits.shape[-1]))
    if kind != "softmax":
        raise ValueError(f"loss {kind!r}; known: softmax, s-softmax")
    check_labels(label, logits.shape[-1], least=-1)
    keep = label >= 0
    log_p = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    nll = -jnp.take_along_axis(log_p, jnp.maximum(label, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(keep, nll, 0).sum() / keep.sum()
