"""Files of MS MARCO, TREC Deep Learning, Natural Questions and BEIR, as they are published.

| file | lines |
|---|---|
| corpus, `rocketqa` | `id title text`, tab-separated |
| corpus, `capstone` | `id text title` |
| corpus, `psgs` | `id+1 text title`: ids are one higher than everywhere else |
| corpus, `beir` | JSON with `_id`, `title` (may be missing), `text` |
| queries | `qid query`, tab-separated; in `.jsonl` files JSON with `_id`, `text` |
| judgments | `qid 0 docid grade` (tabs or blanks) or `qid docid` |
| judgments, BEIR's | a header, then `qid docid grade` |
| triples | `qid positive negative` |
| pseudo queries | `docid q1 q2 ...`, tab-separated |
| run | `qid Q0 docid rank score tag`, blank-separated |
| training JSON | `question`, `positive_ctxs`, ...; or `query_id`, `pos_id`, `neg_id` |
"""

from __future__ import annotations

import ast
import csv
import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxmodels.retrieval.metrics import Judgments, Run

# Layout -> columns of title and text; BEIR's lines are JSON.
CORPUS_LAYOUTS = {"rocketqa": (1, 2), "capstone": (2, 1), "psgs": (2, 1), "beir": None}
_BEIR_HEADER = ["query-id", "corpus-id", "score"]
_BLOCK = 1 << 26


class Lines(Sequence):
    """The lines of a file by number, read from disk when asked for.

    Only the lines' offsets are held in memory (8 bytes a line).
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no file {self.path}")
        size = self.path.stat().st_size
        self._data = np.memmap(self.path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        ends = [
            np.flatnonzero(self._data[start : start + _BLOCK] == 10) + start
            for start in range(0, size, _BLOCK)
        ]
        found = np.concatenate(ends) if ends else np.zeros(0, np.int64)
        if size and (not len(found) or found[-1] != size - 1):
            found = np.append(found, size)
        self._starts = np.concatenate([[0], found + 1]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number):
        if not 0 <= number < len(self):
            raise IndexError(number)
        start, end = self._starts[number], self._starts[number + 1] - 1
        return bytes(self._data[start:end]).decode("utf-8").removesuffix("\r")

    def __getstate__(self):
        return self.path, self._starts

    def __setstate__(self, state):
        # The offsets travel along, so that reading workers need not search the file again.
        self.path, self._starts = state
        empty = self.path.stat().st_size == 0
        self._data = np.zeros(0, np.uint8) if empty else np.memmap(self.path, np.uint8, "r")


class _Numbers(Sequence):
    """The strings "0", "1", ... without holding them."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number):
        if not 0 <= number < self._count:
            raise IndexError(number)
        return str(number)


class ById:
    """Row numbers of ids: arithmetic where ids are their row numbers, else a dictionary."""

    def __init__(self, ids: Iterable[str], source: str):
        kept: list[str] | None = None
        count = 0
        for count, name in enumerate(ids, 1):
            if kept is None and name != str(count - 1):
                kept = [str(i) for i in range(count - 1)]
            if kept is not None:
                kept.append(name)
        self.ids: Sequence[str] = _Numbers(count) if kept is None else kept
        self._rows = None if kept is None else {name: i for i, name in enumerate(kept)}
        if kept is not None and len(self._rows) != len(kept):
            seen: set[str] = set()
            twice = next(n for n in kept if n in seen or seen.add(n))
            raise ValueError(f"{source}: id {twice!r} stands there twice")

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, name: str) -> bool:
        return self.row(name) is not None

    def row(self, name: str | int) -> int | None:
        """Row of an id (an integer is the id it spells), None when it is not there."""
        name = str(name)
        if self._rows is not None:
            return self._rows.get(name)
        if name.isascii() and name.isdigit() and str(int(name)) == name:
            return int(name) if int(name) < len(self.ids) else None
        return None


class Corpus:
    """Documents of a file, one a line, read when asked for.

    Args:
      layout: one of `CORPUS_LAYOUTS`.

    Raises ValueError for another layout, a line without its fields, or an id that stands twice.
    """

    def __init__(self, path: str | os.PathLike, layout: str = "rocketqa"):
        if layout not in CORPUS_LAYOUTS:
            raise ValueError(f"corpus layout {layout!r}; known: {', '.join(CORPUS_LAYOUTS)}")
        self._columns, self._lines = CORPUS_LAYOUTS[layout], Lines(path)
        self._skipped = int(len(self._lines) > 0 and self._lines[0].startswith("id\t"))
        self.index = ById(self._names(layout, 1 if layout == "psgs" else 0), str(path))

    def _names(self, layout: str, shift: int) -> Iterator[str]:
        for number in range(self._skipped, len(self._lines)):
            if self._columns is None:
                yield _of_json(self._lines.path, number + 1, self._lines[number])["_id"]
                continue
            name, tab, _ = self._lines[number].partition("\t")
            if not tab:
                raise ValueError(
                    f"{self._lines.path}, line {number + 1}: wanted {layout} fields with tabs"
                )
            if shift and not name.isdecimal():
                raise ValueError(
                    f"{self._lines.path}, line {number + 1}: psgs ids are numbers, not {name!r}"
                )
            yield str(int(name) - shift) if shift else name

    @property
    def ids(self) -> Sequence[str]:
        """Document ids in row order."""
        return self.index.ids

    def __len__(self) -> int:
        return len(self.index)

    def document(self, row: int) -> tuple[str, str]:
        """(title, text) of a row; a missing field is empty."""
        if self._columns is None:
            found = _of_json(self._lines.path, row + 1, self._lines[row])
            return found.get("title") or "", found["text"]
        fields = self._lines[row + self._skipped].split("\t")
        title, text = (fields[c] if c < len(fields) else "" for c in self._columns)
        return title, text


class PseudoQueries:
    """Pseudo queries by document id, whatever the order of the file's lines.

    Raises ValueError naming ids that stand twice, are unknown, or are missing.
    """

    def __init__(self, path: str | os.PathLike, documents: ById):
        self._lines = Lines(path)
        self._line_of = np.full(len(documents), -1, np.int64)
        for number in range(len(self._lines)):
            name = self._lines[number].split("\t", 1)[0]
            row = documents.row(name)
            if row is None:
                raise ValueError(f"{path}, line {number + 1}: no document {name!r}")
            if self._line_of[row] >= 0:
                raise ValueError(f"{path}, line {number + 1}: document {name!r} stands there twice")
            self._line_of[row] = number
        absent = np.flatnonzero(self._line_of < 0)
        if len(absent):
            raise ValueError(
                f"{path}: no pseudo queries for {len(absent)} documents, the first is "
                f"{documents.ids[absent[0]]!r}"
            )

    def __getitem__(self, row: int) -> list[str]:
        fields = self._lines[int(self._line_of[row])].split("\t")[1:]
        return [f for f in fields if f.strip()]


def _of_json(path, number: int, line: str) -> dict[str, str]:
    """A line of BEIR's corpus or queries. Raises ValueError naming a line that is not one."""
    try:
        found = json.loads(line)
        if isinstance(found["_id"], str) and isinstance(found["text"], str):
            return found
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    raise ValueError(f"{path}, line {number}: wanted JSON with the strings `_id` and `text`")


def read_queries(path: str | os.PathLike) -> dict[str, str]:
    """Query id -> text. Raises ValueError naming the line that is not one, or a repeated id."""
    found: dict[str, str] = {}
    beir = Path(path).suffix == ".jsonl"
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if beir:
                fields = _of_json(path, number, line)
                name, text = fields["_id"], fields["text"]
            else:
                name, tab, text = line.rstrip("\r\n").partition("\t")
                if not tab:
                    raise ValueError(f"{path}, line {number}: wanted `qid<tab>query`")
            if name in found:
                raise ValueError(f"{path}, line {number}: query {name!r} stands there twice")
            found[name] = text
    return found


def read_judgments(path: str | os.PathLike) -> dict[str, dict[str, int]]:
    """Query id -> document id -> grade, of TREC's four columns, MS MARCO's two (grade 1) or, below
    its header, BEIR's three."""
    found: dict[str, dict[str, int]] = {}
    with open(path, encoding="utf-8") as file:
        beir = False
        for number, line in enumerate(file, 1):
            fields = line.split()
            if number == 1 and fields == _BEIR_HEADER:
                beir = True
                continue
            if not fields:
                continue
            if len(fields) not in ((3,) if beir else (2, 4)):
                wanted = "`qid docid grade`" if beir else "`qid 0 docid grade` or `qid docid`"
                raise ValueError(f"{path}, line {number}: wanted {wanted}")
            query, document = fields[0], fields[2 if len(fields) == 4 else 1]
            grade = "1" if len(fields) == 2 else fields[-1]
            try:
                found.setdefault(query, {})[document] = int(grade)
            except ValueError:
                raise ValueError(f"{path}, line {number}: grade {grade!r}") from None
    return found


def write_judgments(path: str | os.PathLike, judgments: Judgments) -> None:
    """Judgments as TREC's four columns."""
    lines = [f"{q} 0 {d} {g}\n" for q, grades in judgments.items() for d, g in grades.items()]
    _write(path, "".join(lines))


def read_run(path: str | os.PathLike) -> dict[str, dict[str, float]]:
    """Query id -> document id -> score of a TREC run; ranks and the order of lines are ignored."""
    found: dict[str, dict[str, float]] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if not fields:
                continue
            try:
                query, _, document, _, score, _ = fields
                value = float(score)
            except ValueError:
                raise ValueError(
                    f"{path}, line {number}: wanted `qid Q0 docid rank score tag`"
                ) from None
            if document in found.setdefault(query, {}):
                raise ValueError(f"{path}, line {number}: query {query!r} lists {document!r} twice")
            found[query][document] = value
    return found


def write_run(
    path: str | os.PathLike, run: Run, tag: str = "jaxmodels", *, from_ranking: bool = False
) -> None:
    """A TREC run in trec_eval's order.

    `from_ranking` writes minus the rank as the score, so that tools which break ties otherwise
    agree.
    """
    from jaxmodels.retrieval.metrics import ranking

    lines = []
    for query, scores in run.items():
        for rank, document in enumerate(ranking(scores), 1):
            score = f"{-rank}" if from_ranking else f"{float(scores[document]):.9g}"
            lines.append(f"{query} Q0 {document} {rank} {score} {tag}\n")
    _write(path, "".join(lines))


def read_triples(path: str | os.PathLike, limit: int = 30) -> dict[str, list[str]]:
    """Query id -> `limit` of its different negatives, of `qid positive negative` lines.

    Of more than `limit` in consecutive lines a random choice is kept, as officially, that depends
    on the query's id alone; a query whose lines are apart keeps what came first.
    """
    found: dict[str, list[str]] = {}
    with open(path, encoding="utf-8") as file:
        for query, given in itertools.groupby(_triples(path, file), key=lambda pair: pair[0]):
            negatives = list(dict.fromkeys(negative for _, negative in given))
            if len(negatives) > limit:
                random.Random(query).shuffle(negatives)
            own = found.setdefault(query, [])
            own += [n for n in negatives if n not in own][: limit - len(own)]
    return found


def _triples(path, file) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file, 1):
        fields = line.split()
        if len(fields) != 3:
            raise ValueError(f"{path}, line {number}: wanted `qid positive negative`")
        yield fields[0], fields[2]


@dataclass(frozen=True)
class TrainingQuery:
    """One training example by ids: `id`, `text`, `positives`, `negatives`; `answers` are texts."""

    id: str
    text: str
    positives: list[str]
    negatives: list[str]
    answers: tuple[str, ...] = ()


def read_training_json(path: str | os.PathLike) -> Iterator[TrainingQuery]:
    """Examples of CAPSTONE's, LEAD's and PROD's training files; ids become strings.

    Contexts are dictionaries with `passage_id`, bare ids, or (after mining) integers.
    Raises ValueError naming the entry and the field that it lacks.
    """
    with open(path, encoding="utf-8") as file:
        entries = json.load(file)
    for number, entry in enumerate(entries):
        try:
            if "query_string" in entry:
                name, text = entry["query_id"], entry["query_string"]
                positives, negatives = entry["pos_id"], entry["neg_id"]
            elif "question" in entry:
                name = entry.get("query_id", entry.get("q_id", number))
                text = entry["question"]
                positives = entry["positive_ctxs"]
                negatives = entry.get("hard_negative_ctxs", [])
            else:
                raise ValueError(f"{path}, entry {number}: neither query_string nor question")
        except KeyError as error:
            raise ValueError(f"{path}, entry {number}: no {error}") from None
        positives = positives if isinstance(positives, list) else [positives]
        answers = entry.get("answers", ())
        yield TrainingQuery(
            str(name),
            text,
            [_context_id(c, path, number) for c in positives],
            [_context_id(c, path, number) for c in negatives],
            tuple(map(str, answers)) if isinstance(answers, list) else (),
        )


def _context_id(context, path, number: int) -> str:
    if isinstance(context, Mapping):
        for key in ("passage_id", "psg_id", "id"):
            if key in context:
                return str(context[key])
        raise ValueError(f"{path}, entry {number}: a context without passage_id")
    return str(context)


def write_training_json(path: str | os.PathLike, queries: Iterable[TrainingQuery]) -> None:
    """Examples as PROD's MS MARCO files have them, written whole or not at all."""
    entries = [
        {
            "query_id": q.id,
            "query_string": q.text,
            "pos_id": q.positives,
            "neg_id": q.negatives,
        }
        for q in queries
    ]
    _write(path, json.dumps(entries, indent=1) + "\n")


def read_questions_csv(path: str | os.PathLike) -> list[tuple[str, list[str], str]]:
    """(question, answers or ids, qid) of a tab-separated file with a literal list in column two."""
    rows = []
    with open(path, encoding="utf-8", newline="") as file:
        for number, fields in enumerate(csv.reader(file, delimiter="\t"), 1):
            if len(fields) < 2:
                raise ValueError(f"{path}, line {number}: wanted `question<tab>[list]<tab>qid`")
            try:
                answers = [str(a) for a in ast.literal_eval(fields[1])]
            except (ValueError, SyntaxError, TypeError):
                raise ValueError(f"{path}, line {number}: {fields[1]!r} is no list") from None
            rows.append((fields[0], answers, fields[2] if len(fields) > 2 else str(number - 1)))
    return rows


def _write(path: str | os.PathLike, text: str) -> None:
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
