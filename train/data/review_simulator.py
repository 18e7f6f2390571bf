"""Simulated review histories: areas with maintainers who come and go, seeded, on NumPy alone.

Nothing real may be shipped, so tests, the demo and the `small` preset read histories made here.
Files carry most of the signal, as in real projects; maintainers leave after each third of the time
span, so that a temporal split differs from a random one.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxmodels.graphs.review_records import SECONDS_A_DAY, PullRequest, WorkItem

CHANGES_A_DAY = 4
FILES_AN_AREA = 40
AREA_WORDS, COMMON_WORDS = 25, 60
MAINTAINER_WEIGHTS = (4.0, 2.0, 1.0)
MEMBER_WEIGHT, GENERALIST_WEIGHT, GENERALISTS = 0.3, 0.5, 2
_START = 1_600_000_000 // SECONDS_A_DAY * SECONDS_A_DAY
_WORK_ITEM_SHARE = 0.2
_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def simulate_reviews(
    seed: int, n_people: int = 120, n_changes: int = 3000, n_areas: int = 12, n_repos: int = 3
) -> list[PullRequest]:
    """A history in time order, four changes a day.

    Args:
      n_people: at least 5 (three maintainers, their successor and a reviewer from elsewhere).

    Raises:
      ValueError: a size that leaves nothing to simulate.
    """
    if n_people < 5 or n_changes < 1 or n_areas < 1 or not 1 <= n_repos <= n_areas:
        raise ValueError(
            f"simulate_reviews: n_people {n_people} >= 5, n_changes {n_changes} >= 1 and "
            f"1 <= n_repos {n_repos} <= n_areas {n_areas} are wanted"
        )
    rng = np.random.default_rng(seed)
    organization = _Organization(rng, n_people, n_areas, n_repos)
    author_share = _zipf(n_people)
    days = -(-n_changes // CHANGES_A_DAY)
    thirds_passed, records, items = 0, [], []
    for i in range(n_changes):
        day = i // CHANGES_A_DAY
        # A maintainer of every area leaves after the first and after the second third.
        while thirds_passed < 2 and day * 3 >= days * (thirds_passed + 1):
            thirds_passed += 1
            organization.replace_maintainers(rng)
        author = int(rng.choice(n_people, p=author_share))
        area = organization.area_of_change(rng, author)
        created = _START + day * SECONDS_A_DAY + (i % CHANGES_A_DAY) * SECONDS_A_DAY // 4
        reviewers = organization.draw_reviewers(rng, author, area, day)
        work_items: tuple[WorkItem, ...] = ()
        if rng.random() < _WORK_ITEM_SHARE:
            work_items = (_work_item(rng, organization, area, items),)
        records.append(
            PullRequest(
                id=f"c{i + 1:06d}",
                author=f"s{author:04d}",
                repo=organization.repo_of(area),
                created=float(created),
                reviewers=tuple(f"s{r:04d}" for r in reviewers),
                title=organization.title(rng, area),
                files=organization.draw_files(rng, area),
                work_items=work_items,
            )
        )
    return records


def _zipf(n: int) -> np.ndarray:
    weights = 1.0 / np.arange(1, n + 1)
    return weights / weights.sum()


def _work_item(rng, organization: _Organization, area: int, items: list[WorkItem]) -> WorkItem:
    """Half of the links go to a new item, the others to an earlier one."""
    if items and rng.random() < 0.5:
        return items[int(rng.integers(len(items)))]
    parent = items[int(rng.integers(len(items)))].id if items and rng.random() < 0.3 else None
    item = WorkItem(f"w{len(items) + 1:05d}", organization.title(rng, area), "", parent)
    items.append(item)
    return item


def _pseudo_words(rng: np.random.Generator, count: int) -> list[str]:
    """Different words of two to four syllables, none of them English."""
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = rng.integers(len(_SYLLABLES), size=int(rng.integers(2, 5)))
        words["".join(_SYLLABLES[s] for s in syllables) + "x"] = None
    return list(words)


@dataclasses.dataclass
class _Area:
    repo: str
    name: str
    words: list[str]
    files: list[str]
    weights: np.ndarray  # [people] review weight
    members: list[int]
    maintainers: list[int]


class _Organization:
    """People, their areas, who reviews where with which weight, and when they last did."""

    def __init__(self, rng: np.random.Generator, n_people: int, n_areas: int, n_repos: int):
        words = _pseudo_words(rng, AREA_WORDS * n_areas + COMMON_WORDS + n_areas + n_repos)
        self._n_people = n_people
        self._common = [words.pop() for _ in range(COMMON_WORDS)]
        repos = [words.pop() for _ in range(n_repos)]
        # Everybody has a home; the first people take one area each, so that none stays empty.
        self._home = rng.permutation(np.arange(n_people) % n_areas)
        second = rng.integers(n_areas, size=n_people)
        self._second = np.where(rng.random(n_people) < 0.3, second, -1)
        self._second = np.where(self._second == self._home, -1, self._second)
        generalists = rng.choice(n_people, GENERALISTS, replace=False)
        self._last_review = np.full((n_areas, n_people), -(10**6))
        self._areas = []
        for a in range(n_areas):
            name = words.pop()
            own = [words.pop() for _ in range(AREA_WORDS)]
            members = [int(p) for p in np.flatnonzero((self._home == a) | (self._second == a))]
            # A small project's area borrows people, for it needs three maintainers.
            while len(members) < len(MAINTAINER_WEIGHTS):
                stranger = int(rng.integers(n_people))
                if stranger not in members:
                    members.append(stranger)
            maintainers = [
                int(p) for p in rng.choice(members, len(MAINTAINER_WEIGHTS), replace=False)
            ]
            weights = np.zeros(n_people)
            weights[generalists] = GENERALIST_WEIGHT
            weights[members] = MEMBER_WEIGHT
            weights[maintainers] = MAINTAINER_WEIGHTS
            files: dict[str, None] = {}
            repo = repos[a % n_repos]
            while len(files) < FILES_AN_AREA:
                one, two = rng.choice(own, 2, replace=False)
                files[f"{repo}/{name}/{one}_{two}.c"] = None
            self._areas.append(_Area(repo, name, own, list(files), weights, members, maintainers))

    def repo_of(self, area: int) -> str:
        return self._areas[area].repo

    def replace_maintainers(self, rng: np.random.Generator) -> None:
        """In every area one maintainer leaves; another of its people takes the weight."""
        for area in self._areas:
            place = int(rng.integers(len(area.maintainers)))
            leaving = area.maintainers[place]
            heirs = [p for p in area.members if p not in area.maintainers]
            if not heirs:
                heirs = [p for p in range(self._n_people) if p not in area.maintainers]
            heir = int(rng.choice(heirs))
            area.weights[heir], area.weights[leaving] = area.weights[leaving], 0.0
            area.maintainers[place] = heir

    def area_of_change(self, rng: np.random.Generator, author: int) -> int:
        draw = rng.random()
        if draw < 0.75:
            return int(self._home[author])
        if draw < 0.9 and self._second[author] >= 0:
            return int(self._second[author])
        return int(rng.integers(len(self._areas)))

    def draw_reviewers(
        self, rng: np.random.Generator, author: int, area: int, day: int
    ) -> list[int]:
        chosen: list[int] = []
        for _ in range(1 + int(rng.random() < 0.25)):
            recent = day - self._last_review[area] <= 30
            weights = self._areas[area].weights * (1.0 + recent)
            if rng.random() < 0.05:
                weights = np.ones(self._n_people)
            weights[[author, *chosen]] = 0.0
            chosen.append(int(rng.choice(self._n_people, p=weights / weights.sum())))
        self._last_review[area, chosen] = day
        return chosen

    def title(self, rng: np.random.Generator, area: int) -> str:
        own = self._areas[area].words
        words = [
            str(rng.choice(own if rng.random() < 0.6 else self._common))
            for _ in range(int(rng.integers(3, 8)))
        ]
        return " ".join(words)

    def draw_files(self, rng: np.random.Generator, area: int) -> tuple[str, ...]:
        share = _zipf(FILES_AN_AREA)
        count = min(FILES_AN_AREA, 1 + int(rng.poisson(1.5)))
        drawn = rng.choice(FILES_AN_AREA, count, replace=False, p=share)
        files = [self._areas[area].files[i] for i in drawn]
        if len(self._areas) > 1 and rng.random() < 0.1:
            other = int(rng.choice([a for a in range(len(self._areas)) if a != area]))
            files.append(self._areas[other].files[int(rng.choice(FILES_AN_AREA, p=share))])
        return tuple(files)
