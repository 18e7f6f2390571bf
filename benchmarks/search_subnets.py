"""Widths of a ScaleNet sub-network as plain numbers, for an interpreter that has no JAX."""

from __future__ import annotations

from typing import NamedTuple


class Subnet(NamedTuple):
    """Op, output width and hidden width of every block."""

    ops: list[int]
    outputs: list[int]
    hidden: list[int]


def subnet(space, ops, width: float) -> Subnet:
    """The numbers of op indices [genes] at a width multiplier."""
    blocks = list(zip(space.blocks, ops))
    return Subnet(
        [int(op) for _, op in blocks],
        [block.output_width(width) for block, _ in blocks],
        [block.hidden_width(int(op), width) for block, op in blocks],
    )
