"""Corpus BLEU of detokenized texts, with sacreBLEU's numbers (Post, 2018).

Its defaults: one reference a text, letters as they are, mteval's v13a cut into tokens, smoothing
"exp" of orders without a match. Signature `nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp`.
`edit_metrics.bleu4` is another measure: smoothed, of one sentence, over blank-separated tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from jaxmodels.language.edit_metrics import ngrams

_ORDERS = (1, 2, 3, 4)
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_SPLITS = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    # Marks of numbers stay inside them.
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def tokens_13a(text: str) -> list[str]:
    """Tokens of mteval-v13a: ASCII punctuation apart, other alphabets as they stand."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, replacement in _SPLITS:
        text = pattern.sub(replacement, text)
    return text.split()


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of a corpus, 0 to 100.

    Raises ValueError for lists of unequal length.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    matches, totals, found_length, wanted_length = [0] * 4, [0] * 4, 0, 0
    for prediction, reference in zip(predictions, references):
        found, wanted = tokens_13a(prediction), tokens_13a(reference)
        found_length, wanted_length = found_length + len(found), wanted_length + len(wanted)
        for i, n in enumerate(_ORDERS):
            grams = ngrams(found, n)
            matches[i] += (grams & ngrams(wanted, n)).total()
            totals[i] += grams.total()
    if not any(matches) or not all(totals):
        return 0.0
    logs, halvings = 0.0, 0
    for match, total in zip(matches, totals):
        halvings += not match
        logs += math.log((match or 0.5**halvings) / total)
    brevity = min(0.0, 1 - wanted_length / found_length)
    return 100 * math.exp(brevity + logs / len(_ORDERS))
