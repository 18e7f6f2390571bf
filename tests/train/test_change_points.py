"""The change-point task through the commands: recipe, resume, mesh, prediction, mistakes."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmodels.graphs.change_detection import Options, detect
from jaxmodels.graphs.laplacian_change import lad
from train import predict
from train.__main__ import main
from train.checkpoints import load_params
from train.command_line import load_config, stop_with_one_line
from train.data import dynamic_graphs, pipeline

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "graph_cpd.py")


@pytest.fixture(scope="module")
def edge_list(tmp_path_factory):
    """A sequence in the published text format `t,u,v`."""
    _, options = pipeline.resolve(
        {
            "name": "dynamic_graphs:shuffle",
            "options": {"num_nodes": 24, "steps": 44, "p_in": 0.9, "p_ex": 0.05, "resample": 0.3},
        }
    )
    graph = dynamic_graphs.sequence(options)
    assert graph.events == (16, 31)
    path = tmp_path_factory.mktemp("edges") / "sbm.txt"
    with open(path, "w") as file:
        for t, snapshot in enumerate(graph.snapshots):
            for u, v in zip(*snapshot.nonzero()):
                if u < v:
                    file.write(f"{t},{u},{v}\n")
    return path, graph


def flags_of(path, batch=2, **more):
    flags = {
        "data.options.path": path,
        "data.options.num_nodes": 24,
        "data.options.snapshots": 45,
        "data.options.events": (16, 31),
        "task_args.rank": 4,
        "task_args.iters": 8,
        "task_args.tol": 0.0,
        "task_args.scorer": "both",
        "batch_size": batch,
        "steps": 40 // batch,
        "checkpoint.every": 10,
        "parallel.data": 1,
        **more,
    }
    return [f"--config={CONFIG}:paper", *(f"--config.{k}={v}" for k, v in flags.items())]


@pytest.fixture(scope="module")
def paper_run(edge_list, tmp_path_factory):
    """Twenty steps of `:paper` at reduced size."""
    workdir = tmp_path_factory.mktemp("paper")
    flags = flags_of(edge_list[0])
    assert main(["train", *flags, f"--workdir={workdir}"]) == 0
    return workdir, flags


def record_of(workdir):
    return load_params(workdir)["record"]


def test_twenty_steps_on_a_file_give_the_librarys_scores(paper_run, edge_list):
    workdir, _ = paper_run
    graphs = edge_list[1].dense(np.uint8)
    options = Options(rank=4, iters=8, tol=0.0, scorer="both")
    found = detect(graphs, options, directed=False)
    record = record_of(workdir)
    for kind in ("frobenius", "spectral"):
        for name, series in getattr(found, kind)._asdict().items():
            np.testing.assert_allclose(record[kind][name], series, atol=2e-5)
    np.testing.assert_allclose(record["objective"][5:], found.objective, rtol=1e-4)
    assert (record["scored"][5:] == 1).all() and (record["sweeps"][5:] == 8).all()
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["kind"] == "train"] == list(range(1, 21))
    report = (workdir / "report.md").read_text()
    hits = np.isin(np.argsort(-lad(graphs).scores, kind="stable")[:2], (16, 31)).mean()
    assert "| hits_at_2 | 1 |" in report and f"| lad_hits_at_2 | {hits:.6g} |" in report


def test_a_resumed_run_is_the_same_bit_for_bit(paper_run, tmp_path):
    workdir, flags = paper_run
    half = [f for f in flags if "steps" not in f] + ["--config.steps=10"]
    assert main(["train", *half, f"--workdir={tmp_path}"]) == 0
    assert main(["train", *flags, f"--workdir={tmp_path}"]) == 0
    whole, resumed = load_params(workdir), load_params(tmp_path)
    assert jax.tree.structure(whole) == jax.tree.structure(resumed)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_targets_spread_over_eight_devices_get_the_same_scores(paper_run, edge_list, tmp_path):
    # 40 targets in batches of 16: the third batch holds 8 targets and then the first ones again.
    more = {"parallel.data": 2, "parallel.fsdp": 4, "steps": 3, "checkpoint.every": 0}
    flags = flags_of(edge_list[0], batch=16, **more)
    assert main(["train", *flags, f"--workdir={tmp_path}"]) == 0
    one, many = record_of(paper_run[0]), record_of(tmp_path)
    for kind in ("frobenius", "spectral"):
        np.testing.assert_allclose(one[kind]["mixed"], many[kind]["mixed"], atol=2e-5)


def test_prediction_ranks_the_snapshots_of_another_file(paper_run, edge_list, tmp_path):
    workdir, flags = paper_run
    path, graph = edge_list
    output, events = tmp_path / "scores.csv", tmp_path / "events.csv"
    events.write_text("t\n9\n")
    shorter = tmp_path / "shorter.csv"
    rows = path.read_text().splitlines(keepends=True)
    shorter.write_text("".join(r for r in rows if not r[0].isdigit() or int(r.split(",")[0]) < 8))
    arguments = [f"--checkpoint={workdir}", f"--input={shorter}", f"--output={output}"]
    own = f"--config.data.options.events_path={events}"  # of the file in the config
    assert predict.main(["predict", *flags, own, *arguments]) == 0
    assert len(output.read_text().splitlines()) == 9
    arguments = [f"--checkpoint={workdir}", f"--input={path}", f"--output={output}"]
    assert predict.main(["predict", *flags, *arguments]) == 0
    lines = [line.split(",") for line in output.read_text().splitlines()]
    assert lines[0] == ["t", "label", "distance", "score", "threshold", "alarm", "rank"]
    assert len(lines) == 46
    first = {int(line[0]) for line in lines[1:] if int(line[6]) <= 2}
    assert first == set(graph.events)
    assert all(float(line[3]) == 0 for line in lines[1:7])


def test_a_warm_start_walks_through_the_batches_as_through_one(edge_list, tmp_path):
    records = []
    for batch in (8, 40):
        more = {"task_args.warm_start": True, "task_args.scorer": "frobenius"}
        flags = flags_of(edge_list[0], batch, **more, **{"checkpoint.every": 0})
        workdir = tmp_path / str(batch)
        assert main(["train", *flags, f"--workdir={workdir}"]) == 0
        records.append(record_of(workdir)["frobenius"]["mixed"])
    np.testing.assert_allclose(records[0], records[1], atol=1e-5)


MISTAKES = {
    "task_args.alpha=1.5": "alpha = 1.5 must be in [0, 1]",
    "task_args.rank=101": "rank k = 101 must be between 1 and the number of nodes 100",
    "task_args.window=3": "config.task_args.window: set config.data.options.window instead",
    "task_args.baselines=('ladd',)": "config.task_args.baselines: 'ladd'; known: lad",
    "task_args.rnk=3": "rnk",
    "data.options.sparse=True": "spectra need dense windows",
    "parallel.mode=pmap": "change points run under jit",
    "data.name=digits": "takes dynamic_graphs",
    "data.options.window=200": "need at least w+1 snapshots: 151 given",
    "data.options.kind=edges": "data.options.path is missing",
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_gets_one_line(flag, tmp_path, capsys):
    argv = ["train", f"--config={CONFIG}", f"--workdir={tmp_path}", "--config.parallel.data=1"]
    argv += ["--config.task_args.scorer=both", f"--config.{flag}"]
    assert stop_with_one_line(main, argv) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and MISTAKES[flag] in error[-1]


def test_every_preset_is_a_config_and_sparse_steps_need_no_file_to_be_described():
    from train.dry_run import measure

    module = pytest.importorskip("configs.graph_cpd")
    for preset in module.PRESETS:
        assert load_config(f"{CONFIG}:{preset}").task == "change_points"
    config = load_config(f"{CONFIG}:paper")
    config.data.options.update(
        path="/nowhere", num_nodes=3000, snapshots=60, sparse=True, edge_slots=64
    )
    config.batch_size, config.task_args.iters, config.parallel.data = 8, 2, 8
    found = measure(config, jax.devices())
    assert found["batch"]["senders"].shape == (8, 6, 64)
