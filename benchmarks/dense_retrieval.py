"""Dual encoder against PyTorch (transformers' BertModel), and exact search against faiss."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import TORCH_PYTHON, Contender, markdown, measure, ratio, write_report

# The specification's anchor: 11.1 M parameters, shared towers.
LAYERS, WIDTH, HEADS, FEED_FORWARD, VOCABULARY, POSITIONS = 4, 256, 4, 1024, 30522, 512
QUERIES, QUERY_LENGTH, DOCUMENTS, DOCUMENT_LENGTH = 16, 32, 8, 64
RATE, CLIP = 1e-4, 2.0


def _ids():
    import numpy as np

    rng = np.random.default_rng(0)
    queries = rng.integers(1, VOCABULARY, (QUERIES, QUERY_LENGTH)).astype(np.int32)
    documents = rng.integers(1, VOCABULARY, (QUERIES, DOCUMENTS, DOCUMENT_LENGTH)).astype(np.int32)
    return queries, documents


def _jax_task():
    import jax

    from jaxmodels.retrieval.dual_encoder import DualEncoder
    from train.tasks.dense_retrieval import DenseRetrieval

    module = DualEncoder(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FEED_FORWARD,
        max_position_embeddings=POSITIONS,
        share_weight=True,
        pooler=False,
    )
    task = DenseRetrieval(model=module)
    return task, *task.init(jax.random.key(0), None)


def jax_train() -> Callable[[], None]:
    """In-batch loss with dropout 0.1, clipping, Adam: one jitted call."""
    import jax
    import optax

    task, params, extra = _jax_task()
    queries, documents = _ids()
    batch = jax.device_put({"query_ids": queries, "doc_ids": documents})
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(RATE))

    def step(state, batch):
        params, optimizer_state, key = state
        key, own = jax.random.split(key)
        loss, grads = jax.value_and_grad(lambda p: task.loss(p, extra, batch, own)[0])(params)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state, key), loss

    compiled = jax.jit(step, donate_argnums=0)
    state = (params, optimizer.init(params), jax.random.key(1))

    def run() -> None:
        nonlocal state
        state, value = compiled(state, batch)
        jax.block_until_ready((state, value))

    return run


def jax_encode() -> Callable[[], None]:
    """Vectors of the documents, one jitted call."""
    import jax

    task, params, _ = _jax_task()
    rows = jax.device_put(_ids()[1].reshape(-1, DOCUMENT_LENGTH))
    encode = jax.jit(lambda p, x: task.model.apply({"params": p}, x, method="encode_documents"))
    return lambda: jax.block_until_ready(encode(params, rows))


def _torch_model():
    import torch
    from transformers import BertConfig, BertModel

    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FEED_FORWARD,
        max_position_embeddings=POSITIONS,
    )
    queries, documents = (torch.as_tensor(x).long() for x in _ids())
    return BertModel(config, add_pooling_layer=False), queries, documents


def torch_train() -> Callable[[], None]:
    """The same step: eager, AdamW with weight decay 0."""
    import torch

    model, queries, documents = _torch_model()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    target = torch.arange(QUERIES) * DOCUMENTS
    rows = documents.reshape(-1, DOCUMENT_LENGTH)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        q = model(queries, (queries != 0).long()).last_hidden_state[:, 0]
        d = model(rows, (rows != 0).long()).last_hidden_state[:, 0]
        loss = torch.nn.functional.cross_entropy(q @ d.T, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return run


def torch_encode() -> Callable[[], None]:
    """Vectors of the documents under `inference_mode`."""
    import torch

    model, _, documents = _torch_model()
    model.eval()
    rows = documents.reshape(-1, DOCUMENT_LENGTH)

    def run() -> None:
        with torch.inference_mode():
            model(rows, (rows != 0).long()).last_hidden_state[:, 0]

    return run


def _vectors(count: int, width: int, queries: int):
    import numpy as np

    rng = np.random.default_rng(0)
    documents = rng.standard_normal((count, width), np.float32)
    return documents, rng.standard_normal((queries, width), np.float32)


def jax_search(count: int, width: int, queries: int, k: int) -> Callable[[], None]:
    """Exact search with a running best-k over blocks."""
    from jaxmodels.retrieval.index import ExactIndex

    documents, asked = _vectors(count, width, queries)
    index = ExactIndex()
    index.add(documents)
    return lambda: index.search(asked, k)


def faiss_search(count: int, width: int, queries: int, k: int) -> Callable[[], None]:
    """faiss' flat inner-product index."""
    import faiss

    faiss.omp_set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    documents, asked = _vectors(count, width, queries)
    index = faiss.IndexFlatIP(width)
    index.add(documents)
    return lambda: index.search(asked, k)


SEARCHES = ((1_000_000, 256, 64, 100), (1_000_000, 256, 1, 100), (1_000_000, 256, 256, 1000))


def run(quick: bool = False) -> Path:
    """Write `results/dense_retrieval.md`, again after every row."""
    rounds, steps = (2, 1) if quick else (5, 2)
    steps_rows: list[list[str]] = []
    search_rows: list[list[str]] = []
    path = None
    for what in ("train", "encode"):
        samples = measure(
            [
                Contender("jax", f"benchmarks.dense_retrieval:jax_{what}"),
                Contender("torch", f"benchmarks.dense_retrieval:torch_{what}", {}, TORCH_PYTHON),
            ],
            1,
            rounds,
            steps,
        )
        ours, theirs = samples["jax"], samples["torch"]
        documents = QUERIES * DOCUMENTS
        rates = [f"{documents / min(s.cpu):.0f}" if s.cpu else "-" for s in (ours, theirs)]
        cells = [ours.cell("cpu"), theirs.cell("cpu"), ratio(ours, [theirs], "cpu")]
        steps_rows.append([what, *cells, *rates, f"{ours.setup:.0f}"])
        path = _write(steps_rows, search_rows)
    for count, width, queries, k in SEARCHES:
        given = {"count": count, "width": width, "queries": queries, "k": k}
        samples = measure(
            [
                Contender("jax", "benchmarks.dense_retrieval:jax_search", given),
                Contender("faiss", "benchmarks.dense_retrieval:faiss_search", given),
            ],
            1,
            max(rounds // 2, 2),
            1,
        )
        ours, theirs = samples["jax"], samples["faiss"]
        cells = [ours.cell("cpu"), theirs.cell("cpu"), ratio(ours, [theirs], "cpu")]
        search_rows.append([f"{count:,} x {width}", str(queries), str(k), *cells])
        path = _write(steps_rows, search_rows)
    return path


def _write(steps_rows: list[list[str]], search_rows: list[list[str]]) -> Path:
    rates = ["JAX documents/s", "PyTorch documents/s", "JAX set-up s"]
    body = (
        f"Encoder of {LAYERS} layers x {WIDTH}, shared towers, {QUERIES} queries x {QUERY_LENGTH} "
        f"and {QUERIES * DOCUMENTS} documents x {DOCUMENT_LENGTH} tokens, float32, one thread, "
        "dropout 0.1 in training, AdamW, clipping 2.0; PyTorch is transformers' BertModel, eager. "
        "Process CPU time; ratio of minima / of medians, below 1 JAX is faster.\n\n"
        + markdown(["step", "JAX", "PyTorch", "ratio", *rates], steps_rows)
        + "\nExact inner-product search, one thread; faiss is `IndexFlatIP`.\n\n"
        + markdown(["vectors", "queries", "k", "JAX", "faiss", "ratio"], search_rows)
    )
    return write_report("dense_retrieval", "Dense retrieval against PyTorch and faiss", body)
