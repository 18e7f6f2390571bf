"""Simulation of the factors: a pure init/step pair under `lax.scan`, recording and status.

`init_state` and `advance` are the pair; `run` records rows and feeds the streaming stage
detectors, and is what to `jax.vmap` over seeds, scales, rates and spectra; `simulate` checks its
arguments, compiles `run` once per shape and returns a `Trajectory`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theory import decompositions, landscape
from theory.closed_form import lr_from_eta_hat, separability, warn_separability
from theory.factorization import Factors, check_factors, check_scale, product, warn_bottleneck
from theory.optimizers import Optimizer, gradients, make_optimizer, squared_norm
from theory.problem import Problem, check_spectrum
from theory.quantities import DEFAULT_RECORD, NEED_TARGET, QUANTITIES, measure
from theory.stages import Escape, certificate, sample_points
from theory.streaming import DetectorState, detector_init, detector_update

STATUS = ("max_steps", "converged", "diverged", "oscillating")
CONVERGED = 1e-4  # loss <= CONVERGED * sigma_R^2 (times the loss's own prefactor)


class State(NamedTuple):
    """Everything a run needs to continue bit for bit."""

    step: jax.Array
    factors: Factors
    slots: dict[str, Any]
    detector: DetectorState | None = None
    previous: Factors | None = None  # gradient of the step before, when its cosine is recorded


class Info(NamedTuple):
    """What one step saw before its update."""

    loss: jax.Array
    grad_norm: jax.Array
    product: jax.Array


def init_state(
    optimizer: Optimizer,
    factors: Factors,
    lr: Any,
    *,
    sigma: jax.Array | None = None,
    keep_gradient: bool = False,
) -> State:
    """State at step 0; with sigma [R] the streaming detectors run along."""
    shape = (factors[-1].shape[0], factors[0].shape[1])
    detector = None if sigma is None else detector_init(sigma, shape)
    previous = tuple(jnp.zeros_like(w) for w in factors) if keep_gradient else None
    return State(jnp.zeros((), jnp.int32), factors, optimizer.init(factors, lr), detector, previous)


def step(problem: Problem, optimizer: Optimizer, lr: Any, state: State) -> tuple[State, Info]:
    """One update; the info (loss, gradient norm, product) is of the point before it."""
    loss, product, grads = gradients(problem, state.factors)
    factors, slots = optimizer.update(problem, lr, state.step, state.factors, grads, state.slots)
    previous = None if state.previous is None else grads
    info = Info(loss, jnp.sqrt(squared_norm(grads)), product)
    return State(state.step + 1, factors, slots, state.detector, previous), info


def advance(
    problem: Problem, optimizer: Optimizer, lr: Any, state: State, length: int, unroll: int = 1
) -> tuple[State, Info]:
    """`length` steps under one scan; the info's leaves get a leading axis [length]."""
    detector = state.detector

    def body(carry, _):
        return step(problem, optimizer, lr, carry)

    carry = state._replace(detector=None)
    carry, info = jax.lax.scan(body, carry, None, length=length, unroll=unroll)
    if detector is not None:
        steps = state.step + jnp.arange(length, dtype=jnp.int32)
        detector = detector_update(detector, steps, info.loss, info.grad_norm, info.product)
    return carry._replace(detector=detector), info


# --- runs ----------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Arrays of a run: recorded rows, the every-step trace, the final state, a status code."""

    rows: dict[str, jax.Array]  # [n_rec, ...]; the last row is the final point
    trace: dict[str, jax.Array]  # loss and grad_norm at every step, [steps + 1]
    state: State
    status: jax.Array  # index into STATUS


def run(
    problem: Problem,
    optimizer: Optimizer,
    lr: Any,
    state: State,
    steps: int,
    record_every: int,
    record: tuple[str, ...] = DEFAULT_RECORD,
    unroll: int = 1,
    inertia_tolerance: Any = 0.0,
) -> Run:
    """`steps` updates from a state (pure, jittable, vmappable over all array arguments).

    Rows are taken before updates 0, record_every, 2 record_every, ... and once more at the end.
    """

    def look(state):
        return measure(problem, optimizer, lr, state, record, inertia_tolerance)

    def chunk(state, _):
        row = look(state)
        state, info = advance(problem, optimizer, lr, state, record_every, unroll)
        return state, (row, {"loss": info.loss, "grad_norm": info.grad_norm})

    whole, rest = divmod(steps, record_every)
    rows, trace = [], []
    if whole:
        state, (row, part) = jax.lax.scan(chunk, state, None, length=whole)
        rows.append(row)
        trace.append({name: value.reshape(-1) for name, value in part.items()})
    if rest:
        rows.append(jax.tree.map(lambda x: x[None], look(state)))
        state, info = advance(problem, optimizer, lr, state, rest, unroll)
        trace.append({"loss": info.loss, "grad_norm": info.grad_norm})
    rows.append(jax.tree.map(lambda x: x[None], look(state)))
    loss, _product, grads = gradients(problem, state.factors)
    last = {"loss": loss[None], "grad_norm": jnp.sqrt(squared_norm(grads))[None]}
    trace.append(last)
    rows = jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)
    trace = {name: jnp.concatenate([part[name] for part in trace]) for name in last}
    width = min(min(w.shape) for w in state.factors)
    status = final_status(trace["loss"], converged_level(problem, state.detector, width))
    return Run(rows, trace, state, status)


def close_detector(problem: Problem, state: State) -> DetectorState:
    """The detectors with the state's own point fed as their last step (the state keeps its own)."""
    loss, product, grads = gradients(problem, state.factors)
    return detector_update(
        state.detector,
        state.step[None],
        loss[None],
        jnp.sqrt(squared_norm(grads))[None],
        product[None],
    )


def converged_level(problem: Problem, detector: DetectorState | None, width: int) -> jax.Array:
    """1e-4 sigma_R^2 in the units of the loss; without detectors 1e-8 of the loss at W = 0.

    Above the optimum: where a bottleneck of `width` keeps the factors from a reconstruction's
    target, that is the loss of its best approximation of that rank.
    """
    optimum = 0.0
    if problem.kind == "reconstruction" and width < min(problem.shape):
        missed = decompositions.singular_values(problem.target)[width:]
        optimum = 0.5 * problem.scale * jnp.sum(missed**2)
    if detector is None:
        start = problem.loss(jnp.zeros(problem.shape, problem.scale.dtype))
        return optimum + 1e-8 * start
    sigma = detector.sigma
    smallest = jnp.min(jnp.where(sigma > 0, sigma, jnp.inf))
    return optimum + CONVERGED * smallest**2 * problem.scale


def final_status(loss: jax.Array, level: jax.Array) -> jax.Array:
    """Status code from the loss at every step [T].

    diverged: not finite, or above 1e3 times the first loss; converged: last loss <= level;
    oscillating: the loss rose in more than a quarter of the last (up to 200) steps and ended no
    lower than half of where that window began; else max_steps.
    """
    window = loss[-min(200, len(loss)) :]
    rises = jnp.mean((jnp.diff(window) > 1e-9 * jnp.abs(window[:-1])).astype(loss.dtype))
    stuck = (rises > 0.25) & (window[-1] >= 0.5 * window[0]) & (len(loss) > 20)
    diverged = ~jnp.isfinite(loss[-1]) | (loss[-1] > 1e3 * loss[0])
    return jnp.where(diverged, 2, jnp.where(loss[-1] <= level, 1, jnp.where(stuck, 3, 0))).astype(
        jnp.int32
    )


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Result of `simulate` on the host.

    rows: recorded arrays [n_rec, ...]; trace: loss and grad_norm at every step [steps + 1];
    state: resumable (pass it back as `state=`); status: one of `STATUS`; detector: streaming
    detectors closed at the last point (None without sigma).
    """

    rows: dict[str, np.ndarray]
    trace: dict[str, np.ndarray]
    state: State
    status: str
    lr: float
    optimizer: Optimizer
    problem: Problem
    sigma: tuple[float, ...] | None
    separability: float | None = None
    detector: DetectorState | None = None
    start: State | None = None


_jitted_run = jax.jit(run, static_argnums=(1, 4, 5, 6, 7))
_jitted_close = jax.jit(close_detector)


def check_rate(
    lr: float | None,
    eta_hat: float | None,
    depth: int,
    sigma_1: float | None,
    curvature: float = 1.0,
) -> float:
    """Step size from `lr` or the dimensionless `eta_hat`, exclusive.

    curvature: that of the loss in W (`Problem.sharpness`), so that eta_hat stays the step times
    lambda_max whatever the loss's prefactor.
    """
    if lr is not None and eta_hat is not None:
        raise ValueError("lr: give lr or eta_hat, not both")
    if lr is None:
        eta_hat = 0.3 if eta_hat is None else eta_hat
        if not (np.isfinite(eta_hat) and eta_hat > 0):
            raise ValueError(f"eta_hat: {eta_hat} must be positive and finite")
        if sigma_1 is None:
            raise ValueError("eta_hat: needs a known target spectrum; give lr instead")
        if eta_hat >= 2:
            warnings.warn(
                f"eta_hat: {eta_hat} >= 2 is past the edge of stability; expect no convergence",
                stacklevel=3,
            )
        return lr_from_eta_hat(eta_hat, depth, sigma_1) / curvature
    if not (np.isfinite(lr) and lr > 0):
        raise ValueError(f"lr: {lr} must be positive and finite")
    return float(lr)


def check_interval(record_every: int, steps: int) -> None:
    """ValueError unless 1 <= record_every <= steps."""
    if steps < 1:
        raise ValueError(f"steps: {steps} must be at least 1")
    if not 1 <= record_every <= steps:
        raise ValueError(f"record_every: {record_every} must lie in 1..steps = {steps}")


def check_record(record: Sequence[str], record_every: int, steps: int, problem: Problem) -> tuple:
    """Recorded names that the problem has; ValueError for unknown ones or a bad interval."""
    check_interval(record_every, steps)
    for name in record:
        if name not in QUANTITIES:
            raise ValueError(f"record: unknown {name!r}; choose from {', '.join(QUANTITIES)}")
    if problem.target is None:
        record = [name for name in record if name not in NEED_TARGET]
    return tuple(dict.fromkeys(record))


def simulate(
    problem: Problem,
    factors: Sequence[Any] | None = None,
    *,
    optimizer: str | Optimizer = "gd",
    optimizer_kwargs: dict[str, Any] | None = None,
    lr: float | None = None,
    eta_hat: float | None = None,
    steps: int,
    record_every: int = 1,
    record: Sequence[str] = DEFAULT_RECORD,
    sigma: Sequence[float] | None = None,
    alpha: float | None = None,
    state: State | None = None,
    unroll: int = 1,
    inertia_tolerance: float = 0.0,
) -> Trajectory:
    """Run the discrete dynamics from `factors` (or continue a `state` bit for bit).

    factors: tuple of W_j [n_j, n_{j-1}]; lr, or eta_hat (default 0.3) for the dimensionless step,
    lr L sigma_1^(2 - 2/L) times the curvature of the loss in W (1 for `half_sum` reconstruction);
    record: names of `QUANTITIES`; sigma: reference spectrum of the stages, for which the streaming
    detectors then judge every step (default: the target's singular values above 1e-10, for
    noise-free targets; pass () for none); alpha: for the separability index and its warning, by
    default from the size of the initial product; inertia_tolerance: recorded Hessian eigenvalues
    up to max(1e-10 lambda_max, this) in absolute value count as zero.
    Raises ValueError with one line for bad input.
    """
    if (factors is None) == (state is None):
        raise ValueError("factors: give initial factors or a state to continue, not both")
    if isinstance(optimizer, str):
        optimizer = make_optimizer(optimizer, **(optimizer_kwargs or {}))
    given = state.factors if state is not None else factors
    dims = check_factors(given, problem.shape)
    depth = len(dims) - 1
    if depth >= 2 and not any(np.any(np.asarray(w)) for w in given):
        raise ValueError(
            "factors: all-zero factors: the origin is a critical point, the gradient is exactly "
            "zero for L >= 2; start from a small random point"
        )
    record = check_record(record, record_every, steps, problem)
    spectrum = _reference(problem, sigma)
    if spectrum:
        spectrum = spectrum[: warn_bottleneck(dims, len(spectrum))]
    curvature = 1.0 if lr is not None else float(problem.sharpness)
    rate = check_rate(lr, eta_hat, depth, spectrum[0] if spectrum else None, curvature)
    dtype = jnp.result_type(*(jnp.asarray(w) for w in given))
    if "hessian" in record:
        landscape.require_float64("record 'hessian'")
        n = sum(int(np.prod(np.shape(w))) for w in given)
        if n > landscape.MAX_DENSE:
            raise ValueError(
                f"record: 'hessian' is dense and N = {n} exceeds {landscape.MAX_DENSE}; record "
                "'factors' and call hessian_spectrum(..., method='lanczos')"
            )
    index = None
    if spectrum and depth >= 2 and state is None:
        if alpha is None:
            # Every initialization has ||W||_F near alpha sqrt(n_L).
            alpha = float(np.linalg.norm(np.asarray(product(given)))) / math.sqrt(dims[-1])
        index = separability(spectrum, depth, alpha) if alpha > 0 else None
        if index is not None:
            warn_separability(index)
    if state is None:
        factors = tuple(jnp.asarray(w, dtype) for w in factors)
        state = init_state(
            optimizer,
            factors,
            rate,
            sigma=jnp.asarray(spectrum, dtype) if spectrum else None,
            keep_gradient="gradient_cosine" in record,
        )
    if "gradient_cosine" in record and state.previous is None:
        raise ValueError(
            "record: 'gradient_cosine' needs the gradient before, which this state does not carry; "
            "record it in the run that is continued, too"
        )
    start = state
    if not inertia_tolerance >= 0:
        raise ValueError(f"inertia_tolerance: {inertia_tolerance} must not be negative")
    result = _jitted_run(
        *(problem, optimizer, rate, state, steps, record_every, record, unroll),
        jnp.asarray(inertia_tolerance, dtype),
    )
    closed = None
    if result.state.detector is not None:
        closed = _jitted_close(problem, result.state)
    return Trajectory(
        rows={name: np.asarray(value) for name, value in result.rows.items()},
        trace={name: np.asarray(value) for name, value in result.trace.items()},
        state=result.state,
        status=STATUS[int(result.status)],
        lr=rate,
        optimizer=optimizer,
        problem=problem,
        sigma=spectrum or None,
        separability=index,
        detector=closed,
        start=start,
    )


def _reference(problem: Problem, sigma: Sequence[float] | None) -> tuple[float, ...]:
    if sigma is not None:
        return check_spectrum(sigma, problem.shape) if len(sigma) else ()
    if problem.target is None:
        return ()
    s = np.linalg.svd(np.asarray(problem.target), compute_uv=False)
    return tuple(s[s > 1e-10 * max(s[0], 1e-300)].tolist())


def certify(trajectory: Trajectory, escape: Escape, points: int = 24) -> float:
    """Certificate C of one escape: reruns from the trajectory's start to the sampled points.

    Returns I = eta sum max(-lambda_min, 0); with a momentum method eta/(1 - mu) is used.
    """
    landscape.require_float64("certify")
    if trajectory.start is None or int(trajectory.start.step) > escape.valley_step:
        raise ValueError("certify: the trajectory starts after the escape's valley")
    rate = trajectory.lr
    if trajectory.optimizer.name in ("momentum", "nesterov"):
        rate = rate / (1.0 - trajectory.optimizer["mom"])
    wanted = sample_points(escape.valley_step, escape.peak_step, points)
    state = trajectory.start._replace(detector=None)
    lowest, rates = [], []
    for target_step in wanted.tolist():
        gap = target_step - int(state.step)
        if gap:
            state = _skip(trajectory.problem, trajectory.optimizer, trajectory.lr, state, gap)
        spectrum = landscape.hessian_spectrum(trajectory.problem, state.factors)
        lowest.append(spectrum.lambda_min)
        if "adjusted_lr" in state.slots:  # the slot holds the rate of the update before
            after = _skip(trajectory.problem, trajectory.optimizer, trajectory.lr, state, 1)
            rate = float(after.slots["adjusted_lr"])
        rates.append(rate)
    return certificate(wanted, lowest, rates)


@functools.partial(jax.jit, static_argnums=(1,))
def _skip(problem, optimizer, lr, state, count):
    return jax.lax.fori_loop(0, count, lambda _, s: step(problem, optimizer, lr, s)[0], state)


def simulate_aligned(
    sigma: Sequence[float],
    depth: int,
    alpha: float,
    *,
    dim: int | None = None,
    lr: float | None = None,
    eta_hat: float | None = None,
    steps: int,
    record_every: int = 1,
) -> dict[str, np.ndarray]:
    """`aligned` gradient descent on `reconstruction` in mode coordinates, O(d) per step.

    sigma: [R]; dim: d (null modes included; default R). Returns step [n], singular_values
    [n, d] (of the modes, in the target's order), loss [n], grad_norm [n] at every record_every-th
    step and the last.
    """
    sigma = check_spectrum(sigma, (dim, dim) if dim else None)
    scale = check_scale(alpha, None, depth)
    check_interval(record_every, steps)
    rate = check_rate(lr, eta_hat, depth, sigma[0])
    full = jnp.zeros(dim or len(sigma)).at[: len(sigma)].set(jnp.asarray(sigma))
    a0 = jnp.full(full.shape, scale, full.dtype)
    whole, rest = divmod(steps, record_every)

    def observe(a):
        residual = a**depth - full
        grad = a ** (depth - 1) * residual
        return a**depth, 0.5 * jnp.sum(residual**2), jnp.sqrt(depth * jnp.sum(grad**2))

    def descend(_, a):
        return a - rate * a ** (depth - 1) * (a**depth - full)

    @jax.jit
    def go(a):
        def chunk(a, _):
            return jax.lax.fori_loop(0, record_every, descend, a), observe(a)

        a, rows = jax.lax.scan(chunk, a, None, length=whole)
        if rest:
            rows = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), rows, observe(a))
            a = jax.lax.fori_loop(0, rest, descend, a)
        return jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), rows, observe(a))

    values, loss, grad_norm = go(a0)
    marks = np.append(np.arange(0, steps, record_every), steps)
    return {
        "step": marks,
        "singular_values": np.asarray(values),
        "loss": np.asarray(loss),
        "grad_norm": np.asarray(grad_norm),
    }
