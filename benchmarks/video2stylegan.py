"""Video2StyleGAN on a CPU: StyleGAN2-256 and IR-SE50 against PyTorch, frames/s of the pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import TORCH_PYTHON, Contender, markdown, measure, ratio, write_report

SIZE = 256
HERE = "benchmarks.video2stylegan"
STAGES = (
    ("encode a key", "key"),
    ("encode a frame", "frame"),
    ("synthesize", "synthesize"),
    ("encode a frame and synthesize", "both"),
)


def _variables(module):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmodels.interop import catalog

    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "var":
            return jnp.ones(leaf.shape)
        scale = 1.0 if "synthesis" in str(path) else 0.05
        return jnp.asarray(rng.normal(scale=scale, size=leaf.shape), jnp.float32)

    # Drawn by hand: compiling `init` would count as set-up.
    return jax.tree_util.tree_map_with_path(draw, catalog.shapes(module))


def jax_synthesis(size: int = SIZE) -> Callable[[], None]:
    """W+ to image, one frame, constant noise."""
    import jax
    import jax.numpy as jnp

    from jaxmodels.video.stylegan2 import Generator

    module = Generator(img_resolution=size)
    variables = _variables(module)
    ws = jnp.ones((1, module.num_latents, 512))
    run = jax.jit(lambda v, ws: module.apply(v, ws, method="synthesize"))
    return lambda: jax.block_until_ready(run(variables, ws))


def jax_ir_se() -> Callable[[], None]:
    """Embedding of one face of 112 pixels."""
    import jax
    import jax.numpy as jnp

    from jaxmodels.vision.ir_se import Backbone

    module = Backbone()
    variables = _variables(module)
    x = jnp.ones((1, 112, 112, 3))
    run = jax.jit(module.apply)
    return lambda: jax.block_until_ready(run(variables, x))


def jax_stage(stage: str) -> Callable[[], None]:
    """A stage of the pipeline: the small encoder at 256 pixels, the generator of 256 pixels."""
    import jax
    import jax.numpy as jnp

    from jaxmodels.video.stylegan2 import Generator
    from jaxmodels.video.video_encoder import VideoEncoder, join_codes

    encoder = VideoEncoder(stylegan_size=SIZE)
    generator = Generator(img_resolution=SIZE)
    own, other = _variables(encoder), _variables(generator)
    frame = jnp.zeros((1, 256, 256, 3))
    high = jnp.zeros((1, encoder.num_latents - encoder.split, 512))

    @jax.jit
    def run(own, other, frame, high):
        if stage == "key":
            return encoder.apply(own, frame, method="encode_key")
        if stage == "synthesize":
            ws = jnp.ones((1, generator.num_latents, 512))
            return generator.apply(other, ws, method="synthesize")
        low = encoder.apply(own, frame, method="encode_frame")
        if stage == "frame":
            return low
        return generator.apply(other, join_codes(low, high), method="synthesize")

    return lambda: jax.block_until_ready(run(own, other, frame, high))


def torch_forward(what: str, size: int = SIZE, mode: str = "eager") -> Callable[[], None]:
    """The same in PyTorch, without gradients."""
    import torch

    from benchmarks.video2stylegan_torch import IRSE50, Synthesis

    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    torch.manual_seed(0)
    if what == "synthesis":
        model = Synthesis(size).eval()
        x = torch.ones(1, 2 * size.bit_length() - 4, 512)
    else:
        model, x = IRSE50().eval(), torch.ones(1, 3, 112, 112)
    if mode == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    call = torch.compile(model) if mode == "compile" else model

    def run() -> None:
        with torch.no_grad():
            call(x)

    return run


def run(quick: bool = False) -> Path:
    """Write `results/video2stylegan.md`."""
    rounds, steps = (3, 1) if quick else (6, 2)
    rows, stages = [], []

    def report() -> Path:
        header = [
            "one thread, batch 1",
            "ours",
            "PyTorch",
            "channels last",
            "ours / best, CPU time",
        ]
        body = "Process CPU time. PyTorch is `benchmarks/video2stylegan_torch.py`, eager.\n\n"
        body += markdown(header, rows)
        if stages:
            body += "\nThe pipeline (small encoder, 256 pixels, generator of 256 pixels), ours:\n\n"
            body += markdown(["stage", "CPU time", "frames/s by its minimum"], stages)
        return write_report("video2stylegan", "Video2StyleGAN: speed on a CPU", body)

    path = None
    for name, ours, arguments in (
        (f"StyleGAN2-{SIZE} synthesis", f"{HERE}:jax_synthesis", {"what": "synthesis"}),
        ("IR-SE50, 112 pixels", f"{HERE}:jax_ir_se", {"what": "ir_se"}),
    ):
        contenders = [Contender("ours", ours)]
        for mode in ("eager", "channels_last"):
            given = {**arguments, "mode": mode}
            contenders.append(Contender(mode, f"{HERE}:torch_forward", given, TORCH_PYTHON))
        found = measure(contenders, 1, rounds, steps)
        others = [found["eager"], found["channels_last"]]
        cells = [found[n].cell("cpu") for n in ("ours", "eager", "channels_last")]
        rows.append([name, *cells, ratio(found["ours"], others, "cpu")])
        path = report()
    for name, stage in STAGES:
        found = measure(
            [Contender("ours", f"{HERE}:jax_stage", {"stage": stage})], 1, rounds, steps
        )
        cpu = found["ours"].cpu
        stages.append([name, found["ours"].cell("cpu"), f"{1 / min(cpu):.1f}" if cpu else "-"])
        path = report()
    return path
