"""A query and its candidate documents as the token rows that distillation wants, in two layouts.

`prod`: CLS q SEP; CLS title SEP text SEP, a missing title being "-"; everything padded to fixed
lengths. `lead`: the query cut by slicing (its SEP may be lost), empty titles staying empty, and
late-interaction rows besides: [unused1] for a query's CLS and [unused2] for a document's, queries
padded with [MASK], which takes part. Cross-encoder rows are the query and the document without its
CLS and final SEP. Masks are `ids != 0` throughout. After microsoft/SimXNS@0163380,
PROD/ProD_KD/utils/marco_until.py and LEAD/dataset.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from train.data.expansion import hard_negatives
from train.data.wordpiece import WordPiece, cross_row, padded

LAYOUTS = ("prod", "lead")
SAMPLINGS = ("random", "descend")


def choose_candidates(
    positives: Sequence[int],
    negatives: Sequence[int],
    count: int,
    *,
    rng: np.random.Generator | None,
    sampling: str = "random",
) -> list[int]:
    """The first positive, then `count` negatives; too few are repeated cyclically.

    `random` takes them from a new order each time, `descend` in stored order (hardest first).

    Raises ValueError for an unknown sampling, or a query without negatives where some are wanted.
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling {sampling!r}; known: {', '.join(SAMPLINGS)}")
    if sampling == "random" and rng is not None:
        negatives = rng.permutation(np.asarray(negatives, np.int64)).tolist()
    return [positives[0], *hard_negatives(negatives, count)]


@dataclasses.dataclass(frozen=True)
class CandidateRows:
    """Token rows of queries and documents.

    Attributes:
      words: the tokenizer. layout: prod | lead.
      query_length, document_length: of padded rows, special tokens included.
    """

    words: WordPiece
    layout: str
    query_length: int
    document_length: int

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r}; known: {', '.join(LAYOUTS)}")
        if self.layout == "lead":
            for word in ("[unused1]", "[unused2]", "[MASK]"):
                if word not in self.words.ids:
                    raise ValueError(f"late interaction marks rows with {word}, an unknown word")

    def query(self, text: str) -> list[int]:
        """Ids of a query, not padded."""
        return self.words.query(text, self.query_length, cut=self.layout == "lead")

    def document(self, title: str, text: str) -> list[int]:
        """Ids of a document, not padded."""
        if self.layout == "lead":
            return self.words.pair(title, text.strip(), self.document_length)
        return self.words.pair(title or "-", text, self.document_length)

    def queries(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """int32 [B, query_length]."""
        return padded(rows, self.query_length)

    def documents(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """int32 [D, document_length]."""
        return padded(rows, self.document_length)

    def late_queries(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """int32 [B, query_length], marked, padded with [MASK]."""
        ids = self.words.ids
        return padded(
            [[ids["[unused1]"], *row[1:]] for row in rows], self.query_length, ids["[MASK]"]
        )

    def late_documents(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """int32 [D, document_length], marked, padded with 0."""
        mark = self.words.ids["[unused2]"]
        return padded([[mark, *row[1:]] for row in rows], self.document_length)

    @property
    def cross_length(self) -> int:
        """Length of padded cross-encoder rows."""
        both = self.query_length + self.document_length
        return both - 2 if self.layout == "lead" else both

    def cross(
        self, query: Sequence[int], documents: Sequence[Sequence[int]], length: int | None = None
    ) -> np.ndarray:
        """int32 [N, length] of one query with each of its documents; default `cross_length`."""
        rows = [cross_row(query, document) for document in documents]
        return padded(rows, self.cross_length if length is None else length)
