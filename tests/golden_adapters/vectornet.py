"""VectorNet's cases: the network and its peers, the ConvNet, features, losses, metrics."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmodels
from jaxmodels.driving import forecast_objective, forecasting_metrics, vectorization
from jaxmodels.interop.conversion import to_torch

# Sizes of a case's data, which are no arguments of a network.
ABOUT_DATA = ("B", "P", "V", "N", "resolution")
VECTORIZE = ("obs", "dt", "radius", "heading_min_disp", "max_polylines", "max_vectors", "columns")


def run(case) -> dict[str, Any]:
    """Every wanted output of one case, in PyTorch's layouts."""
    if case.model in FUNCTIONS:
        return FUNCTIONS[case.model](case)
    arguments = {k: v for k, v in case.config.items() if k not in ABOUT_DATA}
    if case.model == "ConvNetBaseline":
        return convnet(case, arguments)
    if case.model == "HGNN" or "in_channels" in arguments:
        return peer(case, arguments)
    return network(case, arguments)


def network(case, arguments):
    # The objective's options, which are no arguments of the network.
    options = {key: arguments.pop(key) for key in ("alpha", "space", "delta") if key in arguments}
    module, variables = jaxmodels.load("driving.vectornet", case.weights, **arguments)
    given = case.inputs
    scene = [given[name] for name in ("vectors", "vector_mask", "target_index")]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def step(params):
        outputs = module.apply(
            {"params": params}, *scene, given.get("node_mask"), method="intermediates"
        )
        future = given.get("future_offsets", jnp.zeros_like(outputs["offsets"]))
        valid = given.get("future_valid", np.ones(future.shape[:2], np.float32))
        losses = forecast_objective.objective(
            outputs, future, valid, given.get("node_mask"), **options
        )
        return losses.total, (outputs, losses)

    (loss, (outputs, losses)), grads = step(variables["params"])
    gradients = to_torch({"params": grads})
    return {
        **outputs,
        "loss": loss,
        "loss_traj": losses.trajectory,
        "loss_node": losses.node,
        **{f"grad.{key}": value for key, value in gradients.items()},
    }


def peer(case, arguments):
    name = "HGNN" if case.model == "HGNN" else "ResidualVectorNet"
    module, variables = jaxmodels.load(f"driving.vectornet_peers:{name}", case.weights, **arguments)
    forward = jax.jit(functools.partial(module.apply, method="intermediates"))
    return forward(variables, **case.inputs)


def convnet(case, arguments):
    module, variables = jaxmodels.load("driving.raster_convnet", case.weights, **arguments)
    forward = jax.jit(functools.partial(module.apply, method="intermediates"))
    image = np.transpose(case.inputs["image"], (0, 2, 3, 1))
    outputs = dict(forward(variables, image, case.inputs["cells"]))
    outputs["feature_map"] = np.transpose(outputs["feature_map"], (0, 3, 1, 2))
    return outputs


def features(case):
    given = case.inputs
    options = {k: case.config[k] for k in VECTORIZE if k in case.config}
    scene = vectorization.vectorize(
        given["tracks_xy"],
        given["tracks_valid"],
        int(given["target"]),
        given["lanes"],
        given["lane_attr"],
        **options,
    )
    return {name: np.asarray(getattr(scene, name)) for name in case.wanted}


def losses(case):
    given = case.inputs
    trajectory = (given["offsets"], given["future"], given["future_valid"])
    node = (given["node_pred"], given["node_target"])
    return {
        "nll_unit": forecast_objective.gaussian_nll(*trajectory),
        "nll_scale": forecast_objective.gaussian_nll(*trajectory, given.get("log_scale")),
        **{
            name: forecast_objective.node_loss(*node, given["node_mask"], delta)
            for name, delta in _deltas(case.wanted)
        },
        "huber_empty": forecast_objective.node_loss(*node, np.zeros_like(given["node_mask"])),
        "positions": forecast_objective.positions_of(given["offsets"]),
        "smooth_l1_mean": forecast_objective.smooth_l1_mean(*node),
        "mse_mean": forecast_objective.mse_mean(*trajectory[:2]),
    }


def _deltas(names):
    """Huber thresholds of names such as `huber_d1` and `huber_d05` (one half)."""
    for name in names:
        digits = name.removeprefix("huber_d")
        if digits != name:
            yield name, float(f"{digits[0]}.{digits[1:]}")


def metrics(case):
    given = case.inputs
    outputs = dict(forecasting_metrics.displacement_errors(given["pred"][:, 0], given["gt"]))
    outputs["minADE_true"] = forecasting_metrics.smallest_average_error(given["pred"], given["gt"])
    for key in case.wanted:
        if not key.startswith("k"):
            continue
        guesses, ranking, horizon, name = key.split(".")
        found = forecasting_metrics.guess_metrics(
            given["pred"],
            given["gt"],
            guesses=int(guesses[1:]),
            horizon=int(horizon[1:]),
            probability=given["prob"] if ranking == "prob" else None,
            miss_threshold=case.config.get("miss_threshold", 2.0),
        )
        outputs[key] = found[name]
    return outputs


FUNCTIONS = {"features": features, "losses": losses, "metrics": metrics}
