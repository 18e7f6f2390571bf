"""U-Nets: checkpoint names both ways, shapes that cannot be meant, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.biomedical import losses, unet
from jaxmodels.interop.catalog import export
from tests.biomedical.networks import drawn
from tests.interop.torch_files import zip_bytes

FLAT = dict(
    input_channels=2,
    num_classes=3,
    features_per_stage=(3, 4, 5),
    kernel_sizes=((3, 3),) * 3,
    strides=((1, 1), (2, 2), (2, 2)),
    n_conv_per_stage=(2, 1, 2),
    n_conv_per_stage_decoder=(1, 2),
)
# A coarse first axis: kernels of 1 and strides of 1 along it.
DEEP = dict(
    input_channels=1,
    num_classes=2,
    features_per_stage=(2, 3, 4),
    kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    n_conv_per_stage=(1, 2, 2),
    n_conv_per_stage_decoder=(1, 1),
)
NETWORKS = {"PlainConvUNet": FLAT, "ResidualEncoderUNet": DEEP}


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request):
    name = f"biomedical.unet:{request.param}"
    module = getattr(unet, request.param)(**NETWORKS[request.param])
    variables = drawn(module)
    return name, module, variables, export(name, module, variables)


def test_a_checkpoint_with_all_its_copies_loads_and_exports_byte_for_byte(exported, tmp_path):
    name, module, _, state = exported
    assert any(key.startswith("decoder.encoder.") for key in state)
    assert any(".all_modules.1." in key for key in state)
    weight = state["decoder.transpconvs.0.weight"]
    assert weight.shape[:2] == module.features_per_stage[:0:-1][:2]  # [I, O, ...]
    path = tmp_path / "checkpoint_final.pth"
    wrapped = {f"module._orig_mod.{key}": np.array(value) for key, value in state.items()}
    content = {
        "network_weights": wrapped,
        "current_epoch": 3,
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
        "init_args": {"configuration": "3d_fullres", "fold": 0},
    }
    path.write_bytes(zip_bytes(content))
    again, loaded = jaxmodels.load(name, path, **NETWORKS[name.split(":")[1]])
    assert again == module
    for key, value in export(name, module, loaded).items():
        np.testing.assert_array_equal(value, state[key])
    single = {k: v for k, v in state.items() if not k.startswith("decoder.encoder.")}
    _, alone = jaxmodels.load(name, single, **NETWORKS[name.split(":")[1]])
    jax.tree.map(np.testing.assert_array_equal, alone, loaded)


def test_copies_that_disagree_are_named(exported):
    name, _, _, state = exported
    copy = next(k for k in state if k.startswith("decoder.encoder.") and ".conv.weight" in k)
    changed = {**state, copy: state[copy] + 1}
    with pytest.raises(ValueError, match=r"decoder\.encoder\..* differs from encoder\."):
        jaxmodels.load(name, changed, **NETWORKS[name.split(":")[1]])


def test_weights_of_another_network_are_refused_with_the_reason(exported):
    name, _, _, state = exported
    lacking = {k: v for k, v in state.items() if not k.startswith("decoder.seg_layers.0")}
    with pytest.raises(ValueError, match=r"lacks decoder\.seg_layers\.0\.weight"):
        jaxmodels.load(name, lacking, **NETWORKS[name.split(":")[1]])
    other = DEEP if name.endswith("PlainConvUNet") else FLAT
    with pytest.raises(ValueError, match=r"checkpoint is \dD|checkpoint is \d-D \(encoder"):
        jaxmodels.load(name, state, **other)
    wrong = "ResidualEncoderUNet" if name.endswith("PlainConvUNet") else "PlainConvUNet"
    with pytest.raises(ValueError, match="encoder"):
        jaxmodels.load(f"biomedical.unet:{wrong}", state, **NETWORKS[name.split(":")[1]])


def test_outputs_have_the_resolution_of_their_stage(exported):
    _, module, _, _ = exported
    deep = module.clone(deep_supervision=True, image_classes=2)
    size = tuple(2 * d for d in module.divisor)
    image = jax.ShapeDtypeStruct((1, *size, module.input_channels), jnp.float32)
    full = jax.eval_shape(deep.init, jax.random.key(0), image)
    maps = jax.eval_shape(lambda v, x: deep.apply(v, x, method="intermediates"), full, image)
    assert maps["ds0"].shape == (1, *size, module.num_classes)
    assert maps["ds1"].shape[1:-1] == tuple(n // s for n, s in zip(size, module.strides[1]))
    assert maps["image_logits"].shape == (1, 2)


def test_a_residual_block_starts_as_its_skip():
    block = unet.ResidualBlock(2, (3, 3), (1, 1))
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 2))
    y, _ = block.init_with_output(jax.random.key(1), x)
    np.testing.assert_allclose(y, jax.nn.leaky_relu(x, 0.01), atol=1e-6)


def test_sizes_and_lists_that_do_not_fit_are_named():
    module = unet.PlainConvUNet(**FLAT)
    with pytest.raises(ValueError, match=r"next valid patch is \(12, 16\)"):
        module.check_patch((10, 16))
    with pytest.raises(ValueError, match="2-D network got images of 3"):
        module.check_patch((8, 8, 8))
    with pytest.raises(ValueError, match="kernel_sizes has 2 entries for 3 stages"):
        unet.PlainConvUNet(**{**FLAT, "kernel_sizes": ((3, 3),) * 2})


def test_bfloat16_decides_as_float32_on_almost_every_voxel():
    module = unet.PlainConvUNet(**FLAT)
    variables = drawn(module, seed=3)
    # Large blobs: decisions of a trained network are not of one voxel's noise.
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 2))
    x = jnp.repeat(jnp.repeat(x, 8, 1), 8, 2)
    exact = jax.jit(module.apply)(variables, x)
    half = jax.jit(module.clone(dtype=jnp.bfloat16).apply)(variables, x)
    assert half.dtype == jnp.bfloat16
    assert float((exact.argmax(-1) == half.argmax(-1)).mean()) > 0.97


def test_overlap_and_voxel_losses_agree_where_they_should():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 6, 5, 3)), jnp.float32)
    target = jnp.asarray(rng.integers(0, 3, (2, 6, 5)))
    p, y = jax.nn.softmax(logits), jax.nn.one_hot(target, 3)
    tversky = losses.tversky_loss(p, y, alpha=0.5, beta=0.5, smooth=0)
    np.testing.assert_allclose(tversky, losses.soft_dice_loss(p, y, smooth=0), rtol=1e-6)
    everything = losses.topk_cross_entropy(logits, target, k=100)
    np.testing.assert_allclose(everything, losses.cross_entropy(logits, target), rtol=1e-6)
    hardest = losses.topk_cross_entropy(logits, target, k=10)
    values = np.sort(np.asarray(losses.voxel_cross_entropy(logits, target)).reshape(-1))
    np.testing.assert_allclose(hardest, values[-6:].mean(), rtol=1e-6)
    assert losses.focal_cross_entropy(logits, target) < losses.cross_entropy(logits, target)
    # An ignored voxel changes nothing, whatever the network says there.
    ignored = target.at[0, 0, 0].set(3)
    loss = [
        losses.segmentation_loss(logits.at[0, 0, 0].set(v), ignored, ignore_label=3)
        for v in (0.0, 9.0)
    ]
    np.testing.assert_allclose(loss[0], loss[1], rtol=1e-6)
    perfect = 50 * (2 * y - 1)
    assert losses.segmentation_loss(perfect, target) < -0.9999
    assert losses.region_loss(perfect, y) < -0.9999
    # A class that a sample lacks: smooth / (sum p + smooth).
    empty = losses.soft_dice_loss(p[:1], jnp.zeros_like(y[:1]), batch_dice=False)
    sums = np.asarray(p[:1, ..., 1:]).sum((1, 2))
    np.testing.assert_allclose(empty, -(1e-5 / (sums + 1e-5)).mean(), rtol=1e-5)


def test_deep_supervision_weighs_halves_and_leaves_out_the_coarsest():
    np.testing.assert_allclose(losses.deep_supervision_weights(3), [2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(losses.deep_supervision_weights(1), [1])
    target = jnp.arange(8).reshape(1, 8)
    np.testing.assert_array_equal(losses.nearest_downsample(target, (4,)), [[1, 3, 5, 7]])
    np.testing.assert_array_equal(losses.nearest_downsample(target, (3,)), [[1, 4, 6]])
