"""Scores of sub-networks by a trained supernet, many a call, compiled once.

`Scorer` counts its traces: a search that recompiles for its candidates is a defect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.search import scalenet_sampling
from train.data import pipeline


def whole_split(data, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images [N, H, W, C] and labels [N] of a split, as evaluation sees them."""
    size = pipeline.split_sizes(data)[split]
    batch = next(iter(pipeline.eval_batches(data, split, batch_size=size)))
    return batch["image"], batch["label"]


class Scorer:
    """Top-1 accuracy in % on held-out images of candidates given as arrays.

    Args:
      hits: `(variables, images, label, *candidate) -> number of right rows`, pure.
      variables: of the supernet. images, label: held out, all in one batch.
      chunk: candidates of one call; the last call is padded to it.
      together: candidates computed side by side (`vmap`); 1 runs one after the other, where a
        branch of an op that nobody chose costs nothing.
    """

    def __init__(self, hits, variables, images, label, chunk: int = 16, together: int = 1):
        self.traces = 0
        self.scored = 0
        self._chunk = chunk
        self._fixed = jax.device_put((variables, jnp.asarray(images), jnp.asarray(label)))
        self._rows = len(label)

        def many(fixed, candidates):
            self.traces += 1

            def one(candidate):
                return hits(*fixed, *candidate)

            return jax.lax.map(one, candidates, batch_size=together if together > 1 else None)

        self._many = jax.jit(many)

    def __call__(self, *columns: Any) -> np.ndarray:
        """Accuracies in %, float64 [N], of columns [N, ...] of candidates."""
        count = len(columns[0])
        found = []
        for start in range(0, count, self._chunk):
            part = [np.asarray(c[start : start + self._chunk]) for c in columns]
            missing = self._chunk - len(part[0])
            part = [np.concatenate([p, np.repeat(p[:1], missing, axis=0)]) for p in part]
            found.append(np.asarray(self._many(self._fixed, tuple(part)))[: self._chunk - missing])
        self.scored += count
        return 100 * np.concatenate(found).astype(np.float64) / self._rows


def scalenet_scorer(task, variables, data, split: str = "minival", **options) -> Scorer:
    """Scores `(ops [N, L], number of the width, number of the resolution)` of a super-supernet."""

    def hits(variables, images, label, ops, width, resolution):
        logits = task.logits(variables, images, ops, width, resolution)
        return (logits.argmax(-1) == label).sum()

    return Scorer(hits, variables, *whole_split(data, split), **options)


def network_scores(task, scorer: Scorer, networks: Sequence) -> np.ndarray:
    """Accuracies of `(ops, width, resolution)` encodings, as `mcea.Problem.score` wants them."""
    space, t = task.model.space, task.tables
    length = len(space.blocks)
    rows = [scalenet_sampling.encode(t, ops[:length], w, r) for ops, w, r in networks]
    ops, widths, sizes = zip(*rows)
    return scorer(np.array(ops, np.int32), np.array(widths), np.array(sizes))


def vitas_scorer(task, variables, data, split: str = "minival", **options) -> Scorer:
    """Scores genomes [N, genes] of a superformer; the sides' accuracies are averaged."""

    def hits(variables, images, label, genome):
        return task.hits(variables, images, label, 1.0, genome)

    return Scorer(hits, variables, *whole_split(data, split), **options)
