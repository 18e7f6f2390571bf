"""Frames of the Waymo Open Dataset (perception, version 2): a folder of Parquet files a component.

`FOLDER/<component>/<segment>.parquet`; one row a sensor and frame (or a label), columns named
`key.*` and `[Component].field` (waymo-research/waymo-open-dataset, `waymo_open_dataset/v2`). Range
images are lists of floats here, not compressed messages. Read are the top LiDAR's first return and
the front camera; label and pose components may be absent.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.driving.frame import Frame
from train.data.waymo_frames import FRONT, TOP, Boxes, assemble_frame

NEEDED = ("lidar", "camera_image", "lidar_calibration", "camera_calibration")
SEGMENT, TIME = "key.segment_context_name", "key.frame_timestamp_micros"
LASER, CAMERA = "key.laser_name", "key.camera_name"
_RETURN = "[LiDARComponent].range_image_return1."
_INTRINSIC = ("f_u", "f_v", "c_u", "c_v", "k1", "k2", "p1", "p2", "k3")
# Rows of range images decoded at once: one of the top LiDAR takes 2.7 MB.
_ROWS = 8


def is_version_2(folder: Path) -> bool:
    """Whether a folder has the second version's layout."""
    return (folder / "lidar").is_dir()


@dataclasses.dataclass(frozen=True)
class WaymoParquetFrames(Sequence):
    """Frames of the segments below a folder, read when they are asked for.

    Attributes:
      folder: holds `lidar/`, `camera_image/` and so on.
      places: (segment, timestamp in microseconds) of every frame, in order.
    """

    folder: Path
    places: tuple[tuple[str, int], ...]

    @classmethod
    def below(cls, folder: Path) -> WaymoParquetFrames:
        """All frames of `folder/lidar/*.parquet`.

        Raises FileNotFoundError naming a component that is missing, or where there are no files.
        """
        for component in NEEDED:
            if not (folder / component).is_dir():
                raise FileNotFoundError(
                    f"{folder}: no folder {component} of the Waymo Open Dataset, version 2"
                )
        segments = sorted(path.stem for path in (folder / "lidar").glob("*.parquet"))
        if not segments:
            raise FileNotFoundError(f"{folder / 'lidar'}: no *.parquet files")
        places = []
        for segment in segments:
            path = folder / "lidar" / f"{segment}.parquet"
            places += [(segment, time) for time in sorted(_rows_of(path, LASER, TOP))]
        return cls(folder, tuple(places))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Frame:
        segment, time = self.places[index]
        file = lambda component: self.folder / component / f"{segment}.parquet"  # noqa: E731
        lidar = _row(file("lidar"), LASER, TOP, time, (_RETURN + "values", _RETURN + "shape"))
        component = "[CameraImageComponent]."
        speed = component + "velocity.linear_velocity."
        pose = component + "pose.transform"
        wanted = (component + "image", pose, speed + "x", speed + "y")
        image = _row(file("camera_image"), CAMERA, FRONT, time, wanted)
        if file("vehicle_pose").is_file():
            column = "[VehiclePoseComponent].world_from_vehicle.transform"
            found = _labels(file("vehicle_pose"), (column,), time)
            image[pose] = found[column][0] if found[column] else image[pose]
        beams = _calibration(
            file("lidar_calibration"),
            "[LiDARCalibrationComponent].",
            ("extrinsic.transform", *(f"beam_inclination.{n}" for n in ("min", "max", "values"))),
            (LASER, TOP),
        )
        camera = _calibration(
            file("camera_calibration"),
            "[CameraCalibrationComponent].",
            ("extrinsic.transform", "width", "height", *(f"intrinsic.{n}" for n in _INTRINSIC)),
            (CAMERA, FRONT),
        )
        return assemble_frame(
            _range_image(lidar, file("lidar")),
            image[component + "image"],
            inclinations=beams["beam_inclination.values"] or (),
            inclination_limits=(beams["beam_inclination.min"], beams["beam_inclination.max"]),
            lidar_extrinsic=beams["extrinsic.transform"],
            camera=(
                [camera[f"intrinsic.{name}"] for name in _INTRINSIC],
                camera["extrinsic.transform"],
                camera["width"],
                camera["height"],
            ),
            pose=image[pose] or (),
            velocity=(image[speed + "x"] or 0.0, image[speed + "y"] or 0.0),
            timestamp=time * 1e-6,
            three=_boxes_3d(file("lidar_box"), time),
            two=_boxes_2d(file("camera_box"), time),
        )


def _range_image(row: dict[str, Any], path: Path) -> np.ndarray:
    values, shape = row[_RETURN + "values"], tuple(row[_RETURN + "shape"] or ())
    if len(shape) != 3 or shape[2] < 3 or values is None or len(values) != np.prod(shape):
        count = 0 if values is None else len(values)
        raise ValueError(f"{path}: range image of shape {shape} with {count} values")
    return np.asarray(values, np.float32).reshape(shape)


def _boxes_3d(path: Path, time: int) -> Boxes:
    if not path.is_file():
        return Boxes((), (), ())
    name = "[LiDARBoxComponent]."
    sides = [f"{name}box.{part}.{axis}" for part in ("center", "size") for axis in "xyz"]
    columns = (*sides, name + "box.heading")
    others = (name + "type", "key.laser_object_id", name + "num_lidar_points_in_box")
    speeds = (name + "speed.x", name + "speed.y")
    found = _labels(path, (*columns, *others, *speeds), time)
    return Boxes(
        np.stack([np.asarray(found[c], np.float64) for c in columns], axis=-1),
        found[others[0]],
        found[others[1]],
        # Objects without a known speed count as standing.
        np.stack([np.asarray([v or 0.0 for v in found[c]]) for c in speeds], axis=-1),
        found[others[2]],
    )


def _boxes_2d(path: Path, time: int) -> Boxes | None:
    if not path.is_file():
        return None
    name = "[CameraBoxComponent]."
    columns = [f"{name}box.{part}.{axis}" for part in ("center", "size") for axis in "xy"]
    others = (name + "type", "key.camera_object_id")
    found = _labels(path, (*columns, *others, CAMERA), time)
    rows = np.flatnonzero(np.asarray(found[CAMERA], np.int64) == FRONT)
    boxes = np.stack([np.asarray(found[c], np.float64) for c in columns], axis=-1)
    return Boxes(boxes[rows], *([found[c][i] for i in rows] for c in others))


# Files


def _open(path: Path):
    """Raises FileNotFoundError or ValueError naming the file."""
    from pyarrow import ArrowInvalid, parquet

    try:
        return parquet.ParquetFile(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file of the segment") from None
    except (ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: no Parquet file ({error})") from None


def _check_columns(path: Path, file: Any, columns: Sequence[str]) -> None:
    missing = sorted(set(columns) - set(file.schema_arrow.names))
    if missing:
        raise ValueError(f"{path}: no column {missing[0]}")


@functools.lru_cache(maxsize=4096)
def _rows_of(path: Path, sensor_key: str, sensor: int) -> dict[int, int]:
    """{timestamp: row} of one sensor's rows."""
    with _open(path) as file:
        _check_columns(path, file, (TIME, sensor_key))
        keys = file.read(columns=[TIME, sensor_key]).to_pydict()
    return {
        time: row
        for row, (time, name) in enumerate(zip(keys[TIME], keys[sensor_key]))
        if name == sensor
    }


def _row(
    path: Path, sensor_key: str, sensor: int, time: int, columns: Sequence[str]
) -> dict[str, Any]:
    """One sensor's row of one frame, without the rest of a large file in memory."""
    rows = _rows_of(path, sensor_key, sensor)
    if time not in rows:
        raise ValueError(f"{path}: no row of {sensor_key} {sensor} at {time} microseconds")
    wanted, group = rows[time], 0
    with _open(path) as file:
        _check_columns(path, file, columns)
        while wanted >= (size := file.metadata.row_group(group).num_rows):
            wanted, group = wanted - size, group + 1
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=list(columns)):
            if wanted < len(batch):
                one = batch.slice(wanted, 1)
                return {
                    # A list of half a million floats as an array, everything else as it is.
                    name: one.column(name)[0].values.to_numpy(zero_copy_only=False)
                    if name.endswith(".values") and one.column(name)[0].is_valid
                    else one.column(name)[0].as_py()
                    for name in columns
                }
            wanted -= len(batch)
    raise ValueError(f"{path}: cut off")


@functools.lru_cache(maxsize=16)
def _table(path: Path, columns: tuple[str, ...]) -> dict[str, list]:
    with _open(path) as file:
        _check_columns(path, file, columns)
        return file.read(columns=list(columns)).to_pydict()


def _labels(path: Path, columns: Sequence[str], time: int) -> dict[str, list]:
    """Columns of the rows of one frame."""
    table = _table(path, (TIME, *columns))
    rows = [i for i, t in enumerate(table[TIME]) if t == time]
    return {name: [table[name][i] for i in rows] for name in columns}


def _calibration(
    path: Path, prefix: str, fields: Sequence[str], sensor: tuple[str, int]
) -> dict[str, Any]:
    """Fields of a sensor's calibration, one a segment."""
    key, name = sensor
    table = _table(path, (key, *(prefix + field for field in fields)))
    if name not in table[key]:
        raise ValueError(f"{path}: no row of {key} {name}")
    row = table[key].index(name)
    return {field: table[prefix + field][row] for field in fields}
