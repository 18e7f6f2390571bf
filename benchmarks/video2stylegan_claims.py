"""What Video2StyleGAN's small recipes show, over seeds.

`python -m benchmarks.video2stylegan_claims [STUDY ...] [--seeds 0 1 ...] [--set key=value ...]`
trains each study with every seed and appends a row to `results/video2stylegan_runs.jsonl`; finished
rows are not repeated. `results/video2stylegan_claims.md` is written from the rows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import runs
from benchmarks.measure import RESULTS, machine, markdown, versions

RUNS = RESULTS / "video2stylegan_runs.jsonl"
CONFIGS = Path(__file__).parents[1] / "configs"
# Study -> (config, flags).
STUDIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "inversion": ("video2stylegan.py", ()),
    "control": ("pose_control.py", ()),
    "w": ("e4e.py", ("task_args.delta_start=1000000",)),
    "e4e": ("e4e.py", ()),
    "psp": ("e4e.py:psp", ()),
}
TABLES = {
    "Codes of clips (specification item 6: relative error at most 0.35, steadier with reuse)": (
        ("inversion",),
        ("relative_mse", "flicker_static_reuse", "flicker_static_full", "static_clips_steadier"),
    ),
    "Flicker of moving clips without noise (no gain is claimed)": (
        ("inversion",),
        ("flicker_moving_reuse", "flicker_moving_full"),
    ),
    "Control (item 7: correlation above 0.8)": (
        ("control",),
        ("yaw_correlation_codes", "yaw_mean_error_codes", "relative_codes"),
    ),
    "Encoders of single images: one code for all layers (w), e4e, pSp": (
        ("w", "e4e", "psp"),
        ("relative_mse", "delta", "lec", "lec_of_mean_latent"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="changes")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.studies) - set(STUDIES))
    if unknown:
        parser.error(f"unknown study {', '.join(unknown)}; there are {', '.join(STUDIES)}")
    changes = " ".join(arguments.changes)
    for seed in arguments.seeds:
        for study in arguments.studies or STUDIES:
            if (study, seed, changes) not in {
                (r["study"], r["seed"], r["changes"]) for r in runs.read(RUNS)
            }:
                one(study, seed, arguments.changes)
    print(report().read_text())


def one(study: str, seed: int, changes: list[str]) -> None:
    """Train, and append what the run reports."""
    from train.command_line import read_flags
    from train.loop import fit
    from train.process import prepare_process

    prepare_process()
    config_file, own = STUDIES[study]
    flags = [f"--config={CONFIGS / config_file}", f"--config.seed={seed}"]
    flags += [f"--config.{flag}" for flag in (*own, *changes)]
    begin, busy = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config, _ = read_flags(["claims", *flags, f"--workdir={folder}"], need_workdir=True)
        numbers = fit(config, folder)
    row = {
        "study": study,
        "seed": seed,
        "changes": " ".join(changes),
        "steps": config.steps,
        **{k: v if isinstance(v, str) else float(v) for k, v in numbers.items()},
        "cpu_seconds": round(time.process_time() - busy),
        "seconds": round(time.perf_counter() - begin),
    }
    runs.append(RUNS, row)


def cell(values: list) -> str:
    """Mean and standard deviation, or texts as they are."""
    if not values:
        return "-"
    if isinstance(values[0], str):
        return "; ".join(values)
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return f"{statistics.mean(values):.4g} +- {statistics.stdev(values):.2g}"


def report() -> Path:
    """`results/video2stylegan_claims.md` from the rows."""
    found, blocks = runs.read(RUNS), []
    for title, (studies, names) in TABLES.items():
        lines = []
        for changes in dict.fromkeys(r["changes"] for r in found):
            for study in studies:
                mine = [r for r in found if (r["study"], r["changes"]) == (study, changes)]
                if not mine:
                    continue
                seeds = ", ".join(str(r["seed"]) for r in mine)
                values = [cell([r[n] for r in mine if n in r]) for n in (*names, "cpu_seconds")]
                lines.append([f"{study} {changes}".strip(), seeds, *values])
        if lines:
            header = ["study", "seeds", *names, "CPU seconds"]
            blocks.append(f"## {title}\n\n{markdown(header, lines)}")
    path = RESULTS / "video2stylegan_claims.md"
    path.write_text(
        "# Video2StyleGAN's small recipes\n\n"
        "`python -m benchmarks.video2stylegan_claims`, written on "
        f"{machine()}; {versions()}. Mean +- standard deviation over seeds; every run is in "
        f"`{RUNS.name}`.\n\n" + "\n".join(blocks),
        encoding="utf-8",
    )
    return path


if __name__ == "__main__":
    main()
