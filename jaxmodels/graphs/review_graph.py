"""The socio-technical graph of a review history: people, changes, files, words, repositories.

J. Zhang et al., arXiv 2202.02385, section III: nodes and relations from the records, words from
titles, descriptions and file names, words linked to words by pointwise mutual information over the
pull requests. The paper's text names the relations; the fixed rules (tokenizer, counts, order) are
this project's, see docs/systems/coral.md.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from jaxmodels.graphs.review_records import (
    PullRequest,
    WorkItem,
    parse_records,
    unique_records,
)

NODE_TYPES = ("user", "pull_request", "file", "word", "repository", "work_item")
USER, PULL_REQUEST, FILE, WORD, REPOSITORY, WORK_ITEM = range(len(NODE_TYPES))
# Relation -> the types of its two ends, in the order of its name.
RELATION_ENDS = {
    "pr_user": (PULL_REQUEST, USER),
    "pr_file": (PULL_REQUEST, FILE),
    "pr_word": (PULL_REQUEST, WORD),
    "file_word": (FILE, WORD),
    "word_word": (WORD, WORD),
    "pr_repository": (PULL_REQUEST, REPOSITORY),
    "pr_work_item": (PULL_REQUEST, WORK_ITEM),
    "work_item_parent": (WORK_ITEM, WORK_ITEM),
}
RELATIONS = tuple(RELATION_ENDS)
DEFAULT_RELATIONS = RELATIONS[:5]
STOP_WORDS = frozenset(
    "a an and are as at be by do does for from has have how i in into is it its no not of on or "
    "that the this to was we were when where which who will with you".split()
)

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_RUN = re.compile(r"[A-Za-z0-9]+")


def check_relations(relations: Sequence[str]) -> tuple[str, ...]:
    """The chosen relations as a tuple.

    Raises:
      ValueError: a name that is not among the eight, or one given twice.
    """
    for name in relations:
        if name not in RELATION_ENDS:
            raise ValueError(f"no relation {name!r}; the eight are {', '.join(RELATIONS)}")
    if len(set(relations)) != len(relations):
        raise ValueError(f"relations {', '.join(relations)}: each may occur once")
    return tuple(relations)


def tokenize(text: str, stop_words: Iterable[str] = STOP_WORDS) -> list[str]:
    """Distinct lower-case tokens of a text in their order.

    camelCase is split before a capital that follows a small letter or digit; a token is a maximal
    run of ASCII letters and digits; single characters, numbers and stop words are dropped.
    """
    stop_words = stop_words if isinstance(stop_words, (set, frozenset)) else set(stop_words)
    words: dict[str, None] = {}
    for run in _RUN.findall(_CAMEL.sub(" ", text)):
        word = run.lower()
        if len(word) > 1 and not word.isdigit() and word not in stop_words:
            words[word] = None
    return list(words)


def file_words(path: str, stop_words: Iterable[str] = STOP_WORDS) -> list[str]:
    """Tokens of the last component of a path without its last extension."""
    return tokenize(os.path.splitext(path.rpartition("/")[2])[0], stop_words)


@dataclasses.dataclass(frozen=True)
class ReviewGraph:
    """Nodes of six types and undirected relations, each edge stored once.

    Attributes:
      node_keys: [N] text; by type in the order of `NODE_TYPES`, inside a type by code points.
      node_type: [N] int64, index into `NODE_TYPES`.
      edges: relation -> [2, E] int64, smaller index first, columns in lexicographic order.
      weights: relation -> [E] float32; 1, but for the PMI of `word_word`.
      records: the history it was built from, each pull request once.
      options: keyword arguments of `build_graph`, for `upsert`.
    """

    node_keys: np.ndarray
    node_type: np.ndarray
    edges: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]
    records: tuple[PullRequest, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.node_keys)

    @property
    def stop_words(self) -> frozenset[str]:
        """The block list it was built with."""
        return frozenset(self.options.get("stop_words", STOP_WORDS))

    @functools.cached_property
    def type_bounds(self) -> np.ndarray:
        """[7] int64: nodes of type t are `bounds[t] .. bounds[t + 1]`."""
        return np.searchsorted(self.node_type, np.arange(len(NODE_TYPES) + 1))

    @functools.cached_property
    def _index(self) -> list[dict[str, int]]:
        bounds = self.type_bounds
        keys = self.node_keys.tolist()
        return [
            {key: i for i, key in enumerate(keys[bounds[t] : bounds[t + 1]], int(bounds[t]))}
            for t in range(len(NODE_TYPES))
        ]

    def node(self, kind: int, key: str) -> int | None:
        """Index of the node of type `kind` named `key`, None when the graph has none."""
        return self._index[kind].get(key)

    def nodes_of(self, kind: int) -> np.ndarray:
        """Indices of all nodes of a type, [n] int64."""
        return np.arange(self.type_bounds[kind], self.type_bounds[kind + 1])


def build_graph(
    records: Iterable[Any],
    *,
    stop_words: Iterable[str] = STOP_WORDS,
    pmi_min: float = 0.0,
    min_word_df: int = 1,
    max_files_per_pr: int | None = None,
) -> ReviewGraph:
    """The socio-technical graph of a history; the order of the records does not matter.

    Args:
      records: `PullRequest`s or mappings of that form.
      stop_words: words that get no node.
      pmi_min: a pair of words is linked when its PMI (natural logarithm) is greater.
      min_word_df: words of fewer documents (pull requests and files) get no node.
      max_files_per_pr: of longer lists only the first files count.

    Raises:
      ValueError: see `parse_records` and `unique_records`; a negative PMI edge.
    """
    records = sorted(unique_records(parse_records(records)), key=lambda r: r.id)
    stop_words = frozenset(stop_words)
    options = {
        "stop_words": stop_words,
        "pmi_min": pmi_min,
        "min_word_df": min_word_df,
        "max_files_per_pr": max_files_per_pr,
    }
    files_of = [tuple(dict.fromkeys(r.files[:max_files_per_pr])) for r in records]
    words_of = [tokenize(r.text, stop_words) for r in records]
    words_of_file = {f: file_words(f, stop_words) for files in files_of for f in files}
    if min_word_df > 1:
        documents = Counter(w for words in (*words_of, *words_of_file.values()) for w in words)
        keep = {w for w, n in documents.items() if n >= min_word_df}
        words_of = [[w for w in words if w in keep] for words in words_of]
        words_of_file = {f: [w for w in ws if w in keep] for f, ws in words_of_file.items()}

    nodes: list[dict[str, int]] = []
    keys: list[str] = []
    people_of = [tuple(dict.fromkeys((r.author, *r.reviewers, *r.commenters))) for r in records]
    parents = [(w.id, w.parent) for r in records for w in r.work_items if w.parent]
    for members in (
        {p for people in people_of for p in people},
        {r.id for r in records},
        set(words_of_file),
        {w for words in (*words_of, *words_of_file.values()) for w in words},
        {r.repo for r in records if r.repo},
        {w.id for r in records for w in r.work_items} | {parent for _, parent in parents},
    ):
        nodes.append({key: i for i, key in enumerate(sorted(members), len(keys))})
        keys.extend(nodes[-1])
    users, pull_requests, files, words, repos, items = nodes
    ids = [pull_requests[r.id] for r in records]
    lists = {
        "pr_user": ((i, users[p]) for i, people in zip(ids, people_of) for p in people),
        "pr_file": ((i, files[f]) for i, paths in zip(ids, files_of) for f in paths),
        "pr_word": ((i, words[w]) for i, ws in zip(ids, words_of) for w in ws),
        "file_word": ((files[f], words[w]) for f, ws in words_of_file.items() for w in ws),
        "pr_repository": ((i, repos[r.repo]) for i, r in zip(ids, records) if r.repo),
        "pr_work_item": ((i, items[w.id]) for i, r in zip(ids, records) for w in r.work_items),
        "work_item_parent": ((items[a], items[b]) for a, b in parents if a != b),
    }
    edges = {name: _stored_once(pairs) for name, pairs in lists.items()}
    weights = {name: np.ones(pairs.shape[1], np.float32) for name, pairs in edges.items()}
    pull_request_words = [[words[w] for w in ws] for ws in words_of]
    edges["word_word"], weights["word_word"] = _mutual_information(
        pull_request_words, min(words.values(), default=0), len(words), pmi_min
    )
    return ReviewGraph(
        node_keys=np.array(keys, dtype=str),
        node_type=np.repeat(np.arange(len(NODE_TYPES)), [len(n) for n in nodes]),
        edges={name: edges[name] for name in RELATIONS},
        weights={name: weights[name] for name in RELATIONS},
        records=tuple(records),
        options=options,
    )


def upsert(
    graph: ReviewGraph, records: Iterable[Any] = (), work_items: Iterable[WorkItem] = ()
) -> ReviewGraph:
    """The graph after the source changed: new records inserted, known ids replaced.

    A replaced pull request loses the words, people and files that its new record does not have;
    nodes that nothing refers to any more disappear. It equals a fresh `build_graph` of the history.

    Args:
      records: new or changed pull requests.
      work_items: items whose text or parent changed, in every pull request that is linked to them.
    """
    history = {record.id: record for record in graph.records}
    changed = list(records)
    if changed:
        history |= {r.id: r for r in unique_records(parse_records(changed))}
    items = {item.id: item for item in work_items}
    if items:
        for identity, record in history.items():
            if any(item.id in items for item in record.work_items):
                new = tuple(items.get(item.id, item) for item in record.work_items)
                history[identity] = dataclasses.replace(record, work_items=new)
    return build_graph(history.values(), **graph.options)


def _stored_once(pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    """[2, E]: smaller end first, no duplicates, columns sorted."""
    flat = np.array(list(pairs), np.int64).reshape(-1, 2)
    return np.unique(np.sort(flat, axis=1), axis=0).T


def _mutual_information(
    words_of: Sequence[Sequence[int]], first: int, count: int, pmi_min: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of words whose PMI over the pull requests exceeds `pmi_min`, and the PMI.

    PMI = log(o(x,y) N / (o(x) o(y))), taken of the ratio of the integers, so that independent
    pairs give exactly 0.
    """
    lengths = [len(words) for words in words_of]
    columns = np.array([w for words in words_of for w in words], np.int64) - first
    rows = np.repeat(np.arange(len(words_of)), lengths)
    incidence = sparse.csr_array(
        (np.ones(len(columns), np.int64), (rows, columns)), shape=(len(words_of), count)
    )
    together = sparse.triu(incidence.T @ incidence, k=1).tocoo()
    x, y = together.coords
    alone = np.bincount(columns, minlength=count)
    pmi = np.log(together.data * len(words_of) / (alone[x] * alone[y]))
    keep = pmi > pmi_min
    if np.any(pmi[keep] < 0):
        raise ValueError(
            f"pmi_min = {pmi_min} keeps {int(np.sum(pmi[keep] < 0))} word pairs of negative PMI; "
            "edge weights must not be negative, so pmi_min must be at least 0"
        )
    x, y, pmi = x[keep], y[keep], pmi[keep]
    order = np.lexsort((y, x))
    return np.stack([x[order], y[order]]).astype(np.int64) + first, pmi[order].astype(np.float32)
