"""A frame as people look at it: range image, ground, clusters, patches and their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxmodels.driving.frame import Frame
from jaxmodels.driving.lidar_camera import UNKNOWN, FrameResult
from jaxmodels.driving.patch_classifier import CLASSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("tab:red", "gold", "tab:cyan", "white", "tab:gray")


def draw_frame(frame: Frame, result: FrameResult, ground: np.ndarray | None = None) -> Figure:
    """Range image, clusters, and the camera image with detections numbered as they became known.

    Args:
      result: of `Pipeline` for this frame. ground: bool [H, W], drawn in gray under the clusters.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    height, width = frame.image.shape[:2]
    figure = Figure(figsize=(10, 10 * height / width + 2.6), layout="constrained")
    axes = figure.subplots(3, 1, height_ratios=(1, 1, 5))
    far = np.where(frame.range > 0, frame.range, np.nan)
    axes[0].imshow(far, aspect="auto", cmap="viridis_r", interpolation="nearest")
    axes[0].set_title("range image (near is dark, white: no return)", fontsize=9)
    labels = np.asarray(result.objects.labels)
    shown = np.ones((*labels.shape, 3))
    if ground is not None:
        shown[np.asarray(ground) & (frame.range > 0)] = 0.85
    palette = colormaps["tab20"]
    for row in np.unique(labels[labels > 0]):
        shown[labels == row] = palette(int(row) % 20)[:3]
    axes[1].imshow(shown, aspect="auto", interpolation="nearest")
    axes[1].set_title("clusters" + ("" if ground is None else " over the ground"), fontsize=9)
    axes[2].imshow(frame.image)
    axes[2].set_title("detections in the order in which they became known", fontsize=9)
    found = result.detections
    for place, box in enumerate(found.boxes):
        x1, y1, x2, y2 = box
        if x2 <= x1:
            continue
        unknown = found.classes[place] == UNKNOWN
        color = "black" if unknown else _COLORS[found.classes[place]]
        style = ":" if unknown else "-"
        axes[2].add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, linestyle=style)
        )
        name = "?" if unknown else CLASSES[found.classes[place]]
        depth = found.depth[place]
        text = f"{place + 1} {name}" + (f" {depth:.0f} m" if np.isfinite(depth) else "")
        axes[2].text(x1, y1 - 2, text, color=color, fontsize=7, clip_on=True)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure
