"""Retrievers and rerankers from the state dict of one pre-trained encoder.

PROD's students and teachers begin as a BERT-family encoder: a student of n blocks takes the
embeddings, the pooler and blocks 0..n-1 of its parent, both towers of a dual encoder the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxmodels.language.bert import EncoderFields, first_blocks
from jaxmodels.retrieval.cross_encoder import CrossEncoder
from jaxmodels.retrieval.dual_encoder import DualEncoder

_TOWERS = ("question_model.", "ctx_model.")
_HEADS_OF_PRETRAINING = re.compile(r"(cls|vocab_transform|vocab_layer_norm|vocab_projector)\.")


def is_single_encoder(state: Mapping[str, Any]) -> bool:
    """Whether a state dict is one encoder's (`BertModel`), rather than a retriever's."""
    return not any(key.startswith((*_TOWERS, "encoder.embeddings.")) for key in state)


def prepare_state(state: Mapping[str, Any], module: EncoderFields) -> dict[str, Any]:
    """A parent's state dict as `module` wants it: its first blocks, under the module's prefixes.

    A retriever's own checkpoint keeps its names and only loses the blocks that the module has not.

    Raises ValueError when the parent has fewer blocks than the module.
    """
    state = first_blocks(state, module.num_hidden_layers)
    if not is_single_encoder(state):
        return state
    bare = {
        re.sub(r"^(bert|distilbert|ernie|roberta)\.", "", key): value
        for key, value in state.items()
        if not _HEADS_OF_PRETRAINING.match(key)
    }
    prefixes: tuple[str, ...] = ("",)
    if isinstance(module, CrossEncoder):
        prefixes = ("encoder.",)
    elif isinstance(module, DualEncoder):
        prefixes = _TOWERS[:1] if module.share_weight else _TOWERS
    return {f"{prefix}{key}": value for prefix in prefixes for key, value in bare.items()}
