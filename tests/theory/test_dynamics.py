"""Exact identities of the dynamics, resuming, vmapping, aligned runs, gradient flow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theory import closed_form, dynamics
from theory.dynamics import certify, simulate, simulate_aligned
from theory.factorization import balance_defects, gauge_transform, initialize, product
from theory.optimizers import gradients, make_optimizer
from theory.problem import make_problem, random_problem, spectrum_target
from theory.stages import Escape, certificate, confirm_swaps, detect, stages

LIGHT = ("loss", "grad_norm", "singular_values")


def small(depth=3, dim=4, alpha=1e-2, sigma=(1.0, 0.5), seed=0, init="gaussian"):
    key = jax.random.key(seed)
    target = spectrum_target(key, (dim, dim), jnp.asarray(sigma))
    problem = make_problem("reconstruction", target=target)
    dims = (dim,) * (depth + 1)
    factors = initialize(jax.random.fold_in(key, 1), dims, init, alpha=alpha, target=target)
    return problem, factors


def flat(factors):
    return np.concatenate([np.ravel(w) for w in factors])


def test_balance_defects_change_by_the_exact_second_order_identity():
    problem, factors = small(depth=4)
    lr = 0.05
    for _ in range(3):
        grads = gradients(problem, factors)[2]
        moved = tuple(w - lr * g for w, g in zip(factors, grads))
        for j in range(3):
            change = balance_defects(moved)[j] - balance_defects(factors)[j]
            exact = lr**2 * (grads[j + 1].T @ grads[j + 1] - grads[j] @ grads[j].T)
            np.testing.assert_allclose(change, exact, atol=1e-14)
        factors = moved


@pytest.mark.parametrize("depth", [2, 3])
def test_scaling_by_two_to_the_kL_leaves_the_mantissas_bitwise_unchanged(depth):
    problem, factors = small(depth=depth)
    k, lr = 3, 0.07
    c = 2.0 ** (k * depth)
    scaled = make_problem("reconstruction", target=c * problem.target)
    bigger = tuple(2.0**k * w for w in factors)
    # c^-(2 - 2/L) = 2^(-k (2L - 2))
    scaled_lr = lr * 2.0 ** (-k * (2 * depth - 2))
    for _ in range(40):
        factors = tuple(w - lr * g for w, g in zip(factors, gradients(problem, factors)[2]))
        bigger = tuple(w - scaled_lr * g for w, g in zip(bigger, gradients(scaled, bigger)[2]))
    np.testing.assert_array_equal(flat(bigger), 2.0**k * flat(factors))


@pytest.mark.parametrize(
    ("name", "equivariant"),
    [
        ("gd", True),
        ("momentum", True),
        ("nesterov", True),
        ("group_rmsprop", True),
        ("adam", False),
        ("rmsprop", False),
    ],
)
def test_the_gauge_commutes_with_norm_based_methods_and_not_with_coordinate_wise_ones(
    name, equivariant
):
    problem, factors = small(alpha=0.1)
    rng = np.random.default_rng(0)
    bases = [jnp.asarray(np.linalg.qr(rng.standard_normal((4, 4)))[0]) for _ in range(4)]
    left, right, inner = bases[0], bases[1], bases[2:]
    turned = make_problem("reconstruction", target=left @ problem.target @ right.T)
    options = dict(optimizer=name, lr=0.02, steps=60, record_every=60, record=("loss",), sigma=())
    plain = simulate(problem, factors, **options).state.factors
    other = simulate(turned, gauge_transform(factors, left, right, inner), **options).state.factors
    gap = np.abs(flat(gauge_transform(plain, left, right, inner)) - flat(other)).max()
    assert gap < 1e-12 if equivariant else gap > 1e-5


def test_an_aligned_run_is_the_scalar_recursion_and_tends_to_the_flow_linearly_in_eta():
    sigma, alpha, depth = (1.0, 0.5), 1e-2, 2
    problem, factors = small(depth=depth, sigma=sigma, alpha=alpha, init="aligned")
    lr = 0.1
    run = simulate(problem, factors, lr=lr, steps=120, record_every=10, record=LIGHT)
    modes = closed_form.mode_descent(alpha, sigma, depth, lr, 120)
    np.testing.assert_allclose(run.rows["singular_values"][:, :2], modes[::10], atol=1e-12)
    fast = simulate_aligned(sigma, depth, alpha, dim=4, lr=lr, steps=120, record_every=10)
    np.testing.assert_allclose(fast["singular_values"][:, :2], modes[::10], atol=1e-12)
    np.testing.assert_allclose(fast["loss"], run.rows["loss"], atol=1e-12)
    np.testing.assert_allclose(fast["grad_norm"], run.rows["grad_norm"], atol=1e-12)
    errors = []
    for eta in (0.1, 0.05, 0.025):
        steps = round(12 / eta)
        flow = closed_form.mode_flow(eta * np.arange(steps + 1), alpha, 1.0, 2)
        errors.append(np.abs(closed_form.mode_descent(alpha, 1.0, 2, eta, steps) - flow).max())
    assert 1.7 < errors[0] / errors[1] < 2.3 and 1.7 < errors[1] / errors[2] < 2.3


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit_and_rows_do_not_change_it():
    problem, factors = small()
    for name, sigma in (("momentum", None), ("group_rmsprop", ())):
        options = dict(optimizer=name, lr=0.02, record=("loss",), sigma=sigma)
        whole = simulate(problem, factors, steps=300, record_every=20, **options)
        first = simulate(problem, factors, steps=100, record_every=20, **options)
        rest = simulate(problem, state=first.state, steps=200, record_every=20, **options)
        for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(rest.state), strict=True):
            np.testing.assert_array_equal(a, b)
        if sigma is None:
            assert stages(whole) == stages(rest)
        else:
            sparse = simulate(problem, factors, steps=300, record_every=150, **options)
            np.testing.assert_array_equal(flat(whole.state.factors), flat(sparse.state.factors))


def test_vmapped_runs_equal_single_runs():
    problem, _ = small()
    starts = [small(seed=s)[1] for s in range(3)]
    stacked = tuple(jnp.stack(parts) for parts in zip(*starts))
    rates = jnp.asarray([0.05, 0.1, 0.08])
    gd = make_optimizer("gd")

    def one(factors, lr):
        state = dynamics.init_state(gd, factors, lr)
        return dynamics.run(problem, gd, lr, state, 100, 25, LIGHT)

    many = jax.jit(jax.vmap(one))(stacked, rates)
    single = jax.jit(one)
    for i in range(3):
        alone = single(starts[i], rates[i])
        np.testing.assert_allclose(
            many.rows["singular_values"][i], alone.rows["singular_values"], atol=1e-12
        )
        assert int(many.status[i]) == int(alone.status)


def test_gradient_flow_conserves_the_balance_defects_and_gd_drifts_linearly_in_eta():
    problem, factors = small(alpha=0.3)
    before = balance_defects(factors)

    def drift(name, lr, steps):
        end = simulate(
            problem,
            factors,
            optimizer=name,
            lr=lr,
            steps=steps,
            record_every=steps,
            record=("loss",),
            sigma=(),
        )
        return max(
            float(jnp.abs(a - b).max()) for a, b in zip(balance_defects(end.state.factors), before)
        )

    assert drift("gradient_flow", 1.0, 10) < 1e-8
    coarse, fine = drift("gd", 0.02, 500), drift("gd", 0.01, 1000)
    assert 1.8 < coarse / fine < 2.2


def test_adaptive_step_keeps_the_dimensionless_step_and_learns_the_target():
    problem, factors = small(alpha=1e-2)
    for rule in ("product", "hessian"):
        run = simulate(
            problem,
            factors,
            optimizer="adaptive_gd",
            optimizer_kwargs={"c": 0.3, "rule": rule, "lr_max": 0.5},
            lr=0.1,
            steps=500,
            record_every=500,
            record=("adjusted_lr", "singular_values"),
            sigma=(),
        )
        np.testing.assert_allclose(run.rows["singular_values"][-1, :2], [1.0, 0.5], atol=1e-2)
        # At the balanced minimum both rules are c / (L sigma_1^(2 - 2/L)).
        assert run.rows["adjusted_lr"][-1] == pytest.approx(0.1, rel=0.05)


def test_completion_is_biased_to_low_rank_at_depth_three_and_not_at_depth_one():
    key = jax.random.key(3)
    problem = random_problem(key, "completion", (10, 10), (1.0, 0.4), observed=0.7)
    target = np.asarray(problem.target)
    hidden = np.asarray(1 - problem.data["mask"])

    def error(depth, lr, steps):
        factors = initialize(jax.random.fold_in(key, 5), (10,) * (depth + 1), alpha=1e-4)
        run = simulate(
            problem, factors, lr=lr, steps=steps, record_every=steps, record=("loss",), sigma=()
        )
        gap = np.asarray(product(run.state.factors)) - target
        return (gap**2).sum() / (target**2).sum()

    unobserved = ((hidden * target) ** 2).sum() / (target**2).sum()
    assert error(1, 20.0, 400) == pytest.approx(unobserved, rel=1e-2)
    assert error(3, 6.0, 12_000) <= 1e-3


def test_the_certificate_tells_escapes_from_rings():
    problem, factors = small(depth=2, alpha=1e-5, sigma=(1.0, 0.4))
    gd = simulate(problem, factors, eta_hat=0.3, steps=400, record_every=100, record=LIGHT)
    report = stages(gd)
    assert [e.kind for e in report.escapes] == ["rank", "rank"]
    assert all(certify(gd, escape) >= 1 for escape in report.escapes)
    heavy = simulate(
        problem, factors, optimizer="momentum", lr=0.015, steps=600, record_every=1, record=LIGHT
    )
    found = stages(heavy)
    assert found.n_stages == 2 and found.n_rings >= 1
    # An overshoot that loses as much as a swap is none by the certificate; stages have theirs.
    certificates = {escape.valley_step: certify(heavy, escape) for escape in found.escapes}
    confirmed = confirm_swaps(found, certificates)
    assert found.n_swaps >= 1 and confirmed.n_swaps == 0
    assert confirmed.n_rings == found.n_rings + found.n_swaps
    assert [e.kind for e in confirmed.escapes] == ["rank", "rank"]
    # The host form on every step and the streaming form are the same detectors.
    rows = heavy.rows
    again = detect(rows["grad_norm"], rows["loss"], rows["singular_values"], heavy.sigma)
    assert again.escapes == found.escapes and again.activation_steps == found.activation_steps
    assert again.plateau_visited == found.plateau_visited and again.n_rings == found.n_rings


def test_steps_past_the_edge_of_stability_end_as_oscillating_or_diverged():
    problem, factors = small(depth=3, alpha=1e-2)
    with pytest.warns(UserWarning, match="edge of stability"):
        run = simulate(problem, factors, eta_hat=2.6, steps=1500, record_every=500, record=LIGHT)
    assert run.status in ("oscillating", "diverged")
    capped = simulate(problem, factors, eta_hat=0.3, steps=60, record_every=20, record=LIGHT)
    assert capped.status == "max_steps"


@pytest.mark.parametrize("norm", ["half_sum", "mean"])
@pytest.mark.parametrize("kind", ["reconstruction", "completion", "sensing", "regression"])
def test_eta_hat_is_the_step_times_the_curvature_whatever_the_loss(kind, norm):
    problem = random_problem(jax.random.key(1), kind, (4, 4), (2.0, 0.5), loss_norm=norm)
    factors = initialize(jax.random.key(2), (4, 4, 4, 4), alpha=1e-2)
    options = dict(steps=1, record=("loss",), sigma=(2.0, 0.5), alpha=1e-6)
    run = simulate(problem, factors, eta_hat=0.3, **options)
    unit = 3 * 2.0 ** (2 - 2 / 3)
    assert run.lr * unit * float(problem.sharpness) == pytest.approx(0.3)


def test_a_state_without_its_gradient_cannot_go_on_with_the_cosine():
    problem, factors = small()
    run = simulate(problem, factors, lr=0.01, steps=2, record=("loss",), sigma=())
    with pytest.raises(ValueError, match="'gradient_cosine' needs the gradient before"):
        simulate(problem, state=run.state, lr=0.01, steps=2, record=("gradient_cosine",), sigma=())


def test_a_certificate_weighs_each_point_with_the_rate_of_its_own_update():
    problem, factors = small(depth=2, alpha=1e-2)
    options = dict(optimizer="group_rmsprop", lr=1e-2, steps=12, sigma=())
    run = simulate(problem, factors, record=("adjusted_lr", "hessian"), **options)
    # Row t + 1 holds the rate of update t.
    rates, lowest = run.rows["adjusted_lr"][1:11], run.rows["lambda_min"][:10]
    escape = Escape(0, 9, 0, 1, "rank", 0.1)
    assert certify(run, escape) == pytest.approx(certificate(np.arange(10), lowest, rates))


def test_alpha_below_the_start_of_the_flow_gives_the_known_half_rise_time():
    exact = functools.partial(closed_form.half_rise_time, 1e-5, 0.7)
    assert exact(2) == pytest.approx(np.log(0.7 / 1e-5 - 1) / 1.4, rel=1e-12)
    assert closed_form.separability((1.0, 0.5), 3, 1e-4) > 1.25
    assert closed_form.separability((1.0, 0.9), 2, 1e-2) < 0.8
    null = closed_form.null_mode_flow(np.array([0.0, 50.0]), 1e-2, 2)
    np.testing.assert_allclose(null, [1e-2, 1 / (1 / 1e-2 + 2 * 50.0)])
    np.testing.assert_array_equal(closed_form.mode_flow([0.0, 50.0], 1e-2, 0.0, 2), null)
