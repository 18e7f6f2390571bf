"""Activations lined up by path, the first departing layer, and the commands' exit status."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.__main__ import main
from jaxmodels.interop import activations, catalog, checkpoint
from tests.interop import tiny_model

NAME = "vision.tiny"


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """(weights file, io file, arrays) of TinyNet, in PyTorch's layout, written with NumPy."""
    (tmp_path / "package" / "vision").mkdir(parents=True)
    (tmp_path / "package" / "vision" / "tiny.py").touch()
    monkeypatch.setattr(catalog, "_PACKAGE", tmp_path / "package")
    monkeypatch.setitem(sys.modules, "jaxmodels.vision.tiny", tiny_model)
    module, variables = jaxmodels.load(NAME, seed=1)
    weights = tmp_path / "w.safetensors"
    jaxmodels.save(weights, NAME, module, variables)
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 2)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        output, calls = activations.captured(module, variables, jnp.asarray(x))
    arrays = {"in.x": x, "out.output": np.asarray(output)}
    for path in ("stem.0", "stem.1", "tower", "classifier"):  # in order of execution
        outputs = calls[path]
        for k, value in enumerate(outputs):
            arrays[f"act.{path}" + (f"#{k + 1}" if len(outputs) > 1 else "")] = value
    arrays = {k: np.moveaxis(v, -1, 1) if v.ndim == 4 else v for k, v in arrays.items()}
    arrays["act.relu"] = arrays["act.stem.1"]
    return weights, tmp_path / "io.npz", arrays


def write(path, arrays, layout=True):
    names = {k: {2: "NC", 4: "NCHW"}[v.ndim] for k, v in arrays.items()}
    extra = {"layout": np.array(json.dumps(names))} if layout else {}
    np.savez(path, **arrays, **extra)


def run(recorded, *more):
    weights, io, _ = recorded
    return main(["compare", NAME, "--weights", str(weights), "--io", str(io), *more])


def test_agreeing_layers_end_with_status_zero_and_print_precision(recorded, capsys):
    write(recorded[1], recorded[2])
    assert run(recorded) == 0
    text = capsys.readouterr().out
    assert "6 arrays compared" in text and "all agree" in text
    assert "matmul precision 'highest'" in text
    assert "act.tower#1" in text and "act.tower#2" in text
    assert "recorded, without a module of ours: 1 (relu)" in text


def test_a_departing_layer_is_the_first_in_execution_order_with_status_one(recorded, capsys):
    arrays = {k: v.copy() for k, v in recorded[2].items()}
    for name in ("act.tower#2", "act.classifier", "out.output"):
        arrays[name] = arrays[name] * 1.01 + 0.1
    write(recorded[1], arrays)
    assert run(recorded) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("first departing layer: act.tower#2: a factor and a shift")
    assert sum("departs" in line for line in lines) == 3


def test_a_recording_without_layout_is_read_with_channels_second(recorded, capsys):
    write(recorded[1], recorded[2], layout=False)
    assert run(recorded) == 0
    assert "channels taken to be second" in capsys.readouterr().out


def test_tolerances_can_be_chosen(recorded):
    arrays = dict(recorded[2])
    arrays["out.output"] = arrays["out.output"] * 1.001
    write(recorded[1], arrays)
    assert run(recorded) == 1
    assert run(recorded, "--rtol", "0.01") == 0


def test_not_a_number_on_one_side_departs_and_on_both_agrees(recorded):
    arrays = {k: v.copy() for k, v in recorded[2].items()}
    arrays["out.output"][0, 0] = np.nan
    write(recorded[1], arrays)
    assert run(recorded) == 1
    layer = activations._layer("x", np.array([np.nan, 1]), np.array([np.nan, 1]), 0, 0, True)
    assert not layer.problem


def test_user_mistakes_are_one_line_with_status_two(recorded, capsys, tmp_path):
    write(recorded[1], recorded[2])
    weights, io, _ = recorded
    narrow = tmp_path / "narrow.npz"  # one channel too many
    np.savez(narrow, **{"in.x": np.zeros((1, 3, 5, 5), np.float32)})
    for arguments in (
        ["compare", "vision.tinny", "--weights", str(weights), "--io", str(io)],
        ["compare", NAME, "--weights", str(tmp_path / "no.pth"), "--io", str(io)],
        ["compare", NAME, "--weights", str(weights), "--io", str(tmp_path / "no.npz")],
        ["convert", NAME, str(weights), str(tmp_path / "out.onnx")],
        ["summary", NAME, "--set", "widht=3"],
        ["summary", NAME, "--set", "width=wide"],
        ["compare", NAME, "--weights", str(weights), "--io", str(narrow)],
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error


def test_convert_gives_back_the_same_file_and_list_and_summary_print(recorded, capsys, tmp_path):
    out = tmp_path / "out.safetensors"
    assert main(["convert", NAME, str(recorded[0]), str(out)]) == 0
    assert out.read_bytes() == recorded[0].read_bytes()
    assert main(["list"]) == 0 and main(["summary", "tiny_wide"]) == 0
    text = capsys.readouterr().out
    assert f"{NAME}:tiny_wide" in text
    exported = checkpoint.read(recorded[0]).tensors
    parameters = sum(v.size for k, v in exported.items() if "running" not in k)
    parameters -= exported["grid"].size + 2  # the counters
    assert main(["summary", NAME]) == 0
    total = capsys.readouterr().out.splitlines()[-1].split()
    assert total[0] == "total" and int(total[1]) == parameters


CAUSES = {
    "ours lacks a ReLU": lambda x: np.maximum(x, 0),
    "the map is flipped": lambda x: x[:, ::-1, ::-1],
    "height and width are exchanged": lambda x: x.swapaxes(1, 2),
    "a factor and a shift for each channel": lambda x: x * [1.0, 1.2, 0.8] + [0, 0.1, 0.3],
    "a constant factor of 0.5": lambda x: 2 * x,
    "small everywhere": lambda x: x + 5e-4 * np.sin(50 * x),
    "weights, their layout": lambda x: np.random.default_rng(3).normal(size=x.shape),
}


@pytest.mark.parametrize("hint", CAUSES)
def test_causes_are_told_apart(hint):
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3))
    assert activations.cause(x, CAUSES[hint](x)).startswith(hint)
    if hint == "ours lacks a ReLU":
        assert activations.cause(CAUSES[hint](x), x) == "ours has a ReLU too many"
        padded = x.copy()
        padded[:, 0] += 1
        assert activations.cause(padded, x) == "only the border differs: padding"
