"""Motion forecasting through the commands: recipes, meshes, resuming, prediction, mistakes."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmodels.driving.vectorization import to_city
from train import forecast_figures, predict
from train.__main__ import main
from train.building import build_task
from train.command_line import read_flags, stop_with_one_line
from train.data import motion_files, motion_scenes, pipeline, traffic_files
from train.loop import Plan
from train.tasks.motion_forecasting import constant_velocity

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "vectornet.py")
TINY = (
    "--config.model_args.sub_width=8",
    "--config.model_args.sub_depth=1",
    "--config.model_args.global_width=8",
    "--config.model_args.dec_width=8",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a few simulated scenes."""
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture(scope="module")
def argoverse(tmp_path_factory):
    """Argoverse's layout: train/data and val/data of CSV files, lanes beside each."""
    root = tmp_path_factory.mktemp("argoverse")
    for split, count in (("train", 8), ("val", 3)):
        assert len(traffic_files.write_scenes(root, split, count, seed=11)) == count
    return root


def small_flags(prepared, *more):
    return [
        f"--config={CONFIG}",
        f"--config.data.options.path={prepared}",
        "--config.data.options.scenes=16,8,0",
        "--config.batch_size=8",
        "--config.eval.batch_size=8",
        "--config.steps=5",
        "--config.checkpoint.every=3",
        "--config.log_every=1",
        "--config.task_args.completion=True",
        *TINY,
        *more,
    ]


def losses_of(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in rows if r["kind"] == "train"}


def test_a_run_on_a_mesh_agrees_and_a_resumed_run_is_the_same_bit_for_bit(
    prepared, tmp_path, capsys
):
    """Data and fsdp over eight devices; hidden nodes are drawn from the seed and the step."""
    whole, part, mesh = (tmp_path / name for name in ("whole", "part", "mesh"))
    one = ("--config.parallel.data=1",)

    def run(workdir, *flags):
        assert main(["train", *small_flags(prepared, *flags), f"--workdir={workdir}"]) == 0

    run(whole, *one)
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "5")  # stopped after step 3
    run(part, *one)
    assert "resumed from step 3" in capsys.readouterr().err
    run(mesh, "--config.parallel.data=4", "--config.parallel.fsdp=2")
    want = losses_of(whole)
    assert losses_of(part) == want
    got = losses_of(mesh)
    np.testing.assert_allclose([got[s] for s in want], list(want.values()), rtol=1e-5)
    report = (whole / "report.md").read_text()
    for name in ("DE@3s_over_constant_velocity", "node_loss_of_mean", "miss_rate"):
        assert f"| {name} |" in report


def test_the_paper_recipe_runs_twenty_steps_on_argoverse_files_and_predicts(argoverse, tmp_path):
    flags = [
        f"--config={CONFIG}:paper",
        f"--config.data.options.path={argoverse}",
        "--config.data.options.max_polylines=16",
        "--config.data.options.workers=0",
        "--config.batch_size=4",
        "--config.eval.batch_size=4",
        "--config.parallel.data=1",
        *TINY,
    ]
    run = [
        "--config.steps=20",
        "--config.schedule.peak=0.02",
        "--config.log_every=5",
        "--config.eval.every=0",
        "--config.checkpoint.every=10",
    ]
    workdir = tmp_path / "run"
    assert main(["train", *flags, *run, f"--workdir={workdir}"]) == 0
    losses = list(losses_of(workdir).values())
    assert len(losses) == 4 and losses[-1] < losses[0]

    output = tmp_path / "forecasts.csv"
    folder = argoverse / "val" / "data"
    arguments = [f"--checkpoint={workdir}", f"--input={folder}", f"--output={output}"]
    assert predict.main(["predict", *flags, *arguments]) == 0
    lines = output.read_text().splitlines()
    assert lines[0] == "sequence,step,seconds,x,y" and len(lines) == 1 + 3 * 30
    found = motion_files.read_sequence(folder / "0.csv")
    sequence, step, seconds, x, y = lines[1].split(",")
    assert (sequence, step, seconds) == ("0", "1", "0.1")
    # City coordinates, near where the vehicle was last seen.
    assert np.hypot(*(np.array([float(x), float(y)]) - found.tracks[found.target, 19])) < 20

    picture = tmp_path / "forecasts.png"
    arguments[-1] = f"--output={picture}"
    assert forecast_figures.main(["figures", *flags, *arguments]) == 0
    assert picture.stat().st_size > 20_000


def test_prediction_cuts_a_scene_as_training_and_evaluation_do(argoverse):
    flags = [f"--config={CONFIG}:paper", f"--config.data.options.path={argoverse}", *TINY]
    flags += ["--config.data.options.max_polylines=4", "--config.eval.batch_size=2"]
    config, _ = read_flags(["predict", *flags], need_workdir=False)
    task = build_task(config)
    _, options = pipeline.resolve(config.data)
    example = {k: v[None] for k, v in motion_scenes.source("val", options)[0].items()}
    params, _ = task.init(jax.random.key(0), example)
    (file,) = (argoverse / "val" / "data").glob("0.csv")
    scene = motion_scenes.vector_scene(motion_scenes.read_scene(file, options), options)
    assert scene.dropped > 0
    want = to_city(task.positions({"params": params}, example)[0], scene.origin, scene.heading)
    found = dict(task.forecasts({"params": params}, file.parent, config))
    assert sorted(found) == ["0", "1", "2"]
    np.testing.assert_allclose(found["0"], want, atol=1e-4)


def test_the_raster_baseline_trains_by_the_same_recipe(argoverse, tmp_path):
    flags = [
        f"--config={CONFIG}:paper_raster",
        f"--config.data.options.path={argoverse}",
        "--config.data.options.raster_size=32",
        "--config.data.options.obs=20",
        "--config.data.options.workers=0",
        "--config.model_args.width=4",
        "--config.batch_size=4",
        "--config.eval.batch_size=4",
        "--config.parallel.data=1",
        "--config.steps=4",
        "--config.log_every=2",
        "--config.eval.every=0",
    ]
    assert main(["train", *flags, f"--workdir={tmp_path}"]) == 0
    assert "DE@3s_over_constant_velocity" in (tmp_path / "report.md").read_text()
    assert np.isfinite(list(losses_of(tmp_path).values())).all()


def test_rasters_and_vectors_describe_the_same_future(prepared):
    data = {"path": str(prepared), "scenes": (16, 8, 0), "heading_min_disp": 0.3}
    examples = {}
    for inputs in motion_scenes.INPUTS:
        options = pipeline.resolve(
            {"name": "motion_scenes", "options": {**data, "inputs": inputs, "raster_size": 64}}
        )[1]
        examples[inputs] = motion_scenes.source("val", options)[3]
    future = np.cumsum(examples["vectors"]["future_offsets"], 0)
    raster = np.cumsum(examples["raster"]["future_offsets"], 0)
    # Ahead is x in the vector frame and up, y, in the raster's.
    np.testing.assert_allclose(raster, np.stack([-future[:, 1], future[:, 0]], 1), atol=1e-4)
    np.testing.assert_allclose(examples["raster"]["start"], 0, atol=1e-6)
    np.testing.assert_array_equal(examples["raster"]["cells"][-1], [8, 8])
    image = examples["raster"]["image"].reshape(64, 64, 20, 3)
    assert image[32, 32, -1, 1] == 1 and image[..., 0].any() and image.max() == 1


def test_constant_velocity_is_the_mean_of_the_last_second():
    history = np.zeros((2, 20, 2), np.float32)
    history[:, :, 0] = 0.7 * np.arange(-19, 1)
    history[:, :9] = 99  # older than a second
    valid = np.ones((2, 20), np.float32)
    valid[1, :14], history[1, :14] = 0, 99
    found = constant_velocity({"history": history, "history_valid": valid}, 30)
    np.testing.assert_allclose(found[..., 0], 0.7 * np.arange(1, 31)[None].repeat(2, 0), rtol=1e-5)


def test_a_scene_is_a_function_of_the_seed_and_ablations_leave_things_out(prepared):
    data = {"name": "motion_scenes", "options": {"path": str(prepared), "scenes": (16, 8, 0)}}
    batches = pipeline.train_batches(data, batch_size=4, seed=0, start_step=2)
    batch = next(batches)
    for name, spec in pipeline.element_spec(data).items():
        assert batch[name].shape == (4, *spec.shape) and batch[name].dtype == spec.dtype
    columns = batch["vectors"][batch["vector_mask"]]
    assert columns[:, 4].any() and columns[:, 6].any()
    alone = {**data, "options": {**data["options"], "use_map": False, "use_agents": False}}
    batch = next(pipeline.train_batches(alone, batch_size=4, seed=0, start_step=2))
    assert batch["vector_mask"].any(-1).sum(1).tolist() == [1] * 4


def test_the_paper_step_needs_no_data_to_be_shaped():
    config, _ = read_flags(["train", f"--config={CONFIG}:paper", "--workdir=x"], need_workdir=True)
    plan = Plan(config)
    assert plan.spec["vectors"].shape == (128, 19, 12)
    encoder = {k: v for k, v in plan.abstract.params.items() if "decoder" not in k}
    assert sum(int(np.prod(a.shape)) for a in jax.tree.leaves(encoder)) == 42_880
    flags = ["--config.data.name=motion_scenes:argoverse2", "--config.model_args.horizon=60"]
    second, _ = read_flags(["predict", f"--config={CONFIG}:paper", *flags], need_workdir=False)
    assert pipeline.element_spec(second.data)["vectors"].shape == (128, 49, 12)
    raster, _ = read_flags(["predict", f"--config={CONFIG}:paper_raster"], need_workdir=False)
    assert pipeline.element_spec(raster.data)["image"].shape == (400, 400, 60)
    assert plan.schedule(0) == pytest.approx(1e-3)
    assert plan.schedule(config.steps - 1) == pytest.approx(1e-3 * 0.3**4)


MISTAKES = {
    "--config.data.options.horizon=20": "config.model_args.horizon: 30, but the data gives 20",
    "--config.model_args.in_dim=10": "config.model_args.in_dim: 10, but the data gives 12",
    "--config.data.options.inputs=raster": "does not take data.options.inputs='raster'",
    "--config.data.options.kind=argo": "data.options.kind: 'argo'; ",
    "--config.data.options.obs=1": "data.options.obs = 1 is too small",
    "--config.data.name=digits": "the task motion_forecasting takes motion_scenes",
    "--config.model=driving.vectornt": "did you mean 'driving.vectornet'?",
    "--config.task_args.maskrate=1": "maskrate",
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_in_a_config_gets_one_line(flag, tmp_path, capsys):
    argv = ["train", f"--config={CONFIG}", f"--workdir={tmp_path}", flag]
    assert stop_with_one_line(main, argv) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and MISTAKES[flag] in error[-1]


def test_a_split_without_futures_is_not_reported_as_errors_of_zero(tmp_path, capsys):
    flags = [f"--config={CONFIG}:paper", f"--workdir={tmp_path}", "--config.eval.split=test"]
    assert stop_with_one_line(main, ["train", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "config.eval.split: the test split of argoverse has no futures" in error


def test_folders_without_data_are_named(tmp_path, capsys):
    argv = ["train", f"--config={CONFIG}:paper", "--workdir", str(tmp_path)]
    for path, text in (("", "data.options.path"), (str(tmp_path), "no CSV files of split 'train'")):
        flags = [f"--config.data.options.path={path}", "--config.parallel.data=1"]
        assert stop_with_one_line(main, [*argv, *flags]) == 2
        assert text in capsys.readouterr().err.strip().splitlines()[-1]
