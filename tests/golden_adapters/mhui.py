"""MH-UI's cases: names and layouts to ours and back."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmodels
from jaxmodels.interop.conversion import to_torch
from jaxmodels.security import attacks, uncertainty
from jaxmodels.security.detection import detection_metrics
from jaxmodels.security.mhui import head_losses

RENAMED = {"bn_momentum_torch": "bn_momentum"}
MODELS = {"MHUIResNet": "security.mhui:MHUIResNet", "MHUIVGG": "security.mhui:MHUIVGG"}
# Attack of a case -> (ours, key of its own options in the case's config).
ATTACKS = {
    "fgsm": ("fgsm", None),
    "bim": ("bim", None),
    "pgd_linf": ("bim", None),
    "pgd_l2": ("bim", "pgd_l2"),
    "pgd_targeted": ("bim", None),
    "mifgsm": ("mi", None),
    "nifgsm": ("ni", None),
    "sinifgsm": ("si_ni", None),
    "tifgsm_nodiv": ("ti", None),
    "cw_l2": ("cw", "cw"),
}
NETWORK_OPTIONS = ("width", "classes", "act")


def run(case) -> dict[str, Any]:
    """Every wanted output of one case, in PyTorch's layouts."""
    if case.model in MODELS:
        return _network(case)
    if case.model == "TinyConvClassifier":
        return attacked(case)
    if case.model.startswith("moment matching"):
        return _measures(case)
    return _metrics(case)


def _network(case) -> dict[str, Any]:
    arguments = {RENAMED.get(k, k): _hashable(v) for k, v in case.config.items()}
    module, variables = jaxmodels.load(MODELS[case.model], case.weights, **arguments)
    x = nhwc(case.inputs["images"])
    if case.mode == "train":
        return _train_step(case, module, variables, x)
    maps = jax.jit(functools.partial(module.apply, method="intermediates"))(variables, x)
    out = _of_maps(maps)
    with jax.enable_x64(True):
        return {**jax.device_get(out), **_fitted(np.asarray(out["logits"], np.float64))}


def _of_maps(maps) -> dict[str, Any]:
    out = {"logits": maps["logits"], "probs": jax.nn.softmax(maps["logits"])}
    return out | {
        f"stage{k[3:]}_mean": y.mean((1, 2)) for k, y in maps.items() if k.startswith("tap")
    }


def _fitted(values, from_logits: bool = True, **options) -> dict[str, Any]:
    """Moments, concentrations and measures, `trace_*` and `minka_*` of those estimators."""
    found = uncertainty.moments(values, from_logits=from_logits)
    out = {"mean": found.mean, "var": found.variance}
    for name in ("trace", "geo", "minka", "first"):
        fit = uncertainty.match_moments(found, name, **options)
        out |= {f"alpha0_{name}": fit.alpha0, f"alpha_{name}": fit.alpha}
        measured = uncertainty.measures(fit.alpha)
        out |= {f"{name}_{measure}": value for measure, value in measured.items()}
    return jax.device_get(out)


def _train_step(case, module, variables, x) -> dict[str, Any]:
    labels = jnp.asarray(case.inputs["labels"])

    def loss_of(params):
        maps, updated = module.apply(
            {**variables, "params": params},
            x,
            train=True,
            method="intermediates",
            mutable=["batch_stats"],
        )
        losses = head_losses(maps["logits"], labels)
        return losses.sum(), (losses, maps, updated)

    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    (total, (losses, maps, updated)), grads = step(variables["params"])
    return {
        **_of_maps(maps),
        "head_losses": losses,
        "total_loss": total,
        **{f"grad.{k}": v for k, v in to_torch({"params": grads}).items()},
        **{f"after.{k}": v for k, v in to_torch(dict(updated)).items()},
    }


def _measures(case) -> dict[str, Any]:
    names = {"eps": "eps", "alpha0_range": "alpha0_clip"}
    options = {k: _hashable(case.config[v]) for k, v in names.items() if v in case.config}
    with jax.enable_x64(True):
        out = _fitted(case.inputs["probs"], from_logits=False, **options)
        for name, value in uncertainty.measures(case.inputs["alpha"]).items():
            out[f"alpha_in_{name}"] = np.asarray(value)
    # Measures of fitted distributions are recorded for the last rows only.
    for name, value in out.items():
        if name in case.outputs:
            out[name] = value[len(value) - len(case.outputs[name]) :]
    return out


def _metrics(case) -> dict[str, Any]:
    out = {}
    for name in case.inputs:
        if name.startswith("score"):
            i = name[len("score") :]
            found = detection_metrics(case.inputs[name], case.inputs[f"label{i}"])
            out |= {f"auroc{i}": found.auroc, f"aupr{i}": found.aupr, f"fpr95_{i}": found.fpr95}
    return {name: np.float64(value) for name, value in out.items()}


def attacked(case) -> dict[str, Any]:
    """Attacks on a tiny classifier, with their predictions."""
    config = case.config
    x = nhwc(case.inputs["images"])
    module, variables = jaxmodels.load(
        "security.tiny_conv:TinyConvClassifier",
        case.weights,
        size=x.shape[1],
        **{key: config[key] for key in NETWORK_OPTIONS},
    )
    apply = jax.jit(functools.partial(module.apply, variables))
    out = {"clean_logits": apply(x)}
    for name in case.wanted:
        if name not in ATTACKS:
            continue
        method, own = ATTACKS[name]
        cfg = attacks.make(method, **_attack_options(name, method, config, own))
        targeted = getattr(cfg, "targeted", False)
        y = jnp.asarray(case.inputs["target_labels" if targeted else "labels"])
        adversarial = jax.jit(
            lambda x, y, cfg=cfg: attacks.attack(jax.random.key(0), apply, x, y, cfg)
        )(x, y)
        out[name] = nchw(adversarial)
        out[f"{name}_pred"] = np.asarray(apply(adversarial).argmax(-1), np.int64)
    return out


def _attack_options(name: str, method: str, config, own) -> dict[str, Any]:
    given = {**config, **config.get(own, {})}
    if method == "cw":
        return {
            "c": given["c"],
            "kappa": given["kappa"],
            "steps": given["steps"],
            "learning_rate": given["lr"],
        }
    options = {"eps": given["eps"]}
    if method != "fgsm":
        options |= {"step_size": given["alpha"], "steps": given["steps"]}
    if method in ("mi", "ni", "si_ni", "ti"):
        # An attack's own decay, or the one that is recorded for all of them.
        of = {"mi": "mifgsm", "ni": "nifgsm", "si_ni": "sinifgsm", "ti": "ti"}[method]
        shared = config.get("mifgsm", {}).get("decay", 1.0)
        options["momentum"] = config.get(of, {}).get("decay", shared)
    if method == "si_ni":
        options["scales"] = config["sinifgsm"]["m"]
    if method == "ti":
        options["kernel_size"] = config["ti"]["len_kernel"]
        options["sigmas"] = config["ti"]["nsig"]
    if name == "pgd_l2":
        options["norm"] = "l2"
    if name == "pgd_targeted":
        options["targeted"] = True
    return options


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value


def nhwc(x) -> jax.Array:
    """[B, C, H, W] -> [B, H, W, C]."""
    return jnp.asarray(np.transpose(x, (0, 2, 3, 1)))


def nchw(x) -> np.ndarray:
    """[B, H, W, C] -> [B, C, H, W]."""
    return np.transpose(np.asarray(x), (0, 3, 1, 2))
