"""Modulated deformable convolution (deformable convolution v2).

X. Zhu, H. Hu, S. Lin, J. Dai, "Deformable ConvNets v2", arXiv 1811.11168. Conventions of
open-mmlab/mmcv@a8073c7 (`modulated_deform_conv.cpp`): offsets interleave (y, x) for each tap.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmodels.restoration.resampling import sample_bilinear


def modulated_deform_conv2d(
    x: jax.Array,
    offset: jax.Array,
    mask: jax.Array | None,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> jax.Array:
    """y(p) = b + sum_k W_k m_k x(p + p_k + dp_k), sampled bilinearly, zeros outside the image.

    Args:
      x: [B, H, W, I].
      offset: [B, H', W', D * K * 2], D deformable groups, K taps row by row, then (y, x), pixels.
      mask: [B, H', W', D * K], or None for ones.
      kernel: [kh, kw, I / groups, O].
      bias: [O].
      stride, padding, dilation: of both axes, or (rows, columns).
      groups: of the convolution. deform_groups: the input channels are split evenly and in order.

    Returns: [B, H', W', O].

    Raises ValueError naming the sizes that do not fit.
    """
    batch, height, width, channels = x.shape
    kh, kw, per_group, features = kernel.shape
    taps = kh * kw
    (step_y, step_x), (pad_y, pad_x), (gap_y, gap_x) = (
        (n, n) if isinstance(n, int) else n for n in (stride, padding, dilation)
    )
    out_h = (height + 2 * pad_y - gap_y * (kh - 1) - 1) // step_y + 1
    out_w = (width + 2 * pad_x - gap_x * (kw - 1) - 1) // step_x + 1
    if channels % deform_groups or channels % groups or features % groups:
        raise ValueError(
            f"deformable convolution: {channels} input channels must divide by deform_groups = "
            f"{deform_groups} and by groups = {groups}, {features} output channels by groups"
        )
    if per_group != channels // groups:
        raise ValueError(
            f"deformable convolution: kernel {kernel.shape} has {per_group} input channels a "
            f"group, the image {channels} / {groups}"
        )
    wanted = (batch, out_h, out_w, deform_groups * taps * 2)
    if offset.shape != wanted:
        raise ValueError(f"deformable convolution: offset must be {wanted}, got {offset.shape}")
    if mask is not None and mask.shape != (*wanted[:3], deform_groups * taps):
        raise ValueError(
            f"deformable convolution: mask must be {(*wanted[:3], deform_groups * taps)}, got "
            f"{mask.shape}"
        )
    pixels = out_h * out_w
    # Deformable groups become rows: [B, D, pixel, tap].
    shift = offset.reshape(batch, pixels, deform_groups, taps, 2).swapaxes(1, 2)
    first_row = jnp.arange(out_h) * step_y - pad_y
    first_column = jnp.arange(out_w) * step_x - pad_x
    grid_rows = jnp.broadcast_to(first_row[:, None], (out_h, out_w)).reshape(pixels, 1)
    grid_columns = jnp.broadcast_to(first_column, (out_h, out_w)).reshape(pixels, 1)
    tap_rows = jnp.repeat(jnp.arange(kh) * gap_y, kw)
    tap_columns = jnp.tile(jnp.arange(kw) * gap_x, kh)
    rows = shift[..., 0] + (grid_rows + tap_rows).astype(shift.dtype)
    columns = shift[..., 1] + (grid_columns + tap_columns).astype(shift.dtype)

    share = channels // deform_groups
    parts = x.reshape(batch, height, width, deform_groups, share)
    parts = jnp.moveaxis(parts, 3, 1).reshape(batch * deform_groups, height, width, share)
    places = (batch * deform_groups, pixels * taps)
    sampled = sample_bilinear(parts, rows.reshape(places), columns.reshape(places), "zeros")
    sampled = sampled.reshape(batch, deform_groups, pixels, taps, share)
    if mask is not None:
        weight = mask.reshape(batch, pixels, deform_groups, taps).swapaxes(1, 2)
        sampled = sampled * weight[..., None].astype(sampled.dtype)
    # [B, D, pixel, tap, c] -> [B, pixel, tap, channel]
    values = sampled.transpose(0, 2, 3, 1, 4)
    if groups == 1:
        y = values.reshape(batch, pixels, taps * channels) @ kernel.reshape(-1, features)
    else:
        values = values.reshape(batch, pixels, taps, groups, per_group)
        split = kernel.reshape(taps, per_group, groups, features // groups)
        y = jnp.einsum("bptgi,tigo->bpgo", values, split).reshape(batch, pixels, features)
    y = y.reshape(batch, out_h, out_w, features)
    return y if bias is None else y + bias
