"""`python -m train.search --config FILE --checkpoint RUN --workdir DIR`: search a trained supernet.

Every sub-step is saved: the same command goes on after a kill, with the same result. Writes
`settings.json`, `search.json` (the state), `found.json` (the networks), `report.md` and
`frontier.png`.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxmodels.platform_choice import choose_platform

choose_platform()

from train.command_line import read_flags, stop_with_one_line  # noqa: E402
from train.naming import ConfigError  # noqa: E402

FLAGS = {
    "checkpoint": "a supernet's run directory or its PyTorch checkpoint file",
    "workdir": "where the search is kept",
}


def main(argv: list[str]) -> int:
    """Load the supernet, search, and write what was found."""
    config, paths = read_flags(argv, need_workdir=False, strings=FLAGS)
    if "search" not in config:
        raise ConfigError("config.search: this config has no search")
    from train.building import build_task
    from train.process import prepare_process
    from train.search import settings

    prepare_process()
    settings.check_options(config)
    task = build_task(config)
    settings.check_reach(config, task)
    variables = settings.load_supernet(config, task, paths["checkpoint"])
    workdir = Path(paths["workdir"])
    workdir.mkdir(parents=True, exist_ok=True)
    settings.keep_settings(workdir, config, task, variables)
    search = {"mcea": _mcea, "genome": _genome}[config.search.kind]
    try:
        found, table, points = search(config, task, variables, workdir)
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # JAX's own are defects
            raise
        # A band that nothing lies in: what was searched until then is saved.
        raise ConfigError(f"config.search: {error}") from None
    (workdir / "found.json").write_text(json.dumps(found, indent=2) + "\n")
    lines = ["| quantity | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in table.items())]
    report = "\n".join(lines)
    words = shlex.join(found.get("flags", []))
    alone = f"Flags that train the best network on its own:\n\n    {words}\n\n" if words else ""
    text = f"# Search\n\n{report}\n\n{alone}![frontier](frontier.png)\n"
    (workdir / "report.md").write_text(text)
    draw_frontier(points, workdir / "frontier.png", found.get("front", ()))
    print(report)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _mcea(config, task, variables, workdir):
    from train.search import mcea, scaling_strategy, scoring

    search = config.search
    scorer = scoring.scalenet_scorer(
        task, variables, config.data, search.split, search.batch_size, chunk=search.chunk
    )
    space = task.model.space
    names = [f for f in mcea.Options.__dataclass_fields__ if f in search]
    options = mcea.Options(**{f: search[f] for f in names})
    problem = mcea.Problem(space, lambda networks: scoring.network_scores(task, scorer, networks))
    path = workdir / "search.json"
    state = mcea.load(path) if path.exists() else mcea.init(search.seed)

    def after(state):
        mcea.save(path, state)
        last = f", objective {state.chain[-1]['objective']:.2f} %" if state.chain else ""
        _say(f"{state.phase} {state.iteration}.{state.place}: {state.evaluations} networks{last}")

    state = mcea.run(problem, options, state, after)
    objective = state.chain[-1]["objective"]
    table = {
        "fitness (%)": f"{objective:.2f}",
        "networks scored": state.evaluations,
        "traces of the scoring function": scorer.traces,
        "base (multiply-adds)": f"{space.flops(state.base, holes=True):,}",
    }
    if search.compare:
        value, _ = mcea.random_search(problem, options, search.seed, state.evaluations)
        table["random search, as many networks (%)"] = f"{value:.2f}"
    from jaxmodels.search.scalenet_nets import by_stage

    def network(depth, width, resolution, flops, stages, **more):
        """A row of `found.json`; `stages` and `width` build `scalenet_nets.ScaleNet`."""
        stages = [list(ops) for ops in stages]
        numbers = {"depth": depth, "width": width, "resolution": resolution, "flops": flops}
        return {**numbers, "stages": stages, **more}

    def family(base, scalings):
        """Rows S0, S1, ... of a base model and its scalings."""
        own = (1.0, 1.0, space.base_resolution, space.flops(base, holes=True))
        rows = {"S0": network(*own, by_stage(space, space.repair(base)))}
        for s, triple in scalings.items():
            ops, width, resolution = space.scaled(base, int(s), triple)
            key = (tuple(int(v) for v in ops), float(width), int(resolution))
            flops = space.flops(ops, width, resolution, holes=True)
            row = (space.multipliers(int(s), triple)[0], width, resolution, flops)
            rows[f"S{s}"] = network(*row, by_stage(space, ops), accuracy=state.accuracy.get(key))
        return rows

    stages = family(state.base, state.scalings)
    found = {"base": list(state.base), "stages": stages, "fitness": objective}
    for s in state.scalings:
        row = stages[f"S{s}"]
        table[f"S{s}"] = (
            f"d {row['depth']:g}, w {row['width']:g}, r {row['resolution']}: "
            f"{row['flops']:,} multiply-adds"
        )
    searched = {
        s: (stages[f"S{s}"]["depth"], stages[f"S{s}"]["width"],
            stages[f"S{s}"]["resolution"] / space.base_resolution)
        for s in state.scalings
    }  # fmt: skip
    strategy = scaling_strategy.fit(searched, search.get("strategy", "linear"))
    for s in (space.max_scaling_stage + 1, space.max_scaling_stage + 2):
        # On toy spaces one block more is over 2 % of a network.
        tolerance = 0.02 if options.budget > 1e8 else 0.1
        scaled = scaling_strategy.generalize(space, state.base, strategy, s, tolerance)
        row = (scaled.depth, scaled.width, scaled.resolution, scaled.flops, scaled.stages)
        stages[f"S{s}"] = network(*row)
        table[f"S{s} (generalized)"] = (
            f"d {scaled.depth:.3g}, w {scaled.width:.3g}, r {scaled.resolution}: "
            f"{scaled.flops:,} multiply-adds"
        )
    if search.multi_objective:
        found["front"] = [
            {**row, "stages": family(row["base"], row["scalings"])} for row in state.front
        ]
        for i, row in enumerate(state.front, 1):
            table[f"front, {i} of {len(state.front)}"] = (
                f"base of {row['flops']:,} multiply-adds: {row['fitness']:.2f} %"
            )
        if not state.front:
            table["front"] = "no base model keeps to all bands under the last scalings"
    points = [
        (space.flops(np.array(o), w, r, holes=True), a) for (o, w, r), a in state.accuracy.items()
    ]
    return found, table, np.array(points)


def _genome(config, task, variables, workdir):
    from train.search import genome_search, nsga2, scoring

    search = config.search
    scorer = scoring.vitas_scorer(
        task, variables, config.data, search.split, search.batch_size, chunk=search.chunk
    )
    space = task.model.space
    names = [f for f in genome_search.Options.__dataclass_fields__ if f in search]
    # First draws and spellings are those that the superformer was trained with.
    trained = {"probability": task.probability, "shift": task.shift}
    options = genome_search.Options(**{**trained, **{f: search[f] for f in names}})
    problem = genome_search.problem(space, options, scorer)
    state = genome_search.run(problem, space, options, search.seed, workdir / "search.json")
    genes, objectives = nsga2.best(state, search.keep)
    measured = genome_search.measured(space, options, state)
    table = {
        "accuracy on held-out images (%)": f"{100 - objectives[0, 0]:.2f}",
        "networks measured": measured,
        "traces of the scoring function": scorer.traces,
        "network": str(space.decode(genes[0])),
        "multiply-adds": f"{space.flops(genes[0]):,}",
    }
    if search.compare:
        _, value = genome_search.random_search(space, options, scorer, search.seed, measured)
        table["random search, as many networks (%)"] = f"{value:.2f}"

    def network(genome, objectives):
        """A row of `found.json`; `model_args` build the network on its own."""
        model, arguments = task.model.standalone(genome)
        return {
            "genome": genome.tolist(),
            "accuracy": 100 - float(objectives[0]),
            "flops": int(space.flops(genome)),
            "model": model,
            "model_args": arguments,
            # Words of a command line cannot be JSON: None is null there.
            "flags": [f"--config.model={model}"]
            + [f"--config.model_args.{k}={v}" for k, v in arguments.items()],
        }

    kept = [network(g, o) for g, o in zip(genes, objectives)]
    found = {**kept[0], "best": kept}
    keys = np.array([np.frombuffer(k, np.int64) for k in state.scores])
    values = 100 - np.array([v[0] for v in state.scores.values()])
    scored = values > 7  # penalties are below that
    points = np.stack([space.flops(keys[scored]), values[scored]], axis=1)
    return found, table, points


def draw_frontier(points: np.ndarray, path: Path, front: Sequence[Mapping] = ()) -> None:
    """Accuracy against multiply-adds of everything scored, the best for their size joined.

    `front`, of a search with two objectives, has its own panel: base models and their fitness.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = 2 if front else 1
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 3.6), squeeze=False)
    axis = axes[0, 0]
    axis.plot(points[:, 0], points[:, 1], ".", color="#bbbbbb", label="scored")
    order = np.argsort(points[:, 0], kind="stable")
    best = np.maximum.accumulate(points[order, 1])
    rises = np.flatnonzero(np.diff(best, prepend=-np.inf) > 0)
    axis.plot(points[order[rises], 0], best[rises], "-o", color="#4477aa", label="frontier")
    axis.set(xscale="log", xlabel="multiply-adds", ylabel="held-out accuracy (%)")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    if front:
        rows = [(row["flops"], row["fitness"]) for row in front]
        axes[0, 1].plot(*zip(*rows), "-o", color="#aa4444")
        axes[0, 1].set(xlabel="multiply-adds of the base model", ylabel="fitness (%)")
        axes[0, 1].grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".part.png"), dpi=110)
    plt.close(figure)
    path.with_suffix(".part.png").replace(path)


if __name__ == "__main__":
    sys.exit(stop_with_one_line(main, sys.argv))
