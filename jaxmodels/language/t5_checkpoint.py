"""HF's T5 files: tied copies of the embedding, what does not fit, rows for added tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """Tied copies of the embedding, and a table that old files carry and never use."""
    if not getattr(module, "has_decoder", True):
        aliases = {"encoder.embed_tokens.weight": "shared.weight"}
        return {"aliases": aliases, "drops": [r"decoder\..*", r"lm_head\.weight"]}
    aliases = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }
    if getattr(module, "tie_word_embeddings", False):
        aliases["lm_head.weight"] = "shared.weight"
    return {
        "aliases": aliases,
        "drops": [r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"],
    }


def check_checkpoint(keys: Iterable[str], module: nn.Module) -> None:
    """Refuse a file without `lm_head` for an untied model, and v1.1 files for a v1.0 model."""
    keys = list(keys)
    if not any(key.endswith("SelfAttention.q.weight") for key in keys):
        return  # something else altogether: the list of missing entries says so
    head = any(key.endswith("lm_head.weight") for key in keys)
    whole = getattr(module, "has_decoder", True)
    if whole and not getattr(module, "tie_word_embeddings", True) and not head:
        raise ValueError(
            "the checkpoint has no lm_head.weight: its output matrix is shared.weight; "
            "load it with tie_word_embeddings=True"
        )
    gated = any(key.endswith("DenseReluDense.wi_0.weight") for key in keys)
    wanted = getattr(module, "feed_forward_proj", "").startswith("gated-")
    if gated != wanted:
        raise ValueError(
            f"the checkpoint's feed-forward layers are {'' if gated else 'not '}gated; "
            f"feed_forward_proj {module.feed_forward_proj!r} does not fit"
        )


def upgrade_checkpoint(state: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """With `resize_checkpoint`, a tied state dict with rows for tokens that a vocabulary gained.

    New rows are N(0, 1), as transformers' `resize_token_embeddings` leaves them, and the same in
    every tied copy (CodeT5 to CoditT5: 32,100 to 32,124).

    Raises ValueError with both sizes where rows are missing and are not asked for, or the model is
    untied.
    """
    names = re.compile(r"(^|\.)(shared|(en|de)coder\.embed_tokens|lm_head)\.weight$")
    wanted = getattr(module, "vocab_size", 0)
    short = {k: v for k, v in state.items() if names.search(k) and len(v) < wanted}
    if not short:
        return state
    key, table = next(iter(short.items()))
    if not (getattr(module, "resize_checkpoint", False) and module.tie_word_embeddings):
        raise ValueError(
            f"{key} has {len(table)} rows, vocab_size is {wanted}; resize_checkpoint=True gives a "
            "tied model's file rows for added tokens"
        )
    new = np.random.default_rng(0).standard_normal((wanted - len(table), table.shape[1]))
    return {
        k: np.concatenate([v, new.astype(np.asarray(v).dtype)]) if k in short else v
        for k, v in state.items()
    }
