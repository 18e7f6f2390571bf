"""Cross-validation splits in which every case is held out once, and nobody leaks.

nnU-Net's split: `KFold(5, shuffle, random_state=12345)` over the sorted case ids
(nnunetv2 2.8.1, `utilities/crossval_split.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

SEED = 12345


def cross_validation(
    cases: Sequence[str],
    folds: int = 5,
    *,
    seed: int = SEED,
    groups: Mapping[str, str] | None = None,
    group_regex: str | None = None,
    labels: Mapping[str, int] | None = None,
) -> list[list[str]]:
    """Held-out case ids of every fold; together they are all cases, each once.

    Args:
      cases: ids, in any order. groups: case -> patient: a patient's cases share a fold.
      group_regex: its first group in an id is the patient. Without `groups`, ids that share a
        patient are refused: say how they belong together.
      labels: case -> class: folds have the same share of every class.

    Raises ValueError: repeated ids, fewer cases (or patients) than folds, leaking groups.
    """
    from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold

    ids = sorted(cases)
    repeated = [c for c, n in Counter(ids).items() if n > 1]
    if repeated:
        raise ValueError(f"case ids occur twice: {repeated[:5]}")
    if folds < 2 or len(ids) < folds:
        raise ValueError(f"{folds} folds need at least as many cases, got {len(ids)}")
    if group_regex and groups is None:
        check_no_shared_patients(ids, group_regex)
    if groups is not None:
        missing = [c for c in ids if c not in groups]
        if missing:
            raise ValueError(f"groups lack the cases {missing[:5]}")
        names = [groups[c] for c in ids]
        if len(set(names)) < folds:
            raise ValueError(f"{folds} folds need as many groups, got {len(set(names))}")
        splitter = GroupKFold(folds, shuffle=True, random_state=seed)
        splits = splitter.split(ids, groups=names)
    elif labels is not None:
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
        splits = splitter.split(ids, [labels[c] for c in ids])
    else:
        splits = KFold(folds, shuffle=True, random_state=seed).split(ids)
    return [[ids[i] for i in held] for _, held in splits]


def fold_indices(count: int, folds: int = 5, seed: int = SEED) -> list[np.ndarray]:
    """Indices into the sorted cases that each fold holds out."""
    from sklearn.model_selection import KFold

    splitter = KFold(folds, shuffle=True, random_state=seed)
    return [held for _, held in splitter.split(np.arange(count))]


def patient_of(case: str, group_regex: str) -> str:
    """The patient in a case id: the first group of the expression, the whole match without one.

    Raises ValueError when the id does not match.
    """
    match = re.search(group_regex, case)
    if match is None:
        raise ValueError(f"case id {case!r} does not match group_regex {group_regex!r}")
    return match.group(1) if match.re.groups else match.group(0)


def check_no_shared_patients(cases: Sequence[str], group_regex: str) -> None:
    """Raises ValueError naming two cases of one patient."""
    seen: dict[str, str] = {}
    for case in cases:
        patient = patient_of(case, group_regex)
        if patient in seen:
            raise ValueError(
                f"cases {seen[patient]!r} and {case!r} are of one patient ({patient!r}): give "
                "`groups`, or folds would leak"
            )
        seen[patient] = case


def check_leakage(folds: Sequence[Sequence[str]], groups: Mapping[str, str] | None = None) -> None:
    """Raises ValueError when a case, or a patient's cases, stand in two folds."""
    owner: dict[str, int] = {}
    for number, held in enumerate(folds):
        for case in held:
            key = groups[case] if groups else case
            if owner.setdefault(key, number) != number or (not groups and held.count(case) > 1):
                raise ValueError(f"{key!r} stands in folds {owner[key]} and {number}")
