"""The driving track against the project's own systems: forecasts, streets, their networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxmodels.driving import camera_renderer, driving_scene
from jaxmodels.driving.frame_detector import STRIDES, FrameDetector, decode, resize_image
from jaxmodels.driving.image_patches import crop_and_resize, grow_boxes
from jaxmodels.driving.patch_classifier import PatchClassifier
from jaxmodels.driving.traced_vectorization import to_road, vectorize_tracks
from jaxmodels.driving.vectorization import to_city, vectorize
from jaxmodels.driving.vectornet import VectorNet
from jaxmodels.security import street_renderer as street
from jaxmodels.security.camera_victims import frame_victim, patch_victim
from jaxmodels.security.driving_simulator import (
    Scene,
    Traffic,
    expected_in_way,
    forecast_errors,
    simulate,
)
from jaxmodels.security.ego_forecasts import ConstantVelocity, NetworkForecaster, road_lanes
from jaxmodels.security.scenario_search import search
from jaxmodels.security.trajectory_attack import TrajectoryAttack, attack_track, departures
from jaxmodels.security.vehicle_detector import attack_objective, detected
from train.data import highway_traffic

CALM = Traffic(noise=0.0, miss=0.0, horizon=4.0)


def filled(module, *inputs, seed=0):
    """Variables of a module as random numbers, variances positive."""
    rng = np.random.default_rng(seed)
    tree = jax.eval_shape(module.init, jax.random.key(0), *inputs)

    def draw(path, leaf):
        value = rng.normal(0, 0.3, leaf.shape).astype(np.float32)
        return np.abs(value) + 0.5 if path[-1].key in ("var", "scale") else value

    return jax.tree_util.tree_map_with_path(draw, tree)


# Vectors under jit


def test_vectors_of_every_vehicle_are_those_of_the_data_pipeline():
    scene = highway_traffic.simulate(5)
    tracks = scene.tracks[:, :20] - scene.tracks[0, 19]
    lanes = np.stack(scene.lanes) - scene.tracks[0, 19]
    # Pieces that meet are equally near: apart, their order does not hang on rounding.
    lanes += np.random.default_rng(1).normal(0, 0.05, lanes.shape)
    tracks[-1] += 200.0  # too far away to count
    attributes = np.random.default_rng(0).integers(-1, 2, (len(lanes), 3))
    options = dict(radius=65.0, heading_min_disp=0.3, max_polylines=9, max_vectors=12, columns=14)
    run = jax.jit(lambda t, lane, a: vectorize_tracks(t, lane, a, **options))
    found = run(jnp.asarray(tracks), jnp.asarray(lanes), jnp.asarray(attributes))
    for target in range(len(tracks)):
        want = vectorize(tracks, np.ones(tracks.shape[:2], bool), target, lanes, attributes,
                         obs=20, **options)  # fmt: skip
        np.testing.assert_array_equal(found.vector_mask[target], want.vector_mask)
        np.testing.assert_allclose(found.vectors[target], want.vectors, atol=2e-4)
        np.testing.assert_allclose(found.heading[target], want.heading, atol=1e-5)
    positions = jnp.asarray(np.random.default_rng(1).normal(0, 9, (len(tracks), 3, 2)))
    back = to_road(positions, found)
    want = to_city(positions[1], found.origin[1], float(found.heading[1]))
    np.testing.assert_allclose(back[1], want, atol=1e-4)
    with pytest.raises(ValueError, match="columns = 11: 2 coordinates need at least 12"):
        vectorize_tracks(jnp.zeros((1, 3, 2)), jnp.zeros((1, 2, 2)), jnp.zeros((1, 3)), columns=11)


def test_highway_vehicles_keep_apart_and_on_the_road():
    changed = 0
    for seed in range(6):
        scene = highway_traffic.simulate((0, seed))
        again = highway_traffic.simulate((0, seed))
        np.testing.assert_array_equal(scene.tracks, again.tracks)
        x, y = np.moveaxis(scene.tracks, -1, 0)
        assert (y > 0).all() and (y < highway_traffic.LANES * 3.5).all()
        apart = (np.abs(x[:, None] - x[None]) > 3.5) | (np.abs(y[:, None] - y[None]) > 1.7)
        assert (apart | np.eye(len(x), dtype=bool)[..., None]).all()
        changed += (np.abs(y[:, -1] - y[:, 0]) > 2).sum()
    assert changed


# An ego that looks ahead


def scene_of(*others, traffic=CALM):
    states = jnp.asarray([(0.0, 5.25, 0.0, 15.0), *others], jnp.float32)
    shape = (traffic.steps, len(others))
    return Scene(states, jnp.float32(5.25), jnp.zeros(shape), jnp.ones(shape))


def entering(steer):
    """Knots [1, 9, 2] of a vehicle that steers right for a while and then back."""
    wheel = np.zeros(9)
    wheel[1:3], wheel[4:6] = -steer, steer
    values = np.arctanh(np.stack([np.zeros(9), wheel / 0.06], -1).clip(-0.99, 0.99))
    return jnp.asarray(values[None], jnp.float32)


def test_an_ego_with_forecasts_brakes_before_a_vehicle_enters_its_way():
    scene, knots = scene_of((6.0, 8.75, 0.0, 15.0)), entering(0.03)
    run = jax.jit(simulate, static_argnums=2)
    plain = run(scene, knots, CALM)
    ahead = run(scene, knots, CALM, ConstantVelocity())
    assert plain.forecasts is None and ahead.forecasts.shape == (40, 1, 30, 2)
    slower = np.asarray(plain.states[:, 0, 3] - ahead.states[:, 0, 3])
    first = int(np.argmax(slower > 0.2))
    inside = np.abs(np.asarray(plain.states[:, 1, 1]) - 5.25) < 2.1
    assert 0 < first < int(np.argmax(inside))
    # Who goes straight on is expected where it will be, and nobody yields to it.
    calm = run(scene, jnp.zeros_like(knots), CALM, ConstantVelocity())
    errors = forecast_errors(calm, ConstantVelocity())
    assert errors.average < 0.01 and errors.final < 0.01
    assert forecast_errors(ahead, ConstantVelocity()).final > 1
    np.testing.assert_allclose(calm.states[:, 0, 3], 15.0, atol=0.1)


def test_only_what_is_ahead_then_is_in_the_way():
    ego = jnp.array([0.0, 5.25, 0.0, 10.0])
    steps = jnp.arange(1, 31)
    faster = jnp.stack([5 + 1.2 * steps, 8.75 - 0.2 * steps], -1)
    slower = faster.at[:, 0].set(5 + 0.2 * steps)  # overtaken before it gets there
    beside = faster.at[:, 1].set(8.75)
    got = expected_in_way(jnp.stack([faster, slower, beside]), ego, CALM)
    np.testing.assert_array_equal(got, [True, False, False])


SMALL_NET = VectorNet(sub_width=4, sub_depth=1, global_width=4, dec_width=4, horizon=20)


def network(max_polylines=12):
    variables = filled(
        SMALL_NET, jnp.zeros((1, 2, 3, 12)), jnp.ones((1, 2, 3), bool), jnp.zeros(1, int)
    )
    return NetworkForecaster(variables, SMALL_NET, max_polylines=max_polylines)


def test_the_networks_forecasts_are_those_of_its_own_pipeline():
    rng = np.random.default_rng(2)
    start = np.asarray([[0.0, 5.25], [12.0, 8.75], [-20.0, 1.75]])
    history = start[:, None] + np.cumsum(rng.uniform(0.5, 1.5, (3, 20, 2)) * [1, 0.02], 1)
    traffic, forecaster = Traffic(), network()
    got = jax.jit(lambda h: forecaster(h, traffic))(jnp.asarray(history, jnp.float32))
    lanes = np.asarray(road_lanes(history[0, -1, 0], traffic, 65.0))
    apply = jax.jit(SMALL_NET.apply)
    for target in (1, 2):
        scene = vectorize(
            history, np.ones((3, 20), bool), target, lanes, np.zeros((len(lanes), 3)),
            heading_min_disp=0.3, max_polylines=12,
        )  # fmt: skip
        found = apply(
            forecaster.variables, scene.vectors[None], scene.vector_mask[None], jnp.zeros(1, int)
        )
        want = to_city(found.positions[0], scene.origin, scene.heading)
        np.testing.assert_allclose(got[target - 1], want, atol=2e-3)


def test_the_adversarys_gradients_go_through_the_network():
    brief, forecaster = CALM.replace(horizon=2.0), network(8)
    scene = scene_of((6.0, 8.75, 0.0, 15.0), traffic=brief)

    @jax.jit
    @jax.grad
    def slope(knots):
        return forecast_errors(simulate(scene, knots, brief, forecaster), forecaster).average

    found = slope(entering(0.02))
    assert np.isfinite(found).all() and np.abs(found).max() > 1e-4


# Tracks that deceive


def test_departures_are_drivable_and_bounded():
    cfg = TrajectoryAttack(deviation=0.5, acceleration=2.0)
    run = jax.jit(lambda knots: departures(knots, jnp.float32(0.7), 20, 0.1, cfg))
    for scale in (0.1, 50.0):
        moved = np.asarray(run(scale * jax.random.normal(jax.random.key(0), (5, 2))))
        assert np.linalg.norm(moved, axis=-1).max() <= 0.5 + 1e-5
        extra = np.diff(moved, 2, axis=0) / 0.01
        assert np.linalg.norm(extra, axis=-1).max() <= 2 * np.sqrt(2) + 1e-2


@pytest.mark.parametrize("method", ["gradient", "cem", "random"])
def test_a_departure_makes_the_forecaster_wrong(method):
    scene = highway_traffic.simulate(3)
    tracks = jnp.asarray(scene.tracks[:, :20] - scene.tracks[0, 19], jnp.float32)
    truth = jnp.asarray(scene.tracks[0, 20:] - scene.tracks[0, 19], jnp.float32)
    constant = ConstantVelocity()

    def forecast(tracks):
        return constant(tracks[jnp.array([0, 0])], CALM)[0]

    cfg = TrajectoryAttack(method=method, restarts=6, iterations=8)
    run = jax.jit(lambda key, cfg: attack_track(key, forecast, tracks, truth, cfg))
    found = run(jax.random.key(0), cfg)
    assert found.average > found.clean_average + 1 and found.final > found.clean_final + 1
    assert float(jnp.abs(found.track - tracks[0]).max()) <= 1.0
    if method == "random":
        ends = [
            found.track[-1, 1] + 3 * (found.track[-1, 1] - found.track[-11, 1])
            for side in ("left", "right")
            for found in [run(jax.random.key(0), cfg.replace(objective=side))]
        ]
        assert ends[0] > ends[1] + 2


def test_mistakes_of_a_trajectory_attack_are_named():
    def run(**options):
        args = jax.random.key(0), lambda t: t[0, -3:], jnp.zeros((1, 5, 2)), jnp.zeros((3, 2))
        return attack_track(*args, TrajectoryAttack(**options))

    for options, message in (
        ({"objective": "up"}, "objective 'up'; known: average"),
        ({"method": "pso"}, "search method 'pso'; known: gradient"),
        ({"iterations": 0}, "restarts and iterations must be positive, got 8 and 0"),
        ({"deviation": 0.0}, "deviation and acceleration must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options)
    with pytest.raises(ValueError, match="search method 'pso'"):
        search(jax.random.key(0), scene_of((6.0, 8.75, 0.0, 15.0)), CALM, method="pso")


# Streets

CAMERA = camera_renderer.front_camera(0.08)
PAINT = np.array([0.2, 0.5, 0.8])


@pytest.fixture(scope="module")
def frames():
    """Two streets with the lead vehicle near and farther away."""
    scenes = [driving_scene.sample_scene(seed) for seed in (3, 4)]
    poses = [street.LeadPose(8.0, 0.3, 0.1), street.LeadPose(13.0, -0.5, -0.1)]
    return scenes, poses, street.trace_frames(scenes, poses, CAMERA, PAINT)


def test_a_plain_texture_gives_the_renderers_own_picture(frames):
    scenes, poses, traced = frames
    plain = jnp.broadcast_to(jnp.asarray(PAINT, jnp.float32), (16, 16, 3))
    rendered = jax.jit(street.photograph)(
        traced, plain, jnp.array([0.9, 1.1]), jnp.zeros(traced.base.shape)
    )
    for i, exposure in enumerate((0.9, 1.1)):
        scene = street.with_lead(scenes[i], poses[i], PAINT)
        layers = camera_renderer.trace(scene, CAMERA, np.random.default_rng((i, 1)))
        blur = (camera_renderer.BLUR, camera_renderer.BLUR, 0)
        want = np.clip(exposure * ndimage.gaussian_filter(layers.color, blur), 0, 1)
        np.testing.assert_allclose(rendered.images[i], want, atol=2e-3)
        labels = camera_renderer.labels_2d(
            scene, camera_renderer.Picture(None, layers.surface, layers.covered)
        )
        own = labels.ids == scene.ids[-1]
        np.testing.assert_array_equal(traced.boxes[i], labels.boxes[own][0])


def test_a_texture_lies_upright_on_the_rear(frames):
    _, _, traced = frames
    texture = np.zeros((16, 16, 3), np.float32)
    texture[:, :8, 0] = 1  # red on the left
    texture[8:, :, 2] = 1  # blue below
    shown = np.asarray(traced.gain[0, ..., None]) * np.asarray(
        jax.vmap(lambda p: street.grid_sample(jnp.asarray(texture), p))(traced.points)[0]
    )
    y, x = np.mgrid[: shown.shape[0], : shown.shape[1]]
    places = [(w * shown[..., c]).sum() / shown[..., c].sum() for w, c in ((x, 0), (y, 2))]
    left, top, right, bottom = np.asarray(traced.boxes[0])
    assert left < places[0] < (left + right) / 2 and (top + bottom) / 2 < places[1] < bottom
    # Windows and lamps keep their own colors.
    body = shown[..., 0].astype(bool)
    assert 0.1 < body.sum() / ((bottom - top) * (right - left)) < 0.5


def test_nothing_stands_between_the_camera_and_the_lead_vehicle():
    scene = driving_scene.sample_scene(11)
    moved = dataclasses.replace(scene, boxes=scene.boxes.copy())
    moved.boxes[0, :2] = (9.0, 0.0)
    lead = street.with_lead(moved, street.LeadPose(20.0), PAINT)
    assert len(lead.boxes) <= len(scene.boxes) and lead.ids[-1] == lead.ids.max()
    assert not ((np.abs(lead.boxes[:-1, 1]) < 1) & (lead.boxes[:-1, 0] < 21)).any()
    rear = lead.boxes[-1, 0] - 2.3
    assert rear == pytest.approx(20.0 + camera_renderer.CAMERA_PLACE[0])
    with pytest.raises(ValueError, match="is not in the picture"):
        street.trace_frames([scene], [street.LeadPose(8.0, 60.0)], CAMERA, PAINT)


SMALL = dict(embedding_size=4, hidden_sizes=(4, 4, 6, 6), depths=(1, 1, 1, 1))


def test_a_detectors_predictions_are_its_own_and_the_texture_has_gradients(frames):
    _, _, traced = frames
    module = FrameDetector(**SMALL)
    variables = filled(module, jnp.zeros((1, 64, 64, 3)))
    victim = frame_victim(module, variables, 64)
    still = jnp.ones(2), jnp.zeros(traced.base.shape)

    @jax.jit
    def look(texture, direction):
        rendered = street.photograph(traced, texture, *still)
        small = jnp.stack([resize_image(image, 64) for image in rendered.images])
        heads = module.apply(variables, small)
        parts = [decode(r, jnp.asarray(a), s) for r, a, s in zip(heads, module.anchors, STRIDES)]
        own = tuple(jnp.concatenate([p[i] for p in parts], 1) for i in (0, 1))

        def value(texture):
            scene = street.photograph(traced, texture, *still)
            found = victim(scene)
            return attack_objective(found, scene.boxes, "appear").sum(), found

        _, slope, found = jax.jvp(value, (texture,), (direction,), has_aux=True)
        return own, found, slope

    (boxes, scores), found, slope = look(jnp.full((8, 8, 3), 0.5), jnp.ones((8, 8, 3)))
    np.testing.assert_allclose(found.confidence(), scores, rtol=2e-3, atol=1e-5)
    height, width = traced.base.shape[1:3]
    scale = np.asarray([width, height, width, height]) / 64
    np.testing.assert_allclose(found.boxes, boxes * scale, rtol=2e-3, atol=1e-2)
    assert np.isfinite(slope) and abs(slope) > 1e-6


@pytest.mark.parametrize("box_head", [False, True])
def test_a_patchs_confidence_is_the_classifiers_probability(frames, box_head):
    _, _, traced = frames
    module = PatchClassifier(**SMALL, box_head=box_head, normalize=True)
    variables = filled(module, jnp.zeros((1, 32, 32, 3)))
    victim = patch_victim(module, variables, 32)

    @jax.jit
    def look(texture):
        rendered = street.photograph(traced, texture, jnp.ones(2), jnp.zeros(traced.base.shape))
        height, width = rendered.images.shape[1:3]
        grown = grow_boxes(rendered.boxes, width, height)
        crops = jnp.concatenate(
            [crop_and_resize(rendered.images[i], grown[i : i + 1], 32) for i in range(2)]
        )
        outputs = module.apply(variables, crops, method="intermediates")
        return victim(rendered), jax.nn.softmax(outputs["logits"])[:, :-1]

    found, p = look(jnp.full((8, 8, 3), 0.5))
    assert found.boxes.shape == (2, 1, 4)
    np.testing.assert_allclose(found.confidence()[:, 0], p, rtol=1e-3, atol=1e-6)
    if not box_head:
        np.testing.assert_array_equal(found.boxes[:, 0], traced.boxes)
        sure = np.asarray(p[:, 0] >= 0.5)
        np.testing.assert_array_equal(detected(found, traced.boxes), sure)
