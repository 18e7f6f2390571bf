"""Edit plans: what changes from an old token sequence to a new one, written as tokens.

J. Zhang et al., "CoditT5: Pretraining for Source Code and Natural Language Editing", ASE 2022,
arXiv 2208.05446. Grammar and appliers behave as `python/cdt/collector/diff_utils.py` of
EngineeringSoftware/CoditT5@100e5a2. Tokens are what stands between blanks. Opcodes come from
Python's difflib, its popularity heuristic for 200 and more tokens included.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import Counter
from collections.abc import Sequence

KEEP, KEEP_END = "<KEEP>", "<KEEP_END>"
INSERT, INSERT_END = "<INSERT>", "<INSERT_END>"
DELETE, DELETE_END = "<DELETE>", "<DELETE_END>"
REPLACE_OLD, REPLACE_NEW, REPLACE_END = "<REPLACE_OLD>", "<REPLACE_NEW>", "<REPLACE_END>"
BEFORE, AFTER = "KEEP_BEFORE", "KEEP_AFTER"
DELETE_BEFORE, DELETE_AFTER = "DELETE_KEEP_BEFORE", "DELETE_KEEP_AFTER"
# Separators of the model's input and output.
CONTEXT, TARGET = "</s>", "<s>"


def _pairs(family: str, suffixes: Sequence[str]) -> list[str]:
    return [f"<{family}_{side}_{suffix}>" for suffix in suffixes for side in ("OLD", "NEW")]


# In the order in which they were added to the vocabulary.
EDIT_TOKENS = (
    "<REPLACE>",
    REPLACE_OLD,
    REPLACE_NEW,
    REPLACE_END,
    *_pairs("REPLACE", (BEFORE, AFTER, DELETE_BEFORE, DELETE_AFTER)),
    INSERT,
    "<INSERT_OLD>",
    "<INSERT_NEW>",
    INSERT_END,
    *_pairs("INSERT", (BEFORE, AFTER)),
    DELETE,
    DELETE_END,
    KEEP,
    KEEP_END,
)
_EDIT_SET = frozenset(EDIT_TOKENS)
_LOOKS_LIKE_TAG = re.compile(r"<(KEEP|INSERT|DELETE|REPLACE)(_[A-Z_]*)?>")
Tokens = Sequence[str]


class EditPlanError(ValueError):
    """A plan that does not follow the grammar or does not fit its old sequence."""


@dataclasses.dataclass(frozen=True)
class Span:
    """One edit: `old` tokens become `new` ones.

    `kind` is "keep", "insert", "delete" or "replace"; `suffix` is that of an anchored marker
    (`KEEP_BEFORE`, ...), "" for a plain one; `index` is where the span begins in its plan.
    """

    kind: str
    old: tuple[str, ...]
    new: tuple[str, ...]
    suffix: str = ""
    index: int = 0


def opcodes(old: Tokens, new: Tokens) -> list[Span]:
    """difflib's spans from old to new, kept ones included."""
    kinds = {"equal": "keep", "insert": "insert", "delete": "delete", "replace": "replace"}
    matcher = difflib.SequenceMatcher(None, list(old), list(new))
    return [
        Span(kinds[tag], tuple(old[a:b]), tuple(new[c:d]))
        for tag, a, b, c, d in matcher.get_opcodes()
    ]


def write_span(span: Span) -> list[str]:
    """Tokens of a span with plain markers."""
    if span.kind == "keep":
        return [KEEP, *span.old, KEEP_END]
    if span.kind == "insert":
        return [INSERT, *span.new, INSERT_END]
    if span.kind == "delete":
        return [DELETE, *span.old, DELETE_END]
    return [REPLACE_OLD, *span.old, REPLACE_NEW, *span.new, REPLACE_END]


def edit_sequence(old: Tokens, new: Tokens) -> list[str]:
    """All spans from old to new, kept ones included."""
    return [token for span in opcodes(old, new) for token in write_span(span)]


def plan(old: Tokens, new: Tokens) -> list[str]:
    """The edit plan of the published models: the spans without the kept ones, so no positions."""
    changed = [span for span in opcodes(old, new) if span.kind != "keep"]
    return [token for span in changed for token in write_span(span)]


def anchored_plan(old: Tokens, new: Tokens, *, markers: str = "anchored") -> list[str]:
    """The minimal form, whose old parts are unique in `old`, so that it does carry positions.

    A deleted or replaced run that is not unique, and every insertion, takes as many kept tokens
    before it (else behind it) as make it unique; they stand in both parts of the span. Where
    neither side has enough, the whole plan replaces all of `old`.

    `markers`: "anchored" names the side (`<INSERT_OLD_KEEP_BEFORE>`), "plain" writes such spans as
    `<REPLACE_OLD>` ... `<REPLACE_NEW>` ... `<REPLACE_END>`.
    """
    if markers not in ("anchored", "plain"):
        raise ValueError(f"markers {markers!r}; known: anchored, plain")
    spans = opcodes(old, new)
    # Anchors are eaten: a kept token serves one span only.
    kept = [list(span.old) if span.kind == "keep" else None for span in spans]
    written: list[str] = []
    for n, span in enumerate(spans):
        if span.kind == "keep":
            continue
        if span.kind != "insert" and occurrences(span.old, old) == 1:
            written += write_span(span)
            continue
        before = kept[n - 1] if n > 0 else None
        behind = kept[n + 1] if n + 1 < len(spans) else None
        anchored = _anchor(span, old, before, behind)
        if anchored is None:
            return write_span(Span("replace", tuple(old), tuple(new)))
        written += _write_anchored(anchored, markers)
    return written


def _anchor(span: Span, old: Tokens, before: list[str] | None, behind: list[str] | None):
    """The span with the fewest kept tokens that make its old part unique, None without such."""
    deletes = span.kind == "delete"
    for count in range(1, len(before or ()) + 1):
        taken = tuple(before[-count:])
        if occurrences(taken + span.old, old) == 1:
            del before[-count:]
            suffix = DELETE_BEFORE if deletes else BEFORE
            return dataclasses.replace(
                span, old=taken + span.old, new=taken + span.new, suffix=suffix
            )
    for count in range(1, len(behind or ()) + 1):
        taken = tuple(behind[:count])
        if occurrences(span.old + taken, old) == 1:
            del behind[:count]
            suffix = DELETE_AFTER if deletes else AFTER
            return dataclasses.replace(
                span, old=span.old + taken, new=span.new + taken, suffix=suffix
            )
    return None


def _write_anchored(span: Span, markers: str) -> list[str]:
    if markers == "plain":
        return write_span(dataclasses.replace(span, kind="replace"))
    family = "INSERT" if span.kind == "insert" else "REPLACE"
    return [
        f"<{family}_OLD_{span.suffix}>",
        *span.old,
        f"<{family}_NEW_{span.suffix}>",
        *span.new,
        f"<{family}_END>",
    ]


def positions(run: Tokens, tokens: Tokens) -> list[int]:
    """Where `run` (not empty) begins in `tokens`, overlaps counted."""
    run, size = list(run), len(run)
    return [i for i in range(len(tokens) - size + 1) if list(tokens[i : i + size]) == run]


def occurrences(run: Tokens, tokens: Tokens) -> int:
    """How often `run` stands in `tokens`, overlaps counted."""
    return len(positions(run, tokens))


def read_spans(edits: Tokens) -> list[Span]:
    """Spans of a plan or edit sequence, strictly.

    Raises EditPlanError naming the token index: an unknown edit tag, an unclosed or nested span, a
    token outside any span.
    """
    spans, i = [], 0
    while i < len(edits):
        start, parts, begin = edits[i], [], i
        _check_tag(start, i)
        family = _opens(start)
        if family is None:
            what = "ends no span" if start in _EDIT_SET else "stands outside any span"
            raise EditPlanError(f"token {i}: {start!r} {what}")
        kind, middle, end, suffix = family
        for wanted in filter(None, (middle, end)):
            i, part = _until(edits, i + 1, wanted, start, begin)
            parts.append(part)
        old = () if kind == "insert" and middle is None else parts[0]
        new = () if start == DELETE else parts[-1]
        spans.append(Span(kind, old, new, suffix, begin))
        i += 1
    return spans


def _check_tag(token: str, index: int) -> None:
    if token not in _EDIT_SET and _LOOKS_LIKE_TAG.fullmatch(token):
        raise EditPlanError(f"token {index}: unknown edit tag {token!r}")


def _opens(token: str):
    """(kind, middle marker, end marker, suffix) of the span that a token opens, else None."""
    plain = {
        KEEP: ("keep", None, KEEP_END, ""),
        INSERT: ("insert", None, INSERT_END, ""),
        DELETE: ("delete", None, DELETE_END, ""),
    }
    if token in plain:
        return plain[token]
    match = re.fullmatch(r"<(REPLACE|INSERT)_OLD(?:_(\w+))?>", token)
    if match is None or token not in _EDIT_SET:
        return None
    family, suffix = match[1], match[2] or ""
    middle = f"<{family}_NEW{'_' if suffix else ''}{suffix}>"
    kind = "delete" if suffix.startswith("DELETE") else family.lower()
    return kind, middle, f"<{family}_END>", suffix


def _until(edits: Tokens, i: int, wanted: str, start: str, begin: int):
    first = i
    while i < len(edits):
        if edits[i] == wanted:
            return i, tuple(edits[first:i])
        _check_tag(edits[i], i)
        if edits[i] in _EDIT_SET:
            raise EditPlanError(f"token {i}: {edits[i]!r} inside {start!r} of token {begin}")
        i += 1
    raise EditPlanError(f"token {begin}: {start!r} is never closed by {wanted!r}")


def apply_strict(edits: Tokens, old: Tokens) -> list[str]:
    """Apply a full edit sequence (`edit_sequence`) at its positions: lossless.

    Raises EditPlanError where kept, deleted or replaced tokens are not those of `old`, and where
    the sequence ends before `old` does.
    """
    result, p = [], 0
    for span in read_spans(edits):
        if tuple(old[p : p + len(span.old)]) != span.old:
            raise EditPlanError(
                f"token {span.index}: {span.kind} of {' '.join(span.old)!r} does not match the "
                f"old sequence at position {p}: {' '.join(old[p : p + len(span.old)])!r}"
            )
        p += len(span.old)
        result += span.new
    if p != len(old):
        raise EditPlanError(f"the edits cover {p} of the {len(old)} old tokens")
    return result


def apply_anchored_strict(edits: Tokens, old: Tokens) -> list[str]:
    """Apply an `anchored_plan` of either marking where its unique old parts stand: lossless.

    Raises EditPlanError for an old part that is absent, ambiguous or overlaps another one's.
    """
    places = []
    for span in read_spans(edits):
        if len(span.old) == 0 == len(old):
            return list(span.new)  # only the whole-sequence span of an empty old has no old part
        at = positions(span.old, old) if span.old else []
        if len(at) != 1:
            raise EditPlanError(
                f"token {span.index}: {' '.join(span.old)!r} stands {len(at)} times in the old "
                "sequence, wanted once"
            )
        places.append((at[0], span))
    result, p = [], 0
    for at, span in sorted(places, key=lambda place: place[0]):
        if at < p:
            raise EditPlanError(f"token {span.index}: overlaps the span before it")
        result += [*old[p:at], *span.new]
        p = at + len(span.old)
    return result + list(old[p:])


def apply_official(edits: Tokens, old: Tokens) -> list[str]:
    """The published full applier, losses included: it searches, and may miss repeated tokens.

    Malformed sequences are applied as far as they go. A result in which an edit token's name is
    left is empty.
    """
    out, p, i = list(old), 0, 0

    def part(i: int, end: str) -> tuple[int, list[str]]:
        j = i
        while j < len(edits) and edits[j] != end:
            j += 1
        return j, list(edits[i:j])

    def delete(tokens: Tokens, p: int) -> int:
        for token in tokens:
            try:
                p = out.index(token, max(0, p - 1))
            except ValueError:
                p += 1
            else:
                del out[p]
        return p

    def seek(i: int, p: int) -> int:
        """To the token that the next KEEP span anywhere behind i begins with, else to the end."""
        while i < len(edits) and edits[i] != KEEP:
            i += 1
        if i + 1 >= len(edits):
            return max(p, len(out))
        try:
            return out.index(edits[i + 1], p)
        except ValueError:
            return p

    def insert(tokens: Tokens, p: int) -> int:
        for token in tokens:
            out.insert(p, token)
            p += 1
        return p

    while i < len(edits):
        token = edits[i]
        i += 1
        if token == KEEP:
            i, tokens = part(i, KEEP_END)
            for kept in tokens:
                p += p < len(out) and out[p] == kept
        elif token == DELETE:
            i, tokens = part(i, DELETE_END)
            p = delete(tokens, p)
        elif token == INSERT:
            j, tokens = part(i, INSERT_END)
            p = insert(tokens, seek(i, p))
            i = j
        elif token == REPLACE_OLD:
            j, tokens = part(i, REPLACE_NEW)
            p = delete(tokens, p)
            i, tokens = part(j + 1, REPLACE_END)
            p = insert(tokens, seek(j + 1, p))
        else:
            continue
        i += 1
    text = " ".join(out)
    return [] if any(name in text for name in EDIT_TOKENS) else out


def apply_anchored_official(edits: Tokens, old: Tokens) -> list[str]:
    """The published applier of anchored plans, losses included.

    Markers are told by substring, DELETE first, so that a `DELETE_KEEP` span runs to the next
    `<DELETE_END>`, mostly to the end of the plan.

    Raises EditPlanError for spans that it does not know: plain `<INSERT>` and `<KEEP>`.
    """
    result: list[str] = []
    p, i = 0, 0
    deleted_later: list[list[str]] = []
    replaced_later: list[tuple[list[str], list[str]]] = []
    while i < len(edits):
        token = edits[i]
        if not _marks(token) or "NEW" in token or "END" in token:
            i += 1
            continue
        if "DELETE" in token:
            j = _next(edits, i + 1, "DELETE", "END")
            old_part = list(edits[i + 1 : j])
            _, p, several = _consume(old_part, old, p, result)
            if several:
                deleted_later.append(old_part)
        else:
            family = next((f for f in ("INSERT", "REPLACE") if f in token and "OLD" in token), "")
            if not family:
                raise EditPlanError(f"token {i}: {token!r} does not open an anchored span")
            middle = _next(edits, i + 1, family, "NEW")
            j = _next(edits, middle + 1, family, "END")
            old_part, new_part = list(edits[i + 1 : middle]), list(edits[middle + 1 : j])
            found, p, several = _consume(old_part, old, p, result)
            if found:
                result += new_part
            if several:
                replaced_later.append((old_part, new_part))
        i = j + 1
    result += old[p:]
    gone = {
        at + k for run in deleted_later for at in positions(run, result) for k in range(len(run))
    }
    result = [token for k, token in enumerate(result) if k not in gone]
    for old_part, new_part in replaced_later:
        for at in positions(old_part, result):
            end = at + len(new_part)
            if end >= len(result) or result[at:end] != new_part:
                result[at : at + len(old_part)] = new_part
    return result


def _marks(token: str) -> bool:
    return any(word in token for word in ("INSERT", "KEEP", "REPLACE", "DELETE"))


def _next(edits: Tokens, i: int, family: str, word: str) -> int:
    while i < len(edits) and not (family in edits[i] and word in edits[i]):
        i += 1
    return i


def _consume(run: list[str], old: Tokens, p: int, result: list[str]) -> tuple[bool, int, bool]:
    """Move behind `run` in old[p:], copying what is not of it to `result`.

    Returns (found, new p, several): found by the longest stretch of the earliest start of the run
    that stands there at all; several when that stretch stands there more than once.
    """
    rest = list(old[p:])
    for i in range(len(run)):
        for j in range(len(run), i, -1):
            at = positions(run[i:j], rest)
            if at:
                break
        else:
            continue
        skipped = Counter(run[:i])
        for token in rest[: at[0]]:
            if skipped[token] > 0:
                skipped[token] -= 1
            else:
                result.append(token)
        p += at[0]
        for token in run[i:]:
            if token in old[p:]:
                k = list(old).index(token, p)
                result += old[p:k]
                p = k + 1
        return True, p, len(at) > 1
    return False, p, False


def split_prediction(text: str) -> tuple[list[str], list[str], bool]:
    """(target, plan, parsed) of a decoded model output.

    Everything behind the last edit token is the target; without any the whole text is, and the plan
    is empty. `parsed` is False then, and for a plan that `read_spans` refuses: count those. The
    separator `<s>` is dropped where it survived.
    """
    tokens = text.split()
    last = max((i for i, token in enumerate(tokens) if token in _EDIT_SET), default=-1)
    target, edits = tokens[last + 1 :], tokens[: last + 1]
    parsed = bool(edits) or target[:1] == [TARGET]
    try:
        read_spans(edits)
    except EditPlanError:
        parsed = False
    if target[:1] == [TARGET]:
        target = target[1:]
    return target, edits, parsed


def split_official(text: str) -> tuple[str, str]:
    """(target, plan) as the published two-result parser has it, the separator kept."""
    tokens = text.split()
    last = max((i for i, token in enumerate(tokens) if token in _EDIT_SET), default=-1)
    return " ".join(tokens[last + 1 :]), " ".join(tokens[: last + 1])


def target_official(text: str) -> str:
    """The published target-only parser: the target, "" without any edit token."""
    target, edits = split_official(text)
    return target if edits else ""


def explains(edits: Tokens, old: Tokens, new: Tokens) -> bool:
    """Whether a plan without positions can turn `old` into `new`: the diagnostic `consistent`.

    True when the spans, in order, can be placed so that everything between them is equal. A plan
    that cannot be read explains nothing.
    """
    try:
        spans = [span for span in read_spans(edits) if span.kind != "keep"]
    except EditPlanError:
        return False
    # Reachable (position in old, position in new) pairs, before each span and at the end.
    front = {(0, 0)}
    for span in spans:
        front = {
            (i + len(span.old), j + len(span.new))
            for i, j in _along(front, old, new)
            if tuple(old[i : i + len(span.old)]) == span.old
            and tuple(new[j : j + len(span.new)]) == span.new
        }
    return (len(old), len(new)) in _along(front, old, new)


def _along(front: set[tuple[int, int]], old: Tokens, new: Tokens) -> set[tuple[int, int]]:
    seen = set()
    for i, j in front:
        while (i, j) not in seen:
            seen.add((i, j))
            if i < len(old) and j < len(new) and old[i] == new[j]:
                i, j = i + 1, j + 1
    return seen


def model_input(old: str, contexts: Sequence[str] = ()) -> str:
    """`old </s> context </s> ...`; without context a blank ends it, as in the published data."""
    joined = f" {CONTEXT} ".join(_squeeze(c) for c in contexts)
    return f"{_squeeze(old)} {CONTEXT} {joined}"


def model_output(old: str, new: str) -> str:
    """`plan <s> new`; equal sequences give an empty plan, so that a blank begins it."""
    return f"{' '.join(plan(old.split(), new.split()))} {TARGET} {_squeeze(new)}"


def read_raw_line(line: str) -> tuple[str, list[str]]:
    """(old, contexts) of a line `old <s> context1 <s> context2` of the published raw data."""
    old, *contexts = line.split(TARGET)
    return old.strip(), [c.strip() for c in contexts]


def _squeeze(text: str) -> str:
    return " ".join(text.split())
