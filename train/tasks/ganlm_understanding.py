"""Fine-tuning GanLM to understand: the discriminator as a bidirectional classifier."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels.language.ganlm import GanLM
from train.building import build_model
from train.naming import ConfigError
from train.tasks.ganlm_pretraining import check_dictionary


@dataclasses.dataclass(frozen=True)
class GanlmUnderstanding:
    """Batches `source` [B, S], `label` [B] -> cross-entropy of the head on decoder position 0."""

    model: GanLM

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Parameters; there are no other collections."""
        return self.model.init(rng, batch["source"][:1], batch["source"][:1])["params"], {}

    def loss(self, params, extra, batch, rng):
        """Mean cross-entropy, and the accuracy on the training batch."""
        logits = self.model.apply(
            {"params": params},
            batch["source"],
            train=True,
            method="classify",
            rngs={"dropout": rng},
        ).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        accuracy = (logits.argmax(-1) == batch["label"]).mean()
        return losses.mean(), (extra, {"accuracy": accuracy})

    def evaluate(self, variables, batch):
        """Sums of cross-entropy, hits and labels of every class over unpadded rows."""
        logits = self.model.apply(variables, batch["source"], method="classify")
        logits, mask = logits.astype(jnp.float32), batch["mask"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        shares = {
            f"share_of_class_{c}": ((batch["label"] == c) * mask).sum()
            for c in range(self.model.num_classes)
        }
        return {
            "loss": (losses * mask).sum(),
            "accuracy": ((logits.argmax(-1) == batch["label"]) * mask).sum(),
            **shares,
            "count": mask.sum(),
        }

    def report(self, variables, sums, config):
        """The accuracy of always giving the most frequent label."""
        del variables, config
        shares = [v for k, v in sums.items() if k.startswith("share_of_class_")]
        return {"majority_accuracy": max(shares)}

    def predict(self, variables, path, config):
        """A label for every line `first<TAB>second` of a text file: rows (line, label, p).

        Lines are single sentences where the data are.
        """
        from train.data import pipeline, sentence_pairs
        from train.data.fairseq_files import lines_of
        from train.tasks.ganlm_generation import full_batches

        family, options = pipeline.resolve(config.data)
        words, names = family.tokenizer(options), family.classes(options)
        rows, pairs = [], family.are_pairs(options)
        for number, line in enumerate(lines_of(path), 1):
            first, tab, second = line.partition("\t")
            if bool(tab) != pairs:
                form = "two sentences with a tab between" if pairs else "one sentence and no tab"
                raise ValueError(f"{path}, line {number}: wanted {form}")
            encoded = words.encode(first), words.encode(second) if pairs else None
            rows.append(sentence_pairs.pair_row(*encoded, options["max_tokens"]))
        size = config.eval.batch_size or config.batch_size

        @jax.jit
        def classify(variables, source):
            logits = self.model.apply(variables, source, method="classify")
            return jax.nn.softmax(logits.astype(jnp.float32))

        written: list[tuple] = [("line", "label", "probability")]
        for start, source in full_batches(rows, size):
            p = np.asarray(classify(variables, source))
            for i in range(min(size, len(rows) - start)):
                written.append((start + i + 1, names[int(p[i].argmax())], float(p[i].max())))
        return written


def from_config(config) -> GanlmUnderstanding:
    """The task of a config: its model, which needs a classification head."""
    from train.data import pipeline

    model = build_model(config)
    check_dictionary(config, model)
    if not model.num_classes:
        raise ConfigError("config.model_args.num_classes: understanding needs at least 2 classes")
    labels = pipeline.resolve(config.data)[1].get("num_classes", model.num_classes)
    if labels != model.num_classes:
        raise ConfigError(
            f"config.model_args.num_classes: {model.num_classes} classes for the {labels} labels "
            "of config.data.options.num_classes"
        )
    return GanlmUnderstanding(model, **config.task_args)
