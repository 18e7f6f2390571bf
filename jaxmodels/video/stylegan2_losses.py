"""StyleGAN2's objective: non-saturating logistic loss, R1, path length, lazy regularization.

NVlabs/stylegan2-ada-pytorch@d72cc7d (`training/loss.py`, `training/training_loop.py`). Both
regularizers differentiate a gradient, so the networks must be twice differentiable.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def generator_loss(fake_logits: jax.Array) -> jax.Array:
    """mean softplus(-D(G(z)))."""
    return jax.nn.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
    """mean softplus(D(G(z))) + mean softplus(-D(x))."""
    return jax.nn.softplus(fake_logits).mean() + jax.nn.softplus(-real_logits).mean()


def r1_penalty(
    discriminator: Callable[[jax.Array], jax.Array], images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(|d sum(D) / d x|^2 [B], logits): the squared gradient of every image, without gamma / 2."""

    def total(x):
        logits = discriminator(x)
        return logits.sum(), logits

    grad, logits = jax.grad(total, has_aux=True)(images)
    return jnp.square(grad).reshape(len(grad), -1).sum(-1), logits


def path_lengths(
    synthesis: Callable[[jax.Array], jax.Array], ws: jax.Array, noise: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(lengths [B], gradients [B, n, D]) of J^T y at W+ codes.

    noise y [B, H, W, C] is standard normal and is divided by sqrt(H W) here;
    length = sqrt(mean over layers of sum over D of (d sum(G y) / d w)^2).
    """
    height, width = noise.shape[1:3]

    def total(ws):
        return (synthesis(ws) * noise).sum() / jnp.sqrt(float(height * width))

    grad = jax.grad(total)(ws)
    return jnp.sqrt(jnp.square(grad).sum(2).mean(1)), grad


def path_length_penalty(
    lengths: jax.Array, mean: jax.Array, decay: float = 0.01
) -> tuple[jax.Array, jax.Array]:
    """((lengths - new mean)^2 [B], new mean); the mean moves by `decay` and is differentiated,
    as in the official code (where only the stored value is detached)."""
    new = mean + decay * (lengths.mean() - mean)
    return jnp.square(lengths - new), new


def lazy(every: int) -> float:
    """k / (k + 1): what learning rate and (as an exponent) betas are corrected by when a
    regularizer runs every k-th step only."""
    return every / (every + 1) if every > 0 else 1.0


def mixing_cutoff(rng: jax.Array, batch: int, layers: int, probability: float) -> jax.Array:
    """[] int32: the layer from which the second style takes over; `layers` where none does.

    The official code draws one cutoff for the whole batch, 1 <= cutoff < layers.
    """
    del batch
    draw, cut = jax.random.split(rng)
    cutoff = jax.random.randint(cut, (), 1, layers)
    return jnp.where(jax.random.uniform(draw) < probability, cutoff, layers)
