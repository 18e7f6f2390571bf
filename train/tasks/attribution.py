"""Which tool forged an image, tools never seen labeled among them: three stages of training.

Z. Sun et al., arXiv 2309.11132 (Contrastive Pseudo Learning). Stage 1 is supervised, on labeled
images alone; stage 2 is CPL on labeled and unlabeled images; stage 3 (this project's resolution of
"multi-stage") repeats rounds in which a frozen copy of the network labels what it is confident
about, at most so many of a class, and these count as labeled.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.security import attribution
from train.building import build_model
from train.naming import ConfigError


@dataclasses.dataclass(frozen=True)
class Attribution:
    """`model(image) -> {"logits", "feature", "parts"}`, `jaxmodels.security.attribution`.

    Attributes:
      known: labeled classes; their ids come first.
      supervised_steps: of stage 1. rounds: steps at which a round of stage 3 begins.
      margin, etas: of CPL. confidence: from which a pseudo label counts. cap: of pseudo labels a
        class in a batch, as a share of the batch over the number of classes.
    """

    model: nn.Module
    known: int
    supervised_steps: int = 0
    rounds: tuple[int, ...] = ()
    margin: float = attribution.MARGIN
    etas: tuple[float, float, float] = (0.5, 0.5, 1.0)
    confidence: float = 0.95
    cap: float = 2.0
    uses_step = True

    def init(self, rng, batch):
        """Parameters, batch statistics, and room for the copies of stage 3 and of stage 1."""
        variables = dict(self.model.init(rng, batch["image"][:1]))
        params = variables.pop("params")
        copy = {"params": params, **variables}
        extra = {**variables, "supervised": copy}
        if self.rounds:
            extra["teacher"] = copy
        return params, extra

    def loss(self, params, extra, batch, rng, step):
        """Cross-entropy in stage 1, CPL's total in stage 2, with pseudo labels in stage 3."""
        dropout, partner, noise = jax.random.split(rng, 3)
        labels = batch["label"]
        labeled = labels.shape[0]
        images = jnp.concatenate([batch["image"], batch["unlabeled"]])
        statistics = {"batch_stats": extra["batch_stats"]}
        out, updated = self.model.apply(
            {"params": params, **statistics},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout},
        )
        logits = out["logits"].astype(jnp.float32)
        feature, parts = (out[k].astype(jnp.float32) for k in ("feature", "parts"))
        pairs = attribution.same_class_pairs(partner, labels)
        voting = attribution.vote(feature, parts, pairs)
        gumbel = jax.random.gumbel(noise, logits[labeled:].shape)
        losses = attribution.cpl_losses(
            logits, labels, voting, gumbel, margin=self.margin, etas=self.etas
        )
        supervised = step < self.supervised_steps
        total = jnp.where(supervised, losses.ce, losses.total)

        copies = {"params": params, **statistics}
        keep = lambda at, old: jax.tree.map(  # noqa: E731
            lambda new, before: jnp.where(at, new, before), jax.lax.stop_gradient(copies), old
        )
        extra = {**extra, "supervised": keep(step <= self.supervised_steps, extra["supervised"])}
        metrics = {"ce": losses.ce, "glv": losses.glv, "csp": losses.csp}
        metrics |= {"entropy": losses.entropy, "accepted": voting.mask.mean()}
        if self.rounds:
            begins = jnp.isin(step, jnp.asarray(self.rounds))
            extra["teacher"] = keep(begins, extra["teacher"])
            taught = self.model.apply(extra["teacher"], batch["unlabeled"])["logits"]
            pseudo, weight = pseudo_labels(taught, self.confidence, self._cap(labeled))
            nll = -jnp.take_along_axis(
                jax.nn.log_softmax(logits[labeled:]), pseudo[:, None], axis=-1
            )[:, 0]
            self_training = (nll * weight).sum() / jnp.maximum(weight.sum(), 1)
            active = step >= self.rounds[0]
            total = total + jnp.where(active, self_training, 0.0)
            metrics["pseudo_labels"] = jnp.where(active, weight.sum(), 0.0)
        correct = (logits[:labeled].argmax(-1) == labels).mean()
        return total, ({**extra, **updated}, {**metrics, "known_accuracy": correct})

    def _cap(self, rows: int) -> int:
        return max(1, int(self.cap * rows / self.model.classes))

    def features(self, variables, config, copy: str = ""):
        """Cluster ids, features and true labels of the evaluation split, [N], [N, C], [N]."""
        from train.data import pipeline

        size = config.eval.batch_size or config.batch_size
        split = config.eval.split or pipeline.eval_split(config.data)
        chosen = variables[copy] if copy else variables
        chosen = {"params": chosen["params"], "batch_stats": chosen["batch_stats"]}

        @jax.jit
        def look(variables, images):
            out = self.model.apply(variables, images)
            return jax.nn.softmax(out["logits"].astype(jnp.float32)), out["feature"]

        rows = []
        for batch in pipeline.eval_batches(config.data, split, batch_size=size):
            real = batch["mask"] > 0
            probs, feature = jax.device_get(look(chosen, batch["image"]))
            rows.append((probs[real], feature[real], batch["label"][real]))
        return tuple(np.concatenate(column) for column in zip(*rows))

    def measure(self, variables, config, mesh) -> dict[str, float]:
        """ACC, NMI and ARI of all, known and novel rows, and the pairwise same-tool AUROC."""
        del mesh
        probs, feature, labels = self.features(variables, config)
        numbers = attribution.open_world_metrics(probs.argmax(-1), labels, self.known)
        return {**numbers, "same_tool_auc": attribution.same_tool_auc(feature, labels)}

    def report(self, variables, sums, config):
        """The baseline: k-means on the features of the network as stage 1 left it."""
        del sums
        _, feature, labels = self.features(variables, config, "supervised")
        clusters = kmeans(feature, self.model.classes, config.seed)
        numbers = attribution.open_world_metrics(clusters, labels, self.known)
        return {
            "kmeans_novel_nmi": numbers["novel_nmi"],
            "kmeans_all_nmi": numbers["all_nmi"],
            "kmeans_novel_acc": numbers["novel_acc"],
        }

    def predict(self, variables, path, config):
        """The cluster of every image below `path`: rows (file, cluster, probability)."""
        from train.data.image_folder import images_below

        size = config.eval.batch_size or config.batch_size
        chosen = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
        look = jax.jit(lambda v, x: jax.nn.softmax(self.model.apply(v, x)["logits"]))
        rows = [("file", "cluster", "probability")]
        for names, images in images_below(path, config.data, batch_size=size):
            probs = np.asarray(look(chosen, images))[: len(names)]
            rows += [(n, int(p.argmax()), float(p.max())) for n, p in zip(names, probs)]
        return rows


def pseudo_labels(logits: jax.Array, confidence: float, cap: int) -> tuple[jax.Array, jax.Array]:
    """Hard labels int [U] of logits [U, K] and their weight [U]: 1 where confident and within cap.

    Of each class the `cap` most confident rows count.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    label, sure = probs.argmax(-1), probs.max(-1)
    same = label[:, None] == label[None]
    ahead = (same & (sure[None] > sure[:, None])).sum(-1)
    return label, ((sure > confidence) & (ahead < cap)).astype(jnp.float32)


def kmeans(features: Any, clusters: int, seed: int) -> np.ndarray:
    """Cluster ids [N] of unit-length features [N, C]."""
    from sklearn.cluster import KMeans

    features = np.asarray(features, np.float64)
    features = features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    return KMeans(clusters, n_init=10, random_state=seed).fit_predict(features)


def from_config(config) -> Attribution:
    """The task of a config: its model and `task_args`."""
    from train.data import pipeline

    args = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(config.task_args).items()}
    task = Attribution(model=build_model(config), **args)
    family, options = pipeline.resolve(config.data)
    # Folders that are not there yet (a dry run) tell nothing.
    if hasattr(family, "known_count") and (options["set"] != "folders" or options["path"]):
        known, count = family.known_count(options), family.class_count(options)
        if task.known != known:
            raise ConfigError(
                f"config.task_args.known: {task.known}, the data have {known} known classes"
            )
        if task.model.classes < count:
            raise ConfigError(
                f"config.model_args.classes: {task.model.classes}, the data have {count}"
            )
    return task
