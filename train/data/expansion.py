"""Training examples of CAPSTONE: a query, its positive and hard negatives, each expanded.

`ExpandedExamples` is the transform that every retrieval family shares; what differs between
families is where texts and ranks come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def hard_negatives(negatives: Sequence[int], count: int) -> list[int]:
    """The first `count` negatives; fewer are repeated cyclically. Raises ValueError for none."""
    if count and not len(negatives):
        raise ValueError("a query without hard negatives")
    return [negatives[i % len(negatives)] for i in range(count)]


def shuffled_negatives(rng: np.random.Generator, negatives: Sequence[int], count: int) -> list[int]:
    """`hard_negatives` of a new order, as every visit in training draws one."""
    return hard_negatives(rng.permutation(np.asarray(negatives, np.int64)).tolist(), count)
