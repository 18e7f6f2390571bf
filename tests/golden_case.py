"""Reference tensors computed by the papers' own code, and how they are compared.

A case is a folder with `meta.json`, `io.npz` and, for networks, `weights.safetensors`. `io.npz`
holds `in.<name>` and `out.<name>`. An adapter `tests/golden_adapters/SYSTEM.py` has

    def run(case: GoldenCase) -> dict[str, array]

and returns at least every name of `case.wanted` in the case's own layout; where `meta.json` has
`detected` it returns that structure as the entry `detected` too. Where only the prose of
`meta.notes` gives a tolerance, the adapter may have `tolerances(case) -> {"out.<name>": {...}}`,
in the form of `meta.tolerances`, with `mean_atol` (bound of the mean absolute difference) and
`except_where` (name of a boolean output whose true entries are free) besides `atol` and `rtol`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ADAPTERS = Path(__file__).resolve().parent / "golden_adapters"
COMMITTED = Path(__file__).resolve().parent / "golden"
LISTED_ENTRIES = 5


@dataclass(frozen=True)
class GoldenCase:
    """One folder of reference tensors; `id` is SYSTEM/CASE, `wanted` the names of its outputs."""

    directory: Path
    id: str

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.directory / "meta.json").read_text(encoding="utf-8"))

    @property
    def system(self) -> str:
        return self.id.split("/")[0]

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def model(self) -> str:
        return self.meta.get("model", "")

    @property
    def config(self) -> dict[str, Any]:
        return self.meta.get("config", {})

    @property
    def mode(self) -> str:
        return self.meta.get("mode", "eval")

    @property
    def float64(self) -> bool:
        return self.meta.get("dtype") == "float64"

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.directory / "io.npz", allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}

    @functools.cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        return {k[3:]: v for k, v in self.arrays.items() if k.startswith("in.")}

    @functools.cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        return {k[4:]: v for k, v in self.arrays.items() if k.startswith("out.")}

    @property
    def wanted(self) -> list[str]:
        return list(self.outputs)

    @property
    def weights(self) -> Path | None:
        path = self.directory / "weights.safetensors"
        return path if path.exists() else None


def find_cases(root: Path) -> list[GoldenCase]:
    """Every folder below `root` (itself included) that has a `meta.json`, in a stable order.

    Two folders of one id (a system's case found twice) are told apart by `#2`, `#3`, ...
    """
    directories = []
    for folder, names, files in os.walk(root, followlinks=True):
        names.sort()
        if "meta.json" in files:
            directories.append(Path(folder))
    cases, seen = [], {}
    for directory in sorted(directories):
        try:
            meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
            system = str(meta.get("system") or directory.parent.name)
        except (ValueError, AttributeError):
            system = directory.parent.name  # the case itself will fail and say why
        identity = f"{system}/{directory.name}"
        seen[identity] = seen.get(identity, 0) + 1
        suffix = f"#{seen[identity]}" if seen[identity] > 1 else ""
        cases.append(GoldenCase(directory, identity + suffix))
    return cases


def adapter_of(system: str) -> Any:
    """The adapter module of a system, None when its file does not exist."""
    path = ADAPTERS / f"{system}.py"
    if not re.fullmatch(r"\w+", system) or not path.exists():
        return None
    name = f"golden_adapter_{system}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def differences(
    case: GoldenCase,
    results: Mapping[str, Any],
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[str]:
    """One line for each recorded output that is absent or departs beyond the case's tolerance."""
    problems = []
    images = _fraction_compared(case)
    partitions: dict[str, bool] = {}
    arrays: dict[str, np.ndarray] = {}
    for name in case.wanted:
        if name not in results:
            problems.append(f"out.{name}: the adapter did not return it")
            continue
        arrays[name] = np.asarray(results[name])
    # Label images first: whether their partitions agree decides about the per-label counts.
    ordered = sorted(arrays, key=lambda n: not _is_label_image(case, n))
    for name in ordered:
        got, want = arrays[name], case.outputs[name]
        if name == "counts" and partitions and not all(partitions.values()):
            continue  # meta.notes: counts are compared only when the partitions are equal
        problem = _kind_problem(got, want)
        if problem is None:
            if name in images:
                problem = _fraction_problem(got, want, images[name], case.meta["atol"])
            elif name.endswith("_pred") and name[: -len("_pred")] in images and want.ndim == 1:
                problem = _prediction_problem(case, arrays, name)
            elif _is_label_image(case, name):
                allowed = case.meta["mismatch_fraction"][f"out.{name}"]
                problem, partitions[name] = _partition_problem(got, want, allowed)
            else:
                problem = _tolerance_problem(case, name, got, want, arrays, extra or {})
        if problem:
            problems.append(f"out.{name}: {problem}")
    if "detected" in case.meta:
        if "detected" not in results:
            problems.append("meta.detected: the adapter did not return `detected`")
        else:
            problems += _structure_problems("detected", results["detected"], case.meta["detected"])
    return problems


def _kind_problem(got: np.ndarray, want: np.ndarray) -> str | None:
    if got.shape != want.shape:
        return f"shape {got.shape}, the reference has {want.shape}"
    kinds = {"U": "string", "S": "string", "b": "boolean", "i": "integer", "u": "integer"}
    of_want, of_got = kinds.get(want.dtype.kind, "float"), kinds.get(got.dtype.kind, "float")
    if got.dtype.kind == "O":
        return "an array of Python objects"
    if of_want != of_got and not (of_want == "float" and of_got == "integer") and want.size:
        return f"dtype {got.dtype} ({of_got}), the reference has {want.dtype} ({of_want})"
    return None


def _worst(bad: np.ndarray, got: np.ndarray, want: np.ndarray) -> str:
    places = [tuple(int(i) for i in p) for p in np.argwhere(bad)[:LISTED_ENTRIES]]
    shown = ", ".join(f"{list(p)}: {got[p]!r} for {want[p]!r}" for p in places)
    return f"{int(bad.sum())} of {bad.size} entries depart, first {shown}"


def mismatched(got: np.ndarray, want: np.ndarray, atol: Any, rtol: Any) -> np.ndarray:
    """Where `|got - want| > atol + rtol |want|`; NaN equals NaN, an infinity itself."""
    if want.dtype.kind in "USb":
        return got.astype(want.dtype) != want if want.dtype.kind == "b" else got != want
    complex_ = np.iscomplexobj(got) or np.iscomplexobj(want)
    wide = np.complex128 if complex_ else np.float64
    integers = want.dtype.kind in "iu" and got.dtype.kind in "iu"
    if integers and not np.any(atol):
        return got != want  # exactly, above 2**53 as well
    x, y = got.astype(wide), want.astype(wide)
    with np.errstate(invalid="ignore", over="ignore"):
        near = np.isfinite(y) & (np.abs(x - y) <= atol + rtol * np.abs(y))
    return ~(near | (x == y) | (np.isnan(x) & np.isnan(y)))


def _tolerance_problem(
    case: GoldenCase,
    name: str,
    got: np.ndarray,
    want: np.ndarray,
    arrays: Mapping[str, np.ndarray],
    extra: Mapping[str, Mapping[str, Any]],
) -> str | None:
    key = f"out.{name}"
    own = {**extra.get(key, {}), **case.meta.get("tolerances", {}).get(key, {})}
    # Counts, ids and indices are exact unless the case says otherwise for that very array.
    exact = want.dtype.kind in "iu" and not own
    atol: Any = own.get("atol", case.meta.get("atol", 0))
    rtol: Any = own.get("rtol", case.meta.get("rtol", 0))
    if exact:
        atol = atol if atol >= 1 else 0
        rtol = 0
    noted = None if own else noted_tolerance(case, name, want)
    if noted is not None:
        atol, rtol = noted
    if "mean_atol" in own:
        mean = float(np.mean(np.abs(got.astype(np.float64) - want.astype(np.float64))))
        return None if mean <= own["mean_atol"] else f"mean absolute difference {mean:.3g}"
    bad = mismatched(got, want, atol, rtol)
    if "except_where" in own:
        bad = bad & ~case.outputs[own["except_where"]].astype(bool)
    allowed = case.meta.get("mismatch_fraction", {}).get(key, 0)
    if not bad.any() or bad.mean() <= allowed:
        return None
    text = _worst(bad, got, want)
    if want.dtype.kind in "fc" and got.dtype.kind in "fciu":
        with np.errstate(invalid="ignore"):
            errors = np.abs(got.astype(np.complex128) - want.astype(np.complex128))
        error = errors[np.isfinite(errors)].max(initial=0)
        text += f"; largest error {error:.3g} with rtol {np.max(rtol):g}, atol {np.max(atol):g}"
    return text + (f" (share {bad.mean():.4f}, allowed {allowed})" if allowed else "")


# Attacks by sign steps amplify rounding, so their images are compared by the share of pixels.


def _fraction_compared(case: GoldenCase) -> dict[str, float]:
    """{output: least share of entries within atol} of the attacked images of a case.

    Those named in `float64_match`, and the other results of the same shape (a case names only those
    of which it has a 64-bit run); start images (`*_start`) are no results and stay exact.
    """
    matches = case.meta.get("float64_match")
    if not matches:
        return {}
    shapes = {case.outputs[n].shape for n in matches if n in case.outputs}
    least = case.meta.get("min_match_fraction", 1.0)
    return {
        name: min(least, matches.get(name, 1.0))
        for name, want in case.outputs.items()
        if name in matches or (want.shape in shapes and not name.endswith("_start"))
    }


def _fraction_problem(got: np.ndarray, want: np.ndarray, least: float, atol: float) -> str | None:
    bad = mismatched(got, want, atol, 0)
    share = 1 - bad.mean()
    return None if share >= least else f"{share:.4f} of the entries within {atol}, wanted {least}"


def _prediction_problem(
    case: GoldenCase, arrays: Mapping[str, np.ndarray], name: str
) -> str | None:
    """Class of an attacked image: compared for the samples whose image matches."""
    image = name[: -len("_pred")]
    if image not in arrays or arrays[image].shape != case.outputs[image].shape:
        return "its image is not there to compare"
    bad_image = mismatched(arrays[image], case.outputs[image], case.meta["atol"], 0)
    same = ~bad_image.reshape(len(bad_image), -1).any(axis=1)
    bad = (arrays[name] != case.outputs[name]) & same
    return _worst(bad, arrays[name], case.outputs[name]) if bad.any() else None


def _is_label_image(case: GoldenCase, name: str) -> bool:
    allowed = case.meta.get("mismatch_fraction", {})
    return f"out.{name}" in allowed and case.outputs[name].dtype.kind in "iu"


def _partition_problem(
    got: np.ndarray, want: np.ndarray, allowed: float
) -> tuple[str | None, bool]:
    """Label images agree up to a one-to-one renaming of ids; 0, the background, keeps its own."""
    from scipy.optimize import linear_sum_assignment

    ids_got, g = np.unique(got, return_inverse=True)
    ids_want, w = np.unique(want, return_inverse=True)
    table = np.zeros((len(ids_got), len(ids_want)), np.int64)
    np.add.at(table, (g.ravel(), w.ravel()), 1)
    table[np.ix_(ids_got == 0, ids_want != 0)] = -1
    table[np.ix_(ids_got != 0, ids_want == 0)] = -1
    rows, columns = linear_sum_assignment(table, maximize=True)
    matched = int(np.maximum(table[rows, columns], 0).sum())
    share = 1 - matched / max(got.size, 1)
    problem = None
    if share > allowed:
        problem = f"as partitions, {share:.4f} of the entries differ, allowed {allowed}"
    return problem, matched == got.size


# `tolerance_note` is one sentence with a clause for each kind of output.

_NUMBER = r"([\d.]+(?:e[+-]?\d+)?)"
_NOTED = {
    "singular values": "singular_values",
    "Hessian eigenvalues": "hess_eigvals",
}


def noted_tolerance(case: GoldenCase, name: str, want: np.ndarray) -> tuple[Any, Any] | None:
    """(atol, rtol) that `meta.tolerance_note` gives an output, None when it gives none.

    Clauses are `NAMES: atol|rtol NUMBER[*sigma_1] [where NAME>NUMBER]`, `at step 0` and `later`
    dividing the rows of the Hessian's eigenvalues. A relative tolerance with a condition is taken
    entry by entry where the condition holds (the case's own elsewhere), one without is relative
    to the largest entry of the array or row: many eigenvalues are zero but for rounding.
    """
    note = case.meta.get("tolerance_note")
    if not note or want.dtype.kind != "f":
        return None
    atol = np.full(want.shape, float(case.meta["atol"]))
    rtol = np.full(want.shape, float(case.meta["rtol"]))
    stem = name.split(".")[0]
    found = False
    for clause in note.split(";"):
        names, _, rest = clause.partition(":")
        rule = re.match(rf"\s*(atol|rtol) {_NUMBER}(\*sigma_1)?(?: where (\w+)>{_NUMBER})?", rest)
        if rule is None:
            continue
        for subject in names.split(","):
            subject = subject.strip()
            label = re.sub(r" (at step 0|later)$", "", subject)
            if _NOTED.get(label, label) != stem:
                continue
            found = True
            value = float(rule[2])
            rows = np.ones(want.shape, bool)
            if stem == "hess_eigvals" and subject != label:
                first = case.outputs["hess_steps"] == 0
                rows[~(first if subject.endswith("at step 0") else ~first)] = False
            if rule[3]:
                value *= max(case.config.get("sigma", [1.0]))
            if rule[4]:
                rows &= case.outputs[rule[4]] > float(rule[5])
                atol[rows], rtol[rows] = 0, value
            elif rule[1] == "rtol":
                scale = np.abs(want).max(axis=-1, keepdims=True) if stem == "hess_eigvals" else None
                scale = np.abs(want).max(initial=0) if scale is None else scale
                atol[rows] = (np.broadcast_to(scale, want.shape) * value)[rows]
                rtol[rows] = 0
            else:
                atol[rows], rtol[rows] = value, 0
    return (atol, rtol) if found else None


def _structure_problems(path: str, got: Any, want: Any) -> list[str]:
    """`meta.detected`: steps, kinds and flags exactly, measured fractions to 1e-6 relative."""
    if isinstance(want, Mapping):
        if not isinstance(got, Mapping):
            return [f"{path}: {got!r} for {want!r}"]
        lines = []
        for key in want:
            if key not in got:
                lines.append(f"{path}.{key}: the adapter did not return it")
            else:
                lines += _structure_problems(f"{path}.{key}", got[key], want[key])
        return lines
    if isinstance(want, list):
        got = list(got) if got is not None and hasattr(got, "__len__") else got
        if not isinstance(got, list) or len(got) != len(want):
            return [f"{path}: {got!r} for {want!r}"]
        return [
            line
            for n, (g, w) in enumerate(zip(got, want))
            for line in _structure_problems(f"{path}[{n}]", g, w)
        ]
    if isinstance(got, (np.generic, np.ndarray)) and np.ndim(got) == 0:
        got = got.item()
    if isinstance(want, float) and isinstance(got, (int, float)) and not isinstance(got, bool):
        return [] if abs(got - want) <= 1e-6 * abs(want) else [f"{path}: {got!r} for {want!r}"]
    same = got == want and isinstance(got, bool) == isinstance(want, bool)
    return [] if same else [f"{path}: {got!r} for {want!r}"]
