"""Edits as data: the vocabulary's layout, and each of the four sources."""

import itertools
import json
import logging
import subprocess

import numpy as np
import pytest

from jaxmodels.language import edit_plans
from train.data import bug_injection, code_tokenizer, edit_sources, edits, pipeline
from train.data.code_tokenizer import CodeTokenizer

SMALL = {"packages": ("json", "email"), "vocabulary": 512, "max_source": 120, "max_target": 160}


def options_of(path, variant="repairs", **options):
    data = {"name": f"edits:{variant}", "options": {**SMALL, "path": path, **options}}
    return pipeline.resolve(data)[1]


@pytest.fixture(scope="module")
def bpe(prepared_path):
    return edits.tokenizer(options_of(prepared_path))


def test_ids_have_codet5s_layout(bpe):
    ids = bpe.tokenizer.token_to_id
    assert [ids(t) for t in ("<pad>", "<s>", "</s>", "<unk>", "<mask>")] == [0, 1, 2, 3, 4]
    assert bpe.size == 512
    plain = bpe.size - 24
    assert ids("<extra_id_0>") == plain - 1 and ids("<extra_id_99>") == plain - 100
    assert [ids(t) for t in edit_plans.EDIT_TOKENS] == list(range(plain, bpe.size))


def test_texts_come_back_without_separator_and_with_blanks_around_edit_tokens(bpe):
    text = "<INSERT> || x <INSERT_END> <s> if ( x || y ) :"
    ids = bpe.encode(text)
    assert ids[0] == 1 and ids[-1] == 2 and 1 in ids[1:]
    assert bpe.decode(ids).split() == text.replace("<s>", "").split()
    assert bpe.decode([*bpe.encode("a b"), 7, 8]) == "a b"
    assert bpe.decode(bpe.encode("old </s> context")) == "old"
    # Neither an empty context nor an empty plan leaves a blank of its own.
    assert bpe.encode(edit_plans.model_input("a b", [])) == bpe.encode("a b </s>")
    assert bpe.encode(edit_plans.model_output("a", "a"))[:2] == [1, 1]
    lone = bpe.tokenizer.token_to_id("Ġ")
    assert bpe.pieces("x <DELETE> y")[1] == lone  # a blank before a marker stands alone


def test_published_vocabulary_files_give_the_same_ids(bpe, tmp_path):
    plain = bpe.size - 124
    whole = json.loads(bpe.tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(whole["vocab"]))
    pairs = [m if isinstance(m, str) else " ".join(m) for m in whole["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]))
    again = CodeTokenizer.load(tmp_path)
    text = "<REPLACE_OLD> foo <REPLACE_NEW> bar ( x ) <REPLACE_END> <s> é <extra_id_3>"
    assert again.encode(text) == bpe.encode(text)
    # What writes no plans keeps the published rows.
    without = CodeTokenizer.load(tmp_path, edit_tokens=False)
    without.check_rows(plain + 100)
    assert without.decode(without.encode("x <extra_id_3> y")) == "x y"
    options = {"tokenizer": str(tmp_path), "target": "sequence"}
    assert edits.tokenizer(options).size == plain + 100
    assert edits.tokenizer({**options, "target": "plan"}).size == plain + 124
    added = {t: plain + 100 + n for n, t in enumerate(edit_plans.EDIT_TOKENS)}
    sentinels = {f"<extra_id_{k}>": plain + 99 - k for k in range(100)}
    (tmp_path / "added_tokens.json").write_text(json.dumps({**added, **sentinels}))
    assert CodeTokenizer.load(tmp_path).encode(text) == bpe.encode(text)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<KEEP>": 3}))
    with pytest.raises(ValueError, match=r"<KEEP> is 3, behind the vocabulary it would be"):
        CodeTokenizer.load(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no merges\.txt"):
        CodeTokenizer.load(tmp_path)


def test_too_few_rows_and_a_vocabulary_without_room_are_refused_with_both_numbers(bpe):
    with pytest.raises(ValueError, match="488 rows, the tokenizer 512"):
        bpe.check_rows(488)
    with pytest.raises(ValueError, match="vocabulary 300 is below 385"):
        CodeTokenizer.train(["a"], 300)
    small = CodeTokenizer.train(["a b"], 400)
    assert small.size == 400


def test_long_sequences_are_refused_or_cut_and_counted(caplog, monkeypatch):
    with pytest.raises(ValueError, match="input of 5 tokens is above the maximum of 3"):
        code_tokenizer.padded(range(1, 6), 3, truncate=False, what="input")
    with pytest.raises(ValueError, match="empty input"):
        code_tokenizer.padded([], 3, truncate=False, what="input")
    monkeypatch.setattr(code_tokenizer, "_cut", itertools.count(10))
    with caplog.at_level(logging.WARNING):
        assert code_tokenizer.padded(range(1, 6), 3, truncate=True).tolist() == [1, 2, 5]
    assert "10 sequences cut" in caplog.text


def test_repairs_mend_statements_and_test_examples_stay_while_training_ones_change(prepared_path):
    options = options_of(prepared_path)
    examples = edits.eval_examples("valid", options)
    assert examples == edits.eval_examples("valid", options)
    for e in examples:
        assert e.old != e.new and e.source.startswith(e.old + " </s> ")
        target, plan, parsed = edit_plans.split_prediction(e.output)
        assert parsed and " ".join(target) == e.new
        assert edit_plans.explains(plan, e.old.split(), target)
    raw = edits.source("train", options)[3]
    draw = lambda seed: edits.example_of(raw, options, np.random.default_rng(seed)).old  # noqa: E731
    assert len({draw(seed) for seed in range(20)}) > 5
    batch = next(
        pipeline.eval_batches({"name": "edits", "options": options}, "valid", batch_size=4)
    )
    assert batch["input_ids"].shape == (4, 120) and batch["labels"].shape == (4, 160)
    plain = edits.eval_examples("valid", {**options, "target": "sequence"})
    assert [e.output for e in plain] == [e.new for e in examples]


def test_every_kind_of_bug_changes_a_statement():
    rng = np.random.default_rng(0)
    words = "if self . value is None and self . value == value :".split()
    kinds = set()
    for _ in range(200):
        bug = bug_injection.inject(words, rng)
        assert bug and bug != words
        spans = [s.kind for s in edit_plans.opcodes(bug, words) if s.kind != "keep"]
        kinds.add(tuple(spans))
    assert {("insert",), ("delete",), ("replace",)} <= kinds
    assert bug_injection.inject(["x"], rng) == ["x", "x"]
    assert bug_injection.inject(["1"], rng) == []


def test_splits_share_no_file(prepared_path):
    options = options_of(prepared_path)
    files = [set(edits.source(s, options).arrays["file"]) for s in edits.SPLITS]
    assert all(files) and not (files[0] & files[1] or files[0] & files[2] or files[1] & files[2])


def test_pretraining_corrupts_code_and_sentences_and_its_gold_edits_restore_them(prepared_path):
    options = options_of(prepared_path, "pretraining", words=(5, 20))
    kinds = edits.source("train", options).arrays["modality"]
    assert {"code", "nl"} == set(kinds)
    changed = 0
    for e in edits.eval_examples("train", options)[:300]:
        old, new = e.old.split(), e.new.split()
        assert edit_plans.apply_strict(edit_plans.edit_sequence(old, new), old) == new
        changed += e.old != e.new
    assert changed == 300


def git(folder, *arguments):
    name = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", str(folder), *name, *arguments], check=True, capture_output=True)


def test_a_history_gives_its_small_edits_with_the_commits_subject(tmp_path, prepared_path):
    git(tmp_path, "init", "-q")
    file = tmp_path / "a.py"
    before, after = "def f(a, b):\n    return a + b\n", "def f(a, b):\n    return a - b\n"
    for text, subject in ((before, "Add f"), (after, "Subtract, as f should")):
        file.write_text(text)
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-q", "-m", subject)
    found = list(edit_sources.git_edits(tmp_path))
    context = "Subtract , as f should"
    assert found == [edit_sources.Text("a.py", "return a + b", context, "return a - b")]
    options = options_of(prepared_path, "git", repository=str(tmp_path))
    split = edit_sources.split_of("a.py")
    (example,) = edits.eval_examples(split, options)
    assert example.source == f"return a + b </s> {context}"
    assert example.output == ("<REPLACE_OLD> + <REPLACE_NEW> - <REPLACE_END> <s> return a - b")
    other = next(s for s in edits.SPLITS if s != split)
    with pytest.raises(ValueError, match=f"nothing in split '{other}'"):
        edits.source(other, options)
    with pytest.raises(ValueError, match="is no readable git repository"):
        edit_sources.git_head(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"data\.options\.repository"):
        edits.source("train", options_of(prepared_path, "git"))


def test_a_vocabulary_is_the_librarys_or_that_of_the_data(prepared_path, bpe):
    def tokens(**options):
        return edits.tokenizer(options_of(prepared_path, "pretraining", **options))

    library, own = tokens(), tokens(vocabulary_of="data")
    assert library.tokenizer.get_vocab() == bpe.tokenizer.get_vocab()
    assert own.size == bpe.size and own.tokenizer.get_vocab() != bpe.tokenizer.get_vocab()
    # Merges of the passages themselves need fewer pieces for them.
    texts = edits.source("train", options_of(prepared_path, "pretraining")).arrays["text"]
    pieces = [sum(len(b.pieces(t)) for t in texts) for b in (own, library)]
    assert pieces[0] < pieces[1]
    with pytest.raises(ValueError, match=r"data\.options\.vocabulary_of: no 'own'"):
        edits.source("train", options_of(prepared_path, vocabulary_of="own"))


def write_published(root, dataset="bf-small", count=6):
    """The published layout: buggy, fixed and seq lines of three splits."""
    folder = root / "CoditT5" / dataset
    folder.mkdir(parents=True)
    for split in edits.SPLITS:
        pairs = [(f"a b{i} ( ) ;", f"a c{i} ( ) ;") for i in range(count)]
        texts = {
            "buggy": [edit_plans.model_input(old, ["some context"]) for old, _ in pairs],
            "fixed": [edit_plans.model_output(*pair) for pair in pairs],
            "seq": [new for _, new in pairs],
        }
        for ending, lines in texts.items():
            (folder / f"{split}.{dataset}.{ending}").write_text("\n".join(lines) + "\n")
    return folder


def test_published_files_are_read_line_by_line_and_mistakes_are_named(tmp_path):
    folder = write_published(tmp_path)
    options = options_of(str(tmp_path), "published", max_source=40, max_target=60)
    assert edits.split_sizes(options) == {"train": 6, "valid": 6, "test": 6}
    example = edits.eval_examples("test", options)[2]
    assert (example.old, example.new) == ("a b2 ( ) ;", "a c2 ( ) ;")
    assert example.output.startswith("<REPLACE_OLD> b2 <REPLACE_NEW> c2 <REPLACE_END> <s> a")
    plain = edits.eval_examples("test", {**options, "target": "sequence"})[2]
    assert plain.output == "a c2 ( ) ;"
    with pytest.raises(ValueError, match=r"no 'bf-smal'; did you mean 'bf-small'\?"):
        edit_sources.published(tmp_path, "bf-smal", "train")
    with pytest.raises(FileNotFoundError, match="neither"):
        edit_sources.published(tmp_path, "bf-medium", "train")
    (folder / "test.bf-small.seq").write_text("one line\n")
    with pytest.raises(
        ValueError, match=r"6 in test\.bf-small\.buggy, .* 1 in test\.bf-small\.seq"
    ):
        edit_sources.published(tmp_path, "bf-small", "test")
    # Line ends inside strings, and bytes that are no text, end no line.
    (folder / "test.bf-small.seq").write_bytes(b"a\r;\nb \xff\n" + 4 * b"c\n")
    assert edit_sources.published(tmp_path, "bf-small", "test")[2][:2] == ["a\r;", "b \ufffd"]
    # Training needs no `.seq`: the new text stands behind the plan.
    for split in ("train", "valid"):
        whole = edit_sources.published(tmp_path, "bf-small", split)
        (folder / f"{split}.bf-small.seq").unlink()
        assert edit_sources.published(tmp_path, "bf-small", split) == whole
    without = pipeline.resolve({"name": "edits:published"})[1]
    assert edits.split_sizes(without)["train"] == 46680
    with pytest.raises(ValueError, match=r"data\.options\.target: no 'plans'; did you mean 'plan'"):
        edits.element_spec({**options, "target": "plans"})


def test_raw_files_of_the_three_tasks_become_inputs_and_outputs(tmp_path):
    lines = {
        "comment-update": ("@return the old name <s> <INSERT> int <INSERT_END>",
                           "@return  the name"),
        "code-review": ("int f ( ) { } <s> rename  it <s> please", "int g ( ) { }"),
        "bf-small": ("return a ;", "return b ;"),
    }  # fmt: skip
    wanted = {
        "comment-update": (
            "@return the old name </s> <INSERT> int <INSERT_END>",
            "<DELETE> old <DELETE_END> <s> @return the name",
        ),
        "code-review": (
            "int f ( ) { } </s> rename it </s> please",
            "<REPLACE_OLD> f <REPLACE_NEW> g <REPLACE_END> <s> int g ( ) { }",
        ),
        "bf-small": (
            "return a ; </s> ",
            "<REPLACE_OLD> a <REPLACE_NEW> b <REPLACE_END> <s> return b ;",
        ),
    }
    for dataset, (old, new) in lines.items():
        folder = tmp_path / "raw_data" / dataset
        folder.mkdir(parents=True)
        (folder / f"test.{dataset}.buggy").write_text(f"{old}\n")
        (folder / f"test.{dataset}.fixed").write_text(f"{new}\n")
        options = options_of(str(tmp_path), "raw", dataset=dataset)
        (example,) = edits.eval_examples("test", options)
        assert (example.source, example.output) == wanted[dataset]
        (plain,) = edits.eval_examples("test", {**options, "target": "sequence"})
        assert plain.output == plain.new == example.new
    # A tag of its own moves no plan, and what differs in nothing else has an empty one.
    assert edits.gold_output("@return a b", "@param a b", comments=True) == " <s> @param a b"
    with pytest.raises(FileNotFoundError, match=r"train\.bf-small\.buggy is missing"):
        edits.source("train", options)
