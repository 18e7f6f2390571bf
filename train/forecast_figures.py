"""Forecasts drawn on their lanes, as one PNG.

`python -m train.forecast_figures --config FILE --checkpoint DIR_OR_FILE --input PATH --output PNG`
takes what `python -m train.predict` takes for motion forecasting and draws the first nine scenes.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxmodels.platform_choice import choose_platform

choose_platform()

from train.command_line import stop_with_one_line  # noqa: E402
from train.data.motion_scenes import RawScene  # noqa: E402

MOST_SCENES = 9
COLORS = {
    "observed": "#222222",
    "future": "#228833",
    "forecast": "#cc3311",
    "others": "#4477aa",
    "lanes": "#999999",
}
_REACH = 45.0  # metres shown around the last observed place
_SCALE = 20.0  # metres of the bar in the corner


def draw_forecasts(
    scenes: Sequence[RawScene], forecasts: Sequence[np.ndarray], obs: int, path: str | Path
) -> None:
    """Draw forecasts [T, 2] in city coordinates over lanes and tracks; writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(3, len(scenes))
    rows = math.ceil(len(scenes) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 4.2 * rows), squeeze=False, layout="constrained"
    )
    for axis, scene, forecast in itertools.zip_longest(axes.flat, scenes, forecasts):
        if scene is None:
            axis.axis("off")
            continue
        for lane in scene.lanes:
            line = np.atleast_2d(lane)
            axis.plot(*line.T[:2], color=COLORS["lanes"], lw=1, marker="s" * (len(line) == 1))
        for i, (track, valid) in enumerate(zip(scene.tracks, scene.valid)):
            past = track[:obs][valid[:obs]]
            if i != scene.target:
                axis.plot(*past.T, color=COLORS["others"], lw=2)
                axis.plot(*past[-1:].T, color=COLORS["others"], marker="o", ms=4)
        track, valid = scene.tracks[scene.target], scene.valid[scene.target]
        here = track[obs - 1]
        parts = {"future": track[obs:][valid[obs:]], "observed": track[:obs][valid[:obs]]}
        for name, points in (*parts.items(), ("forecast", np.vstack([here, forecast]))):
            axis.plot(*points.T, color=COLORS[name], lw=2.5 if name != "forecast" else 2)
        axis.plot(*here, color=COLORS["observed"], marker="o", ms=6)
        title = scene.name
        if valid[obs : obs + len(forecast)].all() and len(track) >= obs + len(forecast):
            error = np.hypot(*(forecast[-1] - track[obs + len(forecast) - 1]))
            title += f": {error:.1f} m at the end"
        left, low = here - 0.93 * _REACH
        axis.plot([left, left + _SCALE], [low, low], color="black", lw=3)
        axis.text(left, low + 1.5, f"{_SCALE:g} m", fontsize=8)
        axis.set(
            title=title,
            aspect="equal",
            xticks=[],
            yticks=[],
            xlim=here[0] + np.array([-_REACH, _REACH]),
            ylim=here[1] + np.array([-_REACH, _REACH]),
        )
    handles = [plt.Line2D([], [], color=color, lw=2, label=n) for n, color in COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    part = Path(path).with_suffix(".part.png")
    figure.savefig(part, dpi=90)
    plt.close(figure)
    part.replace(path)


def main(argv: list[str]) -> int:
    """Load a checkpoint, forecast, draw."""
    from train.data import motion_scenes, pipeline
    from train.naming import ConfigError
    from train.predict import load_run

    config, paths, task, variables = load_run(argv)
    if config.task != "motion_forecasting":
        raise ConfigError(f"config.task: {config.task!r}; these figures are of motion_forecasting")
    _, options = pipeline.resolve(config.data)
    files = motion_scenes.sequences_below(paths["input"], options)[:MOST_SCENES]
    scenes = [motion_scenes.read_scene(file, options) for file in files]
    found = itertools.islice(task.forecasts(variables, paths["input"], config), len(scenes))
    draw_forecasts(scenes, [track for _, track in found], options["obs"], paths["output"])
    print(f"{len(scenes)} scenes in {paths['output']}")
    return 0


if __name__ == "__main__":
    sys.exit(stop_with_one_line(main, sys.argv))
