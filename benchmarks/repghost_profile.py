"""Where the time of a JAX train step goes, by kind of layer: XLA's own trace, summed.

`python -m benchmarks repghost_profile` writes `results/repghost_profile.md`.
"""

from __future__ import annotations

import collections
import os
import re
import tempfile
from pathlib import Path

from benchmarks.measure import Contender, Worker, markdown, write_report

SIZE, STEPS = 224, 6

# First match decides; operations are told apart by the layer's path in XLA's metadata.
KINDS = (
    ("depthwise, forward", r"jit\(_depthwise_conv\)"),
    ("depthwise, gradient of the kernel", r"jit\(_kernel_gradient\)"),
    ("depthwise, gradient of x", r"jit\(_input_gradient\)"),
    ("squeeze-and-excitation", r"/se/"),
    ("stem convolution", r"/conv_stem/|^conv_general|convolution"),
    (
        "batch norm and ReLU, backward",
        r"transpose\(.*(bn|_conv\.1|operation\.1|shortcut\.[13]|relu)",
    ),
    ("batch norm and ReLU, forward", r"bn|_conv\.1|operation\.1|shortcut\.[13]|relu"),
    (
        "pointwise convolutions, backward",
        r"transpose\(.*(dot_general|_conv\.0|shortcut\.2|\.conv/)",
    ),
    ("pointwise convolutions, forward", r"dot_general|_conv\.0|shortcut\.2|\.conv/"),
    ("head and classifier", r"conv_head|classifier"),
)


def traced(size: int = SIZE):
    """A contender whose one step writes the traced milliseconds a step, by kind, to a file."""
    import json

    import jax

    from benchmarks.repghost import jax_train

    compiled = []
    jit = jax.jit

    def remember(function=None, **options):
        if function is None or options.get("donate_argnums") != 0:
            return jit(**options) if function is None else jit(function, **options)

        def call(*arguments):
            if not compiled:
                compiled.append(jit(function, **options).lower(*arguments).compile())
            return compiled[0](*arguments)

        return call

    jax.jit = remember
    try:
        step = jax_train(size)
    finally:
        jax.jit = jit
    step()

    def run() -> None:
        folder = tempfile.mkdtemp()
        jax.profiler.start_trace(folder)
        for _ in range(STEPS):
            step()
        jax.profiler.stop_trace()
        table = summed(folder, compiled[0].as_text())
        Path(os.environ["BENCHMARK_TRACE"]).write_text(json.dumps(table))

    return run


def summed(folder: str, program: str) -> list[tuple[str, int, float]]:
    """(kind, operations, milliseconds a step), each operation at its fastest of the steps."""
    import jax

    names = {}
    for line in program.splitlines():
        left = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
        name = re.search(r'op_name="([^"]*)"', line)
        if left:
            names[left[1]] = name[1] if name else ""
    times = collections.defaultdict(list)
    (trace,) = Path(folder).rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation is not None:
                    times[operation].append(event.duration_ns / 1e6)
    sums, counts = collections.Counter(), collections.Counter()
    for operation, durations in times.items():
        name = names.get(operation, "")
        # A call and a loop contain the operations of their bodies; count each once.
        if operation.startswith("jit_") or "/while/" in name:
            continue
        text = f"{name} {operation}"
        kind = next((k for k, pattern in KINDS if re.search(pattern, text)), "everything else")
        sums[kind] += min(durations) * len(durations) / STEPS
        counts[kind] += 1
    return [(kind, counts[kind], ms) for kind, ms in sums.most_common()]


def run(quick: bool = False) -> Path:
    """Write `results/repghost_profile.md`."""
    import json

    del quick
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        os.environ["BENCHMARK_TRACE"] = file.name
        worker = Worker(Contender("traced", "benchmarks.repghost_profile:traced"), 1)
        worker.ask("start")
        worker.close()
        table = json.loads(Path(file.name).read_text())
    total = sum(ms for *_, ms in table)
    rows = [[kind, str(n), f"{ms:.1f}", f"{ms / total:.0%}"] for kind, n, ms in table]
    body = (
        f"RepGhostNet 0.5x, {SIZE}x{SIZE}, batch 8, one thread. Every operation at its fastest of "
        f"{STEPS} traced steps, summed by kind; a fusion counts where its last operation belongs. "
        f"Sum {total:.0f} ms.\n\n" + markdown(["kind", "operations", "ms", "share"], rows)
    )
    return write_report("repghost_profile", "Where a RepGhost train step goes at 224", body)
