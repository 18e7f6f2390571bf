"""Supernets in eager PyTorch, written from the specifications: slices of just the size, as there.

The other side of `benchmarks.search`: a super-supernet and a superformer whose layers slice their
weights for the sub-network at hand, one candidate after the other.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Conv(nn.Conv2d):
    def forward(self, x, out, right):
        if self.groups > 1:
            w = self.weight[-x.shape[1] :] if right else self.weight[: x.shape[1]]
            return F.conv2d(x, w, None, self.stride, self.padding, 1, x.shape[1])
        rows = slice(self.out_channels - out, None) if right else slice(0, out)
        columns = slice(self.in_channels - x.shape[1], None) if right else slice(0, x.shape[1])
        bias = None if self.bias is None else self.bias[rows]
        return F.conv2d(x, self.weight[rows, columns], bias, self.stride, self.padding)


class Norm(nn.BatchNorm2d):
    def forward(self, x, right):
        count = x.shape[1]
        part = slice(self.num_features - count, None) if right else slice(0, count)
        leaves = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, var, weight, bias = (leaf[part] for leaf in leaves)
        return F.batch_norm(x, mean, var, weight, bias, self.training, 0.1, self.eps)


class Residual(nn.Module):
    def __init__(self, block, op):
        super().__init__()
        hidden, inputs, k = round(block.full_in * op.expansion), block.full_in, op.kernel
        self.expand = None if op.expansion == 1 else Conv(inputs, hidden, 1, bias=False)
        self.norm0 = Norm(hidden)
        self.depthwise = Conv(hidden, hidden, k, block.stride, k // 2, groups=hidden, bias=False)
        self.norm1 = Norm(hidden)
        self.squeeze, self.excite = Conv(hidden, hidden // 4, 1), Conv(hidden // 4, hidden, 1)
        self.project, self.norm2 = Conv(hidden, block.full_out, 1, bias=False), Norm(block.full_out)
        self.short = block.full_in == block.full_out and block.stride == 1

    def forward(self, x, hidden, out, right):
        y = x
        if self.expand is not None:
            y = F.hardswish(self.norm0(self.expand(y, hidden, right), right))
        y = F.hardswish(self.norm1(self.depthwise(y, hidden, right), right))
        z = self.squeeze(y.mean((2, 3), keepdim=True), hidden // 4, right)
        y = y * F.hardsigmoid(self.excite(F.relu(z), hidden, right))
        y = self.norm2(self.project(y, out, right), right)
        return y + x if self.short else y


class SuperSupernet(nn.Module):
    """Blocks of `scalenet_space.Space`; a sub-network is (ops, outputs, hidden widths)."""

    def __init__(self, space):
        super().__init__()
        self.space = space
        self.blocks = nn.ModuleList()
        for block in space.blocks:
            ops = nn.ModuleList()
            for op in block.ops:
                if op.kind == "residual":
                    ops.append(Residual(block, op))
                elif op.kind == "conv":
                    k = op.kernel
                    conv = Conv(block.full_in, block.full_out, k, block.stride, k // 2, bias=False)
                    ops.append(nn.ModuleList([conv, Norm(block.full_out)]))
                else:
                    ops.append(nn.Identity())
            self.blocks.append(ops)
        _, dim, classes = space.linear[0]
        self.head = nn.Linear(dim, classes)

    def forward(self, x, subnet, right):
        for block, ops, op, hidden, out in zip(
            self.space.blocks, self.blocks, subnet.ops, subnet.hidden, subnet.outputs
        ):
            op, hidden, out = int(op), int(hidden), int(out)
            kind = block.ops[op].kind
            if kind == "conv":
                conv, norm = ops[op]
                x = F.hardswish(norm(conv(x, out, right), right))
            elif kind == "residual":
                x = ops[op](x, hidden, out, right)
        return self.head(x.mean((2, 3)))


class Superformer(nn.Module):
    """A one-sided superformer with private q and k; a sub-network is a decoded genome."""

    def __init__(self, space):
        super().__init__()
        self.space, d = space, space.dim
        third = space.attention // 3
        self.patches = nn.ModuleList(nn.Conv2d(space.channels, d, p, p) for p in space.patches)
        tokens = [(space.image_size // p) ** 2 + 1 for p in space.patches]
        self.tokens = nn.ParameterList(nn.Parameter(torch.zeros(1, 1, d)) for _ in tokens)
        self.places = nn.ParameterList(nn.Parameter(torch.zeros(1, n, d)) for n in tokens)
        self.blocks = nn.ModuleList()
        for _ in range(space.depth):
            self.blocks.append(
                nn.ModuleDict(
                    {
                        "norm1": nn.LayerNorm(d, 1e-6),
                        "norm2": nn.LayerNorm(d, 1e-6),
                        **{f"qk{i}": nn.Linear(d, 2 * third) for i in range(len(space.heads))},
                        "v": nn.Linear(d, third),
                        "proj": nn.Linear(third, d),
                        "fc1": nn.Linear(d, space.mlp),
                        "fc2": nn.Linear(space.mlp, d),
                    }
                )
            )
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, space.classes)

    def forward(self, x, genome):
        patch, dim, blocks = self.space.decode(genome)
        number = self.space.patches.index(patch)
        conv, third = self.patches[number], self.space.attention // 3
        x = F.conv2d(x, conv.weight[:dim], conv.bias[:dim], patch).flatten(2).transpose(1, 2)
        first = self.tokens[number][..., :dim].expand(len(x), -1, -1)
        x = torch.cat([first, x], 1) + self.places[number][..., :dim]
        for layers, block in zip(self.blocks, blocks):
            if block is None:
                continue
            heads, attention, mlp = block
            width = attention // 3

            def norm(y, layer):
                return F.layer_norm(y, (dim,), layer.weight[:dim], layer.bias[:dim], layer.eps)

            def linear(y, layer, rows):
                return F.linear(y, layer.weight[rows, : y.shape[-1]], layer.bias[rows])

            y = norm(x, layers["norm1"])
            qk = layers[f"qk{self.space.heads.index(heads)}"]
            parts = [
                linear(y, qk, slice(0, width)),
                linear(y, qk, slice(third, third + width)),
                linear(y, layers["v"], slice(0, width)),
            ]
            q, k, v = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in parts)
            y = F.scaled_dot_product_attention(q, k, v, scale=(dim // heads) ** -0.5)
            x = x + linear(y.transpose(1, 2).flatten(2), layers["proj"], slice(0, dim))
            y = F.gelu(linear(norm(x, layers["norm2"]), layers["fc1"], slice(0, mlp)))
            x = x + linear(y, layers["fc2"], slice(0, dim))
        x = F.layer_norm(x, (dim,), self.norm.weight[:dim], self.norm.bias[:dim])[:, 0]
        return F.linear(x, self.head.weight[:, :dim], self.head.bias)
