"""ROUGE by hand counts and by another way to the longest common subsequence."""

import numpy as np
import pytest

from jaxmodels.language import rouge


def test_rouge_by_an_independent_recursion():
    def lcs(a, b):
        if not a or not b:
            return 0
        if a[-1] == b[-1]:
            return 1 + lcs(a[:-1], b[:-1])
        return max(lcs(a[:-1], b), lcs(a, b[:-1]))

    rng = np.random.default_rng(0)
    for _ in range(40):
        a, b = (rng.integers(0, 3, rng.integers(1, 7)).tolist() for _ in range(2))
        f = rouge.rouge_l(" ".join(map(str, a)), [" ".join(map(str, b))])[0]
        common = lcs(a, b)
        wanted = 2 * common / (len(a) + len(b))
        assert f == pytest.approx(wanted, abs=1e-12)


def test_means_over_pairs_follow_hand_counts():
    scores = rouge.rouge(["The cat sat.", "x"], ["a cat, the cat: SAT", "y"])
    # 3 of 3 and 5 words are shared; 2 bigrams of 2 and 4; "the cat sat" runs through both.
    expected = {"rouge1": 2 * 3 / 8, "rouge2": 2 * 2 / 6, "rougeL": 2 * 3 / 8}
    assert scores == pytest.approx({name: value / 2 for name, value in expected.items()})
    assert rouge.rouge([], []) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        rouge.rouge(["a"], ["a", "b"])


def test_words_of_other_alphabets_count_unstemmed_and_ascii_words_stemmed():
    assert rouge.words_of("Größe_2, running") == ["größe", "2", "running"]
    assert rouge.rouge_tokens("Größe_2, running") == ["gr", "e", "2", "run"]
    assert rouge.rouge(["größe"], ["größe"])["rougeL"] == 1
