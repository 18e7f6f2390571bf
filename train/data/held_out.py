"""Another family's training split cut in two: what a search may train on, and what it scores on.

Every `every`-th example of the training split is held out (`minival`), as one-shot searches want:
the test data then has no say in which network is found. The test split is the family's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

# of: the family. every: one example in so many is held out. inner: options of the family.
OPTIONS: dict[str, Any] = {"of": "digits", "every": 5, "inner": {}, "threads": 1}
VARIANTS: dict[str, dict[str, Any]] = {}
SPLITS = ("train", "minival", "test")


@dataclasses.dataclass(frozen=True)
class Part:
    """A picklable selection of another sequence: those held out, or the others."""

    examples: Sequence
    every: int
    held_out: bool

    def __len__(self) -> int:
        count = len(self.examples) // self.every
        return count if self.held_out else len(self.examples) - count

    def __getitem__(self, index: int):
        if self.held_out:
            return self.examples[index * self.every + self.every - 1]
        # Groups of `every` lose their last one; the rest behind the groups loses none.
        groups = len(self.examples) // self.every
        skipped = min(index // (self.every - 1), groups)
        return self.examples[index + skipped]


def _inner(options: Mapping[str, Any]):
    from train.data import pipeline

    if int(options["every"]) < 2:
        raise ValueError(f"data.options.every must be at least 2, not {options['every']}")
    return pipeline.resolve({"name": options["of"], "options": _options(options)})


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(options["inner"])
    return {**({"path": options["path"]} if options["path"] else {}), **given}


def element_spec(options: Mapping[str, Any]):
    """That of the family."""
    module, inner = _inner(options)
    return module.element_spec(inner)


def num_classes(options: Mapping[str, Any]) -> int | None:
    """That of the family."""
    from train.data import pipeline

    return pipeline.num_classes({"name": options["of"], "options": _options(options)})


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Number of examples of each split."""
    module, inner = _inner(options)
    sizes = module.split_sizes(inner)
    whole = sizes[module.SPLITS[0]]
    held = whole // int(options["every"])
    return {"train": whole - held, "minival": held, "test": sizes[module.SPLITS[1]]}


def source(split: str, options: Mapping[str, Any]) -> Sequence:
    """The part of the family's training split, or its test split."""
    module, inner = _inner(options)
    if split == "test":
        return module.source(module.SPLITS[1], inner)
    examples = module.source(module.SPLITS[0], inner)
    return Part(examples, int(options["every"]), split == "minival")


def train_transform(options: Mapping[str, Any]):
    """That of the family."""
    module, inner = _inner(options)
    return module.train_transform(inner)


def eval_transform(options: Mapping[str, Any]):
    """That of the family."""
    module, inner = _inner(options)
    return module.eval_transform(inner)


def read_image(path, options: Mapping[str, Any]):
    """One image file as the family's evaluation sees it."""
    module, inner = _inner(options)
    return module.read_image(path, inner)


def baseline(data: Mapping[str, Any]) -> float | None:
    """The family's own baseline, fitted on its whole training split; None where it has none."""
    from train.data import pipeline

    _, options = pipeline.resolve(data)
    module, _ = _inner(options)
    if not hasattr(module, "baseline"):
        return None
    return module.baseline({"name": options["of"], "options": _options(options)})
