"""The competition's pieces: margins, patches, attribution, renderer, detector, simulator, rules."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.interop.catalog import export, shapes
from jaxmodels.interop.conversion import from_torch, resolve_rules, to_torch
from jaxmodels.security import (
    attribution,
    driving_simulator,
    face_track,
    forgery,
    patches,
    texture_attack,
)
from jaxmodels.security import driving_renderer as renderer
from jaxmodels.security.driving_simulator import Scene, Traffic, judge, simulate
from jaxmodels.security.margin_losses import margin_cross_entropy, margin_logits
from jaxmodels.security.scenario_search import search
from jaxmodels.security.vehicle_detector import (
    Predictions,
    VehicleDetector,
    attack_objective,
    detected,
    iou,
)
from jaxmodels.vision.iresnet import IResNet
from jaxmodels.vision.xception import Xception
from train.building import build_task
from train.command_line import load_config
from train.naming import ConfigError

ROOT = Path(__file__).resolve().parents[2]

# Margins


run_margins = jax.jit(
    margin_logits, static_argnames=("scale", "margins", "gradient", "filter_above")
)


def test_margins_grow_monotonically_and_exact_gradients_are_the_functions_own():
    cosines = jnp.array([[0.3, 0.8, -0.5]])
    labels = jnp.array([1])
    logits = [
        float(run_margins(cosines, labels, scale=1.0, margins=(1.0, m, 0.0))[0, 1])
        for m in (0.0, 0.2, 0.5)
    ]
    assert logits == sorted(logits, reverse=True) and logits[0] == pytest.approx(0.8)

    def value(c, gradient):
        return run_margins(c, labels, scale=1.0, gradient=gradient)[0, 1]

    step = 1e-3
    moved = cosines.at[0, 1].add(step), cosines.at[0, 1].add(-step)
    slope = (value(moved[0], "exact") - value(moved[1], "exact")) / (2 * step)
    exact = jax.grad(value)(cosines, "exact")
    np.testing.assert_allclose(exact[0, 1], slope, rtol=1e-2)
    assert exact[0, 1] > 1.2  # sin(theta + m) / sin(theta)
    np.testing.assert_allclose(jax.grad(value)(cosines, "straight_through"), [[0, 1, 0]])


def test_rows_of_no_class_have_no_margin_and_no_loss():
    cosines = jnp.array([[0.3, 0.8], [0.9, 0.1]])
    labels = jnp.array([-1, 0])
    logits = run_margins(cosines, labels, scale=2.0, filter_above=0.5)
    np.testing.assert_allclose(logits[0], [0.6, 0.0])
    both = margin_cross_entropy(logits, labels)
    np.testing.assert_allclose(both, margin_cross_entropy(logits[1:], labels[1:]), rtol=1e-6)
    with pytest.raises(ValueError, match=r"m3 > 0, or m1 = 1 with m3 = 0"):
        margin_logits(cosines, labels, margins=(0.9, 0.4, 0.0))


# Patches


def test_a_patch_lies_where_it_was_placed_and_nothing_else_changes():
    images = jnp.full((1, 20, 20, 3), 0.2)
    ones = jnp.ones(1)
    placement = patches.Placement(0.5 * ones, 0 * ones, ones, 0 * ones, 0 * ones, ones)
    found = jax.jit(patches.compose_patch)(
        images, jnp.ones((4, 4, 3)), jnp.ones((4, 4, 1)), placement
    )
    inside = np.asarray(found.images[0, :, :, 0]) > 0.99
    assert inside.sum() == 16 and inside[8:12, 13:17].all()
    outside = np.asarray(found.masks[0, :, :, 0]) == 0
    np.testing.assert_array_equal(np.asarray(found.images)[0][outside], np.float32(0.2))


def test_printable_colors_cost_nothing():
    palette = patches.printable_palette()
    assert palette.shape == (30, 3)
    assert float(patches.non_printability(palette[:1][None], palette)) < 1e-5
    assert float(patches.non_printability(jnp.array([[[1.0, 0.0, 1.0]]]), palette)) > 0.05


# Attribution


def test_parts_overlap_and_cover_the_map():
    x = jnp.arange(64.0).reshape(1, 8, 8, 1)
    parts = attribution.part_pooling(x)
    assert parts.shape == (1, 9, 1)
    # Stride 2, window 4: the first part is the mean of rows and columns 0..3.
    np.testing.assert_allclose(parts[0, 0, 0], np.asarray(x)[0, :4, :4].mean())
    np.testing.assert_allclose(parts[0, 8, 0], np.asarray(x)[0, 4:, 4:].mean())


def test_partners_share_the_class_and_lonely_rows_keep_themselves():
    labels = jnp.array([0, 1, 0, 2, 1, 0])
    for seed in range(5):
        pairs = np.asarray(attribution.same_class_pairs(jax.random.key(seed), labels))
        assert (np.asarray(labels)[pairs] == np.asarray(labels)).all()
        assert pairs[3] == 3 and (np.delete(pairs, 3) != np.delete(np.arange(6), 3)).all()


def test_an_attribution_checkpoint_goes_in_and_out_under_lightnings_prefix():
    small = dict(layers=(1, 1, 1, 1), width=4, block="basic", stem="cifar", classes=5)
    module = attribution.AttributionNet(**small)
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes(module))
    state = to_torch(tree)
    assert {"bnneck8.running_mean", "fc2.weight", "encoder.conv1.weight"} <= state.keys()
    assert "fc2.bias" not in state
    outer = {f"encoder.{k}" if k.startswith("encoder.") else k: v for k, v in state.items()}
    for given in (state, outer):
        loaded, variables = jaxmodels.load("security.attribution", given, **small)
        back = export("security.attribution", loaded, variables)
        assert all(np.array_equal(back[k], v) for k, v in state.items())
    # An ImageNet file, from which the published recipe starts, is the encoder and a classifier.
    start = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    start |= {"fc.weight": np.zeros((7, 32), np.float32), "fc.bias": np.zeros(7, np.float32)}
    rules = resolve_rules(attribution.TORCH_RULES, module)
    rest = "(bottleneck|bnneck.|fc2)"
    variables, done = from_torch(start, shapes(module), rules, skip=rest, fresh=tree)
    back = to_torch(variables, rules)
    assert all(np.array_equal(back[f"encoder.{k}"], v) for k, v in start.items() if k[:3] != "fc.")
    assert sorted(done.dropped) == ["fc.bias", "fc.weight"]


def test_voting_needs_neighbors():
    with pytest.raises(ValueError, match="nearest neighbors need at least two rows"):
        attribution.vote(jnp.ones((1, 4)), jnp.ones((1, 9, 4)), jnp.zeros(0, int))
    with pytest.raises(ValueError, match=r"needs unlabeled rows"):
        attribution.vote(jnp.ones((3, 4)), jnp.ones((3, 9, 4)), jnp.zeros(3, int))


def test_the_gradient_of_agreement_is_that_of_torchs_binary_cross_entropy():
    """It ends at -1e12 and vanishes at 1, where that of -log does neither."""
    p = jnp.array([0.3, 1e-6, 1e-14, 0.0, 1.0])
    values, slopes = jax.vmap(jax.value_and_grad(attribution._cross_entropy_of_one))(p)
    expected = [-np.log(0.3), -np.log(1e-6), -np.log(1e-14), 100, 0]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_allclose(slopes, [-1 / 0.3, -1e6, -1e12, -1e12, 0], rtol=1e-5)


# Forgery detection


def test_log_loss_is_finite_at_certainty_and_videos_do_not_depend_on_order():
    found = forgery.forgery_metrics([0.0, 1.0, 1.0, 0.0], [0, 1, 0, 1])
    assert np.isfinite(found["log_loss"]) and found["auc"] == 0.5 and found["eer"] == 0.5
    p, v, y = np.array([0.1, 0.9, 0.3, 0.7]), np.array([0, 1, 0, 1]), np.array([0, 1, 0, 1])
    order = np.array([2, 1, 3, 0])
    a, b = forgery.video_scores(p, v, y), forgery.video_scores(p[order], v[order], y[order])
    np.testing.assert_allclose(a, b)
    np.testing.assert_allclose(a[0], [0.2, 0.8])
    with pytest.raises(ValueError, match="both labels"):
        forgery.video_scores(p, np.zeros(4, int), y)


def test_residual_filters_see_no_flat_image():
    flat = forgery.with_frequency_residuals(jnp.full((1, 8, 8, 3), 0.3))
    assert flat.shape == (1, 8, 8, 6) and float(jnp.abs(flat[:, 2:-2, 2:-2, 3:]).max()) < 1e-5


@pytest.mark.parametrize("preset", ["detection", "detection_b0"])
def test_a_detector_of_residuals_reads_six_channels(preset):
    config = load_config(f"{ROOT}/configs/ai_security.py:{preset}")
    config.task_args.frequency = True
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    task = build_task(config)
    params, _ = jax.eval_shape(task.init, jax.random.key(0), {"image": images})
    stem = params["conv1" if preset == "detection" else "conv_stem"]
    assert stem["kernel"].shape[2] == 6
    config.model, config.model_args = "vision.resnet", {}
    with pytest.raises(ConfigError, match=r"frequency: vision\.resnet reads pixels only"):
        build_task(config)


def test_xceptions_unused_channels_travel_and_imagenets_pointwise_weights_fit():
    small = dict(channels=(4, 4, 6, 6, 6, 8, 8, 8), n_middle=1)
    module = Xception(**small)
    state = to_torch(jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes(module)))
    state |= {"adjust_channel.0.bias": np.ones(512, np.float32)}
    files = {
        f"backbone.{k.replace('last_linear', 'fc')}": v[..., 0, 0] if "pointwise" in k else v
        for k, v in state.items()
    }
    loaded, variables = jaxmodels.load("vision.xception", files, **small)
    back = export("vision.xception", loaded, variables)
    assert back.keys() >= state.keys() and back["conv3.pointwise.weight"].shape == (8, 8, 1, 1)


def test_faces_of_sides_that_are_no_multiples_of_sixteen_round_up():
    module = IResNet(layers=(1, 1, 1, 1), width=2, num_features=3, input=(100, 109))
    assert shapes(module)["params"]["fc"]["kernel"].shape == (16 * 7 * 7, 3)
    with pytest.raises(ValueError, match="at least 16, got 15x112"):
        IResNet(input=(15, 112))


def test_xceptions_channel_reduction_may_be_narrow():
    small = dict(channels=(4, 4, 6, 6, 6, 8, 8, 8), n_middle=0)
    for mode in ("adjust_channel", "adjust_channel_iid"):
        tree = shapes(Xception(**small, mode=mode, adjusted_channels=5))["params"]
        assert tree["adjust_channel.0"]["kernel"].shape == (1, 1, 8, 5)
        assert tree["last_linear"]["kernel"].shape == (5, 2)


def test_faces_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"aligned faces of 32x32 pixels, got 48x48"):
        jax.eval_shape(
            IResNet(layers=(1, 1, 1, 1), width=4, input=(32, 32)).init,
            jax.random.key(0),
            jnp.zeros((1, 48, 48, 3)),
        )


# Renderer and detector


def test_the_vehicle_is_seen_where_its_box_says_and_grows_as_it_nears():
    pose = renderer.drive_up(3)
    black = jnp.zeros((3, 64, 96, 3))
    rear = jnp.ones((64, 64, 3))
    images, boxes = jax.jit(renderer.paint, static_argnums=3)(
        black, rear, jnp.ones((64, 64, 1)), "rear", pose
    )
    for image, box in zip(np.asarray(images), np.asarray(boxes)):
        rows, columns = np.nonzero(image[..., 0] > 0.5)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(seen, box, atol=1.0)
    widths = np.asarray(boxes[:, 2] - boxes[:, 0])
    np.testing.assert_allclose(widths * np.array([30, 18, 6]), 1.9 * 96, rtol=1e-3)


def test_textures_have_gradients_through_every_surface():
    for surface in ("rear", "road"):
        pose = jax.tree.map(lambda v: v[:1], renderer.drive_up(2, yaw=0.1))._replace(
            distance=jnp.array([12.0])
        )
        black = jnp.zeros((1, 64, 96, 3))

        def brightness(texture, surface=surface, pose=pose, black=black):
            return renderer.paint(black, texture, jnp.ones((16, 16, 1)), surface, pose).images.sum()

        grads = jax.jit(jax.grad(brightness))(jnp.full((16, 16, 3), 0.5))
        assert float(jnp.abs(grads).sum()) > 1, surface


def test_diverse_scenes_keep_their_boxes_on_the_vehicle():
    images = jnp.zeros((2, 64, 96, 3)).at[:, 20:40, 30:66].set(1)
    scene = renderer.Rendered(images, jnp.broadcast_to(jnp.array([30.0, 20, 66, 40]), (2, 4)))
    cfg = texture_attack.TextureAttack(diversity=1.0)
    run = jax.jit(texture_attack.diverse_scene)
    moved = set()
    for seed in range(4):
        found = run(jax.random.key(seed), scene, cfg)
        rows, columns = np.nonzero(np.asarray(found.images[1, ..., 0]) > 0.5)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(seen, found.boxes[1], atol=1.01)
        moved.add(round(float(found.boxes[0, 0]), 2))
    assert len(moved) == 4


def test_boxes_decide_what_counts_as_detected():
    box = jnp.array([[10.0, 10, 30, 30]])
    np.testing.assert_allclose(iou(box, jnp.array([[20.0, 10, 40, 30]])), [1 / 3], rtol=1e-5)
    boxes = jnp.stack([jnp.array([11.0, 10, 30, 30]), jnp.array([60.0, 0, 80, 20])])[None]
    sure = jnp.array([[8.0, 8.0]])
    classes = jnp.array([[[8.0, -8.0], [8.0, -8.0]]])
    found = Predictions(sure, classes, boxes)
    assert bool(detected(found, box)[0])
    assert not bool(detected(found._replace(objectness=jnp.array([[-1.0, 8.0]])), box)[0])
    assert not bool(detected(found, box, kind=1)[0])
    hidden = found._replace(objectness=jnp.array([[-9.0, 8.0]]))
    for objective in ("hide", "vanish", "mislocalize"):
        assert attack_objective(hidden, box, objective) < attack_objective(found, box, objective)
    assert attack_objective(found, box, "appear") < attack_objective(hidden, box, "appear")


def test_what_a_detector_is_sure_of_pulls_at_a_vanishing_attack_alone():
    box = jnp.array([[10.0, 10, 30, 30]])
    boxes = jnp.array([[[10.0, 10, 30, 30], [60, 0, 80, 20]]])

    def value(objectness, objective):
        sure = jnp.stack([objectness, jnp.float32(5.0)])[None]
        classes = jnp.full((1, 2, 2), 30.0)
        return attack_objective(Predictions(sure, classes, boxes), box, objective)[0]

    at = jnp.array([-60.0, -9.0, -1.0, 0.0, 1.0, 9.0, 30.0])
    confidence = np.asarray(jax.nn.sigmoid(at))
    values, slopes = jax.vmap(jax.value_and_grad(lambda o: value(o, "vanish")))(at)
    # log(1 + exp(o)) of the one box that overlaps, were its class certain.
    np.testing.assert_allclose(values[:-1], np.log1p(np.exp(at[:-1])), rtol=1e-4)
    np.testing.assert_allclose(slopes[:-1], confidence[:-1], rtol=1e-4)
    np.testing.assert_allclose(slopes[-1], 0.5, rtol=1e-4)  # the class is as sure: half each
    slopes = jax.vmap(jax.grad(lambda o: value(o, "hide")))(at)
    np.testing.assert_allclose(slopes[1:-1], 1 - confidence[1:-1], rtol=1e-3)


def test_the_detector_gives_a_prediction_a_cell_of_both_strides():
    module = VehicleDetector(width=4)
    out, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), *module.example_inputs())
    assert out.boxes.shape == (1, 8 * 12 + 4 * 6, 4)
    with pytest.raises(ValueError, match="multiples of 16, got 60x96"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 60, 96, 3)))


# Simulator

STILL = Traffic(noise=0.0, miss=0.0)


def scene_of(*others, ego=(0.0, 5.25, 0.0, 15.0), traffic=STILL):
    states = jnp.asarray([ego, *others], jnp.float32)
    shape = (traffic.steps, len(others))
    return Scene(states, jnp.float32(5.25), jnp.zeros(shape), jnp.ones(shape))


def knots(count=1, a=0.0, steer=0.0):
    values = np.arctanh(np.clip([a / 4.0, steer / 0.06], -0.999, 0.999))
    return jnp.broadcast_to(jnp.asarray(values, jnp.float32), (count, STILL.knots, 2))


@jax.jit
def run_scene(scene, controls):
    rollout = simulate(scene, controls, STILL)
    return rollout, judge(rollout, STILL)


def test_eighty_steps_agree_with_double_precision_and_straight_driving_is_exact():
    rng = np.random.default_rng(0)
    controls = np.stack([rng.uniform(-3, 3, 80), rng.uniform(-0.1, 0.1, 80)], -1)
    want = np.array([0.0, 5.0, 0.1, 12.0])
    step = jax.jit(driving_simulator.bicycle, static_argnums=2)
    got = jnp.asarray(want, jnp.float32)
    for a, delta in controls:
        x, y, heading, v = want
        want = np.array([
            x + 0.1 * v * np.cos(heading),
            y + 0.1 * v * np.sin(heading),
            heading + 0.1 * v * np.tan(delta) / 2.7,
            max(v + 0.1 * a, 0.0),
        ])  # fmt: skip
        got = step(got, jnp.array([a, delta], jnp.float32), 0.1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    straight = driving_simulator.bicycle(jnp.array([2.0, 5.25, 0.0, 16.0]), jnp.zeros(2), 0.125)
    np.testing.assert_array_equal(straight, [4.0, 5.25, 0.0, 16.0])


def test_separation_is_the_gap_between_boxes():
    a = jnp.array([0.0, 0.0, 0.0, 5.0])
    assert driving_simulator.separation(a, a.at[0].set(10.0)) == pytest.approx(5.4, abs=1e-5)
    assert driving_simulator.separation(a, a.at[1].set(2.9)) == pytest.approx(1.0, abs=1e-5)
    across = jnp.array([0.0, 4.0, np.pi / 2, 5.0])
    assert driving_simulator.separation(a, across) == pytest.approx(0.75, abs=1e-5)
    assert driving_simulator.separation(a, a.at[0].set(4.0)) < 0


def test_the_ego_follows_a_calm_lead_without_contact_and_keeps_its_lane():
    rollout, outcome = run_scene(scene_of((30.0, 5.25, 0.0, 12.0)), knots())
    assert outcome.score == 0 and not outcome.collision
    assert float(jnp.abs(rollout.states[:, 0, 1] - 5.25).max()) < 0.05
    route = driving_simulator.route_metrics(rollout, jnp.float32(5.25), STILL)
    assert route.off_road == 0 and route.distance < 0.05
    assert route.time == pytest.approx(8) and 0 < route.incomplete < 0.5


def test_verdicts_name_their_reason():
    from jaxmodels.security.driving_simulator import REASONS

    def reason(scene, controls):
        _, outcome = run_scene(scene, controls)
        return REASONS[int(outcome.reason)], float(outcome.score)

    route = driving_simulator.route_metrics(
        run_scene(scene_of((2.0, 8.75, 0.0, 15.0)), knots(steer=-0.05))[0], 8.75, STILL
    )
    assert 0 < route.time < 4 and route.incomplete > 0.4
    assert float(route.distance) == pytest.approx(3.5, abs=0.1)
    # Another vehicle comes sideways from the next lane.
    assert reason(scene_of((2.0, 8.75, 0.0, 15.0)), knots(steer=-0.05)) == ("collision", 1.0)
    # It drives into the ego from behind; it leaves the road; it touches a third one.
    slow = scene_of((-9.0, 5.25, 0.0, 15.0), ego=(0.0, 5.25, 0.0, 2.0))
    assert reason(slow, knots(a=3.9)) == ("rear_ended", 0.0)
    assert reason(scene_of((2.0, 8.75, 0.0, 15.0)), knots(steer=0.05)) == ("off_road", 0.0)
    pair = scene_of((20.0, 1.75, 0.0, 15.0), (27.0, 1.75, 0.0, 2.0))
    assert reason(pair, knots(2))[0] == "others_touched"
    # A hard stop right ahead: the emergency brake acts.
    assert reason(scene_of((14.0, 5.25, 0.0, 4.0)), knots(a=-3.9))[0] in ("emergency", "collision")


def test_gradient_search_finds_a_collision_and_finds_it_again():
    scene = scene_of((6.0, 8.75, 0.0, 15.0))
    found = search(jax.random.key(0), scene, STILL, restarts=8, iterations=20)
    again = search(jax.random.key(0), scene, STILL, restarts=8, iterations=20)
    assert found.tried == 160 and bool(found.outcome.collision)
    np.testing.assert_array_equal(found.knots, again.knots)
    bounded = driving_simulator.adversary_controls(10 * found.knots, STILL)
    assert float(jnp.abs(bounded[..., 0]).max()) <= 4 and bounded.shape == (80, 1, 2)


def test_scenes_without_time_or_with_overlaps_are_refused():
    for traffic, message in ((Traffic(dt=0.0), "dt must be"), (Traffic(horizon=0.0), "horizon")):
        with pytest.raises(ValueError, match=message):
            driving_simulator.check_traffic(traffic)
    overlapping = scene_of((1.0, 5.25, 0.0, 1.0), (40.0, 5.25, 0.0, 15.0))
    for refused in (
        lambda: driving_simulator.check_scene(overlapping.states),
        lambda: simulate(overlapping, knots(2), STILL),
        lambda: search(jax.random.key(0), overlapping, STILL, restarts=8, iterations=20),
        lambda: jax.jit(lambda controls: simulate(overlapping, controls, STILL))(knots(2)),
    ):
        with pytest.raises(ValueError, match="vehicles 0 and 1 overlap"):
            refused()
    # Where a scene is traced nobody can refuse it, but it is nobody's success.
    _, outcome = run_scene(scene_of((1.0, 5.25, 0.0, 1.0)), knots())
    assert outcome.score == 0 and outcome.time == 0 and not outcome.collision
    for vehicles, message in ((40, r"no room for 40 vehicles .* on 3 lanes"), (0, "at least one")):
        with pytest.raises(ValueError, match=message):
            driving_simulator.sample_scene(0, vehicles=vehicles)


# Face rules


def test_masks_keep_the_area_budget_and_thresholds_separate():
    for kind in face_track.MASKS:
        assert 0.02 < face_track.face_mask(kind).mean() <= 0.1
    rng = np.random.default_rng(0)
    same = np.arange(400) % 2 == 0
    cosines = rng.normal(0, 0.1, 400) + 0.6 * same
    found = face_track.verification(cosines, same)
    assert found.accuracy > 0.98 and 0.2 < found.threshold < 0.45


def test_the_score_pays_success_and_charges_distance():
    won = np.array([[True, False], [True, True]])
    assert face_track.face_score(won, [0.0, 0.0], 8.0) == 75
    assert face_track.face_score(won, [8.0, 8.0], 8.0) == 37.5
    flags = face_track.successes([[0.5, 0.1]], [0.3], "dodging")
    np.testing.assert_array_equal(flags, [[False, True]])


def test_the_smallest_budget_is_found_by_bisection():
    needed = jnp.array([1.3, 4.2, 99.0])
    found = face_track.minimal_perturbation(lambda eps: eps, lambda e: e >= needed, 3, 16.0, 12)
    np.testing.assert_allclose(found[:2], needed[:2], atol=0.01)
    assert np.isinf(found[2])
