"""Mutated PyTorch files against the reader: no exception but its own, nothing executed or opened.

    python tests/interop/fuzz.py N [SEED]

Mutations know the format: opcodes are inserted, removed, repeated and spliced at opcode boundaries;
numbers become extreme; names become callables that would do harm; zip records and legacy counts are
changed in their fields; besides, bytes flip and files end early. An audit hook sees every open,
import, process, socket and code object while a file is read. A file that is read has every array
touched at both ends.
"""

from __future__ import annotations

import os
import pickletools
import random
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from jaxmodels.interop import torch_archive
from jaxmodels.interop.checkpoint import CheckpointError
from tests.interop import torch_files

HARMFUL = [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("builtins", "eval"),
    ("builtins", "exec"), ("__builtin__", "eval"), ("builtins", "getattr"), ("builtins", "open"),
    ("builtins", "__import__"), ("subprocess", "Popen"), ("socket", "create_connection"),
    ("torch.storage", "_load_from_bytes"), ("torch", "load"), ("torch.hub", "load"),
    ("numpy", "load"), ("pickle", "loads"), ("importlib", "import_module"), ("webbrowser", "open"),
    ("collections", "OrderedDict.__init__"), ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ("jaxmodels.interop.restricted_pickle", "Reader"), ("collections.OrderedDict", "fromkeys"),
    ("_codecs", "encode"), ("_codecs", "decode"), ("torch", "Size"), ("numpy", "dtype"),
    ("builtins", "bytearray"), ("builtins", "list"), ("builtins", "set"), ("functools", "partial"),
    ("operator", "attrgetter"), ("copyreg", "_reconstructor"), ("argparse", "Namespace"),
    ("numpy.core.multiarray", "_reconstruct"), ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor_v3"), ("torch", "FloatStorage"), ("torch", "float64"),
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 7, 127, 255, 256, 65535, 2**31 - 1, -(2**31), 2**32, 2**62, 2**63, 2**64]
OPCODES = [op.code.encode("latin1") for op in pickletools.opcodes if op.arg is None]
WATCHED = (
    "open", "import", "exec", "compile", "os.", "subprocess", "socket", "ctypes", "shutil", "code",
    "pickle.find_class", "urllib", "ftplib", "http", "smtplib", "object.__setattr__", "marshal",
    "function",
    "sys.", "builtins.input", "builtins.breakpoint", "glob", "tempfile", "pty", "signal",
)  # fmt: skip


class Watch:
    """An audit hook that notes what happens while `path` is being read, but opening that path."""

    def __init__(self, path: str):
        self.path, self.active, self.seen = path, False, []
        sys.addaudithook(self.note)

    def note(self, event: str, args: tuple) -> None:
        if self.active and event.startswith(WATCHED):
            if event == "open" and os.fspath(args[0]) == self.path:
                return
            self.seen.append((event, str(args)[:200]))


def opcode_ends(stream: bytes) -> list[int]:
    """Positions between opcodes, as far as the stream can be read."""
    positions = []
    try:
        for _, _, position in pickletools.genops(stream):
            positions.append(position)
    except Exception:
        pass
    return positions or [0]


def number(rng: random.Random) -> bytes:
    return torch_files.Writer().encode(rng.choice(NUMBERS))


def snippet(rng: random.Random) -> bytes:
    """A short piece of pickle that means something."""
    kind = rng.randrange(9)
    if kind == 0:
        module, name = rng.choice(HARMFUL)
        return f"c{module}\n{name}\n".encode()
    if kind == 1:
        module, name = rng.choice(HARMFUL)
        argument = rng.choice([b"(X\x04\x00\x00\x00truet", b")", number(rng) + b"\x85"])
        return f"c{module}\n{name}\n".encode() + argument + rng.choice([b"R", b"\x81", b"Rb", b"o"])
    if kind == 2:
        module, name = rng.choice(HARMFUL)
        return b"(" + b"i" + f"{module}\n{name}\n".encode()
    if kind == 3:
        return number(rng)
    if kind == 4:
        return rng.choice(OPCODES) * rng.choice([1, 1, 2, 50])
    if kind == 5:
        index = rng.choice([0, 1, 5, 255])
        return rng.choice([b"h", b"q"]) + bytes([index])
    if kind == 6:
        length = struct.pack("<I", rng.choice([0, 3, 2**31, 2**32 - 1]))
        return rng.choice([b"X", b"T", b"B", b"j", b"r", b"\x8b"]) + length + b"abc"
    if kind == 7:
        return b"\x8c\x02os\x8c\x06system\x93"
    return rng.choice([b"\x8e", b"\x8d", b"\x96", b"\x95"]) + struct.pack(
        "<Q", rng.choice([0, 9, 2**40, 2**63 - 1])
    )


def mutate_pickle(stream: bytes, rng: random.Random, ends: list[int] | None = None) -> bytes:
    ends = ends or opcode_ends(stream)
    at, other = rng.choice(ends), rng.choice(ends)
    kind = rng.randrange(8)
    if kind == 0:
        return stream[:at] + snippet(rng) + stream[at:]
    if kind == 1:
        nearest = min([e for e in ends if e > at], default=len(stream))
        return stream[:at] + snippet(rng) + stream[nearest:]
    if kind == 2:
        first, last = sorted((at, other))
        return stream[:first] + stream[last:]
    if kind == 3:
        first, last = sorted((at, other))
        piece = stream[first : min(last, first + 200)]
        return stream[:at] + piece * rng.choice([1, 2, 20]) + stream[at:]
    if kind == 4:
        return flip(stream, rng)
    if kind == 5:
        hits = [e for e in ends if stream[e : e + 1] in (b"K", b"J", b"M")]
        if hits:
            at = rng.choice(hits)
            width = {b"K": 2, b"M": 3, b"J": 5}[stream[at : at + 1]]
            return stream[:at] + number(rng) + stream[at + width :]
    if kind == 6:
        hits = [e for e in ends if stream[e : e + 1] == b"c"]
        if hits:
            at = rng.choice(hits)
            after = min([e for e in ends if e > at], default=len(stream))
            module, name = rng.choice(HARMFUL)
            return stream[:at] + f"c{module}\n{name}\n".encode() + stream[after:]
    return stream[:at] + b"(" * rng.choice([1, 200, 3000]) + snippet(rng) + stream[at:]


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


class Corpus:
    """The sound files and their parts, from which mutated ones are made."""

    def __init__(self):
        value = torch_files.training_checkpoint()
        self.whole = torch_files.zip_bytes(value)
        self.legacy = torch_files.legacy_bytes(value)
        writer = torch_files.Writer()
        self.stream = torch_files.pickled(writer, value)
        self.ends = opcode_ends(self.stream)
        self.entries = [("a/byteorder", b"little")] + [
            (f"a/data/{key}", storage.tobytes()) for key, storage in writer.storages.items()
        ]
        writer = torch_files.Writer(legacy=True)
        self.legacy_stream = torch_files.pickled(writer, value)
        self.legacy_ends = opcode_ends(self.legacy_stream)
        self.head, _, self.tail = self.legacy.partition(self.legacy_stream)
        self.records = [
            n for n in range(len(self.whole) - 3)
            if self.whole[n : n + 4] in (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06")
        ]  # fmt: skip

    def mutated(self, rng: random.Random) -> bytes:
        kind = rng.randrange(10)
        if kind < 4:
            stream = self.stream
            stream = mutate_pickle(stream, rng, self.ends)
            if rng.random() < 0.3:
                stream = mutate_pickle(stream, rng, self.ends)
            return plain_zip([("a/data.pkl", stream), *self.entries], rng)
        if kind < 7:
            stream = mutate_pickle(self.legacy_stream, rng, self.legacy_ends)
            return self.head + stream + self.tail
        if kind == 7:
            at = rng.choice(self.records) + rng.randrange(4, 46)
            width = rng.choice([1, 2, 4])
            value = rng.choice([0, 1, 8, 255, 2**16 - 1, 2**31, 2**32 - 1, rng.randrange(2**32)])
            raw = (value % (1 << (8 * width))).to_bytes(width, "little")
            return self.whole[:at] + raw + self.whole[at + width :]
        source = rng.choice([self.whole, self.legacy])
        if kind == 8:
            return flip(source, rng)
        cut = rng.randrange(len(source))
        return rng.choice([source[:cut], source[cut:], source + source[:cut]])


def plain_zip(entries: list[tuple[str, bytes]], rng: random.Random) -> bytes:
    """A zip archive, its checksums left out; at times with a duplicate or a missing entry."""
    chance = rng.random()
    if chance < 0.02:
        entries = [*entries, rng.choice(entries)]
    elif chance < 0.04:
        entries = rng.sample(entries, len(entries) - 1)
    parts, directory, at = [], [], 0
    for name, data in entries:
        raw, sizes = name.encode(), struct.pack("<3I", 0, len(data), len(data))
        local = b"PK\x03\x04" + struct.pack("<5H", 20, 0, 0, 0, 0) + sizes
        local += struct.pack("<2H", len(raw), 0) + raw + data
        directory.append(
            b"PK\x01\x02" + struct.pack("<6H", 20, 20, 0, 0, 0, 0) + sizes
            + struct.pack("<5H2I", len(raw), 0, 0, 0, 0, 0, at) + raw
        )  # fmt: skip
        parts.append(local)
        at += len(local)
    central = b"".join(directory)
    counts = (0, 0, len(entries), len(entries), len(central), at, 0)
    end = b"PK\x05\x06" + struct.pack("<4H2IH", *counts)
    return b"".join(parts) + central + end


def touch(tree) -> int:
    """Read both ends of every array; returns how many there are."""
    if isinstance(tree, np.ndarray):
        if tree.size:
            tree[(0,) * tree.ndim], tree[(-1,) * tree.ndim]
        return 1
    if isinstance(tree, dict):
        return sum(touch(v) for v in tree.values())
    if isinstance(tree, (list, tuple)):
        return sum(touch(v) for v in tree)
    return 0


def run(count: int, seed: int, report=None) -> dict:
    """Read `count` mutated files; raises AssertionError with the file kept where one misbehaves."""
    corpus, rng = Corpus(), random.Random(seed)
    outcome = {"files": 0, "read": 0, "refused": 0, "arrays": 0, "slowest": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "case.pth")
        watch = Watch(path)
        for n in range(-3, count):
            data = corpus.mutated(rng) if n >= 0 else (corpus.whole, corpus.legacy)[n % 2]
            with open(path, "wb") as file:
                file.write(data)
            start = time.process_time()
            watch.active = n >= 0  # the first reads import what they need
            try:
                tree = torch_archive.read(path)
            except CheckpointError as error:
                watch.active = False
                assert n >= 0, error
                assert "\n" not in str(error) and len(str(error)) < 1000
                outcome["refused"] += 1
            except BaseException as error:
                watch.active = False
                kept = keep(data, seed, n)
                text = f"{type(error).__name__}: {error}; the file: {kept}"
                raise AssertionError(text) from error
            else:
                watch.active = False
                outcome["arrays"] += touch(tree)
                outcome["read"] += 1
            seconds = time.process_time() - start
            outcome["slowest"] = max(outcome["slowest"], seconds)
            if watch.seen:
                raise AssertionError(f"{watch.seen[:3]}; the file: {keep(data, seed, n)}")
            outcome["files"] = n + 1
            if report and n > 0 and n % 10000 == 9999:
                report(outcome)
    outcome["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return outcome


def keep(data: bytes, seed: int, n: int) -> str:
    kept = Path(tempfile.gettempdir()) / f"fuzz_{seed}_{n}.pth"
    kept.write_bytes(data)
    return str(kept)


if __name__ == "__main__":
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 10000
    begun = time.time()
    chosen = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    result = run(total, chosen, lambda o: print(o, flush=True))
    print({**result, "wall_seconds": round(time.time() - begun, 1)})
