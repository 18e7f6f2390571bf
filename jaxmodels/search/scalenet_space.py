"""ScaleNet's search space: encoding, repair, depth scaling, FLOPs, admissible scalings.

J. Xie et al., "ScaleNet: Searching for the Model to Scale", ECCV 2022, arXiv 2207.07267. Facts of
the encoding and of the counter are those of luminolx/ScaleNet@22487c8
(core/search_space, core/sampler/evolution/evolution_sampler.py, core/utils/flops.py).

A network is one op index per choice block (op 0 is the identity), followed by a width multiplier
and a resolution. Everything here is NumPy on the host, in whole numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.search.choice_blocks import ChoiceBlock, op_cost, parse_ops

OPS = ["id", "ir_3x3_se", "ir_5x5_se", "ir_7x7_se"]
FIXED_STAGES = ("conv_stem", "conv_out")


def backbone(
    channels: Sequence[int],
    depths: Sequence[int] = (1, 4, 4, 4, 4, 4, 1),
    strides: Sequence[int] = (1, 2, 2, 2, 1, 2, 1),
    expansion: int = 6,
    out: int = 1280,
    ops: Sequence[str] = tuple(OPS),
) -> dict[str, Any]:
    """The official configuration form for stem and stage widths `channels` and a last 1x1 `out`.

    The first stage does not expand; the form is `[n, stride, c_in, c_out, expansions, unused, ops]`
    by stage, in the order in which the choice blocks stand.
    """
    stages: dict[str, Any] = {
        "conv_stem": [1, 2, 3, channels[0], [], False, ["conv3x3"]],
    }
    for i, (n, stride) in enumerate(zip(depths, strides)):
        t = 1 if i == 0 else expansion
        expansions = [[1], *([t] for _ in ops[1:])]
        stages[f"stage{i + 1}"] = [
            *(n, stride, channels[i], channels[i + 1], expansions, False),
            list(ops),
        ]
    stages["conv_out"] = [1, 1, channels[-1], out, [], False, ["conv2d"]]
    return {**stages, "final_pooling": True}


PUBLISHED_BACKBONE = backbone((32, 16, 32, 40, 80, 96, 192, 320))
PUBLISHED_HEAD = {"linear1": {"dim_in": 1280, "dim_out": 1000}}
PUBLISHED_MULTIPLIERS = (
    (1.0,),
    (1.04, 1.08, 1.12, 1.16),
    (1.2, 1.24, 1.28, 1.32, 1.36),
    (1.4, 1.44, 1.48, 1.52, 1.56, 1.6, 1.64),
)
PUBLISHED_RESOLUTIONS = ((224,), (224, 240, 256), (272, 288, 304), (320, 336, 354))

# For digits: four stages instead of seven, which halves compilation, and the published resolutions
# divided by 14.
DIGITS = {
    "backbone": backbone(
        (8, 8, 12, 16, 24), (1, 3, 3, 1), (1, 2, 2, 1), 3, 48, ("id", "ir_3x3_se", "ir_5x5_se")
    ),
    "head": {"linear1": {"dim_in": 48, "dim_out": 10}},
}
DIGITS_RESOLUTIONS = ((16,), (16, 17, 18), (19, 20, 21), (23, 24, 25))


def _check_multipliers(name: str, lists: Sequence[Sequence[float]], stages: int) -> None:
    if stages < 0:
        raise ValueError(f"max_scaling_stage {stages} must be at least 0")
    if stages >= len(lists):
        raise ValueError(
            f"max_scaling_stage {stages} is beyond the {len(lists)} lists of {name} (0..stage)"
        )
    for s, values in enumerate(lists):
        if not len(values):
            raise ValueError(f"{name}[{s}] is empty")
        if any(b <= a for a, b in itertools.pairwise(values)):
            raise ValueError(f"{name}[{s}] {list(values)} must ascend")
        if not values[0] > 0:
            raise ValueError(f"{name}[{s}] {list(values)} must be positive")


@dataclasses.dataclass(frozen=True)
class Space:
    """A ScaleNet space; build it with `make_space`.

    Attributes:
      blocks: the choice blocks of the backbone, in order.
      genes: all genes, the pooling's and the linear layers' (always 0) among them.
      depth_stage: `(base depth, depth of the super-supernet)` of every stage, these included.
      depths, widths, resolutions: multipliers by scaling stage 0..max_scaling_stage.
      linear: `(name, dim_in, dim_out)` of the head's layers.
      base_resolution: that of the base model, which scaling stage 0 is.
    """

    blocks: tuple[ChoiceBlock, ...]
    depth_stage: tuple[tuple[int, int], ...]
    depths: tuple[tuple[float, ...], ...]
    widths: tuple[tuple[float, ...], ...]
    resolutions: tuple[tuple[int, ...], ...]
    max_scaling_stage: int
    linear: tuple[tuple[str, int, int], ...]
    base_resolution: int

    @property
    def genes(self) -> int:
        """Length of an encoding without width and resolution."""
        return sum(n for _, n in self.depth_stage)

    @property
    def max_width(self) -> float:
        """The largest width multiplier, for which the weights are built."""
        return max(self.widths[self.max_scaling_stage])

    @property
    def op_counts(self) -> np.ndarray:
        """Number of ops of every gene, int64 [genes]."""
        counts = [len(b.ops) for b in self.blocks]
        return np.array(counts + [1] * (self.genes - len(counts)))

    def stage_slices(self) -> list[tuple[int, int, int]]:
        """`(first gene, base depth, depth)` of every stage."""
        starts = np.cumsum([0, *(n for _, n in self.depth_stage)])
        return [(int(s), b, n) for s, (b, n) in zip(starts, self.depth_stage)]

    # Encodings

    def check_ops(self, ops: Any, holes: bool = False) -> np.ndarray:
        """`ops` [genes] or [N, genes] as int64, legal for a sub-network.

        Raises ValueError: wrong length, an index out of range, and unless `holes`, as the official
        repair may leave them, an identity at the first block of a stage or before another
        operation of the stage (`repair` mends both).
        """
        ops = np.asarray(ops, np.int64)
        if ops.ndim not in (1, 2) or ops.shape[-1] != self.genes:
            raise ValueError(
                f"a sub-network has {self.genes} op indices (and then width and resolution), "
                f"not {ops.shape[-1] if ops.ndim else ops}"
            )
        rows, counts = ops.reshape(-1, self.genes), self.op_counts
        for row, i in np.argwhere((rows < 0) | (rows >= counts)):
            raise ValueError(
                f"{self.gene_name(i)}: op index {rows[row, i]} is not in 0..{counts[i] - 1}"
            )
        for first, _, depth in () if holes else self.stage_slices():
            if first >= len(self.blocks) or self.blocks[first].ops[0].kind != "identity":
                continue
            active = rows[:, first : first + depth] > 0
            if not active[:, 0].all():
                raise ValueError(
                    f"{self.gene_name(first)}: the first block of a stage cannot be the identity "
                    "(Space.repair makes it op 1; holes=True takes it as it is)"
                )
            left_out = (active[:, 1:] & ~active[:, :-1]).any(0)
            if left_out.any():
                raise ValueError(
                    f"{self.gene_name(first + int(left_out.argmax()))}: an identity stands before "
                    "another operation of its stage (Space.repair moves it behind; holes=True "
                    "takes it as it is)"
                )
        return ops

    def check_subnet(self, subnet: Sequence[float]) -> tuple[np.ndarray, float, int]:
        """`(ops, width, resolution)` of an encoding; ValueError when it is not legal here."""
        if len(subnet) != self.genes + 2:
            raise ValueError(
                f"a sub-network has {self.genes} + 2 entries (op indices, width, resolution), "
                f"not {len(subnet)}"
            )
        width = float(subnet[-2])
        self.check_width(width)
        return self.check_ops([int(v) for v in subnet[:-2]]), width, int(subnet[-1])

    def check_stage(self, stage: int) -> None:
        """ValueError for a scaling stage that this space does not have."""
        if not 0 <= stage <= self.max_scaling_stage:
            raise ValueError(f"scaling stage {stage} is not in 0..{self.max_scaling_stage}")

    def check_width(self, width: float) -> None:
        """ValueError when the weights are not wide enough for a multiplier."""
        if not 0 < width <= self.max_width + 1e-6:
            raise ValueError(
                f"width multiplier {width:g} would exceed {self.max_width:g}, for which the "
                "super-supernet is built"
                if width > 0
                else f"width multiplier {width:g} must be positive"
            )

    def gene_name(self, index: int) -> str:
        """`stage3[2]` of a gene's number."""
        if index < len(self.blocks):
            block = self.blocks[index]
            return f"{block.stage}[{block.position}]"
        return f"gene {index}"

    def repair(self, ops: Sequence[int], mode: str = "official") -> np.ndarray:
        """Base genes made legal, int64 [genes].

        "official" is the published scan: of stages with base depth over 1 the first identity
        becomes op 1; going right, the next operation is swapped with the identity met before it,
        and then the memory of identities starts empty (so (1,0,1,1) becomes (1,1,0,1): a hole can
        stay). "stable" moves all operations in front. Positions beyond the base depth are cleared.
        """
        if mode not in ("official", "stable"):
            raise ValueError(f"repair mode {mode!r}; known: official, stable")
        ops = np.array(ops, np.int64)
        for first, base, depth in self.stage_slices():
            if base != depth:
                ops[first + base : first + depth] = 0
            if base <= 1:
                continue
            part = ops[first : first + base]
            if part[0] == 0:
                part[0] = 1
            if mode == "stable":
                part[:] = np.concatenate([part[part > 0], part[part == 0]])
                continue
            hole = -1
            for j in range(base):
                if part[j] > 0 and hole >= 0:
                    part[hole], part[j] = part[j], 0
                    hole = -1
                elif part[j] == 0 and hole < 0:
                    hole = j
        return ops

    def scale_depth(self, base: Sequence[int], depth: float) -> np.ndarray:
        """Repeats the last operation of every stage up to `ceil(n_b depth)` blocks.

        n_b counts the leading operations; the positions n_b .. ceil(n_b d) - 1 are overwritten
        and all others keep their value.
        """
        ops = np.array(base, np.int64)
        for first, base_depth, full_depth in self.stage_slices():
            if full_depth == 1:
                continue
            part = ops[first : first + full_depth]
            holes = np.flatnonzero(part[:base_depth] == 0)
            leading = int(holes[0]) if holes.size else base_depth
            end = math.ceil(leading * depth)
            part[leading:end] = part[leading - 1] if leading else 0
        return ops

    def multipliers(self, stage: int, indices: Sequence[int]) -> tuple[float, float, int]:
        """`(depth, width, resolution)` of a scaling stage's index triple; stage 0 is the base.

        Raises ValueError for a stage or an index that is not there.
        """
        self.check_stage(stage)
        if stage == 0:
            return 1.0, 1.0, self.base_resolution
        names, lists = (
            ("depth", "width", "resolution"),
            (self.depths, self.widths, self.resolutions),
        )
        if len(indices) != 3:
            raise ValueError(f"a scaling has 3 indices ({', '.join(names)}), not {len(indices)}")
        d, w, r = (int(i) for i in indices)
        for name, values, i in zip(names, lists, (d, w, r)):
            if not 0 <= i < len(values[stage]):
                raise ValueError(
                    f"{name} index {i} of stage {stage} is not in 0..{len(values[stage]) - 1}"
                )
        return self.depths[stage][d], self.widths[stage][w], self.resolutions[stage][r]

    def scaled(
        self, base: Sequence[int], stage: int, indices: Sequence[int], repair: str = "official"
    ) -> tuple[np.ndarray, float, int]:
        """`(ops, width, resolution)` of a base model under one scaling, repaired first."""
        depth, width, resolution = self.multipliers(stage, indices)
        return self.scale_depth(self.repair(base, repair), depth), width, resolution

    # FLOPs

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - spaces are few and live as long as a run
    def cost_table(self, width: float, resolution: int, passed: int = 1) -> np.ndarray:
        """Multiply-adds of every (gene, op), int64 [genes, most ops], by the official counter.

        Its departures from the forward pass are kept: hidden widths are `round(ceil(c_in w) t)`, a
        stride 2 halves by floor, and an identity passes its map on unstrided. `passed`: product of
        the strides that identities before a gene left out. Ops that a block does not have cost 0.
        """
        table = np.zeros((self.genes, int(self.op_counts.max())), np.int64)
        strides = 1
        for i, block in enumerate(self.blocks):
            inp, out = block.input_width(width), block.output_width(width)
            # Halving by floor again and again is one division by floor.
            size = resolution * passed // strides
            strides *= block.stride
            after = resolution * passed // strides
            for j, op in enumerate(block.ops):
                table[i, j] = op_cost(op, inp, out, size, after)
        start = self.genes - len(self.linear)
        for i, (_, dim_in, dim_out) in enumerate(self.linear):
            table[start + i, 0] = dim_in * dim_out
        return table

    def flops(self, ops: Any, width: Any = 1.0, resolution: Any = None, holes: bool = False) -> Any:
        """Multiply-adds of sub-networks: ops [genes] -> int, ops [N, genes] -> int64 [N].

        Raises ValueError for what `check_ops` refuses.
        """
        ops = self.check_ops(ops, holes)
        resolution = self.base_resolution if resolution is None else resolution
        if ops.ndim == 1:
            return int(self._costs(ops[None], float(width), int(resolution))[0])
        widths = np.broadcast_to(np.asarray(width, np.float64), len(ops))
        resolutions = np.broadcast_to(np.asarray(resolution, np.int64), len(ops))
        total = np.zeros(len(ops), np.int64)
        pairs, which = np.unique(
            np.stack([widths, resolutions.astype(np.float64)], 1), axis=0, return_inverse=True
        )
        for k, (w, r) in enumerate(pairs):
            rows = np.flatnonzero(which.ravel() == k)
            total[rows] = self._costs(ops[rows], float(w), int(r))
        return total

    def _costs(self, ops: np.ndarray, width: float, resolution: int) -> np.ndarray:
        """Multiply-adds of ops [N, genes] at one width and resolution, int64 [N]."""
        places = np.arange(self.genes)
        # A stage of base depth 1 may begin with its identity: no repair changes it.
        strided = {
            i: [j for j, op in enumerate(block.ops) if op.kind == "identity"]
            for i, block in enumerate(self.blocks)
            if block.stride > 1
        }
        passed = np.ones_like(ops)
        for i, identities in strided.items():
            left_out = np.isin(ops[:, i], identities)
            passed[left_out, i + 1 :] *= self.blocks[i].stride
        total = np.zeros(len(ops), np.int64)
        for factor in np.unique(passed).tolist():
            costs = self.cost_table(width, resolution, factor)[places, ops]
            total += np.where(passed == factor, costs, 0).sum(1)
        return total

    def is_admissible(
        self, bases: Sequence[Sequence[int]], stage: int, indices: Sequence[int], error: float
    ) -> bool:
        """Whether the mean over base models of |2^s F(base) - F(scaled)| is at most `error` 2^s."""
        return self._distance(bases, stage, indices) <= error * 2**stage

    def _distance(self, bases, stage, indices) -> float:
        factor = 2**stage
        gaps = []
        for base in bases:
            ops, width, resolution = self.scaled(base, stage, indices)
            found = self.flops(ops, width, resolution, holes=True)
            gaps.append(abs(factor * self.flops(base, holes=True) - found))
        return sum(gaps) / len(gaps)

    def scalings(self, stage: int) -> list[tuple[int, int, int]]:
        """Every (depth, width, resolution) index triple of a stage, in lexicographic order."""
        self.check_stage(stage)
        shape = (len(self.depths[stage]), len(self.widths[stage]), len(self.resolutions[stage]))
        return [tuple(int(i) for i in index) for index in np.ndindex(*shape)]

    def admissible(
        self, bases: Sequence[Sequence[int]], stage: int, error: float
    ) -> list[tuple[int, int, int]]:
        """The scalings of a stage that keep to its budget for these base models."""
        return [t for t in self.scalings(stage) if self.is_admissible(bases, stage, t, error)]

    # Random base models

    def base_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound of every gene of a base model, int64 [genes] each."""
        low = np.zeros(self.genes, np.int64)
        high = self.op_counts - 1
        for first, base, depth in self.stage_slices():
            if base == depth == 1:
                high[first] = 0
                continue
            low[first] = 1
            high[first + base : first + depth] = 0
        return low, high

    def random_base(self, rng: np.random.Generator) -> np.ndarray:
        """A base model with uniform ops and uniform depths, int64 [genes]."""
        counts = self.op_counts
        ops = np.where(counts > 1, 1 + (rng.random(self.genes) * (counts - 1)).astype(int), 0)
        for first, base, depth in self.stage_slices():
            if base != depth:
                ops[first + int(rng.integers(1, base + 1)) : first + depth] = 0
        return ops

    def random_base_within(
        self, rng: np.random.Generator, budget: float, error: float, tries: int = 20000
    ) -> np.ndarray:
        """A random base model with |FLOPs - budget| <= error, by rejection.

        Raises RuntimeError with the range of FLOPs seen when `tries` draws all miss.
        """
        seen = []
        for _ in range(tries):
            base = self.random_base(rng)
            flops = self.flops(base, holes=True)
            if abs(flops - budget) <= error:
                return base
            seen.append(flops)
        raise RuntimeError(
            f"none of {tries} random base models lies within {error:,.0f} of {budget:,.0f} "
            f"multiply-adds; they have {min(seen):,} to {max(seen):,}"
        )

    def smallest_and_largest(self) -> tuple[np.ndarray, np.ndarray]:
        """The cheapest and the dearest base model by the counter."""
        table = self.cost_table(1.0, self.base_resolution)
        low, high = self.base_bounds()
        small, large = np.zeros(self.genes, np.int64), np.zeros(self.genes, np.int64)
        for i in range(self.genes):
            real = range(max(1, int(low[i])), int(high[i]) + 1) if high[i] else [0]
            large[i] = max(real, key=lambda j: table[i, j])
            small[i] = min(real, key=lambda j: table[i, j]) if low[i] else 0
        return small, large

    # What HSS can draw

    def scaling_stage_of(self, width: float, resolution: int, first: int = 0) -> int:
        """The stage that has this width (float32 or wider) and resolution; ValueError if none.

        Where several have, `first` if it is one of them, the smallest otherwise.
        """
        for s in (int(first), *range(self.max_scaling_stage + 1)):
            widths = np.asarray(self.widths[s])
            near = np.isclose(widths, width, rtol=1e-6, atol=0).any()
            if near and int(resolution) in self.resolutions[s]:
                return s
        raise ValueError(
            f"no scaling stage has width {width:g} and resolution {resolution}; widths "
            f"{list(self.widths)}, resolutions {list(self.resolutions)}"
        )

    def resample(self, ops: Sequence[int], stage: int) -> np.ndarray:
        """The sub-network that HSS's rule makes of its own base part, int64 [genes].

        Finds base depths and a depth multiplier of the stage under which `ops` is a base model
        with its last operation repeated, and builds it again from these.

        Raises ValueError when `ops` is no draw of hierarchical sampling.
        """
        self.check_stage(stage)
        ops = self.check_ops(ops)
        for depth in self.depths[stage]:
            base = ops.copy()
            for first, most, full in self.stage_slices():
                if full == 1:
                    continue
                total = int((ops[first : first + full] > 0).sum())
                fits = [
                    n
                    for n in range(1, most + 1)
                    if math.ceil(n * depth) == total
                    and (ops[first + n - 1 : first + total] == ops[first + n - 1]).all()
                ]
                if not fits:
                    break
                base[first + fits[-1] : first + full] = 0
            else:
                return self.scale_depth(base, depth)
        raise ValueError(f"no depth multiplier of stage {stage} makes {ops.tolist()}")


def _plain(value):
    """Frozen and config dictionaries as dicts, other sequences as lists."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return dict(value) if isinstance(value, Mapping) else list(value)


@functools.lru_cache(maxsize=64)
def _cached_space(text: str) -> Space:
    return _make_space(**json.loads(text))


def make_space(
    backbone: Mapping[str, Any] | None = None,
    head: Mapping[str, Any] | None = None,
    depth_multiplier: Sequence[Sequence[float]] = PUBLISHED_MULTIPLIERS,
    channel_multiplier: Sequence[Sequence[float]] = PUBLISHED_MULTIPLIERS,
    resolution_multiplier: Sequence[Sequence[int]] = PUBLISHED_RESOLUTIONS,
    max_scaling_stage: int = 3,
    base_resolution: int | None = None,
) -> Space:
    """The space of a configuration in the official form; the published one by default.

    Args:
      backbone: stage name -> `[n, stride, c_in, c_out, expansion per op, unused, op names]`, and
        `final_pooling`. head: name -> `{"dim_in", "dim_out"}`.
      base_resolution: of the base model; None is the first of stage 0. The official search has 224
        whatever the list says.

    Raises ValueError: unknown ops, unsorted or empty multipliers, `max_scaling_stage` beyond them.
    """
    plain = json.dumps(
        {
            "backbone": backbone if backbone is not None else PUBLISHED_BACKBONE,
            "head": head if head is not None else PUBLISHED_HEAD,
            "depth_multiplier": depth_multiplier,
            "channel_multiplier": channel_multiplier,
            "resolution_multiplier": resolution_multiplier,
            "max_scaling_stage": max_scaling_stage,
            "base_resolution": base_resolution,
        },
        default=_plain,
    )
    return _cached_space(plain)


def _make_space(
    backbone, head, depth_multiplier, channel_multiplier, resolution_multiplier,
    max_scaling_stage, base_resolution,
) -> Space:  # fmt: skip
    lists = {
        "depth_multiplier": depth_multiplier,
        "channel_multiplier": channel_multiplier,
        "resolution_multiplier": resolution_multiplier,
    }
    for name, values in lists.items():
        _check_multipliers(name, values, max_scaling_stage)
    if not backbone.get("final_pooling"):
        raise ValueError("backbone.final_pooling must be true: the head takes pooled features")
    widest = max(channel_multiplier[max_scaling_stage])
    deepest = max(depth_multiplier[max_scaling_stage])
    blocks: list[ChoiceBlock] = []
    depth_stage = []
    for stage in _in_order(backbone):
        entry = backbone[stage]
        n, stride, base_in, base_out, expansions, _, names = entry
        scaled_in, scaled_out = stage != "conv_stem", stage != "conv_out"
        full_in = math.ceil(base_in * widest) + base_in if scaled_in else base_in
        full_out = math.ceil(base_out * widest) + base_out if scaled_out else base_out
        ops = parse_ops(stage, names, expansions)
        depth = n if stage in FIXED_STAGES else math.ceil(n * deepest)
        for i in range(depth):
            blocks.append(
                ChoiceBlock(
                    *(stage, i, stride if i == 0 else 1, base_in, base_out, full_in, full_out),
                    *(scaled_in, scaled_out, ops),
                )
            )
            base_in, full_in, scaled_in = base_out, full_out, scaled_out
        depth_stage.append((n, depth))
    linear = tuple((name, fc["dim_in"], fc["dim_out"]) for name, fc in head.items())
    depth_stage += [(1, 1)] * (1 + len(linear))

    def fixed(values):
        return tuple(tuple(v) for v in values)

    return Space(
        *(tuple(blocks), tuple(depth_stage)),
        *(fixed(depth_multiplier), fixed(channel_multiplier), fixed(resolution_multiplier)),
        *(max_scaling_stage, linear, base_resolution or resolution_multiplier[0][0]),
    )


def _in_order(backbone: Mapping[str, Any]) -> list[str]:
    """Stage names in the order of the data flow, which a config's sorted keys have lost."""
    stages = [name for name in backbone if name != "final_pooling"]
    inner = [name for name in stages if name not in FIXED_STAGES]
    if all(re.fullmatch(r"stage\d+", name) for name in inner):
        inner.sort(key=lambda name: int(name[len("stage") :]))
    ends = [[name for name in stages if name == end] for end in FIXED_STAGES]
    return [*ends[0], *inner, *ends[1]]
