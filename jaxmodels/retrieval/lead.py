"""LEAD: distilling a retriever layer by layer, through rankings of the batch's documents.

H. Sun et al., "LEAD: Liberal Feature-based Distillation for Dense Retrieval", WSDM 2024, arXiv
2212.05225; formulas after the official code, microsoft/SimXNS@0163380, LEAD/util.py and
LEAD/models.py.

A layer's features become scores of every (query, document) pair, and those, over the documents of
the batch, a distribution. Distributions over the same documents compare whatever the widths, the
vocabularies or the kinds of the two models. Axis names: B queries, N documents a query (the
positive first), D = B * N documents of the batch, L layers (index 0 is the output of the *first
block*; the embeddings are not in the list), K selected layers, T query tokens, S document tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmodels.retrieval.late_interaction import maxsim, unit
from jaxmodels.retrieval.losses import check_temperature, check_weights, scores_of
from jaxmodels.spelling import did_you_mean

SELECTIONS = ("random", "last", "skip")


class LayerScores(NamedTuple):
    """Scores of one model: `final` [B, D] and of its selected layers, `layers` [K, B, D].

    D is the whole batch's B * N documents, or each query's own N.
    """

    final: jax.Array
    layers: jax.Array


class Terms(NamedTuple):
    """The parts of the objective, every one before its coefficient.

    Attributes:
      total: [] the objective.
      student: [] NLL of the student's final scores. teacher: [] of the teacher's.
      response: [] KL(teacher || student) of the final scores. reverse: [] KL(student || teacher).
      layer_divergences: [K] KL(teacher layer || student layer). layers: [] as added to the total.
      layer_weights: [K] softmax(-layer_nll / layer_temperature), constants.
      teacher_layer_nll: [K] NLL of the teacher's selected layers.
      attention: [] the attention-map term as added to the total (0 when off).
    """

    total: jax.Array
    student: jax.Array
    teacher: jax.Array
    response: jax.Array
    reverse: jax.Array
    layer_divergences: jax.Array
    layers: jax.Array
    layer_weights: jax.Array
    teacher_layer_nll: jax.Array
    attention: jax.Array


# -- scores ----------------------------------------------------------------------------------------


def dual_scores(
    query: jax.Array, document: jax.Array, selected: jax.Array, scale: float = 1.0
) -> LayerScores:
    """Inner products of [CLS] features, raw: no head, no normalization.

    Args:
      query: hidden states [B, L, T, H], or of [CLS] alone [B, L, H].
      document: hidden states [D, L, S, H], or of [CLS] alone [D, L, H].
      selected: [K] layer indices, int; any values of the same K share one compiled program.
      scale: factor of every feature (untrained ones can be so large that softmaxes saturate).

    Raises ValueError when the two do not have the same layers and width.
    """
    query, document = (scale * (x[:, :, 0] if x.ndim == 4 else x) for x in (query, document))
    _same_layers(query, document)
    _in_range(selected, query.shape[1])
    rows, columns = (jnp.take(x, jnp.asarray(selected), axis=1) for x in (query, document))
    return LayerScores(
        final=scores_of(query[:, -1], document[:, -1]),
        layers=jax.vmap(scores_of, in_axes=1)(rows, columns),
    )


def late_scores(
    query: jax.Array,
    document: jax.Array,
    mask: jax.Array | None,
    selected: jax.Array,
    scale: float = 1.0,
) -> LayerScores:
    """Late interaction: L2-normalized tokens for the final scores, unnormalized ones for layers.

    Args:
      query: [B, L, T, H]. document: [D, L, S, H].
      mask: [D, S], nonzero at real document tokens; it must travel with its documents wherever
        they are gathered (the official code left it behind).
      selected: [K] layer indices. scale: factor of the layers' features.

    Raises ValueError without a mask, for a mask of another shape, or (with concrete values) for a
    document without a real token.
    """
    if mask is None:
        raise ValueError("a late-interaction teacher needs the documents' mask [D, S]")
    _same_layers(query, document)
    if mask.shape != (document.shape[0], document.shape[2]):
        raise ValueError(
            f"mask {mask.shape} is not [D, S] = {(document.shape[0], document.shape[2])}"
        )
    if not isinstance(mask, jax.core.Tracer):
        empty = np.flatnonzero(~(np.asarray(mask) != 0).any(-1))
        if empty.size:
            raise ValueError(f"documents {empty[:5].tolist()} have no real token in their mask")
    _in_range(selected, query.shape[1])
    rows = scale * jnp.moveaxis(jnp.take(query, jnp.asarray(selected), axis=1), 1, 0)
    columns = scale * jnp.moveaxis(jnp.take(document, jnp.asarray(selected), axis=1), 1, 0)
    # One layer at a time: B * T * D * S products are large, and are made again for the gradient.
    one = jax.checkpoint(lambda pair: maxsim(*pair, mask))
    return LayerScores(
        final=one((unit(query[:, -1]), unit(document[:, -1]))),
        layers=lax.map(one, (rows, columns)),
    )


def cross_scores(layer_scores: jax.Array, selected: jax.Array) -> LayerScores:
    """Scores that the cross encoder's one head gives every block's [CLS], `[L, B, N]`.

    Raises ValueError for one document a query: a softmax over one entry teaches nothing.
    """
    if layer_scores.ndim != 3:
        raise ValueError(f"layer scores {layer_scores.shape} are not [L, B, N]")
    if layer_scores.shape[-1] < 2:
        raise ValueError(
            "a cross-encoder teacher needs at least 2 documents a query: with one, the softmax "
            "over its own group is 1 and every gradient is zero"
        )
    _in_range(selected, layer_scores.shape[0])
    return LayerScores(layer_scores[-1], jnp.take(layer_scores, jnp.asarray(selected), axis=0))


def own_documents(scores: LayerScores) -> LayerScores:
    """Scores over the batch's documents [.., B, B * N] cut to each query's own, [.., B, N]."""
    queries, documents = scores.final.shape
    if documents % queries:
        raise ValueError(f"{documents} documents are not a multiple of {queries} queries")

    def cut(x: jax.Array) -> jax.Array:
        groups = x.reshape(*x.shape[:-1], queries, documents // queries)
        # [.., B, B, N] -> the diagonal [.., B, N].
        return jnp.moveaxis(jnp.diagonal(groups, axis1=-3, axis2=-2), -1, -2)

    return LayerScores(cut(scores.final), cut(scores.layers))


# -- the objective ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LayerDistillation:
    """`L = a L_student + b L_teacher + c (KL(t||s) + KL(s||t)) + sum_i w_i KL(t_i || s_i)`.

    Soft targets are `softmax(scores / temperature)` and are *not* detached: where the teacher is
    trained, the divergences reach it too. The temperature divides the target alone, and there is
    no factor temperature^2. Layer weights w are constants. With `reweight` the coefficient
    `layer_weight` is not applied; without, the layer term is `layer_weight * sum_i KL_i`.

    Attributes:
      own_group: every query is scored over its own N documents only (a cross encoder's scores are
        no others): the positive is column 0, a student's [B, B * N] is cut, and there are no
        in-batch negatives in any term. Otherwise columns are the batch's B * N documents and
        query b's positive is column b * N.
      train_teacher: False drops the teacher's NLL and the reverse divergence.
      temperature: T of the soft targets. layer_temperature: tau of the layer weights.
      student_weight, teacher_weight: coefficients of the two NLLs (`distill_para_db`, `.._<t>`).
      response_weight: of both response divergences (`distill_para_<t>_db_dis`).
      layer_weight: of the layer term without re-weighting (`distill_para_<t>_db_layer_score`).
      attention_weight: of the VIRT-style attention term (`distill_para_<t>_db_attention`); 0: off.

    Raises ValueError for a temperature that is not positive or a negative coefficient.
    """

    own_group: bool = False
    train_teacher: bool = True
    temperature: float = 1.0
    layer_temperature: float = 10.0
    reweight: bool = True
    student_weight: float = 1.0
    teacher_weight: float = 1.0
    response_weight: float = 1.0
    layer_weight: float = 1.0
    attention_weight: float = 0.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_temperature(self.layer_temperature, "layer_temperature")
        names = [f.name for f in dataclasses.fields(self) if f.name.endswith("_weight")]
        check_weights(**{name: getattr(self, name) for name in names})

    def __call__(
        self, student: LayerScores, teacher: LayerScores, attention: jax.Array | float = 0.0
    ) -> Terms:
        """The objective and its parts.

        Args:
          student, teacher: scores over the *same* documents in the same order, [B, B * N], or
            with `own_group` the teacher's [B, N] (the student's either).
          attention: `attention_distance(...)` of the two models, where that term is wanted.

        Raises ValueError, with the shapes, when the two do not fit.
        """
        queries, columns = teacher.final.shape
        if self.own_group and student.final.shape == (queries, queries * columns):
            student = own_documents(student)
        if student.final.shape != teacher.final.shape:
            raise ValueError(
                f"student scores {student.final.shape} and teacher scores {teacher.final.shape} "
                "are not over the same documents"
            )
        if student.layers.shape != teacher.layers.shape:
            raise ValueError(
                f"student layers {student.layers.shape} and teacher layers "
                f"{teacher.layers.shape}: the same number of layers must be selected"
            )
        if self.own_group:
            positive = np.zeros(queries, np.int32)
        elif columns % queries == 0:
            positive = np.arange(queries) * (columns // queries)
        else:
            raise ValueError(f"{columns} documents are not a multiple of {queries} queries")
        wide = jnp.promote_types(student.final.dtype, jnp.float32)
        student, teacher = jax.tree.map(lambda x: x.astype(wide), (student, teacher))
        s, t = (jax.nn.log_softmax(x.final) for x in (student, teacher))
        t_layers = jax.nn.log_softmax(teacher.layers)
        response = self._divergence(teacher.final, s)
        reverse = self._divergence(student.final, t)
        divergences = self._divergence(teacher.layers, jax.nn.log_softmax(student.layers))
        nll = _nll(t_layers, positive)
        weights = lax.stop_gradient(jax.nn.softmax(-nll / self.layer_temperature))
        layers = (weights if self.reweight else self.layer_weight) * divergences
        terms = Terms(
            total=jnp.zeros((), wide),
            student=_nll(s, positive),
            teacher=_nll(t, positive),
            response=response,
            reverse=reverse,
            layer_divergences=divergences,
            layers=layers.sum(),
            layer_weights=weights,
            teacher_layer_nll=lax.stop_gradient(nll),
            attention=self.attention_weight * jnp.asarray(attention, wide),
        )
        total = self.student_weight * terms.student + self.response_weight * response
        if self.train_teacher:
            total += self.teacher_weight * terms.teacher + self.response_weight * reverse
        return terms._replace(total=total + terms.layers + terms.attention)

    def _divergence(self, target: jax.Array, log_q: jax.Array) -> jax.Array:
        """KL(softmax(target / T) || q): summed over documents, averaged over queries."""
        log_p = jax.nn.log_softmax(target / self.temperature)
        return (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean(-1)


def _nll(log_p: jax.Array, positive: np.ndarray) -> jax.Array:
    """`[.., B, D]` log-probabilities -> `[..]` mean over queries of -log p[b, positive[b]]."""
    return -log_p[..., np.arange(len(positive)), positive].mean(-1)


def attention_distance(
    student: tuple[jax.Array, jax.Array],
    teacher: tuple[jax.Array, jax.Array],
    query_mask: jax.Array,
    document_mask: jax.Array,
    student_layers: jax.Array,
    teacher_layers: jax.Array,
) -> jax.Array:
    """VIRT-style distance of query-document attention maps (a baseline, off in the recipes).

    For each selected layer the token-level products q.d become, over document tokens, a softmax;
    the squared differences of the two models are summed and divided by K * B * D.

    Args:
      student, teacher: (query hidden states [B, L, T, H], document hidden states [D, L, S, H]);
        widths may differ, token axes may not.
      query_mask: [B, T]. document_mask: [D, S]. Padded query rows count nothing.
      student_layers, teacher_layers: [K].

    Returns: [] the distance.
    """

    def distance(rows):
        (a, b), (c, d) = rows
        gap = _token_map(a, b, document_mask) - _token_map(c, d, document_mask)
        return (gap**2 * (query_mask[:, None, :, None] != 0)).sum()

    def pick(pair, layers):
        layers = jnp.asarray(layers)
        return tuple(jnp.moveaxis(jnp.take(x, layers, axis=1), 1, 0) for x in pair)

    if student[0].shape[2] != teacher[0].shape[2] or student[1].shape[2] != teacher[1].shape[2]:
        raise ValueError("attention maps compare tokens: both models need the same token axes")
    total = lax.map(
        jax.checkpoint(distance), (pick(student, student_layers), pick(teacher, teacher_layers))
    ).sum()
    return total / (len(student_layers) * student[0].shape[0] * student[1].shape[0])


def _token_map(query: jax.Array, document: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax over real document tokens of <q_t, d_s>, [B, D, T, S]."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    products = jnp.einsum("bth,dsh->bdts", query, document, preferred_element_type=wide)
    return jax.nn.softmax(jnp.where(mask[None, :, None, :] != 0, products, -1e9))


# -- which layers ----------------------------------------------------------------------------------


def draw_layers(
    rng: jax.Array, student_layers: int, teacher_layers: int, count: int
) -> tuple[jax.Array, jax.Array]:
    """`count` distinct layers of each model, uniformly at random, ascending: ([K], [K]) int32.

    The i-th smallest of the student's is paired with the i-th smallest of the teacher's.

    Raises ValueError when `count` is larger than either pool.
    """
    _enough_layers(count, student_layers, teacher_layers)
    rngs = jax.random.split(rng)
    return tuple(
        jnp.sort(jax.random.permutation(r, n)[:count]).astype(jnp.int32)
        for r, n in zip(rngs, (student_layers, teacher_layers))
    )


def fixed_layers(
    selection: str, student_layers: int, teacher_layers: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The selections that never change: `last` (the last K of both) or `skip`.

    `skip` pairs the student's last K layers with the teacher's 0, 2, 4, ... For 6 and 12 layers and
    K = 5 (passages) or 6 (documents) these are the official lists.

    Raises ValueError for another name, or when the teacher has too few layers.
    """
    _enough_layers(count, student_layers, teacher_layers)
    student = np.arange(student_layers - count, student_layers, dtype=np.int32)
    if selection == "last":
        return student, np.arange(teacher_layers - count, teacher_layers, dtype=np.int32)
    if selection != "skip":
        raise ValueError(
            f"no layer selection {selection!r}{did_you_mean(selection, SELECTIONS)}; "
            f"there are {', '.join(SELECTIONS)}"
        )
    if 2 * (count - 1) >= teacher_layers:
        raise ValueError(
            f"selection 'skip' of {count} layers needs {2 * count - 1} teacher layers; "
            f"there are {teacher_layers}"
        )
    return student, 2 * np.arange(count, dtype=np.int32)


def layers_at(
    step: jax.Array | int,
    rng: jax.Array,
    student_layers: int,
    teacher_layers: int,
    count: int,
    *,
    selection: str = "random",
    reselect_every: int = 10,
) -> tuple[jax.Array, jax.Array]:
    """The selection of a step, a function of (rng, step) alone; random ones change exactly every
    `reselect_every` steps. It may be traced: redraws do not compile anything again.
    """
    if selection != "random":
        student, teacher = fixed_layers(selection, student_layers, teacher_layers, count)
        return jnp.asarray(student), jnp.asarray(teacher)
    if reselect_every < 1:
        raise ValueError(f"reselect_every must be at least 1, not {reselect_every}")
    period = jnp.asarray(step) // reselect_every
    return draw_layers(jax.random.fold_in(rng, period), student_layers, teacher_layers, count)


def check_layers(
    student: Sequence[int], teacher: Sequence[int], student_layers: int, teacher_layers: int
) -> None:
    """Refuse index lists that are not a selection: equally long, ascending, inside the pools."""
    if len(student) != len(teacher):
        raise ValueError(
            f"{len(student)} student layers and {len(teacher)} teacher layers are selected; the "
            "lists must be equally long"
        )
    _enough_layers(len(student), student_layers, teacher_layers)
    for who, chosen, count in (
        ("student", student, student_layers),
        ("teacher", teacher, teacher_layers),
    ):
        chosen = [int(i) for i in chosen]
        if chosen != sorted(set(chosen)) or not all(0 <= i < count for i in chosen):
            raise ValueError(
                f"{who} layers {chosen} must be ascending, distinct and in 0..{count - 1}"
            )


def check_hidden_states(count: int, blocks: int) -> None:
    """Refuse hidden states that are not one entry a block; L + 1 entries hold the embeddings."""
    if count != blocks:
        extra = " (is the embedding output in it?)" if count == blocks + 1 else ""
        raise ValueError(
            f"expected {blocks} hidden states, one a block, but there are {count}{extra}"
        )


def _enough_layers(count: int, student_layers: int, teacher_layers: int) -> None:
    if not 1 <= count <= min(student_layers, teacher_layers):
        raise ValueError(
            f"{count} layers cannot be selected: the student has {student_layers}, the teacher "
            f"{teacher_layers}"
        )


def _same_layers(query: jax.Array, document: jax.Array) -> None:
    if query.shape[1] != document.shape[1] or query.shape[-1] != document.shape[-1]:
        raise ValueError(
            f"query features {query.shape} and document features {document.shape} must have the "
            "same layers and width"
        )


def _in_range(selected: jax.Array, layers: int) -> None:
    """`take` would clamp silently; known values are checked here."""
    if isinstance(selected, jax.core.Tracer):
        return
    chosen = np.asarray(selected)
    if chosen.ndim != 1 or not chosen.size or chosen.min() < 0 or chosen.max() >= layers:
        raise ValueError(f"selected layers {chosen.tolist()} must be a list in 0..{layers - 1}")
