"""What the ids of a run mean: kept in its folder, and compared with the data that meet it later.

Small vocabularies are learned from installed packages or from a history, which change, while the
rows of a trained embedding go on meaning the pieces that they were trained with. Of a data family
that tells its symbols (`train.data.pipeline`) a run keeps them in `WORKDIR/vocabulary`, beside the
files of its tokenizer.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from train.data import pipeline
from train.naming import ConfigError

FOLDER, LISTING = "vocabulary", "symbols.json"


def keep(workdir: str | os.PathLike, config, write: bool = True) -> None:
    """Write the vocabulary of the config's data into a run's folder, where it has one.

    With `write` false (of several processes one writes) it is compared alone.

    Raises `ConfigError` where another one is there, and where that of the run in `init_from` gives
    an id another meaning.
    """
    family, options = pipeline.resolve(config.data)
    if not hasattr(family, "symbols"):
        return
    check(config)
    symbols = list(family.symbols(options))
    folder = Path(workdir) / FOLDER
    known = _kept(workdir)
    if known is not None and known != symbols:
        other = f"; choose another --workdir, with --config.init_from={workdir}"
        raise ConfigError(
            f"{folder} is not the vocabulary of these data: they have changed since the run began"
            f"{other if 'tokenizer' in options else ''}"
        )
    if folder.is_dir() or not write:
        return
    part = folder.with_name(f"{FOLDER}.part")
    part.mkdir(parents=True, exist_ok=True)
    if hasattr(family, "save_vocabulary"):
        family.save_vocabulary(options, part)
    (part / LISTING).write_text(json.dumps(symbols, ensure_ascii=False), "utf-8")
    part.replace(folder)


def check(config) -> None:
    """Raises `ConfigError` where the run in `init_from` has other symbols than the config's data.

    More on either side are no error: rows are added for tokens of a task, and left unused.
    """
    family, options = pipeline.resolve(config.data)
    known = _kept(config.init_from) if config.init_from else None
    if known is None or not hasattr(family, "symbols"):
        return
    symbols = family.symbols(options)
    first = next((i for i, (a, b) in enumerate(zip(known, symbols)) if a != b), None)
    if first is not None:
        raise ConfigError(
            f"config.init_from: {config.init_from} has another vocabulary than these data: token "
            f"{first} is {known[first]!r} there and {symbols[first]!r} here"
        )


def read_with(config) -> None:
    """Let a config that starts from a run read text with the run's tokenizer, if it names none."""
    folder = Path(config.init_from or "") / FOLDER
    if not config.init_from or not folder.is_dir():
        return
    options = pipeline.resolve(config.data)[1]
    files = [file for file in folder.iterdir() if file.name != LISTING]
    if files and options.get("tokenizer", "") is None:
        with config.unlocked():
            config.data.options.tokenizer = str(folder)


def _kept(run: str | os.PathLike) -> list[str] | None:
    listing = Path(run) / FOLDER / LISTING
    return json.loads(listing.read_text("utf-8")) if listing.is_file() else None
