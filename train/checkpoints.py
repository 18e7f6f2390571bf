"""Checkpoints that survive being killed: asynchronous Orbax saves under a checksummed manifest.

A finished checkpoint is `DIRECTORY/STEP/` with `arrays/` (Orbax), `config.json`, `manifest.json`.
Orbax writes into `STEP.unfinished/`; when every process has finished, process 0 writes the
manifest (size and SHA-256 of every file, shape and dtype of every leaf, and its own checksum) and
renames the directory. The rename is the only thing that makes a checkpoint exist.
"""

import errno
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

from train.checkpoint_arrays import restore_tree, to_arrays
from train.checkpoint_manifest import (
    MANIFEST,
    candidates,
    examine,
    newest_sound,
    one_line,
    read_manifest,
    render,
    write_directory_through,
    write_through_and_digest,
)

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
    "tensorboard",
    "workdir",
)
"""Config keys (and all keys below them) that may change between a checkpoint and its resumption."""
# Those of them on which what comes next depends; a change is said.
TOLD_CONFIG = ("parallel", "steps")


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
      timeout_s: seconds after which a process gives up waiting for the others to write their part.

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
        timeout_s: int = 1200,
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
        self._cleared = False
        self._timeout_s = timeout_s
        self._saves = 0
        try:
            if self._primary:
                self.directory.mkdir(parents=True, exist_ok=True)
                os.listdir(self.directory)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint directory {self.directory} cannot be used: {one_line(error)}"
            ) from error
        _silence_orbax_tracebacks()
        self._orbax = ocp.AsyncCheckpointer(
            # Weights do not compress, and zstd would take the time of a core.
            ocp.PyTreeCheckpointHandler(use_compression=False),
            timeout_secs=timeout_s,
        )
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
        leaves, tree = to_arrays(state)
        unfinished = self.directory / f"{step}.unfinished"
        self._saves += 1
        try:
            if self._primary:
                if not self._cleared:
                    self._clear_leftovers()
                    self._cleared = True
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
            found = dict(candidates(self.directory))
            if step not in found:
                raise ValueError(
                    f"no checkpoint of step {step} in {self.directory}; "
                    f"there are {self.steps() or 'none'}"
                )
            manifest, problem = examine(found[step])
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

    def metrics(self, step: int) -> dict[str, float | None]:
        """The numbers saved with checkpoint `step`, {} without one."""
        found = [m for _, m in self._sound_looking() if m["step"] == step]
        return dict(found[-1]["metrics"]) if found else {}

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
        except Exception as error:
            self._failed(step, error)  # as on all other processes, which Orbax keeps together
            return
        try:
            if self._primary:
                self._commit(step, unfinished, tree, metrics)
            self._failure = None
        except Exception as error:
            self._failed(step, error)
        try:
            # `wait` on any process then means: finished on all of them.
            self._barrier(key=f"checkpoint_{number}_{step}", timeout_ms=1000 * self._timeout_s)
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
            digests = list(pool.map(write_through_and_digest, files))
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
        temporary = unfinished / f"{MANIFEST}.unfinished"
        temporary.write_bytes(render(manifest))
        write_through_and_digest(temporary)
        temporary.rename(unfinished / MANIFEST)

        final = self.directory / str(step)
        replaced = self.directory / f"{step}.replaced"
        if final.exists():
            final.rename(replaced)
        unfinished.rename(final)
        write_directory_through(self.directory)
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
                if path in self._damaged or examine(path, contents=False)[1]:
                    aside = path.with_name(f"{step}.damaged")
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
                    self._damaged.discard(path)
            elif suffix == ".replaced" and not (self.directory / step).exists():
                path.rename(self.directory / step)
            else:
                shutil.rmtree(path)

    def _failed(self, step: int, error: BaseException) -> None:
        text = one_line(error)
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
        path, manifest, problems = newest_sound(directory)
        for line in _lines(directory, manifest, problems):
            self._report(line)
        self._damaged.update(damaged for damaged, _, _ in problems)
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
                path = dict(candidates(self.directory))[chosen]
                manifest = read_manifest(path)
        if failure is not None:
            raise failure
        return path, manifest

    def _check_config(self, path: Path) -> None:
        stored = path / "config.json"
        if self._config is None or not stored.exists():
            return
        then, now = _dotted(json.loads(stored.read_bytes())), _dotted(self._config)
        differing = {
            key: f"{key} {json.dumps(then[key]) if key in then else '(absent)'}"
            f" -> {json.dumps(now[key]) if key in now else '(absent)'}"
            for key in sorted(then.keys() | now.keys())
            if (key in then) != (key in now) or then.get(key) != now.get(key)
        }
        changed = [text for key, text in differing.items() if not _below(key, self._ignorable)]
        told = [text for key, text in differing.items() if _below(key, TOLD_CONFIG)]
        if told and not changed:
            self._report(
                f"since checkpoint {path.name}: {', '.join(told)}; schedules follow the new steps, "
                "and other devices add in another order"
            )
        if changed:
            raise ValueError(
                f"config differs from that of checkpoint {path.name} in {self.directory}: "
                f"{', '.join(changed)}; set them back or choose another --workdir"
            )

    def _read(self, path: Path, manifest: dict[str, Any], like: Any) -> Any:
        return restore_tree(path, manifest["tree"], like, f"checkpoint {path.name}")

    def _sound_looking(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for _, path in candidates(self.directory):
            if path not in self._damaged:
                manifest, problem = examine(path, contents=False)
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
    path: str | os.PathLike[str],
    like: Any = None,
    *,
    ema: bool = False,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Reads the variables of a saved `TrainState`, for `init_from`, `eval_only` and prediction.

    Args:
      path: a run directory, its `checkpoints` directory (the newest sound one is taken), or the
        directory of one step.
      like: a pytree `{"params": ..., collection: ...}` of `jax.ShapeDtypeStruct` (with `sharding`)
        or arrays; None reads everything as numpy arrays.
      ema: take the averaged parameters (and statistics, where averaged) where the run kept them.
      report: receives one line for each unfinished or damaged checkpoint that was passed over.

    Returns:
      `{"params": {...}, collection: {...}}` with nested dicts keyed as the modules are.

    Raises:
      FileNotFoundError: no checkpoint there. ValueError: it is damaged, or its leaves differ.
    """
    root = Path(path).absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such checkpoint or run directory")
    if (root / MANIFEST).exists() or (root.name.isdigit() and (root / "arrays").exists()):
        step, (manifest, problem) = root, examine(root)
        if problem:
            raise ValueError(f"checkpoint {root}: {problem}")
    else:
        directory = root / "checkpoints" if (root / "checkpoints").is_dir() else root
        step, manifest, problems = newest_sound(directory)
        for line in _lines(directory, manifest, problems):
            report(line)
        if step is None:
            raise FileNotFoundError(f"no sound checkpoint in {directory}")
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
        flat = restore_tree(step, wanted, like, f"checkpoint {step}", sources, escape=False)
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
    return restore_tree(step, wanted, like, f"checkpoint {step}", sources)


def _lines(
    directory: Path, chosen: Mapping[str, Any], problems: Sequence[tuple[Path, int, str]]
) -> Iterator[str]:
    instead = (
        f"using checkpoint {chosen['step']} instead"
        if chosen
        else "there is no earlier sound checkpoint"
    )
    for _, step, problem in problems:
        yield f"checkpoint {step} in {directory}: {problem}; {instead}"


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _plain(config: Any) -> Any:
    """The config as JSON has it (tuples become lists), so that it compares equal after a reload."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return json.loads(json.dumps(config, default=str))


def _below(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == p or key.startswith(f"{p}.") for p in prefixes)


def _dotted(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping) or (prefix and not config):
        return {prefix: config}
    flat = {}
    for key, value in config.items():
        flat.update(_dotted(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _silence_orbax_tracebacks() -> None:
    """Orbax logs a traceback for each failed save, which is reported here in one line instead."""

    def keep(record: Any) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)

    logger = logging.get_absl_logger()
    if not getattr(logger, "_orbax_tracebacks_silenced", False):
        logger.addFilter(keep)
        logger._orbax_tracebacks_silenced = True
