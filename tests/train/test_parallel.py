"""One run, many ways to spread it: the losses are the same."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from jaxmodels.layers.partitioning import over_rows
from tests.train.tiny import tiny_config, trajectory
from train.naming import ConfigError
from train.parallel import (
    check_batch,
    check_processes,
    gather_over_fsdp,
    leaf_spec,
    make_mesh,
    state_sharding,
)
from train.state import create_state
from train.step import execute_jit, make_train_step, on_mesh


@pytest.fixture(scope="module")
def alone():
    return trajectory(tiny_config(), devices=jax.devices()[:1])


def _same(result, alone):
    losses, state, _ = result
    np.testing.assert_allclose(losses, alone[0], rtol=2e-5)
    for (pa, a), (pb, b) in zip(
        jax.tree_util.tree_leaves_with_path(state.variables),
        jax.tree_util.tree_leaves_with_path(alone[1].variables),
    ):
        assert pa == pb
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_eight_devices_in_parallel_give_the_losses_of_one(alone):
    _same(trajectory(tiny_config()), alone)


def test_fsdp_gives_the_losses_of_one_device_and_really_shards(alone):
    result = trajectory(tiny_config(**{"parallel.data": 2, "parallel.fsdp": 4}))
    _same(result, alone)
    kernel = result[1].params["classifier"]["kernel"]
    assert tuple(kernel.sharding.spec) == ("fsdp", None)
    assert kernel.addressable_shards[0].data.shape == (128, 10)


def test_pmap_with_synchronized_batch_norm_gives_the_losses_of_one_device(alone):
    _same(trajectory(tiny_config(**{"parallel.mode": "pmap"})), alone)


def test_pmap_without_synchronization_normalizes_each_device_by_itself(alone):
    config = tiny_config(**{"parallel.mode": "pmap", "parallel.sync_batch_norm": False})
    losses, _, _ = trajectory(config)
    assert np.abs(losses - alone[0]).max() > 1e-4


def test_accumulated_gradients_are_those_of_the_micro_batches(alone):
    # Batch statistics are those of a micro-batch, so the loss differs from one large batch's ...
    losses, state, _ = trajectory(
        tiny_config(**{"optimizer.accumulate": 2}), devices=jax.devices()[:1]
    )
    assert np.all(np.isfinite(losses)) and int(state.step) == 4
    # ... and is the same again however many devices share the rows.
    shared, _, _ = trajectory(
        tiny_config(**{"optimizer.accumulate": 2, "parallel.data": 4}), devices=jax.devices()[:4]
    )
    np.testing.assert_allclose(shared, losses, rtol=2e-5)


def test_model_axis_rules_place_the_dimension_they_name():
    mesh = make_mesh(_parallel(2, 2, 2))
    rules = ((r"classifier\.kernel", 1), (r"conv", -1))
    assert tuple(leaf_spec("params.classifier.kernel", (64, 128), mesh, rules)) == (
        "fsdp",
        "model",
    )
    assert tuple(leaf_spec("params.classifier.kernel", (64, 11), mesh, rules)) == (None, None)
    assert tuple(leaf_spec("params.bn.scale", (64,), mesh, rules)) == (None,)


def test_tensor_sharding_gives_the_losses_of_one_device(alone):
    config = tiny_config(**{"parallel.data": 4, "parallel.model": 2})
    config.parallel.rules = ((r"conv\.kernel", 3), (r"classifier\.kernel", 0))
    result = trajectory(config)
    _same(result, alone)
    assert "model" in tuple(result[2].params["conv"]["kernel"].spec)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, -1), "8 devices do not divide by 3"),
        ((16, 1, 1), "needs 16 devices; there are 8"),
        ((-1, -1, 1), "at most one may be -1"),
    ],
)
def test_impossible_meshes_are_named_before_anything_is_compiled(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(_parallel(*sizes))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 2, 1), None),
        ((2, 1, 2), None),
        ((1, 1, 4), "config.parallel.model: 4 devices that share rows belong to several processes"),
        ((2, 1, 1), "leaves process 1 of 2 without a device"),
    ],
)
def test_a_mesh_in_which_processes_would_share_rows_is_refused(shape, message):
    devices = np.array([SimpleNamespace(process_index=i // 2) for i in range(4)])
    devices = devices[: np.prod(shape)].reshape(shape)
    if message is None:
        check_processes(devices, 2)
        return
    with pytest.raises(ConfigError, match=message):
        check_processes(devices, 2)


def test_a_batch_that_does_not_divide_is_named_with_one_that_does():
    with pytest.raises(ConfigError, match=r"12 does not divide by 8 .* try 8"):
        check_batch(12, make_mesh(_parallel(4, 2, 1)))


def _parallel(data, fsdp, model):
    config = tiny_config().parallel
    config.update(data=data, fsdp=fsdp, model=model)
    return config


class _Drawing:
    """A task whose step draws all of its rows itself, as generative adversarial networks do."""

    def update(self, state, batch, rng):
        def loss_of(params):
            rows = over_rows(jax.random.normal(rng, (len(batch["image"]), 64)))
            return jnp.tanh(rows @ params["kernel"]).mean()

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        return state.replace(params=optax.apply_updates(state.params, grads)), loss, {}


@pytest.mark.parametrize("fsdp", [1, 8])
def test_rows_that_a_step_draws_are_shared_by_the_devices(fsdp):
    def run(devices, fsdp):
        mesh = make_mesh(ConfigDict({"data": -1, "fsdp": fsdp, "model": 1}), devices)
        optimizer = optax.sgd(0.1)
        params = {"kernel": jnp.ones((64, 128))}
        state = create_state(params, {}, optimizer, jax.random.key(0), ema=False)
        sharding = state_sharding(state, mesh)
        step = make_train_step(_Drawing(), optimizer, gather=gather_over_fsdp(mesh))
        execution = execute_jit(step, mesh, sharding)
        batch = execution.put({"image": np.zeros((32, 1), np.float32)})
        state = execution.place(state)
        flops = execution.step.lower(state, batch).compile().cost_analysis()["flops"]
        state, metrics = execution.step(state, batch)
        return flops, metrics["loss"], np.asarray(state.params["kernel"])

    whole, loss, kernel = run(jax.devices()[:1], 1)
    share, shared_loss, shared_kernel = run(jax.devices(), fsdp)
    assert share < 1.5 * whole / 8
    np.testing.assert_allclose(shared_loss, loss, rtol=1e-5)
    np.testing.assert_allclose(shared_kernel, kernel, rtol=1e-5)


def test_an_evaluation_shares_the_rows_that_it_makes_itself():
    """CORAL's evaluation reads a whole graph, which follows from no batch."""

    def run(devices):
        mesh = make_mesh(ConfigDict({"data": -1, "fsdp": 1, "model": 1}), devices)
        kernel = jax.device_put(jnp.ones((64, 128)), jax.NamedSharding(mesh, jax.P()))

        def evaluate(kernel, key):
            return jnp.tanh(over_rows(jax.random.normal(key, (32, 64))) @ kernel).sum()

        step = jax.jit(on_mesh(evaluate, mesh))
        compiled = step.lower(kernel, jax.random.key(0)).compile()
        return compiled.cost_analysis()["flops"], step(kernel, jax.random.key(0))

    whole, value = run(jax.devices()[:1])
    share, shared_value = run(jax.devices())
    assert share < 1.5 * whole / 8
    np.testing.assert_allclose(shared_value, value, rtol=1e-5)
