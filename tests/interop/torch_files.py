"""Files as `torch.save` lays them out, made without PyTorch, opcode by opcode."""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

STORAGE_NAMES = {
    np.dtype("<f8"): "DoubleStorage", np.dtype("<f4"): "FloatStorage",
    np.dtype("<f2"): "HalfStorage", np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype("<i8"): "LongStorage", np.dtype("<i4"): "IntStorage", np.dtype("<i2"): "ShortStorage",
    np.dtype("i1"): "CharStorage", np.dtype("u1"): "ByteStorage", np.dtype("?"): "BoolStorage",
    np.dtype("<c8"): "ComplexFloatStorage",
}  # fmt: skip


@dataclass(frozen=True)
class Name:
    """A GLOBAL opcode."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """REDUCE of a name with arguments, then BUILD where there is a state."""

    function: Any
    args: tuple
    state: Any = None


@dataclass(frozen=True)
class New:
    """NEWOBJ of a class, then BUILD."""

    cls: Name
    state: Any = None


@dataclass(frozen=True)
class Raw:
    """Opcodes as they are."""

    opcodes: bytes


@dataclass
class Strided:
    """A tensor over a storage: (key, array of the storage), offset, size and stride."""

    key: str
    storage: np.ndarray
    offset: Any = 0
    size: Any = None
    stride: Any = None
    count: Any = None
    rebuild: str = "_rebuild_tensor_v2"


@dataclass
class Writer:
    """Pickles (protocol 2) with the storages they mention gathered in `storages`."""

    legacy: bool = False
    storages: dict[str, np.ndarray] = field(default_factory=dict)

    def encode(self, value: Any) -> bytes:
        if isinstance(value, Raw):
            return value.opcodes
        if isinstance(value, Name):
            return b"c" + f"{value.module}\n{value.name}\n".encode()
        if isinstance(value, (Call, New)):
            if isinstance(value, Call):
                made = self.encode(value.function) + self.encode(value.args) + b"R"
            else:
                made = self.encode(value.cls) + b")\x81"
            return made + (b"" if value.state is None else self.encode(value.state) + b"b")
        if isinstance(value, np.ndarray):
            return self.encode(Strided(str(len(self.storages)), np.array(value, order="C")))
        if isinstance(value, Strided):
            return self._tensor(value)
        if value is None or isinstance(value, bool):
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        if isinstance(value, int):
            if 0 <= value < 256:
                return b"K" + bytes([value])
            if -(2**31) <= value < 2**31:
                return b"J" + struct.pack("<i", value)
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(raw)]) + raw
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if isinstance(value, str):
            raw = value.encode()
            return b"X" + struct.pack("<I", len(raw)) + raw
        if isinstance(value, tuple):
            return b"(" + b"".join(map(self.encode, value)) + b"t"
        if isinstance(value, list):
            return b"](" + b"".join(map(self.encode, value)) + b"e"
        if isinstance(value, dict):
            items = b"".join(self.encode(k) + self.encode(v) for k, v in value.items())
            return b"}(" + items + b"u"
        raise TypeError(type(value))

    def _tensor(self, t: Strided) -> bytes:
        flat = t.storage.reshape(-1)
        self.storages[t.key] = flat
        size = t.storage.shape if t.size is None else t.size
        if t.stride is None:
            steps = [1]
            for n in reversed(size[1:]):
                steps.insert(0, steps[0] * n)
            stride = tuple(steps[: len(size)])
        else:
            stride = t.stride
        kind = Name("torch", STORAGE_NAMES[flat.dtype])
        pid = ("storage", kind, t.key, "cpu", flat.size if t.count is None else t.count)
        pid += (None,) if self.legacy else ()
        storage = Raw(self.encode(pid) + b"Q")
        hooks = Call(Name("collections", "OrderedDict"), ())
        extra: tuple = (False, hooks)
        if t.rebuild == "_rebuild_tensor":
            extra = ()
        return self.encode(
            Call(Name("torch._utils", t.rebuild), (storage, t.offset, size, stride, *extra))
        )


def pickled(writer: Writer, value: Any) -> bytes:
    return b"\x80\x02" + writer.encode(value) + b"."


def zip_bytes(value: Any, *, compression: int = zipfile.ZIP_STORED, root: str = "archive") -> bytes:
    """A file of the zip format."""
    writer = Writer()
    stream = pickled(writer, value)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", stream)
        archive.writestr(f"{root}/byteorder", "little")
        for key, storage in writer.storages.items():
            archive.writestr(f"{root}/data/{key}", storage.tobytes())
        archive.writestr(f"{root}/version", "3\n")
    return out.getvalue()


def legacy_bytes(value: Any) -> bytes:
    """A file of the legacy format."""
    writer = Writer(legacy=True)
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    parts = [pickled(writer, v) for v in (0x1950A86A20F9469CFC6C, 1001, system, value)]
    parts.append(pickled(writer, list(writer.storages)))
    for storage in writer.storages.values():
        parts += [struct.pack("<q", storage.size), storage.tobytes()]
    return b"".join(parts)


def training_checkpoint() -> dict[str, Any]:
    """A dict as training scripts save it, with every kind of thing the reader knows."""
    base = np.arange(120, dtype=np.float32).reshape(10, 12)
    ordered = Name("collections", "OrderedDict")
    weights = {
        "conv.weight": base.reshape(5, 4, 6),
        "view": Strided("shared", base, 14, (3, 4), (12, 2)),
        "transposed": Strided("shared", base, 0, (12, 10), (1, 12)),
        "counter": np.array(3, np.int64),
        "half": np.arange(4, dtype=np.float16),
        "brain": np.arange(4, dtype=np.float32).astype(ml_dtypes.bfloat16),
        "flag": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
        "old": Strided(
            "old", np.arange(6, dtype=np.float64), 1, (2, 2), (2, 1), None, "_rebuild_tensor"
        ),
        "expanded": Strided("e", np.arange(3, dtype=np.int16), 0, (3, 4), (1, 0)),
    }
    writer_items = [[k, v] for k, v in weights.items()]
    dtype = Call(Name("numpy", "dtype"), ("f8", False, True), (3, "<", None, None, None, -1, -1, 0))
    raw = Call(Name("_codecs", "encode"), (np.float64(2.5).tobytes().decode("latin1"), "latin1"))
    return {
        "state_dict": Call(ordered, (writer_items,), {"_metadata": Call(ordered, ())}),
        "epoch": 3,
        "best": Call(Name("numpy.core.multiarray", "scalar"), (dtype, raw)),
        "args": New(Name("argparse", "Namespace"), {"lr": 0.1, "layers": [1, 2]}),
        "cfg": New(Name("omegaconf.dictconfig", "DictConfig"), {
            "_metadata": New(Name("omegaconf.base", "ContainerMetadata"), {
                "ref_type": Name("typing", "Any"), "key_type": Name("__builtin__", "long"),
            }),
            "_content": {"lr": New(Name("omegaconf.nodes", "AnyNode"), {"_val": 0.1})},
        }),
        "optimizer": {"state": {0: {"step": 5, "exp_avg": base[:1]}}, "groups": [{"lr": 0.1}]},
        "misc": [None, True, 2.5, -7, 2**70, ("a", "b"), Call(Name("builtins", "set"), ([1, 2],))],
        "size": Call(Name("torch", "Size"), ((1, 2),)),
    }  # fmt: skip
