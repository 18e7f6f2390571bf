"""The Porter stemmer in NLTK's variant, which Google's `rouge_score` uses.

Porter, "An algorithm for suffix stripping", Program 14 (1980), with NLTK's extensions: irregular
forms, short words left alone, and the changed rules marked below.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable

_IRREGULAR = {
    "sky": "sky",
    "skies": "sky",
    "dying": "die",
    "lying": "lie",
    "tying": "tie",
    "news": "news",
    "innings": "inning",
    "inning": "inning",
    "outings": "outing",
    "outing": "outing",
    "cannings": "canning",
    "canning": "canning",
    "howe": "howe",
    "proceed": "proceed",
    "exceed": "exceed",
    "succeed": "succeed",
}

Rule = tuple[str, str, Callable[[str], bool] | None]


def _kinds(word: str) -> str:
    """The word as consonants `c` and vowels `v`; y is a consonant first and after a vowel."""
    kinds = ""
    for i, letter in enumerate(word):
        if letter in "aeiou":
            kinds += "v"
        elif letter == "y" and i and kinds[-1] == "c":
            kinds += "v"
        else:
            kinds += "c"
    return kinds


def _measure(stem: str) -> int:
    return len(re.findall("v+c", _kinds(stem)))


def _has_vowel(stem: str) -> bool:
    return "v" in _kinds(stem)


def _ends_cvc(word: str) -> bool:
    kinds = _kinds(word)
    if len(word) == 2:  # NLTK
        return kinds == "vc"
    return kinds.endswith("cvc") and word[-1] not in "wxy"


def _doubled(word: str) -> bool:
    return len(word) > 1 and word[-1] == word[-2] and _kinds(word)[-1] == "c"


def _apply(word: str, rules: Iterable[Rule]) -> str:
    """The first rule whose suffix fits decides, whether its condition holds or not."""
    for suffix, replacement, condition in rules:
        if word.endswith(suffix):
            stem = word[: len(word) - len(suffix)]
            return stem + replacement if condition is None or condition(stem) else word
    return word


def _positive(stem: str) -> bool:
    return _measure(stem) > 0


def _above_one(stem: str) -> bool:
    return _measure(stem) > 1


_STEP_3 = tuple(
    (a, b, _positive)
    for a, b in {
        "icate": "ic",
        "ative": "",
        "alize": "al",
        "iciti": "ic",
        "ical": "ic",
        "ful": "",
        "ness": "",
    }.items()
)
_STEP_2 = tuple(
    (a, b, _positive)
    for a, b in {
        "ational": "ate",
        "tional": "tion",
        "enci": "ence",
        "anci": "ance",
        "izer": "ize",
        "bli": "ble",  # NLTK; the publication has abli
        "alli": "al",
        "entli": "ent",
        "eli": "e",
        "ousli": "ous",
        "ization": "ize",
        "ation": "ate",
        "ator": "ate",
        "alism": "al",
        "iveness": "ive",
        "fulness": "ful",
        "ousness": "ous",
        "aliti": "al",
        "iviti": "ive",
        "biliti": "ble",
        "fulli": "ful",  # NLTK
    }.items()
)
_STEP_4: tuple[Rule, ...] = (
    *(
        (suffix, "", _above_one)
        for suffix in "al ance ence er ic able ible ant ement ment ent".split()
    ),
    ("ion", "", lambda stem: _measure(stem) > 1 and stem[-1] in "st"),
    *((suffix, "", _above_one) for suffix in "ou ism ate iti ous ive ize".split()),
)


def _step_1a(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:  # NLTK: dies -> die
        return word[:-1]
    return _apply(
        word, (("sses", "ss", None), ("ies", "i", None), ("ss", "ss", None), ("s", "", None))
    )


def _step_1b(word: str) -> str:
    if word.endswith("ied"):  # NLTK
        return word[:-3] + ("ie" if len(word) == 4 else "i")
    if word.endswith("eed"):
        return word[:-1] if _positive(word[:-3]) else word
    for suffix in ("ed", "ing"):
        if word.endswith(suffix):
            stem = word[: -len(suffix)]
            if _has_vowel(stem):
                break
    else:
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if _doubled(stem):
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _ends_cvc(stem) else stem


def _step_1c(word: str) -> str:
    # NLTK: a consonant before the y, and more than one letter; the publication wants a vowel.
    return _apply(word, (("y", "i", lambda stem: len(stem) > 1 and _kinds(stem)[-1] == "c"),))


def _step_2(word: str) -> str:
    if word.endswith("alli") and _positive(word[:-4]):  # NLTK
        return _step_2(word[:-2])
    logical = ("logi", "log", lambda stem: _positive(stem + "l"))
    return _apply(word, (*_STEP_2, logical))


def _step_5(word: str) -> str:
    if word.endswith("e"):
        stem = word[:-1]
        size = _measure(stem)
        word = stem if size > 1 or (size == 1 and not _ends_cvc(stem)) else word
    if word.endswith("ll") and _measure(word[:-1]) > 1:
        return word[:-1]
    return word


@functools.lru_cache(maxsize=1 << 16)
def porter_stem(word: str) -> str:
    """Stem of one word, lower-cased; words of one or two letters stay as they are."""
    word = word.lower()
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_step_1a, _step_1b, _step_1c, _step_2):
        word = step(word)
    return _step_5(_apply(_apply(word, _STEP_3), _STEP_4))
