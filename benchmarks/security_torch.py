"""The CIFAR ResNet-18 and PGD in PyTorch, for timing beside ours."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        return torch.relu(self.body(x) + self.skip(x))


class ResNet18(nn.Module):
    def __init__(self, width: int, classes: int):
        super().__init__()
        layers = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
        for stage in range(4):
            for i in range(2):
                layers.append(Block(inputs, width * 2**stage, 2 if stage and not i else 1))
                inputs = width * 2**stage
        self.body = nn.Sequential(*layers)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x):
        return self.linear(self.body(x).mean((2, 3)))


def pgd(model, x, y, eps: float, steps: int):
    """L-infinity PGD with a random start and steps of eps / 4."""
    start = x
    x = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        x.requires_grad_(True)
        loss = nn.functional.cross_entropy(model((x - 0.5) / 0.5), y)
        (grad,) = torch.autograd.grad(loss, x)
        x = x.detach() + eps / 4 * grad.sign()
        x = (start + (x - start).clamp(-eps, eps)).clamp(0, 1)
    return x.detach()
