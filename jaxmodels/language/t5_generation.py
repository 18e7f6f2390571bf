"""T5's decoding: the encoder once, then token by token with a cache; `generate` as HF names it.

After `T5ForConditionalGeneration.generate` of huggingface/transformers v5.23.0
(`generation/utils.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.language import decoding
from jaxmodels.language.t5 import RELATIVE_BIAS, T5, Block, check_tokens, key_mask, stack_of
from jaxmodels.layers.attention import (
    causal_mask,
    head_major,
    split_heads,
)
from jaxmodels.layers.normalization import RMSNorm


def cached_decoder(
    module: T5,
    variables: Mapping[str, Any],
    input_ids: jax.Array,
    attention_mask: jax.Array | None,
    *,
    rows: int,
    length: int,
):
    """`(step, cache)` for `jaxmodels.language.decoding`: encoded once, then token by token.

    Args:
      input_ids, attention_mask: `[B, S]`.
      rows: decoder rows R, a multiple of B; R / B neighboring rows (beams) share an input.
      length: positions of the cache, the start token's included.

    Returns: `step(tokens [R], position, cache) -> (logits [R, V], cache)` and the empty cache.
    """
    params = variables["params"]
    encoded = module.apply({"params": params}, input_ids, attention_mask, method="encode")
    stack = stack_of(module, is_decoder=True)
    norm = RMSNorm(module.layer_norm_epsilon, module.dtype, module.param_dtype)
    block = Block(**stack.shared(), is_decoder=True)
    decoder = params["decoder"]
    # Cut once, before the loop: layers scanned inside it would copy their weights at every token.
    layers = [_layer(decoder["block.*"], i) for i in range(stack.num_layers)]
    memories = []
    for layer in layers:
        cross = layer["layer.1.EncDecAttention"]
        key, value = head_major(
            *(
                split_heads(encoded @ cross[name]["kernel"].astype(encoded.dtype), module.num_heads)
                for name in ("k", "v")
            )
        )
        memories.append({"layer.1.EncDecAttention": {"key": key, "value": value}})
    keep = key_mask(attention_mask)

    def step(tokens, position, cache):
        x = module.apply({"params": params}, tokens[:, None], method="embed")
        here = jnp.asarray(position).reshape(1)
        bias = stack.bias(decoder[RELATIVE_BIAS]["embedding"], here, jnp.arange(length))
        mask = causal_mask(1, length, position)
        new = []
        for layer, memory, own in zip(layers, memories, cache):
            state = {"params": layer, "memory": memory, **own}
            (x, _), own = block.apply(
                state, x, bias, mask, None, keep, position, False, length, mutable=["cache"]
            )
            new.append(own)
        x = norm.apply({"params": decoder["final_layer_norm"]}, x)
        return module.apply({"params": params}, x[:, 0], method="logits"), new

    heads = (rows, module.num_heads)
    empty = {
        "key": jnp.zeros((*heads, module.d_kv, length), module.dtype),
        "value": jnp.zeros((*heads, length, module.d_kv), module.dtype),
    }
    return step, [{"cache": {"layer.0.SelfAttention": empty}}] * stack.num_layers


def _layer(stacked: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], stacked)


def generate(
    module: T5,
    variables: Mapping[str, Any],
    input_ids: jax.Array,
    attention_mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    *,
    max_length: int,
    num_beams: int = 1,
    num_return_sequences: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    min_length: int = 0,
    no_repeat_ngram_size: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> decoding.Hypotheses:
    """HF's `generate` by its argument names: greedy, HF's beam search, or samples given an `rng`.

    `max_length` and `min_length` count the start token, as there. Works under `jax.jit`;
    `decoding.trim` cuts the result to its longest row.

    Args:
      input_ids, attention_mask: `[B, S]`.

    Raises ValueError for beams together with sampling, more returned rows than beams or beams than
    tokens, and (outside `jit`) for ids outside the vocabulary and rows of padding alone.
    """
    if not isinstance(input_ids, jax.core.Tracer):
        check_tokens(input_ids, module)
    batch, length = input_ids.shape[0], max_length - 1
    rules = decoding.Constraints(
        start=module.decoder_start_token_id,
        eos=module.eos_token_id,
        pad=module.pad_token_id,
        max_new=length,
        min_new=max(min_length - 1, 0),
        no_repeat_ngram=no_repeat_ngram_size,
    )
    if rng is not None and num_beams > 1:
        raise ValueError(f"sampling with {num_beams} beams: leave rng out, or num_beams at 1")
    copies = num_beams if rng is None else num_return_sequences
    step, cache = cached_decoder(
        module, variables, input_ids, attention_mask, rows=batch * copies, length=length
    )
    if rng is not None:
        found = decoding.sample(
            step,
            cache,
            rules,
            rng,
            batch=batch * copies,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        return jax.tree.map(lambda x: x.reshape(batch, copies, *x.shape[2:]), found)
    if num_beams == 1 and num_return_sequences == 1:
        return decoding.greedy(step, cache, rules, batch=batch)
    return decoding.beam_search(
        step,
        cache,
        rules,
        batch=batch,
        beams=num_beams,
        returned=num_return_sequences,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
