"""Folders as huggingface/transformers saves them: `config.json` beside the weights."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import flax.linen as nn

from jaxmodels.interop import catalog, checkpoint
from jaxmodels.spelling import did_you_mean

# `model_type` of a config.json -> our module, which has `arguments_of(config, state)`.
MODULES = {"t5": "language.t5", "mt5": "language.t5"}


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The entries of `folder/config.json`. Raises `CheckpointError` when it is not such a file."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{path}: no readable config ({error})") from None
    return config


def load(folder: str | os.PathLike, **overrides: Any) -> tuple[nn.Module, dict[str, Any]]:
    """(module, variables) of a folder: whole or sharded safetensors, or `pytorch_model.bin`.

    The architecture is that of `config.json`; `overrides` go over it.

    Raises: `CheckpointError` for a folder that cannot be read or a model type that we do not have;
      `CheckpointMismatch` where tensors and config do not fit.
    """
    config = read_config(folder)
    kind = config.get("model_type", "")
    if kind not in MODULES:
        raise checkpoint.CheckpointError(
            f"{folder}: no model for model_type {kind!r}{did_you_mean(kind, MODULES)}; "
            f"there are {', '.join(sorted(MODULES))}"
        )
    state = checkpoint.read(folder).tensors
    python_module = importlib.import_module(f"jaxmodels.{MODULES[kind]}")
    arguments = {**python_module.arguments_of(config, state), **overrides}
    return catalog.load(MODULES[kind], state, **arguments)
