"""Node classification on whole graphs or on sampled subgraphs (MeGuide and its baselines)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels.graphs.graph import Graph, bucket_size, make_graph
from jaxmodels.graphs.guidance import check_features
from jaxmodels.graphs.guided_sampler import induced_subgraph, sample_subgraph
from train.building import build_model
from train.naming import ConfigError

LOSSES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class DeviceSampling:
    """What the step needs to draw its own subgraphs: arrays on the device, static sizes.

    weights: [N] of the nodes' losses, or None for the mean over a subgraph's training nodes.
    """

    graph: Graph
    x: jax.Array
    label: jax.Array
    train: jax.Array
    scores: jax.Array
    size: int
    pad_edges: int
    hops: int
    ratio: float
    beta: float
    restart: bool
    weights: jax.Array | None = None

    def batch(self, seeds: jax.Array, rng: jax.Array) -> dict[str, jax.Array]:
        """A batch of padded subgraphs around seeds [b], as the data family makes on the host."""

        graph, x, label, train, scores, weights = jax.tree.map(
            jnp.asarray, (self.graph, self.x, self.label, self.train, self.scores, self.weights)
        )

        def one(seed, key):
            sample = sample_subgraph(
                graph,
                scores,
                seed,
                self.size,
                hops=self.hops,
                ratio=self.ratio,
                beta=self.beta,
                key=key,
                restart=train if self.restart else None,
            )
            induced, nodes, _ = induced_subgraph(graph, sample, self.pad_edges)
            real = nodes < graph.num_nodes
            at = jnp.minimum(nodes, graph.num_nodes - 1)
            mask = train[at] & real
            mean = mask / jnp.maximum(mask.sum(), 1)
            return {
                "x": jnp.where(real[:, None], x[at], 0),
                "senders": induced.senders,
                "receivers": induced.receivers,
                "label": jnp.where(real if label.ndim == 1 else real[:, None], label[at], 0),
                "loss_weight": mean if weights is None else jnp.where(mask, weights[at], 0),
                "node_mask": real,
            }

        # Mapped together, so that on a mesh every device draws its own.
        return jax.vmap(one)(seeds, jax.random.split(rng, len(seeds)))


@dataclasses.dataclass(frozen=True)
class NodeClassification:
    """A graph network over padded subgraphs x [b, S, d] -> logits [b, S, classes].

    A subgraph's loss is sum_v loss_weight_v * loss_v, the mean over its training nodes unless the
    data says otherwise; a step's is the mean over the b subgraphs. `loss` is "softmax" (integer
    labels) or "sigmoid" (label sets, mean over classes). Degrees and normalization are those inside
    the subgraph. Evaluation is on the whole graph.
    """

    model: nn.Module
    loss_name: str = "softmax"
    sampling: DeviceSampling | None = dataclasses.field(default=None, compare=False)

    def _logits(self, variables, batch, **arguments):
        size = batch["x"].shape[-2]
        graph = Graph(batch["senders"], batch["receivers"], num_nodes=size, num_senders=size)
        return self.model.apply(
            variables, batch["x"], graph, node_mask=batch["node_mask"], **arguments
        )

    def _losses(self, logits, label):
        logits = logits.astype(jnp.float32)
        if self.loss_name == "softmax":
            return optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return optax.sigmoid_binary_cross_entropy(logits, label).mean(-1)

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Parameters and the other collections."""
        del batch
        examples = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.model.example_inputs())
        variables = self.model.init(rng, *examples)
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss(self, params, extra, batch, rng):
        """Mean loss of the subgraphs, with the share of training nodes that are right."""
        if self.sampling is not None:
            rng, draw = jax.random.split(rng)
            batch = self.sampling.batch(batch["seed"], draw)
        logits, updated = self._logits(
            {"params": params, **extra},
            batch,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": rng},
        )
        weight = batch["loss_weight"]
        losses = jnp.where(weight > 0, self._losses(logits, batch["label"]), 0)
        loss = (weight * losses).sum(-1).mean()
        counted = (weight > 0).astype(jnp.float32)
        right = (_correct(logits, batch["label"]) * counted).sum() / jnp.maximum(counted.sum(), 1)
        nodes = batch["node_mask"].sum(-1).astype(jnp.float32).mean()
        return loss, ({**extra, **updated}, {"accuracy": right, "nodes": nodes})

    def evaluate(self, variables, batch):
        """Sums over the split's nodes; for label sets also the two of micro-F1."""
        logits = self._logits(variables, batch)
        counted = batch["loss_weight"] * batch["mask"][:, None]
        sums = {
            "loss": (self._losses(logits, batch["label"]) * counted).sum(),
            "accuracy": (_correct(logits, batch["label"]) * counted).sum(),
            "count": counted.sum(),
        }
        if self.loss_name == "sigmoid":
            predicted, label = logits > 0, batch["label"] > 0.5
            both = predicted.sum(-1) + label.sum(-1)
            sums["micro_f1|predicted_and_true"] = (2 * (predicted & label).sum(-1) * counted).sum()
            sums["predicted_and_true"] = (both * counted).sum()
        return sums

    def report(self, variables, sums, config) -> dict[str, float]:
        """Scores on both evaluation splits, the metrics that guided, and the MLP's score."""
        from train import metrics
        from train.data import node_graphs, pipeline

        name = "accuracy" if self.loss_name == "softmax" else "micro_f1"
        step, numbers = jax.jit(self.evaluate), {}
        for split in ("valid", "test"):
            total = None
            for batch in pipeline.eval_batches(config.data, split, batch_size=1):
                total = metrics.merge(total, step(variables, batch))
            numbers[f"{split}_{name}"] = metrics.compute(total)[name]
        _, options = pipeline.resolve(config.data)
        data = node_graphs.prepared(options)
        numbers |= {"subgraph_size": data.size, "hop_cap": data.hops}
        if data.failure is not None:
            numbers["connection_failure_distance"] = data.failure.distance
        numbers["mlp_baseline"] = node_graphs.baseline(config.data)
        return numbers

    def predict(self, variables, path, config):
        """A class for every node of an `.npz` file with `edge_index` [2, E] and `x` [N, d].

        Rows (node, class, probability); for label sets the classes above one half, blank-separated,
        and the highest probability.
        """
        with np.load(path, allow_pickle=False) as stored:
            absent = [name for name in ("edge_index", "x") if name not in stored.files]
            if absent:
                raise ConfigError(f"--input {path}: no array {', '.join(absent)}")
            edges, x = stored["edge_index"], stored["x"]
        features = self.model.in_features
        if x.ndim != 2 or x.shape[1] != features:
            raise ConfigError(f"--input {path}: x is {list(x.shape)}, the model takes {features}")
        x = check_features(x, len(x)).astype(np.float32)
        graph = make_graph(edges, len(x), pad_edges=bucket_size(np.shape(edges)[1]))
        logits = np.asarray(jax.jit(self.model.apply)(variables, x, graph), np.float32)
        rows: list[tuple] = [("node", "class", "probability")]
        if self.loss_name == "softmax":
            p = np.asarray(jax.nn.softmax(logits))
            return rows + [(i, int(q.argmax()), float(q.max())) for i, q in enumerate(p)]
        p = np.asarray(jax.nn.sigmoid(logits))
        for i, q in enumerate(p):
            rows.append((i, " ".join(map(str, np.flatnonzero(q > 0.5))), float(q.max())))
        return rows


def _correct(logits: jax.Array, label: jax.Array) -> jax.Array:
    """1 where the class is right; for label sets the share of classes that are, [..., S]."""
    if label.ndim == logits.ndim:
        return ((logits > 0) == (label > 0.5)).mean(-1)
    return (logits.argmax(-1) == label).astype(jnp.float32)


def from_config(config) -> NodeClassification:
    """The task of a config, checked against the shape of its data."""
    from train.data import node_graphs, pipeline

    arguments = dict(config.task_args)
    name = arguments.pop("loss", "softmax")
    if arguments:
        raise ConfigError(f"config.task_args: unknown {', '.join(arguments)}; known: loss")
    if name not in LOSSES:
        raise ConfigError(f"config.task_args.loss: {name!r}; known: {', '.join(LOSSES)}")
    model = build_model(config)
    family, options = pipeline.resolve(config.data)
    if family is not node_graphs:
        raise ConfigError("config.data.name: this task reads node_graphs")
    _, features, classes, multi_label = node_graphs.dimensions(options)
    if multi_label and name == "softmax":
        raise ConfigError(
            f"config.task_args.loss: softmax takes one class a node, {options['dataset']} has "
            "label sets; use sigmoid"
        )
    if not multi_label and name == "sigmoid":
        raise ConfigError(
            f"config.task_args.loss: sigmoid takes label sets, {options['dataset']} has one class "
            "a node; use softmax"
        )
    for key, found in (("in_features", features), ("out", classes)):
        given = getattr(model, key)
        if given == 0:  # Any graph will do.
            model = model.clone(**{key: found})
        elif given != found:
            raise ConfigError(
                f"config.model_args.{key}: {given}, but {options['dataset']} has {found}"
            )
    sampling = None
    if options["sampler"] == "guided_on_device":
        sampling = device_sampling(options)
    return NodeClassification(model, name, sampling)


def device_sampling(options: Mapping[str, Any]) -> DeviceSampling:
    """The data set of these options on the device."""
    from train.data import node_graphs

    data = node_graphs.prepared(options)
    graph, inductive = data.graph, data.graph.train_edge_index
    edges = graph.edge_index if inductive is None else inductive
    weights = node_graphs.saint_weights(options)
    return DeviceSampling(
        graph=make_graph(edges, graph.num_nodes),
        x=graph.x,
        label=graph.labels if graph.multi_label else np.maximum(graph.labels, 0),
        train=graph.train,
        scores=data.scores,
        size=data.size,
        pad_edges=node_graphs.pad_edges(options),
        hops=data.hops,
        ratio=options["ratio"],
        beta=options["beta"],
        restart=options["restart"],
        weights=None if weights is None else weights.astype(np.float32),
    )
