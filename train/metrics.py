"""Metrics that add up over batches, devices and processes: sums first, ratios last."""

from __future__ import annotations

import jax
import numpy as np


def merge(total: dict | None, sums: dict) -> dict:
    """Add two dictionaries of sums."""
    return sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)


def compute(sums: dict) -> dict[str, float]:
    """Every sum over the number of examples, `count`."""
    sums = jax.device_get(sums)
    count = max(float(sums["count"]), 1.0)
    return {k: float(np.asarray(v)) / count for k, v in sums.items() if k != "count"}
