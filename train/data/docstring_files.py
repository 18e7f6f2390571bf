"""Docstrings of the Python library and of packages this project needs, as GanLM's training data.

The TFDS builder holds the docstrings; `corpus` turns them into folders in the formats that
published data has, so that whatever reads those reads these: text shards for pre-training
(`json/train.json`, `dict.txt`, `spm.model`), binarized pairs docstring -> first sentence in
`summaries/`, and pairs of sentences of one or of two docstrings in `pairs/`, XNLI's layout.
Modules are split by name: one in ten is for testing.
"""

from __future__ import annotations

import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds

from jaxmodels.language.span_corruption import EOS_ID
from train.data import preparation, python_sources
from train.data.fairseq_files import Tokenizer, train_tokenizer, write_sequences, write_shards

# Pinned dependencies of this project with much prose, beside Python's own library.
PACKAGES = ("stdlib", "numpy", "scipy", "sklearn")
PIECES = 4000
_TEST_SHARE = 10
# fairseq's names of the two sides of a summary, and of its splits.
SOURCE, TARGET = "source", "target"
SPLIT_NAMES = {"train": "train", "test": "valid"}
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`\"'(*])")


class PythonDocstrings(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of every docstring of `packages`, split by module."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Docstrings of the installed versions; every tenth module for tests."}

    def __init__(self, *, packages: Sequence[str] = PACKAGES, **arguments):
        self._packages = tuple(packages)
        super().__init__(**arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "module": tfds.features.Text(),
                    "name": tfds.features.Text(),
                    "docstring": tfds.features.Text(),
                    "index": tfds.features.Scalar(dtype=np.int32),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        found = [d for d in python_sources.definitions(self._packages) if d.docstring]
        # Copies (inherited texts, aliases) would stand on both sides of the split.
        unique = list({d.docstring: d for d in reversed(found)}.values())[::-1]
        return {split: self._generate_examples(unique, split) for split in ("train", "test")}

    def _generate_examples(self, found, split):
        for i, d in enumerate(found):
            if ("test" if is_test_module(d.module) else "train") == split:
                text = {"module": d.module, "name": d.name, "docstring": d.docstring}
                yield i, {**text, "index": i}


def is_test_module(module: str) -> bool:
    """Whether the docstrings of a module are for testing."""
    return zlib.crc32(module.encode()) % _TEST_SHARE == 0


def sentences(docstring: str) -> list[str]:
    """Sentences of a docstring, each on one line; doctests and ruled lines are left out."""
    found = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = [line.strip() for line in paragraph.splitlines()]
        lines = [w for w in lines if w and not w.startswith((">>>", "...")) and w.strip("-=~*+|_ ")]
        text = " ".join(lines)
        found += [s for s in _SENTENCE_END.split(text) if len(s.split()) >= 3]
    return found


def corpus(
    path: str | None = None, packages: Sequence[str] = PACKAGES, pieces: int = PIECES
) -> pathlib.Path:
    """The folder with the docstrings in the published formats, written on first use.

    Raises OSError naming `data.options.path` when nothing can be written there.
    """
    key = f"docstrings-{'-'.join(packages)}-{pieces}"

    def fill(folder: pathlib.Path) -> None:
        directory = str(preparation.data_directory(path) / f"raw-{key}")
        builder = preparation.prepare(PythonDocstrings, directory, packages=packages)
        documents = {split: documents_of(builder, split, "docstring", sentences)
                     for split in SPLIT_NAMES}  # fmt: skip
        train_tokenizer((s for d in documents["train"] for s in d), pieces, folder)
        tokenizer = Tokenizer.read(folder)
        for split, name in SPLIT_NAMES.items():
            write_shards(folder, name, {"en": documents[split]}, "docstrings")
        _write_summaries(folder / "summaries", tokenizer, documents)
        _write_pairs(folder / "pairs", tokenizer, documents)

    return preparation.prepare_folder(key, path, fill)


def documents_of(
    builder, split: str, feature: str, cut: Callable[[str], list[str]]
) -> list[list[str]]:
    """What `cut` makes of a text feature of a split's examples, where that is something."""
    examples = sorted(builder.as_data_source(split), key=lambda e: int(e["index"]))
    # They come by module; shuffled once, so that any first part is like the whole.
    order = np.random.default_rng(0).permutation(len(examples))
    found = (cut(preparation.text(examples[i][feature])) for i in order)
    return [document for document in found if document]


def _copy_vocabulary(folder: pathlib.Path, tokenizer_folder: pathlib.Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spm.model").write_bytes((tokenizer_folder / "spm.model").read_bytes())
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((tokenizer_folder / "dict.txt").read_bytes())


def _write_summaries(folder: pathlib.Path, tokenizer: Tokenizer, documents) -> None:
    _copy_vocabulary(folder, folder.parent, f"dict.{SOURCE}.txt", f"dict.{TARGET}.txt")
    for split, name in SPLIT_NAMES.items():
        chosen = [
            (" ".join(document[1:]), document[0])
            for document in documents[split]
            if len(document) > 1 and 3 <= len(document[0].split()) <= 25
        ]
        for side, language in enumerate((SOURCE, TARGET)):
            tokens = ([*tokenizer.encode(pair[side]), EOS_ID] for pair in chosen)
            prefix = folder / f"{name}.{SOURCE}-{TARGET}.{language}"
            write_sequences(prefix, tokens, len(tokenizer.dictionary))


def _sentence_pairs(documents: list[list[str]]) -> Iterator[tuple[str, str, int]]:
    """(sentence, the next one or one of another document, whether it is the next)."""
    rng = np.random.default_rng(1)
    long = [document for document in documents if len(document) > 1]
    for i, document in enumerate(long):
        place = int(rng.integers(len(document) - 1))
        other = long[(i + int(rng.integers(1, len(long)))) % len(long)]
        follows = int(rng.integers(2))
        second = document[place + 1] if follows else other[int(rng.integers(len(other)))]
        yield document[place], second, follows


def _write_pairs(folder: pathlib.Path, tokenizer: Tokenizer, documents) -> None:
    dictionaries = ("en/input0/dict.txt", "en/input1/dict.txt")
    _copy_vocabulary(folder, folder.parent, *dictionaries)
    (folder / "en" / "label").mkdir(parents=True)
    (folder / "en" / "label" / "dict.txt").write_text("other 1\nsame 1\n", "utf-8")
    for split, name in SPLIT_NAMES.items():
        pairs = list(_sentence_pairs(documents[split]))
        size = len(tokenizer.dictionary)
        for side in (0, 1):
            tokens = ([*tokenizer.encode(pair[side]), EOS_ID] for pair in pairs)
            write_sequences(folder / "en" / f"input{side}" / name, tokens, size)
        labels = ([4 + pair[2], EOS_ID] for pair in pairs)
        write_sequences(folder / "en" / "label" / name, labels, 6)
