"""Polylines of vectors from tracks and lanes: frames, order, gaps, buckets, and mistakes."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxmodels.driving.vectorization import (
    TooManyPolylines,
    bucket_of,
    collate,
    lane_boundaries,
    resample,
    to_city,
    to_frame,
    vectorize,
)
from jaxmodels.driving.vectornet import VectorNet
from jaxmodels.interop import catalog
from train.data import traffic_simulator

OPTIONS = dict(max_polylines=16, max_vectors=19)


def simulated(seed=0):
    return traffic_simulator.simulate((7, seed), crossing=True)


def features(scene, **options):
    return vectorize(
        scene.tracks,
        scene.valid,
        0,
        scene.lanes,
        scene.lane_attributes,
        **{**OPTIONS, "max_polylines": 40, **options},
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_rigid_motion_of_the_scene_changes_nothing_and_a_reflection_does(seed):
    scene = simulated(seed)
    turn, shift = 2.1, np.array([5000.0, -3000.0])
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])

    def moved(matrix):
        return dataclasses.replace(
            scene,
            tracks=scene.tracks @ matrix + shift,
            lanes=tuple(lane @ matrix + shift for lane in scene.lanes),
        )

    # The square of 65 m lies along the city's axes, so that only "everything" can be compared.
    want, got = features(scene, radius=None), features(moved(rotation), radius=None)
    np.testing.assert_allclose(got.vectors, want.vectors, atol=1e-3)
    np.testing.assert_allclose(got.future_offsets, want.future_offsets, atol=1e-3)
    mirrored = features(moved(np.diag([1.0, -1.0])), radius=None)
    assert np.abs(mirrored.vectors - want.vectors).max() > 1


def test_forecasts_move_with_the_scene_and_not_with_its_reflection():
    scene = simulated(1)
    model = VectorNet(sub_width=8, sub_depth=2, global_width=8, dec_width=8)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda s: rng.normal(0, 0.4, s.shape).astype(np.float32), catalog.shapes(model)
    )
    apply = jax.jit(model.apply)
    turn, shift = 0.8, np.array([5000.0, -5000.0])
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])

    def forecast(matrix, shift):
        found = features(
            dataclasses.replace(
                scene,
                tracks=scene.tracks @ matrix + shift,
                lanes=tuple(lane @ matrix + shift for lane in scene.lanes),
            ),
            radius=None,
        )
        batch = collate([found], buckets=(64,))
        given = (batch[k] for k in ("vectors", "vector_mask", "target_index"))
        own = np.asarray(apply(variables, *given).positions)[0]
        return own, to_city(own, found.origin, found.heading)

    own, city = forecast(np.eye(2), np.zeros(2))
    moved, moved_city = forecast(rotation, shift)
    np.testing.assert_allclose(moved, own, atol=1e-3)
    np.testing.assert_allclose(moved_city, city @ rotation + shift, atol=2e-3)
    mirrored, _ = forecast(np.diag([1.0, -1.0]), np.zeros(2))
    assert np.abs(mirrored * [1, -1] - own).max() > 0.05


def test_the_frame_is_undone_and_its_x_axis_is_the_direction_of_motion():
    scene = simulated()
    found = features(scene)
    own = to_frame(scene.tracks[0], found.origin, found.heading)
    np.testing.assert_allclose(own[19], 0, atol=1e-9)
    assert own[0, 0] < -3 and abs(own[0, 1]) < 1
    np.testing.assert_allclose(to_city(own, found.origin, found.heading), scene.tracks[0])
    np.testing.assert_allclose(np.cumsum(found.future_offsets, 0), own[20:], atol=1e-4)
    np.testing.assert_allclose(found.history, own[:20], atol=1e-4)


def test_gaps_are_not_bridged_and_the_newest_vectors_are_kept():
    tracks = np.zeros((2, 8, 2))
    tracks[0, :, 0], tracks[1] = np.arange(8), [[t, 3.0] for t in range(8)]
    valid = np.ones((2, 8), bool)
    valid[0, [1, 6]] = False
    found = vectorize(tracks, valid, 0, [], [], obs=5, max_polylines=3, max_vectors=3, radius=50)
    assert found.vector_mask.sum(1).tolist() == [2, 3, 0]
    np.testing.assert_allclose(found.vectors[0, :2, 7], [-0.1, 0.0], atol=1e-7)
    np.testing.assert_allclose(found.vectors[1, :3, 7], [-0.2, -0.1, 0.0], atol=1e-7)
    # Step 6 is unknown: neither the offset to it nor the one from it is.
    np.testing.assert_array_equal(found.future_valid, [1, 0, 0])
    np.testing.assert_allclose(found.future_offsets, [[1, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(found.history_valid, [1, 0, 1, 1, 1])


def test_a_stop_point_is_one_vector_that_starts_where_it_ends():
    tracks = np.stack([np.arange(6.0), np.zeros(6)], -1)[None]
    lanes = [np.array([[9.0, 0.0]]), np.array([[5.0, 0.0], [6.0, 0.0], [7.0, 1.0]])]
    attributes = [[0, 1, 0], [1, 0, -1]]
    found = vectorize(tracks, np.ones((1, 6), bool), 0, lanes, attributes, obs=4, max_polylines=4)
    assert found.vector_mask.sum(1).tolist() == [3, 2, 1, 0]
    np.testing.assert_allclose(found.vectors[2, 0], [6, 0, 6, 0, 0, 0, 1, 0, 0, 1, 0, 2])
    np.testing.assert_allclose(found.vectors[1, 1], [3, 0, 4, 1, 0, 0, 1, 0, 1, 0, -1, 1])


def test_three_coordinates_put_z_behind_each_point_and_unused_columns_are_zero():
    scene = simulated()
    tracks = np.concatenate([scene.tracks, np.full((*scene.tracks.shape[:2], 1), 12.0)], -1)
    lanes = [np.pad(lane, ((0, 0), (0, 1)), constant_values=13.0) for lane in scene.lanes]
    flat = features(scene)
    tall = features(dataclasses.replace(scene, tracks=tracks, lanes=tuple(lanes)), columns=16)
    assert tall.vectors.shape[-1] == 16 and not tall.vectors[..., 14:].any()
    np.testing.assert_array_equal(tall.vectors[..., [0, 1, 3, 4]], flat.vectors[..., :4])
    np.testing.assert_array_equal(tall.vectors[..., 6:14], flat.vectors[..., 4:])
    lane = tall.vectors[..., 8] == 1
    np.testing.assert_array_equal(tall.vectors[lane][:, [2, 5]], 1)


def test_scenes_go_into_the_smallest_bucket_or_are_refused():
    scene = simulated()
    found = [features(scene), features(scene, radius=10)]
    count = int(found[0].vector_mask.any(1).sum())
    batch = collate(found, buckets=(8, count + 1, 64))
    assert batch["vectors"].shape == (2, count + 1, 19, 12)
    with pytest.raises(TooManyPolylines, match=f"{count} polylines .* largest bucket, 8"):
        collate(found, buckets=(4, 8))
    assert collate(found, buckets=(4, 8), truncate=True)["vectors"].shape[1] == 8
    cut = features(scene, max_polylines=5)
    assert cut.dropped == count - 5 and cut.vector_mask.any(1).all()
    np.testing.assert_array_equal(cut.vectors, found[0].vectors[:5])
    with pytest.raises(TooManyPolylines, match="more than the 5 there is room for"):
        features(scene, max_polylines=5, truncate=False)
    assert bucket_of(32, (64, 32)) == 32


def test_a_target_that_cannot_be_forecast_is_named_with_its_sequence():
    scene = simulated()
    for steps, text in (
        ([19], "sequence 7: the target is not valid at the last observed step"),
        (range(0, 19), "sequence 7: the target has no two consecutive observed steps"),
    ):
        valid = scene.valid.copy()
        valid[0, list(steps)] = False
        with pytest.raises(ValueError, match=text):
            features(dataclasses.replace(scene, valid=valid), name="sequence 7")
    lanes = (np.full((3, 2), np.nan), *scene.lanes[1:])
    lanes[0][0] = scene.tracks[0, 19]
    with pytest.raises(ValueError, match=r"sequence 7: vector 0 of polyline .* is not finite"):
        features(dataclasses.replace(scene, lanes=lanes), name="sequence 7", radius=None)
    short = dataclasses.replace(scene, tracks=scene.tracks[:, :12], valid=scene.valid[:, :12])
    with pytest.raises(ValueError, match="12 steps, fewer than the 20 observed ones"):
        features(short)


def test_lines_are_resampled_evenly_and_lanes_have_two_sides():
    line = resample(np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 9.0]]), 11)
    np.testing.assert_allclose(np.hypot(*np.diff(line, axis=0).T), 1, atol=1e-9)
    left, right = lane_boundaries(np.array([[0.0, 0.0], [0.0, 5.0], [0.0, 9.0]]), 4.0)
    np.testing.assert_allclose(left[:, 0], -2)
    np.testing.assert_allclose(right[:, 0], 2)


def test_the_simulator_hides_the_bend_until_the_last_observed_step():
    for seed in range(20):
        scene = traffic_simulator.simulate((3, seed))
        found = features(scene, heading_min_disp=0.3)
        # A straight line but for 3 cm of noise.
        centered = found.history - found.history.mean(0)
        assert np.linalg.svd(centered, compute_uv=False)[1] / np.sqrt(20) < 0.06
        assert scene.tracks.shape[1:] == (50, 2) and scene.tracks.min() > 0
        again = traffic_simulator.simulate((3, seed))
        np.testing.assert_array_equal(scene.tracks, again.tracks)
    bends = [features(traffic_simulator.simulate((3, s))).future_offsets.sum(0) for s in range(20)]
    assert max(abs(b[1]) for b in bends) > 5
