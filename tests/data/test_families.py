"""What the bundled families hold: splits, standardization, baselines, preparation."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from train.data import digits, faces, forgeries, pipeline, preparation, textures


def options_of(name, **options):
    return pipeline.resolve({"name": name, "options": options})[1]


def test_digits_are_standardized_stratified_and_complete(prepared_path):
    options = options_of("digits", path=prepared_path, image_size=32)
    train, test = (digits.source(split, options).arrays for split in digits.SPLITS)
    assert abs(train["image"].mean()) < 1e-4 and abs(train["image"].std() - 1) < 1e-4
    assert abs(test["image"].mean()) < 0.05
    counts = np.bincount(load_digits().target)
    np.testing.assert_allclose(np.bincount(test["label"]), counts / 4, atol=1)
    np.testing.assert_array_equal(np.bincount(train["label"]) + np.bincount(test["label"]), counts)


def test_digits_at_eight_pixels_are_the_original_pixels(prepared_path):
    options = options_of("digits", path=prepared_path, image_size=8)
    parts = [digits.source(split, options).arrays["image"] for split in digits.SPLITS]
    original = {image.tobytes() for image in load_digits().images.astype(np.int64)}
    images = np.concatenate(parts)
    # Standardization is affine with blank pixels at the minimum and 16 at the maximum.
    levels = np.rint((images - images.min()) / (images.max() - images.min()) * 16).astype(np.int64)
    assert {level.tobytes() for level in levels} == original


def test_three_channels_are_equal(prepared_path):
    data = {"name": "digits", "options": {"path": prepared_path, "augment": True}}
    image = next(pipeline.train_batches(data, batch_size=8, seed=0))["image"]
    np.testing.assert_array_equal(image[..., 0], image[..., 1])
    np.testing.assert_array_equal(image[..., 0], image[..., 2])


def test_logistic_regression_reaches_the_stated_baselines(prepared_path):
    assert digits.baseline({"options": {"path": prepared_path}}) == pytest.approx(0.969, abs=0.003)
    assert faces.baseline({"options": {"path": prepared_path}}) >= 0.94


def test_noise_is_drawn_for_training_digits_alone_and_leaves_pixels_in_range(prepared_path):
    options = {"path": prepared_path, "image_size": 8, "standardize": False, "noise": 0.2}
    data = {"name": "digits", "options": options}
    image = next(pipeline.train_batches(data, batch_size=64, seed=0))["image"]
    assert image.min() == 0 and image.max() == 1
    assert 0.05 < (image[..., 0] - image[..., 1]).std() < 0.3
    clean = next(pipeline.eval_batches(data, "test", batch_size=64))["image"]
    np.testing.assert_array_equal(clean[..., 0], clean[..., 1])


def test_shuffled_labels_of_forgeries_say_nothing_about_the_tool(prepared_path):
    found = {}
    for shuffled in (False, True):
        given = {"image_size": 16, "augment": False, "shuffled_labels": shuffled}
        options = options_of("forgeries:attribution", path=prepared_path, **given)
        draw = forgeries.train_transform(options)
        rows = [draw({"index": i, "split": "train"}, np.random.default_rng(i)) for i in range(200)]
        found[shuffled] = [np.stack([row[key] for row in rows]) for key in ("image", "label")]
    (images, tools), (same_images, labels) = found[False], found[True]
    np.testing.assert_array_equal(images, same_images)
    assert set(labels) == set(range(5)) and 0.1 < (labels == tools).mean() < 0.3


def test_texture_halves_share_no_pixel_and_cover_all_fifteen_images(prepared_path):
    from PIL import Image
    from skimage import data as skimage_data

    options = options_of("textures", path=prepared_path)
    train, test = (textures.source(split, options).halves for split in textures.SPLITS)
    assert len(train) == len(test) == 15
    folder = pathlib.Path(skimage_data.__file__).parent
    for label, file in enumerate(textures.FILES):
        whole = np.asarray(Image.open(folder / file).convert("RGB"))
        left, right = train[label], test[label]
        assert left.shape[1] + right.shape[1] == whole.shape[1]
        # The same affine map per channel takes the file's two halves to the two stored ones.
        pixels = whole.reshape(-1, 3).astype(np.float64)
        stored = np.concatenate([left, right], axis=1).reshape(-1, 3).astype(np.float64)
        for channel in range(3):
            x, y = pixels[:, channel], stored[:, channel]
            slope = y.std() / x.std()
            np.testing.assert_allclose(y - y.mean(), slope * (x - x.mean()), atol=1e-4)


def test_test_crops_are_fixed_and_training_crops_are_not(prepared_path):
    data = {"name": "textures", "options": {"path": prepared_path, "image_size": 16}}
    first, second = (
        np.concatenate([b["image"] for b in pipeline.eval_batches(data, "test", batch_size=96)])
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
    assert first.shape == (480, 16, 16, 3)
    batch = next(pipeline.train_batches(data, batch_size=480, seed=0))
    assert len({image.tobytes() for image in batch["image"]}) > 400
    assert set(batch["label"]) == set(range(15))


def test_textures_can_be_left_as_pixels(prepared_path):
    options = {"path": prepared_path, "image_size": 16}
    given = {"name": "textures", "options": options}
    plain = {"name": "textures", "options": {**options, "standardize": False}}
    a, b = (next(pipeline.eval_batches(data, "test", batch_size=480)) for data in (given, plain))
    assert b["image"].min() >= 0 and 0.9 < b["image"].max() <= 1 and a["image"].min() < -0.5
    np.testing.assert_array_equal(a["label"], b["label"])
    for channel in range(3):
        x, y = b["image"][..., channel].ravel(), a["image"][..., channel].ravel()
        np.testing.assert_allclose((x - x.mean()) / x.std(), (y - y.mean()) / y.std(), atol=1e-3)


def test_texture_baseline_is_above_chance_and_far_from_perfect(prepared_path):
    data = {"name": "textures", "options": {"path": prepared_path, "image_size": 16}}
    assert 2 / 15 < textures.baseline(data, crops_per_image=16) < 0.6


def test_faces_keep_both_classes_in_proportion(prepared_path):
    options = options_of("faces", path=prepared_path, image_size=32)
    for split, each in (("train", 75), ("test", 25)):
        labels = faces.source(split, options).arrays["label"]
        np.testing.assert_array_equal(np.bincount(labels), [each, each])


READ = """
import sys
from train.data import pipeline
for name in ("digits", "textures"):
    data = {"name": name, "options": {"path": sys.argv[1]}}
    next(pipeline.train_batches(data, batch_size=2, seed=0))
    print(sum(b["mask"].sum() for b in pipeline.eval_batches(data, "test", batch_size=64)))
print("tensorflow_datasets" in sys.modules, "tensorflow" in sys.modules)
"""


def test_two_processes_may_prepare_at_once_and_neither_imports_tensorflow(tmp_path):
    # What a killed preparation leaves behind must be neither taken for data nor kept.
    leftover = tmp_path / "sklearn_digits" / "incomplete.ABC123_1.0.0"
    leftover.mkdir(parents=True)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", READ, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    finished = [(*process.communicate(timeout=240), process.returncode) for process in started]
    for out, err, code in finished:
        assert code == 0, err
        assert out.splitlines() == ["450.0", "480.0", "True False"]
        # Where TensorFlow is not installed, an attempt to import it would be announced by TFDS.
        assert "Failed to import TensorFlow" not in err
    assert [path.name for path in (tmp_path / "sklearn_digits").iterdir()] == ["1.0.0"]


def test_a_second_preparation_writes_nothing(tmp_path):
    first = preparation.prepare(digits.SklearnDigits, str(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in pathlib.Path(first.data_dir).iterdir()}
    second = preparation.prepare(digits.SklearnDigits, str(tmp_path))
    assert {p: p.stat().st_mtime_ns for p in pathlib.Path(second.data_dir).iterdir()} == before
    assert any(path.suffix.startswith(".array_record") for path in before)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(OSError, match=r"cannot prepare sklearn_digits.*data\.options\.path") as e:
        preparation.prepare(digits.SklearnDigits, str(file / "below"))
    assert "\n" not in str(e.value)


def test_the_data_folder_is_the_option_then_the_environment_then_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "env"))
    assert preparation.data_directory("given") == pathlib.Path("given")
    assert preparation.data_directory() == tmp_path / "env"
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert preparation.data_directory() == tmp_path / "cache" / "jaxmodels" / "tfds"
