"""ViTAS's Twins-based space: our construction around official Twins-SVT.

The paper's second version searches in a Twins-based space; no code of it is public, and the genes
here are inferred: by stage a token dim, by block a head count or the identity, an attention width
and an MLP width. Blocks at even positions attend within windows, at odd ones globally, and the
first two of a stage are never the identity, so that both kinds stay.

A genome is, stage by stage, `[token dim, (op, attention, MLP) of every block]`; op 4 is the
identity. Widths: token dims are p D_s to the nearest multiple of 8, attention widths p D_s to the
nearest multiple of 6 base heads (which every head choice divides), MLP widths round(p 4 D_s).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.search.vitas_space import check_band, search_identity_probability

HEAD_SHARES = (0.5, 1.0, 1.5, 2.0)
IDENTITY = len(HEAD_SHARES)
TOKEN_STEP = 8


@dataclasses.dataclass(frozen=True)
class Space:
    """Largest widths and the choices, by stage.

    Attributes:
      dims: largest token dims (1.5 x Twins-SVT-S). heads: base head counts, even. depths: block
        positions. windows, sr_ratios: as in Twins-SVT. steps: width choices of each gene.
    """

    dims: tuple[int, ...] = (96, 192, 384, 768)
    heads: tuple[int, ...] = (2, 4, 8, 16)
    depths: tuple[int, ...] = (2, 2, 10, 4)
    windows: tuple[int, ...] = (7, 7, 7, 7)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    patch_size: int = 4
    classes: int = 1000
    image_size: int = 224
    channels: int = 3
    steps: int = 10

    def __post_init__(self) -> None:
        for s, (dim, heads, depth) in enumerate(zip(self.dims, self.heads, self.depths)):
            if heads % 2 or dim % (6 * heads):
                raise ValueError(
                    f"stage {s}: {heads} heads must be even and 6 x heads divide the dim {dim}"
                )
            if depth < 2:
                raise ValueError(f"stage {s}: depth {depth} leaves no room for both kinds of block")
            side = self.side(s)
            if side * self.stride(s) != self.image_size or side % self.windows[s]:
                raise ValueError(
                    f"stage {s}: a {self.image_size}-pixel image gives a map of "
                    f"{self.image_size / self.stride(s):g}, windows are {self.windows[s]}"
                )
            if side % self.sr_ratios[s]:
                raise ValueError(
                    f"stage {s}: a {side}x{side} map does not divide by the sub-sampling ratio "
                    f"{self.sr_ratios[s]}"
                )

    def stride(self, stage: int) -> int:
        """Pixels an entry of a stage's map stands for."""
        return self.patch_size * 2**stage

    def side(self, stage: int) -> int:
        """Height and width of a stage's map."""
        return self.image_size // self.stride(stage)

    def head_counts(self, stage: int) -> tuple[int, ...]:
        """Heads of ops 0..3."""
        return tuple(int(share * self.heads[stage]) for share in HEAD_SHARES)

    def token_widths(self, stage: int) -> tuple[int, ...]:
        """Ascending token dims; fewer than `steps` where rounding joins some."""
        shares = [k / self.steps * self.dims[stage] for k in range(1, self.steps + 1)]
        return tuple(sorted({max(TOKEN_STEP, _nearest(w, TOKEN_STEP)) for w in shares}))

    def attention_widths(self, stage: int) -> tuple[int, ...]:
        """Attention widths (of q, k and v each) by gene."""
        step = 6 * self.heads[stage]
        shares = [k / self.steps * self.dims[stage] for k in range(1, self.steps + 1)]
        return tuple(max(step, _nearest(w, step)) for w in shares)

    def mlp_widths(self, stage: int) -> tuple[int, ...]:
        """MLP widths by gene."""
        return tuple(round(k / self.steps * 4 * self.dims[stage]) for k in range(1, self.steps + 1))

    @property
    def identity(self) -> bool:
        """Blocks can be left out."""
        return True

    @property
    def genes(self) -> int:
        """Length of a genome."""
        return sum(1 + 3 * depth for depth in self.depths)

    def stages(self) -> list[slice]:
        """Where each stage's genes stand."""
        ends = np.cumsum([1 + 3 * depth for depth in self.depths])
        return [slice(int(e) - 1 - 3 * d, int(e)) for e, d in zip(ends, self.depths)]

    def split(self, genes: Any, stage: int) -> tuple[Any, Any, Any, Any]:
        """`(token dim [..], ops [.., depth], attention [.., depth], mlp [.., depth])`."""
        part = genes[..., self.stages()[stage]]
        return part[..., 0], part[..., 1::3], part[..., 2::3], part[..., 3::3]

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound of every gene, int64 [genes] each."""
        high = []
        for s, depth in enumerate(self.depths):
            high.append(len(self.token_widths(s)) - 1)
            for i in range(depth):
                high += [IDENTITY if i >= 2 else IDENTITY - 1, self.steps - 1, self.steps - 1]
        return np.zeros(self.genes, np.int64), np.array(high)

    def check(self, genome: Sequence[int]) -> np.ndarray:
        """`genome` as int64 [genes]; ValueError for a wrong length or an index out of range."""
        genome = np.asarray(genome, np.int64)
        if genome.shape != (self.genes,):
            raise ValueError(f"a Twins genome has {self.genes} genes, not {genome.size}")
        low, high = self.bounds()
        for i in np.flatnonzero((genome < low) | (genome > high)):
            raise ValueError(f"gene {i}: {genome[i]} is not in 0..{high[i]}")
        return genome

    def decode(self, genome: Sequence[int]) -> tuple[tuple[int, tuple[Any, ...]], ...]:
        """By stage `(token dim, blocks)`; a block is `(heads, attention, MLP)` or None."""
        genome, out = np.asarray(genome, np.int64), []
        for s in range(len(self.dims)):
            dim, ops, attention, mlp = self.split(genome, s)
            heads, a, m = self.head_counts(s), self.attention_widths(s), self.mlp_widths(s)
            blocks = tuple(
                None if op == IDENTITY else (heads[op], a[attention[i]], m[mlp[i]])
                for i, op in enumerate(ops)
            )
            out.append((self.token_widths(s)[int(dim)], blocks))
        return tuple(out)

    def flops(self, genomes: Any) -> Any:
        """Multiply-adds, exact, of genomes [genes] -> int or [N, genes] -> int64 [N]."""
        genomes = np.asarray(genomes, np.int64)
        if genomes.ndim == 1:
            return int(self.flops(genomes[None])[0])
        total = np.zeros(len(genomes), np.int64)
        before: Any = self.channels
        for s in range(len(self.dims)):
            gene, ops, attention, mlp = self.split(genomes, s)
            n, patch = self.side(s) ** 2, self.patch_size if s == 0 else 2
            c = np.array(self.token_widths(s))[gene]
            total += n * patch**2 * before * c + 9 * n * c
            a = np.array(self.attention_widths(s))[attention]
            m = np.array(self.mlp_widths(s))[mlp]
            dim = c[:, None]
            rows = np.arange(self.depths[s]) % 2 == 1
            r = self.sr_ratios[s]
            keys = n // r**2
            window = n * dim * 3 * a + 2 * n * self.windows[s] ** 2 * a
            reduced = keys * r**2 * dim * dim if r > 1 else 0
            whole = n * dim * a + reduced + keys * dim * 2 * a + 2 * n * keys * a
            block = np.where(rows, whole, window) + n * a * dim + 2 * n * dim * m
            total += np.where(ops != IDENTITY, block, 0).sum(1)
            before = c
        return total + before * self.classes

    def shift(self, genomes: Any) -> np.ndarray:
        """Identity shifting that keeps the alternation, [.., genes].

        In their order, a stage's blocks move to the first free position of their own kind (even:
        windows, odd: global) behind the block before them; identities get width genes 0. Two
        genomes of one network then are equal.
        """
        genomes = np.asarray(genomes, np.int64)
        flat = genomes.reshape(-1, self.genes).copy()
        for s, depth in enumerate(self.depths):
            place = self.stages()[s]
            for row in flat:
                blocks = row[place][1:].reshape(depth, 3)
                packed = np.tile([IDENTITY, 0, 0], (depth, 1))
                free = 0
                for i, block in enumerate(blocks):
                    if block[0] != IDENTITY:
                        free += (i - free) % 2
                        packed[free] = block
                        free += 1
                row[place.start + 1 : place.stop] = packed.ravel()
        return flat.reshape(genomes.shape)

    def sample_many(
        self, rng: np.random.Generator, count: int, probability: float, shift: bool = False
    ) -> np.ndarray:
        """`count` genomes, int64 [N, genes]: identities with `probability`, the rest uniform."""
        low, high = self.bounds()
        genomes = rng.integers(low, np.minimum(high, self.steps - 1) + 1, size=(count, self.genes))
        for s, place in enumerate(self.stages()):
            shape = (count, self.depths[s])
            ops = rng.integers(0, IDENTITY, size=shape)
            away = (rng.random(shape) < probability) & (np.arange(self.depths[s]) >= 2)
            genomes[:, place.start + 1 : place.stop : 3] = np.where(away, IDENTITY, ops)
        return self.shift(genomes) if shift else genomes

    def sample(self, key: jax.Array, probability: float, shift: bool = False) -> jax.Array:
        """One random genome int32 [genes] of the same law, inside or outside `jit`."""
        _, high = self.bounds()
        away, rest = jax.random.split(key)
        last = jnp.asarray(np.minimum(high, self.steps - 1) + 1)
        genome = jax.random.randint(rest, (self.genes,), 0, last)
        skipped = jax.random.bernoulli(away, probability, (self.genes,))
        for s, place in enumerate(self.stages()):
            count = self.depths[s]
            blocks = genome[place.start + 1 : place.stop].reshape(-1, 3)
            gone = skipped[place.start + 1 : place.stop : 3] & (jnp.arange(count) >= 2)
            heads = jax.random.randint(jax.random.fold_in(rest, s), (count,), 0, IDENTITY)
            blocks = blocks.at[:, 0].set(jnp.where(gone, IDENTITY, heads))
            if shift:
                blocks = self._packed(blocks)
            genome = genome.at[place.start + 1 : place.stop].set(blocks.ravel())
        return genome.astype(jnp.int32)

    @staticmethod
    def _packed(blocks):
        """`shift` of one stage's blocks [depth, 3], traced."""
        packed = jnp.tile(jnp.array([IDENTITY, 0, 0], blocks.dtype), (len(blocks), 1))
        free = jnp.zeros((), jnp.int32)
        for i in range(len(blocks)):
            here = blocks[i, 0] != IDENTITY
            target = free + (i - free) % 2
            packed = jnp.where(here, packed.at[target].set(blocks[i]), packed)
            free = jnp.where(here, target + 1, free)
        return packed

    def example(self, share: float) -> np.ndarray:
        """A canonical genome with this share of every width and of the depths, int64 [genes]."""
        low, high = self.bounds()
        genome = np.rint(low + share * (high - low)).astype(np.int64)
        for s, place in enumerate(self.stages()):
            kept = max(2, round(share * self.depths[s]))
            ops = np.where(np.arange(self.depths[s]) < kept, 1, IDENTITY)
            genome[place.start + 1 : place.stop : 3] = ops
        return self.shift(genome)

    def cheapest_and_dearest(self) -> tuple[int, int]:
        """Fewest and most multiply-adds."""
        low, high = self.bounds()
        small, large = low.copy(), high.copy()
        for place in self.stages():
            ops = slice(place.start + 1, place.stop, 3)
            small[ops] = np.where(high[ops] == IDENTITY, IDENTITY, 0)
            large[ops] = 0
        return self.flops(small), self.flops(large)

    def check_budget(self, least: float, budget: float) -> None:
        """ValueError, with the range there is, for a band of no network or beyond the largest."""
        check_band(least, budget, self.cheapest_and_dearest())

    def identity_probability(
        self, least: float, budget: float, draws: int = 1000, seed: int = 0
    ) -> tuple[float, float]:
        """As `vitas_space.search_identity_probability`."""
        return search_identity_probability(self, least, budget, draws, seed)

    def legal(self, genomes: Any) -> np.ndarray:
        """Every genome within the bounds is a network, bool [N]."""
        return np.ones(len(genomes), bool)


def _nearest(value: float, step: int) -> int:
    return round(value / step) * step
