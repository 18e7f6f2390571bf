"""Pairs of nodes without a link, drawn under `jit` from typed graphs with static shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.graphs.review_graph import RELATION_ENDS


def edge_index(
    edges: Mapping[str, Any], relations: Sequence[str], num_nodes: int, type_bounds: Any
) -> dict[str, np.ndarray]:
    """Every edge once, and the sorted neighbors of every node under every relation.

    Args:
      edges: relation -> [2, E], each edge once, in any direction. type_bounds: [types + 1], nodes
        of type t are `bounds[t] .. bounds[t + 1]`.

    Returns:
      pairs int32 [2, P] (the relation's first-named type first, `pr_user` edges before the others),
      pair_relation int32 [P], num_reviews and num_others int32 [] (their numbers), row_start int32
      [R * N + 1] and neighbors int32 [...]: neighbors of node u under relation r are
      `neighbors[row_start[r * N + u] : row_start[r * N + u + 1]]`, ascending; second_type int32
      [R, 2], first and past-the-last node of the type at a relation's second end.
    """
    bounds = np.asarray(type_bounds)
    pairs, kinds, keys, others = [], [], [], []
    order = sorted(range(len(relations)), key=lambda r: relations[r] != "pr_user")
    second_type = np.zeros((len(relations), 2), np.int32)
    for r in order:
        first_kind, second_kind = RELATION_ENDS[relations[r]]
        second_type[r] = bounds[second_kind], bounds[second_kind + 1]
        low, high = np.asarray(edges[relations[r]], np.int64)
        turned = (low < bounds[first_kind]) | (low >= bounds[first_kind + 1])
        oriented = np.stack([np.where(turned, high, low), np.where(turned, low, high)])
        pairs.append(oriented)
        kinds.append(np.full(oriented.shape[1], r))
        for one, other in ((low, high), (high, low)):
            keys.append(r * num_nodes + one)
            others.append(other)
    keys, others = np.concatenate(keys), np.concatenate(others)
    place = np.lexsort((others, keys))
    row_start = np.searchsorted(keys[place], np.arange(len(relations) * num_nodes + 1))
    kinds = np.concatenate(kinds)
    reviews = int(np.sum(kinds == order[0])) if relations[order[0]] == "pr_user" else 0
    return {
        "pairs": np.concatenate(pairs, axis=1).astype(np.int32),
        "pair_relation": kinds.astype(np.int32),
        "num_reviews": np.int32(reviews),
        "num_others": np.int32(len(kinds) - reviews),
        "row_start": row_start.astype(np.int32),
        "neighbors": others[place].astype(np.int32),
        "second_type": second_type,
    }


def linked(
    index: Mapping[str, jax.Array],
    relation: jax.Array,
    u: jax.Array,
    v: jax.Array,
    *,
    num_nodes: int,
    search_steps: int,
) -> jax.Array:
    """bool [P]: whether u[p] and v[p] share an edge of relation[p].

    Args:
      index: from `edge_index`.
      search_steps: at least log2 of the longest list of neighbors, plus 1.
    """
    index = {name: jnp.asarray(index[name]) for name in ("row_start", "neighbors")}
    row = relation * num_nodes + u
    low, end = index["row_start"][row], index["row_start"][row + 1]
    neighbors, last = index["neighbors"], max(index["neighbors"].shape[0] - 1, 0)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        below = neighbors[jnp.minimum(middle, last)] < v
        open_ = low < high
        return jnp.where(open_ & below, middle + 1, low), jnp.where(open_ & ~below, middle, high)

    if neighbors.shape[0] == 0:
        return jnp.zeros(jnp.shape(u), bool)
    at, _ = jax.lax.fori_loop(0, search_steps, halve, (low, end))
    return (at < end) & (neighbors[jnp.minimum(at, last)] == v)


def sample_negatives(
    rng: jax.Array,
    index: Mapping[str, jax.Array],
    relation: jax.Array,
    first: jax.Array,
    *,
    num_nodes: int,
    search_steps: int,
    tries: int = 4,
) -> tuple[jax.Array, jax.Array]:
    """Second ends drawn uniformly from the type of the relation's second end.

    Args:
      relation: int32 [P]. first: int32 [P], nodes of the relation's first-named type.
      tries: draws a pair; the first one that is no edge of the relation and no self pair counts.
        0 takes one draw as it is.

    Returns: nodes int32 [P] and float32 [P], 0 where every draw was an edge.
    """
    bounds = jnp.asarray(index["second_type"])[relation]
    draws = jax.random.uniform(rng, (max(tries, 1), *first.shape))
    size = bounds[:, 1] - bounds[:, 0]
    drawn = bounds[:, 0] + jnp.minimum((draws * size).astype(jnp.int32), size - 1)
    if tries == 0:
        return drawn[0], jnp.ones(first.shape, jnp.float32)
    taken = jax.vmap(
        lambda v: (
            (v == first)
            | linked(index, relation, first, v, num_nodes=num_nodes, search_steps=search_steps)
        )
    )(drawn)
    choice = jnp.argmin(taken, axis=0)
    free = ~jnp.take_along_axis(taken, choice[None], axis=0)[0]
    return jnp.take_along_axis(drawn, choice[None], axis=0)[0], free.astype(jnp.float32)
