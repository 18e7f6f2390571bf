"""Challenge folders: every format, every mistake on one line, preparation that resumes."""

import importlib.util
import json
import socket
import zipfile

import numpy as np
import pytest
from PIL import Image

from jaxmodels.biomedical import patches
from train.data import (
    brain_slices,
    brain_template,
    coins,
    medical_files,
    medical_patches,
    medical_preparation,
    pipeline,
)
from train.data.medical_files import DataError, RawDataset, read_volume, write_labels
from train.naming import ConfigError

LABELS = {"background": 0, "organ": 1, "tumor": 2}


def write(root, count=4, shape=(12, 14, 10), spacing=(2.0, 1.0, 1.0), split="Tr", channels=1):
    rng = np.random.default_rng(0)
    cases = []
    for i in range(count):
        label = np.zeros(shape, np.uint8)
        label[3:9, 3:9, 2:8] = 1
        label[5:7, 5 : 7 + i % 2, 4:6] = 2
        image = rng.normal(size=(*shape, channels)) + 2 * label[..., None] + 3
        cases.append((f"case{i:02d}", image, label, spacing))
    names = [f"c{i}" for i in range(channels)]
    medical_files.write_dataset(root, cases, channels=names, labels=LABELS, split=split)
    return root


def change(root, **content):
    file = root / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **content}))


def replace(root, case, image=None, label=None, side=None):
    for kind, array in (("images", image), ("labels", label)):
        stem = f"{case}_0000" if kind == "images" else case
        if array is not None:
            np.save(root / f"{kind}Tr" / f"{stem}.npy", array)
    if side is not None:
        (root / "imagesTr" / f"{case}_0000.json").write_text(json.dumps({"spacing": side}))


def mistake_channels(root):
    (root / "imagesTr" / "case01_0001.npy").write_bytes(
        (root / "imagesTr" / "case01_0000.npy").read_bytes()
    )


def image_with(value):
    image = np.ones((12, 14, 10), np.float32)
    image[0, 0, 0] = value
    return image


MISTAKES = {
    r"case case01: 2 channel files, dataset\.json has 1": mistake_channels,
    r"case case01: image shape \(3, 14, 10\) spacing .*label shape \(12, 14, 10\)": lambda r: (
        replace(r, "case01", image=np.ones((3, 14, 10), np.float32))
    ),
    r"case case01: image shape .*spacing \(3\.0, 1\.0, 1\.0\)": lambda r: replace(
        r, "case01", side=[3, 1, 1]
    ),
    r"spacing \(0\.0, 1\.0, 1\.0\) must be positive": lambda r: replace(
        r, "case01", side=[0, 1, 1]
    ),
    r"spacing \(nan, 1\.0, 1\.0\) must be positive": lambda r: replace(
        r, "case01", side=[float("nan"), 1, 1]
    ),
    r"case case01: the image has NaN": lambda r: replace(r, "case01", image=image_with(np.nan)),
    r"case case01: the image has .*infinite": lambda r: replace(
        r, "case01", image=image_with(np.inf)
    ),
    r"case case01: label values \[7\] are not in dataset\.json": lambda r: replace(
        r, "case01", label=np.full((12, 14, 10), 7, np.uint8)
    ),
    r"label values must be integers, got \[0\.5\]": lambda r: replace(
        r, "case01", label=np.full((12, 14, 10), 0.5, np.float32)
    ),
    r"labels must be background 0 and then 1, 2, \.\.\. without gaps": lambda r: change(
        r, labels={"background": 0, "organ": 1, "tumor": 3}
    ),
    r"ignore label must be the highest": lambda r: change(
        r, labels={"background": 0, "ignore": 1, "tumor": 2}
    ),
    r"file_ending '\.dcm'; known": lambda r: change(r, file_ending=".dcm"),
    r"case case01: no label file": lambda r: (r / "labelsTr" / "case01.npy").unlink(),
    r"no dataset\.json": lambda r: (r / "dataset.json").unlink(),
    r"cannot be read": lambda r: (r / "imagesTr" / "case01_0000.npy").write_bytes(b"\x93NUMPY"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_in_the_files_is_named_with_its_case(message, tmp_path):
    root = write(tmp_path / "raw")
    MISTAKES[message](root)
    with pytest.raises(DataError, match=message):
        medical_preparation.fingerprint(RawDataset.open(root), tmp_path / "out")


def test_a_set_without_foreground_is_refused_and_one_empty_case_is_not(tmp_path):
    root = write(tmp_path / "raw")
    nothing = np.zeros((12, 14, 10), np.uint8)
    replace(root, "case00", label=nothing)
    medical_preparation.prepare(root, tmp_path / "out", "2d", 2)
    with np.load(tmp_path / "out" / "fullres" / "case00.npz") as places:
        assert places.files == []
    for i in range(4):
        replace(root, f"case{i:02d}", label=nothing)
    with pytest.raises(ValueError, match="no foreground in any of 4 training cases"):
        medical_preparation.fingerprint(RawDataset.open(root), tmp_path / "other")


def test_ids_that_differ_only_in_case_occur_twice(tmp_path):
    root = write(tmp_path / "raw")
    for suffix in (".npy", ".json"):
        source = root / "imagesTr" / f"case01_0000{suffix}"
        (root / "imagesTr" / f"CASE01_0000{suffix}").write_bytes(source.read_bytes())
    with pytest.raises(DataError, match="occur twice"):
        RawDataset.open(root).cases()


@pytest.mark.parametrize("ending", [".npy", ".npz", ".tif", ".nii", ".nii.gz"])
def test_volumes_of_every_format_are_read_as_z_y_x(ending, tmp_path):
    labels = np.arange(3 * 4 * 5).reshape(3, 4, 5) % 7
    path = tmp_path / f"case{ending}"
    like = None
    if ".nii" in ending:
        nibabel = pytest.importorskip("nibabel")
        like = tmp_path / "like.nii"
        affine = np.diag([0.5, 1.5, 3.0, 1.0])
        nibabel.save(nibabel.Nifti1Image(np.zeros((5, 4, 3), np.uint8), affine), like)
    write_labels(path, labels, like)
    found, spacing = read_volume(path)
    np.testing.assert_array_equal(found, labels)
    assert spacing == ((3.0, 1.5, 0.5) if like else (1.0, 1.0, 1.0))
    assert [p.name for p in tmp_path.glob("*part*")] == []


def test_flat_pictures_have_one_slice_and_colors_are_channels(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (6, 7, 3), dtype=np.uint8)).save(tmp_path / "a_0000.png")
    array, spacing = read_volume(tmp_path / "a_0000.png")
    assert array.shape == (1, 6, 7, 3) and spacing == (999.0, 1.0, 1.0)
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a_0000.png").rename(tmp_path / "imagesTr" / "a_0000.png")
    write_labels(tmp_path / "labelsTr" / "a.png", np.ones((1, 6, 7), int))
    names = {"0": "R", "1": "G", "2": "B"}
    content = {"channel_names": names, "labels": {"background": 0, "x": 1}, "file_ending": ".png"}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    image, label, _ = RawDataset.open(tmp_path).training_case("a")
    assert image.shape == (1, 6, 7, 3) and label.shape == (1, 6, 7)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = write(tmp_path_factory.mktemp("challenge") / "raw", count=6, channels=2)
    folder = root.parent / "prepared"
    medical_preparation.prepare(root, folder, "3d_fullres", 3)
    return root, folder


def options_of(folder, **more):
    return {
        "name": "medical_patches",
        "options": {
            "path": str(folder),
            "patch_size": (8, 8, 8),
            "channels": 2,
            "batch_size": 3,
            "folds": 3,
            "augmentation": "none",
            "validation_batches": 2,
            **more,
        },
    }


def test_preparation_goes_on_where_it_stopped(prepared):
    root, folder = prepared
    marks = {p: p.stat().st_mtime_ns for p in folder.rglob("*.npy")}
    lost = folder / "fullres" / "case02.json"
    lost.unlink()
    medical_preparation.prepare(root, folder, "3d_fullres", 3)
    again = {p for p in folder.rglob("*.npy") if p.stat().st_mtime_ns != marks[p]}
    assert {p.name for p in again} == {"case02.image.npy", "case02.label.npy"}
    plans = json.loads((folder / "plans.json").read_text())
    assert plans["transpose"] == [0, 1, 2]
    assert set(plans["configurations"]) >= {"2d", "2.5d", "3d_fullres"}


def test_batches_hold_foreground_in_their_last_third_and_depend_on_the_step_alone(prepared):
    data = options_of(prepared[1], patch_size=(4, 4, 4))
    batches = pipeline.train_batches(data, batch_size=3, seed=1)
    first = [next(batches) for _ in range(4)]
    batches.close()
    later = pipeline.train_batches(data, batch_size=3, seed=1, start_step=3)
    np.testing.assert_array_equal(next(later)["image"], first[3]["image"])
    later.close()
    assert all((b["label"][2] > 0).any() for b in first)
    assert first[0]["image"].shape == (3, 4, 4, 4, 2)
    held_out = list(pipeline.eval_batches(data, "validation", batch_size=3))
    assert len(held_out) == 2 and not np.array_equal(first[0]["image"], first[1]["image"])


def test_slices_with_neighbors_and_a_prior_become_channels(prepared, tmp_path):
    _, folder = prepared
    for case in medical_patches.cases("train", pipeline.resolve(options_of(folder, fold=-1))[1]):
        label = np.load(folder / "fullres" / f"{case}.label.npy")
        np.save(tmp_path / f"{case}.npy", label.astype(np.int8))
    data = options_of(folder, patch_size=(8, 8), context=2, prior=str(tmp_path), prior_labels=2)
    batches = pipeline.train_batches(data, batch_size=3, seed=0)
    batch = next(batches)
    batches.close()
    assert batch["image"].shape == (3, 8, 8, 5 * 2 + 2)
    np.testing.assert_array_equal(batch["image"][..., 10] > 0, batch["label"] == 1)
    np.testing.assert_array_equal(batch["image"][..., 11] > 0, batch["label"] == 2)


def test_masked_images_say_where_they_are_none_and_sparse_labels_where_to_look(tmp_path):
    root = write(tmp_path / "raw", count=3)
    change(root, labels={**LABELS, "ignore": 3})
    for case in ("case00", "case01", "case02"):
        image = np.load(root / "imagesTr" / f"{case}_0000.npy")
        label = np.load(root / "labelsTr" / f"{case}.npy")
        image[-3:] = 0
        image[-1, -1, -1] = 1  # the box reaches there
        label[:, 10:] = 3
        replace(root, case, image, label)
    folder = tmp_path / "prepared"
    medical_preparation.prepare(root, folder, "3d_fullres", 3)
    plans = json.loads((folder / "plans.json").read_text())
    plans["use_mask"] = True
    (folder / "plans.json").write_text(json.dumps(plans))
    for old in (folder / "fullres").iterdir():
        old.unlink()
    medical_preparation.preprocess_all(RawDataset.open(root), folder, "3d_fullres")
    _, options = pipeline.resolve(options_of(folder, channels=1))
    assert medical_patches.masked_channels(options) == (0,)
    assert medical_patches.masked_channels({**options, "path": ""}) == ()
    told = medical_patches.task_arguments({**options, "context": 1})
    assert told["ignore_label"] == 3 and told["regions"] == () and told["masked"] == (1,)
    assert told["context"] == 1 and told["view"] == told["prior_labels"] == 0
    for case in ("case00", "case01", "case02"):
        image = np.load(folder / "fullres" / f"{case}.image.npy")[..., 0]
        label = np.load(folder / "fullres" / f"{case}.label.npy")
        assert (label == -1).any() and not image[label == -1].any()
        with np.load(folder / "fullres" / f"{case}.npz") as stored:
            seen = stored[str(patches.ANNOTATED)]
        assert len(seen) and (label[tuple(seen.T)] != 3).all()
    reader = medical_patches.train_transform({**options, "patch_size": (2, 2, 2)})
    assert reader.sparse
    for index in range(20):
        assert (reader(index, np.random.default_rng(index))["label"] != 3).any()


def test_folds_hold_out_every_case_once_and_options_are_checked(prepared):
    _, folder = prepared
    seen = []
    for fold in range(3):
        _, options = pipeline.resolve(options_of(folder, fold=fold))
        held = medical_patches.cases("validation", options)
        assert not set(held) & set(medical_patches.cases("train", options))
        seen += held
    assert sorted(seen) == [f"case{i:02d}" for i in range(6)]
    for wrong, message in (
        ({"fold": 7}, "data.options.fold: 7"),
        ({"patch_size": (3,)}, "data.options.patch_size"),
        ({"path": ""}, "data.options.path: name a folder"),
        ({"path": "/nowhere"}, "neither raw"),
        ({"configuration": "3d_lowres"}, "no plan for configuration '3d_lowres'"),
    ):
        data = options_of(folder, **wrong)
        with pytest.raises((ConfigError, ValueError), match=message):
            _, options = pipeline.resolve(data)
            medical_patches.element_spec(options)
            medical_patches.train_transform(options)


def test_planning_needs_neither_accelerator_nor_network(prepared, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("planning reached for a device or the network")

    monkeypatch.setattr("jax._src.xla_bridge.backends", refuse)
    monkeypatch.setattr(socket, "socket", refuse)
    raw = RawDataset.open(prepared[0])
    medical_preparation.fingerprint(raw, tmp_path)
    found = medical_preparation.plan(tmp_path)["configurations"]
    assert {"2d", "3d_fullres"} <= set(found)


def test_pooled_statistics_keep_what_distinguishes_cases_of_one_scale(prepared, tmp_path):
    raw = RawDataset.open(prepared[0])
    medical_preparation.fingerprint(raw, tmp_path)
    image, _, spacing = raw.training_case("case00")
    found = {}
    for schemes in ((), ("CT", "CT")):
        plans = medical_preparation.plan(tmp_path, schemes=schemes)
        found[schemes] = [
            medical_preparation.prepared_case(plans, "3d_fullres", image + shift, spacing)[0].mean()
            for shift in (0, 0.5)
        ]
    np.testing.assert_allclose(found[()], 0, atol=1e-5)
    low, high = found["CT", "CT"]
    assert high - low > 0.1


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel with the template's file names: a bright core in a dimmer shell, in air."""
    nibabel = pytest.importorskip("nibabel")
    folder = tmp_path_factory.mktemp("wheel")
    grid = np.stack(np.meshgrid(*(np.arange(n) - n / 2 for n in (40, 44, 36)), indexing="ij"), -1)
    radius = np.sqrt((grid**2).sum(-1))
    core, shell = radius < 8, (radius >= 8) & (radius < 14)
    volumes = {"t1": 200.0 * core + 120.0 * shell, "gm": 255.0 * shell, "wm": 255.0 * core}
    path = folder / "nilearn-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for key, volume in volumes.items():
            name = brain_template.FILES[key]
            image = nibabel.Nifti1Image(volume.astype(np.float32), np.eye(4))
            nibabel.save(image, folder / name)
            archive.write(folder / name, f"nilearn/datasets/data/{name}")
    return path


def test_brain_slices_are_of_one_standardized_scan_cut_in_halves(wheel, tmp_path):
    options = {"wheel": str(wheel), "patch_size": 16}
    data = {"name": "brain_slices", "options": options}
    batches = pipeline.train_batches(data, batch_size=8, seed=0)
    batch = next(batches)
    batches.close()
    assert batch["image"].shape == (8, 16, 16, 1) and set(np.unique(batch["label"])) == {0, 1, 2}
    halves = brain_slices.halves(str(wheel), 2)
    assert abs(np.concatenate([h.image for h in halves.values()]).mean()) < 1
    tiles = list(pipeline.eval_batches(data, "test", batch_size=4))
    found = {k: np.concatenate([t[k] for t in tiles]) for k in tiles[0]}
    ((_, image, label, _),) = brain_slices.held_out(pipeline.resolve(data)[1])
    assert image.shape == (*label.shape, 1) and label.shape == halves["test"].label.shape
    assert (found["label"] > 0).sum() >= (label > 0).sum() > 0
    # The same tissue has one value in all slices, as no slice is standardized by itself.
    values = found["image"][..., 0][found["label"] == 2]
    assert np.ptp(values[values > np.median(values) - 0.1]) < 0.2
    assert brain_slices.baselines(data)["multi_otsu_dice"] > 0.8
    brain_template.write_challenge(tmp_path, wheel, thickness=4)
    assert len(RawDataset.open(tmp_path).cases("Tr")) >= 2


def test_a_missing_template_names_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install nilearn"):
        brain_slices.source("train", {**brain_slices.OPTIONS})


def test_coins_are_split_by_halves_and_light_makes_thresholds_fail():
    data = {"name": "coins", "options": {"repeats": 2}}
    found = coins.baselines(data)
    assert found["otsu_dice"] < 0.8 and found["local_threshold_dice"] < 0.95
    left, right = coins.half("train")[0], coins.half("test")[0]
    assert left.shape == right.shape == (303, 192) and not np.array_equal(left, right)
    with pytest.raises(ConfigError, match=r"data\.options\.patch_size"):
        coins.element_spec({"patch_size": 4})
