"""Two real processes with gloo on loopback: one run, one checkpoint."""

from pathlib import Path

import pytest
from stoppable_runs import (
    assert_same_course,
    finish,
    finished_steps,
    free_port,
    log_of,
    rows,
    start,
    state_of,
    tiny_config,
)

from train.loop import fit

pytestmark = pytest.mark.xdist_group("two_processes")


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> Path:
    """Eight steps by two processes of two devices each, FSDP across all four."""
    folder = tmp_path_factory.mktemp("runs")
    workdir, port = folder / "two", free_port()
    flags = [
        f"--config.parallel.coordinator=localhost:{port}",
        "--config.parallel.num_processes=2",
        "--config.parallel.data=2",
        "--config.parallel.fsdp=2",
        "--config.steps=8",
    ]
    runs = [
        start(workdir, folder / "compiled", *flags, f"--config.parallel.process_id={i}", devices=2)
        for i in range(2)
    ]
    try:
        for run in runs:
            finish(run, workdir)
    finally:
        for run in runs:
            run.kill()
    return workdir


@pytest.fixture(scope="module")
def by_one(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "one"
    fit(tiny_config(**{"parallel.data": 1, "steps": 12}), workdir)
    return workdir


def test_two_processes_train_like_one_and_write_one_checkpoint(by_two, by_one):
    assert_same_course(by_two, by_one, range(1, 9), 2e-4)
    assert finished_steps(by_two) == [4, 8]
    state = state_of(by_two, 8)
    assert state["step"] == 8
    written = {p.name for p in (by_two / "checkpoints" / "8" / "arrays").glob("ocdbt.process_*")}
    assert written == {"ocdbt.process_0", "ocdbt.process_1"}, "both processes write their part"
    assert rows(by_two, "eval")[8]["accuracy"] > 0.1
    assert "Traceback" not in log_of(by_two).read_text()


def test_one_process_goes_on_from_two_with_the_same_rows(by_two, by_one):
    fit(tiny_config(**{"parallel.data": 1, "steps": 12}), by_two)
    assert_same_course(by_two, by_one, range(1, 13), 2e-4)
    assert finished_steps(by_two) == [8, 12]
