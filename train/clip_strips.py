"""A picture that shows what an edit did to a clip: rows of frames with headings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from train.restoration_files import write_picture

# Pixels of the smallest frame shown, of gaps, of the headings' text.
_SMALLEST, _GAP, _TEXT = 96, 4, 14


def write_strip(
    path: str | Path, rows: Mapping[str, np.ndarray], numbers: Sequence[int], title: str = ""
) -> None:
    """Rows of frames below each other as a PNG, under its name only when it is whole.

    rows: heading of every row -> uint8 [T, H, W, 3], all of one shape; numbers: those of the T
    frames in their clip, the columns' headings. Small frames are enlarged pixel by pixel.

    Raises ValueError for rows that do not match.
    """
    shapes = {name: np.shape(row) for name, row in rows.items()}
    shape = next(iter(shapes.values()), ())
    if len(shape) != 4 or set(shapes.values()) != {shape} or len(numbers) != shape[0]:
        raise ValueError(f"a strip has rows of one shape and numbers for its frames, got {shapes}")
    height, width = shape[1:3]
    zoom = max(1, -(-_SMALLEST // max(height, 1)))
    height, width = height * zoom, width * zoom
    font = ImageFont.load_default(_TEXT)
    margin = 2 * _GAP + round(max(font.getlength(name) for name in rows))
    line = _TEXT + 2 * _GAP
    head = line * (2 if title else 1)
    canvas = Image.new(
        "RGB",
        (
            max(margin + len(numbers) * (width + _GAP), margin + round(font.getlength(title))),
            head + len(rows) * (height + _GAP),
        ),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, _GAP), title, fill="black", font=font)
    for column, number in enumerate(numbers):
        place = margin + column * (width + _GAP)
        draw.text((place, head - line + _GAP), f"frame {number}", fill="black", font=font)
    for r, (name, row) in enumerate(rows.items()):
        top = head + r * (height + _GAP)
        draw.text((_GAP, top + (height - _TEXT) // 2), name, fill="black", font=font)
        for column, frame in enumerate(row):
            image = Image.fromarray(np.asarray(frame, np.uint8))
            image = image.resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(image, (margin + column * (width + _GAP), top))
    write_picture(Path(path), np.asarray(canvas))


def change(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, float]:
    """(where two clips in [-1, 1] differ as gray uint8 [T, H, W, 3], white at the largest
    difference; that difference): the mean over channels of |after - before|."""
    difference = np.abs(after - before).mean(-1)
    largest = float(difference.max())
    gray = np.round(difference / max(largest, 1e-12) * 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, -1), largest
