"""Choice blocks of ScaleNet: a gene's place, its candidate operations, their widths and cost.

After luminolx/ScaleNet@22487c8 (core/search_space, core/utils/flops.py).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class ChoiceOp:
    """One candidate operation: `kind` is identity, residual or conv; `expansion` of residuals."""

    kind: str
    kernel: int = 1
    expansion: float = 1
    squeeze: bool = False


@dataclasses.dataclass(frozen=True)
class ChoiceBlock:
    """One gene's place. Widths: `base_*` of the base model, `full_*` of the weights.

    `scaled_*` says whether the width follows the width multiplier (image and last 1x1 do not).
    """

    stage: str
    position: int
    stride: int
    base_in: int
    base_out: int
    full_in: int
    full_out: int
    scaled_in: bool
    scaled_out: bool
    ops: tuple[ChoiceOp, ...]

    def input_width(self, width: float) -> int:
        """Channels that come in at this width multiplier."""
        return math.ceil(self.base_in * width) if self.scaled_in else self.base_in

    def output_width(self, width: float) -> int:
        """Channels that go out at this width multiplier."""
        return math.ceil(self.base_out * width) if self.scaled_out else self.base_out

    def hidden_width(self, op: int, width: float) -> int:
        """Hidden channels in the forward pass: `ceil(round(c_in t) w)`."""
        return math.ceil(round(self.base_in * self.ops[op].expansion) * width)

    def full_hidden(self, op: int) -> int:
        """Hidden channels of the weights: `round(C_in t)`."""
        return round(self.full_in * self.ops[op].expansion)

    def projects(self, op: int) -> bool:
        """Whether an identity has weights: a stride or a change of channels."""
        changes = self.stride != 1 or self.full_in != self.full_out
        return self.ops[op].kind == "identity" and changes


def _parse_op(name: str, expansion: float) -> ChoiceOp:
    if name == "id":
        return ChoiceOp("identity")
    if name in ("conv2d", "conv3x3"):
        return ChoiceOp("conv", 3 if name == "conv3x3" else 1)
    found = re.fullmatch(r"ir_(\d+)x\1_(se|nse)", name)
    if found is None:
        raise ValueError(
            f"unknown operation {name!r}; there are id, conv2d, conv3x3, ir_KxK_se, ir_KxK_nse"
        )
    return ChoiceOp("residual", int(found[1]), expansion, found[2] == "se")


def op_cost(op: ChoiceOp, inp: int, out: int, size: int, after: int) -> int:
    """Multiply-adds from `inp` to `out` channels, sides `size` to `after`, the official way."""
    if op.kind == "identity":
        return 0  # the official counter leaves out the projection of a first block's identity too
    if op.kind == "conv":
        return inp * out * after * after * op.kernel**2
    hidden = round(inp * op.expansion)
    expand = 0 if op.expansion == 1 else inp * hidden * size * size
    depthwise = hidden * hidden * after * after // hidden * op.kernel**2
    squeeze = 2 * hidden * (hidden // 4) if op.squeeze else 0
    return expand + depthwise + squeeze + hidden * out * after * after


def parse_ops(stage: str, names: Sequence[str], expansions: Sequence) -> tuple[ChoiceOp, ...]:
    """The ops of a stage's configuration; ValueError for names and expansions that do not fit."""
    if len(expansions) == 1:
        expansions = list(expansions) * len(names)
    elif not expansions:
        expansions = [1] * len(names)
    if len(expansions) != len(names):
        raise ValueError(
            f"{stage}: {len(expansions)} expansions for {len(names)} operations {list(names)}"
        )
    ops = []
    for name, t in zip(names, expansions):
        ops += [_parse_op(name, one) for one in (t if isinstance(t, list) else [t])]
    expands = {op.expansion == 1 for op in ops if op.kind == "residual"}
    if len(expands) > 1:
        raise ValueError(f"{stage}: expansion 1 beside larger ones has no common form")
    return tuple(ops)
