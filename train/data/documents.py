"""Pre-training text of GanLM: sentences packed into documents, spans cut out of them.

`data.options.path` is a folder in the published layout: `json/train.json` and `json/valid.json`,
each a list of `{"source": [shards], "source_lang", "count", "weight", "name"}` with shards of plain
text (a sentence a line, a blank line between documents), `dict.txt` and `spm.model` (other names by
`dict_file`, `spm_model`). Languages are drawn in proportion to `weight`, else to `count`.
`documents:docstrings` and `documents:functions` make such a folder from installed Python packages,
`documents:messages` one of two languages from the messages of installed programs; `path` is then
where.

Shards are tokenized and packed once, into binarized files under the data directory. After
`unilm/data/mlm_loader.py` of CSJianYang/GanLM@6094288.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmodels.language import span_corruption
from train.data import docstring_files, function_files, gettext_files, preparation
from train.data.fairseq_files import (
    Dictionary,
    Tokenizer,
    TokenSequences,
    copy_vocabulary,
    dictionary_size,
    lines_of,
    tokenizer_files,
    write_sequences,
)

# break_mode: "complete" packs sentences across documents, "complete_doc" within one.
# vocab_size: what the model expects of the dictionary, 0 for anything. corpus: "" for a folder at
# `path`, else the stand-in of `pieces` pieces: "docstrings" or "functions" of `packages`, or
# "messages" in English and in `language` from `catalogues` (folders; (): where they are installed).
# prepared: where packed files are kept. tokenizer: folder of another dict.txt and spm.model than
# the corpus's own, as a run keeps them.
OPTIONS: dict[str, Any] = {
    "max_tokens": 512,
    "mask_prob": 0.15,
    "span_length": 3.0,
    "break_mode": "complete",
    "dict_file": "dict.txt",
    "spm_model": "spm.model",
    "vocab_size": 0,
    "corpus": "",
    "packages": docstring_files.PACKAGES,
    "language": "de",
    "catalogues": (),
    "pieces": docstring_files.PIECES,
    "prepared": None,
    "tokenizer": None,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "docstrings": {
        "corpus": "docstrings",
        "max_tokens": 128,
        "vocab_size": dictionary_size(docstring_files.PIECES),
    },
    "functions": {
        "corpus": "functions",
        "packages": function_files.PACKAGES,
        "max_tokens": 128,
        "vocab_size": dictionary_size(docstring_files.PIECES),
    },
    "messages": {
        "corpus": "messages",
        "max_tokens": 128,
        "pieces": gettext_files.PIECES,
        "vocab_size": dictionary_size(gettext_files.PIECES),
    },
}
SPLITS = ("train", "valid")
BREAK_MODES = ("complete", "complete_doc")


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`source` int32 [S], `previous` and `targets` int32 [T], padded on the right.

    S and T are the longest that documents of `max_tokens` tokens can give.
    """
    source, target = _lengths(options)
    return {
        "source": jax.ShapeDtypeStruct((source,), np.int32),
        "previous": jax.ShapeDtypeStruct((target,), np.int32),
        "targets": jax.ShapeDtypeStruct((target,), np.int32),
    }


def _lengths(options: Mapping[str, Any]) -> tuple[int, int]:
    return _longest(options["max_tokens"], options["mask_prob"], options["span_length"])


@functools.lru_cache(maxsize=8)
def _longest(max_tokens: int, mask_prob: float, span_length: float) -> tuple[int, int]:
    return span_corruption.corrupted_lengths(max_tokens, mask_prob, span_length)


def folder(options: Mapping[str, Any]) -> pathlib.Path:
    """The corpus folder. Raises ValueError naming `data.options.path` where there is none."""
    stand_ins = {"docstrings": docstring_files, "functions": function_files}
    if options["corpus"] in stand_ins:
        return stand_ins[options["corpus"]].corpus(
            options["path"], tuple(options["packages"]), options["pieces"]
        )
    if options["corpus"] == "messages":
        return gettext_files.corpus(
            options["path"],
            options["language"],
            options["pieces"],
            tuple(options["catalogues"]),
        )
    if options["corpus"]:
        raise ValueError(
            f"data.options.corpus: {options['corpus']!r}; known: '', 'docstrings', 'functions', "
            "'messages'"
        )
    root = pathlib.Path(options["path"] or "").expanduser()
    # Held-out text is asked for at the start, not at the first evaluation.
    names = [f"json/{split}.json" for split in SPLITS]
    if not options["path"] or not all((root / name).is_file() for name in names):
        raise ValueError(
            f"data.options.path = {options['path']!r}: wanted a folder with {', '.join(names)}, "
            f"{options['dict_file']} and {options['spm_model']}"
        )
    return root


def tokenizer(options: Mapping[str, Any]) -> Tokenizer:
    """The corpus's tokenizer, its dictionary of the size the model expects.

    Raises ValueError naming both sizes where they differ.
    """
    listing, model = _tokenizer_files(options)
    dictionary = Dictionary.read(listing)
    wanted = options["vocab_size"]
    if wanted and wanted != len(dictionary):
        raise ValueError(
            f"{listing}: {len(dictionary)} entries with sentinels and filler, "
            f"data.options.vocab_size is {wanted}"
        )
    return Tokenizer(model, dictionary)


def _tokenizer_files(options: Mapping[str, Any]) -> tuple[pathlib.Path, pathlib.Path]:
    if options["tokenizer"]:
        return tokenizer_files(options["tokenizer"])
    root = folder(options)
    return root / options["dict_file"], root / options["spm_model"]


def symbols(options: Mapping[str, Any]) -> list[str]:
    """Pieces, sentinels and filler by id."""
    return Dictionary.read(_tokenizer_files(options)[0]).symbols


def save_vocabulary(options: Mapping[str, Any], where: pathlib.Path) -> None:
    """`dict.txt` and `spm.model`, for the option `tokenizer`."""
    copy_vocabulary(*_tokenizer_files(options), where)


@dataclasses.dataclass(frozen=True)
class Mixture(Sequence):
    """Documents of several languages, each as often in an epoch as its weight says.

    An epoch has as many examples as there are documents; a language whose share exceeds its
    documents repeats them.
    """

    languages: tuple[TokenSequences, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, languages: Sequence[TokenSequences], weights: Sequence[float]) -> Mixture:
        """Shares by largest remainder, so that they add up."""
        weights = np.asarray(weights, np.float64)
        if len(weights) == 0 or (weights < 0).any() or weights.sum() == 0:
            raise ValueError(f"weights of languages {weights.tolist()}: wanted some above zero")
        total = sum(len(one) for one in languages)
        weights = np.where([len(one) > 0 for one in languages], weights, 0)
        exact = weights / max(weights.sum(), 1e-30) * total
        shares = np.floor(exact).astype(int)
        for i in np.argsort(shares - exact, kind="stable")[: total - shares.sum()]:
            shares[i] += 1
        return cls(tuple(languages), tuple(np.cumsum(shares).tolist()))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        language = int(np.searchsorted(self.ends, index, side="right"))
        documents = self.languages[language]
        place = index - (self.ends[language - 1] if language else 0)
        return documents[place % len(documents)]


def source(split: str, options: Mapping[str, Any]) -> Mixture:
    """Packed documents, int32 [at most max_tokens], of a split's languages."""
    root = folder(options)
    listing = root / "json" / f"{split}.json"
    if not listing.is_file():
        raise FileNotFoundError(f"no listing {listing}; wanted a list of shards, as train.json")
    entries = json.loads(listing.read_text("utf-8"))
    weights = [float(entry.get("weight", entry.get("count", 1))) for entry in entries]
    return Mixture.of([_packed(root, entry, options) for entry in entries], weights)


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Documents of each split."""
    return {split: len(source(split, options)) for split in SPLITS}


def _packed(root: pathlib.Path, entry: Mapping[str, Any], options) -> TokenSequences:
    """The packed documents of a listing's entry, made on first use."""
    if options["break_mode"] not in BREAK_MODES:
        raise ValueError(
            f"data.options.break_mode: {options['break_mode']!r}; known: {', '.join(BREAK_MODES)}"
        )
    shards = [root / name for name in entry["source"]]
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"no shard {shard}, which {root / 'json'} lists")
    words = tokenizer(options)
    files = [*shards, *_tokenizer_files(options)]
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    settings = (options["max_tokens"], options["break_mode"])
    key = hashlib.sha256(json.dumps([facts, settings]).encode()).hexdigest()[:16]

    def fill(target: pathlib.Path) -> None:
        size = len(words.dictionary)
        write_sequences(target / "documents", _documents(shards, words, options), size)

    where = options["prepared"]
    if where is None and options["corpus"]:
        where = options["path"]
    made = preparation.prepare_folder(f"packed-{key}", where, fill)
    return TokenSequences(made / "documents")


def _documents(shards, words: Tokenizer, options) -> Iterator[np.ndarray]:
    for shard in shards:
        sentences = (words.encode(line) if line else None for line in lines_of(shard))
        yield from span_corruption.pack(
            sentences,
            options["max_tokens"],
            complete_document=options["break_mode"] == "complete_doc",
        )


@dataclasses.dataclass(frozen=True)
class Corruption:
    """document [L] -> `source` [S], `previous` [T], `targets` [T], with `rng`'s spans cut out.

    Without a generator the spans are a function of the document, for evaluation.
    """

    first_sentinel: int
    vocab_size: int
    mask_prob: float
    span_length: float
    lengths: tuple[int, int]

    def __call__(
        self, document: np.ndarray, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        span_corruption.check_ids(document, self.vocab_size)
        if rng is None:
            rng = np.random.default_rng(zlib.crc32(document.tobytes()))
        kept, label = span_corruption.corrupt(
            document, self.first_sentinel, self.mask_prob, self.span_length, rng=rng
        )
        previous, targets = span_corruption.shifted(label, self.lengths[1])
        return {
            "source": span_corruption.padded(kept, self.lengths[0]),
            "previous": previous,
            "targets": targets,
        }


def train_transform(options: Mapping[str, Any]) -> Corruption:
    """Fresh spans for every example."""
    words = tokenizer(options).dictionary
    return Corruption(
        words.mask_id + 1,
        len(words),
        options["mask_prob"],
        options["span_length"],
        _lengths(options),
    )


def eval_transform(options: Mapping[str, Any]) -> Corruption:
    """Spans that depend on the document alone."""
    return train_transform(options)


def unigram_entropy(data: Mapping[str, Any]) -> float:
    """Bits a token of the training targets under their own frequencies, sentinels and all.

    What a generator that reads nothing can reach: the baseline of GanLM's generation loss.
    """
    from train.data import pipeline

    _, options = pipeline.resolve(data)
    transform, documents = eval_transform(options), source(SPLITS[0], options)
    counts = np.zeros(transform.vocab_size)
    for i in range(min(len(documents), 4000)):
        np.add.at(counts, transform(documents[i])["targets"], 1)
    counts[span_corruption.PAD_ID] = 0
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())
