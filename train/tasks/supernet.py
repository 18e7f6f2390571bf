"""Training ScaleNet's super-supernet: a new sub-network every step, in one compiled step.

Facts of luminolx/ScaleNet@22487c8 (core/agent/nas_agent.py, core/searcher/uniform_searcher.py).
The images come at the largest resolution and are shrunk to the drawn one inside the step; the
official loader crops anew for every resolution.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.search import scalenet, scalenet_sampling, soft_labels
from train.building import build_model, check_classes
from train.naming import ConfigError
from train.search import answers


@dataclasses.dataclass(frozen=True)
class Supernet:
    """A `SuperSupernet` trained by sampled sub-networks.

    Attributes:
      law: hierarchical (HSS) or uniform sampling.
      synchronous: each step runs its sub-network on both sides, half the loss each; else the
        layers' call counters decide, and drift apart.
      arithmetic: of widths, see `scalenet.make_subnet`. loss_type: s-softmax or softmax.
    """

    model: nn.Module
    law: str = "hierarchical"
    synchronous: bool = False
    arithmetic: str = "float64"
    loss_type: str = "s-softmax"
    # Attributes that a trained supernet's scores do not depend on.
    training_only = ("law", "synchronous", "loss_type")

    @property
    def tables(self) -> scalenet_sampling.Tables:
        """What the numbers of a draw mean."""
        return scalenet_sampling.tables(self.model.space, self.arithmetic)

    @property
    def canvas(self) -> int:
        """Pixels of the largest resolution, in whose corner every image lies."""
        return int(self.tables.sizes.max())

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Parameters, batch statistics and the call counters."""
        image = jnp.zeros((1, self.canvas, self.canvas, batch["image"].shape[-1]))
        variables = self.model.init(rng, image)
        counters = {"calls": self.model.counters()}
        return variables["params"], {
            "batch_stats": variables["batch_stats"],
            "counters": counters,
        }

    def loss(self, params, extra, batch, rng):
        """Loss of one sampled sub-network, and the statistics and counters after it."""
        space, t = self.model.space, self.tables
        draw = scalenet_sampling.sample(space, rng, self.law)
        subnet = scalenet_sampling.subnet_of(t, draw.ops, draw.width)
        size = jnp.asarray(t.sizes)[draw.resolution]
        images = scalenet_sampling.resized(batch["image"], size, self.canvas)
        statistics, calls = extra["batch_stats"], extra["counters"]["calls"]
        losses, hits = [], []
        for _ in range(2 if self.synchronous else 1):
            right, calls = scalenet.advance(calls, subnet, self.model.n_laterally_coupling)
            logits, updated = self.model.apply(
                {"params": params, "batch_stats": statistics},
                images,
                subnet,
                right,
                True,
                (size, size),
                mutable=["batch_stats"],
            )
            statistics = updated["batch_stats"]
            logits = logits.astype(jnp.float32)
            losses.append(soft_labels.classification_loss(logits, batch["label"], self.loss_type))
            hits.append((logits.argmax(-1) == batch["label"]).mean())
        extra = {"batch_stats": statistics, "counters": {"calls": calls}}
        metrics = {"accuracy": sum(hits) / len(hits), "stage": draw.stage.astype(jnp.float32)}
        return sum(losses) / len(losses), (extra, metrics)

    def logits(self, variables, images, ops, width, resolution) -> jax.Array:
        """Left and right logits added, batch statistics, BN reset: what the search scores.

        `ops` [L], numbers of the width and of the resolution; all may be traced.
        """
        t = self.tables
        subnet = scalenet_sampling.subnet_of(t, ops, width)
        size = jnp.asarray(t.sizes)[resolution]
        images = scalenet_sampling.resized(images, size, self.canvas)
        sides = jnp.asarray([False, True] if self.model.n_laterally_coupling == 2 else [False])

        def one(total, right):
            y = self.model.apply(
                {"params": variables["params"], "batch_stats": variables["batch_stats"]},
                *(images, subnet, right, True, (size, size)),
                mutable=["batch_stats"],
            )[0]
            return total + y.astype(jnp.float32), None

        shape = (images.shape[0], self.model.space.linear[-1][2])
        return jax.lax.scan(one, jnp.zeros(shape), sides)[0]

    def probes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A base model of half depth under each stage's middle scaling: ops, widths, sizes."""
        space, t = self.model.space, self.tables
        base = np.zeros(space.genes, np.int64)
        low, high = space.base_bounds()
        for first, depth, full in space.stage_slices():
            if full > 1:
                base[first : first + (depth + 1) // 2] = 1
        base = np.clip(base, low, high)
        rows = []
        for s in range(space.max_scaling_stage + 1):
            triples = space.scalings(s)
            ops, width, resolution = space.scaled(base, s, triples[len(triples) // 2])
            rows.append(scalenet_sampling.encode(t, ops[: len(space.blocks)], width, resolution))
        return tuple(np.array(column) for column in zip(*rows))

    def hits(self, variables, images, label, mask, ops, width, resolution) -> jax.Array:
        """Rows that are right by `logits`; rows whose mask [B] is 0 have no part in statistics."""
        # Statistics know no mask: real rows, repeated, take the place of those that fill up.
        real = jnp.argsort(mask == 0, stable=True)
        count = mask.sum().astype(jnp.int32)
        places = jnp.arange(len(mask))
        rows = real[places % jnp.maximum(count, 1)]
        logits = self.logits(variables, images[rows], ops, width, resolution)
        return ((logits.argmax(-1) == label[rows]) & (places < count)).sum()

    def evaluate(self, variables, batch):
        """Hits of one sub-network of each scaling stage; give batches without padding rows.

        (`hits` would bring the rows of all devices together, and compute them on each.)
        """
        mask = batch["mask"]

        def one(probe):
            logits = self.logits(variables, batch["image"], *probe)
            return ((logits.argmax(-1) == batch["label"]) * mask).sum()

        hits = jax.lax.map(one, tuple(jnp.asarray(p) for p in self.probes()))
        sums = {f"accuracy_stage{s}": hits[s] for s in range(len(hits))}
        return {"accuracy": hits.mean(), **sums, "count": mask.sum()}

    def report(self, variables, sums, config):
        """The data's own baseline beside the sub-networks' accuracies."""
        return answers.baseline_numbers(config)

    def predict(self, variables, path, config):
        """Classes of images by the largest probe network: rows (file, class, probability)."""
        ops, width, resolution = (p[-1] for p in self.probes())

        def logits(variables, images):
            return self.running_logits(variables, images, ops, width, resolution)

        return answers.class_rows(logits, variables, path, config)

    def running_logits(self, variables, images, ops, width, resolution) -> jax.Array:
        """Left logits with running statistics: what one image's answer may depend on."""
        t = self.tables
        size = jnp.asarray(t.sizes)[resolution]
        images = scalenet_sampling.resized(images, size, self.canvas)
        subnet = scalenet_sampling.subnet_of(t, ops, width)
        variables = {k: variables[k] for k in ("params", "batch_stats")}
        return self.model.apply(variables, images, subnet, False, False, (size, size))


def from_config(config) -> Supernet:
    """The task of a config: its model and `task_args`."""
    if config.parallel.mode == "pmap":
        raise ConfigError(
            "config.parallel.mode: pmap would draw another sub-network on every device; use jit"
        )
    task = Supernet(model=build_model(config), **config.task_args)
    if not isinstance(task.model, scalenet.SuperSupernet):
        raise ConfigError(f"config.model {config.model}: the task supernet trains search.scalenet")
    check_classes(config, task.model)
    if task.law not in scalenet_sampling.LAWS:
        known = ", ".join(scalenet_sampling.LAWS)
        raise ConfigError(f"config.task_args.law: {task.law!r}; known: {known}")
    return task
