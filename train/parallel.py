"""Devices: the mesh, where parameters and batches live, and processes that work together."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmodels.layers.partitioning import ROW_AXES
from train.naming import ConfigError
from train.optimizers import path_string

AXES = ("data", "fsdp", "model")
# Arrays smaller than this are not worth a collective.
SMALLEST_SHARDED = 2**12


def start_processes(config) -> None:
    """Join the other processes of this run: explicit coordinator, or a TPU pod's own metadata."""
    if config.coordinator:
        if jax.config.jax_platforms == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            jax.distributed.initialize(
                config.coordinator,
                config.num_processes,
                config.process_id,
                initialization_timeout=config.start_timeout,
            )
        except Exception as error:
            raise ConfigError(
                f"config.parallel.coordinator: process {config.process_id} of "
                f"{config.num_processes} could not join {config.coordinator} within "
                f"{config.start_timeout} s ({str(error).splitlines()[0]})"
            ) from None
    elif "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize(initialization_timeout=config.start_timeout)


def make_mesh(config, devices=None) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `model`; one of the sizes may be -1: what is left."""
    devices = np.asarray(jax.devices() if devices is None else devices)
    sizes = [int(config.data), int(config.fsdp), int(config.model)]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ConfigError(
            f"config.parallel: axis sizes {dict(zip(AXES, sizes))}; at most one may be -1"
        )
    known = int(np.prod([s for s in sizes if s > 0]))
    if -1 in sizes:
        if devices.size % known:
            raise ConfigError(
                f"config.parallel: {devices.size} devices do not divide by {known} "
                f"({dict(zip(AXES, sizes))})"
            )
        sizes[sizes.index(-1)] = devices.size // known
    elif known > devices.size:
        raise ConfigError(
            f"config.parallel: {dict(zip(AXES, sizes))} needs {known} devices; "
            f"there are {devices.size}"
        )
    devices = devices.reshape(-1)[: int(np.prod(sizes))].reshape(sizes)
    check_processes(devices, jax.process_count())
    return Mesh(devices, AXES)


def check_processes(devices: np.ndarray, count: int) -> None:
    """Refuse a mesh [data, fsdp, model] in which processes would have to read each other's rows.

    Every process reads rows of its own: devices along `model`, which work on the same rows, must
    belong to one process, and every process needs a device.
    """
    if count == 1:
        return
    owners = [{d.process_index for d in row} for row in devices.reshape(-1, devices.shape[-1])]
    if any(len(o) > 1 for o in owners):
        raise ConfigError(
            f"config.parallel.model: {devices.shape[-1]} devices that share rows belong to several "
            "processes, which read different rows; it must divide the devices of one process"
        )
    idle = set(range(count)) - set().union(*owners)
    if idle:
        raise ConfigError(
            f"config.parallel: {dict(zip(AXES, devices.shape))} leaves process "
            f"{', '.join(map(str, sorted(idle)))} of {count} without a device"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp` together."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Refuse a batch that the mesh cannot share evenly, before anything is compiled."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"] * accumulate
    if batch_size < 1 or batch_size % rows:
        raise ConfigError(
            f"config.batch_size: {batch_size} does not divide by {rows} (data {mesh.shape['data']} "
            f"x fsdp {mesh.shape['fsdp']} x accumulate {accumulate}); "
            f"try {max(rows, batch_size // rows * rows)}"
        )


def leaf_spec(path: str, shape, mesh: Mesh, rules=()) -> PartitionSpec:
    """Where an array lives: `model` by the first matching rule, `fsdp` on the largest free axis."""
    axes: list[str | None] = [None] * len(shape)
    if mesh.shape["model"] > 1:
        for pattern, dimension in rules:
            if re.search(pattern, path) and -len(shape) <= dimension < len(shape):
                if shape[dimension] % mesh.shape["model"] == 0:
                    axes[dimension] = "model"
                break
    if mesh.shape["fsdp"] > 1 and np.prod(shape, dtype=np.int64) >= SMALLEST_SHARDED:
        free = [i for i, a in enumerate(axes) if a is None and shape[i] % mesh.shape["fsdp"] == 0]
        if free:
            axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*axes)


def state_sharding(state, mesh: Mesh, rules=()):
    """A `NamedSharding` for every leaf of a state (arrays or shapes)."""

    def place(path, leaf):
        shape = () if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.shape
        return NamedSharding(mesh, leaf_spec(path_string(path), shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(place, state)


def gather_over_fsdp(mesh: Mesh, rules=()) -> Callable:
    """Parameters brought together over `fsdp` where they are used, one array at a time.

    Without it XLA may keep weights sharded and all-reduce full-batch activations instead.
    """
    if mesh.shape["fsdp"] == 1:
        return lambda params: params

    def gather(params):
        def place(path, leaf):
            # The path of the state's own leaf, so that a rule matches here what it matches there.
            spec = leaf_spec("params." + path_string(path), leaf.shape, mesh, rules)
            whole = PartitionSpec(*(None if a == "fsdp" else a for a in spec))
            return _forth_and_back(leaf, NamedSharding(mesh, whole), NamedSharding(mesh, spec))

        return jax.tree_util.tree_map_with_path(place, params)

    return gather


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _forth_and_back(x, there: NamedSharding, here: NamedSharding):
    """x in the sharding `there`, its gradient in `here`.

    A constraint alone would give both the same, and every device the whole gradient.
    """
    return jax.lax.with_sharding_constraint(x, there)


def _forth(x, there, here):
    return _forth_and_back(x, there, here), None


def _back(there, here, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, here),)


_forth_and_back.defvjp(_forth, _back)


def global_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding):
    """Put this process's rows on its devices as its part of the global batch."""
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def any_process(flag: bool) -> bool:
    """True where any process says so; every process must call it at the same step."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def local_copy(tree, mesh: Mesh):
    """Host arrays of a tree on this process, wherever the tree is sharded; every process calls it.

    For evaluations in which each process computes on its own.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    whole = jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), whole)
