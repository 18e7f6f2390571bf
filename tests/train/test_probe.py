"""The rank probe: the theory's instruments on a training run."""

import jax.numpy as jnp
import numpy as np
import pytest

from train.naming import ConfigError
from train.probe import RankProbe


class Rows:
    """A reporter that keeps what it is given."""

    def __init__(self):
        self.rows = []

    def log(self, step, kind, row):
        self.rows.append((step, kind, row))


def test_modes_that_rise_one_after_the_other_are_counted_as_stages():
    rows = Rows()
    probe = RankProbe((r"layers\.0\.kernel",), rows)
    steps = np.arange(0, 400)
    for t in steps:
        # Two modes at steps 100 and 250; the gradient peaks while each of them rises.
        s = [1 / (1 + np.exp(-(t - 100) / 5)), 0.5 / (1 + np.exp(-(t - 250) / 5))]
        rise = sum(v * (1 - v / top) for v, top in zip(s, (1.0, 0.5)))
        params = {"layers.0": {"kernel": jnp.diag(jnp.array(s))}, "b": {"bias": jnp.ones(2)}}
        probe.look(int(t), params, {"loss": 1.3 - s[0] - 0.5 * s[1], "grad_norm": rise + 1e-6})
    numbers = probe.finish()
    assert numbers["stages.layers.0.kernel"] == 2
    assert numbers["plateaus.layers.0.kernel"] == 2
    step, kind, row = rows.rows[175]
    assert (step, kind) == (175, "probe")
    assert row["singular_1.layers.0.kernel"] == pytest.approx(1.0, abs=1e-4)
    assert row["effective_rank.layers.0.kernel"] == pytest.approx(1.0, abs=1e-3)
    assert rows.rows[-1][2]["effective_rank.layers.0.kernel"] == pytest.approx(1.8899, abs=1e-3)


def test_a_product_of_kernels_is_probed_as_one_matrix():
    rows = Rows()
    params = {"a": {"kernel": jnp.array([[3.0, 0], [0, 1]])}, "c": {"kernel": 2 * jnp.eye(2)}}
    RankProbe((r"a\.kernel @ c\.kernel",), rows).look(1, params, {"loss": 1.0, "grad_norm": 1.0})
    assert rows.rows[0][2][r"singular_1.a\.kernel@c\.kernel"] == pytest.approx(6.0)


def test_a_pattern_that_matches_no_matrix_is_named():
    probe = RankProbe(("nothing",), Rows())
    with pytest.raises(ConfigError, match=r"config\.probe\.rank: no matrix matches 'nothing'"):
        probe.look(0, {"a": {"kernel": jnp.eye(2)}}, {"loss": 1.0, "grad_norm": 1.0})
