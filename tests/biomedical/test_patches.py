"""Patch sampling and augmentation: how often foreground is seen, and what must survive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.biomedical import augmentation, patches

RNG = np.random.default_rng(0)


def volume_with_a_rare_class():
    label = np.zeros((40, 44, 36), np.int16)
    label[10:20, 12:18, 10:20] = 1  # 600 voxels, about 1 %
    label[30:32, 30:33, 30:32] = 2  # 12 voxels
    return label


def test_a_third_of_the_samples_holds_foreground_and_rare_classes_come_as_often():
    label = volume_with_a_rare_class()
    rng = np.random.default_rng(1)
    places = patches.class_locations(label, (1, 2), rng)
    patch, batch = (8, 8, 8), 3
    held, rare, forced = 0, 0, 0
    for draw in range(2000):
        use = patches.is_forced(draw % batch, batch)
        start = patches.patch_start(label.shape, patch, rng, places if use else None)
        part = patches.cut(label, start, patch)
        held += bool(part.any())
        if use:
            forced += 1
            assert part.any()
            rare += bool((part == 2).any())
    assert held / 2000 >= 0.33 and forced == 666
    assert 0.42 < rare / forced < 0.58


def test_the_forced_share_rounds_as_nnunet_does():
    counts = {b: sum(patches.is_forced(j, b) for j in range(b)) for b in (2, 3, 8, 9, 12)}
    assert counts == {2: 1, 3: 1, 8: 3, 9: 3, 12: 4}


@pytest.mark.parametrize("shape", [(30, 7), (5, 5), (16, 16)])
def test_patches_never_read_outside_without_padding(shape):
    image = np.ones((*shape, 2), np.float32)
    rng = np.random.default_rng(2)
    seen = set()
    for _ in range(200):
        start = patches.patch_start(shape, (8, 8), rng)
        part = patches.cut(image, start, (8, 8))
        assert part.shape == (8, 8, 2)
        inside = [max(0, min(n, s + 8) - max(0, s)) for s, n in zip(start, shape)]
        assert part.sum() == 2 * np.prod(inside)
        seen.add(start)
    for axis, n in enumerate(shape):
        starts = {s[axis] for s in seen}
        pad = max(0, 8 - n)
        # As nnU-Net's `-pad // 2`: an odd pad is rounded up on both sides.
        assert min(starts) == -pad // 2 and max(starts) == n + pad // 2 + pad % 2 - 8


def test_centered_patches_are_clipped_only_below():
    places = {1: np.asarray([[0, 29]])}
    start = patches.patch_start((30, 30), (8, 8), np.random.default_rng(0), places)
    assert start == (0, 25)  # the upper side is padded
    assert not patches.class_locations(np.zeros((4, 4)), (1,), np.random.default_rng(0))


def test_a_slice_holds_the_drawn_class():
    label = volume_with_a_rare_class()
    rng = np.random.default_rng(3)
    places = patches.class_locations(label, (1, 2), rng)
    for _ in range(30):
        z, here = patches.slice_locations(places, rng)
        ((k, voxels),) = here.items()
        assert all(label[(z, *v)] == k for v in voxels)
    with pytest.raises(ValueError, match="no class"):
        patches.slice_locations({}, rng)


@pytest.fixture(scope="module")
def augmented():
    patch = (16, 16)
    settings = augmentation.Augmentation.named("full")
    size = augmentation.enlarged_patch(patch)
    image = jnp.asarray(RNG.normal(size=(6, *size, 2)), jnp.float32)
    label = jnp.asarray(RNG.integers(0, 3, (6, *size)))
    run = jax.jit(lambda k, x, y: augmentation.augment(k, x, y, patch, settings, 1))
    return run, image, label, patch


def test_augmentation_is_a_function_of_its_key(augmented):
    run, image, label, patch = augmented
    a, b = run(jax.random.key(0), image, label), run(jax.random.key(0), image, label)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    c = run(jax.random.key(1), image, label)
    assert not np.array_equal(a[0], c[0])
    assert a[0].shape == (6, *patch, 2) and a[1].shape == (6, *patch)


def test_augmentation_invents_no_label_and_keeps_the_prior_unchanged_in_value(augmented):
    run, image, label, _ = augmented
    for seed in range(3):
        x, y = run(jax.random.key(seed), image, label)
        assert set(np.unique(y)) <= {-1, 0, 1, 2} and np.isfinite(x).all()


def test_without_any_step_the_center_is_cut():
    patch = (8, 8, 8)
    off = augmentation.Augmentation(*(0.0,) * 10)
    x = jnp.asarray(RNG.normal(size=(2, 12, 10, 8, 1)), jnp.float32)
    y = jnp.zeros((2, 12, 10, 8), jnp.int32)
    found, _ = augmentation.augment(jax.random.key(0), x, y, patch, off)
    np.testing.assert_array_equal(found, x[:, 2:10, 1:9])


def test_rotation_ranges_and_enlarged_patches_follow_the_shape():
    assert augmentation.rotation_range((64, 64)) == pytest.approx(np.pi)
    assert augmentation.rotation_range((32, 64)) == pytest.approx(np.radians(15))
    assert augmentation.rotation_range((64, 64, 64)) == pytest.approx(np.radians(30))
    assert augmentation.rotation_range((16, 32, 64)) == pytest.approx(np.pi)  # whatever the slices
    assert augmentation.dummy_2d((16, 64, 64)) and not augmentation.dummy_2d((32, 64, 64))
    assert augmentation.enlarged_patch((16, 64, 64))[0] == 16
    assert augmentation.enlarged_patch((64, 64)) == (75, 75)
    assert augmentation.enlarged_patch((128, 128, 128)) == (205, 205, 205)
    with pytest.raises(ValueError, match="no augmentation 'strong'"):
        augmentation.Augmentation.named("strong")


def test_spatial_transforms_move_image_and_label_together():
    image = jnp.zeros((33, 33, 1)).at[8:24, 10:20].set(1.0)
    label = (image[..., 0] > 0.5).astype(jnp.int32)
    move = jax.jit(lambda k: augmentation.spatial(k, image, label, (33, 33), 1.0, 1.0))
    for seed in range(3):
        x, y = move(jax.random.key(seed))
        assert ((x[..., 0] > 0.5).astype(int) == y).mean() > 0.97


def test_a_prior_loses_small_components_and_keeps_its_large_ones():
    prior = np.zeros((1, 24, 24, 2), np.float32)
    prior[0, 2:16, 2:16, 0] = 1
    prior[0, 20:22, 20:22, 0] = 1
    prior[0, 20:22, 2:4, 0] = 1
    remove = jax.jit(lambda k: augmentation.remove_random_components(k, prior, 1.0, 1.0))
    corners = []
    for seed in range(8):
        gone = remove(jax.random.key(seed))
        np.testing.assert_array_equal(gone[0, 2:16, 2:16, 0], prior[0, 2:16, 2:16, 0])
        corners.append((float(gone[0, 20:22, 20:22, 0].sum()), float(gone[0, 20:22, 2:4, 0].sum())))
    # One of the small ones, not all.
    assert set(corners) == {(0.0, 4.0), (4.0, 0.0)}
    same = augmentation.random_morphology(jax.random.key(0), jnp.asarray(prior), probability=0.0)
    np.testing.assert_array_equal(same, prior)
    run = jax.jit(lambda k: augmentation.random_morphology(k, jnp.asarray(prior), 1.0, 1.0, 2))
    changed = [np.asarray(run(jax.random.key(s))) for s in range(6)]
    assert any(not np.array_equal(c, prior) for c in changed)
    for c in changed:
        assert set(np.unique(c)) <= {0.0, 1.0} and (c.sum(-1) <= 1).all()


def test_unannotated_voxels_center_no_patch():
    label = np.full((6, 40, 40), 3, np.int16)  # 3 says "ignore"
    label[2, 5:9, 30:34] = 0
    label[2, 6, 31] = 1
    rng = np.random.default_rng(0)
    places = patches.class_locations(label, (1, 2), rng)
    seen = (label != 3).astype(np.int8)
    places[patches.ANNOTATED] = patches.class_locations(seen, (1,), rng)[1]
    assert set(patches.chosen_locations(places, True)) == {1}
    for forced in (False, True):
        own = patches.chosen_locations(places if forced else {**places, 1: places[1][:0]}, forced)
        for _ in range(20):
            start = patches.patch_start(label.shape, (4, 8, 8), rng, own)
            assert (patches.cut(label, start, (4, 8, 8)) != 3).any()
    assert patches.chosen_locations({1: places[1]}, False) is None


def test_intensity_steps_have_the_published_ranges():
    image = jnp.zeros((48, 48, 1))
    noise = jax.jit(lambda k: augmentation._noise(k, image).std())
    spread = np.asarray([noise(jax.random.key(s)) for s in range(40)])
    # The deviation itself is uniform in [0, 0.1].
    assert spread.max() < 0.11 and 0.03 < spread.mean() < 0.07
    ramp = jnp.broadcast_to(jnp.arange(24.0)[:, None, None, None], (24, 16, 16, 2))
    flat = jax.jit(lambda k: augmentation._low_resolution(k, ramp, 1))
    for seed in range(4):
        # Along the axis that keeps its resolution nothing changes.
        np.testing.assert_allclose(flat(jax.random.key(seed)), ramp, atol=1e-4)
    coarse = jax.jit(lambda k: augmentation._low_resolution(k, ramp))
    changed = [np.abs(coarse(jax.random.key(s)) - ramp).max((0, 1, 2)) for s in range(8)]
    assert max(c.max() for c in changed) > 0.1
    # Linear interpolation of a ramp stays within it.
    assert all(float(coarse(jax.random.key(s)).max()) <= 23 for s in range(4))
    blur = jax.jit(lambda k: augmentation._blur(k, ramp))
    inner = np.asarray([blur(jax.random.key(s))[4:-4] for s in range(4)])
    np.testing.assert_allclose(inner, np.broadcast_to(ramp[4:-4], inner.shape), atol=1e-4)


def test_zooms_are_uniform_and_what_lies_beyond_the_border_is_no_label():
    image = jnp.broadcast_to(jnp.arange(16.0)[:, None, None], (16, 16, 1))
    label = jnp.ones((16, 16), jnp.int32)
    zoom = jax.jit(jax.vmap(lambda k: augmentation.spatial(k, image, label, (8, 8), 0.0, 1.0)))
    x, y = zoom(jax.random.split(jax.random.key(0), 600))
    factors = np.asarray(x[:, -1, 4, 0] - x[:, 0, 4, 0]) / 7
    assert factors.min() > 0.699 and factors.max() < 1.401
    # Not below and above 1 with equal chance.
    assert abs((factors < 1).mean() - 3 / 7) < 0.05 and (y == 1).all()
    whole = jax.jit(lambda k: augmentation.spatial(k, image, label, (16, 16), 0.0, 1.0)[1])
    seen = [set(np.unique(whole(jax.random.key(s)))) for s in range(12)]
    assert {1} in seen and {-1, 1} in seen and all(s <= {-1, 1} for s in seen)
