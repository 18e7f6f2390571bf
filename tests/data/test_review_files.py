"""Review histories in files, simulated histories, and how they are split."""

import gzip
from collections import Counter

import numpy as np
import pytest

from jaxmodels.graphs.review_graph import PULL_REQUEST, WORD, build_graph
from train.data import code_review, pipeline
from train.data.review_files import read_reviews, write_csv, write_json_lines
from train.data.review_simulator import simulate_reviews

HEADER = "change,author_time,commit_time,author,reviewers,acked,signers,n_files,files,tokens\n"


@pytest.fixture(scope="module")
def history():
    return simulate_reviews(0, n_people=20, n_changes=120, n_areas=4)


def options(**given):
    return pipeline.resolve({"name": "code_review", "options": given})[1]


def test_a_history_never_seen_is_read(tmp_path):
    path = tmp_path / "other.csv.gz"
    text = "change,commit_time,author,reviewers,files,tokens\n"
    text += "x1,1700000000,zz9,qq1 qq2,,fix größe\nx2,1700003600,qq1,,a b.c|d.c,\n"
    path.write_bytes(gzip.compress(text.encode()))
    first, second = read_reviews(path)
    assert first.reviewers == ("qq1", "qq2") and first.files == () and first.repo == "other"
    assert second.files == ("a b.c", "d.c") and second.created == 1700003600
    assert build_graph([first, second]).num_nodes == 3 + 2 + 2 + 2 + 1


def test_acked_and_signers_count_when_asked_for(tmp_path):
    path = tmp_path / "h.csv"
    path.write_text(HEADER + "c1,1,2,a,b,c b,d,1,f.c,word\n")
    assert read_reviews(path)[0].reviewers == ("b",)
    assert read_reviews(path, acked_as_reviewers=True)[0].reviewers == ("b", "c")
    everybody = read_reviews(path, acked_as_reviewers=True, signers_as_reviewers=True)
    assert everybody[0].reviewers == ("b", "c", "d")


def test_written_histories_are_read_again(tmp_path, history):
    write_json_lines(tmp_path / "h.jsonl.gz", history)
    assert read_reviews(tmp_path / "h.jsonl.gz") == history
    write_csv(tmp_path / "h.csv", history)
    for read, record in zip(read_reviews(tmp_path / "h.csv"), history, strict=True):
        kept = ("id", "author", "repo", "created", "reviewers", "files", "title")
        assert all(getattr(read, name) == getattr(record, name) for name in kept)
    assert not list(tmp_path.glob("*.part"))


def test_malformed_lines_are_named_by_file_and_line(tmp_path):
    for name, text, message in [
        ("a.csv", HEADER + "c1,1,2,a\n", r"a.csv line 2: 4 fields, the header has 10"),
        ("b.csv", HEADER + "c1,1,soon,a,,,,0,,\n", r"b.csv line 2: the time 'soon'"),
        ("c.csv", "change,files\nc1,f\n", r"c.csv line 1: no column author"),
        ("d.csv", HEADER + "c1,1,2,,,,,0,,\n", r"d.csv line 2: record 0: the field 'author'"),
        ("e.csv", HEADER + 'c1,1,2,"a\n', r"e.csv line \d: unexpected end of data"),
        ("f.csv", HEADER, r"f.csv: no pull requests"),
        ("g.csv", "", r"g.csv: no pull requests"),
        ("h.jsonl", '{"id": "c1"\n', r"h.jsonl line 1: not JSON"),
        ("i.jsonl", '\n{"id": "c1", "author": "a"}\n[1]\n', r"i.jsonl line 3: record 1: list"),
        ("j.txt", "", r"j.txt: a review history ends in .csv or .jsonl"),
        ("k.csv.gz", "not gzip", r"k.csv.gz: Not a gzipped file"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_reviews(tmp_path / name)
    (tmp_path / "l.csv").write_bytes(HEADER.encode() + b"c1,1,2,\xff,,,,0,,\n")
    with pytest.raises(ValueError, match=r"l.csv: 'utf-8' codec"):
        read_reviews(tmp_path / "l.csv")


def test_the_simulator_is_seeded_and_as_specified():
    records = simulate_reviews(5)
    assert records == simulate_reviews(5) and records != simulate_reviews(6)
    assert len(records) == 3000 and len({r.repo for r in records}) == 3
    assert all(r.author not in r.reviewers and 1 <= len(r.reviewers) <= 2 for r in records)
    assert np.mean([len(r.reviewers) == 2 for r in records]) == pytest.approx(0.25, abs=0.03)
    assert np.mean([bool(r.work_items) for r in records]) == pytest.approx(0.2, abs=0.03)
    assert all(3 <= len(r.title.split()) <= 7 for r in records)
    assert max(r.day for r in records) - min(r.day for r in records) == 749
    areas = {f.rsplit("/", 1)[0] for r in records for f in r.files}
    assert len(areas) == 12
    authors = Counter(r.author for r in records).most_common()
    harmonic = sum(1 / i for i in range(1, 121))
    assert authors[0][1] / 3000 == pytest.approx(1 / harmonic, rel=0.15)
    # Maintainers leave: who reviews most in an area is somebody else after a third.
    changed = 0
    for area in areas:
        in_area = [r for r in records if r.files[0].startswith(area)]
        early = Counter(p for r in in_area[: len(in_area) // 3] for p in r.reviewers)
        late = Counter(p for r in in_area[-len(in_area) // 3 :] for p in r.reviewers)
        changed += {p for p, _ in early.most_common(3)} != {p for p, _ in late.most_common(3)}
    assert changed >= 9


def test_a_small_project_can_be_simulated_and_impossible_ones_are_refused():
    records = simulate_reviews(0, n_people=15, n_changes=50, n_areas=1, n_repos=1)
    assert len({f.rsplit("/", 1)[0] for r in records for f in r.files}) == 1
    for wrong in ({"n_people": 4}, {"n_areas": 2}, {"n_changes": 0}):
        with pytest.raises(ValueError, match="simulate_reviews"):
            simulate_reviews(0, **wrong)


def test_test_changes_and_their_words_are_not_in_the_graph():
    for split in code_review.SPLIT_KINDS:
        given = options(n_people=20, n_changes=120, n_areas=4, split=split)
        data = code_review.read(given)
        assert data.split == split and all(r.reviewers for r in data.test)
        keys = set(data.graph.node_keys[data.graph.nodes_of(PULL_REQUEST)].tolist())
        assert keys.isdisjoint(r.id for r in data.test)
        assert len(keys) + len(data.test) == 120
        # Neither their words nor their share in the PMI counts: the graph is that of the others.
        others = [r for r in simulate_reviews(0, 20, 120, 4) if r.id in keys]
        again = build_graph(others)
        assert np.array_equal(again.weights["word_word"], data.graph.weights["word_word"])
        assert np.array_equal(again.nodes_of(WORD), data.graph.nodes_of(WORD))
    last = max(r.created for r in data.graph.records)
    assert min(r.created for r in data.test) >= last, "temporal: nothing from the future"


def test_the_window_and_the_reviewed_changes_can_be_chosen(tmp_path, history):
    unreviewed = [r for i, r in enumerate(history) if i % 2]
    plain = [r if i % 2 else r.__class__(**{**vars(r), "reviewers": ()}) for i, r in
             enumerate(history)]  # fmt: skip
    path = tmp_path / "h.jsonl"
    write_json_lines(path, plain)
    data = code_review.read(options(path=str(path), reviewed_only=True, test_share=0.5))
    assert len(data.graph.records) + len(data.test) == len(unreviewed)
    border = history[80].created
    data = code_review.read(
        options(path=str(path), split="temporal", test_from=border, max_train_changes=30)
    )
    assert len(data.graph.records) == 30
    assert all(r.created >= border for r in data.test)
    with pytest.raises(ValueError, match=r"test_from 'soon': an ISO date"):
        code_review.read(options(path=str(path), test_from="soon"))
    with pytest.raises(ValueError, match="no change is left to train on"):
        code_review.read(options(path=str(path), split="temporal", test_from="1999-01-01"))
    with pytest.raises(ValueError, match="no reviewed change to test on"):
        code_review.read(options(path=str(path), split="temporal", test_from="2099-01-01"))


def test_several_files_are_several_repositories(tmp_path, history):
    for name in ("one", "two"):
        write_csv(tmp_path / f"{name}.csv", [r for r in history if r.repo == history[0].repo])
    both = f"{tmp_path / 'one.csv'},{tmp_path / 'two.csv'}"
    data = code_review.read(options(path=both))
    assert {r.repo for r in data.graph.records} == {"one", "two"}
    with pytest.raises(ValueError, match=r"data.options.path: no such file: .*three.csv"):
        code_review.read(options(path=str(tmp_path / "three.csv")))
    with pytest.raises(ValueError, match="path or git_dir, not both"):
        code_review.read(options(path=both, git_dir="."))
