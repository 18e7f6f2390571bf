"""Dynamic graphs: the synthetic protocol, files and review histories, rows in order of time."""

import os
import subprocess
import types

import numpy as np
import pytest

from train.data import dynamic_graph_files as files
from train.data import dynamic_graphs, pipeline
from train.data.synthetic_graphs import KINDS, change_indices, synthetic_sequence

OFFICIAL = (16, 31, 61, 76, 91, 106, 136)


def options_of(variant, **options):
    return pipeline.resolve({"name": f"dynamic_graphs:{variant}", "options": options})[1]


def share_within(graph, blocks):
    """Densities inside and across equal blocks."""
    n = len(graph)
    block = np.arange(n) * blocks // n
    same = block[:, None] == block
    off = ~np.eye(n, dtype=bool)
    return graph[same & off].mean(), graph[~same].mean()


def test_changes_stand_one_after_their_step_and_visit_the_structures_in_turn():
    graphs, events = synthetic_sequence("pure", seed=0, num_nodes=200, p_in=0.6, p_ex=0.1)
    assert graphs.shape == (151, 200, 200) and events == OFFICIAL == change_indices()
    assert (graphs == graphs.swapaxes(1, 2)).all() and graphs.dtype == np.uint8
    assert not graphs[:, np.arange(200), np.arange(200)].any()
    for t, blocks in ((15, 4), (16, 10), (30, 10), (31, 2), (61, 4), (150, 10)):
        inside, across = share_within(graphs[t], blocks)
        assert abs(inside - 0.6) < 0.05 and abs(across - 0.1) < 0.03, (t, inside, across)
    differ = (graphs[1:] != graphs[:-1]).mean((1, 2))
    assert set(np.argsort(-differ)[:7] + 1) == set(OFFICIAL)
    # a = 0 copies; a = 1 draws everything again.
    copied, _ = synthetic_sequence("pure", seed=0, num_nodes=20, resample=0.0)
    assert (copied[1:16] == copied[0]).all() and (copied[16] != copied[15]).any()


def test_hybrid_changes_alternate_an_event_of_one_snapshot_with_a_new_structure():
    graphs, _ = synthetic_sequence("hybrid", seed=1, num_nodes=200, resample=1.0, increment=0.2)
    across = [share_within(graphs[t], 4)[1] for t in (15, 16, 17)]
    assert abs(across[1] - across[0] - 0.2) < 0.02 and abs(across[2] - across[0]) < 0.02
    assert share_within(graphs[31], 10)[0] > 0.2 > share_within(graphs[30], 10)[0] - 0.1
    assert share_within(graphs[61], 10)[1] > 0.2  # an event again


def test_evolving_densities_follow_their_curve_and_shuffles_keep_the_density():
    graphs, _ = synthetic_sequence("evolving", seed=2, num_nodes=200, resample=1.0, steps=40)
    base = share_within(graphs[0], 4)[0]
    assert abs(share_within(graphs[6], 4)[0] / base - (1.5 + 0.024)) < 0.1
    graphs, _ = synthetic_sequence("shuffle", seed=2, num_nodes=120, steps=40)
    assert np.ptp(graphs.mean((1, 2))[[15, 16, 31]]) < 0.01
    assert share_within(graphs[15], 4)[0] > 0.2 > share_within(graphs[16], 4)[0] + 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_generators_are_functions_of_their_seed(kind):
    first, events = synthetic_sequence(kind, seed=3, num_nodes=20, steps=20)
    again, _ = synthetic_sequence(kind, seed=3, num_nodes=20, steps=20)
    other, _ = synthetic_sequence(kind, seed=4, num_nodes=20, steps=20)
    np.testing.assert_array_equal(first, again)
    assert events == (16,) and (first != other).any()
    assert (first == first.swapaxes(1, 2)).all()


def test_without_a_break_a_change_redraws_no_more_pairs_than_any_step():
    graphs, _ = synthetic_sequence("shuffle", seed=5, num_nodes=200, resample=0.1, fresh=False)
    differ = (graphs[1:] != graphs[:-1]).mean((1, 2))
    assert differ[15] < 1.5 * differ[:15].mean()


def write(path, text):
    path.write_text(text)
    return path


def test_edge_lists_with_and_without_weights_headers_and_order(tmp_path):
    path = write(tmp_path / "g.csv", "t,u,v,w\n1,0,2,3\n0,0,1,2\n0,1,0,5\n2,2,2,1\n")
    with pytest.warns(UserWarning, match="times are not sorted"):
        edges = files.read_edges(path)
    graph = files.graph_of_edges(edges, directed=False)
    np.testing.assert_array_equal(graph.dense()[0], [[0, 5, 0], [5, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(graph.dense()[1], [[0, 0, 3], [0, 0, 0], [3, 0, 0]])
    assert graph.dense()[2][2, 2] == 1
    summed = files.graph_of_edges(edges, directed=False, repeats="sum").dense()[0]
    assert summed[0, 1] == summed[1, 0] == 7
    directed = files.graph_of_edges(edges, directed=True, num_nodes=5).dense()
    assert directed[0, 0, 1] == 2 and directed[0, 1, 0] == 5 and directed.shape == (3, 5, 5)
    plain = files.graph_of_edges(
        files.read_edges(write(tmp_path / "p.txt", "0 0 1\n1 1 2\n")), directed=True
    )
    assert plain.dense()[1][1, 2] == 1
    unweighted = files.graph_of_edges(edges, directed=True, weighted=False, repeats="sum")
    assert unweighted.dense().max() == 1
    zero = files.read_edges(write(tmp_path / "z.csv", "0,0,1,2\n0,1,2,0\n"))
    for weighted, top in ((True, 2), (False, 1)):
        graph = files.graph_of_edges(zero, directed=True, weighted=weighted).dense()[0]
        assert graph.max() == graph.sum() == top


FILES = {
    "0,0,1,-2\n": "line 1: weight -2 of edge (0, 1) in snapshot 0 must be finite and >= 0",
    "0,0,1\n0,x,1\n": "line 2: '0,x,1' is not t,u,v or t,u,v,w",
    "0,0,1,nan\n": "weight nan of edge (0, 1)",
    "t,u,v\n": "no edges",
    "-1,0,1\n0,0,1\n": "line 1: '-1,0,1' is not t,u,v or t,u,v,w",
    "0,x,1\n0,0,1\n": "line 1: '0,x,1' is not t,u,v or t,u,v,w",
    "0,0,1\n2,0,1\n": "no edges at t = 1 (times 0 to 2); fill_empty=True",
    "2005,0,1\n": "no edges at t = 0 (times 2005 to 2005)",
    "0,0,9\n": "node 9 is not below num_nodes = 5",
    "t,u,v\n0,1,2\n0,1.5,2\n": "line 3: '0,1.5,2' is not",
    "0,0,1.5\n0,1,2\n": "line 1: '0,0,1.5' is not",
    "0,0,1\n1,0,1\n": "event index 4 is outside the 2 snapshots",
}


@pytest.mark.parametrize("text", FILES)
def test_a_bad_edge_list_is_named_with_its_line(text, tmp_path):
    path = write(tmp_path / "bad.csv", text)
    with pytest.raises(ValueError) as caught:
        edges = files.read_edges(path)
        files.graph_of_edges(edges, directed=True, num_nodes=5, events=(4,), where=str(path))
    assert FILES[text] in str(caught.value)


def test_gaps_become_empty_snapshots_when_asked(tmp_path):
    path = write(tmp_path / "gap.csv", "1,0,1\n3,0,1\n")
    options = options_of("edges", path=str(path), fill_empty=True, window=2)
    graph = dynamic_graphs.sequence(options)
    assert [g.nnz for g in graph.snapshots] == [0, 2, 0, 2]
    late = dynamic_graphs.sequence({**options, "first_time": 1})
    assert [g.nnz for g in late.snapshots] == [2, 0, 2]


def record(author, reviewers, created):
    return types.SimpleNamespace(author=author, reviewers=reviewers, created=created)


DAY = 86400


def test_reviews_become_monthly_graphs_with_release_months_as_events():
    january = 1577836800 + 12 * 3600  # 2020-01-01 noon
    records = [
        record("a", ("b", "b", "a"), january),
        record("a", ("b",), january + 20 * DAY),
        record("c", ("a",), january + 70 * DAY),
        record("c", (), january + 71 * DAY),
    ]
    tags = [("v1", january + 65 * DAY), ("v2", january + 400 * DAY)]
    graph = files.review_graph(records, tags)
    assert graph.labels == ("2020-01", "2020-02", "2020-03") and graph.events == (2,)
    assert (
        graph.dense()[0, 0, 1] == 2 and graph.snapshots[1].nnz == 0 and graph.dense()[2, 2, 0] == 1
    )
    weeks = files.review_graph(records, period="week", weighted=False)
    assert weeks.labels[0] == "2019-12-30" and weeks.dense().max() == 1
    with pytest.raises(ValueError, match="take signers as reviewers"):
        files.review_graph([record("a", (), january)])


def git(folder, *words, when="2021-03-01T12:00:00Z"):
    environment = {"HOME": str(folder), "PATH": os.environ["PATH"]}
    for role in ("AUTHOR", "COMMITTER"):
        environment |= {
            f"GIT_{role}_DATE": when,
            f"GIT_{role}_NAME": "A A",
            f"GIT_{role}_EMAIL": "a@x.org",
        }
    subprocess.run(["git", *words], cwd=folder, env=environment, check=True, capture_output=True)


def test_a_clone_gives_review_graphs_and_its_final_releases(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    clone = tmp_path / "clone"
    clone.mkdir()
    git(clone, "init", "-q")
    for month in range(1, 8):
        when = f"2021-{month:02d}-10T12:00:00Z"
        text = f"change {month}\n\nReviewed-by: B B <b@x.org>"
        git(clone, "commit", "--allow-empty", "-q", "-m", text, when=when)
        if month == 4:
            git(clone, "tag", "-a", "v1.0-rc1", "-m", "x", when=when)
        if month == 5:
            git(clone, "tag", "-a", "v1.0", "-m", "x", when=when)
    graph = dynamic_graphs.sequence(options_of("git", path=str(clone)))
    assert len(graph) == 7 and graph.num_nodes == 2 and graph.directed
    assert graph.events == (4,) and all(g.nnz == 1 for g in graph.snapshots)
    with pytest.raises(ValueError, match="not a git clone"):
        files.release_tags(tmp_path)


def test_simulated_reviews_are_a_weekly_graph_with_two_events():
    graph = dynamic_graphs.sequence(options_of("simulated_reviews", changes=400, period="week"))
    assert graph.directed and len(graph.events) == 2 and len(graph) >= 14
    third = len(graph) / 3
    assert abs(graph.events[0] - third) < 1.5 and abs(graph.events[1] - 2 * third) < 1.5


@pytest.mark.parametrize("sparse", [False, True])
def test_rows_come_in_order_of_time_on_any_number_of_processes(sparse):
    data = {
        "name": "dynamic_graphs:shuffle",
        "options": {"num_nodes": 12, "steps": 20, "window": 4, "sparse": sparse},
    }
    graphs = dynamic_graphs.sequence(pipeline.resolve(data)[1]).dense()
    spec = pipeline.element_spec(data)
    batches = [
        next(pipeline.train_batches(data, batch_size=6, seed=0, start_step=s)) for s in (0, 2)
    ]
    assert batches[0]["target"].tolist() == [4, 5, 6, 7, 8, 9]
    assert batches[1]["target"].tolist() == [16, 17, 18, 19, 20, 4]
    halves = [
        next(pipeline.train_batches(data, batch_size=6, seed=0, process_index=p, process_count=2))
        for p in (0, 1)
    ]
    for name, whole in batches[0].items():
        assert whole.shape[1:] == spec[name].shape and whole.dtype == spec[name].dtype
        np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), whole)
    if not sparse:
        np.testing.assert_array_equal(batches[0]["window"][2], graphs[2:6])
        np.testing.assert_array_equal(batches[0]["snapshot"][2], graphs[6])


def test_transforms_change_weights_only(tmp_path):
    path = write(tmp_path / "g.csv", "".join(f"{t},0,1,{t + 1}\n" for t in range(7)))
    read = {
        t: dynamic_graphs.sequence(
            options_of("edges", path=str(path), weighted=True, transform=t, directed=True)
        ).dense()[:, 0, 1]
        for t in dynamic_graphs.TRANSFORMS
    }
    np.testing.assert_array_equal(read["none"], np.arange(1, 8))
    np.testing.assert_allclose(read["log"], np.log1p(np.arange(1, 8)), rtol=1e-6)
    assert (read["binary"] == 1).all()


@pytest.mark.parametrize("variant", ["shuffle", "edges"])
def test_log_weights_of_unweighted_graphs_reach_the_rows(variant, tmp_path):
    path = write(tmp_path / "g.csv", "".join(f"{t},0,1\n" for t in range(8)))
    options = options_of(variant, transform="log", num_nodes=12, path=str(path))
    row = dynamic_graphs.source("targets", options)[0]
    spec = dynamic_graphs.element_spec(options)
    assert row["window"].dtype == spec["window"].dtype
    np.testing.assert_allclose(row["window"].max(), np.log(2), rtol=1e-6)


MISTAKES = {
    "data.options.path is missing": ("edges", {}),
    "kind 'pur'; known: pure": ("edges", {"kind": "pur"}),
    "transform 'ln'; known: none": ("shuffle", {"transform": "ln"}),
    "need at least w+1 snapshots: 5 given, window w = 5": ("shuffle", {"steps": 4}),
    "p_in = 1.5 must be in [0, 1]": ("shuffle", {"p_in": 1.5}),
    "base 'carate'; known: karate": ("rewired", {"base": "carate"}),
    "no such file": ("edges", {"path": "/nowhere.csv"}),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_gets_one_sentence(message):
    variant, options = MISTAKES[message]
    with pytest.raises((ValueError, OSError)) as caught:
        dynamic_graphs.sequence(options_of(variant, **options))
    assert message.lower() in str(caught.value).lower()
