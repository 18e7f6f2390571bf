"""Deep matrix factorization: dynamics, landscape, stages, figures.

The notebook's API: `simulate` runs the discrete dynamics, `stages` reads the saddle-escape stages
of a trajectory, `hessian_spectrum` looks at one point, `plot` draws the figures. Float64 is the
default of the field: enable it first with `jax.config.update("jax_enable_x64", True)`.
"""

from theory import platform_choice  # noqa: F401 - before anything imports jax
from theory.dynamics import Trajectory, certify, simulate, simulate_aligned
from theory.factorization import initialize
from theory.landscape import hessian_spectrum
from theory.problem import Problem, make_problem, random_problem
from theory.stages import StageReport, confirm_swaps, detect, stages

__all__ = [
    "Problem",
    "StageReport",
    "Trajectory",
    "certify",
    "confirm_swaps",
    "detect",
    "hessian_spectrum",
    "initialize",
    "make_problem",
    "plot",
    "random_problem",
    "simulate",
    "simulate_aligned",
    "stages",
]


def plot(trajectory, directory=None, **options):
    """Figures 1-5 and 8 of one trajectory; see `theory.figures.plot` (imports matplotlib late)."""
    from theory.figures import plot as draw

    return draw(trajectory, directory, **options)
