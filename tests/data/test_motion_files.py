"""Argoverse files: what is read is what was written, and every broken file's one line."""

import csv
import json

import numpy as np
import pytest

from train.data import motion_files, motion_scenes, pipeline, traffic_simulator

SCENE = traffic_simulator.simulate(5)


@pytest.fixture
def sequence(tmp_path):
    path = tmp_path / "7.csv"
    motion_files.write_sequence(path, SCENE.tracks, SCENE.valid)
    motion_files.write_lanes(tmp_path / "7.lanes.json", SCENE.lanes, SCENE.lane_attributes)
    return path


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def rewrite(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_scenes_come_back_from_their_files_exactly(sequence):
    found = motion_files.read_sequence(sequence)
    assert (found.name, found.city, found.ids[found.target]) == ("7", "SIM", "track_0")
    np.testing.assert_array_equal(found.tracks, SCENE.tracks)
    assert found.valid.all() and found.center == found.target
    lanes = motion_files.read_lanes(sequence.with_suffix(".lanes.json"))
    np.testing.assert_array_equal(lanes.centerlines, np.stack(SCENE.lanes))
    np.testing.assert_array_equal(lanes.attributes, SCENE.lane_attributes)


def test_tracks_that_begin_late_are_not_valid_before_and_test_files_have_no_future(sequence):
    rows = rows_of(sequence)
    late = [r for r in rows[1:] if not (r[1] == "track_1" and float(r[0]) < 0.55)]
    observed = [r for r in late if float(r[0]) < 1.95]
    rewrite(sequence, [rows[0], *observed])
    found = motion_files.read_sequence(sequence)
    assert found.valid.shape[1] == 50 and not found.valid[:, 20:].any()
    if "track_1" in found.ids:
        start = found.valid[found.ids.index("track_1")].argmax()
        assert start == 6
    options = pipeline.resolve({"name": "motion_scenes"})[1]
    example = motion_scenes.example_of(motion_scenes.read_scene(sequence, options), options)
    assert not example["future_valid"].any() and example["vector_mask"][0].any()


def write_vector_map(path, lines, turns):
    """The published layout: nodes, then ways that refer to them."""
    nodes, ways, number = [], [], 0
    for i, (line, turn) in enumerate(zip(lines, turns)):
        refs = []
        for x, y in line:
            nodes.append(f'  <node id="{number}" x="{x!r}" y="{y!r}" />')
            refs.append(f'    <nd ref="{number}" />')
            number += 1
        tags = {"has_traffic_control": "True", "turn_direction": turn, "is_intersection": "False"}
        tags |= {"l_neighbor_id": "None", "r_neighbor_id": "None"}
        text = [f'    <tag k="{k}" v="{v}" />' for k, v in tags.items()]
        predecessor = '    <tag k="predecessor" v="9" />'
        ways += [f'  <way lane_id="{i}">', *text, *refs, predecessor, "  </way>"]
    body = "\n".join(["<?xml version='1.0'?>", "<ArgoverseVectorMap>", *nodes, *ways])
    path.write_text(body + "\n</ArgoverseVectorMap>\n")


def test_a_citys_vector_map_is_found_and_read(sequence, tmp_path):
    lines = [lane.tolist() for lane in SCENE.lanes[:2]] + [SCENE.lanes[2][:4].tolist()]
    path = tmp_path / "map_files" / "pruned_argoverse_SIM_10316_vector_map.xml"
    path.parent.mkdir()
    write_vector_map(path, lines, ["LEFT", "NONE", "RIGHT"])
    sequence.with_suffix(".lanes.json").unlink()
    options = pipeline.resolve({"name": "motion_scenes"})[1]
    scene = motion_scenes.read_scene(sequence, options)
    assert scene.lanes.shape == (3, 10, 2)  # the line of four points is resampled
    np.testing.assert_array_equal(scene.lanes[0], SCENE.lanes[0])
    np.testing.assert_array_equal(scene.attributes, [[0, 1, 1], [0, 1, 0], [0, 1, -1]])
    both = motion_scenes.read_scene(sequence, {**options, "lane_lines": "boundaries"})
    assert len(both.lanes) == 6
    width = np.hypot(*(both.lanes[0] - both.lanes[1]).T)
    np.testing.assert_allclose(width, traffic_simulator.LANE_SPACING)
    path.write_text(path.read_text().replace("turn_direction", "turn"))
    with pytest.raises(ValueError, match=r"vector_map\.xml: lane 0: missing 'turn_direction'"):
        motion_files.read_vector_map(path)
    with pytest.raises(FileNotFoundError, match=r"data\.options\.map_path: no pruned_argoverse_X"):
        motion_files.find_vector_map(tmp_path, "X")


def test_argoverse_2_scenarios_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    rows = [("AV", t, 0.0, float(t)) for t in range(110)]
    rows += [("12", t, 5.0 + t, 1.0 + rng.normal() * 0.01) for t in range(110)]
    rows += [("13", t, 3.0, 2.0 + t) for t in range(30, 60)]
    columns = dict(zip(("track_id", "timestep", "position_x", "position_y"), zip(*rows)))
    columns |= {"focal_track_id": ["12"] * len(rows), "city": ["austin"] * len(rows)}
    folder = tmp_path / "val" / "abc"
    folder.mkdir(parents=True)
    parquet.write_table(pyarrow.table(columns), folder / "scenario_abc.parquet")
    line = [{"x": float(x), "y": 0.0, "z": 1.0} for x in range(40, 80, 4)]
    sides = [[{**p, "y": y} for p in line] for y in (2.0, 6.0)]
    segments = {
        "1": {"centerline": line, "is_intersection": True},
        "2": {"left_lane_boundary": sides[0], "right_lane_boundary": sides[1]},
    }
    (folder / "log_map_archive_abc.json").write_text(json.dumps({"lane_segments": segments}))
    data = {"name": "motion_scenes:argoverse2", "options": {"path": str(tmp_path)}}
    batch = next(pipeline.eval_batches(data, "val", batch_size=1))
    assert batch["future_offsets"].shape == (1, 60, 2) and batch["future_valid"].all()
    present = batch["vector_mask"][0].sum(-1)
    assert present[:6].tolist() == [49, 19, 49, 9, 9, 0]
    with pytest.raises(FileNotFoundError, match=r"data\.options\.path: no scenario folders"):
        pipeline.train_batches(data, batch_size=1, seed=0)


def broken(rows, kind):
    head, body = rows[0], [list(r) for r in rows[1:]]
    if kind == "column":
        head = ["Z" if name == "Y" else name for name in head]
    elif kind == "no agent":
        body = [[*r[:2], "OTHERS", *r[3:]] for r in body]
    elif kind == "two agents":
        body += [[r[0], "twin", "AGENT", *r[3:]] for r in body if r[1] == "track_0"]
    elif kind == "duplicate":
        body.append(list(body[0]))
    elif kind == "short":
        body = [r for r in body if float(r[0]) < 0.95]
    elif kind == "rate":
        body = [[f"{float(r[0]) * 2:.6f}", *r[1:]] for r in body]
    elif kind == "number":
        body[3][3] = "east"
    elif kind == "nan":
        body[8][4] = "nan"
    elif kind == "absent":
        body = [r for r in body if not (r[1] == "track_0" and abs(float(r[0]) - 1.9) < 0.01)]
        body += [["1.9", "other", "OTHERS", "1", "1", "SIM"]]
    return [head, *body]


MISTAKES = {
    "column": r"7\.csv: no column Y; it has TIMESTAMP, TRACK_ID",
    "no agent": r"7\.csv: one AGENT track is wanted, there are 0",
    "two agents": r"7\.csv: one AGENT track is wanted, there are 2 \(track_0, twin\)",
    "duplicate": r"7\.csv: track track_0 has two rows at TIMESTAMP 0\.0",
    "short": r"7\.csv: 10 time steps, fewer than the 20 observed ones",
    "rate": r"7\.csv: TIMESTAMP 0\.0 to 0\.2 is 0\.200 s, not 0\.1 s within 20%; .*strict=False",
    "number": r"7\.csv, line 5: not a row of 6 finite values",
    "nan": r"7\.csv, line 10: not a row of 6 finite values",
    "absent": r"7\.csv: the AGENT is not there at the last observed step",
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_broken_file_is_named_with_what_is_wrong(sequence, kind):
    rewrite(sequence, broken(rows_of(sequence), kind))
    with pytest.raises(ValueError, match=MISTAKES[kind]):
        motion_files.read_sequence(sequence)
    if kind == "rate":
        assert motion_files.read_sequence(sequence, strict=False).valid.all()


def test_a_broken_lane_file_is_named(tmp_path):
    path = tmp_path / "1.lanes.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"1\.lanes\.json: not a lane file"):
        motion_files.read_lanes(path)
    path.write_text(json.dumps({"lanes": [{"id": 4, "centerline": [[0, 1, 2]]}]}))
    with pytest.raises(ValueError, match=r"1\.lanes\.json: lane 4"):
        motion_files.read_lanes(path)
