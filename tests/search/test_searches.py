"""NSGA-II against brute force; MCEA on a known optimum; both resume to the same result."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.search import vitas_space
from tests.search.tiny_space import SPACE
from train.search import genome_search, mcea, nsga2, scoring
from train.tasks import supernet

OPTIONS = mcea.Options(
    budget=21_000, base_error=9_000, scale_error=9_000, population=12, generations=4,
    base_models=3, iterations=3,
)  # fmt: skip


def separable(networks):
    """A known fitness: op 2 everywhere, and every stage's multipliers near their own targets."""
    scores = []
    for ops, width, resolution in networks:
        ops = np.array(ops)
        target = 1.2 if width < 1.3 else 1.6
        scores.append(
            60 + 20 * (ops == 2).sum() / max((ops > 0).sum(), 1)
            - 40 * abs(width - target) - 0.5 * (16 - resolution)
        )  # fmt: skip
    return scores


def problem(log=None):
    def score(networks):
        if log is not None:
            log.append(len(networks))
        return separable(networks)

    return mcea.Problem(SPACE, score)


def test_ranks_are_those_of_the_quadratic_definition():
    rng = np.random.default_rng(0)
    for columns in (1, 2, 3):
        values = rng.integers(0, 6, size=(40, columns)).astype(float)
        left, rank, front = list(range(40)), np.zeros(40, int), 0
        while left:
            best = [i for i in left if not any(nsga2.dominates(values[j], values[i]) for j in left)]
            rank[best] = front
            left = [i for i in left if i not in best]
            front += 1
        assert (nsga2.non_dominated_rank(values) == rank).all()


def test_variation_keeps_bounds_and_genes():
    rng = np.random.default_rng(0)
    low, high = np.zeros(12, int), np.array([3] * 10 + [0, 1])
    parents = rng.integers(low, high + 1, size=(50, 12))
    a, b = nsga2.two_point_crossover(parents[:25], parents[25:], 1.0, rng)
    assert (np.sort(np.stack([a, b]), 0) == np.sort(parents.reshape(2, 25, 12), 0)).all()
    moved = nsga2.polynomial_mutation(parents, low, high, 3.0, 1.0, rng)
    assert (moved >= low).all() and (moved <= high).all()
    assert (moved[:, 10] == 0).all() and 0.2 < (moved != parents).mean() < 0.95


def test_the_alternation_reaches_the_optimum_and_never_falls():
    state = mcea.run(problem(), OPTIONS, mcea.init(0))
    objectives = [link["objective"] for link in state.chain]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(objectives))
    best = -np.inf
    rng = np.random.default_rng(1)
    for _ in range(400):  # of all pairs that a search could have found
        base = SPACE.repair(SPACE.random_base(rng))
        fits = {s: SPACE.admissible([base], s, OPTIONS.base_error) for s in (1, 2)}
        if all(fits.values()):
            scalings = {
                s: max(f, key=lambda t, s=s: separable([mcea._network(SPACE, base, s, t)])[0])
                for s, f in fits.items()
            }
            best = max(best, mcea.fitness(problem(), OPTIONS, base, scalings, {})[0])
    assert objectives[-1] >= best - 1e-9


def test_a_search_stopped_anywhere_ends_where_an_unbroken_one_does(tmp_path):
    whole = mcea.run(problem(), OPTIONS, mcea.init(5))
    path, state, steps = tmp_path / "search.json", mcea.init(5), 0
    while state.phase != "done":
        mcea.save(path, mcea.step(problem(), OPTIONS, state))
        state = mcea.load(path)  # as a new process finds it
        steps += 1
    assert steps > 10
    assert state.chain == whole.chain and state.accuracy == whole.accuracy
    assert list(state.accuracy) == list(whole.accuracy)


def test_no_network_is_scored_twice():
    log, seen = [], []

    def score(networks):
        seen.extend(networks)
        log.append(len(networks))
        return separable(networks)

    state = mcea.run(mcea.Problem(SPACE, score), OPTIONS, mcea.init(0))
    assert len(seen) == len(set(seen)) == state.evaluations == sum(log)


def test_networks_outside_their_bands_get_the_official_penalties():
    base = SPACE.random_base_within(np.random.default_rng(0), 21_000, 9_000)
    scalings = {1: (0, 0, 0), 2: (0, 0, 0)}
    narrow = mcea.Options(**{**OPTIONS.__dict__, "base_error": 0.0, "budget": 1e6})
    value, accuracy = mcea.fitness(problem(), narrow, base, scalings, {})
    assert value == pytest.approx(3 + (1e6 - SPACE.flops(base)) / 1e6) and not accuracy
    exact = mcea.Options(**{**OPTIONS.__dict__, "base_error": 0.5, "budget": SPACE.flops(base)})
    value, accuracy = mcea.fitness(problem(), exact, base, scalings, {})
    wanted = [
        3 + (2**s * exact.budget - SPACE.flops(*SPACE.scaled(base, s, t))) / (2**s * exact.budget)
        for s, t in scalings.items()
    ]
    assert value == pytest.approx(np.mean(wanted)) and not accuracy


def test_two_objectives_keep_a_front():
    options = mcea.Options(**{**OPTIONS.__dict__, "multi_objective": True, "iterations": 1})
    state = mcea.init(0)
    while state.phase != "scaling":
        before, state = state, mcea.step(problem(), options, state)
    objectives = before.genetic.objectives
    assert objectives.shape[1] == 2
    front = objectives[before.genetic.rank == 0]
    assert not any(nsga2.dominates(a, b) for a in objectives for b in front)
    rows = np.array([(100 - row["fitness"], row["flops"]) for row in state.front])
    assert (np.diff(rows[:, 1]) > 0).all() and (np.diff(rows[:, 0]) < 0).all()
    assert rows[-1, 0] == pytest.approx(100 - state.chain[-1]["objective"])
    for row in state.front:
        assert SPACE.flops(row["base"], holes=True) == row["flops"]
        assert abs(row["flops"] - options.budget) <= options.base_error


def test_a_front_survives_a_stop(tmp_path):
    options = mcea.Options(**{**OPTIONS.__dict__, "multi_objective": True, "iterations": 1})
    state = mcea.run(problem(), options, mcea.init(0))
    mcea.save(tmp_path / "search.json", state)
    assert mcea.load(tmp_path / "search.json").front == state.front != ()


def test_an_empty_set_of_scalings_is_an_error_with_what_there_is():
    options = mcea.Options(**{**OPTIONS.__dict__, "scale_error": 0.0})
    with pytest.raises(RuntimeError, match=r"no scaling of stage 1 keeps to 2 x .* have"):
        mcea.step(problem(), options, mcea.init(0))


def test_random_search_scores_as_many_networks():
    value, history = mcea.random_search(problem(), OPTIONS, 0, 40)
    assert history == sorted(history) and value == history[-1]


def test_a_scalings_objective_has_no_penalty_for_the_narrower_band():
    options = mcea.Options(**{**OPTIONS.__dict__, "base_error": 3_000, "iterations": 1})
    state = mcea.run(problem(), options, mcea.init(2))
    base, scaled = (link["objective"] for link in state.chain)
    assert scaled > 50 and scaled >= base - 1e-9
    value, _ = mcea.random_search(problem(), options, 0, 30)
    assert value > 50


class Remembered(supernet.Supernet):
    """The class is said by whether an image is brighter than its batch."""

    def logits(self, variables, images, ops, width, resolution):
        value = images.mean((1, 2, 3))
        bright = value > value.mean()
        return jnp.stack([~bright, bright], 1).astype(jnp.float32)


def held_out(sizes, seed=0):
    """Batches of four of which some rows fill up, and the same rows without those."""
    rng = np.random.default_rng(seed)
    padded, plain = [], []
    for count in sizes:
        image = rng.random((count, 2, 2, 3)).astype(np.float32)
        label = rng.integers(0, 2, count).astype(np.int32)
        plain.append((image, label, np.ones(count, np.float32)))
        fill = [(0, 4 - count)]
        padded.append((np.pad(image, fill + [(0, 0)] * 3), np.pad(label, fill),
                       np.pad(np.ones(count, np.float32), fill)))  # fmt: skip
    return padded, plain


def test_rows_that_fill_up_a_batch_have_no_part_in_scores():
    task = Remembered(model=None)
    padded, plain = held_out((4, 2, 1))
    candidates = np.zeros((5, 3), np.int32), np.zeros(5), np.zeros(5)
    scorer = scoring.Scorer(task.hits, {}, padded, chunk=2)
    found = scorer(*candidates)
    hits = sum(int(task.hits({}, *batch, 0, 0, 0)) for batch in plain)
    assert found == pytest.approx([100 * hits / 7] * 5) and 0 < hits < 7
    assert scorer.traces == 1 and scorer.scored == 5


def test_a_large_split_is_read_anew_and_scores_alike():
    data = {"name": "held_out", "options": {"every": 300, "inner": {"image_size": 8}}}
    kept = scoring.HeldOut(data, "minival", 3)
    anew = scoring.HeldOut(data, "minival", 3, keep=0)
    assert kept.rows == 4 and [float(b[2].sum()) for b in kept] == [3, 1]
    for _ in range(2):
        for a, b in zip(kept, anew, strict=True):
            np.testing.assert_array_equal(a[0], b[0])
    assert len(list(scoring.HeldOut(data, "minival"))) == 1


GENOMES = vitas_space.Space(
    (4, 8), (1, 2, 3), 20, 90, 24, 3, 4, percent=(0.2, 0.4, 0.6, 0.8, 1.0), image_size=16
)
BAND = genome_search.Options(20_000, 60_000, population=10, generations=4, tries=200)


def accuracy_of(genomes):
    _, ops, dim, _, mlp = GENOMES.split(genomes)
    return 40.0 + 5 * dim + (ops == 2).sum(1) + 0.5 * mlp.sum(1)


def test_the_genome_search_stays_in_its_band_resumes_and_improves(tmp_path):
    calls = []

    def score(genomes):
        flops = GENOMES.flops(genomes)
        assert ((flops >= 20_000) & (flops <= 60_000)).all()
        assert (GENOMES.shift(genomes) == genomes).all()
        calls.append(len(genomes))
        return accuracy_of(genomes)

    search = genome_search.problem(GENOMES, BAND, score)
    whole = genome_search.run(search, GENOMES, BAND, 3)
    assert sum(calls) == genome_search.measured(GENOMES, BAND, whole)
    path = tmp_path / "search.json"
    state = genome_search.init(search, GENOMES, BAND, 3)
    genome_search.save(path, genome_search.step(search, BAND, state))
    again = genome_search.run(search, GENOMES, BAND, 3, path)
    assert (again.genes == whole.genes).all() and list(again.scores) == list(whole.scores)
    first = genome_search.init(search, GENOMES, BAND, 3)
    assert nsga2.best(whole)[1][0, 0] < nsga2.best(first)[1][0, 0]
    genome, value = genome_search.random_search(GENOMES, BAND, accuracy_of, 0, 30)
    assert value == accuracy_of(genome[None])[0]


def test_a_band_out_of_reach_is_refused_before_any_draw():
    far = genome_search.Options(1e9, 2e9)
    with pytest.raises(ValueError, match="no network has between 1,000,000,000"):
        genome_search.random_genomes(GENOMES, far, np.random.default_rng(0), 3)
