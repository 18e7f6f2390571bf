"""StyleGAN2: resampling is what its definition says, both namings give one picture."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.interop import catalog, checkpoint
from jaxmodels.video import (
    stylegan2,
    stylegan2_discriminator,
    stylegan2_losses,
    stylegan2_names,
)
from jaxmodels.video import upfirdn as ufd
from jaxmodels.video.stylegan2_layers import _by_parity, _dilated, modulated_conv2d
from tests.golden_case import COMMITTED

CASE = COMMITTED / "video2stylegan" / "stylegan2_g_ada_s32"
ARGUMENTS = dict(
    z_dim=32, w_dim=32, img_resolution=32, mapping_layers=4, channel_base=1024, channel_max=40
)


@functools.cache
def toy():
    """The committed generator and its variables."""
    return jaxmodels.load("video.stylegan2", CASE / "weights.safetensors", **ARGUMENTS)


@functools.cache
def tiny():
    """A generator of 16 pixels with few channels."""
    return jaxmodels.load(
        "video.stylegan2", z_dim=8, w_dim=8, img_resolution=16, mapping_layers=2,
        channel_base=64, channel_max=8,
    )  # fmt: skip


def test_both_namings_give_the_same_picture_and_export_again():
    module, variables = toy()
    state = checkpoint.read(CASE / "weights.safetensors").tensors
    theirs = stylegan2_names.to_rosinality(
        catalog.export("video.stylegan2", module, variables), module
    )
    assert theirs["convs.0.conv.blur.kernel"].sum() == pytest.approx(4)
    assert theirs["noises.noise_6"].shape == (1, 1, 32, 32)
    _, again = jaxmodels.load("video.stylegan2", theirs, **ARGUMENTS)
    z = jax.random.normal(jax.random.key(0), (1, 32))
    draw = jax.jit(module.apply)
    assert jnp.abs(draw(variables, z) - draw(again, z)).max() <= 1e-5
    # What a pSp file holds: a decoder below its prefix, one mean latent for every layer.
    wrapped = {f"decoder.{k}": v for k, v in theirs.items() if k != "latent_avg"}
    wrapped |= {"latent_avg": np.tile(theirs["latent_avg"], (8, 1)), "encoder.x": np.zeros(2)}
    _, decoder = jaxmodels.load("video.stylegan2", wrapped, **ARGUMENTS)
    for a, b in zip(jax.tree.leaves(decoder["params"]), jax.tree.leaves(variables["params"])):
        np.testing.assert_array_equal(a, b)
    exported = catalog.export("video.stylegan2", module, variables, like=state)
    assert set(exported) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(exported[key], value, err_msg=key)


def test_a_file_without_mean_latent_gets_that_of_mapped_samples():
    module, variables = toy()
    state = catalog.export("video.stylegan2", module, variables)
    theirs = stylegan2_names.to_rosinality(state, module)
    del theirs["latent_avg"]
    _, loaded = jaxmodels.load("video.stylegan2", theirs, **ARGUMENTS)
    z = jax.random.normal(jax.random.key(1), (2000, 32))
    mean = module.apply(variables, z, method="to_w").mean(0)
    assert jnp.abs(loaded["buffers"]["mapping"]["w_avg"] - mean).max() < 0.15


def test_discriminator_names_go_there_and_back():
    arguments = dict(img_resolution=16, channel_base=64, channel_max=8)
    name = "video.stylegan2:Discriminator"
    module, variables = jaxmodels.load(name, **arguments)
    state = catalog.export(name, module, variables)
    theirs = stylegan2_names.to_rosinality(state, module)
    assert theirs["convs.1.skip.1.weight"].shape == (8, 4, 1, 1)
    _, again = jaxmodels.load(name, theirs, **arguments)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(variables)):
        np.testing.assert_array_equal(a, b)


def test_fused_and_scaled_forms_of_modulation_agree():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 6, 8, 5))
    kernel = jax.random.normal(keys[1], (3, 3, 5, 7))
    styles = jax.random.normal(keys[2], (2, 5))

    @jax.jit
    def both(x, kernel, styles):
        return [
            [
                modulated_conv2d(x, kernel, styles, fused=fused, **resample)
                for fused in (True, False)
            ]
            for resample in ({}, {"up": 2}, {"down": 2})
        ]

    for a, b in both(x, kernel, styles):
        assert jnp.abs(a - b).max() <= 1e-5 * max(1, float(jnp.abs(b).max()))


@pytest.mark.parametrize("up, down", [(3, 1), (4, 2), (1, 3), (2, 2)])
def test_modulated_convolution_at_any_rate_equals_its_definition(up, down):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((1, 6, 6, 1)), rng.standard_normal((3, 3, 1, 1))
    f = ufd.setup_filter([1, 2, 4, 3])
    x, kernel, f = (a.astype(np.float32) for a in (x, kernel, f))
    got = modulated_conv2d(x, kernel, np.ones((1, 1)), f=f, up=up, down=down, demodulate=False)
    # Zero insertion, then kernel (a true convolution on the way up) and filter.
    around = (np.asarray([(4 + up - 1) // 2, (4 - up) // 2]) if up > 1 else np.zeros(2, int)) + 1
    around += np.asarray([(4 - down + 1) // 2, (4 - down) // 2]) if down > 1 else 0
    around = tuple(int(n) for n in around) * 2
    taps = kernel[..., 0, 0] if up > 1 else kernel[::-1, ::-1, 0, 0]
    if up > 1:
        y = ufd.upfirdn2d(x, taps, up=up, padding=around, gain=up * up)
        y = ufd.upfirdn2d(y, f)
        y = y if down == 1 else ufd.upfirdn2d(y, f, down=down)
    else:
        y = ufd.upfirdn2d(ufd.upfirdn2d(x, f, padding=around), taps, down=down)
    np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-4)


def test_the_running_image_may_have_a_filter_of_its_own():
    module, variables = tiny()
    other = module.clone(resample_filter=(1, 2, 1), image_filter=(1, 3, 3, 1))
    state = stylegan2_names.to_rosinality(
        catalog.export("video.stylegan2", other, variables), other
    )
    assert state["to_rgbs.0.upsample.kernel"].shape == (4, 4)
    assert state["convs.0.conv.blur.kernel"].shape == (3, 3)
    z = jnp.ones((1, 8))
    a, b = (jax.jit(m.apply)(variables, z) for m in (other, other.clone(image_filter=(1, 2, 1))))
    assert jnp.abs(a - b).max() > 1e-3


LABELED = dict(img_resolution=8, channel_base=64, channel_max=8, mapping_layers=2, c_dim=3)


@pytest.mark.parametrize("architecture", stylegan2.ARCHITECTURES)
def test_labels_and_architectures_go_to_files_and_back(architecture):
    options = {**LABELED, "architecture": architecture, "embed_features": 5}
    z, c = jnp.ones((2, 8)), jnp.eye(3)[:2]
    for name, arguments in (
        ("video.stylegan2", {**options, "z_dim": 8, "w_dim": 6}),
        ("video.stylegan2:Discriminator", {**options, "cmap_dim": 4}),
    ):
        module, variables = jaxmodels.load(name, **arguments)
        state = catalog.export(name, module, variables)
        _, again = jaxmodels.load(name, state, **arguments)
        given = z if hasattr(module, "z_dim") else jnp.ones((2, 8, 8, 3))
        run = jax.jit(module.apply)
        out = run(variables, given, c=c)
        np.testing.assert_array_equal(out, run(again, given, c=c))
        assert jnp.abs(out[0] - out[1]).max() > 1e-3
        assert state["mapping.embed.weight"].shape == (5, 3)
        skips = [k for k in state if k.endswith("skip.weight")]
        assert len(skips) == (architecture == "resnet")
        images = [k for k in state if k.endswith(("torgb.bias", "fromrgb.bias"))]
        assert len(images) == 1 + (architecture == "skip")
        with pytest.raises(ValueError, match=r"labels c must be \[batch, 3\], got none"):
            run(variables, given)
        with pytest.raises(ValueError, match="neither labels nor other architectures"):
            stylegan2_names.to_rosinality(state, module)
    with pytest.raises(ValueError, match="architecture is one of orig, skip, resnet"):
        stylegan2.Generator(architecture="residual")


def test_demodulation_keeps_unit_variance_whatever_the_style_scale():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (8, 16, 16, 32))
    kernel = jax.random.normal(keys[1], (3, 3, 32, 16))
    styles = jnp.exp(0.5 * jax.random.normal(keys[2], (8, 32)))
    run = jax.jit(modulated_conv2d)
    y = run(x, kernel, styles)
    assert 0.9 < float(y[:, 1:-1, 1:-1].std()) < 1.1
    assert jnp.abs(run(x, kernel, 10 * styles) - y).max() < 1e-4


def test_half_precision_modulation_does_not_overflow():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (1, 4, 4, 8)).astype(jnp.float16)
    kernel = 3e4 * jax.random.normal(keys[1], (3, 3, 8, 8))
    styles = 100 * jax.random.normal(keys[2], (1, 8))
    run = jax.jit(modulated_conv2d)
    y, wide = run(x, kernel, styles), run(x.astype(jnp.float32), kernel, styles)
    assert y.dtype == jnp.float16 and jnp.abs(y - wide).max() < 0.02


def test_transposed_convolution_by_parity_equals_the_dilated_one():
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    a, b = jax.jit(lambda x, k: (_by_parity(x, k), _dilated(x, k)))(x, kernel)
    assert a.shape == b.shape == (2, 11, 13, 4)
    np.testing.assert_allclose(a, b, atol=1e-5)


def direct(x, f, up, down, padding):
    """upfirdn2d as nested loops over one image [H, W]: zeros, padding, true convolution."""
    x0, x1, y0, y1 = padding
    wide = np.zeros((x.shape[0] * up, x.shape[1] * up))
    wide[::up, ::up] = x
    big = np.pad(wide, ((max(y0, 0), max(y1, 0)), (max(x0, 0), max(x1, 0))))
    big = big[max(-y0, 0) : big.shape[0] - max(-y1, 0), max(-x0, 0) : big.shape[1] - max(-x1, 0)]
    fh, fw = f.shape
    height, width = big.shape[0] - fh + 1, big.shape[1] - fw + 1
    y = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            for k in range(fh):
                for m in range(fw):
                    y[i, j] += f[fh - 1 - k, fw - 1 - m] * big[i + k, j + m]
    return y[::down, ::down]


@pytest.mark.parametrize(
    "up, down, padding", [(3, 2, (3, 0, -1, 2)), (1, 1, (-1, -2, 0, -1)), (2, 3, (2, 1, 0, 4))]
)
def test_upfirdn_equals_its_definition_with_asymmetric_filters(up, down, padding):
    rng = np.random.default_rng(0)
    x, f = rng.normal(size=(7, 8)), rng.normal(size=(3, 2))
    with jax.enable_x64(True):
        y = ufd.upfirdn2d(jnp.asarray(x)[None, ..., None], f, up=up, down=down, padding=padding)
        np.testing.assert_allclose(y[0, ..., 0], direct(x, f, up, down, padding), atol=1e-12)


def test_upfirdn_has_a_correct_gradient_of_a_gradient():
    f = np.random.default_rng(0).normal(size=(3, 2))
    with jax.enable_x64(True):

        def inner(x):
            y = ufd.upfirdn2d(x, f, up=3, down=2, padding=(3, 0, -1, 2))
            return (y**3).sum()

        def outer(x):
            return jnp.square(jax.grad(inner)(x)).sum()

        x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 4, 1)))
        grad = jax.jit(jax.grad(outer))(x)
        step = 1e-6
        direction = jnp.asarray(np.random.default_rng(2).normal(size=x.shape))
        numeric = (outer(x + step * direction) - outer(x - step * direction)) / (2 * step)
        assert float((grad * direction).sum()) == pytest.approx(float(numeric), rel=1e-6)


def test_upfirdn_refuses_what_leaves_nothing():
    with pytest.raises(ValueError, match="leave nothing"):
        ufd.upfirdn2d(jnp.zeros((1, 2, 2, 1)), np.ones((4, 4)))
    with pytest.raises(ValueError, match="padding is one number"):
        ufd.upfirdn2d(jnp.zeros((1, 2, 2, 1)), np.ones((1, 1)), padding=(1, 2, 3))


def test_a_code_changes_nothing_below_the_resolution_it_serves():
    module, variables = toy()
    run = jax.jit(functools.partial(module.apply, method="intermediates"))
    ws = jax.random.normal(jax.random.key(0), (1, 8, 32))
    before = run(variables, ws)
    for i in range(8):
        after = run(variables, ws.at[:, i].add(1.0))
        changed = {k for k in before if not np.array_equal(before[k], after[k])}
        # Layer i is first read at 4 * 2^ceil((i - 1) / 2), or by the to-RGB one size below it.
        first = 4 if i < 2 else 4 * 2 ** (i // 2)
        own_rgb = 4 if i < 2 else 4 * 2 ** ((i - 1) // 2)
        for key in before:
            size = 32 if key == "image" else int(key.split("_b")[1])
            if size < (own_rgb if key.startswith("rgb") else first):
                assert key not in changed, (i, key)
        assert "image" in changed
        if i == 7:
            assert changed == {"rgb_b32", "image"}


def test_conv_clamp_bounds_every_layer():
    module, variables = toy()
    clamped = module.clone(conv_clamp=0.5)
    maps = jax.jit(functools.partial(clamped.apply, method="intermediates"))(
        variables, 3 * jax.random.normal(jax.random.key(0), (1, 8, 32))
    )
    assert all(jnp.abs(v).max() <= 0.5 for k, v in maps.items() if k.startswith("x_b"))
    assert jnp.abs(maps["rgb_b4"]).max() <= 0.5


def test_conv_clamp_leaves_a_critics_shortcut_alone():
    block, x = stylegan2.DiscriminatorBlock(4, 5, conv_clamp=1e-6), jnp.ones((1, 8, 8, 4))
    (y, _), variables = block.init_with_output(jax.random.key(0), x, None)
    skip = ufd.upfirdn2d(x, ufd.setup_filter(ufd.BINOMIAL), down=2, padding=1)
    skip = skip @ variables["params"]["skip"]["kernel"][0, 0] / 2 * np.sqrt(0.5)
    np.testing.assert_allclose(y, skip, atol=1e-5)


def test_random_noise_needs_a_key_and_given_maps_replace_the_buffers():
    module, variables = tiny()
    variables = jax.tree.map(jnp.asarray, variables)
    params = jax.tree_util.tree_map_with_path(
        lambda p, x: jnp.ones_like(x) if p[-1].key == "noise_strength" else x, variables["params"]
    )
    variables = {**variables, "params": params}
    ws = jnp.ones((1, 6, 8))

    own = variables["buffers"]["synthesis"]
    kept = [own["b4"]["conv1"], own["b8"]["conv0"], own["b8"]["conv1"]]
    kept += [own["b16"]["conv0"], own["b16"]["conv1"]]
    maps = tuple(n["noise_const"][None, ..., None] for n in kept)
    assert [n.shape[1] for n in maps] == [4, 8, 8, 16, 16]

    @jax.jit
    def draw(variables, ws, maps):
        def one(mode, noises=None, seed=0):
            rngs = {"noise": jax.random.key(seed)}
            return module.apply(variables, ws, mode, noises, method="synthesize", rngs=rngs)

        return one("const"), one("none", maps), one("random"), one("random", seed=1)

    const, given, first, second = draw(variables, ws, maps)
    np.testing.assert_allclose(given, const, atol=1e-5)
    assert jnp.abs(first - second).max() > 1e-3


def test_lazy_correction_mixing_and_path_mean():
    assert stylegan2_losses.lazy(4) == 0.8 and stylegan2_losses.lazy(0) == 1
    cuts = [int(stylegan2_losses.mixing_cutoff(jax.random.key(i), 4, 8, 0.9)) for i in range(60)]
    assert set(cuts) <= set(range(1, 9)) and 1 < cuts.count(8) < 20
    penalty, mean = stylegan2_losses.path_length_penalty(jnp.array([1.0, 3.0]), jnp.float32(1))
    assert float(mean) == pytest.approx(1.01) and penalty.shape == (2,)


@pytest.mark.parametrize("size", [0, 4, 24, 33])
def test_sizes_that_no_generator_has_are_refused(size):
    with pytest.raises(ValueError, match="power of two of at least 8"):
        stylegan2.Generator(img_resolution=size)


def test_wrong_codes_groups_and_files_are_named(tmp_path):
    module, variables = tiny()
    with pytest.raises(ValueError, match=r"must be \[batch, 6, w_dim\].*\(6 latents\)"):
        module.apply(variables, jnp.zeros((1, 8, 8)), method="synthesize")
    with pytest.raises(ValueError, match="noise_mode is one of const, random, none"):
        module.apply(variables, jnp.zeros((1, 6, 8)), "fresh", method="synthesize")
    with pytest.raises(ValueError, match="batch 6 does not divide into groups of 4"):
        stylegan2_discriminator.minibatch_deviation(jnp.zeros((6, 4, 4, 2)), 4)
    small = dict(z_dim=8, w_dim=8, img_resolution=16, mapping_layers=2, channel_max=8)
    with pytest.raises(ValueError, match=r"names of neither StyleGAN2 code.*IR-SE.*mapping\.fc0"):
        jaxmodels.load("video.stylegan2", {"body.0.x": np.zeros(1)}, **small)
    (tmp_path / "ffhq.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match="state_dict"):
        jaxmodels.load("video.stylegan2", tmp_path / "ffhq.pkl")
    state = catalog.export("video.stylegan2", module, variables)
    del state["synthesis.b8.conv0.weight"]
    with pytest.raises(ValueError, match=r"missing +synthesis\.b8\.conv0\.weight"):
        jaxmodels.load("video.stylegan2", state, **{**small, "channel_base": 64})
