"""Swin2SR: padding, shifted windows, any resolution with any weights, checkpoints, mistakes."""

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels.cost import count_parameters
from jaxmodels.interop import catalog
from jaxmodels.restoration import swin2sr as model
from jaxmodels.restoration.swin2sr import Swin2SR, SwinBlock, sr_of
from tests.restoration import tiny

PUBLISHED_MILLIONS = {
    "compressed_sr_x4_48": 12.24,
    "lightweight_x2_64": 1.005,
    "jpeg_gray": 11.84,
}


@pytest.mark.parametrize("variant", PUBLISHED_MILLIONS)
def test_variants_have_the_published_parameter_counts(variant):
    found = catalog.find(variant)
    count = count_parameters(catalog.shapes(found.build()))
    assert abs(count / 1e6 - PUBLISHED_MILLIONS[variant]) <= 0.006


@pytest.mark.parametrize("head", [h for h in tiny.HEADS if h != "pixelshuffle_aux"])
def test_an_odd_input_equals_the_crop_of_the_padded_run(head):
    module = tiny.swin2sr(head, depths=(1,))
    variables, x = tiny.variables_of(module), tiny.image(1, 13, 19, 3)
    padded = np.pad(x, ((0, 0), (0, 3), (0, 1), (0, 0)), mode="reflect")
    odd, whole = tiny.compiled(
        lambda v, a, b: (sr_of(module.apply(v, a)), sr_of(module.apply(v, b))),
        variables,
        x,
        padded,
    )
    s = module.upscale
    assert odd.shape == (1, 13 * s, 19 * s, 3)
    np.testing.assert_allclose(odd, whole[:, : 13 * s, : 19 * s], atol=1e-5)


def test_the_aux_head_shrinks_the_padded_input_as_officially_unless_told_not_to():
    module = tiny.swin2sr("pixelshuffle_aux", depths=(1,))
    variables, x = tiny.variables_of(module), tiny.image(1, 13, 19, 3)
    padded = np.pad(x, ((0, 0), (0, 3), (0, 1), (0, 0)), mode="reflect")
    exact = module.clone(faithful_padding=False)
    faithful, (sr, aux), whole = tiny.compiled(
        lambda v, a, b: (module.apply(v, a)[0], exact.apply(v, a), module.apply(v, b)[0]),
        variables,
        x,
        padded,
    )
    np.testing.assert_allclose(sr, whole[:, :52, :76], atol=1e-5)
    assert np.abs(faithful - sr).max() > 1e-3
    assert aux.shape == (1, 16, 20, 3)


def test_a_token_never_mixes_with_tokens_rolled_round_from_the_opposite_edge():
    block = SwinBlock(heads=2, window=4, shift=2)
    x = tiny.image(1, 8, 8, 4)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)
    variables = {"params": tiny.random_like(shapes["params"])}
    changed = x.copy()
    changed[:, -1] += 3

    def difference(shift):
        apply = block.clone(shift=shift).apply
        return jax.jit(lambda v, a, b: apply(v, a) - apply(v, b))(variables, x, changed)

    rows = np.abs(np.asarray(difference(2))).max((0, 2, 3))
    # The window of rows 6, 7, 0, 1: the mask keeps the last row from the first two.
    assert rows[0] == rows[1] == 0 and rows[6] > 1e-3
    assert np.all(rows[2:6] == 0)
    mask = model.shifted_window_mask(8, 8, 4, 2)
    assert mask.min() == -100 and (mask == 0).any() and mask.shape == (4, 16, 16)


def test_weights_serve_any_resolution_and_masks_are_no_parameters():
    module = tiny.swin2sr()
    variables = tiny.variables_of(module)
    names = str(jax.tree_util.tree_structure(catalog.shapes(module)))
    assert "attn_mask" not in names and set(catalog.shapes(module)) == {"params"}
    y = tiny.compiled(module.apply, variables, tiny.image(2, 8, 12, 3))
    assert y.shape == (2, 24, 36, 3) and np.isfinite(y).all()


def test_absolute_positions_are_added_for_images_of_their_size_only():
    module = tiny.swin2sr(ape=True, img_size=(8, 12), depths=(1,))
    variables, x = tiny.variables_of(module), tiny.image(1, 7, 10, 3)
    assert variables["params"]["absolute_pos_embed"].shape == (1, 96, 4)
    without = {k: v for k, v in variables["params"].items() if k != "absolute_pos_embed"}
    plain = module.clone(ape=False)
    added, left_out = tiny.compiled(
        lambda v, w, x: (module.apply(v, x), plain.apply(w, x)), variables, {"params": without}, x
    )
    assert np.abs(added - left_out).max() > 1e-3
    with pytest.raises(ValueError, match=r"must have img_size \(8, 12\) once padded, not 8x8"):
        jax.eval_shape(module.apply, variables, tiny.image(1, 8, 8, 3))


def test_checkpoints_round_trip_with_the_buffers_that_a_strict_load_wants():
    name, module = "restoration.swin2sr", tiny.swin2sr()
    arguments = {f: getattr(module, f) for f in catalog.find(name).cls.__dataclass_fields__
                 if f not in ("parent", "name", "dtype", "param_dtype")}  # fmt: skip
    state = catalog.export(name, module, tiny.variables_of(module))
    block = "layers.0.residual_group.blocks"
    assert state[f"{block}.1.attn_mask"].shape == (16, 16, 16)
    assert f"{block}.0.attn_mask" not in state
    assert state[f"{block}.0.attn.relative_position_index"].dtype == np.int64
    # Masks of other training sizes are nobody's business; DataParallel's prefix neither.
    given = {f"module.{k}": v for k, v in state.items()}
    given[f"module.{block}.1.attn_mask"] = np.zeros((4, 16, 16), np.float32)
    loaded, variables = jaxmodels.load(name, given, **arguments)
    again = catalog.export(name, loaded, variables, like=state)
    assert again.keys() == state.keys()
    assert all(again[k].tobytes() == state[k].tobytes() for k in state)
    index = f"module.{block}.0.attn.relative_position_index"
    given[index] = given[index] + 1
    with pytest.raises(ValueError, match=r"is not that of window_size 4"):
        jaxmodels.load(name, given, **arguments)
    with pytest.raises(ValueError, match=r"shape +conv_first.weight is \[4, 3, 3, 3\]"):
        jaxmodels.load(name, state, **{**arguments, "embed_dim": 8})
    with pytest.raises(ValueError, match=r"missing +conv_before_upsample.0.weight"):
        jaxmodels.load(name, state, **{**arguments, "upsampler": "pixelshuffle"})


MISTAKES = {
    "upscale must be one of": {"upscale": 5, "upsampler": "pixelshuffle"},
    "'nearest\\+conv' is for upscale 4 only": {"upscale": 2, "upsampler": "nearest+conv"},
    "upscale must be 1 without an upsampler": {"upscale": 2, "upsampler": ""},
    "embed_dim 4 must divide by num_heads 3": {"num_heads": (3,)},
    "upsampler 'pixelshufle'": {"upsampler": "pixelshufle"},
    "resi_connection": {"resi_connection": "2conv"},
    "one number a group": {"depths": (1, 1)},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_arguments_that_do_not_fit_are_named_at_construction(message):
    base = tiny.swin2sr()
    with pytest.raises(ValueError, match=message):
        base.clone(**MISTAKES[message])


def test_inputs_that_cannot_be_meant_are_refused():
    module = tiny.swin2sr()
    variables = tiny.variables_of(module)
    for x, message in (
        (np.zeros((1, 8, 8, 3), np.uint8), r"expects \[0,1\]"),
        (np.full((1, 8, 8, 3), 200.0, np.float32), r"expects \[0,1\]"),
        (tiny.image(1, 8, 8, 1), "in_chans=1"),
        (tiny.image(8, 8, 3), r"\[batch, height, width, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            module.apply(variables, x)
    with pytest.raises(ValueError, match="cannot be padded by reflection"):
        jax.eval_shape(module.apply, variables, tiny.image(1, 1, 8, 3))


def test_stochastic_depth_acts_in_training_only():
    module = Swin2SR(
        **{f: getattr(tiny.swin2sr(), f) for f in ("upscale", "upsampler", "window_size",
           "embed_dim", "num_heads", "img_size", "depths")}, drop_path_rate=0.9)  # fmt: skip
    variables, x = tiny.variables_of(module), tiny.image(1, 4, 4, 3)

    def apply(variables, x, key):
        return (
            module.apply(variables, x),
            module.apply(variables, x, train=True, rngs={"dropout": key}),
        )

    plain, dropped = tiny.compiled(apply, variables, x, jax.random.key(1))
    assert np.abs(plain - dropped).max() > 1e-4
