"""Pairs of texts for generation, as fairseq-preprocess binarizes them.

`data.options.path` is a folder with `train.SRC-TGT.SRC.bin/.idx`, the same for TGT, `valid` beside
`train`, and `dict.SRC.txt`, `dict.TGT.txt`; as in fairseq, the same files serve TGT to SRC.
`fairseq_pairs:docstring_summaries` makes such a folder from installed Python packages (the rest of
a docstring -> its first sentence), `fairseq_pairs:messages` from the messages of installed programs
(English -> another language), in `path`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmodels.language.span_corruption import EOS_ID, PAD_ID, check_ids, padded
from train.data import docstring_files, gettext_files
from train.data.fairseq_files import (
    Dictionary,
    Tokenizer,
    TokenSequences,
    copy_vocabulary,
    dictionary_size,
)

# source_lang, target_lang: "" infers them from the files. max_source, max_target: longer texts are
# truncated, their end token kept. left_pad_source: fairseq's default. vocab_size: what the model
# expects, 0 for anything. reverse_target: the target is the source backwards (a toy task on real
# text, of max_target - 1 tokens). corpus: "" for a folder at `path`, else the stand-in of `pieces`
# pieces: "docstrings" of `packages`, or "messages" of `catalogues` (folders; (): where they are
# installed). tokenizer: folder of dict.txt and spm.model by which text that is not binarized is
# read (a run's; None: the corpus's).
OPTIONS: dict[str, Any] = {
    "source_lang": "",
    "target_lang": "",
    "max_source": 720,
    "max_target": 48,
    "left_pad_source": True,
    "vocab_size": 0,
    "corpus": "",
    "packages": docstring_files.PACKAGES,
    "catalogues": (),
    "pieces": docstring_files.PIECES,
    "reverse_target": False,
    "tokenizer": None,
}
_DOCSTRINGS = {
    "corpus": "docstrings",
    "max_source": 120,
    "max_target": 32,
    "vocab_size": dictionary_size(docstring_files.PIECES),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "docstring_summaries": _DOCSTRINGS,
    "reversed_docstrings": {
        **_DOCSTRINGS,
        "reverse_target": True,
        "max_source": 12,
        "max_target": 12,
    },
    "messages": {
        "corpus": "messages",
        "source_lang": gettext_files.ENGLISH,
        "target_lang": "de",
        "max_source": 64,
        "max_target": 64,
        "pieces": gettext_files.PIECES,
        "vocab_size": dictionary_size(gettext_files.PIECES),
    },
}
SPLITS = ("train", "valid")


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`source` int32 [S], `previous` and `targets` int32 [T]; `</s>` ends both texts."""
    source, target = options["max_source"], options["max_target"]
    if source < 2 or target < 2:
        raise ValueError(f"data.options: max_source {source} and max_target {target}, wanted >= 2")
    return {
        "source": jax.ShapeDtypeStruct((source,), np.int32),
        "previous": jax.ShapeDtypeStruct((target,), np.int32),
        "targets": jax.ShapeDtypeStruct((target,), np.int32),
    }


def folder(options: Mapping[str, Any]) -> tuple[pathlib.Path, str, str]:
    """(folder, source language, target language).

    Raises ValueError naming `data.options.path` where there is no binarized pair.
    """
    source, target = options["source_lang"], options["target_lang"]
    if options["corpus"] == "docstrings":
        made = docstring_files.corpus(
            options["path"], tuple(options["packages"]), options["pieces"]
        )
        return made / "summaries", docstring_files.SOURCE, docstring_files.TARGET
    if options["corpus"] == "messages":
        sides = (source, target)
        if gettext_files.ENGLISH not in sides:
            raise ValueError(
                f"data.options: source_lang {source!r} and target_lang {target!r}; messages are "
                f"translated from or to {gettext_files.ENGLISH!r}"
            )
        other = source if target == gettext_files.ENGLISH else target
        made = gettext_files.corpus(
            options["path"], other, options["pieces"], tuple(options["catalogues"])
        )
        return made / "pairs", source, target
    if options["corpus"]:
        raise ValueError(
            f"data.options.corpus: {options['corpus']!r}; known: '', 'docstrings', 'messages'"
        )
    root = pathlib.Path(options["path"] or "").expanduser()
    found = sorted(root.glob("train.*-*.*.idx")) if options["path"] and root.is_dir() else []
    if not found:
        raise ValueError(
            f"data.options.path = {options['path']!r}: wanted a folder of fairseq-preprocess with "
            "train.SRC-TGT.SRC.idx and dict.SRC.txt"
        )
    if not source or not target:
        source, _, target = found[0].name.split(".")[1].partition("-")
    return root, source, target


def dictionary(options: Mapping[str, Any]) -> Dictionary:
    """The dictionary that both sides share.

    Raises ValueError where the two sides differ or its size is not the model's.
    """
    root, source, target = folder(options)
    ours, theirs = (Dictionary.read(root / f"dict.{side}.txt") for side in (source, target))
    if ours.symbols != theirs.symbols:
        raise ValueError(
            f"{root}: dict.{source}.txt ({len(ours)} entries) and dict.{target}.txt "
            f"({len(theirs)}) differ; GanLM shares one dictionary"
        )
    if options["vocab_size"] and options["vocab_size"] != len(ours):
        raise ValueError(
            f"{root / f'dict.{source}.txt'}: {len(ours)} entries with sentinels and filler, "
            f"data.options.vocab_size is {options['vocab_size']}"
        )
    return ours


def tokenizer(options: Mapping[str, Any]) -> Tokenizer:
    """For text that is not binarized; the folder then also needs `spm.model`."""
    if options["tokenizer"]:
        return Tokenizer.read(options["tokenizer"])
    return Tokenizer(folder(options)[0] / "spm.model", dictionary(options))


def symbols(options: Mapping[str, Any]) -> list[str]:
    """Pieces, sentinels and filler by id."""
    return dictionary(options).symbols


def save_vocabulary(options: Mapping[str, Any], where: pathlib.Path) -> None:
    """`dict.txt` and `spm.model`, where there is one."""
    root, source, _ = folder(options)
    copy_vocabulary(root / f"dict.{source}.txt", root / "spm.model", where)


@dataclasses.dataclass(frozen=True)
class Pairs(Sequence):
    """Two binarized sets side by side."""

    source: TokenSequences
    target: TokenSequences

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.source[index], self.target[index]


def source(split: str, options: Mapping[str, Any]) -> Pairs:
    """Token pairs (source [L], target [L']) of a split, both ending in `</s>`."""
    root, ours, theirs = folder(options)
    pair = f"{ours}-{theirs}"
    if (root / f"{split}.{theirs}-{ours}.{ours}.idx").is_file():
        pair = f"{theirs}-{ours}"
    sides = [TokenSequences(root / f"{split}.{pair}.{side}") for side in (ours, theirs)]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"{root}: {split} has {len(sides[0])} sources and {len(sides[1])} targets")
    return Pairs(*sides)


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Pairs of each split."""
    return {split: len(source(split, options)) for split in SPLITS}


def source_row(tokens: np.ndarray, length: int, left_pad: bool = True) -> np.ndarray:
    """int32 [length]: truncated before its `</s>`, padded on the left or right."""
    tokens = np.asarray(tokens)
    tokens = tokens[:-1] if len(tokens) and tokens[-1] == EOS_ID else tokens
    row = np.asarray([*tokens[: length - 1], EOS_ID], np.int32)
    if not left_pad:
        return padded(row, length)
    return np.concatenate([np.full(length - len(row), PAD_ID, np.int32), row])


@dataclasses.dataclass(frozen=True)
class PairTransform:
    """(source, target) tokens -> `source` [S], `previous` [T] from `</s>`, `targets` [T]."""

    vocab_size: int
    max_source: int
    max_target: int
    left_pad_source: bool
    reverse_target: bool

    def texts(self, pair) -> tuple[np.ndarray, np.ndarray]:
        """(source, target) tokens of an example before they are truncated: what it asks for."""
        tokens, target = pair
        check_ids(tokens, self.vocab_size)
        check_ids(target, self.vocab_size)
        if self.reverse_target:
            words = tokens[tokens != EOS_ID][: min(self.max_source, self.max_target) - 1]
            tokens, target = np.append(words, EOS_ID), np.append(words[::-1], EOS_ID)
        return tokens, target

    def __call__(self, pair, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        del rng
        tokens, target = self.texts(pair)
        targets = source_row(target, self.max_target, left_pad=False)
        previous = padded(np.append(EOS_ID, targets[targets != PAD_ID][:-1]), self.max_target)
        return {
            "source": source_row(tokens, self.max_source, self.left_pad_source),
            "previous": previous,
            "targets": targets,
        }


def train_transform(options: Mapping[str, Any]) -> PairTransform:
    """Nothing random."""
    return PairTransform(
        len(dictionary(options)),
        options["max_source"],
        options["max_target"],
        options["left_pad_source"],
        options["reverse_target"],
    )


def eval_transform(options: Mapping[str, Any]) -> PairTransform:
    """As in training."""
    return train_transform(options)
