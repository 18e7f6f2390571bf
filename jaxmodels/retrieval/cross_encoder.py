"""Cross encoder: a query and a document in one row of tokens, one relevance score.

Official counterpart: `Reranker` of microsoft/SimXNS@0163380c69533be0112142ee6ba25f43bc9246bc,
PROD/ProD_KD/model/models.py. Axis names: B queries, N documents of a query, L tokens, H width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.language import bert
from jaxmodels.language.bert import Bert, EncoderFields


class CrossEncoder(EncoderFields):
    """Token rows [B, N, L] -> relevance [B, N]; token types are all zero, as in the original.

    `binary_head` keeps the second head [H, 2] that PROD's checkpoints carry (it is trained with
    weight 0); LEAD's have none.
    """

    binary_head: bool = True

    def setup(self):
        self.encoder = Bert(**self.encoder_fields())
        self.qa_classifier = self.linear(None, 1)
        if self.binary_head:
            self.binary = self.linear(None, 2)

    def __call__(self, input_ids, attention_mask=None, train: bool = False) -> jax.Array:
        """Relevance [B, N]; the mask defaults to `ids != 0`."""
        return self.heads(input_ids, attention_mask, train)["relevance"]

    def heads(self, input_ids, attention_mask=None, train: bool = False) -> dict[str, jax.Array]:
        """`relevance` [B, N] and, where there is that head, `binary` [B, N, 2]."""
        first = self.states(input_ids, attention_mask, train)[-1]
        named = {"relevance": self.qa_classifier(first)[..., 0]}
        return {**named, "binary": self.binary(first)} if self.binary_head else named

    def layer_relevance(self, input_ids, attention_mask=None, train: bool = False) -> jax.Array:
        """The relevance head on the first token of every block, [layers, B, N]."""
        states = self.states(input_ids, attention_mask, train)[1:]
        return jnp.stack([self.qa_classifier(x)[..., 0] for x in states])

    def states(self, input_ids, attention_mask=None, train: bool = False) -> tuple:
        """First token's hidden state of the embeddings and of every block, n + 1 of [B, N, H]."""
        if input_ids.ndim != 3:
            raise ValueError(f"a cross encoder takes ids [B, N, L], not {input_ids.shape}")
        mask = input_ids != self.pad_token_id if attention_mask is None else attention_mask
        rows = input_ids.reshape(-1, input_ids.shape[-1])
        hidden = self.encoder.hidden_states(rows, mask.reshape(rows.shape), train=train)
        return tuple(x[:, 0].reshape(*input_ids.shape[:2], -1) for x in hidden)

    def example_inputs(self) -> tuple:
        """Shapes for initialization."""
        return (jax.ShapeDtypeStruct((1, 2, min(8, self.max_position_embeddings)), jnp.int32),)


def torch_rules(module: CrossEncoder) -> dict[str, Any]:
    """BERT's rules; a file of PROD loads into a model without that head."""
    rules = bert.torch_rules(module)
    if not module.binary_head:
        rules["travels"].append(r"binary\.(weight|bias)")
    return rules


TORCH_RULES = torch_rules
MODEL = CrossEncoder
VARIANTS = bert.VARIANTS
