"""Sliding windows: what must not change, streaming, and how often anything is compiled."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.biomedical import sliding_window
from jaxmodels.biomedical.unet import PlainConvUNet
from tests.biomedical.networks import drawn
from train import segmentation_inference as inference
from train.data.medical_files import DataError

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("size", [(21, 33), (5, 40), (7, 6), (16, 16)])
def test_a_constant_network_gives_the_constant_everywhere(size):
    image = RNG.normal(size=(*size, 1)).astype(np.float32)

    def predict(tiles):
        return np.full((*tiles.shape[:-1], 2), (3.0, -1.0), np.float32)

    logits, weights = sliding_window.sliding_window(
        predict, image, (16, 8), classes=2, batch=3, step=0.3
    )
    np.testing.assert_allclose(logits, np.broadcast_to((3.0, -1.0), logits.shape), atol=1e-5)
    assert logits.shape == (*size, 2) and (weights > 0).all()


@pytest.mark.parametrize("size", [(11, 20, 9), (3, 4, 30)])
def test_a_pointwise_network_equals_its_direct_application(size):
    image = RNG.normal(size=(*size, 2)).astype(np.float32)
    matrix = RNG.normal(size=(2, 3)).astype(np.float32)
    logits, _ = sliding_window.sliding_window(
        lambda tiles: tiles @ matrix, image, (8, 8, 4), classes=3, batch=2
    )
    np.testing.assert_allclose(logits, image @ matrix, atol=1e-5)


def test_a_mirrored_image_gives_the_mirrored_output_under_test_time_mirroring():
    kernel = jnp.asarray(RNG.normal(size=(3, 3, 1, 2)), jnp.float32)

    def network(tiles):
        return jax.lax.conv_general_dilated(
            tiles, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    run = jax.jit(sliding_window.mirrored(network, (0, 1)))
    tiles = jnp.asarray(RNG.normal(size=(2, 8, 10, 1)), jnp.float32)
    for axes in ((1,), (2,), (1, 2)):
        a, b = run(jnp.flip(tiles, axes)), jnp.flip(run(tiles), axes)
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_one_compilation_serves_cases_of_all_sizes():
    module = PlainConvUNet(
        features_per_stage=(2, 3),
        kernel_sizes=((3, 3),) * 2,
        strides=((1, 1), (2, 2)),
        n_conv_per_stage=(1, 1),
        n_conv_per_stage_decoder=(1,),
    )
    variables = drawn(module)
    call = jax.jit(chex.assert_max_traces(lambda v, x: module.apply(v, x), n=1))
    for size in ((9, 30), (16, 16), (40, 17)):
        image = RNG.normal(size=(*size, 1)).astype(np.float32)
        logits, _ = sliding_window.sliding_window(
            lambda tiles: call(variables, tiles), image, (16, 16), classes=2, batch=2
        )
        assert np.isfinite(logits).all()


def test_a_step_outside_its_range_and_a_tile_of_other_axes_are_refused():
    for step in (0, 1.5, -0.1):
        with pytest.raises(ValueError, match=r"not in \(0, 1\]"):
            sliding_window.window_starts((10,), (4,), step)
    with pytest.raises(ValueError, match="other axes"):
        sliding_window.sliding_window(None, np.zeros((4, 4, 1)), (2, 2, 2), classes=2)


@pytest.fixture(scope="module")
def network():
    module = PlainConvUNet(
        num_classes=3,
        features_per_stage=(2, 3),
        kernel_sizes=((3, 3, 3),) * 2,
        strides=((1, 1, 1), (2, 2, 2)),
        n_conv_per_stage=(1, 1),
        n_conv_per_stage_decoder=(1,),
    )
    return module, drawn(module)


@pytest.mark.parametrize("ending", [".npy", ".nii"])
def test_streaming_from_disk_writes_what_memory_would_hold(network, tmp_path, ending):
    module, variables = network
    raw = (RNG.normal(size=(19, 20, 21)) * 40 + 100).astype(np.float32)
    path = tmp_path / f"volume{ending}"
    if ending == ".npy":
        np.save(path, raw)
    else:
        nibabel = pytest.importorskip("nibabel")
        nibabel.save(nibabel.Nifti1Image(raw.transpose(2, 1, 0), np.eye(4)), path)
    windows = inference.Windows((8, 8, 8), 3, batch=2, mirror_axes=(0, 2))
    volume = inference.LazyVolume(path).standardized(planes=3)
    output = tmp_path / f"labels{ending}"
    count = inference.stream_labels(module, [variables], volume, output, windows)
    image = ((raw - raw.mean()) / raw.std())[..., None].astype(np.float32)
    logits = inference.predict_logits(module, variables, image, windows)
    if ending == ".npy":
        found = np.load(output)
    else:
        found = np.asarray(nibabel.load(output).dataobj).transpose(2, 1, 0)
    assert count == np.prod([len(s) for s in sliding_window.window_starts(raw.shape, (8, 8, 8))])
    assert (found == logits.argmax(-1)).mean() > 0.999
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"labels{ending}", f"volume{ending}"]


@pytest.mark.parametrize("order", ["C", "F"])
def test_blocks_of_a_file_are_those_of_the_array(order, tmp_path):
    array = np.asarray(RNG.normal(size=(4, 5, 6)), np.float32)
    path = tmp_path / "blocks"
    path.write_bytes(b"head" + array.tobytes(order))
    blocks = inference.FileArray(path, array.shape, np.float32, 4, order)
    whole = slice(None)
    for where in (
        (slice(1, 3),),
        (whole, slice(2, 4)),
        (slice(0, 9), whole, slice(1, 2)),
        (whole,),
    ):
        np.testing.assert_array_equal(blocks[where], array[where])
        if order == "C":
            array[where] += 1
            blocks[where] = array[where]
            np.testing.assert_array_equal(blocks[whole, whole, whole], array)


def test_streaming_refuses_compressed_files(tmp_path):
    with pytest.raises(DataError, match=r"uncompressed \.nii; decompress"):
        inference.LazyVolume(tmp_path / "x.nii.gz")


def test_neighbor_slices_become_channels_and_the_ends_repeat():
    image = np.arange(5, dtype=np.float32)[:, None, None, None] * np.ones((1, 4, 4, 1), np.float32)
    seen = {}

    def predict(tiles):
        for tile in tiles:
            seen[int(tile[0, 0, 0, 2])] = tile[0, 0, 0].tolist()
        return tiles[..., 2:3]

    logits, _ = sliding_window.sliding_window(
        predict, image, (1, 4, 4), classes=1, context=2, batch=1
    )
    np.testing.assert_allclose(logits, image, atol=1e-6)
    assert seen[0] == [0, 0, 0, 1, 2] and seen[4] == [2, 3, 4, 4, 4] and seen[2] == [0, 1, 2, 3, 4]
