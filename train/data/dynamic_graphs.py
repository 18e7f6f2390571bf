"""Dynamic graphs as targets: each example is a window of snapshots and the one that follows it.

Targets come in order of time, never shuffled. `options.kind` says where the snapshots come from: a
generator of `synthetic_graphs` by name, `edges` (a file `t,u,v[,w]`), `reviews` (a review history,
CSV or JSON lines), `git` (a local clone), or `simulated_reviews`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import scipy.sparse

from jaxmodels.graphs import change_detection
from train.data import dynamic_graph_files as files
from train.data import synthetic_graphs as synthetic

OPTIONS: dict[str, Any] = {
    "kind": "shuffle",
    "window": 5,  # w
    "sequence_seed": 0,  # of generators and the review simulator
    "num_nodes": 0,  # n; 0: the generator's default, or what the file holds
    "steps": synthetic.STEPS,  # generators: snapshots after the initial one
    "p_in": 0.25,
    "p_ex": 0.05,
    "resample": 0.1,
    "increment": 0.1,
    "base": "les_miserables",
    "fresh": True,  # generators: all pairs drawn anew at a change
    "changes": 3000,  # simulated reviews: length of the history
    "directed": False,
    "weighted": False,
    "repeats": "last",  # edges: last | sum
    "first_time": 0,  # edges: the t of snapshot 0
    "fill_empty": False,
    "events": (),  # snapshot indices; or
    "events_path": "",  # a CSV with a column t
    "releases": "",  # reviews: CSV tag,time
    "period": "month",  # reviews: month | week
    "acked": False,  # reviews: Acked-by counts as a review
    "signers": False,  # reviews: so does Signed-off-by
    "transform": "none",  # none | log (log(1 + w)) | binary
    "sparse": None,  # edge lists instead of n x n windows; None: above 2,000 nodes
    "snapshots": 0,  # dry runs: T where the file is not there
    "edge_slots": 0,  # sparse dry runs: padded edges
}
_SBM = {"num_nodes": 500}
VARIANTS: dict[str, dict[str, Any]] = {
    "pure": {"kind": "pure", **_SBM},
    "hybrid": {"kind": "hybrid", **_SBM},
    "resampled": {"kind": "pure", "resample": 1.0, **_SBM},
    "hard": {"kind": "pure", "p_in": 0.15, "p_ex": 0.08, "resample": 1.0},
    "evolving": {"kind": "evolving", "p_in": 0.2, "resample": 0.3},
    "shuffle": {"kind": "shuffle", "p_in": 0.2, "resample": 0.5},
    "barabasi_albert": {"kind": "barabasi_albert"},
    "erdos_renyi": {"kind": "erdos_renyi"},
    "rewired": {"kind": "rewired"},
    "edges": {"kind": "edges"},
    # Settings of the real sets; the path is the caller's.
    "us_senate": {
        "kind": "edges",
        "weighted": True,
        "num_nodes": 225,
        "events": (3, 7),
        "window": 2,
        "snapshots": 12,
    },
    "uci": {
        "kind": "edges",
        "directed": True,
        "weighted": True,
        "num_nodes": 1901,
        "events": (65, 158),
        "snapshots": 196,
    },
    "reviews": {"kind": "reviews", "directed": True, "weighted": True},
    "git": {"kind": "git", "directed": True, "weighted": True, "path": "."},
    "simulated_reviews": {
        "kind": "simulated_reviews",
        "directed": True,
        "weighted": True,
        "changes": 12_000,
    },
}
SPLITS = ("targets", "test")
IN_ORDER = True
DEFAULT_NODES = 100
TRANSFORMS = ("none", "log", "binary")
KINDS = (*synthetic.KINDS, "edges", "reviews", "git", "simulated_reviews")


def sequence(options: Mapping[str, Any]) -> files.DynamicGraph:
    """The snapshots, events and labels of these options.

    Raises ValueError or OSError: one line naming the option or the file and line.
    """
    return _sequence(tuple(sorted((k, _frozen(v)) for k, v in options.items())))


def _frozen(value):
    return tuple(value) if isinstance(value, list | tuple) else value


@functools.lru_cache(maxsize=4)
def _sequence(items: tuple) -> files.DynamicGraph:
    options = dict(items)
    kind = options["kind"]
    if kind not in KINDS:
        raise ValueError(f"data.options.kind {kind!r}; known: {', '.join(KINDS)}")
    if options["transform"] not in TRANSFORMS:
        raise ValueError(
            f"data.options.transform {options['transform']!r}; known: {', '.join(TRANSFORMS)}"
        )
    graph = _read(kind, options)
    if options["transform"] != "none":
        snapshots = [g.copy() for g in graph.snapshots]
        for g in snapshots:
            g.data = np.log1p(g.data) if options["transform"] == "log" else np.ones_like(g.data)
        graph = dataclasses.replace(graph, snapshots=snapshots)
    if len(graph) <= options["window"]:
        raise ValueError(
            f"need at least w+1 snapshots: {len(graph)} given, window w = {options['window']}"
        )
    outside = [e for e in graph.events if not 0 <= e < len(graph)]
    if outside:
        raise ValueError(f"event index {outside[0]} is outside the {len(graph)} snapshots")
    return graph


def _read(kind: str, options: Mapping[str, Any]) -> files.DynamicGraph:
    if kind in synthetic.KINDS:
        dense, events = synthetic.synthetic_sequence(
            kind,
            seed=options["sequence_seed"],
            num_nodes=options["num_nodes"] or DEFAULT_NODES,
            **{
                k: options[k]
                for k in ("steps", "p_in", "p_ex", "resample", "increment", "base", "fresh")
            },
        )
        snapshots = [scipy.sparse.csr_matrix(g.astype(np.float32)) for g in dense]
        return files.DynamicGraph(snapshots, events, tuple(map(str, range(len(dense)))), False)
    if kind == "simulated_reviews":
        from train.data.review_simulator import simulate_reviews

        records = simulate_reviews(options["sequence_seed"], n_changes=options["changes"])
        # One maintainer of every area leaves after each third of the time span.
        begin, end = records[0].created, records[-1].created
        thirds = [("", begin + i * (end - begin) / 3) for i in (1, 2)]
        return _reviews(records, thirds, options, "simulated reviews")
    path = options["path"]
    if not path:
        raise ValueError(f"data.options.path is missing: the file or clone of kind {kind!r}")
    if kind == "git":
        from train.data.git_log import read_history

        trailers = ("reviewed-by", "acked-by") if options["acked"] else ("reviewed-by",)
        history = read_history(
            path, reviewer_trailers=trailers, signers_as_reviewers=options["signers"]
        )
        return _reviews(history.records, files.release_tags(path), options, str(path))
    if kind == "reviews":
        from train.data.review_files import read_reviews

        records = read_reviews(
            path, acked_as_reviewers=options["acked"], signers_as_reviewers=options["signers"]
        )
        releases = files.read_releases(options["releases"]) if options["releases"] else ()
        return _reviews(records, releases, options, str(path))
    events = tuple(options["events"])
    if options["events_path"]:
        events = files.read_events(options["events_path"])
    return files.graph_of_edges(
        files.read_edges(path),
        events=events,
        where=str(path),
        **{
            k: options[k]
            for k in ("directed", "weighted", "num_nodes", "first_time", "fill_empty", "repeats")
        },
    )


def _reviews(records, releases, options, where) -> files.DynamicGraph:
    return files.review_graph(
        records,
        releases,
        where=where,
        **{k: options[k] for k in ("period", "weighted", "num_nodes")},
    )


def _reads_a_file(options: Mapping[str, Any]) -> bool:
    return options["kind"] in ("edges", "reviews", "git")


def _known_without_data(options: Mapping[str, Any]) -> bool:
    return bool(options["num_nodes"] and options["snapshots"])


def sequence_shape(options: Mapping[str, Any]) -> tuple[int, int]:
    """(T, n); from the options alone where a dry run names them, else from the sequence."""
    if options["kind"] in synthetic.KINDS and options["kind"] != "rewired":
        return options["steps"] + 1, options["num_nodes"] or DEFAULT_NODES
    if _reads_a_file(options) and _known_without_data(options):
        return options["snapshots"], options["num_nodes"]
    graph = sequence(options)
    return len(graph), graph.num_nodes


def is_directed(options: Mapping[str, Any]) -> bool:
    """Whether snapshots may be asymmetric; generators make symmetric ones."""
    kind = options["kind"]
    return kind not in synthetic.KINDS and (kind != "edges" or bool(options["directed"]))


def is_sparse(options: Mapping[str, Any]) -> bool:
    """Whether rows are edge lists."""
    if options["sparse"] is None:
        return sequence_shape(options)[1] > change_detection.SPARSE_ABOVE
    return bool(options["sparse"])


def _dtype(options: Mapping[str, Any]):
    if options["transform"] == "log":
        return np.float32
    binary = not options["weighted"] or options["transform"] == "binary"
    return np.uint8 if binary or options["kind"] in synthetic.KINDS else np.float32


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`target` int32 [] and a row of `jaxmodels.graphs.change_detection`, dense or sparse."""
    w, (_, n) = options["window"], sequence_shape(options)
    if not isinstance(w, int) or w < 1:
        raise ValueError(f"data.options.window w = {w!r} must be a whole number >= 1")
    spec = {"target": jax.ShapeDtypeStruct((), np.int32)}
    if is_sparse(options):
        slots = options["edge_slots"] or change_detection.edge_capacity(sequence(options).snapshots)
        shapes = {
            "senders": ((w + 1, slots), np.int32),
            "receivers": ((w + 1, slots), np.int32),
            "weights": ((w + 1, slots), np.float32),
            "mean_here": ((slots,), np.float32),
            "mean_norm": ((), np.float32),
        }
    else:
        dtype = _dtype(options)
        shapes = {"window": ((w, n, n), dtype), "snapshot": ((n, n), dtype)}
    return spec | {k: jax.ShapeDtypeStruct(*v) for k, v in shapes.items()}


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Both splits are the targets w..T-1."""
    count = sequence_shape(options)[0] - options["window"]
    if count < 1:
        raise ValueError(
            f"need at least w+1 snapshots: {sequence_shape(options)[0]} given, window "
            f"w = {options['window']}"
        )
    return {split: count for split in SPLITS}


@dataclasses.dataclass(frozen=True)
class Targets:
    """Rows of targets w..T-1 in order of time, cut from the sequence when they are read."""

    snapshots: Any
    window: int
    sparse: bool
    slots: int

    def __len__(self) -> int:
        return len(self.snapshots) - self.window

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        target = int(index) + self.window
        if self.sparse:
            # Only the snapshots of this row, so that nothing else is padded.
            part = self.snapshots[target - self.window : target + 1]
            rows = change_detection.sparse_rows(part, [self.window], self.window, self.slots)
        else:
            rows = change_detection.dense_rows(self.snapshots, [target], self.window)
        return {"target": np.int32(target), **{k: v[0] for k, v in rows.items()}}


def source(split: str, options: Mapping[str, Any]) -> Targets:
    """The targets of a sequence; both splits hold all of them."""
    del split
    graph = sequence(options)
    if is_sparse(options):
        slots = options["edge_slots"] or change_detection.edge_capacity(graph.snapshots)
        return Targets(graph.snapshots, options["window"], True, slots)
    return Targets(graph.dense(_dtype(options)), options["window"], False, 0)


def train_transform(options: Mapping[str, Any]):
    """Rows as they are."""
    del options
    return _unchanged_with_rng


def eval_transform(options: Mapping[str, Any]):
    """Rows as they are."""
    del options
    return _unchanged


def _unchanged_with_rng(example, rng):
    del rng
    return example


def _unchanged(example):
    return example
