"""One moment of a drive: range image, camera image, calibration, labels."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxmodels.driving import box_overlap, range_image
from jaxmodels.driving.camera_projection import Camera, check_camera
from jaxmodels.driving.patch_classifier import CLASSES

FRAME_INTERVAL = 0.1  # seconds, 10 Hz


_NO_NUMBERS = np.zeros(0, np.float32)
_NO_IDS = np.zeros(0, np.int32)


class Labels3D(NamedTuple):
    """Objects in space, vehicle frame.

    Attributes:
      boxes: [N, 7] x y z l w h yaw, meters and radians. classes: int32 [N], of `CLASSES`.
      velocity: [N, 2] m/s over ground, in ego axes. returns: int32 [N], LiDAR returns.
      ids: int32 [N], the same object's id in every frame of a sequence.
    """

    boxes: np.ndarray = _NO_NUMBERS.reshape(0, 7)
    classes: np.ndarray = _NO_IDS
    velocity: np.ndarray = _NO_NUMBERS.reshape(0, 2)
    returns: np.ndarray = _NO_IDS
    ids: np.ndarray = _NO_IDS


class Labels2D(NamedTuple):
    """Objects in the image.

    Attributes:
      boxes: [M, 4] x1 y1 x2 y2, pixel edges. classes: int32 [M].
      ids: int32 [M], of `Labels3D`, but for cameras that are labeled on their own (Waymo's).
      occlusion: [M], hidden share of the object's pixels.
    """

    boxes: np.ndarray = _NO_NUMBERS.reshape(0, 4)
    classes: np.ndarray = _NO_IDS
    ids: np.ndarray = _NO_IDS
    occlusion: np.ndarray = _NO_NUMBERS


@dataclasses.dataclass(frozen=True)
class Frame:
    """What the pipeline takes; every data source makes these.

    Attributes:
      range: meters [H, W], 0 for no return. inclinations: radians [H], row 0 the top beam.
      azimuths: radians [W], in the sensor's frame, falling. wraps: whether they are a whole turn.
      lidar_extrinsic, camera_extrinsic: sensor to vehicle [4, 4].
      image: uint8 [h, w, 3] RGB. camera_intrinsic: [9].
      ego_velocity: [2] m/s in ego axes. timestamp: seconds.
      elongation: [H, W] normalized to 0..1, or None.
      surface: int32 [H, W], the simulator's object of each ray (0 ground, -1 nothing), or None.
    """

    range: np.ndarray
    inclinations: np.ndarray
    azimuths: np.ndarray
    lidar_extrinsic: np.ndarray
    image: np.ndarray
    camera_intrinsic: np.ndarray
    camera_extrinsic: np.ndarray
    wraps: bool = False
    labels3d: Labels3D = dataclasses.field(default_factory=Labels3D)
    labels2d: Labels2D = dataclasses.field(default_factory=Labels2D)
    ego_velocity: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(2, np.float32))
    timestamp: float = 0.0
    elongation: np.ndarray | None = None
    surface: np.ndarray | None = None

    @property
    def camera(self) -> Camera:
        """The calibrated camera of the image's size."""
        height, width = self.image.shape[:2]
        return Camera(self.camera_intrinsic, self.camera_extrinsic, width, height)


def check_frame(frame: Frame, no_return: float | None = None) -> Frame:
    """The frame with float32 arrays and 0 for "no return".

    Raises ValueError as the checks of its parts: range image, extrinsics, camera, labels.
    """
    image = range_image.check_range_image(
        frame.range, frame.inclinations, frame.azimuths, no_return=no_return
    )
    for name in ("elongation", "surface"):
        other = getattr(frame, name)
        if other is not None and np.shape(other) != image.shape:
            raise ValueError(f"{name} has shape {np.shape(other)}, the range image {image.shape}")
    extrinsic = range_image.check_mounting(frame.lidar_extrinsic, "LiDAR extrinsic")
    camera = check_camera(frame.camera, frame.image)
    box_overlap.check_boxes_3d(frame.labels3d.boxes)
    box_overlap.check_boxes(
        frame.labels2d.boxes, None, frame.labels2d.classes, num_classes=len(CLASSES)
    )
    return dataclasses.replace(
        frame,
        range=image,
        inclinations=np.asarray(frame.inclinations, np.float32),
        azimuths=np.asarray(frame.azimuths, np.float32),
        lidar_extrinsic=extrinsic.astype(np.float32),
        camera_intrinsic=camera.intrinsic,
        camera_extrinsic=camera.extrinsic,
    )


def front_view(frame: Frame, half_angle: float = range_image.FRONT_HALF_ANGLE) -> Frame:
    """The frame with the LiDAR's columns within `half_angle` degrees of straight ahead alone.

    What the front camera can see, as the published clustering code cuts it: fewer columns, and no
    row of a cluster table goes to what stands behind. Frames that are no whole turn stay as they
    are.
    """
    if not frame.wraps or half_angle >= 180:
        return frame
    if not half_angle > 0:
        raise ValueError(f"half_angle {half_angle} must be above 0 degrees")
    columns = slice(*range_image.front_columns(frame.range.shape[1], half_angle))
    images = {
        name: image[:, columns]
        for name in ("range", "elongation", "surface")
        if (image := getattr(frame, name)) is not None
    }
    return dataclasses.replace(frame, **images, azimuths=frame.azimuths[columns], wraps=False)
