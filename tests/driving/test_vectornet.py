"""VectorNet: gradients under `jit`, padding, symmetries, sizes, completion, and mistakes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.driving import forecast_objective, vectornet
from jaxmodels.interop import catalog, conversion
from jaxmodels.interop.checkpoint import CheckpointError
from jaxmodels.layers.masked_max import masked_max

B, P, V, D, T = 2, 6, 5, 9, 4
MODEL = vectornet.VectorNet(
    in_dim=D, horizon=T, sub_width=8, sub_depth=2, global_width=6, dec_width=7, id_scale=0.3
)


def scene(seed=0):
    """Vectors, mask (one absent polyline, one of a single vector), targets, future and mask."""
    rng = np.random.default_rng(seed)
    mask = rng.random((B, P, V)) < 0.6
    mask[:, 0], mask[:, 2], mask[:, 3] = True, False, np.arange(V) == 1
    mask[:, 4, 0] = True
    return {
        "vectors": np.where(mask[..., None], rng.normal(size=(B, P, V, D)), 0).astype(np.float32),
        "vector_mask": mask,
        "target_index": np.array([0, 4], np.int32),
        "future_offsets": rng.normal(size=(B, T, 2)).astype(np.float32),
        "future_valid": np.array([[1, 1, 0, 1], [1] * T], np.float32),
        "node_mask": np.array([[0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0]], bool),
    }


def loss_of(params, vectors, given):
    outputs = MODEL.apply(
        {"params": params},
        vectors,
        given["vector_mask"],
        given["target_index"],
        given["node_mask"],
        method="intermediates",
    )
    losses = forecast_objective.objective(
        outputs, given["future_offsets"], given["future_valid"], given["node_mask"]
    )
    return losses.total, (losses, outputs["positions"], outputs["global_out"])


def random_variables(module):
    """Variables of small random numbers, without compiling an initialization."""
    rng = np.random.default_rng(9)
    return jax.tree.map(
        lambda s: rng.normal(0, 0.4, s.shape).astype(np.float32), catalog.shapes(module)
    )


@functools.cache
def parameters():
    return random_variables(MODEL)["params"]


def fields(**changes):
    names = ("in_dim", "horizon", "sub_width", "sub_depth", "global_width", "dec_width", "id_scale")
    return {name: getattr(MODEL, name) for name in names} | changes


@functools.cache
def compiled():
    return jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True))


def run(given):
    (loss, aux), grads = compiled()(parameters(), given["vectors"], given)
    return jax.device_get((loss, aux, grads))


def test_the_maximum_takes_valid_entries_only_and_its_gradient_is_that_of_one_of_them():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 4, 5)).astype(np.float32)
    mask = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)
    x[~mask] = np.nan
    g = rng.normal(size=(3, 5)).astype(np.float32)
    y, back = jax.vjp(lambda x: masked_max(x, mask), x)
    y = np.asarray(y)
    want = np.where(mask[..., None], x, -np.inf)
    np.testing.assert_array_equal(y[1], 0)
    np.testing.assert_array_equal(y[[0, 2]], want[[0, 2]].max(1))
    (dx,) = back(g)
    np.testing.assert_array_equal(np.asarray(dx).sum(1)[[0, 2]], g[[0, 2]])
    assert (np.count_nonzero(np.asarray(dx), axis=1)[[0, 2]] == 1).all()
    assert not np.asarray(dx)[1].any() and not np.asarray(dx)[~mask].any()


def test_gradients_under_jit_are_slopes_of_the_loss_and_finite_for_empty_polylines():
    given = scene()
    _, _, (grads, by_vectors) = run(given)
    assert np.isfinite(by_vectors).all() and not by_vectors[:, 2].any()
    rng = np.random.default_rng(0)
    for name in ("subgraph.layers.0", "global_graph.layers.0"):
        step = jax.tree.map(
            lambda a: rng.normal(0, 2e-3, a.shape).astype(np.float32), parameters()[name]
        )

        def at(sign, name=name, step=step):
            moved = jax.tree.map(lambda a, by: a + sign * by, parameters()[name], step)
            params = {**parameters(), name: moved}
            return float(compiled()(params, given["vectors"], given)[0][0])

        want = sum(np.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (grads[name], step))))
        np.testing.assert_allclose((at(1) - at(-1)) / 2, want, rtol=0.05, atol=2e-4)


def test_features_of_all_zeros_have_a_finite_gradient():
    params = jax.tree.map(np.copy, parameters())
    params["subgraph.layers.1"]["norm"]["scale"][:] = 0
    params["subgraph.layers.1"]["norm"]["bias"][:] = -1  # nothing survives the ReLU
    given = scene()
    (loss, _), grads = compiled()(params, given["vectors"], given)
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("junk", [1e6, np.nan])
def test_contents_of_padding_change_no_output_and_no_gradient(junk):
    given = scene()
    want = run(given)
    other = {**given, "vectors": np.where(given["vector_mask"][..., None], given["vectors"], junk)}
    chex.assert_trees_all_equal(run(other), want)


def test_order_of_vectors_and_of_polylines_does_not_matter():
    given = scene()
    loss, (_, positions, nodes), _ = run(given)
    rng = np.random.default_rng(3)
    order = rng.permutation(P)
    moved = {k: given[k][:, order] for k in ("vectors", "vector_mask", "node_mask")}
    inner = rng.permutation(V)
    moved["vectors"] = moved["vectors"][:, :, inner]
    moved["vector_mask"] = moved["vector_mask"][:, :, inner]
    moved["target_index"] = np.argsort(order)[given["target_index"]].astype(np.int32)
    got, (_, other, other_nodes), _ = run({**given, **moved})
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    np.testing.assert_allclose(other, positions, atol=1e-5)
    np.testing.assert_allclose(other_nodes, nodes[:, order], atol=1e-5)


def test_points_without_attributes_make_it_a_pointnet():
    rng = np.random.default_rng(5)
    points = rng.normal(size=(1, 1, V, 2))
    mask = np.array([[[True, True, False, True, True]]])
    vectors = np.concatenate([points, points, np.zeros((1, 1, V, D - 4))], -1).astype(np.float32)
    found = jax.jit(functools.partial(MODEL.apply, method="intermediates"))(
        {"params": parameters()}, vectors, mask, np.zeros(1, np.int32)
    )
    x = vectors[0, 0][mask[0, 0]].astype(np.float64)
    for layer in range(MODEL.sub_depth):
        weights = jax.tree.map(
            lambda a: np.asarray(a, np.float64), parameters()[f"subgraph.layers.{layer}"]
        )
        x = x @ weights["fc"]["kernel"] + weights["fc"]["bias"]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = np.maximum(x * weights["norm"]["scale"] + weights["norm"]["bias"], 0)
        x = np.concatenate([x, np.tile(x.max(0), (len(x), 1))], -1)
    np.testing.assert_allclose(found["polyline"][0, 0], x.max(0), atol=1e-5)
    np.testing.assert_allclose(found["subgraph_last"][0, 0][mask[0, 0]], x, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_targets_row_alone_gives_the_same_numbers_in_any_bucket(depth):
    module = MODEL.clone(global_depth=depth)
    variables = random_variables(module)
    given = scene()
    arrays = [given[k] for k in ("vectors", "vector_mask", "target_index")]
    whole = jax.jit(functools.partial(module.apply, method="intermediates"))(variables, *arrays)
    alone = jax.jit(module.apply)(variables, *arrays)
    np.testing.assert_allclose(alone.positions, whole["positions"], atol=1e-6)
    padded = [np.pad(a, [(0, 0), (0, 10)] + [(0, 0)] * (a.ndim - 2)) for a in arrays[:2]]
    wide = jax.jit(module.apply)(variables, *padded, arrays[2])
    np.testing.assert_allclose(wide.positions, alone.positions, atol=1e-6)


def test_a_lane_that_is_taken_away_changes_the_forecast():
    given = scene()
    _, (_, positions, _), _ = run(given)
    fewer = given["vector_mask"].copy()
    fewer[:, 5] = False
    _, (_, other, _), _ = run({**given, "vector_mask": fewer})
    assert np.abs(other - positions).max() > 1e-4


def test_a_hidden_node_gives_no_gradient_through_its_features_but_its_target_does():
    given = scene()
    hidden = given["node_mask"]

    def parts(which):
        def loss(vectors):
            return getattr(loss_of(parameters(), vectors, given)[1][0], which)

        return jax.jit(jax.grad(loss))(given["vectors"])

    # Starts also make the identifier, which is never hidden.
    trajectory, node = (np.asarray(parts(w))[hidden][..., 2:] for w in ("trajectory", "node"))
    assert not trajectory.any()
    assert np.abs(node).max() > 1e-5


def test_hidden_nodes_are_present_never_the_target_and_at_least_one():
    rng = np.random.default_rng(0)
    present = rng.random((400, 12)) < 0.5
    target = rng.integers(0, 12, 400)
    present[np.arange(400), target] = True
    present[:5] = np.arange(12) == target[:5, None]  # no candidate at all
    draw = functools.partial(forecast_objective.sample_node_mask, present=present)
    mask = np.asarray(draw(jax.random.key(1), target_index=target))
    assert not mask[~present].any() and not mask[np.arange(400), target].any()
    assert not mask[:5].any() and (mask[5:].sum(1) >= (present[5:].sum(1) > 1)).all()
    np.testing.assert_array_equal(mask, draw(jax.random.key(1), target_index=target))
    assert (mask != draw(jax.random.key(2), target_index=target)).any()
    one = np.asarray(draw(jax.random.key(1), target_index=target, exactly_one=True))
    assert set(one[5:].sum(1)) == {1} and one.any(0).all()
    every = np.asarray(draw(jax.random.key(1), target_index=target, rate=1.0))
    np.testing.assert_array_equal(every.sum(1), present.sum(1) - 1)


def test_positions_are_counted_while_every_offset_is_known():
    rng = np.random.default_rng(0)
    offsets, future = rng.normal(size=(2, 1, 4, 2))
    valid = np.array([[1, 1, 0, 1]])
    got = forecast_objective.trajectory_loss(offsets, future, valid, space="position")
    error = (np.cumsum(offsets, 1) - np.cumsum(future, 1))[0, :2]
    want = 0.5 * np.square(error).sum() + 4 * 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    with pytest.raises(ValueError, match="known: offset, position"):
        forecast_objective.trajectory_loss(offsets, future, valid, space="speed")


def test_sizes_are_those_of_the_paper():
    for name, wanted in (("vectornet_base", 42_880), ("vectornet_72k", 72_000)):
        module = catalog.find(f"driving.vectornet:{name}").build()
        counted = sum(
            int(np.prod(a.shape))
            for path, a in jax.tree_util.tree_leaves_with_path(catalog.shapes(module)["params"])
            if "decoder" not in path[0].key
        )
        assert vectornet.count_encoder_parameters(module) == counted == wanted
    flops = vectornet.count_flops(76, 795, 74, global_width=128)
    assert flops == 2 * (795 * (64 * 74 + 16384) + 76 * 3 * 130 * 128)
    assert round(flops / 1e9, 3) == 0.041


def test_a_bucket_is_traced_once():
    traced = chex.assert_max_traces(lambda *arrays: MODEL.apply(*arrays), n=1)
    apply = jax.jit(traced)
    for seed in range(3):
        given = scene(seed)
        apply({"params": parameters()}, *(given[k] for k in list(given)[:3]))


def test_an_absent_target_is_an_error_outside_jit_and_zeros_inside():
    given = scene()
    arrays = [given[k] for k in ("vectors", "vector_mask")]
    variables = {"params": parameters()}
    inside = jax.jit(MODEL.apply)
    for index, text in ((6, "outside the scene's 6 polylines"), (2, "no valid vector")):
        target = np.array([0, index], np.int32)
        with pytest.raises(ValueError, match=rf"target_index\[1\] = {index} .*{text}"):
            MODEL.apply(variables, *arrays, target)
        found = np.asarray(inside(variables, *arrays, target).positions)
        assert not found[1].any() and found[0].any()


def test_arrays_that_cannot_be_meant_are_named():
    given = scene()
    vectors, mask, target = (given[k] for k in ("vectors", "vector_mask", "target_index"))
    variables = {"params": parameters()}

    def fails(text, *arrays):
        with pytest.raises(ValueError, match=text):
            MODEL.apply(variables, *arrays)

    fails(r"in_dim = 9, got .*: 8 columns for 9", vectors[..., :8], mask, target)
    fails("vector_mask must be bool, got float32", vectors, mask.astype(np.float32), target)
    fails(r"vector_mask must be \[B, P, V\] = \(2, 6, 5\)", vectors, mask[:, :5], target)
    fails(r"target_index must be integers \[B\] = \[2\]", vectors, mask, target[:1])
    broken = vectors.copy()
    broken[1, 3, 1, 7] = np.inf
    fails(r"vectors\[1, 3, 1, 7\] = inf in a valid vector", broken, mask, target)
    far = vectors.copy()
    far[0, 0, 0, 1] = -3000
    with pytest.warns(UserWarning, match="3000 m: vectors look uncentered"):
        vectornet.check_values(far, mask, target)
    with pytest.raises(ValueError, match="coord_dim = 4"):
        vectornet.VectorNet(coord_dim=4)


def state_of(name, **arguments):
    return conversion.to_torch(random_variables(catalog.find(name).build(**arguments)))


def test_checkpoints_round_trip_and_those_that_do_not_fit_are_listed():
    state = conversion.to_torch({"params": parameters()})
    assert state["subgraph.layers.1.fc.weight"].shape == (8, 16)
    assert state["global_graph.layers.0.q.weight"].shape == (6, 18)
    _, back = jaxmodels.load("driving.vectornet", state, **fields())
    chex.assert_trees_all_equal(back["params"], jax.device_get(parameters()))
    with pytest.raises(CheckpointError, match=r"traj_decoder\.fc2\.weight is \[8, 7\].*\[10, 7\]"):
        jaxmodels.load("driving.vectornet", state, **fields(horizon=5))
    turned = {**state, "global_graph.layers.0.k.weight": state["global_graph.layers.0.k.weight"].T}
    with pytest.raises(CheckpointError, match=r"k\.weight is \[18, 6\] in the file, \[6, 18\]"):
        jaxmodels.load("driving.vectornet", turned, **fields())
    missing = {k: v for k, v in state.items() if k != "traj_decoder.norm.bias"} | {"extra": 0}
    with pytest.raises(CheckpointError, match="1 missing, 1 unexpected"):
        jaxmodels.load("driving.vectornet", missing, **fields())


def test_weights_of_the_peers_are_recognized_and_read_by_their_own_modules():
    sizes = dict(subgraph_width=4, global_graph_width=4, traj_pred_mlp_width=4, in_channels=3)
    peers = {
        "HGNN": ("Peer A", state_of("driving.vectornet_peers:HGNN", **sizes)),
        "ResidualVectorNet": (
            "Peer B",
            state_of("driving.vectornet_peers:ResidualVectorNet", with_aux=True, **sizes),
        ),
    }
    for name, (layout, state) in peers.items():
        with pytest.raises(CheckpointError, match=rf"{layout}.*load it as .*{name}"):
            jaxmodels.load("driving.vectornet", state)
    assert "backbone.subgraph.layer_seq.glp_0.shortcut.0.weight" in peers["ResidualVectorNet"][1]
    assert "traj_pred_mlp.0.shortcut.0.weight" not in peers["ResidualVectorNet"][1]


def test_peer_a_warns_that_its_output_depends_on_the_batch():
    small = dict(in_channels=3, out_channels=4, subgraph_width=4, global_graph_width=4)
    module = catalog.find("driving.vectornet_peers:HGNN").build(num_subgraph_layers=1, **small)
    variables = random_variables(module)
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 3)).astype(np.float32)
    mask = np.ones(x.shape[:3], bool)
    forward = jax.jit(lambda x: module.apply(variables, x, mask, jnp.full(2, 3)))
    with pytest.warns(UserWarning, match="depends on the other scenes"):
        whole = forward(x)
    assert np.abs(whole[0] - forward(x[[0, 0]])[0]).max() > 1e-6
    assert jnp.isfinite(whole).all()
