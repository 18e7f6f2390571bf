"""Documents in, sources and labels out, and nothing lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.language import span_corruption as spans

FIRST = 1000


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(2, 300),
    mask_prob=st.floats(0.02, 0.5),
    span_length=st.floats(1.0, 9.0),
    seed=st.integers(0, 99),
)
def test_the_noise_is_exact_and_the_document_comes_back(length, mask_prob, span_length, seed):
    rng = np.random.default_rng(seed)
    document = rng.integers(4, 900, length)
    try:
        noise = spans.noise_of(length, mask_prob, span_length)
    except ValueError as error:
        assert "sentinels" in str(error) or "do not fit" in str(error)
        return
    source, label = spans.corrupt(document, FIRST, mask_prob, span_length, rng=rng)
    assert noise.tokens == min(max(int(length * mask_prob), 1), length - 1)
    assert len(source) == noise.kept + noise.spans and len(label) == noise.tokens + noise.spans
    marks = source[source >= FIRST]
    np.testing.assert_array_equal(marks, FIRST + np.arange(noise.spans))
    np.testing.assert_array_equal(label[label >= FIRST], marks)
    assert label[0] == FIRST
    np.testing.assert_array_equal(spans.restore(source, label, FIRST), document)


def test_positions_away_from_the_ends_are_cut_out_equally_often():
    rates, lengths = spans.statistics(200, 4000, 30)
    np.testing.assert_allclose(rates[20:-20], 0.15, atol=0.03)
    np.testing.assert_allclose(rates.mean(), 0.15, rtol=1e-12)
    assert lengths[0] == 0 and 2.9 < (lengths * np.arange(31)).sum() < 3.1


def test_documents_are_packed_as_full_as_sentences_allow():
    sentences = [[9] * 3, [8] * 4, None, [7] * 2, [6] * 10, [5]]
    packed = [d.tolist() for d in spans.pack(sentences, 10)]
    assert packed == [[0, 9, 9, 9, 2, 8, 8, 8, 8, 2], [0, 7, 7, 2, 5, 2]]
    apart = [d.tolist() for d in spans.pack(sentences, 10, complete_document=True)]
    assert apart == packed
    apart = [d.tolist() for d in spans.pack([[9], None, [8], None], 10, complete_document=True)]
    assert apart == [[0, 9, 2], [0, 8, 2]]


def test_decoder_input_and_targets_are_the_label_shifted():
    previous, targets = spans.shifted(np.array([1000, 5, 6, 1001, 7]), 6)
    np.testing.assert_array_equal(previous, [1000, 5, 6, 1001, 1, 1])
    np.testing.assert_array_equal(targets, [5, 6, 1001, 7, 1, 1])
    with pytest.raises(ValueError, match="4 tokens exceed max positions 3"):
        spans.shifted(np.array([1000, 5, 6, 1001, 7]), 3)


def test_the_longest_examples_of_512_tokens_are_461_and_100():
    assert spans.corrupted_lengths(512) == (461, 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0.15, 3.0), "a document of 1 tokens"),
        ((9, 0.0, 3.0), r"mask_prob must be in \(0, 1\), not 0.0"),
        ((9, 1.0, 3.0), "mask_prob must be in"),
        ((9, 0.15, 0.0), "span_length must be positive"),
        ((40, 0.8, 1.0), "32 spans do not fit between the 8 kept tokens"),
        ((2000, 0.15, 2.0), "150 spans, and 100 sentinels"),
    ],
)
def test_corruptions_that_cannot_be_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        spans.noise_of(*arguments)


def test_ids_outside_the_dictionary_are_named():
    for bad in (-1, 50):
        with pytest.raises(ValueError, match=f"token id {bad} is not in a dictionary of 50"):
            spans.check_ids([3, bad], 50)
