"""ImageNet from folders in the published format and from prepared array_record."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from train.data import imagenet, pipeline, preparation


def config(path, name="imagenet", **options):
    return {"name": name, "options": {"path": str(path), "image_size": 24, **options}}


def evaluated(data):
    (batch,) = pipeline.eval_batches(data, "validation", batch_size=9)
    return batch


def test_classes_are_the_sorted_wnids_and_images_their_center_crops(imagenet_path):
    batch = evaluated(config(imagenet_path))
    np.testing.assert_array_equal(batch["label"], np.repeat([0, 1, 2], 3))
    file = pathlib.Path(imagenet_path) / "val" / "n01443537" / "n01443537_1.JPEG"
    image = Image.open(file).convert("RGB")  # 56 wide, 40 high
    # floor(24 / 0.875) = 27; int(27 * 56 / 40) = 37; left round(13 / 2) = 6, top round(3 / 2) = 2
    resized = np.asarray(image.resize((37, 27), Image.Resampling.BICUBIC), np.float32)
    crop = resized[2:26, 6:30] / 255
    expected = (crop - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(batch["image"][4], expected, atol=1e-5)


def test_an_epoch_holds_every_image_once_gray_and_cmyk_too(imagenet_path):
    data = config(imagenet_path)
    assert pipeline.split_sizes(data) == {"train": 12, "validation": 9}
    batch = next(pipeline.train_batches(data, batch_size=12, seed=0))
    assert batch["image"].shape == (12, 24, 24, 3) and np.isfinite(batch["image"]).all()
    np.testing.assert_array_equal(np.bincount(batch["label"]), [4, 4, 4])


@pytest.mark.parametrize("rand_augment", ["", "rand-m9-mstd0.5"])
def test_training_is_the_same_on_any_number_of_processes(imagenet_path, rand_augment):
    data = config(imagenet_path, rand_augment=rand_augment)
    whole = next(pipeline.train_batches(data, batch_size=8, seed=1, start_step=2))
    halves = [
        next(
            pipeline.train_batches(
                data, batch_size=8, seed=1, start_step=2, process_index=p, process_count=2
            )
        )
        for p in range(2)
    ]
    together = np.concatenate([half["image"] for half in halves])
    np.testing.assert_array_equal(together, whole["image"])


def test_rand_augment_takes_the_place_of_color_jitter_as_in_timm(imagenet_path):
    example = imagenet.FolderSource.scan(imagenet_path, "train")[0]

    def trained(**options):
        full = pipeline.resolve(config(imagenet_path, erasing=0.0, **options))[1]
        return imagenet.train_transform(full)(example, np.random.default_rng(3))["image"]

    with_jitter = trained(rand_augment="rand-m9-mstd0.5", color_jitter=0.4)
    np.testing.assert_array_equal(
        with_jitter, trained(rand_augment="rand-m9-mstd0.5", color_jitter=0.0)
    )
    assert not np.array_equal(trained(color_jitter=0.4), trained(color_jitter=0.0))
    both = trained(rand_augment="rand-m9-mstd0.5", color_jitter=0.4, jitter_too=True)
    assert not np.array_equal(both, with_jitter)


def test_training_crops_are_resized_as_asked(imagenet_path):
    def kinds(**options):
        full = pipeline.resolve(config(imagenet_path, **options))[1]
        return [kind.name for kind in imagenet.train_transform(full).crop_interpolations]

    assert kinds() == ["BILINEAR", "BICUBIC"]
    assert kinds(crop_interpolation="bicubic") == ["BICUBIC"]
    with pytest.raises(ValueError, match=r"crop_interpolation must be one of random, bilinear"):
        kinds(crop_interpolation="lanczos")


def test_array_record_gives_the_images_of_the_folders(imagenet_path, tmp_path):
    builder = preparation.prepare(
        imagenet.Imagenet2012Folders, str(tmp_path), folders=imagenet_path
    )
    info = json.loads((pathlib.Path(builder.data_dir) / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    by_tfds = config(tmp_path, "imagenet:imagenet2012")
    assert pipeline.split_sizes(by_tfds) == {"train": 12, "validation": 9}
    stored, direct = evaluated(by_tfds), evaluated(config(imagenet_path, "imagenet:folders"))
    # TFDS writes records in the order of hashed keys.
    pairs = [
        {(image.tobytes(), int(label)) for image, label in zip(batch["image"], batch["label"])}
        for batch in (stored, direct)
    ]
    assert pairs[0] == pairs[1]


def test_tfds_own_layout_and_features_are_read(imagenet_path, tmp_path):
    # `tfds build imagenet2012` writes PATH/imagenet2012/VERSION with these features.
    builder = preparation.prepare(
        imagenet.Imagenet2012Folders, str(tmp_path), folders=imagenet_path
    )
    target = tmp_path / "data" / "imagenet2012" / "5.1.0"
    shutil.copytree(builder.data_dir, target)
    info = json.loads((target / "dataset_info.json").read_text())
    for file in target.glob("imagenet2012_folders-*"):
        file.rename(target / file.name.replace("imagenet2012_folders", "imagenet2012"))
    info.update(name="imagenet2012", version="5.1.0")
    (target / "dataset_info.json").write_text(json.dumps(info))
    data = config(tmp_path / "data")
    assert pipeline.split_sizes(data) == {"train": 12, "validation": 9}
    assert np.isfinite(next(pipeline.train_batches(data, batch_size=4, seed=0))["image"]).all()

    info["fileFormat"] = "tfrecord"
    (target / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="stored as tfrecord; prepare it as array_record"):
        pipeline.train_batches(data, batch_size=4, seed=0)


@pytest.mark.parametrize(
    ("damage", "workers"), [("truncated", 0), ("not an image", 0), ("truncated", 1)]
)
def test_a_corrupt_image_is_named(imagenet_path, tmp_path, damage, workers):
    root = tmp_path / "imagenet"
    shutil.copytree(imagenet_path, root)
    file = root / "train" / "n02084071" / "n02084071_2.JPEG"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"<html>404</html>")
    batches = pipeline.train_batches(config(root, workers=workers), batch_size=12, seed=0)
    with pytest.raises(ValueError, match=f"cannot decode image {file}: ") as caught:
        next(batches)
    batches.close()
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


def test_missing_data_names_the_config_key(tmp_path, imagenet_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "absent"))

    def message(data):
        with pytest.raises(FileNotFoundError, match=r"data\.options\.path") as caught:
            pipeline.train_batches(data, batch_size=4, seed=0)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "set it to the folder" in message({"name": "imagenet"})
    assert "train/<wnid>/*.JPEG" in message({"name": "imagenet:folders"})
    assert str(tmp_path / "no") in message(config(tmp_path / "no"))
    assert "no prepared imagenet2012" in message(config(tmp_path))
    (tmp_path / "train" / "n01440764").mkdir(parents=True)
    assert "no images in" in message(config(tmp_path))

    shutil.copytree(imagenet_path, tmp_path / "flat")
    (tmp_path / "flat" / "val" / "n99999999").mkdir()
    with pytest.raises(FileNotFoundError, match="n99999999 has no counterpart"):
        pipeline.eval_batches(config(tmp_path / "flat"), "validation", batch_size=4)


def test_without_data_the_published_sizes_are_given():
    sizes = pipeline.split_sizes({"name": "imagenet", "options": {"path": "/nonexistent"}})
    assert sizes == {"train": 1281167, "validation": 50000}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("rand-m9-mstd0.5", (9.0, 0.5, False)),
        ("rand-m9-mstd0.5-inc1", (9.0, 0.5, True)),
        ("rand-m7", (7.0, 0.0, False)),
        ("rand", (10.0, 0.0, False)),
    ],
)
def test_timms_rand_augment_names_are_read(text, expected):
    assert imagenet.parse_rand_augment(text) == expected


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc2", "augmix", "rand-mx"])
def test_other_policies_are_refused(text):
    with pytest.raises(ValueError, match=r"must look like rand-m9-mstd0\.5"):
        imagenet.parse_rand_augment(text)


def test_wrong_options_are_named(imagenet_path):
    with pytest.raises(ValueError, match=r"data\.options\.reader must be auto, folders or tfds"):
        pipeline.train_batches(config(imagenet_path, reader="torch"), batch_size=4, seed=0)
    with pytest.raises(ValueError, match=r"data\.options\.interpolation must be one of"):
        evaluated(config(imagenet_path, interpolation="lanczos"))


@pytest.fixture
def index(imagenet_path, tmp_path):
    """`rows of the minival -> config.data` of the same folders through JSON indices."""
    root = pathlib.Path(imagenet_path)
    files = {split: sorted(p.relative_to(root / split) for p in (root / split).rglob("*.JPEG"))
             for split in ("train", "val")}  # fmt: skip
    wnids = sorted(p.name for p in (root / "train").iterdir())

    def rows(names):
        return [
            {"img_info": {"filename": str(n)},
             "annos": {"imagenet": {"classification": str(wnids.index(n.parent.name))}}}
            for n in names
        ]  # fmt: skip

    def make(minival=None):
        found = {
            "train": rows(files["train"][1::2]), "minival": rows(files["train"][::2]),
            "val": rows(files["val"]),
        }  # fmt: skip
        found["minival"] = found["minival"] if minival is None else minival
        for name, own in found.items():
            (tmp_path / f"{name}.json").write_text(json.dumps({"imgs": own, "other": []}))
        folders = {"prefix": str(root / "train"), "test_prefix": str(root / "val")}
        return config(tmp_path, "imagenet_index", **folders)

    return make


def test_json_indices_name_images_and_classes(index, imagenet_path):
    data = index()
    assert pipeline.split_sizes(data) == {"train": 6, "minival": 6, "test": 9}
    assert pipeline.num_classes(data) == pipeline.num_classes(config(imagenet_path)) == 3
    (batch,) = pipeline.eval_batches(data, "test", batch_size=9)
    wanted = evaluated(config(imagenet_path))
    np.testing.assert_array_equal(batch["image"], wanted["image"])
    np.testing.assert_array_equal(batch["label"], wanted["label"])
    assert next(pipeline.train_batches(data, batch_size=4, seed=0))["image"].shape == (4, 24, 24, 3)


def test_classes_are_unknown_without_data(tmp_path):
    for reader in ("auto", "folders", "tfds"):
        assert pipeline.num_classes(config(tmp_path, reader=reader)) is None
        assert pipeline.num_classes(config(tmp_path / "none", reader=reader)) is None
    assert pipeline.num_classes(config(tmp_path, "imagenet_index")) is None


def test_a_broken_index_is_named(index, tmp_path):
    row = {"img_info": {"filename": "a.JPEG"}, "annos": {"other": {"classification": 1}}}
    with pytest.raises(ValueError, match=r"minival.json: entry 0 has no img_info.filename and ann"):
        next(pipeline.eval_batches(index([row]), "minival", batch_size=1))
    data = index()
    data["options"]["test"] = "none.json"
    with pytest.raises(FileNotFoundError, match=r"no index .*none.json \(data.options.test"):
        next(pipeline.eval_batches(data, "test", batch_size=1))
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(ValueError, match="no JSON index"):
        next(pipeline.train_batches(data, batch_size=1, seed=0))
