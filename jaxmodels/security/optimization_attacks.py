"""Attacks that look for the smallest perturbation: Carlini-Wagner in L2, and DeepFool.

N. Carlini, D. Wagner, "Towards Evaluating the Robustness of Neural Networks", arXiv 1608.04644;
S. Moosavi-Dezfooli et al., "DeepFool", arXiv 1511.04599. Both keep what the specification of this
project says: the true class masked by minus infinity, the best point of each image among those
evaluated before each step, no early stop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from jaxmodels.security import perturbations
from jaxmodels.security.perturbations import l2_norms, margin

_BORDER = 1e-6  # of the tanh box, where atanh stays finite


@struct.dataclass
class CarliniWagner:
    """L2 attack in tanh space, Adam on ||x' - x||^2 + c max(margin, -kappa).

    Attributes:
      c: weight of the margin, a scalar or [B]; with `search_rounds` > 0 it starts there, is
        multiplied by 10 until an image succeeds, and is then bisected.
      kappa: confidence. steps: Adam steps a round. learning_rate: Adam's.
      search_rounds: (rounds of growing, rounds of bisecting) taken together; RobFR has 6 + 10.
      mask: [H, W, 1] or [B, H, W, 1] of 0 and 1: where pixels may change.
      targeted: `y` is the class wanted. low, high: pixel range.
    """

    c: Any = 1.0
    mask: Any = None
    kappa: float = struct.field(pytree_node=False, default=0.0)
    steps: int = struct.field(pytree_node=False, default=50)
    learning_rate: float = struct.field(pytree_node=False, default=0.01)
    search_rounds: int = struct.field(pytree_node=False, default=0)
    targeted: bool = struct.field(pytree_node=False, default=False)
    low: float = struct.field(pytree_node=False, default=0.0)
    high: float = struct.field(pytree_node=False, default=1.0)


def carlini_wagner(
    key: jax.Array,
    apply_fn: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    y: jax.Array,
    cfg: CarliniWagner,
) -> jax.Array:
    """The nearest adversarial images found [B, H, W, C]; x itself where none was.

    An image counts as adversarial when argmax != y (== y when targeted).
    """
    del key
    perturbations.check_budget("C&W", None, cfg.steps)
    perturbations.check_pixels(x, cfg.low, cfg.high)
    perturbations.check_mask(cfg.mask)
    if cfg.kappa < 0:
        raise ValueError(f"C&W: kappa must not be negative, got {cfg.kappa:g}")
    x = jnp.asarray(x)
    batch = x.shape[0]
    span = cfg.high - cfg.low
    c = jnp.broadcast_to(jnp.asarray(cfg.c, x.dtype), (batch,))
    best = (x, jnp.full((batch,), jnp.inf, x.dtype))
    if not cfg.search_rounds:
        return _minimize(apply_fn, x, y, c, best, cfg, span)[0][0]

    def search(carry, _):
        best, c, floor, ceiling = carry
        best, won = _minimize(apply_fn, x, y, c, best, cfg, span)
        floor = jnp.where(won, floor, jnp.maximum(floor, c))
        ceiling = jnp.where(won, jnp.minimum(ceiling, c), ceiling)
        c = jnp.where(jnp.isinf(ceiling), c * 10, (floor + ceiling) / 2)
        return (best, c, floor, ceiling), None

    carry = (best, c, jnp.zeros_like(c), jnp.full_like(c, jnp.inf))
    (best, *_), _ = lax.scan(search, carry, length=cfg.search_rounds)
    return best[0]


def _minimize(apply_fn, x, y, c, best, cfg, span):
    optimizer = optax.adam(cfg.learning_rate)
    scaled = jnp.clip(2 * (x - cfg.low) / span - 1, -1 + _BORDER, 1 - _BORDER)
    w = jnp.arctanh(scaled)

    def image(w):
        inside = (jnp.tanh(w) + 1) / 2 * span + cfg.low
        return inside if cfg.mask is None else jnp.where(jnp.asarray(cfg.mask) > 0, inside, x)

    def objective(w):
        adversarial = image(w)
        logits = apply_fn(adversarial)
        gap = margin(logits, y)
        gap = -gap if cfg.targeted else gap
        squared = jnp.square(adversarial - x).sum((1, 2, 3))
        total = (squared + c * jnp.maximum(gap, -cfg.kappa)).sum()
        return total, (adversarial, squared, logits)

    def advance(carry, _):
        w, state, (kept, smallest), won = carry
        grads, (adversarial, squared, logits) = jax.grad(objective, has_aux=True)(w)
        hit = (logits.argmax(-1) == y) == cfg.targeted
        better = hit & (squared < smallest)
        kept = jnp.where(better[:, None, None, None], adversarial, kept)
        smallest = jnp.where(better, squared, smallest)
        updates, state = optimizer.update(grads, state)
        return (w + updates, state, (kept, smallest), won | hit), None

    won = jnp.zeros(x.shape[0], bool)
    carry = (w, optimizer.init(w), best, won)
    (_, _, best, won), _ = lax.scan(advance, carry, length=cfg.steps)
    return best, won


@struct.dataclass
class DeepFool:
    """Steps to the nearest face of the linearized decision region, until the class changes.

    Attributes:
      steps: at most. overshoot: the found perturbation is enlarged by this share.
      candidates: how many of the most probable other classes are looked at (0: all).
      mask: [H, W, 1] or [B, H, W, 1] of 0 and 1: where pixels may change.
    """

    mask: Any = None
    steps: int = struct.field(pytree_node=False, default=50)
    overshoot: float = struct.field(pytree_node=False, default=0.02)
    candidates: int = struct.field(pytree_node=False, default=0)
    low: float = struct.field(pytree_node=False, default=0.0)
    high: float = struct.field(pytree_node=False, default=1.0)


def deepfool(
    key: jax.Array,
    apply_fn: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    y: jax.Array,
    cfg: DeepFool,
) -> jax.Array:
    """Minimal-L2 adversarial images [B, H, W, C]; images that are misclassified already stay."""
    del key
    perturbations.check_budget("DeepFool", None, cfg.steps)
    perturbations.check_pixels(x, cfg.low, cfg.high)
    perturbations.check_mask(cfg.mask)
    x = jnp.asarray(x)
    classes = jax.eval_shape(apply_fn, x).shape[-1]
    perturbations.check_labels(y, classes)
    looked_at = min(cfg.candidates or classes - 1, classes - 1)
    clean = apply_fn(x)
    others = jnp.where(jax.nn.one_hot(y, classes, dtype=bool), -jnp.inf, clean)
    rivals = lax.top_k(others, looked_at)[1]

    def differences(point):
        """z_rival - z_y of every rival [B, R] and its gradient [R, B, H, W, C]."""

        def gap(point, rival):
            logits = apply_fn(point)
            pick = lambda index: jnp.take_along_axis(logits, index[:, None], 1)[:, 0]  # noqa: E731
            value = pick(rival) - pick(y)
            return value.sum(), value

        grads, values = lax.map(lambda rival: jax.grad(gap, has_aux=True)(point, rival), rivals.T)
        return values.T, (grads if cfg.mask is None else grads * cfg.mask)

    def advance(carry, _):
        point, total = carry
        values, grads = differences(point)
        lengths = jnp.sqrt(jnp.square(grads).sum((2, 3, 4))).T
        distances = jnp.abs(values) / jnp.maximum(lengths, 1e-12)
        nearest = distances.argmin(-1)
        rows = jnp.arange(x.shape[0])
        direction = grads[nearest, rows]
        length = lengths[rows, nearest][:, None, None, None]
        move = (distances[rows, nearest][:, None, None, None] + 1e-4) * direction
        move = move / jnp.maximum(length, 1e-12)
        active = (values < 0).all(-1)[:, None, None, None]
        total = total + jnp.where(active, move, 0)
        point = jnp.clip(x + (1 + cfg.overshoot) * total, cfg.low, cfg.high)
        return (jnp.where(active, point, carry[0]), total), None

    (point, _), _ = lax.scan(advance, (x, jnp.zeros_like(x)), length=cfg.steps)
    return point


def perturbation_sizes(adversarial: jax.Array, x: jax.Array) -> dict[str, jax.Array]:
    """`linf` and `l2` of every image's perturbation, [B] each."""
    delta = adversarial - x
    return {"linf": jnp.abs(delta).max((1, 2, 3)), "l2": l2_norms(delta)[:, 0, 0, 0]}
