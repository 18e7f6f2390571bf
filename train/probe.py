"""Spectra of chosen weights during any training run: rank over time, as the theory measures it."""

from __future__ import annotations

import re

import jax
import numpy as np

from train.naming import ConfigError
from train.optimizers import path_string


class RankProbe:
    """Logs singular values and effective rank of parameters (or of products of them).

    Each entry of `config.probe.rank` is a regular expression that matches one or more kernels; an
    entry `a @ b` is the product of the two kernels. Convolutions are taken as [I * kh * kw, O].
    """

    def __init__(self, entries, reporter):
        self.entries, self.reporter = tuple(entries), reporter
        self._series: dict[str, list] = {}
        self._seen: list[tuple[int, float, float]] = []

    def look(self, step: int, params, metrics) -> None:
        """Log one row of kind `probe`: the effective rank and the leading singular values.

        `metrics` has the `loss` and `grad_norm` of the same rows, for the stage detectors.
        """
        from theory.quantities import effective_rank

        self._seen.append((step, float(metrics["loss"]), float(metrics["grad_norm"])))
        named = {path_string(p): v for p, v in jax.tree_util.tree_flatten_with_path(params)[0]}
        row = {}
        for entry in self.entries:
            for name, matrix in self._matrices(entry, named):
                values = np.linalg.svd(matrix, compute_uv=False)
                self._series.setdefault(name, []).append(values)
                row[f"effective_rank.{name}"] = float(effective_rank(values))
                for i, value in enumerate(values[:8]):
                    row[f"singular_{i + 1}.{name}"] = float(value)
        self.reporter.log(step, "probe", row)

    def finish(self) -> dict[str, float]:
        """Stages of every probed matrix by the theory's detectors, on the rows that were logged.

        The spectrum that counts as learned is the final one; rows between log points are not seen,
        so `log_every` is the resolution.
        """
        from theory.stages import detect

        if len(self._seen) < 3:
            return {}
        steps, loss, grad_norm = map(np.array, zip(*self._seen))
        numbers = {}
        for name, series in self._series.items():
            report = detect(grad_norm, loss, np.array(series), steps=steps)
            numbers[f"stages.{name}"] = report.n_stages
            numbers[f"plateaus.{name}"] = report.n_plateaus
        return numbers

    def _matrices(self, entry, named):
        parts = [p.strip() for p in entry.split(" @ ")]
        found = []
        for part in parts:
            names = [n for n, v in named.items() if v.ndim >= 2 and re.search(part, n)]
            if not names:
                raise ConfigError(f"config.probe.rank: no matrix matches {part!r}")
            found.append(names)
        if len(parts) == 1:
            return [(n, _matrix(named[n])) for n in found[0]]
        if any(len(names) > 1 for names in found):
            raise ConfigError(
                f"config.probe.rank: a factor of {entry!r} matches several parameters"
            )
        product = _matrix(named[found[0][0]])
        for names in found[1:]:
            product = product @ _matrix(named[names[0]])
        return [(entry.replace(" ", ""), product)]


def _matrix(kernel) -> np.ndarray:
    kernel = np.asarray(jax.device_get(kernel), np.float64)
    return kernel.reshape(-1, kernel.shape[-1])
