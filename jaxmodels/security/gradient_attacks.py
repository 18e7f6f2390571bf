"""Iterated gradient attacks: one loop whose options are FGSM, BIM, PGD, MI, NI, SI, DI, TI, VMI.

I. Goodfellow et al., arXiv 1412.6572 (FGSM); A. Kurakin et al., 1607.02533 (BIM); A. Madry et al.,
1706.06083 (PGD); Y. Dong et al., 1710.06081 (MI) and 1904.02884 (TI); J. Lin et al., 1908.06281
(NI, SI); C. Xie et al., 1803.06978 (DI); X. Wang, K. He, 2103.15571 (VMI); X. Yang et al.,
2007.04118 (CIM, LGC); A. Athalye et al., 1707.07397 (EOT). Update rules as in torchattacks 3.5.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxmodels.security import perturbations
from jaxmodels.security.input_transforms import Transform, smooth
from jaxmodels.security.perturbations import (
    Loss,
    ascent_step,
    cross_entropy,
    per_image,
    project,
    random_start,
)


@struct.dataclass
class GradientAttack:
    """Options of one attack; numbers and arrays may be traced, the rest is static.

    Attributes:
      eps: radius, in pixel units, a scalar or [B]. step_size: of each step; None is eps / 4 (eps
        itself for a single step).
      mask: [H, W, 1] or [B, H, W, 1] of 0 and 1: where pixels may change.
      steps: how many. norm: `linf` or `l2`. random_start: begin uniformly in the ball.
      targeted: `y` is wanted, the loss is descended.
      loss: `(output, y) -> [B]`.
      low, high: pixel range.
      momentum: None, or mu of g <- mu g + grad / mean |grad| (MI).
      nesterov: take the gradient at x + step mu g (NI).
      scales: average the gradients at x / 2^i, i < scales, the chain factor 2^-i included (SI).
      kernel: [k, k], smooths the gradient before it is normalized (TI).
      transform: `(key, x) -> x` before the network, new at every step (DI, CIM, LGC); with
        `draws` > 1 the gradient is the mean over that many draws (EOT).
      variance_samples, variance_bound: VMI, N neighbors uniform in the ball of
        radius beta eps.
      norm_floor: smallest length that divides an L2 step's gradient; None adds 1e-10 to it, as
        torchattacks does.
    """

    eps: Any = 8 / 255
    step_size: Any = None
    mask: Any = None
    kernel: Any = None
    steps: int = struct.field(pytree_node=False, default=10)
    norm: str = struct.field(pytree_node=False, default="linf")
    random_start: bool = struct.field(pytree_node=False, default=False)
    targeted: bool = struct.field(pytree_node=False, default=False)
    loss: Loss = struct.field(pytree_node=False, default=cross_entropy)
    low: float = struct.field(pytree_node=False, default=0.0)
    high: float = struct.field(pytree_node=False, default=1.0)
    momentum: float | None = struct.field(pytree_node=False, default=None)
    nesterov: bool = struct.field(pytree_node=False, default=False)
    scales: int = struct.field(pytree_node=False, default=1)
    transform: Transform | None = struct.field(pytree_node=False, default=None)
    draws: int = struct.field(pytree_node=False, default=1)
    variance_samples: int = struct.field(pytree_node=False, default=0)
    variance_bound: float = struct.field(pytree_node=False, default=1.5)
    norm_floor: float | None = struct.field(pytree_node=False, default=None)


def gradient_attack(
    key: jax.Array,
    apply_fn: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    y: Any,
    cfg: GradientAttack,
    *,
    start: jax.Array | None = None,
) -> jax.Array:
    """Adversarial images [B, H, W, C] within cfg's ball around x [B, H, W, C].

    Args:
      key: for random starts and transforms; unused otherwise.
      apply_fn: images to whatever `cfg.loss` takes.
      y: labels [B], target labels, or target features: the second argument of the loss.
      start: where to begin instead of x; the ball stays around x.

    Pixels outside a mask are those of x bit for bit.
    """
    perturbations.check_budget("attack", cfg.eps, cfg.steps, cfg.norm)
    perturbations.check_pixels(x, cfg.low, cfg.high, cfg.eps)
    perturbations.check_mask(cfg.mask)
    x = jnp.asarray(x)
    eps = per_image(cfg.eps, x)
    if cfg.step_size is None:
        step = eps if cfg.steps == 1 else eps / 4
    else:
        step = per_image(cfg.step_size, x)
    mu = cfg.momentum or 0.0
    key, first = jax.random.split(key)
    gradient = _gradient_of(apply_fn, y, cfg)

    def bounded(point):
        point = jnp.clip(project(point, x, eps, cfg.norm), cfg.low, cfg.high)
        return point if cfg.mask is None else jnp.where(jnp.asarray(cfg.mask) > 0, point, x)

    begin = x if start is None else start
    if cfg.random_start:
        begin = bounded(random_start(first, begin, eps, cfg.norm, cfg.low, cfg.high))

    def advance(carry, step_key):
        point, history, variance = carry
        ahead = point + step * mu * history if cfg.nesterov else point
        grad_key, neighbor_key = jax.random.split(step_key)
        g = gradient(grad_key, ahead)
        if cfg.variance_samples:
            around = _mean_around(gradient, neighbor_key, point, eps, cfg)
            g, variance = g + variance, around - g
        if cfg.mask is not None:
            # The step's length and the momentum's unit are those of the pixels that may change.
            g = g * cfg.mask
        if cfg.kernel is not None:
            g = smooth(g, cfg.kernel)
        if cfg.momentum is not None:
            mean = jnp.abs(g).mean((1, 2, 3), keepdims=True)
            g = history = mu * history + g / jnp.where(mean > 0, mean, 1)
        point = bounded(point + ascent_step(g, step, cfg.norm, floor=cfg.norm_floor))
        return (point, history, variance), None

    history = jnp.zeros_like(x) if cfg.momentum is not None else None
    variance = jnp.zeros_like(x) if cfg.variance_samples else None
    if cfg.steps == 1:
        (point, _, _), _ = advance((begin, history, variance), key)
    else:
        keys = jax.random.split(key, cfg.steps)
        (point, _, _), _ = lax.scan(advance, (begin, history, variance), keys)
    return point


def _gradient_of(apply_fn, y, cfg: GradientAttack) -> Callable[[jax.Array, jax.Array], jax.Array]:
    sign = -1.0 if cfg.targeted else 1.0
    draws = max(cfg.draws, 1) * cfg.scales

    def one(point, draw_key, factor):
        def total(z):
            z = z * factor if cfg.scales > 1 else z
            z = z if cfg.transform is None else cfg.transform(draw_key, z)
            # The batch's sum: every image's gradient is its own loss's.
            return sign * cfg.loss(apply_fn(z), y).sum()

        return jax.grad(total)(point)

    def gradient(key, point):
        if draws == 1:
            return one(point, key, 1.0)
        keys = jax.random.split(key, draws)
        factors = jnp.tile(0.5 ** jnp.arange(cfg.scales, dtype=point.dtype), max(cfg.draws, 1))
        total, _ = lax.scan(
            lambda acc, draw: (acc + one(point, *draw), None),
            jnp.zeros_like(point),
            (keys, factors),
        )
        return total / draws

    return gradient


def _mean_around(gradient, key, point, eps, cfg: GradientAttack) -> jax.Array:
    """Mean gradient at `variance_samples` points uniform in the ball of bound eps at `point`."""

    def body(acc, k):
        place, draw = jax.random.split(k)
        bound = cfg.variance_bound * eps
        near = random_start(place, point, bound, cfg.norm, -jnp.inf, jnp.inf)
        return acc + gradient(draw, near), None

    keys = jax.random.split(key, cfg.variance_samples)
    total, _ = lax.scan(body, jnp.zeros_like(point), keys)
    return total / cfg.variance_samples
