"""Frames of drives: simulated ones, prepared once, and files of the usual data sets.

Kinds of `frames(options, split)`, random-access sequences of `jaxmodels.driving.frame.Frame`:
`simulated` (drives of the scene simulator), `waymo` (files of the Waymo Open Dataset, version 1 or
2: see `waymo_frames` and `waymo_parquet`), `nuscenes`, `kitti` (the object benchmark's folders) and
`npz` (files of `save_frame`).
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jaxmodels.driving import camera_renderer, driving_scene
from jaxmodels.driving.frame import Frame, Labels2D, Labels3D, check_frame, front_view
from train.data import preparation
from train.data.stored_arrays import arrays_of

SPLITS = ("train", "test")
KINDS = ("simulated", "waymo", "nuscenes", "kitti", "npz")
# half_angle: degrees on either side of straight ahead that are kept of a LiDAR's whole turn. The
# others but `source` are of simulated drives; `image_scale` is the share of Waymo's 1920 x 1280.
OPTIONS: dict[str, Any] = {
    "source": "simulated",
    "half_angle": 180.0,
    "train_frames": 240,
    "test_frames": 60,
    "frames_a_drive": 5,
    "frame_stride": 10,
    "image_scale": 0.25,
    "columns": 2650,
    "data_seed": 0,
    "crowd": 1.0,
    "slope": 0.0,
    "kerb": 0.0,
}
MAX_LABELS = 32

_TEST_SEED = 1_000_000
_RANGE_UNIT = 75.0 / 65535  # meters, as the published range images of 16 bits


class DrivingFrames(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of simulated drives: range image, camera image, exact labels."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Street scenes of four lanes, seeded."}

    def __init__(self, *, settings: tuple[tuple[str, Any], ...] = (), **arguments):
        self._settings = {**simulation_options(OPTIONS), **dict(settings)}
        super().__init__(**arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        settings, most = self._settings, most_labels(self._settings)
        camera = camera_renderer.front_camera(settings["image_scale"])
        sensor = camera_renderer.default_sensor(columns=settings["columns"])
        tensor, scalar = tfds.features.Tensor, tfds.features.Scalar
        png = tfds.features.Image(shape=(camera.height, camera.width, 3), encoding_format="png")
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "index": scalar(dtype=np.int32),
                    "image": png,
                    "range": tensor(shape=sensor.shape, dtype=np.uint16),
                    "elongation": tensor(shape=sensor.shape, dtype=np.uint8),
                    "surface": tensor(shape=sensor.shape, dtype=np.int16),
                    "boxes3d": tensor(shape=(most, 7), dtype=np.float32),
                    "velocity": tensor(shape=(most, 2), dtype=np.float32),
                    "labels3d": tensor(shape=(most, 3), dtype=np.int32),
                    "boxes2d": tensor(shape=(most, 4), dtype=np.float32),
                    "occlusion": tensor(shape=(most,), dtype=np.float32),
                    "labels2d": tensor(shape=(most, 2), dtype=np.int32),
                    "ego": tensor(shape=(3,), dtype=np.float32),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        padded = functools.partial(_filled_up, count=most_labels(self._settings))
        for index, frame in enumerate(simulated_drives(split, self._settings)):
            png = io.BytesIO()
            Image.fromarray(frame.image).save(png, format="png", compress_level=1)
            png.seek(0)
            three, two = frame.labels3d, frame.labels2d
            yield (
                index,
                {
                    "index": index,
                    "image": png,
                    "range": np.round(frame.range / _RANGE_UNIT).clip(0, 65535).astype(np.uint16),
                    "elongation": np.round(frame.elongation * 255).astype(np.uint8),
                    "surface": frame.surface.astype(np.int16),
                    "boxes3d": padded(three.boxes),
                    "velocity": padded(three.velocity),
                    "labels3d": padded(
                        np.stack([three.classes, three.returns, three.ids], -1), fill=-1
                    ),
                    "boxes2d": padded(two.boxes),
                    "occlusion": padded(two.occlusion),
                    "labels2d": padded(np.stack([two.classes, two.ids], -1), fill=-1),
                    "ego": np.asarray([*frame.ego_velocity, frame.timestamp], np.float32),
                },
            )


def simulation_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that decide what is simulated."""
    return {key: options[key] for key in OPTIONS if key not in ("source", "half_angle")}


def scene_options(settings: Mapping[str, Any]) -> driving_scene.SceneOptions:
    """`crowd` times the usual number of objects, with the settings' ground."""
    plain = driving_scene.SceneOptions()
    crowd = settings["crowd"]
    counts = {
        field.name: tuple(round(n * crowd) for n in getattr(plain, field.name))
        for field in dataclasses.fields(plain)
        if isinstance(getattr(plain, field.name), tuple)
    }
    return dataclasses.replace(plain, **counts, slope=settings["slope"], kerb=settings["kerb"])


def simulated_drives(split: str, settings: Mapping[str, Any]):
    """Frames of drives, `frames_a_drive` from each, `frame_stride` tenths of a second apart."""
    count, each = settings[f"{split}_frames"], settings["frames_a_drive"]
    camera = camera_renderer.front_camera(settings["image_scale"])
    sensor = camera_renderer.default_sensor(columns=settings["columns"])
    base = settings["data_seed"] * 10_000_000 + (_TEST_SEED if split == "test" else 0)
    for drive in range(-(-count // each)):
        scene = driving_scene.sample_scene(base + drive, scene_options(settings))
        for step in range(min(each, count - drive * each)):
            if step:
                for _ in range(settings["frame_stride"]):
                    scene = driving_scene.advance(scene)
            seed = (base + drive) * 1000 + step
            yield camera_renderer.make_frame(scene, seed=seed, sensor=sensor, camera=camera)


def most_labels(settings: Mapping[str, Any]) -> int:
    """Labels that a stored frame has room for: more than a scene of this crowd can have."""
    return math.ceil(MAX_LABELS * max(settings["crowd"], 1.0))


def _filled_up(rows: np.ndarray, fill: float = 0, *, count: int) -> np.ndarray:
    out = np.full((count, *rows.shape[1:]), fill, rows.dtype)
    out[: len(rows)] = rows
    return out


@dataclasses.dataclass(frozen=True)
class SimulatedFrames(Sequence):
    """Prepared frames of one split."""

    arrays: Mapping[str, np.ndarray]
    settings: tuple[tuple[str, Any], ...]

    def __len__(self) -> int:
        return len(self.arrays["range"])

    def __getitem__(self, index: int) -> Frame:
        settings = dict(self.settings)
        row = {name: array[index] for name, array in self.arrays.items()}
        camera = camera_renderer.front_camera(settings["image_scale"])
        sensor = camera_renderer.default_sensor(columns=settings["columns"])
        three, two = row["labels3d"][:, 0] >= 0, row["labels2d"][:, 0] >= 0
        extrinsic = camera_renderer.lidar_simulator.default_extrinsic()
        return check_frame(
            Frame(
                range=row["range"].astype(np.float32) * np.float32(_RANGE_UNIT),
                inclinations=sensor.rows,
                azimuths=sensor.azimuths,
                lidar_extrinsic=extrinsic,
                image=row["image"],
                camera_intrinsic=np.asarray(camera.intrinsic),
                camera_extrinsic=np.asarray(camera.extrinsic),
                wraps=sensor.wraps,
                labels3d=Labels3D(
                    row["boxes3d"][three],
                    *np.moveaxis(row["labels3d"][three][:, :1], -1, 0),
                    row["velocity"][three],
                    *np.moveaxis(row["labels3d"][three][:, 1:], -1, 0),
                ),
                labels2d=Labels2D(
                    row["boxes2d"][two],
                    *np.moveaxis(row["labels2d"][two], -1, 0),
                    row["occlusion"][two],
                ),
                ego_velocity=row["ego"][:2],
                timestamp=float(row["ego"][2]),
                elongation=row["elongation"].astype(np.float32) / 255,
                surface=row["surface"].astype(np.int32),
            )
        )


def frames(options: Mapping[str, Any], split: str) -> Sequence[Frame]:
    """The frames of a split; see the head of this file for the kinds of `source`.

    Raises ValueError for an unknown kind; FileNotFoundError where no data is at `path`.
    """
    found, half_angle = _frames(options, split), options.get("half_angle", 180.0)
    return FrontFrames(found, half_angle) if half_angle < 180 else found


def _frames(options: Mapping[str, Any], split: str) -> Sequence[Frame]:
    kind = options["source"]
    if kind == "simulated":
        settings = tuple(sorted(simulation_options(options).items()))
        return _simulated(split, settings, str(preparation.data_directory(options["path"])))
    if kind == "waymo":
        from train.data import waymo_frames, waymo_parquet

        folder = _folder(options, split)
        if waymo_parquet.is_version_2(folder):
            return waymo_parquet.WaymoParquetFrames.below(folder)
        return waymo_frames.WaymoFrames.below(folder)
    if kind == "kitti":
        from train.data import kitti_frames

        return kitti_frames.KittiFrames.below(_root(options), split)
    if kind == "nuscenes":
        from train.data import nuscenes_frames

        return nuscenes_frames.NuScenesFrames.below(_root(options), split)
    if kind == "npz":
        return NpzFrames(tuple(sorted(_folder(options, split).glob("*.npz"))))
    raise ValueError(f"data.options.source {kind!r}: known are {', '.join(KINDS)}")


@dataclasses.dataclass(frozen=True)
class FrontFrames(Sequence):
    """Frames of which the LiDAR's columns within `half_angle` degrees of ahead are kept."""

    frames: Sequence[Frame]
    half_angle: float

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Frame:
        return front_view(self.frames[index], self.half_angle)


@functools.lru_cache(maxsize=4)
def _simulated(split: str, settings: tuple, directory: str) -> SimulatedFrames:
    # A folder for each choice of settings: TFDS knows one version of a builder a folder.
    name = "driving_" + "_".join(str(value) for _, value in settings)
    builder = preparation.prepare(DrivingFrames, str(Path(directory) / name), settings=settings)
    decoders = {"image": tfds.decode.SkipDecoding()}
    examples = list(builder.as_data_source(split, decoders=decoders))
    examples.sort(key=lambda example: int(example["index"]))
    arrays = {
        key: np.stack([example[key] for example in examples])
        for key in examples[0]
        if key not in ("index", "image")
    }
    images = [np.asarray(Image.open(io.BytesIO(example["image"]))) for example in examples]
    return SimulatedFrames({**arrays, "image": np.stack(images)}, settings)


def check_source(options: Mapping[str, Any]) -> None:
    """Raises FileNotFoundError unless the folder that `source` reads from exists."""
    if options["source"] != "simulated":
        _root(options)


def _root(options: Mapping[str, Any]) -> Path:
    root = Path(options["path"] or "").expanduser()
    if not options["path"] or not root.is_dir():
        raise FileNotFoundError(
            f"data.options.path {options['path']!r}: no such folder; source "
            f"{options['source']!r} reads files from it"
        )
    return root


def _folder(options: Mapping[str, Any], split: str) -> Path:
    """`path/training` and `path/validation`, or `path` itself where there are none."""
    root = _root(options)
    own = root / {"train": "training", "test": "validation"}[split]
    return own if own.is_dir() else root


# Single frames as files


def save_frame(path: str | os.PathLike, frame: Frame) -> None:
    """Write a frame as `.npz`: its fields, labels as `labels3d.boxes` and so on."""
    arrays: dict[str, Any] = {}
    for field in dataclasses.fields(frame):
        value = getattr(frame, field.name)
        if isinstance(value, tuple):
            arrays |= {f"{field.name}.{key}": part for key, part in value._asdict().items()}
        elif value is not None:
            arrays[field.name] = value
    np.savez_compressed(path, **arrays)


def load_frame(path: str | os.PathLike) -> Frame:
    """A checked frame of `save_frame`. Raises ValueError naming the file and what is missing."""
    arrays = arrays_of(path)
    given: dict[str, Any] = {}
    for field in dataclasses.fields(Frame):
        prefix = field.name + "."
        parts = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        if parts:
            given[field.name] = {"labels3d": Labels3D, "labels2d": Labels2D}[field.name](**parts)
        elif field.name in arrays:
            value = arrays[field.name]
            given[field.name] = value.item() if value.ndim == 0 else value
    try:
        return check_frame(Frame(**given))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: no readable frame ({error})") from None


@dataclasses.dataclass(frozen=True)
class NpzFrames(Sequence):
    """Files of `save_frame`, in the order of their names."""

    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Frame:
        return load_frame(self.files[index])
