"""`python -m train --config configs/NAME.py[:preset] --workdir DIR [--config.key=value ...]`."""

from __future__ import annotations

import shlex
import sys

from jaxmodels.platform_choice import choose_platform

choose_platform()

from train.command_line import read_flags, stop_with_one_line  # noqa: E402


def main(argv: list[str]) -> int:
    """Parse, then train, evaluate, or only plan."""
    config, workdir = read_flags(argv, need_workdir=True)
    if config.dry_run:
        from train.dry_run import dry_run

        print(dry_run(config, argv))
        return 0
    from train.loop import fit
    from train.parallel import start_processes
    from train.process import prepare_process

    start_processes(config.parallel)

    prepare_process()
    command = shlex.join(["python", "-m", "train", *argv[1:]])
    if config.order:
        from train.progression import run_progression

        run_progression(config, workdir, command=command)
    else:
        fit(config, workdir, command=command)
    return 0


if __name__ == "__main__":
    sys.exit(stop_with_one_line(main, sys.argv))
