"""CoditT5 as a user meets it: training, prediction, re-ranking, the published recipe, mistakes."""

import csv
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodels.interop import catalog
from tests.data.test_edits import SMALL, write_published
from train import predict, rerank
from train.__main__ import main
from train.building import build_task
from train.command_line import load_config, stop_with_one_line
from train.hf_adamw import hf_adamw, one_cycle
from train.initialization import starting_variables
from train.loop import Plan, fit
from train.naming import ConfigError
from train.optimizers import make_optimizer, make_schedule, path_string

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "coditt5.py")
TINY = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "vocab_size": 512,
}


def tiny(path, preset="small", **changes):
    config = load_config(f"{CONFIG}:{preset}")
    with config.unlocked():
        config.model_args.update(TINY)
        config.data.options.update({**SMALL, "path": path, "words": (4, 9), "evaluated": 4})
        config.data.options.update(max_source=40, max_target=24)
        config.update(steps=4, batch_size=8, log_every=2)
        config.eval.update(every=0, batch_size=4)
        config.checkpoint.every = 2
        config.task_args.update(eval_beams=1, test_beams=2)
        config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def runs(path, tmp_path_factory):
    """A run with plans and one without, on one device."""
    found = {}
    for preset in ("small", "generator"):
        workdir = tmp_path_factory.mktemp(preset)
        config = tiny(path, preset, **{"parallel.data": 1})
        found[preset] = (config, workdir, fit(config, workdir))
    return found


def test_a_run_reports_text_metrics_beside_those_of_copying(runs):
    for preset, (_, workdir, numbers) in runs.items():
        assert numbers["copying_exact_match"] == 0 and numbers["copying_bleu4"] > 50
        assert 0 <= numbers["test_bleu4"] <= 100 and np.isfinite(numbers["loss"])
        assert ("test_unparsed" in numbers) == (preset == "small")
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        measured = next(r for r in rows if r["kind"] == "eval")
        assert "bleu4" in measured and 0 <= measured["output_bleu4"] <= 100


def test_predictions_have_a_row_for_every_line(runs, path, tmp_path):
    config, workdir, _ = runs["small"]
    lines = tmp_path / "lines.txt"
    lines.write_text("x = f ( 1 <s> y = 2\nreturn return x\n")
    task, variables = loaded(config, workdir)
    rows = task.predict(variables, lines, config)
    assert rows[0] == ("line", "prediction", "plan", "consistent", "parsed")
    assert [r[0] for r in rows[1:]] == [1, 2]
    (tmp_path / "bad.txt").write_text("a\n\nb\n")
    with pytest.raises(ValueError, match="line 2: empty input"):
        task.predict(variables, tmp_path / "bad.txt", config)


def loaded(config, workdir):
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.init_from = str(workdir)
    plan = Plan(config, jax.devices()[:1])
    params, _ = starting_variables(config, plan.abstract, plan.task, plan.make)
    return plan.task, {"params": params}


def test_reranking_goes_both_ways_and_a_constant_second_scorer_keeps_the_order(runs, monkeypatch):
    models = {name: loaded(config, workdir) for name, (config, workdir, _) in runs.items()}
    lines = [("x = f ( 1", ["y = 2"]), ("return return x", [])]
    for base, other in (("small", "generator"), ("generator", "small")):
        found = rerank.rerank(*models[base], *models[other], lines, 2)
        assert len(found) == 2 and all(len(r.targets) == 2 for r in found)
        assert all(r.best in (0, 1) for r in found)
    task, variables = models["small"]
    own = rerank.rerank(task, variables, *models["generator"], lines, 2)
    constant = lambda v, sources, forms: np.zeros((len(sources), 2))  # noqa: E731
    monkeypatch.setattr(type(task), "likelihoods", lambda self, *a: constant(*a))
    assert [r.best for r in rerank.rerank(task, variables, task, variables, lines, 2)] == [0, 0]
    assert [r.targets for r in own] == [
        r.targets for r in rerank.rerank(task, variables, task, variables, lines, 2)
    ]


def test_another_models_hypothesis_is_scored_with_the_plan_of_its_difference():
    class Writer:
        writes_plans, comments = True, False

    class Plain:
        writes_plans, comments = False, False

    class Comments:
        writes_plans, comments = True, True

    text = "<DELETE> b <DELETE_END> a c"
    assert rerank.scored_form(Writer, "a b c", text, own=True) == (
        "<DELETE> b <DELETE_END> <s> a c"
    )
    assert rerank.scored_form(Plain, "a b c", text, own=True) == "a c"
    assert rerank.scored_form(Writer, "a b", "a c", own=False) == (
        "<REPLACE_OLD> b <REPLACE_NEW> c <REPLACE_END> <s> a c"
    )
    assert rerank.scored_form(Comments, "@return a b", "@return a c", own=False) == (
        "<REPLACE_OLD> b <REPLACE_NEW> c <REPLACE_END> <s> a c"
    )
    assert rerank.scored_form(Comments, "@return a b c", text, own=True) == (
        "<DELETE> b <DELETE_END> <s> a c"
    )


def test_the_rerank_command_writes_a_row_for_every_line(runs, path, tmp_path, capsys):
    lines, output = tmp_path / "lines.txt", tmp_path / "out.csv"
    lines.write_text("x = f ( 1 <s> y = 2\nreturn return x\n")
    flags = [
        f"--config={CONFIG}",
        "--checkpoint=/nowhere",
        f"--reranker_config={CONFIG}:generator",
        "--reranker=/nowhere",
        f"--output={output}",
    ]
    assert stop_with_one_line(rerank.main, ["rerank", *flags, f"--input={tmp_path}/no"]) == 2
    assert "no such file" in capsys.readouterr().err
    configs = []
    for preset in ("small", "generator"):
        copy = tmp_path / f"{preset}.py"
        copy.write_text(
            "from tests.train.test_editing import tiny\n"
            f"def get_config(): return tiny({path!r}, {preset!r}, **{{'parallel.data': 1}})\n"
        )
        configs.append(copy)
    flags = [
        f"--config={configs[0]}",
        f"--checkpoint={runs['small'][1]}",
        f"--reranker_config={configs[1]}",
        f"--reranker={runs['generator'][1]}",
        f"--input={lines}",
        f"--output={output}",
    ]
    assert rerank.main(["rerank", *flags]) == 0
    rows = list(csv.reader(output.open()))
    assert rows[0] == ["line", "prediction", "rank", "first"] and len(rows) == 3


def test_a_run_keeps_its_vocabulary_for_what_starts_from_it(runs, path, tmp_path):
    from train.data import edits
    from train.vocabulary import keep

    config, workdir, _ = runs["small"]

    def vocabulary(task):
        return edits.tokenizer(task.options).tokenizer.get_vocab()

    changed = {"data.options.packages": ("email",), "parallel.data": 1}
    other = build_task(tiny(path, **changed))
    assert vocabulary(other) != vocabulary(build_task(config))
    with pytest.raises(ConfigError, match="not the vocabulary of these data: they have changed"):
        keep(workdir, tiny(path, **changed))
    start = tiny(path, init_from=str(workdir), **changed)
    started = build_task(start)
    assert vocabulary(started) == vocabulary(build_task(config))
    keep(workdir, start)
    # A vocabulary that is named is read, and told where it is not the run's.
    other_run = tmp_path / "other"
    keep(other_run, tiny(path, **changed))
    named = {**changed, "data.options.tokenizer": str(other_run / "vocabulary")}
    with pytest.raises(ConfigError, match=r"has another vocabulary than these data: token \d+ is"):
        keep(tmp_path / "new", tiny(path, init_from=str(workdir), **named))


def test_a_stopped_run_goes_on_bit_for_bit(runs, path, tmp_path):
    config, workdir, _ = runs["generator"]
    halfway = config.copy_and_resolve_references()
    import shutil

    shutil.copytree(workdir / "checkpoints" / "2", tmp_path / "checkpoints" / "2")
    for file in (workdir / "checkpoints").iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path / "checkpoints")
    fit(halfway, tmp_path)
    for one, other in zip(*(jax.tree.leaves(loaded(config, w)[1]) for w in (workdir, tmp_path))):
        np.testing.assert_array_equal(one, other)


def test_a_sharded_step_equals_the_single_device_step(path):
    def step(devices, **parallel):
        changes = {f"parallel.{k}": v for k, v in parallel.items()}
        config = tiny(path, "generator", **changes)
        plan = Plan(config, devices)
        state = plan.run.place(plan.make(plan.sharding))
        rng = np.random.default_rng(0)
        batch = {
            "input_ids": rng.integers(5, 500, (8, 40)).astype(np.int32),
            "labels": rng.integers(5, 500, (8, 24)).astype(np.int32),
            "index": np.arange(8, dtype=np.int32),
        }
        batch["labels"][3:, 10:] = 0
        state, metrics = plan.run.step(state, plan.run.put(batch))
        return float(metrics["loss"]), float(metrics["grad_norm"]), jax.device_get(state.params)

    loss, norm, params = step(jax.devices()[:1])
    other = step(jax.devices(), data=2, fsdp=4)
    np.testing.assert_allclose(other[:2], (loss, norm), rtol=1e-5)
    # A first step is little more than signs: compared where gradients are not rounding alone.
    gap = jax.tree.map(lambda a, b: np.mean(np.abs(a - b) > 1e-4), other[2], params)
    assert max(jax.tree.leaves(gap)) < 0.02


def test_paper_recipe_runs_twenty_steps_on_published_files(tmp_path, runs):
    from train.data import edits

    write_published(tmp_path / "data", count=10)
    edits.tokenizer(dict(runs["small"][0].data.options) | {"task": "repairs", "tokenizer": None,
        "repository": None, "limit": 0, "dataset": ""}).save(tmp_path)  # fmt: skip
    flags = [
        f"--config={CONFIG}:paper",
        "--config.model=language.t5",
        *(f"--config.model_args.{k}={v}" for k, v in {**TINY, "eos_token_id": 2}.items()),
        f"--config.data.options.path={tmp_path / 'data'}",
        f"--config.data.options.tokenizer={tmp_path}",
        "--config.data.options.max_source=32",
        "--config.data.options.max_target=32",
        "--config.precision=float32",
        "--config.parallel.data=1",
        "--config.batch_size=4",
        "--config.steps=20",
        "--config.schedule.peak=0.005",
        "--config.schedule.hold_for=2",
        "--config.optimizer.args.hold_for=2",
        "--config.optimizer.args.cycle_steps=10",
        "--config.log_every=5",
        "--config.eval.every=10",
        "--config.eval.batch_size=10",
        "--config.checkpoint.every=10",
        "--config.task_args.eval_beams=2",
        "--config.task_args.test_beams=2",
    ]
    assert main(["train", *flags, f"--workdir={tmp_path / 'run'}"]) == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [r["loss"] for r in map(json.loads, rows) if r["kind"] == "train"]
    assert len(losses) == 4 and losses[-1] < losses[0]
    output = tmp_path / "out.csv"
    (tmp_path / "lines.txt").write_text("a b1 ( ) ; <s> some context\n")
    words = [f"--checkpoint={tmp_path / 'run'}", f"--output={output}"]
    assert predict.main(["predict", *flags, *words, f"--input={tmp_path / 'lines.txt'}"]) == 0
    assert len(output.read_text().splitlines()) == 2


@pytest.mark.parametrize("example_mean", [False, True])
def test_micro_batches_add_up_to_the_batch_and_no_likelihood_counts_padding(path, example_mean):
    rng = np.random.default_rng(0)
    batch = {
        "input_ids": rng.integers(5, 500, (8, 40)).astype(np.int32),
        "labels": rng.integers(5, 500, (8, 24)).astype(np.int32),
        "index": np.arange(8, dtype=np.int32),
    }
    batch["labels"][1::2, 3:] = 0  # every second row is another micro-batch's
    losses = []
    for accumulate in (1, 2):
        changes = {"optimizer.accumulate": accumulate, "parallel.data": 1,
                   "task_args.example_mean": example_mean}  # fmt: skip
        plan = Plan(tiny(path, "generator", **changes), jax.devices()[:1])
        state = plan.run.place(plan.make(plan.sharding))
        state_params = jax.device_get(state.params)
        _, metrics = plan.run.step(state, plan.run.put(batch))
        losses.append([float(metrics[k]) for k in ("loss", "grad_norm")])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    each = -np.asarray(plan.task._compiled[1]({"params": state_params}, batch))
    assert (abs(np.mean(each) - losses[0][0]) < 1e-4) == example_mean
    task, variables = plan.task, {"params": plan.make().params}
    counting = dataclasses.replace(task, count_padding=True)
    outputs = [["a b", "a b c d e f"]]
    np.testing.assert_allclose(
        counting.likelihoods(variables, ["x"], outputs, rows=2),
        task.likelihoods(variables, ["x"], outputs, rows=2),
        rtol=1e-5,
    )


def test_files_missing_at_the_end_of_an_epoch_are_missed_at_the_start(tmp_path):
    folder = write_published(tmp_path)
    config = load_config(f"{CONFIG}:paper")
    with config.unlocked():
        config.data.options.path = str(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer: the folder .* 2048 tokens, .* 32124 rows"):
        build_task(config)
    with config.unlocked():
        config.model_args.vocab_size = 2048
    build_task(config)
    (folder / "test.bf-small.fixed").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.bf-small\.fixed is missing"):
        build_task(config)
    config.task_args.report_split = ""
    build_task(config)


def test_a_vocabulary_larger_than_the_embedding_is_refused_with_both_sizes(path):
    with pytest.raises(ConfigError, match=r"500 rows for data.options.vocabulary of 512"):
        Plan(tiny(path, **{"model_args.vocab_size": 500}), jax.devices()[:1])


@pytest.mark.parametrize("changes", [{"test_beams": 0}, {"test_beams": 513}, {"eval_beams": -1}])
def test_beams_that_cannot_be_are_refused_before_the_training(path, changes):
    name = next(iter(changes))
    with pytest.raises(ConfigError, match=rf"task_args\.{name}: .* beams"):
        build_task(tiny(path, **{f"task_args.{k}": v for k, v in changes.items()}))


def test_one_cycle_is_flat_for_five_epochs_and_falls_to_a_ten_thousandth():
    config = load_config(f"{CONFIG}:paper")
    epoch = config.schedule.hold_for
    rate = make_schedule(config.schedule, config.steps)
    at = [float(rate(e * epoch + 7)) for e in range(50)]
    np.testing.assert_allclose(at[:5], 5e-5, rtol=1e-6)
    np.testing.assert_allclose(at[49], 5e-9, rtol=1e-3)
    np.testing.assert_allclose(np.diff(at[4:]), np.diff(at[4:])[0], rtol=1e-3)
    assert float(rate(epoch - 1)) == at[0]
    b1 = [float(one_cycle(e, 0.95, 0.85, 0.95, steps=50, pct_start=0.1)) for e in range(50)]
    np.testing.assert_allclose([b1[0], b1[2], b1[4], b1[49]], [0.95, 0.9, 0.85, 0.95], rtol=1e-6)
    assert make_optimizer(config.optimizer, rate) is not None


def test_the_published_recipe_decays_norms_but_no_table_of_relative_positions():
    config = load_config(f"{CONFIG}:paper")
    optimizer = make_optimizer(config.optimizer, lambda step: 1.0)
    module = catalog.find("language.t5").build(**TINY)
    params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), catalog.shapes(module)["params"])
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    kept = set()
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = path_string(path)
        np.testing.assert_allclose(update, 0 if "relative" in name else -0.01, err_msg=name)
        kept |= {name} if not np.any(update) else set()
    assert len(kept) == 2 and "encoder.final_layer_norm.scale" not in kept


def test_hf_adamw_by_hand():
    """Two steps against the formulas of transformers 4's AdamW, with a cycled beta1."""
    rate, decay, b2, eps = 0.1, 0.01, 0.999, 1e-3
    optimizer = hf_adamw(rate, eps=eps, weight_decay=decay, cycled_b1=(0.95, 0.85), cycle_steps=20)
    p, m, v = np.array([1.0, -2.0, 0.5]), 0.0, 0.0
    params = jnp.asarray(p)
    state = optimizer.init(params)
    for t, g in enumerate(([0.3, -0.1, 2.0], [0.1, 0.2, -0.5]), 1):
        g = np.array(g)
        b1 = [0.95, 0.85][t - 1]  # a rise of 0.1 * 20 - 1 = 1 epoch
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p - rate * np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
        p = p - rate * decay * p
        updates, state = optimizer.update(jnp.asarray(g, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, p, rtol=2e-5)
