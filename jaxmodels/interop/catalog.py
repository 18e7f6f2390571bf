"""Models found by name (`family.module[:Thing]`), and loaded with PyTorch-named weights.

Nothing is registered: `vision.repghost` is `jaxmodels/vision/repghost.py`, `Thing` a key of its
`VARIANTS` or the name of one of its public Linen classes.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.interop import checkpoint, conversion
from jaxmodels.spelling import did_you_mean

CONFIG = "config.json"
LOGGER = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parent.parent
_NOT_FAMILIES = {"layers", "interop"}


@dataclass(frozen=True)
class Found:
    """A name resolved: the Linen class, its constructor arguments, and the module it stands in."""

    name: str
    cls: type[nn.Module]
    arguments: dict[str, Any]
    python_module: Any

    def build(self, **overrides: Any) -> nn.Module:
        """The module with `overrides` over the variant's arguments; a wrong argument is named."""
        known = [
            f for f in getattr(self.cls, "__dataclass_fields__", {}) if f not in ("parent", "name")
        ]
        for argument in overrides:
            if argument not in known:
                raise ValueError(
                    f"{self.name} has no argument {argument!r}"
                    f"{did_you_mean(argument, known)}; it has {', '.join(known)}"
                )
        return self.cls(**{**self.arguments, **overrides})


def module_names() -> builtins.list[str]:
    """Every `family.module` of the package."""
    names = []
    for family in sorted(p for p in _PACKAGE.iterdir() if p.is_dir()):
        if family.name in _NOT_FAMILIES or not family.name.isidentifier() or family.name[0] == "_":
            continue
        names += [
            f"{family.name}.{f.stem}" for f in sorted(family.glob("*.py")) if f.stem[0] != "_"
        ]
    return names


def _import(name: str) -> Any:
    return importlib.import_module(f"jaxmodels.{name}")


def _variants(python_module: Any) -> Mapping[str, Mapping[str, Any]]:
    return getattr(python_module, "VARIANTS", {})


def _classes(python_module: Any) -> dict[str, type[nn.Module]]:
    """Public Linen classes of a module: those it defines and those it imports by name."""
    return {
        name: value
        for name, value in vars(python_module).items()
        if inspect.isclass(value)
        and issubclass(value, nn.Module)
        and value is not nn.Module
        and not name.startswith("_")
    }


def _of_variant(name: str, python_module: Any, variant: str) -> Found:
    arguments = dict(_variants(python_module)[variant])
    cls = arguments.pop("cls", None)
    if cls is None:
        cls = python_module.MODEL
    elif isinstance(cls, str):
        cls = getattr(python_module, cls)
    return Found(name, cls, arguments, python_module)


def find(name: str) -> Found:
    """Resolve `family.module`, `family.module:variant`, `family.module:Class` or a variant alone.

    Raises ValueError that lists the right names with the nearest spelling first.
    """
    module_name, _, thing = name.partition(":")
    modules = module_names()
    if module_name in modules:
        python_module = _import(module_name)
        if not thing:
            if not hasattr(python_module, "MODEL"):
                classes = sorted(_classes(python_module))
                raise ValueError(
                    f"{module_name} has no default model; name one of its classes, as "
                    f"{module_name}:{classes[0] if classes else 'CLASS'}"
                )
            return Found(name, python_module.MODEL, {}, python_module)
        if thing in _variants(python_module):
            return _of_variant(name, python_module, thing)
        classes = _classes(python_module)
        if thing in classes:
            return Found(name, classes[thing], {}, python_module)
        right = [*_variants(python_module), *classes]
        raise ValueError(
            f"{module_name} has no variant or class {thing!r}{did_you_mean(thing, right)}; "
            f"it has {', '.join(right)}"
        )
    if thing or module_name.split(".")[0] in {m.split(".")[0] for m in modules} - {name}:
        raise ValueError(
            f"no model module {module_name!r}{did_you_mean(module_name, modules)}; "
            f"there are {', '.join(modules)}"
        )
    homes = [m for m in modules if name in _variants(_import(m))]
    if len(homes) == 1:
        return _of_variant(f"{homes[0]}:{name}", _import(homes[0]), name)
    if homes:
        raise ValueError(f"{name!r} is a variant of several modules, say {homes[0]}:{name}")
    right = [*modules, *(v for m in modules for v in _variants(_import(m)))]
    raise ValueError(
        f"no model {name!r}{did_you_mean(name, right)} (see `python -m jaxmodels list`)"
    )


def list_models() -> builtins.list[str]:
    """Names of every model module that has a default model, each followed by its variants."""
    names = []
    for module_name in module_names():
        python_module = _import(module_name)
        if hasattr(python_module, "MODEL"):
            names.append(module_name)
        names += [f"{module_name}:{v}" for v in _variants(python_module)]
    return names


def inputs_of(module: nn.Module, inputs: Any = None) -> tuple[Any, ...]:
    """Shapes to initialize a module with: `inputs` as given, else its `example_inputs()`.

    Raises ValueError when there are neither.
    """
    if inputs is None:
        if not hasattr(module, "example_inputs"):
            raise ValueError(
                f"{type(module).__name__} has no example_inputs(); pass inputs=(array or "
                "jax.ShapeDtypeStruct, ...)"
            )
        inputs = module.example_inputs()
    elif not isinstance(inputs, (tuple, builtins.list)):
        inputs = (inputs,)
    return tuple(inputs)


def _rngs(seed: int) -> dict[str, jax.Array]:
    names = ("params", "dropout", "noise", "sample")
    return dict(zip(names, jax.random.split(jax.random.key(seed), len(names))))


def shapes(module: nn.Module, inputs: Any = None) -> dict[str, Any]:
    """Shapes of a module's variables, `{collection: nested dict of jax.ShapeDtypeStruct}`."""
    return dict(jax.eval_shape(module.init, _rngs(0), *inputs_of(module, inputs)))


def initialize(module: nn.Module, seed: int = 0, inputs: Any = None) -> dict[str, Any]:
    """Fresh variables, a function of the seed alone; XLA drops the forward pass of `init`."""
    examples = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs_of(module, inputs))
    return dict(jax.jit(module.init)(_rngs(seed), *examples))


def load(
    name: str,
    weights: str | os.PathLike | Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    skip: str | Iterable[str] = (),
    prefer: Iterable[str] = (),
    prefix: str | None = None,
    inputs: Any = None,
    **overrides: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model by name, with variables from a PyTorch checkpoint or freshly initialized.

    Args:
      name: `family.module[:variant or class]`, or a variant's name alone while it is unique.
      weights: a `.safetensors`, `.npz`, `.pth`, `.pt` or `.bin` file (or a sharded checkpoint's
        index), a folder with one such file (whose `config.json`, where the model's module reads
        it, then gives the constructor arguments), a PyTorch-named state dict of arrays, or None
        for fresh weights.
      seed: of the fresh weights.
      skip: regular expressions of names neither read nor required, as `"classifier"`.
      prefer: nestings to take first where a file holds several, as `("state_dict_ema",)`; by
        default those that published numbers are of, where the model's module says which.
      prefix: what stands before the model's names in the file, where it is none of the usual ones
        (`conversion.USUAL_PREFIXES`), which are found and logged; what has other names is left out.
      inputs: shapes for initialization, for classes without `example_inputs()`.
      **overrides: constructor arguments over the variant's own; `param_dtype` also casts the file's
        floating-point arrays, which otherwise keep their dtype.

    Returns: (module, variables) with `module.apply(variables, x)`.

    Raises: ValueError for an unknown name or argument; `CheckpointMismatch` listing every missing,
      unexpected and mis-shaped entry; `CheckpointError` for a file that cannot be read.
    """
    found = find(name)
    if weights is None:
        module = found.build(**overrides)
        return module, initialize(module, seed, inputs)
    arguments = {}
    if isinstance(weights, Mapping):
        state, source, taken = weights, "the state dict", ""
    else:
        read = read_weights(found, weights, prefer)
        state, source, taken = read.tensors, os.fspath(weights), read.taken
        reader = getattr(found.python_module, "arguments_of_config", None)
        if reader is not None and (Path(weights) / CONFIG).is_file():
            arguments = reader(read_config(weights), state)
    module = found.build(**{**arguments, **overrides})
    variables, done = import_state(found, module, state, skip, seed, inputs, source, prefix)
    log_what_was_taken(source, taken, done)
    if "param_dtype" in overrides:
        variables = {
            collection: jax.tree.map(lambda x: _cast(x, overrides["param_dtype"]), tree)
            if collection == "params"
            else tree
            for collection, tree in variables.items()
        }
    return module, variables


def what_was_taken(taken: str, done: conversion.Conversion) -> builtins.list[str]:
    """In words: nestings and prefixes that were removed, and what a prefix left out."""
    said = []
    removed = ", ".join(t for t in (taken, done.prefix and f"prefix {done.prefix}") if t)
    if removed:
        said.append(f"taken from {removed}")
    if done.outside:
        said.append(f"left out: {len(done.outside)} entries, first {done.outside[0]}")
    return said


def log_what_was_taken(source: str, taken: str, done: conversion.Conversion) -> None:
    """Say through `logging` what a file's weights were found under; a warning where that decided
    what was left out."""
    said = what_was_taken(taken, done)
    if said:
        level = logging.WARNING if done.prefix else logging.INFO
        LOGGER.log(level, "%s: weights %s", source, "; ".join(said))


def read_weights(
    found: Found, path: str | os.PathLike, prefer: str | Iterable[str] = ()
) -> checkpoint.Checkpoint:
    """A checkpoint file of a model, `checkpoint.read`.

    Of several sets of weights in it `prefer` says which; else `PREFERRED_WEIGHTS` beside the model
    does, names of the set that the published numbers are of, where the file holds it.
    """
    read = checkpoint.read(path, prefer=prefer)
    own = [n for n in getattr(found.python_module, "PREFERRED_WEIGHTS", ()) if n in read.others]
    return checkpoint.read(path, prefer=own) if own and not prefer else read


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The entries of `folder/config.json`, as huggingface/transformers writes it beside weights.

    The model's module says what they mean: `arguments_of_config(config, state) -> arguments`.
    Raises `CheckpointError` when it is not such a file.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{path}: no readable config ({error})") from None
    return config


def _cast(x: np.ndarray, dtype: Any) -> np.ndarray:
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def import_state(
    found: Found,
    module: nn.Module,
    state: Mapping[str, Any],
    skip: str | Iterable[str] = (),
    seed: int = 0,
    inputs: Any = None,
    source: str = "the state dict",
    prefix: str | None = None,
) -> tuple[dict[str, Any], conversion.Conversion]:
    """`conversion.from_torch` with the rules, check and upgrade that stand beside the model."""
    hook = getattr(found.python_module, "check_checkpoint", None)
    if hook is not None:
        hook({key: tuple(np.shape(value)) for key, value in state.items()}, module)
    upgrade = getattr(found.python_module, "upgrade_checkpoint", None)
    if upgrade is not None:
        state = upgrade(state, module)
    rules = conversion.resolve_rules(getattr(found.python_module, "TORCH_RULES", None), module)
    fresh = initialize(module, seed, inputs) if skip else None
    return conversion.from_torch(
        state, shapes(module, inputs), rules, skip=skip, fresh=fresh, source=source, prefix=prefix
    )


def export(
    name: str,
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    like: Iterable[str] | None = None,
) -> dict[str, np.ndarray]:
    """PyTorch state dict of a model's variables, by the rules beside the model named `name`.

    `like`: keys of the file that was imported, see `conversion.to_torch`.
    """
    python_module = find(name).python_module
    rules = conversion.resolve_rules(getattr(python_module, "TORCH_RULES", None), module)
    return conversion.to_torch(variables, rules, like=like)


def save(
    path: str | os.PathLike, name: str, module: nn.Module, variables: Mapping[str, Any]
) -> None:
    """Write a model's variables as a PyTorch-named `.safetensors` file."""
    checkpoint.write_safetensors(path, export(name, module, variables))
