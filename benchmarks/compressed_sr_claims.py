"""What small restoration networks gain over bicubic enlargement, by preset and seed.

`python -m benchmarks.compressed_sr_claims PRESET [--seeds 0 1 2] [--set key=value ...] [--after
PRESET]` trains each, beginning with the weights of another preset where one is named, and appends a
row to `results/compressed_sr_runs.csv`; `... table` writes
`results/compressed_sr_claims.md`. `swapped_gain` is what remains of the gain when every test
picture's input is replaced by that of the next: with leakage of targets it would survive.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks import runs
from benchmarks.measure import RESULTS, machine, markdown

CSV = RESULTS / "compressed_sr_runs.csv"
CONFIG = Path(__file__).parents[1] / "configs" / "compressed_sr.py"


def one(preset: str, seed: int, changes: list[str], after: str = "") -> dict:
    """Train a preset with a seed, after another one where `after` names it, and measure it."""
    from train.checkpoints import load_params
    from train.command_line import read_flags
    from train.loop import Plan, fit
    from train.process import prepare_process

    prepare_process()

    def trained(preset, folder, changes):
        flags = [f"--config={CONFIG}:{preset}", f"--config.seed={seed}", f"--workdir={folder}"]
        flags += [f"--config.{change}" for change in changes]
        config, _ = read_flags(["claims", *flags], need_workdir=True)
        return config, fit(config, folder)

    with tempfile.TemporaryDirectory() as folder:
        first, second = (str(Path(folder) / name) for name in ("first", "second"))
        begin, busy = time.perf_counter(), time.process_time()
        begun = []
        if after:
            trained(after, first, [])
            begun = [f"init_from={first}"]
        config, numbers = trained(preset, second, [*changes, *begun])
        seconds, busy = time.perf_counter() - begin, time.process_time() - busy
        params = load_params(second, ema=config.ema.decay > 0)
        swapped = swapped_gain(Plan(config).task, params, config)
    return {
        "preset": f"{preset} after {after}" if after else preset,
        "changes": " ".join(changes),
        "seed": seed,
        "steps": config.steps,
        **{k: round(numbers[k], 4) for k in ("psnr", "bicubic_psnr", "gain", "ensemble_gain")},
        "swapped_gain": round(swapped, 3),
        "cpu_seconds": round(busy),
        "seconds": round(seconds),
    }


def swapped_gain(task, variables, config) -> float:
    """The gain over bicubic with each test picture's input replaced by the next one's."""
    from jaxmodels.restoration import metrics
    from train.data import pipeline

    family, options = pipeline.resolve(config.data)
    images = hasattr(family, "eval_images")
    found = list((family.eval_images if images else family.eval_videos)(options))
    gains = []
    for number, (_, lr, hr) in enumerate(found):
        other = found[(number + 1) % len(found)][1]
        inputs = other / np.float32(255) if images else other
        sr = metrics.to_uint8(task.restore(variables, inputs))
        if images:
            pairs = [(sr, family.upsample(lr, task.scale), hr)]
        else:
            pairs = [(a, task.enlarged(b), c) for a, b, c in zip(sr, lr, hr)]
        gains += [metrics.psnr(a, c) - metrics.psnr(b, c) for a, b, c in pairs]
    return float(np.mean(gains))


def table() -> Path:
    """Means over seeds, with the range of single runs."""
    groups = defaultdict(list)
    for row in runs.read(CSV):
        groups[(row["preset"], row["changes"], row["steps"])].append(row)
    rows = []
    for (preset, changes, steps), own in groups.items():
        cells = [preset, changes or "-", steps, len(own), own[0]["bicubic_psnr"]]
        for key in ("gain", "ensemble_gain", "swapped_gain"):
            values = [float(run[key]) for run in own]
            cells.append(f"{np.mean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})")
        cells.append(f"{np.mean([float(run['cpu_seconds']) for run in own]):.0f}")
        rows.append(cells)
    header = ["preset", "changes", "steps", "seeds", "bicubic dB", "gain dB", "x8 ensemble",
              "inputs swapped", "CPU s"]  # fmt: skip
    path = RESULTS / "compressed_sr_claims.md"
    text = (
        "# Gain over bicubic enlargement\n\n"
        "`python -m benchmarks.compressed_sr_claims PRESET --seeds ...`, then `table`, written on "
        f"{machine()}. Mean over seeds (range) of the mean gain of the test pictures or clips in "
        "dB; every single run is in compressed_sr_runs.csv. CPU seconds include compilation and "
        "evaluation.\n\n"
    )
    path.write_text(text + markdown(header, rows))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--after", default="", metavar="PRESET")
    arguments = parser.parse_args()
    if arguments.preset != "table":
        for seed in arguments.seeds:
            row = one(arguments.preset, seed, arguments.set, arguments.after)
            runs.append(CSV, row)
            print(row, flush=True)
    print(table().read_text())


if __name__ == "__main__":
    main()
