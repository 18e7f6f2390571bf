"""Real dynamic graphs: edge lists `t,u,v[,w]` on disk, and review histories month by month."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import gzip
import itertools
import os
import re
import subprocess
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

PERIODS = ("month", "week")
REPEATS = ("last", "sum")
# Tags of releases that are not final.
_UNFINISHED = re.compile(r"(rc|alpha|beta|pre|dev|snapshot|test)[-._]?\d*", re.IGNORECASE)
_WEEK = 7 * 86400
_MONDAY = 4 * 86400  # 1970-01-05


@dataclasses.dataclass(frozen=True)
class DynamicGraph:
    """A sequence of snapshots over one node set.

    Attributes:
      snapshots: T sparse matrices [n, n], row u = edges leaving u.
      events: indices of known changes. labels: a name of each snapshot.
      directed: False: the matrices are symmetric.
    """

    snapshots: list[scipy.sparse.csr_matrix]
    events: tuple[int, ...]
    labels: tuple[str, ...]
    directed: bool

    @property
    def num_nodes(self) -> int:
        return self.snapshots[0].shape[0]

    def __len__(self) -> int:
        return len(self.snapshots)

    def dense(self, dtype: Any = np.float32) -> np.ndarray:
        """[T, n, n]."""
        return np.stack([g.toarray() for g in self.snapshots]).astype(dtype)


def read_edges(path: str | os.PathLike) -> np.ndarray:
    """Rows (t, u, v, w) float64 of a text file, gzipped or not; w is 1 where there is none.

    Separators are commas or blanks; one header line is allowed. Rows are sorted by time (stable).

    Raises:
      ValueError: file and line of the first malformed row; no rows. OSError: no such file.
    """
    path = Path(path).expanduser()
    opener = gzip.open if path.suffix == ".gz" else open
    rows: list[tuple[float, ...]] = []
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                words = line.replace(",", " ").split()
                if not words or words[0].startswith("#"):
                    continue
                try:
                    values = tuple(map(float, words))
                    whole = all(v == int(v) for v in values[:3])
                    if len(values) not in (3, 4) or not whole or min(values[:3]) < 0:
                        raise ValueError
                except (ValueError, OverflowError):
                    if number == 1 and not _is_number(words[0]):
                        continue  # a header
                    raise ValueError(
                        f"{path} line {number}: {line.strip()!r} is not t,u,v or t,u,v,w with "
                        "whole numbers t, u, v >= 0"
                    ) from None
                if len(values) == 4 and not (np.isfinite(values[3]) and values[3] >= 0):
                    raise ValueError(
                        f"{path} line {number}: weight {words[3]} of edge ({words[1]}, {words[2]}) "
                        f"in snapshot {words[0]} must be finite and >= 0"
                    )
                rows.append(values if len(values) == 4 else (*values, 1.0))
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no edges")
    edges = np.array(rows)
    if (np.diff(edges[:, 0]) < 0).any():
        warnings.warn(
            f"{path}: times are not sorted; sorted them, ties in file order", stacklevel=2
        )
        edges = edges[np.argsort(edges[:, 0], kind="stable")]
    return edges


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def graph_of_edges(
    edges: np.ndarray,
    *,
    directed: bool,
    weighted: bool = True,
    num_nodes: int = 0,
    first_time: int = 0,
    fill_empty: bool = False,
    repeats: str = "last",
    events: Sequence[int] = (),
    where: str = "edges",
) -> DynamicGraph:
    """Snapshots of sorted rows (t, u, v, w); time `first_time` is index 0.

    Args:
      num_nodes: n; 0: one more than the largest id.
      fill_empty: times without rows become empty snapshots instead of an error.
      repeats: an edge given several times in a snapshot keeps its "last" weight (as LAD's loader)
        or the "sum". weighted: False: every weight counts as 1, but for 0.
      events: snapshot indices.

    Raises ValueError: an id beyond `num_nodes`, a gap in time, an event beyond the last snapshot.
    """
    if repeats not in REPEATS:
        raise ValueError(f"repeats {repeats!r}; known: {', '.join(REPEATS)}")
    ids = edges[:, 1:3].astype(np.int64)
    n = int(num_nodes) or int(ids.max()) + 1
    if ids.max() >= n:
        raise ValueError(f"{where}: node {int(ids.max())} is not below num_nodes = {n}")
    times = edges[:, 0].astype(np.int64)
    present = np.unique(times)
    first, length = first_time, int(present[-1]) - first_time + 1
    if present[0] < first:
        raise ValueError(f"{where}: t = {int(present[0])} is before first_time = {first}")
    if len(present) != length and not fill_empty:
        gap = next(t for t, p in enumerate(present, start=first) if t != p)
        raise ValueError(
            f"{where}: no edges at t = {gap} (times {int(present[0])} to {int(present[-1])}); "
            "fill_empty=True makes such times empty snapshots, first_time moves the start"
        )
    outside = [e for e in events if not 0 <= e < length]
    if outside:
        raise ValueError(f"event index {outside[0]} is outside the {length} snapshots")
    starts = np.searchsorted(times, np.arange(first, first + length + 1))
    snapshots = []
    for begin, end in itertools.pairwise(starts):
        weights = edges[begin:end, 3]
        # A row of weight 0 is no edge, with weights or without.
        weights = weights if weighted else (weights > 0).astype(float)
        snapshots.append(_matrix(ids[begin:end], weights, n, directed, repeats, weighted))
    labels = tuple(str(t) for t in range(first, first + length))
    return DynamicGraph(snapshots, tuple(sorted(events)), labels, directed)


def _matrix(ids, weights, n, directed, repeats, weighted) -> scipy.sparse.csr_matrix:
    u, v = ids.T
    if not directed:
        u, v = np.minimum(u, v), np.maximum(u, v)
    keys = u * n + v
    if repeats == "last" or not weighted:
        # The last of equal keys: the first one seen from behind.
        kept, at = np.unique(keys[::-1], return_index=True)
        values = weights[::-1][at]
    else:
        kept, inverse = np.unique(keys, return_inverse=True)
        values = np.bincount(inverse, weights, len(kept))
    u, v = kept // n, kept % n
    if not directed:
        across = u != v
        u, v = np.concatenate([u, v[across]]), np.concatenate([v, u[across]])
        values = np.concatenate([values, values[across]])
    matrix = scipy.sparse.csr_matrix((values.astype(np.float32), (u, v)), shape=(n, n))
    matrix.eliminate_zeros()
    return matrix


def read_events(path: str | os.PathLike) -> tuple[int, ...]:
    """Snapshot indices of the column `t` of a CSV with a header.

    Raises ValueError: no such column, or a value that is no whole number.
    """
    path = Path(path).expanduser()
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "t" not in (reader.fieldnames or ()):
            raise ValueError(f"{path}: an events file has a column t")
        try:
            return tuple(sorted({int(row["t"]) for row in reader}))
        except (TypeError, ValueError):
            raise ValueError(f"{path}: t must be whole numbers") from None


def read_releases(path: str | os.PathLike) -> list[tuple[str, int]]:
    """(tag, Unix seconds) of a CSV with columns `tag` and `time`."""
    path = Path(path).expanduser()
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"tag", "time"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: a releases file has columns tag and time")
        try:
            return [(row["tag"], int(row["time"])) for row in reader]
        except (TypeError, ValueError):
            raise ValueError(f"{path}: time must be Unix seconds") from None


def release_tags(clone: str | os.PathLike) -> list[tuple[str, int]]:
    """(tag, Unix seconds) of a local clone's final releases: tags with a number, no rc or beta.

    Raises ValueError: not a clone.
    """
    command = ["git", "-C", os.fspath(clone), "for-each-ref", "refs/tags"]
    command += ["--format=%(refname:short)%09%(creatordate:unix)", "--sort=creatordate"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{clone}: not a git clone")
    found = []
    for line in done.stdout.splitlines():
        tag, _, when = line.partition("\t")
        if when.strip().isdigit() and re.search(r"\d", tag) and not _UNFINISHED.search(tag):
            found.append((tag, int(when)))
    return found


def period_index(seconds: float, period: str) -> int:
    """Number of the month (from year 0) or week (Mondays, from 1970) of Unix seconds, UTC."""
    if period == "week":
        return int((seconds - _MONDAY) // _WEEK)
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.year * 12 + moment.month - 1


def period_name(index: int, period: str) -> str:
    """The month (2020-05) or the Monday (2020-05-04) of a `period_index`."""
    if period == "week":
        moment = datetime.datetime.fromtimestamp(index * _WEEK + _MONDAY, datetime.UTC)
        return moment.strftime("%Y-%m-%d")
    return f"{index // 12:04d}-{index % 12 + 1:02d}"


def review_graph(
    records: Iterable[Any],
    releases: Sequence[tuple[str, int]] = (),
    *,
    period: str = "month",
    weighted: bool = True,
    num_nodes: int = 0,
    where: str = "reviews",
) -> DynamicGraph:
    """Author -> reviewer graphs by month or week; w = changes reviewed; events = release dates.

    Args:
      records: with `author`, `reviewers` and `created` (Unix seconds).
      releases: (tag, Unix seconds); a period with one is an event, those outside are left out.
      num_nodes: n; 0: as many as there are people. Ids are given in order of appearance.

    Raises ValueError: no reviewed change with a date, an unknown period, too few nodes.
    """
    if period not in PERIODS:
        raise ValueError(f"period {period!r}; known: {', '.join(PERIODS)}")
    people: dict[str, int] = {}
    rows = []
    for record in sorted(records, key=lambda r: r.created):
        if record.created <= 0:
            continue
        at = period_index(record.created, period)
        for reviewer in dict.fromkeys(record.reviewers):
            if reviewer != record.author:
                u = people.setdefault(record.author, len(people))
                rows.append((at, u, people.setdefault(reviewer, len(people)), 1.0))
    if not rows:
        raise ValueError(
            f"{where}: no change has both a date and a reviewer other than its author; for "
            "histories without review trailers take signers as reviewers"
        )
    edges = np.array(rows)
    first, last = int(edges[0, 0]), int(edges[-1, 0])
    marks = {period_index(when, period) - first for _, when in releases}
    graph = graph_of_edges(
        edges,
        directed=True,
        weighted=weighted,
        num_nodes=num_nodes,
        first_time=first,
        fill_empty=True,
        repeats="sum",
        events=sorted(m for m in marks if 0 <= m <= last - first),
        where=where,
    )
    names = tuple(period_name(first + i, period) for i in range(len(graph)))
    return dataclasses.replace(graph, labels=names)
