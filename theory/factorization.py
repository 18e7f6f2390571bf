"""The factors W_1..W_L: initializations, products, balancedness, gauge.

A factorization is a tuple of L arrays, `factors[j-1]` = W_j of shape [n_j, n_{j-1}]; the product
is W = W_L ... W_1 of shape [n_L, n_0].
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theory import decompositions

INITS = (
    "gaussian",
    "orthogonal",
    "identity",
    "balanced",
    "aligned",
    "unbalanced",
    "uniform",
    "custom",
)

Factors = tuple[jax.Array, ...]


def prefix_products(factors: Sequence[jax.Array]) -> list[jax.Array]:
    """[W_1, W_2 W_1, ..., W_L ... W_1]; entry j-1 has shape [n_j, n_0]."""
    products = [factors[0]]
    for factor in factors[1:]:
        products.append(factor @ products[-1])
    return products


def product(factors: Sequence[jax.Array]) -> jax.Array:
    """End-to-end matrix W_L ... W_1, [n_L, n_0]."""
    return prefix_products(factors)[-1]


def balance_defects(factors: Sequence[jax.Array]) -> list[jax.Array]:
    """D_j = W_{j+1}^T W_{j+1} - W_j W_j^T for j = 1..L-1, each [n_j, n_j]."""
    return [b.T @ b - a @ a.T for a, b in itertools.pairwise(factors)]


def balancedness(factors: Sequence[jax.Array]) -> jax.Array:
    """max_j ||D_j||_F, a scalar (0 for L = 1)."""
    defects = balance_defects(factors)
    if not defects:
        return jnp.zeros((), factors[0].dtype)
    return jnp.max(jnp.stack([jnp.linalg.norm(defect) for defect in defects]))


def gauge_transform(
    factors: Sequence[jax.Array],
    left: jax.Array | None = None,
    right: jax.Array | None = None,
    inner: Sequence[jax.Array] | None = None,
) -> Factors:
    """The same network in other bases: W_L <- P W_L O^T, W_j <- O_j W_j O_{j-1}^T, W_1 <- .. Q^T.

    left P [n_L, n_L], right Q [n_0, n_0], inner L-1 orthogonal O_j [n_j, n_j]; None is identity.
    """
    bases: list[jax.Array | None] = [right, *(inner or [None] * (len(factors) - 1)), left]
    result = []
    for j, factor in enumerate(factors):
        if bases[j] is not None:
            factor = factor @ bases[j].T
        if bases[j + 1] is not None:
            factor = bases[j + 1] @ factor
        result.append(factor)
    return tuple(result)


def check_dims(dims: Sequence[int], shape: tuple[int, int] | None = None) -> tuple[int, ...]:
    """dims [n_0..n_L] as a tuple; ValueError when it is no chain or does not fit M's shape."""
    dims = tuple(int(n) for n in dims)
    if len(dims) < 2 or min(dims) < 1:
        raise ValueError(f"dims: {list(dims)} must be [n_0, ..., n_L] with positive widths, L >= 1")
    if shape is not None and (dims[-1], dims[0]) != tuple(shape):
        raise ValueError(
            f"dims: the product's shape (n_L, n_0) = {(dims[-1], dims[0])} is not the target's "
            f"shape {tuple(shape)}"
        )
    return dims


def check_factors(factors: Sequence[Any], shape: tuple[int, int] | None = None) -> tuple[int, ...]:
    """dims of user-given factors; ValueError naming both shapes where the chain breaks."""
    shapes = [tuple(np.shape(factor)) for factor in factors]
    for j, found in enumerate(shapes, start=1):
        if len(found) != 2:
            raise ValueError(f"W{j}: shape {found} is not a matrix [n_{j}, n_{j - 1}]")
        if j > 1 and found[1] != shapes[j - 2][0]:
            raise ValueError(
                f"W{j}: shape {found} does not follow W{j - 1} of shape {shapes[j - 2]}: "
                f"{found[1]} columns, {shapes[j - 2][0]} wanted"
            )
    for j, factor in enumerate(factors, start=1):
        if not isinstance(factor, jax.core.Tracer) and not np.isfinite(np.asarray(factor)).all():
            raise ValueError(f"W{j}: contains non-finite values")
    return check_dims([shapes[0][1], *(found[0] for found in shapes)], shape)


def warn_bottleneck(dims: Sequence[int], rank: int) -> int:
    """Rank that the widths can reach, min(min dims, rank); warns where it is below `rank`."""
    width = min(dims)
    if width < rank:
        warnings.warn(
            f"dims: bottleneck width {width} < target rank {rank}: M is unreachable; the optimum "
            f"is the best rank-{width} approximation, stages are counted up to {width}",
            stacklevel=2,
        )
    return min(width, rank)


def _semi_orthogonal(key: jax.Array, rows: int, cols: int, dtype) -> jax.Array:
    tall = jax.random.normal(key, (max(rows, cols), min(rows, cols)), dtype)
    q, r = decompositions.qr(tall)
    q = q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0).astype(dtype)
    return q if rows >= cols else q.T


def random_factors(
    key: jax.Array,
    dims: tuple[int, ...],
    init: str,
    factor_scale: jax.Array,
    *,
    target: jax.Array | None = None,
    layer_scales: Sequence[float] | None = None,
    dtype=None,
) -> Factors:
    """The pure, jittable part of `initialize`: factor_scale a = alpha^(1/L) may be traced."""
    dtype = dtype or jnp.result_type(float)
    depth = len(dims) - 1
    scale = jnp.asarray(factor_scale, dtype)
    keys = jax.random.split(key, depth)
    shapes = [(dims[j + 1], dims[j]) for j in range(depth)]
    if init in ("gaussian", "unbalanced"):
        factors = [
            scale / math.sqrt(cols) * jax.random.normal(k, (rows, cols), dtype)
            for k, (rows, cols) in zip(keys, shapes)
        ]
        if init == "unbalanced":
            factors = [c * factor for c, factor in zip(layer_scales, factors)]
        return tuple(factors)
    if init == "uniform":
        return tuple(
            jax.random.uniform(k, (rows, cols), dtype, -1.0, 1.0) * scale * math.sqrt(3.0 / cols)
            for k, (rows, cols) in zip(keys, shapes)
        )
    if init == "orthogonal":
        return tuple(scale * _semi_orthogonal(k, *shape, dtype) for k, shape in zip(keys, shapes))
    if init == "identity":
        return tuple(scale * jnp.eye(*shape, dtype=dtype) for shape in shapes)
    if init == "balanced":
        gaussian = jax.random.normal(keys[0], (dims[-1], dims[0]), dtype) / math.sqrt(dims[0])
        left, values, right = decompositions.svd(scale**depth * gaussian)
        # A width below the full rank can hold only the leading part of the product.
        roots = values ** (1.0 / depth)
        return _mode_factors(left, roots, right, dims, dtype)
    if init == "aligned":
        left, _, right = decompositions.svd(target)
        return _mode_factors(left, jnp.full(left.shape[1], scale, dtype), right, dims, dtype)
    raise ValueError(f"init: unknown {init!r}; choose one of {', '.join(INITS)}")


def _mode_factors(left, roots, right, dims, dtype) -> Factors:
    depth = len(dims) - 1
    modes = min(dims)
    roots = jnp.asarray(roots, dtype)[:modes]
    if depth == 1:
        return ((left[:, :modes] * roots) @ right[:modes],)

    def diagonal(rows, cols):
        return jnp.zeros((rows, cols), dtype).at[jnp.arange(modes), jnp.arange(modes)].set(roots)

    first = jnp.zeros((dims[1], dims[0]), dtype).at[:modes].set(roots[:, None] * right[:modes])
    last = jnp.zeros((dims[-1], dims[-2]), dtype).at[:, :modes].set(left[:, :modes] * roots)
    middle = [diagonal(dims[j + 1], dims[j]) for j in range(1, depth - 1)]
    return (first, *middle, last)


def check_scale(
    alpha: float | None, factor_scale: float | None, depth: int, *, needed: bool = True
) -> float | None:
    """Factor scale a from `alpha` (scale of the product) or `factor_scale`, exclusive."""
    if alpha is not None and factor_scale is not None:
        raise ValueError("alpha: give alpha or factor_scale, not both")
    if alpha is None and factor_scale is None:
        if needed:
            raise ValueError("alpha: the scale of the product (or factor_scale) is missing")
        return None
    name, value = ("alpha", alpha) if alpha is not None else ("factor_scale", factor_scale)
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name}: {value} must be positive and finite")
    if not jax.config.jax_enable_x64:
        product_scale = value if alpha is not None else value**depth
        if product_scale < 1e-4:
            raise ValueError(
                f"{name}: a product scale of {product_scale:.0e} needs float64; enable jax x64 "
                "(jax.config.update('jax_enable_x64', True)) or take alpha >= 1e-4"
            )
    return float(value) if name == "factor_scale" else float(value) ** (1.0 / depth)


def initialize(
    key: jax.Array,
    dims: Sequence[int],
    init: str = "gaussian",
    *,
    alpha: float | None = None,
    factor_scale: float | None = None,
    target: Any = None,
    layer_scales: Sequence[float] | None = None,
    custom: Sequence[Any] | None = None,
    official_orthogonal_scale: bool = False,
    dtype=None,
) -> Factors:
    """Checked initial factors, a tuple of [n_j, n_{j-1}] (host side).

    init: `gaussian` N(0, a^2/n_{j-1}); `orthogonal` a * semi-orthogonal; `identity` a * eye;
    `balanced` from the SVD of a Gaussian product; `aligned` in the singular bases of `target`;
    `unbalanced` = layer_scales[j] * gaussian with product of layer_scales 1; `uniform` the
    Arora code's U(-sqrt3 a/sqrt n, sqrt3 a/sqrt n); `custom` the arrays of `custom`.
    alpha: scale of the product, a = alpha^(1/L); or factor_scale a itself.
    official_orthogonal_scale: the Arora code's (alpha sqrt(n_0))^(1/L) for `orthogonal`.
    """
    if init not in INITS:
        raise ValueError(f"init: unknown {init!r}; choose one of {', '.join(INITS)}")
    if init == "custom":
        if custom is None:
            raise ValueError("custom: init 'custom' needs the arrays W_1..W_L")
        check_dims(dims)
        if check_factors(custom) != tuple(dims):
            raise ValueError(
                f"custom: factors have dims {check_factors(custom)}, not {tuple(dims)}"
            )
        if len(custom) >= 2 and not any(np.any(np.asarray(factor)) for factor in custom):
            raise ValueError(
                "custom: all-zero factors: the origin is a critical point, the gradient is exactly "
                "zero for L >= 2; start from a small random point"
            )
        return tuple(jnp.asarray(factor) for factor in custom)
    shape = np.shape(target) if target is not None else None
    dims = check_dims(dims, shape)
    depth = len(dims) - 1
    scale = check_scale(alpha, factor_scale, depth)
    if init == "orthogonal" and official_orthogonal_scale:
        scale = scale * math.sqrt(dims[0]) ** (1.0 / depth)
    if init == "aligned" and target is None:
        raise ValueError("init: 'aligned' needs a known target M")
    if init == "unbalanced":
        if layer_scales is None or len(layer_scales) != depth:
            raise ValueError(f"layer_scales: init 'unbalanced' needs {depth} values")
        if not np.isclose(np.prod(layer_scales), 1.0):
            raise ValueError(
                f"layer_scales: their product is {np.prod(layer_scales):g}, it must be 1"
            )
    if init == "identity" and target is not None:
        matrix = np.asarray(target)
        if matrix.shape[0] == matrix.shape[1] and np.allclose(matrix, matrix.T, atol=1e-12):
            if np.linalg.eigvalsh(matrix).min() < -1e-12:
                warnings.warn(
                    "init: initialization lies in an invariant subspace (symmetric factors, "
                    "indefinite target): negative modes are left to rounding",
                    stacklevel=2,
                )
    return random_factors(
        key,
        dims,
        init,
        scale,
        target=None if target is None else jnp.asarray(target),
        layer_scales=layer_scales,
        dtype=dtype,
    )
