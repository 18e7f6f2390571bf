"""The runs of a sweep: one `RunSpec` each, made from grids and checked before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from theory.closed_form import lr_from_eta_hat, separability, step_cap
from theory.dynamics import CONVERGED, check_rate
from theory.factorization import check_dims, check_scale
from theory.optimizers import Optimizer, make_optimizer
from theory.problem import KINDS, check_spectrum, data_count

GD = Optimizer("gd")
SWEPT_INITS = ("gaussian", "orthogonal", "identity", "balanced", "aligned", "uniform")
PADDED_RANK = 6  # spectra are padded with zeros to this length, so that R = 1..6 share a program


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """One run of a sweep; `id` is unique and stable, `label` is copied into runs.csv.

    sigma: the target's spectrum; lr or eta_hat (neither: eta_hat 0.3); cap: most steps (None: the
    benchmark's 6 (1.5 t_R + 500)); stop: loss at which the run counts as converged and ends (None:
    1e-4 sigma_R^2 for reconstruction without noise, else it runs to its cap; negative: never);
    observed: share of entries for completion; measurements: of sensing (None: three times the
    degrees of freedom); samples: of regression; target: an explicit matrix as nested tuples instead
    of a random one (with `mask` for completion).
    """

    id: str
    dims: tuple[int, ...]
    sigma: tuple[float, ...]
    alpha: float
    seed: int
    eta_hat: float | None = None
    lr: float | None = None
    cap: int | None = None
    stop: float | None = None
    problem: str = "reconstruction"
    init: str = "gaussian"
    symmetry: str = "general"
    optimizer: Optimizer = GD
    noise_std: float = 0.0
    observed: float = 0.7
    measurements: int | None = None
    samples: int = 40
    target: tuple | None = None
    mask: tuple | None = None
    label: tuple[tuple[str, Any], ...] = ()

    def check(self) -> None:
        """ValueError with one line that names the run and the field at fault."""
        try:
            shape = (self.dims[-1], self.dims[0])
            check_dims(self.dims, None if self.target is None else np.shape(self.target))
            check_spectrum(self.sigma, shape)
            check_scale(self.alpha, None, self.depth)
            if self.lr is not None:
                check_rate(self.lr, self.eta_hat, self.depth, None)
            elif not 0 < self.dimensionless_step < np.inf:
                raise ValueError(f"eta_hat: {self.eta_hat} must be positive and finite")
            if self.problem not in KINDS:
                raise ValueError(f"problem: unknown {self.problem!r}; one of {', '.join(KINDS)}")
            if self.init not in SWEPT_INITS:
                raise ValueError(
                    f"init: a sweep cannot draw {self.init!r}; one of {', '.join(SWEPT_INITS)}"
                )
            if not self.noise_std >= 0:
                raise ValueError(f"noise_std: {self.noise_std} must not be negative")
            if self.cap is not None and self.cap < 1:
                raise ValueError(f"cap: {self.cap} must be at least 1")
        except ValueError as error:
            raise ValueError(f"run {self.id}: {error}") from None

    @property
    def dimensionless_step(self) -> float | None:
        """eta_hat, or None where lr is given."""
        if self.lr is not None:
            return None
        return 0.3 if self.eta_hat is None else self.eta_hat

    @property
    def depth(self) -> int:
        return len(self.dims) - 1

    @property
    def step_size(self) -> float:
        """lr, from eta_hat where that is given (completion: times the observed count).

        Sensing and regression: in units of the drawn problem's curvature, by which the sweep
        divides it.
        """
        if self.lr is not None:
            return self.lr
        rate = lr_from_eta_hat(self.dimensionless_step, self.depth, self.sigma[0])
        return rate / self.loss_scale

    @property
    def rate_follows_draw(self) -> bool:
        """Whether `step_size` is divided by the drawn problem's curvature."""
        return self.lr is None and self.problem in ("sensing", "regression")

    @property
    def loss_scale(self) -> float:
        """Curvature of the loss where it is known beforehand: 1 / |Omega| for completion."""
        if self.problem != "completion":
            return 1.0
        if self.mask is not None:
            return 1.0 / float(np.sum(self.mask))
        return 1.0 / self.data_count

    @property
    def data_count(self) -> int:
        """Observed entries, measurements or samples."""
        return data_count(
            self.problem,
            (self.dims[-1], self.dims[0]),
            len(self.sigma),
            observed=self.observed,
            measurements=self.measurements,
            samples=self.samples,
        )

    @property
    def steps(self) -> int:
        """The cap in steps."""
        if self.cap is not None:
            return self.cap
        return step_cap(self.sigma, self.depth, self.alpha, self.step_size * self.loss_scale)

    @property
    def stop_level(self) -> float:
        if self.stop is not None:
            return self.stop
        if self.noise_std or self.problem != "reconstruction":
            return -1.0
        return self.converged_level * self.loss_scale

    @property
    def converged_level(self) -> float:
        """1e-4 sigma_R^2 above the loss of the best approximation that the widths allow."""
        width = min(self.dims)
        missed = self.sigma[width:] if self.problem == "reconstruction" else ()
        return CONVERGED * self.sigma[:width][-1] ** 2 + 0.5 * sum(s * s for s in missed)

    @property
    def width(self) -> int:
        """Padded length of sigma; a run's draws must not depend on the runs beside it."""
        return min(self.dims[0], self.dims[-1], max(PADDED_RANK, len(self.sigma)))

    def shape_key(self) -> tuple:
        """Runs with equal keys share one compiled program."""
        return (
            self.width,
            self.dims,
            self.problem,
            self.init,
            self.symmetry,
            self.optimizer,
            self.data_count,
            self.rate_follows_draw,
            self.target is not None,
        )


def make_specs(
    grid: Iterable[dict[str, Any]], *, dim: int = 10, prefix: str = "", **shared: Any
) -> list[RunSpec]:
    """Specs from dicts with keys `L`, `sigma`, `alpha`, `seed` and any `RunSpec` field."""
    specs = []
    for row in grid:
        row = {**shared, **row}
        depth = row.pop("L")
        dims = tuple(row.pop("dims", None) or [dim] * (depth + 1))
        optimizer = row.pop("optimizer", "gd")
        if isinstance(optimizer, str):
            optimizer = make_optimizer(optimizer, **row.pop("optimizer_kwargs", {}))
        sigma = check_spectrum(row.pop("sigma"))
        label = tuple(row.pop("label", {}).items())
        name = row.pop("id", None) or prefix + "_".join(
            [f"L{depth}", *(str(v) for _, v in label), f"R{len(sigma)}", f"s{row['seed']}"]
        )
        specs.append(RunSpec(name, dims, sigma, optimizer=optimizer, label=label, **row))
    return specs


def doubts(specs: Sequence[RunSpec]) -> list[str]:
    """One line for each kind of run that is not expected to show R stages."""
    count = len(specs)
    close = sum(separability(s.sigma, s.depth, s.alpha) < 1.25 for s in specs)
    past = sum((s.dimensionless_step or 0.0) >= 2 for s in specs)
    narrow = sum(min(s.dims) < len(s.sigma) for s in specs)
    lines = []
    if close:
        lines.append(
            f"separability index S < 1.25 in {close} of {count} runs: expect R stages or fewer "
            "there"
        )
    if past:
        lines.append(
            f"eta_hat >= 2 in {past} of {count} runs: past the edge of stability, expect no "
            "convergence there"
        )
    if narrow:
        lines.append(
            f"dims: bottleneck width below the target rank in {narrow} of {count} runs: M is "
            "unreachable there, and stages are counted up to the width"
        )
    return lines
