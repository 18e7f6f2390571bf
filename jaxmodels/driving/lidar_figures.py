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


def _tag(color: str) -> dict:
    """How a number or name on a ground of its own color is written."""
    dark = color in ("black", "tab:red", "tab:gray")
    ground = {"facecolor": color, "edgecolor": "black", "linewidth": 0.5, "pad": 1.2}
    return {"color": "white" if dark else "black", "fontsize": 8, "bbox": ground}


def draw_frame(frame: Frame, result: FrameResult, ground: np.ndarray | None = None) -> Figure:
    """Range image, clusters, and the camera image with detections numbered as they became known.

    Clusters bear the numbers of their detections. `!` behind a number stands for a potential, `!!`
    for an imminent collision.

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
    axes[0].set_title("range image (near is bright, white: no return)", fontsize=9)
    labels = np.asarray(result.objects.labels)
    shown = np.ones((*labels.shape, 3))
    if ground is not None:
        shown[np.asarray(ground) & (frame.range > 0)] = 0.85
    palette = colormaps["tab20"]
    for row in np.unique(labels[labels > 0]):
        shown[labels == row] = palette(int(row) % 20)[:3]
    axes[1].imshow(shown, aspect="auto", interpolation="nearest")
    found = result.detections
    for place, row in enumerate(found.row):
        pixels = np.nonzero(labels == row + 1)
        if row >= 0 and len(pixels[0]):
            middle = np.median(pixels[1]), np.median(pixels[0])
            axes[1].text(*middle, str(place + 1), ha="center", va="center", **_tag("white"))
    axes[1].set_title("clusters" + ("" if ground is None else " over the ground"), fontsize=9)
    axes[2].imshow(frame.image)
    axes[2].set_title("detections in the order in which they became known", fontsize=9)
    for place, box in enumerate(found.boxes):
        x1, y1, x2, y2 = box
        if x2 <= x1:
            continue
        unknown = found.classes[place] == UNKNOWN
        color = "black" if unknown else _COLORS[found.classes[place]]
        style = ":" if unknown else "-"
        axes[2].add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, linestyle=style, lw=2)
        )
        name = "?" if unknown else CLASSES[found.classes[place]]
        depth = found.depth[place]
        text = f"{place + 1}{'!' * max(int(found.rank[place]), 0)} {name}"
        text += f" {depth:.0f} m" if np.isfinite(depth) else ""
        # The tags of neighbors stand at other heights, and none outside the image.
        axes[2].text(
            np.clip(x1, 0.005 * width, 0.86 * width),
            max(y1 - 0.006 * height, 0.05 * height) - 0.035 * height * (place % 3),
            text,
            va="bottom",
            **_tag(color),
        )
        if place % 3:
            axes[2].plot([x1, x1], [y1 - 0.035 * height * (place % 3), y1], color=color, lw=1)
    axes[2].set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure
