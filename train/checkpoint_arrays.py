"""A training state as the flat dict of arrays that Orbax writes, and back."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


def _leaf_key(path: Sequence[Any], escape: bool = True) -> str:
    """Joins by "/", since module names contain dots and Orbax would merge `a.b` with `a: {b}`."""
    parts = []
    for entry in path:
        for attribute in ("key", "name", "idx"):
            if hasattr(entry, attribute):
                part = str(getattr(entry, attribute))
                break
        else:
            part = str(entry)
        parts.append(part.replace("%", "%25").replace("/", "%2F") if escape else part)
    return "/".join(parts)


def _flatten(state: Any, escape: bool = True) -> tuple[dict[str, Any], Any]:
    pairs, structure = jax.tree_util.tree_flatten_with_path(state)
    leaves = {_leaf_key(path, escape): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise ValueError("two leaves of the state have the same path when keys become text")
    return leaves, structure


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_arrays(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a pytree into the arrays Orbax writes and a JSON description of every leaf."""
    arrays, tree = {}, {}
    for key, leaf in _flatten(state)[0].items():
        entry: dict[str, Any] = {}
        if _is_key(leaf):
            entry["prng"] = str(jax.random.key_impl(leaf))
            entry["shape"] = list(leaf.shape)
            leaf = jax.random.key_data(leaf)
        elif not isinstance(leaf, jax.Array):
            if not isinstance(leaf, np.ndarray | np.generic | bool | int | float):
                raise ValueError(f"state leaf {key} is a {type(leaf).__name__}, not an array")
            # Copied, because the caller may change it while the files are being written.
            leaf = np.array(leaf)
        if isinstance(leaf, jax.Array) and jax.process_count() > 1 and leaf.is_fully_addressable:
            leaf = np.array(leaf)
        entry.setdefault("shape", list(leaf.shape))
        entry["dtype"] = str(leaf.dtype)
        tree[key] = entry
        if leaf.size:  # Orbax refuses empty arrays; their description is enough to make them again
            arrays[key] = leaf
    return arrays, tree


def restore_tree(
    path: Path,
    tree: Mapping[str, Mapping[str, Any]],
    like: Any,
    where: str,
    sources: Mapping[str, str] | None = None,
    *,
    escape: bool = True,
) -> Any:
    """Reads the leaves of `like` from the checkpoint at `path`.

    Args:
      path: directory of one finished checkpoint.
      tree: the description `to_arrays` made, by the keys of `like`.
      like: a pytree of `jax.ShapeDtypeStruct`, arrays and numbers, which also says where they go.
      where: how an error message names the checkpoint.
      sources: key of `like` -> key in the checkpoint, where these differ.
      escape: False where the keys of `like` are escaped already.

    Raises:
      ValueError: leaves are missing, unexpected or of another shape or dtype; all are listed.
    """
    wanted, structure = _flatten(like, escape)
    _compare(tree, wanted, where)
    item, arguments = {}, {}
    for key, leaf in wanted.items():
        if not math.prod(tree[key]["shape"]):
            continue
        source = key if sources is None else sources[key]
        sharding = getattr(leaf, "sharding", None)
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
            if sharding is None:
                sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            item[source] = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
            arguments[source] = ocp.ArrayRestoreArgs(
                sharding=sharding, global_shape=data.shape, dtype=data.dtype
            )
        else:
            item[source] = np.zeros((), tree[key]["dtype"])
            arguments[source] = ocp.RestoreArgs(restore_type=np.ndarray)
    stored: dict[str, Any] = {}
    if item:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            stored = reader.restore(
                path / "arrays",
                args=ocp.args.PyTreeRestore(
                    item=item, restore_args=arguments, partial_restore=True
                ),
            )
    leaves = []
    for key, leaf in wanted.items():
        entry = tree[key]
        value = stored.get(key if sources is None else sources[key])
        if value is None:
            value = np.zeros(entry["shape"], entry["dtype"])
            if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
                value = jax.device_put(value, getattr(leaf, "sharding", None))
        if "prng" in entry:
            value = jax.random.wrap_key_data(value, impl=entry["prng"])
        elif isinstance(leaf, bool | int | float) and not isinstance(leaf, np.generic):
            value = type(leaf)(value)
        elif isinstance(leaf, np.generic):
            value = value[()]
        leaves.append(value)
    return jax.tree_util.tree_unflatten(structure, leaves)


def _compare(tree: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any], where: str) -> None:
    """Raises one line with all missing, unexpected and mis-shaped leaves."""
    faults = []
    missing = [key for key in wanted if key not in tree]
    unexpected = [key for key in tree if key not in wanted]
    if missing:
        faults.append(f"it lacks {_some(missing)}")
    if unexpected:
        faults.append(f"the model has no {_some(unexpected)}")
    differing = []
    for key in wanted.keys() & tree.keys():
        entry, leaf = tree[key], wanted[key]
        shape = list(np.shape(leaf)) if not hasattr(leaf, "shape") else list(leaf.shape)
        here = "key" if _is_key(leaf) else str(leaf.dtype) if hasattr(leaf, "dtype") else None
        there = "key" if "prng" in entry else entry["dtype"]
        if shape != list(entry["shape"]) or (here is not None and here != there):
            differing.append(f"{key} {there}{entry['shape']} (here {here}{shape})")
    if differing:
        faults.append(f"it differs in {_some(sorted(differing))}")
    if faults:
        raise ValueError(f"{where} does not fit the model: {'; '.join(faults)}")


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
