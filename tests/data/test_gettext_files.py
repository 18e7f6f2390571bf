"""Messages of gettext catalogues: reading, cleaning, and the folders made of them."""

import struct

import numpy as np
import pytest

from train.data import documents, fairseq_pairs, gettext_files, pipeline
from train.data.fairseq_files import dictionary_size
from train.data.gettext_files import corpus, is_test_catalogue, messages, read_catalogue

PIECES = 60
HEADER = "Content-Type: text/plain; charset={}\n"


def compiled(entries: dict[str, str], order="<", charset="utf-8") -> bytes:
    """A .mo file, as GNU's manual describes it."""
    entries = {"": HEADER.format(charset), **entries}
    texts = [[s.encode(charset) for s in column] for column in (entries, entries.values())]
    count = len(entries)
    at, tables, body = 28 + 16 * count, [], b""
    for column in texts:
        for s in column:
            tables += [len(s), at + len(body)]
            body += s + b"\0"
    head = [0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0]
    return struct.pack(f"{order}{7 + len(tables)}I", *head, *tables) + body


def write(folder, name, entries, language="xx", **options):
    path = folder / "locale" / language / "LC_MESSAGES" / f"{name}.mo"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compiled(entries, **options))
    return path


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("charset", ["utf-8", "iso-8859-1"])
def test_contexts_plurals_and_encodings(tmp_path, order, charset):
    entries = {
        "Open": "Öffnen",
        "menu\x04Close it": "Schließen",
        "%d file\0%d files": "%d Datei\0%d Dateien",
    }
    path = write(tmp_path, "a", entries, order=order, charset=charset)
    assert read_catalogue(path) == [
        ("Open", "Öffnen"),
        ("Close it", "Schließen"),
        ("%d file", "%d Datei"),
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        compiled({"a b": "c"})[:30],
        compiled({"a": "ä"}, charset="latin-1").replace(b"latin-1", b"utf-8  "),
        compiled({"a": "b"}).replace(b"utf-8", b"utf-x"),
    ],
    ids=["empty", "text", "cut off", "wrong encoding", "unknown encoding"],
)
def test_a_damaged_catalogue_is_named_and_left_out(tmp_path, content):
    path = write(tmp_path, "bad", {})
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.mo: "):
        read_catalogue(path)
    write(tmp_path, "good", {"one two three": "eins zwei drei"})
    assert messages("xx", [tmp_path]) == [("good", "one two three", "eins zwei drei")]


def test_messages_are_cleaned_and_come_once(tmp_path):
    write(tmp_path, "b", {"now  it\n is": "jetzt\nist es", "the same text": "the same text"})
    write(tmp_path, "a", {"now it is": "nun ist es", "too short": "zu kurz", "x y z": ""})
    write(tmp_path, "a", {"in another language": "dans une autre"}, language="yy")
    assert messages("xx", [tmp_path]) == [("a", "now it is", "nun ist es")]
    with pytest.raises(ValueError, match=r"language = 'zz': no catalogue .* data\.options\.catal"):
        messages("zz", [tmp_path])


@pytest.fixture(scope="module")
def catalogues(tmp_path_factory):
    """Twenty catalogues in a language whose words are the English ones written backwards."""
    folder, rng = tmp_path_factory.mktemp("catalogues"), np.random.default_rng(0)
    words = [a + b + c for a in "bdkl" for b in "aeiou" for c in "mnst"]
    for name in "abcdefghijklmnopqrst":
        texts = [" ".join(rng.choice(words, int(rng.integers(3, 8)))) for _ in range(30)]
        write(folder, name, {t: " ".join(w[::-1] for w in t.split()) for t in texts})
    assert 0 < sum(map(is_test_catalogue, "abcdefghijklmnopqrst")) < 10
    return folder


def options(catalogues, path, **more):
    return {
        "path": str(path),
        "catalogues": (str(catalogues),),
        "pieces": PIECES,
        "vocab_size": dictionary_size(PIECES),
        **more,
    }


def pairs_of(given, split):
    words = fairseq_pairs.tokenizer(given)
    found = fairseq_pairs.source(split, given)
    return {tuple(words.decode(side) for side in pair) for pair in found}


def test_pairs_are_translations_either_way_and_splits_share_none(catalogues, tmp_path):
    defaults = {**fairseq_pairs.OPTIONS, **fairseq_pairs.VARIANTS["messages"]}
    given = {**defaults, **options(catalogues, tmp_path, target_lang="xx")}
    found = {split: pairs_of(given, split) for split in fairseq_pairs.SPLITS}
    assert len(found["train"]) > len(found["valid"]) > 0
    assert not found["train"] & found["valid"]
    for english, other in found["valid"]:
        assert other == " ".join(w[::-1] for w in english.split())
    backwards = {**given, "source_lang": "xx", "target_lang": "en"}
    assert pairs_of(backwards, "valid") == {pair[::-1] for pair in found["valid"]}
    data = {"name": "fairseq_pairs:messages", "options": given}
    batch = next(pipeline.train_batches(data, batch_size=4, seed=0))
    assert batch["source"].shape == (4, 64) and batch["source"].max() < given["vocab_size"]


def test_pretraining_reads_both_languages_with_the_same_vocabulary(catalogues, tmp_path):
    more = {"language": "xx", "max_tokens": 32, "prepared": str(tmp_path / "packed")}
    given = options(catalogues, tmp_path, **more)
    data = {"name": "documents:messages", "options": given}
    batch = next(pipeline.train_batches(data, batch_size=4, seed=0))
    assert batch["source"].max() < given["vocab_size"]
    root = documents.folder({**documents.OPTIONS, **documents.VARIANTS["messages"], **given})
    assert len((root / "json" / "train.json").read_text().split("source_lang")) == 3
    assert (root / "dict.txt").read_bytes() == (root / "pairs" / "dict.xx.txt").read_bytes()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"source_lang": "fr", "target_lang": "de"}, "translated from or to 'en'"),
        ({"target_lang": "en"}, "'en' on both sides"),
        ({"target_lang": "zz"}, "language = 'zz': no catalogue"),
        ({"corpus": "nothing"}, "corpus: 'nothing'; known: '', 'docstrings', 'messages'"),
    ],
)
def test_mistakes_are_one_line(catalogues, tmp_path, change, message):
    given = options(catalogues, tmp_path, **change)
    data = {"name": "fairseq_pairs:messages", "options": given}
    with pytest.raises(ValueError, match=message) as error:
        next(pipeline.train_batches(data, batch_size=2, seed=0))
    assert "\n" not in str(error.value)


def test_all_catalogues_for_training_are_refused(tmp_path):
    name = next(n for n in "abcdefghijklmnopqrst" if not is_test_catalogue(n))
    write(tmp_path, name, {"one two three": "eins zwei drei"})
    with pytest.raises(ValueError, match="language = 'xx': no test catalogue"):
        corpus(str(tmp_path / "out"), "xx", PIECES, [str(tmp_path)])
    assert gettext_files.default_folders()
