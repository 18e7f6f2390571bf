"""Forms of stems, narrow 1x1 convolutions and small maps; `layers/convolution.py` uses it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import TORCH_PYTHON, Contender, markdown, measure, ratio, write_report

BATCH = 8
# (image size, input channels, filters, kernel, stride): stems at 224 and 64 pixels, 1x1
# convolutions as RepGhost 0.5x has them, and maps of a few pixels.
STEMS = ((224, 3, 8, 3, 2), (224, 3, 16, 3, 2), (224, 3, 32, 3, 2), (64, 3, 8, 3, 2))
SMALL = ((2, 512, 512, 3, 1), (4, 256, 256, 3, 2), (4, 256, 256, 5, 1), (4, 256, 256, 3, 1))
POINTWISE = ((112, 4, 4, 1, 1), (112, 8, 4, 1, 1), (112, 8, 24, 1, 1), (56, 8, 36, 1, 1))
FORMS = ("loop", "product", "xla")


def jax_form(
    size: int, channels: int, filters: int, kernel: int, stride: int, form: str
) -> Callable[[], None]:
    """Forward pass with one form forced: `loop` multiply-adds, `product` a matrix product, `xla`.

    For a 1x1 kernel `xla` is its convolution and `product` its matrix product.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmodels.layers import convolution

    pad = kernel // 2
    forms = {
        "loop": lambda x, w: convolution._tapped_conv(x, w, stride, pad),
        "product": lambda x, w: convolution._gathered_conv(x, w, stride, pad),
        "xla": lambda x, w: convolution._xla_conv(x, w, (stride,) * 2, ((pad, pad),) * 2, 1),
    }
    if (size, channels, filters, kernel, stride) in SMALL:
        forms["product"] = lambda x, w: convolution._windowed_conv(
            x, w, (stride,) * 2, ((pad, pad),) * 2
        )
    if kernel == 1:
        forms["loop"] = lambda x, w: convolution._summed_product(x, w[0, 0])
        forms["product"] = lambda x, w: x @ w[0, 0]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(BATCH, size, size, channels)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(kernel, kernel, channels, filters)), jnp.float32)
    forward = jax.jit(forms[form])
    return lambda: jax.block_until_ready(forward(x, weight))


def torch_form(
    size: int, channels: int, filters: int, kernel: int, stride: int
) -> Callable[[], None]:
    """The same in eager PyTorch, channels last."""
    import torch

    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    x = torch.randn(BATCH, channels, size, size).to(memory_format=torch.channels_last)
    weight = torch.randn(filters, channels, kernel, kernel)

    def forward() -> None:
        with torch.inference_mode():
            torch.nn.functional.conv2d(x, weight, None, stride, kernel // 2)

    return forward


def run(quick: bool = False) -> Path:
    """Write `results/convolution.md`."""
    rounds, steps = (3, 5) if quick else (10, 10)
    rows = []
    for shape in STEMS + POINTWISE + SMALL:
        names = ("size", "channels", "filters", "kernel", "stride")
        arguments = dict(zip(names, shape, strict=True))
        forms = FORMS[1:] if shape in SMALL else FORMS
        contenders = [
            Contender(form, "benchmarks.convolution:jax_form", {**arguments, "form": form})
            for form in forms
        ]
        contenders.append(
            Contender("torch", "benchmarks.convolution:torch_form", arguments, TORCH_PYTHON)
        )
        samples = measure(contenders, 1, rounds, steps)
        cells = [sample.cell("cpu") for sample in samples.values()]
        if shape in SMALL:
            cells.insert(0, "-")
            compared = ratio(samples["product"], [samples["xla"]], "cpu")
        else:
            compared = ratio(samples["loop"], [samples["product"], samples["xla"]], "cpu")
        rows.append([*map(str, shape), *cells, compared])
    head = ["image", "channels", "filters", "kernel", "stride"]
    body = (
        f"Batch {BATCH}, float32, one thread, process CPU time, forward. Ratio: multiply-adds over "
        "the better of the two other forms of JAX; on maps of 2 and 4 pixels the matrix product "
        "over XLA's convolution.\n\n"
        + markdown([*head, "multiply-adds", "matrix product", "XLA", "PyTorch", "ratio"], rows)
    )
    return write_report(
        "convolution", "Stems, narrow 1x1 convolutions and small maps on a CPU", body
    )
