"""Telling attacked images from natural ones: MH-UI and the methods it is compared with.

Images are pixels in [0, 1]; the networks see (x - 0.5) / 0.5, inside what attacks differentiate.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.layers.partitioning import over_rows
from jaxmodels.security import attacks, prior_networks, uncertainty
from jaxmodels.security.detection import PROTOCOLS, detect_adversarial
from jaxmodels.security.ensembles import each_member
from jaxmodels.security.mhui import ATTACK_TARGETS, attack_loss, head_losses, taps_of
from jaxmodels.security.perturbations import check_labels
from train.building import build_model, check_classes
from train.naming import ConfigError, nearest

METHODS = ("mhui", "softmax", "mc_dropout", "ensemble", "dpn_forward", "dpn_reverse")
BOUNDED = ("fgsm", "bim", "pgd", "mi", "ni", "apgd_ce", "apgd_dlr", "square", "adaptive")
SMALLEST = ("cw", "deepfool")
PREDICTIONS = ("mean", "final_head")
DETECTORS = (*uncertainty.SCORES, "last_head")
SUSPICION = 0.05  # share of natural images that `predict` may call suspicious


@dataclasses.dataclass(frozen=True)
class AdversarialDetection:
    """Training and evaluation of one method.

    Attributes:
      model: for `mhui` a network with several heads, logits [B, M, K]; otherwise logits [B, K].
      method: one of METHODS. `ensemble` trains `members` networks of different seeds side by side.
      head_weights: of the heads' losses, all 1 when empty.
      prediction: of the class, by the `mean` of heads, members or samples, or by the `final_head`
        (of `mhui`).
      attacks: `NAME:EPS` strings evaluated at the end; NAME is one of `BOUNDED` (`adaptive` is PGD
        that also avoids detection), with `_l2` behind it for the other norm, or cw or deepfool
        (no eps).
      steps: of iterated attacks. queries: of square.
      target: what gradient attacks look at, `final`, `sum` or `mean`; of an ensemble always the
        mean of its members' logits, of MC dropout that of `attacked_samples` dropout masks, other
        ones at every step of a gradient attack (EOT).
      adaptive_weight: lambda of the adaptive attack, which also lowers the reported score.
      estimator, detector: the fit and the measure of the reported detector, of `uncertainty`'s
        ESTIMATORS and SCORES or, of `mhui`, `last_head`. Methods that have no such score report
        their `mi` or else `max_p`.
      samples: forward passes of MC dropout.
      cw_steps, cw_c: of C&W.
    """

    model: nn.Module
    method: str = "mhui"
    head_weights: tuple[float, ...] = ()
    prediction: str = "mean"
    label_smoothing: float = 0.0
    members: int = 5
    samples: int = 20
    attacked_samples: int = 4
    attacks: tuple[str, ...] = ("fgsm:0.1", "pgd:0.05", "adaptive:0.05")
    steps: int = 10
    queries: int = 200
    target: str = "final"
    adaptive_weight: float = 2.0
    estimator: str = "trace"
    detector: str = "epkl"
    cw_steps: int = 50
    cw_c: float = 1.0

    def __post_init__(self):
        if self.method not in METHODS:
            raise ConfigError(f"config.task_args.method: {self.method!r}; known: {METHODS}")
        known = PREDICTIONS if self.method == "mhui" else PREDICTIONS[:1]
        if self.prediction not in known:
            raise ConfigError(
                f"config.task_args.prediction: {self.prediction!r}; {self.method} knows: "
                f"{', '.join(known)}"
            )
        for spec in self.attacks:
            parse_attack(spec)
        for name, known in (
            ("detector", DETECTORS if self.method == "mhui" else uncertainty.SCORES),
            ("estimator", uncertainty.ESTIMATORS),
            ("target", ATTACK_TARGETS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"config.task_args.{name}: {value!r}; {nearest(str(value), known)}"
                )
        for name in ("members", "samples", "attacked_samples", "steps", "queries", "cw_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"config.task_args.{name}: {value!r} is no count of at least 1")
        if self.head_weights:
            heads = len(taps_of(self.model)) if self.method == "mhui" else 0
            if len(self.head_weights) != heads:
                raise ConfigError(
                    f"config.task_args.head_weights: {len(self.head_weights)} for {heads} heads"
                )

    def init(self, rng, batch):
        """Parameters and batch statistics; the ensemble's have a leading axis of members."""

        def one(key):
            return self.model.init(key, _scaled(batch["image"][:1]), train=False)

        if self.method == "ensemble":
            variables = jax.vmap(one)(jax.random.split(rng, self.members))
        else:
            variables = one(rng)
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss(self, params, extra, batch, rng):
        """The method's objective; `accuracy` on the training batch."""
        dropout, noise = jax.random.split(rng)
        x, labels = batch["image"], batch["label"]
        if self.method == "ensemble":

            def member(params, extra, key):
                return self._train_apply(params, extra, _scaled(x), key)

            keys = jax.random.split(dropout, self.members)
            logits, updated = each_member(member, params, extra, keys)
            losses = head_losses(logits.swapaxes(0, 1), labels, self.label_smoothing)
            # A sum: every member's gradient is that of its own loss.
            return losses.sum(), ({**extra, **updated}, _accuracy(logits.mean(0), labels))
        if self.method.startswith("dpn"):
            outside = noise_images(noise, x)
            both = over_rows(jnp.concatenate([_scaled(x), _scaled(over_rows(outside))]))
            logits, updated = self._train_apply(params, extra, both, dropout)
            natural, foreign = jnp.split(logits, 2)
            loss = prior_networks.prior_network_loss(
                natural, labels, foreign, direction=self.method.partition("_")[2]
            )
            return loss, ({**extra, **updated}, _accuracy(natural, labels))
        logits, updated = self._train_apply(params, extra, _scaled(x), dropout)
        if self.method == "mhui":
            losses = head_losses(logits, labels, self.label_smoothing)
            weights = jnp.asarray(self.head_weights or (1.0,) * len(losses))
            mean = jax.nn.softmax(logits).mean(1)
            metrics = {f"head{m}_loss": value for m, value in enumerate(losses)}
            metrics |= _accuracy(mean, labels)
            return (weights * losses).sum(), ({**extra, **updated}, metrics)
        loss = head_losses(logits[:, None], labels, self.label_smoothing)[0]
        return loss, ({**extra, **updated}, _accuracy(logits, labels))

    def _train_apply(self, params, extra, x, key):
        return self.model.apply(
            {"params": params, **extra},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )

    def outputs(self, variables, pixels, key=None, samples=None):
        """What the method predicts from, [B, M, K] logits of heads, members, samples, or one.

        `samples` passes of MC dropout, its own number when None; without a key no dropout.
        """
        x = _scaled(pixels)
        if self.method == "mhui":
            return self.model.apply(variables, x)
        if self.method == "ensemble":
            return each_member(lambda v: self.model.apply(v, x), variables).swapaxes(0, 1)
        if self.method == "mc_dropout" and key is not None:

            def sample(k):
                return self.model.apply(variables, x, sample_dropout=True, rngs={"dropout": k})

            return jax.lax.map(sample, jax.random.split(key, samples or self.samples)).swapaxes(
                0, 1
            )
        return self.model.apply(variables, x)[:, None]

    def probabilities(self, outputs):
        """Point prediction [B, K]: the mean over heads, members or samples, or the last head's."""
        if self.prediction == "final_head":
            return jax.nn.softmax(outputs[:, -1])
        return jax.nn.softmax(outputs).mean(1)

    def scores(self, outputs) -> dict[str, jax.Array]:
        """Every detection score of the method [B], larger = more suspicious."""
        probs = jax.nn.softmax(outputs)
        mean = probs.mean(1)
        entropy = -(mean * jnp.log(jnp.maximum(mean, 1e-30))).sum(-1)
        if self.method == "mhui":
            found = uncertainty.moments(outputs, from_logits=True)
            last = outputs[:, -1]
            result = {"last_head": 1 - jax.nn.softmax(last).max(-1)}
            for name in uncertainty.ESTIMATORS:
                fit = uncertainty.match_moments(found, name)
                measured = uncertainty.scores(uncertainty.measures(fit.alpha))
                shared = ("max_p", "ent")  # these depend on the mean alone
                result |= {
                    k if k in shared else f"{k}_{name}": v
                    for k, v in measured.items()
                    if k not in shared or name == "trace"
                }
            return result
        if self.method.startswith("dpn"):
            measured = uncertainty.measures(prior_networks.concentrations(outputs[:, 0]))
            return uncertainty.scores(measured)
        result = {"max_p": 1 - mean.max(-1), "ent": entropy}
        if outputs.shape[1] > 1:
            own = -(probs * jnp.log(jnp.maximum(probs, 1e-30))).sum(-1).mean(1)
            result["mi"] = entropy - own
        return result

    def evaluate(self, variables, batch):
        """Sums of hits of the point prediction, of every head, and of its NLL."""
        outputs = self.outputs(variables, batch["image"])
        p, mask, label = self.probabilities(outputs), batch["mask"], batch["label"]
        nll = -jnp.log(jnp.maximum(jnp.take_along_axis(p, label[:, None], 1)[:, 0], 1e-30))
        sums = {
            "loss": (nll * mask).sum(),
            "accuracy": ((p.argmax(-1) == label) * mask).sum(),
            "count": mask.sum(),
        }
        if self.method == "mhui":
            hits = (outputs.argmax(-1) == label[:, None]) * mask[:, None]
            sums |= {f"head{m}_accuracy": hits[:, m].sum() for m in range(hits.shape[1])}
        return sums

    def attacked(self, variables, x, y, key, eps, name: str):
        """Adversarial images of the attack `name` within eps, for one batch."""
        masks = None
        if self.method == "mc_dropout":
            key, masks = jax.random.split(key)

        def view(pixels, masks=masks):
            return self.outputs(variables, pixels, masks, self.attacked_samples)

        def logits(outputs):
            if self.method in ("ensemble", "mc_dropout"):
                # The mean of the logits, not of the probabilities it predicts from: once one
                # confident member is wrong, the others' gradients vanish in the latter.
                return outputs.mean(1, keepdims=True)
            return outputs

        if name == "cw":
            cfg = attacks.make("cw", steps=self.cw_steps, c=self.cw_c)
            if self.target == "final":
                return attacks.attack(key, lambda z: logits(view(z))[:, -1], x, y, cfg)
            return attacks.attack(key, self._mean_of(lambda z: logits(view(z))), x, y, cfg)
        last = lambda z: logits(view(z))[:, -1]  # noqa: E731
        if name == "deepfool":
            return attacks.attack(key, last, x, y, attacks.make(name, steps=self.steps))
        method = name.removesuffix("_l2")
        options = {"eps": eps, "norm": "l2" if name.endswith("_l2") else "linf"}
        if method == "square":
            cfg = attacks.make(method, queries=self.queries, **options)
            return attacks.attack(key, last, x, y, cfg).images
        if method != "fgsm":
            options["steps"] = self.steps
        if method.startswith("apgd"):
            # APGD's own losses look at one logit vector.
            return attacks.attack(key, last, x, y, attacks.make(method, **options))
        misled, adaptive = attack_loss(self.target), method == "adaptive"

        def loss(outputs, labels):
            value = misled(logits(outputs), labels)
            if adaptive:
                value = value - self.adaptive_weight * self.suspicion(outputs)
            return value

        apply = view
        if self.method == "mc_dropout":
            # Every step's key becomes its dropout masks.
            options["transform"] = lambda step, z: (z, step)
            apply = lambda seen: view(*seen)  # noqa: E731
        cfg = attacks.make("pgd" if adaptive else method, loss=loss, **options)
        return attacks.attack(key, apply, x, y, cfg)

    def _mean_of(self, apply) -> Callable:
        return lambda z: jnp.log(jnp.maximum(jax.nn.softmax(apply(z)).mean(1), 1e-30))

    def suspicion(self, outputs):
        """What the adaptive attack lowers [B]: the score that is reported.

        EPKL, which has no bound, as 1 / (alpha0 + 1), which rises and falls with it.
        """
        if self.method == "mhui" and (self.detector, self.estimator) == ("epkl", "trace"):
            # From the moments: with alpha0 at its limits there would be no gradient.
            mean, variance = uncertainty.moments(outputs, from_logits=True)
            return variance.sum(-1) / jnp.maximum(1 - jnp.square(mean).sum(-1), 1e-6)
        scores = self.scores(outputs)
        own = self.reported_score(scores)
        value = scores[own]
        return value / (value + outputs.shape[-1] - 1) if own.startswith("epkl") else value

    def detection(self, variables, images, labels, *, batch_size: int, seed: int = 0):
        """Every attack's table: `{spec: {"accuracy", ..., protocol: {score: Detection}}}`.

        `success` is the share of rightly classified images that are misled, `l2` the mean length of
        these's perturbations (NaN where there are none). Also the entry `clean` with the accuracy.
        Under a protocol that leaves no image (no attack
        succeeded) the scores are absent.
        """
        look_at = jax.eval_shape(self.outputs, variables, images[:1], jax.random.key(0))
        check_labels(labels, look_at.shape[-1])

        @functools.partial(jax.jit, static_argnames="name")
        def attack_batch(variables, x, y, key, eps, name):
            return self.attacked(variables, x, y, key, eps, name)

        @jax.jit
        def look(variables, x, key):
            outputs = self.outputs(variables, x, key)
            return self.probabilities(outputs).argmax(-1), self.scores(outputs), outputs

        def over_batches(function, *arrays):
            rows = []
            for i in range(0, len(arrays[0]), batch_size):
                parts = [a[i : i + batch_size] for a in arrays]
                short = batch_size - len(parts[0])
                padded = [np.concatenate([p, np.repeat(p[:1], short, 0)]) for p in parts]
                key = jax.random.fold_in(jax.random.key(seed), i)
                found = jax.device_get(function(key, *padded))
                rows.append(jax.tree.map(lambda v, n=batch_size - short: v[:n], found))
            return jax.tree.map(lambda *v: np.concatenate(v), *rows)

        clean, clean_scores, _ = over_batches(lambda k, x: look(variables, x, k), images)
        correct = clean == labels
        tables: dict[str, Any] = {"clean": {"accuracy": float(correct.mean())}}
        for spec in self.attacks:
            name, eps = parse_attack(spec)
            adversarial = over_batches(
                lambda k, x, y, name=name, eps=eps: attack_batch(
                    variables, x, y, k, jnp.float32(eps), name
                ),
                images,
                labels,
            )
            predicted, scores, outputs = over_batches(
                lambda k, x: look(variables, x, k), adversarial
            )
            fooled = predicted != labels
            attacked_last = outputs[:, -1].argmax(-1) if self.method == "mhui" else predicted
            # An attack on the last head succeeds where that head is misled.
            misled = attacked_last != labels if self.target == "final" else fooled
            won = correct & misled
            sizes = np.sqrt(np.square(adversarial - images).sum((1, 2, 3)))
            table: dict[str, Any] = {
                "accuracy": float(1 - fooled.mean()),
                "last_accuracy": float((attacked_last == labels).mean()),
                "success": float(won.sum() / max(correct.sum(), 1)),
                "l2": float(sizes[won].mean()) if won.any() else float("nan"),
            }
            for protocol in PROTOCOLS:
                if protocol == "successful" and not won.any():
                    continue
                table[protocol] = detect_adversarial(
                    clean_scores, scores, correct=correct, fooled=misled, protocol=protocol
                )
            tables[spec] = table
        return tables

    def report(self, variables, sums, config):
        """AUROC of the detector and of the last head's 1 - max p under every attack."""
        images, labels = _evaluation_images(config)
        size = config.eval.batch_size or config.batch_size
        tables = self.detection(variables, images, labels, batch_size=size, seed=config.seed)
        del sums
        numbers = {}
        for spec in self.attacks:
            table = tables[spec]
            numbers[f"{spec}/accuracy"] = table["accuracy"]
            numbers[f"{spec}/success"] = table["success"]
            if table["success"]:
                numbers[f"{spec}/l2"] = table["l2"]
            for protocol in PROTOCOLS:
                if protocol not in table:
                    continue
                found = table[protocol]
                own = self.reported_score(found)
                mark = "" if protocol == "all" else "/successful"
                numbers[f"{spec}{mark}/auroc"] = found[own].auroc
                numbers[f"{spec}{mark}/aupr"] = found[own].aupr
                if protocol == "all":
                    numbers[f"{spec}/fpr95"] = found[own].fpr95
                    if "last_head" in found:
                        numbers[f"{spec}/baseline_auroc"] = found["last_head"].auroc
                    best = max(found, key=lambda s: found[s].auroc)
                    numbers[f"{spec}/best_auroc ({best})"] = found[best].auroc
        return numbers

    def reported_score(self, found) -> str:
        """The configured score under the name the method has for it."""
        wanted = (f"{self.detector}_{self.estimator}", self.detector)
        # A single prediction has no measure of disagreement.
        others = () if self.method == "mhui" else ("mi", "max_p")
        return next(name for name in (*wanted, *others) if name in found)

    def predict(self, variables, path, config):
        """Class, probability and scores of every image; suspicious beyond 95 % of natural ones.

        The threshold is that quantile of the reported score over the evaluation split.
        """
        from train.data.image_folder import images_below

        size = config.eval.batch_size or config.batch_size

        @jax.jit
        def look(variables, x):
            outputs = self.outputs(variables, x, jax.random.key(config.seed))
            p = self.probabilities(outputs)
            return p.argmax(-1), p.max(-1), self.scores(outputs)

        def score_of(images):
            short = -len(images) % size
            padded = np.concatenate([images, np.zeros((short, *images.shape[1:]), images.dtype)])
            parts = [look(variables, padded[i : i + size])[2] for i in range(0, len(padded), size)]
            own = self.reported_score(parts[0])
            return np.concatenate([np.asarray(p[own]) for p in parts])[: len(images)]

        natural, _ = _evaluation_images(config)
        threshold = float(np.quantile(score_of(natural), 1 - SUSPICION))
        rows = None
        for names, images in images_below(path, config.data, batch_size=size):
            label, p, scores = jax.device_get(look(variables, images))
            if rows is None:
                own = self.reported_score(scores)
                rows = [("file", "class", "probability", "suspicious", *scores)]
            for i, name in enumerate(names):
                values = [float(v[i]) for v in scores.values()]
                suspicious = int(scores[own][i] > threshold)
                rows.append((name, int(label[i]), float(p[i]), suspicious, *values))
        return rows


def parse_attack(spec: str) -> tuple[str, float]:
    """`NAME:EPS` as (name, eps); C&W and DeepFool have no eps."""
    name, _, eps = spec.partition(":")
    if name.removesuffix("_l2") not in BOUNDED and name not in SMALLEST:
        known = f"{', '.join(BOUNDED)} (also with _l2), {', '.join(SMALLEST)}"
        raise ConfigError(f"config.task_args.attacks: {spec!r}; known: {known}")
    if name in SMALLEST:
        if eps:
            raise ConfigError(f"config.task_args.attacks: {spec!r}: {name} has no eps")
        return name, 0.0
    try:
        value = float(eps)
    except ValueError:
        value = float("nan")
    if not value > 0:
        raise ConfigError(f"config.task_args.attacks: {spec!r} needs a positive eps, as fgsm:0.1")
    return name, value


def noise_images(key: jax.Array, x: jax.Array) -> jax.Array:
    """Images outside the distribution, from x [B, H, W, C]: a third each of uniform noise, pixels
    of natural images in random places, and mixtures of two images."""
    a, b, c = jax.random.split(key, 3)
    batch, height, width, channels = x.shape
    uniform = jax.random.uniform(a, x.shape, x.dtype)
    places = jax.random.permutation(b, height * width)
    shuffled = x.reshape(batch, -1, channels)[:, places].reshape(x.shape)
    mixed = 0.5 * x + 0.5 * jnp.roll(x, 1, axis=0)[:, :, ::-1]
    choice = jax.random.randint(c, (batch, 1, 1, 1), 0, 3)
    return jnp.where(choice == 0, uniform, jnp.where(choice == 1, shuffled, mixed))


def _scaled(pixels):
    return (pixels - 0.5) / 0.5


def _accuracy(scores, labels):
    return {"accuracy": (scores.argmax(-1) == labels).mean()}


def _evaluation_images(config) -> tuple[np.ndarray, np.ndarray]:
    from train.data import pipeline

    size = config.eval.batch_size or config.batch_size
    split = config.eval.split or pipeline.eval_split(config.data)
    images, labels = [], []
    for batch in pipeline.eval_batches(config.data, split, batch_size=size):
        rows = batch["mask"] > 0
        images.append(batch["image"][rows])
        labels.append(batch["label"][rows])
    return np.concatenate(images), np.concatenate(labels)


def from_config(config) -> AdversarialDetection:
    """The task of a config: its model and `task_args`."""
    from train.data import pipeline

    args = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(config.task_args).items()}
    task = AdversarialDetection(model=build_model(config), **args)
    family, options = pipeline.resolve(config.data)
    # Found out by the attacks themselves, it would be after training.
    if not getattr(family, "PIXELS", not options.get("standardize", True)):
        how = "set" if "standardize" in options else "it has no"
        raise ConfigError(
            f"config.data: images of {config.data.name} are standardized, attacks are on pixels in "
            f"[0, 1]; {how} config.data.options.standardize=False"
        )
    check_classes(config, task.model)
    return task
