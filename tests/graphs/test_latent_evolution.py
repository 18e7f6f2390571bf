"""Latent evolution: the factorization, the scores, and what a detection may depend on."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmodels
from jaxmodels.graphs import change_detection, change_scores, latent_evolution
from jaxmodels.graphs.change_detection import Options, align_nodes, detect
from jaxmodels.graphs.latent_evolution import EdgeWindow, Factors, fit, fit_adam, predict, sweep

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "graph_cpd"
SWEEPS = ("sweep_undirected", "sweep_directed_weighted_reg")


def golden(case):
    meta = json.loads((GOLDEN / case / "meta.json").read_text())
    return meta["config"], np.load(GOLDEN / case / "io.npz")


def problem(seed, w=4, n=12, k=3, density=0.3, weighted=True, directed=True):
    """A window [w, n, n] and positive factors."""
    rng = np.random.default_rng(seed)
    graphs = (rng.random((w, n, n)) < density) * (rng.gamma(2.0, 1.0, (w, n, n)) if weighted else 1)
    if not directed:
        graphs = np.triu(graphs, 1) + np.swapaxes(np.triu(graphs, 1), 1, 2)
    u = np.repeat(rng.uniform(0.3, 1.0, (1, n, k)), w, axis=0)
    b = np.eye(k) + 0.1 * rng.random((k, k))
    a = np.eye(k) + 0.01 * rng.random((k, k))
    return graphs.astype(np.float32), Factors(*(jnp.asarray(x, jnp.float32) for x in (u, b, a)))


@pytest.mark.parametrize("case", SWEEPS)
def test_sweeps_match_the_reference_to_rounding_in_double_precision(case):
    config, io = golden(case)
    with jax.enable_x64(True):
        factors = latent_evolution.import_factors({x: io[f"in.{x}0"] for x in "UBA"})
        options = {
            "lam": config["lam"],
            "gamma": config["gamma"],
            "mask": io["in.Y"] if config["masked"] else None,
            "affinity": io["in.W"] if config["lam"] else None,
        }
        one = sweep(io["in.G"], factors, directed=config["directed"], **options)
        found = fit(io["in.G"], factors, iters=config["iters"], tol=0, **options)
        for x in "UBA":
            np.testing.assert_allclose(getattr(one, x), io[f"out.{x}_1"], rtol=1e-12, atol=1e-12)
            got = getattr(found.factors, x)
            np.testing.assert_allclose(got, io[f"out.{x}"], rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(found.objective, io["out.objective"], rtol=1e-12)
        np.testing.assert_allclose(predict(found.factors), io["out.prediction"], rtol=1e-11)


@pytest.mark.parametrize("lam,masked", [(0.0, False), (0.0, True), (0.05, True)])
def test_the_objective_never_rises(lam, masked):
    graphs, starts, masks, affinities = [], [], [], []
    for seed in range(7):
        window, start = problem(seed, weighted=seed % 2 == 0, directed=seed % 3 > 0)
        rng = np.random.default_rng(100 + seed)
        graphs.append(window)
        starts.append(start)
        masks.append((rng.random(window.shape) < 0.8).astype(np.float32))
        affinities.append(np.asarray(latent_evolution.default_affinity(window)))
    run = functools.partial(fit, iters=100, tol=0, lam=lam, gamma=0.5 + lam)

    def one(window, start, mask, affinity):
        return run(window, start, mask=mask if masked else None, affinity=affinity).objective

    batch = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    traces = np.asarray(
        jax.jit(jax.vmap(one))(np.stack(graphs), batch, np.stack(masks), np.stack(affinities))
    )
    assert (np.diff(traces, axis=1) <= 1e-6 * traces[:, :-1]).all()
    assert (traces[:, -1] < 0.95 * traces[:, 0]).all()


def test_a_noiseless_evolution_is_recovered_and_predicted():
    rng = np.random.default_rng(3)
    n, k, w = 30, 3, 5
    u = [rng.random((n, k)) * (rng.random((n, k)) < 0.6) + 0.02]
    a = np.eye(k) * 0.9 + 0.1 * rng.random((k, k))
    b = np.eye(k) + 0.3 * rng.random((k, k))
    for _ in range(w):
        u.append(u[-1] @ a)
    graphs = np.stack([x @ b @ x.T for x in u]).astype(np.float32)
    start = latent_evolution.initial_factors(
        jax.random.key(0), graphs[:w].mean(), window=w, num_nodes=n, rank=k
    )
    found = jax.jit(functools.partial(fit, iters=500, tol=0, gamma=0.1))(graphs[:w], start)
    model = jax.vmap(lambda x: x @ found.factors.B @ x.T)(found.factors.U)
    assert np.linalg.norm(model - graphs[:w]) < 0.02 * np.linalg.norm(graphs[:w])
    error = np.linalg.norm(predict(found.factors) - graphs[w])
    assert error < 0.05 * np.linalg.norm(graphs[w])


@pytest.mark.parametrize("case", SWEEPS)
def test_adam_on_softplus_parameters_reaches_the_same_objective(case):
    config, io = golden(case)
    start = Factors(*(jnp.asarray(io[f"in.{x}0"], jnp.float32) for x in "UBA"))
    options = {
        "lam": config["lam"],
        "gamma": config["gamma"],
        "mask": io["in.Y"] if config["masked"] else None,
        "affinity": io["in.W"] if config["lam"] else None,
    }
    mine = jax.jit(lambda: fit(io["in.G"], start, iters=10_000, tol=0, **options).objective[-1])()
    other = jax.jit(lambda: fit_adam(io["in.G"], start, **options).objective[-1])()
    np.testing.assert_allclose(mine, other, rtol=0.02)


def test_the_jacobi_order_is_another_path_to_a_like_value():
    window, start = problem(5)
    runs = [fit(window, start, iters=100, tol=0, order=o) for o in latent_evolution.ORDERS]
    values = [float(r.objective[-1]) for r in runs]
    assert values[0] != values[1] and abs(values[1] / values[0] - 1) < 0.05
    one = sweep(window, start, order="jacobi")
    # U_2 saw the old U_1.
    assert not np.allclose(one.U[1], sweep(window, start).U[1], rtol=1e-4)
    np.testing.assert_allclose(one.U[0], sweep(window, start).U[0], rtol=1e-6)


def test_an_early_stop_keeps_its_value_to_the_end_of_the_trace():
    window, start = problem(6)
    found = fit(window, start, iters=60, tol=1e-2)
    done = int(found.sweeps)
    assert 1 < done < 60
    trace = np.asarray(found.objective)
    assert (trace[done:] == trace[done]).all()
    drops = -np.diff(trace[: done + 1]) / trace[:done]
    assert drops[-1] < 1e-2 and (drops[:-1] >= 1e-2).all()


def edges_of(window, slots):
    parts = [np.nonzero(g) for g in window]
    pad = [(0, slots - len(u)) for u, _ in parts]
    return EdgeWindow(
        np.stack([np.pad(u, p) for (u, _), p in zip(parts, pad)]).astype(np.int32),
        np.stack([np.pad(v, p) for (_, v), p in zip(parts, pad)]).astype(np.int32),
        np.stack([np.pad(g[e], p) for g, e, p in zip(window, parts, pad)]),
    )


def test_edge_lists_give_what_matrices_give():
    window, start = problem(7)
    dense = fit(window, start, iters=20, tol=0)
    sparse = fit(edges_of(window, 96), start, iters=20, tol=0)
    for x, y in zip(dense.factors, sparse.factors):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dense.objective, sparse.objective, rtol=1e-4)


def test_nodes_may_be_renumbered_and_isolated_ones_stay_finite():
    window, start = problem(8)
    window[:, 4] = window[:, :, 4] = 0
    order = np.random.default_rng(0).permutation(window.shape[-1])
    found = fit(window, start, iters=30, tol=0)
    moved = fit(window[:, order][:, :, order], start._replace(U=start.U[:, order]), iters=30, tol=0)
    np.testing.assert_allclose(found.factors.U[:, order], moved.factors.U, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(found.factors.A, moved.factors.A, rtol=2e-4)
    for x in found.factors:
        assert np.isfinite(x).all() and (np.asarray(x) >= 0).all()


def test_factors_are_a_models_parameters_and_come_and_go_by_name(tmp_path):
    _, start = problem(9)
    arrays = {x: np.asarray(getattr(start, x)) for x in "UBA"}
    name = "graphs.latent_evolution"
    module, variables = jaxmodels.load(name, arrays, num_nodes=12, window=4, rank=3)
    jaxmodels.save(tmp_path / "f.safetensors", name, module, variables)
    _, again = jaxmodels.load(name, tmp_path / "f.safetensors", num_nodes=12, window=4, rank=3)
    for x in "UBA":
        np.testing.assert_array_equal(again["params"][x], arrays[x])
    out = module.apply(variables, problem(9)[0])
    np.testing.assert_allclose(out["prediction"], predict(start), rtol=1e-6)


def stream(seed=0, length=14, n=12, change=9):
    """Two blocks whose members change at `change`; symmetric uint8 [T, n, n]."""
    rng = np.random.default_rng(seed)
    out = []
    for t in range(length):
        side = (np.arange(n) < n // 2) if t < change else (np.arange(n) % 2 == 0)
        p = np.where(side[:, None] == side[None], 0.9, 0.05)
        upper = np.triu(rng.random((n, n)) < p, 1)
        out.append(upper | upper.T)
    return np.stack(out).astype(np.uint8)


SMALL = Options(window=3, rank=2, iters=20, tol=0.0)


def test_a_change_is_found_and_only_the_past_matters():
    graphs = stream()
    found = detect(graphs, SMALL, directed=False)
    assert found.scores.argmax() == 9 and (found.scores[: SMALL.window + 1] == 0).all()
    assert found.objective.shape == (11, 21) and (found.sweeps == 20).all()
    altered = graphs.copy()
    altered[10:] = stream(seed=5)[10:]
    again = detect(altered, SMALL, directed=False)
    np.testing.assert_array_equal(found.scores[:10], again.scores[:10])
    assert not np.array_equal(found.scores[10:], again.scores[10:])


def test_sequences_of_any_length_share_one_compiled_function():
    detect(stream(), SMALL, directed=False, batch=4)
    before = change_detection._score_batch._cache_size()
    for length in (7, 9, 30):
        detect(stream(length=length, change=4), SMALL, directed=False, batch=4)
    assert change_detection._score_batch._cache_size() == before


def test_scores_do_not_depend_on_the_batch_or_on_the_form_of_the_graphs():
    graphs = stream()
    whole = detect(graphs, SMALL, directed=False, batch=11)
    parts = detect(graphs, SMALL, directed=False, batch=4)
    np.testing.assert_allclose(whole.scores, parts.scores, atol=1e-6)
    sparse = detect([scipy.sparse.csr_matrix(g) for g in graphs], SMALL, sparse=True)
    for x, y in zip(whole.frobenius, sparse.frobenius):
        np.testing.assert_allclose(x, y, atol=1e-5)
    np.testing.assert_allclose(whole.factors.B, sparse.factors.B, rtol=1e-4)


def test_a_warm_start_takes_the_factors_of_the_target_before():
    graphs = stream()
    warm = dataclasses.replace(SMALL, warm_start=True)
    cold = detect(graphs, SMALL, directed=False)
    found = detect(graphs, warm, directed=False, batch=11)
    parts = detect(graphs, warm, directed=False, batch=4)
    np.testing.assert_allclose(found.scores, parts.scores, atol=1e-6)
    np.testing.assert_allclose(found.factors.U, parts.factors.U, rtol=1e-4)
    # The first target starts cold; where the past explains the present, later ones start lower.
    assert found.objective[0, 0] == cold.objective[0, 0]
    assert (found.objective[1:6, 0] < 0.9 * cold.objective[1:6, 0]).all()


def test_empty_snapshots_are_far_from_everything_but_each_other():
    graphs = stream(length=16)
    graphs[5:12] = 0
    options = Options(window=3, rank=2, iters=20, tol=0.0, scorer="both")
    found = detect(graphs, options, directed=False)
    for distances in (found.frobenius, found.spectral):
        for series in distances:
            assert np.isfinite(series).all()
            assert series[5] == series[6] == 1 and series[8] == series[11] == 0
            assert series[12] == 1
    assert found.scores[6] == 0 and found.scores[12] == 1


def test_masked_entries_do_not_matter():
    graphs = stream().astype(np.float32)
    mask = np.ones_like(graphs)
    mask[:9, 2, :4] = mask[:9, :4, 2] = 0
    spoiled = np.where(mask == 1, graphs, 7.0).astype(np.float32)
    found = [detect(g, SMALL, mask=mask, directed=False) for g in (graphs, spoiled)]
    np.testing.assert_array_equal(found[0].objective, found[1].objective)
    np.testing.assert_array_equal(found[0].scores, found[1].scores)
    whole = detect(graphs, SMALL, mask=np.ones_like(graphs), directed=False)
    np.testing.assert_allclose(
        whole.scores, detect(graphs.astype(np.uint8), SMALL, directed=False).scores, atol=1e-5
    )


def test_snapshots_with_nodes_of_their_own_are_aligned():
    a, b = np.array([[0, 1], [2, 0]]), np.array([[0, 3, 0], [0, 0, 4], [5, 0, 0]])
    aligned, names = align_nodes([a, b], [["x", "z"], ["z", "y", "x"]])
    assert names == ["x", "y", "z"]
    np.testing.assert_array_equal(aligned[0], [[0, 0, 1], [0, 0, 0], [2, 0, 0]])
    np.testing.assert_array_equal(aligned[1], [[0, 0, 5], [4, 0, 0], [0, 3, 0]])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=30),
    st.data(),
)
def test_hits_count_events_in_a_ranking_that_breaks_ties_by_time(values, data):
    scores = np.array(values, float)
    events = data.draw(st.sets(st.integers(0, len(values) - 1), min_size=1))
    n = data.draw(st.integers(1, len(values)))
    found = change_scores.hits_at(scores, events, n)
    ranking = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert found.top.tolist() == ranking[:n]
    assert found.hits == len(set(ranking[:n]) & events) / len(events)
    assert found.precision == len(set(ranking[:n]) & events) / n
    assert found.ranks == {e: ranking.index(e) + 1 for e in events}


def test_thresholds_know_the_past_only():
    scores = np.array([0, 0, 0, 1, 2, 1, 2, 1, 9, 1, 1.0])
    found = change_scores.causal_threshold(scores, 2, least=5)
    assert np.isinf(found[:8]).all()
    assert found[8] == scores[3:8].mean() + 3 * scores[3:8].std()
    assert change_scores.alarms(scores, found).tolist() == [8]


def detect_with(**changes):
    return lambda: detect(stream(), Options(**{"window": 3, "rank": 2, **changes}))


def spoiled(value, at=(2, 1, 3)):
    graphs = stream().astype(np.float32)
    graphs[at] = value
    return graphs


W = np.ones((12, 12))
MISTAKES = {
    "snapshot 2 has weight -1.0 at [1, 3]": lambda: detect(spoiled(-1), SMALL),
    "snapshot 2 has weight nan at [1, 3]": lambda: detect(spoiled(np.nan), SMALL),
    "(2, 2), (3, 3); align_nodes": lambda: detect([np.ones((2, 2)), np.ones((3, 3))], SMALL),
    "need at least w+1 snapshots: 3 given": lambda: detect(stream()[:3], SMALL),
    "rank k = 13 must be between 1 and": detect_with(rank=13),
    "rank k = 0 must be between 1 and": detect_with(rank=0),
    "alpha = 1.5 must be in [0, 1]": detect_with(alpha=1.5),
    "gamma = -1 must be a finite number >= 0": detect_with(gamma=-1),
    "lam = -0.1 must be a finite number >= 0": detect_with(lam=-0.1),
    "scorer 'spektral'; known: frobenius": detect_with(scorer="spektral"),
    "order 'gauss'; known: gauss_seidel": detect_with(order="gauss"),
    "window w = 0 must be at least 1": detect_with(window=0),
    "multiplicative updates cannot leave zero": lambda: latent_evolution.import_factors(
        {"U": np.zeros((3, 4, 2)), "B": np.ones((2, 2)), "A": np.ones((2, 2))}
    ),
    "missing ['A']": lambda: latent_evolution.import_factors({"U": W, "B": W}),
    "wanted [w, n, k], [k, k], [k, k]": lambda: latent_evolution.import_factors(
        {"U": W, "B": W, "A": W}
    ),
    "initial U has shape (2, 12, 2); wanted [11, n, 2]": lambda: detect(
        stream(), SMALL, initial=(np.ones((2, 12, 2)), np.ones((2, 2)), np.ones((2, 2)))
    ),
    "mask must hold 0 and 1 only, not 0.5": lambda: detect(
        stream(), SMALL, mask=np.full((14, 12, 12), 0.5)
    ),
    "mask has shape (12, 12), the snapshots": lambda: detect(stream(), SMALL, mask=W),
    "affinity W must be symmetric": lambda: detect(
        stream(), Options(window=3, rank=2, lam=0.1), affinity=np.triu(W)
    ),
    "lam > 0 with a mask needs its affinity": lambda: detect(
        stream(), Options(window=3, rank=2, lam=0.1), mask=np.ones((14, 12, 12))
    ),
    "Hits@n needs at least one event": lambda: change_scores.hits_at(np.ones(4), []),
    "event index 4 is outside the 4 snapshots": lambda: change_scores.hits_at(np.ones(4), [4]),
    "n must be in 1..4": lambda: change_scores.hits_at(np.ones(4), [1], 5),
    "snapshot 2 is not symmetric at [1, 3]": lambda: detect(spoiled(5), SMALL, directed=False),
    "snapshot 0 of shape (2, 3): one distinct label": lambda: align_nodes(
        [np.ones((2, 3))], [["a", "b"]]
    ),
    "a sparse run forms no n x n matrix": lambda: detect(
        stream(), SMALL, sparse=True, keep_predictions=True
    ),
    "U has shape (4, 12, 3), the window (4, 5, 5)": lambda: fit(np.ones((4, 5, 5)), problem(0)[1]),
    "initial factor A[0, 0] is": lambda: sweep(
        problem(0)[0], problem(0)[1]._replace(A=jnp.zeros((3, 3)))
    ),
    "snapshot 0 has weight -1.0 at edge 0": lambda: fit(
        EdgeWindow(*np.zeros((2, 4, 8), int), -np.ones((4, 8))), problem(0)[1]
    ),
    "gamma = -1.0 must be a finite number >= 0": lambda: fit(*problem(0)[:2], gamma=-1.0),
    "scorer 'both' with a mask: a spectrum is that of whole": lambda: detect(
        stream(), Options(window=3, rank=2, scorer="both"), mask=np.ones((14, 12, 12))
    ),
    "a mask needs a dense window": lambda: fit(
        edges_of(problem(0)[0], 96), problem(0)[1], mask=np.ones((4, 12, 12))
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_gets_one_sentence(message):
    with pytest.raises(ValueError) as caught:
        MISTAKES[message]()
    assert message in str(caught.value) and "\n" not in str(caught.value)
