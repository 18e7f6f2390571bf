"""What must hold for checkpoints: round trips, damage, retention, errors in one line."""

import functools
import json
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from train.checkpoint_manifest import examine
from train.checkpoints import CheckpointError, Checkpoints, load_params

ROOT = Path(__file__).resolve().parents[2]


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    extra: Any
    opt_state: Any
    rng: Any
    ema: Any


def make_state(step: int = 3, ema: bool = False) -> State:
    params = {
        "blocks.0.0": {"kernel": jnp.arange(16.0).reshape(8, 2) + step},
        "blocks": {"0.0": {"kernel": jnp.full(3, step, jnp.bfloat16)}},
        "blocks.0": {"0": {"kernel": jnp.full(3, -1.5)}},
        "a/b": {"50%": jnp.zeros((0, 3))},
    }
    optimizer = optax.chain(optax.clip(1.0), optax.adam(1e-3))
    return State(
        step=jnp.int32(step),
        params=params,
        extra={"batch_stats": {"bn.1": {"mean": jnp.ones(2)}}, "buffers": {"n": np.int64(7)}},
        opt_state=optimizer.init(params),
        rng=jax.random.key(step),
        ema={"params": jax.tree.map(lambda x: x + 1, params)} if ema else None,
    )


def make_small(value: float) -> dict[str, jax.Array]:
    return {"w": jnp.full(5, value, jnp.float32), "rng": jax.random.key(int(value))}


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert a.dtype == b.dtype
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def largest_file(directory: Path) -> Path:
    files = (p for p in (directory / "arrays").rglob("*") if p.is_file())
    return max(files, key=lambda p: p.stat().st_size)


def flip_bit(file: Path, position: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A directory with checkpoints 10, 20 and 30 of `make_small(step)`."""
    with Checkpoints(tmp_path, config={"seed": 0, "data": {"name": "digits"}}) as checkpoints:
        for step in (10, 20, 30):
            assert checkpoints.save(step, make_small(step))
    return tmp_path


def test_every_leaf_comes_back_bit_for_bit(tmp_path):
    state = {"train": make_state(), "int": 7, "float": 2.5, "flag": True, "np": np.arange(4)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, state)
        step, restored = checkpoints.restore(state)
    assert step == 10
    assert_same(restored, state)
    assert type(restored["int"]) is int and type(restored["flag"]) is bool
    assert isinstance(restored["np"], np.ndarray)
    assert jax.random.normal(restored["train"].rng) == jax.random.normal(state["train"].rng)


def test_nothing_to_restore_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new" / "checkpoints")
    assert checkpoints.restore(make_small(0)) is None
    assert checkpoints.steps() == [] and checkpoints.best_step() is None


def test_a_state_donated_right_after_save_is_saved_as_it_was(tmp_path):
    @jax.jit
    def fresh():
        return {"w": jnp.arange(2**20, dtype=jnp.float32)}

    update = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        state = fresh()
        checkpoints.save(1, state)
        for _ in range(5):
            state = update(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        restored = checkpoints.restore_step(1, state)
    np.testing.assert_array_equal(restored["w"], np.arange(2**20, dtype=np.float32))


def test_a_numpy_leaf_changed_right_after_save_is_saved_as_it_was(tmp_path):
    state = {"n": np.arange(1000)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        state["n"][:] = -1
        np.testing.assert_array_equal(checkpoints.restore_step(1, state)["n"], np.arange(1000))


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_a_checkpoint_of_eight_devices_restores_onto_other_numbers(tmp_path, devices):
    def place(count: int, axis: str | None) -> NamedSharding:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("fsdp",))
        return NamedSharding(mesh, P(axis) if axis else P())

    state = make_state()
    shardings = jax.tree.map(lambda x: place(8, "fsdp" if np.ndim(x) == 2 else None), state.params)
    shardings["a/b"]["50%"] = place(8, None)
    saved = state.replace(
        params=jax.device_put(state.params, shardings),
        rng=jax.device_put(state.rng, place(8, None)),
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved)
        like = jax.tree.map(
            lambda x: (
                jax.ShapeDtypeStruct(
                    x.shape,
                    x.dtype,
                    sharding=place(devices, "fsdp" if x.ndim == 2 and x.size else None),
                )
                if isinstance(x, jax.Array)
                else x
            ),
            state,
        )
        _, restored = checkpoints.restore(like)
    assert_same(restored, state)
    kernel = restored.params["blocks.0.0"]["kernel"]
    assert len(kernel.sharding.device_set) == devices
    assert kernel.addressable_shards[0].data.shape == (8 // devices, 2)


# -- damage ----------------------------------------------------------------------------------------


def truncate(step: Path) -> str:
    file = largest_file(step)
    file.write_bytes(file.read_bytes()[:-1])
    return "truncated"


def empty(step: Path) -> str:
    largest_file(step).write_bytes(b"")
    return "truncated"


def flip(step: Path) -> str:
    file = largest_file(step)
    flip_bit(file, file.stat().st_size // 2, 3)
    return "SHA-256"


def flip_manifest(step: Path) -> str:
    raw = (step / "manifest.json").read_bytes()
    flip_bit(step / "manifest.json", raw.index(b'"metrics"') + 1)
    return "manifest.json"


def flip_config(step: Path) -> str:
    flip_bit(step / "config.json", 3)
    return "config.json"


def lose_file(step: Path) -> str:
    largest_file(step).unlink()
    return "missing"


def lose_manifest(step: Path) -> str:
    (step / "manifest.json").unlink()
    return "never finished"


def unfinish(step: Path) -> str:
    (step / "manifest.json").unlink()
    step.rename(step.with_name(f"{step.name}.unfinished"))
    return "never finished"


def orbax_temporary(step: Path) -> str:
    step.rename(step.with_name(f"{step.name}.orbax-checkpoint-tmp-0"))
    return "never finished"


DAMAGES = [
    truncate,
    empty,
    flip,
    flip_manifest,
    flip_config,
    lose_file,
    lose_manifest,
    unfinish,
    orbax_temporary,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_used(three, damage):
    problem = damage(three / "30")
    lines = []
    with Checkpoints(three, report=lines.append) as checkpoints:
        step, restored = checkpoints.restore(make_small(0))
        assert step == 20
        assert_same(restored, make_small(20))
        assert len(lines) == 1 and "\n" not in lines[0]
        assert "checkpoint 30" in lines[0] and problem in lines[0]
        assert "using checkpoint 20" in lines[0]
        assert checkpoints.steps() == [10, 20]
        # Saves of a lower and of the same step go on as if it had never been.
        checkpoints.save(25, make_small(25))
        checkpoints.save(30, make_small(31))
        checkpoints.wait()
        assert checkpoints.steps() == [20, 25, 30]
    del lines[:]
    with Checkpoints(three, report=lines.append) as checkpoints:
        step, restored = checkpoints.restore(make_small(0))
    assert step == 30 and lines == []
    assert_same(restored, make_small(31))


def test_two_damaged_checkpoints_are_both_named(three):
    flip(three / "30")
    truncate(three / "20")
    lines = []
    step, _ = Checkpoints(three, report=lines.append).restore(make_small(0))
    assert step == 10 and len(lines) == 2
    assert {line.split()[1] for line in lines} == {"20", "30"}


def test_with_every_checkpoint_damaged_there_is_none_and_all_are_kept_aside(three):
    for step in (10, 20, 30):
        flip(three / str(step))
    lines = []
    with Checkpoints(three, report=lines.append) as checkpoints:
        assert checkpoints.restore(make_small(0)) is None
        assert len(lines) == 3 and all("no earlier sound checkpoint" in line for line in lines)
        checkpoints.save(10, make_small(11), wait=True)
        assert checkpoints.steps() == [10]
    assert (three / "30.damaged").is_dir() and (three / "10.damaged").is_dir()


def test_restoring_and_loading_change_nothing_on_disk(three):
    flip(three / "30")
    (three / "40.unfinished").mkdir()
    before = sorted(p.relative_to(three) for p in three.rglob("*"))
    Checkpoints(three, report=lambda line: None).restore(make_small(0))
    load_params(three, report=lambda line: None)
    assert sorted(p.relative_to(three) for p in three.rglob("*")) == before


def test_no_flipped_bit_of_any_file_goes_unnoticed(tmp_path):
    with Checkpoints(tmp_path, config={"seed": 1}) as checkpoints:
        checkpoints.save(1, make_small(1), {"accuracy": 0.5})
    random = np.random.default_rng(0)
    files = sorted(p for p in (tmp_path / "1").rglob("*") if p.is_file())
    for file in files:
        sound = file.read_bytes()
        for position in random.integers(len(sound), size=12):
            flip_bit(file, position, int(random.integers(8)))
            _, problem = examine(tmp_path / "1")
            assert problem is not None and file.name in problem
            file.write_bytes(sound)
    assert examine(tmp_path / "1")[1] is None


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(three):
    (three / "30").rename(three / "30.replaced")
    (three / "30.unfinished").mkdir()
    with Checkpoints(three, report=lambda line: None) as checkpoints:
        step, restored = checkpoints.restore(make_small(0))
        assert step == 30
        assert_same(restored, make_small(30))
        checkpoints.save(40, make_small(40), wait=True)
        assert checkpoints.steps() == [20, 30, 40]
    assert not list(three.glob("*.*"))


# -- retention -------------------------------------------------------------------------------------


def test_the_last_n_and_the_best_stay(tmp_path):
    with Checkpoints(tmp_path, keep=2, best_metric="accuracy") as checkpoints:
        for step, accuracy in enumerate([0.1, 0.9, 0.3, float("nan"), 0.2], start=1):
            checkpoints.save(step, make_small(step), {"accuracy": accuracy})
        checkpoints.save(6, make_small(6))
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6]
        assert checkpoints.best_step() == 2
        assert_same(checkpoints.restore_step(2, make_small(0)), make_small(2))
    assert Checkpoints(tmp_path, best_metric="accuracy", best_mode="min").best_step() == 5


def test_a_lower_step_saved_later_is_the_newest(three):
    with Checkpoints(three, keep=2) as checkpoints:
        checkpoints.save(15, make_small(15), wait=True)
        assert checkpoints.steps() == [15, 30]
        assert checkpoints.restore(make_small(0))[0] == 15


def test_a_step_saved_again_replaces_the_former(three):
    with Checkpoints(three) as checkpoints:
        checkpoints.save(30, make_small(33), wait=True)
        assert_same(checkpoints.restore_step(30, make_small(0)), make_small(33))
        assert checkpoints.steps() == [10, 20, 30]


def test_files_that_are_not_checkpoints_are_left_alone(three):
    (three / "notes.txt").write_text("mine")
    (three / "old-runs").mkdir()
    with Checkpoints(three, keep=1) as checkpoints:
        checkpoints.save(40, make_small(40), wait=True)
    assert {p.name for p in three.iterdir()} == {"40", "notes.txt", "old-runs"}


# -- errors in one line ----------------------------------------------------------------------------


def test_a_changed_config_is_refused_with_the_keys_that_matter(tmp_path):
    config = {
        "seed": 0,
        "steps": 5,
        "data": {"name": "digits", "size": (8, 8)},
        "eval": {"every": 1},
    }
    with Checkpoints(tmp_path, config=config) as checkpoints:
        checkpoints.save(1, make_small(1))
    same = config | {"steps": 9, "eval": {"every": 7}}
    told = []
    again = Checkpoints(tmp_path, config=same, report=told.append)
    assert again.restore(make_small(0))[0] == 1
    assert len(told) == 1 and "steps 5 -> 9" in told[0] and "eval" not in told[0]
    other = config | {"seed": 1, "data": {"name": "textures", "size": (8, 8)}, "model": "vgg"}
    with pytest.raises(ValueError) as error:
        Checkpoints(tmp_path, config=other).restore(make_small(0))
    message = str(error.value)
    assert "\n" not in message and "steps" not in message and "eval" not in message
    assert "seed 0 -> 1" in message and 'data.name "digits" -> "textures"' in message
    assert 'model (absent) -> "vgg"' in message and "size" not in message


def test_leaves_that_do_not_fit_are_all_named_in_one_line(three):
    like = {"w": jnp.zeros((5, 2)), "v": jnp.zeros(3)}
    with pytest.raises(ValueError) as error:
        Checkpoints(three).restore(like)
    message = str(error.value)
    assert "\n" not in message
    assert "lacks v" in message and "has no rng" in message and "w float32[5]" in message


def test_a_leaf_that_is_no_array_is_named(tmp_path):
    with pytest.raises(ValueError, match="state leaf a/b is a str"):
        Checkpoints(tmp_path).save(1, {"a": {"b": "text"}})


def test_an_unknown_step_is_refused_with_the_steps_there_are(three):
    with pytest.raises(ValueError, match=r"no checkpoint of step 25 .* \[10, 20, 30\]"):
        Checkpoints(three).restore_step(25, make_small(0))


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path / "file" / "checkpoints")
    assert "\n" not in str(error.value) and str(tmp_path / "file") in str(error.value)
    assert isinstance(error.value, OSError)


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\.keep is 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match=r"checkpoint\.best_mode is 'most'"):
        Checkpoints(tmp_path, best_mode="most")


def test_a_save_that_cannot_be_written_is_named_and_later_saves_succeed(three, capfd):
    lines = []
    large = {"w": jnp.asarray(np.random.default_rng(0).random(300_000))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(three, report=lines.append) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            checkpoints.save(40, large)
            with pytest.raises(CheckpointError) as error:
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert lines == [str(error.value)] and "\n" not in lines[0]
        assert "checkpoint 40 could not be written" in lines[0]
        assert "[10, 20, 30] are intact" in lines[0]
        assert not list(three.glob("40*"))
        assert checkpoints.restore(make_small(0))[0] == 30
        checkpoints.save(50, large)
        checkpoints.wait()
        assert checkpoints.steps() == [20, 30, 50]
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    unshare = shutil.which("unshare")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if not unshare or subprocess.run([unshare, "-rm", *mount], capture_output=True).returncode:
        pytest.skip("a small file system needs `unshare -rm`")
    code = """
        import sys, jax.numpy as jnp, numpy as np
        from train.checkpoints import CheckpointError, Checkpoints
        random = np.random.default_rng(0)
        small, large = ({"w": jnp.asarray(random.random(n, np.float32))} for n in (100, 500_000))
        with Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(1, small, wait=True)
            checkpoints.save(2, large)
            try:
                checkpoints.wait()
            except CheckpointError as error:
                print("raised", error)
            print(checkpoints.steps(), checkpoints.restore(small)[0])
            checkpoints.save(3, small, wait=True)
            print(checkpoints.steps())
    """
    script = tmp_path.parent / f"{tmp_path.name}_full_disk.py"
    script.write_text(textwrap.dedent(code))
    command = f'{" ".join(mount)} && exec "{sys.executable}" "{script}" "{tmp_path}"'
    result = subprocess.run(
        [unshare, "-rm", "sh", "-c", command],
        capture_output=True,
        text=True,
        timeout=100,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin:/sbin"},
    )
    assert result.returncode == 0, result.stderr
    message = f"checkpoint 2 could not be written to {tmp_path}: No space left on device; "
    message += "checkpoints [1] are intact"
    assert result.stdout.splitlines() == [message, f"raised {message}", "[1] 1", "[1, 3]"]
    assert "Traceback" not in result.stderr


# -- load_params -----------------------------------------------------------------------------------


def test_load_params_reads_a_run_its_checkpoints_or_one_step(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.save(2, make_state(2, ema=True))
    run = tmp_path
    for path, step in [(run, 2), (run / "checkpoints", 2), (run / "checkpoints" / "1", 1)]:
        variables = load_params(path)
        assert_same(
            variables,
            jax.tree.map(np.asarray, {"params": make_state(step).params, **make_state(step).extra}),
        )
    state = make_state(2, ema=True)
    averaged = load_params(run, {"params": state.params, **state.extra}, ema=True)
    assert_same(averaged, {**state.extra, **state.ema})


def test_load_params_names_what_it_passes_over_and_what_is_not_there(tmp_path, capsys):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.save(2, make_state(2))
    flip(tmp_path / "checkpoints" / "2")
    assert load_params(tmp_path)["params"]["blocks.0.0"]["kernel"][0, 0] == 1
    assert "using checkpoint 1 instead" in capsys.readouterr().out
    with pytest.raises(ValueError, match="SHA-256"):
        load_params(tmp_path / "checkpoints" / "2")
    flip(tmp_path / "checkpoints" / "1")
    with pytest.raises(FileNotFoundError, match="no sound checkpoint"):
        load_params(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_params(tmp_path / "nowhere")


def test_the_manifest_describes_leaves_and_metrics(three):
    with Checkpoints(three) as checkpoints:
        checkpoints.save(40, make_small(4), {"loss": np.float32(0.5)}, wait=True)
    manifest = json.loads((three / "40" / "manifest.json").read_bytes())["manifest"]
    assert manifest["step"] == 40 and manifest["metrics"] == {"loss": 0.5}
    assert manifest["tree"]["w"] == {"dtype": "float32", "shape": [5]}
    assert manifest["tree"]["rng"]["prng"] == "threefry2x32"


def test_a_file_behind_an_unusual_prefix_begins_a_run_only_where_it_is_named(tmp_path, caplog):
    from jaxmodels.interop import catalog, checkpoint, conversion
    from train.initialization import variables_from

    name = "video.style_encoders:LatentCodesDiscriminator"
    module = catalog.find(name).build(style_dim=4, n_mlp=2)
    own = catalog.initialize(module)
    state = {f"judge.{k}": v for k, v in catalog.export(name, module, own).items()}
    file = tmp_path / "judge.safetensors"
    checkpoint.write_safetensors(file, {**state, "other.weight": np.zeros(2, np.float32)})
    begin = functools.partial(
        variables_from, file, name, module, catalog.shapes(module), key="config.init_from"
    )
    with pytest.raises(conversion.CheckpointMismatch, match=r"'judge\.', which is no usual prefix"):
        begin()
    found = begin(prefix="judge.")
    jax.tree.map(np.testing.assert_array_equal, found["params"], own["params"])
    assert "prefix judge.; left out: 1 entries, first other.weight" in caplog.text
