"""Detectors on made-up series and their streaming form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theory.stages import (
    KINDS,
    certificate,
    detect,
    escape_kind,
    ordered_rank,
    sample_points,
    wilson_interval,
    zigzag,
)
from theory.streaming import EVENTS, detector_init, detector_report, detector_update


def test_zigzag_keeps_the_first_of_ties_and_marks_an_unfinished_rise():
    series = [1.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.5, 0.9]
    np.testing.assert_array_equal(zigzag(series, 0.3), [[1, 3, 1], [5, 7, 0]])
    assert len(zigzag(np.zeros(10))) == 0 and len(zigzag(-np.arange(9.0))) == 0
    with pytest.raises(ValueError, match="NaN"):
        zigzag([0.0, np.nan])


def test_kinds_follow_rank_and_loss_drop():
    assert escape_kind(0, 1, 0.0) == "rank" and escape_kind(0, 3, 0.0) == "merged"
    assert escape_kind(1, 1, 1e-2) == "swap" and escape_kind(1, 1, 1e-4) == "ring"
    assert escape_kind(2, 1, 0.0) == "ring"


def test_the_rank_respects_the_order_of_the_modes():
    np.testing.assert_array_equal(
        ordered_rank([[0.4, 0.3], [0.6, 0.1], [0.6, 0.3]], [1.0, 0.5]), [0, 1, 2]
    )


def made_up(length=400, seed=0):
    """A product with two modes that rise in turn, wiggling, and a gradient norm with valleys."""
    rng = np.random.default_rng(seed)
    t = np.arange(length)
    modes = [1 / (1 + np.exp(-(t - 100) / 6)), 0.5 / (1 + np.exp(-(t - 250) / 9))]
    left, right = (np.linalg.qr(rng.standard_normal((4, 4)))[0] for _ in range(2))
    products = sum(
        m[:, None, None] * np.outer(left[:, i], right[:, i]) for i, m in enumerate(modes)
    )
    products = products + 1e-3 * np.sin(t / 3)[:, None, None] * np.outer(left[:, 2], right[:, 2])
    speed = sum(np.gradient(m) for m in modes) + 1e-6 + 1e-3 * (1 + np.sin(t / 2)) * (t > 320)
    loss = 0.5 * sum((m[-1] - m) ** 2 for m in modes) + 1e-9
    return t, loss, speed, products


def test_the_streaming_detectors_equal_the_host_ones_for_any_chunking_with_few_decompositions():
    t, loss, grad, products = made_up()
    sigma = (1.0, 0.5)
    host = detect(grad, loss, np.linalg.svd(products, compute_uv=False), sigma)
    assert host.n_stages == 2 and host.n_plateaus == 2 and host.n_rings > 3
    feed = (jnp.asarray(t), jnp.asarray(loss), jnp.asarray(grad), jnp.asarray(products))
    update = jax.jit(detector_update)
    for chunk in (400, 50):
        state = detector_init(jnp.asarray([*sigma, 0.0]), (4, 4))
        for start in range(0, 400, chunk):
            state = update(state, *(x[start : start + chunk] for x in feed))
        found = detector_report(state)
        assert found.escapes == host.escapes
        assert found.activation_steps == host.activation_steps
        assert found.plateau_visited == host.plateau_visited
        assert (found.n_rings, found.final_rank) == (host.n_rings, host.final_rank)
        assert int(state.decompositions) < 120


def test_rows_after_the_end_of_a_run_are_not_looked_at():
    t, loss, grad, products = (jnp.asarray(x) for x in made_up())
    short = jax.jit(detector_update)(
        detector_init(jnp.asarray([1.0, 0.5]), (4, 4)), t, loss, grad, products, t < 200
    )
    alone = detect(
        grad[:200], loss[:200], np.linalg.svd(products[:200], compute_uv=False), (1, 0.5)
    )
    found = detector_report(short)
    assert found.escapes == alone.escapes and found.unfinished == alone.unfinished
    assert found.activation_steps == alone.activation_steps


def test_stages_beyond_the_kept_events_are_counted():
    # The gradient norm rises and falls in every cycle, the one mode comes and goes with it.
    t = np.arange(1600)
    grad = 1.0 + 0.5 * np.sin(2 * np.pi * t / 20)
    modes = (t // 20 % 2).astype(float)
    loss = 1.0 + 0.5 * (1 - modes) ** 2
    host = detect(grad, loss, modes[:, None], (1.0,))
    state = detector_init(jnp.asarray([1.0]), (1, 1))
    feed = (jnp.asarray(x) for x in (t, loss, grad, modes[:, None, None]))
    found = detector_report(jax.jit(detector_update)(state, *feed))
    counted = host.n_stages + host.n_swaps
    assert counted > EVENTS + 1
    assert (found.n_stages, found.n_swaps, found.n_rings) == (
        host.n_stages,
        host.n_swaps,
        host.n_rings,
    )
    assert found.dropped_events == counted - len(found.escapes) > 0


def test_without_a_target_the_final_iterate_is_the_reference_and_the_report_says_so():
    _, loss, grad, products = made_up()
    report = detect(grad, loss, np.linalg.svd(products, compute_uv=False))
    assert report.reference == "final iterate" and report.n_stages == 2
    assert report.sigma[:2] == pytest.approx((1.0, 0.5), abs=1e-3)


def test_the_certificate_integrates_only_negative_curvature():
    steps = np.arange(0, 101, 5)
    assert certificate(steps, np.full(21, -0.2), 0.1) == pytest.approx(2.0)
    assert certificate(steps, np.full(21, 0.3), 0.1) == 0.0
    assert len(sample_points(0, 1000)) >= 20 and sample_points(3, 5).tolist() == [3, 4, 5]


def test_wilson_interval_holds_the_known_value():
    low, high = wilson_interval(597, 600)
    assert (round(low, 4), round(high, 4)) == (0.9854, 0.9983)
    assert set(KINDS) == {"rank", "merged", "swap", "ring"}
