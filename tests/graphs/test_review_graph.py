"""Construction of the socio-technical graph, beyond the golden cases."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.graphs.review_graph import (
    FILE,
    PULL_REQUEST,
    RELATIONS,
    USER,
    WORD,
    WORK_ITEM,
    build_graph,
    check_relations,
    file_words,
    tokenize,
    upsert,
)
from jaxmodels.graphs.review_records import WorkItem, parse_records
from train.data.review_simulator import simulate_reviews


def pull_request(identity="P1", author="ann", **fields):
    return {"id": identity, "author": author, "repo": "r", **fields}


def edges_of(graph, relation):
    """Edges as pairs of (type, key)."""
    ends = [(int(graph.node_type[i]), str(graph.node_keys[i])) for i in range(graph.num_nodes)]
    return {(ends[a], ends[b]) for a, b in graph.edges[relation].T}


def same(a, b):
    return (
        np.array_equal(a.node_keys, b.node_keys)
        and np.array_equal(a.node_type, b.node_type)
        and all(np.array_equal(a.edges[r], b.edges[r]) for r in RELATIONS)
        and all(np.array_equal(a.weights[r], b.weights[r]) for r in RELATIONS)
    )


def test_tokens_split_camel_case_and_drop_numbers_stop_words_and_repeats():
    assert tokenize("HTTPServer2Fix") == ["httpserver2", "fix"]
    assert tokenize("Fix the fix in a2B_c 12 x of FOO-bar") == ["fix", "a2", "foo", "bar"]
    assert tokenize("größe naïve") == ["gr", "na", "ve"]
    assert tokenize("the cat", stop_words=["cat"]) == ["the"]
    assert file_words("src/.gitignore") == ["gitignore"]
    assert file_words("docs/READ.me.txt") == ["read", "me"]
    assert file_words("Makefile") == ["makefile"] and file_words("a/b/archive.tar.gz")[1] == "tar"


def test_people_in_any_role_give_one_edge_and_files_and_items_are_linked():
    item = {"id": "W1", "title": "Better parser", "parent": "W0"}
    graph = build_graph(
        [
            pull_request(
                reviewers=["bob", "ann"],
                commenters=["bob"],
                title="leak",
                files=["src/ioDriver.c", "src/ioDriver.c"],
                work_items=[item, item],
            )
        ]
    )
    assert edges_of(graph, "pr_user") == {
        ((USER, "ann"), (PULL_REQUEST, "P1")),
        ((USER, "bob"), (PULL_REQUEST, "P1")),
    }
    assert len(edges_of(graph, "pr_file")) == 1
    words = {key for (_, _), (_, key) in edges_of(graph, "pr_word")}
    assert words == {"leak", "better", "parser"}, "a parent is a node without words"
    assert {key for (_, _), (_, key) in edges_of(graph, "file_word")} == {"io", "driver"}
    assert edges_of(graph, "work_item_parent") == {((WORK_ITEM, "W0"), (WORK_ITEM, "W1"))}
    assert len(edges_of(graph, "pr_work_item")) == 1


def test_word_pairs_weigh_their_mutual_information_over_pull_requests_alone():
    titles = ["alpha beta", "alpha beta", "alpha gamma", "delta gamma"]
    records = [
        pull_request(f"P{i}", title=t, files=[f"alphaDelta{i}.c"]) for i, t in enumerate(titles)
    ]
    graph = build_graph(records)
    weights = {
        (str(graph.node_keys[a]), str(graph.node_keys[b])): float(w)
        for (a, b), w in zip(graph.edges["word_word"].T, graph.weights["word_word"])
    }
    # alpha 3, beta 2, gamma 2, delta 1 of 4; alpha-gamma (1 * 4 / 6) is below chance and dropped.
    assert set(weights) == {("alpha", "beta"), ("delta", "gamma")}
    assert weights["alpha", "beta"] == pytest.approx(math.log(2 * 4 / 6), abs=1e-6)
    assert weights["delta", "gamma"] == pytest.approx(math.log(2), abs=1e-6)


def test_independent_word_pairs_are_exactly_zero_and_have_no_edge():
    # 3 x 7 of each combination: o(x, y) N = o(x) o(y) with counts whose quotients are not exact.
    records = [
        pull_request(f"P{i:03d}", title=f"{'one' if i % 3 else 'uno'} {'two' if i % 7 else 'due'}")
        for i in range(21 * 10)
    ]
    assert build_graph(records).edges["word_word"].shape == (2, 0)
    # Those below chance too, when the bound lets them in: an error instead of a negative weight.
    records.append(pull_request("P999", title="uno"))
    with pytest.raises(ValueError, match=r"negative PMI.*pmi_min must be at least 0"):
        build_graph(records, pmi_min=-5.0)


def test_the_order_of_records_does_not_matter():
    records = simulate_reviews(3, n_people=12, n_changes=60, n_areas=3)
    shuffled = [records[i] for i in np.random.default_rng(0).permutation(len(records))]
    assert same(build_graph(records), build_graph(shuffled))


def test_upsert_inserts_replaces_and_drops_what_nothing_refers_to():
    records = simulate_reviews(4, n_people=12, n_changes=40, n_areas=3)
    graph = build_graph(records[:30], pmi_min=0.2)
    assert same(upsert(graph, records[30:]), build_graph(records, pmi_min=0.2))
    changed = pull_request(records[0].id, "newcomer", title="unheard", files=["x/fresh.c"])
    updated = upsert(graph, [changed])
    assert same(updated, build_graph([changed, *records[1:30]], pmi_min=0.2))
    assert updated.node(FILE, "x/fresh.c") is not None
    assert same(upsert(updated, records[:1]), graph), "and back again"
    assert same(upsert(graph), graph)


def test_a_changed_work_item_changes_the_words_of_every_linked_pull_request():
    item = {"id": "W1", "title": "old words"}
    records = [pull_request(f"P{i}", work_items=[item]) for i in range(2)]
    graph = upsert(build_graph(records), work_items=[WorkItem("W1", "fresh text")])
    words = set(graph.node_keys[graph.nodes_of(WORD)].tolist())
    assert words == {"fresh", "text"} and graph.edges["pr_word"].shape[1] == 4


def test_pruning_takes_nodes_with_their_edges():
    records = [
        pull_request("P1", title="common rare", files=["a.c", "b.c", "c.c"]),
        pull_request("P2", title="common", files=["a.c"]),
    ]
    graph = build_graph(records, min_word_df=2, max_files_per_pr=2)
    assert graph.node(WORD, "rare") is None and graph.node(WORD, "common") is not None
    assert graph.node(FILE, "c.c") is None and graph.node(FILE, "b.c") is not None
    assert max(graph.edges[r].max(initial=0) for r in RELATIONS) < graph.num_nodes


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "author": st.sampled_from("abc"),
                "repo": st.sampled_from(["", "r"]),
                "reviewers": st.lists(st.sampled_from("abcd"), max_size=3),
                "title": st.text("aB3 é_", max_size=12),
                "files": st.lists(st.text("ab./C", min_size=1, max_size=6), max_size=3),
            }
        ),
        min_size=1,
        max_size=6,
    )
)
def test_every_graph_is_sorted_typed_and_free_of_duplicates(records):
    graph = build_graph([{"id": f"P{i}", **r} for i, r in enumerate(records)])
    assert np.all(np.diff(graph.node_type) >= 0)
    for kind in range(6):
        keys = graph.node_keys[graph.nodes_of(kind)].tolist()
        assert keys == sorted(set(keys))
    for relation in RELATIONS:
        edges = graph.edges[relation]
        assert np.all(edges[0] < edges[1]) and len({tuple(e) for e in edges.T}) == edges.shape[1]
        assert np.all(np.lexsort(edges[::-1]) == np.arange(edges.shape[1]))
        assert np.all(graph.weights[relation] > 0)


def test_bad_records_are_named_by_index_and_field():
    good = pull_request()
    for records, message in [
        ([good, {"id": "P2"}], "record 1: the field 'author' is missing"),
        ([{"author": "ann"}], "record 0: the field 'id' is missing"),
        ([good, pull_request("P2", files="a.c")], "record 1: 'files' must be a list"),
        ([pull_request(reviewers=[""])], "record 0: 'reviewers' must hold non-empty strings"),
        ([pull_request(created="yesterday")], "record 0: 'created' must be Unix seconds"),
        ([pull_request(work_items=[{}])], "record 0: a work item without 'id'"),
        (["text"], "record 0: str where an object is wanted"),
        ([good, pull_request(title="other")], "'P1' occurs twice with different content"),
        ([], "no pull requests"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_graph(records)
    assert build_graph([good, dict(good)]).type_bounds[PULL_REQUEST + 1] == 2, "repeated, not two"
    with pytest.raises(ValueError, match="must not contain reviewers"):
        parse_records([pull_request(reviewers=["bob"])], queries=True)


def test_a_wrong_relation_gets_the_eight_names():
    with pytest.raises(ValueError, match=r"'pr_person'; the eight are pr_user, .*_parent"):
        check_relations(["pr_user", "pr_person"])
    with pytest.raises(ValueError, match="each may occur once"):
        check_relations(["pr_user", "pr_user"])
