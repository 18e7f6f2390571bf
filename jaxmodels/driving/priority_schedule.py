"""Which patches are looked at when: most urgent first, batches of one size, until the deadline."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Schedule(NamedTuple):
    """A plan for N patches.

    Attributes:
      finish_ms: when a patch's batch ends, -1 if it is not reached; float64 [N].
      batch_id: number of the batch, -1 if none; int64 [N].
      batches: (bucket, indices in order) of each batch.
    """

    finish_ms: np.ndarray
    batch_id: np.ndarray
    batches: list[tuple[int, np.ndarray]]


def batch_cost(bucket: int, batch: int, fixed_ms: float, per_crop_ms: Mapping[int, float]) -> float:
    """Milliseconds of a padded batch: `fixed + batch * per crop`."""
    return fixed_ms + batch * per_crop_ms[bucket]


def next_batch(order: Sequence[int], buckets: np.ndarray, batch: int) -> np.ndarray:
    """The head of `order` and the next patches of the same bucket, at most `batch` of them."""
    order = np.asarray(order, np.int64)
    same = buckets[order] == buckets[order[0]]
    return order[same][:batch]


def plan(
    order: Sequence[int],
    buckets: Sequence[int],
    cost: Callable[[int], float],
    *,
    batch: int = 8,
    deadline_ms: float = np.inf,
) -> Schedule:
    """Batches in order of urgency; stops before the batch that would end after the deadline.

    Args:
      order: indices of patches, the most urgent first.
      buckets: size of each patch [N]. cost: milliseconds of a batch of a bucket.
    """
    buckets = np.asarray(buckets)
    left = np.asarray(order, np.int64)
    finish, ids = np.full(len(buckets), -1.0), np.full(len(buckets), -1, np.int64)
    batches, now = [], 0.0
    while len(left):
        taken = next_batch(left, buckets, batch)
        bucket = int(buckets[taken[0]])
        end = now + cost(bucket)
        if end > deadline_ms:
            break
        now = end
        finish[taken], ids[taken] = now, len(batches)
        batches.append((bucket, taken))
        left = left[~np.isin(left, taken)]
    return Schedule(finish, ids, batches)


def warn_if_hopeless(deadline_ms: float, cheapest_ms: float) -> None:
    """Warns, once a place, when the deadline is shorter than the cheapest batch."""
    if deadline_ms < cheapest_ms:
        warnings.warn(
            f"deadline {deadline_ms:g} ms is shorter than the cheapest batch ({cheapest_ms:g} ms): "
            "every object is reported as unknown",
            stacklevel=3,
        )


def run(
    order: Sequence[int],
    buckets: Sequence[int],
    inspect: Callable[[int, np.ndarray], Any],
    cost: Callable[[int], float],
    *,
    batch: int = 8,
    deadline_ms: float = np.inf,
    clock: Callable[[], float] = time.perf_counter,
    started: float | None = None,
) -> tuple[Schedule, dict[int, Any]]:
    """The plan carried out against the clock.

    Args:
      inspect: (bucket, indices) -> results in the order of the indices, computed when it returns.
      cost: predicted milliseconds of a batch of a bucket.
      clock: seconds. started: the clock's value the deadline counts from, None for now.

    Returns: the schedule with measured `finish_ms`, and the result of each inspected patch.
    """
    buckets = np.asarray(buckets)
    left = np.asarray(order, np.int64)
    finish, ids = np.full(len(buckets), -1.0), np.full(len(buckets), -1, np.int64)
    batches: list[tuple[int, np.ndarray]] = []
    results: dict[int, Any] = {}
    started = clock() if started is None else started

    def elapsed() -> float:
        return (clock() - started) * 1e3

    if len(left):
        warn_if_hopeless(deadline_ms, min(cost(int(b)) for b in np.unique(buckets[left])))
    while len(left):
        taken = next_batch(left, buckets, batch)
        bucket = int(buckets[taken[0]])
        if elapsed() + cost(bucket) > deadline_ms:
            break
        for index, result in zip(taken, inspect(bucket, taken)):
            results[int(index)] = result
        finish[taken], ids[taken] = elapsed(), len(batches)
        batches.append((bucket, taken))
        left = left[~np.isin(left, taken)]
    return Schedule(finish, ids, batches), results


def priority_inversions(finish_ms: np.ndarray, order: Sequence[int]) -> int:
    """Pairs of which the more urgent patch finished strictly later; not inspected is last."""
    finish = np.asarray(finish_ms, np.float64)[np.asarray(order, np.int64)]
    finish = np.where(finish < 0, np.inf, finish)
    later = np.triu(np.ones((len(finish), len(finish)), bool), 1)
    return int(((finish[:, None] > finish[None]) & later).sum())
