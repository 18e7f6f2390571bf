"""CAPSTONE: curriculum sampling for dense retrieval with document expansion.

He et al., EMNLP 2023 (arXiv 2212.09114); official code microsoft/SimXNS
@0163380c69533be0112142ee6ba25f43bc9246bc, folder CAPSTONE. A document is expanded with pseudo
queries in training and in the index. Training begins with those least like the real query and
moves, part by part, to the most alike; the index holds the mean of K expanded versions.

Ranks and parts count from 1: rank 1 and part 1 are the most similar to the real query.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.language.rouge import rouge_l
from jaxmodels.retrieval.index import ExactIndex
from jaxmodels.spelling import did_you_mean

MOST_PSEUDO_QUERIES = 80
DELIMITERS = {"sep": "[SEP]", "blank": " "}
STRATEGIES = (
    "gold",
    "first",
    "random",
    "top-k",
    "bottom-k",
    "k-th",
    "k-part",
    "batch-uniform",
    "batch-uniform-gold",
    "gradual",
    "gradual-gold",
)


@dataclass(frozen=True)
class RankedQueries:
    """Pseudo queries of one document by similarity to one real query.

    Attributes:
      queries: candidates in file order, without duplicates and the real query.
      scores: float64 [m], ROUGE-L F of each against the real query.
      order: int [m], candidate numbers by rank: score descending, ties in file order.
      total: candidates before the filter, over which parts are counted.
    """

    queries: list[str]
    scores: np.ndarray
    order: np.ndarray
    total: int


def candidates_of(real: str | None, pseudo: Sequence[str], document: str = "") -> list[str]:
    """The first 80 pseudo queries without repetitions and without `real` (exactly equal).

    Raises ValueError naming the document when none is left.
    """
    kept = [q for q in dict.fromkeys(pseudo[:MOST_PSEUDO_QUERIES]) if q != real]
    if not kept:
        raise ValueError(
            f"document {document!r}: no pseudo queries"
            + (" but the real query itself" if len(pseudo) else "")
        )
    return kept


def rank_pseudo_queries(
    real: str,
    pseudo: Sequence[str],
    *,
    metric: str = "rouge-l",
    filter_threshold: float = 1.0,
    document: str = "",
) -> RankedQueries:
    """Pseudo queries ranked by ROUGE-L F against the real query.

    `filter_threshold` keeps scores up to it; where none is, the single lowest stays.

    Raises ValueError for another metric, and see `candidates_of`.
    """
    if metric != "rouge-l":
        raise ValueError(f"metric {metric!r}; known: rouge-l")
    queries = candidates_of(real, pseudo, document)
    scores = rouge_l(real, queries)
    keep = scores <= filter_threshold
    if not keep.any():
        keep[np.argmin(scores)] = True
    kept = [q for q, k in zip(queries, keep) if k]
    scores = scores[keep]
    return RankedQueries(kept, scores, np.argsort(-scores, kind="stable"), len(queries))


def part_range(m: int, n_parts: int, part: int) -> tuple[int, int]:
    """First and last rank (inclusive, from 1) of a part of m ranked candidates.

    end = floor((m / N) k), start = floor((m / N) (k - 1)), in doubles and in this order; an empty
    part takes rank end + 1. Raises ValueError for a part outside 1..N.
    """
    check_parts(n_parts, part)
    end, start = int((m / n_parts) * part), int((m / n_parts) * (part - 1))
    first, last = (end + 1, end + 1) if start == end else (start + 1, end)
    return min(first, m), min(last, m)


def check_parts(n_parts: int, part: int | None = None) -> None:
    """Refuse N < 1 and a part outside 1..N."""
    if n_parts < 1:
        raise ValueError(f"n_parts must be at least 1, not {n_parts}")
    if part is not None and not 1 <= part <= n_parts:
        raise ValueError(f"part {part} is not one of 1..{n_parts}")


def curriculum_part(
    step: int | np.ndarray, max_steps: int, n_parts: int, include_gold: bool = False
) -> int | np.ndarray:
    """Part in force at an optimizer step: N first, 1 last (0, the real query, with `include_gold`).

    Raises ValueError when there are fewer steps than parts.
    """
    check_parts(n_parts)
    stages = n_parts + include_gold
    if max_steps < stages:
        raise ValueError(f"max_steps {max_steps} are fewer than the {stages} parts")
    part = np.maximum(n_parts - np.asarray(step) // (max_steps // stages), 1 - include_gold)
    return int(part) if np.ndim(step) == 0 else part


def curriculum_stages(
    max_steps: int, n_parts: int, include_gold: bool = False
) -> list[tuple[int, int]]:
    """(first step, part) of every stage, in order; the loader restarts at each."""
    width = max_steps // (n_parts + include_gold)
    last = 1 - include_gold
    curriculum_part(0, max_steps, n_parts, include_gold)
    return [((n_parts - part) * width, part) for part in range(n_parts, last - 1, -1)]


@dataclass(frozen=True)
class Selection:
    """How a document's pseudo query is chosen in training.

    Attributes:
      strategy: one of `STRATEGIES`; "top-3", "bottom-3", "3-th", "2-part" give k by name.
      k: k of top-k, bottom-k, k-th, and the part of k-part.
      n_parts: N of k-part and gradual.
      gold_query_prob: probability of taking the real query instead.
    """

    strategy: str
    k: int = 1
    n_parts: int = 1
    gold_query_prob: float = 0.0

    @staticmethod
    def parse(text: str, n_parts: int = 1, gold_query_prob: float = 0.0, k: int = 1) -> Selection:
        """A selection from a string. Raises ValueError listing the strategies."""
        for pattern, strategy in (
            (r"(top|bottom)-(\d+)", "{0}-k"),
            (r"(\d+)-(th|part)", "k-{1}"),
        ):
            found = re.fullmatch(pattern, text)
            if found:
                k = int(next(g for g in found.groups() if g.isdigit()))
                text = strategy.format(*found.groups())
        if text not in STRATEGIES:
            raise ValueError(
                f"select_generated_query {text!r}{did_you_mean(text, STRATEGIES)}; known: "
                f"{', '.join(STRATEGIES)} (top-3, 2-part, ... with a number for k)"
            )
        if not 0 <= gold_query_prob <= 1:
            raise ValueError(f"gold_query_prob must be in [0, 1], not {gold_query_prob}")
        if k < 1:
            raise ValueError(f"k of {text} must be at least 1, not {k}")
        check_parts(n_parts, k if text == "k-part" else None)
        return Selection(text, k, n_parts, gold_query_prob)

    def at_part(self, part: int) -> Selection:
        """The gradual strategies during one part; part 0 is the real query."""
        if not self.strategy.startswith("gradual"):
            return self
        if part == 0:
            return Selection("gold", 1, self.n_parts, 1.0)
        return Selection("k-part", part, self.n_parts, self.gold_query_prob)

    def rank(self, rng: np.random.Generator, m: int, sample_index: int = 0, total: int = 0) -> int:
        """A rank 1..m drawn for m ranked candidates; 0 stands for the real query.

        Where a filter left m of `total` candidates (0: all), parts and turns are counted over all,
        and what lies beyond the m takes the last one.

        Raises ValueError for `first` (which is not a rank; see `choose`) and the gradual
        strategies without their part.
        """
        if self.gold_query_prob and rng.random() < self.gold_query_prob:
            return 0
        k, total = min(self.k, m), total or m
        match self.strategy:
            case "gold":
                return 0
            case "random":
                return int(rng.integers(1, m + 1))
            case "top-k":
                return int(rng.integers(1, k + 1))
            case "bottom-k":
                return int(rng.integers(m - k + 1, m + 1))
            case "k-th":
                return k
            case "k-part":
                first, last = part_range(total, self.n_parts, self.k)
                return min(int(rng.integers(first, last + 1)), m)
            case "batch-uniform":
                return min(sample_index % total + 1, m)
            case "batch-uniform-gold":
                rank = sample_index % (total + 1) + 1
                return min(rank, m) if rank <= total else 0
            case _:
                raise ValueError(f"{self.strategy} is not chosen by rank")

    def choose(
        self, rng: np.random.Generator, order: np.ndarray, sample_index: int = 0, total: int = 0
    ) -> int:
        """Number of the chosen candidate among those `order` ranks, -1 for the real query."""
        if self.strategy == "first":
            gold = self.gold_query_prob and rng.random() < self.gold_query_prob
            return -1 if gold else int(np.min(order))
        rank = self.rank(rng, len(order), sample_index, total)
        return int(order[rank - 1]) if rank else -1


def sample_part(rng: np.random.Generator, order: np.ndarray, part: int, n_parts: int) -> int:
    """Number of a candidate drawn uniformly from one part of the ranking `order` [m]."""
    first, last = part_range(len(order), n_parts, part)
    return int(order[int(rng.integers(first, last + 1)) - 1])


def expand_document(
    title: str,
    body: str,
    pseudo: str | Sequence[str] | None,
    *,
    mode: str = "append",
    delimiter: str = "[SEP]",
) -> str:
    """The document as one string: title, body and pseudo query (or several, joined by blanks).

    `mode` is "append" (the pseudo query last, so that truncation takes it first) or "prepend";
    `delimiter` is literal text, "[SEP]" being one token to the tokenizer. Every field is stripped;
    without a pseudo query the document is title and body.

    Raises ValueError for another mode.
    """
    if mode not in ("append", "prepend"):
        raise ValueError(f"expansion mode {mode!r}; known: append, prepend")
    fields = [title.strip(), body.strip()]
    if pseudo is not None:
        extra = pseudo if isinstance(pseudo, str) else " ".join(pseudo)
        fields.insert(2 if mode == "append" else 0, extra.strip())
    return delimiter.join(fields)


def views_of(pseudo: Sequence[str], count: int, document: str = "") -> list[str]:
    """The first `count` unique pseudo queries; a document with fewer repeats its list.

    Raises ValueError for a count below 1 or a document without pseudo queries.
    """
    if count < 1:
        raise ValueError(f"the number of views must be at least 1, not {count}")
    unique = candidates_of(None, pseudo, document)
    return (unique * math.ceil(count / len(unique)))[:count]


def mean_of_views(views: jax.Array) -> jax.Array:
    """Vectors [..., K, H] of K views -> the one in the index, [..., H]."""
    return views.mean(-2)


def view_scores(
    queries: jax.Array, views: jax.Array, reduce: str = "mean", first: int | None = None
) -> jax.Array:
    """Scores [Q, D] of queries [Q, H] against the first views [K, D, H]: their mean or maximum."""
    views = views[:first]
    if reduce == "mean":
        return _product(queries, mean_of_views(jnp.moveaxis(views, 0, -2)))
    if reduce != "max":
        raise ValueError(f"reduce {reduce!r}; known: mean, max")
    return jax.lax.map(lambda view: _product(queries, view), views).max(0)


def _product(queries, documents):
    return jnp.einsum("qh,dh->qd", queries, documents, precision=jax.lax.Precision.HIGHEST)


def search_views(
    queries: np.ndarray, views: Sequence[np.ndarray], depth: int, reduce: str = "mean"
) -> tuple[np.ndarray, np.ndarray]:
    """(scores, document rows) [Q, depth] of an exact search over K views [D, H].

    "mean" searches one index of averaged vectors, "max" one index a view and keeps each document's
    best score (K times the memory): rows beyond the documents are -1 with score -inf.
    """
    if not len(views):
        raise ValueError("no views to search")
    if reduce == "mean":
        total = np.zeros_like(np.asarray(views[0], np.float32))
        for view in views:
            total += np.asarray(view, np.float32)
        index = ExactIndex()
        index.add(total / len(views))
        return index.search(queries, depth)
    if reduce != "max":
        raise ValueError(f"reduce {reduce!r}; known: mean, max")
    found = []
    for view in views:
        index = ExactIndex()
        index.add(view)
        found.append(index.search(queries, depth))
    scores, rows = (np.concatenate(part, axis=1) for part in zip(*found))
    return merge_best(scores, rows, depth)


def merge_best(scores: np.ndarray, rows: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Result lists of several indices as one, each document with its best score.

    Args:
      scores: float [Q, n], rows: int [Q, n], -1 for none. Returns both [Q, depth], by score, ties
      by row.
    """
    out_scores = np.full((len(rows), depth), -np.inf, np.float32)
    out_rows = np.full((len(rows), depth), -1, np.int64)
    for q in range(len(rows)):
        order = np.lexsort((rows[q], -scores[q]))
        order = order[rows[q][order] >= 0]
        _, first = np.unique(rows[q][order], return_index=True)
        order = order[np.sort(first)][:depth]
        out_scores[q, : len(order)] = scores[q][order]
        out_rows[q, : len(order)] = rows[q][order]
    return out_scores, out_rows
