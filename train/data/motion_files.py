"""Tracks and lane maps on disk: Argoverse 1 and 2 motion forecasting, and lanes as JSON.

Argoverse 1 (argoai/argoverse-api): `<sequence>.csv` with TIMESTAMP, TRACK_ID, OBJECT_TYPE, X, Y,
CITY_NAME at 10 Hz, one AGENT each; `pruned_argoverse_<CITY>_<id>_vector_map.xml` in the manner of
OpenStreetMap. Instead of the city's map a sequence may have its lanes beside it,
`<sequence>.lanes.json`: {"lanes": [{"id", "centerline": [[x, y], ...], "is_intersection",
"has_traffic_control", "turn_direction"}]}.

Argoverse 2 (argoverse/av2-api): `<id>/scenario_<id>.parquet` with `<id>/log_map_archive_<id>.json`.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from jaxmodels.driving.vectorization import resample

COLUMNS = ("TIMESTAMP", "TRACK_ID", "OBJECT_TYPE", "X", "Y", "CITY_NAME")
TURNS = {"RIGHT": -1, "NONE": 0, "LEFT": 1}
LANE_POINTS = 10
LANE_WIDTHS = {"MIA": 3.84, "PIT": 3.97}  # metres
INTERVAL, TOLERANCE = 0.1, 0.2  # seconds, and the share by which an interval may differ


@dataclass(frozen=True)
class Recording:
    """The tracks of one recorded scene.

    Attributes:
      name: the sequence's id. city: its map's name.
      tracks: float64 [A, T, 2] city coordinates, zero where not valid. valid: bool [A, T].
      ids: track names [A]. target: row of the one to forecast. center: row of the recording
        vehicle, the target's where it is not there.
    """

    name: str
    city: str
    tracks: np.ndarray
    valid: np.ndarray
    ids: tuple[str, ...]
    target: int
    center: int


@dataclass(frozen=True)
class Lanes:
    """Center lines float64 [L, 10, 2], attributes float64 [L, 3] (is_intersection,
    has_traffic_control, turn) and names of a map; stop points are [n, 2]."""

    centerlines: np.ndarray
    attributes: np.ndarray
    ids: tuple[str, ...]
    stops: np.ndarray

    def polylines(self, width: float = 0.0) -> tuple[list[np.ndarray] | np.ndarray, np.ndarray]:
        """Lanes and attributes as `vectorize` takes them.

        `width` metres draws both boundaries of each lane in place of its center line.
        """
        from jaxmodels.driving.vectorization import lane_boundaries

        lines, attributes = self.centerlines, self.attributes
        if width:
            lines = np.array([b for line in lines for b in lane_boundaries(line, width)])
            attributes = np.repeat(attributes, 2, 0)
        if not len(self.stops):
            return lines, attributes
        control = np.tile([0.0, 1.0, 0.0], (len(self.stops), 1))
        return [*lines, *self.stops[:, None]], np.concatenate([attributes, control])


def read_sequence(
    path: str | Path, *, obs: int = 20, steps: int = 50, strict: bool = True
) -> Recording:
    """One CSV of Argoverse 1.

    Args:
      obs: observed steps. steps: length that tracks are padded or cut to; files of the test split
        have `obs` only. strict: refuse intervals that are not 0.1 s within 20 %.

    Raises ValueError with the file and the column or track: a column is missing, a number is not
    one, there is no AGENT or more than one, a track has two rows of one time, too few steps.
    """
    path = Path(path)
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        missing = [name for name in COLUMNS if name not in header]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(header)}")
        places = [header.index(name) for name in COLUMNS]
        rows = []
        for number, row in enumerate(reader, start=2):
            if not row:
                continue
            try:
                time, track, kind, x, y, city = (row[i] for i in places)
                numbers = float(time), float(x), float(y)
                if not all(map(math.isfinite, numbers)):
                    raise ValueError
                rows.append((numbers[0], track, kind, *numbers[1:], city))
            except (IndexError, ValueError):
                raise ValueError(
                    f"{path}, line {number}: not a row of {len(COLUMNS)} finite values"
                ) from None
    if not rows:
        raise ValueError(f"{path}: no rows")
    times = np.unique([row[0] for row in rows])
    if len(times) < obs:
        raise ValueError(f"{path}: {len(times)} time steps, fewer than the {obs} observed ones")
    if strict:
        _check_rate(path, times)
    kinds: dict[str, str] = {}
    for row in rows:
        kinds.setdefault(row[1], row[2])
    agents = [track for track, kind in kinds.items() if kind == "AGENT"]
    if len(agents) != 1:
        raise ValueError(
            f"{path}: one AGENT track is wanted, there are {len(agents)}"
            + (f" ({', '.join(agents)})" if agents else "")
        )
    ids = tuple(kinds)
    row_of = {track: i for i, track in enumerate(ids)}
    step_of = {time: t for t, time in enumerate(times[:steps])}
    tracks = np.zeros((len(ids), steps, 2))
    valid = np.zeros((len(ids), steps), bool)
    for time, track, _, x, y, _ in rows:
        t = step_of.get(time)
        if t is None:
            continue
        i = row_of[track]
        if valid[i, t]:
            raise ValueError(f"{path}: track {track} has two rows at TIMESTAMP {time}")
        tracks[i, t], valid[i, t] = (x, y), True
    target = row_of[agents[0]]
    if not valid[target, obs - 1]:
        raise ValueError(f"{path}: the AGENT is not there at the last observed step ({obs - 1})")
    center = next((row_of[track] for track, kind in kinds.items() if kind == "AV"), target)
    return Recording(path.stem, rows[0][5], tracks, valid, ids, target, center)


def _check_rate(path: Path, times: np.ndarray) -> None:
    steps = np.diff(times)
    bad = np.flatnonzero(np.abs(steps - INTERVAL) > TOLERANCE * INTERVAL)
    if len(bad):
        raise ValueError(
            f"{path}: TIMESTAMP {times[bad[0]]} to {times[bad[0] + 1]} is {steps[bad[0]]:.3f} s, "
            f"not {INTERVAL} s within {TOLERANCE:.0%}; set data.options.strict=False to take it"
        )


def read_lanes(path: str | Path) -> Lanes:
    """Lanes of a JSON file (head of this module). Raises ValueError with the file and the lane."""
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["lanes"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a lane file ({error!r})") from None
    lines, attributes, ids, stops = [], [], [], []
    for entry in entries:
        name = str(entry.get("id"))
        try:
            points = np.asarray(entry["centerline"], np.float64).reshape(-1, 2)
            turn = TURNS[str(entry.get("turn_direction", "NONE")).upper()]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: lane {name}: {error!r}") from None
        if len(points) == 1:
            stops.append(points[0])
            continue
        lines.append(_ten_points(points))
        flags = (bool(entry.get(k)) for k in ("is_intersection", "has_traffic_control"))
        attributes.append([*flags, turn])
        ids.append(name)
    return _lanes(lines, attributes, ids, stops)


def read_vector_map(path: str | Path) -> Lanes:
    """Lanes of an Argoverse 1 vector map: `node` (id, x, y) and `way` (lane_id, tags, nd).

    Raises ValueError with the file and the lane.
    """
    path = Path(path)
    nodes: dict[str, tuple[float, float]] = {}
    lines, attributes, ids = [], [], []
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not XML ({error})") from None
    for node in root.iter("node"):
        nodes[node.attrib["id"]] = (float(node.attrib["x"]), float(node.attrib["y"]))
    for way in root.iter("way"):
        name = way.attrib.get("lane_id", "?")
        tags = {tag.attrib["k"]: tag.attrib["v"] for tag in way.iter("tag")}
        try:
            points = np.array([nodes[nd.attrib["ref"]] for nd in way.iter("nd")])
            flags = [tags[k] == "True" for k in ("is_intersection", "has_traffic_control")]
            attributes.append([*flags, TURNS[tags["turn_direction"]]])
            lines.append(_ten_points(points))
        except (KeyError, IndexError) as error:
            raise ValueError(f"{path}: lane {name}: missing {error}") from None
        ids.append(name)
    if not lines:
        raise ValueError(f"{path}: no lanes (elements <way>)")
    return _lanes(lines, attributes, ids, [])


def _ten_points(points: np.ndarray) -> np.ndarray:
    return points if len(points) == LANE_POINTS else resample(points, LANE_POINTS)


def _lanes(lines, attributes, ids, stops) -> Lanes:
    return Lanes(
        np.asarray(lines, np.float64).reshape(-1, LANE_POINTS, 2),
        np.asarray(attributes, np.float64).reshape(-1, 3),
        tuple(ids),
        np.asarray(stops, np.float64).reshape(-1, 2),
    )


def find_vector_map(folder: str | Path, city: str) -> Path:
    """The vector map of a city below a folder. Raises FileNotFoundError naming the option."""
    found = sorted(Path(folder).rglob(f"pruned_argoverse_{city}_*_vector_map.xml"))
    if not found:
        raise FileNotFoundError(
            f"data.options.map_path: no pruned_argoverse_{city}_*_vector_map.xml below {folder}, "
            "and no <sequence>.lanes.json beside the sequence"
        )
    return found[0]


def read_scenario(folder: str | Path, *, obs: int = 50, steps: int = 110) -> Recording:
    """One scenario folder of Argoverse 2 (parquet).

    Raises ValueError with the file: the focal track is missing or absent at the last observed step.
    """
    from pyarrow import parquet

    (path,) = sorted(Path(folder).glob("scenario_*.parquet"))[:1] or [None]
    if path is None:
        raise FileNotFoundError(f"{folder}: no scenario_*.parquet")
    names = ("track_id", "timestep", "position_x", "position_y", "focal_track_id", "city")
    table = parquet.read_table(path)
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}")
    column = {name: table.column(name).to_pylist() for name in names}
    ids = tuple(dict.fromkeys(column["track_id"]))
    row_of = {track: i for i, track in enumerate(ids)}
    tracks, valid = np.zeros((len(ids), steps, 2)), np.zeros((len(ids), steps), bool)
    for track, t, x, y in zip(*(column[name] for name in names[:4])):
        if t >= steps:
            continue
        i = row_of[track]
        if valid[i, t]:
            raise ValueError(f"{path}: track {track} has two rows at timestep {t}")
        tracks[i, t], valid[i, t] = (x, y), True
    focal = column["focal_track_id"][0]
    if focal not in row_of or not valid[row_of[focal], obs - 1]:
        raise ValueError(f"{path}: focal track {focal} is not there at step {obs - 1}")
    target = row_of[focal]
    name = path.stem.removeprefix("scenario_")
    return Recording(name, column["city"][0], tracks, valid, ids, target, row_of.get("AV", target))


def read_scenario_lanes(folder: str | Path) -> Lanes:
    """Lanes of an Argoverse 2 scenario's own map. Raises FileNotFoundError, ValueError."""
    (path,) = sorted(Path(folder).glob("log_map_archive_*.json"))[:1] or [None]
    if path is None:
        raise FileNotFoundError(f"{folder}: no log_map_archive_*.json")
    segments = json.loads(path.read_text(encoding="utf-8")).get("lane_segments")
    if segments is None:
        raise ValueError(f"{path}: no lane_segments")
    lines, attributes, ids = [], [], []
    for name, segment in segments.items():
        sides = [segment.get(k) for k in ("left_lane_boundary", "right_lane_boundary")]
        if segment.get("centerline"):
            points = _ten_points(_points(segment["centerline"]))
        elif all(sides):
            points = np.mean([resample(_points(side), LANE_POINTS) for side in sides], 0)
        else:
            raise ValueError(f"{path}: lane {name} has neither a centerline nor two boundaries")
        lines.append(points)
        attributes.append([bool(segment.get("is_intersection")), False, 0])
        ids.append(str(name))
    return _lanes(lines, attributes, ids, [])


def _points(entries) -> np.ndarray:
    return np.array([[p["x"], p["y"]] for p in entries], np.float64)


def write_sequence(
    path: str | Path,
    tracks: np.ndarray,
    valid: np.ndarray,
    target: int = 0,
    city: str = "SIM",
    start: float = 0.0,
) -> None:
    """Write tracks [A, T, 2] as a CSV of Argoverse 1; the target is AGENT, all others OTHERS."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for t in range(tracks.shape[1]):
            for i in np.flatnonzero(valid[:, t]):
                kind = "AGENT" if i == target else "OTHERS"
                x, y = tracks[i, t].tolist()
                writer.writerow([f"{start + INTERVAL * t:.6f}", f"track_{i}", kind, x, y, city])


def write_lanes(path: str | Path, lanes: Sequence[np.ndarray], attributes: np.ndarray) -> None:
    """Write lanes and attributes [L, 3] as JSON (head of this module)."""
    names = {turn: name for name, turn in TURNS.items()}
    entries = [
        {
            "id": str(i),
            "centerline": np.asarray(lane).tolist(),
            "is_intersection": bool(row[0]),
            "has_traffic_control": bool(row[1]),
            "turn_direction": names[int(row[2])],
        }
        for i, (lane, row) in enumerate(zip(lanes, attributes))
    ]
    Path(path).write_text(json.dumps({"lanes": entries}), encoding="utf-8")
