"""ScaleNet's cases: the official configuration form to ours, NCHW to NHWC and back."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import jaxmodels
from jaxmodels.interop.catalog import export
from jaxmodels.search import scalenet, scalenet_space, soft_labels
from train.defaults import default_config
from train.optimizers import make_schedule
from train.search.nsga2 import crowding_distance

NAME = "search.scalenet"
# The official search counts base models at this resolution whatever its list begins with.
BASE_RESOLUTION = 224
# These programs run once: most of their time would go to optimizing.
CHEAP = {"xla_backend_optimization_level": 0}


def run(case) -> dict[str, Any]:
    """Every wanted output of the case, in PyTorch's layouts."""
    # What stands in parentheses explains the title.
    named = {title.split(" (")[0]: function for title, function in OPERATIONS.items()}
    return jax.device_get(named[case.model.split(" (")[0]](case))


def _arguments(config) -> dict[str, Any]:
    model, searcher = config["model"], config["searcher"]
    return {
        "backbone": model["backbone"],
        "head": model["head"],
        "depth_multiplier": searcher["depth_multiplier"],
        "channel_multiplier": searcher["channel_multiplier"],
        "resolution_multiplier": searcher["resolution_multiplier"],
        "max_scaling_stage": searcher["max_scaling_stage"],
    }


def _network(case):
    coupling = case.config["searcher"]["n_laterally_couplng"]
    return jaxmodels.load(
        NAME,
        case.weights,
        n_laterally_coupling=coupling,
        depthwise="grouped",
        sliced=True,
        **_arguments(case.config),
    )


def _images(case):
    return jnp.asarray(case.inputs["image"].transpose(0, 2, 3, 1))


def run_network(case):
    if case.mode == "train":
        return _train(case)
    module, variables = _network(case)
    subnets, forward, out = {}, {}, {}
    counters = module.counters()
    for t, number in enumerate(case.inputs["sequence"]):
        if number not in subnets:
            width = case.inputs[f"subnet_{number}_cm_res"][0]
            ops = case.inputs[f"subnet_{number}_ops"]
            subnets[number] = scalenet.make_subnet(module.space, ops, width, holes=True)
            apply = functools.partial(module.apply, subnet=subnets[number], method="intermediates")
            forward[number] = jax.jit(apply, compiler_options=CHEAP)
        subnet = subnets[number]
        right, counters = scalenet.advance(counters, subnet, module.n_laterally_coupling)
        maps = forward[number](variables, _images(case), right=right)
        out[f"call_{t}_logits"] = maps["logits"]
        out[f"call_{t}_pool"] = maps["pool"]
        for block in (int(name[6:]) for name in maps if name.startswith("block_")):
            name = f"block{block}" if block else "stem"
            width = subnet.outputs[block]
            out[f"call_{t}_{name}"] = maps[f"block_{block}"][..., :width].transpose(0, 3, 1, 2)
    return {name: out[name] for name in case.wanted}


def _train(case):
    module, variables = _network(case)
    label = case.inputs["label"]
    ops, width = case.inputs["subnet_ops"], case.inputs["cm_res"][0]
    subnet = scalenet.make_subnet(module.space, ops, width, holes=True)

    @functools.partial(jax.jit, compiler_options=CHEAP)
    def step(variables, right):
        def loss(params):
            logits, new = module.apply(
                {**variables, "params": params}, _images(case), subnet, right, True,
                mutable=["batch_stats"],
            )  # fmt: skip
            kind = case.config["model"]["loss_type"]
            return soft_labels.classification_loss(logits, label, kind), (logits, new)

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    out = {}
    counters = module.counters()
    for side in ("left", "right"):
        right, counters = scalenet.advance(counters, subnet, module.n_laterally_coupling)
        (loss, (logits, new)), gradients = step(variables, right)
        variables = {**variables, **new}
        out[f"{side}_logits"], out[f"{side}_loss"] = logits, loss
        for key, value in export(NAME, module, {"params": gradients}).items():
            out[f"{side}_grad.{key}"] = value
        for key, value in export(NAME, module, {"batch_stats": new["batch_stats"]}).items():
            out[f"after_{side}.{key}"] = value
    return {name: out[name] for name in case.wanted}


def _space(config):
    return scalenet_space.make_space(**_arguments(config), base_resolution=BASE_RESOLUTION)


def run_scaling(case):
    space = _space(case.config)
    assert [list(d) for d in space.depth_stage] == case.config["depth_stage"]
    rows = zip(case.inputs["basenet"], case.inputs["stage_and_indices"])
    out = []
    for base, (stage, *indices) in rows:
        repaired = space.repair(base)
        ops, width, resolution = space.scaled(base, stage, indices)
        flops = space.flops(ops, width, resolution, holes=True)
        base_flops = space.flops(repaired, holes=True)
        out.append((repaired, ops, width, resolution, flops, base_flops))
    names = ("repaired_basenet", "subnet_ops", "channel_mult", "resolution", "flops", "flops_base")
    return {name: np.array(column) for name, column in zip(names, zip(*out))}


def run_admissible(case):
    space = _space(case.config)
    bases = case.inputs["basenets"]
    out = {"flops_base": space.flops(bases, holes=True)}
    for stage in range(1, space.max_scaling_stage + 1):
        for name, chosen in (("all", bases), ("first", bases[:1])):
            found = space.admissible(chosen, stage, case.config["err_scale"])
            name = f"admissible_{name}_stage{stage}"
            # None at all has no shape of its own.
            empty = case.outputs.get(name, np.zeros((0, 3), np.int64))[:0]
            out[name] = np.array(found, np.int64) if found else empty
    return out


def _published(config) -> dict[str, Any]:
    """The published network with the base depths of a configuration that names no network."""
    base = scalenet_space.PUBLISHED_BACKBONE
    names = [name for name in base if name != "final_pooling"]
    depths = zip(names, config["depth_stage"])
    return {
        "backbone": {**base, **{name: [n, *base[name][1:]] for name, (n, _) in depths}},
        "head": scalenet_space.PUBLISHED_HEAD,
    }


def run_samples(case):
    """Python's own draws: what is checked is that our rule can make each, and its FLOPs."""
    space = _space({"model": case.config.get("model") or _published(case.config), **case.config})
    assert [list(d) for d in space.depth_stage] == case.config["depth_stage"]
    widths, sizes = case.outputs["channel_mult_f32"], case.outputs["resolution"]
    # Lists of two stages may share values: which stage was drawn is then the reference's to say.
    stages = [
        space.scaling_stage_of(w, r, s) for w, r, s in zip(widths, sizes, case.outputs["stage"])
    ]
    ops = [space.resample(row, s) for row, s in zip(case.outputs["ops"], stages)]
    return {
        "ops": np.array(ops),
        "channel_mult_f32": widths,
        "resolution": sizes,
        "stage": np.array(stages),
        "flops": space.flops(np.array(ops), widths, sizes, holes=True),
    }


def run_loss(case):
    loss = soft_labels.classification_loss(
        case.inputs["logits"], case.inputs["label"], case.config["loss_type"]
    )
    return {"loss": loss}


def run_schedule(case):
    config = case.config
    noted = re.search(r"base lr ([\d.e-]*\d)", case.meta.get("notes", ""))
    peak = config.get("base_lr", float(noted[1]) if noted else 0.12)
    options = ConfigDict(
        {
            **default_config().schedule,
            "peak": peak,
            "end": peak * config.get("alpha", 0.0),
            "warmup_steps": config["warmup_steps"],
            "warmup_inside": False,
            "name": config["decay_stg"],
            "boundaries": config["lr_steps"],
            "factor": config["lr_mults"],
        }
    )
    with jax.enable_x64(True):
        rate = make_schedule(options, config.get("decay_step", 500_000))
        return {"lr": np.asarray(rate(jnp.asarray(case.inputs["iteration"])))}


def run_crowding(case):
    names = [name for name in case.inputs if name.startswith("F_")]
    return {f"crowding_{n[2:]}": crowding_distance(case.inputs[n]) for n in names}


OPERATIONS = {
    "core.model.net.Net": run_network,
    "EvolutionSampler.check_basenet / generate_subnet_ / count_flops": run_scaling,
    "EvolutionSampler.check_flops": run_admissible,
    "UniformSearcher.generate_subnet": run_samples,
    "IterLRScheduler": run_schedule,
    "Net.get_loss": run_loss,
    "calc_crowding_distance": run_crowding,
}
