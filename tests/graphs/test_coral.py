"""CORAL's network and inductive inference beyond the golden cases."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxmodels
from jaxmodels.graphs import coral
from jaxmodels.graphs.link_sampling import edge_index, linked, sample_negatives
from jaxmodels.graphs.review_graph import PULL_REQUEST, USER, build_graph
from jaxmodels.graphs.reviewer_recommendation import (
    Recommender,
    carry_over,
    check_fit,
    known_neighbors,
)
from jaxmodels.interop import catalog
from jaxmodels.interop.conversion import CheckpointMismatch, to_torch
from train.data.review_simulator import simulate_reviews
from train.defaults import default_config
from train.parallel import make_mesh

RELATIONS = ("pr_user", "pr_file", "pr_word")


@functools.cache
def history():
    return tuple(simulate_reviews(1, n_people=12, n_changes=40, n_areas=3))


@functools.cache
def graph():
    return build_graph(history())


def model_of(graph, **options):
    """A module and random parameters, without compiling an initialization."""
    options = {"dims": (8, 6), "embed": 5, "input": "embedding", **options}
    module = coral.Coral(num_nodes=graph.num_nodes, **options)
    rng = np.random.default_rng(graph.num_nodes)
    shapes = catalog.shapes(module)
    return module, jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(s.dtype), shapes)


def typed(graph, module):
    return coral.relations_graph(graph.edges, graph.weights, module.relations, graph.num_nodes)


def states_of(graph, module, variables):
    return jax.jit(functools.partial(module.apply, method="intermediates"))(
        variables, typed(graph, module)
    )


def zeros_like(shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def recommender(graph, **options):
    return Recommender(graph, *model_of(graph, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"input": "onehot"},
        {"input": "embedding"},
        {"input": "embedding", "aggregation": "mean", "num_bases": 2},
        {"input": "onehot", "aggregation": "mean"},
    ],
    ids=str,
)
def test_a_new_change_with_the_neighbors_of_an_old_one_gets_its_embedding_less_the_self_path(
    options,
):
    # Nobody reviewed the last change: all its neighbors are known when it is opened.
    last = history()[-1].__class__(**{**vars(history()[-1]), "reviewers": ()})
    whole = build_graph([*history()[:-1], last])
    module, variables = model_of(whole, relations=RELATIONS, **options)
    states = module.apply(variables, typed(whole, module), method="intermediates")
    known, unknown = known_neighbors(whole, last)
    assert not any(unknown.values())
    degrees = coral.relation_degrees(whole.edges, whole.weights, RELATIONS, whole.num_nodes)
    queries = coral.make_queries([known], RELATIONS, width=64)
    new = module.apply(variables, states["h1"], degrees, queries, method="embed_new")[0]
    node = whole.node(PULL_REQUEST, last.id)
    params = variables["params"]
    own = params["convs.1"]["root"] if "convs.1" in params else params["layers.1.self"]["kernel"]
    np.testing.assert_allclose(new, states["z"][node] - states["h1"][node] @ own, atol=1e-5)
    if module.aggregation == "sym":
        parts = module.apply(variables, states["h1"], degrees, queries, method="contributions")
        np.testing.assert_allclose(parts.sum(1)[0], new, atol=1e-6)


def test_one_hot_tables_are_read_as_a_dense_one_hot_product_would_read_them():
    small = graph()
    module, variables = model_of(small, input="onehot")
    table = variables["params"]
    rows = table["layers.0.rel.*.lin"]["kernel"].shape
    assert rows == (5, small.num_nodes, 8)
    dense, _ = model_of(small, input="embedding", embed=small.num_nodes)
    params = {**table, "embed": {"embedding": jnp.eye(small.num_nodes)}}
    z = states_of(small, module, variables)["z"]
    np.testing.assert_allclose(z, states_of(small, dense, {"params": params})["z"], atol=1e-5)
    compiled = jax.jit(module.apply).lower(variables, typed(small, module)).compile()
    n = small.num_nodes
    assert f"{n},{n}" not in compiled.as_text(), "no N x N array anywhere"


@pytest.mark.parametrize("aggregation", ["sym", "mean"])
def test_kernels_begin_by_their_own_two_sides_however_many_relations_there_are(aggregation):
    module = coral.Coral(num_nodes=8, input="embedding", embed=40, dims=(60, 8),
                         aggregation=aggregation)  # fmt: skip
    params = jax.jit(module.init)(jax.random.key(0), *map(zeros_like, module.example_inputs()))
    names = {"sym": ("layers.0.rel.*.lin", "kernel"), "mean": ("convs.0", "weight")}
    child, leaf = names[aggregation]
    kernel = np.asarray(params["params"][child][leaf])
    assert kernel.shape == (5, 40, 60)
    bound = np.sqrt(6 / (40 + 60))
    assert 0.99 * bound < np.abs(kernel).max() <= bound


def test_permuting_the_nodes_permutes_the_embeddings():
    small = graph()
    module, variables = model_of(small)
    order = np.random.default_rng(0).permutation(small.num_nodes)
    place = np.argsort(order)
    table = np.asarray(variables["params"]["embed"]["embedding"])
    params = {**variables["params"], "embed": {"embedding": table[order]}}
    edges = {r: place[e] for r, e in small.edges.items()}
    moved = coral.relations_graph(edges, small.weights, module.relations, small.num_nodes)
    z = states_of(small, module, variables)["z"]
    np.testing.assert_allclose(module.apply({"params": params}, moved), z[order], atol=1e-5)


def test_a_disconnected_repository_changes_nothing_elsewhere():
    small = graph()
    others = [
        {"id": f"z{i}", "author": "zoe", "repo": "zz", "title": "zebra zoo", "files": ["zz/zoo.c"]}
        for i in range(3)
    ]
    # PMI depends on the number of all pull requests, so the words' relation is left out.
    relations = ("pr_user", "pr_file", "pr_word", "file_word")
    both = build_graph([*history(), *others])
    module, variables = model_of(small, relations=relations)
    larger, fresh = model_of(both, relations=relations)
    params = carry_over(module, variables["params"], fresh["params"], small, both)
    z = states_of(small, module, variables)["z"]
    z_both = np.asarray(states_of(both, larger, {"params": params})["z"])
    names = list(zip(both.node_type.tolist(), both.node_keys.tolist()))
    at = [names.index(n) for n in zip(small.node_type.tolist(), small.node_keys.tolist())]
    np.testing.assert_allclose(z_both[at], z, atol=1e-6)


@pytest.mark.parametrize("options", [{"input": "onehot"}, {"input": "onehot", "num_bases": 2}])
def test_parameters_carried_over_keep_the_rows_of_nodes_that_stayed(options):
    if "num_bases" in options:
        options = {**options, "aggregation": "mean"}
    added = [r.__class__(**{**vars(r), "id": f"new {r.id}"}) for r in history()[:3]]
    small, both = graph(), build_graph([*history(), *added])
    module, variables = model_of(small, **options)
    _, fresh = model_of(both, **options)
    params = carry_over(module, variables["params"], fresh["params"], small, both)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, dict(fresh["params"]))
    for (child, leaf), axis in module.node_axes.items():
        old, new, start = (
            np.moveaxis(np.asarray(p[child][leaf]), axis, 0)
            for p in (variables["params"], params, fresh["params"])
        )
        someone = str(small.node_keys[3])
        np.testing.assert_array_equal(new[both.node(USER, someone)], old[3])
        rows = [both.node(PULL_REQUEST, r.id) for r in added]
        np.testing.assert_array_equal(new[rows], start[rows])


def test_sampled_pairs_are_never_edges_and_depend_on_the_seed_alone():
    small = graph()
    relations = ("pr_user", "pr_file", "pr_word", "file_word", "word_word")
    index = edge_index(small.edges, relations, small.num_nodes, small.type_bounds)
    steps = int(np.diff(index["row_start"]).max()).bit_length() + 1
    sizes = dict(num_nodes=small.num_nodes, search_steps=steps)
    relation, first = index["pair_relation"], index["pairs"][0]
    draw = jax.jit(functools.partial(sample_negatives, tries=4, **sizes))
    one, valid = draw(jax.random.key(0), index, relation, first)
    two, _ = draw(jax.random.key(0), index, relation, first)
    other, _ = draw(jax.random.key(1), index, relation, first)
    np.testing.assert_array_equal(one, two)
    assert np.mean(np.asarray(one) != np.asarray(other)) > 0.5
    edges = {
        (r, *sorted(pair))
        for r, name in enumerate(relations)
        for pair in small.edges[name].T.tolist()
    }
    drawn = np.stack([first, one])[:, np.asarray(valid) > 0]
    kinds = relation[np.asarray(valid) > 0]
    assert not any((int(r), *sorted(p)) in edges for r, p in zip(kinds, drawn.T.tolist()))
    assert np.all(drawn[0] != drawn[1])
    types = small.node_type[np.asarray(one)]
    np.testing.assert_array_equal(types, small.node_type[index["pairs"][1]])
    found = jax.jit(functools.partial(linked, **sizes))(index, relation, first, index["pairs"][1])
    assert np.all(found), "every edge is found as one"


def test_where_everything_is_linked_no_pair_counts():
    records = [{"id": f"P{i}", "author": "a", "reviewers": ["b"]} for i in range(3)]
    full = build_graph(records)
    index = edge_index(full.edges, ("pr_user",), full.num_nodes, full.type_bounds)
    _, valid = sample_negatives(
        *(jax.random.key(0), index, index["pair_relation"], index["pairs"][0]),
        num_nodes=full.num_nodes,
        search_steps=4,
    )
    assert not np.any(valid)
    loss = coral.link_loss(jnp.zeros(4), jnp.zeros(4), jnp.zeros(4))
    assert loss == 0.0, "and the mean over no pairs is 0, not NaN"


def test_with_relu_on_the_last_layer_no_sampled_pair_falls_below_log_two():
    small = graph()
    module, variables = model_of(small, final_activation="relu")
    z = states_of(small, module, variables)["z"]
    pairs = np.random.default_rng(0).integers(small.num_nodes, size=(2, 500))
    logits = coral.pair_logits(z, pairs)
    assert np.all(logits >= 0)
    assert coral.link_loss(logits, jnp.zeros(500)) >= np.log(2)


def test_names_and_layouts_are_those_of_the_reference_composition(tmp_path):
    small = graph()
    for options, wanted in (
        ({"input": "onehot"}, {"layers.0.rel.4.lin.weight": (8, small.num_nodes)}),
        ({"input": "embedding"}, {"embed.weight": (small.num_nodes, 5)}),
        ({"aggregation": "mean", "num_bases": 3}, {"convs.1.weight": (3, 8, 6)}),
    ):
        module, variables = model_of(small, **options)
        state = to_torch(variables)
        assert {k: state[k].shape for k in wanted} == wanted
        path = tmp_path / "coral.safetensors"
        jaxmodels.save(path, "graphs.coral", module, variables)
        fields = {name: getattr(module, name) for name in (
            "num_nodes", "dims", "embed", "input", "aggregation", "num_bases")}  # fmt: skip
        _, again = jaxmodels.load("graphs.coral", path, **fields)
        jax.tree.map(np.testing.assert_array_equal, dict(variables["params"]), again["params"])


def test_a_checkpoint_of_another_graph_is_refused_with_both_numbers():
    small = graph()
    module, variables = model_of(small)
    with pytest.raises(ValueError, match=rf"graph and checkpoint differ: .*{small.num_nodes + 1}"):
        check_fit(module, variables["params"], small.num_nodes + 1)
    for options in ({"input": "embedding"}, {"input": "onehot"}):
        module, variables = model_of(small, **options)
        state = catalog.export("graphs.coral", module, variables)
        with pytest.raises(ValueError, match=r"graph and checkpoint differ.* nodes.* rows") as info:
            jaxmodels.load(
                "graphs.coral",
                state,
                num_nodes=small.num_nodes + 2,
                dims=(8, 6),
                embed=5,
                **options,
            )
        assert str(small.num_nodes) in str(info.value)
        assert str(small.num_nodes + 2) in str(info.value)
    with pytest.raises(CheckpointMismatch, match="missing"):
        jaxmodels.load("graphs.coral", {}, num_nodes=3)


def test_wrong_options_and_edges_are_named():
    for options, message in [
        ({"input": "one-hot"}, "input 'one-hot', did you mean 'onehot'?"),
        (
            {"final_activation": "gelu"},
            "final_activation 'gelu', did you mean 'relu'?; known: identity, relu, tanh",
        ),
        ({"aggregation": "max"}, "aggregation 'max'"),
        ({"relations": ("pr_person",)}, "no relation 'pr_person'; the eight are"),
        ({"num_bases": 2}, "num_bases is for aggregation 'mean'"),
        ({"dims": (4, 4, 4)}, "the model has two layers"),
    ]:
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("?", r"\?")):
            coral.Coral(num_nodes=4, **options)

    def build(pairs, weights=None):
        weights = None if weights is None else {"pr_user": np.array(weights)}
        return coral.relations_graph({"pr_user": np.array(pairs).T}, weights, ("pr_user",), 4)

    with pytest.raises(ValueError, match=r"relation pr_user: edge 1 \(0 -> 4\): 4 is outside"):
        build([[0, 1], [0, 4]])
    with pytest.raises(ValueError, match=r"edge 0 \(-1 -> 2\): -1 is outside"):
        build([[-1, 2]])
    with pytest.raises(ValueError, match=r"edge 1 \(0 - 2\) has weight nan"):
        build([[0, 1], [0, 2]], [1.0, np.nan])
    with pytest.raises(ValueError, match=r"weight -0.5 \(was pmi_min lowered below 0"):
        build([[0, 1]], [-0.5])
    with pytest.raises(ValueError, match="a new change has no relation 'pr_repository'"):
        coral.make_queries([{"pr_repository": [1]}], RELATIONS)


def test_three_graphs_of_one_bucket_are_compiled_once():
    module, variables = model_of(graph())
    traces = []

    @jax.jit
    def forward(variables, graph):
        traces.append(1)
        return module.apply(variables, graph)

    for kept in (40, 39, 38):
        edges = {r: e[:, : e.shape[1] - (40 - kept)] for r, e in graph().edges.items()}
        forward(
            variables,
            coral.relations_graph(edges, None, module.relations, graph().num_nodes, pad_edges=None),
        )
    assert len(traces) == 1


def query(**fields):
    last = history()[-1]
    base = {"id": "new", "author": last.author, "repo": last.repo, "title": last.title,
            "files": list(last.files), "created": last.created}  # fmt: skip
    return {**base, **fields}


def test_the_author_and_robots_are_never_recommended():
    records = [*history(), {"id": "b", "author": "ann", "reviewers": ["review-bot"]}]
    ranks = recommender(build_graph(records))
    (answer,) = ranks.recommend([query()], k=None)
    assert query()["author"] not in answer.users and "review-bot" not in answer.users
    assert len(answer.users) == ranks.graph.type_bounds[USER + 1] - 2
    assert list(answer.scores) == sorted(answer.scores, reverse=True)
    assert not answer.fallback and answer.unknown == {"user": (), "file": (), "word": ()}


def test_reasons_are_the_exact_parts_of_a_score():
    (answer,) = recommender(graph()).recommend([query()], k=2, reasons=1000)
    for score, reasons in zip(answer.scores, answer.reasons):
        assert len(reasons) == sum(answer.known.values())
        assert sum(r.amount for r in reasons) == pytest.approx(score, abs=1e-5)
        assert {r.kind for r in reasons} == {"user", "file", "word"}


def test_a_change_without_known_neighbors_falls_back_to_the_most_frequent_reviewers():
    strange = query(author="nobody", title="unheard", files=["nowhere/x.c"])
    first, second = recommender(graph()).recommend([strange, query()], k=3)
    assert first.fallback and not second.fallback and first.reasons == ()
    assert first.unknown == {"user": ("nobody",), "file": ("nowhere/x.c",), "word": ("unheard",)}
    counts = {}
    for record in history():
        for person in record.reviewers:
            counts[person] = counts.get(person, 0) + 1
    best = sorted(counts, key=lambda p: (-counts[p], p))[:3]
    assert list(first.users) == best and first.scores[0] == counts[best[0]]
    partly = recommender(graph()).recommend([query(author="nobody")], k=1)[0]
    assert not partly.fallback and partly.known["user"] == 0


def test_neighbors_that_say_nothing_to_the_model_do_not_prevent_the_fallback():
    words_alone = query(author="nobody", files=[])
    ranks = recommender(graph(), relations=("pr_user", "pr_file"))
    (answer,) = ranks.recommend([words_alone], k=1)
    assert answer.known["word"] and answer.fallback and answer.reasons == ()
    assert not recommender(graph()).recommend([words_alone], k=1)[0].fallback
    record = {"id": "a", "author": "ann", "reviewers": ["bob"], "title": "alpha"}
    # The word of a file's name is no neighbor of any change.
    ranks = recommender(build_graph([{**record, "files": ["x/zeta.c"]}]))
    for title, fallback in (("zeta", True), ("zeta alpha", False)):
        (answer,) = ranks.recommend([{"id": "new", "author": "nobody", "title": title}], k=1)
        assert answer.known["word"] and answer.fallback is fallback


def test_candidates_can_be_limited_to_reviewers_the_repository_and_recent_activity():
    ranks = recommender(graph())
    reviewers = {p for r in history() for p in r.reviewers}
    of_repo = {p for r in history() if r.repo == query()["repo"] for p in (r.author, *r.reviewers)}
    last_days = {}
    for record in history():
        for person in (record.author, *record.reviewers):
            last_days[person] = record.day
    recent = {p for p, day in last_days.items() if day >= history()[-1].day - 2}
    without = {query()["author"]}
    for options, wanted in (
        ({"candidates": "reviewers"}, reviewers),
        ({"candidates": "repo"}, of_repo),
        ({"active_within_days": 2}, recent),
    ):
        (answer,) = ranks.recommend([query()], k=None, **options)
        assert set(answer.users) == wanted - without
    with pytest.raises(ValueError, match=r"candidates 'repos', did you mean 'repo'\?"):
        ranks.recommend([query()], candidates="repos")


def test_more_reviewers_than_candidates_are_all_candidates_and_a_warning():
    with pytest.warns(UserWarning, match="new: 100 reviewers wanted, 11 candidates"):
        (answer,) = recommender(graph()).recommend([query()], k=100)
    assert len(answer.users) == 11


def test_a_query_must_not_tell_its_reviewers():
    with pytest.raises(ValueError, match=r"record 0 \(new\): inference input must not contain"):
        recommender(graph()).recommend([query(reviewers=["s0001"])])
    with pytest.raises(ValueError, match="no pull requests"):
        recommender(graph()).recommend([])


def test_ties_go_to_the_lower_node():
    assert coral.ranking([1.0, 2.0, 1.0, 2.0], [5, 9, 3, 4], without=9).tolist() == [4, 3, 5]


@pytest.mark.parametrize("tables", [False, True])
def test_the_devices_of_a_mesh_share_the_nodes(tables):
    module, variables = model_of(graph(), dims=(32, 32), embed=32)
    operator = module.prepare(typed(graph(), module))
    if not tables:
        operator = operator.replace(incoming=None, outgoing=None)

    def gradient(params):
        def loss(params):
            return jnp.square(module.apply({"params": params}, operator)).mean()

        return jax.grad(loss)(params)

    def work(count):
        mesh = make_mesh(default_config().parallel, jax.devices()[:count])

        def on_mesh(params):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return gradient(params)

        place = NamedSharding(mesh, PartitionSpec())
        params = jax.device_put(variables["params"], place)
        compiled = jax.jit(on_mesh, out_shardings=place).lower(params).compile()
        return compiled.cost_analysis()["flops"], compiled(params)

    whole, grads = work(1)
    share, shared = work(8)
    assert share < whole / 4
    chex.assert_trees_all_close(shared, grads, rtol=1e-4, atol=1e-6)
