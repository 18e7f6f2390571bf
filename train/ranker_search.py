"""What a trained ranker does with a collection: encode, search, rerank, and the measures of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxmodels.retrieval.index import ExactIndex
from train.building import build_model
from train.checkpoints import load_params
from train.data import judged_texts, pipeline, ranked_lists
from train.data.retrieval_set import RetrievalSet
from train.data.wordpiece import cross_row
from train.encoding import Encoder
from train.naming import ConfigError
from train.parallel import AXES
from train.tasks.ranking import kind_of

DEPTH = 1000
_BATCH = 128  # rows encoded at a time
_CHUNK = 16384  # rows of tokens held at a time


@dataclasses.dataclass(frozen=True)
class Ranker:
    """A model, its parameters, and how its texts become rows."""

    model: Any
    params: Any
    data: dict[str, Any]

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """The complete options of the data family."""
        return pipeline.resolve(self.data)[1]

    @functools.cached_property
    def texts(self) -> judged_texts.JudgedTexts:
        """The collection."""
        return judged_texts.read_collection(self.options["collection"], self.options["path"])

    @functools.cached_property
    def rows(self) -> ranked_lists.Rows:
        """Token rows of documents."""
        return ranked_lists.Rows(self.texts, ranked_lists.candidate_rows(self.options))

    def encoder(self, side: str) -> Encoder:
        """Vectors of token rows; `side` is queries | documents, or pairs: a cross encoder's [1].

        All devices of this process share the rows; others are not waited for.
        """
        query, document = (int(self.options[f"{k}_length"]) for k in ("query", "document"))
        longest = {"queries": query, "documents": document, "pairs": query + document}[side]
        mesh, variables = self._placed
        return Encoder(_encode(self.model, side), variables, longest, _BATCH, mesh)

    @functools.cached_property
    def _placed(self) -> tuple[Mesh, Any]:
        """The mesh of this process's devices, and the parameters on every one of them."""
        mesh = Mesh(np.array(jax.local_devices()).reshape(-1, 1, 1), AXES)
        variables = {"params": jax.device_get(self.params)}
        return mesh, jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))

    def retrieval_set(self, split: str) -> RetrievalSet:
        """The whole collection with a split's queries."""
        return ranked_lists.retrieval_set(self.options, split)


@functools.lru_cache(maxsize=32)
def _encode(model, side: str):
    if side == "pairs":
        return lambda variables, ids: model.apply(variables, ids[:, None])
    method = f"encode_{side}"
    return lambda variables, ids: model.apply(variables, ids, method=method)


def ranker_of_run(run: str | os.PathLike) -> Ranker:
    """The ranker that a run directory holds; of LEAD's and PROD's runs, the student."""
    file = Path(run) / "config.json"
    if not file.is_file():
        raise ConfigError(f"{run}: no config.json, so no run directory of ours")
    config = ConfigDict(json.loads(file.read_text(encoding="utf-8")))
    params = load_params(run, ema=True)["params"]
    return Ranker(build_model(config), params, config.data.to_dict())


def search(ranker: Ranker, queries: Sequence[Sequence[int]], depth: int) -> np.ndarray:
    """Rows of the `depth` best documents of the whole collection: int64 [Q, depth].

    Args:
      queries: token rows. depth: cut at the number of documents.

    Raises ConfigError for a model that is no dual encoder.
    """
    return _search(ranker, queries, depth)[1]


def _search(ranker: Ranker, queries: Sequence[Sequence[int]], depth: int):
    if kind_of(ranker.model) != "dual":
        raise ConfigError("search wants a dual encoder: a vector for a text")
    index, count = ExactIndex(), len(ranker.texts.document_ids)
    encoder = ranker.encoder("documents")
    # A part of the collection at a time: neither its tokens nor, on a device, its vectors fit.
    for start in range(0, count, _CHUNK):
        rows = range(start, min(start + _CHUNK, count))
        index.add(encoder([ranker.rows.document(d) for d in rows]))
    return index.search(ranker.encoder("queries")(list(queries)), min(depth, count))


def relevance(ranker: Ranker, queries: Sequence[Sequence[int]], ranking: np.ndarray) -> np.ndarray:
    """A cross encoder's logits of ranked documents, float32 [Q, K]; 0 at padding (-1).

    Raises ConfigError for another kind of model.
    """
    if kind_of(ranker.model) != "cross":
        raise ConfigError("reranking wants a cross encoder")
    places, encoder = np.argwhere(ranking >= 0), ranker.encoder("pairs")
    scores = np.zeros(ranking.shape, np.float32)
    for start in range(0, len(places), _CHUNK):
        part = places[start : start + _CHUNK]
        rows = [cross_row(queries[q], ranker.rows.document(int(ranking[q, k]))) for q, k in part]
        scores[tuple(part.T)] = encoder(rows)[:, 0]
    return scores


def evaluate_split(ranker: Ranker, split: str, depth: int = DEPTH) -> dict[str, float]:
    """Search the collection with a split's queries: `RetrievalSet.measure`."""
    found = ranker.retrieval_set(split)
    return found.measure(search(ranker, found.query_rows, depth))


def evaluation_split(texts: judged_texts.JudgedTexts) -> str:
    """The split that final numbers are of: `test` where there is one."""
    return "test" if "test" in texts.queries else "validation"


def report_of(model, params, config) -> dict[str, float]:
    """Final numbers of a dual encoder's run: measures on the test queries, BM25's beside them."""
    if config.data.name.split(":")[0] != "ranked_lists" or kind_of(model) != "dual":
        return {}
    ranker = Ranker(model, params, config.data.to_dict())
    split = evaluation_split(ranker.texts)
    if not any(ranker.texts.judgments[split].values()):
        return {}
    numbers = {f"{split}_{k}": v for k, v in evaluate_split(ranker, split).items()}
    if ranker.options["collection"] == "docstrings":
        numbers |= ranker.retrieval_set(split).baseline()
    return numbers


def predict_rows(model, params, path, config, depth: int = 10):
    """The best documents for every line of a file of queries: rows (query, rank, document, score).

    Raises ConfigError for a model that is no dual encoder.
    """
    ranker = Ranker(model, params, config.data.to_dict())
    with open(path, encoding="utf-8") as file:
        texts = [line.strip() for line in file if line.strip()]
    scores, rows = _search(ranker, [ranker.rows.rows.query(t) for t in texts], depth)
    table = [("query", "rank", "document", "score")]
    for text, values, best in zip(texts, scores, rows):
        table += [
            (text, rank, ranker.texts.document_ids[row], float(value))
            for rank, (value, row) in enumerate(zip(values, best), 1)
        ]
    return table
