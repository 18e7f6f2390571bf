"""Training on sampled subgraphs: gradients, formats, recipes, meshes, and every mistake's line."""

import dataclasses
import json
import pickle
from collections import defaultdict
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from jaxmodels.graphs.gnn import GNN
from train import metrics, predict
from train.__main__ import main
from train.command_line import read_flags, stop_with_one_line
from train.data import node_graph_sets, node_graphs, pipeline
from train.loop import Plan
from train.tasks.node_classification import NodeClassification, device_sampling

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "meguide.py")


def options_of(**given):
    return pipeline.resolve({"name": "node_graphs", "options": given})[1]


def task_of(**model):
    arguments = {"in_features": 64, "hidden": 8, "out": 10, **model}
    return NodeClassification(GNN(**arguments))


def variables_of(task):
    return jax.jit(lambda: task.init(jax.random.key(0), {}))()


def gradient(task, params, extra, examples):
    batch = jax.tree.map(lambda *a: jnp.stack(a), *examples)

    @jax.jit
    def run(params):
        return jax.value_and_grad(lambda p: task.loss(p, extra, batch, jax.random.key(0))[0])(
            params
        )

    return run(params)


def test_a_subgraph_of_all_nodes_has_the_full_batch_gradient():
    task = task_of()
    params, extra = variables_of(task)
    # k = 30 neighbors: the graph is connected, so that the ball is everything.
    guided = options_of(size=1797, hops=20, neighbors=30)
    full = options_of(sampler="full", neighbors=30)
    rng = np.random.default_rng(0)
    seed = int(np.flatnonzero(node_graphs.prepared(full).graph.train)[0])
    sampled = node_graphs.TrainTransform(guided)({"seed": seed}, rng)
    assert sampled["node_mask"].all()
    whole = node_graphs.TrainTransform(full)({"seed": seed}, rng)
    a, b = (gradient(task, params, extra, [example]) for example in (sampled, whole))
    chex.assert_trees_all_close(a, b, atol=1e-5, rtol=1e-5)


def test_padding_of_nodes_and_edges_changes_neither_loss_nor_gradient():
    task = task_of()
    params, extra = variables_of(task)
    base = options_of(size=300, hops=10, pad_edges=8192)
    nodes, edges, targets = node_graphs.draw(base, 5, np.random.default_rng(0))
    want = None
    for size, pad in ((300, 8192), (300, 16384), (512, 8192)):
        options = options_of(size=size, hops=10, pad_edges=pad)
        example = node_graphs.padded_subgraph(options, nodes, edges, targets, pad_edges=pad)
        found = gradient(task, params, extra, [example, example])
        want = found if want is None else want
        chex.assert_trees_all_close(found, want, atol=1e-6, rtol=1e-5)


def test_edges_that_do_not_fit_cost_the_last_nodes_and_leave_an_induced_subgraph():
    options = options_of(size=300, hops=10, pad_edges=1024)
    data = node_graphs.prepared(options)
    nodes, _, _ = node_graphs.draw(options, 5, np.random.default_rng(0))
    example = node_graphs.padded_subgraph(options, nodes, None, None, pad_edges=1024)
    count = int(example["node_mask"].sum())
    assert 50 < count < len(nodes)
    kept = np.sort(nodes[:count])
    np.testing.assert_array_equal(example["x"][:count], data.graph.x[kept])
    inside = np.isin(data.graph.edge_index, kept).all(0)
    assert (example["receivers"] < 300).sum() == inside.sum() <= 1024


@pytest.mark.parametrize("sampler", [s for s in node_graphs.SAMPLERS if s != "guided_on_device"])
def test_every_sampler_gives_sound_examples_that_the_step_decides(sampler):
    size = 1797 if sampler == "full" else 256
    data = {
        "name": "node_graphs:digits",
        "options": {"sampler": sampler, "size": size, "hops": 4, "dry_epochs": 2}
        | ({"normalize_loss": "saint"} if sampler == "saint_walk" else {}),
    }
    rows = []
    for start in (0, 1):
        batches = pipeline.train_batches(data, batch_size=2, seed=3, start_step=start)
        rows.append([next(batches) for _ in range(2 - start)])
        batches.close()
    chex.assert_trees_all_equal(rows[0][1], rows[1][0])
    spec = pipeline.element_spec(data)
    batch = rows[0][0]
    graph = node_graph_sets.load(pipeline.resolve(data)[1])
    for i in range(2):
        example = {k: v[i] for k, v in batch.items()}
        for name, s in spec.items():
            assert example[name].shape == s.shape and example[name].dtype == s.dtype
        mask, receivers = example["node_mask"], example["receivers"]
        real = receivers < len(mask)
        assert (np.diff(receivers) >= 0).all() and mask[receivers[real]].all()
        assert mask[example["senders"][real]].all() and (example["x"][~mask] == 0).all()
        # Rows of x say which nodes these are; only training nodes bear loss.
        weight = example["loss_weight"]
        assert (weight[~mask] == 0).all()
        if sampler != "saint_walk" and (weight > 0).any():
            assert weight.sum() == pytest.approx(1, rel=1e-5)
        train = {tuple(row) for row in graph.x[graph.train].round(4)}
        assert all(tuple(row) in train for row in example["x"][weight > 0].round(4))


def test_every_training_node_seeds_once_an_epoch():
    data = {"name": "node_graphs:digits", "options": {"sampler": "guided_on_device", "size": 64}}
    batches = pipeline.train_batches(data, batch_size=20, seed=0)
    seeds = np.concatenate([next(batches)["seed"] for _ in range(10)])
    batches.close()
    train = np.flatnonzero(node_graphs.prepared(options_of(size=64)).graph.train)
    np.testing.assert_array_equal(np.sort(seeds), train)


def test_the_sampler_inside_the_step_gives_the_hosts_kind_of_batch():
    options = options_of(sampler="guided_on_device", size=100, hops=4, pad_edges=4096)
    sampling = device_sampling(options)
    batch = jax.jit(sampling.batch)(jnp.array([3, 700]), jax.random.key(0))
    graph = node_graphs.prepared(options).graph
    host = node_graphs.TrainTransform({**options, "sampler": "guided"})(
        {"seed": 3}, np.random.default_rng(0)
    )
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: ((2, *v.shape), v.dtype) for k, v in host.items()
    }
    rows = {tuple(row.round(4)): i for i, row in enumerate(graph.x)}
    for i, seed in enumerate((3, 700)):
        nodes = np.array([rows[tuple(r)] for r in np.asarray(batch["x"][i]).round(4)])
        assert seed in nodes and (np.diff(nodes) > 0).all()
        inside = np.isin(graph.edge_index, nodes).all(0)
        assert int((batch["receivers"][i] < 100).sum()) == inside.sum()
        counted = np.asarray(batch["loss_weight"][i]) > 0
        np.testing.assert_array_equal(counted, graph.train[nodes])


def test_saint_weights_count_on_the_device_and_for_neighbor_targets_alone():
    shared = {"size": 100, "hops": 4, "pad_edges": 4096, "normalize_loss": "saint"}
    options = options_of(sampler="guided_on_device", dry_epochs=2, **shared)
    batch = jax.jit(device_sampling(options).batch)(jnp.array([3]), jax.random.key(0))
    graph, weights = node_graphs.prepared(options).graph, node_graphs.saint_weights(options)
    rows = {tuple(row.round(4)): i for i, row in enumerate(graph.x)}
    nodes = [rows[tuple(r)] for r in np.asarray(batch["x"][0]).round(4)]
    want = np.where(graph.train[nodes], weights[nodes], 0)
    np.testing.assert_allclose(batch["loss_weight"][0], want, rtol=1e-6)
    # All 200 training nodes are neighbors now and then, 20 of them targets of a subgraph.
    options = options_of(sampler="neighbor", targets=20, dry_epochs=50, **shared)
    weights = node_graphs.saint_weights(options)[graph.train]
    assert np.mean(1 / (200 * weights)) == pytest.approx(20 / 200, rel=0.02)


def run_flags(workdir, *more, preset=""):
    small = [
        "--config.steps=6",
        "--config.log_every=1",
        "--config.eval.every=0",
        "--config.checkpoint.every=3",
    ]
    return ["train", f"--config={CONFIG}{preset}", f"--workdir={workdir}", *small, *more]


def losses_of(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in rows if r["kind"] == "train"}


SMALLER = (
    "--config.model_args.hidden=8",
    "--config.data.options.size=64",
    "--config.data.options.pad_edges=1024",
)


def test_a_run_on_a_mesh_agrees_and_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    """Data and fsdp over eight devices."""
    whole, part, mesh = (tmp_path / name for name in ("whole", "part", "mesh"))
    eight = ("--config.batch_size=8", *SMALLER)
    assert main(run_flags(whole, *eight)) == 0
    assert main(run_flags(part, *eight, "--config.steps=3")) == 0
    assert main(run_flags(part, *eight)) == 0
    spread = ("--config.parallel.data=4", "--config.parallel.fsdp=2")
    assert main(run_flags(mesh, *eight, *spread)) == 0
    want = losses_of(whole)
    assert losses_of(part) == want
    got = losses_of(mesh)
    np.testing.assert_allclose([got[s] for s in want], list(want.values()), rtol=2e-4)
    report = (whole / "report.md").read_text()
    assert "test_accuracy" in report and "mlp_baseline" in report and "hop_cap" in report


@pytest.fixture(scope="module")
def flickr(tmp_path_factory):
    """GraphSAINT's files for 120 nodes, 7 classes, 500 features."""
    folder = tmp_path_factory.mktemp("flickr")
    write_graphsaint(folder, classes=7)
    return folder


def write_graphsaint(folder, classes, multi_label=False, n=120, features=500):
    rng = np.random.default_rng(0)
    role = np.array_split(rng.permutation(n), [n // 2, 3 * n // 4])
    labels = rng.integers(0, classes, n)
    labels[:classes] = np.arange(classes)
    dense = (rng.random((n, n)) < 0.08) | (labels[:, None] == labels) & (rng.random((n, n)) < 0.2)
    dense = np.triu(dense, 1)
    full = scipy.sparse.csr_matrix(dense | dense.T, dtype=bool)
    inside = np.isin(np.arange(n), role[0])
    train = full.multiply(inside[:, None]).multiply(inside[None]).tocsr()
    for name, matrix in (("adj_full", full), ("adj_train", train)):
        scipy.sparse.save_npz(folder / f"{name}.npz", scipy.sparse.csr_matrix(matrix))
    x = rng.normal(size=(n, features)).astype(np.float32)
    x[np.arange(n), labels % features] += 3
    np.save(folder / "feats.npy", 10 + 5 * x)
    parts = {k: [int(i) for i in v] for k, v in zip(("tr", "va", "te"), role)}
    (folder / "role.json").write_text(json.dumps(parts))
    values = {str(i): int(label) for i, label in enumerate(labels)}
    if multi_label:
        values = {
            k: [int(c in (v, (v + 1) % classes)) for c in range(classes)] for k, v in values.items()
        }
    (folder / "class_map.json").write_text(json.dumps(values))


def test_the_paper_recipe_runs_twenty_steps_on_graphsaint_files(flickr, tmp_path):
    flags = [
        f"--config.data.options.path={flickr}",
        "--config.data.options.size=32",
        "--config.data.options.hops=2",
        "--config.data.options.pad_edges=512",
        "--config.data.options.workers=0",
        "--config.model_args.hidden=16",
        "--config.batch_size=4",
        "--config.eval.batch_size=1",
        "--config.parallel.data=1",
    ]
    words = run_flags(tmp_path / "run", *flags, "--config.steps=20", preset=":paper")
    assert main(words) == 0
    losses = losses_of(tmp_path / "run")
    assert len(losses) == 20 and losses[20] < losses[1]
    graph = tmp_path / "graph.npz"
    x = np.random.default_rng(0).normal(size=(5, 500)).astype(np.float32)
    np.savez(graph, x=x, edge_index=np.array([[0, 1, 2], [1, 0, 3]]))
    output = tmp_path / "classes.csv"
    call = [f"--checkpoint={tmp_path / 'run'}", f"--input={graph}", f"--output={output}"]
    assert predict.main(["predict", f"--config={CONFIG}:paper", *flags, *call]) == 0
    lines = output.read_text().splitlines()
    assert lines[0] == "node,class,probability" and len(lines) == 6
    for line in lines[1:]:
        _, label, probability = line.split(",")
        assert int(label) < 7 and 1 / 7 <= float(probability) <= 1
    np.savez(graph, x=x[:, :3], edge_index=np.array([[0], [1]]))
    with pytest.raises(ValueError, match=r"x is \[5, 3\], the model takes 500"):
        predict.main(["predict", f"--config={CONFIG}:paper", *flags, *call])


def test_graphsaint_files_are_inductive_and_standardized_by_training_nodes(flickr):
    options = options_of(dataset="flickr", path=str(flickr), size=16, hops=2)
    graph = node_graphs.prepared(options).graph
    assert (graph.train.sum(), graph.valid.sum(), graph.test.sum()) == (60, 30, 30)
    np.testing.assert_allclose(graph.x[graph.train].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(graph.x[graph.train].std(0), 1, atol=1e-3)
    assert graph.train[graph.train_edge_index].all()
    for sampler in ("guided", "random", "saint_walk"):
        nodes, _, _ = node_graphs.draw(
            {**options, "sampler": sampler}, int(np.flatnonzero(graph.train)[0]),
            np.random.default_rng(0),
        )  # fmt: skip
        assert graph.train[nodes].all()


def test_nodes_that_are_not_there_yet_do_not_make_subgraphs_smaller(tmp_path):
    write_graphsaint(tmp_path, classes=7, n=320, features=8)
    # With this tolerance connections never fail, so that a ball is all that can be reached.
    options = options_of(dataset="flickr", path=str(tmp_path), tau=-1.0)
    data = node_graphs.prepared(options)
    assert data.failure.distance > 3 and data.size == data.graph.train.sum() == 160


def test_edges_that_training_sees_are_checked_and_mended_as_all_are(tmp_path):
    write_graphsaint(tmp_path, classes=7, features=8)
    graph = node_graph_sets.load(options_of(dataset="flickr", path=str(tmp_path)))
    edges = graph.train_edge_index
    one_way = dataclasses.replace(graph, train_edge_index=edges[:, edges[0] < edges[1]])
    with pytest.warns(UserWarning, match="100.0% of the edges have no reverse"):
        node_graph_sets.check_node_graph(one_way)
    mended = node_graph_sets.check_node_graph(one_way, fix_direction=True)
    assert mended.train_edge_index.shape == edges.shape
    unknown = dataclasses.replace(graph, labels=np.where(graph.test, -1, graph.labels))
    assert not node_graph_sets.check_node_graph(unknown).test.any()
    outside = dataclasses.replace(graph, train_edge_index=np.array([[0], [120]]))
    with pytest.raises(ValueError, match=r"120 is outside \[0, 120\)"):
        node_graph_sets.check_node_graph(outside)


def test_label_sets_train_with_sigmoid_and_are_scored_by_micro_f1(tmp_path):
    write_graphsaint(tmp_path, classes=5, multi_label=True, features=50)
    options = options_of(dataset="ppi", path=str(tmp_path), size=32, hops=2, pad_edges=1024)
    graph = node_graph_sets.load(options)
    assert graph.multi_label and graph.labels.shape == (120, 5)
    task = NodeClassification(GNN(in_features=50, hidden=8, out=5), "sigmoid")
    params, extra = variables_of(task)
    example = node_graphs.TrainTransform(options)({"seed": 1}, np.random.default_rng(0))
    value, grads = gradient(task, params, extra, [example])
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    whole = node_graphs.eval_transform(options)({"split": np.int64(2)})
    batch = {k: v[None] for k, v in whole.items()} | {"mask": np.ones(1, np.float32)}
    sums = task.evaluate({"params": params, **extra}, batch)
    from sklearn.metrics import f1_score

    logits = task._logits({"params": params, **extra}, batch)[0] > 0
    want = f1_score(graph.labels[graph.test], np.asarray(logits)[graph.test], average="micro")
    assert metrics.compute(sums)["micro_f1"] == pytest.approx(want, abs=1e-6)


def write_planetoid(folder, name="citeseer"):
    """30 training-file nodes, test indices 30..39 of which 33 and 36 have no row in tx."""
    rng = np.random.default_rng(0)
    index = np.array([39, 30, 31, 35, 32, 34, 37, 38])
    hot = np.eye(3, dtype=np.int32)
    sparse = lambda rows: scipy.sparse.csr_matrix(  # noqa: E731
        (rng.random((rows, 6)) < 0.5).astype(np.float32)
    )
    allx, tx = sparse(30), sparse(8)
    ally, ty = hot[np.arange(30) % 3], hot[rng.integers(0, 3, 8)]
    edges = defaultdict(list)
    for u in range(40):
        if u not in (33, 36):
            v = (u + 1) % 30
            edges[u].append(v)
            edges[v].append(u)
    edges[4].append(4)  # a self loop, which the data set's users drop
    parts = {
        "x": allx[:6],
        "tx": tx,
        "allx": allx,
        "y": ally[:6],
        "ty": ty,
        "ally": ally,
        "graph": edges,
    }
    for kind, value in parts.items():
        (folder / f"ind.{name}.{kind}").write_bytes(pickle.dumps(value, protocol=2))
    (folder / f"ind.{name}.test.index").write_text("\n".join(map(str, index)))
    return tx.toarray(), ty, index


def test_planetoid_files_are_read_with_their_isolated_test_nodes(tmp_path):
    tx, ty, index = write_planetoid(tmp_path)
    options = options_of(dataset="citeseer", path=str(tmp_path), allow_pickle=True)
    graph = node_graph_sets.load(options)
    assert graph.num_nodes == 40 and graph.train.sum() == 6
    want = tx / np.maximum(tx.sum(1, keepdims=True), 1e-12)
    np.testing.assert_allclose(graph.x[index], want, atol=1e-6)
    assert (graph.x[[33, 36]] == 0).all() and (graph.labels[[33, 36]] == -1).all()
    np.testing.assert_array_equal(graph.labels[index], ty.argmax(1))
    assert not graph.test[[33, 36]].any() and graph.test.sum() == 8
    assert (graph.edge_index[0] != graph.edge_index[1]).all()
    assert not np.isin(graph.edge_index, [33, 36]).any()


class Malicious:
    def __reduce__(self):
        return print, ("code ran",)


def test_pickles_are_read_only_when_trusted_and_never_run_code(tmp_path, capsys):
    write_planetoid(tmp_path)
    untrusted = options_of(dataset="citeseer", path=str(tmp_path))
    with pytest.raises(ValueError, match="allow_pickle=True for files that you trust"):
        node_graph_sets.load(untrusted)
    (tmp_path / "ind.citeseer.x").write_bytes(pickle.dumps(Malicious()))
    trusted = options_of(dataset="citeseer", path=str(tmp_path), allow_pickle=True)
    with pytest.raises(ValueError, match=r"asks for builtins\.print"):
        node_graph_sets.load({**trusted, "split_seed": 1})
    assert "code ran" not in capsys.readouterr().out


def test_a_version_history_gives_a_co_change_graph(tmp_path):
    rows = ["change,author,files,tokens"]
    rng = np.random.default_rng(0)
    for i in range(200):
        top = rng.choice(["app", "lib", "doc"])
        files = {f"{top}/f{rng.integers(12)}.c" for _ in range(3)} | {"README"}
        rows.append(f"c{i},me,{'|'.join(sorted(files))},{top} word{rng.integers(5)}")
    rows.append(f"c,me,{'|'.join(f'app/f{i}.c' for i in range(40))},sweep")
    table = tmp_path / "changes.csv"
    table.write_text("\n".join(rows))
    options = options_of(dataset="cochange", path=str(table), labels_per_class=4)
    graph = node_graph_sets.load(options)
    assert graph.num_nodes == 36 and graph.num_classes == 3
    assert graph.train.sum() == 12 and not (graph.train & graph.valid).any()
    flags = [f"--config.data.options.path={table}", "--config.data.options.labels_per_class=4"]
    flags += ["--config.data.options.size=8", "--config.data.options.hops=2"]
    words = ["train", f"--config={CONFIG}:cochange", f"--workdir={tmp_path}", *flags]
    model = Plan(read_flags(words, need_workdir=True)[0]).task.model
    assert (model.in_features, model.out) == (8, 3)
    same = graph.labels[graph.edge_index[0]] == graph.labels[graph.edge_index[1]]
    assert same.all() and graph.x.shape[1] == 8
    for path, message in (
        (tmp_path / "none", "nothing at"),
        (tmp_path, "not a git repository"),
        ("", "name a git clone or a CSV"),
    ):
        with pytest.raises(ValueError, match=message):
            node_graph_sets.load({**options, "path": str(path)})
    table.write_text("change,author,files,tokens\nc,me,a/b.c|a/c.c,word\n")
    with pytest.raises(ValueError, match="0 top directories with at least 8 files"):
        node_graph_sets.load({**options, "split_seed": 1})


def test_bundled_graphs_are_what_they_say():
    karate = node_graph_sets.load(options_of(dataset="karate", labels_per_class=2))
    assert karate.num_nodes == 34 and karate.edge_index.shape[1] == 156
    assert karate.labels.sum() == 17 and karate.train.sum() == 4
    tumors = node_graph_sets.load(options_of(dataset="breast_cancer"))
    assert tumors.num_nodes == 569 and tumors.train.sum() == 40
    edges, _, labels = node_graph_sets.block_model(1000, 5, 8.0, 2.0, 16, 1.0, 0)
    inside = labels[edges[0]] == labels[edges[1]]
    assert edges.shape[1] / 1000 == pytest.approx(10, rel=0.1)
    assert inside.mean() == pytest.approx(0.8, abs=0.03)


def node_graph(**changes):
    n = 6
    edges = np.array([[0, 1, 2, 3], [1, 0, 3, 2]])
    masks = [np.arange(n) < 2, np.arange(n) == 4, np.arange(n) == 5]
    fields = dict(
        edge_index=edges,
        x=np.ones((n, 2), np.float32),
        labels=np.array([0, 1, 0, 1, 0, 1], np.int32),
        train=masks[0],
        valid=masks[1],
        test=masks[2],
        num_classes=2,
    )
    return node_graph_sets.NodeGraph(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(edge_index=np.array([[0], [9]])), r"9 is outside \[0, 6\)"),
        (dict(x=np.array([[0, 1]] * 5 + [[np.inf, 0]])), r"node 5, column 0 is inf"),
        (dict(labels=np.array([0, -1, 0, 0, 0, 0])), r"disagree: training node 1 has label -1"),
        (dict(train=np.zeros(6, bool)), r"the training mask is empty"),
    ],
)
def test_graphs_that_cannot_be_trained_on_are_named(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        node_graph_sets.check_node_graph(node_graph(**changes))
    assert "\n" not in str(caught.value)


def test_absent_classes_and_one_way_edges_warn_and_symmetrize_mends():
    with pytest.warns(UserWarning, match="no training node has class 1"):
        node_graph_sets.check_node_graph(node_graph(labels=np.zeros(6, np.int32)))
    one_way = node_graph(edge_index=np.array([[0, 1, 1], [1, 0, 2]]))
    with pytest.warns(UserWarning, match=r"33\.3% of the edges have no reverse"):
        node_graph_sets.check_node_graph(one_way)
    mended = node_graph_sets.check_node_graph(one_way, fix_direction=True)
    assert mended.edge_index.shape[1] == 4


def test_isolated_seeds_warn_or_fail_and_are_subgraphs_of_one_node(monkeypatch):
    lonely = node_graph(train=np.array([1, 0, 0, 0, 1, 0], bool))
    monkeypatch.setattr(node_graph_sets, "load", lambda options: lonely)
    options = options_of(dataset="karate", size=3, hops=2, pad_edges=64, threads=3)
    with pytest.warns(UserWarning, match="1 training nodes are isolated"):
        example = node_graphs.TrainTransform(options)({"seed": 4}, np.random.default_rng(0))
    assert example["node_mask"].tolist() == [True, False, False]
    assert example["loss_weight"].tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="1 training nodes are isolated"):
        node_graphs.prepared({**options, "strict": True})


MISTAKES = {
    "--config.data.options.sampler=guidde": "did you mean 'guided'?",
    "--config.data.options.dataset=coraa": "did you mean 'cora'?",
    "--config.data.options.size=5000": "size must be in [1, 1797]",
    "--config.data.options.ratio=0.0": "ratio must be in (0, 1], got 0.0",
    "--config.data.options.hops=-1": "hops must be at least 1, got -1",
    "--config.data.options.normalize_loss=x": "known: saint",
    "--config.model_args.in_features=65": "model_args.in_features: 65, but digits has 64",
    "--config.model_args.out=9": "model_args.out: 9, but digits has 10",
    "--config.model_args.kind=gatt": "did you mean 'gat'?",
    "--config.task_args.loss=hinge": "known: softmax, sigmoid",
    "--config.task_args.loss=sigmoid": "digits has one class a node; use softmax",
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_in_a_config_gets_one_line(flag, tmp_path, capsys):
    argv = ["train", f"--config={CONFIG}", f"--workdir={tmp_path}", flag]
    assert stop_with_one_line(main, argv) == 2
    assert MISTAKES[flag] in capsys.readouterr().err.strip().splitlines()[-1]


def test_data_that_is_not_there_and_losses_that_do_not_fit_are_said(tmp_path, capsys):
    for preset, flags, message in (
        (":paper", [], "data.options.path: name the folder that holds flickr"),
        (":citation", [f"--config.data.options.path={tmp_path}"], "are pickles"),
        (":paper", [f"--config.data.options.path={tmp_path}"], "no file"),
        (":cochange", [], "name a git clone or a CSV"),
    ):
        argv = ["train", f"--config={CONFIG}{preset}", f"--workdir={tmp_path}", *flags]
        argv.append("--config.parallel.data=1")
        assert stop_with_one_line(main, argv) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    write_graphsaint(tmp_path, classes=121, multi_label=True, features=50, n=130)
    argv = ["train", f"--config={CONFIG}:paper", f"--workdir={tmp_path}"]
    argv += [f"--config.data.options.path={tmp_path}", "--config.data.options.dataset=ppi"]
    argv += ["--config.data.options.size=16", "--config.data.options.hops=2"]
    assert stop_with_one_line(main, argv) == 2
    assert "ppi has label sets; use sigmoid" in capsys.readouterr().err


def test_a_checkpoint_of_another_head_count_or_kind_is_named():
    import jaxmodels

    _, variables = jaxmodels.load("graphs.gnn:gat", heads=2, hidden=4)
    from jaxmodels.interop.conversion import to_torch

    state = to_torch(variables)
    assert state["convs.0.att_src"].shape == (1, 2, 4)
    with pytest.raises(ValueError) as caught:
        jaxmodels.load("graphs.gnn:gat", state, heads=3, hidden=4)
    assert "convs.0.att_src is [1, 2, 4] in the file, [1, 3, 4] in the model" in str(caught.value)
    with pytest.raises(ValueError, match="holds a gat network, the model is kind='gcn'"):
        jaxmodels.load("graphs.gnn:gcn", state)


def test_the_paper_step_needs_no_data_to_be_shaped():
    config, _ = read_flags(
        ["train", f"--config={CONFIG}:paper", "--config.dry_run=host"], need_workdir=True
    )
    spec = Plan(config).spec
    assert spec["x"].shape == (4096, 500) and spec["senders"].shape == (131072,)
