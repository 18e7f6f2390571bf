"""Vision transformer: the backbone of the video encoder, and published weights for it.

A. Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929, in the form of
huggingface/transformers (`models/vit/modeling_vit.py`): pre-norm blocks, exact GELU. Of its two
spellings (`encoder.layer.i.attention.attention.query` in published files,
`layers.i.attention.q_proj` in newer ones) the newer one is ours; both are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.activations import ACTIVATIONS
from jaxmodels.layers.attention import attend, merge_heads, split_heads
from jaxmodels.layers.convolution import Linear
from jaxmodels.layers.initializers import torch_bias, torch_kernel
from jaxmodels.layers.normalization import LayerNorm

# Published files -> our names; applied to whole keys on the way in.
_LAYER = r"^(?:vit\.)?encoder\.layer\.(\d+)\."
# The backbone's name within classifiers.
PREFIXES = ("vit", "deit")
SPELLINGS = (
    (_LAYER + r"attention\.attention\.query\.", r"layers.\1.attention.q_proj."),
    (_LAYER + r"attention\.attention\.key\.", r"layers.\1.attention.k_proj."),
    (_LAYER + r"attention\.attention\.value\.", r"layers.\1.attention.v_proj."),
    (_LAYER + r"attention\.output\.dense\.", r"layers.\1.attention.o_proj."),
    (_LAYER + r"intermediate\.dense\.", r"layers.\1.mlp.fc1."),
    (_LAYER + r"output\.dense\.", r"layers.\1.mlp.fc2."),
    (_LAYER, r"layers.\1."),
    (r"^vit\.", ""),
)


class SelfAttention(nn.Module):
    """Multi-head self-attention, x [B, T, D] -> [B, T, D]."""

    heads: int
    qkv_bias: bool = True
    kernel_init: Any = torch_kernel()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        types = dict(kernel_init=self.kernel_init, dtype=self.dtype, param_dtype=self.param_dtype)

        def project(name):
            y = Linear(width, self.qkv_bias, name=name, **types)(x)
            return split_heads(y, self.heads)

        y = attend(project("q_proj"), project("k_proj"), project("v_proj"))
        return Linear(width, name="o_proj", **types)(merge_heads(y))


class Mlp(nn.Module):
    """Linear, activation (exact GELU by default), linear."""

    intermediate: int
    kernel_init: Any = torch_kernel()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(kernel_init=self.kernel_init, dtype=self.dtype, param_dtype=self.param_dtype)
        y = ACTIVATIONS[self.activation](Linear(self.intermediate, name="fc1", **types)(x))
        return Linear(x.shape[-1], name="fc2", **types)(y)


class TransformerBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x); x [B, T, D]."""

    heads: int
    intermediate: int
    epsilon: float = 1e-6
    qkv_bias: bool = True
    kernel_init: Any = torch_kernel()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        init = dict(kernel_init=self.kernel_init, **types)
        y = LayerNorm(self.epsilon, name="layernorm_before", **types)(x)
        x = x + SelfAttention(self.heads, self.qkv_bias, name="attention", **init)(y)
        y = LayerNorm(self.epsilon, name="layernorm_after", **types)(x)
        return x + Mlp(self.intermediate, activation=self.activation, name="mlp", **init)(y)


class ScannedBlock(TransformerBlock):
    """The same block as `nn.scan` wants it: `x -> x, None`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        return TransformerBlock.__call__(self, x), None


class PatchProjection(nn.Module):
    """Linear embedding of square patches, [B, H, W, C] -> [B, H W / p^2, D], one matrix product.

    The kernel is that of the convolution with stride p that checkpoints hold.
    """

    features: int
    patch: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        p = self.patch
        kernel = self.param("kernel", torch_kernel(), (p, p, c, self.features), self.param_dtype)
        bias = self.param("bias", torch_bias(p * p * c), (self.features,), self.param_dtype)
        x = jnp.asarray(x, self.dtype).reshape(b, h // p, p, w // p, p, c)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // p) * (w // p), p * p * c)
        return x @ kernel.astype(self.dtype).reshape(-1, self.features) + bias.astype(self.dtype)


class PatchEmbeddings(nn.Module):
    """`projection`, below the name that checkpoints give it."""

    features: int
    patch: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        return PatchProjection(self.features, self.patch, name="projection", **types)(x)


class Embeddings(nn.Module):
    """Patches and learned positions, after a class token if `class_token`."""

    features: int
    patch: int
    class_token: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = PatchEmbeddings(self.features, self.patch, name="patch_embeddings", **types)(x)
        small = nn.initializers.normal(0.02)
        if self.class_token:
            token = self.param("cls_token", small, (1, 1, self.features), self.param_dtype)
            token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.features))
            x = jnp.concatenate([token, x], 1)
        shape = (1, *x.shape[1:])
        return x + self.param("position_embeddings", small, shape, self.param_dtype).astype(x.dtype)


class ViT(nn.Module):
    """Images [B, S, S, C] in [-1, 1] -> tokens [B, 1 + (S / p)^2, D], the class token first.

    `image_size` is S or (height, width), `hidden_act` one of `layers.activations.ACTIVATIONS`.

    Raises ValueError when patches do not tile the image or heads do not divide the width, and for
    an unknown activation.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    hidden_act: str = "gelu"

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r}: known are {', '.join(ACTIVATIONS)}")
        if not isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        if any(side % self.patch_size for side in self._shape()[:2]):
            raise ValueError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by {self.num_attention_heads} "
                "heads"
            )
        super().__post_init__()

    def _shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        size = self.image_size
        return (*((size, size) if isinstance(size, int) else size), self.num_channels)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: one image."""
        return (jax.ShapeDtypeStruct((1, *self._shape()), jnp.float32),)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.intermediates(x)["last_hidden_state"]

    @nn.compact
    def intermediates(self, x: jax.Array) -> dict[str, jax.Array]:
        """`embeddings`, `after_block{i}` and `last_hidden_state`, each [B, T, D]."""
        if x.ndim != 4 or x.shape[1:] != self._shape():
            wanted = ", ".join(map(str, self._shape()))
            raise ValueError(f"images must be [batch, {wanted}], got {x.shape}")
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Embeddings(self.hidden_size, self.patch_size, name="embeddings", **types)(x)
        maps = {"embeddings": x}
        for i in range(self.num_hidden_layers):
            x = TransformerBlock(
                self.num_attention_heads,
                self.intermediate_size,
                self.layer_norm_eps,
                self.qkv_bias,
                activation=self.hidden_act,
                name=f"layers.{i}",
                **types,
            )(x)
            maps[f"after_block{i}"] = x
        norm = LayerNorm(self.layer_norm_eps, name="layernorm", **types)
        maps["last_hidden_state"] = norm(x)
        return maps


MODEL = ViT

VARIANTS: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224": {},
    "vit_large_patch16_224": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """Both spellings; poolers and classifiers are not part of the backbone."""
    return {
        "spellings": list(SPELLINGS),
        "prefixes": PREFIXES,
        "drops": [r"(pooler|classifier)\..*"],
    }


def check_checkpoint(keys: Iterable[str], module: nn.Module) -> None:
    """Refuse timm's naming, which fuses queries, keys and values, in plain words."""
    keys = list(keys)
    if any(".attn.qkv." in k for k in keys):
        raise ValueError(
            "the checkpoint has timm's names (blocks.0.attn.qkv.weight); wanted are "
            "transformers' (vit.encoder.layer.0.attention.attention.query.weight, ...)"
        )
