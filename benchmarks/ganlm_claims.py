"""What GanLM's losses do on docstrings: detection, denoising, a pre-trained start.

`python -m benchmarks.ganlm_claims [--recipes NAME ...] [--seeds 0 1 ...] [--tunings NAME ...]`
pre-trains every recipe, fine-tunes each result and, beside them, random weights, and appends a row
a run to `results/ganlm_runs.jsonl`; finished rows are not repeated, but a pre-training whose
fine-tuning is missing is run again. `results/ganlm_claims.md` is written from the rows.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks import runs
from benchmarks.measure import RESULTS, machine, markdown, versions
from configs.ganlm import get_config
from train.data.fairseq_files import dictionary_size, mask_id

RUNS = RESULTS / "ganlm_runs.jsonl"


def vocabulary(pieces: int) -> dict:
    """The changes of `small` to a dictionary of so many pieces."""
    return {
        "data.options.pieces": pieces,
        "data.options.vocab_size": dictionary_size(pieces),
        "model_args.vocab_size": dictionary_size(pieces),
        "task_args.mask_id": mask_id(pieces),
    }


# Name -> (preset of the pre-training, changed keys).
RECIPES: dict[str, tuple[str, dict]] = {
    "three losses": ("small", {}),
    "without denoising": ("small", {"task_args.inconsistency_weight": 0.0}),
    "generator alone": (
        "small",
        {"task_args.inconsistency_weight": 0.0, "task_args.discriminator_weight": 0.0},
    ),
    "functions": ("functions", {}),
    "messages": ("messages", {}),
    "three losses, 3000 steps": ("small", {"steps": 3000, "schedule.warmup_steps": 300}),
    # More of a span's pieces are determined by those around them.
    "three losses, 400 pieces": ("small", vocabulary(400)),
}
# With a vocabulary of their own: nothing here is tuned from them.
UNTUNED = ("functions", "messages", "three losses, 400 pieces")
RANDOM = "random weights"
# Name -> (preset, what is not taken over, measures).
TUNINGS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "reversal": ("reversal", "", ("next_token_accuracy", "exact_match", "greedy_exact_match")),
    "summaries": ("summaries", "", ("loss", "next_token_accuracy", "rouge1", "bleu")),
    "pairs": ("pairs", "classification_heads", ("accuracy", "majority_accuracy", "loss")),
}
PRETRAINING = (
    "generator_loss", "unigram_entropy", "denoising_loss", "denoising_over_generator",
    "discriminator_loss", "verdict_entropy", "detection_accuracy", "majority_accuracy",
    "replace_acc", "non_replace_acc",
)  # fmt: skip


def run(config, seed: int, folder: str, **what) -> None:
    """Train, and append what the run reports."""
    from train.loop import fit

    config.seed = seed
    config.log_every = config.steps
    config.eval.every = config.checkpoint.every = 0
    begin = time.process_time()
    numbers = fit(config, folder)
    row = {**what, "seed": seed, "steps": config.steps}
    row |= {k: v if isinstance(v, str) else round(float(v), 5) for k, v in numbers.items()}
    row["cpu_seconds"] = round(time.process_time() - begin)
    runs.append(RUNS, row)
    print(row, flush=True)


def one(recipe: str, tunings: list[str], seed: int) -> None:
    """What is missing of a recipe and a seed."""
    done = {(r["recipe"], r["tuning"], r["seed"]) for r in runs.read(RUNS)}
    wanted = [t for t in tunings if (recipe, t, seed) not in done]
    if recipe in UNTUNED:
        wanted = []
    fresh = recipe != RANDOM and (recipe, "", seed) not in done
    if not wanted and not fresh:
        return
    with tempfile.TemporaryDirectory() as folder:
        begun = ""
        if recipe != RANDOM:
            preset, changes = RECIPES[recipe]
            config = get_config(preset)
            config.update_from_flattened_dict(changes)
            begun = str(Path(folder) / "pretraining")
            if fresh:
                run(config, seed, begun, recipe=recipe, tuning="")
            else:
                from train.loop import fit

                config.seed, config.eval.every, config.checkpoint.every = seed, 0, 0
                fit(config, begun)
        for tuning in wanted:
            preset, skipped, _ = TUNINGS[tuning]
            config = get_config(preset)
            config.init_from = begun
            if begun and skipped:
                config.init_skip = skipped
            run(config, seed, str(Path(folder) / tuning), recipe=recipe, tuning=tuning)


def report() -> Path:
    """Means and halves of Student's 95 % intervals over seeds."""
    from train.tasks.ganlm_pretraining import binary_entropy

    found = runs.read(RUNS)
    for row in found:
        if "replace_rate" in row:  # runs from before the task reported the entropy
            row.setdefault("verdict_entropy", round(binary_entropy(row["replace_rate"]), 5))

    def table(names, tuning: str, measures) -> str:
        cells = []
        for name in names:
            own = [r for r in found if r["recipe"] == name and r["tuning"] == tuning]
            if own:
                shown = [runs.mean([r[m] for r in own if m in r], ".4f") for m in measures]
                cells.append([name, str(own[0]["steps"]), str(len(own)), *shown])
        return markdown(["start" if tuning else "recipe", "steps", "seeds", *measures], cells)

    text = (
        "# What GanLM's losses do\n\n"
        f"`python -m benchmarks.ganlm_claims`, {machine()}; {versions()}. Held-out modules. "
        "Mean ± half of Student's 95 % interval over seeds; losses are bits a target.\n\n"
        "Pre-training:\n\n" + table(RECIPES, "", PRETRAINING)
    )
    for tuning, (_, _, measures) in TUNINGS.items():
        if not any(r["tuning"] == tuning for r in found):
            continue
        text += f"\nFine-tuning, `{tuning}`:\n\n" + table([*RECIPES, RANDOM], tuning, measures)
    path = RESULTS / "ganlm_claims.md"
    path.write_text(text, encoding="utf-8")
    return path


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*RECIPES, RANDOM]
    parser.add_argument("--recipes", nargs="*", default=names, choices=names)
    parser.add_argument("--tunings", nargs="*", default=list(TUNINGS), choices=list(TUNINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    from train.process import prepare_process

    prepare_process()
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            one(recipe, arguments.tunings, seed)
    print(report().read_text())


if __name__ == "__main__":
    main()
