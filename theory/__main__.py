"""`python -m theory --config configs/dmf.py:PRESET --workdir DIR [--config.key=value]`."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

# One XLA device a core, so that sweeps use them all; must be set before the backend starts.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={CORES or 1}"
    ).strip()

import jax
from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/dmf.py:PRESET")
WORKDIR = flags.DEFINE_string("workdir", None, "directory for everything the run makes")


def parse(argv: Sequence[str]) -> list[str]:
    """Positional words of the command line; the flags are read on the way.

    Raises ValueError with one line for a wrong flag, key, value, preset or file.
    """
    app.define_help_flags()
    try:
        rest = flags.FLAGS(argv)
        config = CONFIG.value
        if config is not None:
            config.keys()  # a file that could not be loaded says so at its first use
    except (flags.Error, AttributeError, KeyError, OSError, ValueError, TypeError) as error:
        raise ValueError(_one_line(error, argv)) from None
    if config is None or WORKDIR.value is None:
        missing = "--config configs/dmf.py:PRESET" if config is None else "--workdir DIR"
        raise ValueError(f"{missing} is missing")
    return rest


def _one_line(error: Exception, argv: Sequence[str]) -> str:
    """What absl and ml_collections say in several lines or in a traceback."""
    text = str(error)
    if isinstance(error, AttributeError):  # ml_collections: 'rnk' Did you mean "rank" instead ...
        key = re.search(r"'([\w.]+)'", text.replace("\\", ""))
        near = re.search(r'Did you mean "(\w+)"', text)
        hint = f"; did you mean config.{near[1]}?" if near else ""
        return f"--config.{key[1] if key else text}: no such key{hint}"
    presets = re.findall(r"config: (unknown preset '.*)", text)
    if presets:
        return f"--config: {presets[-1]}"
    if "No such file or directory" in text:
        named = [word for word in argv[1:] if ".py" in word]
        name = named[0].removeprefix("--config=").partition(":")[0] if named else "the file"
        return f"--config: no file {name!r}; theory's is configs/dmf.py:PRESET"
    return " ".join(text.split())


def main() -> int:
    """Run the preset of the command line; 2 for a mistake in it, 130 when stopped."""
    try:
        rest = parse(sys.argv)
        if len(rest) > 1:
            raise ValueError(f"unexpected argument {rest[1]!r}; set keys by --config.key=value")
        jax.config.update("jax_enable_x64", True)
        from theory import presets

        workdir = Path(WORKDIR.value)
        presets.execute(CONFIG.value, workdir, lambda text: print(text, file=sys.stderr))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; start the same command to go on", file=sys.stderr)
        return 130
    report = workdir / "report.md"
    if report.exists():
        print(report.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
