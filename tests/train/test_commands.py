"""The commands as a user meets them: the paper's recipe on files, and every mistake on one line."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from train import predict
from train.__main__ import main
from train.command_line import stop_with_one_line

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "repghost.py")
TINY = str(ROOT / "tests" / "train" / "tiny_run" / "config.py")


def test_a_network_that_scores_all_classes_alike_or_none_is_not_perfect():
    """Top-1 takes the first of equal scores, as `argmax` does, and NaN hits nothing."""
    from train.tasks.classification import Classification

    class Scores:
        def apply(self, variables, image, train):
            return image

    nan = np.nan
    scores = np.float32([[1] * 6, [1] * 6, [nan] * 6, [0, 2, 2, 1, 1, 1], [nan, 0, 3, 0, 0, 0]])
    batch = {"image": jnp.asarray(scores), "label": jnp.asarray([0, 3, 1, 2, 2])}
    sums = Classification(Scores()).evaluate({}, {**batch, "mask": jnp.ones(5)})
    # Rows 0 (first of all) and none else; row 4's own score is beaten by one that is no number.
    assert (float(sums["accuracy"]), float(sums["top5"])) == (1.0, 4.0)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """ImageNet's folder layout: two classes, eight training and three validation JPEGs each."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for wnid, color in (("n01440764", 60), ("n01443537", 190)):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(color, 20, (40 + i, 48, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{wnid}_{i}.JPEG")
    return root


@pytest.fixture(scope="module")
def paper_run(imagenet, tmp_path_factory):
    """Twenty steps of `:paper` at reduced size."""
    workdir = tmp_path_factory.mktemp("paper")
    flags = [
        f"--config={CONFIG}:paper",
        "--config.model=vision.repghost",
        "--config.model_args.width=0.05",
        "--config.model_args.num_classes=2",
        f"--config.data.options.path={imagenet}",
        "--config.data.options.image_size=32",
        "--config.data.options.workers=0",
        "--config.batch_size=8",
        "--config.precision=float32",
        "--config.parallel.data=1",
    ]
    run = [
        "--config.steps=20",
        "--config.schedule.peak=0.05",
        "--config.schedule.warmup_steps=5",
        "--config.schedule.hold_for=1",
        "--config.ema.decay=0.8",
        "--config.log_every=5",
        "--config.eval.every=0",
        "--config.checkpoint.every=10",
    ]
    assert main(["train", *flags, *run, f"--workdir={workdir}"]) == 0
    return workdir, flags, run


def test_paper_recipe_runs_twenty_steps_on_imagenet_folders(paper_run):
    workdir, _, _ = paper_run
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in rows if r["kind"] == "train"]
    assert [r["step"] for r in rows if r["kind"] == "train"] == [5, 10, 15, 20]
    assert all(np.isfinite(losses)) and losses[-1] < losses[0]
    assert (workdir / "curves.png").stat().st_size > 5000
    report = (workdir / "report.md").read_text()
    assert "folded_accuracy" in report and "| folded_agrees | 1 |" in report
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [10, 20]
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 8


def test_evaluating_a_finished_run_gives_its_last_metrics_again(paper_run, capsys):
    workdir, flags, run = paper_run
    before = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert main(["train", *flags, *run, "--config.eval_only=True", f"--workdir={workdir}"]) == 0
    assert "resumed from step 20" in capsys.readouterr().err
    after = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    wanted = next(r for r in reversed(before) if r["kind"] == "eval")
    assert after[-1] == wanted


def test_prediction_writes_a_class_for_every_image(paper_run, imagenet, tmp_path):
    workdir, flags, _ = paper_run
    output = tmp_path / "classes.csv"
    arguments = [f"--checkpoint={workdir}", f"--input={imagenet / 'val'}", f"--output={output}"]
    assert predict.main(["predict", *flags, *arguments]) == 0
    lines = output.read_text().splitlines()
    assert lines[0] == "file,class,probability" and len(lines) == 1 + 6
    for line in lines[1:]:
        _, label, probability = line.rsplit(",", 2)
        assert label in "01" and 0.5 <= float(probability) <= 1.0


def test_fine_tuning_takes_the_body_and_leaves_a_new_classifier(paper_run, tmp_path):
    import jax

    from train.command_line import read_flags
    from train.loop import Plan

    workdir, flags, run = paper_run
    words = ["train", *flags, *run, f"--workdir={tmp_path}", f"--config.init_from={workdir}"]
    words = [w for w in words if "num_classes" not in w] + ["--config.model_args.num_classes=5"]
    config, _ = read_flags(words, need_workdir=True)
    with pytest.raises(ValueError, match=r"classifier\.kernel has shape \(1280, 2\)"):
        Plan(config).fresh()
    config, _ = read_flags([*words, "--config.init_skip=classifier"], need_workdir=True)
    plan = Plan(config)
    state = plan.fresh()
    from train.checkpoints import load_params

    trained = load_params(workdir, ema=True)["params"]
    np.testing.assert_array_equal(
        state.params["conv_stem"]["kernel"], trained["conv_stem"]["kernel"]
    )
    head = state.ema["params"]["conv_head"]["bias"]
    np.testing.assert_array_equal(head, trained["conv_head"]["bias"])
    assert state.params["classifier"]["kernel"].shape == (1280, 5)
    assert jax.tree.structure(state) == jax.tree.structure(plan.abstract)


MISTAKES = {
    "--config.stepz=3": "config.stepz: no such key; did you mean config.steps?",
    "--config.optimizer.nme=adam": "did you mean config.optimizer.name?",
    "--config.steps=many": "config.steps: 'many' is not of type int (now 400)",
    "--config.task=clasification": "did you mean 'classification'?",
    "--config.model=vision.repgost": "did you mean 'vision.repghost'?",
    "--config.model_args.widht=0.3": "did you mean 'width'?",
    "--config.data.name=digit": "did you mean 'digits'?",
    "--config.data.options.imagesize=32": "did you mean 'image_size'?",
    "--config.model_args.width.x=1": "config.model_args.width holds no keys to set one of",
    "--config.data.options.a.b=1": "config.data.options.a holds no keys to set one of",
    "--config.precision=fp8": "config.precision: 'fp8'; known: float32, bfloat16, float16",
    "--config.parallel.fsdp=3": "config.parallel: 8 devices do not divide by 3",
    "--config.batch_size=9": "config.batch_size: 9 does not divide by 8",
    "--config.parallel.mode=pmapp": "config.parallel.mode: 'pmapp'; known: jit, pmap",
    "--config.eval.split=tset": "config.eval.split of digits 'tset'; did you mean 'test'?",
    "--config.log_every=0": "config.log_every: 0; it must be at least 1",
    "--config.optimizer.accumulate=0": "config.optimizer.accumulate: 0; it must be at least 1",
    "--config.dry_run=v5e": "config.dry_run: 'v5e'; known: host",
    "--config.init_from=/nowhere": "config.init_from: no file or directory '/nowhere'",
    "--wrkdir=x": "did you mean 'workdir'?",
    "steps=3": "unexpected argument 'steps=3'",
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_gets_one_line_that_names_it_and_what_is_right(flag, tmp_path, capsys):
    argv = ["train", f"--config={CONFIG}", f"--workdir={tmp_path}", flag]
    assert stop_with_one_line(main, argv) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and MISTAKES[flag] in error[-1]
    assert not list(tmp_path.glob("checkpoints/*"))


def test_wrong_files_presets_and_missing_flags_are_named(tmp_path, capsys):
    for argv, message in [
        ([f"--config={CONFIG[:-3]}t.py", "--workdir=x"], "did you mean 'repghost.py'"),
        ([f"--config={CONFIG}:papper", "--workdir=x"], "no preset 'papper'; known: small"),
        ([f"--config={CONFIG}"], "--workdir is missing"),
        (["--workdir=x"], "--config is missing"),
        ([f"--config={CONFIG}:paper", f"--workdir={tmp_path}", "--config.parallel.data=1"],
         "data.options.path"),
    ]:  # fmt: skip
        assert stop_with_one_line(main, ["train", *argv]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_dry_run_on_the_host_needs_no_data_and_counts(capsys):
    flags = [
        f"--config={TINY}",
        "--config.data.name=imagenet",
        "--config.data.options.image_size=32",
        "--config.data.options.path=/nowhere",
        "--config.parallel.fsdp=2",
        "--config.dry_run=host",
    ]
    assert main(["train", *flags]) == 0
    table = dict(
        line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line
    )
    assert "(data=4 fsdp=2 model=1)" in table["devices"]
    # 64 x 32 + 32, a BatchNorm of 32, 32 x 10 + 10.
    assert int(table["parameters"].strip().replace(",", "")) == 2080 + 64 + 330
    assert "[32, 32, 32, 3] float32" in table["batch.image"]
    assert "all-reduce" in table["collectives"]


def test_a_step_compiles_for_a_tpu_slice_on_a_machine_without_one():
    flags = [
        f"--config={TINY}",
        "--config.dry_run=v5e:2x2",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "train", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "4 x TPU v5 lite (data=4 fsdp=1 model=1)" in run.stdout
    assert "all-reduce" in run.stdout and "HBM-bound" in run.stdout


def test_a_step_that_does_not_fit_a_chip_says_so_on_one_line_with_what_would():
    flags = [
        f"--config={TINY}",
        "--config.dry_run=v5e:2x2",
        "--config.data.options.image_size=1024",
        "--config.batch_size=8192",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "train", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 2
    error = run.stderr.strip().splitlines()[-1]
    assert "does not fit: needs" in error and "this fits: --config.batch_size=" in error
