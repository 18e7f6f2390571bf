"""GanLM's pre-training examples: documents packed from sentences, spans replaced by sentinels.

After `unilm/data/mlm_loader.py` of CSJianYang/GanLM@6094288. NumPy, since examples are made by the
data pipeline; token ids are fairseq's (0 `<s>`, 1 padding, 2 `</s>`, 3 unknown).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

SENTINELS = 100
BOS_ID, PAD_ID, EOS_ID, UNK_ID = range(4)


class Noise(NamedTuple):
    """How many tokens and spans of a document are cut out, and how many tokens stay."""

    tokens: int
    spans: int
    kept: int


def noise_of(length: int, mask_prob: float, span_length: float) -> Noise:
    """Noise of a document of `length` tokens: floor(L p) tokens in floor(that / s) spans.

    At least one token is cut out and one stays; at least one span.

    Raises ValueError naming the argument that cannot be meant, and where there are more spans than
    kept tokens to put them between (the official code then fails with an index error) or than
    sentinels.
    """
    if length < 2:
        raise ValueError(f"a document of {length} tokens; span corruption needs at least 2")
    if not 0 < mask_prob < 1:
        raise ValueError(f"mask_prob must be in (0, 1), not {mask_prob}")
    if not span_length > 0:
        raise ValueError(f"span_length must be positive, not {span_length}")
    tokens = min(max(int(length * mask_prob), 1), length - 1)
    spans = max(int(tokens / span_length), 1)
    kept = length - tokens
    if spans > kept:
        raise ValueError(
            f"{spans} spans do not fit between the {kept} kept tokens of a document of {length}; "
            "lower mask_prob or raise span_length"
        )
    if spans > SENTINELS:
        raise ValueError(
            f"{spans} spans, and {SENTINELS} sentinels; lower mask_prob or the document's length"
        )
    return Noise(tokens, spans, kept)


def corrupt(
    document: Sequence[int] | np.ndarray,
    first_sentinel: int,
    mask_prob: float = 0.15,
    span_length: float = 3.0,
    *,
    rng: np.random.Generator | None = None,
    split_order: Sequence[int] | None = None,
    insert_order: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(source, label) of a document [L]: spans out, sentinels in.

    Span lengths are a uniformly random composition of the noise: no Poisson, no geometric law. The
    source keeps the rest with `first_sentinel + i` for span i; the label is each sentinel followed
    by its span, without `<s>` or `</s>` of its own.

    Args:
      rng: source of the two orders; or give the orders themselves:
      split_order: permutation of 1 .. noise - 1, whose first spans - 1 entries cut the noise.
      insert_order: permutation of 0 .. kept - 1, whose first entries are the spans' places.

    Raises ValueError as `noise_of`.
    """
    document = np.asarray(document)
    noise = noise_of(len(document), mask_prob, span_length)
    if split_order is None and noise.spans > 1:
        split_order = rng.permutation(np.arange(1, noise.tokens))
    if insert_order is None:
        insert_order = rng.permutation(noise.kept)
    begins, ends = _spans(noise, split_order, insert_order)
    sentinels = first_sentinel + np.arange(noise.spans)

    source, label, last = [], [], 0
    for begin, end, sentinel in zip(begins, ends, sentinels):
        source += [document[last:begin], [sentinel]]
        label += [[sentinel], document[begin:end]]
        last = end
    source.append(document[last:])
    return (
        np.concatenate(source).astype(document.dtype),
        np.concatenate(label).astype(document.dtype),
    )


def _spans(noise: Noise, split_order, insert_order) -> tuple[np.ndarray, np.ndarray]:
    inner = [] if noise.spans == 1 else np.sort(np.asarray(split_order)[: noise.spans - 1])
    splits = np.concatenate([[0], inner, [noise.tokens]]).astype(np.int64)
    inserts = np.sort(np.asarray(insert_order)[: noise.spans])
    return inserts + splits[:-1], inserts + splits[1:]


def statistics(
    length: int,
    repeats: int,
    longest: int,
    *,
    mask_prob: float = 0.15,
    span_length: float = 3.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """What `corrupt` does to documents of `length` tokens, over `repeats` draws.

    Returns: (rate at which each position is cut out [length], share of each span length
    0 .. `longest` among the spans [longest + 1]; longer ones count as the longest).
    """
    rng = np.random.default_rng(seed)
    noise = noise_of(length, mask_prob, span_length)
    cuts, lengths = np.zeros(length + 1), np.zeros(longest + 1)
    for _ in range(repeats):
        splits = rng.permutation(np.arange(1, noise.tokens)) if noise.spans > 1 else None
        begins, ends = _spans(noise, splits, rng.permutation(noise.kept))
        np.add.at(cuts, begins, 1)
        np.add.at(cuts, ends, -1)
        np.add.at(lengths, np.minimum(ends - begins, longest), 1)
    return np.cumsum(cuts)[:-1] / repeats, lengths / lengths.sum()


def restore(
    source: Sequence[int] | np.ndarray, label: Sequence[int] | np.ndarray, first_sentinel: int
) -> np.ndarray:
    """The document [L] from which `corrupt` made (source, label)."""
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in np.asarray(label).tolist():
        if first_sentinel <= token < first_sentinel + SENTINELS:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    document: list[int] = []
    for token in np.asarray(source).tolist():
        document += spans[token] if token in spans else [token]
    return np.asarray(document, np.asarray(source).dtype)


def corrupted_lengths(
    max_tokens: int, mask_prob: float = 0.15, span_length: float = 3.0
) -> tuple[int, int]:
    """Longest (source, target) that documents of at most `max_tokens` tokens give.

    The target is the label without its last (decoder input) or first token (its targets).
    """
    noises = [noise_of(n, mask_prob, span_length) for n in range(2, max_tokens + 1)]
    if not noises:
        raise ValueError(f"documents of at most {max_tokens} tokens; 2 are needed")
    return max(n.kept + n.spans for n in noises), max(n.tokens + n.spans - 1 for n in noises)


def shifted(label: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(decoder input, targets), int32 [length], of a label: all but its last, all but its first.

    Padded on the right. The first decoder input is the first sentinel.

    Raises ValueError when the label is longer than `length + 1`.
    """
    return padded(label[:-1], length), padded(label[1:], length)


def padded(tokens: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """int32 [length], padded on the right. Raises ValueError for more than `length` tokens."""
    if len(tokens) > length:
        raise ValueError(f"{len(tokens)} tokens exceed max positions {length}")
    row = np.full(length, PAD_ID, np.int32)
    row[: len(tokens)] = tokens
    return row


def check_ids(tokens: Sequence[int] | np.ndarray, vocab_size: int) -> None:
    """Raises ValueError naming the first token id outside 0 .. vocab_size - 1."""
    tokens = np.asarray(tokens)
    bad = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if bad.size:
        raise ValueError(f"token id {int(bad[0])} is not in a dictionary of {vocab_size} entries")


def pack(
    sentences: Iterable[Sequence[int] | None],
    max_tokens: int = 512,
    *,
    complete_document: bool = False,
) -> Iterator[np.ndarray]:
    """Documents `<s> sentence </s> sentence </s> ...`, int32 [at most `max_tokens`].

    A document ends where the next sentence would exceed `max_tokens`; a sentence that exceeds it
    alone is left out. None is a blank line: skipped, or with `complete_document` the end of a
    document. (The official code yields `<s>` alone before a sentence that fills a document, and
    lets that document be one token longer.)
    """
    document = [BOS_ID]
    for sentence in sentences:
        if sentence is None or len(sentence) == 0:
            if complete_document and len(document) > 1:
                yield np.asarray(document, np.int32)
                document = [BOS_ID]
            continue
        tokens = [*sentence, EOS_ID]
        if 1 + len(tokens) > max_tokens:
            continue
        if len(document) + len(tokens) > max_tokens:
            if len(document) > 1:
                yield np.asarray(document, np.int32)
            document = [BOS_ID]
        document += tokens
    if len(document) > 1:
        yield np.asarray(document, np.int32)
