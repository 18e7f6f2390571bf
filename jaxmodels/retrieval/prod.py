"""PROD: progressive distillation, over teachers and then over data.

Z. Lin et al., "PROD: Progressive Distillation for Dense Retrieval", WWW 2023, arXiv 2209.13335;
formulas and rules after the official code, microsoft/SimXNS@0163380, PROD/ProD_KD (model/models.py,
utils/dataset_division_{marco,nq}.py, utils/preprae_ce_marco_train.py).

Axis names: B queries, N documents a query (the positive first), D = B * N documents of the batch.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmodels.retrieval.losses import (
    check_temperature,
    check_weights,
    distillation,
    group_scores,
    logit_distance,
    nll,
    scores_of,
)
from jaxmodels.spelling import did_you_mean

_PROBABILITY_EPS = 1e-7
_EXCLUDED = 1000.0  # what DKD takes off the target's logit to leave it out
_COMPARED = 1 << 24  # pairs of documents compared at a time
ABSENT = -1  # first hit of a list without a relevant document


# -- losses ----------------------------------------------------------------------------------------


def decoupled(
    student: jax.Array,
    teacher: jax.Array,
    positive: jax.Array,
    temperature: float,
    alpha: float,
    beta: float,
) -> jax.Array:
    """DKD: alpha KL over [target, rest] + beta KL over the rest, both times T^2, sums over B.

    Args:
      student, teacher: logits [B, D]. positive: [B] target column.
    """
    chosen = jax.nn.one_hot(positive, student.shape[-1], dtype=bool)

    def two_way(logits):
        log_p = jax.nn.log_softmax(logits / temperature)
        target = jnp.take_along_axis(log_p, positive[:, None], axis=-1)[:, 0]
        rest = jax.nn.logsumexp(jnp.where(chosen, -jnp.inf, log_p), axis=-1)
        return jnp.stack([target, rest], axis=-1)

    def without_target(logits):
        return jax.nn.log_softmax(logits / temperature - _EXCLUDED * chosen)

    def divergence(log_p, log_q):
        return (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean()

    target = divergence(two_way(teacher), two_way(student))
    rest = divergence(without_target(teacher), without_target(student))
    return temperature**2 * (alpha * target + beta * rest)


def probability_loss(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """`-sum softmax(teacher / T) log(softmax(student) + 1e-7) / B`: no T on the student, no T^2."""
    target = jax.nn.softmax(teacher / temperature)
    return -(target * jnp.log(jax.nn.softmax(student) + _PROBABILITY_EPS)).sum(-1).mean()


KD_TYPES: dict[str, Callable[..., jax.Array]] = {
    "KD_softmax": lambda s, t, positive, loss: distillation(s, t, loss.temperature),
    "KD_logit": lambda s, t, positive, loss: logit_distance(s, t),
    "DKD": lambda s, t, positive, loss: decoupled(
        s, t, positive, loss.temperature, loss.dkd_alpha, loss.dkd_beta
    ),
    "prob_loss": lambda s, t, positive, loss: probability_loss(s, t, loss.temperature),
}


class Parts(NamedTuple):
    """`loss` [] and its parts before their weights: `hard`, `soft`, `regularizer` [] (0 when off).

    `correct`: int [] queries whose best-scored document is the positive. `scores`: [B, D] or [B, N]
    of the student.
    """

    loss: jax.Array
    hard: jax.Array
    soft: jax.Array
    regularizer: jax.Array
    correct: jax.Array
    scores: jax.Array


@dataclasses.dataclass(frozen=True)
class ProgressiveLoss:
    """`a hard + b soft + c regularizer`, the objective of every PROD stage.

    hard is the NLL of the positive under the raw scores; soft the distance to the teacher; the
    regularizer (learning without forgetting) the same distance to the frozen student of the stage's
    start. Teacher and frozen student are constants.

    Attributes:
      kd_type: KD_softmax | KD_logit | DKD | prob_loss.
      temperature: T. ce_weight, kd_weight, lwf_weight: a, b, c; `lwf_weight` is needed only where
        there is a frozen student.
      dkd_alpha, dkd_beta: of DKD.
      embedding_scale: factor of the student's and the frozen student's vectors before products;
        teacher_scale: of a dual-encoder teacher's. From scratch, width^-0.25 keeps the first
        softmax from saturating; the published recipes have 1.
      in_batch_groups: the in-batch loss sees only the documents of this many equal parts of the
        batch, each on its own (the official `off_inbatch`, with a part a device).

    Raises ValueError for an unknown type, DKD without alpha and beta, a temperature that is not
    positive, a negative weight.
    """

    kd_type: str = "KD_softmax"
    temperature: float = 4.0
    ce_weight: float = 0.1
    kd_weight: float = 0.9
    lwf_weight: float | None = 1.0
    dkd_alpha: float | None = None
    dkd_beta: float | None = None
    embedding_scale: float = 1.0
    teacher_scale: float = 1.0
    in_batch_groups: int = 1

    def __post_init__(self) -> None:
        if self.kd_type not in KD_TYPES:
            raise ValueError(
                f"kd_type {self.kd_type!r} is not a kind of distillation"
                f"{did_you_mean(self.kd_type, KD_TYPES)}; there are {', '.join(KD_TYPES)}"
            )
        if self.kd_type == "DKD" and (self.dkd_alpha is None or self.dkd_beta is None):
            raise ValueError("kd_type 'DKD' needs dkd_alpha and dkd_beta")
        check_temperature(self.temperature)
        names = ("ce_weight", "kd_weight", "lwf_weight", "dkd_alpha", "dkd_beta")
        given = {name: getattr(self, name) for name in names}
        check_weights(**{name: value for name, value in given.items() if value is not None})
        if self.in_batch_groups < 1:
            raise ValueError(f"in_batch_groups must be at least 1, not {self.in_batch_groups}")

    def in_batch(
        self,
        query: jax.Array,
        document: jax.Array,
        teacher_query: jax.Array,
        teacher_document: jax.Array,
    ) -> Parts:
        """Stage 1, a dual-encoder teacher: every query against all documents of the batch.

        Args:
          query: [B, H]; document: [B * N, H], query b's positive in row b * N.
          teacher_query: [B, G]; teacher_document: [B * N, G]; any width G.
        """
        queries, documents = len(query), len(document)
        if documents % queries:
            raise ValueError(f"{documents} documents are not a multiple of {queries} queries")
        if (len(teacher_query), len(teacher_document)) != (queries, documents):
            raise ValueError(
                f"the teacher has {len(teacher_query)} queries and {len(teacher_document)} "
                f"documents, the student {queries} and {documents}"
            )
        if queries % self.in_batch_groups:
            raise ValueError(f"{queries} queries do not divide by {self.in_batch_groups} groups")

        def scores(q, d, scale):
            q, d = (scale * x.reshape(self.in_batch_groups, -1, x.shape[-1]) for x in (q, d))
            return jax.vmap(scores_of)(q, d).reshape(queries, documents // self.in_batch_groups)

        own = jnp.arange(queries) % (queries // self.in_batch_groups)
        return self._parts(
            scores(query, document, self.embedding_scale),
            scores(teacher_query, teacher_document, self.teacher_scale),
            None,
            own * (documents // queries),
        )

    def own_group(
        self,
        query: jax.Array,
        document: jax.Array,
        relevance: jax.Array,
        frozen: tuple[jax.Array, jax.Array] | None = None,
    ) -> Parts:
        """Later stages, a cross-encoder teacher: each query against its own N documents.

        Args:
          query: [B, H]; document: [B * N, H], grouped by query, the positive first.
          relevance: [B, N] the teacher's logits.
          frozen: (query, document) vectors of the frozen student, for the regularizer.

        Raises ValueError, with both shapes, for in-batch logits [B, B * N]; for one document a
        query; for a frozen student without `lwf_weight`.
        """
        queries, documents = len(query), len(document)
        if documents % queries:
            raise ValueError(f"{documents} documents are not a multiple of {queries} queries")
        group = documents // queries
        if relevance.shape != (queries, group):
            raise ValueError(
                f"teacher logits {relevance.shape} are not [B, N] = {(queries, group)}: a cross "
                "encoder scores a query's own documents only"
            )
        if group < 2:
            raise ValueError(
                "cross-encoder stages need at least one negative a query (number_neg = 0)"
            )
        if frozen is not None and self.lwf_weight is None:
            raise ValueError("learning without forgetting is on, but lwf_weight is not set")

        def scores(q, d):
            return group_scores(self.embedding_scale * q, self.embedding_scale * d)

        return self._parts(
            scores(query, document),
            relevance,
            None if frozen is None else scores(*frozen),
            jnp.zeros(queries, jnp.int32),
        )

    def _parts(self, scores, teacher, frozen, positive) -> Parts:
        teacher = lax.stop_gradient(teacher.astype(scores.dtype))
        hard, correct = nll(scores, positive)
        distance = KD_TYPES[self.kd_type]
        soft = distance(scores, teacher, positive, self)
        regularizer = jnp.zeros((), scores.dtype)
        loss = self.ce_weight * hard + self.kd_weight * soft
        if frozen is not None:
            frozen = lax.stop_gradient(frozen)
            regularizer = distance(scores, frozen, positive, self)
            loss = loss + self.lwf_weight * regularizer
        return Parts(loss, hard, soft, regularizer, correct, scores)


# -- data progression ------------------------------------------------------------------------------

# 1-based ranks of the first hit, both ends included; the official name "2ti" holds rank 2 alone.
BUCKETS: dict[str, tuple[int, int]] = {
    "top1": (1, 1),
    "2ti": (2, 2),
    "2t5": (2, 5),
    "2t10": (2, 10),
    "2t15": (2, 15),
    "6t20": (6, 20),
    "21t50": (21, 50),
    "51t100": (51, 100),
    "101tall": (101, sys.maxsize),
}
RULES = ("marco", "nq")


def first_hits(ranking: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """0-based rank of the first relevant document of each list, `ABSENT` where there is none.

    Args:
      ranking: [Q, K] document rows, best first; -1 is padding.
      relevant: [Q, R] relevant document rows; -1 is padding.

    Returns: int64 [Q].
    """
    ranking, relevant = np.asarray(ranking), np.asarray(relevant)
    if len(ranking) != len(relevant):
        raise ValueError(f"{len(ranking)} rankings and {len(relevant)} rows of relevant documents")
    hit = _is_relevant(ranking, relevant)
    return np.where(hit.any(-1), hit.argmax(-1), ABSENT).astype(np.int64)


def _is_relevant(ranking: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Which entries of [Q, K] are among the row's [Q, R], bool [Q, K]; -1 never is."""
    found = np.zeros(ranking.shape, bool)
    # Half a million queries at once would hold Q * K * R truths.
    rows = max(1, _COMPARED // max(1, ranking.shape[1] * relevant.shape[1]))
    for start in range(0, len(ranking), rows):
        part = slice(start, start + rows)
        same = ranking[part, :, None] == relevant[part, None, :]
        found[part] = same.any(-1) & (ranking[part] >= 0)
    return found


def bucket_masks(hits: np.ndarray, judged: np.ndarray) -> dict[str, np.ndarray]:
    """Which queries have their first hit in which of `BUCKETS`: name -> bool [Q].

    `judged`: bool [Q], queries with ground truth; others are in no bucket.
    """
    ranks = np.asarray(hits) + 1
    judged = np.asarray(judged, bool) & (ranks > 0)
    return {
        name: judged & (ranks >= low) & (ranks <= high) for name, (low, high) in BUCKETS.items()
    }


def confusing_queries(
    student_hits: np.ndarray,
    teacher_hits: np.ndarray,
    judged: np.ndarray | None = None,
    *,
    rule: str = "marco",
    window: int = 15,
) -> np.ndarray:
    """Queries that the teacher ranks right and the student almost right, bool [Q].

    `marco` (passages and documents): student's first hit in 0-based ranks 1..window - 1 and the
    teacher's at 0, of judged queries. `nq`: the teacher's first hit above the student's and within
    `window`; a missing hit is infinitely far and `judged` plays no part.

    Args:
      student_hits, teacher_hits: [Q] of `first_hits`. judged: bool [Q], for `marco`.

    Raises ValueError for an unknown rule or lists of different length.
    """
    student, teacher = np.asarray(student_hits), np.asarray(teacher_hits)
    if student.shape != teacher.shape:
        raise ValueError(f"{student.shape} student and {teacher.shape} teacher queries")
    if rule == "nq":
        far = np.iinfo(np.int64).max
        student, teacher = (np.where(h == ABSENT, far, h) for h in (student, teacher))
        return (teacher < student) & (teacher < window)
    if rule != "marco":
        raise ValueError(
            f"no selection rule {rule!r}{did_you_mean(rule, RULES)}; there are {', '.join(RULES)}"
        )
    judged = np.ones(student.shape, bool) if judged is None else np.asarray(judged, bool)
    return judged & (student >= 1) & (student < window) & (teacher == 0)


def rerank(ranking: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The same documents by another model's scores, best first; ties keep the given order.

    Args:
      ranking: [Q, K] document rows, -1 padding at the end. scores: [Q, K].
    """
    ranking, scores = np.asarray(ranking), np.asarray(scores, np.float64)
    if ranking.shape != scores.shape:
        raise ValueError(f"ranking {ranking.shape} and scores {scores.shape} differ in shape")
    if np.isnan(scores[ranking >= 0]).any():
        raise ValueError("a reranker's score is not a number")
    order = np.argsort(np.where(ranking >= 0, -scores, np.inf), axis=-1, kind="stable")
    return np.take_along_axis(ranking, order, axis=-1)


def check_same_candidates(
    student: Mapping[Any, Sequence[Any]], teacher: Mapping[Any, Sequence[Any]]
) -> None:
    """Refuse a teacher's list that is no reordering of the student's: query -> document ids."""
    missing = [q for q in student if q not in teacher]
    unknown = [q for q in teacher if q not in student]
    if missing or unknown:
        raise ValueError(
            f"the teacher's list covers {len(teacher)} queries, the student's {len(student)}: "
            f"{len(missing)} are missing, {len(unknown)} are unknown"
        )
    other = [q for q in student if sorted(map(str, student[q])) != sorted(map(str, teacher[q]))]
    if other:
        q = other[0]
        raise ValueError(
            f"the teacher's list has other documents for {len(other)} of {len(student)} queries, "
            f"as {q!r}: {len(teacher[q])} documents against the student's {len(student[q])}"
        )


def hard_negatives(
    ranking: np.ndarray, relevant: np.ndarray, judged: np.ndarray, count: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` retrieved documents that are not relevant, in retrieval order.

    Args:
      ranking: [Q, K] document rows best first, -1 padding. relevant: [Q, R], -1 padding.
      judged: bool [Q]; queries without ground truth are dropped.

    Returns: (negatives int64 [Q, count] with -1 padding, kept bool [Q]: judged queries that have a
      positive and at least one negative). Rows that are not kept hold -1 only.
    """
    ranking, relevant = np.asarray(ranking), np.asarray(relevant)
    usable = (ranking >= 0) & ~_is_relevant(ranking, relevant)
    kept = np.asarray(judged, bool) & (relevant >= 0).any(-1) & usable.any(-1)
    usable &= kept[:, None]
    # A stable sort brings the usable ones forward and keeps their order.
    order = np.argsort(~usable, axis=-1, kind="stable")[:, :count]
    chosen = np.take_along_axis(ranking, order, axis=-1)
    chosen = np.where(np.take_along_axis(usable, order, axis=-1), chosen, -1)
    out = np.full((len(ranking), count), -1, np.int64)
    out[:, : chosen.shape[1]] = chosen
    return out, kept
