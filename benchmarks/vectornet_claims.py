"""VectorNet's claims: `python -m benchmarks.vectornet_claims [--cells NAME ...] [--seeds N]`.

Every cell is a preset of configs/vectornet.py with some keys changed; the scenes are the same for
all cells and seeds, a seed draws the parameters, the order of examples and the hidden nodes. A
finished run is a row of `results/vectornet_runs.csv` and is not repeated; `results/
vectornet_claims.md` is written from the rows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import runs
from benchmarks.measure import RESULTS, machine, markdown, versions

RUNS = RESULTS / "vectornet_runs.csv"
MEASURES = ("ADE", "DE@1s", "DE@2s", "DE@3s", "miss_rate")
EXTRA = ("node_loss", "node_loss_of_mean")
COLUMNS = ("cell", "seed", "steps", "seconds", *MEASURES, *EXTRA)
BASELINE = "constant velocity"
LONG = {"steps": 2400, "schedule.boundaries": (960, 1440, 1920)}
# Cell -> preset, changed keys, seeds.
CELLS: dict[str, tuple[str, dict, int]] = {
    "map and agents": ("small", {}, 5),
    "target's track only": ("track", {}, 5),
    "no map": ("no_map", {}, 3),
    "map and agents, id_scale 1": ("small", {"model_args.id_scale": 1.0}, 3),
    "node completion": ("complete", {}, 3),
    "map and agents, 2400 steps": ("small", LONG, 3),
    "target's track only, 2400 steps": ("track", LONG, 3),
    "no map, 2400 steps": ("no_map", LONG, 3),
    "node completion, 2400 steps": ("complete", LONG, 3),
    "raster ConvNet": ("raster", {}, 3),
}


def main() -> None:
    """Run what is missing, write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vectornet_claims", description=__doc__
    )
    parser.add_argument("--cells", nargs="*", default=list(CELLS), help="names of cells")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(5)))
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for cell in arguments.cells:
            done = {(row["cell"], int(row["seed"])) for row in runs.read(RUNS)}
            if seed < CELLS[cell][2] and (cell, seed) not in done:
                run_cell(cell, seed)
                write_table()
    write_table()


def run_cell(cell: str, seed: int) -> None:
    """Train and append a row; the first run also records constant velocity."""
    from configs import vectornet
    from train.loop import fit
    from train.process import prepare_process

    prepare_process()
    preset, changes, _ = CELLS[cell]
    config = vectornet.get_config(preset)
    config.update_from_flattened_dict({**changes, "seed": seed, "checkpoint.every": 0})
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        numbers = fit(config, folder)
    if not numbers:
        raise SystemExit("stopped; the same command goes on with this run")
    found = {"cell": cell, "seed": seed, "steps": config.steps}
    found["seconds"] = round(time.perf_counter() - start, 1)
    found |= {name: round(numbers[name], 5) for name in (*MEASURES, *EXTRA) if name in numbers}
    new = [found]
    if not any(row["cell"] == BASELINE for row in runs.read(RUNS)):
        baseline = {name: round(numbers[f"constant_velocity_{name}"], 5) for name in MEASURES}
        new.insert(0, {"cell": BASELINE, "seed": 0, "steps": 0, "seconds": 0, **baseline})
    runs.append(RUNS, *({name: row.get(name, "") for name in COLUMNS} for row in new))


def write_table() -> Path:
    """`results/vectornet_claims.md`: medians over seeds, and the ratios that are claimed."""
    table, median = [], {}
    for cell in (BASELINE, *CELLS):
        found = [row for row in runs.read(RUNS) if row["cell"] == cell]
        if not found:
            continue
        values = {
            name: [float(row[name]) for row in found if row[name]] for name in (*MEASURES, *EXTRA)
        }
        median[cell] = statistics.median(values["DE@3s"])
        middle = [f"{statistics.median(v):.3g}" if v else "" for v in values.values()]
        spread = f"{min(values['DE@3s']):.2f}-{max(values['DE@3s']):.2f}"
        table.append([cell, len(found), *middle, spread])
    ratios = ""
    others = ("target's track only", "no map", "raster ConvNet")
    for ours, compared in (
        ("map and agents", (BASELINE, *others)),
        ("map and agents, 2400 steps", (BASELINE, *(f"{name}, 2400 steps" for name in others))),
    ):
        for other in compared:
            if ours in median and other in median:
                ratios += f"- {ours} over {other}: {median[ours] / median[other]:.2f}\n"
    path = RESULTS / "vectornet_claims.md"
    path.write_text(
        "# VectorNet on simulated traffic\n\n"
        f"`python -m benchmarks.vectornet_claims`, on {machine()}. Versions: {versions()}.\n"
        "1,500 training and 300 validation scenes, batch 32, Adam 1e-3, x 0.3 after 40, 60 and 80 "
        "% of the steps; 600 steps unless the name says otherwise. Medians over seeds, metres; the "
        "last column is the range of DE@3s.\n\n"
        + markdown(["model", "seeds", *MEASURES, *EXTRA, "DE@3s range"], table)
        + "\nRatios of DE@3s:\n\n"
        + ratios
    )
    return path


if __name__ == "__main__":
    main()
