"""Collections of documents and judged queries, from the docstring corpus or from files on disk.

On-disk formats, blanks being tabs:

- `marco` (PROD): `para.txt` (id, text), `para.title.txt` (id, title), `train.query.txt` and
  `dev.query.txt` (id, query), `qrels.train.tsv` (query, 0, document, 1), `qrels.dev.tsv` (query,
  document); training lists are JSON: [{query_id, query_string, pos_id: [], neg_id: []}].
- `marcodoc` (PROD): `msmarco-docs.tsv` (id, url, title, body), a document being the *single* text
  `url<sep>title<sep>body` cut at 10,000 characters; `msmarco-doctrain-queries.tsv` and
  `-qrels.tsv`, `msmarco-docdev-queries.tsv` and `-qrels.tsv`. Lists may leave out the D of ids.
- `psgs` (LEAD): `psgs_w100.tsv` (id + 1, text, title: ids are shifted by one), training queries and
  lists in `train.json` [{question, positive_ctxs: [], hard_negative_ctxs: []}], `test.csv`
  (question, [document ids]).
- `nq` (PROD's Natural Questions, as DPR publishes it): `psgs_w100.tsv` with its ids as they are,
  `train.json` [{question, answers, positive_ctxs: [{title, text, passage_id}], ..}]. A passage that
  contains an answer counts as relevant.

Ids are strings throughout: 1 and "1" are the same document, "D1" is allowed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.spelling import did_you_mean
from train.data.retrieval_files import (
    Corpus,
    TrainingQuery,
    read_judgments,
    read_queries,
    read_questions_csv,
    read_training_json,
    write_training_json,
)

_LONGEST_DOCUMENT = 10_000


@dataclasses.dataclass(frozen=True)
class JudgedTexts:
    """Documents, and the queries of every split with their judgments.

    Attributes:
      document_ids, titles, texts: of D documents; a missing title is "".
      queries: split -> {query id: text}.
      judgments: split -> {query id: {document id: grade}}.
      answers: training query id -> its answers, where a passage with one of them is relevant.
      single_text: documents are one text, rather than a pair of title and text.
      prefix: what lists of documents may leave out of every id.
    """

    document_ids: Sequence[str]
    titles: Sequence[str]
    texts: Sequence[str]
    queries: Mapping[str, Mapping[str, str]]
    judgments: Mapping[str, Mapping[str, Mapping[str, int]]]
    answers: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    single_text: bool = False
    prefix: str = ""

    @functools.cached_property
    def rows(self) -> dict[str, int]:
        """Document id -> row."""
        return {document: row for row, document in enumerate(self.document_ids)}

    def row(self, document: Any, where: str) -> int:
        """The row of a document id. Raises ValueError for an unknown one."""
        name = str(document)
        row = self.rows.get(name, self.rows.get(f"{self.prefix}{name}"))
        if row is None:
            raise ValueError(f"{where}: no document {name!r} in the collection")
        return row


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
    titles, texts = (read_queries(folder / f"para{kind}.txt") for kind in (".title", ""))
    named = {"train": "train", "validation": "dev"}
    return JudgedTexts(
        list(texts),
        [titles.get(i, "") for i in texts],
        list(texts.values()),
        {split: read_queries(folder / f"{name}.query.txt") for split, name in named.items()},
        {split: read_judgments(folder / f"qrels.{name}.tsv") for split, name in named.items()},
    )


def marcodoc(path: str | None) -> JudgedTexts:
    """MS MARCO documents in their published files: url, title and body as one text."""
    folder = _folder(path)
    whole = read_queries(folder / "msmarco-docs.tsv")
    texts = []
    for text in whole.values():
        parts = [part.rstrip() for part in text.rstrip().split("\t")]
        texts.append("<sep>".join(parts if len(parts) > 1 else [*parts, ""])[:_LONGEST_DOCUMENT])
    named = {"train": "msmarco-doctrain", "validation": "msmarco-docdev"}
    return JudgedTexts(
        list(whole),
        [""] * len(whole),
        texts,
        {split: read_queries(folder / f"{name}-queries.tsv") for split, name in named.items()},
        {split: read_judgments(folder / f"{name}-qrels.tsv") for split, name in named.items()},
        single_text=True,
        prefix="D",
    )


def psgs(path: str | None) -> JudgedTexts:
    """LEAD's `psgs_w100.tsv`, whose ids are one too high, `train.json` and `test.csv`."""
    folder = _folder(path)
    corpus = Corpus(folder / "psgs_w100.tsv", "psgs")
    queries, judgments, _ = _training_queries(folder)
    tests = folder / "test.csv"
    if tests.is_file():
        for question, documents, query in read_questions_csv(tests):
            queries["validation"][query] = question
            judgments["validation"][query] = dict.fromkeys(documents, 1)
    return JudgedTexts(corpus.ids, _Field(corpus, 0), _Field(corpus, 1), queries, judgments)


def nq(path: str | None) -> JudgedTexts:
    """Natural Questions as DPR publishes it: ids as they are, relevance by answers."""
    folder = _folder(path)
    corpus = Corpus(folder / "psgs_w100.tsv", "capstone")
    queries, judgments, answers = _training_queries(folder)
    titles, texts = _Field(corpus, 0), _Field(corpus, 1)
    return JudgedTexts(corpus.ids, titles, texts, queries, judgments, answers)


def _training_queries(folder: Path):
    """Queries, judgments and answers of `train.json`, where it is there."""
    queries: dict[str, dict[str, str]] = {"train": {}, "validation": {}}
    judgments: dict[str, dict[str, dict[str, int]]] = {"train": {}, "validation": {}}
    answers: dict[str, Sequence[str]] = {}
    file = folder / "train.json"
    for entry in read_training_json(file) if file.is_file() else ():
        queries["train"][entry.id] = entry.text
        judgments["train"][entry.id] = dict.fromkeys(entry.positives, 1)
        answers[entry.id] = entry.answers
    return queries, judgments, answers


class _Field(Sequence):
    """Titles (0) or texts (1) of a corpus file, read when asked for."""

    def __init__(self, corpus: Corpus, field: int):
        self._corpus, self._number = corpus, field

    def __len__(self) -> int:
        return len(self._corpus)

    def __getitem__(self, row):
        return self._corpus.document(row)[self._number]


COLLECTIONS: dict[str, Callable[[str | None], JudgedTexts]] = {
    "docstrings": docstrings,
    "marco": marco,
    "marcodoc": marcodoc,
    "psgs": psgs,
    "nq": nq,
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
    found, seen = [], {}
    for number, entry in enumerate(read_training_json(file)):
        if entry.id in seen:
            raise ValueError(
                f"{file}: query id {entry.id!r} in entries {seen[entry.id]} and {number} (ids are "
                "compared as text: 1 and '1' are the same)"
            )
        seen[entry.id] = number
        where = f"{file}, query {entry.id!r}"
        rows = [
            tuple(texts.row(d, where) for d in ids) for ids in (entry.positives, entry.negatives)
        ]
        both = set(rows[0]) & set(rows[1])
        if both:
            name = texts.document_ids[min(both)]
            raise ValueError(f"{where}: document {name!r} is positive and negative")
        if entry.positives and entry.negatives:
            found.append(RankedList(entry.id, entry.text, *rows))
    if not found:
        raise ValueError(f"{file}: none of {len(seen)} entries has a positive and a negative")
    return found


def write_lists(file: str | os.PathLike, lists: Iterable[RankedList], texts: JudgedTexts) -> None:
    """PROD's JSON of training lists, written whole or not at all."""
    ids = texts.document_ids
    queries = (
        TrainingQuery(
            e.query_id, e.query, [ids[d] for d in e.positives], [ids[d] for d in e.negatives]
        )
        for e in lists
    )
    write_training_json(file, queries)


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


def _folder(path: str | None) -> Path:
    if not path or not Path(path).is_dir():
        raise FileNotFoundError(f"data.options.path: no folder {path!r}")
    return Path(path)
