"""The restoration commands on files in the published formats: train, resume, predict, mistakes."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jaxmodels
from jaxmodels.interop import catalog
from jaxmodels.restoration import metrics
from tests.restoration import tiny
from train import predict
from train.__main__ import main
from train.checkpoints import load_params
from train.command_line import load_config, stop_with_one_line
from train.data import compressed_images, degradation, pipeline

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "compressed_sr.py")


@pytest.fixture(scope="module")
def div2k(tmp_path_factory):
    """DIV2K's and Flickr2K's folders: PNGs of photographs' parts, test inputs as JPEGs."""
    root = tmp_path_factory.mktemp("div2k")
    photograph = compressed_images.photograph("chelsea.png")
    for folder, names in (
        ("DIV2K_train_HR", ("0001", "0002")),
        ("Flickr2K_HR", ("000001",)),
        ("DIV2K_valid_HR", ("0801", "0802")),
    ):
        (root / folder).mkdir()
        for number, name in enumerate(names):
            part = photograph[50 * number : 50 * number + 97, 40 * number : 40 * number + 130]
            Image.fromarray(part).save(root / folder / f"{name}.png")
    (root / "valid_LR").mkdir()
    for file in (root / "DIV2K_valid_HR").iterdir():
        hr = degradation.modcrop(np.asarray(Image.open(file)))
        encoded = degradation.jpeg_bytes(degradation.downsample(hr))
        (root / "valid_LR" / f"{file.stem}.jpg").write_bytes(encoded)
    return root


IMAGE_MODEL = {
    "upscale": 4,
    "upsampler": "pixelshuffle_aux",
    "window_size": 8,
    "embed_dim": 8,
    "depths": (2,),
    "num_heads": (2,),
    "mlp_ratio": 1.0,
    "num_feat": 8,
    "cpb_hidden": 16,
}
VIDEO_MODEL = {
    "deform_groups": 2,
    "mid_channels": 8,
    "num_blocks": 1,
    "spatial_blocks": 1,
    "hr_channels": 4,
    "spynet_channels": (2, 2, 2, 2),
}


def model_flags(name, arguments):
    return [
        f"--config.model={name}",
        *(f"--config.model_args.{key}={value}" for key, value in arguments.items()),
    ]


def starting_weights(folder, name, arguments):
    """Random weights as a PyTorch-named file: compiling an initialization takes longer."""
    module = catalog.find(name).build(**arguments)
    path = folder / "start.safetensors"
    jaxmodels.save(path, name, module, tiny.variables_of(module, scale=0.05))
    return f"--config.init_from={path}"


@pytest.fixture(scope="module")
def paper_run(div2k, tmp_path_factory):
    """Twenty steps of `:paper` at reduced size, on a mesh of data and fsdp."""
    workdir = tmp_path_factory.mktemp("paper")
    name = "restoration.swin2sr"
    start = starting_weights(tmp_path_factory.mktemp("start"), name, IMAGE_MODEL)
    flags = [
        f"--config={CONFIG}:paper",
        *model_flags(name, IMAGE_MODEL),
        f"--config.data.options.path={div2k}",
        "--config.data.options.val_lr=valid_LR",
        "--config.data.options.patch=16",
        "--config.data.options.workers=0",
        "--config.task_args.tile=24",
        "--config.task_args.tile_overlap=8",
        "--config.batch_size=8",
        "--config.parallel.fsdp=2",
    ]
    run = [
        start,
        "--config.steps=20",
        "--config.schedule.peak=0.003",
        "--config.schedule.boundaries=(16,)",
        "--config.ema.decay=0.8",
        "--config.log_every=5",
        "--config.eval.every=0",
        "--config.checkpoint.every=10",
    ]
    assert main(["train", *flags, *run, f"--workdir={workdir}"]) == 0
    return workdir, flags, run


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_paper_recipe_runs_twenty_steps_on_div2k_folders(paper_run):
    workdir, _, _ = paper_run
    rows = [row for row in rows_of(workdir) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert rows[-1]["loss"] < rows[0]["loss"]
    terms = ("pixel", "aux", "aux_image", "hf")
    for row in rows:
        np.testing.assert_allclose(row["loss"], sum(row[t] for t in terms), rtol=1e-5)
    assert rows[-1]["learning_rate"] == pytest.approx(0.0015)
    report = (workdir / "report.md").read_text()
    assert "bicubic_psnr" in report and "ensemble_psnr" in report and "psnr_b" in report


def test_averaged_weights_differ_from_raw_ones_and_are_what_is_evaluated(paper_run):
    workdir, _, _ = paper_run
    averaged = load_params(workdir, ema=True)["params"]["conv_first"]["kernel"]
    raw = load_params(workdir, ema=False)["params"]["conv_first"]["kernel"]
    assert np.abs(averaged - raw).max() > 1e-5


def test_a_resumed_run_repeats_its_losses_exactly(paper_run, tmp_path):
    workdir, flags, run = paper_run
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "20")
    assert main(["train", *flags, *run, f"--workdir={copy}"]) == 0
    before, after = (
        [r["loss"] for r in rows_of(d) if r["kind"] == "train" and r["step"] > 10]
        for d in (workdir, copy)
    )
    assert before == after and len(after) == 2


def test_prediction_writes_pictures_strips_and_psnr(paper_run, div2k, tmp_path, capsys):
    workdir, flags, _ = paper_run
    output = tmp_path / "restored"
    arguments = [
        *(f for f in flags if "parallel" not in f),
        f"--config.task_args.reference={div2k / 'DIV2K_valid_HR'}",
        f"--checkpoint={workdir}",
        f"--input={div2k / 'valid_LR'}",
        f"--output={output}",
    ]
    assert predict.main(["predict", *arguments]) == 0
    assert "2 pictures in" in capsys.readouterr().out
    assert Image.open(output / "0801.png").size == (128, 96)
    assert Image.open(output / "strips" / "0802.png").size[0] > 300
    lines = (output / "psnr.csv").read_text().splitlines()
    assert lines[0] == "file,psnr,bicubic_psnr" and len(lines) == 3
    for line in lines[1:]:
        assert 15 < float(line.split(",")[2]) < 40
    # The border that is left out of reported metrics is left out here as well.
    again = tmp_path / "again"
    arguments[-1] = f"--output={again}"
    assert predict.main(["predict", *arguments, "--config.task_args.border=4"]) == 0
    _, _, hr = next(
        compressed_images.eval_images(
            pipeline.resolve(
                {
                    "name": "compressed_images",
                    "options": {"path": str(div2k), "val_lr": "valid_LR"},
                }
            )[1]
        )
    )
    sr = np.asarray(Image.open(again / "0801.png"))
    given = float((again / "psnr.csv").read_text().splitlines()[1].split(",")[1])
    assert given == pytest.approx(metrics.psnr(sr, hr, 4), rel=1e-9)


@pytest.fixture(scope="module")
def ldv(tmp_path_factory):
    """LDV's layout: folders of frames, 256x272 and a quarter of it."""
    root = tmp_path_factory.mktemp("ldv")
    photograph = compressed_images.photograph("chelsea.png")
    for part, names in (("train", ("001", "002")), ("valid", ("003",))):
        for number, name in enumerate(names):
            large, small = (root / part / kind / name for kind in ("HR", "LR"))
            large.mkdir(parents=True)
            small.mkdir(parents=True)
            for frame in range(3 if part == "train" else 2):
                top, left = 3 * frame + 5 * number, 60 + 4 * frame
                hr = photograph[top : top + 256, left : left + 256]
                Image.fromarray(hr).save(large / f"{frame + 1:03d}.png")
                lr = degradation.downsample(hr)
                Image.fromarray(lr).save(small / f"{frame + 1:03d}.png")
    return root


def test_the_paper_video_recipe_runs_twenty_steps_with_a_resting_flow_network(ldv, tmp_path):
    flags = [
        f"--config={CONFIG}:paper_video",
        f"--config.data.options.path={ldv}",
        "--config.data.options.frames=2",
        "--config.data.options.workers=0",
        *model_flags("restoration.basicvsrpp", VIDEO_MODEL),
        starting_weights(tmp_path, "restoration.basicvsrpp", VIDEO_MODEL),
        "--config.optimizer.groups=((r'^spynet\\.',0.25,15),)",
        "--config.batch_size=1",
        "--config.parallel.data=1",
        "--config.steps=20",
        "--config.schedule.peak=0.003",
        "--config.log_every=10",
        "--config.eval.every=0",
        "--config.checkpoint.every=5",
        f"--workdir={tmp_path}",
    ]
    assert main(["train", *flags]) == 0
    rows = [row for row in rows_of(tmp_path) if row["kind"] == "train"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    saved = [load_params(tmp_path / "checkpoints" / n)["params"] for n in ("10", "15", "20")]
    flow = [p["spynet"]["basic_module.0.basic_module.4.conv"]["bias"] for p in saved]
    last = [p["conv_last"]["bias"] for p in saved]
    np.testing.assert_array_equal(flow[0], flow[1])
    assert np.abs(flow[1] - flow[2]).max() > 0 and np.abs(last[0] - last[1]).max() > 0


MISTAKES = {
    "--config.data.options.scale=2": "config.data.options.scale: 2, but the model has upscale 4",
    "--config.data.options.gray=True": "but the model has in_chans 3",
    "--config.task_args.tile=20": "20 must be a multiple of the window 8",
    "--config.task_args.tile=16": "tile_overlap: 32 must be at least 0 and less than tile 16",
    "--config.task_args.tile_blend=none": "tile_blend: 'none'; known: taper, mean",
    "--config.task_args.border=-3": "config.task_args.border: -3 is no number of pixels",
    "--config.task_args.border=190": "leaves no 11x11 pixels of a test picture whose shorter side",
    "--config.task_args.pixel=l2": "config.task_args.pixel: 'l2'; known:",
    "--config.model_args.num_heads=(5,2)": "embed_dim 24 must divide by num_heads 5",
    "--config.data.options.patch=4": "data.options.patch must be an integer of at least 8",
    "--config.task_args.first=jpeg_color": "config.task_args.first_checkpoint",
}


def test_a_first_stage_that_enlarges_is_refused():
    from train.building import build_task
    from train.naming import ConfigError

    config = load_config(CONFIG)
    config.task_args.update(first="classical_sr_x2_64", first_checkpoint="x2.pth")
    with pytest.raises(ConfigError, match="classical_sr_x2_64 enlarges by 2"):
        build_task(config)


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_gets_one_line(flag, tmp_path, capsys):
    argv = ["train", f"--config={CONFIG}", f"--workdir={tmp_path}", "--config.batch_size=8", flag]
    assert stop_with_one_line(main, argv) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and MISTAKES[flag] in error[-1]


def test_the_classical_recipe_trains_on_pictures_that_nobody_compressed(div2k):
    from train.building import build_task

    config = load_config(f"{CONFIG}:paper_classical_x4_from_x2")
    assert (config.steps, config.schedule.peak, config.init_skip) == (250_000, 1e-4, r"upsample\.2")
    config = load_config(f"{CONFIG}:paper_lightweight")
    config.update(model="restoration.swin2sr", model_args={**IMAGE_MODEL, "upscale": 2})
    config.model_args.upsampler = "pixelshuffledirect"
    config.data.options.update(path=str(div2k), patch=16, workers=0)
    task, data = build_task(config), config.data
    batches = pipeline.train_batches(data, batch_size=2, seed=0)
    try:
        batch = next(batches)
    finally:
        batches.close()
    # Uncompressed, so that shrinking the target by another filter comes near the input.
    shrunk = batch["hr"].reshape(2, 16, 2, 16, 2, 3).mean((2, 4))
    assert np.abs(shrunk - batch["lr"]).mean() < 0.02
    params = tiny.variables_of(task.model, scale=0.05)["params"]
    rng = jax.random.key(0)
    step = jax.value_and_grad(lambda p: task.loss(p, {}, batch, rng), has_aux=True)
    run, losses = tiny.quickly(step, params), []
    for _ in range(2):
        (loss, (_, terms)), gradient = run(params)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)
        losses.append(float(loss))
    assert losses[1] < losses[0] and set(terms) == {"pixel"}


def test_every_preset_builds_its_task_and_wrong_ones_are_named():
    from configs.compressed_sr import PRESETS
    from train.building import build_task

    for preset in PRESETS:
        config = load_config(f"{CONFIG}:{preset}")
        assert build_task(config).scale == config.data.options.get("scale", 4)
    with pytest.raises(ValueError, match="no preset 'papper'"):
        load_config(f"{CONFIG}:papper")
