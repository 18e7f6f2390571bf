"""VectorNet's forward pass and train step, and the raster ConvNet, against PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import TORCH_PYTHON, Contender, markdown, measure, ratio, write_report

# Scenes, polylines, vectors: a training batch; one scene of the size the paper counts.
SHAPES = {"batch 64 of 64 x 20": (64, 64, 20), "one scene of 76 x 12": (1, 76, 12)}
COLUMNS, HORIZON, RATE = 12, 30, 1e-3
RASTER = (400, 60)  # pixels, channels


def _data(shape: str):
    import numpy as np

    scenes, polylines, vectors = SHAPES[shape]
    rng = np.random.default_rng(0)
    mask = rng.random((scenes, polylines, vectors)) < 0.8
    mask[:, 0, :2] = True
    x = rng.standard_normal((scenes, polylines, vectors, COLUMNS), np.float32)
    target = np.zeros(scenes, np.int32)
    future = rng.standard_normal((scenes, HORIZON, 2), np.float32)
    hidden = (rng.random((scenes, polylines)) < 0.15) & mask.any(-1)
    hidden[:, 0] = False
    return x, mask, target, future, hidden


def jax_forward(shape: str) -> Callable[[], None]:
    """The target's forecast, jitted."""
    import jax

    import jaxmodels

    module, variables = jaxmodels.load("driving.vectornet")
    x, mask, target, _, _ = (jax.numpy.asarray(a) for a in _data(shape))
    forward = jax.jit(module.apply)
    return lambda: jax.block_until_ready(forward(variables, x, mask, target))


def jax_train(shape: str) -> Callable[[], None]:
    """Both losses, gradients and Adam in one jitted call."""
    import jax
    import jax.numpy as jnp
    import optax

    import jaxmodels
    from jaxmodels.driving import forecast_objective

    module, variables = jaxmodels.load("driving.vectornet")
    batch = tuple(jnp.asarray(a) for a in _data(shape))
    optimizer = optax.adam(RATE)

    def step(state, batch):
        params, optimizer_state = state
        x, mask, target, future, hidden = batch
        valid = jnp.ones(future.shape[:2])

        def loss(params):
            found = module.apply(
                {"params": params}, x, mask, target, hidden, method="intermediates"
            )
            return forecast_objective.objective(found, future, valid, hidden).total

        value, grads = jax.value_and_grad(loss)(params)
        updates, optimizer_state = optimizer.update(grads, optimizer_state)
        return (optax.apply_updates(params, updates), optimizer_state), value

    compiled = jax.jit(step, donate_argnums=0)
    params = variables["params"]
    state = [(params, optimizer.init(params))]

    def run() -> None:
        state[0], value = compiled(state[0], batch)
        jax.block_until_ready(value)

    return run


def jax_raster(size: int) -> Callable[[], None]:
    """One pass of the k3 ConvNet over a raster."""
    import jax
    import numpy as np

    import jaxmodels

    module, variables = jaxmodels.load("driving.raster_convnet", in_ch=RASTER[1])
    image = np.random.default_rng(0).random((1, size, size, RASTER[1]), np.float32)
    cells = np.full((1, 20, 2), size // 8, np.int32)
    forward = jax.jit(module.apply)
    image, cells = jax.numpy.asarray(image), jax.numpy.asarray(cells)
    return lambda: jax.block_until_ready(forward(variables, image, cells))


def _torch():
    import torch

    torch.set_num_threads(int(os.environ.get("BENCHMARK_THREADS", "1")))
    torch.manual_seed(0)
    return torch


def torch_forward(shape: str) -> Callable[[], None]:
    """The same forward pass, eager."""
    torch = _torch()
    from benchmarks.vectornet_torch import VectorNet

    model = VectorNet(COLUMNS, HORIZON).eval()
    x, mask, target, _, _ = (torch.as_tensor(a) for a in _data(shape))

    def run() -> None:
        with torch.inference_mode():
            model(x, mask, target.long())

    return run


def torch_train(shape: str) -> Callable[[], None]:
    """The same train step, `torch.optim.Adam` with `foreach`."""
    torch = _torch()
    from benchmarks.vectornet_torch import VectorNet

    model = VectorNet(COLUMNS, HORIZON)
    x, mask, target, future, hidden = (torch.as_tensor(a) for a in _data(shape))
    optimizer = torch.optim.Adam(model.parameters(), RATE, foreach=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        offsets, unit, predicted = model(x, mask, target.long(), hidden)
        trajectory = 0.5 * (future - offsets).square().sum((1, 2)).mean()
        node = torch.nn.functional.huber_loss(predicted[hidden], unit[hidden], reduction="none")
        (trajectory + node.sum(-1).mean()).backward()
        optimizer.step()

    return run


def run(quick: bool = False) -> Path:
    """Write `results/vectornet.md`, again after every row."""
    rows: dict[str, list] = {"cpu": [], "wall": [], "setup": []}
    for shape in SHAPES:
        for what in ("forward", "train") if shape.startswith("batch") else ("forward",):
            for threads in (1,) if quick else (1, 2):
                contenders = [
                    Contender("JAX", f"benchmarks.vectornet:jax_{what}", {"shape": shape}),
                    Contender(
                        "PyTorch",
                        f"benchmarks.vectornet:torch_{what}",
                        {"shape": shape},
                        TORCH_PYTHON,
                    ),
                ]
                steps = 2 if shape.startswith("batch") else 50
                samples = measure(contenders, threads, 3 if quick else 8, steps)
                ours, theirs = samples["JAX"], samples["PyTorch"]
                for clock in ("cpu", "wall"):
                    cells = [ours.cell(clock), theirs.cell(clock), ratio(ours, [theirs], clock)]
                    rows[clock].append([shape, what, threads, *cells])
                setups = [f"{ours.setup:.1f}", f"{theirs.setup:.1f}"]
                rows["setup"].append([shape, what, threads, *setups])
                write_report("vectornet", TITLE, _body(rows, []))
    contenders = [
        Contender("VectorNet", "benchmarks.vectornet:jax_forward", {"shape": list(SHAPES)[1]}),
        Contender("ConvNet", "benchmarks.vectornet:jax_raster", {"size": RASTER[0]}),
    ]
    samples = measure(contenders, 1, 3 if quick else 6, 2)
    net, raster = samples["VectorNet"], samples["ConvNet"]
    times = [f"{min(raster.cpu) / min(net.cpu):.0f}"] if net.cpu and raster.cpu else ["-"]
    baseline = [[net.cell("cpu"), raster.cell("cpu"), *times]]
    return write_report("vectornet", TITLE, _body(rows, baseline))


TITLE = "VectorNet against PyTorch"


def _body(rows: dict[str, list], baseline: list) -> str:
    head = ["shape", "step", "threads", "JAX", "PyTorch"]
    return (
        "float32, 12 columns; train: trajectory and completion loss, Adam. Ratio: ours over "
        "PyTorch's, of minima / of medians; below 1 JAX is faster.\n\n"
        "## Process CPU time\n\n"
        + markdown([*head, "ratio"], rows["cpu"])
        + "\n## Wall time\n\n"
        + markdown([*head, "ratio"], rows["wall"])
        + "\n## Set-up in seconds (imports, compilation, first step)\n\n"
        + markdown(head, rows["setup"])
        + "\n## One target, CPU time, one thread: VectorNet (76 x 12), ConvNet (k3, 400 px, 60 "
        "channels)\n\n" + markdown(["VectorNet", "ConvNet", "times"], baseline)
    )
