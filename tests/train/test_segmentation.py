"""Segmentation through the commands: recipe, resume, mesh, prediction, the whole challenge."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.biomedical import augmentation
from jaxmodels.biomedical.unet import PlainConvUNet
from train import challenge, predict, survey
from train.__main__ import main
from train.checkpoints import Checkpoints, load_params
from train.command_line import stop_with_one_line
from train.tasks.segmentation import Segmentation

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "biomedical.py")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """nnU-Net's raw layout with NIfTI files: five training and two test cases, labelled."""
    nibabel = pytest.importorskip("nibabel")
    root = tmp_path_factory.mktemp("nnUNet_raw") / "Dataset001_Balls"
    rng = np.random.default_rng(0)
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    for split, count in (("Tr", 5), ("Ts", 2)):
        for kind in ("images", "labels"):
            (root / f"{kind}{split}").mkdir(parents=True)
        for i in range(count):
            grid = np.stack(np.meshgrid(*(np.arange(n) for n in (20, 18, 12)), indexing="ij"), -1)
            center = rng.uniform(6, 10, 3) * (1, 1, 0.7)
            distance = np.sqrt(((grid - center) ** 2).sum(-1))
            label = (distance < 6).astype(np.uint8) + (distance < 3)
            image = (100 * label + rng.normal(50, 20, label.shape)).astype(np.float32)
            name = f"ball_{split}{i}"
            nibabel.save(
                nibabel.Nifti1Image(image, affine), root / f"images{split}/{name}_0000.nii.gz"
            )
            nibabel.save(nibabel.Nifti1Image(label, affine), root / f"labels{split}/{name}.nii.gz")
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "shell": 1, "core": 2},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def flags_of(raw, **more):
    flags = {
        "data.options.path": raw,
        "data.options.prepared": raw.parent / "prepared",
        "data.options.patch_size": (8, 8, 8),
        "data.options.validation_batches": 2,
        "data.options.augmentation": "mirror",
        "task_args.augment": "mirror",
        "model_args.features_per_stage": (3, 4),
        "model_args.kernel_sizes": ((3, 3, 3), (3, 3, 3)),
        "model_args.strides": ((1, 1, 1), (2, 2, 2)),
        "model_args.n_conv_per_stage": (1, 1),
        "model_args.n_conv_per_stage_decoder": (1,),
        "task_args.mirror": False,
        "precision": "float32",
        "schedule.peak": 0.05,
        "schedule.hold_for": 5,
        "steps": 20,
        "log_every": 5,
        "eval.every": 5,
        "checkpoint.every": 10,
        "parallel.data": 1,
        **more,
    }
    return [f"--config={CONFIG}:paper", *(f"--config.{k}={v}" for k, v in flags.items())]


@pytest.fixture(scope="module")
def paper_run(raw, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("paper")
    assert main(["train", *flags_of(raw), f"--workdir={workdir}"]) == 0
    return workdir


def test_paper_recipe_runs_twenty_steps_on_nifti_files(paper_run):
    rows = [json.loads(line) for line in (paper_run / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in rows if r["kind"] == "train"]
    assert len(losses) == 4 and all(np.isfinite(losses)) and losses[-1] < losses[0]
    assert "held_out_dice_2" in (paper_run / "report.md").read_text()
    assert any("pseudo_dice" in r for r in rows)


def test_the_best_checkpoint_is_chosen_by_the_moving_average_of_pseudo_dice(paper_run):
    rows = [json.loads(line) for line in (paper_run / "metrics.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["kind"] == "eval"]
    expected = rows[0]["pseudo_dice"]
    for row in rows:
        expected = 0.9 * expected + 0.1 * row["pseudo_dice"]
        assert row["ema_pseudo_dice"] == pytest.approx(expected)
    assert len(rows) == 4 and rows[-1]["ema_pseudo_dice"] != rows[-1]["pseudo_dice"]
    saved = Checkpoints(paper_run / "checkpoints", best_metric="ema_pseudo_dice")
    assert saved.metrics(20)["last_ema_pseudo_dice"] == pytest.approx(expected)
    averages = {r["step"]: r["ema_pseudo_dice"] for r in rows if r["step"] % 10 == 0}
    assert saved.best_step() == max(averages, key=averages.get)


def test_a_stopped_run_resumes_bit_for_bit(paper_run, raw, tmp_path):
    # A shorter schedule would be another run: stop by restoring the checkpoint of step 10.
    import shutil

    shutil.copytree(paper_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    assert main(["train", *flags_of(raw), f"--workdir={tmp_path / 'run'}"]) == 0
    whole, resumed = load_params(paper_run), load_params(tmp_path / "run")
    assert jax.tree.structure(whole) == jax.tree.structure(resumed)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    # The moving average goes on from what the checkpoint remembers.
    a, b = (
        Checkpoints(d / "checkpoints").metrics(20)["last_ema_pseudo_dice"]
        for d in (paper_run, tmp_path / "run")
    )
    assert a == b


def test_eight_devices_train_as_one(raw, tmp_path):
    losses = {}
    for name, mesh in (("one", (1, 1)), ("many", (2, 4))):
        more = {
            "batch_size": 8,
            "data.options.batch_size": 8,
            "steps": 3,
            "log_every": 1,
            "checkpoint.every": 0,
            "parallel.data": mesh[0],
            "parallel.fsdp": mesh[1],
            "task_args.augment": "none",
            "data.options.augmentation": "none",
        }
        workdir = tmp_path / name
        assert main(["train", *flags_of(raw, **more), f"--workdir={workdir}"]) == 0
        rows = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [r["loss"] for r in rows if r["kind"] == "train"]
    np.testing.assert_allclose(losses["one"], losses["many"], rtol=2e-4)


def test_prediction_writes_label_maps_with_the_affine_of_their_image(paper_run, raw, tmp_path):
    import nibabel

    output = tmp_path / "predicted"
    arguments = [f"--checkpoint={paper_run}", f"--input={raw / 'imagesTs'}", f"--output={output}"]
    assert predict.main(["predict", *flags_of(raw), *arguments]) == 0
    assert sorted(p.name for p in output.iterdir()) == ["ball_Ts0.nii.gz", "ball_Ts1.nii.gz"]
    image = nibabel.load(raw / "imagesTs" / "ball_Ts0_0000.nii.gz")
    labels = nibabel.load(output / "ball_Ts0.nii.gz")
    assert labels.shape == image.shape
    np.testing.assert_array_equal(labels.affine, image.affine)


MISTAKES = {
    "data.options.patch_size=(9,8,8)": "the next valid patch is (10, 8, 8)",
    "task_args.voxel_loss=cross": "config.task_args.voxel_loss: 'cross'; known: cross_entropy",
    "task_args.augment=strong": "no augmentation 'strong'",
    "model_args.num_classes=4": "config.model_args.num_classes: 4, the data have 3",
    "task_args.image_weight=0.5": "config.model_args.image_classes: 0, image_weight needs one for",
    "model_args.input_channels=3": "config.model_args.input_channels: 3, the data have 1",
    "data.options.batch_size=4": "data.options.batch_size 4 differs from config.batch_size 2",
    "data.options.path=/nowhere": "neither raw (dataset.json) nor prepared",
    "data.options.fold=5": "data.options.fold: 5 is not in -1 .. 4",
    "checkpoint.best_smoothing=1.0": "config.checkpoint.best_smoothing: 1.0 is not in [0, 1)",
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_gets_one_line(flag, raw, tmp_path, capsys):
    argv = ["train", *flags_of(raw), f"--workdir={tmp_path}", f"--config.{flag}"]
    assert stop_with_one_line(main, argv) == 2
    assert MISTAKES[flag] in capsys.readouterr().err.strip().splitlines()[-1]


def test_regions_overlap_and_ignored_voxels_count_in_no_loss():
    module = PlainConvUNet(
        num_classes=2,
        features_per_stage=(2, 2),
        kernel_sizes=((3, 3),) * 2,
        strides=((1, 1), (2, 2)),
        n_conv_per_stage=(1, 1),
        n_conv_per_stage_decoder=(1,),
    )
    regions = ((1, 2), (2,))
    task = Segmentation(module, (4, 4), regions=regions, region_order=(1, 2), ignore_label=3)
    label = jnp.asarray([[[0, 1], [2, 3]]])
    np.testing.assert_array_equal(task.one_hot(label)[0, :, :, 0], [[0, 1], [1, 0]])
    np.testing.assert_array_equal(task.one_hot(label)[0, :, :, 1], [[0, 0], [1, 0]])
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 2, 2)), jnp.float32)
    one = task._one_loss(logits, label)
    np.testing.assert_allclose(one, task._one_loss(logits.at[0, 1, 1].add(7.0), label), rtol=1e-6)
    assert one != task._one_loss(logits.at[0, 0, 0].add(7.0), label)
    assert task.windows().regions and task.windows().tile == (4, 4)
    # An option that regions do not have is refused, not ignored.
    with pytest.raises(ValueError, match="voxel_loss and overlap_loss are for exclusive classes"):
        Segmentation(module, (4, 4), regions=regions, voxel_loss="focal")


def test_augmentation_leaves_the_outside_of_masked_channels_at_zero(monkeypatch):
    module = PlainConvUNet(
        input_channels=2,
        features_per_stage=(2, 2),
        kernel_sizes=((3, 3),) * 2,
        strides=((1, 1), (2, 2)),
        n_conv_per_stage=(1, 1),
        n_conv_per_stage_decoder=(1,),
    )
    label = jnp.zeros((4, 8, 8), jnp.int32).at[:, :, :3].set(-1).at[:, 2:5, 4:6].set(1)
    image = jnp.where(label < 0, 0.0, 1.0 + label)[..., None] * jnp.ones(2)

    def brighter(key, image, label, *arguments):
        return image + 1, label

    monkeypatch.setattr(augmentation, "augment", brighter)
    task = Segmentation(module, (8, 8), augment="intensity", masked=(0,))
    found, kept = task.prepare(jax.random.key(0), image, label)
    np.testing.assert_array_equal(kept, np.maximum(label, 0))
    np.testing.assert_array_equal(found[..., 0], np.where(label < 0, 0, image[..., 0] + 1))
    np.testing.assert_array_equal(found[..., 1], image[..., 1] + 1)
    plain = Segmentation(module, (8, 8), augment="none")
    np.testing.assert_array_equal(
        plain.prepare(jax.random.key(0), image, label)[1], np.maximum(label, 0)
    )


# -- the pipeline ----------------------------------------------------------------------------------


def challenge_flags(raw, **more):
    flags = {
        "data.options.path": raw,
        "challenge.configurations": ("3d_lowres", "3d_cascade"),
        "challenge.folds": 2,
        "challenge.plan.memory_gb": 0.0004,
        "challenge.plan.base_features": 2,
        "challenge.plan.batch_size": 3,
        "challenge.plan.lowres_share": 0.9,
        "challenge.mirroring": False,
        "challenge.step": 1.0,
        "challenge.bootstrap": 50,
        "challenge.steps": (("3d_lowres", 2),),
        "steps": 3,
        "parallel.data": 1,
        **more,
    }
    return [f"--config={CONFIG}:pipeline", *(f"--config.{k}={v}" for k, v in flags.items())]


def test_one_command_leads_from_a_folder_to_a_submission_and_resumes(raw, tmp_path, capsys):
    import nibabel

    workdir = tmp_path / "challenge"
    assert challenge.main(["challenge", *challenge_flags(raw), f"--workdir={workdir}"]) == 0
    report = (workdir / "report" / "report.md").read_text()
    for text in ("69 % of respondents with samples too large", "k-fold", "Kendall", "3d_cascade"):
        assert text in report
    practices = [line for line in report.splitlines() if "% of " in line and line[0] == "|"]
    assert all("| on |" in line or "| off |" in line for line in practices) and len(practices) > 4
    assert (workdir / "report" / "ranking.png").stat().st_size > 5000
    for case in ("ball_Ts0", "ball_Ts1"):
        image = nibabel.load(raw / "imagesTs" / f"{case}_0000.nii.gz")
        labels = nibabel.load(workdir / "test" / "submission" / f"{case}.nii.gz")
        assert labels.shape == image.shape
        np.testing.assert_array_equal(labels.affine, image.affine)
    # Every case is predicted once, by the model that did not see it.
    held = json.loads((workdir / "prepared" / "splits.json").read_text())
    for name in ("3d_lowres", "3d_cascade"):
        recorded = json.loads((workdir / f"oof_{name}" / "folds.json").read_text())
        assert recorded == {case: k for k, one in enumerate(held) for case in one}
    # The cascade read what the low resolution predicted for cases it had not seen.
    own = json.loads((workdir / "train_3d_cascade_seed0_fold0" / "config.json").read_text())
    assert own["data"]["options"]["prior"] == str(workdir / "oof_3d_lowres" / "prior")
    assert own["model_args"]["input_channels"] == 3 and own["steps"] == 3
    low = json.loads((workdir / "train_3d_lowres_seed0_fold0" / "config.json").read_text())
    assert low["steps"] == 2
    # A lost result is made again, and nothing else.
    (workdir / "test" / "details" / "ball_Ts1.json").unlink()
    capsys.readouterr()
    assert challenge.main(["challenge", *challenge_flags(raw), f"--workdir={workdir}"]) == 0
    said = capsys.readouterr().out
    assert (
        "train_3d_lowres_seed0_fold1: finished before" in said and "test: test prediction" in said
    )
    assert "ensemble: finished before" in said


CHALLENGE_MISTAKES = {
    "challenge.configurations=('3d_ful',)": "did you mean '3d_fullres'",
    "challenge.configurations=('3d_cascade',)": "3d_cascade needs 3d_lowres as well",
    "challenge.folds=9": "9 folds need at least as many cases, got 5",
    "challenge.weights=best": "config.challenge.weights: 'best'; known: uniform, least_squares",
    "challenge.plan.schemes=('ct',)": "plan.schemes: no normalization 'ct'; known: CT",
    "challenge.plan.schemes=('CT','CT')": "plan.schemes: 2 normalizations for 1 channels",
    "challenge.tolerance=(1.0,2.0,3.0)": "(1.0, 2.0, 3.0) for 2 targets (shell, core)",
    "challenge.tolerance=-1.0": "config.challenge.tolerance: (-1.0,), wanted millimeters",
    "challenge.steps=(('3d_fullres',5),)": "wanted (configuration, steps) pairs like (('3d_lowres'",
    "data.options.context=2": "config.data.options.context: the challenge decides it; known: path",
    "model_args.conv_bias=False": "config.model_args.conv_bias: networks follow from config.chall",
    "challenge.ranking=mean": "known: aggregate_then_rank",
    "data.options.path=/nowhere": "no folder '/nowhere'",
}


@pytest.mark.parametrize("flag", CHALLENGE_MISTAKES)
def test_a_mistake_in_the_challenge_gets_one_line(flag, raw, tmp_path, capsys):
    argv = ["challenge", *challenge_flags(raw), f"--workdir={tmp_path}", f"--config.{flag}"]
    assert stop_with_one_line(challenge.main, argv) == 2
    assert CHALLENGE_MISTAKES[flag] in capsys.readouterr().err.strip().splitlines()[-1]


def test_survey_figures_keep_their_base():
    entries = survey.load()
    assert len(entries) == 28 and entries["slices"].value is None
    assert entries["patches"].text() == "69 % of respondents with samples too large"
    pair = entries["ensemble_identical"], entries["ensemble_heterogeneous"]
    assert pair[0] + pair[1] == 100
    with pytest.raises(ValueError, match="different bases and cannot be added"):
        entries["ensembling"] + entries["postprocessing"]
    with pytest.raises(ValueError, match="multiple answers were allowed"):
        entries["patches"] + entries["downsampling"]
    with pytest.raises(ValueError, match="no figure was published"):
        entries["patches"] + entries["slices"]
    with pytest.raises(ValueError, match="cannot be multiplied"):
        entries["samples_too_large"] * entries["patches"]
