"""Token layouts, the API documentation, its baseline, and examples of CAPSTONE."""

import collections
import pickle

import numpy as np
import pytest

from jaxmodels.retrieval import capstone
from train.data import docstring_corpus, docstrings, expansion, pipeline, pseudo_queries
from train.data.bm25 import Bm25
from train.data.wordpiece import WordPiece, cross_row, pair_lengths

VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] title text caf ##e un !".split()


@pytest.fixture(scope="module")
def words():
    return WordPiece(VOCABULARY)


def test_wordpiece_lowers_strips_accents_splits_and_gives_up_on_long_words(words):
    assert words.pieces("Title CAFÉ!un") == [5, 7, 8, 10, 9]
    assert words.pieces("unfit") == [1] and words.pieces("un" * 60) == [1]
    assert words.pieces("\u6587title") == [1, 5]


def test_separators_inside_words_are_one_token(words):
    assert words.pieces("title[SEP]text[SEP]") == [5, 3, 6, 3]
    assert words.single("title[SEP]text", 4) == [2, 5, 3, 3]


def test_layouts_of_the_three_systems(words):
    assert words.query("title text title", 4) == [2, 5, 6, 3]
    assert words.query("title text title", 4, cut=True) == [2, 5, 6, 5]
    assert words.pair("title", "text text text", 6) == [2, 5, 3, 6, 6, 3]
    assert words.pair("title", "text text", 4) == [2, 3, 6, 3]
    assert words.pair("title", "", 6) == [2, 5, 3]  # a missing text has no separator of its own
    assert pair_lengths(9, 2, 7) == (5, 2) and pair_lengths(2, 9, 7) == (2, 5)
    query, document = [2, 9, 3], [2, 5, 3, 6, 3]
    assert cross_row(query, document) == [2, 9, 3, 5, 3, 6]
    assert cross_row(query, document, last=True) == [2, 9, 3, 5, 3, 6, 3]
    assert pickle.loads(pickle.dumps(words)).pieces("title") == [5]


def test_wrong_vocabularies_and_lengths_are_refused(words):
    with pytest.raises(ValueError, match=r"has no \[SEP\]"):
        WordPiece(["[PAD]", "[UNK]", "[CLS]"])
    with pytest.raises(ValueError, match=r"\[PAD\] must be id 0"):
        WordPiece(["a", "[UNK]", "[CLS]", "[SEP]"])
    with pytest.raises(ValueError, match="a length of 2 leaves no token"):
        words.single("title", 2)


def test_a_learned_vocabulary_is_the_same_every_time():
    texts = ["solve the linear system", "the solver solves", "linear lines"] * 3
    first, second = (WordPiece.learn(texts, 60) for _ in range(2))
    assert first.words == second.words and len(first) <= 60 and "the" in first.ids
    assert all(i != 1 for i in first.pieces("solve lines"))


DOCSTRING = """solve(a, b)

Solve a system
of equations.

Uses a factorization of the given matrix, and then back substitution, which takes a number of
steps that grows with the cube of its size.

Parameters
----------
a : array
    Left side.

See Also
--------
lstsq, :func:`numpy.linalg.inv`
qr : Factorization.

Examples
--------
>>> solve(1, 2)
"""


def test_docstrings_become_query_document_and_links():
    query, document, links = docstring_corpus.parse(DOCSTRING)
    assert query == "Solve a system of equations."
    assert document.startswith("Uses a factorization") and "Left side." in document
    assert ">>>" not in document and "lstsq" not in document and "solve(a" not in document
    assert links == ("lstsq", "numpy.linalg.inv", "qr")
    assert docstring_corpus.parse("Too short.\n\nBody.") is None


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return pipeline.resolve(
        {
            "name": "docstrings",
            "options": {
                "path": str(tmp_path_factory.mktemp("docstrings")),
                "packages": ("networkx",),
                "vocabulary": 1500,
                "query_length": 16,
                "document_length": 40,
                "body_length": 24,
                "negatives": 2,
                "expansion": "gradual",
                "n_parts": 3,
                "curriculum_steps": 9,
                "pseudo_queries": 8,
            },
        }
    )[1]


def test_no_module_is_in_two_splits_and_no_document_holds_its_query(options):
    c = docstrings.collection(options)
    assert len(c.entries) > 900
    homes = collections.defaultdict(set)
    for entry, split in zip(c.entries, c.splits):
        homes[docstring_corpus.split_of(entry.module)].add(split)
        assert entry.query not in entry.text
    by_module = {e.module: s for e, s in zip(c.entries, c.splits)}
    assert set(by_module.values()) == set(docstrings.SPLITS)
    assert len(set(c.queries)) == len(c.queries)


def test_queries_without_hard_negatives_are_refused(options, tmp_path):
    (tmp_path / "negatives.json").write_text("{}")
    with pytest.raises(ValueError, match="no query has hard negatives"):
        docstrings.source("train", {**options, "negatives_file": tmp_path / "negatives.json"})


def test_bm25_finds_documents_by_their_synopses(options):
    found = docstrings.retrieval_set({**options, "expansion": ""}, "test")
    numbers = found.baseline()
    assert 0.3 < numbers["bm25_mrr@10"] < 0.7
    assert numbers["bm25_success@10"] > numbers["bm25_success@1"]
    graded = sum(len(j) > 1 for j in found.graded.values())
    assert graded > 20


def test_batches_are_the_curriculum_whatever_the_start(options, capsys):
    data = {"name": "docstrings", "options": options}
    whole = pipeline.train_batches(data, batch_size=4, seed=3)
    # How far the parts are apart is said before training, and once.
    assert (
        capsys.readouterr().out.count("ROUGE-L of pseudo queries with the real query: part 1") == 1
    )
    batches = [next(whole) for _ in range(9)]
    assert batches[0]["doc_ids"].shape == (4, 3, 40)
    for start in (2, 3, 7):
        part = pipeline.train_batches(data, batch_size=4, seed=3, start_step=start)
        for step in range(start, 9):
            again = next(part)
            for name in again:
                np.testing.assert_array_equal(again[name], batches[step][name], err_msg=name)
        part.close()
    whole.close()
    halves = [
        next(
            pipeline.train_batches(
                data, batch_size=4, seed=3, start_step=5, process_index=p, process_count=2
            )
        )["doc_ids"]
        for p in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate(halves), batches[5]["doc_ids"])


def test_examples_equal_the_strings_of_the_method_and_later_parts_are_closer(options):
    c, texts = docstrings.collection(options), docstrings.documents(options)
    spread = docstrings.relevance_spread(options)
    assert spread[0][0] > spread[1][0] > spread[2][0]
    row, pseudo = 5, docstrings.documents(options).texts[5][0]
    whole = {**options, "body_length": 0, "document_length": 10_000}
    layout = expansion.Layout.of(whole, c.tokenizer)
    got = expansion.view_row(texts, layout, row, 0, whole)
    fields = ["", c.texts[row], pseudo]
    text = capstone.expand_document(*fields).removeprefix("[SEP]")
    assert got == c.tokenizer.single(text, 10_000)
    # The pseudo query stands at the end: truncation takes it first.
    short = expansion.Layout.of({**whole, "document_length": 20}, c.tokenizer)
    plain = short.row(texts.fields(row), None)
    assert short.row(texts.fields(row), texts.pseudo(row)[0]) == plain
    first = expansion.Layout.of(
        {**whole, "document_length": 20, "expansion_mode": "prepend"}, c.tokenizer
    )
    assert first.row(texts.fields(row), texts.pseudo(row)[0]) != plain


def test_gold_and_joined_expansion(options):
    gold = docstrings.train_transform({**options, "expansion": "gold"})
    c = docstrings.collection(options)
    query = int(docstrings.source("train", options)[0]["query"])
    rng = np.random.default_rng(0)
    document = gold.document(query, query, rng)
    assert document[-1 - len(c.query_pieces[query]) : -1] == c.query_pieces[query].tolist()
    joined = {**options, "expansion": "", "expand_doc_w_query": True, "top_k_query": 2}
    transform = docstrings.train_transform(joined)
    row = transform.document(query, query, rng)
    two = expansion.joined_pseudo(docstrings.documents(joined), query, 2)
    assert len(two) > 3 and row[25] == c.tokenizer.separator


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expansion": "3part"}, "data.options.expansion: .*'3part'.*known: gold"),
        ({"expansion": "random", "top_k_query": 2}, "top_k_query must be 1"),
        ({"expansion": "random", "expand_doc_w_query": True}, "two ways to expand"),
        ({"gold_query_prob": 0.5}, "gold_query_prob needs an expansion strategy"),
        ({"expansion": "random", "gold_query_prob": 2}, r"must be in \[0, 1\]"),
        ({"document_length": 2}, "document_length must be at least 3"),
        ({"views": 0}, "views must be at least 1"),
        ({"delimiter": "comma"}, "delimiter 'comma'; known: sep, blank"),
        ({"expansion": "gradual", "n_parts": 0}, "n_parts must be at least 1"),
    ],
)
def test_contradictory_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        docstrings.element_spec({**docstrings.OPTIONS, **changes})


def test_the_curriculum_is_as_long_as_the_run():
    from train.command_line import read_flags

    def given(*flags):
        words = ["train", "--config=configs/capstone.py", "--workdir=w", *flags]
        config, _ = read_flags(words, need_workdir=True)
        return config.steps, pipeline.resolve(config.data)[1]["curriculum_steps"]

    assert given("--config.steps=60") == (60, 60)
    assert given("--config.data.options.curriculum_steps=30", "--config.steps=60") == (60, 30)


def test_short_curricula_are_refused():
    options = {**docstrings.OPTIONS, "expansion": "gradual", "n_parts": 3, "curriculum_steps": 2}
    with pytest.raises(ValueError, match="max_steps 2 are fewer than the 3 parts"):
        docstrings.stages(options)


def test_bm25_by_hand():
    index = Bm25(["a b", "a a c", "d"], k1=0.9, b=0.4)
    scores = index.scores(["a", "z", "c d"])
    idf = np.log(1 + (3 - 2 + 0.5) / 2.5)
    assert scores[0, 0] == pytest.approx(idf * 1.9 / (1 + 0.9 * (0.6 + 0.4 * 2 / 2)), rel=1e-6)
    assert not scores[1].any() and scores[0, 1] > scores[0, 0]
    assert index.search(["a"], 5)[1].tolist() == [[1, 0, 2, -1, -1]]


def test_pseudo_queries_are_fragments_that_never_change():
    text = "Compute the shortest path between two nodes. Weights must not be negative."
    first = pseudo_queries.extractive("d1", "nx.shortest_path", text, 5)
    assert first == pseudo_queries.extractive("d1", "nx.shortest_path", text, 5)
    assert first != pseudo_queries.extractive("d2", "nx.shortest_path", text, 5)
    known = {*text.lower().replace(".", "").split(), "shortest", "path"}
    assert all(set(q.split()) <= known for q in first)
    with pytest.raises(ValueError, match="document 'd1': no words"):
        pseudo_queries.extractive("d1", "f", "...", 5)
