"""Streaming detectors A and B: every step of a run is judged, in O(K) memory, inside `lax.scan`.

A chunk of K steps is read at once, for all lanes (runs) together; lanes are the last axis of every
array. The state machine of detector A moves from one turning point to the next instead of from
step to step. For detector B and the ranks few steps are decomposed: by Weyl's inequality no
comparison of a singular value with a threshold can change while the product has moved less than
its distance to the nearest threshold. Decompositions due in any lane are gathered in small
batches, so that no lane is decomposed because another one must be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theory import decompositions
from theory.stages import (
    DELTA,
    H_DECADES,
    KINDS,
    SWAP_DROP,
    Escape,
    StageReport,
    escape_kind,
    make_report,
    plateaus,
)

EVENTS = 32  # non-ring events kept per run; more are only counted
BATCH = 8  # decompositions done together


class DetectorState(NamedTuple):
    """State of the streaming detectors; of one run, or of many with a last axis [lanes]."""

    sigma: jax.Array  # [R], zero = unused slot
    first_loss: jax.Array
    last_product: jax.Array  # [out, in]
    path: jax.Array  # distance moved since the last decomposition
    slack: jax.Array  # distance to the nearest threshold at that point
    code: tuple[jax.Array, jax.Array, jax.Array]  # ordered rank, active [R], plateau [R]
    rising: jax.Array
    low: tuple[jax.Array, ...]  # value, step, rank, loss at the running minimum
    high: tuple[jax.Array, ...]  # value, step of the running maximum
    pending: tuple[jax.Array, ...]  # valley, peak, rank, loss of the last confirmed escape
    events: jax.Array  # [EVENTS, 5] int: valley, peak, rank before, rank after, kind
    drops: jax.Array  # [EVENTS]
    counts: jax.Array  # [4] number of rank, merged, swap, ring escapes
    activation: jax.Array  # [R] first step, -1 = never
    visited: jax.Array  # [R]
    decompositions: jax.Array
    last: tuple[jax.Array, ...]  # step, rank, loss of the newest step


def detector_init(sigma: jax.Array, product_shape: tuple[int, int]) -> DetectorState:
    """Fresh state of one run; sigma [R] with zeros as padding, R <= min(product_shape)."""
    sigma = jnp.asarray(sigma)
    rank, dtype = sigma.shape[0], sigma.dtype

    def integer(value=0):
        return jnp.asarray(value, jnp.int32)

    def real(value=0.0):
        return jnp.asarray(value, dtype)

    return DetectorState(
        sigma=sigma,
        first_loss=real(-1.0),
        last_product=jnp.zeros(product_shape, dtype),
        path=real(),
        slack=real(),  # zero, so that the first step is decomposed
        code=(integer(), jnp.zeros(rank, bool), jnp.zeros(rank, bool)),
        rising=jnp.asarray(False),
        low=(real(jnp.inf), integer(), integer(), real()),
        high=(real(), integer()),
        pending=(integer(-1), integer(), integer(), real()),
        events=jnp.zeros((EVENTS, 5), jnp.int32),
        drops=jnp.zeros(EVENTS, dtype),
        counts=jnp.zeros(4, jnp.int32),
        activation=jnp.full(rank, -1, jnp.int32),
        visited=jnp.zeros(rank, bool),
        decompositions=integer(),
        last=(integer(-1), integer(), real()),
    )


def _codes(s: jax.Array, sigma: jax.Array, delta: float):
    """Comparisons of spectra [R, n] with all thresholds, and distances to the nearest one [n]."""
    used = sigma > 0
    active = used & (s >= 0.5 * sigma)
    rank = jnp.sum(jnp.cumprod(active.astype(jnp.int32), axis=0), axis=0, dtype=jnp.int32)
    plateau = used & plateaus(s.T, sigma.T, delta, jnp).T
    levels = jnp.asarray([0.5, 1.0 - delta, delta], s.dtype)[:, None, None]
    distance = jnp.where(used, jnp.abs(s - sigma * levels), jnp.inf)
    slack = jnp.min(distance, axis=(0, 1)) - 1e-13 * jnp.max(s, axis=0)
    return (rank, active, plateau), slack


class _Judged(NamedTuple):
    due: jax.Array  # [lanes] row of the next decomposition, K where none is due
    origin: jax.Array  # [lanes] path at the last one
    slack: jax.Array
    rank: jax.Array  # [K, lanes]
    active: jax.Array  # [R, lanes] at the last decomposition, as is plateau
    plateau: jax.Array
    activation: jax.Array
    visited: jax.Array
    count: jax.Array


def _judge(
    state: DetectorState,
    steps: jax.Array,
    moved: jax.Array,
    valid: jax.Array,
    pick: Callable[[jax.Array, jax.Array], jax.Array],
    delta: float,
) -> tuple[_Judged, jax.Array]:
    """Ranks of all steps and spectral marks, decomposing as few steps as Weyl's bound asks."""
    length, lanes = moved.shape
    batch = min(BATCH, lanes)
    index = jnp.arange(length, dtype=jnp.int32)[:, None]
    path = state.path + jnp.cumsum(jnp.where(valid, moved, 0.0), axis=0)

    def next_due(path, valid, current, origin, slack):
        # `not (x < slack)` rather than `x >= slack`, so that a NaN path is looked at, too
        late = (index > current) & valid & ~(path - origin < slack)
        return jnp.where(jnp.any(late, 0), jnp.argmax(late, 0).astype(jnp.int32), length)

    def decompose(old: _Judged) -> _Judged:
        _, lane = jax.lax.top_k(length - old.due, batch)
        use = old.due[lane] < length
        row = jnp.minimum(old.due[lane], length - 1)
        rank_max = state.sigma.shape[0]
        s = jax.vmap(decompositions.singular_values)(pick(row, lane))[:, :rank_max].T
        (rank, active, plateau), slack = _codes(s, state.sigma[:, lane], delta)
        origin = path[row, lane]
        due = next_due(path[:, lane], valid[:, lane], row, origin, slack)

        def put(array, fresh):
            return array.at[..., lane].set(jnp.where(use, fresh, array[..., lane]))

        known = old.activation[:, lane]
        first = jnp.where((known < 0) & active, steps[row, lane], known)
        return _Judged(
            due=put(old.due, due),
            origin=put(old.origin, origin),
            slack=put(old.slack, slack),
            rank=put(old.rank, jnp.where(index >= row, rank, old.rank[:, lane])),
            active=put(old.active, active),
            plateau=put(old.plateau, plateau),
            activation=put(old.activation, first),
            visited=put(old.visited, old.visited[:, lane] | plateau),
            count=put(old.count, old.count[lane] + 1),
        )

    origin = jnp.zeros_like(state.path)
    before = jnp.full(lanes, -1, jnp.int32)
    start = _Judged(
        due=next_due(path, valid, before, origin, state.slack),
        origin=origin,
        slack=state.slack,
        rank=jnp.broadcast_to(state.code[0], (length, lanes)),
        active=state.code[1],
        plateau=state.code[2],
        activation=state.activation,
        visited=state.visited,
        count=state.decompositions,
    )
    judged = jax.lax.while_loop(lambda now: jnp.any(now.due < length), decompose, start)
    return judged, path[-1] - judged.origin


class _Turns(NamedTuple):
    position: jax.Array  # [lanes] newest row that was read
    rising: jax.Array
    low: tuple[jax.Array, ...]
    high: tuple[jax.Array, ...]
    pending: tuple[jax.Array, ...]
    events: jax.Array
    drops: jax.Array
    counts: jax.Array


def _turns(
    state: DetectorState,
    signal: jax.Array,
    steps: jax.Array,
    rank: jax.Array,
    loss: jax.Array,
    valid: jax.Array,
    first_loss: jax.Array,
    h: float,
) -> _Turns:
    """Detector A over a chunk: each pass takes every lane to its next turning point."""
    length = signal.shape[0]
    index = jnp.arange(length, dtype=jnp.int32)[:, None]
    last = jnp.sum(valid, axis=0, dtype=jnp.int32) - 1
    readable = valid & ~jnp.isnan(signal)

    def at(array, row):
        return jnp.take_along_axis(array, row[None], axis=0)[0]

    def choose(flag, new, old):
        return tuple(jnp.where(flag, a, b) for a, b in zip(new, old, strict=True))

    def advance(now: _Turns) -> _Turns:
        # Falling lanes look for a minimum: with the sign turned, both kinds look for a maximum.
        ahead = readable & (index > now.position)
        toward = jnp.where(ahead, jnp.where(now.rising, signal, -signal), -jnp.inf)
        best = jnp.where(now.rising, now.high[0], -now.low[0])
        running = jax.lax.cummax(jnp.concatenate([best[None], toward[:-1]]), axis=0)
        running = jnp.maximum(running, best)
        turn = ahead & (toward <= running - h) & (toward < running)
        turned = jnp.any(turn, axis=0)
        row = jnp.where(turned, jnp.argmax(turn, axis=0).astype(jnp.int32), length)
        before = ahead & (index < row)
        top = jnp.max(jnp.where(before, toward, -jnp.inf), axis=0)
        top_row = jnp.argmax(before & (toward == top), axis=0).astype(jnp.int32)
        better = top > best
        extreme = (at(signal, top_row), *(at(x, top_row) for x in (steps, rank, loss)))
        row = jnp.minimum(row, length - 1)
        here = tuple(at(x, row) for x in (signal, steps, rank, loss))
        starts, ends = turned & ~now.rising, turned & now.rising
        low = choose(better & ~now.rising, extreme, now.low)
        high = choose(better & now.rising, extreme[:2], now.high)
        event, drop = _close(now.pending, low[2], low[3], first_loss)
        stored = _store(event, drop, ends & (now.pending[0] >= 0), now)
        pending = choose(ends, (low[1], high[1], low[2], low[3]), now.pending)
        return _Turns(
            jnp.where(turned, row, last),
            now.rising ^ turned,
            choose(ends, here, low),
            choose(starts, here[:2], high),
            pending,
            *stored,
        )

    start = _Turns(
        jnp.full_like(last, -1),
        state.rising,
        state.low,
        state.high,
        state.pending,
        state.events,
        state.drops,
        state.counts,
    )
    return jax.lax.while_loop(lambda now: jnp.any(now.position < last), advance, start)


def _close(pending, rank_after, loss_after, first_loss):
    """The pending escape's row [5, lanes] and loss drop, once its next valley is known."""
    valley, peak, before, loss_before = pending
    drop = (loss_before - loss_after) / first_loss
    kind = jnp.where(
        rank_after == before + 1,
        0,
        jnp.where(rank_after > before + 1, 1, jnp.where(drop >= SWAP_DROP, 2, 3)),
    )
    return jnp.stack([valley, peak, before, rank_after, kind.astype(jnp.int32)]), drop


def _store(row, drop, use, now: _Turns):
    kind = row[4]
    slot = jnp.sum(now.counts[:3], axis=0)
    here = (jnp.arange(EVENTS)[:, None] == slot) & use & (kind < 3)
    events = jnp.where(here[:, None], row, now.events)
    counts = now.counts + ((jnp.arange(4)[:, None] == kind) & use).astype(jnp.int32)
    return events, jnp.where(here, drop, now.drops), counts


def update_lanes(
    state: DetectorState,
    steps: jax.Array,
    loss: jax.Array,
    grad_norm: jax.Array,
    moved: jax.Array,
    valid: jax.Array,
    pick: Callable[[jax.Array, jax.Array], jax.Array],
    newest: Callable[[jax.Array], jax.Array],
    *,
    h: float = H_DECADES,
    delta: float = DELTA,
) -> DetectorState:
    """Feed K consecutive steps of many lanes: steps, loss, grad_norm, moved, valid [K, lanes].

    moved: Frobenius distance of each product to the one before; valid: a prefix of True per lane.
    pick(row [n], lane [n]) gives products [n, out, in]; newest(row [lanes]) gives the product of
    a row of every lane, [out, in, lanes].
    """
    steps = steps.astype(jnp.int32)
    judged, path = _judge(state, steps, moved, valid, pick, delta)
    first_loss = jnp.where(state.first_loss < 0, loss[0], state.first_loss)
    signal = jnp.log10(jnp.maximum(grad_norm, jnp.finfo(grad_norm.dtype).tiny))
    turns = _turns(state, signal, steps, judged.rank, loss, valid, first_loss, h)
    any_valid = jnp.any(valid, axis=0)
    row = jnp.maximum(jnp.sum(valid, axis=0, dtype=jnp.int32) - 1, 0)

    def keep(new, old):
        return jnp.where(any_valid, new, old)

    latest = [jnp.take_along_axis(x, row[None], axis=0)[0] for x in (steps, judged.rank, loss)]
    return DetectorState(
        sigma=state.sigma,
        first_loss=keep(first_loss, state.first_loss),
        last_product=keep(newest(row), state.last_product),
        path=path,
        slack=judged.slack,
        code=(judged.rank[-1], judged.active, judged.plateau),
        rising=turns.rising,
        low=turns.low,
        high=turns.high,
        pending=turns.pending,
        events=turns.events,
        drops=turns.drops,
        counts=turns.counts,
        activation=judged.activation,
        visited=judged.visited,
        decompositions=judged.count,
        last=tuple(keep(new, old) for new, old in zip(latest, state.last)),
    )


def detector_update(
    state: DetectorState,
    steps: jax.Array,
    loss: jax.Array,
    grad_norm: jax.Array,
    products: jax.Array,
    valid: jax.Array | None = None,
    *,
    h: float = H_DECADES,
    delta: float = DELTA,
) -> DetectorState:
    """Feed K consecutive steps of one run: steps, loss, grad_norm [K], products [K, out, in].

    valid [K] (a prefix of True) leaves the rest of the chunk out. Pure; vmap over runs.
    """
    valid = jnp.ones(steps.shape, bool) if valid is None else valid
    before = jnp.concatenate([state.last_product[None], products[:-1]])
    moved = jnp.sqrt(jnp.sum((products - before) ** 2, axis=(1, 2)))
    after = update_lanes(
        jax.tree.map(lambda x: x[..., None], state),
        *(x[:, None] for x in (steps, loss, grad_norm, moved, valid)),
        pick=lambda row, lane: products[row],
        newest=lambda row: products[row[0]][..., None],
        h=h,
        delta=delta,
    )
    return jax.tree.map(lambda x: x[..., 0], after)


def detector_report(state: DetectorState) -> StageReport:
    """The report of one run's streaming state so far (host side)."""
    state = jax.tree.map(np.asarray, state)
    sigma = state.sigma[state.sigma > 0]
    if int(state.last[0]) < 0:
        raise ValueError("detector: no step has been fed yet")
    escapes = [
        Escape(int(v), int(p), int(b), int(a), KINDS[int(k)], float(drop))
        for (v, p, b, a, k), drop in zip(state.events, state.drops)
    ][: min(int(state.counts[:3].sum()), EVENTS)]
    kinds = [e.kind for e in escapes]
    n_swaps = int(state.counts[2])
    stages_dropped = int(state.counts[:2].sum()) - (len(kinds) - kinds.count("swap"))
    n_rings = int(state.counts[3])
    valley, peak, before, loss_before = state.pending
    if valley >= 0:
        drop = float((loss_before - state.last[2]) / state.first_loss)
        kind = escape_kind(int(before), int(state.last[1]), drop)
        escapes.append(Escape(int(valley), int(peak), int(before), int(state.last[1]), kind, drop))
        n_rings += kind == "ring"
    return make_report(
        escapes,
        n_rings=n_rings,
        activation_steps=[
            int(t) if t >= 0 else None for t in state.activation[: len(sigma)].tolist()
        ],
        visited=state.visited[: len(sigma)],
        final_rank=int(state.last[1]),
        unfinished=(int(state.low[1]), int(state.high[1])) if state.rising else None,
        sigma=sigma,
        dropped=(stages_dropped, n_swaps - kinds.count("swap")),
    )
