"""How good and how steady an encoded clip is.

TL-ID and TG-ID after R. Tzaban et al., "Stitch it in Time", arXiv 2201.08361. Clips are
[T, H, W, 3] in [-1, 1].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def psnr(y_hat: jax.Array, y: jax.Array, peak: float = 2.0) -> jax.Array:
    """10 log10(peak^2 / mse) in dB; the peak of images in [-1, 1] is 2."""
    return 10 * jnp.log10(peak**2 / jnp.square(y_hat - y).mean())


def flicker(y_hat: jax.Array, y: jax.Array) -> jax.Array:
    """mean |(y_hat[t+1] - y_hat[t]) - (y[t+1] - y[t])|: change that is not in the source.

    Raises ValueError for clips of fewer than two frames.
    """
    _check_clip(y_hat)
    return jnp.abs(jnp.diff(y_hat, axis=0) - jnp.diff(y, axis=0)).mean()


def latent_jitter(ws: jax.Array) -> jax.Array:
    """mean |w[t+1] - w[t]| of every layer, codes [T, n, D] -> [n]."""
    _check_clip(ws)
    return jnp.abs(jnp.diff(ws, axis=0)).mean((0, 2))


def local_identity(edited: jax.Array, original: jax.Array) -> jax.Array:
    """TL-ID: mean over t of cos(f(e_t), f(e_t+1)) / cos(f(o_t), f(o_t+1)); 1 is ideal.

    Both are unit vectors [T, D], of the edited and of the original frames.
    """
    _check_clip(edited)
    neighbors = (edited[:-1] * edited[1:]).sum(-1) / (original[:-1] * original[1:]).sum(-1)
    return neighbors.mean()


def global_identity(edited: jax.Array, original: jax.Array) -> jax.Array:
    """TG-ID: the same ratio over all pairs of different frames."""
    _check_clip(edited)
    pairs = jnp.triu_indices(len(edited), 1)
    return ((edited @ edited.T)[pairs] / (original @ original.T)[pairs]).mean()


def latent_editing_consistency(codes: jax.Array, returned: jax.Array) -> jax.Array:
    """LEC of every image: |codes - returned|_2 over layers and width, [B, n, D] each -> [B].

    `returned` are the codes found in the edited picture, the edit undone (e4e, `metrics/LEC.py`,
    which drops the outermost percentiles of batch means before it averages).
    """
    return jnp.sqrt(jnp.square(codes - returned).sum((1, 2)))


def landmark_error(points: jax.Array, target: jax.Array) -> jax.Array:
    """Mean distance in pixels of landmarks [T, K, 2]."""
    return jnp.linalg.norm(points - target, axis=-1).mean()


def _check_clip(x: jax.Array) -> None:
    if len(x) < 2:
        raise ValueError(f"a clip of at least two frames is needed, got {len(x)}")
