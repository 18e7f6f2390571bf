"""Things found by name: modules of a package, and the message when a name is wrong."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType

from jaxmodels.spelling import closest


class ConfigError(ValueError):
    """A mistake in a config: one line: the key, what is wrong, what would be right."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean X? known: ...` for an error message."""
    known = sorted(known)
    close = closest(name, known)
    hint = f"did you mean {close!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def modules_of(package: ModuleType) -> list[str]:
    """Names of the modules directly in a package."""
    return [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]


def find_module(package: ModuleType, name: str, key: str) -> ModuleType:
    """The module `name` of `package`; a wrong name raises a `ConfigError` that names `key`."""
    known = modules_of(package)
    if name not in known:
        raise ConfigError(f"{key}: nothing named {name!r}; {nearest(name, known)}")
    return importlib.import_module(f"{package.__name__}.{name}")
