"""Transposed convolution as a few small convolutions, one for every output phase."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.conv2d import conv2d
from jaxmodels.layers.initializers import Initializer, torch_bias, torch_kernel


class TransposedConv(nn.Module):
    """PyTorch's `ConvTranspose2d` where kernel = stride + 2 padding.

    x [B, H, W, I] -> [B, sH, sW, O]. `kernel` [k, k, I, O] is flipped, as an input-dilated
    convolution has it: the rule `TRANSPOSED_CONVOLUTION` of `interop/conversion.py` converts
    PyTorch's [I, O, k, k]. Output phase (a, b) sees only every s-th tap, so that no product with a
    zero is computed; XLA's own input-dilated form computes all of them on a CPU.

    Raises ValueError for sizes that do not give exactly `stride` times the input.
    """

    features: int
    kernel_size: int = 4
    stride: int = 2
    padding: int = 1
    use_bias: bool = True
    kernel_init: Initializer = torch_kernel()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k, s, pad = self.kernel_size, self.stride, self.padding
        if k != s + 2 * pad:
            raise ValueError(
                f"transposed convolution: kernel {k} must be stride {s} + 2 * padding {pad}"
            )
        shape = (k, k, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        kernel, x = jnp.asarray(kernel, self.dtype), jnp.asarray(x, self.dtype)
        rows = []
        for a in range(s):
            row = []
            for b in range(s):
                (first_a, pad_a), (first_b, pad_b) = self._phase(a), self._phase(b)
                row.append(conv2d(x, kernel[first_a::s, first_b::s], (1, 1), (pad_a, pad_b)))
            rows.append(jnp.stack(row, 3))
        y = jnp.stack(rows, 2)  # [B, H, s, W, s, O]
        y = y.reshape(x.shape[0], x.shape[1] * s, x.shape[2] * s, self.features)
        if self.use_bias:
            # PyTorch's fan-in of a transposed kernel counts the output channels.
            init = torch_bias(self.features * k * k)
            y = y + self.param("bias", init, (self.features,), self.param_dtype).astype(self.dtype)
        return y

    def _phase(self, phase: int) -> tuple[int, tuple[int, int]]:
        """First tap of an output phase, and the zeros before and after the input."""
        reach = self.kernel_size - 1 - self.padding
        first = (reach - phase) % self.stride
        count = -(-(self.kernel_size - first) // self.stride)
        before = -((phase + first - reach) // self.stride)
        return first, (before, count - 1 - before)
