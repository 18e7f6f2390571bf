"""The pure training step, and how it and evaluations meet their devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.parallel import batch_sharding, global_batch
from train.state import TrainState, update_ema


def make_train_step(
    task,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float = 0.0,
    accumulate: int = 1,
    axis_name: str | None = None,
    gather: Callable = lambda params: params,
) -> Callable:
    """`(state, batch) -> (state, metrics)`, pure.

    Args:
      task: gives `loss(params, extra, batch, rng) -> (loss, (extra, metrics))`, or, for alternating
        updates, `update(state, batch, rng) -> (state, loss, metrics)`. With `uses_step` its loss
        takes the number of the step as well; with `weighted_by`, the name of a metric, the
        gradients of micro-batches and `pmap` devices are averaged in proportion to it.
      accumulate: micro-batches per update; batch statistics pass from one to the next.
      axis_name: the `pmap` axis over which gradients and metrics are averaged.
      gather: brings sharded parameters together before use (FSDP).
    """

    uses_step = getattr(task, "uses_step", False)
    weighted_by = getattr(task, "weighted_by", None)

    def gradients(params, extra, batch, rng, count):
        def loss_fn(params):
            step = {"step": count} if uses_step else {}
            return task.loss(gather(params), extra, batch, rng, **step)

        (loss, (extra, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return grads, extra, {"loss": loss, **metrics}

    def accumulated(params, extra, batch, rng, count):
        if accumulate == 1:
            return gradients(params, extra, batch, rng, count)
        # [B, ...] -> [k, B/k, ...] taking every k-th row, so that each device keeps its own rows.
        parts = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), batch
        )

        def body(carry, part_rng):
            extra, *total = carry
            grads, extra, metrics = gradients(params, extra, *part_rng, count)
            weight = weight_of(metrics)
            part = jax.tree.map(lambda x: weight * x, (grads, metrics))
            return (extra, *jax.tree.map(jnp.add, tuple(total), (weight, part))), None

        rngs = jax.random.split(rng, accumulate)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradients, params, extra, first, rng, count)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], shapes[2]))
        (extra, weight, total), _ = jax.lax.scan(body, (extra, jnp.zeros(()), zero), (parts, rngs))
        grads, metrics = jax.tree.map(lambda x: x / weight, total)
        return grads, extra, metrics

    def weight_of(metrics):
        return jnp.ones(()) if weighted_by is None else metrics[weighted_by]

    def step(state: TrainState, batch):
        rng = jax.random.fold_in(state.rng, state.step)
        if axis_name is not None:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        if hasattr(task, "update"):
            whole = state.replace(params=gather(state.params))
            new, loss, metrics = task.update(whole, batch, rng)
            finite = jnp.isfinite(loss)
            metrics = {"loss": loss, **metrics}
        else:
            grads, extra, metrics = accumulated(state.params, state.extra, batch, rng, state.step)
            if axis_name is not None:
                weight = weight_of(metrics) / jax.lax.pmean(weight_of(metrics), axis_name)
                shares = jax.tree.map(lambda x: weight * x, (grads, metrics))
                grads, metrics = jax.lax.pmean(shares, axis_name)
                # Equal already where statistics are synchronized; otherwise their mean is kept.
                extra = jax.tree.map(
                    lambda x: (
                        jax.lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.floating) else x
                    ),
                    extra,
                )
            norm = optax.global_norm(grads)
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = None if state.ema is None else update_ema(state.ema, params, extra, ema_decay)
            new = state.replace(params=params, extra=extra, opt_state=opt_state, ema=ema)
            metrics = {**metrics, "grad_norm": norm}
        new = new.replace(step=state.step + 1)
        bad = jnp.where(finite, -1, state.step).astype(jnp.int32)
        keep = finite & (state.bad_step < 0)
        new = jax.tree.map(lambda n, o: jnp.where(keep, n, o), new, state)
        return new.replace(bad_step=jnp.where(state.bad_step < 0, bad, state.bad_step)), metrics

    return step


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """The function, traced where `jaxmodels.layers.partitioning` sees the mesh."""

    @functools.wraps(function)
    def traced(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


class Execution(NamedTuple):
    """How a run's step meets its devices.

    Attributes:
      place: a host or single-device state -> the state the step takes.
      whole: the state the step returns -> one logical state, for evaluation and checkpoints.
      put: this process's rows -> the batch the step takes.
      step: the compiled `(state, batch) -> (state, metrics)`; it consumes the state.
    """

    place: Callable
    whole: Callable
    put: Callable
    step: Callable


def execute_jit(step: Callable, mesh: Mesh, sharding) -> Execution:
    """One program over the whole mesh; XLA puts in the communication."""
    rows = batch_sharding(mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())

    return Execution(
        place=lambda state: jax.device_put(state, sharding),
        whole=lambda state: state,
        put=lambda batch: global_batch(batch, rows),
        step=jax.jit(
            on_mesh(step, mesh),
            in_shardings=(sharding, rows),
            out_shardings=(sharding, everywhere),
            donate_argnums=0,
        ),
    )


def execute_pmap(step: Callable, mesh: Mesh, axis_name: str) -> Execution:
    """One replica a device; gradients are averaged by the step over `axis_name`."""
    devices = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    count = len(devices)

    def replicate(x):
        # By way of the host: `pmap` takes arrays that no other mesh has claimed.
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(x).addressable_data(0))
            return jax.random.wrap_key_data(
                np.broadcast_to(data, (count, *data.shape)), impl=jax.random.key_impl(x)
            )
        data = np.asarray(x.addressable_data(0))
        return np.broadcast_to(data, (count, *data.shape))

    def place(state):
        return jax.tree.map(replicate, state)

    compiled = jax.pmap(
        step, axis_name=axis_name, devices=list(mesh.devices.flat), donate_argnums=0
    )

    def run(state, batch):
        state, metrics = compiled(state, batch)
        return state, jax.tree.map(lambda x: x[0], metrics)

    return Execution(
        place=place,
        whole=lambda state: jax.tree.map(lambda x: x[0], state),
        put=lambda batch: {k: v.reshape(count, -1, *v.shape[1:]) for k, v in batch.items()},
        step=run,
    )
