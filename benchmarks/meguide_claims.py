"""MeGuide's claims at small scale: every sampler on the same budget, seeds and intervals.

`python -m benchmarks.meguide_claims STUDY [--seeds 5] [--data PATH]` runs one study of STUDIES and
appends to `results/meguide_claims.csv`; `python -m benchmarks.meguide_claims table` writes
`results/meguide_claims.md`. A row is one run: validation and test accuracy after the last step.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks import runs
from benchmarks.measure import RESULTS, machine, markdown

FIELDS = ("study", "recipe", "sampler", "seed", "valid", "test", "seconds", "steps", "nodes", "mlp")
CSV = RESULTS / "meguide_claims.csv"
SAMPLERS = {
    "full": {"sampler": "full"},
    "guided": {"sampler": "guided"},
    "guided, beta -1": {"sampler": "guided", "beta": -1.0},
    "ripple": {"sampler": "ripple"},
    "random": {"sampler": "random"},
    "saint_node": {"sampler": "saint_node"},
    "saint_edge": {"sampler": "saint_edge"},
    "saint_walk": {"sampler": "saint_walk"},
    "saint_walk, weighted": {"sampler": "saint_walk", "normalize_loss": "saint"},
    "neighbor": {"sampler": "neighbor"},
    "cluster": {"sampler": "cluster", "clusters_per_batch": 6},
}
DIGITS = {"in_features": 64, "hidden": 64, "out": 10, "dropout": 0.5}
SMALL = {"size": 600, "hops": 10, "pad_edges": 16384}
DEEP = ("full", "guided", "ripple")
BLOCKS = {"sbm": (1000, 5, 10.0, 4.0, 32, 1.0)}
FREE = {"optimizer.weight_decay": 0.0}
# Few edges between blocks and noisy features: mixing is slow, and an MLP alone is not enough.
SPARSE = {"sbm": (1000, 5, 4.0, 0.5, 32, 4.0)}
TINY = {"size": 60, "hops": 4, "pad_edges": 1024}
WIDE = ("full", "guided", "ripple", "random", "saint_walk", "cluster")
# recipe -> (dataset, model arguments, data options, config changes, samplers)
STUDIES = {
    "digits": {
        "200 steps, S 600": ("digits", DIGITS, SMALL, {}, tuple(SAMPLERS)),
        "60 steps, S 400, b 2": (
            "digits",
            DIGITS,
            {"size": 400, "hops": 4, "pad_edges": 16384},
            {"steps": 60, "batch_size": 2},
            ("guided", "ripple"),
        ),
        "size and hops from the metrics": (
            "digits",
            DIGITS,
            {"pad_edges": 16384},
            {},
            ("guided", "ripple"),
        ),
    },
    "backbones": {
        kind: ("digits", {**DIGITS, "kind": kind, **more}, SMALL, {}, ("full", "guided", "ripple"))
        for kind, more in (
            ("sage", {}),
            ("gat", {"hidden": 8, "heads": 8}),
            ("gin", {"train_eps": True, "dropout": 0.0}),
        )
    },
    "deep": {
        f"16 layers, {name}": (
            "sbm",
            {"in_features": 32, "hidden": 32, "out": 5, "num_layers": 16, **model},
            {"size": 250, "hops": 10, "pad_edges": 8192, **BLOCKS, **data},
            {"batch_size": 2, **changes},
            DEEP,
        )
        for name, model, data, changes in (
            ("lr 0.01", {}, {}, {}),
            ("lr 0.001, S 100", {}, {"size": 100, "hops": 3}, {"schedule.peak": 0.001}),
            ("residual", {"residual": True}, {}, {"schedule.peak": 0.003}),
            ("no decay, 500 steps", {}, {}, {**FREE, "steps": 500}),
            ("sparse blocks, no decay", {}, SPARSE, FREE),
            ("sparse blocks, S 60, b 8", {}, {**SPARSE, **TINY}, {**FREE, "batch_size": 8}),
            ("sparse blocks, lr 0.002", {}, SPARSE, {**FREE, "schedule.peak": 0.002}),
            ("sparse blocks, residual", {"residual": True}, SPARSE, {"schedule.peak": 0.003}),
        )
    },
    "shallow": {
        "2 layers, lr 0.01": (
            "sbm",
            {"in_features": 32, "hidden": 32, "out": 5},
            {"size": 250, "hops": 10, "pad_edges": 8192, **BLOCKS},
            {"batch_size": 2},
            DEEP,
        ),
        "2 layers, sparse blocks": (
            "sbm",
            {"in_features": 32, "hidden": 32, "out": 5},
            {"size": 250, "hops": 10, "pad_edges": 8192, **SPARSE},
            {"batch_size": 2},
            DEEP,
        ),
    },
    "cochange": {
        "200 steps": (
            "cochange",
            {"hidden": 64, "dropout": 0.5},
            {"size": 500, "hops": 3, "pad_edges": 16384},
            {},
            WIDE,
        ),
    },
}  # fmt: skip


def run_one(dataset, model, options, changes, sampler, seed, path):
    """One training run without checkpoints: (valid, test, seconds, steps, mean nodes, MLP)."""
    import jax

    from configs.meguide import get_config
    from train.data import node_graphs, pipeline
    from train.loop import Plan

    config = get_config("small")
    config.data.name = f"node_graphs:{dataset}"
    config.data.options = {"ratio": 0.5, **options, **SAMPLERS[sampler]}
    config.data.options.split_seed = seed
    if path:
        config.data.options.path = path
    config.model_args = {"kind": "gcn", **model}
    if dataset == "cochange":
        _, full = pipeline.resolve(config.data)
        graph = node_graphs.prepared(full).graph
        config.model_args.in_features, config.model_args.out = graph.x.shape[1], graph.num_classes
    config.update_from_flattened_dict({"seed": seed, **changes})
    if sampler == "full":
        config.batch_size = 1
        config.data.options.size = config.data.options.pad_edges = 0
    plan = Plan(config)
    state = plan.run.place(plan.fresh())
    batches = pipeline.train_batches(config.data, batch_size=config.batch_size, seed=seed)
    first = next(batches)
    state, metrics = plan.run.step(state, plan.run.put(first))
    jax.block_until_ready(metrics)
    start, nodes = time.process_time(), []
    for _ in range(config.steps - 1):
        state, metrics = plan.run.step(state, plan.run.put(next(batches)))
        nodes.append(metrics["nodes"])
    jax.block_until_ready(state.step)
    seconds = time.process_time() - start
    batches.close()
    variables = plan.host_copy(state.eval_variables)
    numbers = plan.task.report(variables, {}, config)
    return (
        numbers["valid_accuracy"],
        numbers["test_accuracy"],
        seconds,
        config.steps,
        float(np.mean(nodes)),
        numbers["mlp_baseline"],
    )


def study(name: str, seeds: int, path: str | None) -> None:
    """Run what the CSV has not yet, and append."""
    done = {(r["study"], r["recipe"], r["sampler"], int(r["seed"])) for r in runs.read(CSV)}
    label = f"{name} {Path(path).name.partition('.')[0]}" if path else name
    for recipe, (dataset, model, options, changes, samplers) in STUDIES[name].items():
        for seed in range(seeds):
            for sampler in samplers:
                if (label, recipe, sampler, seed) in done:
                    continue
                found = run_one(dataset, model, options, changes, sampler, seed, path)
                row = [f"{v:.4f}" if isinstance(v, float) else v for v in found]
                runs.append(CSV, dict(zip(FIELDS, (label, recipe, sampler, seed, *row))))
                print(label, recipe, sampler, seed, *row, flush=True)


def interval(values: list[float]) -> str:
    """Mean and the half-width of its 95% t interval, in percent."""
    return runs.mean(values, ".1f", 100)


def table() -> Path:
    """The CSV as tables: test accuracy, difference to full batch over the same seeds, CPU time."""
    rows = runs.read(CSV)
    groups: dict = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        groups[row["study"], row["recipe"]][row["sampler"]][int(row["seed"])] = row
    text = [
        "# MeGuide: samplers side by side\n\n`python -m benchmarks.meguide_claims STUDY`, then "
        f"`table`; on {machine()}. Percent of test nodes right after the last step, mean and 95% t "
        "interval over seeds (a seed draws the split, the block model, the weights and the "
        "subgraphs); differences are paired by seed. CPU seconds are those of the steps, sampling "
        "included. Raw rows: `meguide_claims.csv`.\n"
    ]
    for (name, recipe), samplers in groups.items():
        mlp = [float(r["mlp"]) for found in samplers.values() for r in found.values()]
        text.append(
            f"\n## {name}: {recipe}\n\nMLP on the features: {interval(sorted(set(mlp)))}.\n\n"
        )
        lines = []
        for sampler, found in samplers.items():
            test = {seed: float(r["test"]) for seed, r in found.items()}
            cells = [sampler, str(len(test)), interval(list(test.values()))]
            for other in ("full", "ripple"):
                against = samplers.get(other, {})
                both = [test[s] - float(against[s]["test"]) for s in test if s in against]
                cells.append(interval(both) if both and other != sampler else "")
            cells.append(f"{np.median([float(r['seconds']) for r in found.values()]):.1f}")
            cells.append(f"{np.mean([float(r['nodes']) for r in found.values()]):.0f}")
            lines.append(cells)
        head = ["sampler", "seeds", "test accuracy", "minus full", "minus ripple", "CPU s", "nodes"]
        text.append(markdown(head, lines))
    path = RESULTS / "meguide_claims.md"
    path.write_text("".join(text))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.meguide_claims")
    parser.add_argument("study", choices=[*STUDIES, "table"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", default=None, help="a git clone or CSV file, for cochange")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if arguments.study == "table":
        print(table().read_text())
    else:
        study(arguments.study, arguments.seeds, arguments.data)


if __name__ == "__main__":
    main()
