"""RepGhost: folding is exact, costs and names are the official ones, mistakes are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import jaxmodels
from jaxmodels.cost import count_cost, count_parameters
from jaxmodels.interop.conversion import to_torch
from jaxmodels.layers import convolution
from jaxmodels.layers.depthwise import depthwise_conv
from jaxmodels.layers.squeeze_excite import SqueezeExcite
from jaxmodels.vision.repghost import (
    VARIANTS,
    RepGhostBottleneck,
    RepGhostModule,
    RepGhostNet,
    check_checkpoint,
    fold,
    fold_all,
)
from tests.interop import torch_files
from tests.vision import repghost_reference as reference

MODES = {"bn": (True, False), "id": (False, True), "bn+id": (True, True)}
MODES_AND_NONE = {**MODES, "none": (False, False)}


def shapes_of(module):
    return jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())


def random_variables(module, seed=0, dtype=np.float32):
    """Parameters and statistics of every sign and size, so that nothing cancels by luck."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        if path[-1].key == "var":
            values = rng.uniform(0.2, 3, size=leaf.shape)
        return jnp.asarray(values, dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(module))


def relative(a, b):
    return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("relu", [True, False])
def test_folded_module_equals_training_form_at_odd_sizes_and_borders(mode, relu):
    bn, identity = MODES[mode]
    with jax.enable_x64(True):
        for dtype, bound in ((jnp.float32, 1e-5), (jnp.float64, 1e-12)):
            module = RepGhostModule(
                5,
                7,
                relu=relu,
                reparam_bn=bn,
                reparam_identity=identity,
                dtype=dtype,
                param_dtype=dtype,
            )
            variables = random_variables(module, dtype=dtype)
            folded, folded_variables = fold(module, variables)
            assert folded_variables["params"]["cheap_operation"]["kernel"].dtype == dtype
            for size in ((7, 5), (1, 1)):
                x = jnp.asarray(np.random.default_rng(1).normal(size=(2, *size, 5)), dtype)
                y, z = module.apply(variables, x), folded.apply(folded_variables, x)
                assert y.dtype == dtype
                assert relative(z, y) <= bound, (dtype, size)


def test_folding_with_fresh_statistics_is_exact_too():
    module = RepGhostModule(4, 6)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 5, 5, 4)))
    x = jax.random.normal(jax.random.key(1), (2, 9, 4, 4))
    folded, folded_variables = fold(module, variables)
    assert relative(folded.apply(folded_variables, x), module.apply(variables, x)) <= 1e-5


@pytest.mark.parametrize("mode", MODES_AND_NONE)
def test_fold_all_leaves_no_batch_norm_and_equals_the_training_form(mode):
    bn, identity = MODES_AND_NONE[mode]
    module = RepGhostBottleneck(
        4, 6, 8, 5, 2, se=True, reparam_bn=bn, reparam_identity=identity, reparam=mode != "none"
    )
    variables = random_variables(module)
    x = jax.random.normal(jax.random.key(1), (2, 9, 7, 4))
    want = jax.jit(module.apply)(variables, x)
    folded, folded_variables = fold_all(module, variables)
    assert set(folded_variables) == {"params"}
    assert not any("scale" in path for path in traverse_util.flatten_dict(folded_variables))
    assert relative(jax.jit(folded.apply)(folded_variables, x), want) <= 1e-5
    assert fold_all(folded, folded_variables)[1] is folded_variables


def test_folding_twice_and_folding_without_fusion_branches_change_nothing():
    module = RepGhostModule(4, 4)
    once = fold(module, random_variables(module))
    assert fold(*once)[0] is once[0] and fold(*once)[1] is once[1]
    plain = RepGhostNet(reparam=False)
    untouched = {"params": {}, "batch_stats": {}}
    assert fold(plain, untouched)[0] is plain and fold(plain, untouched)[1] is untouched


def test_folding_drops_the_counters_of_folded_layers_only():
    module = RepGhostModule(4, 4)
    variables = random_variables(module)
    counters = {
        name: {"num_batches_tracked": np.int64(7)}
        for name in ("primary_conv.1", "cheap_operation.1", "fusion_bn.0")
    }
    _, folded = fold(module, {**variables, "buffers": counters})
    assert set(folded["buffers"]) == {"primary_conv.1"}
    assert set(folded["batch_stats"]) == {"primary_conv.1"}


def test_fold_names_the_module_whose_statistics_cannot_be_folded():
    module = RepGhostBottleneck(4, 4, 4)
    for bad in (-1.0, np.nan, np.inf):
        variables = random_variables(module)
        stats = variables["batch_stats"]["ghost2"]["fusion_bn.0"]
        stats["var"] = stats["var"].at[2].set(bad)
        with pytest.raises(ValueError, match=r"^ghost2\.fusion_bn\.0: cannot fold"):
            fold(module, variables)


def test_fold_refuses_depthwise_kernels_that_are_not_3x3():
    module = RepGhostModule(4, 4, dw_size=5)
    with pytest.raises(ValueError, match=r"5x5 depthwise kernel; centre padding assumes 3x3"):
        fold(module, random_variables(module))


@pytest.mark.parametrize("width", reference.WIDTHS)
def test_widths_are_the_published_ones(width):
    kernels = {
        path[1:]: leaf.shape
        for path, leaf in traverse_util.flatten_dict(shapes_of(RepGhostNet(width=width))).items()
        if path[0] == "params" and path[-1] == "kernel"
    }

    def out(*path):
        return kernels[(*path, "kernel")][-1]

    def mids(i):
        return [out(f"blocks.{i}.{j}", "ghost1", "primary_conv.0") for j in range(per_stage[i])]

    def outs(i):
        return [out(f"blocks.{i}.{j}", "ghost2", "primary_conv.0") for j in range(per_stage[i])]

    per_stage = [len(stage) for stage in reference.STAGES]
    rows = [
        [out("conv_stem")],
        [outs(i)[0] for i in range(9)],
        outs(6),
        [mids(i)[0] for i in range(6)],
        mids(6),
        [mids(7)[0], mids(8)[0]],
        [out("blocks.9.0.conv")],
    ]
    assert "|".join(",".join(map(str, row)) for row in rows) == reference.WIDTHS[width]
    assert out("conv_head") == 1280


@pytest.mark.parametrize("deploy", [False, True])
def test_cost_at_other_resolutions_follows_the_rule(deploy):
    # An odd, oblong size: every halving rounds up, and both axes count.
    cost = count_cost(RepGhostNet(width=1.11, deploy=deploy), resolution=(201, 97))
    assert cost.macs == reference.macs(1.11, 201, 97, folded=deploy) == sum(cost.layers.values())


@pytest.mark.parametrize(
    ("variant", "train", "folded"),
    [
        ("repghostnet_0_5x", 2_313_968, 2_306_528),
        ("repghostnet_repid_0_5x", 2_309_008, 2_306_528),
        ("repghostnet_norep_0_5x", 2_309_008, 2_309_008),
        ("repghostnet_wo_0_5x", 2_313_968, 2_306_528),
    ],
)
def test_variants_have_the_published_parameters_in_both_forms(variant, train, folded):
    module = RepGhostNet(**VARIANTS[variant])
    shapes = shapes_of(module)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == train
    # Folding traces, so that shapes alone can be folded.
    after = jax.eval_shape(lambda variables: fold(module, variables)[1], shapes)
    assert sum(leaf.size for leaf in jax.tree.leaves(after["params"])) == folded


def test_names_are_the_official_ones_and_a_round_trip_keeps_every_bit():
    rng = np.random.default_rng(0)
    for folded, count in ((False, 672), (True, 384)):
        module = RepGhostNet(width=0.5, deploy=folded)
        shapes = shapes_of(module)
        if folded:
            assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 2_306_528
        state = to_torch(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
        assert sorted(state) == sorted(reference.names(0.5, folded)) and len(state) == count
        state = {
            key: rng.normal(size=value.shape).astype(value.dtype)
            if value.dtype == np.float32
            else np.asarray(rng.integers(2**40), np.int64)
            for key, value in state.items()
        }
        _, variables = jaxmodels.load("repghostnet_0_5x", state, deploy=folded)
        again = to_torch(variables)
        assert set(again) == set(state)
        for key, value in state.items():
            assert again[key].dtype == value.dtype and again[key].shape == value.shape, key
            assert again[key].tobytes() == value.tobytes(), key


def test_of_a_training_file_the_averages_are_taken_unless_the_caller_says_otherwise(tmp_path):
    state = {k: np.asarray(v) for k, v in to_torch(random_variables(RepGhostModule(4, 6))).items()}
    average = {f"module.{k}": np.asarray(2 * v) for k, v in state.items()}
    file = tmp_path / "model_best.pth.tar"
    both = {"epoch": 299, "state_dict": state, "state_dict_ema": average}
    for content, prefer, factor in (
        (both, (), 2),
        (both, ("state_dict",), 1),
        ({"state_dict": state}, (), 1),
    ):
        file.write_bytes(torch_files.zip_bytes(content))
        name = "vision.repghost:RepGhostModule"
        _, variables = jaxmodels.load(name, file, prefer=prefer, inp=4, oup=6)
        key = "cheap_operation.0.weight"
        np.testing.assert_array_equal(to_torch(variables)[key], factor * state[key])


def equations(jaxpr):
    """Every equation of a jaxpr, those of inner ones in place of the call."""
    for equation in jaxpr.eqns:
        inner = [
            getattr(value, "jaxpr", value)
            for parameter in equation.params.values()
            for value in (parameter if isinstance(parameter, (tuple, list)) else [parameter])
            if hasattr(getattr(value, "jaxpr", value), "eqns")
        ]
        if inner:
            for sub in inner:
                yield from equations(sub)
        else:
            yield equation


def kinds(module, monkeypatch):
    # The plain grouped form, one equation a convolution: what is counted is the network.
    def grouped(x, kernel, strides, padding):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )

    monkeypatch.setattr(convolution, "depthwise_conv", grouped)
    jaxpr = jax.make_jaxpr(module.apply)(shapes_of(module), *module.example_inputs()).jaxpr
    return [
        "depthwise"
        if e.primitive.name == "conv_general_dilated" and e.params["feature_group_count"] > 1
        else e.primitive.name
        for e in equations(jaxpr)
    ]


def test_folded_module_is_one_depthwise_convolution_with_no_batch_norm_after(monkeypatch):
    training = kinds(RepGhostModule(6, 8), monkeypatch)
    folded = kinds(RepGhostModule(6, 8, deploy=True), monkeypatch)
    assert training.count("sqrt") == 3 and folded.count("sqrt") == 1
    assert training.count("depthwise") == folded.count("depthwise") == 1
    after = set(folded[folded.index("depthwise") + 1 :])
    assert after <= {"add", "max", "broadcast_in_dim", "convert_element_type", "reshape"}, after


def test_folded_network_has_no_concatenation_and_one_depthwise_convolution_a_module(monkeypatch):
    folded = kinds(RepGhostNet(width=0.5, deploy=True), monkeypatch)
    assert "concatenate" not in folded[folded.index("sqrt") :]  # the stem's form for CPUs has some
    strided, projections = 4, 5
    assert folded.count("depthwise") == 32 + strided + projections
    # One BatchNorm each: stem, last, 32 primaries, strided depthwise; two each projection.
    assert folded.count("sqrt") == 2 + 32 + strided + 2 * projections


def test_the_squeeze_may_have_another_width():
    shapes = shapes_of(RepGhostBottleneck(8, 16, 8, se=True, se_ratio=0.5))["params"]["se"]
    assert shapes["conv_reduce"]["kernel"].shape == (1, 1, 16, 8)
    shapes = shapes_of(RepGhostBottleneck(8, 16, 8, se=True))["params"]["se"]
    assert shapes["conv_reduce"]["kernel"].shape == (1, 1, 16, 4)


def test_the_squeeze_may_be_a_share_of_another_number_of_channels():
    shapes = shapes_of(SqueezeExcite(12, base=40))["params"]
    assert shapes["conv_reduce"]["kernel"].shape == (1, 1, 12, 12)


def test_gradients_reach_the_fusion_branch():
    module = RepGhostModule(4, 4)
    variables = random_variables(module)
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))

    def loss(params):
        y, _ = module.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
        return jnp.square(y).sum()

    grads = jax.jit(jax.grad(loss))(variables["params"])["fusion_bn.0"]
    assert jnp.abs(grads["scale"]).max() > 1e-2 and jnp.abs(grads["bias"]).max() > 1e-2


def test_features_are_the_pyramid_and_do_not_change_by_folding():
    full = RepGhostNet(width=0.05, num_classes=3)
    state = to_torch(random_variables(full))
    module, variables = jaxmodels.load(
        "vision.repghost", state, width=0.05, num_classes=3, features_only=True
    )
    assert not {"classifier", "conv_head", "blocks.9.0.conv"} & set(variables["params"])
    x = jax.random.normal(jax.random.key(0), (1, 65, 40, 3))
    maps = jax.jit(module.apply)(variables, x)
    folded, folded_variables = fold(module, variables)
    folded_maps = jax.jit(folded.apply)(folded_variables, x)
    assert [m.shape[1:3] for m in maps] == [(17, 10), (9, 5), (5, 3), (3, 2)]
    for a, b in zip(maps, folded_maps):
        assert relative(b, a) <= 1e-4


def test_initial_weights_are_pytorchs_defaults():
    block = RepGhostBottleneck(32, 40, 64, se=True, stride=2)
    params = jax.jit(block.init)(jax.random.key(0), jnp.zeros((1, 2, 2, 32)))["params"]
    linear = convolution.Linear(100).init(jax.random.key(1), jnp.zeros((1, 50)))["params"]
    for leaf, fan_in in (
        (linear["kernel"], 50),
        (linear["bias"], 50),
        (params["ghost1"]["primary_conv.0"]["kernel"], 32),
        (params["ghost1"]["cheap_operation.0"]["kernel"], 9),
        (params["se"]["conv_reduce"]["kernel"], 40),
        (params["se"]["conv_expand"]["bias"], 12),
        (params["shortcut.2"]["kernel"], 32),
    ):
        bound = fan_in**-0.5
        assert 0.9 * bound < jnp.abs(leaf).max() <= bound
        assert abs(float(jnp.std(leaf)) - bound / 3**0.5) < 0.1 * bound
    assert (params["bn_dw"]["scale"] == 1).all() and (params["bn_dw"]["bias"] == 0).all()
    assert count_parameters({"params": params}) == sum(p.size for p in jax.tree.leaves(params))


def test_half_precision_keeps_master_weights_and_statistics_wide():
    module = RepGhostNet(width=0.1, dtype=jnp.bfloat16)
    out, variables = jax.eval_shape(
        module.init_with_output, jax.random.key(0), *module.example_inputs()
    )
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_depthwise_layers_go_through_the_one_fast_form():
    assert convolution.depthwise_conv is depthwise_conv


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RepGhostNet(width=0.0), r"width must be positive, got 0\.0; .*repghostnet_0_58x"),
        (lambda: RepGhostNet(width=-1), r"width must be positive"),
        (lambda: RepGhostNet(width=float("nan")), r"width must be positive"),
        (lambda: RepGhostNet(num_classes=0), r"num_classes must be at least 1.*repghostnet_2_0x"),
        (lambda: jaxmodels.load("vision.repghost:repghostnet_0_6x"), r"repghostnet_0_5x"),
    ],
)
def test_bad_arguments_list_the_variants_in_one_line(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "message"),
    [
        ((2, 3, 32, 32), "float32", ValueError, r"\[batch, height, width, 3\].*NCHW"),
        ((32, 32, 3), "float32", ValueError, r"got shape \(32, 32, 3\)"),
        ((2, 32, 32, 1), "float32", ValueError, r"got shape \(2, 32, 32, 1\)"),
        ((2, 0, 32, 3), "float32", ValueError, r"must not be empty"),
        ((0, 32, 32, 3), "float32", ValueError, r"must not be empty"),
        ((2, 32, 32, 3), "uint8", TypeError, r"got uint8; set preprocess=True"),
    ],
)
def test_images_that_cannot_be_meant_are_refused(shape, dtype, error, message):
    module = RepGhostNet(width=0.1)
    with pytest.raises(error, match=message):
        jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype))


def test_small_images_and_preprocessed_integers_are_accepted():
    module = RepGhostNet(width=0.1, preprocess=True, num_classes=4)
    for image in (
        jax.ShapeDtypeStruct((1, 1, 1, 3), jnp.float32),
        jax.ShapeDtypeStruct((1, 17, 9, 3), jnp.uint8),
    ):
        out, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), image)
        assert out.shape == (1, 4) and out.dtype == jnp.float32


def test_training_a_folded_model_is_refused():
    module = RepGhostNet(width=0.1, deploy=True)
    with pytest.raises(ValueError, match="cannot be trained"):
        jax.eval_shape(
            lambda v, x: module.apply(v, x, train=True),
            shapes_of(module),
            *module.example_inputs(),
        )


def test_checkpoints_of_the_other_form_are_named_with_the_call_that_converts():
    training, folded = reference.names(0.5, False), reference.names(0.5, True)
    check_checkpoint(training, RepGhostNet(width=0.5))
    check_checkpoint(folded, RepGhostNet(width=0.5, deploy=True))
    with pytest.raises(ValueError, match=r"is in folded form.*deploy=True"):
        check_checkpoint(folded, RepGhostNet(width=0.5))
    with pytest.raises(ValueError, match=r"is in training form.*repghost\.fold\("):
        check_checkpoint(training, RepGhostNet(width=0.5, deploy=True))
    # Without fusion branches nothing is folded, and its checkpoint is of neither other form.
    check_checkpoint(training, RepGhostNet(width=0.5, reparam=False))
    with pytest.raises(ValueError, match="is in folded form"):
        jaxmodels.load("repghostnet_0_5x", {key: np.zeros(1, np.float32) for key in folded})
