"""Second-order view of the loss: Hessian-vector products, spectra, critical-point classes.

Parameters are ordered W_1, ..., W_L, each in C order; N = sum_j n_j n_{j-1}. The closed forms are
those of section 3 of the specification; no automatic differentiation is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theory import decompositions
from theory.factorization import Factors
from theory.problem import Problem

MAX_DENSE = 2000


def side_products(factors: Sequence[jax.Array]) -> tuple[list, list, jax.Array]:
    """(A, B, W): A_j = W_L..W_{j+1}, B_j = W_{j-1}..W_1 (identity when empty), the product."""
    dtype = factors[0].dtype
    right = [jnp.eye(factors[0].shape[1], dtype=dtype)]
    for factor in factors:
        right.append(factor @ right[-1])
    left = [jnp.eye(factors[-1].shape[0], dtype=dtype)]
    for factor in reversed(factors[1:]):
        left.append(left[-1] @ factor)
    return left[::-1], right[:-1], right[-1]


def hvp(problem: Problem, factors: Factors, direction: Sequence[jax.Array]) -> Factors:
    """Hessian-vector product at `factors` for V = direction (tuples of [n_j, n_{j-1}]).

    vmap over the direction for a batch.
    """
    depth = len(factors)
    left, right, product = side_products(factors)
    gradient = problem.gradient(product)
    d_right = [jnp.zeros_like(right[0])]
    for j in range(depth - 1):
        d_right.append(direction[j] @ right[j] + factors[j] @ d_right[j])
    d_left = [jnp.zeros_like(left[-1])]
    for j in range(depth - 1, 0, -1):
        d_left.append(d_left[-1] @ factors[j] + left[j] @ direction[j])
    d_left = d_left[::-1]
    d_product = sum(a @ v @ b for a, v, b in zip(left, direction, right))
    d_gradient = problem.curvature(d_product)
    return tuple(
        a.T @ d_gradient @ b.T + da.T @ gradient @ b.T + a.T @ gradient @ db.T
        for a, b, da, db in zip(left, right, d_left, d_right)
    )


def _between(factors: Sequence[jax.Array], j: int, k: int) -> jax.Array:
    """W_{j-1} ... W_{k+1} for j > k (1-based), identity when empty."""
    result = jnp.eye(factors[k - 1].shape[0], dtype=factors[0].dtype)
    for factor in factors[k : j - 1]:
        result = factor @ result
    return result


def hessian(problem: Problem, factors: Factors) -> jax.Array:
    """Dense Hessian [N, N]: H_jk = J_j^T C J_k + S_jk with J_j = A_j (x) B_j^T (pure, jittable)."""
    left, right, product = side_products(factors)
    gradient = problem.gradient(product)
    rows, cols = product.shape
    jacobian = jnp.concatenate([jnp.kron(a, b.T) for a, b in zip(left, right)], axis=1)
    curved = jax.vmap(problem.curvature, in_axes=0)(jacobian.T.reshape(-1, rows, cols))
    gauss_newton = curved.reshape(-1, rows * cols) @ jacobian
    sizes = [factor.size for factor in factors]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    second = jnp.zeros_like(gauss_newton)
    for j in range(2, len(factors) + 1):
        for k in range(1, j):
            inner = _between(factors, j, k)
            outer = right[k - 1] @ gradient.T @ left[j - 1]
            # S_jk[(a, b), (c, d)] = K[b, c] P[d, a]
            block = jnp.einsum("bc,da->abcd", inner, outer).reshape(sizes[j - 1], sizes[k - 1])
            second = second.at[starts[j - 1] : starts[j], starts[k - 1] : starts[k]].set(block)
    result = gauss_newton + second + second.T
    return 0.5 * (result + result.T)


_dense_spectrum = jax.jit(
    lambda problem, factors: decompositions.eigvalsh(hessian(problem, factors))
)


class Spectrum(NamedTuple):
    """Hessian spectrum at one point: eigenvalues ascending (all of them, or the extreme ones)."""

    eigenvalues: np.ndarray
    lambda_min: float
    lambda_max: float
    complete: bool
    n_parameters: int


def require_float64(what: str) -> None:
    """ValueError unless x64 is enabled: signs of small eigenvalues mean nothing in float32."""
    if not jax.config.jax_enable_x64:
        raise ValueError(
            f"{what}: needs float64; enable it with jax.config.update('jax_enable_x64', True)"
        )


def hessian_spectrum(
    problem: Problem,
    factors: Factors,
    *,
    method: str = "auto",
    k: int = 6,
    max_dense: int = MAX_DENSE,
    **lanczos_options: Any,
) -> Spectrum:
    """Hessian eigenvalues at `factors` (host side; needs x64).

    method: `dense` all N eigenvalues, `lanczos` the k smallest and the largest, `auto` dense up
    to max_dense parameters. Raises ValueError for `dense` with N > max_dense.
    """
    require_float64("hessian_spectrum")
    n = sum(int(np.prod(np.shape(factor))) for factor in factors)
    if method not in ("auto", "dense", "lanczos"):
        raise ValueError(f"method: {method!r} is not auto, dense or lanczos")
    if method == "dense" and n > max_dense:
        raise ValueError(
            f"method: a dense Hessian of N = {n} parameters exceeds max_dense = {max_dense}; "
            "use method='lanczos'"
        )
    factors = tuple(jnp.asarray(factor, jnp.float64) for factor in factors)
    if method == "dense" or (method == "auto" and n <= max_dense):
        values = np.asarray(_dense_spectrum(problem, factors))
        return Spectrum(values, float(values[0]), float(values[-1]), True, n)
    values, _ = lanczos(problem, factors, k=k, **lanczos_options)
    return Spectrum(values, float(values[0]), float(values[-1]), False, n)


_jitted_hvp = jax.jit(hvp)


def lanczos(
    problem: Problem,
    factors: Factors,
    *,
    k: int = 6,
    iterations: int = 400,
    tol: float = 1e-9,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Extreme eigenvalues by Lanczos on the HVP with full reorthogonalization (host side).

    Returns (k smallest and the largest eigenvalue, ascending [k + 1]; eigenvector of the smallest
    [N]). Stops when the residuals of all of them are below tol * |lambda|_max, or at `iterations`
    or N steps. A single start vector finds each multiple eigenvalue once.
    """
    shapes = [factor.shape for factor in factors]
    sizes = [int(np.prod(shape)) for shape in shapes]
    n = sum(sizes)
    splits = np.cumsum(sizes)[:-1]

    def apply(vector: np.ndarray) -> np.ndarray:
        parts = tuple(p.reshape(s) for p, s in zip(np.split(vector, splits), shapes))
        return np.concatenate([np.asarray(p).ravel() for p in _jitted_hvp(problem, factors, parts)])

    rng = np.random.default_rng(seed)
    vector = rng.standard_normal(n)
    basis = [vector / np.linalg.norm(vector)]
    diagonal, off = [], []
    for step in range(1, min(iterations, n) + 1):
        image = apply(basis[-1])
        diagonal.append(float(image @ basis[-1]))
        matrix = np.asarray(basis)
        for _ in range(2):
            image = image - matrix.T @ (matrix @ image)
        norm = float(np.linalg.norm(image))
        tridiagonal = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
        scale = max(abs(diagonal[0]), max(map(abs, diagonal)), 1e-300)
        if step % 10 == 0 or step == min(iterations, n) or norm < 1e-14 * scale:
            values, vectors = np.linalg.eigh(tridiagonal)
            wanted = [*range(min(k, step)), step - 1]
            residual = norm * np.abs(vectors[-1, wanted])
            size = max(abs(values[0]), abs(values[-1]), 1e-300)
            if (step > k and (residual <= tol * size).all()) or norm < 1e-14 * size:
                break
        off.append(norm)
        basis.append(image / norm)
    values, vectors = np.linalg.eigh(tridiagonal)
    wanted = sorted({*range(min(k, len(values))), len(values) - 1})
    return values[wanted], np.asarray(basis[: len(values)]).T @ vectors[:, 0]


def inertia(eigenvalues: Any, tau: float = 0.0) -> tuple[int, int, int]:
    """(negative, zero, positive) counts with tolerance max(1e-10 lambda_max, tau)."""
    values = np.asarray(eigenvalues)
    tau = max(1e-10 * float(values.max()), tau)
    return int((values < -tau).sum()), int((np.abs(values) <= tau).sum()), int((values > tau).sum())


def escape_overlap(problem: Problem, factors: Factors, gradients: Sequence[jax.Array]) -> jax.Array:
    """|<v_min, -g>| / ||g||: overlap of the step with the most negative curvature (pure)."""
    _, vectors = decompositions.eigh(hessian(problem, factors))
    flat = jnp.concatenate([g.ravel() for g in gradients])
    return jnp.abs(vectors[:, 0] @ flat) / jnp.linalg.norm(flat)


def critical_point_spectrum(
    sigma: Sequence[float], subset: Sequence[int], depth: int, dim: int
) -> np.ndarray:
    """Closed-form Hessian spectrum at the balanced critical point M_S, ascending [L dim^2].

    sigma: target spectrum [R]; subset S: 0-based indices of the learned modes; all widths `dim`,
    reconstruction with `half_sum`. Section 4 of the specification.
    """
    full = np.zeros(dim)
    full[: len(sigma)] = sigma
    inside = list(subset)
    outside = [i for i in range(dim) if i not in inside]
    root = full ** (1.0 / depth)
    values: list[float] = []
    for j in inside:
        for i in inside:
            powers = range(1, depth + 1)
            values.append(
                sum(root[j] ** (2 * (depth - p)) * root[i] ** (2 * (p - 1)) for p in powers)
            )
        for i in outside:
            weight = root[j] ** (depth - 2)
            # once for the left and once for the right singular space
            values += [weight * (full[j] + full[i]), weight * (full[j] - full[i])]
    if depth == 2:
        for i in outside:
            values += [full[i], -full[i]] * (dim - len(inside))
    total = depth * dim * dim
    return np.sort(np.concatenate([values, np.zeros(total - len(values))]))


def near_critical_threshold(depth: int) -> tuple[float, float]:
    """(c_L, theta_L) of the near-critical test."""
    if depth <= 2:
        return 0.5, 0.5
    return 0.3, 0.5 * ((depth - 2) / (depth - 1) + (2 * depth - 2) / (2 * depth - 1))


def classify_near_critical(
    grad_norm: float, lambda_min: float, depth: int, sigma_1: float
) -> tuple[str, float, float]:
    """(`saddle` or `minimum`, g_hat, lam): saddle iff lam > c_L g_hat^theta_L."""
    g_hat = float(grad_norm) / sigma_1 ** (2.0 - 1.0 / depth)
    lam = max(-float(lambda_min), 0.0) / (depth * sigma_1 ** (2.0 - 2.0 / depth))
    c, theta = near_critical_threshold(depth)
    return ("saddle" if lam > c * g_hat**theta else "minimum"), g_hat, lam


class CriticalPoint(NamedTuple):
    """Report on an exact critical point."""

    first_order: bool
    grad_norm: float
    loss: float
    lambda_min: float
    lambda_max: float
    inertia: tuple[int, int, int] | None  # None where only the extreme eigenvalues are known
    kind: str  # strict_saddle, global_min, non_strict_saddle, or not_critical


def classify_critical_point(
    problem: Problem,
    factors: Factors,
    *,
    optimum: float = 0.0,
    loss_tol: float | None = None,
    grad_tol: float = 1e-10,
    tau: float = 0.0,
) -> CriticalPoint:
    """Class of an exact critical point by its spectrum (host side; needs x64).

    optimum: the least loss; loss_tol: how near counts as global (default 1e-12 times the loss of
    W = 0); grad_tol: relative to kappa s^(2 - 1/L), with kappa the curvature of the loss in W and
    s = ||G(0)||_2 / kappa (sigma_1 for reconstruction), so that the class does not depend on the
    scale of the data. lambda_min < -1e-8 lambda_max is a strict saddle. Beyond `MAX_DENSE`
    parameters the extreme eigenvalues decide and the inertia is None.
    """
    require_float64("classify_critical_point")
    factors = tuple(jnp.asarray(factor, jnp.float64) for factor in factors)
    left, right, product = side_products(factors)
    loss, gradient = problem.value_and_gradient(product)
    grads = [a.T @ gradient @ b.T for a, b in zip(left, right)]
    grad_norm = float(jnp.sqrt(sum(jnp.sum(g * g) for g in grads)))
    zero_loss, zero_gradient = problem.value_and_gradient(jnp.zeros_like(product))
    kappa = max(float(problem.sharpness), 1e-300)
    size = float(decompositions.spectral_norm(zero_gradient)) / kappa
    first_order = grad_norm <= grad_tol * kappa * size ** (2.0 - 1.0 / len(factors))
    spectrum = hessian_spectrum(problem, factors)
    loss_tol = 1e-12 * float(zero_loss) if loss_tol is None else loss_tol
    if not first_order:
        kind = "not_critical"
    elif spectrum.lambda_min < -1e-8 * max(spectrum.lambda_max, 0.0) and spectrum.lambda_min < 0:
        kind = "strict_saddle"
    elif float(loss) <= optimum + loss_tol:
        kind = "global_min"
    else:
        kind = "non_strict_saddle"
    counts = inertia(spectrum.eigenvalues, tau) if spectrum.complete else None
    return CriticalPoint(
        first_order, grad_norm, float(loss), spectrum.lambda_min, spectrum.lambda_max, counts, kind
    )


def generic_non_strict(factors: Sequence[Any], rank: int, tau_rel: float = 1e-8) -> bool:
    """Generic rank rule at a top-r critical point, r < R: True predicts a non-strict saddle.

    For every pair i > j at least one of W_L..W_{i+1}, W_{i-1}..W_{j+1}, W_{j-1}..W_1 must have
    rank exactly r. The eigenvalue test of `classify_critical_point` is the authority.
    """
    matrices = [np.asarray(factor, np.float64) for factor in factors]
    depth = len(matrices)

    def rank_of(low: int, high: int) -> int:  # product of W_high .. W_low, 1-based
        if high < low:
            return matrices[min(low, depth) - 1].shape[0 if high >= depth else 1]
        block = matrices[low - 1]
        for j in range(low, high):
            block = matrices[j] @ block
        s = np.linalg.svd(block, compute_uv=False)
        return int((s > tau_rel * max(s[0], 1e-300)).sum()) if s[0] > 1e-12 else 0

    return all(
        rank in (rank_of(i + 1, depth), rank_of(j + 1, i - 1), rank_of(1, j - 1))
        for i in range(2, depth + 1)
        for j in range(1, i)
    )
