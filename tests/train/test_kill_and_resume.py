"""A run can always be killed: the same command goes on to the state it would have had."""

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.train.stoppable_runs import (
    assert_bit_identical,
    assert_same_course,
    finish,
    finished_steps,
    log_of,
    rows,
    start,
    state_of,
    tiny_config,
    wait_until,
)
from train.checkpoints import load_params
from train.loop import NonFiniteLoss, Patience, fit
from train.naming import ConfigError

STEPS = 60


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache) -> Path:
    """The run that nothing happens to, on one device."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(start(workdir, cache), workdir)
    return workdir


def test_a_run_killed_at_random_moments_ends_bit_identical(tmp_path, cache, undisturbed):
    workdir, moments = tmp_path / "killed", random.Random(0)
    checkpoints = workdir / "checkpoints"

    run = start(workdir, cache)
    assert wait_until(lambda: finished_steps(workdir), run)
    time.sleep(moments.uniform(0, 0.1))
    run.kill()
    run.wait()
    reached = finished_steps(workdir)
    assert reached and reached[-1] < STEPS

    # In the middle of a save. A save may end between the look and the kill, hence the attempts.
    for _ in range(3):
        run = start(workdir, cache)
        assert wait_until(lambda: log_of(workdir).read_text().count("\ntrain"), run)
        assert wait_until(lambda: any(checkpoints.glob("*.unfinished")), run)
        run.kill()
        run.wait()
        unfinished = [path.name.partition(".")[0] for path in checkpoints.glob("*.unfinished")]
        if unfinished:
            break
    assert unfinished, "no attempt caught a save under way"
    newest = finished_steps(workdir)[-1]

    mark = len(log_of(workdir).read_text())
    finish(start(workdir, cache), workdir)
    log = log_of(workdir).read_text()[mark:]
    assert f"resumed from step {newest} " in log
    assert re.search(
        rf"checkpoint {unfinished[0]} in .*never finished.*using checkpoint {newest} instead", log
    )
    assert_bit_identical(state_of(workdir, STEPS), state_of(undisturbed, STEPS))
    assert_same_course(workdir, undisturbed, range(1, STEPS + 1), 0.0)
    assert not list(checkpoints.glob("*.*"))


def test_sigterm_saves_and_leaves_cleanly_and_the_same_command_goes_on(
    tmp_path, cache, undisturbed
):
    workdir = tmp_path / "preempted"
    run = start(workdir, cache)
    assert wait_until(lambda: rows(workdir).keys() & {5}, run)
    run.send_signal(signal.SIGTERM)
    finish(run, workdir)
    stopped = finished_steps(workdir)[-1]
    # Saved where it stopped, not at the last multiple of `checkpoint.every`.
    assert 5 <= stopped < STEPS and max(rows(workdir)) == stopped
    assert not (workdir / "report.md").exists()
    assert "Traceback" not in log_of(workdir).read_text()

    finish(start(workdir, cache), workdir)
    assert f"resumed from step {stopped} " in log_of(workdir).read_text()
    assert_bit_identical(state_of(workdir, STEPS), state_of(undisturbed, STEPS))
    assert (workdir / "report.md").exists()


# -- in this process, which has eight devices ------------------------------------------------------


def run_here(workdir: Path, devices: int = 1, fsdp: bool = False, **changes) -> dict[str, float]:
    axes = {"parallel.data": 1 if fsdp else devices, "parallel.fsdp": devices if fsdp else 1}
    return fit(tiny_config(**axes, **changes), workdir)


@pytest.fixture(scope="module")
def started_on_eight(tmp_path_factory) -> Path:
    """Twelve steps on eight devices; checkpoints 8 and 12."""
    workdir = tmp_path_factory.mktemp("runs") / "eight"
    run_here(workdir, devices=8, steps=12)
    return workdir


def copied(workdir: Path, to: Path) -> Path:
    return Path(shutil.copytree(workdir, to))


@pytest.mark.parametrize("devices, fsdp", [(1, False), (4, False), (8, True)])
def test_a_run_goes_on_with_another_number_of_devices(
    tmp_path, started_on_eight, undisturbed, devices, fsdp
):
    assert jax.device_count() == 8
    workdir = copied(started_on_eight, tmp_path / "run")
    run_here(workdir, devices, fsdp, steps=20)
    assert_same_course(workdir, undisturbed, range(1, 21), 2e-5)
    whole, parts = load_params(workdir), state_of(workdir, 20)
    assert parts["step"] == 20
    assert np.all(np.isfinite(whole["params"]["layers.0"]["kernel"]))


def test_a_flipped_bit_in_the_newest_checkpoint_costs_only_the_steps_since_the_previous(
    tmp_path, started_on_eight, capfd
):
    workdir = copied(started_on_eight, tmp_path / "run")
    files = (p for p in (workdir / "checkpoints" / "12" / "arrays").rglob("*") if p.is_file())
    file = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    run_here(workdir, devices=8, steps=12)
    said = capfd.readouterr().err
    assert "checkpoint 12 in" in said and file.name in said and "resumed from step 8" in said
    assert_bit_identical(state_of(workdir, 12), state_of(started_on_eight, 12))


def test_a_changed_config_is_refused_in_one_line_and_nothing_is_touched(tmp_path, started_on_eight):
    workdir = copied(started_on_eight, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    with pytest.raises(ValueError) as error:
        run_here(workdir, devices=8, steps=20, seed=1, batch_size=64)
    message = str(error.value)
    assert "\n" not in message and "seed 0 -> 1" in message and "batch_size 32 -> 64" in message
    after = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    assert after == before


def test_a_non_finite_loss_stops_with_step_checkpoint_and_batch_keys(tmp_path):
    workdir = tmp_path / "run"
    # The loss doubles in size with its own gradient until it overflows, some steps in.
    changes = {"task_args.scale": 1e4, "schedule.peak": 1e6, "log_every": 5, "checkpoint.every": 1}
    with pytest.raises(NonFiniteLoss) as error:
        run_here(workdir, **changes)
    message = str(error.value)
    assert "\n" not in message and "batch keys" in message and "image" in message
    step = int(re.search(r"not finite at step (\d+)", message)[1])
    good = re.search(r"last good checkpoint: (step \d+|none)", message)
    steps = finished_steps(workdir)
    assert steps and good[1] == f"step {steps[-1]}"
    assert all(s <= step for s in steps), "a state after the overflow was saved"
    for s in steps:
        finite = (np.isfinite(v).all() for v in state_of(workdir, s).values())
        assert all(finite)


# -- early stopping --------------------------------------------------------------------------------


def patience_of(limit: int, mode: str = "max", saved=None) -> Patience:
    changes = {"checkpoint.patience": limit, "checkpoint.best_mode": mode}
    config = tiny_config(**{"checkpoint.best_metric": "accuracy"}, **changes)
    return Patience(config.checkpoint, saved or {})


@pytest.mark.parametrize("mode, values", [("max", [1, 3, 2, 3, 2]), ("min", [3, 1, 2, 1, 2])])
def test_patience_runs_out_after_evaluations_without_a_better_one(mode, values):
    whole = patience_of(3, mode)
    assert [whole.runs_out({"accuracy": v}) for v in values] == [False] * 4 + [True]
    part = patience_of(3, mode)
    for value in values[:3]:
        part.runs_out({"accuracy": value})
    resumed = patience_of(3, mode, part.carried())
    assert [resumed.runs_out({"accuracy": v}) for v in values[3:]] == [False, True]
    assert resumed.over and str(resumed) == str(whole)


def test_patience_counts_only_evaluations_that_have_the_metric():
    patience = patience_of(1)
    patience.runs_out({"accuracy": 2})
    assert not patience.runs_out({"loss": 1.0}) and not patience.runs_out({"accuracy": np.nan})
    assert patience.runs_out({"accuracy": 2})
    assert not patience_of(0).runs_out({"accuracy": 2}) and not patience_of(0).over


def test_a_run_without_progress_ends_early_and_stays_ended(tmp_path, capfd):
    changes = {
        "eval.every": 4,
        "checkpoint.best_metric": "accuracy",
        "checkpoint.best_mode": "min",  # it learns, so the first evaluation is the best
        "checkpoint.patience": 2,
    }
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    numbers = run_here(unbroken, **changes)
    assert finished_steps(unbroken)[-1] == 12
    assert "finished at step 12 of 60: accuracy has not fallen below" in capfd.readouterr().err
    run_here(broken, **changes, steps=8)
    run_here(broken, **changes)
    assert finished_steps(broken)[-1] == 12
    assert_bit_identical(state_of(broken, 12), state_of(unbroken, 12))
    # Once more: evaluated, not trained.
    assert run_here(unbroken, **changes)["accuracy"] == numbers["accuracy"]
    assert finished_steps(unbroken)[-1] == 12


@pytest.mark.parametrize("patience, metric", [(-1, "accuracy"), (3, "")])
def test_patience_without_a_metric_or_below_zero_is_refused(tmp_path, patience, metric):
    changes = {"checkpoint.patience": patience, "checkpoint.best_metric": metric}
    with pytest.raises(ConfigError, match=f"^config.checkpoint.patience: {patience}; wanted .*$"):
        run_here(tmp_path / "run", **changes)


def test_the_report_can_be_of_the_best_checkpoint(tmp_path, capfd):
    changes = {
        "steps": 8,
        "eval.every": 4,
        "checkpoint.every": 4,
        "checkpoint.best_metric": "accuracy",
        "checkpoint.best_mode": "min",  # it learns, so the first evaluation is the best
        "checkpoint.report_best": True,
    }
    numbers = run_here(tmp_path / "run", **changes)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    seen = {r["step"]: r["accuracy"] for r in map(json.loads, lines) if r["kind"] == "eval"}
    assert seen[4] < seen[8]
    assert numbers["accuracy"] == pytest.approx(seen[4], rel=1e-6)
    assert "the report is of step 4, the best by accuracy" in capfd.readouterr().err
    # An ended run says the same again.
    assert run_here(tmp_path / "run", **changes)["accuracy"] == numbers["accuracy"]


def test_a_report_of_the_best_needs_a_metric(tmp_path):
    with pytest.raises(ConfigError, match=r"^config.checkpoint.report_best: .*best_metric.*$"):
        run_here(tmp_path / "run", **{"checkpoint.report_best": True})


def test_an_evaluation_of_nothing_trained_or_without_the_best_metric_says_so(tmp_path, capfd):
    changes = {"parallel.data": 1, "eval_only": True, "checkpoint.best_metric": "acuracy"}
    fit(tiny_config(**changes), tmp_path / "run")
    said = capfd.readouterr().err
    assert "holds no checkpoint and config.init_from names none" in said
    assert "gives no 'acuracy'" in said and "did you mean 'accuracy'?" in said
