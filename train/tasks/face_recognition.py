"""Embedding faces: angular-margin classification of the training identities, verification of new.

J. Deng et al., arXiv 1801.07698; X. An et al., "Partial FC", arXiv 2203.15565 (`sample_rate`).
Recipe after deepinsight/insightface@7fadd42, `recognition/arcface_torch`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmodels.security import margin_losses
from jaxmodels.security.face_track import verification
from train.building import build_model
from train.naming import ConfigError

MARGINS = {
    "arcface": (1.0, 0.5, 0.0),
    "cosface": (1.0, 0.0, 0.4),
    "normalized_softmax": (1.0, 0.0, 0.0),
}
HEAD = "margin_head"


@dataclasses.dataclass(frozen=True)
class FaceRecognition:
    """`model(image [B, H, W, 3]) -> embeddings [B, D]`.

    Attributes:
      classes: training identities.
      margin: `arcface`, `cosface`, `normalized_softmax`, `softmax` (plain linear logits, the
        baseline) or three numbers (m1, m2, m3), as text too: "(1,0.3,0)".
      scale: s. gradient: `straight_through` (official) or `exact`.
      filter_above: threshold of inter-class filtering, 0 for none.
      sample_rate: share of the class centers in each step's softmax (Partial FC): all of the
        batch's own and random others.
      pairs: how many evaluation pairs.
    """

    model: nn.Module
    classes: int
    margin: Any = "arcface"
    scale: float = 64.0
    gradient: str = "straight_through"
    filter_above: float = 0.0
    sample_rate: float = 1.0
    pairs: int = 2000

    def __post_init__(self):
        if self.margin != "softmax":
            margins_of(self.margin)
        if not 0 < self.sample_rate <= 1:
            raise ConfigError("config.task_args.sample_rate: must lie in (0, 1]")

    def init(self, rng, batch):
        """Parameters of the network and the class centers `margin_head/weight` [C, D]."""
        network, head = jax.random.split(rng)
        embeddings, variables = self.model.init_with_output(network, batch["image"][:1])
        shape = (self.classes, embeddings.shape[-1])
        weight = 0.01 * jax.random.normal(head, shape, jnp.float32)
        extra = {k: v for k, v in variables.items() if k != "params"}
        return {**variables["params"], HEAD: {"weight": weight}}, extra

    def loss(self, params, extra, batch, rng):
        """Cross-entropy of the margin logits, and the accuracy on the training batch."""
        dropout, sample = jax.random.split(rng)
        embeddings, updated = self.model.apply(
            {"params": _network(params), **extra},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout},
        )
        embeddings = embeddings.astype(jnp.float32)
        weight, labels = params[HEAD]["weight"], batch["label"]
        if self.sample_rate < 1:
            weight, labels = sample_centers(sample, weight, labels, self.sample_rate)
        if self.margin == "softmax":
            cosines = logits = embeddings @ weight.T
        else:
            cosines = margin_losses.cosine_logits(embeddings, weight)
            logits = margin_losses.margin_logits(
                cosines,
                labels,
                scale=self.scale,
                margins=margins_of(self.margin),
                filter_above=self.filter_above,
                gradient=self.gradient,
            )
        loss = margin_losses.margin_cross_entropy(logits, labels)
        accuracy = (cosines.argmax(-1) == labels).mean()
        return loss, ({**extra, **updated}, {"accuracy": accuracy})

    def _embedder(self, variables):
        """Images [B, H, W, 3] -> unit embeddings float32 [B, D], compiled."""
        variables = {**variables, "params": _network(variables["params"])}
        embed = jax.jit(lambda v, x: margin_losses.unit(self.model.apply(v, x).astype(jnp.float32)))
        return functools.partial(embed, variables)

    def embeddings(self, variables, config) -> tuple[np.ndarray, np.ndarray]:
        """Unit embeddings [N, D] and labels [N] of the evaluation split."""
        from train.data import pipeline

        size = config.eval.batch_size or config.batch_size
        split = config.eval.split or pipeline.eval_split(config.data)
        embed = self._embedder(variables)
        features, labels = [], []
        for batch in pipeline.eval_batches(config.data, split, batch_size=size):
            rows = batch["mask"] > 0
            features.append(np.asarray(embed(batch["image"]))[rows])
            labels.append(batch["label"][rows])
        return np.concatenate(features), np.concatenate(labels)

    def measure(self, variables, config, mesh) -> dict[str, float]:
        """Verification accuracy by ten folds over pairs of the split, and the best threshold."""
        from train.data import pipeline

        del mesh
        features, labels = self.embeddings(variables, config)
        family, _ = pipeline.resolve(config.data)
        rows, same = family.pairs(labels, self.pairs)
        cosines = (features[rows[:, 0]] * features[rows[:, 1]]).sum(-1)
        found = verification(cosines, same)
        return {
            "verification_accuracy": found.accuracy,
            "threshold": found.threshold,
            "pairs": float(len(rows)),
        }

    def predict(self, variables, path, config):
        """The unit embedding of every image below `path`: rows (file, e0, e1, ...)."""
        from train.data.image_folder import images_below

        size = config.eval.batch_size or config.batch_size
        embed = self._embedder(variables)
        rows = []
        for names, images in images_below(path, config.data, batch_size=size):
            found = np.asarray(embed(images))[: len(names)]
            rows += [(name, *map(float, e)) for name, e in zip(names, found)]
        return [("file", *(f"e{i}" for i in range(len(rows[0]) - 1))), *rows]


def margins_of(margin: Any) -> tuple[float, float, float]:
    """(m1, m2, m3) of a name, of three numbers, or of the text of three numbers.

    The command line keeps text where a config's default is one.
    """
    found = MARGINS.get(margin, margin) if isinstance(margin, str) else margin
    try:
        if isinstance(found, str):
            found = ast.literal_eval(found)
        found = tuple(map(float, found))
    except (ValueError, SyntaxError, TypeError):
        known = ", ".join((*MARGINS, "softmax"))
        raise ConfigError(
            f"config.task_args.margin: {margin!r}; known: {known}, or three numbers, as (1,0.3,0)"
        ) from None
    try:
        margin_losses.check_margins(found)
    except ValueError as error:
        raise ConfigError(f"config.task_args.margin: {error}") from None
    return found


def _network(params):
    return {k: v for k, v in params.items() if k != HEAD}


def sample_centers(
    key: jax.Array, weight: jax.Array, labels: jax.Array, rate: float
) -> tuple[jax.Array, jax.Array]:
    """(centers [S, D], labels among them [B]): the batch's classes and random others, S = rate C.

    S is at least the batch's size, so that no class of the batch is left out.
    """
    classes = weight.shape[0]
    kept = min(classes, max(int(rate * classes), labels.shape[0]))
    priority = jax.random.uniform(key, (classes,)).at[labels].set(2.0)
    chosen = lax.top_k(priority, kept)[1]
    places = jnp.zeros(classes, labels.dtype).at[chosen].set(jnp.arange(kept, dtype=labels.dtype))
    return weight[chosen], places[labels]


def from_config(config) -> FaceRecognition:
    """The task of a config: its model and `task_args`; `classes` 0 takes the data's own count."""
    from train.data import pipeline

    args = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(config.task_args).items()}
    family, options = pipeline.resolve(config.data)
    if not args.get("classes"):
        args["classes"] = family.num_classes(options)
    elif options.get("set") == "folders" and options["path"]:
        count = family.num_classes(options)
        if args["classes"] < count:
            raise ConfigError(
                f"config.task_args.classes: {args['classes']}, the data have {count} identities"
            )
    return FaceRecognition(model=build_model(config), **args)
