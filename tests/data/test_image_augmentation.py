"""Augmentations: pure functions of (rng, image, parameters), with timm's ranges and levels."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from train.data import image_augmentation as augmentation


def picture(height=37, width=53, seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def gray(value: int, size=(8, 8)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


class Draws:
    """A generator whose uniform draws are given, to pin an augmentation to known values."""

    def __init__(self, uniform=(), random=(), integers=()):
        self._uniform, self._random, self._integers = list(uniform), list(random), list(integers)

    def uniform(self, low, high, size=None):
        if size is not None:
            return np.array([self.uniform(low, high) for _ in range(size)])
        share = self._uniform.pop(0)
        return low + share * (high - low)

    def random(self):
        return self._random.pop(0)

    def integers(self, n, size=None):
        if size is not None:
            return np.array([self.integers(n) for _ in range(size)])
        return self._integers.pop(0)

    def permutation(self, n):
        return np.arange(n)

    def normal(self, mean, std):
        return mean


IMAGE_FUNCTIONS = {
    "random_resized_crop": lambda rng, image: augmentation.random_resized_crop(rng, image, 16),
    "random_horizontal_flip": augmentation.random_horizontal_flip,
    "color_jitter": augmentation.color_jitter,
    "rand_augment": augmentation.rand_augment,
    "random_erasing": lambda rng, image: augmentation.random_erasing(
        rng, augmentation.normalize(image), probability=1.0
    ),
    "random_crop": lambda rng, image: augmentation.random_crop(rng, np.asarray(image), (9, 7)),
    "random_flips": lambda rng, image: augmentation.random_flips(rng, np.asarray(image)),
    "random_affine": lambda rng, image: augmentation.random_affine(
        rng,
        np.asarray(image, np.float32)[..., 0],
        degrees=10,
        scale=(0.9, 1.1),
        shift=0.1,
        fill=0.0,
    ),
}


@pytest.mark.parametrize("name", IMAGE_FUNCTIONS)
def test_the_rng_alone_decides_and_the_input_is_kept(name):
    image = picture()
    before = np.asarray(image).copy()
    runs = [
        np.asarray(IMAGE_FUNCTIONS[name](np.random.default_rng(seed), image))
        for seed in (0, 0, *range(1, 9))
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert any(not np.array_equal(runs[0], run) for run in runs[2:])
    np.testing.assert_array_equal(np.asarray(image), before)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32 - 1))
def test_crop_boxes_lie_within_any_image(height, width, seed):
    top, left, h, w = augmentation.crop_box(np.random.default_rng(seed), (height, width))
    assert h >= 1 and w >= 1 and top >= 0 and left >= 0
    assert top + h <= height and left + w <= width


def test_crop_boxes_have_the_asked_areas_and_aspects():
    rng = np.random.default_rng(0)
    boxes = np.array([augmentation.crop_box(rng, (400, 500)) for _ in range(3000)])
    area = boxes[:, 2] * boxes[:, 3] / (400 * 500)
    aspect = boxes[:, 3] / boxes[:, 2]
    assert area.min() > 0.078 and area.min() < 0.1 and area.max() > 0.9
    assert aspect.min() > 3 / 4 - 0.01 and aspect.max() < 4 / 3 + 0.01
    # Log-uniform: as many wide boxes as tall ones (small ones, which never had to be redrawn).
    small = np.log(aspect[area < 0.5])
    assert abs(small.mean()) < 0.02
    assert small.std() == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), rel=0.05)


def test_a_crop_box_has_the_area_and_aspect_drawn():
    # Halfway: area (0.08 + 1) / 2, aspect exp(0) = 1.
    box = augmentation.crop_box(Draws(uniform=[0.5, 0.5], integers=[3, 5]), (100, 100))
    assert box == (3, 5, 73, 73)  # sqrt(0.54 * 10000) = 73.48


@pytest.mark.parametrize(
    ("size", "box"),
    [((300, 30), (130, 0, 40, 30)), ((30, 300), (0, 130, 30, 40)), ((50, 50), (0, 0, 50, 50))],
)
def test_where_no_crop_fits_the_largest_central_one_is_taken(size, box):
    # scale above 1: no drawn box fits.
    rng = np.random.default_rng(0)
    assert augmentation.crop_box(rng, size, scale=(9.0, 9.0)) == box


def test_a_resized_crop_sees_nothing_outside_its_box():
    image = Image.new("RGB", (60, 60), (255, 0, 0))
    image.paste((10, 10, 10), (20, 20, 50, 50))
    # area 0.08 + u * 0.92 = 0.25, aspect 1: a 30x30 box, placed at (20, 20).
    rng = Draws(uniform=[(0.25 - 0.08) / 0.92, 0.5], integers=[20, 20, 1])
    crop = np.asarray(augmentation.random_resized_crop(rng, image, 64))
    assert crop.shape == (64, 64, 3) and (crop == 10).all()


def test_center_crop_is_imagenets_evaluation():
    image = picture(375, 500)
    crop = augmentation.center_crop(image, 224, 0.875)
    resized = image.resize((341, 256), Image.Resampling.BICUBIC)
    # round((341 - 224) / 2) = 58, round((256 - 224) / 2) = 16
    np.testing.assert_array_equal(np.asarray(crop), np.asarray(resized)[16:240, 58:282])
    assert augmentation.center_crop(picture(500, 30), 16, 1.0).size == (16, 16)


def test_bilinear_resize_interpolates_between_half_pixel_centers():
    row = np.array([[0.0, 4.0]], np.float32)
    np.testing.assert_allclose(
        augmentation.bilinear_resize(row, (1, 8))[0], [0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4]
    )
    image = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    by_pillow = Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(
        augmentation.bilinear_resize(image, (32, 32)), np.asarray(by_pillow), atol=1e-5
    )


def test_random_affine_at_its_middle_is_the_identity_and_shifts_move_right_and_down():
    image = np.random.default_rng(0).normal(size=(9, 12)).astype(np.float32)
    parameters = dict(degrees=10.0, scale=(0.5, 1.5), shift=0.25, fill=-7.0)
    middle = augmentation.random_affine(Draws([0.5] * 4), image, **parameters)
    np.testing.assert_allclose(middle, image, atol=1e-5)
    # dx = +0.25 * 12 = 3
    right = augmentation.random_affine(Draws([0.5, 0.5, 1.0, 0.5]), image, **parameters)
    np.testing.assert_allclose(right[:, 3:], image[:, :-3], atol=1e-4)
    assert (right[:, :3] == -7).all()


def test_random_crop_refuses_a_crop_larger_than_the_image():
    with pytest.raises(ValueError, match="9x7 crop does not fit into a 8x8 image"):
        augmentation.random_crop(np.random.default_rng(0), np.zeros((8, 8, 3)), (9, 7))


def test_color_jitter_factors_span_one_plus_minus_the_strength():
    # On gray, contrast and saturation change nothing: what remains is the brightness factor.
    rng = np.random.default_rng(0)
    values = [
        np.asarray(augmentation.color_jitter(rng, gray(100), 0.4))[0, 0, 0] for _ in range(2000)
    ]
    assert 60 <= min(values) <= 62 and 138 <= max(values) <= 140
    assert np.mean(values) == pytest.approx(100, abs=1.5)


def test_color_jitter_by_factor_one_changes_nothing():
    image = picture()
    jittered = augmentation.color_jitter(Draws(uniform=[0.5] * 3), image, 0.4)
    np.testing.assert_array_equal(np.asarray(jittered), np.asarray(image))


def test_normalize_takes_imagenets_mean_to_zero():
    image = picture()
    expected = (np.asarray(image, np.float64) / 255 - augmentation.IMAGENET_MEAN) / np.array(
        augmentation.IMAGENET_STD
    )
    normalized = augmentation.normalize(image)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized, expected, atol=1e-5)


def test_random_erasing_replaces_one_rectangle_by_standard_normal_noise():
    image = np.full((64, 96, 3), 50.0, np.float32)
    shares, noise = [], []
    rng = np.random.default_rng(0)
    for _ in range(400):
        erased = augmentation.random_erasing(rng, image, probability=1.0)
        changed = (erased != 50).all(axis=-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all() and box.sum() == changed.sum()
        shares.append(changed.mean())
        noise.append(erased[changed])
    assert min(shares) > 0.015 and max(shares) < 0.34
    values = np.concatenate(noise)
    assert values.mean() == pytest.approx(0, abs=0.01)
    assert values.std() == pytest.approx(1, abs=0.01)


def test_random_erasing_happens_with_its_probability():
    rng = np.random.default_rng(0)
    image = np.zeros((16, 16, 3), np.float32)
    changed = [augmentation.random_erasing(rng, image, 0.2) is not image for _ in range(3000)]
    assert np.mean(changed) == pytest.approx(0.2, abs=0.025)


def test_rand_augment_has_timms_fifteen_operations():
    assert set(augmentation.RAND_AUGMENT_ARGUMENTS) == {
        *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd"),
        *("Color", "Contrast", "Brightness", "Sharpness"),
        *("ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
    }
    assert augmentation.IMAGENET_FILL == (124, 116, 104)


@pytest.mark.parametrize(
    ("name", "at_9", "at_0", "at_10"),
    [
        ("Rotate", 27.0, 0.0, 30.0),
        ("Posterize", 3, 0, 4),
        ("Solarize", 230, 0, 256),
        ("SolarizeAdd", 99, 0, 110),
        ("Color", 1.72, 0.1, 1.9),
        ("Contrast", 1.72, 0.1, 1.9),
        ("Brightness", 1.72, 0.1, 1.9),
        ("Sharpness", 1.72, 0.1, 1.9),
        ("ShearX", 0.27, 0.0, 0.3),
        ("ShearY", 0.27, 0.0, 0.3),
        ("TranslateXRel", 0.405, 0.0, 0.45),
        ("TranslateYRel", 0.405, 0.0, 0.45),
    ],
)
def test_rand_augment_levels_are_those_without_inc1(name, at_9, at_0, at_10):
    to_argument, signed = augmentation.RAND_AUGMENT_ARGUMENTS[name]
    assert [to_argument(level) for level in (9.0, 0.0, 10.0)] == pytest.approx([at_9, at_0, at_10])
    assert signed == name.startswith(("Rotate", "Shear", "Translate"))


def test_the_increasing_set_grows_with_the_level():
    table = augmentation.RAND_AUGMENT_INCREASING
    assert tuple(table) == tuple(augmentation.RAND_AUGMENT_ARGUMENTS)
    assert [table["Posterize"][0](level) for level in (0.0, 9.0, 10.0)] == [4, 1, 0]
    assert [table["Solarize"][0](level) for level in (0.0, 9.0, 10.0)] == [256, 26, 0]
    assert table["Rotate"] == augmentation.RAND_AUGMENT_ARGUMENTS["Rotate"]
    # Brightness by 1 + 0.81 or 1 - 0.81 at level 9, by the sign that was drawn.
    place = tuple(table).index("Brightness")
    for sign, expected in ((0.6, 181), (0.4, 19)):
        rng = Draws(random=[0.4, sign, 0.6], integers=[place, place, 0])
        out = augmentation.rand_augment(rng, gray(100), increasing=True)
        assert np.asarray(out)[0, 0, 0] == pytest.approx(expected, abs=1)


def test_rand_augment_operations_have_their_known_effects():
    def value(name, argument, before):
        return np.asarray(augmentation.apply_operation(gray(before), name, argument))[0, 0, 0]

    assert value("Invert", 0, 200) == 55
    assert value("Posterize", 3, 0b10110111) == 0b10100000
    assert value("Posterize", 0, 255) == 0
    assert value("Solarize", 128, 200) == 55 and value("Solarize", 128, 100) == 100
    assert value("SolarizeAdd", 99, 100) == 199 and value("SolarizeAdd", 99, 128) == 128
    assert value("Brightness", 0.5, 100) == 50
    # Inverse maps: a positive share shows what lies to the right, filled at the right edge.
    image = picture(20, 20)
    moved = np.asarray(augmentation.apply_operation(image, "TranslateXRel", 0.25))
    np.testing.assert_array_equal(moved[:, :14], np.asarray(image)[:, 5:19])
    assert (moved[:, 16:] == augmentation.IMAGENET_FILL).all()
    turned = np.asarray(augmentation.apply_operation(image, "Rotate", 90.0))
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(image)))
    with pytest.raises(ValueError, match="unknown RandAugment operation 'Blur'"):
        augmentation.apply_operation(image, "Blur", 0.0)


def test_rand_augment_applies_each_operation_half_of_the_time():
    # Invert twice is the identity: one image in two comes out inverted, one untouched.
    invert = tuple(augmentation.RAND_AUGMENT_ARGUMENTS).index("Invert")
    image = gray(10)
    for first, second, expected in ((0.4, 0.6, 245), (0.6, 0.4, 245), (0.6, 0.6, 10)):
        rng = Draws(random=[first, second], integers=[invert, invert, 0, 0])
        out = augmentation.rand_augment(rng, image)
        assert np.asarray(out)[0, 0, 0] == expected
    untouched = [
        augmentation.rand_augment(np.random.default_rng(seed), image) is image
        for seed in range(2000)
    ]
    assert np.mean(untouched) == pytest.approx(0.25, abs=0.03)
