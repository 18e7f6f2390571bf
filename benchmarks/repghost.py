"""RepGhost 0.5x, folded forward and train step, against the same structure in PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import TORCH_PYTHON, Contender, markdown, measure, ratio, write_report

SIZES, BATCH, WIDTH, CLASSES = (64, 224), 8, 0.5, 1000
SMOOTHING, RATE, MOMENTUM = 0.1, 0.05, 0.9


def jax_forward(size: int, width: float = WIDTH, fold_norms: bool = False) -> Callable[[], None]:
    """Folded forward pass, jitted; `fold_norms` folds every BatchNorm too."""
    import jax
    import numpy as np

    from jaxmodels.vision import repghost

    module, variables, images, _ = _jax_model(size, width)
    module, variables = (repghost.fold_all if fold_norms else repghost.fold)(
        module, jax.tree.map(np.asarray, variables)
    )
    forward = jax.jit(module.apply)
    variables = jax.tree.map(jax.numpy.asarray, variables)
    return lambda: jax.block_until_ready(forward(variables, images))


def jax_train(size: int, width: float = WIDTH) -> Callable[[], None]:
    """Label-smoothed cross-entropy, gradients and SGD with momentum, one jitted call."""
    import jax
    import jax.numpy as jnp
    import optax

    module, variables, images, labels = _jax_model(size, width)
    optimizer = optax.sgd(RATE, momentum=MOMENTUM)
    params, stats = variables["params"], variables["batch_stats"]
    targets = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), SMOOTHING)

    def step(state, images, targets, key):
        params, stats, optimizer_state = state

        def loss(params):
            logits, updated = module.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            return optax.softmax_cross_entropy(logits, targets).mean(), updated["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(grads, optimizer_state)
        return (optax.apply_updates(params, updates), stats, optimizer_state), value

    compiled = jax.jit(step, donate_argnums=0)
    state, key = (params, stats, optimizer.init(params)), jnp.asarray(jax.random.key(1))

    def run() -> None:
        nonlocal state
        state, value = compiled(state, images, targets, key)
        jax.block_until_ready((state, value))

    return run


def _jax_model(size: int, width: float):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmodels.vision import repghost

    module = repghost.RepGhostNet(width=width, num_classes=CLASSES)
    # Drawn by hand: compiling `init` would take as long as the step and count as its set-up.
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if path[-1].key != "kernel":
            return jnp.zeros(leaf.shape, leaf.dtype)
        deviation = np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(rng.normal(scale=deviation, size=leaf.shape), leaf.dtype)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    images = jnp.asarray(rng.normal(size=(BATCH, size, size, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, CLASSES, BATCH))
    return module, variables, images, labels


def torch_forward(size: int, mode: str, width: float = WIDTH) -> Callable[[], None]:
    """Folded forward pass in evaluation mode under `inference_mode`."""
    import torch

    model, images, _ = _torch_model(size, width, mode, deploy=True)
    model.eval()
    call = torch.compile(model) if mode == "compile" else model

    def run() -> None:
        with torch.inference_mode():
            call(images)

    return run


def torch_train(size: int, mode: str, width: float = WIDTH) -> Callable[[], None]:
    """The same train step, `torch.optim.SGD` with `foreach`."""
    import torch

    model, images, labels = _torch_model(size, width, mode, deploy=False)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, foreach=True)
    call = torch.compile(model) if mode == "compile" else model

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(call(images), labels, label_smoothing=SMOOTHING)
        loss.backward()
        optimizer.step()

    return run


def _torch_model(size: int, width: float, mode: str, deploy: bool):
    import torch

    from benchmarks.repghost_torch import RepGhostNet

    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    torch.manual_seed(0)
    model = RepGhostNet(width, CLASSES, deploy)
    images = torch.randn(BATCH, 3, size, size)
    if mode == "channels_last":
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    return model, images, torch.randint(0, CLASSES, (BATCH,))


TORCH_MODES = ("eager", "channels_last", "compile")


def run(quick: bool = False) -> Path:
    """Write `results/repghost.md`, again after every row, for the whole takes long to compile."""
    rounds, steps = (3, 2) if quick else (10, 3)
    rows: dict[str, list] = {"wall": [], "cpu": [], "setup": []}
    path = None
    for threads in (1, 2):
        if threads > len(os.sched_getaffinity(0)):
            continue
        for what in ("forward", "train"):
            for size in SIZES:
                samples = measure(_contenders(what, size), threads, rounds, steps)
                label = [str(threads), f"{size}x{size}", what]
                ours, theirs = samples["jax"], [samples[mode] for mode in TORCH_MODES]
                for kind in ("wall", "cpu"):
                    cells = [one.cell(kind) for one in (ours, *theirs)]
                    rows[kind].append([*label, *cells, ratio(ours, theirs, kind)])
                rows["setup"].append([*label, *(f"{one.setup:.1f}" for one in (ours, *theirs))])
                path = write_report("repghost", "RepGhost 0.5x against PyTorch", _body(rows))
    return path


def _contenders(what: str, size: int) -> list[Contender]:
    ours = Contender("jax", f"benchmarks.repghost:jax_{what}", {"size": size})
    target = f"benchmarks.repghost:torch_{what}"
    theirs = (
        Contender(mode, target, {"size": size, "mode": mode}, TORCH_PYTHON) for mode in TORCH_MODES
    )
    return [ours, *theirs]


def _body(rows: dict[str, list]) -> str:
    head = ["threads", "size", "step", "JAX", *(f"PyTorch {mode}" for mode in TORCH_MODES)]
    return (
        f"RepGhostNet {WIDTH}x, batch {BATCH}, float32. Forward: folded. Train: label smoothing "
        f"{SMOOTHING}, SGD with momentum, donated state. Ratio: JAX over the best PyTorch column, "
        "of minima / of medians; below 1 JAX is faster.\n\n## Process CPU time\n\n"
        "All threads; at two threads PyTorch's waiting thread spins and counts, so read wall time "
        "there.\n\n"
        + markdown([*head, "ratio"], rows["cpu"])
        + "\n## Wall time\n\n"
        + markdown([*head, "ratio"], rows["wall"])
        + "\n## Set-up in seconds of wall time (imports, construction, compilation, first step)\n\n"
        + markdown(head, rows["setup"])
    )
