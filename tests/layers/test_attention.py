import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxmodels.layers import attention, dropout, relative_position
from jaxmodels.layers.activations import gelu
from jaxmodels.layers.normalization import LayerNorm, RMSNorm


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_attend_equals_jax_with_bias_mask_and_scale():
    q, k, v = draw(2, 5, 3, 4), draw(2, 7, 3, 4, seed=1), draw(2, 7, 3, 4, seed=2)
    bias, mask = draw(1, 3, 5, 7, seed=3), attention.causal_mask(5, 7, offset=2)
    ours = attention.attend(q, k, v, bias=bias, mask=mask, scale=0.7)
    theirs = attention.attend(q, k, v, bias=bias, mask=mask, scale=0.7, implementation="xla")
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_query_that_may_look_nowhere_gets_a_finite_answer():
    q, k, v = draw(1, 2, 1, 4), draw(1, 3, 1, 4, seed=1), draw(1, 3, 1, 4, seed=2)
    mask = attention.padding_mask(jnp.zeros((1, 3)))
    np.testing.assert_allclose(
        attention.attend(q, k, v, mask=mask),
        jnp.broadcast_to(v.mean(1, keepdims=True), q.shape),
        atol=1e-6,
    )


class Cached(nn.Module):
    @nn.compact
    def __call__(self, x, position):
        k, v = attention.update_cache(self, x, 2 * x, position, 6)
        mask = attention.causal_mask(x.shape[1], 6, position)
        return attention.attend(x, k, v, mask=mask)


def test_cached_attention_step_by_step_equals_all_at_once_and_rows_can_be_reordered():
    x = draw(2, 6, 3, 4)
    whole = attention.attend(x, x, 2 * x, mask=attention.causal_mask(6))
    state, outputs = {}, []
    for position in range(6):
        y, state = Cached().apply(state, x[:, position : position + 1], position, mutable=["cache"])
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), whole, atol=1e-6)
    swapped = attention.reorder_cache(state, jnp.array([1, 0]))
    np.testing.assert_array_equal(swapped["cache"]["key"], x[::-1])


class HeadMajor(nn.Module):
    @nn.compact
    def __call__(self, x, position):
        kept = attention.write_cache(self, x, 2 * x, position, 6)
        mask = attention.causal_mask(x.shape[1], 6, position)
        return attention.attend_cached(x, *kept, mask=mask, bias=jnp.ones((1, 1, 1, 6)))


def test_the_head_major_cache_gives_the_same_attention_and_has_its_rows_on_the_same_axis():
    x = draw(2, 6, 3, 4)
    whole = attention.attend(x, x, 2 * x, mask=attention.causal_mask(6))
    state, outputs = {}, []
    for position in range(0, 6, 2):
        y, state = HeadMajor().apply(
            state, x[:, position : position + 2], position, mutable=["cache"]
        )
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), whole, atol=1e-6)
    swapped = attention.reorder_cache(state, jnp.array([1, 0]))["cache"]
    key, value = attention.head_major(x[::-1], 2 * x[::-1])
    np.testing.assert_array_equal(swapped["key"], key)
    np.testing.assert_array_equal(swapped["value"], value)


def test_dropout_keeps_the_mean_and_drop_path_drops_whole_rows():
    x = jnp.ones((4000, 3))
    dropped = dropout.dropout(x, 0.25, jax.random.key(0))
    assert abs(float(dropped.mean()) - 1) < 0.02
    np.testing.assert_allclose(np.unique(dropped), [0, 4 / 3], rtol=1e-6)
    path = np.asarray(dropout.drop_path(x, 0.25, jax.random.key(0)))
    assert (path == path[:, :1]).all()
    assert dropout.dropout(x, 0.25, None) is x
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        dropout.dropout(x, 1.0, jax.random.key(0))


def test_gelu_and_its_gradient_are_the_exact_ones_forward_and_reverse():
    x = jnp.linspace(-8, 8, 401)
    exact = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
    np.testing.assert_allclose(gelu(x), exact(x), rtol=1e-6, atol=1e-6)
    ones = jnp.ones_like(x)
    wanted = jax.vjp(exact, x)[1](ones)[0]
    np.testing.assert_allclose(jax.vjp(gelu, x)[1](ones)[0], wanted, atol=1e-6)
    np.testing.assert_allclose(jax.jvp(gelu, (x,), (ones,))[1], wanted, atol=1e-6)


def test_buckets_grow_logarithmically_and_tell_the_sides_apart():
    table = relative_position.bucket_table(16, 128)
    assert table[:8].tolist() == list(range(8))
    # floor(8 + 8 ln(m / 8) / ln 16): edges at 8 * 16 ** (k / 8).
    assert [table[m] for m in (8, 15, 16, 31, 32, 64, 127, 128)] == [8, 9, 10, 11, 12, 14, 15, 15]
    both = relative_position.relative_buckets(jnp.array([-3, 0, 3, 500]), bidirectional=True)
    assert both.tolist() == [3, 0, 19, 31]
    causal = relative_position.relative_buckets(jnp.array([-3, 0, 3]), bidirectional=False)
    assert causal.tolist() == [3, 0, 0]
    with pytest.raises(ValueError, match="buckets"):
        relative_position.bucket_table(32, 16)


def test_norms_give_unit_variance_and_unit_mean_square():
    x = 1e3 + draw(4, 64)  # a mean far above the spread, where E[x^2] - E[x]^2 loses everything
    y = LayerNorm(epsilon=1e-12).apply({"params": {"scale": jnp.ones(64), "bias": jnp.ones(64)}}, x)
    np.testing.assert_allclose(y.mean(-1), 1, atol=1e-4)
    np.testing.assert_allclose(y.std(-1), 1, atol=1e-3)
    z = RMSNorm().apply({"params": {"scale": jnp.full(64, 2.0)}}, draw(4, 64))
    np.testing.assert_allclose(jnp.square(z).mean(-1), 4, atol=1e-4)


def test_masks_of_one_draw_are_independent_and_keep_their_share():
    masks = dropout.keep_masks(jax.random.key(0), 0.25, [(200, 100), (200, 100), (7,)])
    rates = [float(mask.mean()) for mask in masks[:2]]
    np.testing.assert_allclose(rates, 0.75, atol=0.01)
    assert abs(float((masks[0] & masks[1]).mean()) - 0.75**2) < 0.015
    flat = np.asarray(masks[0], float).ravel() - 0.75
    for lag in (1, 2, 100):  # no pattern along the counter, within a mask or between two keys
        assert abs(np.mean(flat[lag:] * flat[:-lag])) < 0.01
    other = dropout.keep_masks(jax.random.key(1), 0.25, [(200, 100)])[0]
    assert abs(float((masks[0] & other).mean()) - 0.75**2) < 0.015
    np.testing.assert_allclose(
        np.unique(dropout.keep_where(jnp.ones(7), masks[2], 0.25)), [0, 4 / 3], rtol=1e-6
    )
    assert dropout.keep_masks(None, 0.25, [(3,)]) == [None]
    q = draw(1, 2, 3, 4)
    keep = jnp.zeros((1, 3, 2, 2), bool)
    np.testing.assert_array_equal(attention.attend(q, q, q, keep=keep, dropout_rate=0.5), 0)
