"""Deep matrix factorization: `python -m theory --config configs/dmf.py:PRESET --workdir DIR`.

Presets, with what they answer (wall times on two idle cores, see docs/theory.md):
  demo               rank 3, depth 3: three stages found and drawn            under 30 s
  run                the same with curvature, certificates, every figure      about 1 min
  defaults           1,008 fresh runs at the default setting                  minutes
  benchmark          the 3,580 runs of the stage benchmark, cell by cell      tens of minutes
  failures           the failure table, row by row                            minutes
  completion         test error and effective rank against alpha per depth    minutes
  edge_of_stability  the step sizes from 0.1 to 3 (in units of 1/lambda_max)  minutes
  optimizers         eight methods at L = 2 and 3                             minutes
  real_matrices      digits, wine, breast cancer, camera, two graphs          minutes
  depth_selection    which completion of a 2 x 2 diagonal depth selects       minutes
  divergent_norm     2 x 2 completion whose norm must diverge                 seconds
"""

import ml_collections

SWEEPS = {
    "defaults": "defaults",
    "benchmark": "benchmark",
    "failures": "failures",
    "completion": "completion",
    "edge_of_stability": "step_sizes",
    "optimizers": "optimizers",
    "depth_selection": "depth_selection",
}
PRESETS = ("demo", "run", *SWEEPS, "real_matrices", "divergent_norm")


def get_config(preset: str = "run") -> ml_collections.ConfigDict:
    """Config of one preset; every key can be set by --config.key=value."""
    if preset not in PRESETS:
        raise ValueError(f"config: unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    config = ml_collections.ConfigDict()
    config.preset = preset
    config.seed = 0
    if preset in SWEEPS:
        config.experiment = SWEEPS[preset]
        config.seeds = {
            "defaults": 42,
            "benchmark": 10,
            "failures": 6,
            "completion": 5,
            "edge_of_stability": 4,
            "optimizers": 4,
            "depth_selection": 20,
        }[preset]
        config.lanes = 32
        config.chunk = 128
        config.limit_minutes = 0.0  # 0: until all runs are done; the rest waits for the next start
        return config
    if preset == "real_matrices":
        config.names = (
            "digits,wine,breast_cancer,camera,wine_classes,breast_cancer_worst,"
            "karate,les_miserables"
        )
        config.depth = 3
        config.alpha = 1e-3
        config.hidden = 0.3
        config.steps = 6000
        return config
    config.problem = "reconstruction"
    config.depth = 3
    config.dim = 10
    config.dims = ()  # n_0, ..., n_L; empty: depth + 1 times dim
    config.rank = 3
    config.spectrum = "geometric(0.5)"
    config.sigma = ()  # for spectrum = explicit
    config.symmetry = "general"
    config.noise_std = 0.0
    config.observed = 0.7
    config.measurements = 0  # 0: three times the degrees of freedom
    config.samples = 40
    config.loss_norm = ""
    config.init = "gaussian"
    config.layer_scales = ()  # c_1, ..., c_L of init = unbalanced, with product 1
    config.alpha = 1e-4
    config.factor_scale = 0.0  # instead of alpha (set alpha to 0)
    config.optimizer = "gd"
    config.optimizer_kwargs = ml_collections.ConfigDict()
    config.lr = 0.0  # 0: from eta_hat
    config.eta_hat = 0.3
    config.steps = 0  # 0: the flow's time to learn the last mode, and a third more
    config.record_every = 0  # 0: about 400 rows (150 with curvature)
    config.curvature = preset == "run"
    config.inertia_tolerance = 0.0  # Hessian eigenvalues up to this count as zero
    config.certify = preset == "run"
    if preset == "divergent_norm":
        config.problem = "divergent_norm"
        config.init = "identity"  # det W > 0 at the start: W cannot reach det -1 at finite norm
        config.depth, config.dim, config.rank = 3, 2, 1
        config.alpha, config.steps = 1e-2, 200_000
        config.lr, config.eta_hat = 0.1, 0.0
    return config
