"""Stand-alone ScaleNets: plain networks of one sub-network's widths, cut out or built afresh.

The retrained network has widths `ceil(c w)` and hidden widths `ceil(round(c_in t) w)`, no slices.
Keys are the super-supernet's own, the chosen ops' only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.layers.convolution import Conv, Linear
from jaxmodels.layers.dropout import drop_path
from jaxmodels.layers.normalization import BatchNorm
from jaxmodels.layers.squeeze_excite import SqueezeExcite
from jaxmodels.search import scalenet_space
from jaxmodels.search.scalenet import SuperSupernet, normal_fan_out
from jaxmodels.search.scalenet_blocks import Subnet, hard_swish
from jaxmodels.search.scalenet_space import Space

_zeros = nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class Layout:
    """A network's blocks, one a row: `(stage, position, op number, kind, kernel, expands,
    squeezes, stride, channels in, channels out, hidden, shortcut)`."""

    rows: tuple[tuple, ...]


def layout(space: Space, stages: Sequence[Sequence[int]], width: float) -> Layout:
    """The blocks of a network whose stages have these ops, of any depth; 0s are left out.

    Raises ValueError for another number of stages and for ops that a stage does not have.
    """
    rows = []
    starts = space.stage_slices()
    fewest = sum(first < len(space.blocks) for first, _, _ in starts)
    if not fewest <= len(stages) <= len(starts):
        raise ValueError(
            f"stages has {len(stages)} entries; this backbone has {fewest} stages "
            f"({len(starts)} with pooling and linear layers)"
        )
    for (first, _, _), ops in zip(starts, stages):
        for position, number in enumerate(ops):
            if first >= len(space.blocks):
                continue
            block = space.blocks[first if position == 0 else first + 1]
            if not 0 <= number < len(block.ops):
                raise ValueError(
                    f"{block.stage}[{position}]: op index {number} is not in "
                    f"0..{len(block.ops) - 1}"
                )
            op = block.ops[number]
            if op.kind == "identity" and not block.projects(number):
                continue
            rows.append(
                (
                    *(block.stage, position, int(number), op.kind, op.kernel, op.expansion != 1),
                    *(op.squeeze, block.stride, block.input_width(width)),
                    *(block.output_width(width), block.hidden_width(number, width)),
                    block.full_in == block.full_out and block.stride == 1,
                )
            )
    return Layout(tuple(rows))


def by_stage(space: Space, ops: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Op indices [genes] as one tuple a stage."""
    return tuple(
        tuple(int(v) for v in ops[first : first + depth])
        for first, _, depth in space.stage_slices()
    )


class ScaleNet(nn.Module):
    """A ScaleNet on its own, images [B, H, W, 3] -> logits [B, classes].

    `stages` has the op indices of every stage (`by_stage`), of any depth; `width` the multiplier.
    `backbone` and `head` are as in `SuperSupernet`. Dropout before the last layer and drop path
    growing over blocks belong to the retraining recipe.

    Raises ValueError for stages that the backbone does not have.
    """

    stages: Any = None
    width: float = 1.0
    resolution: int = 224
    backbone: Any = None
    head: Any = None
    dropout: float = 0.0
    drop_path_rate: float = 0.0
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages is not None:
            layout(self.space, self.stages, self.width)

    @property
    def space(self) -> Space:
        """The space that `stages` refers to."""
        return scalenet_space.make_space(self.backbone, self.head)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with."""
        return (jax.ShapeDtypeStruct((1, self.resolution, self.resolution, 3), jnp.float32),)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits [B, classes]; training draws from the rng `dropout`."""
        space = self.space
        stages = self.stages
        if stages is None:
            stages = by_stage(space, [len(b.ops) - 1 for b in space.blocks] + [0, 0])
        rows = layout(space, stages, self.width).rows
        rates = np.linspace(0, self.drop_path_rate, len(rows))
        x = jnp.asarray(x, self.dtype)
        for row, rate in zip(rows, rates):
            x = self._block(x, row, float(rate), train)
        x = x.mean((1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for name, _, features in space.linear:
            x = Linear(
                features,
                kernel_init=nn.initializers.normal(0.01),
                bias_init=_zeros,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"net.head_{name}.0.module.0",
            )(x)
        return x

    def _block(self, x, row, rate, train):
        stage, position, number, kind, kernel, expands, squeezes, stride, *widths, short = row
        _, out, hidden = widths
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        prefix = f"net.backbone_{stage}_{position}.{number}"

        def conv(y, name, features, k=1, strides=1, groups=1):
            layer = Conv(
                features, k, strides, k // 2, groups, kernel_init=normal_fan_out,
                name=f"{prefix}.{name}", **types,
            )  # fmt: skip
            return layer(y)

        def norm(y, name):
            bn = BatchNorm(axis_name=self.bn_axis_name, name=f"{prefix}.{name}", **types)
            return bn(y, train)

        if kind != "residual":
            k = kernel if kind == "conv" else 1
            y = norm(conv(x, "conv", out, k, stride), "bn")
            return hard_swish(y) if kind == "conv" else y
        y, depthwise, after = x, "conv1", "bn1"
        if expands:
            y = hard_swish(norm(conv(y, "conv1", hidden), "bn1"))
            depthwise, after = "conv1_2", "bn1_2"
        y = hard_swish(norm(conv(y, depthwise, hidden, kernel, stride, hidden), after))
        if squeezes:
            y = SqueezeExcite(
                hidden, ratio=(hidden // 4) / hidden, divisor=1,
                names=("squeeze_conv", "excite_conv"), kernel_init=normal_fan_out,
                bias_init=_zeros, name=f"{prefix}.se", **types,
            )(y)  # fmt: skip
        y = norm(conv(y, "conv2", out), "bn2")
        active = train and rate > 0 and short
        y = drop_path(y, rate, self.make_rng("dropout")) if active else y
        return y + x if short else y


def extract(
    module: SuperSupernet,
    variables: Mapping[str, Any],
    ops: Sequence[int],
    width: float,
    right: Any = False,
    holes: bool = False,
) -> tuple[ScaleNet, dict[str, Any]]:
    """`(network, variables)` of a sub-network cut out of the super-supernet.

    Args:
      ops: op indices [genes]. right: bool [] or [L], the side of each block; the two sides are two
        networks. holes: as in `make_subnet`, for what the official repair leaves.
    """
    from jaxmodels.interop.catalog import export, find, import_state
    from jaxmodels.search.scalenet import make_subnet

    space = module.space
    subnet = make_subnet(space, ops, width, holes=holes)
    right = np.broadcast_to(np.asarray(right, bool), (len(space.blocks),))
    state = export("search.scalenet", module, variables)
    cut = {}
    for i, block in enumerate(space.blocks):
        number = int(subnet.ops[i])
        prefix = f"net.backbone_{block.stage}_{block.position}.{number}."
        for key, value in state.items():
            if key.startswith(prefix):
                cut[key] = _cut(key[len(prefix) :], value, block, number, subnet, i, bool(right[i]))
    cut |= {k: v for k, v in state.items() if k.startswith("net.head_")}
    network = ScaleNet(
        stages=by_stage(space, ops), width=width, backbone=module.backbone, head=module.head
    )
    found = find("search.scalenet_nets")
    return network, import_state(found, network, cut)[0]


def _cut(name: str, value, block, number: int, subnet: Subnet, i: int, right: bool) -> np.ndarray:
    """The rows and columns of one PyTorch tensor that a sub-network uses."""
    if value.ndim == 0:
        return value
    hidden, full_hidden = int(subnet.hidden[i]), block.full_hidden(number)
    widths = {
        "in": (int(subnet.inputs[i]), block.full_in if block.scaled_in else None),
        "out": (int(subnet.outputs[i]), block.full_out if block.scaled_out else None),
        "hidden": (hidden, full_hidden),
        "squeezed": (hidden // 4, full_hidden // 4),
        "one": (1, None),
    }
    expands = block.ops[number].expansion != 1
    layer = name.rsplit(".", 1)[0]
    rows, columns = {
        "conv": ("out", "in"),
        "bn": ("out", "one"),
        "conv1": ("hidden", "in" if expands else "one"),
        "bn1": ("hidden", "one"),
        "conv1_2": ("hidden", "one"),
        "bn1_2": ("hidden", "one"),
        "se.squeeze_conv": ("squeezed", "hidden"),
        "se.excite_conv": ("hidden", "squeezed"),
        "conv2": ("out", "hidden"),
        "bn2": ("out", "one"),
    }[layer]

    def part(axis):
        count, full = widths[axis]
        if full is None:
            return slice(None)
        return slice(full - count, full) if right else slice(0, count)

    return value[part(rows)] if value.ndim == 1 else value[part(rows), part(columns)]


MODEL = ScaleNet


def _family(depths: Sequence[int], width: float, resolution: int) -> dict[str, Any]:
    """A scaling of one base model, each stage's last op repeated to its depth."""
    base = ((2,), (2,), (3, 3, 2, 1), (2, 2), (3, 3), (3, 2, 3), (2,))
    scaled = (ops + ops[-1:] * (depth - len(ops)) for ops, depth in zip(base, depths, strict=True))
    return {"stages": ((0,), *scaled, (0,)), "width": width, "resolution": resolution}


VARIANTS: dict[str, dict[str, Any]] = {
    # A small fixed network of the digits space, for comparison with searched ones.
    "digits_base": {
        **scalenet_space.DIGITS,
        "stages": ((0,), (1,), (1, 1), (1, 1), (1,), (0,)),
        "resolution": 16,
    },
    # A base model of the published space within its band of multiply-adds, not a searched one.
    "base_309m": {
        "stages": ((0,), (1,), (1, 1), (2, 2), (1, 1), (2, 2), (2, 2), (1,), (0,)),
    },
    # A base model and its scalings that luminolx/ScaleNet@785322a has for retraining
    # (config/config_scaling-24-03) and later revisions have not; that they are the paper's S0 to
    # S5 is not said there. Resolutions of S1 to S3 are the space's, of S4 (457) and S5 (533) the
    # next multiples of 16.
    "scalenet_24_03_s0": _family((1, 1, 4, 2, 2, 3, 1), 1.0, 224),
    "scalenet_24_03_s1": _family((2, 2, 5, 3, 3, 4, 2), 1.04, 256),
    "scalenet_24_03_s2": _family((2, 2, 6, 3, 3, 5, 2), 1.2, 304),
    "scalenet_24_03_s3": _family((2, 2, 6, 3, 3, 5, 2), 1.4, 354),
    "scalenet_24_03_s4": _family((2, 2, 7, 4, 4, 5, 2), 1.534, 464),
    "scalenet_24_03_s5": _family((2, 2, 8, 4, 4, 6, 2), 1.688, 528),
}


def true_flops(space: Space, stages: Sequence[Sequence[int]], width: float, resolution: int) -> int:
    """Multiply-adds of the network as it is computed: the counter's two departures undone."""
    size, total = resolution, 0
    for row in layout(space, stages, width).rows:
        _, _, _, kind, kernel, expands, squeezes, stride, inp, out, hidden, _ = row
        after = math.ceil(size / stride)
        if kind != "residual":
            total += inp * out * after**2 * (kernel**2 if kind == "conv" else 1)
        else:
            total += inp * hidden * size**2 if expands else 0
            total += hidden * after**2 * kernel**2 + hidden * out * after**2
            total += 2 * hidden * (hidden // 4) if squeezes else 0
        size = after
    return total + sum(i * o for _, i, o in space.linear)
