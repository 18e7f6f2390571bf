"""MH-UI and its rivals through the commands: published files, meshes, resuming, prediction."""

import dataclasses
import functools
import json
import pickle
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io
from PIL import Image

from jaxmodels.security.mhui import MHUIResNet
from jaxmodels.vision.resnet import ResNet
from train import predict
from train.__main__ import main
from train.building import build_task
from train.command_line import load_config, read_flags
from train.data import forgeries, forgery_folders, pipeline
from train.naming import ConfigError
from train.optimizers import make_schedule
from train.tasks import face_recognition
from train.tasks.adversarial_detection import (
    METHODS,
    AdversarialDetection,
    noise_images,
    parse_attack,
)
from train.tasks.face_recognition import sample_centers

ROOT = Path(__file__).resolve().parents[2]
MHUI = str(ROOT / "configs" / "mhui.py")
SECURITY = str(ROOT / "configs" / "ai_security.py")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """CIFAR-10 batches and SVHN files of a few images, as published."""
    root = tmp_path_factory.mktemp("cifar")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        labels = rng.integers(0, 10, 8)
        rows = np.clip(25 * labels[:, None] + rng.normal(0, 20, (8, 3072)), 0, 255)
        batch = {
            b"data": rows.astype(np.uint8),
            b"labels": [int(v) for v in labels],
            b"batch_label": b"testing",
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    for split in ("train", "test"):
        x = rng.integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
        y = np.array([[10], [1], [2], [10], [9]], np.uint8)
        scipy.io.savemat(root / f"{split}_32x32.mat", {"X": x, "y": y})
    return root


def flags_of(config, workdir, *more):
    return [
        "train",
        f"--config={config}",
        f"--workdir={workdir}",
        "--config.log_every=1",
        "--config.eval.every=0",
        "--config.checkpoint.best_metric=",
        *more,
    ]


def losses_of(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in rows if r["kind"] == "train"}


TINY = (
    "--config.model_args.width=2",
    "--config.model_args.head_features=4",
    "--config.model_args.layers=(1,1,1,1)",
)


def test_the_paper_recipe_runs_on_published_files_resumes_and_predicts(cifar, tmp_path):
    flags = [
        *TINY,
        "--config.model=security.mhui",
        f"--config.data.options.path={cifar}",
        "--config.batch_size=8",
        "--config.eval.batch_size=8",
        "--config.schedule.boundaries=(0,7,14,20)",
        "--config.schedule.hold_for=2",
        "--config.task_args.attacks=('fgsm:0.1',)",
        "--config.checkpoint.every=10",
        "--config.parallel.data=1",
    ]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main(flags_of(f"{MHUI}:paper", whole, *flags, "--config.steps=20")) == 0
    losses = losses_of(whole)
    assert len(losses) == 20 and np.isfinite(list(losses.values())).all()
    report = (whole / "report.md").read_text()
    assert "fgsm:0.1/auroc" in report and "fgsm:0.1/baseline_auroc" in report
    assert main(flags_of(f"{MHUI}:paper", part, *flags, "--config.steps=10")) == 0
    assert main(flags_of(f"{MHUI}:paper", part, *flags, "--config.steps=20")) == 0
    assert losses_of(part) == losses  # bit for bit
    image = tmp_path / "image.png"
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(image)
    output = tmp_path / "scores.csv"
    call = [f"--checkpoint={whole}", f"--input={image}", f"--output={output}"]
    assert predict.main(["predict", f"--config={MHUI}:paper", *flags, *call]) == 0
    head, row = output.read_text().splitlines()
    assert head.startswith("file,class,probability,suspicious,d_ent_first") and "mi_trace" in head
    assert len(row.split(",")) == len(head.split(","))


def test_a_run_on_a_mesh_agrees(cifar, tmp_path):
    """Data and fsdp over eight devices; BatchNorm, of trunk and heads, sees the global batch."""
    flags = [
        # The smallest network with heads at two depths: what compiles in seconds.
        "--config.model=security.mhui:MHUIVGG",
        "--config.model_args.cfg=(4,'M',8,'M')",
        "--config.model_args.head_features=8",
        f"--config.data.options.path={cifar}",
        "--config.steps=2",
        "--config.batch_size=16",
        "--config.eval.batch_size=8",
        "--config.schedule.boundaries=(0,1,2,3)",
        "--config.schedule.rates=(0.01,0.01,0.01,0.01)",
        "--config.schedule.hold_for=1",
        "--config.checkpoint.every=0",
        "--config.task_args.attacks=()",
    ]
    one, mesh = tmp_path / "one", tmp_path / "mesh"
    paper = f"{MHUI}:paper"
    assert main(flags_of(paper, one, *flags, "--config.parallel.data=1")) == 0
    spread = ("--config.parallel.data=4", "--config.parallel.fsdp=2")
    assert main(flags_of(paper, mesh, *flags, *spread)) == 0
    losses = list(losses_of(one).values())
    assert abs(losses[1] - losses[0]) > 1e-3
    np.testing.assert_allclose(list(losses_of(mesh).values()), losses, rtol=2e-4)


def test_svhn_calls_ten_zero_and_missing_files_are_named(cifar):
    data = {"name": "cifar:svhn", "options": {"path": str(cifar)}}
    batch = next(pipeline.eval_batches(data, "test", batch_size=5))
    np.testing.assert_array_equal(batch["label"], [0, 1, 2, 0, 9])
    assert batch["image"].dtype == np.float32 and batch["image"].max() <= 1
    data = {"name": "cifar:cifar100", "options": {"path": str(cifar)}}
    with pytest.raises(FileNotFoundError, match=r"no file cifar-100-python/test of cifar100"):
        next(pipeline.eval_batches(data, "test", batch_size=5))


def test_a_cifar_file_that_would_run_code_is_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    data = {"name": "cifar", "options": {"path": str(tmp_path)}}
    with pytest.raises(pickle.UnpicklingError, match=r"names os\.system"):
        next(pipeline.eval_batches(data, "test", batch_size=5))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_loss_predictions_and_scores(method):
    if method == "mhui":
        model = MHUIResNet(width=2, layers=(1, 1, 1, 1), head_features=3, num_classes=4)
    else:
        dropout = 0.5 if method == "mc_dropout" else 0.0
        model = ResNet(layers=(1, 1, 1, 1), width=2, num_classes=4, dropout=dropout)
    task = AdversarialDetection(model, method, members=2, samples=3)
    batch = {
        "image": jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((4,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((4,), jnp.float32),
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, extra = jax.eval_shape(task.init, key, batch)
    loss, (new, _) = jax.eval_shape(task.loss, params, extra, batch, key)
    assert loss.shape == () and jax.tree.structure(new) == jax.tree.structure(extra)
    variables = {"params": params, **extra}
    outputs = jax.eval_shape(task.outputs, variables, batch["image"], key)
    views = {"mhui": 4, "ensemble": 2, "mc_dropout": 3}.get(method, 1)
    assert outputs.shape == (4, views, 4)
    scores = jax.eval_shape(task.scores, outputs)
    assert all(v.shape == (4,) for v in scores.values())
    assert ("mi" in scores) == (method not in ("mhui", "softmax"))
    sums = jax.eval_shape(task.evaluate, variables, batch)
    assert {"accuracy", "count"} <= sums.keys()
    given = (variables, batch["image"], batch["label"], key)
    for name in ("adaptive", "adaptive_l2", "ni", "apgd_ce_l2", "square_l2", "deepfool", "cw"):
        attacked = jax.eval_shape(lambda *a, name=name: task.attacked(*a, 0.1, name), *given)
        assert attacked.shape == (4, 16, 16, 3), name


class Small(nn.Module):
    """A smooth network with dropout before its classifier."""

    @nn.compact
    def __call__(self, x, train=False, sample_dropout=False):
        x = jnp.tanh(nn.Dense(16)(x.reshape(len(x), -1)))
        return 3 * nn.Dense(4)(nn.Dropout(0.5, deterministic=not (train or sample_dropout))(x))


def small_task(method, **options):
    """(task, its variables, images, labels as predicted)."""
    task = AdversarialDetection(Small(), method, members=3, samples=8, **options)
    rng = np.random.default_rng(0)
    x = rng.uniform(0.2, 0.8, (32, 4, 4, 3)).astype(np.float32)
    params, extra = task.init(jax.random.key(0), {"image": x})
    variables = {"params": params, **extra}
    outputs = task.outputs(variables, x, jax.random.key(1))
    return task, variables, x, task.probabilities(outputs).argmax(-1)


@pytest.mark.parametrize("method", ["mc_dropout", "ensemble", "dpn_reverse"])
def test_rivals_are_attacked_through_the_score_they_report(method):
    task, variables, x, y = small_task(method, detector="mi", adaptive_weight=5.0)

    @functools.partial(jax.jit, static_argnames="name")
    def reported(name):
        images = task.attacked(variables, x, y, jax.random.key(2), 0.2, name)
        scores = task.scores(task.outputs(variables, images, jax.random.key(3)))
        return scores[task.reported_score(scores)].mean()

    assert reported("adaptive") < 0.9 * reported("pgd")


def test_what_an_adaptive_attack_lowers_goes_with_the_configured_score():
    outputs = jnp.asarray(np.random.default_rng(0).normal(0, 2, (50, 3, 4)), jnp.float32)
    for options in (
        {},
        {"estimator": "minka"},
        {"detector": "mi", "estimator": "geo"},
        {"detector": "d_ent"},
        {"detector": "last_head"},
        {"method": "ensemble", "detector": "ent"},
        {"method": "dpn_forward"},
    ):
        task = AdversarialDetection(None, attacks=(), **options)
        scores = task.scores(outputs)
        own = np.asarray(scores[task.reported_score(scores)])
        lowered = np.asarray(task.suspicion(outputs))
        np.testing.assert_array_equal(np.argsort(own), np.argsort(lowered))


def test_monte_carlo_dropout_is_attacked_with_its_dropout_on():
    task, variables, x, y = small_task("mc_dropout", attacked_samples=1)
    attack = jax.jit(task.attacked, static_argnames="name")
    found = [attack(variables, x, y, jax.random.key(i), 0.1, name="fgsm") for i in (0, 0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    assert (np.asarray(found[0]) != np.asarray(found[2])).mean() > 0.1


def test_a_table_tells_how_many_an_attack_misled_and_how_far_they_were_moved():
    task, variables, x, y = small_task("softmax", attacks=("pgd_l2:0.5", "cw"))
    tables = task.detection(variables, x, np.asarray(y), batch_size=32)
    assert tables["clean"]["accuracy"] == 1
    far, near = tables["pgd_l2:0.5"], tables["cw"]
    assert 0 < far["success"] <= 1 and far["l2"] <= 0.5 + 1e-5
    assert near["success"] >= far["success"] and 0 < near["l2"] < far["l2"]


def test_labels_beyond_the_networks_classes_are_refused():
    model = ResNet(layers=(1, 1, 1, 1), width=2, num_classes=4)
    task = AdversarialDetection(model, "softmax", attacks=())
    variables = jax.tree.map(
        lambda s: np.ones(s.shape, s.dtype),
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3))),
    )
    images = np.zeros((2, 16, 16, 3), np.float32)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\), got 1 to 4"):
        task.detection(variables, images, np.asarray([1, 4]), batch_size=2)


def test_options_that_do_not_fit_the_network_or_the_data_are_named():
    config = load_config(f"{MHUI}:paper")
    with config.unlocked():
        config.data.name = "cifar:cifar100"
    with pytest.raises(ConfigError, match=r"num_classes: 10, .* cifar:cifar100 has 100 classes"):
        build_task(config)
    for name, options, message in (
        ("textures", {}, "images of textures are standardized.*set config.data.options.standard"),
        ("imagenet", {}, "images of imagenet are standardized.*it has no"),
    ):
        with config.unlocked():
            config.data.name, config.data.options = name, options
        with pytest.raises(ConfigError, match=message):
            build_task(config)
    model = MHUIResNet(width=2, layers=(1, 1, 1, 1), head_features=3, num_classes=4)
    with pytest.raises(ConfigError, match="head_weights: 1 for 4 heads"):
        AdversarialDetection(model, head_weights=(1.0,))
    with pytest.raises(ConfigError, match="prediction: 'final_head'; softmax knows: mean"):
        AdversarialDetection(model, "softmax", prediction="final_head")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"detector": "epk"}, "detector: 'epk'; did you mean 'epkl'"),
        ({"detector": "expected_ent"}, "detector: 'expected_ent'"),
        ({"detector": "last_head", "method": "softmax"}, "detector: 'last_head'"),
        ({"estimator": "trase"}, "estimator: 'trase'; did you mean 'trace'"),
        ({"target": "all"}, "target: 'all'"),
        ({"steps": 0}, "steps: 0 is no count"),
        ({"samples": 0}, "samples: 0 is no count"),
        ({"members": 0}, "members: 0 is no count"),
        ({"cw_steps": 2.5}, "cw_steps: 2.5 is no count"),
    ],
)
def test_a_misspelled_or_empty_option_never_reports_something_else(wrong, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        AdversarialDetection(None, **wrong)


def test_the_reported_score_is_the_configured_one_or_the_best_that_a_rival_has():
    outputs = jax.nn.one_hot(jnp.array([[0, 1]]), 3)
    for options, name in (
        ({"detector": "mi", "estimator": "geo"}, "mi_geo"),
        ({"detector": "ent"}, "ent"),
        ({"detector": "last_head"}, "last_head"),
        ({"method": "ensemble", "detector": "max_p"}, "max_p"),
        ({"method": "ensemble"}, "mi"),
        ({"method": "dpn_forward"}, "epkl"),
    ):
        task = AdversarialDetection(None, attacks=(), **options)
        assert task.reported_score(task.scores(outputs)) == name


def test_the_class_can_be_the_last_heads():
    outputs = jnp.asarray([[[0.0, 3.0, 0.0], [0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]])
    for prediction, label in (("mean", 1), ("final_head", 0)):
        task = AdversarialDetection(None, prediction=prediction, attacks=())
        assert int(task.probabilities(outputs).argmax(-1)[0]) == label


def test_noise_is_of_three_kinds_within_the_pixel_range():
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (64, 8, 8, 3)), jnp.float32)
    noise = noise_images(jax.random.key(0), x)
    assert noise.shape == x.shape and float(noise.min()) >= 0 and float(noise.max()) <= 1
    assert float(jnp.abs(noise - x).reshape(64, -1).max(1).min()) > 0.1


def test_the_learning_rate_goes_through_the_recipes_corners():
    from configs.mhui import get_config

    config = get_config("paper")
    rate = make_schedule(config.schedule, config.steps)
    epoch = 50000 // 256
    got = [float(rate(k * epoch)) for k in (0, 35, 70, 100)]
    np.testing.assert_allclose(got, (7.5e-5, 7.5e-4, 7.5e-5, 1e-6), rtol=1e-4)
    assert float(rate(epoch)) == float(rate(2 * epoch - 1))


def test_claims_know_what_is_left_to_attack_and_every_preset_builds(tmp_path, monkeypatch):
    from benchmarks import mhui_claims, runs

    for name in ("RUNS", "SIZES"):
        monkeypatch.setattr(mhui_claims, name, tmp_path / f"{name}.csv")
    everything = (*mhui_claims.ATTACKS, *mhui_claims.ADAPTIVE)
    assert mhui_claims.missing("mhui", 0) == everything
    for attack in ("fgsm:0.05", "cw"):
        row = dict.fromkeys(mhui_claims.COLUMNS, "")
        runs.append(mhui_claims.RUNS, row | {"method": "mhui", "seed": 0, "attack": attack})
    # A score without the length of the perturbation is half of what C&W is asked for.
    assert mhui_claims.missing("mhui", 0) == everything[1:]
    assert mhui_claims.missing("mhui", 1) == everything
    for preset in {mhui_claims.PRESETS.get(m, m) for m in mhui_claims.KNOWN} - {
        *mhui_claims.VARIANTS
    }:
        assert build_task(load_config(f"{MHUI}:{preset}")).model.num_classes in (10, 15)


@pytest.mark.parametrize("spec", ["pdg:0.1", "pgd", "pgd:-1", "fgsm:x", "cw_l2", "cw:0.5"])
def test_unknown_attacks_are_named(spec):
    with pytest.raises(ConfigError, match=r"config\.task_args\.attacks"):
        parse_attack(spec)


def test_sampled_centers_keep_every_class_of_the_batch():
    weight = jnp.arange(50.0)[:, None]
    labels = jnp.array([3, 49, 3, 17])
    centers, places = sample_centers(jax.random.key(0), weight, labels, 0.1)
    assert centers.shape == (5, 1)
    np.testing.assert_array_equal(centers[places, 0], labels)


def test_three_margins_can_be_given_on_the_command_line(tmp_path):
    def margins(text):
        config, _ = read_flags(
            [
                "train",
                f"--config={SECURITY}:face",
                f"--config.task_args.margin={text}",
                f"--workdir={tmp_path}",
            ],
            need_workdir=True,
        )
        return face_recognition.margins_of(build_task(config).margin)

    assert margins("cosface") == (1.0, 0.0, 0.4)
    assert margins("(1,0.3,0)") == margins("1,0.3,0") == margins("[1, 0.3, 0]") == (1.0, 0.3, 0.0)
    for text, message in (
        ("arcfase", "margin: 'arcfase'; known: arcface"),
        ("(1,0.3)", "margins (m1, m2, m3) need m3 > 0"),
        ("(0.9,0.3,0)", "or m1 = 1 with m3 = 0; got (0.9, 0.3, 0.0)"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            margins(text)


def tiny_images(root, names, count=5, size=32):
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(count):
            pixels = rng.normal(60 + 40 * i, 20, (size, size, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{j}.png")


def paper_run(preset, workdir, path, *more):
    common = [
        f"--config.data.options.path={path}",
        "--config.data.options.workers=0",
        "--config.precision=float32",
        "--config.steps=20",
        "--config.parallel.data=1",
        "--config.checkpoint.every=0",
    ]
    assert main(flags_of(f"{SECURITY}:{preset}", workdir, *common, *more)) == 0
    losses = losses_of(workdir)
    assert len(losses) == 20 and np.isfinite(list(losses.values())).all()
    return (workdir / "report.md").read_text()


def test_attribution_runs_on_the_published_folder_layout(tmp_path):
    root = tmp_path / "fakes"
    names = ("IdentitySwap/FaceSwap", "IdentitySwap/DeepFaceLab", "EntireFaceSynthesis/StyleGAN")
    tiny_images(root, [f"{name}/ff" for name in names], count=10)
    report = paper_run(
        "paper",
        tmp_path / "run",
        root,
        "--config.data.options.known_methods=('FaceSwap','DeepFaceLab')",
        "--config.data.options.image_size=32",
        "--config.model_args.classes=3",
        "--config.model_args.layers=(1,1,1,1)",
        "--config.model_args.width=2",
        "--config.model_args.block=basic",
        "--config.model_args.stem=cifar",
        "--config.task_args.known=2",
        "--config.task_args.supervised_steps=5",
        "--config.task_args.rounds=(12,16)",
        "--config.batch_size=4",
        "--config.eval.batch_size=4",
    )
    for name in ("known_acc", "novel_nmi", "same_tool_auc", "kmeans_novel_nmi"):
        assert name in report


def test_classes_are_methods_with_their_data_set_and_videos_stay_whole(tmp_path):
    for name, count in (
        ("A/StyleGAN2/X", 1),
        ("A/StyleGAN2/Y", 1),
        ("B/FOMM/X", 6),
        ("R/Real/X", 6),
    ):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for video in range(count):
            for frame in range(4):
                (folder / f"c23-{video:03d}-{frame}.png").touch()
    open_world = forgery_folders.folders(str(tmp_path), ("FOMM",), real=False, by_video=False)
    assert open_world.classes == ("FOMM/X", "StyleGAN2/X", "StyleGAN2/Y")
    assert open_world.known_count == 1
    train, test = open_world.faces("train"), open_world.faces("test")
    assert len(train) == 20 + 2 * 4 and len(test) == 4
    assert sum(face.labeled for face in train) == 15  # three quarters, of the known class only
    assert {face.label for face in train if face.labeled} == {0}
    assert not {f.path for f in train} & {f.path for f in test}
    one = forgery_folders.folders(str(tmp_path), ("StyleGAN2/Y",), real=True, by_video=False)
    assert one.classes[0] == "StyleGAN2/Y" and one.known_count == 1 and one.is_real(2)
    with pytest.raises(ValueError, match="no folder of 'StyleGAN'"):
        _ = forgery_folders.folders(str(tmp_path), ("StyleGAN",), True, False).classes
    whole = forgery_folders.folders(str(tmp_path), (), real=True, by_video=True)
    videos = [{(f.label, f.video) for f in whole.faces(split)} for split in ("train", "test")]
    assert not videos[0] & videos[1] and len(videos[1]) == 2
    # Every file of the test split is judged once, under its own label and video.
    data = {"name": "forgeries:detection", "options": {"set": "folders", "path": str(tmp_path)}}
    module, options = pipeline.resolve(data)
    assert module.split_sizes(options)["test"] == len(whole.faces("test")) == 8


def test_published_forgery_recipes_augment_as_published_and_know_protocol_one():
    config = load_config(f"{SECURITY}:paper")
    assert (config.task_args.known, config.model_args.classes) == (8, 20)
    assert len(pipeline.resolve(config.data)[1]["known_methods"]) == 8
    options = pipeline.resolve(load_config(f"{SECURITY}:paper_detection").data)[1]
    shares = {k: options[k] for k in ("blur", "light", "brightness", "contrast", "jpeg")}
    assert shares == {"blur": 0.5, "light": 0.5, "brightness": 0.1, "contrast": 0.1, "jpeg": 0.5}
    assert options["jpeg_quality"] == (40, 100)
    crop = {**pipeline.resolve(config.data)[1], "resized_crop": 1.0, "light": 1.0}
    image = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
    seen = forgeries._augmented(np.random.default_rng(1), image, crop)
    assert seen.shape == image.shape and seen.dtype == np.uint8 and (seen != image).any()


def test_detection_runs_on_folders_with_a_method_of_real_faces(tmp_path):
    root = tmp_path / "fakes"
    tiny_images(root, ["IdentitySwap/FaceSwap/ff", "RealFace/Real/ff"], count=10)
    report = paper_run(
        "paper_detection",
        tmp_path / "run",
        root,
        "--config.model=security.tiny_conv:TinyConvClassifier",
        "--config.model_args.classes=2",
        "--config.data.options.image_size=32",
        "--config.batch_size=4",
        "--config.eval.batch_size=4",
    )
    assert "video_auc" in report and "log_loss" in report
    fakes = tmp_path / "fakes_only"
    tiny_images(fakes, ["IdentitySwap/FaceSwap/ff"])
    module, options = pipeline.resolve({"name": "forgeries:detection", "options": {"path": fakes}})
    with pytest.raises(ValueError, match="a method named real"):
        module.source("train", {**options, "set": "folders"})


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("task_args.known=4", "config.task_args.known: 4, the data have 5 known classes"),
        ("model_args.classes=8", "config.model_args.classes: 8, the data have 9"),
    ],
)
def test_a_network_and_a_task_of_other_classes_than_the_data_are_refused(flag, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        main(flags_of(SECURITY, tmp_path, f"--config.{flag}"))


def test_faces_are_embedded_from_folders_with_sampled_centers(tmp_path):
    for split in ("train", "test"):
        tiny_images(tmp_path / "faces" / split, ["anna", "berta", "clara"])
    report = paper_run(
        "paper_face",
        tmp_path / "run",
        tmp_path / "faces",
        "--config.model=vision.iresnet",
        "--config.model_args.layers=(1,1,1,1)",
        "--config.model_args.width=4",
        "--config.model_args.num_features=8",
        "--config.model_args.input=(32,32)",
        "--config.data.options.image_size=32",
        "--config.task_args.classes=3",
        "--config.task_args.sample_rate=0.9",
        "--config.task_args.pairs=40",
        "--config.schedule.peak=0.01",
        "--config.batch_size=4",
        "--config.eval.batch_size=5",
    )
    assert "verification_accuracy" in report and "threshold" in report
    config = load_config(f"{SECURITY}:paper_face")
    with config.unlocked():
        config.data.options.path = str(tmp_path / "faces")
        config.task_args.classes = 2
    with pytest.raises(ConfigError, match=r"task_args\.classes: 2, the data have 3 identities"):
        face_recognition.from_config(config)


def test_configs_are_frozen_dataclasses_of_their_tasks():
    assert dataclasses.is_dataclass(AdversarialDetection)
    from configs import ai_security, mhui

    for module in (ai_security, mhui):
        for preset in module.PRESETS:
            assert module.get_config(preset).steps > 0
        with pytest.raises(ValueError, match="no preset 'papper'"):
            module.get_config("papper")
