"""Code-review histories as link prediction: edges of the training graph, queries to rank.

The history comes from files (`path`: CSV or JSON lines), from a local clone (`git_dir`) or, when
neither is given, from the simulator. Test changes and everything they say are kept out of the
graph. An example is a block of numbers: of edges in "train", of queries in "test"; what they stand
for lies in arrays that the task keeps on the devices.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodels.graphs.review_graph import (
    DEFAULT_RELATIONS,
    STOP_WORDS,
    ReviewGraph,
    build_graph,
    check_relations,
)
from jaxmodels.graphs.review_records import PullRequest, unique_records
from train.data import array_source, git_log, review_files
from train.data.review_simulator import simulate_reviews

# path, git_dir: one or several (a tuple, or separated by commas). Times are ISO dates or Unix
# seconds; "from" is inside, "until" outside. max_train_changes keeps the last ones of the training
# period. reviewed_only leaves changes without reviewers out of the graph. bots: a pattern of people
# who are never recommended, "" for none. block: numbers in an example (one by one they would take
# longer to read than to learn from). sizes: shapes for a dry run.
OPTIONS: dict[str, Any] = {
    "git_dir": "",
    "revision": "HEAD",
    "since": "",
    "until": "",
    "max_count": 0,
    "changes": "commit",
    "reviewer_trailers": ("reviewed-by",),
    "salt_file": "",
    "bots": git_log.BOTS,
    "acked_as_reviewers": False,
    "signers_as_reviewers": False,
    "simulator_seed": 0,
    "n_people": 120,
    "n_changes": 3000,
    "n_areas": 12,
    "n_repos": 3,
    "split": "random",
    "split_seed": 0,
    "test_share": 0.1,
    "train_from": "",
    "test_from": "",
    "test_until": "",
    "max_train_changes": 0,
    "reviewed_only": False,
    "relations": DEFAULT_RELATIONS,
    "stop_words": (),
    "pmi_min": 0.0,
    "min_word_df": 1,
    "max_files_per_pr": 0,
    "block": 256,
    "sizes": None,
    "threads": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {}
SPLITS = ("train", "test")
SPLIT_KINDS = ("random", "temporal")
_MIXING_SEED = 0


@dataclasses.dataclass(frozen=True, eq=False)
class ReviewData:
    """A history, split, and the graph of its training part.

    Attributes:
      graph: of the training changes alone.
      test: changes whose reviewers are to be found, each with at least one.
      split: "random" or "temporal".
      notes: what the reader wants the user to know.
      bots: regular expression over ids of people who are never recommended.
    """

    graph: ReviewGraph
    test: tuple[PullRequest, ...]
    split: str
    notes: tuple[str, ...] = ()
    bots: str = git_log.BOTS


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`index` int32 [block]: of edges (train) or queries (test); -1 on padding."""
    block = options["block"]
    if not isinstance(block, int) or block < 1:
        raise ValueError(f"data.options.block must be a positive integer, not {block!r}")
    return {"index": jax.ShapeDtypeStruct((block,), np.int32)}


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Blocks of edges to learn from, and of test changes."""
    return {split: len(source(split, options)) for split in SPLITS}


def source(split: str, options: Mapping[str, Any]) -> array_source.ArraySource:
    """Numbers of the edges other than `pr_user` (all, where there are no others), or of queries.

    Edges are mixed once, so that every block holds all relations, and the last block is filled up
    from the first; `pr_user` edges are what is ranked, and the task takes a fixed share of every
    batch from them.
    """
    data = read(options)
    block = element_spec(options)["index"].shape[0]
    if split == "test":
        numbers = np.arange(len(data.test), dtype=np.int32)
        numbers = np.pad(numbers, (0, -len(numbers) % block), constant_values=-1)
    else:
        others, reviews = count_edges(data.graph, options["relations"])
        numbers = np.random.default_rng(_MIXING_SEED).permutation(others or reviews)
        numbers = np.resize(numbers, -(-len(numbers) // block) * block).astype(np.int32)
    return array_source.ArraySource({"index": numbers.reshape(-1, block)})


def count_edges(graph: ReviewGraph, relations) -> tuple[int, int]:
    """Number of edges of the chosen relations but `pr_user`, and of `pr_user`."""
    counts = {name: graph.edges[name].shape[1] for name in relations}
    reviews = counts.pop("pr_user", 0)
    return sum(counts.values()), reviews


def train_transform(options: Mapping[str, Any]):
    """Examples as they are."""
    del options
    return _as_it_is


def eval_transform(options: Mapping[str, Any]):
    """Examples as they are."""
    del options
    return _as_it_is


def _as_it_is(example, rng=None):
    del rng
    return example


def read(options: Mapping[str, Any]) -> ReviewData:
    """The history of these options, split, with its graph; the last ones read are kept.

    Raises:
      ValueError: one line: an option, a file and line, no pull requests, nothing to test on.
    """
    aside = ("threads", "sizes", "block")
    known = {name: options[name] for name in (*OPTIONS, "path") if name not in aside}
    return _read(json.dumps(known, sort_keys=True, default=list))


@functools.lru_cache(maxsize=4)
def _read(key: str) -> ReviewData:
    options = json.loads(key)
    if options["split"] not in SPLIT_KINDS:
        raise ValueError(f"data.options.split {options['split']!r}; known: random, temporal")
    check_relations(options["relations"])
    try:
        re.compile(options["bots"])
    except re.error as error:
        raise ValueError(
            f"data.options.bots {options['bots']!r}: no regular expression ({error})"
        ) from None
    records, notes = read_records(options)
    train, test = split_records(records, options)
    if not test:
        hint = f" ({notes[0]})" if notes else ""
        raise ValueError(f"data.options: no reviewed change to test on{hint}")
    graph = build_graph(
        train,
        stop_words=frozenset(options["stop_words"]) or STOP_WORDS,
        pmi_min=options["pmi_min"],
        min_word_df=options["min_word_df"],
        max_files_per_pr=options["max_files_per_pr"] or None,
    )
    # A clone's robots have been left out by name and address; its people are hashes by now.
    bots = "" if options["git_dir"] else options["bots"]
    return ReviewData(graph, tuple(test), options["split"], tuple(notes), bots)


def read_records(options: Mapping[str, Any]) -> tuple[list[PullRequest], tuple[str, ...]]:
    """All records of a history and what its reader wants said."""
    path, git_dir = options["path"], options["git_dir"]
    if path and git_dir:
        raise ValueError("data.options: give path or git_dir, not both")
    if git_dir:
        bounds = {name: options[name] for name in ("revision", "since", "until", "max_count")}
        history = git_log.read_history(
            git_dir.split(",") if isinstance(git_dir, str) else git_dir,
            salt=git_log.secret_salt(options["salt_file"] or None),
            reviewer_trailers=options["reviewer_trailers"],
            signers_as_reviewers=options["signers_as_reviewers"],
            changes=options["changes"],
            bots=options["bots"],
            **bounds,
        )
        if not history.records:
            raise ValueError(f"data.options.git_dir {git_dir}: no pull requests")
        return history.records, history.notes
    if path:
        return _read_files(path, options), ()
    sizes = {name: options[name] for name in ("n_people", "n_changes", "n_areas", "n_repos")}
    return simulate_reviews(options["simulator_seed"], **sizes), ()


def _read_files(path: Any, options: Mapping[str, Any]) -> list[PullRequest]:
    paths = path.split(",") if isinstance(path, str) else list(path)
    records: list[PullRequest] = []
    for one in paths:
        file = Path(one).expanduser()
        if not file.is_file():
            raise ValueError(f"data.options.path: no such file: {file}")
        of_file = review_files.read_reviews(
            file,
            acked_as_reviewers=options["acked_as_reviewers"],
            signers_as_reviewers=options["signers_as_reviewers"],
        )
        if len(paths) > 1:
            # Changes are numbered in every file anew.
            of_file = [dataclasses.replace(r, id=f"{r.repo}/{r.id}") for r in of_file]
        records += of_file
    return unique_records(records)


def split_records(
    records: list[PullRequest], options: Mapping[str, Any]
) -> tuple[list[PullRequest], list[PullRequest]]:
    """(training changes, test changes), both in time order; every test change has a reviewer.

    "random": a share `test_share` of the reviewed changes, drawn with `split_seed`, is the test (as
    published). "temporal": the reviewed changes from `test_from` on, or the last share of them;
    nothing from after the first test change is in the training part.
    """
    start, end = _moment(options, "train_from"), _moment(options, "test_until")
    border = _moment(options, "test_from")
    if options["reviewed_only"]:
        records = [r for r in records if r.reviewers]
    records = sorted(records, key=lambda r: (r.created, r.id))
    records = [r for r in records if start <= r.created < end]
    reviewed = [r for r in records if r.reviewers]
    share = float(options["test_share"])
    if not 0 < share < 1:
        raise ValueError(f"data.options.test_share {share}: between 0 and 1")
    count = max(1, round(share * len(reviewed)))
    if options["split"] == "temporal":
        if not np.isfinite(border):
            border = reviewed[-count].created if reviewed else end
        train = [r for r in records if r.created < border]
        test = [r for r in reviewed if r.created >= border]
        train = train[-options["max_train_changes"] :] if options["max_train_changes"] else train
    else:
        records = [r for r in records if r.created < border]
        if options["max_train_changes"]:
            records = records[-options["max_train_changes"] :]
        reviewed = [r for r in records if r.reviewers]
        count = max(1, round(share * len(reviewed)))
        rng = np.random.default_rng(int(options["split_seed"]))
        drawn = rng.permutation(len(reviewed))[:count] if reviewed else []
        left_out = {reviewed[i].id for i in drawn}
        train = [r for r in records if r.id not in left_out]
        test = [r for r in records if r.id in left_out]
    if not train:
        raise ValueError("data.options: no change is left to train on; look at the split's dates")
    return train, test


def _moment(options: Mapping[str, Any], name: str) -> float:
    """Unix seconds of a date option; without a date the period is not bounded."""
    value = options[name]
    if value in ("", None):
        return -np.inf if name == "train_from" else np.inf
    if isinstance(value, (int, float)):
        return float(value)
    try:
        moment = datetime.datetime.fromisoformat(str(value))
    except ValueError:
        raise ValueError(
            f"data.options.{name} {value!r}: an ISO date such as 2024-12-31, or Unix seconds"
        ) from None
    return moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp()
