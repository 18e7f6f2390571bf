"""Link prediction on a review history, and how well it ranks the reviewers of unseen changes.

Every step runs the network over the full training graph and takes the loss on a batch of its edges
and as many sampled pairs without an edge (arXiv 2202.02385, section IV). The graph, the queries and
what stops the training are collections of the state beside the parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.graphs import coral, reviewer_baselines, reviewer_metrics
from jaxmodels.graphs.graph import Graph, bucket_size, with_tables
from jaxmodels.graphs.link_sampling import edge_index, sample_negatives
from jaxmodels.graphs.review_graph import REPOSITORY, USER
from jaxmodels.graphs.reviewer_recommendation import (
    Recommender,
    check_candidates,
    developers_by_repo,
    known_neighbors,
    people_of,
)
from train.building import build_model
from train.data import code_review, pipeline, review_files
from train.naming import ConfigError, nearest

# No day of any history: queries of padding, and people who were never active.
_NO_ONE = -1
# The first fields of the task come from the history, the rest from `task_args`.
_GIVEN_FIELDS = 6


@dataclasses.dataclass(frozen=True, eq=False)
class ReviewerRecommendation:
    """A `Coral` trained on the links of a history.

    Attributes:
      pr_user_fraction: share of every batch that are edges between changes and people.
      reject_edges: sampled pairs that are edges are drawn again, `tries` times at most, and else
        left out.
      candidates, active_within_days: whom evaluation and prediction may recommend.
      patience: epochs without a relative decrease of the loss of `min_decrease` after which the
        training ends; 0 never ends it.
      epoch_steps: losses, of a batch or micro-batch each, in which the edges are passed once.
      graph_arrays: see `graph_arrays`; shapes alone for a dry run.
      operator: the aggregation with neighbor tables (CPU), or None to use the arrays.
    """

    model: coral.Coral
    data: code_review.ReviewData | None
    graph_arrays: Mapping[str, Any]
    search_steps: int
    epoch_steps: int
    operator: Graph | None = None
    pr_user_fraction: float = 0.2
    reject_edges: bool = True
    tries: int = 4
    candidates: str = "reviewers"
    active_within_days: int | None = None
    patience: int = 10
    min_decrease: float = 1e-3

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Fresh parameters, the graph's arrays and the record of the loss."""
        del batch
        n = self.model.num_nodes
        ints = jnp.zeros((1,), jnp.int32)
        empty = Graph(ints, ints + n, edge_type=ints, num_nodes=n, num_senders=n)
        params = self.model.init(rng, empty)["params"]

        def array(x):
            if isinstance(x, jax.ShapeDtypeStruct):
                return jnp.zeros(x.shape, x.dtype)
            return jnp.asarray(x)

        zero = jnp.zeros((), jnp.float32)
        stopping = {"sum": zero, "steps": zero, "best": zero + jnp.inf, "waited": zero}
        arrays = {name: array(x) for name, x in self.graph_arrays.items()}
        return params, {"graph": arrays, "stopping": stopping}

    def check_loaded(self, arrays: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another graph.

        Raises ValueError: the tables have other rows, or the nodes other keys.
        """
        nodes = self.model.num_nodes
        for (child, leaf), axis in self.model.node_axes.items():
            table = arrays.get(f"params.{child}.{leaf}")
            if table is not None and table.shape[axis] != nodes:
                raise ValueError(
                    f"graph and checkpoint differ: the graph has {nodes} nodes, the checkpoint's "
                    f"tables {table.shape[axis]} rows"
                )
        keys = arrays.get("graph.node_keys")
        if keys is not None and not np.array_equal(keys, self.graph_arrays["node_keys"]):
            raise ValueError(
                f"graph and checkpoint differ: both have {nodes} nodes, but not the same ones; the "
                "history is no longer the one that was trained on"
            )

    def states(self, params, graph: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """First-layer states and embeddings of all nodes."""
        operator = self.operator
        if operator is None:
            n = self.model.num_nodes
            operator = Graph(
                graph["senders"],
                graph["receivers"],
                weight=graph["weight"],
                num_nodes=n,
                num_senders=n * len(self.model.relations),
                normalized=True,
            )
        return self.model.apply({"params": params}, operator, method="intermediates")

    def pairs(self, graph: Mapping[str, jax.Array], index: jax.Array, rng: jax.Array):
        """Edges [B] of a batch and as many pairs without an edge: ends [2, 2 B], labels, mask.

        The first rows are `pr_user` edges drawn anew; the others are those of `index`.
        """
        draw, negative = jax.random.split(rng)
        edges, kinds = graph["pairs"], graph["pair_relation"]
        reviews, others = (graph["num_reviews"], graph["num_others"])
        rows = len(index)
        review = jax.random.randint(draw, (rows,), 0, jnp.maximum(reviews, 1))
        share = jnp.where(others > 0, round(self.pr_user_fraction * rows), rows)
        share = jnp.where(reviews > 0, share, 0)
        chosen = jnp.where(jnp.arange(rows) < share, review, reviews + index)
        first, second = edges[0, chosen], edges[1, chosen]
        relation = kinds[chosen]
        drawn, valid = sample_negatives(
            negative,
            graph,
            relation,
            first,
            num_nodes=self.model.num_nodes,
            search_steps=self.search_steps,
            tries=self.tries if self.reject_edges else 0,
        )
        ends = jnp.stack([jnp.tile(first, 2), jnp.concatenate([second, drawn])])
        labels = jnp.repeat(jnp.array([1.0, 0.0]), rows)
        return ends, labels, jnp.concatenate([jnp.ones(rows), valid])

    def loss(self, params, extra, batch, rng):
        """Mean binary cross-entropy of the links; apart for edges and for sampled pairs."""
        graph = extra["graph"]
        ends, labels, mask = self.pairs(graph, batch["index"].reshape(-1), rng)
        z = self.states(params, graph)["z"].astype(jnp.float32)
        logits = coral.pair_logits(z, ends)
        loss = coral.link_loss(logits, labels, mask)
        numbers = {
            "edge_loss": coral.link_loss(logits, labels, mask * labels),
            "sampled_loss": coral.link_loss(logits, labels, mask * (1 - labels)),
        }
        return loss, ({**extra, "stopping": self._watch(extra["stopping"], loss)}, numbers)

    def _watch(self, record, loss):
        """The mean loss of every epoch against the best so far."""
        total = record["sum"] + jax.lax.stop_gradient(loss).astype(jnp.float32)
        steps = record["steps"] + 1
        mean, over = total / steps, steps >= self.epoch_steps
        better = mean < record["best"] * (1 - self.min_decrease)
        best = jnp.where(over, jnp.minimum(mean, record["best"]), record["best"])
        waited = jnp.where(better, 0, record["waited"] + 1)
        return {
            "sum": jnp.where(over, 0, total),
            "steps": jnp.where(over, 0, steps),
            "best": best,
            "waited": jnp.where(over, waited, record["waited"]),
        }

    def finished(self, extra) -> bool:
        """Whether the loss has stopped decreasing; the loop asks at every log line."""
        # One copy of many, on one device or, under pmap, along an axis of devices.
        waited = np.asarray(extra["stopping"]["waited"].addressable_data(0)).reshape(-1)[0]
        return bool(self.patience) and bool(waited >= self.patience)

    def evaluate(self, variables, batch):
        """Sums of top-k hits and reciprocal ranks over test changes."""
        graph, index = variables["graph"], batch["index"]
        mask = ((index >= 0) & (batch["mask"][:, None] > 0)).reshape(-1).astype(jnp.float32)
        at = jnp.maximum(index, 0).reshape(-1)
        states = self.states(variables["params"], graph)
        queries = coral.Queries(
            graph["query_neighbors"][at], graph["query_relation"][at], graph["query_mask"][at]
        )
        new = self.model.apply(
            {"params": variables["params"]},
            states["h1"],
            graph["degrees"],
            queries,
            method="embed_new",
        )
        users = graph["user_reviews"].shape[0]
        first_user = graph["type_bounds"][USER]
        z = jax.lax.dynamic_slice_in_dim(states["z"], first_user, users).astype(jnp.float32)
        known = self.model.reached(graph["degrees"], queries)
        popularity = graph["user_reviews"].astype(jnp.float32)
        scores = jnp.where(known[:, None], new.astype(jnp.float32) @ z.T, popularity)
        ranks = first_true_rank(scores, self._allowed(graph, at), graph["query_truth"][at])
        hit = (ranks > 0) * mask
        sums = {f"top{k}": (hit * (ranks <= k)).sum() for k in reviewer_metrics.TOP_K}
        sums["mrr"] = (hit / jnp.maximum(ranks, 1)).sum()
        return {**sums, "count": mask.sum()}

    def _allowed(self, graph, at):
        """[B, U] bool: who may be recommended for the queries `at`."""
        users = graph["user_reviews"].shape[0]
        allowed = ~graph["user_is_bot"][None]
        if self.candidates == "reviewers":
            allowed &= graph["user_reviews"][None] > 0
        elif self.candidates == "repo":
            repo = graph["query_repo"][at]
            there = graph["user_in_repo"][jnp.maximum(repo, 0)]
            allowed &= there | (repo < 0)[:, None]
        if self.active_within_days is not None:
            earliest = graph["query_day"][at] - self.active_within_days
            allowed &= graph["user_last_day"][None] >= earliest[:, None]
        author = graph["query_author"][at]
        return allowed & (jnp.arange(users)[None] != author[:, None])

    def report(self, variables, sums, config):
        """The baselines on the same test changes, sizes of projects, and what was not known."""
        del sums
        data = self.data
        # A resumed run whose history changed meanwhile, but not in size.
        self.check_loaded({"graph.node_keys": variables["graph"]["node_keys"]})
        ranks = {"coral": self.recommended_ranks(variables), **baseline_ranks(data)}
        numbers = {"queries": float(len(data.test))}
        for model, of_model in ranks.items():
            for name, value in reviewer_metrics.ranking_metrics(of_model).items():
                numbers[f"{model}_{name}"] = value
        numbers["fisher_p_rule_based_top3"] = reviewer_metrics.fisher_exact(
            ranks["coral"], ranks["rule_based"]
        )
        sizes = reviewer_metrics.by_project_size(
            ranks, [r.repo for r in data.test], developers_by_repo(data.graph.records)
        )
        for size, models in sizes.items():
            numbers[f"{size}_projects_queries"] = float(models["coral"]["queries"])
            for model in ("coral", "rule_based", "popularity"):
                for name in ("top3", "mrr"):
                    numbers[f"{size}_projects_{model}_{name}"] = models[model][name]
        reviewers = set(data.graph.node_keys[data.graph.nodes_of(USER)].tolist())
        unseen = [not reviewers.intersection(r.reviewers) for r in data.test]
        numbers["queries_without_a_known_reviewer"] = float(np.mean(unseen))
        return numbers

    def recommended_ranks(self, variables) -> np.ndarray:
        """[queries] rank of the first true reviewer of every test change, through `Recommender`."""
        recommender = Recommender(self.data.graph, self.model, variables, self.data.bots)
        hidden = [dataclasses.replace(r, reviewers=(), commenters=()) for r in self.data.test]
        answers = recommender.recommend(
            hidden,
            None,
            candidates=self.candidates,
            active_within_days=self.active_within_days,
            reasons=0,
        )
        return reviewer_metrics.first_ranks(
            [answer.users for answer in answers], [r.reviewers for r in self.data.test]
        )

    def predict(self, variables, path, config):
        """Ranked reviewers of the new changes in a file: one row a change and person.

        `reasons` names the neighbors that add most to a score; `unknown` counts the author, files
        and words of the change that the graph does not have.
        """
        k = int(config.predict.k)
        graph = self.data.graph
        recommender = Recommender(graph, self.model, variables, self.data.bots)
        repos = graph.node_keys[graph.nodes_of(REPOSITORY)].tolist()
        # Where there is one repository only, changes that name none are of that one.
        repo = repos[0] if len(repos) == 1 else ""
        answers = recommender.recommend(
            review_files.read_reviews(path, queries=True, repo=repo),
            k,
            candidates=self.candidates,
            active_within_days=self.active_within_days,
        )
        rows = [("change", "rank", "person", "score", "fallback", "known", "unknown", "reasons")]
        for answer in answers:
            known = sum(answer.known.values())
            unknown = sum(map(len, answer.unknown.values()))
            for i, (user, score) in enumerate(zip(answer.users, answer.scores)):
                reasons = answer.reasons[i] if answer.reasons else ()
                text = "; ".join(f"{r.kind} {r.key} {r.amount:+.3f}" for r in reasons)
                rows.append(
                    (answer.id, i + 1, user, f"{score:.6g}", answer.fallback, known, unknown, text)
                )
        return rows


def first_true_rank(scores: jax.Array, allowed: jax.Array, truth: jax.Array) -> jax.Array:
    """Rank of the best-placed true reviewer, 0 where none may be recommended.

    Args:
      scores: [B, U]. allowed: bool [B, U]. truth: int32 [B, T] places among the users, negative on
        padding and for people the graph does not have. Ties go to the lower place.
    """
    place = jnp.maximum(truth, 0)
    own = jnp.take_along_axis(scores, place, axis=1)
    valid = (truth >= 0) & jnp.take_along_axis(allowed, place, axis=1)
    users = jnp.arange(scores.shape[1])

    def ahead(own, place):
        before = (scores > own[:, None]) | (
            (scores == own[:, None]) & (users[None] < place[:, None])
        )
        return (before & allowed).sum(1)

    ahead_of = jax.vmap(ahead, in_axes=1, out_axes=1)(own, place)
    best = jnp.where(valid, ahead_of + 1, scores.shape[1] + 1).min(1)
    return jnp.where(valid.any(1), best, 0)


def baseline_ranks(data: code_review.ReviewData, seed: int = 0) -> dict[str, np.ndarray]:
    """Ranks of the first true reviewer by the models that CORAL is compared with."""
    reviews = reviewer_baselines.reviews_of(data.graph.records)
    models = {
        "rule_based": reviewer_baselines.RuleBased(reviews),
        "recency": reviewer_baselines.Popularity(reviews, half_life=90.0),
        "popularity": reviewer_baselines.Popularity(reviews),
        "random": reviewer_baselines.RandomOrder(reviews, seed),
    }
    truth = [r.reviewers for r in data.test]
    return {
        name: reviewer_metrics.first_ranks(
            [model.rank(r.author, r.files) for r in data.test], truth
        )
        for name, model in models.items()
    }


def graph_arrays(
    data: code_review.ReviewData, model: coral.Coral
) -> tuple[dict[str, np.ndarray], Graph]:
    """The arrays of training and evaluation, and the aggregation they describe.

    senders, receivers, weight [E]: the operator of `relational_graph`; node_keys: their UTF-8 bytes
    with a zero between, so that they travel with the parameters; degrees [R, N]; pairs [2, P]
    and pair_relation [P]: every edge once, `pr_user` first; row_start, neighbors: who is linked to
    whom, for sampling; query_* [Q, ...] and user_* [U]: the test changes and the people.
    """
    graph, relations, n = data.graph, model.relations, model.num_nodes
    typed = coral.relations_graph(graph.edges, graph.weights, relations, n, pad_edges=None)
    operator = jax.tree.map(np.asarray, jax.jit(model.prepare)(typed))
    operator = operator.replace(
        **{name: _read_only(getattr(operator, name)) for name in ("senders", "receivers", "weight")}
    )
    arrays = {
        "senders": operator.senders,
        "receivers": operator.receivers,
        "weight": operator.weight,
        "degrees": coral.relation_degrees(graph.edges, graph.weights, relations, n),
        "type_bounds": graph.type_bounds.astype(np.int32),
        "node_keys": np.frombuffer("\0".join(graph.node_keys.tolist()).encode(), np.uint8),
        **edge_index(graph.edges, relations, n, graph.type_bounds),
        **_query_arrays(data, model),
    }
    return arrays, operator


def _read_only(array) -> np.ndarray:
    array = np.asarray(array)
    array.setflags(write=False)
    return array


def _query_arrays(data: code_review.ReviewData, model: coral.Coral) -> dict[str, np.ndarray]:
    graph, people = data.graph, people_of(data.graph, data.bots)
    known = [known_neighbors(graph, record)[0] for record in data.test]
    longest = max([1, *(sum(map(len, neighbors.values())) for neighbors in known)])
    queries = coral.make_queries(known, model.relations, bucket_size(longest, 8))
    first_user, first_repo = graph.type_bounds[USER], graph.type_bounds[REPOSITORY]

    def user(key):
        node = graph.node(USER, key)
        return _NO_ONE if node is None else node - first_user

    widest = max(len(r.reviewers) for r in data.test)
    truth = np.full((len(data.test), widest), _NO_ONE, np.int32)
    repo = np.full(len(data.test), _NO_ONE, np.int32)
    for q, record in enumerate(data.test):
        truth[q, : len(record.reviewers)] = [user(p) for p in record.reviewers]
        node = graph.node(REPOSITORY, record.repo)
        repo[q] = _NO_ONE if node is None else node - first_repo
    return {
        "query_neighbors": queries.neighbors,
        "query_relation": queries.relation,
        "query_mask": queries.mask,
        "query_author": np.array([user(r.author) for r in data.test], np.int32),
        "query_day": np.array([r.day for r in data.test], np.int32),
        "query_repo": repo,
        "query_truth": truth,
        "user_reviews": people.reviews.astype(np.int32),
        "user_last_day": people.last_day.astype(np.int32),
        "user_in_repo": people.in_repo,
        "user_is_bot": people.is_bot,
    }


def from_config(config) -> ReviewerRecommendation:
    """The task of a config: the history is read and its graph built here."""
    module, options = pipeline.resolve(config.data)
    if module is not code_review:
        raise ConfigError(f"config.data.name: this task reads code_review, not {config.data.name}")
    relations = tuple(options["relations"])
    fixed = {"relations": relations}
    for name in ("num_nodes", *fixed):
        if name in config.model_args:
            raise ConfigError(f"config.model_args.{name}: the history decides it (data.options)")
    args = dict(config.task_args)
    known = [f.name for f in dataclasses.fields(ReviewerRecommendation)][_GIVEN_FIELDS:]
    for name in args:
        if name not in (*known, "tables"):
            raise ConfigError(f"config.task_args.{name}: no such argument; {nearest(name, known)}")
    check_candidates(args.get("candidates", "reviewers"))
    fraction = args.get("pr_user_fraction", 0.2)
    if not 0 <= fraction <= 1:
        raise ConfigError(f"config.task_args.pr_user_fraction: {fraction}, must be from 0 to 1")
    with_config = config.copy_and_resolve_references()
    with_config.unlock()
    data, operator = None, None
    if options["sizes"] is not None:
        if not config.dry_run:
            raise ConfigError("config.data.options.sizes: shapes for a dry run alone")
        sizes = dict(options["sizes"])
        with_config.model_args.update(num_nodes=sizes["nodes"], **fixed)
        model = build_model(with_config)
        arrays, others = _abstract_arrays(sizes, len(relations)), sizes["edges"]
        search_steps = 32
    else:
        data = code_review.read(options)
        with_config.model_args.update(num_nodes=data.graph.num_nodes, **fixed)
        model = build_model(with_config)
        arrays, operator = graph_arrays(data, model)
        others, reviews = code_review.count_edges(data.graph, relations)
        # Without others every row of a batch is a `pr_user` edge.
        others, fraction = (others, fraction) if others else (reviews, 0)
        longest = int(np.diff(arrays["row_start"]).max(initial=1))
        search_steps = longest.bit_length() + 1
        tables = args.pop("tables", None)
        tables = jax.default_backend() == "cpu" and not config.dry_run if tables is None else tables
        operator = with_tables(operator) if tables else None
    args.pop("tables", None)
    rest = max(1, round((1 - fraction) * config.batch_size * options["block"]))
    return ReviewerRecommendation(
        model=model,
        data=data,
        graph_arrays=arrays,
        search_steps=search_steps,
        epoch_steps=max(1, math.ceil(max(others, 1) / rest)) * config.optimizer.accumulate,
        operator=operator,
        **args,
    )


def _abstract_arrays(sizes: Mapping[str, int], relations: int) -> dict[str, Any]:
    """Shapes of `graph_arrays` for a history of given sizes that is not at hand.

    sizes: nodes, edges (each once), users, repositories, queries, neighbors (of a query).
    """
    nodes, edges = sizes["nodes"], sizes["edges"]
    directed = bucket_size(2 * edges)
    users, queries, width = sizes["users"], sizes["queries"], sizes["neighbors"]

    def shape(kind, *dims):
        return jax.ShapeDtypeStruct(dims, kind)

    i, f, b = np.int32, np.float32, np.bool_
    return {
        "senders": shape(i, directed),
        "receivers": shape(i, directed),
        "weight": shape(f, directed),
        "degrees": shape(f, relations, nodes),
        "type_bounds": shape(i, 7),
        "node_keys": shape(np.uint8, 32 * nodes),
        "pairs": shape(i, 2, edges),
        "pair_relation": shape(i, edges),
        "num_reviews": shape(i),
        "num_others": shape(i),
        "row_start": shape(i, relations * nodes + 1),
        "neighbors": shape(i, 2 * edges),
        "second_type": shape(i, relations, 2),
        "query_neighbors": shape(i, queries, width),
        "query_relation": shape(i, queries, width),
        "query_mask": shape(f, queries, width),
        "query_author": shape(i, queries),
        "query_day": shape(i, queries),
        "query_repo": shape(i, queries),
        "query_truth": shape(i, queries, 8),
        "user_reviews": shape(i, users),
        "user_last_day": shape(i, users),
        "user_in_repo": shape(b, sizes["repositories"], users),
        "user_is_bot": shape(b, users),
    }
