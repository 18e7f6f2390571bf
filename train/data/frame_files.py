"""`python -m train.data.frame_files FOLDER [--frames 3] [--seed 0] [--crowd 1.0] [--scale 0.25]`.

Writes frames of one simulated drive, ten a second (`--stride 10`: one), as `.npz` files that
`train.predict` and `train.frame_figures` read. `--source waymo --path DATA [--first 0]` (or
`nuscenes`, `kitti`) writes frames of a data set's evaluation split instead, of a whole turn the
columns before the camera.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from train.data import driving_frames

# Degrees that are kept on either side of straight ahead: what the front camera sees.
HALF_ANGLES = {"waymo": 26.0}


def write_frames(
    folder: str | Path,
    frames: int = 3,
    seed: int = 0,
    crowd: float = 1.0,
    scale: float = 0.25,
    stride: int = 1,
) -> list[Path]:
    """Write `frames` frames of a drive, `stride` tenths of a second apart; returns the files."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    settings = driving_frames.simulation_options(driving_frames.OPTIONS) | {
        "test_frames": frames,
        "frames_a_drive": frames,
        "frame_stride": stride,
        "data_seed": seed,
        "crowd": crowd,
        "image_scale": scale,
    }
    paths = []
    for i, frame in enumerate(driving_frames.simulated_drives("test", settings)):
        paths.append(place / f"{i:03d}.npz")
        driving_frames.save_frame(paths[-1], frame)
    return paths


def copy_frames(
    folder: str | Path,
    source: str,
    path: str | Path,
    frames: int = 3,
    first: int = 0,
) -> list[Path]:
    """Write `frames` frames of a data set's evaluation split from number `first` on.

    Raises ValueError or FileNotFoundError as `driving_frames.frames`.
    """
    options = {"source": source, "path": str(path), "half_angle": HALF_ANGLES.get(source, 45.0)}
    found = driving_frames.frames(options, "test")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(first, min(first + frames, len(found))):
        paths.append(place / f"{number:06d}.npz")
        driving_frames.save_frame(paths[-1], found[number])
    return paths


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m train.data.frame_files", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--frames", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crowd", type=float, default=1.0)
    parser.add_argument("--scale", type=float, default=0.25)
    parser.add_argument("--stride", type=int, default=1, help="tenths of a second between frames")
    parser.add_argument("--source", choices=driving_frames.KINDS, default="simulated")
    parser.add_argument("--path", default="", help="the data set's folder")
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    if given.source == "simulated":
        paths = write_frames(
            given.folder, given.frames, given.seed, given.crowd, given.scale, given.stride
        )
    else:
        try:
            paths = copy_frames(given.folder, given.source, given.path, given.frames, given.first)
        except (OSError, ValueError) as error:
            raise SystemExit(f"error: {error}") from None
    print(f"{len(paths)} frames in {given.folder}")


if __name__ == "__main__":
    main()
