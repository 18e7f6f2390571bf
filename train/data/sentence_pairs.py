"""Pairs of sentences with a label, in XNLI's binarized layout: `<lang>/{input0,input1,label}`.

`data.options.path` holds, for every language, `input0/train.bin/.idx`, `input1/...`, `label/...`,
`valid` beside `train`, `input0/dict.txt` and `label/dict.txt`. `sentence_pairs:docstrings` makes
such a folder from installed Python packages (do two sentences follow each other in one docstring?);
`path` is then where. A folder without `input1` holds single sentences (GLUE's SST-2, CoLA).
After `unilm/tasks/xnli.py` of CSJianYang/GanLM@6094288.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmodels.language.span_corruption import BOS_ID, EOS_ID, check_ids, padded
from train.data import docstring_files
from train.data.fairseq_files import (
    SPECIALS,
    Dictionary,
    Tokenizer,
    TokenSequences,
    copy_vocabulary,
)
from train.data.fairseq_files import dictionary_size as size_of

# languages: whose training data is used together; eval_languages: whose evaluation data is.
# tokenizer: folder of dict.txt and spm.model by which text that is not binarized is read (a run's;
# None: the corpus's).
OPTIONS: dict[str, Any] = {
    "languages": ("en",),
    "eval_languages": ("en",),
    "max_tokens": 512,
    "num_classes": 3,
    "vocab_size": 0,
    "corpus": "",
    "packages": docstring_files.PACKAGES,
    "pieces": docstring_files.PIECES,
    "tokenizer": None,
}
XNLI_LANGUAGES = tuple("en ar bg de el es fr hi ru sw th tr ur vi zh".split())
VARIANTS: dict[str, dict[str, Any]] = {
    "xnli": {"languages": XNLI_LANGUAGES, "eval_languages": XNLI_LANGUAGES},
    "docstrings": {
        "corpus": "docstrings",
        "max_tokens": 96,
        "num_classes": 2,
        "vocab_size": size_of(docstring_files.PIECES),
    },
}
SPLITS = ("train", "valid")


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`source` int32 [S], `<s> A </s> </s> B </s>` padded on the right; `label` int32 [].

    `<s> A </s>` where there are single sentences.
    """
    return {
        "source": jax.ShapeDtypeStruct((options["max_tokens"],), np.int32),
        "label": jax.ShapeDtypeStruct((), np.int32),
    }


def folder(options: Mapping[str, Any]) -> pathlib.Path:
    """The folder of languages. Raises ValueError naming `data.options.path` where there is none."""
    if options["corpus"] == "docstrings":
        made = docstring_files.corpus(
            options["path"], tuple(options["packages"]), options["pieces"]
        )
        return made / "pairs"
    if options["corpus"]:
        raise ValueError(f"data.options.corpus: {options['corpus']!r}; known: '', 'docstrings'")
    first = options["languages"][0]
    root = pathlib.Path(options["path"] or "").expanduser()
    if not options["path"] or not (root / first / "input0" / "dict.txt").is_file():
        raise ValueError(
            f"data.options.path = {options['path']!r}: wanted a folder with {first}/input0/dict.txt"
            f", {first}/input0/train.idx, {first}/input1 and {first}/label"
        )
    return root


def dictionary(options: Mapping[str, Any]) -> Dictionary:
    """The dictionary of the inputs. Raises ValueError where its size is not the model's."""
    path = _dictionary_file(options)
    # A published GanLM dictionary with filler, so that checkpoints fit without resizing.
    found = Dictionary.read(path)
    if options["vocab_size"] and options["vocab_size"] != len(found):
        raise ValueError(
            f"{path}: {len(found)} entries with sentinels and filler, data.options.vocab_size is "
            f"{options['vocab_size']}"
        )
    return found


def _dictionary_file(options: Mapping[str, Any]) -> pathlib.Path:
    return folder(options) / options["languages"][0] / "input0" / "dict.txt"


def tokenizer(options: Mapping[str, Any]) -> Tokenizer:
    """For text that is not binarized; the folder then also needs `spm.model`."""
    if options["tokenizer"]:
        return Tokenizer.read(options["tokenizer"])
    return Tokenizer(folder(options) / "spm.model", dictionary(options))


def symbols(options: Mapping[str, Any]) -> list[str]:
    """Pieces, sentinels and filler by id."""
    return dictionary(options).symbols


def save_vocabulary(options: Mapping[str, Any], where: pathlib.Path) -> None:
    """`dict.txt` and `spm.model`, where there is one."""
    copy_vocabulary(_dictionary_file(options), folder(options) / "spm.model", where)


def classes(options: Mapping[str, Any]) -> list[str]:
    """Names of the labels, in the order of their numbers."""
    path = folder(options) / options["languages"][0] / "label" / "dict.txt"
    # The label dictionary is fairseq's too, its specials first.
    names = Dictionary.read(path, sentinels=False).symbols[len(SPECIALS) :]
    if len(names) < options["num_classes"]:
        raise ValueError(
            f"{path}: {len(names)} labels, data.options.num_classes is {options['num_classes']}"
        )
    return names[: options["num_classes"]]


def are_pairs(options: Mapping[str, Any]) -> bool:
    """Whether there are second sentences."""
    return (folder(options) / options["languages"][0] / "input1").is_dir()


@dataclasses.dataclass(frozen=True)
class Labelled(Sequence):
    """(first, second, label) of several languages one after the other; second None: no pairs."""

    languages: tuple[tuple[TokenSequences, TokenSequences | None, TokenSequences], ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray | None, int]:
        language = int(np.searchsorted(self.ends, index, side="right"))
        place = index - (self.ends[language - 1] if language else 0)
        first, second, label = self.languages[language]
        pair = first[place], None if second is None else second[place]
        return *pair, int(label[place][0]) - len(SPECIALS)


def source(split: str, options: Mapping[str, Any]) -> Labelled:
    """Token pairs and labels of a split's languages."""
    root = folder(options)
    names = options["languages" if split == SPLITS[0] else "eval_languages"]
    kinds = ("input0", "input1", "label") if are_pairs(options) else ("input0", "label")
    found = []
    for name in names:
        parts = {kind: TokenSequences(root / name / kind / split) for kind in kinds}
        if len({len(part) for part in parts.values()}) > 1:
            raise ValueError(
                f"{root / name}: {split} has {', '.join(str(len(p)) for p in parts.values())} "
                f"entries of {', '.join(kinds[:-1])} and label"
            )
        found.append((parts["input0"], parts.get("input1"), parts["label"]))
    return Labelled(tuple(found), tuple(np.cumsum([len(p[0]) for p in found]).tolist()))


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Pairs of each split."""
    return {split: len(source(split, options)) for split in SPLITS}


def pair_row(first: np.ndarray, second: np.ndarray | None, length: int) -> np.ndarray:
    """int32 [length]: `<s> A </s> </s> B </s>`; the longer text is cut where both do not fit.

    `<s> A </s>`, cut before its end, without a second.
    """
    if second is None:
        a = [int(t) for t in first if t != EOS_ID]
        return padded([BOS_ID, *a[: length - 2], EOS_ID], length)
    a, b = ([int(t) for t in x if t != EOS_ID] for x in (first, second))
    while len(a) + len(b) + 4 > length:
        longer = a if len(a) > len(b) else b
        longer.pop()
    return padded([BOS_ID, *a, EOS_ID, EOS_ID, *b, EOS_ID], length)


@dataclasses.dataclass(frozen=True)
class PairTransform:
    """(first, second, label) -> `source` [S], `label` []."""

    vocab_size: int
    max_tokens: int
    num_classes: int

    def __call__(self, example, rng: np.random.Generator | None = None) -> dict[str, Any]:
        del rng
        first, second, label = example
        check_ids(first, self.vocab_size)
        if second is not None:
            check_ids(second, self.vocab_size)
        if not 0 <= label < self.num_classes:
            raise ValueError(f"label {label} is not below num_classes {self.num_classes}")
        row = pair_row(first, second, self.max_tokens)
        return {"source": row, "label": np.int32(label)}


def train_transform(options: Mapping[str, Any]) -> PairTransform:
    """Nothing random."""
    return PairTransform(len(dictionary(options)), options["max_tokens"], options["num_classes"])


def eval_transform(options: Mapping[str, Any]) -> PairTransform:
    """As in training."""
    return train_transform(options)
