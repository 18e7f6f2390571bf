"""Golden adapter of the DMF instrument: names, transposes and the choice of arguments."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from theory import closed_form, dynamics, landscape, quantities
from theory.factorization import product
from theory.problem import make_problem
from theory.stages import DELTA, H_DECADES, SWAP_DROP, zigzag
from theory.streaming import detector_report


def factors_of(inputs, prefix=""):
    """(W_1, W_2, ...) of the inputs."""
    count = sum(name.startswith(f"{prefix}W") for name in inputs)
    return tuple(jnp.asarray(inputs[f"{prefix}W{j}"]) for j in range(1, count + 1))


def problem_of(case):
    """The case's problem."""
    wanted = {
        "reconstruction": (),
        "completion": ("mask",),
        "sensing": ("A", "y"),
        "regression": ("X", "Y"),
    }[case.config["problem"]]
    data = {name: case.inputs[name] for name in wanted}
    return make_problem(case.config["problem"], target=case.inputs["M"], **data)


def trajectory_of(case, record=()):
    """The case's run, with the factors at every recorded row."""
    config = case.config
    return dynamics.simulate(
        problem_of(case),
        factors_of(case.inputs),
        optimizer=config["optimizer"],
        optimizer_kwargs=config["optimizer_kwargs"],
        lr=config["lr"],
        steps=config["steps"],
        record_every=config["record_every"],
        record=("loss", "grad_norm", "singular_values", "balancedness", *record),
        sigma=config["sigma"],
    )


def run_simulate(case):
    trajectory = trajectory_of(case, ("factors", "gradients", "product"))
    rows, problem = trajectory.rows, trajectory.problem
    with np.load(Path(case.directory) / "io.npz") as stored:
        hess_steps, hvp_step = stored["out.hess_steps"], int(stored["out.hvp_step"])

    def point(step):
        row = int(np.flatnonzero(rows["step"] == step)[0])
        return tuple(
            jnp.asarray(rows[f"W{j}"][row]) for j in range(1, len(trajectory.state.factors) + 1)
        )

    out = {name: rows[name] for name in ("step", "loss", "grad_norm", "singular_values")}
    out["balancedness"] = rows["balancedness"]
    out["hess_steps"], out["hvp_step"] = hess_steps, np.int64(hvp_step)
    out["hess_eigvals"] = np.stack(
        [landscape.hessian_spectrum(problem, point(step)).eigenvalues for step in hess_steps]
    )
    at = point(hvp_step)
    direction = tuple(jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape) for w in at)
    image = landscape.hvp(problem, at, direction)
    for j, (w, final, h) in enumerate(zip(at, trajectory.state.factors, image), start=1):
        out[f"hvp_point.{j}"], out[f"hvp.{j}"], out[f"Wfinal{j}"] = w, h, final
        out[f"grad0.{j}"] = rows[f"grad_W{j}"][0]
    out["W_final"] = rows["product"][-1]
    out = {name: np.asarray(value) for name, value in out.items()}
    return {**out, "detected": detected_of(trajectory)}


def detected_of(trajectory):
    """The streaming detectors' report under the case's names."""
    report = detector_report(trajectory.detector)
    escapes = [
        {
            "valley_step": escape.valley_step,
            "peak_step": escape.peak_step,
            "rank_before": escape.rank_before,
            "rank_after": escape.rank_after,
            "kind": escape.kind,
            "loss_drop_rel": escape.loss_drop,
        }
        for escape in report.escapes
    ]
    return {
        "h_decades": H_DECADES,
        "delta": DELTA,
        "drop_tol": SWAP_DROP,
        "escapes": escapes,
        "n_rank_stages": report.n_stages,
        "n_ring": report.n_rings,
        "activation_steps": list(report.activation_steps),
        "plateau_visited": list(report.plateau_visited),
        "final_rank": report.final_rank,
    }


def run_official_completion(case):
    config, inputs = case.config, case.inputs
    mask = np.zeros_like(inputs["M"])
    mask[inputs["rows"], inputs["cols"]] = 1.0
    # The official end-to-end matrix is the transpose of W_L ... W_1.
    problem = make_problem("completion", target=inputs["M"].T, mask=mask.T, loss_norm="mean")
    names = ("singular_values", "schatten", "adjusted_lr", "grad_rms")
    rows = dynamics.simulate(
        problem,
        factors_of(inputs),
        optimizer="group_rmsprop",
        optimizer_kwargs={"beta2": config["beta2"], "eps": config["eps"]},
        lr=config["lr"],
        steps=config["steps"],
        record_every=config["record_every"],
        record=("loss", "test_loss", "alignment", *names),
        sigma=(),
    ).rows
    out = {name: rows[name] for name in ("step", *names)}
    for name in ("diag_mean", "diag_std", "off_diag_mean", "off_diag_std"):
        out[name] = rows[name]
    out["loss_train"], out["loss_test"] = rows["loss"], rows["test_loss"]
    return out


def run_hessian_spectrum(case):
    problem = make_problem("reconstruction", target=case.inputs["M"])
    out = {}
    for i in range(len(case.config["subsets"])):
        factors = factors_of(case.inputs, f"p{i}.")
        out[f"p{i}.eigvals"] = landscape.hessian_spectrum(problem, factors).eigenvalues
        out[f"p{i}.loss"] = np.asarray(problem.loss(product(factors)))
    return out


def run_detect(case):
    out = {}
    for name in case.wanted:
        h, index = name.removeprefix("h").split(".escapes")
        out[name] = zigzag(case.inputs[f"log10_grad{index}"], float(h))
    return out


def run_metrics(case):
    out = {}
    for i in range(len(case.inputs)):
        s = jnp.linalg.svd(case.inputs[f"W{i}"], compute_uv=False)
        out[f"singular_values{i}"] = s
        out[f"effective_rank{i}"] = quantities.effective_rank(s)
        out[f"stable_rank{i}"] = quantities.stable_rank(s)
        out[f"nuclear{i}"] = quantities.nuclear_norm(s)
        out[f"numerical_rank{i}"] = quantities.numerical_rank(
            s, case.config["numerical_rank_rel_tol"]
        )
        for depth in (2, 3, 4):
            out[f"schatten_2_over_{depth}_{i}"] = quantities.schatten(s, depth)
    return {name: np.asarray(value) for name, value in out.items()}


def run_modes(case):
    with np.load(Path(case.directory) / "io.npz") as stored:
        marks = {name: stored[name] for name in stored.files if name.endswith("discrete_step")}
    out = {}
    for i, mode in enumerate(case.config["cases"]):
        depth, start, sigma = mode["L"], mode["s0"], mode["sigma"]
        steps = marks[f"out.c{i}.discrete_step"]
        descent = closed_form.mode_descent(start, sigma, depth, mode["lr_discrete"], int(steps[-1]))
        out[f"c{i}.s"] = closed_form.mode_flow(case.inputs[f"c{i}.t"], start, sigma, depth)
        out[f"c{i}.t_half"] = closed_form.half_rise_time(start, sigma, depth)
        out[f"c{i}.discrete_step"] = steps
        out[f"c{i}.discrete_s"] = descent[steps]
    return out


OPERATIONS = {
    "dmf.simulate": run_simulate,
    "dmf.detect_escapes": run_detect,
    "dmf.metrics": run_metrics,
    "dmf.hessian_spectrum": run_hessian_spectrum,
    "dmf.mode_flow / dmf.mode_gd": run_modes,
    "GroupRMSprop + matrix completion": run_official_completion,
}


def run(case):
    """Every output of the case, in the case's own layout."""
    return OPERATIONS[case.model](case)
