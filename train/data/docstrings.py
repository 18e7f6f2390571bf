"""API documentation for retrieval: batches of queries with their documents, and the whole index.

The collection is `train.data.docstring_corpus`; hard negatives are BM25's best 30 without the
positive, or those of `negatives_file`; pseudo queries are fragments of the documents
(`train.data.pseudo_queries`). The vocabulary is learned from all documents, once, and kept beside
the data.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.language import rouge
from train.data import docstring_corpus, expansion, preparation, pseudo_queries
from train.data.bm25 import Bm25
from train.data.expansion import Layout, Ranked, RankTable, RetrievalExamples
from train.data.retrieval_set import RetrievalSet
from train.data.wordpiece import TokenTable, WordPiece

OPTIONS: dict[str, Any] = {
    **expansion.OPTIONS,
    "packages": docstring_corpus.PACKAGES,
    "vocabulary": 8192,
    "title": False,  # the words of the function's name before its text
    "strip_name": False,  # leave the function's own name out of its text (harder)
    "pseudo_queries": 20,
    "threads": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {}
SPLITS = docstring_corpus.SPLITS
EMPTY_TITLES = False
SIZES = {"train": 4526, "validation": 641, "test": 1279}

_HARD_NEGATIVES = 30
_SELF, _SEE_ALSO = 2, 1


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Queries of each split, with the pinned packages."""
    del options
    return dict(SIZES)


element_spec = expansion.element_spec
stages = expansion.stages


class Collection:
    """Everything read and tokenized once: texts, splits, pieces, BM25 and its negatives."""

    def __init__(self, path: str, packages: tuple, vocabulary: int, title: bool, strip_name: bool):
        self.entries, self.links, self.splits = docstring_corpus.read(path, packages)
        self.ids = [e.name for e in self.entries]
        self.titles = [
            " ".join(pseudo_queries.name_words(e.name)) if title else "" for e in self.entries
        ]
        self.texts = [_stripped(e) if strip_name else e.text for e in self.entries]
        self.tokenizer = WordPiece(
            _words(path, packages, vocabulary, [e.text for e in self.entries])
        )
        self.bodies = TokenTable(self.tokenizer.pieces_of(self.texts))
        self.title_pieces = TokenTable(self.tokenizer.pieces_of(self.titles)) if title else None
        self.queries = [e.query for e in self.entries]
        self.query_pieces = TokenTable(
            self.tokenizer.pieces_of([q.replace("\u2019", "'") for q in self.queries])
        )

    def rows_of(self, split: str) -> np.ndarray:
        """Rows of a split; row r's query is query r and its document document r."""
        return np.array([i for i, s in enumerate(self.splits) if s == split])

    @functools.cached_property
    def bm25(self) -> Bm25:
        """BM25 over what an encoder sees of the documents: title and text."""
        return Bm25([f"{a} {b}" for a, b in zip(self.titles, self.texts)])

    @functools.cached_property
    def bm25_negatives(self) -> np.ndarray:
        """BM25's best documents of every query without its own, int [queries, 30]."""
        rows = self.bm25.search(self.queries, _HARD_NEGATIVES + 1)[1]
        return np.stack([r[r != i][:_HARD_NEGATIVES] for i, r in enumerate(rows)])


class PseudoDocuments:
    """`expansion.Documents` of the collection with `count` pseudo queries each."""

    def __init__(self, collection: Collection, count: int):
        self._collection = collection
        texts = [
            list(dict.fromkeys(pseudo_queries.extractive(e.name, e.name, text, count)))
            if count
            else []
            for e, text in zip(collection.entries, collection.texts)
        ]
        self.texts = texts
        flat = [t for document in texts for t in document]
        self._pieces = TokenTable(collection.tokenizer.pieces_of(flat))
        self._starts = np.cumsum([0, *map(len, texts)])
        self._ranked: dict[tuple, RankTable] = {}

    def __len__(self) -> int:
        return len(self.texts)

    def fields(self, row: int) -> list[np.ndarray]:
        """Pieces of title (where the option says so) and body."""
        c = self._collection
        return [*([c.title_pieces[row]] if c.title_pieces else []), c.bodies[row]]

    def pseudo(self, row: int) -> list[np.ndarray]:
        """Pieces of the pseudo queries."""
        return [self._pieces[i] for i in range(self._starts[row], self._starts[row + 1])]

    def ranked(self, options: Mapping[str, Any]) -> Ranked:
        """These documents with their pseudo queries ranked for every query's candidates, once."""
        key = (options["negatives_file"], options["filter_threshold"])
        if key not in self._ranked:
            queries, hard = self._collection.queries, negatives(options)
            width = max(map(len, hard))
            candidates = np.repeat(np.arange(len(queries))[:, None], 1 + width, 1)
            for query, rows in enumerate(hard):
                candidates[query, 1 : 1 + len(rows)] = rows

            def same(query, row):
                return [i for i, t in enumerate(self.texts[row]) if t == queries[query]]

            self._ranked[key] = RankTable(
                [rouge.rouge_tokens(q) for q in queries],
                candidates,
                [[rouge.rouge_tokens(t) for t in texts] for texts in self.texts],
                same,
                options["filter_threshold"],
            )
        return Ranked(self, self._ranked[key])


def _stripped(entry: docstring_corpus.Entry) -> str:
    last = re.escape(entry.name.rsplit(".", 1)[-1])
    return " ".join(re.sub(rf"(?<!\w){last}(?!\w)", " ", entry.text).split()) or entry.text


def _words(path: str, packages: tuple, size: int, texts: Sequence[str]) -> list[str]:
    folder = preparation.data_directory(path) / "api_docstrings"
    file = folder / f"vocabulary_{'-'.join(packages)}_{size}.txt"
    if not file.is_file():
        words = WordPiece.learn(texts, size).words
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        part.write_text("\n".join(words) + "\n", "utf-8")
        part.replace(file)
    return file.read_text("utf-8").splitlines()


def _key(options: Mapping[str, Any]) -> tuple:
    return (
        str(preparation.data_directory(options["path"])),
        tuple(options["packages"]),
        options["vocabulary"],
        bool(options["title"]),
        bool(options["strip_name"]),
    )


_collection = functools.lru_cache(maxsize=2)(Collection)


def collection(options: Mapping[str, Any]) -> Collection:
    """The tokenized collection of these options, shared by all who ask."""
    return _collection(*_key(options))


def symbols(options: Mapping[str, Any]) -> list[str]:
    """Words and pieces by id."""
    return collection(options).tokenizer.words


@functools.lru_cache(maxsize=2)
def _documents(key: tuple, count: int) -> PseudoDocuments:
    return PseudoDocuments(_collection(*key), count)


def documents(options: Mapping[str, Any]) -> PseudoDocuments:
    """The collection's documents with pseudo queries where the options expand."""
    expands = options["expansion"] or options["expand_doc_w_query"]
    return _documents(_key(options), options["pseudo_queries"] if expands else 0)


def negatives(options: Mapping[str, Any]) -> np.ndarray | list[list[int]]:
    """Hard negatives of every query, document rows: BM25's, or those of `negatives_file`.

    Raises ValueError naming what the file lacks, or a positive among the negatives.
    """
    c = collection(options)
    if not options["negatives_file"]:
        return c.bm25_negatives
    rows = {name: row for row, name in enumerate(c.ids)}
    given = json.loads(open(options["negatives_file"], encoding="utf-8").read())
    found: list[list[int]] = [[] for _ in c.ids]
    for query, names in given.items():
        unknown = [n for n in [query, *names] if n not in rows]
        if unknown:
            raise ValueError(f"data.options.negatives_file: no document {unknown[0]!r}")
        if query in names:
            raise ValueError(f"data.options.negatives_file: query {query!r} has its positive in it")
        found[rows[query]] = [rows[n] for n in names]
    return found


def source(split: str, options: Mapping[str, Any]) -> _Queries:
    """The queries of a split that have hard negatives (or all, where none are wanted)."""
    rows = collection(options).rows_of(split)
    if options["negatives"] and split == SPLITS[0]:
        hard = negatives(options)
        kept = np.array([r for r in rows if len(hard[r])])
        if not len(kept):
            raise ValueError("no query has hard negatives")
        if len(kept) < len(rows):
            print(f"docstrings: {len(rows) - len(kept)} of {len(rows)} queries have no negatives")
        rows = kept
    return _Queries(rows)


class _Queries(Sequence):
    def __init__(self, rows: np.ndarray):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        return {"query": self._rows[index]}


def train_transform(options: Mapping[str, Any]) -> RetrievalExamples:
    """The training transform of these options (with the part of a curriculum in force)."""
    selection = expansion.check_options(options)
    c, texts, hard = collection(options), documents(options), negatives(options)
    own = np.arange(len(c.ids))[:, None]
    if selection is not None and selection.strategy != "gold":
        texts = texts.ranked(options)
    expansion.tell_spread(options, lambda: relevance_spread(options))
    return RetrievalExamples(
        documents=texts,
        queries=c.query_pieces,
        positives=own,
        negatives=hard,
        layout=Layout.of(options, c.tokenizer),
        query_length=options["query_length"],
        count=options["negatives"],
        selection=selection,
        joined=options["top_k_query"] if options["expand_doc_w_query"] else 0,
        random_positive=options["random_positive"],
    )


def eval_transform(options: Mapping[str, Any]):
    """The query and its document as the index's first view has it, with no negatives."""
    c, texts = collection(options), documents(options)
    layout = Layout.of(options, c.tokenizer)
    examples = RetrievalExamples(
        documents=texts,
        queries=c.query_pieces,
        positives=[],
        negatives=[],
        layout=layout,
        query_length=options["query_length"],
        count=0,
        selection=None,
    )

    def transform(example):
        row = int(example["query"])
        document = expansion.view_row(texts, layout, row, 0, options)
        return examples.example(row, [document] * (1 + options["negatives"]))

    return transform


def retrieval_set(options: Mapping[str, Any], split: str) -> RetrievalSet:
    """The whole collection as an index, a split's queries, graded judgments, and BM25's texts."""
    c, texts = collection(options), documents(options)
    layout = Layout.of(options, c.tokenizer)
    rows = c.rows_of(split)
    return RetrievalSet(
        document_ids=c.ids,
        document_row=lambda row, view: expansion.view_row(texts, layout, row, view, options),
        views=options["views"] if options["expansion"] else 1,
        query_ids=[c.ids[r] for r in rows],
        query_rows=[c.tokenizer.framed(c.query_pieces[r], options["query_length"]) for r in rows],
        judgments={c.ids[r]: {c.ids[r]: _SELF} for r in rows},
        graded={
            c.ids[r]: {**{c.ids[t]: _SEE_ALSO for t in c.links[r]}, c.ids[r]: _SELF} for r in rows
        },
        query_texts=[c.queries[r] for r in rows],
        bm25=lambda: c.bm25,
    )


def relevance_spread(options: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    """(mean, least, largest) ROUGE-L of each part of the curriculum, part 1 first."""
    return documents(options).ranked(options).table.spread(options["n_parts"])


def query_row(text: str, options: Mapping[str, Any]) -> list[int]:
    """Token ids of any query."""
    return collection(options).tokenizer.query(text, options["query_length"])
