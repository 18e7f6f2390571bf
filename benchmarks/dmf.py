# ruff: noqa: E402 - the flags must be set before jax is imported
"""Speed of the DMF dynamics against PyTorch and against this machine's own GEMM rate.

    taskset -c 0 python benchmarks/dmf.py --threads 1 --output benchmarks/results/dmf_1.json

Needs the extra `torch`. All contenders are interleaved, `--repeats` times; the rate is seed-steps
per second of CPU time with one thread (robust against other jobs) and of wall time with more. Every
contender takes plain gradient steps on a reconstruction problem, with the gradient norm at every
step and the singular values of the product every 100 steps.
"""

import argparse
import json
import os
import platform
import time

parser = argparse.ArgumentParser()
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--output", default="benchmarks/results/dmf.json")
parser.add_argument("--sizes", default="10x3,20x2,50x3,100x4")
parser.add_argument("--dtypes", default="float64,float32")
ARGS = parser.parse_args()

os.environ["JAX_PLATFORMS"] = "cpu"
if ARGS.threads > 1:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={ARGS.threads}"

import jax
import jax.numpy as jnp
import numpy as np
import torch

from theory.decompositions import singular_values
from theory.lanes import compiler_options, matmul
from theory.optimizers import gradients, squared_norm
from theory.problem import Problem

jax.config.update("jax_enable_x64", True)
torch.set_num_threads(ARGS.threads)

SEEDS = {10: 256, 20: 256, 50: 64, 100: 8}
TILES = {10: (16, 64), 20: (1, 16, 32), 50: (1, 2, 4, 8), 100: (1, 2)}  # seeds first
LANES = {10: (16, 32, 64), 20: (16, 32, 64), 50: (16,), 100: ()}  # seeds along the vector lanes
LR = 0.01


def clock() -> float:
    return time.process_time() if ARGS.threads == 1 else time.perf_counter()


def start(d, depth, seeds, dtype):
    rng = np.random.default_rng(0)
    factors = [0.1 * rng.standard_normal((seeds, d, d)) / np.sqrt(d) for _ in range(depth)]
    return [f.astype(dtype) for f in factors], np.diag(np.linspace(1, 0.1, d)).astype(dtype)


def torch_loop(d, depth, dtype, steps=200):
    """The minimal un-batched autograd loop."""
    factors, target = start(d, depth, 1, dtype)
    weights = [torch.tensor(f[0], requires_grad=True) for f in factors]
    goal = torch.tensor(target)
    method = torch.optim.SGD(weights, lr=LR)

    def go():
        for t in range(steps):
            product = weights[0]
            for w in weights[1:]:
                product = w @ product
            loss = 0.5 * ((product - goal) ** 2).sum()
            method.zero_grad()
            loss.backward()
            torch.sqrt(sum((w.grad**2).sum() for w in weights))
            method.step()
            if t % 100 == 0:
                torch.linalg.svdvals(product.detach())

    return go, steps


def torch_batched(d, depth, dtype, steps=100):
    """bmm over seeds, autograd."""
    seeds = SEEDS[d]
    factors, target = start(d, depth, seeds, dtype)
    weights = [torch.tensor(f, requires_grad=True) for f in factors]
    goal = torch.tensor(target)

    def go():
        for t in range(steps):
            product = weights[0]
            for w in weights[1:]:
                product = torch.bmm(w, product)
            loss = 0.5 * ((product - goal) ** 2).sum()
            grads = torch.autograd.grad(loss, weights)
            torch.sqrt(sum((g**2).sum((1, 2)) for g in grads))
            with torch.no_grad():
                for w, g in zip(weights, grads):
                    w.sub_(g, alpha=LR)
            if t % 100 == 0:
                torch.linalg.svdvals(product.detach())

    return go, steps * seeds


def jax_tiles(d, depth, dtype, tile, lanes=False, steps=400):
    """Seeds in tiles: each tile is scanned to the end before the next one, so it stays in cache.

    lanes: seeds are the last axis (`theory.lanes`), else the first.
    """
    seeds = SEEDS[d] if tile > 1 else ARGS.threads
    factors, target = start(d, depth, seeds, dtype)
    target = target[:, :, None] if lanes else target
    problem = Problem(jnp.asarray(target), {}, jnp.ones((), dtype))
    lr = jnp.asarray(LR, dtype)
    multiply = matmul if lanes else jnp.matmul

    def one(w, _):
        loss, product, grads = gradients(problem, w, multiply)
        norm = jnp.sqrt(squared_norm(grads))
        rate = jnp.where(jnp.isfinite(norm), lr, 0)  # as a sweep: a diverged run stands still
        return tuple(x - rate * g for x, g in zip(w, grads)), (loss, norm, product)

    def hundred(w, _):
        def inner(w, _):
            moved, (loss, norm, _) = one(w, None)
            return moved, (loss, norm)

        product = one(w, None)[1][2]
        matrices = jnp.moveaxis(product, -1, 0) if lanes else product
        s = jnp.vectorize(singular_values, signature="(m,n)->(k)")(matrices)
        w, trace = jax.lax.scan(inner, w, None, length=100)
        return w, (s, trace)

    def run(w):
        return jax.lax.scan(hundred, w, None, length=steps // 100)

    batch = run if tile == 1 or lanes else jax.vmap(run)

    def tiles(*parts):
        split = tuple(p.reshape(-1, tile, d, d) for p in parts)
        if lanes:
            split = tuple(jnp.moveaxis(p, 1, -1) for p in split)
        elif tile == 1:
            split = tuple(p[:, 0] for p in split)
        return jax.lax.map(batch, split)

    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("seeds",))
    spec = jax.sharding.PartitionSpec("seeds")
    program = jax.jit(
        jax.shard_map(tiles, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False),
        compiler_options=compiler_options("cpu") if lanes else None,
    )
    arrays = [jax.device_put(f, jax.sharding.NamedSharding(mesh, spec)) for f in factors]

    def go():
        jax.block_until_ready(program(*arrays))

    return go, steps * seeds


def gemm(dtype, n=512):
    a = jnp.asarray(np.random.default_rng(0).standard_normal((n, n)).astype(dtype))
    multiply = jax.jit(lambda x: x @ x)

    def go():
        for _ in range(4):
            jax.block_until_ready(multiply(a))

    return go, 4 * 2 * n**3


def main():
    table = []
    for size in ARGS.sizes.split(","):
        d, depth = map(int, size.split("x"))
        for dtype in ARGS.dtypes.split(","):
            contenders = {
                "torch loop": torch_loop(d, depth, dtype),
                "torch batched": torch_batched(d, depth, dtype),
                "gemm": gemm(dtype),
            }
            for tile in TILES[d]:
                if SEEDS[d] % (tile * ARGS.threads) == 0:
                    contenders[f"jax tile {tile}"] = jax_tiles(d, depth, dtype, tile)
            for tile in LANES[d]:
                contenders[f"jax lanes {tile}"] = jax_tiles(d, depth, dtype, tile, lanes=True)
            rates = {name: [] for name in contenders}
            for go, _ in contenders.values():
                go()
            for _ in range(ARGS.repeats):
                for name, (go, work) in contenders.items():
                    began = clock()
                    go()
                    rates[name].append(work / (clock() - began))
            best = {name: max(values) for name, values in rates.items()}
            spread = {name: (max(v) - min(v)) / max(v) for name, v in rates.items()}
            ours = max((n for n in best if n.startswith("jax")), key=best.get)
            flops = 6 * (depth - 1) * d**3
            row = {
                "d": d,
                "L": depth,
                "dtype": dtype,
                "threads": ARGS.threads,
                "rates": best,
                "spread": spread,
                "best": ours,
                "by_layout": {
                    kind: max((v for n, v in best.items() if n.startswith(kind)), default=None)
                    for kind in ("jax tile", "jax lanes")
                },
                "over_torch_loop": best[ours] / best["torch loop"],
                "over_torch_batched": best[ours] / best["torch batched"],
                "gemm_share": best[ours] * flops / best["gemm"],
            }
            table.append(row)
            print(
                f"d={d} L={depth} {dtype}: {ours} {best[ours]:.3g}/s, "
                f"{row['over_torch_loop']:.1f}x loop, {row['over_torch_batched']:.2f}x batched, "
                f"best by layout {row['by_layout']}, "
                f"{100 * row['gemm_share']:.0f} % of GEMM {best['gemm'] / 1e9:.0f} GFLOP/s "
                f"(spread {100 * spread[ours]:.0f} / {100 * spread['gemm']:.0f} %)",
                flush=True,
            )
    head = {"machine": platform.processor(), "jax": jax.__version__, "torch": torch.__version__}
    os.makedirs(os.path.dirname(ARGS.output) or ".", exist_ok=True)
    with open(ARGS.output, "w", encoding="utf-8") as stream:
        json.dump({**head, "rows": table}, stream, indent=1)
        stream.write("\n")


if __name__ == "__main__":
    main()
