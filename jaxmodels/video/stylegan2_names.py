"""Names of StyleGAN2 checkpoints: rosinality's, NVlabs's, and files that hold encoder and decoder.

rosinality/stylegan2-pytorch@bef283a (`model.py`) and the pSp and e4e files, whose generator stands
below `decoder.`, number what NVlabs/stylegan2-ada-pytorch@d72cc7d (`training/networks.py`) names.
Convolutions have the same orientation in both; the kernels of rosinality's up-sampling blurs are
buffers already multiplied by 4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

WRAPPERS = ("decoder.", "g_ema.", "generator.", "G_ema.", "D.", "discriminator.")
# Where a rosinality file has no mean latent it is the mean of this many mapped normal samples.
MEAN_SAMPLES = 4096


def naming_of(keys: Iterable[str]) -> str:
    """One of nvlabs, rosinality, unknown."""
    keys = set(keys)
    if any(re.match(r"(mapping\.fc0|synthesis\.b4|b4\.fc)\.", k) for k in keys):
        return "nvlabs"
    if any(re.match(r"(style\.1|input\.input|to_rgb1|final_conv|final_linear)\b", k) for k in keys):
        return "rosinality"
    return "unknown"


def _unwrapped(keys: Iterable[str]) -> dict[str, str]:
    """{key without its wrapper: key}; what stands beside the wrapper is left out."""
    keys = list(keys)
    if naming_of(keys) != "unknown":
        return {k: k for k in keys}
    for wrapper in WRAPPERS:
        inner = {k[len(wrapper) :]: k for k in keys if k.startswith(wrapper)}
        if naming_of(inner) != "unknown":
            return inner | {k: k for k in keys if k == "latent_avg"}
    return {k: k for k in keys}


def check(keys: Iterable[str], module: Any) -> None:
    """Raise ValueError for a naming that is neither, with the first names the module wants."""
    names = _unwrapped(keys)
    if naming_of(names) != "unknown":
        return
    wanted = [theirs for _, theirs in pairs(module)][:3]
    found = ", ".join(sorted(names)[:3]) or "nothing"
    if any(k.startswith(("input_layer.", "body.", "encoder.input_layer.")) for k in names):
        found = f"an IR-SE encoder ({found})"
    elif any(k.startswith(("G_synthesis", "G_mapping")) for k in names):
        found = f"TensorFlow names ({found})"
    raise ValueError(
        f"the checkpoint has names of neither StyleGAN2 code, but {found}; NVlabs's begin with "
        f"{wanted[0]}, rosinality's with {pairs(module)[0][0]}; first missing: {', '.join(wanted)}"
    )


def pairs(module: Any) -> list[tuple[str, str]]:
    """[(rosinality's name, NVlabs's name)] of every weight of a generator or discriminator."""
    return _generator(module) if _is_generator(module) else _discriminator(module)


def _is_generator(module: Any) -> bool:
    return hasattr(module, "z_dim")


def _generator(module) -> list[tuple[str, str]]:
    table = []
    for i in range(module.mapping_layers):
        table += [(f"style.{i + 1}.{leaf}", f"mapping.fc{i}.{leaf}") for leaf in ("weight", "bias")]
    table.append(("latent_avg", "mapping.w_avg"))
    table.append(("input.input", "synthesis.b4.const"))

    def conv(theirs: str, ours: str, noise: int) -> None:
        table.extend(
            [
                (f"{theirs}.conv.weight", f"{ours}.weight"),
                (f"{theirs}.conv.modulation.weight", f"{ours}.affine.weight"),
                (f"{theirs}.conv.modulation.bias", f"{ours}.affine.bias"),
                (f"{theirs}.noise.weight", f"{ours}.noise_strength"),
                (f"{theirs}.activate.bias", f"{ours}.bias"),
                (f"noises.noise_{noise}", f"{ours}.noise_const"),
            ]
        )

    def rgb(theirs: str, ours: str) -> None:
        table.extend(
            [
                (f"{theirs}.conv.weight", f"{ours}.weight"),
                (f"{theirs}.conv.modulation.weight", f"{ours}.affine.weight"),
                (f"{theirs}.conv.modulation.bias", f"{ours}.affine.bias"),
                (f"{theirs}.bias", f"{ours}.bias"),
            ]
        )

    conv("conv1", "synthesis.b4.conv1", 0)
    rgb("to_rgb1", "synthesis.b4.torgb")
    for b in range(int(math.log2(module.img_resolution)) - 2):
        block = f"synthesis.b{8 * 2**b}"
        conv(f"convs.{2 * b}", f"{block}.conv0", 2 * b + 1)
        conv(f"convs.{2 * b + 1}", f"{block}.conv1", 2 * b + 2)
        rgb(f"to_rgbs.{b}", f"{block}.torgb")
    return table


def _discriminator(module) -> list[tuple[str, str]]:
    size = module.img_resolution
    table = [
        ("convs.0.0.weight", f"b{size}.fromrgb.weight"),
        ("convs.0.1.bias", f"b{size}.fromrgb.bias"),
    ]
    for k in range(1, int(math.log2(size)) - 1):
        block = f"b{size // 2 ** (k - 1)}"
        table += [
            (f"convs.{k}.conv1.0.weight", f"{block}.conv0.weight"),
            (f"convs.{k}.conv1.1.bias", f"{block}.conv0.bias"),
            (f"convs.{k}.conv2.1.weight", f"{block}.conv1.weight"),
            (f"convs.{k}.conv2.2.bias", f"{block}.conv1.bias"),
            (f"convs.{k}.skip.1.weight", f"{block}.skip.weight"),
        ]
    table += [
        ("final_conv.0.weight", "b4.conv.weight"),
        ("final_conv.1.bias", "b4.conv.bias"),
        ("final_linear.0.weight", "b4.fc.weight"),
        ("final_linear.0.bias", "b4.fc.bias"),
        ("final_linear.1.weight", "b4.out.weight"),
        ("final_linear.1.bias", "b4.out.bias"),
    ]
    return table


def filter_keys(module: Any) -> list[str]:
    """NVlabs's names of the resampling filters, which every up- or down-sampling child carries."""
    blocks = [4 * 2**b for b in range(int(math.log2(module.img_resolution)) - 1)]
    if _is_generator(module):
        keys = []
        for r in blocks:
            convs = ("conv1",) if r == 4 else ("conv0", "conv1")
            convs += ("skip",) if r > 4 and module.architecture == "resnet" else ()
            keys += [f"synthesis.b{r}.resample_filter"]
            keys += [f"synthesis.b{r}.{conv}.resample_filter" for conv in convs]
        return keys
    reads_image = module.architecture == "skip"
    keys = ["b4.conv.resample_filter"] + ["b4.fromrgb.resample_filter"] * reads_image
    for r in blocks[1:]:
        children = ("conv0", "conv1") + (("skip",) if module.architecture == "resnet" else ())
        children += ("fromrgb",) if reads_image or r == blocks[-1] else ()
        keys += [f"b{r}.resample_filter", *(f"b{r}.{c}.resample_filter" for c in children)]
    return keys


def to_nvlabs(state: Mapping[str, np.ndarray], module: Any) -> dict[str, np.ndarray]:
    """A state dict with NVlabs's names and shapes, from either naming; filters are left as found.

    A generator without a mean latent gets that of 4096 mapped samples (seed 0), as rosinality's
    `mean_latent` computes it.
    """
    names = _unwrapped(state)
    state = {name: np.asarray(state[key]) for name, key in names.items()}
    if naming_of(state) == "rosinality":
        table = dict(pairs(module))
        new = {}
        for key, value in state.items():
            if key in table:
                new[table[key]] = _their_shape(table[key], value)
            elif not key.endswith(".kernel"):
                new[key] = value  # the loader names it as unexpected
        state = new
    else:
        state.pop("latent_avg", None)
    # Without labels there is no mean of conditional latents.
    if _is_generator(module) and not module.c_dim and "mapping.w_avg" not in state:
        if f"mapping.fc{module.mapping_layers - 1}.weight" in state:
            state["mapping.w_avg"] = _mean_latent(state, module)
    return state


def _their_shape(name: str, value: np.ndarray) -> np.ndarray:
    if name.endswith("noise_strength"):
        return value.reshape(())
    if name.endswith("noise_const"):
        return value.reshape(value.shape[-2:])
    if name.endswith("w_avg"):
        # pSp's decoders keep one mean for every layer, all of them equal.
        return value.reshape(-1, value.shape[-1])[0]
    if name == "synthesis.b4.const":
        return value.reshape(value.shape[-3:])
    if name.endswith("torgb.bias"):
        return value.reshape(-1)
    if value.ndim == 5:
        return value[0]
    return value


def _mean_latent(state: Mapping[str, np.ndarray], module) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((MEAN_SAMPLES, module.z_dim)).astype(np.float32)
    x = x / np.sqrt(np.mean(x * x, 1, keepdims=True) + 1e-8)
    for i in range(module.mapping_layers):
        weight, bias = (np.asarray(state[f"mapping.fc{i}.{n}"]) for n in ("weight", "bias"))
        x = x @ (weight.T * (module.lr_multiplier / math.sqrt(weight.shape[1])))
        x = x + bias * module.lr_multiplier
        x = np.where(x < 0, 0.2 * x, x) * np.float32(math.sqrt(2))
    return x.mean(0).astype(np.float32)


def to_rosinality(state: Mapping[str, np.ndarray], module: Any) -> dict[str, np.ndarray]:
    """rosinality's state dict from NVlabs's (`jaxmodels.export`), with its blur kernels.

    A generator's mean latent stands under `latent_avg`, which rosinality's files keep beside
    `g_ema`: take it out before `load_state_dict`. Raises ValueError for networks that the code does
    not have.
    """
    from jaxmodels.video.upfirdn import setup_filter

    if module.c_dim or module.architecture != ("skip" if _is_generator(module) else "resnet"):
        raise ValueError(
            "rosinality's code has neither labels nor other architectures than skip (generator) "
            f"and resnet (discriminator); got c_dim {module.c_dim}, {module.architecture}"
        )

    new: dict[str, np.ndarray] = {}
    for theirs, ours in pairs(module):
        value = np.asarray(state[ours])
        if ours.endswith("noise_strength"):
            value = value.reshape(1)
        elif ours.endswith(("noise_const", ".const")):
            value = value.reshape(*(1,) * (4 - value.ndim), *value.shape)
        elif ours.endswith("torgb.bias"):
            value = value.reshape(1, -1, 1, 1)
        elif theirs.endswith(".conv.weight"):
            value = value[None]
        new[theirs] = value
    f = setup_filter(module.resample_filter)
    levels = int(math.log2(module.img_resolution)) - 2
    if _is_generator(module):
        image = f if module.image_filter is None else setup_filter(module.image_filter)
        for b in range(levels):
            new[f"convs.{2 * b}.conv.blur.kernel"] = f * 4
            new[f"to_rgbs.{b}.upsample.kernel"] = image * 4
    else:
        for k in range(1, levels + 1):
            new[f"convs.{k}.conv2.0.kernel"] = f
            new[f"convs.{k}.skip.0.kernel"] = f
    return new
