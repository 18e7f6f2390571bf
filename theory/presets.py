"""What the command line runs: one config to files in a work directory."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theory import dynamics, experiments, figures, landscape, real_matrices
from theory.closed_form import flow_time, lr_from_eta_hat, separability
from theory.dynamics import Trajectory, simulate
from theory.factorization import initialize, warn_bottleneck
from theory.problem import (
    Problem,
    determinant_completion,
    make_problem,
    observed_mask,
    random_problem,
    spectrum,
)
from theory.quantities import DEFAULT_RECORD
from theory.runs import doubts
from theory.stages import StageReport, confirm_swaps, stages
from theory.sweep import sweep, write_tables

# Methods with one rate for all parameters whose overshoots can look like swaps.
OVERSHOOTING = ("momentum", "nesterov", "group_rmsprop")
RUN_RECORD = (
    *DEFAULT_RECORD,
    "rank_distances",
    "alignment",
    "mode_strengths",
    "gap_ratio",
)


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def save_trajectory(trajectory: Trajectory, path: Path) -> None:
    """trajectory.npz: the recorded rows, `trace.*` at every step, `final.W<j>`."""
    arrays = dict(trajectory.rows)
    arrays.update({f"trace.{name}": value for name, value in trajectory.trace.items()})
    for j, factor in enumerate(trajectory.state.factors, start=1):
        arrays[f"final.W{j}"] = np.asarray(factor)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    os.replace(partial, path)


# --- a single run --------------------------------------------------------------------------------


def build_problem(config: Any) -> tuple[Problem, tuple[int, ...], tuple[float, ...]]:
    """(problem, dims, reference spectrum) of a `run` config."""
    dims = tuple(config.dims) or (config.dim,) * (config.depth + 1)
    if config.problem == "divergent_norm":
        return determinant_completion(), (2,) * (config.depth + 1), ()
    sigma = spectrum(config.spectrum, config.rank, tuple(config.sigma) or None)
    key = jax.random.key(config.seed)
    problem = random_problem(
        jax.random.fold_in(key, 0),
        config.problem,
        (dims[-1], dims[0]),
        sigma,
        noise_std=config.noise_std,
        observed=config.observed,
        measurements=config.measurements or None,
        samples=config.samples,
        symmetry=config.symmetry,
        loss_norm=config.loss_norm or None,
    )
    return problem, dims, sigma


def run_length(config: Any, sigma: Sequence[float], depth: int, rate: float) -> int:
    """Steps of a run: as asked, or a third more than the flow needs for the last mode."""
    if config.steps:
        return int(config.steps)
    start = min(0.3 * (config.alpha or config.factor_scale**depth), 0.5 * sigma[-1])
    t = float(flow_time(start, 0.999 * sigma[-1], sigma[-1], depth)) / rate
    return math.ceil(1.33 * t + 200)


def single_run(config: Any, workdir: Path, say: Callable[[str], None]) -> StageReport:
    """Presets `demo`, `run`, `divergent_norm`: trajectory, tables, figures, report."""
    problem, dims, sigma = build_problem(config)
    depth = len(dims) - 1
    alpha = config.alpha or None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        factors = initialize(
            jax.random.fold_in(jax.random.key(config.seed), 1),
            dims,
            config.init,
            alpha=alpha,
            factor_scale=config.factor_scale or None,
            target=problem.target,
            layer_scales=tuple(config.layer_scales) or None,
        )
        lr, eta_hat = config.lr or None, config.eta_hat or None
        if lr is not None and eta_hat == 0.3:
            eta_hat = None  # the preset's default gives way to an explicit lr
        scale = float(problem.sharpness)
        rate = dynamics.check_rate(lr, eta_hat, depth, sigma[0] if sigma else None, scale)
        steps = run_length(config, sigma, depth, rate * scale)
        every = config.record_every or max(1, steps // (150 if config.curvature else 400))
        record = list(RUN_RECORD)
        if config.problem == "divergent_norm":
            record.append("product")
        n = sum(int(np.prod(np.shape(w))) for w in factors)
        if config.curvature and n <= landscape.MAX_DENSE:
            record.append("hessian")
        elif config.curvature or config.certify:
            say(f"no curvature and no certificates: N = {n} exceeds {landscape.MAX_DENSE}")
        say(f"{config.problem}, L = {depth}, dims {list(dims)}: {steps} steps of {rate:.4g}")
        trajectory = simulate(
            problem,
            factors,
            optimizer=config.optimizer,
            optimizer_kwargs=dict(config.optimizer_kwargs),
            lr=lr,
            eta_hat=eta_hat,
            steps=steps,
            record_every=every,
            record=record,
            sigma=sigma if sigma else None,
            alpha=alpha if sigma else None,
            inertia_tolerance=config.inertia_tolerance,
        )
        report = stages(trajectory)
    notes = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    notes = list(dict.fromkeys(notes))
    for note in notes:
        say(f"warning: {note}")
    certificates = {}
    if config.certify and n <= landscape.MAX_DENSE:
        for escape in report.escapes:
            certificates[escape.valley_step] = dynamics.certify(trajectory, escape)
        if trajectory.optimizer.name in OVERSHOOTING:
            report = confirm_swaps(report, certificates)
    drawn = figures.plot(trajectory, workdir / "figures", report=report)
    record_row = _record(config, trajectory, report, sigma, depth)
    if sigma:
        figure = figures.activation_times([record_row])
        drawn["7_activation_times"] = figures.save(
            figure, workdir / "figures" / "7_activation_times.png"
        )
    save_trajectory(trajectory, workdir / "trajectory.npz")
    write_tables([record_row], workdir)
    text = _run_report(config, trajectory, report, certificates, notes, drawn, workdir)
    write_text(workdir / "report.md", text)
    return report


def _record(config, trajectory, report, sigma, depth) -> dict[str, Any]:
    alpha = config.alpha or config.factor_scale**depth
    index = separability(sigma, depth, alpha) if sigma else None
    return {
        "id": "run",
        "L": depth,
        "dims": list(config.dims) or [config.dim] * (depth + 1),
        "R": len(sigma),
        "sigma": list(sigma),
        "alpha": alpha,
        "noise_std": config.noise_std,
        "lr": trajectory.lr,
        "optimizer": trajectory.optimizer.name,
        "hyper": dict(trajectory.optimizer.hyper),
        "init": config.init,
        "problem": config.problem,
        "seed": config.seed,
        "separability": index if index is not None and np.isfinite(index) else None,
        "status": trajectory.status,
        "steps": int(trajectory.state.step),
        "final_loss": float(trajectory.trace["loss"][-1]),
        "n_stages": report.n_stages,
        "n_plateaus": report.n_plateaus,
        "n_swaps": report.n_swaps,
        "n_rings": report.n_rings,
        "unfinished": report.unfinished is not None,
        "final_rank": report.final_rank,
        "activation_steps": list(report.activation_steps),
        "escapes": [dataclasses.asdict(escape) for escape in report.escapes],
    }


def _run_report(config, trajectory, report, certificates, notes, drawn, workdir) -> str:
    rank = len(report.sigma)
    rows = [
        (
            e.valley_step,
            e.peak_step,
            f"{e.rank_before} -> {e.rank_after}",
            e.kind,
            f"{e.loss_drop:.3g}",
            f"{certificates[e.valley_step]:.2f}" if e.valley_step in certificates else "-",
        )
        for e in report.escapes
    ]
    s = trajectory.rows["singular_values"][-1]
    claims = [
        ("number of stages by gradient valleys (A)", f"{report.n_stages} of {rank}"),
        ("plateaus visited (B)", f"{report.n_plateaus} of {rank}"),
        ("rank path", " -> ".join(map(str, report.rank_path))),
        ("activation steps", ", ".join(map(str, report.activation_steps))),
        ("swaps / rings", f"{report.n_swaps} / {report.n_rings}"),
        ("status", trajectory.status),
        ("final loss", f"{trajectory.trace['loss'][-1]:.3e}"),
        ("largest final singular values", ", ".join(f"{v:.4g}" for v in s[: rank + 1])),
    ]
    if trajectory.separability is not None:
        claims.append(("separability index S", f"{trajectory.separability:.2f}"))
    if "lambda_min" in trajectory.rows and trajectory.sigma:
        scale = float(trajectory.problem.sharpness)  # the test is for a unit curvature in W
        kind, g_hat, lam = landscape.classify_near_critical(
            trajectory.rows["grad_norm"][-1] / scale,
            trajectory.rows["lambda_min"][-1] / scale,
            len(trajectory.state.factors),
            trajectory.sigma[0],
        )
        claims.append(("end point (near-critical test)", f"{kind} (g {g_hat:.1e}, lam {lam:.1e})"))
    held = report.n_stages == rank == report.n_plateaus
    sentence = (
        f"The claim (R stages for a rank-R target) {'held' if held else 'did not hold'} in this "
        f"one run: {report.n_stages} stages and {report.n_plateaus} plateaus for R = {rank}."
    )
    if report.reference != "target":
        sentence = "No target spectrum is known: ranks are relative to the final iterate."
    if config.problem == "divergent_norm":
        hidden, erank = trajectory.rows["product"][:, 0, 0], trajectory.rows["effective_rank"]
        middle = len(hidden) // 10
        sentence = (
            f"Norm against loss: |W_11| went from {abs(hidden[middle]):.3g} at step "
            f"{trajectory.rows['step'][middle]} to {abs(hidden[-1]):.3g} while the effective rank "
            f"went from {erank[middle]:.3f} to {erank[-1]:.3f} and the loss from "
            f"{trajectory.rows['loss'][middle]:.2e} to {trajectory.rows['loss'][-1]:.2e}."
        )
    parts = [
        f"# {config.problem}, L = {len(trajectory.state.factors)}, {trajectory.optimizer.name}",
        sentence,
        experiments.markdown(("quantity", "value"), claims),
        "## Escapes",
        experiments.markdown(
            ("valley", "peak", "rank", "kind", "loss drop / f(0)", "certificate I"), rows
        ),
    ]
    if notes:
        parts += ["## Warnings", "\n".join(f"- {note}" for note in notes)]
    parts += [
        "## Figures",
        "\n".join(f"![{name}]({os.path.relpath(path, workdir)})" for name, path in drawn.items()),
    ]
    return "\n\n".join(parts) + "\n"


# --- sweeps --------------------------------------------------------------------------------------


class Progress:
    """A line with runs done, steps a second and the time left, at most twice a second."""

    def __init__(self, stream=sys.stderr):
        self.stream, self.started, self.shown, self.first = stream, time.monotonic(), 0.0, None

    def __call__(self, done: int, total: int, rate: float) -> None:
        now = time.monotonic()
        self.first = done if self.first is None else self.first
        if now - self.shown < 0.5 and done < total:
            return
        self.shown = now
        fresh = done - self.first
        left = (now - self.started) * (total - done) / fresh if fresh else float("nan")
        text = f"{done}/{total} runs  {rate:,.0f} steps/s  {left:,.0f} s left"
        if self.stream.isatty():
            self.stream.write("\r" + text.ljust(70) + ("\n" if done == total else ""))
        else:
            self.stream.write(text + "\n")
        self.stream.flush()


def run_sweep(config: Any, workdir: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Sweep presets: records.jsonl as runs end, then tables, figures, report."""
    if config.seeds < 1:
        raise ValueError(f"seeds: {config.seeds} must be at least 1")
    specs = getattr(experiments, config.experiment)(seeds=config.seeds)
    workdir.mkdir(parents=True, exist_ok=True)
    deadline = None
    if config.limit_minutes:
        deadline = time.monotonic() + 60.0 * config.limit_minutes
    say(f"{config.preset}: {len(specs)} runs on {len(jax.devices())} devices")
    for note in doubts(specs):
        say(f"warning: {note}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(separability index|eta_hat >= 2|dims: bottleneck)")
        records = sweep(
            specs,
            workdir / "records.jsonl",
            lanes=config.lanes,
            chunk=config.chunk,
            progress=Progress(),
            deadline=deadline,
        )
    write_tables(records, workdir)
    if records:
        write_text(workdir / "report.md", sweep_report(config.preset, records, len(specs), workdir))
    return records


def sweep_report(
    preset: str, records: Sequence[dict], planned: int, workdir: Path | None = None
) -> str:
    """One page: which claims held in these runs, with counts and intervals."""
    parts = [f"# {preset}", f"{len(records)} of {planned} runs finished."]
    if preset in ("defaults", "benchmark"):
        for name, test in (
            ("A = R", experiments.a_count),
            ("B = R", experiments.b_count),
            ("A = B = R", experiments.both_counts),
            ("rank path 0, 1, .., R", lambda r: r["rank_path_ordered"]),
            ("converged", lambda r: r["status"] == "converged"),
        ):
            counts = experiments.fraction(records, test)
            parts.append(f"- {name}: {experiments.show(*counts)}")
    if preset == "defaults":
        parts.append(experiments.rate_table(records, lambda r: (r["L"], r["R"]), ("L", "R")))
        missed = [r for r in records if not experiments.both_counts(r)]
        parts.append(
            "Misses: "
            + (
                "; ".join(
                    f"{r['id']} (A {r['n_stages']}, B {r['n_plateaus']}, R {r['R']})"
                    for r in missed
                )
                or "none"
            )
        )
    elif preset == "benchmark":
        table, counts = experiments.benchmark_table(records)
        parts.append(
            f"{counts['cells']} complete cells, {counts['compared']} comparisons, "
            f"{counts['outside']} outside at 95 %."
        )
        parts.append(table)
    elif preset == "failures":
        parts.append(
            experiments.rate_table(records, lambda r: (r["row"], r["L"]), ("setting", "L"))
        )
    elif preset == "edge_of_stability":
        parts.append(
            experiments.rate_table(records, lambda r: (r["eta"], r["L"]), ("eta_hat", "L"))
        )
        parts.append(stage_length_table(records))
    elif preset == "optimizers":
        parts.append(
            experiments.rate_table(records, lambda r: (r["method"], r["L"]), ("method", "L"))
        )
    elif preset == "completion":
        parts.append(completion_table(records))
    elif preset == "depth_selection":
        parts.append(depth_table(records))
    if workdir is not None:
        drawn = _sweep_figures(preset, records, workdir / "figures")
        parts.append("\n".join(f"![{p.stem}](figures/{p.name})" for p in drawn))
    return "\n\n".join(parts) + "\n"


def _sweep_figures(preset: str, records: Sequence[dict], directory: Path) -> list[Path]:
    drawn = []
    if preset in ("benchmark", "defaults"):
        if preset == "benchmark":
            figure = figures.success_map(records)
            drawn.append(figures.save(figure, directory / "6_success_map.png"))
        figure = figures.activation_times(records)
        drawn.append(figures.save(figure, directory / "7_activation_times.png"))
    if preset == "completion":
        figure = figures.completion_curves(records)
        drawn.append(figures.save(figure, directory / "9_completion.png"))
    return drawn


def stage_length_table(records: Sequence[dict]) -> str:
    """eta_hat times the first activation step: constant if stages last 1 / eta."""
    rows = []
    below = [r for r in records if r["eta"] < 2 and r["activation_steps"][0]]
    for (depth, eta), runs in experiments.group(below, lambda r: (r["L"], r["eta"])).items():
        values = [eta * r["activation_steps"][0] for r in runs if r["R"] == 1]
        if values:
            rows.append((depth, eta, len(values), f"{np.mean(values):.1f}"))
    rows.sort()
    return "R = 1, mean of eta_hat T_1:\n\n" + experiments.markdown(
        ("L", "eta_hat", "runs", "eta_hat T_1"), rows
    )


def completion_table(records: Sequence[dict]) -> str:
    """Test error and effective rank by depth and alpha."""
    rows = [
        (
            depth,
            f"{alpha:.0e}",
            len(runs),
            f"{np.median([r['relative_error'] ** 2 for r in runs]):.2e}",
            f"{max(r['relative_error'] ** 2 for r in runs):.2e}",
            f"{np.median([r['effective_rank'] for r in runs]):.2f}",
        )
        for (depth, alpha), runs in sorted(
            experiments.group(records, lambda r: (r["L"], r["alpha"])).items()
        )
    ]
    header = ("L", "alpha", "runs", "median test error", "largest", "median effective rank")
    return experiments.markdown(header, rows)


def depth_table(records: Sequence[dict]) -> str:
    """What the unobserved entries became: mean and 95 % interval by depth and alpha."""
    rows = []
    for (depth, alpha), runs in sorted(
        experiments.group(records, lambda r: (r["L"], r["alpha"])).items()
    ):
        matrices = np.asarray([r["product"] for r in runs])
        det = np.linalg.det(matrices)
        s = np.linalg.svd(matrices, compute_uv=False)
        off = np.abs(matrices[:, 0, 1] * matrices[:, 1, 0])
        rows.append(
            (
                depth,
                f"{alpha:.0e}",
                len(runs),
                _mean_interval(np.abs(matrices[:, 0, 1])),
                _mean_interval(off),
                _mean_interval(det),
                _mean_interval(s[:, 1] / s[:, 0]),
                _mean_interval([r["effective_rank"] for r in runs]),
            )
        )
    header = ("L", "alpha", "runs", "abs W_12", "abs W_12 W_21", "det W", "s_2 / s_1", "eff. rank")
    return experiments.markdown(header, rows)


def _mean_interval(values: Any) -> str:
    from scipy.stats import t

    values = np.asarray(values, np.float64)
    half = 0.0
    if len(values) > 1:
        half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return f"{values.mean():.3f} ± {half:.3f}"


# --- real matrices -------------------------------------------------------------------------------


def run_real_matrices(config: Any, workdir: Path, say: Callable[[str], None]) -> list[dict]:
    """Stages on bundled real matrices: reconstruction, completion, identity-started graphs."""
    rows, records = [], []
    for name in (part.strip() for part in config.names.split(",")):
        real = real_matrices.load(name)
        matrix, depth = real.matrix, int(config.depth)
        out, cols = matrix.shape
        dims = (cols, *[min(out, cols)] * (depth - 1), out)
        key = jax.random.key(config.seed)
        s = np.linalg.svd(matrix, compute_uv=False)
        sigma = tuple(s[s > 0.1].tolist())
        inits = ["gaussian"]
        if real.task == "completion":
            hidden = round((1 - config.hidden) * matrix.size)
            mask = _mask(key, matrix.shape, hidden)
            problem = make_problem("completion", target=matrix, mask=mask)
        elif real.task == "regression":
            problem = make_problem("regression", target=matrix, **real.data)
        else:
            problem = make_problem("reconstruction", target=matrix)
            if real.task == "symmetric":
                inits.append("identity")
        for init in inits:
            say(f"{name} {matrix.shape}, {real.task}, {init} start")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                factors = initialize(key, dims, init, alpha=config.alpha, target=matrix)
                lr = lr_from_eta_hat(0.3, depth, 1.0) / float(problem.sharpness)
                trajectory = simulate(
                    problem,
                    factors,
                    lr=lr,
                    steps=int(config.steps),
                    record_every=max(1, int(config.steps) // 200),
                    record=(*DEFAULT_RECORD, "alignment"),
                    sigma=sigma[: warn_bottleneck(dims, len(sigma))],
                )
                report = stages(trajectory)
            folder = workdir / "figures" / f"{name}_{init}"
            figures.plot(trajectory, folder, report=report)
            product = np.asarray(trajectory.detector.last_product)
            error = np.linalg.norm(product - matrix) / np.linalg.norm(matrix)
            best = [float(np.linalg.norm(s[r:]) / np.linalg.norm(s)) for r in range(len(s) + 1)][
                report.final_rank
            ]
            lowest = ""
            if real.task == "symmetric":
                ends = np.linalg.eigvalsh(0.5 * (product + product.T))
                want = np.linalg.eigvalsh(matrix)
                lowest = f"{ends[0]:.3f} (target {want[0]:.3f})"
            note = "; ".join(str(w.message).split(" (")[0] for w in caught)
            row = (
                name,
                f"{out}x{cols}",
                real.task,
                init,
                report.n_stages,
                report.n_plateaus,
                len(sigma),
                report.final_rank,
                f"{error:.3f}",
                f"{best:.3f}",
                lowest,
                note,
            )
            rows.append(row)
            records.append(
                {
                    "id": f"{name}_{init}",
                    "task": real.task,
                    "L": depth,
                    "status": trajectory.status,
                    "n_stages": report.n_stages,
                    "n_plateaus": report.n_plateaus,
                    "final_rank": report.final_rank,
                    "relative_error": float(error),
                    "activation_steps": list(report.activation_steps),
                    "escapes": [dataclasses.asdict(e) for e in report.escapes],
                }
            )
            write_tables(records, workdir)
    header = (
        "matrix",
        "shape",
        "task",
        "init",
        "stages",
        "plateaus",
        "values > 0.1",
        "final rank",
        "relative error",
        "best of that rank",
        "smallest eigenvalue",
        "warnings",
    )
    text = "# Real matrices\n\n" + experiments.markdown(header, rows) + "\n"
    write_text(workdir / "report.md", text)
    return records


def _mask(key: jax.Array, shape: tuple[int, int], count: int) -> np.ndarray:
    return np.asarray(observed_mask(key, shape, count, jnp.float64))


def execute(config: Any, workdir: Path, say: Callable[[str], None] = print) -> Any:
    """Run a preset; everything it makes lies below workdir."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(workdir / "config.json", json.dumps(config.to_dict(), indent=2, default=str) + "\n")
    if "experiment" in config:
        return run_sweep(config, workdir, say)
    if config.preset == "real_matrices":
        return run_real_matrices(config, workdir, say)
    return single_run(config, workdir, say)
