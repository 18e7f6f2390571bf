"""The recorded experiments: which runs each preset is made of, and the tables they give.

Reference numbers are those of the specification's section 7 and 8 (measured there on about 9,000
runs of an independent implementation); every table prints them beside ours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from theory.problem import spectrum
from theory.runs import RunSpec, make_specs
from theory.stages import wilson_interval

DEFAULT_ALPHA = {2: 1e-6, 3: 1e-4, 4: 1e-4, 5: 1e-4}
GEOMETRIC = "geometric(0.5)"

# (L, spectrum) -> {alpha: (fraction A = R, fraction B = R)}; sixty runs a cell.
BENCHMARK: dict[tuple[int, str], dict[float, tuple[float, float]]] = {
    (2, "equal"): {
        1e-2: (0.17, 0.17),
        1e-4: (0.38, 0.37),
        1e-6: (0.57, 0.53),
        1e-8: (0.75, 0.70),
        1e-10: (0.97, 0.83),
        1e-12: (1, 1),
    },
    (2, "geometric(0.7)"): {
        1e-2: (0.17, 0.17),
        1e-4: (0.18, 0.17),
        1e-6: (0.50, 0.42),
        1e-8: (1, 1),
        1e-10: (1, 1),
        1e-12: (1, 1),
    },
    (2, GEOMETRIC): {
        1e-2: (0.17, 0.17),
        1e-4: (0.67, 0.67),
        1e-6: (1, 1),
        1e-8: (1, 1),
        1e-10: (1, 1),
        1e-12: (1, 1),
    },
    (3, "equal"): {
        1e-2: (0.32, 0.28),
        1e-3: (0.78, 0.62),
        1e-4: (0.98, 0.92),
        1e-5: (0.98, 0.98),
        1e-6: (1, 0.98),
    },
    (3, "geometric(0.7)"): {
        1e-2: (0.23, 0.23),
        1e-3: (0.72, 0.60),
        1e-4: (1, 0.95),
        1e-5: (1, 1),
        1e-6: (1, 1),
    },
    (3, GEOMETRIC): {
        1e-2: (0.35, 0.30),
        1e-3: (0.92, 0.92),
        1e-4: (1, 1),
        1e-5: (1, 1),
        1e-6: (1, 1),
    },
    (4, "equal"): {
        1e-2: (0.55, 0.42),
        1e-3: (0.97, 0.83),
        1e-4: (1, 0.97),
        1e-5: (1, 1),
        1e-6: (1, 1),
    },
    (4, "geometric(0.7)"): {
        1e-2: (0.42, 0.33),
        1e-3: (0.90, 0.77),
        1e-4: (0.93, 0.93),
        1e-5: (0.98, 0.98),
        1e-6: (1, 1),
    },
    (4, GEOMETRIC): {
        1e-2: (0.58, 0.45),
        1e-3: (0.97, 0.95),
        1e-4: (1, 1),
        1e-5: (1, 1),
        1e-6: (1, 1),
    },
    (5, "equal"): {1e-2: (0.75, 0.53), 1e-3: (0.97, 0.90), 1e-4: (1, 1), 1e-5: (1, 1)},
    (5, "geometric(0.7)"): {1e-2: (0.53, 0.45), 1e-3: (1, 0.95), 1e-4: (1, 1), 1e-5: (1, 1)},
    (5, GEOMETRIC): {1e-2: (0.63, 0.47), 1e-3: (0.95, 0.95), 1e-4: (1, 1), 1e-5: (1, 1)},
}
# The reference ran these cells with R <= 5.
SHORT_CELLS = {(4, GEOMETRIC, 1e-6), (5, GEOMETRIC, 1e-5)}


def defaults(seeds: int = 42, first_seed: int = 700_000) -> list[RunSpec]:
    """The default setting: L = 2..5 x R = 1..6 x seeds fresh runs."""
    return make_specs(
        dict(
            L=L,
            sigma=spectrum(GEOMETRIC, R),
            alpha=DEFAULT_ALPHA[L],
            seed=first_seed + 10_000 * L + 1_000 * R + s,
            label={"study": "default"},
        )
        for s in range(seeds)
        for L in (2, 3, 4, 5)
        for R in range(1, 7)
    )


def benchmark(seeds: int = 10, first_seed: int = 100_000) -> list[RunSpec]:
    """Section 7's table: every cell with R = 1..6 x seeds runs; cheapest cells first."""
    grid = []
    for cell, ((L, name), columns) in enumerate(BENCHMARK.items()):
        for alpha in columns:
            ranks = range(1, 6 if (L, name, alpha) in SHORT_CELLS else 7)
            for R in ranks:
                for s in range(seeds):
                    grid.append(
                        dict(
                            L=L,
                            sigma=spectrum(name, R),
                            alpha=alpha,
                            seed=first_seed + 10_000 * cell + 1_000 * R + s,
                            label={"spectrum": name, "a": f"{alpha:.0e}"},
                        )
                    )
    return make_specs(grid)


FAILURE_ALPHA = {2: 1e-8, 3: 1e-5, 4: 1e-4}


def failures(seeds: int = 6, first_seed: int = 300_000) -> list[RunSpec]:
    """Section 8's table, row by row, at L = 2, 3, 4."""
    grid = []

    def row(name: str, sigma: Sequence[float], depths=(2, 3, 4), **fields: Any) -> None:
        for L in depths:
            for s in range(seeds):
                values = {"alpha": FAILURE_ALPHA.get(L, 1e-4), **fields}
                seed = first_seed + 1_000 * len({r["label"]["row"] for r in grid}) + 100 * L + s
                grid.append(dict(L=L, sigma=sigma, seed=seed, label={"row": name}, **values))

    row("sigma 1, 1", (1.0, 1.0))
    row("sigma 1, 0.99", (1.0, 0.99))
    row("sigma 1, 0.9", (1.0, 0.9))
    row("sigma 1, 0.5, 0.5", (1.0, 0.5, 0.5))
    row("alpha 0.1", (1.0, 0.5, 0.25), alpha=0.1)
    row("alpha 1", (1.0, 0.5, 0.25), alpha=1.0)
    row("noise 0.02", (1.0, 0.5, 0.25), noise_std=0.02 / np.sqrt(10))
    row("noise 0.2", (1.0, 0.5, 0.25), noise_std=0.2 / np.sqrt(10))
    for R in (3, 4, 5, 6):
        row(f"equal gaps R={R}", spectrum("equal", R), depths=(3, 4, 5))
    row(
        "identity init, (+,-,+)",
        (1.0, 0.5, 0.25),
        init="identity",
        symmetry="symmetric_indefinite",
        cap=60_000,
    )
    row("step cap", (1.0, 0.5, 0.25), depths=(3,), cap=800)
    return make_specs(grid)


STEP_ALPHA = {2: 1e-8, 3: 1e-6, 4: 1e-5}
ETA_HATS = (0.1, 0.3, 0.6, 1.0, 1.5, 1.9, 2.1, 2.5, 3.0)


def step_sizes(
    seeds: int = 4, ranks: Sequence[int] = (1, 2, 3, 4), first_seed: int = 400_000
) -> list[RunSpec]:
    """eta_hat below and above the edge of stability at 2."""
    return make_specs(
        dict(
            L=L,
            sigma=spectrum(GEOMETRIC, R),
            alpha=STEP_ALPHA[L],
            eta_hat=eta_hat,
            seed=first_seed + 1_000 * L + 100 * R + s,
            label={"eta": eta_hat},
        )
        for eta_hat in ETA_HATS
        for L in (2, 3, 4)
        for R in ranks
        for s in range(seeds)
    )


OPTIMIZER_ROWS = (
    ("gd", {}, None),
    ("momentum", {"mom": 0.9}, None),
    ("nesterov", {"mom": 0.9}, None),
    ("group_rmsprop", {}, 1e-3),
    ("group_rmsprop", {}, 3e-3),
    ("rmsprop", {}, 1e-3),
    ("adam", {}, 1e-3),
    ("adam", {"beta2": 0.99}, 1e-3),  # as in the reference's recorded Adam trajectory
)


def optimizers(
    seeds: int = 4, ranks: Sequence[int] = (1, 2, 3, 4, 5), first_seed: int = 500_000
) -> list[RunSpec]:
    """Section 7's optimizer comparison at L = 2 (1e-8) and L = 3 (1e-5).

    Momentum methods take eta_hat (1 - mu) with eta_hat = 0.3, so that stages last as long.
    """
    grid = []
    for name, hyper, lr in OPTIMIZER_ROWS:
        for L, alpha in ((2, 1e-8), (3, 1e-5)):
            for R in ranks:
                for s in range(seeds):
                    row = dict(
                        L=L,
                        sigma=spectrum(GEOMETRIC, R),
                        alpha=alpha,
                        seed=first_seed + 1_000 * L + 100 * R + s,
                        optimizer=name,
                        optimizer_kwargs=hyper,
                        label={"method": _method_label(name, hyper, lr)},
                    )
                    if lr is not None:
                        row.update(lr=lr, eta_hat=None, cap=12_000)
                    elif name != "gd":
                        row.update(eta_hat=0.3 * (1.0 - hyper["mom"]))
                    grid.append(row)
    return make_specs(grid)


def _method_label(name: str, hyper: dict[str, Any], lr: float | None) -> str:
    label = name if lr is None else f"{name} {lr:g}"
    return f"{label} beta2 {hyper['beta2']}" if "beta2" in hyper else label


def completion(
    seeds: int = 5, dim: int = 10, cap: int = 20_000, first_seed: int = 600_000
) -> list[RunSpec]:
    """Rank 2, 70 % observed: test error and effective rank against alpha for each depth."""
    return make_specs(
        (
            dict(
                L=L,
                dims=(dim,) * (L + 1),
                sigma=(1.0, 0.4),
                alpha=alpha,
                problem="completion",
                observed=0.7,
                cap=cap,
                stop=1e-9,
                seed=first_seed + s,
                label={"a": f"{alpha:.0e}"},
            )
            for L in (1, 2, 3, 4)
            for alpha in (1e-1, 1e-2, 1e-3, 1e-4)
            for s in range(seeds)
        ),
    )


def depth_selection(
    seeds: int = 20,
    diagonal: Sequence[float] = (1.0, 0.5),
    depths: Sequence[int] = (2, 3, 4, 5),
    alphas: Sequence[float] = (1e-2, 1e-3, 1e-4),
    cap: int = 60_000,
    first_seed: int = 800_000,
) -> list[RunSpec]:
    """The open question of which completion depth selects: 2 x 2, only the diagonal observed."""
    target = tuple(tuple(row) for row in np.diag(diagonal).tolist())
    mask = ((1.0, 0.0), (0.0, 1.0))
    return make_specs(
        dict(
            L=L,
            dims=(2,) * (L + 1),
            sigma=tuple(sorted(diagonal, reverse=True)),
            alpha=alpha,
            problem="completion",
            target=target,
            mask=mask,
            cap=cap,
            stop=1e-12,
            seed=first_seed + s,
            label={"a": f"{alpha:.0e}"},
        )
        for L in depths
        for alpha in alphas
        for s in range(seeds)
    )


# --- tables --------------------------------------------------------------------------------------


def group(records: Sequence[dict], key: Callable[[dict], Any]) -> dict[Any, list[dict]]:
    """Records grouped by key, in order of first appearance."""
    groups: dict[Any, list[dict]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return dict(groups)


def fraction(records: Sequence[dict], test: Callable[[dict], bool]) -> tuple[int, int]:
    """(how many pass, how many)."""
    return sum(bool(test(r)) for r in records), len(records)


def a_count(record: dict) -> bool:
    """Detector A counts R stages."""
    return record["n_stages"] == record["R"]


def b_count(record: dict) -> bool:
    """Detector B visits R plateaus."""
    return record["n_plateaus"] == record["R"]


def both_counts(record: dict) -> bool:
    """A = B = R."""
    return a_count(record) and b_count(record)


def show(successes: int, total: int) -> str:
    """`k/n = p (95 %: a-b)`."""
    low, high = wilson_interval(successes, total)
    return f"{successes}/{total} = {successes / max(total, 1):.3f} (95 %: {low:.3f}-{high:.3f})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def two_sample_differs(k1: int, n1: int, k2: int, n2: int) -> bool:
    """Whether two binomial samples differ at 95 % (Fisher's exact test)."""
    from scipy.stats import fisher_exact

    return bool(fisher_exact([[k1, n1 - k1], [k2, n2 - k2]])[1] < 0.05)


def benchmark_table(records: Sequence[dict]) -> tuple[str, dict[str, int]]:
    """Cell-by-cell comparison with the reference's sixty runs, as two samples at 95 %.

    Returns (markdown, {compared, outside, complete cells, runs}); every cell gives two comparisons.
    """
    cells = group(records, lambda r: (r["L"], r["spectrum"], r["alpha"]))
    rows, compared, outside, complete = [], 0, 0, 0
    for (L, name), columns in BENCHMARK.items():
        for alpha, reference in columns.items():
            runs = cells.get((L, name, alpha), [])
            if not runs:
                rows.append((L, name, f"{alpha:.0e}", 0, "-", "-", "not run"))
                continue
            wanted = 50 if (L, name, alpha) in SHORT_CELLS else 60
            full = len(runs) >= wanted
            complete += full
            cell, marks = [], []
            for test, ref in zip((a_count, b_count), reference):
                k, n = fraction(runs, test)
                cell.append(f"{k / n:.2f} ({ref:.2f})")
                differs = full and two_sample_differs(k, n, round(ref * wanted), wanted)
                marks.append("outside" if differs else "inside")
                compared += full
                outside += differs
            verdict = "/".join(marks) if full else "incomplete"
            rows.append((L, name, f"{alpha:.0e}", len(runs), *cell, verdict))
    header = ("L", "spectrum", "alpha", "runs", "A = R (ref.)", "B = R (ref.)", "two samples, 95 %")
    counts = {"compared": compared, "outside": outside, "cells": complete, "runs": len(records)}
    return markdown(header, rows), counts


def rate_table(records: Sequence[dict], key: Callable[[dict], Any], names: Sequence[str]) -> str:
    """Counts by key: runs, A = R, B = R, stages, plateaus, swaps, rings and statuses."""
    rows = []
    for value, runs in group(records, key).items():
        value = value if isinstance(value, tuple) else (value,)
        status = group(runs, lambda r: r["status"])
        rows.append(
            (
                *value,
                len(runs),
                "{}/{}".format(*fraction(runs, a_count)),
                "{}/{}".format(*fraction(runs, b_count)),
                _span([r["n_stages"] for r in runs]),
                _span([r["n_plateaus"] for r in runs]),
                f"{np.mean([r['n_swaps'] for r in runs]):.2f}",
                f"{np.mean([r['n_rings'] for r in runs]):.1f}",
                ", ".join(f"{name} {len(group_)}" for name, group_ in sorted(status.items())),
            )
        )
    header = (*names, "runs", "A = R", "B = R", "stages", "plateaus", "swaps", "rings", "status")
    return markdown(header, rows)


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)}-{max(values)}"
