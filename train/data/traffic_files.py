"""`python -m train.data.traffic_files FOLDER [--split val] [--scenes 20] [--seed 0] [--crossing]`.

Writes simulated scenes as CSV files of Argoverse 1 with their lanes beside them, the same scenes
that training and evaluation on `motion_scenes` see.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from train.data import motion_files, traffic_simulator
from train.data.motion_scenes import SPLITS


def write_scenes(
    folder: str | Path, split: str = "val", scenes: int = 20, seed: int = 0, crossing: bool = False
) -> list[Path]:
    """Write scenes 0 .. `scenes` - 1 of a split to `folder/{split}/data`; returns the CSV files."""
    place = Path(folder) / split / "data"
    place.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(scenes):
        scene = traffic_simulator.simulate((seed, SPLITS.index(split), i), crossing)
        path = place / f"{i}.csv"
        motion_files.write_lanes(
            path.with_suffix(".lanes.json"), scene.lanes, scene.lane_attributes
        )
        motion_files.write_sequence(path, scene.tracks, scene.valid)
        paths.append(path)
    return paths


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m train.data.traffic_files", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--split", choices=SPLITS, default="val")
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crossing", action="store_true")
    arguments = vars(parser.parse_args())
    print(f"{len(write_scenes(**arguments))} scenes in {arguments['folder']}")


if __name__ == "__main__":
    main()
