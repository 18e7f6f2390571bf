"""What a run tells: progress lines, metrics.jsonl, curves.png, TensorBoard, report.md."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np


class Reporter:
    """Writes the run directory; only process 0 writes, the others keep silent."""

    def __init__(self, workdir, steps: int, batch_size: int, *, active=True, tensorboard=False):
        self.workdir, self.steps, self.batch_size, self.active = (
            Path(workdir),
            steps,
            batch_size,
            active,
        )
        self.rows: list[dict] = []
        self._mark: tuple[float, int] | None = None
        self._board = None
        if not active:
            return
        path = self.workdir / "metrics.jsonl"
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    self.rows.append(json.loads(line))
                except json.JSONDecodeError:
                    break  # a line cut short by a kill; its step will be run and written again
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ImportError(
                    "config.tensorboard needs the extra `tensorboard`: "
                    "pip install -e '.[tensorboard]'"
                ) from None
            self._board = SummaryWriter(str(self.workdir / "tensorboard"))

    def say(self, text: str) -> None:
        """One line for a person."""
        if self.active:
            print(text, file=sys.stderr, flush=True)

    def start(self, step: int) -> None:
        """Forget rows that a resumed run will write again; start the clock."""
        self._mark = (time.perf_counter(), step)
        if self.active:
            kept = [r for r in self.rows if r["step"] <= step]
            if kept != self.rows or (self.workdir / "metrics.jsonl").exists():
                self.rows = kept
                text = "".join(json.dumps(r) + "\n" for r in kept)
                _write(self.workdir / "metrics.jsonl", text)

    def log(self, step: int, kind: str, metrics: dict) -> None:
        """Append a row and print it, with examples/s and the time left for training rows."""
        metrics = {k: _number(v) for k, v in metrics.items()}
        tail = ""
        if kind == "train" and self._mark is not None:
            now = time.perf_counter()
            then, at = self._mark
            rate = (step - at) / max(now - then, 1e-9)
            self._mark = (now, step)
            metrics["examples_per_s"] = round(rate * self.batch_size, 2)
            left = (self.steps - step) / max(rate, 1e-9)
            tail = f"  {metrics['examples_per_s']:.0f} examples/s  {_clock(left)} left"
        if not self.active:
            return
        row = {"step": step, "kind": kind, **metrics}
        self.rows.append(row)
        with open(self.workdir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if self._board is not None:
            for key, value in metrics.items():
                self._board.add_scalar(f"{kind}/{key}", value, step)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k != "examples_per_s")
        self.say(f"{kind:5s} {step}/{self.steps}  {shown}{tail}")

    def resume_clock(self, step: int) -> None:
        """Leave evaluations and saves out of the examples/s of training."""
        if self._mark is not None:
            self._mark = (time.perf_counter(), step)

    def finish(self, title: str, numbers: dict, command: str) -> None:
        """Draw the curves, write report.md and print the final table."""
        if not self.active:
            return
        if self._board is not None:
            self._board.close()
        draw_curves(self.rows, self.workdir / "curves.png")
        lines = ["| quantity | value |", "|---|---|"]
        lines += [
            f"| {k} | {v:.6g} |" if isinstance(v, float) else f"| {k} | {v} |"
            for k, v in numbers.items()
        ]
        table = "\n".join(lines)
        _write(
            self.workdir / "report.md",
            f"# {title}\n\n`{command}`\n\n{table}\n\n![curves](curves.png)\n",
        )
        print(table, flush=True)
        self.say(f"curves and report in {self.workdir}")


def draw_curves(rows: list[dict], path: Path) -> None:
    """Every logged quantity against the step, training and evaluation in one panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    skip = {"step", "kind", "examples_per_s"}
    keys = list(dict.fromkeys(k for r in rows for k in r if k not in skip))
    if not keys:
        return
    columns = min(3, len(keys))
    height = -(-len(keys) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(4.2 * columns, 3 * height), squeeze=False)
    for axis, key in zip(axes.flat, keys):
        for kind, color in (("train", "#4477aa"), ("eval", "#cc6677"), ("probe", "#228833")):
            points = [(r["step"], r[key]) for r in rows if r["kind"] == kind and key in r]
            points = [(s, v) for s, v in points if isinstance(v, int | float)]
            if points:
                axis.plot(
                    *np.array(points, float).T,
                    color=color,
                    label=kind,
                    marker="." if len(points) < 30 else None,
                )
        axis.set(title=key.replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    for axis in axes.flat[len(keys) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".part.png"), dpi=110)
    plt.close(figure)
    path.with_suffix(".part.png").replace(path)


def _number(value):
    value = np.asarray(value)
    return value.item() if value.ndim == 0 else value.tolist()


def _clock(seconds: float) -> str:
    seconds = int(min(seconds, 359999))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
