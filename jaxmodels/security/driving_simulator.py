"""A closed-loop road scene: background vehicles under an adversary's control meet an ego stack.

The ego perceives with noise and misses, tracks, follows by the intelligent driver model (M.
Treiber et al., arXiv cond-mat/0002177), steers by pure pursuit and brakes in an emergency; with a
forecaster (`ego_forecasts`) it also yields to vehicles that are expected to enter its way. Every
vehicle moves as a kinematic bicycle: x' = v cos th, y' = v sin th, th' = v tan(delta) / L, v' = a.
All of it is differentiable and can be vmapped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

LENGTH, WIDTH, WHEELBASE = 4.6, 1.9, 2.7  # m
LANE = 3.5  # m
STEER_LIMIT, BRAKE_LIMIT, DRIVE_LIMIT = 0.6, -8.0, 3.0
ADVERSARY_ACCELERATION, ADVERSARY_STEER = 4.0, 0.06
YIELD_BRAKING = -4.0  # m/s^2, the most for a vehicle that is only expected in the way
_REACH = 0.5 * (WIDTH + LANE) - 0.6  # a vehicle's middle this far sideways is in the ego's way
_FAR = 1e3
_TRIES = 2000  # places that are drawn for a scene's vehicles


@struct.dataclass
class Traffic:
    """Constants of a simulation; times in s, lengths in m.

    The IDM numbers are v0, T, s0, a_max, b of the specification. `noise`, `miss`: of perception.
    `look_ahead`: how far ahead an ego with forecasts looks for vehicles entering its way.
    """

    dt: float = struct.field(pytree_node=False, default=0.1)
    horizon: float = struct.field(pytree_node=False, default=8.0)
    lanes: int = struct.field(pytree_node=False, default=3)
    knots: int = struct.field(pytree_node=False, default=9)
    speed: float = struct.field(pytree_node=False, default=15.0)
    headway: float = struct.field(pytree_node=False, default=1.5)
    gap: float = struct.field(pytree_node=False, default=2.0)
    acceleration: float = struct.field(pytree_node=False, default=1.5)
    braking: float = struct.field(pytree_node=False, default=2.0)
    sight: float = struct.field(pytree_node=False, default=60.0)
    noise: float = struct.field(pytree_node=False, default=0.2)
    miss: float = struct.field(pytree_node=False, default=0.05)
    emergency_ttc: float = struct.field(pytree_node=False, default=1.0)
    look_ahead: float = struct.field(pytree_node=False, default=2.0)

    @property
    def steps(self) -> int:
        """Number of simulation steps."""
        return round(self.horizon / self.dt)


class Scene(NamedTuple):
    """Initial states [N + 1, 4] of (x, y, heading, speed), ego first; `lane_y`, its lane's middle;
    `noise` [steps, N] normal and `missed` [steps, N] uniform draws of perception."""

    states: jax.Array
    lane_y: jax.Array
    noise: jax.Array
    missed: jax.Array


class Rollout(NamedTuple):
    """`states` [steps + 1, N + 1, 4], `controls` [steps, N + 1, 2], `ttc` [steps], `braked` bool
    [steps]: the emergency brake acted; with a forecaster `forecasts` [steps, N, T, 2], where each
    step expected the others at the T steps after it."""

    states: jax.Array
    controls: jax.Array
    ttc: jax.Array
    braked: jax.Array
    forecasts: jax.Array | None = None


def check_traffic(traffic: Traffic) -> None:
    """Refuse simulations without time, road, knots or speed, and shares that are none."""
    if not traffic.dt > 0:
        raise ValueError(f"dt must be positive, got {traffic.dt:g}")
    if traffic.steps < 1:
        raise ValueError(f"horizon must cover a step of {traffic.dt:g} s, got {traffic.horizon:g}")
    for name, least in (("lanes", 1), ("knots", 2)):
        if getattr(traffic, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(traffic, name)}")
    for name in ("speed", "acceleration", "braking", "sight"):
        if not getattr(traffic, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(traffic, name):g}")
    for name in ("headway", "gap", "noise", "emergency_ttc", "look_ahead"):
        if not getattr(traffic, name) >= 0:
            raise ValueError(f"{name} must not be negative, got {getattr(traffic, name):g}")
    if not 0 <= traffic.miss < 1:
        raise ValueError(f"miss must lie in [0, 1), got {traffic.miss:g}")


def check_scene(states: Any) -> None:
    """Refuse scenes whose vehicles overlap at the start; states [N + 1, 4].

    Traced states pass: only their users know them.
    """
    if isinstance(states, jax.core.Tracer):
        return
    states = np.asarray(states)
    first, second = np.triu_indices(len(states), 1)
    # A scene may be a constant of a function that is being traced.
    with jax.ensure_compile_time_eval():
        gaps = np.asarray(separation(states[first], states[second]))
    if (gaps < 0).any():
        worst = int(gaps.argmin())
        raise ValueError(
            f"vehicles {first[worst]} and {second[worst]} overlap at the start of the scene"
        )


def sample_scene(seed: int, traffic: Traffic = Traffic(), vehicles: int = 3) -> Scene:  # noqa: B008
    """The scene of a seed: the ego in a middle lane, `vehicles` others around it, none touching.

    Raises ValueError for no vehicle, and for more than find room within 18 m behind and 32 m ahead.
    """
    check_traffic(traffic)
    if vehicles < 1:
        raise ValueError(f"a scene needs at least one other vehicle, got {vehicles}")
    rng = np.random.default_rng((2022, seed))
    lane = traffic.lanes // 2
    states = [[0.0, (lane + 0.5) * LANE, 0.0, traffic.speed]]
    for _ in range(_TRIES):
        if len(states) > vehicles:
            break
        own = int(rng.integers(traffic.lanes))
        new = [rng.uniform(-18, 32), (own + 0.5) * LANE, 0.0, rng.uniform(0.8, 1.1) * 15.0]
        clear = all(
            abs(new[0] - s[0]) > 3 * LENGTH if abs(new[1] - s[1]) < LANE / 2 else True
            for s in states
        )
        if clear:
            states.append(new)
    if len(states) <= vehicles:
        raise ValueError(
            f"no room for {vehicles} vehicles around the ego on {traffic.lanes} lanes; "
            f"{len(states) - 1} found a place"
        )
    shape = (traffic.steps, vehicles)
    return Scene(
        jnp.asarray(states, jnp.float32),
        jnp.float32((lane + 0.5) * LANE),
        jnp.asarray(rng.standard_normal(shape), jnp.float32),
        jnp.asarray(rng.uniform(size=shape), jnp.float32),
    )


def bicycle(state: jax.Array, control: jax.Array, dt: float) -> jax.Array:
    """One Euler step of states [..., 4] under (acceleration, steering) [..., 2]; v stays >= 0."""
    x, y, heading, v = jnp.moveaxis(state, -1, 0)
    a = jnp.clip(control[..., 0], BRAKE_LIMIT, DRIVE_LIMIT)
    delta = jnp.clip(control[..., 1], -STEER_LIMIT, STEER_LIMIT)
    return jnp.stack(
        [
            x + dt * v * jnp.cos(heading),
            y + dt * v * jnp.sin(heading),
            heading + dt * v * jnp.tan(delta) / WHEELBASE,
            jnp.maximum(v + dt * a, 0.0),
        ],
        -1,
    )


def idm(v, gap, closing, traffic: Traffic):
    """a_max [1 - (v / v0)^4 - (s* / s)^2], s* = s0 + max(0, v T + v dv / (2 sqrt(a_max b)))."""
    root = 2 * np.sqrt(traffic.acceleration * traffic.braking)
    wanted = traffic.gap + jnp.maximum(0.0, v * traffic.headway + v * closing / root)
    free = 1 - (v / traffic.speed) ** 4
    return traffic.acceleration * (free - (wanted / jnp.maximum(gap, 0.5)) ** 2)


def pure_pursuit(state: jax.Array, lane_y: jax.Array) -> jax.Array:
    """Steering towards the lane's middle, a look-ahead of max(5, 0.8 v) m away."""
    _, y, heading, v = state
    ahead = jnp.maximum(5.0, 0.8 * v)
    aim = jnp.arcsin(jnp.clip((lane_y - y) / ahead, -0.9, 0.9)) - heading
    return jnp.arctan(2 * WHEELBASE * jnp.sin(aim) / ahead)


def adversary_controls(knots: jax.Array, traffic: Traffic) -> jax.Array:
    """Knots [N, K, 2], any numbers -> controls [steps, N, 2] within the plausible limits.

    Squashed by tanh to |a| <= 4 m/s^2 and |delta| <= 0.06 rad, linear between knots.
    """
    limits = jnp.asarray([ADVERSARY_ACCELERATION, ADVERSARY_STEER])
    bounded = jnp.tanh(knots) * limits
    places = jnp.linspace(0, knots.shape[1] - 1, traffic.steps)
    low = jnp.minimum(jnp.floor(places).astype(jnp.int32), knots.shape[1] - 2)
    share = (places - low)[:, None, None]
    by_time = bounded.swapaxes(0, 1)
    return by_time[low] * (1 - share) + by_time[low + 1] * share


def simulate(
    scene: Scene,
    knots: jax.Array,
    traffic: Traffic = Traffic(),  # noqa: B008
    forecaster: Any = None,
) -> Rollout:
    """The scene under knots [N, K, 2] of the background vehicles, the ego stack in the loop.

    `forecaster` (see `ego_forecasts`) tells where the others will be from what the ego tracked of
    them; None is an ego that only looks at where they are.

    Raises ValueError, outside `jit`, for vehicles that overlap at the start.
    """
    check_traffic(traffic)
    check_scene(scene.states)
    background = adversary_controls(knots, traffic)
    dt = traffic.dt
    # x, y, speed along the road; a step back, since the first step predicts before it measures.
    first = scene.states[1:, :2].at[:, 0].add(-dt * scene.states[1:, 3])
    track = jnp.concatenate([first, scene.states[1:, 3:]], -1)
    memory = None if forecaster is None else _first_memory(scene, forecaster, traffic)

    def step(carry, at):
        states, track, memory = carry
        controls, noise, missed, number = at
        ego, others = states[0], states[1:]
        # Tracker: predict, then correct by what was seen (alpha-beta filter).
        predicted = track.at[:, 0].add(dt * track[:, 2])
        seen = (missed > traffic.miss) & (jnp.abs(others[:, 0] - ego[0]) < traffic.sight)
        measured = others[:, 0] + traffic.noise * noise
        error = measured - predicted[:, 0]
        corrected = jnp.stack(
            [
                predicted[:, 0] + 0.6 * error,
                0.4 * predicted[:, 1] + 0.6 * others[:, 1],
                predicted[:, 2] + 0.2 * error / dt,
            ],
            -1,
        )
        track = jnp.where(seen[:, None], corrected, predicted)
        # The lead is the nearest track ahead that reaches into the ego's way.
        ahead = track[:, 0] - ego[0]

        def following(in_way):
            """Acceleration behind the nearest one in the way, and the time to its collision."""
            distance = jnp.where(in_way, ahead, _FAR)
            lead = distance.argmin()
            gap = jnp.maximum(distance[lead] - LENGTH, 0.0)
            there = in_way.any()
            closing = jnp.where(there, ego[3] - track[lead, 2], 0.0)
            ttc = jnp.where(closing > 0.1, gap / jnp.maximum(closing, 0.1), _FAR)
            return idm(ego[3], jnp.where(there, gap, _FAR), closing, traffic), ttc

        in_way = (ahead > 0) & (jnp.abs(track[:, 1] - ego[1]) < _REACH)
        a, ttc = following(in_way)
        if forecaster is not None:
            memory = _remember(memory, ego, track, number, forecaster, traffic)
            entering = (ahead > 0) & expected_in_way(memory[1], ego, traffic)
            yielding, _ = following(in_way | entering)
            a = jnp.minimum(a, jnp.maximum(yielding, YIELD_BRAKING))
        brake = ttc < traffic.emergency_ttc
        a = jnp.where(brake, BRAKE_LIMIT, a)
        own = jnp.stack([a, pure_pursuit(ego, scene.lane_y)])
        controls = jnp.concatenate([own[None], controls])
        states = bicycle(states, controls, dt)
        forecasts = None if memory is None else memory[1]
        return (states, track, memory), (states, controls, ttc, brake, forecasts)

    at = (background, scene.noise, scene.missed, jnp.arange(traffic.steps))
    _, (states, *rest) = lax.scan(step, (scene.states, track, memory), at)
    return Rollout(jnp.concatenate([scene.states[None], states]), *rest)


def _first_memory(scene: Scene, forecaster: Any, traffic: Traffic):
    """(history [N + 1, To, 2], forecasts [N, T, 2]) of a scene in which all drove straight on."""
    _, _, heading, speed = scene.states.T
    direction = jnp.stack([jnp.cos(heading), jnp.sin(heading)], -1)
    back = traffic.dt * (jnp.arange(forecaster.observed) - forecaster.observed)
    moved = back[:, None] * (speed[:, None] * direction)[:, None]
    others = len(scene.states) - 1
    nothing = jnp.zeros((others, forecaster.horizon, 2))
    return scene.states[:, None, :2] + moved, nothing


def _remember(memory, ego, track, number, forecaster, traffic: Traffic):
    """The history with this step in it; forecasts renewed at every `replan`-th step."""
    history, forecasts = memory
    now = jnp.concatenate([ego[None, :2], track[:, :2]])
    history = jnp.concatenate([history[:, 1:], now[:, None]], 1)
    # In between they are those of the last time, moved on.
    older = jnp.concatenate([forecasts[:, 1:], forecasts[:, -1:]], 1)
    # Gradients run the network again instead of keeping every step's activations.
    renew = jax.checkpoint(lambda h: forecaster(h, traffic))
    forecasts = lax.cond(number % forecaster.replan == 0, renew, lambda _: older, history)
    return history, forecasts


def expected_in_way(forecasts: jax.Array, ego: jax.Array, traffic: Traffic) -> jax.Array:
    """Bool [N]: forecasts [N, T, 2] that reach into the way of an ego [4] driving straight on.

    Only those count that are ahead of it then, within the next `look_ahead` seconds.
    """
    steps = min(max(round(traffic.look_ahead / traffic.dt), 1), forecasts.shape[1])
    own = ego[0] + ego[3] * traffic.dt * jnp.arange(1, steps + 1)
    there = forecasts[:, :steps]
    near = jnp.abs(there[..., 1] - ego[1]) < _REACH
    return (near & (there[..., 0] > own)).any(-1)


class ForecastErrors(NamedTuple):
    """Meters: `average` over forecasts and steps, `final` at the last step. Scalars."""

    average: jax.Array
    final: jax.Array


def forecast_errors(rollout: Rollout, forecaster: Any) -> ForecastErrors:
    """How far the others were from where a rollout's forecasts expected them.

    Over the forecasts whose whole horizon lies within the rollout.
    """
    steps, _, horizon, _ = rollout.forecasts.shape
    if horizon > steps:
        raise ValueError(f"a forecast of {horizon} steps needs a rollout of as many, got {steps}")
    times = np.arange(0, steps - horizon + 1, forecaster.replan)
    places = times[:, None] + 1 + np.arange(horizon)
    truth = rollout.states[places, 1:, :2].swapaxes(1, 2)
    squares = jnp.square(rollout.forecasts[times] - truth).sum(-1)
    errors = jnp.sqrt(squares + 1e-12)
    return ForecastErrors(errors.mean(), errors[..., -1].mean())


def _corners(state):
    x, y, heading, _ = jnp.moveaxis(jnp.asarray(state), -1, 0)
    forward = jnp.stack([jnp.cos(heading), jnp.sin(heading)], -1)
    left = jnp.stack([-jnp.sin(heading), jnp.cos(heading)], -1)
    return jnp.stack([x, y], -1), forward, left


def separation(a: jax.Array, b: jax.Array) -> jax.Array:
    """Largest gap between two vehicles' boxes along their axes; negative where they overlap.

    States [..., 4] each -> [...]. Below zero it is minus the penetration depth.
    """
    center_a, forward_a, left_a = _corners(a)
    center_b, forward_b, left_b = _corners(b)
    between = center_b - center_a
    gaps = []
    for axis in (forward_a, left_a, forward_b, left_b):
        reach = 0.0
        for forward, left in ((forward_a, left_a), (forward_b, left_b)):
            reach = reach + LENGTH / 2 * jnp.abs((axis * forward).sum(-1))
            reach = reach + WIDTH / 2 * jnp.abs((axis * left).sum(-1))
        gaps.append(jnp.abs((axis * between).sum(-1)) - reach)
    return jnp.stack(gaps, -1).max(-1)


class Events(NamedTuple):
    """Per step [steps + 1]: gaps `ego_gap` [.., N], `others_gap` (smallest among background
    vehicles), `off_road` (how far the worst background vehicle leaves the road, m, <= 0 inside),
    and `ahead` [.., N]: how far the other's middle lies ahead of the ego's, in its frame."""

    ego_gap: jax.Array
    others_gap: jax.Array
    off_road: jax.Array
    ahead: jax.Array


def events(rollout: Rollout, traffic: Traffic = Traffic()) -> Events:  # noqa: B008
    """What matters of a rollout, differentiable."""
    ego, others = rollout.states[:, :1], rollout.states[:, 1:]
    count = others.shape[1]
    ego_gap = separation(jnp.broadcast_to(ego, others.shape), others)
    rows, columns = np.triu_indices(count, 1)
    if len(rows):
        others_gap = separation(others[:, rows], others[:, columns]).min(-1)
    else:
        others_gap = jnp.full(others.shape[0], _FAR)
    sideways = WIDTH / 2 * jnp.abs(jnp.cos(others[..., 2])) + LENGTH / 2 * jnp.abs(
        jnp.sin(others[..., 2])
    )
    road = traffic.lanes * LANE
    over = jnp.maximum(others[..., 1] + sideways - road, sideways - others[..., 1]).max(-1)
    heading = ego[..., 2]
    ahead = (others[..., 0] - ego[..., 0]) * jnp.cos(heading) + (
        others[..., 1] - ego[..., 1]
    ) * jnp.sin(heading)
    return Events(ego_gap, others_gap, over, ahead)


class Outcome(NamedTuple):
    """Verdict on one rollout, scalars: `score`, `collision` (valid), `reason` (an index into
    `REASONS`), `time` of the contact in s (the horizon if none), `min_ttc`."""

    score: jax.Array
    collision: jax.Array
    reason: jax.Array
    time: jax.Array
    min_ttc: jax.Array


REASONS = ("none", "collision", "emergency", "off_road", "others_touched", "rear_ended")
EMERGENCY_SCORE, ROUTE_SHARE = 0.5, 0.5


def judge(rollout: Rollout, traffic: Traffic = Traffic()) -> Outcome:  # noqa: B008
    """Score by the rules: 1 for a valid ego collision, 0.5 for an emergency stop (TTC < 1 s) or a
    failed route (less than half the free distance), else 0; what is not plausible scores 0.

    Not plausible are: a background vehicle off the road or touching another before the ego's
    contact, a contact in which the other's middle lies behind the ego's rear bumper, and one that
    is there before anything has moved.
    """
    seen = events(rollout, traffic)
    steps = seen.ego_gap.shape[0]
    touching = (seen.ego_gap < 0).any(-1)
    hit = touching.any()
    at = jnp.where(hit, touching.argmax(), steps - 1)
    until = jnp.arange(steps) <= at
    off = (until & (seen.off_road > 0)).any()
    others = (until & (seen.others_gap < 0)).any()
    who = seen.ego_gap[at].argmin()
    rear = hit & (seen.ahead[at, who] < -LENGTH / 2)
    valid = hit & (at > 0) & ~off & ~others & ~rear
    progress = rollout.states[-1, 0, 0] - rollout.states[0, 0, 0]
    failed = progress < ROUTE_SHARE * traffic.speed * traffic.horizon
    clean = ~off & ~others & ~hit
    emergency = clean & (rollout.braked.any() | failed)
    reason = jnp.select([off, others, rear, valid, emergency], [3, 4, 5, 1, 2], 0)
    return Outcome(
        jnp.where(valid, 1.0, jnp.where(emergency, EMERGENCY_SCORE, 0.0)),
        valid,
        reason,
        jnp.where(hit, at * traffic.dt, traffic.horizon),
        rollout.ttc.min(),
    )


class RouteMetrics(NamedTuple):
    """The ego's drive up to its first contact (C. Xu et al., SafeBench, arXiv 2206.09682), scalars.

    `off_road` m driven with a part beside the road; `distance` m, mean distance to the route;
    `incomplete`, share of the route that free driving would have covered and this did not; `time`
    s, how long it ran.
    """

    off_road: jax.Array
    distance: jax.Array
    incomplete: jax.Array
    time: jax.Array


def route_metrics(
    rollout: Rollout,
    lane_y: jax.Array,
    traffic: Traffic = Traffic(),  # noqa: B008
) -> RouteMetrics:
    """How well the ego kept to its route, the middle of its lane at `lane_y`."""
    ego, others = rollout.states[:, :1], rollout.states[:, 1:]
    touching = (separation(jnp.broadcast_to(ego, others.shape), others) < 0).any(-1)
    last = jnp.where(touching.any(), touching.argmax(), traffic.steps)
    running = jnp.arange(traffic.steps + 1) <= last
    x, y, heading, v = ego[:, 0].T
    sideways = WIDTH / 2 * jnp.abs(jnp.cos(heading)) + LENGTH / 2 * jnp.abs(jnp.sin(heading))
    beside = (y + sideways > traffic.lanes * LANE) | (y - sideways < 0)
    free = traffic.speed * traffic.horizon
    return RouteMetrics(
        (traffic.dt * v * (beside & running)).sum(),
        (jnp.abs(y - lane_y) * running).sum() / running.sum(),
        jnp.clip(1 - (x[last] - x[0]) / free, 0, 1),
        last * traffic.dt,
    )


def objective(rollout: Rollout, traffic: Traffic = Traffic()) -> jax.Array:  # noqa: B008
    """What the adversary lowers: the smallest smoothed gap to the ego over time, plus penalties.

    Contacts from behind count as farther away; leaving the road and touching others cost.
    """
    seen = events(rollout, traffic)
    behind = jax.nn.sigmoid((-LENGTH / 2 - seen.ahead + 0.5) / 0.5)
    gap = seen.ego_gap + 6.0 * behind
    temperature = 0.5
    nearest = -temperature * jax.nn.logsumexp(-gap.reshape(-1) / temperature)
    # Only what happens before the contact can make it implausible.
    touched = jnp.cumsum((seen.ego_gap < 0).any(-1)) > 0
    before = 1.0 - touched
    road = (before * jnp.square(jax.nn.relu(seen.off_road + 0.15))).sum()
    others = (before * jnp.square(jax.nn.relu(0.3 - seen.others_gap))).sum()
    return nearest + 3.0 * road + 3.0 * others
