"""LAD and the other baselines: conventions, shortcuts, and what each of them can see."""

import networkx
import numpy as np
import pytest
import scipy.sparse

from jaxmodels.graphs import change_baselines, laplacian_change
from jaxmodels.graphs.laplacian_change import (
    compact,
    context_distances,
    directed_laplacian,
    lad,
    lad_scores,
    singular_values,
    walk_kind,
)


def ring(n, weight=1.0):
    graph = np.zeros((n, n))
    graph[np.arange(n), (np.arange(n) + 1) % n] = weight
    return graph


def strong(n=7, seed=0):
    rng = np.random.default_rng(seed)
    return ring(n) + (rng.random((n, n)) < 0.3) * rng.integers(1, 5, (n, n))


def dangling(n=7):
    graph = strong(n)
    graph[3] = 0
    return graph


@pytest.mark.parametrize(
    "graph,kind",
    [
        (strong(), "plain"),
        (ring(6), "lazy"),
        (dangling(), "pagerank"),
        (np.zeros((4, 4)), "pagerank"),
    ],
)  # fmt: skip
def test_directed_laplacians_are_networkxs_for_each_of_its_walks(graph, kind):
    assert walk_kind(graph) == kind
    walk = {"plain": "random", "lazy": "lazy", "pagerank": "pagerank"}[kind]
    made = networkx.from_numpy_array(graph, create_using=networkx.DiGraph)
    want = networkx.directed_laplacian_matrix(made, walk_type=walk, alpha=0.95)
    np.testing.assert_allclose(directed_laplacian(graph), want, atol=1e-7)


@pytest.mark.parametrize("graph", [strong(), ring(6), dangling(), np.zeros((0, 0))])
@pytest.mark.parametrize("isolated", [1, 2, 9])
def test_isolated_nodes_beside_a_directed_graph_need_no_rows_of_their_own(graph, isolated):
    padded = np.pad(graph, (0, isolated))
    want = np.sort(np.abs(np.linalg.eigvalsh(directed_laplacian(padded))))
    got = singular_values([(graph, isolated)], len(padded), directed=True)[0]
    np.testing.assert_allclose(got, want, atol=1e-9)


def test_undirected_laplacians_are_networkxs_with_isolated_nodes_as_zeros():
    graph = np.triu(strong(), 1)
    graph = np.pad(graph + graph.T, (0, 3))
    laplacian = networkx.laplacian_matrix(networkx.from_numpy_array(graph)).toarray()
    want = np.sort(np.linalg.svd(laplacian, compute_uv=False))[-6:]
    np.testing.assert_allclose(singular_values([compact(graph)], 6)[0], want, atol=1e-9)
    again = lad([scipy.sparse.csr_matrix(graph)] * 4, short=1, long=2)
    np.testing.assert_allclose(again.scores, 0, atol=1e-12)


def test_a_repeated_edge_keeps_its_last_weight_whichever_way_it_stands():
    edges = np.array([[0, 1, 2, 5], [0, 2, 3, 1], [0, 2, 1, 7], [1, 1, 3, 2]])
    (first, isolated), _ = laplacian_change.edges_to_adjacency(
        edges, 2, directed=False, max_nodes=6
    )
    np.testing.assert_array_equal(first, [[0, 7, 0], [7, 0, 1], [0, 1, 0]])
    assert isolated == 3
    (first, _), _ = laplacian_change.edges_to_adjacency(edges, 2, directed=True, max_nodes=6)
    np.testing.assert_array_equal(first, [[0, 5, 0], [7, 0, 1], [0, 0, 0]])


def test_scores_are_zero_before_the_initial_window_and_their_first_difference_is_the_value():
    signatures = laplacian_change.normalized(np.random.default_rng(0).random((12, 5)))
    plain = lad_scores(signatures, short=2, long=4, initial=6, difference=False)
    scores = lad_scores(signatures, short=2, long=4, initial=6)
    assert (plain.scores[:6] == 0).all() and plain.short[6] == scores.short[6] > 0
    np.testing.assert_allclose(scores.short, np.diff(plain.short, prepend=0))
    np.testing.assert_array_equal(scores.scores, np.maximum(scores.short, scores.long))
    assert scores.scores.min() < 0


def shuffled_blocks(seed=0, change=12, length=24, n=24):
    """Two blocks; at `change` half of the nodes swap sides: the spectra stay."""
    rng = np.random.default_rng(seed)
    out = []
    for t in range(length):
        side = np.arange(n) < n // 2 if t < change else np.arange(n) % 2 == 0
        upper = np.triu(rng.random((n, n)) < np.where(side[:, None] == side, 0.9, 0.05), 1)
        out.append(upper | upper.T)
    return np.stack(out).astype(np.float32)


@pytest.mark.parametrize("name", ["deltacon", "spotlight", "edge_monitoring"])
def test_baselines_that_know_nodes_see_a_relabelling(name):
    assert change_baselines.BASELINES[name](shuffled_blocks()).argmax() == 12


@pytest.mark.parametrize("name", change_baselines.BASELINES)
def test_every_baseline_sees_a_graph_that_doubles_its_density(name):
    rng = np.random.default_rng(1)
    density = np.where(np.arange(30) < 18, 0.2, 0.6)
    upper = np.triu(rng.random((30, 20, 20)) < density[:, None, None], 1)
    graphs = (upper | np.swapaxes(upper, 1, 2)).astype(np.float32)
    if name == "tensor_splat":
        scores = change_baselines.tensor_splat(graphs, rank=3, neighbors=11)
    else:
        scores = change_baselines.BASELINES[name](graphs)
    assert scores.shape == (30,) and np.isfinite(scores).all()
    if name not in ("tensor_splat", "activity_vector"):  # these see shape, not size
        assert abs(int(scores.argmax()) - 18) <= 1


def test_tensor_splat_separates_the_two_regimes_in_its_time_factors():
    import jax

    graphs = shuffled_blocks()
    factors = np.asarray(
        change_baselines._cp_time_factors(graphs, jax.random.key(0), rank=2, sweeps=50)
    )
    unit = factors / np.linalg.norm(factors, axis=1, keepdims=True)
    assert (np.abs(unit[:12] @ unit[:12].T) > 0.95).all()
    assert (np.abs(unit[:12] @ unit[12:].T) < 0.9).all()


MISTAKES = {
    "a snapshot has 3 nodes, more than max_nodes = 2": lambda: laplacian_change.snapshot_adjacency(
        [0, 1], [1, 2], [1, 1], directed=True, max_nodes=2
    ),
    "num_eigen = 8 of 7 nodes": lambda: singular_values([(strong(), 0)], 8),
    "snapshot 0 is not symmetric but directed=False": lambda: singular_values([(strong(), 0)], 3),
    "edge times must be in 0..1": lambda: laplacian_change.edges_to_adjacency(
        np.array([[2, 0, 1, 1]]), 2, directed=True, max_nodes=3
    ),
    "a window of 5 must be at least 1 and at most": lambda: context_distances(
        np.ones((9, 2)), 5, 3
    ),
    "typical 'median'; known: principal, mean": lambda: context_distances(
        np.ones((9, 2)), 1, 3, typical="median"
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_gets_one_sentence(message):
    with pytest.raises(ValueError) as caught:
        MISTAKES[message]()
    assert message in str(caught.value)
