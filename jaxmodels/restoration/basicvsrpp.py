"""BasicVSR++: recurrent video super-resolution with flow-guided deformable alignment.

K. C. K. Chan, S. Zhou, X. Xu, C. C. Loy, "BasicVSR++: Improving Video Super-Resolution with
Enhanced Propagation and Alignment", arXiv 2104.13371. Structure and names after the official code,
ckkelvinchan/BasicVSR_PlusPlus@bbd417c (`mmedit/models/backbones/sr_backbones/basicvsr_pp.py`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.convolution import Conv
from jaxmodels.layers.initializers import Initializer
from jaxmodels.restoration.deformable import modulated_deform_conv2d
from jaxmodels.restoration.inputs import check_unit_range
from jaxmodels.restoration.resampling import flow_warp, pixel_shuffle, resize
from jaxmodels.restoration.spynet import SPYNET_CHANNELS, SPyNet

DIRECTIONS = ("backward_1", "forward_1", "backward_2", "forward_2")
SCALE = 4
SMALLEST_SIDE = 64
SLOPE = 0.1

_ZEROS = nn.initializers.zeros


def _official_init(scale: float) -> dict[str, Initializer]:
    """Kaiming normal over fan-in times `scale`, no bias: mmagic's `default_init_weights`.

    Residual blocks have scale 0.1, upsampling convolutions 1; the others are PyTorch's own.
    """
    kernel = nn.initializers.variance_scaling(2 * scale**2, "fan_in", "normal")
    return {"kernel_init": kernel, "bias_init": _ZEROS}


class ResidualBlocks(nn.Module):
    """A 3x3 convolution, leaky ReLU, n blocks x + conv(relu(conv(x))); [B, H, W, I] -> C maps."""

    channels: int
    num_blocks: int
    he_init: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(use_bias=True, dtype=self.dtype, param_dtype=self.param_dtype)
        start = _official_init(1.0) if self.he_init else {}
        x = nn.leaky_relu(Conv(self.channels, 3, name="main.0", **start, **types)(x), SLOPE)
        init = _official_init(0.1)
        for i in range(self.num_blocks):
            y = nn.relu(Conv(self.channels, 3, name=f"main.2.{i}.conv1", **init, **types)(x))
            x = x + Conv(self.channels, 3, name=f"main.2.{i}.conv2", **init, **types)(y)
        return x


class SecondOrderDeformableAlignment(nn.Module):
    """Deformable convolution of two earlier states, offsets = their flows plus learned residues.

    states [B, H, W, 2C] (the two before this frame, not warped), condition [B, H, W, 3C] (first
    state warped, this frame's features, second state warped), flows [B, H, W, 2] (x, y) ->
    [B, H, W, C]. Residues are bounded by `max_residue_magnitude` pixels.
    """

    channels: int
    deform_groups: int = 16
    max_residue_magnitude: float = 10.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, states: jax.Array, condition: jax.Array, flow_1: jax.Array, flow_2: jax.Array
    ) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        groups = self.deform_groups
        y = jnp.concatenate([condition, flow_1, flow_2], -1)
        for i in (0, 2, 4):
            y = Conv(self.channels, 3, use_bias=True, name=f"conv_offset.{i}", **types)(y)
            y = nn.leaky_relu(y, SLOPE)
        zero = dict(kernel_init=_ZEROS, bias_init=_ZEROS)
        y = Conv(27 * groups, 3, use_bias=True, name="conv_offset.6", **zero, **types)(y)
        residue, mask = y[..., : 18 * groups], y[..., 18 * groups :]
        offset = self.max_residue_magnitude * jnp.tanh(residue)
        # Flows are (x, y), offsets (y, x) for each tap; the first half of the groups follows the
        # first flow.
        tiled = [jnp.tile(flow[..., ::-1], 9 * groups // 2) for flow in (flow_1, flow_2)]
        offset = offset + jnp.concatenate(tiled, -1)
        kernel = self.param(
            "kernel",
            nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            (3, 3, states.shape[-1], self.channels),
            self.param_dtype,
        )
        bias = self.param("bias", _ZEROS, (self.channels,), self.param_dtype)
        return modulated_deform_conv2d(
            states,
            offset,
            jax.nn.sigmoid(mask),
            kernel.astype(self.dtype),
            bias.astype(self.dtype),
            padding=1,
            deform_groups=groups,
        )


class BasicVSRPlusPlus(nn.Module):
    """BasicVSR++, clips [B, T, h, w, 3] in [0, 1] -> [B, T, 4h, 4w, 3].

    With `is_low_res_input=False` (compressed-video enhancement) the output has the input's size:
    features and flows live on a grid of a quarter of it. `spatial_blocks` are those of the feature
    extractor and of the reconstruction, `hr_channels` the width at full size; the official class
    fixes them at 5 and 64. `he_init` begins every convolution outside flow and alignment but the
    last with He's weights, because a short training is slow to leave PyTorch's. `remat` recomputes
    each propagation step in the backward pass. `detect_mirror`: an even clip whose second half is
    the first reversed takes the backward flows, reversed, as its forward flows; this is decided for
    every call.

    Raises ValueError for clips that are not [B,T,C,H,W] with channels moved last, sides under
    64 on the low-resolution grid, and channel counts that deformable groups do not divide.
    """

    mid_channels: int = 64
    num_blocks: int = 7
    max_residue_magnitude: float = 10.0
    is_low_res_input: bool = True
    deform_groups: int = 16
    spynet_channels: tuple[int, ...] = SPYNET_CHANNELS
    spatial_blocks: int = 5
    hr_channels: int = 64
    detect_mirror: bool = True
    he_init: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if 2 * self.mid_channels % self.deform_groups or self.deform_groups % 2:
            raise ValueError(
                f"2 * mid_channels = {2 * self.mid_channels} must divide by deform_groups "
                f"{self.deform_groups} (16 in the published models)"
            )
        object.__setattr__(self, "spynet_channels", tuple(self.spynet_channels))
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: a clip of two frames."""
        side = SMALLEST_SIDE * (1 if self.is_low_res_input else SCALE)
        return (jax.ShapeDtypeStruct((1, 2, side, side, 3), jnp.float32),)

    def setup(self) -> None:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        conv = dict(use_bias=True, **types)
        hidden = conv | _official_init(1.0) if self.he_init else conv
        blocks = dict(he_init=self.he_init, **types)
        c = self.mid_channels
        self.spynet = SPyNet(self.spynet_channels, **types)
        if self.is_low_res_input:
            self.feat_extract = ResidualBlocks(c, self.spatial_blocks, **blocks)
        else:
            self._child("feat_extract.0", Conv(c, 3, 2, **hidden))
            self._child("feat_extract.2", Conv(c, 3, 2, **hidden))
            self._child("feat_extract.4", ResidualBlocks(c, self.spatial_blocks, **blocks))
        for direction in DIRECTIONS:
            align = SecondOrderDeformableAlignment(
                c, self.deform_groups, self.max_residue_magnitude, **types
            )
            self._child(f"deform_align.{direction}", align)
            self._child(f"backbone.{direction}", ResidualBlocks(c, self.num_blocks, **blocks))
        self.reconstruction = ResidualBlocks(c, self.spatial_blocks, **blocks)
        enlarging = conv | _official_init(1.0)
        self._child("upsample1.upsample_conv", Conv(4 * c, 3, **enlarging))
        self._child("upsample2.upsample_conv", Conv(4 * self.hr_channels, 3, **enlarging))
        self.conv_hr = Conv(self.hr_channels, 3, **hidden)
        self.conv_last = Conv(3, 3, **conv)

    def _child(self, name: str, module: nn.Module) -> None:
        setattr(self, name, module)

    def __call__(self, clip: jax.Array, train: bool = False) -> jax.Array:
        """The restored clip."""
        return self.intermediates(clip, train)["output"]

    def intermediates(self, clip: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """Flows `flows_*` [B, T-1, h, w, 2], each pass [B, T, h, w, C] by name, and `output`."""
        del train
        _check_clip(clip, self.is_low_res_input)
        if self.is_initializing() and clip.shape[1] == 1:
            clip = jnp.repeat(clip, 2, axis=1)  # one frame would leave the alignment unbuilt
        backward, forward = self.flows(clip)
        spatial = self._per_frame(self._features, clip)
        maps: dict[str, jax.Array] = {"flows_backward": backward, "flows_forward": forward}
        passes: list[jax.Array] = []
        for direction in DIRECTIONS:
            flows = backward if direction.startswith("backward") else forward
            passes.append(self._propagate(direction, spatial, passes, flows))
            maps[direction] = passes[-1]
        merged = jnp.concatenate([spatial, *passes], -1)

        def upsample(features):
            y = self.reconstruction(features)
            y = getattr(self, "upsample1.upsample_conv")(y)
            y = nn.leaky_relu(pixel_shuffle(y, 2), SLOPE)
            y = getattr(self, "upsample2.upsample_conv")(y)
            y = nn.leaky_relu(pixel_shuffle(y, 2), SLOPE)
            return self.conv_last(nn.leaky_relu(self.conv_hr(y), SLOPE))

        y = self._per_frame(upsample, merged)
        base = clip
        if self.is_low_res_input:
            height, width = clip.shape[2:4]
            base = resize(clip, (height * SCALE, width * SCALE), scale=SCALE)
        maps["output"] = y.astype(base.dtype) + base
        return maps

    def flows(self, clip: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Backward and forward flow between neighbors of clip [B, T, h, w, 3], each [B, T-1, ...].

        Backward flow t leads from frame t to t + 1, forward flow t from frame t + 1 to t.
        """
        batch, frames = clip.shape[:2]
        if not self.is_low_res_input:
            height, width = clip.shape[2:4]
            clip = resize(clip, (height // SCALE, width // SCALE), "bicubic", scale=1 / SCALE)
        height, width = clip.shape[2:4]
        if frames == 1:
            none = jnp.zeros((batch, 0, height, width, 2), clip.dtype)
            return none, none
        first = clip[:, :-1].reshape(-1, height, width, 3)
        second = clip[:, 1:].reshape(-1, height, width, 3)
        # Both directions in one call: half the program to compile.
        both = self.spynet(jnp.concatenate([first, second]), jnp.concatenate([second, first]))
        backward, forward = both.reshape(2, batch, frames - 1, height, width, 2)
        if frames % 2 == 0 and self.detect_mirror:
            half = frames // 2
            mirrored = jnp.all(clip[:, :half] == clip[:, half:][:, ::-1])
            forward = jnp.where(mirrored, backward[:, ::-1], forward)
        return backward, forward

    def _features(self, x: jax.Array) -> jax.Array:
        if self.is_low_res_input:
            return self.feat_extract(x)
        x = nn.leaky_relu(getattr(self, "feat_extract.0")(x), SLOPE)
        x = nn.leaky_relu(getattr(self, "feat_extract.2")(x), SLOPE)
        return getattr(self, "feat_extract.4")(x)

    def _per_frame(self, apply, clip: jax.Array) -> jax.Array:
        batch, frames = clip.shape[:2]
        y = apply(clip.reshape(batch * frames, *clip.shape[2:]))
        return y.reshape(batch, frames, *y.shape[1:])

    def _propagate(
        self, direction: str, spatial: jax.Array, passes: list[jax.Array], flows: jax.Array
    ) -> jax.Array:
        """One pass over the frames, [B, T, h, w, C] in time order; the state starts at zero."""
        batch, frames, height, width, _ = spatial.shape
        reverse = direction.startswith("backward")
        # Time first, in the order of the pass.
        inputs = [jnp.moveaxis(x, 1, 0) for x in (spatial, *passes, flows)]
        if reverse:
            inputs = [x[::-1] for x in inputs]
        current, flows = jnp.concatenate(inputs[:-1], -1), inputs[-1]
        zeros = jnp.zeros((batch, height, width, self.mid_channels), spatial.dtype)

        def refine(module, aligned, features):
            joined = jnp.concatenate([features, aligned], -1)
            return aligned + getattr(module, f"backbone.{direction}")(joined)

        first = refine(self, zeros, current[0])
        if frames == 1:
            return first[:, None]

        def step(module, carry, inputs):
            previous, before, last_flow, is_second = carry
            features, flow = inputs
            # At the second frame there is no state two steps back: zeros stand for it.
            flow_2 = flow + flow_warp(last_flow, flow)
            flow_2 = jnp.where(is_second, 0, flow_2)
            condition = jnp.concatenate(
                [
                    flow_warp(previous, flow),
                    features[..., : self.mid_channels],
                    flow_warp(before, flow_2),
                ],
                -1,
            )
            states = jnp.concatenate([previous, before], -1)
            align = getattr(module, f"deform_align.{direction}")
            state = refine(module, align(states, condition, flow, flow_2), features)
            state = state.astype(previous.dtype)
            return (state, previous, flow, jnp.zeros_like(is_second)), state

        body = nn.remat(step, prevent_cse=False) if self.remat else step
        scan = nn.scan(
            body,
            variable_broadcast=("params", "buffers"),
            split_rngs={"params": False},
        )
        start = (first.astype(spatial.dtype), zeros, jnp.zeros_like(flows[0]), jnp.asarray(True))
        _, rest = scan(self, start, (current[1:], flows))
        states = jnp.concatenate([start[0][None], rest])
        return jnp.moveaxis(states[::-1] if reverse else states, 0, 1)


def _check_clip(clip: jax.Array, is_low_res_input: bool) -> None:
    wanted = (
        "clips must be [B,T,C,H,W] transposed to channels last, [batch, time, height, width, 3]"
    )
    if clip.ndim != 5 or clip.shape[-1] != 3:
        raise ValueError(f"BasicVSR++: {wanted}, got {clip.shape}")
    check_unit_range(clip, "BasicVSR++")
    scale = 1 if is_low_res_input else SCALE
    height, width = clip.shape[2:4]
    if min(height, width) < SMALLEST_SIDE * scale:
        raise ValueError(
            f"BasicVSR++: {wanted} with sides of at least {SMALLEST_SIDE * scale} pixels "
            f"({SMALLEST_SIDE} on the low-resolution grid), got {clip.shape}"
        )
    if height % scale or width % scale:
        raise ValueError(f"BasicVSR++: sides must be multiples of {scale}, got {clip.shape}")


MODEL = BasicVSRPlusPlus

VARIANTS: dict[str, dict[str, Any]] = {
    "basicvsrpp_reds4": {"mid_channels": 64, "num_blocks": 7},
    "basicvsrpp_vimeo90k": {"mid_channels": 64, "num_blocks": 7},
    "basicvsrpp_ntire_vsr": {"mid_channels": 128, "num_blocks": 25},
    "basicvsrpp_ntire_decompress": {
        "mid_channels": 128,
        "num_blocks": 25,
        "is_low_res_input": False,
    },
}

TORCH_RULES: dict[str, Any] = {"drops": [r"(.*\.)?step_counter"]}
