"""Dropout's masks: their rate, independence, and that they are a function of key and place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.layers.dropout import drop_path, dropout

ONES = jnp.ones((64, 32, 32))


def masks(rate, count=40):
    keys = jax.random.split(jax.random.key(7), count)
    kept = jax.jit(jax.vmap(lambda key: dropout(ONES, rate, key) > 0))(keys)
    return np.asarray(kept).reshape(count, -1)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_elements_fall_at_the_rate_in_every_draw_and_place(rate):
    kept = masks(rate)
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < 5 * deviation / kept.size**0.5
    assert np.abs(kept.mean(1) - (1 - rate)).max() < 5 * deviation / kept.shape[1] ** 0.5
    assert np.abs(kept.mean(0) - (1 - rate)).max() < 6 * deviation / kept.shape[0] ** 0.5
    values = np.unique(np.asarray(dropout(ONES, rate, jax.random.key(0))))
    np.testing.assert_allclose(values, [0, 1 / (1 - rate)], rtol=1e-6)


def test_neighbors_and_draws_are_uncorrelated():
    kept = masks(0.5).astype(np.float64) - 0.5
    bound = 5 / kept.size**0.5
    for shift in (1, 2, 32, 1024):
        assert abs((kept[:, shift:] * kept[:, :-shift]).mean() * 4) < 1.1 * bound
    assert abs((kept[1:] * kept[:-1]).mean() * 4) < 1.1 * bound
    runs = kept[:, :65528].reshape(len(kept), -1, 8) > 0
    patterns = np.bincount((runs * 2 ** np.arange(8)).sum(-1).ravel(), minlength=256)
    expected = patterns.sum() / 256
    # Chi-square of 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert abs(((patterns - expected) ** 2 / expected).sum() - 255) < 5 * 22.6


def test_off_without_a_key_or_rate_and_whole_rows_in_drop_path():
    assert dropout(ONES, 0.5, None) is ONES and dropout(ONES, 0.0, jax.random.key(0)) is ONES
    rows = np.asarray(drop_path(ONES, 0.5, jax.random.key(1))).reshape(64, -1)
    assert set(rows.min(1)) == {0.0, 2.0} and (rows.min(1) == rows.max(1)).all()
    with pytest.raises(ValueError, match=r"dropout rate must be in \[0, 1\), not 1"):
        dropout(ONES, 1, jax.random.key(0))
