"""The nine figures of a DMF study, drawn from trajectories (1-5, 7, 8) and sweep records (6, 7, 9).

Every function returns a matplotlib Figure; `plot` writes those that a trajectory's recorded
quantities allow. Steps are on a linear axis; the stage shading changes at every counted escape.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from theory.closed_form import START_FACTOR, half_rise_time, separability
from theory.dynamics import Trajectory
from theory.stages import StageReport, stages

SHADES = ("#dfe8f3", "#f6ead9")
COLORS = plt.rcParams["axes.prop_cycle"].by_key()["color"]


def _axes(height: float = 4.2, rows: int = 1) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(
        rows, 1, figsize=(8.0, height), sharex=True, constrained_layout=True
    )
    return figure, axes


def _shade(axis, report: StageReport | None, last: int) -> None:
    """Stage r in an alternating shade, from the peak of its escape to the peak of the next."""
    if report is None:
        return
    counted = [e for e in report.escapes if e.kind in ("rank", "merged")]
    edges = [0, *(e.peak_step for e in counted), last]
    ranks = [report.rank_path[0], *report.rank_path[1:]]
    for i, (left, right, rank) in enumerate(zip(edges, edges[1:], ranks)):
        axis.axvspan(left, right, color=SHADES[i % 2], zorder=0, lw=0)
        share = (right - left) / max(last - edges[0], 1)
        if share < 0.02:
            continue  # too narrow for a label that could be read
        axis.text(
            0.5 * (left + right),
            1.005,
            f"rank {rank}" if share > 0.08 else str(rank),
            transform=axis.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8,
            color="0.35",
        )


def _positive(values: Any) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return np.where(values > 0, values, np.nan)


def _finish(axis, xlabel: str, ylabel: str, legend: bool = True) -> None:
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.margins(x=0)
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, framealpha=0.9)


def singular_values(trajectory: Trajectory, report: StageReport | None) -> Figure:
    """Figure 1: singular values against steps, target levels dashed, stages shaded."""
    figure, (linear, log) = _axes(6.4, 2)
    step, s = trajectory.rows["step"], trajectory.rows["singular_values"]
    levels = trajectory.sigma or ()
    shown = min(s.shape[1], len(levels) + 2)
    for axis in (linear, log):
        for i in range(shown):
            axis.plot(step, _positive(s[:, i]), color=COLORS[i % 10], label=f"$s_{{{i + 1}}}$")
        for i, level in enumerate(levels):
            axis.axhline(level, color=COLORS[i % 10], ls="--", lw=0.8)
        _shade(axis, report, int(step[-1]))
    log.set_yscale("log")
    _finish(linear, "", "singular values of W")
    _finish(log, "step", "singular values (log)", legend=False)
    return figure


def gradient_and_loss(trajectory: Trajectory, report: StageReport | None) -> Figure:
    """Figure 2: gradient norm and loss at every step, valleys and peaks marked."""
    figure, (top, bottom) = _axes(6.0, 2)
    start = int(trajectory.start.step) if trajectory.start is not None else 0
    grad, loss = (_positive(trajectory.trace[name]) for name in ("grad_norm", "loss"))
    step = start + np.arange(len(grad))
    top.plot(step, grad, color="0.2", lw=1)
    bottom.plot(step, loss, color=COLORS[0], lw=1)
    for axis in (top, bottom):
        axis.set_yscale("log")
        _shade(axis, report, int(step[-1]))
    markers = {"rank": "tab:green", "merged": "tab:purple", "swap": "tab:orange"}
    seen: set[str] = set()
    for escape in report.escapes if report else ():
        color = markers[escape.kind]
        label = None if escape.kind in seen else escape.kind
        seen.add(escape.kind)
        valley, peak = escape.valley_step - start, escape.peak_step - start
        if valley >= 0:
            top.plot(step[valley], grad[valley], "v", color=color, label=label)
        if 0 <= peak < len(grad):
            top.plot(step[peak], grad[peak], "^", color=color)
    if seen:
        top.plot([], [], "kv", ms=5, label="valley")
        top.plot([], [], "k^", ms=5, label="peak")
    _finish(top, "", "gradient norm")
    _finish(bottom, "step", "loss")
    return figure


def curvature(trajectory: Trajectory, report: StageReport | None) -> Figure:
    """Figure 3: lambda_min and lambda_max against steps, with the edge 2 / eta."""
    figure, (top, bottom) = _axes(6.0, 2)
    rows = trajectory.rows
    top.plot(rows["step"], rows["lambda_max"], color=COLORS[3], label=r"$\lambda_{max}$")
    edge = 2.0 / np.asarray(rows.get("adjusted_lr", np.full(len(rows["step"]), trajectory.lr)))
    top.plot(rows["step"], edge, color="k", ls="--", lw=1, label=r"$2/\eta$")
    bottom.plot(rows["step"], rows["lambda_min"], color=COLORS[0], label=r"$\lambda_{min}$")
    bottom.axhline(0, color="0.4", lw=0.8)
    for axis in (top, bottom):
        _shade(axis, report, int(rows["step"][-1]))
    _finish(top, "", "largest eigenvalue")
    _finish(bottom, "step", "smallest eigenvalue")
    return figure


def rank_distances(trajectory: Trajectory, report: StageReport | None) -> Figure:
    """Figure 4: distance of W to the best rank-r approximations of M."""
    figure, axis = _axes()
    rows = trajectory.rows
    count = len(trajectory.sigma or ()) + 1
    for r in range(min(count, rows["rank_distances"].shape[1])):
        axis.plot(rows["step"], _positive(rows["rank_distances"][:, r]), label=f"r = {r}")
    axis.set_yscale("log")
    _shade(axis, report, int(rows["step"][-1]))
    _finish(axis, "step", r"$\|W - M_r\|_F\, /\, \|M\|_F$")
    return figure


def ranks(trajectory: Trajectory, report: StageReport | None) -> Figure:
    """Figure 5: effective, stable and numerical rank against steps."""
    figure, axis = _axes()
    rows = trajectory.rows
    for name in ("effective_rank", "stable_rank", "numerical_rank"):
        style = "steps-post" if name == "numerical_rank" else "default"
        axis.plot(rows["step"], rows[name], label=name.replace("_", " "), drawstyle=style)
    _shade(axis, report, int(rows["step"][-1]))
    _finish(axis, "step", "rank")
    return figure


def balance_and_alignment(trajectory: Trajectory, report: StageReport | None) -> Figure:
    """Figure 8: balancedness, and |U^T G V| on and off the diagonal."""
    figure, (top, bottom) = _axes(6.0, 2)
    rows = trajectory.rows
    top.plot(rows["step"], _positive(rows["balancedness"]), color="0.2")
    for name, color in (("diag", COLORS[0]), ("off_diag", COLORS[1])):
        mean, std = rows[f"{name}_mean"], rows[f"{name}_std"]
        label = "diagonal" if name == "diag" else "off the diagonal"
        bottom.plot(rows["step"], _positive(mean), color=color, label=label)
        bottom.fill_between(
            rows["step"], _positive(mean), _positive(mean + std), color=color, alpha=0.2, lw=0
        )
    for axis in (top, bottom):
        axis.set_yscale("log")
        _shade(axis, report, int(rows["step"][-1]))
    _finish(top, "", r"$\max_j \|D_j\|_F$")
    _finish(bottom, "step", r"$|U^T G V|$, mean and std")
    return figure


def success_map(records: Sequence[dict]) -> Figure:
    """Figure 6: share of runs with A = R over (alpha, smallest gap) per depth, with S = 1."""
    depths = sorted({r["L"] for r in records})
    figure, axes = plt.subplots(
        1,
        len(depths),
        figsize=(1.2 + 3.4 * len(depths), 3.8),
        squeeze=False,
        constrained_layout=True,
    )
    image = None
    for axis, depth in zip(axes[0], depths):
        runs = [r for r in records if r["L"] == depth and r["R"] >= 2]
        alphas = sorted({r["alpha"] for r in runs})
        gaps = sorted({_gap(r["sigma"]) for r in runs})
        total = np.zeros((len(gaps), len(alphas)))
        good, index = np.zeros_like(total), np.zeros_like(total)
        for run in runs:
            i, j = gaps.index(_gap(run["sigma"])), alphas.index(run["alpha"])
            total[i, j] += 1
            good[i, j] += run["n_stages"] == run["R"]
            index[i, j] += separability(run["sigma"], depth, run["alpha"])
        share = np.where(total > 0, good / np.maximum(total, 1), np.nan)
        image = axis.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        for i, j in zip(*np.nonzero(total)):
            value = share[i, j]
            color = "white" if value < 0.6 else "black"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
        mean_index = np.where(total > 0, index / np.maximum(total, 1), np.nan)
        if min(total.shape) >= 2 and np.nanmin(mean_index) < 1 < np.nanmax(mean_index):
            filled = np.where(np.isnan(mean_index), np.nanmean(mean_index), mean_index)
            axis.contour(filled, levels=[1.0], colors="red", linewidths=1.5)
        axis.set_xticks(range(len(alphas)), [f"{a:.0e}" for a in alphas], rotation=60, fontsize=7)
        axis.set_yticks(range(len(gaps)), [f"{g:.2g}" for g in gaps], fontsize=7)
        axis.set_xlabel("alpha")
        axis.set_title(f"L = {depth}", fontsize=10)
    axes[0][0].set_ylabel("smallest gap of the spectrum")
    figure.colorbar(image, ax=axes[0].tolist(), label="share with A = R (red: S = 1)")
    return figure


def _gap(sigma: Sequence[float]) -> float:
    return round(float(np.min(-np.diff([*sigma, 0.0]))), 6)


def activation_times(records: Sequence[dict]) -> Figure:
    """Figure 7: measured activation times against the flow's half-rise times, log-log, y = x.

    A mode's closed form starts at s_0 = 0.3 alpha and knows nothing of the modes before it.
    """
    figure, axis = plt.subplots(figsize=(5.6, 5.2), constrained_layout=True)
    low, high = np.inf, 0.0
    for depth in sorted({r["L"] for r in records}):
        x, y = [], []
        for run in records:
            if run["L"] != depth:
                continue
            for sigma, step in zip(run["sigma"], run["activation_steps"]):
                start = START_FACTOR * run["alpha"]
                if step and start < 0.5 * sigma:
                    x.append(float(half_rise_time(start, sigma, depth)) / run["lr"])
                    y.append(step)
        if x:
            axis.loglog(x, y, ".", ms=4, alpha=0.6, label=f"L = {depth}")
            low, high = min(low, *x, *y), max(high, *x, *y)
    if high:
        axis.plot([low, high], [low, high], color="k", lw=0.8, ls="--", label="y = x")
    axis.set_xlabel("closed form: half-rise time / $\\eta$ (steps)")
    axis.set_ylabel("measured $T_r$ (steps)")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def completion_curves(records: Sequence[dict]) -> Figure:
    """Figure 9: test error and effective rank of the final W against alpha, per depth."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.8), constrained_layout=True)
    for depth in sorted({r["L"] for r in records}):
        runs = [r for r in records if r["L"] == depth]
        alphas = sorted({r["alpha"] for r in runs})
        for axis, value in (
            (left, lambda r: r["relative_error"] ** 2),
            (right, lambda r: r["effective_rank"]),
        ):
            columns = [[value(r) for r in runs if r["alpha"] == a] for a in alphas]
            middle = [np.median(c) for c in columns]
            spread = [
                [m - min(c) for m, c in zip(middle, columns)],
                [max(c) - m for m, c in zip(middle, columns)],
            ]
            axis.errorbar(alphas, middle, spread, marker="o", ms=4, capsize=3, label=f"L = {depth}")
    for axis, name in ((left, r"test error $\|W-M\|_F^2/\|M\|_F^2$"), (right, "effective rank")):
        axis.set_xscale("log")
        axis.set_xlabel("alpha")
        axis.set_ylabel(name + " (median, range)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    left.set_yscale("log")
    return figure


TRAJECTORY_FIGURES: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "1_singular_values": (singular_values, ("singular_values",)),
    "2_gradient_and_loss": (gradient_and_loss, ()),
    "3_curvature": (curvature, ("lambda_min", "lambda_max")),
    "4_rank_distances": (rank_distances, ("rank_distances",)),
    "5_ranks": (ranks, ("effective_rank", "stable_rank", "numerical_rank")),
    "8_balance_and_alignment": (balance_and_alignment, ("balancedness", "diag_mean")),
}


def save(figure: Figure, path: Path | str, dpi: int = 110) -> Path:
    """Write a figure as PNG (temporary name, then rename) and close it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=dpi, format="png")
    plt.close(figure)
    os.replace(partial, path)
    return path


def plot(
    trajectory: Trajectory,
    directory: Path | str | None = None,
    *,
    report: StageReport | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Draw every figure that the trajectory's recorded quantities allow.

    Returns {name: Figure}, or {name: path} where `directory` is given. names: a subset of
    `TRAJECTORY_FIGURES`.
    """
    report = stages(trajectory) if report is None else report
    result: dict[str, Any] = {}
    for name, (draw, needed) in TRAJECTORY_FIGURES.items():
        if names is not None and name not in names:
            continue
        if any(key not in trajectory.rows for key in needed):
            continue
        figure = draw(trajectory, report)
        result[name] = (
            figure if directory is None else save(figure, Path(directory) / f"{name}.png")
        )
    return result
