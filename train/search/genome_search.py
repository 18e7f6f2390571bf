"""ViTAS's evolutionary search of a genome under a FLOPs band, and its random baseline.

Facts of xiusu/ViTAS@066bb20 (core/sampler/evolution). Genomes are brought into their canonical
form before duplicates are removed and scores looked up (identity shifting).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxmodels.search.vitas_space import Space
from train.search import nsga2


@dataclasses.dataclass(frozen=True)
class Options:
    """Band of multiply-adds, population, generations, identity probability of first draws."""

    flops_min: float
    budget: float
    population: int = 50
    generations: int = 40
    probability: float = 0.5
    shift: bool = True
    tries: int = 2000


def problem(space: Space, options: Options, score: Callable[[np.ndarray], np.ndarray]):
    """The search as NSGA-II sees it: one objective, 100 - fitness.

    Outside the band the fitness is 5 - (F - budget) / budget and nothing is scored; a genome that
    is no network (no block, a width its heads do not divide) has 0.
    """

    def evaluate(genomes: np.ndarray) -> np.ndarray:
        flops = space.flops(genomes)
        networks = space.legal(genomes)
        inside = (flops >= options.flops_min) & (flops <= options.budget) & networks
        fitness = np.where(networks, 5 - (flops - options.budget) / options.budget, 0.0)
        if inside.any():
            fitness[inside] = score(genomes[inside])
        return (100 - fitness)[:, None]

    low, high = space.bounds()
    canonical = space.shift if options.shift and space.identity else (lambda genomes: genomes)
    return nsga2.Problem(low, high, evaluate, canonical)


def random_genomes(space: Space, options: Options, rng: np.random.Generator, count: int):
    """`count` different legal genomes inside the band, by rejection.

    Raises ValueError for a band out of reach; RuntimeError when too few are found.
    """
    space.check_budget(options.flops_min, options.budget)
    found: dict[bytes, np.ndarray] = {}
    for _ in range(options.tries):
        drawn = space.sample_many(rng, 256, options.probability, options.shift)
        flops = space.flops(drawn)
        inside = (flops >= options.flops_min) & (flops <= options.budget) & space.legal(drawn)
        for genome in drawn[inside]:
            found.setdefault(genome.tobytes(), genome)
            if len(found) == count:
                return np.array(list(found.values()))
    raise RuntimeError(
        f"only {len(found)} of {count} random genomes have between {options.flops_min:,.0f} and "
        f"{options.budget:,.0f} multiply-adds after {256 * options.tries:,} draws"
    )


def init(search: nsga2.Problem, space: Space, options: Options, seed: int) -> nsga2.State:
    """The first population."""
    rng = np.random.default_rng((seed, 0))
    return nsga2.init(search, random_genomes(space, options, rng, options.population), seed)


def step(search: nsga2.Problem, options: Options, state: nsga2.State) -> nsga2.State:
    """One generation."""
    return nsga2.step(search, state, nsga2.Options(population=options.population))


def run(search, space: Space, options: Options, seed: int, path=None) -> nsga2.State:
    """The whole search; with a `path` it is saved after every generation and goes on from there."""
    if path is not None and Path(path).exists():
        state = load(path)
    else:
        state = init(search, space, options, seed)
    while state.generation < options.generations:
        if path is not None:
            save(path, state)
        state = step(search, options, state)
    if path is not None:
        save(path, state)
    return state


def measured(space: Space, options: Options, state: nsga2.State) -> int:
    """Networks whose accuracy was measured (a penalty costs nothing)."""
    genomes = np.array([np.frombuffer(key, np.int64) for key in state.scores])
    flops = space.flops(genomes)
    inside = (flops >= options.flops_min) & (flops <= options.budget)
    return int((inside & space.legal(genomes)).sum())


def random_search(space: Space, options: Options, score, seed: int, evaluations: int):
    """`(best genome, its accuracy in %)` of as many random genomes in the band."""
    rng = np.random.default_rng((seed, 1))
    genomes = random_genomes(space, options, rng, evaluations)
    accuracy = score(genomes)
    best = int(np.argmax(accuracy))
    return genomes[best], float(accuracy[best])


def save(path: str | os.PathLike, state: nsga2.State) -> None:
    """Write a search's state as JSON, whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    arrays = {k: v.tolist() for k, v in nsga2.to_arrays(state).items()}
    part.write_text(json.dumps(arrays), encoding="utf-8")
    part.replace(path)


def load(path: str | os.PathLike) -> nsga2.State:
    """The state that `save` wrote."""
    return nsga2.from_arrays(json.loads(Path(path).read_text(encoding="utf-8")))
