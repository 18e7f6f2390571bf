"""The manifest of a checkpoint, and what it says about the files beside it."""

import errno
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def candidates(directory: Path) -> list[tuple[int, Path]]:
    """Directories that may hold a finished checkpoint, by step."""
    found = {}
    for path in directory.iterdir():
        match = re.fullmatch(r"(\d+)(\.replaced)?", path.name)
        # `.replaced` counts alone: the run was killed between the two renames of a replacement.
        if match and not (match[2] and (directory / match[1]).exists()):
            found[int(match[1])] = path
    return sorted(found.items())


def newest_sound(
    directory: Path,
) -> tuple[Path | None, dict[str, Any], list[tuple[Path, int, str]]]:
    """The newest sound one, its manifest, and `(path, step, problem)` of those passed over."""
    problems = []
    readable = []
    for step, path in candidates(directory):
        manifest, problem = examine(path, contents=False)
        if problem:
            problems.append((path, step, problem))
        else:
            readable.append((manifest["serial"], step, path))
    for path in directory.iterdir():
        match = re.fullmatch(r"(\d+)\.(unfinished|orbax-checkpoint-tmp.*)", path.name)
        if match:
            problem = f"{path.name} was never finished (the run ended while it was being written)"
            problems.append((path, int(match[1]), problem))
    for _, step, path in sorted(readable, reverse=True):
        manifest, problem = examine(path)
        if not problem:
            return path, manifest, problems
        problems.append((path, step, problem))
    return None, {}, problems


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises ValueError or OSError unless the manifest is there to the last bit."""
    raw = (path / MANIFEST).read_bytes()
    try:
        manifest = json.loads(raw)["manifest"]
        sound = render(manifest) == raw
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{MANIFEST} is damaged (its own checksum does not match)")
    return manifest


def examine(path: Path, *, contents: bool = True) -> tuple[dict[str, Any], str | None]:
    """Returns the manifest and what is wrong with the checkpoint, if anything.

    With `contents`, every byte is read and compared with its checksum.
    """
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        return {}, f"it was never finished ({MANIFEST} is missing)"
    except OSError as error:
        return {}, f"{MANIFEST} cannot be read: {one_line(error)}"
    except ValueError as error:
        return {}, str(error)
    if str(manifest["step"]) != path.name.partition(".")[0]:
        return {}, f"its {MANIFEST} is that of step {manifest['step']}"

    def fault(name: str) -> str | None:
        expected = manifest["files"][name]
        try:
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                kind = "truncated" if size < expected["bytes"] else "too long"
                return f"{name} is {kind} ({size} bytes of {expected['bytes']})"
            if contents and _digest(path / name) != expected["sha256"]:
                return f"{name} is damaged (its SHA-256 does not match {MANIFEST})"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {one_line(error)}"
        return None

    if not contents:
        return manifest, next((f for f in map(fault, manifest["files"]) if f), None)
    with ThreadPoolExecutor(8) as pool:
        return manifest, next((f for f in pool.map(fault, manifest["files"]) if f), None)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_through_and_digest(path: Path) -> tuple[int, str]:
    """Returns size in bytes and SHA-256 of a file, once the disk has it."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return file.tell(), digest


def write_directory_through(path: Path) -> None:
    """Returns once the disk has the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def render(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest file: the only ones that `read_manifest` accepts for it."""
    body = json.dumps(manifest, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{{"sha256": "{digest}",\n"manifest": {body}}}\n'.encode()


def one_line(error: BaseException) -> str:
    """The cause of an error without its traceback, path or further lines."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    if "No space left" in text:
        return os.strerror(errno.ENOSPC)
    return (text.strip().splitlines() or [type(error).__name__])[0][:300]
