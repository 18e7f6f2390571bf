"""Flags of the commands, and errors that fit on one line."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from train.naming import ConfigError, nearest


def read_flags(argv: Sequence[str], *, need_workdir: bool, strings: dict[str, str] | None = None):
    """`(config, workdir)` from the command line, plus required string flags given in `strings`."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "the experiment", flag_values=values)
    flags.DEFINE_string("workdir", None, "where the run lives", flag_values=values)
    for name, text in (strings or {}).items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    path = _config_path(argv)
    try:
        rest = values(list(argv))
    except (flags.Error, KeyError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(_explain(error, path)) from None
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}; options start with --")
    config = values.config
    for name in ("workdir",) if need_workdir and not config.dry_run else ():
        if not getattr(values, name):
            raise ConfigError(f"--{name} is missing: a directory for checkpoints and curves")
    for name in strings or {}:
        if not getattr(values, name):
            raise ConfigError(f"--{name} is missing: {strings[name]}")
    config.lock()
    if strings:
        return config, {name: getattr(values, name) for name in strings}
    return config, values.workdir


def _config_path(argv) -> str:
    for i, word in enumerate(argv):
        match = re.fullmatch(r"--?config(?:=(.*))?", word)
        if match:
            path = match[1] if match[1] is not None else (argv[i + 1] if i + 1 < len(argv) else "")
            file = path.split(":")[0]
            if not os.path.isfile(file):
                folder = os.path.dirname(file) or "configs"
                known = (
                    [f for f in os.listdir(folder) if f.endswith(".py") and f[0] != "_"]
                    if os.path.isdir(folder)
                    else []
                )
                raise ConfigError(
                    f"--config {file}: no such file; {nearest(os.path.basename(file), known)}"
                )
            return path
    raise ConfigError("--config is missing: configs/NAME.py[:preset]")


def _explain(error: Exception, path: str) -> str:
    text = " ".join(str(error.args[0] if error.args else error).split())
    found = re.search(
        r'Key "([\w.]+)"|[Kk]ey \'?"?([\w.]+)|Unknown command line flag \'([\w.]+)\'', text
    )
    if found:
        name = next(g for g in found.groups() if g)
        if name.startswith("config.") or "does not exist" in text or "Did you mean" in text:
            import importlib.util

            file, _, preset = path.partition(":")
            spec = importlib.util.spec_from_file_location("config_file", file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            config = module.get_config(preset) if preset else module.get_config()
            keys = list(_keys(config))
            return f"config.{name.removeprefix('config.')}: no such key; {_closest(name, keys)}"
    return text


def _keys(config, prefix=""):
    for key in config:
        yield prefix + key
        value = config[key]
        if hasattr(value, "keys"):
            yield from _keys(value, prefix + key + ".")


def _closest(name: str, keys) -> str:
    import difflib

    name = name.removeprefix("config.")
    close = difflib.get_close_matches(name, keys, n=1, cutoff=0.0)
    return f"did you mean config.{close[0]}?" if close else "see the config file"


def stop_with_one_line(main: Callable, argv: list[str]) -> int:
    """Run `main`; a user's mistake ends in one line and status 2, a defect in its traceback."""
    from train.loop import NonFiniteLoss

    try:
        return main(argv)
    except (ConfigError, NonFiniteLoss, ImportError, OSError, KeyError, ValueError) as error:
        known = isinstance(error, ConfigError | NonFiniteLoss | ImportError | OSError)
        if not known and os.environ.get("JAXMODELS_TRACEBACK"):
            traceback.print_exc()
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {' '.join(str(text).split())}", file=sys.stderr)
        return 1 if isinstance(error, NonFiniteLoss) else 2
