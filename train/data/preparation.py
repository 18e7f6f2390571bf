"""Preparing TFDS builders to array_record, once, without TensorFlow, whoever asks first."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

import tensorflow_datasets as tfds


def data_directory(path: str | None = None) -> pathlib.Path:
    """Where data is prepared: `path`, else `TFDS_DATA_DIR`, else `~/.cache/jaxmodels/tfds`."""
    chosen = path or os.environ.get("TFDS_DATA_DIR")
    if chosen:
        return pathlib.Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(cache).expanduser() / "jaxmodels" / "tfds"


def text(value: str | bytes) -> str:
    """A TFDS text feature as a string."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def prepare(builder_class: type, path: str | None = None, **arguments) -> tfds.core.DatasetBuilder:
    """A builder of `builder_class` whose array_record files exist under `data_directory(path)`.

    Any number of processes may call this at once: a file lock lets one prepare, the others wait
    and reuse. TFDS writes to a temporary folder and renames it, so that a killed preparation
    leaves nothing that could be taken for data; its leftovers go at the next preparation.

    Raises:
      OSError: one line naming `data.options.path` when the folder cannot be written.
    """
    directory = data_directory(path)

    def build() -> tfds.core.DatasetBuilder:
        return builder_class(data_dir=directory, file_format="array_record", **arguments)

    # Without the folder there is nothing prepared, and TFDS would search other places for it.
    if directory.is_dir():
        builder = build()
        if _is_prepared(builder):
            return builder
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory / f".{builder_class.name}.lock"):
            builder = build()
            if _is_prepared(builder):
                return builder
            parent = pathlib.Path(builder.data_dir).parent
            for leftover in parent.glob("incomplete.*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with _quietly():
                builder.download_and_prepare()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.errno is None:
            raise  # as below
        reason = error.strerror or error
        raise OSError(
            f"cannot prepare {builder_class.name} in {directory}: {reason}; set data.options.path "
            "(or TFDS_DATA_DIR) to a folder that can be written"
        ) from error
    return builder


def prepare_folder(
    name: str, path: str | None, fill: Callable[[pathlib.Path], None]
) -> pathlib.Path:
    """The folder `name` under `data_directory(path)`, filled by `fill(folder)` on first use.

    As with `prepare`, one process fills it while the others wait, under a temporary name, so that
    nothing half-written is ever found. Raises OSError naming `data.options.path`.
    """
    directory = data_directory(path)
    folder = directory / name
    if folder.is_dir():
        return folder
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory / f".{name}.lock"):
            if not folder.is_dir():
                part = directory / f"{name}.part"
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                fill(part)
                part.rename(folder)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.errno is None:
            raise  # a file of the user's that is not there, not a folder that cannot be written
        reason = error.strerror or error
        raise OSError(
            f"cannot prepare {name} in {directory}: {reason}; set data.options.path (or "
            "TFDS_DATA_DIR) to a folder that can be written"
        ) from error
    return folder


def _is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    return (pathlib.Path(builder.data_dir) / "dataset_info.json").is_file()


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    # TFDS prints that it downloads, which it does not here, and draws several bars.
    from tensorflow_datasets.core.utils import tqdm_utils

    before = tqdm_utils._active
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if before:
            tfds.enable_progress_bar()
