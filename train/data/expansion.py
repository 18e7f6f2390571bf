"""Training examples of dense retrieval: a query, its positive and hard negatives, expanded or not.

`RetrievalExamples` is the transform that the retrieval families share; where texts and ranks come
from is theirs. CAPSTONE's pseudo query of a document is chosen by its rank against the *real* query
of the example, for negatives as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxmodels.language import rouge
from jaxmodels.retrieval import capstone
from train.data.wordpiece import WordPiece, padded

# What the retrieval families understand besides their own options.
OPTIONS: dict[str, Any] = {
    "query_length": 32,  # tokens, [CLS] and [SEP] among them
    "document_length": 144,
    "body_length": 0,  # body tokens kept before expansion; 0: all
    "negatives": 1,  # hard negatives of a query
    "negatives_file": "",  # JSON {query id: [document ids]} in place of BM25's (mined negatives)
    "random_positive": False,  # one of the positives at random, or always the first
    "expansion": "",  # a strategy of jaxmodels.retrieval.capstone, "" for none
    "expansion_mode": "append",  # append | prepend
    "delimiter": "sep",  # sep | blank
    "n_parts": 1,
    "gold_query_prob": 0.0,
    "filter_threshold": 1.0,
    "expand_doc_w_query": False,  # one document with the first top_k_query pseudo queries
    "top_k_query": 1,
    "curriculum_steps": 0,  # the run's steps, for the gradual strategies
    "part": 0,  # the part in force; set by `stages`
    "views": 1,  # expanded versions of a document in the index
    "view_reduce": "mean",  # mean | max
}
# Pairs whose ROUGE-L is computed at a time.
_PAIRS = 1 << 18


class Documents(Protocol):
    """Token ids of a collection's documents."""

    def __len__(self) -> int: ...

    def fields(self, row: int) -> list[Sequence[int]]:
        """The title's (where there is one) and the body's pieces."""

    def pseudo(self, row: int) -> Sequence[Sequence[int]]:
        """Pieces of the pseudo queries, repetitions left out, in file order."""


class RankedDocuments(Documents, Protocol):
    """Documents whose pseudo queries are ranked against real queries."""

    def order(self, query: int, row: int) -> np.ndarray:
        """Numbers of the pseudo queries by rank against a real query, which itself is left out."""

    def count(self, query: int, row: int) -> int:
        """How many there were to rank, before the filter."""


def check_options(options: Mapping[str, Any]) -> capstone.Selection | None:
    """The selection that options ask for, None without expansion.

    Raises ValueError naming the option that is wrong.
    """
    strategy, gold = options["expansion"], options["gold_query_prob"]
    for name, least in (
        ("query_length", 3),
        ("document_length", 3 + (2 if strategy or options["expand_doc_w_query"] else 0)),
        ("top_k_query", 1),
        ("views", 1),
    ):
        if options[name] < least:
            raise ValueError(f"data.options.{name} must be at least {least}, not {options[name]}")
    for name, known in (
        ("expansion_mode", ("append", "prepend")),
        ("delimiter", tuple(capstone.DELIMITERS)),
        ("view_reduce", ("mean", "max")),
    ):
        if options[name] not in known:
            raise ValueError(f"data.options.{name} {options[name]!r}; known: {', '.join(known)}")
    if strategy and options["expand_doc_w_query"]:
        raise ValueError(
            "data.options: expansion and expand_doc_w_query are two ways to expand; choose one"
        )
    if strategy and options["top_k_query"] != 1:
        raise ValueError(
            f"data.options.top_k_query must be 1 with one pseudo query a view, not "
            f"{options['top_k_query']}"
        )
    if gold and not strategy:
        raise ValueError("data.options.gold_query_prob needs an expansion strategy")
    if not strategy:
        return None
    n_parts = options["n_parts"]
    try:
        selection = capstone.Selection.parse(strategy, n_parts, gold, max(options["part"], 1))
    except ValueError as error:
        raise ValueError(f"data.options.expansion: {error}") from None
    return selection.at_part(options["part"])


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`query_ids` int32 [Lq] and `doc_ids` int32 [1 + negatives, Ld]."""
    check_options(options)
    documents = 1 + options["negatives"]
    return {
        "query_ids": jax.ShapeDtypeStruct((options["query_length"],), np.int32),
        "doc_ids": jax.ShapeDtypeStruct((documents, options["document_length"]), np.int32),
    }


def stages(options: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """(first step, options) of every part of a gradual strategy: the loader restarts at each."""
    if not str(options["expansion"]).startswith("gradual"):
        return [(0, dict(options))]
    parts = capstone.curriculum_stages(
        options["curriculum_steps"], options["n_parts"], options["expansion"] == "gradual-gold"
    )
    return [(step, {**options, "part": part}) for step, part in parts]


_TOLD: set[tuple] = set()


def tell_spread(
    options: Mapping[str, Any], spread: Callable[[], Sequence[tuple[float, float, float]]]
) -> None:
    """Prints, once, how similar each part's pseudo queries are: without range, no curriculum."""
    key = (options["path"], options["n_parts"], options["filter_threshold"])
    if not str(options["expansion"]).startswith("gradual") or key in _TOLD:
        return
    _TOLD.add(key)
    parts = (
        f"part {number} {mean:.3f} ({low:.3f} to {high:.3f})"
        for number, (mean, low, high) in enumerate(spread(), 1)
    )
    print(f"ROUGE-L of pseudo queries with the real query: {', '.join(parts)}")


def hard_negatives(negatives: Sequence[int], count: int) -> list[int]:
    """The first `count` negatives; fewer are repeated cyclically. Raises ValueError for none."""
    if count and not len(negatives):
        raise ValueError("a query without hard negatives")
    return [negatives[i % len(negatives)] for i in range(count)]


def assemble(
    fields: Sequence[Sequence[int]],
    pseudo: Sequence[int] | None,
    length: int,
    *,
    classifier: int,
    separator: int,
    mode: str = "append",
    delimiter: str = "sep",
) -> list[int]:
    """Ids of `jaxmodels.retrieval.capstone.expand_document` from the ids of its parts.

    CLS title DELIM body DELIM pseudo SEP, cut to `length` with the last SEP kept.
    """
    parts = list(fields)
    if pseudo is not None:
        parts.insert(len(parts) if mode == "append" else 0, pseudo)
    row = [classifier]
    for number, part in enumerate(parts):
        if number and delimiter == "sep":
            row.append(separator)
        row.extend(part)
    return [*row[: length - 1], separator]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How documents become rows of ids; `assemble` with a collection's options."""

    classifier: int
    separator: int
    length: int
    body_length: int
    mode: str
    delimiter: str

    @staticmethod
    def of(options: Mapping[str, Any], tokenizer: WordPiece) -> Layout:
        """The layout of a family's options."""
        return Layout(
            tokenizer.classifier,
            tokenizer.separator,
            options["document_length"],
            options["body_length"],
            options["expansion_mode"],
            options["delimiter"],
        )

    def row(self, fields: Sequence[Sequence[int]], pseudo: Sequence[int] | None) -> list[int]:
        """Ids of one document."""
        if self.body_length:
            fields = [*fields[:-1], fields[-1][: self.body_length]]
        return assemble(
            fields,
            pseudo,
            self.length,
            classifier=self.classifier,
            separator=self.separator,
            mode=self.mode,
            delimiter=self.delimiter,
        )


@dataclasses.dataclass(frozen=True)
class RetrievalExamples:
    """`{"query": number} -> query_ids int32 [Lq], doc_ids int32 [N, Ld]`, the positive first.

    Attributes:
      positives, negatives: document rows of every query.
      first_pseudo: expand by the first pseudo query (evaluation), or by `selection`.
    """

    documents: Documents
    queries: Sequence[Sequence[int]]
    positives: Sequence[Sequence[int]]
    negatives: Sequence[Sequence[int]]
    layout: Layout
    query_length: int
    count: int
    selection: capstone.Selection | None
    joined: int = 0
    random_positive: bool = False

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        query = int(example["query"])
        own = self.positives[query]
        first = own[int(rng.integers(len(own)))] if self.random_positive else own[0]
        # A new order at every visit.
        shuffled = rng.permutation(np.asarray(self.negatives[query], np.int64)).tolist()
        rows = [int(first), *hard_negatives(shuffled, self.count)]
        documents = [self.document(query, row, rng) for row in rows]
        return self.example(query, documents)

    def example(self, query: int, documents: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """The arrays of one query and its documents' ids."""
        pieces = [*self.queries[query][: self.query_length - 2]]
        framed = [self.layout.classifier, *pieces, self.layout.separator]
        return {
            "query_ids": padded([framed], self.query_length)[0],
            "doc_ids": padded(documents, self.layout.length),
        }

    def document(self, query: int, row: int, rng: np.random.Generator) -> list[int]:
        """One document's ids, its pseudo query chosen for this query."""
        fields = self.documents.fields(row)
        if self.joined:
            return self.layout.row(fields, joined_pseudo(self.documents, row, self.joined))
        if self.selection is None:
            return self.layout.row(fields, None)
        if self.selection.strategy == "gold":
            return self.layout.row(fields, self.queries[query])
        order = self.documents.order(query, row)
        chosen = self.selection.choose(rng, order, query, self.documents.count(query, row))
        pseudo = self.queries[query] if chosen < 0 else self.documents.pseudo(row)[chosen]
        return self.layout.row(fields, pseudo)


def joined_pseudo(documents: Documents, row: int, count: int) -> list[int]:
    """The first `count` pseudo queries as one."""
    return [piece for pseudo in documents.pseudo(row)[:count] for piece in pseudo]


def view_row(
    documents: Documents, layout: Layout, row: int, view: int, options: Mapping[str, Any]
) -> list[int]:
    """Ids of a document's version in the index: its pseudo query number `view`, repeated if few."""
    fields = documents.fields(row)
    if options["expand_doc_w_query"]:
        return layout.row(fields, joined_pseudo(documents, row, options["top_k_query"]))
    if not options["expansion"]:
        return layout.row(fields, None)
    pseudo = documents.pseudo(row)
    return layout.row(fields, pseudo[view % len(pseudo)])


class RankTable:
    """Ranks of pseudo queries for pairs of query and document, computed once: int8 [pairs, m].

    Args:
      queries: ROUGE tokens of every query.
      candidates: document rows of every query, [queries, C].
      pseudo: for every document the ROUGE tokens of its pseudo queries.
      same: `same(query, row)` -> numbers of pseudo queries that equal the real query, left out.
      filter_threshold: see `jaxmodels.retrieval.capstone.rank_pseudo_queries`.
    """

    def __init__(self, queries, candidates, pseudo, same, filter_threshold: float = 1.0):
        self.candidates = np.asarray(candidates, np.int32)
        numbers: dict[str, int] = {}

        def row(tokens):
            return [numbers.setdefault(t, len(numbers) + 1) for t in tokens]

        left = padded([row(q) for q in queries], max(map(len, queries), default=1), 0)
        most = max(map(len, pseudo))
        width = max((len(t) for p in pseudo for t in p), default=1)
        right = np.full((len(pseudo), most, width), -1, np.int32)
        for document, texts in enumerate(pseudo):
            right[document, : len(texts)] = padded([row(t) for t in texts], width, -1)
        counts = np.array([len(p) for p in pseudo])
        pairs = np.stack(
            [
                np.repeat(np.arange(len(self.candidates)), self.candidates.shape[1]),
                self.candidates.ravel(),
            ],
            1,
        )
        self.order = np.full((len(pairs), most), -1, np.int8)
        self.totals = np.zeros(len(pairs), np.int8)
        self.scores = np.zeros((len(pairs), most), np.float32)
        for start in range(0, len(pairs), max(_PAIRS // most, 1)):
            part = pairs[start : start + max(_PAIRS // most, 1)]
            references = np.repeat(left[part[:, 0]], most, 0)
            f = rouge.f_measure(references, right[part[:, 1]].reshape(-1, width))
            f = f.reshape(len(part), most)
            keep = np.arange(most) < counts[part[:, 1], None]
            for i, (query, document) in enumerate(part):
                for number in same(int(query), int(document)):
                    keep[i, number] = False
            if not keep.any(1).all():
                query, document = part[int(np.argmin(keep.any(1)))]
                raise ValueError(
                    f"document row {document}: no pseudo queries but the real query {query}"
                )
            self.totals[start : start + len(part)] = keep.sum(1)
            kept = keep & (f <= filter_threshold)
            empty = ~kept.any(1)
            lowest = np.where(keep, f, np.inf).argmin(1)
            kept[empty, lowest[empty]] = True
            # Left-out ones stand last; a stable sort keeps ties in file order.
            order = np.argsort(np.where(kept, -f, np.inf), axis=1, kind="stable")
            filled = np.arange(most) < kept.sum(1)[:, None]
            self.order[start : start + len(part)] = np.where(filled, order, -1)
            self.scores[start : start + len(part)] = np.take_along_axis(f, order, 1) * filled

    def __call__(self, query: int, row: int) -> np.ndarray:
        """Numbers of pseudo queries by rank. Raises ValueError for a pair not in the table."""
        order = self.order[self._pair(query, row)]
        return order[order >= 0]

    def count(self, query: int, row: int) -> int:
        """How many there were before the filter."""
        return int(self.totals[self._pair(query, row)])

    def _pair(self, query: int, row: int) -> int:
        slot = np.flatnonzero(self.candidates[query] == row)
        if not len(slot):
            raise ValueError(f"document {row} is no candidate of query {query}")
        return query * self.candidates.shape[1] + int(slot[0])

    def spread(self, n_parts: int) -> list[tuple[float, float, float]]:
        """(mean, least, largest) score of each part, 1 to N, over all pairs."""
        rows: list[list[np.ndarray]] = [[] for _ in range(n_parts)]
        counts = np.stack([self.totals, (self.order >= 0).sum(1)], 1)
        for total, m in np.unique(counts, axis=0).tolist():
            scores = self.scores[(counts == (total, m)).all(1)]
            for part in range(1, n_parts + 1):
                first, last = capstone.part_range(total, n_parts, part)
                rows[part - 1].append(scores[:, min(first, m) - 1 : min(last, m)].ravel())
        joined = [np.concatenate(r) for r in rows]
        return [(float(r.mean()), float(r.min()), float(r.max())) for r in joined]


@dataclasses.dataclass(frozen=True)
class Ranked:
    """Documents with a table of ranks."""

    documents: Documents
    table: RankTable

    def __len__(self) -> int:
        return len(self.documents)

    def fields(self, row: int) -> list[Sequence[int]]:
        """The title's (where there is one) and the body's pieces."""
        return self.documents.fields(row)

    def pseudo(self, row: int) -> Sequence[Sequence[int]]:
        """Pieces of the pseudo queries."""
        return self.documents.pseudo(row)

    def order(self, query: int, row: int) -> np.ndarray:
        """Numbers of pseudo queries by rank."""
        return self.table(query, row)

    def count(self, query: int, row: int) -> int:
        """How many there were before the filter."""
        return self.table.count(query, row)
