"""GanLM's pre-training: generation, replaced token detection, replaced token denoising."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.language.ganlm import GanLM
from jaxmodels.language.ganlm_objective import (
    LossWeight,
    Objective,
    loss_per_token,
    summary,
    three_passes,
)
from train.building import build_model
from train.naming import ConfigError


@dataclasses.dataclass(frozen=True)
class GanlmPretraining:
    """Batches `source` [B, S], `previous` and `targets` [B, T] -> the three losses, one sum.

    The loss is the global batch's sum divided by its number of targets; gradients of micro-batches
    and `pmap` devices are weighted by that number, so that they are the global batch's (but for the
    detection loss, which each part rescales to its own targets, as the original does). Evaluation
    draws its replacements from a fixed key and runs all three passes, also where the denoising loss
    has no weight in training.
    """

    model: GanLM
    objective: Objective

    uses_step = True
    weighted_by = "tokens"

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Parameters; there are no other collections."""
        return self.model.init(rng, batch["source"][:1], batch["previous"][:1])["params"], {}

    def loss(self, params, extra, batch, rng, step):
        """Total loss a target in nats; the three losses in bits and the detector's rates to log."""
        total, outputs = three_passes(
            self.model, params, *_arrays(batch), self.objective, update=step, rng=rng, train=True
        )
        metrics = summary(outputs) | {
            name: outputs[name] for name in ("discriminator_weight", "denoising_weight")
        }
        return loss_per_token(total, outputs), (extra, metrics)

    def evaluate(self, variables, batch):
        """Losses in bits a target, rates over words; padding rows hold no target."""
        pad = self.objective.pad_id
        targets = jnp.where(batch["mask"][:, None] > 0, batch["targets"], pad)
        # Whatever the schedules say of the losses' weights, all three are measured.
        measured = dataclasses.replace(
            self.objective, discriminator=LossWeight(1.0), denoising=LossWeight(1.0)
        )
        _, outputs = three_passes(
            self.model,
            variables["params"],
            *_arrays({**batch, "targets": targets}),
            measured,
            rng=jax.random.key(0),
        )
        return sums_of(outputs)

    def report(self, variables, sums, config):
        """What the losses have to beat: verdicts and words without any context."""
        from train.data import pipeline

        family, _ = pipeline.resolve(config.data)
        rate = float(sums["replace_rate"])
        numbers = {
            "majority_accuracy": max(rate, 1 - rate),
            "verdict_entropy": binary_entropy(rate),
            "denoising_over_generator": sums["denoising_loss"] / sums["generator_loss"],
        }
        if hasattr(family, "unigram_entropy"):
            numbers["unigram_entropy"] = family.unigram_entropy(config.data)
        return numbers


def binary_entropy(rate: float) -> float:
    """Bits of a verdict that is "replaced" at this rate: the least loss without any context."""
    return sum(-p * math.log2(p) for p in (rate, 1 - rate) if p > 0)


def _arrays(batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    return batch["source"], batch["previous"], batch["targets"]


def sums_of(outputs) -> dict[str, jax.Array]:
    """`summary` as sums that add up over batches: over targets (`count`) and over `words`."""
    numbers = summary(outputs)
    tokens, words = outputs["tokens"], outputs["words"]
    sums = {
        name: numbers[name] * tokens
        for name in ("generator_loss", "discriminator_loss", "denoising_loss")
    }
    rates = ("detection_accuracy", "replace_rate", "accepted_rate", "rejected_rate")
    sums |= {f"{name}|words": numbers[name] * words for name in rates}
    replaced = outputs["true_negative"] + outputs["false_positive"]
    original = outputs["true_positive"] + outputs["false_negative"]
    return sums | {
        "replace_acc|replaced": outputs["true_negative"],
        "non_replace_acc|original": outputs["true_positive"],
        "replaced": replaced,
        "original": original,
        "words": words,
        "count": tokens,
    }


def objective_of(
    mask_id: int,
    vocab_size: int,
    discriminator_weight: float = 10.0,
    discriminator_warmup_steps: float = -1.0,
    discriminator_start_warmup_steps: float = -1.0,
    inconsistency_weight: float = 1.0,
    inconsistency_warmup_steps: float = -1.0,
    inconsistency_start_warmup_steps: float = -1.0,
    label_smoothing: float = 0.0,
    discriminator_sampling_temperature: float = 1.0,
    pad_id: int = 1,
) -> Objective:
    """The objective by the official argument names; the denoising loss is "inconsistency" there.

    Raises ConfigError for sentinels outside the dictionary and a temperature that is not positive.
    """
    if discriminator_sampling_temperature <= 0:
        raise ConfigError(
            "config.task_args.discriminator_sampling_temperature must be positive, not "
            f"{discriminator_sampling_temperature}"
        )
    objective = Objective(
        mask_id,
        LossWeight(
            discriminator_weight, discriminator_warmup_steps, discriminator_start_warmup_steps
        ),
        LossWeight(
            inconsistency_weight, inconsistency_warmup_steps, inconsistency_start_warmup_steps
        ),
        label_smoothing,
        discriminator_sampling_temperature,
        pad_id,
    )
    try:
        objective.check(vocab_size)
    except ValueError as error:
        raise ConfigError(f"config.task_args.mask_id: {error}") from None
    return objective


def check_dictionary(config, model: GanLM) -> None:
    """Refuse a model with fewer rows than the data's dictionary: `jit` would clamp ids silently.

    Raises ConfigError with both sizes.
    """
    from train.data import pipeline

    size = pipeline.resolve(config.data)[1].get("vocab_size", 0)
    if size > model.vocab_size:
        raise ConfigError(
            f"config.model_args.vocab_size: {model.vocab_size} rows for the dictionary of {size} "
            "entries in config.data.options.vocab_size"
        )


def from_config(config) -> GanlmPretraining:
    """The task of a config: its model and `task_args`."""
    model = build_model(config)
    check_dictionary(config, model)
    if not getattr(model, "detects", False):
        raise ConfigError(
            "config.model_args.initialization_strategy: pre-training needs a generator and a "
            "discriminator, strategy 'pretraining' or 'both'"
        )
    objective = objective_of(vocab_size=model.vocab_size, **config.task_args)
    return GanlmPretraining(model, objective)
