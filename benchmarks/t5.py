"""T5-small's shape: train step and cached generation against PyTorch's (transformers).

The other side needs `transformers` beside PyTorch, in the interpreter `BENCHMARK_TORCH_PYTHON`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import TORCH_PYTHON, Contender, markdown, measure, ratio, write_report

BATCH, SOURCE, TARGET, RATE = 8, 128, 128, 1e-4
SHAPE = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
}
GENERATED, PROMPT = 64, 64
# (inputs, beams) of the generation rows.
SEARCHES = ((1, 1), (8, 1), (1, 4), (8, 4))


def _jax_model(**changes):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmodels.interop import catalog

    module = catalog.find("language.t5").build(**SHAPE, **changes)
    rng = np.random.default_rng(0)
    # Drawn by hand: compiling `init` would count as set-up.
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(scale=0.05, size=s.shape), s.dtype),
        catalog.shapes(module)["params"],
    )
    return module, params, rng


def jax_train(scan_unroll: int = 1) -> Callable[[], None]:
    """Cross-entropy, dropout, gradients and AdamW, one jitted call with donated state."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxmodels.language import t5

    module, params, rng = _jax_model(scan_unroll=scan_unroll)
    ids = jnp.asarray(rng.integers(5, SHAPE["vocab_size"], (BATCH, SOURCE)))
    labels = jnp.asarray(rng.integers(5, SHAPE["vocab_size"], (BATCH, TARGET)))
    mask = jnp.ones_like(ids)
    optimizer = optax.adamw(RATE)

    def step(state, key):
        params, optimizer_state = state

        def loss(params):
            decoder_ids = t5.shift_right(labels)
            logits = module.apply(
                {"params": params}, ids, decoder_ids, mask, True, rngs={"dropout": key}
            )
            return t5.mean_nll(logits, labels)

        value, grads = jax.value_and_grad(loss)(params)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), value

    compiled = jax.jit(step, donate_argnums=0)
    state, count = (params, optimizer.init(params)), 0

    def run() -> None:
        nonlocal state, count
        state, value = compiled(state, jax.random.key(count))
        count += 1
        jax.block_until_ready((state, value))

    return run


def jax_generate(batch: int, beams: int) -> Callable[[], None]:
    """`GENERATED` tokens for each input with a cache, the end token forbidden."""
    import functools

    import jax
    import jax.numpy as jnp

    from jaxmodels.language import t5_generation

    module, params, rng = _jax_model()
    ids = jnp.asarray(rng.integers(5, SHAPE["vocab_size"], (batch, PROMPT)))
    search = functools.partial(
        t5_generation.generate,
        module,
        max_length=GENERATED + 1,
        min_length=GENERATED + 1,
        num_beams=beams,
    )
    compiled = jax.jit(search)
    return lambda: jax.block_until_ready(compiled({"params": params}, ids, jnp.ones_like(ids)))


def _torch_model(mode: str):
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    torch.manual_seed(0)
    config = T5Config(**SHAPE, decoder_start_token_id=0, use_cache=mode == "generate")
    return torch, T5ForConditionalGeneration(config)


def torch_train(mode: str) -> Callable[[], None]:
    """The same train step, `torch.optim.AdamW` fused."""
    torch, model = _torch_model(mode)
    model.train()
    ids = torch.randint(5, SHAPE["vocab_size"], (BATCH, SOURCE))
    labels = torch.randint(5, SHAPE["vocab_size"], (BATCH, TARGET))
    mask = torch.ones_like(ids)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, fused=True)
    call = torch.compile(model) if mode == "compile" else model

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        call(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()

    return run


def torch_generate(batch: int, beams: int) -> Callable[[], None]:
    """transformers' `generate` with its dynamic cache."""
    torch, model = _torch_model("generate")
    model.eval()
    ids = torch.randint(5, SHAPE["vocab_size"], (batch, PROMPT))
    mask = torch.ones_like(ids)

    def run() -> None:
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=GENERATED,
                min_new_tokens=GENERATED,
                num_beams=beams,
                do_sample=False,
            )

    return run


def run(quick: bool = False) -> Path:
    """Write `results/t5.md`, again after every row, for the whole takes long to compile."""
    rounds, steps = (3, 1) if quick else (8, 2)
    searches = SEARCHES[::3] if quick else SEARCHES
    rows: dict[str, list] = {"train": [], "generate": [], "setup": []}
    path = None
    for threads in (1,) if quick else (1, 2):
        if threads > len(os.sched_getaffinity(0)):
            continue
        modes = ("eager", "compile")
        theirs = [
            Contender(m, "benchmarks.t5:torch_train", {"mode": m}, TORCH_PYTHON) for m in modes
        ]
        ours = [Contender("jax", "benchmarks.t5:jax_train")]
        samples = measure([*ours, *theirs], threads, rounds, steps)
        each = [samples[name] for name in ("jax", *modes)]
        for kind in ("wall", "cpu"):
            cells = [s.cell(kind) for s in each]
            rows["train"].append([threads, kind, *cells, ratio(each[0], each[1:], kind)])
        rows["setup"].append([threads, "train", *(f"{s.setup:.1f}" for s in each)])
        path = write_report("t5", "T5-small's shape against PyTorch", _body(rows))
        for batch, beams in searches:
            arguments = {"batch": batch, "beams": beams}
            pair = [
                Contender("jax", "benchmarks.t5:jax_generate", arguments),
                Contender("hf", "benchmarks.t5:torch_generate", arguments, TORCH_PYTHON),
            ]
            samples = measure(pair, threads, rounds, 1)
            each = [samples[name] for name in ("jax", "hf")]
            for kind in ("wall", "cpu"):
                rates = [
                    f"{batch * GENERATED / min(getattr(s, kind)):.0f}" if s.wall else "failed"
                    for s in each
                ]
                cells = [s.cell(kind) for s in each]
                faster = ratio(each[1], each[:1], kind)
                rows["generate"].append([threads, batch, beams, kind, *cells, *rates, faster])
            path = write_report("t5", "T5-small's shape against PyTorch", _body(rows))
    return path


def _body(rows: dict[str, list]) -> str:
    return (
        f"Train step: batch {BATCH}, {SOURCE} + {TARGET} tokens, float32, dropout 0.1, AdamW. "
        "Ratio: JAX over the best PyTorch column, of minima / of medians; below 1 JAX is "
        "faster.\n\n"
        + markdown(["threads", "time", "JAX", "PyTorch", "compiled", "ratio"], rows["train"])
        + f"\nGeneration: {GENERATED} new tokens an input, prompts of {PROMPT}, float32, cached; "
        "the whole call. Tokens a second by the minimum; the last column is how many times faster "
        "JAX is, by minima / medians.\n\n"
        + markdown(
            [
                *("threads", "inputs", "beams", "time", "JAX", "HF generate"),
                *("JAX tok/s", "HF tok/s", "faster"),
            ],
            rows["generate"],
        )
        + "\nSet-up in seconds (imports, construction, compilation, first step):\n\n"
        + markdown(["threads", "what", "JAX", "PyTorch", "compiled"], rows["setup"])
    )
