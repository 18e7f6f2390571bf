"""MeGuide's cases: backbones by PyTorch Geometric's names, metrics and the guided sampler."""

from __future__ import annotations

import functools

import jax
import numpy as np

import jaxmodels
from jaxmodels.graphs import guidance, guided_sampler
from jaxmodels.graphs.graph import make_graph
from jaxmodels.interop import checkpoint

RENAMED = {"in": "in_features"}
# What a case says about its data, or the file holds (GIN's epsilon), and not about the network.
ABOUT_DATA = ("num_nodes", "num_edges", "directed", "edge_weight", "eps", "num_layers")


def run(case):
    """Every output of the case, in the case's own layout."""
    return run_metrics(case) if case.model.startswith("metrics") else run_network(case)


def network_arguments(case):
    """Constructor arguments of the case's network under our names; the file tells the depth."""
    arguments = {
        RENAMED.get(name, name): value
        for name, value in case.config.items()
        if name not in ABOUT_DATA
    }
    aggregation = arguments.get("aggr")
    if aggregation == "add":  # PyTorch Geometric's other name
        arguments["aggr"] = aggregation = "sum"
    if case.config["kind"] == "rgcn" and aggregation:  # that layer calls it so, ours by its weights
        if aggregation not in ("mean", "sum"):
            raise ValueError(f"no R-GCN with aggr {aggregation!r}")
        arguments["normalization"] = arguments.pop("aggr")
    layers = layers_of(case.weights)
    if case.config["kind"] == "gat":  # a config says how many heads the inner layers have
        last = checkpoint.read(case.weights).tensors[f"convs.{layers - 1}.att_src"]
        arguments["out_heads"] = last.shape[1]
    return {**arguments, "num_layers": layers}


def layers_of(weights):
    """How many layers `convs.0`, `convs.1`, ... a file holds."""
    keys = checkpoint.read(weights).tensors
    return len({key.split(".")[1] for key in keys if key.startswith("convs.")})


def run_network(case):
    module, variables = jaxmodels.load("graphs.gnn", case.weights, **network_arguments(case))
    graph = make_graph(
        case.inputs["edge_index"],
        case.config["num_nodes"],
        edge_weight=case.inputs.get("edge_weight"),
        edge_type=case.inputs.get("edge_type"),
        pad_edges=None,
    )
    forward = jax.jit(functools.partial(module.apply, method="intermediates"))
    return forward(variables, case.inputs["x"], graph)


def run_metrics(case):
    config, inputs = case.config, case.inputs
    x, y, edges = inputs["x"], inputs["y"], inputs["edges"].T
    graph = guidance.undirected(edges, config["num_nodes"])
    scores = guidance.node_scores(graph, x)
    out = {
        "fs_edge": guidance.feature_smoothness(graph, x),
        "fs_edge_raw": guidance.feature_smoothness(graph, x, scale=False),
        "fs_formula": guidance.feature_smoothness(graph, x, variant="formula"),
        "node_scores": scores,
        "label_smoothness": guidance.label_smoothness(graph, y),
    }
    curves = {"label_full": {"labels": y}, "feature": {"features": x}}
    if "label_mask" in inputs:
        curves["label_masked"] = {"labels": y, "mask": inputs["label_mask"]}
    for name, similarity in curves.items():
        for suffix, tau in (("", 0.0), ("_tau", config.get("tau", 0.0))):
            found = guidance.connection_failure_distance(
                graph, **similarity, k_max=config["k_max"], tau=tau
            )
            out[f"cfd_{name}{suffix}"] = np.int64(found.distance)
        out[f"curve_{name}"], out[f"base_{name}"] = found.curve, found.base
    guided = guidance.subgraph_size(graph, int(out["cfd_label_full"]), limits=None)
    out |= {"hop_cap": np.int64(guided.hop_cap), "subgraph_size": np.int64(guided.size)}
    out["ball_size"] = guided.ball_sizes.astype(np.int64)
    for i, sample in enumerate(config.get("samples", ())):
        nodes, steps = _sampled(graph.graph, scores, inputs["gumbel"], sample)
        inside = guided_sampler.induced_edges(edges, nodes, config["num_nodes"])
        out[f"sample{i}.nodes"], out[f"sample{i}.steps"] = nodes, steps
        out[f"sample{i}.induced_edges"] = inputs["edges"][inside]
    return out


def _sampled(graph, scores, gumbel, sample):
    """The jitted sampler's answer, once the host's is the same."""
    # More nodes than there are means all that can be reached; ours refuses such a size.
    size = min(sample["size"], graph.num_nodes)
    options = {name: sample[name] for name in ("ratio", "beta", "eps")}
    options |= {"hops": sample["hop"], "gumbel": gumbel}
    found = jax.jit(
        lambda graph, scores: guided_sampler.sample_subgraph(
            graph, scores, sample["seed_node"], size, **options
        )
    )(graph, scores)
    count = int(found.count)
    nodes, steps = guided_sampler.sample_on_host(
        guided_sampler.adjacency(graph),
        np.asarray(scores),
        sample["seed_node"],
        size,
        **options,
    )
    np.testing.assert_array_equal(nodes, found.nodes[:count])
    np.testing.assert_array_equal(steps, np.trim_zeros(np.asarray(found.steps), "b"))
    return np.asarray(found.nodes[:count], np.int64), steps
