"""Schedules, weight decay, clipping, averages: against formulas and against Optax."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.repghost import get_config
from tests.train.tiny import tiny_config
from train.naming import ConfigError
from train.optimizers import make_optimizer, make_schedule
from train.state import create_state, update_ema


def test_paper_schedule_follows_timms_formula_at_every_published_epoch():
    config = get_config("paper")
    epoch = config.schedule.hold_for
    schedule = make_schedule(config.schedule, config.steps)
    for t in (0, 4, 5, 150, 251, 299):
        if t < 5:
            wanted = 1e-4 + t * (0.6 - 1e-4) / 5
        else:
            wanted = 1e-5 + 0.5 * (0.6 - 1e-5) * (1 + math.cos(math.pi * t / 300))
        # The rate stays put for the whole epoch.
        for step in (t * epoch, t * epoch + epoch - 1):
            assert float(schedule(step)) == pytest.approx(wanted, rel=2e-5, abs=1e-7)
    assert float(schedule(251 * epoch)) == pytest.approx(3.865e-2, abs=5e-6)


def test_warm_up_before_the_cosine_starts_it_afterwards():
    config = tiny_config(
        **{"schedule.peak": 1.0, "schedule.warmup_steps": 10, "schedule.warmup_inside": False}
    )
    schedule = make_schedule(config.schedule, 110)
    reference = optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 110)
    steps = np.arange(111)
    np.testing.assert_allclose(schedule(steps), reference(steps), atol=1e-6)


def test_step_and_polynomial_schedules_equal_optax():
    config = tiny_config(**{"schedule.name": "step", "schedule.boundaries": (4, 8)})
    config.schedule.peak = 1.0
    values = [float(make_schedule(config.schedule, 12)(t)) for t in (0, 3, 4, 5, 9)]
    np.testing.assert_allclose(values, [1, 1, 0.1, 0.1, 0.01], rtol=1e-6)
    config = tiny_config(**{"schedule.name": "polynomial", "schedule.power": 2.0})
    reference = optax.polynomial_schedule(0.2, 0.0, 2.0, 12)
    assert float(make_schedule(config.schedule, 12)(5)) == pytest.approx(float(reference(5)))


PARAMS = {"a.0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "bn": {"scale": jnp.ones(3)}}


def _one_update(config, grads):
    optimizer = make_optimizer(config.optimizer, optax.constant_schedule(0.1))
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    return updates


def test_weight_decay_spares_one_dimensional_parameters_and_is_pytorchs_coupled_form():
    config = tiny_config(**{"optimizer.weight_decay": 0.5})
    config.optimizer.args.nesterov = False
    updates = _one_update(config, jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(updates["a.0"]["kernel"], -0.05)
    np.testing.assert_allclose(updates["a.0"]["bias"], 0.0)
    np.testing.assert_allclose(updates["bn"]["scale"], 0.0)


def test_decoupled_decay_equals_adamw():
    config = tiny_config(**{"optimizer.name": "adam", "optimizer.weight_decay": 0.5})
    config.optimizer.args = {}
    config.optimizer.update(decoupled=True, decay_mask="all")
    grads = jax.tree.map(lambda x: 0.3 * x, PARAMS)
    adamw = optax.adamw(0.1, weight_decay=0.5)
    wanted, _ = adamw.update(grads, adamw.init(PARAMS), PARAMS)
    got = _one_update(config, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, wanted)


def test_clipping_bounds_the_global_norm_and_frozen_parameters_stay():
    config = tiny_config(**{"optimizer.clip_norm": 1.0, "optimizer.freeze": r"^bn\."})
    config.optimizer.args = {}
    updates = _one_update(config, jax.tree.map(lambda x: 100.0 * x, PARAMS))
    np.testing.assert_allclose(updates["bn"]["scale"], 0.0)
    assert float(optax.global_norm(updates)) <= 0.1 + 1e-6


def test_average_of_constant_parameters_has_the_closed_form_and_covers_statistics():
    params, extra = {"w": jnp.full(2, 3.0)}, {"batch_stats": {"m": jnp.full(2, -1.0)}}
    start = create_state({"w": jnp.zeros(2)}, {"batch_stats": {"m": jnp.zeros(2)}},
                         optax.sgd(0.1), jax.random.key(0), ema=True)  # fmt: skip
    ema = start.ema
    for _ in range(50):
        ema = update_ema(ema, params, extra, 0.9999)
    left = 0.9999**50
    np.testing.assert_allclose(ema["params"]["w"], 3.0 * (1 - left), rtol=1e-4)
    np.testing.assert_allclose(ema["extra"]["batch_stats"]["m"], -1.0 * (1 - left), rtol=1e-4)


def test_frozen_networks_and_counters_are_not_averaged():
    extra = {
        "batch_stats": {"m": jnp.ones(2)},
        "teacher": {"w": jnp.full(3, 0.1)},
        "progress": {"micro_batches": jnp.asarray(7)},
    }
    params = {"w": jnp.ones(2)}
    state = create_state(params, extra, optax.sgd(0.1), jax.random.key(0), ema=True)
    assert set(state.ema["extra"]) == {"batch_stats"}
    moved = {**extra, "progress": {"micro_batches": jnp.asarray(8)}}
    ema = update_ema(state.ema, params, moved, 0.9)
    used = state.replace(extra=moved, ema=ema).eval_variables
    assert used["teacher"] is extra["teacher"]
    assert used["progress"]["micro_batches"] == 8


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer.name", "sdg", "did you mean 'sgd'"),
        ("schedule.name", "cosin", "did you mean 'cosine'"),
    ],
)
def test_a_wrong_name_gets_the_nearest_right_one(key, value, message):
    config = tiny_config(**{key: value})
    with pytest.raises(ConfigError, match=message):
        make_optimizer(config.optimizer, make_schedule(config.schedule, 5))


@pytest.mark.parametrize("key", ["decay_factors", "groups"])
def test_decoupled_decay_refuses_what_it_would_leave_out(key):
    config = get_config("small")
    value = (("bias", 2.0),) if key == "decay_factors" else (("bias", 0.5, 0),)
    config.optimizer.update({"weight_decay": 0.1, "decoupled": True, key: value})
    with pytest.raises(ConfigError, match=f"config.optimizer.{key}: decoupled weight decay"):
        make_optimizer(config.optimizer, lambda step: 0.1)
