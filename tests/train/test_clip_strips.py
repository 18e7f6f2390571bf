"""The picture of an edit: headings, columns spread over the clip, the change made plain."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from train import clip_strips, edit_video
from train.clip_strips import _GAP, _TEXT
from train.command_line import load_config

# The defaults of the command itself.
EDIT = load_config("configs/video2stylegan.py").edit.unlock()


def test_frames_stand_enlarged_in_their_row_and_column(tmp_path):
    colors = np.array([[255, 0, 0], [0, 255, 0]], np.uint8)
    rows = {
        name: np.broadcast_to(color, (3, 32, 32, 3)) // (i + 1)
        for i, (name, color) in enumerate(zip(("input", "edited"), colors))
    }
    clip_strips.write_strip(tmp_path / "s.png", rows, [0, 4, 9], "age.npy x 2")
    picture = np.asarray(Image.open(tmp_path / "s.png"), int)
    line = _TEXT + 2 * _GAP
    assert picture.shape[0] == 2 * line + 2 * (96 + _GAP)
    for r, color in enumerate((colors[0], colors[1] // 2)):
        for column in range(3):
            top = 2 * line + r * (96 + _GAP)
            right = picture.shape[1] - (2 - column) * (96 + _GAP) - _GAP
            np.testing.assert_array_equal(
                picture[top : top + 96, right - 96 : right].reshape(-1, 3).min(0), color
            )
    # Headings above and beside the frames.
    left = picture.shape[1] - 3 * (96 + _GAP)
    for part in (picture[:line], picture[line : 2 * line], picture[2 * line :, :left]):
        assert part.min() < 100 and part.max() == 255
    assert [p.name for p in tmp_path.iterdir()] == ["s.png"]


def test_rows_that_do_not_match_are_refused(tmp_path):
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    for rows, numbers in (({"a": frames, "b": frames[:1]}, [0, 1]), ({"a": frames}, [0]), ({}, [])):
        with pytest.raises(ValueError, match="a strip has rows of one shape"):
            clip_strips.write_strip(tmp_path / "s.png", rows, numbers)


def test_the_largest_change_is_white():
    before = np.zeros((1, 2, 2, 3))
    after = before.copy()
    after[0, 0, 0], after[0, 1, 1] = 0.5, -0.25
    gray, largest = clip_strips.change(before, after)
    assert largest == 0.5 and gray[0, ..., 0].tolist() == [[255, 0], [0, 128]]
    assert clip_strips.change(before, before)[0].max() == 0


@pytest.mark.parametrize("count", [1, 5, 16, 100])
def test_columns_are_spread_over_a_clip_of_any_length(count, tmp_path):
    edit = EDIT.copy_and_resolve_references()
    edit.strip, edit.yaw = str(tmp_path / "strip.png"), 10.0
    shown = edit_video._Shown(ConfigDict({"edit": edit}))
    for t in range(count):
        shown.add(t, np.zeros((4, 4, 3)), np.full(1, t), np.ones((4, 4, 3)))
        assert len(shown.kept) < 16
    drawn = []

    def draw(codes):
        drawn.append(int(codes[0]))
        return np.zeros((4, 4, 3))

    found = shown.write(edit, draw)
    assert drawn[0] == 0 and len(drawn) == min(count, 8) and drawn[-1] > 0.7 * count - 1
    gaps = np.diff(drawn)
    assert len(gaps) == 0 or gaps.max() <= 2 * gaps.min()
    assert found["mean change by the edit"] == 1.0 and (tmp_path / "strip.png").is_file()


def test_an_edit_is_told_in_words():
    assert edit_video.asked_for(EDIT) == ""
    asked = EDIT.copy_and_resolve_references()
    asked.direction, asked.alpha, asked.layers = "runs/age.npy", 2.5, (0, 4)
    asked.style, asked.yaw = "clips/b", -10.0
    said = "age.npy x 2.5 of layers 0 to 3, style of b, yaw -10 degrees"
    assert edit_video.asked_for(asked) == said
