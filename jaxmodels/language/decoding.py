"""Token-by-token generation: greedy, sampling, and beam search with either stopping rule.

All searches drive one function `step(tokens [R], position, cache) -> (logits [R, V], cache)`:
it gets the tokens that stand at `position` (0 is the start token's) and returns the next tokens'
logits. Shapes are static, so that the searches can stand inside `jax.jit`; loops end as soon as
every row is done.

Beam search has two rules. "hf" is that of huggingface/transformers v5 (`generation/utils.py`):
finished hypotheses compete in a pool, and a search goes on while running beams may still win.
"fairseq" is that of facebookresearch/fairseq (`sequence_generator.py`): a search is over with its
beams-th finished hypothesis, and the end token is forced at the last position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmodels.layers.attention import reorder_cache

RULES = ("hf", "fairseq")
# HF marks impossible beams and candidates so; its sums with log probabilities decide about ties.
_NEVER = -1e9

Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Constraints:
    """What may be generated.

    Attributes:
      start: the decoder's first token; not counted as generated.
      eos: the token that ends a row. pad: what fills a row behind it.
      max_new: most tokens to generate, `eos` counted (HF's `max_length` - 1; fairseq's
        `max_len` + 1).
      min_new: so many tokens come before `eos` is allowed.
      never: ids that are never generated (fairseq: its pad).
      no_repeat_ngram: n-grams of this size, the start token included, do not come twice; 0 is off.
      force_eos: a row that reaches `max_new` ends in `eos` whatever its probability (fairseq).
    """

    start: int
    eos: int
    pad: int
    max_new: int
    min_new: int = 0
    never: tuple[int, ...] = ()
    no_repeat_ngram: int = 0
    force_eos: bool = False

    def __post_init__(self):
        if self.max_new < 1:
            raise ValueError(f"max_new must be at least 1, not {self.max_new}")
        if not 0 <= self.min_new <= self.max_new:
            raise ValueError(f"min_new {self.min_new} is not in 0..max_new {self.max_new}")
        if self.no_repeat_ngram < 0:
            raise ValueError(f"no_repeat_ngram must not be negative: {self.no_repeat_ngram}")


class Hypotheses(NamedTuple):
    """Generated rows, best first.

    Attributes:
      tokens: int32 `[B, N, 1 + max_new]`, the start token first, `pad` behind `eos`.
      lengths: int32 `[B, N]`, generated tokens, `eos` counted, the start token not.
      scores: float32 `[B, N]`, sum of log probabilities / length ** length_penalty.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


def constrain(
    scores: jax.Array, tokens: jax.Array, position: jax.Array, rules: Constraints
) -> jax.Array:
    """Scores `[R, V]` of the next tokens with what `rules` forbid at -inf.

    `tokens` `[R, 1 + max_new]` are the rows so far, up to and with `position`.
    """
    ids = jnp.arange(scores.shape[-1])
    forbidden = jnp.zeros(scores.shape[-1], bool)
    for token in rules.never:
        forbidden |= ids == token
    if rules.min_new:
        forbidden |= (ids == rules.eos) & (position < rules.min_new)
    if rules.force_eos:
        forbidden |= (ids != rules.eos) & (position == rules.max_new - 1)
    scores = jnp.where(forbidden, -jnp.inf, scores)
    if rules.no_repeat_ngram:
        scores = _block_ngrams(scores, tokens, position, rules.no_repeat_ngram)
    return scores


def _block_ngrams(scores, tokens, position, n):
    """-inf where a token would complete an n-gram that the row has already."""
    width = tokens.shape[1]
    starts = jnp.arange(max(width - n + 1, 0))
    # A row shorter than the prefix has no n-gram yet; clipping only keeps the gather in bounds.
    last = jnp.clip(position - n + 2 + jnp.arange(n - 1), 0, width - 1)
    prefix = jnp.take(tokens, last, axis=1)
    seen = tokens[:, starts[:, None] + jnp.arange(n - 1)]
    hit = (seen == prefix[:, None]).all(-1) & (starts + n - 1 <= position)
    banned = jnp.where(hit, tokens[:, starts + n - 1], scores.shape[-1])
    rows = jnp.arange(len(tokens))[:, None]
    return scores.at[rows, banned].set(-jnp.inf, mode="drop")


def greedy(step: Step, cache: Any, rules: Constraints, *, batch: int) -> Hypotheses:
    """The likeliest token at every position; ties go to the lower id. One row per input."""
    return _one_row(step, cache, rules, batch, lambda scores, position: scores.argmax(-1))


def sample(
    step: Step,
    cache: Any,
    rules: Constraints,
    rng: jax.Array,
    *,
    batch: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Hypotheses:
    """One row per input, drawn token by token from `truncate`d distributions.

    `scores` are log probabilities under the model's own distribution, divided by the length.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}; greedy() is its limit")

    def choose(scores, position):
        scores = truncate(scores / temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(rng, position), scores)

    return _one_row(step, cache, rules, batch, choose)


def truncate(logits: jax.Array, top_k: int = 0, top_p: float = 1.0) -> jax.Array:
    """Logits `[..., V]` with -inf outside the `top_k` largest, then outside the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probabilities reach `top_p`, at least
    one of them (Holtzman et al., arXiv 1904.09751). `top_k` 0 and `top_p` 1 are off; tokens that
    tie with the last one kept stay.
    """
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"top_k must be >= 0 and top_p in (0, 1], not {top_k} and {top_p}")
    if top_k:
        kth = lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
        before = mass - jax.nn.softmax(ordered, axis=-1)
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _one_row(step, cache, rules, batch, choose) -> Hypotheses:
    tokens = jnp.full((batch, 1 + rules.max_new), rules.pad, jnp.int32).at[:, 0].set(rules.start)

    def going(carry):
        position, _, done, *_ = carry
        return (position < rules.max_new) & ~done.all()

    def body(carry):
        position, tokens, done, lengths, sums, cache = carry
        logits, cache = step(tokens[:, position], position, cache)
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        chosen = choose(constrain(log_p, tokens, position, rules), position).astype(jnp.int32)
        gain = jnp.take_along_axis(log_p, chosen[:, None], axis=1)[:, 0]
        tokens = tokens.at[:, position + 1].set(jnp.where(done, rules.pad, chosen))
        sums = sums + jnp.where(done, 0.0, gain)
        lengths = lengths + ~done
        return position + 1, tokens, done | (chosen == rules.eos), lengths, sums, cache

    start = (
        jnp.zeros((), jnp.int32),
        tokens,
        jnp.zeros(batch, bool),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, jnp.float32),
        cache,
    )
    _, tokens, _, lengths, sums, _ = lax.while_loop(going, body, start)
    return Hypotheses(tokens[:, None], lengths[:, None], (sums / lengths)[:, None])


class _Search(NamedTuple):
    """State of a beam search: running beams `[B, K, ...]`, the pool of finished ones, flags [B]."""

    position: jax.Array
    tokens: jax.Array
    sums: jax.Array
    pool: Hypotheses
    finished: jax.Array  # [B, K] whether the pool's slot is taken
    improvable: jax.Array  # [B] HF: running beams may still beat the pool
    cache: Any


class _Candidates(NamedTuple):
    """The 2 K best continuations of all beams, best first, ties to the lower beam and token."""

    beams: jax.Array  # [B, 2K]
    ids: jax.Array
    sums: jax.Array


def beam_search(
    step: Step,
    cache: Any,
    rules: Constraints,
    *,
    batch: int,
    beams: int,
    returned: int = 1,
    rule: str = "hf",
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    reorder: Callable[[Any, jax.Array], Any] = reorder_cache,
) -> Hypotheses:
    """The best `returned` of the hypotheses that a beam search finishes, best first.

    Every step takes the 2 K best continuations (K = `beams`) by summed log probability. Those of
    the first K that end are finished, with score sum / length ** `length_penalty`; the best K of
    the others run on.

    Rule "hf": the pool keeps the best K; at `max_new` every row ends. The search stops when the
    pool is full and `early_stopping` is True, or it is False and the best running sum / (present
    length ** penalty) does not beat the pool's worst score, or it is "never" and that does not hold
    for the longest length either. Rule "fairseq": the search is over when K hypotheses are
    finished, also in the middle of a step; set `force_eos` in `rules`.

    Args:
      step: takes R = batch * beams rows, the beams of an input side by side.
      cache: of R rows; `reorder(cache, rows [R])` takes its rows anew.
      rules: what may be generated. batch: B.

    Raises:
      ValueError: fewer beams than returned rows, more beams than tokens, an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r}; known: {', '.join(RULES)}")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping {early_stopping!r}; known: True, False, 'never'")
    vocabulary = jax.eval_shape(
        step, jax.ShapeDtypeStruct((batch * beams,), jnp.int32), _scalar(), cache
    )[0].shape[-1]
    check_beams(beams, returned, vocabulary)
    tokens = jnp.full((batch, beams, 1 + rules.max_new), rules.pad, jnp.int32)
    tokens = tokens.at[:, :, 0].set(rules.start)
    never = _NEVER if rule == "hf" else -jnp.inf
    # Only one row of an input is live at first: K equal rows would find K equal continuations.
    sums = jnp.full((batch, beams), never, jnp.float32).at[:, 0].set(0.0)
    search = _Search(
        position=jnp.zeros((), jnp.int32),
        tokens=tokens,
        sums=sums,
        pool=Hypotheses(
            tokens,
            jnp.zeros((batch, beams), jnp.int32),
            jnp.full((batch, beams), never, jnp.float32),
        ),
        finished=jnp.zeros((batch, beams), bool),
        improvable=jnp.ones(batch, bool),
        cache=cache,
    )

    def going(search):
        open_ = ~search.finished.all(1)
        if rule == "hf":
            open_ = search.improvable & (open_ if early_stopping is True else True)
        return (search.position < rules.max_new) & open_.any()

    def body(search):
        found, cache = _continuations(step, search, rules)
        length = search.position + 1
        rows = jnp.arange(batch)[:, None]
        grown = search.tokens[rows, found.beams].at[:, :, length].set(found.ids)
        scores = found.sums / length.astype(jnp.float32) ** length_penalty
        among_first = jnp.arange(2 * beams) < beams
        if rule == "hf":
            ended = (found.ids == rules.eos) | (length == rules.max_new)
            closed = ~search.improvable
            if early_stopping is True:
                closed |= search.finished.all(1)
            pool, finished = _keep_best(search, grown, scores, ended & among_first, closed, length)
            sums, best = lax.top_k(jnp.where(ended, found.sums + _NEVER, found.sums), beams)
            longest = rules.max_new if early_stopping == "never" and length_penalty > 0 else length
            possible = sums[:, 0] / jnp.asarray(longest, jnp.float32) ** length_penalty
            worst = jnp.where(finished.all(1), pool.scores.min(1), _NEVER)
            improvable = search.improvable & (possible > worst)
        else:
            ended = (found.ids == rules.eos) & jnp.isfinite(found.sums)
            pool, finished = _fill_in_order(search, grown, scores, ended & among_first, length)
            best = jnp.argsort(ended, axis=1, stable=True)[:, :beams]
            sums, improvable = found.sums[rows, best], search.improvable
        source = rows * beams + found.beams[rows, best]
        return _Search(
            length,
            grown[rows, best],
            sums,
            pool,
            finished,
            improvable,
            reorder(cache, source.reshape(-1)),
        )

    search = lax.while_loop(going, body, search)
    tokens, lengths, scores = search.pool
    order = jnp.argsort(-scores, axis=1, stable=True)[:, :returned]
    rows = jnp.arange(batch)[:, None]
    return Hypotheses(tokens[rows, order], lengths[rows, order], scores[rows, order])


def _continuations(step, search: _Search, rules) -> tuple[_Candidates, Any]:
    batch, beams, width = search.tokens.shape
    last = search.tokens[:, :, search.position].reshape(-1)
    logits, cache = step(last, search.position, search.cache)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    log_p = constrain(log_p, search.tokens.reshape(-1, width), search.position, rules)
    totals = log_p.reshape(batch, beams, -1) + search.sums[:, :, None]
    # Of each beam first: the best 2 K of all are among them, and ties fall the same way.
    some = min(2 * beams, totals.shape[-1])
    values, ids = lax.top_k(totals, some)
    sums, flat = lax.top_k(values.reshape(batch, -1), 2 * beams)
    ids = jnp.take_along_axis(ids.reshape(batch, -1), flat, axis=1)
    return _Candidates(flat // some, ids, sums), cache


def _keep_best(search: _Search, tokens, scores, ended, closed, length):
    """HF's pool: the best K of the old ones and those that just ended; `closed` rows stay."""
    beams = search.tokens.shape[1]
    scores = jnp.where(ended, scores, scores + _NEVER)
    scores = jnp.where(closed[:, None], scores + _NEVER, scores)
    old = search.pool
    merged = jnp.concatenate([old.scores, scores], axis=1)
    kept, order = lax.top_k(merged, beams)
    rows = jnp.arange(len(tokens))[:, None]
    lengths = jnp.concatenate([old.lengths, jnp.broadcast_to(length, scores.shape)], axis=1)
    pool = Hypotheses(
        jnp.concatenate([old.tokens, tokens], axis=1)[rows, order], lengths[rows, order], kept
    )
    return pool, jnp.concatenate([search.finished, ended], axis=1)[rows, order]


def _fill_in_order(search: _Search, tokens, scores, ended, length):
    """fairseq's list: the next free slots in order of rank; what no longer fits is lost."""
    batch, beams = search.finished.shape
    taken = search.finished.sum(1, keepdims=True)
    slot = jnp.where(ended, taken + jnp.cumsum(ended, axis=1) - 1, beams)
    rows = jnp.arange(batch)[:, None]
    old = search.pool
    pool = Hypotheses(
        old.tokens.at[rows, slot].set(tokens, mode="drop"),
        old.lengths.at[rows, slot].set(length, mode="drop"),
        old.scores.at[rows, slot].set(scores, mode="drop"),
    )
    return pool, search.finished.at[rows, slot].set(True, mode="drop")


def check_beams(beams: int, returned: int, vocabulary: int) -> None:
    """Raises ValueError for fewer beams than returned rows and for more than tokens."""
    if not 1 <= returned <= beams:
        raise ValueError(
            f"{returned} returned rows from {beams} beams: wanted 1 or more, and as many beams"
        )
    if beams > vocabulary:
        raise ValueError(f"{beams} beams are more than the {vocabulary} tokens there are")


def _scalar() -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), jnp.int32)


def trim(found: Hypotheses) -> tuple[jax.Array, jax.Array]:
    """(tokens `[B * N, L]`, scores `[B * N]`) up to the longest row, as HF's `generate` returns."""
    longest = 1 + int(found.lengths.max())
    tokens = found.tokens[:, :, :longest]
    return tokens.reshape(-1, longest), found.scores.reshape(-1)
