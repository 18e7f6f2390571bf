"""Text out of GanLM: greedy and fairseq's beam search over the cached decoder, and rescoring.

After `fairseq/sequence_generator.py` as bundled with CSJianYang/GanLM@6094288. The official wrapper
decodes without a cache; the cached decoder gives the same tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.language.decoding import Constraints, Hypotheses, beam_search, greedy
from jaxmodels.language.ganlm import GanLM


def longest_output(
    module: GanLM, source_length: int, max_len_a: float = 0.0, max_len_b: int = 200
) -> int:
    """fairseq's `max_len`: min(int(a S + b), max positions - 1) for padded sources of S tokens.

    A hypothesis has one token more at most, the end forced there.
    """
    return min(int(max_len_a * source_length + max_len_b), module.max_target_positions - 1)


def generate(
    module: GanLM,
    variables: Any,
    source: jax.Array,
    *,
    beam_size: int = 5,
    len_penalty: float = 1.0,
    max_len_a: float = 0.0,
    max_len_b: int = 200,
    min_len: int = 1,
    no_repeat_ngram_size: int = 0,
    returned: int | None = None,
) -> Hypotheses:
    """Beam search of the causal decoder from `</s>`, best hypotheses first. Jittable.

    Args:
      source: tokens `[B, S]`, padded on either side.
      len_penalty: scores are summed log probability / length ** this, `</s>` counted.
      max_len_a, max_len_b: see `longest_output`; `</s>` is forced there.
      min_len: `</s>` comes after so many other tokens at least.
      no_repeat_ngram_size: n-grams of this size do not come twice; 0 is off.
      returned: how many hypotheses, by default `beam_size`.

    Returns: tokens `[B, returned, 2 + max_len]` with the start token first, lengths, scores.
    """
    longest = longest_output(module, source.shape[-1], max_len_a, max_len_b)
    rules = Constraints(
        start=module.eos_id,
        eos=module.eos_id,
        pad=module.pad_id,
        max_new=longest + 1,
        min_new=min(min_len, longest),
        never=(module.pad_id,),
        no_repeat_ngram=no_repeat_ngram_size,
        force_eos=True,
    )
    step, cache = _search(module, variables, source, beam_size, longest + 1)
    return beam_search(
        step,
        cache,
        rules,
        batch=source.shape[0],
        beams=beam_size,
        returned=beam_size if returned is None else returned,
        rule="fairseq",
        length_penalty=len_penalty,
    )


def generate_greedily(
    module: GanLM, variables: Any, source: jax.Array, new_tokens: int, *, stop: bool = True
) -> Hypotheses:
    """The likeliest token at each of `new_tokens` positions, padding excluded. Jittable.

    Rows end at `</s>`, or with `stop=False` nowhere: `</s>` is then fed back like any token.
    """
    rules = Constraints(
        start=module.eos_id,
        eos=module.eos_id if stop else -1,
        pad=module.pad_id,
        max_new=new_tokens,
        never=(module.pad_id,),
    )
    step, cache = _search(module, variables, source, 1, new_tokens)
    return greedy(step, cache, rules, batch=source.shape[0])


def _search(module, variables, source, rows, length):
    cache, memory = module.apply(variables, source, rows, length, method="start")

    def step(tokens, position, cache):
        return module.apply(variables, tokens, position, cache, memory, method="step")

    return step, cache


def cached_logits(module: GanLM, variables: Any, source: jax.Array, previous: jax.Array):
    """Logits [B, T, V] of `previous` [B, T], token by token through the cache.

    Equal to `GanLM.generate` at rows' tokens before padding.
    """
    length = previous.shape[1]
    step, cache = _search(module, variables, source, 1, length)

    def one(cache, inputs):
        position, tokens = inputs
        logits, cache = step(tokens, position, cache)
        return cache, logits

    _, logits = jax.lax.scan(one, cache, (jnp.arange(length), previous.T))
    return jnp.swapaxes(logits, 0, 1)


def token_scores(
    module: GanLM, variables: Any, source: jax.Array, hypotheses: Hypotheses
) -> jax.Array:
    """Log probability [B, N, L - 1] of every generated token of hypotheses [B, N, L], else 0."""

    def score(module):
        tokens = hypotheses.tokens
        batch, rows, width = tokens.shape
        memory = jnp.repeat(module.encode(source), rows, axis=0)
        flat = tokens.reshape(batch * rows, width)
        repeated = jnp.repeat(source, rows, axis=0)
        logits = module.generate(flat[:, :-1], memory, repeated)
        scores = jax.nn.log_softmax(logits.astype(jnp.float32))
        scores = jnp.take_along_axis(scores, flat[:, 1:, None], axis=-1)[..., 0]
        scores = scores.reshape(batch, rows, width - 1)
        return jnp.where(jnp.arange(width - 1) < hypotheses.lengths[..., None], scores, 0)

    return module.apply(variables, method=score)
