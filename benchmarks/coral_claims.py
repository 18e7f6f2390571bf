"""CORAL's claims: `python -m benchmarks.coral_claims [--code-review DIR] [--cells NAME ...]`.

Every cell is a history, a split and options; every seed draws the simulator, the split, the
parameters and the negatives anew. A finished run is a row of `results/coral_runs.csv` and is not
repeated; `results/coral.md` is written from the rows. `DIR` holds `dpdk.csv.gz` and
`golang_tools.csv.gz`, which are read in place.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from benchmarks import runs
from benchmarks.measure import RESULTS, machine, markdown, versions

RUNS = RESULTS / "coral_runs.csv"
COLUMNS = ("cell", "seed", "steps", "seconds", "loss", "numbers")
FIVE = ("pr_user", "pr_file", "pr_word", "file_word", "word_word")
DPDK = {
    "file": "dpdk.csv.gz",
    "acked_as_reviewers": True,
    "reviewed_only": True,
    "train_from": "2022-07-01",
    "max_train_changes": 4000,
    "test_from": "2025-01-01",
}
GOLANG = {
    "file": "golang_tools.csv.gz",
    "reviewed_only": True,
    "train_from": "2022-07-01",
    "split": "temporal",
    "test_from": "2025-01-01",
    "test_until": "2025-07-01",
}
DPDK_TEMPORAL = {**DPDK, "split": "temporal", "test_until": "2025-04-01"}
# Cell -> preset, data options, other keys of the config, seeds.
CELLS: dict[str, tuple[str, dict, dict, int]] = {
    "simulator, random": ("small", {"split": "random"}, {}, 5),
    "simulator, temporal": ("small", {"split": "temporal"}, {}, 5),
    "small project": ("small", {"n_areas": 1, "n_people": 15, "n_repos": 1}, {}, 5),
    "simulator, relu at the end": ("small", {}, {"model_args.final_activation": "relu"}, 1),
    "simulator, one-hot": ("small", {}, {"model_args.input": "onehot"}, 5),
    "dpdk, random": ("csv", DPDK, {}, 5),
    "dpdk, temporal": ("csv", DPDK_TEMPORAL, {}, 5),
    "golang_tools, temporal": ("csv", GOLANG, {}, 5),
    "dpdk, people and files": ("csv", {**DPDK, "relations": FIVE[:2]}, {}, 3),
    "dpdk, people and words": (
        "csv",
        {**DPDK, "relations": ("pr_user", "pr_word", "word_word")},
        {},
        3,
    ),
    "dpdk, people": ("csv", {**DPDK, "relations": FIVE[:1]}, {}, 3),
    "dpdk, one-hot": ("csv", DPDK, {"model_args.input": "onehot"}, 3),
}


def main() -> None:
    """Run what is missing, write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coral_claims", description=__doc__)
    parser.add_argument("--code-review", default="", help="folder of dpdk.csv.gz and golang_tools")
    parser.add_argument("--cells", nargs="*", default=[""], help="beginnings of cells' names")
    parser.add_argument("--seeds", type=int, default=0, help="at most so many a cell")
    arguments = parser.parse_args()
    wanted = tuple(arguments.cells)
    for seed in range(5):
        for cell, (_, options, _, seeds) in CELLS.items():
            if not cell.startswith(wanted) or seed >= min(seeds, arguments.seeds or seeds):
                continue
            if "file" in options and not arguments.code_review:
                continue
            if (cell, str(seed)) not in {(r["cell"], r["seed"]) for r in runs.read(RUNS)}:
                run_cell(cell, seed, arguments.code_review)
                write_table()
    write_table()


def run_cell(cell: str, seed: int, folder: str) -> None:
    """One training run through the project's loop; its final numbers become a row."""
    from train.command_line import load_config
    from train.loop import fit

    preset, options, other, _ = CELLS[cell]
    config = load_config(f"configs/coral.py:{preset}")
    config.unlock()
    options = dict(options)
    if "file" in options:
        options["path"] = str(Path(folder) / options.pop("file"))
    config.data.options.update(options, split_seed=seed)
    if preset == "small":
        config.data.options.simulator_seed = seed
    config.update_from_flattened_dict(other)
    config.seed = seed
    config.eval.every = config.checkpoint.every = 0
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as workdir:
        numbers = fit(config, workdir)
        lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    trained = [row for row in map(json.loads, lines) if row["kind"] == "train"][-1]
    kept = {k: round(v, 5) for k, v in numbers.items() if k != "steps"}
    kept["sampled_loss"] = round(trained["sampled_loss"], 5)
    seconds = round(time.perf_counter() - begin, 1)
    row = (cell, seed, trained["step"], seconds, round(trained["loss"], 4), json.dumps(kept))
    runs.append(RUNS, dict(zip(COLUMNS, row)))


def write_table() -> None:
    """`results/coral.md` from the runs: means over seeds with 95 % intervals."""
    of_cell: dict[str, list[dict]] = {}
    for row in runs.read(RUNS):
        numbers = {**json.loads(row["numbers"]), "loss": float(row["loss"])}
        numbers["margin"] = numbers["coral_mrr"] - numbers["popularity_mrr"]
        of_cell.setdefault(row["cell"], []).append(numbers)

    def cell_text(own, name):
        return runs.mean([run[name] for run in own if name in run], ".3f") or "-"

    lines, strata = [], []
    for cell in (c for c in CELLS if c in of_cell):
        own = of_cell[cell]
        for model in ("coral", "rule_based", "recency", "popularity", "random"):
            metrics = [f"{model}_{m}" for m in ("top1", "top3", "top5", "top7", "mrr")]
            lines.append([cell, len(own), model, *(cell_text(own, m) for m in metrics)])
        for size in ("small", "medium", "large"):
            if any(f"{size}_projects_queries" in run for run in own):
                names = ("queries", "coral_mrr", "rule_based_mrr", "popularity_mrr")
                strata.append(
                    [cell, size, *(cell_text(own, f"{size}_projects_{n}") for n in names)]
                )
    losses = [
        [cell, *(cell_text(own, n) for n in ("loss", "sampled_loss", "margin"))]
        for cell, own in of_cell.items()
    ]
    text = (
        "# CORAL: does it recommend the right reviewers?\n\n"
        f"`python -m benchmarks.coral_claims --code-review DIR`, {time.strftime('%Y-%m-%d')}, on "
        f"{machine()}.\nVersions: {versions()}.\n\n"
        "Mean ± half of the 95 % Student interval over seeds; a seed draws the simulated history "
        "or the random split, the parameters and the negatives. The rows behind this are in "
        "`coral_runs.csv`.\n\n"
        + markdown(["history", "seeds", "model", "top-1", "top-3", "top-5", "top-7", "MRR"], lines)
        + "\n## By size of the repository (developers seen in training)\n\n"
        + markdown(["history", "size", "changes", "CORAL", "rule-based", "popularity"], strata)
        + "\n## Training loss, that of sampled pairs, and MRR above popularity\n\n"
        + markdown(["history", "loss", "sampled pairs", "margin"], losses)
    )
    part = (RESULTS / "coral.md").with_suffix(".tmp")
    part.write_text(text)
    part.rename(RESULTS / "coral.md")


if __name__ == "__main__":
    main()
