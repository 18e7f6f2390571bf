"""The reader of published checkpoint files: what it reads exactly, and what it must refuse."""

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxmodels.interop import checkpoint, torch_archive
from jaxmodels.interop.checkpoint import CheckpointError
from tests.interop import torch_files
from tests.interop.torch_files import Call, Name, New, Raw, Strided, Writer

BASE = np.arange(120, dtype=np.float32).reshape(10, 12)
_ORDERED = Name("collections", "OrderedDict")
FORMATS = {"zip": torch_files.zip_bytes, "legacy": torch_files.legacy_bytes}


def write(tmp_path: Path, data: bytes, name: str = "file.pth") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("form", FORMATS)
def test_every_kind_of_value_of_a_training_checkpoint_is_read_exactly(tmp_path, form):
    tree = torch_archive.read(write(tmp_path, FORMATS[form](torch_files.training_checkpoint())))
    weights = tree["state_dict"]
    np.testing.assert_array_equal(weights["conv.weight"], BASE.reshape(5, 4, 6))
    np.testing.assert_array_equal(weights["view"], BASE[1:4, 2:10:2])
    np.testing.assert_array_equal(weights["transposed"], BASE.T)
    np.testing.assert_array_equal(weights["expanded"], np.tile(np.arange(3)[:, None], 4))
    np.testing.assert_array_equal(weights["old"], [[1, 2], [3, 4]])
    assert weights["counter"].shape == () and weights["counter"] == 3
    assert weights["empty"].shape == (0, 3)
    dtypes = {k: v.dtype for k, v in weights.items()}
    assert dtypes["brain"] == ml_dtypes.bfloat16 and dtypes["half"] == np.float16
    assert dtypes["flag"] == np.bool_ and dtypes["counter"] == np.int64
    assert tree["best"] == 2.5 and tree["epoch"] == 3 and tree["size"] == (1, 2)
    assert tree["misc"] == [None, True, 2.5, -7, 2**70, ("a", "b"), {1, 2}]
    assert "args" not in tree
    assert not weights["conv.weight"].flags.writeable


def test_a_view_shares_the_mapped_file(tmp_path):
    tree = torch_archive.read(write(tmp_path, FORMATS["zip"](torch_files.training_checkpoint())))
    assert np.shares_memory(tree["state_dict"]["view"], tree["state_dict"]["transposed"])


@pytest.mark.parametrize("form", FORMATS)
def test_a_scheduler_that_holds_itself_and_its_optimizer_is_left_out(tmp_path, form):
    """As PyTorch 1 pickles OneCycleLR's state: a bound method, hence the scheduler, hence AdamW."""
    shared = Strided("shared", BASE)
    rebuilt = Call(Name("torch._utils", "_rebuild_parameter"), (shared, True, Call(_ORDERED, ())))
    parameter = Raw(Writer(legacy=form == "legacy").encode(rebuilt))
    optimizer = New(
        Name("transformers.optimization", "AdamW"),
        {
            "defaults": {"lr": 0.1},
            "state": {parameter: {"step": 3, "exp_avg": Strided("moments", BASE + 1)}},
            "param_groups": [],
        },
    )
    scheduler = New(
        Name("torch.optim.lr_scheduler", "OneCycleLR"),
        {"optimizer": optimizer, "total_steps": 50},
    )
    method = Call(Name("__builtin__", "getattr"), (scheduler, "_annealing_linear"))
    tree = {
        "state_dict": {"model.shared.weight": shared},
        "lr_schedulers": [{"total_steps": 50, "anneal_func": method}],
    }
    found = torch_archive.read(write(tmp_path, FORMATS[form](tree), "model.ckpt"))
    np.testing.assert_array_equal(found["state_dict"]["model.shared.weight"], BASE)
    assert found["lr_schedulers"] == [{"total_steps": 50}]


HARMFUL = {
    "a call of os.system": Call(Name("os", "system"), ("true",)),
    "a call of eval": Call(Name("builtins", "eval"), ("1",)),
    "a name alone": Name("posix", "system"),
    "an attribute of an allowed name": Name("collections", "OrderedDict.fromkeys"),
    "an attribute of an object": Call(Name("builtins", "getattr"), ({}, "clear")),
    "an attribute of a constructor": Call(
        Name("__builtin__", "getattr"), (Name("collections", "OrderedDict"), "fromkeys")
    ),
    "a method of what is left out, called": Call(
        Call(Name("builtins", "getattr"), (Name("argparse", "Namespace"), "f")), ()
    ),
    "a type called": Call(Name("builtins", "int"), ("1",)),
    "a storage type called": Call(Name("torch", "FloatStorage"), (1,)),
    "state of a constructor": Raw(Writer().encode(Name("_codecs", "encode")) + b"}b"),
    "an object of a constructor": New(Name("torch._utils", "_rebuild_tensor_v2")),
    "another codec": Call(Name("_codecs", "encode"), ("x", "rot13")),
    "a factory that is called": Call(Name("collections", "defaultdict"), (1, 2)),
    "INST": Raw(b"(S'true'\nios\nsystem\n"),
    "OBJ": Raw(b"(cos\nsystem\no"),
    "NEWOBJ_EX": Raw(b"ccollections\nOrderedDict\n)}\x92"),
    "EXT1": Raw(b"\x82\x01"),
    "EXT4": Raw(b"\x84\x01\x00\x00\x00"),
    "STACK_GLOBAL": Raw(b"\x8c\x02os\x8c\x06system\x93"),
    "a text persistent id": Raw(b"Pstorage\n"),
    "a whole module": Call(Name("torch.nn.modules.linear", "Linear"), ()),
    "a nested load": Call(Name("torch.storage", "_load_from_bytes"), ("x",)),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("what", HARMFUL)
def test_everything_that_could_act_is_refused(tmp_path, form, what):
    path = write(tmp_path, FORMATS[form]({"a": HARMFUL[what]}))
    if what == "a name alone" or what.startswith("an attribute"):
        with pytest.raises(CheckpointError, match="asks for"):
            torch_archive.read(path)
    else:
        with pytest.raises(CheckpointError):
            torch_archive.read(path)


def test_a_refused_name_is_named_in_one_line(tmp_path):
    path = write(tmp_path, FORMATS["zip"]({"a": Call(Name("os", "system"), ("true",))}))
    with pytest.raises(
        CheckpointError, match=r"file\.pth: the file asks for 'os\.system'"
    ) as error:
        checkpoint.read(path)
    assert "\n" not in str(error.value)


BAD_TENSORS = {
    "offset beyond": dict(offset=120),
    "size beyond": dict(size=(10, 13), stride=(12, 1)),
    "stride beyond": dict(size=(10, 12), stride=(13, 1)),
    "negative stride": dict(offset=119, size=(10,), stride=(-1,)),
    "negative size": dict(size=(-1, 12), stride=(12, 1)),
    "negative offset": dict(offset=-1),
    "sizes whose product wraps": dict(size=(2**33, 2**33), stride=(0, 1)),
    "an expanded giant": dict(size=(2**40,), stride=(0,)),
    "an empty giant": dict(size=(2**60, 0), stride=(1, 1)),
    "a boolean size": dict(size=(True, 12), stride=(12, 1)),
    "a float size": dict(size=(2.0, 12), stride=(12, 1)),
    "fewer strides than sizes": dict(size=(10, 12), stride=(12,)),
    "a storage longer than its bytes": dict(count=121),
    "a huge storage": dict(count=2**61),
    "a negative storage": dict(count=-1),
    "a storage key with a slash": dict(key="../data.pkl"),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("what", BAD_TENSORS)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, form, what):
    if form == "legacy" and what == "a storage longer than its bytes":
        pytest.skip("the legacy stream has its own count")
    arguments = {"key": "0", "storage": BASE, **BAD_TENSORS[what]}
    with pytest.raises(CheckpointError):
        torch_archive.read(write(tmp_path, FORMATS[form]({"a": Strided(**arguments)})))


def _patched(data: bytes, find: bytes, put: bytes) -> bytes:
    assert data.count(find) >= 1
    return data.replace(find, put, 1)


def _zip(**options) -> bytes:
    return torch_files.zip_bytes({"a": BASE}, **options)


BROKEN_ARCHIVES = {
    "compressed": lambda: _zip(compression=zipfile.ZIP_DEFLATED),
    "truncated": lambda: _zip()[:-30],
    "with a tail": lambda: _zip() + b"x",
    "a local name that differs": lambda: _patched(_zip(), b"archive/data/0", b"archive/data/1"),
    "a damaged pickle": lambda: _patched(_zip(), b"FloatStorage", b"HalfStorages"),
    "empty": lambda: b"",
    "only a magic number": lambda: b"PK\x03\x04",
    "no PyTorch file": lambda: b"hello" * 100,
    "a legacy file cut short": lambda: torch_files.legacy_bytes({"a": BASE})[:-5],
    "a legacy file with a tail": lambda: torch_files.legacy_bytes({"a": BASE}) + b"x",
    "a number at the top": lambda: torch_files.zip_bytes(3),
    "a big-endian machine": lambda: _patched(_zip(), b"little", b"bigbig"),
    "an unpickled loop": lambda: torch_files.zip_bytes(Raw(b"]q\x01h\x01a")),
}


@pytest.mark.parametrize("what", BROKEN_ARCHIVES)
def test_a_broken_file_ends_in_one_line(tmp_path, what):
    with pytest.raises(CheckpointError) as error:
        torch_archive.read(write(tmp_path, BROKEN_ARCHIVES[what]()))
    assert "\n" not in str(error.value) and "file.pth" in str(error.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_zip_entries_are_refused(tmp_path):
    path = write(tmp_path, _zip())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", b"\0" * BASE.nbytes)
    with pytest.raises(CheckpointError, match="two zip entries 'archive/data/0'"):
        torch_archive.read(path)


MEGABYTE = 1 << 20
BOMBS = {
    "memo": lambda: torch_files.zip_bytes(
        Raw(b"]" + b"".join(b"r" + struct.pack("<I", n) for n in range(600_000)))
    ),
    "dicts": lambda: torch_files.zip_bytes(Raw(b"(" + b"}" * 6 * MEGABYTE + b"l")),
    "marks": lambda: torch_files.zip_bytes(Raw(b"(" * 6 * MEGABYTE)),
    "deep lists": lambda: torch_files.zip_bytes(Raw(b"]" * 100_000 + b"a" * 99_999)),
    "deep tuples as a key": lambda: torch_files.zip_bytes(Raw(b"}N" + b"\x85" * 100_000 + b"Ns")),
    "tuples of tuples": lambda: torch_files.zip_bytes(
        Raw(b")" + b"".join(b"q%c(" % n + b"h%c" % n * 9 + b"t" for n in range(200)))
    ),
    "laughs": lambda: torch_files.zip_bytes(
        Raw(b"]" + b"".join(b"q%c](" % n + b"h%c" % n * 100 + b"e" for n in range(90)))
    ),
    "a length of 2**62": lambda: torch_files.zip_bytes(Raw(b"\x8e" + struct.pack("<Q", 2**62))),
    "a bytearray of 2**40": lambda: torch_files.zip_bytes(Raw(b"\x96" + struct.pack("<Q", 2**40))),
    "a frame of 2**40": lambda: torch_files.zip_bytes(Raw(b"\x95" + struct.pack("<Q", 2**40))),
    "an endless line": lambda: torch_files.zip_bytes(Raw(b"c" + b"a" * 8 * MEGABYTE)),
    "nothings": lambda: torch_files.zip_bytes(Raw(b"N0" * 4 * MEGABYTE)),
    "one character of four bytes": lambda: torch_files.zip_bytes(
        "\U0001f600" + "a" * 12 * MEGABYTE
    ),
    "an expanded tensor a hundred times": lambda: torch_files.zip_bytes(
        [Strided("0", BASE, 0, (MEGABYTE,), (0,)) for _ in range(100)]
    ),
    "many zip entries": lambda: _many_entries(65_000),
}


def _many_entries(count: int) -> bytes:
    central = b"PK\x01\x02" + struct.pack("<6H3I5H2I", *[0] * 16)
    end = struct.pack("<4H2IH", 0, 0, count, count, 46 * count, 4, 0)
    return b"PK\x03\x04" + central * count + b"PK\x05\x06" + end


# Runs in a process of its own, whose peak is read from Linux (getrusage hands on the parent's).
_MEASURE = """
import sys, time
from jaxmodels.interop import torch_archive
from jaxmodels.interop.checkpoint import CheckpointError

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

for path in sys.argv[1:]:
    before, start = peak(), time.process_time()
    try:
        torch_archive.read(path)
        kind = "read"
    except CheckpointError as error:
        kind = "refused " + str(error)[-60:]
    print(time.process_time() - start, (peak() - before) / 1024, kind, sep="|")
"""
on_linux = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")


@on_linux
def test_bombs_are_refused_within_64_megabytes(tmp_path):
    paths = []
    for n, make in enumerate(BOMBS.values()):
        paths.append(os.fspath(write(tmp_path, make(), f"{n}.pth")))
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, *paths], capture_output=True, text=True, check=True
    )
    rows = [line.split("|") for line in run.stdout.splitlines()]
    assert len(rows) == len(BOMBS), run.stderr
    for name, (seconds, mebibytes, outcome) in zip(BOMBS, rows):
        assert outcome.startswith("refused"), name
        assert float(mebibytes) < 64, (name, mebibytes)
        assert float(seconds) < 10, (name, seconds)  # ends; how fast is in the benchmark


@on_linux
def test_reading_maps_the_file_instead_of_copying_it(tmp_path):
    big = np.zeros(48 * MEGABYTE, np.uint8)
    path = write(tmp_path, torch_files.zip_bytes({"big": big, "small": np.ones(3, np.float32)}))
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, path], capture_output=True, text=True, check=True
    )
    assert float(run.stdout.split("|")[1]) < 8


# Nestings


def test_unwrapping_says_what_it_took_and_what_else_is_there(tmp_path):
    ema, trained = {"module.w": BASE * 2}, {"module.w": BASE}
    path = write(tmp_path, _both(trained, ema))
    taken = checkpoint.read(path)
    assert list(taken.tensors) == ["w"] and taken.taken == "state_dict, prefix module."
    assert taken.others == ["state_dict_ema"]
    np.testing.assert_array_equal(taken.tensors["w"], BASE)
    preferred = checkpoint.read(path, prefer=("state_dict_ema",))
    np.testing.assert_array_equal(preferred.tensors["w"], BASE * 2)
    assert preferred.taken.startswith("state_dict_ema")


def _both(trained, ema) -> bytes:
    return torch_files.zip_bytes({"state_dict": trained, "state_dict_ema": ema, "epoch": 1})


def test_profiler_leftovers_are_dropped(tmp_path):
    tree = {"w": BASE, "total_ops": np.zeros(1), "layer.total_params": np.zeros(1)}
    assert list(checkpoint.read(write(tmp_path, torch_files.zip_bytes(tree))).tensors) == ["w"]


def test_a_preferred_weight_set_that_is_not_there_is_an_error(tmp_path):
    path = write(tmp_path, torch_files.zip_bytes({"state_dict": {"w": BASE}}))
    with pytest.raises(CheckpointError, match=r"state_dict_emma.*state_dict"):
        checkpoint.read(path, prefer="state_dict_emma")


def test_a_file_without_tensors_names_its_keys(tmp_path):
    with pytest.raises(CheckpointError, match=r"keys \['epoch', 'note'\]"):
        checkpoint.read(write(tmp_path, torch_files.zip_bytes({"epoch": 1, "note": "x"})))


# safetensors


def tensors() -> dict[str, np.ndarray]:
    return {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a.weight": np.arange(3).astype(ml_dtypes.bfloat16),
        "count": np.array(7, np.int64),
        "flag": np.array([True]),
        "none": np.zeros((0, 4), np.float16),
    }


def test_safetensors_written_are_read_back_bit_for_bit_by_us_and_by_the_library(tmp_path):
    from safetensors.numpy import load_file

    path = tmp_path / "x.safetensors"
    checkpoint.write_safetensors(path, tensors(), {"format": "pt"})
    read, metadata = checkpoint.read_safetensors(path)
    assert metadata == {"format": "pt"} and set(read) == set(tensors())
    for key, want in tensors().items():
        assert read[key].dtype == want.dtype and read[key].shape == want.shape
        assert read[key].tobytes() == want.tobytes()
    others = load_file(path)
    np.testing.assert_array_equal(others["b"], tensors()["b"])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoint.write_safetensors(path, tensors())
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="'bad' has dtype"):
        checkpoint.write_safetensors(path, {"bad": np.array(["text"])})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]


def _safetensors(header, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN_SAFETENSORS = {
    "length beyond the file": struct.pack("<Q", 2**40) + b"{}",
    "no JSON": _safetensors(b"{"),
    "a list": _safetensors([]),
    "too few bytes": _safetensors({"a": F32}, b"\0" * 4),
    "too many bytes": _safetensors({"a": F32}, b"\0" * 12),
    "a shape that does not fit": _safetensors({"a": {**F32, "shape": [3]}}, b"\0" * 8),
    "a negative shape": _safetensors({"a": {**F32, "shape": [-1, -2]}}, b"\0" * 8),
    "an unknown dtype": _safetensors({"a": {**F32, "dtype": "Q4"}}, b"\0" * 8),
    "overlapping tensors": _safetensors({"a": F32, "b": F32}, b"\0" * 8),
    "a duplicate key": _safetensors(b'{"a":1,"a":2}'),
    "deep JSON": _safetensors(b"[" * 200_000),
    "offsets that are no pair": _safetensors({"a": {**F32, "data_offsets": [0]}}, b"\0" * 8),
    "a tensor that is a number": _safetensors({"a": 3}, b""),
    "short": b"\0\0",
}


@pytest.mark.parametrize("what", BROKEN_SAFETENSORS)
def test_broken_safetensors_are_refused_by_name(tmp_path, what):
    path = write(tmp_path, BROKEN_SAFETENSORS[what], "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        checkpoint.read(path)


def test_shards_are_joined_through_their_index(tmp_path):
    checkpoint.write_safetensors(tmp_path / "m-1.safetensors", {"a": BASE})
    write(tmp_path, torch_files.zip_bytes({"b": BASE}), "m-2.bin")
    index = {"metadata": {}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.bin"}}
    path = write(tmp_path, json.dumps(index).encode(), "m.safetensors.index.json")
    assert sorted(checkpoint.read(path).tensors) == ["a", "b"]
    assert sorted(checkpoint.read(tmp_path).tensors) == ["a", "b"]
    index["weight_map"]["c"] = "../secret.bin"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file beside the index"):
        checkpoint.read(path)


def test_npz_is_read_and_pickled_objects_in_it_are_not(tmp_path):
    np.savez(tmp_path / "x.npz", a=BASE)
    np.testing.assert_array_equal(checkpoint.read(tmp_path / "x.npz").tensors["a"], BASE)
    np.savez(tmp_path / "y.npz", a=np.array([{}], object))
    with pytest.raises(CheckpointError):
        checkpoint.read(tmp_path / "y.npz")


def test_an_unknown_ending_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"unknown ending '\.onnx'"):
        checkpoint.read(write(tmp_path, b"x", "m.onnx"))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file .*gone\.pth"):
        checkpoint.read(tmp_path / "gone.pth")


def test_a_short_run_of_the_fuzzer_meets_only_the_readers_own_errors():
    script = Path(__file__).with_name("fuzz.py")
    run = subprocess.run(
        [sys.executable, script, "2000", "7"], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "'files': 2000" in run.stdout
