"""Latent evolution's sweeps, JAX against PyTorch and NumPy: the same products, the same order."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import TORCH_PYTHON, Contender, markdown, measure, ratio, write_report

SHAPES = ((100, 16), (500, 8))  # nodes, targets in a step
WINDOW, RANK, SWEEPS, EPS = 5, 10, 30, 1e-10


def problem(num_nodes: int, targets: int):
    """Windows [b, w, n, n] of block-model graphs and starting factors, NumPy float32."""
    import numpy as np

    rng = np.random.default_rng(0)
    block = np.arange(num_nodes) * 4 // num_nodes
    chance = np.where(block[:, None] == block, 0.25, 0.05)
    upper = np.triu(rng.random((targets, WINDOW, num_nodes, num_nodes)) < chance, 1)
    graphs = (upper | np.swapaxes(upper, -1, -2)).astype(np.float32)
    shape = (targets, 1, num_nodes, RANK)
    u = np.repeat(rng.uniform(0.5, 1.5, shape) * 0.1**0.25 / RANK**0.5, WINDOW, axis=1)
    b = np.eye(RANK) + 0.1 * rng.random((targets, RANK, RANK))
    a = np.eye(RANK) + 0.01 * rng.random((targets, RANK, RANK))
    return graphs, u.astype(np.float32), b.astype(np.float32), a.astype(np.float32)


def jax_sweeps(num_nodes: int, targets: int) -> Callable[[], None]:
    """One jitted call: all sweeps of all targets, vmapped, J by inner products each sweep."""
    import jax
    import jax.numpy as jnp

    from jaxmodels.graphs.latent_evolution import Factors, fit

    graphs, *factors = map(jnp.asarray, problem(num_nodes, targets))

    @jax.jit
    def run(graphs, factors):
        def one(window, start):
            return fit(window, start, iters=SWEEPS, tol=0.0, directed=False, exact=False)

        found = jax.vmap(one)(graphs, factors)
        return found.factors, found.objective[:, -1]

    return lambda: jax.block_until_ready(run(graphs, Factors(*factors)))


def torch_sweeps(num_nodes: int, targets: int) -> Callable[[], None]:
    """The same sweeps, batched over targets, Gram products instead of n x n ones, no gradients."""
    import torch

    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    graphs, u0, b0, a0 = map(torch.from_numpy, problem(num_nodes, targets))
    squares = (graphs**2).sum((1, 2, 3))

    def run() -> None:
        with torch.inference_mode():
            u, b, a = list(u0.unbind(1)), b0, a0
            seen = [graphs[:, s] @ u[s] for s in range(WINDOW)]
            for _ in range(SWEEPS):
                bt, at = b.mT, a.mT
                for s in range(WINDOW):
                    gram = u[s].mT @ u[s]
                    num = seen[s] @ (bt + b)
                    den = u[s] @ (b @ gram @ bt + bt @ gram @ b)
                    if s > 0:
                        num, den = num + u[s - 1] @ a, den + u[s]
                    if s < WINDOW - 1:
                        num, den = num + u[s + 1] @ at, den + u[s] @ (a @ at)
                    u[s] = u[s] * (num / (den + EPS)).sqrt().sqrt()
                seen = [graphs[:, s] @ u[s] for s in range(WINDOW)]
                grams = [x.mT @ x for x in u]
                top = sum(x.mT @ y for x, y in zip(u, seen))
                b = b * top / (sum(g @ b @ g for g in grams) + EPS)
                moved = sum(x.mT @ y for x, y in itertools.pairwise(u))
                a = a * moved / (sum(grams[:-1]) @ a + EPS)
                cross = sum(((x @ b) * y).sum((1, 2)) for x, y in zip(u, seen))
                model = sum(((b @ g) * (g @ b)).sum((1, 2)) for g in grams)
                evolution = sum(((y - x @ a) ** 2).sum((1, 2)) for x, y in itertools.pairwise(u))
                squares - 2 * cross + model + evolution

    return run


def run(quick: bool = False) -> Path:
    """Write `results/graph_cpd.md`."""
    rounds, steps = (3, 1) if quick else (8, 2)
    rows: dict[str, list] = {"wall": [], "cpu": []}
    path = None
    for threads in (1, 2):
        if threads > len(os.sched_getaffinity(0)):
            continue
        for num_nodes, targets in SHAPES:
            size = {"num_nodes": num_nodes, "targets": targets}
            contenders = [
                Contender("jax", "benchmarks.graph_cpd:jax_sweeps", size),
                Contender("torch", "benchmarks.graph_cpd:torch_sweeps", size, TORCH_PYTHON),
            ]
            samples = measure(contenders, threads, rounds, steps)
            ours, theirs = samples["jax"], samples["torch"]
            for kind in ("wall", "cpu"):
                cells = [one.cell(kind) for one in (ours, theirs)]
                label = [threads, num_nodes, targets]
                rows[kind].append([*label, *cells, ratio(ours, [theirs], kind)])
            path = write_report(
                "graph_cpd", "Latent evolution's sweeps against PyTorch", _body(rows)
            )
    return path


def _body(rows: dict[str, list]) -> str:
    head = ["threads", "n", "targets", "JAX", "PyTorch eager", "ratio of minima / medians"]
    return (
        f"{SWEEPS} sweeps of every target, w {WINDOW}, k {RANK}, float32, symmetric dense graphs; "
        "J is evaluated after every sweep.\n\nWall time:\n\n"
        + markdown(head, rows["wall"])
        + "\nProcess CPU time:\n\n"
        + markdown(head, rows["cpu"])
    )
