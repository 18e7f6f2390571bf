"""Aligned face clips: pairs of frames of one video.

Kinds (`data.options.kind`):

- `folder`: `path/<clip>/<frame>.png`, aligned as FFHQ is, or `path/<clip>.mp4` with
  `path/<clip>.npz` whose `landmarks` [T, 68, 2] are in pixels: those clips are aligned here, with
  centers and axes smoothed over time. Folders may have the npz beside them too (in pixels of the
  aligned frames). The last `held_out` share of the clips, by name, is the test split.
- `astronaut`: the face of scikit-image's photograph of Eileen Collins, moved by smooth small warps;
  landmarks are the projection of the synthetic face model, moved alike. A real face, a made-up
  motion; the test split has other motions.

Examples hold `key` and `frame` float32 [S, S, 3] in [-1, 1], and `key_landmarks`, `frame_landmarks`
[68, 2] in pixels. Flips are drawn once for both frames.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxmodels.video.face_alignment import check_landmarks, ffhq_quads, smooth_quads
from train import video_files
from train.data.stored_arrays import arrays_of
from train.naming import ConfigError

OPTIONS: dict[str, Any] = {
    "kind": "folder",
    "image_size": 256,
    "clip_length": 32,  # frames of a made-up clip
    "clips": 64,  # made-up clips of the training split
    "eval_clips": 8,
    "held_out": 0.05,
    "flip": True,
    "center_sigma": 1.0,  # frames, of the alignment of videos
    "axes_sigma": 3.0,
    "threads": 0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "astronaut": {"kind": "astronaut", "image_size": 32, "threads": 1}
}
SPLITS = ("train", "test")
KINDS = ("folder", "astronaut")

# The face in the photograph, in pixels: center, half the side of an aligned crop, tilt in radians.
_FACE_CENTER, _FACE_HALF, _FACE_TILT = np.array([224.0, 118.0]), 88.0, 0.06
_SHIFT, _TURN, _ZOOM = 0.12, 0.15, 0.08
# 68-point scheme mirrored.
_MIRROR = np.concatenate(
    [
        [*range(16, -1, -1), *range(26, 16, -1), 27, 28, 29, 30, 35, 34, 33, 32, 31],
        [45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40],
        [54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65],
    ]
)


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`key`, `frame` float32 [S, S, 3]; `key_landmarks`, `frame_landmarks` [68, 2]."""
    if options["kind"] not in KINDS:
        raise ValueError(f"data.options.kind: {options['kind']!r}; known: {', '.join(KINDS)}")
    size = options["image_size"]
    image = jax.ShapeDtypeStruct((size, size, 3), np.float32)
    points = jax.ShapeDtypeStruct((68, 2), np.float32)
    return {"key": image, "frame": image, "key_landmarks": points, "frame_landmarks": points}


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Number of clips of the training split, of pairs of the test split (made-up kinds)."""
    if options["kind"] == "astronaut":
        return {"train": options["clips"], "test": options["eval_clips"]}
    return {split: len(source(split, options)) for split in SPLITS}


@dataclasses.dataclass(frozen=True)
class Clips:
    """Clips by number; an example names a clip, its frames are read where they are needed."""

    clips: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Any:
        return self.clips[index]


def source(split: str, options: Mapping[str, Any]) -> Sequence[Any]:
    """Clips of a split. Raises ConfigError where the folder holds none, or clips of one frame."""
    element_spec(options)
    if options["kind"] == "astronaut":
        _say_once("face_clips: landmarks are those of the synthetic face (no real anatomy)")
        count = options["clips" if split == "train" else "eval_clips"]
        return Clips(tuple((SPLITS.index(split), i) for i in range(count)))
    path = options["path"]
    if not path or not Path(path).is_dir():
        raise ConfigError(f"data.options.path: no folder of clips {path!r}")
    found = sorted(p for p in Path(path).iterdir() if p.is_dir() or video_files.is_video(p))
    if not found:
        raise ConfigError(f"data.options.path: {path} holds neither folders of frames nor videos")
    held = max(1, round(len(found) * options["held_out"])) if len(found) > 1 else 0
    chosen = found[: len(found) - held] if split == "train" else found[len(found) - held :]
    if not held:
        chosen = found
    for clip in chosen:
        if clip.is_dir() and len(video_files.frame_files(clip)) < 2:
            raise ConfigError(f"{clip}: a clip of one frame has no pairs to train on")
    return Clips(tuple(str(p) for p in chosen))


@dataclasses.dataclass(frozen=True)
class PairTransform:
    """Two different frames of a clip; in evaluation the first and the middle one."""

    options: tuple[tuple[str, Any], ...]
    train: bool

    def __call__(self, clip: Any, rng: np.random.Generator | None = None) -> dict[str, Any]:
        options = dict(self.options)
        count = clip_length(clip, options)
        if count < 2:
            raise ValueError(f"{clip}: a clip of one frame has no pairs to train on")
        k, t = (0, count // 2) if not self.train else rng.choice(count, 2, replace=False)
        images, points = read_clip(clip, options, (int(k), int(t)))
        if self.train and options["flip"] and rng.random() < 0.5:
            images = images[:, :, ::-1]
            points = points[:, _MIRROR] * [-1, 1] + [options["image_size"], 0]
        images, points = images.astype(np.float32), points.astype(np.float32)
        return {
            "key": images[0],
            "frame": images[1],
            "key_landmarks": points[0],
            "frame_landmarks": points[1],
        }


def train_transform(options: Mapping[str, Any]) -> PairTransform:
    """Random pairs."""
    return PairTransform(tuple(options.items()), True)


def eval_transform(options: Mapping[str, Any]) -> PairTransform:
    """First and middle frame."""
    return PairTransform(tuple(options.items()), False)


def clip_length(clip: Any, options: Mapping[str, Any]) -> int:
    """Frames of a clip."""
    if options["kind"] == "astronaut":
        return options["clip_length"]
    path = Path(clip)
    if path.is_dir():
        return len(video_files.frame_files(path))
    return len(_landmarks_of(path, required=True))


def read_clip(
    clip: Any, options: Mapping[str, Any], wanted: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(frames float32 [T, S, S, 3] in [-1, 1], landmarks [T, 68, 2] in their pixels).

    `wanted` chooses frames; landmarks are zero where a folder has none.
    """
    wanted = range(clip_length(clip, options)) if wanted is None else wanted
    if options["kind"] == "astronaut":
        return _astronaut(clip, options, wanted)
    path, size = Path(clip), options["image_size"]
    if path.is_dir():
        files = video_files.frame_files(path)
        landmarks = _landmarks_of(path, required=False)
        if landmarks is not None:
            check_landmarks(landmarks, len(files))
        frames, points = [], []
        for t in wanted:
            image = video_files.read_image(files[t])
            if image.shape[0] != image.shape[1]:
                raise ValueError(
                    f"{files[t]} is {image.shape[1]}x{image.shape[0]}; aligned frames are square"
                )
            side = image.shape[0]
            frames.append(video_files.to_unit(resized(image, size)))
            points.append(np.zeros((68, 2)) if landmarks is None else landmarks[t] * (size / side))
        return np.stack(frames), np.stack(points)
    landmarks = _landmarks_of(path, required=True)
    quads = smooth_quads(ffhq_quads(landmarks), options["center_sigma"], options["axes_sigma"])
    needed, kept = set(wanted), {}
    count = 0
    for t, frame in enumerate(video_files.read_frames(path)):
        count += 1
        if t in needed:
            kept[t] = _cropped(frame, quads.corners()[t], size)
            if len(kept) == len(needed) and max(needed) < len(landmarks):
                break
    if len(kept) < len(needed):
        check_landmarks(landmarks, count)
    axes = np.stack([quads.x, quads.y], -1)[list(wanted)]
    offsets = (landmarks[list(wanted)] - quads.center[list(wanted), None])[..., None]
    points = (np.linalg.inv(axes)[:, None] @ offsets)[..., 0]
    frames = np.stack([video_files.to_unit(kept[t]) for t in wanted])
    return frames, (points + 1) / 2 * size


def _landmarks_of(path: Path, required: bool) -> np.ndarray | None:
    # A folder's name may hold dots.
    file = path.with_name(path.name + ".npz") if path.is_dir() else path.with_suffix(".npz")
    if not file.is_file():
        if required:
            raise ConfigError(f"{path}: needs landmarks [frames, 68, 2] in {file.name}")
        return None
    return read_landmarks(file)


def read_landmarks(file: Path) -> np.ndarray:
    """`landmarks` [T, 68, 2] of an npz file, checked; ConfigError where it has none."""
    try:
        arrays = arrays_of(file)
    except (ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise ConfigError(f"{file}: not a readable npz file ({error})") from None
    if "landmarks" not in arrays:
        raise ConfigError(f"{file}: no array `landmarks`; it has {list(arrays)}")
    landmarks = np.asarray(arrays["landmarks"], np.float64)
    check_landmarks(landmarks, len(landmarks))
    return landmarks


def resized(image: np.ndarray, size: int) -> np.ndarray:
    if image.shape[0] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))


def _cropped(frame: np.ndarray, corners: np.ndarray, size: int) -> np.ndarray:
    """A quadrilateral of the frame as a square; large ones are averaged down first."""
    image = Image.fromarray(frame)
    side = float(np.linalg.norm(corners[3] - corners[0]))
    shrink = max(1, int(side / size / 2))
    if shrink > 1:
        image = image.reduce(shrink)
    # PIL's pixel centers stand at halves, as ours do.
    quad = tuple((corners / shrink).ravel())
    method = Image.Transform.QUAD
    return np.asarray(image.transform((size, size), method, quad, Image.Resampling.BILINEAR))


# The photograph, moved.


@functools.lru_cache(maxsize=1)
def _say_once(text: str) -> None:
    print(text)


@functools.lru_cache(maxsize=1)
def _photograph() -> np.ndarray:
    from skimage import data

    return data.astronaut()


@functools.lru_cache(maxsize=1)
def _model_landmarks() -> np.ndarray:
    """68 points in [-1, 1] of the synthetic face, seen from the front and filling the crop."""
    from jaxmodels.video import face_mesh

    model = face_mesh.synthetic_face_model(shape=1, expression=1)
    points = face_mesh.vertices_to_landmarks(
        model.v_template[None], model.faces, model.lmk_faces_idx, model.lmk_bary
    )
    return np.asarray(points[0, :, :2]) * np.array([7.0, -7.0])


def motion(rng: np.random.Generator, count: int) -> np.ndarray:
    """[T, 4] smooth shifts (two), turn and zoom of a made-up clip, each within its bound."""
    time = np.arange(count) / max(count, 1) * 2 * math.pi
    values = np.zeros((count, 4))
    for harmonic in (1, 2, 3):
        phase, size = rng.uniform(0, 2 * math.pi, 4), rng.uniform(0, 1, 4) / harmonic
        values += size * np.sin(harmonic * time[:, None] + phase)
    return np.tanh(values) * np.array([_SHIFT, _SHIFT, _TURN, _ZOOM])


def _astronaut(clip, options, wanted):
    split, number = clip
    path = motion(np.random.default_rng((17, split, number)), options["clip_length"])
    size, frames, points = options["image_size"], [], []
    for t in wanted:
        dx, dy, turn, zoom = path[t]
        half = _FACE_HALF * (1 + zoom)
        angle = _FACE_TILT + turn
        x = half * np.array([math.cos(angle), math.sin(angle)])
        y = np.array([-x[1], x[0]])
        center = _FACE_CENTER + _FACE_HALF * np.array([dx, dy])
        corners = np.stack([center - x - y, center - x + y, center + x + y, center + x - y])
        frames.append(video_files.to_unit(_cropped(_photograph(), corners, size)))
        still = np.array([math.cos(_FACE_TILT), math.sin(_FACE_TILT)]) * _FACE_HALF
        model = _model_landmarks()
        place = _FACE_CENTER + model[:, :1] * still
        place = place + model[:, 1:] * np.array([-still[1], still[0]])
        inverse = np.linalg.inv(np.stack([x, y], -1))
        points.append(((place - center) @ inverse.T + 1) / 2 * size)
    return np.stack(frames), np.stack(points)
