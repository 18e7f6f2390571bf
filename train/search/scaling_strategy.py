"""Carrying ScaleNet's found scaling on to larger budgets (our reading; the paper's formula is not
in the public abstract).

Stage s has the budget 2^s F0. For depth, width and r / r0 apart, ln m(s) is fitted through the
origin by least squares over the searched stages ("linear" in s, or "quadratic"), predicted for
s = 4, 5, ..., and one common exponent lambda then brings the network to 2^s F(base).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxmodels.search.scalenet_space import Space

AXES = ("depth", "width", "resolution")
# Forms of ln m(s) and their degrees in s, which as many searched stages determine.
FORMS = {"linear": 1, "quadratic": 2}
RESOLUTION_STEP = 16
_BISECTIONS = 60


class Strategy(NamedTuple):
    """Coefficients of ln m(s) = sum_k a_k s^(k+1) by axis, [3, 1 or 2]."""

    coefficients: np.ndarray

    def multipliers(self, stage: float) -> np.ndarray:
        """Depth, width and resolution multipliers of a stage, [3]."""
        powers = stage ** np.arange(1, self.coefficients.shape[1] + 1)
        return np.exp(self.coefficients @ powers)


class Scaled(NamedTuple):
    """A network of a stage: its multipliers, ops by stage, and multiply-adds by the counter."""

    depth: float
    width: float
    resolution: int
    stages: tuple[tuple[int, ...], ...]
    flops: int
    exponent: float


def fit(searched: Mapping[int, Sequence[float]], form: str = "linear") -> Strategy:
    """The strategy of searched stages: stage -> (depth, width, r / r0) multipliers.

    Raises ValueError for another form, no stage, or too few stages for a quadratic.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r}; known: {', '.join(FORMS)}")
    stages = np.array(sorted(searched), float)
    if len(stages) < FORMS[form]:
        raise ValueError(f"a {form} fit needs {FORMS[form]} searched stages, not {len(stages)}")
    powers = stages[:, None] ** np.arange(1, FORMS[form] + 1)
    logs = np.log(np.array([searched[int(s)] for s in stages], float))
    return Strategy(np.linalg.lstsq(powers, logs, rcond=None)[0].T)


def deepened(space: Space, base: Sequence[int], depth: float) -> tuple[tuple[int, ...], ...]:
    """Ops by stage with the last operation repeated to `ceil(n_b depth)`, of any depth."""
    out = []
    for first, most, full in space.stage_slices():
        part = [int(v) for v in base[first : first + most]]
        leading = next((i for i, v in enumerate(part) if v == 0), most)
        if full > 1 and leading:
            part = part[:leading] + [part[leading - 1]] * (math.ceil(leading * depth) - leading)
        out.append(tuple(part))
    return tuple(out)


def flops(space: Space, stages: Sequence[Sequence[int]], width: float, resolution: int) -> int:
    """Multiply-adds by the official counter of stages of any depth."""
    table = space.cost_table(float(width), int(resolution))
    total = 0
    for (first, _, full), ops in zip(space.stage_slices(), stages):
        for position, op in enumerate(ops):
            total += int(table[first + min(position, full - 1, 1), op])
    return total


def generalize(
    space: Space,
    base: Sequence[int],
    strategy: Strategy,
    stage: int,
    tolerance: float = 0.02,
) -> Scaled:
    """The network of a larger stage, within `tolerance` of 2^s F(base).

    Width and depth by ceil, resolution to the nearest multiple of 16 pixels (of 1 below 64). Where
    depth and resolution jump over the budget together, the width alone closes the gap.

    Raises RuntimeError when no exponent comes near enough, with the nearest.
    """
    target = 2**stage * space.flops(base, holes=True)
    step = RESOLUTION_STEP if space.base_resolution >= 64 else 1

    def build(exponent: float, wider: float = 1.0) -> Scaled:
        depth, width, factor = strategy.multipliers(stage) ** exponent
        resolution = max(step, round(space.base_resolution * factor / step) * step)
        stages = deepened(space, base, depth)
        count = flops(space, stages, width * wider, resolution)
        return Scaled(float(depth), float(width * wider), resolution, stages, count, exponent)

    def bisected(make, low: float, high: float) -> list[Scaled]:
        tried = []
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            tried.append(make(middle))
            low, high = (middle, high) if tried[-1].flops < target else (low, middle)
        return tried

    tried = bisected(build, 0.0, 4.0)
    # Depth and resolution move in jumps: near one, neighbors of the limit may be closer.
    tried += [build(tried[-1].exponent + d) for d in np.linspace(-0.1, 0.1, 401)]
    best = min(tried, key=lambda s: abs(s.flops - target))
    if abs(best.flops - target) > tolerance * target:
        tried = bisected(lambda wider: build(best.exponent, wider), 0.5, 2.0)
        best = min(tried, key=lambda s: abs(s.flops - target))
    if abs(best.flops - target) > tolerance * target:
        raise RuntimeError(
            f"stage {stage}: the nearest network has {best.flops:,} multiply-adds, wanted "
            f"{target:,} within {100 * tolerance:g} %"
        )
    return best
