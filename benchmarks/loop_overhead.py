"""What `train.loop.fit`'s loop costs over the bare jitted step: RepGhost's small configuration."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Contender, markdown, measure, ratio, write_report

STEPS, BATCH = 20, 128
CONTENDERS = (
    Contender("bare", "benchmarks.loop_overhead:bare"),
    Contender("loop", "benchmarks.loop_overhead:loop"),
    Contender("streaming", "benchmarks.loop_overhead:loop", {"streaming": True}),
    Contender("data", "benchmarks.loop_overhead:data"),
)


def _plan():
    import jax

    from configs.repghost import get_config
    from train.loop import Plan

    config = get_config("small")
    config.steps, config.batch_size, config.log_every = STEPS, BATCH, STEPS // 2
    config.eval.every = config.checkpoint.every = 0
    plan = Plan(config, jax.devices()[:1])
    return plan, plan.run.place(plan.fresh())


def bare() -> Callable[[], None]:
    """`STEPS` steps of the jitted function on one batch that is already in place."""
    import jax

    from train.data import pipeline

    plan, state = _plan()
    batches = pipeline.train_batches(plan.config.data, batch_size=BATCH, seed=0)
    batch = plan.run.put(next(batches))

    def run() -> None:
        nonlocal state
        for _ in range(STEPS):
            state, measured = plan.run.step(state, batch)
        jax.block_until_ready((state, measured))

    return run


def data() -> Callable[[], None]:
    """`STEPS` batches as the loop reads them, and nothing else."""
    from configs.repghost import get_config
    from train.data import pipeline

    batches = pipeline.train_batches(get_config("small").data, batch_size=BATCH, seed=0)

    def run() -> None:
        for _ in range(STEPS):
            next(batches)

    return run


def loop(streaming: bool = False) -> Callable[[], None]:
    """`STEPS` steps of the loop: placing, logging, checks; no evaluation, no saving.

    `streaming` reads and augments data as a run does; otherwise one host batch comes back always.
    """
    import itertools

    import jax

    from train import loop as module
    from train.reporting import Reporter

    plan, state = _plan()
    reporter = Reporter(tempfile.mkdtemp(), STEPS, BATCH)
    batches = module._batches(plan.config, 0)
    if not streaming:
        batches = itertools.repeat(next(batches))

    class Nothing:
        def __getattr__(self, name):
            return lambda *a, **k: None

    def run() -> None:
        nonlocal state
        reporter.rows.clear()
        state, _ = module._train(plan, state, 0, batches, reporter, Nothing(), lambda variables: {})
        jax.block_until_ready(state)

    return run


def run(quick: bool = False) -> Path:
    """Write `results/loop_overhead.md`."""
    rounds, steps = (4, 1) if quick else (12, 1)
    rows = []
    for threads in (1, 2):
        samples = measure(CONTENDERS, threads, rounds, steps)
        names = [contender.name for contender in CONTENDERS]
        for kind in ("wall", "cpu"):
            rows.append(
                [
                    str(threads),
                    kind,
                    *(samples[name].cell(kind) for name in names),
                    ratio(samples["loop"], [samples["bare"]], kind),
                    ratio(samples["streaming"], [samples["bare"]], kind),
                ]
            )
    body = (
        f"RepGhost 0.25x on digits at 32x32, batch {BATCH}, {STEPS} steps a sample. The loop "
        "places each batch, logs twice and checks for non-finite losses; evaluation and "
        "checkpoints are off. It gets the same host batch every step; in the next column it also "
        "reads and augments its data on the same cores, which the column `data` does alone. Mark "
        "for loop / bare: 1.03.\n\n"
        + markdown(
            [
                "threads",
                "time",
                "bare step",
                "loop",
                "loop with data",
                "data",
                "loop / bare",
                "with data / bare",
            ],
            rows,
        )
    )
    return write_report("loop_overhead", "Overhead of the training loop", body)
