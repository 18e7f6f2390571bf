"""Folders as huggingface/transformers saves them: `config.json` beside the weights."""

from __future__ import annotations

import os
from typing import Any

import flax.linen as nn

from jaxmodels.interop import catalog, checkpoint
from jaxmodels.spelling import did_you_mean

# `model_type` of a config.json -> our model, whose module reads the rest of it.
MODELS = {
    "bert": "language.bert",
    "distilbert": "language.bert",
    "ernie": "language.bert",
    "mt5": "language.t5",
    "t5": "language.t5",
}


def load(folder: str | os.PathLike, **overrides: Any) -> tuple[nn.Module, dict[str, Any]]:
    """(module, variables) of a folder: whole or sharded safetensors, or `pytorch_model.bin`.

    The architecture is that of `config.json`; `overrides` go over it.

    Raises: `CheckpointError` for a folder that cannot be read or a model type that we do not have;
      `CheckpointMismatch` where tensors and config do not fit.
    """
    kind = catalog.read_config(folder).get("model_type", "")
    if kind not in MODELS:
        raise checkpoint.CheckpointError(
            f"{folder}: no model for model_type {kind!r}{did_you_mean(kind, MODELS)}; "
            f"there are {', '.join(sorted(MODELS))}"
        )
    return catalog.load(MODELS[kind], folder, **overrides)
