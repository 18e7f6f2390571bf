"""Graphs with node features, labels and splits: bundled ones, block models, co-change graphs.

File formats of the published data sets are in `node_graph_files`; `load` finds either by name.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.graphs.graph import check_edges, missing_reverse_edges, symmetrize
from jaxmodels.graphs.guidance import check_features
from train.naming import nearest

BUNDLED = ("digits", "breast_cancer", "karate", "sbm", "cochange")
PLANETOID = ("cora", "citeseer", "pubmed")
SAINT = ("ppi", "flickr", "reddit", "yelp", "amazon")
# (nodes, features, classes, multi-label), for shapes without data on disk.
PUBLISHED = {
    "cora": (2_708, 1_433, 7, False),
    "citeseer": (3_327, 3_703, 6, False),
    "pubmed": (19_717, 500, 3, False),
    "ppi": (14_755, 50, 121, True),
    "flickr": (89_250, 500, 7, False),
    "reddit": (232_965, 602, 41, False),
    "yelp": (716_847, 300, 100, True),
    "amazon": (1_569_960, 200, 107, True),
}


@dataclasses.dataclass(frozen=True)
class NodeGraph:
    """A graph for node classification.

    Attributes:
      edge_index: int64 [2, E], both directions for undirected graphs.
      x: float32 [N, d]. labels: int32 [N], or float32 [N, C] of 0 and 1 (multi-label).
      train, valid, test: bool [N]. num_classes: C.
      train_edge_index: edges that training may see (inductive sets), or None for all.
    """

    edge_index: np.ndarray
    x: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    num_classes: int
    train_edge_index: np.ndarray | None = None

    @property
    def num_nodes(self) -> int:
        return len(self.x)

    @property
    def multi_label(self) -> bool:
        return self.labels.ndim == 2


def load(options: Mapping[str, Any]) -> NodeGraph:
    """The graph that `options.dataset` names, checked; see `node_graphs.OPTIONS`.

    Raises ValueError for an unknown name and for data that cannot be trained on.
    """
    key = tuple(sorted((k, options[k]) for k in _READ_BY if k in options))
    return _load(key)


_READ_BY = (
    "dataset",
    "path",
    "neighbors",
    "labels_per_class",
    "split_seed",
    "allow_pickle",
    "symmetrize",
    "sbm",
    "max_files",
)


@functools.lru_cache(maxsize=4)
def _load(key) -> NodeGraph:
    options = dict(key)
    name = options["dataset"]
    if name in PLANETOID or name in SAINT:
        from train.data import node_graph_files

        graph = node_graph_files.read(name, options["path"], options["allow_pickle"])
    elif name in BUNDLED:
        graph = globals()[f"_{name}"](options)
    else:
        known = (*BUNDLED, *PLANETOID, *SAINT)
        raise ValueError(f"data.options.dataset: nothing named {name!r}; {nearest(name, known)}")
    return check_node_graph(graph, fix_direction=options["symmetrize"])


def check_node_graph(graph: NodeGraph, *, fix_direction: bool = False) -> NodeGraph:
    """The graph once it can be trained on.

    Raises:
      ValueError: edges out of range, features that are not finite (node and column named), an
        empty training mask, a training node without label. Warns of classes without training nodes
        and of edges in one direction only, which `fix_direction` mends. Validation and test nodes
        without a label are taken out of their masks.
    """
    inductive = graph.train_edge_index is not None
    names = ("edge_index", "train_edge_index") if inductive else ("edge_index",)
    edges = {name: check_edges(getattr(graph, name), graph.num_nodes) for name in names}
    check_features(graph.x, graph.num_nodes)
    if not graph.train.any():
        raise ValueError("the training mask is empty")
    if not graph.multi_label:
        bad = np.flatnonzero(graph.train & (graph.labels < 0))
        if len(bad):
            raise ValueError(
                f"masks and labels disagree: training node {bad[0]} has label "
                f"{graph.labels[bad[0]]}"
            )
        have = np.bincount(graph.labels[graph.train], minlength=graph.num_classes) > 0
        # Nobody can say whether these are right.
        labeled = graph.labels >= 0
        graph = dataclasses.replace(graph, valid=graph.valid & labeled, test=graph.test & labeled)
    else:
        have = graph.labels[graph.train].any(0)
    absent = np.flatnonzero(~have[: graph.num_classes])
    if len(absent):
        warnings.warn(f"no training node has class {', '.join(map(str, absent[:9]))}", stacklevel=2)
    missing = max(map(missing_reverse_edges, edges.values()))
    if missing and fix_direction:
        both = {name: symmetrize(pairs)[0] for name, pairs in edges.items()}
        graph = dataclasses.replace(graph, **both)
    elif missing:
        warnings.warn(
            f"{missing:.1%} of the edges have no reverse; the metrics and GCN are for undirected "
            "graphs: data.options.symmetrize=True adds them",
            stacklevel=2,
        )
    return graph


def knn_edges(x: np.ndarray, k: int) -> np.ndarray:
    """Edges to the k nearest neighbors by cosine, in both directions, [2, E] (union)."""
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    pairs = []
    for start in range(0, len(x), 1024):
        similarity = x[start : start + 1024] @ x.T
        rows = np.arange(len(similarity))
        similarity[rows, start + rows] = -np.inf
        near = np.argpartition(-similarity, k, axis=1)[:, :k]
        pairs.append(np.stack([near.ravel(), np.repeat(start + rows, k)]))
    return symmetrize(np.concatenate(pairs, axis=1))[0]


def split(
    labels: np.ndarray, per_class: int, seed: int, *, valid_share: float = 0.25
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`per_class` training nodes of every class, the rest dealt to validation and test."""
    rng = np.random.default_rng(seed)
    train = np.zeros(len(labels), bool)
    for kind in range(int(labels.max()) + 1):
        members = rng.permutation(np.flatnonzero(labels == kind))
        # A class of few nodes keeps at least half of them for evaluation.
        train[members[: min(per_class, -(-len(members) // 2))]] = True
    rest = rng.permutation(np.flatnonzero(~train & (labels >= 0)))
    valid, test = np.zeros(len(labels), bool), np.zeros(len(labels), bool)
    cut = int(len(rest) * valid_share)
    valid[rest[:cut]], test[rest[cut:]] = True, True
    return train, valid, test


def _with_split(edges, x, labels, options) -> NodeGraph:
    labels = labels.astype(np.int32)
    masks = split(labels, options["labels_per_class"], options["split_seed"])
    return NodeGraph(edges, x.astype(np.float32), labels, *masks, int(labels.max()) + 1)


def _digits(options) -> NodeGraph:
    """scikit-learn's 1,797 digits, pixels over 16, joined to their nearest neighbors."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = data.data / 16.0
    return _with_split(knn_edges(x, options["neighbors"]), x, data.target, options)


def _breast_cancer(options) -> NodeGraph:
    """scikit-learn's 569 tumors, standardized, joined to their nearest neighbors."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    x = (data.data - data.data.mean(0)) / data.data.std(0)
    return _with_split(knn_edges(x, options["neighbors"]), x, data.target, options)


def _karate(options) -> NodeGraph:
    """34 members, 78 friendships, the two factions as labels, degrees one-hot as features."""
    import networkx

    club = networkx.karate_club_graph()
    edges = symmetrize(np.array(club.edges).T)[0]
    labels = np.array([club.nodes[i]["club"] == "Officer" for i in range(34)])
    x = np.eye(18)[np.bincount(edges[1], minlength=34)]
    return _with_split(edges, x, labels, options)


def block_model(
    nodes: int,
    classes: int,
    inside: float,
    outside: float,
    features: int,
    noise: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stochastic block model with Gaussian class features: (edge_index, x, labels).

    `inside` and `outside` are a node's expected numbers of neighbors in its own class and in all
    others; x is a unit-norm class mean plus `noise` times standard normal noise.
    """
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(0, classes, nodes))
    pairs = []
    for same, degree in ((True, inside), (False, outside)):
        share = 1 / classes if same else 1 - 1 / classes
        wanted = rng.poisson(nodes * degree / 2)
        s, r = rng.integers(0, nodes, (2, int(3 * wanted / share) + 64))
        fits = np.flatnonzero(((labels[s] == labels[r]) == same) & (s != r))[:wanted]
        pairs.append(np.stack([s[fits], r[fits]]))
    means = rng.normal(size=(classes, features))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    x = means[labels] + noise * rng.normal(size=(nodes, features)) / np.sqrt(features)
    return symmetrize(np.concatenate(pairs, axis=1))[0], x, labels


def _sbm(options) -> NodeGraph:
    """A block model; `options.sbm` = (nodes, classes, inside, outside, features, noise)."""
    nodes, classes, inside, outside, features, noise = options["sbm"]
    edges, x, labels = block_model(
        int(nodes), int(classes), inside, outside, int(features), noise, options["split_seed"]
    )
    return _with_split(edges, x, labels, options)


def _cochange(options) -> NodeGraph:
    """Files of a version history, joined when changed together; the label is the top directory.

    Features are counts of the words in the subjects of a file's changes, log-scaled.
    `options.path` is a git clone, or a review history in a file that `review_files` reads. Changes
    of more than `max_files` files join nothing: they are sweeps.
    """
    if not options["path"]:
        raise ValueError("data.options.path: name a git clone or a CSV file of changes")
    return cochange_graph(_read_changes(Path(options["path"])), options)


_WORD = re.compile(r"[a-z][a-z0-9]+")


def _read_changes(path: Path) -> list[tuple[tuple[str, ...], list[str]]]:
    """(files, words) of every change."""
    from train.data.git_log import read_commits
    from train.data.review_files import read_reviews

    if path.is_dir():
        found = ((commit.files, commit.subject) for commit in read_commits(path))
    elif path.is_file():
        found = ((record.files, record.title) for record in read_reviews(path))
    else:
        raise ValueError(f"data.options.path: nothing at {path}")
    return [(files, _WORD.findall(title.lower())) for files, title in found]


def cochange_graph(
    changes: Iterable[tuple[Sequence[str], list[str]]], options: Mapping[str, Any]
) -> NodeGraph:
    """The graph of `_cochange` from (files, words) of every change.

    Directories of fewer than 2 * `labels_per_class` files and files changed alone are left out.
    """
    together: Counter = Counter()
    words: dict[str, Counter] = {}
    for files, tokens in changes:
        files = sorted(set(files))
        if not 2 <= len(files) <= options["max_files"]:
            continue
        for i, a in enumerate(files):
            words.setdefault(a, Counter()).update(tokens)
            for b in files[i + 1 :]:
                together[a, b] += 1
    tops = Counter(name.split("/")[0] for name in words if "/" in name)
    kept = [top for top, count in tops.items() if count >= 2 * options["labels_per_class"]]
    if len(kept) < 2:
        raise ValueError(
            f"{options['path']}: {len(kept)} top directories with at least "
            f"{2 * options['labels_per_class']} files changed together; two are needed"
        )
    names = sorted(name for name in words if "/" in name and name.split("/")[0] in kept)
    place = {name: i for i, name in enumerate(names)}
    labels = np.array([sorted(kept).index(name.split("/")[0]) for name in names])
    pairs = [(place[a], place[b]) for a, b in together if a in place and b in place]
    counts = Counter(word for name in names for word in words[name])
    vocabulary = {word: i for i, (word, _) in enumerate(sorted(counts.most_common(512)))}
    x = np.zeros((len(names), len(vocabulary)), np.float32)
    for name in names:
        for word, count in words[name].items():
            if word in vocabulary:
                x[place[name], vocabulary[word]] = count
    x = np.log1p(x)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
    edges = symmetrize(np.array(pairs, np.int64).reshape(-1, 2).T)[0]
    return _with_split(edges, x, labels, options)
