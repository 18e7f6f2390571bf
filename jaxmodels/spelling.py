"""What a misspelt name was meant to be: for every error message about a name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """The known name most like `name`, or "" when none is alike (0 <= cutoff <= 1)."""
    near = difflib.get_close_matches(str(name), list(known), 1, cutoff)
    return near[0] if near else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` with the closest of the known names, or nothing."""
    near = closest(name, known)
    return f", did you mean {near!r}?" if near else ""
