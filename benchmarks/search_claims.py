"""What the searches claim, on real digits: rank correlation, search against random, sharing, HSS.

`python -m benchmarks.search_claims --system vitas --seeds 5 --out FILE.csv` trains supernets of
every kind, scores a sample of networks in each, trains the same networks on their own, and runs
both searches at equal numbers of measured networks. One row a (kind, seed), appended, so that it
can be stopped and continued; `--table` writes means with 95 % intervals (t over seeds) beside it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import runs
from train.command_line import load_config

KINDS = {
    "vitas": {"cyclic": "small", "ordinal": "ordinal", "two_sided": "two_sided"},
    "scalenet": {"hierarchical": "small", "uniform": "uniform"},
}


def supernet(system: str, kind: str, seed: int, steps: int):
    """`(config, task, variables, numbers)` of a supernet trained for so many steps."""
    from train.building import build_task
    from train.checkpoints import load_params
    from train.loop import fit

    config = load_config(f"configs/{system}.py:{KINDS[system][kind]}")
    with config.unlocked():
        config.update(seed=seed, steps=steps, log_every=steps)
        config.eval.every = config.checkpoint.every = 0
    with tempfile.TemporaryDirectory() as workdir:
        numbers = fit(config, workdir)
        return config, build_task(config), load_params(workdir, ema=True), numbers


def sample(system: str, config, task, count: int):
    """The same networks for every seed and kind: genomes, or (ops, width, resolution)."""
    rng = np.random.default_rng(1234)
    space = task.model.space
    if system == "vitas":
        from train.search import genome_search

        band = genome_search.Options(0.0, 4e6, probability=0.3)
        return genome_search.random_genomes(space, band, rng, count)
    out = []
    for _ in range(count):
        stage = int(rng.integers(1, 4))
        triples = space.scalings(stage)
        ops, width, size = space.scaled(
            space.random_base(rng), stage, triples[int(rng.integers(len(triples)))]
        )
        out.append((tuple(int(v) for v in ops), float(width), int(size)))
    return out


def train_alone(system: str, config, task, network, seed: int, steps: int) -> float:
    """Test accuracy in % of one network trained on its own, from scratch."""
    from ml_collections import ConfigDict

    from jaxmodels.search import scalenet_nets, vitas_nets
    from train.loop import fit

    alone = load_config(f"configs/{system}.py:retrain")
    space = task.model.space
    with alone.unlocked():
        alone.update(seed=seed, steps=steps, log_every=steps)
        alone.eval.every = alone.checkpoint.every = 0
        if system == "vitas":
            alone.model = "search.vitas:ViTAS"
            alone.model_args = vitas_nets.standalone_arguments(space, network)
        else:
            ops, width, size = network
            alone.model = "search.scalenet_nets:digits_base"
            alone.model_args = {"stages": scalenet_nets.by_stage(space, ops), "width": width}
            alone.data = ConfigDict(alone.data.to_dict())
            alone.data.options.inner.image_size = size
    with tempfile.TemporaryDirectory() as workdir:
        return 100 * fit(alone, workdir)["accuracy"]


def scorer_of(system: str, config, task, variables):
    """`networks -> accuracies in %` on the held-out images."""
    from train.search import scoring

    if system == "vitas":
        scorer = scoring.vitas_scorer(task, variables, config.data)
        return scorer, scorer
    scorer = scoring.scalenet_scorer(task, variables, config.data)
    return scorer, lambda networks: scoring.network_scores(task, scorer, networks)


def searches(system: str, config, task, score, seed: int) -> tuple[float, float, int]:
    """`(evolution's best, random's best, networks measured)` in %, by the supernet's score."""
    space, options = task.model.space, config.search
    if system == "vitas":
        from train.search import genome_search, nsga2

        fields = genome_search.Options.__dataclass_fields__
        given = {f: options[f] for f in fields if f in options}
        given |= {"probability": task.probability, "shift": task.shift}
        band = genome_search.Options(**given)
        problem = genome_search.problem(space, band, score)
        state = genome_search.run(problem, space, band, seed)
        measured = genome_search.measured(space, band, state)
        _, value = genome_search.random_search(space, band, score, seed, measured)
        return 100 - float(nsga2.best(state)[1][0, 0]), value, measured
    from train.search import mcea

    fields = mcea.Options.__dataclass_fields__
    numbers = mcea.Options(**{f: options[f] for f in fields if f in options})
    problem = mcea.Problem(space, score)
    state = mcea.run(problem, numbers, mcea.init(seed))
    value, _ = mcea.random_search(problem, numbers, seed, state.evaluations)
    return state.chain[-1]["objective"], value, state.evaluations


def one(system: str, kind: str, seed: int, arguments, accuracies: list[float]) -> dict:
    """A row of the table."""
    from scipy.stats import kendalltau

    config, task, variables, numbers = supernet(system, kind, seed, arguments.steps)
    _, score = scorer_of(system, config, task, variables)
    networks = sample(system, config, task, arguments.networks)
    if not accuracies:
        accuracies += [
            train_alone(system, config, task, n, 0, arguments.alone_steps) for n in networks
        ]
    tau = kendalltau(score(networks), accuracies).statistic
    found, value, measured = searches(system, config, task, score, seed)
    return {
        "system": system, "kind": kind, "seed": seed, "steps": arguments.steps,
        "networks": len(networks), "alone_steps": arguments.alone_steps,
        "kendall_tau": round(float(tau), 4), "search": round(found, 3), "random": round(value, 3),
        "measured": measured, "supernet_accuracy": round(100 * numbers["accuracy"], 3),
    }  # fmt: skip


def table(path: Path) -> str:
    """Means over seeds with 95 % intervals of the mean."""
    rows = runs.read(path)
    lines = ["| supernet | seeds | Kendall tau | search (%) | random (%) | search - random |",
             "|---|---|---|---|---|---|"]  # fmt: skip

    for key in dict.fromkeys((r["system"], r["kind"]) for r in rows):
        mine = [r for r in rows if (r["system"], r["kind"]) == key]
        gaps = [float(r["search"]) - float(r["random"]) for r in mine]
        cells = [
            runs.mean([r[c] for r in mine], ".3f") for c in ("kendall_tau", "search", "random")
        ]
        wins = sum(g > 0 for g in gaps)
        lines.append(
            f"| {' '.join(key)} | {len(mine)} | {' | '.join(cells)} | {runs.mean(gaps, '.3f')} "
            f"({wins} of {len(gaps)}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Missing rows, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", choices=tuple(KINDS), required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--networks", type=int, default=12)
    parser.add_argument("--alone_steps", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    from train.loop import compilation_cache

    compilation_cache()
    accuracies: list[float] = []
    memory = arguments.out.with_suffix(".alone.csv")
    if memory.exists():
        accuracies = [float(v) for v in memory.read_text().split()]
    known = {(r["kind"], int(r["seed"])) for r in runs.read(arguments.out)}
    for seed in range(arguments.seeds):
        for kind in KINDS[arguments.system]:
            if (kind, seed) in known:
                continue
            row = one(arguments.system, kind, seed, arguments, accuracies)
            memory.write_text("\n".join(map(str, accuracies)) + "\n")
            runs.append(arguments.out, row)
            print(row, flush=True)
    arguments.out.with_suffix(".md").write_text(
        f"`python -m benchmarks.search_claims --system {arguments.system} --seeds "
        f"{arguments.seeds} --steps {arguments.steps} --networks {arguments.networks} "
        f"--alone_steps {arguments.alone_steps}`\n\n{table(arguments.out)}"
    )


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
