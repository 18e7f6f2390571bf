"""NSGA-II over integer genes: pure `init` and `step`, every draw a function of (seed, generation).

K. Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", IEEE TEC 2002, with
the operators that ScaleNet's and ViTAS's searches use: binary tournament by dominance and then
crowding, two-point crossover, integer polynomial mutation, duplicates removed, survival by rank
and crowding. All objectives are minimized. Scores are kept by genotype, so that no network is
scored twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

INFINITY = 1e14
_TRIES = 100


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is searched.

    Attributes:
      low, high: bounds of the genes, int64 [G], both inclusive.
      evaluate: genes [N, G] -> objectives [N, M], to be minimized; called once with all the
        genotypes of a generation that have no score yet.
      canonical: genes [N, G] -> genes [N, G], the one spelling of each network; applied before
        duplicates are removed and scores looked up.
    """

    low: np.ndarray
    high: np.ndarray
    evaluate: Callable[[np.ndarray], np.ndarray]
    canonical: Callable[[np.ndarray], np.ndarray] = lambda genes: genes


@dataclasses.dataclass(frozen=True)
class Options:
    """Population size and the operators' numbers; `mutation` 0 means 1 / number of genes."""

    population: int = 64
    crossover: float = 0.9
    eta: float = 3.0
    mutation: float = 0.0


class State(NamedTuple):
    """A search between two generations.

    Attributes:
      genes: int64 [N, G]. objectives: float64 [N, M].
      rank, crowding: of the population, [N]. generation: how many were made.
      seed: of the whole search.
      scores: genotype bytes -> objectives, of everything scored so far, in order of scoring.
    """

    genes: np.ndarray
    objectives: np.ndarray
    rank: np.ndarray
    crowding: np.ndarray
    generation: int
    seed: int
    scores: dict[bytes, np.ndarray]

    @property
    def evaluations(self) -> int:
        """Networks scored so far."""
        return len(self.scores)


def init(problem: Problem, genes: np.ndarray, seed: int, scores: Mapping | None = None) -> State:
    """The first population: `genes` [N, G] made canonical, without duplicates, and scored.

    `scores` are known ones, of a search with the same `evaluate`.
    """
    genes = _unique(problem.canonical(np.asarray(genes, np.int64)))
    scores, objectives = _scored(problem, genes, dict(scores or {}))
    rank = non_dominated_rank(objectives)
    return State(genes, objectives, rank, _crowding_by_rank(objectives, rank), 0, seed, scores)


def step(problem: Problem, state: State, options: Options = Options()) -> State:
    """One generation; a pure function of the state."""
    rng = np.random.default_rng((state.seed, state.generation))
    offspring = _offspring(problem, state, options, rng)
    scores, objectives = _scored(problem, offspring, dict(state.scores))
    genes = np.concatenate([state.genes, offspring])
    objectives = np.concatenate([state.objectives, objectives])
    rank = non_dominated_rank(objectives)
    crowding = _crowding_by_rank(objectives, rank)
    # Stable: parents stand first among equals.
    kept = np.lexsort((-crowding, rank))[: options.population]
    return State(
        *(genes[kept], objectives[kept], rank[kept], crowding[kept]),
        *(state.generation + 1, state.seed, scores),
    )


def best(state: State, count: int = 1, objective: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`(genes [n, G], objectives [n, M])` of the best of everything scored, best first."""
    keys = list(state.scores)
    values = np.array([state.scores[k] for k in keys])
    order = np.argsort(values[:, objective], kind="stable")[:count]
    width = state.genes.shape[1]
    genes = np.array([np.frombuffer(keys[i], np.int64) for i in order]).reshape(-1, width)
    return genes, values[order]


def front(genes: np.ndarray, objectives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows [n, G] and [n, M] that no other row dominates, by their last objective."""
    kept = np.flatnonzero(non_dominated_rank(objectives) == 0) if len(objectives) else []
    kept = np.array(kept, np.int64)
    kept = kept[np.argsort(objectives[kept][:, -1], kind="stable")]
    return genes[kept], objectives[kept]


def to_arrays(state: State) -> dict[str, np.ndarray]:
    """Everything a resumed search needs, as arrays for `np.savez`."""
    keys = b"".join(state.scores)
    width = state.genes.shape[1]
    return {
        "genes": state.genes,
        "objectives": state.objectives,
        "counts": np.array([state.generation, state.seed], np.int64),
        "scored_genes": np.frombuffer(keys, np.int64).reshape(-1, width),
        "scored_objectives": np.array(list(state.scores.values())),
    }


def from_arrays(arrays: Mapping[str, Any]) -> State:
    """The state that `to_arrays` wrote."""
    objectives = np.asarray(arrays["objectives"])
    rank = non_dominated_rank(objectives)
    generation, seed = (int(v) for v in arrays["counts"])
    scores = {
        genes.tobytes(): values
        for genes, values in zip(
            np.asarray(arrays["scored_genes"], np.int64), np.asarray(arrays["scored_objectives"])
        )
    }
    genes = np.asarray(arrays["genes"], np.int64)
    crowding = _crowding_by_rank(objectives, rank)
    return State(genes, objectives, rank, crowding, generation, seed, scores)


# Selection


def dominates(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether a [..., M] is nowhere worse than b and somewhere better."""
    return (a <= b).all(-1) & (a < b).any(-1)


def non_dominated_rank(objectives: np.ndarray) -> np.ndarray:
    """Number of the front each row [M] of [N, M] lies in, 0 the best; int64 [N]."""
    objectives = np.asarray(objectives, np.float64)
    beats = dominates(objectives[:, None], objectives[None, :])
    left = beats.sum(0)
    rank = np.full(len(objectives), -1)
    front = 0
    while (rank < 0).any():
        members = np.flatnonzero((left == 0) & (rank < 0))
        rank[members] = front
        left = left - beats[members].sum(0)
        front += 1
    return rank


def crowding_distance(objectives: np.ndarray) -> np.ndarray:
    """Crowding distance of [N, M], float64 [N].

    Each objective is sorted (stable), the gap to either neighbor divided by its range (a range of 0
    gives 0), a gap of 0 taking the next gap on its side that is not; both sides summed and divided
    by M. Ends are infinite, written as 1e14, and so is everything of two rows or fewer.
    """
    objectives = np.asarray(objectives, np.float64)
    count, dimensions = objectives.shape
    if count <= 2:
        return np.full(count, INFINITY)
    total = np.zeros(count)
    for column in objectives.T:
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        spread = ordered[-1] - ordered[0]
        if spread == 0:
            continue
        gaps = np.concatenate([[np.inf], np.diff(ordered), [np.inf]])
        places = np.arange(count + 1)
        before = np.maximum.accumulate(np.where(gaps != 0, places, 0))
        after = np.minimum.accumulate(np.where(gaps != 0, places, count)[::-1])[::-1]
        total[order] += (gaps[before][:-1] + gaps[after][1:]) / spread
    total /= dimensions
    return np.where(np.isinf(total), INFINITY, total)


def _crowding_by_rank(objectives, rank):
    crowding = np.zeros(len(objectives))
    for front in np.unique(rank):
        rows = np.flatnonzero(rank == front)
        crowding[rows] = crowding_distance(objectives[rows])
    return crowding


def _tournament(state: State, count: int, rng) -> np.ndarray:
    """Winners of `count` duels: by dominance, then crowding, then a coin."""
    pairs = rng.integers(len(state.genes), size=(count, 2))
    coins = rng.random(count) < 0.5
    a, b = pairs.T
    first = dominates(state.objectives[a], state.objectives[b])
    second = dominates(state.objectives[b], state.objectives[a])
    more = state.crowding[a] > state.crowding[b]
    equal = state.crowding[a] == state.crowding[b]
    wins = np.where(first, True, np.where(second, False, np.where(equal, coins, more)))
    return np.where(wins, a, b)


# Variation


def two_point_crossover(a, b, probability: float, rng) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a and b [N, G] with a middle part exchanged, each pair with `probability`."""
    count, genes = a.shape
    cuts = np.sort(rng.integers(0, genes + 1, size=(count, 2)), axis=1)
    places = np.arange(genes)
    swap = (places >= cuts[:, :1]) & (places < cuts[:, 1:])
    swap &= (rng.random(count) < probability)[:, None]
    return np.where(swap, b, a), np.where(swap, a, b)


def polynomial_mutation(genes, low, high, eta: float, probability: float, rng) -> np.ndarray:
    """Bounded polynomial mutation of [N, G], rounded to whole numbers."""
    span = np.maximum(high - low, 1).astype(np.float64)
    chosen = (rng.random(genes.shape) < probability) & (high > low)
    u = rng.random(genes.shape)
    power = 1 / (eta + 1)
    below, above = 1 - (genes - low) / span, 1 - (high - genes) / span
    down = (2 * u + (1 - 2 * u) * below ** (eta + 1)) ** power - 1
    up = 1 - (2 * (1 - u) + 2 * (u - 0.5) * above ** (eta + 1)) ** power
    moved = np.rint(genes + np.where(u <= 0.5, down, up) * span).astype(np.int64)
    return np.where(chosen, np.clip(moved, low, high), genes)


def _offspring(problem: Problem, state: State, options: Options, rng) -> np.ndarray:
    """As many new genotypes as the population holds, fewer where the space is used up."""
    probability = options.mutation or 1 / len(problem.low)
    known = {row.tobytes() for row in state.genes}
    found: list[np.ndarray] = []
    for _ in range(_TRIES):
        pairs = -(-options.population // 2)
        parents = state.genes[_tournament(state, 2 * pairs, rng)]
        children = two_point_crossover(parents[:pairs], parents[pairs:], options.crossover, rng)
        children = polynomial_mutation(
            np.concatenate(children), problem.low, problem.high, options.eta, probability, rng
        )
        for row in problem.canonical(children):
            key = row.tobytes()
            if key not in known and len(found) < options.population:
                known.add(key)
                found.append(row)
        if len(found) == options.population:
            break
    return np.array(found, np.int64).reshape(-1, len(problem.low))


def _unique(genes: np.ndarray) -> np.ndarray:
    """Rows without repetition, in the order of their first appearance."""
    _, first = np.unique(genes, axis=0, return_index=True)
    return genes[np.sort(first)]


def _scored(problem: Problem, genes: np.ndarray, scores: dict) -> tuple[dict, np.ndarray]:
    new = [row for row in genes if row.tobytes() not in scores]
    if new:
        objectives = np.asarray(problem.evaluate(np.array(new)), np.float64)
        objectives = objectives.reshape(len(new), -1)
        scores |= {row.tobytes(): value for row, value in zip(new, objectives)}
    if not len(genes):
        width = len(next(iter(scores.values())))
        return scores, np.zeros((0, width))
    return scores, np.array([scores[row.tobytes()] for row in genes])
