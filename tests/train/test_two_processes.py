"""Two real processes with gloo on loopback: one run, one checkpoint."""

import signal
from pathlib import Path

import pytest

from tests.train.stoppable_runs import (
    assert_same_course,
    finish,
    finished_steps,
    free_port,
    log_of,
    rows,
    start,
    state_of,
    tiny_config,
    wait_until,
)
from train.loop import fit


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> Path:
    """Two processes of two devices each, FSDP across them, until one of them gets a SIGTERM."""
    folder = tmp_path_factory.mktemp("runs")
    workdir, port = folder / "two", free_port()
    flags = [
        f"--config.parallel.coordinator=localhost:{port}",
        "--config.parallel.num_processes=2",
        "--config.parallel.data=2",
        "--config.parallel.fsdp=2",
        "--config.checkpoint.every=1",
        "--config.steps=1000",
    ]
    runs = [
        start(workdir, folder / "compiled", *flags, f"--config.parallel.process_id={i}", devices=2)
        for i in range(2)
    ]
    try:
        assert wait_until(lambda: rows(workdir).keys() & {6}, runs[0]), log_of(workdir).read_text()
        runs[1].send_signal(signal.SIGTERM)
        for run in runs:
            finish(run, workdir)
    finally:
        for run in runs:
            run.kill()
    return workdir


@pytest.fixture(scope="module")
def by_one(tmp_path_factory, by_two) -> Path:
    """The same run by one process on one device, to four steps beyond."""
    workdir = tmp_path_factory.mktemp("runs") / "one"
    steps = finished_steps(by_two)[-1] + 4
    fit(tiny_config(**{"parallel.data": 1, "steps": steps}), workdir)
    return workdir


def test_two_processes_train_like_one_and_write_one_checkpoint(by_two, by_one):
    steps = finished_steps(by_two)
    assert_same_course(by_two, by_one, range(1, steps[-1] + 1), 2e-5)
    assert state_of(by_two, steps[-1])["step"] == steps[-1]
    arrays = by_two / "checkpoints" / str(steps[-1]) / "arrays"
    written = {path.name for path in arrays.glob("ocdbt.process_*")}
    assert written == {"ocdbt.process_0", "ocdbt.process_1"}, "both processes write their part"


def test_a_signal_to_one_of_two_processes_saves_and_stops_both(by_two):
    steps, log = finished_steps(by_two), log_of(by_two).read_text()
    assert 6 <= steps[-1] < 1000 and max(rows(by_two)) == steps[-1]
    assert f"step {steps[-1]} is saved" in log and "Traceback" not in log


def test_one_process_goes_on_from_two_with_the_same_rows(by_two, by_one):
    steps = max(rows(by_one))
    fit(tiny_config(**{"parallel.data": 1, "steps": steps}), by_two)
    assert_same_course(by_two, by_one, range(1, steps + 1), 2e-5)
    assert finished_steps(by_two)[-1] == steps
    accuracy, wanted = (rows(run, "eval")[steps]["accuracy"] for run in (by_two, by_one))
    assert abs(accuracy - wanted) < 0.01
