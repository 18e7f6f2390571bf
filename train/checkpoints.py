"""Checkpoints that survive being killed: asynchronous Orbax saves under a checksummed manifest.

A finished checkpoint is `DIRECTORY/STEP/` with `arrays/` (Orbax), `config.json`, `manifest.json`.
Orbax writes into `STEP.unfinished/`; when every process has finished, process 0 writes the
manifest (size and SHA-256 of every file, shape and dtype of every leaf, and its own checksum) and
renames the directory. The rename is the only thing that makes a checkpoint exist.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

IGNORABLE_CONFIG = (
    "checkpoint",
    "dry_run",
    "eval",
    "eval_only",
    "log",
    "log_every",
    "parallel",
    "probe",
    "profile",
    "report",
    "reporting",
    "steps",
    "workdir",
)
"""Config keys (and all keys below them) that may change between a checkpoint and its resumption."""

_MANIFEST = "manifest.json"
_BARRIER_TIMEOUT_MS = 1_200_000


class CheckpointError(OSError):
    """A checkpoint could not be written or its directory could not be used; one line says why."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: a directory on a POSIX file system that all processes share; made if missing.
      keep: how many of the last saved checkpoints stay.
      best_metric: key of `metrics` whose best checkpoint stays besides.
      best_mode: "max" or "min".
      config: the run's config; stored with each checkpoint and compared at `restore`.
      report: receives one line for each thing the user must know.
      ignorable: config keys that may differ from the checkpoint's.

    All methods that write or restore are collective: every process of the run calls them.

    Raises:
      CheckpointError: the directory cannot be made or read.
      ValueError: `keep` or `best_mode` is not allowed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        best_metric: str | None = None,
        best_mode: str = "max",
        config: Mapping[str, Any] | None = None,
        report: Callable[[str], None] = print,
        ignorable: Sequence[str] = IGNORABLE_CONFIG,
    ):
        if keep < 1:
            raise ValueError(f"checkpoint.keep is {keep}; it must be at least 1")
        if best_mode not in ("max", "min"):
            raise ValueError(f"checkpoint.best_mode is {best_mode!r}; it must be 'max' or 'min'")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._best_metric = best_metric
        self._best_mode = best_mode
        self._config = None if config is None else _plain(config)
        self._report = report
        self._ignorable = tuple(ignorable)
        self._primary = jax.process_index() == 0
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._damaged: set[Path] = set()
        self._saves = 0
        try:
            if self._primary:
                self.directory.mkdir(parents=True, exist_ok=True)
                os.listdir(self.directory)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint directory {self.directory} cannot be used: {_one_line(error)}"
            ) from error
        _silence_orbax_tracebacks()
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
        self._barrier = ocp.multihost.get_barrier_sync_fn()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, Any] | None = None,
        *,
        wait: bool = False,
    ) -> bool:
        """Saves `state` as checkpoint `step`, replacing one of the same step once it is finished.

        Returns when the arrays have been copied to the host (`state` may then be donated); files
        are written in the background. One save is under way at a time: a second one first waits for
        the former. A save that fails is named through `report`, leaves the earlier checkpoints as
        they were, and does not keep later saves from being tried; `wait` and `close` raise it when
        no later save succeeded.

        Args:
          step: number of finished training steps.
          state: a pytree of JAX arrays (typed PRNG keys included), numpy arrays and numbers.
          metrics: numbers kept in the manifest; `best_metric` is looked up here.
          wait: return only when the checkpoint is finished, and raise if it could not be.

        Returns:
          Whether the save was started (with `wait`: finished).

        Raises:
          CheckpointError: with `wait`, when it could not be written.
          ValueError: a leaf is of a kind that cannot be saved.
        """
        self._join()
        step = int(step)
        leaves, tree = _to_arrays(state)
        unfinished = self.directory / f"{step}.unfinished"
        self._saves += 1
        try:
            if self._primary:
                self._clear_leftovers()
                unfinished.mkdir(parents=True)
            self._orbax.save(unfinished / "arrays", args=ocp.args.PyTreeSave(leaves))
        except Exception as error:
            self._failed(step, error)
            if wait:
                self.wait()
            return False
        self._thread = threading.Thread(
            target=self._finish,
            args=(step, unfinished, tree, dict(metrics or {}), self._saves),
            name=f"checkpoint-{step}",
        )
        self._thread.start()
        if wait:
            self.wait()
        return True

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Restores the newest sound checkpoint.

        Every unfinished or damaged checkpoint newer than it is named through `report`. Nothing on
        disk is changed; the next `save` moves damaged ones to `STEP.damaged`.

        Args:
          like: a pytree of `jax.ShapeDtypeStruct` (with `sharding`) or arrays; the restored leaves
            have these shapes, dtypes and shardings, whatever devices the checkpoint was saved from.

        Returns:
          `(step, state)`, or None when there is no sound checkpoint.

        Raises:
          ValueError: the config or the leaves differ from the checkpoint's.
        """
        self._join()
        path, manifest = self._agree(lambda: self._newest_sound(self.directory))
        if path is None:
            return None
        return manifest["step"], self._read(path, manifest, like)

    def restore_step(self, step: int, like: Any) -> Any:
        """Restores checkpoint `step` into the shapes, dtypes and shardings of `like`.

        Raises:
          ValueError: there is no such sound checkpoint, or its config or leaves differ.
        """
        self._join()

        def find() -> tuple[Path | None, dict[str, Any]]:
            found = dict(_candidates(self.directory))
            if step not in found:
                raise ValueError(
                    f"no checkpoint of step {step} in {self.directory}; "
                    f"there are {self.steps() or 'none'}"
                )
            manifest, problem = _examine(found[step])
            if problem:
                raise ValueError(f"checkpoint {step} in {self.directory}: {problem}")
            return found[step], manifest

        path, manifest = self._agree(find)
        assert path is not None
        return self._read(path, manifest, like)

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending.

        Contents are verified by `restore`; here those are left out whose manifest or file sizes
        are wrong, and those that `restore` found damaged.
        """
        return sorted(manifest["step"] for _, manifest in self._sound_looking())

    def best_step(self) -> int | None:
        """The step with the best finite `best_metric`, the later of equals; None without any."""
        best = self._best(list(self._sound_looking()))
        return None if best is None else best["step"]

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          CheckpointError: the last save could not be written.
        """
        self._join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Waits for the save under way and frees Orbax's threads; raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    # -- writing ---------------------------------------------------------------------------------

    def _finish(
        self,
        step: int,
        unfinished: Path,
        tree: dict[str, Any],
        metrics: dict[str, Any],
        number: int,
    ) -> None:
        try:
            self._orbax.wait_until_finished()
            if self._primary:
                self._commit(step, unfinished, tree, metrics)
            self._failure = None
        except Exception as error:
            self._failed(step, error)
        try:
            # `wait` on any process then means: finished on all of them.
            self._barrier(key=f"checkpoint_{number}_{step}", timeout_ms=_BARRIER_TIMEOUT_MS)
        except Exception as error:
            self._failed(step, error)

    def _commit(
        self, step: int, unfinished: Path, tree: dict[str, Any], metrics: dict[str, Any]
    ) -> None:
        if self._config is not None:
            text = json.dumps(self._config, indent=2, sort_keys=True)
            (unfinished / "config.json").write_text(text, encoding="utf-8")
        files = sorted(p for p in unfinished.rglob("*") if p.is_file())
        with ThreadPoolExecutor(8) as pool:
            digests = list(pool.map(_write_through_and_digest, files))
        existing = [manifest["serial"] for _, manifest in self._sound_looking()]
        manifest = {
            "format": 1,
            "step": step,
            "serial": 1 + max(existing, default=0),
            "metrics": {name: _number(value) for name, value in metrics.items()},
            "files": {
                path.relative_to(unfinished).as_posix(): {"bytes": size, "sha256": digest}
                for path, (size, digest) in zip(files, digests)
            },
            "tree": tree,
        }
        temporary = unfinished / f"{_MANIFEST}.unfinished"
        temporary.write_bytes(_render(manifest))
        _write_through_and_digest(temporary)
        temporary.rename(unfinished / _MANIFEST)

        final = self.directory / str(step)
        replaced = self.directory / f"{step}.replaced"
        if final.exists():
            final.rename(replaced)
        unfinished.rename(final)
        _write_directory_through(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        self._damaged.discard(final)
        self._drop_old()

    def _drop_old(self) -> None:
        present = sorted(self._sound_looking(), key=lambda item: item[1]["serial"])
        kept = {manifest["step"] for _, manifest in present[-self._keep :]}
        best = self._best(present)
        if best is not None:
            kept.add(best["step"])
        for path, manifest in present:
            if manifest["step"] not in kept:
                # Renamed first, so that a kill in the middle does not leave a damaged checkpoint.
                doomed = path.with_name(f"{path.name}.dropped")
                path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _clear_leftovers(self) -> None:
        """Removes what interrupted saves left, and moves damaged checkpoints out of the way."""
        for path in list(self.directory.iterdir()):
            match = re.fullmatch(
                r"(\d+)(\.unfinished|\.dropped|\.replaced|\.orbax-checkpoint-tmp.*)?", path.name
            )
            if match is None:
                continue
            step, suffix = match.groups()
            if suffix is None:
                if path in self._damaged or _examine(path, contents=False)[1]:
                    aside = path.with_name(f"{step}.damaged")
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
                    self._damaged.discard(path)
            elif suffix == ".replaced" and not (self.directory / step).exists():
                path.rename(self.directory / step)
            else:
                shutil.rmtree(path)

    def _failed(self, step: int, error: BaseException) -> None:
        text = _one_line(error)
        try:
            if self._primary:
                shutil.rmtree(self.directory / f"{step}.unfinished", ignore_errors=True)
            intact = self.steps()
        except OSError:
            intact = []
        self._failure = CheckpointError(
            f"checkpoint {step} could not be written to {self.directory}: {text}; "
            + (f"checkpoints {intact} are intact" if intact else "there is no earlier checkpoint")
        )
        self._failure.errno = errno.ENOSPC if "No space left" in text else None
        self._failure.__cause__ = error
        self._report(str(self._failure))

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # -- reading ---------------------------------------------------------------------------------

    def _newest_sound(self, directory: Path) -> tuple[Path | None, dict[str, Any]]:
        path, manifest, problems = _newest_sound(directory)
        instead = (
            "there is no earlier sound checkpoint"
            if path is None
            else f"using checkpoint {manifest['step']} instead"
        )
        for damaged, step, problem in problems:
            self._report(f"checkpoint {step} in {directory}: {problem}; {instead}")
            self._damaged.add(damaged)
        return path, manifest

    def _agree(
        self, choose: Callable[[], tuple[Path | None, dict[str, Any]]]
    ) -> tuple[Path | None, dict[str, Any]]:
        """Lets process 0 choose and check, so that all processes restore the same checkpoint."""
        path, manifest, failure = None, {}, None
        if self._primary:
            try:
                path, manifest = choose()
                if path is not None:
                    self._check_config(path)
            except (OSError, ValueError) as error:
                failure = error
        if jax.process_count() > 1:
            chosen = -2 if failure else -1 if path is None else manifest["step"]
            chosen = int(multihost_utils.broadcast_one_to_all(np.asarray(chosen)))
            if not self._primary and chosen == -2:
                raise ValueError("process 0 could not restore a checkpoint; its message says why")
            if not self._primary and chosen >= 0:
                path = dict(_candidates(self.directory))[chosen]
                manifest = _read_manifest(path)
        if failure is not None:
            raise failure
        return path, manifest

    def _check_config(self, path: Path) -> None:
        stored = path / "config.json"
        if self._config is None or not stored.exists():
            return
        then, now = _dotted(json.loads(stored.read_bytes())), _dotted(self._config)
        changed = [
            f"{key} {json.dumps(then[key]) if key in then else '(absent)'}"
            f" -> {json.dumps(now[key]) if key in now else '(absent)'}"
            for key in sorted(then.keys() | now.keys())
            if (key in then) != (key in now) or then.get(key) != now.get(key)
            if not any(key == p or key.startswith(f"{p}.") for p in self._ignorable)
        ]
        if changed:
            raise ValueError(
                f"config differs from that of checkpoint {path.name} in {self.directory}: "
                f"{', '.join(changed)}; set them back or choose another --workdir"
            )

    def _read(self, path: Path, manifest: dict[str, Any], like: Any) -> Any:
        return _restore_tree(path, manifest["tree"], like, f"checkpoint {path.name}")

    def _sound_looking(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for _, path in _candidates(self.directory):
            if path not in self._damaged:
                manifest, problem = _examine(path, contents=False)
                if not problem:
                    yield path, manifest

    def _best(self, present: list[tuple[Path, dict[str, Any]]]) -> dict[str, Any] | None:
        sign = 1 if self._best_mode == "max" else -1
        scored = [
            (sign * manifest["metrics"][self._best_metric], manifest["serial"], manifest)
            for _, manifest in present
            if isinstance(manifest["metrics"].get(self._best_metric), int | float)
        ]
        return max(scored, key=lambda item: item[:2])[2] if scored else None


def load_params(
    path: str | os.PathLike[str], like: Any = None, *, ema: bool = False
) -> dict[str, Any]:
    """Reads the variables of a saved `TrainState`, for `init_from`, `eval_only` and prediction.

    Args:
      path: a run directory, its `checkpoints` directory (the newest sound one is taken), or the
        directory of one step.
      like: a pytree `{"params": ..., collection: ...}` of `jax.ShapeDtypeStruct` (with `sharding`)
        or arrays; None reads everything as numpy arrays.
      ema: take the averaged parameters (and statistics, where averaged) where the run kept them.

    Returns:
      `{"params": {...}, collection: {...}}` with nested dicts keyed as the modules are.

    Raises:
      FileNotFoundError: no checkpoint there. ValueError: it is damaged, or its leaves differ.
    """
    root = Path(path).absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such checkpoint or run directory")
    if (root / _MANIFEST).exists():
        step, (manifest, problem) = root, _examine(root)
        if problem:
            raise ValueError(f"checkpoint {root}: {problem}")
    else:
        directory = root / "checkpoints" if (root / "checkpoints").is_dir() else root
        step, manifest, problems = _newest_sound(directory)
        if step is None:
            found = "; ".join(f"checkpoint {s}: {p}" for _, s, p in problems)
            raise FileNotFoundError(
                f"no sound checkpoint in {directory}" + (f" ({found})" * bool(found))
            )
    tree = manifest["tree"]
    sources = {}  # key as the caller sees it -> key in the checkpoint
    for key in tree:
        part, _, rest = key.partition("/")
        if part == "params":
            sources[key] = key
        elif part == "extra" and rest:
            sources[rest] = key
    if ema:
        averaged = [key.removeprefix("ema/") for key in tree if key.startswith("ema/")]
        for name in averaged:
            visible = name if name in sources else f"params/{name}"
            if visible in sources:
                sources[visible] = f"ema/{name}"
    wanted = {key: tree[source] for key, source in sources.items()}
    if like is None:
        like = {
            key: np.broadcast_to(np.zeros((), jax.numpy.dtype(entry["dtype"])), entry["shape"])
            for key, entry in wanted.items()
        }
        flat = _restore_tree(step, wanted, like, f"checkpoint {step}", sources, escape=False)
        nested: dict[str, Any] = {}
        for key, leaf in flat.items():
            *parents, last = (
                part.replace("%2F", "/").replace("%25", "%") for part in key.split("/")
            )
            node = nested
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = leaf
        nested.setdefault("params", {})
        return nested
    return _restore_tree(step, wanted, like, f"checkpoint {step}", sources)


# -- pytrees ---------------------------------------------------------------------------------------


def _leaf_key(path: Sequence[Any], escape: bool = True) -> str:
    """Joins by "/", since module names contain dots and Orbax would merge `a.b` with `a: {b}`."""
    parts = []
    for entry in path:
        for attribute in ("key", "name", "idx"):
            if hasattr(entry, attribute):
                part = str(getattr(entry, attribute))
                break
        else:
            part = str(entry)
        parts.append(part.replace("%", "%25").replace("/", "%2F") if escape else part)
    return "/".join(parts)


def _flatten(state: Any, escape: bool = True) -> tuple[dict[str, Any], Any]:
    pairs, structure = jax.tree_util.tree_flatten_with_path(state)
    leaves = {_leaf_key(path, escape): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise ValueError("two leaves of the state have the same path when keys become text")
    return leaves, structure


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_arrays(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a pytree into the arrays Orbax writes and a JSON description of every leaf."""
    arrays, tree = {}, {}
    for key, leaf in _flatten(state)[0].items():
        entry: dict[str, Any] = {}
        if _is_key(leaf):
            entry["prng"] = str(jax.random.key_impl(leaf))
            entry["shape"] = list(leaf.shape)
            leaf = jax.random.key_data(leaf)
        elif not isinstance(leaf, jax.Array):
            if not isinstance(leaf, np.ndarray | np.generic | bool | int | float):
                raise ValueError(f"state leaf {key} is a {type(leaf).__name__}, not an array")
            # Copied, because the caller may change it while the files are being written.
            leaf = np.array(leaf)
        if isinstance(leaf, jax.Array) and jax.process_count() > 1 and leaf.is_fully_addressable:
            leaf = np.array(leaf)
        entry.setdefault("shape", list(leaf.shape))
        entry["dtype"] = str(leaf.dtype)
        tree[key] = entry
        if leaf.size:  # Orbax refuses empty arrays; their description is enough to make them again
            arrays[key] = leaf
    return arrays, tree


def _restore_tree(
    path: Path,
    tree: Mapping[str, Mapping[str, Any]],
    like: Any,
    where: str,
    sources: Mapping[str, str] | None = None,
    *,
    escape: bool = True,
) -> Any:
    wanted, structure = _flatten(like, escape)
    _compare(tree, wanted, where)
    item, arguments = {}, {}
    for key, leaf in wanted.items():
        if not math.prod(tree[key]["shape"]):
            continue
        source = key if sources is None else sources[key]
        sharding = getattr(leaf, "sharding", None)
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
            if sharding is None:
                sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            item[source] = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
            arguments[source] = ocp.ArrayRestoreArgs(
                sharding=sharding, global_shape=data.shape, dtype=data.dtype
            )
        else:
            item[source] = np.zeros((), tree[key]["dtype"])
            arguments[source] = ocp.RestoreArgs(restore_type=np.ndarray)
    stored: dict[str, Any] = {}
    if item:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            stored = reader.restore(
                path / "arrays",
                args=ocp.args.PyTreeRestore(
                    item=item, restore_args=arguments, partial_restore=True
                ),
            )
    leaves = []
    for key, leaf in wanted.items():
        entry = tree[key]
        value = stored.get(key if sources is None else sources[key])
        if value is None:
            value = np.zeros(entry["shape"], entry["dtype"])
            if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
                value = jax.device_put(value, getattr(leaf, "sharding", None))
        if "prng" in entry:
            value = jax.random.wrap_key_data(value, impl=entry["prng"])
        elif isinstance(leaf, bool | int | float) and not isinstance(leaf, np.generic):
            value = type(leaf)(value)
        elif isinstance(leaf, np.generic):
            value = value[()]
        leaves.append(value)
    return jax.tree_util.tree_unflatten(structure, leaves)


def _compare(tree: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any], where: str) -> None:
    """Raises one line with all missing, unexpected and mis-shaped leaves."""
    faults = []
    missing = [key for key in wanted if key not in tree]
    unexpected = [key for key in tree if key not in wanted]
    if missing:
        faults.append(f"it lacks {_some(missing)}")
    if unexpected:
        faults.append(f"the model has no {_some(unexpected)}")
    differing = []
    for key in wanted.keys() & tree.keys():
        entry, leaf = tree[key], wanted[key]
        shape = list(np.shape(leaf)) if not hasattr(leaf, "shape") else list(leaf.shape)
        here = "key" if _is_key(leaf) else str(leaf.dtype) if hasattr(leaf, "dtype") else None
        there = "key" if "prng" in entry else entry["dtype"]
        if shape != list(entry["shape"]) or (here is not None and here != there):
            differing.append(f"{key} {there}{entry['shape']} (here {here}{shape})")
    if differing:
        faults.append(f"it differs in {_some(sorted(differing))}")
    if faults:
        raise ValueError(f"{where} does not fit the model: {'; '.join(faults)}")


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# -- files -----------------------------------------------------------------------------------------


def _candidates(directory: Path) -> list[tuple[int, Path]]:
    """Directories that may hold a finished checkpoint, by step."""
    found = {}
    for path in directory.iterdir():
        match = re.fullmatch(r"(\d+)(\.replaced)?", path.name)
        # `.replaced` counts alone: the run was killed between the two renames of a replacement.
        if match and not (match[2] and (directory / match[1]).exists()):
            found[int(match[1])] = path
    return sorted(found.items())


def _newest_sound(
    directory: Path,
) -> tuple[Path | None, dict[str, Any], list[tuple[Path, int, str]]]:
    """The newest sound one, its manifest, and `(path, step, problem)` of those passed over."""
    problems = []
    readable = []
    for step, path in _candidates(directory):
        manifest, problem = _examine(path, contents=False)
        if problem:
            problems.append((path, step, problem))
        else:
            readable.append((manifest["serial"], step, path))
    for path in directory.iterdir():
        match = re.fullmatch(r"(\d+)\.(unfinished|orbax-checkpoint-tmp.*)", path.name)
        if match:
            problem = f"{path.name} was never finished (the run ended while it was being written)"
            problems.append((path, int(match[1]), problem))
    for _, step, path in sorted(readable, reverse=True):
        manifest, problem = _examine(path)
        if not problem:
            return path, manifest, problems
        problems.append((path, step, problem))
    return None, {}, problems


def _read_manifest(path: Path) -> dict[str, Any]:
    """Raises ValueError or OSError unless the manifest is there to the last bit."""
    raw = (path / _MANIFEST).read_bytes()
    try:
        manifest = json.loads(raw)["manifest"]
        sound = _render(manifest) == raw
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{_MANIFEST} is damaged (its own checksum does not match)")
    return manifest


def _examine(path: Path, *, contents: bool = True) -> tuple[dict[str, Any], str | None]:
    """Returns the manifest and what is wrong with the checkpoint, if anything.

    With `contents`, every byte is read and compared with its checksum.
    """
    try:
        manifest = _read_manifest(path)
    except FileNotFoundError:
        return {}, f"it was never finished ({_MANIFEST} is missing)"
    except OSError as error:
        return {}, f"{_MANIFEST} cannot be read: {_one_line(error)}"
    except ValueError as error:
        return {}, str(error)
    if str(manifest["step"]) != path.name.partition(".")[0]:
        return {}, f"its {_MANIFEST} is that of step {manifest['step']}"

    def fault(name: str) -> str | None:
        expected = manifest["files"][name]
        try:
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                kind = "truncated" if size < expected["bytes"] else "too long"
                return f"{name} is {kind} ({size} bytes of {expected['bytes']})"
            if contents and _digest(path / name) != expected["sha256"]:
                return f"{name} is damaged (its SHA-256 does not match {_MANIFEST})"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {_one_line(error)}"
        return None

    if not contents:
        return manifest, next((f for f in map(fault, manifest["files"]) if f), None)
    with ThreadPoolExecutor(8) as pool:
        return manifest, next((f for f in pool.map(fault, manifest["files"]) if f), None)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_through_and_digest(path: Path) -> tuple[int, str]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return file.tell(), digest


def _write_directory_through(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _render(manifest: dict[str, Any]) -> bytes:
    body = json.dumps(manifest, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{{"sha256": "{digest}",\n"manifest": {body}}}\n'.encode()


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _plain(config: Any) -> Any:
    """The config as JSON has it (tuples become lists), so that it compares equal after a reload."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return json.loads(json.dumps(config, default=str))


def _dotted(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping) or (prefix and not config):
        return {prefix: config}
    flat = {}
    for key, value in config.items():
        flat.update(_dotted(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    if "No space left" in text:
        return os.strerror(errno.ENOSPC)
    return (text.strip().splitlines() or [type(error).__name__])[0][:300]


def _silence_orbax_tracebacks() -> None:
    """Orbax logs a traceback for each failed save, which is reported here in one line instead."""

    def keep(record: Any) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)

    logger = logging.get_absl_logger()
    if not getattr(logger, "_orbax_tracebacks_silenced", False):
        logger.addFilter(keep)
        logger._orbax_tracebacks_silenced = True
