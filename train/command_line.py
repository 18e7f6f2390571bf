"""Flags of the commands, and errors that fit on one line."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import flags
from ml_collections import ConfigDict

from jaxmodels.spelling import closest
from train.naming import ConfigError, nearest

# Arguments of a model, a task, an optimizer or a data set: a config need not list them all, and
# those who take them name the wrong ones.
FREE = ("model_args", "task_args", "optimizer.args", "data.options")


def read_flags(argv: Sequence[str], *, need_workdir: bool, strings: dict[str, str] | None = None):
    """`(config, workdir)` from the command line; with `strings`, `(config, {name: value})`.

    Args:
      argv: program name, `--config FILE[:PRESET]`, `--config.key=value`, `--workdir DIR`, and the
        string flags `strings` (name -> what it is), all of them required.

    Raises:
      ConfigError: an unknown flag or key (with the nearest right one), a value of the wrong type,
        a missing flag or file.
    """
    path, words = _take_config(list(argv))
    config = load_config(path)
    keys = list(_keys(config))
    rest = []
    for word in words:
        match = re.fullmatch(r"--?config\.([\w.]+)(?:=(.*))?", word, re.DOTALL)
        if match is None:
            rest.append(word)
            continue
        key, text = match.groups()
        if key not in keys and not key.startswith(tuple(f + "." for f in FREE)):
            raise ConfigError(f"config.{key}: no such key; {_closest(key, keys)}")
        if text is None:
            raise ConfigError(f"config.{key}: write --config.{key}=VALUE")
        _set(config, key, text)
    values = flags.FlagValues()
    wanted = dict(strings or {})
    if strings is None:
        wanted["workdir"] = "a directory for checkpoints and curves"
    for name, text in wanted.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    try:
        left = values(rest)
    except (flags.Error, KeyError, AttributeError, ValueError, TypeError) as error:
        text = " ".join(str(error).split())
        found = re.search(r"Unknown command line flag '([\w.]+)'", text)
        hint = f"; {nearest(found[1], [*wanted, 'config'])}" if found else ""
        raise ConfigError(text.split(". Did you mean")[0] + hint) from None
    if len(left) > 1:
        raise ConfigError(f"unexpected argument {left[1]!r}; options start with --")
    config.lock()
    if need_workdir or strings:
        for name, text in wanted.items():
            if not getattr(values, name) and not config.dry_run:
                raise ConfigError(f"--{name} is missing: {text}")
    if strings is None:
        return config, values.workdir
    return config, {name: getattr(values, name) for name in strings}


def load_config(path: str) -> ConfigDict:
    """The config of `FILE[:PRESET]`."""
    file, _, preset = path.partition(":")
    if not os.path.isfile(file):
        folder = os.path.dirname(file) or "configs"
        known = os.listdir(folder) if os.path.isdir(folder) else []
        known = [f for f in known if f.endswith(".py") and f[0] != "_"]
        raise ConfigError(
            f"--config {file}: no such file; {nearest(os.path.basename(file), known)}"
        )
    spec = importlib.util.spec_from_file_location("config_file", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config {file}: it has no get_config(preset)")
    try:
        return module.get_config(preset) if preset else module.get_config()
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _take_config(argv: list[str]) -> tuple[str, list[str]]:
    for i, word in enumerate(argv):
        match = re.fullmatch(r"--?config(?:=(.*))?", word)
        if match and match[1] is not None:
            return match[1], argv[:i] + argv[i + 1 :]
        if match and i + 1 < len(argv):
            return argv[i + 1], argv[:i] + argv[i + 2 :]
    raise ConfigError("--config is missing: configs/NAME.py[:preset]")


def _keys(config, prefix="") -> Iterator[str]:
    for key in config:
        yield prefix + key
        if isinstance(config[key], ConfigDict):
            yield from _keys(config[key], prefix + key + ".")


def _closest(name: str, keys: Sequence[str]) -> str:
    close = closest(name, keys, cutoff=0.0)
    return f"did you mean config.{close}?" if close else "see the config file"


def _set(config: ConfigDict, name: str, text: str) -> None:
    """Set `name` to the value `text` means for the type that the key has."""
    *parents, last = name.split(".")
    for n, parent in enumerate(parents, 1):
        config = config.get(parent)
        if not isinstance(config, ConfigDict):
            above = ".".join(parents[:n])
            raise ConfigError(f"config.{name}: config.{above} holds no keys to set one of")
    old = config.get(last)
    if isinstance(old, ConfigDict):
        raise ConfigError(f"config.{name}: it holds keys ({', '.join(old)}); set one of them")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text, text)
    if isinstance(old, str) or (last in config and config.get_type(last) is str):
        value = text
    if isinstance(old, tuple) and not isinstance(value, tuple):
        value = tuple(value) if isinstance(value, list) else (value,)
    try:
        with config.unlocked():
            config[last] = value
    except TypeError:
        raise ConfigError(
            f"config.{name}: {text!r} is not of type {type(old).__name__} (now {old!r})"
        ) from None


def stop_with_one_line(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Run `main`; a user's mistake ends in one line and status 2, a defect in its traceback.

    `JAXMODELS_TRACEBACK=1` shows where a one-line error came from.
    """
    try:
        return main(argv)
    except (ConfigError, ImportError, OSError, ValueError, ArithmeticError) as error:
        if os.environ.get("JAXMODELS_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, ArithmeticError) else 2
