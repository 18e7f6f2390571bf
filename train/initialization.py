"""Fine-tuning: starting a run from a checkpoint of ours or of PyTorch."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from train.checkpoints import load_params
from train.naming import ConfigError
from train.optimizers import path_string


def starting_variables(config, state, task):
    """`(params, extra)` of the run: the checkpoint's where it has them, else the fresh ones.

    `init_skip` is a regular expression over dotted parameter paths; what it matches stays at its
    initialization (a new classifier, say). Anything else that is missing or mis-shaped is an error.
    """
    path = Path(config.init_from)
    if not path.exists():
        raise ConfigError(f"config.init_from: no file or directory {str(path)!r}")
    fresh = {"params": state.params, **state.extra}
    skip = (config.init_skip,) if config.init_skip else ()
    if path.is_dir():
        loaded = load_params(path)
    else:
        from jaxmodels.interop import catalog, checkpoint

        found = catalog.find(config.model)
        tensors = checkpoint.read(path).tensors
        loaded, _ = catalog.import_state(found, task.model, tensors, skip, source=str(path))
    given = {path_string(p): v for p, v in jax.tree_util.tree_flatten_with_path(loaded)[0]}
    problems = []

    def choose(path, leaf):
        name = path_string(path)
        if name not in given or any(re.search(s, name) for s in skip):
            if not any(re.search(s, name) for s in skip) and not name.startswith("buffers."):
                problems.append(f"missing {name}")
            return leaf
        value = given[name]
        if np.shape(value) != leaf.shape:
            problems.append(f"{name} has shape {np.shape(value)}, the model {leaf.shape}")
            return leaf
        return jnp.asarray(value, leaf.dtype)

    merged = jax.tree_util.tree_map_with_path(choose, fresh)
    if problems:
        shown = "; ".join(problems[:8]) + (
            f"; and {len(problems) - 8} more" if problems[8:] else ""
        )
        raise ConfigError(f"config.init_from {path}: {shown} (config.init_skip leaves names out)")
    return merged["params"], {k: v for k, v in merged.items() if k != "params"}
