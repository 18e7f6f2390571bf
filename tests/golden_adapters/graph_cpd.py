"""Adapter of the change-point cases: names, and the choice of arguments."""

import jax
import numpy as np

import jaxmodels
from jaxmodels.graphs import change_detection, change_scores, laplacian_change
from jaxmodels.graphs.latent_evolution import predict

NAME = "graphs.latent_evolution"


def run_sweep(case):
    config, inputs = case.config, case.inputs
    module, variables = jaxmodels.load(
        NAME,
        {"U": inputs["U0"], "B": inputs["B0"], "A": inputs["A0"]},
        num_nodes=inputs["G"].shape[-1],
        window=config["window"],
        rank=config["rank"],
        gamma=config["gamma"],
        lam=config["lam"],
        eps=config["eps"],
        directed=config["directed"],
        order=config.get("order", "gauss_seidel"),
    )
    mask = inputs["Y"] if config["masked"] else None
    affinity = inputs["W"] if config["lam"] > 0 else None

    def fitted(iters):
        return module.apply(
            variables, inputs["G"], mask, affinity, iters=iters, tol=0, method="fit"
        )

    first, last = fitted(1).factors, fitted(config["iters"])
    out = {f"{name}_1": getattr(first, name) for name in "UBA"}
    out |= {name: getattr(last.factors, name) for name in "UBA"}
    return {**out, "objective": last.objective, "prediction": predict(last.factors)}


def run_scores(case):
    config, inputs = case.config, case.inputs
    options = change_detection.Options(
        window=config["window"],
        rank=config["rank"],
        alpha=config["alpha"],
        gamma=config["gamma"],
        lam=config["lam"],
        iters=config["iters"],
        tol=config["tol"],
        eps=config["eps"],
        scorer="both",
    )
    found = change_detection.detect(
        inputs["G"],
        options,
        initial=(inputs["U0"], inputs["B0"], inputs["A0"]),
        keep_predictions=True,
    )
    frobenius, spectral = found.frobenius, found.spectral
    return {
        "signature": found.signatures,
        "prediction_first": found.predictions[0],
        "prediction_last": found.predictions[-1],
        **dict(zip(("pf", "nf", "zf"), frobenius)),
        **dict(zip(("ps", "ns", "zs"), spectral)),
        "score_frobenius": change_scores.rises(frobenius.mixed, options.window),
        "score_spectral": change_scores.rises(spectral.mixed, options.window),
    }


def run_lad(case):
    config = case.config
    snapshots = laplacian_change.edges_to_adjacency(
        case.inputs["edges"],
        config["timestamps"],
        directed=config["directed"],
        max_nodes=config["max_nodes"],
    )
    values = laplacian_change.singular_values(
        snapshots, config["num_eigen"], directed=config["directed"]
    )
    signatures = laplacian_change.normalized(values)
    windows = {
        "short": config["window1"],
        "long": config["window2"],
        "initial": config["initial_window"],
    }
    scores = laplacian_change.lad_scores(signatures, difference=config["difference"], **windows)
    plain = laplacian_change.lad_scores(signatures, difference=False, **windows)
    share = config["percent_ranked"]
    return {
        "singular_values": values,
        "signature": signatures,
        "z_short": scores.short,
        "z_long": scores.long,
        "z": scores.scores,
        "anomalies": laplacian_change.ranked_points(scores.scores, share),
        "z_nodiff": plain.scores,
        "anomalies_nodiff": laplacian_change.ranked_points(plain.scores, share),
        "z_mean_context": laplacian_change.context_distances(
            signatures, config["window1"], config["initial_window"], typical="mean"
        ),
    }


def run_hits(case):
    out = {}
    for i, one in enumerate(case.config["cases"]):
        found = change_scores.hits_at(case.inputs[f"z.{i}"], one["events"], one["n"])
        out[f"hits.{i}"], out[f"top.{i}"] = np.float64(found.hits), found.top
    if "official" in case.config:
        official = case.config["official"]
        z = case.inputs["z.official"]
        points = laplacian_change.ranked_points(z, official["percent_ranked"])
        found = change_scores.hits_at(z, official["events"], len(points))
        out["hits.official"] = np.float64(found.hits)
    return out


OPERATIONS = {
    "latent evolution sweep": run_sweep,
    "change scores over a sequence": run_scores,
    "LAD": run_lad,
    "Hits@n": run_hits,
}


def run(case):
    """Every output of the case, in the case's own layout."""
    return jax.device_get(OPERATIONS[case.model](case))
