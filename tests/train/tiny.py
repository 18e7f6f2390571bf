"""A run small enough for tests: a network that compiles in a second and has every collection."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.layers.normalization import BatchNorm
from train.defaults import default_config


class TinyNet(nn.Module):
    """Convolution, BatchNorm, pool, linear: every collection a real network has."""

    features: int = 512
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(self.features, (3, 3), (4, 4), padding=[(1, 1), (1, 1)], name="conv")(x)
        x = BatchNorm(1e-5, axis_name=self.bn_axis_name, name="bn")(x, train)
        x = nn.relu(x).mean((1, 2))
        return nn.Dense(10, name="classifier")(x)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Fixed random images and labels, the batch of step t being a function of t alone."""

    size: int = 16

    def batch(self, step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(step)
        image = rng.standard_normal((self.size, 8, 8, 3), np.float32)
        return {"image": image, "label": rng.integers(0, 10, self.size).astype(np.int32)}


def tiny_config(**changes):
    """The default config with a schedule and batch for `TinyNet`; `changes` are dotted keys."""
    config = default_config()
    config.steps, config.batch_size = 6, 16
    config.optimizer.args.momentum = 0.9
    config.optimizer.args.nesterov = True
    config.schedule.peak = 0.2
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


def trajectory(config, *, devices=None, steps: int = 4, model=None):
    """Losses of `steps` steps of `TinyNet` under the config's parallelism, and the last state."""
    from train.optimizers import make_optimizer, make_schedule
    from train.parallel import gather_over_fsdp, make_mesh, state_sharding
    from train.state import create_state
    from train.step import execute_jit, execute_pmap, make_train_step
    from train.tasks.classification import Classification

    pmap = config.parallel.mode == "pmap"
    sync = pmap and config.parallel.sync_batch_norm
    model = model or TinyNet(bn_axis_name="batch" if sync else None)
    task = Classification(model=model, label_smoothing=0.1)
    mesh = make_mesh(config.parallel, devices)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.schedule, config.steps))
    rows = Rows(config.batch_size)

    def create():
        params, extra = task.init(jax.random.key(1), {"image": jnp.zeros((1, 8, 8, 3))})
        return create_state(params, extra, optimizer, jax.random.key(2), ema=config.ema.decay > 0)

    sharding = state_sharding(jax.eval_shape(create), mesh, config.parallel.rules)
    step = make_train_step(
        task,
        optimizer,
        ema_decay=config.ema.decay,
        accumulate=config.optimizer.accumulate,
        axis_name="batch" if pmap else None,
        gather=gather_over_fsdp(mesh, config.parallel.rules),
    )
    run = execute_pmap(step, mesh, "batch") if pmap else execute_jit(step, mesh, sharding)
    state = run.place(jax.jit(create, out_shardings=sharding)())
    losses = []
    for t in range(steps):
        state, metrics = run.step(state, run.put(rows.batch(t)))
        losses.append(float(metrics["loss"]))
    return np.array(losses), run.whole(state), sharding
