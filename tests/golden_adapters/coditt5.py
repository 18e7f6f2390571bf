"""CoditT5's cases: the T5 backbone by its `config.json` names, with generation and gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmodels
from jaxmodels.interop.conversion import to_torch
from jaxmodels.language import (
    decoding,
    edit_corruption,
    edit_metrics,
    edit_plans,
    reranking,
    t5,
    t5_generation,
)
from jaxmodels.layers.relative_position import relative_buckets

# Of a configuration, what a T5 is built from; the rest says how the case was made.
T5_ARGUMENTS = set(t5.T5.__dataclass_fields__) - {"name", "parent", "dtype", "param_dtype"}


def run(case) -> dict[str, Any]:
    """Every wanted output of one case."""
    if case.model == "T5ForConditionalGeneration":
        return _t5(case)
    if case.model.startswith("edit-plan"):
        return _edit_plans(case)
    if case.model.startswith("pre-training corruption"):
        return _corruption(case)
    if case.model.startswith("metrics"):
        return _metrics(case)
    raise KeyError(f"no adapter for {case.model!r}")


def _t5(case) -> dict[str, Any]:
    arguments = {k: v for k, v in case.config.items() if k in T5_ARGUMENTS}
    module, variables = jaxmodels.load("language.t5", case.weights, **arguments)
    ids, labels = (jnp.asarray(case.inputs[k], jnp.int32) for k in ("input_ids", "labels"))
    mask = jnp.asarray(case.inputs.get("attention_mask", np.ones(ids.shape)), jnp.int32)
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
        jnp.asarray(case.inputs.get("rel", np.zeros(0, int))),
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
    for n, settings in enumerate(case.config.get("generate", ())):
        outputs |= _generated(f"gen{n}", module, variables, ids, mask, settings)
    return outputs


def _cached_logits(module, variables, ids, mask, decoder_ids):
    rows, length = decoder_ids.shape

    @jax.jit
    def run(variables):
        step, cache = t5_generation.cached_decoder(
            module, variables, ids, mask, rows=rows, length=length
        )

        def one(carry, x):
            logits, cache = step(x[1], x[0], carry)
            return cache, logits

        _, logits = jax.lax.scan(one, cache, (jnp.arange(length), decoder_ids.T))
        return jnp.swapaxes(logits, 0, 1)

    return run(variables)


def _generated(name, module, variables, ids, mask, settings) -> dict[str, Any]:
    # HF's lengths count the start token, its numbers of new tokens do not.
    lengths = {"max_new_tokens": "max_length", "min_new_tokens": "min_length"}
    settings = {
        lengths.get(name, name): value + 1 if name in lengths else value
        for name, value in settings.items()
        if name not in ("do_sample", "use_cache")  # as they are: no sampling, with a cache
    }
    found = jax.jit(functools.partial(t5_generation.generate, module, **settings))(
        variables, ids, mask
    )
    tokens, scores = decoding.trim(found)
    return {f"{name}.sequences": np.asarray(tokens), f"{name}.sequences_scores": scores}


def _edit_plans(case) -> dict[str, Any]:
    pairs = [(old.split(), new.split()) for old, new in zip(case.inputs["old"], case.inputs["new"])]
    full = [edit_plans.edit_sequence(*pair) for pair in pairs]
    anchored = [edit_plans.anchored_plan(*pair) for pair in pairs]
    outputs = [
        edit_plans.model_output(o, n) for o, n in zip(case.inputs["old"], case.inputs["new"])
    ]
    raw = [str(text) for text in case.inputs["raw_predictions"]]
    context = [case.config["context"]]
    texts = {
        "full_edit_sequence": map(" ".join, full),
        "plan": (" ".join(edit_plans.plan(*pair)) for pair in pairs),
        "model_output": outputs,
        "model_input": (edit_plans.model_input(old, context) for old in case.inputs["old"]),
        "minimal_comment_plan": map(" ".join, anchored),
        "minimal_plan": (" ".join(edit_plans.anchored_plan(*p, markers="plain")) for p in pairs),
        "applied_full": (
            " ".join(edit_plans.apply_official(e, old)) for e, (old, _) in zip(full, pairs)
        ),
        "applied_minimal_comment": (
            " ".join(edit_plans.apply_anchored_official(e, old))
            for e, (old, _) in zip(anchored, pairs)
        ),
        "parse_generation": (edit_plans.split_official(text)[0] for text in outputs),
        "parse_edits": (edit_plans.split_official(text)[1] for text in outputs),
        "remove_edits": map(edit_plans.target_official, raw),
        "separate_generation": (edit_plans.split_official(text)[0] for text in raw),
        "separate_edits": (edit_plans.split_official(text)[1] for text in raw),
        "apply_result": (
            " ".join(edit_plans.apply_official(str(edits).split(), str(old).split()))
            for edits, old in zip(case.inputs["apply_edits"], case.inputs["apply_old"])
        ),
    }
    return {name: np.asarray(list(values), str) for name, values in texts.items()}


def _corruption(case) -> dict[str, Any]:
    settings = {
        modality: edit_corruption.Settings(
            span_count=c["mean_span_count"],
            span_length=c["mean_span_length"],
            delete_below=c["delete"][1],
            insert_below=c["insert"][1],
        )
        for modality, c in case.config.items()
        if isinstance(c, dict)
    }
    results: dict[str, Any] = {}
    for n in range(case.config["n_cases"]):
        get = functools.partial(lambda n, name: case.inputs[f"{n:03d}.{name}"], n)
        try:
            edit_corruption.noise_counts(int(get("length")), settings[str(get("modality"))])
            starts = get("noise_segment_starts"), get("nonnoise_segment_starts")
            mask = edit_corruption.mask_of(*starts)
        except edit_corruption.NotCorruptible:
            results[f"{n:03d}.error"] = np.asarray(1)
            continue
        ids, labels = edit_corruption.corrupt_ids(
            get("tokens").astype(str),  # one id is one word
            mask,
            get("actions").tolist(),
            lambda text: [int(word) for word in text.split()],
            vocabulary=case.config["tokenizer_size"],
            space=case.config["space_token_id"],
        )
        results |= {
            f"{n:03d}.error": np.asarray(0),
            f"{n:03d}.mask": mask,
            f"{n:03d}.corrupted_ids": ids,
            f"{n:03d}.edit_labels": np.asarray(labels),
        }
    for modality, chosen in settings.items():
        if not any(name.startswith(f"stats.{modality}.") for name in case.wanted):
            continue
        rng = np.random.default_rng(case.config["seed"])
        found = edit_corruption.statistics(chosen, rng)
        results |= {f"stats.{modality}.{name}": value for name, value in found.items()}
    return results


def _metrics(case) -> dict[str, Any]:
    old, new, predicted = (
        list(map(str, case.inputs[name])) for name in ("source", "reference", "hypothesis")
    )
    scores = edit_metrics.sentence_scores(predicted, new, old)
    results = {
        "bleu4": scores["bleu4"],
        "sari": scores["sari"],
        "gleu": scores["gleu"],
        "xmatch": scores["exact_match"],
        "copy": scores["copy_rate"],
    }
    comments = list(map(str, case.inputs["comments"]))
    results["subtokenized"] = np.asarray(list(map(edit_metrics.subtokenize, comments)))
    results["tag_removed"] = np.asarray(list(map(edit_metrics.remove_tags, comments)))
    best = reranking.best_indices(
        case.inputs["rerank.base_score"], case.inputs["rerank.reranker_score"]
    )
    rows = np.arange(len(best))
    results["rerank.best_index"] = best
    results["rerank.best"] = case.inputs["rerank.hypotheses"][rows, best]
    return results
