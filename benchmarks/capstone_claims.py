"""CAPSTONE's claims on API documentation: how the pseudo query is chosen, over seeds.

    python -m benchmarks.capstone_claims --path DATA --work DIR [--seeds 3] [--steps N]

Every run's measures are appended to `capstone_runs.jsonl` below `--work`; runs that are there are
not repeated. The table is written to `benchmarks/results/capstone_claims.md` at the end (or now,
with `--table`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import runs
from configs.capstone import get_config

RESULTS = Path(__file__).resolve().parent / "results"
# Name -> data options. All documents of a run have the same number of tokens in training and index.
ARMS: dict[str, dict] = {
    "gradual": {"expansion": "gradual"},
    "no expansion": {"expansion": "", "body_length": 0, "views": 1},
    "random": {"expansion": "random"},
    "real query in training": {"expansion": "gold"},
    "fixed part 1 (most similar)": {"expansion": "1-part"},
    "fixed part 3 (least similar)": {"expansion": "3-part"},
    "first": {"expansion": "first"},
}
MEASURES = ("mrr@10", "ndcg@10", "success@10", "recall@100")


def configure(arm: str, seed: int, steps: int, path: str):
    """The small preset with an arm's options."""
    config = get_config("small")
    if steps:
        config.steps = steps
        config.schedule.warmup_steps = steps // 10
    config.seed = seed
    for key, value in {**ARMS[arm], "path": path, "curriculum_steps": config.steps}.items():
        config.data.options[key] = value
    return config.lock()


def table(rows: list[dict]) -> str:
    """Mean and 95 % interval of every arm and measure."""
    lines = [
        "| training | seeds | " + " | ".join(MEASURES) + " |",
        "|---" * (len(MEASURES) + 2) + "|",
    ]
    for arm in ARMS:
        own = [r for r in rows if r["arm"] == arm]
        if not own:
            continue
        cells = []
        for measure in MEASURES:
            cells.append(runs.mean([r[measure] for r in own], ".4f"))
        lines.append(f"| {arm} | {len(own)} | " + " | ".join(cells) + " |")
    bm25 = [f"{rows[0]['bm25_' + m]:.4f}" for m in MEASURES]
    return "\n".join([*lines, "| BM25 | | " + " | ".join(bm25) + " |"])


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True, help="where data is prepared")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--arms", default="", help="names, separated by semicolons")
    parser.add_argument("--table", action="store_true", help="only write the table")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "capstone_runs.jsonl"
    rows = runs.read(file)
    arms = args.arms.split(";") if args.arms else list(ARMS)
    for seed in range(0 if args.table else args.seeds):
        for arm in arms:
            if any(r["arm"] == arm and r["seed"] == seed for r in rows):
                continue
            from train.loop import fit

            config = configure(arm, seed, args.steps, args.path)
            folder = arm.split("(")[0].strip().replace(" ", "_")
            numbers = fit(config, args.work / f"{folder}-{seed}")
            if not numbers:
                return  # asked to stop; the same command goes on
            row = {"arm": arm, "seed": seed, "steps": config.steps, **numbers}
            rows.append({**row, **_baseline(config, args.work / "baseline.json")})
            runs.append(file, rows[-1])
    text = (
        "# CAPSTONE: how the pseudo query is chosen\n\n"
        f"`python -m benchmarks.capstone_claims`, {rows[0]['steps']} steps of "
        "`configs/capstone.py`, test queries over all documents of the API documentation; mean and "
        "95 % interval over seeds (no interval where there is one seed).\n\n" + table(rows)
    )
    (RESULTS / "capstone_claims.md").write_text(text + "\n")
    print(text)


def _baseline(config, file: Path) -> dict[str, float]:
    """BM25's measures, computed once."""
    from train.data import docstrings, pipeline

    if not file.exists():
        found = docstrings.retrieval_set(pipeline.resolve(config.data)[1], "test")
        file.write_text(json.dumps(found.baseline()))
    return json.loads(file.read_text())


if __name__ == "__main__":
    main()
