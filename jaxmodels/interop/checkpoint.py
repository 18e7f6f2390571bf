"""Checkpoint files in and out: safetensors, npz, and PyTorch's own formats, memory-mapped.

Formats: safetensors (8-byte little-endian header length, JSON header, raw bytes; also the sharded
form with a `*.index.json`), NumPy's npz, and `.pth`/`.pt`/`.bin` through `torch_archive`. No file
is executed, and PyTorch is not needed.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_HEADER_LIMIT = 100_000_000  # as the safetensors library has it
_RANK_LIMIT = 32

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "C64": np.dtype("<c8"),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message names what is wrong."""


@dataclass
class Checkpoint:
    """Tensors of a file by their PyTorch names.

    `taken` says which nesting and prefixes were removed (`"state_dict_ema, prefix module."`),
    `others` which other weight sets the file holds, `metadata` what else was in a safetensors
    header.
    """

    tensors: dict[str, np.ndarray]
    taken: str = ""
    others: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)


def read(path: str | os.PathLike, *, prefer: Iterable[str] = ()) -> Checkpoint:
    """Read any supported checkpoint file; arrays are views into the mapped file where they can be.

    Args:
      path: the file, or a directory with exactly one checkpoint or index in it.
      prefer: names of nestings to take first, as `("state_dict_ema",)`.

    Raises: FileNotFoundError, `CheckpointError`.
    """
    from jaxmodels.interop import nesting

    path = Path(path)
    if path.is_dir():
        path = _only_checkpoint(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    metadata: dict[str, str] = {}
    if path.name.endswith(".index.json"):
        tree: Any = _read_shards(path)
    elif path.suffix == ".safetensors":
        tree, metadata = read_safetensors(path)
    elif path.suffix == ".npz":
        tree = read_npz(path)
    elif path.suffix in (".pth", ".pt", ".bin", ".ckpt", ".tar", ".zip"):
        from jaxmodels.interop import torch_archive

        tree = torch_archive.read(path)
    elif path.suffix == ".pkl":
        raise CheckpointError(
            f"{path}: a pickle of Python objects needs the code that wrote it and is never run; "
            "there, export a state_dict: torch.save(network.state_dict(), 'network.pt')"
        )
    else:
        raise CheckpointError(
            f"{path}: unknown ending {path.suffix!r}; a checkpoint ends in .safetensors, .npz, "
            ".pth, .pt or .bin (or is a *.index.json of shards)"
        )
    tensors, taken, others = nesting.unwrap(tree, os.fspath(path), prefer)
    return Checkpoint(tensors, taken, others, metadata)


def _only_checkpoint(directory: Path) -> Path:
    names = sorted(p.name for p in directory.iterdir())
    for pattern in (r".*\.index\.json", r".*\.(safetensors|pth|pt|bin|npz)"):
        hits = [n for n in names if re.fullmatch(pattern, n)]
        if len(hits) == 1:
            return directory / hits[0]
        if hits:
            raise CheckpointError(f"{directory} holds several checkpoints, name one: {hits}")
    raise CheckpointError(f"{directory} holds no checkpoint file")


def _read_shards(path: Path) -> dict[str, np.ndarray]:
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        files = sorted({str(f) for f in places.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: not an index of shards (no weight_map)") from None
    tensors: dict[str, np.ndarray] = {}
    for name in files:
        if Path(name).name != name or name.endswith(".index.json"):
            raise CheckpointError(f"{path}: shard {name!r} is not a file beside the index")
        shard = path.parent / name
        if not shard.is_file():
            raise CheckpointError(f"{path}: shard {name} is missing")
        for key, value in read(shard).tensors.items():
            if key in tensors:
                raise CheckpointError(f"{path}: {key} stands in two shards")
            tensors[key] = value
    absent = sorted(set(places) - set(tensors))
    if absent:
        raise CheckpointError(f"{path}: the shards lack {len(absent)} entries: {absent[:5]}")
    return tensors


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Every array of an npz file, no pickles. Raises FileNotFoundError and `CheckpointError`."""
    import zipfile

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        raise CheckpointError(f"{path}: not a readable npz file ({error})") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [k for k, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
    return dict(pairs)


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; the arrays are read-only views into the file."""
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise CheckpointError(f"{path}: not a safetensors file (header length {length})")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
            if not isinstance(header, dict):
                raise ValueError("header is not a JSON object")
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: bad safetensors header ({error})") from None
    metadata = header.pop("__metadata__", {})
    body = size - 8 - length
    data = np.memmap(path, np.uint8, "r", 8 + length, (body,)) if body else np.zeros(0, np.uint8)
    data = data.view(np.ndarray)  # a memmap subclass would make every later view slower
    tensors = {}
    covered = 0
    for key, spec in sorted(header.items(), key=_offset_of):
        try:
            dtype, shape = _DTYPES[spec["dtype"]], spec["shape"]
            begin, end = spec["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
                raise ValueError("negative or non-integer shape or offset")
            if len(shape) > _RANK_LIMIT:
                raise ValueError(f"{len(shape)} axes")
            if not begin <= end <= body or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"shape {shape} does not fit offsets {begin}..{end} of {body}")
            if begin != covered:
                raise ValueError(f"starts at {begin}, the one before it ends at {covered}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: tensor {key!r}: {error}") from None
        covered = end
        tensors[key] = data[begin:end].view(dtype).reshape(shape)
    if covered != body:
        raise CheckpointError(f"{path}: {body - covered} bytes at the end belong to no tensor")
    return tensors, metadata if isinstance(metadata, dict) else {}


def _offset_of(item: tuple[str, Any]) -> tuple[int, int]:
    try:
        begin, end = item[1]["data_offsets"]
        return int(begin), int(end)
    except (KeyError, TypeError, ValueError):
        return (-1, -1)


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors under their names, shapes, dtypes and bytes; all or nothing.

    Larger dtypes stand first (so that every tensor is aligned), then names in order, as the
    safetensors library orders them.
    """
    path = Path(path)
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    arrays = {key: np.asarray(value) for key, value in tensors.items()}
    for key, array in arrays.items():
        if array.dtype.newbyteorder("<") not in _DTYPE_NAMES and array.dtype not in _DTYPE_NAMES:
            raise CheckpointError(
                f"{path}: {key!r} has dtype {array.dtype}, which no checkpoint has"
            )
    order = sorted(arrays, key=lambda k: (-arrays[k].dtype.itemsize, k))
    offset = 0
    for key in order:
        array = arrays[key]
        dtype = array.dtype if array.dtype in _DTYPE_NAMES else array.dtype.newbyteorder("<")
        arrays[key] = array = array.astype(dtype, copy=False)
        header[key] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": [int(n) for n in array.shape],
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    handle, temporary = tempfile.mkstemp(dir=path.parent or ".", prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for key in order:
                file.write(np.ascontiguousarray(arrays[key]).reshape(-1).view(np.uint8).data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
