"""Batch, layer and root-mean-square normalization with PyTorch's conventions."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class BatchNorm(nn.Module):
    """Normalize the last axis over all others, x [..., C].

    Params `scale`, `bias` [C]; `batch_stats` `mean`, `var` [C], kept in float32 or wider.
    Training uses the batch's biased variance and moves the running statistics by
    `r <- (1 - momentum) r + momentum * batch` with the *unbiased* variance n / (n - 1):
    `momentum` is PyTorch's (0.1), not Flax's (0.9).

    Under `jit` the batch is the global one, whatever its sharding. Under `pmap` or `shard_map` it
    is the device's own, unless `axis_name` names the mapped axis: then statistics are those of
    all devices, equal to the global batch's.

    `mask`, bool over x's axes but the last, keeps padding rows out of the statistics (graphs); it
    is None for whole batches and does nothing in evaluation.

    Raises ValueError when training sees one value per channel, whose variance says nothing.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1
    axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
    ) -> jax.Array:
        features, axes = x.shape[-1], tuple(range(x.ndim - 1))
        wide = jnp.promote_types(jnp.float32, self.param_dtype)
        scale = self.param("scale", nn.initializers.ones, (features,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (features,), self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (features,), wide)
        running_var = self.variable("batch_stats", "var", jnp.ones, (features,), wide)

        # Statistics in float32 or wider: bfloat16 means over B*H*W values lose all their digits.
        x = jnp.asarray(x, jnp.promote_types(self.dtype, wide))
        if not train or self.is_initializing():
            # One multiply-add in PyTorch's order and rounding: networks without shortcuts amplify
            # the difference of two orders a hundredfold. The two bounds change no finite number;
            # they keep the compiler from an approximate 1 / sqrt and from an unrounded product.
            tiny, lowest = jnp.finfo(wide).tiny, jnp.finfo(wide).min
            deviation = jnp.maximum(jnp.sqrt(running_var.value + self.epsilon), tiny)
            multiplier = scale * (1 / deviation)
            shift = jnp.maximum(running_mean.value * multiplier, lowest)
            y = x * multiplier + (bias - shift)
        elif mask is not None:
            mean, var, count = self._masked_statistics(x, mask[..., None].astype(x.dtype), axes)
            self._track(running_mean, running_var, mean, var * count / jnp.maximum(count - 1, 1))
            y = (x - mean) * (lax.rsqrt(var + self.epsilon) * scale) + bias
        else:
            count = math.prod(x.shape[:-1])
            mean = x.mean(axes)
            if self.axis_name is not None:
                count *= lax.psum(1, self.axis_name)
                mean = lax.pmean(mean, self.axis_name)
            # Two passes: E[x^2] - E[x]^2 cancels, and its gradient is no cheaper.
            var = jnp.square(x - mean).mean(axes)
            if self.axis_name is not None:
                var = lax.pmean(var, self.axis_name)
            if count < 2:
                raise ValueError(
                    f"{'/'.join(self.path)}: batch statistics need more than one value per "
                    f"channel, got x {x.shape}; use a larger batch or image"
                )
            self._track(running_mean, running_var, mean, var * (count / (count - 1)))
            y = (x - mean) * (lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.astype(self.dtype)

    def _masked_statistics(self, x, mask, axes):
        def total(values):
            values = values.sum(axes)
            return values if self.axis_name is None else lax.psum(values, self.axis_name)

        count = jnp.maximum(total(mask), 1)
        mean = total(x * mask) / count
        return mean, total(jnp.square(x - mean) * mask) / count, count

    def _track(self, running_mean, running_var, mean, unbiased) -> None:
        if self.is_mutable_collection("batch_stats"):
            keep, new = 1 - self.momentum, self.momentum
            kind = running_mean.value.dtype
            running_mean.value = keep * running_mean.value + new * mean.astype(kind)
            running_var.value = keep * running_var.value + new * unbiased.astype(kind)


class LayerNorm(nn.Module):
    """Normalize the last axis to mean 0 and variance 1, x [..., C]; params `scale`, `bias` [C].

    Statistics in float32 or wider and in two passes: E[x^2] - E[x]^2 cancels. `epsilon` is
    PyTorch's default; BERT wants 1e-12.
    """

    epsilon: float = 1e-5
    use_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, features, self.param_dtype)
        x = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        x = x - x.mean(-1, keepdims=True)
        y = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon) * scale
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, features, self.param_dtype)
        return y.astype(self.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, in float32; param `scale` [C]."""

    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        y = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (y * scale).astype(self.dtype)
