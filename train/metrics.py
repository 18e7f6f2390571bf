"""Metrics that add up over batches, devices and processes: sums first, ratios last."""

from __future__ import annotations

import jax
import numpy as np


def merge(total: dict | None, sums: dict) -> dict:
    """Add two dictionaries of sums."""
    return sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)


def compute(sums: dict) -> dict[str, float]:
    """Every sum over the number of examples, `count`; `name|other` over the sum `other` instead.

    Sums that serve as denominators are not returned.
    """
    sums = jax.device_get(sums)
    below = {key.partition("|")[2] for key in sums if "|" in key} | {"count"}
    numbers = {}
    for key, value in sums.items():
        name, _, other = key.partition("|")
        if key not in below:
            numbers[name] = float(np.asarray(value)) / max(float(sums[other or "count"]), 1.0)
    return numbers
