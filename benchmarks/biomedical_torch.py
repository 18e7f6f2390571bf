"""U-Nets of nnU-Net in PyTorch, written here from the specification, as the benchmark's other side.

Plain PyTorch idiom: `ConvNd`, `InstanceNorm`, `LeakyReLU(inplace)`, transposed convolutions.
"""

from __future__ import annotations

import torch
from torch import nn


def _block(dims: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    norm = nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d
    return nn.Sequential(
        conv(inputs, outputs, 3, stride, 1),
        norm(outputs, eps=1e-5, affine=True),
        nn.LeakyReLU(0.01, inplace=True),
    )


class UNet(nn.Module):
    """Plain U-Net with two convolutions a stage; logits of every resolution, full first."""

    def __init__(self, dims: int, channels: int, classes: int, features: list[int]):
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        up = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
        self.encoder = nn.ModuleList()
        before = channels
        for i, width in enumerate(features):
            first = _block(dims, before, width, 1 if i == 0 else 2)
            self.encoder.append(nn.Sequential(first, _block(dims, width, width, 1)))
            before = width
        self.up, self.decoder, self.seg = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for width in reversed(features[:-1]):
            self.up.append(up(before, width, 2, 2))
            first = _block(dims, 2 * width, width, 1)
            self.decoder.append(nn.Sequential(first, _block(dims, width, width, 1)))
            self.seg.append(conv(width, classes, 1))
            before = width

    def forward(self, x, deep: bool = True):
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        outputs = []
        for k, (up, stage, seg) in enumerate(zip(self.up, self.decoder, self.seg)):
            x = stage(torch.cat([up(x), skips[-2 - k]], 1))
            if deep or k == len(self.up) - 1:
                outputs.append(seg(x))
        return outputs[::-1]


def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy plus batch Dice over the foreground."""
    p = logits.softmax(1)
    onehot = torch.zeros_like(p).scatter_(1, target[:, None], 1)
    axes = (0, *range(2, p.ndim))
    overlap, total = (p * onehot).sum(axes)[1:], (p + onehot).sum(axes)[1:]
    dice = (2 * overlap + 1e-5) / (total + 1e-5)
    return nn.functional.cross_entropy(logits, target) - dice.mean()
