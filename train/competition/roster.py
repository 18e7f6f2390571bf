"""The networks of a track: trained once by the project's loop, checked, then used frozen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from train.command_line import read_flags
from train.naming import ConfigError


@dataclasses.dataclass(frozen=True)
class Member:
    """A trained network: its config, task, variables and the numbers it reached."""

    name: str
    config: Any
    task: Any
    variables: Any
    numbers: dict[str, float]


def train_members(entries: Iterable[Mapping[str, Any]], workdir: Path) -> list[Member]:
    """Members of the rules' entries `{name, config, set, require, limit}`.

    `config` is FILE:PRESET, `set` flags without `--config.`, `require` numbers that must be reached
    and `limit` numbers that must not be exceeded: a victim that does not work is no victim. A
    finished member is not trained again.

    Raises ConfigError naming the member and the number it missed.
    """
    return [_member(entry, workdir / "members" / entry["name"]) for entry in entries]


def member_config(entry: Mapping[str, Any], workdir: Path) -> Any:
    """The config of an entry of the rules."""
    flags = [f"--config.{key}={value}" for key, value in (entry.get("set") or {}).items()]
    config, _ = read_flags(
        ["competition", f"--config={entry['config']}", *flags, f"--workdir={workdir}"],
        need_workdir=True,
    )
    return config


def _member(entry: Mapping[str, Any], workdir: Path) -> Member:
    from train.building import build_task
    from train.checkpoints import load_params
    from train.loop import fit

    config = member_config(entry, workdir)
    done = workdir / "numbers.json"
    settings = json.loads(json.dumps(config.to_dict(), default=str))
    numbers = None
    if done.is_file():
        stored = json.loads(done.read_text())
        if stored["config"] != settings:
            raise ConfigError(
                f"{workdir}: {entry['name']} was trained with other settings; remove the folder "
                "or take another --workdir"
            )
        numbers = stored["numbers"]
    if numbers is None:
        numbers = fit(config, workdir, command=f"member {entry['name']} of a competition")
        if not numbers:
            raise ConfigError(f"{workdir}: stopped; the same command goes on")
        part = done.with_name("numbers.json.part")
        part.write_text(json.dumps({"config": settings, "numbers": numbers}, indent=2) + "\n")
        part.replace(done)
    for name, least in (entry.get("require") or {}).items():
        if not numbers.get(name, float("-inf")) >= least:
            raise ConfigError(
                f"{entry['name']}: {name} is {numbers.get(name)}, the rules require {least}"
            )
    for name, most in (entry.get("limit") or {}).items():
        if not numbers.get(name, float("inf")) <= most:
            raise ConfigError(
                f"{entry['name']}: {name} is {numbers.get(name)}, the rules allow {most}"
            )
    return Member(entry["name"], config, build_task(config), load_params(workdir), numbers)
