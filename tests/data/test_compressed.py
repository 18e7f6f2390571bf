"""Degradations by real codecs, pairs of folders, rendered clips, and every mistake by name."""

import sys

import numpy as np
import pytest
from PIL import Image

from jaxmodels.restoration import metrics
from train.data import (
    compressed_images,
    compressed_videos,
    degradation,
    image_pairs,
    pipeline,
    preparation,
)


@pytest.fixture(scope="module")
def picture():
    return compressed_images.photograph("astronaut.png")[:384, :384]


def test_quality_ten_has_the_standard_tables_at_five_times_and_is_repeatable(picture):
    small = degradation.downsample(picture)
    luma, chroma = degradation.quantization_tables(degradation.jpeg_bytes(small))
    assert (luma[0], chroma[0]) == (80, 85) and luma.max() <= 255
    first, again = degradation.degrade_image(picture), degradation.degrade_image(picture)
    np.testing.assert_array_equal(first, again)
    assert first.shape == (96, 96, 3)
    # The specification's 20.82 dB for bicubic enlargement of this very crop.
    assert abs(metrics.psnr(degradation.upsample(first), picture) - 20.82) < 0.02


def test_the_crop_degraded_with_its_margin_is_the_crop_of_the_degraded_picture(picture):
    rng = np.random.default_rng(0)
    picture = picture[:296, :340]  # 74 x 85: neither side whole JPEG blocks
    whole = degradation.degrade_image(picture)
    for _ in range(12):
        top, left = int(rng.integers(74 - 16 + 1)), int(rng.integers(85 - 16 + 1))
        crop = image_pairs.degraded_crop(picture, top, left, 16, 4, 10)
        np.testing.assert_array_equal(crop, whole[top : top + 16, left : left + 16])


def test_hevc_at_a_higher_qp_has_fewer_bytes_and_lower_psnr_and_repeats():
    # Frames of 96 pixels: of smaller ones libx265 was seen to code a few differently each time.
    rng = np.random.default_rng(1)
    clip = compressed_videos.render_clip(
        compressed_images.photograph("astronaut.png"), 3, rng, side=384
    )
    small = [degradation.downsample(frame) for frame in clip]
    bytes_, quality = {}, {}
    for qp in (27, 37):
        packets = degradation.encode_hevc(small, qp)
        decoded = degradation.decode_hevc(packets)
        bytes_[qp] = sum(map(len, packets))
        quality[qp] = np.mean([metrics.psnr(a, b) for a, b in zip(decoded, small)])
    assert bytes_[37] < 0.7 * bytes_[27] and quality[37] < quality[27] - 2
    degraded = degradation.degrade_video(clip)
    assert degraded.shape == (3, 96, 96, 3) and degraded.dtype == np.uint8
    np.testing.assert_array_equal(degraded, degradation.degrade_video(clip))


def test_without_pyav_the_extra_is_named_and_no_other_codec_is_taken(monkeypatch, picture):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"jaxmodels\[video\]"):
        degradation.degrade_video(np.stack([picture[:64, :64]] * 2))


def test_a_rendered_camera_moves_over_the_picture_and_stays_inside(picture):
    rng = np.random.default_rng(3)
    whole = fractional = 0
    for _ in range(6):
        clip = compressed_videos.render_clip(picture, 3, rng, side=64)
        assert clip.shape == (3, 64, 64, 3)
        found = [
            (y, x) for y in range(-6, 7) for x in range(-6, 7)
            if np.array_equal(np.roll(clip[1], (y, x), (0, 1))[8:-8, 8:-8], clip[0][8:-8, 8:-8])
        ]  # fmt: skip
        whole += bool(found)
        fractional += not found
    assert whole and fractional


def write(folder, name, size=(32, 40), mode="RGB", seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, channels), np.uint8)
    Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode).save(folder / name)


def batch_of(options):
    data = {"name": "compressed_images", "options": {"patch": 8, "crops": 1, **options}}
    batches = pipeline.train_batches(data, batch_size=2, seed=0)
    try:
        return next(batches)
    finally:
        batches.close()


def test_pairs_are_found_by_stem_and_crops_of_both_show_the_same_place(tmp_path):
    smooth = np.linspace(0, 255, 128).astype(np.uint8)
    ramp = np.stack([np.broadcast_to(smooth, (96, 128))] * 3, -1)
    hr, lr = tmp_path / "DIV2K_train_HR", tmp_path / "LR"
    for folder in (hr, lr):
        folder.mkdir()
    Image.fromarray(ramp).save(hr / "0001.png")
    Image.fromarray(degradation.downsample(ramp)).save(lr / "0001.jpg", quality=95)
    for options in ({"lr": "LR"}, {"quality": 90}):
        batch = batch_of({"path": str(tmp_path), **options})
        assert batch["lr"].shape == (2, 8, 8, 3) and batch["hr"].shape == (2, 32, 32, 3)
        small = batch["hr"].reshape(2, 8, 4, 8, 4, 3).mean((2, 4))
        assert np.abs(small - batch["lr"]).max() < 0.05
    first = batch_of({"path": str(tmp_path), "augment": True})
    again = batch_of({"path": str(tmp_path), "augment": True})
    np.testing.assert_array_equal(first["hr"], again["hr"])


def test_pairs_that_do_not_fit_are_named(tmp_path):
    hr, lr = tmp_path / "DIV2K_train_HR", tmp_path / "LR"
    for number in range(7):
        write(hr, f"{number:04d}.png")
    write(lr, "0000.jpg", (8, 10))
    with pytest.raises(FileNotFoundError, match=r"0001, 0002, 0003, 0004, 0005 and 1 more"):
        batch_of({"path": str(tmp_path), "lr": "LR"})
    for number in range(7):
        write(lr, f"{number:04d}.jpg", (8, 9))
    with pytest.raises(ValueError, match=r"8x9 times scale 4 is not 32x40"):
        batch_of({"path": str(tmp_path), "lr": "LR"})
    with pytest.raises(FileNotFoundError, match=r"data\.options\.path = '/nowhere'"):
        batch_of({"path": "/nowhere"})
    with pytest.raises(ValueError, match=r"scale must be one of"):
        batch_of({"path": str(tmp_path), "scale": 5})
    with pytest.raises(ValueError, match="quality must be numbers from 1 to 100"):
        batch_of({"path": str(tmp_path), "quality": 101})


@pytest.mark.parametrize(
    "mode, size, options, message",
    [
        ("RGBA", (32, 40), {}, r"transparency \(RGBA\)"),
        ("L", (32, 40), {}, "grayscale picture"),
        ("RGB", (33, 40), {"modcrop": False}, "33x40 image is no multiple of scale 4.*modcrop"),
        ("RGB", (16, 40), {}, "fewer than data.options.patch"),
    ],
)
def test_pictures_that_cannot_be_meant_are_refused(tmp_path, mode, size, options, message):
    write(tmp_path / "DIV2K_train_HR", "a.png", size, mode)
    with pytest.raises(ValueError, match=message):
        batch_of({"path": str(tmp_path), **options})


def test_gray_pictures_serve_gray_models(tmp_path):
    write(tmp_path / "DIV2K_train_HR", "a.png", mode="L")
    batch = batch_of({"path": str(tmp_path), "gray": True, "scale": 1, "quality": (10, 40)})
    assert batch["lr"].shape == batch["hr"].shape == (2, 8, 8, 1)
    # Published results of color sets in gray are measured on studio-range luma.
    folder = tmp_path / "color"
    folder.mkdir()
    Image.new("RGB", (8, 8), (255, 255, 255)).save(folder / "a.png")
    assert image_pairs.read_rgb(folder / "a.png", gray=True).max() == 235
    options = {"path": str(tmp_path), "hr": "color", "gray": True, "scale": 1, "crops": 32}
    family, options = pipeline.resolve({"name": "compressed_images", "options": options})
    transform, pair = (
        family.train_transform({**options, "patch": 8}),
        family.source("train", options)[0],
    )
    whites = {
        round(255 * float(transform(pair, np.random.default_rng(seed))["hr"].max()))
        for seed in range(16)
    }
    assert whites == {235, 255}


def video_batch(options):
    data = {"name": "compressed_videos", "options": {"patch": 8, "frames": 3, **options}}
    batches = pipeline.train_batches(data, batch_size=2, seed=0)
    try:
        return next(batches)
    finally:
        batches.close()


def test_videos_are_folders_of_frames_degraded_once_where_no_low_resolution_is(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "prepared"))
    for video in ("001", "002"):
        for frame in range(1, 5):
            write(tmp_path / "train/HR" / video, f"{frame:03d}.png", (64, 96))
    (tmp_path / "train/HR/readme.txt").write_text("no video")
    batch = video_batch({"path": str(tmp_path), "lr": ""})
    assert batch["lr"].shape == (2, 3, 8, 8, 3) and batch["hr"].shape == (2, 3, 32, 32, 3)
    (folder,) = (tmp_path / "prepared").glob("compressed_videos_*")
    assert sorted(f.name for f in (folder / "002").iterdir())[0] == "001.png"
    # Sides are cropped to multiples of 64 before they are shrunk, as the challenge's were.
    assert image_pairs.read_rgb(folder / "002" / "001.png").shape == (16, 16, 3)
    _, options = pipeline.resolve(
        {"name": "compressed_videos", "options": {"path": str(tmp_path), "val_lr": ""}}
    )
    options["val_hr"] = "train/HR"
    ((_, lr, hr), _) = compressed_videos.eval_videos(options)
    assert lr.shape == (4, 16, 16, 3) and hr.shape == (4, 64, 64, 3)
    with pytest.raises(FileNotFoundError, match=r"no low-resolution partner in .*: 001, 002"):
        video_batch({"path": str(tmp_path)})
    with pytest.raises(ValueError, match="has 4 frames, fewer than"):
        video_batch({"path": str(tmp_path), "lr": "", "frames": 5})


def test_frames_are_read_in_the_order_of_their_numbers_and_pairs_of_other_sizes_refused(tmp_path):
    for number in (1, 2, 10):
        write(tmp_path / "valid/HR/v", f"{number}.png", (64, 72), seed=number)
        write(tmp_path / "valid/LR/v", f"{number}.png", (16, 16), seed=number)
    frames = compressed_videos.read_video(tmp_path / "valid/HR/v")
    np.testing.assert_array_equal(frames[2], image_pairs.read_rgb(tmp_path / "valid/HR/v/10.png"))
    _, options = pipeline.resolve({"name": "compressed_videos", "options": {"path": str(tmp_path)}})
    with pytest.raises(ValueError, match="v: low resolution 16x16 times scale 4 is not 64x72"):
        list(compressed_videos.eval_videos(options))


def test_the_bundled_sets_know_their_sizes_and_keep_their_test_pictures_apart(tmp_path):
    _, options = pipeline.resolve(
        {"name": "compressed_images:skimage", "options": {"path": str(tmp_path)}}
    )
    sizes = compressed_images.split_sizes(options)
    for split, size in sizes.items():
        assert len(compressed_images.source(split, options)) == size
    trained = {pair.stem for pair in compressed_images.source("train", options).pairs}
    tested = [stem for stem, _, _ in compressed_images.eval_images(options)]
    assert len(trained) == 6 and tested == ["astronaut", "coffee"] and not trained & set(tested)
    assert preparation.data_directory(str(tmp_path)) == tmp_path
