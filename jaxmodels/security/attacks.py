"""Every attack by name: `make("mi", eps=8 / 255)` and `attack(key, apply_fn, x, y, cfg)`.

All are pure functions of their arguments and can be jitted and vmapped; budgets, step sizes and
masks may be traced, so that another `eps` compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxmodels.security import perturbations
from jaxmodels.security.auto_pgd import AutoPGD, auto_pgd
from jaxmodels.security.gradient_attacks import GradientAttack, gradient_attack
from jaxmodels.security.input_transforms import (
    compose,
    cutout,
    diverse_input,
    gaussian_kernel,
    landmark_cutout,
)
from jaxmodels.security.optimization_attacks import (
    CarliniWagner,
    DeepFool,
    carlini_wagner,
    deepfool,
)
from jaxmodels.security.perturbations import feature_distance
from jaxmodels.security.query_attacks import (
    NES,
    Evolutionary,
    evolutionary_attack,
    nes_attack,
)
from jaxmodels.security.square_attack import Square, square_attack
from jaxmodels.spelling import did_you_mean

_RUN: dict[type, Callable] = {
    GradientAttack: gradient_attack,
    CarliniWagner: carlini_wagner,
    DeepFool: deepfool,
    AutoPGD: auto_pgd,
    Square: square_attack,
    NES: nes_attack,
    Evolutionary: evolutionary_attack,
}
# name: (class, what the name fixes)
ATTACKS: dict[str, tuple[type, dict[str, Any]]] = {
    # An L2 step along a tiny gradient is as long as any other.
    "fgsm": (GradientAttack, {"steps": 1, "norm_floor": 1e-12}),
    "bim": (GradientAttack, {}),
    "pgd": (GradientAttack, {"random_start": True}),
    "mi": (GradientAttack, {"momentum": 1.0}),
    "ni": (GradientAttack, {"momentum": 1.0, "nesterov": True}),
    "si_ni": (GradientAttack, {"momentum": 1.0, "nesterov": True, "scales": 5}),
    "di": (GradientAttack, {"momentum": 1.0, "transform": diverse_input}),
    "ti": (GradientAttack, {"momentum": 1.0}),
    "ti_di": (GradientAttack, {"momentum": 1.0, "transform": diverse_input}),
    "cim": (GradientAttack, {"momentum": 1.0, "transform": cutout}),
    "lgc": (GradientAttack, {"momentum": 1.0}),
    "vmi": (GradientAttack, {"momentum": 1.0, "variance_samples": 20}),
    "eot": (GradientAttack, {"draws": 8}),
    "cw": (CarliniWagner, {}),
    "deepfool": (DeepFool, {}),
    "apgd_ce": (AutoPGD, {"loss": "ce"}),
    "apgd_dlr": (AutoPGD, {"loss": "dlr"}),
    "square": (Square, {}),
    "nes": (NES, {}),
    "evolutionary": (Evolutionary, {}),
}
KERNEL_SIZE = 15  # of TI; 7 for faces
GOALS = ("dodging", "impersonation")
FACE_METHODS = ("fgsm", "bim", "mi", "di", "ti", "ti_di", "cim", "lgc", "vmi")


def make(name: str, **options: Any) -> Any:
    """The configuration of the attack `name`; `options` are fields of its class.

    `ti` and `ti_di` also take `kernel_size` and `sigmas`, `lgc` takes `landmarks` [B, L, 2],
    `cim` takes `side` and `di` takes `rate`, `probability` and `mode` (see `input_transforms`).

    Raises ValueError for unknown names and options, listing the choices.
    """
    if name not in ATTACKS:
        raise ValueError(
            f"no attack {name!r}{did_you_mean(name, ATTACKS)}; known: {', '.join(ATTACKS)}"
        )
    cls, fixed = ATTACKS[name]
    options = dict(options)
    fixed = dict(fixed)
    if name in ("ti", "ti_di"):
        size, sigmas = options.pop("kernel_size", KERNEL_SIZE), options.pop("sigmas", 3.0)
        fixed["kernel"] = gaussian_kernel(int(size), sigmas)
    if name == "lgc":
        if options.get("landmarks") is None:
            raise ValueError("lgc needs landmarks [B, L, 2] (column, row)")
        fixed["transform"] = partial(landmark_cutout, landmarks=options.pop("landmarks"))
    for takes, function, keys in (
        (("di", "ti_di"), diverse_input, ("rate", "probability", "mode")),
        (("cim",), cutout, ("side",)),
    ):
        given = {k: options.pop(k) for k in keys if name in takes and k in options}
        if given:
            fixed["transform"] = partial(function, **given)
    if name == "eot" and options.get("transform") is None:
        raise ValueError("eot needs transform, a function (key, x) -> x")
    known = list(cls.__dataclass_fields__)
    for key in options:
        if key not in known:
            raise ValueError(
                f"attack {name} has no option {key!r}{did_you_mean(key, known)}; it has "
                f"{', '.join(known)}"
            )
    cfg = cls(**{**fixed, **options})
    steps = getattr(cfg, "steps", getattr(cfg, "queries", 1))
    perturbations.check_budget(name, getattr(cfg, "eps", None), steps, getattr(cfg, "norm", "linf"))
    if getattr(cfg, "kappa", 0) < 0:
        raise ValueError(f"{name}: kappa must not be negative, got {cfg.kappa:g}")
    perturbations.check_mask(getattr(cfg, "mask", None))
    return cfg


def attack(
    key: jax.Array,
    apply_fn: Callable[[jax.Array], Any],
    x: jax.Array,
    y: Any,
    cfg: Any,
    *,
    labels: Any = None,
) -> Any:
    """Adversarial images of one attack; a `QueryResult` for the query-based ones.

    Args:
      key: random key. apply_fn: images [B, H, W, C] to outputs. x: images in [cfg.low, cfg.high].
      y: what `cfg.loss` compares outputs with: labels, target labels (`targeted`), features.
      cfg: from `make`, or one of the configuration classes.
      labels: the true ones, of a targeted attack, to be told where a target is the label already.
    """
    perturbations.check_targets(labels, y, getattr(cfg, "targeted", False))
    return _RUN[type(cfg)](key, apply_fn, x, y, cfg)


def auto_attack_lite(
    key: jax.Array, apply_fn: Callable, x: jax.Array, y: jax.Array, **options: Any
) -> jax.Array:
    """APGD-CE, then APGD-DLR on what it left: the worse of the two for each image."""
    first, second = jax.random.split(key)
    a = attack(first, apply_fn, x, y, make("apgd_ce", **options))
    b = attack(second, apply_fn, x, y, make("apgd_dlr", **options))
    fooled = (apply_fn(a).argmax(-1) == y) == options.get("targeted", False)
    return jax.numpy.where(fooled[:, None, None, None], a, b)


def face_attack(
    key: jax.Array,
    embed: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    target: Any,
    *,
    goal: str,
    method: str = "mi",
    norm: str = "linf",
    eps: float = 8.0,
    steps: int = 20,
    momentum: float = 1.0,
    high: float = 255.0,
    loss: Callable = feature_distance,
    **options: Any,
) -> jax.Array:
    """RobFR's attacks on unit features: the squared distance to `target` features grows or shrinks.

    Args:
      embed: faces [B, H, W, 3] in [0, high] to unit features [B, D] (or what `loss` takes).
      target: features [B, D] of one's own (dodging) or of the victim (impersonation). Features of x
        itself have no gradient to leave them by: take another photo, or `random_start=True`.
      method: one of `FACE_METHODS`; TI uses a 7x7 kernel, DI resizes at every step (nearest).
      eps: in pixel units; under `l2` the radius is eps sqrt(H W C), its root mean square.
      steps: each of 1.5 eps / steps; `fgsm` is one of eps.

    Source: RobFR/attack/{FGSM,BIM,MIM,TIM,base}.py of Face-Robustness-Benchmark@89f8ad7.
    """
    if goal not in GOALS:
        raise ValueError(f"goal {goal!r}; known: {', '.join(GOALS)}")
    if method not in FACE_METHODS:
        raise ValueError(f"face attack method {method!r}; known: {', '.join(FACE_METHODS)}")
    perturbations.check_budget(f"face {method}", eps, steps, norm)
    unit = np.sqrt(np.prod(x.shape[1:])) if norm == "l2" else 1.0
    if method == "fgsm":
        steps, step = 1, eps * unit
    else:
        step = 1.5 * eps / steps * unit
    if method in ("ti", "ti_di"):
        options.setdefault("kernel_size", 7)
    if method in ("di", "ti_di"):
        options = {"rate": 0.9, "probability": 1.0, "mode": "nearest", **options}
    if method not in ("fgsm", "bim"):
        options["momentum"] = momentum
    cfg = make(
        method,
        eps=eps * unit,
        step_size=step,
        steps=steps,
        norm=norm,
        targeted=goal == "impersonation",
        loss=loss,
        high=high,
        # Features that hardly depend on a pixel have gradients of 1e-9, which a summand of the
        # other attacks' size would shorten.
        **{"norm_floor": 1e-12, **options},
    )
    return attack(key, embed, x, target, cfg)


def transfer_transform(*names: str, **landmarks: Any) -> Callable:
    """Several input transforms in a row by name (`di`, `cim`, `lgc`), for one attack."""
    known = {"di": diverse_input, "cim": cutout}
    if "landmarks" in landmarks:
        known["lgc"] = partial(landmark_cutout, landmarks=landmarks["landmarks"])
    for name in names:
        if name not in known:
            raise ValueError(f"no transform {name!r}; known: {', '.join(known)}")
    return compose(*(known[name] for name in names))
