"""Starts the tiny run through the real command, and reads what it left."""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from train.checkpoint_arrays import restore_tree
from train.checkpoint_manifest import examine

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).parent / "tiny_run" / "config.py"


def tiny_config(**changes: Any):
    """The config of the tiny run, for `fit` in the test's own process."""
    spec = importlib.util.spec_from_file_location("tiny_run_config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.update_from_flattened_dict(changes)
    return config


def environment(cache: Path, devices: int) -> dict[str, str]:
    """This process's with another number of devices: of a flag given twice the last one holds."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(workdir: Path, cache: Path, *flags: str, devices: int = 1) -> subprocess.Popen[str]:
    """`python -m train` on the tiny run; its output goes to `workdir`/../NAME.log."""
    command = [sys.executable, "-m", "train", "--config", str(CONFIG), "--workdir", str(workdir)]
    with open(log_of(workdir), "a") as log:
        return subprocess.Popen(
            [*command, *flags],
            stdout=log,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=environment(cache, devices),
        )


def log_of(workdir: Path) -> Path:
    return workdir.with_name(f"{workdir.name}.log")


def finish(run: subprocess.Popen[str], workdir: Path) -> None:
    assert run.wait(timeout=300) == 0, log_of(workdir).read_text()


def wait_until(condition, run: subprocess.Popen[str], timeout: float = 300) -> bool:
    """Whether the condition came true before the run ended."""
    end = time.monotonic() + timeout
    while run.poll() is None and time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            if condition():
                return True
        time.sleep(0.001)
    return False


def finished_steps(workdir: Path) -> list[int]:
    names = (p.name for p in (workdir / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdigit())


def state_of(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every leaf of a checkpoint, as numpy arrays by path."""
    path = workdir / "checkpoints" / str(step)
    manifest, problem = examine(path)
    assert problem is None, problem
    tree = {
        # The key's data rather than a key, which numpy cannot hold.
        name: {"shape": [2], "dtype": "uint32"} if "prng" in entry else entry
        for name, entry in manifest["tree"].items()
    }
    like = {name: np.zeros(entry["shape"], entry["dtype"]) for name, entry in tree.items()}
    keys = {name: name for name in tree}
    return restore_tree(path, tree, like, str(path), keys, escape=False)


def assert_bit_identical(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert left[name].tobytes() == right[name].tobytes(), f"{name} differs"


def rows(workdir: Path, kind: str = "train") -> dict[int, dict[str, float]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return {row["step"]: row for row in found if row["kind"] == kind}


def assert_same_course(left: Path, right: Path, steps: range, tolerance: float) -> None:
    """The same rows in the same order at each step, and losses within `tolerance`."""
    a, b = rows(left), rows(right)
    for step in steps:
        assert a[step]["order"] == b[step]["order"], f"step {step} saw other rows"
        assert abs(a[step]["loss"] - b[step]["loss"]) <= tolerance, f"loss of step {step}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
