"""Baselines and metrics beyond the golden cases."""

import numpy as np
import pytest

from jaxmodels.graphs.reviewer_baselines import Popularity, RandomOrder, Review, RuleBased
from jaxmodels.graphs.reviewer_metrics import (
    by_project_size,
    first_ranks,
    fisher_exact,
    project_size,
    ranking_metrics,
)

HISTORY = [
    Review(10, ("ann", "bob"), ("a.c",)),
    Review(10, ("ann",), ("a.c", "b.c")),
    Review(400, ("cid",), ("b.c",)),
]


def test_the_rule_based_score_is_the_sum_of_its_three_terms_over_files():
    model = RuleBased(HISTORY)
    # a.c: 3 reviews on one day; ann 2 of them. b.c: ann day 10 of 10 and 400, cid the last.
    scores = model.scores("zoe", ["a.c", "b.c", "a.c"])
    assert scores["ann"] == pytest.approx(2 / 3 + 1 + 1 + 1 / 2 + 1 / 2 + 1 / 391)
    assert scores["cid"] == pytest.approx(1 / 2 + 1 / 2 + 1)
    assert list(scores) == ["ann", "bob", "cid"]
    assert model.rank("ann", ["a.c"]) == ["bob", "cid"], "the author never, then by popularity"
    assert model.rank(None, ["unknown.c"]) == ["ann", "bob", "cid"]
    assert model.scores(None, []) == {}


def test_recency_prefers_the_latest_reviewers_and_popularity_does_not():
    assert Popularity(HISTORY).rank(None) == ["ann", "bob", "cid"]
    assert Popularity(HISTORY, half_life=30).rank(None)[0] == "cid"
    assert Popularity([]).rank("x") == []


def test_random_order_is_seeded_and_never_has_the_author():
    draws = [RandomOrder(HISTORY, 1).rank("bob") for _ in range(2)]
    assert draws[0] == draws[1] and set(draws[0]) == {"ann", "cid"}


def test_ranks_count_from_one_and_a_miss_is_zero():
    ranks = first_ranks([["a", "b"], ["c"], []], [["b", "z"], ["a"], ["a"]])
    assert ranks.tolist() == [2, 0, 0]
    numbers = ranking_metrics(ranks, top=(1, 2))
    assert numbers == {"top1": 0.0, "top2": pytest.approx(1 / 3), "mrr": pytest.approx(1 / 6)}
    with pytest.raises(ValueError, match="no queries"):
        ranking_metrics(np.array([]))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        first_ranks([["a"]], [])


def test_projects_are_stratified_by_their_number_of_developers():
    assert [project_size(n) for n in (24, 25, 100, 101)] == ["small", "medium", "medium", "large"]
    ranks = {"coral": np.array([1, 0, 2]), "rule": np.array([0, 1, 1])}
    table = by_project_size(ranks, ["big", "tiny", "big"], {"big": 300, "tiny": 3})
    assert list(table) == ["small", "large"]
    assert table["large"]["coral"]["mrr"] == 0.75 and table["large"]["coral"]["queries"] == 2
    assert table["small"]["rule"]["top1"] == 1.0


def test_tests_of_differences():
    better = np.ones(100, int)
    assert fisher_exact(better, np.where(np.arange(100) < 50, 1, 0)) < 1e-10
    assert fisher_exact(better, better) == 1.0
