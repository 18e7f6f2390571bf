"""Bugs put into real statements, of kinds whose repair can be told from the statement itself."""

from __future__ import annotations

import keyword
from collections.abc import Sequence

import numpy as np

# What people write who come from other languages.
FOREIGN = {
    "and": "&&",
    "or": "||",
    "not": "!",
    "None": "null",
    "True": "true",
    "False": "false",
    "self": "this",
    "elif": "elseif",
    "def": "function",
    "raise": "throw",
    "except": "catch",
    "is": "===",
    "==": "=",
    "!=": "<>",
    ":": ";",
    "append": "push",
    "len": "length",
    "str": "toString",
}
KINDS = ("missing", "doubled", "foreign", "transposed", "misspelled")
_CLOSING = frozenset(")]}:,.(=[")


def inject(words: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The words of a statement with one bug, different from the words; empty without a place.

    Kinds: a punctuation mark is missing; a word is doubled; a word is another language's; two
    neighbors are transposed; a letter of a name is missing.
    """
    for kind in rng.permutation(KINDS):
        places = _places(words, str(kind))
        if len(places):
            changed = _change(list(words), str(kind), int(rng.choice(places)), rng)
            if changed != list(words):
                return changed
    return []


def _places(words: Sequence[str], kind: str) -> list[int]:
    if kind == "missing":
        return [i for i, w in enumerate(words) if w in _CLOSING]
    if kind == "doubled":
        return [i for i, w in enumerate(words) if w.isidentifier() or w in ("=", "(", ")", ".")]
    if kind == "foreign":
        return [i for i, w in enumerate(words) if w in FOREIGN]
    if kind == "transposed":
        return [
            i
            for i in range(len(words) - 1)
            if words[i] != words[i + 1] and words[i].isidentifier() != words[i + 1].isidentifier()
        ]
    return [
        i
        for i, w in enumerate(words)
        if len(w) > 3 and w.isidentifier() and (keyword.iskeyword(w) or list(words).count(w) > 1)
    ]


def _change(words: list[str], kind: str, i: int, rng: np.random.Generator) -> list[str]:
    if kind == "missing":
        del words[i]
    elif kind == "doubled":
        words.insert(i, words[i])
    elif kind == "foreign":
        words[i] = FOREIGN[words[i]]
    elif kind == "transposed":
        words[i], words[i + 1] = words[i + 1], words[i]
    else:
        at = int(rng.integers(1, len(words[i])))
        words[i] = words[i][:at] + words[i][at + 1 :]
    return words
