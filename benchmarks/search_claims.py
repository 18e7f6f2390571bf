"""What the searches claim, on real digits: rank correlation, search against random, sharing, HSS.

`python -m benchmarks.search_claims --system vitas [--kinds cyclic ...] [--seeds 0 1 ...]` trains
supernets of every kind, scores a sample of networks in each (`results/SYSTEM_scores.csv`), trains
the same networks on their own, `--alone_seeds` times each (`results/SYSTEM_alone.csv`), and runs
both searches at equal numbers of measured networks. A row a (kind, seed) is appended to
`results/SYSTEM_runs.csv`, so that it can be stopped and continued; `results/SYSTEM_claims.md` has
means with 95 % intervals over seeds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import runs
from benchmarks.measure import RESULTS, machine, markdown, versions
from train.command_line import load_config, read_flags

# A kind is a preset and changes to it.
KINDS = {
    "vitas": {
        "cyclic": "small",
        "ordinal": "ordinal",
        "two_sided": "two_sided",
        "cyclic, unshifted": "small task_args.shift=False",
        "cyclic, rate 1e-3": "small schedule.peak=1e-3",
        "ordinal, rate 1e-3": "ordinal schedule.peak=1e-3",
    },
    "scalenet": {"hierarchical": "small", "uniform": "uniform"},
}
# What is compared, seed by seed.
PAIRS = {
    "vitas": (
        ("cyclic", "ordinal"),
        ("cyclic, unshifted", "ordinal"),
        ("cyclic, rate 1e-3", "ordinal, rate 1e-3"),
        ("cyclic", "cyclic, unshifted"),
        ("cyclic", "two_sided"),
    ),
    "scalenet": (("hierarchical", "uniform"),),
}

# What the tasks' `evaluate` scores, the same networks at any time: their `probes()`.
PROBES = {
    "vitas": "three fixed genomes (a third, two thirds and all of every width and of the depth)",
    "scalenet": "one fixed network of each scaling stage",
}


def supernet(system: str, kind: str, seed: int, steps: int):
    """`(config, task, variables, numbers)` of a supernet trained for so many steps."""
    from train.building import build_task
    from train.checkpoints import load_params
    from train.loop import fit

    preset, *changes = KINDS[system][kind].split()
    flags = [f"--config=configs/{system}.py:{preset}", *(f"--config.{c}" for c in changes)]
    config, _ = read_flags(["claims", *flags], need_workdir=False)
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


def one(system: str, kind: str, seed: int, arguments) -> tuple[dict, list[float]]:
    """A row of the table, and the supernet's scores of the sample in %."""
    config, task, variables, numbers = supernet(system, kind, seed, arguments.steps)
    _, score = scorer_of(system, config, task, variables)
    networks = sample(system, config, task, arguments.networks)
    memory = alone_of(system)
    done = {(int(r["network"]), int(r["seed"])) for r in runs.read(memory)}
    for i, network in enumerate(networks):
        for again in range(arguments.alone_seeds):
            if (i, again) not in done:
                accuracy = train_alone(system, config, task, network, again, arguments.alone_steps)
                runs.append(memory, {"network": i, "seed": again, "accuracy": round(accuracy, 4)})
    scores = [float(v) for v in score(networks)]
    found = value = measured = ""
    if not arguments.no_searches:
        found, value, measured = searches(system, config, task, score, seed)
        found, value = round(found, 3), round(value, 3)
    row = {
        "system": system, "kind": kind, "seed": seed, "steps": arguments.steps,
        "networks": len(networks), "alone_steps": arguments.alone_steps,
        "kendall_tau": round(rank_correlation(system, scores), 4),
        "search": found, "random": value, "measured": measured,
        "supernet_accuracy": round(100 * numbers["accuracy"], 3),
    }  # fmt: skip
    return row, scores


def alone_of(system: str) -> Path:
    """Accuracies in % of the sample's networks trained on their own: `network, seed, accuracy`."""
    return RESULTS / f"{system}_alone.csv"


def scores_of(system: str) -> Path:
    """The supernets' scores of the sample: `kind, seed, network, score`; older runs have none."""
    return RESULTS / f"{system}_scores.csv"


def rank_correlation(system: str, scores) -> float:
    """Kendall's tau between scores of the sample and the means of its accuracies alone."""
    from scipy.stats import kendalltau

    alone: dict[int, list[float]] = {}
    for r in runs.read(alone_of(system)):
        alone.setdefault(int(r["network"]), []).append(float(r["accuracy"]))
    return float(kendalltau(scores, [np.mean(alone[i]) for i in range(len(scores))]).statistic)


def write(system: str, command: str) -> None:
    """Means over seeds with 95 % intervals, and what differs between kinds, paired by seed."""
    rows = runs.read(RESULTS / f"{system}_runs.csv")
    kinds = [k for k in KINDS[system] if any(r["kind"] == k for r in rows)]
    measures = ("kendall_tau", "search", "random", "gap", "supernet_accuracy")
    by_seed: dict[str, dict[int, dict[str, float]]] = {kind: {} for kind in kinds}
    # By network: a run that was stopped between its scores and its row has them twice.
    stored: dict[tuple[str, str], dict[int, float]] = {}
    for r in runs.read(scores_of(system)):
        stored.setdefault((r["kind"], r["seed"]), {})[int(r["network"])] = float(r["score"])
    for r in rows:
        if scores := stored.get((r["kind"], r["seed"])):
            # The networks may have been trained again since.
            r["kendall_tau"] = rank_correlation(system, list(scores.values()))
        known = {m: float(r[m]) for m in measures if r.get(m, "") != ""}
        if "search" in known:  # not with --no_searches
            known["gap"] = known["search"] - known["random"]
        by_seed[r["kind"]][int(r["seed"])] = known
    means, paired = [], []
    for kind in kinds:
        mine = by_seed[kind].values()
        gaps = [r["gap"] for r in mine if "gap" in r]
        ahead = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}" if gaps else ""
        columns = (runs.mean([r[m] for r in mine if m in r], ".2f") for m in measures)
        means.append([kind, str(len(mine)), *columns, ahead])
    for this, other in PAIRS[system]:
        seeds = sorted(set(by_seed.get(this, {})) & set(by_seed.get(other, {})))
        if seeds:
            pairs = [(by_seed[this][s], by_seed[other][s]) for s in seeds]
            differences = (
                runs.mean([a[m] - b[m] for a, b in pairs if m in a and m in b], ".2f")
                for m in measures
            )
            paired.append([f"{this} - {other}", str(len(seeds)), *differences])
    named = ["Kendall tau", "search (%)", "random (%)", "search - random", "supernet (%)"]
    first = rows[0]
    repeats = 1 + max((int(r["seed"]) for r in runs.read(alone_of(system))), default=0)
    (RESULTS / f"{system}_claims.md").write_text(
        f"# {system}: what its search finds on digits\n\n`{command}`, written on {machine()}; "
        f"{versions()}.\n{first['steps']} training steps a supernet; Kendall tau between the "
        f"supernet's scores and the accuracies of {first['networks']} networks trained on their "
        f"own for {first['alone_steps']} steps (`{system}_alone.csv`, runs a network: {repeats}); "
        "the best network of the "
        "search and of as many random ones by the supernet's accuracy on held-out digits; the "
        f"supernet's own test accuracy, the mean over {PROBES[system]}. Mean ± half of Student's "
        f"95 % interval over seeds; every run in `{system}_runs.csv`. Empty: nothing was searched "
        "(`--no_searches`).\n\n"
        + markdown(["supernet", "seeds", *named, "search ahead"], means)
        + "\nPaired by seed:\n\n"
        + markdown(["difference", "seeds", *named], paired)
    )


def main() -> None:
    """Missing rows, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", choices=tuple(KINDS), required=True)
    parser.add_argument("--kinds", nargs="+", help="all of the system's without it")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--networks", type=int, default=12)
    parser.add_argument("--alone_steps", type=int, default=200)
    parser.add_argument("--alone_seeds", type=int, default=1)
    parser.add_argument("--no_searches", action="store_true", help="supernets and ranks alone")
    arguments = parser.parse_args()
    kinds = arguments.kinds or list(KINDS[arguments.system])
    if unknown := set(kinds) - set(KINDS[arguments.system]):
        parser.error(f"no kind {min(unknown)!r}; known: {', '.join(KINDS[arguments.system])}")
    from train.process import prepare_process

    prepare_process()
    path = RESULTS / f"{arguments.system}_runs.csv"
    command = (
        f"python -m benchmarks.search_claims --system {arguments.system} --steps {arguments.steps} "
        f"--networks {arguments.networks} --alone_steps {arguments.alone_steps} "
        f"--alone_seeds {arguments.alone_seeds}"
    )
    for seed in arguments.seeds:
        for kind in kinds:
            if any((r["kind"], int(r["seed"])) == (kind, seed) for r in runs.read(path)):
                continue
            row, scores = one(arguments.system, kind, seed, arguments)
            runs.append(
                scores_of(arguments.system),
                *(
                    {"kind": kind, "seed": seed, "network": i, "score": round(score, 4)}
                    for i, score in enumerate(scores)
                ),
            )
            runs.append(path, row)
            print(row, flush=True)
    if not runs.read(path):
        parser.error("no seeds, and no finished runs to write about")
    write(arguments.system, command)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
