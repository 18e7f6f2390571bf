"""BM25, the sparse baseline that a trained retriever has to beat, and a source of hard negatives.

score(q, d) = sum over words w of q of idf(w) tf (k1 + 1) / (tf + k1 (1 - b + b |d| / avgdl)), with
idf(w) = log(1 + (N - n + 0.5) / (n + 0.5)) as Lucene has it. Robertson and Zaragoza, 2009.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from scipy import sparse

_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """Lower-cased alphanumeric words, no stemming."""
    return _WORD.findall(text.lower())


class Bm25:
    """An inverted index over texts; `k1` and `b` default to Anserini's."""

    def __init__(self, texts: Sequence[str], k1: float = 0.9, b: float = 0.4):
        if not len(texts):
            raise ValueError("BM25 over no documents")
        self.vocabulary: dict[str, int] = {}
        rows, columns = [], []
        for row, text in enumerate(texts):
            for word in words(text):
                columns.append(self.vocabulary.setdefault(word, len(self.vocabulary)))
                rows.append(row)
        shape = (len(texts), max(len(self.vocabulary), 1))
        counts = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape)
        counts.sum_duplicates()
        lengths = np.asarray(counts.sum(1)).ravel()
        frequency = np.diff(counts.tocsc().indptr)
        idf = np.log1p((len(texts) - frequency + 0.5) / (frequency + 0.5))
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
        row_of = np.repeat(np.arange(len(texts)), np.diff(counts.indptr))
        tf = counts.data
        weights = idf[counts.indices] * tf * (k1 + 1) / (tf + norm[row_of])
        self._weights = sparse.csr_matrix((weights, counts.indices, counts.indptr), shape).T.tocsr()

    def scores(self, queries: Sequence[str]) -> np.ndarray:
        """float32 [queries, documents]."""
        rows, columns = [], []
        for row, query in enumerate(queries):
            known = [self.vocabulary[w] for w in words(query) if w in self.vocabulary]
            rows += [row] * len(known)
            columns += known
        shape = (len(queries), self._weights.shape[0])
        asked = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape)
        return (asked @ self._weights).toarray().astype(np.float32)

    def search(
        self, queries: Sequence[str], k: int, chunk: int = 512
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores, document rows) [queries, k], best first, ties by row; -inf and -1 beyond."""
        found = []
        for start in range(0, len(queries), chunk):
            scores = self.scores(queries[start : start + chunk])
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            found.append((np.take_along_axis(scores, order, 1), order))
        scores, rows = (np.concatenate(part) for part in zip(*found))
        missing = max(k - rows.shape[1], 0)
        scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf)
        return scores, np.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
