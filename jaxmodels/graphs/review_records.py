"""Records of a code-review history: what a socio-technical graph is built from.

J. Zhang et al., "Using Large-scale Heterogeneous Graph Representation Learning for Code Review
Recommendations at Microsoft", arXiv 2202.02385, section III.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SECONDS_A_DAY = 86400
# Robots by name or address; `user@users.noreply.github.com` is a person.
BOTS = (
    r"\[bot\]|\b(bot|robot|jenkins|travis|dependabot|renovate|greenkeeper|copybara|autoroll"
    r"|gopherbot|gobot|buildbot|bors|mergify|weblate|pre-commit-ci|automation)\b|[a-z]-?bot@"
)


@dataclasses.dataclass(frozen=True)
class WorkItem:
    """A task or bug that a pull request is linked to; `parent` is another item's id or None."""

    id: str
    title: str = ""
    description: str = ""
    parent: str | None = None


@dataclasses.dataclass(frozen=True)
class PullRequest:
    """One change and what is known of its review.

    Attributes:
      id: unique in its history.
      author: person id; "" only in a query whose author nobody knows.
      created: Unix seconds.
      reviewers, commenters: person ids, as recorded (an author may review an own change).
      files: paths.
    """

    id: str
    author: str
    repo: str = ""
    created: float = 0.0
    reviewers: tuple[str, ...] = ()
    commenters: tuple[str, ...] = ()
    title: str = ""
    description: str = ""
    files: tuple[str, ...] = ()
    work_items: tuple[WorkItem, ...] = ()

    @property
    def day(self) -> int:
        """Days since 1970-01-01 UTC."""
        return int(self.created // SECONDS_A_DAY)

    @property
    def text(self) -> str:
        """Title, description and those of the linked work items, one a line."""
        parts = [self.title, self.description]
        for item in self.work_items:
            parts += [item.title, item.description]
        return "\n".join(parts)


def parse_records(records: Iterable[Any], *, queries: bool = False) -> list[PullRequest]:
    """Records (mappings of JSON's form, or `PullRequest`s) as `PullRequest`s, in their order.

    Args:
      queries: pull requests still to be ranked: they may lack an author, must not have reviewers.

    Raises:
      ValueError: the record's index and the field that is missing or of the wrong kind; a query
        with reviewers or commenters; no records at all.
    """
    parsed = [parse_record(record, index, query=queries) for index, record in enumerate(records)]
    if not parsed:
        raise ValueError("no pull requests")
    return parsed


def parse_record(record: Any, index: int, *, query: bool = False) -> PullRequest:
    """One record; errors name it as `record INDEX`. See `parse_records`."""
    if isinstance(record, PullRequest):
        record = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    if not isinstance(record, Mapping):
        raise ValueError(f"record {index}: {type(record).__name__} where an object is wanted")
    where = f"record {index}"
    for name in ("id",) if query else ("id", "author"):
        if record.get(name) in (None, ""):
            raise ValueError(f"{where}: the field {name!r} is missing or empty")
    pull_request = PullRequest(
        id=_text(record, "id", where),
        author=_text(record, "author", where),
        repo=_text(record, "repo", where),
        created=_seconds(record.get("created"), where),
        reviewers=_names(record, "reviewers", where),
        commenters=_names(record, "commenters", where),
        title=_text(record, "title", where),
        description=_text(record, "description", where),
        files=_names(record, "files", where),
        work_items=_work_items(record.get("work_items"), where),
    )
    if query and (pull_request.reviewers or pull_request.commenters):
        raise ValueError(f"{where} ({pull_request.id}): inference input must not contain reviewers")
    return pull_request


def unique_records(records: Sequence[PullRequest]) -> list[PullRequest]:
    """Records without exact repetitions.

    Raises:
      ValueError: one id with two different contents.
    """
    seen: dict[str, PullRequest] = {}
    for record in records:
        if seen.setdefault(record.id, record) != record:
            raise ValueError(f"pull request {record.id!r} occurs twice with different content")
    return list(seen.values())


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{where}: {name!r} must be text, not {type(value).__name__}")


def _names(record: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = record.get(name)
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{where}: {name!r} must be a list, not {type(value).__name__}")
    if not all(isinstance(v, str) and v for v in value):
        raise ValueError(f"{where}: {name!r} must hold non-empty strings")
    return tuple(value)


def _seconds(value: Any, where: str) -> float:
    if value is None or value == "":
        return 0.0
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if isinstance(value, str):
        try:
            moment = datetime.datetime.fromisoformat(value)
        except ValueError:
            pass
        else:
            return moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp()
    raise ValueError(f"{where}: 'created' must be Unix seconds or an ISO 8601 date, not {value!r}")


def _work_items(value: Any, where: str) -> tuple[WorkItem, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise ValueError(f"{where}: 'work_items' must be a list, not {type(value).__name__}")
    items = []
    for item in value:
        if isinstance(item, WorkItem):
            items.append(item)
            continue
        if not isinstance(item, Mapping) or not item.get("id"):
            raise ValueError(f"{where}: a work item without 'id'")
        items.append(
            WorkItem(
                id=_text(item, "id", where),
                title=_text(item, "title", where),
                description=_text(item, "description", where),
                parent=_text(item, "parent", where) or None,
            )
        )
    return tuple(items)
