"""The raster baseline: published sizes, crops, several targets, rendering."""

import jax
import numpy as np
import pytest

from jaxmodels.cost import count_cost
from jaxmodels.driving import raster_convnet, vectornet
from jaxmodels.driving.rasterization import RasterFrame, render
from jaxmodels.interop import catalog


@pytest.mark.parametrize(
    "kernel, resolution, parameters, gigaflops",
    [
        (3, 100, 246_400, 0.66),
        (3, 200, 246_400, 2.64),
        (3, 400, 246_400, 10.56),
        (5, 400, 508_544, 15.81),
        (7, 400, 901_760, 23.67),
    ],
)
def test_parameters_and_flops_are_the_published_ones(kernel, resolution, parameters, gigaflops):
    module = raster_convnet.RasterConvNet(in_ch=30, kernel=kernel)
    cost = count_cost(module, resolution=resolution)
    decoder = cost.layers["fc"]
    assert cost.parameters - (64 + 1) * 60 == parameters
    assert raster_convnet.count_parameters(30, kernel) == parameters
    assert 2 * (cost.macs - decoder) == raster_convnet.count_flops(resolution, 30, kernel)
    counted = raster_convnet.count_flops(resolution, 30, kernel) / 1e9
    assert counted == pytest.approx(gigaflops, abs=0.01)


def test_vectornet_has_less_than_a_third_of_the_parameters_and_a_hundredth_of_the_flops():
    module = catalog.find("driving.vectornet:vectornet_72k").build()
    share = vectornet.count_encoder_parameters(module) / raster_convnet.count_parameters(30)
    assert round(share, 2) == 0.29
    one = vectornet.count_flops(76, 795, 74, global_width=128)
    assert raster_convnet.count_flops(400, 30) / one > 200


def test_crops_average_whole_windows_with_zeros_outside_and_serve_several_targets():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 5, 6, 3)).astype(np.float32)
    cells = np.array([[[[1, 1], [0, 4]], [[5, 0], [7, 2]], [[2, 2], [3, 2]]]] * 2)
    padded = np.pad(features, ((0, 0), (3, 3), (3, 3), (0, 0)))
    for crop, reach in (("c1", 0), ("c3", 1), ("c5", 2)):
        got = raster_convnet.crop_features(features, cells, crop)
        for m in range(3):
            x, y = cells[0, m, -1] + 3
            rows = padded[:, y - reach : y + reach + 1, x - reach : x + reach + 1]
            want = rows.sum((1, 2)) / (2 * reach + 1) ** 2
            np.testing.assert_allclose(got[:, m], want, atol=1e-6)
            alone = raster_convnet.crop_features(features, cells[:, m], crop)
            np.testing.assert_allclose(alone, got[:, m], atol=1e-6)
    got = raster_convnet.crop_features(features, cells, "traj")
    np.testing.assert_allclose(got[:, 2], (features[:, 2, 2] + features[:, 2, 3]) / 2, atol=1e-6)


def test_one_pass_over_the_map_serves_every_target():
    module = raster_convnet.RasterConvNet(in_ch=3, width=4, horizon=2, crop="c3")
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda s: rng.uniform(0.1, 0.4, s.shape).astype(np.float32), catalog.shapes(module)
    )
    image = rng.integers(0, 2, (1, 24, 24, 3)).astype(np.uint8)
    cells = rng.integers(0, 6, (1, 3, 1, 2))

    @jax.jit
    def both(image, cells):
        return module.apply(variables, image, cells), module.apply(variables, image, cells[:, 1])

    found, alone = both(image, cells)
    assert found.shape == (1, 3, 2, 2)
    np.testing.assert_allclose(found[:, 1], alone, atol=1e-5)


def test_rasters_show_lanes_target_and_others_where_they_are():
    tracks = np.zeros((2, 3, 2))
    tracks[0, :, 0], tracks[1] = [-4.0, -2.0, 0.0], [[0.0, 10.0]] * 3
    tracks += 1000.0
    lanes = [np.array([[960.0, 1000.0], [1040.0, 1000.0]])]
    valid = np.array([[1, 1, 1], [0, 1, 1]], bool)
    frame = RasterFrame(np.array([1000.0, 1000.0]), np.pi / 2, size=50, metres=50.0)
    image = render(tracks, valid, 0, lanes, frame, obs=3).reshape(50, 50, 3, 3)
    np.testing.assert_array_equal(image[..., 0, 0], image[..., 2, 0])
    assert set(np.nonzero(image[..., 0, 0])[0]) == {25}  # y = cy - 0
    rows, columns = np.nonzero(image[:, :, 2, 1])
    assert abs(rows.mean() + 0.5 - 25) <= 0.5 and abs(columns.mean() + 0.5 - 25) <= 0.5
    assert np.ptp(columns) > np.ptp(rows)  # it drives along +x
    assert not image[:, :, 0, 2].any() and image[15, 25, 1, 2] == 1
    # Up is the direction of motion: what lies north of an eastbound vehicle is on the left.
    turned = RasterFrame(np.array([1000.0, 1000.0]), 0.0, size=50, metres=50.0)
    np.testing.assert_allclose(turned.pixels(tracks[1, 2]), [15, 25], atol=1e-9)
    np.testing.assert_array_equal(turned.cells(tracks[0, 0]), [6, 7])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="crop 'c4'; known: traj, c1"):
        raster_convnet.RasterConvNet(crop="c4")
    with pytest.raises(ValueError, match="kernel = 4 must be odd"):
        raster_convnet.RasterConvNet(kernel=4)
    module = raster_convnet.RasterConvNet(in_ch=6, width=4)
    with pytest.raises(ValueError, match=r"5 channels for in_ch = 6"):
        jax.eval_shape(
            module.init,
            jax.random.key(0),
            np.zeros((1, 16, 16, 5), np.float32),
            np.zeros((1, 1, 2), int),
        )
