"""GanLM's train step in PyTorch, for timing: the structure of `jaxmodels/language/ganlm.py`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

PAD = 1


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x, memory, mask):
        def split(y):
            return y.view(*y.shape[:2], self.heads, -1).transpose(1, 2)

        y = F.scaled_dot_product_attention(
            split(self.q_proj(x)), split(self.k_proj(memory)), split(self.v_proj(memory)),
            attn_mask=mask, dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, d: int, hidden: int, heads: int, cross: bool, dropout: float):
        super().__init__()
        self.self_attn, self.norm = Attention(d, heads, dropout), nn.LayerNorm(d)
        if cross:
            self.cross_attn, self.cross_norm = Attention(d, heads, dropout), nn.LayerNorm(d)
        self.fc1, self.fc2, self.last_norm = (
            nn.Linear(d, hidden), nn.Linear(hidden, d), nn.LayerNorm(d))  # fmt: skip
        self.cross, self.drop = cross, nn.Dropout(dropout)

    def forward(self, x, mask, memory=None, memory_mask=None):
        x = self.norm(x + self.drop(self.self_attn(x, x, mask)))
        if self.cross:
            x = self.cross_norm(x + self.drop(self.cross_attn(x, memory, memory_mask)))
        return self.last_norm(x + self.drop(self.fc2(F.gelu(self.fc1(x)))))


class Stack(nn.Module):
    def __init__(self, layers, d, hidden, heads, cross, dropout, positions=512):
        super().__init__()
        self.positions, self.norm = nn.Embedding(positions, d), nn.LayerNorm(d)
        self.layers = nn.ModuleList(Layer(d, hidden, heads, cross, dropout) for _ in range(layers))
        self.drop, self.scale = nn.Dropout(dropout), math.sqrt(d)

    def forward(self, tokens, table, mask, *memory):
        kept = (tokens != PAD).long()
        x = table(tokens) * self.scale + self.positions(kept.cumsum(1) * kept + PAD)
        x = self.drop(self.norm(x))
        for layer in self.layers:
            x = layer(x, mask, *memory)
        return x


class GanLM(nn.Module):
    def __init__(self, vocab, d, hidden, heads, layers, dropout):
        super().__init__()
        self.table = nn.Embedding(vocab, d, padding_idx=PAD)
        nn.init.normal_(self.table.weight, std=0.02)
        encoder, generator, discriminator = layers
        self.encoder = Stack(encoder, d, hidden, heads, False, dropout)
        self.generator = Stack(generator, d, hidden, heads, True, dropout)
        self.discriminator = Stack(discriminator, d, hidden, heads, True, 0.0)
        self.bias = nn.Embedding(32, heads)
        self.head = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.LayerNorm(d), nn.Linear(d, 2))

    def buckets(self, length, device):
        relative = torch.arange(length, device=device)
        relative = relative[None] - relative[:, None]
        distance = relative.abs()
        far = 8 + (8 * torch.log(distance.clamp(min=1) / 8) / math.log(16)).long()
        return 16 * (relative > 0) + torch.where(distance < 8, distance, far.clamp(max=15))

    def forward(self, source, previous, targets, mask_id: int):
        keys = torch.zeros(source.shape, dtype=torch.float32).masked_fill(
            source == PAD, float("-inf")
        )[:, None, None]
        bias = self.bias(self.buckets(source.shape[1], source.device)).permute(2, 0, 1)[None]
        memory = self.encoder(source, self.table, keys + bias)
        length = previous.shape[1]
        causal = torch.full((length, length), float("-inf")).triu(1)

        def generate(tokens):
            own = torch.zeros(tokens.shape).masked_fill(tokens == PAD, float("-inf"))
            x = self.generator(tokens, self.table, own[:, None, None] + causal, memory, keys)
            return x @ self.table.weight.T

        kept = targets != PAD
        masked = kept & (targets < mask_id)
        logits = generate(previous)
        with torch.no_grad():
            p = torch.softmax(logits, -1).flatten(0, 1)
            drawn = torch.multinomial(p, 1).view_as(targets)
            sampled = torch.where(masked, drawn, targets)
            p = p.scatter(-1, targets.reshape(-1, 1), 0)
            forced = torch.multinomial(p, 1).view_as(targets)
        own = torch.zeros(sampled.shape).masked_fill(sampled == PAD, float("-inf"))[:, None, None]
        verdicts = self.head(self.discriminator(sampled, self.table, own, memory, keys))
        same = sampled == targets
        with torch.no_grad():
            judged = verdicts.argmax(-1) == 1
            more = torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], 1)
            eligible = masked & more & (sampled < mask_id)
            wrong = torch.where(judged, sampled, forced)
            at = (eligible & (same != judged))[:, :-1]
            noisy = previous.clone()
            noisy[:, 1:] = torch.where(at, wrong[:, :-1], previous[:, 1:])

        def nll(logits):
            losses = F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="sum"
            )
            return losses

        detection = F.cross_entropy(
            verdicts.flatten(0, 1), same.long().flatten(), reduction="none"
        ).view_as(targets)
        tokens = kept.sum()
        detection = (detection * masked).sum() * tokens / masked.sum().clamp(min=1)
        return (nll(logits) + 10 * detection + nll(generate(noisy))) / tokens
