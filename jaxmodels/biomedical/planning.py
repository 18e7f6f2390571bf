"""nnU-Net's planner: patch size, batch size and network from a data set's shapes and spacings.

After nnunetv2 2.8.1, `experiment_planning/experiment_planners/{network_topology,
default_experiment_planner,residual_unets/residual_encoder_unet_planners}.py` and the memory proxy
of dynamic-network-architectures 0.4.4. Pure integer arithmetic: no accelerator is asked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MIN_EDGE = 4
BASE_FEATURES = 32
MAX_FEATURES = {2: 512, 3: 320}
RESIDUAL_BLOCKS = (1, 3, 4) + (6,) * 17
# Memory proxy at REFERENCE_GB for a batch of REFERENCE_BATCH samples.
REFERENCE = {("plain", 2): 85e6, ("plain", 3): 560e6, ("resenc", 2): 135e6, ("resenc", 3): 680e6}
REFERENCE_GB = 8.0
REFERENCE_BATCH = {2: 12, 3: 2}
MIN_BATCH = 2
MAX_SHARE_OF_DATA = 0.05
ANISOTROPY = 3.0
LOWRES_SHARE = 0.25
LOWRES_STEP = 1.03
# Presets of residual encoders: (kind, memory target in GB, batches are capped by the data).
PRESETS = {
    "default": ("plain", 8.0, True),
    "resenc_m": ("resenc", 9.0, False),
    "resenc_l": ("resenc", 24.0, False),
    "resenc_xl": ("resenc", 40.0, False),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Where a U-Net pools: `strides` and `kernels` [stages][axes], `patch` padded to `divisor`."""

    num_pool: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    patch: tuple[int, ...]
    divisor: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class NetworkPlan:
    """One configuration: patch, batch and network (the constructor arguments of `unet`)."""

    kind: str
    patch_size: tuple[int, ...]
    batch_size: int
    features: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    blocks: tuple[int, ...]
    blocks_decoder: tuple[int, ...]
    estimate: int

    def network(self) -> dict[str, Any]:
        """Constructor arguments of `PlainConvUNet` or `ResidualEncoderUNet`."""
        return {
            "features_per_stage": self.features,
            "kernel_sizes": self.kernels,
            "strides": self.strides,
            "n_conv_per_stage": self.blocks,
            "n_conv_per_stage_decoder": self.blocks_decoder,
        }


def pool_topology(
    spacing: Sequence[float],
    patch: Sequence[int],
    min_edge: int = MIN_EDGE,
    max_num_pool: int = 999999,
) -> Topology:
    """Strides and kernels for a patch: coarse axes wait until the fine ones have caught up.

    Args:
      spacing: mm per axis. patch: voxels per axis (halves of an even number's median stay).
      min_edge: the smallest edge of a feature map, in voxels.
    """
    dims = len(spacing)
    current, size = [float(s) for s in spacing], [float(p) for p in patch]
    strides, kernels = [(1,) * dims], []
    pools, kernel = [0] * dims, [1] * dims
    while True:
        valid = [i for i in range(dims) if size[i] >= 2 * min_edge]
        if not valid:
            break
        finest = min(current[i] for i in valid)
        valid = [i for i in valid if current[i] / finest < 2 and pools[i] < max_num_pool]
        if not valid or (len(valid) == 1 and size[valid[0]] < 3 * min_edge):
            break
        for d in range(dims):
            # Once an axis has a kernel of 3 it keeps it.
            if current[d] / min(current) < 2:
                kernel[d] = 3
        for i in valid:
            pools[i] += 1
            current[i] *= 2
            size[i] = math.ceil(size[i] / 2)
        strides.append(tuple(2 if i in valid else 1 for i in range(dims)))
        kernels.append(tuple(kernel))
    kernels.append((3,) * dims)
    divisor = tuple(2**p for p in pools)
    padded = tuple(math.ceil(p / d) * d for p, d in zip(patch, divisor))
    return Topology(tuple(pools), tuple(strides), tuple(kernels), padded, divisor)


def features_of(
    stages: int, dims: int, base: int = BASE_FEATURES, cap: int | None = None
) -> tuple[int, ...]:
    """Channels of every stage: doubled from `base`, capped (512 in 2-D, 320 in 3-D)."""
    cap = MAX_FEATURES[dims] if cap is None else cap
    return tuple(min(cap, base * 2**i) for i in range(stages))


def feature_map_size(
    patch: Sequence[int],
    strides: Sequence[Sequence[int]],
    features: Sequence[int],
    blocks: Sequence[int],
    blocks_decoder: Sequence[int],
    classes: int,
    *,
    residual: bool = False,
    deep_supervision: bool = False,
) -> int:
    """Channels times voxels over the output of every convolution of one sample.

    The planner's proxy for memory. Norms and activations do not count. `blocks` are convolutions
    (or residual blocks) a stage, `blocks_decoder` convolutions from the deepest decoder stage up.
    """
    size, sizes, total = [int(p) for p in patch], [], 0
    if residual:
        total += features[0] * math.prod(size)
    before = features[0]
    for stride, width, count in zip(strides, features, blocks):
        size = [n // s for n, s in zip(size, stride)]
        sizes.append(list(size))
        output = width * math.prod(size)
        if residual:
            projected = before != width or any(s != 1 for s in stride)
            total += output * (2 * count + (1 if projected else 0))
        else:
            total += output * count
        before = width
    levels = len(features) - 1
    for k in range(levels):
        level = levels - 1 - k
        voxels = math.prod(sizes[level])
        total += features[level] * voxels * (blocks_decoder[k] + 1)
        if deep_supervision or level == 0:
            total += classes * voxels
    return int(total)


def parameter_count(
    channels: int,
    classes: int,
    features: Sequence[int],
    strides: Sequence[Sequence[int]],
    kernels: Sequence[Sequence[int]],
    blocks: Sequence[int],
    blocks_decoder: Sequence[int],
    *,
    residual: bool = False,
) -> int:
    """Number of parameters of the network, each counted once, segmentation layers included."""
    import jax

    from jaxmodels.biomedical import unet

    module = (unet.ResidualEncoderUNet if residual else unet.PlainConvUNet)(
        input_channels=channels,
        num_classes=classes,
        features_per_stage=tuple(features),
        kernel_sizes=tuple(map(tuple, kernels)),
        strides=tuple(map(tuple, strides)),
        n_conv_per_stage=tuple(blocks),
        n_conv_per_stage_decoder=tuple(blocks_decoder),
    )
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _blocks(kind: str, stages: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if kind == "plain":
        return (2,) * stages, (2,) * (stages - 1)
    return RESIDUAL_BLOCKS[:stages], (1,) * (stages - 1)


def initial_patch(spacing: Sequence[float], median_shape: Sequence[float]) -> list[float]:
    """The aspect ratio of 1 / spacing at 256^3 (3-D) or 2048^2 (2-D) voxels, clipped."""
    dims = len(spacing)
    target = {2: 2048**2, 3: 256**3}[dims]
    ratio = 1 / np.asarray(spacing, np.float64)
    scaled = ratio * (target / ratio.prod()) ** (1 / dims)
    return [min(round(float(s)), m) for s, m in zip(scaled, median_shape)]


def plan_network(
    spacing: Sequence[float],
    median_shape: Sequence[float],
    *,
    channels: int,
    classes: int,
    dataset_voxels: float,
    kind: str = "plain",
    memory_gb: float = REFERENCE_GB,
    cap_batch: bool = True,
    base_features: int = BASE_FEATURES,
    min_edge: int = MIN_EDGE,
) -> NetworkPlan:
    """The plan of one configuration.

    Args:
      spacing: mm per axis, already transposed (2 or 3 axes). median_shape: voxels per axis at
        that spacing.
      channels: of the image. It does not enter the memory proxy.
      classes: output channels, background included.
      dataset_voxels: voxels of all training cases together.
      kind: `plain` or `resenc`. memory_gb: target of the memory proxy.
      cap_batch: batches hold at most 5 % of all voxels (off in the residual presets).
      base_features: channels of the first stage.

    Raises ValueError: unknown kind, spacings that are not positive, another number of axes.
    """
    del channels
    spacing = [float(s) for s in spacing]
    dims = len(spacing)
    if dims not in (2, 3) or len(median_shape) < dims:
        raise ValueError(f"plans are for 2 or 3 axes, got spacing {spacing}, shape {median_shape}")
    if not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing {spacing} must be positive")
    if kind not in ("plain", "resenc"):
        raise ValueError(f"kind {kind!r} is not one of plain, resenc")
    median_shape = [float(m) for m in median_shape[:dims]]

    def evaluate(patch):
        topology = pool_topology(spacing, patch, min_edge)
        features = features_of(len(topology.strides), dims, base_features)
        blocks, decoder = _blocks(kind, len(features))
        estimate = feature_map_size(
            topology.patch,
            topology.strides,
            features,
            blocks,
            decoder,
            classes,
            residual=kind == "resenc",
        )
        return topology, features, blocks, decoder, estimate

    topology, features, blocks, decoder, estimate = evaluate(initial_patch(spacing, median_shape))
    reference = REFERENCE[kind, dims] * memory_gb / REFERENCE_GB
    batch = REFERENCE_BATCH[dims]
    # The plain network's 2-D reference is of a larger batch; the residual planner overlooks that.
    samples = batch if kind == "plain" else MIN_BATCH
    while estimate / samples * MIN_BATCH > reference:
        ratios = [p / m for p, m in zip(topology.patch, median_shape)]
        axis = int(np.argsort(ratios)[-1])
        tentative = list(topology.patch)
        tentative[axis] -= topology.divisor[axis]
        # The divisor may shrink with the axis: subtracting the old one would skip valid sizes.
        divisor = pool_topology(spacing, tentative, min_edge).divisor
        smaller = list(topology.patch)
        smaller[axis] -= divisor[axis]
        if smaller[axis] < 1:
            raise ValueError(f"no patch fits {memory_gb} GB")
        topology, features, blocks, decoder, estimate = evaluate(smaller)
    size = round(reference / estimate * batch)
    if cap_batch:
        voxels = math.prod(float(p) for p in topology.patch)
        size = min(size, round(dataset_voxels * MAX_SHARE_OF_DATA / voxels))
    return NetworkPlan(
        kind=kind,
        patch_size=topology.patch,
        batch_size=max(size, MIN_BATCH),
        features=features,
        strides=topology.strides,
        kernels=topology.kernels,
        blocks=blocks,
        blocks_decoder=decoder,
        estimate=estimate,
    )


def target_spacing(spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]]):
    """Median spacing of the cases; a much coarser axis takes its 10th percentile.

    The coarsest axis counts as much coarser when its spacing is more than 3 times every other
    and its median size, times 3, below every other. Arrays [cases, axes] -> [axes], mm.
    """
    spacings, shapes = np.asarray(spacings, np.float64), np.asarray(shapes, np.float64)
    target, sizes = np.median(spacings, 0), np.median(shapes, 0)
    worst = int(np.argmax(target))
    others = [i for i in range(len(target)) if i != worst]
    if others and (
        target[worst] > ANISOTROPY * max(target[others])
        and sizes[worst] * ANISOTROPY < min(sizes[others])
    ):
        chosen = np.percentile(spacings[:, worst], 10)
        if chosen < max(target[others]):
            chosen = max(target[others]) + 1e-5
        target[worst] = chosen
    return target


def coarsest_axis_first(spacing: Sequence[float]) -> tuple[int, ...]:
    """The transposition that puts the coarsest axis first and leaves the others in order."""
    worst = int(np.argmax(spacing))
    return (worst, *(i for i in range(len(spacing)) if i != worst))


def resampled_shape(
    shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> tuple[int, ...]:
    """Voxels per axis after resampling, rounded half to even."""
    return tuple(int(round(s * n / float(o))) for s, n, o in zip(spacing, shape, new_spacing))


def plan_lowres(
    spacing: Sequence[float],
    median_shape: Sequence[int],
    fullres: NetworkPlan,
    *,
    dataset_voxels: float,
    share: float = LOWRES_SHARE,
    **arguments: Any,
) -> tuple[NetworkPlan, tuple[float, ...], tuple[int, ...]] | None:
    """(plan, spacing, median shape) of `3d_lowres`, or None when none is wanted.

    One is wanted when a patch of the full resolution holds less than `share` (a quarter) of the
    median case. Spacing grows by 3 % at a time, first along axes more than twice finer than the
    coarsest, until a patch holds that share; more than half of the full resolution's voxels is no
    use. Remaining arguments are those of `plan_network`.
    """
    current = np.array(spacing, np.float64)
    full = float(np.prod(np.asarray(median_shape, np.float64)))
    plan, voxels, small = None, full, np.asarray(median_shape, np.float64)
    in_patch = math.prod(fullres.patch_size)
    while in_patch / voxels < share:
        finer = current.max() / current > 2
        current[finer if finer.any() else slice(None)] *= LOWRES_STEP
        small = np.asarray(spacing) / current * np.asarray(median_shape)
        voxels = float(np.prod(small))
        plan = plan_network(
            current,
            [round(float(n)) for n in small],
            dataset_voxels=dataset_voxels * voxels / full,
            **arguments,
        )
        in_patch = math.prod(plan.patch_size)
    if plan is None or full / voxels < 2:
        return None
    return plan, tuple(float(s) for s in current), tuple(round(float(n)) for n in small)


def uses_batch_dice(configuration: str, lowres_exists: bool) -> bool:
    """Whether Dice adds up the batch: in 2-D, and at full resolution beside a low resolution."""
    return configuration.startswith("2") or (configuration == "3d_fullres" and lowres_exists)
