"""Schedules, weight decay, clipping, averages: against formulas and against Optax."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs.repghost import get_config
from tests.train.tiny import tiny_config
from train.naming import ConfigError
from train.optimizers import decay_mask, make_optimizer, make_schedule, path_string
from train.ranger import average_length, centralized
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
    options = {**config.schedule, "factor": [0.5, 0.2]}
    schedule = make_schedule(ConfigDict(options), 12)
    np.testing.assert_allclose(schedule(np.array([3, 4, 8])), [1, 0.5, 0.1], rtol=1e-6)
    with pytest.raises(ConfigError, match="one number, or one a boundary"):
        make_schedule(ConfigDict({**options, "factor": [0.5]}), 12)
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


def test_layers_stacked_by_a_scan_decay_as_they_would_one_by_one():
    norm = {"scale": jnp.ones((3, 4)), "bias": jnp.ones((3, 4))}
    params = {"layers.*": {"norm": norm, "fc": {"kernel": jnp.ones((3, 4, 4))}}}
    decays = decay_mask("matrices")(params)["layers.*"]
    assert decays == {"norm": {"scale": False, "bias": False}, "fc": {"kernel": True}}


def test_video2stylegans_second_stage_decays_the_weights_of_linear_maps_alone():
    from configs import video2stylegan
    from jaxmodels.video.video_encoder import VideoEncoder

    config = video2stylegan.get_config("paper")
    module = VideoEncoder(16, 8, 16, 1, 2, stylegan_size=16, w_dim=8, scan_layers=True)
    params = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())["params"]
    decays = decay_mask(config.optimizer.decay_mask)(params)
    names = {path_string(p) for p, d in jax.tree_util.tree_leaves_with_path(decays) if d}
    assert names and all(name.endswith("kernel") for name in names)
    assert "layers.*.mlp.fc1.kernel" in names
    stills = video2stylegan.get_config("stills")
    assert (stills.optimizer.name, stills.schedule.peak, stills.batch_size) == ("ranger", 1e-4, 8)
    assert stills.optimizer.weight_decay == 0


def test_decoupled_decay_equals_adamw():
    config = tiny_config(**{"optimizer.name": "adam", "optimizer.weight_decay": 0.5})
    config.optimizer.args = {}
    config.optimizer.update(decoupled=True, decay_mask="all")
    grads = jax.tree.map(lambda x: 0.3 * x, PARAMS)
    adamw = optax.adamw(0.1, weight_decay=0.5)
    wanted, _ = adamw.update(grads, adamw.init(PARAMS), PARAMS)
    got = _one_update(config, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, wanted)


# e4e's `training/ranger.py` (its calls brought up to PyTorch 2.13, in float64) at rate 0.01 from
# w [2, 3] = i / 4, k [2, 2, 1, 2] = i / 8 - 1 / 2, b = (0.5, -0.25), PyTorch's layout, with
# gradients 0.02 sin(0.7 t + i^2): {(weight decay, step): parameters}.
RANGER = {
    (0.0, 5): (
        [-0.000483512, 0.24969284, 0.500790673, 0.750358636, 1.000509256, 1.249132108],
        [-0.500676386, -0.375500034, -0.249402201, -0.12442138, 0.000648198, 0.12427105,
         0.250192117, 0.374888635],
        [0.499306854, -0.250516794],
    ),
    (0.0, 6): (
        [-0.000282618, 0.249896226, 0.50038438, 0.75025567, 1.000263528, 1.249520564],
        [-0.500385191, -0.375223629, -0.24972868, -0.124650795, 0.000382984, 0.124630074,
         0.250054932, 0.374858905],
        [0.499615321, -0.250226641],
    ),
    (0.0, 14): (
        [-0.000735256, 0.249895892, 0.500645152, 0.750709863, 1.000620974, 1.249059314],
        [-0.500847956, -0.37538988, -0.249569785, -0.124179187, 0.000854727, 0.124286806,
         0.250116395, 0.37448613],
        [0.49916692, -0.250357375],
    ),
    (0.1, 14): (
        [-0.000732758, 0.247906149, 0.496660132, 0.744735366, 0.992655458, 1.239109482],
        [-0.496863093, -0.372401627, -0.247581515, -0.123186761, 0.000851493, 0.123294715,
         0.248125047, 0.371501182],
        [0.495188693, -0.248364475],
    ),
}  # fmt: skip


def _from_torch(w, k, b):
    kernel = np.asarray(k).reshape(2, 2, 1, 2).transpose(2, 3, 1, 0)
    linear = np.asarray(w).reshape(2, 3).T
    tree = {"conv": {"kernel": kernel}, "linear": {"kernel": linear, "bias": np.asarray(b)}}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_ranger_moves_parameters_as_the_official_file_does(decay):
    config = tiny_config(**{"optimizer.name": "ranger"})
    config.optimizer.args = {"weight_decay": decay}
    optimizer = make_optimizer(config.optimizer, optax.constant_schedule(0.01))
    i = np.arange(8)
    params = _from_torch(i[:6] / 4, i / 8 - 0.5, [0.5, -0.25])
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for t in range(1, 15):
        grads = _from_torch(*(0.02 * np.sin(0.7 * t + i[:n] ** 2.0) for n in (6, 8, 2)))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if (decay, t) in RANGER:
            wanted = _from_torch(*RANGER[decay, t])
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=4e-7), params, wanted)


def test_ranger_knows_its_average_exactly_and_centralizes_every_output():
    t = np.array([1, 5, 6, 100, 499, 500, 501, 5000, 500000])
    power = 0.999 ** t.astype(np.float64)
    wanted = 1999 - 2 * t * power / (1 - power)
    np.testing.assert_allclose(
        average_length(jnp.asarray(t, jnp.float32), 0.999), wanted, rtol=1e-5
    )
    grad = jax.random.normal(jax.random.key(0), (4, 3, 2))
    for names, axes in (
        (("kernel",), (0, 1)),
        (("embedding",), (1, 2)),
        (("layers.*", "kernel"), (1,)),
    ):
        path = [jax.tree_util.DictKey(n) for n in names]
        np.testing.assert_allclose(centralized(path, grad).mean(axes), 0, atol=1e-6)
        assert np.abs(centralized(path, grad).mean(2 if axes == (0, 1) else 0)).max() > 0.1
    bias = [jax.tree_util.DictKey("bias")]
    np.testing.assert_array_equal(centralized(bias, grad[0, 0]), grad[0, 0])


def test_clipping_bounds_the_global_norm_and_frozen_parameters_stay():
    config = tiny_config(**{"optimizer.clip_norm": 1.0, "optimizer.freeze": r"^bn\."})
    config.optimizer.args = {}
    updates = _one_update(config, jax.tree.map(lambda x: 100.0 * x, PARAMS))
    np.testing.assert_allclose(updates["bn"]["scale"], 0.0)
    assert float(optax.global_norm(updates)) <= 0.1 + 1e-6


def test_a_group_after_an_exclamation_mark_is_not_clipped_and_does_not_count():
    from train.optimizers import clip_by_group_norms

    clip = clip_by_group_norms(5.0, (r"!^margin_head\.",))
    updates = {"conv": {"kernel": jnp.full(4, 5.0)}, "margin_head": {"weight": jnp.full(4, 50.0)}}
    clipped, _ = clip.update(updates, clip.init(updates))
    np.testing.assert_allclose(clipped["conv"]["kernel"], 2.5, rtol=1e-6)
    np.testing.assert_array_equal(clipped["margin_head"]["weight"], 50.0)


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
        ("optimizer.name", "rangr", "did you mean 'ranger'"),
        ("schedule.name", "cosin", "did you mean 'cosine'"),
    ],
)
def test_a_wrong_name_gets_the_nearest_right_one(key, value, message):
    config = tiny_config(**{key: value})
    with pytest.raises(ConfigError, match=message):
        make_optimizer(config.optimizer, make_schedule(config.schedule, 5))


@pytest.mark.parametrize("argument", [{"sync_period": 0}, {"alpha": 2.0}, {"eps": 0.0}])
def test_ranger_refuses_what_cannot_be_meant(argument):
    config = tiny_config(**{"optimizer.name": "ranger"})
    config.optimizer.args = argument
    with pytest.raises(ConfigError, match=f"config.optimizer.args: ranger: {next(iter(argument))}"):
        make_optimizer(config.optimizer, optax.constant_schedule(0.1))


@pytest.mark.parametrize("key", ["decay_factors", "groups"])
def test_decoupled_decay_refuses_what_it_would_leave_out(key):
    config = get_config("small")
    value = (("bias", 2.0),) if key == "decay_factors" else (("bias", 0.5, 0),)
    config.optimizer.update({"weight_decay": 0.1, "decoupled": True, key: value})
    with pytest.raises(ConfigError, match=f"config.optimizer.{key}: decoupled weight decay"):
        make_optimizer(config.optimizer, lambda step: 0.1)
