"""T5: an encoder-decoder with relative positions; reads every T5 and CodeT5 checkpoint.

C. Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", JMLR 2020, arXiv 1910.10683; v1.1's gated feed-forward: N. Shazeer, arXiv 2002.05202.
Names and conventions after `T5ForConditionalGeneration` of huggingface/transformers v5.23.0
(`models/t5/modeling_t5.py`). The layers of a stack are one scanned block, `block.*`, so that
compile time does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from jaxmodels.language.t5_checkpoint import (  # noqa: F401
    TORCH_RULES,
    check_checkpoint,
    upgrade_checkpoint,
)
from jaxmodels.layers.activations import gelu
from jaxmodels.layers.attention import (
    attend,
    attend_cached,
    causal_mask,
    merge_heads,
    padding_mask,
    split_heads,
    write_cache,
)
from jaxmodels.layers.convolution import Linear
from jaxmodels.layers.dropout import keep_masks, keep_where
from jaxmodels.layers.normalization import RMSNorm
from jaxmodels.layers.relative_position import relative_buckets

ACTIVATIONS = {
    "relu": jax.nn.relu,
    # HF's T5 reads "gated-gelu" as the tanh approximation; a plain "gelu" is the exact one.
    "gated-gelu": jax.nn.gelu,
    "gelu": gelu,
    "gelu_new": jax.nn.gelu,
    "silu": jax.nn.silu,
}
LABEL_PADDING = -100
_SHARED = (
    "d_model",
    "d_kv",
    "d_ff",
    "num_heads",
    "feed_forward_proj",
    "dropout_rate",
    "layer_norm_epsilon",
    "dtype",
    "param_dtype",
)
RELATIVE_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias"


class _Sublayer(nn.Module):
    """Fields that the pieces of a block share."""

    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    feed_forward_proj: str
    dropout_rate: float
    layer_norm_epsilon: float
    dtype: Any
    param_dtype: Any

    def shared(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SHARED}

    def linear(self, features: int, std: float, name: str) -> Linear:
        return Linear(
            features,
            use_bias=False,
            kernel_init=initializers.normal(std),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.layer_norm_epsilon, self.dtype, self.param_dtype, name=name)

    def masks(self, train: bool, *shapes: tuple[int, ...]) -> list[jax.Array | None]:
        """Dropout masks from the rng stream `dropout`; None everywhere without training."""
        drops = train and self.dropout_rate > 0
        return keep_masks(self.make_rng("dropout") if drops else None, self.dropout_rate, shapes)

    def drop(self, x: jax.Array, keep: jax.Array | None) -> jax.Array:
        return keep_where(x, keep, self.dropout_rate)


class Attention(_Sublayer):
    """Multi-head attention without biases and without the scores' 1 / sqrt(d_kv)."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        source: jax.Array | None,
        bias: jax.Array | None,
        mask: jax.Array | None,
        keep: jax.Array | None,
        position: jax.Array | None = None,
        length: int = 0,
    ) -> jax.Array:
        """x `[B, T, D]` looks at source `[B, S, D]`, or at what `memory` holds when that is None.

        With `length`, keys and values of x go to position `position` of a cache of that length,
        and x looks at all of it. More rows of x than of the memory are beams: B / B' neighboring
        rows share one row of it.
        """
        heads, width = self.num_heads, self.num_heads * self.d_kv
        query = self.linear(width, (self.d_model * self.d_kv) ** -0.5, "q")(x)
        query = split_heads(query, heads)
        key_projection = self.linear(width, self.d_model**-0.5, "k")
        value_projection = self.linear(width, self.d_model**-0.5, "v")
        if source is None:
            memory = [self.get_variable("memory", name) for name in ("key", "value")]
            beams = query.reshape(memory[0].shape[0], -1, *query.shape[2:])
            y = attend_cached(beams, *memory, bias=bias, mask=mask, scale=1).reshape(query.shape)
        else:
            key = split_heads(key_projection(source), heads)
            value = split_heads(value_projection(source), heads)
            if length:
                kept = write_cache(self, key, value, position, length)
                y = attend_cached(query, *kept, bias=bias, mask=mask, scale=1)
            else:
                y = attend(
                    query,
                    key,
                    value,
                    bias=bias,
                    mask=mask,
                    scale=1,
                    dropout_rate=self.dropout_rate,
                    keep=keep,
                )
        return self.linear(self.d_model, width**-0.5, "o")(merge_heads(y))


class FeedForward(_Sublayer):
    """wo(drop(act(wi x))), or wo(drop(act(wi_0 x) * wi_1 x)) for a gated activation."""

    @nn.compact
    def __call__(self, x: jax.Array, keep: jax.Array | None) -> jax.Array:
        gated, activation = activation_of(self.feed_forward_proj)
        wide = [
            self.linear(self.d_ff, self.d_model**-0.5, name)(x)
            for name in (("wi_0", "wi_1") if gated else ("wi",))
        ]
        y = activation(wide[0]) * wide[1] if gated else activation(wide[0])
        return self.linear(self.d_model, self.d_ff**-0.5, "wo")(self.drop(y, keep))


def activation_of(name: str):
    """(gated, function) of a `feed_forward_proj`; ValueError naming the ones there are."""
    gated, plain = name.startswith("gated-"), name.removeprefix("gated-")
    if plain not in ACTIVATIONS:
        known = sorted({a.removeprefix("gated-") for a in ACTIVATIONS})
        raise ValueError(
            f"feed_forward_proj {name!r}; known: {', '.join(known)}, each with or without 'gated-'"
        )
    return gated, ACTIVATIONS.get(name, ACTIVATIONS[plain])


class Block(_Sublayer):
    """Self-attention, in a decoder cross-attention, feed-forward: pre-norm, with residuals."""

    is_decoder: bool
    keep_states: bool = False

    @nn.compact
    def __call__(self, x, bias, mask, encoded, encoded_mask, position, train, length):
        """One layer as `nn.scan` calls it: x `[B, T, D]` -> (x, x if `keep_states`)."""
        fields = self.shared()
        batch, length_x = x.shape[:2]
        weights = (batch, self.num_heads, length_x)
        keep = self.masks(
            train,
            (*weights, length or length_x),
            x.shape,
            (*weights, encoded.shape[1] if self.is_decoder and train else 0),
            x.shape if self.is_decoder else (0,),
            (batch, length_x, self.d_ff),
            x.shape,
        )
        normed = self.norm("layer.0.layer_norm")(x)
        y = Attention(**fields, name="layer.0.SelfAttention")(
            normed, normed, bias, mask, keep[0], position, length
        )
        x = x + self.drop(y, keep[1])
        if self.is_decoder:
            normed = self.norm("layer.1.layer_norm")(x)
            y = Attention(**fields, name="layer.1.EncDecAttention")(
                normed, encoded, None, encoded_mask, keep[2]
            )
            x = x + self.drop(y, keep[3])
        n = 2 if self.is_decoder else 1
        normed = self.norm(f"layer.{n}.layer_norm")(x)
        y = FeedForward(**fields, name=f"layer.{n}.DenseReluDense")(normed, keep[4])
        x = x + self.drop(y, keep[5])
        return x, x if self.keep_states else None


class Stack(_Sublayer):
    """The scanned blocks of an encoder or decoder, its bias table and its final norm."""

    num_layers: int = 6
    is_decoder: bool = False
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    remat: bool = False
    scan_unroll: int = 1

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        encoded: jax.Array | None = None,
        encoded_mask: jax.Array | None = None,
        train: bool = False,
        keep_states: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x `[B, T, D]` -> (`[B, T, D]`, {"bias" `[1, N, T, S]`, "states" `[L, B, T, D]`})."""
        table = nn.Embed(
            self.relative_attention_num_buckets,
            self.num_heads,
            embedding_init=initializers.normal(self.d_model**-0.5),
            param_dtype=self.param_dtype,
            name=RELATIVE_BIAS,
        )
        places = jnp.arange(x.shape[1])
        bias = self.bias(table.embedding, places, places)
        first, last = self.masks(train, x.shape, x.shape)
        x = self.drop(x, first)
        block = nn.remat(Block, static_argnums=(7, 8)) if self.remat else Block
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast,) * 7,
            length=self.num_layers,
            unroll=self.scan_unroll,
        )(**self.shared(), is_decoder=self.is_decoder, keep_states=keep_states, name="block.*")
        x, states = scanned(x, bias, mask, encoded, encoded_mask, None, train, 0)
        y = self.drop(self.norm("final_layer_norm")(x), last)
        return y, {"bias": bias, "states": states}

    def bias(self, table: jax.Array, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Relative position bias `[1, N, T, S]` of a table `[buckets, N]` at positions [T], [S]."""
        buckets = relative_buckets(
            keys[None, :] - queries[:, None],
            bidirectional=not self.is_decoder,
            buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )
        return jnp.transpose(table[buckets], (2, 0, 1))[None]


def stack_of(module: T5, *, is_decoder: bool) -> Stack:
    """The encoder's or the decoder's stack of blocks, as a module of its own."""
    layers = (module.num_decoder_layers or module.num_layers) if is_decoder else module.num_layers
    return Stack(
        **{name: getattr(module, name) for name in _SHARED},
        num_layers=layers,
        is_decoder=is_decoder,
        relative_attention_num_buckets=module.relative_attention_num_buckets,
        relative_attention_max_distance=module.relative_attention_max_distance,
        remat=module.remat,
        scan_unroll=module.scan_unroll,
    )


class T5(nn.Module):
    """T5 or CodeT5; arguments are those of a checkpoint's `config.json`.

    `tie_word_embeddings`: the output matrix is the embedding (v1.0, CodeT5) or `lm_head` (v1.1).
    `scale_decoder_outputs`: multiply by d_model ** -0.5 before it; None is as tied.
    `remat` recomputes blocks in the backward pass; `scan_unroll` layers are one scan iteration.
    `resize_checkpoint` gives a file with a smaller vocabulary fresh rows for tokens added to it.
    Params `shared.embedding` [V, D] serves both inputs and, when tied, the output.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0
    remat: bool = False
    scan_unroll: int = 1
    resize_checkpoint: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    has_decoder = True

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: both sides' ids [1, 8]."""
        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        return ids, ids

    @property
    def is_scaled(self) -> bool:
        """Whether the decoder's output is multiplied by d_model ** -0.5."""
        if self.scale_decoder_outputs is None:
            return self.tie_word_embeddings
        return self.scale_decoder_outputs

    @nn.nowrap
    def _setup_encoder(self):
        activation_of(self.feed_forward_proj)
        self.shared = nn.Embed(
            self.vocab_size,
            self.d_model,
            embedding_init=initializers.normal(1.0),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        self.encoder = stack_of(self, is_decoder=False)

    def setup(self):
        self._setup_encoder()
        self.decoder = stack_of(self, is_decoder=True)
        if not self.tie_word_embeddings:
            self.lm_head = Linear(
                self.vocab_size,
                use_bias=False,
                kernel_init=initializers.normal(1.0),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
            )

    def __call__(
        self,
        input_ids: jax.Array,
        decoder_input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Logits float32 `[B, T, V]` for ids `[B, S]`, `[B, T]`; `attention_mask` [B, S] 1 = real.

        Without a mask every input counts, padding included, as in HF.
        """
        encoded = self.encode(input_ids, attention_mask, train)
        return self.decode(decoder_input_ids, encoded, attention_mask, train)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Embeddings `[..., D]` of ids, unscaled.

        Raises ValueError with the position for an id outside the vocabulary, outside `jit` only.
        """
        if not isinstance(ids, jax.core.Tracer):
            check_ids(ids, self.vocab_size)
        return self.shared(ids)

    def encode(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Encoder output `[B, S, D]`."""
        return self.encoder(self.embed(input_ids), key_mask(attention_mask), train=train)[0]

    def decode(
        self,
        decoder_input_ids: jax.Array,
        encoded: jax.Array,
        attention_mask: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Logits float32 `[B, T, V]` of decoder ids `[B, T]` over encoder output `[B, S, D]`."""
        hidden, _ = self.decoder(
            self.embed(decoder_input_ids),
            causal_mask(decoder_input_ids.shape[1]),
            encoded,
            key_mask(attention_mask),
            train,
        )
        return self.logits(hidden)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Output layer, `[..., D]` -> float32 `[..., V]`."""
        if self.is_scaled:
            hidden = hidden * jnp.asarray(self.d_model**-0.5, hidden.dtype)
        y = self.shared.attend(hidden) if self.tie_word_embeddings else self.lm_head(hidden)
        return y.astype(jnp.float32)

    def intermediates(
        self,
        input_ids: jax.Array,
        decoder_input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """`logits` and the states between blocks, by HF's order.

        `encoder_hidden_i`, `decoder_hidden_i` `[B, T, D]`: 0 the embedding, i the output of block
        i, the last one after the final norm; `*_position_bias` `[1, N, T, S]`.
        """
        out = {}
        ids, mask, encoded = input_ids, None, None
        for name, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            x = self.embed(ids)
            extra = () if encoded is None else (encoded, key_mask(attention_mask))
            mask = key_mask(attention_mask) if encoded is None else causal_mask(ids.shape[1])
            y, seen = stack(x, mask, *extra, keep_states=True)
            states = [x, *seen["states"][:-1], y]
            out |= {f"{name}_hidden_{i}": h for i, h in enumerate(states)}
            out[f"{name}_position_bias"] = seen["bias"]
            ids, encoded = decoder_input_ids, y
        return {**out, "logits": self.logits(y)}


class T5Encoder(T5):
    """The encoder alone, HF's `T5EncoderModel`; also out of a whole T5's checkpoint."""

    has_decoder = False

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: ids [1, 8]."""
        return (jax.ShapeDtypeStruct((1, 8), jnp.int32),)

    def setup(self):
        self._setup_encoder()

    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """States `[B, S, D]` of ids `[B, S]`; `attention_mask` [B, S] 1 = real."""
        return self.encode(input_ids, attention_mask, train)

    def intermediates(self, input_ids: jax.Array, attention_mask: jax.Array | None = None):
        """`encoder_hidden_0`.. `[B, S, D]`, the states between blocks, by HF's order."""
        x = self.embed(input_ids)
        y, seen = self.encoder(x, key_mask(attention_mask), keep_states=True)
        states = [x, *seen["states"][:-1], y]
        return {f"encoder_hidden_{i}": h for i, h in enumerate(states)}


def key_mask(attention_mask: jax.Array | None) -> jax.Array | None:
    """HF's attention mask `[B, S]` (1 for tokens) as a mask of keys for `attend`; None stays."""
    return None if attention_mask is None else padding_mask(attention_mask)


def check_ids(ids: np.ndarray, vocabulary: int, what: str = "input") -> None:
    """Refuse ids `[B, T]` outside 0..vocabulary - 1.

    Indexing under `jit` would clip them without a word; call this on the host.

    Raises ValueError with the position.
    """
    ids = np.asarray(ids)
    wrong = np.argwhere((ids < 0) | (ids >= vocabulary))
    if len(wrong):
        place = tuple(int(i) for i in wrong[0])
        raise ValueError(
            f"{what} {list(place)}: token id {int(ids[place])} is not in 0..{vocabulary - 1}"
        )


def check_tokens(ids: np.ndarray, module: T5, what: str = "input") -> None:
    """`check_ids`, and refuse rows `[B, T]` of padding alone."""
    check_ids(ids, module.vocab_size, what)
    empty = np.flatnonzero((np.asarray(ids) == module.pad_token_id).all(axis=-1))
    if len(empty):
        raise ValueError(f"{what} [{int(empty[0])}] is empty")


def shift_right(labels: jax.Array, start: int = 0, pad: int = 0) -> jax.Array:
    """Decoder inputs of labels `[B, T]`: `start`, then the labels but the last, -100 as `pad`."""
    shifted = jnp.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=start)
    return jnp.where(shifted == LABEL_PADDING, pad, shifted)


def ignore_padding(labels: jax.Array, pad: int = 0) -> jax.Array:
    """Labels `[B, T]` with -100, which no loss counts, in place of `pad`."""
    return jnp.where(labels == pad, LABEL_PADDING, labels)


def token_nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label] in float32, `[B, T, V]`, `[B, T]` -> `[B, T]`; 0 at -100."""
    logits = logits.astype(jnp.float32)
    # A masked sum, whose gradient is no scatter into [B, T, V].
    chosen = jnp.arange(logits.shape[-1]) == labels[..., None]
    picked = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.where(labels == LABEL_PADDING, 0.0, nll)


def mean_nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """HF's loss: mean NLL over all labels of the batch that are not -100."""
    count = jnp.maximum((labels != LABEL_PADDING).sum(), 1)
    return token_nll(logits, labels).sum() / count


def likelihood(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Minus the mean NLL of each row `[B]` over its labels that are not -100 (re-ranking score)."""
    count = jnp.maximum((labels != LABEL_PADDING).sum(-1), 1)
    return -token_nll(logits, labels).sum(-1) / count


def resize_embedding(
    params: Mapping[str, Any], rows: int, rng: jax.Array | None = None
) -> dict[str, Any]:
    """Parameters of a tied model with `rows` embedding rows, for tokens added to its vocabulary.

    New rows are N(0, 1), as a fresh embedding's (CodeT5 to CoditT5: 32,100 to 32,124).

    Raises ValueError for an untied model and for fewer rows than there are: cutting is not meant.
    """
    table = jnp.asarray(params["shared"]["embedding"])
    if "lm_head" in params:
        raise ValueError("an untied model has lm_head besides: resize both by hand")
    if rows < len(table):
        raise ValueError(f"{rows} rows wanted, the embedding has {len(table)} already")
    rng = jax.random.key(0) if rng is None else rng
    new = jax.random.normal(rng, (rows - len(table), table.shape[1]), table.dtype)
    return {**params, "shared": {"embedding": jnp.concatenate([table, new])}}


def arguments_of_config(
    config: Mapping[str, Any], state: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """Arguments of `T5` from the entries of a checkpoint's `config.json`.

    With the state dict, `tie_word_embeddings` is what the tensors say: tied when `lm_head` is
    absent or equals `shared`. Scaling is explicit where the config says so, else as the config's
    own tie flag has it.
    """
    known = set(T5.__dataclass_fields__)
    fields = {k: v for k, v in config.items() if k in known and k not in ("name", "parent")}
    fields = {k: v for k, v in fields.items() if k not in ("dtype", "param_dtype")}
    tied = bool(config.get("tie_word_embeddings", True))
    fields.setdefault("scale_decoder_outputs", tied)
    if state is not None:
        head, shared = state.get("lm_head.weight"), state.get("shared.weight")
        tied = head is None or (
            shared is not None and head.shape == shared.shape and np.array_equal(head, shared)
        )
    fields["tie_word_embeddings"] = tied
    return fields


MODEL = T5
_CODET5 = {
    "vocab_size": 32100,
    "eos_token_id": 2,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
}
_BASE = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
VARIANTS: dict[str, dict[str, Any]] = {
    "t5_small": {},
    "t5_base": _BASE,
    "t5_v1_1_base": {
        **_BASE,
        "d_ff": 2048,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "codet5_small": _CODET5,
    "codet5_base": {**_CODET5, **_BASE},
    "coditt5": {**_CODET5, **_BASE, "vocab_size": 32124},
}
