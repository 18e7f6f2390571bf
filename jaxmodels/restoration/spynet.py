"""SPyNet: optical flow by a spatial pyramid of small networks.

A. Ranjan, M. J. Black, "Optical Flow Estimation using a Spatial Pyramid Network", arXiv
1611.00850, as BasicVSR uses it: ckkelvinchan/BasicVSR_PlusPlus@bbd417c (`basicvsr_net.py`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.layers.convolution import Conv
from jaxmodels.restoration.resampling import average_pool_2, flow_warp, resize
from jaxmodels.vision.images import IMAGENET_MEAN, IMAGENET_STD

LEVELS = 6
SPYNET_CHANNELS = (32, 64, 32, 16)


class SPyNet(nn.Module):
    """Flow from `ref` to `supp`, both [B, H, W, 3] in [0, 1] -> [B, H, W, 2] (x, y) in pixels.

    `supp` warped by the flow looks like `ref`. Sides that are no multiples of 32 are resized up
    and the flow scaled back. ImageNet's mean and deviation are buffers, as in the checkpoints.
    """

    spynet_channels: tuple[int, ...] = SPYNET_CHANNELS
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: two images of 32x32."""
        return (jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),) * 2

    @nn.compact
    def __call__(self, ref: jax.Array, supp: jax.Array) -> jax.Array:
        if ref.shape != supp.shape or ref.ndim != 4 or ref.shape[-1] != 3:
            raise ValueError(
                "SPyNet: ref and supp must be images [batch, height, width, 3] of one shape, got "
                f"{ref.shape} and {supp.shape}"
            )
        height, width = ref.shape[1:3]
        up_h, up_w = -(-height // 32) * 32, -(-width // 32) * 32
        mean = self.variable("buffers", "mean", _buffer, IMAGENET_MEAN).value
        std = self.variable("buffers", "std", _buffer, IMAGENET_STD).value
        mean, std = (jnp.asarray(x, ref.dtype).reshape(3) for x in (mean, std))
        pyramid = [
            tuple((resize(x, (up_h, up_w)) - mean) / std for x in (ref, supp)),
        ]
        for _ in range(LEVELS - 1):
            pyramid.append(tuple(average_pool_2(x) for x in pyramid[-1]))
        flow = jnp.zeros((ref.shape[0], up_h // 32, up_w // 32, 2), ref.dtype)
        widths = (*self.spynet_channels, 2)
        for level, (a, b) in enumerate(reversed(pyramid)):
            if level:
                target = (flow.shape[1] * 2, flow.shape[2] * 2)
                flow = 2 * resize(flow, target, align_corners=True)
            y = jnp.concatenate([a, flow_warp(b, flow, "border"), flow], -1)
            for k, features in enumerate(widths):
                y = Conv(
                    features,
                    7,
                    use_bias=True,
                    dtype=self.dtype,
                    param_dtype=self.param_dtype,
                    name=f"basic_module.{level}.basic_module.{k}.conv",
                )(y)
                y = nn.relu(y) if k < len(widths) - 1 else y
            flow = flow + y.astype(flow.dtype)
        flow = resize(flow, (height, width))
        return flow * jnp.asarray([width / up_w, height / up_h], flow.dtype)


def _buffer(values: tuple[float, ...]) -> np.ndarray:
    return np.asarray(values, np.float32).reshape(1, 3, 1, 1)


MODEL = SPyNet

# Its name within BasicVSR++'s files.
TORCH_RULES = {"prefixes": ["spynet"]}
