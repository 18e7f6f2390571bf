"""One rule between a Flax variable tree and a PyTorch state dict, both ways, byte for byte.

The Flax path joined by "." is the PyTorch path. The *Flax* leaf decides the layout:

| collection / leaf             | PyTorch leaf                  | axes                          |
|-------------------------------|-------------------------------|-------------------------------|
| params / `kernel`             | `weight`                      | `[*s, I, O]` <-> `[O, I, *s]` |
| params / `scale`, `embedding` | `weight`                      | unchanged                     |
| batch_stats / `mean`, `var`   | `running_mean`, `running_var` | unchanged                     |
| anything else                 | the same name                 | unchanged                     |

A path component that ends in `.*` (or is `*`) is a stack of layers, as `nn.scan` makes it: axis 0
of the Flax array runs over `layer.0`, `layer.1`, ... of the checkpoint. What this cannot know
stands in a dict named `TORCH_RULES` beside the model (or a function of the module that returns
such a dict), every entry optional, patterns being regular expressions that must match a whole
PyTorch key:

- `aliases`: {key: source}: tied weights; either may be absent from a file, both must be equal when
  they are there, and both are written on export.
- `travels`: [pattern]: keys which only travel along (collection `buffers`, unchanged).
- `fresh`: {key: array or function(variables) -> array}: travelling keys that a fresh model exports.
- `drops`: [pattern]: keys that are ignored in files and never written.
- `names`: [(ours, theirs)]: pairs of key prefixes renamed on the way (ours <-> theirs).
- `spellings`: [(pattern, replacement)]: other names of files, rewritten by `re.sub` on the way in.
- `prefixes`: [name]: what else than `USUAL_PREFIXES` may stand before every name of a file.
- `arrays`: [(pattern, to_flax, to_torch)]: layout of the matching entries instead of the table's;
  the functions take and return NumPy arrays and only move axes (export is byte for byte).
  `(pattern, *TRANSPOSED_CONVOLUTION)` and `(pattern, *UNCHANGED)` use the ready pairs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxmodels.interop.checkpoint import CheckpointError
from jaxmodels.spelling import closest, did_you_mean

COLLECTIONS = ("params", "batch_stats", "buffers")
_LEAF_NAMES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "embedding"): "weight",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
# Left behind in published files by FLOP counters; never part of a model.
_PROFILER_LEFTOVER = re.compile(r"(.*\.)?total_(ops|params)")
TRAVELLING_LEAF = "num_batches_tracked"
# What training scripts put before every name of a network: wrappers, and the attribute that held it
# beside heads, losses and other networks. Anything else before the names is more likely a file of
# something else that resembles the model.
USUAL_PREFIXES = (
    *("module", "_orig_mod", "_forward_module", "state_dict", "model", "net", "network"),
    *("backbone", "encoder", "generator", "student", "teacher"),
)


class CheckpointMismatch(CheckpointError):
    """A checkpoint and a model do not fit; the message lists every entry that does not."""


def kernel_to_torch(x: np.ndarray) -> np.ndarray:
    """`[*s, I, O]` -> `[O, I, *s]`."""
    return np.transpose(x, (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)))


def kernel_to_flax(x: np.ndarray) -> np.ndarray:
    """`[O, I, *s]` -> `[*s, I, O]`."""
    return np.transpose(x, (*range(2, x.ndim), 1, 0))


def _unchanged(x: np.ndarray) -> np.ndarray:
    return x


def _transposed_to_flax(x: np.ndarray) -> np.ndarray:
    """`[I, O, *s]` of `ConvTranspose` -> `[*s, I, O]`, flipped for an input-dilated convolution."""
    spatial = tuple(range(2, x.ndim))
    return np.transpose(np.flip(x, spatial), (*spatial, 0, 1))


def _transposed_to_torch(x: np.ndarray) -> np.ndarray:
    n = x.ndim - 2
    spatial = tuple(range(n))
    return np.transpose(np.flip(x, spatial), (n, n + 1, *spatial))


UNCHANGED = (_unchanged, _unchanged)
KERNEL = (kernel_to_flax, kernel_to_torch)
TRANSPOSED_CONVOLUTION = (_transposed_to_flax, _transposed_to_torch)


@dataclass(frozen=True)
class Entry:
    """One array of a checkpoint and its place in the Flax tree.

    `index` is the position along the leading stacked axes (empty when the leaf is not a stack);
    `shape` is the shape in PyTorch's layout.
    """

    key: str
    collection: str
    path: tuple[str, ...]
    index: tuple[int, ...]
    stack: tuple[int, ...]
    shape: tuple[int, ...]
    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


@dataclass
class Conversion:
    """What was done on the way in; `converted` counts arrays, the lists hold PyTorch keys."""

    converted: int = 0
    travelling: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    prefix: str = ""
    outside: list[str] = field(default_factory=list)  # of `dropped`, what the prefix left out


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Nested mapping -> {path: leaf}, in the tree's own order."""
    flat: dict[tuple[str, ...], Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, (*prefix, name)))
        else:
            flat[(*prefix, name)] = getattr(value, "value", value)  # unbox partitioned leaves
    return flat


def unflatten(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """{path: leaf} -> nested dict."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def resolve_rules(rules: Any, module: Any = None) -> dict[str, Any]:
    """`TORCH_RULES` as a dict, whether it was given as one, as a function of the module, or not."""
    if rules is None:
        return {}
    resolved = dict(rules(module)) if callable(rules) else dict(rules)
    known = {"aliases", "travels", "drops", "fresh", "names", "spellings", "arrays", "prefixes"}
    for name in resolved:
        if name not in known:
            raise ValueError(
                f"TORCH_RULES has no entry {name!r}{did_you_mean(name, known)}; "
                f"it knows {', '.join(sorted(known))}"
            )
    return resolved


def _rename(key: str, pairs: Iterable[tuple[str, str]]) -> str:
    for ours, theirs in pairs:
        if key.startswith(ours):
            return theirs + key[len(ours) :]
    return key


def entries(variables: Mapping[str, Any], rules: Mapping[str, Any] | None = None) -> list[Entry]:
    """Every checkpoint entry of a variable tree (arrays or `jax.ShapeDtypeStruct`s).

    Raises ValueError when two leaves would have the same PyTorch key, or when two Flax paths join
    to the same dotted name (`{'a.b': ...}` beside `{'a': {'b': ...}}`), which Orbax would merge.
    """
    rules = rules or {}
    arrays = [
        (re.compile(p), to_flax, to_torch) for p, to_flax, to_torch in rules.get("arrays", ())
    ]
    found: list[Entry] = []
    owner: dict[str, str] = {}
    dotted: dict[str, tuple[str, ...]] = {}
    for collection in COLLECTIONS:
        for path, leaf in flatten(variables.get(collection, {})).items():
            joined = f"{collection}/{'.'.join(path)}"
            if joined in dotted:
                raise ValueError(
                    f"two paths of the model join to {joined!r}: {dotted[joined]} and {path}"
                )
            dotted[joined] = path
            leaf_name = _LEAF_NAMES.get((collection, path[-1]), path[-1])
            components = ".".join((*path[:-1], leaf_name)).split(".")
            stars = components.count("*")
            shape = tuple(leaf.shape)
            stack, inner = shape[:stars], shape[stars:]
            is_kernel = collection == "params" and path[-1] == "kernel" and len(inner) >= 2
            for index in np.ndindex(*stack):
                numbers = iter(index)
                key = ".".join(str(next(numbers)) if c == "*" else c for c in components)
                key = _rename(key, rules.get("names", ()))
                pair = KERNEL if is_kernel else UNCHANGED
                for pattern, to_flax, to_torch in arrays:
                    if pattern.fullmatch(key):
                        pair = (to_flax, to_torch)
                        break
                if key in owner:
                    raise ValueError(f"{owner[key]} and {joined} both convert to {key!r}")
                owner[key] = joined
                torch_shape = pair[1](np.broadcast_to(np.int8(0), inner)).shape
                found.append(Entry(key, collection, path, index, stack, torch_shape, *pair))
    return found


def _matches(patterns: Iterable[str], key: str) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in patterns)


def is_skipped(skip: Iterable[str], key: str) -> bool:
    """Whether a key is, or lies below, one of the skipped names (regular expressions)."""
    return any(re.match(rf"(?:{pattern})(?:\.|$)", key) for pattern in skip)


def common_prefix(keys: Iterable[str], wanted: Iterable[str]) -> str:
    """The prefix that most wanted names bear in a file, "" when they match as they are."""
    keys = list(keys)
    present, wanted = set(keys), list(wanted)
    best, score = "", sum(name in present for name in wanted)
    if not wanted or score == len(wanted):
        return ""
    ending = "." + max(wanted, key=len)
    for prefix in {key[: -len(ending) + 1] for key in keys if key.endswith(ending)}:
        hits = sum(prefix + name in present for name in wanted)
        if hits > score:
            best, score = prefix, hits
    return best


def is_usual(prefix: str, rules: Mapping[str, Any]) -> bool:
    """Whether every part of a prefix is one of `USUAL_PREFIXES`, or of those of the model."""
    known = {*USUAL_PREFIXES, *rules.get("prefixes", ())}
    return all(part in known for part in prefix.rstrip(".").split("."))


def _nearest(name: str, shape: tuple[int, ...], candidates: Mapping[str, tuple[int, ...]]) -> str:
    same = [
        k for k, s in candidates.items() if s == shape and k.split(".")[-1] == name.split(".")[-1]
    ]
    for pool in (same, list(candidates)):
        near = closest(name, pool[:400], 0.6)
        if near:
            return near
    return ""


def _mismatch(
    missing: Mapping[str, tuple[int, ...]],
    unexpected: Mapping[str, tuple[int, ...]],
    misshaped: list[str],
    source: str,
    hint: str,
) -> CheckpointMismatch:
    # Nearest names cost a quadratic search; the first hundred say what went wrong.
    lines = []
    for n, (key, shape) in enumerate(missing.items()):
        near = _nearest(key, shape, unexpected) if n < 100 else ""
        lines.append(
            f"  missing    {key} {list(shape)}"
            + (f"  (nearest in the file: {near} {list(unexpected[near])})" if near else "")
        )
    for n, (key, shape) in enumerate(unexpected.items()):
        near = _nearest(key, shape, missing) if n < 100 else ""
        lines.append(
            f"  unexpected {key} {list(shape)}"
            + (f"  (nearest in the model: {near})" if near else "")
        )
    lines += [f"  shape      {text}" for text in misshaped]
    head = (
        f"{source} does not fit the model: {len(missing)} missing, {len(unexpected)} unexpected, "
        f"{len(misshaped)} mis-shaped entries{hint}"
    )
    return CheckpointMismatch("\n".join([head, *lines]))


def from_torch(
    state: Mapping[str, Any],
    template: Mapping[str, Any],
    rules: Any = None,
    *,
    skip: Iterable[str] = (),
    fresh: Mapping[str, Any] | None = None,
    source: str = "the checkpoint",
    prefix: str | None = None,
) -> tuple[dict[str, Any], Conversion]:
    """Variables of a model from a PyTorch state dict.

    Args:
      state: {PyTorch key: array}.
      template: the model's variables or their shapes (`jax.eval_shape` of `init`).
      rules: `TORCH_RULES` of the model, resolved.
      skip: names (regular expressions) neither taken from the file nor required, as
        `("classifier",)` when fine-tuning; `fresh` then must hold initialized variables.
      source: how errors call the checkpoint.
      prefix: what stands before the model's names in the file (`"detector."`); what has other
        names is left out. None finds one made of `USUAL_PREFIXES` and the model's own.

    Returns: (variables, what was done). Arrays keep the file's dtype.

    Raises:
      CheckpointMismatch: all missing, unexpected and mis-shaped entries, with the nearest names.
    """
    rules = rules or {}
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    done = Conversion()
    table = entries(template, rules)
    for pattern, replacement in rules.get("spellings", ()):
        state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    aliases = dict(rules.get("aliases", {}))
    wanted = {e.key for e in table}
    # Travelling keys lie beside their module's own leaves, so that no two paths join to one name.
    homes = {e.key.rpartition(".")[0]: e.path[:-1] for e in table if not e.stack}
    found = common_prefix(state, [e.key for e in table]) if prefix is None else prefix
    hint = ""
    if found and prefix is None and not is_usual(found, rules):
        hint = (
            f"; names as the model's stand behind {found!r}, which is no usual prefix: where that "
            f"is the network, prefix={found!r} takes it (--prefix, config.init_prefix)"
        )
    elif found:
        done.prefix = found
        inside = {k for k in state if k.startswith(done.prefix)}
        if not inside:
            raise CheckpointMismatch(
                f"{source}: no name begins with the prefix {found!r}; the first is "
                f"{next(iter(state), None)!r}"
            )
        done.outside = [k for k in state if k not in inside]
        done.dropped += done.outside
        state = {k[len(done.prefix) :]: v for k, v in state.items() if k in inside}

    remaining = dict(state)
    missing: dict[str, tuple[int, ...]] = {}
    misshaped: list[str] = []
    flat: dict[str, dict[tuple[str, ...], Any]] = {c: {} for c in COLLECTIONS}
    fresh_flat = {c: flatten((fresh or {}).get(c, {})) for c in COLLECTIONS}
    stacks: dict[tuple[str, tuple[str, ...]], np.ndarray] = {}
    for entry in table:
        if is_skipped(skip, entry.key):
            remaining.pop(entry.key, None)
            done.skipped.append(entry.key)
            # Of a stack other layers may be the file's: this one's are fresh there already.
            leaves, own = flat[entry.collection], fresh_flat[entry.collection]
            if entry.path in own and not (entry.stack and entry.path in leaves):
                leaves[entry.path] = own[entry.path]
            continue
        if entry.key not in remaining:
            missing[entry.key] = entry.shape
            continue
        array = np.asarray(remaining.pop(entry.key))
        if tuple(array.shape) != entry.shape:
            misshaped.append(
                f"{entry.key} is {list(array.shape)} in the file, {list(entry.shape)} in the model"
            )
            continue
        value = entry.to_flax(array)
        done.converted += 1
        if not entry.stack:
            flat[entry.collection][entry.path] = value
            continue
        place = (entry.collection, entry.path)
        if place not in stacks:
            stacks[place] = np.empty((*entry.stack, *value.shape), value.dtype)
            if entry.path in fresh_flat[entry.collection]:  # for the layers that are skipped
                stacks[place][:] = fresh_flat[entry.collection][entry.path]
            flat[entry.collection][entry.path] = stacks[place]
        stacks[place][entry.index] = value

    unexpected: dict[str, tuple[int, ...]] = {}
    for key, value in remaining.items():
        if key in aliases:
            original = np.asarray(state[aliases[key]]) if aliases[key] in state else None
            if original is not None and not same_bytes(original, np.asarray(value)):
                misshaped.append(
                    f"{key} differs from {aliases[key]}, to which the model ties it"
                    + _largest_difference(original, np.asarray(value))
                )
            done.aliases.append(key)
        elif _PROFILER_LEFTOVER.fullmatch(key) or _matches(rules.get("drops", ()), key):
            done.dropped.append(key)
        elif is_skipped(skip, key):
            done.skipped.append(key)
        elif _travels(key, wanted, rules):
            owner, _, leaf = key.rpartition(".")
            flat["buffers"][(*homes.get(owner, (owner,) if owner else ()), leaf)] = np.asarray(
                value
            )
            done.travelling.append(key)
        else:
            unexpected[key] = tuple(np.shape(value))
    # A file that holds only the alias of a tied weight is complete.
    for key in [k for k in missing if any(a in state for a, s in aliases.items() if s == k)]:
        alias = next(a for a, s in aliases.items() if s == key and a in state)
        entry = next(e for e in table if e.key == key)
        array = np.asarray(state[alias])
        if tuple(array.shape) == entry.shape and not entry.stack:
            flat[entry.collection][entry.path] = entry.to_flax(array)
            done.converted += 1
            del missing[key]
    if missing or unexpected or misshaped:
        raise _mismatch(missing, unexpected, misshaped, source, hint)
    variables = {c: unflatten(leaves) for c, leaves in flat.items() if leaves}
    return variables, done


def _travels(key: str, wanted: set[str], rules: Mapping[str, Any]) -> bool:
    if _matches(rules.get("travels", ()), key):
        return True
    owner, _, leaf = key.rpartition(".")
    return leaf == TRAVELLING_LEAF and f"{owner}.running_mean".lstrip(".") in wanted


def _largest_difference(a: np.ndarray, b: np.ndarray) -> str:
    if a.shape != b.shape:
        return f" ({list(a.shape)} and {list(b.shape)})"
    gap = np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0)
    return f" (by up to {gap:.3g})"


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal in shape, dtype and every bit (so NaN equals itself)."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def to_torch(
    variables: Mapping[str, Any], rules: Any = None, *, like: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """PyTorch state dict of a variable tree, with the official names, shapes and dtypes.

    A BatchNorm that was never imported exports `num_batches_tracked` 0 (int64), as PyTorch's fresh
    module has it, and tied weights stand under both names. `like`, the keys of an imported file,
    leaves out what the file left out of these.
    """
    rules = rules or {}
    state: dict[str, np.ndarray] = {}
    cache: dict[tuple[str, tuple[str, ...]], np.ndarray] = {}
    collections = {c: flatten(variables.get(c, {})) for c in COLLECTIONS}
    for entry in entries(variables, rules):
        place = (entry.collection, entry.path)
        if place not in cache:
            cache[place] = np.asarray(collections[entry.collection][entry.path])
        array = cache[place][entry.index] if entry.stack else cache[place]
        array = np.ascontiguousarray(entry.to_torch(array)).reshape(entry.shape)
        if entry.key.rpartition(".")[2] == TRAVELLING_LEAF:
            array = array.astype(np.int64)  # a trip through jit makes it int32
        state[entry.key] = array
    for key in list(state):
        owner, _, leaf = key.rpartition(".")
        counter = f"{owner}.{TRAVELLING_LEAF}".lstrip(".")
        if leaf == "running_mean" and counter not in state:
            state[counter] = np.zeros((), np.int64)
    for key, make in rules.get("fresh", {}).items():
        if key not in state:
            state[key] = np.asarray(make(variables) if callable(make) else make)
    aliases = rules.get("aliases", {})
    for alias, original in aliases.items():
        if original in state:
            state[alias] = state[original]
    if like is not None:
        # Only what a file may leave out and still be whole; anything else absent is an error there.
        optional = {*aliases, *aliases.values(), *rules.get("fresh", {})}
        keep = set(like)
        state = {
            k: v
            for k, v in state.items()
            if k in keep or (k not in optional and k.rpartition(".")[2] != TRAVELLING_LEAF)
        }
    return {k: v for k, v in state.items() if not _matches(rules.get("drops", ()), k)}
