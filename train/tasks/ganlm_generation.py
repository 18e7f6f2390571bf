"""Fine-tuning GanLM to generate: strategies "generator", "discriminator" and "both"."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.language import ganlm_generation, rouge
from jaxmodels.language.bleu import bleu
from jaxmodels.language.decoding import check_beams
from jaxmodels.language.ganlm import GanLM
from jaxmodels.language.ganlm_objective import (
    BITS_PER_NAT,
    Objective,
    loss_per_token,
    summary,
    three_passes,
    token_losses,
)
from jaxmodels.language.span_corruption import SENTINELS
from train.building import build_model
from train.naming import ConfigError, nearest
from train.tasks.ganlm_pretraining import check_dictionary, objective_of

SEARCH = {
    "beam_size": 5,
    "len_penalty": 1.0,
    "max_len_a": 0.0,
    "max_len_b": 200,
    "min_len": 1,
    "no_repeat_ngram_size": 0,
}


@dataclasses.dataclass(frozen=True)
class GanlmGeneration:
    """Batches `source` [B, S], `previous` and `targets` [B, T] -> smoothed cross-entropy a target.

    A model with generator and discriminator (strategy "both") trains all three passes; inference is
    the generator's. `search` are the arguments of beam search, `decoded` how many held-out examples
    `report` decodes.
    """

    model: GanLM
    objective: Objective
    search: tuple[tuple[str, Any], ...]
    decoded: int

    uses_step = True
    weighted_by = "tokens"

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Parameters; there are no other collections."""
        return self.model.init(rng, batch["source"][:1], batch["previous"][:1])["params"], {}

    def loss(self, params, extra, batch, rng, step):
        """The loss a target in nats; the likelihood in bits to log."""
        arrays = batch["source"], batch["previous"], batch["targets"]
        if self.model.detects:
            total, outputs = three_passes(
                self.model, params, *arrays, self.objective, update=step, rng=rng, train=True
            )
            metrics = summary(outputs)
            return loss_per_token(total, outputs), (extra, metrics)
        logits = self.model.apply(
            {"params": params}, *arrays[:2], train=True, rngs={"dropout": rng}
        )
        kept = batch["targets"] != self.objective.pad_id
        losses = token_losses(logits, batch["targets"], self.objective.label_smoothing)
        tokens = kept.sum().astype(jnp.float32)
        loss = jnp.where(kept, losses, 0).sum() / jnp.maximum(tokens, 1)
        return loss, (extra, {"tokens": tokens})

    def evaluate(self, variables, batch):
        """Sums over targets of the likelihood in bits, and of right next tokens."""
        logits = self.model.apply(variables, batch["source"], batch["previous"])
        kept = (batch["targets"] != self.objective.pad_id) & (batch["mask"][:, None] > 0)
        bits = token_losses(logits, batch["targets"]) * BITS_PER_NAT
        right = logits.argmax(-1) == batch["targets"]
        return {
            "loss": jnp.where(kept, bits, 0).sum(),
            "next_token_accuracy": (kept & right).sum(),
            "count": kept.sum(),
        }

    def report(self, variables, sums, config):
        """BLEU, ROUGE and exact matches of beam search and of greedy decoding on held-out pairs.

        Against whole targets, of which training and the likelihoods see `max_target` tokens.
        """
        from train.data import pipeline

        family, options = pipeline.resolve(config.data)
        dictionary = family.dictionary(options)
        split = config.eval.split or pipeline.eval_split(config.data)
        size = config.eval.batch_size or config.batch_size
        examples, transform = family.source(split, options), family.eval_transform(options)
        wanted: list[str] = []
        found: dict[str, list[str]] = {"": [], "greedy_": []}
        for batch in pipeline.eval_batches(config.data, split, batch_size=size):
            rows = int(min(batch["mask"].sum(), self.decoded - len(wanted)))
            if rows <= 0:
                break
            asked = range(len(wanted), len(wanted) + rows)
            wanted += _texts(dictionary, [transform.texts(examples[i])[1] for i in asked])
            for name, greedy in (("", False), ("greedy_", True)):
                best = self._decode(greedy)(variables, batch["source"])
                found[name] += _texts(dictionary, np.asarray(best.tokens[:rows, 0]))
        numbers = {}
        for name, texts in found.items():
            scores = rouge.rouge(texts, wanted)
            scores["bleu"] = bleu(texts, wanted)
            scores["exact_match"] = float(np.mean([t == w for t, w in zip(texts, wanted)]))
            numbers |= {name + key: value for key, value in scores.items()}
        return numbers

    def _decode(self, greedy: bool = False):
        return _decoder(self.model, self.search, greedy)

    def predict(self, variables, path, config):
        """Beam search for every line of a text file: rows (line, text, score)."""
        from train.data import fairseq_pairs, pipeline
        from train.data.fairseq_files import lines_of

        family, options = pipeline.resolve(config.data)
        words = family.tokenizer(options)
        lines = list(lines_of(path))
        rows = [fairseq_pairs.source_row(words.encode(t), options["max_source"],
                                         options["left_pad_source"]) for t in lines]  # fmt: skip
        written: list[tuple] = [("line", "text", "score")]
        size = config.eval.batch_size or config.batch_size
        for start, source in full_batches(rows, size):
            found = self._decode()(variables, source)
            texts = [words.decode(t) for t in np.asarray(found.tokens[:, 0])]
            for i in range(min(size, len(rows) - start)):
                written.append((start + i + 1, texts[i], float(found.scores[i, 0])))
        return written


@functools.lru_cache(maxsize=8)
def _decoder(model: GanLM, search: tuple[tuple[str, Any], ...], greedy: bool):
    arguments = dict(search)
    if greedy:
        arguments["beam_size"] = 1
    return jax.jit(
        lambda variables, source: ganlm_generation.generate(
            model, variables, source, returned=1, **arguments
        )
    )


def full_batches(rows: list[np.ndarray], size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Full batches [size, S]; the last is filled with copies of its last row."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield start, np.stack(part + [part[-1]] * (size - len(part)))


def _texts(dictionary, tokens) -> list[str]:
    return ["".join(dictionary.decode(np.asarray(row))).replace("▁", " ").strip() for row in tokens]


def search_of(given: Mapping[str, Any], vocab_size: int) -> tuple[tuple[str, Any], ...]:
    """Arguments of beam search over fairseq's defaults.

    Raises ConfigError for an unknown one and for beams that cannot be, which would show only after
    the training.
    """
    for name in given:
        if name not in SEARCH:
            raise ConfigError(f"config.task_args.search: no {name!r}; {nearest(name, SEARCH)}")
    search = {**SEARCH, **given}
    try:
        check_beams(search["beam_size"], 1, vocab_size)
    except ValueError as error:
        raise ConfigError(f"config.task_args.search.beam_size: {error}") from None
    return tuple(search.items())


def from_config(config) -> GanlmGeneration:
    """The task of a config: its model, `search`, `decoded` and the objective's `task_args`."""
    model = build_model(config)
    check_dictionary(config, model)
    arguments = dict(config.task_args)
    search = search_of(dict(arguments.pop("search", {})), model.vocab_size)
    decoded = arguments.pop("decoded", 200)
    if model.initialization_strategy == "pretraining":
        raise ConfigError(
            "config.model_args.initialization_strategy: generation is fine-tuned with 'generator', "
            "'discriminator' or 'both'"
        )
    if model.detects and "mask_id" not in arguments:
        raise ConfigError(
            "config.task_args.mask_id: strategy 'both' needs the index of <mask> in the dictionary"
        )
    # The other strategies sample nothing: every id may be a word.
    arguments.setdefault("mask_id", model.vocab_size - SENTINELS - 1)
    objective = objective_of(vocab_size=model.vocab_size, **arguments)
    return GanlmGeneration(model, objective, search, decoded)
