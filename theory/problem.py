"""Losses of the end-to-end product W: reconstruction, completion, sensing, regression.

Every loss is `scale / 2 * sum(residual ** 2)` with a residual that is affine in W, so that one
small class gives value, gradient and curvature of all four. Shapes are written with axis names:
`out` = n_L, `in` = n_0, `m` = measurements, `N` = samples.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theory import decompositions

KINDS = ("reconstruction", "completion", "sensing", "regression")
LOSS_NORMS = ("half_sum", "half_mean", "mean")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """One loss of W. Build it with `make_problem`, which checks the arrays.

    target: [out, in], the matrix M (sensing, regression: only the reference, may be None).
    data: the kind's arrays: `mask` [out, in]; `A` [m, out, in], `y` [m]; `X` [in, N],
    `Y` [out, N].
    scale: scalar prefactor c of c / 2 * sum(residual ** 2).
    """

    target: Any
    data: dict[str, Any]
    scale: Any
    kind: str = dataclasses.field(metadata={"static": True}, default="reconstruction")
    loss_norm: str = dataclasses.field(metadata={"static": True}, default="half_sum")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the product."""
        if self.kind == "sensing":
            return tuple(self.data["A"].shape[-2:])
        if self.kind == "regression":
            return (self.data["Y"].shape[-2], self.data["X"].shape[-2])
        return tuple(self.target.shape[-2:])

    def residual(self, product: jax.Array) -> jax.Array:
        """Residual of the product [out, in]; its shape is the kind's own."""
        if self.kind == "reconstruction":
            return product - self.target
        if self.kind == "completion":
            return self.data["mask"] * (product - self.target)
        if self.kind == "sensing":
            return jnp.einsum("moi,oi->m", self.data["A"], product) - self.data["y"]
        return product @ self.data["X"] - self.data["Y"]

    def _adjoint(self, residual: jax.Array) -> jax.Array:
        if self.kind == "sensing":
            return jnp.einsum("m,moi->oi", residual, self.data["A"])
        if self.kind == "regression":
            return residual @ self.data["X"].T
        return residual

    def value_and_gradient(self, product: jax.Array) -> tuple[jax.Array, jax.Array]:
        """ell(W) [] and G = d ell / dW [out, in].

        Reconstruction and completion also take arrays with a last axis of lanes; ell is [lanes].
        """
        residual = self.residual(product)
        axes = tuple(range(min(residual.ndim, 2)))
        loss = 0.5 * self.scale * jnp.sum(residual * residual, axis=axes)
        return loss, self.scale * self._adjoint(residual)

    def loss(self, product: jax.Array) -> jax.Array:
        """ell(W), a scalar."""
        return self.value_and_gradient(product)[0]

    def gradient(self, product: jax.Array) -> jax.Array:
        """G = d ell / dW, [out, in]."""
        return self.value_and_gradient(product)[1]

    @property
    def sharpness(self) -> jax.Array:
        """Largest eigenvalue of the second derivative of ell in W, a scalar.

        A step eta_hat / (L sigma_1^(2 - 2 / L)) for a unit curvature becomes one for this loss when
        divided by it.
        """
        if self.kind == "sensing":
            A = self.data["A"]
            return self.scale * decompositions.spectral_norm(A.reshape(A.shape[0], -1)) ** 2
        if self.kind == "regression":
            return self.scale * decompositions.spectral_norm(self.data["X"]) ** 2
        return self.scale

    def curvature(self, direction: jax.Array) -> jax.Array:
        """C[D], the (constant) second derivative of ell applied to D [out, in]."""
        if self.kind == "reconstruction":
            return self.scale * direction
        if self.kind == "completion":
            return self.scale * self.data["mask"] * direction
        if self.kind == "sensing":
            return self.scale * self._adjoint(jnp.einsum("moi,oi->m", self.data["A"], direction))
        return self.scale * self._adjoint(direction @ self.data["X"])


def _terms(kind: str, shape: tuple[int, int], data: dict[str, np.ndarray]) -> float:
    if kind == "completion":
        return float(data["mask"].sum())
    if kind == "sensing":
        return float(data["y"].shape[0])
    if kind == "regression":
        return float(data["X"].shape[1])
    return float(shape[0] * shape[1])


def make_problem(
    kind: str = "reconstruction",
    *,
    target: Any = None,
    mask: Any = None,
    A: Any = None,
    y: Any = None,
    X: Any = None,
    Y: Any = None,
    loss_norm: str | None = None,
) -> Problem:
    """Checked `Problem` from arrays (host side; the jittable parts take the result).

    kind: one of `KINDS`. target M [out, in]; completion: mask [out, in] of 0 and 1; sensing:
    A [m, out, in], y [m]; regression: X [in, N], Y [out, N]. loss_norm: `half_sum` 1/2 sum,
    `half_mean` 1/(2 n) sum, `mean` 1/n sum over the n observed terms (n = N samples for
    regression); default `half_sum` for reconstruction and `half_mean` for the others.
    Raises ValueError with one line that names the array at fault.
    """
    if kind not in KINDS:
        raise ValueError(f"problem: unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    loss_norm = loss_norm or ("half_sum" if kind == "reconstruction" else "half_mean")
    if loss_norm not in LOSS_NORMS:
        raise ValueError(f"loss_norm: {loss_norm!r} is not one of {', '.join(LOSS_NORMS)}")
    given = {"target": target, "mask": mask, "A": A, "y": y, "X": X, "Y": Y}
    wanted = {
        "reconstruction": ("target",),
        "completion": ("target", "mask"),
        "sensing": ("A", "y"),
        "regression": ("X", "Y"),
    }[kind]
    arrays: dict[str, np.ndarray] = {}
    for name, array in given.items():
        if array is None:
            if name in wanted:
                raise ValueError(f"{name}: problem {kind!r} needs this array")
            continue
        if name not in wanted and name != "target":
            raise ValueError(f"{name}: problem {kind!r} takes no such array")
        arrays[name] = np.asarray(array)
        if not np.issubdtype(arrays[name].dtype, np.floating):
            arrays[name] = arrays[name].astype(np.float64)
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name}: contains non-finite values")
    target = arrays.pop("target", None)
    if target is not None and target.ndim != 2:
        raise ValueError(f"target: shape {target.shape} is not a matrix [out, in]")
    shape = target.shape if target is not None else (0, 0)
    if kind == "completion":
        _check_mask(arrays["mask"], shape)
    if kind == "sensing":
        if arrays["A"].ndim != 3:
            raise ValueError(f"A: shape {arrays['A'].shape} is not [m, out, in]")
        if arrays["y"].shape != (arrays["A"].shape[0],):
            raise ValueError(
                f"y: shape {arrays['y'].shape} does not match the {arrays['A'].shape[0]} "
                f"measurement matrices of A {arrays['A'].shape}"
            )
        shape = arrays["A"].shape[1:]
    if kind == "regression":
        if arrays["X"].shape[1:] != arrays["Y"].shape[1:]:
            raise ValueError(
                f"Y: shape {arrays['Y'].shape} has not the sample count of X {arrays['X'].shape}"
            )
        shape = (arrays["Y"].shape[0], arrays["X"].shape[0])
    if target is not None and target.shape != tuple(shape):
        raise ValueError(f"target: shape {target.shape} is not the product's shape {tuple(shape)}")
    terms = _terms(kind, shape, arrays)
    scale = {"half_sum": 1.0, "half_mean": 1.0 / terms, "mean": 2.0 / terms}[loss_norm]
    dtype = jnp.result_type(*(arrays or {"target": target}).values())
    return Problem(
        target=None if target is None else jnp.asarray(target),
        data={name: jnp.asarray(array) for name, array in arrays.items()},
        scale=jnp.asarray(scale, dtype),
        kind=kind,
        loss_norm=loss_norm,
    )


def _check_mask(mask: np.ndarray, shape: tuple[int, ...]) -> None:
    if mask.shape != tuple(shape):
        raise ValueError(f"mask: shape {mask.shape} is not the target's shape {tuple(shape)}")
    if not np.isin(mask, (0.0, 1.0)).all():
        raise ValueError("mask: entries must be 0 (hidden) or 1 (observed)")
    if not mask.any():
        raise ValueError("mask: no entry is observed")
    for axis, name in ((1, "row"), (0, "column")):
        empty = np.flatnonzero(~mask.any(axis=axis))
        if empty.size:
            warnings.warn(
                f"mask: {name} {empty[0]} is fully unobserved ({empty.size} in all); "
                "its entries are decided by the initialization alone",
                stacklevel=3,
            )


def check_spectrum(sigma: Sequence[float], shape: tuple[int, int] | None = None) -> tuple:
    """Reference spectrum as a decreasing tuple of positive floats.

    Sorts with a warning; raises ValueError for zero, negative or non-finite values, and where
    there are more than min(shape) of them.
    """
    sigma = tuple(float(s) for s in np.atleast_1d(np.asarray(sigma, dtype=np.float64)))
    if not sigma:
        raise ValueError("sigma: the spectrum is empty")
    if not all(np.isfinite(s) and s > 0 for s in sigma):
        raise ValueError(f"sigma: {list(sigma)} must be positive and finite (leave zeros out)")
    if any(a < b for a, b in itertools.pairwise(sigma)):
        warnings.warn(f"sigma: {list(sigma)} is not decreasing; sorted", stacklevel=2)
        sigma = tuple(sorted(sigma, reverse=True))
    if shape is not None and len(sigma) > min(shape):
        raise ValueError(f"sigma: rank {len(sigma)} exceeds min of the target's shape {shape}")
    return sigma


def spectrum(name: str, rank: int, explicit: Sequence[float] | None = None) -> tuple:
    """Named reference spectrum of `rank` values: `equal` (R+1-i)/R, `geometric(q)` q^(i-1),
    or `explicit`."""
    if rank < 1:
        raise ValueError(f"rank: {rank} must be at least 1")
    if name == "equal":
        return tuple((rank - i) / rank for i in range(rank))
    if name == "explicit":
        if explicit is None:
            raise ValueError("spectrum: `explicit` needs the key sigma")
        return check_spectrum(explicit)
    if name.startswith("geometric(") and name.endswith(")"):
        try:
            ratio = float(name[len("geometric(") : -1])
        except ValueError:
            ratio = float("nan")
        if not 0 < ratio <= 1:
            raise ValueError(f"spectrum: the ratio of {name} must lie in (0, 1]")
        return tuple(ratio**i for i in range(rank))
    raise ValueError(f"spectrum: unknown {name!r}; choose equal, geometric(q) or explicit")


def _orthonormal(key: jax.Array, rows: int, cols: int, dtype) -> jax.Array:
    q, r = decompositions.qr(jax.random.normal(key, (rows, cols), dtype))
    signs = jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0).astype(dtype)
    return q * signs


def spectrum_target(
    key: jax.Array,
    shape: tuple[int, int],
    sigma: jax.Array,
    *,
    symmetry: str = "general",
    signs: Sequence[float] | None = None,
    dtype=None,
) -> jax.Array:
    """Target M [out, in] = U diag(sigma) V^T with Haar-random orthonormal U, V (pure, jittable).

    sigma: [R], zeros allowed as padding. symmetry: `general`, `symmetric_psd` (V = U) or
    `symmetric_indefinite` (V = U with `signs` on its columns, default alternating +, -, +).
    """
    sigma = jnp.asarray(sigma, dtype)
    rank = sigma.shape[0]
    key_u, key_v = jax.random.split(key)
    left = _orthonormal(key_u, shape[0], rank, sigma.dtype)
    if symmetry == "general":
        right = _orthonormal(key_v, shape[1], rank, sigma.dtype)
    elif symmetry in ("symmetric_psd", "symmetric_indefinite"):
        if shape[0] != shape[1]:
            raise ValueError(f"symmetry: {symmetry} needs a square target, not {shape}")
        right = left
        if symmetry == "symmetric_indefinite":
            signs = signs if signs is not None else [(-1.0) ** i for i in range(rank)]
            right = left * jnp.asarray(signs, sigma.dtype)
    else:
        raise ValueError(
            f"symmetry: unknown {symmetry!r}; choose general, symmetric_psd, symmetric_indefinite"
        )
    return (left * sigma) @ right.T


def gaussian_target(key: jax.Array, n: int, rank: int, dtype=None) -> jax.Array:
    """Target of the Arora et al. code: U V^T / sqrt(rank), Gaussian [n, rank], ||M||_F = n."""
    key_u, key_v = jax.random.split(key)
    dtype = dtype or jnp.result_type(float)
    left = jax.random.normal(key_u, (n, rank), dtype)
    product = left @ jax.random.normal(key_v, (n, rank), dtype).T / np.sqrt(rank)
    return product * (n / jnp.linalg.norm(product))


def observed_mask(key: jax.Array, shape: tuple[int, int], count: int, dtype=None) -> jax.Array:
    """Mask [out, in] with `count` observed entries drawn without replacement."""
    size = shape[0] * shape[1]
    if not 1 <= count <= size:
        raise ValueError(f"observed: {count} entries of {size} cannot be drawn")
    order = jax.random.permutation(key, size)
    flat = jnp.zeros(size, dtype or jnp.result_type(float)).at[order[:count]].set(1.0)
    return flat.reshape(shape)


def sensing_matrices(key: jax.Array, count: int, shape: tuple[int, int], dtype=None) -> jax.Array:
    """Gaussian measurement matrices A [m, out, in], entries N(0, 1) / sqrt(out * in)."""
    dtype = dtype or jnp.result_type(float)
    return jax.random.normal(key, (count, *shape), dtype) / np.sqrt(shape[0] * shape[1])


def add_noise(key: jax.Array, array: jax.Array, noise_std: float) -> jax.Array:
    """array + noise_std * standard Gaussian, of the same shape."""
    return array + noise_std * jax.random.normal(key, array.shape, array.dtype)


def random_data(
    kind: str,
    key_data: jax.Array,
    key_noise: jax.Array,
    target: jax.Array,
    noise_std: Any = 0.0,
    count: int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(target, data) of a problem of `kind` for a clean target [out, in] (pure, jittable).

    count: observed entries of completion, measurements m of sensing, samples N of regression.
    Noise is added to the target (reconstruction, completion), to y, or to Y.
    """
    shape, dtype = target.shape, target.dtype
    if kind == "reconstruction":
        return add_noise(key_noise, target, noise_std), {}
    if kind == "completion":
        mask = observed_mask(key_data, shape, count, dtype)
        return add_noise(key_noise, target, noise_std), {"mask": mask}
    if kind == "sensing":
        A = sensing_matrices(key_data, count, shape, dtype)
        y = jnp.einsum("moi,oi->m", A, target)
        return target, {"A": A, "y": add_noise(key_noise, y, noise_std)}
    if kind == "regression":
        X = jax.random.normal(key_data, (shape[1], count), dtype)
        return target, {"X": X, "Y": add_noise(key_noise, target @ X, noise_std)}
    raise ValueError(f"problem: unknown kind {kind!r}; choose one of {', '.join(KINDS)}")


def data_count(
    kind: str,
    shape: tuple[int, int],
    rank: int,
    *,
    observed: float = 0.7,
    measurements: int | None = None,
    samples: int = 40,
) -> int:
    """`count` of `random_data`: observed entries, measurements or samples of a random problem.

    measurements: None for three times the degrees of freedom of a matrix of that rank.
    """
    if kind == "completion":
        return max(1, round(observed * shape[0] * shape[1]))
    if kind == "sensing":
        return measurements or 3 * rank * (shape[0] + shape[1] - rank)
    return samples if kind == "regression" else 0


def random_problem(
    key: jax.Array,
    kind: str,
    shape: tuple[int, int],
    sigma: Sequence[float],
    *,
    noise_std: float = 0.0,
    observed: float = 0.7,
    measurements: int | None = None,
    samples: int = 40,
    symmetry: str = "general",
    loss_norm: str | None = None,
    dtype=None,
) -> Problem:
    """A problem of `kind` with a random target of spectrum sigma (host side).

    observed: share of entries seen by completion; measurements: m of sensing (default 3 times the
    degrees of freedom of a rank-R matrix); samples: N of regression (Gaussian X). Noise is added
    to the target (reconstruction, completion), to y, or to Y.
    """
    sigma = check_spectrum(sigma, shape)
    key_m, key_data, key_noise = jax.random.split(key, 3)
    target = spectrum_target(
        key_m, shape, jnp.asarray(sigma, dtype or jnp.result_type(float)), symmetry=symmetry
    )
    count = data_count(
        kind,
        shape,
        len(sigma),
        observed=observed,
        measurements=measurements,
        samples=samples,
    )
    target, data = random_data(kind, key_data, key_noise, target, noise_std, count)
    return make_problem(kind, target=target, loss_norm=loss_norm, **data)


def determinant_completion() -> Problem:
    """The 2 x 2 completion problem whose norms must diverge: observed 1, 1, 0, entry (1, 1) hidden.

    Fitting [[w, 1], [1, 0]] fixes the determinant at -1, so rank one is approached only as
    |w| grows without bound (after Razin and Cohen 2020).
    """
    target = np.array([[0.0, 1.0], [1.0, 0.0]])
    mask = np.array([[0.0, 1.0], [1.0, 1.0]])
    return make_problem("completion", target=target, mask=mask)


def diagonal_completion(diagonal: Sequence[float]) -> Problem:
    """Completion of a 2 x 2 matrix of which only the diagonal is observed."""
    return make_problem("completion", target=np.diag(np.asarray(diagonal, float)), mask=np.eye(2))
