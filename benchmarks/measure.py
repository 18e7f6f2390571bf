"""Paired timing: every contender in its own pinned process, one working at a time, interleaved.

A contender is a function `module:name` whose keyword arguments are JSON and which returns a
callable that does one warm step and blocks until it is done. The parent asks the contenders for a
few steps each in turn, so that a busy moment of the machine meets all of them, and keeps wall and
process CPU time of every step.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# An interpreter that has PyTorch, where the project's own has not.
TORCH_PYTHON = os.environ.get("BENCHMARK_TORCH_PYTHON", sys.executable)


@dataclass(frozen=True)
class Contender:
    """One column: `target` is `module:function`; `python` the interpreter it runs in."""

    name: str
    target: str
    arguments: dict = field(default_factory=dict)
    python: str = sys.executable


@dataclass
class Samples:
    """Seconds a step, wall and process CPU; `setup` is construction, compilation and first call."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    setup: float = 0.0

    def cell(self, kind: str = "wall") -> str:
        """`minimum / median (quartiles)` in milliseconds."""
        times = [1e3 * t for t in getattr(self, kind)]
        if not times:
            return "failed"
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        return (
            f"{digits(min(times))} / {digits(statistics.median(times))} "
            f"({digits(low)}-{digits(high)})"
        )


def digits(value: float) -> str:
    """Three significant digits, never in exponent form."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def environment_of(threads: int) -> dict[str, str]:
    """This process's environment with so many threads for XLA and PyTorch, on the CPU."""
    flags = (
        f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'} "
        f"intra_op_parallelism_threads={threads}"
    )
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "BENCHMARK_THREADS": str(threads),
    }


class Worker:
    """A contender's process, pinned to `threads` processors, answering one request at a time."""

    def __init__(self, contender: Contender, threads: int) -> None:
        self.name = contender.name
        processors = sorted(os.sched_getaffinity(0))[:threads]
        environment = environment_of(threads)
        self.process = subprocess.Popen(
            [
                contender.python,
                "-m",
                "benchmarks.measure",
                contender.target,
                json.dumps(contender.arguments),
                ",".join(map(str, processors)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[1],
        )

    def ask(self, request: str) -> dict | None:
        try:
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def measure(
    contenders: Iterable[Contender], threads: int = 1, rounds: int = 8, steps: int = 3
) -> dict[str, Samples]:
    """Samples of every contender: `rounds` times `steps` steps each, in turn.

    A contender that cannot start (no PyTorch, say) keeps empty samples; its error is on stderr.
    """
    samples: dict[str, Samples] = {}
    workers: list[Worker] = []
    try:
        for contender in contenders:
            worker = Worker(contender, threads)
            workers.append(worker)
            ready = worker.ask("start")
            samples[worker.name] = Samples(setup=ready["setup"] if ready else float("nan"))
            if ready is None:
                workers.remove(worker)
                worker.close()
        for _ in range(rounds):
            for worker in workers:
                answer = worker.ask(str(steps)) or {"wall": [], "cpu": []}
                samples[worker.name].wall += answer["wall"]
                samples[worker.name].cpu += answer["cpu"]
    finally:
        for worker in workers:
            worker.close()
    return samples


def ratio(ours: Samples, theirs: Sequence[Samples], kind: str = "wall") -> str:
    """Our minimum over the smallest minimum of the others, and the same of medians."""
    others = [getattr(other, kind) for other in theirs if getattr(other, kind)]
    times = getattr(ours, kind)
    if not times or not others:
        return "-"
    least = min(times) / min(map(min, others))
    middle = statistics.median(times) / min(map(statistics.median, others))
    return f"{least:.2f} / {middle:.2f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def write_report(name: str, title: str, body: str) -> Path:
    """Write `results/NAME.md`: title, the command, the machine and versions, then the tables."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    head = (
        f"# {title}\n\n"
        f"`python -m benchmarks {name}`, {time.strftime('%Y-%m-%d')}, on {machine()}; "
        f"load average at the end {load} (above the number of threads means that other work ran "
        "beside it: then read minima and ratios, not medians).\n"
        f"Versions: {versions()}.\n"
        "Cells: minimum / median (quartiles) in milliseconds, interleaved, warm.\n\n"
    )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(head + body)
    temporary.rename(path)
    return path


def machine() -> str:
    """Processor and number of usable cores."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def versions() -> str:
    """Python, JAX, Flax, Optax here, and PyTorch of the interpreter that runs it."""
    ours = [f"{n} {importlib.metadata.version(n)}" for n in ("jax", "jaxlib", "flax", "optax")]
    command = "import importlib.metadata as m; print('torch', m.version('torch'))"
    answer = subprocess.run([TORCH_PYTHON, "-c", command], capture_output=True, text=True)
    theirs = answer.stdout.strip() or "no torch"
    return ", ".join([f"Python {platform.python_version()}", *ours, theirs])


def serve(target: str, arguments: str, processors: str) -> None:
    """The contender's side: build, warm up, then time as many steps as each line asks for."""
    os.sched_setaffinity(0, {int(p) for p in processors.split(",")})
    sys.stdin.readline()
    # Libraries print; only answers may reach the parent.
    answers, sys.stdout = sys.stdout, sys.stderr
    begin = time.perf_counter()
    module, _, function = target.partition(":")
    step: Callable[[], None] = getattr(importlib.import_module(module), function)(
        **json.loads(arguments)
    )
    step()
    setup = time.perf_counter() - begin
    step()
    print(json.dumps({"setup": setup}), file=answers, flush=True)
    for line in sys.stdin:
        wall, cpu = [], []
        for _ in range(int(line)):
            start, busy = time.perf_counter(), time.process_time()
            step()
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - busy)
        print(json.dumps({"wall": wall, "cpu": cpu}), file=answers, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
