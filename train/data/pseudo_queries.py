"""Pseudo queries cut from a document: the offline stand-in for a trained generator (docT5query).

A fragment of 4 to 14 consecutive words of one sentence, most stop words left out and other words
dropped with probability 0.2, one or two words of the document's name in front with probability 0.4.
Seeded by the document's id, so that they never change.
"""

from __future__ import annotations

import re
import zlib

import numpy as np

_STOP_WORDS = frozenset(
    """a an and are as at be been but by can do does each else for from has have if in into is it
    its may more must no not of on only or other same set should so such than that the their them
    then
    there these they this to use used uses using was were when where which while will with you your
    i.e e.g default optional none true false""".split()
)
_SENTENCE = re.compile(r"(?<=[.!?:])\s+")
_TOKEN = re.compile(r"[A-Za-z0-9_]+(?:[-.'][A-Za-z0-9_]+)*")
_FRAGMENT = (4, 14)
_MOST_WORDS, _FEWEST_WORDS = 10, 3
_DROP, _DROP_STOP_WORD, _NAME = 0.2, 0.85, 0.4


def name_words(name: str) -> list[str]:
    """Words of the last part of a dotted name: `scipy.linalg.solve_banded` -> solve, banded."""
    last = name.rsplit(".", 1)[-1]
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", last.replace("_", " "))
    return spaced.lower().split()


def extractive(document: str, name: str, text: str, count: int, seed: int = 0) -> list[str]:
    """`count` pseudo queries of a document.

    Args:
      document: id that seeds the choice. name: whose words may be added. text: the body.

    Raises ValueError naming the document when its text has no words.
    """
    rng = np.random.default_rng((zlib.crc32(document.encode()), seed))
    sentences = [_TOKEN.findall(s.lower()) for s in _SENTENCE.split(text)]
    sentences = [s for s in sentences if len(s) >= _FRAGMENT[0]] or [_TOKEN.findall(text.lower())]
    if not any(sentences):
        raise ValueError(f"document {document!r}: no words to make pseudo queries of")
    named = name_words(name)
    found = []
    while len(found) < count:
        sentence = sentences[int(rng.integers(len(sentences)))]
        length = int(rng.integers(_FRAGMENT[0], _FRAGMENT[1] + 1))
        start = int(rng.integers(max(len(sentence) - length, 0) + 1))
        fragment = sentence[start : start + length]
        kept = [
            w for w in fragment if rng.random() >= (_DROP_STOP_WORD if w in _STOP_WORDS else _DROP)
        ][:_MOST_WORDS]
        if len(kept) < _FEWEST_WORDS:
            kept = fragment[:_FEWEST_WORDS]
        if named and rng.random() < _NAME:
            kept = [*named[: int(rng.integers(1, 3))], *kept]
        found.append(" ".join(kept))
    return found
