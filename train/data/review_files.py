"""Review histories on disk: JSON lines and CSV, either of them plain or gzipped.

CSV: a header and the columns `change, author_time, commit_time, author, reviewers, acked, signers,
n_files, files, tokens`, of which `change` and `author` must be there; people are blank-separated
ids, `files` paths separated by `|`, `tokens` the words of the subject line; further columns
`repository` and `commenters` are read where there are any. JSON lines: one record of
`jaxmodels.graphs.review_records` a line.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from jaxmodels.graphs.review_records import PullRequest, parse_record

COLUMNS = (
    "change",
    "author_time",
    "commit_time",
    "author",
    "reviewers",
    "acked",
    "signers",
    "n_files",
    "files",
    "tokens",
)
_REQUIRED = ("change", "author")


def read_reviews(
    path: str | os.PathLike,
    *,
    acked_as_reviewers: bool = False,
    signers_as_reviewers: bool = False,
    repo: str = "",
    queries: bool = False,
) -> list[PullRequest]:
    """Records of one file, by its ending: `.jsonl`, `.csv`, either with `.gz`.

    Args:
      acked_as_reviewers: the people of `acked` count as reviewers too (CSV).
      signers_as_reviewers: so do those of `signers`, a weak signal (CSV).
      repo: repository of rows that name none; the file's name without endings by default.
      queries: pull requests still to be ranked (`parse_records`).

    Raises:
      ValueError: file and line of the first malformed line; a wrong ending; no pull requests.
    """
    path = Path(path).expanduser()
    name = path.name.removesuffix(".gz")
    stem, ending = os.path.splitext(name)
    readers = {".jsonl": _json_lines, ".json": _json_lines, ".csv": _csv_rows}
    if ending not in readers:
        raise ValueError(f"{path}: a review history ends in .csv or .jsonl (or these with .gz)")
    records = []
    try:
        with _open(path) as file:
            for line, mapping in readers[ending](file, path):
                if ending == ".csv":
                    mapping = _of_columns(
                        mapping, path, line, acked_as_reviewers, signers_as_reviewers
                    )
                try:
                    record = parse_record(mapping, line, query=queries)
                except ValueError as error:
                    text = str(error).replace(f"record {line}", f"record {len(records)}", 1)
                    raise ValueError(f"{path} line {line}: {text}") from None
                if not record.repo:
                    record = dataclasses.replace(record, repo=repo or stem)
                records.append(record)
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from None
    if not records:
        raise ValueError(f"{path}: no pull requests")
    return records


def write_json_lines(path: str | os.PathLike, records: Iterable[PullRequest]) -> None:
    """One JSON record a line; gzipped when `path` ends in `.gz`."""
    with _writing(path) as file:
        for record in records:
            file.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n")


def write_csv(path: str | os.PathLike, records: Iterable[PullRequest]) -> None:
    """The CSV form, `acked` and `signers` empty; the title's words stand in `tokens`.

    A column `repository` is added where records are of several repositories; work items,
    descriptions and comments have no column and are lost.
    """
    records = list(records)
    several = len({record.repo for record in records}) > 1
    with _writing(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*COLUMNS, *(("repository",) if several else ())))
        for r in records:
            when = int(r.created)
            people, files = " ".join(r.reviewers), "|".join(r.files)
            row = (r.id, when, when, r.author, people, "", "", len(r.files), files, r.title)
            writer.writerow((*row, *((r.repo,) if several else ())))


def _open(path: Path) -> IO[str]:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return open(path, encoding="utf-8", newline="")


class _writing:
    """A text file that appears under its name only when it is complete."""

    def __init__(self, path: str | os.PathLike):
        self._path = Path(path)
        self._part = self._path.with_name(self._path.name + ".part")

    def __enter__(self) -> IO[str]:
        make = gzip.open if self._path.name.endswith(".gz") else open
        self._file = make(self._part, "wt", encoding="utf-8", newline="")
        return self._file

    def __exit__(self, kind, *_) -> None:
        self._file.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink()


def _json_lines(file: IO[str], path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number}: not JSON ({error.msg})") from None


def _csv_rows(file: IO[str], path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    # A change may touch thousands of files, more than the module's default bound.
    csv.field_size_limit(1 << 27)
    reader = csv.reader(file, strict=True)
    header: list[str] | None = None
    try:
        for row in reader:
            number = reader.line_num
            if header is None:
                header = [name.strip().removeprefix("\ufeff") for name in row]
                absent = [name for name in _REQUIRED if name not in header]
                if absent:
                    raise ValueError(
                        f"{path} line 1: no column {' and '.join(absent)}; a review history has "
                        f"{', '.join(COLUMNS)}"
                    )
            elif row:
                if len(row) != len(header):
                    raise ValueError(
                        f"{path} line {number}: {len(row)} fields, the header has {len(header)}"
                    )
                yield number, dict(zip(header, row))
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num}: {error}") from None


def _of_columns(
    row: dict[str, str], path: Path, line: int, acked: bool, signers: bool
) -> dict[str, Any]:
    when = row.get("commit_time") or row.get("author_time") or "0"
    try:
        created = float(int(when))
    except ValueError:
        raise ValueError(f"{path} line {line}: the time {when!r} is not Unix seconds") from None
    author = row["author"].strip()
    people = row.get("reviewers", "").split()
    people += row.get("acked", "").split() if acked else []
    people += row.get("signers", "").split() if signers else []
    return {
        "id": row["change"].strip(),
        "author": author,
        "repo": row.get("repository", ""),
        "created": created,
        "reviewers": list(dict.fromkeys(people)),
        "commenters": row.get("commenters", "").split(),
        "title": row.get("tokens", ""),
        "files": [name for name in row.get("files", "").split("|") if name],
    }
