"""Node classification: an example is a padded subgraph, drawn by a sampler; evaluation is whole.

`sampler` is one of SAMPLERS. `guided` is MeGuide's: node scores, hop cap and size come from the
metrics of the training graph and the training labels (`size`, `hops` override them), `ripple` the
same with uniform choice. `saint_node`, `saint_edge`, `saint_walk`, `neighbor`, `cluster` and
`random` are the baselines, `full` the whole graph every step. `guided_on_device` hands out seeds
only: the task samples under `jit` from a graph on the device.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxmodels.graphs import guidance, subgraph_samplers
from jaxmodels.graphs.graph import bucket_size, make_graph
from jaxmodels.graphs.guided_sampler import (
    Adjacency,
    adjacency,
    check_sampling,
    neighbors_of,
    sample_on_host,
)
from train.data import node_graph_sets
from train.data.array_source import ArraySource
from train.data.node_graph_sets import PLANETOID, PUBLISHED, SAINT, NodeGraph
from train.naming import nearest

SAMPLERS = (
    "guided",
    "guided_on_device",
    "ripple",
    "random",
    "saint_node",
    "saint_edge",
    "saint_walk",
    "neighbor",
    "cluster",
    "full",
)
SPLITS = ("train", "valid", "test")

# size, hops: 0 takes them from the metrics. pad_edges: 0 takes the next power of two of the largest
# of 64 trial subgraphs, with a quarter to spare. strict: isolated seeds are an error.
OPTIONS: dict[str, Any] = {
    "dataset": "digits",
    "sampler": "guided",
    "size": 0,
    "hops": 0,
    "ratio": 0.5,
    "beta": 1.0,
    "restart": False,
    "tau": 0.0,
    "k_max": 10,
    "pad_edges": 0,
    "normalize_loss": "",  # "" | "saint": 1 / (N * inclusion frequency)
    "dry_epochs": 50,
    "strict": False,
    "walk_length": 2,
    "fanouts": (10, 10),
    "targets": 64,
    "clusters": 20,
    "clusters_per_batch": 4,
    "labels_per_class": 20,
    "split_seed": 0,
    "neighbors": 8,
    "sbm": (2000, 10, 10.0, 4.0, 32, 1.0),
    "max_files": 20,
    "allow_pickle": False,
    "symmetrize": False,
    "threads": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    name: {"dataset": name} for name in (*node_graph_sets.BUNDLED, *PLANETOID, *SAINT)
}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A graph, its training side, and what the metrics say of it.

    Attributes:
      graph: the whole graph. training: host adjacency that training sees (self loops left out).
      edges: host adjacency with self loops, for induced subgraphs.
      scores: [N] node scores. failure: of the training labels, or None where size and hops are set.
      size, hops: of a subgraph.
    """

    graph: NodeGraph
    training: Adjacency
    edges: Adjacency
    scores: np.ndarray
    failure: guidance.ConnectionFailure | None
    size: int
    hops: int


def prepared(options: Mapping[str, Any]) -> Prepared:
    """The data set of these options with its metrics, kept for the process."""
    return _prepared(_key(options))


def _key(options: Mapping[str, Any]) -> tuple:
    """Options as an argument of cached functions."""
    return tuple(
        sorted((k, tuple(v) if isinstance(v, (list, tuple)) else v) for k, v in options.items())
    )


@functools.lru_cache(maxsize=4)
def _prepared(key) -> Prepared:
    options = dict(key)
    _check(options)
    graph = node_graph_sets.load(options)
    edge_index = graph.edge_index if graph.train_edge_index is None else graph.train_edge_index
    measured = guidance.undirected(edge_index, graph.num_nodes, tables=graph.num_nodes > 20_000)
    scores = np.asarray(guidance.node_scores(measured, graph.x))
    size, hops, failure = options["size"], options["hops"], None
    if options["sampler"] == "full":
        size, hops = graph.num_nodes, 1
    elif not size or not hops:
        failure = guidance.connection_failure_distance(
            measured,
            labels=graph.labels,
            mask=graph.train,
            k_max=options["k_max"],
            tau=options["tau"],
        )
        # In an inductive set the other nodes are not there yet.
        there = None if graph.train_edge_index is None else graph.train
        found = guidance.subgraph_size(measured, failure.distance, mask=there)
        size, hops = size or found.size, hops or found.hop_cap
    try:
        check_sampling(graph.num_nodes, size, hops, options["ratio"])
    except ValueError as error:
        raise ValueError(f"data.options: {error}") from None
    training = adjacency(make_graph(edge_index, graph.num_nodes))
    lonely = int((graph.train & (np.diff(training.indptr) == 0)).sum())
    if lonely:
        message = f"{lonely} training nodes are isolated: their subgraphs are single nodes"
        if options["strict"]:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    s, r = edge_index[:, np.lexsort(edge_index)]
    counts = np.bincount(r, minlength=graph.num_nodes)
    edges = Adjacency(np.concatenate([[0], np.cumsum(counts)]), s)
    return Prepared(graph, training, edges, scores, failure, size, hops)


def _check(options: Mapping[str, Any]) -> None:
    if options["sampler"] not in SAMPLERS:
        raise ValueError(
            f"data.options.sampler: nothing named {options['sampler']!r}; "
            f"{nearest(options['sampler'], SAMPLERS)}"
        )
    if options["normalize_loss"] not in ("", "saint"):
        given = options["normalize_loss"]
        raise ValueError(f"data.options.normalize_loss: {given!r}; known: saint, or nothing")


def dimensions(options: Mapping[str, Any]) -> tuple[int, int, int, bool]:
    """(nodes, features, classes, multi-label); published numbers where no data is on disk."""
    if options["dataset"] in PUBLISHED and not options["path"]:
        return PUBLISHED[options["dataset"]]
    graph = prepared(options).graph
    return graph.num_nodes, graph.x.shape[1], graph.num_classes, graph.multi_label


def _shapes(nodes: int, edges: int, options: Mapping[str, Any]) -> dict[str, Any]:
    _, features, classes, multi_label = dimensions(options)
    labels = (nodes, classes) if multi_label else (nodes,)
    return {
        "x": jax.ShapeDtypeStruct((nodes, features), np.float32),
        "senders": jax.ShapeDtypeStruct((edges,), np.int32),
        "receivers": jax.ShapeDtypeStruct((edges,), np.int32),
        "label": jax.ShapeDtypeStruct(labels, np.float32 if multi_label else np.int32),
        "loss_weight": jax.ShapeDtypeStruct((nodes,), np.float32),
        "node_mask": jax.ShapeDtypeStruct((nodes,), np.bool_),
    }


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """One padded subgraph: `x` [S, d], `senders` and `receivers` [E], `label` [S] or [S, C],
    `loss_weight` [S], `node_mask` [S]; for `guided_on_device` a `seed` [].

    Raises ValueError when neither the data nor `size` and `pad_edges` say how large it is.
    """
    _check(options)
    if options["sampler"] == "guided_on_device":
        return {"seed": jax.ShapeDtypeStruct((), np.int32)}
    if options["size"] and options["pad_edges"]:
        return _shapes(options["size"], options["pad_edges"], options)
    if options["dataset"] in PUBLISHED and not options["path"]:
        raise ValueError(
            f"data.options.path: name the folder that holds {options['dataset']}'s files (without "
            "it, shapes alone need size and pad_edges)"
        )
    return _shapes(prepared(options).size, pad_edges(options), options)


def eval_element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The whole graph, in the form of `element_spec`."""
    graph = prepared(options).graph
    return _shapes(graph.num_nodes, bucket_size(graph.edge_index.shape[1]), options)


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Training seeds; evaluation splits are one example, the graph."""
    if options["dataset"] in PUBLISHED and not options["path"]:
        return {"train": 1, "valid": 1, "test": 1}
    return {"train": int(prepared(options).graph.train.sum()), "valid": 1, "test": 1}


def source(split: str, options: Mapping[str, Any]) -> ArraySource:
    """Seeds for training; for an evaluation split its number."""
    if split == "train":
        seeds = np.flatnonzero(prepared(options).graph.train)
        return ArraySource({"seed": seeds.astype(np.int32)})
    return ArraySource({"split": np.array([SPLITS.index(split)])})


def eval_transform(options: Mapping[str, Any]) -> Callable:
    """The whole graph; `loss_weight` is 1 on the split's nodes."""
    return functools.partial(_whole, dict(options))


def _whole(options: Mapping[str, Any], example: Mapping[str, Any]) -> dict[str, np.ndarray]:
    graph = prepared(options).graph
    split = SPLITS[int(example["split"])]
    padded = make_graph(graph.edge_index, graph.num_nodes, pad_edges=None)
    return {
        "x": graph.x,
        "senders": padded.senders,
        "receivers": padded.receivers,
        "label": graph.labels if graph.multi_label else np.maximum(graph.labels, 0),
        "loss_weight": getattr(graph, split).astype(np.float32),
        "node_mask": np.ones(graph.num_nodes, bool),
    }


def train_transform(options: Mapping[str, Any]) -> Callable:
    """Seed -> padded subgraph."""
    if options["sampler"] == "guided_on_device":
        return _only_the_seed
    return TrainTransform(dict(options))


def _only_the_seed(example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    del rng
    return dict(example)


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Draw, induce, pad. Worker processes get the options and prepare the data themselves."""

    options: dict[str, Any]

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        drawn = draw(self.options, int(example["seed"]), rng)
        return padded_subgraph(self.options, *drawn, pad_edges=pad_edges(self.options))


def draw(
    options: Mapping[str, Any], seed: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """(nodes in order of importance, edges [2, E] or None for induced, targets or None for all)."""
    data = prepared(options)
    graph, sampler, size = data.training, options["sampler"], data.size
    # In an inductive set the other nodes are not there yet.
    inductive = data.graph.train_edge_index is not None
    roots = np.flatnonzero(data.graph.train) if inductive else None
    if sampler in ("guided", "ripple", "guided_on_device"):
        nodes, _ = sample_on_host(
            graph,
            data.scores,
            seed,
            size,
            hops=data.hops,
            ratio=options["ratio"],
            beta=0.0 if sampler == "ripple" else options["beta"],
            rng=rng,
            restart=data.graph.train if options["restart"] else None,
        )
        return nodes, None, None
    if sampler == "neighbor":
        pool = np.flatnonzero(data.graph.train)
        others = rng.choice(pool, min(options["targets"], len(pool)), replace=False)
        targets = np.concatenate([[seed], others[others != seed]])[: options["targets"]]
        nodes, edges = subgraph_samplers.sample_neighbors(graph, targets, options["fanouts"], rng)
        nodes = nodes[:size]
        return nodes, edges, targets
    if sampler == "cluster":
        parts = _clusters(_key(options))
        count = min(options["clusters_per_batch"], options["clusters"])
        chosen = rng.choice(options["clusters"], count, replace=False)
        return np.concatenate([np.flatnonzero(parts == part) for part in chosen])[:size], None, None
    if sampler == "full":
        return np.arange(size), None, None
    if sampler == "random":
        return subgraph_samplers.sample_nodes(graph, size, rng, roots), None, None
    if sampler == "saint_node":
        return subgraph_samplers.saint_nodes(graph, size, rng), None, None
    if sampler == "saint_edge":
        law = _edge_law(_key(options))
        return subgraph_samplers.saint_edges(law, size, rng), None, None
    length = options["walk_length"]
    return subgraph_samplers.saint_walks(graph, size, length, rng, roots), None, None


@functools.lru_cache(maxsize=4)
def _clusters(key) -> np.ndarray:
    options = dict(key)
    rng = np.random.default_rng(options["split_seed"])
    return subgraph_samplers.partition(_prepared(key).training, options["clusters"], rng)


@functools.lru_cache(maxsize=4)
def _edge_law(key):
    return subgraph_samplers.edge_probabilities(_prepared(key).training)


def _induced(edges: Adjacency, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Local (senders, receivers) among ascending `nodes`, ascending by receiver."""
    senders, counts = neighbors_of(edges, nodes)
    receivers = np.repeat(np.arange(len(nodes)), counts)
    place = np.minimum(np.searchsorted(nodes, senders), len(nodes) - 1)
    inside = nodes[place] == senders
    return place[inside], receivers[inside]


def pad_edges(options: Mapping[str, Any]) -> int:
    """Length of a subgraph's padded edge list."""
    return options["pad_edges"] or _pad_edges(_key(options))


@functools.lru_cache(maxsize=4)
def _pad_edges(key) -> int:
    options, data = dict(key), _prepared(key)
    if options["sampler"] == "full":
        return bucket_size(len(data.edges.indices))
    rng = np.random.default_rng(options["split_seed"])
    seeds = rng.choice(np.flatnonzero(data.graph.train), 64)
    largest = 1
    for seed in seeds:
        nodes, edges, _ = draw(options, int(seed), rng)
        count = len(_induced(data.edges, np.sort(nodes))[0]) if edges is None else edges.shape[1]
        largest = max(largest, count)
    return bucket_size(int(1.25 * largest))


def padded_subgraph(
    options: Mapping[str, Any],
    nodes: np.ndarray,
    edges: np.ndarray | None,
    targets: np.ndarray | None,
    *,
    pad_edges: int,
) -> dict[str, np.ndarray]:
    """The example of `element_spec` on these nodes.

    Where the edges do not fit, the nodes selected last are left out until they do: what remains is
    an induced subgraph still.
    """
    data = prepared(options)
    graph, size = data.graph, data.size
    while True:
        kept = np.sort(nodes)
        if edges is None:
            senders, receivers = _induced(data.edges, kept)
        else:
            inside = np.isin(edges, kept).all(0)
            senders, receivers = np.searchsorted(kept, edges[:, inside])
            order = np.argsort(receivers, kind="stable")
            senders, receivers = senders[order], receivers[order]
        if len(senders) <= pad_edges:
            break
        nodes = nodes[: max(1, int(len(nodes) * 0.95))]
    mask = graph.train[kept]
    if targets is not None:
        mask = mask & np.isin(kept, targets)
    weights = saint_weights(options)
    if weights is not None:
        weight = np.where(mask, weights[kept], 0)
    else:
        weight = mask / max(mask.sum(), 1)
    spec = _shapes(size, pad_edges, options)
    out = {name: np.zeros(s.shape, s.dtype) for name, s in spec.items()}
    out["x"][: len(kept)] = graph.x[kept]
    labels = graph.labels[kept]
    out["label"][: len(kept)] = labels if graph.multi_label else np.maximum(labels, 0)
    out["loss_weight"][: len(kept)] = weight
    out["node_mask"][: len(kept)] = True
    out["senders"][: len(senders)] = senders
    out["receivers"][:] = size
    out["receivers"][: len(receivers)] = receivers
    return out


def saint_weights(options: Mapping[str, Any]) -> np.ndarray | None:
    """What a training node's loss counts [N], None for the mean over a subgraph's own.

    1 / (N_train p_v), p_v the share of subgraphs that train on v, from `dry_epochs` epochs of
    subgraphs that cover the nodes once.
    """
    return _saint_weights(_key(options)) if options["normalize_loss"] == "saint" else None


@functools.lru_cache(maxsize=4)
def _saint_weights(key) -> np.ndarray:
    options, data = dict(key), _prepared(key)
    seeds = np.flatnonzero(data.graph.train)
    per_epoch = max(1, round(data.graph.num_nodes / data.size))

    def one(rng):
        nodes, _, targets = draw(options, int(rng.choice(seeds)), rng)
        return nodes if targets is None else nodes[np.isin(nodes, targets)]

    p = subgraph_samplers.inclusion_frequencies(
        one,
        data.graph.num_nodes,
        options["dry_epochs"] * per_epoch,
        np.random.default_rng(options["split_seed"]),
    )
    return 1 / (data.graph.train.sum() * p)


def baseline(data: Mapping[str, Any]) -> float:
    """Test accuracy (micro-F1 for label sets) of an MLP on the features, which sees no edge."""
    from sklearn.metrics import f1_score
    from sklearn.neural_network import MLPClassifier

    from train.data import pipeline

    _, options = pipeline.resolve(data)
    graph = prepared(options).graph
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MLPClassifier((64,), alpha=5e-4, learning_rate_init=0.01, max_iter=60)
        model.set_params(random_state=options["split_seed"])
        model.fit(graph.x[graph.train], graph.labels[graph.train])
    return float(
        f1_score(graph.labels[graph.test], model.predict(graph.x[graph.test]), average="micro")
    )
