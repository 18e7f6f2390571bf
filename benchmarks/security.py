"""ResNet-18's train step and PGD-20 on 32x32 images, against the same in PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import TORCH_PYTHON, Contender, markdown, measure, ratio, write_report

CLASSES, STEPS, EPS = 10, 20, 8 / 255
# (what, width, batch)
CASES = (("train", 64, 32), ("pgd", 16, 32), ("pgd", 64, 8))
TORCH_MODES = ("eager", "channels_last")


def jax_train(width: int, batch: int) -> Callable[[], None]:
    """Cross-entropy, gradients, SGD with momentum: one jitted call."""
    import jax
    import optax

    module, variables, images, labels = _jax_model(width, batch)
    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(state, images, labels):
        params, stats, opt = state

        def loss(params):
            logits, updated = module.apply(
                {"params": params, "batch_stats": stats}, images, train=True,
                mutable=["batch_stats"],
            )  # fmt: skip
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = optimizer.update(grads, opt)
        return (optax.apply_updates(params, updates), stats, opt), value

    compiled = jax.jit(step, donate_argnums=0)
    params = variables["params"]
    state = (params, variables["batch_stats"], optimizer.init(params))

    def run() -> None:
        nonlocal state
        state, value = compiled(state, images, labels)
        jax.block_until_ready((state, value))

    return run


def jax_pgd(width: int, batch: int) -> Callable[[], None]:
    """PGD-20 and the prediction on its images, one jitted call."""
    import jax

    from jaxmodels.security import attacks

    module, variables, images, labels = _jax_model(width, batch)
    cfg = attacks.make("pgd", eps=EPS, steps=STEPS)

    @jax.jit
    def evaluate(variables, x, y, key):
        def apply(pixels):
            return module.apply(variables, (pixels - 0.5) / 0.5)

        return apply(attacks.attack(key, apply, x, y, cfg)).argmax(-1)

    key = jax.random.key(1)
    return lambda: jax.block_until_ready(evaluate(variables, images, labels, key))


def _jax_model(width: int, batch: int):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmodels.vision.resnet import ResNet

    module = ResNet(width=width, num_classes=CLASSES)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if path[-1].key != "kernel":
            return jnp.zeros(leaf.shape, leaf.dtype)
        deviation = (2 / np.prod(leaf.shape[:-1])) ** 0.5
        return jnp.asarray(rng.normal(scale=deviation, size=leaf.shape), leaf.dtype)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    images = jnp.asarray(rng.uniform(size=(batch, 32, 32, 3)), jnp.float32)
    return module, variables, images, jnp.asarray(rng.integers(0, CLASSES, batch))


def torch_train(width: int, batch: int, mode: str) -> Callable[[], None]:
    """The same step with `torch.optim.SGD`."""
    import torch

    model, images, labels = _torch_model(width, batch, mode)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, foreach=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return run


def torch_pgd(width: int, batch: int, mode: str) -> Callable[[], None]:
    """The same attack; the weights need no gradients."""
    import torch

    from benchmarks.security_torch import pgd

    model, images, labels = _torch_model(width, batch, mode)
    model.eval().requires_grad_(False)

    def run() -> None:
        attacked = pgd(model, images, labels, EPS, STEPS)
        with torch.inference_mode():
            model((attacked - 0.5) / 0.5).argmax(-1)

    return run


def _torch_model(width: int, batch: int, mode: str):
    import torch

    from benchmarks.security_torch import ResNet18

    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    torch.manual_seed(0)
    model, images = ResNet18(width, CLASSES), torch.rand(batch, 3, 32, 32)
    if mode == "channels_last":
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    return model, images, torch.randint(0, CLASSES, (batch,))


def run(quick: bool = False) -> Path:
    """Write `results/security.md`, again after every row."""
    rounds, steps = (2, 1) if quick else (8, 2)
    walls, cpus, path = [], [], None
    for what, width, batch in CASES:
        arguments = {"width": width, "batch": batch}
        contenders = [Contender("jax", f"benchmarks.security:jax_{what}", arguments)]
        contenders += [
            Contender(
                mode, f"benchmarks.security:torch_{what}", {**arguments, "mode": mode}, TORCH_PYTHON
            )
            for mode in TORCH_MODES
        ]
        samples = measure(contenders, 1, rounds, steps)
        ours, theirs = samples["jax"], [samples[mode] for mode in TORCH_MODES]
        label = [what if what == "train" else f"PGD-{STEPS}", str(width), str(batch)]
        for rows, kind in ((walls, "wall"), (cpus, "cpu")):
            cells = [one.cell(kind) for one in (ours, *theirs)]
            least = min(getattr(ours, kind), default=float("nan"))
            rows.append([*label, *cells, ratio(ours, theirs, kind), f"{batch / least:.1f}"])
        header = ["what", "width", "batch", "ours", *TORCH_MODES, "ours / best", "images/s"]
        body = (
            "One thread. `train`: ResNet-18, cross-entropy, SGD with momentum. `PGD-20`: the "
            "attack with a random start and the prediction on its images.\n\n## Wall time\n\n"
            f"{markdown(header, walls)}\n## CPU time\n\n{markdown(header, cpus)}"
        )
        path = write_report("security", "ResNet-18 and PGD against PyTorch", body)
    return path
