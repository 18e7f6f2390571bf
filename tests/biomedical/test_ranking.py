"""Rankings: planted orders, ties, missing results, and how often intervals cover the truth."""

import numpy as np
import pytest
from scipy.stats import wilcoxon

from jaxmodels.biomedical import ranking


def scores_of(gaps, cases=30, noise=0.05, seed=0):
    rng = np.random.default_rng(seed)
    return 0.5 + np.asarray(gaps)[:, None] + noise * rng.normal(size=(len(gaps), cases))


@pytest.mark.parametrize("scheme", ranking.SCHEMES)
def test_every_scheme_recovers_a_planted_order(scheme):
    values = scores_of([0.0, 0.3, 0.1, 0.2])
    np.testing.assert_array_equal(ranking.rank(values, scheme), [4, 1, 3, 2])
    np.testing.assert_array_equal(ranking.rank(-values, scheme, larger_better=False), [4, 1, 3, 2])


@pytest.mark.parametrize("scheme", ranking.SCHEMES)
def test_identical_algorithms_tie(scheme):
    values = scores_of([0.0, 0.3])
    values = np.concatenate([values, values[1:]])
    np.testing.assert_array_equal(ranking.rank(values, scheme), [3, 1, 1])


def test_bootstrap_intervals_cover_the_true_rank():
    covered = []
    for seed in range(40):
        values = scores_of([0.0, 0.02, 0.04], cases=20, seed=seed)
        low, high = ranking.bootstrap_ranking(values, samples=80, seed=seed).interval()
        covered.append((low <= [3, 2, 1]) & (high >= [3, 2, 1]))
    assert np.mean(covered) >= 0.9


def test_missing_results_count_as_worst_or_are_left_out():
    values = np.asarray([[0.9, np.nan, 0.9], [0.8, 0.8, 0.8], [0.7, 0.7, np.nan]])
    np.testing.assert_array_equal(ranking.aggregate_then_rank(values), [2, 1, 3])
    np.testing.assert_array_equal(ranking.aggregate_then_rank(values, missing="na.rm"), [1, 2, 3])
    np.testing.assert_array_equal(ranking.per_case_ranks(values)[:, 1], [3, 1, 2])
    assert ranking.rank_values(np.asarray([np.nan, np.nan, 2.0]), ties="average").tolist() == [
        2.5,
        2.5,
        1,
    ]


def test_signed_rank_test_equals_scipy_with_ties_and_zeros():
    rng = np.random.default_rng(3)
    a, b = np.round(rng.random(40), 1), np.round(rng.random(40), 1)
    expected = wilcoxon(a, b, alternative="greater", correction=True, method="asymptotic").pvalue
    assert ranking.signed_rank_p_value(a, b) == pytest.approx(expected)
    assert np.isnan(ranking.signed_rank_p_value(a, a))
    assert not ranking.significance(np.asarray([np.nan]))


def test_holm_is_monotone_and_no_smaller_than_the_raw_values():
    p = np.asarray([0.01, 0.04, np.nan, 0.03])
    np.testing.assert_allclose(ranking.holm(p), [0.03, 0.06, np.nan, 0.06])


def test_one_algorithm_or_one_case_is_refused():
    with pytest.raises(ValueError, match="bootstrapping with one case is not sensible"):
        ranking.bootstrap_ranking(np.ones((3, 1)))
    with pytest.raises(ValueError, match="one algorithm is not sensible"):
        ranking.rank(np.ones((1, 5)))
    with pytest.raises(ValueError, match="no ranking scheme"):
        ranking.rank(np.ones((2, 2)), "best")
