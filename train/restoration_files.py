"""Pictures that a restoration run writes: results, and strips for the eye to compare."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

_LABELS = ("input (bicubic)", "output", "reference")
_VIEW, _GAP, _HEAD = 160, 6, 16


def write_picture(path: Path, image: np.ndarray) -> None:
    """uint8 [H, W, 3] or [H, W, 1] as a PNG, under its name only when it is whole."""
    part = path.with_name(path.name + ".part")
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(part, format="PNG")
    part.replace(path)


def busiest_view(reference: np.ndarray, side: int = _VIEW) -> tuple[int, int]:
    """(top, left) of the square with the strongest gradients: where restoration can be judged."""
    gray = reference.astype(np.float32).mean(-1)
    rows, columns = np.gradient(gray)
    strength = np.hypot(rows, columns)
    total = np.pad(strength.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    side_h, side_w = min(side, gray.shape[0]), min(side, gray.shape[1])
    sums = (
        total[side_h:, side_w:]
        - total[:-side_h, side_w:]
        - total[side_h:, :-side_w]
        + total[:-side_h, :-side_w]
    )
    top, left = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(top), int(left)


def save_strip(path: Path, enlarged: np.ndarray, output: np.ndarray, reference: np.ndarray) -> None:
    """Input enlarged | output | reference at the busiest place, twice as large, uint8 [H, W, C]."""
    top, left = busiest_view(reference)
    side_h, side_w = min(_VIEW, reference.shape[0]), min(_VIEW, reference.shape[1])
    width = 2 * side_w
    canvas = Image.new("RGB", (3 * width + 2 * _GAP, 2 * side_h + _HEAD), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (label, image) in enumerate(zip(_LABELS, (enlarged, output, reference))):
        view = image[top : top + side_h, left : left + side_w]
        view = np.repeat(view, 3, -1) if view.shape[-1] == 1 else view
        large = Image.fromarray(view).resize((width, 2 * side_h), Image.Resampling.NEAREST)
        place = number * (width + _GAP)
        canvas.paste(large, (place, _HEAD))
        draw.text((place + 2, 2), label, fill="black")
    canvas.save(path)
