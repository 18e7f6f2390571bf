"""Scores of sub-networks by a trained supernet, many a call, compiled once.

`Scorer` counts its traces: a search that recompiles for its candidates is a defect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxmodels.search import scalenet_sampling
from train.data import pipeline


class HeldOut:
    """The batches of a split, `(images [B, H, W, C], labels [B], mask [B])`, as often as asked.

    A split of up to `keep` bytes is read once and stays on the device; a larger one is read anew
    every time. Rows whose mask is 0 fill up the last batch.

    Args:
      data: `config.data`. batch_size: B; 0 is the whole split.
    """

    def __init__(self, data, split: str, batch_size: int = 0, keep: int = 1 << 30):
        self._data, self._split = data, split
        self.rows = pipeline.split_sizes(data)[split]
        self._size = min(batch_size or self.rows, self.rows)
        image = pipeline.element_spec(data)["image"]
        self._keeps = self.rows * int(np.prod(image.shape)) * image.dtype.itemsize <= keep
        self._kept: list[tuple] | None = None

    def __iter__(self):
        if self._kept is not None:
            return iter(self._kept)
        batches = pipeline.eval_batches(self._data, self._split, batch_size=self._size)
        read = (jax.device_put((b["image"], b["label"], b["mask"])) for b in batches)
        if not self._keeps:
            return read
        self._kept = list(read)
        return iter(self._kept)


class Scorer:
    """Top-1 accuracy in % on held-out images of candidates given as arrays.

    Args:
      hits: `(variables, images, label, mask, *candidate) -> number of right rows`, pure.
      variables: of the supernet.
      batches: `HeldOut`, or any iterable of `(images, label, mask)` of one shape.
      chunk: candidates of one call; the last call is padded to it.
      together: candidates computed side by side (`vmap`); 1 runs one after the other, where a
        branch of an op that nobody chose costs nothing.
    """

    def __init__(self, hits, variables, batches, chunk: int = 16, together: int = 1):
        self.traces = 0
        self.scored = 0
        self._chunk = chunk
        self._variables, self._batches = jax.device_put(variables), batches

        def many(variables, batch, candidates):
            self.traces += 1

            def one(candidate):
                return hits(variables, *batch, *candidate)

            return jax.lax.map(one, candidates, batch_size=together if together > 1 else None)

        self._many = jax.jit(many)

    def __call__(self, *columns: Any) -> np.ndarray:
        """Accuracies in %, float64 [N], of columns [N, ...] of candidates."""
        count = len(columns[0])
        padded = -(-count // self._chunk) * self._chunk
        columns = [np.asarray(c)[np.arange(padded) % count] for c in columns]
        found, rows = np.zeros(padded), 0.0
        for batch in self._batches:
            rows += float(np.asarray(batch[2]).sum())
            parts = [
                self._many(self._variables, batch, tuple(c[i : i + self._chunk] for c in columns))
                for i in range(0, padded, self._chunk)
            ]
            found += np.concatenate(jax.device_get(parts)).astype(np.float64)
        self.scored += count
        return 100 * found[:count] / rows


def scalenet_scorer(
    task, variables, data, split: str = "minival", batch_size: int = 0, **options
) -> Scorer:
    """Scores `(ops [N, L], number of the width, number of the resolution)` of a super-supernet.

    Every batch has its own statistics, so that `batch_size` is part of the score.
    """
    return Scorer(task.hits, variables, HeldOut(data, split, batch_size), **options)


def network_scores(task, scorer: Scorer, networks: Sequence) -> np.ndarray:
    """Accuracies of `(ops, width, resolution)` encodings, as `mcea.Problem.score` wants them."""
    space, t = task.model.space, task.tables
    length = len(space.blocks)
    rows = [scalenet_sampling.encode(t, ops[:length], w, r) for ops, w, r in networks]
    ops, widths, sizes = zip(*rows)
    return scorer(np.array(ops, np.int32), np.array(widths), np.array(sizes))


def vitas_scorer(
    task, variables, data, split: str = "minival", batch_size: int = 0, **options
) -> Scorer:
    """Scores genomes [N, genes] of a superformer; the sides' accuracies are averaged."""
    return Scorer(task.hits, variables, HeldOut(data, split, batch_size), **options)
