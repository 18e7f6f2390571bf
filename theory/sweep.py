"""Thousands of runs: lanes refilled from a queue, one compiled program for each shape.

A sweep is a list of `RunSpec`. Runs of one shape share a program that advances `lanes` of them by
K steps with the stage detectors on every step; a lane whose run is over takes the next run, so no
lane waits for the slowest. Lanes are sharded over all devices. Every finished run is appended to
`records.jsonl` at once; started again, a sweep skips what that file holds.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from theory.closed_form import separability
from theory.dynamics import STATUS, State, init_state
from theory.factorization import random_factors
from theory.lanes import MULTIPLE, compiler_options, lanes_last, matmul
from theory.optimizers import Optimizer, gradients, squared_norm
from theory.problem import Problem, random_data, spectrum_target
from theory.quantities import effective_rank
from theory.runs import RunSpec, doubts
from theory.stages import StageReport
from theory.streaming import detector_report, update_lanes


class Lanes(NamedTuple):
    """The runs being advanced; every leaf has a leading axis [lanes]."""

    problem: Problem
    state: State
    lr: jax.Array
    cap: jax.Array
    stop: jax.Array
    done: jax.Array
    loss: jax.Array  # newest loss
    rises: jax.Array  # running share of steps in which the loss rose


def _draw(spec: RunSpec, width: int, numbers: dict[str, jax.Array]) -> Lanes:
    """One lane from its traced numbers (vmapped by `_batch`); spec gives the static parts."""
    dtype = numbers["sigma"].dtype
    key = jax.random.key(numbers["seed"])
    key_target, key_init, key_mask, key_noise = jax.random.split(key, 4)
    shape = (spec.dims[-1], spec.dims[0])
    if spec.target is not None:
        target = numbers["target"]
    else:
        signs = None
        if spec.symmetry == "symmetric_indefinite":
            signs = [(-1.0) ** i for i in range(width)]
        target = spectrum_target(
            key_target, shape, numbers["sigma"], symmetry=spec.symmetry, signs=signs
        )
    target, data = random_data(
        spec.problem, key_mask, key_noise, target, numbers["noise_std"], spec.data_count
    )
    scale = jnp.ones((), dtype)
    if spec.problem == "completion":
        if spec.mask is not None:
            data["mask"] = numbers["mask"]
        scale = 1.0 / jnp.sum(data["mask"])
    elif spec.problem != "reconstruction":
        scale = scale / spec.data_count
    norm = "half_sum" if spec.problem == "reconstruction" else "half_mean"
    problem = Problem(target, data, scale, spec.problem, norm)
    rate = numbers["lr"]
    if spec.rate_follows_draw:
        rate = rate / problem.sharpness
    factors = random_factors(
        key_init, spec.dims, spec.init, numbers["factor_scale"], target=target, dtype=dtype
    )
    state = init_state(spec.optimizer, factors, rate, sigma=numbers["sigma"])
    zero = jnp.zeros((), dtype)
    return Lanes(
        problem,
        state,
        rate,
        numbers["cap"],
        numbers["stop"],
        jnp.asarray(False),
        jnp.asarray(jnp.inf, dtype),
        zero,
    )


@functools.lru_cache(maxsize=64)
def _drawer(spec: RunSpec, width: int, axis: int) -> Callable:
    return jax.jit(jax.vmap(functools.partial(_draw, spec, width), out_axes=axis))


def _static(spec: RunSpec) -> RunSpec:
    """The spec with its traced numbers blanked, so that equal programs hash alike."""
    blank = None if spec.target is None else ()
    masked = None if spec.mask is None else ()
    return dataclasses.replace(
        spec,
        id="",
        sigma=(),
        alpha=1.0,
        seed=0,
        eta_hat=None,
        lr=None if spec.rate_follows_draw else 1.0,
        cap=0,
        stop=0.0,
        noise_std=0.0,
        # Resolved, since its default depends on the rank, which is blanked.
        measurements=spec.data_count if spec.problem == "sensing" else None,
        target=blank,
        mask=masked,
        label=(),
    )


def draw_lanes(specs: Sequence[RunSpec], width: int, dtype: Any, axis: int = 0) -> Lanes:
    """Initial lanes of runs of one shape; width: padded length of sigma; axis: that of lanes."""
    first = specs[0]
    numbers = {
        "seed": np.asarray([s.seed for s in specs], np.int32),
        "sigma": np.asarray([[*s.sigma, *[0.0] * (width - len(s.sigma))] for s in specs], dtype),
        "factor_scale": np.asarray([s.alpha ** (1.0 / s.depth) for s in specs], dtype),
        "lr": np.asarray([s.step_size for s in specs], dtype),
        "cap": np.asarray([s.steps for s in specs], np.int32),
        "stop": np.asarray([s.stop_level for s in specs], dtype),
        "noise_std": np.asarray([s.noise_std for s in specs], dtype),
    }
    if first.target is not None:
        numbers["target"] = np.asarray([s.target for s in specs], dtype)
    if first.mask is not None:
        numbers["mask"] = np.asarray([s.mask for s in specs], dtype)
    return _drawer(_static(first), width, axis)(numbers)


def advance_lanes(optimizer: Optimizer, length: int, axis: int, lanes: Lanes) -> Lanes:
    """All lanes by up to `length` steps; a run that ends stays at its last point.

    axis: -1 where the arrays have their lanes last (`theory.lanes`), 0 where they have them first.
    """
    problem, last = lanes.problem, axis == -1
    if last:
        look = functools.partial(gradients, problem, matmul=matmul)
        norm, move = squared_norm, functools.partial(optimizer.update, problem)
        over_matrix = (0, 1)
    else:
        look = functools.partial(jax.vmap(gradients), problem)
        norm, move = jax.vmap(squared_norm), functools.partial(jax.vmap(optimizer.update), problem)
        over_matrix = (1, 2)

    def body(carry, _):
        count, factors, slots, previous, done, loss, rises = carry
        found, product, grads = look(factors)
        grad_norm = jnp.sqrt(norm(grads))
        moved = jnp.sqrt(jnp.sum((product - previous) ** 2, axis=over_matrix))
        finite = jnp.isfinite(found + grad_norm + moved)
        fed = ~done
        rises = jnp.where(fed, 0.99 * rises + 0.01 * (found > loss), rises)
        loss = jnp.where(fed, found, loss)
        done = done | (found <= lanes.stop) | ~finite | (count >= lanes.cap)
        # A step of size zero keeps a finished run in place without a select over its factors. That
        # the rate depends on all uses of the old factors lets XLA update them in place.
        rate = jnp.where(done, 0.0, lanes.lr)
        factors, slots = move(rate, count, factors, grads, slots)
        row = (count, found, grad_norm, moved, fed & finite, product)
        return (count + ~done, factors, slots, product, done, loss, rises), row

    state = lanes.state
    detector = state.detector
    start = (
        *(state.step, state.factors, state.slots, detector.last_product),
        *(lanes.done, lanes.loss, lanes.rises),
    )
    (count, factors, slots, _, done, loss, rises), rows = jax.lax.scan(
        body, start, None, length=length
    )
    steps, found, grad_norm, moved, fed, products = rows
    every = jnp.arange(len(lanes.cap))
    if last:
        newest = functools.partial(_newest, products)
        detector = update_lanes(
            *(detector, steps, found, grad_norm, moved, fed),
            pick=lambda row, lane: products[row, :, :, lane],
            newest=newest,
        )
    else:
        detector = update_lanes(
            jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), detector),
            *(steps, found, grad_norm, moved, fed),
            pick=lambda row, lane: products[row, lane],
            newest=lambda row: jnp.moveaxis(products[row, every], 0, -1),
        )
        detector = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), detector)
    state = State(count, factors, slots, detector)
    return lanes._replace(state=state, done=done, loss=loss, rises=rises)


def _newest(products: jax.Array, row: jax.Array) -> jax.Array:
    """Products [K, out, in, lanes] at one row of each lane, [out, in, lanes]."""
    return jnp.take_along_axis(products, row[None, None, None], axis=0)[0]


def _specs(lanes: Lanes, axis: int) -> Lanes:
    """Partition specs of lanes: the lane axis over the mesh."""
    return jax.tree.map(
        lambda x: PartitionSpec(*[None] * (x.ndim - 1 if axis == -1 else 0), "lanes"), lanes
    )


@functools.lru_cache(maxsize=64)
def _advancer(optimizer: Optimizer, length: int, axis: int, mesh: Mesh) -> Callable:
    advance = functools.partial(advance_lanes, optimizer, length, axis)

    def sharded(lanes):
        spec = _specs(lanes, axis)
        return jax.shard_map(advance, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False)(
            lanes
        )

    options = compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(sharded, donate_argnums=0, compiler_options=options)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
def _refill(lanes: Lanes, pool: Lanes, source: jax.Array, take: jax.Array, axis: int) -> Lanes:
    """Lanes with run `source` of the pool where `take`; both [lanes]."""

    def one(old, fresh):
        chosen = jnp.take(fresh, source, axis=axis)
        flag = take if axis == -1 else take.reshape((-1,) + (1,) * (old.ndim - 1))
        return jnp.where(flag, chosen, old)

    return jax.tree.map(one, lanes, pool)


def _status(spec: RunSpec, lane: Lanes) -> str:
    if not np.isfinite(lane.loss) or lane.loss > 1e3 * lane.state.detector.first_loss:
        return STATUS[2]
    level = lane.stop
    if spec.stop is None:
        level = spec.converged_level * lane.problem.scale
    if lane.loss <= level:
        return STATUS[1]
    return STATUS[3] if lane.rises > 0.25 else STATUS[0]


def make_record(spec: RunSpec, lane: Lanes, report: StageReport) -> dict[str, Any]:
    """The JSON record of one finished run."""
    product = np.asarray(lane.state.detector.last_product)
    target = np.asarray(lane.problem.target)
    s = np.linalg.svd(product, compute_uv=False)
    norm = float(np.linalg.norm(target))
    rank = len(spec.sigma)
    index = separability(spec.sigma, spec.depth, spec.alpha)
    in_order = report.rank_path == tuple(range(rank + 1))
    record = {
        "id": spec.id,
        **dict(spec.label),
        "L": spec.depth,
        **_settings(spec),
        "lr": float(lane.lr),
        "separability": index if np.isfinite(index) else None,
        "status": _status(spec, lane),
        "steps": int(lane.state.step),
        "final_loss": float(lane.loss),
        "n_stages": report.n_stages,
        "n_plateaus": report.n_plateaus,
        "rank_path_ordered": in_order,
        "n_swaps": report.n_swaps,
        "n_rings": report.n_rings,
        "n_merged": sum(e.kind == "merged" for e in report.escapes),
        "unfinished": report.unfinished is not None,
        "final_rank": report.final_rank,
        "activation_steps": list(report.activation_steps),
        "effective_rank": float(effective_rank(s)),
        "relative_error": float(np.linalg.norm(product - target)) / norm if norm else None,
        "decompositions": int(lane.state.detector.decompositions),
        "escapes": [dataclasses.asdict(e) for e in report.escapes],
    }
    if product.size <= 16:
        record["product"] = product.tolist()
    return record


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a `records.jsonl`; a last line cut short by a kill is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def _settings(spec: RunSpec) -> dict[str, Any]:
    """What a record holds of its spec, and a continued sweep compares."""
    return {
        "dims": list(spec.dims),
        "R": len(spec.sigma),
        "sigma": list(spec.sigma),
        "alpha": spec.alpha,
        "eta_hat": spec.dimensionless_step,
        "optimizer": spec.optimizer.name,
        "hyper": dict(spec.optimizer.hyper),
        "init": spec.init,
        "problem": spec.problem,
        "noise_std": spec.noise_std,
        "seed": spec.seed,
        "cap": spec.steps,
    }


def _check_same_run(spec: RunSpec, record: dict[str, Any] | None, path: Path | None) -> None:
    if record is None:
        return
    for name, value in _settings(spec).items():
        if name in record and record[name] != value:
            raise ValueError(
                f"{path}: run {spec.id} was made with {name} = {record[name]}, now {value}; take "
                "another workdir"
            )


def device_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the one axis `lanes` over all (given) devices."""
    return Mesh(np.asarray(devices if devices is not None else jax.devices()), ("lanes",))


def sweep(
    specs: Iterable[RunSpec],
    path: Path | str | None = None,
    *,
    lanes: int = 32,
    chunk: int = 128,
    mesh: Mesh | None = None,
    dtype: Any = None,
    progress: Callable[[int, int, float], None] | None = None,
    deadline: float | None = None,
) -> list[dict[str, Any]]:
    """Run all specs and return their records, in the order of the specs.

    path: `records.jsonl` to append to and to resume from; lanes: runs advanced together (rounded
    up to the number of devices, and to 16 on each where lanes are last), few where lengths differ
    much, since the longest run is advanced step by step to its end; chunk: K steps between looks;
    progress(done, total, steps per second); deadline: `time.monotonic()` value after which no new
    chunk is started (the finished runs are kept, the rest is left for the next call).
    Raises ValueError where two specs share an id, for lanes or chunk below 1, for a spec that
    `RunSpec.check` refuses, and where `path` holds an id that was run with other settings. Warns
    of what `doubts` finds.
    """
    specs = list(specs)
    for name, value in (("lanes", lanes), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name}: {value} must be at least 1")
    ids = [spec.id for spec in specs]
    if len(set(ids)) != len(ids):
        raise ValueError("id: two runs of the sweep share an id")
    for spec in specs:
        spec.check()
    for note in doubts(specs):
        warnings.warn(note, stacklevel=2)
    mesh = mesh or device_mesh()
    dtype = dtype or jnp.result_type(float)
    path = Path(path) if path is not None else None
    found = {record["id"]: record for record in (read_records(path) if path else [])}
    for spec in specs:
        _check_same_run(spec, found.get(spec.id), path)
    waiting = [spec for spec in specs if spec.id not in found]
    if path and path.exists():
        text = path.read_bytes()
        if text and not text.endswith(b"\n"):
            with path.open("ab") as stream:
                stream.write(b"\n")
    started, advanced = time.monotonic(), 0
    for _, members in itertools.groupby(
        sorted(waiting, key=lambda s: repr(s.shape_key())), key=lambda s: s.shape_key()
    ):
        # Longest first, so that the last lanes end together.
        queue = sorted(members, key=lambda s: -s.steps)
        for record, count in _run_group(queue, lanes, chunk, mesh, dtype, deadline):
            advanced += count
            if record is not None:
                found[record["id"]] = record
                if path:
                    with path.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(record) + "\n")
            if progress:
                rate = advanced / max(time.monotonic() - started, 1e-9)
                progress(len([i for i in ids if i in found]), len(ids), rate)
        if deadline is not None and time.monotonic() > deadline:
            break
    return [found[i] for i in ids if i in found]


def _run_group(queue, lanes, chunk, mesh, dtype, deadline):
    """Yields (record or None, steps advanced) while the queue of one shape is worked off."""
    first, width, real = queue[0], queue[0].width, len(queue)
    last = lanes_last(first.dims, first.problem, first.optimizer, mesh.devices.flat[0].platform)
    axis, step = (-1, MULTIPLE * mesh.devices.size) if last else (0, mesh.devices.size)
    count = -(-min(lanes, real) // step) * step
    # Pools of one size, drawn when needed: memory stays bounded for any length of queue.
    padded = queue + [queue[-1]] * (-len(queue) % count)
    pools = (padded[i : i + count] for i in range(0, len(padded), count))
    advance = _advancer(first.optimizer, chunk, axis, mesh)

    def placed(tree, spec=None):
        specs = _specs(tree, axis) if spec is None else jax.tree.map(lambda _: spec, tree)
        return jax.device_put(tree, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))

    current = placed(draw_lanes(next(pools), width, dtype, axis))
    # Padding of the first pool repeats its last run; those lanes are marked as done.
    running: list[int | None] = [i if i < real else None for i in range(count)]
    idle = np.asarray([i is None for i in running])
    current = current._replace(done=placed(jnp.asarray(idle)))
    following, pool, pool_start = count, None, count
    before = np.zeros(count, np.int64)
    while any(i is not None for i in running):
        if deadline is not None and time.monotonic() > deadline:
            return
        current = advance(current)
        done, steps = np.asarray(current.done), np.asarray(current.state.step, np.int64)
        moved = int(sum((steps - before)[j] for j, i in enumerate(running) if i is not None))
        before = steps.copy()
        finished = [j for j in range(count) if done[j] and running[j] is not None]
        yield None, moved
        if not finished:
            continue
        taken = jax.tree.map(
            lambda x, rows=tuple(finished): np.take(np.asarray(x), rows, axis=axis), current
        )
        for k, j in enumerate(finished):
            lane = jax.tree.map(lambda x, k=k: np.take(x, k, axis=axis), taken)
            yield make_record(queue[running[j]], lane, detector_report(lane.state.detector)), 0
        source, take = np.zeros(count, np.int32), np.zeros(count, bool)
        while finished:
            if following >= real:
                for j in finished:
                    running[j] = None
                break
            if pool is None or following >= pool_start + count:
                if take.any():
                    current = placed(_refill(current, pool, source, take, axis))
                    source, take = np.zeros(count, np.int32), np.zeros(count, bool)
                pool_start = following
                pool = placed(draw_lanes(next(pools), width, dtype, axis), PartitionSpec())
            j = finished.pop()
            source[j], take[j] = following - pool_start, True
            running[j], before[j] = following, 0
            following += 1
        if take.any():
            current = placed(_refill(current, pool, source, take, axis))


def write_tables(records: Sequence[dict[str, Any]], directory: Path | str) -> None:
    """runs.csv (one row a run) and escapes.csv (one row an escape), each replaced atomically."""
    import csv

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    runs = [{k: v for k, v in r.items() if k not in ("escapes", "product")} for r in records]
    escapes = [{"id": r["id"], **escape} for r in records for escape in r["escapes"]]
    columns = ["id", "valley_step", "peak_step", "rank_before", "rank_after", "kind", "loss_drop"]
    for name, rows, header in (
        ("runs.csv", runs, list(dict.fromkeys(k for row in runs for k in row))),
        ("escapes.csv", escapes, columns),
    ):
        temporary = directory / f".{name}.partial"
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, header)
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()}
                )
        os.replace(temporary, directory / name)
