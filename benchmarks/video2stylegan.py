"""Video2StyleGAN on a CPU: StyleGAN2-256 and IR-SE50 against PyTorch, frames/s of the pipeline.

`python -m benchmarks.video2stylegan` measures the row of the whole command alone, and prints it:
`train.edit_video` from a video file to a video file.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import (
    TORCH_PYTHON,
    Contender,
    Samples,
    environment_of,
    markdown,
    measure,
    ratio,
    write_report,
)

SIZE = 256
HERE = "benchmarks.video2stylegan"
COMMAND = "the whole command: decode 640x480, align, encode, synthesize, paste, write H.264"
STAGE_HEADER = ["stage", "CPU time", "frames/s by its minimum"]
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


def whole_command(folder: str, frames: int) -> dict[str, list[float]]:
    """Wall and CPU seconds of every frame but the first of `train.edit_video`: a clip of 640x480
    decoded, aligned by landmarks, encoded, synthesized at 256 pixels, pasted back and written.

    The weights are random; the encoder is the small one.
    """
    import numpy as np

    import jaxmodels
    from jaxmodels.video.video_encoder import VideoEncoder
    from train import edit_video, video_files
    from train.command_line import read_flags
    from train.process import prepare_process

    prepare_process()
    place = Path(folder)
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 255, (15, 20, 3)), np.ones((32, 32, 1))).astype(np.uint8)
    with video_files.frame_writer(place / "in.mp4") as write:
        for t in range(frames):
            write(np.roll(picture, 2 * t, 1))
    points = np.full((frames, 68, 2), 240.0) + np.arange(frames)[:, None, None]
    points[:, 36:42] += [-40, -30]
    points[:, 42:48] += [40, -30]
    points[:, [48, 54]] += [[-25, 50], [25, 50]]
    np.savez(place / "landmarks.npz", landmarks=points)
    encoder = VideoEncoder(stylegan_size=SIZE)
    jaxmodels.save(
        place / "encoder.safetensors", "video.video_encoder", encoder, _variables(encoder)
    )
    flags = [f"--config={Path(__file__).parents[1] / 'configs' / 'video2stylegan.py'}:paper"]
    flags += ["--config.model_args.scan_layers=False", "--config.precision=float32"]
    flags += [f"--config.model_args.stylegan_size={SIZE}"]
    flags += [f"--config.task_args.generator_args.img_resolution={SIZE}"]
    flags += [f"--config.task_args.weights.{t}=0.0" for t in ("lpips", "identity", "landmarks")]
    flags += ["--config.task_args.weights.mesh=0.0", f"--config.data.options.path={folder}"]
    flags += [f"--config.edit.landmarks={place / 'landmarks.npz'}"]
    config, _ = read_flags(["edit_video", *flags], need_workdir=False)

    stamps = []
    own = video_files.frame_writer

    @contextlib.contextmanager
    def stamped(*arguments):
        with own(*arguments) as write:

            def written(frame):
                write(frame)
                stamps.append((time.perf_counter(), time.process_time()))

            yield written

    video_files.frame_writer = stamped
    files = (place / name for name in ("encoder.safetensors", "in.mp4", "out.mp4"))
    edit_video.edit_clip(config, *map(str, files))
    return {k: list(np.diff([s[i] for s in stamps])) for i, k in enumerate(("wall", "cpu"))}


def command_samples(frames: int) -> Samples:
    """`whole_command` in a process of its own with one thread."""
    with tempfile.TemporaryDirectory() as folder:
        code = (
            "import json; from benchmarks.video2stylegan import whole_command; "
            f"print(json.dumps(whole_command({folder!r}, {frames})))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment_of(1),
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return Samples(found["wall"], found["cpu"])


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
            body += markdown(STAGE_HEADER, stages)
        return write_report("video2stylegan", "Video2StyleGAN: speed on a CPU", body)

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
        report()
    for name, stage in STAGES:
        found = measure(
            [Contender("ours", f"{HERE}:jax_stage", {"stage": stage})], 1, rounds, steps
        )
        stages.append(_stage_row(name, found["ours"]))
        report()
    stages.append(_stage_row(COMMAND, command_samples(4 if quick else 13)))
    return report()


def _stage_row(name: str, found: Samples) -> list[str]:
    return [name, found.cell("cpu"), f"{1 / min(found.cpu):.1f}" if found.cpu else "-"]


if __name__ == "__main__":
    print(markdown(STAGE_HEADER, [_stage_row(COMMAND, command_samples(13))]))
