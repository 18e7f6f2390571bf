"""Finished runs in a file, so that a stopped study goes on, and what they say over seeds."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxmodels.retrieval.metrics import interval


def read(path: Path) -> list[dict]:
    """All rows of a `.csv` (values are strings) or `.jsonl` file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            return list(csv.DictReader(file))
        return [json.loads(line) for line in file]


def append(path: Path, *rows: Mapping) -> None:
    """Add rows; the first of a `.csv` file names its columns, which all of them have.

    Raises ValueError for a row with other columns than the file's.
    """
    if path.suffix != ".csv":
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return
    fresh = not path.exists() or not path.stat().st_size
    columns = list(rows[0])
    if not fresh:
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file))
    for row in rows:
        if set(row) != set(columns):
            raise ValueError(f"{path} has columns {columns}, not {list(row)}")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def mean(values: Sequence[float], form: str, scale: float = 1.0) -> str:
    """`mean ± half` of Student's 95 % interval over runs; one value alone; "" where none is."""
    values = [scale * float(v) for v in values]
    if len(values) < 2:
        return format(values[0], form) if values else ""
    middle, half = interval(values)
    return f"{middle:{form}} ± {half:{form}}"
