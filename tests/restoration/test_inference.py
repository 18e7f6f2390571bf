"""The x8 ensemble, tiles, padding, metrics and losses: exact where they can be, errors named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.restoration import inference, losses, metrics
from tests.restoration import tiny

KERNEL = tiny.image(5, 5, 3, 12, seed=4) - 0.4


def upscaling(x):
    """A network without symmetry: one 5x5 convolution and a pixel shuffle."""
    from jaxmodels.restoration.resampling import pixel_shuffle

    y = jax.lax.conv_general_dilated(
        x, KERNEL, (1, 1), ((2, 2), (2, 2)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return pixel_shuffle(y, 2)


@pytest.mark.parametrize("mode", range(8))
def test_the_ensemble_turns_exactly_with_its_input(mode):
    x = tiny.image(1, 6, 9, 3)
    apply = inference.self_ensemble(upscaling)
    turned = apply(inference.augment(jnp.asarray(x), mode))
    np.testing.assert_allclose(turned, inference.augment(apply(jnp.asarray(x)), mode), atol=1e-5)
    plain = upscaling(jnp.flip(jnp.asarray(x), 1)) - jnp.flip(upscaling(jnp.asarray(x)), 1)
    assert np.abs(plain).max() > 0.1
    again = inference.undo_augment(inference.augment(x, mode), mode)
    np.testing.assert_array_equal(again, x)
    gray = x[0, ..., 0]
    turned = inference.augment(gray, mode)
    np.testing.assert_array_equal(turned, inference.augment(x, mode)[0, ..., 0])
    np.testing.assert_array_equal(inference.undo_augment(turned, mode), gray)


def test_tiles_cover_the_picture_once_on_average_and_leave_no_seam():
    x = tiny.image(40, 72, 3)
    whole = np.asarray(upscaling(jnp.asarray(x)[None]))[0]
    shapes = []

    def apply(tile):
        shapes.append(tile.shape)
        return upscaling(tile)

    joined = inference.tiled(apply, x, tile=24, scale=2, window=8, overlap=8)
    assert set(shapes) == {(1, 24, 24, 3)}
    # A convolution sees zeros beyond a tile's border, where the tile counts little.
    assert 0 < np.abs(joined - whole).mean() < 0.02 * np.abs(whole).mean()
    same = inference.tiled(
        lambda t: jnp.repeat(jnp.repeat(t, 2, 1), 2, 2), x, tile=24, scale=2, overlap=8
    )
    np.testing.assert_allclose(same, x.repeat(2, 0).repeat(2, 1), atol=1e-6)
    large = inference.tiled(upscaling, x, tile=128, scale=2)
    np.testing.assert_allclose(large, whole, atol=1e-6)


def test_tiles_of_a_transformer_meet_in_smaller_steps_than_the_picture_itself_has():
    network = tiny.swin2sr(embed_dim=8)
    coarse = tiny.image(6, 10, 3)
    x = np.asarray(jax.image.resize(coarse, (24, 40, 3), "linear"))
    tile = jnp.zeros((1, 16, 16, 3))
    variables = tiny.compiled(network.init, jax.random.key(0), tile)
    whole = np.asarray(tiny.compiled(network.apply, variables, x[None]))[0]
    apply = tiny.quickly(network.apply, variables, tile)
    joined = inference.tiled(
        lambda part: apply(variables, part), x, tile=16, scale=3, window=4, overlap=8
    )
    mean = inference.tiled(
        lambda part: apply(variables, part), x, tile=16, scale=3, window=4, overlap=8, blend="mean"
    )
    # Places where a tile begins or ends, against all others.
    starts = inference.tile_starts(40, 16, 8)
    places = sorted({3 * p - 1 for s in starts for p in (s, s + 16)} - {-1, 119})
    wrong, official, own = (
        np.abs(np.diff(y, axis=1)).mean((0, 2)) for y in (joined - whole, mean - whole, whole)
    )
    assert np.abs(joined - whole).max() > 0
    assert wrong[places].mean() < own.mean() / 6 and wrong[places].mean() < official[places].mean()
    assert np.delete(wrong, places).mean() < own.mean() / 6


def test_weights_of_tiles_add_up_to_one_and_vanish_where_another_tile_takes_over():
    starts = inference.tile_starts(40, 16, 8)
    assert starts == [0, 8, 16, 24]
    first, second, *_, last = inference.tile_weights(starts, 16, 2, "taper")
    np.testing.assert_allclose(first[16:] + second[:16], 1, atol=1e-6)
    assert first[0] == last[-1] == 1 and max(first[-1], second[0], second[-1], last[0]) < 0.05
    # The last tile ends with the image, and covers more of the one before it.
    one, other = inference.tile_weights([0, 4], 16, 1, "taper")
    assert np.all(one[4:] + other[:12] == pytest.approx(1)) and np.all(one[:4] == 1)
    assert all(np.all(w == 1) for w in inference.tile_weights(starts, 16, 2, "mean"))


def test_tiles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="tile 20 must be a multiple of the window 8"):
        inference.tiled(upscaling, tiny.image(32, 32, 3), tile=20)
    with pytest.raises(ValueError, match="tile_blend 'none'; known: taper, mean"):
        inference.tiled(upscaling, tiny.image(32, 32, 3), tile=16, overlap=8, blend="none")
    with pytest.raises(ValueError, match="tile_overlap 32 must be"):
        inference.tiled(upscaling, tiny.image(64, 64, 3), tile=32, overlap=32)


def test_padding_goes_to_the_next_multiple_even_from_a_multiple():
    seen = []

    def apply(x):
        seen.append(x.shape[1:3])
        return jnp.repeat(jnp.repeat(x, 4, 1), 4, 2)

    x = jnp.asarray(tiny.image(1, 16, 13, 3))
    y = inference.padded(apply)(x)
    assert seen == [(24, 16)] and y.shape == (1, 64, 52, 3)
    two = inference.two_stage(lambda x: x + 2, lambda x: x * 3)(x)
    np.testing.assert_array_equal(two, np.full_like(x, 3))  # clamped in between


def test_equal_images_have_infinite_psnr_and_so_has_a_mean_with_them():
    a = (tiny.image(24, 24, 3) * 255).astype(np.uint8)
    b = a.copy()
    b[3, 4] ^= 1
    assert metrics.psnr(a, a) == np.inf and metrics.ssim(a, a) == 1.0
    assert metrics.mean_psnr([metrics.psnr(a, a), metrics.psnr(a, b)]) == np.inf
    expected = 20 * np.log10(255 / np.sqrt(3 / a.size))
    np.testing.assert_allclose(metrics.psnr(a, b), expected, rtol=1e-12)
    assert metrics.psnr(a, b, crop=5) == np.inf
    assert metrics.gain(np.inf, np.inf) == 0 and metrics.gain(np.inf, 30.0) == np.inf
    np.testing.assert_allclose(metrics.luma(np.array([255, 255, 255])), 235)


def test_only_the_restored_image_is_charged_for_its_blocks():
    smooth = np.broadcast_to(np.linspace(50, 200, 48), (48, 48))
    blocks = smooth.copy()
    blocks[:, 16:] += 3
    assert metrics.psnr_b(blocks, smooth) < metrics.psnr(blocks, smooth) - 1e-3
    np.testing.assert_allclose(metrics.psnr_b(smooth, blocks), metrics.psnr(smooth, blocks))


def test_crops_and_shapes_that_leave_nothing_are_refused():
    a = np.zeros((20, 20, 3))
    for call, message in (
        (lambda: metrics.psnr(a, a, 10), "crop_border 10 leaves nothing"),
        (lambda: metrics.psnr(a, a[:10]), "one shape"),
        (lambda: metrics.ssim(a, a, 5), "11x11"),
        (lambda: metrics.psnr(a[..., 0], a[..., 0], y_channel=True), "RGB"),
        (lambda: inference.augment(a, 8), "0 to 7"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_auxiliary_losses_are_those_of_the_difference():
    a, b = (jnp.asarray(tiny.image(1, 16, 16, 3, seed=s)) for s in (0, 1))
    small = [losses.downsample_bicubic(x) for x in (a, b)]
    np.testing.assert_allclose(
        losses.auxiliary_loss(a, b), jnp.abs(small[0] - small[1]).mean(), rtol=1e-5
    )
    high = [x - losses.gaussian_blur(x) for x in (a, b)]
    np.testing.assert_allclose(
        losses.high_frequency_loss(a, b), jnp.abs(high[0] - high[1]).mean(), rtol=1e-5
    )
    flat = jnp.ones((1, 12, 12, 1))
    np.testing.assert_allclose(losses.gaussian_blur(flat), flat, atol=1e-6)
    np.testing.assert_allclose(losses.downsample_bicubic(flat), flat[:, ::4, ::4], atol=1e-6)
