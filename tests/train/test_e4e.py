"""Training of pSp and e4e: who moves when, what the pools hold, and that runs go on exactly."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxmodels
from jaxmodels.interop import catalog, checkpoint
from jaxmodels.video.style_encoders import query_pool
from train.__main__ import main
from train.checkpoints import load_params
from train.command_line import load_config, read_flags, stop_with_one_line
from train.loop import Plan

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "e4e.py")


MODEL = [
    *("image_size=16", "stylegan_size=16", "w_dim=8", "n_low=4", "ir_layers=18", "width_divisor=64")
]
SIZES = [f"--config.model_args.{s}" for s in (*MODEL, "se_reduction=1")]
GENERATOR = [
    "--config.task_args.generator_from=",
    *(
        f"--config.task_args.generator_args.{s}"
        for s in (
            "img_resolution=16", "z_dim=8", "w_dim=8", "mapping_layers=2", "channel_base=64",
            "channel_max=4",
        )
    ),
]  # fmt: skip
DATA = ("z_dim=8", "w_dim=8", "n_low=4")
TURNS = [
    f"--config.task_args.{s}"
    for s in ("delta_start=4", "delta_every=4", "pool_size=12", "r1_every=8")
]
# Deep networks, whose gradients take long to compile; they are in other runs.
CRITICS = [f"--config.task_args.weights.{name}=0.0" for name in ("lpips", "identity")]
RUN = [
    "--config.steps=20",
    "--config.batch_size=8",
    "--config.log_every=1",
    "--config.eval.every=0",
    "--config.eval.batch_size=8",
    "--config.checkpoint.every=10",
    "--config.parallel.fsdp=2",
]


def rows_of(workdir):
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "train"]


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """FFHQ's layout: folders of PNGs."""
    root = tmp_path_factory.mktemp("ffhq")
    rng = np.random.default_rng(0)
    for i in range(16):
        folder = root / f"{i // 8 * 1000:05d}"
        folder.mkdir(exist_ok=True)
        base = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
        base.resize((20, 20), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.png")
    return root


@pytest.fixture(scope="module")
def paper_run(faces, tmp_path_factory):
    """Twenty steps of `:paper` at reduced size, on a mesh of data and fsdp."""
    workdir = tmp_path_factory.mktemp("e4e")
    flags = [f"--config={CONFIG}:paper", f"--config.data.options.path={faces}"]
    flags += ["--config.data.options.image_size=16", "--config.data.options.workers=0"]
    flags += [*SIZES, *GENERATOR, *TURNS, *CRITICS, *RUN]
    assert main(["train", *flags, f"--workdir={workdir}"]) == 0
    return workdir, flags


def test_paper_recipe_frees_one_delta_after_the_other(paper_run):
    rows = rows_of(paper_run[0])
    assert [r["stage"] for r in rows] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert [r["r1"] > 0 for r in rows] == [i % 8 == 0 for i in range(20)]
    assert [r["delta_norm"] > 0 for r in rows] == [False] * 4 + [True] * 16
    for row in rows:
        terms = ("l2", "adversarial", "delta_norm")
        np.testing.assert_allclose(row["loss"], sum(row[t] for t in terms), rtol=1e-5)
        assert np.isfinite(row["grad_norm"]) and np.isfinite(row["discriminator"])
    report = (paper_run[0] / "report.md").read_text()
    assert "lec_of_mean_latent" in report and "relative_mse" in report and "delta" in report


def test_every_network_moves_in_its_turn_and_the_generator_never(paper_run):
    workdir, flags = paper_run
    config, _ = read_flags(["train", *flags, f"--workdir={workdir}"], need_workdir=True)
    fresh, last = jax.device_get(Plan(config).make()), load_params(workdir)
    styles = fresh.params["encoder"]
    moved = [
        any(
            not np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(last["params"]["encoder"][f"styles.{i}"]),
                jax.tree.leaves(styles[f"styles.{i}"]),
            )
        )
        for i in range(6)
    ]
    assert moved == [True] * 5 + [False]
    jax.tree.map(np.testing.assert_array_equal, last["generator"], fresh.extra["generator"])
    before = fresh.extra["adversary"]["params"]
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, last["adversary"]["params"], before)
    assert all(jax.tree.leaves(apart))
    assert last["adversary"]["filled"] == 12 and last["adversary"]["stage"] == 4
    assert all((np.abs(last["adversary"][k]).max(1) > 0).all() for k in ("real", "fake"))
    assert np.abs(last["batch_stats"]["encoder"]["input_layer.1"]["mean"]).max() > 0


def test_a_resumed_run_repeats_losses_pools_and_statistics_bit_for_bit(paper_run, tmp_path):
    workdir, flags = paper_run
    stopped = tmp_path / "stopped"
    shutil.copytree(workdir, stopped)
    shutil.rmtree(stopped / "checkpoints" / "20")
    assert main(["train", *flags, f"--workdir={stopped}"]) == 0
    # Logged again from step 10 on.
    again = {r["step"]: r["loss"] for r in rows_of(stopped)}
    assert again == {r["step"]: r["loss"] for r in rows_of(workdir)}
    states = [load_params(d) for d in (workdir, stopped)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def small_task(*more, preset="small"):
    flags = [f"--config={CONFIG}:{preset}", *SIZES, *GENERATOR, *RUN, *more]
    flags += [
        f"--config.data.options.{s}" for s in ("z_dim=8", "w_dim=8", "n_low=4", "eval_examples=8")
    ]
    return read_flags(["train", *flags, "--workdir=x"], need_workdir=True)[0]


def test_the_judgment_reaches_free_codes_alone():
    plan = Plan(small_task())
    task = plan.task
    critic = task.discriminator.init(jax.random.key(0), jnp.zeros((1, 8)))["params"]
    codes = jax.random.normal(jax.random.key(1), (4, 6, 8))

    def judged(codes, stage):
        return task._code_terms({}, {"params": critic}, codes, stage)["adversarial"]

    run = jax.jit(jax.value_and_grad(judged))
    value, slope = run(codes, jnp.int32(2))
    per_layer = jnp.abs(slope).max((0, 2))
    assert (per_layer[:3] > 0).all() and (per_layer[3:] == 0).all()
    logits = task.discriminator.apply({"params": critic}, codes[:, :3])
    assert float(value) == pytest.approx(0.1 * float(jax.nn.softplus(-logits).mean()), rel=1e-5)


def test_psp_trains_all_codes_without_a_discriminator():
    plan = Plan(small_task("--config.task_args.weights.w_norm=0.005", preset="psp"))
    assert set(plan.abstract.extra["adversary"]) == {"stage"}
    batch = {k: jax.ShapeDtypeStruct((8, *s.shape), s.dtype) for k, s in plan.spec.items()}
    _, metrics = jax.eval_shape(plan.step, plan.abstract, batch)
    assert set(metrics) == {"loss", "l2", "w_norm", "stage", "grad_norm"}


def test_the_pool_answers_as_the_official_loop_does():
    rng = jax.random.key(3)
    codes = jax.random.normal(jax.random.key(0), (40, 2))
    pool, filled, held = jnp.zeros((6, 2)), jnp.int32(0), []
    run = jax.jit(query_pool)
    given = []
    for i in range(5):
        rows = codes[8 * i : 8 * i + 8]
        out, pool, filled = run(pool, filled, rows, jax.random.fold_in(rng, i))
        # Whatever the draws, every code given back is the row itself or one that was held.
        for row, answer in zip(np.asarray(rows), np.asarray(out)):
            if len(held) < 6:
                held.append(row)
                np.testing.assert_array_equal(answer, row)
            elif not np.array_equal(answer, row):
                place = next(j for j, h in enumerate(held) if np.array_equal(h, answer))
                held[place] = row
        np.testing.assert_array_equal(pool[: len(held)], np.stack(held))
        given.append(np.asarray(out))
    assert int(filled) == 6
    changed = (np.concatenate(given) != np.asarray(codes)).any(1)
    assert not changed[:6].any() and 8 < changed[6:].sum() < 27


def test_the_trunk_begins_with_arcfaces_and_the_heads_with_the_seed(tmp_path):
    name, sizes = "vision.ir_se", dict(num_layers=18, width_divisor=64, se_reduction=1)
    module = catalog.find(name).build(**sizes)
    shapes = catalog.shapes(module)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: rng.random(s.shape, np.float32) + 0.5, shapes)
    path = tmp_path / "model_ir_se50.safetensors"
    jaxmodels.save(path, name, module, variables)
    assert "output_layer.3.weight" in checkpoint.read(path).tensors
    config = small_task(f"--config.task_args.encoder_from={path}")
    plan = Plan(config)
    own = plan.make()
    params, extra = plan.task.start(own.params, own.extra)
    taken = {"params": params, **extra}
    for collection in ("params", "batch_stats"):
        found = taken[collection]["encoder"]
        for key in ("input_layer.1", "body.7"):
            wanted = variables[collection][key]
            jax.tree.map(np.testing.assert_array_equal, found[key], wanted)
    for key in ("styles.0", "styles.5", "latlayer1"):
        jax.tree.map(
            np.testing.assert_array_equal,
            params["encoder"][key],
            own.params["encoder"][key],
        )


MISTAKES = {
    "--config.model=video.video_encoder": "e4e trains backbones e4e and ir_se50 (pSp), not vit",
    "--config.task_args.pool_size=-1": "config.task_args.pool_size: -1 is negative",
    "--config.task_args.delta_every=0": "config.task_args.delta_every: at least 1, got 0",
    "--config.ema.decay=0.9": "config.ema.decay: e4e's training keeps no average",
    "--config.optimizer.accumulate=2": "without accumulation",
    "--config.model_args.width_divisor=32": "w_dim is 8, but backbone e4e with width_divisor 32",
    "--config.task_args.encoder_from=nowhere.pth": "no file 'nowhere.pth'",
    "--config.optimizer.args.sync_period=0": "sync_period must be at least 1, got 0",
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_gets_one_line(flag, tmp_path, capsys):
    argv = [f"--config={CONFIG}", *SIZES, *GENERATOR, *RUN, flag]
    argv += [f"--config.data.options.{s}" for s in DATA]
    if "model=" in flag:
        argv = [f for f in argv if not any(n in f for n in ("divisor", "reduction", "ir_layers"))]
    assert stop_with_one_line(main, ["train", *argv, f"--workdir={tmp_path}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and MISTAKES[flag] in error


def test_every_preset_builds_its_task_and_a_late_last_delta_is_said(capsys):
    from train.building import build_task

    for preset in ("small", "psp"):
        task = build_task(load_config(f"{CONFIG}:{preset}"))
        assert task.staged == (preset == "small")
    assert "last delta" not in capsys.readouterr().out
    config = load_config(CONFIG)
    config.steps = 400
    build_task(config)
    assert "the last delta is turned on at step 440, the run ends at 400" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no preset 'papper'"):
        load_config(f"{CONFIG}:papper")
