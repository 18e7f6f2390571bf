"""CORAL's forward pass and training step beside the same in PyTorch, on one graph of random edges.

The numbers of nodes and edges are those of 3,600 reviewed changes of a real history; an edge is
used in both directions. PyTorch gathers and adds messages as `torch_geometric.nn.GCNConv` does,
with the normalization computed once.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from benchmarks.measure import TORCH_PYTHON, Contender, markdown, measure, ratio, write_report

NODES = 10183
EDGES = {
    "pr_user": 8870,
    "pr_file": 12136,
    "pr_word": 22746,
    "file_word": 7784,
    "word_word": 29657,
}
WIDTH, PAIRS = 64, 32768


def _arrays() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Stored edges of every relation, node pairs [2, PAIRS] and their labels."""
    rng = np.random.default_rng(0)
    # A few nodes have many neighbors, as popular words and busy people do.
    popular = (NODES * rng.random((2, sum(EDGES.values()))) ** 2).astype(np.int64)
    parts = np.split(popular, np.cumsum(list(EDGES.values()))[:-1], axis=1)
    edges = {name: part[:, part[0] != part[1]] for name, part in zip(EDGES, parts)}
    pairs = rng.integers(NODES, size=(2, PAIRS))
    return edges, pairs, (rng.random(PAIRS) < 0.5).astype(np.float32)


def jax_step(what: str):
    """One warm forward pass or training step of ours."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxmodels.graphs import coral
    from jaxmodels.graphs.graph import with_tables

    edges, pairs, labels = _arrays()
    module = coral.Coral(
        num_nodes=NODES, dims=(WIDTH, WIDTH), input="embedding", embed=WIDTH, relations=tuple(EDGES)
    )
    typed = coral.relations_graph(edges, None, module.relations, NODES)
    operator = with_tables(jax.tree.map(np.asarray, module.prepare(typed)))
    params = jax.jit(module.init)(jax.random.key(0), typed)["params"]
    optimizer = optax.adam(1e-2)

    def loss_of(params):
        z = module.apply({"params": params}, operator)
        return coral.link_loss(coral.pair_logits(z, jnp.asarray(pairs)), jnp.asarray(labels))

    @jax.jit
    def train(state):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), loss

    if what == "forward":
        forward = jax.jit(lambda params: module.apply({"params": params}, operator))
        return lambda: jax.block_until_ready(forward(params))
    held = [(params, optimizer.init(params))]

    def step():
        held[0], loss = train(held[0])
        jax.block_until_ready(loss)

    return step


def torch_step(what: str):
    """The same in PyTorch, eager."""
    import torch

    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    torch.manual_seed(0)
    edges, pairs, labels = _arrays()
    operators = []
    for stored in edges.values():
        index = torch.from_numpy(np.concatenate([stored, stored[::-1]], axis=1).copy())
        degree = torch.zeros(NODES).index_add_(0, index[1], torch.ones(index.shape[1]))
        factor = degree.clamp(min=1).rsqrt()
        operators.append((index, (factor[index[0]] * factor[index[1]])[:, None]))
    table = torch.nn.Embedding(NODES, WIDTH)
    layers = torch.nn.ModuleList(
        torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(6))
        for _ in range(2)
    )

    def layer(linears, x):
        y = linears[5](x)
        for linear, (index, weight) in zip(linears, operators):
            messages = linear(x)[index[0]] * weight
            y = y + torch.zeros_like(y).index_add_(0, index[1], messages)
        return y

    def forward():
        return layer(layers[1], torch.relu(layer(layers[0], table.weight)))

    pairs, labels = torch.from_numpy(pairs), torch.from_numpy(labels)
    optimizer = torch.optim.Adam([*table.parameters(), *layers.parameters()], 1e-2)

    def evaluate():
        with torch.no_grad():
            forward()

    def step():
        z = forward()
        logits = (z[pairs[0]] * z[pairs[1]]).sum(1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return evaluate if what == "forward" else step


def run(quick: bool = False) -> Path:
    """Write `results/coral_speed.md`."""
    rounds, steps = (2, 2) if quick else (8, 3)
    table = []
    for threads in (1, 2):
        if threads > len(os.sched_getaffinity(0)):
            continue
        for what in ("forward", "train"):
            contenders = [
                Contender("jax", "benchmarks.coral:jax_step", {"what": what}),
                Contender("torch", "benchmarks.coral:torch_step", {"what": what}, TORCH_PYTHON),
            ]
            samples = measure(contenders, threads, rounds, steps)
            ours, theirs = samples["jax"], samples["torch"]
            table.append(
                [
                    str(threads),
                    what,
                    ours.cell("wall"),
                    theirs.cell("wall"),
                    ratio(ours, [theirs], "wall"),
                    ratio(ours, [theirs], "cpu"),
                ]
            )
    head = ["threads", "what", "JAX", "PyTorch", "wall ratio", "CPU ratio"]
    body = (
        f"{NODES:,} nodes, {sum(EDGES.values()):,} edges in five relations, each in both "
        f"directions, width {WIDTH}, embedding input, {PAIRS:,} pairs in the loss, Adam. Ratios: "
        "JAX over PyTorch, of minima / of medians; below 1 JAX is faster.\n\n"
    )
    return write_report("coral_speed", "CORAL against PyTorch", body + markdown(head, table))
