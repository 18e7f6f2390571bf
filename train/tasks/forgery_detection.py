"""Real or forged: cross-entropy on frames, AUC, EER, AP and log-loss on frames and videos.

Recipe after SCLBD/DeepfakeBench@8a4a7bf; `frequency` appends fixed residual filters to the input.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.security.forgery import forgery_metrics, video_scores, with_frequency_residuals
from jaxmodels.security.perturbations import cross_entropy
from train.building import build_model
from train.naming import ConfigError


@dataclasses.dataclass(frozen=True)
class ForgeryDetection:
    """`model(image [B, H, W, 3 or 6]) -> logits [B, 2]`, class 1 fake."""

    model: nn.Module
    frequency: bool = False

    def _input(self, images):
        return with_frequency_residuals(images) if self.frequency else images

    def init(self, rng, batch):
        """Parameters and batch statistics."""
        variables = dict(self.model.init(rng, self._input(batch["image"][:1])))
        return variables.pop("params"), variables

    def loss(self, params, extra, batch, rng):
        """Mean cross-entropy, and the accuracy on the training batch."""
        logits, updated = self.model.apply(
            {"params": params, **extra},
            self._input(batch["image"]),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": rng},
        )
        logits = logits.astype(jnp.float32)
        accuracy = (logits.argmax(-1) == batch["label"]).mean()
        loss = cross_entropy(logits, batch["label"]).mean()
        return loss, ({**extra, **updated}, {"accuracy": accuracy})

    def _probability(self):
        apply = lambda v, x: self.model.apply(v, self._input(x)).astype(jnp.float32)  # noqa: E731
        return jax.jit(lambda v, x: jax.nn.softmax(apply(v, x))[:, 1])

    def measure(self, variables, config, mesh) -> dict[str, float]:
        """Metrics of frames, and of videos as `video_*`."""
        from train.data import pipeline

        del mesh
        size = config.eval.batch_size or config.batch_size
        split = config.eval.split or pipeline.eval_split(config.data)
        probability, rows = self._probability(), []
        for batch in pipeline.eval_batches(config.data, split, batch_size=size):
            real = batch["mask"] > 0
            p = np.asarray(probability(variables, batch["image"]))[real]
            rows.append((p, batch["label"][real], batch["video"][real]))
        p, labels, videos = (np.concatenate(column) for column in zip(*rows))
        frames = forgery_metrics(p, labels)
        whole = forgery_metrics(*video_scores(p, videos, labels))
        return {**frames, **{f"video_{k}": v for k, v in whole.items()}}

    def predict(self, variables, path, config):
        """The probability that each image below `path` is fake: rows (file, fake)."""
        from train.data.image_folder import images_below

        size = config.eval.batch_size or config.batch_size
        probability = self._probability()
        rows = [("file", "fake")]
        for names, images in images_below(path, config.data, batch_size=size):
            found = np.asarray(probability(variables, images))[: len(names)]
            rows += [(name, float(p)) for name, p in zip(names, found)]
        return rows


def from_config(config) -> ForgeryDetection:
    """The task of a config: its model and `task_args`."""
    task = ForgeryDetection(model=build_model(config), **config.task_args)
    if task.frequency:
        # Each network's own name for the channels that it reads.
        name = next((n for n in ("inc", "in_chans") if hasattr(task.model, n)), None)
        if name is None:
            raise ConfigError(
                f"config.task_args.frequency: {config.model} reads pixels only; wanted is "
                "vision.xception or vision.efficientnet"
            )
        task = dataclasses.replace(task, model=task.model.clone(**{name: 6}))
    return task
