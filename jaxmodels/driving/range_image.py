"""Range images of spinning LiDARs: sensors, angles, points, and what every stage checks first.

A range image [H, W] holds distances in meters, 0 where nothing came back. Row 0 is the highest
beam; columns run clockwise, the middle one looks forward. Frames are right-handed with x forward,
y left, z up; extrinsics map sensor to vehicle coordinates. Conventions after the Waymo Open
Dataset (waymo-research/waymo-open-dataset@99a4cb3f, `range_image_utils.py`) and, for sensor
tables and the cropped front view, cpsintegrationlab/depth_clustering@3f30c545.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_RANGE = 75.0  # meters, Waymo's top LiDAR
# The front camera sees a little less than this on either side.
FRONT_HALF_ANGLE = 26.0
_ORTHONORMAL = 1e-3


@dataclasses.dataclass(frozen=True)
class Sensor:
    """Beams of a spinning LiDAR.

    Attributes:
      inclinations: radians above the horizon, [H], row 0 the highest.
      columns: number of columns W of the image.
      half_angle: degrees seen on either side of straight ahead; 180 is a whole turn.
    """

    inclinations: tuple[float, ...]
    columns: int
    half_angle: float = 180.0

    @property
    def wraps(self) -> bool:
        """Whether the last column is the first one's neighbor."""
        return self.half_angle >= 180.0

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return len(self.inclinations), self.columns

    @property
    def azimuths(self) -> np.ndarray:
        """Radians [W], positive to the left, falling from left to right; column centers."""
        half = math.radians(self.half_angle)
        return (1 - 2 * (np.arange(self.columns) + 0.5) / self.columns) * half

    @property
    def rows(self) -> np.ndarray:
        """Inclinations as an array [H], radians."""
        return np.asarray(self.inclinations)

    def front(self, half_angle: float = FRONT_HALF_ANGLE) -> Sensor:
        """The sensor of the columns within `half_angle` degrees of straight ahead."""
        start, end = front_columns(self.columns, half_angle)
        seen = (end - start) / self.columns * self.half_angle
        return dataclasses.replace(self, columns=end - start, half_angle=seen)


def _linear(top: float, bottom: float, beams: int) -> tuple[float, ...]:
    return tuple(np.radians(np.linspace(top, bottom, beams)).tolist())


def waymo_like(
    beams: int = 64,
    columns: int = 2650,
    half_angle: float = 180.0,
    top: float = 2.4,
    bottom: float = -17.6,
) -> Sensor:
    """A sensor whose beams lie close together at the top: gaps grow linearly from 1 to 3 shares.

    `top`, `bottom`, `half_angle` in degrees. The default has the size and the span of Waymo's top
    LiDAR, whose own inclinations come with every file.
    """
    gaps = np.linspace(1.0, 3.0, beams - 1)
    fallen = np.concatenate([[0.0], np.cumsum(gaps) / gaps.sum()])
    angles = np.radians(top - fallen * (top - bottom))
    return Sensor(tuple(angles.tolist()), columns, half_angle)


# Velodyne's tables as the published code has them.
SENSORS = {
    "vlp16": Sensor(_linear(15.0, -15.0, 16), 870),
    "hdl32": Sensor(_linear(10.0, -30.0, 32), 870),
    "hdl64": Sensor(_linear(2.0, -8.5, 32) + _linear(-8.87, -24.87, 32), 870),
    "waymo": waymo_like(),
}


def front_columns(columns: int, half_angle: float = FRONT_HALF_ANGLE) -> tuple[int, int]:
    """First and past-the-last column within `half_angle` degrees of straight ahead (dc)."""
    start = round((180 - half_angle) * columns / 360)
    end = round(columns + (half_angle - 180) * columns / 360)
    return start, end


def uniform_inclinations(low: float, high: float, beams: int) -> np.ndarray:
    """Inclinations [H] of a sensor of which only the ends are given, *ascending*, radians.

    `(i + 0.5) / H (high - low) + low`, as Waymo's code; flip before use, row 0 is the top.
    """
    return (np.arange(beams) + 0.5) / beams * (high - low) + low


def column_azimuths(
    columns: int, extrinsic: Any = None, *, edge_azimuth: bool = False
) -> np.ndarray:
    """Azimuths [W] of a whole turn in the sensor's own frame, radians, falling.

    After rotation by the extrinsic the middle looks forward. `edge_azimuth` takes the columns'
    left edges and no correction, as the published clustering code (half a column's difference).
    """
    index = np.arange(columns)
    if edge_azimuth:
        return math.pi - index * 2 * math.pi / columns
    turn = 0.0 if extrinsic is None else math.atan2(extrinsic[1][0], extrinsic[0][0])
    return ((columns - index - 0.5) / columns * 2 - 1) * math.pi - turn


@functools.partial(jax.jit, static_argnames=())
def range_to_points(
    range_image: jax.Array,
    inclinations: jax.Array,
    azimuths: jax.Array,
    extrinsic: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Points [H, W, 3] in vehicle coordinates and where there is one, bool [H, W].

    Args:
      range_image: meters [H, W]; pixels without return give the sensor's own place.
      inclinations: radians [H]. azimuths: radians [W], in the sensor's frame.
      extrinsic: sensor to vehicle [4, 4]; None leaves sensor coordinates.
    """
    distance = jnp.asarray(range_image)
    up, turn = jnp.asarray(inclinations)[:, None], jnp.asarray(azimuths)[None]
    flat = distance * jnp.cos(up)
    points = jnp.stack(
        [flat * jnp.cos(turn), flat * jnp.sin(turn), distance * jnp.sin(up)], axis=-1
    )
    if extrinsic is not None:
        extrinsic = jnp.asarray(extrinsic, points.dtype)
        points = transform(extrinsic, points)
    return points, distance > 0


def transform(matrix: jax.Array, points: jax.Array) -> jax.Array:
    """Points [..., 3] moved by a rigid transformation [4, 4]."""
    xp = points.__array_namespace__()
    rotated = xp.einsum("ij,...j->...i", matrix[:3, :3], points, **_precision(xp))
    return rotated + matrix[:3, 3]


def _precision(xp) -> dict[str, Any]:
    # Meters need all digits of float32, which TPUs and GPUs do not give by themselves.
    return {"precision": jax.lax.Precision.HIGHEST} if xp is jnp else {}


def inverse_transform(matrix: jax.Array) -> jax.Array:
    """The inverse of a rigid transformation [4, 4]."""
    xp = matrix.__array_namespace__()
    rotation, translation = matrix[:3, :3], matrix[:3, 3]
    back = -xp.einsum("ji,j->i", rotation, translation, **_precision(xp))
    upper = xp.concatenate([rotation.T, back[:, None]], axis=1)
    return xp.concatenate([upper, matrix[3:]], axis=0)


# Checks on the host


def check_range_image(
    range_image: Any,
    inclinations: Any,
    azimuths: Any,
    max_range: float = MAX_RANGE,
    no_return: float | None = None,
) -> np.ndarray:
    """A range image as float32 with 0 for "no return", checked.

    Args:
      no_return: -1 accepts that value as "no return"; None accepts 0 alone.

    Raises:
      ValueError: a shape that does not fit the angles; NaN, negative values or values beyond ten
        times `max_range` (with their number and the first place); inclinations in degrees or not
        falling from row to row.
    """
    image = np.asarray(range_image)
    rows, columns = np.asarray(inclinations), np.asarray(azimuths)
    if image.ndim != 2:
        raise ValueError(f"range image must be [H, W], got shape {image.shape}")
    if image.shape[0] != len(rows):
        raise ValueError(f"range image has {image.shape[0]} rows, inclinations {len(rows)}")
    if image.shape[1] != len(columns):
        raise ValueError(f"range image has {image.shape[1]} columns, azimuths {len(columns)}")
    check_inclinations(rows)
    image = image.astype(np.float32)
    if no_return is not None:
        image = np.where(image == no_return, np.float32(0), image)
    wrong = ~((image >= 0) & (image <= 10 * max_range))
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        hint = "; no_return=-1 accepts -1" if (image[wrong] == -1).all() else ""
        raise ValueError(
            f"range image: {int(wrong.sum())} values are NaN, negative or above "
            f"{10 * max_range:g} m, the first at {place} ({image[place]}){hint}"
        )
    return image


def check_inclinations(inclinations: Any) -> None:
    """Raises ValueError unless inclinations are radians that fall from row to row."""
    rows = np.asarray(inclinations)
    if np.abs(rows).max(initial=0) > math.pi / 2 or not np.isfinite(rows).all():
        raise ValueError("inclinations must be radians within +-pi/2, row 0 the top beam")
    if len(rows) > 1 and not (np.diff(rows) < 0).all():
        raise ValueError(
            "inclinations must fall from row to row: row 0 must be the top beam, radians"
        )


def check_extrinsic(extrinsic: Any, what: str = "extrinsic") -> np.ndarray:
    """A rigid transformation [4, 4], checked.

    Raises ValueError: shape, last row, a rotation that is not orthonormal or mirrors; with a hint
    when the matrix looks transposed.
    """
    matrix = np.asarray(extrinsic, np.float64)
    if matrix.shape != (4, 4):
        raise ValueError(f"{what} must be [4, 4], got shape {matrix.shape}")
    last = np.array([0.0, 0.0, 0.0, 1.0])
    if not np.allclose(matrix[3], last, atol=1e-6):
        hint = "; it looks transposed" if np.allclose(matrix[:, 3], last, atol=1e-6) else ""
        raise ValueError(f"{what}: last row is {matrix[3].tolist()}, must be 0 0 0 1{hint}")
    rotation = matrix[:3, :3]
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=_ORTHONORMAL):
        raise ValueError(f"{what}: the upper left 3x3 block is no rotation (not orthonormal)")
    if np.linalg.det(rotation) < 0:
        raise ValueError(f"{what}: the rotation mirrors (determinant -1); is an axis flipped?")
    return matrix


def check_mounting(extrinsic: Any, what: str = "extrinsic") -> np.ndarray:
    """`check_extrinsic` for a sensor on a vehicle, whose origin is on the ground.

    Raises ValueError also when the sensor lies far below the origin, as the inverse of a sensor
    mounted above it does.
    """
    matrix = check_extrinsic(extrinsic, what)
    if matrix[2, 3] < -1.0:
        raise ValueError(
            f"{what}: places the sensor {-matrix[2, 3]:.2f} m below the vehicle's origin; it looks "
            "inverted, sensor -> vehicle is wanted"
        )
    return matrix


def points_to_range_image(points: Any, sensor: Sensor) -> tuple[np.ndarray, np.ndarray]:
    """Points [P, 3] of the sensor's frame as a range image [H, W], on the host.

    Each point goes to the nearest beam and column, the nearest point of a pixel stays. Points
    outside the beams (by more than half a gap) or the columns are left out.

    Returns: meters float32 [H, W], 0 for none, and the index of each pixel's point, int64, -1.
    """
    points = np.asarray(points, np.float64)
    distance = np.linalg.norm(points, axis=-1)
    safe = np.maximum(distance, 1e-9)
    up, turn = np.arcsin(points[:, 2] / safe), np.arctan2(points[:, 1], points[:, 0])
    rows = sensor.rows
    middles = (rows[:-1] + rows[1:]) / 2
    row = np.searchsorted(-middles, -up)
    margin = np.abs(np.diff(rows))
    inside = (up <= rows[0] + margin[0] / 2) & (up >= rows[-1] - margin[-1] / 2)
    half = math.radians(sensor.half_angle)
    column = np.floor((1 - turn / half) / 2 * sensor.columns).astype(np.int64)
    if sensor.wraps:
        column %= sensor.columns
    inside &= (column >= 0) & (column < sensor.columns) & (distance > 0)
    image = np.zeros(sensor.shape, np.float32)
    index = np.full(sensor.shape, -1, np.int64)
    kept = np.flatnonzero(inside)
    kept = kept[np.argsort(-distance[kept], kind="stable")]
    image[row[kept], column[kept]] = distance[kept]
    index[row[kept], column[kept]] = kept
    return image, index
