"""Dual encoders on queries, positives and hard negatives: in-batch negatives over all devices."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.retrieval import capstone, losses
from jaxmodels.retrieval.dual_encoder import in_chunks
from jaxmodels.retrieval.index import ExactIndex
from train.building import build_model
from train.data import pipeline
from train.encoding import Encoder, each_view, mean_view
from train.naming import ConfigError
from train.tasks.ranking import check_vocabulary

DEPTH = 1000


@dataclasses.dataclass(frozen=True)
class DenseRetrieval:
    """`-log softmax(q d^T)` over all documents of the batch, wherever they were encoded.

    Attributes:
      model: a dual encoder. scale: factor of the products (1 as published).
      chunks: parts in which queries and documents are encoded, one at a time in memory.
      axis_name: the mapped axis under `pmap`; gather_gradient: see `losses.gather`.
    """

    model: nn.Module
    scale: float = 1.0
    chunks: int = 1
    axis_name: str | None = None
    gather_gradient: str = "true"

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Parameters; shapes do not depend on the batch."""
        ids = jnp.ones((1, 4), jnp.int32)
        del batch
        variables = self.model.init(rng, ids, None, ids)
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def vectors(self, params, extra, batch, rng=None) -> tuple[jax.Array, jax.Array]:
        """Vectors of `query_ids` [B, Lq] and `doc_ids` [B, N, Ld]: [B, H] and [B * N, H]."""
        keys = (None, None) if rng is None else jax.random.split(rng)

        def encode(method, ids, key):
            rows = ids.reshape(-1, ids.shape[-1])
            vectors = self.model.apply(
                {"params": params, **extra},
                rows,
                None,
                key is not None,
                method=method,
                rngs=None if key is None else {"dropout": key},
            )
            return vectors.reshape(*ids.shape[:-1], -1)

        queries, documents = (
            in_chunks(functools.partial(encode, method), self.chunks, batch[name], rng=key)
            for method, name, key in (
                ("encode_queries", "query_ids", keys[0]),
                ("encode_documents", "doc_ids", keys[1]),
            )
        )
        return queries, documents.reshape(-1, documents.shape[-1])

    def loss(self, params, extra, batch, rng):
        """In-batch loss and the share of queries whose positive scores best."""
        queries, documents = self.vectors(params, extra, batch, rng)
        if self.axis_name is not None:
            queries, documents = (
                losses.gather(x, self.axis_name, self.gather_gradient) for x in (queries, documents)
            )
        loss, hits = losses.in_batch_nll(queries, documents, scales=(self.scale, 1.0))
        return loss, (extra, {"accuracy": hits / len(queries)})

    def measure(self, variables, config, mesh) -> dict[str, float]:
        """Exact search of a split's queries over the whole collection, by trec_eval's rules."""
        family, options = pipeline.resolve(config.data)
        split = config.eval.split or pipeline.eval_split(config.data)
        found = family.retrieval_set(options, split)
        scores, rows = self.search(variables, config, mesh, found, options)
        return found.measure(rows, scores)

    def search(self, variables, config, mesh, found, options, depth: int = DEPTH):
        """(scores, rows) of the best documents of a `RetrievalSet`'s queries."""
        size = config.eval.batch_size or config.batch_size
        queries = self.encoder(variables, "encode_queries", options["query_length"], size, mesh)
        documents = self.encoder(
            variables, "encode_documents", options["document_length"], size, mesh
        )
        depth = min(depth, len(found.document_ids))
        rows = range(len(found.document_ids))
        asked = queries(found.query_rows)
        if options.get("view_reduce", "mean") == "max":
            vectors = each_view(documents, found.document_row, rows, found.views)
            return capstone.search_views(asked, vectors, depth, "max")
        index = ExactIndex()
        index.add(mean_view(documents, found.document_row, rows, found.views))
        return index.search(asked, depth)

    def encoder(self, variables, method: str, longest: int, batch_size: int, mesh) -> Encoder:
        """Vectors of rows of token ids, by one of the towers."""
        apply = functools.partial(self.model.apply, method=method)
        return Encoder(lambda v, ids: apply(v, ids), variables, longest, batch_size, mesh)

    def report(self, variables, sums, config):
        """BM25 on the same queries and documents, and how the pseudo queries' parts differ."""
        del variables, sums
        family, options = pipeline.resolve(config.data)
        split = config.eval.split or pipeline.eval_split(config.data)
        numbers = family.retrieval_set(options, split).baseline()
        gradual = str(options.get("expansion", "")).startswith("gradual")
        if gradual and hasattr(family, "relevance_spread"):
            for part, (mean, low, high) in enumerate(family.relevance_spread(options), 1):
                numbers[f"rouge_part_{part}"] = mean
                numbers[f"rouge_part_{part}_range"] = f"{low:.3f} to {high:.3f}"
        return numbers

    def predict(self, variables, path, config):
        """Best ten documents for every line of a file of queries: rows (query, rank, id, score)."""
        family, options = pipeline.resolve(config.data)
        if not hasattr(family, "query_row"):
            raise ConfigError(f"config.data.name {config.data.name}: no collection to search")
        with open(path, encoding="utf-8") as file:
            texts = [line.strip() for line in file if line.strip()]
        split = pipeline.eval_split(config.data)
        found = dataclasses.replace(
            family.retrieval_set(options, split),
            query_ids=texts,
            query_rows=[family.query_row(t, options) for t in texts],
        )
        scores, rows = self.search(variables, config, None, found, options, 10)
        table = [("query", "rank", "document", "score")]
        for text, values, best in zip(texts, scores, rows):
            table += [
                (text, rank, found.document_ids[row], float(value))
                for rank, (value, row) in enumerate(zip(values, best), 1)
                if row >= 0
            ]
        return table


def from_config(config) -> DenseRetrieval:
    """The task of a config: its model and `task_args`."""
    args = dict(config.task_args)
    if config.parallel.mode == "pmap":
        args.setdefault("axis_name", "batch")
    gradient = args.get("gather_gradient", "true")
    if gradient not in losses.GATHER_GRADIENTS:
        raise ConfigError(
            f"config.task_args.gather_gradient: {gradient!r}; known: "
            f"{', '.join(losses.GATHER_GRADIENTS)}"
        )
    if not args.get("scale", 1.0) > 0:
        raise ConfigError(f"config.task_args.scale: must be positive, not {args['scale']}")
    model = build_model(config)
    check_vocabulary(config, model)
    return DenseRetrieval(model=model, **args)
