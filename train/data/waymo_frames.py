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
from typing import Any

import numpy as np
from PIL import Image

from jaxmodels.driving import camera_projection, range_image
from jaxmodels.driving.cluster_boxes import oriented_corners
from jaxmodels.driving.frame import Frame, Labels2D, Labels3D, check_frame
from jaxmodels.driving.patch_classifier import CLASSES

TOP, FRONT = 1, 1
# Label.Type -> class.
TYPES = {1: "vehicle", 2: "pedestrian", 3: "sign", 4: "cyclist"}
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

    The camera's labels are taken where there are any; else boxes around the projected 3-D ones.

    Raises ValueError when the top LiDAR, the front camera or their calibrations are missing.
    """
    message = messages()["Frame"].FromString(data)
    laser = _named(message.lasers, TOP, "top LiDAR")
    image = _named(message.images, FRONT, "front camera image")
    laser_calibration = _named(message.context.laser_calibrations, TOP, "top LiDAR calibration")
    calibration = _named(message.context.camera_calibrations, FRONT, "front camera calibration")
    channels = decode_range_image(laser.ri_return1.range_image_compressed)
    height, width = channels.shape[:2]
    extrinsic = np.asarray(laser_calibration.extrinsic.transform).reshape(4, 4)
    pixels = np.asarray(Image.open(io.BytesIO(image.image)).convert("RGB"))
    # The camera's velocity is global; the labels' are taken as they are in the vehicle frame.
    pose = np.asarray(message.pose.transform or np.eye(4).reshape(-1)).reshape(4, 4)
    velocity = np.asarray([image.velocity.v_x, image.velocity.v_y, 0.0]) @ pose[:3, :3]
    turn = pose[:2, :2]
    camera_extrinsic = np.asarray(calibration.extrinsic.transform).reshape(4, 4)
    intrinsic = np.asarray(calibration.intrinsic)
    camera = camera_projection.Camera(
        intrinsic, camera_extrinsic, calibration.width, calibration.height
    )
    camera_projection.check_camera(camera, pixels)
    labels3d = _labels_3d(message.laser_labels, turn)
    own = [labels for labels in message.camera_labels if labels.name == FRONT]
    labels2d = _labels_2d(own[0].labels) if own else projected_labels(labels3d, camera)
    return check_frame(
        Frame(
            range=np.maximum(channels[..., 0], 0),
            inclinations=_inclinations(laser_calibration, height),
            azimuths=range_image.column_azimuths(width, extrinsic),
            lidar_extrinsic=extrinsic,
            image=pixels,
            camera_intrinsic=intrinsic,
            camera_extrinsic=camera_extrinsic,
            wraps=True,
            labels3d=labels3d,
            labels2d=labels2d,
            ego_velocity=velocity[:2].astype(np.float32),
            timestamp=message.timestamp_micros * 1e-6,
            elongation=np.clip(channels[..., 2], 0, 1),
        )
    )


def _named(items, name: int, what: str):
    for item in items:
        if item.name == name:
            return item
    raise ValueError(f"the frame has no {what} (name {name})")


def _inclinations(calibration, beams: int) -> np.ndarray:
    """Row 0 the top beam; files list them from below."""
    rows = np.asarray(calibration.beam_inclinations)
    if not len(rows):
        low, high = calibration.beam_inclination_min, calibration.beam_inclination_max
        rows = range_image.uniform_inclinations(low, high, beams)
    return np.sort(rows)[::-1]


def _labels_3d(labels, turn: np.ndarray) -> Labels3D:
    kept = [label for label in labels if label.type in TYPES]
    boxes = [
        [
            getattr(label.box, name)
            for name in ("center_x", "center_y", "center_z", "length", "width", "height", "heading")
        ]
        for label in kept
    ]
    speed = [(label.metadata.speed_x, label.metadata.speed_y) for label in kept]
    return Labels3D(
        np.asarray(boxes, np.float32).reshape(-1, 7),
        _classes(kept),
        (np.asarray(speed, np.float32).reshape(-1, 2) @ turn).astype(np.float32),
        np.asarray([label.num_lidar_points_in_box for label in kept], np.int32),
        _ids(kept),
    )


def _labels_2d(labels) -> Labels2D:
    kept = [label for label in labels if label.type in TYPES]
    rows = [
        (
            label.box.center_x - label.box.length / 2,
            label.box.center_y - label.box.width / 2,
            label.box.center_x + label.box.length / 2,
            label.box.center_y + label.box.width / 2,
        )
        for label in kept
    ]
    boxes = np.asarray(rows, np.float32).reshape(-1, 4)
    return Labels2D(boxes, _classes(kept), _ids(kept), np.zeros(len(kept), np.float32))


def _classes(labels) -> np.ndarray:
    return np.asarray([CLASSES.index(TYPES[label.type]) for label in labels], np.int32)


def _ids(labels) -> np.ndarray:
    return np.asarray([zlib.crc32(label.id.encode()) & 0x7FFFFFFF for label in labels], np.int32)


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
            raise FileNotFoundError(f"{folder}: no *.tfrecord files of the Waymo Open Dataset")
        return cls(tuple((file, *place) for file in files for place in record_places(file)))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Frame:
        file, offset, length = self.places[index]
        return decode_frame(read_record(file, (offset, length)))
