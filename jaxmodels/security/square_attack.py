"""Square Attack in both norms: random windows, kept where they raise the loss; only questions.

M. Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random
search", arXiv 1912.00049 (algorithms 1 to 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxmodels.security import perturbations
from jaxmodels.security.perturbations import l2_norms, per_image
from jaxmodels.security.queries import (
    Decision,
    QueryResult,
    misclassified,
    negative_margin,
    towards,
)


@struct.dataclass
class Square:
    """Random squares of +-eps (`linf`) or random pairs of bumps that share the budget (`l2`).

    Attributes:
      eps: radius. queries: at most, the first one for the start of stripes or tiles.
      share: of the image's pixels that the first squares cover; it falls as the paper's schedule.
      norm: `linf` or `l2`. targeted: `y` is wanted; the loss is lowered, and `misclassified`
        becomes argmax == y.
      loss: `(output, y) -> [B]`, raised (by default minus the margin). succeeded: `(output, y) ->
        [B]`; an image that is done asks no more.
    """

    eps: Any = 8 / 255
    mask: Any = None
    queries: int = struct.field(pytree_node=False, default=1000)
    share: float = struct.field(pytree_node=False, default=0.8)
    norm: str = struct.field(pytree_node=False, default="linf")
    targeted: bool = struct.field(pytree_node=False, default=False)
    loss: Callable = struct.field(pytree_node=False, default=negative_margin)
    succeeded: Decision = struct.field(pytree_node=False, default=misclassified)
    low: float = struct.field(pytree_node=False, default=0.0)
    high: float = struct.field(pytree_node=False, default=1.0)


# Queries (of 10000) after which the squares' share of the image is halved once more.
_SCHEDULE = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_TILES, _SMALLEST = 5, 3  # tiles along the shorter side of the L2 start; least side of a window


def square_attack(
    key: jax.Array, apply_fn: Callable, x: jax.Array, y: Any, cfg: Square
) -> QueryResult:
    """Images within the ball around x, and how many questions each cost."""
    perturbations.check_budget("Square", cfg.eps, cfg.queries, cfg.norm)
    perturbations.check_pixels(x, cfg.low, cfg.high, cfg.eps)
    perturbations.check_mask(cfg.mask)
    x = jnp.asarray(x)
    batch, height, width, _ = x.shape
    if cfg.norm == "l2" and min(height, width) < _SMALLEST:
        raise ValueError(f"Square: L2 needs images of 3x3 pixels, got {height}x{width}")
    eps = per_image(cfg.eps, x)
    loss, succeeded = towards(cfg)
    start, propose = _MOVES[cfg.norm]

    def ask(point):
        out = apply_fn(point)
        return loss(out, y), succeeded(out, y)

    key, first = jax.random.split(key)
    point = start(first, x, eps, cfg)
    value, done = ask(point)
    queries = jnp.ones(batch, jnp.int32)

    def advance(carry, at):
        point, value, done, queries = carry
        index, step_key = at
        progress = index * 10000 / cfg.queries
        halvings = (progress > jnp.asarray(_SCHEDULE)).sum()
        side = jnp.sqrt(cfg.share * 0.5**halvings * height * width)
        tried = propose(step_key, point, x, eps, side, cfg)
        new_value, new_done = ask(tried)
        # An image that is done asks no more.
        better = ~done & ((new_value > value) | new_done)
        point = jnp.where(better[:, None, None, None], tried, point)
        queries = queries + ~done
        return (point, jnp.where(better, new_value, value), done | new_done, queries), None

    count = cfg.queries - 1
    at = (jnp.arange(1, count + 1), jax.random.split(key, max(count, 1))[:count])
    (point, _, done, queries), _ = lax.scan(advance, (point, value, done, queries), at)
    return QueryResult(point, queries, done)


# L-infinity


def _in_box(point, x, eps, cfg: Square) -> jax.Array:
    point = jnp.clip(point, jnp.maximum(x - eps, cfg.low), jnp.minimum(x + eps, cfg.high))
    return point if cfg.mask is None else jnp.where(jnp.asarray(cfg.mask) > 0, point, x)


def _stripes(key, x, eps, cfg: Square) -> jax.Array:
    batch, _, width, channels = x.shape
    signs = jax.random.rademacher(key, (batch, 1, width, channels), x.dtype)
    return _in_box(x + eps * signs, x, eps, cfg)


def _square(key, point, x, eps, side, cfg: Square) -> jax.Array:
    """Another +-eps a channel in one random square of each image."""
    batch, height, width, channels = x.shape
    place, sign_key = jax.random.split(key)
    side = jnp.clip(jnp.round(side), 1, min(height, width) - 1).astype(jnp.int32)
    rows, columns = _window(place, x, side)
    inside = _inside(rows, columns, side)
    signs = jax.random.rademacher(sign_key, (batch, 1, 1, channels), x.dtype)
    return jnp.where(inside[..., None], _in_box(x + eps * signs, x, eps, cfg), point)


def _window(key, x, side) -> tuple[jax.Array, jax.Array]:
    """Every pixel's row and column [B, H, W] in a random window of each image."""
    down, right = jax.random.split(key)
    batch, height, width, _ = x.shape
    top = jax.random.randint(down, (batch, 1, 1), 0, height - side + 1)
    left = jax.random.randint(right, (batch, 1, 1), 0, width - side + 1)
    rows, columns = jnp.arange(height)[None, :, None] - top, jnp.arange(width)[None, None] - left
    return jnp.broadcast_arrays(rows, columns)


def _inside(rows, columns, side) -> jax.Array:
    return (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)


# L2


def _on_sphere(delta, x, eps, cfg: Square) -> jax.Array:
    """x moved by eps along delta, in the pixel range."""
    if cfg.mask is not None:
        delta = delta * cfg.mask
    point = jnp.clip(x + eps * delta / jnp.maximum(l2_norms(delta), 1e-12), cfg.low, cfg.high)
    return point if cfg.mask is None else jnp.where(jnp.asarray(cfg.mask) > 0, point, x)


def _bump(rows, columns, height, width, largest: int) -> jax.Array:
    """Sum of 1 / (k + 1)^2 over the squares of radius k about the middle that hold the pixel."""
    sums = jnp.asarray(np.r_[0, np.cumsum(1 / np.arange(1, largest + 2) ** 2)], jnp.float32)
    distance = jnp.maximum(jnp.abs(rows - height // 2), jnp.abs(columns - width // 2))
    return sums[jnp.maximum(height, width) // 2 + 1] - sums[jnp.clip(distance, 0, largest)]


def _pair(rows, columns, side, turned) -> jax.Array:
    """Unit [B, H, W]: a bump over a minus bump, or beside it where `turned`, zero elsewhere."""
    inside, largest = _inside(rows, columns, side), max(rows.shape[-2:])
    rows, columns = jnp.where(turned, columns, rows), jnp.where(turned, rows, columns)
    half = side // 2
    upper = rows < half
    parts = (
        jnp.where(inside & upper, _bump(rows, columns, half, side, largest), 0),
        jnp.where(inside & ~upper, _bump(rows - half, columns, side - half, side, largest), 0),
    )
    lengths = [jnp.sqrt(jnp.square(p).sum((-2, -1), keepdims=True)) for p in parts]
    plus, minus = (p / jnp.maximum(n, 1e-12) for p, n in zip(parts, lengths))
    return (plus - minus) / np.sqrt(2)


def _tiles(key, x, eps, cfg: Square) -> jax.Array:
    """The image covered with pairs of bumps, a random sign a channel and tile."""
    batch, height, width, channels = x.shape
    side = max(min(height, width) // _TILES, _SMALLEST)
    down, right = height // side, width // side
    rows = jnp.arange(height) - (height - side * down) // 2
    columns = jnp.arange(width) - (width - side * right) // 2
    covered = ((rows >= 0) & (rows < side * down))[:, None] & (
        (columns >= 0) & (columns < side * right)
    )
    sign_key, turn_key = jax.random.split(key)
    signs = jax.random.rademacher(sign_key, (batch, down, right, channels), x.dtype)
    tile_rows = jnp.clip(rows // side, 0, down - 1)
    tile_columns = jnp.clip(columns // side, 0, right - 1)
    turned = jax.random.bernoulli(turn_key, 0.5, (batch, 1, 1))
    inner = jnp.broadcast_arrays((rows % side)[None, :, None], (columns % side)[None, None])
    pair = jnp.where(covered, _pair(*inner, side, turned), 0)
    delta = pair[..., None] * signs[:, tile_rows][:, :, tile_columns]
    return _on_sphere(delta, x, eps, cfg)


def _two_windows(key, point, x, eps, side, cfg: Square) -> jax.Array:
    """One window's perturbation is removed; its budget, and what is unused, goes to another."""
    batch, height, width, channels = x.shape
    first, second, sign_key, turn_key = jax.random.split(key, 4)
    side = jnp.clip(jnp.round(side), _SMALLEST, min(height, width)).astype(jnp.int32)
    side = jnp.where(side % 2 == 0, side - 1, side)
    rows, columns = _window(first, x, side)
    here = _inside(rows, columns, side)[..., None]
    there = _inside(*_window(second, x, side), side)[..., None]
    delta = point - x
    length = lambda v: jnp.sqrt(jnp.square(v).sum((1, 2), keepdims=True))  # noqa: E731
    signs = jax.random.rademacher(sign_key, (batch, 1, 1, channels), x.dtype)
    turned = jax.random.bernoulli(turn_key, 0.5, (batch, 1, 1))
    own = jnp.where(here, delta, 0)
    new = _pair(rows, columns, side, turned)[..., None] * signs + own / (length(own) + 1e-10)
    unused = jnp.maximum(eps**2 - jnp.square(l2_norms(delta)), 0) / channels
    budget = jnp.sqrt(unused + jnp.square(length(jnp.where(here | there, delta, 0))))
    new = new / jnp.maximum(length(new), 1e-12) * budget
    return _on_sphere(jnp.where(here, new, jnp.where(there, 0, delta)), x, eps, cfg)


_MOVES = {"linf": (_stripes, _square), "l2": (_tiles, _two_windows)}
