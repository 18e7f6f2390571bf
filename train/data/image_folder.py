"""Image files for prediction, read as a data family reads its own evaluation images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.data import pipeline
from train.naming import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


def images_below(
    path: str | Path, data: Mapping[str, Any], *, batch_size: int
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Batches of (file names, images [batch_size, H, W, 3]); the last batch is padded with zeros.

    `path` is one image or a folder. The family of `config.data` gives `read_image(file, options)`.
    """
    module, options = pipeline.resolve(data)
    if not hasattr(module, "read_image"):
        raise ConfigError(f"config.data.name: {data['name']} has no way to read single images")
    files = image_files(path)
    for i in range(0, len(files), batch_size):
        chosen = files[i : i + batch_size]
        images = np.stack([_read(module, f, options) for f in chosen])
        padding = [(0, batch_size - len(chosen))] + [(0, 0)] * (images.ndim - 1)
        yield [str(f) for f in chosen], np.pad(images, padding)


def image_files(path: str | Path) -> list[Path]:
    """`path` itself, or all images below it. Raises ConfigError where there are none."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise ConfigError(f"--input {path}: no image files ({', '.join(SUFFIXES)})")
    return files


def _read(module, file: Path, options) -> np.ndarray:
    try:
        return module.read_image(file, options)
    except (OSError, SyntaxError) as error:
        raise ConfigError(f"--input {file}: not a readable image ({error})") from None
