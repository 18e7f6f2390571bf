"""GanLM's cases: official argument and output names to ours."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

import jaxmodels
from jaxmodels.interop.conversion import to_torch
from jaxmodels.language import ganlm_generation as generation
from jaxmodels.language import span_corruption
from jaxmodels.language.ganlm import TORCH_RULES, GanLM
from jaxmodels.language.ganlm_objective import (
    Draws,
    LossWeight,
    Objective,
    loss_per_token,
    three_passes,
)
from jaxmodels.layers.relative_position import relative_buckets

SAME_NAMES = (
    "vocab_size",
    "encoder_ffn_embed_dim",
    "decoder_ffn_embed_dim",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "encoder_layers",
    "generator_decoder_layers",
    "discriminator_decoder_layers",
    "max_source_positions",
    "max_target_positions",
    "initialization_strategy",
    "share_generator_discriminator",
    "layernorm_embedding",
    "layernorm_eps",
    "num_classes",
    "pooler_activation",
)
HEADS = "classification_heads."
BEAM_ARGUMENTS = (
    "beam_size",
    "len_penalty",
    "max_len_a",
    "max_len_b",
    "min_len",
    "no_repeat_ngram_size",
)
# The case's names of our outputs.
PASSES = {
    "encoder_out": "memory",
    "generator_logits": "logits",
    "discriminator_logits": "detection_logits",
    "masked_tokens": "masked",
    "discriminator_targets": "detection_targets",
    "noisy_prev_output_tokens": "noisy_previous",
    "denoising_logits": "denoising_logits",
    "loss_total": "loss",
    "loss_generator": "generator_loss",
    "loss_discriminator_weighted_by_cfg": "logged_discriminator_loss",
    "loss_denoising_weighted_by_cfg": "logged_denoising_loss",
    "tp": "true_positive",
    "fp": "false_positive",
    "tn": "true_negative",
    "fn": "false_negative",
    "sample_size": "tokens",
    "discriminator_weight": "discriminator_weight",
    "inconsistency_weight": "denoising_weight",
    "positive_inconsistency_ntokens": "rejected",
    "negative_inconsistency_ntokens": "accepted",
    "inconsistency_ntokens": "misjudged_count",
}


def run(case) -> dict[str, Any]:
    """Every wanted output of one case."""
    if "span corruption" in case.model:
        return _span_corruption(case)
    config, arguments = case.config, arguments_of(case.config)
    with safe_open(case.weights, "np") as stored:
        heads = {key.split(".")[1] for key in stored.keys() if key.startswith(HEADS)}
    if heads:
        arguments["head_name"] = heads.pop()
    module, variables = jaxmodels.load("language.ganlm", case.weights, **arguments)
    inputs = {k: jnp.asarray(v, jnp.int32) for k, v in case.inputs.items()}
    if "class_logits" in case.outputs:
        return _understanding(module, variables, inputs)
    outputs = {}
    if "criterion" in config:
        outputs |= _passes(case, module, variables, inputs)
    if any(name.startswith(("beam", "greedy", "cached", "decoder_state")) for name in case.wanted):
        outputs |= _generation(case, module, variables, inputs)
    states = jax.jit(lambda v, x: _states(module, v, x))(variables, inputs)
    return {**outputs, **_numbered(states)}


def arguments_of(config) -> dict[str, Any]:
    """Constructor arguments of a case's model."""
    arguments = {name: config[name] for name in SAME_NAMES if name in config}
    arguments["embed_dim"] = config["encoder_embed_dim"]
    arguments["activation"] = config.get("activation", "gelu").split()[0]
    unscaled = config.get("embed_scale") == 1.0
    arguments["no_scale_embedding"] = config.get("no_scale_embedding", unscaled)
    arguments["pad_id"], arguments["eos_id"] = config["pad"], config["eos"]
    arguments["rel_pos_buckets"] = config.get("build", config).get("rel_pos_buckets", 32)
    if _pretrains(config):
        arguments["initialization_strategy"] = "pretraining"
    return arguments


def _pretrains(config) -> bool:
    """Pre-training's cases name that task, or neither a task nor a strategy."""
    given = config.get("task") or config.get("initialization_strategy", "pretraining")
    return given == "pretraining"


def _passes(case, module, variables, inputs) -> dict[str, Any]:
    criterion = case.config["criterion"]

    def weight(name):
        return LossWeight(
            criterion[f"{name}_weight"],
            criterion.get(f"{name}_warmup_steps", -1),
            criterion.get(f"{name}_start_warmup_steps", 0),
        )

    objective = Objective(
        case.config["mask_idx"],
        weight("discriminator"),
        weight("inconsistency"),
        # Pre-training is plain cross-entropy whatever that says.
        0.0 if _pretrains(case.config) else criterion.get("label_smoothing", 0.0),
        case.config.get("discriminator_sampling_temperature", 1.0),
        case.config["pad"],
    )
    draws = Draws(inputs["sampled_input_tokens"], inputs["masked_sampled_tokens"])
    targets = inputs["targets"] if "targets" in inputs else inputs["target"]

    def loss(params):
        total, outputs = three_passes(
            module,
            params,
            inputs["src_tokens"],
            inputs["prev_output_tokens"],
            targets,
            objective,
            update=case.config.get("update_num", 0),
            draws=draws,
        )
        return loss_per_token(total, outputs), outputs

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    named = {theirs: outputs[ours] for theirs, ours in PASSES.items() if ours in outputs}
    # By every name of a tied matrix or shared layer, whichever the case has.
    gradients = to_torch({"params": gradients}, TORCH_RULES(module))
    return {
        **named,
        "encoder_padding_mask": inputs["src_tokens"] == case.config["pad"],
        **{f"grad.{name}": value for name, value in gradients.items()},
    }


def _states(module: GanLM, variables, inputs) -> dict[str, jax.Array]:
    def all_states(module):
        source = inputs["src_tokens"]
        memory, encoder = module.encode(source, states=True)
        found = {"encoder_state": encoder}
        if "sampled_input_tokens" in inputs:
            _, found["discriminator_state"] = module.detect(
                inputs["sampled_input_tokens"], memory, source, states=True
            )
        _, found["decoder_state"] = module.generate(
            inputs["prev_output_tokens"], memory, source, states=True
        )
        return found

    return module.apply(variables, method=all_states)


def _numbered(states) -> dict[str, jax.Array]:
    return {f"{name}_{i}": x for name, stacked in states.items() for i, x in enumerate(stacked)}


def _generation(case, module, variables, inputs) -> dict[str, Any]:
    source, previous = inputs["src_tokens"], inputs["prev_output_tokens"]

    @jax.jit
    def forward(variables):
        memory = module.apply(variables, source, method="encode")
        logits = module.apply(variables, previous, memory, source, method="generate")
        return {"encoder_out": memory, "generator_logits": logits}

    outputs = dict(forward(variables))
    if "cached_logits" in case.outputs:
        steps = case.outputs["cached_logits"].shape[1]
        run = jax.jit(lambda v: generation.cached_logits(module, v, source, previous[:, :steps]))
        outputs["cached_logits"] = run(variables)
    if "greedy_tokens_no_stop" in case.outputs:
        new = case.outputs["greedy_tokens_no_stop"].shape[1] - 1
        found = jax.jit(lambda v: generation.generate_greedily(module, v, source, new, stop=False))(
            variables
        )
        outputs["greedy_tokens_no_stop"] = np.asarray(found.tokens[:, 0], np.int64)
    for i, beam in enumerate(case.config.get("beams", ())):
        arguments = {name: beam[name] for name in BEAM_ARGUMENTS if name in beam}

        search = jax.jit(functools.partial(_search, module, **arguments))
        found, scores = search(variables, source)
        # Ours have room for the longest output there may be, the recorded ones for theirs.
        width = case.outputs[f"beam{i}.tokens"].shape[-1]
        width = max(width, int(found.lengths.max()))
        outputs[f"beam{i}.tokens"] = found.tokens[:, :, 1 : 1 + width]
        outputs[f"beam{i}.scores"] = found.scores
        outputs[f"beam{i}.positional_scores"] = scores[:, :, :width]
    return outputs


def _search(module, variables, source, **arguments):
    found = generation.generate(module, variables, source, **arguments)
    return found, generation.token_scores(module, variables, source, found)


def _understanding(module, variables, inputs) -> dict[str, Any]:
    source, rotated = inputs["src_tokens"], inputs["prev_output_tokens"]

    @jax.jit
    def forward(variables):
        return {
            "encoder_out": module.apply(variables, source, method="encode"),
            "decoder_features": module.apply(variables, source, rotated, method="read"),
            # The rotation is ours here; the recorded one must give the same.
            "class_logits": module.apply(variables, source, method="classify"),
        }

    return forward(variables)


def _span_corruption(case) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    inputs = case.inputs
    for number in sorted({name.split(".")[0] for name in inputs if name[0].isdigit()}):
        source, label = span_corruption.corrupt(
            inputs[f"{number}.doc"],
            case.config["first_sentinel"],
            float(inputs[f"{number}.mask_prob"]),
            float(inputs[f"{number}.span_length"]),
            split_order=inputs.get(f"{number}.shuffled_split_positions"),
            insert_order=inputs[f"{number}.shuffled_insert_positions"],
        )
        outputs[f"{number}.source"], outputs[f"{number}.label"] = source, label
    if "stats.doc_length" in inputs:
        longest = len(case.outputs["stats.span_length_hist"]) - 1
        rates, lengths = span_corruption.statistics(
            int(inputs["stats.doc_length"]), 20_000, longest
        )
        outputs["stats.mask_rate_by_position"] = rates
        outputs["stats.span_length_hist"] = lengths
    if "rel" in inputs:
        outputs["bucket_bidirectional"] = relative_buckets(
            jnp.asarray(inputs["rel"]),
            bidirectional=True,
            buckets=case.config.get("rel_pos_buckets", 32),
        )
    if "schedule.updates" in inputs:
        updates = inputs["schedule.updates"]
        outputs["schedule.weight"] = np.stack(
            [
                LossWeight(weight, warmup, start)(updates)
                for warmup, weight, start in inputs["schedule.warmup_weight_start"].tolist()
            ]
        )
    return outputs
