"""Queries with ranked candidate documents as token rows: the data of ranking and distillation.

A training example is one query, its first positive and `number_neg` of its negatives, `random` (a
new order each time) or `descend` (hardest first). `lists` is a JSON file of mined negatives;
without one, the docstring corpus takes what BM25 ranks first. Rows, int32, padding 0 (masks are
`ids != 0`), N = 1 + `number_neg`:

- always `query_ids` [Q], `doc_ids` [N, L];
- with "cross" among `rows`, `cross_ids` [N, R]; with "late", `late_query_ids` [Q] (padded with
  [MASK], which takes part) and `late_doc_ids` [N, L].

The evaluation split holds queries of the validation judgments where the collection is `docstrings`
(BM25's negatives), else the last `held_out` entries of the lists (a tenth at most), which are then
not trained on; of fewer than ten entries all serve for both.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmodels.retrieval.prod import hard_negatives
from jaxmodels.spelling import did_you_mean
from train.data import judged_texts, preparation
from train.data.bm25 import Bm25
from train.data.candidates import SAMPLINGS, CandidateRows, choose_candidates
from train.data.judged_texts import JudgedTexts, RankedList
from train.data.retrieval_set import RetrievalSet
from train.data.wordpiece import WordPiece

OPTIONS: dict[str, Any] = {
    "collection": "docstrings",
    "lists": "",  # JSON of training lists; "": BM25's, for `docstrings`
    "vocabulary": 4000,  # a vocab.txt, or the size of one learned from the documents
    "layout": "prod",
    "query_length": 32,
    "document_length": 144,
    "number_neg": 1,
    "sampling": "random",
    "rows": (),  # of: cross, late
    "held_out": 500,
    "train_queries": 0,  # use only so many training queries (0: all)
    "threads": 1,  # the maps hold the interpreter lock
}
VARIANTS: dict[str, dict[str, Any]] = {"docstrings": {}, "marco": {"collection": "marco"}}
SPLITS = ("train", "validation")
KINDS_OF_ROWS = ("cross", "late")
_BM25_DEPTH = 100
_MARKS = ("[unused1]", "[unused2]")
_KEPT_DOCUMENTS = 200_000


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The rows of one example."""
    _check(options)
    query, document = int(options["query_length"]), int(options["document_length"])
    group = 1 + int(options["number_neg"])
    shapes = {"query_ids": (query,), "doc_ids": (group, document)}
    if "cross" in options["rows"]:
        length = query + document - (2 if options["layout"] == "lead" else 0)
        shapes["cross_ids"] = (group, length)
    if "late" in options["rows"]:
        shapes |= {"late_query_ids": (query,), "late_doc_ids": (group, document)}
    return {name: jax.ShapeDtypeStruct(shape, np.int32) for name, shape in shapes.items()}


def _check(options: Mapping[str, Any]) -> None:
    for kind in options["rows"]:
        if kind not in KINDS_OF_ROWS:
            raise ValueError(
                f"data.options.rows: {kind!r}{did_you_mean(kind, KINDS_OF_ROWS)}; "
                f"known: {', '.join(KINDS_OF_ROWS)}"
            )
    if options["number_neg"] < 0:
        raise ValueError(f"data.options.number_neg must not be negative: {options['number_neg']}")
    if options["sampling"] not in SAMPLINGS:
        raise ValueError(
            f"data.options.sampling: {options['sampling']!r}; known: {', '.join(SAMPLINGS)}"
        )


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Number of examples of each split."""
    return {split: len(source(split, options)) for split in SPLITS}


def source(split: str, options: Mapping[str, Any]) -> Sequence[RankedList]:
    """Ranked lists of a split."""
    key = (_beside(options["lists"], options["path"]), options["collection"], options["path"])
    if options["collection"] == "docstrings":
        if split == "train" and options["lists"]:
            found = _lists(*key)
        else:
            found = _bm25_lists(split, options["path"])
    else:
        if not options["lists"]:
            raise ValueError(
                f"data.options.lists: collection {options['collection']!r} needs a JSON file of "
                "training lists"
            )
        whole, held = _lists(*key), int(options["held_out"])
        held = min(held, len(whole) // 10)
        found = whole[: len(whole) - held] if split == "train" else whole[-held:]
    count = int(options["train_queries"])
    return found[:count] if split == "train" and count else found


def _beside(file: str, path: str | None) -> str:
    """A file by its own path, or by its name in the collection's folder."""
    if file and path and not os.path.exists(file) and os.path.exists(os.path.join(path, file)):
        return os.path.join(path, file)
    return str(file)


@functools.lru_cache(maxsize=4)
def _lists(file: str, collection: str, path: str | None) -> list[RankedList]:
    return judged_texts.read_lists(file, judged_texts.read_collection(collection, path))


@functools.lru_cache(maxsize=4)
def _bm25_lists(split: str, path: str | None) -> list[RankedList]:
    """What BM25 ranks first, relevant documents left out: the lists before any model."""
    texts = judged_texts.read_collection("docstrings", path)
    ids = list(texts.queries[split])
    queries = [texts.queries[split][i] for i in ids]
    relevant = judged_texts.positives_of(texts, split, ids)
    _, ranking = bm25("docstrings", path).search(queries, _BM25_DEPTH + relevant.shape[1])
    negatives, kept = hard_negatives(ranking, relevant, np.ones(len(ids), bool), _BM25_DEPTH)
    return ranked_lists(ids, queries, relevant, negatives, kept)


def ranked_lists(ids, queries, relevant, negatives, kept) -> list[RankedList]:
    """Lists of arrays with -1 padding: relevant [Q, R], negatives [Q, K], kept bool [Q]."""
    return [
        RankedList(
            str(ids[i]),
            queries[i],
            tuple(int(d) for d in relevant[i] if d >= 0),
            tuple(int(d) for d in negatives[i] if d >= 0),
        )
        for i in np.flatnonzero(kept)
    ]


# -- rows ------------------------------------------------------------------------------------------


def candidate_rows(options: Mapping[str, Any]) -> CandidateRows:
    """The tokenizer and layout of these options."""
    return CandidateRows(
        _words(str(options["vocabulary"]), options["collection"], options["path"]),
        options["layout"],
        int(options["query_length"]),
        int(options["document_length"]),
    )


def symbols(options: Mapping[str, Any]) -> list[str]:
    """Words and pieces by id."""
    return candidate_rows(options).words.words


@functools.lru_cache(maxsize=4)
def _words(vocabulary: str, collection: str, path: str | None) -> WordPiece:
    if not vocabulary.isdigit():
        return WordPiece.read(_beside(vocabulary, path))
    size = int(vocabulary)
    file = preparation.data_directory(path) / f"{collection}_vocabulary_{size}.txt"
    if not file.is_file():
        texts = judged_texts.read_collection(collection, path)
        learned = WordPiece.learn(
            [*texts.texts, *texts.titles, *texts.queries["train"].values()], size - len(_MARKS)
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{np.random.default_rng().integers(1 << 62)}")
        part.write_text("\n".join([*learned.words, *_MARKS]) + "\n", encoding="utf-8")
        part.replace(file)
    return WordPiece.read(file)


class Rows:
    """Token rows of a collection's documents, kept once they are made."""

    def __init__(self, texts: JudgedTexts, rows: CandidateRows):
        self.texts, self.rows = texts, rows
        self._kept: dict[int, list[int]] = {}

    def document(self, row: int) -> list[int]:
        """Ids of document `row`, not padded."""
        found = self._kept.get(row)
        if found is None:
            title, text = self.texts.titles[row], self.texts.texts[row]
            if self.texts.single_text:
                found = self.rows.words.single(text, self.rows.document_length)
            else:
                found = self.rows.document(title, text)
            if len(self._kept) < _KEPT_DOCUMENTS:
                self._kept[row] = found
        return found

    def example(self, entry: RankedList, chosen: Sequence[int], kinds: Sequence[str]):
        """The arrays of one query with the documents `chosen`."""
        query = self.rows.query(entry.query)
        documents = [self.document(d) for d in chosen]
        example = {
            "query_ids": self.rows.queries([query])[0],
            "doc_ids": self.rows.documents(documents),
        }
        if "cross" in kinds:
            example["cross_ids"] = self.rows.cross(query, documents)
        if "late" in kinds:
            example["late_query_ids"] = self.rows.late_queries([query])[0]
            example["late_doc_ids"] = self.rows.late_documents(documents)
        return example


@functools.lru_cache(maxsize=8)
def _shared_rows(collection: str, path: str | None, rows: CandidateRows) -> Rows:
    return Rows(judged_texts.read_collection(collection, path), rows)


@dataclasses.dataclass(frozen=True)
class Transform:
    """(ranked list, rng) -> rows; without an rng, negatives in stored order."""

    options: tuple[tuple[str, Any], ...]

    def __call__(self, entry: RankedList, rng: np.random.Generator | None = None):
        options = dict(self.options)
        rows = collection_rows(options)
        chosen = choose_candidates(
            entry.positives,
            entry.negatives,
            int(options["number_neg"]),
            rng=rng,
            sampling=options["sampling"],
        )
        return rows.example(entry, chosen, options["rows"])


def train_transform(options: Mapping[str, Any]) -> Transform:
    """The training transform of these options."""
    return Transform(tuple((k, options[k]) for k in sorted(options)))


eval_transform = train_transform


# -- the whole collection --------------------------------------------------------------------------


def collection_rows(options: Mapping[str, Any]) -> Rows:
    """Texts and token rows of the collection, shared by all who ask."""
    return _shared_rows(options["collection"], options["path"], candidate_rows(options))


def query_row(text: str, options: Mapping[str, Any]) -> list[int]:
    """Token ids of any query."""
    return candidate_rows(options).query(text)


def retrieval_set(options: Mapping[str, Any], split: str) -> RetrievalSet:
    """All documents, and a split's judged queries.

    Only best grades count as relevant for the binary measures: of a docstring, its own text.

    Raises ValueError for a split that the collection has not.
    """
    rows = collection_rows(options)
    texts = rows.texts
    if split not in texts.queries:
        raise ValueError(f"split {split!r}; the collection has {', '.join(texts.queries)}")
    graded = {q: texts.judgments[split].get(q, {}) for q in texts.queries[split]}
    graded = {q: grades for q, grades in graded.items() if grades}
    return RetrievalSet(
        document_ids=texts.document_ids,
        document_row=lambda row, view: rows.document(row),
        views=1,
        query_ids=list(graded),
        query_rows=[rows.rows.query(texts.queries[split][q]) for q in graded],
        judgments={q: _best(grades) for q, grades in graded.items()},
        graded=graded,
        query_texts=[texts.queries[split][q] for q in graded],
        bm25=functools.partial(bm25, options["collection"], options["path"]),
        document_text=lambda row: texts.texts[row],
    )


def _best(grades: Mapping[str, int]) -> dict[str, int]:
    top = max(grades.values())
    return {document: grade for document, grade in grades.items() if grade == top}


@functools.lru_cache(maxsize=2)
def bm25(collection: str, path: str | None) -> Bm25:
    """BM25 over titles and texts."""
    texts = judged_texts.read_collection(collection, path)
    return Bm25([f"{a} {b}".strip() for a, b in zip(texts.titles, texts.texts)])
