"""Where edits come from: Python's own sources, git histories, and the published files."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import io
import re
import subprocess
import tokenize
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxmodels.language import edit_plans
from train.data import python_sources
from train.naming import nearest

SPLITS = ("train", "valid", "test")
# Endings of a split's files: input and output, as published for training or raw; what is published
# may have the new text beside them.
ENDINGS = ("buggy", "fixed")
NEW = "seq"
FOLDERS = {"published": "CoditT5", "raw": "raw_data"}
DATASETS = ("comment-update", "code-review", "bf-small", "bf-medium", "pretrain")
_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


@dataclasses.dataclass(frozen=True)
class Text:
    """A text of words joined by blanks, the file it is from, and what stands beside it.

    `new` is what it became, "" where edits are made up from `text`; `modality` is "code" or "nl".
    """

    file: str
    text: str
    context: str = ""
    new: str = ""
    modality: str = "code"


def split_of(file: str) -> str:
    """The split of everything in a file, by its name: 80 % train, 10 % valid, 10 % test."""
    draw = zlib.crc32(file.encode()) % 10
    return {0: "test", 1: "valid"}.get(draw, "train")


def code_words(source: str) -> list[list[str]]:
    """Words of every logical line of Python source; comments and layout are left out.

    A file that does not tokenize ends where it stops doing so.
    """
    lines: list[list[str]] = [[]]
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.NEWLINE:
                lines.append([])
            elif token.type not in _LAYOUT:
                lines[-1].append(token.string)
    except (tokenize.TokenError, IndentationError, SyntaxError):
        pass
    return [line for line in lines if line]


def words_of(text: str) -> list[str]:
    """Names, numbers and single marks of any text."""
    return re.findall(r"\w+|[^\w\s]", text)


def _is_plain(words: Sequence[str], least: int, most: int) -> bool:
    return least <= len(words) <= most and all(
        w.isascii() and not re.search(r"\s", w) for w in words
    )


def statements(
    packages: Sequence[str], *, least: int = 5, most: int = 16, limit: int = 0
) -> Iterator[Text]:
    """Statements of `least` to `most` words, each once, with the statement before as context."""
    seen, count = set(), 0
    for module, path in python_sources.python_files(packages):
        try:
            lines = code_words(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
        before = ""
        for words in lines:
            text = " ".join(words)
            if _is_plain(words, least, most) and text not in seen:
                seen.add(text)
                yield Text(module, text, before)
                count += 1
                if count == limit:
                    return
            before = text if _is_plain(words, 1, most) else ""


def passages(
    packages: Sequence[str], *, least: int = 5, most: int = 32, limit: int = 0
) -> Iterator[Text]:
    """Pre-training texts of `least` to `most` words: runs of a function's statements, sentences."""
    count = 0
    for found in python_sources.definitions(packages):
        texts: list[tuple[str, list[str]]] = []
        if found.kind == "function":
            run: list[str] = []
            for words in code_words(_without_docstring(found.source)):
                if run and len(run) + len(words) > most:
                    texts.append(("code", run))
                    run = []
                run = run + words
            texts.append(("code", run))
        for sentence in re.split(r"(?<=[.:])\s+", found.docstring):
            texts.append(("nl", words_of(sentence)))
        for modality, words in texts:
            # Code of 11 to 13 words cannot be corrupted: more spans than kept words.
            if _is_plain(words, least if modality == "nl" else 14, most):
                yield Text(found.module, " ".join(words), modality=modality)
                count += 1
                if count == limit:
                    return


def _without_docstring(source: str) -> str:
    try:
        body = ast.parse(source.lstrip()).body[0].body
    except (SyntaxError, IndentationError, AttributeError, IndexError):
        return source
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
        lines = source.splitlines(keepends=True)
        return "".join(lines[: first.lineno - 1] + lines[first.end_lineno :])
    return source


def git_head(repository: str | Path) -> str:
    """Commit that a repository's HEAD stands at. Raises ValueError for what is none."""
    return _git(repository, "rev-parse", "HEAD").strip()


def git_edits(
    repository: str | Path, *, least: int = 4, most: int = 24, limit: int = 0, suffix: str = ".py"
) -> Iterator[Text]:
    """Small edits of a history, newest first: replaced lines, with the commit's subject as context.

    A hunk counts when up to three lines became up to three others, both of `least` to `most` words
    and more alike than not; each pair once.
    """
    log = _git(
        repository, "log", "--no-merges", "--no-color", "-p", "-U0", "--format=%x01%s", "--",
        f"*{suffix}",
    )  # fmt: skip
    seen, count = set(), 0
    for commit in log.split("\x01")[1:]:
        subject, _, diff = commit.partition("\n")
        for part in diff.split("\ndiff --git "):
            name = re.search(r"^\+\+\+ b/(.*)$", part, re.MULTILINE)
            for hunk in re.split(r"^@@.*$", part, flags=re.MULTILINE)[1:]:
                old, new = ([] for _ in range(2))
                for line in hunk.split("\n"):
                    if line.startswith(("-", "+")):
                        (old if line[0] == "-" else new).append(line[1:])
                if not (name and 1 <= len(old) <= 3 and 1 <= len(new) <= 3):
                    continue
                pair = [words_of(" ".join(side)) for side in (old, new)]
                texts = [" ".join(words) for words in pair]
                if (
                    texts[0] != texts[1]
                    and all(_is_plain(words, least, most) for words in pair)
                    and tuple(texts) not in seen
                    and difflib.SequenceMatcher(None, *pair).ratio() > 0.5
                ):
                    seen.add(tuple(texts))
                    context = " ".join(words_of(subject)[:most])
                    yield Text(name[1], texts[0], context, texts[1])
                    count += 1
                    if count == limit:
                        return


def _git(repository: str | Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments], capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        reason = said.decode("utf-8", "replace").strip().splitlines()
        raise ValueError(
            f"data.options.repository {str(repository)!r} is no readable git repository "
            f"({reason[-1] if reason else 'git failed'})"
        ) from None
    return done.stdout.decode("utf-8", "replace")


def split_files(
    path: str | Path | None, dataset: str, split: str, kind: str = "published"
) -> list[Path]:
    """The files `{dataset}/{split}.{dataset}.ENDING` of a split, that of `NEW` where it is there.

    They are below `path`, or below its folder `CoditT5` (kind "published") or `raw_data` ("raw").

    Raises ValueError for an unknown data set, FileNotFoundError.
    """
    if dataset not in DATASETS:
        raise ValueError(f"data.options.dataset: no {dataset!r}; {nearest(dataset, DATASETS)}")
    if not path:
        raise FileNotFoundError(
            f"data.options.path: the folder of the {kind} data is wanted ({FOLDERS[kind]}/ "
            "inside it)"
        )
    homes = [Path(path) / FOLDERS[kind] / dataset, Path(path) / dataset]
    home = next((h for h in homes if h.is_dir()), None)
    if home is None:
        raise FileNotFoundError(f"data.options.path {path}: neither {homes[0]} nor {homes[1]}")
    files = [home / f"{split}.{dataset}.{ending}" for ending in ENDINGS]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing")
    beside = home / f"{split}.{dataset}.{NEW}"
    return [*files, beside] if kind == "published" and beside.is_file() else files


def published(
    path: str | Path | None, dataset: str, split: str, kind: str = "published"
) -> tuple[list[str], ...]:
    """(inputs, plans with targets, targets), one line an example; of raw data (inputs, targets).

    Targets without a file of their own are what stands behind the plans.

    Raises ValueError for an unknown data set and for files of different length, FileNotFoundError.
    """
    files = split_files(path, dataset, split, kind)
    lines = {file.name: lines_of(file) for file in files}
    counts = {name: len(found) for name, found in lines.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"{files[0].parent}: line counts differ: "
            + ", ".join(f"{n} in {f}" for f, n in counts.items())
        )
    found = list(lines.values())
    if kind == "published" and len(found) == len(ENDINGS):
        found.append([" ".join(edit_plans.split_prediction(line)[0]) for line in found[1]])
    return tuple(found)


def lines_of(path: str | Path) -> list[str]:
    """Lines of a file. Only a newline ends one: sources hold other separators inside strings.

    Bytes that are no UTF-8 become U+FFFD, as in the published reader.
    """
    text = Path(path).read_bytes().decode("utf-8", "replace")
    return text.removesuffix("\n").split("\n")
