"""Latent evolution of a dynamic graph: non-negative factors of a window and how they move on.

After Y. Gong, X. Dong, J. Zhang, M. Chen, "Latent Evolution Model for Change Point Detection in
Time-varying Networks", arXiv 2212.08818, Information Sciences 2023. No code is public and the body
of the paper could not be obtained: objective and updates here are a reconstruction after the same
kind of model, D. Deng et al., "Latent Space Model for Road Networks to Predict Time-Varying
Traffic", KDD 2016, arXiv 1602.04301. They do what the abstract says; they are not the authors'.

A window of w snapshots G_s [n, n] (s = 1..w) is explained by states U_s [n, k], one interaction
B [k, k] and one evolution A [k, k], all non-negative:

    J = sum_s |Y_s o (G_s - U_s B U_s^T)|^2 + lam sum_s tr(U_s^T (D - W) U_s)
        + gamma sum_{s>=2} |U_s - U_{s-1} A|^2

with observation masks Y_s (0/1), a symmetric affinity W and its degrees D. Axis names below: w
window, n nodes, k rank, e padded edges.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

EPS = 1e-10  # added to every denominator
ORDERS = ("gauss_seidel", "jacobi")
# U enters the fit as a quartic: the fourth root is what keeps J from rising.
EXPONENT = 0.25

_HIGHEST = jax.lax.Precision.HIGHEST


class Factors(NamedTuple):
    """Latent states U [w, n, k], interaction B [k, k], evolution A [k, k]; all positive."""

    U: jax.Array
    B: jax.Array
    A: jax.Array


class EdgeWindow(NamedTuple):
    """A window as padded edge lists: `senders`, `receivers` int32 [w, e], `weights` [w, e].

    Padding has weight 0 and any node number. A repeated edge counts with the sum of its weights.
    """

    senders: jax.Array
    receivers: jax.Array
    weights: jax.Array


class Fit(NamedTuple):
    """A fitted window.

    Attributes:
      factors: the factors after the last sweep.
      objective: [iters + 1] J before the first sweep and after each; the last value is repeated
        after an early stop.
      sweeps: [] int32, sweeps made.
    """

    factors: Factors
    objective: jax.Array
    sweeps: jax.Array


class _Products(NamedTuple):
    """G_s U_s and G_s^T U_s [w, n, k]: what a sweep leaves for the next one."""

    forward: jax.Array
    backward: jax.Array


def _dot(a, b):
    return jnp.matmul(a, b, precision=_HIGHEST)


def _t(a):
    return jnp.swapaxes(a, -1, -2)


def _times(graph, u, directed: bool) -> tuple[jax.Array, jax.Array]:
    """`G u` and `G^T u` for one snapshot, dense [n, n] or an edge list [e]."""
    if isinstance(graph, EdgeWindow):
        senders, receivers, weights = graph.senders, graph.receivers, graph.weights[:, None]
        size = u.shape[0]
        forward = jax.ops.segment_sum(weights * u[receivers], senders, size)
        backward = jax.ops.segment_sum(weights * u[senders], receivers, size)
        return forward, backward
    forward = _dot(graph, u)
    return forward, _dot(graph.T, u) if directed else forward


def _products(window, u, directed: bool) -> _Products:
    return _Products(*jax.vmap(functools.partial(_times, directed=directed))(window, u))


def _model_products(u, b, mask):
    """`P u B^T + P^T u B` for P = Y o (u B u^T); without a mask no n x n matrix is formed."""
    if mask is None:
        gram = _dot(u.T, u)
        return _dot(u, _dot(_dot(b, gram), b.T) + _dot(_dot(b.T, gram), b))
    p = mask * _dot(_dot(u, b), u.T)
    return _dot(_dot(p, u), b.T) + _dot(_dot(p.T, u), b)


def _smooth(affinity, u):
    """`W u` and `D u`."""
    return _dot(affinity, u), affinity.sum(-1, keepdims=True) * u


def _update_state(previous, inputs, *, b, a, affinity, lam, gamma, eps):
    """New U_s from U_{s-1}, U_s, U_{s+1}; `first` and `last` switch the evolution's terms off."""
    u, following, forward, backward, mask, first, last = inputs
    num = _dot(forward, b.T) + _dot(backward, b)
    den = _model_products(u, b, mask)
    if affinity is not None:
        pull, push = _smooth(affinity, u)
        num, den = num + lam * pull, den + lam * push
    has_past, has_future = 1.0 - first, 1.0 - last
    num = num + gamma * (has_past * _dot(previous, a) + has_future * _dot(following, a.T))
    den = den + gamma * (has_past * u + has_future * _dot(u, _dot(a, a.T)))
    return u * (num / (den + eps)) ** EXPONENT


def _sweep(window, mask, affinity, factors, products, *, lam, gamma, eps, order, directed):
    u, b, a = factors
    length = u.shape[0]
    place = jnp.arange(length)
    following = jnp.concatenate([u[1:], u[-1:]])
    inputs = (
        u,
        following,
        products.forward,
        products.backward,
        mask,
        (place == 0).astype(u.dtype),
        (place == length - 1).astype(u.dtype),
    )
    update = functools.partial(
        _update_state, b=b, a=a, affinity=affinity, lam=lam, gamma=gamma, eps=eps
    )
    if order == "jacobi":
        u = jax.vmap(update)(jnp.concatenate([u[:1], u[:-1]]), inputs)
    else:

        def one(previous, inputs):
            new = update(previous, inputs)
            return new, new

        _, u = jax.lax.scan(one, u[0], inputs)
    products = _products(window, u, directed)
    grams = _dot(_t(u), u)
    seen = _dot(_t(u), products.forward).sum(0)
    if mask is None:
        explained = _dot(_dot(grams, b), grams).sum(0)
    else:
        explained = jax.vmap(lambda u, y: _dot(u.T, _dot(y * _dot(_dot(u, b), u.T), u)))(u, mask)
        explained = explained.sum(0)
    b = b * seen / (explained + eps)
    moved = _dot(_t(u[:-1]), u[1:]).sum(0)
    a = a * moved / (_dot(grams[:-1].sum(0), a) + eps)
    return Factors(u, b, a), products


def _objective(window, mask, affinity, factors, products, *, lam, gamma, exact):
    u, b, a = factors
    if isinstance(window, EdgeWindow) or (mask is None and not exact):
        grams = _dot(_t(u), u)
        squares = _squares(window)
        cross = (_dot(u, b) * products.forward).sum()
        fit = squares - 2.0 * cross + (_dot(b, grams) * _dot(grams, b)).sum()
    else:
        residual = window - _dot(_dot(u, b), _t(u))
        fit = jnp.sum((residual if mask is None else mask * residual) ** 2)
    if affinity is not None:
        pull, push = _smooth(affinity, u)
        fit = fit + lam * (u * (push - pull)).sum()
    return fit + gamma * jnp.sum((u[1:] - _dot(u[:-1], a)) ** 2)


def _squares(window):
    return jnp.sum((window.weights if isinstance(window, EdgeWindow) else window) ** 2)


def _prepare(window, mask, affinity, lam, dtype):
    """Cast to the factors' dtype, hide unobserved entries, drop what lam = 0 switches off."""
    if isinstance(window, EdgeWindow):
        if mask is not None:
            raise ValueError("a mask needs a dense window; it does not go with an EdgeWindow")
        window = window._replace(weights=jnp.asarray(window.weights).astype(dtype))
        if lam and affinity is None:
            raise ValueError(
                "lam > 0 on an EdgeWindow needs its affinity W [n, n] given: a sparse window does "
                "not form it"
            )
    else:
        window = jnp.asarray(window).astype(dtype)
        if mask is not None:
            mask = jnp.asarray(mask).astype(dtype)
            window = window * mask
    if not lam:
        return window, mask, None
    if affinity is None:
        if mask is not None:
            raise ValueError("lam > 0 with a mask needs its affinity W [n, n] given")
        affinity = default_affinity(window)
    return window, mask, jnp.asarray(affinity).astype(dtype)


def default_affinity(window) -> jax.Array:
    """W [n, n]: the mean of a dense window [w, n, n], symmetrized."""
    mean = jnp.asarray(window).mean(0)
    return 0.5 * (mean + mean.T)


def _check_concrete(window, factors, mask, affinity, lam, gamma, directed) -> None:
    """The host-side checks, outside of a transformation; what is traced cannot be looked at."""
    given = (window, factors, mask, affinity)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(given)):
        return
    check_factors(factors)
    u = np.asarray(factors.U)
    if isinstance(window, EdgeWindow):
        weights = np.asarray(window.weights)
        bad = ~(np.isfinite(weights) & (weights >= 0))
        if bad.any():
            s, e = (int(x) for x in np.argwhere(bad)[0])
            raise ValueError(
                f"snapshot {s} has weight {weights[s, e]} at edge {e}: weights must be finite and "
                ">= 0"
            )
    else:
        shape = check_window(window, mask, affinity, lam=lam, directed=directed).shape
        if shape != (len(u), u.shape[1], u.shape[1]):
            raise ValueError(
                f"U has shape {u.shape}, the window {shape}; wanted [w, n, k], [w, n, n]"
            )
    check_hyperparameters(rank=u.shape[2], num_nodes=u.shape[1], gamma=gamma, lam=lam)


def objective(
    window, factors: Factors, *, mask=None, affinity=None, lam: float = 0.0, gamma: float = 1.0
) -> jax.Array:
    """J [] of a window [w, n, n] (or `EdgeWindow`) under `factors`; see the head of this file."""
    window, mask, affinity = _prepare(window, mask, affinity, lam, factors.U.dtype)
    products = _products(window, factors.U, directed=True)
    return _objective(window, mask, affinity, factors, products, lam=lam, gamma=gamma, exact=True)


def sweep(
    window,
    factors: Factors,
    *,
    mask=None,
    affinity=None,
    lam: float = 0.0,
    gamma: float = 1.0,
    eps: float = EPS,
    order: str = "gauss_seidel",
    directed: bool = True,
) -> Factors:
    """One sweep of multiplicative updates: U_1..U_w, then B, then A.

        U_s <- U_s o (num / (den + eps))^(1/4)
        B   <- B o sum_s U_s^T (Y_s o G_s) U_s / (sum_s U_s^T (Y_s o U_s B U_s^T) U_s + eps)
        A   <- A o sum_{s>=2} U_{s-1}^T U_s / ((sum_{s>=2} U_{s-1}^T U_{s-1}) A + eps)

    where num and den are the negative and positive parts of J's gradient by U_s. J does not rise
    in the Gauss-Seidel order, in which U_s sees the new U_{s-1}; `order="jacobi"` updates all U_s
    at once, without that promise. Zeros stay zero.

    Args:
      window: G [w, n, n], non-negative, or an `EdgeWindow`.
      factors: where to start.
      mask: Y [w, n, n] of 0 and 1, or None. affinity: W [n, n] for lam > 0, default
        `default_affinity`.
      directed: False promises symmetric snapshots and saves the product with their transpose.

    Raises ValueError for bad weights, masks, affinities or factors where they are not traced.
    """
    _check_order(order)
    _check_concrete(window, factors, mask, affinity, lam, gamma, directed)
    window, mask, affinity = _prepare(window, mask, affinity, lam, factors.U.dtype)
    products = _products(window, factors.U, directed)
    new, _ = _sweep(
        window, mask, affinity, factors, products,
        lam=lam, gamma=gamma, eps=eps, order=order, directed=directed,
    )  # fmt: skip
    return new


def fit(
    window,
    factors: Factors,
    *,
    iters: int = 50,
    tol: float = 1e-5,
    mask=None,
    affinity=None,
    lam: float = 0.0,
    gamma: float = 1.0,
    eps: float = EPS,
    order: str = "gauss_seidel",
    directed: bool = True,
    exact: bool = True,
) -> Fit:
    """Sweeps until `iters` are made or J's relative decrease is below `tol` (0: never stop early).

    Args: as `sweep`, and
      exact: J from the n x n residuals; False takes J by inner products of size k (no n x n
        product, some digits fewer), which is what sparse windows always do.
    """
    _check_order(order)
    _check_concrete(window, factors, mask, affinity, lam, gamma, directed)
    window, mask, affinity = _prepare(window, mask, affinity, lam, factors.U.dtype)
    value = functools.partial(_objective, window, mask, affinity, lam=lam, gamma=gamma, exact=exact)
    step = functools.partial(
        _sweep, window, mask, affinity,
        lam=lam, gamma=gamma, eps=eps, order=order, directed=directed,
    )  # fmt: skip
    products = _products(window, factors.U, directed)
    start = value(factors, products)
    trace = jnp.full((iters + 1,), start, factors.U.dtype)

    def unfinished(carry):
        _, _, trace, done = carry
        before, now = trace[jnp.maximum(done - 1, 0)], trace[done]
        settled = (done > 0) & (before - now < tol * jnp.abs(before))
        return (done < iters) & ~(settled & (tol > 0))

    def body(carry):
        factors, products, trace, done = carry
        factors, products = step(factors, products)
        now = value(factors, products)
        # Everything still to come: an early stop leaves its own value in the rest.
        trace = jnp.where(jnp.arange(iters + 1) > done, now, trace)
        return factors, products, trace, done + 1

    factors, _, trace, done = jax.lax.while_loop(
        unfinished, body, (factors, products, trace, jnp.zeros((), jnp.int32))
    )
    return Fit(factors, trace, done)


def fit_adam(
    window,
    factors: Factors,
    *,
    steps: int = 10_000,
    learning_rate: float = 0.1,
    mask=None,
    affinity=None,
    lam: float = 0.0,
    gamma: float = 1.0,
) -> Fit:
    """The same J by Adam on softplus parameters: another solver to check the updates against.

    The step size falls to zero along a half cosine. Returns as `fit`, the trace [steps + 1].
    """
    window, mask, affinity = _prepare(window, mask, affinity, lam, factors.U.dtype)

    def loss(raw):
        positive = jax.tree.map(jax.nn.softplus, raw)
        products = _products(window, positive.U, directed=True)
        return _objective(
            window, mask, affinity, positive, products, lam=lam, gamma=gamma, exact=True
        )

    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    # softplus^-1(x) = x + log(1 - exp(-x))
    raw = jax.tree.map(lambda x: x + jnp.log(-jnp.expm1(-x)), factors)

    def step(carry, _):
        raw, state = carry
        value, gradient = jax.value_and_grad(loss)(raw)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(raw, updates), state), value

    (raw, _), trace = jax.lax.scan(step, (raw, optimizer.init(raw)), length=steps)
    trace = jnp.append(trace, loss(raw))
    return Fit(jax.tree.map(jax.nn.softplus, raw), trace, jnp.int32(steps))


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise ValueError(f"order {order!r}; known: {', '.join(ORDERS)}")


def next_state(factors: Factors, steps: int = 1) -> jax.Array:
    """U_{w + steps} [n, k] = U_w A^steps."""
    return jax.lax.fori_loop(0, steps, lambda _, u: _dot(u, factors.A), factors.U[-1])


def predict(factors: Factors, steps: int = 1) -> jax.Array:
    """The expected snapshot [n, n] `steps` after the window; values above 1 are possible."""
    u = next_state(factors, steps)
    return _dot(_dot(u, factors.B), u.T)


def initial_factors(
    rng: jax.Array, window_mean: jax.Array, *, window: int, num_nodes: int, rank: int,
    dtype: Any = jnp.float32,
) -> Factors:  # fmt: skip
    """Strictly positive starting factors; U_s is the same for all s.

    U ~ uniform[0.5, 1.5] mean(G)^(1/4) / sqrt(k); B = I + 0.1 uniform; A = I + 0.01 uniform.

    Args:
      rng: key of this target. window_mean: [] mean entry of the window. window: w.
    """
    rngs = jax.random.split(rng, 3)
    # An empty window has mean 0, and from zero no update leads away.
    scale = jnp.maximum(window_mean, 1e-6).astype(dtype) ** 0.25 / jnp.sqrt(float(rank))
    u = jax.random.uniform(rngs[0], (num_nodes, rank), dtype, 0.5, 1.5) * scale.astype(dtype)
    eye = jnp.eye(rank, dtype=dtype)
    return Factors(
        jnp.broadcast_to(u, (window, num_nodes, rank)),
        eye + 0.1 * jax.random.uniform(rngs[1], (rank, rank), dtype),
        eye + 0.01 * jax.random.uniform(rngs[2], (rank, rank), dtype),
    )


def shift_factors(factors: Factors) -> Factors:
    """Where the next target starts when it is warm: U moved one step on, the last one evolved."""
    return factors._replace(U=jnp.concatenate([factors.U[1:], next_state(factors)[None]]))


def import_factors(arrays: Mapping[str, np.ndarray]) -> Factors:
    """Factors from arrays `U` [w, n, k], `B` [k, k], `A` [k, k].

    Raises ValueError: a name is missing or unknown, shapes do not fit, an entry is not positive.
    """
    wanted = set(Factors._fields)
    if set(arrays) != wanted:
        raise ValueError(
            f"factors need exactly the arrays U, B, A; missing {sorted(wanted - set(arrays))}, "
            f"unexpected {sorted(set(arrays) - wanted)}"
        )
    factors = Factors(*(np.asarray(arrays[name]) for name in Factors._fields))
    check_factors(factors)
    return Factors(*map(jnp.asarray, factors))


def check_factors(factors: Factors) -> None:
    """Raise ValueError unless shapes fit and all entries are positive and finite (host side)."""
    u, b, a = (np.asarray(x) for x in factors)
    if u.ndim != 3 or b.shape != (u.shape[-1],) * 2 or a.shape != b.shape:
        raise ValueError(
            f"factors: U {u.shape}, B {b.shape}, A {a.shape}; wanted [w, n, k], [k, k], [k, k]"
        )
    for name, x in zip(Factors._fields, (u, b, a)):
        bad = ~(np.isfinite(x) & (x > 0))
        if bad.any():
            place = [int(i) for i in np.argwhere(bad)[0]]
            raise ValueError(
                f"initial factor {name}{place} is {x[tuple(place)]!r}: multiplicative updates "
                "cannot leave zero; start strictly positive"
            )


class LatentEvolution(nn.Module):
    """The factors of one window as parameters `U`, `B`, `A`.

    Attributes:
      num_nodes: n. window: w. rank: k. gamma, lam, eps, order, directed: as in `sweep`.
    """

    num_nodes: int = 100
    window: int = 5
    rank: int = 10
    gamma: float = 1.0
    lam: float = 0.0
    eps: float = EPS
    order: str = "gauss_seidel"
    directed: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        check_hyperparameters(
            rank=self.rank, num_nodes=self.num_nodes, gamma=self.gamma, lam=self.lam
        )
        _check_order(self.order)

        def start(rng, name):
            made = initial_factors(
                rng, jnp.ones(()), window=self.window, num_nodes=self.num_nodes, rank=self.rank,
                dtype=self.param_dtype,
            )  # fmt: skip
            return getattr(made, name)

        self.U = self.param("U", start, "U")
        self.B = self.param("B", start, "B")
        self.A = self.param("A", start, "A")

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """A window [w, n, n]."""
        shape = (self.window, self.num_nodes, self.num_nodes)
        return (jax.ShapeDtypeStruct(shape, self.param_dtype),)

    @property
    def factors(self) -> Factors:
        """The parameters, in the compute dtype."""
        return Factors(*(jnp.asarray(x, self.dtype) for x in (self.U, self.B, self.A)))

    def _options(self, mask, affinity) -> dict[str, Any]:
        return {"mask": mask, "affinity": affinity, "lam": self.lam, "gamma": self.gamma}

    def __call__(self, window, mask=None, affinity=None) -> dict[str, jax.Array]:
        """`objective` [] of a window [w, n, n] and the `prediction` [n, n] of what follows it."""
        return {
            "objective": objective(window, self.factors, **self._options(mask, affinity)),
            "prediction": predict(self.factors),
        }

    def fit(self, window, mask=None, affinity=None, *, iters: int = 50, tol: float = 1e-5) -> Fit:
        """Sweeps from the parameters on; see `fit`."""
        return fit(
            window, self.factors, iters=iters, tol=tol, eps=self.eps, order=self.order,
            directed=self.directed, **self._options(mask, affinity),
        )  # fmt: skip


MODEL = LatentEvolution
VARIANTS: dict[str, dict[str, Any]] = {}


def check_hyperparameters(
    *, rank: int, num_nodes: int, gamma: float, lam: float, alpha: float = 0.0
) -> None:
    """Raise ValueError naming the number that is out of its range."""
    if not 1 <= rank <= num_nodes:
        raise ValueError(f"rank k = {rank} must be between 1 and the number of nodes {num_nodes}")
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not (value >= 0 and np.isfinite(value)):
            raise ValueError(f"{name} = {value} must be a finite number >= 0")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha = {alpha} must be in [0, 1]: the weight of the prediction")


def check_window(window, mask=None, affinity=None, *, lam: float = 0.0, directed: bool = True):
    """Raise ValueError naming the first bad entry of snapshots, mask or affinity (host side).

    Args: window [T, n, n] or a sequence of [n, n]; mask the same shape; affinity [n, n].
    Returns the window as one array [T, n, n].
    """
    shapes = sorted({np.shape(g) for g in window})
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][0] != shapes[0][1]:
        raise ValueError(
            f"snapshots must share one square shape [n, n], not {', '.join(map(str, shapes))}; "
            "align_nodes brings snapshots to one node set"
        )
    graphs = np.asarray(window)
    bad = ~np.isfinite(graphs) | (graphs < 0)
    if bad.any():
        s, i, j = (int(x) for x in np.argwhere(bad)[0])
        raise ValueError(
            f"snapshot {s} has weight {graphs[s, i, j]} at [{i}, {j}]: weights must be finite "
            "and >= 0"
        )
    if not directed:
        asymmetric = graphs != np.swapaxes(graphs, -1, -2)
        if asymmetric.any():
            s, i, j = (int(x) for x in np.argwhere(asymmetric)[0])
            raise ValueError(
                f"snapshot {s} is not symmetric at [{i}, {j}] ({graphs[s, i, j]} against "
                f"{graphs[s, j, i]}) but directed=False; pass directed=True"
            )
    if mask is not None:
        mask = np.asarray(mask)
        if mask.shape != graphs.shape:
            raise ValueError(f"mask has shape {mask.shape}, the snapshots {graphs.shape}")
        if not np.isin(mask, (0, 1)).all():
            raise ValueError(f"mask must hold 0 and 1 only, not {mask[~np.isin(mask, (0, 1))][0]}")
    if lam > 0 and affinity is None and mask is not None:
        raise ValueError("lam > 0 with a mask needs its affinity W [n, n] given")
    if affinity is not None:
        w = np.asarray(affinity)
        if w.shape != graphs.shape[1:] or not np.array_equal(w, w.T):
            raise ValueError(f"affinity W must be symmetric with shape {graphs.shape[1:]}")
        if not np.isfinite(w).all() or (w < 0).any():
            raise ValueError("affinity W must be finite and >= 0")
    return graphs
