"""What small restoration networks gain over bicubic enlargement, by preset and seed.

`python -m benchmarks.compressed_sr_claims PRESET [--seeds 0 1 2] [--set key=value ...] [--after
PRESET]` trains each, beginning with the weights of another preset where one is named, and appends a
row to `results/compressed_sr_runs.csv`; `... table` writes
`results/compressed_sr_claims.md`. `swapped_gain` is what remains of the gain when every test
picture's input is replaced by that of the next: with leakage of targets it would survive.

`... seams [--seeds 0 1 2]` trains the small preset and restores its test pictures as a whole and in
tiles: rows of `results/compressed_sr_seams.csv`.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks import runs
from benchmarks.measure import RESULTS, machine, markdown

CSV = RESULTS / "compressed_sr_runs.csv"
SEAMS = RESULTS / "compressed_sr_seams.csv"
# (tile, overlap) in input pixels; the test pictures are 96 x 96 and padded by 8.
TILES = ((32, 8), (48, 16), (64, 32))
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


def seams(seed: int) -> list[dict]:
    """What tiles change: PSNR (dB) of whole and tiled pictures to the original and to each other,
    and the mean step that tiling adds where a tile begins or ends, elsewhere, and what the picture
    itself has from pixel to pixel (in 255ths)."""
    import dataclasses

    from jaxmodels.restoration import inference, metrics
    from train.checkpoints import load_params
    from train.command_line import read_flags
    from train.data import pipeline
    from train.loop import Plan, fit
    from train.process import prepare_process

    prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--config={CONFIG}:small", f"--config.seed={seed}", f"--workdir={folder}"]
        config, _ = read_flags(["claims", *flags], need_workdir=True)
        fit(config, folder)
        params = load_params(folder, ema=config.ema.decay > 0)
    task = Plan(config).task
    family, options = pipeline.resolve(config.data)
    rows = []
    pictures = list(family.eval_images(options))
    wholes = [task.restore(params, lr / np.float32(255)) for _, lr, _ in pictures]
    for (tile, overlap), blend in itertools.product(TILES, inference.BLENDS):
        pieces = dataclasses.replace(task, tile=tile, tile_overlap=overlap, tile_blend=blend)
        for (name, lr, hr), whole in zip(pictures, wholes):
            tiled = pieces.restore(params, lr / np.float32(255))
            # As `restore` pads them: to the next multiple of the window.
            side = lr.shape[1] + task.window - lr.shape[1] % task.window
            starts = inference.tile_starts(side, tile, overlap)
            edges = {p * task.scale - 1 for start in starts for p in (start, start + tile)}
            steps = [255 * np.abs(np.diff(x, axis=1)).mean((0, 2)) for x in (tiled - whole, whole)]
            at = sorted(e for e in edges if 0 <= e < len(steps[0]))
            bytes_of = [metrics.to_uint8(x) for x in (whole, tiled)]
            rows.append(
                {
                    "seed": seed,
                    "picture": name,
                    "tile": tile,
                    "overlap": overlap,
                    "blend": blend,
                    "whole_psnr": round(metrics.psnr(bytes_of[0], hr), 3),
                    "tiled_psnr": round(metrics.psnr(bytes_of[1], hr), 3),
                    "between": round(metrics.psnr(bytes_of[1], bytes_of[0]), 2),
                    "step_at_edges": round(float(steps[0][at].mean()), 3),
                    "step_elsewhere": round(float(np.delete(steps[0], at).mean()), 3),
                    "picture_step": round(float(steps[1].mean()), 3),
                }
            )
    return rows


def _seam_table() -> str:
    groups = defaultdict(list)
    for row in runs.read(SEAMS):
        groups[(row["tile"], row["overlap"], row["blend"])].append(row)
    names = (
        "whole_psnr",
        "tiled_psnr",
        "between",
        "step_at_edges",
        "step_elsewhere",
        "picture_step",
    )
    lines = [
        [*setting, len(own), *(f"{np.mean([float(r[n]) for r in own]):.3f}" for n in names)]
        for setting, own in groups.items()
    ]
    if not lines:
        return ""
    header = ["tile", "overlap", "blend", "pictures", "whole dB", "tiled dB", "between dB",
              "step at edges", "step elsewhere", "the picture's own"]  # fmt: skip
    return (
        "\n## Seams\n\n`... seams`: the small network on whole pictures and in tiles (input "
        "pixels). Steps are mean absolute changes from column to column in 255ths: of what tiling "
        "adds, where a tile begins or ends and elsewhere, and of the picture.\n\n"
        + markdown(header, lines)
    )


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
    path.write_text(text + markdown(header, rows) + _seam_table())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", help="a preset, `seams` or `table`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--after", default="", metavar="PRESET")
    arguments = parser.parse_args()
    if arguments.preset != "table":
        for seed in arguments.seeds:
            if arguments.preset == "seams":
                runs.append(SEAMS, *seams(seed))
                continue
            row = one(arguments.preset, seed, arguments.set, arguments.after)
            runs.append(CSV, row)
            print(row, flush=True)
    print(table().read_text())


if __name__ == "__main__":
    main()
