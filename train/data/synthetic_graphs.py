"""Synthetic dynamic graphs with known change points, seeded, on NumPy.

The block-model protocol is that of the official code of LAD, shenyangHuang/LAD@5833023: 151
snapshots (one initial and 150 steps); steps 15, 30, 60, 75, 90, 105, 135 are changes, which is
snapshots 16, 31, 61, 76, 91, 106, 136. At a change all pairs are drawn afresh from the new model;
otherwise a pair keeps its state with probability 1 - `resample` and is drawn again with
probability `resample`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

STEPS = 150
CHANGE_STEPS = (15, 30, 60, 75, 90, 105, 135)
# The official structures, as numbers of equal blocks; the first snapshot has the second one.
BLOCK_COUNTS = (2, 4, 10)
FIRST_STRUCTURE = 1
ATTACHMENTS = (1, 3, 5)  # Barabasi-Albert
DENSITIES = (0.02, 0.05, 0.1)  # Erdos-Renyi
KEPT_EDGES = 0.8  # rewired
KINDS = (
    "pure",
    "hybrid",
    "evolving",
    "shuffle",
    "barabasi_albert",
    "erdos_renyi",
    "rewired",
)


def change_indices(steps: int = STEPS, changes: Sequence[int] = CHANGE_STEPS) -> tuple[int, ...]:
    """Snapshot indices of the change steps: one more, for the initial snapshot comes first."""
    return tuple(t + 1 for t in changes if t < steps)


def synthetic_sequence(
    kind: str,
    *,
    seed: int,
    num_nodes: int = 100,
    steps: int = STEPS,
    changes: Sequence[int] = CHANGE_STEPS,
    p_in: float = 0.25,
    p_ex: float = 0.05,
    resample: float = 0.1,
    increment: float = 0.10,
    base: str = "les_miserables",
    fresh: bool = True,
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Snapshots uint8 [steps + 1, n, n], symmetric with a zero diagonal, and the change indices.

    Kinds:
      pure: every change goes to the next of 2, 4, 10 equal blocks (from 4 on).
      hybrid: changes alternate between an event (for one snapshot p_ex grows by `increment`) and a
        new block structure, an event first.
      evolving: pure, all densities times 1 + 0.5 sin(2 pi t / 24) + 0.004 t.
      shuffle: four blocks whose members are permuted at every change; spectra stay as they were.
      barabasi_albert, erdos_renyi: m among 1, 3, 5, p among 0.02, 0.05, 0.1, in turn.
      rewired: a real graph of networkx (`base`) with its own n; each of its edges is there with
        probability 0.8, others at the rate that keeps the density; a change permutes its nodes.

    Args:
      p_in, p_ex: probability of a pair inside and across blocks. resample: a above.
      fresh: False makes changes harder than the protocol: pairs go on being drawn again with
        probability `resample`, from the new model. Otherwise a change is also a break in time.

    Raises ValueError: an unknown kind, or a number out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}; known: {', '.join(KINDS)}")
    for name, value in (("p_in", p_in), ("p_ex", p_ex), ("resample", resample)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} = {value} must be in [0, 1]")
    if num_nodes < 2 or steps < 1:
        raise ValueError(f"num_nodes = {num_nodes} must be at least 2 and steps = {steps} 1")
    rng = np.random.default_rng(seed)
    model = _models(kind, rng, num_nodes, p_in, p_ex, increment, base)
    marked = set(changes)
    snapshots = [_draw(rng, model(0, False))]
    for step in range(steps):
        # The official loop counts from the initial snapshot: step t makes snapshot t + 1.
        change = step in marked
        drawn = _draw(rng, model(step + 1, change))
        if not (change and fresh):
            again = _symmetric(rng.random(drawn.shape) < resample)
            drawn = np.where(again, drawn, snapshots[-1])
        snapshots.append(drawn)
    return np.stack(snapshots).astype(np.uint8), change_indices(steps, changes)


def _symmetric(upper: np.ndarray) -> np.ndarray:
    """The strict upper triangle mirrored."""
    upper = np.triu(upper, 1)
    return upper | upper.T


def _draw(rng: np.random.Generator, model) -> np.ndarray:
    """A snapshot of a model: a matrix of probabilities, or a function that draws one itself."""
    if callable(model):
        return model()
    return _symmetric(rng.random(model.shape) < model)


def _blocks(num_nodes: int, count: int) -> np.ndarray:
    """Block numbers [n] of `count` blocks whose sizes differ by at most one."""
    return np.arange(num_nodes) * count // num_nodes


def _probabilities(blocks: np.ndarray, p_in: float, p_ex: float) -> np.ndarray:
    return np.where(blocks[:, None] == blocks[None, :], p_in, p_ex)


def _models(kind, rng, num_nodes, p_in, p_ex, increment, base) -> Callable:
    """`(snapshot index, is a change) -> model`; keeps the present structure between calls."""
    turn = FIRST_STRUCTURE
    event_next = True
    members = _blocks(num_nodes, 4)
    graph = _base_graph(base) if kind == "rewired" else None
    strays = 0.0 if graph is None else _stray_rate(graph)

    def model(index: int, change: bool):
        nonlocal turn, event_next, members, graph
        event = False
        if change and kind == "hybrid":
            event, event_next = event_next, not event_next
        if change and not event:
            turn = (turn + 1) % 3
            if kind == "shuffle":
                members = rng.permutation(members)
            if kind == "rewired":
                order = rng.permutation(len(graph))
                graph = graph[np.ix_(order, order)]
        if kind == "shuffle":
            return _probabilities(members, p_in, p_ex)
        if kind == "erdos_renyi":
            return np.full((num_nodes, num_nodes), DENSITIES[turn])
        if kind == "barabasi_albert":
            return lambda: _barabasi_albert(rng, num_nodes, ATTACHMENTS[turn])
        if kind == "rewired":
            return np.where(graph, KEPT_EDGES, strays)
        blocks = _blocks(num_nodes, BLOCK_COUNTS[turn])
        chances = _probabilities(blocks, p_in, min(1.0, p_ex + increment) if event else p_ex)
        if kind == "evolving":
            grown = 1 + 0.5 * math.sin(2 * math.pi * index / 24) + 0.004 * index
            chances = np.clip(chances * grown, 0, 1)
        return chances

    return model


def _stray_rate(graph: np.ndarray) -> float:
    """Chance of a pair that is no edge, such that the expected number of edges stays."""
    edges = graph.sum()
    return float((1 - KEPT_EDGES) * edges / (graph.size - len(graph) - edges))


def _barabasi_albert(rng: np.random.Generator, num_nodes: int, m: int) -> np.ndarray:
    """A preferential-attachment graph, its nodes in order of age."""
    import networkx

    graph = networkx.barabasi_albert_graph(num_nodes, m, seed=int(rng.integers(2**31)))
    return networkx.to_numpy_array(graph, nodelist=range(num_nodes)).astype(bool)


def _base_graph(name: str) -> np.ndarray:
    """Adjacency (bool) of a real graph that comes with networkx."""
    import networkx

    known = {
        "karate": networkx.karate_club_graph,
        "les_miserables": networkx.les_miserables_graph,
        "davis": networkx.davis_southern_women_graph,
        "florentine": networkx.florentine_families_graph,
    }
    if name not in known:
        raise ValueError(f"base {name!r}; known: {', '.join(known)}")
    return networkx.to_numpy_array(known[name](), weight=None) > 0
