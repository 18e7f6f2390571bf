"""Section 13 of the specification: every bad input gets one line that says what is wrong."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.dmf import get_config
from theory import presets, simulate, simulate_aligned
from theory.factorization import initialize, warn_bottleneck
from theory.problem import check_spectrum, make_problem, random_problem
from theory.stages import stages
from theory.sweep import sweep

ROOT = Path(__file__).parents[2]
KEY = jax.random.key(0)
EYE = np.eye(3)


def problem():
    return make_problem("reconstruction", target=np.diag([1.0, 0.5, 0.2]))


def factors(dims=(3, 3, 3), alpha=1e-2):
    return initialize(KEY, dims, alpha=alpha)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: simulate(problem(), [np.ones((2, 3)), np.ones((3, 4))], lr=0.1, steps=5),
            r"W2: shape \(3, 4\) does not follow W1 of shape \(2, 3\)",
        ),
        (lambda: initialize(KEY, (3, 3, 4), alpha=0.1, target=EYE), r"\(4, 3\).*\(3, 3\)"),
        (lambda: simulate(problem(), factors((4, 3, 3)), lr=0.1, steps=5), r"\(3, 4\).*\(3, 3\)"),
        (lambda: factors(alpha=0.0), "alpha: 0.0 must be positive"),
        (lambda: factors(alpha=-1.0), "alpha: -1.0 must be positive"),
        (lambda: factors(alpha=float("nan")), "alpha: nan must be positive"),
        (lambda: initialize(KEY, (3, 3, 3), alpha=0.1, factor_scale=0.3), "not both"),
        (lambda: simulate(problem(), factors(), lr=0.0, steps=5), "lr: 0.0 must be positive"),
        (lambda: simulate(problem(), factors(), lr=-1.0, steps=5), "lr: -1.0 must be positive"),
        (lambda: simulate(problem(), factors(), lr=0.1, eta_hat=0.3, steps=5), "not both"),
        (lambda: make_problem("completion", target=EYE, mask=0.5 * EYE), "mask: entries must be 0"),
        (lambda: make_problem("completion", target=EYE, mask=0 * EYE), "mask: no entry"),
        (
            lambda: make_problem("completion", target=EYE, mask=np.ones((2, 3))),
            r"\(2, 3\).*\(3, 3\)",
        ),
        (
            lambda: make_problem("sensing", A=np.ones((4, 3, 3)), y=np.ones(5)),
            r"y: shape \(5,\) does not match the 4",
        ),
        (lambda: make_problem("regression", X=np.ones((3, 7)), Y=np.ones((3, 6))), "sample count"),
        (lambda: check_spectrum([1.0, 0.0]), "must be positive"),
        (lambda: check_spectrum([1.0, -0.5]), "must be positive"),
        (lambda: check_spectrum([1, 0.5, 0.2, 0.1], (3, 5)), "rank 4 exceeds"),
        (lambda: random_problem(KEY, "reconstruction", (2, 5), (1.0, 0.5, 0.2)), "rank 3 exceeds"),
        (
            lambda: simulate(problem(), [0 * EYE, 0 * EYE], lr=0.1, steps=5),
            "origin is a critical point",
        ),
        (
            lambda: initialize(KEY, (3, 3, 3), "custom", custom=[0 * EYE, 0 * EYE]),
            "origin is a critical point",
        ),
        (lambda: initialize(KEY, (3, 3, 3), "aligned", alpha=0.1), "needs a known target"),
        (
            lambda: simulate(problem(), factors(), lr=0.1, steps=5, record_every=0),
            "record_every: 0",
        ),
        (lambda: simulate_aligned((1.0,), 3, -0.1, steps=5), "alpha: -0.1 must be positive"),
        (lambda: simulate_aligned((1.0,), 3, 0.1, steps=5, record_every=6), "record_every: 6"),
        (
            lambda: simulate(problem(), factors(), lr=0.1, steps=5, record_every=6),
            "record_every: 6",
        ),
        (lambda: simulate(problem(), factors(), lr=0.1, steps=5, record=("lss",)), "unknown 'lss'"),
        (lambda: simulate(problem(), factors(), lr=0.1, steps=5, optimizer="sgd"), "choose one of"),
        (
            lambda: make_problem("reconstruction", target=EYE * np.inf),
            "target: contains non-finite",
        ),
        (
            lambda: make_problem("regression", X=np.full((3, 4), np.nan), Y=np.ones((3, 4))),
            "X: contains non-finite",
        ),
        (
            lambda: simulate(problem(), [EYE * np.nan, EYE], lr=0.1, steps=5),
            "W1: contains non-fini",
        ),
        (lambda: make_problem("completions", target=EYE), "unknown kind"),
        (lambda: initialize(KEY, (3, 3, 3), "gausian", alpha=0.1), "choose one of"),
        (
            lambda: initialize(KEY, (3, 3, 3), "unbalanced", alpha=0.1, layer_scales=(2.0, 1.0)),
            "product is 2",
        ),
    ],
)
def test_a_bad_input_is_one_line_that_names_it(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: warn_bottleneck((5, 2, 5), 3), "bottleneck width 2 < target rank 3"),
        (lambda: check_spectrum([0.5, 1.0]), "sorted"),
        (
            lambda: make_problem("completion", target=EYE, mask=np.diag([1.0, 1.0, 0.0])),
            "row 2 is fully unobserved",
        ),
        (
            lambda: initialize(
                KEY, (3, 3, 3), "identity", alpha=0.1, target=np.diag([1.0, -0.5, 0.2])
            ),
            "invariant subspace",
        ),
    ],
)
def test_a_doubtful_input_is_warned_about(call, message):
    with pytest.warns(UserWarning, match=message):
        call()


def test_stages_beyond_a_bottleneck_are_not_expected():
    narrow = initialize(KEY, (3, 2, 3), alpha=1e-2)
    with pytest.warns(UserWarning, match="bottleneck"):
        run = simulate(problem(), narrow, steps=40, record=("loss",))
    assert run.sigma == pytest.approx((1.0, 0.5))
    assert run.status == "max_steps"
    with pytest.warns(UserWarning, match="bottleneck"):
        longer = simulate(problem(), narrow, steps=200, record=("loss",))
    assert longer.status == "converged"
    # The best approximation of rank 2 misses the mode 0.2.
    assert longer.trace["loss"][-1] == pytest.approx(0.02, abs=1e-4)


def test_a_small_separability_index_is_warned_about():
    with pytest.warns(UserWarning, match="separability index"):
        run = simulate(problem(), factors((3, 3, 3, 3)), steps=60, record=("loss",), alpha=1e-2)
    assert run.separability < 1.25


def test_stages_without_a_target_are_relative_to_the_final_iterate_and_say_so():
    run = simulate(
        problem(),
        factors(),
        lr=0.1,
        steps=60,
        sigma=(),
        record=("loss", "grad_norm", "singular_values"),
    )
    with pytest.warns(UserWarning, match="relative to the final iterate"):
        report = stages(run)
    assert report.reference == "final iterate"


def test_identity_start_may_be_rectangular():
    wide = initialize(KEY, (4, 2, 3), "identity", alpha=0.25)
    assert [w.shape for w in wide] == [(2, 4), (3, 2)]
    np.testing.assert_allclose(wide[0], 0.5 * np.eye(2, 4))


@pytest.mark.float32
def test_a_tiny_alpha_is_refused_in_float32():
    with pytest.raises(ValueError, match="x64"):
        initialize(KEY, (3, 3, 3), alpha=1e-6)
    assert initialize(KEY, (3, 3, 3), alpha=1e-3)[0].dtype == jnp.float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": -1.0}, "alpha: -1.0 must be positive"),
        ({"factor_scale": 0.1}, "give alpha or factor_scale, not both"),
        ({"lr": -0.1}, "lr: -0.1 must be positive"),
        ({"lr": 0.1, "eta_hat": 0.4}, "give lr or eta_hat, not both"),
        ({"eta_hat": -1.0}, "eta_hat: -1.0 must be positive"),
        ({"steps": -5}, "steps: -5 must be at least 1"),
        ({"steps": 10, "record_every": 11}, "record_every: 11 must lie in 1"),
        ({"rank": 0}, "rank: 0 must be at least 1"),
        ({"rank": 11}, "sigma: rank 11 exceeds"),
        ({"spectrum": "flat"}, "spectrum: unknown 'flat'"),
        ({"spectrum": "geometric(x)"}, "spectrum: the ratio"),
        ({"spectrum": "explicit"}, "needs the key sigma"),
        ({"spectrum": "explicit", "sigma": (1.0, 0.0)}, "must be positive"),
        ({"problem": "denoising"}, "unknown kind 'denoising'"),
        ({"problem": "completion", "observed": 2.0}, "observed: 200 entries of 100"),
        ({"optimizer": "sgd"}, "optimizer: unknown 'sgd'"),
        ({"optimizer_kwargs": {"mom": 0.9}}, "takes no 'mom'"),
        ({"init": "gausian"}, "init: unknown 'gausian'"),
        ({"init": "unbalanced", "layer_scales": (2.0, 1.0, 1.0)}, "their product is 2"),
        ({"init": "custom"}, "custom: init 'custom' needs"),
        ({"symmetry": "skew"}, "symmetry: unknown 'skew'"),
        ({"loss_norm": "sum"}, "loss_norm: 'sum' is not one of"),
        ({"dims": (3, 0, 3)}, "dims: .* positive widths"),
    ],
)
def test_a_wrong_value_of_a_config_is_one_line_before_anything_runs(values, message, tmp_path):
    config = get_config("demo")
    with config.unlocked():
        config.update(values)
    with pytest.raises(ValueError, match=message) as caught:
        presets.execute(config, tmp_path, lambda text: None)
    assert "\n" not in str(caught.value)


def test_a_dense_hessian_is_not_recorded_beyond_its_limit():
    wide = initialize(KEY, (32, 32, 32), alpha=1e-2)
    target = make_problem("reconstruction", target=np.eye(32))
    with pytest.raises(ValueError, match=r"N = 2048 exceeds 2000; .*lanczos"):
        simulate(target, wide, lr=0.1, steps=5, record=("hessian",))


def test_a_sweep_needs_lanes_and_a_chunk():
    for name in ("lanes", "chunk"):
        with pytest.raises(ValueError, match=f"{name}: 0 must be at least 1"):
            sweep([], **{name: 0})


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--config=configs/dmf.py:demo", "--config.rnk=3"], "--config.rnk: no such key; did you"),
        (["--config=configs/dmf.py:dem"], "--config: unknown preset 'dem'; choose one of demo,"),
        (["--config=configs/dmff.py"], "--config: no file 'configs/dmff.py'"),
        (["--config=configs/dmf.py:demo", "--config.depth=abc"], "--config.depth=abc: invalid"),
        ([], "--config configs/dmf.py:PRESET is missing"),
    ],
)
def test_a_wrong_command_line_ends_with_one_line(words, wanted, tmp_path):
    command = [sys.executable, "-m", "theory", *words, "--workdir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert wanted in done.stderr and done.stderr.count("\n") == 1
