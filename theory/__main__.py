"""`python -m theory --config configs/dmf.py:PRESET --workdir DIR [--config.key=value]`."""

import os
import sys
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


def main(argv: list[str]) -> None:
    """Run the preset of the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; set keys by --config.key=value")
    jax.config.update("jax_enable_x64", True)
    from theory import presets

    workdir = Path(WORKDIR.value)
    try:
        presets.execute(CONFIG.value, workdir, lambda text: print(text, file=sys.stderr))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; start the same command to go on", file=sys.stderr)
        sys.exit(130)
    report = workdir / "report.md"
    if report.exists():
        print(report.read_text(encoding="utf-8"))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
