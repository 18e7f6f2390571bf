"""Image augmentation in NumPy and Pillow: each a pure function of (rng, image, parameters).

Color images are Pillow RGB images of uint8; what works on normalized pixels takes float32 arrays
[H, W, C]. Conventions are those of timm's ImageNet training transforms, torchvision's where timm
uses them; each docstring says the ranges.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
INTERPOLATIONS = (BILINEAR, BICUBIC)

Size = tuple[int, int]  # height, width


# Sampling


def bilinear_resize(images: np.ndarray, size: Size) -> np.ndarray:
    """Upscales [..., h, w] to [..., H, W] float32, half-pixel centers, edges clamped."""
    rows = _interpolation_matrix(images.shape[-2], size[0])
    columns = _interpolation_matrix(images.shape[-1], size[1])
    return (rows @ images.astype(np.float32) @ columns.T).astype(np.float32)


@functools.lru_cache(maxsize=32)
def _interpolation_matrix(n: int, m: int) -> np.ndarray:
    position = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    low = np.minimum(position.astype(int), max(n - 2, 0))
    high = np.minimum(low + 1, n - 1)
    weight = position - low
    matrix = np.zeros((m, n), np.float32)
    np.add.at(matrix, (np.arange(m), low), 1 - weight)
    np.add.at(matrix, (np.arange(m), high), weight)
    return matrix


def random_affine(
    rng: np.random.Generator,
    image: np.ndarray,
    *,
    degrees: float,
    scale: tuple[float, float],
    shift: float,
    fill: float,
) -> np.ndarray:
    """Rotates, scales and shifts a gray image float32 [H, W] about its center, bilinearly.

    Uniform: angle in +-`degrees`, factor in `scale`, shifts in +-`shift` of the side.
    """
    height, width = image.shape
    angle = math.radians(rng.uniform(-degrees, degrees))
    factor = rng.uniform(*scale)
    dx, dy = rng.uniform(-shift, shift) * width, rng.uniform(-shift, shift) * height
    cos, sin = math.cos(angle) / factor, math.sin(angle) / factor
    cx, cy = width / 2, height / 2
    # Pillow wants the inverse map, from output to input coordinates.
    inverse = (
        *(cos, sin, cx - cos * (cx + dx) - sin * (cy + dy)),
        *(-sin, cos, cy + sin * (cx + dx) - cos * (cy + dy)),
    )
    moved = Image.fromarray(image).transform(
        (width, height), Image.Transform.AFFINE, inverse, resample=BILINEAR, fillcolor=fill
    )
    return np.asarray(moved)


def random_crop(rng: np.random.Generator, image: np.ndarray, size: Size) -> np.ndarray:
    """A crop [h, w, C] at a uniform position of [H, W, C].

    Raises:
      ValueError: the image is smaller than the crop.
    """
    (height, width), (h, w) = image.shape[:2], size
    if h > height or w > width:
        raise ValueError(f"a {h}x{w} crop does not fit into a {height}x{width} image")
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    return image[top : top + h, left : left + w]


def random_flips(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Left-right and up-down, each with probability 1/2; [H, W, C]."""
    if rng.random() < 0.5:
        image = image[:, ::-1]
    if rng.random() < 0.5:
        image = image[::-1]
    return image


def random_horizontal_flip(
    rng: np.random.Generator, image: Image.Image, probability: float = 0.5
) -> Image.Image:
    """Mirrors left-right with this probability."""
    if rng.random() < probability:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def crop_box(
    rng: np.random.Generator,
    size: Size,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random resized crop, as torchvision draws it.

    Ten draws of an area uniform in `scale` of the image's and an aspect (width / height)
    log-uniform in `ratio`; then the largest central crop whose aspect is within `ratio`.
    """
    height, width = size
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    aspect = width / height
    if aspect < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif aspect > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized_crop(
    rng: np.random.Generator,
    image: Image.Image,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolations: Sequence[Image.Resampling] = INTERPOLATIONS,
) -> Image.Image:
    """`crop_box`, resized to `size` x `size` with an interpolation drawn from `interpolations`."""
    top, left, h, w = crop_box(rng, (image.height, image.width), scale, ratio)
    method = interpolations[int(rng.integers(len(interpolations)))]
    # Cropped first: with resize's `box` the filter would see pixels outside the crop.
    cropped = image.crop((left, top, left + w, top + h))
    return cropped.resize((size, size), method)


def center_crop(
    image: Image.Image,
    size: int,
    crop_fraction: float = 0.875,
    interpolation: Image.Resampling = BICUBIC,
) -> Image.Image:
    """Shorter side to `floor(size / crop_fraction)`, then the central `size` x `size`."""
    shorter = math.floor(size / crop_fraction)
    width, height = image.size
    if width <= height:
        scaled = (shorter, int(shorter * height / width))
    else:
        scaled = (int(shorter * width / height), shorter)
    image = image.resize(scaled, interpolation)
    left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return image.crop((left, top, left + size, top + size))


# Color


def color_jitter(
    rng: np.random.Generator,
    image: Image.Image,
    strength: float = 0.4,
) -> Image.Image:
    """Brightness, contrast and saturation by factors uniform in [1 - s, 1 + s], in random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, size=3)
    for i in rng.permutation(3):
        image = enhancers[i](image).enhance(float(factors[i]))
    return image


def normalize(
    image: Image.Image,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> np.ndarray:
    """uint8 RGB to float32 [H, W, 3]: (x / 255 - mean) / std."""
    # One multiplication and one subtraction a pixel.
    factor = np.asarray([1 / (255 * s) for s in std], np.float32)
    offset = np.asarray([m / s for m, s in zip(mean, std)], np.float32)
    pixels = np.asarray(image, np.float32) * factor
    pixels -= offset
    return pixels


def random_erasing(
    rng: np.random.Generator,
    image: np.ndarray,
    probability: float = 0.2,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """Replaces a rectangle of a normalized image [H, W, C] by standard normal noise, per pixel.

    timm's mode `pixel`, one rectangle: its area uniform in `area` of the image's, its aspect
    (height / width) log-uniform in `aspect`; at most ten draws until it is smaller than the image.
    The argument is left as it was.
    """
    if rng.random() >= probability:
        return image
    height, width, channels = image.shape
    for _ in range(10):
        target = rng.uniform(*area) * height * width
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        h, w = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            image = image.copy()
            image[top : top + h, left : left + w] = rng.standard_normal(
                (h, w, channels), dtype=np.float32
            )
            return image
    return image


# RandAugment, as timm's `rand-mM-mstdS`, without and with `inc1`

_MAX_LEVEL = 10.0

# Operation -> (level in [0, 10] -> argument, whether its sign is drawn). `None`: no argument.
RAND_AUGMENT_ARGUMENTS: dict[str, tuple[Callable[[float], float] | None, bool]] = {
    "AutoContrast": (None, False),
    "Equalize": (None, False),
    "Invert": (None, False),
    "Rotate": (lambda level: level / _MAX_LEVEL * 30, True),  # degrees
    "Posterize": (lambda level: int(level / _MAX_LEVEL * 4), False),  # bits kept
    "Solarize": (lambda level: int(level / _MAX_LEVEL * 256), False),  # threshold
    "SolarizeAdd": (lambda level: int(level / _MAX_LEVEL * 110), False),  # added below 128
    "Color": (lambda level: level / _MAX_LEVEL * 1.8 + 0.1, False),
    "Contrast": (lambda level: level / _MAX_LEVEL * 1.8 + 0.1, False),
    "Brightness": (lambda level: level / _MAX_LEVEL * 1.8 + 0.1, False),
    "Sharpness": (lambda level: level / _MAX_LEVEL * 1.8 + 0.1, False),
    "ShearX": (lambda level: level / _MAX_LEVEL * 0.3, True),
    "ShearY": (lambda level: level / _MAX_LEVEL * 0.3, True),
    "TranslateXRel": (lambda level: level / _MAX_LEVEL * 0.45, True),  # share of the side
    "TranslateYRel": (lambda level: level / _MAX_LEVEL * 0.45, True),
}

# The same under timm's `inc1`: every operation grows with the level, enhancements away from 1.
_ENHANCEMENTS = ("Color", "Contrast", "Brightness", "Sharpness")
RAND_AUGMENT_INCREASING = {
    **RAND_AUGMENT_ARGUMENTS,
    "Posterize": (lambda level: 4 - int(level / _MAX_LEVEL * 4), False),
    "Solarize": (lambda level: 256 - int(level / _MAX_LEVEL * 256), False),
    **{name: (lambda level: level / _MAX_LEVEL * 0.9, True) for name in _ENHANCEMENTS},
}

# timm fills with the data set's mean color.
IMAGENET_FILL = tuple(round(255 * channel) for channel in IMAGENET_MEAN)


def rand_augment(
    rng: np.random.Generator,
    image: Image.Image,
    magnitude: float = 9.0,
    magnitude_std: float = 0.5,
    increasing: bool = False,
    num_ops: int = 2,
    probability: float = 0.5,
    fill: tuple[int, int, int] = IMAGENET_FILL,
) -> Image.Image:
    """RandAugment (Cubuk et al., arXiv 1909.13719) as timm defines `rand-m9-mstd0.5`.

    `num_ops` operations drawn with replacement from the fifteen of `RAND_AUGMENT_ARGUMENTS`; each
    is applied with `probability` at a level drawn from N(magnitude, magnitude_std) and clipped to
    [0, 10]. Posterize and Solarize weaken as the level grows and the enhancements go from 0.1 to
    1.9; in the set `increasing` (timm's `inc1`) the former grow stronger, and the latter are
    1 + 0.9 level / 10 or 1 - 0.9 level / 10.
    """
    arguments = RAND_AUGMENT_INCREASING if increasing else RAND_AUGMENT_ARGUMENTS
    names = tuple(arguments)
    for choice in rng.integers(len(names), size=num_ops):
        if rng.random() >= probability:
            continue
        level = float(np.clip(rng.normal(magnitude, magnitude_std), 0, _MAX_LEVEL))
        to_argument, signed = arguments[names[choice]]
        argument = to_argument(level) if to_argument else 0.0
        if signed and rng.random() < 0.5:
            argument = -argument
        if increasing and names[choice] in _ENHANCEMENTS:
            argument = 1 + argument
        interpolation = INTERPOLATIONS[int(rng.integers(2))]
        image = apply_operation(image, names[choice], argument, interpolation, fill)
    return image


def apply_operation(
    image: Image.Image,
    name: str,
    argument: float,
    interpolation: Image.Resampling = BILINEAR,
    fill: tuple[int, int, int] = IMAGENET_FILL,
) -> Image.Image:
    """One named RandAugment operation with its argument (units: `RAND_AUGMENT_ARGUMENTS`)."""
    width, height = image.size
    match name:
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Invert":
            return ImageOps.invert(image)
        case "Rotate":
            return image.rotate(argument, resample=interpolation, fillcolor=fill)
        case "Posterize":
            return image.point(_posterize_table(int(argument)) * 3)
        case "Solarize":
            return ImageOps.solarize(image, int(argument))
        case "SolarizeAdd":
            table = [min(255, i + int(argument)) if i < 128 else i for i in range(256)]
            return image.point(table * 3)
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return getattr(ImageEnhance, name)(image).enhance(argument)
        case "ShearX":
            return _affine(image, (1, argument, 0, 0, 1, 0), interpolation, fill)
        case "ShearY":
            return _affine(image, (1, 0, 0, argument, 1, 0), interpolation, fill)
        case "TranslateXRel":
            return _affine(image, (1, 0, argument * width, 0, 1, 0), interpolation, fill)
        case "TranslateYRel":
            return _affine(image, (1, 0, 0, 0, 1, argument * height), interpolation, fill)
    raise ValueError(f"unknown RandAugment operation {name!r}")


def _posterize_table(bits: int) -> list[int]:
    # ImageOps.posterize does not take 0 bits, which timm's levels reach.
    kept = 0xFF & ~((1 << (8 - bits)) - 1) if bits < 8 else 0xFF
    return [i & kept for i in range(256)]


def _affine(
    image: Image.Image,
    inverse: tuple[float, ...],
    interpolation: Image.Resampling,
    fill: tuple[int, int, int],
) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, inverse, resample=interpolation, fillcolor=fill
    )
