"""CORAL's cases: graph construction, the network and its gradients, new changes, rankings."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmodels
from jaxmodels.graphs import coral, review_graph, reviewer_baselines, reviewer_metrics
from jaxmodels.graphs.graph import make_graph
from jaxmodels.interop.conversion import to_torch
from tests.golden_case import adapter_of

# What a case says about its data and not about the network.
ABOUT_DATA = ("queries", "num_edges", "directed", "edge_weight")
BUILD_OPTIONS = ("stop_words", "pmi_min", "min_word_df", "max_files_per_pr")


def run(case) -> dict[str, Any]:
    """Every wanted output of one case, in the case's own layout."""
    if "log" in case.config:
        return build(case)
    if "history" in case.config:
        return rankings(case)
    if case.config.get("kind") == "rgcn":
        return relational_network(case)
    config = {k: v for k, v in case.config.items() if k not in ABOUT_DATA}
    module, variables = jaxmodels.load("graphs.coral", case.weights, **config)
    edges, weights = (
        {r: case.inputs[f"{name}.{r}"] for r in module.relations} for name in ("edges", "weight")
    )
    graph = coral.relations_graph(edges, weights, module.relations, module.num_nodes)
    if "queries" in case.config:
        degrees = coral.relation_degrees(edges, weights, module.relations, module.num_nodes)
        return new_changes(case, module, variables, graph, degrees)
    return network(case, module, variables, graph)


def build(case):
    options = {k: case.config[k] for k in BUILD_OPTIONS if k in case.config}
    graph = review_graph.build_graph(case.config["log"], **options)
    types = [case.config["types"].index(name) for name in review_graph.NODE_TYPES]
    return {
        "node_keys": graph.node_keys,
        "node_type": np.array(types)[graph.node_type],
        **{f"edges.{r}": graph.edges[r] for r in case.config["relations"]},
        **{f"weight.{r}": graph.weights[r] for r in case.config["relations"]},
    }


def rankings(case):
    config = case.config
    ranks = reviewer_metrics.first_ranks(config["recommendations"], config["truth"])
    model = reviewer_baselines.RuleBased(
        [
            reviewer_baselines.Review(r["day"], tuple(r["reviewers"]), tuple(r["files"]))
            for r in config["history"]
        ]
    )
    top = [int(name[3:]) for name in case.wanted if re.fullmatch(r"top\d+", name)]
    outputs = {"first_rank": ranks, **reviewer_metrics.ranking_metrics(ranks, top)}
    for q, query in enumerate(config["queries"]):
        outputs[f"rule_ranking.{q}"] = model.rank(query["author"], query["files"])
        scores = model.scores(query["author"], query["files"])
        outputs[f"rule_scores.{q}"] = np.array(list(scores.values()), np.float64)
    return outputs


def relational_network(case):
    config = adapter_of("meguide").network_arguments(case)
    module, variables = jaxmodels.load("graphs.gnn", case.weights, **config)
    graph = make_graph(
        case.inputs["edge_index"],
        case.config["num_nodes"],
        edge_type=case.inputs["edge_type"],
    )
    forward = jax.jit(lambda v, x: module.apply(v, x, graph, method="intermediates"))
    return forward(variables, case.inputs["x"])


def network(case, module, variables, graph):
    pairs, labels = jnp.asarray(case.inputs["pairs"]), jnp.asarray(case.inputs["y"])

    def loss_of(params):
        states = module.apply({"params": params}, graph, method="intermediates")
        logits = coral.pair_logits(states["z"], pairs)
        return coral.link_loss(logits, labels), {**states, "logits": logits}

    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    (loss, states), grads = step(variables["params"])
    gradients = to_torch({"params": grads})
    return {"loss": loss, **states, **{f"grad.{key}": value for key, value in gradients.items()}}


def new_changes(case, module, variables, graph, degrees):
    known = [
        {
            "pr_user": [] if query["author"] is None else [query["author"]],
            "pr_file": query["files"],
            "pr_word": query["words"],
        }
        for query in case.config["queries"]
    ]
    queries = coral.make_queries(known, module.relations)
    users = case.inputs["users"]

    @jax.jit
    def embed(variables):
        states = module.apply(variables, graph, method="intermediates")
        new = module.apply(variables, states["h1"], degrees, queries, method="embed_new")
        return new, new @ states["z"][users].T

    new, scores = embed(variables)
    outputs = {}
    for q, query in enumerate(case.config["queries"]):
        outputs[f"embedding.{q}"], outputs[f"scores.{q}"] = new[q], scores[q]
        outputs[f"ranking.{q}"] = coral.ranking(scores[q], users, query["author"])
    return outputs
