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


# Classes that are a part of it.
PARTS = {
    "MT5EncoderModel": "language.t5:T5Encoder",
    "T5EncoderModel": "language.t5:T5Encoder",
}


def load(folder: str | os.PathLike, **overrides: Any) -> tuple[nn.Module, dict[str, Any]]:
    """(module, variables) of a folder: whole or sharded safetensors, or `pytorch_model.bin`.

    The architecture is that of `config.json`; `overrides` go over it.

    Raises: `CheckpointError` for a folder that cannot be read or a model type that we do not have;
      `CheckpointMismatch` where tensors and config do not fit.
    """
    config = catalog.read_config(folder)
    kind = config.get("model_type", "")
    if kind not in MODELS:
        raise checkpoint.CheckpointError(
            f"{folder}: no model for model_type {kind!r}{did_you_mean(kind, MODELS)}; "
            f"there are {', '.join(sorted(MODELS))}"
        )
    names = [PARTS[n] for n in config.get("architectures") or () if n in PARTS]
    return catalog.load(names[0] if names else MODELS[kind], folder, **overrides)
