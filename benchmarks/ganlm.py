"""GanLM's three-pass train step against the same structure in PyTorch, and its compile time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import TORCH_PYTHON, Contender, markdown, measure, ratio, write_report

BATCH, SOURCE, TARGET, WORDS, MASK_ID = 8, 128, 32, 8000, 7890
WIDTH, HIDDEN, HEADS, LAYERS, DROPOUT = 256, 1024, 8, (4, 4, 2), 0.1
RATE, MODES = 1e-4, ("eager", "compile")


def jax_train(unroll: int = 4, dropout: float = DROPOUT) -> Callable[[], None]:
    """Three passes, gradients and AdamW, one jitted call."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxmodels.language.ganlm_objective import Objective, three_passes

    module, params, batch = _jax_model(LAYERS, unroll, dropout)
    optimizer, objective = optax.adamw(RATE), Objective(MASK_ID)

    def step(state, key):
        params, optimizer_state, count = state
        key = jax.random.fold_in(key, count)

        def loss(params):
            total, outputs = three_passes(module, params, *batch, objective, rng=key, train=True)
            return total / outputs["tokens"]

        value, grads = jax.value_and_grad(loss)(params)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state, count + 1), value

    compiled = jax.jit(step, donate_argnums=0)
    state, key = (params, optimizer.init(params), jnp.int32(0)), jax.random.key(1)

    def run() -> None:
        nonlocal state
        state, value = compiled(state, key)
        jax.block_until_ready((state, value))

    return run


def _jax_model(layers: tuple[int, int, int], unroll: int, dropout: float):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmodels.language.ganlm import GanLM

    module = GanLM(
        vocab_size=WORDS,
        embed_dim=WIDTH,
        encoder_ffn_embed_dim=HIDDEN,
        decoder_ffn_embed_dim=HIDDEN,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_layers=layers[0],
        generator_decoder_layers=layers[1],
        discriminator_decoder_layers=layers[2],
        dropout=dropout,
        attention_dropout=dropout,
        scan_unroll=unroll,
    )
    tokens = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens)["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape, leaf.dtype)
        return jnp.asarray(rng.normal(scale=0.02, size=leaf.shape), leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    source = rng.integers(4, MASK_ID, (BATCH, SOURCE))
    label = rng.integers(4, MASK_ID, (BATCH, TARGET + 1))
    batch = (source, label[:, :-1], label[:, 1:])
    return module, params, tuple(jnp.asarray(x, jnp.int32) for x in batch)


def torch_train(mode: str, dropout: float = DROPOUT) -> Callable[[], None]:
    """The same train step, `torch.optim.AdamW` with `foreach`."""
    import torch

    from benchmarks.ganlm_torch import GanLM

    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    torch.manual_seed(0)
    model = GanLM(WORDS, WIDTH, HIDDEN, HEADS, LAYERS, dropout)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, foreach=True)
    source = torch.randint(4, MASK_ID, (BATCH, SOURCE))
    label = torch.randint(4, MASK_ID, (BATCH, TARGET + 1))
    call = torch.compile(model) if mode == "compile" else model

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        call(source, label[:, :-1].contiguous(), label[:, 1:].contiguous(), MASK_ID).backward()
        optimizer.step()

    return run


def compile_seconds(layers: int, unroll: int = 1) -> float:
    """CPU seconds to compile the gradient of a model of so many layers in each stack."""
    import jax

    from jaxmodels.language.ganlm_objective import Objective, three_passes

    module, params, batch = _jax_model((layers, layers, layers), unroll, 0.0)

    def loss(params):
        return three_passes(module, params, *batch, Objective(MASK_ID), rng=jax.random.key(0))[0]

    lowered = jax.jit(jax.grad(loss)).lower(params)
    begin = time.process_time()
    lowered.compile()
    return time.process_time() - begin


def run(quick: bool = False) -> Path:
    """Write `results/ganlm.md`."""
    rounds, steps = (3, 1) if quick else (6, 2)
    ours = Contender("jax", "benchmarks.ganlm:jax_train")
    theirs = [
        Contender(m, "benchmarks.ganlm:torch_train", {"mode": m}, TORCH_PYTHON) for m in MODES
    ]
    rows: dict[str, list] = {"wall": [], "cpu": [], "setup": []}
    for threads in (1, 2):
        if threads > len(os.sched_getaffinity(0)):
            continue
        samples = measure([ours, *theirs], threads, rounds, steps)
        mine, others = samples["jax"], [samples[m] for m in MODES]
        for kind in ("wall", "cpu"):
            cells = [one.cell(kind) for one in (mine, *others)]
            rows[kind].append([str(threads), *cells, ratio(mine, others, kind)])
        rows["setup"].append([str(threads), *(f"{one.setup:.1f}" for one in (mine, *others))])
        path = write_report("ganlm", "GanLM's three passes against PyTorch", _body(rows, []))
    depths = [[str(n), f"{compile_seconds(n):.1f}"] for n in ((2, 4) if quick else (2, 4, 8, 12))]
    return (
        write_report("ganlm", "GanLM's three passes against PyTorch", _body(rows, depths)) or path
    )


def _body(rows, depths) -> str:
    heads = ["threads", "jax", *(f"torch {m}" for m in MODES)]
    text = (
        f"Batch {BATCH}, source {SOURCE}, target {TARGET}, {WORDS} words, width {WIDTH}, hidden "
        f"{HIDDEN}, {HEADS} heads, layers {LAYERS}, dropout {DROPOUT}; forward, backward, AdamW. "
        "Milliseconds, `minimum / median (quartiles)`; the ratio is ours to the faster of theirs, "
        "of minima.\n\n"
        "## Wall time\n\n" + markdown([*heads, "ratio"], rows["wall"]) + "\n\n## CPU time\n\n"
        + markdown([*heads, "ratio"], rows["cpu"]) + "\n\n## Set-up with compilation, s\n\n"
        + markdown(heads, rows["setup"])
    )  # fmt: skip
    if depths:
        text += (
            "\n\n## CPU seconds to compile the gradient, by layers in each of the three stacks\n\n"
        )
        text += markdown(["layers", "s"], depths)
    return text
