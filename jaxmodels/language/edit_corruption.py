"""CoditT5's pre-training corruption: inputs that need insertions, deletions and replacements.

Behaves as `python/cdt/collector/mask.py` of EngineeringSoftware/CoditT5@100e5a2 (arXiv
2208.05446), down to what that code does by accident: a span of one token that is to be deleted
loses its token, so that it needs a replacement. Randomness comes from NumPy generators.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

ACTIONS = ("delete", "insert", "replace")
LABELS = {"keep": "<KEEP>", "delete": "<DELETE>", "insert": "<INSERT>", "replace": "<REPLACE>"}


class NotCorruptible(ValueError):
    """A sequence too short for its spans; pre-training leaves such examples out."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is corrupted, and which edits it will need, for one kind of text.

    `span_count` * `span_length` words are noise. A span needs a deletion where a uniform draw is
    below `delete_below`, an insertion where it is below `insert_below`, else a replacement
    (the rates of edits mined from repositories).
    """

    span_count: float
    span_length: float
    delete_below: float
    insert_below: float


MODALITIES = {
    "code": Settings(1.9, 6.5, 0.495, 0.71),
    "nl": Settings(1.4, 3.0, 0.07, 0.18),
}


def settings_of(modality: str) -> Settings:
    """The settings of "code" or "nl"; ValueError names the ones there are."""
    if modality not in MODALITIES:
        raise ValueError(f"modality {modality!r}; known: {', '.join(MODALITIES)}")
    return MODALITIES[modality]


def noise_counts(length: int, settings: Settings) -> tuple[int, int]:
    """(noise words, spans) of a sequence: not random, and capped below `length`.

    Raises NotCorruptible when there is no noise, or fewer kept or noise words than spans.
    """
    noise = int(np.round(settings.span_count * settings.span_length))
    noise = min(max(noise, 1), length - 1)
    spans = max(int(np.round(noise / settings.span_length)), 1)
    if min(noise, length - noise) < spans:
        raise NotCorruptible(
            f"{length} words: {max(noise, 0)} of them noise in {spans} spans leave too few"
        )
    return noise, spans


def draw_segments(items: int, segments: int, rng: np.random.Generator) -> np.ndarray:
    """Starts bool `[items - 1]`: where `items` fall into `segments` runs, every way alike.

    Entry j true: item j + 1 begins a new run.
    """
    starts = np.arange(items - 1) < segments - 1
    rng.shuffle(starts)
    return starts


def mask_of(noise_starts: Sequence[bool], kept_starts: Sequence[bool]) -> np.ndarray:
    """Noise mask int8 `[L]` of two segmentations, interleaved: kept, noise, kept, noise.

    So the first word is never noise and the last one always is.
    """
    lengths = [_run_lengths(kept_starts), _run_lengths(noise_starts)]
    if len(lengths[0]) != len(lengths[1]):
        raise NotCorruptible(f"{len(lengths[0])} kept runs for {len(lengths[1])} noise runs")
    return np.repeat(
        np.tile([0, 1], len(lengths[0])), np.stack(lengths, axis=1).reshape(-1)
    ).astype(np.int8)


def _run_lengths(starts: Sequence[bool]) -> np.ndarray:
    edges = np.flatnonzero(np.concatenate([[True], np.asarray(starts, bool), [True]]))
    return np.diff(edges)


def draw_mask(length: int, settings: Settings, rng: np.random.Generator) -> np.ndarray:
    """A random noise mask int8 `[length]`. Raises NotCorruptible."""
    noise, spans = noise_counts(length, settings)
    noise_starts = draw_segments(noise, spans, rng)
    return mask_of(noise_starts, draw_segments(length - noise, spans, rng))


def draw_action(settings: Settings, rng: np.random.Generator) -> str:
    """What the edit of a span will need, by one uniform draw."""
    u = rng.random()
    if u < settings.delete_below:
        return "delete"
    return "insert" if u < settings.insert_below else "replace"


def spans_of(mask: np.ndarray) -> list[tuple[int, int]]:
    """[(start, end)) of every noise run of a mask."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(mask, np.int8), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def pieces(
    words: Sequence[str], mask: np.ndarray, actions: Sequence[str]
) -> list[tuple[str, list[str]]]:
    """Corruption of words as runs: ("keep", words), or (action, words kept behind its sentinel).

    A deletion puts a sentinel before its span, which stays, unless it is a single word; an
    insertion removes the span and leaves nothing; a replacement puts the sentinel in its place.

    Raises ValueError for another number of actions than spans, or an unknown action.
    """
    spans = spans_of(mask)
    if len(actions) != len(spans):
        raise ValueError(f"{len(actions)} actions for {len(spans)} noise spans")
    runs: list[tuple[str, list[str]]] = []
    end = 0
    for (start, stop), action in zip(spans, actions):
        if action not in ACTIONS:
            raise ValueError(f"action {action!r}; known: {', '.join(ACTIONS)}")
        runs.append(("keep", list(words[end:start])))
        stays = action == "delete" and stop - start > 1
        runs.append((action, list(words[start:stop]) if stays else []))
        end = stop
    if end < len(words):
        runs.append(("keep", list(words[end:])))
    return runs


def corrupt_ids(
    words: Sequence[str],
    mask: np.ndarray,
    actions: Sequence[str],
    encode: Callable[[str], Sequence[int]],
    *,
    vocabulary: int,
    space: int,
) -> tuple[np.ndarray, list[str]]:
    """(token ids, edit labels) of corrupted words.

    Args:
      encode: text -> token ids, no special tokens; runs after the first begin with a blank.
      vocabulary: V; the sentinel of the k-th span is V - k.
      space: id of the lone blank that stands before a sentinel. It has no label.
    """
    ids: list[int] = []
    labels: list[str] = []
    sentinel = 0

    def text(words: list[str]) -> None:
        run = list(encode((" " if ids else "") + " ".join(words)))
        ids.extend(run)
        labels.extend([LABELS["keep"]] * len(run))

    for action, run in pieces(words, mask, actions):
        if action == "keep":
            text(run)
            continue
        sentinel += 1
        if action == "insert":
            labels[-1] = LABELS["insert"]
            continue
        ids += [space, vocabulary - sentinel]
        labels.append(LABELS[action])
        if run:
            text(run)
    return np.asarray(ids, np.int64), labels


def corrupt_words(
    words: Sequence[str],
    mask: np.ndarray,
    actions: Sequence[str],
    sentinel: Callable[[int], str] = "<extra_id_{}>".format,
) -> list[str]:
    """The corrupted words themselves: what `corrupt_ids` decodes to.

    `sentinel(k - 1)` names the k-th span's token: `<extra_id_{k-1}>` is id V - k.
    """
    out: list[str] = []
    k = 0
    for action, run in pieces(words, mask, actions):
        if action != "keep":
            k += 1
            if action != "insert":
                out.append(sentinel(k - 1))
        out += run
    return out


def corrupt(words: Sequence[str], modality: str, rng: np.random.Generator) -> list[str]:
    """Randomly corrupted words of "code" or "nl". Raises NotCorruptible."""
    settings = settings_of(modality)
    mask = draw_mask(len(words), settings, rng)
    actions = [draw_action(settings, rng) for _ in spans_of(mask)]
    return corrupt_words(words, mask, actions)


def statistics(
    settings: Settings, rng: np.random.Generator, draws: int = 20000, length: int = 100
) -> dict[str, np.ndarray]:
    """What the sampler does: rates over `draws` sequences of `length` words.

    `action_rate` [3] in the order of `ACTIONS`; `noise_tokens`, `n_spans` [2], their least and
    largest; `mask_rate_by_position` [length]; `first_span_length_hist` [16], the share of first
    spans by length, the last entry for 15.
    """
    rate, first = np.zeros(length), np.zeros(16)
    noise, spans, actions = [], [], []
    for _ in range(draws):
        mask = draw_mask(length, settings, rng)
        found = spans_of(mask)
        rate += mask
        noise.append(int(mask.sum()))
        spans.append(len(found))
        size = found[0][1] - found[0][0]
        if size < len(first):
            first[size] += 1
        actions += [ACTIONS.index(draw_action(settings, rng)) for _ in found]
    return {
        "action_rate": np.bincount(actions, minlength=3) / len(actions),
        "noise_tokens": np.array([min(noise), max(noise)]),
        "n_spans": np.array([min(spans), max(spans)]),
        "mask_rate_by_position": rate / draws,
        "first_span_length_hist": first / draws,
    }
