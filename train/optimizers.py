"""Schedules and optimizers from a config, by Optax where Optax has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from train.hf_adamw import hf_adamw, one_cycle
from train.naming import ConfigError, nearest
from train.ranger import ranger

SCHEDULES = (
    "constant",
    "cosine",
    "step",
    "polynomial",
    "one_cycle",
    "inverse_sqrt",
    "linear_segments",
)
# Optimizers that Optax does not have.
OWN = {"hf_adamw": hf_adamw, "ranger": ranger}


def make_schedule(config, steps: int) -> optax.Schedule:
    """Learning rate as a function of the step (an int or an int array).

    Cosine with `warmup_inside` is timm's: `init + t (peak - init) / warmup` for t < warmup, then
    `end + (peak - end) (1 + cos(pi t / steps)) / 2` with t counted from the start of the run;
    `hold_for` evaluates it only at multiples of that many steps (timm: once an epoch).
    `step` multiplies by `factor` (one number, or one for each) at the steps `boundaries`.
    `inverse_sqrt` is fairseq's: `peak sqrt(warmup / t)` after the warm-up. `linear_segments` goes
    in straight lines through `rates` at the steps `boundaries`.
    """
    if config.name not in SCHEDULES:
        raise ConfigError(
            f"config.schedule.name: no schedule {config.name!r}; {nearest(config.name, SCHEDULES)}"
        )
    peak, end, warmup = config.peak, config.end, config.warmup_steps
    offset = 0 if config.warmup_inside else warmup
    span = max(steps - offset, 1)
    if config.name == "constant":
        body = optax.constant_schedule(peak)
    elif config.name == "cosine":

        def body(t):
            t = jnp.clip(t, 0, span)
            return end + 0.5 * (peak - end) * (1.0 + jnp.cos(jnp.pi * t / span))
    elif config.name == "step":
        factors = config.factor
        if not isinstance(factors, Sequence):
            factors = [factors] * len(config.boundaries)
        if len(factors) != len(config.boundaries):
            raise ConfigError("config.schedule.factor: step needs one number, or one a boundary")
        body = optax.piecewise_constant_schedule(
            peak, {int(b) - offset: f for b, f in zip(config.boundaries, factors)}
        )
    elif config.name == "one_cycle":
        # PyTorch's with div_factor 1: flat, then linear; a cycle's step is `hold_for` updates.
        cycles = -(-steps // config.hold_for)

        def body(t):
            step = t // config.hold_for
            return one_cycle(step, peak, peak, end, steps=cycles, pct_start=config.pct_start)
    elif config.name == "linear_segments":
        if len(config.rates) != len(config.boundaries) or not config.rates:
            raise ConfigError("config.schedule.rates: linear_segments needs one for each boundary")
        places, rates = jnp.asarray(config.boundaries, float), jnp.asarray(config.rates, float)

        def body(t):
            return jnp.interp(jnp.asarray(t, float), places, rates)
    elif config.name == "inverse_sqrt":
        if not warmup:
            raise ConfigError("config.schedule.warmup_steps: inverse_sqrt needs at least 1")

        def body(t):
            return peak * jnp.sqrt(warmup / jnp.maximum(t + offset, warmup))
    else:
        body = optax.polynomial_schedule(peak, end, config.power, span)

    def schedule(step):
        t = step // config.hold_for * config.hold_for
        if not warmup:
            return body(t)
        ramp = config.warmup_init + t * (peak - config.warmup_init) / warmup
        return jnp.where(t < warmup, ramp, body(t - offset))

    return schedule


def path_string(path) -> str:
    """A pytree path as the dotted name a checkpoint would use."""
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def decay_mask(rule: str) -> Callable:
    """Which parameters decay: `all`, `matrices` (ndim > 1, as in timm), or a regex on paths.

    Layers that a scan stacks (a name with "*") have an axis more, which does not count.
    """

    def mask(params):
        def choose(path, leaf):
            if rule == "all":
                return True
            name = path_string(path)
            if rule == "matrices":
                return leaf.ndim - ("*" in name) > 1
            return re.search(rule, name) is not None

        return jax.tree_util.tree_map_with_path(choose, params)

    return mask


def make_optimizer(config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, weight decay, the named Optax optimizer, frozen parameters: in this order."""
    factory = OWN.get(config.name) or getattr(optax, config.name, None)
    if factory is None or config.name.startswith("_"):
        known = ("sgd", "adam", "adamw", "adagrad", "adafactor", "lamb", "lars", "lion", "rmsprop")
        known = (*known, *OWN)
        raise ConfigError(
            f"config.optimizer.name: no optimizer {config.name!r}; {nearest(config.name, known)}"
        )
    args = config.args.to_dict() if hasattr(config.args, "to_dict") else dict(config.args)
    try:
        if config.get("groups", ()):
            inner = grouped(lambda rate: factory(rate, **args), schedule, tuple(config.groups))
        else:
            inner = factory(schedule, **args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.optimizer.args: {error}") from None
    parts = []
    if config.clip_norm:
        parts.append(clip_by_group_norms(config.clip_norm, tuple(config.clip_groups)))
    if config.weight_decay and not config.decoupled:
        parts.append(optax.add_decayed_weights(config.weight_decay, decay_mask(config.decay_mask)))
        # What some parameters decay more than others is added to that.
        parts += [
            optax.add_decayed_weights(config.weight_decay * (factor - 1), decay_mask(pattern))
            for pattern, factor in config.get("decay_factors", ())
        ]
    parts.append(inner)
    for key in ("decay_factors", "groups"):
        if config.weight_decay and config.decoupled and config.get(key, ()):
            raise ConfigError(
                f"config.optimizer.{key}: decoupled weight decay knows one rate for all parameters"
            )
    if config.weight_decay and config.decoupled:
        # After the optimizer, scaled by the same rate: w <- w - lr * wd * w.
        mask = decay_mask(config.decay_mask)
        parts.append(_decoupled_decay(config.weight_decay, schedule, mask))
    optimizer = optax.chain(*parts)
    if config.freeze:
        pattern = re.compile(config.freeze)

        def label(params):
            return jax.tree_util.tree_map_with_path(
                lambda p, _: "frozen" if pattern.search(path_string(p)) else "trained", params
            )

        optimizer = optax.multi_transform(
            {"trained": optimizer, "frozen": optax.set_to_zero()}, label
        )
    return optimizer


def grouped(
    make: Callable[[optax.Schedule], optax.GradientTransformation],
    schedule: optax.Schedule,
    groups: tuple[tuple[str, float, int], ...],
) -> optax.GradientTransformation:
    """An optimizer for each group of parameters, at a rate of its own and from a step of its own.

    Args:
      make: the optimizer with a given schedule.
      schedule: learning rate of parameters in no group.
      groups: (regular expression over dotted paths, factor of the rate, first step at which the
        group moves); the first that matches decides. Until its first step a group's parameters
        and optimizer state stay as they are, as with PyTorch's `requires_grad=False`.
    """
    names = [str(i) for i in range(len(groups))]

    def label(params):
        def choose(path, _):
            name = path_string(path)
            return next((n for n, g in zip(names, groups) if re.search(g[0], name)), "")

        return jax.tree_util.tree_map_with_path(choose, params)

    def scaled(factor, first):
        return _from_step(make(lambda count: factor * schedule(count + first)), first)

    inner = {n: scaled(float(factor), int(first)) for n, (_, factor, first) in zip(names, groups)}
    return optax.multi_transform({**inner, "": make(schedule)}, label)


def _from_step(inner: optax.GradientTransformation, first: int) -> optax.GradientTransformation:
    if not first:
        return inner

    def init(params):
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32)), inner.init(params)

    def update(updates, state, params=None):
        clock, before = state
        moves = clock.count >= first
        updates, after = inner.update(updates, before, params)
        updates = jax.tree.map(lambda u: jnp.where(moves, u, 0), updates)
        after = jax.tree.map(lambda a, b: jnp.where(moves, a, b), after, before)
        return updates, (optax.ScaleByScheduleState(count=clock.count + 1), after)

    return optax.GradientTransformation(init, update)


def clip_by_group_norms(limit: float, groups: tuple[str, ...] = ()) -> optax.GradientTransformation:
    """Clipping by the global norm, of each group of parameters on its own.

    `groups` are regular expressions over dotted paths; the first that matches decides, and what
    none matches is a group as well. A group written `!EXPRESSION` is left as it is. Without any it
    is `optax.clip_by_global_norm`.
    """
    if not groups:
        return optax.clip_by_global_norm(limit)

    def label(params):
        def choose(path, _):
            name = path_string(path)
            return next((g for g in groups if re.search(g.removeprefix("!"), name)), "")

        return jax.tree_util.tree_map_with_path(choose, params)

    def transform(group):
        return optax.identity() if group.startswith("!") else optax.clip_by_global_norm(limit)

    return optax.multi_transform({g: transform(g) for g in (*groups, "")}, label)


def _decoupled_decay(weight_decay, schedule, mask):
    def init(params):
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params):
        rate = schedule(state.count) * weight_decay
        updates = jax.tree.map(
            lambda u, p, m: u - rate * p if m else u, updates, params, mask(params)
        )
        return updates, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init, update)
