"""ViTAS's DeiT-based search space: genomes, FLOPs, identity shifting, cyclic channel sets.

X. Su et al., "ViTAS: Vision Transformer Architecture Search", ECCV 2022, arXiv 2106.13700; genomes
and counter are those of xiusu/ViTAS@066bb20 (core/search_space, core/utils/flops.py,
tools/trainer/imagenet/trainer.py). Cyclic sets and identity shifting have no public code: they
are reconstructions with the properties the abstract states.

A genome is `[patch index, op of every block, 0, 0]` and then width indices
`[token dim, (attention, MLP) of every block]`; op `len(heads)` is the identity.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PERCENT = tuple(k / 10 for k in range(1, 11))
# Head choices of the official superformers.
SHARED_OPS = 4


@dataclasses.dataclass(frozen=True)
class Space:
    """Largest widths and the choices.

    Attributes:
      patches: patch sizes. heads: head counts of a block's ops.
      dim, attention, mlp: largest token dim, q+k+v width, MLP width.
      depth: block positions. identity: whether a block may be left out.
      percent: ascending shares of the largest widths.
    """

    patches: tuple[int, ...] = (14, 16, 32)
    heads: tuple[int, ...] = (3, 6, 12, 16)
    dim: int = 384
    attention: int = 1440
    mlp: int = 1440
    depth: int = 16
    classes: int = 1000
    identity: bool = True
    percent: tuple[float, ...] = PERCENT
    image_size: int = 224
    channels: int = 3

    def __post_init__(self) -> None:
        for p in self.patches:
            if self.image_size % p:
                raise ValueError(f"image size {self.image_size} is not divisible by patch {p}")

    @property
    def identity_index(self) -> int:
        """The op index that leaves a block out."""
        return len(self.heads)

    @property
    def model_genes(self) -> int:
        """Genes before the width indices."""
        return self.depth + 3

    @property
    def genes(self) -> int:
        """Length of a genome: 3 + depth + 1 + 2 depth."""
        return self.model_genes + 1 + 2 * self.depth

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound of every gene, int64 [genes] each."""
        ops = len(self.heads) - 1 + int(self.identity)
        widths = [len(self.percent) - 1] * (1 + 2 * self.depth)
        high = [len(self.patches) - 1, *([ops] * self.depth), 0, 0, *widths]
        return np.zeros(self.genes, np.int64), np.array(high)

    def table(self, size: int) -> np.ndarray:
        """`round(p size)` (half to even) of every width index, int64 [K]."""
        return np.array([round(p * size) for p in self.percent])

    def tokens(self, patch: int) -> int:
        """Patch tokens of a patch index, the class token not counted."""
        return (self.image_size // self.patches[patch]) ** 2

    def split(self, genes: Any) -> tuple[Any, Any, Any, Any, Any]:
        """`(patch, ops [depth], dim, attention [depth], mlp [depth])`, after any leading axes."""
        widths = genes[..., self.model_genes :]
        ops = genes[..., 1 : 1 + self.depth]
        return genes[..., 0], ops, widths[..., 0], widths[..., 1::2], widths[..., 2::2]

    def check(self, genome: Sequence[int], empty: bool = False, widths: bool = True) -> np.ndarray:
        """`genome` as int64 [genes].

        Raises ValueError: wrong length, an index out of range (naming its position), unless
        `empty`, all blocks the identity, and, if `widths`, an attention width that 3 heads do not
        divide in the stand-alone network.
        """
        genome = np.asarray(genome, np.int64)
        if genome.shape != (self.genes,):
            raise ValueError(
                f"a genome has {self.model_genes} + {1 + 2 * self.depth} genes, not {genome.size}"
            )
        low, high = self.bounds()
        for i in np.flatnonzero((genome < low) | (genome > high)):
            kind = "width index" if i >= self.model_genes else "op index" if i else "patch index"
            raise ValueError(f"gene {i} ({kind}): {genome[i]} is not in 0..{high[i]}")
        _, ops, _, attention, _ = self.split(genome)
        active = ops < self.identity_index
        if not active.any() and not empty:
            raise ValueError("all blocks are the identity; empty=True allows it")
        rows = self.table(self.attention)[attention]
        for i in np.flatnonzero(active & widths):
            self.check_heads(int(rows[i]), self.heads[ops[i]], f"block {i}")
        return genome

    def check_heads(self, width: int, heads: int, where: str) -> None:
        """ValueError unless an attention width q+k+v divides into 3 x heads."""
        if width % (3 * heads):
            raise ValueError(
                f"{where}: attention width {width} is not divisible by 3 x {heads} heads"
            )

    def legal(self, genomes: Any) -> np.ndarray:
        """Which genomes [N, genes] within the bounds are networks, bool [N]."""
        _, ops, _, attention, _ = self.split(np.asarray(genomes))
        active = ops < self.identity_index
        heads = np.array([*self.heads, 1])[ops]
        fits = self.table(self.attention)[attention] % (3 * heads) == 0
        return active.any(1) & (fits | ~active).all(1)

    # FLOPs

    def flops(self, genomes: Any, official: bool = True) -> Any:
        """Multiply-adds of genomes [genes] -> int or [N, genes] -> int64 [N].

        The official counter leaves the class token out and counts the last layer once a patch
        token; `official=False` counts what is computed.
        """
        genomes = np.asarray(genomes, np.int64)
        if genomes.ndim == 1:
            return int(self.flops(genomes[None], official)[0])
        patch, ops, dim, attention, mlp = self.split(genomes)
        sizes = np.array(self.patches)[patch]
        n = np.array([self.tokens(i) for i in range(len(self.patches))])[patch]
        c = self.table(self.dim)[dim]
        a = self.table(self.attention)[attention]
        m = self.table(self.mlp)[mlp]
        embed = self.channels * c * n * sizes**2
        rows = n if official else n + 1
        tokens, width = rows[:, None], c[:, None]
        third = a // 3
        block = tokens * (width * a + 2 * tokens * third + third * width + 2 * width * m)
        blocks = np.where(ops < self.identity_index, block, 0).sum(1)
        return embed + blocks + (n if official else 1) * c * self.classes

    def parameters(self, genome: Sequence[int]) -> int:
        """Number of parameters of the stand-alone network."""
        patch, dim, blocks = self.decode(genome)
        count = self.channels * patch**2 * dim + dim + dim
        count += ((self.image_size // patch) ** 2 + 1) * dim
        for block in blocks:
            if block is not None:
                _, a, m = block
                count += 4 * dim + a * dim + a + dim * (a // 3) + dim + 2 * m * dim + m + dim
        return count + 2 * dim + dim * self.classes + self.classes

    # Networks

    def decode(
        self, genome: Sequence[int]
    ) -> tuple[int, int, tuple[tuple[int, int, int] | None, ...]]:
        """`(patch size, token dim, blocks)` of the stand-alone network.

        A block is `(heads, attention width, MLP width)` or None, its width genes its own.
        """
        genome = np.asarray(genome, np.int64)
        patch, ops, dim, attention, mlp = self.split(genome)
        a, m = self.table(self.attention)[attention], self.table(self.mlp)[mlp]
        blocks = tuple(
            (self.heads[op], int(a[i]), int(m[i])) if op < self.identity_index else None
            for i, op in enumerate(ops)
        )
        return self.patches[int(patch)], int(self.table(self.dim)[dim]), blocks

    def shift(self, genomes: Any) -> np.ndarray:
        """Identity shifting: [.., genes] with the blocks in front, identities behind.

        A stable partition; a block takes its two width genes along, an identity's become 0. The
        network and its FLOPs stay the same, and two networks that are equal get one genome.
        """
        genomes = np.asarray(genomes, np.int64)
        flat = genomes.reshape(-1, self.genes)
        ops, widths = flat[:, 1 : 1 + self.depth], flat[:, self.model_genes + 1 :]
        away = ops == self.identity_index
        order = np.argsort(away, axis=1, kind="stable")
        pairs = np.where(away[..., None], 0, widths.reshape(-1, self.depth, 2))
        moved = flat.copy()
        moved[:, 1 : 1 + self.depth] = np.take_along_axis(ops, order, 1)
        pairs = np.take_along_axis(pairs, order[..., None], 1)
        moved[:, self.model_genes + 1 :] = pairs.reshape(len(flat), -1)
        return moved.reshape(genomes.shape)

    # Sampling

    def sample(self, key: Any, probability: float, shift: bool = False) -> Any:
        """One random genome int32 [genes], by a key, inside or outside `jit`.

        Uniform patch and widths; every block the identity with `probability`, else uniform over
        the head choices. With `shift` the draw is brought into its canonical form.
        """
        import jax
        import jax.numpy as jnp

        patch, away, heads, widths = jax.random.split(key, 4)
        ops = jax.random.randint(heads, (self.depth,), 0, len(self.heads))
        if self.identity:
            skipped = jax.random.bernoulli(away, probability, (self.depth,))
            ops = jnp.where(skipped, self.identity_index, ops)
        first = jax.random.randint(patch, (1,), 0, len(self.patches))
        count = 1 + 2 * self.depth
        wide = jax.random.randint(widths, (count,), 0, len(self.percent))
        if shift and self.identity:
            gone = ops == self.identity_index
            order = jnp.argsort(gone, stable=True)
            pairs = jnp.where(gone[:, None], 0, wide[1:].reshape(-1, 2))[order]
            ops, wide = ops[order], jnp.concatenate([wide[:1], pairs.reshape(-1)])
        parts = [first, ops, jnp.zeros(2, jnp.int32), wide]
        return jnp.concatenate([p.astype(jnp.int32) for p in parts])

    def sample_many(
        self, rng: np.random.Generator, count: int, probability: float, shift: bool = False
    ) -> np.ndarray:
        """`count` genomes of the same law, int64 [N, genes], on the host."""
        low, high = self.bounds()
        genomes = rng.integers(low, high + 1, size=(count, self.genes))
        ops = rng.integers(0, len(self.heads), size=(count, self.depth))
        if self.identity:
            skipped = rng.random((count, self.depth)) < probability
            ops = np.where(skipped, self.identity_index, ops)
        genomes[:, 1 : 1 + self.depth] = ops
        return self.shift(genomes) if shift and self.identity else genomes

    def cheapest_and_dearest(self) -> tuple[int, int]:
        """Fewest and most multiply-adds of a network with at least one block."""
        low, high = self.bounds()
        ends = []
        for patch in range(len(self.patches)):
            small, large = low.copy(), high.copy()
            small[0] = large[0] = patch
            small[1 : 1 + self.depth] = self.identity_index if self.identity else 0
            small[1] = 0
            large[1 : 1 + self.depth] = 0
            ends += [self.flops(small), self.flops(large)]
        return min(ends), max(ends)

    def check_budget(self, least: float, budget: float) -> None:
        """ValueError, with the range there is, for a band of no network or beyond the largest."""
        check_band(least, budget, self.cheapest_and_dearest())

    def example(self, share: float) -> np.ndarray:
        """A canonical genome with this share of every width and of the depth, int64 [genes]."""
        low, high = self.bounds()
        genome = np.rint(low + share * (high - low)).astype(np.int64)
        depth = max(1, round(share * self.depth))
        genome[0] = len(self.patches) // 2
        genome[1 : 1 + self.depth] = 0
        if self.identity:
            genome[1 + depth : 1 + self.depth] = self.identity_index
            genome = self.shift(genome)
        return genome

    def identity_probability(
        self, least: float, budget: float, draws: int = 1000, seed: int = 0
    ) -> tuple[float, float]:
        """As `search_identity_probability`."""
        return search_identity_probability(self, least, budget, draws, seed)

    def recover(self, ops: Any, widths: Any) -> np.ndarray:
        """Genomes [N, genes] of op genes [N, depth + 3] and width shares [N, 1 + 2 depth].

        Raises ValueError for a share that is none of `percent` and for a gene out of range. Widths
        that heads do not divide pass: the official sampler draws them too, and counts them.
        """
        shares = np.asarray(self.percent)
        indices = np.abs(np.asarray(widths)[..., None] - shares).argmin(-1)
        if not np.allclose(shares[indices], widths, rtol=0, atol=1e-9):
            raise ValueError(f"a width share is none of {list(self.percent)}")
        genomes = np.concatenate([np.asarray(ops, np.int64), indices], axis=1)
        return np.stack([self.check(g, empty=True, widths=False) for g in genomes])


def check_band(least: float, budget: float, reach: tuple[int, int]) -> None:
    """ValueError when no network lies in a band of multiply-adds, or none is as large as it allows.

    A budget beyond the largest network restricts nothing: most likely it was meant for another
    space.
    """
    if least > budget or budget < reach[0] or least > reach[1]:
        raise ValueError(
            f"no network has between {least:,.0f} and {budget:,.0f} multiply-adds; "
            f"they have {reach[0]:,} to {reach[1]:,}"
        )
    if budget > reach[1]:
        raise ValueError(
            f"the budget {budget:,.0f} is above the largest network; networks have {reach[0]:,} to "
            f"{reach[1]:,} multiply-adds"
        )


def search_identity_probability(
    space: Any, least: float, budget: float, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """`(probability, mean FLOPs)`: the identity probability whose draws lie in the band.

    From 0.5 in steps of 0.01, up while the mean of `draws` draws is over the budget and down
    while it is under `least`, as the official search does.

    Raises ValueError for a band out of reach or when the probability leaves (0, 1).
    """
    space.check_budget(least, budget)
    probability, mean = 0.5, float("nan")
    seen: dict[int, float] = {}
    while True:
        hundredths = round(100 * probability)
        if not 0 < hundredths < 100:
            raise ValueError(
                f"no identity probability in (0, 1) gives a mean between {least:,.0f} and "
                f"{budget:,.0f} multiply-adds; at {probability:.2f} it is {mean:,.0f}"
            )
        rng = np.random.default_rng((seed, hundredths))
        mean = float(space.flops(space.sample_many(rng, draws, probability)).mean())
        if least <= mean <= budget:
            return probability, mean
        seen[hundredths] = mean
        step = 1 if mean > budget else -1
        if hundredths + step in seen:
            raise ValueError(
                f"the mean jumps over the band {least:,.0f} to {budget:,.0f} between identity "
                f"probabilities {probability:.2f} and {(hundredths + step) / 100:.2f}"
            )
        probability = (hundredths + step) / 100


# The official configuration form


def from_official(config: Mapping[str, Any], percent: Sequence[float] | None = None) -> Space:
    """The space of `{"backbone": {init_stem, Block, Norm, FC}, "depth", ...}`."""
    backbone = config["backbone"]
    _, channels, patches, _, dim, *_ = backbone["init_stem"]
    depth, _, heads, attention, _, mlp, _, _, ops = backbone["Block"]
    percent = percent or config.get("channel_percent") or (1.0,)
    if config.get("heads_share"):
        # A superformer's blocks have four sets of weights, and op 4 is the identity.
        heads = [*heads, *heads[-1:] * (SHARED_OPS - len(heads))][:SHARED_OPS]
    return Space(
        *(tuple(patches), tuple(heads), dim, attention, mlp, depth),
        classes=backbone["FC"][4],
        identity="id" in ops,
        percent=tuple(percent),
        image_size=config.get("image_size", 224),
        channels=channels,
    )


def official_genome(config: Mapping[str, Any]) -> np.ndarray:
    """The genome of a searched network's configuration: its `net_id`, or the cell of all blocks."""
    space = from_official(config)
    if "net_id" in config:
        genes = np.array([int(v) for v in config["net_id"].split()])
        blocks = genes[1 : 1 + space.depth]
        if space.identity:  # whatever is no head choice
            np.minimum(blocks, space.identity_index, out=blocks)
        return space.check(genes)
    genome = np.zeros(space.genes, np.int64)
    genome[space.model_genes :] = len(space.percent) - 1
    return space.check(genome)


# Cyclic weight sharing


def cyclic_offsets(widths: Sequence[int], channels: int) -> np.ndarray:
    """Start of every width's channel set on the circle of `channels`, int64 [K].

    Ascending widths c_1 < ... < c_K are laid end to end around the circle, so that each channel
    serves floor or ceil of (c_1 + ... + c_K) / channels of them:
    o_k = (c_1 + ... + c_{k-1}) mod channels. (Our reconstruction of arXiv 2106.13700v2.)

    Raises ValueError for widths that are empty, not ascending, repeated, below 1 or too wide.
    """
    widths = [int(w) for w in widths]
    if not widths:
        raise ValueError("cyclic sharing needs at least one width")
    for before, after in itertools.pairwise(widths):
        if after <= before:
            raise ValueError(f"widths must ascend without repetition: {after} follows {before}")
    if widths[0] < 1 or widths[-1] > channels:
        raise ValueError(f"widths {widths[0]}..{widths[-1]} must lie in 1..{channels}")
    return np.concatenate([[0], np.cumsum(widths[:-1])]).astype(np.int64) % channels


def cyclic_indices(widths: Sequence[int], channels: int) -> np.ndarray:
    """Channel sets in their order, int64 [K, widest], rows padded with -1."""
    offsets = cyclic_offsets(widths, channels)
    steps = np.arange(max(widths))
    rows = (offsets[:, None] + steps) % channels
    return np.where(steps < np.asarray(widths)[:, None], rows, -1)


def cyclic_masks(widths: Sequence[int], channels: int) -> np.ndarray:
    """Channel sets as a bool table [K, channels]."""
    offsets = cyclic_offsets(widths, channels)
    behind = (np.arange(channels) - offsets[:, None]) % channels
    return behind < np.asarray(widths)[:, None]


def channel_usage(widths: Sequence[int], channels: int, sharing: str = "cyclic") -> np.ndarray:
    """How many widths use each channel, int64 [channels].

    `sharing`: cyclic; ordinal (the first channels); two_sided (both passes of first and last).
    """
    places = np.arange(channels)
    first = (places[None] < np.asarray(widths)[:, None]).sum(0)
    if sharing == "cyclic":
        return cyclic_masks(widths, channels).sum(0)
    if sharing == "two_sided":
        return first + first[::-1]
    if sharing == "ordinal":
        return first
    raise ValueError(f"sharing {sharing!r}; known: cyclic, ordinal, two_sided")


@functools.lru_cache(maxsize=64)
def sharing_offsets(space: Space, sharing: str) -> np.ndarray:
    """Start of every token width for left, right and cyclic slices, int64 [3, K]."""
    widths = space.table(space.dim)
    rows = [np.zeros(len(widths), np.int64), space.dim - widths]
    rows.append(cyclic_offsets(widths, space.dim) if sharing == "cyclic" else rows[0])
    return np.array(rows)
