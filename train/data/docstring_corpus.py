"""API documentation as a retrieval collection: a docstring's first paragraph finds the rest of it.

From the sources of the installed networkx, numpy, scipy, scikit-image and scikit-learn: the query
is the synopsis people wrote, the document is the remaining text without signature lines, `Examples`
and `See Also`. A synopsis has 3 to 40 words and a document at least 20; repeated synopses and
repeated beginnings are left out. Judgments are graded: the own document is 2, those of the
functions that its `See Also` names are 1. A module's hash decides its split, so that no module is
in two.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow_datasets as tfds

from train.data import preparation, python_sources

PACKAGES = ("networkx", "numpy", "scipy", "skimage", "sklearn")
SPLITS = ("train", "validation", "test")
# Of 20 modules: 14 train, 2 validate, 4 test.
_SPLIT_OF_TWENTY = (0,) * 14 + (1,) * 2 + (2,) * 4
_QUERY_WORDS = (3, 40)
_DOCUMENT_WORDS = 20
_SAME_BEGINNING = 200
_SIGNATURE = re.compile(r"^[\w.]+\s*\(.*\)\s*(->.*)?$", re.DOTALL)
_LEFT_OUT_SECTIONS = {"examples", "example", "see also"}


@dataclass(frozen=True)
class Entry:
    """One documented function or class.

    Attributes:
      name: dotted name. module: its module. query: synopsis. text: body. links: `See Also` names.
    """

    name: str
    module: str
    query: str
    text: str
    links: tuple[str, ...]


def sections(docstring: str) -> list[tuple[str, str]]:
    """(title, text) of a numpydoc docstring; what stands before the first title has title ""."""
    lines = docstring.splitlines()
    found: list[tuple[str, list[str]]] = [("", [])]
    skip = False
    for line, below in zip(lines, [*lines[1:], ""]):
        if skip:
            skip = False
        elif line.strip() and re.fullmatch(r"\s*(-{3,}|={3,})\s*", below):
            found.append((line.strip(), []))
            skip = True
        else:
            found[-1][1].append(line)
    return [(title, "\n".join(text).strip("\n")) for title, text in found]


def see_also(text: str) -> list[str]:
    """Names in a `See Also` section, without roles, markup and descriptions."""
    margin = min((len(x) - len(x.lstrip()) for x in text.splitlines() if x.strip()), default=0)
    names = []
    for line in text.splitlines():
        if not line.strip() or line[margin : margin + 1].isspace():
            continue
        line = re.sub(r":\w+:`~?([^`]*)`", r"\1", line).replace("`", "")
        for name in re.split(r"\s:|:\s|:$", line)[0].split(","):
            name = name.strip().rstrip("().")
            if re.fullmatch(r"[A-Za-z_][\w.]*", name):
                names.append(name)
    return names


def parse(docstring: str) -> tuple[str, str, tuple[str, ...]] | None:
    """(query, document, `See Also` names) of a docstring, None when it is too short or too long."""
    parts = sections(docstring)
    paragraphs = [p for p in re.split(r"\n\s*\n", parts[0][1]) if p.strip()]
    while paragraphs and _SIGNATURE.match(paragraphs[0].strip()):
        paragraphs.pop(0)
    if not paragraphs:
        return None
    lines = paragraphs[0].strip().splitlines()
    if len(lines) > 1 and _SIGNATURE.match(lines[0].strip()):
        lines = lines[1:]
    query = " ".join(" ".join(lines).split())
    body, links = ["\n\n".join(paragraphs[1:])], []
    for title, text in parts[1:]:
        if title.lower() == "see also":
            links = see_also(text)
        if title.lower() not in _LEFT_OUT_SECTIONS:
            body.append(f"{title}\n{text}")
    # A body that repeats its synopsis would give it away.
    document = " ".join(" ".join(" ".join(body).split()).replace(query, " ").split())
    low, high = _QUERY_WORDS
    if not low <= len(query.split()) <= high or len(document.split()) < _DOCUMENT_WORDS:
        return None
    return query, document, tuple(links)


def _docstrings(packages: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(module, name, docstring), those that NumPy adds to compiled functions among them."""
    for definition in python_sources.definitions(packages):
        if definition.kind != "module":
            yield definition.module, definition.name, definition.docstring
        elif "add_newdoc(" in definition.source:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(definition.source)
            yield from _added(tree)


def _added(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add_newdoc"):
            continue
        try:
            place, name, doc = (ast.literal_eval(a) for a in node.args[:3])
        except (ValueError, SyntaxError):
            continue
        for attribute, text in [doc] if isinstance(doc, tuple) else [("", doc)]:
            if isinstance(text, str):
                dotted = f"{name}.{attribute}" if attribute else name
                yield place, dotted, inspect.cleandoc(text)


def entries(packages: Sequence[str] = PACKAGES) -> list[Entry]:
    """Every usable docstring of the packages, by module and place, without repetitions."""
    found, queries, beginnings, names = [], set(), set(), set()
    for module, name, docstring in _docstrings(packages):
        parsed = parse(docstring) if docstring else None
        dotted = f"{module}.{name}"
        if parsed is None or dotted in names or module.split(".")[0] not in packages:
            continue
        query, document, links = parsed
        if query in queries or document[:_SAME_BEGINNING] in beginnings:
            continue
        names.add(dotted)
        queries.add(query)
        beginnings.add(document[:_SAME_BEGINNING])
        found.append(Entry(dotted, module, query, document, links))
    return found


def resolve_links(found: Sequence[Entry]) -> list[list[int]]:
    """Rows that each entry's `See Also` names mean: of that last name, the nearest by module."""
    by_last: dict[str, list[int]] = {}
    for row, entry in enumerate(found):
        by_last.setdefault(entry.name.rsplit(".", 1)[-1], []).append(row)
    resolved = []
    for row, entry in enumerate(found):
        targets = []
        for link in entry.links:
            parts = link.split(".")
            candidates = [r for r in by_last.get(parts[-1], ()) if r != row]
            # Outer names of the link must occur in the target's dotted name.
            candidates = [
                r for r in candidates if set(parts[:-1]) <= {*found[r].name.split("."), "np", "nx"}
            ]
            same = [r for r in candidates if _package(found[r]) == _package(entry)]
            candidates = same if len(parts) == 1 or same else candidates
            if candidates:
                targets.append(max(candidates, key=lambda r: (_shared(found[r], entry), -r)))
        resolved.append(sorted(set(targets)))
    return resolved


def _package(entry: Entry) -> str:
    return entry.name.split(".")[0]


def _shared(a: Entry, b: Entry) -> int:
    count = 0
    for x, y in zip(a.name.split("."), b.name.split(".")):
        if x != y:
            break
        count += 1
    return count


def split_of(module: str) -> str:
    """The split of a module, by the hash of its name."""
    digest = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big")
    return SPLITS[_SPLIT_OF_TWENTY[digest % 20]]


class ApiDocstrings(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of synopsis and body of documented functions, with `See Also` links."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Split by module; rows numbered over all splits."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(
            name="-".join(PACKAGES), version=VERSION, description="All five packages."
        )
    ]

    def __init__(self, *, packages: Sequence[str] = PACKAGES, **arguments):
        self._packages = tuple(packages)
        name = "-".join(packages)
        known = {config.name for config in self.BUILDER_CONFIGS}
        custom = tfds.core.BuilderConfig(name=name, version=self.VERSION)
        super().__init__(config=name if name in known else custom, **arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "index": tfds.features.Scalar(dtype=np.int32),
                    "name": tfds.features.Text(),
                    "query": tfds.features.Text(),
                    "text": tfds.features.Text(),
                    "links": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        found = entries(self._packages)
        links = resolve_links(found)
        return {split: self._generate_examples(found, links, split) for split in SPLITS}

    def _generate_examples(self, found, links, split):
        for row, (entry, targets) in enumerate(zip(found, links)):
            if split_of(entry.module) == split:
                yield (
                    row,
                    {
                        "index": row,
                        "name": entry.name,
                        "query": entry.query,
                        "text": entry.text,
                        "links": json.dumps(targets),
                    },
                )


def read(
    path: str | None, packages: Sequence[str] = PACKAGES
) -> tuple[list[Entry], list[list[int]], list[str]]:
    """(entries, `See Also` rows of each, split of each) of the prepared data, in row order."""
    builder = preparation.prepare(ApiDocstrings, path, packages=tuple(packages))
    rows = {}
    for split in SPLITS:
        for example in builder.as_data_source(split):
            name, query, text, links = (
                example[key].decode() for key in ("name", "query", "text", "links")
            )
            module = name.rsplit(".", 1)[0]
            rows[int(example["index"])] = (
                Entry(name, module, query, text, ()),
                json.loads(links),
                split,
            )
    ordered = [rows[i] for i in sorted(rows)]
    return [r[0] for r in ordered], [r[1] for r in ordered], [r[2] for r in ordered]
