"""Samplers: sizes, balls, laws, and the host and the device drawing the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from jaxmodels.graphs import subgraph_samplers as others
from jaxmodels.graphs.graph import make_graph, symmetrize
from jaxmodels.graphs.guided_sampler import (
    adjacency,
    ball,
    induced_edges,
    induced_subgraph,
    sample_on_host,
    sample_subgraph,
)


def graph_of(n=120, mean_degree=5, seed=0, isolated=0):
    rng = np.random.default_rng(seed)
    edges = rng.integers(0, n - isolated, (2, int(n * mean_degree / 2)))
    both = symmetrize(edges)[0]
    return make_graph(both[:, both[0] != both[1]], n)


def distances(graph, seed):
    rows, n = adjacency(graph), graph.num_nodes
    out = np.full(n, 99)
    for k in range(20, -1, -1):
        out[ball(rows, seed, k)] = k
    return out


def connected(graph, nodes):
    edges = np.stack([graph.senders, graph.receivers])
    inside = edges[:, induced_edges(edges, nodes, graph.num_nodes)]
    reached = {int(nodes[0])}
    for _ in nodes:
        more = set(inside[1][np.isin(inside[0], list(reached))].tolist())
        if more <= reached:
            break
        reached |= more
    return reached == set(map(int, nodes))


def test_samples_are_exact_in_size_connected_inside_the_ball_and_without_repeats():
    graph = graph_of()
    rows, scores = adjacency(graph), np.random.default_rng(0).random(120)
    for seed in range(0, 120, 17):
        for hops, size in ((2, 12), (3, 30), (20, 60)):
            rng = np.random.default_rng(seed)
            nodes, steps = sample_on_host(rows, scores, seed, size, hops=hops, rng=rng)
            inside = ball(rows, seed, hops)
            assert len(nodes) == min(size, inside.sum()) and nodes[0] == seed
            assert len(set(nodes.tolist())) == len(nodes) and inside[nodes].all()
            assert 1 + steps.sum() == len(nodes) and connected(graph, nodes)
            again = sample_on_host(
                rows, scores, seed, size, hops=hops, rng=np.random.default_rng(seed)
            )
            np.testing.assert_array_equal(again[0], nodes)


def test_the_device_draws_what_the_host_draws_in_one_compilation_under_vmap():
    graph = graph_of(isolated=2)
    rows, rng = adjacency(graph), np.random.default_rng(0)
    scores = rng.random(120).astype(np.float32)
    gumbel = rng.gumbel(size=(40, 120)).astype(np.float32)

    traces = []

    @jax.jit
    @jax.vmap
    def draw(seed):
        traces.append(seed)
        return sample_subgraph(graph, scores, seed, 25, hops=3, gumbel=gumbel)

    seeds = np.array([0, 5, 63, 119])  # the last is isolated
    found = draw(seeds)
    draw(seeds[::-1].copy())
    assert len(traces) == 1
    for i, seed in enumerate(seeds):
        nodes, steps = sample_on_host(rows, scores, seed, 25, hops=3, gumbel=gumbel)
        assert int(found.count[i]) == len(nodes)
        np.testing.assert_array_equal(found.nodes[i][: len(nodes)], nodes)
        np.testing.assert_array_equal(found.steps[i][: len(steps)], steps)
        assert (found.nodes[i][len(nodes) :] == 120).all()
    assert int(found.count[3]) == 1


def test_keys_give_fresh_noise_and_the_same_key_the_same_sample():
    graph, scores = graph_of(), jnp.ones(120)
    draw = jax.jit(lambda key: sample_subgraph(graph, scores, 3, 20, hops=5, key=key).nodes)
    a, b, c = (np.asarray(draw(jax.random.key(k))) for k in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_induced_subgraphs_hold_every_edge_and_stay_sorted():
    graph = graph_of()

    @functools.partial(jax.jit, static_argnums=0)
    def run(pad):
        key = jax.random.key(0)
        sample = sample_subgraph(graph, jnp.ones(120), 3, 40, hops=6, key=key, ratio=0.3)
        return induced_subgraph(graph, sample, pad)

    induced, nodes, count = run(256)
    edges = np.stack([graph.senders, graph.receivers])
    kept = np.asarray(nodes[nodes < 120])
    want = edges[:, induced_edges(edges, kept, 120)]
    assert int(count) == want.shape[1] <= 256 and (np.diff(kept) > 0).all()
    real = np.asarray(induced.receivers) < 40
    got = np.asarray(nodes)[np.stack([induced.senders, induced.receivers])[:, real]]
    assert {tuple(e) for e in got.T} == {tuple(e) for e in want.T}
    assert (np.diff(np.asarray(induced.receivers)) >= 0).all()
    induced, nodes, count = run(16)
    assert int(count) == want.shape[1]  # more than fit: the caller can tell
    fewer = np.asarray(nodes[nodes < 120])
    assert 3 in fewer and set(fewer) < set(kept)
    want = edges[:, induced_edges(edges, fewer, 120)]
    assert 1 <= want.shape[1] <= 16
    real = np.asarray(induced.receivers) < 40
    got = np.asarray(nodes)[np.stack([induced.senders, induced.receivers])[:, real]]
    assert {tuple(e) for e in got.T} == {tuple(e) for e in want.T}


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_first_picks_follow_the_law_of_the_scores(beta):
    """A star's frontier is its leaves: one pick each, uniform (beta 0) or as the scores (1)."""
    leaves = 8
    edges = symmetrize(np.stack([np.zeros(leaves, int), 1 + np.arange(leaves)]))[0]
    graph = make_graph(edges, leaves + 1)
    scores = np.concatenate([[0.5], np.linspace(0.2, 1, leaves)]).astype(np.float32)
    draws = 5000
    law = scores[1:].astype(float) ** beta
    one = lambda key: sample_subgraph(  # noqa: E731
        graph, scores, 0, 2, hops=1, beta=beta, key=key
    ).nodes[1]
    device = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), draws))
    rows, rng = adjacency(graph), np.random.default_rng(0)
    host = [
        sample_on_host(rows, scores, 0, 2, hops=1, beta=beta, rng=rng)[0][1] for _ in range(draws)
    ]
    for picks in (np.asarray(device), np.array(host)):
        counts = np.bincount(picks - 1, minlength=leaves)
        assert chisquare(counts, law / law.sum() * draws).pvalue > 0.001


def test_ratio_one_is_breadth_first_and_a_negative_beta_prefers_smooth_nodes():
    graph = graph_of()
    rows, scores = adjacency(graph), np.random.default_rng(0).random(120)
    far = distances(graph, 7)
    nodes, _ = sample_on_host(rows, scores, 7, 50, hops=20, ratio=1.0, rng=np.random.default_rng(0))
    assert (np.diff(far[nodes]) >= 0).all()
    mean = {}
    for beta in (-2.0, 2.0):
        drawn = [
            sample_on_host(rows, scores, s, 12, hops=20, beta=beta, rng=np.random.default_rng(s))[0]
            for s in np.flatnonzero(np.diff(rows.indptr))[:60]
        ]
        mean[beta] = np.mean([scores[d[1:]].mean() for d in drawn])
    assert mean[-2.0] + 0.1 < scores.mean() < mean[2.0] - 0.1


def test_restart_fills_the_size_from_other_places_on_host_and_device():
    triangles = np.arange(30).reshape(10, 3)
    edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]]).T
    graph = make_graph(symmetrize(edges)[0], 30)
    rows, scores = adjacency(graph), np.ones(30, np.float32)
    may = np.arange(30) < 15
    nodes, _ = sample_on_host(
        rows, scores, 0, 10, hops=1, rng=np.random.default_rng(0), restart=may
    )
    assert len(nodes) == 10 and set(nodes[:3]) == {0, 1, 2} and (nodes < 15).all()
    draw = jax.jit(lambda key: sample_subgraph(graph, scores, 0, 10, hops=1, key=key, restart=may))
    found = [draw(jax.random.key(k)) for k in range(3)]
    for sample in found:
        got = np.asarray(sample.nodes)
        assert int(sample.count) == 10 and len(set(got)) == 10 and (got < 15).all()
    assert any((found[0].nodes != f.nodes).any() for f in found[1:])
    all_of_them = jax.jit(
        lambda: (
            sample_subgraph(graph, scores, 0, 20, hops=1, key=jax.random.key(0), restart=may).count
        )
    )
    assert int(all_of_them()) == 15  # nothing left to begin again from


def test_saint_walks_and_nodes_stay_on_the_graph_and_favor_well_connected_nodes():
    graph = graph_of(isolated=3)
    rows, rng = adjacency(graph), np.random.default_rng(0)
    degree = np.diff(rows.indptr)
    for draw in (
        lambda rng: others.saint_nodes(rows, 40, rng),
        lambda rng: others.saint_walks(rows, 40, 3, rng),
        lambda rng: others.saint_edges(others.edge_probabilities(rows), 40, rng),
    ):
        p = others.inclusion_frequencies(draw, 120, 400, rng)
        drawn = draw(rng)
        assert len(drawn) <= 40 and len(set(drawn.tolist())) == len(drawn)
        assert np.corrcoef(p[:117], degree[:117])[0, 1] > 0.5
    walk = others.saint_walks(rows, 3, 2, np.random.default_rng(1), roots=np.array([119]))
    assert walk.tolist() == [119]
    u, v, p = others.edge_probabilities(rows)
    want = 1 / degree[u] + 1 / degree[v]
    np.testing.assert_allclose(p, want / want.sum())


def test_losses_over_inclusion_frequencies_estimate_the_mean_over_all_nodes():
    graph = graph_of()
    rows, rng = adjacency(graph), np.random.default_rng(0)
    value = np.diff(rows.indptr).astype(float)
    draw = lambda rng: others.saint_nodes(rows, 40, rng)  # noqa: E731
    p = others.inclusion_frequencies(draw, 120, 3000, rng)
    estimates = []
    for _ in range(1500):
        nodes = draw(rng)
        estimates.append((value[nodes] / p[nodes]).sum() / 120)
    plain = np.mean([value[draw(rng)].mean() for _ in range(300)])
    assert abs(np.mean(estimates) - value.mean()) < 0.05 * value.mean() < plain - value.mean()


def test_neighbor_sampling_draws_distinct_neighbors_up_to_the_fanout():
    graph = graph_of()
    rows, targets = adjacency(graph), np.array([4, 9, 50])
    everything = {(int(s), int(r)) for s, r in zip(graph.senders, graph.receivers)}
    nodes, edges = others.sample_neighbors(rows, targets, (2, 3), np.random.default_rng(0))
    pairs = [tuple(map(int, e)) for e in edges.T]
    assert len(set(pairs)) == len(pairs) and set(pairs) <= everything
    incoming = np.bincount(edges[1], minlength=120)
    degree = np.diff(rows.indptr)
    np.testing.assert_array_equal(incoming[targets], np.minimum(degree[targets], 2))
    first = np.setdiff1d(edges[0][np.isin(edges[1], targets)], targets)
    np.testing.assert_array_equal(incoming[first], np.minimum(degree[first], 3))
    np.testing.assert_array_equal(np.sort(nodes), np.unique([*targets, *edges.ravel()]))
    _, whole = others.sample_neighbors(rows, targets, (-1,), np.random.default_rng(0))
    assert whole.shape[1] == degree[targets].sum()


def test_partitions_are_even_and_cut_fewer_edges_than_chance():
    rng, blocks = np.random.default_rng(0), 8
    n = 400
    inside = np.stack([rng.integers(0, n, 2400), np.zeros(2400, int)])
    size = n // blocks
    inside[1] = inside[0] // size * size + rng.integers(0, size, 2400)
    edges = np.concatenate([inside, rng.integers(0, n, (2, 200))], axis=1)
    both = symmetrize(edges)[0]
    graph = make_graph(both[:, both[0] != both[1]], n)
    part = others.partition(adjacency(graph), blocks, rng)
    counts = np.bincount(part, minlength=blocks)
    assert counts.sum() == n and counts.max() <= np.ceil(1.1 * n / blocks) and counts.min() > 0
    cut = (part[graph.senders] != part[graph.receivers]).mean()
    assert cut < 0.4 < 1 - 1 / blocks
    with pytest.raises(ValueError, match=r"parts must be in \[1, 400\], got 401"):
        others.partition(adjacency(graph), 401, rng)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(size=0, hops=1), r"size must be in \[1, 120\] \(the graph's nodes\), got 0"),
        (dict(size=121, hops=1), r"size must be in \[1, 120\]"),
        (dict(size=5, hops=0), r"hops must be at least 1, got 0"),
        (dict(size=5, hops=1, ratio=0.0), r"ratio must be in \(0, 1\], got 0.0"),
        (dict(size=5, hops=1, ratio=1.5), r"ratio must be in \(0, 1\]"),
    ],
)
def test_sampling_that_cannot_be_meant_is_refused_on_host_and_device(arguments, message):
    graph, size = graph_of(), arguments.pop("size")
    with pytest.raises(ValueError, match=message):
        sample_on_host(
            adjacency(graph), np.ones(120), 0, size, rng=np.random.default_rng(0), **arguments
        )
    with pytest.raises(ValueError, match=message):
        sample_subgraph(graph, np.ones(120), 0, size, key=jax.random.key(0), **arguments)
