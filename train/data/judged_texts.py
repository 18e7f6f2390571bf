"""Collections of documents and judged queries, from the docstring corpus or from files on disk.

On-disk formats, blanks being tabs:

- `marco` (PROD): `para.txt` (id, text), `para.title.txt` (id, title), `train.query.txt` and
  `dev.query.txt` (id, query), `qrels.train.tsv` (query, 0, document, 1), `qrels.dev.tsv` (query,
  document); training lists are JSON: [{query_id, query_string, pos_id: [], neg_id: []}].
- `marcodoc` (PROD): the same with `msmarco-docs.tsv` (id, url, title, body), a document being
  `url<sep>title<sep>body` cut at 10,000 characters.
- `psgs` (LEAD): `psgs_w100.tsv` (id + 1, text, title: ids are shifted by one), training lists
  [{question, positive_ctxs: [], hard_negative_ctxs: []}], `test.csv` (question, [document ids]).

Ids are strings throughout: 1 and "1" are the same document, "D1" is allowed.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.spelling import did_you_mean

_LONGEST_DOCUMENT = 10_000


@dataclasses.dataclass(frozen=True)
class JudgedTexts:
    """Documents, and the queries of every split with their judgments.

    Attributes:
      document_ids, titles, texts: of D documents; a missing title is "".
      queries: split -> {query id: text}.
      judgments: split -> {query id: {document id: grade}}.
    """

    document_ids: Sequence[str]
    titles: Sequence[str]
    texts: Sequence[str]
    queries: Mapping[str, Mapping[str, str]]
    judgments: Mapping[str, Mapping[str, Mapping[str, int]]]

    @functools.cached_property
    def rows(self) -> dict[str, int]:
        """Document id -> row."""
        return {document: row for row, document in enumerate(self.document_ids)}

    def row(self, document: Any, where: str) -> int:
        """The row of a document id. Raises ValueError for an unknown one."""
        try:
            return self.rows[str(document)]
        except KeyError:
            raise ValueError(f"{where}: no document {str(document)!r} in the collection") from None


@dataclasses.dataclass(frozen=True)
class RankedList:
    """One training entry: a query, its positive rows and its negative rows, hardest first."""

    query_id: str
    query: str
    positives: tuple[int, ...]
    negatives: tuple[int, ...]


def docstrings(path: str | None) -> JudgedTexts:
    """The docstring corpus: a synopsis finds its own docstring (2), and `See Also` ones (1)."""
    from train.data import docstring_corpus

    found, links, splits = docstring_corpus.read(path)
    queries: dict[str, dict[str, str]] = {split: {} for split in docstring_corpus.SPLITS}
    judgments: dict[str, dict[str, dict[str, int]]] = {s: {} for s in docstring_corpus.SPLITS}
    for entry, targets, split in zip(found, links, splits):
        queries[split][entry.name] = entry.query
        judgments[split][entry.name] = {found[t].name: 1 for t in targets} | {entry.name: 2}
    names = [entry.name for entry in found]
    return JudgedTexts(names, [""] * len(names), [e.text for e in found], queries, judgments)


def marco(path: str | None) -> JudgedTexts:
    """MS MARCO passages in PROD's files."""
    folder = _folder(path)
    titles = dict(_pairs(folder / "para.title.txt"))
    ids, texts = _columns(_pairs(folder / "para.txt"))
    return JudgedTexts(ids, [titles.get(i, "") for i in ids], texts, *_marco_queries(folder))


def marcodoc(path: str | None) -> JudgedTexts:
    """MS MARCO documents in PROD's files: url, title and body in one text."""
    folder = _folder(path)
    ids, texts = [], []
    for row in _rows(folder / "msmarco-docs.tsv"):
        ids.append(row[0])
        texts.append("<sep>".join(part.rstrip() for part in row[1:])[:_LONGEST_DOCUMENT])
    _distinct(ids, folder / "msmarco-docs.tsv")
    return JudgedTexts(ids, [""] * len(ids), texts, *_marco_queries(folder))


def _marco_queries(folder: Path):
    queries, judgments = {}, {}
    for split, name in (("train", "train"), ("validation", "dev")):
        queries[split] = dict(_pairs(folder / f"{name}.query.txt"))
        judgments[split] = {}
        for row in _rows(folder / f"qrels.{name}.tsv"):
            query, document = (row[0], row[2]) if len(row) >= 4 else (row[0], row[1])
            grade = int(row[3]) if len(row) >= 4 else 1
            judgments[split].setdefault(query, {})[document] = grade
    return queries, judgments


def psgs(path: str | None) -> JudgedTexts:
    """LEAD's `psgs_w100.tsv`, whose ids are one too high, and `test.csv`."""
    folder = _folder(path)
    ids, titles, texts = [], [], []
    for number, row in enumerate(_rows(folder / "psgs_w100.tsv", quoted=True), 1):
        if row[0] == "id":
            continue
        if len(row) < 3 or not row[0].isdigit():
            raise ValueError(f"{folder / 'psgs_w100.tsv'} line {number}: wanted id+1, text, title")
        ids.append(str(int(row[0]) - 1))
        texts.append(row[1])
        titles.append(row[2])
    _distinct(ids, folder / "psgs_w100.tsv")
    queries: dict[str, dict[str, str]] = {"train": {}, "validation": {}}
    judgments: dict[str, dict[str, dict[str, int]]] = {"train": {}, "validation": {}}
    tests = folder / "test.csv"
    for number, row in enumerate(_rows(tests, quoted=True) if tests.is_file() else (), 1):
        try:
            answers = ast.literal_eval(row[1])
        except (ValueError, SyntaxError, IndexError):
            raise ValueError(f"{tests} line {number}: wanted question, [document ids]") from None
        query = row[2] if len(row) > 2 else str(number - 1)
        queries["validation"][query] = row[0]
        judgments["validation"][query] = {str(a): 1 for a in answers}
    return JudgedTexts(ids, titles, texts, queries, judgments)


COLLECTIONS: dict[str, Callable[[str | None], JudgedTexts]] = {
    "docstrings": docstrings,
    "marco": marco,
    "marcodoc": marcodoc,
    "psgs": psgs,
}


def read_collection(name: str, path: str | None) -> JudgedTexts:
    """The collection `name`, read once a process.

    Raises ValueError for an unknown name, OSError naming `data.options.path` when it is not there.
    """
    if name not in COLLECTIONS:
        raise ValueError(
            f"data.options.collection: {name!r}{did_you_mean(name, COLLECTIONS)}; "
            f"known: {', '.join(COLLECTIONS)}"
        )
    return _read(name, path)


@functools.lru_cache(maxsize=4)
def _read(name: str, path: str | None) -> JudgedTexts:
    return COLLECTIONS[name](path)


# -- training lists --------------------------------------------------------------------------------


def read_lists(file: str | os.PathLike, texts: JudgedTexts) -> list[RankedList]:
    """Training lists in PROD's or LEAD's JSON; entries without positive or negative are left out.

    Raises ValueError for unknown documents, positives among the negatives (naming the query), ids
    that coincide once 1 and "1" are the same.
    """
    with open(file, encoding="utf-8") as opened:
        entries = json.load(opened)
    found, seen = [], {}
    for number, entry in enumerate(entries):
        query_id, query, positives, negatives = _entry(entry, number, file)
        if query_id in seen:
            raise ValueError(
                f"{file}: query id {query_id!r} in entries {seen[query_id]} and {number} (ids are "
                "compared as text: 1 and '1' are the same)"
            )
        seen[query_id] = number
        where = f"{file}, query {query_id!r}"
        both = set(positives) & set(negatives)
        if both:
            raise ValueError(f"{where}: document {min(both)!r} is positive and negative")
        if positives and negatives:
            found.append(
                RankedList(
                    query_id,
                    query,
                    tuple(texts.row(d, where) for d in positives),
                    tuple(texts.row(d, where) for d in negatives),
                )
            )
    if not found:
        raise ValueError(f"{file}: none of {len(entries)} entries has a positive and a negative")
    return found


def _entry(entry: Mapping[str, Any], number: int, file) -> tuple[str, str, list[str], list[str]]:
    try:
        if "query_string" in entry:
            fields = (entry["query_id"], entry["query_string"], entry["pos_id"], entry["neg_id"])
        else:
            fields = (
                entry.get("query_id", number),
                entry["question"],
                entry["positive_ctxs"],
                entry["hard_negative_ctxs"],
            )
    except KeyError as error:
        raise ValueError(f"{file}: entry {number} has no {error}") from None
    query_id, query, positives, negatives = fields
    return str(query_id), query, [_id(d) for d in positives], [_id(d) for d in negatives]


def _id(document: Any) -> str:
    return str(document["passage_id"] if isinstance(document, Mapping) else document)


def write_lists(file: str | os.PathLike, lists: Iterable[RankedList], texts: JudgedTexts) -> None:
    """PROD's JSON of training lists, written whole or not at all."""
    ids = texts.document_ids
    entries = [
        {
            "query_id": e.query_id,
            "query_string": e.query,
            "pos_id": [ids[d] for d in e.positives],
            "neg_id": [ids[d] for d in e.negatives],
        }
        for e in lists
    ]
    part = Path(f"{file}.part")
    part.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def positives_of(
    texts: JudgedTexts, split: str, queries: Sequence[str], level: int = 1
) -> np.ndarray:
    """Rows of relevant documents, int64 [Q, R], best grade first, -1 padding."""
    lists = []
    for query in queries:
        grades = texts.judgments[split].get(query, {})
        lists.append(
            [
                texts.row(d, f"judgments of {query!r}")
                for d, g in sorted(grades.items(), key=lambda item: -item[1])
                if g >= level
            ]
        )
    table = np.full((len(lists), max(map(len, lists), default=1) or 1), -1, np.int64)
    for row, relevant in zip(table, lists):
        row[: len(relevant)] = relevant
    return table


# -- files -----------------------------------------------------------------------------------------


def _folder(path: str | None) -> Path:
    if not path or not Path(path).is_dir():
        raise FileNotFoundError(f"data.options.path: no folder {path!r}")
    return Path(path)


def _rows(file: Path, quoted: bool = False) -> Iterator[list[str]]:
    """Rows of a tab-separated file; `quoted` as the official code reads it with `csv`."""
    if not file.is_file():
        raise FileNotFoundError(f"data.options.path: no file {file}")
    csv.field_size_limit(1 << 30)
    with open(file, encoding="utf-8", newline="") as opened:
        lines = csv.reader(opened, delimiter="\t") if quoted else _split(opened)
        yield from (row for row in lines if row)


def _split(lines: Iterable[str]) -> Iterator[list[str]]:
    for line in lines:
        line = line.rstrip("\r\n")
        yield line.split("\t") if line else []


def _pairs(file: Path) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(_rows(file), 1):
        if len(row) < 2:
            raise ValueError(f"{file} line {number}: wanted an id, a tab and a text")
        yield row[0], row[1]


def _columns(pairs: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    ids, texts = [], []
    for key, text in pairs:
        ids.append(key)
        texts.append(text)
    _distinct(ids, "para.txt")
    return ids, texts


def _distinct(ids: Sequence[str], where: Any) -> None:
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))
        raise ValueError(f"{where}: document id {twice!r} twice")
