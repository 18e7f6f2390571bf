"""Edits as CoditT5 reads and writes them: `old </s> context` to `plan <s> new`.

Variants: `repairs`, statements of Python's library with a bug to mend; `pretraining`, its code and
docstrings corrupted as CoditT5 corrupts them; `git`, the edits of a repository's history;
`published`, the files of the published data sets, whose splits are their own; `raw`, the raw ones
that those are made of (`old <s> context1 <s> context2` and the new text). Other splits are by
source file.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds

from jaxmodels.language import edit_corruption, edit_metrics, edit_plans
from train.data import array_source, bug_injection, code_tokenizer, edit_sources, preparation
from train.data.code_tokenizer import CodeTokenizer
from train.naming import nearest

# Tasks whose examples stand in files; the others make theirs.
FILES = tuple(edit_sources.FOLDERS)
TASKS = ("repairs", "pretraining", "git", *FILES)
TARGETS = ("plan", "sequence")
VOCABULARIES = ("library", "data")
OPTIONS: dict[str, Any] = {
    "task": "repairs",
    # What the model writes: the plan and the new text, or (the plain generator) the new text.
    "target": "plan",
    "packages": ("stdlib",),
    "repository": None,  # git: a working copy or bare repository
    "dataset": "bf-small",  # published, raw: its name
    "tokenizer": None,  # folder of vocab.json and merges.txt; None trains one on the texts
    "vocabulary": 2048,
    # Whose texts train it: Python's `library`, the same whatever the task, so that weights go from
    # pre-training to any fine-tuning; or the training split of the `data`. (Files: always theirs.)
    "vocabulary_of": "library",
    "max_source": 64,
    "max_target": 72,
    "truncate": False,  # cut longer sequences instead of refusing them
    "context": True,  # give the model what stands beside the old text
    "words": (5, 16),  # least and most words of a text
    "limit": 0,  # at most so many texts; 0: all
    "evaluated": 0,  # at most so many examples of valid and test; 0: all
    "threads": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "repairs": {},
    "pretraining": {"task": "pretraining", "words": (5, 32), "max_source": 96, "max_target": 160},
    "git": {"task": "git", "words": (4, 24), "max_source": 96, "max_target": 144},
    **{
        kind: {"task": kind, "max_source": 512, "max_target": 512, "truncate": True}
        for kind in FILES
    },
}
SPLITS = edit_sources.SPLITS
PUBLISHED_SIZES = {"bf-small": (46680, 5835, 5835), "bf-medium": (52364, 6545, 6545)}
# Test examples draw their bug or corruption from this, so that they are the same in every run.
_FIXED_SEED = 7
# Statements of this many words train the vocabulary.
_VOCABULARY_WORDS = (4, 9)


@dataclasses.dataclass
class EditTextConfig(tfds.core.BuilderConfig):
    """What an `EditTexts` builder holds."""

    task: str = "repairs"
    packages: tuple[str, ...] = ("stdlib",)
    repository: str | None = None
    words: tuple[int, int] = (5, 16)
    limit: int = 0


class EditTexts(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of statements, passages or a history's edits, split by file."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Splits by file name: 80, 10 and 10 %."}
    BUILDER_CONFIGS = ()

    def _info(self) -> tfds.core.DatasetInfo:
        fields = [f.name for f in dataclasses.fields(edit_sources.Text)]
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    **{name: tfds.features.Text() for name in fields},
                    "index": tfds.features.Scalar(dtype=np.int32),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        config = self.builder_config
        least, most = config.words
        bounds = {"least": least, "most": most, "limit": config.limit}
        if config.task == "git":
            texts = edit_sources.git_edits(config.repository, **bounds)
        elif config.task == "pretraining":
            texts = edit_sources.passages(config.packages, **bounds)
        else:
            texts = edit_sources.statements(config.packages, **bounds)
        by_split: dict[str, list[edit_sources.Text]] = {split: [] for split in SPLITS}
        for text in texts:
            by_split[edit_sources.split_of(text.file)].append(text)
        # TFDS has no empty splits; a small repository may lack one.
        return {s: self._generate_examples(found) for s, found in by_split.items() if found}

    def _generate_examples(self, texts):
        for i, text in enumerate(texts):
            yield i, {**dataclasses.asdict(text), "index": i}


def _config_of(options: Mapping[str, Any]) -> EditTextConfig:
    task, packages = options["task"], tuple(options["packages"])
    words = tuple(options["words"])
    size = f"{words[0]}_{words[1]}_{options['limit']}"
    name = f"{task}_{size}_{'_'.join(packages)}"
    if task == "git":
        if not options["repository"]:
            raise ValueError("data.options.repository: the path of a git repository is wanted")
        head = edit_sources.git_head(options["repository"])
        name = f"git_{size}_{head[:12]}"
    return EditTextConfig(
        name=name,
        task=task,
        packages=packages,
        repository=options["repository"],
        words=words,
        limit=int(options["limit"]),
    )


def _check(options: Mapping[str, Any]) -> None:
    choices = {"task": TASKS, "target": TARGETS, "vocabulary_of": VOCABULARIES}
    for key, known in choices.items():
        if options[key] not in known:
            raise ValueError(
                f"data.options.{key}: no {options[key]!r}; {nearest(options[key], known)}"
            )


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`input_ids` int32 [S], `labels` int32 [T], padded with 0; `index` int32 [] in its split."""
    _check(options)
    return {
        "input_ids": jax.ShapeDtypeStruct((options["max_source"],), np.int32),
        "labels": jax.ShapeDtypeStruct((options["max_target"],), np.int32),
        "index": jax.ShapeDtypeStruct((), np.int32),
    }


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Number of examples of each split; the published numbers for data that is not there."""
    if options["task"] in FILES and not options["path"]:
        return dict(zip(SPLITS, PUBLISHED_SIZES.get(options["dataset"], (0, 0, 0))))
    return {split: len(source(split, options)) for split in SPLITS}


@dataclasses.dataclass(frozen=True)
class Example:
    """One example as text: the model's input and output, and what it is scored against."""

    source: str
    output: str
    old: str
    new: str


def source(split: str, options: Mapping[str, Any]) -> array_source.ArraySource:
    """Texts of a split, by `index`: `edit_sources.Text` fields, or published lines."""
    _check(options)
    key = _frozen(options)
    found = (_published if key[0] in FILES else _texts)(split, *key)
    most = int(options["evaluated"])
    if split == SPLITS[0] or not most:
        return found
    return array_source.ArraySource({k: v[:most] for k, v in found.arrays.items()})


def _frozen(options: Mapping[str, Any]) -> tuple:
    directory = str(preparation.data_directory(options["path"]))
    return (
        options["task"],
        tuple(options["packages"]),
        options["repository"],
        tuple(options["words"]),
        int(options["limit"]),
        options["path"] if options["task"] in FILES else directory,
        options["dataset"],
    )


@functools.lru_cache(maxsize=8)
def _texts(split, task, packages, repository, words, limit, directory, dataset):
    del dataset
    config = _config_of(
        {
            "task": task,
            "packages": packages,
            "repository": repository,
            "words": words,
            "limit": limit,
        }
    )
    builder = preparation.prepare(EditTexts, directory, config=config)
    if split not in builder.info.splits:
        raise ValueError(f"edits:{task} has nothing in split {split!r}: too few source files")
    arrays = array_source.read_split(builder, split)
    texts = {k: np.array([t.decode() for t in v], object) for k, v in arrays.items()}
    return array_source.ArraySource({**texts, "index": np.arange(len(texts["text"]))})


@functools.lru_cache(maxsize=8)
def _published(split, task, packages, repository, words, limit, path, dataset):
    del packages, repository, words
    lines = edit_sources.published(path, dataset, split, task)
    keep = slice(limit or None)
    names = ("source", "output", "new") if task == "published" else ("source", "new")
    arrays = {name: np.array(found[keep], object) for name, found in zip(names, lines)}
    return array_source.ArraySource({**arrays, "index": np.arange(len(arrays["new"]))})


def check_split(split: str, options: Mapping[str, Any]) -> None:
    """Raises FileNotFoundError where files of a split of `published` or `raw` are missing."""
    edit_sources.split_files(options["path"], options["dataset"], split, options["task"])


def tokenizer(options: Mapping[str, Any]) -> CodeTokenizer:
    """The published vocabulary of `tokenizer`, or a BPE trained on the training texts.

    A published one without edit tokens gets them for plans alone.
    """
    if options["tokenizer"]:
        return _loaded(str(options["tokenizer"]), options["target"] == "plan")
    key = _frozen(options)
    if key[0] not in FILES and options["vocabulary_of"] == "library":
        fixed = {**options, "task": "repairs", "repository": None, "words": _VOCABULARY_WORDS}
        key = _frozen(fixed)
    return _trained(int(options["vocabulary"]), key)


def symbols(options: Mapping[str, Any]) -> list[str]:
    """Token by id, those of edits included."""
    ids = tokenizer(options).tokenizer.get_vocab()
    return sorted(ids, key=ids.get)


def save_vocabulary(options: Mapping[str, Any], folder: Path) -> None:
    """`tokenizer.json`, for the option `tokenizer`."""
    tokenizer(options).save(folder)


@functools.lru_cache(maxsize=4)
def _loaded(folder: str, edit_tokens: bool) -> CodeTokenizer:
    return CodeTokenizer.load(folder, edit_tokens=edit_tokens)


@functools.lru_cache(maxsize=4)
def _trained(vocabulary: int, key: tuple) -> CodeTokenizer:
    if key[0] in FILES:
        found = _published(SPLITS[0], *key).arrays
        texts = [*found["source"], *found["new"]]
    else:
        found = _texts(SPLITS[0], *key).arrays
        texts = [*found["text"], *found["context"], *found["new"]]
    return CodeTokenizer.train(map(str, texts), vocabulary)


def example_of(
    raw: Mapping[str, Any], options: Mapping[str, Any], rng: np.random.Generator
) -> Example:
    """The example of a raw record; bugs and corruptions are drawn from `rng`."""
    if options["task"] == "published":
        old = raw["source"].split(f" {edit_plans.CONTEXT}")[0].strip()
        output = raw["output"] if options["target"] == "plan" else raw["new"]
        return Example(raw["source"], output, old, raw["new"])
    if options["task"] == "raw":
        old, contexts = edit_plans.read_raw_line(raw["source"])
        new = " ".join(raw["new"].split())
        comments = options["dataset"] == "comment-update"
        output = gold_output(old, new, comments=comments) if options["target"] == "plan" else new
        return Example(edit_plans.model_input(old, contexts), output, old, new)
    words, contexts, new = raw["text"].split(), [raw["context"]], raw["new"]
    if options["task"] == "repairs":
        old = " ".join(bug_injection.inject(words, rng) or words)
        new = raw["text"]
    elif options["task"] == "pretraining":
        old, contexts, new = " ".join(corrupted(words, raw["modality"], rng)), [], raw["text"]
    else:
        old = raw["text"]
    contexts = contexts if options["context"] else []
    output = edit_plans.model_output(old, new) if options["target"] == "plan" else new
    return Example(edit_plans.model_input(old, contexts), output, old, new)


def gold_output(old: str, new: str, *, comments: bool = False) -> str:
    """`plan <s> new`; the plan of `comments` is that of the texts without @return, @param, @throws.

    (The README of EngineeringSoftware/CoditT5 on its data set comment-update.)
    """
    if not comments:
        return edit_plans.model_output(old, new)
    bare = (edit_metrics.remove_tags(text).split() for text in (old, new))
    return f"{' '.join(edit_plans.plan(*bare))} {edit_plans.TARGET} {new}"


def corrupted(words: list[str], modality: str, rng: np.random.Generator) -> list[str]:
    """CoditT5's corruption; texts too short for it go unchanged (an empty plan)."""
    try:
        return edit_corruption.corrupt(words, modality, rng)
    except edit_corruption.NotCorruptible:
        return words


@dataclasses.dataclass(frozen=True)
class Encode:
    """Raw record -> ids; the training transform takes a generator besides."""

    options: tuple[tuple[str, Any], ...]

    def __call__(self, raw: Mapping[str, Any], rng: np.random.Generator | None = None):
        options = dict(self.options)
        index = int(raw["index"])
        rng = np.random.default_rng((_FIXED_SEED, index)) if rng is None else rng
        return encode(example_of(raw, options, rng), options) | {"index": np.int32(index)}


def encode(example: Example, options: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Ids of an example: `input_ids` [S], `labels` [T]."""
    bpe = tokenizer(options)
    cut = bool(options["truncate"])
    ids = bpe.encode(example.source)
    labels = bpe.encode(example.output)
    return {
        "input_ids": code_tokenizer.padded(ids, options["max_source"], truncate=cut, what="input"),
        "labels": code_tokenizer.padded(labels, options["max_target"], truncate=cut, what="output"),
    }


def train_transform(options: Mapping[str, Any]) -> Encode:
    """A new bug or corruption every time an example is read."""
    return Encode(tuple(options.items()))


def eval_transform(options: Mapping[str, Any]) -> Encode:
    """The same bug or corruption in every run."""
    return Encode(tuple(options.items()))


def eval_examples(split: str, options: Mapping[str, Any]) -> list[Example]:
    """Every example of a split as text, in order, as evaluation sees it."""
    found = source(split, options)
    return [
        example_of(found[i], options, np.random.default_rng((_FIXED_SEED, int(found[i]["index"]))))
        for i in range(len(found))
    ]


def read_lines(path: str | Path) -> list[tuple[str, list[str]]]:
    """(old, contexts) of every line `old <s> context1 <s> context2` of a file."""
    found = [edit_plans.read_raw_line(line) for line in edit_sources.lines_of(path)]
    for n, (old, _) in enumerate(found, 1):
        if not old:
            raise ValueError(f"{path}, line {n}: empty input")
    return found
