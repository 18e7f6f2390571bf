import numpy as np
import pytest

from jaxmodels.language import edit_metrics as em
from jaxmodels.language import reranking


def test_bleu_by_hand_and_its_edges():
    # 4 of 4, (2 + 1) / (3 + 1), (0 + 1) / (2 + 1), (0 + 1) / (1 + 1)
    by_hand = 100 * (1 * 3 / 4 * 1 / 3 * 1 / 2) ** 0.25
    np.testing.assert_allclose(em.bleu4("a b d c", "a b c d") * 0 + by_hand, by_hand)
    assert em.bleu4("", "a b") == 0
    assert em.bleu4("a b c d e", "a b c d e") == pytest.approx(100)
    assert em.bleu4("a b", "a b") == pytest.approx(100)
    assert em.bleu4("a", "a b c") == pytest.approx(100 * np.exp(-2))
    assert em.bleu4("x y", "a b") == 0


def test_sari_of_a_perfect_prediction_is_full_only_where_something_changed_everywhere():
    assert em.sari("a b c x", "a b c x", "a b c d") > 60
    assert em.sari("a b c", "a b c", "a b c") == pytest.approx(100 * (3 / 4) / 3)
    assert em.sari("a b c", "a b c x", "a b c") < em.sari("a b c x", "a b c x", "a b c")


def test_gleu_punishes_what_should_have_been_edited():
    source, reference = "the cat sit on mat", "the cat sits on the mat"
    assert em.gleu(reference, reference, source) == pytest.approx(100)
    assert em.gleu(source, reference, source) < em.bleu4(source, reference)
    assert em.gleu("", reference, source) == pytest.approx(100 * np.exp(1 - 6))


def test_means_are_times_100_and_lists_must_fit():
    found = em.scores(["a b", "a"], ["a b", "b"], ["a b", "c"])
    assert found["exact_match"] == 50 and found["copy_rate"] == 50
    comments = em.scores(["/** Gets fooBar */"], ["gets foo bar"], ["x"], comments=True)
    assert comments["exact_match"] == 100
    with pytest.raises(ValueError, match="1 predictions, 2 references, 2 sources"):
        em.scores(["a"], ["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        em.scores([], [], [])


def test_reranking_adds_scores_and_a_constant_second_scorer_keeps_the_base_order():
    base = np.array([[-1.0, -2.0, -1.5], [-3.0, -1.0, -1.0]])
    assert reranking.best_indices(base, np.full_like(base, -7.0)).tolist() == [0, 1]
    assert reranking.best_indices(base, [[0, 5, 0], [9, 0, 0]]).tolist() == [1, 0]
    assert reranking.best_indices(base, [[0, 5, 0], [9, 0, 0]], weight=0).tolist() == [0, 1]
    for other in (base[:, :2], base[:1], [[0, 1, 2], [0]]):
        with pytest.raises(ValueError, match="hypotheses an input: wanted as many of every"):
            reranking.best_indices(base, other)
    assert reranking.grouped(list("abcdef"), 3) == [["a", "b", "c"], ["d", "e", "f"]]
    with pytest.raises(ValueError, match="5 hypotheses do not divide by 2"):
        reranking.grouped(list("abcde"), 2)
