"""LEAD's objective and layer selection: what must hold whatever the numbers."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.retrieval import lead
from jaxmodels.retrieval.lead import LayerDistillation
from train.defaults import default_config
from train.parallel import batch_sharding, make_mesh

B, N, L = 3, 2, 4
OPTIONS = tuple(f.name for f in dataclasses.fields(LayerDistillation))


def features(seed, *, rows=B, layers=L, width=8, tokens=None, scale=0.5):
    shape = (rows, layers, width) if tokens is None else (rows, layers, tokens, width)
    return scale * jax.random.normal(jax.random.key(seed), shape)


def pair(seed, **kwargs):
    return features(seed, **kwargs), features(seed + 100, rows=B * N, **kwargs)


@functools.partial(jax.jit, static_argnums=2, static_argnames=OPTIONS)
def objective(student, teacher, layers=((0, 2), (1, 3)), **options):
    return LayerDistillation(**options)(
        lead.dual_scores(*student, jnp.array(layers[0])),
        lead.dual_scores(*teacher, jnp.array(layers[1])),
    )


def test_layer_term_ignores_rotations_and_widths_but_not_the_order_of_documents():
    student, teacher = pair(0), pair(1, width=6)
    before = objective(student, teacher)
    rotation = jnp.linalg.qr(jax.random.normal(jax.random.key(2), (6, 6)))[0]
    rotated = objective(student, tuple(x @ rotation for x in teacher))
    wider = objective(student, tuple(jnp.pad(x, ((0, 0), (0, 0), (0, 5))) for x in teacher))
    chex.assert_trees_all_close((rotated, wider), (before, before), rtol=2e-5, atol=1e-6)
    other = objective(student, (teacher[0], jnp.roll(teacher[1], 1, axis=0)))
    assert abs(other.layers - before.layers) > 1e-3


def test_layer_weights_sum_to_one_are_uniform_when_hot_and_pick_the_best_layer_when_cold():
    student, teacher = pair(3), pair(4, scale=1.5)
    layers = ((0, 1, 2), (0, 2, 3))
    hot = objective(student, teacher, layers, layer_temperature=1e9)
    cold = objective(student, teacher, layers, layer_temperature=1e-6)
    np.testing.assert_allclose(hot.layer_weights, np.full(3, 1 / 3), atol=1e-6)
    np.testing.assert_allclose(cold.layer_weights[np.argmin(cold.teacher_layer_nll)], 1, atol=1e-6)
    for terms in (hot, cold):
        np.testing.assert_allclose(terms.layer_weights.sum(), 1, rtol=1e-6)
        np.testing.assert_allclose(
            terms.layers, (terms.layer_weights * terms.layer_divergences).sum(), rtol=1e-6
        )


def test_scores_of_ten_thousand_give_finite_terms_and_gradients():
    def total(student, teacher):
        return objective(student, teacher).total

    huge = tuple(100 * x for x in pair(5, scale=1.0)), tuple(100 * x for x in pair(6, scale=1.0))
    chex.assert_tree_all_finite(jax.grad(total, argnums=(0, 1))(*huge))


def test_a_teacher_that_is_the_student_costs_nothing_and_moves_nothing():
    same = pair(7)
    layers = ((1, 3), (1, 3))
    options = {"student_weight": 0.0, "teacher_weight": 0.0}

    def total(student, teacher):
        return objective(student, teacher, layers, **options).total

    value, gradient = jax.value_and_grad(total, argnums=(0, 1))(same, same)
    assert abs(value) < 1e-6
    chex.assert_trees_all_close(gradient, jax.tree.map(jnp.zeros_like, gradient), atol=1e-6)


def test_soft_targets_reach_the_teacher_and_layer_weights_do_not():
    student, teacher = pair(8), pair(9)
    chosen = jnp.array([0, 2]), jnp.array([1, 3])

    def of_layers(teacher, reweight):
        return objective(student, teacher, reweight=reweight).layers

    moved = jax.grad(of_layers)(teacher, True)
    assert all(jnp.abs(g).max() > 1e-5 for g in moved)
    weights = objective(student, teacher).layer_weights

    def with_constants(teacher):
        t = lead.dual_scores(*teacher, chosen[1]).layers
        s = lead.dual_scores(*student, chosen[0]).layers
        log_p, log_q = jax.nn.log_softmax(t), jax.nn.log_softmax(s)
        return (weights * (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean(-1)).sum()

    chex.assert_trees_all_close(moved, jax.grad(with_constants)(teacher), rtol=1e-4, atol=1e-7)


def test_a_frozen_teacher_drops_its_own_loss_and_the_reverse_divergence():
    student, teacher = pair(10), pair(11)
    options = {"response_weight": 0.7, "temperature": 2.0, "reweight": False, "layer_weight": 0.5}
    frozen = objective(student, teacher, train_teacher=False, **options)
    want = frozen.student + 0.7 * frozen.response + 0.5 * frozen.layer_divergences.sum()
    np.testing.assert_allclose(frozen.total, want, rtol=1e-6)
    trained = objective(student, teacher, train_teacher=True, **options)
    np.testing.assert_allclose(
        trained.total - frozen.total, trained.teacher + 0.7 * trained.reverse, rtol=1e-5
    )


def test_other_queries_documents_matter_for_dual_and_late_teachers_and_not_for_cross():
    student, chosen = pair(12, scale=1.0), jnp.array([0, 1])
    tokens = features(14, tokens=2), features(15, rows=B * N, tokens=2)
    grades = jax.random.normal(jax.random.key(13), (L, B, N))
    teachers = {
        "cross": lead.cross_scores(grades, chosen),
        "dual": lead.dual_scores(*tokens, chosen),
        "late": lead.late_scores(*tokens, jnp.ones((B * N, 2)), chosen),
    }

    @functools.partial(jax.jit, static_argnums=1)
    def of_query_0(documents, kind):
        # The others' rows are held fixed, so that what is left of the mean is query 0's.
        rows = lead.dual_scores(student[0], documents, chosen)
        rows = jax.tree.map(lambda x: x.at[..., 1:, :].set(0.0), rows)
        return LayerDistillation(own_group=kind == "cross")(rows, teachers[kind]).total

    for kind in teachers:
        others = jnp.abs(jax.grad(of_query_0)(student[1], kind)[N:]).max()
        assert others == 0 if kind == "cross" else others > 1e-4, kind


def test_late_interaction_adds_up_in_float32():
    tokens = jnp.full((1, 300, 4), 1.0, jnp.bfloat16)
    scores = lead.maxsim(tokens, tokens[:, :2], jnp.ones((1, 2), bool))
    assert scores.dtype == jnp.float32 and scores[0, 0] == 1200.0


def test_late_interaction_hides_masked_tokens_and_counts_every_query_position():
    q, d = features(20, tokens=3), features(21, rows=B * N, tokens=5)
    ones, chosen = jnp.ones((B * N, 5), jnp.int32), jnp.array([0, 2])
    late = jax.jit(lead.late_scores)
    full = late(q, d, ones, chosen)
    plain = jnp.einsum("bth,dsh->btds", q[:, 2], d[:, 2]).max(-1).sum(1)
    np.testing.assert_allclose(full.layers[1], plain, rtol=1e-5, atol=1e-6)
    mask = ones.at[:, 3:].set(0)
    masked = late(q, d, mask, chosen)
    noisy = late(q, d.at[:, :, 3:].add(9.0), mask, chosen)
    chex.assert_trees_all_equal(masked, noisy)
    fewer = late(q[:, :, :2], d, ones, chosen)
    assert jnp.abs(fewer.final - full.final).max() > 1e-3


def test_attention_term_is_zero_for_equal_models_and_ignores_padding():
    student = features(30, tokens=3), features(31, rows=B * N, tokens=4)
    teacher = features(32, tokens=3, width=6), features(33, rows=B * N, tokens=4, width=6)
    q_mask, d_mask = jnp.ones((B, 3)).at[:, 2].set(0), jnp.ones((B * N, 4)).at[:, 3].set(0)
    chosen = jnp.array([0, 1])

    @jax.jit
    def distance(a, b):
        return lead.attention_distance(a, b, q_mask, d_mask, chosen, chosen)

    assert distance(student, student) < 1e-12
    value = distance(student, teacher)
    noisy = (student[0].at[:, :, 2].add(3.0), student[1].at[:, :, 3].add(3.0))
    np.testing.assert_allclose(distance(noisy, teacher), value, rtol=1e-6)
    assert 0 < value < 3 * 2  # at most 2 a query row


def test_drawn_layers_are_sorted_distinct_and_equally_frequent():
    draw = jax.jit(jax.vmap(lambda r: lead.draw_layers(r, 6, 12, 4)))
    student, teacher = draw(jax.random.split(jax.random.key(0), 5000))
    for chosen, pool in ((np.asarray(student), 6), (np.asarray(teacher), 12)):
        assert chosen.shape == (5000, 4) and (np.diff(chosen, axis=1) > 0).all()
        assert chosen.min() >= 0 and chosen.max() < pool
        share = np.bincount(chosen.ravel(), minlength=pool) / 5000
        # Binomial: 5 standard deviations of a share of 5,000 draws are at most 0.035.
        np.testing.assert_allclose(share, 4 / pool, atol=0.036)


def test_layers_change_exactly_every_ten_steps_and_never_retrace():
    traces = []

    @jax.jit
    def at(step):
        traces.append(step)
        return jnp.concatenate(lead.layers_at(step, jax.random.key(1), 6, 12, 3))

    seen = np.stack([at(step) for step in range(60)])
    assert len(traces) == 1
    changed = np.flatnonzero((np.diff(seen, axis=0) != 0).any(1)) + 1
    assert set(changed) <= set(range(10, 60, 10)) and len(changed) >= 4


def test_fixed_selections_are_the_official_lists():
    lists = {
        ("last", 5): ([1, 2, 3, 4, 5], [7, 8, 9, 10, 11]),
        ("last", 6): ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]),
        ("skip", 5): ([1, 2, 3, 4, 5], [0, 2, 4, 6, 8]),
        ("skip", 6): ([0, 1, 2, 3, 4, 5], [0, 2, 4, 6, 8, 10]),
    }
    for (selection, count), want in lists.items():
        got = lead.fixed_layers(selection, 6, 12, count)
        assert [x.tolist() for x in got] == list(want)


def _mask_missing():
    lead.late_scores(features(0, tokens=2), features(1, tokens=2), None, jnp.array([0]))


def _document_without_tokens():
    mask = jnp.ones((B * N, 2)).at[1].set(0)
    lead.late_scores(features(0, tokens=2), features(1, rows=B * N, tokens=2), mask, jnp.array([0]))


def _other_documents():
    student = lead.dual_scores(features(0), features(1, rows=4), jnp.array([0]))
    LayerDistillation()(student, lead.dual_scores(*pair(2), jnp.array([0])))


def _other_counts():
    student = lead.dual_scores(*pair(0), jnp.array([0, 1]))
    LayerDistillation()(student, lead.dual_scores(*pair(2), jnp.array([0])))


MISTAKES = {
    "the student has 6, the teacher 12": lambda: lead.draw_layers(jax.random.key(0), 6, 12, 7),
    "must be equally long": lambda: lead.check_layers([0, 1], [0], 6, 12),
    r"student layers \[2, 1\] must be ascending": lambda: lead.check_layers([2, 1], [0, 1], 6, 12),
    r"teacher layers \[0, 12\] .* 0\.\.11": lambda: lead.check_layers([0, 1], [0, 12], 6, 12),
    r"selected layers \[4\] .* 0\.\.3": lambda: lead.dual_scores(*pair(0), jnp.array([4])),
    "expected 12 hidden states.*embedding": lambda: lead.check_hidden_states(13, 12),
    r"\(3, 4\) and teacher scores \(3, 6\)": _other_documents,
    "same number of layers": _other_counts,
    "needs the documents' mask": _mask_missing,
    r"documents \[1\] have no real token": _document_without_tokens,
    "temperature must be positive, not 0": lambda: LayerDistillation(temperature=0),
    "layer_temperature must be positive": lambda: LayerDistillation(layer_temperature=-1.0),
    "response_weight must be a number >= 0": lambda: LayerDistillation(response_weight=-1.0),
    "at least 2 documents": lambda: lead.cross_scores(jnp.zeros((4, 3, 1)), jnp.array([0])),
    "did you mean 'last'": lambda: lead.fixed_layers("lst", 6, 12, 5),
    "needs 11 teacher layers": lambda: lead.fixed_layers("skip", 6, 8, 6),
    "reselect_every must be": lambda: lead.layers_at(
        0, jax.random.key(0), 6, 12, 2, reselect_every=0
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_named(message):
    with pytest.raises(ValueError, match=message):
        MISTAKES[message]()


def test_sharded_over_eight_devices_is_what_one_device_computes_masks_included():
    rows = batch_sharding(make_mesh(default_config().parallel, jax.devices()[:8]))
    q, d = features(40, rows=8, tokens=3), features(41, rows=16, tokens=4)
    tq, td = features(42, rows=8, tokens=3, width=6), features(43, rows=16, tokens=4, width=6)
    mask = (jax.random.uniform(jax.random.key(44), (16, 4)) < 0.6).at[:, 0].set(True)
    chosen = jnp.array([0, 2])

    def total(q, d, tq, td, mask):
        student = lead.dual_scores(q, d, chosen)
        late = LayerDistillation()(student, lead.late_scores(tq, td, mask, chosen))
        dual = LayerDistillation()(student, lead.dual_scores(tq, td, chosen))
        return late.total + dual.total

    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))
    arrays = (q, d, tq, td, mask)
    one = step(*arrays)
    many = step(*(jax.device_put(x, rows) for x in arrays))
    chex.assert_trees_all_close(one, jax.device_get(many), rtol=1e-5, atol=1e-6)
