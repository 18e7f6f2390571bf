"""Attacks that only ask the model for answers, with every answer counted.

A. Ilyas et al., "Black-box Adversarial Attacks with Limited Queries and Information" (NES), arXiv
1804.08598; Y. Dong et al., "Efficient Decision-based Black-box Adversarial Attacks on Face
Recognition" (Evolutionary), arXiv 1904.04433, constants as in
ShawnXYang/Face-Robustness-Benchmark@89f8ad7 (`RobFR/attack/Evolutionary.py`). No gradient of the
model is ever taken. Square Attack is in `square_attack`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxmodels.security import perturbations
from jaxmodels.security.perturbations import ascent_step, l2_norms, per_image, project
from jaxmodels.security.queries import (
    Decision,
    QueryResult,
    misclassified,
    negative_margin,
    success_of,
    towards,
)


@struct.dataclass
class NES:
    """PGD on gradients estimated from antithetic Gaussian samples.

    Attributes:
      eps, step_size: as in `GradientAttack`; None is eps / 4. steps: at most.
      samples: questions per gradient, even. sigma: of the search distribution, in pixel units.
      norm: `linf` or `l2`. momentum: 0 or mu. targeted, loss, succeeded: as in `Square`.
    """

    eps: Any = 8 / 255
    step_size: Any = None
    mask: Any = None
    steps: int = struct.field(pytree_node=False, default=50)
    samples: int = struct.field(pytree_node=False, default=50)
    sigma: float = struct.field(pytree_node=False, default=1e-3)
    norm: str = struct.field(pytree_node=False, default="linf")
    momentum: float = struct.field(pytree_node=False, default=0.0)
    targeted: bool = struct.field(pytree_node=False, default=False)
    loss: Callable = struct.field(pytree_node=False, default=negative_margin)
    succeeded: Decision = struct.field(pytree_node=False, default=misclassified)
    low: float = struct.field(pytree_node=False, default=0.0)
    high: float = struct.field(pytree_node=False, default=1.0)


def nes_attack(key: jax.Array, apply_fn: Callable, x: jax.Array, y: Any, cfg: NES) -> QueryResult:
    """Images within the ball around x, and how many questions each cost (one checks each step)."""
    perturbations.check_budget("NES", cfg.eps, cfg.steps, cfg.norm)
    perturbations.check_pixels(x, cfg.low, cfg.high, cfg.eps)
    perturbations.check_mask(cfg.mask)
    if cfg.samples < 2 or cfg.samples % 2:
        raise ValueError(f"NES: samples must be even and at least 2, got {cfg.samples}")
    x = jnp.asarray(x)
    eps = per_image(cfg.eps, x)
    step = eps / 4 if cfg.step_size is None else per_image(cfg.step_size, x)
    loss, succeeded = towards(cfg)

    def estimate(key, point):
        def pair(total, k):
            u = jax.random.normal(k, x.shape, x.dtype)
            up = loss(apply_fn(point + cfg.sigma * u), y)
            down = loss(apply_fn(point - cfg.sigma * u), y)
            return total + (up - down)[:, None, None, None] * u, None

        keys = jax.random.split(key, cfg.samples // 2)
        total, _ = lax.scan(pair, jnp.zeros_like(x), keys)
        total = total if cfg.mask is None else total * cfg.mask
        return total / (cfg.samples * cfg.sigma)

    def advance(carry, step_key):
        point, history, done, queries = carry
        g = history = cfg.momentum * history + estimate(step_key, point)
        moved = project(point + ascent_step(g, step, cfg.norm), x, eps, cfg.norm)
        moved = jnp.clip(moved, cfg.low, cfg.high)
        if cfg.mask is not None:
            moved = jnp.where(jnp.asarray(cfg.mask) > 0, moved, x)
        point = jnp.where(done[:, None, None, None], point, moved)
        queries = queries + jnp.where(done, 0, cfg.samples + 1)
        return (point, history, done | succeeded(apply_fn(point), y), queries), None

    done = succeeded(apply_fn(x), y)
    carry = (x, jnp.zeros_like(x), done, jnp.ones(x.shape[0], jnp.int32))
    (point, _, done, queries), _ = lax.scan(advance, carry, jax.random.split(key, cfg.steps))
    return QueryResult(point, queries, done)


@struct.dataclass
class Evolutionary:
    """Decision-based walk along the boundary towards x, (1+1)-CMA with a diagonal covariance.

    Attributes:
      queries: of the walk, at most. start: images that are adversarial already (the victim's photo
        for impersonation); None draws noise until it is, then bisects towards x.
      mask: [H, W, 1] or [B, H, W, 1] of 0 and 1: where pixels may change, `start`'s too.
      targeted, succeeded: as in `Square`; noise rarely hits a target, so give `start`.
      side: of the coarse grid that perturbations live on.
      mu, sigma, rate, decay: the published constants (0.01, 0.03, 0.001, 0.99).
    """

    start: Any = None
    mask: Any = None
    queries: int = struct.field(pytree_node=False, default=1000)
    targeted: bool = struct.field(pytree_node=False, default=False)
    succeeded: Decision = struct.field(pytree_node=False, default=misclassified)
    side: int = struct.field(pytree_node=False, default=32)
    mu: float = struct.field(pytree_node=False, default=0.01)
    sigma: float = struct.field(pytree_node=False, default=0.03)
    rate: float = struct.field(pytree_node=False, default=0.001)
    decay: float = struct.field(pytree_node=False, default=0.99)
    low: float = struct.field(pytree_node=False, default=0.0)
    high: float = struct.field(pytree_node=False, default=1.0)


_START_TRIES, _BISECTIONS, _SUCCESS_WINDOW = 20, 10, 30


def evolutionary_attack(
    key: jax.Array, apply_fn: Callable, x: jax.Array, y: Any, cfg: Evolutionary
) -> QueryResult:
    """The adversarial images nearest to x in L2 that the walk met; x where none was found."""
    perturbations.check_budget("Evolutionary", None, cfg.queries)
    perturbations.check_pixels(x, cfg.low, cfg.high)
    perturbations.check_mask(cfg.mask)
    x = jnp.asarray(x)
    batch, channels = x.shape[0], x.shape[-1]
    wide = lambda v: v[:, None, None, None]  # noqa: E731

    succeeded = success_of(cfg)

    def adversarial(point):
        return succeeded(apply_fn(point), y)

    def masked(point):
        return point if cfg.mask is None else jnp.where(jnp.asarray(cfg.mask) > 0, point, x)

    key, start_key = jax.random.split(key)
    queries = jnp.zeros(batch, jnp.int32)
    if cfg.start is None:
        point, found, queries = _noise_start(start_key, adversarial, masked, x, cfg, queries)
    else:
        point = masked(jnp.asarray(cfg.start, x.dtype))
        found, queries = adversarial(point), queries + 1

    grid = (batch, cfg.side, cfg.side, channels)
    cells = cfg.side * cfg.side * channels
    chosen = max(cells // 20, 1)

    def advance(carry, step_key):
        point, best, smallest, path, covariance, mu, wins, count, queries = carry
        noise_key, choice_key = jax.random.split(step_key)
        back = x - point
        distance = l2_norms(back)
        better = found & (distance[:, 0, 0, 0] < smallest)
        best = jnp.where(wide(better), point, best)
        smallest = jnp.where(better, distance[:, 0, 0, 0], smallest)
        # Sampling without replacement in proportion to the covariance: Gumbel top-k.
        gumbel = jax.random.gumbel(choice_key, (batch, cells))
        scores = jnp.log(covariance.reshape(batch, cells)) + gumbel
        least = lax.top_k(scores, chosen)[0][:, -1:]
        drawn = (scores >= least).reshape(grid)
        noise = jax.random.normal(noise_key, grid, x.dtype) * drawn * jnp.sqrt(covariance)
        large = jax.image.resize(noise, x.shape, "bilinear")
        large = large if cfg.mask is None else large * cfg.mask
        biased = point + wide(mu) * back
        tried = biased + cfg.sigma * distance * large / jnp.maximum(l2_norms(large), 1e-12)
        away = x - tried
        tried = x - away / jnp.maximum(l2_norms(away), 1e-12) * l2_norms(x - biased)
        tried = masked(jnp.clip(tried, cfg.low, cfg.high))
        won = adversarial(tried) & found
        point = jnp.where(wide(won), tried, point)
        new_path = cfg.decay * path + jnp.sqrt(1 - cfg.decay**2) * noise
        path = jnp.where(wide(won), new_path, path)
        new_covariance = (1 - cfg.rate) * covariance + cfg.rate * jnp.square(path)
        covariance = jnp.where(wide(won), new_covariance, covariance)
        wins, count = wins + won, count + 1
        full = count == _SUCCESS_WINDOW
        mu = jnp.where(full, mu * jnp.exp(wins / _SUCCESS_WINDOW - 0.2), mu)
        wins, count = jnp.where(full, 0, wins), jnp.where(full, 0, count)
        return (point, best, smallest, path, covariance, mu, wins, count, queries + found), None

    carry = (
        point,
        x,
        jnp.full(batch, jnp.inf, x.dtype),
        jnp.zeros(grid, x.dtype),
        jnp.ones(grid, x.dtype),
        jnp.full(batch, cfg.mu, x.dtype),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((), jnp.int32),
        queries,
    )
    carry, _ = lax.scan(advance, carry, jax.random.split(key, cfg.queries))
    point, best, smallest, *_, queries = carry
    last = found & (l2_norms(x - point)[:, 0, 0, 0] < smallest)
    return QueryResult(jnp.where(wide(last), point, best), queries, found)


def _noise_start(key, adversarial, masked, x, cfg: Evolutionary, queries):
    """Uniform noise that is adversarial, moved towards x by bisection; tries are counted."""
    wide = lambda v: v[:, None, None, None]  # noqa: E731

    def draw(carry, k):
        point, found, queries = carry
        noise = masked(jax.random.uniform(k, x.shape, x.dtype, cfg.low, cfg.high))
        point = jnp.where(wide(found), point, noise)
        return (point, found | adversarial(point), queries + ~found), None

    carry = (x, jnp.zeros(x.shape[0], bool), queries)
    (end, found, queries), _ = lax.scan(draw, carry, jax.random.split(key, _START_TRIES))

    def halve(carry, _):
        start, end, queries = carry
        middle = (start + end) / 2
        hit = adversarial(middle) & found
        start = jnp.where(wide(hit), start, middle)
        return (start, jnp.where(wide(hit), middle, end), queries + found), None

    (_, end, queries), _ = lax.scan(halve, (x, end, queries), length=_BISECTIONS)
    return end, found, queries
