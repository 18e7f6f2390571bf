"""Encoding a collection: rows of any length in a few static shapes, shards that can be resumed.

A shard is one `.npy` of vectors; it appears under its name only when it is whole, so that a killed
run goes on with the first shard that is not there. Process p of P writes shards p, p + P, ...
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.data.wordpiece import padded
from train.naming import ConfigError
from train.parallel import batch_sharding

MANIFEST = "manifest.json"


def buckets(longest: int, count: int = 4) -> tuple[int, ...]:
    """Row lengths to pad to: `longest` and its halves, eight at least."""
    lengths = {longest}
    for _ in range(count - 1):
        lengths.add(max(8, -(-min(lengths) // 2)))
    return tuple(sorted(n for n in lengths if n <= longest))


class Encoder:
    """Vectors of token rows with a model's parameters, over all devices of a mesh.

    Args:
      encode: `(variables, ids [B, L]) -> vectors [B, H]`; padding rows are all 0.
      longest: tokens of the longest row. batch_size: rows at a time, a multiple of the devices.

    Of several processes each encodes what it is given, on its own devices. One program is compiled
    for each bucket of lengths; the result of a row depends neither on the
    rows beside it nor on its bucket (to float rounding).
    """

    def __init__(self, encode: Callable, variables: Any, longest: int, batch_size: int, mesh=None):
        self._lengths = buckets(longest)
        self._variables, self._step, self._sharding = variables, jax.jit(encode), None
        self._batch = batch_size
        if mesh is None:
            return
        if mesh.is_multi_process:
            # Every process works on its own: what it encodes is its own affair.
            whole = jax.jit(lambda t: t, out_shardings=NamedSharding(mesh, PartitionSpec()))
            self._variables = jax.tree.map(
                lambda x: np.asarray(x.addressable_data(0)), whole(variables)
            )
            devices = np.array(jax.local_devices()).reshape(-1, 1, 1)
            mesh = Mesh(devices, mesh.axis_names)
        self._sharding = batch_sharding(mesh)
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batch = -(-batch_size // rows) * rows

    def __call__(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Vectors float32 [len(rows), H], in the order of the rows."""
        lengths = np.array([len(r) for r in rows])
        if len(rows) and lengths.max() > self._lengths[-1]:
            raise ValueError(f"a row of {lengths.max()} tokens; the longest is {self._lengths[-1]}")
        order = np.argsort(lengths, kind="stable")
        place = np.searchsorted(self._lengths, lengths[order])
        pending = []
        for bucket, length in enumerate(self._lengths):
            chosen = order[place == bucket]
            for start in range(0, len(chosen), self._batch):
                part = chosen[start : start + self._batch]
                ids = np.zeros((self._batch, length), np.int32)
                ids[: len(part)] = padded([rows[i] for i in part], length)
                vectors = self._step(self._variables, self._put(ids))
                pending.append((part, vectors))
        out = None
        for part, vectors in pending:
            host = np.asarray(jax.device_get(vectors), np.float32)
            if out is None:
                out = np.zeros((len(rows), host.shape[1]), np.float32)
            out[part] = host[: len(part)]
        return np.zeros((0, 0), np.float32) if out is None else out

    def _put(self, ids):
        return ids if self._sharding is None else jax.device_put(ids, self._sharding)


def mean_view(
    encoder: Encoder,
    row_of: Callable[[int, int], Sequence[int]],
    rows: Sequence[int],
    views: int,
    chunk: int = 16384,
) -> np.ndarray:
    """Mean vectors [n, H] of documents with `views` versions each.

    Only `chunk` documents' tokens are held at a time, and of the versions their running sum.
    """
    parts = []
    for start in range(0, len(rows), chunk):
        total = None
        for view in range(views):
            vectors = encoder([row_of(row, view) for row in rows[start : start + chunk]])
            total = vectors if total is None else total + vectors
        parts.append(total / np.float32(views))
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def each_view(
    encoder: Encoder, row_of: Callable[[int, int], Sequence[int]], rows: Sequence[int], views: int
) -> list[np.ndarray]:
    """Vectors [n, H] of every version, for the maximum over views."""
    return [
        mean_view(encoder, lambda row, _, view=view: row_of(row, view), rows, 1)
        for view in range(views)
    ]


def fingerprint(values: Mapping[str, Any]) -> str:
    """A short hash of what decides the vectors."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class ShardedVectors:
    """A folder of vectors `[n, H]` in shards of `shard_size` rows, written once each.

    Args:
      identity: what the vectors depend on (checkpoint, options); a folder of another identity is
        refused by name instead of being mixed.

    Raises ConfigError when the folder holds vectors of something else.
    """

    def __init__(self, folder: Path, count: int, shard_size: int, identity: Mapping[str, Any]):
        self.folder, self.count, self.shard_size = Path(folder), count, shard_size
        wanted = {"count": count, "shard_size": shard_size, "identity": fingerprint(identity)}
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / MANIFEST
        if file.is_file():
            found = json.loads(file.read_text())
            if any(found.get(k) != v for k, v in wanted.items()):
                raise ConfigError(
                    f"{self.folder} holds vectors of another checkpoint, collection or shard size; "
                    "choose another folder"
                )
        else:
            part = file.with_name(f"{MANIFEST}.part")
            part.write_text(json.dumps({**wanted, "of": identity}, indent=1, default=str) + "\n")
            part.replace(file)

    def __len__(self) -> int:
        return math.ceil(self.count / self.shard_size)

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"vectors-{shard:05d}-of-{len(self):05d}.npy"

    def missing(self, process: int = 0, processes: int = 1) -> list[int]:
        """Shards of this process that are not written yet."""
        return [s for s in range(process, len(self), processes) if not self.path(s).is_file()]

    def rows(self, shard: int) -> range:
        """Document rows of a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.count))

    def write(self, shard: int, vectors: np.ndarray) -> None:
        """Put a shard in place, whole."""
        part = self.path(shard).with_suffix(".part")
        with open(part, "wb") as file:
            np.save(file, np.ascontiguousarray(vectors, np.float32))
        part.replace(self.path(shard))

    def read(self) -> Iterator[np.ndarray]:
        """All shards in order, mapped from disk. Raises ConfigError while some are missing."""
        missing = self.missing()
        if missing:
            raise ConfigError(f"{self.folder}: {len(missing)} of {len(self)} shards are not there")
        return (np.load(self.path(s), mmap_mode="r") for s in range(len(self)))


def retrieve_keys():
    """`config.retrieve` of a retriever's config: what `python -m train.retrieve` reads."""
    from ml_collections import ConfigDict

    return ConfigDict(
        {
            "split": "",  # queries of the data set; "": config.eval.split
            "documents": "",  # a corpus file in place of the data set's documents
            "layout": "rocketqa",  # its columns: rocketqa | capstone | psgs | beir
            "pseudo_queries": "",  # its pseudo queries
            "queries": "",  # a file of queries
            "judgments": "",  # a file of judgments
            "answers": "",  # `question<tab>[answers]<tab>qid`: queries whose hits contain an answer
            "depth": 1000,
            "shard_size": 50_000,  # documents a shard
            "index": "exact",  # exact | faiss:DESCRIPTION
            "from_ranking": False,  # write minus the rank as the score
            "negatives": 0,  # write that many mined negatives a query
            "measures": "mrr@10,recall@50,recall@1000,success@10,ndcg@10,map,hole@10",
            "relevance_level": 1,
            "missing": "zero",  # judged queries that are not found: zero | skip
        }
    )
