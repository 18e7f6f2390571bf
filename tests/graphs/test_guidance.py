"""The metrics: identities, invariances, closed forms, and no look at test labels."""

import jax
import numpy as np
import pytest

from jaxmodels.graphs.graph import symmetrize
from jaxmodels.graphs.guidance import (
    connection_failure_distance,
    feature_smoothness,
    label_smoothness,
    node_scores,
    subgraph_size,
    undirected,
)


def random_graph(n, mean_degree, seed, loops=0):
    rng = np.random.default_rng(seed)
    edges = rng.integers(0, n, (2, int(n * mean_degree / 2)))
    edges = edges[:, edges[0] != edges[1]]
    own = np.tile(np.arange(loops), (2, 1))
    return np.concatenate([edges, own], axis=1)


def cycle(n):
    return np.stack([np.arange(n), (np.arange(n) + 1) % n])


def test_scores_weighted_by_degree_sum_to_the_feature_smoothness():
    edges = random_graph(60, 5, 0, loops=3)
    x = np.random.default_rng(1).normal(size=(60, 7)).astype(np.float32)
    graph = undirected(edges, 60)
    degree = np.bincount(np.asarray(graph.graph.receivers), minlength=60)
    total = float((degree * node_scores(graph, x)).sum() / graph.num_edges)
    assert total == pytest.approx(float(feature_smoothness(graph, x)), rel=1e-5)


def test_double_precision_agrees_with_the_sum_over_edges_to_twelve_digits():
    with jax.enable_x64(True):
        edges = random_graph(50, 6, 0, loops=2)
        x = np.random.default_rng(1).normal(size=(50, 4)) * 3 + 100
        graph = undirected(edges, 50)
        s, r = symmetrize(edges)[0]
        lone = (s <= r).sum()
        scaled = (x - x.min(0)) / np.ptp(x, axis=0)
        each = np.square(scaled[s] - scaled[r]).sum(1)
        assert float(feature_smoothness(graph, x)) == pytest.approx(
            each.sum() / (lone * 4), rel=1e-12
        )
        between = s != r
        degree = np.maximum(np.bincount(r[between], minlength=50), 1)
        scores = np.bincount(r, each, minlength=50) / (degree * 4)
        np.testing.assert_allclose(node_scores(graph, x), scores, rtol=1e-11, atol=1e-13)


def test_feature_smoothness_ignores_numbering_offsets_and_scales_of_columns():
    edges, rng = random_graph(40, 5, 0, loops=2), np.random.default_rng(1)
    x = rng.normal(size=(40, 3)).astype(np.float32)
    order = rng.permutation(40)
    place = np.argsort(order)
    for variant in ("edge", "formula"):
        want = float(feature_smoothness(undirected(edges, 40), x, variant=variant))
        renumbered = undirected(place[edges], 40)
        others = [
            feature_smoothness(renumbered, x[order], variant=variant),
            feature_smoothness(undirected(edges, 40), x + np.array([5, -3, 0]), variant=variant),
            feature_smoothness(undirected(edges, 40), x * np.array([4, 0.1, 1]), variant=variant),
            feature_smoothness(undirected(edges[::-1], 40), x, variant=variant),
            feature_smoothness(undirected(np.tile(edges, 2), 40, tables=True), x, variant=variant),
        ]
        for other in others:
            assert float(other) == pytest.approx(want, rel=1e-4)
    constant = np.concatenate([x, np.full((40, 1), 9, np.float32)], axis=1)
    more = float(feature_smoothness(undirected(edges, 40), constant))
    assert more * 4 == pytest.approx(float(feature_smoothness(undirected(edges, 40), x)) * 3)


def test_label_smoothness_runs_from_nothing_to_two():
    graph = undirected(cycle(8), 8)
    assert label_smoothness(graph, np.zeros(8)) == 0
    assert label_smoothness(graph, np.arange(8) % 2) == 2


def test_connections_fail_at_once_on_a_complete_bipartite_graph():
    left, right = np.meshgrid(np.arange(6), 6 + np.arange(9))
    graph = undirected(np.stack([left.ravel(), right.ravel()]), 15)
    found = connection_failure_distance(graph, labels=(np.arange(15) >= 6).astype(int))
    assert found.distance == 1 and found.curve[0] == 0 and found.curve[1] == 1
    assert np.isnan(found.curve[2]) and found.pairs[2] == 0


def test_on_a_cycle_of_blocks_the_curve_and_the_distance_have_their_closed_forms():
    distances = []
    for length in (4, 8, 16):
        n = 64
        found = connection_failure_distance(
            undirected(cycle(n), n), labels=np.arange(n) // length, k_max=20
        )
        k = np.arange(1, length + 1)
        np.testing.assert_allclose(found.curve[:length], 1 - k / length, atol=1e-12)
        assert found.base == pytest.approx((length - 1) / (n - 1))
        want = next(k for k in range(1, 65) if 1 - k / length <= found.base)
        assert found.distance == want
        assert (found.standard_error == 0).all() and found.num_sources == n
        distances.append(found.distance)
    assert distances == sorted(set(distances))


def test_random_labels_fail_at_the_first_hop_in_ten_of_ten_seeds():
    for seed in range(10):
        graph = undirected(random_graph(500, 6, seed), 500)
        labels = np.random.default_rng(100 + seed).integers(0, 4, 500)
        assert connection_failure_distance(graph, labels=labels, tau=0.05).distance == 1


def test_never_failing_connections_give_one_more_than_the_last_hop():
    graph = undirected(cycle(64), 64)
    found = connection_failure_distance(graph, labels=np.arange(64) // 32, k_max=3)
    assert found.distance == 4


def test_labels_of_validation_and_test_nodes_are_never_read():
    rng = np.random.default_rng(0)
    graph = undirected(random_graph(80, 5, 0), 80)
    labels, mask = rng.integers(0, 3, 80), rng.random(80) < 0.5
    want = connection_failure_distance(graph, labels=labels, mask=mask)
    sets = (rng.random((80, 4)) < 0.4).astype(float)
    wanted_sets = connection_failure_distance(graph, labels=sets, mask=mask)
    other = np.where(mask, labels, -7)
    changed = np.where(mask[:, None], sets, 1 - sets)
    for got, expected in (
        (connection_failure_distance(graph, labels=other, mask=mask), want),
        (connection_failure_distance(graph, labels=changed, mask=mask), wanted_sets),
    ):
        assert got.distance == expected.distance and got.base == expected.base
        np.testing.assert_array_equal(got.curve, expected.curve)


def test_jaccard_and_cosine_curves_equal_their_definitions():
    rng, n = np.random.default_rng(0), 40
    edges = random_graph(n, 4, 3)
    graph = undirected(edges, n)
    sets, x = rng.random((n, 5)) < 0.4, rng.normal(size=(n, 3))
    adjacent = np.zeros((n, n), bool)
    adjacent[edges[0], edges[1]] = adjacent[edges[1], edges[0]] = True
    distance = np.where(np.eye(n), 0, np.where(adjacent, 1, 99))
    for via in range(n):
        distance = np.minimum(distance, distance[:, [via]] + distance[[via]])
    union = (sets[:, None] | sets[None]).sum(-1)
    jaccard = (sets[:, None] & sets[None]).sum(-1) / np.maximum(union, 1)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for similarity, given in ((jaccard, {"labels": sets}), (unit @ unit.T, {"features": x})):
        found = connection_failure_distance(graph, **given, k_max=4)
        want = [similarity[distance == k].mean() for k in (1, 2, 3, 4)]
        np.testing.assert_allclose(found.curve, want, atol=1e-6)
        assert found.base == pytest.approx(similarity[~np.eye(n, dtype=bool)].mean(), abs=1e-6)


def test_drawn_sources_estimate_the_curve_within_their_standard_error():
    n = 1200
    graph = undirected(random_graph(n, 5, 0), n, tables=True)
    labels = np.arange(n) % 3
    whole = connection_failure_distance(graph, labels=labels, k_max=4)
    assert whole.num_sources == n
    scores = []
    for seed in range(6):
        part = connection_failure_distance(
            graph, labels=labels, k_max=4, num_sources=200, seed=seed
        )
        assert part.num_sources == 200 and part.base == whole.base
        assert (part.standard_error > 0).all()
        scores.append((part.curve - whole.curve) / part.standard_error)
    scores = np.array(scores)
    assert np.abs(scores).max() < 4 and 0.4 < np.sqrt(np.square(scores).mean()) < 1.7
    again = connection_failure_distance(graph, labels=labels, k_max=4, num_sources=200, seed=5)
    np.testing.assert_array_equal(again.curve, part.curve)


def test_above_five_thousand_nodes_512_sources_are_drawn_unless_more_are_asked_for():
    graph = undirected(cycle(5001), 5001)
    found = connection_failure_distance(graph, labels=np.arange(5001) // 100, k_max=2)
    assert found.num_sources == 512 and found.standard_error[0] > 0
    size = subgraph_size(graph, 3)
    assert len(size.ball_sizes) == 512 and size.hop_cap == 2 and size.size == 64


def test_the_size_is_the_mean_ball_and_stays_within_limits_and_graph():
    graph = undirected(cycle(50), 50)
    assert subgraph_size(graph, 4, limits=None)[:2] == (3, 7)
    assert subgraph_size(graph, 1, limits=None)[:2] == (1, 3)
    assert subgraph_size(graph, 4).size == 50  # 64 at least, but no more than there is
    assert (subgraph_size(graph, 9, limits=(2, 6)).ball_sizes == 17).all()
    assert subgraph_size(graph, 9, limits=(2, 6)).size == 6
    apart = undirected(cycle(50), 80)  # thirty nodes that have no edges yet
    assert subgraph_size(apart, 4, limits=None, mask=np.arange(80) < 50).size == 7
    assert subgraph_size(apart, 4, limits=None).size == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: node_scores(g, np.array([[0.0], [np.nan], [1]])), r"node 1, column 0 is nan"),
        (lambda g: node_scores(g, np.ones((4, 2))), r"features must be \[3, d\], got shape"),
        (lambda g: feature_smoothness(g, np.ones((3, 1)), variant="x"), r"known: edge, formula"),
        (lambda g: connection_failure_distance(g), r"either labels or features"),
        (
            lambda g: connection_failure_distance(g, labels=np.array([0, -1, 1])),
            r"node 1 is in the mask and has label -1",
        ),
        (
            lambda g: connection_failure_distance(g, labels=np.zeros(3), mask=[1, 0, 0]),
            r"at least two nodes, the mask has 1",
        ),
        (lambda g: undirected(np.array([[0, 3], [1, 1]]), 3), r"3 is outside \[0, 3\)"),
    ],
)
def test_inputs_that_cannot_be_measured_are_named(call, message):
    graph = undirected(np.array([[0, 1], [1, 2]]), 3)
    with pytest.raises(ValueError, match=message) as caught:
        call(graph)
    assert "\n" not in str(caught.value)
    empty = undirected(np.zeros((2, 0)), 3)
    assert (np.asarray(node_scores(empty, np.ones((3, 2)))) == 0).all()
    with pytest.raises(ValueError, match="at least one edge"):
        feature_smoothness(empty, np.ones((3, 2)))
    with pytest.raises(ValueError, match="at least one edge"):
        label_smoothness(empty, np.ones(3))
