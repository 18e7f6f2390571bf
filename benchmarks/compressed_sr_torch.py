"""Swin2SR and BasicVSR++ in PyTorch, written here from the papers: the benchmark's other side.

PyTorch itself has no deformable convolution: it is `grid_sample` over all groups and taps at once
and one matrix product, the fastest form of plain PyTorch that was tried.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from jaxmodels.restoration.windows import (
    relative_coords_table,
    relative_position_index,
    shifted_window_mask,
)


def conv(inputs, outputs, kernel=3, stride=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)


class Attention(nn.Module):
    def __init__(self, width, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(width, 3 * width)
        self.scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))
        self.bias = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))
        self.out = nn.Linear(width, width)
        self.register_buffer("table", torch.tensor(relative_coords_table(window)).reshape(-1, 2))
        self.register_buffer("index", torch.tensor(relative_position_index(window)).reshape(-1))

    def forward(self, x, mask):
        rows, n, width = x.shape
        q, k, v = self.qkv(x).reshape(rows, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        logits = logits * self.scale.clamp(max=math.log(100)).exp()
        bias = self.bias(self.table)[self.index].reshape(n, n, self.heads).permute(2, 0, 1)
        logits = logits + 16 * bias.sigmoid()
        if mask is not None:
            count = mask.shape[0]
            logits = logits.reshape(-1, count, self.heads, n, n) + mask[:, None]
            logits = logits.reshape(rows, self.heads, n, n)
        return self.out((logits.softmax(-1) @ v).transpose(1, 2).reshape(rows, n, width))


class Block(nn.Module):
    def __init__(self, width, heads, window, shift):
        super().__init__()
        self.window, self.shift = window, shift
        self.attention = Attention(width, heads, window)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.masks = {}

    def forward(self, x):
        batch, height, width, channels = x.shape
        w, y, mask = self.window, x, None
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
            if (height, width) not in self.masks:
                values = np.array(shifted_window_mask(height, width, w, self.shift))
                self.masks[(height, width)] = torch.tensor(values)
            mask = self.masks[(height, width)]
        y = y.reshape(batch, height // w, w, width // w, w, channels).permute(0, 1, 3, 2, 4, 5)
        y = self.attention(y.reshape(-1, w * w, channels), mask)
        y = y.reshape(batch, height // w, width // w, w, w, channels).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(batch, height, width, channels)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + self.norm1(y)
        return x + self.norm2(self.mlp(x))


class Group(nn.Module):
    def __init__(self, width, depth, heads, window):
        super().__init__()
        self.blocks = nn.Sequential(
            *[Block(width, heads, window, window // 2 * (j % 2)) for j in range(depth)]
        )
        self.conv, self.project = conv(width, width), conv(width, width, 1)

    def forward(self, x):
        y = self.blocks(x).permute(0, 3, 1, 2)
        return self.project(self.conv(y)).permute(0, 2, 3, 1) + x


class Swin2SR(nn.Module):
    """The head `pixelshuffle_aux`, or `pixelshuffledirect`, x4."""

    def __init__(self, width=180, depths=(6,) * 6, heads=6, window=8, direct=False):
        super().__init__()
        self.direct, f = direct, 64
        self.first, self.embed = conv(3, width), conv(width, width, 1)
        self.embed_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.groups = nn.Sequential(*[Group(width, d, heads, window) for d in depths])
        self.body = conv(width, width)
        if direct:
            self.last = conv(width, 48)
            return
        self.before, self.aux, self.after = conv(width, f), conv(f, 3), conv(3, f)
        self.bicubic, self.up1, self.up2 = conv(3, f), conv(f, 4 * f), conv(f, 4 * f)
        self.last = conv(f, 3)

    def forward(self, x):
        first = self.first(x)
        y = self.embed_norm(self.embed(first).permute(0, 2, 3, 1))
        y = self.norm(self.groups(y)).permute(0, 3, 1, 2)
        y = self.body(y) + first
        if self.direct:
            return F.pixel_shuffle(self.last(y), 4)
        large = self.bicubic(F.interpolate(x, scale_factor=4, mode="bicubic"))
        aux = self.aux(F.leaky_relu(self.before(y)))
        y = F.leaky_relu(self.after(aux))
        y = F.pixel_shuffle(self.up2(F.pixel_shuffle(self.up1(y), 2)), 2)
        return self.last(y + large), aux


class Residual(nn.Module):
    def __init__(self, inputs, width, blocks):
        super().__init__()
        self.head = conv(inputs, width)
        self.body = nn.ModuleList(
            [
                nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width))
                for _ in range(blocks)
            ]
        )

    def forward(self, x):
        x = F.leaky_relu(self.head(x), 0.1)
        for block in self.body:
            x = x + block(x)
        return x


def grid_of(height, width):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return x.float(), y.float()


def sample(x, columns, rows, border="zeros"):
    height, width = x.shape[2:]
    grid = torch.stack([2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1], -1)
    return F.grid_sample(x, grid, padding_mode=border, align_corners=True)


def warp(x, flow, border="zeros"):
    columns, rows = grid_of(*x.shape[2:])
    return sample(x, columns + flow[:, 0], rows + flow[:, 1], border)


def deform_conv(x, offset, mask, weight, groups):
    """3x3, padding 1: all taps of all groups in one `grid_sample`."""
    batch, channels, height, width = x.shape
    columns, rows = grid_of(height, width)
    taps = torch.arange(9)
    shift = offset.reshape(batch * groups, 9, 2, height, width)
    rows = rows + (taps // 3 - 1).view(9, 1, 1) + shift[:, :, 0]
    columns = columns + (taps % 3 - 1).view(9, 1, 1) + shift[:, :, 1]
    parts = x.reshape(batch * groups, channels // groups, height, width)
    places = (batch * groups, 9 * height, width)
    values = sample(parts, columns.reshape(places), rows.reshape(places))
    values = values.reshape(batch, groups, channels // groups, 9, height, width)
    values = values * mask.reshape(batch, groups, 1, 9, height, width)
    values = values.reshape(batch, channels * 9, height * width)
    return (weight.reshape(weight.shape[0], -1) @ values).reshape(batch, -1, height, width)


class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        widths = (8, 32, 64, 32, 16, 2)
        self.levels = nn.ModuleList(
            nn.ModuleList([conv(a, b, 7) for a, b in itertools.pairwise(widths)]) for _ in range(6)
        )

    def forward(self, a, b):
        pyramid = [(a, b)]
        for _ in range(5):
            pyramid.append(tuple(F.avg_pool2d(x, 2) for x in pyramid[-1]))
        flow = a.new_zeros(a.shape[0], 2, a.shape[2] // 32, a.shape[3] // 32)
        for level, (a, b) in zip(self.levels, reversed(pyramid)):
            if level is not self.levels[0]:
                flow = 2 * F.interpolate(flow, scale_factor=2, mode="bilinear", align_corners=True)
            # One pixel has no grid of its own.
            moved = warp(b, flow, "border") if min(b.shape[2:]) > 1 else b
            y = torch.cat([a, moved, flow], 1)
            for k, layer in enumerate(level):
                y = layer(y)
                y = y if k == 4 else F.relu(y)
            flow = flow + y
        return flow


class Alignment(nn.Module):
    def __init__(self, c, groups=16):
        super().__init__()
        self.groups = groups
        self.offset = nn.Sequential(
            *[m for i in range(3) for m in (conv(c if i else 3 * c + 4, c), nn.LeakyReLU(0.1))],
            conv(c, 27 * groups),
        )
        self.weight = nn.Parameter(torch.randn(c, 2 * c, 3, 3) * 0.03)

    def forward(self, states, condition, flow_1, flow_2):
        y = self.offset(torch.cat([condition, flow_1, flow_2], 1))
        residue, mask = y[:, : 18 * self.groups], y[:, 18 * self.groups :].sigmoid()
        tiled = [f.flip(1).repeat(1, 9 * self.groups // 2, 1, 1) for f in (flow_1, flow_2)]
        offset = 10 * residue.tanh() + torch.cat(tiled, 1)
        return deform_conv(states, offset, mask, self.weight, self.groups)


class BasicVSRPlusPlus(nn.Module):
    def __init__(self, c=64, blocks=7):
        super().__init__()
        self.flow, self.features = Flow(), Residual(3, c, 5)
        self.align = nn.ModuleList([Alignment(c) for _ in range(4)])
        self.refine = nn.ModuleList([Residual((2 + k) * c, c, blocks) for k in range(4)])
        self.merge = Residual(5 * c, c, 5)
        self.up1, self.up2 = conv(c, 4 * c), conv(c, 256)
        self.hr, self.last = conv(64, 64), conv(64, 3)

    def forward(self, clip):
        frames = clip.shape[1]
        a, b = clip[:, :-1].flatten(0, 1), clip[:, 1:].flatten(0, 1)
        flows = [f.unflatten(0, (-1, frames - 1)) for f in (self.flow(a, b), self.flow(b, a))]
        spatial = self.features(clip.flatten(0, 1)).unflatten(0, (-1, frames))
        passes = [spatial]
        for number, (align, refine) in enumerate(zip(self.align, self.refine)):
            back = number % 2 == 0
            order = range(frames)[::-1] if back else range(frames)
            states, previous_flow = [], None
            for i, t in enumerate(order):
                state = torch.zeros_like(spatial[:, 0])
                if i:
                    flow_1 = flows[0][:, t] if back else flows[1][:, t - 1]
                    zero, flow_2 = torch.zeros_like(states[-1]), torch.zeros_like(flow_1)
                    before = zero
                    if i > 1:
                        before = states[-2]
                        flow_2 = flow_1 + warp(previous_flow, flow_1)
                    condition = [warp(states[-1], flow_1), spatial[:, t]]
                    condition.append(warp(before, flow_2) if i > 1 else zero)
                    both = torch.cat([states[-1], before], 1)
                    state = align(both, torch.cat(condition, 1), flow_1, flow_2)
                    previous_flow = flow_1
                features = [p[:, t] for p in passes]
                states.append(state + refine(torch.cat([*features, state], 1)))
            passes.append(torch.stack(states[::-1] if back else states, 1))
        y = self.merge(torch.cat(passes, 2).flatten(0, 1))
        y = F.leaky_relu(F.pixel_shuffle(self.up1(y), 2), 0.1)
        y = F.leaky_relu(F.pixel_shuffle(self.up2(y), 2), 0.1)
        y = self.last(F.leaky_relu(self.hr(y), 0.1))
        x = clip.flatten(0, 1)
        y = y + F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)
        return y.unflatten(0, (-1, frames))
