"""A frame of the LiDAR-first pipeline drawn: range image, clusters, boxes and their priorities.

`python -m train.frame_figures --config FILE --checkpoint DIR_OR_FILE --input PATH --output PNG`
takes what `python -m train.predict` takes for patch classification; of several frames each gets its
own picture, `PNG` with the frame's name added. `python -m train.data.frame_files FOLDER` writes
frames.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jaxmodels.platform_choice import choose_platform

choose_platform()

from train.command_line import stop_with_one_line  # noqa: E402

MOST_FRAMES = 9


def main(argv: list[str]) -> int:
    """Load a checkpoint, run the pipeline over the frames as one drive, draw."""
    from jaxmodels.driving import depth_clustering
    from jaxmodels.driving.lidar_figures import draw_frame
    from train.data.driving_frames import load_frame
    from train.naming import ConfigError
    from train.predict import load_run
    from train.tasks.patch_classification import frame_files

    config, paths, task, variables = load_run(argv)
    if config.task != "patch_classification":
        raise ConfigError(
            f"config.task: {config.task!r}; these figures are of patch_classification"
        )
    files = frame_files(paths["input"])[:MOST_FRAMES]
    output = Path(paths["output"])
    pipeline = task.build_pipeline(variables, config)
    state = None
    for file in files:
        frame = load_frame(file)
        state = pipeline.warm_up(frame) if state is None else state
        result, state = pipeline(frame, state)
        clustered = depth_clustering.cluster(
            frame.range,
            frame.inclinations,
            frame.azimuths,
            wraps=frame.wraps,
            options=pipeline.options.clustering,
            elongation=frame.elongation,
        )
        name = output if len(files) == 1 else output.with_stem(f"{output.stem}_{file.stem}")
        part = name.with_suffix(".part.png")
        draw_frame(frame, result, clustered.ground.ground).savefig(part, dpi=90)
        part.replace(name)
        print(f"{file.name} in {name}")
    return 0


if __name__ == "__main__":
    sys.exit(stop_with_one_line(main, sys.argv))
