"""fairseq's files: dictionaries, SentencePiece tokenization onto them, binarized token sequences.

Formats after fairseq 0.12 (`fairseq/data/dictionary.py`, `fairseq/data/indexed_dataset.py`), as
bundled with CSJianYang/GanLM@6094288. A dictionary is `<s>` `<pad>` `</s>` `<unk>` and then the
lines `piece count` of dict.txt; GanLM adds `<mask>`, `<mask_0>` .. `<mask_99>` and filler up to a
multiple of 8. A binarized set is a pair of files: `.bin`, the tokens, and `.idx`, where they are.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import pathlib
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from jaxmodels.language.span_corruption import EOS_ID, SENTINELS, UNK_ID

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"
# As many as a tokenizer of some thousand pieces needs.
TOKENIZER_SENTENCES = 40_000
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float64,
    8: np.uint16,
    9: np.uint32,
    10: np.uint64,
}


def mask_id(pieces: int) -> int:
    """Index of `<mask>` in the dictionary of a dict.txt of `pieces` lines."""
    return len(SPECIALS) + pieces


def dictionary_size(pieces: int, multiple: int = 8) -> int:
    """Entries of that dictionary with `<mask>`, the sentinels and filler.

    249,997 pieces (XLM-R) give the published 250,104.
    """
    size = mask_id(pieces) + 1 + SENTINELS
    return -(-size // multiple) * multiple


class Dictionary:
    """Symbols and their indices; `sentinels=False` leaves `<mask>` and what follows it out.

    Raises ValueError for a line that is not `piece count` and for a piece that comes twice.
    """

    def __init__(
        self, pieces: Iterable[str], *, sentinels: bool = True, multiple: int = 8, source: str = ""
    ):
        self.symbols = [*SPECIALS]
        self.source = source
        self.symbols += pieces
        if sentinels:
            self.symbols += [MASK, *(f"<mask_{i}>" for i in range(SENTINELS))]
            filler = -len(self.symbols) % multiple
            self.symbols += [f"madeupword{i:04d}" for i in range(filler)]
        self.indices = {symbol: i for i, symbol in enumerate(self.symbols)}
        if len(self.indices) < len(self.symbols):
            twice = next(s for i, s in enumerate(self.symbols) if self.indices[s] != i)
            raise ValueError(f"{source or 'dictionary'}: the piece {twice!r} comes twice")

    @classmethod
    def read(cls, path: str | os.PathLike, *, sentinels: bool = True) -> Dictionary:
        """The dictionary of a dict.txt."""
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no dictionary {path}")
        pieces = []
        for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
            line = line.rstrip("\r").removesuffix(" #fairseq:overwrite")
            if not line:
                continue
            piece, _, count = line.rpartition(" ")
            if not piece or not count.lstrip("-").isdigit():
                raise ValueError(f"{path}, line {number}: {line!r} is not `piece count`")
            pieces.append(piece)
        return cls(pieces, sentinels=sentinels, source=str(path))

    def __len__(self) -> int:
        return len(self.symbols)

    @property
    def mask_id(self) -> int:
        """Index of `<mask>`. Raises ValueError where sentinels are missing."""
        for symbol in (MASK, "<mask_0>", f"<mask_{SENTINELS - 1}>"):
            if symbol not in self.indices:
                raise ValueError(
                    f"{self.source or 'the dictionary'} of {len(self)} entries has no {symbol}; "
                    "span corruption needs <mask> and <mask_0> .. <mask_99>"
                )
        return self.indices[MASK]

    def encode(self, pieces: Iterable[str]) -> list[int]:
        """Indices of pieces; those that are not there become `<unk>`."""
        return [self.indices.get(piece, UNK_ID) for piece in pieces]

    def decode(self, tokens: Iterable[int]) -> list[str]:
        """Pieces of tokens, without `<s>`, `<pad>` and `</s>`."""
        return [self.symbols[t] for t in tokens if t > EOS_ID]


class Tokenizer:
    """Text to dictionary indices and back, by a SentencePiece model and a dict.txt."""

    def __init__(self, model: str | os.PathLike | bytes, dictionary: Dictionary):
        import sentencepiece

        if not isinstance(model, bytes):
            if not pathlib.Path(model).is_file():
                raise FileNotFoundError(f"no SentencePiece model {model}")
            model = pathlib.Path(model).read_bytes()
        self.dictionary = dictionary
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Tokenizer:
        """`spm.model` and `dict.txt` of a folder."""
        listing, model = tokenizer_files(folder)
        return cls(model, Dictionary.read(listing))

    def encode(self, text: str) -> list[int]:
        """Tokens of a line of text, without `</s>`."""
        return self.dictionary.encode(self._pieces.encode(text, out_type=str))

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens; special tokens give nothing."""
        return "".join(self.dictionary.decode(tokens)).replace("▁", " ").strip()


def tokenizer_files(folder: str | os.PathLike) -> tuple[pathlib.Path, pathlib.Path]:
    """(dict.txt, spm.model) of a folder."""
    return pathlib.Path(folder) / "dict.txt", pathlib.Path(folder) / "spm.model"


def copy_vocabulary(
    dictionary: pathlib.Path, model: pathlib.Path, folder: str | os.PathLike
) -> None:
    """Copy a dict.txt and its SentencePiece model to where `Tokenizer.read` looks for them.

    Nothing where there is no model: then no text can be read.
    """
    if model.is_file():
        for file, copy in zip((dictionary, model), tokenizer_files(folder)):
            shutil.copyfile(file, copy)


def write_shards(
    folder: pathlib.Path, split: str, documents: Mapping[str, Sequence[Sequence[str]]], name: str
) -> None:
    """Write a split's text shards and their listing `json/SPLIT.json`.

    Args:
      documents: language -> its documents, each a list of sentences.
      name: of the corpus, in the listing.
    """
    (folder / "json").mkdir(exist_ok=True)
    entries = []
    for language, found in documents.items():
        shard = f"{split}.{language}.txt"
        (folder / shard).write_text("\n".join("\n".join(d) + "\n" for d in found), "utf-8")
        entries.append(
            {
                "source": [shard],
                "source_lang": language,
                "count": len(found),
                "weight": 1.0,
                "name": name if len(documents) == 1 else f"{name}.{language}",
            }
        )
    (folder / "json" / f"{split}.json").write_text(json.dumps(entries), "utf-8")


def train_tokenizer(sentences: Iterable[str], pieces: int, folder: str | os.PathLike) -> None:
    """Write `spm.model`, a unigram model of the first sentences, and `dict.txt` of `pieces` lines.

    A function of the sentences alone: training is deterministic in one thread.
    Raises ValueError where the text does not hold so many pieces.
    """
    import sentencepiece

    folder, model = pathlib.Path(folder), io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.islice(sentences, TOKENIZER_SENTENCES),
            model_writer=model,
            # SentencePiece's own <unk>, <s> and </s> are not pieces.
            vocab_size=pieces + 3,
            model_type="unigram",
            character_coverage=0.9995,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]
        raise ValueError(f"no tokenizer of {pieces} pieces from this text: {reason}") from None
    (folder / "spm.model").write_bytes(model.getvalue())
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    lines = [f"{trained.id_to_piece(i)} {pieces + 3 - i}" for i in range(3, len(trained))]
    (folder / "dict.txt").write_text("\n".join(lines) + "\n", "utf-8")


class TokenSequences(Sequence):
    """A binarized set, read through a memory map: one token array [L] an entry."""

    def __init__(self, prefix: str | os.PathLike):
        self._prefix = os.fspath(prefix)
        self._open()

    def _open(self) -> None:
        index = pathlib.Path(f"{self._prefix}.idx")
        if not index.is_file():
            raise FileNotFoundError(f"no binarized data {index}")
        data = index.read_bytes()
        head = struct.Struct("<9sQBQ")
        fields = head.unpack_from(data) if len(data) >= head.size else (b"",)
        if fields[0] != _MAGIC:
            raise ValueError(f"{index}: not an index of fairseq's memory-mapped format (mmap)")
        _, version, code, count = fields
        wanted = head.size + 12 * count
        if version != _VERSION or code not in _DTYPES or len(data) != wanted:
            raise ValueError(
                f"{index}: version {version}, dtype code {code}, {len(data)} bytes for {count} "
                f"entries; wanted version {_VERSION}, a code of 1 to 10, {wanted} bytes"
            )
        self.sizes = np.frombuffer(data, "<i4", count, head.size)
        self._starts = np.frombuffer(data, "<i8", count, head.size + 4 * count)
        self._dtype = np.dtype(_DTYPES[code])
        path = f"{self._prefix}.bin"
        bytes_ = os.path.getsize(path)
        end = 0 if count == 0 else int((self._starts + self.sizes * self._dtype.itemsize).max())
        if end > bytes_:
            raise ValueError(f"{path}: {bytes_} bytes, the index points to {end}")
        self._data = np.memmap(path, np.uint8, "r") if bytes_ else np.zeros(0, np.uint8)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(self._starts[index])
        stop = start + int(self.sizes[index]) * self._dtype.itemsize
        return np.frombuffer(self._data[start:stop].tobytes(), self._dtype).astype(np.int32)

    # Worker processes map the file themselves.
    def __getstate__(self):
        return self._prefix

    def __setstate__(self, prefix):
        self._prefix = prefix
        self._open()


def write_sequences(
    prefix: str | os.PathLike, sequences: Iterable[Sequence[int] | np.ndarray], vocab_size: int
) -> int:
    """Write a binarized set as `fairseq-preprocess` does, and return its number of entries."""
    dtype = np.dtype(np.uint16 if vocab_size < 65500 else np.int32)
    sizes = []
    with open(f"{prefix}.bin", "wb") as file:
        for tokens in sequences:
            tokens = np.asarray(tokens, dtype)
            sizes.append(len(tokens))
            file.write(tokens.tobytes())
    lengths = np.asarray(sizes, "<i4")
    starts = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)])[: len(sizes)]
    code = next(c for c, d in _DTYPES.items() if np.dtype(d) == dtype)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(struct.pack("<9sQBQ", _MAGIC, _VERSION, code, len(sizes)))
        file.write(lengths.tobytes())
        file.write((starts * dtype.itemsize).astype("<i8").tobytes())
    return len(sizes)


def lines_of(path: str | os.PathLike) -> Iterator[str]:
    """Lines of a UTF-8 text file without their ends, split at newlines only."""
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line.rstrip("\n").rstrip("\r")
