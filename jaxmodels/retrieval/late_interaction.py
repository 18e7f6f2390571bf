"""Late interaction (ColBERT): every token keeps its vector, a query token takes its best partner.

Khattab and Zaharia, "ColBERT", SIGIR 2020, as LEAD and PROD use it for teachers: full width, no
projection, vectors of unit length for the final score.
Axis names: B queries, D documents, Q query tokens, L document tokens, H width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.language.bert import EncoderFields
from jaxmodels.retrieval import dual_encoder
from jaxmodels.retrieval.dual_encoder import DualEncoder

# What the original fills masked columns with, before the maximum.
MASKED_SCORE = -9e9


class LateInteraction(DualEncoder):
    """Token vectors of queries [B, Q, H] and documents [D, L, H], normalized to unit length."""

    share_weight: bool = True

    def encode_queries(self, ids, mask=None, train: bool = False) -> jax.Array:
        """Unit vectors [B, Q, H]; query padding takes part (it is [MASK] tokens)."""
        return unit(self.query_states(ids, mask, train)[-1])

    def encode_documents(self, ids, mask=None, train: bool = False) -> jax.Array:
        """Unit vectors [D, L, H]; hide padding with the mask given to `maxsim`."""
        return unit(self.document_states(ids, mask, train)[-1])


def unit(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
    """x / max(|x|, epsilon) over the last axis, PyTorch's `normalize`."""
    norm = jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), epsilon**2))
    return x / norm


def maxsim(queries: jax.Array, documents: jax.Array, mask: jax.Array) -> jax.Array:
    """sum over query tokens of the largest product with a real document token: [B, D].

    Products are accumulated, and summed, in float32 or wider.

    Args:
      queries: [B, Q, H]. documents: [D, L, H]. mask: bool or int [D, L], 1 on real tokens.

    Raises ValueError when the mask's shape is not [D, L].
    """
    if mask is None or mask.shape != documents.shape[:2]:
        raise ValueError(
            f"document mask {None if mask is None else mask.shape} for documents "
            f"{documents.shape}: wanted [D, L]"
        )
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    scores = jnp.einsum("bqh,dlh->bdql", queries, documents, preferred_element_type=wide)
    scores = jnp.where(mask[None, :, None, :].astype(bool), scores, MASKED_SCORE)
    # Under jit the gradient of `max` compares with a recomputed maximum; an index is exact.
    best = jax.lax.stop_gradient(scores).argmax(-1, keepdims=True)
    return jnp.take_along_axis(scores, best, -1)[..., 0].sum(-1)


def torch_rules(module: EncoderFields) -> dict[str, Any]:
    """The dual encoder's rules."""
    return dual_encoder.torch_rules(module)


TORCH_RULES = torch_rules
MODEL = LateInteraction
VARIANTS = dual_encoder.VARIANTS
