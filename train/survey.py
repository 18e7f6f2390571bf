"""The survey's own numbers: what participants of the 2021 competitions do, and of whom it is said.

"Biomedical image analysis competitions: The state of current participation practice", arXiv
2212.08568 (S: abstract, D: a public digest of the body), and "Why is the winner the best?", arXiv
2303.17719 (W: abstract). A percentage is of its base: two of different bases neither add nor
multiply, and answers to a question with several answers add up to nothing.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from pathlib import Path

FILE = Path(__file__).with_name("survey.csv")
UNITS = ("percent", "count", "hours")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One number; `value` is None where only the statement was published."""

    id: str
    statement: str
    value: float | None
    unit: str
    base: str
    source: str

    def __add__(self, other: Entry) -> float:
        """The sum of two shares of one base that exclude each other.

        Raises ValueError: other bases, or shares that overlap (multiple answers).
        """
        self._check(other, "added")
        total = self.value + other.value
        if self.unit == "percent" and total > 100:
            raise ValueError(
                f"{self.id} and {other.id} add up to {total:g} %: multiple answers were allowed"
            )
        return total

    def __mul__(self, other: Entry) -> float:
        """Shares of one base say nothing together, and those of two bases are of other people.

        Always raises ValueError.
        """
        raise ValueError(
            f"{self.id} (of {self.base or 'all'}) and {other.id} (of {other.base or 'all'}) "
            "cannot be multiplied: shares of different or overlapping bases"
        )

    def _check(self, other: Entry, verb: str) -> None:
        for one in (self, other):
            if one.value is None:
                raise ValueError(f"{one.id}: no figure was published")
        if (self.unit, self.base) != (other.unit, other.base):
            raise ValueError(
                f"{self.id} ({self.unit} of {self.base or 'all'}) and {other.id} ({other.unit} of "
                f"{other.base or 'all'}) have different bases and cannot be {verb}"
            )

    def text(self) -> str:
        """`69 % of respondents with samples too large`."""
        if self.value is None:
            return f"no figure published (of {self.base})"
        unit = {"percent": " %", "hours": " h"}.get(self.unit, "")
        return f"{self.value:g}{unit}" + (f" of {self.base}" if self.base else "")


@functools.cache
def load() -> dict[str, Entry]:
    """Entries by id. Raises ValueError naming a row with an unknown unit or no base."""
    entries = {}
    with open(FILE, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            value = float(row["value"]) if row["value"] else None
            entry = Entry(**{**row, "value": value})
            if entry.unit not in UNITS or (entry.unit == "percent" and not entry.base):
                raise ValueError(f"{FILE.name}: {entry.id}: unit {entry.unit!r}, no base")
            if entry.unit == "percent" and value is not None and not 0 <= value <= 100:
                raise ValueError(f"{FILE.name}: {entry.id}: {value} percent")
            if entry.id in entries:
                raise ValueError(f"{FILE.name}: {entry.id} stands there twice")
            entries[entry.id] = entry
    return entries
