"""MeGuide's cases: backbones by PyTorch Geometric's names, metrics and the guided sampler."""

from __future__ import annotations

import jax

import jaxmodels
from jaxmodels.graphs.graph import make_graph

RENAMED = {"in": "in_features", "aggr": "aggr"}
# What a case says about its data and not about the network.
ABOUT_DATA = ("num_nodes", "num_edges", "directed", "edge_weight")


def run(case):
    """Every output of the case, in the case's own layout."""
    return run_network(case)


def run_network(case):
    config = {
        RENAMED.get(name, name): value
        for name, value in case.config.items()
        if name not in ABOUT_DATA
    }
    module, variables = jaxmodels.load("graphs.gnn", case.weights, **config)
    graph = make_graph(
        case.inputs["edge_index"],
        case.config["num_nodes"],
        edge_weight=case.inputs.get("edge_weight"),
        edge_type=case.inputs.get("edge_type"),
        pad_edges=None,
    )
    forward = jax.jit(lambda v, x, g: module.apply(v, x, g, method="intermediates"))
    return forward(variables, case.inputs["x"], graph)
