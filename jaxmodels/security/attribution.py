"""Open-world attribution of forgeries: Contrastive Pseudo Learning, its network and its metrics.

Z. Sun et al., "Contrastive Pseudo Learning for Open-World DeepFake Attribution", ICCV 2023, arXiv
2309.11132. Rules after TencentYoutuResearch/OpenWorld-DeepFakeAttribution@22e2584
(`owdfa/algorithm/owssl/CPL.py`, `owdfa/losses/losses.py`, `owdfa/utils/eval.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax import lax

from jaxmodels.layers.convolution import Linear
from jaxmodels.layers.normalization import BatchNorm
from jaxmodels.vision.convnext import ConvNeXt
from jaxmodels.vision.efficientnet import EfficientNet
from jaxmodels.vision.resnet import ResNet, projection_spelling

# Other encoders than the ResNet, and the last map of each.
BACKBONES = {"efficientnet": (EfficientNet, "head"), "convnext": (ConvNeXt, None)}
# First components of an encoder's names.
_ENCODER_PARTS = {
    "resnet": r"conv1|bn1|layer\d",
    "efficientnet": "conv_stem|bn1|blocks|conv_head|bn2",
    "convnext": "stem|stages|head",
}
PARTS_SIDE = 3
MARGIN, SCALE = -0.2, 1.0
# Of torch's binary cross-entropy: the least logarithm, and the least p (1 - p) in its gradient.
_LOG_FLOOR, _SLOPE_FLOOR = -100.0, 1e-12
_SINGLE = "nearest neighbors need at least two rows"


def part_pooling(x: jax.Array, side: int = PARTS_SIDE) -> jax.Array:
    """Map [B, H, W, C] -> [B, side * side, C] by overlapping averages.

    Stride floor(H / side), window H - (side - 1) stride: not adaptive pooling.
    """
    height, width = x.shape[1:3]
    strides = height // side, width // side
    if min(strides) < 1:
        raise ValueError(f"{side}x{side} parts need a map of at least that size, got {x.shape}")
    window = tuple(n - (side - 1) * s for n, s in zip((height, width), strides))
    pooled = nn.avg_pool(x, window, strides)
    return pooled.reshape(x.shape[0], side * side, x.shape[-1])


class AttributionNet(nn.Module):
    """Images [B, H, W, 3] -> `logits` [B, classes], `feature` [B, C], `parts` [B, 9, C].

    An encoder's last map (officially a ResNet's), averaged and through a BatchNorm whose bias stays
    0 (BNNeck); dropout and a linear map without bias for the logits; nine overlapping parts, each
    through its own BNNeck.

    Attributes:
      classes: known tools plus expected novel ones.
      layers, width, block, stem: of the ResNet (ImageNet's ResNet-50 by default).
      backbone: resnet, efficientnet or convnext. backbone_args: fields of the latter two (by
        default B0 and tiny); their last map must be at least 3 x 3.
    """

    classes: int = 20
    layers: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    block: str = "bottleneck"
    stem: str = "imagenet"
    dropout: float = 0.2
    backbone: str = "resnet"
    backbone_args: Mapping[str, Any] = FrozenDict()
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, 256, 256, 3]."""
        side = 256 if self.stem == "imagenet" else 32
        return (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),)

    def __post_init__(self) -> None:
        known = ("resnet", *BACKBONES)
        if self.backbone not in known:
            raise ValueError(f"backbone {self.backbone!r}; known: {', '.join(known)}")
        super().__post_init__()

    def _encoder(self, types: dict[str, Any]) -> Callable[[jax.Array, bool], jax.Array]:
        """(images, train) -> last map, of the child `encoder`."""
        names = dict(bn_axis_name=self.bn_axis_name, name="encoder", **types)
        if self.backbone == "resnet":
            encoder = ResNet(
                self.layers, self.width, self.block, self.stem, projection="downsample",
                features_only=True, **names,
            )  # fmt: skip
            return lambda x, train: encoder(x, train)[-1]
        kind, last = BACKBONES[self.backbone]
        encoder = kind(num_classes=0, **dict(self.backbone_args), **names)
        last = last or f"stages.{len(encoder.depths) - 1}"
        return lambda x, train: encoder.intermediates(x, train)[last]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def neck(y, name):
            # The bias exists in the checkpoint and is frozen at its value, 0.
            norm = BatchNorm(name=name, axis_name=self.bn_axis_name, **types)
            return norm(y, train)

        features = self._encoder(types)(x, train)
        feature = neck(features.mean((1, 2)), "bottleneck")
        dropped = nn.Dropout(self.dropout, deterministic=not train)(feature)
        init = nn.initializers.normal(1e-3)
        logits = Linear(self.classes, use_bias=False, kernel_init=init, name="fc2", **types)(
            dropped
        )
        pooled = part_pooling(features)
        parts = [neck(pooled[:, i], f"bnneck{i}") for i in range(pooled.shape[1])]
        return {"logits": logits, "feature": feature, "parts": jnp.stack(parts, 1)}


MODEL = AttributionNet


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """The encoder's own classifier is not used; Lightning's prefix is found by itself.

    Files of the encoder alone (ImageNet's, where a run begins officially) have no prefix.
    """
    alone = _ENCODER_PARTS[getattr(module, "backbone", "resnet")]
    return {
        "spellings": [
            *projection_spelling("downsample"),
            (r"^encoder\.encoder\.", "encoder."),
            (rf"^(?=(?:{alone})\.)", "encoder."),
        ],
        "drops": [r"(encoder\.)?(fc|classifier|head\.fc)\..*"],
    }


# Which parameters stay as they were initialized: `config.optimizer.freeze`.
FROZEN = r"^(bottleneck|bnneck\d)\.bias$"


class Voting(NamedTuple):
    """`pairs` int [B], the partner of every row; `mask` float [U], 1 where voting accepted it."""

    pairs: jax.Array
    mask: jax.Array


def vote(feature: jax.Array, parts: jax.Array, labeled_pairs: jax.Array) -> Voting:
    """Global-local voting over a batch of L labeled rows followed by U unlabeled ones.

    An unlabeled row's candidate is its nearest other row by global cosine, labeled rows included.
    It is accepted when the second largest entry of the row of the weighted part similarity is at
    least the second largest of the candidate's column; otherwise the row's partner is itself.

    Args:
      feature: [B, D]. parts: [B, P, D]. labeled_pairs: int [L], partners of the labeled rows.
    """
    labeled = labeled_pairs.shape[0]
    if feature.shape[0] < 2 or feature.shape[0] <= labeled:
        raise ValueError(
            f"global-local voting needs unlabeled rows and at least two rows, got "
            f"{feature.shape[0]} rows of which {labeled} are labeled: {_SINGLE}"
        )
    feature, parts = lax.stop_gradient((feature, parts))
    unit = feature / jnp.sqrt(jnp.square(feature).sum(-1, keepdims=True))
    cosines = unit @ unit.T
    lengths = jnp.sqrt(jnp.square(parts).sum(-1))
    unit_parts = parts / lengths[..., None]
    weights = lengths / jnp.sqrt(jnp.square(lengths).sum(-1, keepdims=True))
    # The row's weights: not symmetric.
    similarity = jnp.einsum("ip,ipd,jpd->ij", weights, unit_parts, unit_parts)
    ranked = lax.top_k(cosines[labeled:], 2)[1]
    own = lax.top_k(similarity[labeled:], 2)[0][:, 1]
    theirs = lax.top_k(similarity[:, ranked[:, 1]].T, 2)[0][:, 1]
    accepted = own >= theirs
    chosen = jnp.where(accepted, ranked[:, 1], ranked[:, 0])
    return Voting(jnp.concatenate([labeled_pairs, chosen]), accepted.astype(feature.dtype))


def same_class_pairs(key: jax.Array, labels: jax.Array) -> jax.Array:
    """For each labeled row [L] a random other row of its class; itself where it is alone."""
    same = labels[:, None] == labels[None]
    other = same & ~jnp.eye(labels.shape[0], dtype=bool)
    noise = jax.random.gumbel(key, same.shape)
    partner = jnp.where(other, noise, -jnp.inf).argmax(-1)
    return jnp.where(other.any(-1), partner, jnp.arange(labels.shape[0]))


@jax.custom_jvp
def _cross_entropy_of_one(p: jax.Array) -> jax.Array:
    """-log p as torch's binary cross-entropy with the target 1 has it, its gradient included.

    Below p = 1e-12, where confident rows disagree, its slope stays at -1e12 instead of -1 / p, so
    that the gradient of the logits fades with p.
    """
    return -jnp.maximum(jnp.log(p), _LOG_FLOOR)


@_cross_entropy_of_one.defjvp
def _cross_entropy_of_one_jvp(primals, tangents):
    (p,), (dp,) = primals, tangents
    q = jnp.minimum(p, 1.0)  # rounding may give a little more
    slope = (q - 1) / jnp.maximum((1 - q) * q, _SLOPE_FLOOR)
    return _cross_entropy_of_one(p), slope * dp


class CPLLosses(NamedTuple):
    """The four terms and total = ce + eta1 glv + eta2 csp - eta3 entropy, scalars."""

    ce: jax.Array
    glv: jax.Array
    csp: jax.Array
    entropy: jax.Array
    total: jax.Array


def cpl_losses(
    logits: jax.Array,
    labels: jax.Array,
    voting: Voting,
    gumbel_noise: jax.Array,
    *,
    margin: float = MARGIN,
    scale: float = SCALE,
    etas: tuple[float, float, float] = (0.5, 0.5, 1.0),
) -> CPLLosses:
    """Objective of one batch, labeled rows first.

    - ce: cross-entropy of the labeled rows, margin * scale subtracted from the true logit (the
      negative margin adds 0.2 to it);
    - glv: -mean log <softmax_i, softmax_partner> over all rows, torch's binary cross-entropy;
    - csp: mean over unlabeled rows of CE(z, q) p_{argmax q} mask, q the softmax of the detached
      logits plus Gumbel noise; p carries gradient;
    - entropy of the mean prediction, which is maximized.

    Args:
      logits: [B, K]. labels: int [L]. voting: of `vote`. gumbel_noise: [U, K].
    """
    labeled = labels.shape[0]
    if logits.shape[0] <= labeled:
        raise ValueError(f"no unlabeled rows among {logits.shape[0]}: {_SINGLE}")
    log_p = jax.nn.log_softmax(logits)
    probs = jnp.exp(log_p)
    true = jax.nn.one_hot(labels, logits.shape[-1])
    shifted = logits[:labeled] - margin * scale * true
    rows = jax.nn.log_softmax(shifted)
    ce = -jnp.take_along_axis(rows, labels[:, None], axis=-1).mean()
    agreement = (probs * probs[voting.pairs]).sum(-1)
    glv = _cross_entropy_of_one(agreement).mean()
    soft = jax.nn.softmax(lax.stop_gradient(logits[labeled:]) + gumbel_noise)
    confidence = jnp.take_along_axis(probs[labeled:], soft.argmax(-1)[:, None], axis=-1)[:, 0]
    csp = (-(soft * log_p[labeled:]).sum(-1) * confidence * voting.mask).mean()
    mean = probs.mean(0)
    entropy = -(mean * jnp.log(jnp.maximum(mean, 1e-30))).sum()
    total = ce + etas[0] * glv + etas[1] * csp - etas[2] * entropy
    return CPLLosses(ce, glv, csp, entropy, total)


def cluster_accuracy(predicted: Any, labels: Any) -> float:
    """Accuracy under the best one-to-one renaming of the predicted ids (Hungarian)."""
    from scipy.optimize import linear_sum_assignment

    # Numbered anew: ids are names, and a table up to the largest of them may not fit anywhere.
    ids, predicted = np.unique(np.asarray(predicted), return_inverse=True)
    classes, labels = np.unique(np.asarray(labels), return_inverse=True)
    table = np.zeros((len(ids), len(classes)), np.int64)
    np.add.at(table, (predicted, labels), 1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / len(labels))


METRICS = tuple(f"{rows}_{m}" for rows in ("all", "known", "novel") for m in ("acc", "nmi", "ari"))


def open_world_metrics(predicted: Any, labels: Any, known: int) -> dict[str, float]:
    """ACC, NMI (arithmetic) and ARI over all, known (label < `known`) and novel rows.

    Known accuracy is direct, all and novel accuracy Hungarian; rows that do not exist give 0.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    predicted, labels = np.asarray(predicted, np.int64), np.asarray(labels, np.int64)
    if predicted.shape != labels.shape or predicted.ndim != 1 or not len(labels):
        raise ValueError(
            f"predictions and labels must be [N], got {predicted.shape} and {labels.shape}"
        )
    if predicted.min() < 0:
        raise ValueError("cluster ids must not be negative")
    numbers = {}
    for name, rows in (
        ("all", np.ones(len(labels), bool)),
        ("known", labels < known),
        ("novel", labels >= known),
    ):
        p, y = predicted[rows], labels[rows]
        if not len(y):
            numbers |= {f"{name}_{m}": 0.0 for m in ("acc", "nmi", "ari")}
            continue
        direct = name == "known"
        numbers[f"{name}_acc"] = float((p == y).mean()) if direct else cluster_accuracy(p, y)
        numbers[f"{name}_nmi"] = float(normalized_mutual_info_score(y, p))
        numbers[f"{name}_ari"] = float(adjusted_rand_score(y, p))
    return numbers


def known_classes(labels: Any, tags: Any) -> int:
    """1 + the largest label among labeled-set rows (tag 1)."""
    return int(np.asarray(labels)[np.asarray(tags) == 1].max()) + 1


def same_tool_auc(features: Any, labels: Any, most: int = 4000) -> float:
    """AUROC of the cosine of two rows' features for whether one tool made both, over all pairs.

    Of more than `most` rows so many, evenly spread: pairs grow with the square.
    """
    from jaxmodels.security.detection import detection_metrics

    if len(features) > most:
        chosen = np.linspace(0, len(features) - 1, most).round().astype(int)
        features, labels = np.asarray(features)[chosen], np.asarray(labels)[chosen]
    features = np.asarray(features, np.float64)
    features = features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    rows, columns = np.triu_indices(len(features), 1)
    labels = np.asarray(labels)
    same = (labels[rows] == labels[columns]).astype(int)
    return detection_metrics((features @ features.T)[rows, columns], same).auroc
