"""Biomedical: the 2-D train step and 3-D sliding windows against PyTorch, metrics, peak memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import TORCH_PYTHON, Contender, markdown, measure, ratio, write_report

FEATURES_2D = (32, 64, 128, 256, 512, 512)
FEATURES_3D = (8, 16, 32, 64)
BATCH, SIZE, CLASSES = 4, 128, 2
TILE, VOLUME = 32, (48, 64, 64)
# Streaming: float64 voxels, 128 MiB and 1 GiB.
STREAM_SHAPES = ((64, 512, 512), (512, 512, 512))


def _network(ndim: int, features, classes: int = CLASSES):
    from configs.biomedical import network
    from jaxmodels.biomedical.unet import PlainConvUNet

    arguments = network(ndim, 1, len(features))
    arguments["features_per_stage"] = features
    return PlainConvUNet(input_channels=1, num_classes=classes, **arguments)


def _variables(module):
    import jax
    import jax.numpy as jnp
    import numpy as np

    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape)
        if path[-1].key == "bias":
            return jnp.zeros(leaf.shape)
        return jnp.asarray(rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5, "f4")

    return jax.tree_util.tree_map_with_path(draw, dict(shapes))


def jax_train(size: int = SIZE) -> Callable[[], None]:
    """Cross-entropy and Dice at every resolution, gradients, clipping and Nesterov SGD."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxmodels.biomedical import losses

    module = _network(2, FEATURES_2D)
    params = _variables(module)["params"]
    optimizer = optax.chain(
        optax.clip_by_global_norm(12.0),
        optax.add_decayed_weights(3e-5),
        optax.sgd(1e-2, momentum=0.99, nesterov=True),
    )
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(BATCH, size, size, 1)), jnp.float32)
    label = jnp.asarray(rng.integers(0, CLASSES, (BATCH, size, size)))

    def step(params, state, image, label):
        def total(params):
            levels = module.apply({"params": params}, image)
            targets = [losses.nearest_downsample(label, y.shape[1:-1]) for y in levels]
            return losses.deep_supervision_loss(losses.segmentation_loss, levels, targets)

        value, grads = jax.value_and_grad(total)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    compiled = jax.jit(step, donate_argnums=(0, 1))
    held = [params, optimizer.init(params)]

    def run() -> None:
        *held[:], value = compiled(*held, image, label)
        jax.block_until_ready((held, value))

    return run


def torch_train(mode: str, size: int = SIZE) -> Callable[[], None]:
    """The same in PyTorch: `foreach` SGD, clipping, deep supervision."""
    import torch

    from benchmarks.biomedical_torch import UNet, loss

    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    torch.manual_seed(0)
    model = UNet(2, 1, CLASSES, list(FEATURES_2D))
    image = torch.randn(BATCH, 1, size, size)
    if mode == "channels_last":
        model = model.to(memory_format=torch.channels_last)
        image = image.to(memory_format=torch.channels_last)
    label = torch.randint(0, CLASSES, (BATCH, size, size))
    weights = [0.5**i for i in range(len(FEATURES_2D) - 2)]
    optimizer = torch.optim.SGD(
        model.parameters(), 1e-2, 0.99, nesterov=True, weight_decay=3e-5, foreach=True
    )

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        total = 0
        for i, (weight, logits) in enumerate(zip(weights, model(image))):
            target = label[:, :: 2**i, :: 2**i]
            total = total + weight / sum(weights) * loss(logits, target)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 12.0)
        optimizer.step()

    return run


def jax_windows() -> Callable[[], None]:
    """A volume by overlapping Gaussian-weighted windows, no mirroring."""
    import numpy as np

    from train.segmentation_inference import Windows, predict_logits

    module = _network(3, FEATURES_3D)
    variables = _variables(module)
    image = np.random.default_rng(0).normal(size=(*VOLUME, 1)).astype(np.float32)
    windows = Windows((TILE,) * 3, CLASSES, batch=2)
    return lambda: predict_logits(module, variables, image, windows)


def torch_windows(mode: str) -> Callable[[], None]:
    """The same loop in PyTorch, sums and weights in tensors."""
    import itertools

    import torch

    from benchmarks.biomedical_torch import UNet

    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    torch.manual_seed(0)
    model = UNet(3, 1, CLASSES, list(FEATURES_3D)).eval()
    image = torch.randn(1, *VOLUME)
    layout = torch.channels_last_3d if mode == "channels_last" else torch.contiguous_format
    model = model.to(memory_format=layout)
    line = torch.exp(-0.5 * ((torch.arange(TILE) - TILE // 2) / (TILE / 8)) ** 2)
    weights = 10 * line[:, None, None] * line[:, None] * line
    # Sizes that half windows divide: evenly spread starts are multiples of half a window.
    places = list(itertools.product(*(range(0, n - TILE + 1, TILE // 2) for n in VOLUME)))

    def run() -> None:
        with torch.inference_mode():
            logits, total = torch.zeros(CLASSES, *VOLUME), torch.zeros(VOLUME)
            for i in range(0, len(places), 2):
                boxes = [tuple(slice(s, s + TILE) for s in p) for p in places[i : i + 2]]
                tiles = torch.stack([image[(slice(None), *b)] for b in boxes])
                found = model(tiles.contiguous(memory_format=layout), deep=False)[0]
                for box, one in zip(boxes, found):
                    logits[(slice(None), *box)] += one * weights
                    total[box] += weights
            logits /= total

    return run


def _masks():
    import numpy as np

    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (60, 96, 96)), indexing="ij"), -1)
    a = ((grid - (30, 48, 44)) ** 2).sum(-1) <= 22**2
    b = ((grid - (32, 46, 50)) ** 2).sum(-1) <= 24**2
    return a, b, (2.0, 0.8, 1.1)


def ours_metrics() -> Callable[[], None]:
    """Surface elements: HD95, average distances and surface Dice of one pair of masks."""
    from jaxmodels.biomedical import surface_distance

    a, b, spacing = _masks()

    def run() -> None:
        found = surface_distance.surface_distances(a, b, spacing)
        surface_distance.hausdorff(found, 95)
        surface_distance.average_surface_distance(found)
        surface_distance.surface_dice(found, 1.0)

    return run


def reference_metrics() -> Callable[[], None]:
    """The same by the package surface-distance, in the interpreter that has it."""
    from surface_distance import metrics

    a, b, spacing = _masks()

    def run() -> None:
        found = metrics.compute_surface_distances(a, b, spacing)
        metrics.compute_robust_hausdorff(found, 95)
        metrics.compute_average_surface_distance(found)
        metrics.compute_surface_dice_at_tolerance(found, 1.0)

    return run


def ours_voxel_metrics() -> Callable[[], None]:
    """Boundary voxels: HD95 and ASSD of one pair of masks."""
    from jaxmodels.biomedical import surface_distance

    a, b, spacing = _masks()

    def run() -> None:
        found = surface_distance.voxel_distances(a, b, spacing)
        surface_distance.hausdorff(found, 95)
        surface_distance.symmetric_surface_distance(found)

    return run


def monai_metrics() -> Callable[[], None]:
    """The same by monai."""
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    a, b, spacing = _masks()
    pair = [torch.from_numpy(m)[None, None].float() for m in (b, a)]

    def run() -> None:
        compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing)
        compute_average_surface_distance(
            *pair, include_background=True, symmetric=True, spacing=spacing
        )

    return run


TORCH_MODES = ("eager", "channels_last")


def _has(module: str) -> bool:
    command = f"import importlib.util as u, sys; sys.exit(u.find_spec('{module}') is None)"
    return subprocess.run([TORCH_PYTHON, "-c", command], capture_output=True).returncode == 0


def _rows(threads: int, rounds: int, steps: int) -> tuple[list, list]:
    network, measured = [], []
    for what in ("train", "windows"):
        theirs = [
            Contender(m, f"benchmarks.biomedical:torch_{what}", {"mode": m}, TORCH_PYTHON)
            for m in TORCH_MODES
        ]
        ours = Contender("jax", f"benchmarks.biomedical:jax_{what}", {})
        samples = measure([ours, *theirs], threads, rounds, steps)
        columns = [samples["jax"], *(samples[m] for m in TORCH_MODES)]
        for kind in ("cpu", "wall"):
            cells = [c.cell(kind) for c in columns]
            network.append([threads, what, kind, *cells, ratio(columns[0], columns[1:], kind)])
    for name, own, other in (
        ("surface_distance", "ours_metrics", "reference_metrics"),
        ("monai", "ours_voxel_metrics", "monai_metrics"),
    ):
        if not _has(name):
            continue
        contenders = [
            Contender("ours", f"benchmarks.biomedical:{own}", {}),
            Contender("theirs", f"benchmarks.biomedical:{other}", {}, TORCH_PYTHON),
        ]
        samples = measure(contenders, threads, rounds, steps)
        for kind in ("cpu", "wall"):
            cells = [samples[c].cell(kind) for c in ("ours", "theirs")]
            told = ratio(samples["ours"], [samples["theirs"]], kind)
            measured.append([threads, name, kind, *cells, told])
    return network, measured


def stream(shape=STREAM_SHAPES[1], tile: int = 64, step: float = 1.0) -> dict[str, float]:
    """Segment a float64 volume on disk; the growth of peak resident memory in MiB."""
    import numpy as np

    from train.segmentation_inference import FileArray, LazyVolume, Windows, stream_labels

    # One convolution a stage: this is about memory, which a larger network's windows only shift.
    module = _network(3, (2, 4)).clone(n_conv_per_stage=(1, 1), n_conv_per_stage_decoder=(1,))
    variables = _variables(module)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "volume.npy"
        header = np.lib.format.open_memmap(path, "w+", np.float64, shape)
        offset = header.offset
        del header
        blocks = FileArray(path, shape, np.float64, offset)
        rng = np.random.default_rng(0)
        for z in range(0, shape[0], 8):
            n = min(8, shape[0] - z)
            blocks[z : z + n] = rng.standard_normal((n, *shape[1:]))
        windows = Windows((tile,) * 3, CLASSES, step=step, batch=1)
        # One window first: the compiled program and its buffers are not the volume's.
        small = Path(folder) / "small.npy"
        np.save(small, np.zeros((tile,) * 3, np.float32))
        stream_labels(module, [variables], LazyVolume(small), Path(folder) / "a.npy", windows)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.monotonic()
        count = stream_labels(
            module, [variables], LazyVolume(path), Path(folder) / "labels.npy", windows
        )
        seconds = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mib = 2**20
    return {
        "volume_mib": float(np.prod(shape)) * 8 / mib,
        "patch_mib": tile**3 * 4 * (2 + CLASSES) / mib,
        "baseline_mib": before / 1024,
        "growth_mib": (after - before) / 1024,
        "windows": count,
        "seconds": seconds,
    }


def run_stream(shape=STREAM_SHAPES[1]) -> dict[str, float]:
    """`stream` in a process of its own, so that nothing else has raised its peak."""
    code = (
        f"import json; from benchmarks.biomedical import stream; print(json.dumps(stream({shape})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def run(quick: bool = False) -> Path:
    """Write `results/biomedical.md`."""
    rounds, steps = (3, 1) if quick else (8, 2)
    network, measured = [], []
    memory: list[list] = []
    path = None
    for threads in (1, 2):
        if threads > len(os.sched_getaffinity(0)):
            continue
        a, b = _rows(threads, rounds, steps)
        network += a
        measured += b
        path = write_report("biomedical", TITLE, _body(network, measured, memory))
    for shape in STREAM_SHAPES:
        found = run_stream(shape)
        memory.append([f"{v:.0f}" for v in found.values()])
        path = write_report("biomedical", TITLE, _body(network, measured, memory))
    return path


TITLE = "Biomedical: U-Nets against PyTorch, metrics, streaming"


def _body(network: list, measured: list, memory: list) -> str:
    head = ["threads", "step", "time", "JAX", *(f"PyTorch {m}" for m in TORCH_MODES), "ratio"]
    return (
        f"2-D: PlainConvUNet {FEATURES_2D}, batch {BATCH}, {SIZE}x{SIZE}, float32, train step with "
        f"deep supervision, clipping and Nesterov SGD. 3-D: PlainConvUNet {FEATURES_3D}, windows "
        f"of {TILE}^3 over {VOLUME}, step 0.5. Ratio: JAX over the best PyTorch column, of minima "
        "/ of medians; below 1 JAX is faster.\n\n"
        + markdown(head, network)
        + "\n## Metrics of one pair of masks of 60x96x96 voxels\n\n"
        + markdown(["threads", "package", "time", "ours", "theirs", "ratio"], measured)
        + "\n## Streaming a volume from disk\n\nWindows of 64^3, step 1, labels written as they "
        "are finished; growth of the process's peak resident memory after one window.\n\n"
        + markdown(
            ["volume MiB", "one window MiB", "before MiB", "growth MiB", "windows", "seconds"],
            memory,
        )
    )
