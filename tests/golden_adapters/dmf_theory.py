"""Golden adapter of the DMF instrument: names, transposes and the choice of arguments."""

import math
import re

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
    kind = case.config.get("problem", "reconstruction")
    wanted = {
        "reconstruction": (),
        "completion": ("mask",),
        "sensing": ("A", "y"),
        "regression": ("X", "Y"),
    }[kind]
    data = {name: case.inputs[name] for name in wanted}
    norm = case.config.get("loss_norm")
    return make_problem(kind, target=case.inputs.get("M"), loss_norm=norm, **data)


def trajectory_of(case, looked_at, record=()):
    """The case's run, with the factors at every recorded row and at the steps `looked_at`."""
    config = case.config
    inner = [int(step) for step in looked_at if step < config["steps"]]
    rate = "lr" if "lr" in config else "eta_hat"
    return dynamics.simulate(
        problem_of(case),
        factors_of(case.inputs),
        optimizer=config.get("optimizer", "gd"),
        optimizer_kwargs=config.get("optimizer_kwargs"),
        **{rate: config[rate]},
        steps=config["steps"],
        record_every=math.gcd(config.get("record_every", 1), *inner),
        record=("loss", "grad_norm", "singular_values", "balancedness", *record),
        sigma=config.get("sigma"),
    )


def run_simulate(case):
    nowhere = np.zeros(0, np.int64)
    steps, hess_steps = (case.outputs.get(name, nowhere) for name in ("step", "hess_steps"))
    hvp_step = case.outputs.get("hvp_step", np.int64(0))
    looked_at = [*steps.tolist(), *hess_steps.tolist(), int(hvp_step)]
    trajectory = trajectory_of(case, looked_at, ("factors", "gradients", "product"))
    rows, problem = trajectory.rows, trajectory.problem

    def point(step):
        row = int(np.flatnonzero(rows["step"] == step)[0])
        return tuple(
            jnp.asarray(rows[f"W{j}"][row]) for j in range(1, len(trajectory.state.factors) + 1)
        )

    asked = np.isin(rows["step"], steps)
    names = ("step", "loss", "grad_norm", "singular_values", "balancedness")
    out = {name: rows[name][asked] for name in names}
    out["hess_steps"], out["hvp_step"] = hess_steps, hvp_step
    if len(hess_steps):
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
    if trajectory.detector is not None:
        out["detected"] = detected_of(trajectory)
        listed = len(case.meta.get("detected", {}).get("plateau_visited", ()))
        pad_beyond_bottleneck(out["detected"], trajectory, case.config.get("sigma", ())[:listed])
    return out


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


def pad_beyond_bottleneck(detected, trajectory, sigma):
    """Entries of modes that a narrow factor cannot hold, where a case lists them.

    Our report ends at the bottleneck. Those modes never rise; the plateau below the first of them
    is visited when the last possible mode is learned.
    """
    width = len(detected["plateau_visited"])
    for r in range(width, len(sigma)):
        learned = trajectory.rows["singular_values"][:, r - 1] >= (1 - DELTA) * sigma[r - 1]
        detected["activation_steps"].append(None)
        detected["plateau_visited"].append(bool(learned.any()))


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
    for name in ALIGNMENT:
        out[name] = rows[name]
    out["loss_train"], out["loss_test"] = rows["loss"], rows["test_loss"]
    return out


ALIGNMENT = ("diag_mean", "diag_std", "off_diag_mean", "off_diag_std")


def tolerances(case):
    """Statistics of singular vectors mean nothing where singular values coincide (section 11)."""
    if case.model != "GroupRMSprop + matrix completion":
        return {}
    s = case.outputs["singular_values"]
    coincide = (s[:, :-1] - s[:, 1:] <= 1e-9 * s[:, :-1]).any(1)
    atol = np.where(coincide, np.inf, case.meta["atol"])
    return {f"out.{name}": {"atol": atol} for name in ALIGNMENT}


def run_hessian_spectrum(case):
    problem = problem_of(case)
    out = {}
    for i in sorted({int(n[1:].split(".")[0]) for n in case.inputs if re.match(r"p\d+\.", n)}):
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
    for i in (name[1:] for name in case.inputs):
        s = jnp.linalg.svd(case.inputs[f"W{i}"], compute_uv=False)
        out[f"singular_values{i}"] = s
        out[f"effective_rank{i}"] = quantities.effective_rank(s)
        out[f"stable_rank{i}"] = quantities.stable_rank(s)
        out[f"nuclear{i}"] = quantities.nuclear_norm(s)
        out[f"numerical_rank{i}"] = quantities.numerical_rank(
            s, case.config.get("numerical_rank_rel_tol", 1e-3)
        )
        for name in case.wanted:
            if found := re.fullmatch(rf"schatten_2_over_(\d+)_{i}", name):
                out[name] = quantities.schatten(s, int(found[1]))
    return {name: np.asarray(value) for name, value in out.items()}


def run_modes(case):
    out = {}
    for i, mode in enumerate(case.config["cases"]):
        depth, start, sigma = mode["L"], mode["s0"], mode["sigma"]
        if f"c{i}.t" in case.inputs:
            out[f"c{i}.s"] = closed_form.mode_flow(case.inputs[f"c{i}.t"], start, sigma, depth)
        if f"c{i}.t_half" in case.wanted:
            out[f"c{i}.t_half"] = closed_form.half_rise_time(start, sigma, depth)
        if f"c{i}.discrete_step" in case.wanted:
            steps = case.outputs[f"c{i}.discrete_step"]
            last = int(steps.max())
            descent = closed_form.mode_descent(start, sigma, depth, mode["lr_discrete"], last)
            out[f"c{i}.discrete_step"], out[f"c{i}.discrete_s"] = steps, descent[steps]
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
