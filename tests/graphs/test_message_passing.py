"""Aggregation equals dense references, whatever the layout, the padding and the devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxmodels.graphs import message_passing as mp
from jaxmodels.graphs.gnn import GNN, KINDS
from jaxmodels.graphs.graph import (
    bucket_size,
    disjoint_union,
    make_graph,
    missing_reverse_edges,
    symmetrize,
    with_tables,
)
from jaxmodels.graphs.layers import RGCNConv
from jaxmodels.graphs.sharded import apply_sharded, shard_graph, shard_rows, unshard_rows

N, F = 23, 5


def messy_graph(seed=0, n=N, count=150, weighted=True, typed=0):
    """Self loops, duplicates, isolated last nodes, a hub with more edges than a table is wide."""
    rng = np.random.default_rng(seed)
    edges = rng.integers(0, n - 3, (2, count))
    edges[1, :60] = 4
    edges[:, 60:66] = edges[:, 66:72]
    edges[0, 72:76] = edges[1, 72:76]
    weight = rng.uniform(0.2, 2, count).astype(np.float32) if weighted else None
    return dict(
        edge_index=edges,
        num_nodes=n,
        edge_weight=weight,
        edge_type=rng.integers(0, typed, count) if typed else None,
    )


def dense(edge_index, num_nodes, edge_weight=None, edge_type=None):
    matrix = np.zeros((num_nodes, num_nodes))
    weight = np.ones(edge_index.shape[1]) if edge_weight is None else edge_weight
    np.add.at(matrix, (edge_index[1], edge_index[0]), weight)
    return matrix


def features(n=N, seed=1):
    return np.random.default_rng(seed).normal(size=(n, F)).astype(np.float32)


LAYOUTS = {
    "list": lambda g: make_graph(**g),
    "padded": lambda g: make_graph(**g, pad_edges=None),
    "tables": lambda g: make_graph(**g, pad_edges=None, tables=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_means_and_their_gradients_equal_the_dense_products(layout):
    given, x = messy_graph(), features()
    graph, a = LAYOUTS[layout](given), dense(**given)
    plain = dense(given["edge_index"], N)
    np.testing.assert_allclose(mp.aggregate_sum(graph, x), a @ x, atol=1e-4)
    np.testing.assert_allclose(mp.aggregate_sum(graph, x, weighted=False), plain @ x, atol=1e-4)
    mean = plain @ x / np.maximum(plain.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(mp.aggregate_mean(graph, x), mean, atol=1e-5)
    g = features(seed=2)
    _, pull = jax.vjp(lambda x: mp.aggregate_sum(graph, x), x)
    np.testing.assert_allclose(pull(jnp.asarray(g))[0], a.T @ g, atol=1e-4)


def test_gradients_of_edge_weights_are_the_same_in_lists_and_in_tables():
    given, x, g = messy_graph(), features(), features(seed=2)
    listed = make_graph(**given)
    tabled = with_tables(listed)

    def loss(weight, graph):
        if graph.incoming is not None:
            incoming = mp._reweighted(graph.incoming, weight)
            outgoing = mp._reweighted(graph.outgoing, weight)
            graph = graph.replace(incoming=incoming, outgoing=outgoing)
        return (mp.aggregate_sum(graph.replace(weight=weight), x) * g).sum()

    weight = jnp.asarray(listed.weight)
    want = (x[listed.senders] * g[listed.receivers]).sum(1)
    np.testing.assert_allclose(jax.grad(loss)(weight, listed), want, atol=1e-4)
    np.testing.assert_allclose(jax.grad(loss)(weight, tabled), want, atol=1e-4)


def test_the_gradient_of_a_maximum_is_right_with_and_without_jit():
    """Ties share it, producers recomputed by a fusion do not lose it."""
    given = messy_graph(weighted=False)
    graph, x = make_graph(**given, pad_edges=None), features()
    g = features(seed=2)
    kernel = np.random.default_rng(3).normal(size=(F, F)).astype(np.float32)

    def messages(x):
        return jax.nn.relu(x @ kernel * 1.7 + 0.3)

    def loss(x):
        return (mp.aggregate_max(graph, messages(x)) * g).sum()

    h, pull = jax.vjp(messages, jnp.asarray(x))
    top, dh = np.zeros_like(h), np.zeros_like(h)
    senders, receivers = given["edge_index"]
    for v in range(N):
        inside = senders[receivers == v]
        if len(inside):
            top[v] = np.asarray(h)[inside].max(0)
            won = np.asarray(h)[inside] == top[v]
            np.add.at(dh, inside, won * (g[v] / won.sum(0)))
    np.testing.assert_array_equal(mp.aggregate_max(graph, h), top)
    want = pull(jnp.asarray(dh))[0]
    np.testing.assert_allclose(jax.grad(loss)(x), want, atol=1e-4)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), want, atol=1e-4)


def test_edge_softmax_sums_to_one_and_ignores_padding_and_large_numbers():
    given = messy_graph(weighted=False)
    graph = make_graph(**given, pad_edges=None)
    logits = jnp.asarray(
        np.random.default_rng(0).normal(size=(graph.num_edges, 2)) * 50 + 1e4, jnp.float32
    )
    alpha = jax.jit(mp.edge_softmax)(graph, logits)
    total = mp.segment_sum(alpha, graph)
    np.testing.assert_allclose(total, (mp.in_degree(graph) > 0)[:, None] * np.ones(2), atol=1e-5)
    assert (alpha[given["edge_index"].shape[1] :] == 0).all()
    grad = jax.jit(jax.grad(lambda z: (mp.edge_softmax(graph, z)[:, 0] ** 2).sum()))(logits)
    assert np.isfinite(grad).all()


def model_of(kind, **arguments):
    extra = {"gat": dict(heads=2), "gin": dict(train_eps=True), "rgcn": dict(num_relations=3)}
    arguments = {**extra.get(kind, {}), **arguments}
    return GNN(kind=kind, in_features=F, hidden=6, out=4, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_layout_change_neither_outputs_nor_gradients(kind):
    given = messy_graph(typed=3 if kind == "rgcn" else 0)
    x, model = features(), model_of(kind)
    variables = fresh(model)
    g = np.random.default_rng(5).normal(size=(N, 4)).astype(np.float32)

    @jax.jit
    def run(params, x, graph):
        def loss(params, x):
            y = model.apply({**variables, "params": params}, x, graph)
            return (y[:N] * g).sum(), y[:N]

        (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return y, grads[0], grads[1][:N]

    want = run(variables["params"], x, make_graph(**given))
    wider = {**given, "num_nodes": N + 9}
    padded = np.concatenate([x, np.zeros((9, F), np.float32)])
    others = [(padded, make_graph(**wider, pad_edges=256))]
    if kind in ("gcn", "sage"):
        others.append((x, make_graph(**given, tables=True)))
    arrays = {k: given[k] for k in ("edge_index", "edge_weight", "edge_type")}
    plain = jax.jit(model.apply)(variables, x=x, **arrays)
    np.testing.assert_allclose(plain, want[0], atol=2e-5, rtol=1e-4)
    for x_other, graph in others:
        got = run(variables["params"], x_other, graph)
        chex.assert_trees_all_close(got, want, atol=2e-5, rtol=1e-4)


def fresh(model):
    return jax.jit(model.init)(jax.random.key(0), *model_inputs(model))


def model_inputs(model):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), model.example_inputs())


def test_three_graphs_in_one_bucket_are_one_compilation():
    model = model_of("gcn")
    variables = fresh(model)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(x, graph):
        return model.apply(variables, x, graph)

    for seed, count in ((0, 130), (1, 170), (2, 255)):
        given = messy_graph(seed, count=count)
        run(features(), make_graph(**given, pad_edges=None))
    assert bucket_size(130) == bucket_size(255) == 256 and bucket_size(257) == 512


def test_a_batch_of_graphs_equals_each_alone_and_their_disjoint_union():
    model = model_of("gin")
    variables = fresh(model)
    graphs = [make_graph(**messy_graph(seed), pad_edges=256) for seed in range(3)]
    xs = np.stack([features(seed=s) for s in range(3)])
    apply = jax.jit(model.apply)
    alone = np.stack([apply(variables, x, g) for x, g in zip(xs, graphs)])
    batch = jax.tree.map(lambda *a: np.stack(a), *graphs)
    np.testing.assert_allclose(apply(variables, xs, batch), alone, rtol=1e-4, atol=1e-4)
    union = disjoint_union(graphs, pad_edges=None)
    joined = apply(variables, xs.reshape(-1, F), union).reshape(alone.shape)
    np.testing.assert_allclose(joined, alone, rtol=1e-4, atol=1e-4)


def test_batch_statistics_do_not_see_padding_nodes():
    model = model_of("gin")
    variables = fresh(model)
    given, x = messy_graph(), features()
    mask = np.arange(N + 9) < N
    padded = np.concatenate([x, np.full((9, F), 7, np.float32)])
    wide = make_graph(**{**given, "num_nodes": N + 9}, pad_edges=256)

    @jax.jit
    def run(x, graph, mask=None):
        return model.apply(variables, x, graph, True, mask, mutable=["batch_stats"])

    want, stats = run(x, make_graph(**given), np.ones(N, bool))
    got, padded_stats = run(padded, wide, mask)
    np.testing.assert_allclose(got[:N], want, atol=1e-4)
    chex.assert_trees_all_close(padded_stats, stats, atol=1e-4)
    whole, whole_stats = run(x, make_graph(**given))
    np.testing.assert_allclose(want, whole, atol=1e-4)
    chex.assert_trees_all_close(stats, whole_stats, atol=1e-5)


def test_gcn_can_take_its_edges_as_they_are():
    given = messy_graph(5)
    model = GNN(kind="gcn", in_features=F, hidden=3, out=2, num_layers=1, normalize=False)
    x = features()
    params = model.init(jax.random.key(0), x, make_graph(**given))
    kernel = params["params"]["convs.0"]["lin"]["kernel"]
    found = model.apply(params, x, make_graph(**given, pad_edges=None))
    np.testing.assert_allclose(found, dense(**given) @ x @ kernel, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("features", [2, 6])
def test_sage_can_sum_its_neighbors_whatever_side_of_the_product_is_narrower(features):
    from jaxmodels.graphs.layers import SAGEConv

    edges = np.array([[0, 0, 1, 2], [1, 1, 2, 2]])
    x = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    layer = SAGEConv(4, features, aggr="sum", root_weight=False)
    graph = make_graph(edges, 4, edge_weight=np.full(4, 9.0))  # weights play no part
    variables = layer.init(jax.random.key(0), x, graph)
    left = variables["params"]["lin_l"]
    total = np.stack([0 * x[0], 2 * x[0], x[1] + x[2], 0 * x[0]])  # duplicates count
    np.testing.assert_allclose(
        layer.apply(variables, x, graph), total @ left["kernel"] + left["bias"], atol=1e-5
    )


@pytest.mark.parametrize(("kind", "aggr"), [("gcn", "mean"), ("sage", "max"), ("gat", "mean")])
def test_a_graph_over_four_devices_gives_one_devices_outputs_and_gradients(kind, aggr):
    given, x = messy_graph(n=N, weighted=kind == "gcn"), features()
    model = model_of(kind, aggr=aggr, num_layers=2 if kind == "gcn" else 1)
    graph = model.apply({}, make_graph(**given), method="prepare")
    sharded = shard_graph(graph, 4)
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))
    variables = fresh(model)
    g = np.random.default_rng(5).normal(size=(N, 4)).astype(np.float32)

    def loss(params, x):
        y = model.apply({"params": params}, x, graph)
        return (y * g).sum(), y

    spread = apply_sharded(model, mesh, sharded)

    def sharded_loss(params, x):
        y = spread({"params": params}, shard_rows_in_place(x), sharded)
        y = unshard_rows(sharded, y)
        return (y * g).sum(), y

    def shard_rows_in_place(x):
        return jnp.zeros((4 * sharded.num_nodes, F)).at[sharded.place].set(x)

    np.testing.assert_array_equal(shard_rows_in_place(x), shard_rows(sharded, x))
    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, want), wanted = run(variables["params"], x)
    run = jax.jit(jax.value_and_grad(sharded_loss, (0, 1), has_aux=True))
    (_, got), grads = run(variables["params"], x)
    np.testing.assert_allclose(got, want, atol=1e-4)
    chex.assert_trees_all_close(grads, wanted, atol=2e-4, rtol=1e-3)


def test_relational_operator_in_tables_equals_the_list_for_every_normalization():
    given, table = messy_graph(typed=3), np.random.default_rng(0).normal(size=(3 * N, F))
    graph = make_graph(**given, pad_edges=256)
    for normalization in ("mean", "sym", "sum"):
        operator = mp.relational_graph(graph, 3, normalization)
        want = np.zeros((N, F))
        for kind in range(3):
            of = given["edge_type"] == kind
            a = dense(given["edge_index"][:, of], N, given["edge_weight"][of])
            if normalization == "mean":
                a = a / np.maximum(dense(given["edge_index"][:, of], N).sum(1, keepdims=True), 1)
            elif normalization == "sym":
                d = a.sum(1)
                f = np.where(d > 0, np.where(d > 0, d, 1) ** -0.5, 0)
                a = f[:, None] * a * f
            want += a @ table[kind * N : (kind + 1) * N]
        for form in (operator, with_tables(operator)):
            got = mp.aggregate_sum(form, jnp.asarray(table, jnp.float32))
            np.testing.assert_allclose(got, want, atol=1e-4)


def test_symmetrizing_keeps_the_larger_weight_and_every_edge_once():
    edges = np.array([[0, 1, 2, 2, 0], [1, 0, 1, 2, 1]])
    both, weight = symmetrize(edges, np.array([1.0, 3.0, 2.0, 5.0, 0.5]))
    pairs = {(int(a), int(b)): float(w) for a, b, w in zip(*both, weight)}
    assert pairs == {(0, 1): 3.0, (1, 0): 3.0, (2, 1): 2.0, (1, 2): 2.0, (2, 2): 5.0}
    assert missing_reverse_edges(both) == 0 and missing_reverse_edges(edges) == 0.2
    assert symmetrize(np.zeros((2, 0), int))[0].shape == (2, 0)


def test_graphs_without_edges_and_of_one_node_work_in_every_layer():
    for kind in KINDS:
        model = model_of(kind)
        variables = fresh(model)
        types = np.zeros(0, int) if kind == "rgcn" else None
        graph = make_graph(np.zeros((2, 0)), 1, edge_type=types)
        y = jax.jit(model.apply)(variables, np.ones((1, F), np.float32), graph)
        assert y.shape == (1, 4) and np.isfinite(y).all()
    empty = make_graph(np.zeros((2, 0)), 3, tables=True)
    assert not np.asarray(mp.aggregate_sum(empty, np.ones((3, 2), np.float32))).any()


def test_half_precision_sums_over_edges_in_float32():
    star = make_graph(np.stack([np.arange(1, 1001), np.zeros(1000, int)]), 1001)
    ones = jnp.ones((1001, 1), jnp.bfloat16)
    for graph in (star, with_tables(star)):
        total = mp.aggregate_sum(graph, ones)
        assert total.dtype == jnp.float32 and total[0, 0] == 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(edge_index=[[0, 1], [1, 3]], num_nodes=3), r"edge 1 \(1 -> 3\): 3 is outside"),
        (dict(edge_index=[[0, -1], [1, 2]], num_nodes=3), r"edge 1 \(-1 -> 2\): -1 is outside"),
        (dict(edge_index=[[0.0], [1.0]], num_nodes=3), r"must hold integers, got float64"),
        (dict(edge_index=[[0, 1]], num_nodes=3), r"must be \[2, edges\], got shape \(1, 2\)"),
        (dict(edge_index=[[0], [0]], num_nodes=0), r"at least one node"),
        (dict(edge_index=[[0], [1]], num_nodes=2, edge_weight=[np.nan]), r"weight\[0\] is nan"),
        (dict(edge_index=[[0], [1]], num_nodes=2, edge_weight=[1, 2]), r"edge_weight has shape"),
        (dict(edge_index=[[0, 1], [1, 0]], num_nodes=2, pad_edges=1), r"2 edges do not fit"),
    ],
)  # fmt: skip
def test_edges_that_cannot_be_meant_are_named(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_graph(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kind="gcnn"), r"kind 'gcnn', did you mean 'gcn'\?; known: gcn, sage"),
        (dict(kind="sage", aggr="lstm"), r"aggr 'lstm'; known: mean, max, sum"),
        (dict(num_layers=0), r"num_layers must be at least 1"),
        (dict(kind="rgcn"), r"needs num_relations"),
    ],
)
def test_networks_that_cannot_be_meant_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fresh(GNN(**arguments))


def test_official_checkpoints_come_back_byte_for_byte():
    """Every layer's golden weights through load and export."""
    import jaxmodels
    from jaxmodels.interop import catalog
    from jaxmodels.interop.checkpoint import read
    from tests.golden_adapters.meguide import network_arguments
    from tests.golden_case import COMMITTED, find_cases

    cases = [c for c in find_cases(COMMITTED / "meguide") if c.weights]
    assert {c.config["kind"] for c in cases} == {"gcn", "sage", "gat", "gin"}
    for case in cases:
        module, variables = jaxmodels.load("graphs.gnn", case.weights, **network_arguments(case))
        given = read(case.weights).tensors
        exported = catalog.export("graphs.gnn", module, variables, like=given)
        assert set(exported) == set(given)
        for key, array in given.items():
            assert exported[key].tobytes() == np.asarray(array).tobytes(), key


def test_blocks_are_the_diagonal_of_full_relation_weights():
    rng = np.random.default_rng(4)
    edges, types = rng.integers(0, 7, (2, 20)), rng.integers(0, 3, 20)
    graph = make_graph(edges, 7, edge_type=types)
    x = jnp.asarray(rng.normal(size=(7, 6)), jnp.float32)
    blocks = rng.normal(size=(3, 2, 3, 4)).astype(np.float32)
    full = np.zeros((3, 6, 8), np.float32)
    for r, b in np.ndindex(3, 2):
        full[r, 3 * b : 3 * b + 3, 4 * b : 4 * b + 4] = blocks[r, b]
    given = dict(root_weight=False, bias=False)
    small, large = RGCNConv(6, 8, 3, num_blocks=2, **given), RGCNConv(6, 8, 3, **given)
    got, want = (
        module.apply({"params": {"weight": weight}}, x, graph)
        for module, weight in ((small, blocks), (large, full))
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
