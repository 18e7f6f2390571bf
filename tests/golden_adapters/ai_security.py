"""The security contest's cases: names and layouts to ours and back."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmodels
from jaxmodels.interop import checkpoint
from jaxmodels.interop.conversion import to_torch
from jaxmodels.security import attacks, attribution, margin_losses, patches
from jaxmodels.security.input_transforms import gaussian_kernel
from tests.golden_case import adapter_of

NETWORKS = {
    "IResNet": "vision.iresnet",
    "Xception": "vision.xception",
    "EfficientNet": "vision.efficientnet",
}
FACE_METHODS = {"FGSM": "fgsm", "BIM": "bim", "MIM": "mi", "TIM": "ti"}


def run(case) -> dict[str, Any]:
    """Every wanted output of one case, in PyTorch's layouts."""
    if case.model in NETWORKS:
        return _network(case)
    if case.model == "TinyConvClassifier":
        return adapter_of("mhui").attacked(case)
    if case.model == "TinyConvEmbedder":
        return _face_attacks(case)
    if case.model.startswith("ArcFace"):
        return _margins(case)
    if case.model.startswith("CPL"):
        return _attribution(case)
    return _patch(case)


def _network(case) -> dict[str, Any]:
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in case.config.items()}
    name = NETWORKS[case.model]
    if case.model == "EfficientNet":
        name = f"{name}:{arguments.pop('variant')}"
        arguments |= arguments.pop("channels", {})
    if arguments.get("mode", "").startswith("adjust_channel"):
        width = checkpoint.read(case.weights).tensors["adjust_channel.0.weight"].shape[0]
        arguments.setdefault("adjusted_channels", width)
    train = case.mode == "train"
    if train:
        arguments.setdefault("dropout", 0.0)  # as every official constructor has it
    module, variables = jaxmodels.load(name, case.weights, **arguments)
    x = _nhwc(case.inputs["images"])
    forward = functools.partial(
        module.apply, train=train, method="intermediates", mutable=["batch_stats"]
    )
    maps, updated = jax.jit(forward)(variables, x)
    out = {f"after.{k}": v for k, v in to_torch(dict(updated)).items()}
    for name, y in maps.items():
        flat = name.replace(".", "")
        out |= {flat: y, f"{flat}_map": y}
        if y.ndim == 4:
            out |= {flat: _nchw(y), f"{flat}_map": _nchw(y), f"{flat}_mean": y.mean((1, 2))}
    if case.model == "IResNet":
        out["stem"] = out["stem"][:, :, ::16, ::16]
        out["embedding_norm"] = margin_losses.unit(maps["embedding"])
    return jax.device_get(out)


def _face_attacks(case) -> dict[str, Any]:
    config = case.config
    x, y = _nhwc(case.inputs["x"]), _nhwc(case.inputs["y"])
    module, variables = jaxmodels.load(
        "security.tiny_conv:TinyConvEmbedder",
        case.weights,
        size=x.shape[1],
        **{key: config[key] for key in ("width", "dim", "act", "input_scaling")},
    )
    embed = jax.jit(functools.partial(module.apply, variables))
    out = {"feat_x": embed(x), "feat_y": embed(y)}
    for name in case.wanted:
        if name.startswith("ti_kernel"):
            out[name] = gaussian_kernel(*_ti_kernel(case))
        goal, *rest = name.split("_")
        if goal not in ("impersonate", "dodging"):
            continue
        if rest == ["start"]:
            out[name] = case.outputs[name]  # where the reference began: an input of the attack
            continue
        start = _nhwc(case.outputs.get(f"{goal}_start", case.inputs["x"]))
        target = out["feat_y"] if goal == "impersonate" else out["feat_x"]
        options = dict(
            goal="impersonation" if goal == "impersonate" else goal,
            method=FACE_METHODS[rest[1]],
            norm=rest[0],
            eps=config["eps"],
            steps=config["iters"],
            momentum=config["mu"],
            high=config["pixel_range"][1],
        )
        if rest[1] == "TIM":
            options |= dict(zip(("kernel_size", "sigmas"), _ti_kernel(case)))
        one = jax.jit(
            lambda x, t, options=options: attacks.face_attack(
                jax.random.key(0), embed, x, t, **options
            )
        )
        out[name] = _nchw(one(start, target))
    return jax.device_get(out)


def _ti_kernel(case) -> tuple[int, float]:
    """Length and standard deviations of the kernel that the case records, RobFR's otherwise."""
    found = [name for name in case.wanted if name.startswith("ti_kernel")]
    if not found:
        return 7, 3
    length, sigmas = found[0].split("_")[2:]
    return int(length), float(sigmas)


def _margins(case) -> dict[str, Any]:
    cosines, labels = jnp.asarray(case.inputs["cos"]), jnp.asarray(case.inputs["labels"])
    out = {}
    for name, options in case.config.items():
        if not isinstance(options, dict):
            continue
        m = options["m"]
        if not isinstance(m, list):
            m = [1.0, 0.0, m] if name.startswith("cos") else [1.0, m, 0.0]
        logits_of = functools.partial(
            margin_losses.margin_logits,
            labels=labels,
            scale=options["s"],
            margins=tuple(m),
            filter_above=options.get("interclass_filtering_threshold", 0.0),
        )

        def loss_of(cosines, logits_of=logits_of):
            logits = logits_of(cosines)
            return margin_losses.margin_cross_entropy(logits, labels), logits

        (loss, logits), grads = jax.value_and_grad(loss_of, has_aux=True)(cosines)
        out |= {f"{name}_logits": logits, f"{name}_ce": loss, f"{name}_grad_cos": grads}
    return jax.device_get(out)


def _attribution(case) -> dict[str, Any]:
    inputs, config = case.inputs, case.config
    labeled = len(inputs["targets_labelled"])
    parts = jnp.asarray(np.transpose(inputs["feat_parts"], (0, 2, 1)))
    voting = attribution.vote(
        jnp.asarray(inputs["feat_global"]), parts, jnp.asarray(case.outputs["pairs"][:labeled])
    )

    options = {ours: config[k] for ours, k in (("margin", "m"), ("scale", "s")) if k in config}
    if "eta1" in config:
        options["etas"] = tuple(config[f"eta{i}"] for i in (1, 2, 3))

    def total(logits):
        losses = attribution.cpl_losses(
            logits,
            jnp.asarray(inputs["targets_labelled"]),
            voting,
            jnp.asarray(inputs["gumbel_noise"]),
            **options,
        )
        return losses.total, losses

    (_, losses), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(
        jnp.asarray(inputs["logits"])
    )
    numbers = {}
    if "stat_pred" in inputs:
        known = attribution.known_classes(inputs["stat_label"], inputs["stat_tags"])
        numbers = attribution.open_world_metrics(inputs["stat_pred"], inputs["stat_label"], known)
    return jax.device_get(
        {
            "pairs": np.asarray(voting.pairs),
            "mask": voting.mask,
            **losses._asdict(),
            "grad_logits": grads,
            **{f"stat_{name}": np.float64(value) for name, value in numbers.items()},
        }
    )


def _patch(case) -> dict[str, Any]:
    inputs = case.inputs
    images = _nhwc(inputs["images"])
    patch = jnp.asarray(np.transpose(inputs["patch"], (1, 2, 0)))
    mask = jnp.asarray(np.transpose(inputs["mask"], (1, 2, 0)))
    weight = _nhwc(inputs["weight"])
    placement = patches.Placement(
        **{key: jnp.asarray(inputs[key]) for key in patches.Placement._fields}
    )

    def weighted(patch):
        composed = patches.compose_patch(images, patch, mask, placement)
        return (composed.images * weight).sum(), composed

    (loss, composed), grads = jax.jit(jax.value_and_grad(weighted, has_aux=True))(patch)
    return {
        "theta": patches.affine_matrices(placement, images.shape[1:3], patch.shape[:2]),
        "warped_patch": _nchw(composed.patches),
        "warped_mask": _nchw(composed.masks),
        "composited": _nchw(composed.images),
        "loss": loss,
        "grad_patch": np.transpose(np.asarray(grads), (2, 0, 1)),
        "tv": patches.total_variation(patch),
    }


def _nhwc(x) -> jax.Array:
    return jnp.asarray(np.transpose(x, (0, 2, 3, 1)))


def _nchw(x) -> np.ndarray:
    return np.transpose(np.asarray(x), (0, 3, 1, 2))
