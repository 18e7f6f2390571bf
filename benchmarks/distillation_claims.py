"""Whether LEAD's and PROD's claims show on API documentation, at a size for a CPU.

    python -m benchmarks.distillation_claims lead --workdir DIR --seeds 0 1 2 [--path TFDS]
    python -m benchmarks.distillation_claims prod --workdir DIR --seeds 0 1 2

LEAD: from the same warmed-up student and teacher, the same number of steps of (a) the student's own
loss alone, (b) the response terms alone, (c) LEAD. PROD: from the same warmed-up student, the same
number of student steps of (a) no distillation, (b) distillation by the largest teacher alone, (c)
the progression. Teachers are trained once (seed 0) and given to every seed's students; what a seed
changes is the student's initialization, the order of the data and the layers drawn. Every run is a
progression of stages: interrupted, the same command goes on. Prints a table of test MRR@10,
means with Student's 95 % intervals, and of paired differences.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import runs
from configs import lead as lead_configs
from configs import prod as prod_configs
from train.naming import ConfigError
from train.process import prepare_process
from train.progression import run_progression

SIZES = {"query_length": 16, "document_length": 32}
# Recipe -> (teacher's changed sizes, steps). The miner is the teacher's network.
LEAD_RECIPES: dict[str, tuple[dict, dict[str, int]]] = {
    "deep": (
        {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4},
        {"W_miner": 1500, "W_teacher": 600, "W_student": 600, "arm": 300},
    ),
    "wide": ({}, {"W_miner": 500, "W_teacher": 200, "W_student": 600, "arm": 300}),
    # Stopped before the training pairs are learned by heart.
    "early": ({}, {"W_miner": 250, "W_teacher": 50, "W_student": 600, "arm": 300}),
}
PROD_STEPS = {
    "W1_teacher": 600,
    "W1_student": 600,
    "W2_teacher": 200,
    "W2_student": 200,
    "T1": 100,
    "C1": 600,
    "T2": 100,
    "C2": 400,
    "T3": 100,
    "D2": 30,
}
MEASURE = "test_mrr@10"


def _train_stages(config):
    return [s for s in config.stages.values() if s.kind == "train"]


def _lengths(config, path):
    config.data.options.update(path=path, **SIZES)
    for stage in _train_stages(config):
        if "data" in stage.changes and "document_length" in stage.changes.data.options:
            stage.changes.data.options.document_length = SIZES["document_length"]


def lead(
    workdir: Path, seed: int, path, rate: float, layers: int, weight: float, recipe: str
) -> dict:
    """test MRR@10 of every arm for one seed."""
    sizes, steps = LEAD_RECIPES[recipe]
    config = lead_configs.get_config("small")
    _lengths(config, path)
    config.task_args.teacher_args.update(sizes)
    width = config.task_args.teacher_args.hidden_size
    for name in ("W_miner", "W_teacher"):
        config.stages[name].changes.model_args.update(sizes)
        config.stages[name].changes.task_args.score_scale = width**-0.5
    for name in ("W_miner", "W_teacher", "W_student"):
        count = steps[name]
        config.stages[name].changes.steps = count
        config.stages[name].changes.schedule.warmup_steps = count // 10
    config.steps = steps["arm"]
    config.schedule.update(peak=rate, warmup_steps=10)
    config.task_args.update(layers=layers, layer_temperature=10.0, teacher_scale=width**-0.25)
    given = ("W_miner", "M", "W_teacher")
    config.seed = 0
    config.order = given
    shared = workdir / f"lead_shared_{recipe}"
    numbers = run_progression(config, shared)
    teacher = numbers[f"W_teacher.{MEASURE}"]
    config.seed = seed
    for name in given:
        config.stages[name].given = str(shared / name)
    plain = config.stages.W_student.to_dict()
    plain["uses"] = {**plain["uses"], "task_args": {"start_from": "W_student"}}
    plain["changes"].update(steps=config.steps, schedule={"peak": rate, "warmup_steps": 10})
    config.stages.plain = plain
    arms = {
        "response": {"reweight": False, "layer_weight": 0.0},
        "lead": {} if weight == 0 else {"reweight": False, "layer_weight": weight},
    }
    for name, others in arms.items():
        config.stages[name] = {
            "kind": "train",
            "given": "",
            "uses": config.stages.L.uses.to_dict(),
            "changes": {"task_args": {**config.task_args.to_dict(), **others}},
        }
    config.order = (*given, "W_student", "plain", *arms)
    name = f"lead_{recipe}_{rate:g}_{layers}_{weight:g}_{seed}"
    found = run_progression(config, workdir / name)
    after = _teacher_after(workdir / name / "lead", config)
    result = {arm: found[f"{arm}.{MEASURE}"] for arm in ("W_student", "plain", *arms)}
    return {**result, "teacher before": teacher, "teacher after LEAD": after}


def _teacher_after(run: Path, config) -> float:
    """Test MRR@10 of the teacher that LEAD left."""
    from train.building import build_named
    from train.checkpoints import load_params
    from train.ranker_search import Ranker, evaluate_split

    args = config.task_args
    model = build_named(config, args.teacher, args.teacher_args, "teacher")
    params = load_params(run)["params"]["teacher"]
    return evaluate_split(Ranker(model, params, config.data.to_dict()), "test")["mrr@10"]


def prod(workdir: Path, seed: int, path, rate: float, lwf: float, temperature: float) -> dict:
    """test MRR@10 of every arm for one seed."""
    config = prod_configs.get_config("small")
    _lengths(config, path)
    config.schedule.peak = rate
    config.task_args.update(lwf_weight=lwf, temperature=temperature)
    for name, stage in config.stages.items():
        if stage.kind != "train":
            continue
        count = PROD_STEPS[name.split("_2")[0].split("_3")[0]]
        stage.changes.update(steps=count)
        stage.changes.schedule.warmup_steps = max(2, count // 10)
        if name[0] == "T":
            stage.changes.schedule.peak = rate
            if "task_args" in stage.changes:
                stage.changes.task_args.temperature = temperature
                if "lwf_weight" in stage.changes.task_args:
                    stage.changes.task_args.lwf_weight = lwf
    shared = workdir / f"prod_shared_{rate:g}_{lwf:g}_{temperature:g}"
    config.seed = 0
    config.order = config.order[: config.order.index("C2") + 1]
    numbers = run_progression(config, shared)
    config.seed = seed
    for name in ("W1_teacher", "M1", "W2_teacher", "M2", "C1", "C2"):
        config.stages[name].given = str(shared / name)
    total = sum(PROD_STEPS[n] for n in ("T1", "T2", "T3", "D2"))
    direct = config.stages.T3.to_dict()
    direct["uses"]["task_args"]["student_from"] = "W2_student"
    direct["uses"]["data"]["options"]["lists"] = "M1"
    direct["changes"].update(steps=total)
    none = config.stages.W2_student.to_dict()
    none["uses"]["task_args"]["start_from"] = "W2_student"
    none["changes"].update(steps=total, schedule={"peak": rate, "warmup_steps": total // 10})
    config.stages.direct, config.stages.none = direct, none
    whole, last = prod_configs.get_config("small").order, ("M4", "D1", "D2")
    config.order = (*(name for name in whole if name not in last), "direct", "none")
    folder = workdir / f"prod_{rate:g}_{lwf:g}_{temperature:g}_{seed}"
    found = run_progression(config, folder)
    config.order = (*config.order, *last)
    try:
        found = run_progression(config, folder)
    except ConfigError as error:  # a teacher may put nothing right that the student has not
        if "no confusing query" not in str(error):
            raise
        print(f"seed {seed}: {error}; the progression ends with T3", flush=True)
        found |= {f"D2.{MEASURE}": found[f"T3.{MEASURE}"], "D1.selected": 0}
    arms = ("W2_student", "none", "direct", "T1", "T2", "T3", "D2")
    return {
        **{arm: found[f"{arm}.{MEASURE}"] for arm in arms},
        "confusing queries": found["D1.selected"],
        "12DE": numbers[f"W2_teacher.{MEASURE}"],
        "12CE own-group accuracy": numbers["C1.accuracy"],
        "24CE own-group accuracy": numbers["C2.accuracy"],
    }


def table(results: dict[int, dict[str, float]], pairs) -> str:
    """Markdown: a row an arm, a column a seed, mean and interval; then paired differences."""
    seeds = list(results)
    lines = [
        f"| arm | {' | '.join(f'seed {s}' for s in seeds)} | mean ± 95 % |",
        "|---|" + "---|" * (len(seeds) + 1),
    ]
    for arm in results[seeds[0]]:
        values = [results[s][arm] for s in seeds]
        shown = " | ".join(f"{v:.4f}" for v in values)
        lines.append(f"| {arm} | {shown} | {runs.mean(values, '.4f')} |")
    for better, worse in pairs:
        values = [results[s][better] - results[s][worse] for s in seeds]
        shown = " | ".join(f"{v:+.4f}" for v in values)
        lines.append(f"| {better} - {worse} | {shown} | {runs.mean(values, '.4f')} |")
    return "\n".join(lines)


def main() -> None:
    """Run the arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("system", choices=("lead", "prod"))
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--path", default=None, help="where the corpus is prepared")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak rate of the arms")
    parser.add_argument("--layers", type=int, default=2, help="LEAD's K")
    parser.add_argument("--layer-weight", type=float, default=0.0, help="0: re-weighting")
    parser.add_argument("--recipe", choices=LEAD_RECIPES, default="deep", help="LEAD's sizes")
    parser.add_argument("--lwf", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=4.0)
    args = parser.parse_args()
    prepare_process()
    pairs = [("lead", "plain"), ("lead", "response")]
    if args.system == "prod":
        pairs = [("D2", "none"), ("D2", "direct"), ("direct", "none")]
    results: dict[int, dict[str, float]] = {}
    for seed in args.seeds:
        if args.system == "lead":
            settings = (args.rate, args.layers, args.layer_weight, args.recipe)
            results[seed] = lead(args.workdir, seed, args.path, *settings)
        else:
            settings = (args.rate, args.lwf, args.temperature)
            results[seed] = prod(args.workdir, seed, args.path, *settings)
        print(f"after seed {seed}:\n\n{table(results, pairs)}\n", flush=True)


if __name__ == "__main__":
    main()
