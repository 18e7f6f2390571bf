"""Physical adversarial textures: optimized through the renderer over poses, light and noise.

A. Athalye et al., arXiv 1707.07397 (expectation over transformations); M. Sharif et al. (2016) for
printability and smoothness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from jaxmodels.security import driving_renderer as renderer
from jaxmodels.security.input_transforms import shrink
from jaxmodels.security.patches import non_printability, printable_palette, total_variation
from jaxmodels.security.vehicle_detector import OBJECTIVES, attack_objective, detected

NATURALNESS_WEIGHT = 0.2


@struct.dataclass
class TextureAttack:
    """Options: Adam's rate and steps, scenes a step (EOT batch), weights of smoothness and print.

    `objective` is hide, vanish, appear or mislocalize (`attack_objective`); `surface` rear,
    billboard or road. `poses_vary` False optimizes for one fixed pose (the baseline without EOT).
    `diversity`: share of steps whose pictures are shrunk to a side of at least `diversity_rate` and
    moved about (DI).
    """

    learning_rate: float = struct.field(pytree_node=False, default=0.02)
    steps: int = struct.field(pytree_node=False, default=300)
    batch: int = struct.field(pytree_node=False, default=16)
    smoothness: float = struct.field(pytree_node=False, default=0.5)
    printability: float = struct.field(pytree_node=False, default=0.0)
    objective: str = struct.field(pytree_node=False, default="hide")
    surface: str = struct.field(pytree_node=False, default="rear")
    poses_vary: bool = struct.field(pytree_node=False, default=True)
    diversity: float = struct.field(pytree_node=False, default=0.0)
    diversity_rate: float = struct.field(pytree_node=False, default=0.75)


def check_texture_attack(cfg: TextureAttack) -> None:
    """Refuse unknown objectives and surfaces, empty runs, and weights out of their range."""
    for name, value, known in (
        ("objective", cfg.objective, OBJECTIVES),
        ("surface", cfg.surface, renderer.SURFACES),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r}; known: {', '.join(known)}")
    if cfg.steps < 1 or cfg.batch < 1:
        raise ValueError(f"texture attack: steps and batch must be positive, got {cfg}")
    if not (cfg.learning_rate > 0 and cfg.smoothness >= 0 and cfg.printability >= 0):
        raise ValueError(
            "texture attack: learning_rate must be positive, smoothness and printability not "
            f"negative, got {cfg.learning_rate:g}, {cfg.smoothness:g} and {cfg.printability:g}"
        )
    if not (0 <= cfg.diversity <= 1 and 0 < cfg.diversity_rate <= 1):
        raise ValueError(
            "texture attack: diversity and diversity_rate are shares, got "
            f"{cfg.diversity:g} and {cfg.diversity_rate:g}"
        )


def render_attack(
    backgrounds: jax.Array, texture: jax.Array, pose: renderer.Pose, surface: str = "rear"
) -> renderer.Rendered:
    """Scenes [B, H, W, 3] with the texture [side, side, 3] on a surface."""
    if surface == "rear":
        rear = renderer.dressed(texture)
        return renderer.paint(backgrounds, rear, renderer.rear_alpha(), "rear", pose)
    whole = jnp.ones((*texture.shape[:2], 1))
    return renderer.paint(backgrounds, texture, whole, surface, pose)


def optimize_texture(
    key: jax.Array,
    detectors: Sequence[Callable[[jax.Array], Any]],
    backgrounds: jax.Array,
    base: jax.Array,
    cfg: TextureAttack,
) -> jax.Array:
    """A texture [side, side, 3] in [0, 1] that lowers the objective on all white-box detectors.

    Args:
      detectors: images [B, H, W, 3] -> `Predictions`; their objectives are averaged.
      backgrounds: [N, H, W, 3], drawn from at every step. base: the texture to begin from.
    """

    def photograph(key, texture):
        choice, place, noise = jax.random.split(key, 3)
        rows = jax.random.randint(choice, (cfg.batch,), 0, backgrounds.shape[0])
        pose = renderer.sample_poses(place, cfg.batch)
        if not cfg.poses_vary:
            pose = jax.tree.map(lambda v, f: jnp.full_like(v, f), pose, FIXED_POSE)
        images, boxes = render_attack(backgrounds[rows], texture, pose, cfg.surface)
        images = jnp.clip(images + 0.02 * jax.random.normal(noise, images.shape), 0, 1)
        return renderer.Rendered(images, boxes)

    victims = [lambda rendered, d=d: d(rendered.images) for d in detectors]
    return optimize_in_scenes(key, victims, photograph, base, cfg)


def optimize_in_scenes(
    key: jax.Array,
    victims: Sequence[Callable[[renderer.Rendered], Any]],
    photograph: Callable[[jax.Array, jax.Array], renderer.Rendered],
    base: jax.Array,
    cfg: TextureAttack,
) -> jax.Array:
    """As `optimize_texture`, in any world.

    Args:
      victims: what a scene shows -> `Predictions`; their objectives are averaged.
      photograph: (key, texture [side, side, 3]) -> drawn scenes with the texture in them.
    """
    check_texture_attack(cfg)
    optimizer = optax.adam(cfg.learning_rate)
    palette = printable_palette()

    def loss(logit, key):
        texture = jax.nn.sigmoid(logit)
        if cfg.diversity:
            key, draw = jax.random.split(key)
            scene = diverse_scene(draw, photograph(key, texture), cfg)
        else:
            scene = photograph(key, texture)
        value = sum(attack_objective(v(scene), scene.boxes, cfg.objective).mean() for v in victims)
        value = value / len(victims) + cfg.smoothness * total_variation(texture)
        if cfg.printability:
            pixels = texture.shape[0] * texture.shape[1]
            value = value + cfg.printability * non_printability(texture, palette) / pixels
        return value

    start = jnp.clip(base, 0.02, 0.98)
    # Adam's rate is one of colors: the sigmoid's slope of at most a quarter is divided out.
    logit = jnp.log(start / (1 - start)) / 4.0

    def scaled_loss(quarter, key):
        return loss(4.0 * quarter, key)

    def advance(carry, key):
        quarter, state = carry
        grads = jax.grad(scaled_loss)(quarter, key)
        updates, state = optimizer.update(grads, state)
        return (quarter + updates, state), None

    (quarter, _), _ = lax.scan(
        advance, (logit, optimizer.init(logit)), jax.random.split(key, cfg.steps)
    )
    return jax.nn.sigmoid(4.0 * quarter)


def diverse_scene(
    key: jax.Array, scene: renderer.Rendered, cfg: TextureAttack
) -> renderer.Rendered:
    """The scene as a smaller picture on black, its boxes with it; one draw for the batch."""
    coin, size, down, right = jax.random.split(key, 4)
    height, width = scene.images.shape[1:3]
    rows = jax.random.randint(size, (), int(cfg.diversity_rate * height), height + 1)
    columns = (rows * width) // height
    top = jax.random.randint(down, (), 0, height - rows + 1)
    left = jax.random.randint(right, (), 0, width - columns + 1)
    scale = jnp.stack([columns / width, rows / height] * 2)
    moved = renderer.Rendered(
        shrink(scene.images, rows, columns, top, left),
        scene.boxes * scale + jnp.stack([left, top, left, top]),
    )
    used = jax.random.uniform(coin) < cfg.diversity
    return jax.tree.map(lambda a, b: jnp.where(used, a, b), moved, scene)


FIXED_POSE = renderer.Pose(distance=12.0, lateral=0.0, yaw=0.0, light=1.0)


def detection_rate(
    detector: Callable,
    backgrounds: jax.Array,
    texture: jax.Array,
    pose: renderer.Pose,
    surface: str = "rear",
) -> jax.Array:
    """Bool [B]: the target was found in each scene (confidence 0.5, IoU 0.5)."""
    images, boxes = render_attack(backgrounds, texture, pose, surface)
    return detected(detector(images), boxes)


def naturalness(texture: jax.Array, base: jax.Array) -> jax.Array:
    """Mean absolute difference to the base texture."""
    return jnp.abs(texture - base).mean()


def texture_score(found: jax.Array, texture: jax.Array, base: jax.Array) -> jax.Array:
    """Mean over frames of (1 - detected), minus 0.2 times the naturalness penalty, not below 0."""
    hidden = 1.0 - found.astype(jnp.float32).mean()
    return jnp.maximum(hidden - NATURALNESS_WEIGHT * naturalness(texture, base), 0.0)
