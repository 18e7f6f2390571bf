"""A pickle reader that knows the data of PyTorch checkpoints and calls nothing.

It stands on the pure-Python `pickle._Unpickler` (the C one can set attributes of whatever it was
given) and replaces every opcode that could call, import or mutate: names resolve to inert tags by
exact match, nothing is imported, and a budget bounds memory and time by the size of the file.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

_LINE_LIMIT = 1 << 16
_DEPTH_LIMIT = 100
_ENTRY_LIMIT = 4_000_000
_OPCODE_COST = 48  # bytes; a bound on time too, as every opcode takes a few microseconds at most
_MEMO_COST = 100
_OBJECT_COST = 300


class Refused(Exception):
    """The pickle asks for something this reader does not do; the message says what."""


class Budget:
    """Bytes that reading a file may take beside its tensors."""

    def __init__(self, size: int):
        self.left = size

    def charge(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise Refused("needs more memory than a checkpoint of its size can")


class View:
    """A bounded part of a buffer (its slices are bytes), read as the unpickler reads a file."""

    def __init__(self, buffer: Any, begin: int, end: int, budget: Budget):
        self.buffer, self.position, self.end, self.budget = buffer, begin, end, budget

    def read(self, size: int) -> bytes:
        if size < 0 or size > self.end - self.position:
            raise Refused("ends in the middle of the pickle")
        if size > 8:
            self.budget.charge(4 * size)  # text may take four bytes a character
        start, self.position = self.position, self.position + size
        return bytes(self.buffer[start : self.position])

    def readline(self) -> bytes:
        window = bytes(self.buffer[self.position : min(self.end, self.position + _LINE_LIMIT)])
        length = window.find(b"\n") + 1
        if not length:
            raise Refused("has an endless line in the pickle")
        return self.read(length)


@dataclass(frozen=True)
class Tag:
    """An inert name; `kind` is "storage", "dtype", "call", "skipped" or "type"."""

    name: str
    kind: str
    value: Any = None


class Skipped:
    """An object left out of the result, known only by the name of its class."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


@dataclass(frozen=True)
class Storage:
    """A storage by its key; `count` elements of `dtype` from element `start` on."""

    key: str
    dtype: np.dtype
    count: int
    start: int = 0


@dataclass(frozen=True)
class Tensor:
    """A tensor not yet read: elements `offset + sum(index * stride)` of a storage."""

    storage: Storage
    dtype: np.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class NumpyDtype:
    """`numpy.dtype` while its state is still to come."""

    __slots__ = ("code", "order")

    def __init__(self, code: str):
        self.code, self.order = code, "<"


_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_TORCH_DTYPES = {
    "float64": "<f8", "double": "<f8", "float32": "<f4", "float": "<f4", "float16": "<f2",
    "half": "<f2", "bfloat16": _BFLOAT16, "int64": "<i8", "long": "<i8", "int32": "<i4",
    "int": "<i4", "int16": "<i2", "short": "<i2", "int8": "i1", "uint8": "u1", "uint16": "<u2",
    "uint32": "<u4", "uint64": "<u8", "bool": "?", "complex64": "<c8", "complex128": "<c16",
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2",
    "BFloat16Storage": _BFLOAT16, "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2",
    "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?", "ComplexFloatStorage": "<c8",
    "ComplexDoubleStorage": "<c16",
}  # fmt: skip
_NUMPY_CODES = {
    "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1", "c8", "c16",
}  # fmt: skip
# Set aside by name, whatever they hold: settings, devices and random states beside the weights.
_SKIPPED = (
    "argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath", "pathlib.WindowsPath",
    "pathlib.PurePosixPath", "pathlib._local.PosixPath", "easydict.EasyDict",
    "yacs.config.CfgNode", "ml_collections.config_dict.config_dict.ConfigDict", "torch.device",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    # Lightning's files with PyTorch 1: OneCycleLR's state holds a method of it, and so all of it.
    "torch.optim.lr_scheduler.OneCycleLR", "torch.optim.adam.Adam", "torch.optim.adamw.AdamW",
    "torch.optim.sgd.SGD", "transformers.optimization.AdamW", "jsonargparse.namespace.Namespace",
    # Of fairseq, as its trainer wrote them for a while.
    "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.nodes.{kind}Node" for kind in
      ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")),
)  # fmt: skip

_CONSTRUCTORS: dict[tuple[str, str], Tag] = {}


def _declare(module: str, name: str, kind: str, value: Any = None) -> None:
    _CONSTRUCTORS[module, name] = Tag(f"{module}.{name}", kind, value)


for _name, _code in _TORCH_DTYPES.items():
    _declare("torch", _name, "dtype", np.dtype(_code))
for _name, _code in _STORAGES.items():
    _declare("torch", _name, "storage", np.dtype(_code))
    _declare("torch.cuda", _name, "storage", np.dtype(_code))
for _module in ("torch", "torch.storage"):
    _declare(_module, "UntypedStorage", "storage", np.dtype("u1"))
for _full in _SKIPPED:
    _declare(*_full.rsplit(".", 1), "skipped")
for _module in ("builtins", "__builtin__"):
    for _name in ("object", "int", "long", "float", "list", "dict", "bool", "str", "tuple"):
        _declare(_module, _name, "type")
_declare("numpy", "ndarray", "type")
_declare("typing", "Any", "type")


def _constructor(*names: str) -> Callable:
    def register(function: Callable) -> Callable:
        for full in names:
            _declare(*full.rsplit(".", 1), "call", function)
        return function

    return register


def _integer(value: Any, what: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 1 << 62:
        raise Refused(f"has {_show(value)} as {what}")
    return value


def _integers(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or len(values) > 32:
        raise Refused(f"has {_show(values)} as {what}")
    return tuple(_integer(v, what) for v in values)


def _show(value: Any) -> str:
    """Short and safe to print: never the repr of a container, which may be huge."""
    if isinstance(value, (int, float, str, bytes, type(None))):
        return repr(value if not isinstance(value, int) or abs(value) < 1 << 128 else "a huge int")[
            :60
        ]
    return f"a {type(value).__name__}"


def _key(key: Any) -> Any:
    """A dict key or set member whose hash nobody can steer and whose hashing cannot recurse."""
    if type(key) in (str, bytes, bool, float, type(None)):
        return key
    if type(key) is int and abs(key) < 1 << 60:
        return key
    if type(key) is tuple and len(key) <= 8 and all(type(k) is str for k in key):
        return key
    raise Refused(f"has {_show(key)} as a dict key or set member")


@_constructor("collections.OrderedDict")
def _ordered_dict(reader: Reader, *args: Any) -> dict:
    if not args:
        return {}
    (pairs,) = args
    if not isinstance(pairs, list) or not all(
        isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs
    ):
        raise Refused("has an OrderedDict that is not made of pairs")
    return {_key(k): v for k, v in pairs}


@_constructor("collections.defaultdict")
def _default_dict(reader: Reader, *args: Any) -> dict:
    if len(args) > 1 or (args and not (args[0] is None or isinstance(args[0], Tag))):
        raise Refused("has a defaultdict with unusual arguments")
    return {}


@_constructor("builtins.set", "__builtin__.set", "builtins.frozenset", "__builtin__.frozenset")
def _set(reader: Reader, *args: Any) -> set:
    if not args:
        return set()
    (members,) = args
    if not isinstance(members, (list, tuple)):
        raise Refused("has a set that is not made from a list")
    return {_key(m) for m in members}


@_constructor("torch.Size")
def _size(reader: Reader, *args: Any) -> tuple[int, ...]:
    return _integers(args[0] if args else (), "a torch.Size")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: np.dtype | None) -> Tensor:
    if not isinstance(storage, Storage):
        raise Refused(f"builds a tensor from {_show(storage)}, not from a storage")
    size, stride = _integers(size, "a size"), _integers(stride, "a stride")
    if len(size) != len(stride):
        raise Refused(f"has a tensor with {len(size)} sizes and {len(stride)} strides")
    offset = _integer(offset, "a storage offset")
    return Tensor(storage, storage.dtype if dtype is None else dtype, offset, size, stride)


@_constructor("torch._utils._rebuild_tensor")
def _rebuild_tensor(reader: Reader, storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    return _tensor(storage, offset, size, stride, None)


@_constructor("torch._utils._rebuild_tensor_v2")
def _rebuild_tensor_v2(
    reader: Reader, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any,
    metadata: Any = None,
) -> Tensor:  # fmt: skip
    return _tensor(storage, offset, size, stride, None)


@_constructor("torch._utils._rebuild_tensor_v3")
def _rebuild_tensor_v3(
    reader: Reader, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any,
    dtype: Any, metadata: Any = None,
) -> Tensor:  # fmt: skip
    if not isinstance(dtype, Tag) or dtype.kind != "dtype":
        raise Refused(f"has {_show(dtype)} as a tensor's dtype")
    return _tensor(storage, offset, size, stride, dtype.value)


@_constructor("torch._utils._rebuild_parameter")
def _rebuild_parameter(reader: Reader, data: Any, grad: Any, hooks: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Refused(f"has a parameter made from {_show(data)}")
    return data


@_constructor("_codecs.encode")
def _encode(reader: Reader, text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refused(f"encodes {_show(text)} as {_show(encoding)}")
    reader.budget.charge(len(text))
    return text.encode("latin1")


@_constructor("numpy.dtype")
def _numpy_dtype(reader: Reader, code: Any, *flags: Any) -> NumpyDtype:
    if type(code) is not str or code.lstrip("<|=") not in _NUMPY_CODES:
        raise Refused(f"has the numpy dtype {_show(code)}")
    return NumpyDtype(code.lstrip("<|="))


@_constructor("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
def _numpy_scalar(reader: Reader, dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, NumpyDtype) or type(data) is not bytes:
        raise Refused("has a numpy scalar with unusual arguments")
    kind = np.dtype(dtype.order + dtype.code)
    if len(data) != kind.itemsize:
        raise Refused(f"has a numpy scalar of {len(data)} bytes for {kind}")
    return np.frombuffer(data, kind)[0].item()


@_constructor("copyreg._reconstructor", "copy_reg._reconstructor")
def _reconstructor(reader: Reader, cls: Any, *args: Any) -> Skipped:
    if not isinstance(cls, Tag) or cls.kind != "skipped":
        raise Refused(f"reconstructs {cls.name if isinstance(cls, Tag) else _show(cls)}")
    return Skipped(cls.name)


@_constructor("builtins.getattr", "__builtin__.getattr")
def _attribute(reader: Reader, owner: Any, name: Any) -> Skipped:
    """An attribute of an object that is left out is left out as well; nothing is looked up."""
    known = owner.kind == "skipped" if isinstance(owner, Tag) else isinstance(owner, Skipped)
    if not known or type(name) is not str:
        raise Refused(f"asks for an attribute of {_show(owner)}")
    return Skipped("builtins.getattr")


class Reader(pickle._Unpickler):
    """Reads one pickle; `load()` gives dicts, lists, numbers, `Tensor`s and `Skipped`s."""

    def __init__(self, view: View):
        super().__init__(view, encoding="utf-8")
        self.budget = view.budget
        # Of all that were mentioned, those of tensors inside skipped objects too.
        self.storages: dict[str, np.dtype] = {}
        self.in_two_dtypes = ""

    def find_class(self, module: Any, name: Any) -> Tag:
        tag = _CONSTRUCTORS.get((module, name))
        if tag is None:
            full = f"{module}.{name}"[:200]
            hint = ""
            if full.startswith("torch.nn.") or full.startswith("__main__."):
                hint = "; save model.state_dict() instead of the model"
            raise Refused(f"asks for {full!r}, which this reader does not construct{hint}")
        return tag

    def persistent_load(self, pid: Any) -> Storage:
        """`("storage", type, key, location, count[, view])`."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise Refused("has a persistent id that is not a storage")
        _, kind, key, _, count, *view = pid
        if not isinstance(kind, Tag) or kind.kind != "storage":
            raise Refused(f"has a storage of type {kind.name if isinstance(kind, Tag) else '?'}")
        if type(key) is not str or not 0 < len(key) < 200 or "/" in key or "\\" in key:
            raise Refused(f"has {_show(key)} as a storage key")
        count, start = _integer(count, "a storage length"), 0
        if key not in self.storages:
            self.budget.charge(_MEMO_COST)
            self.storages[key] = kind.value
        if self.storages[key] != kind.value:
            self.in_two_dtypes = key
        if view and view[0] is not None:
            if not isinstance(view[0], (tuple, list)) or len(view[0]) != 3:
                raise Refused("has an unusual storage view")
            start = _integer(view[0][1], "a view offset")
            length = _integer(view[0][2], "a view length")
            if start + length > count:
                raise Refused(f"has a storage view {start}+{length} of {count} elements")
            return Storage(key, kind.value, length, start)
        return Storage(key, kind.value, count, start)

    # What the opcodes may do, all else being refused.

    def _call(self) -> None:
        args, function = self.stack.pop(), self.stack[-1]
        if not isinstance(args, tuple):
            raise Refused("calls with something other than a tuple")
        if not isinstance(function, Tag) or function.kind not in ("call", "skipped"):
            name = function.name if isinstance(function, Tag) else _show(function)
            raise Refused(f"calls {name}, which is no constructor")
        self.budget.charge(_OBJECT_COST)
        if function.kind == "skipped":
            self.stack[-1] = Skipped(function.name)
            return
        try:
            self.stack[-1] = function.value(self, *args)
        except (TypeError, ValueError) as error:
            raise Refused(f"calls {function.name} with wrong arguments ({error})") from None

    def _new_object(self) -> None:
        args, cls = self.stack.pop(), self.stack[-1]
        if not isinstance(cls, Tag) or not isinstance(args, tuple):
            raise Refused(f"makes an object of {_show(cls)}")
        if cls.kind == "skipped":
            self.budget.charge(_OBJECT_COST)
            self.stack[-1] = Skipped(cls.name)
        elif cls.name == "collections.OrderedDict" and not args:
            self.stack[-1] = {}
        else:
            raise Refused(f"makes an object of {cls.name}")

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, NumpyDtype):
            if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", "="):
                raise Refused("has a numpy dtype with an unusual state")
        elif not isinstance(target, (dict, Skipped)):
            # An OrderedDict's state is the `_metadata` of a state dict; it is of no use here.
            raise Refused(f"sets the state of {_show(target)}")

    def _store(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, Skipped):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise Refused(f"stores items into {_show(target)}")
        for n in range(0, len(items), 2):
            # A whole optimizer has its state by parameter; only its `state_dict` has names.
            if not isinstance(items[n], Tensor):
                target[_key(items[n])] = items[n + 1]

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.budget.charge(_MEMO_COST)
        self._store(self.stack[-1], [key, value])

    def _set_items(self) -> None:
        items = self.pop_mark()
        self.budget.charge(_MEMO_COST * len(items) // 2)
        self._store(self.stack[-1], items)

    def _dict(self) -> None:
        items = self.pop_mark()
        self.budget.charge(_MEMO_COST * len(items) // 2)
        made: dict = {}
        self._store(made, items)
        self.append(made)

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Skipped):
            return
        if type(target) is not list:
            raise Refused(f"appends to {_show(target)}")
        target.extend(items)

    def _append_one(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def _append_many(self) -> None:
        self._extend(self.pop_mark())

    def _add_items(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        if type(target) is not set:
            raise Refused(f"adds to {_show(target)}")
        self.budget.charge(_MEMO_COST * len(items))
        target.update(_key(i) for i in items)

    def _frozen_set(self) -> None:
        items = self.pop_mark()
        self.budget.charge(_MEMO_COST * len(items))
        self.append({_key(i) for i in items})


_REPLACED = {
    pickle.REDUCE: Reader._call,
    pickle.NEWOBJ: Reader._new_object,
    pickle.BUILD: Reader._build,
    pickle.SETITEM: Reader._set_item,
    pickle.SETITEMS: Reader._set_items,
    pickle.DICT: Reader._dict,
    pickle.APPEND: Reader._append_one,
    pickle.APPENDS: Reader._append_many,
    pickle.ADDITEMS: Reader._add_items,
    pickle.FROZENSET: Reader._frozen_set,
}
_REFUSED = {
    pickle.INST: "INST", pickle.OBJ: "OBJ", pickle.NEWOBJ_EX: "NEWOBJ_EX", pickle.EXT1: "EXT1",
    pickle.EXT2: "EXT2", pickle.EXT4: "EXT4", pickle.PERSID: "PERSID",
    # Reading it would import a codec; PyTorch has never written it.
    pickle.UNICODE: "UNICODE",
    pickle.BYTEARRAY8: "BYTEARRAY8", pickle.NEXT_BUFFER: "NEXT_BUFFER",
    pickle.READONLY_BUFFER: "READONLY_BUFFER",
}  # fmt: skip
_MEMO = {pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE}
_CONTAINERS = {
    pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_SET, pickle.MARK, pickle.GLOBAL,
    pickle.STACK_GLOBAL, pickle.FRAME, pickle.BINPERSID,
}  # fmt: skip


def _charged(function: Callable, cost: int) -> Callable:
    def run(self: Reader) -> None:
        self.budget.charge(cost)
        function(self)

    return run


def _refusal(name: str) -> Callable:
    def run(self: Reader) -> None:
        raise Refused(f"uses the pickle opcode {name}")

    return run


def _dispatch() -> dict[int, Callable]:
    table = {}
    for code, function in pickle._Unpickler.dispatch.items():
        opcode = bytes([code])
        if opcode in _REFUSED:
            table[code] = _refusal(_REFUSED[opcode])
            continue
        cost = _OPCODE_COST
        cost += _MEMO_COST * (opcode in _MEMO) + 4 * _OPCODE_COST * (opcode in _CONTAINERS)
        table[code] = _charged(_REPLACED.get(opcode, function), cost)
    return table


Reader.dispatch = _dispatch()


def resolve(tree: Any, read: Callable[[Tensor], np.ndarray]) -> Any:
    """The tree with every `Tensor` read and every `Skipped` object left out.

    Raises Refused for cycles, for more than a hundred levels, and for lists of lists of ... that
    would have millions of entries if they were written out.
    """
    finished: dict[int, Any] = {}
    expanded: dict[int, int] = {}
    under_way: set[int] = set()

    def walk(node: Any, depth: int) -> Any:
        if isinstance(node, Tensor):
            if id(node) not in finished:
                finished[id(node)] = read(node)
            return finished[id(node)]
        if not isinstance(node, (dict, list, tuple)):
            return None if isinstance(node, (Skipped, Tag, NumpyDtype, Storage)) else node
        if id(node) in finished:
            return finished[id(node)]
        if id(node) in under_way or depth > _DEPTH_LIMIT:
            raise Refused("contains itself" if id(node) in under_way else "is nested too deep")
        under_way.add(id(node))
        if isinstance(node, dict):
            made: Any = {
                k: walk(v, depth + 1) for k, v in node.items() if not isinstance(v, Skipped)
            }
        else:
            made = type(node)(walk(v, depth + 1) for v in node)
        under_way.discard(id(node))
        members = node.values() if isinstance(node, dict) else node
        expanded[id(node)] = 1 + sum(expanded.get(id(v), 1) for v in members)
        if expanded[id(node)] > _ENTRY_LIMIT:
            raise Refused("refers to the same lists too often")
        finished[id(node)] = made
        return made

    return walk(tree, 0)
