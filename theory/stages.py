"""Saddle-escape stages: detectors A (gradient valleys), B (spectral plateaus), C (certificate).

Two forms of A and B that agree: `detect` reads whole time series on the host (any series of
gradient norms, losses and singular values: training runs can use it); `theory.streaming` runs
inside `lax.scan` and judges every step.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

H_DECADES = 0.05
DELTA = 0.1
SWAP_DROP = 1e-3
GENUINE = 1.0  # certificate of an escape
KINDS = ("rank", "merged", "swap", "ring")


# --- detector A on a whole series ----------------------------------------------------------------


def zigzag(log10_signal: Any, h: float = H_DECADES) -> np.ndarray:
    """Valleys and peaks with hysteresis: rows (valley index, peak index, confirmed), [n, 3] int.

    log10_signal: [T], e.g. log10 of the gradient norm. A rise of h decades over the running
    minimum makes a valley, a fall of h under the running maximum confirms the escape; the last row
    has confirmed = 0 where a rise was never followed by a fall. Ties keep the first index.
    """
    series = np.asarray(log10_signal, dtype=np.float64)
    if series.ndim != 1 or series.size == 0:
        raise ValueError(f"log10_signal: shape {series.shape} is not a non-empty series [T]")
    if np.isnan(series).any():
        raise ValueError("log10_signal: contains NaN")
    rows = []
    rising, low, low_at, high, high_at = False, series[0], 0, 0.0, 0
    for t, value in enumerate(series.tolist()):
        if not rising:
            if value < low:
                low, low_at = value, t
            elif value >= low + h and value > low:
                rising, high, high_at = True, value, t
        elif value > high:
            high, high_at = value, t
        elif value <= high - h:
            rows.append((low_at, high_at, 1))
            rising, low, low_at = False, value, t
    if rising:
        rows.append((low_at, high_at, 0))
    return np.asarray(rows, dtype=np.int64).reshape(-1, 3)


def ordered_rank(singular_values: Any, sigma: Any) -> np.ndarray:
    """Largest r with s_i >= sigma_i / 2 for all i <= r; [..., k] and [R] to [...] int."""
    s, sigma = np.asarray(singular_values), np.asarray(sigma)
    s = s[..., : len(sigma)]
    reached = s >= 0.5 * sigma[: s.shape[-1]]
    return np.cumprod(reached, axis=-1).sum(axis=-1)


@dataclasses.dataclass(frozen=True)
class Escape:
    """One confirmed escape: it leaves the valley at `valley_step` and peaks at `peak_step`."""

    valley_step: int
    peak_step: int
    rank_before: int
    rank_after: int
    kind: str
    loss_drop: float  # (f(valley) - f(next valley or end)) / f(0)


@dataclasses.dataclass(frozen=True)
class StageReport:
    """What the detectors found in one run.

    escapes: `rank`, `merged` and `swap` escapes in order (rings are only counted);
    activation_steps: first step with s_r >= sigma_r / 2, None where never;
    plateau_visited: one flag for each r = 0..R-1; unfinished: (valley, peak) of a last rise that
    never fell, or None; reference: where sigma came from (`target` or `final iterate`);
    dropped_events: escapes that n_stages and n_swaps count though `escapes` has no room for them.
    """

    escapes: tuple[Escape, ...]
    n_stages: int
    n_swaps: int
    n_rings: int
    n_plateaus: int
    activation_steps: tuple[int | None, ...]
    plateau_visited: tuple[bool, ...]
    final_rank: int
    unfinished: tuple[int, int] | None
    sigma: tuple[float, ...]
    reference: str = "target"
    dropped_events: int = 0

    @property
    def rank_path(self) -> tuple[int, ...]:
        """Counted ranks along the run, e.g. (0, 1, 2, 3)."""
        path = [e.rank_after for e in self.escapes if e.kind in ("rank", "merged")]
        return (self.escapes[0].rank_before if self.escapes else self.final_rank, *path)


def escape_kind(rank_before: int, rank_after: int, loss_drop: float) -> str:
    """`rank`, `merged`, `swap` or `ring` (section 6 of the specification)."""
    if rank_after == rank_before + 1:
        return "rank"
    if rank_after > rank_before + 1:
        return "merged"
    return "swap" if loss_drop >= SWAP_DROP else "ring"


def reference_spectrum(final_singular_values: Any, tau_rel: float = 1e-3) -> tuple[float, ...]:
    """Stand-in for an unknown target spectrum: the final singular values above tau_rel * s_1."""
    s = np.asarray(final_singular_values, dtype=np.float64)
    s = np.sort(s)[::-1]
    kept = s[s > tau_rel * s[0]] if s.size and s[0] > 0 else s[:0]
    return tuple(kept.tolist())


def detect(
    grad_norm: Any,
    loss: Any,
    singular_values: Any,
    sigma: Sequence[float] | None = None,
    *,
    steps: Any = None,
    h: float = H_DECADES,
    delta: float = DELTA,
) -> StageReport:
    """Detectors A and B on time series of any run.

    grad_norm, loss: [T]; singular_values: [T, k], descending; sigma: reference spectrum [R], by
    default the final singular values above 1e-3 of the largest (the report says so); steps: [T]
    step numbers of the rows (default 0..T-1), in which the report is written.
    Raises ValueError where lengths differ, a value is not finite, or sigma has zeros.
    """
    grad_norm, loss, s = (
        np.asarray(a, dtype=np.float64) for a in (grad_norm, loss, singular_values)
    )
    if s.ndim != 2 or grad_norm.ndim != 1 or not len(grad_norm) == len(loss) == len(s):
        raise ValueError(
            f"series: grad_norm {grad_norm.shape}, loss {loss.shape} and singular_values {s.shape} "
            "must be [T], [T] and [T, k] of one length"
        )
    for name, array in (("grad_norm", grad_norm), ("loss", loss), ("singular_values", s)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: contains non-finite values")
    steps = np.arange(len(loss)) if steps is None else np.asarray(steps)
    reference = "target"
    if sigma is None:
        sigma, reference = reference_spectrum(s[-1]), "final iterate"
    sigma = np.asarray(sigma, dtype=np.float64)[: s.shape[1]]
    if (sigma <= 0).any():
        raise ValueError(f"sigma: {sigma.tolist()} must be positive")
    events = zigzag(np.log10(np.maximum(grad_norm, 1e-300)), h)
    confirmed = events[events[:, 2] == 1]
    rank = ordered_rank(s, sigma)
    marks = [*confirmed[:, 0].tolist(), len(loss) - 1]
    escapes = []
    for (valley, peak, _), following in zip(confirmed.tolist(), marks[1:]):
        drop = float((loss[valley] - loss[following]) / loss[0]) if loss[0] > 0 else 0.0
        before, after = int(rank[valley]), int(rank[following])
        kind = escape_kind(before, after, drop)
        escapes.append(Escape(int(steps[valley]), int(steps[peak]), before, after, kind, drop))
    active = s[:, : len(sigma)] >= 0.5 * sigma
    first = [int(steps[column.argmax()]) if column.any() else None for column in active.T]
    visited = plateaus(s[:, : len(sigma)], sigma, delta).any(axis=0)
    unfinished = events[events[:, 2] == 0]
    return make_report(
        escapes,
        n_rings=sum(e.kind == "ring" for e in escapes),
        activation_steps=first,
        visited=visited,
        final_rank=int(rank[-1]),
        unfinished=tuple(int(steps[i]) for i in unfinished[0, :2]) if len(unfinished) else None,
        sigma=sigma,
        reference=reference,
    )


def plateaus(s, sigma, delta, xp=np):
    """[..., R]: s_r >= (1 - delta) sigma_r (void for r = 0) and s_{r+1} <= delta sigma_{r+1}."""
    full = s >= (1.0 - delta) * sigma
    before = xp.concatenate([xp.ones_like(full[..., :1]), full[..., :-1]], axis=-1)
    return before & (s <= delta * sigma)


def make_report(
    escapes,
    *,
    n_rings,
    activation_steps,
    visited,
    final_rank,
    unfinished,
    sigma,
    dropped=(0, 0),
    **rest,
):
    """The report of these escapes; dropped: stages and swaps that were counted but not kept."""
    kept = tuple(e for e in escapes if e.kind != "ring")
    return StageReport(
        escapes=kept,
        n_stages=sum(e.kind in ("rank", "merged") for e in kept) + dropped[0],
        n_swaps=sum(e.kind == "swap" for e in kept) + dropped[1],
        n_rings=int(n_rings),
        n_plateaus=int(np.sum(visited)),
        activation_steps=tuple(activation_steps),
        plateau_visited=tuple(bool(v) for v in visited),
        final_rank=final_rank,
        unfinished=unfinished,
        sigma=tuple(float(v) for v in sigma),
        dropped_events=sum(dropped),
        **rest,
    )


# --- reading a trajectory ------------------------------------------------------------------------


def stages(trajectory: Any, sigma: Sequence[float] | None = None, **levels: float) -> StageReport:
    """Stage report of a `theory.simulate` trajectory.

    Uses the streaming detectors' result (every step judged) where the trajectory carries one and
    no other sigma is asked for; otherwise its recorded rows, with a warning where rows are sparse,
    and, without a sigma, ranks relative to the final iterate (`report.reference` says so).
    """
    if sigma is None and not levels and trajectory.detector is not None:
        from theory.streaming import detector_report  # built on this module

        return detector_report(trajectory.detector)
    rows = trajectory.rows
    for name in ("grad_norm", "loss", "singular_values"):
        if name not in rows:
            raise ValueError(f"record: {name!r} must be recorded to find stages")
    steps = np.asarray(rows["step"])
    if len(steps) > 1 and np.diff(steps).max() > 1:
        warnings.warn(
            f"stages are read from rows {int(np.diff(steps).max())} steps apart; short plateaus "
            "may be missed (record_every=1, or give simulate a sigma)",
            stacklevel=2,
        )
    if sigma is None:
        warnings.warn(
            "sigma: no target spectrum is known; ranks are relative to the final iterate",
            stacklevel=2,
        )
    return detect(
        rows["grad_norm"], rows["loss"], rows["singular_values"], sigma, steps=steps, **levels
    )


# --- detector C ----------------------------------------------------------------------------------


def certificate(steps: Any, lambda_min: Any, lr: Any) -> float:
    """I = sum over steps of eta * max(-lambda_min(H_t), 0) between valley and peak, trapezoid.

    steps, lambda_min: [n] with n >= 20 sampled points (fewer where the interval is shorter);
    lr: [] or [n]. Dimensionless; a genuine saddle escape has I >= 1 (`GENUINE`), an oscillation
    I << 1.
    """
    steps, values = np.asarray(steps, np.float64), np.asarray(lambda_min, np.float64)
    if steps.shape != values.shape or steps.size < 1:
        raise ValueError(f"lambda_min: shape {values.shape} is not that of steps {steps.shape}")
    rate = np.broadcast_to(np.asarray(lr, np.float64), values.shape) * np.maximum(-values, 0.0)
    return float(np.trapezoid(rate, steps)) if steps.size > 1 else 0.0


def confirm_swaps(report: StageReport, certificates: Mapping[int, float]) -> StageReport:
    """The report with the swaps that certificate C does not bear out counted as rings.

    With momentum or normalized steps a first overshoot can lose as much as a swap does
    (loss drop >= 1e-3), and `kind` alone cannot tell them apart. certificates: valley step of an
    escape -> I, as `theory.certify` gives it; a swap that is not in it is left as it is.
    """
    escapes = tuple(
        e
        for e in report.escapes
        if e.kind != "swap" or certificates.get(e.valley_step, GENUINE) >= GENUINE
    )
    lost = len(report.escapes) - len(escapes)
    return dataclasses.replace(
        report, escapes=escapes, n_swaps=report.n_swaps - lost, n_rings=report.n_rings + lost
    )


def sample_points(valley: int, peak: int, points: int = 24) -> np.ndarray:
    """At least 20 distinct steps from valley to peak (all of them where there are fewer)."""
    count = min(max(points, 20), peak - valley + 1)
    return np.unique(np.rint(np.linspace(valley, peak, count)).astype(np.int64))


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927)."""
    if total == 0:
        return (0.0, 1.0)
    from scipy.stats import norm

    z = float(norm.ppf(0.5 + confidence / 2))
    p = successes / total
    center = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    return (max(0.0, center - half), min(1.0, center + half))
