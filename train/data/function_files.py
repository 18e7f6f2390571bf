"""Functions of the Python library as GanLM's pre-training text, in the format of published shards.

Code is far more predictable than prose, so that a small generator's samples are often right and
there is something for the discriminator to tell apart. The TFDS builder holds the functions;
`corpus` writes text shards, `dict.txt` and `spm.model`. Modules are split by name, like those of
docstrings.
"""

from __future__ import annotations

import ast
import pathlib
import textwrap
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds

from train.data import preparation, python_sources
from train.data.docstring_files import SPLIT_NAMES, documents_of, is_test_module
from train.data.fairseq_files import train_tokenizer, write_shards

PACKAGES = ("stdlib",)
_DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class PythonFunctions(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the functions of `packages`, without docstrings and comments."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Functions of the installed versions; every tenth module for tests."}

    def __init__(self, *, packages: Sequence[str] = PACKAGES, **arguments):
        self._packages = tuple(packages)
        super().__init__(**arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in ("module", "name", "source")}
        features["index"] = tfds.features.Scalar(dtype=np.int32)
        return tfds.core.DatasetInfo(
            builder=self, description=__doc__, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        found = {}
        for d in python_sources.definitions(self._packages):
            # Methods stand alone; a function within a function is part of that one.
            if d.kind == "function" and (code := plain_code(d.source)):
                found.setdefault(code, d)
        return {split: self._generate_examples(found, split) for split in SPLIT_NAMES}

    def _generate_examples(self, found, split):
        for i, (code, d) in enumerate(found.items()):
            if ("test" if is_test_module(d.module) else "train") == split:
                yield i, {"module": d.module, "name": d.name, "source": code, "index": i}


def plain_code(source: str) -> str:
    """A function as the compiler sees it: one layout, no comments, no docstrings.

    "" for what is none and for one that does nothing.
    """
    try:
        tree = ast.parse(textwrap.dedent(source)).body[0]
    except (SyntaxError, IndexError):
        return ""
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return "" if isinstance(tree.body[0], ast.Pass) else ast.unparse(tree)


def corpus(
    path: str | None = None, packages: Sequence[str] = PACKAGES, pieces: int = 2000
) -> pathlib.Path:
    """A folder with the functions as shards, a line of code a sentence, written on first use.

    Raises OSError naming `data.options.path` when nothing can be written there.
    """
    key = f"functions-{'-'.join(packages)}-{pieces}"

    def fill(folder: pathlib.Path) -> None:
        directory = str(preparation.data_directory(path) / f"raw-{key}")
        builder = preparation.prepare(PythonFunctions, directory, packages=packages)
        documents = {split: documents_of(builder, split, "source", _lines) for split in SPLIT_NAMES}
        train_tokenizer((line for d in documents["train"] for line in d), pieces, folder)
        for split, name in SPLIT_NAMES.items():
            write_shards(folder, name, {"python": documents[split]}, "functions")

    return preparation.prepare_folder(key, path, fill)


def _lines(code: str) -> list[str]:
    return [line.strip() for line in code.splitlines()]
