"""ROUGE-1, -2 and -L of one text against another (Lin, 2004), F-measures.

Two ways to cut a text into words: `words_of`, any letters and digits as they are, for summaries in
all languages, and `rouge_tokens`, ASCII words with Porter's stems, Google's `rouge_score` with
`use_stemmer`. The official evaluation of summaries calls the Perl ROUGE-1.5.5, which stems as well;
its numbers are somewhat higher than those of unstemmed words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxmodels.language.porter_stemmer import porter_stem

_WORD = re.compile(r"[^\W_]+")
_NOT_ASCII_WORD = re.compile(r"[^a-z0-9]+")
# ROUGE stems words of more letters than this.
_STEM_ABOVE = 3


def words_of(text: str) -> list[str]:
    """Lower-case words of a text: runs of letters and digits of any alphabet."""
    return _WORD.findall(text.lower())


def rouge_tokens(text: str) -> list[str]:
    """Lower-cased ASCII alphanumeric words, those of more than three letters stemmed."""
    words = _NOT_ASCII_WORD.sub(" ", text.lower()).split()
    return [porter_stem(w) if len(w) > _STEM_ABOVE else w for w in words]


def rouge_n(prediction: Sequence[str], reference: Sequence[str], n: int) -> float:
    """F-measure of the n-grams that two word sequences share, counted with repetition."""

    def grams(words):
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    found, wanted = grams(prediction), grams(reference)
    common = (found & wanted).total()
    return 2 * common / (found.total() + wanted.total()) if common else 0.0


def rouge_l(reference: str, predictions: Sequence[str]) -> np.ndarray:
    """ROUGE-L of the `rouge_tokens` of texts, float64 [number of predictions]."""
    words = rouge_tokens(reference)
    return rouge_l_of_words([words] * len(predictions), [rouge_tokens(p) for p in predictions])


def rouge_l_of_words(
    references: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]
) -> np.ndarray:
    """ROUGE-L of n pairs of word sequences, float64 [n]; all pairs at once."""
    numbers: dict[str, int] = {}

    def padded(sequences, fill):
        width = max(map(len, sequences), default=0)
        rows = [
            [numbers.setdefault(w, len(numbers) + 1) for w in words] + [fill] * (width - len(words))
            for words in sequences
        ]
        return np.array(rows, np.int64).reshape(len(rows), width)

    return f_measure(padded(references, 0), padded(predictions, -1))


def f_measure(references: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """ROUGE-L F of rows of word numbers, float64 [n].

    Args:
      references: int [n, R], words above 0, padding 0. predictions: int [n, P], padding -1.
    """
    count = len(references)
    size_r, size_p = (references > 0).sum(1), (predictions > 0).sum(1)
    # One row of the table of common lengths at a time, for all pairs together.
    lengths = np.zeros((predictions.shape[1] + 1, count), np.int16)
    for i in range(references.shape[1]):
        equal = (predictions == references[:, i : i + 1]).T
        before, diagonal = lengths.copy(), np.zeros(count, np.int16)
        for j in range(predictions.shape[1]):
            lengths[j + 1] = np.where(equal[j], diagonal + 1, np.maximum(before[j + 1], lengths[j]))
            diagonal = before[j + 1]
    common = lengths[-1].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = common / size_p, common / size_r
        f = 2 * precision * recall / (precision + recall)
    return np.where(common > 0, f, 0.0)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean `rouge1`, `rouge2`, `rougeL` of unstemmed words over pairs of texts, 0 to 1.

    Raises ValueError for lists of unequal length.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    found, wanted = ([words_of(t) for t in texts] for texts in (predictions, references))
    count = max(len(found), 1)
    sums = {
        "rouge1": sum(rouge_n(p, r, 1) for p, r in zip(found, wanted)),
        "rouge2": sum(rouge_n(p, r, 2) for p, r in zip(found, wanted)),
        "rougeL": float(rouge_l_of_words(wanted, found).sum()),
    }
    return {name: total / count for name, total in sums.items()}
