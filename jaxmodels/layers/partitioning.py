"""Where the rows of arrays live that a model or a step makes itself."""

from __future__ import annotations

from typing import TypeVar

import jax
from jax.sharding import PartitionSpec

Tree = TypeVar("Tree")
# The mesh axes that share a batch, or the nodes of a graph.
ROW_AXES = ("data", "fsdp")


def over_rows(tree: Tree) -> Tree:
    """The same arrays, their first dimension spread over the devices of `data` and `fsdp`.

    What depends on a batch is spread as the batch is. Random draws and whole graphs are not: XLA
    computes them, and whatever follows from them alone, on every device. The identity without a
    mesh of these axes in context (`train.step.execute_jit` sets it) and inside `shard_map` or
    `pmap`; rows need not divide by the devices.
    """
    return _placed(tree, PartitionSpec(ROW_AXES))


def everywhere(tree: Tree) -> Tree:
    """The same arrays, whole on every device: brought together once, before they are read out of
    order. The identity where `over_rows` is."""
    return _placed(tree, PartitionSpec())


def _placed(tree: Tree, spec: PartitionSpec) -> Tree:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(ROW_AXES) <= set(mesh.axis_names) - set(mesh.manual_axes):
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), tree)
