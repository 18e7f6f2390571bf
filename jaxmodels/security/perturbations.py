"""What bounded attacks share: losses, norms of perturbations, projections, checks of arguments.

Images are [B, H, W, C]; budgets `eps` and step sizes are scalars or one number an image [B].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NORMS = ("linf", "l2")
_IMAGE_AXES = (1, 2, 3)


def per_image(value: Any, x: jax.Array) -> jax.Array:
    """A scalar or [B] as something that broadcasts over x [B, H, W, C]."""
    value = jnp.asarray(value, x.dtype)
    return value.reshape((-1,) + (1,) * (x.ndim - 1)) if value.ndim == 1 else value


def l2_norms(x: jax.Array) -> jax.Array:
    """Length of each image [B, 1, 1, 1]."""
    return jnp.sqrt(jnp.square(x).sum(_IMAGE_AXES, keepdims=True))


def project(x: jax.Array, start: jax.Array, eps: jax.Array, norm: str) -> jax.Array:
    """The point of the `norm` ball of radius eps around `start` that is nearest to x."""
    delta = x - start
    if norm == "linf":
        return start + jnp.clip(delta, -eps, eps)
    return start + delta * jnp.minimum(1.0, eps / jnp.maximum(l2_norms(delta), 1e-12))


def ascent_step(
    gradient: jax.Array,
    step: jax.Array,
    norm: str,
    tiny: float = 1e-10,
    floor: float | None = None,
) -> jax.Array:
    """The move of length `step`: its sign (0 where the gradient is 0), or its direction.

    The length that divides it is never zero: `tiny` is added, or it is at least `floor` if given.
    """
    if norm == "linf":
        return step * jnp.sign(gradient)
    length = l2_norms(gradient)
    return step * gradient / (length + tiny if floor is None else jnp.maximum(length, floor))


def random_start(
    key: jax.Array, x: jax.Array, eps: jax.Array, norm: str, low: float, high: float
) -> jax.Array:
    """A point drawn uniformly from the ball around x, clipped to the pixel range."""
    if norm == "linf":
        noise = jax.random.uniform(key, x.shape, x.dtype, -1, 1) * eps
    else:
        direction, radius = jax.random.split(key)
        noise = jax.random.normal(direction, x.shape, x.dtype)
        size = np.prod(x.shape[1:])
        u = jax.random.uniform(radius, (x.shape[0], 1, 1, 1), x.dtype)
        noise = eps * u ** (1 / size) * noise / jnp.maximum(l2_norms(noise), 1e-12)
    return jnp.clip(x + noise, low, high)


def check_labels(labels: Any, num_classes: int) -> None:
    """Refuse labels that are not integers in [0, num_classes), which indexing would wrap or clip.

    Traced labels pass: only their users know them.
    """
    if isinstance(labels, jax.core.Tracer):
        return
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(
            f"labels must lie in [0, {num_classes}), got {labels.min()} to {labels.max()}"
        )


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of each row, logits [B, K], labels int [B] -> [B]."""
    check_labels(labels, logits.shape[-1])
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """z_y - max over j != y of z_j, [B]; the true class is masked by minus infinity."""
    check_labels(labels, logits.shape[-1])
    true = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    own = jnp.where(true, logits, 0).sum(-1)
    return own - jnp.where(true, -jnp.inf, logits).max(-1)


def feature_distance(features: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared difference to the target features, [B, D] each -> [B]."""
    return jnp.square(target - features).mean(-1)


Loss = Callable[[jax.Array, Any], jax.Array]


def check_budget(name: str, eps: Any, steps: int = 1, norm: str = "linf") -> None:
    """Refuse budgets that are not positive, step counts below 1 and unknown norms.

    Traced budgets pass: only their users know them.
    """
    if norm not in NORMS:
        raise ValueError(f"{name}: norm {norm!r}; known: {', '.join(NORMS)}")
    if steps < 1:
        raise ValueError(f"{name}: steps must be at least 1, got {steps}")
    if eps is not None and not isinstance(eps, jax.core.Tracer):
        smallest = np.min(np.asarray(eps, np.float64))
        if not smallest > 0:
            raise ValueError(f"{name}: eps must be positive, got {smallest:g}")


def check_pixels(x: Any, low: float = 0.0, high: float = 1.0, eps: Any = None) -> None:
    """Refuse images that are not floating point in [low, high]; call it outside `jit`.

    Images of 0..1 where 0..255 is meant (maximum <= 1 with a budget above 1) are refused too.
    """
    if isinstance(x, jax.core.Tracer):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"attacked images must be floating point, got {x.dtype}")
        return
    x = np.asarray(x)
    if not np.issubdtype(x.dtype, np.floating) and x.dtype.name != "bfloat16":
        raise ValueError(
            f"attacked images must be floating point in [{low:g}, {high:g}], got {x.dtype}"
        )
    if x.ndim != 4:
        raise ValueError(f"attacked images must be [batch, height, width, C], got {x.shape}")
    least, most = float(x.min(initial=low)), float(x.max(initial=low))
    if not (least >= low - 1e-6 and most <= high + 1e-6):
        raise ValueError(
            f"attacked images must lie in [{low:g}, {high:g}], got {least:g} to {most:g}; set low "
            "and high"
        )
    if eps is not None and not isinstance(eps, jax.core.Tracer):
        if high > 1 and most <= 1 and np.max(np.asarray(eps)) > 1:
            raise ValueError(
                f"images reach only {most:g} while eps is {np.max(np.asarray(eps)):g}: pixels of "
                f"0..1 where high={high:g} says 0..{high:g}"
            )


def check_targets(labels: Any, targets: Any, targeted: bool) -> None:
    """Refuse a targeted attack without targets, and targets that are the label already.

    Traced labels pass: only their users know them.
    """
    if not targeted:
        return
    if targets is None:
        raise ValueError("a targeted attack needs target labels")
    if isinstance(labels, jax.core.Tracer) or isinstance(targets, jax.core.Tracer):
        return
    if labels is not None and np.any(np.asarray(labels) == np.asarray(targets)):
        places = np.flatnonzero(np.asarray(labels) == np.asarray(targets))[:5]
        raise ValueError(f"targets equal the true labels at rows {places.tolist()}")


def check_mask(mask: Any, budget: float | None = None) -> float | None:
    """The share of pixels a patch mask [.., H, W, 1] covers; None of no mask or a traced one.

    Raises ValueError for masks that are not of 0 and 1, empty, or larger than `budget`. Traced
    masks pass: only their users know them.
    """
    if mask is None or isinstance(mask, jax.core.Tracer):
        return None
    mask = np.asarray(mask)
    if not np.isin(mask, (0, 1)).all():
        odd = float(mask[~np.isin(mask, (0, 1))].flat[0])
        raise ValueError(f"a patch mask holds only 0 and 1, got {odd:g}")
    areas = np.atleast_1d(mask.mean(axis=(-3, -2, -1)) if mask.ndim >= 3 else mask.mean())
    area = float(areas.max())
    if not areas.all():
        rows = f" at rows {np.flatnonzero(areas == 0)[:5].tolist()}" if areas.size > 1 else ""
        raise ValueError(f"the patch mask is empty (area 0 %){rows}")
    if budget is not None and area > budget + 1e-9:
        raise ValueError(
            f"the patch mask covers {100 * area:.2f} % of the image, the budget is "
            f"{100 * budget:g} %"
        )
    return area
