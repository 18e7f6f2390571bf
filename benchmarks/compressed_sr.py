"""Swin2SR and BasicVSR++ forward, and the small Swin2SR train step, against PyTorch on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import TORCH_PYTHON, Contender, markdown, measure, ratio, write_report
from configs.compressed_sr import get_config

SIDE, FRAMES = 64, 5
RATE = 1e-3
SMALL = get_config("small").model_args.to_dict()
LIGHT = {**SMALL, "upsampler": "pixelshuffledirect", "img_size": 64, "embed_dim": 60,
         "depths": (6,) * 4, "num_heads": (6,) * 4}  # fmt: skip


def _variables(module):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmodels.interop import catalog

    rng = np.random.default_rng(0)

    def draw(shape):
        return jnp.asarray(rng.normal(scale=0.02, size=shape.shape), shape.dtype)

    variables = jax.tree.map(draw, catalog.shapes(module))
    if "buffers" in variables:
        variables["buffers"] = jax.tree.map(jnp.ones_like, variables["buffers"])
    return variables


def jax_forward(name: str, video: bool = False, **arguments) -> Callable[[], None]:
    """The jitted forward pass of a model by name."""
    import jax
    import numpy as np

    from jaxmodels.interop import catalog

    module = catalog.find(name).build(**arguments)
    variables = _variables(module)
    shape = (1, FRAMES, SIDE, SIDE, 3) if video else (1, SIDE, SIDE, 3)
    x = jax.numpy.asarray(np.random.default_rng(1).uniform(size=shape), "float32")
    forward = jax.jit(module.apply)
    return lambda: jax.block_until_ready(forward(variables, x))


def jax_train() -> Callable[[], None]:
    """L1 on both outputs, gradients and Adam, one jitted call with donated state."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxmodels.interop import catalog

    module = catalog.find("restoration.swin2sr").build(**SMALL)
    params = _variables(module)["params"]
    rng = np.random.default_rng(1)
    lr = jnp.asarray(rng.uniform(size=(6, 16, 16, 3)), jnp.float32)
    hr = jnp.asarray(rng.uniform(size=(6, 64, 64, 3)), jnp.float32)
    optimizer = optax.adam(RATE)

    def step(state, key):
        params, optimizer_state = state

        def loss(params):
            sr, aux = module.apply({"params": params}, lr, train=True, rngs={"dropout": key})
            return jnp.abs(sr - hr).mean() + jnp.abs(aux - lr).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, optimizer_state = optimizer.update(grads, optimizer_state)
        return (optax.apply_updates(params, updates), optimizer_state), value

    compiled = jax.jit(step, donate_argnums=0)
    state, key = (params, optimizer.init(params)), jax.random.key(0)

    def run() -> None:
        nonlocal state
        state, value = compiled(state, key)
        jax.block_until_ready((state, value))

    return run


def _torch(mode: str):
    import torch

    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    torch.manual_seed(0)
    del mode
    return torch


def torch_forward(kind: str, mode: str = "eager") -> Callable[[], None]:
    """Forward pass in evaluation mode under `inference_mode`."""
    torch = _torch(mode)
    from benchmarks import compressed_sr_torch as models

    if kind == "video":
        model, x = models.BasicVSRPlusPlus(), torch.rand(1, FRAMES, 3, SIDE, SIDE)
    elif kind == "light":
        model = models.Swin2SR(60, (6,) * 4, direct=True)
        x = torch.rand(1, 3, SIDE, SIDE)
    else:
        model, x = models.Swin2SR(), torch.rand(1, 3, SIDE, SIDE)
    model.eval()
    call = torch.compile(model) if mode == "compile" else model

    def run() -> None:
        with torch.inference_mode():
            call(x)

    return run


def torch_train(mode: str = "eager") -> Callable[[], None]:
    """The same train step, `torch.optim.Adam` fused."""
    torch = _torch(mode)
    from benchmarks import compressed_sr_torch as models

    model = models.Swin2SR(24, (2, 2), 2)
    lr, hr = torch.rand(6, 3, 16, 16), torch.rand(6, 3, 64, 64)
    optimizer = torch.optim.Adam(model.parameters(), RATE, fused=True)
    call = torch.compile(model) if mode == "compile" else model

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        sr, aux = call(lr)
        ((sr - hr).abs().mean() + (aux - lr).abs().mean()).backward()
        optimizer.step()

    return run


HERE = "benchmarks.compressed_sr"
# Row -> (our function and arguments, the other side's).
ROWS = {
    "Swin2SR lightweight x4, forward 64x64": (
        ("jax_forward", {"name": "restoration.swin2sr", **LIGHT}),
        ("torch_forward", {"kind": "light"}),
    ),
    "Swin2SR CompressedSR_X4_48, forward 64x64": (
        ("jax_forward", {"name": "compressed_sr_x4_48"}),
        ("torch_forward", {"kind": "large"}),
    ),
    "BasicVSR++ c64 n7, forward 5x64x64": (
        ("jax_forward", {"name": "basicvsrpp_reds4", "video": True, "detect_mirror": False}),
        ("torch_forward", {"kind": "video"}),
    ),
    "small Swin2SR, train step 6x16x16": (("jax_train", {}), ("torch_train", {})),
}


def run(quick: bool = False) -> Path:
    """Write `results/compressed_sr.md`, again after every row."""
    rounds, steps = (2, 1) if quick else (5, 2)
    rows, path = [], None
    for title, ((ours, mine), (theirs, yours)) in ROWS.items():
        contenders = [
            Contender("jax", f"{HERE}:{ours}", mine),
            Contender("eager", f"{HERE}:{theirs}", {**yours, "mode": "eager"}, TORCH_PYTHON),
        ]
        samples = measure(contenders, threads=1, rounds=rounds, steps=steps)
        a, b = samples["jax"], samples["eager"]
        rows.append([title, a.cell("cpu"), b.cell("cpu"), ratio(a, [b], "cpu"), f"{a.setup:.0f}"])
        header = [
            "one thread",
            "JAX (CPU ms)",
            "PyTorch eager (CPU ms)",
            "JAX / PyTorch",
            "set-up s",
        ]
        body = markdown(header, rows) + (
            "\nRatios are of minima / medians of process CPU time. Set-up is compilation and the "
            "first call. PyTorch's deformable convolution is `grid_sample` over all taps; with "
            "mmcv's C++ kernel the specification gives 2.7 CPU-seconds for the video row.\n"
        )
        path = write_report("compressed_sr", "Restoration networks against PyTorch", body)
    return path
