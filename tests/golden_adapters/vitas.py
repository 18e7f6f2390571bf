"""ViTAS's cases: the official configuration form to ours, NCHW to NHWC and back."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import jaxmodels
from jaxmodels.interop.catalog import export
from jaxmodels.search import soft_labels, vitas, vitas_nets, vitas_space
from train.data import image_mixing
from train.defaults import default_config
from train.optimizers import make_schedule

# These programs run once: most of their time would go to optimizing.
CHEAP = {"xla_backend_optimization_level": 0}


def run(case) -> dict[str, Any]:
    """Every wanted output of the case, in PyTorch's layouts."""
    # What stands in parentheses explains the title.
    named = {title.split(" (")[0]: function for title, function in OPERATIONS.items()}
    return jax.device_get(named[case.model.split(" (")[0]](case))


def _images(case):
    return jnp.asarray(case.inputs["image"].transpose(0, 2, 3, 1))


def _superformer(case):
    config = case.config
    official = {"image_size": case.inputs["image"].shape[-1], **config["model"]}
    space = vitas_space.from_official(official, config.get("channel_percent"))
    module, variables = jaxmodels.load(
        "search.vitas",
        case.weights,
        qkv=config["model"].get("qkv", 0),
        percent=space.percent,
        **{
            "patches": space.patches,
            "heads": space.heads,
            "dim": space.dim,
            "attention": space.attention,
            "mlp": space.mlp,
            "depth": space.depth,
            "classes": space.classes,
            "identity": space.identity,
            "image_size": space.image_size,
            "channels": space.channels,
        },
    )
    return module, variables


def run_network(case):
    if case.mode == "train":
        return _train(case)
    if "net_id" in case.config["model"] or "genes" not in case.inputs:
        return _standalone(case)
    module, variables = _superformer(case)
    apply = functools.partial(module.apply, method="intermediates")
    forward = {}
    out = {}
    for i, genome in enumerate(np.atleast_2d(case.inputs["genes"])):
        sides = {name.split("_")[1] for name in case.wanted if name.startswith(f"s{i}_")}
        for side in sides & set(vitas.SIDES):
            choice = vitas.make_choice(module.space, genome, side)
            patch = choice.patch
            if patch not in forward:
                forward[patch] = jax.jit(
                    lambda v, x, c, patch=patch: apply(v, x, c._replace(patch=patch)),
                    compiler_options=CHEAP,
                )
            maps = forward[patch](variables, _images(case), choice._replace(patch=None))
            used = vitas.token_indices(choice, module.dim)
            out[f"s{i}_{side}_logits"] = maps["logits"]
            out[f"s{i}_{side}_embed_first3"] = maps["embed"][:, :3, used]
            out[f"s{i}_{side}_last_block_cls"] = maps["blocks"][-1][:, used]
            out[f"s{i}_{side}_norm"] = maps["norm"][:, used]
    return out


def _train(case):
    module, variables = _superformer(case)
    genome = np.ravel(case.inputs["genes"])
    both = "sum_logits" in case.wanted
    sides = [
        vitas.make_choice(module.space, genome, side) for side in vitas.SIDES[: 2 if both else 1]
    ]

    @functools.partial(jax.jit, compiler_options=CHEAP)
    def step(params):
        def loss(params):
            logits = sum(module.apply({"params": params}, _images(case), c) for c in sides)
            return soft_labels.classification_loss(logits, case.inputs["label"]), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, logits), gradients = step(variables["params"])
    tensors = export("search.vitas", module, {"params": gradients})
    out = {f"grad.{key}": value for key, value in tensors.items()}
    out |= {"loss": loss, "sum_logits": logits, "logits": logits}
    out["nonzero_grad_count"] = np.array(sum(bool(np.any(v)) for v in tensors.values()))
    return out


def _standalone(case):
    config = case.config["model"]
    config = {"channel_percent": case.config.get("channel_percent"), **config}
    # As in `_superformer`: what an image measures is not part of the official configuration.
    config = {"image_size": case.inputs["image"].shape[-1], **config}
    space = vitas_space.from_official(config)
    genome = vitas_space.official_genome(config)
    module, variables = jaxmodels.load(
        "search.vitas:ViTAS",
        case.weights,
        drop_path_rate=config.get("drop_path_rate", 0.0),
        **vitas_nets.standalone_arguments(space, genome),
    )
    apply = functools.partial(module.apply, method="intermediates")
    maps = jax.jit(apply, compiler_options=CHEAP)(variables, _images(case))
    out = {f"{name}_cls": value for name, value in maps.items() if name.startswith("block_")}
    out |= {"embed_first3": maps["embed"][:, :3], "norm": maps["norm"], "logits": maps["logits"]}
    out["flops"] = np.array(space.flops(genome))
    out["params"] = np.array(space.parameters(genome))
    return {name: out[name] for name in case.wanted}


def run_published(case):
    rows = []
    for name in case.config["order"]:
        config = case.config["models"][name]
        space, genome = vitas_space.from_official(config), vitas_space.official_genome(config)
        rows.append((space.flops(genome), space.parameters(genome)))
    flops, params = zip(*rows)
    return {"flops": np.array(flops), "params": np.array(params)}


def run_flops(case):
    out = {}
    for name in case.inputs:
        model = name.removeprefix("genes_")
        space = vitas_space.from_official(case.config[model], case.config["channel_percent"])
        out[f"flops_{model}"] = space.flops(case.inputs[name])
    return out


def run_draws(case):
    """Python's own draws: what is checked is that our space holds each, and its FLOPs."""
    space = vitas_space.from_official(case.config["model"], case.config["channel_percent"])
    out = {}
    for name in [n.removeprefix("ops_") for n in case.outputs if n.startswith("ops_")]:
        genomes = space.recover(case.outputs[f"ops_{name}"], case.outputs[f"width_{name}"])
        out[f"ops_{name}"] = genomes[:, : space.model_genes]
        out[f"width_{name}"] = np.array(space.percent)[genomes[:, space.model_genes :]]
        out[f"flops_{name}"] = space.flops(genomes)
    return out


def run_schedule(case):
    config = case.config
    per_epoch = config["iteration_per_epoch"]
    options = ConfigDict(
        {
            **default_config().schedule,
            "name": "cosine",
            "peak": config["base_lr"],
            "warmup_steps": config["warm_up"] * per_epoch,
            "warmup_inside": False,
        }
    )
    with jax.enable_x64(True):
        rate = make_schedule(options, config["max_epochs"] * per_epoch)
        steps = [epoch * per_epoch + i for epoch, i in case.inputs["epoch_iter"].tolist()]
        return {"lr": np.asarray(rate(jnp.asarray(steps)))}


def run_mixing(case):
    config, inputs, out = case.config, case.inputs, {}
    images, label = _images(case), case.inputs["label"]
    options = (config["num_classes"], config["smoothing"])
    for name in [n for n in inputs if n.startswith("lam_")]:
        i = name.removeprefix("lam_")
        lam = inputs[name]
        out[f"mixup_image_{i}"] = image_mixing.mixup(images, lam).transpose(0, 3, 1, 2)
        out[f"mixup_target_{i}"] = image_mixing.mixed_targets(label, lam, *options)
    for name in [n for n in inputs if n.startswith("cut_lam_centre_")]:
        i = name.removeprefix("cut_lam_centre_")
        lam, row, column = inputs[name].tolist()
        box, lam = image_mixing.cut_box(images.shape[1:3], lam, int(row), int(column))
        out[f"cut_box_{i}"], out[f"cut_lam_{i}"] = box, lam
        out[f"cut_image_{i}"] = image_mixing.cutmix(images, box).transpose(0, 3, 1, 2)
        out[f"cut_target_{i}"] = image_mixing.mixed_targets(label, lam, *options)
    return {name: np.asarray(out[name]) for name in case.wanted}


def run_cyclic(case):
    out = {}
    for name in [n for n in case.inputs if n.startswith("widths_")]:
        i = name.removeprefix("widths_")
        widths, channels = case.inputs[name].tolist(), int(case.inputs[f"l_{i}"])
        out[f"start_{i}"] = vitas_space.cyclic_offsets(widths, channels)
        out[f"index_{i}"] = vitas_space.cyclic_indices(widths, channels)
        for suffix, sharing in (("", "cyclic"), ("_bilateral", "two_sided")):
            usage = vitas_space.channel_usage(widths, channels, sharing)
            out[f"usage{suffix}_{i}"] = usage
    return {name: out[name] for name in case.wanted}


def run_shift(case):
    genes = case.inputs["genes"]
    depth = case.config["depth"]
    heads = tuple(range(1, case.config["identity_index"] + 1))
    space = vitas_space.Space(depth=depth, heads=heads)
    return {"genes": space.shift(genes)}


def run_twins(case):
    config = dict(case.config)
    renamed = {"img_size": "image_size", "wss": "windows", "embed_dims": "dims"}
    renamed |= {"num_heads": "heads", "norm_eps": "epsilon", "num_classes": "classes"}
    renamed |= {"in_chans": "channels"}
    # Dropout does nothing here, and None stands for the usual scale.
    unused = {"drop_rate", "attn_drop_rate", *(k for k in ("qk_scale",) if config.get(k) is None)}
    config = {renamed.get(k, k): v for k, v in config.items() if k not in unused}
    module, variables = jaxmodels.load("search.twins", case.weights, **config)
    apply = functools.partial(module.apply, method="intermediates")
    maps = jax.jit(apply, compiler_options=CHEAP)(variables, _images(case))
    out = {"pooled": maps["pooled"], "logits": maps["logits"]}
    for name, value in maps.items():
        if name.startswith("block_"):
            out[name], out[f"{name}_mean"] = value, value.mean(1)
    return {name: out[name] for name in case.wanted}


OPERATIONS = {
    "core.model.net.Net": run_network,
    "core.model.net.Net (supernet / superformer)": run_network,
    "core.model.net.Net (searched network)": run_network,
    "published searched networks": run_published,
    "count_flops on the published superformers": run_flops,
    "ImagenetTrainer.generate_subnet": run_draws,
    "ImagenetTrainer.adjust_learning_rate": run_schedule,
    "util.mixup": run_mixing,
    "cyclic channel selection": run_cyclic,
    "identity shifting (canonical encoding)": run_shift,
    "ALTGVT (Twins-SVT)": run_twins,
}
