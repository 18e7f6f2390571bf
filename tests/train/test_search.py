"""Supernets by the commands: published recipes on files, resuming, devices, and the search."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxmodels.search import scalenet_space
from tests.search.test_vitas import ARGUMENTS as VITAS
from tests.search.tiny_space import ARGUMENTS
from train.building import build_task
from train.checkpoints import load_params
from train.command_line import load_config, read_flags, stop_with_one_line
from train.loop import Plan, fit
from train.optimizers import make_optimizer
from train.search import __main__ as command

ROOT = Path(__file__).resolve().parents[2]
SCALENET, VITAS_CONFIG = (str(ROOT / "configs" / f"{n}.py") for n in ("scalenet", "vitas"))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """ImageNet's folders: three classes, ten training and two validation JPEGs each."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 2)):
        for label, wnid in enumerate(("n01", "n02", "n03")):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(60 + 60 * label, 20, (30 + i, 36, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{wnid}_{i}.JPEG")
    return root


def reduced(file, preset, imagenet, steps=20):
    """A paper preset at the size of a test, on these folders."""
    config = load_config(f"{file}:{preset}")
    with config.unlocked():
        config.data.options.update(threads=1, every=5)
        config.data.options.inner.update(image_size=16, path=str(imagenet))
        config.update(steps=steps, batch_size=8, precision="float32", log_every=5, seed=1)
        config.schedule.update(warmup_steps=5)
        config.eval.update(every=0, batch_size=6, split="test")
        config.checkpoint.every = 10
        config.parallel.data = 1
        if file == SCALENET:
            config.model_args = {**ARGUMENTS, "depthwise": "grouped"}
            config.schedule.peak = 0.05
        else:
            config.model_args = {**VITAS, "compat": "official"}
            config.task_args.update(flops_min=0.0, budget=0.0, probability=0.3)
    return config


def rows(workdir, kind="train"):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


@pytest.fixture(scope="module", params=[(SCALENET, "paper"), (VITAS_CONFIG, "paper")],
                ids=["scalenet", "vitas"])  # fmt: skip
def paper_run(request, imagenet, tmp_path_factory):
    """Twenty steps of a supernet's published recipe, in one go."""
    workdir = tmp_path_factory.mktemp("paper")
    config = reduced(*request.param, imagenet)
    return config, workdir, fit(config, workdir)


def test_the_published_recipe_runs_twenty_steps_on_imagenet_folders(paper_run):
    _, workdir, numbers = paper_run
    losses = [r["loss"] for r in rows(workdir)]
    assert len(losses) == 4 and all(np.isfinite(losses))
    assert 0 <= numbers["accuracy"] <= 1
    assert any(name.startswith("accuracy_") for name in numbers)


def test_a_supernet_stopped_halfway_goes_on_to_the_same_weights(paper_run, tmp_path):
    config, workdir, _ = paper_run
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    fit(config, tmp_path / "run")
    ours, theirs = load_params(tmp_path / "run", ema=False), load_params(workdir, ema=False)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    if "counters" in theirs:
        assert np.any(theirs["counters"]["calls"])  # the sides' counters are part of the state


def test_prediction_writes_a_class_for_every_image(paper_run, imagenet, tmp_path):
    config, workdir, _ = paper_run
    variables = load_params(workdir, ema=False)
    found = build_task(config).predict(variables, imagenet / "val", config)
    assert found[0] == ("file", "class", "probability") and len(found) == 1 + 6


@pytest.mark.parametrize(
    ("file", "axes"),
    (
        (VITAS_CONFIG, {"data": 8}),
        (VITAS_CONFIG, {"data": 2, "fsdp": 4}),
        (SCALENET, {"data": 2, "fsdp": 4}),
    ),
    ids=("vitas-data", "vitas-fsdp", "scalenet-fsdp"),
)
def test_supernets_train_alike_on_eight_devices(file, axes, imagenet):
    config = reduced(file, "paper", imagenet, steps=1)
    with config.unlocked():  # what compiles in seconds
        if file == SCALENET:
            ops = ("id", "ir_3x3_se")
            config.model_args.backbone = scalenet_space.backbone((4, 6), (2,), (2,), 2, 8, ops)
        else:
            config.model_args.update(depth=1, heads=(1, 2))
    losses = []
    for devices in ({"data": 1}, axes):
        with config.unlocked():
            config.parallel.update({"data": 1, "fsdp": 1, **devices})
        plan = Plan(config)
        spec = plan.spec["image"].shape
        rng = np.random.default_rng(0)
        batch = {"image": rng.normal(size=(8, *spec)).astype(np.float32),
                 "label": np.arange(8, dtype=np.int32) % 3}  # fmt: skip
        _, metrics = plan.run.step(plan.run.place(plan.fresh()), plan.run.put(batch))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_search_command_finds_resumes_and_reports(paper_run, tmp_path):
    config, workdir, _ = paper_run
    task, variables = build_task(config), load_params(workdir, ema=True)
    with config.unlocked():
        config.search.update(population=4, generations=1, chunk=4, compare=False, batch_size=4)
        if config.search.kind == "mcea":
            config.search.update(budget=21_000.0, base_error=9_000.0, scale_error=9_000.0,
                                 base_models=2, iterations=1)  # fmt: skip
            config.search.scale_error = 20_000.0
        else:
            config.search.update(flops_min=20_000.0, budget=60_000.0)
    run = getattr(command, f"_{config.search.kind}")
    found, table, points = run(config, task, variables, tmp_path)
    assert table["traces of the scoring function"] == 1
    stages = found.get("stages", {})
    assert all(s.keys() >= {"stages", "width", "resolution", "flops"} for s in stages.values())
    assert list(stages) in ([], ["S0", "S1", "S2", "S3", "S4"])
    again, table, _ = run(config, task, variables, tmp_path)
    assert again == found and table["traces of the scoring function"] <= 1
    command.draw_frontier(points, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 3000


def test_retraining_recipes_are_planned_for_the_published_sizes():
    found = {}
    for file in (SCALENET, VITAS_CONFIG):
        config = load_config(f"{file}:paper_net")
        with config.unlocked():
            config.parallel.data = 1
        plan = Plan(config)
        found[file] = sum(int(np.prod(a.shape)) for a in jax.tree.leaves(plan.abstract.params))
        assert plan.spec["image"].shape == (224, 224, 3)
    model = plan.task.model
    assert model.drop_path_rate == 0.1 and found[VITAS_CONFIG] == 6_048_414
    assert 4e6 < found[SCALENET] < 6e6


def test_what_was_found_can_be_retrained(tmp_path):
    """The rows of `found.json` are constructor arguments, by the command line's own reading."""
    flags = ["--config.model_args.stages=[[0], [1], [2, 2], [1, 1, 1], [1], [0], [0], [0]]",
             "--config.model_args.width=1.2", "--config.data.options.image_size=240"]  # fmt: skip
    config, _ = read_flags(["train", f"--config={SCALENET}:paper_net", f"--workdir={tmp_path}",
                            *flags], need_workdir=True)  # fmt: skip
    with config.unlocked():
        config.model_args.backbone = scalenet_space.DIGITS["backbone"]
        config.model_args.head = scalenet_space.DIGITS["head"]
    module = build_task(config).model
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 16, 16, 3)))["params"]
    assert "net.backbone_stage3_2.1.conv2" in shapes


def test_mistakes_in_a_search_are_one_line(tmp_path, capsys):
    for argv, message in [
        ([f"--config={ROOT / 'configs' / 'repghost.py'}", f"--checkpoint={tmp_path}",
          f"--workdir={tmp_path}"], "this config has no search"),
        ([f"--config={SCALENET}", f"--workdir={tmp_path}"], "--checkpoint is missing"),
        ([f"--config={SCALENET}", f"--checkpoint={tmp_path}", f"--workdir={tmp_path}",
          "--config.task_args.law=evenly"], "config.task_args.law: 'evenly'; known: hierarchical"),
        ([f"--config={SCALENET}", f"--checkpoint={tmp_path}", f"--workdir={tmp_path}",
          "--config.parallel.mode=pmap"], "pmap would draw another sub-network on every device"),
    ]:  # fmt: skip
        assert stop_with_one_line(command.main, ["search", *argv]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_what_ends_a_search_is_one_line(tmp_path, monkeypatch, capsys):
    def barren(*_):
        (tmp_path / "search.json").write_text("{}")  # as a search that has begun
        raise RuntimeError("no scaling of stage 1 keeps to 2 x the base model's multiply-adds")

    weights = {"params": np.ones(3, np.float32)}
    monkeypatch.setattr("train.search.settings.load_supernet", lambda *_: weights)
    monkeypatch.setattr(command, "_mcea", barren)
    argv = [f"--config={SCALENET}", f"--checkpoint={tmp_path}", f"--workdir={tmp_path}"]

    def message(*more):
        assert stop_with_one_line(command.main, ["search", *argv, *more]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "config.search: no scaling of stage 1" in message()
    assert "no scaling" in message("--config.search.chunk=3")  # the same search
    assert "config.search.budget: now 1.0, not 110000.0" in message("--config.search.budget=1.0")
    weights["params"] = np.zeros(3, np.float32)
    assert "the supernet's weights: now others" in message()


def test_convolutions_decay_twice_as_much_as_the_linear_layer():
    config = load_config(SCALENET)
    params = {
        "net.backbone_stage1_0.1.conv2": {"kernel": np.ones((1, 1, 2, 2))},
        "net.backbone_stage1_0.1.bn2": {"scale": np.ones(2), "bias": np.ones(2)},
        "net.head_linear1.0.module.0": {"kernel": np.ones((2, 2)), "bias": np.ones(2)},
    }
    optimizer = make_optimizer(config.optimizer, lambda step: 1.0)
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    decay = {k: {n: -float(v.ravel()[0]) / 1.9 for n, v in leaf.items()}
             for k, leaf in updates.items()}  # fmt: skip
    assert decay["net.backbone_stage1_0.1.conv2"]["kernel"] == pytest.approx(8e-5)
    both = pytest.approx(4e-5)  # the official groups name convolutions and norms alone
    assert decay["net.head_linear1.0.module.0"] == {"kernel": both, "bias": both}
    assert decay["net.backbone_stage1_0.1.bn2"] == {"scale": 0.0, "bias": 0.0}
