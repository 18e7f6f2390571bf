"""APGD, the parameter-free PGD of AutoAttack, with its two losses.

F. Croce, M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", arXiv 2003.01690 (algorithm 1 and section 4).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxmodels.security import perturbations
from jaxmodels.security.perturbations import (
    ascent_step,
    check_labels,
    cross_entropy,
    per_image,
    project,
)

LOSSES = ("ce", "dlr")
_MOMENTUM, _SHARE = 0.75, 0.75


@struct.dataclass
class AutoPGD:
    """APGD within a ball of radius `eps`; `loss` is `ce` or `dlr` (or a function (out, y) -> [B]).

    The step begins at 2 eps and is halved at checkpoints where it made no progress.
    """

    eps: Any = 8 / 255
    mask: Any = None
    steps: int = struct.field(pytree_node=False, default=100)
    norm: str = struct.field(pytree_node=False, default="linf")
    loss: Any = struct.field(pytree_node=False, default="ce")
    targeted: bool = struct.field(pytree_node=False, default=False)
    low: float = struct.field(pytree_node=False, default=0.0)
    high: float = struct.field(pytree_node=False, default=1.0)


def dlr_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-(z_y - max over i != y of z_i) / (z_pi1 - z_pi3) of each row [B]; needs three classes."""
    if logits.shape[-1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, got {logits.shape[-1]}")
    check_labels(labels, logits.shape[-1])
    top = lax.top_k(logits, 3)[0]
    return -perturbations.margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def checkpoints(steps: int) -> tuple[int, ...]:
    """Steps at which the step size is looked at: p0 = 0, p1 = 0.22, then gaps shrinking by 0.03.

    p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06); a checkpoint is ceil(p_j steps).
    """
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    # Rounded first: 0.57 of 100 steps is 57, whatever floats make of the sum.
    return tuple(int(np.ceil(round(p * steps, 6))) for p in shares if p <= 1)


def auto_pgd(
    key: jax.Array,
    apply_fn: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    y: jax.Array,
    cfg: AutoPGD,
) -> jax.Array:
    """For each image the point of highest loss that misleads it, else of highest loss."""
    perturbations.check_budget("APGD", cfg.eps, cfg.steps, cfg.norm)
    perturbations.check_pixels(x, cfg.low, cfg.high, cfg.eps)
    perturbations.check_mask(cfg.mask)
    if isinstance(cfg.loss, str) and cfg.loss not in LOSSES:
        raise ValueError(f"APGD loss {cfg.loss!r}; known: {', '.join(LOSSES)}")
    loss = {"ce": cross_entropy, "dlr": dlr_loss}.get(cfg.loss, cfg.loss)
    sign = -1.0 if cfg.targeted else 1.0
    x = jnp.asarray(x)
    eps = per_image(cfg.eps, x)
    batch = x.shape[0]

    def bounded(point):
        point = jnp.clip(project(point, x, eps, cfg.norm), cfg.low, cfg.high)
        return point if cfg.mask is None else jnp.where(jnp.asarray(cfg.mask) > 0, point, x)

    def total(point):
        out = apply_fn(point)
        value = sign * loss(out, y)
        return value.sum(), (value, (out.argmax(-1) == y) == cfg.targeted)

    def evaluate(point):
        grads, found = jax.grad(total, has_aux=True)(point)
        # Under L2 the step's length is that of the pixels that may change.
        return (grads if cfg.mask is None else grads * cfg.mask), found

    looks = np.asarray(checkpoints(cfg.steps))
    is_look = np.isin(np.arange(1, cfg.steps + 1), looks[1:])
    since = np.zeros(cfg.steps)
    for previous, look in itertools.pairwise(looks):
        since[min(look, cfg.steps) - 1] = look - previous

    begin = bounded(perturbations.random_start(key, x, eps, cfg.norm, cfg.low, cfg.high))
    grads, (value, won) = evaluate(begin)
    wide = lambda v: v[:, None, None, None]  # noqa: E731
    state = {
        "point": begin,
        "before": begin,
        "grads": grads,
        "value": value,
        "best": begin,
        "best_grads": grads,
        "best_value": value,
        "fooling": begin,
        "fooled": won,
        "step": jnp.broadcast_to(jnp.asarray(2 * eps), (batch, 1, 1, 1)),
        "improved": jnp.zeros(batch),
        "halved": jnp.zeros(batch, bool),
        "best_at_look": value,
    }

    def advance(s, at):
        index, look, gap = at
        move = s["point"] + ascent_step(s["grads"], s["step"], cfg.norm, 1e-12)
        z = bounded(move)
        alpha = jnp.where(index == 0, 1.0, _MOMENTUM)
        point = bounded(
            s["point"] + alpha * (z - s["point"]) + (1 - alpha) * (s["point"] - s["before"])
        )
        grads, (value, won) = evaluate(point)
        improved = s["improved"] + (value > s["value"])
        new_best = value > s["best_value"]
        best = jnp.where(wide(new_best), point, s["best"])
        best_grads = jnp.where(wide(new_best), grads, s["best_grads"])
        best_value = jnp.maximum(value, s["best_value"])
        fooling = jnp.where(wide(won), point, s["fooling"])
        stuck = improved < _SHARE * gap
        stale = ~s["halved"] & (s["best_at_look"] >= best_value)
        halve = look & (stuck | stale)
        return {
            # Where the step is halved the search goes on from the best point so far.
            "point": jnp.where(wide(halve), best, point),
            "before": jnp.where(wide(halve), best, s["point"]),
            "grads": jnp.where(wide(halve), best_grads, grads),
            "value": jnp.where(halve, best_value, value),
            "best": best,
            "best_grads": best_grads,
            "best_value": best_value,
            "fooling": fooling,
            "fooled": s["fooled"] | won,
            "step": jnp.where(wide(halve), s["step"] / 2, s["step"]),
            "improved": jnp.where(look, 0.0, improved),
            "halved": jnp.where(look, halve, s["halved"]),
            "best_at_look": jnp.where(look, best_value, s["best_at_look"]),
        }, None

    at = (jnp.arange(cfg.steps), jnp.asarray(is_look), jnp.asarray(since))
    state, _ = lax.scan(advance, state, at)
    return jnp.where(wide(state["fooled"]), state["fooling"], state["best"])
