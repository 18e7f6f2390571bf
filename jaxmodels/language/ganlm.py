"""GanLM: an encoder-decoder with a second, bidirectional decoder that detects replaced tokens.

J. Yang et al., "GanLM: Encoder-Decoder Pre-training with an Auxiliary Discriminator", ACL 2023,
arXiv 2212.10218. Structure and names after the official code, CSJianYang/GanLM@6094288
(`unilm/models/electra_encoder_decoder_v6.py`, the architectures `GanLM` and `GanLM_large`). The
encoder stands under `encoder.discriminator` in published checkpoints, so it does here.
The objective is in `ganlm_objective`, the corruption of documents in `span_corruption`.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.language.ganlm_checkpoint import TORCH_RULES, check_checkpoint, upgrade_checkpoint
from jaxmodels.language.ganlm_stacks import ClassificationHead, DetectionHead, Stack, all_states
from jaxmodels.language.span_corruption import check_ids
from jaxmodels.layers.activations import ACTIVATIONS
from jaxmodels.layers.attention import causal_mask, padding_mask

__all__ = ["TORCH_RULES", "GanLM", "check_checkpoint", "count_parameters", "upgrade_checkpoint"]

STRATEGIES = ("pretraining", "generator", "discriminator", "both")


def rotate_right(tokens: jax.Array, pad_id: int) -> jax.Array:
    """Each row of `tokens` [B, T] rolled right by one within its own length; padding on the right.

    The last token comes first: a classifier that reads position 0 is fed the final `</s>`.
    """
    length = (tokens != pad_id).sum(-1, keepdims=True)
    place = jnp.arange(tokens.shape[-1])
    rolled = jnp.take_along_axis(tokens, (place - 1) % jnp.maximum(length, 1), axis=-1)
    return jnp.where(place < length, rolled, tokens)


class GanLM(nn.Module):
    """Encoder, generator and discriminator around one token table.

    Argument names are the official ones. `initialization_strategy`:

    - "pretraining", "both": encoder, generator and discriminator with its two-way head;
    - "generator": encoder and generator;
    - "discriminator": encoder and discriminator, for understanding (`classify`) or, its output
      tied to the token table, as a small generator.

    `num_classes` > 0 adds a classification head named `head_name`, with `pooler_activation`
    between its two layers.
    The discriminator drops nothing out where it stands beside a generator, unless it shares its
    layers (the official behavior). `rescale_init` divides the residual outputs of layer l of every
    stack by sqrt(2 l) at initialization. `remat` recomputes layers in the backward pass;
    `scan_unroll` layers are computed by one turn of the scan (compile time grows with it).
    `resize_checkpoint` lets files with another dictionary or other lengths be loaded.

    Raises ValueError for sizes that do not fit together and an unknown strategy.
    """

    vocab_size: int
    embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    decoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    decoder_attention_heads: int = 12
    encoder_layers: int = 12
    generator_decoder_layers: int = 12
    discriminator_decoder_layers: int = 4
    max_source_positions: int = 512
    max_target_positions: int = 512
    initialization_strategy: str = "pretraining"
    share_generator_discriminator: bool = False
    rel_pos_buckets: int = 32
    activation: str = "gelu"
    no_scale_embedding: bool = False
    layernorm_embedding: bool = True
    layernorm_eps: float = 1e-5
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    pooler_activation: str = "tanh"
    pooler_dropout: float = 0.1
    num_classes: int = 0
    head_name: str = "sentence_classification_head"
    rescale_init: bool = True
    pad_id: int = 1
    eos_id: int = 2
    remat: bool = False
    scan_unroll: int = 1
    resize_checkpoint: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.initialization_strategy not in STRATEGIES:
            raise ValueError(
                f"initialization_strategy {self.initialization_strategy!r}; known: "
                f"{', '.join(STRATEGIES)}"
            )
        for side in ("encoder", "decoder"):
            heads = getattr(self, f"{side}_attention_heads")
            if heads < 1 or self.embed_dim % heads:
                raise ValueError(
                    f"embed_dim {self.embed_dim} is not divisible by {side}_attention_heads {heads}"
                )
        if self.shares_layers and self.discriminator_decoder_layers > self.generator_decoder_layers:
            raise ValueError(
                f"share_generator_discriminator: the discriminator's "
                f"{self.discriminator_decoder_layers} layers are the generator's first, which has "
                f"{self.generator_decoder_layers}"
            )
        for name in ("activation", "pooler_activation"):
            if getattr(self, name) not in ACTIVATIONS:
                raise ValueError(f"{name} {getattr(self, name)!r}; known: {', '.join(ACTIVATIONS)}")
        super().__post_init__()

    @property
    def has_generator(self) -> bool:
        return self.initialization_strategy != "discriminator"

    @property
    def has_discriminator(self) -> bool:
        return self.initialization_strategy != "generator"

    @property
    def detects(self) -> bool:
        """Whether there is a two-way head."""
        return self.has_generator and self.has_discriminator

    @property
    def shares_layers(self) -> bool:
        return self.share_generator_discriminator and self.detects

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: source and target tokens [1, 8]."""
        return (jax.ShapeDtypeStruct((1, 8), jnp.int32),) * 2

    def setup(self) -> None:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        common = dict(
            pad_id=self.pad_id,
            embed_scale=1.0 if self.no_scale_embedding else math.sqrt(self.embed_dim),
            layernorm_embedding=self.layernorm_embedding,
            remat=self.remat,
            scan_unroll=self.scan_unroll,
        )
        layer = dict(
            features=self.embed_dim,
            activation=self.activation,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            activation_dropout=self.activation_dropout,
            epsilon=self.layernorm_eps,
            **types,
        )
        encoder_layer = dict(
            hidden=self.encoder_ffn_embed_dim,
            heads=self.encoder_attention_heads,
            bert_init=True,
            rescale=self.rescale_init,
        )
        decoder_layer = dict(
            hidden=self.decoder_ffn_embed_dim,
            heads=self.decoder_attention_heads,
            cross=True,
            rescale=self.rescale_init,
        )
        self.encoder = Stack(
            self.encoder_layers,
            {**layer, **encoder_layer},
            self.max_source_positions,
            vocab_size=self.vocab_size,
            relative_buckets=self.rel_pos_buckets,
            name="encoder.discriminator",
            **common,
        )
        if self.has_generator:
            self.generator = Stack(
                self.generator_decoder_layers,
                {**layer, **decoder_layer},
                self.max_target_positions,
                name="decoder.generator",
                **common,
            )
        if self.has_discriminator:
            quiet = dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
            if self.shares_layers:
                self.detection_head = DetectionHead(
                    self.activation,
                    self.layernorm_eps,
                    name="decoder.discriminator.output_projection",
                    **types,
                )
            else:
                self.discriminator = Stack(
                    self.discriminator_decoder_layers,
                    {**layer, **decoder_layer, **(quiet if self.has_generator else {})},
                    self.max_target_positions,
                    detection_head=self.has_generator,
                    name="decoder.discriminator",
                    **common,
                )
        if self.num_classes:
            self.classifier = ClassificationHead(
                self.num_classes,
                self.pooler_activation,
                self.pooler_dropout,
                name=f"classification_heads.{self.head_name}",
                **types,
            )

    def __call__(self, source: jax.Array, target: jax.Array, train: bool = False):
        """Logits of `target` [B, T] read from `source` [B, S]: vocabulary [B, T, V] or classes.

        With a classification head, (logits [B, T, V], class logits [B, C]). Every parameter is
        touched, so that this initializes the model.
        """
        memory = self.encode(source, train)
        logits = self.generate(target, memory, source, train)
        if self.is_initializing() and self.detects:
            self.detect(target, memory, source, train)
        if self.num_classes:
            return logits, self.classify(source, train=train)
        return logits

    @nn.nowrap
    def _key(self, train: bool) -> jax.Array | None:
        return self.make_rng("dropout") if train and not self.is_initializing() else None

    @nn.nowrap
    def _keys(self, train: bool) -> tuple[jax.Array | None, jax.Array | None]:
        key = self._key(train)
        return (None, None) if key is None else tuple(jax.random.split(key))

    @nn.nowrap
    def _check(self, tokens: jax.Array, limit: int) -> None:
        if tokens.shape[-1] > limit:
            raise ValueError(f"{tokens.shape[-1]} tokens exceed max positions {limit}")
        # Under `jit` they have no values; there, who makes the batches checks them.
        if not isinstance(tokens, jax.core.Tracer):
            check_ids(tokens, self.vocab_size)

    @property
    def table(self) -> jax.Array:
        """The token table [V, D]."""
        return self.encoder.embed_tokens.embedding

    def encode(self, source: jax.Array, train: bool = False, states: bool = False):
        """Encoder output [B, S, D] of `source` [B, S]; with `states`, (that, every state)."""
        self._check(source, self.max_source_positions)
        embed_key, layers_key = self._keys(train)
        embedded = self.encoder.embed(source, self.table, rng=embed_key)
        memory, layers = self.encoder.run(
            embedded,
            bias=self.encoder.position_bias(source.shape[-1]),
            mask=padding_mask(source != self.pad_id),
            rng=layers_key,
            states=states,
        )
        return (memory, all_states(embedded, layers)) if states else memory

    def decode(
        self, stack, tokens, memory, source, *, causal, train=False, layers=None, states=False
    ):
        """Decoder features [B, T, D] of a stack over `tokens` [B, T] and the encoder's output."""
        self._check(tokens, self.max_target_positions)
        embed_key, layers_key = self._keys(train)
        embedded = stack.embed(tokens, self.table, rng=embed_key)
        mask = padding_mask(tokens != self.pad_id)
        x, outputs = stack.run(
            embedded,
            memory,
            layers=layers,
            mask=mask & causal_mask(tokens.shape[-1]) if causal else mask,
            memory_mask=padding_mask(source != self.pad_id),
            rng=layers_key,
            states=states,
        )
        return (x, all_states(embedded, outputs)) if states else x

    @property
    def writer(self) -> Stack:
        """The decoder that generates: the generator, or with strategy "discriminator" that one."""
        return self.generator if self.has_generator else self.discriminator

    def project(self, x: jax.Array) -> jax.Array:
        """Features [B, T, D] -> vocabulary logits [B, T, V], float32 or wider."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        table = self.table.astype(self.dtype)
        return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=wide)

    def generate(self, previous, memory, source, train=False, states=False):
        """Next-token logits [B, T, V] of the causal decoder fed `previous` [B, T]."""
        x = self.decode(
            self.writer, previous, memory, source, causal=True, train=train, states=states
        )
        return (self.project(x[0]), x[1]) if states else self.project(x)

    def detect(self, tokens, memory, source, train=False, states=False):
        """Is each of `tokens` [B, T] the gold one? Logits [B, T, 2] of the discriminator."""
        if self.shares_layers:
            stack, head = self.generator, self.detection_head
        else:
            stack, head = self.discriminator, self.discriminator.head
        layers = self.discriminator_decoder_layers
        x = self.decode(
            stack, tokens, memory, source, causal=False, train=train, layers=layers, states=states
        )
        return (head(x[0]), x[1]) if states else head(x)

    def read(self, source, rotated=None, train=False, states=False):
        """Bidirectional decoder features [B, S, D] of `source`, fed to the decoder rotated."""
        rotated = rotate_right(source, self.pad_id) if rotated is None else rotated
        stack = self.discriminator if self.has_discriminator and not self.shares_layers else None
        stack = self.generator if stack is None else stack
        memory = self.encode(source, train)
        return self.decode(stack, rotated, memory, source, causal=False, train=train, states=states)

    def classify(self, source, rotated=None, train=False) -> jax.Array:
        """Class logits [B, C] from decoder position 0, fed the final `</s>` of `source` [B, S]."""
        features = self.read(source, rotated, train)
        return self.classifier(features[:, 0], self._key(train))

    def start(self, source: jax.Array, rows: int, length: int):
        """(cache, memory) of cached decoding: `rows` hypotheses of at most `length` tokens a row.

        Returns: cache, a pair `[n, B * rows, length, N, H]`, to be reordered along axis -4; memory,
        the cross-attention's keys and values `[n, B, S, N, H]` and mask, which rows share.
        """
        if length > self.max_target_positions:
            raise ValueError(f"{length} tokens exceed max positions {self.max_target_positions}")
        keys, values = self.writer.memory(self.encode(source))
        shape = (keys.shape[0], source.shape[0] * rows, length, *keys.shape[-2:])
        cache = (jnp.zeros(shape, keys.dtype), jnp.zeros(shape, keys.dtype))
        return cache, ((keys, values), padding_mask(source != self.pad_id))

    def step(self, tokens, position, cache, memory):
        """Next-token logits [R, V] after `tokens` [R] at `position` -> (logits, cache)."""
        index = jnp.where(tokens == self.pad_id, self.pad_id, self.pad_id + 1 + position)
        x = self.writer.embed(tokens[:, None], self.table, index[:, None])
        (keys_values, mask) = memory
        x, cache = self.writer.step(x, cache, keys_values, position, mask)
        return self.project(x)[:, 0], cache


MODEL = GanLM

_BASE = dict(
    embed_dim=768,
    encoder_ffn_embed_dim=3072,
    decoder_ffn_embed_dim=3072,
    encoder_attention_heads=12,
    decoder_attention_heads=12,
    encoder_layers=12,
    generator_decoder_layers=12,
    discriminator_decoder_layers=4,
)
_LARGE = dict(
    embed_dim=1024,
    encoder_ffn_embed_dim=4096,
    decoder_ffn_embed_dim=4096,
    encoder_attention_heads=16,
    decoder_attention_heads=16,
    encoder_layers=24,
    generator_decoder_layers=24,
    discriminator_decoder_layers=4,
    max_source_positions=1024,
    max_target_positions=1024,
)
MULTILINGUAL_VOCABULARY = 250104

VARIANTS: dict[str, dict[str, Any]] = {
    "ganlm_base": _BASE,
    "ganlm_large": _LARGE,
    "ganlm_base_multilingual": {**_BASE, "vocab_size": MULTILINGUAL_VOCABULARY},
    "ganlm_large_multilingual": {**_LARGE, "vocab_size": MULTILINGUAL_VOCABULARY},
}


def count_parameters(module: GanLM) -> dict[str, int]:
    """Parameters by part, from the sizes alone, and their `total`; tied tables count once.

    Gives 1,032,934,914 for `ganlm_large_multilingual`, as the official launch log prints.
    """
    d, m = module.embed_dim, module

    def attention():
        return 4 * (d * d + d) + 2 * d

    def feed_forward(hidden):
        return 2 * d * hidden + hidden + d + 2 * d

    def frame(positions):
        norm = 2 * d if m.layernorm_embedding else 0
        return (positions + m.pad_id + 1) * d + norm

    parts = {"embedding": m.vocab_size * d}
    parts["encoder"] = (
        frame(m.max_source_positions)
        + m.encoder_layers * (attention() + feed_forward(m.encoder_ffn_embed_dim))
        + m.rel_pos_buckets * m.encoder_attention_heads
    )
    decoder_layer = 2 * attention() + feed_forward(m.decoder_ffn_embed_dim)
    head = d * d + d + 2 * d + 2 * d + 2 if m.detects else 0
    if m.has_generator:
        parts["generator"] = (
            frame(m.max_target_positions) + m.generator_decoder_layers * decoder_layer
        )
    if m.has_discriminator:
        own = frame(m.max_target_positions) + m.discriminator_decoder_layers * decoder_layer
        parts["discriminator"] = head + (0 if m.shares_layers else own)
    if m.num_classes:
        parts["classifier"] = d * d + d + (d + 1) * m.num_classes
    return {**parts, "total": sum(parts.values())}
