"""Dirichlet fits recover what they were drawn from, and measures keep their digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxmodels.security import prior_networks, uncertainty
from jaxmodels.security.detection import detect_adversarial, detection_metrics


def fit_all(probs):
    return {
        name: np.asarray(uncertainty.moment_match(probs, name).alpha0)
        for name in uncertainty.ESTIMATORS
    }


def test_moment_matching_recovers_the_concentration_of_drawn_heads():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for classes in (3, 19):
            alphas = rng.lognormal(0.5, 1, (10, classes))
            found = fit_all(np.stack([rng.dirichlet(alpha, 2000) for alpha in alphas]))
            for name, limit in (("trace", 0.1), ("minka", 0.1), ("geo", 0.1), ("first", 0.15)):
                assert (abs(found[name] / alphas.sum(-1) - 1) < limit).all(), name


def test_the_trace_is_exact_on_population_moments():
    alpha = np.array([0.3, 1.2, 4.0, 2.5])
    a0 = alpha.sum()
    mean = alpha / a0
    moments = uncertainty.Moments(jnp.asarray(mean), jnp.asarray(mean * (1 - mean) / (a0 + 1)))
    fit = uncertainty.match_moments(moments)
    np.testing.assert_allclose(fit.alpha0, a0, rtol=1e-5)
    np.testing.assert_allclose(fit.alpha, alpha, rtol=1e-5)


def test_agreeing_heads_are_certain_and_disagreeing_heads_are_not():
    same = jnp.broadcast_to(jax.nn.softmax(jnp.arange(100.0) / 10), (1, 4, 100))
    measures = jax.jit(uncertainty.measures)
    fit = uncertainty.moment_match(same)
    measured = measures(fit.alpha)
    assert np.isfinite(fit.alpha0).all() and fit.alpha0[0] >= 1e4 and measured["mi"][0] < 1e-4
    apart = jnp.eye(100)[None, :4]
    fit = uncertainty.moment_match(apart)
    measured = measures(fit.alpha)
    assert fit.alpha0[0] < 0.2
    np.testing.assert_allclose(measured["mi"], measured["ent"], rtol=0.1)
    assert all(np.isfinite(v).all() for v in measured.values())


def test_the_order_of_heads_does_not_matter_and_classes_keep_theirs():
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(np.ones(6), (3, 4)).astype(np.float32)
    heads, classes = rng.permutation(4), rng.permutation(6)
    fit = uncertainty.moment_match(probs)
    turned = uncertainty.moment_match(probs[:, heads][:, :, classes])
    np.testing.assert_allclose(turned.alpha, fit.alpha[:, classes], rtol=1e-4)
    a, b = map(jax.jit(uncertainty.measures), (fit.alpha, turned.alpha))
    for name in uncertainty.MEASURES:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [1.0, 0.3, 17.0, 1e4])
def test_differential_entropy_is_scipys(size):
    alpha = size * np.array([1.0, 1.0, 1.0, 1.0] if size == 1 else [0.5, 1.0, 2.0, 0.25])
    with jax.enable_x64(True):
        found = uncertainty.measures(jnp.asarray(alpha))["d_ent"]
    np.testing.assert_allclose(found, scipy.stats.dirichlet.entropy(alpha), atol=1e-6)


def test_mutual_information_keeps_its_digits_in_float32():
    pbar = np.array([0.7, 0.2, 0.1], np.float32)
    for a0 in (1e5, 1e7):
        found = uncertainty.measures(jnp.asarray(pbar * a0, jnp.float32))
        np.testing.assert_allclose(found["mi"], 2 / (2 * a0), rtol=1e-3)
        np.testing.assert_allclose(found["epkl"], 2 / a0, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uncertainty.moment_match(np.ones((2, 1, 3)) / 3), "at least 2 heads, got 1"),
        (lambda: uncertainty.moment_match(np.ones((2, 4, 3))), "must sum to 1.*from_logits=True"),
        (lambda: uncertainty.moment_match(np.ones((2, 4, 2)) / 2, "trase"), "known: trace, minka"),
        (lambda: detection_metrics([0.1, np.nan], [0, 1]), "NaN"),
        (lambda: detection_metrics([0.1, 0.2], [1, 1]), "both classes, got 2 adversarial and 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_detection_counts_ties_as_scikit_learn_and_chance_is_a_half():
    from sklearn.metrics import average_precision_score, roc_auc_score

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    for scores in (rng.normal(size=400).round(1), rng.integers(0, 3, 400) + labels):
        found = detection_metrics(scores, labels)
        assert found.auroc == pytest.approx(roc_auc_score(labels, scores))
        assert found.aupr == pytest.approx(average_precision_score(labels, scores))
    infinite = detection_metrics([np.inf, np.inf, 0.0], [1, 0, 0])
    assert infinite.auroc == 0.75 and infinite.aupr == 0.5  # equal scores, infinite or not, tie
    assert detection_metrics(rng.normal(size=4000), np.arange(4000) % 2).auroc == pytest.approx(
        0.5, abs=0.03
    )


def test_the_protocol_of_successes_leaves_out_failed_attacks():
    clean, attacked = {"s": [0.0, 0.0, 0.0]}, {"s": [1.0, 0.0, 0.0]}
    correct, fooled = [True, True, False], [True, False, True]
    both = [
        detect_adversarial(clean, attacked, correct=correct, fooled=fooled, protocol=p)["s"].auroc
        for p in ("all", "successful")
    ]
    assert both[0] < 1.0 and both[1] == 1.0


def test_dirichlet_divergence_is_zero_at_itself_and_positive_elsewhere():
    p, q = jnp.array([1.0, 2.0, 30.0]), jnp.array([4.0, 2.0, 0.5])
    assert float(prior_networks.kl_divergence(p, p)) == pytest.approx(0, abs=1e-5)
    assert float(prior_networks.kl_divergence(p, q)) > 1
    assert float(prior_networks.kl_divergence(q, p)) > 1
