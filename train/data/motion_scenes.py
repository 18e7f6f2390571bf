"""Scenes for motion forecasting: polylines of vectors, or rasters, around one target.

`motion_scenes` (the kinematic traffic simulator, prepared as a TFDS builder), `:crossing` (the same
with intersections), `:highway` (three straight lanes, `highway_traffic`), `:argoverse` and
`:argoverse2` (`path` to the data set's own files). With `inputs="raster"` the same scenes come as
bird's-eye images for the ConvNet baseline.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from jaxmodels.driving import rasterization, vectorization
from train.data import highway_traffic, motion_files, preparation, traffic_simulator
from train.naming import nearest

KINDS = ("simulator", "argoverse", "argoverse2")
INPUTS = ("vectors", "raster")
SPLITS = ("train", "val", "test")

# columns: 0 takes 12. radius: metres; half the side of the square that counts.
# use_map, use_agents: the ablations. lane_lines: center | boundaries (half the city's lane width).
# raster_frame: heading (up is the centered vehicle's direction) | city (north is up).
# raster_around: vehicle (the recording one, where there is one) | target.
OPTIONS: dict[str, Any] = {
    "kind": "simulator",
    "inputs": "vectors",
    "obs": 20,
    "horizon": 30,
    "max_polylines": 12,
    "max_vectors": 19,
    "columns": 0,
    "radius": 65.0,
    "heading_min_disp": 0.3,
    "use_map": True,
    "use_agents": True,
    "lane_lines": "center",
    "truncate": True,
    "strict": True,
    "map_path": "",
    "scenes": (1500, 300, 300),
    "scene_seed": 0,
    "crossing": False,
    "highway": False,
    "raster_size": 100,
    "raster_metres": 130.0,
    "raster_frame": "heading",
    "raster_around": "vehicle",
    "threads": 1,
}
_ARGOVERSE = {"max_polylines": 128, "heading_min_disp": 0.1, "raster_size": 400, "threads": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "crossing": {"crossing": True, "max_polylines": 24},
    "highway": {"highway": True, "max_polylines": 16},
    "argoverse": {"kind": "argoverse", **_ARGOVERSE},
    "argoverse2": {"kind": "argoverse2", "obs": 50, "horizon": 60, "max_vectors": 49, **_ARGOVERSE},
}
# Published numbers of sequences, for dry runs.
SIZES = {
    "argoverse": {"train": 205_942, "val": 39_472, "test": 78_143},
    "argoverse2": {"train": 199_908, "val": 24_988, "test": 24_984},
}
COORDINATES = 2


@dataclasses.dataclass
class TrafficConfig(tfds.core.BuilderConfig):
    """What a `KinematicTraffic` builder holds."""

    scenes: tuple[int, ...] = (1500, 300, 300)
    seed: int = 0
    crossing: bool = False
    highway: bool = False


def _traffic_config(
    scenes: tuple[int, ...], seed: int, crossing: bool, highway: bool = False
) -> TrafficConfig:
    numbers = "_".join(map(str, scenes))
    kind = "highway" if highway else "crossing" if crossing else "roads"
    return TrafficConfig(
        name=f"{kind}_{numbers}_seed{seed}",
        version=tfds.core.Version("1.0.0"),
        description="Simulated traffic.",
        scenes=scenes,
        seed=seed,
        crossing=crossing,
        highway=highway,
    )


class KinematicTraffic(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of simulated scenes: tracks and lanes in city coordinates.

    Scene i of a split is a function of (seed, split, i).
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Straight, bent and S-shaped roads; crossings."}
    BUILDER_CONFIGS = tuple(
        _traffic_config((1500, 300, 300), 0, crossing) for crossing in (False, True)
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "index": tfds.features.Scalar(dtype=np.int32),
                    "scene": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        counts = dict(zip(SPLITS, self.builder_config.scenes))
        return {split: self._generate_examples(split) for split in SPLITS if counts.get(split)}

    def _generate_examples(self, split):
        config, number = self.builder_config, SPLITS.index(split)
        for i in range(config.scenes[number]):
            seed = (config.seed, number, i)
            if config.highway:
                scene = highway_traffic.simulate(seed)
            else:
                scene = traffic_simulator.simulate(seed, config.crossing)
            yield i, {"index": i, "scene": _scene_text(scene)}


def _scene_text(scene: traffic_simulator.TrafficScene) -> str:
    """A scene as JSON, to the tenth of a millimetre: ragged arrays without padding."""

    def rounded(array):
        return np.round(array, 4).tolist()

    return json.dumps(
        {
            "tracks": rounded(scene.tracks),
            "lanes": [rounded(lane) for lane in scene.lanes],
            "attributes": scene.lane_attributes.tolist(),
        }
    )


@dataclasses.dataclass(frozen=True)
class RawScene:
    """Tracks and lanes in city coordinates; the same for every kind of data."""

    name: str
    tracks: np.ndarray
    valid: np.ndarray
    target: int
    center: int
    lanes: Any
    attributes: np.ndarray


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one example, without data.

    vectors: `vectors` [P, V, D], `vector_mask` [P, V], `target_index`; raster: `image` uint8
    [S, S, 3 To], `cells` [To, 2], `start` [2] (the target's place in the raster's metric frame).
    Both: `future_offsets` [T, 2], `future_valid` [T].
    """
    _check(options)
    steps, obs = options["horizon"], options["obs"]
    spec = {
        "future_offsets": jax.ShapeDtypeStruct((steps, COORDINATES), np.float32),
        "future_valid": jax.ShapeDtypeStruct((steps,), np.float32),
    }
    if options["inputs"] == "raster":
        size = options["raster_size"]
        return spec | {
            "image": jax.ShapeDtypeStruct((size, size, 3 * obs), np.uint8),
            "cells": jax.ShapeDtypeStruct((obs, 2), np.int32),
            "start": jax.ShapeDtypeStruct((2,), np.float32),
        }
    slots = (options["max_polylines"], options["max_vectors"])
    columns = options["columns"] or 2 * COORDINATES + vectorization.ATTRIBUTES
    return spec | {
        "vectors": jax.ShapeDtypeStruct((*slots, columns), np.float32),
        "vector_mask": jax.ShapeDtypeStruct(slots, np.bool_),
        "target_index": jax.ShapeDtypeStruct((), np.int32),
    }


def eval_element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """As `element_spec`, with the observed track: `history` [To, 2] and `history_valid` [To]."""
    obs = options["obs"]
    return element_spec(options) | {
        "history": jax.ShapeDtypeStruct((obs, COORDINATES), np.float32),
        "history_valid": jax.ShapeDtypeStruct((obs,), np.float32),
    }


def _check(options: Mapping[str, Any]) -> None:
    for name, known in (
        ("kind", KINDS),
        ("inputs", INPUTS),
        ("lane_lines", ("center", "boundaries")),
        ("raster_frame", ("heading", "city")),
        ("raster_around", ("vehicle", "target")),
    ):
        if options[name] not in known:
            raise ValueError(
                f"data.options.{name}: {options[name]!r}; {nearest(options[name], known)}"
            )
    for name in ("obs", "horizon", "max_polylines", "max_vectors"):
        if int(options[name]) < (2 if name == "obs" else 1):
            raise ValueError(f"data.options.{name} = {options[name]} is too small")


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Scenes of each split; published numbers where no files are there."""
    if options["kind"] == "simulator":
        return dict(zip(SPLITS, options["scenes"]))
    if options["path"] and Path(options["path"]).is_dir():
        return {split: len(_files(split, options)) for split in SPLITS}
    return dict(SIZES[options["kind"]])


def _files(split: str, options: Mapping[str, Any]) -> list[Path]:
    """Sequences of a split: CSV files, or scenario folders."""
    root = Path(options["path"])
    if options["kind"] == "argoverse2":
        return sorted(p.parent for p in (root / split).glob("*/scenario_*.parquet"))
    names = (split, f"{split}_obs") if split == "test" else (split,)
    folders = [root / name for name in names] + [
        root / f"forecasting_{split}_v1.1" / name for name in names
    ]
    for folder in folders:
        for place in (folder / "data", folder):
            if found := sorted(place.glob("*.csv")):
                return found
    return []


@dataclasses.dataclass(frozen=True)
class FileScenes:
    """Sequences read from their files when they are asked for."""

    files: tuple[Path, ...]
    options: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return example_of(read_scene(self.files[index], self.options), self.options)


@dataclasses.dataclass(frozen=True)
class SimulatedScenes:
    """Scenes held in memory; rasters are drawn when they are asked for, vectors at once."""

    scenes: tuple[RawScene, ...]
    options: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return example_of(self.scenes[index], self.options)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Finished examples in memory."""

    rows: tuple[dict[str, np.ndarray], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.rows[index]


def sequences_below(path: str | Path, options: Mapping[str, Any]) -> list[Path]:
    """Sequences of one file or folder to predict on: CSV files, or Argoverse 2 scenarios.

    Raises FileNotFoundError when there are none.
    """
    path = Path(path)
    if options["kind"] == "argoverse2":
        found = sorted({p.parent for p in path.rglob("scenario_*.parquet")})
    else:
        found = [path] if path.is_file() else sorted(path.rglob("*.csv"))
    if not found:
        kind = "scenario_*.parquet" if options["kind"] == "argoverse2" else "*.csv"
        raise FileNotFoundError(f"{path}: no {kind} below it")
    return found


def source(split: str, options: Mapping[str, Any]):
    """Random-access examples with the evaluation's entries.

    Raises FileNotFoundError naming `data.options.path` where files should be.
    """
    _check(options)
    if options["kind"] == "simulator":
        key = tuple(sorted((k, tuple(v) if isinstance(v, (list, tuple)) else v)
                           for k, v in options.items()))  # fmt: skip
        return _simulated_examples(split, key)
    if not options["path"]:
        raise FileNotFoundError(
            f"data.options.path: the folder of {options['kind']} is wanted (train/ and val/ in it)"
        )
    files = _files(split, options)
    if not files:
        kind = "scenario folders" if options["kind"] == "argoverse2" else "CSV files"
        raise FileNotFoundError(
            f"data.options.path: no {kind} of split {split!r} below {options['path']}"
        )
    return FileScenes(tuple(files), dict(options))


@functools.lru_cache(maxsize=8)
def _simulated_examples(split: str, key: tuple):
    options = dict(key)
    scenes = simulated_scenes(split, options)
    if options["inputs"] == "raster":
        return SimulatedScenes(scenes, options)
    return Examples(tuple(example_of(scene, options) for scene in scenes))


def simulated_scenes(split: str, options: Mapping[str, Any]) -> tuple[RawScene, ...]:
    """The simulator's scenes of a split, prepared on first use."""
    counts, seed, crossing = tuple(options["scenes"]), options["scene_seed"], options["crossing"]
    directory = str(preparation.data_directory(options["path"]))
    highway = bool(options["highway"])
    return _prepared_scenes(split, counts, seed, bool(crossing), highway, directory)


@functools.lru_cache(maxsize=8)
def _prepared_scenes(split, counts, seed, crossing, highway, directory) -> tuple[RawScene, ...]:
    config = _traffic_config(counts, seed, crossing, highway)
    ready = {c.name for c in KinematicTraffic.BUILDER_CONFIGS}
    builder = preparation.prepare(
        KinematicTraffic, directory, config=config.name if config.name in ready else config
    )
    rows = sorted(builder.as_data_source(split), key=lambda row: int(row["index"]))
    scenes = []
    for row in rows:
        scene = json.loads(row["scene"])
        tracks = np.asarray(scene["tracks"], np.float64)
        scenes.append(
            RawScene(
                name=f"{split}_{int(row['index'])}",
                tracks=tracks,
                valid=np.ones(tracks.shape[:2], bool),
                target=0,
                center=0,
                lanes=[np.asarray(lane, np.float64) for lane in scene["lanes"]],
                attributes=np.asarray(scene["attributes"], np.float64),
            )
        )
    return tuple(scenes)


def read_scene(path: Path, options: Mapping[str, Any]) -> RawScene:
    """One sequence file (or Argoverse 2 folder) with the lanes around it.

    Raises ValueError or FileNotFoundError with the file.
    """
    obs, steps = options["obs"], options["obs"] + options["horizon"]
    if options["kind"] == "argoverse2":
        found = motion_files.read_scenario(path, obs=obs, steps=steps)
        lanes = motion_files.read_scenario_lanes(path) if options["use_map"] else None
    else:
        found = motion_files.read_sequence(path, obs=obs, steps=steps, strict=options["strict"])
        beside = Path(path).with_suffix(".lanes.json")
        if not options["use_map"]:
            lanes = None
        elif beside.is_file():
            lanes = motion_files.read_lanes(beside)
        else:
            root = options["path"] if options["kind"] == "argoverse" else None
            folder = options["map_path"] or root or str(Path(path).parent)
            lanes = _city_map(str(folder), found.city)
    width = 0.0
    if options["lane_lines"] == "boundaries":
        width = motion_files.LANE_WIDTHS.get(found.city, traffic_simulator.LANE_SPACING)
    polylines, attributes = ([], np.zeros((0, 3))) if lanes is None else lanes.polylines(width)
    return RawScene(
        found.name, found.tracks, found.valid, found.target, found.center, polylines, attributes
    )


@functools.lru_cache(maxsize=4)
def _city_map(folder: str, city: str) -> motion_files.Lanes:
    return motion_files.read_vector_map(motion_files.find_vector_map(folder, city))


def vector_scene(scene: RawScene, options: Mapping[str, Any]) -> vectorization.VectorScene:
    """`vectorize` with these options."""
    tracks, valid = scene.tracks, scene.valid
    if not options["use_agents"]:
        keep = np.arange(len(tracks)) == scene.target
        valid = valid & keep[:, None]
    found = vectorization.vectorize(
        tracks,
        valid,
        scene.target,
        scene.lanes if options["use_map"] else [],
        scene.attributes,
        obs=options["obs"],
        radius=options["radius"],
        heading_min_disp=options["heading_min_disp"],
        max_polylines=options["max_polylines"],
        max_vectors=options["max_vectors"],
        columns=options["columns"] or None,
        truncate=options["truncate"],
        name=scene.name,
    )
    if found.dropped:
        logging.info("%s: no room for %d polylines", scene.name, found.dropped)
    return found


def example_of(scene: RawScene, options: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A scene as `eval_element_spec` says."""
    if options["inputs"] == "raster":
        return raster_example(scene, options)
    found = vector_scene(scene, options)
    return {
        "vectors": found.vectors,
        "vector_mask": found.vector_mask,
        "target_index": np.int32(found.target_index),
        "future_offsets": found.future_offsets,
        "future_valid": found.future_valid,
        "history": found.history,
        "history_valid": found.history_valid,
    }


def raster_frame(scene: RawScene, options: Mapping[str, Any]) -> rasterization.RasterFrame:
    """The raster around the recording vehicle (or the target), its heading or north up."""
    obs = options["obs"]
    around = scene.target if options["raster_around"] == "target" else scene.center
    if not scene.valid[around, obs - 1]:
        around = scene.target
    origin, heading = vectorization.target_frame(
        scene.tracks[around], scene.valid[around], obs, options["heading_min_disp"], scene.name
    )
    if options["raster_frame"] == "city":
        heading = np.pi / 2
    size = options["raster_size"]
    return rasterization.RasterFrame(origin[:2], heading, size, options["raster_metres"])


def raster_example(scene: RawScene, options: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The raster, the target's cells, and its future in the raster's metric frame."""
    obs, target = options["obs"], scene.target
    frame = raster_frame(scene, options)
    tracks, valid = scene.tracks, scene.valid
    if not options["use_agents"]:
        valid = valid & (np.arange(len(tracks)) == target)[:, None]
    lanes = scene.lanes if options["use_map"] else []
    lanes = [lane for lane in lanes if _near(lane, frame)]
    own = tracks[target]
    # Unobserved steps (a track that began late) take the nearest place known.
    known = np.flatnonzero(valid[target, :obs])
    nearest_known = known[np.abs(np.arange(obs)[:, None] - known).argmin(1)]
    metric = frame.metric(own)
    offsets, future_valid = vectorization.future_steps(metric - metric[obs - 1], valid[target], obs)
    seen = valid[target, :obs]
    history = np.where(seen[:, None], metric[:obs] - metric[obs - 1], 0)
    return {
        "image": rasterization.render(tracks, valid, target, lanes, frame, obs),
        "cells": frame.cells(own[nearest_known]),
        "start": metric[obs - 1].astype(np.float32),
        "future_offsets": offsets.astype(np.float32),
        "future_valid": future_valid.astype(np.float32),
        "history": history.astype(np.float32),
        "history_valid": seen.astype(np.float32),
    }


def _near(lane: np.ndarray, frame: rasterization.RasterFrame) -> bool:
    return bool((np.abs(np.atleast_2d(lane)[:, :2] - frame.origin).max(1) < frame.metres).any())


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Leaves out what only the evaluation reads; there is no augmentation (nor in the paper)."""

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        del rng
        return {k: v for k, v in example.items() if not k.startswith("history")}


def train_transform(options: Mapping[str, Any]) -> TrainTransform:
    """The training transform."""
    del options
    return TrainTransform()


def eval_transform(options: Mapping[str, Any]):
    """Examples as they are."""
    del options
    return dict
