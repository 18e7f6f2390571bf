"""CAPSTONE's schedule, parts, sampler, views, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxmodels.language import rouge
from jaxmodels.retrieval import capstone
from jaxmodels.retrieval.capstone import Selection
from train.data.expansion import RankTable

PSEUDO = [f"word{i} " + "solve linear system "[: 6 * (i % 4)] for i in range(12)]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), st.integers(0, 300), st.booleans())
def test_schedule_falls_from_the_last_part_to_the_first(n_parts, more, gold):
    steps = n_parts + gold + more
    parts = capstone.curriculum_part(np.arange(steps), steps, n_parts, gold)
    assert parts[0] == n_parts and parts[-1] == 1 - gold and (np.diff(parts) <= 0).all()
    width = steps // (n_parts + gold)
    assert np.bincount(parts, minlength=n_parts + 1)[1 - gold :].min() >= width
    stages = capstone.curriculum_stages(steps, n_parts, gold)
    for start, part in stages:
        assert parts[start] == part and (start == 0 or parts[start - 1] == part + 1)
    assert len(stages) == n_parts + gold


def test_draws_of_a_part_are_uniform_and_more_similar_from_part_to_part():
    reference = "solve the linear system of equations"
    ranked = capstone.rank_pseudo_queries(reference, PSEUDO)
    rng, means = np.random.default_rng(0), []
    for part in (3, 2, 1):
        first, last = capstone.part_range(len(ranked.queries), 3, part)
        selection = Selection("k-part", part, 3)
        ranks = np.array([selection.rank(rng, 12) for _ in range(10_000)])
        assert ranks.min() == first and ranks.max() == last
        assert stats.chisquare(np.bincount(ranks)[first : last + 1]).pvalue > 0.001
        means.append(ranked.scores[ranked.order[ranks - 1]].mean())
        drawn = capstone.sample_part(rng, ranked.order, part, 3)
        assert drawn in ranked.order[first - 1 : last]
    assert means[0] < means[1] < means[2]


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("gold", {0}),
        ("random", set(range(1, 11))),
        ("top-3", {1, 2, 3}),
        ("bottom-2", {9, 10}),
        ("4-th", {4}),
        ("2-part", {4, 5, 6}),
        ("batch-uniform", {8}),
        ("batch-uniform-gold", {8}),
    ],
)
def test_every_strategy_draws_its_ranks(text, ranks):
    selection = Selection.parse(text, n_parts=3)
    rng = np.random.default_rng(1)
    assert {selection.rank(rng, 10, sample_index=7) for _ in range(300)} == ranks


def test_uniform_over_the_batch_with_gold_takes_ranks_in_turn_and_the_real_query_last():
    selection, rng = Selection.parse("batch-uniform-gold"), np.random.default_rng(0)
    assert [selection.rank(rng, 3, sample_index=i) for i in range(8)] == [1, 2, 3, 0] * 2


def test_the_real_query_is_an_expansion_always_or_never():
    ranked = capstone.rank_pseudo_queries("the real one", ["a b", "the real one", "a b", "c d"])
    assert ranked.queries == ["a b", "c d"]
    rng = np.random.default_rng(0)
    for text in ("random", "first", "top-1"):
        never = Selection.parse(text)
        assert all(never.choose(rng, ranked.order) >= 0 for _ in range(50))
        always = Selection.parse(text, gold_query_prob=1.0)
        assert all(always.choose(rng, ranked.order) == -1 for _ in range(50))
    assert Selection.parse("first").choose(rng, np.array([4, 2, 3])) == 2
    assert Selection.parse("gradual-gold", 3).at_part(0).choose(rng, ranked.order) == -1


def test_filter_keeps_low_scores_or_the_single_lowest():
    kept = capstone.rank_pseudo_queries("a b", ["a b c", "x y"], filter_threshold=0.5)
    assert kept.queries == ["x y"]
    kept = capstone.rank_pseudo_queries("a b", ["a b c", "b a d e"], filter_threshold=0.0)
    assert kept.queries == ["b a d e"]


def test_parts_are_counted_over_what_there_was_before_the_filter():
    rng = np.random.default_rng(0)
    # Six of nine are left: part 1 of 3 is ranks 1 to 3, part 3 is ranks 7 to 9, which is the last.
    ranks = [{Selection("k-part", k, 3).rank(rng, 6, total=9) for _ in range(99)} for k in (1, 3)]
    assert ranks == [{1, 2, 3}, {6}]
    assert Selection("batch-uniform").rank(rng, 2, sample_index=4, total=4) == 1
    assert Selection("batch-uniform-gold").rank(rng, 2, sample_index=4, total=4) == 0
    assert Selection("batch-uniform-gold").rank(rng, 2, sample_index=3, total=4) == 2
    texts = ["a b c", "x y", "a z"]
    kept = capstone.rank_pseudo_queries("a b", texts, filter_threshold=0.6)
    tokens = [[rouge.rouge_tokens(t) for t in texts]]
    table = RankTable([["a", "b"]], [[0]], tokens, lambda query, row: [], 0.6)
    assert kept.total == table.count(0, 0) == 3
    assert len(kept.order) == len(table(0, 0)) == 2
    assert all(np.isfinite(part).all() for part in table.spread(3))


def test_precomputed_ranks_equal_those_of_the_strings():
    queries = ["solve the linear system", "word3 solve"]
    texts = [["linear system", "word3 solve", "x"], ["solve", "system of linear", "the", "word3"]]

    def same(query, row):
        return [i for i, t in enumerate(texts[row]) if t == queries[query]]

    tokens = [[rouge.rouge_tokens(t) for t in document] for document in texts]
    table = RankTable([rouge.rouge_tokens(q) for q in queries], [[0, 1], [1, 0]], tokens, same)
    for query, real in enumerate(queries):
        for row in (0, 1):
            ranked = capstone.rank_pseudo_queries(real, texts[row])
            wanted = [texts[row].index(ranked.queries[i]) for i in ranked.order]
            assert table(query, row).tolist() == wanted
    with pytest.raises(ValueError, match="document 2 is no candidate of query 0"):
        table(0, 2)
    spread = table.spread(2)
    assert spread[0][0] > spread[1][0]
    with pytest.raises(ValueError, match="no pseudo queries but the real query"):
        RankTable([["x"]], [[0]], [[["x"]]], lambda query, row: [0])


def test_views_average_repeat_and_take_the_maximum():
    rng = np.random.default_rng(0)
    views = rng.standard_normal((3, 20, 8)).astype(np.float32)
    queries = rng.standard_normal((4, 8)).astype(np.float32)
    scores, rows = capstone.search_views(queries, views, 20, "max")
    brute = np.einsum("qh,kdh->qkd", queries, views).max(1)
    np.testing.assert_array_equal(rows, np.argsort(-brute, 1))
    np.testing.assert_allclose(scores, -np.sort(-brute, 1), rtol=1e-5)
    same = np.stack([views[0]] * 3)
    np.testing.assert_allclose(
        capstone.search_views(queries, same, 5)[0],
        capstone.search_views(queries, views[:1], 5)[0],
        rtol=1e-5,
    )
    assert capstone.views_of(["a", "b", "a"], 5) == ["a", "b", "a", "b", "a"]
    assert (capstone.search_views(queries, views, 30, "max")[1][:, 20:] == -1).all()


def test_wrong_arguments_are_refused():
    for call, message in (
        (lambda: Selection.parse("3part"), "select_generated_query '3part'.*known: gold, first"),
        (lambda: Selection.parse("4-part", 3), r"part 4 is not one of 1\.\.3"),
        (lambda: Selection.parse("random", gold_query_prob=1.5), r"in \[0, 1\], not 1.5"),
        (lambda: Selection.parse("gradual", 0), "n_parts must be at least 1, not 0"),
        (lambda: capstone.curriculum_part(0, 2, 3), "max_steps 2 are fewer than the 3 parts"),
        (lambda: capstone.part_range(5, 3, 0), r"part 0 is not one of 1\.\.3"),
        (lambda: capstone.rank_pseudo_queries("q", [], document="d7"), "document 'd7': no pseudo"),
        (lambda: capstone.rank_pseudo_queries("q", ["q"], document="d7"), "but the real query"),
        (lambda: capstone.rank_pseudo_queries("q", ["a"], metric="bleu"), "metric 'bleu'"),
        (lambda: capstone.views_of(["a"], 0), "at least 1, not 0"),
        (lambda: capstone.expand_document("", "b", "q", mode="both"), "expansion mode 'both'"),
        (lambda: capstone.search_views(np.ones((1, 2)), [np.ones((1, 2))], 1, "median"), "reduce"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
