"""trec_eval's rules, run and judgment files."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.retrieval import metrics
from jaxmodels.retrieval.answers import contains_answer, first_hit
from train.data import retrieval_files as files


def test_ties_are_broken_by_id_descending_in_byte_order_after_rounding_to_float32():
    scores = {"d1": 1.0, "d10": 1.0 + 1e-10, "d9": 1.0, "é": 1.0, "a": 2.0}
    assert metrics.ranking(scores) == ["a", "é", "d9", "d10", "d1"]


def test_recall_and_success_differ_and_levels_shift_what_is_relevant():
    run = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}}
    judged = {"q": {"a": 1, "c": 2, "x": 2, "y": 1}}
    low = metrics.evaluate(run, judged, ["recall@2", "success@2", "mrr", "hole@2"]).mean
    assert low == {"recall@2": 0.25, "success@2": 1.0, "mrr": 1.0, "hole@2": 0.5}
    high = metrics.evaluate(run, judged, ["recall@3", "success@2", "mrr"], relevance_level=2).mean
    assert high == {"recall@3": 0.5, "success@2": 0.0, "mrr": pytest.approx(1 / 3)}


def test_missing_queries_count_as_zero_or_not_at_all():
    run, judged = {"a": {"x": 1.0}, "z": {"x": 1.0}}, {"a": {"x": 1}, "b": {"x": 1}}
    zero = metrics.evaluate(run, judged, ["mrr@10"])
    assert zero.mean["mrr@10"] == 0.5 and zero.missing == ["b"] and zero.unjudged == ["z"]
    assert metrics.evaluate(run, judged, ["mrr@10"], missing="skip").mean["mrr@10"] == 1.0


def test_wrong_requests_are_refused():
    run, judged = {"a": {"x": 1.0}}, {"a": {"x": 1}}
    with pytest.raises(ValueError, match=r"no measure 'mmr@10', did you mean 'mrr@k'"):
        metrics.evaluate(run, judged, ["mmr@10"])
    with pytest.raises(ValueError, match="no measure 'recall'"):
        metrics.evaluate(run, judged, ["recall"])
    with pytest.raises(ValueError, match="missing 'drop'; known"):
        metrics.evaluate(run, judged, missing="drop")
    for other in ({}, {"b": {"x": 1.0}}):
        for missing in metrics.MISSING:
            with pytest.raises(ValueError, match=f"0 of its {len(other)} queries judged"):
                metrics.evaluate(other, judged, missing=missing)
    with pytest.raises(ValueError, match="query a: the score of document 'x' is not a number"):
        metrics.evaluate({"a": {"x": float("nan")}}, judged)


GRADES = st.dictionaries(st.sampled_from([f"d{i}" for i in range(12)]), st.integers(0, 3))
SCORES = st.dictionaries(
    st.sampled_from([f"d{i}" for i in range(12)]),
    st.sampled_from([0.0, 1.0, 1.0 + 1e-10, 1.5, 2.0]),
    min_size=1,
)


@settings(max_examples=60, deadline=None)
@given(SCORES, GRADES.filter(len))
def test_measures_equal_trec_evals_under_ties(scores, grades):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    names = {
        "ndcg_cut_5": "ndcg@5",
        "map": "map",
        "map_cut_5": "map@5",
        "recip_rank": "mrr",
        "recall_5": "recall@5",
        "P_5": "precision@5",
        "success_5": "success@5",
        "ndcg": "ndcg",
    }
    evaluator = pytrec_eval.RelevanceEvaluator(
        {"q": grades},
        {"ndcg_cut.5", "map", "map_cut.5", "recip_rank", "recall.5", "P.5", "success.5", "ndcg"},
    )
    wanted = evaluator.evaluate({"q": scores})["q"]
    got = metrics.evaluate({"q": scores}, {"q": grades}, list(names.values())).per_query["q"]
    for theirs, ours in names.items():
        assert got[ours] == pytest.approx(wanted[theirs], abs=1e-9), ours


def test_interval_is_students():
    mean, width = metrics.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and width == pytest.approx(4.303 * 3**-0.5, rel=1e-3)
    assert metrics.interval([1.0])[1] == 0


def test_runs_and_judgments_round_trip_and_other_tools_read_them(tmp_path):
    run = {"1": {"d1": 1.0, "d9": 1.0, "d2": 0.25}, "2": {"d3": -1.5}}
    files.write_run(tmp_path / "run", run)
    lines = (tmp_path / "run").read_text().splitlines()
    assert lines[0] == "1 Q0 d9 1 1 jaxmodels" and len(lines) == 4
    assert files.read_run(tmp_path / "run") == run
    files.write_run(tmp_path / "ranked", run, from_ranking=True)
    again = files.read_run(tmp_path / "ranked")
    assert again["1"] == {"d9": -1.0, "d1": -2.0, "d2": -3.0}
    judged = {"1": {"d1": 2}, "2": {"d3": 1}}
    files.write_judgments(tmp_path / "qrels", judged)
    assert files.read_judgments(tmp_path / "qrels") == judged
    ir_measures = pytest.importorskip("ir_measures")
    theirs = ir_measures.calc_aggregate(
        [ir_measures.nDCG @ 10],
        ir_measures.read_trec_qrels(str(tmp_path / "qrels")),
        ir_measures.read_trec_run(str(tmp_path / "ranked")),
    )
    ours = metrics.evaluate(again, judged, ["ndcg@10"]).mean["ndcg@10"]
    assert next(iter(theirs.values())) == pytest.approx(ours, abs=1e-9)


def test_published_layouts_are_read(tmp_path):
    def put(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    assert files.read_judgments(put("dev", "7\t12\n")) == {"7": {"12": 1}}
    assert files.read_judgments(put("train", "7\t0\t12\t1\n")) == {"7": {"12": 1}}
    rocket = files.Corpus(put("a.tsv", "0\tTitle\tText one\n1\t\tText two\n"))
    assert rocket.document(0) == ("Title", "Text one") and rocket.index.row(1) == 1
    swapped = files.Corpus(put("b.tsv", "x\tText\tTitle\ny\tOnly text\n"), "capstone")
    assert swapped.document(0) == ("Title", "Text") and swapped.document(1) == ("", "Only text")
    shifted = files.Corpus(put("c.tsv", "id\ttext\ttitle\n1\tText\tTitle\n2\tB\tA\n"), "psgs")
    assert list(shifted.ids) == ["0", "1"] and shifted.document(1) == ("A", "B")
    given = '{"_id": "x", "title": "T", "text": "a"}\n{"_id": "MED-1", "text": "b\\tc"}\n'
    beir = files.Corpus(put("corpus.jsonl", given), "beir")
    assert list(beir.ids) == ["x", "MED-1"]
    assert [beir.document(i) for i in range(2)] == [("T", "a"), ("", "b\tc")]
    assert files.read_queries(tmp_path / "corpus.jsonl") == {"x": "a", "MED-1": "b\tc"}
    beir = put("test.tsv", "query-id\tcorpus-id\tscore\nq1\tMED-1\t2\nq1\tx\t0\n")
    assert files.read_judgments(beir) == {"q1": {"MED-1": 2, "x": 0}}
    pseudo = files.PseudoQueries(put("p.tsv", "y\tq3\nx\tq1\tq2\n"), swapped.index)
    assert pseudo[0] == ["q1", "q2"] and pseudo[1] == ["q3"]
    triples = files.read_triples(put("t.tsv", "7\t1\t2\n7\t1\t3\n7\t1\t2\n"), 2)
    assert triples == {"7": ["2", "3"]}
    many = "".join(f"{q}\t0\t{d}\n" for q in (1, 2) for d in range(100))
    triples = files.read_triples(put("t.tsv", many), 30)
    # Not the first thirty, which may be the hardest: any, and the same ones every time.
    assert all(len(set(t)) == 30 and max(map(int, t)) > 60 for t in triples.values())
    assert triples["1"] != triples["2"] and triples == files.read_triples(tmp_path / "t.tsv", 30)
    put(
        "n.json",
        '[{"question": "q", "answers": [], "positive_ctxs": [{"title": "", "text": "",'
        ' "passage_id": "5"}], "hard_negative_ctxs": [3, 4]},'
        ' {"query_id": 9, "query_string": "r", "pos_id": ["1"], "neg_id": ["2"]}]',
    )
    first, second = files.read_training_json(tmp_path / "n.json")
    assert first.positives == ["5"] and first.negatives == ["3", "4"] and second.id == "9"
    files.write_training_json(tmp_path / "m.json", [second])
    assert list(files.read_training_json(tmp_path / "m.json")) == [second]
    assert files.read_questions_csv(put("qa.csv", "who\t['a', 'b']\t3\n")) == [
        ("who", ["a", "b"], "3")
    ]


def read_all(path):
    return list(files.read_training_json(path))


@pytest.mark.parametrize(
    ("text", "reader", "message"),
    [
        ("7 0 12\n", files.read_judgments, "line 1: wanted `qid 0 docid grade`"),
        (
            "query-id corpus-id score\n7 0 a 1\n",
            files.read_judgments,
            "line 2: wanted `qid doci",
        ),
        ('{"text": "a"}\n', lambda f: files.Corpus(f, "beir"), "line 1: wanted JSON with the str"),
        ("7 Q0 d 1\n", files.read_run, "line 1: wanted `qid Q0 docid rank score tag`"),
        ("7 Q0 d 1 2 t\n7 Q0 d 2 1 t\n", files.read_run, "line 2: query '7' lists 'd' twice"),
        ("7 what\n", files.read_queries, "line 1: wanted `qid<tab>query`"),
        ("7\ta\n7\tb\n", files.read_queries, "line 2: query '7' stands there twice"),
        ("a\tt\tx\na\tt\tx\n", files.Corpus, "id 'a' stands there twice"),
        ("a\n", files.Corpus, "line 1: wanted rocketqa fields"),
        ("D1\tt\tx\n", lambda f: files.Corpus(f, "psgs"), "line 1: psgs ids are numbers, not 'D1'"),
        ('[{"query_id": 1, "query_string": "q", "pos_id": []}]', read_all, "entry 0: no 'neg_id'"),
        ('[{"title": "q"}]', read_all, "entry 0: neither query_string nor question"),
        ("q\tnot a list\n", files.read_questions_csv, "line 1: 'not a list' is no list"),
    ],
)
def test_broken_files_are_named(tmp_path, text, reader, message):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match=message):
        reader(tmp_path / "file")


def test_pseudo_queries_go_by_id_and_absent_ones_are_named(tmp_path):
    (tmp_path / "corpus").write_text("a\t\tx\nb\t\ty\n")
    index = files.Corpus(tmp_path / "corpus").index
    for text, message in (
        ("a\tq\n", "no pseudo queries for 1 documents, the first is 'b'"),
        ("a\tq\na\tq\n", "line 2: document 'a' stands there twice"),
        ("c\tq\n", "line 1: no document 'c'"),
    ):
        (tmp_path / "pseudo").write_text(text)
        with pytest.raises(ValueError, match=message):
            files.PseudoQueries(tmp_path / "pseudo", index)


def test_lines_are_read_by_number_with_and_without_a_last_newline(tmp_path):
    for text in ("a\nbé\n", "a\nbé", "a\r\nbé"):
        (tmp_path / "t").write_bytes(text.encode())
        assert list(files.Lines(tmp_path / "t")) == ["a", "bé"]
    (tmp_path / "t").write_text("")
    assert len(files.Lines(tmp_path / "t")) == 0


def test_answers_are_found_as_whole_tokens_whatever_their_case_and_accents():
    assert contains_answer("The capital is S\u00e3o Paulo, Brazil.", ["Sa\u0303o paulo"])
    assert contains_answer("in 1,024 steps", ["1,024"]) and contains_answer("U.S. law", ["u.s."])
    assert not contains_answer("seventeen", ["seven"]) and not contains_answer("text", ["", "a"])
    assert first_hit(["x", "a cat", "cat"], ["Cat"]) == 1 and first_hit(["x"], ["y"]) is None
