"""MCEA: ScaleNet's alternating search of a base model and of how to scale it.

Pure `init` and `step`; a state is everything a resumed search needs (`save`, `load`), and every
draw is a function of (seed, place in the search). Facts of luminolx/ScaleNet@22487c8
(core/sampler/evolution/evolution_sampler.py). The pairs (base, scalings) form the Markov chain:
each update conditions on the present other half alone.

Two departures: the genetic algorithm's genes are repaired before they are scored and remembered,
not only while they are scaled; and `keep_base` adds the present base model to each first
population (off in the official code), so that the chain cannot lose what it had. It still can where
`scale_error` is the wider tolerance, as published: a scaling found within it may be out of the
narrower band in which the next base model is sought.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmodels.search.scalenet_space import Space
from train.search import nsga2

# A network to be scored: op indices, width, resolution.
Network = tuple[tuple[int, ...], float, int]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is searched: a space, and `score(networks) -> accuracies in %`, called in batches."""

    space: Space
    score: Callable[[Sequence[Network]], Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Options:
    """The published numbers.

    `budget`: of the base model, multiply-adds; stage s has 2^s times as many. `base_error` and
    `scale_error`: tolerances. `ratio`: stage weights are ratio^(S - s). `multi_objective` adds the
    base model's multiply-adds as a second objective: survival is then by both, and the front of
    every search of a base model is kept. The chain goes on from the fittest, as without.
    """

    budget: float = 306e6
    base_error: float = 25e6
    scale_error: float = 50e6
    population: int = 64
    generations: int = 40
    base_models: int = 20
    iterations: int = 8
    ratio: float = 1.0
    multi_objective: bool = False
    keep_base: bool = True
    tries: int = 20000


class State(NamedTuple):
    """A search between two sub-steps.

    Attributes:
      seed, iteration; phase: initial | base | scaling | done; place: stage or generation within.
      base: op genes or None. scalings: stage -> (depth, width, resolution) numbers.
      chain: (iteration, what was updated, base, scalings, objective) of every update.
      genetic: the base search in progress, or None. accuracy: network -> %, all scored so far.
      front: with two objectives, the base models of the last search that no other was both fitter
        and cheaper than, cheapest first, none with a penalty: (base, fitness, flops, scalings).
    """

    seed: int
    iteration: int
    phase: str
    place: int
    base: tuple[int, ...] | None
    scalings: dict[int, tuple[int, int, int]]
    chain: tuple[dict[str, Any], ...]
    genetic: nsga2.State | None
    accuracy: dict[Network, float]
    front: tuple[dict[str, Any], ...] = ()

    @property
    def evaluations(self) -> int:
        """Networks scored so far."""
        return len(self.accuracy)


def init(seed: int) -> State:
    """A search that has not begun."""
    return State(seed, 0, "initial", 1, None, {}, (), None, {})


def step(problem: Problem, options: Options, state: State) -> State:
    """The next sub-step: a stage's first scaling, a generation of base models, a stage's scaling.

    Raises RuntimeError when no scaling of a stage keeps to its budget, or no base model lies in
    the band after `tries` draws.
    """
    if state.phase == "initial":
        return _initial(problem, options, state)
    if state.phase == "base":
        return _base(problem, options, state)
    if state.phase == "scaling":
        return _scaling(problem, options, state)
    return state


def run(
    problem: Problem,
    options: Options,
    state: State,
    after: Callable[[State], None] = lambda state: None,
) -> State:
    """Steps to the end; `after` sees every state (to save it, to print it)."""
    while state.phase != "done":
        state = step(problem, options, state)
        after(state)
    return state


def fitness(
    problem: Problem,
    options: Options,
    base: Sequence[int],
    scalings: dict,
    accuracy: dict,
    error: float | None = None,
) -> tuple[float, dict]:
    """`(fitness in %, accuracy)` of one base model under the scalings; see `_fitnesses`."""
    values, accuracy = _fitnesses(problem, options, np.array([base]), scalings, accuracy, error)
    return float(values[0]), accuracy


def _scored(problem: Problem, networks: Sequence[Network], accuracy: dict) -> dict:
    new = [n for n in dict.fromkeys(networks) if n not in accuracy]
    if not new:
        return accuracy
    return {**accuracy, **{n: float(v) for n, v in zip(new, problem.score(new))}}


def _network(space: Space, base, stage: int, indices) -> Network:
    ops, width, resolution = space.scaled(base, stage, indices)
    return tuple(int(v) for v in ops), float(width), int(resolution)


def _fitnesses(problem: Problem, options: Options, bases, scalings, accuracy, error=None):
    """Weighted mean over the stages of the scaled networks' accuracies, penalties in their place.

    A base model outside the band gets 3 + (F0 - F) / F0 for the whole; a scaled network outside
    its own, of width `error` (None: `base_error`), gets 3 + (2^s F0 - F) / (2^s F0) for its stage.
    """
    error = options.base_error if error is None else error
    space, stages = problem.space, sorted(scalings)
    weights = np.array([options.ratio ** (max(stages) - s) for s in stages])
    weights = weights / weights.sum()
    table: list[Any] = []
    for base in bases:
        flops = space.flops(base, holes=True)
        if abs(flops - options.budget) > options.base_error:
            table.append(3 + (options.budget - flops) / options.budget)
            continue
        row = []
        for s in stages:
            network = _network(space, base, s, scalings[s])
            if space.is_admissible([base], s, scalings[s], error):
                row.append(network)
            else:
                budget = options.budget * 2**s
                row.append(3 + (budget - _flops(space, network)) / budget)
        table.append(row)
    wanted = [n for row in table if isinstance(row, list) for n in row if isinstance(n, tuple)]
    accuracy = _scored(problem, wanted, accuracy)
    values = [
        sum(w * (accuracy[n] if isinstance(n, tuple) else n) for w, n in zip(weights, row))
        if isinstance(row, list)
        else row
        for row in table
    ]
    return np.array(values), accuracy


def _flops(space: Space, network: Network) -> int:
    ops, width, resolution = network
    # The published repair, which is the search's, may leave identities before operations.
    return space.flops(np.array(ops), width, resolution, holes=True)


def _initial(problem: Problem, options: Options, state: State) -> State:
    """First scaling of a stage: the best mean accuracy over random base models."""
    space, stage = problem.space, state.place
    rng = np.random.default_rng((state.seed, 0, stage))
    bases = [
        space.random_base_within(rng, options.budget, options.base_error, options.tries)
        for _ in range(options.base_models)
    ]
    best, accuracy = _best_scaling(problem, options, bases, stage, state.accuracy)
    state = state._replace(scalings={**state.scalings, stage: best}, accuracy=accuracy)
    if stage < space.max_scaling_stage:
        return state._replace(place=stage + 1)
    return state._replace(phase="base", place=0)


def _best_scaling(problem: Problem, options: Options, bases, stage: int, accuracy):
    space = problem.space
    admissible = space.admissible(bases, stage, options.scale_error)
    if not admissible:
        flops = [_flops(space, _network(space, bases[0], stage, t)) for t in space.scalings(stage)]
        raise RuntimeError(
            f"no scaling of stage {stage} keeps to {2**stage} x the base model's multiply-adds "
            f"within {options.scale_error * 2**stage:,.0f}; the first base model's have "
            f"{min(flops):,} to {max(flops):,}"
        )
    networks = {t: [_network(space, b, stage, t) for b in bases] for t in admissible}
    accuracy = _scored(problem, [n for row in networks.values() for n in row], accuracy)
    means = {t: np.mean([accuracy[n] for n in row]) for t, row in networks.items()}
    return max(admissible, key=lambda t: means[t]), accuracy


def _base(problem: Problem, options: Options, state: State) -> State:
    """One generation of the search of a base model for the present scalings."""
    space = problem.space
    memory = {"accuracy": state.accuracy}

    def evaluate(genes):
        values, memory["accuracy"] = _fitnesses(
            problem, options, genes, state.scalings, memory["accuracy"]
        )
        if not options.multi_objective:
            return (100 - values)[:, None]
        return np.stack([100 - values, space.flops(genes, holes=True).astype(np.float64)], axis=1)

    low, high = space.base_bounds()
    search = nsga2.Problem(
        low, high, evaluate, lambda genes: np.array([space.repair(g) for g in genes])
    )
    numbers = nsga2.Options(population=options.population)
    if state.genetic is None:
        rng = np.random.default_rng((state.seed, 1, state.iteration))
        first = [
            space.random_base_within(rng, options.budget, options.base_error, options.tries)
            for _ in range(options.population)
        ]
        if options.keep_base and state.base is not None:
            first[-1] = np.array(state.base)
        # One seed an iteration, so that no two of them draw alike.
        seed = int(np.random.SeedSequence((state.seed, 2, state.iteration)).generate_state(1)[0])
        genetic = nsga2.init(search, np.array(first), seed)
    else:
        genetic = nsga2.step(search, state.genetic, numbers)
    state = state._replace(genetic=genetic, accuracy=memory["accuracy"])
    if genetic.generation < options.generations:
        return state
    genes, objectives = nsga2.best(genetic)
    base = tuple(int(v) for v in genes[0])
    link = _link(state.iteration, "base", base, state.scalings, 100 - objectives[0, 0])
    front = _front(problem, options, state.scalings, genetic) if options.multi_objective else ()
    return state._replace(
        base=base, chain=(*state.chain, link), genetic=None, phase="scaling", place=1, front=front
    )


def _front(problem: Problem, options: Options, scalings, genetic: nsga2.State):
    """What `State.front` has of one search of a base model."""
    space = problem.space
    genes, objectives = nsga2.best(genetic, len(genetic.scores))
    near = np.abs(objectives[:, 1] - options.budget) <= options.base_error
    genes, objectives = genes[near], objectives[near]
    fits = [
        all(space.is_admissible([g], s, t, options.base_error) for s, t in scalings.items())
        for g in genes
    ]
    genes, objectives = nsga2.front(*(a[np.array(fits, bool)] for a in (genes, objectives)))
    return tuple(
        {
            "base": g.tolist(),
            "fitness": 100 - float(o[0]),
            "flops": int(o[1]),
            "scalings": _named(scalings),
        }
        for g, o in zip(genes, objectives)
    )


def _named(scalings) -> dict[str, list[int]]:
    """Scalings as JSON has them."""
    return {str(s): list(t) for s, t in scalings.items()}


def _link(iteration, updated, base, scalings, objective) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "updated": updated,
        "base": list(base),
        "scalings": _named(scalings),
        "objective": float(objective),
    }


def _scaling(problem: Problem, options: Options, state: State) -> State:
    """The best scaling of one stage for the present base model, of all admissible ones."""
    space, stage = problem.space, state.place
    best, accuracy = _best_scaling(problem, options, [np.array(state.base)], stage, state.accuracy)
    scalings = {**state.scalings, stage: best}
    state = state._replace(scalings=scalings, accuracy=accuracy)
    if stage < space.max_scaling_stage:
        return state._replace(place=stage + 1)
    # By the tolerance that the scalings were sought with: their accuracies, no penalties.
    objective, accuracy = fitness(
        problem, options, state.base, scalings, accuracy, options.scale_error
    )
    link = _link(state.iteration, "scaling", state.base, scalings, objective)
    iteration = state.iteration + 1
    return state._replace(
        chain=(*state.chain, link),
        accuracy=accuracy,
        iteration=iteration,
        phase="done" if iteration == options.iterations else "base",
        place=0,
    )


def random_search(
    problem: Problem, options: Options, seed: int, evaluations: int
) -> tuple[float, list[float]]:
    """`(best fitness, best so far after each pair)` of random pairs at the same number of scores.

    A pair is a random base model in its band with, for every stage, a random scaling that is
    admissible for it at the tolerance of the search's own scalings. Stops when as many networks
    were scored as `evaluations`.
    """
    space = problem.space
    rng = np.random.default_rng((seed, 3))
    accuracy: dict[Network, float] = {}
    best, history = -np.inf, []
    barren = 0
    while len(accuracy) < evaluations and barren < options.tries:
        base = space.random_base_within(rng, options.budget, options.base_error, options.tries)
        scalings = {}
        for s in range(1, space.max_scaling_stage + 1):
            fits = space.admissible([base], s, options.scale_error)
            if fits:
                scalings[s] = fits[int(rng.integers(len(fits)))]
        if len(scalings) < space.max_scaling_stage:
            barren += 1
            continue
        before = len(accuracy)
        value, accuracy = fitness(problem, options, base, scalings, accuracy, options.scale_error)
        barren = barren + 1 if len(accuracy) == before else 0
        best = max(best, value)
        history.append(best)
    return float(best), history


# Resuming


def save(path: str | os.PathLike, state: State) -> None:
    """Write a state as JSON, whole or not at all; numbers keep every bit."""
    genetic = None
    if state.genetic is not None:
        genetic = {k: v.tolist() for k, v in nsga2.to_arrays(state.genetic).items()}
    plain = {
        **state._asdict(),
        "scalings": _named(state.scalings),
        "genetic": genetic,
        "accuracy": [[list(n[0]), n[1], n[2], v] for n, v in state.accuracy.items()],
    }
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(plain), encoding="utf-8")
    part.replace(path)


def load(path: str | os.PathLike) -> State:
    """The state that `save` wrote."""
    plain = json.loads(Path(path).read_text(encoding="utf-8"))
    genetic = plain["genetic"]
    return State(
        **{k: plain[k] for k in ("seed", "iteration", "phase", "place")},
        base=None if plain["base"] is None else tuple(plain["base"]),
        scalings={int(s): tuple(t) for s, t in plain["scalings"].items()},
        chain=tuple(plain["chain"]),
        genetic=None if genetic is None else nsga2.from_arrays(genetic),
        accuracy={(tuple(ops), w, r): v for ops, w, r, v in plain["accuracy"]},
        front=tuple(plain.get("front", ())),
    )
