"""Discrete gradient methods and gradient flow as pure init/update pairs.

Conventions (t counts from 1): heavy ball m <- mu m + g, W <- W - eta m; Nesterov as torch SGD;
GroupRMSprop one scalar v for all parameters with bias correction (Arora et al. 2019); RMSprop
without and Adam with bias correction, eps outside the root.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from theory import decompositions
from theory.factorization import Factors, prefix_products
from theory.landscape import hessian
from theory.problem import Problem

DEFAULTS: dict[str, dict[str, Any]] = {
    "gd": {},
    "momentum": {"mom": 0.9},
    "nesterov": {"mom": 0.9},
    "group_rmsprop": {"beta2": 0.99, "eps": 1e-4},
    "rmsprop": {"beta2": 0.99, "eps": 1e-8},
    "adam": {"b1": 0.9, "beta2": 0.999, "eps": 1e-8},
    "adaptive_gd": {"c": 0.3, "rule": "product", "lr_max": 1.0},
    "gradient_flow": {"rtol": 1e-10, "atol": 1e-14},
}


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A method's name and hyper-parameters; hashable, so it can be a static argument."""

    name: str
    hyper: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, key: str) -> Any:
        return dict(self.hyper)[key]

    def init(self, factors: Factors, lr: Any) -> dict[str, Any]:
        """Fresh slots."""
        zeros = tuple(jnp.zeros_like(factor) for factor in factors)
        zero = jnp.zeros((), factors[0].dtype)
        base = jnp.asarray(lr, factors[0].dtype)
        return {
            "gd": {},
            "momentum": {"m": zeros},
            "nesterov": {"m": zeros},
            "group_rmsprop": {"v": zero, "adjusted_lr": base},
            "rmsprop": {"v": zeros},
            "adam": {"m": zeros, "v": zeros},
            "adaptive_gd": {"adjusted_lr": base},
            "gradient_flow": {"h": base},
        }[self.name]

    def update(
        self,
        problem: Problem,
        lr: Any,
        step: jax.Array,
        factors: Factors,
        grads: Factors,
        slots: dict[str, Any],
    ) -> tuple[Factors, dict[str, Any]]:
        """One update of the factors from their gradient; `step` counts from 0."""
        return _UPDATES[self.name](self, problem, lr, step, factors, grads, slots)


def make_optimizer(name: str, **hyper: Any) -> Optimizer:
    """Optimizer by name with the defaults of `DEFAULTS`; ValueError for unknown names or keys."""
    if name not in DEFAULTS:
        raise ValueError(f"optimizer: unknown {name!r}; choose one of {', '.join(DEFAULTS)}")
    unknown = sorted(set(hyper) - set(DEFAULTS[name]))
    if unknown:
        raise ValueError(
            f"optimizer: {name!r} takes no {unknown[0]!r}; it takes {sorted(DEFAULTS[name])}"
        )
    return Optimizer(name, tuple(sorted({**DEFAULTS[name], **hyper}.items())))


def gradients(
    problem: Problem, factors: Factors, matmul: Callable = jnp.matmul
) -> tuple[jax.Array, jax.Array, Factors]:
    """(loss, product, gradients of W_1..W_L) with 3 (L - 1) matrix products.

    With `theory.lanes.matmul` the factors, the product and the gradients have a last axis [lanes],
    as has the loss.
    """
    products = [factors[0]]
    for factor in factors[1:]:
        products.append(matmul(factor, products[-1]))
    loss, delta = problem.value_and_gradient(products[-1])
    grads = []
    for j in range(len(factors) - 1, 0, -1):
        grads.append(matmul(delta, products[j - 1].swapaxes(0, 1)))
        delta = matmul(factors[j].swapaxes(0, 1), delta)
    grads.append(delta)
    return loss, products[-1], tuple(reversed(grads))


def squared_norm(arrays: Factors) -> jax.Array:
    """sum_j ||g_j||_F^2, a scalar; [lanes] for arrays with a last axis of lanes."""
    return sum(jnp.sum(array * array, axis=(0, 1)) for array in arrays)


def _each(fn: Callable, *trees: Factors) -> Factors:
    return tuple(fn(*leaves) for leaves in zip(*trees))


def _descend(factors: Factors, direction: Factors, lr: Any) -> Factors:
    return _each(lambda w, g: w - lr * g, factors, direction)


def _gd(method, problem, lr, step, factors, grads, slots):
    return _descend(factors, grads, lr), slots


def _momentum(method, problem, lr, step, factors, grads, slots):
    m = _each(lambda m, g: method["mom"] * m + g, slots["m"], grads)
    return _descend(factors, m, lr), {"m": m}


def _nesterov(method, problem, lr, step, factors, grads, slots):
    mom = method["mom"]
    m = _each(lambda m, g: mom * m + g, slots["m"], grads)
    return _descend(factors, _each(lambda g, m: g + mom * m, grads, m), lr), {"m": m}


def _group_rmsprop(method, problem, lr, step, factors, grads, slots):
    b, t = method["beta2"], step.astype(factors[0].dtype) + 1.0
    v = b * slots["v"] + (1.0 - b) * squared_norm(grads)
    rate = lr / (jnp.sqrt(v / (1.0 - b**t)) + method["eps"])
    return _descend(factors, grads, rate), {"v": v, "adjusted_lr": rate}


def _rmsprop(method, problem, lr, step, factors, grads, slots):
    b, eps = method["beta2"], method["eps"]
    v = _each(lambda v, g: b * v + (1.0 - b) * g * g, slots["v"], grads)
    return _each(lambda w, g, v: w - lr * g / (jnp.sqrt(v) + eps), factors, grads, v), {"v": v}


def _adam(method, problem, lr, step, factors, grads, slots):
    b1, b2, eps = method["b1"], method["beta2"], method["eps"]
    t = step.astype(factors[0].dtype) + 1.0
    m = _each(lambda m, g: b1 * m + (1.0 - b1) * g, slots["m"], grads)
    v = _each(lambda v, g: b2 * v + (1.0 - b2) * g * g, slots["v"], grads)
    first, second = 1.0 - b1**t, 1.0 - b2**t
    factors = _each(
        lambda w, m, v: w - lr * (m / first) / (jnp.sqrt(v / second) + eps), factors, m, v
    )
    return factors, {"m": m, "v": v}


def _adaptive_gd(method, problem, lr, step, factors, grads, slots):
    """eta_t = c / (L ||W||_2^(2-2/L)) or c / lambda_max(H_t), at most lr_max (W starts near 0)."""
    depth = len(factors)
    if method["rule"] == "product":
        top = decompositions.spectral_norm(prefix_products(factors)[-1])
        sharpness = depth * top ** (2.0 - 2.0 / depth)
    elif method["rule"] == "hessian":
        sharpness = decompositions.eigvalsh(hessian(problem, factors))[-1]
    else:
        raise ValueError(f"optimizer: rule {method['rule']!r} is not 'product' or 'hessian'")
    tiny = jnp.finfo(factors[0].dtype).tiny
    rate = jnp.minimum(method["c"] / jnp.maximum(sharpness, tiny), method["lr_max"])
    return _descend(factors, grads, rate), {"adjusted_lr": rate}


# Dormand and Prince 1980, order 5 with the embedded order 4.
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def _gradient_flow(method, problem, lr, step, factors, grads, slots):
    """Adaptive Runge-Kutta over one interval of time lr, so that t = eta * step."""

    def slope(point):
        return _each(lambda g: -g, gradients(problem, point)[2])

    def combine(point, weights, slopes, h):
        return tuple(
            w + h * sum(c * k[j] for c, k in zip(weights, slopes) if c != 0.0)
            for j, w in enumerate(point)
        )

    def attempt(carry):
        time, h, point, first, tries = carry
        h = jnp.minimum(h, lr - time)
        slopes = [first]
        for weights in _STAGES:
            moved = combine(point, weights, slopes, h)
            slopes.append(slope(moved))
        zero = _each(jnp.zeros_like, point)
        error = combine(zero, _ERROR, slopes, h)
        size = sum(
            jnp.sum((e / (method["atol"] + method["rtol"] * jnp.maximum(abs(w), abs(m)))) ** 2)
            for e, w, m in zip(error, point, moved)
        )
        size = jnp.sqrt(size / sum(w.size for w in point))
        good = size <= 1.0
        grow = jnp.clip(0.9 * jnp.maximum(size, 1e-10) ** -0.2, 0.2, 5.0)
        pick = lambda new, old: jnp.where(good, new, old)  # noqa: E731
        return (
            pick(time + h, time),
            h * grow,
            _each(pick, moved, point),
            _each(pick, slopes[-1], first),
            tries + 1,
        )

    def unfinished(carry):
        time, h, _, _, tries = carry
        return (time < lr * (1.0 - 1e-14)) & (tries < 100_000) & jnp.isfinite(h)

    lr = jnp.asarray(lr, factors[0].dtype)
    start = (jnp.zeros_like(lr), slots["h"], factors, _each(lambda g: -g, grads), 0)
    _, h, factors, _, _ = jax.lax.while_loop(unfinished, attempt, start)
    return factors, {"h": jnp.maximum(h, lr * 1e-6)}


_UPDATES: dict[str, Callable] = {
    "gd": _gd,
    "momentum": _momentum,
    "nesterov": _nesterov,
    "group_rmsprop": _group_rmsprop,
    "rmsprop": _rmsprop,
    "adam": _adam,
    "adaptive_gd": _adaptive_gd,
    "gradient_flow": _gradient_flow,
}
