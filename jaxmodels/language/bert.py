"""BERT-family encoders: BERT, ERNIE 2.0 (loaded as a plain BERT) and DistilBERT.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", NAACL 2019; Sanh et al.,
"DistilBERT", 2019. Checkpoints and their names are those of the `transformers` library's
`BertModel` and `DistilBertModel`. Axis names: B rows, L tokens, H width, V vocabulary.

Post-layer-norm blocks; the exact GELU; layer norm's epsilon from the checkpoint's config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.layers.activations import ACTIVATIONS
from jaxmodels.layers.attention import (
    attend,
    attention_weights,
    merge_heads,
    padding_mask,
    split_heads,
)
from jaxmodels.layers.convolution import Linear
from jaxmodels.layers.dropout import dropout
from jaxmodels.layers.normalization import LayerNorm
from jaxmodels.spelling import did_you_mean

# What a checkpoint calls the parts of one block, and where its blocks lie.
_NAMES = {
    "bert": {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm": "output.LayerNorm",
    },
    "distilbert": {
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "attention": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "norm": "output_layer_norm",
    },
}
_BLOCKS = {"bert": "encoder.layer", "distilbert": "transformer.layer"}
_ZEROS = nn.initializers.zeros


class EncoderFields(nn.Module):
    """The hyper-parameters of one encoder, named as in config.json; `Bert` and what holds it.

    `architecture` is "bert" or "distilbert" (no token types, no pooler, no dropout after
    attention). `pooler=False` leaves the pooler out; retrieval never uses it. `scan_layers`
    compiles one block for all (parameters stacked below `encoder.layer.*`); `remat` computes
    blocks again in the backward pass (gradient checkpointing).
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    architecture: str = "bert"
    pooler: bool = True
    scan_layers: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        if self.architecture not in _NAMES:
            raise ValueError(
                f"architecture {self.architecture!r}"
                f"{did_you_mean(self.architecture, _NAMES)}; known: {', '.join(_NAMES)}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act {self.hidden_act!r}{did_you_mean(self.hidden_act, ACTIVATIONS)}; "
                f"known: {', '.join(ACTIVATIONS)}"
            )
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers {self.num_hidden_layers}: at least 1")
        super().__post_init__()

    def encoder_fields(self) -> dict[str, Any]:
        """The fields of this class as constructor arguments."""
        own = EncoderFields.__dataclass_fields__
        return {f: getattr(self, f) for f in own if f not in ("parent", "name")}

    @property
    def has_pooler(self) -> bool:
        """Whether there is a pooler (DistilBERT never has one)."""
        return self.pooler and self.architecture == "bert"

    def linear(self, name: str | None, features: int) -> Linear:
        """A linear layer of this family's initialization (`name` None inside `setup`)."""
        return Linear(
            features,
            kernel_init=nn.initializers.normal(self.initializer_range),
            bias_init=_ZEROS,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def normalization(self, name: str) -> LayerNorm:
        """A layer norm `name` with this family's epsilon, inside a compact method."""
        return LayerNorm(
            self.layer_norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name=name
        )


class Embeddings(EncoderFields):
    """word + position + token type, layer norm, dropout: ids [B, L] -> [B, L, H]."""

    @nn.compact
    def __call__(self, ids, types, rng):
        def table(name, rows, blank=None):
            return nn.Embed(
                rows,
                self.hidden_size,
                embedding_init=_table_init(self.initializer_range, blank),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )

        x = table("word_embeddings", self.vocab_size, self.pad_token_id)(ids)
        positions = jnp.arange(ids.shape[1])
        x = x + table("position_embeddings", self.max_position_embeddings)(positions)
        if self.architecture == "bert":
            kinds = table("token_type_embeddings", self.type_vocab_size)
            # One row for all: its gradient is a sum, not a scatter over every token.
            x = x + (kinds.embedding[0].astype(x.dtype) if types is None else kinds(types))
        x = self.normalization("LayerNorm")(x)
        return dropout(x, self.hidden_dropout_prob, rng)


def _table_init(deviation: float, blank: int | None):
    """Normal rows, row `blank` (padding) all zero."""

    def init(key, shape, dtype=jnp.float32):
        rows = nn.initializers.normal(deviation)(key, shape, dtype)
        return rows if blank is None else rows.at[blank].set(0)

    return init


class Block(EncoderFields):
    """Self-attention and feed-forward, a layer norm after each: x [B, L, H] -> (x, weights).

    `keep` [B, L] is true on real tokens; queries of padding are computed as any other.
    `weights` are the attention probabilities [B, A, L, L], None unless `with_weights`.
    """

    train: bool = False
    with_weights: bool = False

    @nn.compact
    def __call__(self, x, keep):
        names, heads, width = _NAMES[self.architecture], self.num_attention_heads, self.hidden_size
        rngs = jax.random.split(self.make_rng("dropout"), 3) if self.train else (None,) * 3
        mask = padding_mask(keep)
        query, key, value = (
            split_heads(self.linear(names[name], width)(x), heads)
            for name in ("query", "key", "value")
        )
        rate = self.attention_probs_dropout_prob
        y = attend(query, key, value, mask=mask, dropout_rate=rate, rng=rngs[0])
        y = self.linear(names["attention"], width)(merge_heads(y))
        if self.architecture == "bert":
            y = dropout(y, self.hidden_dropout_prob, rngs[1])
        x = self.normalization(names["attention_norm"])(x + y)
        y = ACTIVATIONS[self.hidden_act](self.linear(names["up"], self.intermediate_size)(x))
        y = dropout(self.linear(names["down"], width)(y), self.hidden_dropout_prob, rngs[2])
        x = self.normalization(names["norm"])(x + y)
        return x, attention_weights(query, key, mask=mask) if self.with_weights else None


class _ScannedBlock(Block):
    def __call__(self, x, keep):
        x, weights = super().__call__(x, keep)
        return x, (x, weights)


class Bert(EncoderFields):
    """ids [B, L] -> last hidden states [B, L, H].

    Args of every method:
      input_ids: int [B, L].
      attention_mask: bool or int [B, L], 1 on real tokens, 0 on padding; None: all real.
      token_type_ids: int [B, L]; None: all 0 (type 0 is added all the same).
      train: dropout on, which wants an rng named `dropout`.

    Raises ValueError for ids outside the vocabulary, rows longer than the position table, masks
    that are not 0/1, that mask a first token, or that mask whole rows (values are checked
    outside of `jit`, shapes always; `check_inputs` checks before).
    """

    @nn.compact
    def run(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        train: bool = False,
        with_weights: bool = False,
    ):
        """(hidden states of the embeddings and every block, attention weights, pooled [B, H])."""
        check_inputs(self, input_ids, attention_mask, token_type_ids)
        ids = jnp.asarray(input_ids)
        mask = jnp.ones(ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask)
        keep = mask.astype(bool)
        own, home, count = self.encoder_fields(), _BLOCKS[self.architecture], self.num_hidden_layers
        rng = self.make_rng("dropout") if train else None
        x = Embeddings(**own, name="embeddings")(ids, token_type_ids, rng)
        hidden, weights = [x], []
        block = _ScannedBlock if self.scan_layers else Block
        block = nn.remat(block) if self.remat else block
        own |= {"train": train, "with_weights": with_weights}
        if self.scan_layers:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=count,
            )
            x, (states, probabilities) = stack(**own, name=f"{home}.*")(x, keep)
            hidden += [*(states[i] for i in range(count - 1)), x]
            weights = [probabilities[i] for i in range(count)] if with_weights else []
        else:
            for i in range(count):
                x, w = block(**own, name=f"{home}.{i}")(x, keep)
                hidden.append(x)
                weights.append(w)
        pooled = None
        if self.has_pooler:
            pooled = jnp.tanh(self.linear("pooler.dense", self.hidden_size)(x[:, 0]))
        return tuple(hidden), tuple(weights), pooled

    def __call__(self, input_ids, attention_mask=None, token_type_ids=None, train: bool = False):
        """Last hidden states [B, L, H]."""
        return self.run(input_ids, attention_mask, token_type_ids, train)[0][-1]

    def hidden_states(
        self, input_ids, attention_mask=None, token_type_ids=None, train: bool = False
    ) -> tuple[jax.Array, ...]:
        """The embeddings' output and every block's, n + 1 arrays [B, L, H]."""
        return self.run(input_ids, attention_mask, token_type_ids, train)[0]

    def intermediates(self, input_ids, attention_mask=None, token_type_ids=None) -> dict:
        """`hidden_0` (embeddings) to `hidden_n`, `attention_0`.. [B, A, L, L], `cls`, `pooler`."""
        hidden, weights, pooled = self.run(
            input_ids, attention_mask, token_type_ids, with_weights=True
        )
        named = {f"hidden_{i}": x for i, x in enumerate(hidden)}
        named |= {f"attention_{i}": w for i, w in enumerate(weights)}
        named |= {"last_hidden": hidden[-1], "cls": hidden[-1][:, 0]}
        return named if pooled is None else {**named, "pooler": pooled}

    def example_inputs(self) -> tuple:
        """Shapes for initialization."""
        return (jax.ShapeDtypeStruct((1, min(8, self.max_position_embeddings)), jnp.int32),)


def check_inputs(fields: EncoderFields, ids, mask=None, types=None) -> None:
    """Refuse inputs that JAX would clamp silently; see `Bert`. Values are read outside `jit` only.

    Args:
      fields: the encoder or what holds it. ids, mask, types: [..., L].
    """
    length, limit = np.shape(ids)[-1], fields.max_position_embeddings
    if length > limit:
        raise ValueError(f"rows of {length} tokens; the position table ends at {limit}")
    if _known(ids):
        _check_range("input_ids", ids, fields.vocab_size, "vocab_size")
    if types is not None and _known(types):
        _check_range("token_type_ids", types, fields.type_vocab_size, "type_vocab_size")
    if mask is None:
        return
    if np.shape(mask) != np.shape(ids):
        raise ValueError(f"attention_mask {np.shape(mask)} for input_ids {np.shape(ids)}")
    kind = mask.dtype if hasattr(mask, "dtype") else np.asarray(mask).dtype
    if not (jnp.issubdtype(kind, jnp.integer) or jnp.issubdtype(kind, jnp.bool_)):
        raise ValueError(f"attention_mask is {kind}: wanted bool or integers, 1 on real tokens")
    if not _known(mask):
        return
    values = np.asarray(mask).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 1):
        raise ValueError(
            f"attention_mask holds {values.min()}..{values.max()}: wanted 1 on real tokens, else 0"
        )
    rows = values.reshape(-1, length)
    if not rows.any(-1).all():
        raise ValueError(f"row {int(np.argmin(rows.any(-1)))} is all padding")
    if (rows[:, 0] == 0).any():
        raise ValueError(
            f"attention_mask of row {int(np.argmin(rows[:, 0]))} hides its first token: inverted?"
        )


def _known(x) -> bool:
    return not isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)


def _check_range(name: str, x, limit: int, field: str) -> None:
    x = np.asarray(x)
    if x.size and (x.max() >= limit or x.min() < 0):
        worst = int(x.min() if x.min() < 0 else x.max())
        raise ValueError(f"{name} holds {worst}; {field} is {limit}")


def arguments_of_config(
    config: Mapping[str, Any], state: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """Constructor arguments from a config.json of `BertModel`, `DistilBertModel` or ERNIE 2.0.

    Raises ValueError for another `model_type`, or for relative positions, which we do not have.
    """
    del state  # the config tells everything
    kind = config.get("model_type", "bert")
    if kind in ("bert", "ernie"):
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(
                f"position_embedding_type {config['position_embedding_type']!r}: only absolute"
            )
        names = {f: f for f in EncoderFields.__dataclass_fields__ if f in config}
        for ours in ("dtype", "param_dtype", "architecture"):
            names.pop(ours, None)
        return {ours: config[theirs] for ours, theirs in names.items()}
    if kind != "distilbert":
        raise ValueError(f"model_type {kind!r}; known: bert, ernie, distilbert")
    names = {
        "vocab_size": "vocab_size",
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "max_position_embeddings": "max_position_embeddings",
        "hidden_act": "activation",
        "pad_token_id": "pad_token_id",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "initializer_range": "initializer_range",
    }
    given = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
    return {"architecture": "distilbert", "layer_norm_eps": 1e-12, **given}


_HEADS = {768: 12, 1024: 16}


def arguments_of_checkpoint(
    shapes: Mapping[str, tuple[int, ...]], num_attention_heads: int | None = None
) -> dict[str, Any]:
    """Sizes that a state dict itself tells, for files without a config.json.

    Args:
      shapes: {PyTorch key: shape} of one encoder, a dual encoder or a cross encoder.
      num_attention_heads: no shape tells it; None takes 12 for width 768 and 16 for 1024.

    Activation, epsilon and dropout stay at BERT's. Raises ValueError when there is no word table
    or the number of heads would be a guess.
    """
    words = sorted(k for k in shapes if k.endswith("embeddings.word_embeddings.weight"))
    if not words:
        raise ValueError("no embeddings.word_embeddings.weight among the checkpoint's names")
    prefix = words[0].removesuffix("embeddings.word_embeddings.weight")
    vocab, width = shapes[words[0]]
    heads = num_attention_heads or _HEADS.get(width)
    if heads is None:
        raise ValueError(f"width {width}: num_attention_heads must be given, no name tells it")
    distil = any(k.startswith(f"{prefix}transformer.layer.") for k in shapes)
    architecture = "distilbert" if distil else "bert"
    blocks = f"{prefix}{_BLOCKS[architecture]}."
    numbers = [int(k[len(blocks) :].split(".")[0]) for k in shapes if k.startswith(blocks)]
    up = f"{blocks}0.{_NAMES[architecture]['up']}.weight"
    found = {
        "architecture": architecture,
        "vocab_size": vocab,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": max(numbers, default=-1) + 1,
        "intermediate_size": shapes[up][0],
        "max_position_embeddings": shapes[f"{prefix}embeddings.position_embeddings.weight"][0],
    }
    if not distil:
        types = f"{prefix}embeddings.token_type_embeddings.weight"
        found["type_vocab_size"] = shapes[types][0]
        found["pooler"] = f"{prefix}pooler.dense.weight" in shapes
    return found


def first_blocks(state: Mapping[str, Any], count: int) -> dict[str, Any]:
    """An n-layer student's state dict: blocks 0..count-1 of the parent and all that is no block.

    Raises ValueError when the parent has fewer blocks.
    """
    marks = tuple(f"{b}." for b in _BLOCKS.values())

    def number(key: str) -> int | None:
        for mark in marks:
            before, found, after = key.rpartition(mark)
            if found and (not before or before.endswith(".")):
                return int(after.split(".")[0])
        return None

    numbers = {key: number(key) for key in state}
    depth = max((n for n in numbers.values() if n is not None), default=-1) + 1
    if not 1 <= count <= depth:
        raise ValueError(f"a student of {count} blocks from a parent of {depth}")
    return {k: v for k, v in state.items() if numbers[k] is None or numbers[k] < count}


# Buffers that old files carry, names that TensorFlow's converter left, heads of pre-training.
POSITION_IDS = r"(.*\.)?embeddings\.position_ids"
SPELLINGS = (
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
)
# The encoder's name within pre-training models, and the towers of dual encoders.
PREFIXES = ("bert", "ernie", "distilbert", "roberta", "question_model", "ctx_model")


def torch_rules(module: EncoderFields) -> dict[str, Any]:
    """What conversion cannot know of this family."""
    rules = {
        "travels": [POSITION_IDS],
        "spellings": SPELLINGS,
        "prefixes": PREFIXES,
        "drops": [
            r"cls\..*",
            r"vocab_(transform|layer_norm|projector)\..*",
            # ERNIE 2.0 is loaded as a plain BERT.
            r"(.*\.)?embeddings\.task_type_embeddings\.weight",
        ],
    }
    if not module.has_pooler:
        rules["travels"].append(r"(.*\.)?pooler\.dense\.(weight|bias)")
    return rules


TORCH_RULES = torch_rules
MODEL = Bert

_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
# As in the config.json that nghuyong/ERNIE-Pytorch (convert.py) writes for its checkpoints.
_ERNIE = {"type_vocab_size": 4, "layer_norm_eps": 1e-5}
VARIANTS: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {},
    "bert-large-uncased": _LARGE,
    "co-condenser-marco": {},
    "ernie-2.0-base-en": _ERNIE,
    "ernie-2.0-large-en": {**_LARGE, **_ERNIE},
    "distilbert-base-uncased": {"architecture": "distilbert", "num_hidden_layers": 6},
}
