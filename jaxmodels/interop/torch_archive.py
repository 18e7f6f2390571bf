"""PyTorch's own files (`torch.save`): the zip archive and the legacy stream, without PyTorch.

Zip: entries `NAME/data.pkl`, `NAME/data/KEY`, ..., all stored uncompressed, so that storages are
views into the mapped file. Legacy: five pickles (magic number, protocol, system, object, storage
keys), then for each key its element count (int64) and the raw elements.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.interop.checkpoint import CheckpointError
from jaxmodels.interop.restricted_pickle import (
    Budget,
    Reader,
    Refused,
    Storage,
    Tensor,
    View,
    resolve,
)

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_BASE_BUDGET = 48 << 20
_ENTRY_COST = 700


def read(path: str | os.PathLike) -> Any:
    """The object a file holds, as dicts, lists, tuples, numbers, strings and read-only arrays.

    Raises CheckpointError, whatever the file holds.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise Refused("is empty")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            budget = Budget(_BASE_BUDGET + size // 2)
            data = np.frombuffer(mapped, np.uint8)
            structure = FileBytes(file.fileno(), size)
            if structure[:4] == b"PK\x03\x04":
                return _read_zip(data, structure, budget)
            return _read_legacy(data, structure, budget)
    except Refused as error:
        raise CheckpointError(f"{path}: the file {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except Exception as error:
        # The unpickler says what a broken stream is by many kinds of exception.
        text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise CheckpointError(f"{path}: not a readable PyTorch file ({text})") from None


class FileBytes:
    """Slices of a file read through one small block, for the structure between the tensors.

    Touching the mapping for it would map two megabytes around each header.
    """

    _BLOCK = 1 << 16

    def __init__(self, descriptor: int, size: int):
        self.descriptor, self.size = descriptor, size
        self.at, self.block = 0, b""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        begin, end, _ = part.indices(self.size)
        if begin >= end:
            return b""
        if not self.at <= begin or end > self.at + len(self.block):
            length = max(end - begin, self._BLOCK)
            self.at, self.block = begin, os.pread(self.descriptor, length, begin)
        return self.block[begin - self.at : end - self.at]


def _load(view: View) -> Any:
    return Reader(view).load()


def _top(tree: Any) -> Any:
    if not isinstance(tree, (dict, list, Tensor)):
        raise Refused(f"holds a {type(tree).__name__}, not a dict, list or tensor")
    return tree


def _tensor_array(tensor: Tensor, storage: np.ndarray, budget: Budget) -> np.ndarray:
    """A view into a storage's bytes; sizes, strides and offset are checked as Python integers."""
    itemsize = tensor.dtype.itemsize
    available = len(storage) // itemsize
    count = math.prod(tensor.size)
    budget.charge(500)
    if count == 0:
        if any(n >= 1 << 40 for n in tensor.size):
            raise Refused(f"has a tensor of size {tensor.size}")
        return np.empty(tensor.size, tensor.dtype)
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.size, tensor.stride, strict=True))
    if last >= available:
        raise Refused(
            f"has a tensor of size {tensor.size}, stride {tensor.stride}, offset {tensor.offset} "
            f"in a storage of {available} elements"
        )
    # An expanded tensor (stride 0) takes no room here, but would wherever it is copied.
    budget.charge(max(0, count - available) * itemsize)
    return np.ndarray(
        tensor.size,
        tensor.dtype,
        buffer=storage.data,
        offset=tensor.offset * itemsize,
        strides=tuple(
            s * itemsize if n > 1 else itemsize for n, s in zip(tensor.size, tensor.stride)
        ),
    )


# The zip archive.


def _u(data: FileBytes, at: int, form: str) -> tuple[int, ...]:
    size = struct.calcsize(form)
    if at < 0 or at + size > len(data):
        raise Refused("has a zip structure that points outside it")
    return struct.unpack(form, data[at : at + size])


def _end_record(data: FileBytes) -> tuple[int, int, int, int]:
    """(entries, size and offset of the central directory, offset of what follows it)."""
    tail_at = max(0, len(data) - 65557)
    at = data[tail_at:].rfind(b"PK\x05\x06")
    if at < 0:
        raise Refused("is a zip archive without its end (truncated?)")
    at += tail_at
    disk, start_disk, here, total, size, offset, comment = _u(data, at + 4, "<4H2IH")
    end = at
    if at + 22 + comment != len(data):
        raise Refused("has bytes after the end of the zip archive")
    locator = at - 20
    if locator >= 0 and data[locator : locator + 4] == b"PK\x06\x07":
        _, record, _ = _u(data, locator + 4, "<IQI")
        if data[record : record + 4] != b"PK\x06\x06" or record + 56 > locator:
            raise Refused("has a broken zip64 end record")
        disk, start_disk, here, total, size, offset = _u(data, record + 16, "<2I4Q")
        end = record
    if disk or start_disk or here != total:
        raise Refused("is one disk of several of a zip archive")
    if offset + size != end:
        raise Refused("has a zip directory of the wrong size")
    return total, size, offset, end


def _zip64(extra: bytes, fields: list[int]) -> list[int]:
    """Replace the fields that are all ones by those of the zip64 extra field, in order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        body = extra[at + 4 : at + 4 + length]
        if len(body) < length:
            raise Refused("has a broken extra field in the zip directory")
        if kind == 1:
            for n, value in enumerate(fields):
                if value == 0xFFFFFFFF:
                    if len(body) < 8:
                        raise Refused("has a short zip64 field")
                    fields[n], body = int.from_bytes(body[:8], "little"), body[8:]
        at += 4 + length
    return fields


def zip_entries(data: FileBytes, budget: Budget) -> dict[str, tuple[int, int, int]]:
    """{name: (begin, end, crc)} of a zip archive whose entries are all stored, none overlapping.

    Raises Refused for compressed, encrypted, duplicate, overlapping or mismatched entries.
    """
    total, size, at, _ = _end_record(data)
    if total * 46 > size:
        raise Refused("has fewer zip entries than it says")
    budget.charge(total * _ENTRY_COST)
    entries: dict[str, tuple[int, int, int]] = {}
    stop = at + size
    spans = []
    for _ in range(total):
        if at + 46 > stop or data[at : at + 4] != b"PK\x01\x02":
            raise Refused("has a broken zip directory")
        header = _u(data, at + 4, "<6H3I5H2I")
        _, _, flags, method, _, _, crc, packed, full = header[:9]
        names, extras, comment, disk, _, _, local = header[9:]
        head = at + 46
        at = head + names + extras + comment
        if at > stop:
            raise Refused("has a broken zip directory")
        raw_name = data[head : head + names]
        extra = data[head + names : head + names + extras]
        full, packed, local = _zip64(extra, [full, packed, local])
        name = raw_name.decode("utf-8")
        if name in entries:
            raise Refused(f"has two zip entries {name[:80]!r}")
        if method != 0 or flags & 1 or packed != full:
            raise Refused(f"has the compressed or encrypted zip entry {name[:80]!r}")
        if disk:
            raise Refused(f"keeps the zip entry {name[:80]!r} on another disk")
        if data[local : local + 4] != b"PK\x03\x04":
            raise Refused(f"has no local header for the zip entry {name[:80]!r}")
        _, lflags, lmethod, _, _, lcrc, lpacked, lfull, lnames, lextras = _u(
            data, local + 4, "<5H3I2H"
        )
        begin = local + 30 + lnames + lextras
        if data[local + 30 : local + 30 + lnames] != raw_name or lmethod or lflags & 1:
            raise Refused(f"has a local header that differs for the zip entry {name[:80]!r}")
        if not lflags & 8:
            lextra = data[local + 30 + lnames : begin]
            if _zip64(lextra, [lfull, lpacked]) != [full, packed] or lcrc != crc:
                raise Refused(f"has a local header that differs for the zip entry {name[:80]!r}")
        if begin + full > len(data):
            raise Refused(f"ends inside the zip entry {name[:80]!r}")
        entries[name] = (begin, begin + full, crc)
        spans.append((local, begin + full))
    if at != stop:
        raise Refused("has more zip entries than it says")
    spans.sort()
    for (_, end), (begin, _) in itertools.pairwise(spans):
        if begin < end:
            raise Refused("has zip entries that overlap")
    return entries


def _read_zip(data: np.ndarray, view: FileBytes, budget: Budget) -> Any:
    entries = zip_entries(view, budget)
    roots = [n[: -len("data.pkl")] for n in entries if n == "data.pkl" or n.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refused(f"has {len(roots)} entries named data.pkl, a PyTorch archive has one")
    root = roots[0]
    if f"{root}constants.pkl" in entries or any(n.startswith(f"{root}code/") for n in entries):
        raise Refused("is a TorchScript archive; save torch.jit.load(it).state_dict() instead")
    if f"{root}byteorder" in entries:
        begin, end, _ = entries[f"{root}byteorder"]
        if view[begin : min(end, begin + 16)] != b"little":
            raise Refused("was not written on a little-endian machine")
    begin, end, crc = entries[f"{root}data.pkl"]
    budget.charge(end - begin)
    if crc and zlib.crc32(view[begin:end]) != crc:
        raise Refused("has a data.pkl whose checksum is wrong")
    tree = _top(_load(View(view, begin, end, budget)))

    def array(tensor: Tensor) -> np.ndarray:
        storage = tensor.storage
        name = f"{root}data/{storage.key}"
        if name not in entries:
            raise Refused(f"lacks the storage {storage.key!r}")
        begin, end, _ = entries[name]
        return _tensor_array(tensor, _storage_bytes(data[begin:end], storage, None), budget)

    return resolve(tree, array)


def _storage_bytes(raw: np.ndarray, storage: Storage, declared: int | None) -> np.ndarray:
    item = storage.dtype.itemsize
    begin, size = storage.start * item, storage.count * item
    if declared is None and not storage.start and len(raw) != size:
        raise Refused(f"has {len(raw)} bytes for the storage {storage.key!r}, {size} are due")
    if begin + size > len(raw):
        raise Refused(f"has a storage {storage.key!r} that is shorter than its use")
    return raw[begin : begin + size]


# The legacy stream.


def _read_legacy(data: np.ndarray, view: FileBytes, budget: Budget) -> Any:
    if len(view) > 263 and view[257:262] == b"ustar":
        raise Refused("is a tar archive as PyTorch wrote before 0.1.10; save it again")
    stream = View(view, 0, len(view), budget)
    if view[:1] != b"\x80" or _load(stream) != _LEGACY_MAGIC:
        raise Refused("is no PyTorch file (neither a zip archive nor the legacy stream)")
    if _load(stream) != 1001:
        raise Refused("has an unknown version of the legacy format")
    system = _load(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("was not written on a little-endian machine")
    reader = Reader(stream)
    tree = _top(reader.load())
    keys = _load(stream)
    if not isinstance(keys, list) or not all(type(k) is str for k in keys):
        raise Refused("has no list of storage keys")
    if len(set(keys)) != len(keys):
        raise Refused("has a storage key twice")
    declared = reader.storages
    if reader.in_two_dtypes:
        raise Refused(f"has the storage {reader.in_two_dtypes!r} in two dtypes")
    spans: dict[str, np.ndarray] = {}
    at = stream.position
    for key in keys:
        if key not in declared:
            raise Refused(f"has the storage {key!r}, which no tensor uses")
        (count,) = _u(view, at, "<q")
        end = at + 8 + count * declared[key].itemsize
        if count < 0 or end > len(view):
            raise Refused(f"ends inside the storage {key!r}")
        spans[key] = data[at + 8 : end]
        at = end
    if at != len(view):
        raise Refused(f"has {len(view) - at} bytes after its last storage")

    def array(tensor: Tensor) -> np.ndarray:
        if tensor.storage.key not in spans:
            raise Refused(f"lacks the storage {tensor.storage.key!r}")
        raw = spans[tensor.storage.key]
        return _tensor_array(tensor, _storage_bytes(raw, tensor.storage, len(raw)), budget)

    return resolve(tree, array)
