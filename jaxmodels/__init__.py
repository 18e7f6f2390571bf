"""What each system computes: pure functions of (parameters, arrays).

`load`, `list` and `save` come from `jaxmodels.interop` on first use, so that importing a single
model does not import the checkpoint readers.
"""

_PUBLIC = {
    "load": ("jaxmodels.interop.catalog", "load"),
    "list": ("jaxmodels.interop.catalog", "list_models"),
    "save": ("jaxmodels.interop.catalog", "save"),
}
__all__ = ["list", "load", "save"]


def __getattr__(name: str):
    if name in _PUBLIC:
        import importlib

        module, attribute = _PUBLIC[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'jaxmodels' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_PUBLIC])
