"""From a trained CORAL model to recommended reviewers: filters, fallback, explanations."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmodels.graphs import coral
from jaxmodels.graphs.review_graph import (
    FILE,
    NODE_TYPES,
    REPOSITORY,
    USER,
    WORD,
    ReviewGraph,
    tokenize,
)
from jaxmodels.graphs.review_records import BOTS, PullRequest, parse_records
from jaxmodels.spelling import did_you_mean

CANDIDATES = ("all", "reviewers", "repo")


@dataclasses.dataclass(frozen=True)
class Contribution:
    """How much a known neighbor of the new change adds to a recommended person's score."""

    kind: str
    key: str
    amount: float


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """Reviewers recommended for one change, best first.

    Attributes:
      id: of the pull request.
      users: person ids. scores: their dot products (numbers of reviews when `fallback`).
      known: kind ("user", "file", "word") -> number of neighbors found in the graph.
      unknown: kind -> the author, files and words that the graph does not have.
      fallback: no neighbor is known by a relation that the model has, so that the most frequent
        reviewers are given.
      reasons: for each user the neighbors that add most; they and the rest sum to the score when
        the final activation is the identity.
    """

    id: str
    users: tuple[str, ...]
    scores: tuple[float, ...]
    known: Mapping[str, int]
    unknown: Mapping[str, tuple[str, ...]]
    fallback: bool
    reasons: tuple[tuple[Contribution, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class People:
    """What a history says of its people, by position among the graph's users.

    Attributes:
      reviews: [U] int64 changes reviewed. last_day: [U] int64 last day seen in any role.
      in_repo: [repositories, U] bool, seen in the repository in any role.
      is_bot: [U] bool, the id looks like a robot's.
    """

    reviews: np.ndarray
    last_day: np.ndarray
    in_repo: np.ndarray
    is_bot: np.ndarray


def people_of(graph: ReviewGraph, bots: str = BOTS) -> People:
    """Activity of the graph's users in its records; `bots` is a regular expression over ids."""
    keys = graph.node_keys[graph.nodes_of(USER)].tolist()
    position = {key: i for i, key in enumerate(keys)}
    repos = {key: i for i, key in enumerate(graph.node_keys[graph.nodes_of(REPOSITORY)].tolist())}
    reviews = np.zeros(len(keys), np.int64)
    last_day = np.zeros(len(keys), np.int64)
    in_repo = np.zeros((max(len(repos), 1), len(keys)), bool)
    for record in graph.records:
        reviewers = [position[p] for p in set(record.reviewers)]
        reviews[reviewers] += 1
        everybody = [position[p] for p in {record.author, *record.commenters}] + reviewers
        last_day[everybody] = np.maximum(last_day[everybody], record.day)
        if record.repo:
            in_repo[repos[record.repo], everybody] = True
    robot = re.compile(bots, re.IGNORECASE) if bots else None
    is_bot = np.array([bool(robot and robot.search(key)) for key in keys], bool)
    return People(reviews, last_day, in_repo, is_bot)


def check_candidates(candidates: str) -> str:
    """The name of a candidate set.

    Raises:
      ValueError: it is not one of CANDIDATES.
    """
    if candidates not in CANDIDATES:
        near = did_you_mean(candidates, CANDIDATES)
        raise ValueError(f"candidates {candidates!r}{near}; known: {', '.join(CANDIDATES)}")
    return candidates


def known_neighbors(
    graph: ReviewGraph, record: PullRequest
) -> tuple[dict[str, list[int]], dict[str, tuple[str, ...]]]:
    """Neighbors of a change that the graph has, and by kind the names that it does not have.

    The change's words are those of its title, description and work items, as in training.
    """
    cap = graph.options.get("max_files_per_pr")
    wanted = {
        ("pr_user", USER, "user"): (record.author,) if record.author else (),
        ("pr_file", FILE, "file"): tuple(dict.fromkeys(record.files[:cap])),
        ("pr_word", WORD, "word"): tuple(tokenize(record.text, graph.stop_words)),
    }
    known, unknown = {}, {}
    for (relation, kind, name), keys in wanted.items():
        nodes = [graph.node(kind, key) for key in keys]
        known[relation] = [node for node in nodes if node is not None]
        unknown[name] = tuple(key for key, node in zip(keys, nodes) if node is None)
    return known, unknown


class Recommender:
    """Ranks the people of a graph as reviewers of changes that the graph does not have.

    Args:
      graph: the training graph, with its records.
      module: a `Coral` for it. variables: `{"params": ...}` trained on it.
      relations: those of the module.
      bots: regular expression over person ids that are never recommended; "" for none.

    Raises:
      ValueError: the parameters belong to a graph of another number of nodes.
    """

    def __init__(
        self,
        graph: ReviewGraph,
        module: coral.Coral,
        variables: Mapping[str, Any],
        bots: str = BOTS,
    ):
        check_fit(module, variables["params"], graph.num_nodes)
        self.graph, self.module = graph, module
        self.people = people_of(graph, bots)
        self._users = graph.nodes_of(USER)
        self._keys = graph.node_keys[self._users].tolist()
        self._variables = {"params": variables["params"]}
        self._degrees = coral.relation_degrees(
            graph.edges, graph.weights, module.relations, graph.num_nodes
        )
        typed = coral.relations_graph(graph.edges, graph.weights, module.relations, graph.num_nodes)
        states = jax.jit(functools.partial(module.apply, method="intermediates"))(
            self._variables, typed
        )
        self._h1, self._z_users = states["h1"], np.asarray(states["z"])[self._users]
        self._embed = jax.jit(functools.partial(module.apply, method="embed_new"))
        self._contributions = jax.jit(functools.partial(module.apply, method="contributions"))

    def recommend(
        self,
        pull_requests: Iterable[Any],
        k: int | None = 5,
        *,
        candidates: str = "all",
        active_within_days: int | None = None,
        reasons: int = 3,
    ) -> list[Recommendation]:
        """Reviewers for changes that have just been opened.

        Args:
          pull_requests: records without reviewers; those the graph has already are ranked too.
          k: how many people; None for all.
          candidates: "all" people of the graph, those who were "reviewers" before, or the people
            seen in the change's "repo" (all, where the graph does not know the repository).
          active_within_days: only people seen in that many days before the change.
          reasons: contributions to name for each recommended person; 0 saves the time.

        Raises:
          ValueError: reviewers are given (a leak), no pull requests, an unknown option.
        """
        check_candidates(candidates)
        records = parse_records(pull_requests, queries=True)
        found = [known_neighbors(self.graph, record) for record in records]
        scores, fallback, queries = self._scores([known for known, _ in found])
        answers = []
        for q, record in enumerate(records):
            allowed = self.allowed(record, candidates, active_within_days)
            wanted = int(allowed.sum()) if k is None else k
            if wanted > allowed.sum():
                warnings.warn(
                    f"{record.id}: {wanted} reviewers wanted, {int(allowed.sum())} candidates",
                    stacklevel=2,
                )
            places = np.flatnonzero(allowed)
            order = coral.ranking(scores[q][places], places)[:wanted]
            known, unknown = found[q]
            chosen: tuple[tuple[Contribution, ...], ...] = ()
            if reasons and not fallback[q] and len(order):
                chosen = self._reasons(q, queries, order, reasons)
            answers.append(
                Recommendation(
                    id=record.id,
                    users=tuple(self._keys[i] for i in order),
                    scores=tuple(float(scores[q][i]) for i in order),
                    known=dict(zip(("user", "file", "word"), map(len, known.values()))),
                    unknown=unknown,
                    fallback=bool(fallback[q]),
                    reasons=chosen,
                )
            )
        return answers

    def allowed(
        self, record: PullRequest, candidates: str, active_within_days: int | None
    ) -> np.ndarray:
        """[U] bool: who may be recommended for a change; never its author, never a robot."""
        allowed = ~self.people.is_bot
        if candidates == "reviewers":
            allowed &= self.people.reviews > 0
        elif candidates == "repo":
            repo = self.graph.node(REPOSITORY, record.repo)
            if repo is not None:
                allowed &= self.people.in_repo[repo - self.graph.type_bounds[REPOSITORY]]
        if active_within_days is not None:
            allowed &= self.people.last_day >= record.day - active_within_days
        author = self.graph.node(USER, record.author)
        if author is not None:
            allowed[author - self._users[0]] = False
        return allowed

    def _scores(self, known: Sequence[Mapping[str, Sequence[int]]]):
        """[Q, U] scores, [Q] whether they are numbers of reviews, and the queries."""
        longest = max([1, *(sum(map(len, neighbors.values())) for neighbors in known)])
        # Powers of two in both directions, so that few programs are compiled.
        width, count = (1 << (n - 1).bit_length() for n in (longest, len(known)))
        padded = [*known, *[{}] * (count - len(known))]
        queries = coral.make_queries(padded, self.module.relations, width)
        new = np.asarray(self._embed(self._variables, self._h1, self._degrees, queries))
        scores = new @ self._z_users.T
        fallback = ~np.asarray(self.module.reached(self._degrees, queries))[: len(known)]
        scores[: len(known)][fallback] = self.people.reviews
        return scores, fallback, queries

    def _reasons(self, q: int, queries: coral.Queries, order, count: int):
        one = coral.Queries(*(array[q : q + 1] for array in queries))
        parts = np.asarray(self._contributions(self._variables, self._h1, self._degrees, one))[0]
        amounts = self._z_users[order] @ parts.T  # [users, K]
        amounts = np.where(one.mask[0] > 0, amounts, -np.inf)
        chosen = []
        for row in amounts:
            best = np.argsort(-row, kind="stable")[:count]
            chosen.append(
                tuple(
                    Contribution(
                        self.module.relations[one.relation[0, i]].removeprefix("pr_"),
                        str(self.graph.node_keys[one.neighbors[0, i]]),
                        float(row[i]),
                    )
                    for i in best
                    if np.isfinite(row[i])
                )
            )
        return tuple(chosen)


def check_fit(module: coral.Coral, params: Mapping[str, Any], num_nodes: int) -> None:
    """Raises ValueError when a checkpoint's tables have other rows than the graph has nodes."""
    for (child, leaf), axis in module.node_axes.items():
        rows = np.shape(params[child][leaf])[axis]
        if rows != num_nodes:
            raise ValueError(
                f"graph and checkpoint differ: the graph has {num_nodes} nodes, {child}.{leaf} of "
                f"the checkpoint {rows} rows"
            )


def carry_over(
    module: coral.Coral,
    params: Mapping[str, Any],
    fresh: Mapping[str, Any],
    old: ReviewGraph,
    new: ReviewGraph,
) -> dict[str, Any]:
    """Parameters for a graph after `upsert`: nodes that stayed keep their rows, new ones get fresh.

    Training then goes on from where it was instead of from nothing.

    Args:
      params: trained on `old`. fresh: initialized for `new`. module: either graph's.
    """
    at_old, at_new = [], []
    for kind in range(len(NODE_TYPES)):
        a, b = old.nodes_of(kind), new.nodes_of(kind)
        _, in_a, in_b = np.intersect1d(
            old.node_keys[a], new.node_keys[b], assume_unique=True, return_indices=True
        )
        at_old.append(a[in_a])
        at_new.append(b[in_b])
    axes = module.node_axes
    moved: dict[str, Any] = {}
    for child, leaves in params.items():
        moved[child] = dict(leaves)
        for leaf, trained in leaves.items():
            if (child, leaf) in axes:
                whole = (slice(None),) * axes[child, leaf]
                table = np.array(fresh[child][leaf])
                read = (*whole, np.concatenate(at_old))
                table[(*whole, np.concatenate(at_new))] = np.asarray(trained)[read]
                moved[child][leaf] = table
    return moved


def developers_by_repo(records: Iterable[PullRequest]) -> dict[str, int]:
    """Repository -> number of people seen in it, in any role."""
    people = defaultdict(set)
    for record in records:
        people[record.repo] |= {record.author, *record.reviewers, *record.commenters}
    return {repo: len(names) for repo, names in people.items()}
