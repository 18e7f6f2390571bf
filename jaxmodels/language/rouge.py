"""ROUGE-1, -2 and -L of one text against another (Lin, 2004), F1, without stemming.

Words are runs of letters and digits in lower case, as in Google's `rouge_score`. The official
evaluation calls the Perl ROUGE-1.5.5 with Porter stemming, whose numbers are somewhat higher.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    """Lower-case words of a text."""
    return _WORD.findall(text.lower())


def _f1(common: int, found: int, wanted: int) -> float:
    return 2 * common / (found + wanted) if common else 0.0


def rouge_n(prediction: Sequence[str], reference: Sequence[str], n: int) -> float:
    """F1 of the n-grams that two word sequences share, counted with repetition."""

    def grams(words):
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    found, wanted = grams(prediction), grams(reference)
    return _f1((found & wanted).total(), found.total(), wanted.total())


def rouge_l(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two word sequences."""
    row = [0] * (len(reference) + 1)
    for word in prediction:
        before = 0
        for j, other in enumerate(reference, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return _f1(row[-1], len(prediction), len(reference))


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean `rouge1`, `rouge2`, `rougeL` over pairs of texts, 0 to 1.

    Raises ValueError for lists of unequal length.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    pairs = [(words_of(p), words_of(r)) for p, r in zip(predictions, references)]
    count = max(len(pairs), 1)
    return {
        "rouge1": sum(rouge_n(p, r, 1) for p, r in pairs) / count,
        "rouge2": sum(rouge_n(p, r, 2) for p, r in pairs) / count,
        "rougeL": sum(rouge_l(p, r) for p, r in pairs) / count,
    }
