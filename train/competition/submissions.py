"""Reading a submission folder, and refusing what is not one before any score is computed."""

from __future__ import annotations

import csv
import datetime
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HEAD = "submission.json"
SHOWN = 5
MOST_CLUSTERS = 2**31  # ids are below
# What NumPy raises on files that are not what they are called.
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error)


class SubmissionError(ValueError):
    """A submission that cannot be scored; lists the first five offenders."""


def refuse(problems: Sequence[str]) -> None:
    """Raise a SubmissionError of all problems, if there are any."""
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise SubmissionError("submission refused: " + "; ".join(problems[:SHOWN]) + more)


def write_head(folder: Path, track: str, **entries: Any) -> None:
    """`submission.json`: the track, the time, and what else the track wants to say."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat()
    text = json.dumps({"track": track, "submitted_at": now, **entries}, indent=2) + "\n"
    (folder / HEAD).write_text(text)


def read_head(folder: Path, track: str, deadline: Any) -> dict[str, Any]:
    """The head of a submission that is of this track and in time.

    `deadline` is an ISO date and time (or what YAML made of it), None for none.
    """
    if not folder.is_dir():
        raise SubmissionError(f"submission refused: no folder {folder}")
    try:
        head = json.loads((folder / HEAD).read_text(encoding="utf-8"))
        submitted = read_time(head["submitted_at"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SubmissionError(f"submission refused: {HEAD} is unreadable ({error})") from None
    if head.get("track") != track:
        raise SubmissionError(f"submission refused: it is for track {head.get('track')!r}")
    if deadline is not None and submitted > read_time(deadline):
        raise SubmissionError(
            f"submission refused: late, {submitted} is after {read_time(deadline)}"
        )
    return head


def read_time(value: Any) -> datetime.datetime:
    """An ISO date and time (or what YAML made of it), UTC where it names no zone."""
    found = value if isinstance(value, datetime.datetime) else None
    if found is None:
        found = datetime.datetime.fromisoformat(str(value))
    return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)


def check_files(folder: Path, wanted: Sequence[str]) -> None:
    """Exactly the wanted files, and the head, are there."""
    present = {p.name for p in folder.iterdir()} - {HEAD}
    problems = [f"missing {name}" for name in wanted if name not in present]
    problems += [f"unexpected {name}" for name in sorted(present - set(wanted))]
    refuse(problems)


def read_images(folder: Path, wanted: Sequence[str], shape: tuple[int, ...]) -> np.ndarray:
    """float32 images [N, H, W, 3] of 0..255 from `.npy` files, each of this very shape and type."""
    check_files(folder, wanted)
    images, problems = [], []
    for name in wanted:
        try:
            # Mapped: a header that promises more than the file holds allocates nothing.
            image = np.load(folder / name, mmap_mode="r", allow_pickle=False)
        except _UNREADABLE as error:
            problems.append(f"{name}: unreadable ({error})")
            continue
        if not isinstance(image, np.ndarray):
            problems.append(f"{name}: unreadable (not one array)")
        elif image.dtype != np.float32:
            problems.append(f"{name}: dtype {image.dtype}, not float32")
        elif image.shape != shape:
            problems.append(f"{name}: shape {image.shape}, not {shape}")
        elif not np.isfinite(image).all():
            problems.append(f"{name}: {int((~np.isfinite(image)).sum())} pixels are not finite")
        elif image.min() < 0 or image.max() > 255:
            problems.append(f"{name}: pixels from {image.min():g} to {image.max():g}, not 0..255")
        else:
            images.append(np.array(image))
    refuse(problems)
    # What a camera's file can hold.
    return np.rint(np.stack(images)).astype(np.float32)


def check_budget(
    names: Sequence[str],
    images: np.ndarray,
    originals: np.ndarray,
    *,
    eps: float | None = None,
    mask: np.ndarray | None = None,
    norm: str = "linf",
    must_change: bool = False,
    slack: float = 0.5,
) -> np.ndarray:
    """Distances [N] in the unit of the budget, after 8-bit rounding.

    `linf`: largest change; `l2`: root mean square; with a mask: changes outside it are offenses
    and the distance is the mask's area. `slack` is half an 8-bit step.
    """
    delta = images - np.rint(originals)
    problems = []
    if mask is not None:
        outside = np.abs(delta * (1 - mask)).reshape(len(delta), -1).max(-1)
        distances = np.full(len(delta), float(mask.mean()))
        problems += [
            f"{n}: changed by {d:g} outside the mask" for n, d in zip(names, outside) if d > slack
        ]
    else:
        flat = delta.reshape(len(delta), -1)
        largest, rms = np.abs(flat).max(-1), np.sqrt(np.square(flat).mean(-1))
        distances = largest if norm == "linf" else rms
        problems += [
            f"{n}: distance {d:.3g} exceeds the budget {eps:g}"
            for n, d in zip(names, distances)
            if d > eps + slack
        ]
    if must_change:
        still = ~np.any(delta.reshape(len(delta), -1), axis=-1)
        problems += [f"{n}: the image is unchanged" for n, s in zip(names, still) if s]
    refuse(problems)
    return distances


def read_clusters(
    folder: Path, wanted: Sequence[str], file: str = "clusters.csv", *, most: int | None = None
) -> np.ndarray:
    """int [N]: the cluster id of every wanted image, from rows (image, cluster).

    More than `most` different ids are refused: one cluster an image is no attribution, yet mutual
    information pays it.
    """
    check_files(folder, [file])
    found: dict[str, int] = {}
    problems = []
    try:
        with open(folder / file, newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))
    except (OSError, ValueError, csv.Error) as error:
        raise SubmissionError(f"submission refused: {file} is unreadable ({error})") from None
    if not rows or rows[0] != ["image", "cluster"]:
        refuse([f"{file}: the first line must be image,cluster"])
    for i, row in enumerate(rows[1:], 2):
        if len(row) != 2 or not row[1].strip().isdecimal():
            problems.append(f"line {i}: {','.join(row)[:80]!r} is not image,cluster >= 0")
        elif len(row[1].strip()) > 10 or int(row[1]) >= MOST_CLUSTERS:
            problems.append(f"line {i}: cluster {row[1].strip()[:20]} is not below {MOST_CLUSTERS}")
        elif row[0] in found:
            problems.append(f"line {i}: {row[0]} stands twice")
        else:
            found[row[0]] = int(row[1])
    problems += [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {name}" for name in sorted(set(found) - set(wanted))]
    different = len(set(found.values()))
    if most is not None and different > most:
        problems.append(f"{different} clusters, the rules allow {most}")
    refuse(problems)
    return np.asarray([found[name] for name in wanted])


def read_arrays(
    folder: Path, file: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """float32 arrays of an `.npz` file, exactly these names and shapes, all finite."""
    try:
        stored = np.load(folder / file, mmap_mode="r", allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("not an archive of arrays")
        with stored:
            arrays = {name: stored[name] for name in stored.files}
    except _UNREADABLE as error:
        raise SubmissionError(f"submission refused: {file} is unreadable ({error})") from None
    problems = [f"{file}: missing {name}" for name in shapes if name not in arrays]
    problems += [f"{file}: unexpected {name}" for name in sorted(set(arrays) - set(shapes))]
    for name, shape in shapes.items():
        if name not in arrays:
            continue
        array = arrays[name]
        if array.dtype != np.float32 or array.shape != shape:
            problems.append(f"{name}: {array.dtype} {array.shape}, not float32 {shape}")
        elif not np.isfinite(array).all():
            problems.append(f"{name}: not finite")
    refuse(problems)
    return arrays
