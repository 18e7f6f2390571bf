"""MS MARCO passages for retrieval, from the files that RocketQA and CAPSTONE publish.

Files below `path` (names are options): the corpus (`corpus.tsv`), queries and judgments of training
and dev, BM25 negatives as triples, pseudo queries by document, and BERT's `vocab.txt`. Texts are
read from disk and tokenized when they are needed; pseudo queries are ranked in the reading workers
and the ranks of recent pairs are kept.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.retrieval.capstone import (
    MOST_PSEUDO_QUERIES,
    candidates_of,
    part_range,
    rank_pseudo_queries,
)
from train.data import expansion
from train.data.expansion import Layout, RetrievalExamples
from train.data.retrieval_files import (
    Corpus,
    PseudoQueries,
    TrainingQuery,
    read_judgments,
    read_queries,
    read_training_json,
    read_triples,
    write_training_json,
)
from train.data.retrieval_set import RetrievalSet
from train.data.wordpiece import TokenTable, WordPiece

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
EMPTY_TITLES = True  # a document without a title still begins with the delimiter
SIZES = {"train": 502_939, "dev": 6_980}
_KEPT_RANKS = 1 << 18
_TRIPLES = 30


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Published numbers of queries."""
    del options
    return dict(SIZES)


element_spec = expansion.element_spec
stages = expansion.stages


@dataclasses.dataclass(frozen=True)
class Training:
    """Training queries: ids, texts, document rows of positives and negatives."""

    ids: list[str]
    texts: list[str]
    positives: TokenTable
    negatives: TokenTable


class Collection:
    """The opened files of one folder; picklable for reading workers."""

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

    def __getstate__(self):
        # With offsets and training queries, so that reading workers need not parse files again.
        self.training  # noqa: B018
        return {k: v for k, v in self.__dict__.items() if k != "_order"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._order = functools.lru_cache(_KEPT_RANKS)(self._ranked)

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
        return self._order(int(query), int(row))[0]

    def count(self, query: int, row: int) -> int:
        """How many there were before the filter."""
        return self._order(int(query), int(row))[1]

    def _ranked(self, query: int, row: int) -> tuple[np.ndarray, int]:
        texts = self.pseudo_texts(row)
        ranked = rank_pseudo_queries(
            # As it is tokenized: a pseudo query that differs by its apostrophe is the real one.
            self.training.texts[query].replace("\u2019", "'"),
            texts,
            filter_threshold=self._options["filter_threshold"],
            document=self.corpus.ids[row],
        )
        places = {text: i for i, text in enumerate(texts)}
        order = [places[ranked.queries[j]] for j in ranked.order]
        return np.array(order, np.int8), ranked.total

    @functools.cached_property
    def training(self) -> Training:
        """Training queries with positives and negatives; those without negatives are left out.

        Raises ValueError when none is left, for ids that are not in the corpus, and for a positive
        among its negatives.
        """
        options, kept, count = self._options, [], 0
        mined = None
        if options["negatives_file"]:
            mined = json.loads(self.file("negatives_file").read_text("utf-8"))
        for query in self._given():
            count += 1
            negatives = query.negatives if mined is None else mined.get(query.id, [])
            if not query.positives or (options["negatives"] and not negatives):
                continue
            positives, negatives = (
                self.rows([str(d) for d in ids], query.id) for ids in (query.positives, negatives)
            )
            both = set(positives) & set(negatives)
            if both:
                name = self.corpus.ids[both.pop()]
                raise ValueError(f"query {query.id!r}: positive {name!r} among its negatives")
            kept.append((query.id, query.text, positives, negatives))
        if len(kept) < count:
            print(f"msmarco: {count - len(kept)} of {count} queries have no negatives")
        if not kept:
            raise ValueError(f"{self.folder}: no training query has hard negatives")
        ids, texts, positives, negatives = zip(*kept)
        return Training(list(ids), list(texts), TokenTable(positives), TokenTable(negatives))

    def _given(self) -> Iterator[TrainingQuery]:
        if self._options["training_json"]:
            path = self.file("training_json")
            for query in read_training_json(path):
                if not query.positives:
                    raise ValueError(f"{path}: query {query.id!r} has no positive")
                yield query
            return
        queries = read_queries(self.file("train_queries"))
        positives = read_judgments(self.file("train_judgments"))
        negatives = read_triples(self.file("triples"), _TRIPLES)
        for name, grades in positives.items():
            if name in queries:
                relevant = [d for d, grade in grades.items() if grade > 0]
                yield TrainingQuery(name, queries[name], relevant, negatives.get(name, []))

    def write_training(self, path: str | os.PathLike) -> None:
        """Training queries as one `training_json`: the triples' 400 million lines are read once."""
        write_training_json(path, self._given())

    def rows(self, ids: Sequence[str], query: str) -> list[int]:
        """Document rows of ids. Raises ValueError naming the query and the unknown id."""
        rows = [self.corpus.index.row(d) for d in ids]
        if None in rows:
            raise ValueError(
                f"query {query!r}: no document {ids[rows.index(None)]!r} in the corpus"
            )
        return rows


class _Pieces(Sequence):
    def __init__(self, collection: Collection):
        self._collection = collection

    def __len__(self) -> int:
        return len(self._collection.training.ids)

    def __getitem__(self, number):
        text = self._collection.training.texts[number].replace("\u2019", "'")
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


def symbols(options: Mapping[str, Any]) -> list[str]:
    """Words and pieces by id."""
    return collection(options).tokenizer.words


def source(split: str, options: Mapping[str, Any]) -> _Numbers:
    """Numbers of the queries of a split."""
    if split == SPLITS[0]:
        return _Numbers(len(collection(options).training.ids))
    return _Numbers(len(read_queries(collection(options).file("dev_queries"))))


def train_transform(options: Mapping[str, Any]) -> RetrievalExamples:
    """The training transform of these options (with the part of a curriculum in force)."""
    c = collection(options)
    expansion.tell_spread(options, lambda: relevance_spread(options))
    return RetrievalExamples(
        documents=c,
        queries=_Pieces(c),
        positives=c.training.positives,
        negatives=c.training.negatives,
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
        own = c.training
        texts = dict(zip(own.ids, own.texts))
        judgments = {
            q: {c.corpus.ids[r]: 1 for r in rows.tolist()}
            for q, rows in zip(own.ids, own.positives)
        }
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
        document_text=lambda row: c.corpus.document(row)[1],
    )


def relevance_spread(
    options: Mapping[str, Any], sample: int = 200
) -> list[tuple[float, float, float]]:
    """(mean, least, largest) ROUGE-L of each part, over the positives of some training queries."""
    c, n_parts = collection(options), options["n_parts"]
    parts: list[list[np.ndarray]] = [[] for _ in range(n_parts)]
    for text, rows in zip(c.training.texts[:sample], c.training.positives):
        row = int(rows[0])
        ranked = rank_pseudo_queries(
            text,
            c.pseudo_texts(row),
            filter_threshold=options["filter_threshold"],
            document=c.corpus.ids[row],
        )
        ordered = ranked.scores[ranked.order]
        for part in range(n_parts):
            first, last = part_range(ranked.total, n_parts, part + 1)
            first, last = min(first, len(ordered)), min(last, len(ordered))
            parts[part].append(ordered[first - 1 : last])
    joined = [np.concatenate(p) for p in parts]
    return [(float(p.mean()), float(p.min()), float(p.max())) for p in joined]


def query_row(text: str, options: Mapping[str, Any]) -> list[int]:
    """Token ids of any query."""
    return collection(options).tokenizer.query(text, options["query_length"])
