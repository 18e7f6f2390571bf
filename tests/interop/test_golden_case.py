"""The golden harness itself: what it must notice, and what the cases allow."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import golden_case


@pytest.fixture
def make(tmp_path):
    def build(outputs, name="case", **meta):
        folder = tmp_path / "deep" / "er" / name
        folder.mkdir(parents=True)
        document = {"system": "toy", "model": "toy", "rtol": 1e-4, "atol": 1e-5, **meta}
        (folder / "meta.json").write_text(json.dumps(document))
        arrays = {f"out.{k}": v for k, v in outputs.items()}
        np.savez(folder / "io.npz", **{"in.x": np.arange(3)}, **arrays)
        return golden_case.find_cases(tmp_path)[0]

    return build


FLOATS = np.linspace(1, 2, 1000).astype(np.float32)


def test_equal_outputs_pass_and_each_departure_is_named(make):
    case = make({"a": FLOATS, "b.c": np.array(["x", ""]), "n": np.array([np.nan, np.inf])})
    same = {**case.outputs, "more": 3}
    assert golden_case.differences(case, same) == []
    lines = golden_case.differences(case, {**same, "a": FLOATS * 1.01, "b.c": np.array(["x", "y"])})
    assert [line.split(":")[0] for line in lines] == ["out.a", "out.b.c"]
    assert golden_case.differences(case, {"a": FLOATS, "b.c": same["b.c"]}) == [
        "out.n: the adapter did not return it"
    ]
    assert golden_case.differences(case, {**same, "n": np.array([np.nan, -np.inf])})
    assert golden_case.differences(case, {**same, "n": np.array([1.0, np.inf])})
    assert golden_case.differences(case, {**same, "a": FLOATS[:, None]})


def test_the_cases_own_tolerance_is_the_bound(make):
    case = make({"a": FLOATS})
    bound = 1e-5 + 1e-4 * FLOATS.astype(np.float64)
    assert golden_case.differences(case, {"a": FLOATS + 0.99 * bound}) == []
    assert golden_case.differences(case, {"a": FLOATS + 1.02 * bound})


def test_integers_and_booleans_are_exact_and_keep_their_kind(make):
    big = 2**60 + np.arange(3)
    case = make({"n": big, "flag": np.array([True, False])}, rtol=1e-2)
    assert golden_case.differences(case, {"n": big, "flag": case.outputs["flag"]}) == []
    assert golden_case.differences(case, {"n": big + 1, "flag": case.outputs["flag"]})
    assert golden_case.differences(case, {"n": big.astype(float), "flag": case.outputs["flag"]})
    assert golden_case.differences(case, {"n": big, "flag": np.array([1, 0])})


def test_tolerances_of_one_array_override_the_cases(make):
    case = make({"a": FLOATS, "b": FLOATS}, tolerances={"out.a": {"atol": 0.02, "rtol": 0}})
    assert golden_case.differences(case, {"a": FLOATS + 0.019, "b": FLOATS}) == []
    assert len(golden_case.differences(case, {"a": FLOATS + 0.021, "b": FLOATS})) == 1
    assert len(golden_case.differences(case, {"a": FLOATS, "b": FLOATS + 0.019})) == 1


def test_a_share_of_entries_may_miss_where_the_case_says_so(make):
    case = make({"a": FLOATS, "b": FLOATS}, mismatch_fraction={"out.a": 0.002})
    wrong = FLOATS.copy()
    wrong[:2] += 5
    assert golden_case.differences(case, {"a": wrong, "b": FLOATS}) == []
    assert len(golden_case.differences(case, {"a": FLOATS, "b": wrong})) == 1
    wrong[2] += 5
    assert len(golden_case.differences(case, {"a": wrong, "b": FLOATS})) == 1


def test_label_images_are_compared_as_partitions_with_the_background_fixed(make):
    labels = np.repeat(np.arange(4), 250)
    case = make(
        {"labels": labels, "counts": np.array([0, 9, 8, 7])},
        mismatch_fraction={"out.labels": 0.002},
    )
    counts = case.outputs["counts"]
    renamed = np.array([0, 3, 1, 2])[labels]
    assert golden_case.differences(case, {"labels": renamed, "counts": counts}) == []
    assert golden_case.differences(case, {"labels": renamed, "counts": counts + 1})
    background = np.array([1, 0, 2, 3])[labels]
    assert golden_case.differences(case, {"labels": background, "counts": counts})
    merged = np.array([0, 1, 1, 3])[labels]
    assert golden_case.differences(case, {"labels": merged, "counts": counts})
    nearly = labels.copy()
    nearly[0] = 3
    assert golden_case.differences(case, {"labels": nearly, "counts": counts + 1}) == []
    nearly[0] = 4  # a further label, so that there are more counts
    assert golden_case.differences(case, {"labels": nearly, "counts": np.arange(5)}) == []


def test_attacked_images_are_compared_by_the_share_of_pixels(make):
    image, start = np.zeros((2, 500), np.float32), np.zeros((2, 500), np.float32)
    case = make(
        {"fgsm": image, "fgsm_pred": np.array([1, 2]), "targeted": image, "x_start": start},
        float64_match={"fgsm": 1.0}, min_match_fraction=0.99, atol=1e-4,
    )  # fmt: skip
    good = dict(case.outputs)
    few = image.copy()
    few[1, :9] = 1
    assert golden_case.differences(case, {**good, "fgsm": few, "targeted": few}) == []
    assert golden_case.differences(case, {**good, "x_start": few})
    many = image.copy()
    many[1, :11] = 1
    assert golden_case.differences(case, {**good, "fgsm": many})
    # A class counts where its image matches: the second image does not.
    assert golden_case.differences(case, {**good, "fgsm": few, "fgsm_pred": np.array([1, 7])}) == []
    assert golden_case.differences(case, {**good, "fgsm": few, "fgsm_pred": np.array([7, 2])})


NOTE = (
    "singular values: atol 1e-9*sigma_1; loss: rtol 1e-6 where loss>1e-12; hvp, grad0, Hessian "
    "eigenvalues at step 0: rtol 1e-9; Hessian eigenvalues later: atol 1e-7"
)


def test_the_tolerance_note_bounds_each_kind_of_output(make):
    outputs = {
        "singular_values": np.ones((3, 2)),
        "loss": np.array([1.0, 1e-6, 1e-15]),
        "hvp.1": np.full(4, 1e-10),
        "hess_steps": np.array([0, 10]),
        "hess_eigvals": np.array([[0.0, 1e-3], [0.0, 1.0]]),
        "other": np.ones(2),
    }
    case = make(outputs, tolerance_note=NOTE, rtol=1e-3, atol=1e-9, config={"sigma": [2.0, 1.0]})

    def check(name, change):
        return golden_case.differences(case, {**outputs, name: outputs[name] + change})

    assert check("singular_values", 1.9e-9) == [] and check("singular_values", 2.1e-9)
    assert check("loss", [0, 0.9e-12, 1e-9]) == [] and check("loss", [0, 1.1e-12, 0])
    assert check("hvp.1", 0.9e-19) == [] and check("hvp.1", 1.1e-19)
    assert check("hess_eigvals", [[0.9e-12, 0], [0.9e-7, 0]]) == []
    assert check("hess_eigvals", [[1.1e-12, 0], [0, 0]])
    assert check("hess_eigvals", [[0, 0], [1.1e-7, 0]])
    assert check("other", 0.9e-3) == []


def test_detected_structure_is_compared_exactly_but_for_measured_fractions(make):
    detected = {"escapes": [{"kind": "rank", "step": 5, "drop": 0.5}], "ok": [True, None]}
    case = make({"a": FLOATS}, detected=detected)
    base = {"a": FLOATS}
    assert golden_case.differences(case, base) == [
        "meta.detected: the adapter did not return `detected`"
    ]
    assert golden_case.differences(case, {**base, "detected": detected}) == []
    near = {
        "escapes": [{"kind": "rank", "step": np.int64(5), "drop": 0.5 + 4e-7}],
        "ok": (True, None),
    }
    assert golden_case.differences(case, {**base, "detected": near}) == []
    for wrong in (
        {**near, "ok": [True, 0]},
        {**near, "escapes": []},
        {**near, "escapes": [{"kind": "swap", "step": 5, "drop": 0.5}]},
        {**near, "escapes": [{"kind": "rank", "step": 6, "drop": 0.5}]},
        {**near, "escapes": [{"kind": "rank", "step": 5, "drop": 0.500001}]},
        {"ok": [True, None]},
    ):
        assert golden_case.differences(case, {**base, "detected": wrong}), wrong


def test_adapters_may_state_tolerances_that_only_the_notes_give(make):
    image = np.full((4, 4), 100, np.uint8)
    case = make({"jpeg": image, "ids": np.arange(4), "free": np.array([0, 1, 0, 0], bool)})
    extra = {"out.jpeg": {"mean_atol": 1.5}, "out.ids": {"except_where": "free"}}
    good = dict(case.outputs)
    assert golden_case.differences(case, {**good, "jpeg": image + 1}, extra) == []
    assert golden_case.differences(case, {**good, "jpeg": image + 2}, extra)
    assert golden_case.differences(case, {**good, "ids": np.array([0, 9, 2, 3])}, extra) == []
    assert golden_case.differences(case, {**good, "ids": np.array([9, 1, 2, 3])}, extra)


def test_cases_are_found_at_any_depth_and_told_apart(make, tmp_path):
    make({"a": FLOATS})
    make({"a": FLOATS}, name="../../case")
    assert [c.id for c in golden_case.find_cases(tmp_path)] == ["toy/case", "toy/case#2"]


def pytest_run(*arguments):
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", "-rs", "-p", "no:cacheprovider",
         "tests/test_golden.py", *arguments],
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip


def test_the_option_names_a_missing_folder_and_skips_systems_without_adapter(make, tmp_path):
    make({"a": FLOATS}, system="no_such_system")
    run = pytest_run("--golden", str(tmp_path))
    assert run.returncode == 0 and "system not built yet" in run.stdout, run.stdout
    run = pytest_run("--golden", str(tmp_path / "nowhere"))
    assert run.returncode != 0 and "no such folder" in run.stdout + run.stderr
