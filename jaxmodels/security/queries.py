"""What attacks that only ask the model share: results with counted questions, success, targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxmodels.security.perturbations import margin

Decision = Callable[[jax.Array, Any], jax.Array]


class QueryResult(NamedTuple):
    """`images` [B, H, W, C]; `queries` int32 [B] spent until success or to the end; `success`."""

    images: jax.Array
    queries: jax.Array
    success: jax.Array


def misclassified(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether argmax differs from the label [B]."""
    return outputs.argmax(-1) != labels


def reached(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Whether argmax is the target [B]."""
    return outputs.argmax(-1) == targets


def negative_margin(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """max over j != y of z_j - z_y, [B]."""
    return -margin(outputs, labels)


def success_of(cfg: Any) -> Decision:
    """The configuration's `succeeded`; of a targeted one `reached` in place of `misclassified`."""
    return reached if cfg.targeted and cfg.succeeded is misclassified else cfg.succeeded


def towards(cfg: Any) -> tuple[Callable, Decision]:
    """(loss to raise, decision) of a configuration: a targeted attack lowers its loss."""
    loss = (lambda out, y: -cfg.loss(out, y)) if cfg.targeted else cfg.loss
    return loss, success_of(cfg)
