"""What a layer costs does not depend on how the program repeats it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxmodels.cost import count_cost
from jaxmodels.language.bert import Bert

IMAGE = jax.ShapeDtypeStruct((2, 8, 6, 4), jnp.float32)
ONCE = 2 * 8 * 6 * 4 * (4 * 9 + 1)  # outputs * (inputs * taps + bias)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Conv(4, (3, 3), name="conv")(x), None


class Repeated(nn.Module):
    """The body five times by the named means."""

    means: str

    @nn.compact
    def __call__(self, x):
        if self.means == "unrolled":
            for i in range(5):
                x, _ = Body(name=f"layer.{i}")(x)
            return x
        body = nn.remat(Body) if self.means == "rematerialized" else Body
        if self.means == "nested":
            body = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=5)
            outer = nn.scan(
                body, variable_broadcast="params", split_rngs={"params": False}, length=3
            )
            return outer(name="layer.*")(x, None)[0]
        if self.means == "vmap":
            stack = nn.vmap(
                body, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None,
                axis_size=5,
            )  # fmt: skip
            return stack(name="layer.*")(x)[0]
        stack = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=5)
        return stack(name="layer.*")(x, None)[0]


@pytest.mark.parametrize("means", ["unrolled", "scan", "rematerialized", "vmap"])
def test_a_repeated_layer_counts_as_often_as_it_runs(means):
    cost = count_cost(Repeated(means), IMAGE)
    assert cost.macs == 5 * ONCE == sum(cost.layers.values())
    assert cost.parameters == 5 * (4 * 4 * 9 + 4)
    assert cost.per_trip == {}
    if means != "unrolled":
        assert cost.layers == {"layer.*.conv": 5 * ONCE}


def test_nested_scans_multiply():
    cost = count_cost(Repeated("nested"), IMAGE)
    assert cost.macs == 15 * ONCE
    assert cost.parameters == 5 * (4 * 4 * 9 + 4)


def test_a_scanned_encoder_costs_what_the_unrolled_one_does():
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 8}
    plain, scanned = (count_cost(Bert(**sizes, scan_layers=scan)) for scan in (False, True))
    assert plain[:2] == scanned[:2] and plain.macs > 0


class Loops(nn.Module):
    """A layer, and once more for as long as a condition holds."""

    @nn.compact
    def __call__(self, x):
        def going(module, x):
            del module
            return x.sum() < 1

        def advance(module, x):
            return module(x)[0]

        body = Body(name="body")
        return nn.while_loop(going, advance, body, body(x)[0])


class Branches(nn.Module):
    """A narrow or a wide layer, whose weights are made first."""

    @nn.compact
    def __call__(self, x):
        layers = {"narrow": nn.Dense(4, name="narrow"), "wide": nn.Conv(4, (3, 3), name="wide")}
        if self.is_initializing():
            for layer in layers.values():
                layer(x)
        return nn.cond(
            x.sum() > 0, lambda _, x: layers["narrow"](x), lambda _, x: layers["wide"](x), self, x
        )


def test_loops_of_unknown_length_stand_apart():
    cost = count_cost(Loops(), IMAGE)
    assert cost.layers == cost.per_trip == {"body.conv": ONCE}
    assert cost.macs == ONCE


def test_of_two_branches_the_dearest_counts():
    cost = count_cost(Branches(), IMAGE)
    assert cost.layers == {"narrow": 2 * 8 * 6 * 16, "wide": 2 * ONCE}
