"""`python -m train.competition TRACK --workdir DIR [--rules FILE] [--submission DIR]`.

TRACK is deepfake, driving or face. Without a submission the track's networks are trained (once),
the attack or defense of the rules runs, writes `DIR/submission`, and is scored. With one, only the
scoring is done. Rules default to `configs/rules/TRACK.yaml`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from jaxmodels.platform_choice import choose_platform

choose_platform()

from train.command_line import stop_with_one_line  # noqa: E402
from train.naming import ConfigError, nearest  # noqa: E402

TRACKS = ("deepfake", "driving", "face")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ConfigError(f"{message}; usage: {' '.join(self.format_usage().split()[1:])}")


def main(argv: list[str]) -> int:
    """Run or score one track and print its table."""
    from train.process import prepare_process

    parser = _Parser(prog="python -m train.competition")
    parser.add_argument("track")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--rules")
    parser.add_argument("--submission")
    arguments = parser.parse_args(argv[1:])
    if arguments.track not in TRACKS:
        raise ConfigError(f"no track {arguments.track!r}; {nearest(arguments.track, TRACKS)}")
    rules = read_rules(arguments.rules or f"configs/rules/{arguments.track}.yaml")
    from train.competition.rules import check_rules

    check_rules(arguments.track, rules)
    prepare_process()
    workdir = Path(arguments.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    track = importlib.import_module(f"train.competition.{arguments.track}")
    if arguments.submission:
        numbers = track.score(rules, workdir, Path(arguments.submission))
    else:
        numbers = track.attempt(rules, workdir, workdir / "submission")
    width = max(map(len, numbers))
    for name, value in numbers.items():
        print(f"{name:<{width}}  {value:.4f}")
    part = workdir / "score.json.part"
    part.write_text(json.dumps(numbers, indent=2) + "\n")
    part.replace(workdir / "score.json")
    return 0


def read_rules(path: str) -> dict:
    """A track's rules, a YAML mapping."""
    import yaml

    try:
        rules = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--rules {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--rules {path}: {' '.join(str(error).split())}") from None
    if not isinstance(rules, dict):
        raise ConfigError(f"--rules {path}: not a mapping")
    return rules


if __name__ == "__main__":
    sys.exit(stop_with_one_line(main, sys.argv))
