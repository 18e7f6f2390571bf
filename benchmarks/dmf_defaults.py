"""Time of the default study: 1,008 runs of d = 10, L = 2..5, R = 1..6, detectors on every step.

    python benchmarks/dmf_defaults.py [--seeds 42] [--lanes 32] [--chunk 128]

Prints wall and CPU seconds of the whole study (compilation included), runs with A = B = R, steps,
steps per second and decompositions. One XLA device a core, as `python -m theory` has it.
"""

import argparse
import os
import time

parser = argparse.ArgumentParser()
parser.add_argument("--seeds", type=int, default=42)
parser.add_argument("--lanes", type=int, default=32)
parser.add_argument("--chunk", type=int, default=128)
parser.add_argument("--devices", type=int, default=len(os.sched_getaffinity(0)))
ARGS = parser.parse_args()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={ARGS.devices}"

import jax  # noqa: E402 - the flags must be set before jax is imported

jax.config.update("jax_enable_x64", True)

from theory import experiments, sweep  # noqa: E402


def main():
    specs = experiments.defaults(seeds=ARGS.seeds)
    wall, cpu = time.perf_counter(), time.process_time()
    records = sweep.sweep(specs, lanes=ARGS.lanes, chunk=ARGS.chunk)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    for depth in (2, 3, 4, 5):
        steps = [r["steps"] for r in records if r["L"] == depth]
        print(f"L = {depth}: {len(steps)} runs, {sum(steps):,} steps, longest {max(steps):,}")
    steps = sum(r["steps"] for r in records)
    good = sum(experiments.both_counts(r) for r in records)
    decompositions = sum(r["decompositions"] for r in records)
    print(
        f"{len(records)} runs (A = B = R in {good}), {steps:,} steps: {wall:.1f} s wall, "
        f"{cpu:.1f} s CPU on {len(jax.devices())} devices; {steps / wall:,.0f} steps/s of wall "
        f"time, {1e6 * cpu / steps:.2f} us of CPU a step; {decompositions:,} decompositions"
    )


if __name__ == "__main__":
    main()
