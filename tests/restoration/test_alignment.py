"""Deformable convolution, warping, flows and BasicVSR++: what they reduce to, and mistakes."""

import functools
import importlib.resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.cost import count_parameters
from jaxmodels.interop import catalog
from jaxmodels.restoration import ivl, resampling
from jaxmodels.restoration.basicvsrpp import BasicVSRPlusPlus
from jaxmodels.restoration.deformable import modulated_deform_conv2d
from tests.restoration import tiny
from train.data import compressed_images

TINY = {
    "mid_channels": 8,
    "num_blocks": 1,
    "spatial_blocks": 1,
    "hr_channels": 4,
    "spynet_channels": (2, 2, 2, 2),
}


def plain_conv(x, kernel, pad=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((pad, pad),) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_zero_offsets_are_a_convolution_and_whole_offsets_a_shifted_one():
    x, kernel = tiny.image(2, 7, 9, 4), tiny.image(3, 3, 4, 5, seed=1)
    apply = functools.partial(modulated_deform_conv2d, padding=1, deform_groups=2)
    offset = np.zeros((2, 7, 9, 2 * 9 * 2), np.float32)
    np.testing.assert_allclose(apply(x, offset, None, kernel), plain_conv(x, kernel), atol=1e-5)
    offset.reshape(2, 7, 9, 2, 9, 2)[...] = (2, -1)  # every tap two rows down, one column left
    padded = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
    shifted = padded[:, 6:13, 3:12]
    inside = np.s_[:, 1:-1, 1:-1]
    got = np.asarray(apply(x, offset, np.ones((2, 7, 9, 18), np.float32), kernel))
    np.testing.assert_allclose(got[inside], plain_conv(shifted, kernel)[inside], atol=1e-5)


def test_rows_and_columns_may_differ_in_stride_padding_and_dilation():
    x, kernel = tiny.image(1, 9, 8, 2), tiny.image(3, 2, 2, 3, seed=1)
    options = dict(stride=(2, 1), padding=(1, 2), dilation=(1, 3))
    got = modulated_deform_conv2d(x, np.zeros((1, 5, 9, 12), np.float32), None, kernel, **options)
    wanted = jax.lax.conv_general_dilated(
        x, kernel, (2, 1), ((1, 1), (2, 2)), rhs_dilation=(1, 3),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_the_gradient_of_offsets_masks_and_pixels_matches_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel = rng.normal(size=(1, 5, 6, 2)), rng.normal(size=(3, 3, 2, 2))
        # Fractions away from 0 and 1, where the bilinear surface has its creases.
        offset = rng.integers(-2, 3, (1, 5, 6, 18)) + rng.uniform(0.2, 0.8, (1, 5, 6, 18))
        mask, weights = rng.uniform(size=(1, 5, 6, 9)), rng.normal(size=(1, 5, 6, 2))

        @jax.jit
        def value(x, offset, mask):
            return (modulated_deform_conv2d(x, offset, mask, kernel, padding=1) * weights).sum()

        arguments = [x, offset, mask]
        gradients = jax.jit(jax.grad(value, (0, 1, 2)))(*arguments)
        for number, gradient in enumerate(gradients):
            for place in rng.integers(arguments[number].size, size=12):
                step = np.zeros(arguments[number].size)
                step[place] = 1e-6
                step = step.reshape(arguments[number].shape)
                up, down = (
                    value(*[a + s * step if i == number else a for i, a in enumerate(arguments)])
                    for s in (1, -1)
                )
                wanted = (up - down) / 2e-6
                np.testing.assert_allclose(gradient.reshape(-1)[place], wanted, atol=1e-4)


def test_a_constant_flow_is_a_shift_with_zeros_or_clamped_edges():
    x = tiny.image(1, 6, 7, 2)
    flow = np.broadcast_to(np.float32([2, -1]), (1, 6, 7, 2))
    for border, mode in (("zeros", "constant"), ("border", "edge")):
        wanted = np.pad(x, ((0, 0), (1, 0), (0, 2), (0, 0)), mode=mode)[:, :6, 2:]
        np.testing.assert_allclose(resampling.flow_warp(x, flow, border), wanted, atol=1e-6)


def test_the_measured_disparity_of_a_stereo_pair_warps_one_picture_onto_the_other():
    data = importlib.resources.files("skimage") / "data"
    left, right = (
        compressed_images.photograph(f"motorcycle_{side}.png")[100:228] / np.float32(255)
        for side in ("left", "right")
    )
    with (data / "motorcycle_disp.npz").open("rb") as file:
        disparity = np.load(file)["arr_0"][100:228].astype(np.float32)
    # A point at x of the left picture stands at x - d of the right one; d is unknown in places.
    known = np.isfinite(disparity) & (np.arange(left.shape[1]) >= np.nan_to_num(disparity))
    flow = np.stack([-np.where(known, disparity, 0), np.zeros_like(disparity)], -1)
    warped = np.asarray(resampling.flow_warp(jnp.asarray(right)[None], flow[None], "border"))[0]
    before, after, opposite = (
        np.abs(x - left)[known].mean()
        for x in (right, warped, resampling.flow_warp(jnp.asarray(right)[None], -flow[None])[0])
    )
    assert known.mean() > 0.7 and after < before / 2.5 and opposite > before / 1.5


def test_deformable_convolution_names_sizes_that_do_not_fit():
    x, kernel = tiny.image(1, 5, 5, 4), tiny.image(3, 3, 4, 4)
    with pytest.raises(ValueError, match=r"offset must be \(1, 5, 5, 18\)"):
        modulated_deform_conv2d(x, np.zeros((1, 5, 5, 17)), None, kernel, padding=1)
    with pytest.raises(ValueError, match="must divide by deform_groups = 3"):
        modulated_deform_conv2d(
            x, np.zeros((1, 5, 5, 54)), None, kernel, padding=1, deform_groups=3
        )
    with pytest.raises(ValueError, match="unknown resize method 'cubic'"):
        resampling.resize(x, (3, 3), "cubic")


@pytest.fixture(scope="module")
def video_model():
    module = BasicVSRPlusPlus(**TINY)
    return module, tiny.variables_of(module, scale=0.05)


def test_flows_turn_with_time_and_those_of_a_mirrored_clip_are_each_other_reversed(video_model):
    module, variables = video_model
    clip = tiny.image(1, 4, 64, 64, 3, seed=1)
    flows = tiny.quickly(functools.partial(module.apply, method="flows"), variables, clip)
    backward, forward = flows(variables, clip)
    reversed_backward, reversed_forward = flows(variables, clip[:, ::-1].copy())
    np.testing.assert_allclose(reversed_backward[:, ::-1], forward, atol=1e-5)
    np.testing.assert_allclose(reversed_forward[:, ::-1], backward, atol=1e-5)
    assert np.abs(forward - backward[:, ::-1]).max() > 1e-4
    half = clip[:, :2]
    mirrored = flows(variables, np.concatenate([half, half[:, ::-1]], 1))
    np.testing.assert_array_equal(mirrored[1], mirrored[0][:, ::-1])


def test_one_frame_is_enough(video_model):
    module, variables = video_model
    y = tiny.compiled(module.apply, variables, tiny.image(1, 1, 64, 64, 3))
    assert y.shape == (1, 1, 256, 256, 3) and np.isfinite(y).all()


def test_the_reds_variant_has_the_published_parameter_count():
    shapes = catalog.shapes(catalog.find("basicvsrpp_reds4").build())
    assert abs(count_parameters(shapes) / 1e6 - 7.32) <= 0.005


def test_clips_that_cannot_be_meant_are_refused_with_the_shape_expected():
    module = BasicVSRPlusPlus(**TINY)
    for shape in ((1, 2, 63, 64, 3), (2, 64, 64, 3), (1, 2, 3, 64, 64)):
        with pytest.raises(ValueError, match=r"\[B,T,C,H,W\]"):
            module.init(jax.random.key(0), jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"expects \[0,1\]"):
        module.init(jax.random.key(0), np.full((1, 2, 64, 64, 3), 99, np.float32))
    with pytest.raises(ValueError, match="2 \\* mid_channels = 20 must divide"):
        BasicVSRPlusPlus(mid_channels=10)


def test_he_initialization_lets_gradients_reach_ivls_first_layers():
    sizes = []
    for he_init in (False, True):
        module = catalog.find("restoration.ivl").build(
            nf=8, cnn_nf=8, cnn_nb=8, out_nc=8, he_init=he_init
        )
        x = jax.random.uniform(jax.random.key(1), (1, 8, 8, 5))
        variables = jax.jit(module.init)(jax.random.key(0), x)
        grads = jax.jit(jax.grad(lambda v, m=module, x=x: (m.apply(v, x) ** 2).mean()))(variables)
        sizes.append(np.abs(grads["params"]["qenet"]["in_conv.0"]["kernel"]).max())
    assert sizes[1] > 1000 * sizes[0] > 0


def test_basicvsrpp_begins_with_the_official_weights_or_hes():
    def drawn(**changes):
        module = BasicVSRPlusPlus(**TINY | changes)
        shapes = [jnp.zeros(s.shape) for s in module.example_inputs()]
        return jax.jit(module.init)(jax.random.key(0), *shapes)["params"]

    def spread(kernel, name):
        for key in (*name.split("/"), "kernel"):
            kernel = kernel[key]
        return float(kernel.std()) * np.sqrt(np.prod(kernel.shape[:3]))

    official, hes = drawn(), drawn(he_init=True)

    # Standard deviations times the root of fan-in.
    for name, plain, he in (
        ("upsample1.upsample_conv", 2**0.5, 2**0.5),
        ("reconstruction/main.2.0.conv1", 0.1 * 2**0.5, 0.1 * 2**0.5),
        ("reconstruction/main.0", 3**-0.5, 2**0.5),
        ("conv_hr", 3**-0.5, 2**0.5),
        ("conv_last", 3**-0.5, 3**-0.5),
    ):
        np.testing.assert_allclose(spread(official, name), plain, rtol=0.15)
        np.testing.assert_allclose(spread(hes, name), he, rtol=0.15)


def test_ivl_repeats_edge_frames_and_returns_the_restored_picture():
    assert ivl.frame_windows(6).tolist()[0] == [0, 0, 0, 1, 2]
    assert ivl.frame_windows(6).tolist()[5] == [3, 4, 5, 5, 5]
    assert ivl.frame_windows(6, 4)[:, 4 // 2].tolist() == [0, 1, 2, 3, 4, 5]
    module = catalog.find("restoration.ivl").build(nf=4, cnn_nf=4, cnn_nb=3, out_nc=8)
    variables = tiny.variables_of(module)
    frames = tiny.image(1, 5, 13, 9, 3)
    rgb, larger = tiny.compiled(
        lambda v, x: (
            ivl.restore_rgb(module, v, x),
            ivl.restore_rgb(module, jax.tree.map(jnp.zeros_like, v), x),
        ),
        variables,
        frames,
    )
    assert rgb.shape == (1, 52, 36, 3)
    # With all weights at zero the network adds nothing to the bicubic picture.
    assert np.abs(rgb - larger).max() > 1e-3
    np.testing.assert_allclose(ivl.ycbcr_to_rgb(ivl.rgb_to_ycbcr(frames)), frames, atol=2e-6)
    shapes = catalog.shapes(catalog.find("ivl_aim2022").build())
    assert abs(count_parameters(shapes) / 1e6 - 0.379) < 0.001
    with pytest.raises(ValueError, match="sides must divide by 8"):
        module.apply(variables, tiny.image(1, 12, 16, 5))
