"""Dual encoders: a query and a document become one vector each, relevance is their product.

The vector is the last hidden state of the first token: no projection, no normalization, no tanh.
Official counterpart: `BiBertEncoder` of microsoft/SimXNS@0163380c69533be0112142ee6ba25f43bc9246bc,
CAPSTONE/models/modules.py, whose checkpoints have the prefixes `question_model.` and `ctx_model.`.
Axis names: B queries, D documents, L tokens, H width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.interop import conversion
from jaxmodels.language import bert
from jaxmodels.language.bert import Bert, EncoderFields


class DualEncoder(EncoderFields):
    """(queries, documents) -> vectors [B, H], [D, H]; the towers share weights or do not.

    The fields are those of one tower (`jaxmodels.language.bert.EncoderFields`). A shared tower
    lives under `question_model`; checkpoints hold it under both prefixes, which must agree.

    Rows that are all padding raise ValueError outside of `jit`; inside they become zero vectors.
    """

    share_weight: bool = False

    def setup(self):
        self.question_model = Bert(**self.encoder_fields())
        if not self.share_weight:
            self.ctx_model = Bert(**self.encoder_fields())

    def __call__(
        self, query_ids, query_mask=None, document_ids=None, document_mask=None, train=False
    ):
        """Vectors of queries [B, L] and documents [D, L']; masks default to `ids != 0`."""
        queries = self.encode_queries(query_ids, query_mask, train)
        if document_ids is None:
            document_ids, document_mask = query_ids, query_mask
        return queries, self.encode_documents(document_ids, document_mask, train)

    def encode_queries(self, ids, mask=None, train: bool = False) -> jax.Array:
        """Vectors [B, H] of ids [B, L]."""
        return self._vectors(self.question_model, ids, mask, train)

    def encode_documents(self, ids, mask=None, train: bool = False) -> jax.Array:
        """Vectors [D, H] of ids [D, L]."""
        return self._vectors(self._documents, ids, mask, train)

    def query_states(self, ids, mask=None, train: bool = False) -> tuple[jax.Array, ...]:
        """Hidden states [B, L, H] of the embeddings and of every block for queries."""
        mask = ids != self.pad_token_id if mask is None else mask
        return self.question_model.hidden_states(ids, mask, train=train)

    def document_states(self, ids, mask=None, train: bool = False) -> tuple[jax.Array, ...]:
        """Hidden states [D, L, H] of the embeddings and of every block for documents."""
        mask = ids != self.pad_token_id if mask is None else mask
        return self._documents.hidden_states(ids, mask, train=train)

    @property
    def _documents(self) -> Bert:
        return self.question_model if self.share_weight else self.ctx_model

    def _vectors(self, tower, ids, mask, train):
        mask = ids != self.pad_token_id if mask is None else mask
        first = tower(ids, mask, train=train)[:, 0]
        return jnp.where(jnp.asarray(mask).any(-1, keepdims=True), first, 0)

    def example_inputs(self) -> tuple:
        """Shapes for initialization."""
        ids = jax.ShapeDtypeStruct((1, min(8, self.max_position_embeddings)), jnp.int32)
        return ids, ids, ids, ids


def in_chunks(
    encode: Callable[..., jax.Array], chunks: int, *arrays: jax.Array, rng: jax.Array | None = None
) -> jax.Array:
    """`encode(*arrays, rng)` in `chunks` parts, of which only one at a time holds activations.

    The backward pass encodes every chunk again and sends it its part of the gradient, so memory is
    that of one chunk and the vectors, whatever the batch (gradient caching, Gao et al., 2021).

    Args:
      encode: `(*rows, rng) -> vectors [n, H]`, a function of parameters it closes over.
      chunks: how many; must divide the rows. 1 calls `encode` itself.
      arrays: [R, ...]; a chunk takes every `chunks`-th row, so that each device keeps its rows.
      rng: split over the chunks, None for none.

    Returns: vectors [R, H] in the order of the rows.

    Raises ValueError when `chunks` does not divide R.
    """
    rows = arrays[0].shape[0]
    if chunks < 1 or rows % chunks:
        raise ValueError(f"{rows} rows do not divide into {chunks} chunks")
    if chunks == 1:
        return encode(*arrays, rng)
    parts = [jnp.swapaxes(x.reshape(-1, chunks, *x.shape[1:]), 0, 1) for x in arrays]
    rngs = None if rng is None else jax.random.split(rng, chunks)

    @jax.checkpoint
    def one(args):
        rows, rng = args
        return encode(*rows, rng)

    vectors = jax.lax.map(one, (tuple(parts), rngs))
    return jnp.swapaxes(vectors, 0, 1).reshape(rows, *vectors.shape[2:])


def torch_rules(module: DualEncoder) -> dict[str, Any]:
    """BERT's rules for both prefixes; a shared tower is tied under both."""
    rules = bert.torch_rules(module)
    if module.share_weight:
        tower = Bert(**module.encoder_fields())
        shapes = jax.eval_shape(tower.init, jax.random.key(0), *tower.example_inputs())
        keys = [e.key for e in conversion.entries(shapes)]
        rules["aliases"] = {f"ctx_model.{key}": f"question_model.{key}" for key in keys}
    return rules


TORCH_RULES = torch_rules
MODEL = DualEncoder
VARIANTS = bert.VARIANTS
