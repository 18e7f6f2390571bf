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
    "input": "what to predict on; `test`, where a task knows it, is its own test split",
    "output": "the file or folder to write",
}


def load_run(argv: list[str]) -> tuple:
    """Config, paths, task and variables of a checkpoint, from the command line of `FLAGS`.

    Raises `ConfigError` where the input is not there or the task has no prediction procedure.
    """
    config, paths = read_flags(argv, need_workdir=False, strings=FLAGS)
    from train.initialization import starting_variables
    from train.loop import Plan
    from train.process import prepare_process

    prepare_process()
    missing = not Path(paths["input"]).exists()
    if missing and paths["input"] != "test":
        raise ConfigError(f"--input {paths['input']}: no such file or directory")
    predict_from(config, paths["checkpoint"])
    plan = Plan(config)
    if not hasattr(plan.task, "predict") and not hasattr(plan.task, "predict_files"):
        raise ConfigError(f"config.task {config.task}: this task has no prediction procedure")
    if missing and not getattr(plan.task, "predicts_test", False):
        raise ConfigError(f"--input test: no such file, and {config.task} predicts files alone")
    params, extra = starting_variables(config, plan.abstract, plan.task, plan.make)
    return config, paths, plan.task, {"params": params, **extra}


def predict_from(config, checkpoint: str) -> None:
    """Let a config start from `checkpoint`.

    A run of ours is taken whole: what its training left out of another checkpoint (`init_skip`) it
    has learned itself.
    """
    with config.unlocked():
        config.init_from = checkpoint
        if Path(checkpoint).is_dir():
            config.init_skip = ""


def main(argv: list[str]) -> int:
    """Load a checkpoint and write the task's predictions: CSV, or files of the task's own."""
    config, paths, task, variables = load_run(argv)
    output = Path(paths["output"])
    if hasattr(task, "predict_files"):
        print(task.predict_files(variables, paths["input"], output, config))
        return 0
    rows = task.predict(variables, paths["input"], config)
    part = output.with_name(output.name + ".part")
    with open(part, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    part.replace(output)
    print(f"{len(rows) - 1} predictions in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(stop_with_one_line(main, sys.argv))
