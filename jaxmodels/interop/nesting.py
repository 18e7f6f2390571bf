"""Which dict inside a published checkpoint holds the weights.

Training scripts save more than weights: `{"state_dict": ..., "optimizer": ..., "epoch": 3}`, EMA
copies beside the trained ones, `module.` before every name. `unwrap` finds the weights and says
which it took.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

# Nestings in the order in which they are taken; EMA variants come after the trained weights unless
# the caller prefers them, since which of the two a paper reports differs.
WEIGHT_SETS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "network_weights",
    "params",
    "weights",
    "module",
    "generator",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "params_ema",
    "g_ema",
)
EMA = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema", "g_ema")
# Arrays that stand beside a weight set and belong to it (StyleGAN2's mean latent).
COMPANIONS = ("latent_avg",)
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_forward_module.")
_LEFTOVERS = ("total_ops", "total_params")


def unwrap(
    tree: Any, source: str, prefer: Iterable[str] = ()
) -> tuple[dict[str, np.ndarray], str, list[str]]:
    """(tensors, what was taken, other weight sets in the file).

    Raises CheckpointError when no dict of tensors is found, naming the keys that are there.
    """
    from jaxmodels.interop.checkpoint import CheckpointError

    prefer = (prefer,) if isinstance(prefer, str) else tuple(prefer)
    if isinstance(tree, np.ndarray):
        return {"": tree}, "", []
    taken: list[str] = []
    others: list[str] = []
    node = tree
    beside: dict[str, np.ndarray] = {}
    if isinstance(node, Mapping):
        beside = {k: node[k] for k in COMPANIONS if isinstance(node.get(k), np.ndarray)}
        absent = [name for name in prefer if not _is_weights(node.get(name))]
        if prefer and len(absent) == len(prefer):
            there = [str(k)[:40] for k, v in node.items() if _is_weights(v)]
            raise CheckpointError(f"{source}: no weight set {absent[0]!r}; it has {there}")
    for _ in range(4):
        if not isinstance(node, Mapping):
            raise CheckpointError(f"{source}: holds {_describe(node)}, not a dict of tensors")
        sets = [k for k in dict.fromkeys((*prefer, *WEIGHT_SETS)) if _is_weights(node.get(k))]
        if not sets:
            break
        others += [k for k in sets[1:]]
        taken.append(sets[0])
        node = node[sets[0]]
    for name in prefer:
        if name not in taken and not taken:
            break
    tensors: dict[str, np.ndarray] = {}
    for key, value in node.items():
        if isinstance(value, np.ndarray) and isinstance(key, str):
            if key.rpartition(".")[2] not in _LEFTOVERS:
                tensors[key] = value
    if not tensors:
        keys = [str(k)[:40] for k in list(node)[:8]]
        raise CheckpointError(f"{source}: no tensors found; the file holds the keys {keys}")
    stripped = True
    while stripped:
        stripped = False
        for prefix in WRAPPER_PREFIXES:
            if all(k.startswith(prefix) for k in tensors):
                tensors = {k[len(prefix) :]: v for k, v in tensors.items()}
                taken.append(f"prefix {prefix}")
                stripped = True
    tensors = {**beside, **tensors}
    return tensors, ", ".join(taken), others


def _is_weights(value: Any, depth: int = 0) -> bool:
    """A dict most of whose values are tensors, or which nests such a dict under a known name."""
    if not isinstance(value, Mapping) or not value or depth > 3:
        return False
    arrays = sum(isinstance(v, np.ndarray) for v in value.values())
    if arrays and 2 * arrays >= len(value):
        return True
    return any(_is_weights(value.get(k), depth + 1) for k in WEIGHT_SETS)


def _describe(node: Any) -> str:
    return f"a {type(node).__name__}"
