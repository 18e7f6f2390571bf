"""Frames of the Waymo Open Dataset (perception, version 1): TFRecord files of `Frame` messages.

Read without TensorFlow: records by their framing, messages by descriptors made here of the fields
that are used (names and numbers of waymo-research/waymo-open-dataset, `dataset.proto` and
`label.proto`); all other fields are skipped. The top LiDAR's first return and the front camera.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxmodels.driving import camera_projection, range_image
from jaxmodels.driving.cluster_boxes import oriented_corners
from jaxmodels.driving.frame import Frame, Labels2D, Labels3D, check_frame
from jaxmodels.driving.patch_classifier import CLASSES

TOP, FRONT = 1, 1
# Label.Type -> class.
TYPES = {1: "vehicle", 2: "pedestrian", 3: "sign", 4: "cyclist"}
SIGN = CLASSES.index("sign")
_HEAD = struct.Struct("<QI")
_TAIL = 4
_LARGEST_RECORD = 1 << 30

# message -> {field: (number, type, repeated)}; other messages by name.
_FIELDS: dict[str, dict[str, tuple[int, str, bool]]] = {
    "MatrixShape": {"dims": (1, "int32", True)},
    "MatrixFloat": {"data": (1, "packed float", True), "shape": (2, "MatrixShape", False)},
    "Transform": {"transform": (1, "double", True)},
    "Velocity": {"v_x": (1, "float", False), "v_y": (2, "float", False)},
    "CameraCalibration": {
        "name": (1, "int32", False),
        "intrinsic": (2, "double", True),
        "extrinsic": (3, "Transform", False),
        "width": (4, "int32", False),
        "height": (5, "int32", False),
    },
    "LaserCalibration": {
        "name": (1, "int32", False),
        "beam_inclinations": (2, "double", True),
        "beam_inclination_min": (3, "double", False),
        "beam_inclination_max": (4, "double", False),
        "extrinsic": (5, "Transform", False),
    },
    "Context": {
        "name": (1, "string", False),
        "camera_calibrations": (2, "CameraCalibration", True),
        "laser_calibrations": (3, "LaserCalibration", True),
    },
    "RangeImage": {"range_image_compressed": (2, "bytes", False)},
    "Laser": {"name": (1, "int32", False), "ri_return1": (2, "RangeImage", False)},
    "CameraImage": {
        "name": (1, "int32", False),
        "image": (2, "bytes", False),
        "velocity": (4, "Velocity", False),
    },
    "Box": {
        "center_x": (1, "double", False),
        "center_y": (2, "double", False),
        "center_z": (3, "double", False),
        "width": (4, "double", False),
        "length": (5, "double", False),
        "height": (6, "double", False),
        "heading": (7, "double", False),
    },
    "Metadata": {"speed_x": (1, "double", False), "speed_y": (2, "double", False)},
    "Label": {
        "box": (1, "Box", False),
        "metadata": (2, "Metadata", False),
        "type": (3, "int32", False),
        "id": (4, "string", False),
        "num_lidar_points_in_box": (7, "int32", False),
    },
    "CameraLabels": {"name": (1, "int32", False), "labels": (2, "Label", True)},
    "Frame": {
        "context": (1, "Context", False),
        "timestamp_micros": (2, "int64", False),
        "pose": (3, "Transform", False),
        "images": (4, "CameraImage", True),
        "lasers": (5, "Laser", True),
        "laser_labels": (6, "Label", True),
        "camera_labels": (8, "CameraLabels", True),
    },
}
_PACKAGE = "jaxmodels_waymo"


@functools.cache
def messages() -> dict[str, Any]:
    """Message classes by name, `Frame` and what it holds."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="waymo_fields.proto", package=_PACKAGE)
    file.syntax = "proto2"
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            packed = kind.startswith("packed ")
            kind = kind.removeprefix("packed ")
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            added = message.field.add(name=field, number=number, label=label)
            if kind in _FIELDS:
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                added.type = getattr(kinds, f"TYPE_{kind.upper()}")
            if packed:
                added.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in _FIELDS
    }


# TFRecord: length uint64, masked checksum of it, data, masked checksum of the data


@functools.cache
def _checksum_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


def masked_checksum(data: bytes) -> int:
    """CRC-32C of a record's part, rotated and shifted as TFRecord files have it."""
    table, crc = _checksum_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def record_places(path: Path) -> list[tuple[int, int]]:
    """(offset, length) of every record of a file, from the lengths alone.

    Raises ValueError naming the file and the place when it is no TFRecord file or is cut off.
    """
    places, size = [], path.stat().st_size
    with open(path, "rb") as file:
        at = 0
        while at < size:
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                raise ValueError(f"{path}: cut off at byte {at}")
            length, check = _HEAD.unpack(head)
            if length > _LARGEST_RECORD or masked_checksum(head[:8]) != check:
                raise ValueError(f"{path}: no TFRecord at byte {at} (wrong checksum of the length)")
            start = at + _HEAD.size
            at = start + length + _TAIL
            if at > size:
                raise ValueError(f"{path}: the record at byte {start} is cut off")
            places.append((start, length))
            file.seek(at)
    return places


def read_record(path: Path, place: tuple[int, int]) -> bytes:
    """The data of one record."""
    with open(path, "rb") as file:
        file.seek(place[0])
        return file.read(place[1])


def write_records(path: Path, records: Iterator[bytes] | Sequence[bytes]) -> None:
    """Write a TFRecord file."""
    with open(path, "wb") as file:
        for data in records:
            length = struct.pack("<Q", len(data))
            file.write(length + struct.pack("<I", masked_checksum(length)))
            file.write(data + struct.pack("<I", masked_checksum(data)))


# Messages to frames


def decode_range_image(data: bytes) -> np.ndarray:
    """Channels range, intensity, elongation, no-label zone of a range image, float32 [H, W, 4].

    Raises ValueError: not zlib data, or no matrix of four channels.
    """
    try:
        raw = zlib.decompress(data)
    except zlib.error:
        raise ValueError(
            f"not zlib data ({len(data)} bytes that begin with {data[:4]!r}): range images are "
            "stored compressed"
        ) from None
    matrix = messages()["MatrixFloat"].FromString(raw)
    shape = tuple(matrix.shape.dims)
    if len(shape) != 3 or shape[2] < 3 or np.prod(shape) != len(matrix.data):
        raise ValueError(f"range image of shape {shape} with {len(matrix.data)} values")
    return np.asarray(matrix.data, np.float32).reshape(shape)


def decode_frame(data: bytes) -> Frame:
    """A checked frame of a serialized `Frame` message.

    The camera's labels are taken where there are any, with boxes around the projected 3-D signs;
    else boxes around all projected 3-D labels.

    Raises ValueError when the top LiDAR, the front camera or their calibrations are missing.
    """
    message = messages()["Frame"].FromString(data)
    laser = _named(message.lasers, TOP, "top LiDAR")
    image = _named(message.images, FRONT, "front camera image")
    lidar = _named(message.context.laser_calibrations, TOP, "top LiDAR calibration")
    camera = _named(message.context.camera_calibrations, FRONT, "front camera calibration")
    own = [labels for labels in message.camera_labels if labels.name == FRONT]
    three = message.laser_labels
    names = ("center_x", "center_y", "center_z", "length", "width", "height", "heading")
    return assemble_frame(
        decode_range_image(laser.ri_return1.range_image_compressed),
        image.image,
        inclinations=lidar.beam_inclinations,
        inclination_limits=(lidar.beam_inclination_min, lidar.beam_inclination_max),
        lidar_extrinsic=lidar.extrinsic.transform,
        camera=(camera.intrinsic, camera.extrinsic.transform, camera.width, camera.height),
        pose=message.pose.transform,
        velocity=(image.velocity.v_x, image.velocity.v_y),
        timestamp=message.timestamp_micros * 1e-6,
        three=Boxes(
            [[getattr(label.box, name) for name in names] for label in three],
            [label.type for label in three],
            [label.id for label in three],
            [(label.metadata.speed_x, label.metadata.speed_y) for label in three],
            [label.num_lidar_points_in_box for label in three],
        ),
        two=Boxes(
            [
                (label.box.center_x, label.box.center_y, label.box.length, label.box.width)
                for label in own[0].labels
            ],
            [label.type for label in own[0].labels],
            [label.id for label in own[0].labels],
        )
        if own
        else None,
    )


class Boxes(NamedTuple):
    """Labels as files have them, N each; types that are none of `TYPES` are left out later.

    `boxes` is [N, 7] center, length, width, height, heading, or [N, 4] center and size in pixels;
    `types` numbers; `ids` strings; `speeds` [N, 2] in the global frame; `returns` LiDAR points.
    """

    boxes: Any
    types: Any
    ids: Sequence[str]
    speeds: Any = ()
    returns: Any = ()


def assemble_frame(
    channels: np.ndarray,
    jpeg: bytes,
    *,
    inclinations: Any,
    inclination_limits: tuple[float, float],
    lidar_extrinsic: Any,
    camera: tuple[Any, Any, int, int],
    pose: Any,
    velocity: tuple[float, float],
    timestamp: float,
    three: Boxes,
    two: Boxes | None,
) -> Frame:
    """A checked frame of what either version of the data set stores.

    Args:
      channels: range image [H, W, C] of range, intensity, elongation.
      inclinations: of the beams from below, or nothing: then evenly between the limits.
      camera: intrinsic [9], extrinsic [16], width, height.
      pose: vehicle to global [16], empty for none. velocity: the vehicle's, global.
      two: the camera's labels; None takes boxes around the projected 3-D ones. Signs are labeled
        in 3-D only: theirs are always such boxes.
    """
    height, width = channels.shape[:2]
    extrinsic = np.asarray(lidar_extrinsic).reshape(4, 4)
    pixels = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    intrinsic, camera_extrinsic, image_width, image_height = camera
    intrinsic, camera_extrinsic = np.asarray(intrinsic), np.asarray(camera_extrinsic)
    calibrated = camera_projection.Camera(
        intrinsic, camera_extrinsic.reshape(4, 4), image_width, image_height
    )
    camera_projection.check_camera(calibrated, pixels)
    # Velocities are global, of the vehicle and of the labels; boxes are in the vehicle's frame.
    turn = np.asarray(pose if len(pose) else np.eye(4)).reshape(4, 4)[:2, :2]
    labels3d = _labels_3d(three, turn)
    return check_frame(
        Frame(
            range=np.maximum(channels[..., 0], 0),
            inclinations=_inclinations(inclinations, inclination_limits, height),
            azimuths=range_image.column_azimuths(width, extrinsic),
            lidar_extrinsic=extrinsic,
            image=pixels,
            camera_intrinsic=intrinsic,
            camera_extrinsic=calibrated.extrinsic,
            wraps=True,
            labels3d=labels3d,
            labels2d=_with_signs(None if two is None else _labels_2d(two), labels3d, calibrated),
            ego_velocity=(np.asarray(velocity) @ turn).astype(np.float32),
            timestamp=timestamp,
            elongation=np.clip(channels[..., 2], 0, 1),
        )
    )


def _named(items, name: int, what: str):
    for item in items:
        if item.name == name:
            return item
    raise ValueError(f"the frame has no {what} (name {name})")


def _inclinations(given: Any, limits: tuple[float, float], beams: int) -> np.ndarray:
    """Row 0 the top beam; files list them from below."""
    rows = np.asarray(given)
    if not len(rows):
        rows = range_image.uniform_inclinations(*limits, beams)
    return np.sort(rows)[::-1]


def _labels_3d(found: Boxes, turn: np.ndarray) -> Labels3D:
    kept = _kept(found)
    return Labels3D(
        np.asarray(found.boxes, np.float32).reshape(-1, 7)[kept],
        _classes(found, kept),
        (np.asarray(found.speeds, np.float32).reshape(-1, 2)[kept] @ turn).astype(np.float32),
        np.asarray(found.returns, np.int32).reshape(-1)[kept],
        _ids(found, kept),
    )


def _labels_2d(found: Boxes) -> Labels2D:
    kept = _kept(found)
    rows = np.asarray(found.boxes, np.float64).reshape(-1, 4)[kept]
    half = rows[:, 2:] / 2
    boxes = np.concatenate([rows[:, :2] - half, rows[:, :2] + half], axis=1).astype(np.float32)
    none = np.zeros(len(kept), np.float32)
    return Labels2D(boxes, _classes(found, kept), _ids(found, kept), none)


def _kept(found: Boxes) -> np.ndarray:
    return np.asarray([i for i, kind in enumerate(found.types) if kind in TYPES], np.int64)


def _classes(found: Boxes, kept: np.ndarray) -> np.ndarray:
    return np.asarray([CLASSES.index(TYPES[found.types[i]]) for i in kept], np.int32)


def _ids(found: Boxes, kept: np.ndarray) -> np.ndarray:
    return np.asarray([zlib.crc32(found.ids[i].encode()) & 0x7FFFFFFF for i in kept], np.int32)


def _with_signs(
    labels: Labels2D | None, labels3d: Labels3D, camera: camera_projection.Camera
) -> Labels2D:
    """The camera's labels with the projected 3-D boxes of signs, which it has none of.

    Without them every patch of a sign would train as background.
    """
    projected = projected_labels(labels3d, camera)
    if labels is None or (labels.classes == SIGN).any():
        return projected if labels is None else labels
    signs = projected.classes == SIGN
    return Labels2D(*(np.concatenate([a, b[signs]]) for a, b in zip(labels, projected)))


def projected_labels(labels: Labels3D, camera: camera_projection.Camera) -> Labels2D:
    """Image boxes of objects that have LiDAR returns, around their projected corners."""
    kept = np.flatnonzero(labels.returns > 0)
    if not len(kept):
        return Labels2D()
    corners = oriented_corners(np.asarray(labels.boxes[kept], np.float64))
    flat = camera_projection.flat_boxes(
        corners, np.ones(corners.shape[:2], bool), camera, max_truncation=1.0, partial=True
    )
    ok = np.asarray(flat.ok)
    return Labels2D(
        np.asarray(flat.boxes)[ok].astype(np.float32),
        labels.classes[kept][ok],
        labels.ids[kept][ok],
        np.zeros(int(ok.sum()), np.float32),
    )


@dataclasses.dataclass(frozen=True)
class WaymoFrames(Sequence):
    """Frames of TFRecord files, decoded when they are asked for.

    Attributes:
      places: (file, offset, length) of every record, in the order of file names.
    """

    places: tuple[tuple[Path, int, int], ...]

    @classmethod
    def below(cls, folder: Path) -> WaymoFrames:
        """All `*.tfrecord` files of a folder. Raises FileNotFoundError where there are none."""
        files = sorted(folder.glob("*.tfrecord*"))
        if not files:
            raise FileNotFoundError(
                f"{folder}: no *.tfrecord files (version 1) and no folder lidar (version 2) of the "
                "Waymo Open Dataset"
            )
        return cls(tuple((file, *place) for file in files for place in record_places(file)))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Frame:
        file, offset, length = self.places[index]
        return decode_frame(read_record(file, (offset, length)))
