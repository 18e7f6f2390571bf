"""Editing in latent space: attribute directions, conditional edits, style mixing, code norms.

Y. Shen et al., "InterFaceGAN", arXiv 2005.09635 (genforce/interfacegan@8da3fc0,
`utils/manipulator.py`, `utils/train_boundary`); regularizers of pSp (`criteria/w_norm.py`) and of
e4e (`training/coach.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def check_direction(direction: jax.Array, width: int) -> jax.Array:
    """A direction [D] or [1, D] as a unit vector [D].

    Raises ValueError for another width than the codes' and for a zero norm.
    """
    direction = jnp.asarray(direction)
    flat = direction.reshape(-1)
    if flat.shape[0] != width or direction.ndim > 2:
        raise ValueError(f"a direction has width {width} as the codes have, got {direction.shape}")
    norm = jnp.linalg.norm(flat)
    if not isinstance(norm, jax.core.Tracer) and not float(norm) > 0:
        raise ValueError("a direction must not have zero norm")
    return flat / norm


def project_boundary(primal: jax.Array, *conditions: jax.Array) -> jax.Array:
    """`primal` made orthogonal to every condition, a unit vector [1, D].

    All are unit row vectors [1, D]. The projection on the conditions' span (their Gram system is
    solved) is taken away, and the rest renormalized. Raises ValueError when nothing is left.
    """
    if not conditions:
        return primal
    spanned = jnp.concatenate([jnp.reshape(c, (1, -1)) for c in conditions])
    width = jnp.reshape(primal, (1, -1)).shape[1]
    if spanned.shape[1] != width:
        raise ValueError(f"conditions have width {spanned.shape[1]}, the primal boundary {width}")
    vector = jnp.reshape(primal, (1, -1))
    precise = jax.lax.Precision.HIGHEST
    gram = jnp.matmul(spanned, spanned.T, precision=precise)
    share = jnp.matmul(spanned, vector.T, precision=precise)
    weights = jnp.linalg.lstsq(gram, share)[0]
    left = vector - jnp.matmul(weights.T, spanned, precision=precise)
    norm = jnp.linalg.norm(left)
    if not isinstance(norm, jax.core.Tracer) and not float(norm) > 1e-6:
        raise ValueError("the boundary lies in the span of its conditions; nothing is left to edit")
    return left / norm


def linear_interpolate(
    codes: jax.Array, boundary: jax.Array, start: float = -3.0, end: float = 3.0, steps: int = 10
) -> jax.Array:
    """`steps` codes along a direction: w [1, D] -> [steps, D], W+ [1, n, D] -> [steps, n, D].

    In W the distance to the boundary runs from `start` to `end` (the code's own is taken off); in
    W+ the same offsets are added to every layer.
    """
    if len(codes) != 1 or codes.ndim not in (2, 3):
        raise ValueError(f"one code [1, D] or [1, n, D] at a time, got {codes.shape}")
    unit = jnp.reshape(boundary, (1, -1))
    if unit.shape[1] != codes.shape[-1]:
        raise ValueError(f"a direction has width {codes.shape[-1]}, got {unit.shape[1]}")
    offsets = jnp.linspace(start, end, steps, dtype=codes.dtype)
    if codes.ndim == 2:
        offsets = offsets - jnp.matmul(codes, unit.T, precision=jax.lax.Precision.HIGHEST)[0, 0]
        return codes + offsets[:, None] * unit
    return codes + offsets[:, None, None] * unit


def move(
    codes: jax.Array,
    direction: jax.Array,
    alpha: float | jax.Array,
    layers: Sequence[int] | None = None,
    absolute: bool = False,
) -> jax.Array:
    """w + alpha n on a layer range (first, one past the last), codes [..., n, D] or [..., D].

    `direction` is normalized here. `absolute` moves every code to distance alpha from the boundary.
    """
    unit = check_direction(direction, codes.shape[-1]).astype(codes.dtype)
    step = jnp.asarray(alpha, codes.dtype)
    if absolute:
        step = step - (codes @ unit)[..., None]
    moved = codes + step * unit
    if layers is None:
        return moved
    first, last = layers
    count = codes.shape[-2]
    if not 0 <= first < last <= count:
        raise ValueError(f"layers ({first}, {last}) are no range within 0 .. {count}")
    chosen = (jnp.arange(count) >= first) & (jnp.arange(count) < last)
    return jnp.where(chosen[:, None], moved, codes)


def edit_clip(
    low: jax.Array,
    high: jax.Array,
    direction: jax.Array,
    alpha: float | jax.Array,
    layers: Sequence[int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(low', high'): one edit of a clip's codes, low [T, n_low, D] and high [n_high, D].

    The range counts layers of the whole code; the high part is edited once for all frames.
    """
    n_low, count = low.shape[-2], low.shape[-2] + high.shape[-2]
    first, last = (0, count) if layers is None else layers
    if not 0 <= first < last <= count:
        raise ValueError(f"layers ({first}, {last}) are no range within 0 .. {count}")
    if first < n_low:
        low = move(low, direction, alpha, (first, min(last, n_low)))
    if last > n_low:
        high = move(high, direction, alpha, (max(first - n_low, 0), last - n_low))
    return low, high


def mix_styles(ws: jax.Array, other: jax.Array, first: int) -> jax.Array:
    """Layers from `first` on taken from another code; ws [..., n, D], other [n, D] or like ws."""
    count = ws.shape[-2]
    if not 0 <= first <= count:
        raise ValueError(f"first {first} is no layer of 0 .. {count}")
    return jnp.where((jnp.arange(count) >= first)[:, None], other, ws)


def train_boundary(
    codes: np.ndarray,
    scores: np.ndarray,
    chosen: float = 0.02,
    split: float = 0.7,
    seed: int = 0,
) -> tuple[np.ndarray, float]:
    """(unit normal [1, D], validation accuracy) of a linear SVM between the extreme scores.

    codes [N, D], scores [N]; the `chosen` share of either side is used, 70 % of it for training.
    Raises ValueError when that leaves fewer than two codes a side.
    """
    from sklearn.svm import LinearSVC

    codes, scores = np.asarray(codes), np.asarray(scores).reshape(-1)
    if codes.ndim != 2 or len(codes) != len(scores):
        raise ValueError(f"codes [N, D] and scores [N], got {codes.shape} and {scores.shape}")
    count = int(len(codes) * chosen) if 0 < chosen < 1 else int(chosen)
    train = int(count * split)
    if train < 1 or count - train < 1:
        raise ValueError(
            f"{count} codes a side ({chosen} of {len(codes)}) are too few to train and validate on"
        )
    order = np.argsort(-scores, kind="stable")
    rng = np.random.default_rng(seed)
    positive, negative = rng.permutation(order[:count]), rng.permutation(order[-count:])

    def rows(part):
        chosen_rows = np.concatenate([positive[part], negative[part]])
        return codes[chosen_rows], np.repeat([1, 0], len(chosen_rows) // 2)

    machine = LinearSVC(C=1.0, loss="hinge", max_iter=20000, random_state=seed)
    machine.fit(*rows(slice(0, train)))
    accuracy = float(machine.score(*rows(slice(train, count))))
    normal = machine.coef_.reshape(1, -1)
    return (normal / np.linalg.norm(normal)).astype(codes.dtype), accuracy


def latent_norm(codes: jax.Array, average: jax.Array | None = None) -> jax.Array:
    """pSp's w norm: mean over the batch of the norm over layers and width of codes - average."""
    codes = codes if average is None else codes - average
    return _safe_norm(codes.reshape(len(codes), -1)).mean()


def delta_loss(codes: jax.Array) -> jax.Array:
    """e4e's delta regularizer: sum over layers i > 0 of the batch mean of |w_i - w_0|_2."""
    return _safe_norm(codes[:, 1:] - codes[:, :1]).mean(0).sum()


def _safe_norm(x: jax.Array) -> jax.Array:
    """|x|_2 over the last axis, with gradient zero at zero: e4e starts with equal codes."""
    squares = jnp.square(x).sum(-1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
