"""Bird's-eye rasters of tracks and lanes for the ConvNet baseline of VectorNet (section 4.2).

Three channels a frame: center lines one pixel wide, the target's box, the other agents' boxes;
values 0 and 1, no antialiasing. Pixel x = cx + dx / res, y = cy - dy / res. NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxmodels.driving.vectorization import to_frame

VEHICLE = (4.8, 2.0)  # metres, where sizes are unknown
STRIDE = 4
_LEAST_STEP = 0.3  # metres a vehicle must move to show its heading


@dataclass(frozen=True)
class RasterFrame:
    """Where a raster lies: `size` x `size` pixels that cover `metres`, centered on a vehicle.

    Attributes:
      origin: float64 [2] city coordinates of the vehicle. heading: which direction is up (radians);
        pi / 2 leaves the city's axes as they are.
      center: (cx, cy) pixels where the vehicle is.
    """

    origin: np.ndarray
    heading: float
    size: int = 400
    metres: float = 130.0
    center: tuple[float, float] | None = None

    @property
    def resolution(self) -> float:
        """Metres a pixel."""
        return self.metres / self.size

    def metric(self, points: np.ndarray) -> np.ndarray:
        """City coordinates [..., 2] -> metres right of and ahead of the vehicle [..., 2]."""
        return to_frame(np.asarray(points)[..., :2], self.origin, self.heading - np.pi / 2)

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """City coordinates [..., 2] -> (x, y) pixels [..., 2], not rounded."""
        cx, cy = self.center or (self.size / 2, self.size / 2)
        moved = self.metric(points) / self.resolution
        return np.stack([cx + moved[..., 0], cy - moved[..., 1]], -1)

    def cells(self, points: np.ndarray) -> np.ndarray:
        """City coordinates [..., 2] -> int32 (column, row) of the stride-4 feature map."""
        return np.floor(self.pixels(points) / STRIDE).astype(np.int32)


def render(
    tracks: np.ndarray,
    valid: np.ndarray,
    target: int,
    lanes: Sequence[np.ndarray],
    frame: RasterFrame,
    obs: int = 20,
) -> np.ndarray:
    """Frames 0 .. obs - 1, oldest first, uint8 [size, size, 3 obs] of zeros and ones.

    tracks [A, T, 2] and lanes [N, 2] in city coordinates, valid bool [A, T]; boxes are 4.8 x 2.0 m
    along the direction of motion.
    """
    size = frame.size
    image = np.zeros((size, size, obs, 3), np.uint8)
    roads = np.zeros((size, size), np.uint8)
    for lane in lanes:
        _draw_line(roads, frame.pixels(lane))
    image[..., 0] = roads[:, :, None]
    centers = frame.metric(tracks[:, :obs])
    pixels = frame.pixels(tracks[:, :obs])
    for i in range(len(tracks)):
        headings = _headings(centers[i], valid[i, :obs])
        channel = 1 if i == target else 2
        for t in np.flatnonzero(valid[i, :obs]):
            _draw_box(image[:, :, t, channel], pixels[i, t], headings[t], frame.resolution)
    return image.reshape(size, size, 3 * obs)


def _draw_line(canvas: np.ndarray, points: np.ndarray) -> None:
    """Pixels at half-pixel steps along a polyline of pixel coordinates [N, 2]."""
    starts, ends = (points, points) if len(points) == 1 else (points[:-1], points[1:])
    for start, end in zip(starts, ends):
        count = int(2 * np.abs(end - start).max()) + 2
        x, y = np.floor(np.linspace(start, end, count)).astype(int).T
        inside = (x >= 0) & (y >= 0) & (x < canvas.shape[1]) & (y < canvas.shape[0])
        canvas[y[inside], x[inside]] = 1


def _draw_box(canvas: np.ndarray, center: np.ndarray, heading: float, resolution: float) -> None:
    """Pixels whose centers are inside a vehicle's box; at least the one it stands on."""
    reach = int(np.hypot(*VEHICLE) / 2 / resolution) + 1
    x0, y0 = (int(v) for v in np.floor(center))
    xs = np.arange(max(x0 - reach, 0), min(x0 + reach + 1, canvas.shape[1]))
    ys = np.arange(max(y0 - reach, 0), min(y0 + reach + 1, canvas.shape[0]))
    if not len(xs) or not len(ys):
        return
    dx = (xs[None, :] + 0.5 - center[0]) * resolution
    dy = (center[1] - ys[:, None] - 0.5) * resolution
    along = np.cos(heading) * dx + np.sin(heading) * dy
    across = np.cos(heading) * dy - np.sin(heading) * dx
    filled = (np.abs(along) <= VEHICLE[0] / 2) & (np.abs(across) <= VEHICLE[1] / 2)
    filled |= (xs[None, :] == x0) & (ys[:, None] == y0)
    canvas[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1] |= filled.astype(np.uint8)


def _headings(points: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Direction of motion at each step [T] (radians), from the last place 0.3 m away."""
    headings = np.zeros(len(points))
    heading, last, started = np.pi / 2, None, False
    for t in np.flatnonzero(valid):
        if last is not None:
            step = points[t] - last
            if np.hypot(*step) >= _LEAST_STEP:
                heading, last = float(np.arctan2(step[1], step[0])), points[t]
                if not started:
                    headings[:t] = heading
                    started = True
        else:
            last = points[t]
        headings[t] = heading
    return headings
