"""`python -m train.challenge --config configs/biomedical.py:pipeline --workdir DIR`.

From a folder of images and labels to a submission: fingerprint, plan, preprocessing, training by
folds, out-of-fold predictions, ensemble, post-processing, test predictions, metrics and ranking.
`--config.data.options.path=FOLDER` is a raw folder in nnU-Net's layout; without one a small
challenge of corrupted coins is written and solved. Every stage resumes, and runs again only when
its settings or what it reads change. The result is `DIR/test/submission` and
`DIR/report/report.md`.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from jaxmodels.platform_choice import choose_platform

choose_platform()

from train.command_line import read_flags, stop_with_one_line  # noqa: E402
from train.naming import ConfigError  # noqa: E402


def main(argv: list[str]) -> int:
    """Run every stage that is not finished; print the final numbers."""
    config, workdir = read_flags(argv, need_workdir=True)
    if "challenge" not in config:
        raise ConfigError("config.challenge is missing: take the preset `pipeline`")
    from train.challenge_stages import stages_of_challenge
    from train.process import prepare_process
    from train.progression import run_stages

    prepare_process()
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "train.challenge", *argv[1:]])
    done = run_stages(stages_of_challenge(config, command), workdir)
    if done is None:
        return 0
    print((workdir / "report" / "report.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(stop_with_one_line(main, sys.argv))
