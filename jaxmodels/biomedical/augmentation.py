"""nnU-Net's augmentation in JAX: every sample by its own key, all under one `vmap`.

Order, probabilities and ranges of nnunetv2 2.8.1 (`nnUNetTrainer.get_training_transforms`) with
batchgeneratorsv2 0.3.6. Images [B, *S, C], label maps int [B, *S]. Spatial transforms sample the
patch itself, so what rotates in from beyond its border is 0, in labels -1; give patches enlarged by
`enlarged_patch` and cut after it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxmodels.biomedical.components import propagate_labels


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Probabilities of every step (0 turns it off) and the range of rotations in radians."""

    rotation: float = 0.2
    scaling: float = 0.2
    noise: float = 0.1
    blur: float = 0.2
    brightness: float = 0.15
    contrast: float = 0.15
    low_resolution: float = 0.25
    inverted_gamma: float = 0.1
    gamma: float = 0.3
    mirror: float = 0.5
    mirror_axes: tuple[int, ...] | None = None  # None: all

    @classmethod
    def named(cls, name: str) -> Augmentation | None:
        """`full` (nnU-Net's), `intensity` (no rotation or scaling), `mirror`, or None for `none`.

        Raises ValueError for another name.
        """
        if name == "none":
            return None
        off = dict.fromkeys((f.name for f in dataclasses.fields(cls)), 0.0)
        off.pop("mirror_axes")
        choices = {
            "full": cls(),
            "intensity": cls(rotation=0.0, scaling=0.0),
            "mirror": cls(**{**off, "mirror": 0.5}),
        }
        if name not in choices:
            raise ValueError(f"no augmentation {name!r}; known: {', '.join([*choices, 'none'])}")
        return choices[name]


def dummy_2d(patch: Sequence[int]) -> bool:
    """Whether rotations stay within slices: the patch is more than 3 times longer than deep."""
    return len(patch) == 3 and max(patch) / patch[0] > 3


def rotation_range(patch: Sequence[int]) -> float:
    """Largest rotation in radians: 30 degrees in 3-D, 180 in 2-D, 15 for elongated 2-D patches.

    Under dummy 2-D always 180, however long the slices are.
    """
    if len(patch) == 3:
        return math.radians(180 if dummy_2d(patch) else 30)
    return math.radians(15) if max(patch) / min(patch) > 1.5 else math.radians(180)


def enlarged_patch(patch: Sequence[int], smallest_scale: float = 0.85) -> tuple[int, ...]:
    """The patch to read so that most rotations and scalings find content (nnU-Net's size).

    The patch's extent turned by the largest angle (90 degrees at most) about every axis, over
    `smallest_scale`, truncated; under dummy 2-D the first axis stays.
    """
    plane = list(patch[1:]) if dummy_2d(patch) else list(patch)
    angle = min(math.pi / 2, rotation_range(patch))
    c, s = math.cos(angle), math.sin(angle)
    if len(plane) == 3:
        x, y, z = plane
        turned = (
            max(abs(x * c - z * s), abs(x * c + y * s)),
            max(abs(y * c + z * s), abs(y * c - x * s)),
            max(abs(z * c - y * s), abs(z * c + x * s)),
        )
    else:
        x, y = plane
        turned = (abs(x * c + y * s), abs(y * c - x * s))
    size = [int(max(n, t) / smallest_scale) for n, t in zip(plane, turned)]
    return (*patch[: len(patch) - len(plane)], *size)


def _rotation_2d(angle):
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([c, -s]), jnp.stack([s, c])])


def _rotation_3d(x, y, z):
    def about(axis, angle):
        first, second = [a for a in range(3) if a != axis]
        c, s = jnp.cos(angle), jnp.sin(angle)
        matrix = jnp.eye(3).at[first, first].set(c).at[second, second].set(c)
        return matrix.at[first, second].set(-s).at[second, first].set(s)

    return about(0, x) @ about(1, y) @ about(2, z)


def _sample(volume: jax.Array, coordinates: jax.Array, order: int) -> jax.Array:
    """volume [*S, C] at coordinates [axes, *S'], 0 outside; linear or nearest."""
    points = [coordinates[i] for i in range(coordinates.shape[0])]
    sample = functools.partial(
        jax.scipy.ndimage.map_coordinates, coordinates=points, order=order, mode="constant"
    )
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(volume)


def spatial(
    key: jax.Array,
    image: jax.Array,
    label: jax.Array,
    patch: Sequence[int],
    rotation: float = 0.2,
    scaling: float = 0.2,
) -> tuple[jax.Array, jax.Array]:
    """One sample rotated and scaled about its center, cut to `patch`.

    image [*S, C] by linear interpolation, label [*S] by nearest neighbor. With probability
    `rotation` about every axis by an angle within `rotation_range`, with `scaling` by a factor
    uniform in [0.7, 1.4].
    """
    size, dims = image.shape[:-1], len(patch)
    keys = jax.random.split(key, 4)
    limit = rotation_range(patch)
    turned = jax.random.bernoulli(keys[0], rotation)
    angles = jax.random.uniform(keys[1], (3,), minval=-limit, maxval=limit) * turned
    scaled = jax.random.bernoulli(keys[2], scaling)
    # Coordinates are divided by the zoom: a factor above 1 shows more of the surroundings.
    factor = jnp.where(scaled, jax.random.uniform(keys[3], minval=0.7, maxval=1.4), 1.0)
    grid = jnp.stack(
        jnp.meshgrid(*(jnp.arange(n) - (n - 1) / 2 for n in patch), indexing="ij")
    ).astype(jnp.float32)
    if dims == 3 and not dummy_2d(patch):
        moved = jnp.einsum("ij,j...->i...", _rotation_3d(*angles) * factor, grid)
    else:
        plane = jnp.einsum("ij,j...->i...", _rotation_2d(angles[0]) * factor, grid[-2:])
        moved = jnp.concatenate([grid[:-2], plane])
    center = jnp.asarray([(n - 1) / 2 for n in size], jnp.float32)
    # On even differences of size the untransformed grid falls on voxels.
    coordinates = moved + center.reshape(-1, *(1,) * dims)
    still = jnp.logical_and(~turned, ~scaled)

    def cut():
        start = [(n - p) // 2 for n, p in zip(size, patch)]
        box = tuple(slice(s, s + p) for s, p in zip(start, patch))
        return image[box], label[box]

    def transform():
        # One more than the label: outside, where samples are 0, it is -1.
        nearest = _sample(label[..., None].astype(jnp.float32) + 1, coordinates, 0)[..., 0] - 1
        return _sample(image, coordinates, 1), nearest.astype(label.dtype)

    return jax.lax.cond(still, cut, transform)


def _sometimes(key, probability, transform, image):
    """`transform(key, image)` with a probability, else the image."""
    draw, inner = jax.random.split(key)
    chosen = jax.random.bernoulli(draw, probability)
    return jnp.where(chosen, transform(inner, image), image)


def _axes(image) -> tuple[int, ...]:
    return tuple(range(image.ndim - 1))


def _noise(key, image):
    """Noise whose deviation is uniform in [0, .1]: nnU-Net's `noise_variance` is used as such."""
    scale_key, noise_key = jax.random.split(key)
    deviation = jax.random.uniform(scale_key, maxval=0.1)
    return image + deviation * jax.random.normal(noise_key, image.shape)


_BLUR_REACH = 3


def _blur(key, image):
    """Gaussian of sigma .5 to 1 per channel and axis, each channel with probability one half."""
    keys = jax.random.split(key, 2)
    axes, channels = _axes(image), image.shape[-1]
    sigmas = jax.random.uniform(keys[0], (len(axes), channels), minval=0.5, maxval=1.0)
    chosen = jax.random.bernoulli(keys[1], 0.5, (channels,))
    offsets = jnp.arange(-_BLUR_REACH, _BLUR_REACH + 1)[:, None]
    result = image
    for axis in axes:
        sigma, n = sigmas[axis], image.shape[axis]
        # The kernel's length is the odd number nearest to 6 sigma + 1/2.
        inside = jnp.abs(offsets) <= jnp.floor((6 * sigma + 0.5) / 2)
        weights = jnp.where(inside, jnp.exp(-0.5 * (offsets / sigma) ** 2), 0)
        weights = weights / weights.sum(0)
        width = [(_BLUR_REACH,) * 2 if a == axis else (0, 0) for a in range(image.ndim)]
        padded = jnp.pad(result, width, mode="reflect" if n > _BLUR_REACH else "edge")
        result = sum(
            w * jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i, w in enumerate(weights)
        )
    return jnp.where(chosen, result, image)


def _brightness(key, image):
    factor = jax.random.uniform(key, (image.shape[-1],), minval=0.75, maxval=1.25)
    return image * factor


def _contrast(key, image):
    """Scaled about the channel's mean, its range preserved."""
    factor = jax.random.uniform(key, (image.shape[-1],), minval=0.75, maxval=1.25)
    axes = _axes(image)
    mean = image.mean(axes)
    scaled = (image - mean) * factor + mean
    return jnp.clip(scaled, image.min(axes), image.max(axes))


def _low_resolution(key, image, first: int = 0):
    """Down to a share of .5 to 1 by nearest neighbor and up again by linear interpolation.

    Shapes are static, so the small image lives on a grid of the full size whose first voxels are
    used; the share is a channel's own, each changes with probability one half. Axes before `first`
    keep their resolution.
    """
    keys = jax.random.split(key, 2)
    channels = image.shape[-1]
    shares = jax.random.uniform(keys[0], (channels,), minval=0.5, maxval=1.0)
    chosen = jax.random.bernoulli(keys[1], 0.5, (channels,))

    def one(channel, share):
        for axis in range(first, channel.ndim):
            n = channel.shape[axis]
            small = jnp.maximum(jnp.round(n * share), 1)
            picked = jnp.floor((jnp.arange(n) + 0.5) * n / small)
            place = jnp.maximum((jnp.arange(n) + 0.5) * small / n - 0.5, 0)
            base = jnp.floor(place)
            t = (place - base).reshape([n if a == axis else 1 for a in range(channel.ndim)])
            low, high = (
                jnp.take(picked, jnp.clip(base + k, 0, small - 1).astype(jnp.int32)) for k in (0, 1)
            )
            low, high = (
                jnp.take(channel, jnp.clip(i, 0, n - 1).astype(jnp.int32), axis=axis)
                for i in (low, high)
            )
            channel = low * (1 - t) + high * t
        return channel

    result = jax.vmap(one, in_axes=(-1, 0), out_axes=-1)(image, shares)
    return jnp.where(chosen, result, image)


def _gamma(key, image, inverted: bool):
    """Gamma of .7 to 1.5 on the channel's range; mean and deviation are restored."""
    axes = _axes(image)
    keys = jax.random.split(key, 3)
    channels = (image.shape[-1],)
    below = jax.random.uniform(keys[0], channels, minval=0.7, maxval=1.0)
    above = jax.random.uniform(keys[1], channels, minval=1.0, maxval=1.5)
    gamma = jnp.where(jax.random.bernoulli(keys[2], 0.5, channels), below, above)
    x = -image if inverted else image
    mean, deviation = x.mean(axes), x.std(axes)
    low = x.min(axes)
    extent = jnp.maximum(x.max(axes) - low, 1e-7)
    y = ((x - low) / extent) ** gamma * extent + low
    y = (y - y.mean(axes)) / jnp.maximum(y.std(axes), 1e-7) * deviation + mean
    return -y if inverted else y


def _mirror(key, image, label, probability, axes):
    flips = jax.random.bernoulli(key, probability, (image.ndim - 1,))
    for axis in axes:
        image = jnp.where(flips[axis], jnp.flip(image, axis), image)
        label = jnp.where(flips[axis], jnp.flip(label, axis), label)
    return image, label


def augment(
    key: jax.Array,
    image: jax.Array,
    label: jax.Array,
    patch: Sequence[int],
    settings: Augmentation,
    intensity_channels: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Batch [B, *S, C], [B, *S] -> [B, *patch, C], [B, *patch]; S at least the patch.

    Labels are -1 where a rotation or scaling looked beyond the batch's border.

    `intensity_channels` are the first channels, those that intensity transforms change; the rest
    (a cascade's earlier prediction) only follow the spatial ones.
    """
    count = image.shape[-1] if intensity_channels is None else intensity_channels
    axes = tuple(range(len(patch))) if settings.mirror_axes is None else settings.mirror_axes
    flat = int(dummy_2d(patch))

    def one(key, image, label):
        keys = jax.random.split(key, 10)
        if settings.rotation or settings.scaling:
            image, label = spatial(
                keys[0], image, label, patch, settings.rotation, settings.scaling
            )
        else:
            start = [(n - p) // 2 for n, p in zip(image.shape, patch)]
            box = tuple(slice(s, s + p) for s, p in zip(start, patch))
            image, label = image[box], label[box]
        x, rest = image[..., :count], image[..., count:]
        steps = (
            (settings.noise, _noise),
            (settings.blur, _blur),
            (settings.brightness, _brightness),
            (settings.contrast, _contrast),
            (settings.low_resolution, functools.partial(_low_resolution, first=flat)),
            (settings.inverted_gamma, functools.partial(_gamma, inverted=True)),
            (settings.gamma, functools.partial(_gamma, inverted=False)),
        )
        for number, (probability, transform) in enumerate(steps):
            if probability:
                x = _sometimes(keys[1 + number], probability, transform, x)
        image = jnp.concatenate([x, rest], -1)
        if settings.mirror:
            image, label = _mirror(keys[9], image, label, settings.mirror, axes)
        return image, label

    return jax.vmap(one)(jax.random.split(key, image.shape[0]), image, label)


# -- a cascade's earlier prediction ----------------------------------------------------------------


def _cross(mask: jax.Array, grow: bool) -> jax.Array:
    """One dilation (or erosion) by the face neighbors; nothing enters from beyond the border."""
    result = mask
    padded = jnp.pad(mask, 1, constant_values=not grow)
    for axis in range(mask.ndim):
        for shift in (0, 2):
            window = tuple(
                slice(shift, shift + n) if a == axis else slice(1, 1 + n)
                for a, n in enumerate(mask.shape)
            )
            result = result | padded[window] if grow else result & padded[window]
    return result


def random_morphology(
    key: jax.Array,
    prior: jax.Array,
    probability: float = 0.4,
    per_label: float = 0.5,
    largest: int = 8,
) -> jax.Array:
    """One-hot prior [B, *S, K] with classes dilated, eroded, opened or closed at random.

    With `probability` per batch, then per class; by 1 to `largest` voxels. Where a class grew
    over another the other gives way.
    """
    batch_key, *keys = jax.random.split(key, 1 + prior.shape[-1])
    applied = jax.random.bernoulli(batch_key, probability)

    def change(mask, kind, times):
        def repeat(mask, grow):
            return jax.lax.fori_loop(0, times, lambda _, m: _cross(m, grow), mask)

        return jax.lax.switch(
            kind,
            (
                lambda m: repeat(m, True),
                lambda m: repeat(m, False),
                lambda m: repeat(repeat(m, False), True),
                lambda m: repeat(repeat(m, True), False),
            ),
            mask,
        )

    def run(prior):
        masks = prior > 0.5
        for k, one in enumerate(keys):
            draws = jax.random.split(one, 3)
            kind = jax.random.randint(draws[0], (), 0, 4)
            times = jax.random.randint(draws[1], (), 1, largest + 1)
            changed = jax.lax.map(lambda m, a=kind, b=times: change(m, a, b), masks[..., k])
            use = jax.random.bernoulli(draws[2], per_label)
            new = jnp.where(use, changed, masks[..., k])
            added = new & ~masks[..., k]
            masks = (masks & ~added[..., None]).at[..., k].set(new)
        return masks.astype(prior.dtype)

    return jax.lax.cond(applied, run, lambda prior: prior, prior)


def remove_random_components(
    key: jax.Array,
    prior: jax.Array,
    probability: float = 0.2,
    per_label: float = 0.5,
    largest_share: float = 0.15,
) -> jax.Array:
    """One-hot prior [B, *S, K] in which classes have lost one of their small components.

    With `probability` per sample, then `per_label` per class, one component is drawn among those
    below `largest_share` of the patch, and goes.
    """
    voxels = math.prod(prior.shape[1:-1])
    sample_key, label_key, component_key = jax.random.split(key, 3)
    shape = (prior.shape[0], prior.shape[-1])
    used = jax.random.bernoulli(sample_key, probability, (shape[0], 1))
    used = used & jax.random.bernoulli(label_key, per_label, shape)

    def one(key, mask, used):
        labels = propagate_labels(mask > 0.5).reshape(-1)
        sizes = jnp.zeros(voxels + 1, jnp.int32).at[labels].add(1)
        small = (sizes > 0) & (sizes < largest_share * voxels) & (jnp.arange(voxels + 1) > 0)
        drawn = jnp.where(small, jax.random.uniform(key, (voxels + 1,)), -1.0).argmax()
        gone = (labels == drawn) & small[drawn] & used
        return jnp.where(gone.reshape(mask.shape), 0, mask)

    over_classes = jax.vmap(one, in_axes=(0, -1, 0), out_axes=-1)
    return jax.vmap(over_classes)(jax.random.split(component_key, shape), prior, used)
