"""Fine-tuning: starting a run from a checkpoint of ours or of PyTorch."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from train import vocabulary
from train.checkpoints import load_params
from train.data import pipeline
from train.naming import ConfigError
from train.optimizers import path_string


def starting_variables(config, shapes, task, fresh):
    """`(params, extra)` of the run: the checkpoint's where it has them, else the fresh ones.

    `shapes` is the abstract state; `fresh()` makes a state, and is called only when it is needed.

    `init_skip` is a regular expression over dotted parameter paths; what it matches stays at its
    initialization (a new classifier, say); `init_prefix` is what stands before the names of a
    PyTorch file, where it is no usual prefix (those are found and logged). Anything else that is
    missing or mis-shaped is an error, but for the collections that `task.frozen` names, networks
    that never train: what the checkpoint lacks of them is what `task.start` loads. So is another
    vocabulary than the run's, but of data that are read with the run's own.
    """
    if "tokenizer" not in pipeline.resolve(config.data)[1]:
        vocabulary.check(config)
    wanted = {"params": shapes.params, **shapes.extra}
    frozen = getattr(task, "frozen", ())

    def own():
        state = fresh()
        params, extra = state.params, state.extra
        if frozen:
            params, extra = task.start(params, extra)
        return {"params": params, **extra}

    merged = variables_from(
        config.init_from,
        config.model,
        task.model,
        wanted,
        skip=config.init_skip,
        fresh=own,
        key="config.init_from",
        skip_key="config.init_skip",
        check=getattr(task, "check_loaded", None),
        frozen=frozen,
        prefix=config.get("init_prefix") or None,
    )
    return merged["params"], {k: v for k, v in merged.items() if k != "params"}


def variables_from(
    source,
    name: str,
    module,
    wanted,
    *,
    skip: str = "",
    fresh=None,
    key: str,
    skip_key: str = "",
    prepare=None,
    skip_of=None,
    check=None,
    frozen=(),
    prefix=None,
):
    """The variables `wanted` (`{collection: tree of shapes}`) of a run directory or a PyTorch file.

    Args:
      source: the path. name, module: the model, for a PyTorch file.
      skip: regular expression of names taken from `fresh()` (`{collection: tree}`) instead.
      key, skip_key: config keys for the error messages.
      prepare: `state dict -> state dict`, of a PyTorch file before it is converted.
      skip_of: `state dict -> skip`, where the file decides.
      check: given {dotted path: array} of what was read; raises where it does not fit the run.
      frozen: collections of which a run directory may lack parts; they come from `fresh()`.
      prefix: of the names in a PyTorch file; None: a usual one is found.
    """
    path = Path(source)
    if not path.exists():
        raise ConfigError(f"{key}: no file or directory {str(source)!r}")
    tensors = None
    if not path.is_dir():
        from jaxmodels.interop import catalog, conversion

        found = catalog.find(name)
        read = catalog.read_weights(found, path)
        tensors = read.tensors
        skip = skip_of(tensors) if skip_of else skip
    skips = (skip,) if skip else ()
    if tensors is None:
        loaded = load_params(path, ema=True)
    else:
        tensors = prepare(tensors) if prepare else tensors
        loaded, done = catalog.import_state(
            found, module, tensors, skips, source=str(path), prefix=prefix
        )
        catalog.log_what_was_taken(str(path), read.taken, done)
        # A PyTorch file has no other collections (a graph, say): the run's own stand.
        others = [name for name in wanted if name not in ("params", *conversion.COLLECTIONS)]
        skips = (*skips, *(f"^{name}\\." for name in others))
    given = {path_string(p): v for p, v in jax.tree_util.tree_flatten_with_path(loaded)[0]}
    if check is not None:
        check(given)
    problems, needed = [], []

    def choose(path, leaf):
        name = path_string(path)
        if name not in given or any(re.search(s, name) for s in skips):
            if not any(re.search(s, name) for s in skips) and path[0].key not in frozen:
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
        hint = f" ({skip_key} leaves names out)" if skip_key else ""
        raise ConfigError(f"{key} {path}: {shown}{hint}")
    if needed:
        merged = jax.tree.map(
            lambda chosen, mine: mine if chosen is None else chosen,
            merged,
            fresh(),
            is_leaf=lambda x: x is None,
        )
    return merged
