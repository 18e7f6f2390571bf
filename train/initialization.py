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


def starting_variables(config, shapes, task, fresh):
    """`(params, extra)` of the run: the checkpoint's where it has them, else the fresh ones.

    `shapes` is the abstract state; `fresh()` makes a state, and is called only when it is needed.

    `init_skip` is a regular expression over dotted parameter paths; what it matches stays at its
    initialization (a new classifier, say). Anything else that is missing or mis-shaped is an error.
    """
    path = Path(config.init_from)
    wanted = {"params": shapes.params, **shapes.extra}
    skip = (config.init_skip,) if config.init_skip else ()
    if path.is_dir():
        loaded = load_params(path, ema=True)
    else:
        from jaxmodels.interop import catalog, checkpoint, conversion

        found = catalog.find(config.model)
        tensors = checkpoint.read(path).tensors
        loaded, _ = catalog.import_state(found, task.model, tensors, skip, source=str(path))
        # A PyTorch file has no other collections (a graph, say): the run's own stand.
        own = [f"^{name}\\." for name in shapes.extra if name not in conversion.COLLECTIONS]
        skip = (*skip, *own)
    given = {path_string(p): v for p, v in jax.tree_util.tree_flatten_with_path(loaded)[0]}
    if hasattr(task, "check_loaded"):
        task.check_loaded(given)
    problems, needed = [], []

    def choose(path, leaf):
        name = path_string(path)
        if name not in given or any(re.search(s, name) for s in skip):
            if not any(re.search(s, name) for s in skip):
                problems.append(f"missing {name}")
            needed.append(name)
            return None
        value = given[name]
        if np.shape(value) != leaf.shape:
            problems.append(f"{name} has shape {np.shape(value)}, the model {leaf.shape}")
            return None
        return jnp.asarray(value, leaf.dtype)

    merged = jax.tree_util.tree_map_with_path(choose, wanted)
    if problems:
        shown = "; ".join(problems[:8]) + (
            f"; and {len(problems) - 8} more" if problems[8:] else ""
        )
        raise ConfigError(f"config.init_from {path}: {shown} (config.init_skip leaves names out)")
    if needed:
        state = fresh()
        own = {"params": state.params, **state.extra}
        merged = jax.tree.map(
            lambda chosen, mine: mine if chosen is None else chosen,
            merged,
            own,
            is_leaf=lambda x: x is None,
        )
    return merged["params"], {k: v for k, v in merged.items() if k != "params"}
