"""Frames of KITTI's object benchmark: points turned into a range image of the HDL-64.

Folders `training/{velodyne,image_2,calib,label_2}` as published. KITTI has no range images: points
are put into one by their angles, nearest first. Labels of `Car`, `Van`, `Truck`, `Pedestrian`,
`Person_sitting` and `Cyclist`; every fifth frame tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jaxmodels.driving.box_overlap import points_inside
from jaxmodels.driving.frame import Frame, Labels2D, Labels3D, check_frame
from jaxmodels.driving.patch_classifier import CLASSES
from jaxmodels.driving.range_image import SENSORS, points_to_range_image

NAMES = {
    "Car": "vehicle",
    "Van": "vehicle",
    "Truck": "vehicle",
    "Pedestrian": "pedestrian",
    "Person_sitting": "pedestrian",
    "Cyclist": "cyclist",
}
LIDAR_HEIGHT = 1.73  # meters above the road
TEST_EVERY = 5
# KITTI's cameras look along z with x to the right and y down; ours along x.
_TO_OURS = np.asarray([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


@dataclasses.dataclass(frozen=True)
class KittiFrames(Sequence):
    """Frames by number, read when they are asked for."""

    root: Path
    names: tuple[str, ...]

    @classmethod
    def below(cls, root: Path, split: str) -> KittiFrames:
        """Frames of `root/training`. Raises FileNotFoundError where there are none."""
        folder = root / "training"
        names = sorted(p.stem for p in (folder / "velodyne").glob("*.bin"))
        if not names:
            raise FileNotFoundError(f"{folder}: no velodyne/*.bin of KITTI's object benchmark")
        test = split == "test"
        kept = [n for i, n in enumerate(names) if (i % TEST_EVERY == TEST_EVERY - 1) == test]
        return cls(folder, tuple(kept))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Frame:
        name = self.names[index]
        points = np.fromfile(self.root / "velodyne" / f"{name}.bin", np.float32).reshape(-1, 4)
        calibration = read_calibration(self.root / "calib" / f"{name}.txt")
        with Image.open(self.root / "image_2" / f"{name}.png") as image:
            pixels = np.asarray(image.convert("RGB"))
        sensor = SENSORS["hdl64"]
        # The vehicle frame: under the LiDAR, on the road.
        lidar = np.eye(4)
        lidar[2, 3] = LIDAR_HEIGHT
        projection = calibration["P2"].reshape(3, 4)
        rectify, velodyne = np.eye(4), np.eye(4)
        rectify[:3, :3] = calibration["R0_rect"].reshape(3, 3)
        velodyne[:3] = calibration["Tr_velo_to_cam"].reshape(3, 4)
        # P2 = K [I | t]: the second camera stands aside of the reference one.
        offset = np.linalg.solve(projection[:, :3], projection[:, 3])
        seen = rectify @ velodyne
        seen[:3, 3] += offset
        turned = np.eye(4)
        turned[:3, :3] = _TO_OURS
        extrinsic = lidar @ np.linalg.inv(turned @ seen)
        # Files round rotations to few digits.
        u, _, v = np.linalg.svd(extrinsic[:3, :3])
        extrinsic[:3, :3] = u @ v
        intrinsic = np.zeros(9)
        intrinsic[:4] = projection[0, 0], projection[1, 1], projection[0, 2], projection[1, 2]
        range_, _ = points_to_range_image(points[:, :3], sensor)
        labels = self.root / "label_2" / f"{name}.txt"
        to_vehicle = lidar @ np.linalg.inv(rectify @ velodyne)
        three, two = Labels3D(), Labels2D()
        if labels.is_file():
            three, two = read_labels(labels, to_vehicle)
            returns = points_inside(three.boxes, points[:, :3] + lidar[:3, 3])
            three = three._replace(returns=returns)
        return check_frame(
            Frame(
                range=range_,
                inclinations=sensor.rows,
                azimuths=sensor.azimuths,
                lidar_extrinsic=lidar,
                image=pixels,
                camera_intrinsic=intrinsic,
                camera_extrinsic=extrinsic,
                wraps=True,
                labels3d=three,
                labels2d=two,
            )
        )


def read_calibration(path: Path) -> dict[str, np.ndarray]:
    """`NAME: numbers` lines. Raises ValueError naming the file and a matrix that is missing."""
    found = {}
    for line in path.read_text(encoding="ascii").splitlines():
        name, colon, numbers = line.partition(":")
        if colon:
            found[name.strip()] = np.asarray([float(n) for n in numbers.split()])
    for name, count in (("P2", 12), ("R0_rect", 9), ("Tr_velo_to_cam", 12)):
        if len(found.get(name, ())) != count:
            raise ValueError(f"{path}: {name} must have {count} numbers")
    return found


def read_labels(path: Path, to_vehicle: np.ndarray) -> tuple[Labels3D, Labels2D]:
    """Objects of a label file, boxes in the vehicle frame and in the image; `returns` are 0.

    Args:
      to_vehicle: [4, 4], rectified reference camera to vehicle.
    """
    boxes3d, boxes2d, classes = [], [], []
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), start=1):
        parts = line.split()
        if not parts or parts[0] not in NAMES:
            continue
        if len(parts) < 15:
            raise ValueError(f"{path}: line {number} has {len(parts)} fields, 15 are wanted")
        left, top, right, bottom, height, width, length, x, y, z, turn = map(float, parts[4:15])
        center = (to_vehicle @ np.asarray([x, y - height / 2, z, 1.0]))[:3]
        boxes3d.append((*center, length, width, height, -turn - np.pi / 2))
        boxes2d.append((left, top, right, bottom))
        classes.append(CLASSES.index(NAMES[parts[0]]))
    count = len(classes)
    ids = np.arange(count, dtype=np.int32)
    kinds = np.asarray(classes, np.int32)
    three = Labels3D(
        np.asarray(boxes3d, np.float32).reshape(-1, 7),
        kinds,
        np.zeros((count, 2), np.float32),
        np.zeros(count, np.int32),
        ids,
    )
    two = Labels2D(
        np.asarray(boxes2d, np.float32).reshape(-1, 4), kinds, ids, np.zeros(count, np.float32)
    )
    return three, two
