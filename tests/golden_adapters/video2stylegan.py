"""StyleGAN2, its encoders, critics and mesh: argument names to ours, NCHW to NHWC and back."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmodels
from jaxmodels.interop import checkpoint
from jaxmodels.interop.conversion import to_torch
from jaxmodels.video import face_mesh, latent_editing, stylegan2_losses
from jaxmodels.video import upfirdn as ufd
from jaxmodels.video.landmarks import decode_heat_maps
from jaxmodels.video.lpips import LPIPS
from jaxmodels.video.style_encoders import at_stage
from jaxmodels.video.stylegan2_layers import modulated_conv2d
from jaxmodels.video.vit import ViT
from jaxmodels.vision import ir_se
from tests.golden_case import GoldenCase


def run(case: GoldenCase) -> dict[str, Any]:
    """Every wanted output of one case, in PyTorch's layouts."""
    inputs = case.inputs
    if "rotmats" in case.outputs or "lbs_weights" in inputs:
        return _mesh(case)
    if "n0" in inputs or "latents" in inputs:
        return _editing(case)
    if case.model.startswith("modulated_conv2d"):
        return _modulated(case)
    if case.model.startswith("upfirdn2d"):
        return _upfirdn(case)
    if case.model.startswith("path-length"):
        return _path_length(case)
    if case.model.startswith("Generator"):
        return _generator(case)
    if case.model.startswith("Discriminator"):
        return _discriminator(case)
    if case.model.startswith(("GradualStyleEncoder", "Encoder4Editing")):
        return _style_encoder(case)
    if case.model.startswith("Backbone"):
        return _identity(case)
    if case.model.startswith("LPIPS"):
        return _lpips(case)
    if case.model.startswith("FAN"):
        return _fan(case)
    if case.model.startswith("ViT"):
        return _vit(case)
    if case.model.startswith("TransformerDecoderLayer"):
        return _query_decoder(case)
    if case.model.startswith("LatentCodesDiscriminator"):
        return _latent_discriminator(case)
    raise ValueError(f"{case.id}: no part of video2stylegan is called {case.model!r}")


def _nhwc(x) -> jax.Array:
    return jnp.asarray(np.transpose(x, (0, 2, 3, 1)))


def _nchw(x) -> np.ndarray:
    return np.transpose(np.asarray(x), (0, 3, 1, 2))


def _image(case: GoldenCase, name: str) -> jax.Array:
    """An image input, stored as floats or as bytes that stand for byte / 127.5 - 1."""
    if name in case.inputs:
        return _nhwc(case.inputs[name])
    return _nhwc(case.inputs[f"{name}_u8"]).astype(jnp.float32) / 127.5 - 1


def _pair(value):
    return tuple(value) if isinstance(value, list) else value


# StyleGAN2.


# NVlabs's names of the mapping network's options to ours.
MAPPING_OPTIONS = {"num_layers": "mapping_layers", "layer_features": "mapping_features"}


def _generator_arguments(config: dict[str, Any]) -> dict[str, Any]:
    if "img_resolution" not in config:  # rosinality's constructor
        names = {"size": "img_resolution", "style_dim": "w_dim", "n_mlp": "mapping_layers"}
        names |= {"lr_mlp": "lr_multiplier", "blur_kernel": "resample_filter"}
        arguments = {names.get(k, k): v for k, v in config.items() if k != "channel_multiplier"}
        arguments.setdefault("z_dim", arguments.get("w_dim", 512))
        arguments |= _channel_base(config)
        if "blur_kernel" in config:  # the running image's stays the default one there
            arguments["image_filter"] = ufd.BINOMIAL
    else:
        synthesis = dict(config.get("synthesis_kwargs", {}))
        arguments = {
            **{k: config[k] for k in ("z_dim", "c_dim", "w_dim", "img_resolution") if k in config},
            "img_channels": config.get("img_channels", 3),
            **{MAPPING_OPTIONS.get(k, k): v for k, v in config.get("mapping_kwargs", {}).items()},
            **synthesis,
        }
        # Values that are ours without saying so, or that float32 never sees.
        if arguments.get("activation") == "lrelu":
            del arguments["activation"]
        for key in ("num_fp16_res", "fp16_channels_last", "fused_modconv"):
            arguments.pop(key, None)
    if "resample_filter" in arguments:
        arguments["resample_filter"] = tuple(arguments["resample_filter"])
    return arguments


def _channel_base(config: dict[str, Any]) -> dict[str, Any]:
    """rosinality's table: 512 maps up to 32 pixels, then multiplier * 16384 / resolution."""
    multiplier = config.get("channel_multiplier")
    return {} if multiplier is None else {"channel_base": 16384 * multiplier}


def _load_generator(case: GoldenCase):
    state = dict(checkpoint.read(case.weights).tensors)
    if "latent_avg" in case.inputs:
        state["latent_avg"] = case.inputs["latent_avg"]
    return jaxmodels.load("video.stylegan2", state, **_generator_arguments(case.config))


def _generator(case: GoldenCase) -> dict[str, Any]:
    module, variables = _load_generator(case)
    given = case.inputs
    z = jnp.asarray(given.get("z", np.zeros((1, module.z_dim), np.float32)))
    z2 = jnp.asarray(given.get("z2", z))
    ws = jnp.asarray(given.get("ws", np.zeros((1, module.num_latents, module.w_dim), z.dtype)))
    labels = {"c": jnp.asarray(given["c"])} if module.c_dim and "c" in given else {}
    names = [n for n in case.wanted if "psi" in n or "mix" in n]

    def apply(variables, *args, method=None, **kwargs):
        return module.apply(variables, *args, method=method, **kwargs)

    def latents(variables, name, z, z2):
        """W+ of a name such as `img_psi0.7`, `ws_psi0.6_cutoff3`, `latent_mix3`."""
        parts = name.split("_")[1:]
        psi = next((float(p[3:]) for p in parts if p.startswith("psi")), 1.0)
        cutoff = next((int(p[6:]) for p in parts if p.startswith("cutoff")), None)
        mix = next((int(p[3:]) for p in parts if p.startswith("mix")), None)
        other = {} if mix is None else {"z2": z2, "mixing_index": mix}
        return apply(variables, z, psi, cutoff, **other, **labels, method="map_latents")

    @jax.jit
    def compute(variables, z, z2, ws):
        found = {"w_from_z": apply(variables, z, method="to_w", **labels)}
        found["img_const"] = apply(variables, z, **labels)
        if "img_none" in case.wanted:
            found["img_none"] = apply(variables, z, noise_mode="none", **labels)
        maps = apply(variables, ws, method="intermediates")
        found["img_wplus"] = maps["image"]
        found |= {f"wplus.{k}": v for k, v in maps.items() if k != "image"}
        for name in names:
            codes = latents(variables, name, z, z2)
            if name.startswith("img"):
                found[name] = apply(variables, codes, method="synthesize")
            else:
                found[name] = codes[:, 0] if name.startswith("w_") else codes
        return found

    found = compute(variables, z, z2, ws)
    return {k: _nchw(v) if v.ndim == 4 else v for k, v in found.items() if k in case.wanted}


def _discriminator(case: GoldenCase) -> dict[str, Any]:
    config = dict(case.config)
    if "img_resolution" not in config:
        # The official residual blocks do not pass the blur kernel on: the default is used.
        ignored = ("channel_multiplier", "blur_kernel")
        names = {"size": "img_resolution"}
        arguments = {names.get(k, k): v for k, v in config.items() if k not in ignored}
        arguments |= _channel_base(config)
    else:
        names = ("img_resolution", "img_channels", "channel_base", "channel_max", "conv_clamp")
        names += ("architecture", "c_dim", "cmap_dim")
        arguments = {k: config[k] for k in names if k in config}
        arguments |= config.get("epilogue_kwargs", {})
        arguments |= {
            MAPPING_OPTIONS.get(k, k): v for k, v in config.get("mapping_kwargs", {}).items()
        }
        if arguments.get("activation") == "lrelu":
            del arguments["activation"]
        filter_ = config.get("block_kwargs", {}).get("resample_filter")
        arguments |= {} if filter_ is None else {"resample_filter": filter_}
    if "resample_filter" in arguments:
        arguments["resample_filter"] = tuple(arguments["resample_filter"])
    module, variables = jaxmodels.load("video.stylegan2:Discriminator", case.weights, **arguments)
    extra = {k: v for k, v in variables.items() if k != "params"}
    image = _nhwc(case.inputs["img"])
    labels = {"c": jnp.asarray(case.inputs["c"])} if module.c_dim else {}

    @jax.jit
    def compute(params, image):
        def logits(params, x):
            return module.apply({"params": params, **extra}, x, **labels)

        def penalty(params):
            squares, _ = stylegan2_losses.r1_penalty(functools.partial(logits, params), image)
            return squares.mean(), squares

        (_, squares), grads = jax.value_and_grad(penalty, has_aux=True)(params)
        found = logits(params, image)
        centered = found - found.mean()
        return {
            "logits": found,
            "grad_img": jax.grad(lambda x: logits(params, x).sum())(image),
            "r1_per_sample": squares,
            "loss_d_fake": stylegan2_losses.generator_loss(-centered),
            "loss_g": stylegan2_losses.generator_loss(centered),
        }, grads

    found, grads = compute(variables["params"], image)
    found["grad_img"] = _nchw(found["grad_img"])
    by_name = to_torch({"params": grads})
    first = f"b{module.img_resolution}.conv0.weight"
    found["d_r1_d_conv0"] = by_name[first]
    rows = len(case.outputs["d_r1_d_fc"]) if "d_r1_d_fc" in case.outputs else 0
    found["d_r1_d_fc"] = by_name["b4.fc.weight"][:rows]
    return found


def _path_length(case: GoldenCase) -> dict[str, Any]:
    module, variables = _load_generator(case)
    extra = {k: v for k, v in variables.items() if k != "params"}
    ws, y = jnp.asarray(case.inputs["ws"]), _nhwc(case.inputs["y"])

    @jax.jit
    def compute(params):
        def penalty(params):
            def synthesis(ws):
                return module.apply({"params": params, **extra}, ws, method="synthesize")

            lengths, grad = stylegan2_losses.path_lengths(synthesis, ws, y)
            start = jnp.float32(case.config.get("pl_mean", 0.5))
            decay = case.config.get("pl_decay", 0.01)
            values, mean = stylegan2_losses.path_length_penalty(lengths, start, decay)
            found = {"grad_ws": grad, "lengths": lengths, "pl_mean_new": mean, "penalty": values}
            return values.mean(), found

        (_, found), grads = jax.value_and_grad(penalty, has_aux=True)(params)
        return found, grads

    found, grads = compute(variables["params"])
    by_name = to_torch({"params": grads})
    for name in case.wanted:
        if name.startswith("grad_b"):
            *block, leaf = name.removeprefix("grad_").split("_")
            found[name] = by_name[f"synthesis.{'.'.join(block)}.{leaf}"]
    return found


def _upfirdn(case: GoldenCase) -> dict[str, Any]:
    images = {k: _nhwc(v) for k, v in case.inputs.items() if k.endswith(".x")}

    @jax.jit
    def compute(images):
        found = {}
        for key in images:
            name = key.removesuffix(".x")
            if name == "fir4":
                continue
            arguments = {k: _pair(v) for k, v in case.config.get(name, {}).items()}
            f = case.inputs.get(f"{name}.f")
            found[f"{name}.y"] = ufd.upfirdn2d(images[f"{name}.x"], f, **arguments)
        if "fir4.x" in images:
            x, f = images["fir4.x"], ufd.setup_filter(ufd.BINOMIAL)
            found["fir4.up"] = ufd.upsample2d(x, f)
            found["fir4.down"] = ufd.downsample2d(x, f)
            found["fir4.same"] = ufd.filter2d(x, f)
        return found

    found = {k: _nchw(v) for k, v in compute(images).items()}
    return {**found, "fir4.kernel": ufd.setup_filter(ufd.BINOMIAL)}


def _noise(noise):
    """Noise [B, H, W, 1], or one map [H, W] for all samples."""
    return noise[None, :, :, None] if noise is not None and noise.ndim == 2 else noise


def _modulated(case: GoldenCase) -> dict[str, Any]:
    inputs = {k: _nhwc(v) if v.ndim == 4 else v for k, v in case.inputs.items()}

    @jax.jit
    def compute(inputs):
        found = {}
        for name in (key.removesuffix(".x") for key in inputs if key.endswith(".x")):
            config = case.config.get(name, {})
            # [O, I, k, k] went to [O, k, k, I] with the images.
            kernel = jnp.transpose(inputs[f"{name}.weight"], (1, 2, 3, 0))
            arguments = {k: config[k] for k in ("up", "down", "demodulate") if k in config}
            if "resample_filter" in config:
                arguments["f"] = ufd.setup_filter(config["resample_filter"])
            found[f"{name}.y"] = modulated_conv2d(
                inputs[f"{name}.x"],
                kernel,
                inputs[f"{name}.styles"],
                noise=_noise(inputs.get(f"{name}.noise")),
                **arguments,
            )
        return found

    return {k: _nchw(v) for k, v in compute(inputs).items()}


# Encoders and critics.


def _style_encoder(case: GoldenCase) -> dict[str, Any]:
    name = "video.style_encoders:" + case.model
    module, variables = jaxmodels.load(name, case.weights, **case.config)
    x = _image(case, "x")
    stages = sorted(int(n.removeprefix("w_stage")) for n in case.wanted if "stage" in n)

    maps = jax.jit(functools.partial(module.apply, method="intermediates"))(variables, x)
    found: dict[str, Any] = {"w": maps["w"]}
    found |= {f"w_stage{s}": at_stage(maps["w"], s) for s in stages}
    for key in case.wanted:
        if key.startswith("body"):
            step = maps[key].shape[1] // case.outputs[key].shape[2]
            found[key] = _nchw(maps[key][:, ::step, ::step])
    return found


def _identity(case: GoldenCase) -> dict[str, Any]:
    module, variables = jaxmodels.load("vision.ir_se", case.weights, **case.config)

    def embed(variables, images):
        if images.shape[1:3] == (256, 256):
            return ir_se.embed_faces(module, variables, images)
        # The official loss cuts these rows and columns out of images of any size.
        rows, columns = slice(*ir_se.CROP_ROWS), slice(*ir_se.CROP_COLUMNS)
        faces = ir_se.adaptive_average_pool(images[:, rows, columns], ir_se.ID_SIZE)
        return module.apply(variables, faces)

    @jax.jit
    def compute(variables, y_hat, y):
        a, b = (embed(variables, x) for x in (y_hat, y))
        return {"emb_y_hat": a, "emb_y": b, "id_loss": ir_se.identity_loss(a, b)}

    return compute(variables, _image(case, "y_hat"), _image(case, "y"))


def _lpips(case: GoldenCase) -> dict[str, Any]:
    config = {k: v for k, v in case.config.items() if k in LPIPS.__dataclass_fields__}
    if config.get("net") == "vgg16":  # the official code has two names for it
        config["net"] = "vgg"
    module, variables = jaxmodels.load("video.lpips", case.weights, **config)
    x, y = _image(case, "x"), _image(case, "y")

    @jax.jit
    def compute(variables, x, y):
        found = {
            f"layer{k}": v for k, v in enumerate(module.apply(variables, x, y, method="layers"))
        }
        found["lpips"] = module.apply(variables, x, y)
        found["lpips_same"] = module.apply(variables, x, x)
        found["lpips_01"] = module.apply(variables, (x + 1) / 2, (y + 1) / 2, normalize=True)
        return found

    found = compute(variables, x, y)
    return {
        k: np.asarray(v).reshape(case.outputs[k].shape)
        for k, v in found.items()
        if k in case.wanted
    }


def _fan(case: GoldenCase) -> dict[str, Any]:
    module, variables = jaxmodels.load("video.landmarks", case.weights, **case.config)
    maps = jax.jit(module.apply)(variables, _image(case, "x"))
    found = {f"heat{i}": _nchw(heat) for i, heat in enumerate(maps)}
    found["landmarks"] = decode_heat_maps(maps[-1])
    return found


def _vit(case: GoldenCase) -> dict[str, Any]:
    fields = ViT.__dataclass_fields__
    config = {k: v for k, v in case.config.items() if k in fields}
    module, variables = jaxmodels.load("video.vit", case.weights, **config)
    apply = jax.jit(functools.partial(module.apply, method="intermediates"))
    return apply(variables, _image(case, "x"))


def _query_decoder(case: GoldenCase) -> dict[str, Any]:
    config = {k: v for k, v in case.config.items() if k != "layers"}
    module, variables = jaxmodels.load("video.query_decoder", case.weights, **config)
    names = ("query", "memory_coarse", "memory_medium", "memory_fine", "query_pos")
    arrays = [jnp.swapaxes(jnp.asarray(case.inputs[k]), 0, 1) for k in names if k in case.inputs]
    found = jax.jit(module.apply)(variables, *arrays)
    return {f"out_{k}": jnp.swapaxes(v, 0, 1) for k, v in found.items()}


def _latent_discriminator(case: GoldenCase) -> dict[str, Any]:
    name = "video.style_encoders:LatentCodesDiscriminator"
    module, variables = jaxmodels.load(name, case.weights, **case.config)
    return {"logits": module.apply(variables, jnp.asarray(case.inputs["w"]))}


# Mesh and latent arithmetic.


def _mesh(case: GoldenCase) -> dict[str, Any]:
    data = {k: jnp.asarray(v) for k, v in case.inputs.items() if k != "parents"}
    basis = ("v_template", "shapedirs", "posedirs", "J_regressor", "lbs_weights", "faces")
    model = face_mesh.FaceModel(
        **{k: data.get(k) for k in (*basis, "lmk_faces_idx", "lmk_bary")},
        parents=tuple(int(p) for p in case.inputs["parents"]),
        shape_size=data["betas"].shape[1],
    )
    sizes = [n.removeprefix("landmarks_px") for n in case.wanted if n.startswith("landmarks_px")]

    def compute(data):
        skinned = face_mesh.linear_blend_skinning(model, data["betas"], data["pose"])
        found = {
            "vertices": skinned.vertices,
            "joints": skinned.joints,
            "rotmats": face_mesh.rodrigues(data["pose"].reshape(-1, 3)),
        }
        if "lmk_bary" in data:
            found["landmarks"] = face_mesh.vertices_to_landmarks(
                skinned.vertices, model.faces, model.lmk_faces_idx, model.lmk_bary
            )
            if "cam" in data:
                projected = face_mesh.project(found["landmarks"], data["cam"])
                found["landmarks_proj"] = projected
                for size in sizes:
                    found[f"landmarks_px{size}"] = face_mesh.to_pixels(projected, int(size))
        return found

    return jax.jit(compute)(data)


def _editing(case: GoldenCase) -> dict[str, Any]:
    wanted = case.wanted

    @jax.jit
    def compute(data):
        found = {}
        for name in wanted:
            if name.startswith("proj"):
                conditions = [data[f"n{i}"] for i in range(1, int(name[4:]) + 1)]
                found[name] = latent_editing.project_boundary(data["n0"], *conditions)
            elif name.startswith("interp_"):
                config = dict(case.config[name])
                direction = data[config.pop("direction")]
                code = data[name.removeprefix("interp_")]
                found[name] = latent_editing.linear_interpolate(code, direction, **config)
        if "latents" in data:
            codes = data["latents"]
            found["w_norm"] = latent_editing.latent_norm(codes, data.get("latent_avg"))
            found["delta_loss"] = latent_editing.delta_loss(codes)
        return found

    return compute(case.inputs)
