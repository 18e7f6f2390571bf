"""PROD's losses and rules: what must hold whatever the numbers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.retrieval import prod
from jaxmodels.retrieval.prod import ABSENT, ProgressiveLoss

B, N, H = 3, 4, 6


def vectors(seed, width=H):
    rngs = jax.random.split(jax.random.key(seed))
    return jax.random.normal(rngs[0], (B, width)), jax.random.normal(rngs[1], (B * N, width))


RELEVANCE = 3 * jax.random.normal(jax.random.key(9), (B, N))


@pytest.mark.parametrize("kd_type", ["KD_softmax", "KD_logit", "DKD"])
def test_the_regularizer_is_zero_at_the_start_of_a_stage_and_not_after_a_step(kd_type):
    loss = ProgressiveLoss(kd_type, dkd_alpha=1.0, dkd_beta=2.0)
    start = vectors(0)

    @jax.jit
    def regularizer(now):
        return loss.own_group(*now, RELEVANCE, start).regularizer

    value, gradient = jax.value_and_grad(regularizer)(start)
    assert abs(value) < 1e-5
    chex.assert_trees_all_close(gradient, jax.tree.map(jnp.zeros_like, gradient), atol=1e-5)

    def whole(now):
        return loss.own_group(*now, RELEVANCE, start).loss

    moved = jax.tree.map(lambda x, g: x - 0.1 * g, start, jax.jit(jax.grad(whole))(start))
    assert regularizer(moved) > 1e-5


def test_gradient_of_the_soft_term_at_large_temperature_is_the_centered_difference():
    scores = jax.random.normal(jax.random.key(1), (B, N))

    def soft(scores, temperature):
        # One-dimensional documents make the scores free: q = 1, d = score.
        ones = jnp.ones((B, 1))
        loss = ProgressiveLoss(temperature=temperature)
        return loss.own_group(ones, scores.reshape(-1, 1), RELEVANCE).soft

    def centered(x):
        return x - x.mean(-1, keepdims=True)

    want = (centered(scores) - centered(RELEVANCE)) / N / B
    for temperature in (100.0, 1000.0):
        gradient = jax.grad(soft)(scores, temperature)
        np.testing.assert_allclose(gradient, want, atol=2 / temperature)


def test_other_queries_documents_reach_the_in_batch_loss_and_not_the_group_loss():
    q, d = vectors(2)

    def first_query(documents, in_batch):
        # With the other queries at zero their own rows do not depend on documents.
        q0 = q.at[1:].set(0.0)
        loss = ProgressiveLoss()
        if in_batch:
            return loss.in_batch(q0, documents, *vectors(3, width=5)).loss
        return loss.own_group(q0, documents, RELEVANCE).loss

    own = jax.jit(jax.grad(first_query), static_argnums=1)
    assert jnp.abs(own(d, True)[N:]).max() > 1e-4
    assert jnp.abs(own(d, False)[N:]).max() == 0


def test_parts_of_the_batch_see_only_their_own_documents():
    q, d = vectors(4)
    loss = ProgressiveLoss(in_batch_groups=B)
    in_parts = loss.in_batch(q, d, *vectors(5))
    assert in_parts.scores.shape == (B, N)
    t, u = vectors(5)
    relevance = jnp.einsum("bh,bnh->bn", t, u.reshape(B, N, H))
    alone = ProgressiveLoss().own_group(q, d, relevance)
    chex.assert_trees_all_close(in_parts.loss, alone.loss, rtol=1e-5)


def test_teacher_and_frozen_student_get_no_gradient():
    def total(t, frozen):
        return ProgressiveLoss().own_group(*vectors(6), t, frozen).loss

    for g in jax.tree.leaves(jax.grad(total, argnums=(0, 1))(RELEVANCE, vectors(7))):
        assert (g == 0).all()


# -- rules -----------------------------------------------------------------------------------------


def hits_to_lists(hits, depth=40):
    ranking = np.tile(np.arange(depth), (len(hits), 1))
    relevant = np.array([[h if h != ABSENT else depth + 1, -1] for h in hits])
    return ranking, relevant


def test_selection_at_the_edges_of_the_window():
    student = np.array([0, 1, 14, 15, ABSENT, 3, 3])
    teacher = np.array([0, 0, 0, 0, 0, 1, ABSENT])
    for hits in (student, teacher):
        np.testing.assert_array_equal(prod.first_hits(*hits_to_lists(hits)), hits)
    marco = prod.confusing_queries(student, teacher)
    assert marco.tolist() == [False, True, True, False, False, False, False]
    nq = prod.confusing_queries(student, teacher, rule="nq")
    assert nq.tolist() == [False, True, True, True, True, True, False]
    judged = np.array([True, False] + [True] * 5)
    assert prod.confusing_queries(student, teacher, judged)[1] == np.False_


def test_first_hit_of_several_positives_is_the_best_ranked_one():
    ranking = np.array([[7, 3, 5, 9]])
    assert prod.first_hits(ranking, np.array([[9, 5, -1]])).tolist() == [2]
    assert prod.first_hits(np.array([[7, -1, -1, -1]]), np.array([[9, -1, -1]])).tolist() == [-1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 39), min_size=1, max_size=12), st.data())
def test_buckets_tell_ranks(hits, data):
    judged = np.array(data.draw(st.lists(st.booleans(), min_size=len(hits), max_size=len(hits))))
    masks = prod.bucket_masks(np.array(hits), judged)
    for name, (low, high) in prod.BUCKETS.items():
        want = [j and h >= 0 and low <= h + 1 <= high for h, j in zip(hits, judged)]
        assert masks[name].tolist() == want, name


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_hard_negatives_keep_order_and_hold_no_positive(seed, count):
    rng = np.random.default_rng(seed)
    ranking = np.stack([rng.permutation(9)[:5] for _ in range(6)])
    ranking[rng.random((6, 5)) < 0.1] = -1
    relevant = rng.integers(-1, 9, (6, 2))
    judged = rng.random(6) < 0.8
    negatives, kept = prod.hard_negatives(ranking, relevant, judged, count)
    for row in range(6):
        want = [d for d in ranking[row] if d >= 0 and d not in relevant[row]]
        usable = judged[row] and (relevant[row] >= 0).any() and bool(want)
        assert kept[row] == usable
        found = negatives[row][negatives[row] >= 0].tolist()
        assert found == (want[:count] if usable else [])


def test_reranking_orders_by_score_and_keeps_ties_and_padding_in_place():
    ranking = np.array([[4, 8, 2, -1]])
    assert prod.rerank(ranking, np.array([[0.5, 0.9, 0.5, 99.0]])).tolist() == [[8, 4, 2, -1]]


Q, D = vectors(0)
LISTS = {"a": ["1", "2"], "b": ["3"]}
MISTAKES = {
    r"\(3, 12\) are not \[B, N\] = \(3, 4\)": lambda: ProgressiveLoss().own_group(
        Q, D, jnp.zeros((B, B * N))
    ),
    "at least one negative": lambda: ProgressiveLoss().own_group(Q, D[:B], jnp.zeros((B, 1))),
    "lwf_weight is not set": lambda: ProgressiveLoss(lwf_weight=None).own_group(
        Q, D, RELEVANCE, (Q, D)
    ),
    "did you mean 'KD_softmax'": lambda: ProgressiveLoss("KD_softmx"),
    "needs dkd_alpha and dkd_beta": lambda: ProgressiveLoss("DKD", dkd_alpha=1.0),
    "temperature must be positive": lambda: ProgressiveLoss(temperature=0.0),
    "kd_weight must be": lambda: ProgressiveLoss(kd_weight=-1.0),
    "3 queries do not divide by 2": lambda: ProgressiveLoss(in_batch_groups=2).in_batch(Q, D, Q, D),
    "the teacher has 3 queries and 8": lambda: ProgressiveLoss().in_batch(Q, D, Q, D[:8]),
    "there are marco, nq": lambda: prod.confusing_queries(np.zeros(1), np.zeros(1), rule="trec"),
    "1 are missing, 0 are unknown": lambda: prod.check_same_candidates(LISTS, {"a": ["1", "2"]}),
    "for 1 of 2 queries, as 'a': 1 documents against": lambda: prod.check_same_candidates(
        LISTS, {**LISTS, "a": ["1"]}
    ),
    "differ in shape": lambda: prod.rerank(np.zeros((1, 3), int), np.zeros((1, 2))),
    "is not a number": lambda: prod.rerank(np.zeros((1, 1), int), np.full((1, 1), np.nan)),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_named(message):
    with pytest.raises(ValueError, match=message):
        MISTAKES[message]()
