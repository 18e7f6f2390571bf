"""Histories of local git clones as code-review records, with hashed identities.

A pull request is a commit (commits with one Gerrit `Change-Id` are one), its reviewers stand in
`Reviewed-by` trailers, its work items in `Fixes`, `Closes` or `Bug` references. People are merged
by e-mail address and by full name; names and addresses never leave this module.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
import re
import secrets
import subprocess
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jaxmodels.graphs.review_records import BOTS, PullRequest, WorkItem

# Addresses that many people share.
_SHARED = re.compile(
    r"^$|^(noreply|no-reply|none|unknown|root|nobody)@|@(localhost|none|example)\b"
)
_PERSON = re.compile(r"^\s*\"?(?P<name>[^<\"]*?)\"?\s*<(?P<mail>[^<>]*)>")
_REFERENCE_LINE = re.compile(
    r"^\s*(?:fix(?:es|ed)?|closes?d?|bugs?|resolves?)\s*:\s*(?P<keyed>\S.*)$"
    r"|^\s*(?:fix(?:es|ed)?|closes?d?|resolves?|updates?)\s+(?P<plain>\S*#\d+)",
    re.IGNORECASE | re.MULTILINE,
)
_MERGED_PULL_REQUEST = re.compile(r"^(?:Merge pull request|Auto merge of|Merge PR) #(\d+)")
_FIELDS = (
    "%H",
    "%P",
    "%at",
    "%ct",
    "%aN",
    "%aE",
    "%cN",
    "%cE",
    "%s",
    "%(trailers:only,unfold)",
    "%b",
)
_CHANGES = ("commit", "merge")
_COUNTS = ("commits", "changes", "bot_changes", "with_reviewers", "with_signers")


@dataclasses.dataclass(frozen=True)
class Commit:
    """One entry of `git log`, names and addresses as they stand there.

    Attributes:
      trailers: (key in lower case, value) in their order.
    """

    hash: str
    parents: tuple[str, ...]
    author_time: int
    commit_time: int
    author: tuple[str, str]
    committer: tuple[str, str]
    subject: str
    trailers: tuple[tuple[str, str], ...]
    body: str
    files: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class History:
    """What a clone says about its reviews.

    Attributes:
      records: in order of commit time; ids and people are salted hashes.
      signers: record id -> people of its `Signed-off-by` trailers, the author left out.
      summary: counts: commits, changes, bot_changes, with_reviewers, with_signers, people.
      notes: sentences for the user, such as that no commit has a review trailer.
    """

    records: list[PullRequest]
    signers: dict[str, tuple[str, ...]]
    summary: dict[str, int]
    notes: tuple[str, ...]


def read_commits(
    git_dir: str | os.PathLike,
    *,
    revision: str = "HEAD",
    since: str = "",
    until: str = "",
    max_count: int = 0,
    merges: bool = False,
) -> Iterator[Commit]:
    """Commits reachable from `revision`, newest first, files as stored (no quoting).

    Args:
      since, until: anything that `git log` understands, "" for no bound.
      merges: merge commits of the first-parent line, with what they bring in, in place of the rest.

    Raises:
      ValueError: one line naming a directory that is no clone, or what git said.
    """
    directory = Path(git_dir).expanduser()
    if not directory.is_dir():
        raise ValueError(f"data.options.git_dir {git_dir}: no such directory")
    # Separators are random, so that no commit message can hold them.
    mark = secrets.token_hex(16)
    commit, field, end = (f"{mark}{kind}" for kind in "cfe")
    kind = ["--merges", "--first-parent", "-m"] if merges else ["--no-merges"]
    bounds = [f"--since={since}"] * bool(since) + [f"--until={until}"] * bool(until)
    bounds += [f"--max-count={max_count}"] * bool(max_count)
    command = [
        *("git", "-C", str(directory), "-c", "i18n.logOutputEncoding=UTF-8", "log", "-z"),
        *(*kind, "--no-renames", "--name-only", "--no-color", "--no-show-signature", *bounds),
        *(f"--format={commit}{field.join(_FIELDS)}{end}", revision, "--"),
    ]
    try:
        run = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise ValueError(
            f"data.options.git_dir {git_dir}: the program git is not installed"
        ) from None
    if run.returncode:
        said = run.stderr.decode("utf-8", "replace").strip().splitlines() or ["git log failed"]
        if re.search(r"does not have any commits yet|bad revision 'HEAD'", said[0]):
            return
        raise ValueError(f"data.options.git_dir {git_dir}: {said[0].removeprefix('fatal: ')}")
    for chunk in run.stdout.decode("utf-8", "replace").split(commit)[1:]:
        entry, _, files = chunk.partition(end)
        yield _parse(entry.split(field), files)


def _parse(fields: list[str], files: str) -> Commit:
    trailers = []
    for line in fields[9].splitlines():
        key, colon, value = line.partition(":")
        if colon:
            trailers.append((key.strip().lower(), value.strip()))
    return Commit(
        hash=fields[0],
        parents=tuple(fields[1].split()),
        author_time=_time(fields[2]),
        commit_time=_time(fields[3]),
        author=(fields[4], fields[5]),
        committer=(fields[6], fields[7]),
        subject=fields[8],
        trailers=tuple(trailers),
        body=fields[10],
        # With -z an empty name and a line end stand before the first file.
        files=tuple(n for n in files.removeprefix("\0").removeprefix("\n").split("\0") if n),
    )


def _time(text: str) -> int:
    # Damaged commit objects have no date.
    return int(text) if text.lstrip("-").isdigit() else 0


def parse_person(text: str) -> tuple[str, str]:
    """`Name <address>`, a name alone or an address alone -> (name, address), either may be ""."""
    found = _PERSON.match(text)
    if found:
        return found["name"].strip(), found["mail"].strip()
    text = text.split("#")[0].strip()
    if "@" in text and " " not in text:
        return "", text
    return text, ""


class People:
    """Who is whom: identities merged by address, then by full name (two words or more)."""

    def __init__(self, salt: bytes, bots: str = BOTS):
        self._salt = salt
        self._bots = re.compile(bots, re.IGNORECASE) if bots else None
        self._parent: dict[str, str] = {}
        self._handles: set[str] = set()
        self._local_parts: set[str] = set()

    def add(self, person: tuple[str, str]) -> None:
        """Make a (name, address) known; once all are, `id_of` answers."""
        keys = self._keys(person)
        for key in keys[1:]:
            self._union(keys[0], key)
        if keys:
            self._find(keys[0])
        name, mail = person
        for word in (*re.split(r"[^\w]+", name), mail.partition("@")[0].rpartition("+")[2]):
            if len(word) > 2:
                self._handles.add(word.lower())
        local = mail.partition("@")[0].rpartition("+")[2].lower()
        if len(local) > 2:
            self._local_parts.add(local)

    def id_of(self, person: tuple[str, str]) -> str:
        """The salted hash of a person, "" for a robot or nobody."""
        if self.is_bot(person):
            return ""
        keys = self._keys(person)
        return f"p{self.digest(self._find(keys[0]))}" if keys else ""

    def is_bot(self, person: tuple[str, str]) -> bool:
        """Whether name or address looks like a robot's."""
        return bool(self._bots and self._bots.search(f"{person[0]} {person[1]}"))

    def digest(self, text: str) -> str:
        """Sixteen hexadecimal digits that nobody can compute without the salt."""
        return hmac.new(self._salt, text.encode(), hashlib.sha256).hexdigest()[:16]

    def scrub(self, text: str) -> str:
        """Text without the words that are part of anybody's name or address."""
        return re.sub(r"\w+", lambda w: "" if w[0].lower() in self._handles else w[0], text)

    def scrub_path(self, path: str) -> str:
        """A path whose components equal to anybody's handle are hashed."""
        known = self._local_parts
        if known.isdisjoint(path.lower().split("/")):
            return path
        parts = path.split("/")
        return "/".join(f"h{self.digest(p.lower())}" if p.lower() in known else p for p in parts)

    @property
    def count(self) -> int:
        """Number of different people, robots included."""
        return len({self._find(key) for key in self._parent})

    @staticmethod
    def _keys(person: tuple[str, str]) -> list[str]:
        name, mail = (" ".join(unicodedata.normalize("NFKC", p).casefold().split()) for p in person)
        keys = [] if _SHARED.search(mail) else [f"m:{mail}"]
        if " " in name or (name and not keys):
            keys.append(f"n:{name}")
        return keys

    def _find(self, key: str) -> str:
        parent = self._parent
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    def _union(self, a: str, b: str) -> None:
        a, b = self._find(a), self._find(b)
        # The smaller key stands for all, so that ids do not depend on the order of commits.
        self._parent[max(a, b)] = min(a, b)


def secret_salt(path: str | os.PathLike | None = None) -> bytes:
    """The machine's own salt, made on first use and readable by its owner alone.

    It stays the same, so that a history read again has the ids that a checkpoint was trained on.
    """
    if path is None:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        path = Path(cache).expanduser() / "jaxmodels" / "identity_salt"
    path = Path(path).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(32))
        salt = path.read_bytes()
    except OSError as error:
        raise ValueError(f"data.options.salt_file {path}: {error.strerror}") from None
    if len(salt) < 16:
        raise ValueError(f"data.options.salt_file {path}: a salt has at least 16 bytes")
    return salt


def read_history(
    git_dirs: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    salt: bytes | None = None,
    reviewer_trailers: Sequence[str] = ("reviewed-by",),
    signers_as_reviewers: bool = False,
    changes: str = "commit",
    bots: str = BOTS,
    **bounds,
) -> History:
    """The review history of one clone or of several, whose people are merged over all of them.

    Args:
      git_dirs: directories; the name of a clone's directory is the repository of its records.
      salt: of the identity hashes; None takes the machine's own (`secret_salt`).
      reviewer_trailers: any keys, in any case; add "acked-by" where a project uses it as a review.
      signers_as_reviewers: `Signed-off-by` of others than the author counts as a weak review, as
        do committers other than the author.
      changes: "commit", or "merge": each merge of the first-parent line is one change whose author
        is the author of what it merges.
      bots: regular expression over `name address`; the changes of robots are left out.
      **bounds: `revision`, `since`, `until`, `max_count` of `read_commits`.

    Raises:
      ValueError: one line naming the directory or the wrong option.
    """
    if changes not in _CHANGES:
        raise ValueError(f"data.options.changes {changes!r}; known: {', '.join(_CHANGES)}")
    directories = [git_dirs] if isinstance(git_dirs, (str, os.PathLike)) else list(git_dirs)
    wanted = {t.lower() for t in reviewer_trailers}
    people = People(salt or secret_salt(), bots)
    commits_of: dict[Path, list[Commit]] = {}
    # Everybody must be known before anybody gets an id.
    for git_dir in directories:
        commits = list(read_commits(git_dir, merges=changes == "merge", **bounds))
        if changes == "merge":
            commits = list(_with_merged_authors(git_dir, commits))
        commits_of[Path(git_dir)] = commits
        for commit in commits:
            people.add(commit.author)
            people.add(commit.committer)
            for key, value in commit.trailers:
                if key.endswith("-by") or key in wanted:
                    people.add(parse_person(value))
    records, signers, notes = [], {}, []
    summary = Counter(dict.fromkeys(_COUNTS, 0), people=people.count)
    for git_dir, commits in commits_of.items():
        of_clone: Counter[str] = Counter(commits=len(commits))
        repo = git_dir.expanduser().resolve().name
        grouped: dict[str, list[Commit]] = {}
        for commit in sorted(commits, key=lambda c: (c.commit_time, c.hash)):
            grouped.setdefault(_change_of(commit), []).append(commit)
        for change, group in grouped.items():
            record, signed = _record(f"{repo}/{change}", repo, group, people, wanted)
            if record is None:
                of_clone["bot_changes"] += 1
                continue
            if signers_as_reviewers:
                reviewers = _others((*record.reviewers, *signed), record.author)
                record = dataclasses.replace(record, reviewers=reviewers)
            records.append(record)
            signers[record.id] = signed
            of_clone["changes"] += 1
            of_clone["with_reviewers"] += bool(record.reviewers)
            of_clone["with_signers"] += bool(signed)
        notes += _notes(git_dir, of_clone, commits, wanted)
        summary.update(of_clone)
    records.sort(key=lambda r: r.created)
    return History(records, signers, dict(summary), tuple(notes))


def _record(
    change: str, repo: str, group: list[Commit], people: People, wanted: set[str]
) -> tuple[PullRequest | None, tuple[str, ...]]:
    """The record of a change's commits, None for a robot's, and who signed it off."""
    author = people.id_of(group[0].author)
    if not author:
        return None, ()
    by = [
        (key, people.id_of(parse_person(value)))
        for commit in group
        for key, value in commit.trailers
        if key.endswith("-by") or key in wanted
    ]
    signed = [person for key, person in by if key == "signed-off-by"]
    signed += [people.id_of(commit.committer) for commit in group]
    record = PullRequest(
        id=f"c{people.digest(change)}",
        author=author,
        repo=repo,
        created=float(group[0].commit_time),
        reviewers=_others((person for key, person in by if key in wanted), author),
        title=people.scrub(_title(group[0])),
        files=tuple(dict.fromkeys(people.scrub_path(f) for c in group for f in c.files)),
        work_items=tuple(
            WorkItem(id=i) for i in dict.fromkeys(i for c in group for i in _references(c))
        ),
    )
    return record, _others(signed, author)


def _others(people: Iterable[str], author: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(p for p in people if p and p != author))


def _change_of(commit: Commit) -> str:
    identifiers = [v for key, v in commit.trailers if key == "change-id" and v]
    return identifiers[-1] if identifiers else commit.hash


def _title(commit: Commit) -> str:
    # The subject of a merge names a branch; what is merged stands in the first line below it.
    if _MERGED_PULL_REQUEST.match(commit.subject):
        lines = [line for line in commit.body.splitlines() if line.strip()]
        return lines[0] if lines else ""
    return commit.subject


def _references(commit: Commit) -> Iterator[str]:
    for found in _REFERENCE_LINE.finditer(commit.body):
        keyed = found["keyed"]
        if keyed is None:
            yield found["plain"].lower()
            continue
        for word in keyed.split("(")[0].replace(",", " ").split():
            if any(c.isdigit() for c in word):
                yield word.lower()


def _with_merged_authors(git_dir: str | os.PathLike, merges: list[Commit]) -> Iterator[Commit]:
    """Merges with author, trailers and body of the last commit that they bring in."""
    branch = {c.hash: c for c in read_commits(git_dir, revision="--all")}
    for merge in merges:
        head = branch.get(merge.parents[1]) if len(merge.parents) > 1 else None
        if head is None:
            yield merge
            continue
        yield dataclasses.replace(
            merge,
            author=head.author,
            trailers=(*merge.trailers, *head.trailers),
            body=f"{merge.body}\n{head.body}",
        )


def _notes(
    git_dir: str | os.PathLike, summary: Counter[str], commits: list[Commit], wanted: set[str]
) -> Iterator[str]:
    if not summary["changes"]:
        yield f"data.options.git_dir {git_dir}: no pull requests"
        return
    if summary["with_reviewers"]:
        return
    counts = Counter(key for c in commits for key, _ in c.trailers if key.endswith("-by"))
    counts -= Counter({key: counts[key] for key in (*wanted, "signed-off-by")})
    names = ", ".join(f"{key} ({n})" for key, n in counts.most_common(3))
    yield (
        f"data.options.git_dir {git_dir}: no commit has a trailer {' or '.join(sorted(wanted))}"
        + (f"; data.options.reviewer_trailers may name {names}" if names else "")
        + f"; data.options.signers_as_reviewers=True takes the {summary['with_signers']} changes "
        "that others signed off or committed"
    )
