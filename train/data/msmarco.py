"""MS MARCO passages for retrieval, from the files that RocketQA and CAPSTONE publish.

Files below `path` (names are options): the corpus (`corpus.tsv`), queries and judgments of training
and dev, BM25 negatives as triples, pseudo queries by document, and BERT's `vocab.txt`. Texts are
read from disk and tokenized when they are needed; pseudo queries are ranked in the reading workers
and the ranks of recent pairs are kept.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodels.retrieval.capstone import MOST_PSEUDO_QUERIES, candidates_of, rank_pseudo_queries
from train.data import expansion
from train.data.expansion import Layout, RetrievalExamples
from train.data.retrieval_files import (
    Corpus,
    PseudoQueries,
    read_judgments,
    read_queries,
    read_training_json,
    read_triples,
)
from train.data.retrieval_set import RetrievalSet
from train.data.wordpiece import WordPiece

OPTIONS: dict[str, Any] = {
    **expansion.OPTIONS,
    "corpus": "corpus.tsv",
    "corpus_layout": "rocketqa",  # rocketqa | capstone | psgs
    "vocabulary": "vocab.txt",
    "lower_case": True,
    "train_queries": "train.query.txt",
    "train_judgments": "qrels.train.tsv",
    "triples": "qidpidtriples.train.full.2.tsv",  # BM25 negatives
    "training_json": "",  # queries with positives and negatives, in place of the three above
    "dev_queries": "dev.query.txt",
    "dev_judgments": "qrels.dev.tsv",
    "pseudo_queries": "pseudo_queries.tsv",
    "longest_text": 0,  # characters of a text that are read (documents: 10000); 0: all
    "pseudo_limit": MOST_PSEUDO_QUERIES,
}
VARIANTS: dict[str, dict[str, Any]] = {}
SPLITS = ("train", "dev")
SIZES = {"train": 502_939, "dev": 6_980}
_KEPT_RANKS = 1 << 18
_TRIPLES = 30


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`query_ids` int32 [Lq] and `doc_ids` int32 [1 + negatives, Ld]."""
    expansion.check_options(options)
    documents = 1 + options["negatives"]
    return {
        "query_ids": jax.ShapeDtypeStruct((options["query_length"],), np.int32),
        "doc_ids": jax.ShapeDtypeStruct((documents, options["document_length"]), np.int32),
    }


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Published numbers of queries."""
    del options
    return dict(SIZES)


stages = expansion.stages


class Collection:
    """The opened files of one folder; picklable, every worker opens its own."""

    def __init__(self, options: Mapping[str, Any]):
        self._options = dict(options)
        if not options["path"]:
            raise ValueError("data.options.path: the folder with MS MARCO's files is wanted")
        self.folder = Path(options["path"]).expanduser()
        self.tokenizer = WordPiece.read(self.file("vocabulary"), options["lower_case"])
        self.corpus = Corpus(self.file("corpus"), options["corpus_layout"])
        expands = options["expansion"] not in ("", "gold") or options["expand_doc_w_query"]
        self._pseudo = (
            PseudoQueries(self.file("pseudo_queries"), self.corpus.index)
            if expands or options["expansion"]
            else None
        )
        self._order = functools.lru_cache(_KEPT_RANKS)(self._ranked)

    def __reduce__(self):
        return Collection, (self._options,)

    def file(self, option: str) -> Path:
        """The file an option names. Raises FileNotFoundError naming the option."""
        path = self.folder / self._options[option]
        if not path.is_file():
            raise FileNotFoundError(f"data.options.{option}: no file {path}")
        return path

    def __len__(self) -> int:
        return len(self.corpus)

    def fields(self, row: int) -> list[Sequence[int]]:
        """Pieces of title and text."""
        title, text = self.corpus.document(row)
        if self._options["longest_text"]:
            text = text[: self._options["longest_text"]]
        return [self.tokenizer.pieces(title.strip()), self.tokenizer.pieces(text.strip())]

    def pseudo_texts(self, row: int) -> list[str]:
        """Pseudo queries without repetitions, in file order. Raises ValueError naming the id."""
        given = self._pseudo[row][: self._options["pseudo_limit"]]
        return candidates_of(None, given, self.corpus.ids[row])

    def pseudo(self, row: int) -> list[list[int]]:
        """Pieces of the pseudo queries."""
        return [self.tokenizer.pieces(t.strip()) for t in self.pseudo_texts(row)]

    def order(self, query: int, row: int) -> np.ndarray:
        """Numbers of pseudo queries by rank against a training query."""
        return self._order(int(query), int(row))

    def _ranked(self, query: int, row: int) -> np.ndarray:
        texts = self.pseudo_texts(row)
        ranked = rank_pseudo_queries(
            self.training[query].text,
            texts,
            filter_threshold=self._options["filter_threshold"],
            document=self.corpus.ids[row],
        )
        places = {text: i for i, text in enumerate(texts)}
        return np.array([places[ranked.queries[j]] for j in ranked.order], np.int8)

    @functools.cached_property
    def training(self) -> list:
        """Training queries with positives and negatives; those without negatives are left out.

        Raises ValueError when none is left, or for ids that are not in the corpus.
        """
        from train.data.retrieval_files import TrainingQuery

        options = self._options
        if options["training_json"]:
            given = list(read_training_json(self.file("training_json")))
        else:
            queries = read_queries(self.file("train_queries"))
            positives = read_judgments(self.file("train_judgments"))
            negatives = read_triples(self.file("triples"), _TRIPLES)
            given = [
                TrainingQuery(
                    q,
                    queries[q],
                    [d for d, grade in grades.items() if grade > 0],
                    negatives.get(q, []),
                )
                for q, grades in positives.items()
                if q in queries
            ]
        if options["negatives_file"]:
            mined = json.loads(self.file("negatives_file").read_text("utf-8"))
            given = [
                TrainingQuery(q.id, q.text, q.positives, [str(d) for d in mined.get(q.id, [])])
                for q in given
            ]
        kept = [q for q in given if q.positives and (q.negatives or not options["negatives"])]
        if len(kept) < len(given):
            print(f"msmarco: {len(given) - len(kept)} of {len(given)} queries have no negatives")
        if not kept:
            raise ValueError(f"{self.folder}: no training query has hard negatives")
        for query in kept:
            both = set(query.positives) & set(query.negatives)
            if both:
                raise ValueError(f"query {query.id!r}: positive {both.pop()!r} among its negatives")
        return kept

    def rows(self, ids: Sequence[str], query: str) -> list[int]:
        """Document rows of ids. Raises ValueError naming the query and the unknown id."""
        rows = [self.corpus.index.row(d) for d in ids]
        if None in rows:
            raise ValueError(
                f"query {query!r}: no document {ids[rows.index(None)]!r} in the corpus"
            )
        return rows


class _Rows(Sequence):
    """Document rows of a field of every training query, looked up when asked for."""

    def __init__(self, collection: Collection, field: str):
        self._collection, self._field = collection, field

    def __len__(self) -> int:
        return len(self._collection.training)

    def __getitem__(self, number):
        query = self._collection.training[number]
        return self._collection.rows(getattr(query, self._field), query.id)


class _Pieces(Sequence):
    def __init__(self, collection: Collection):
        self._collection = collection

    def __len__(self) -> int:
        return len(self._collection.training)

    def __getitem__(self, number):
        text = self._collection.training[number].text.replace("\u2019", "'")
        return self._collection.tokenizer.pieces(text)


class _Numbers(Sequence):
    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number):
        return {"query": number}


@functools.lru_cache(maxsize=4)
def _open(options: str) -> Collection:
    return Collection(json.loads(options))


def collection(options: Mapping[str, Any]) -> Collection:
    """The opened files of these options, shared by all who ask."""
    kept = {k: v for k, v in options.items() if k not in ("part", "workers", "threads")}
    return _open(json.dumps(kept, sort_keys=True, default=os.fspath))


def source(split: str, options: Mapping[str, Any]) -> _Numbers:
    """Numbers of the queries of a split."""
    if split == SPLITS[0]:
        return _Numbers(len(collection(options).training))
    return _Numbers(len(read_queries(collection(options).file("dev_queries"))))


def train_transform(options: Mapping[str, Any]) -> RetrievalExamples:
    """The training transform of these options (with the part of a curriculum in force)."""
    c = collection(options)
    return RetrievalExamples(
        documents=c,
        queries=_Pieces(c),
        positives=_Rows(c, "positives"),
        negatives=_Rows(c, "negatives"),
        layout=Layout.of(options, c.tokenizer),
        query_length=options["query_length"],
        count=options["negatives"],
        selection=expansion.check_options(options),
        joined=options["top_k_query"] if options["expand_doc_w_query"] else 0,
        random_positive=options["random_positive"],
    )


def eval_transform(options: Mapping[str, Any]):
    """Ranking measures the whole index (`retrieval_set`); there are no single examples."""
    del options
    raise ValueError("msmarco is measured by searching its index, not example by example")


def retrieval_set(options: Mapping[str, Any], split: str) -> RetrievalSet:
    """The corpus as an index with the queries of dev, or of training (to mine negatives)."""
    c = collection(options)
    layout = Layout.of(options, c.tokenizer)
    if split == SPLITS[0]:
        texts = {q.id: q.text for q in c.training}
        judgments = {q.id: dict.fromkeys(q.positives, 1) for q in c.training}
    else:
        texts = read_queries(c.file("dev_queries"))
        judgments = read_judgments(c.file("dev_judgments"))
    asked = [q for q in texts if q in judgments]
    return RetrievalSet(
        document_ids=c.corpus.ids,
        document_row=lambda row, view: expansion.view_row(c, layout, row, view, options),
        views=options["views"] if options["expansion"] else 1,
        query_ids=asked,
        query_rows=[query_row(texts[q], options) for q in asked],
        judgments=judgments,
        query_texts=[texts[q] for q in asked],
    )


def query_row(text: str, options: Mapping[str, Any]) -> list[int]:
    """Token ids of any query."""
    return collection(options).tokenizer.query(text, options["query_length"])
