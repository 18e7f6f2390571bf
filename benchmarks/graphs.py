"""2-layer GCN against PyTorch Geometric: forward, train step, memory of a step."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import TORCH_PYTHON, Contender, markdown, measure, ratio, write_report

# name -> (nodes, directed edges, features, hidden, classes)
SHAPES = {
    "Cora's size, hidden 16": (2_708, 10_556, 1_433, 16, 7),
    "Cora's size, hidden 256": (2_708, 10_556, 1_433, 256, 7),
    "100k nodes, 1M edges": (100_000, 1_000_000, 128, 128, 40),
}
RATE = 0.01
SUBGRAPH_NODES = 1_000


def _data(shape: str, seed: int = 0):
    import numpy as np

    nodes, edges, features, _, classes = SHAPES[shape]
    rng = np.random.default_rng(seed)
    half = rng.integers(0, nodes, (2, edges // 2))
    edge_index = np.concatenate([half, half[::-1]], axis=1)
    x = rng.normal(size=(nodes, features)).astype(np.float32)
    return edge_index, x, rng.integers(0, classes, nodes)


def _jax(shape: str, kind: str, layout: str, cached: bool):
    import jax
    import jax.numpy as jnp

    from jaxmodels.graphs.gnn import GNN
    from jaxmodels.graphs.graph import make_graph

    nodes, _, features, hidden, classes = SHAPES[shape]
    edge_index, x, labels = _data(shape)
    module = GNN(kind=kind, in_features=features, hidden=hidden, out=classes)
    graph = make_graph(edge_index, nodes, tables=layout == "tables")
    if cached:
        graph = jax.jit(module.prepare)(graph)
    examples = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), module.example_inputs())
    variables = jax.jit(module.init)(jax.random.key(0), *examples)
    put = lambda tree: jax.tree.map(jnp.asarray, tree)  # noqa: E731
    return module, variables, put(graph), jnp.asarray(x), jnp.asarray(labels)


def jax_forward(shape: str, kind: str = "gcn", layout: str = "tables", cached: bool = True):
    """The jitted forward pass; `layout` is "tables" or "list", `cached` normalizes beforehand."""
    import jax

    module, variables, graph, x, _ = _jax(shape, kind, layout, cached)
    forward = jax.jit(module.apply)
    return lambda: jax.block_until_ready(forward(variables, x, graph))


def _train_step(module):
    import jax
    import optax

    optimizer = optax.adam(RATE)

    def step(state, x, graph, labels):
        params, optimizer_state = state

        def loss(params):
            logits = module.apply({"params": params}, x, graph)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, optimizer_state = optimizer.update(grads, optimizer_state)
        return (optax.apply_updates(params, updates), optimizer_state), value

    return optimizer, jax.jit(step, donate_argnums=0)


def jax_train(shape: str, kind: str = "gcn", layout: str = "tables", cached: bool = True):
    """Cross-entropy over all nodes, gradients and Adam, one jitted call with donated state."""
    import jax

    module, variables, graph, x, labels = _jax(shape, kind, layout, cached)
    optimizer, compiled = _train_step(module)
    state = (variables["params"], optimizer.init(variables["params"]))

    def run() -> None:
        nonlocal state
        state, value = compiled(state, x, graph, labels)
        jax.block_until_ready((state, value))

    return run


def _torch(shape: str, kind: str, form: str):
    import torch
    import torch_geometric.nn as pyg

    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    nodes, _, features, hidden, classes = SHAPES[shape]
    edge_index, x, labels = (torch.as_tensor(a.copy()) for a in _data(shape))
    if form == "csr":
        values = torch.ones(edge_index.shape[1])
        size = (nodes, nodes)
        # Messages flow along the transposed matrix; this graph is symmetric.
        edge_index = torch.sparse_coo_tensor(edge_index, values, size).coalesce().to_sparse_csr()

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layer = pyg.GCNConv if kind == "gcn" else pyg.SAGEConv
            more = {"cached": form != "edges"} if kind == "gcn" else {}
            self.first, self.second = (
                layer(features, hidden, **more),
                layer(hidden, classes, **more),
            )

        def forward(self, x, graph):
            return self.second(torch.relu(self.first(x, graph)), graph)

    return Net(), edge_index, x, labels


def torch_forward(shape: str, kind: str = "gcn", form: str = "edges") -> Callable[[], None]:
    """PyTorch Geometric's forward; `form` is "edges", "cached" or "csr" (a sparse matrix)."""
    import torch

    model, graph, x, _ = _torch(shape, kind, form)
    model.eval()

    def run() -> None:
        with torch.inference_mode():
            model(x, graph)

    return run


def torch_train(shape: str, kind: str = "gcn", form: str = "edges") -> Callable[[], None]:
    """The same train step, `torch.optim.Adam` with `foreach`."""
    import torch

    model, graph, x, labels = _torch(shape, kind, form)
    optimizer = torch.optim.Adam(model.parameters(), RATE, foreach=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(x, graph), labels).backward()
        optimizer.step()

    return run


def memory(shape: str, layout: str, subgraph: bool = False) -> dict[str, float]:
    """MiB of a GCN train step by XLA's own account: temporaries, and all with the arguments."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmodels.graphs.graph import bucket_size, make_graph

    module, variables, graph, x, labels = _jax(shape, "gcn", layout, True)
    nodes, edges, features, hidden, _ = SHAPES[shape]
    if subgraph:
        nodes = SUBGRAPH_NODES
        rng = np.random.default_rng(0)
        edges = bucket_size(int(edges / SHAPES[shape][0] * nodes))
        graph = jax.jit(module.prepare)(make_graph(rng.integers(0, nodes, (2, edges)), nodes))
        x, labels = jnp.zeros((nodes, features)), jnp.zeros(nodes, int)
    optimizer, compiled = _train_step(module)
    state = (variables["params"], optimizer.init(variables["params"]))
    sizes = compiled.lower(state, x, graph, labels).compile().memory_analysis()
    mib = 2**20
    return {
        "features": nodes * features * 4 / mib,
        "messages": edges * hidden * 4 / mib,
        "temporaries": sizes.temp_size_in_bytes / mib,
        "all": (sizes.temp_size_in_bytes + sizes.argument_size_in_bytes) / mib,
    }


def run(quick: bool = False) -> Path:
    """Write `results/graphs.md`, again after every row."""
    rows: dict[str, list] = {"wall": [], "cpu": [], "setup": []}
    memories = []
    for shape in SHAPES:
        for layout in ("tables", "list"):
            m = memory(shape, layout)
            share = m["all"] / (m["features"] + m["messages"])
            memories.append([shape, layout, *(f"{v:.0f}" for v in m.values()), f"{share:.2f}"])
    m, whole = memory(shape, "list", subgraph=True), memory(shape, "list")
    share = m["all"] / whole["all"]
    label = f"subgraph of {SUBGRAPH_NODES} nodes"
    memories.append([label, "list", *(f"{v:.1f}" for v in m.values()), f"({share:.1%} of whole)"])
    path = write_report("graphs", TITLE, _body(rows, memories))
    for shape in SHAPES:
        large = "100k" in shape
        rounds, steps = (2, 1) if quick else (4, 1) if large else (10, 3)
        for what in ("forward", "train"):
            contenders = _contenders("gcn", shape, what)
            samples = measure(contenders, 1, rounds, steps)
            label = [shape, what]
            times = [samples[c.name] for c in contenders]
            ours = min(times[:2], key=lambda one: min(one.cpu, default=1e9))
            for clock in ("wall", "cpu"):
                cells = [one.cell(clock) for one in times]
                others = [t for c, t in zip(contenders, times) if c.name.startswith("PyG")]
                rows[clock].append([*label, *cells, ratio(ours, others, clock)])
            rows["setup"].append([*label, *(f"{one.setup:.1f}" for one in times)])
            path = write_report("graphs", TITLE, _body(rows, memories))
    return path


TITLE = "Graph layers against PyTorch Geometric"
FORMS = ("edges", "cached", "csr")


def _contenders(kind: str, shape: str, what: str) -> list[Contender]:
    ours = [
        Contender(f"JAX {layout}", f"benchmarks.graphs:jax_{what}", {
            "shape": shape, "kind": kind, "layout": layout
        })
        for layout in ("tables", "list")
    ]  # fmt: skip
    return ours + [
        Contender(
            f"PyG {form}",
            f"benchmarks.graphs:torch_{what}",
            {"shape": shape, "kind": kind, "form": form},
            TORCH_PYTHON,
        )
        for form in FORMS
    ]


def _body(rows: dict[str, list], memories: list) -> str:
    columns = ["JAX tables", "JAX list", *(f"PyG {form}" for form in FORMS)]
    head = ["graph", "step", *columns]
    return (
        "2-layer GCN, float32, one thread, random undirected graphs; train: cross-entropy over all "
        "nodes and Adam. JAX: `tables` are the neighbor tables of a graph that is used many "
        "times, `list` the padded edge list; normalization precomputed. PyG 2.8.1: `edges` is "
        "`edge_index` as most code has it, `cached` keeps the normalization, `csr` is a "
        "torch.sparse CSR matrix. Ratio: the better "
        "of our two (they are chosen by the graph's size) over the best PyG column, of minima / of "
        "medians; below 1 JAX is faster.\n\n"
        "## Process CPU time\n\n"
        + markdown([*head, "ratio"], rows["cpu"])
        + "\n## Wall time\n\n"
        + markdown([*head, "ratio"], rows["wall"])
        + "\n## Set-up in seconds (imports, tables, compilation, first step)\n\n"
        + markdown(head, rows["setup"])
        + "\n## Memory of a GCN train step, MiB, as XLA plans it\n\n"
        "Share: arguments and temporaries over features plus the messages of the wider layer.\n\n"
        + markdown(
            ["graph", "layout", "features", "messages", "temporaries", "all", "share"], memories
        )
    )
