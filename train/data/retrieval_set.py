"""What a retriever is measured on: an index of documents, queries and judgments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxmodels.retrieval import metrics
from jaxmodels.retrieval.metrics import Evaluation, Judgments


@dataclasses.dataclass(frozen=True)
class RetrievalSet:
    """Documents, queries and judgments.

    Attributes:
      document_ids: ids of all documents, in row order.
      document_row: (row, view) -> token ids of that version of the document.
      views: versions of each document in the index.
      query_ids, query_rows: ids and token ids of the queries.
      judgments: query id -> document id -> grade, for the binary measures.
      graded: the same with lesser grades, for nDCG; None: `judgments`.
      query_texts, bm25: the queries' texts and the sparse baseline (a function that makes it),
        where there is one.
      document_text: row -> text (without its title), to look for answers in; None where that is
        not needed.
    """

    document_ids: Sequence[str]
    document_row: Callable[[int, int], Sequence[int]]
    views: int
    query_ids: Sequence[str]
    query_rows: Sequence[Sequence[int]]
    judgments: Judgments
    graded: Judgments | None = None
    query_texts: Sequence[str] | None = None
    bm25: Callable | None = None
    document_text: Callable[[int], str] | None = None

    def measure(self, rows: np.ndarray, scores: np.ndarray | None = None) -> dict[str, float]:
        """Measures of a search's document rows [queries, depth] (by scores, or as ordered)."""
        if scores is None:
            run = metrics.run_from_ranking(self.query_ids, rows, self.document_ids)
        else:
            run = metrics.run_from_scores(self.query_ids, rows, scores, self.document_ids)
        return self.evaluate(run)

    def evaluate(self, run: metrics.Run) -> dict[str, float]:
        """MRR@10, success@10, recall@100 and, by the graded judgments, nDCG@10."""
        names = ("mrr@10", "success@1", "success@10", "recall@100")
        found: Evaluation = metrics.evaluate(run, self.judgments, names)
        graded = metrics.evaluate(run, self.graded or self.judgments, ["ndcg@10"])
        return {**found.mean, **graded.mean}

    def baseline(self) -> dict[str, float]:
        """BM25's measures, `bm25_` before their names; empty where there is no baseline."""
        if self.bm25 is None or self.query_texts is None:
            return {}
        scores, rows = self.bm25().search(self.query_texts, 1000)
        return {f"bm25_{k}": v for k, v in self.measure(rows, scores).items()}
