"""Training on review histories, from the command line to recommended reviewers."""

import csv
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from train import predict
from train.__main__ import main
from train.building import build_task
from train.command_line import load_config, read_flags, stop_with_one_line
from train.data.review_files import write_csv, write_json_lines
from train.data.review_simulator import simulate_reviews

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "coral.py")
SMALL_HISTORY = {"n_people": 20, "n_changes": 150, "n_areas": 3}


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """A history that no preset knows: other prefix, one file, records with work items."""
    path = tmp_path_factory.mktemp("history") / "other.jsonl"
    records = simulate_reviews(7, **SMALL_HISTORY)
    write_json_lines(path, [dataclasses.replace(r, author=f"q{r.author}") for r in records])
    return path


@pytest.fixture(scope="module")
def paper_run(history, tmp_path_factory):
    """Twenty steps of `:paper` at reduced size."""
    workdir = tmp_path_factory.mktemp("paper")
    flags = [
        f"--config={CONFIG}:paper",
        "--config.model_args.dims=(16, 12)",
        f"--config.data.options.path={history}",
        "--config.data.options.block=32",
        "--config.batch_size=8",
        "--config.parallel.data=1",
    ]
    run = ["--config.steps=20", "--config.log_every=5", "--config.checkpoint.every=10"]
    assert main(["train", *flags, *run, f"--workdir={workdir}"]) == 0
    return workdir, flags, run


def test_paper_recipe_runs_twenty_steps_on_records_in_the_published_form(paper_run):
    workdir, _, _ = paper_run
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in rows if r["kind"] == "train"]
    assert len(losses) == 4 and np.all(np.isfinite(losses)) and losses[-1] < losses[0]
    report = (workdir / "report.md").read_text()
    for name in ("coral_mrr", "rule_based_top3", "recency_mrr", "popularity_mrr", "random_top1"):
        assert name in report
    assert "projects_coral_top3" in report
    numbers = dict(line.strip("| ").split(" | ") for line in report.splitlines() if " | " in line)
    # The jitted evaluation and the recommender rank alike.
    assert float(numbers["mrr"]) == pytest.approx(float(numbers["coral_mrr"]), abs=1e-5)
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [10, 20]


def test_a_resumed_run_ends_where_the_whole_one_did(paper_run, tmp_path):
    workdir, flags, run = paper_run
    words = [w for w in run if "steps" not in w]
    assert main(["train", *flags, *words, "--config.steps=10", f"--workdir={tmp_path}"]) == 0
    assert main(["train", *flags, *run, f"--workdir={tmp_path}"]) == 0
    from train.checkpoints import load_params

    one, two = (load_params(w)["params"] for w in (workdir, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_prediction_ranks_reviewers_of_new_changes_with_reasons(paper_run, history, tmp_path):
    workdir, flags, _ = paper_run
    with open(history, encoding="utf-8") as file:
        old = json.loads(file.readline())
    new = {**old, "id": "new", "reviewers": [], "commenters": []}
    strange = {"id": "strange", "author": "nobody", "files": ["never/seen.c"]}
    queries = tmp_path / "new.jsonl"
    queries.write_text(f"{json.dumps(new)}\n{json.dumps(strange)}\n")
    output = tmp_path / "reviewers.csv"
    arguments = [f"--checkpoint={workdir}", f"--input={queries}", f"--output={output}"]
    assert predict.main(["predict", *flags, "--config.predict.k=3", *arguments]) == 0
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["change"], r["rank"]) for r in rows[:4]] == [
        ("new", "1"), ("new", "2"), ("new", "3"), ("strange", "1")]  # fmt: skip
    assert new["author"] not in {r["person"] for r in rows[:3]}
    assert "user " in " ".join(r["reasons"] for r in rows[:3])
    assert [r["fallback"] for r in rows] == ["False"] * 3 + ["True"] * 3
    leak = tmp_path / "leak.jsonl"
    leak.write_text(json.dumps({**new, "reviewers": ["s0001"]}) + "\n")
    argv = ["predict", *flags, f"--checkpoint={workdir}", f"--input={leak}", f"--output={output}"]
    with pytest.raises(ValueError, match="inference input must not contain reviewers"):
        predict.main(argv)


def test_a_checkpoint_of_another_history_is_refused(paper_run, tmp_path, capsys):
    workdir, flags, _ = paper_run
    other = tmp_path / "other.csv"
    write_csv(other, simulate_reviews(9, **SMALL_HISTORY))
    words = [w for w in flags if "options.path" not in w] + [f"--config.data.options.path={other}"]
    arguments = [f"--checkpoint={workdir}", f"--input={other}", f"--output={tmp_path / 'o.csv'}"]
    assert stop_with_one_line(predict.main, ["predict", *words, *arguments]) == 2
    error = capsys.readouterr().err
    assert "graph and checkpoint differ" in error and len(error.strip().splitlines()) == 1


def test_pytorch_weights_start_a_run_and_the_graph_is_the_runs_own(paper_run, history, tmp_path):
    workdir, flags, run = paper_run
    from train.checkpoints import load_params
    from train.loop import Plan

    words = ["train", *flags, *run, f"--workdir={tmp_path}"]
    config, _ = read_flags(words, need_workdir=True)
    task = build_task(config)
    trained = load_params(workdir)["params"]
    path = tmp_path / "coral.safetensors"
    jaxmodels.save(path, "graphs.coral", task.model, {"params": trained})
    config, _ = read_flags([*words, f"--config.init_from={path}"], need_workdir=True)
    state = Plan(config).fresh()
    jax.tree.map(np.testing.assert_array_equal, trained, state.params)
    np.testing.assert_array_equal(state.extra["graph"]["pairs"], task.graph_arrays["pairs"])


def tiny_task(**changes):
    config = load_config(CONFIG)
    config.unlock()
    config.data.options.update(block=32, **SMALL_HISTORY)
    config.model_args.update(dims=(8, 6), embed=8)
    config.batch_size = 8
    config.update_from_flattened_dict(changes)
    return build_task(config)


def test_a_batch_has_its_share_of_reviews_and_no_sampled_pair_is_an_edge():
    task = tiny_task()
    graph = {name: jnp.asarray(x) for name, x in task.graph_arrays.items()}
    index = jnp.arange(100) % int(graph["num_others"])
    ends, labels, mask = jax.jit(task.pairs)(graph, index, jax.random.key(0))
    again, _, _ = jax.jit(task.pairs)(graph, index, jax.random.key(0))
    np.testing.assert_array_equal(ends, again)
    assert labels.sum() == 100 and mask[:100].all()
    users = task.data.graph.type_bounds[1]
    assert np.sum((np.asarray(ends[1, :100]) < users) | (np.asarray(ends[0, :100]) < users)) == 20
    edges = {tuple(sorted(p)) for r in task.model.relations for p in task.data.graph.edges[r].T}
    assert all(tuple(sorted(p)) in edges for p in np.asarray(ends[:, :100]).T)
    drawn = np.asarray(ends)[:, 100:][:, np.asarray(mask[100:]) > 0]
    assert not any(tuple(sorted(p)) in edges for p in drawn.T)


def test_the_training_ends_when_the_loss_stops_decreasing():
    task = dataclasses.replace(tiny_task(), epoch_steps=2, patience=2, min_decrease=0.1)
    zero = jnp.zeros(())
    record = {"sum": zero, "steps": zero, "best": zero + jnp.inf, "waited": zero}
    finished = []
    for loss in (1.0, 1.0, 0.5, 0.5, 0.49, 0.49, 0.2, 0.8, 0.5, 0.5):
        record = task._watch(record, jnp.asarray(loss))
        finished.append(task.finished({"stopping": record}))
    assert finished == [False] * 7 + [True, True, True]
    assert record["best"] == 0.49
    # Where there are reviews alone, they are what an epoch passes.
    people = tiny_task(**{"data.options.relations": ("pr_user",)})
    assert people.epoch_steps == -(-int(people.graph_arrays["num_reviews"]) // (8 * 32)) > 1
    # A loss is that of a micro-batch.
    assert tiny_task(**{"optimizer.accumulate": 4}).epoch_steps == 4 * tiny_task().epoch_steps
    never = dataclasses.replace(task, patience=0)
    assert not never.finished({"stopping": record})


def test_a_run_ends_early_and_stays_ended(tmp_path, capsys):
    flags = [
        f"--config={CONFIG}",
        "--config.model_args.dims=(4, 4)",
        "--config.model_args.embed=4",
        "--config.data.options.block=32",
        *(f"--config.data.options.{k}={v}" for k, v in SMALL_HISTORY.items()),
        "--config.parallel.data=1",
        "--config.batch_size=64",
        "--config.schedule.peak=1e-9",
        "--config.task_args.patience=2",
        "--config.task_args.min_decrease=0.5",
        "--config.log_every=2",
        "--config.steps=50",
        f"--workdir={tmp_path}",
    ]
    assert main(["train", *flags]) == 0
    assert "finished at step" in capsys.readouterr().err
    (last,) = (int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert last < 50
    assert main(["train", *flags]) == 0
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [last]


def test_the_pattern_of_robots_holds_for_histories_in_files_too(history):
    of_file = {"data.options.path": str(history), "task_args.candidates": "all"}
    some = tiny_task(**of_file, **{"data.options.bots": "^s000[13]$"})
    users = some.data.graph.node_keys[some.data.graph.nodes_of(0)]
    left_out = users[some.graph_arrays["user_is_bot"]].tolist()
    assert left_out == ["s0001", "s0003"]
    assert not tiny_task(**of_file, **{"data.options.bots": ""}).graph_arrays["user_is_bot"].any()


def losses_of(*, data=1, fsdp=1, mode="jit"):
    """Losses of three steps of the tiny task, and its last state."""
    from train.optimizers import make_optimizer, make_schedule
    from train.parallel import make_mesh, state_sharding
    from train.state import create_state
    from train.step import execute_jit, execute_pmap, make_train_step

    config = load_config(CONFIG)
    config.parallel.update(data=data, fsdp=fsdp)
    task = tiny_task(**{"task_args.tables": False})
    mesh = make_mesh(config.parallel, jax.devices()[: data * fsdp])
    optimizer = make_optimizer(config.optimizer, make_schedule(config.schedule, 10))

    def create():
        params, extra = task.init(jax.random.key(1), None)
        return create_state(params, extra, optimizer, jax.random.key(2), ema=False)

    sharding = state_sharding(jax.eval_shape(create), mesh)
    pmap = mode == "pmap"
    step = make_train_step(task, optimizer, axis_name="batch" if pmap else None)
    run = execute_pmap(step, mesh, "batch") if pmap else execute_jit(step, mesh, sharding)
    state, losses = run.place(jax.jit(create, out_shardings=sharding)()), []
    for number in range(3):
        index = np.random.default_rng(number).integers(0, 200, (8, 32)).astype(np.int32)
        state, metrics = run.step(state, run.put({"index": index}))
        losses.append(float(metrics["loss"]))
    return losses, run.whole(state)


def test_segment_sums_and_neighbor_tables_agree():
    losses = []
    for tables in (True, False):
        task = tiny_task(**{"task_args.tables": tables})
        assert (task.operator is not None) == tables
        params, extra = task.init(jax.random.key(1), None)
        batch = {"index": jnp.arange(64).reshape(2, 32)}
        losses.append(task.loss(params, extra, batch, jax.random.key(0))[0])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_eight_devices_agree_with_one():
    wanted, _ = losses_of()
    np.testing.assert_allclose(losses_of(data=2, fsdp=4)[0], wanted, rtol=1e-5)


def test_under_pmap_the_graph_stays_as_it_is():
    losses, state = losses_of(data=2, mode="pmap")
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0]
    for name, array in tiny_task().graph_arrays.items():
        np.testing.assert_array_equal(state.extra["graph"][name], array)


MISTAKES = {
    "--config.data.options.path=/nowhere.csv": "data.options.path: no such file: /nowhere.csv",
    "--config.data.options.git_dir=/nowhere": "data.options.git_dir /nowhere: no such directory",
    "--config.data.options.split=time": "data.options.split 'time'; known: random, temporal",
    "--config.data.options.relations=('pr_person',)": "no relation 'pr_person'; the eight are",
    "--config.data.options.test_share=2": "data.options.test_share 2.0: between 0 and 1",
    "--config.data.options.bots=(bot": "data.options.bots '(bot': no regular expression",
    "--config.data.options.block=0": "data.options.block must be a positive integer",
    "--config.data.options.n_people=3": "n_people 3 >= 5",
    "--config.model_args.num_nodes=5": "config.model_args.num_nodes: the history decides it",
    "--config.model_args.input=words": "input 'words'; known: onehot, embedding",
    "--config.task_args.candidates=some": "candidates 'some'; known: all, reviewers, repo",
    "--config.task_args.pr_user_fraction=2": "pr_user_fraction: 2.0, must be from 0 to 1",
    "--config.task_args.pr_user_share=1": "did you mean 'pr_user_fraction'?",
    "--config.data.name=digits": "this task reads code_review, not digits",
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_gets_one_line_that_names_it_and_what_is_right(flag, tmp_path, capsys):
    small = [f"--config.data.options.{k}={v}" for k, v in SMALL_HISTORY.items()]
    small = [] if "data.name" in flag else small
    argv = ["train", f"--config={CONFIG}", f"--workdir={tmp_path}", *small, flag]
    assert stop_with_one_line(main, argv) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and MISTAKES[flag] in error[-1]
