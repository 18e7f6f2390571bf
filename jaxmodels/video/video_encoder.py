"""Video2StyleGAN's encoder: a Transformer whose high-resolution codes are reused over a clip.

J. Yu et al., "Video2StyleGAN: Encoding Video in Latent Space for Manipulation", arXiv 2206.13078.
There is no public code, and only its abstract could be read; it fixes a vision transformer, the
reuse of the codes of high-resolution layers, and landmark and mesh losses. The layout below is our
reconstruction: image tokens and one learned query for every generator layer pass through the same
pre-norm blocks, and a head of its own turns each query into that layer's code.

A frame's code is concat(low codes of the frame, high codes of the clip's key frame), so that the
high part is equal bit for bit over a clip.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.layers.normalization import LayerNorm
from jaxmodels.video import vit
from jaxmodels.video.query_decoder import FrozenMapping, StyleTransformerEncoder
from jaxmodels.video.style_encoders import Encoder4Editing, GradualStyleEncoder
from jaxmodels.video.stylegan2 import num_latents
from jaxmodels.vision.ir_se import narrowed

BACKBONES = ("vit", "ir_se50", "e4e", "style_transformer")
LARGEST_LOW = 8
EPSILON = 1e-6
REFRESH = ("first", "every", "mean")


def default_n_low(layers: int) -> int:
    """Codes that follow the frame: 8 of 18, min(8, n / 2 + 1) for small generators."""
    return min(LARGEST_LOW, layers // 2 + 1)


class VideoEncoder(nn.Module):
    """Frames [B, S, S, 3] in [-1, 1] -> W+ codes [B, n, w_dim] (n = 18 for `stylegan_size` 1024).

    `backbone` "vit" is ours; "ir_se50" (pSp), "e4e" and "style_transformer" put the published
    encoders behind the same interface, where `ir_layers` is their depth, and `width_divisor` and
    `se_reduction` narrow them. The last one's queries pass through the generator's mapping network
    of `mapping_layers` layers, which lies in the buffers.
    `n_low` codes follow the frame.
    `scan_layers` compiles one block for all, `remat` keeps no activations of blocks. The mean
    latent, to which everything is added, is the buffer `w_avg` [w_dim].

    Raises ValueError for sizes, splits and widths that cannot be meant.
    """

    image_size: int = 256
    patch_size: int = 16
    hidden_size: int = 384
    num_layers: int = 12
    num_heads: int = 6
    mlp_ratio: int = 4
    stylegan_size: int = 1024
    w_dim: int = 512
    n_low: int | None = None
    backbone: str = "vit"
    ir_layers: int = 50
    width_divisor: int = 1
    se_reduction: int = 16
    mapping_layers: int = 8
    scan_layers: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        layers = num_latents(self.stylegan_size)
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone is one of {', '.join(BACKBONES)}, got {self.backbone!r}")
        if self.n_low is not None and not 1 <= self.n_low <= layers - 1:
            raise ValueError(f"n_low must lie within 1 .. {layers - 1}, got {self.n_low}")
        if self.backbone != "vit" and narrowed(512, self.width_divisor) != self.w_dim:
            raise ValueError(
                f"w_dim is {self.w_dim}, but backbone {self.backbone} with width_divisor "
                f"{self.width_divisor} makes codes of width {512 // self.width_divisor}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by {self.num_heads} heads"
            )
        super().__post_init__()

    @property
    def num_latents(self) -> int:
        """Codes of a W+ latent."""
        return num_latents(self.stylegan_size)

    @property
    def split(self) -> int:
        """First code that belongs to the clip, not to the frame."""
        return default_n_low(self.num_latents) if self.n_low is None else self.n_low

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: frames [1, S, S, 3]."""
        return (jax.ShapeDtypeStruct((1, self.image_size, self.image_size, 3), jnp.float32),)

    def __call__(self, frames: jax.Array) -> jax.Array:
        """All codes, [B, n, w_dim]."""
        return self.codes(frames, self.num_latents)

    def encode_key(self, frames: jax.Array) -> jax.Array:
        """All codes [B, n, w_dim]; those from `split` on serve the whole clip."""
        return self.codes(frames, self.num_latents)

    def encode_frame(self, frames: jax.Array) -> jax.Array:
        """The low codes [B, split, w_dim] alone: only their queries enter the network."""
        return self.codes(frames, self.split)

    @nn.compact
    def codes(
        self,
        frames: jax.Array,
        count: int,
        stage: int | jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """The first `count` codes, [B, count, w_dim].

        For the published encoders: `stage` is how many of e4e's deltas are on (None: all), `train`
        takes the batch's own statistics and moves the running ones.

        Raises ValueError for frames of another size, and outside `jit` for bytes (`check_range`).
        """
        check_frames(frames, self.image_size)
        check_range(frames)
        average = self.variable("buffers", "w_avg", jnp.zeros, (self.w_dim,), self.param_dtype)
        if self.backbone != "vit":
            offsets = self._ir_se(frames, count, stage, train)
        elif stage is None:
            offsets = self._vit(frames, count)
        else:
            raise ValueError("progressive stages belong to backbone e4e")
        return average.value + offsets.astype(self.param_dtype)

    def _vit(self, frames: jax.Array, count: int) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        width, layers = self.hidden_size, self.num_latents
        small = nn.initializers.truncated_normal(0.02)
        x = vit.Embeddings(width, self.patch_size, False, name="embeddings", **types)(frames)
        shape = (layers, width)
        queries = self.param("queries", small, shape, self.param_dtype)
        queries += self.param("layer_embeddings", small, shape, self.param_dtype)
        queries = jnp.broadcast_to(queries[:count].astype(x.dtype), (len(x), count, width))
        x = jnp.concatenate([x, queries], 1)
        block = vit.ScannedBlock if self.scan_layers else vit.TransformerBlock
        block = nn.remat(block, prevent_cse=not self.scan_layers) if self.remat else block
        own = dict(
            heads=self.num_heads,
            intermediate=self.mlp_ratio * width,
            epsilon=EPSILON,
            kernel_init=small,
            **types,
        )
        if self.scan_layers:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.num_layers,
            )
            x, _ = stack(**own, name="layers.*")(x)
        else:
            for i in range(self.num_layers):
                x = block(**own, name=f"layers.{i}")(x)
        x = LayerNorm(EPSILON, name="layernorm", **types)(x[:, -count:])
        return Heads(layers, self.w_dim, name="heads", **types)(x)

    def _ir_se(self, frames: jax.Array, count: int, stage, train: bool) -> jax.Array:
        kinds = {"ir_se50": GradualStyleEncoder, "e4e": Encoder4Editing}
        encoder = kinds.get(self.backbone, StyleTransformerEncoder)(
            num_layers=self.ir_layers,
            stylegan_size=self.stylegan_size,
            width_divisor=self.width_divisor,
            se_reduction=self.se_reduction,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="encoder",
        )
        if self.backbone == "style_transformer":
            if stage is not None:
                raise ValueError("progressive stages belong to backbone e4e")
            mapping = FrozenMapping(
                self.mapping_layers, param_dtype=self.param_dtype, name="decoder"
            )
            return encoder(frames, mapping, train)[:, :count]
        # All styles are made (their parameters must exist); XLA drops those that nobody reads.
        return encoder(frames, stage, train)[:, :count]


class Heads(nn.Module):
    """A linear map of its own for every layer's query, starting at zero, equalized unless told not.

    x [B, count, D], the first of `layers` queries -> [B, count, w_dim].
    """

    layers: int
    w_dim: int
    equalized: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        zeros, count, width = nn.initializers.zeros, x.shape[1], x.shape[2]
        shape = (self.layers, width, self.w_dim)
        kernel = self.param("kernel", zeros, shape, self.param_dtype)[:count]
        bias = self.param("bias", zeros, (self.layers, self.w_dim), self.param_dtype)[:count]
        kernel = kernel / np.sqrt(width) if self.equalized else kernel
        y = jnp.einsum("bnd,ndo->bno", jnp.asarray(x, self.dtype), kernel.astype(self.dtype))
        return y + bias.astype(self.dtype)


def check_frames(frames: jax.Array, size: int) -> None:
    """Refuse frames that are not square or of another size than the encoder's, and integers."""
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be [batch, {size}, {size}, 3], got {frames.shape}")
    if frames.shape[1:3] != (size, size):
        raise ValueError(
            f"frames are {frames.shape[1]}x{frames.shape[2]}, the encoder takes {size}x{size}; "
            "align and resize them first"
        )
    if not jnp.issubdtype(frames.dtype, jnp.floating):
        raise ValueError(f"frames must be floats in [-1, 1], got {frames.dtype}; x / 127.5 - 1")


def check_range(frames: np.ndarray, warn: Callable[[str], None] | None = None) -> float:
    """Refuse frames that cannot be in [-1, 1]; gives their minimum.

    `frames` is one frame or a whole clip, about which `warn` is told when nothing in it is negative
    (images in [0, 1]). Under `jit` values are not known: nothing is checked, the minimum is NaN.

    Raises ValueError for a maximum above 1.5 (bytes).
    """
    if isinstance(frames, jax.core.Tracer):
        return float("nan")
    frames = np.asarray(frames)
    low, high = float(frames.min()), float(frames.max())
    if high > 1.5:
        raise ValueError(
            f"frames reach {high:g}; wanted are floats in [-1, 1] (bytes: x / 127.5 - 1)"
        )
    if warn is not None:
        _warn_of_unit_range(low, warn)
    return low


def _warn_of_unit_range(low: float, warn: Callable[[str], None]) -> None:
    if low >= 0:
        warn(f"no frame is negative (minimum {low:g}): are they in [0, 1]? wanted is [-1, 1]")


def _python_warning(message: str) -> None:
    warnings.warn(message, stacklevel=4)


class ClipState(NamedTuple):
    """What the online mode carries from frame to frame.

    Attributes:
      high: [B, n - split, w_dim], or None before the first key.
      keys: [] int32, keys seen. frames: [] int32, frames seen since the last key.
    """

    high: jax.Array | None
    keys: jax.Array
    frames: jax.Array


def start_clip() -> ClipState:
    """The state before any frame."""
    return ClipState(None, jnp.int32(0), jnp.int32(0))


def join_codes(low: jax.Array, high: jax.Array) -> jax.Array:
    """concat(low [B, split, D], high [B or 1, n - split, D]) along layers."""
    return jnp.concatenate([low, jnp.broadcast_to(high, (len(low), *high.shape[1:]))], 1)


def take_key(state: ClipState, high: jax.Array, refresh: str = "first") -> ClipState:
    """The state after a key frame whose high codes are `high` [B, n - split, D].

    "mean" keeps the running mean over all keys, anything else the newest.
    """
    if refresh not in REFRESH:
        raise ValueError(f"refresh is one of {', '.join(REFRESH)}, got {refresh!r}")
    keys = state.keys + 1
    if refresh == "mean" and state.high is not None:
        high = state.high + (high - state.high) / keys
    return ClipState(high, keys, jnp.int32(0))


def encode_key(
    module: VideoEncoder,
    variables: Mapping[str, Any],
    frames: jax.Array,
    state: ClipState | None = None,
    refresh: str = "first",
) -> tuple[jax.Array, ClipState]:
    """(W+ [B, n, D], state) of key frames, one clip a row.

    Raises ValueError for bytes, and warns of frames in [0, 1], outside `jit` (`check_range`).
    """
    check_range(frames, _python_warning)
    codes = module.apply(variables, frames, method="encode_key")
    return codes, take_key(state or start_clip(), codes[:, module.split :], refresh)


def encode_frame(
    module: VideoEncoder, variables: Mapping[str, Any], frames: jax.Array, state: ClipState
) -> tuple[jax.Array, ClipState]:
    """(W+ [B, n, D], state) of further frames. Raises ValueError before any key."""
    if state.high is None:
        raise ValueError("no key codes in state; call encode_key on the clip's first frame")
    low = module.apply(variables, frames, method="encode_frame")
    return join_codes(low, state.high), state._replace(frames=state.frames + 1)


def encode_clip(
    module: VideoEncoder, variables: Mapping[str, Any], frames: jax.Array, key: int = 0
) -> jax.Array:
    """Offline: W+ [T, n, D] of a clip [T, S, S, 3] in one batch, high codes of frame `key`.

    Raises ValueError for bytes, and warns of a clip in [0, 1], outside `jit` (`check_range`).
    """
    check_range(frames, _python_warning)
    high = module.apply(variables, frames[key : key + 1], method="encode_key")[:, module.split :]
    return join_codes(module.apply(variables, frames, method="encode_frame"), high)


def stream(
    module: VideoEncoder,
    variables: Mapping[str, Any],
    frames: Iterable[np.ndarray],
    refresh: str = "first",
    every: int = 0,
    warn: Callable[[str], None] = _python_warning,
) -> Iterator[tuple[np.ndarray, jax.Array]]:
    """Online: (frame, W+ [1, n, D]) for every frame [S, S, 3], one at a time.

    A key is taken at the first frame, and with "every" and "mean" at each `every`-th. The key's own
    low codes come from the frame path as well, as all others do.

    Raises ValueError at a frame of bytes. A clip of which no frame is negative is in [0, 1]: `warn`
    is told at its end, for a bright frame alone says nothing.
    """
    if refresh not in REFRESH:
        raise ValueError(f"refresh is one of {', '.join(REFRESH)}, got {refresh!r}")
    if refresh != "first" and every < 1:
        raise ValueError(f"refresh {refresh!r} needs every >= 1, got {every}")
    key = jax.jit(lambda v, x: module.apply(v, x, method="encode_key")[:, module.split :])
    low = jax.jit(lambda v, x: module.apply(v, x, method="encode_frame"))
    state, lowest = start_clip(), np.inf
    for t, frame in enumerate(frames):
        lowest = min(lowest, check_range(frame))
        batch = jnp.asarray(frame)[None]
        if t == 0 or (refresh != "first" and t % every == 0):
            state = take_key(state, key(variables, batch), refresh)
        yield frame, join_codes(low(variables, batch), state.high)
    if np.isfinite(lowest):
        _warn_of_unit_range(lowest, warn)


MODEL = VideoEncoder

VARIANTS: dict[str, dict[str, Any]] = {
    "video2stylegan_tiny": {"hidden_size": 192, "num_layers": 4, "num_heads": 3},
    "video2stylegan_small": {"hidden_size": 384, "num_layers": 12, "num_heads": 6},
    "video2stylegan_base": {"hidden_size": 768, "num_layers": 12, "num_heads": 12},
    "video_psp": {"backbone": "ir_se50"},
    "video_e4e": {"backbone": "e4e"},
    "video_style_transformer": {"backbone": "style_transformer"},
}


def TORCH_RULES(module: nn.Module) -> dict[str, Any]:
    """Blocks take ViT weights in both spellings; published encoders keep their own names."""
    if not isinstance(module, VideoEncoder):
        return {}
    names = [("w_avg", "latent_avg")]
    if module.backbone == "style_transformer":
        # Of the generator in the same file the mapping network alone is the encoder's.
        names += [(f"{part}.", f"{part}.module.") for part in ("encoder", "decoder")]
        return {"drops": [r"decoder\.module\.(?!style\.).*"], "names": names}
    drops = [r"(pooler|classifier)\..*", r"decoder\..*"]
    if module.backbone != "vit":
        return {"drops": drops, "names": names}
    return {"spellings": list(vit.SPELLINGS), "prefixes": vit.PREFIXES, "drops": drops}


def upgrade_checkpoint(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """A ViT file's positions without the class token, resized to the encoder's grid."""
    state = dict(state)
    if not isinstance(module, VideoEncoder):
        return state
    if module.backbone != "vit":
        if not any(k.startswith("encoder.") for k in state):
            state = {k if k == "latent_avg" else f"encoder.{k}": v for k, v in state.items()}
        if module.backbone == "style_transformer":
            # Officially both parts are wrapped for several GPUs.
            part = r"^(encoder|decoder)\.(?!module\.)"
            state = {re.sub(part, r"\1.module.", k): v for k, v in state.items()}
        average = np.asarray(state.get("latent_avg", np.zeros(module.w_dim, np.float32)))
        state["latent_avg"] = average.reshape(-1, average.shape[-1])[0]
        return state
    for key in list(state):
        if key.endswith("embeddings.cls_token"):
            del state[key]
        elif key.endswith("embeddings.position_embeddings"):
            state[key] = _regridded(np.asarray(state[key]), module.image_size // module.patch_size)
    return state


def _regridded(positions: np.ndarray, grid: int) -> np.ndarray:
    _, count, width = positions.shape
    if count == grid * grid:
        return positions
    side = int(np.sqrt(count - 1))
    if side * side != count - 1:
        return positions  # the loader names the shapes
    square = positions[:, 1:].reshape(1, side, side, width)
    if side != grid:
        square = np.asarray(jax.image.resize(square, (1, grid, grid, width), "cubic"))
    return square.reshape(1, grid * grid, width)
