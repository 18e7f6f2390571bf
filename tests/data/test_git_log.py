"""Real clones, made by the tests, read as review histories."""

import os
import subprocess

import pytest

from train.data.git_log import People, parse_person, read_commits, read_history, secret_salt

SALT = b"a salt of the tests"


@pytest.fixture
def clone(tmp_path):
    """`commit(message, files, author)` in a fresh clone; `path` is its directory."""
    return Clone(tmp_path / "project")


@pytest.fixture
def another(tmp_path):
    """A second clone."""
    return Clone(tmp_path / "other")


class Clone:
    def __init__(self, path):
        self.path = path
        self._count = 0
        path.mkdir()
        self.git("init", "-q", "-b", "trunk")

    def git(self, *words, author="Ada Lovelace <ada@calc.org>", committer=None):
        name, mail = parse_person(author)
        by_name, by_mail = parse_person(committer or author)
        when = f"{1_600_000_000 + 3600 * self._count} +0000"
        environment = {
            **os.environ,
            "GIT_AUTHOR_NAME": name,
            "GIT_AUTHOR_EMAIL": mail,
            "GIT_AUTHOR_DATE": when,
            "GIT_COMMITTER_NAME": by_name,
            "GIT_COMMITTER_EMAIL": by_mail,
            "GIT_COMMITTER_DATE": when,
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_SYSTEM": os.devnull,
        }
        subprocess.run(["git", *words], cwd=self.path, env=environment, check=True)

    def commit(self, message, files=("a.c",), **people):
        self._count += 1
        for name in files:
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(str(self._count))
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "--allow-empty-message", "-m", message, **people)


def read(clone, **options):
    return read_history(clone.path, salt=SALT, **options)


def test_authors_reviewers_files_and_work_items_come_from_commits_and_trailers(clone):
    clone.commit(
        'parser: stop the leak\n\nFixes golang/go#12345\n\nFixes: 1a2b3c4d ("older")\n'
        "Reviewed-by: Grace Hopper <grace@navy.mil>\nReviewed-by: Ada Lovelace <ada@calc.org>\n"
        "Acked-by: Emmy Noether <emmy@uni.de>",
        ["src/parser.c", "doc/readme.txt"],
    )
    history = read(clone)
    (record,) = history.records
    assert record.files == ("doc/readme.txt", "src/parser.c")
    assert record.title == "parser: stop the leak"
    assert record.repo == "project"
    assert record.created == 1_600_003_600
    assert len(record.reviewers) == 1, "the author is no reviewer of an own change"
    assert [w.id for w in record.work_items] == ["golang/go#12345", "1a2b3c4d"]
    (acked,) = read(clone, reviewer_trailers=("Reviewed-by", "Acked-by")).records
    assert acked.reviewers[0] == record.reviewers[0] and len(acked.reviewers) == 2
    assert history.notes == ()


def test_identities_merge_by_address_and_by_full_name_and_are_never_written(clone):
    clone.commit("one\n\nReviewed-by: Grace Hopper <grace@navy.mil>")
    clone.commit("two\n\nReviewed-by: G. Hopper <GRACE@navy.mil>")
    clone.commit("three\n\nReviewed-by: grace  hopper <other@home.net>")
    clone.commit("four", author="Grace Hopper <third@work.com>")
    records = read(clone).records
    grace = {p for r in records[:3] for p in r.reviewers} | {records[3].author}
    assert len(grace) == 1
    text = repr(read(clone)).lower()
    for secret in ("grace", "hopper", "lovelace", "navy", "calc.org"):
        assert secret not in text
    again = read_history(clone.path, salt=b"another salt of length").records
    assert {r.author for r in again}.isdisjoint({r.author for r in records})


def test_names_of_people_are_dropped_from_titles_and_hashed_in_paths(clone):
    clone.commit("lovelace branch of parser", ["users/ada/notes.txt", "src/a.c"])
    (record,) = read(clone).records
    assert "lovelace" not in record.title and "parser" in record.title
    assert record.files[0] == "src/a.c" and record.files[1].startswith("users/h")


def test_robots_neither_write_nor_review(clone):
    clone.commit("bump", author="dependabot[bot] <49699333+dependabot[bot]@users.noreply.x>")
    clone.commit("work\n\nReviewed-by: Gopher Robot <gobot@golang.org>")
    history = read(clone)
    assert len(history.records) == 1 and history.records[0].reviewers == ()
    assert history.summary["bot_changes"] == 1
    person = "1234+grace@users.noreply.github.com"
    assert not People(SALT).is_bot(("Grace Hopper", person))


def test_strange_histories_are_read(clone):
    clone.commit("", ["new\nline.c", "\nfirst.c", 'quo"te.c'])
    clone.commit("Ünïcode: größer\n\nReviewed-by: Łukasz Żółć <l@z.pl>", ["naïve/ß.c"])
    clone.commit("separators \x1e and \x1f stay\n\nbody \x1f too", ["b.c"])
    clone.commit("nothing touched", [])
    first, second, third, fourth = read(clone).records
    assert set(first.files) == {"new\nline.c", "\nfirst.c", 'quo"te.c'} and first.title == ""
    assert second.title == "Ünïcode: größer" and second.files == ("naïve/ß.c",)
    assert len(second.reviewers) == 1
    assert third.files == ("b.c",) and third.title == "separators \x1e and \x1f stay"
    assert fourth.files == ()


def test_commits_of_one_gerrit_change_are_one_record(clone):
    clone.commit("start\n\nChange-Id: I1\nReviewed-by: Grace Hopper <g@x>", ["a.c"])
    clone.commit("again\n\nChange-Id: I1\nReviewed-by: Emmy Noether <e@x>", ["b.c"])
    (record,) = read(clone).records
    assert record.title == "start" and set(record.files) == {"a.c", "b.c"}
    assert len(record.reviewers) == 2


def test_merges_are_changes_of_the_branch_author_when_asked_for(clone):
    clone.commit("root")
    clone.git("checkout", "-q", "-b", "topic")
    clone.commit("inner work", ["t.c"], author="Emmy Noether <e@uni.de>")
    clone.git("checkout", "-q", "trunk")
    clone.git(
        *("merge", "-q", "--no-ff", "topic", "-m"),
        "Merge pull request #7 from topic\n\nBetter parsing\n\nReviewed-by: Grace Hopper <g@x>",
    )
    assert [r.files for r in read(clone).records] == [("a.c",), ("t.c",)]
    (merge,) = read(clone, changes="merge").records
    emmy = read(clone).records[1].author
    assert merge.author == emmy and merge.files == ("t.c",) and merge.title == "Better parsing"
    assert len(merge.reviewers) == 1


def test_reviewer_trailers_may_have_any_key(clone):
    clone.commit("one\n\nReviewer: Grace Hopper <g@x>\nReviewed-by: Emmy Noether <e@x>")
    clone.commit("two", author="Grace Hopper <g@x>")
    one, two = read(clone, reviewer_trailers=("Reviewer",)).records
    assert one.reviewers == (two.author,)


def test_a_history_without_review_trailers_says_so_and_offers_the_signers(clone):
    clone.commit("one\n\nSigned-off-by: Grace Hopper <g@x>\nTested-by: Emmy Noether <e@x>")
    history = read(clone)
    assert history.records[0].reviewers == ()
    (note,) = history.notes
    assert "no commit has a trailer reviewed-by" in note and "signers_as_reviewers" in note
    assert "tested-by (1)" in note
    weak = read(clone, signers_as_reviewers=True)
    assert len(weak.records[0].reviewers) == 1 and weak.notes == ()


def test_people_are_the_same_in_all_clones(clone, another):
    clone.commit("one\n\nReviewed-by: Grace Hopper <g@x>")
    another.commit("two", author="grace <g@x>")
    another.commit("three", author="G. H. <h@y>", committer="Grace Hopper <h@y>")
    history = read_history([clone.path, another.path], salt=SALT)
    first, second, third = history.records
    assert first.reviewers == (second.author,) == (third.author,)
    assert [r.repo for r in history.records] == ["project", "other", "other"]
    assert history.summary["changes"] == 3 and history.summary["people"] == 2
    assert history.notes == read_history(another.path, salt=SALT).notes != ()


def test_bounds_limit_the_history(clone):
    for i in range(4):
        clone.commit(f"number {i}")
    assert len(read(clone, max_count=2).records) == 2
    assert [r.title for r in read(clone, revision="HEAD~2").records] == ["number 0", "number 1"]


def test_no_clone_no_commits_and_wrong_options_get_one_line(clone, tmp_path):
    with pytest.raises(ValueError, match=r"data.options.git_dir .*nowhere: no such directory"):
        list(read_commits(tmp_path / "nowhere"))
    (tmp_path / "plain").mkdir()
    with pytest.raises(ValueError, match=r"data.options.git_dir .*plain: not a git repository"):
        list(read_commits(tmp_path / "plain"))
    assert read(clone).notes == (f"data.options.git_dir {clone.path}: no pull requests",)
    clone.commit("x")
    with pytest.raises(ValueError, match=r"bad revision 'nothing'|unknown revision"):
        list(read_commits(clone.path, revision="nothing"))
    with pytest.raises(ValueError, match="changes 'squash'; known: commit, merge"):
        read(clone, changes="squash")


def test_the_salt_is_made_once_and_only_its_owner_reads_it(tmp_path):
    path = tmp_path / "deep" / "salt"
    salt = secret_salt(path)
    assert len(salt) == 32 and secret_salt(path) == salt
    assert path.stat().st_mode & 0o077 == 0
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="at least 16 bytes"):
        secret_salt(path)
