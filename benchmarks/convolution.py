"""Forms of stems, narrow 1x1 convolutions, small maps and gradients: why the layers choose theirs.

`jaxmodels/layers/convolution.py` and `conv2d.py` refer to `results/convolution.md`.
"""

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
# (batch, image size, input channels, filters), 3x3 with stride 1: gradients.
GRADIENTS = ((4, 128, 32, 32), (4, 64, 64, 64), (32, 32, 64, 64), (32, 16, 128, 128),
             (32, 8, 256, 256), (32, 32, 16, 16))  # fmt: skip
LOOP_STEPS = 4


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


def jax_gradient(
    batch: int, size: int, channels: int, filters: int, what: str, form: str
) -> Callable[[], None]:
    """The gradient of the `kernel`, or a `loop` that descends along that of the image.

    `form` is ours or xla, the gradients that JAX derives.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    from jaxmodels.layers import conv2d

    function = conv2d.conv2d if form == "ours" else conv2d._by_xla
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, size, size, channels)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(3, 3, channels, filters)), jnp.float32)

    def convolve(x, weight):
        return function(x, weight, (1, 1), ((1, 1), (1, 1)))

    def kernel_gradient(x, weight, cotangent):
        return jax.vjp(lambda w: convolve(x, w), weight)[1](cotangent)

    def loop(x, weight, _):
        # The gradient depends on the point: one that does not would be taken out of the loop.
        def energy(z):
            return jnp.square(convolve(z, weight)).sum() / 2

        def body(point, _):
            return point - 1e-6 * jax.grad(energy)(point), None

        return lax.scan(body, x, length=LOOP_STEPS)[0]

    compiled = jax.jit(kernel_gradient if what == "kernel" else loop)
    arguments = x, weight, jax.jit(convolve)(x, weight)
    return lambda: jax.block_until_ready(compiled(*arguments))


def torch_gradient(
    batch: int, size: int, channels: int, filters: int, what: str
) -> Callable[[], None]:
    """The same in eager PyTorch, channels last."""
    import torch

    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
    weight = torch.randn(filters, channels, 3, 3)
    given = torch.nn.functional.conv2d(x, weight, None, 1, 1)

    form = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    def gradient(point, cotangent, wanted):
        # The operator itself: of the image, the kernel, the bias.
        return torch.ops.aten.convolution_backward(cotangent, point, weight, *form, wanted)

    def kernel() -> None:
        gradient(x, given, [False, True, False])

    def loop() -> None:
        point = x
        with torch.inference_mode():
            for _ in range(LOOP_STEPS):
                y = torch.nn.functional.conv2d(point, weight, None, 1, 1)
                point = point - 1e-6 * gradient(point, y, [True, False, False])[0]

    return kernel if what == "kernel" else loop


def _gradients(rounds: int, steps: int) -> list[list[str]]:
    rows = []
    for what in ("kernel", "loop"):
        for shape in GRADIENTS:
            arguments = dict(zip(("batch", "size", "channels", "filters"), shape, strict=True))
            arguments["what"] = what
            here = "benchmarks.convolution"
            contenders = [
                Contender(form, f"{here}:jax_gradient", {**arguments, "form": form})
                for form in ("ours", "xla")
            ]
            contenders.append(Contender("torch", f"{here}:torch_gradient", arguments, TORCH_PYTHON))
            samples = measure(contenders, 1, rounds, steps)
            cells = [sample.cell("cpu") for sample in samples.values()]
            ratios = [ratio(samples["ours"], [samples[n]], "cpu") for n in ("xla", "torch")]
            rows.append([what, *map(str, shape), *cells, *ratios])
    return rows


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
        + "\n## Gradients of 3x3 convolutions\n\n"
        "`kernel`: the kernel's gradient alone. `loop`: image - 1e-6 gradient of its output's "
        f"squared norm, {LOOP_STEPS} times in a scan (PyTorch: in Python). XLA: what JAX "
        "derives.\n\n"
        + markdown(
            [*("what", "batch", "image", "channels", "filters", "ours", "XLA", "PyTorch"),
             *("ours / XLA", "ours / PyTorch")],
            _gradients(rounds, max(steps // 4, 1)),
        )
    )  # fmt: skip
    return write_report(
        "convolution", "Stems, narrow 1x1 convolutions, small maps and gradients on a CPU", body
    )
