"""Recommenders that CORAL is compared with: rule-based, popularity, recency, random.

The rule-based model is the production baseline of arXiv 2202.02385, after M. Zanjani, H. Kagdi,
C. Bird, "Automatically Recommending Peer Reviewers in Modern Code Review" (cHRev). Every model is
fitted to past reviews and ranks people who have reviewed before; the author of a change is never
among them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from jaxmodels.graphs.review_records import PullRequest


@dataclasses.dataclass(frozen=True)
class Review:
    """One reviewed change: who reviewed it, on which day, and what it touched."""

    day: int
    reviewers: tuple[str, ...]
    files: tuple[str, ...]


def reviews_of(records: Iterable[PullRequest]) -> list[Review]:
    """The reviewed changes of a history."""
    return [Review(r.day, r.reviewers, r.files) for r in records if r.reviewers]


def _by_weight(weights: dict[str, float], author: str | None) -> list[str]:
    return [p for p in sorted(weights, key=lambda p: (-weights[p], p)) if p != author]


class Popularity:
    """People in order of their number of reviews; ties by id.

    Args:
      half_life: in days; 0 counts every review as one, otherwise a review weighs
        `0.5 ** (age / half_life)`, its age being taken from the last day of the history.
    """

    def __init__(self, reviews: Sequence[Review], half_life: float = 0.0):
        last = max((r.day for r in reviews), default=0)
        self.weights: dict[str, float] = defaultdict(float)
        for review in reviews:
            weight = 0.5 ** ((last - review.day) / half_life) if half_life else 1.0
            for person in dict.fromkeys(review.reviewers):
                self.weights[person] += weight
        self.weights = dict(self.weights)

    def rank(self, author: str | None, files: Sequence[str] = ()) -> list[str]:
        """Everybody but the author, best first."""
        del files
        return _by_weight(self.weights, author)


class RandomOrder:
    """A new random order of the people for every query, reproducible from the seed."""

    def __init__(self, reviews: Sequence[Review], seed: int = 0):
        self._people = sorted({p for r in reviews for p in r.reviewers})
        self._rng = np.random.default_rng(seed)

    def rank(self, author: str | None, files: Sequence[str] = ()) -> list[str]:
        """Everybody but the author, in any order."""
        del files
        return [p for p in self._rng.permutation(self._people).tolist() if p != author]


class RuleBased:
    """cHRev: for reviewer v and file f of the change, summed over its files,

        score(v, f) = C_vf / C_f + W_vf / W_f + 1 / (|T_f - T_vf| + 1)

    with C the number of reviews of changes that touch f, W the number of different days on which
    they were made, T the last of these days; `C_f`, `W_f`, `T_f` are over all reviewers.
    """

    def __init__(self, reviews: Sequence[Review]):
        self._days: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for review in reviews:
            for file in dict.fromkeys(review.files):
                for person in dict.fromkeys(review.reviewers):
                    self._days[file][person].append(review.day)
        self._popularity = Popularity(reviews)
        self._of_file: dict[str, dict[str, float]] = {}

    def scores(self, author: str | None, files: Sequence[str]) -> dict[str, float]:
        """Score of everybody who reviewed one of the files, best first; ties by id."""
        totals: Counter[str] = Counter()
        for file in dict.fromkeys(files):
            totals.update(self._scores_of_file(file))
        totals.pop(author, None)
        return {person: totals[person] for person in _by_weight(totals, None)}

    def rank(self, author: str | None, files: Sequence[str]) -> list[str]:
        """The people of `scores`, then everybody else by number of reviews, not the author."""
        covered = list(self.scores(author, files))
        known = set(covered)
        return covered + [p for p in self._popularity.rank(author) if p not in known]

    def _scores_of_file(self, file: str) -> dict[str, float]:
        if file not in self._of_file:
            people = self._days.get(file, {})
            every_day = [day for days in people.values() for day in days]
            self._of_file[file] = {
                person: len(days) / len(every_day)
                + len(set(days)) / len(set(every_day))
                + 1 / (max(every_day) - max(days) + 1)
                for person, days in people.items()
            }
        return self._of_file[file]
