"""CoditT5's cases: the T5 backbone by its `config.json` names, with generation and gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmodels
from jaxmodels.interop.conversion import to_torch
from jaxmodels.language import decoding, t5
from jaxmodels.layers.relative_position import relative_buckets

NOT_ARGUMENTS = ("generate", "seed")


def run(case) -> dict[str, Any]:
    """Every wanted output of one case."""
    if case.model == "T5ForConditionalGeneration":
        return _t5(case)
    raise KeyError(f"no adapter for {case.model!r}")


def _t5(case) -> dict[str, Any]:
    arguments = {k: v for k, v in case.config.items() if k not in NOT_ARGUMENTS}
    module, variables = jaxmodels.load("language.t5", case.weights, **arguments)
    ids, mask, labels = (
        jnp.asarray(case.inputs[name], jnp.int32)
        for name in ("input_ids", "attention_mask", "labels")
    )
    start, pad = arguments["decoder_start_token_id"], arguments["pad_token_id"]
    decoder_ids = t5.shift_right(labels, start, pad)
    outputs = jax.jit(functools.partial(module.apply, method="intermediates"))(
        variables, ids, decoder_ids, mask
    )
    counted = t5.ignore_padding(labels, pad)

    def loss_of(params):
        return t5.mean_nll(module.apply({"params": params}, ids, decoder_ids, mask), labels)

    loss, grads = jax.jit(jax.value_and_grad(loss_of))(variables["params"])
    buckets = functools.partial(
        relative_buckets,
        jnp.asarray(case.inputs["rel"]),
        buckets=arguments["relative_attention_num_buckets"],
        max_distance=arguments["relative_attention_max_distance"],
    )
    outputs |= {
        "decoder_input_ids": decoder_ids,
        "loss_pad_counted": loss,
        "loss_pad_ignored": t5.mean_nll(outputs["logits"], counted),
        "likelihood": t5.likelihood(outputs["logits"], counted),
        "bucket_bidirectional": buckets(bidirectional=True),
        "bucket_causal": buckets(bidirectional=False),
        "cached_logits": _cached_logits(module, variables, ids, mask, decoder_ids),
    }
    rules = t5.TORCH_RULES(module)
    outputs |= {f"grad.{k}": v for k, v in to_torch({"params": grads}, rules).items()}
    for n, settings in enumerate(case.config["generate"]):
        outputs |= _generated(f"gen{n}", module, variables, ids, mask, settings)
    return outputs


def _cached_logits(module, variables, ids, mask, decoder_ids):
    rows, length = decoder_ids.shape

    @jax.jit
    def run(variables):
        step, cache = t5.cached_decoder(module, variables, ids, mask, rows=rows, length=length)

        def one(carry, x):
            logits, cache = step(x[1], x[0], carry)
            return cache, logits

        _, logits = jax.lax.scan(one, cache, (jnp.arange(length), decoder_ids.T))
        return jnp.swapaxes(logits, 0, 1)

    return run(variables)


def _generated(name, module, variables, ids, mask, settings) -> dict[str, Any]:
    settings = dict(settings)
    found = jax.jit(functools.partial(t5.generate, module, **settings))(variables, ids, mask)
    tokens, scores = decoding.trim(found)
    return {f"{name}.sequences": np.asarray(tokens), f"{name}.sequences_scores": scores}
