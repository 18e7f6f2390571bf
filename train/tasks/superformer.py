"""Training ViTAS's superformer: a new genome every step, in one compiled step.

Facts of xiusu/ViTAS@066bb20 (tools/trainer/imagenet/trainer.py). Unlike there (quirk Q5), the
chosen patch embedding is trained whatever its index.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.search import soft_labels, twins_superformer, vitas
from train.building import build_model, check_classes
from train.data import image_mixing
from train.naming import ConfigError
from train.search import answers

# What each way of sharing token channels runs: left 0, right 1, cyclic 2.
SHARING = {"two_sided": (0, 1), "one_sided": (0,), "cyclic": (2,)}


@dataclasses.dataclass(frozen=True)
class Superformer:
    """A `vitas.Superformer` or `TwinsSuperformer` trained by sampled genomes.

    Attributes:
      sharing: two_sided (left and right logits added), one_sided (ordinal slices) or cyclic.
      probability: of the identity. shift: whether draws are brought into canonical form.
      smoothing: of labels. mixup, cutmix: alphas of batch mixing, 0 for none.
      flops_min, budget: where positive, the identity probability is searched for draws whose mean
        FLOPs lie in this band, from `probability` on being ignored.
    """

    model: nn.Module
    sharing: str = "cyclic"
    probability: float = 0.5
    shift: bool = True
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    flops_min: float = 0.0
    budget: float = 0.0
    # Attributes that a trained superformer's scores and the search's draws do not depend on.
    training_only = ("smoothing", "mixup", "cutmix")

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Parameters; there are no other collections."""
        image = batch["image"][:1]
        return self.model.init(rng, image)["params"], {}

    def logits(self, variables, images, genome) -> list[jax.Array]:
        """Logits of every side of a genome [genes], which may be traced."""
        params = {"params": variables["params"]}
        chosen = [self.model.choices(genome, side) for side in SHARING[self.sharing]]
        return [self.model.apply(params, images, c).astype(jnp.float32) for c in chosen]

    def loss(self, params, extra, batch, rng):
        """Soft cross-entropy of the sides' added logits for one sampled genome."""
        draw, mixing = jax.random.split(rng)
        genome = self.model.space.sample(draw, self.probability, self.shift)
        images, label = batch["image"], batch["label"]
        if self.mixup or self.cutmix:
            images, targets = image_mixing.mix(
                *(mixing, images, label, self.model.classes),
                mixup_alpha=self.mixup,
                cutmix_alpha=self.cutmix,
                smoothing=self.smoothing,
            )
        else:
            targets = soft_labels.smoothed_targets(label, self.model.classes, self.smoothing)
        logits = sum(self.logits({"params": params}, images, genome))
        accuracy = (logits.argmax(-1) == label).mean()
        return soft_labels.soft_cross_entropy(logits, targets), (extra, {"accuracy": accuracy})

    def probes(self) -> np.ndarray:
        """Three genomes, a third, two thirds and all of width and depth, int64 [3, genes]."""
        return np.array([self.model.space.example(share) for share in (1 / 3, 2 / 3, 1.0)])

    def hits(self, variables, images, label, mask, genome) -> jax.Array:
        """Rows that are right, averaged over the sides."""
        sides = self.logits(variables, images, genome)
        return sum(((y.argmax(-1) == label) * mask).sum() for y in sides) / len(sides)

    def evaluate(self, variables, batch):
        """Hits of the probe genomes."""
        mask = batch["mask"]

        def one(genome):
            return self.hits(variables, batch["image"], batch["label"], mask, genome)

        hits = jax.lax.map(one, jnp.asarray(self.probes()))
        names = ("small", "middle", "large")
        sums = {f"accuracy_{name}": hits[i] for i, name in enumerate(names)}
        return {"accuracy": hits.mean(), **sums, "count": mask.sum()}

    def report(self, variables, sums, config):
        """The data's own baseline beside the genomes' accuracies."""
        return answers.baseline_numbers(config)

    def predict(self, variables, path, config):
        """Classes of images by the largest probe: rows (file, class, probability)."""
        genome = self.probes()[-1]

        def logits(variables, images):
            return sum(self.logits(variables, images, genome))

        return answers.class_rows(logits, variables, path, config)


def from_config(config) -> Superformer:
    """The task of a config: its model and `task_args`."""
    if config.parallel.mode == "pmap":
        raise ConfigError(
            "config.parallel.mode: pmap would draw another sub-network on every device; use jit"
        )
    task = Superformer(model=build_model(config), **config.task_args)
    if not isinstance(task.model, vitas.Superformer | twins_superformer.TwinsSuperformer):
        raise ConfigError(
            f"config.model {config.model}: the task superformer trains search.vitas or "
            "search.twins_superformer"
        )
    check_classes(config, task.model)
    if task.sharing not in SHARING:
        raise ConfigError(
            f"config.task_args.sharing: {task.sharing!r}; known: {', '.join(SHARING)}"
        )
    if task.budget > 0:
        probability, _ = task.model.space.identity_probability(task.flops_min, task.budget)
        task = dataclasses.replace(task, probability=probability)
    return task
