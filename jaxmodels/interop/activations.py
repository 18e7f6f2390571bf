"""Activations of a Flax model beside those recorded from a PyTorch one, lined up by module path."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

from jaxmodels.interop.checkpoint import CheckpointError

_DEFAULT_LAYOUT = {3: "NCL", 4: "NCHW", 5: "NCDHW"}


@dataclass(frozen=True)
class Layer:
    """One compared array; `problem` is empty when it agrees within tolerance."""

    name: str
    max_abs: float
    max_rel: float
    problem: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Comparison:
    """Layers in the recording's order, and the names only one of the two sides has."""

    layers: list[Layer]
    only_recorded: list[str]
    only_ours: list[str]
    assumed_layout: bool

    @property
    def first_departing(self) -> Layer | None:
        return next((layer for layer in self.layers if layer.problem), None)


def read_recording(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str] | None]:
    """(arrays by name, axes by name) of an `io.npz`; axes are None when it does not say.

    Raises FileNotFoundError and `CheckpointError`.
    """
    from jaxmodels.interop import checkpoint

    arrays = dict(checkpoint.read_npz(path))
    stored = arrays.pop("layout", None)
    if stored is None:
        return arrays, None
    try:
        layout = json.loads(str(stored))
        if not isinstance(layout, dict):
            raise ValueError
    except ValueError:
        raise CheckpointError(f"{path}: its entry `layout` is not a JSON object") from None
    for key, names in layout.items():
        if key in arrays and len(str(names)) != arrays[key].ndim:
            raise CheckpointError(
                f"{path}: layout {names!r} of {key} does not fit its shape {arrays[key].shape}"
            )
    return arrays, layout


def channels_last(array: np.ndarray, layout: str) -> np.ndarray:
    """Move the axis C to the end, as our arrays have it; other layouts stay as they are."""
    return np.moveaxis(array, 1, -1) if layout[1:2] == "C" and len(layout) > 2 else array


def captured(module: nn.Module, variables: Mapping[str, Any], *inputs: Any, **named: Any):
    """(output, {module path: [output of each call]}) of one forward pass, compiled as a whole."""

    @jax.jit
    def forward(variables, inputs, named):
        return module.apply(
            variables,
            *inputs,
            **named,
            capture_intermediates=lambda m, method: method == "__call__",
            mutable=["intermediates"],
        )

    output, state = forward(variables, inputs, named)
    calls: dict[str, list[np.ndarray]] = {}

    def walk(node: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for name, value in node.items():
            if name == "__call__":
                firsts = [jax.tree.leaves(v)[:1] for v in value]
                calls[".".join(path)] = [np.asarray(leaf) for leaves in firsts for leaf in leaves]
            elif isinstance(value, Mapping):
                walk(value, (*path, name))

    walk(state.get("intermediates", {}), ())
    calls.pop("", None)
    return output, calls


def _numbered(names: list[str]) -> dict[str, list[tuple[int, str]]]:
    """{module path: [(k, array name)]} of names with and without `#k`, in order of k."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        path, _, k = name.removeprefix("act.").partition("#")
        groups.setdefault(path, []).append((int(k) if k.isdigit() else -1, name))
    return {path: sorted(calls) for path, calls in groups.items()}


def compare(
    module: nn.Module,
    variables: Mapping[str, Any],
    recording: Mapping[str, np.ndarray],
    layout: Mapping[str, str] | None,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    precision: str = "highest",
) -> Comparison:
    """Run the model on the recorded inputs and compare every array that both sides have.

    An array departs where `|ours - theirs| > atol + rtol * max|theirs|`. Outputs are matched by
    name where ours have names, else in order; activations by module path.

    Raises ValueError when the recording has no input, or the model does not accept its inputs.
    """
    inputs = {k[3:]: v for k, v in recording.items() if k.startswith("in.")}
    if not inputs:
        raise ValueError("the recording has no in.<name> entry")

    def axes(name: str) -> str:
        array = recording[name]
        default = _DEFAULT_LAYOUT.get(array.ndim, "N" * array.ndim)
        return default if layout is None else layout.get(name, default)

    arguments = {k: jnp.asarray(channels_last(v, axes(f"in.{k}"))) for k, v in inputs.items()}
    accepted = inspect.signature(type(module).__call__).parameters
    positional: tuple[Any, ...] = ()
    if not all(name in accepted for name in arguments):
        positional, arguments = tuple(arguments.values()), {}
    try:
        with jax.default_matmul_precision(precision):
            output, calls = captured(module, variables, *positional, **arguments)
    except (TypeError, ValueError, FlaxError) as error:
        given = ", ".join(f"{k} {list(v.shape)}" for k, v in inputs.items())
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{type(module).__name__} does not take {given}: {text}") from error

    used: set[str] = set()
    only_recorded: list[str] = []
    mine: dict[str, np.ndarray] = {}
    for path, numbered in _numbered([k for k in recording if k.startswith("act.")]).items():
        for call, (_, name) in enumerate(numbered):
            if path in calls and call < len(calls[path]):
                mine[name] = calls[path][call]
                used.add(path)
            else:
                only_recorded.append(name)
    outputs = [k for k in recording if k.startswith("out.")]
    named = output if isinstance(output, Mapping) else None
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(output)]
    for n, name in enumerate(outputs):
        short = name.removeprefix("out.")
        if named is not None and short in named:
            mine[name] = np.asarray(named[short])
        elif short in calls:
            mine[name] = calls[short][0]
            used.add(short)
        elif named is None and len(leaves) == len(outputs):
            mine[name] = leaves[n]
        elif named is None and len(leaves) == 1 and short in ("output", "logits", "0"):
            mine[name] = leaves[0]
        else:
            only_recorded.append(name)
    # In order of execution, so that the first to depart is the cause; outputs come out last.
    names = [n for n in recording if n in mine]
    pairs = [(n, mine[n]) for n in sorted(names, key=lambda n: n.startswith("out."))]
    layers = []
    departed = False
    for name, ours in pairs:
        theirs = channels_last(recording[name], axes(name))
        layer = _layer(name, ours, theirs, rtol, atol, not departed)
        departed = departed or bool(layer.problem)
        layers.append(layer)
    return Comparison(layers, only_recorded, sorted(set(calls) - used), layout is None)


def _layer(
    name: str, ours: np.ndarray, theirs: np.ndarray, rtol: float, atol: float, explain: bool
) -> Layer:
    if ours.shape != theirs.shape:
        text = f"shape {list(ours.shape)}, recorded {list(theirs.shape)} (channels last)"
        hint = "padding, stride or the number of channels" if explain else ""
        return Layer(name, float("nan"), float("nan"), text, hint)
    x, y = ours.astype(np.float64), theirs.astype(np.float64)
    if not x.size:
        return Layer(name, 0.0, 0.0)
    both_nan = np.isnan(x) & np.isnan(y)
    with np.errstate(invalid="ignore"):
        error = np.where(both_nan | (x == y), 0.0, np.abs(x - y))
    finite = np.abs(y[np.isfinite(y)])
    scale = float(finite.max()) if finite.size else 0.0
    if not np.isfinite(error).all():
        return Layer(name, float("inf"), float("inf"), "not finite where the other is", "overflow")
    largest = float(error.max())
    relative = largest / scale if scale else (0.0 if largest == 0 else float("inf"))
    if largest <= atol + rtol * scale:
        return Layer(name, largest, relative)
    return Layer(name, largest, relative, "departs", cause(x, y) if explain else "")


def cause(ours: np.ndarray, theirs: np.ndarray) -> str:
    """A guess why two arrays of one layer (channels last) differ, from the shape of the error."""
    scale = max(float(np.abs(theirs).max()), 1e-30)

    def near(a: np.ndarray, b: np.ndarray) -> bool:
        return bool(np.abs(a - b).max() <= 1e-4 * scale)

    if near(np.maximum(ours, 0), theirs):
        return "ours lacks a ReLU"
    if near(ours, np.maximum(theirs, 0)):
        return "ours has a ReLU too many"
    if ours.ndim == 4:
        inner = (slice(None), slice(1, -1), slice(1, -1))
        if min(ours.shape[1:3]) > 2 and near(ours[inner], theirs[inner]):
            return "only the border differs: padding"
        if near(ours[:, ::-1, ::-1], theirs):
            return "the map is flipped"
        if ours.shape[1] == ours.shape[2] and near(ours.swapaxes(1, 2), theirs):
            return "height and width are exchanged"
    if ours.ndim >= 2 and ours.size // ours.shape[-1] >= 4:
        flat_x, flat_y = ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, ours.shape[-1])
        mean_x, mean_y = flat_x.mean(0), flat_y.mean(0)
        spread = ((flat_x - mean_x) ** 2).sum(0)
        slope = ((flat_x - mean_x) * (flat_y - mean_y)).sum(0) / np.maximum(spread, 1e-30)
        if near((flat_x - mean_x) * slope + mean_y, flat_y):
            if np.ptp(slope) <= 1e-3 * np.abs(slope).max() and near(mean_x * slope, mean_y):
                return f"a constant factor of {1 / slope.mean():.4g}"
            return "a factor and a shift for each channel: normalization statistics, eps or a bias"
    error = float(np.abs(ours - theirs).max()) / scale
    if error < 2e-3:
        return "small everywhere: matmul precision, tanh or exact GELU, or eps"
    return "weights, their layout, or the operation itself"


def format_report(result: Comparison, precision: str, rtol: float, atol: float) -> str:
    """The comparison as a table, the first departing layer named below it."""
    width = max([len(layer.name) for layer in result.layers] + [5])
    lines = [f"{'layer':{width}}  {'max abs':>9}  {'max rel':>9}"]
    for layer in result.layers:
        lines.append(
            f"{layer.name:{width}}  {layer.max_abs:9.2e}  {layer.max_rel:9.2e}"
            + (f"  {layer.problem}" if layer.problem else "")
        )
    departing = sum(bool(layer.problem) for layer in result.layers)
    lines.append(
        f"{len(result.layers)} arrays compared on {jax.default_backend()}, matmul precision "
        f"{precision!r}, rtol {rtol:g} of the largest entry, atol {atol:g}: "
        + ("all agree" if not departing else f"{departing} depart")
    )
    if result.assumed_layout:
        lines.append("the file names no axes (`layout`): channels taken to be second")
    for title, names in (
        ("recorded, without a module of ours", result.only_recorded),
        ("ours, not recorded", result.only_ours),
    ):
        if names:
            shown = ", ".join(re.sub(r"^act\.", "", n) for n in names[:6])
            lines.append(f"{title}: {len(names)} ({shown}{', ...' if len(names) > 6 else ''})")
    first = result.first_departing
    if first is not None:
        lines.append(f"first departing layer: {first.name}: {first.hint}")
    return "\n".join(lines)
