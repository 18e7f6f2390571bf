"""Forms of the depthwise convolution on a CPU by shape; `layers/depthwise.py` chooses by it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import TORCH_PYTHON, Contender, markdown, measure, write_report

# (image size, channels, kernel, stride) as RepGhost 0.5x has them at 224 and 64 pixels, batch 8.
SHAPES = (
    (112, 4, 3, 1),
    (112, 12, 3, 1),
    (112, 12, 3, 2),
    (56, 20, 3, 1),
    (56, 20, 5, 2),
    (32, 8, 3, 1),
    (28, 32, 3, 1),
    (14, 60, 3, 1),
    (8, 20, 3, 1),
    (7, 240, 3, 1),
    (2, 240, 3, 1),
)
BATCH = 8
FORMS = ("loop", "reduction", "grouped")


def jax_form(
    size: int, channels: int, kernel: int, stride: int, form: str, gradient: bool
) -> Callable[[], None]:
    """Forward pass, or both gradients, with one form forced.

    `loop` and `reduction` differ in the kernel's gradient only, `grouped` is XLA's convolution.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmodels.layers import depthwise

    depthwise._LOOP_ELEMENTS = depthwise._LOOP_ROWS = 0 if form == "loop" else 10**9
    strides, padding = (stride, stride), ((kernel // 2, kernel // 2),) * 2
    chosen = depthwise.depthwise_conv
    if form == "grouped":
        chosen = depthwise.depthwise_conv_grouped
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(BATCH, size, size, channels)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(kernel, kernel, 1, channels)), jnp.float32)
    forward = jax.jit(lambda x, weight: chosen(x, weight, strides, padding))
    if not gradient:
        return lambda: jax.block_until_ready(forward(x, weight))
    shape = jax.eval_shape(forward, x, weight).shape
    dy = jnp.asarray(rng.normal(size=shape), jnp.float32)
    backward = jax.jit(
        lambda x, weight, dy: jax.vjp(lambda x, w: chosen(x, w, strides, padding), x, weight)[1](dy)
    )
    return lambda: jax.block_until_ready(backward(x, weight, dy))


def torch_form(
    size: int, channels: int, kernel: int, stride: int, gradient: bool
) -> Callable[[], None]:
    """The same in eager PyTorch, channels last; the gradient includes the forward pass."""
    import torch

    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    last = torch.channels_last
    x = torch.randn(BATCH, channels, size, size).to(memory_format=last).requires_grad_()
    weight = torch.randn(channels, 1, kernel, kernel).requires_grad_()

    def convolve():
        return torch.nn.functional.conv2d(x, weight, None, stride, kernel // 2, 1, channels)

    if not gradient:

        def forward() -> None:
            with torch.inference_mode():
                convolve()

        return forward
    dy = torch.randn(convolve().shape).to(memory_format=last)

    def both() -> None:
        torch.autograd.grad(convolve(), (x, weight), dy)

    return both


def run(quick: bool = False) -> Path:
    """Write `results/depthwise.md`."""
    rounds, steps = (3, 5) if quick else (10, 10)
    header = ["image", "channels", "kernel", "stride"]
    tables: dict[bool, list] = {False: [], True: []}
    for shape in SHAPES[::2] if quick else SHAPES:
        arguments = dict(zip(("size", "channels", "kernel", "stride"), shape, strict=True))
        for gradient, rows in tables.items():
            names = FORMS if gradient else FORMS[1:]
            contenders = [
                Contender(
                    name,
                    "benchmarks.depthwise:jax_form",
                    {**arguments, "form": name, "gradient": gradient},
                )
                for name in names
            ]
            contenders.append(
                Contender(
                    "torch",
                    "benchmarks.depthwise:torch_form",
                    {**arguments, "gradient": gradient},
                    TORCH_PYTHON,
                )
            )
            samples = measure(contenders, 1, rounds, steps)
            rows.append([*map(str, shape), *(s.cell("cpu") for s in samples.values())])
    body = (
        f"Batch {BATCH}, float32, one thread, process CPU time.\n\n"
        "## Forward\n\n"
        + markdown([*header, "shifted rows", "XLA grouped", "PyTorch"], tables[False])
        + "\n## Both gradients (XLA drops the forward pass, PyTorch's time includes it)\n\n"
        + markdown([*header, "loop", "reduction", "XLA grouped", "PyTorch"], tables[True])
    )
    return write_report("depthwise", "Depthwise convolution on a CPU", body)
