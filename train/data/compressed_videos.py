"""Track 2 of AIM 2022: clips shrunk by bicubic interpolation and compressed with HEVC at QP 37.

Folders as the challenge has them: `PATH/HR/001/001.png, 002.png, ...` and the same names under
`LR`; without an LR folder every video is cropped to sides that are multiples of 64, as the
challenge's were, and degraded as a whole, once, into the data folder. Without a path clips are
rendered from scikit-image's photographs: a camera that pans, zooms and turns over a picture,
written in the same layout and coded with libx265 (the extra `video`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from train import video_files
from train.data import compressed_images, degradation, image_pairs, preparation

# hr, lr, val_hr, val_lr: folders of videos below `path`; an empty lr means degraded here, at qp.
# frames: of a training clip. patch: side of training crops in low-resolution pixels. frames_read:
# of a test video, 0 for all. scale 1: the input has the output's size (artifact removal).
OPTIONS: dict[str, Any] = {
    "hr": "train/HR",
    "lr": "train/LR",
    "val_hr": "valid/HR",
    "val_lr": "valid/LR",
    "scale": 4,
    "qp": 37,
    "frames": 30,
    "patch": 64,
    "augment": True,
    "kept": 0,
    "clips": 1,
    "frames_read": 0,
    "rendered": False,
    "rendered_frames": 10,
    "threads": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {"skimage": {"rendered": True, "kept": 1000}}
SPLITS = ("train", "test")
PUBLISHED_SIZES = {"train": 335, "test": 15}

# Sides of videos that are degraded here are cropped to multiples of this many pixels.
MULTIPLE = 64
_SIDE = 256
_TRAINED, _HELD_OUT = compressed_images.TRAINED, compressed_images.HELD_OUT
_MOTIONS = 4
_SEED = 2022


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`lr` float32 [T, p, p, 3] and `hr` [T, p * scale, p * scale, 3], both in [0, 1]."""
    patch, scale, frames = options["patch"], options["scale"], options["frames"]
    for name in ("patch", "scale", "frames"):
        if not isinstance(options[name], int) or options[name] < 1:
            raise ValueError(
                f"data.options.{name} must be a positive integer, not {options[name]!r}"
            )
    return {
        "lr": jax.ShapeDtypeStruct((frames, patch, patch, 3), np.float32),
        "hr": jax.ShapeDtypeStruct((frames, patch * scale, patch * scale, 3), np.float32),
    }


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Training clips of an epoch and test videos; LDV's where no data is on disk."""
    if options["rendered"]:
        return {
            "train": len(_TRAINED) * _MOTIONS * options["clips"],
            "test": len(_HELD_OUT) * _MOTIONS // 2,
        }
    if not options["path"] or not pathlib.Path(options["path"]).expanduser().is_dir():
        return {**PUBLISHED_SIZES, "train": PUBLISHED_SIZES["train"] * options["clips"]}
    return {split: len(source(split, options)) for split in SPLITS}


@dataclasses.dataclass(frozen=True)
class Video:
    """One video: its name and the files of its frames, in order.

    cropped: whether `lr` shows the upper left of `hr` alone, having been made of it here.
    """

    name: str
    hr: tuple[str, ...]
    lr: tuple[str, ...]
    cropped: bool = False


@dataclasses.dataclass(frozen=True)
class VideoSource:
    """Example i is video `i % n`; which frames and pixels is the transform's business."""

    videos: tuple[Video, ...]
    clips: int

    def __len__(self) -> int:
        return len(self.videos) * self.clips

    def __getitem__(self, index: int) -> Video:
        return self.videos[index % len(self.videos)]


def source(split: str, options: Mapping[str, Any]) -> VideoSource:
    """The videos of one split.

    Raises FileNotFoundError naming `data.options.path` or the videos without a partner.
    """
    options = _with_folder(options)
    train = split == SPLITS[0]
    names = ("hr", "lr") if train else ("val_hr", "val_lr")
    hr, lr = (image_pairs.option_path(options, name) for name in names)
    if not hr.is_dir():
        raise FileNotFoundError(f"no folder {hr} (data.options.{names[0]})")
    made_here = lr is None
    if made_here:
        lr = _degraded_folder(hr, options["scale"], options["qp"])
    found = sorted(folder for folder in hr.iterdir() if folder.is_dir())
    if not found:
        raise FileNotFoundError(f"no videos (folders of frames) in {hr} (data.options.{names[0]})")
    alone = [folder.name for folder in found if not (lr / folder.name).is_dir()]
    if alone:
        shown = ", ".join(alone[:5]) + (f" and {len(alone) - 5} more" if alone[5:] else "")
        raise FileNotFoundError(f"no low-resolution partner in {lr} for: {shown}")
    videos = []
    for folder in found:
        large, small = (_frames_of(parent / folder.name) for parent in (hr, lr))
        if len(large) != len(small):
            raise ValueError(
                f"video {folder.name}: {len(large)} frames in {hr}, {len(small)} in {lr}"
            )
        videos.append(Video(folder.name, large, small, made_here))
    return VideoSource(tuple(videos), options["clips"] if train else 1)


def _frames_of(folder: pathlib.Path) -> tuple[str, ...]:
    files = image_pairs.files_by_stem(folder, "a video's frames").values()
    return tuple(str(f) for f in sorted(files, key=video_files.frame_number))


def _with_folder(options: Mapping[str, Any]) -> dict[str, Any]:
    if options["rendered"]:
        name = f"skimage_clips_qp{options['qp']}_{options['rendered_frames']}"
        render = functools.partial(_render_all, frames=options["rendered_frames"], qp=options["qp"])
        folder = preparation.prepare_folder(name, options["path"], render)
        return {**options, "path": str(folder)}
    if not options["path"] or not pathlib.Path(options["path"]).expanduser().is_dir():
        raise FileNotFoundError(
            f"no videos at data.options.path = {options['path'] or ''!r}: set it to the folder "
            f"that holds {options['hr']}/VIDEO/001.png and {options['val_hr']}/VIDEO/001.png"
        )
    return dict(options)


def _degraded_folder(hr: pathlib.Path, scale: int, qp: int) -> pathlib.Path:
    """Low-resolution versions of all videos of a folder, made once in the data folder."""
    videos = sorted(f for f in hr.iterdir() if f.is_dir())
    stamp = "|".join(f"{video.name}:{len(_frames_of(video))}" for video in videos)
    name = f"{hr.resolve()}|{scale}|{qp}|{MULTIPLE}|{stamp}"
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]

    def fill(folder: pathlib.Path) -> None:
        for video in videos:
            frames = np.stack([image_pairs.read_rgb(f) for f in _frames_of(video)])
            height, width = (n // MULTIPLE * MULTIPLE for n in frames.shape[1:3])
            if not height or not width:
                raise ValueError(
                    f"video {video.name}: frames of {frames.shape[1]}x{frames.shape[2]} pixels, "
                    f"wanted are at least {MULTIPLE}x{MULTIPLE}"
                )
            small = degradation.degrade_video(frames[:, :height, :width], scale, qp)
            write_frames(folder / video.name, small)

    return preparation.prepare_folder(f"compressed_videos_{digest}", None, fill)


def write_frames(folder: pathlib.Path, frames: np.ndarray) -> None:
    """Frames uint8 [T, H, W, 3] as 001.png, 002.png, ..."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames, start=1):
        Image.fromarray(frame).save(folder / f"{number:03d}.png", compress_level=1)


def render_clip(
    picture: np.ndarray, frames: int, rng: np.random.Generator, side: int = _SIDE
) -> np.ndarray:
    """A camera moving over a picture, uint8 [T, side, side, 3], sampled bicubically.

    Constant velocity (half of the clips by whole pixels, the others not), zoom and rotation; drawn
    again, more slowly each time, until the view stays inside the picture.
    """
    height, width = picture.shape[:2]
    if min(height, width) < side:
        raise ValueError(f"a {height}x{width} picture cannot show a view of {side} pixels")
    image = Image.fromarray(picture)
    slower = 1.0
    whole = rng.random() < 0.5
    while True:
        speed, direction = rng.uniform(1, 6) * slower, rng.uniform(0, 2 * math.pi)
        velocity = np.array([math.cos(direction), math.sin(direction)]) * speed
        turn, zoom = np.radians(rng.uniform(-1, 1)) * slower, 1 + rng.uniform(-0.01, 0.01) * slower
        if whole:
            velocity, turn, zoom = np.round(velocity), 0.0, 1.0
        start = rng.uniform([side / 2, side / 2], [width - side / 2, height - side / 2])
        start = np.round(start)
        views = []
        for t in range(frames):
            scale, angle = zoom**t, turn * t
            a, b = math.cos(angle) * scale, math.sin(angle) * scale
            matrix, half = np.array([[a, -b], [b, a]]), side / 2
            origin = start + velocity * t - matrix @ [half, half]
            corners = [matrix @ corner + origin for corner in
                       ([0, 0], [side, 0], [0, side], [side, side])]  # fmt: skip
            views.append((matrix, origin, np.array(corners)))
        corners = np.concatenate([v[2] for v in views])
        if (corners >= 0).all() and (corners <= [width, height]).all():
            break
        slower *= 0.9
    clip = []
    for matrix, origin, _ in views:
        inverse = (*matrix[0], origin[0], *matrix[1], origin[1])
        view = image.transform(
            (side, side), Image.Transform.AFFINE, inverse, resample=Image.Resampling.BICUBIC
        )
        clip.append(np.asarray(view))
    return np.stack(clip)


def _render_all(folder: pathlib.Path, frames: int, qp: int) -> None:
    rng = np.random.default_rng(_SEED)
    parts = (("train", _TRAINED, _MOTIONS), ("valid", _HELD_OUT, _MOTIONS // 2))
    for part, files, motions in parts:
        for file in files:
            picture = compressed_images.photograph(file)
            for motion in range(motions):
                clip = render_clip(picture, frames, rng)
                name = f"{file.partition('.')[0]}_{motion}"
                write_frames(folder / part / "HR" / name, clip)
                write_frames(folder / part / "LR" / name, degradation.degrade_video(clip, qp=qp))


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Consecutive frames, the same crop of all of them, flips and a transposition of both clips."""

    reader: image_pairs.Reader
    scale: int
    frames: int
    patch: int
    augment: bool

    def __call__(self, video: Video, rng: np.random.Generator) -> dict[str, np.ndarray]:
        if len(video.hr) < self.frames:
            raise ValueError(
                f"video {video.name} has {len(video.hr)} frames, fewer than data.options.frames = "
                f"{self.frames}"
            )
        start = int(rng.integers(len(video.hr) - self.frames + 1))
        scale, patch = self.scale, self.patch
        small, large, top, left = [], [], 0, 0
        for number in range(start, start + self.frames):
            lr, hr = self.reader.low(video.lr[number]), self.reader.high(video.hr[number])
            if video.cropped:
                hr = hr[: lr.shape[0] * scale, : lr.shape[1] * scale]
            if number == start:
                image_pairs.check_pair(lr, hr, scale, video.name)
                if min(lr.shape[:2]) < patch:
                    raise ValueError(
                        f"video {video.name}: {lr.shape[0]}x{lr.shape[1]} pixels are fewer than "
                        f"data.options.patch = {patch}"
                    )
                top, left = (int(rng.integers(n - patch + 1)) for n in lr.shape[:2])
            small.append(lr[top : top + patch, left : left + patch])
            rows = slice(top * scale, (top + patch) * scale)
            large.append(hr[rows, left * scale : (left + patch) * scale])
        lr, hr = np.stack(small), np.stack(large)
        if self.augment:
            for axis in (1, 2):
                if rng.random() < 0.5:
                    lr, hr = np.flip(lr, axis), np.flip(hr, axis)
            if rng.random() < 0.5:
                lr, hr = lr.swapaxes(1, 2), hr.swapaxes(1, 2)
        return {"lr": image_pairs.to_floats(lr), "hr": image_pairs.to_floats(hr)}


def train_transform(options: Mapping[str, Any]) -> TrainTransform:
    """The training transform of these options."""
    scale = options["scale"]
    return TrainTransform(
        image_pairs.Reader(int(options["kept"]), scale, False, True),
        scale,
        options["frames"],
        options["patch"],
        bool(options["augment"]),
    )


def eval_transform(options: Mapping[str, Any]):
    """A fixed clip of each test video; videos as a whole come from `eval_videos`."""
    transform = dataclasses.replace(train_transform(options), augment=False)
    return image_pairs.FirstDraw(transform)


def eval_videos(options: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, low resolution, high resolution) uint8 [T, H, W, 3] of every test video."""
    for video in source("test", options).videos:
        count = options["frames_read"] or len(video.hr)
        lr, hr = (
            np.stack([image_pairs.read_rgb(f) for f in files[:count]])
            for files in (video.lr, video.hr)
        )
        if video.cropped:
            hr = hr[:, : lr.shape[1] * options["scale"], : lr.shape[2] * options["scale"]]
        image_pairs.check_pair(lr[0], hr[0], options["scale"], video.name)
        yield video.name, lr, hr


def read_video(path: str | pathlib.Path) -> np.ndarray:
    """uint8 [T, H, W, 3] of a folder of frames, or of a video file by PyAV."""
    path = pathlib.Path(path)
    if path.is_dir():
        return np.stack([image_pairs.read_rgb(f) for f in _frames_of(path)])
    return degradation.read_video_file(path)
