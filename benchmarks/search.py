"""Supernets: train step and candidates scored, against eager PyTorch on slices of just the size.

The spaces are the small ones of `configs/scalenet.py` and `configs/vitas.py`. Both sides train a
new random sub-network every step (ours draws it inside the one compiled function) and score the
same list of candidates. Sub-networks differ in their work, so a sample of training is a row of
steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import TORCH_PYTHON, Contender, markdown, measure, ratio, write_report

BATCH, CANDIDATES, HELD_OUT = 64, 16, 256
# Steps of one sample; sub-networks that PyTorch trains before its list begins anew.
ROW, TRAINED = 16, 256
WORK = {
    "scalenet_train": f"ScaleNet: {ROW} training steps, batch {BATCH}, image size 16 to 25",
    "scalenet_score": f"ScaleNet: {CANDIDATES} candidates on {HELD_OUT} images, both sides",
    "vitas_train": f"ViTAS: {ROW} training steps, batch {BATCH}, 32 pixels",
    "vitas_score": f"ViTAS: {CANDIDATES} candidates on {HELD_OUT} images",
}


def _scalenet_space():
    from jaxmodels.search import scalenet_space

    return scalenet_space.make_space(
        **scalenet_space.DIGITS, resolution_multiplier=scalenet_space.DIGITS_RESOLUTIONS
    )


def _vitas_space():
    from jaxmodels.search.vitas_space import Space

    return Space((4, 8, 16), (1, 2, 3, 4), 48, 360, 96, 4, 10, image_size=32)


def _scalenet_networks(space, count=CANDIDATES):
    """`(ops, width, resolution)` of random base models under random scalings."""
    import numpy as np

    rng = np.random.default_rng(0)
    out = []
    for _ in range(count):
        stage = int(rng.choice(4, p=np.array([1, 4, 5, 7]) / 17))
        triples = space.scalings(stage)
        triple = triples[int(rng.integers(len(triples)))]
        out.append(space.scaled(space.random_base(rng), stage, triple))
    return out


def jax_scalenet_train() -> Callable[[], None]:
    """The task's own loss, gradients and SGD; sub-networks are drawn inside."""
    import optax

    from jaxmodels.search.scalenet import SuperSupernet
    from train.tasks.supernet import Supernet

    task = Supernet(model=SuperSupernet(**_arguments()))
    return _jax_train(task, optax.sgd(0.05, 0.9, nesterov=True), (25, 25, 3))


def jax_vitas_train() -> Callable[[], None]:
    """The task's own loss, gradients and AdamW."""
    import optax

    from jaxmodels.interop import catalog
    from train.tasks.superformer import Superformer

    task = Superformer(model=catalog.find("search.vitas:digits").build(), probability=0.3)
    return _jax_train(task, optax.adamw(1e-3), (32, 32, 3))


def _arguments():
    from jaxmodels.search.scalenet import VARIANTS

    return VARIANTS["digits"]


def _batch(shape, count=BATCH):
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(count, *shape)), jnp.float32)
    return {"image": images, "label": jnp.asarray(rng.integers(0, 10, count), jnp.int32)}


def _jax_train(task, optimizer, shape):
    import jax
    import optax

    batch = _batch(shape)
    params, extra = jax.jit(task.init)(jax.random.key(0), batch)

    def step(state, key):
        params, extra, memory = state
        key, own = jax.random.split(key)
        gradient = jax.value_and_grad(task.loss, has_aux=True)
        (_, (extra, _)), grads = gradient(params, extra, batch, own)
        updates, memory = optimizer.update(grads, memory, params)
        return (optax.apply_updates(params, updates), extra, memory), key

    compiled = jax.jit(step, donate_argnums=0)
    state, key = (params, extra, optimizer.init(params)), jax.random.key(1)

    def run() -> None:
        nonlocal state, key
        for _ in range(ROW):
            state, key = compiled(state, key)
        jax.block_until_ready(state)

    return run


def jax_scalenet_score() -> Callable[[], None]:
    """`scoring.Scorer` on the candidates."""
    import jax
    import jax.numpy as jnp

    from jaxmodels.search.scalenet import SuperSupernet
    from train.search import scoring
    from train.tasks.supernet import Supernet

    task = Supernet(model=SuperSupernet(**_arguments()))
    batch = _batch((25, 25, 3), HELD_OUT)
    params, extra = jax.jit(task.init)(jax.random.key(0), batch)
    batches = [(jnp.asarray(batch["image"]), batch["label"], jnp.ones(HELD_OUT))]
    scorer = scoring.Scorer(task.hits, {"params": params, **extra}, batches, chunk=CANDIDATES)
    networks = _scalenet_networks(task.model.space)
    return lambda: scoring.network_scores(task, scorer, networks)


def jax_vitas_score(together: int = 1) -> Callable[[], None]:
    """`scoring.Scorer` on genomes; `together` of them side by side."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmodels.interop import catalog
    from train.search import scoring
    from train.tasks.superformer import Superformer

    task = Superformer(model=catalog.find("search.vitas:digits").build(), sharing="one_sided")
    batch = _batch((32, 32, 3), HELD_OUT)
    params, _ = jax.jit(task.init)(jax.random.key(0), batch)
    batches = [(jnp.asarray(batch["image"]), batch["label"], jnp.ones(HELD_OUT))]
    options = {"chunk": CANDIDATES, "together": together}
    scorer = scoring.Scorer(task.hits, {"params": params}, batches, **options)
    space = task.model.space
    genomes = space.sample_many(np.random.default_rng(0), CANDIDATES, 0.3, shift=True)
    return lambda: scorer(genomes)


def _torch_ready(model, shape, count):
    import torch

    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    torch.manual_seed(0)
    return model.train(), torch.randn(count, *shape), torch.randint(0, 10, (count,))


def _torch_subnets(space, count=CANDIDATES):
    from benchmarks.search_subnets import subnet

    networks = _scalenet_networks(space, count)
    return [(subnet(space, ops, width), size) for ops, width, size in networks]


def torch_scalenet_train() -> Callable[[], None]:
    """Eager: a sub-network on slices, its image resized, SGD with momentum."""
    import torch
    from torch.nn import functional

    from benchmarks.search_torch import SuperSupernet

    space = _scalenet_space()
    model, images, labels = _torch_ready(SuperSupernet(space), (3, 25, 25), BATCH)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, nesterov=True, foreach=True)
    subnets, calls = _torch_subnets(space, TRAINED), 0

    def step() -> None:
        nonlocal calls
        subnet, size = subnets[calls % TRAINED]
        x = functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
        optimizer.zero_grad(set_to_none=True)
        logits = model(x, subnet, calls % 2 == 1)
        functional.cross_entropy(logits, labels, label_smoothing=0.1).backward()
        optimizer.step()
        calls += 1

    return lambda: [step() for _ in range(ROW)]


def torch_scalenet_score() -> Callable[[], None]:
    """Eager: the candidates in a loop, both sides added, batch statistics."""
    import torch
    from torch.nn import functional

    from benchmarks.search_torch import SuperSupernet

    space = _scalenet_space()
    model, images, labels = _torch_ready(SuperSupernet(space), (3, 25, 25), HELD_OUT)
    subnets = _torch_subnets(space)

    def run() -> None:
        with torch.inference_mode():
            for subnet, size in subnets:
                x = functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
                logits = model(x, subnet, False) + model(x, subnet, True)
                (logits.argmax(1) == labels).sum().item()

    return run


def _torch_genomes(count=CANDIDATES):
    import numpy as np

    space = _vitas_space()
    return space, space.sample_many(np.random.default_rng(0), count, 0.3, shift=True)


def torch_vitas_train() -> Callable[[], None]:
    """Eager: a genome on slices, AdamW."""
    import torch
    from torch.nn import functional

    from benchmarks.search_torch import Superformer

    space, genomes = _torch_genomes(TRAINED)
    model, images, labels = _torch_ready(Superformer(space), (3, 32, 32), BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, foreach=True)
    calls = 0

    def step() -> None:
        nonlocal calls
        optimizer.zero_grad(set_to_none=True)
        logits = model(images, genomes[calls % TRAINED])
        functional.cross_entropy(logits, labels, label_smoothing=0.1).backward()
        optimizer.step()
        calls += 1

    return lambda: [step() for _ in range(ROW)]


def torch_vitas_score() -> Callable[[], None]:
    """Eager: the genomes in a loop."""
    import torch

    from benchmarks.search_torch import Superformer

    space, genomes = _torch_genomes()
    model, images, labels = _torch_ready(Superformer(space), (3, 32, 32), HELD_OUT)

    def run() -> None:
        with torch.inference_mode():
            for genome in genomes:
                (model(images, genome).argmax(1) == labels).sum().item()

    return run


def run(quick: bool = False) -> Path:
    """Write `results/search.md`, again after every row."""
    rounds, steps = (4, 1) if quick else (8, 2)
    rows: dict[str, list] = {"cpu": [], "wall": [], "setup": []}
    path = None
    for name, title in WORK.items():
        many = 1 if name.endswith("score") else steps
        samples = measure(
            [
                Contender("jax", f"benchmarks.search:jax_{name}"),
                Contender("torch", f"benchmarks.search:torch_{name}", python=TORCH_PYTHON),
            ],
            1,
            rounds,
            many,
        )
        ours, theirs = samples["jax"], samples["torch"]
        for kind in ("cpu", "wall"):
            cells = [ours.cell(kind), theirs.cell(kind), ratio(ours, [theirs], kind)]
            rows[kind].append([title, *cells])
        rows["setup"].append([title, f"{ours.setup:.1f}", f"{theirs.setup:.1f}"])
        path = write_report("search", "Supernets against eager PyTorch", _body(rows))
    return path


def _body(rows) -> str:
    head = ["work", "JAX", "PyTorch eager", "ratio"]
    return (
        "One thread. Ratio: JAX over PyTorch, of minima / of medians; below 1 JAX is faster.\n\n"
        "## Process CPU time\n\n"
        + markdown(head, rows["cpu"])
        + "\n## Wall time\n\n"
        + markdown(head, rows["wall"])
        + "\n## Set-up in seconds (imports, compilation, first step)\n\n"
        + markdown(["work", "JAX", "PyTorch"], rows["setup"])
    )
