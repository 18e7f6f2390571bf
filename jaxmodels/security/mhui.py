"""MH-UI: classifier heads at several depths whose disagreement is the uncertainty.

Y. Yang et al., "Multi-head Uncertainty Inference for Adversarial Attack Detection", ICASSP 2023,
arXiv 2212.10006. No official code; the backbones are those of the same group's DS-UI
(PRIS-CV/DS-UI@cd6ca57) and of kuangliu/pytorch-cifar@49b7aa9, the heads follow the classifier
block of PRIS-CV/PMG-Progressive-Multi-Granularity-Training@db7a7d7 (`model.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmodels.interop.conversion import CheckpointMismatch
from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.layers.normalization import BatchNorm
from jaxmodels.security.perturbations import check_labels
from jaxmodels.vision import resnet, vgg

HEAD_KINDS = ("mlp", "linear", "conv")
ATTACK_TARGETS = ("final", "sum", "mean")


class _ConvUnit(nn.Module):
    """Convolution without bias, BN, ReLU (PMG's `BasicConv`)."""

    features: int
    kernel: int
    norm: Mapping[str, Any]
    types: Mapping[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = Conv(self.features, self.kernel, name="conv", **self.types)(x)
        return nn.relu(BatchNorm(name="bn", **self.norm, **self.types)(x, train))


class Head(nn.Module):
    """One classifier on a feature map [B, H, W, C] -> logits [B, num_classes].

    `mlp`: global average, BN, Linear(F), BN, ELU, Linear(K). `linear`: global average, Linear(K).
    `conv`: 1x1 convolution to F and 3x3 to 2F, each with BN and ReLU, global maximum, then `mlp`.
    """

    num_classes: int
    features: int = 512
    kind: str = "mlp"
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = dict(epsilon=self.bn_eps, momentum=self.bn_momentum, axis_name=self.bn_axis_name)
        if self.kind == "conv":
            x = _ConvUnit(self.features, 1, norm, types, name="conv_block.0")(x, train)
            x = _ConvUnit(2 * self.features, 3, norm, types, name="conv_block.1")(x, train)
            x = x.max((1, 2))
        else:
            x = x.mean((1, 2))
        if self.kind == "linear":
            return Linear(self.num_classes, name="classifier", **types)(x)
        x = BatchNorm(name="classifier.0", **norm, **types)(x, train)
        x = Linear(self.features, name="classifier.1", **types)(x)
        x = nn.elu(BatchNorm(name="classifier.2", **norm, **types)(x, train))
        return Linear(self.num_classes, name="classifier.4", **types)(x)


def taps_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the maps that the heads read: `taps`, where empty all of the backbone's."""
    return tuple(module.taps) or _backbone_maps(module)


def _backbone_maps(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, MHUIVGG):
        return vgg.pools_of(module.cfg)
    return resnet.stages_of(module.layers)


def head_kinds(module: nn.Module) -> tuple[str, ...]:
    """The kind of every head: `head_kind`, one for all or one each."""
    kind = module.head_kind
    return (kind,) * len(taps_of(module)) if isinstance(kind, str) else tuple(kind)


def _check_taps(taps: tuple[str, ...], known: tuple[str, ...], kinds: tuple[str, ...]) -> None:
    if len(taps) < 2:
        raise ValueError(f"moment matching needs at least 2 heads, got {len(taps)}")
    for tap in taps:
        if tap not in known:
            raise ValueError(f"no tap {tap!r} in this backbone; valid taps: {', '.join(known)}")
    order = [known.index(tap) for tap in taps]
    if order != sorted(set(order)):
        raise ValueError(f"taps must be distinct and shallow to deep, got {', '.join(taps)}")
    for kind in kinds:
        if kind not in HEAD_KINDS:
            raise ValueError(f"head_kind {kind!r}; known: {', '.join(HEAD_KINDS)}")
    if len(kinds) != len(taps):
        raise ValueError(f"head_kind names {len(kinds)} kinds for {len(taps)} heads")


def _heads(module, maps: list[jax.Array], train: bool) -> jax.Array:
    logits = []
    kinds = head_kinds(module)
    for m, x in enumerate(maps):
        if module.detach_shallow and m < len(maps) - 1:
            x = lax.stop_gradient(x)
        head = Head(
            module.num_classes,
            module.head_features,
            kinds[m],
            module.bn_eps,
            module.bn_momentum,
            module.bn_axis_name,
            module.dtype,
            module.param_dtype,
            name=f"heads.{m}",
        )
        # Softmax, entropies and digammas of the logits are computed in float32 or wider.
        logits.append(head(x, train).astype(jnp.promote_types(module.dtype, jnp.float32)))
    return jnp.stack(logits, axis=1)


class MHUIResNet(nn.Module):
    """Images [B, H, W, 3] in [-1, 1] -> logits [B, M, num_classes], head 0 the shallowest.

    Attributes:
      taps: the stages that heads read, of layer1, layer2, ...; at least two, all when empty.
      head_kind: `mlp`, `linear` or `conv`, see `Head`, for all heads or a tuple with one for each;
        head_features: F.
      detach_shallow: heads but the last do not train the trunk.
      layers, width, block, leaky: of the backbone, see `vision.resnet.ResNet`.
    """

    width: int = 64
    layers: tuple[int, ...] = (2, 2, 2, 2)
    block: str = "basic"
    leaky: float = 0.2
    taps: tuple[str, ...] = ()
    head_features: int = 512
    head_kind: str | tuple[str, ...] = "mlp"
    num_classes: int = 10
    detach_shallow: bool = False
    projection: str = "downsample"
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        _check_taps(taps_of(self), _backbone_maps(self), head_kinds(self))
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, 32, 32, 3]."""
        return (jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits [B, M, num_classes] in float32 or wider."""
        return self.intermediates(x, train)["logits"]

    @nn.compact
    def intermediates(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """`tap0`, `tap1`, ...: the maps that heads read; `logits`."""
        backbone = resnet.ResNet(
            self.layers,
            self.width,
            self.block,
            leaky=self.leaky,
            projection=self.projection,
            features_only=True,
            bn_eps=self.bn_eps,
            bn_momentum=self.bn_momentum,
            bn_axis_name=self.bn_axis_name,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="backbone",
        )
        maps = backbone(x, train)
        known = _backbone_maps(self)
        maps = [maps[known.index(tap)] for tap in taps_of(self)]
        taps = {f"tap{i}": y for i, y in enumerate(maps)}
        return {**taps, "logits": _heads(self, maps, train)}


class MHUIVGG(nn.Module):
    """Images [B, H, W, 3] in [-1, 1] -> logits [B, M, num_classes], a head after each max-pool.

    `cfg` is the VGG layout (widths and "M"); `taps` a subset of pool1, pool2, ..., all of them when
    empty. The rest as in `MHUIResNet`.
    """

    cfg: tuple[int | str, ...] = vgg.VGG16
    taps: tuple[str, ...] = ()
    head_features: int = 512
    head_kind: str | tuple[str, ...] = "mlp"
    num_classes: int = 10
    detach_shallow: bool = False
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        _check_taps(taps_of(self), _backbone_maps(self), head_kinds(self))
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, 32, 32, 3]."""
        side = max(32, 2 ** len(vgg.pools_of(self.cfg)))
        return (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits [B, M, num_classes] in float32 or wider."""
        return self.intermediates(x, train)["logits"]

    @nn.compact
    def intermediates(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """`tap0`, `tap1`, ...: the maps that heads read; `logits`."""
        vgg.check_vgg(self.cfg, x)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = dict(epsilon=self.bn_eps, momentum=self.bn_momentum, axis_name=self.bn_axis_name)
        maps = vgg.vgg_maps(x, self.cfg, train, norm, types)
        known = _backbone_maps(self)
        maps = [maps[known.index(tap)] for tap in taps_of(self)]
        taps = {f"tap{i}": y for i, y in enumerate(maps)}
        return {**taps, "logits": _heads(self, maps, train)}


MODEL = MHUIResNet

VARIANTS: dict[str, dict[str, Any]] = {
    "mhui_resnet18": {"leaky": 0.2},
    "mhui_resnet18_relu": {"leaky": 0.0},
    "mhui_resnet34": {"layers": (3, 4, 6, 3), "leaky": 0.0},
    "mhui_resnet50": {"layers": (3, 4, 6, 3), "block": "bottleneck", "leaky": 0.0},
    "mhui_vgg16": {"cls": "MHUIVGG"},
}


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """Both names of projections; the plain classifier of a backbone's file as the deepest head."""
    return {"spellings": resnet.projection_spelling(getattr(module, "projection", "downsample"))}


def upgrade_checkpoint(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """A plain classifier's file gets the backbone's prefix, its classifier becomes the last head.

    The last head must be `linear`, as with `head_kind=("mlp", "mlp", "mlp", "linear")`; the shallow
    heads are missing from the file: `skip=r"heads\\.[0-2]"`. With a last head of another kind the
    classifier keeps its own name and is unexpected, unless it is skipped by it:
    `skip=("heads", "linear")`, for VGG `("heads", "classifier")`.
    """
    if all(key.startswith("module.") for key in state):  # DataParallel's
        state = {key.removeprefix("module."): value for key, value in state.items()}
    if isinstance(module, MHUIResNet) and "conv1.weight" in state:
        classifier, prefix = "linear.", "backbone."
    elif isinstance(module, MHUIVGG) and "classifier.weight" in state:
        classifier, prefix = "classifier.", ""
    else:
        return dict(state)
    last = f"heads.{len(taps_of(module)) - 1}.classifier."
    if head_kinds(module)[-1] != "linear":
        last = classifier
    return {
        (last + key.removeprefix(classifier) if key.startswith(classifier) else prefix + key): value
        for key, value in state.items()
    }


def check_checkpoint(keys: Mapping[str, tuple[int, ...]], module: nn.Module) -> None:
    """Refuse a file whose heads or classes are not the module's, naming both.

    `keys` maps torch names to shapes.
    """
    if not isinstance(module, MHUIResNet | MHUIVGG):
        return
    heads = len(taps_of(module))
    found: dict[int, tuple[str, int]] = {}
    for key, shape in dict(keys).items():
        match = re.search(r"heads\.(\d+)\.classifier\.(?:4\.)?weight$", key)
        if match and len(shape) == 2:
            found[int(match[1])] = (key, shape[0])
    if not found:
        return
    if len(found) != heads:
        raise CheckpointMismatch(
            f"checkpoint has {len(found)} heads ({', '.join(found[m][0] for m in sorted(found))}) "
            f"but the model taps {heads} maps"
        )
    for key, classes in found.values():
        if classes != module.num_classes:
            raise CheckpointMismatch(
                f"{key} has {classes} classes in the checkpoint, the model num_classes="
                f"{module.num_classes}"
            )


def head_losses(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Mean cross-entropy of every head [M] from logits [B, M, K] and labels int [B].

    Raises ValueError, outside `jit`, for labels that are no integers in [0, K).
    """
    check_labels(labels, logits.shape[-1])
    log_p = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    nll = -jnp.take_along_axis(log_p, labels[:, None, None], axis=-1)[..., 0]
    if label_smoothing:
        nll = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(-1)
    return nll.mean(0)


def pixel_logits(module: nn.Module, variables: Any) -> Callable[[jax.Array], jax.Array]:
    """`pixels [B, H, W, 3] in [0, 1] -> logits`: the function that attacks differentiate.

    The normalization (mean 0.5, standard deviation 0.5) lies inside it.
    """
    return lambda pixels: module.apply(variables, (pixels - 0.5) / 0.5)


def attack_loss(
    target: str = "final", uncertainty: Callable | None = None, weight: float = 1.0
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`(logits [B, M, K], labels [B]) -> [B]`, what an untargeted attack ascends.

    `final`: cross-entropy of the deepest head; `sum`: of all heads, added; `mean`: of the averaged
    probabilities. With `uncertainty` (logits -> [B]) it is the adaptive attack, which also avoids
    detection: the loss minus `weight` times the uncertainty.
    """
    if target not in ATTACK_TARGETS:
        raise ValueError(f"attack target {target!r}; known: {', '.join(ATTACK_TARGETS)}")

    def loss(logits, labels):
        check_labels(labels, logits.shape[-1])
        log_p = jax.nn.log_softmax(logits)
        if target == "mean":
            log_p = jax.nn.logsumexp(log_p, axis=1, keepdims=True) - np.log(logits.shape[1])
        elif target == "final":
            log_p = log_p[:, -1:]
        value = -jnp.take_along_axis(log_p, labels[:, None, None], axis=-1).sum((1, 2))
        return value if uncertainty is None else value - weight * uncertainty(logits)

    return loss
