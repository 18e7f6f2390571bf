"""Metrics of edits: exact match, copy rate, BLEU-4, SARI, GLEU, and comment sub-tokenization.

Sentence level with one reference, as the evaluation of EngineeringSoftware/CoditT5@100e5a2 has it:
BLEU is NLTK's sentence BLEU with smoothing method 2 and `auto_reweigh`; SARI is Xu et al.'s
(TACL 2016) as its authors coded it; GLEU is Napoles et al.'s (2015, revised 2016). Scores are
times 100.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

EMPTY = "<EMPTY>"
_ORDERS = (1, 2, 3, 4)
_TAGS = ("@return", "@ return", "@param", "@ param", "@throws", "@ throws")
_COMMENT_MARKS = ("/**", "**/", "/*", "*/", "*")
_INLINE_MARKS = (
    "{",
    "}",
    "@code",
    "@docRoot",
    "@inheritDoc",
    "@link",
    "@linkplain",
    "@value",
)


def remove_tags(comment: str) -> str:
    """A Javadoc comment without its @return, @param and @throws."""
    for tag in _TAGS:
        comment = comment.replace(tag, "").strip()
    return comment


def subtokenize(comment: str) -> str:
    """Lower-case sub-tokens of a comment joined by blanks: marks go, camelCase is split."""
    text = remove_tags(comment)
    for mark in _COMMENT_MARKS:
        text = text.replace(mark, "")
    text = re.sub(r"<.*?>", "", text.strip())
    for mark in _INLINE_MARKS:
        text = text.replace(mark, "")
    tokens = re.findall(r"[a-zA-Z0-9]+|[^\sa-zA-Z0-9]", text)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", " ".join(tokens)).lower()


def ngrams(tokens: Sequence[str], n: int) -> Counter:
    """Counts of the n-grams of a token list."""
    return Counter(zip(*(tokens[i:] for i in range(n))))


def bleu4(prediction: str, reference: str) -> float:
    """Sentence BLEU-4 x 100 over blank-separated tokens.

    p_n = (matches + [n > 1]) / (n-grams of the prediction + [n > 1]), weights 1/4, or 1/|h| over
    the first |h| orders where the prediction has |h| < 4 tokens; brevity penalty exp(1 - |r|/|h|).
    """
    hypothesis, wanted = (prediction or EMPTY).split(), reference.split()
    if not hypothesis:
        return 0.0
    logs = []
    weights = min(len(hypothesis), 4)
    for n in _ORDERS:
        matches = sum((ngrams(hypothesis, n) & ngrams(wanted, n)).values())
        total = max(1, len(hypothesis) - n + 1)
        if n == 1 and matches == 0:
            return 0.0
        smooth = int(n > 1)
        logs.append(math.log((matches + smooth) / (total + smooth)))
    brevity = min(0.0, 1 - len(wanted) / len(hypothesis))
    return 100 * math.exp(brevity + sum(logs[:weights]) / weights)


def sari(prediction: str, reference: str, source: str) -> float:
    """SARI x 100 of a prediction, given what it was edited from.

    Mean over n = 1..4 of keep F1, delete precision and add F1, then of the three. Tokens are split
    at single blanks, so that an empty text is one empty token. A perfect prediction scores below
    100 when there was nothing to delete or to add.
    """
    texts = [t.lower().split(" ") for t in (source, prediction, reference)]
    scores = np.array([_sari_order(*(ngrams(t, n) for t in texts)) for n in _ORDERS])
    return 100 * float(scores.mean())


def _sari_order(source: Counter, prediction: Counter, reference: Counter) -> list[float]:
    kept, wanted = source & prediction, source & reference
    good = kept & reference
    keep_precision = _ratio(sum(good[g] / kept[g] for g in good), len(kept))
    keep_recall = _ratio(sum(good[g] / wanted[g] for g in good), len(wanted))
    deleted = source - prediction
    rightly = deleted - reference
    delete = _ratio(sum(rightly[g] / deleted[g] for g in rightly), len(deleted))
    added, missing = set(prediction) - set(source), set(reference) - set(source)
    hits = len(added & set(reference))
    add = _f1(_ratio(hits, len(added)), _ratio(hits, len(missing)))
    return [_f1(keep_precision, keep_recall), delete, add]


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def _f1(precision: float, recall: float) -> float:
    return _ratio(2 * precision * recall, precision + recall)


def gleu(prediction: str, reference: str, source: str) -> float:
    """GLEU x 100: BLEU's precisions, less the n-grams that should have been edited and were not.

    Zero counts are set to one, as the authors' code does for sentences.
    """
    hypothesis, wanted, before = prediction.split(), reference.split(), source.split()
    lengths = [max(len(hypothesis), 1), max(len(wanted), 1)]
    total = 0.0
    for n in _ORDERS:
        h, r, s = (ngrams(t, n) for t in (hypothesis, wanted, before))
        unwanted = Counter({g: count for g, count in s.items() if g not in r})
        matches = max(sum((h & r).values()) - sum((h & unwanted).values()), 0)
        total += math.log(max(matches, 1) / max(len(hypothesis) + 1 - n, 1))
    return 100 * math.exp(min(0.0, 1 - lengths[1] / lengths[0]) + total / 4)


def sentence_scores(
    predictions: Sequence[str], references: Sequence[str], sources: Sequence[str]
) -> dict[str, np.ndarray]:
    """Every metric of every sentence, `[N]`: floats x 100, `exact_match` and `copy_rate` 0 or 1.

    Raises ValueError for empty lists or lists of different lengths.
    """
    sizes = (len(predictions), len(references), len(sources))
    if len(set(sizes)) > 1 or not references:
        raise ValueError(
            f"{sizes[0]} predictions, {sizes[1]} references, {sizes[2]} sources: wanted as many of "
            "each, and at least one"
        )
    triples = list(zip(predictions, references, sources))
    return {
        "exact_match": np.array([int(p == r) for p, r, _ in triples]),
        "bleu4": np.array([bleu4(p, r) for p, r, _ in triples]),
        "sari": np.array([sari(*t) for t in triples]),
        "gleu": np.array([gleu(*t) for t in triples]),
        "copy_rate": np.array([int(p == s) for p, _, s in triples]),
    }


def scores(
    predictions: Sequence[str],
    references: Sequence[str],
    sources: Sequence[str],
    *,
    comments: bool = False,
) -> dict[str, float]:
    """Means of `sentence_scores`, all x 100; `comments` sub-tokenizes the texts first."""
    if comments:
        predictions, references, sources = (
            [subtokenize(t) for t in texts] for texts in (predictions, references, sources)
        )
    found = sentence_scores(predictions, references, sources)
    percent = {"exact_match", "copy_rate"}
    return {k: float(v.mean()) * (100 if k in percent else 1) for k, v in found.items()}
