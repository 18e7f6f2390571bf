"""Messages of installed programs and their translations, as GanLM's multilingual training data.

Debian packages and Python wheels bring compiled gettext catalogues (`LANGUAGE/LC_MESSAGES/*.mo`),
some tens of thousands of English messages with their translations where a desktop or a server is
installed. The TFDS builder holds the pairs; `corpus` turns them into the formats that published
data has: text shards of both languages for pre-training (`json/train.json`, `dict.txt`,
`spm.model`, one vocabulary for both) and binarized pairs in `pairs/`. Catalogues are split by name:
one in ten is for testing.
"""

from __future__ import annotations

import pathlib
import re
import struct
import sysconfig
import zlib
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds

from jaxmodels.language.span_corruption import EOS_ID
from train.data import preparation
from train.data.docstring_files import SPLIT_NAMES
from train.data.fairseq_files import Tokenizer, train_tokenizer, write_sequences, write_shards

ENGLISH = "en"
PIECES = 4000
_TEST_SHARE = 10
_FEWEST_WORDS, _MOST_WORDS = 3, 30
# Messages of one catalogue that make a document for pre-training.
_DOCUMENT = 12
_ORDERS = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}


def default_folders() -> tuple[str, ...]:
    """Where catalogues are installed: Debian's packages and this Python's wheels."""
    return ("/usr/share", sysconfig.get_paths()["purelib"])


def read_catalogue(path: pathlib.Path) -> list[tuple[str, str]]:
    """(English, translation) of a compiled catalogue, by English; of plurals the first form.

    Raises ValueError naming the file where it is none, or not in the encoding that it names.
    """
    data = path.read_bytes()
    order = _ORDERS.get(data[:4])
    try:
        if order is None:
            raise ValueError("no gettext catalogue")
        count, *starts = struct.unpack_from(f"{order}3I", data, 8)
        texts = []
        for start in starts:
            table = struct.unpack_from(f"{order}{2 * count}I", data, start)
            texts.append([data[at : at + size] for size, at in zip(table[::2], table[1::2])])
        header = dict(zip(*texts)).get(b"", b"").decode("ascii", "replace")
        charset = re.search(r"charset=([\w-]+)", header)
        encoding = charset[1] if charset and charset[1] != "CHARSET" else "utf-8"
        # An optional context comes before a \x04; forms of a plural are separated by \0.
        return [
            tuple(s.split(b"\0")[0].rpartition(b"\x04")[2].decode(encoding) for s in pair)
            for pair in zip(*texts)
            if pair[0]
        ]
    except (ValueError, LookupError, struct.error) as error:
        raise ValueError(f"{path}: {error}") from None


def messages(language: str, folders: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """(catalogue, English, translation), each English text once, by catalogue and text.

    Only messages of three to thirty words whose translation is another text, blanks and line ends
    made one blank. Catalogues that cannot be read are left out.

    Raises ValueError naming `data.options` when there are none.
    """
    searched = tuple(folders) or default_folders()
    found: dict[str, tuple[str, str, str]] = {}
    pattern = f"**/{language}/LC_MESSAGES/*.mo"
    paths = {p for folder in searched for p in pathlib.Path(folder).expanduser().glob(pattern)}
    for path in sorted(paths, key=lambda p: (p.stem, p)):
        try:
            pairs = read_catalogue(path)
        except ValueError:
            continue
        for pair in pairs:
            english, translation = (" ".join(text.split()) for text in pair)
            words = len(english.split())
            if translation and english != translation and _FEWEST_WORDS <= words <= _MOST_WORDS:
                found.setdefault(english, (path.stem, english, translation))
    if not found:
        raise ValueError(
            f"data.options.language = {language!r}: no catalogue {language}/LC_MESSAGES/*.mo with "
            f"messages below {', '.join(map(str, searched))}; set data.options.catalogues"
        )
    return sorted(found.values())


class GettextMessages(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the messages of one language, split by catalogue."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Messages of the installed catalogues; every tenth for tests."}

    def __init__(self, *, language: str, folders: Sequence[str] = (), **arguments):
        self._found = (language, tuple(folders))
        super().__init__(**arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        texts = ("catalogue", "english", "translation")
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    **{name: tfds.features.Text() for name in texts},
                    "index": tfds.features.Scalar(dtype=np.int32),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        found = messages(*self._found)
        for split in SPLIT_NAMES:
            if all(is_test_catalogue(name) != (split == "test") for name, *_ in found):
                language = self._found[0]
                raise ValueError(f"data.options.language = {language!r}: no {split} catalogue")
        return {split: self._generate_examples(found, split) for split in SPLIT_NAMES}

    def _generate_examples(self, found, split):
        for i, (catalogue, english, translation) in enumerate(found):
            if ("test" if is_test_catalogue(catalogue) else "train") == split:
                texts = {"catalogue": catalogue, "english": english, "translation": translation}
                yield i, {**texts, "index": i}


def is_test_catalogue(name: str) -> bool:
    """Whether the messages of a catalogue are for testing."""
    return zlib.crc32(name.encode()) % _TEST_SHARE == 0


def corpus(
    path: str | None = None,
    language: str = "de",
    pieces: int = PIECES,
    folders: Sequence[str] = (),
) -> pathlib.Path:
    """The folder with the messages in the published formats, written on first use.

    Raises OSError naming `data.options.path` when nothing can be written there, ValueError when
    there are no messages, or only of catalogues for training or for testing.
    """
    if language == ENGLISH:
        raise ValueError(f"data.options: {ENGLISH!r} on both sides; name the other language")
    places = f"-{zlib.crc32(repr(tuple(folders)).encode()):08x}" if folders else ""
    raw = f"messages-{language}{places}"

    def fill(folder: pathlib.Path) -> None:
        directory = str(preparation.data_directory(path) / f"raw-{raw}")
        builder = preparation.prepare(
            GettextMessages, directory, language=language, folders=tuple(folders)
        )
        found = {split: _examples(builder, split) for split in SPLIT_NAMES}
        sides = (ENGLISH, language)
        train_tokenizer((t for _, *pair in found["train"] for t in pair), pieces, folder)
        for split, name in SPLIT_NAMES.items():
            texts = {s: [row[i] for row in found[split]] for i, s in enumerate(sides, 1)}
            write_shards(folder, name, {s: _documents(t) for s, t in texts.items()}, "messages")
        _write_pairs(folder, found, sides)

    return preparation.prepare_folder(f"{raw}-{pieces}", path, fill)


def _examples(builder, split: str) -> list[tuple[str, str, str]]:
    """(catalogue, English, translation) of a split, in blocks of one catalogue, shuffled."""
    found = sorted(builder.as_data_source(split), key=lambda e: int(e["index"]))
    names = ("catalogue", "english", "translation")
    rows = [tuple(preparation.text(example[name]) for name in names) for example in found]
    blocks = [rows[i : i + _DOCUMENT] for i in range(0, len(rows), _DOCUMENT)]
    order = np.random.default_rng(0).permutation(len(blocks))
    return [row for i in order for row in blocks[i]]


def _documents(texts: list[str]) -> list[list[str]]:
    return [texts[i : i + _DOCUMENT] for i in range(0, len(texts), _DOCUMENT)]


def _write_pairs(folder: pathlib.Path, found, sides: tuple[str, str]) -> None:
    pairs, tokenizer = folder / "pairs", Tokenizer.read(folder)
    pairs.mkdir()
    (pairs / "spm.model").write_bytes((folder / "spm.model").read_bytes())
    for language in sides:
        (pairs / f"dict.{language}.txt").write_bytes((folder / "dict.txt").read_bytes())
    for split, name in SPLIT_NAMES.items():
        # One message after another of a catalogue would make batches of a kind.
        order = np.random.default_rng(1).permutation(len(found[split]))
        for side, language in enumerate(sides, 1):
            tokens = ([*tokenizer.encode(found[split][i][side]), EOS_ID] for i in order)
            prefix = pairs / f"{name}.{sides[0]}-{sides[1]}.{language}"
            write_sequences(prefix, tokens, len(tokenizer.dictionary))
