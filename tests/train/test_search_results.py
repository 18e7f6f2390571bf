"""What the search command writes: networks in their bands, a front, how to train what was found."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmodels.search import scalenet_nets
from tests.search import tiny_space
from tests.search.test_searches import separable
from tests.search.tiny_space import CHEAP
from train.building import build_task
from train.command_line import load_config, read_flags
from train.data import pipeline
from train.loop import Plan
from train.search import __main__ as command
from train.search import scoring

ROOT = Path(__file__).resolve().parents[2]


# One stage of two blocks: what compiles in seconds.
TWINS = dict(
    dims=(24,), heads=(2,), depths=(2,), windows=(2,), sr_ratios=(2,), classes=10, image_size=16
)


class Known:
    """Scores by a known fitness in the place of a supernet."""

    traces = 1


@pytest.fixture
def search(tmp_path, monkeypatch):
    """`search options -> (config, found, table)` of the alternating search on a known fitness."""
    monkeypatch.setattr(scoring, "scalenet_scorer", lambda *_, **__: Known())
    monkeypatch.setattr(scoring, "network_scores", lambda task, scorer, nets: separable(nets))

    def run(**options):
        config = load_config(str(ROOT / "configs" / "scalenet.py"))
        head = {"linear1": {"dim_in": 8, "dim_out": 10}}
        with config.unlocked():
            config.model = "search.scalenet"
            config.model_args = {**tiny_space.ARGUMENTS, "head": head}
            config.search.update(
                budget=21_000.0, base_error=9_000.0, scale_error=9_000.0, population=12,
                generations=3, base_models=3, iterations=1, compare=False, **options,
            )  # fmt: skip
        found, table, points = command._mcea(config, build_task(config), {}, tmp_path)
        command.draw_frontier(points, tmp_path / "frontier.png", found.get("front", ()))
        assert (tmp_path / "frontier.png").stat().st_size > 3000
        return config, json.loads(json.dumps(found)), table

    return run


def in_band(config, stages):
    """Whether S0 lies in the band of base models, and each scaling in its own around 2^s S0."""
    search, base = config.search, stages["S0"]["flops"]
    near = [abs(base - search.budget) <= search.base_error]
    for s in (1, 2):
        near.append(abs(stages[f"S{s}"]["flops"] - 2**s * base) <= 2**s * search.scale_error)
    return all(near)


def test_what_is_found_lies_within_the_bands(search):
    config, found, _ = search()
    assert in_band(config, found["stages"]) and "front" not in found
    for s in (3, 4):  # generalized
        target = 2**s * found["stages"]["S0"]["flops"]
        assert abs(found["stages"][f"S{s}"]["flops"] - target) <= 0.1 * target


def test_two_objectives_end_in_a_front_of_networks(search):
    config, found, table = search(multi_objective=True)
    front = found["front"]
    assert f"front, {len(front)} of {len(front)}" in table
    flops, fitness = np.array([(row["flops"], row["fitness"]) for row in front]).T
    assert (np.diff(flops) > 0).all() and (np.diff(fitness) > 0).all()
    for row in front:
        assert in_band(config, row["stages"]) and row["stages"]["S0"]["flops"] == row["flops"]
        network = scalenet_nets.ScaleNet(
            backbone=config.model_args.backbone, head=config.model_args.head,
            stages=row["stages"]["S2"]["stages"], width=row["stages"]["S2"]["width"],
        )  # fmt: skip
        assert jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 16, 16, 3)))


def test_the_strategys_form_is_an_option(search):
    straight, curved = search(seed=1)[1], search(seed=1, strategy="quadratic")[1]
    assert curved["stages"]["S2"] == straight["stages"]["S2"]
    assert curved["stages"]["S4"] != straight["stages"]["S4"]


@pytest.mark.parametrize("preset", ("small", "twins"))
def test_a_found_genome_says_how_its_network_is_trained_alone(preset, tmp_path, monkeypatch):
    file = str(ROOT / "configs" / "vitas.py")
    config = load_config(f"{file}:{preset}")
    with config.unlocked():
        config.search.update(population=6, generations=1, keep=2, compare=False)
    task = build_task(config)
    space = task.model.space
    scorer = Known()
    monkeypatch.setattr(Known, "__call__", lambda self, genes: 10 + genes.sum(1), raising=False)
    monkeypatch.setattr(scoring, "vitas_scorer", lambda *_, **__: scorer)
    found, _, _ = command._genome(config, task, {}, tmp_path)
    assert found["genome"] == found["best"][0]["genome"] and len(found["best"]) == 2
    argv = ["train", f"--config={file}:retrain", "--workdir=unused", *found["flags"]]
    network = build_task(read_flags(argv, need_workdir=True)[0]).model
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
    count = sum(int(np.prod(s.shape)) for s in jax.tree.leaves(shapes))
    if preset == "small":
        assert count == space.parameters(found["genome"])
    _, arguments = task.model.standalone(found["genome"])
    assert all(getattr(network, k) == v for k, v in arguments.items())


def test_a_twins_superformer_is_trained_and_searched(tmp_path, monkeypatch):
    config = load_config(f"{ROOT / 'configs' / 'vitas.py'}:twins")
    with config.unlocked():
        config.model, config.model_args = "search.twins_superformer", TWINS
        config.data.options.inner.image_size = 16
        config.parallel.data, config.schedule.warmup_steps = 1, 0
        config.search.update(
            flops_min=0.0, budget=1.5e5, population=4, generations=1, keep=2, chunk=4,
            batch_size=269, compare=False,
        )  # fmt: skip
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=CHEAP))
    plan = Plan(config)
    batch = next(pipeline.train_batches(config.data, batch_size=8, seed=0))
    before = plan.fresh()
    state, metrics = jax.jit(plan.step)(before, batch)
    assert np.isfinite(metrics["loss"])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, state.params)
    assert any(jax.tree.leaves(moved))
    found, table, _ = command._genome(config, plan.task, {"params": state.params}, tmp_path)
    assert table["traces of the scoring function"] == 1
    assert len(found["best"]) == 2 and 0 < found["flops"] <= 1.5e5
    assert found["model"] == "search.twins:TwinsNet" and 0 <= found["accuracy"] <= 100
