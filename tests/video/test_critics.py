"""What judges pictures: distances are zero at equality, and train one side only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.interop import catalog
from jaxmodels.video import landmarks, lpips, style_encoders, video_metrics
from jaxmodels.vision import ir_se


def image(seed, size=64, batch=1):
    return jax.random.uniform(jax.random.key(seed), (batch, size, size, 3), minval=-1)


def test_lpips_is_zero_at_equality_symmetric_and_differentiable():
    module, variables = jaxmodels.load("video.lpips", net="alex", width_divisor=32)
    x, y = image(0), image(1)

    @jax.jit
    def compute(variables, x, y):
        def distance(a, b):
            return module.apply(variables, a, b).sum()

        grads = jax.grad(distance)(x, y), jax.grad(distance)(jnp.zeros_like(x), y)
        return distance(x, x), distance(x, y), distance(y, x), grads

    same, one, other, grads = compute(variables, x, y)
    assert float(same) == 0 and float(one) == pytest.approx(float(other), rel=1e-5)
    # A flat image has features that are zero everywhere.
    assert all(jnp.isfinite(g).all() for g in grads) and jnp.abs(grads[0]).max() > 0


def test_lpips_of_the_first_release_does_not_scale_its_images():
    module, variables = jaxmodels.load("video.lpips", net="alex", width_divisor=32)
    first = lpips.LPIPS(net="alex", width_divisor=32, version="0.0")
    x, y = jax.random.uniform(jax.random.key(0), (2, 1, 32, 32, 3), minval=-1)
    scaled = [(v - jnp.asarray(lpips.SHIFT)) / jnp.asarray(lpips.SCALE) for v in (x, y)]
    np.testing.assert_allclose(
        first.apply(variables, *scaled), module.apply(variables, x, y), rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"version is one of 0\.0, 0\.1"):
        lpips.LPIPS(version="1.0")


def test_lpips_takes_the_published_file_with_torchvisions_trunk():
    module, variables = jaxmodels.load("video.lpips:lpips_alex", width_divisor=16)
    state = catalog.export("video.lpips", module, variables)
    assert "lins.4.model.1.weight" in state and "scaling_layer.shift" in state
    trunk = {f"features.{k.split('.', 2)[2]}": v for k, v in state.items() if k.startswith("net.")}
    linear = {k: v for k, v in state.items() if k.startswith("lin") and not k.startswith("lins")}
    assert "features.10.bias" in trunk and len(linear) == 5
    arguments = dict(net="alex", width_divisor=16)
    _, again = jaxmodels.load("video.lpips", {**trunk, **linear}, **arguments)
    for a, b in zip(jax.tree.leaves(again["params"]), jax.tree.leaves(variables["params"])):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="holds the linear maps alone"):
        jaxmodels.load("video.lpips", linear, **arguments)
    with pytest.raises(ValueError, match="holds the trunk alone"):
        jaxmodels.load("video.lpips", trunk, **arguments)


def test_alexnet_sees_what_torchvisions_does():
    module, _ = jaxmodels.load("video.lpips:lpips_alex", width_divisor=16)
    shapes = jax.eval_shape(
        lambda v, x: module.apply(v, x, method="features"),
        jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs()),
        jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),
    )
    assert [s.shape[1] for s in shapes] == [55, 27, 13, 13, 13]


def test_identity_loss_is_zero_for_equal_faces_and_trains_one_side():
    a = jax.random.normal(jax.random.key(0), (3, 8))
    a = a / jnp.linalg.norm(a, axis=1, keepdims=True)
    b = jnp.roll(a, 1, 0)
    assert float(ir_se.identity_loss(a, a)) == pytest.approx(0, abs=1e-6)
    one, other = jax.grad(ir_se.identity_loss, (0, 1))(a, b)
    assert jnp.abs(one).max() > 0 and (other == 0).all()


def test_face_crop_cuts_rows_35_to_223_and_averages():
    x = np.zeros((1, 256, 256, 1), np.float32)
    x[:, 35:223, 32:220] = 1
    crop = ir_se.face_crop(jnp.asarray(x))
    assert crop.shape == (1, 112, 112, 1) and float(crop.min()) == 1
    pooled = ir_se.adaptive_average_pool(jnp.arange(5.0).reshape(1, 5, 1, 1), 3)
    # PyTorch's bins of 5 into 3 along rows: [0, 1], [1, 2, 3], [3, 4].
    np.testing.assert_allclose(pooled[0, :, 0, 0], [0.5, 2, 3.5])


@pytest.mark.parametrize(
    "name, count",
    [
        ("vision.ir_se:ir_se50", 43.80e6),
        ("video.style_encoders:psp_ffhq", 267.1e6),
        ("video.stylegan2:stylegan2_1024", 30.37e6),
        ("video.stylegan2:stylegan2_256", 30.03e6),
        ("video.stylegan2:stylegan2_discriminator_1024", 29.01e6),
        ("video.landmarks:fan_1", 6.25e6),
        ("video.landmarks:fan_4", 23.82e6),
        ("video.video_encoder:video2stylegan_tiny", 3.7e6),
        ("video.video_encoder:video2stylegan_small", 25e6),
        ("video.video_encoder:video2stylegan_base", 93e6),
    ],
)
def test_published_sizes(name, count):
    shapes = catalog.shapes(catalog.find(name).build())["params"]
    found = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert found == pytest.approx(count, rel=0.02)


def test_soft_landmarks_agree_with_the_official_decoding_and_differentiate():
    rows, columns = np.mgrid[:16, :16]
    spot = np.exp(-((columns - 5.2) ** 2 + (rows - 9.8) ** 2) / 4)
    heat = jnp.asarray(spot, jnp.float32)[None, ..., None]
    hard, soft = landmarks.decode_heat_maps(heat), landmarks.soft_landmarks(heat)
    # The maximum at (5, 10), a quarter towards the larger neighbors, counted from 1, minus a half.
    np.testing.assert_allclose(hard, [[[5.75, 10.25]]])
    np.testing.assert_allclose(soft, hard, atol=0.3)
    grad = jax.grad(lambda h: landmarks.soft_landmarks(h).sum())(heat)
    assert jnp.abs(grad).max() > 0
    at_border = jnp.zeros((1, 4, 4, 1)).at[0, 0, 3].set(1.0)
    np.testing.assert_allclose(landmarks.decode_heat_maps(at_border), [[[3.5, 0.5]]])


def test_landmark_loss_weighs_eyes_and_mouth_threefold():
    points = jnp.zeros((1, 68, 2))
    brow, eye = points.at[0, 20, 0].set(64), points.at[0, 40, 0].set(64)
    assert float(landmarks.landmark_loss(brow, points)) == pytest.approx(1 / 68)
    assert float(landmarks.landmark_loss(eye, points)) == pytest.approx(3 / 68)


def test_e4e_turns_on_one_delta_after_the_other():
    stages = [int(style_encoders.progressive_stage(s)) for s in (0, 19999, 20000, 22000, 24001)]
    assert stages == [0, 0, 1, 2, 3]
    w = jnp.arange(6.0).reshape(1, 6, 1)
    np.testing.assert_array_equal(style_encoders.at_stage(w, 2)[0, :, 0], [0, 1, 2, 0, 0, 0])


def test_latent_discriminator_and_wrong_files():
    name = "video.style_encoders:LatentCodesDiscriminator"
    module, variables = jaxmodels.load(name, style_dim=8)
    assert module.apply(variables, jnp.ones((2, 8))).shape == (2, 1)
    assert "mlp.6.weight" in catalog.export(name, module, variables)
    files = {"output_layer.3.weight": np.zeros((2, 2)), "body.0.x": np.zeros(1)}
    with pytest.raises(ValueError, match=r"ArcFace.*styles\.0\.linear\.weight"):
        jaxmodels.load("video.style_encoders", files)
    with pytest.raises(ValueError, match=r"IResNet names.*input_layer"):
        jaxmodels.load("vision.ir_se", {"layer1.0.bn1.weight": np.zeros(1)})


def test_clip_metrics():
    y = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    assert float(video_metrics.flicker(y + 1, y)) < 1e-6
    assert float(video_metrics.flicker(0 * y, y)) > 0.5
    ids = y.reshape(4, -1) / jnp.linalg.norm(y.reshape(4, -1), axis=1, keepdims=True)
    assert float(video_metrics.local_identity(ids, ids)) == pytest.approx(1)
    assert float(video_metrics.global_identity(ids, ids)) == pytest.approx(1)
    jitter = video_metrics.latent_jitter(jnp.arange(3.0)[:, None, None] * jnp.array([[1.0], [2.0]]))
    np.testing.assert_allclose(jitter, [1, 2])
    with pytest.raises(ValueError, match="at least two frames"):
        video_metrics.flicker(y[:1], y[:1])
