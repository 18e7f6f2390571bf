"""CoditT5's claims on held-out files: plans against plain generation, and re-ranking both ways.

    python -m benchmarks.coditt5_claims train [--recipes NAME ...] [--seeds 0 1 ...] [--path DATA]
        [--systems CoditT5 generator] [--workdir DIR] [--examples 256] [--repository CLONE]
    python -m benchmarks.coditt5_claims rerank --plans RUN ... --generator RUN ... [--path DATA]
        [--beams 5] [--examples 256] [--repository CLONE]

`train` runs every recipe with both systems and every seed, appends a row a run to
`results/coditt5_runs.csv` (a row that is there is not repeated) and writes
`results/coditt5_claims.md`. With `--workdir` the runs stay, in `DIR/RECIPE/SYSTEM_SEED`. Recipes
called `history` learn the edits of a clone, `--repository`, and are left out without one; the
others mend statements of Python's library. `--examples` are those tested on, 0 for all. For
`rerank`, RUN are finished runs of `configs/coditt5.py` and, as many, of
`configs/coditt5.py:generator` (with a clone: of recipe "history, Adafactor"); it writes
`results/coditt5_rerank.md` (`coditt5_rerank_history.md`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks import runs
from benchmarks.measure import RESULTS, machine, markdown, versions
from configs.coditt5 import get_config
from jaxmodels.language import edit_metrics, edit_plans
from train.data import edit_sources, edits, pipeline
from train.initialization import starting_variables
from train.loop import Plan, fit
from train.process import prepare_process
from train.rerank import rerank

CSV = RESULTS / "coditt5_runs.csv"
MEASURES = ("exact_match", "copy_rate", "bleu4", "sari", "gleu", "consistent")
# What the presets had at first. T5's initialization is meant for Adafactor, whose steps are
# relative to a tensor's size.
ADAMW = {
    "optimizer.name": "adamw",
    "optimizer.args": {"b1": 0.9, "b2": 0.98, "eps": 1e-8, "weight_decay": 0.01},
    "schedule.peak": 2e-3,
}
# Histories with the vocabulary of Python's library, which pre-training on it needs.
LIBRARY = {
    "model_args.vocab_size": 1024,
    "data.options.vocabulary": 1024,
    "data.options.vocabulary_of": "library",
    "data.options.max_source": 72,
    "data.options.max_target": 80,
}
# Both systems take the same number of steps in all. Name -> (preset, steps of CoditT5's own
# pre-training, steps of fine-tuning or of the generator's training, changed keys of both).
RECIPES: dict[str, tuple[str, int, int, dict]] = {
    "Adafactor": ("small", 0, 4000, {}),
    "from scratch": ("small", 0, 6000, ADAMW),
    "pre-trained": ("small", 2000, 4000, ADAMW),
    "short, large batches": ("small", 0, 1500, ADAMW | {"batch_size": 64, "schedule.peak": 3e-3}),
    "history, Adafactor": ("git", 0, 6000, {}),
    "history, Adafactor, twice as long": ("git", 0, 12000, {}),
    "history, pre-trained, Adafactor": ("git", 2000, 4000, {}),
    "history": ("git", 0, 6000, ADAMW | LIBRARY),
    "history, pre-trained": ("git", 2000, 4000, ADAMW | LIBRARY),
}
TARGETS = {"CoditT5": "plan", "generator": "sequence"}
# The generator has no pre-training: with as many steps in all and the same keys, it is another
# recipe's run.
SHARED = {
    ("pre-trained", "generator"): ("from scratch", "generator"),
    ("history, pre-trained", "generator"): ("history", "generator"),
    ("history, pre-trained, Adafactor", "generator"): ("history, Adafactor", "generator"),
}
PAIRED = ("exact_match", "copy_rate", "sari")
METRICS = ("exact_match", "copy_rate", "bleu4", "sari", "gleu")


def one(recipe: str, system: str, seed: int, arguments: argparse.Namespace) -> dict:
    """Train and test one system; its runs stay in `arguments.workdir`, if given."""
    preset, pretraining, steps, changes = RECIPES[recipe]
    if system == "generator":
        pretraining, steps = 0, pretraining + steps
    changes = {"data.options.target": TARGETS[system], **changes}
    data = ""
    if preset == "git":
        changes["data.options.repository"] = arguments.repository
        clone = Path(arguments.repository).resolve()
        name = clone.parent.name if clone.name == ".git" else clone.name.removesuffix(".git")
        data = f"{name}@{edit_sources.git_head(clone)[:12]}"
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.workdir or temporary)
        folder /= recipe.replace(",", "").replace(" ", "_")
        start = ""
        if pretraining:
            shared = {k: v for k, v in changes.items() if k in ADAMW}
            options = pipeline.resolve(_config(preset, seed, 1, changes, arguments).data)[1]
            if options["vocabulary_of"] == "data":
                # The library is to be read in the pieces of what comes after it, which then takes
                # them from the run that it starts from.
                vocabulary = folder / "vocabulary"
                vocabulary.mkdir(parents=True, exist_ok=True)
                edits.tokenizer(options).save(vocabulary)
                shared["data.options.tokenizer"] = str(vocabulary)
                shared["model_args.vocab_size"] = options["vocabulary"]
            # Nobody reads how well it does, which takes minutes on all examples.
            shared.update({"task_args.eval_beams": 0, "task_args.report_split": ""})
            config = _config("pretrain", seed, pretraining, shared, arguments)
            start = str(folder / f"pretraining_{seed}")
            fit(config, start)
        config = _config(preset, seed, steps, changes, arguments)
        config.init_from = start
        numbers = fit(config, str(folder / f"{system}_{seed}"))
    # A generator has no plans to be consistent with.
    found = {name: numbers.get(f"test_{name}", "") for name in MEASURES}
    measured = {k: v if v == "" else round(float(v), 3) for k, v in found.items()}
    seconds = round(time.perf_counter() - begin)
    return {"recipe": recipe, "system": system, "seed": seed, "data": data,
            "pretrain_steps": pretraining, "steps": steps, **measured,
            "seconds": seconds}  # fmt: skip


def _config(preset: str, seed: int, steps: int, changes: dict, arguments: argparse.Namespace):
    config = get_config(preset)
    config.seed, config.steps, config.log_every = seed, steps, max(steps // 5, 1)
    config.schedule.warmup_steps = max(steps // 60, 10)
    config.data.options.update(path=arguments.path, evaluated=arguments.examples)
    config.eval.every = config.checkpoint.every = 0
    with config.unlocked():
        optimizer = changes.get("optimizer.args", config.optimizer.args)
        changes = {k: v for k, v in changes.items() if k != "optimizer.args"}
        config.update_from_flattened_dict(changes)
        config.optimizer.args = optimizer
    return config


def train(arguments: argparse.Namespace) -> None:
    """Run what is missing and write the table."""
    prepare_process()
    rows = runs.read(CSV)
    known = {(r["recipe"], r["system"], int(r["seed"])) for r in rows}
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            for system in arguments.systems:
                if (recipe, system) in SHARED or (recipe, system, seed) in known:
                    continue
                row = one(recipe, system, seed, arguments)
                rows.append(row)
                runs.append(CSV, row)
                print(row, flush=True)
                write(rows)


def write(rows: list[dict]) -> Path:
    """Means with Student's 95 % intervals over seeds, and the paired differences."""
    table, paired = [], []
    for recipe in RECIPES:
        scores = {}
        for system in TARGETS:
            own = SHARED.get((recipe, system), (recipe, system))
            cell = [r for r in rows if (r["recipe"], r["system"]) == own]
            if not cell:
                continue
            shown = [runs.mean([r[m] for r in cell if r[m] != ""], ".1f") for m in MEASURES]
            steps = f"{cell[0]['pretrain_steps']} + {cell[0]['steps']}"
            if own == (recipe, system):
                data = ", ".join(sorted({r["data"] for r in cell}))
                table.append([recipe, system, data, steps, str(len(cell)), *shown])
            scores[system] = {int(r["seed"]): r for r in cell}
        if len(scores) == 2 and any(r["recipe"] == recipe for r in rows):
            seeds = sorted(set(scores["CoditT5"]) & set(scores["generator"]))
            differences = [
                runs.mean([float(scores["CoditT5"][s][m]) - float(scores["generator"][s][m])
                           for s in seeds], ".1f")
                for m in PAIRED
            ]  # fmt: skip
            paired.append([recipe, str(len(seeds)), *differences])
    path = RESULTS / "coditt5_claims.md"
    path.write_text(
        "# CoditT5 against plain generation on held-out files\n\n"
        f"`python -m benchmarks.coditt5_claims train`, {machine()}; {versions()}. Steps: CoditT5's "
        "pre-training + training. Mean ± half of Student's 95 % interval over seeds; copying the "
        "input has exact match 0.\n\n"
        + markdown(["recipe", "system", "history of", "steps", "seeds", *MEASURES], table)
        + "\nCoditT5 minus generator, paired by seed:\n\n"
        + markdown(["recipe", "seeds", *PAIRED], paired)
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "rerank"):
        command = commands.add_parser(name)
        command.add_argument("--path", help="where data is prepared")
        command.add_argument("--examples", type=int, default=256)
        command.add_argument("--repository", help="clone whose edits the histories are")
        if name == "train":
            command.add_argument("--recipes", nargs="+", choices=RECIPES)
            command.add_argument("--systems", nargs="+", choices=TARGETS, default=list(TARGETS))
            command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
            command.add_argument("--workdir")
        else:
            command.add_argument("--plans", nargs="+", required=True)
            command.add_argument("--generator", nargs="+", required=True)
            command.add_argument("--beams", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.command == "train":
        histories = [r for r, (preset, *_) in RECIPES.items() if preset == "git"]
        if not arguments.recipes:
            arguments.recipes = [r for r in RECIPES if arguments.repository or r not in histories]
        elif not arguments.repository and set(arguments.recipes) & set(histories):
            parser.error("--repository: the clone whose edits a history is")
    (train if arguments.command == "train" else rerank_both)(arguments)


def rerank_both(arguments: argparse.Namespace) -> None:
    """Beams of each system re-scored by the other, means over pairs of runs."""
    prepare_process()
    pairs = list(zip(arguments.plans, arguments.generator, strict=True))
    cells: dict[str, list[dict]] = {}
    for runs_of_pair in pairs:
        for name, scores in reranked(*runs_of_pair, arguments).items():
            cells.setdefault(name, []).append(scores)
    rows = [
        [name, *(runs.mean([s[m] for s in scores], ".1f") for m in METRICS)]
        for name, scores in cells.items()
    ]
    examples = arguments.examples or "all"
    what, name = ("edits", "_history") if arguments.repository else ("statements", "")
    text = (
        "# CoditT5 and the plain generator, re-ranked by each other\n\n"
        f"`python -m benchmarks.coditt5_claims rerank`, pairs of runs: {len(pairs)}, "
        f"{examples} held-out {what}, {arguments.beams} beams; written on "
        f"{machine()}; {versions()}. Mean ± half of Student's 95 % interval over pairs.\n\n"
        + markdown(["system", *METRICS], rows)
        + "\nExact match, pair by pair:\n\n"
        + markdown(
            ["system", *(Path(plans).name for plans, _ in pairs)],
            [[n, *(f"{s['exact_match']:.1f}" for s in scores)] for n, scores in cells.items()],
        )
    )
    (RESULTS / f"coditt5_rerank{name}.md").write_text(text)
    print(text)


def reranked(plans: str, generator: str, arguments: argparse.Namespace) -> dict[str, dict]:
    """Scores x 100 of two runs, alone and re-ranked, by name."""
    models = {}
    for (name, target), run in zip(TARGETS.items(), (plans, generator), strict=True):
        config = get_config("git" if arguments.repository else "small")
        options = {"path": arguments.path, "evaluated": arguments.examples, "target": target}
        with config.unlocked():
            config.data.options.update(options, repository=arguments.repository)
        config.init_from = run
        plan = Plan(config)
        params, _ = starting_variables(config, plan.abstract, plan.task, plan.make)
        models[name] = (plan.task, {"params": params})
    examples = edits.eval_examples("test", models["CoditT5"][0].options)
    old, new = [e.old for e in examples], [e.new for e in examples]
    scores = {"copying the input": edit_metrics.scores(old, new, old)}
    contexts = [e.source.partition(edit_plans.CONTEXT)[2].split() for e in examples]
    lines = [(text, [" ".join(words)] if words else []) for text, words in zip(old, contexts)]
    for name, other in (("CoditT5", "generator"), ("generator", "CoditT5")):
        found = rerank(*models[name], *models[other], lines, arguments.beams)
        scores[name] = edit_metrics.scores([r.targets[0] for r in found], new, old)
        # Every example here is an edit, so that a beam's first change is a rule without a model.
        changed = [next((t for t in r.targets if t != o), o) for r, o in zip(found, old)]
        scores[f"{name}, the first of its {arguments.beams} that is not the input"] = (
            edit_metrics.scores(changed, new, old)
        )
        best = [r.targets[r.best] for r in found]
        scores[f"{name} re-ranked by {other}"] = edit_metrics.scores(best, new, old)
        within = [new[i] if new[i] in r.targets else "" for i, r in enumerate(found)]
        scores[f"{name}, the best of its {arguments.beams}"] = edit_metrics.scores(within, new, old)
    return scores


if __name__ == "__main__":
    main()
