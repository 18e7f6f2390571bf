"""Change-point detection over a sequence of snapshots: one small factorization per target.

Target t (t = w..T-1) is explained by the w snapshots before it (`latent_evolution`), extrapolated
one step, and compared with the real snapshot (`change_scores`). Nothing at t depends on what comes
after t, and nothing is learned across sequences. Rows of one shape go through one compiled
function, so that sequences of any length share it. Axis names: T snapshots, b rows, w window, n
nodes, k rank, e padded edges.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from jaxmodels.graphs import change_scores, latent_evolution
from jaxmodels.graphs.change_scores import Distances
from jaxmodels.graphs.latent_evolution import EdgeWindow, Factors

SCORERS = ("frobenius", "spectral", "both")
# Above this many nodes the n x n products cost more than sums over edges.
SPARSE_ABOVE = 2000
# What is left of a latent entry that a warm start takes over; zero could not be left again.
_WARM_FLOOR = 1e-6
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Options:
    """How a target is fitted and scored.

    Attributes:
      window: w. rank: k. alpha: weight of the prediction in the mix.
      gamma, lam, iters, tol, eps, order: as in `latent_evolution.fit`.
      scorer: frobenius (on adjacency), spectral (on Laplacian spectra), or both.
      signature_size: singular values in a signature; 0: all n.
      warm_start: start from the previous target's factors, shifted by one; targets then go one
        after another.
    """

    window: int = 5
    rank: int = 10
    alpha: float = 0.5
    gamma: float = 1.0
    lam: float = 0.0
    iters: int = 50
    tol: float = 1e-5
    eps: float = latent_evolution.EPS
    order: str = "gauss_seidel"
    scorer: str = "frobenius"
    signature_size: int = 0
    warm_start: bool = False

    def check(self, num_nodes: int, num_snapshots: int | None = None) -> None:
        """Raise ValueError naming the option that does not fit n nodes and T snapshots."""
        latent_evolution.check_hyperparameters(
            rank=self.rank, num_nodes=num_nodes, gamma=self.gamma, lam=self.lam, alpha=self.alpha
        )
        if self.window < 1:
            raise ValueError(f"window w = {self.window} must be at least 1")
        if self.iters < 1:
            raise ValueError(f"iters = {self.iters} must be at least 1")
        if self.scorer not in SCORERS:
            raise ValueError(f"scorer {self.scorer!r}; known: {', '.join(SCORERS)}")
        if self.order not in latent_evolution.ORDERS:
            raise ValueError(f"order {self.order!r}; known: {', '.join(latent_evolution.ORDERS)}")
        if not 0 <= self.signature_size <= num_nodes:
            raise ValueError(f"signature_size = {self.signature_size} must be in 0..{num_nodes}")
        if num_snapshots is not None and num_snapshots <= self.window:
            raise ValueError(
                f"need at least w+1 snapshots: {num_snapshots} given, window w = {self.window}"
            )

    @property
    def spectral(self) -> bool:
        return self.scorer != "frobenius"

    @property
    def signature_entries(self) -> int | None:
        return self.signature_size or None


class Scored(NamedTuple):
    """What one target gives; leading axis b when batched.

    Attributes:
      frobenius: distances on adjacency.
      objective: [iters + 1] J before the first sweep and after each. sweeps: [] sweeps made.
      factors: the fitted factors. prediction: [n, n], None for sparse rows.
    """

    frobenius: Distances
    objective: jax.Array
    sweeps: jax.Array
    factors: Factors
    prediction: jax.Array | None


class Detection(NamedTuple):
    """A scored sequence.

    Attributes:
      scores: Z* [T] of the chosen scorer (Frobenius for both), zero up to and including index w.
      frobenius: distances [T] on adjacency, zero before w.
      spectral: distances [T] on signatures, or None.
      signatures: [T, r] of the snapshots, or None.
      objective: [T - w, iters + 1]. sweeps: [T - w].
      factors: of the last target.
      predictions: [T - w, n, n] where they were kept, else None.
    """

    scores: np.ndarray
    frobenius: Distances
    spectral: Distances | None
    signatures: np.ndarray | None
    objective: np.ndarray
    sweeps: np.ndarray
    factors: Factors
    predictions: np.ndarray | None


def starting_factors(rng, target, row, options: Options, num_nodes: int, dtype) -> Factors:
    """Fresh factors of a target: a function of (rng, target) and the window's mean alone."""
    if "senders" in row:
        mean = row["weights"][:-1].sum() / (options.window * float(num_nodes) ** 2)
    elif "observed" in row:
        observed = row["observed"][:-1].astype(dtype)
        mean = (row["window"] * observed).sum() / jnp.maximum(observed.sum(), 1.0)
    else:
        mean = row["window"].mean(dtype=dtype)
    return latent_evolution.initial_factors(
        jax.random.fold_in(rng, target),
        mean.astype(dtype),
        window=options.window,
        num_nodes=num_nodes,
        rank=options.rank,
        dtype=dtype,
    )


def warm_factors(factors: Factors) -> Factors:
    """The previous target's factors shifted by one, lifted off zero."""
    moved = latent_evolution.shift_factors(factors)
    return jax.tree.map(lambda x: jnp.maximum(x, _WARM_FLOOR * x.mean() + 1e-30), moved)


def score_row(row: dict[str, Any], factors: Factors, options: Options, directed: bool) -> Scored:
    """Fit one window from `factors` on and score the snapshot after it.

    Args:
      row: dense `window` [w, n, n], `snapshot` [n, n] and perhaps `affinity` [n, n] and `observed`
        [w + 1, n, n] (the last: which entries of the snapshot count); or sparse, see `sparse_rows`.
    """
    dtype = factors.U.dtype
    sparse = "senders" in row
    if sparse:
        weights = row["weights"].astype(dtype)
        window = EdgeWindow(row["senders"][:-1], row["receivers"][:-1], weights[:-1])
        seen = weights[:-1].any()
        observed = None
    else:
        window = row["window"].astype(dtype)
        observed = row.get("observed")
        if observed is not None:
            window = window * observed[:-1].astype(dtype)
        seen = window.any()
    found = latent_evolution.fit(
        window,
        factors,
        iters=options.iters,
        tol=options.tol,
        mask=None if observed is None else observed[:-1],
        affinity=row.get("affinity"),
        lam=options.lam,
        gamma=options.gamma,
        eps=options.eps,
        order=options.order,
        directed=directed,
        # The exact residual costs as much as the sweep; it only decides when to stop.
        exact=False,
    )
    if sparse:
        distances = _sparse_distances(row, weights, found.factors, seen, options.alpha)
        return Scored(distances, found.objective, found.sweeps, found.factors, None)
    # After nothing, nothing is expected.
    prediction = latent_evolution.predict(found.factors) * seen
    snapshot = row["snapshot"].astype(dtype)
    if observed is None:
        normal, compared = window.mean(0), prediction
    else:
        seen_times = observed[:-1].astype(dtype).sum(0)
        here = observed[-1].astype(dtype)
        # Entries never seen have no normal value.
        normal = here * window.sum(0) / jnp.maximum(seen_times, 1.0)
        snapshot, compared = snapshot * here, prediction * here * (seen_times > 0)
        snapshot = snapshot * (seen_times > 0)
    distances = change_scores.frobenius_distances(normal, snapshot, compared, options.alpha)
    return Scored(distances, found.objective, found.sweeps, found.factors, prediction)


def _sparse_distances(row, weights, factors, seen, alpha) -> Distances:
    """`frobenius_distances` over edges: |U B U^T|^2 = tr(B S B^T S) with S = U^T U."""
    u = latent_evolution.next_state(factors)
    left = jnp.matmul(u, factors.B, precision=_HIGHEST)
    gram = jnp.matmul(u.T, u, precision=_HIGHEST)
    b_gram = jnp.matmul(factors.B, gram, precision=_HIGHEST)
    gram_b = jnp.matmul(gram, factors.B, precision=_HIGHEST)

    def inner(senders, receivers, weights):
        return (weights * (left[senders] * u[receivers]).sum(-1)).sum()

    senders, receivers = row["senders"], row["receivers"]
    actual = weights[-1]
    norm_a = jnp.sqrt((actual**2).sum())
    norm_p = jnp.sqrt((b_gram * gram_b).sum()) * seen
    norm_m = row["mean_norm"].astype(u.dtype)
    a_p = inner(senders[-1], receivers[-1], actual) * seen
    a_m = (actual * row["mean_here"].astype(u.dtype)).sum()
    p_m = seen * inner(
        senders[:-1].reshape(-1), receivers[:-1].reshape(-1), weights[:-1].reshape(-1)
    )
    p_m = p_m / weights[:-1].shape[0]

    def over(x, *norms):
        scale = functools.reduce(jnp.multiply, norms)
        return x / jnp.where(scale > 0, scale, 1.0)

    # The mix is alpha p/|p| + (1 - alpha) m/|m|.
    a_v = alpha * over(a_p, norm_p) + (1 - alpha) * over(a_m, norm_m)
    square = (
        alpha**2 * (norm_p > 0)
        + (1 - alpha) ** 2 * (norm_m > 0)
        + 2 * alpha * (1 - alpha) * over(p_m, norm_p, norm_m)
    )

    def distance(product, norm):
        both = (norm_a == 0) & (norm == 0)
        cosine = jnp.abs(over(product, norm_a, norm))
        return jnp.where(both, 0.0, jnp.maximum(1.0 - cosine, 0.0))

    return Distances(distance(a_p, norm_p), distance(a_m, norm_m), distance(a_v, jnp.sqrt(square)))


def score_rows(
    rows: dict[str, Any],
    targets: jax.Array,
    rng: jax.Array,
    options: Options,
    *,
    directed: bool,
    num_nodes: int,
    dtype: Any = jnp.float32,
    initial: Factors | None = None,
    previous: Factors | None = None,
    continues: jax.Array | bool = False,
) -> Scored:
    """Score b rows, each on its own (`vmap`), or one after another where the start is warm.

    Args:
      rows: name -> [b, ...], see `score_row`. targets: [b] int32.
      initial: factors to start from, with a leading axis b, in place of drawn ones.
      previous: factors of the target before the first row, for a warm start; `continues` says
        whether they are.
    """

    def cold(row, target):
        return starting_factors(rng, target, row, options, num_nodes, dtype)

    if not options.warm_start:
        start = jax.vmap(cold)(rows, targets) if initial is None else initial
        return jax.vmap(lambda row, f: score_row(row, f, options, directed))(rows, start)

    def one(carry, inputs):
        before, known, last = carry
        row, target = inputs
        fresh = cold(row, target)
        use = known & (target == last + 1)
        start = jax.tree.map(lambda a, b: jnp.where(use, a, b), warm_factors(before), fresh)
        found = score_row(row, start, options, directed)
        return (found.factors, jnp.bool_(True), target), found

    if previous is None:
        previous, continues = jax.tree.map(lambda x: x[0], jax.vmap(cold)(rows, targets)), False
    carry = (previous, jnp.asarray(continues, bool), targets[0] - 1)
    return jax.lax.scan(one, carry, (rows, targets))[1]


@functools.partial(jax.jit, static_argnames=("options", "directed", "num_nodes", "dtype", "keep"))
def _score_batch(rows, targets, rng, initial, previous, continues, count, *, options, directed,
                 num_nodes, dtype, keep):  # fmt: skip
    found = score_rows(
        rows, targets, rng, options, directed=directed, num_nodes=num_nodes, dtype=dtype,
        initial=initial, previous=previous, continues=continues,
    )  # fmt: skip
    # Rows after the first `count` only fill the batch.
    last = jax.tree.map(lambda x: x[count - 1], found.factors)
    signatures = None
    if options.spectral:
        signatures = change_scores.signature(found.prediction, options.signature_entries)
    return found._replace(factors=last, prediction=found.prediction if keep else None), signatures


@functools.partial(jax.jit, static_argnames=("size", "dtype"))
def _signatures(snapshots, *, size, dtype):
    return change_scores.signature(snapshots.astype(dtype), size)


def dense_rows(snapshots: np.ndarray, targets: Sequence[int], window: int) -> dict[str, np.ndarray]:
    """Rows of targets from snapshots [T, n, n]: `window` [b, w, n, n], `snapshot` [b, n, n]."""
    return {
        "window": np.stack([snapshots[t - window : t] for t in targets]),
        "snapshot": np.stack([snapshots[t] for t in targets]),
    }


def edge_capacity(snapshots: Sequence[scipy.sparse.spmatrix]) -> int:
    """Edge slots that hold every snapshot: the next power of two, at least 16."""
    most = max((g.nnz for g in snapshots), default=0)
    return max(16, 1 << max(most - 1, 0).bit_length())


def sparse_rows(
    snapshots: Sequence[scipy.sparse.spmatrix],
    targets: Sequence[int],
    window: int,
    capacity: int | None = None,
) -> dict[str, np.ndarray]:
    """Rows of targets from sparse snapshots (n x n, duplicates summed).

    Returns `senders`, `receivers` int32 and `weights` float32 [b, w + 1, e] (the last of the w + 1
    is the snapshot itself), `mean_here` [b, e], the window's mean at the snapshot's edges, and
    `mean_norm` [b], the mean's Frobenius norm.
    """
    capacity = edge_capacity(snapshots) if capacity is None else capacity
    padded = []
    for t, graph in enumerate(snapshots):
        graph = graph.tocoo()
        if graph.nnz > capacity:
            raise ValueError(f"snapshot {t} has {graph.nnz} edges, more than {capacity} slots")
        room = (0, capacity - graph.nnz)
        padded.append(
            (
                np.pad(graph.row.astype(np.int32), room),
                np.pad(graph.col.astype(np.int32), room),
                np.pad(graph.data.astype(np.float32), room),
            )
        )
    out: dict[str, list] = {
        k: [] for k in ("senders", "receivers", "weights", "mean_here", "mean_norm")
    }
    for t in targets:
        for name, i in (("senders", 0), ("receivers", 1), ("weights", 2)):
            out[name].append(np.stack([padded[s][i] for s in range(t - window, t + 1)]))
        mean = scipy.sparse.csr_matrix(sum(snapshots[t - window : t]) / window)
        at = np.asarray(mean[padded[t][0], padded[t][1]]).reshape(-1)
        out["mean_here"].append(np.where(padded[t][2] > 0, at, 0).astype(np.float32))
        out["mean_norm"].append(np.float32(np.sqrt((mean.data**2).sum())))
    return {name: np.stack(values) for name, values in out.items()}


def detect(
    snapshots,
    options: Options = Options(),
    *,
    seed: int = 0,
    directed: bool = True,
    mask: np.ndarray | None = None,
    affinity: np.ndarray | None = None,
    initial: tuple[Any, Any, Any] | None = None,
    batch: int = 16,
    sparse: bool | None = None,
    keep_predictions: bool = False,
) -> Detection:
    """Score every snapshot from index w on.

    Args:
      snapshots: [T, n, n] non-negative, or a sequence of scipy sparse matrices (n, n).
      seed: of the starting factors; each target draws its own.
      directed: False promises symmetric snapshots.
      mask: [T, n, n] of 0 and 1, the entries that are known; others are neither fitted nor
        compared. affinity: W [n, n] for lam > 0.
      initial: (U [T - w, n, k] the same for all w snapshots of a target, B [k, k], A [k, k]).
      batch: targets per compiled call; bounds the memory.
      sparse: sums over edges instead of n x n products; default for n > 2,000.
      keep_predictions: also return the predicted snapshots.

    Raises: ValueError for each mistake, naming it.
    """
    is_sparse = len(snapshots) > 0 and scipy.sparse.issparse(snapshots[0])
    shapes = {np.shape(g) for g in snapshots}
    if len(shapes) > 1 or not is_sparse:
        graphs = latent_evolution.check_window(
            snapshots, mask, affinity, lam=options.lam, directed=directed
        )
    else:
        graphs = [scipy.sparse.csr_matrix(g) for g in snapshots]
        check_sparse(graphs, directed=directed)
    length, num_nodes = len(graphs), graphs[0].shape[-1]
    options.check(num_nodes, length)
    sparse = num_nodes > SPARSE_ABOVE if sparse is None else sparse
    if sparse and (options.spectral or mask is not None or keep_predictions):
        raise ValueError("a sparse run forms no n x n matrix: no spectra, masks or predictions")
    if options.spectral and mask is not None:
        raise ValueError(
            f"scorer {options.scorer!r} with a mask: a spectrum is that of whole snapshots; "
            "frobenius leaves unknown entries out"
        )
    if initial is not None and options.warm_start:
        raise ValueError("initial factors of every target and warm_start exclude each other")
    if sparse and not is_sparse:
        graphs = [scipy.sparse.csr_matrix(g) for g in graphs]
    elif is_sparse and not sparse:
        graphs = np.stack([g.toarray() for g in graphs])
    dtype = _float_type(graphs[0].dtype)
    if initial is not None:
        initial = _check_initial(initial, length - options.window, options, dtype)

    signatures = None
    if options.spectral:
        signatures = np.asarray(
            _signatures(jnp.asarray(graphs), size=options.signature_entries, dtype=dtype)
        )
    capacity = edge_capacity(graphs) if sparse else None
    rng, all_targets = jax.random.key(seed), np.arange(options.window, length)
    batch = min(batch, len(all_targets))
    parts, predicted, last = [], [], None
    for begin in range(0, len(all_targets), batch):
        targets = all_targets[begin : begin + batch]
        # The last rows are repeated, so that all calls have one shape.
        filled = np.concatenate([targets, np.full(batch - len(targets), targets[-1])])
        if sparse:
            rows = sparse_rows(graphs, filled, options.window, capacity)
        else:
            rows = dense_rows(graphs, filled, options.window)
            if mask is not None:
                rows["observed"] = np.stack([mask[t - options.window : t + 1] for t in filled])
        if affinity is not None and options.lam > 0:
            rows["affinity"] = np.broadcast_to(affinity, (batch, *np.shape(affinity)))
        start = None
        if initial is not None:
            start = Factors(*(x[filled - options.window] for x in initial))
        found, signature = _score_batch(
            rows, jnp.asarray(filled, jnp.int32), rng, start, last, last is not None, len(targets),
            options=options, directed=directed, num_nodes=num_nodes, dtype=dtype,
            keep=keep_predictions,
        )  # fmt: skip
        last = found.factors if options.warm_start else None
        factors = found.factors
        host = jax.device_get(found._replace(factors=None))
        count = len(targets)
        parts.append(jax.tree.map(lambda x, count=count: x[:count], host))
        if signature is not None:
            predicted.append(np.asarray(signature)[: len(targets)])
    whole = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    frobenius = Distances(*(_from_index(x, options.window) for x in whole.frobenius))
    spectral = None
    if options.spectral:
        spectral = _spectral(signatures, np.concatenate(predicted), options)
    chosen = spectral if options.scorer == "spectral" else frobenius
    return Detection(
        scores=change_scores.rises(chosen.mixed, options.window),
        frobenius=frobenius,
        spectral=spectral,
        signatures=signatures,
        objective=whole.objective,
        sweeps=whole.sweeps,
        factors=factors,
        predictions=whole.prediction,
    )


def alpha_sweep(
    snapshots: np.ndarray, predictions: np.ndarray, window: int, alphas: Sequence[float]
) -> dict[float, np.ndarray]:
    """Z* [T] for every alpha from one detection's kept predictions [T - w, n, n] (Frobenius)."""
    graphs = np.asarray(snapshots, np.float32)
    found: dict[float, list[float]] = {alpha: [0.0] * window for alpha in alphas}
    for t in range(window, len(graphs)):
        normal = graphs[t - window : t].mean(0)
        for alpha in alphas:
            value = _frobenius_row(normal, graphs[t], predictions[t - window], alpha)
            found[alpha].append(float(value))
    return {a: change_scores.rises(np.array(z), window) for a, z in found.items()}


@jax.jit
def _frobenius_row(normal, snapshot, prediction, alpha):
    return change_scores.frobenius_distances(normal, snapshot, prediction, alpha).mixed


def _float_type(dtype):
    """float32 stays; integers and float64 are computed in JAX's default precision."""
    narrow = np.dtype(dtype) in (np.float32, np.float16) or not jax.config.jax_enable_x64
    return jnp.float32 if narrow else jnp.float64


def _check_initial(initial, count: int, options: Options, dtype) -> Factors:
    u, b, a = (np.asarray(x) for x in initial)
    if u.shape[:1] != (count,) or u.shape[-1:] != (options.rank,):
        raise ValueError(f"initial U has shape {u.shape}; wanted [{count}, n, {options.rank}]")
    latent_evolution.check_factors(Factors(u, b, a))
    repeated = np.repeat(u[:, None], options.window, axis=1)
    wide = (count, *b.shape)
    parts = (repeated, np.broadcast_to(b, wide), np.broadcast_to(a, wide))
    return Factors(*(jnp.asarray(x, dtype) for x in parts))


def _from_index(values: np.ndarray, window: int) -> np.ndarray:
    """Values of targets w.. placed at their indices [T]; zero before."""
    return np.concatenate([np.zeros(window, values.dtype), values])


@functools.partial(jax.jit, static_argnames=("options",))
def _spectral_rows(contexts, actual, predicted, *, options):
    return change_scores.spectral_distances(contexts, actual, predicted, options.alpha)


def _spectral(signatures, predicted, options: Options) -> Distances:
    w = options.window
    contexts = np.stack([signatures[t - w : t] for t in range(w, len(signatures))])
    found = _spectral_rows(contexts, signatures[w:], predicted, options=options)
    return Distances(*(_from_index(np.asarray(x), w) for x in found))


def check_sparse(snapshots: Sequence[scipy.sparse.spmatrix], *, directed: bool) -> None:
    """The checks of `latent_evolution.check_window` for sparse snapshots."""
    for t, graph in enumerate(snapshots):
        bad = ~np.isfinite(graph.data) | (graph.data < 0)
        if bad.any():
            coo = graph.tocoo()
            at = int(np.flatnonzero(bad)[0])
            raise ValueError(
                f"snapshot {t} has weight {coo.data[at]} at [{coo.row[at]}, {coo.col[at]}]: "
                "weights must be finite and >= 0"
            )
        if not directed and (graph != graph.T).nnz:
            raise ValueError(
                f"snapshot {t} is not symmetric but directed=False; pass directed=True"
            )


def align_nodes(
    snapshots: Sequence[np.ndarray], labels: Sequence[Sequence[Any]] | None = None
) -> tuple[np.ndarray, list[Any]]:
    """Snapshots with node sets of their own on one common set; absent nodes are isolated.

    Args:
      snapshots: square matrices. labels: the node labels of each; default 0, 1, 2, ... of each.

    Returns ([T, n, n], the n labels in sorted order).

    Raises ValueError: labels that repeat or do not fit their matrix.
    """
    if labels is None:
        labels = [range(len(g)) for g in snapshots]
    for t, (graph, names) in enumerate(zip(snapshots, labels)):
        if np.shape(graph) != (len(names),) * 2 or len(set(names)) != len(names):
            raise ValueError(
                f"snapshot {t} of shape {np.shape(graph)}: one distinct label a row is wanted"
            )
    union = sorted({name for names in labels for name in names})
    place = {name: i for i, name in enumerate(union)}
    aligned = np.zeros(
        (len(snapshots), len(union), len(union)), np.result_type(*map(np.asarray, snapshots))
    )
    for t, (graph, names) in enumerate(zip(snapshots, labels)):
        at = np.array([place[name] for name in names], int)
        aligned[t][np.ix_(at, at)] = graph
    return aligned, union
