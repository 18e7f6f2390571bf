"""Exact inner-product search: document vectors stream by, a running best-k stays.

Results are ordered by score, ties by the smaller document row, as `jax.lax.top_k` has it. Scores
are float32 products at the highest precision of the device: the default of a TPU (bfloat16) and of
a GPU (TF32) changes the order of near neighbors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_LARGEST_ROW = 2**31 - 1


class VectorIndex(Protocol):
    """What search wants of an index: ours, faiss, or a user's own."""

    def add(self, vectors: np.ndarray, ids: Sequence[int] | None = None) -> None:
        """Append vectors [n, H]; `ids` int64 [n] default to running row numbers."""

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores float32, ids int64), both [Q, k], best first; -inf and -1 beyond the corpus."""


class ExactIndex:
    """Exact search over any number of document vectors, in blocks over all local devices.

    Args:
      chunk: documents scored at a time, over all devices together.
      query_chunk: queries scored at a time.
      devices: default all local devices; each scores its part of a block and keeps its own best.
      approximate: None, or the recall target of `jax.lax.approx_max_k` (a TPU's fast top-k).

    Arrays are kept as they are given (memory-mapped files stay on disk) and reach a device one
    block at a time: neither the corpus nor the matrix of all scores need fit.
    """

    def __init__(
        self,
        *,
        chunk: int = 16384,
        query_chunk: int = 1024,
        devices: Sequence[jax.Device] | None = None,
        approximate: float | None = None,
    ):
        if chunk < 1 or query_chunk < 1:
            raise ValueError(f"chunk {chunk} and query_chunk {query_chunk}: at least 1")
        devices = list(jax.local_devices() if devices is None else devices)
        self._mesh = Mesh(np.array(devices), ("documents",))
        self._chunk, self._query_chunk = -(-chunk // len(devices)) * len(devices), query_chunk
        self._approximate = approximate
        self._parts: list[tuple[np.ndarray, np.ndarray | None]] = []

    def __len__(self) -> int:
        return sum(len(vectors) for vectors, _ in self._parts)

    def add(self, vectors: np.ndarray, ids: Sequence[int] | None = None) -> None:
        """Append document vectors [n, H]; `ids` int64 [n] default to running row numbers.

        Raises ValueError for another width than before, another number of ids, and an id that the
        index has already.
        """
        if np.ndim(vectors) != 2:
            raise ValueError(f"document vectors {np.shape(vectors)}: wanted [n, H]")
        if self._parts and vectors.shape[1] != self._parts[0][0].shape[1]:
            raise ValueError(
                f"vectors of width {vectors.shape[1]} in an index of width "
                f"{self._parts[0][0].shape[1]}"
            )
        if len(self) + len(vectors) > _LARGEST_ROW:
            raise ValueError(f"more than {_LARGEST_ROW} documents in one index")
        if ids is not None and len(ids) != len(vectors):
            raise ValueError(f"{len(ids)} ids for {len(vectors)} vectors")
        if ids is not None:
            ids = np.asarray(ids, np.int64)
            _check_new(ids, [known for _, known in self._parts if known is not None])
        if len(vectors):
            self._parts.append((vectors, ids))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores float32, ids int64) [Q, k]; -inf and -1 where k exceeds the documents.

        Raises ValueError for k < 1, an empty index, or queries of another width.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        if not self._parts:
            raise ValueError("the index is empty")
        width = self._parts[0][0].shape[1]
        if np.ndim(queries) != 2 or queries.shape[1] != width:
            raise ValueError(f"queries {np.shape(queries)} for documents of width {width}")
        queries = np.asarray(queries, np.float32)
        if not len(queries):
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
        size = min(self._query_chunk, len(queries))
        tiles = -(-len(queries) // size)
        padded = np.zeros((tiles * size, width), np.float32)
        padded[: len(queries)] = queries
        devices = self._mesh.size
        chunk = min(self._chunk, -(-len(self) // devices) * devices)
        step = _step(self._mesh, k, chunk, self._approximate)
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        by_rows = NamedSharding(self._mesh, PartitionSpec("documents"))
        asked = [jax.device_put(q, everywhere) for q in padded.reshape(tiles, size, width)]
        best = [
            jax.device_put(
                (np.full((size, k), -np.inf, np.float32), np.full((size, k), -1, np.int32)),
                everywhere,
            )
            for _ in asked
        ]
        row = 0
        for vectors, _ in self._parts:
            for start in range(0, len(vectors), chunk):
                block = np.asarray(vectors[start : start + chunk], np.float32)
                count = len(block)
                if count < chunk:
                    block = np.concatenate([block, np.zeros((chunk - count, width), np.float32)])
                block = jax.device_put(block, by_rows)
                bounds = np.array([row, count], np.int32)
                best = [step(q, block, bounds, *b) for q, b in zip(asked, best)]
                row += count
        scores, rows = (np.concatenate(jax.device_get(part)) for part in zip(*best))
        return scores[: len(queries)], self._ids(rows[: len(queries)].astype(np.int64))

    def _ids(self, rows: np.ndarray) -> np.ndarray:
        if all(ids is None for _, ids in self._parts):
            return rows
        table, start = [], 0
        for vectors, ids in self._parts:
            table.append(np.arange(start, start + len(vectors)) if ids is None else ids)
            start += len(vectors)
        return np.where(rows < 0, -1, np.concatenate(table)[rows])


def _check_new(ids: np.ndarray, before: Sequence[np.ndarray]) -> None:
    """Refuse an id [n] that comes twice, in `ids` or in the parts `before`."""
    values, counts = np.unique(ids, return_counts=True)
    twice = values[counts > 1]
    for known in before:
        twice = twice if twice.size else values[np.isin(values, known)]
    if twice.size:
        raise ValueError(f"document id {int(twice[0])} is in the index twice")


@functools.lru_cache(maxsize=32)
def _step(mesh: Mesh, k: int, chunk: int, approximate: float | None):
    """Compiled `(queries, block, (first row, real rows), best) -> best`."""
    own = chunk // mesh.size

    def largest(scores, count):
        if approximate is None:
            return jax.lax.top_k(scores, count)
        return jax.lax.approx_max_k(scores, count, recall_target=approximate)

    def local(queries, block, bounds, scores, rows):
        first = jax.lax.axis_index("documents") * own
        product = jnp.einsum(
            "qh,dh->qd",
            queries,
            block,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        place = first + jnp.arange(own, dtype=jnp.int32)
        product = jnp.where(place < bounds[1], product, -jnp.inf)
        values, found = largest(product, min(k, own))
        found = jnp.where(jnp.isneginf(values), -1, bounds[0] + first + found)
        if mesh.size > 1:
            # In the devices' order, which is that of the rows: ties stay with the smaller row.
            values = jax.lax.all_gather(values, "documents", axis=1, tiled=True)
            found = jax.lax.all_gather(found, "documents", axis=1, tiled=True)
        scores = jnp.concatenate([scores, values], 1)
        rows = jnp.concatenate([rows, found.astype(jnp.int32)], 1)
        values, places = jax.lax.top_k(scores, k)
        return values, jnp.take_along_axis(rows, places, -1)

    spec = PartitionSpec()
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(spec, PartitionSpec("documents"), spec, spec, spec),
        out_specs=(spec, spec),
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=(3, 4))


class FaissIndex:
    """An index of faiss (extra `retrieval`): flat, or any description `index_factory` knows.

    Ties have no defined order there. Raises ImportError naming the extra where faiss is missing.
    """

    def __init__(self, width: int, description: str = "Flat"):
        try:
            import faiss
        except ImportError:
            raise ImportError(
                "FaissIndex needs faiss: pip install -e '.[retrieval]' (or use ExactIndex)"
            ) from None
        self._index = faiss.index_factory(width, description, faiss.METRIC_INNER_PRODUCT)
        self._ids: list[np.ndarray] = []

    def __len__(self) -> int:
        return self._index.ntotal

    def add(self, vectors: np.ndarray, ids: Sequence[int] | None = None) -> None:
        """Append vectors [n, H] (training the index on the first ones where it must be)."""
        vectors = np.ascontiguousarray(vectors, np.float32)
        if not self._index.is_trained:
            self._index.train(vectors)
        start = len(self)
        self._index.add(vectors)
        given = np.arange(start, start + len(vectors)) if ids is None else np.asarray(ids, np.int64)
        self._ids.append(given)

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores float32, ids int64) [Q, k]; -inf and -1 beyond the corpus."""
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        scores, rows = self._index.search(np.ascontiguousarray(vectors, np.float32), k)
        scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
        return scores, np.where(rows < 0, -1, np.concatenate(self._ids)[rows])
