"""Whether a passage contains an answer, as open-domain question answering counts hits.

The rule of DPR (Karpukhin et al., 2020): texts are decomposed (NFD) and split into runs of letters,
numbers and marks and single other visible characters; an answer is found where its tokens stand in
a row, lower-cased.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence


def answer_tokens(text: str) -> list[str]:
    """Lower-cased tokens of a text."""
    tokens, word = [], ""
    for character in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(character)[0]
        if kind in "LNM":
            word += character
            continue
        if word:
            tokens.append(word.lower())
            word = ""
        if kind not in "ZC":
            tokens.append(character)
    return [*tokens, word.lower()] if word else tokens


def contains_answer(passage: str, answers: Iterable[str]) -> bool:
    """Whether the tokens of one of the answers stand in the passage in a row."""
    # Between separators no token can run into its neighbor.
    text = "\0" + "\0".join(answer_tokens(passage)) + "\0"
    found = (answer_tokens(a) for a in answers)
    return any(tokens and "\0" + "\0".join(tokens) + "\0" in text for tokens in found)


def first_hit(passages: Iterable[str], answers: Sequence[str]) -> int | None:
    """0-based rank of the first passage with an answer, None when there is none."""
    return next((i for i, p in enumerate(passages) if contains_answer(p, answers)), None)
