"""Video in and out: folders of numbered images, and files through PyAV (the extra `video`).

Frames are uint8 [H, W, 3] and come one at a time; nothing holds a whole file.
"""

from __future__ import annotations

import contextlib
import fractions
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm")
IMAGES = (".png", ".jpg", ".jpeg")


def frame_files(folder: str | os.PathLike) -> list[Path]:
    """Image files of a clip's folder, in the order of the numbers in their names."""

    files = [p for p in Path(folder).iterdir() if p.suffix.lower() in IMAGES]
    return sorted(files, key=frame_number)


def frame_number(path: Path) -> tuple[int, str]:
    """What frames are sorted by: the last number in the name (2.png before 10.png), then it all."""
    digits = re.findall(r"\d+", path.stem)
    return (int(digits[-1]) if digits else -1, path.name)


def is_video(path: str | os.PathLike) -> bool:
    """Whether a path is named as a video file."""
    return Path(path).suffix.lower() in SUFFIXES


def read_frames(path: str | os.PathLike) -> Iterator[np.ndarray]:
    """Frames of a folder of images or of a video file.

    Raises FileNotFoundError when there is none, ValueError when a frame cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        files = frame_files(path)
        if not files:
            raise FileNotFoundError(f"no frames ({', '.join(IMAGES)}) in {path}")
        for file in files:
            yield read_image(file)
        return
    if not path.is_file():
        raise FileNotFoundError(f"no video file or folder of frames {path}")
    av = _av()
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: it holds no video stream")
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        raise ValueError(f"{path}: not a readable video ({error})") from None


def read_image(path: str | os.PathLike) -> np.ndarray:
    """One image file, uint8 [H, W, 3]. Raises ValueError when it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None


def frame_rate(path: str | os.PathLike) -> fractions.Fraction | None:
    """Frames a second of a video file, on average; None for folders and where the file does not
    say."""
    if not Path(path).is_file():
        return None
    av = _av()
    try:
        with av.open(os.fspath(path)) as container:
            streams = container.streams.video
            return (streams[0].average_rate or None) if streams else None
    except av.FFmpegError as error:
        raise ValueError(f"{path}: not a readable video ({error})") from None


@contextlib.contextmanager
def frame_writer(path: str | os.PathLike, fps: float | fractions.Fraction = 25) -> Iterator[Any]:
    """`write(frame uint8 [H, W, 3])` into a video file (H.264) or a folder `000000.png`, ...

    A video gets its name when it is complete. Raises ValueError for odd sizes, which H.264's
    4:2:0 pictures cannot have.
    """
    path = Path(path)
    if not is_video(path):
        path.mkdir(parents=True, exist_ok=True)
        count = iter(range(10**9))
        yield lambda frame: Image.fromarray(frame).save(path / f"{next(count):06d}.png")
        return
    av = _av()
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        with _video_writer(av, path, part, fps) as write:
            yield write
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    part.replace(path)


@contextlib.contextmanager
def _video_writer(
    av: Any, path: Path, part: Path, fps: float | fractions.Fraction
) -> Iterator[Any]:
    with av.open(os.fspath(part), "w") as container:
        rate = fractions.Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate)
        stream.pix_fmt = "yuv420p"
        started = []

        def write(frame: np.ndarray) -> None:
            if not started:
                if frame.shape[0] % 2 or frame.shape[1] % 2:
                    raise ValueError(f"{path}: frames of {frame.shape[:2]}; H.264 wants even sizes")
                stream.height, stream.width = frame.shape[:2]
                started.append(True)
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)

        try:
            yield write
        except BaseException:
            started.clear()
            raise
        finally:
            for packet in stream.encode() if started else ():
                container.mux(packet)


def to_unit(frame: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]: x / 127.5 - 1."""
    return frame.astype(np.float32) / np.float32(127.5) - 1


def to_bytes(frame: Any) -> np.ndarray:
    """[-1, 1] -> uint8, clipped and rounded."""
    return np.clip(np.rint((np.asarray(frame, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def _av():
    try:
        import av
    except ImportError:
        raise ImportError(
            "video files need PyAV: install the extra `video` (pip install jaxmodels[video]), or "
            "use a folder of PNG frames"
        ) from None
    return av
