"""Sweeps: lanes equal single runs, resume after a kill, tables; and the command line."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.dmf import PRESETS, get_config
from theory import experiments, lanes, presets, runs, sweep
from theory.optimizers import gradients
from theory.streaming import detector_init, detector_report, detector_update

ROOT = Path(__file__).parents[2]


def specs(count=6):
    return runs.make_specs(
        dict(L=2, sigma=(1.0, 0.4)[: 1 + s % 2], alpha=1e-4, seed=s, cap=250) for s in range(count)
    )


def single(spec):
    """The same run, one plain step after the other."""
    lane = jax.tree.map(lambda x: x[0], sweep.draw_lanes([spec], spec.width, jnp.float64))
    from theory.dynamics import step

    gd = jax.jit(lambda state: step(lane.problem, spec.optimizer, lane.lr, state))
    state, infos = lane.state._replace(detector=None), []
    while True:
        after, info = gd(state)
        infos.append(info)
        if info.loss <= spec.stop_level or int(state.step) >= spec.steps:
            break
        state = after
    loss, grad, products = (jnp.stack([i[k] for i in infos]) for k in range(3))
    detector = detector_init(jnp.asarray(spec.sigma), products.shape[1:])
    detector = jax.jit(detector_update)(detector, jnp.arange(len(infos)), loss, grad, products)
    return detector_report(detector), len(infos) - 1, float(loss[-1])


def test_refilled_lanes_on_several_devices_give_the_single_runs_and_resume_after_a_kill(tmp_path):
    path = tmp_path / "records.jsonl"
    mesh = sweep.device_mesh()
    assert mesh.devices.size == 8
    records = sweep.sweep(specs(), path, lanes=2, chunk=32, mesh=mesh)
    assert [r["id"] for r in records] == [s.id for s in specs()]
    for spec, record in list(zip(specs(), records))[1:2]:
        report, steps, loss = single(spec)
        assert record["steps"] == steps and record["n_stages"] == report.n_stages == record["R"]
        assert record["activation_steps"] == list(report.activation_steps)
        assert record["final_loss"] == pytest.approx(loss, rel=1e-9)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])
    again = sweep.sweep(specs(), path, lanes=2, chunk=32, mesh=mesh)
    assert again == records
    sweep.write_tables(records, tmp_path)
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert len(rows) == 6 and {r["status"] for r in rows} <= {"converged", "max_steps"}
    escapes = list(csv.DictReader((tmp_path / "escapes.csv").open()))
    assert len(escapes) == sum(len(r["escapes"]) for r in records)


KILLED = """
import jax, sys
jax.config.update("jax_enable_x64", True)
from tests.theory.test_sweep import specs
from theory import sweep
sweep.sweep(specs(), sys.argv[1], lanes=2, chunk=4, mesh=sweep.device_mesh(jax.devices()[:1]))
"""


def test_a_sweep_killed_at_any_moment_goes_on_to_the_same_records(tmp_path):
    path = tmp_path / "records.jsonl"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], cwd=ROOT)
    while child.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = len(sweep.read_records(path))
    assert 1 <= kept
    mesh = sweep.device_mesh(jax.devices()[:1])
    resumed = sweep.sweep(specs(), path, lanes=2, chunk=4, mesh=mesh)
    assert len(path.read_text().splitlines()) >= len(resumed) == 6
    assert resumed == sweep.sweep(specs(), lanes=2, chunk=4, mesh=mesh)


@pytest.mark.parametrize("kind", ["reconstruction", "completion"])
def test_lanes_last_take_the_steps_of_lanes_first(kind):
    made = runs.make_specs(
        [dict(L=3, sigma=(1.0, 0.5), alpha=0.1, seed=s) for s in range(16)], dim=5, problem=kind
    )
    first = sweep.draw_lanes(made, 5, jnp.float64)
    last = sweep.draw_lanes(made, 5, jnp.float64, -1)
    wanted = jax.jit(jax.vmap(gradients))(first.problem, first.state.factors)
    found = jax.jit(lambda p, w: gradients(p, w, lanes.matmul))(last.problem, last.state.factors)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(jnp.moveaxis(a, -1, 0), b, atol=1e-15)
    # A width, a method or a backend for which the lanes stay first takes the same runs.
    assert lanes.lanes_last((5,) * 4, kind, made[0].optimizer, "cpu")
    assert not lanes.lanes_last((50,) * 4, kind, made[0].optimizer, "cpu")
    assert not lanes.lanes_last((5,) * 4, kind, made[0].optimizer, "tpu")


def test_a_sweep_with_its_lanes_first_gives_the_same_stages(monkeypatch):
    mesh = sweep.device_mesh(jax.devices()[:2])
    usual = sweep.sweep(specs(2), lanes=2, chunk=64, mesh=mesh)
    monkeypatch.setattr(lanes, "LAST_UP_TO", {})
    for a, b in zip(usual, sweep.sweep(specs(2), lanes=2, chunk=64, mesh=mesh), strict=True):
        assert a["activation_steps"] == b["activation_steps"] and a["steps"] == b["steps"]
        assert a["final_loss"] == pytest.approx(b["final_loss"], rel=1e-9)


@pytest.mark.parametrize("kind", ["sensing", "regression"])
def test_sensing_and_regression_sweep_as_single_runs(kind):
    made = runs.make_specs(
        [dict(L=2, sigma=(1.0, 0.4)[: 1 + s], alpha=1e-3, seed=s, cap=300) for s in range(2)],
        dim=4,
        problem=kind,
    )
    mesh = sweep.device_mesh(jax.devices()[:1])
    records = sweep.sweep(made, lanes=2, chunk=32, mesh=mesh)
    for spec, record in zip(made, records, strict=True):
        report, steps, loss = single(spec)
        assert record["steps"] == steps and record["n_stages"] == report.n_stages == record["R"]
        assert record["activation_steps"] == list(report.activation_steps)
        assert record["final_loss"] == pytest.approx(loss, rel=1e-9)
        lane = sweep.draw_lanes([spec], spec.width, jnp.float64)
        problem = jax.tree.map(lambda x: x[0], lane.problem)
        wanted = spec.dimensionless_step / 2 / float(problem.sharpness)
        assert record["lr"] == pytest.approx(wanted) and record["relative_error"] < 0.2
    assert (
        runs.make_specs([dict(L=2, sigma=(1.0,), alpha=1e-3, seed=0, lr=0.1)], problem=kind)[
            0
        ].shape_key()
        != made[0].shape_key()
    )


def test_two_runs_with_one_id_are_refused():
    with pytest.raises(ValueError, match="share an id"):
        sweep.sweep([*specs(1), *specs(1)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": 0.0}, "run L2_R1_s0: alpha: 0.0 must be positive"),
        ({"alpha": -1.0}, "alpha: -1.0 must be positive"),
        ({"lr": 0.0}, "lr: 0.0 must be positive"),
        ({"lr": 0.1, "eta_hat": 0.3}, "give lr or eta_hat, not both"),
        ({"eta_hat": -1.0}, "eta_hat: -1.0 must be positive"),
        ({"init": "unbalanced"}, "init: a sweep cannot draw 'unbalanced'"),
        ({"problem": "denoising"}, "problem: unknown 'denoising'"),
        ({"cap": 0}, "cap: 0 must be at least 1"),
        ({"sigma": (1.0, 0.5), "dims": (1, 3, 3)}, "sigma: rank 2 exceeds"),
        ({"target": ((1.0,),)}, r"dims: .*\(10, 10\).*\(1, 1\)"),
    ],
)
def test_a_bad_run_of_a_sweep_is_one_line_that_names_it(values, message):
    row = dict(L=2, sigma=(1.0,), alpha=1e-4, seed=0)
    with pytest.raises(ValueError, match=message) as caught:
        sweep.sweep(runs.make_specs([{**row, **values}]))
    assert "\n" not in str(caught.value)


@pytest.mark.float32
def test_a_sweep_of_a_tiny_alpha_is_refused_in_float32():
    with pytest.raises(ValueError, match="x64"):
        sweep.sweep(runs.make_specs([dict(L=2, sigma=(1.0,), alpha=1e-8, seed=0)]))


def test_runs_that_will_not_show_their_rank_are_counted_before_a_sweep():
    row = dict(L=2, sigma=(1.0, 0.9), alpha=1e-2, seed=0)
    made = runs.make_specs([row, {**row, "seed": 1, "eta_hat": 2.5, "dims": (3, 1, 3)}])
    notes = " ".join(runs.doubts(made))
    for part in ("S < 1.25 in 2 of 2", "eta_hat >= 2 in 1 of 2", "rank in 1 of 2"):
        assert part in notes


def test_a_run_with_a_bottleneck_converges_to_the_best_approximation():
    row = dict(L=2, sigma=(1.0, 0.5), alpha=1e-2, seed=0, dims=(3, 1, 3), cap=300)
    mesh = sweep.device_mesh(jax.devices()[:1])
    with pytest.warns(UserWarning, match="bottleneck"):
        (record,) = sweep.sweep(runs.make_specs([row]), chunk=32, mesh=mesh)
    assert record["status"] == "converged" and record["steps"] < 300
    assert record["n_stages"] == 1 and record["final_loss"] == pytest.approx(0.125, rel=1e-2)


def test_records_of_other_settings_are_not_taken_for_this_sweeps(tmp_path):
    path = tmp_path / "records.jsonl"
    kept = {"id": "L2_R1_s0", "alpha": 1e-4, "sigma": [1.0], "cap": 250}
    path.write_text(json.dumps(kept) + "\n")
    assert sweep.sweep(specs(1), path) == [kept]
    row = dict(L=2, sigma=(1.0,), alpha=1e-6, seed=0, cap=250)
    with pytest.raises(ValueError, match=r"L2_R1_s0 was made with alpha = 0\.0001, now 1e-06"):
        sweep.sweep(runs.make_specs([row]), path)


def test_the_recorded_experiments_have_the_specified_sizes():
    assert len(experiments.benchmark()) == 3580
    assert len(experiments.defaults()) == 1008
    for make in (
        experiments.failures,
        experiments.step_sizes,
        experiments.optimizers,
        experiments.completion,
        experiments.depth_selection,
    ):
        made = make()
        assert len({s.id for s in made}) == len(made)


def test_two_samples_are_compared_exactly():
    assert experiments.two_sample_differs(60, 60, 50, 60)
    assert not experiments.two_sample_differs(58, 60, 60, 60)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_config(preset):
    config = get_config(preset)
    assert isinstance(config, ConfigDict) and config.preset == preset


def test_a_run_writes_tables_figures_and_report_that_name_the_stages(tmp_path):
    config = get_config("demo")
    config.update(depth=2, dim=4, rank=2, alpha=1e-5, record_every=20)
    report = presets.execute(config, tmp_path, lambda text: None)
    assert report.n_stages == report.n_plateaus == 2
    assert "held in this one run: 2 stages" in (tmp_path / "report.md").read_text()
    made = {p.name for p in (tmp_path / "figures").iterdir()}
    assert {"1_singular_values.png", "2_gradient_and_loss.png", "5_ranks.png"} <= made
    with np.load(tmp_path / "trajectory.npz") as stored:
        assert stored["singular_values"].shape[1] == 4 and stored["trace.loss"].ndim == 1
    assert json.loads((tmp_path / "config.json").read_text())["preset"] == "demo"
