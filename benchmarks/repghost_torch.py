"""RepGhostNet in PyTorch, written here from the specification, as the other side of the benchmark.

Structure of arXiv 2211.06088; eager PyTorch idiom throughout (Sequential, Conv2d, BatchNorm2d).
"""

from __future__ import annotations

import torch
from torch import nn

from jaxmodels.layers.rounding import make_divisible
from jaxmodels.vision.repghost import HEAD_FEATURES, STAGES, STEM_FEATURES


def conv_bn(inputs, outputs, kernel=1, stride=1, groups=1, relu=False):
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


class Ghost(nn.Module):
    def __init__(self, inputs, outputs, relu, deploy):
        super().__init__()
        self.primary = conv_bn(inputs, outputs, relu=relu)
        if deploy:
            self.cheap = nn.Conv2d(outputs, outputs, 3, 1, 1, groups=outputs, bias=True)
        else:
            self.cheap = conv_bn(outputs, outputs, 3, groups=outputs)
        self.fusion = None if deploy else nn.BatchNorm2d(outputs)
        self.act = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x):
        x = self.primary(x)
        y = self.cheap(x)
        if self.fusion is not None:
            y = y + self.fusion(x)
        return self.act(y)


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        reduced = make_divisible(channels * 0.25)
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x):
        gate = self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * nn.functional.hardsigmoid(gate)


class Bottleneck(nn.Module):
    def __init__(self, inputs, middle, outputs, kernel, stride, se, deploy):
        super().__init__()
        self.ghost1 = Ghost(inputs, middle, True, deploy)
        self.down = conv_bn(middle, middle, kernel, stride, middle) if stride > 1 else nn.Identity()
        self.se = SqueezeExcite(middle) if se else nn.Identity()
        self.ghost2 = Ghost(middle, outputs, False, deploy)
        if inputs == outputs and stride == 1:
            self.shortcut = nn.Identity()
        else:
            self.shortcut = nn.Sequential(
                conv_bn(inputs, inputs, kernel, stride, inputs), conv_bn(inputs, outputs)
            )

    def forward(self, x):
        return self.ghost2(self.se(self.down(self.ghost1(x)))) + self.shortcut(x)


class RepGhostNet(nn.Module):
    def __init__(self, width=0.5, classes=1000, deploy=False):
        super().__init__()
        channels = make_divisible(STEM_FEATURES * width)
        blocks = [conv_bn(3, channels, 3, 2, relu=True)]
        for stage in STAGES:
            for kernel, middle, outputs, se, stride in stage:
                middle, outputs = make_divisible(middle * width), make_divisible(outputs * width)
                blocks.append(Bottleneck(channels, middle, outputs, kernel, stride, se, deploy))
                channels = outputs
        final = make_divisible(STAGES[-1][-1][1] * width * 2)
        blocks.append(conv_bn(channels, final, relu=True))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Conv2d(final, HEAD_FEATURES, 1)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(HEAD_FEATURES, classes)

    def forward(self, x):
        x = self.blocks(x).mean((2, 3), keepdim=True)
        x = torch.relu(self.head(x)).flatten(1)
        return self.classifier(self.dropout(x))
