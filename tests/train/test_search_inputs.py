"""What the search command takes and refuses: checkpoints, settings, options, labels."""

import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from jaxmodels.interop import catalog
from jaxmodels.search import soft_labels
from tests.search import tiny_space
from tests.search.test_vitas import ARGUMENTS
from tests.search.tiny_space import drawn_variables
from train.building import build_task
from train.checkpoints import Checkpoints
from train.command_line import read_flags, stop_with_one_line
from train.naming import ConfigError
from train.search import __main__ as command
from train.search import settings
from train.state import create_state

ROOT = Path(__file__).resolve().parents[2]
SCALENET, VITAS = (f"--config={ROOT / 'configs' / n}.py" for n in ("scalenet", "vitas"))
TINY = {**ARGUMENTS, "classes": 10, "compat": "corrected"}
FLAGS = [
    "--config.model=search.vitas", "--config.data.options.inner.image_size=16",
    "--config.search.flops_min=2e4", "--config.search.budget=6e4",
    *(f"--config.model_args.{k}={v}" for k, v in TINY.items()),
]  # fmt: skip


def config_of(*flags):
    argv = ["search", VITAS, *FLAGS, "--workdir=unused", *flags]
    return read_flags(argv, need_workdir=True)[0]


@pytest.fixture(scope="module")
def variables():
    return drawn_variables(build_task(config_of()).model)


@pytest.fixture(scope="module")
def run(variables, tmp_path_factory):
    """A run directory as training leaves one, of weights that were drawn."""
    workdir = tmp_path_factory.mktemp("run")
    config = config_of().to_dict()
    state = create_state(variables["params"], {}, optax.sgd(1.0), jax.random.key(0), ema=False)
    checkpoints = Checkpoints(workdir / "checkpoints", config=config)
    checkpoints.save(1, state, {}, wait=True)
    checkpoints.close()
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


@pytest.fixture(scope="module")
def file(variables, tmp_path_factory):
    """The same weights as PyTorch names them."""
    path = tmp_path_factory.mktemp("file") / "superformer.safetensors"
    catalog.save(path, "search.vitas", build_task(config_of()).model, variables)
    return path


@pytest.fixture
def search(run, tmp_path, monkeypatch, capsys):
    """`flags -> (status, last line)` of the command, with a search that does nothing."""

    def nothing(config, task, variables, workdir):
        (workdir / "search.json").write_text("{}")  # as one that has begun
        found = {"flags": ["--config.model_args.blocks=((1, 36, 5), None)"]}
        return found, {"scored": 0}, np.array([[1e6, 50.0]])

    monkeypatch.setattr(command, "_genome", nothing)
    monkeypatch.setattr(command, "_mcea", nothing)

    def run_command(*flags, config=(VITAS, *FLAGS), checkpoint=run):
        argv = ["search", *config, f"--checkpoint={checkpoint}", f"--workdir={tmp_path / 'found'}"]
        status = stop_with_one_line(command.main, [*argv, *flags])
        printed = capsys.readouterr()
        return status, (printed.err or printed.out).strip().splitlines()[-1]

    return run_command


def test_a_search_goes_on_with_its_own_model_task_and_data_alone(search, file, tmp_path):
    assert search()[0] == 0
    report = (tmp_path / "found" / "report.md").read_text()
    assert "'--config.model_args.blocks=((1, 36, 5), None)'" in report  # as a shell takes it
    assert search("--config.search.chunk=3", "--config.data.options.threads=2")[0] == 0
    for flag, message in [
        ("search.population=7", "config.search.population: now 7, not 50"),
        ("data.options.every=3", "config.data.options.every: now 3, not 5"),
    ]:
        status, line = search(f"--config.{flag}")
        assert status == 2 and message in line and "take another --workdir" in line
    # A file does not say how it was trained; the search's own settings do.
    for flag, message in [
        ("task_args.sharing=two_sided", "task_args.sharing: now 'two_sided', not 'cyclic'"),
        ("model_args.compat=official", "model_args.compat: now 'official', not 'corrected'"),
    ]:
        status, line = search(f"--config.{flag}", checkpoint=file)
        assert status == 2 and f"other settings (config.{message})" in line


def test_a_checkpoint_of_another_network_or_training_is_refused(search, run):
    for flags, message in [
        (["--config.task_args.sharing=one_sided"],
         "it was trained with config.task_args.sharing 'cyclic', now 'one_sided'"),
        (["--config.model_args.mlp=36"], "it was trained with config.model_args.mlp 24, now 36"),
    ]:  # fmt: skip
        status, line = search(*flags)
        assert status == 2 and message in line
    status, line = search(config=(SCALENET,))
    assert status == 2 and "a run of superformer with search.vitas, not of supernet" in line
    assert search("--config.task_args.smoothing=0.2")[0] == 0  # training alone has it
    status, line = search(config=(f"{VITAS}:retrain",))
    assert status == 2 and "genome searches what the task superformer trained" in line
    status, line = search(checkpoint=run / "nowhere")
    assert status == 2 and "--checkpoint: no file or directory" in line


def test_other_data_than_the_run_was_trained_on_is_said(run, capsys):
    config = config_of("--config.data.options.every=3", "--config.data.options.threads=2")
    settings.load_supernet(config, build_task(config), str(run))
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "(config.data.options.every: 5, now 3)" in said[0]


def test_a_pytorch_supernet_file_is_searched(search, variables, file):
    config = config_of()
    loaded = settings.load_supernet(config, build_task(config), str(file))
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    assert search(checkpoint=file)[0] == 0
    status, line = search("--config.model_args.mlp=36", checkpoint=file)
    assert status == 2 and "attn" not in line and "mlp.fc1" in line


def test_counters_of_a_super_supernet_need_not_be_in_the_file(tmp_path):
    config, _ = read_flags(["search", SCALENET, "--workdir=unused"], need_workdir=True)
    with config.unlocked():
        config.model = "search.scalenet"
        head = {"linear1": {"dim_in": 8, "dim_out": 10}}
        config.model_args = {**tiny_space.ARGUMENTS, "head": head}
    task = build_task(config)
    wanted = drawn_variables(task.model)
    catalog.save(tmp_path / "net.safetensors", "search.scalenet", task.model, wanted)
    found = settings.load_supernet(config, task, str(tmp_path / "net.safetensors"))
    assert found.keys() == {"params", "batch_stats"}
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("search.split=mini", "config.search.split of held_out 'mini'"),
        ("search.keep=0", "config.search.keep: 0; it must be at least 1"),
        ("search.chunk=0", "config.search.chunk: 0; it must be at least 1"),
        ("search.population=0", "config.search.population: 0; it must be at least 1"),
        ("search.kind=random", "config.search.kind: 'random'; known: mcea, genome"),
        ("search.kind=mcea", "config.task: mcea searches what the task supernet trained"),
        ("search.budget=1.0", "config.search.budget: no network has between"),
    ],
)
def test_options_that_find_nothing_are_said_before_anything_is_loaded(search, flag, message):
    status, line = search(f"--config.{flag}", checkpoint="nowhere")
    assert status == 2 and message in line


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("search.iterations=0", "config.search.iterations: 0; it must be at least 1"),
        ("search.base_error=-1.0", "config.search.base_error: -1.0; it must be at least 0"),
        ("search.ratio=0.0", "config.search.ratio: 0.0; it must be positive"),
        ("search.strategy=cubic", "config.search.strategy: 'cubic'; known: linear, quadratic"),
        ("model_args.max_scaling_stage=0", "at least 1 searched stages"),
    ],
)
def test_options_of_the_alternating_search_are_checked_too(search, flag, message):
    status, line = search(f"--config.{flag}", config=(SCALENET,), checkpoint="nowhere")
    assert status == 2 and message in line


def test_labels_outside_the_head_are_refused_where_the_task_is_built():
    for file, flags, message in [
        (VITAS, ["model_args.classes=5"], "config.model_args.classes: 5, but config.data held_out "
         "has 10 classes"),
        (f"{VITAS}:retrain", ["model_args.classes=5"], "model_args.classes: 5"),
        (SCALENET, ["model_args.head={'linear1': {'dim_in': 48, 'dim_out': 1}}"],
         "config.model_args.head: 1, but"),
    ]:  # fmt: skip
        argv = ["train", file, "--workdir=unused", *(f"--config.{f}" for f in flags)]
        config, _ = read_flags(argv, need_workdir=True)
        with pytest.raises(ConfigError, match=message):
            build_task(config)


def test_labels_outside_the_logits_are_refused_by_the_loss():
    logits = np.zeros((2, 3), np.float32)
    for kind, label in [("softmax", (0, 5)), ("softmax", (-2, 0)), ("s-softmax", (-1, 0))]:
        with pytest.raises(ValueError, match=f"label {label[0] or label[1]} is not in"):
            soft_labels.classification_loss(logits, np.array(label), kind)
    with pytest.raises(ValueError, match="at least 2 classes, not 1"):
        soft_labels.classification_loss(logits[:, :1], np.zeros(2, int), "softmax")
    ignored = soft_labels.classification_loss(logits, np.array([1, -1]), "softmax")
    assert float(ignored) == pytest.approx(np.log(3))
