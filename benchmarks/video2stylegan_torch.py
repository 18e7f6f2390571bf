"""The other side of the comparison: StyleGAN2's synthesis and IR-SE50 as plain PyTorch modules.

Written for these timings after the published definitions, with the operations that the official
codes run on a CPU: a convolution with the sample's own weights, transposed convolution, FIR filters
as depthwise convolution.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

KERNEL = torch.tensor([1.0, 3.0, 3.0, 1.0])


def fir(x, pads, gain=1.0, up=1):
    """Zero insertion, padding and the binomial filter."""
    f = torch.outer(KERNEL, KERNEL) / 64 * gain
    b, c, h, w = x.shape
    if up > 1:
        x = x.reshape(b, c, h, 1, w, 1)
        x = F.pad(x, (0, up - 1, 0, 0, 0, up - 1)).reshape(b, c, h * up, w * up)
    x = F.pad(x, pads)
    return F.conv2d(x, f[None, None].expand(c, 1, 4, 4), groups=c)


class Layer(nn.Module):
    """Modulated 3x3 convolution with noise, bias and activation."""

    def __init__(self, inputs, out, w_dim, size, up):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, inputs, 3, 3))
        self.affine = nn.Linear(w_dim, inputs)
        self.bias = nn.Parameter(torch.zeros(out))
        self.noise = nn.Parameter(torch.randn(size, size))
        self.up = up

    def forward(self, x, w):
        b, c = x.shape[:2]
        weight = self.weight[None] * self.affine(w)[:, None, :, None, None]
        weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        x = x.reshape(1, b * c, *x.shape[2:])
        if self.up:
            weight = weight.transpose(1, 2).reshape(b * c, -1, 3, 3)
            x = F.conv_transpose2d(x, weight, stride=2, groups=b)
            x = fir(x.reshape(b, -1, *x.shape[2:]), (1, 1, 1, 1), 4.0)
        else:
            weight = weight.reshape(-1, c, 3, 3)
            x = F.conv2d(x, weight, padding=1, groups=b).reshape(b, -1, *x.shape[2:])
        x = x + 0.1 * self.noise
        return F.leaky_relu(x + self.bias[:, None, None], 0.2) * math.sqrt(2)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution without demodulation."""

    def __init__(self, inputs, w_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, inputs, 1, 1) / math.sqrt(inputs))
        self.affine = nn.Linear(w_dim, inputs)

    def forward(self, x, w):
        b, c = x.shape[:2]
        weight = (self.weight[None] * self.affine(w)[:, None, :, None, None]).reshape(-1, c, 1, 1)
        return F.conv2d(x.reshape(1, b * c, *x.shape[2:]), weight, groups=b).reshape(
            b, 3, *x.shape[2:]
        )


class Synthesis(nn.Module):
    """W+ [B, n, 512] -> images of `size` pixels."""

    def __init__(self, size, w_dim=512):
        super().__init__()
        self.const = nn.Parameter(torch.randn(1, 512, 4, 4))
        self.first, self.first_rgb = Layer(512, 512, w_dim, 4, False), ToRGB(512, w_dim)
        self.blocks = nn.ModuleList()
        inputs, resolution = 512, 8
        while resolution <= size:
            out = min(32768 // resolution, 512)
            parts = (
                Layer(inputs, out, w_dim, resolution, True),
                Layer(out, out, w_dim, resolution, False),
                ToRGB(out, w_dim),
            )
            self.blocks.append(nn.ModuleList(parts))
            inputs, resolution = out, 2 * resolution

    def forward(self, ws):
        x = self.first(self.const.expand(len(ws), -1, -1, -1), ws[:, 0])
        image = self.first_rgb(x, ws[:, 1])
        for i, (up, same, rgb) in enumerate(self.blocks):
            x = same(up(x, ws[:, 2 * i + 1]), ws[:, 2 * i + 2])
            image = fir(image, (2, 1, 2, 1), 4.0, up=2) + rgb(x, ws[:, 2 * i + 3])
        return image


class Unit(nn.Module):
    """IR-SE's residual unit."""

    def __init__(self, inputs, depth, stride):
        super().__init__()
        self.short = nn.MaxPool2d(1, stride)
        if inputs != depth:
            conv = nn.Conv2d(inputs, depth, 1, stride, bias=False)
            self.short = nn.Sequential(conv, nn.BatchNorm2d(depth))
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, depth, 3, 1, 1, bias=False),
            nn.PReLU(depth),
            nn.Conv2d(depth, depth, 3, stride, 1, bias=False),
            nn.BatchNorm2d(depth),
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(depth, depth // 16, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(depth // 16, depth, 1, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x):
        y = self.body(x)
        return y * self.gate(y) + self.short(x)


class IRSE50(nn.Module):
    """ArcFace embedding of 112-pixel faces."""

    def __init__(self):
        super().__init__()
        stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)]
        inputs, units = 64, []
        for depth, count in ((64, 3), (128, 4), (256, 14), (512, 3)):
            for i in range(count):
                units.append(Unit(inputs, depth, 2 if i == 0 else 1))
                inputs = depth
        head = [nn.BatchNorm2d(512), nn.Flatten(), nn.Linear(512 * 49, 512), nn.BatchNorm1d(512)]
        self.all = nn.Sequential(*stem, *units, *head)

    def forward(self, x):
        return F.normalize(self.all(x))
