"""GanLM's objective: generation, replaced token detection, replaced token denoising.

After the official `unilm/criterions/electra_encoder_decoder_v6.py` and the forward pass it drives
(CSJianYang/GanLM@6094288). B rows, T target positions, V words. Rows of targets are padded on the
right. Despite the name nothing is adversarial: samples, verdicts and the noisy context are
constants, and the three losses are minimized together.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmodels.language.ganlm import GanLM
from jaxmodels.language.span_corruption import SENTINELS, check_ids

# Of log2: losses are logged in bits.
BITS_PER_NAT = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class LossWeight:
    """The weight of an extra loss over the updates of a run.

    0 before `start_steps`; then `weight` at once if `warmup_steps` <= 0, else rising linearly to
    it over `warmup_steps`. (The defaults are the published runs': constant from the start.)
    """

    weight: float
    warmup_steps: float = -1.0
    start_steps: float = -1.0

    def __call__(self, update: Any) -> jax.Array:
        """The weight at update `update` (int or array), float32."""
        since = jnp.asarray(update, jnp.float32) - self.start_steps
        weight = jnp.full_like(since, self.weight)
        if self.warmup_steps > 0:
            weight = jnp.minimum(since * (self.weight / self.warmup_steps), self.weight)
        return jnp.where(since < 0, 0.0, weight)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the three passes need beside the model.

    Attributes:
      mask_id: index of `<mask>`; the sentinels follow it, and every id from it on is none of the
        words that are sampled.
      discriminator, denoising: weights of the two extra losses; a denoising weight of 0 leaves
        the third pass out.
      label_smoothing: of the generator's losses (0.1 in fine-tuning, 0 in pre-training).
      temperature: of the sampled replacements.
    """

    mask_id: int
    discriminator: LossWeight = LossWeight(10.0)
    denoising: LossWeight = LossWeight(1.0)
    label_smoothing: float = 0.0
    temperature: float = 1.0
    pad_id: int = 1

    def check(self, vocab_size: int) -> None:
        """Raises ValueError when the sentinels do not lie within the dictionary."""
        if not 0 < self.mask_id < vocab_size - SENTINELS:
            raise ValueError(
                f"mask_id {self.mask_id} and its {SENTINELS} sentinels lie outside the dictionary "
                f"of {vocab_size} entries; it needs <mask> and <mask_0> .. <mask_99>"
            )


class Draws(NamedTuple):
    """Tokens [B, T]: `sampled` stands for the gold ones in the discriminator's input (gold where
    nothing is sampled), `forced` is a wrong token for every position."""

    sampled: jax.Array
    forced: jax.Array


class Misjudged(NamedTuple):
    """Positions [B, T] at which the discriminator errs: a wrong token `accepted`, a right one
    `rejected`."""

    accepted: jax.Array
    rejected: jax.Array


def sampled_positions(targets: jax.Array, objective: Objective) -> jax.Array:
    """M, bool [B, T]: targets that are words, neither padding nor sentinels."""
    return (targets != objective.pad_id) & (targets <= objective.mask_id - 1)


def sample_tokens(rng: jax.Array, logits: jax.Array) -> jax.Array:
    """One draw from softmax(logits [..., V]) for each row, int32 [...].

    By inversion in two stages, a block of words and a word in it: two uniform numbers a row and
    cumulative sums of about sqrt(V) terms, where Gumbel noise would take V random numbers. A word
    of probability 0 (logit -inf) is never drawn; one word at least must be finite.
    """
    words = logits.shape[-1]
    logits = logits.astype(jnp.float32)
    mass = jnp.exp(logits - logits.max(-1, keepdims=True))
    width = max(1, int(words**0.5))
    blocks = -(-words // width)
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, blocks * width - words)]
    mass = jnp.pad(mass, padding).reshape(*logits.shape[:-1], blocks, width)
    uniform = jax.random.uniform(rng, (2, *logits.shape[:-1], 1))
    block = _invert(mass.sum(-1), uniform[0])
    inside = jnp.take_along_axis(mass, block[..., None, None], axis=-2)[..., 0, :]
    return block * width + _invert(inside, uniform[1])


def _invert(mass: jax.Array, uniform: jax.Array) -> jax.Array:
    """Index of the first cumulative sum of `mass` [..., K] above uniform [..., 1] * total."""
    total = jnp.cumsum(mass, axis=-1)
    # Strictly above, and uniform < 1: an entry without mass is never the first.
    return jnp.argmax(total > uniform * total[..., -1:], axis=-1).astype(jnp.int32)


def draw(rng: jax.Array, logits: jax.Array, targets: jax.Array, objective: Objective) -> Draws:
    """Replacements from softmax(logits / temperature), logits [B, T, V], targets [B, T].

    `forced` is drawn with the gold logit at -inf: zeroing its probability instead, as the official
    code does, leaves nothing to draw from where that probability rounds to 1.
    """
    logits = jax.lax.stop_gradient(logits.astype(jnp.float32)) / objective.temperature
    rngs = jax.random.split(rng)
    sampled = sample_tokens(rngs[0], logits)
    gold = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    forced = sample_tokens(rngs[1], jnp.where(gold, -jnp.inf, logits))
    sampled = jnp.where(sampled_positions(targets, objective), sampled, targets)
    return Draws(sampled.astype(targets.dtype), forced.astype(targets.dtype))


def misjudged(
    targets: jax.Array, draws: Draws, verdicts: jax.Array, objective: Objective
) -> Misjudged:
    """Where the discriminator's `verdicts` (bool [B, T], true for "gold") put a wrong context.

    Among the sampled positions that have a next target in their row and whose sampled token is a
    word.
    """
    following = jnp.pad(targets[:, 1:], ((0, 0), (0, 1)), constant_values=objective.pad_id)
    eligible = (
        sampled_positions(targets, objective)
        & (following != objective.pad_id)
        & (draws.sampled <= objective.mask_id - 1)
    )
    same = draws.sampled == targets
    return Misjudged(eligible & ~same & verdicts, eligible & same & ~verdicts)


def noisy_context(previous: jax.Array, wrong: Misjudged, draws: Draws) -> jax.Array:
    """`previous` [B, T] with the sampled token after each accepted, the forced one after each
    rejected position."""
    noisy = jnp.where(wrong.accepted, draws.sampled, draws.forced)
    changed = jnp.pad((wrong.accepted | wrong.rejected)[:, :-1], ((0, 0), (1, 0)))
    shifted = jnp.pad(noisy[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(changed, shifted, previous)


def token_losses(logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Label-smoothed negative log-likelihood [B, T] of targets [B, T] under logits [B, T, V].

    (1 - e - e') nll + e' sum_v(-log p_v) with e' = e / (V - 1), as fairseq.
    """
    logits = logits.astype(jnp.float32)
    words = logits.shape[-1]
    # A masked sum, not a gather: its gradient fuses with the softmax's and scatters nothing.
    gold = jnp.arange(words, dtype=targets.dtype) == targets[..., None]
    log_total = jax.nn.logsumexp(logits, axis=-1)
    nll = log_total - jnp.where(gold, logits, 0).sum(-1)
    if not label_smoothing:
        return nll
    share = label_smoothing / (words - 1)
    everything = words * log_total - logits.sum(-1)
    return (1 - label_smoothing - share) * nll + share * everything


def three_passes(
    module: GanLM,
    params: Any,
    source: jax.Array,
    previous: jax.Array,
    targets: jax.Array,
    objective: Objective,
    *,
    update: Any = 0,
    rng: jax.Array | None = None,
    draws: Draws | None = None,
    train: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The whole objective on one batch.

    Args:
      params: of a `module` with generator and discriminator.
      source: `[B, S]` corrupted documents. previous, targets: `[B, T]`, shifted by one.
      update: number of the update, for the weights' schedules.
      rng: key of the draws and, with `train`, of dropout; needed unless `draws` are given.
      draws: use these in place of random ones.

    Returns: (loss, outputs). The loss is a sum in nats over the batch; `loss_per_token` gives
      it the gradient's scale. `outputs` has every
      logit, token and loss by name; `logged_*` are the configured weights times the extra losses,
      as the official log prints them, whatever the schedule says. Counts are float32. While a
      schedule's weight is 0 its loss is off, as in the original: that loss and its counts are 0.

    Raises ValueError for sentinels that do not lie within the module's dictionary and, outside
    `jit`, for a token that does not.
    """
    objective.check(module.vocab_size)
    if not isinstance(targets, jax.core.Tracer):
        check_ids(targets, module.vocab_size)
    drop_rng, draw_rng = (None, None) if rng is None else jax.random.split(rng)
    logits, verdicts, denoised, outputs = module.apply(
        {"params": params},
        source,
        previous,
        targets,
        objective,
        draws,
        draw_rng,
        train,
        method=_run_passes,
        rngs={"dropout": drop_rng} if train else None,
    )
    kept = targets != objective.pad_id
    masked = sampled_positions(targets, objective)
    same = outputs["draws"].sampled == targets
    tokens, words = kept.sum().astype(jnp.float32), masked.sum().astype(jnp.float32)

    def generator_loss(logits):
        losses = token_losses(logits, targets, objective.label_smoothing)
        return jnp.where(kept, losses, 0).sum()

    detection = token_losses(verdicts, same.astype(jnp.int32))
    detection = jnp.where(masked, detection, 0).sum() * tokens / jnp.maximum(words, 1)
    generation = generator_loss(logits)
    denoising = jnp.zeros(()) if denoised is None else generator_loss(denoised)
    weights = objective.discriminator(update), objective.denoising(update)
    detects, denoises = (w > 0 for w in weights)
    detection = jnp.where(detects, detection, 0)
    denoising = jnp.where(denoises, denoising, 0)
    loss = generation + weights[0] * detection + weights[1] * denoising

    # The counts give a tie to "gold", the context to "replaced": both as the original.
    gold = verdicts[..., 1] >= verdicts[..., 0]
    wrong = outputs["misjudged"]

    def count(positions, when):
        return jnp.where(when, positions.sum(), 0).astype(jnp.float32)

    outputs |= {
        "masked": masked,
        "detection_targets": same.astype(jnp.int32),
        "loss": loss,
        "generator_loss": generation,
        "discriminator_loss": detection,
        "denoising_loss": denoising,
        "logged_discriminator_loss": objective.discriminator.weight * detection,
        "logged_denoising_loss": objective.denoising.weight * denoising,
        "discriminator_weight": weights[0],
        "denoising_weight": weights[1],
        "tokens": tokens,
        "words": words,
        "true_positive": count(masked & same & gold, detects),
        "false_negative": count(masked & same & ~gold, detects),
        "true_negative": count(masked & ~same & ~gold, detects),
        "false_positive": count(masked & ~same & gold, detects),
        "accepted": count(wrong.accepted, denoises),
        "rejected": count(wrong.rejected, denoises),
    }
    outputs["misjudged_count"] = outputs["accepted"] + outputs["rejected"]
    return loss, outputs


def loss_per_token(loss: jax.Array, outputs: dict[str, jax.Array]) -> jax.Array:
    """A sum of losses over the number of targets: the scale of gradients; 0 without targets."""
    return loss / jnp.maximum(outputs["tokens"], 1)


def _run_passes(
    module: GanLM, source, previous, targets, objective: Objective, draws, rng, train
) -> tuple[jax.Array, jax.Array, jax.Array | None, dict[str, Any]]:
    memory = module.encode(source, train)
    logits = module.generate(previous, memory, source, train)
    if draws is None:
        draws = draw(rng, logits, targets, objective)
    detection = module.detect(draws.sampled, memory, source, train).astype(jnp.float32)
    # The first of two equal logits wins, as argmax has it.
    verdicts = jax.lax.stop_gradient(detection[..., 1] > detection[..., 0])
    wrong = misjudged(targets, draws, verdicts, objective)
    outputs: dict[str, Any] = {
        "memory": memory,
        "logits": logits,
        "detection_logits": detection,
        "draws": draws,
        "verdicts": verdicts,
        "misjudged": wrong,
    }
    denoised = None
    if objective.denoising.weight:
        noisy = noisy_context(previous, wrong, draws)
        denoised = module.generate(noisy, memory, source, train)
        outputs |= {"noisy_previous": noisy, "denoising_logits": denoised}
    return logits, detection, denoised, outputs


def summary(outputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Scalars to log: losses in bits a token, accuracies and rates of the discriminator.

    `detection_accuracy` is over all sampled positions, `majority` that of always giving the more
    frequent answer on this batch. Empty sets give 0.
    """

    def ratio(a, b):
        return a / jnp.maximum(b, 1)

    tp, fn = outputs["true_positive"], outputs["false_negative"]
    tn, fp = outputs["true_negative"], outputs["false_positive"]
    words, tokens = outputs["words"], outputs["tokens"]
    return {
        "generator_loss": ratio(outputs["generator_loss"], tokens) * BITS_PER_NAT,
        "discriminator_loss": ratio(outputs["discriminator_loss"], tokens) * BITS_PER_NAT,
        "denoising_loss": ratio(outputs["denoising_loss"], tokens) * BITS_PER_NAT,
        "detection_accuracy": ratio(tp + tn, words),
        "majority": ratio(jnp.maximum(tp + fn, tn + fp), words),
        "replace_acc": ratio(tn, tn + fp),
        "non_replace_acc": ratio(tp, tp + fn),
        "replace_rate": ratio(tn + fp, words),
        "accepted_rate": ratio(outputs["accepted"], words),
        "rejected_rate": ratio(outputs["rejected"], words),
        "tokens": tokens,
    }
