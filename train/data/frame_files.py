"""`python -m train.data.frame_files FOLDER [--frames 3] [--seed 0] [--crowd 1.0] [--scale 0.25]`.

Writes frames of one simulated drive, a second apart, as `.npz` files that `train.predict` and
`train.frame_figures` read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from train.data import driving_frames


def write_frames(
    folder: str | Path, frames: int = 3, seed: int = 0, crowd: float = 1.0, scale: float = 0.25
) -> list[Path]:
    """Write `frames` frames of a drive of the evaluation split; returns the files."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    settings = driving_frames.simulation_options(driving_frames.OPTIONS) | {
        "test_frames": frames,
        "frames_a_drive": frames,
        "data_seed": seed,
        "crowd": crowd,
        "image_scale": scale,
    }
    paths = []
    for i, frame in enumerate(driving_frames.simulated_drives("test", settings)):
        paths.append(place / f"{i:03d}.npz")
        driving_frames.save_frame(paths[-1], frame)
    return paths


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m train.data.frame_files", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--frames", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crowd", type=float, default=1.0)
    parser.add_argument("--scale", type=float, default=0.25)
    arguments = vars(parser.parse_args())
    print(f"{len(write_frames(**arguments))} frames in {arguments['folder']}")


if __name__ == "__main__":
    main()
