"""Pictures that a restoration run writes: results, and strips for the eye to compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LABELS = ("input (bicubic)", "output", "reference")
# Pixels of the magnified view, of its column in the strip, of gaps and of headings.
_VIEW, _COLUMN, _GAP, _HEAD = 96, 384, 6, 24


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


def save_strip(
    path: Path,
    enlarged: np.ndarray,
    output: np.ndarray,
    reference: np.ndarray,
    psnr: Sequence[float] = (),
) -> None:
    """Input enlarged | output | reference, uint8 [H, W, C]: the whole pictures above, with the
    place of the strongest gradients framed; below them that place, pixels enlarged.

    `psnr` (of input and output, dB) stands in the headings.
    """
    images = [_colored(x) for x in (enlarged, output, reference)]
    height, width = reference.shape[:2]
    side = min(_VIEW, height, width)
    top, left = busiest_view(reference, side)
    zoom = _COLUMN // side
    column = zoom * side
    shown = round(height * column / width)
    canvas = Image.new("RGB", (3 * column + 2 * _GAP, _HEAD + shown + _GAP + column), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_HEAD - 8)
    for number, (label, image) in enumerate(zip(_LABELS, images)):
        place = number * (column + _GAP)
        if number < len(psnr):
            label = f"{label}  {psnr[number]:.2f} dB"
        draw.text((place + 2, 2), label, fill="black", font=font)
        whole = image.resize((column, shown), Image.Resampling.LANCZOS)
        canvas.paste(whole, (place, _HEAD))
        scale = column / width
        frame = [place + left * scale, _HEAD + top * scale]
        frame += [frame[0] + side * scale - 1, frame[1] + side * scale - 1]
        draw.rectangle(frame, outline="yellow", width=2)
        view = image.crop((left, top, left + side, top + side))
        view = view.resize((column, column), Image.Resampling.NEAREST)
        canvas.paste(view, (place, _HEAD + shown + _GAP))
    canvas.save(path)


def _colored(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.repeat(image, 3, -1) if image.shape[-1] == 1 else image)
