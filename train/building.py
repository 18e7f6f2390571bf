"""From a config to the task, the model, the optimizer: everything by name."""

from __future__ import annotations

import jax.numpy as jnp

import train.tasks
from train import vocabulary
from train.naming import ConfigError, find_module

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def build_task(config):
    """`config.task` is a module of `train.tasks`."""
    module = find_module(train.tasks, config.task, "config.task")
    vocabulary.read_with(config)
    try:
        return module.from_config(config)
    except TypeError as error:
        raise ConfigError(f"config.task_args or config.model_args: {error}") from None


def build_model(config):
    """`config.model` by name, with `model_args` and the compute dtype of `precision`."""
    return build_named(config, config.model, config.model_args, "config.model")


def build_named(config, name: str, arguments, key: str):
    """The model `name` with `arguments`, in the config's precision; `key` names it in errors."""
    from jaxmodels.interop import catalog

    if config.precision not in PRECISIONS:
        raise ConfigError(f"config.precision: {config.precision!r}; known: {', '.join(PRECISIONS)}")
    args = dict(arguments)
    if config.precision != "float32":
        args.setdefault("dtype", PRECISIONS[config.precision])
    try:
        found = catalog.find(name)
        synchronize = config.parallel.mode == "pmap" and config.parallel.sync_batch_norm
        if synchronize and "bn_axis_name" in found.cls.__dataclass_fields__:
            args.setdefault("bn_axis_name", "batch")
        return found.build(**args)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        text = error.args[0] if error.args else str(error)
        raise ConfigError(f"{key} {name!r}: {text}") from None


def check_classes(config, model) -> None:
    """ConfigError where the data have more classes than the model's head.

    In a compiled step such a label would count as none at all, or as the last.
    """
    from train.data import pipeline

    key = next((k for k in ("num_classes", "classes") if hasattr(model, k)), "head")
    classes = getattr(model, key)
    if key == "head":
        # A backbone in ScaleNet's configuration form.
        if not hasattr(model, "space"):
            return
        classes = model.space.linear[-1][2]
    have = pipeline.num_classes(config.data)
    if have is not None and have > classes:
        raise ConfigError(
            f"config.model_args.{key}: {classes}, but config.data {config.data.name} has {have} "
            "classes"
        )
