"""fairseq's files, packed documents, and the pairs of fine-tuning."""

import json
import shutil
import struct

import numpy as np
import pytest

from train.data import (
    docstring_files,
    documents,
    fairseq_files,
    fairseq_pairs,
    function_files,
    pipeline,
    sentence_pairs,
)
from train.data.fairseq_files import (
    Dictionary,
    Tokenizer,
    TokenSequences,
    dictionary_size,
    mask_id,
    train_tokenizer,
    write_sequences,
)

PIECES = 80
SIZE = dictionary_size(PIECES)


def text(rng, count):
    syllables = [a + b for a in "bdklmnprst" for b in "aeiou"]
    words = ["".join(syllables[(7 * i + j * j * 3) % 50] for j in range(1, 2 + i % 3))
             for i in range(90)]  # fmt: skip
    return [" ".join(rng.choice(words, int(rng.integers(4, 11)))) + " ." for _ in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Pre-training data in the published layout; one language is three times as likely."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    sentences = text(rng, 400)
    train_tokenizer(sentences, PIECES, root)
    (root / "json").mkdir()
    for split, count in (("train", 120), ("valid", 20)):
        entries = []
        for language, weight in (("en", 3.0), ("fr", 1.0)):
            lines = text(rng, count)
            # A blank line ends a document of three sentences.
            lines = [
                x for i, line in enumerate(lines) for x in ((line, "") if i % 3 == 2 else (line,))
            ]
            (root / f"{split}.{language}").write_text("\n".join(lines) + "\n", "utf-8")
            entries.append({"source": [f"{split}.{language}"], "source_lang": language,
                            "count": count, "weight": weight, "name": language})  # fmt: skip
        (root / "json" / f"{split}.json").write_text(json.dumps(entries), "utf-8")
    return root


def data(root, **options):
    prepared = str(root / "prepared")
    options = {"path": str(root), "max_tokens": 32, "vocab_size": SIZE, "prepared": prepared,
               **options}  # fmt: skip
    return {"name": "documents", "options": options}


def test_sizes_of_the_published_dictionary():
    assert dictionary_size(249_997) == 250_104 and mask_id(249_997) == 250_001


def test_a_dictionary_has_specials_pieces_sentinels_and_filler(tmp_path):
    (tmp_path / "dict.txt").write_text("▁the 9\na b 3 #fairseq:overwrite\n", "utf-8")
    words = Dictionary.read(tmp_path / "dict.txt")
    assert words.symbols[:6] == ["<s>", "<pad>", "</s>", "<unk>", "▁the", "a b"]
    assert words.mask_id == 6 and words.symbols[106] == "<mask_99>" and len(words) == 112
    assert words.encode(["▁the", "new"]) == [4, 3]
    for bad, message in (("only\n", "line 1: 'only' is not"), ("a 1\na 2\n", "'a' comes twice")):
        (tmp_path / "dict.txt").write_text(bad, "utf-8")
        with pytest.raises(ValueError, match=message):
            Dictionary.read(tmp_path / "dict.txt")
    with pytest.raises(ValueError, match="has no <mask>; span corruption needs"):
        Dictionary(["a"], sentinels=False).mask_id  # noqa: B018


def test_text_comes_back_from_its_tokens(corpus):
    words = Tokenizer.read(corpus)
    assert len(words.dictionary) == SIZE
    line = text(np.random.default_rng(9), 1)[0]
    assert words.decode([0, *words.encode(line), 2, 1]) == line


def test_binarized_sets_are_read_as_fairseq_writes_them(tmp_path):
    rows = [[4, 5, 2], [], [70_000, 2]]
    write_sequences(tmp_path / "wide", rows, 100_000)
    found = TokenSequences(tmp_path / "wide")
    assert [r.tolist() for r in found] == rows
    # The same by hand: magic, version, dtype code, count, sizes, byte offsets.
    (tmp_path / "hand.bin").write_bytes(np.array([7, 8, 2, 9, 2], "<u2").tobytes())
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, 8, 2)
    places = struct.pack("<2i", 3, 2) + struct.pack("<2q", 0, 6)
    (tmp_path / "hand.idx").write_bytes(head + places)
    assert [r.tolist() for r in TokenSequences(tmp_path / "hand")] == [[7, 8, 2], [9, 2]]
    (tmp_path / "hand.idx").write_bytes(head + places[:-1])
    with pytest.raises(ValueError, match=r"hand\.idx: version 1, dtype code 8, 49 bytes"):
        TokenSequences(tmp_path / "hand")
    (tmp_path / "hand.idx").write_bytes(b"TNTIDX\x00\x00" + places)
    with pytest.raises(ValueError, match="not an index of fairseq's memory-mapped format"):
        TokenSequences(tmp_path / "hand")


def test_batches_are_corrupted_documents_and_the_same_again(corpus):
    first = next(pipeline.train_batches(data(corpus), batch_size=8, seed=1))
    again = next(pipeline.train_batches(data(corpus), batch_size=8, seed=1))
    other = next(pipeline.train_batches(data(corpus), batch_size=8, seed=2))
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
    assert (first["source"] != other["source"]).any()
    spec = pipeline.element_spec(data(corpus))
    assert {k: v.shape[1:] for k, v in first.items()} == {k: s.shape for k, s in spec.items()}
    sentinel = mask_id(PIECES) + 1
    assert (first["previous"][:, 0] == sentinel).all() and (first["source"][:, 0] <= sentinel).all()
    first_eval = [next(pipeline.eval_batches(data(corpus), "valid", batch_size=4)) for _ in "ab"]
    np.testing.assert_array_equal(first_eval[0]["source"], first_eval[1]["source"])


def test_languages_come_in_proportion_to_their_weights(corpus):
    _, options = pipeline.resolve(data(corpus))
    mixture = documents.source("train", options)
    shares = np.diff([0, *mixture.ends])
    assert abs(shares[0] - 3 * shares[1]) <= 3 and len(mixture) == sum(map(len, mixture.languages))
    assert all(mixture[i][0] == 0 and mixture[i][-1] == 2 for i in range(len(mixture)))


def test_documents_keep_apart_when_asked_to(corpus):
    sizes = {
        mode: len(documents.source("train", pipeline.resolve(data(corpus, break_mode=mode))[1]))
        for mode in documents.BREAK_MODES
    }
    assert sizes["complete_doc"] > sizes["complete"]


def test_held_out_text_is_missed_before_training_begins(corpus, tmp_path):
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "train.json").write_text("[]")
    with pytest.raises(
        ValueError, match=r"wanted a folder with json/train\.json, json/valid\.json"
    ):
        pipeline.train_batches(data(tmp_path), batch_size=2, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "/nowhere"}, "data.options.path = '/nowhere': wanted a folder with json/train"),
        ({"vocab_size": 100}, f"{SIZE} entries with sentinels and filler, .*vocab_size is 100"),
        ({"break_mode": "none"}, "break_mode: 'none'; known: complete, complete_doc"),
        ({"mask_prob": 1.5}, "mask_prob must be in"),
        ({"corpus": "books"}, "data.options.corpus: 'books'; known"),
    ],
)
def test_mistakes_in_pre_training_data_are_named(corpus, options, message):
    with pytest.raises(ValueError, match=message):
        next(pipeline.train_batches(data(corpus, **options), batch_size=2, seed=0))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Binarized pairs and XNLI's layout, as fairseq-preprocess leaves them."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    lines = "".join(f"p{i} 1\n" for i in range(PIECES))
    for side in ("de", "en"):
        (root / f"dict.{side}.txt").write_text(lines, "utf-8")
    for part in ("input0", "input1", "label"):
        (root / "sw" / part).mkdir(parents=True)
        names = "yes 1\nno 1\nmaybe 1\n" if part == "label" else lines
        (root / "sw" / part / "dict.txt").write_text(names, "utf-8")
    for split, count in (("train", 16), ("valid", 5)):

        def rows(count=count):
            return [[*rng.integers(4, 100, int(rng.integers(2, 9))), 2] for _ in range(count)]

        for side in ("de", "en"):
            write_sequences(root / f"{split}.de-en.{side}", rows(), SIZE)
        for part in ("input0", "input1"):
            write_sequences(root / "sw" / part / split, rows(), SIZE)
        labels = [[4 + i % 3, 2] for i in range(count)]
        write_sequences(root / "sw" / "label" / split, labels, 7)
    return root


def test_pairs_are_padded_shifted_and_truncated_as_fairseq_does(pairs):
    options = {"path": str(pairs), "max_source": 6, "max_target": 5, "vocab_size": SIZE}
    data = {"name": "fairseq_pairs", "options": options}
    _, full = pipeline.resolve(data)
    raw = fairseq_pairs.source("train", full)
    batch = next(pipeline.eval_batches(data, "train", batch_size=16))
    for i, (source, target) in enumerate(raw):
        kept = [*source[:-1][:5], 2]
        assert batch["source"][i].tolist() == [1] * (6 - len(kept)) + kept
        kept = [*target[:-1][:4], 2]
        padding = [1] * (5 - len(kept))
        assert batch["targets"][i].tolist() == kept + padding
        assert batch["previous"][i].tolist() == [2, *kept[:-1], *padding]
        # What a decoded text is compared with is the whole target.
        assert fairseq_pairs.eval_transform(full).texts((source, target))[1] is target
    data["options"] = {**options, "reverse_target": True}
    batch = next(pipeline.eval_batches(data, "train", batch_size=16))
    words = batch["source"][0][batch["source"][0] > 2]
    assert batch["targets"][0][: len(words)].tolist() == words[::-1].tolist()


def test_sentence_pairs_have_xnlis_form(pairs, tmp_path):
    options = {"path": str(pairs), "languages": ("sw",), "eval_languages": ("sw",),
               "max_tokens": 14, "vocab_size": SIZE}  # fmt: skip
    data = {"name": "sentence_pairs", "options": options}
    batch = next(pipeline.eval_batches(data, "train", batch_size=16))
    assert batch["label"].tolist() == [i % 3 for i in range(16)]
    first, second, _ = sentence_pairs.source("train", pipeline.resolve(data)[1])[0]
    assert batch["source"][0].tolist() == sentence_pairs.pair_row(first, second, 14).tolist()
    row = sentence_pairs.pair_row([5] * 9 + [2], [6, 7, 2], 12)
    assert row.tolist() == [0, *[5] * 6, 2, 2, 6, 7, 2]
    assert sentence_pairs.classes(pipeline.resolve(data)[1]) == ["yes", "no", "maybe"]
    # Without `input1` there are single sentences.
    shutil.copytree(pairs / "sw", tmp_path / "sw")
    shutil.rmtree(tmp_path / "sw" / "input1")
    single = {**data, "options": {**options, "path": str(tmp_path), "max_tokens": 6}}
    batch = next(pipeline.eval_batches(single, "train", batch_size=16))
    kept = [0, *first[:-1][:4], 2]
    assert batch["source"][0].tolist() == kept + [1] * (6 - len(kept))
    data["options"] = {**options, "num_classes": 2}
    with pytest.raises(ValueError, match="label 2 is not below num_classes 2"):
        list(pipeline.eval_batches(data, "train", batch_size=16))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fairseq_pairs", {"path": "/nowhere"}, "wanted a folder of fairseq-preprocess"),
        ("fairseq_pairs", {"vocab_size": 9}, "entries with sentinels and filler, .* is 9"),
        ("fairseq_pairs", {"max_target": 1}, "max_target 1, wanted >= 2"),
        ("sentence_pairs", {"languages": ("en",)}, "wanted a folder with en/input0/dict.txt"),
        ("sentence_pairs", {"corpus": "news"}, "corpus: 'news'; known: '', 'docstrings'"),
    ],
)
def test_mistakes_in_pairs_are_named(pairs, name, options, message):
    options = {"path": str(pairs), **options}
    with pytest.raises(ValueError, match=message):
        next(pipeline.train_batches({"name": name, "options": options}, batch_size=2, seed=0))


def test_docstrings_fill_the_published_formats(tmp_path):
    options = {"path": str(tmp_path), "packages": ("networkx",), "pieces": 500,
               "vocab_size": dictionary_size(500)}  # fmt: skip
    for name in ("documents", "fairseq_pairs", "sentence_pairs"):
        variant = {"documents": "docstrings", "fairseq_pairs": "docstring_summaries",
                   "sentence_pairs": "docstrings"}[name]  # fmt: skip
        data = {"name": f"{name}:{variant}", "options": options}
        sizes = pipeline.split_sizes(data)
        assert sizes["train"] > 5 * sizes["valid"] > 0
        batch = next(pipeline.train_batches(data, batch_size=4, seed=0))
        assert batch["source"].max() < dictionary_size(500)
    assert docstring_files.sentences("One two three. Four five\nsix.\n\n>>> f(1)\n---\nshort.") == [
        "One two three.",
        "Four five six.",
    ]
    folder = docstring_files.corpus(str(tmp_path), ("networkx",), 500)
    assert len(list(fairseq_files.lines_of(folder / "train.en.txt"))) > 1000


def test_functions_of_a_package_lose_comments_and_docstrings_and_become_documents(tmp_path):
    options = {"path": str(tmp_path), "packages": ("chex",), "pieces": 300,
               "vocab_size": dictionary_size(300)}  # fmt: skip
    data = {"name": "documents:functions", "options": options}
    sizes = pipeline.split_sizes(data)
    assert sizes["train"] > 2 * sizes["valid"] > 0
    folder = function_files.corpus(str(tmp_path), ("chex",), 300)
    lines = list(fairseq_files.lines_of(folder / "train.python.txt"))
    assert sum(line.startswith("def ") for line in lines) > 100
    assert not any("Args:" in line for line in lines)
    code = 'def f(x):\n  """Doc."""\n  # why\n  return  x+1\n'
    assert function_files.plain_code(f"  {code}".replace("\n", "\n  ")) == (
        "def f(x):\n    return x + 1"
    )
    assert function_files.plain_code('def f():\n    """Doc."""') == ""
