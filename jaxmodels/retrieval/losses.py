"""Ranking losses of dual and cross encoders.

Axis names: B queries, N documents of a query (the first one relevant), D = B * N documents of the
step; the positive of query b is document b * N. Softmaxes are computed in float32 or wider.
Source: microsoft/SimXNS@0163380c69533be0112142ee6ba25f43bc9246bc (CAPSTONE, LEAD, PROD).

**Many devices.** Under `jit` with sharded rows the vectors are global arrays: every query sees all
documents of all devices, and the gradient is that of the one global mean. In a mapped function
(`pmap`, `shard_map`) `gather` brings the vectors together and its gradient flows back to every
device. The original gathers detached copies, which makes its update 1/W of the true one on W
devices; `gather(..., gradient="local_average")` is that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

GATHER_GRADIENTS = ("true", "local_average")


def scores_of(
    queries: jax.Array, documents: jax.Array, scales: tuple[float, float] = (1.0, 1.0)
) -> jax.Array:
    """Inner products [B, D] of vectors [B, H] and [D, H], accumulated in float32 or wider.

    `scales` are factors of the query and the document vectors. Vectors are not normalized: from
    scratch, products near H leave the softmax no gradient, and 1 / sqrt(H) in all is a good start.
    """
    queries, documents = queries * scales[0], documents * scales[1]
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    return jnp.einsum("bh,dh->bd", queries, documents, preferred_element_type=wide)


def group_scores(
    queries: jax.Array, documents: jax.Array, scales: tuple[float, float] = (1.0, 1.0)
) -> jax.Array:
    """Inner products [B, N] of queries [B, H] with their own documents [B * N, H]."""
    queries, documents = queries * scales[0], documents * scales[1]
    groups = documents.reshape(len(queries), _group_size(queries, documents), -1)
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    return jnp.einsum("bh,bnh->bn", queries, groups, preferred_element_type=wide)


def in_batch_nll(
    queries: jax.Array,
    documents: jax.Array,
    positive_index: jax.Array | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
) -> tuple[jax.Array, jax.Array]:
    """Mean of -log softmax(q d^T) at each query's positive, over all D documents; and hits.

    Columns of other queries count as negatives, their positives included, without masking.

    Args:
      queries: [B, H]. documents: [D, H].
      positive_index: int [B], None for b * N with N = D / B.
      scales: see `scores_of`.

    Returns: (loss [], number of queries whose best document is the positive, int []).

    Raises ValueError when D is not a multiple of B, or (outside `jit`) an index is not in 0..D-1.
    """
    if positive_index is None:
        positive_index = jnp.arange(len(queries)) * _group_size(queries, documents)
    return nll(scores_of(queries, documents, scales), positive_index)


def nll(scores: jax.Array, target: jax.Array | int = 0) -> tuple[jax.Array, jax.Array]:
    """Mean of -log softmax(scores)[b, target_b] and the count of argmax hits.

    Args:
      scores: [B, D]; target: int [B] or one column for all, as 0 for a query's own group.

    Raises ValueError for a target outside of the columns (values outside `jit` only).
    """
    scores = _wide(scores)
    if not isinstance(target, jax.core.Tracer):
        given = np.asarray(target)
        if given.size and (given.min() < 0 or given.max() >= scores.shape[-1]):
            raise ValueError(
                f"positive_index {given.min()}..{given.max()} for {scores.shape[-1]} documents "
                f"of {scores.shape[0]} queries"
            )
    target = jnp.broadcast_to(jnp.asarray(target), scores.shape[:-1])
    log_p = jax.nn.log_softmax(scores)
    loss = -jnp.take_along_axis(log_p, target[:, None], -1).mean()
    return loss, (scores.argmax(-1) == target).sum()


def kl(target_scores: jax.Array, scores: jax.Array) -> jax.Array:
    """mean_b sum_d p log(p / q) with p = softmax(target_scores), q = softmax(scores), [B, D].

    In log space; 0 log 0 = 0. Neither side is detached.
    """
    log_p, log_q = jax.nn.log_softmax(_wide(target_scores)), jax.nn.log_softmax(_wide(scores))
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean()


def distillation(student: jax.Array, teacher: jax.Array, temperature: float = 1.0) -> jax.Array:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), scores [B, D].

    Raises ValueError for a temperature that is not positive, or scores of two shapes.
    """
    check_temperature(temperature)
    check_same(student, teacher)
    return temperature**2 * kl(teacher / temperature, student / temperature)


def logit_distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Half the mean squared difference over all entries."""
    check_same(student, teacher)
    return 0.5 * jnp.square(_wide(student) - _wide(teacher)).mean()


def check_temperature(temperature: float, name: str = "temperature") -> None:
    """Refuse a temperature that is not positive."""
    if not temperature > 0:
        raise ValueError(f"{name} must be positive, not {temperature}")


def check_weights(**weights: float) -> None:
    """Refuse negative loss weights, by name."""
    for name, value in weights.items():
        if value is None or not value >= 0:
            raise ValueError(f"loss weight {name} must be a number >= 0, not {value}")


def check_same(student: jax.Array, teacher: jax.Array) -> None:
    """Refuse scores over different documents."""
    if student.shape != teacher.shape:
        raise ValueError(f"student scores {student.shape}, teacher scores {teacher.shape}")


def gather(x: jax.Array, axis_name: str, gradient: str = "true") -> jax.Array:
    """The rows of all devices of a mapped axis, in their order: [R, ...] -> [W * R, ...].

    With "true" the gradient flows back to every device: where each device computes the same global
    loss and gradients are then averaged (as the loop's `pmap` mode does) the update is the true
    one. "local_average" detaches the other devices' rows, as the original: 1/W of it.

    Raises ValueError for another `gradient`.
    """
    if gradient not in GATHER_GRADIENTS:
        raise ValueError(f"gather_gradient {gradient!r}; known: {', '.join(GATHER_GRADIENTS)}")
    if gradient == "true":
        return jax.lax.all_gather(x, axis_name, tiled=True)
    whole = jax.lax.stop_gradient(jax.lax.all_gather(x, axis_name, tiled=True))
    start = jax.lax.axis_index(axis_name) * x.shape[0]
    return jax.lax.dynamic_update_slice_in_dim(whole, x, start, 0)


def _group_size(queries: jax.Array, documents: jax.Array) -> int:
    if len(documents) == 0 or len(documents) % len(queries):
        raise ValueError(f"{len(documents)} documents are not a multiple of {len(queries)} queries")
    return len(documents) // len(queries)


def _wide(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
