"""RepGhost's cases and its GhostNet peer: argument names to ours, NCHW to NHWC and back."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmodels
from jaxmodels.cost import count_cost
from jaxmodels.interop.conversion import to_torch
from jaxmodels.vision import repghost

# Official class -> (ours, {official argument: ours}).
CLASSES: dict[str, tuple[str, dict[str, str]]] = {
    "RepGhostModule": ("vision.repghost:RepGhostModule", {}),
    "RepGhostBottleneck": (
        "vision.repghost:RepGhostBottleneck",
        {
            "in_chs": "inp",
            "mid_chs": "mid",
            "out_chs": "oup",
            "dw_kernel_size": "kernel_size",
        },
    ),
    "RepGhostNet": ("vision.repghost", {}),
    "repghostnet": ("vision.repghost", {}),
    "SqueezeExcite": (
        "vision.repghost:SqueezeExcite",
        {"in_chs": "features", "se_ratio": "ratio", "reduced_base_chs": "base"},
    ),
    "GhostModule": ("vision.ghostnet:GhostModule", {}),
    "GhostBottleneck": (
        "vision.ghostnet:GhostBottleneck",
        {"hidden_dim": "mid", "use_se": "se"},
    ),
    "SELayer": ("vision.ghostnet:GhostSqueezeExcite", {"channel": "features"}),
    "GhostNet": ("vision.ghostnet", {"width_mult": "width"}),
    "mobilenet_v3_small": ("vision.mobilenetv3:mobilenet_v3_small", {"width_mult": "width"}),
    "mobilenet_v3_large": ("vision.mobilenetv3:mobilenet_v3_large", {"width_mult": "width"}),
}
COST_COLUMNS = (
    "enable_se",
    "reparam",
    "reparam_bn",
    "reparam_identity",
    "shortcut",
)


def run(case) -> dict[str, Any]:
    """Every wanted output of one case, in PyTorch's layouts."""
    if case.model.startswith("cal_flops_params"):
        return _cost_table(case)
    official = case.model.split("(")[0]
    # Named constructors are variants of the network.
    name, renamed = CLASSES.get(official, (f"vision.repghost:{official}", {}))
    arguments = {
        renamed.get(key, key): value for key, value in case.config.items() if value is not None
    }
    if "se_ratio" in arguments:  # a bottleneck's 0 means none
        arguments["se"] = bool(arguments["se_ratio"])
    if case.meta.get("dtype") == "float64":
        arguments |= {"dtype": jnp.float64, "param_dtype": jnp.float64}
    smoothing = arguments.pop("smoothing", 0.1)
    module, variables = jaxmodels.load(name, case.weights, **arguments)
    (x,) = (case.inputs[key] for key in ("image", "x") if key in case.inputs)
    x = jnp.asarray(np.transpose(x, (0, 2, 3, 1)))

    if case.meta.get("mode") == "train" and "label" in case.inputs:
        return _train_step(module, variables, x, case.inputs["label"], smoothing)
    outputs = {}
    for key, y in _forward(module)(variables, x).items():
        outputs[key] = _nchw(y)
    deployed = [key for key in case.wanted if "deploy" in key or key in ("kernel", "bias")]
    if deployed:
        folded, folded_variables = repghost.fold(module, variables)
        for key, y in _forward(folded)(folded_variables, x).items():
            outputs[f"{key}_deploy"] = _nchw(y)
        for key, value in to_torch(folded_variables).items():
            outputs[f"deploy.{key}"] = value
        if "kernel" in case.wanted:
            # The equivalent convolution exists without fusion branches too, where the official
            # conversion changes nothing.
            _, plain = repghost.fold_all(module, variables)
            fused = to_torch(plain)
            outputs["kernel"] = fused["cheap_operation.weight"]
            outputs["bias"] = fused["cheap_operation.bias"]
    return outputs


def _forward(module):
    if hasattr(module, "intermediates"):
        return jax.jit(functools.partial(module.apply, method="intermediates"))
    return jax.jit(lambda variables, x: {"y": module.apply(variables, x)})


def _nchw(y) -> np.ndarray:
    y = np.asarray(y)
    return np.transpose(y, (0, 3, 1, 2)) if y.ndim == 4 else y


def _train_step(module, variables, x, label, smoothing) -> dict[str, Any]:
    """Loss, gradients and running statistics of one step, by PyTorch name."""
    label = jnp.asarray(label)
    extra = {key: tree for key, tree in variables.items() if key != "params"}

    def loss_of(params):
        outputs, updates = module.apply(
            {"params": params, **extra},
            x,
            train=True,
            method="intermediates",
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        logits = outputs["logits"]
        targets = optax.smooth_labels(jax.nn.one_hot(label, logits.shape[-1]), smoothing)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, (outputs, updates)

    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    (loss, (outputs, updates)), grads = step(variables["params"])
    return {
        **{key: _nchw(y) for key, y in outputs.items()},
        "loss": loss,
        "grad_global_norm": optax.global_norm(grads),
        **{f"grad.{key}": value for key, value in to_torch({"params": grads}).items()},
        **{f"new.{key}": value for key, value in to_torch(dict(updates)).items()},
    }


def _cost_table(case) -> dict[str, Any]:
    columns = case.config["columns"]
    macs, parameters = [], []
    for row in np.atleast_2d(case.inputs["config"]):
        cell = dict(zip(columns, row.tolist()))
        module = repghost.RepGhostNet(
            width=cell["width"],
            num_classes=case.config.get("num_classes", 1000),
            **{key: bool(cell[key]) for key in COST_COLUMNS if key in cell},
        )
        if cell.get("deployed_by_conversion") and module.has_fusion:
            module = module.clone(deploy=True)
        cost = count_cost(module, resolution=int(cell["resolution"]))
        macs.append(cost.macs)
        parameters.append(cost.parameters)
    return {
        "flops": np.asarray(macs),
        "params_profiler": np.asarray(parameters),
        "params_all": np.asarray(parameters),
    }
