"""VectorNet in PyTorch, written here from the specification, as the other side of the benchmark.

Structure of arXiv 2005.04259 in eager PyTorch idiom: every layer concatenates vectors and maximum.
"""

from __future__ import annotations

import torch
from torch import nn


class Encoder(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.fc, self.norm = nn.Linear(inputs, width), nn.LayerNorm(width)

    def forward(self, x, mask):
        h = torch.relu(self.norm(self.fc(x)))
        top = h.masked_fill(~mask, -torch.inf).amax(2, keepdim=True)
        top = torch.where(torch.isfinite(top), top, 0.0)
        return torch.cat([h, top.expand_as(h)], -1)


def decoder(inputs, hidden, outputs):
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class VectorNet(nn.Module):
    """Vectors [B, P, V, D] -> offsets [B, T, 2] of the target, node features and predictions."""

    def __init__(self, in_dim=12, horizon=30, width=64, depth=3, id_scale=0.02):
        super().__init__()
        inputs = [in_dim] + [2 * width] * (depth - 1)
        self.layers = nn.ModuleList([Encoder(d, width) for d in inputs])
        self.q, self.k, self.v = (nn.Linear(2 * width + 2, width) for _ in range(3))
        self.traj_decoder = decoder(width, width, 2 * horizon)
        self.node_decoder = decoder(width, width, 2 * width)
        self.horizon, self.id_scale = horizon, id_scale

    def forward(self, vectors, mask, target, node_mask=None):
        present, slots = mask.any(-1), mask[..., None]
        x = torch.where(slots, vectors, 0.0)
        starts = x[..., :2].masked_fill(~slots, torch.inf).amin(2)
        starts = torch.where(present[..., None], starts, 0.0)
        for layer in self.layers:
            x = layer(x, slots)
        polyline = x.masked_fill(~slots, -torch.inf).amax(2)
        polyline = torch.where(present[..., None], polyline, 0.0)
        unit = nn.functional.normalize(polyline, dim=-1)
        seen = unit if node_mask is None else unit.masked_fill(node_mask[..., None], 0.0)
        x = torch.cat([seen, self.id_scale * starts], -1)
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        weights = scores.masked_fill(~present[:, None], -torch.inf).softmax(-1)
        nodes = torch.where(present[..., None], weights @ self.v(x), 0.0)
        own = nodes[torch.arange(len(nodes)), target]
        offsets = self.traj_decoder(own).view(-1, self.horizon, 2)
        return offsets, unit, self.node_decoder(nodes)
