"""Hessian-vector products, dense Hessians, closed-form spectra, classification."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theory.dynamics import simulate
from theory.factorization import gauge_transform, product, random_factors
from theory.landscape import (
    classify_critical_point,
    classify_near_critical,
    critical_point_spectrum,
    generic_non_strict,
    hessian,
    hessian_spectrum,
    hvp,
    inertia,
    lanczos,
)
from theory.optimizers import gradients
from theory.problem import KINDS, make_problem, random_problem

DIMS = {2: (4, 3, 5), 3: (4, 3, 5, 3), 4: (3, 4, 2, 3, 4), 5: (3, 2, 4, 3, 2, 3)}


def case(kind, depth):
    dims = DIMS[depth]
    key = jax.random.key(depth)
    problem = random_problem(key, kind, (dims[-1], dims[0]), (1.0, 0.5), samples=7, measurements=9)
    factors = random_factors(jax.random.fold_in(key, 1), dims, "gaussian", 0.9)
    direction = random_factors(jax.random.fold_in(key, 2), dims, "gaussian", 1.0)
    return problem, factors, direction


@pytest.mark.parametrize("depth", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_hvp_and_dense_hessian_agree_with_autodiff(kind, depth):
    problem, factors, direction = case(kind, depth)

    def loss(w):
        return problem.loss(product(w))

    @jax.jit
    def everything(w, v):
        auto = jax.jvp(jax.grad(loss), (w,), (v,))
        return auto, gradients(problem, w)[2], hvp(problem, w, v), hessian(problem, w)

    (grad, expected), closed, image, matrix = everything(factors, direction)
    flat = np.concatenate([np.ravel(v) for v in direction])
    wanted = np.concatenate([np.ravel(v) for v in expected])
    for a, b, c, d in zip(grad, closed, expected, image):
        np.testing.assert_allclose(a, b, atol=1e-12)
        np.testing.assert_allclose(c, d, atol=1e-10)
    np.testing.assert_allclose(np.asarray(matrix) @ flat, wanted, atol=1e-10)


@pytest.mark.parametrize("depth", [2, 3, 4, 5])
def test_closed_form_spectrum_is_the_dense_one_at_every_balanced_critical_point(depth):
    dim, sigma = 4, np.array([1.2, 0.7, 0.3])
    rng = np.random.default_rng(depth)
    left, right, *inner = (
        np.linalg.qr(rng.standard_normal((dim, dim)))[0] for _ in range(depth + 1)
    )
    problem = make_problem("reconstruction", target=(left[:, :3] * sigma) @ right[:, :3].T)
    dense = jax.jit(lambda w: jnp.linalg.eigvalsh(hessian(problem, w)))
    for size in range(4):
        for subset in itertools.combinations(range(3), size):
            roots = np.zeros(dim)
            roots[list(subset)] = sigma[list(subset)] ** (1 / depth)
            factors = gauge_transform(
                [jnp.diag(jnp.asarray(roots))] * depth,
                jnp.asarray(left),
                jnp.asarray(right),
                [jnp.asarray(o) for o in inner],
            )
            expected = critical_point_spectrum(sigma, subset, depth, dim)
            np.testing.assert_allclose(dense(factors), expected, atol=1e-10)
            point = classify_critical_point(problem, factors)
            top = subset == tuple(range(size))
            if size == 3:
                assert point.kind == "global_min"
            elif depth >= 3 and top:
                assert point.kind == "non_strict_saddle" and point.inertia[0] == 0
            else:
                assert point.kind == "strict_saddle"
            if top and size < 3:
                assert generic_non_strict(factors, size) == (depth >= 3)
            if depth == 2 and top and size < 3:
                assert point.inertia[0] == (3 - size) * (dim - size)


def test_lanczos_finds_the_extreme_eigenvalues_without_the_dense_matrix():
    problem, factors, _ = case("reconstruction", 3)
    dense = hessian_spectrum(problem, factors, method="dense")
    sparse = hessian_spectrum(problem, factors, method="lanczos", k=2)
    assert not sparse.complete
    np.testing.assert_allclose(sparse.eigenvalues[:2], dense.eigenvalues[:2], atol=1e-8)
    assert sparse.lambda_max == pytest.approx(dense.lambda_max, abs=1e-8)
    values, vector = lanczos(problem, factors, k=1)
    matrix = np.asarray(hessian(problem, factors))
    np.testing.assert_allclose(matrix @ vector, values[0] * vector, atol=1e-6)


def test_dense_spectrum_beyond_the_limit_is_refused_and_lanczos_named():
    problem, factors, _ = case("reconstruction", 2)
    with pytest.raises(ValueError, match=r"N = 27 .*lanczos"):
        hessian_spectrum(problem, factors, method="dense", max_dense=20)


@pytest.mark.float32
def test_hessian_signs_are_refused_in_float32():
    problem, factors, _ = case("reconstruction", 2)
    with pytest.raises(ValueError, match="float64"):
        hessian_spectrum(problem, factors)


def test_near_critical_test_follows_its_formula():
    assert classify_near_critical(1e-4, -0.2, 2, 1.0)[0] == "saddle"
    assert classify_near_critical(1e-2, -0.01, 2, 1.0)[0] == "minimum"
    kind, g_hat, lam = classify_near_critical(2.0, -8.0, 3, 8.0)
    assert g_hat == pytest.approx(2.0 / 8 ** (5 / 3)) and lam == pytest.approx(8 / (3 * 16))
    assert kind == ("saddle" if lam > 0.3 * g_hat**0.65 else "minimum")


def test_the_class_of_a_point_does_not_depend_on_the_scale_of_the_data():
    near = [np.diag([0.9, 0.0, 0.0])] * 2
    for scale in (1e-12, 1.0, 1e6):
        problem = make_problem("reconstruction", target=scale * np.diag([1.0, 0.5, 0.2]))
        root = np.sqrt(scale)
        assert classify_critical_point(problem, [root * w for w in near]).kind == "not_critical"
        saddle = [root * np.diag([1.0, 0.0, 0.0])] * 2
        assert classify_critical_point(problem, saddle).kind == "strict_saddle"


def test_no_inertia_is_told_from_the_extreme_eigenvalues_alone():
    problem = make_problem("reconstruction", target=np.eye(32))
    point = classify_critical_point(problem, [np.diag(np.arange(32) < 31).astype(float)] * 2)
    assert point.kind == "strict_saddle" and point.inertia is None
    assert point.lambda_min == pytest.approx(-1.0)


def test_inertia_counts_signs_with_a_relative_tolerance():
    assert inertia([-1.0, -1e-12, 0.0, 1e-11, 2.0]) == (1, 3, 1)
    assert inertia([-0.1, 1.0], tau=0.2) == (0, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_sharpness_is_the_largest_curvature_of_the_loss(kind):
    problem = case(kind, 2)[0]
    rows, cols = problem.shape
    basis = jnp.eye(rows * cols).reshape(-1, rows, cols)
    matrix = jax.vmap(problem.curvature)(basis).reshape(rows * cols, -1)
    assert float(problem.sharpness) == pytest.approx(np.linalg.eigvalsh(matrix)[-1])


def test_recorded_inertia_takes_a_tolerance_of_ones_own():
    problem, factors, _ = case("reconstruction", 2)
    common = dict(lr=0.01, steps=1, record=("hessian",), sigma=())
    exact, coarse = (
        simulate(problem, factors, inertia_tolerance=tau, **common).rows for tau in (0.0, 1e6)
    )
    values = hessian_spectrum(problem, factors).eigenvalues
    assert tuple(exact["inertia"][0]) == inertia(values) and exact["inertia"][0][0] > 0
    assert tuple(coarse["inertia"][0]) == (0, len(values), 0)
    with pytest.raises(ValueError, match=r"inertia_tolerance: -1\.0 must not be negative"):
        simulate(problem, factors, inertia_tolerance=-1.0, **common)
