"""RepGhostNet: ghost features by addition, folded away after training.

C. Chen, Z. Guo, H. Zeng, P. Xiong, J. Dong, "RepGhost: A Hardware-Efficient Ghost Module via
Re-parameterization", arXiv 2211.06088. Structure and names after the official code,
ChengpengChen/RepGhost@3c7d87e (`model/repghost.py`); timm's checkpoints have the same names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.layers.normalization import BatchNorm
from jaxmodels.layers.rounding import make_divisible
from jaxmodels.layers.squeeze_excite import SqueezeExcite
from jaxmodels.vision.images import check_images, check_network, preprocess_images

BN_EPSILON = 1e-5

# (kernel, mid, out, squeeze-and-excite, stride) of every bottleneck at width 1, by stage.
STAGES: tuple[tuple[tuple[int, int, int, bool, int], ...], ...] = (
    ((3, 8, 16, False, 1),),
    ((3, 24, 24, False, 2),),
    ((3, 36, 24, False, 1),),
    ((5, 36, 40, True, 2),),
    ((5, 60, 40, True, 1),),
    ((3, 120, 80, False, 2),),
    (
        (3, 100, 80, False, 1),
        (3, 120, 80, False, 1),
        (3, 120, 80, False, 1),
        (3, 240, 112, True, 1),
        (3, 336, 112, True, 1),
    ),
    ((5, 336, 160, True, 2),),
    (
        (5, 480, 160, False, 1),
        (5, 480, 160, True, 1),
        (5, 480, 160, False, 1),
        (5, 480, 160, True, 1),
    ),
)
# Last stages of strides 4, 8, 16 and 32: what a detector's pyramid takes.
FEATURE_STAGES = (2, 4, 6, 8)
STEM_FEATURES, HEAD_FEATURES = 16, 1280


class RepGhostModule(nn.Module):
    """Pointwise convolution, then depthwise plus identity-shaped branches that fold into it.

    x [B, H, W, inp] -> [B, H', W', oup]. With x1 = relu(bn(primary(x))):
    y = relu(bn(depthwise(x1)) + [bn(x1)] + [x1]), both ReLUs only if `relu`.
    `deploy` is the folded layout: one depthwise convolution with bias in place of the sum.
    `fuse_all` (not an official layout) has the primary BatchNorm folded as well.
    """

    inp: int
    oup: int
    kernel_size: int = 1
    dw_size: int = 3
    stride: int = 1
    relu: bool = True
    reparam_bn: bool = True
    reparam_identity: bool = False
    deploy: bool = False
    fuse_all: bool = False
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: x [1, 8, 8, inp]."""
        return (jax.ShapeDtypeStruct((1, 8, 8, self.inp), jnp.float32),)

    @property
    def has_fusion(self) -> bool:
        """Whether folding changes this module."""
        return not self.deploy and (self.reparam_bn or self.reparam_identity)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if train and self.deploy:
            raise ValueError(FOLDED_TRAINING)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = dict(epsilon=BN_EPSILON, axis_name=self.bn_axis_name, **types)
        act = nn.relu if self.relu else lambda y: y

        x1 = Conv(
            self.oup,
            self.kernel_size,
            self.stride,
            use_bias=self.fuse_all,
            name="primary_conv.0",
            **types,
        )(x)
        if not self.fuse_all:
            x1 = BatchNorm(name="primary_conv.1", **norm)(x1, train)
        x1 = act(x1)

        depthwise = dict(kernel_size=self.dw_size, groups=self.oup, **types)
        if self.deploy:
            return act(Conv(self.oup, use_bias=True, name="cheap_operation", **depthwise)(x1))
        y = Conv(self.oup, name="cheap_operation.0", **depthwise)(x1)
        y = BatchNorm(name="cheap_operation.1", **norm)(y, train)
        if self.reparam_bn:
            y = y + BatchNorm(name="fusion_bn.0", **norm)(x1, train)
        if self.reparam_identity:
            y = y + x1
        return act(y)


class RepGhostBottleneck(nn.Module):
    """Two RepGhost modules around a strided depthwise convolution and squeeze-and-excitation.

    x [B, H, W, inp] -> [B, ceil(H / stride), ceil(W / stride), oup]. `kernel_size` is that of the
    strided depthwise convolution and of the shortcut's; `shortcut=False` drops identity
    shortcuts only, projections stay. `se_ratio` is the squeeze's width over `mid`.
    """

    inp: int
    mid: int
    oup: int
    kernel_size: int = 3
    stride: int = 1
    se: bool = False
    se_ratio: float = 0.25
    shortcut: bool = True
    reparam: bool = True
    reparam_bn: bool = True
    reparam_identity: bool = False
    deploy: bool = False
    fuse_all: bool = False
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: x [1, 8, 8, inp]."""
        return (jax.ShapeDtypeStruct((1, 8, 8, self.inp), jnp.float32),)

    @property
    def has_fusion(self) -> bool:
        """Whether folding changes this module."""
        return not self.deploy and self.reparam and (self.reparam_bn or self.reparam_identity)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        ghost = dict(
            reparam_bn=self.reparam and self.reparam_bn,
            reparam_identity=self.reparam and self.reparam_identity,
            deploy=self.deploy,
            fuse_all=self.fuse_all,
            bn_axis_name=self.bn_axis_name,
            **types,
        )

        def conv_bn(y, name, bn_name, features, **arguments):
            y = Conv(features, use_bias=self.fuse_all, name=name, **arguments, **types)(y)
            if self.fuse_all:
                return y
            bn = BatchNorm(BN_EPSILON, axis_name=self.bn_axis_name, name=bn_name, **types)
            return bn(y, train)

        strided = dict(
            kernel_size=self.kernel_size,
            strides=self.stride,
            padding=(self.kernel_size - 1) // 2,
        )
        y = RepGhostModule(self.inp, self.mid, relu=True, name="ghost1", **ghost)(x, train)
        if self.stride > 1:
            y = conv_bn(y, "conv_dw", "bn_dw", self.mid, groups=self.mid, **strided)
        if self.se:
            y = SqueezeExcite(self.mid, self.se_ratio, name="se", **types)(y)
        y = RepGhostModule(self.mid, self.oup, relu=False, name="ghost2", **ghost)(y, train)

        if self.inp == self.oup and self.stride == 1:
            return y + x if self.shortcut else y
        z = conv_bn(x, "shortcut.0", "shortcut.1", self.inp, groups=self.inp, **strided)
        return y + conv_bn(z, "shortcut.2", "shortcut.3", self.oup)


class RepGhostNet(nn.Module):
    """RepGhostNet, images [B, H, W, 3] -> logits [B, num_classes].

    `enable_se`, `reparam`, `reparam_bn`, `reparam_identity` and `shortcut` are the official
    switches; `reparam=False` means no fusion branch at all. `deploy` builds the folded layout,
    which cannot be trained. `features_only` returns the maps of strides 4, 8, 16 and 32 instead
    of logits and has no parameters beyond them. `preprocess` accepts uint8 images and
    normalizes them as ImageNet recipes do.

    Raises ValueError for layouts and sizes that cannot be meant, TypeError for integer images.
    """

    width: float = 1.0
    num_classes: int = 1000
    dropout: float = 0.2
    enable_se: bool = True
    shortcut: bool = True
    reparam: bool = True
    reparam_bn: bool = True
    reparam_identity: bool = False
    deploy: bool = False
    fuse_all: bool = False
    features_only: bool = False
    preprocess: bool = False
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        check_network(self.width, self.num_classes, VARIANTS)
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: images [1, 224, 224, 3]."""
        return (jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),)

    @property
    def has_fusion(self) -> bool:
        """Whether folding changes this network."""
        return not self.deploy and self.reparam and (self.reparam_bn or self.reparam_identity)

    def __call__(self, x: jax.Array, train: bool = False):
        """Logits [B, num_classes], or the four maps under `features_only`."""
        if self.features_only:
            return self.features(x, train)
        return self.intermediates(x, train)["logits"]

    def features(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        """Maps [B, H / s, W / s, C] of strides s = 4, 8, 16, 32 (sizes rounded up)."""
        maps = self._run(x, train, head=False)
        return tuple(maps[f"blocks.{stage}"] for stage in FEATURE_STAGES)

    def intermediates(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """Every named stage: `stem`, `blocks.0` .. `blocks.9`, `head` [B, 1280], `logits`."""
        return self._run(x, train, head=True)

    @nn.compact
    def _run(self, x: jax.Array, train: bool, head: bool) -> dict[str, jax.Array]:
        if train and self.deploy:
            raise ValueError(FOLDED_TRAINING)
        x = preprocess_images(x, self.dtype) if self.preprocess else x
        check_images(x)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        switches = dict(
            shortcut=self.shortcut,
            reparam=self.reparam,
            reparam_bn=self.reparam_bn,
            reparam_identity=self.reparam_identity,
            deploy=self.deploy,
            fuse_all=self.fuse_all,
            bn_axis_name=self.bn_axis_name,
            **types,
        )

        def conv_bn_relu(y, name, bn_name, features, **arguments):
            y = Conv(features, use_bias=self.fuse_all, name=name, **arguments, **types)(y)
            if not self.fuse_all:
                bn = BatchNorm(BN_EPSILON, axis_name=self.bn_axis_name, name=bn_name, **types)
                y = bn(y, train)
            return nn.relu(y)

        maps: dict[str, jax.Array] = {}
        channels = make_divisible(STEM_FEATURES * self.width)
        x = conv_bn_relu(x, "conv_stem", "bn1", channels, kernel_size=3, strides=2)
        maps["stem"] = x
        for i, stage in enumerate(STAGES):
            for j, (k, mid, out, se, stride) in enumerate(stage):
                mid, out = make_divisible(mid * self.width), make_divisible(out * self.width)
                x = RepGhostBottleneck(
                    channels,
                    mid,
                    out,
                    kernel_size=k,
                    stride=stride,
                    se=se and self.enable_se,
                    name=f"blocks.{i}.{j}",
                    **switches,
                )(x, train)
                channels = out
            maps[f"blocks.{i}"] = x
        if not head:
            return maps

        final = make_divisible(STAGES[-1][-1][1] * self.width * 2)
        last = f"blocks.{len(STAGES)}"
        x = conv_bn_relu(x, f"{last}.0.conv", f"{last}.0.bn1", final)
        maps[last] = x
        x = x.mean((1, 2), keepdims=True)
        x = nn.relu(Conv(HEAD_FEATURES, use_bias=True, name="conv_head", **types)(x))
        x = x.reshape(x.shape[0], HEAD_FEATURES)
        maps["head"] = x
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        maps["logits"] = Linear(self.num_classes, name="classifier", **types)(x)
        return maps


FOLDED_TRAINING = (
    "a folded RepGhost model (deploy=True) has no BatchNorm in its fused stage and cannot be "
    "trained; train the training form (deploy=False) and fold it afterwards"
)

MODEL = RepGhostNet

VARIANTS: dict[str, dict[str, Any]] = {
    "repghostnet_0_5x": {"width": 0.5},
    "repghostnet_0_58x": {"width": 0.58},
    "repghostnet_0_8x": {"width": 0.8},
    "repghostnet_1_0x": {"width": 1.0},
    "repghostnet_1_11x": {"width": 1.11},
    "repghostnet_1_3x": {"width": 1.3},
    "repghostnet_1_5x": {"width": 1.5},
    "repghostnet_2_0x": {"width": 2.0},
    "repghostnet_repid_0_5x": {"width": 0.5, "reparam_bn": False, "reparam_identity": True},
    "repghostnet_norep_0_5x": {"width": 0.5, "reparam": False},
    "repghostnet_wo_0_5x": {"width": 0.5, "shortcut": False},
    # timm's names; its keys and shapes equal the official ones.
    "repghostnet_050": {"width": 0.5},
    "repghostnet_058": {"width": 0.58},
    "repghostnet_080": {"width": 0.8},
    "repghostnet_100": {"width": 1.0},
    "repghostnet_111": {"width": 1.11},
    "repghostnet_130": {"width": 1.3},
    "repghostnet_150": {"width": 1.5},
    "repghostnet_200": {"width": 2.0},
}


# Published files hold both; the published accuracies are of the averages.
PREFERRED_WEIGHTS = ("state_dict_ema",)


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """What the naming rule cannot know: a network without a head leaves the head's keys unread."""
    if not getattr(module, "features_only", False):
        return {}
    return {"drops": [rf"(blocks\.{len(STAGES)}|conv_head|classifier)\..*"]}


def check_checkpoint(keys: Iterable[str], module: nn.Module) -> None:
    """Refuse a folded checkpoint for a training-form module and the reverse.

    `keys` are torch names, prefixes unwrapped. Raises ValueError naming the form found and the
    call that converts.
    """
    if not hasattr(module, "deploy"):
        return
    names = {key.rsplit(".", 1)[0] for key in keys}
    folded = any(name.rsplit(".", 1)[-1] == "cheap_operation" for name in names)
    training = any(name.endswith("cheap_operation.0") for name in names)
    if folded and not training and not module.deploy:
        raise ValueError(
            "checkpoint is in folded form (cheap_operation.weight) but the model is in training "
            "form; load it with deploy=True: folding cannot be undone"
        )
    if training and not folded and module.deploy:
        raise ValueError(
            "checkpoint is in training form (cheap_operation.0.weight) but the model is folded "
            "(deploy=True); load it with deploy=False, then call "
            "jaxmodels.vision.repghost.fold(module, variables)"
        )


def fold(module: nn.Module, variables: dict) -> tuple[nn.Module, dict]:
    """The folded module and its variables, equal in evaluation.

    Folds the fusion stage only, as the official `convert_to_deploy`: depthwise BatchNorm, BN
    branch and identity become one depthwise convolution with bias, from running statistics:
    K = t W + centre(t_f [+ 1]), b = beta - mean t + beta_f - mean_f t_f,
    t = gamma / sqrt(var + eps).
    Zero padding makes it exact at borders. A no-op (same objects) on a folded module and on one
    without fusion branches. Works on RepGhostModule, RepGhostBottleneck and RepGhostNet, and on
    any collection that mirrors the parameters (buffers of folded layers are dropped). Traceable.

    Raises ValueError naming the module for kernels that are not 3x3 and for running variances
    that are negative or not finite.
    """
    if not module.has_fusion:
        return module, variables
    identity = module.reparam_identity
    flat = {
        collection: traverse_util.flatten_dict(dict(tree)) for collection, tree in variables.items()
    }
    parents = _parents(flat["params"], "cheap_operation.0")
    fused = {}
    for parent in parents:
        where = ".".join(parent) or type(module).__name__
        kernel = flat["params"][(*parent, "cheap_operation.0", "kernel")]
        if kernel.shape[:2] != (3, 3):
            raise ValueError(
                f"{where}: cannot fold a {kernel.shape[0]}x{kernel.shape[1]} depthwise kernel; "
                "centre padding assumes 3x3"
            )
        weight, bias = _fuse(flat, (*parent, "cheap_operation.1"), kernel)
        if module.reparam_bn:
            centre, shift = _fuse(flat, (*parent, "fusion_bn.0"), jnp.ones_like(kernel[1, 1]))
            weight, bias = weight.at[1, 1].add(centre), bias + shift
        if identity:
            weight = weight.at[1, 1].add(1)
        fused[(*parent, "cheap_operation", "kernel")] = weight.astype(kernel.dtype)
        fused[(*parent, "cheap_operation", "bias")] = bias.astype(kernel.dtype)
    stage = {"cheap_operation.0", "cheap_operation.1", "fusion_bn.0"}
    return module.clone(deploy=True), _rebuild(flat, fused, stage)


def fold_all(module: nn.Module, variables: dict) -> tuple[nn.Module, dict]:
    """Fold every BatchNorm into the convolution before it; not an official checkpoint layout.

    On top of `fold`: primary, strided depthwise, shortcut, stem and last convolutions get a bias
    and lose their BatchNorm, and modules without fusion branches are folded too. For inference
    only; `fold` is what checkpoints are exchanged in. Raises as `fold`.
    """
    if module.fuse_all:
        return module, variables
    module, variables = fold(module, variables)
    flat = {
        collection: traverse_util.flatten_dict(dict(tree)) for collection, tree in variables.items()
    }
    fused, gone = {}, set()
    for path in list(flat["params"]):
        if path[-1] != "scale":
            continue
        norm = path[:-1]
        conv, out = _conv_of_norm(norm)
        kernel = flat["params"][(*conv, "kernel")]
        weight, bias = _fuse(flat, norm, kernel)
        fused[(*out, "kernel")] = weight.astype(kernel.dtype)
        fused[(*out, "bias")] = bias.astype(kernel.dtype)
        gone |= {norm, conv}
    flat = {
        collection: {path: leaf for path, leaf in tree.items() if path[:-1] not in gone}
        for collection, tree in flat.items()
    }
    return module.clone(deploy=True, fuse_all=True), _rebuild(flat, fused, set())


def _conv_of_norm(norm: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of the convolution that a BatchNorm follows, before and after fusing."""
    *parent, name = norm
    stem, _, number = name.rpartition(".")
    if name in ("bn1", "bn_dw"):
        conv = {"bn1": "conv_stem", "bn_dw": "conv_dw"}[name]
    elif name.endswith(".bn1"):
        conv = f"{stem}.conv"
    else:
        conv = f"{stem}.{int(number) - 1}"
    out = "cheap_operation" if conv == "cheap_operation.0" else conv
    return (*parent, conv), (*parent, out)


def _parents(flat: dict, child: str) -> list[tuple[str, ...]]:
    return [path[:-2] for path in flat if path[-2:] == (child, "kernel")]


def _fuse(flat: dict, norm: tuple[str, ...], kernel) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias of `kernel` [..., C] followed by the BatchNorm at `norm`."""
    params, stats = flat["params"], flat["batch_stats"]
    mean, var = stats[(*norm, "mean")], stats[(*norm, "var")]
    if not isinstance(var, jax.core.Tracer):
        values = np.asarray(var)
        if not np.isfinite(values).all() or (values < 0).any() or not np.isfinite(mean).all():
            raise ValueError(
                f"{'.'.join(norm)}: cannot fold, running statistics are negative or not finite"
            )
    # bfloat16 parameters are folded in float32: products of roundings would add up.
    wide = jnp.promote_types(jnp.float32, jnp.asarray(kernel).dtype)
    scale = jnp.asarray(params[(*norm, "scale")], wide)
    multiplier = scale / jnp.sqrt(jnp.asarray(var, wide) + BN_EPSILON)
    shift = jnp.asarray(params[(*norm, "bias")], wide) - jnp.asarray(mean, wide) * multiplier
    return jnp.asarray(kernel, wide) * multiplier, shift


def _rebuild(flat: dict, fused: dict, folded_children: set[str]) -> dict:
    """Variables without the folded children, with the fused leaves; empty collections go."""
    kept = {
        collection: {
            path: leaf for path, leaf in tree.items() if not folded_children & set(path[:-1])
        }
        for collection, tree in flat.items()
    }
    kept["params"] |= fused
    return {
        collection: traverse_util.unflatten_dict(tree)
        for collection, tree in kept.items()
        if tree or collection == "params"
    }
