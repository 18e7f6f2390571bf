"""Compressed super-resolution: argument names to ours, NCHW to NHWC and back."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmodels
from jaxmodels.restoration import inference, losses, metrics, resampling
from jaxmodels.restoration.deformable import modulated_deform_conv2d


def run(case) -> dict[str, Any]:
    """Every wanted output of one case, in PyTorch's layouts."""
    name = case.model
    if name.startswith("Swin2SR"):
        return _swin2sr(case)
    if name.startswith("BasicVSR"):
        return _basicvsrpp(case)
    if name.startswith("MFVQE"):
        return _ivl(case)
    for key, function in (
        ("offset", _deform_conv),
        ("ref", _spynet),
        ("flow", _spynet),
        ("x16", _resize),
        ("hr_u8", _resize),
        ("x", _resize),
        ("pred", _losses),
        ("img", _losses),
    ):
        if key in case.inputs:
            return function(case)
    return _metrics(case)


def _last(x) -> jax.Array:
    """[..., C, H, W] -> [..., H, W, C]."""
    return jnp.asarray(np.moveaxis(np.asarray(x), -3, -1))


def _first(x) -> np.ndarray:
    """[..., H, W, C] -> [..., C, H, W]."""
    return np.moveaxis(np.asarray(x), -1, -3)


# Arguments of the official classes that change no number at these values, and ours lack.
_WITHOUT_EFFECT = {
    "patch_size": (1,),
    "norm_layer": ("LayerNorm", "nn.LayerNorm"),
    "cpu_cache_length": range(1 << 20),
    "spynet_pretrained": (None,),
}


def _arguments(case) -> dict[str, Any]:
    return {k: v for k, v in case.config.items() if v not in _WITHOUT_EFFECT.get(k, ())}


def _swin2sr(case):
    arguments = _arguments(case)
    if not arguments.get("upsampler"):
        # The official class does not look at its default of 2 where nothing upsamples.
        arguments.setdefault("upscale", 1)
    module, variables = jaxmodels.load("restoration.swin2sr", case.weights, **arguments)
    apply = jax.jit(
        functools.partial(
            module.apply,
            method="intermediates",
            capture_intermediates=lambda m, _: type(m).__name__ in ("SwinBlock", "WindowAttention"),
            mutable=["intermediates"],
        )
    )
    heads = {"pixelshuffle_aux": ("sr", "aux"), "pixelshuffle_hf": ("sr", "sr_hf", "hf")}
    names = heads.get(module.upsampler, ("sr",))
    outputs = {}
    for key, x in case.inputs.items():
        maps, state = apply(variables, _last(x))
        result = maps["output"]
        suffix = key[1:]
        for name, y in zip(names, result if isinstance(result, tuple) else (result,)):
            outputs[f"{name}{suffix}"] = _first(y)
        if suffix:
            continue
        captured = state["intermediates"]["layers.0"]
        tokens = lambda y: np.asarray(y).reshape(y.shape[0], -1, y.shape[-1])  # noqa: E731
        blocks = [f"residual_group.blocks.{j}" for j in range(module.depths[0])]
        outputs["mid.attn0"] = np.asarray(captured[blocks[0]]["attn"]["__call__"][0]).reshape(
            -1, module.block_window**2, module.embed_dim
        )
        for j, block in enumerate(blocks):
            outputs[f"mid.block{j}"] = tokens(captured[block]["__call__"][0])
        for i in range(len(module.depths)):
            outputs[f"mid.rstb{i}"] = tokens(maps[f"layers.{i}"])
        outputs["mid.conv_first"] = _first(maps["conv_first"])
        outputs["mid.patch_embed"] = tokens(maps["patch_embed"])
        outputs["mid.body"] = _first(maps["conv_after_body"])
    return outputs


def _basicvsrpp(case):
    config = _arguments(case)
    hr, step = config.pop("hr_stride", 1), config.pop("feat_stride", 1)
    module, variables = jaxmodels.load("restoration.basicvsrpp", case.weights, **config)
    maps = jax.jit(functools.partial(module.apply, method="intermediates"))(
        variables, _last(case.inputs["lqs"])
    )
    maps = {name: _first(y) for name, y in maps.items()}
    y = maps["output"]
    outputs = {
        "flows_backward": maps["flows_backward"],
        "flows_forward": maps["flows_forward"],
        "hr": y,
        "hr_strided": y[..., ::hr, ::hr],
        "hr_corner": y[..., :24, -24:],
        "hr_frame_mean": y.mean((-3, -2, -1)),
        "hr_frame_std": y.std((-3, -2, -1)),
    }
    for direction in ("backward_1", "forward_1", "backward_2", "forward_2"):
        outputs[f"feat.{direction}"] = maps[direction][..., ::step, ::step]
    return outputs


def _ivl(case):
    module, variables = jaxmodels.load("restoration.ivl", case.weights, **case.config)
    maps = jax.jit(functools.partial(module.apply, method="intermediates"))(
        variables, _last(case.inputs["x"])
    )
    return {"fused": _first(maps["fused"])[..., ::3, ::3], "y": _first(maps["output"])}


def _spynet(case):
    outputs = {}
    if "ref" in case.inputs:
        module, variables = jaxmodels.load("restoration.spynet", case.weights, **case.config)
        flow = jax.jit(module.apply)(
            variables, _last(case.inputs["ref"]), _last(case.inputs["supp"])
        )
        outputs["flow"] = _first(flow)
    if "feat" in case.inputs:
        for border in ("zeros", "border"):
            warped = resampling.flow_warp(
                _last(case.inputs["feat"]), jnp.asarray(case.inputs["flow"]), border
            )
            outputs[f"warp.{border}"] = _first(warped)
    return outputs


def _deform_conv(case):
    names = ("stride", "padding", "dilation", "groups", "deform_groups")
    config = {k: v for k, v in case.config.items() if k in names}
    x, offset = (_last(case.inputs[name]) for name in ("x", "offset"))
    mask = _last(case.inputs["mask"]) if "mask" in case.inputs else None
    kernel = jnp.asarray(np.transpose(case.inputs["weight"], (2, 3, 1, 0)))
    bias = case.inputs.get("bias")
    apply = jax.jit(functools.partial(modulated_deform_conv2d, **config))
    zero = apply(x, jnp.zeros_like(offset), None, kernel, bias)
    return {
        "y": _first(apply(x, offset, mask, kernel, bias)),
        "y_zero_offset_mask1": _first(zero),
    }


def _metrics(case):
    functions = {"psnr": metrics.psnr, "ssim": metrics.ssim, "psnrb": metrics.psnr_b}
    outputs = {}
    for wanted in case.wanted:
        name, _, metric = wanted.rpartition(".")
        match = re.fullmatch(r"(psnrb|psnr|ssim)(_y)?(?:_crop(\d+))?", metric)
        if match is not None:
            pair = (case.inputs[f"{name}.img1"], case.inputs[f"{name}.img2"])
            # One channel is its own luma.
            luma = bool(match[2]) and pair[0].shape[2:] == (3,)
            value = functions[match[1]](*pair, int(match[3] or 0), y_channel=luma)
            outputs[wanted] = np.float64(value)
    return outputs


_PARTS = {"half": 0.5, "quarter": 0.25}


def _resize(case):
    from train.data import degradation

    outputs = {}
    for wanted in case.wanted:
        match = re.fullmatch(r"(bilinear|bicubic|nearest)_(?:x(\d+)|(half|quarter))(_ac)?", wanted)
        if match is None:
            continue
        method, times, part, corners = match.groups()
        scale = int(times) if times else _PARTS[part]
        x = _last(case.inputs["x" if times or "x16" not in case.inputs else "x16"])
        if method == "nearest" and times:
            outputs[wanted] = _first(resampling.nearest_upsample(x, int(times)))
            continue
        size = tuple(int(n * scale) for n in x.shape[1:3])
        resized = resampling.resize(x, size, method, align_corners=bool(corners), scale=scale)
        outputs[wanted] = _first(resized)
    if "hr_u8" in case.inputs:
        small = degradation.downsample(case.inputs["hr_u8"])
        quality = case.config.get("quality", degradation.JPEG_QUALITY)
        encoded = degradation.jpeg_bytes(small, quality)
        tables = degradation.quantization_tables(encoded)
        outputs |= {
            "pillow_bicubic_u8": small,
            **dict(zip(("qt_luma", "qt_chroma"), tables)),
            "jpeg_u8": degradation.jpeg(small, quality),
            "jpeg_bytes": np.int64(len(encoded)),
        }
    return outputs


def tolerances(case) -> dict[str, dict[str, float]]:
    """What the notes allow: Pillow's rounding, and other builds of libjpeg."""
    if "hr_u8" not in case.inputs:
        return {}
    return {
        "out.pillow_bicubic_u8": {"atol": 1, "rtol": 0},
        "out.jpeg_u8": {"mean_atol": 1.5},
        "out.jpeg_bytes": {"atol": 0, "rtol": 0.1},
    }


def _losses(case):
    outputs = {}
    if "pred" in case.inputs:
        pair = (jnp.asarray(case.inputs["pred"]), jnp.asarray(case.inputs["target"]))
        outputs = {
            "l1": losses.l1_loss(*pair),
            "charbonnier_kair": losses.charbonnier_loss(*pair, losses.CHARBONNIER_KAIR),
            "charbonnier_basicvsr": losses.charbonnier_loss(*pair, losses.CHARBONNIER_BASICVSR),
        }
    if "img" in case.inputs:
        for mode in range(len(inference.AUGMENTATIONS)):
            outputs[f"aug.{mode}"] = inference.augment(case.inputs["img"], mode)
    return outputs
