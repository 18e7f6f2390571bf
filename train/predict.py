"""`python -m train.predict --config FILE --checkpoint DIR_OR_FILE --input PATH --output PATH`."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from jaxmodels.platform_choice import choose_platform

choose_platform()

from train.command_line import read_flags, stop_with_one_line  # noqa: E402
from train.naming import ConfigError  # noqa: E402

FLAGS = {
    "checkpoint": "a run directory of ours or a PyTorch checkpoint file",
    "input": "what to predict on",
    "output": "the file to write",
}


def main(argv: list[str]) -> int:
    """Load a checkpoint and write the task's predictions: CSV, or files of the task's own."""
    config, paths = read_flags(argv, need_workdir=False, strings=FLAGS)
    from train.initialization import starting_variables
    from train.loop import Plan, compilation_cache

    compilation_cache()
    if not Path(paths["input"]).exists():
        raise ConfigError(f"--input {paths['input']}: no such file or directory")
    with config.unlocked():
        config.init_from = paths["checkpoint"]
    plan = Plan(config)
    if not hasattr(plan.task, "predict") and not hasattr(plan.task, "predict_files"):
        raise ConfigError(f"config.task {config.task}: this task has no prediction procedure")
    params, extra = starting_variables(config, plan.abstract, plan.task, plan.make)
    variables = {"params": params, **extra}
    if hasattr(plan.task, "predict_files"):
        print(plan.task.predict_files(variables, paths["input"], paths["output"], config))
        return 0
    rows = plan.task.predict(variables, paths["input"], config)
    output = Path(paths["output"])
    part = output.with_name(output.name + ".part")
    with open(part, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    part.replace(output)
    print(f"{len(rows) - 1} predictions in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(stop_with_one_line(main, sys.argv))
