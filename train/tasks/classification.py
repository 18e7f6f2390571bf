"""Image classification: label-smoothed cross-entropy, top-1 and top-5."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.building import build_model, check_classes


@dataclasses.dataclass(frozen=True)
class Classification:
    """`model(image [B, H, W, 3]) -> logits [B, classes]`, trained with smoothed cross-entropy.

    The loss is `(1 - s) NLL + s mean_k(-log p_k)` with s = `label_smoothing`, averaged over rows.
    """

    model: nn.Module
    label_smoothing: float = 0.0

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Parameters and batch statistics for images of the batch's size."""
        variables = self.model.init(rng, batch["image"][:1], train=False)
        extra = {k: v for k, v in variables.items() if k != "params"}
        return variables["params"], extra

    def loss(self, params, extra, batch, rng):
        """Mean smoothed cross-entropy and the accuracy on the training batch."""
        logits, updated = self.model.apply(
            {"params": params, **extra},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": rng},
        )
        logits = logits.astype(jnp.float32)
        log_p = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_p, batch["label"][:, None], axis=-1)[:, 0]
        smooth = -log_p.mean(axis=-1)
        loss = ((1.0 - self.label_smoothing) * nll + self.label_smoothing * smooth).mean()
        accuracy = (logits.argmax(-1) == batch["label"]).mean()
        return loss, ({**extra, **updated}, {"accuracy": accuracy})

    def evaluate(self, variables, batch):
        """Sums of NLL, top-1 and top-5 hits over unpadded rows; of equal scores the first class's
        comes first, and scores that are no numbers hit nothing."""
        logits = self.model.apply(variables, batch["image"], train=False).astype(jnp.float32)
        mask, label = batch["mask"], batch["label"]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        # Rank of the true class: how many classes come before it. A network that scores all classes
        # alike, or none, must not look perfect.
        own = jnp.take_along_axis(logits, label[:, None], axis=-1)
        tied = (logits == own) & (jnp.arange(logits.shape[-1]) < label[:, None])
        rank = (~(logits <= own) | tied).sum(-1)
        return {
            "loss": (nll * mask).sum(),
            "accuracy": ((rank < 1) * mask).sum(),
            "top5": ((rank < 5) * mask).sum(),
            "count": mask.sum(),
        }

    def report(self, variables, sums, config):
        """The folded network's accuracy, where the model folds, beside the data's own baseline."""
        from train.data import pipeline

        numbers = {}
        fold = getattr(sys.modules[type(self.model).__module__], "fold", None)
        if fold is not None and getattr(self.model, "has_fusion", False):
            folded, folded_variables = fold(self.model, variables)
            hits = total = agree = 0.0
            size = config.eval.batch_size or config.batch_size
            split = config.eval.split or pipeline.eval_split(config.data)

            @jax.jit
            def both(variables, folded_variables, image):
                return (
                    self.model.apply(variables, image, train=False).argmax(-1),
                    folded.apply(folded_variables, image, train=False).argmax(-1),
                )

            for batch in pipeline.eval_batches(config.data, split, batch_size=size):
                a, b = jax.device_get(both(variables, folded_variables, batch["image"]))
                mask = batch["mask"] > 0
                hits += np.sum((b == batch["label"])[mask])
                agree += np.sum((a == b)[mask])
                total += mask.sum()
            numbers["folded_accuracy"] = float(hits / total)
            numbers["folded_agrees"] = float(agree / total)
        family, _ = pipeline.resolve(config.data)
        if hasattr(family, "baseline"):
            numbers["logistic_regression"] = family.baseline(config.data)
        return numbers

    def predict(self, variables, path, config):
        """Class probabilities of every image below `path`: rows (file, class, probability)."""
        from train.data.image_folder import images_below

        size = config.eval.batch_size or config.batch_size
        apply = jax.jit(
            lambda v, x: jax.nn.softmax(self.model.apply(v, x, train=False).astype(jnp.float32))
        )
        rows = [("file", "class", "probability")]
        for names, images in images_below(path, config.data, batch_size=size):
            p = np.asarray(apply(variables, images))[: len(names)]
            rows += [(n, int(q.argmax()), float(q.max())) for n, q in zip(names, p)]
        return rows


def from_config(config) -> Classification:
    """The task of a config: its model and `task_args`."""
    task = Classification(model=build_model(config), **config.task_args)
    check_classes(config, task.model)
    return task
