"""Frames of nuScenes: its JSON tables, top LiDAR and front camera, without the devkit.

`path/VERSION/*.json` (VERSION as `v1.0-trainval` or `v1.0-mini`, the first folder found) and the
files that `sample_data.json` names. nuScenes has no range images: points are put into one of its
32 beams by their angles. Image boxes are those around the projected 3-D boxes; every fifth scene
tests. Tables and axes as https://www.nuscenes.org/nuscenes describes them: quaternions w x y z,
cameras look along z with x to the right and y down, sizes are width, length, height.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxmodels.driving import range_image
from jaxmodels.driving.camera_projection import Camera
from jaxmodels.driving.frame import Frame, Labels3D, check_frame
from jaxmodels.driving.patch_classifier import CLASSES
from train.data.waymo_frames import projected_labels

LIDAR, CAMERA = "LIDAR_TOP", "CAM_FRONT"
COLUMNS = 1080
TEST_EVERY = 5
# Beginning of a category's name -> class; the rest (animals, cones, barriers) is left out.
CATEGORIES = {
    "human.pedestrian": "pedestrian",
    "vehicle.bicycle": "cyclist",
    "vehicle.motorcycle": "cyclist",
    "vehicle": "vehicle",
}
_TABLES = (
    "scene",
    "sample",
    "sample_data",
    "sample_annotation",
    "calibrated_sensor",
    "sensor",
    "ego_pose",
    "instance",
    "category",
)
_TO_OURS = np.asarray([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


def rotation(quaternion: Sequence[float]) -> np.ndarray:
    """Rotation matrix [3, 3] of a unit quaternion w x y z."""
    w, x, y, z = np.asarray(quaternion, np.float64) / np.linalg.norm(quaternion)
    return np.asarray(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _pose(row: dict[str, Any]) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation(row["rotation"]), row["translation"]
    return pose


@functools.lru_cache(maxsize=2)
def _tables(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name in _TABLES:
        rows = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        found[name] = {row["token"]: row for row in rows}
    return found


@dataclasses.dataclass(frozen=True)
class NuScenesFrames(Sequence):
    """Key frames, read when they are asked for.

    Attributes:
      root: the data set's folder. tables: the folder of its JSON tables. samples: tokens.
    """

    root: Path
    tables: Path
    samples: tuple[str, ...]

    @classmethod
    def below(cls, root: Path, split: str) -> NuScenesFrames:
        """Key frames of a split. Raises FileNotFoundError where there are no tables."""
        folders = sorted(p.parent for p in root.glob("v1.0-*/sample_data.json"))
        if not folders:
            raise FileNotFoundError(f"{root}: no v1.0-*/sample_data.json of nuScenes")
        tables = _tables(folders[0])
        scenes = sorted(tables["scene"])
        test = {s for i, s in enumerate(scenes) if i % TEST_EVERY == TEST_EVERY - 1}
        kept = [
            row["token"]
            for row in sorted(tables["sample"].values(), key=lambda r: r["timestamp"])
            if (row["scene_token"] in test) == (split == "test")
        ]
        return cls(root, folders[0], tuple(kept))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Frame:
        tables, sample = _tables(self.tables), self.samples[index]
        lidar, camera = self._data(sample, LIDAR), self._data(sample, CAMERA)
        ego = _pose(tables["ego_pose"][lidar["ego_pose_token"]])
        sensor = range_image.Sensor(range_image.SENSORS["hdl32"].inclinations, COLUMNS)
        mounted = _pose(tables["calibrated_sensor"][lidar["calibrated_sensor_token"]])
        points = np.fromfile(self.root / lidar["filename"], np.float32).reshape(-1, 5)[:, :3]
        # The sensor's frame with the vehicle's axes: the middle column then looks ahead.
        image, _ = range_image.points_to_range_image(points @ mounted[:3, :3].T, sensor)
        place = np.eye(4)
        place[:3, 3] = mounted[:3, 3]
        calibration = tables["calibrated_sensor"][camera["calibrated_sensor_token"]]
        turned = np.eye(4)
        turned[:3, :3] = _TO_OURS
        # The camera's frame is a little later: bring it to the LiDAR's vehicle frame.
        later = np.linalg.inv(ego) @ _pose(tables["ego_pose"][camera["ego_pose_token"]])
        extrinsic = later @ _pose(calibration) @ np.linalg.inv(turned)
        matrix = np.asarray(calibration["camera_intrinsic"])
        intrinsic = np.zeros(9)
        intrinsic[:4] = matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]
        with Image.open(self.root / camera["filename"]) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        labels = self._labels(sample, ego)
        seen = Camera(intrinsic, extrinsic, pixels.shape[1], pixels.shape[0])
        return check_frame(
            Frame(
                range=image,
                inclinations=sensor.rows,
                azimuths=sensor.azimuths,
                lidar_extrinsic=place,
                image=pixels,
                camera_intrinsic=intrinsic,
                camera_extrinsic=extrinsic,
                wraps=True,
                labels3d=labels,
                labels2d=projected_labels(labels, seen),
                ego_velocity=self._ego_velocity(sample, ego),
                timestamp=tables["sample"][sample]["timestamp"] * 1e-6,
            )
        )

    def _data(self, sample: str, channel: str) -> dict[str, Any]:
        rows = _key_data(self.tables).get((sample, channel))
        if rows is None:
            raise ValueError(f"{self.tables}: sample {sample} has no key frame of {channel}")
        return rows

    def _ego_velocity(self, sample: str, ego: np.ndarray) -> np.ndarray:
        """From the vehicle's place at the sample before or after, m/s in ego axes."""
        tables = _tables(self.tables)
        row = tables["sample"][sample]
        for other in (row.get("next"), row.get("prev")):
            if other:
                there = tables["ego_pose"][self._data(other, LIDAR)["ego_pose_token"]]
                seconds = (tables["sample"][other]["timestamp"] - row["timestamp"]) * 1e-6
                moved = np.asarray(there["translation"]) - ego[:3, 3]
                return ((moved / seconds) @ ego[:3, :3])[:2].astype(np.float32)
        return np.zeros(2, np.float32)

    def _labels(self, sample: str, ego: np.ndarray) -> Labels3D:
        tables = _tables(self.tables)
        boxes, classes, velocity, returns, ids = [], [], [], [], []
        for row in _annotations(self.tables).get(sample, ()):
            instance = tables["instance"][row["instance_token"]]
            name = tables["category"][instance["category_token"]]["name"]
            kind = next((c for start, c in CATEGORIES.items() if name.startswith(start)), None)
            if kind is None:
                continue
            center = (np.asarray(row["translation"]) - ego[:3, 3]) @ ego[:3, :3]
            ahead = (ego[:3, :3].T @ rotation(row["rotation"]))[:, 0]
            width, length, height = row["size"]
            boxes.append((*center, length, width, height, np.arctan2(ahead[1], ahead[0])))
            classes.append(CLASSES.index(kind))
            velocity.append(self._velocity(row) @ ego[:3, :3])
            returns.append(row["num_lidar_pts"])
            ids.append(zlib.crc32(row["instance_token"].encode()) & 0x7FFFFFFF)
        return Labels3D(
            np.asarray(boxes, np.float32).reshape(-1, 7),
            np.asarray(classes, np.int32),
            np.asarray(velocity, np.float32).reshape(-1, 3)[:, :2],
            np.asarray(returns, np.int32),
            np.asarray(ids, np.int32),
        )

    def _velocity(self, row: dict[str, Any]) -> np.ndarray:
        """Over ground, global axes, from the annotations before and after; 0 without any."""
        tables = _tables(self.tables)
        ends = [tables["sample_annotation"].get(row.get(key) or "") for key in ("prev", "next")]
        first, last = (end or row for end in ends)
        times = [tables["sample"][end["sample_token"]]["timestamp"] for end in (first, last)]
        seconds = (times[1] - times[0]) * 1e-6
        if not seconds:
            return np.zeros(3)
        return (np.asarray(last["translation"]) - first["translation"]) / seconds


@functools.lru_cache(maxsize=2)
def _key_data(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(sample, channel) -> row of `sample_data` of every key frame."""
    tables = _tables(folder)
    found = {}
    for row in tables["sample_data"].values():
        mounted = tables["calibrated_sensor"][row["calibrated_sensor_token"]]
        channel = tables["sensor"][mounted["sensor_token"]]["channel"]
        if row["is_key_frame"] and channel in (LIDAR, CAMERA):
            found[(row["sample_token"], channel)] = row
    return found


@functools.lru_cache(maxsize=2)
def _annotations(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in _tables(folder)["sample_annotation"].values():
        found.setdefault(row["sample_token"], []).append(row)
    return found
