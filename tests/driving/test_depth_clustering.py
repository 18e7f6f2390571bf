"""Ground removal, clustering and points on simulated scenes and hand-made images."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse import coo_matrix, csgraph
from sklearn.cluster import DBSCAN

from jaxmodels.driving import (
    cluster_boxes,
    depth_clustering,
    detection_metrics,
    driving_scene,
    ground_removal,
    lidar_simulator,
    point_clustering,
    range_image,
)
from jaxmodels.driving.connected_components import grid_components, raster_ids
from jaxmodels.driving.depth_clustering import ClusteringOptions

RING = range_image.waymo_like(16, 120)
SMALL = ClusteringOptions(min_points=3, max_clusters=16)


@functools.cache
def ring_scan(seed=1):
    options = driving_scene.SceneOptions(around=True, reach=30.0)
    return lidar_simulator.scan(driving_scene.sample_scene(seed, options), RING, seed=seed)


def on_ring(image, elongation=None, options=SMALL):
    return depth_clustering.cluster(
        image, RING.rows, RING.azimuths, wraps=True, options=options, elongation=elongation
    )


def same_partition(a, b):
    """Whether two label images agree up to the names of the labels, 0 being none in both."""
    pairs = {(int(x), int(y)) for x, y in zip(np.ravel(a), np.ravel(b))}
    left, right = {x for x, _ in pairs}, {y for _, y in pairs}
    zeros = all((x == 0) == (y == 0) for x, y in pairs)
    return zeros and len(pairs) == len(left) == len(right)


def test_turning_the_image_turns_the_clusters():
    image = ring_scan().range
    plain = on_ring(image)
    assert int(plain.labels.max()) > 5
    for shift in (1, 37, 60):
        turned = on_ring(np.roll(image, shift, axis=1))
        np.testing.assert_array_equal(
            turned.ground.ground, np.roll(plain.ground.ground, shift, axis=1)
        )
        assert same_partition(turned.kept, np.roll(plain.kept, shift, axis=1))


def test_components_are_those_of_the_link_graph_in_any_scan_order():
    rng = np.random.default_rng(0)
    right, down = rng.random((9, 13)) < 0.5, rng.random((9, 13)) < 0.45
    down[-1] = False
    found = np.asarray(jax.jit(grid_components)(right, down))
    index = np.arange(right.size).reshape(right.shape)
    edges = [(index, np.roll(index, -1, 1), right), (index, np.roll(index, -1, 0), down)]
    rows = np.concatenate([a[m] for a, _, m in edges])
    columns = np.concatenate([b[m] for _, b, m in edges])
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(right.size,) * 2)
    count, labels = csgraph.connected_components(graph, directed=False)
    assert len(np.unique(found)) == count
    assert same_partition(found + 1, labels.reshape(right.shape) + 1)
    # Across: rows and columns change places; the turn is then among the rows.
    square = right.copy()
    square[:, -1] = False
    turned = np.asarray(grid_components(jnp.asarray(down.T), jnp.asarray(square.T)))
    plain = np.asarray(grid_components(jnp.asarray(square), jnp.asarray(down)))
    assert same_partition(turned.T + 1, plain + 1)
    ids = np.asarray(raster_ids(jnp.asarray(plain), jnp.ones_like(plain, bool)))
    assert ids[0, 0] == 1 and ids.max() == len(np.unique(ids))


def test_product_defaults_find_ground_and_whole_objects():
    sensor = range_image.waymo_like().front()
    ious, objects, whole = [], 0, 0
    for seed in range(8):
        scene = driving_scene.sample_scene(100 + seed)
        scan = lidar_simulator.scan(scene, sensor, seed=seed)
        found = depth_clustering.cluster(scan.range, sensor.rows, sensor.azimuths, wraps=False)
        returned = scan.range > 0
        ground = np.asarray(found.ground.ground)
        truth = scan.surface == 0
        ious.append(detection_metrics.mask_iou(ground & returned, truth & returned))
        quality = detection_metrics.cluster_quality(
            np.where(returned, found.kept, 0),
            np.where(returned, np.maximum(scan.surface, 0), 0),
            min_returns=30,
        )
        objects, whole = objects + quality.objects, whole + quality.whole
        for row, box in enumerate(scene.boxes):
            own = returned & (scan.surface == row + 1)
            if np.hypot(*box[:2]) < 10 and own.sum() >= 30:
                assert (ground & own).sum() <= 0.2 * own.sum()
    assert np.mean(ious) >= 0.9
    assert whole >= 0.8 * objects


def test_vmap_over_frames_equals_a_loop():
    images = np.stack([ring_scan(seed).range for seed in (1, 2)])
    down, right = depth_clustering.beam_angles(RING.rows, RING.azimuths)
    one = functools.partial(
        depth_clustering.cluster_range_image,
        inclinations=np.float32(RING.rows),
        down_angles=np.float32(down),
        right_angles=np.float32(right),
        wraps=True,
        options=SMALL,
    )
    together = jax.vmap(one)(images)
    for i, image in enumerate(images):
        alone = one(image)
        np.testing.assert_array_equal(together.kept[i], alone.kept)
        np.testing.assert_array_equal(together.ground.ground[i], alone.ground.ground)


def test_every_criterion_and_elongation_split_as_they_say():
    depth = np.zeros((3, 8), np.float32)
    depth[1] = [10, 10.05, 10.1, 13, 13.05, 13.1, 13.15, 0]
    down, right = np.full(3, 0.01), np.full(8, 0.01)
    elongation = np.zeros((3, 8), np.float32)
    elongation[1, 5:] = 0.5

    def labels(**options):
        chosen = ClusteringOptions(**options)
        return np.asarray(
            depth_clustering.cluster_depth(
                depth, down, right, wraps=False, options=chosen, elongation=elongation
            )[0]
        )[1].tolist()

    assert labels() == [1, 1, 1, 2, 2, 2, 2, 0]
    assert labels(criterion="simple", distance=0.5) == [1, 1, 1, 2, 2, 2, 2, 0]
    assert labels(criterion="simple", distance=0.01) == [1, 2, 3, 4, 5, 6, 7, 0]
    assert labels(criterion="line_dist_official", distance=20.0) == [1, 2, 3, 4, 5, 6, 7, 0]
    assert labels(criterion="line_dist", distance=50.0) == [1, 1, 1, 1, 1, 1, 1, 0]
    assert labels(elongation=0.2) == [1, 1, 1, 2, 2, 3, 3, 0]
    with pytest.raises(ValueError, match="no elongation"):
        depth_clustering.cluster_depth(
            depth, down, right, wraps=False, options=ClusteringOptions(elongation=0.2)
        )


def test_repairs_go_down_the_column_and_see_earlier_repairs():
    column = np.asarray([5, 0, 0, 5.2, 9, 0, 20], np.float32)[:, None]
    found = np.asarray(ground_removal.repair_gaps(jnp.asarray(column)))[:, 0]
    first = (5 + 5.2) / 2
    # Row 2 pairs (row 1, row 3) and (row 0, row 3).
    np.testing.assert_allclose(found[:3], [5, first, (first + 5.2 + 5 + 5.2) / 4], rtol=1e-6)
    assert found[5] == 0  # 9 and 20 do not agree


def test_slopes_of_beams_close_together_keep_their_precision():
    rng = np.random.default_rng(0)
    depth = rng.uniform(20, 60) + rng.normal(0, 0.005, (129, 40)).cumsum(0)
    beams = np.linspace(np.radians(2), np.radians(-25), 129)
    with jax.enable_x64(True):
        wanted = ground_removal.angle_image(jnp.asarray(depth), beams)
    x, y = depth * np.cos(beams)[:, None], depth * np.sin(beams)[:, None]
    plain = np.arctan2(abs(np.diff(y, axis=0)), abs(np.diff(x, axis=0)))
    np.testing.assert_allclose(wanted[1:], plain, atol=1e-9)
    # Against the angles of the very numbers that single precision is given.
    depth, beams = depth.astype(np.float32), beams.astype(np.float32)
    with jax.enable_x64(True):
        wanted = ground_removal.angle_image(jnp.asarray(depth, float), beams.astype(float))
    got = ground_removal.angle_image(jnp.asarray(depth), beams)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_steep_starts_and_steep_pixels_can_be_kept_out_of_the_ground():
    depth = jnp.full((4, 3), 5.0)
    smoothed = jnp.full((4, 3), math.radians(60))
    fill = functools.partial(
        ground_removal.fill_ground, smoothed, depth, math.radians(9), wraps=False
    )
    assert fill().all()
    assert not fill(start_angle=math.radians(30)).any()
    assert not fill(max_ground_angle=math.radians(45)).any()


def test_a_table_keeps_the_nearest_clusters_and_counts_the_rest():
    labels = np.repeat(np.arange(1, 6, dtype=np.int32), 4)
    points = np.zeros((20, 3), np.float32)
    points[:, 0] = np.repeat([50, 10, 40, 20, 30], 4) + np.tile([0, 1, 2, 3], 5)
    table = depth_clustering.cluster_table(labels, points, np.ones(20, bool), 3)
    assert np.asarray(table.distance).tolist() == [10, 20, 30] and int(table.overflow) == 2
    assert np.asarray(table.slots).reshape(5, 4)[:, 0].tolist() == [3, 0, 3, 1, 2]
    np.testing.assert_array_equal(np.asarray(table.high - table.low)[:, 0], [3, 3, 3])
    more = depth_clustering.cluster_table(labels, points, np.ones(20, bool), 8)
    assert np.asarray(more.valid).sum() == 5 and int(more.overflow) == 0


def test_parts_of_one_object_are_joined_but_not_beyond_its_size():
    low = np.asarray([[10, 0, 0], [12.1, 0, 0], [30, 0, 0], [36.2, 0, 0]], np.float32)
    high = np.asarray([[12, 1, 1], [14, 1, 1], [36, 1, 1], [44, 1, 1]], np.float32)
    points = np.stack([low, high], axis=1).reshape(-1, 3)
    slots = np.repeat(np.arange(4, dtype=np.int32), 2)
    table = depth_clustering.table_of_slots(jnp.asarray(slots), jnp.asarray(points), 6)
    joined = depth_clustering.merge_oversegmented(table, points)
    # 10..14 m is one object; 30..44 m would be 14 m long.
    assert np.asarray(joined.valid).tolist() == [True] * 3 + [False] * 3
    assert np.asarray(joined.slots).tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert np.asarray(joined.high)[0].tolist() == [14, 1, 1]


def test_dbscan_is_scikit_learns():
    rng = np.random.default_rng(3)
    points = (40 + rng.normal(size=(150, 2)) * 3).astype(np.float32)
    points = np.concatenate([points, points[:5]])
    theirs = DBSCAN(eps=0.9, min_samples=4).fit(points)
    ours = point_clustering.dbscan(points, 0.9, 4, block=64)
    np.testing.assert_array_equal(ours.labels, theirs.labels_)
    assert set(np.flatnonzero(ours.core)) == set(theirs.core_sample_indices_)
    chains = point_clustering.euclidean_clusters(points, 0.9)
    np.testing.assert_array_equal(chains, DBSCAN(eps=0.9, min_samples=1).fit(points).labels_)
    padded = np.concatenate([points, points[:9] + 0.01])
    valid = np.arange(len(padded)) < len(points)
    masked = point_clustering.dbscan(padded, 0.9, 4, valid, block=64)
    np.testing.assert_array_equal(masked.labels[: len(points)], theirs.labels_)
    assert (masked.labels[len(points) :] == -1).all()


def test_hull_and_yaw_of_a_turned_rectangle():
    yaw = math.radians(30)
    t = np.linspace(0, 1, 21)
    sides = np.concatenate([np.stack([4 * t, 0 * t], -1), np.stack([0 * t, 2 * t], -1)])
    turn = np.asarray([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]])
    flat = sides @ turn.T + [20, 5]
    assert len(cluster_boxes.convex_hull(flat)) == 3
    square = np.asarray([[0, 0], [1, 0], [2, 0], [2, 2], [0, 2], [0, 1], [1, 1], [0, 0]])
    assert len(cluster_boxes.convex_hull(square)) == 4
    assert len(cluster_boxes.convex_hull(square[:3])) == 2
    points = np.concatenate([flat, np.tile([[1.0], [2.0]], (21, 1))], axis=-1)
    box = cluster_boxes.fit_yaw(
        jnp.asarray(points, jnp.float32), jnp.zeros(len(points), jnp.int32), 2
    )
    np.testing.assert_allclose(box[0, 3:], [4, 2, 1, yaw], atol=0.02)
    center = np.asarray([2, 1]) @ turn.T + [20, 5]
    np.testing.assert_allclose(box[0, :2], center, atol=0.02)
    assert (np.asarray(box[1]) == 0).all()


def test_scores_weigh_near_points_more():
    elongation = jnp.asarray([0.0, 0.4, 0.2, 0.2, 0.9])
    ranges = jnp.asarray([1.0, 3.0, 5.0, 5.0, 7.0])
    slots = jnp.asarray([0, 0, 1, 1, 3])
    scores, frame = cluster_boxes.cluster_scores(elongation, ranges, slots, 3)
    np.testing.assert_allclose(scores, [1.0, 0.8, 0.0], rtol=1e-6)
    assert float(frame) == pytest.approx(0.9)


def test_points_return_to_their_pixels():
    image = ring_scan().range
    points, valid = range_image.range_to_points(image, RING.rows, RING.azimuths)
    kept = np.asarray(points)[np.asarray(valid)]
    again, index = range_image.points_to_range_image(kept, RING)
    np.testing.assert_allclose(again, image, rtol=1e-5)
    assert (index >= 0).sum() == len(kept)
    start, end = range_image.front_columns(2650)
    assert (start, end - start) == (1134, 382)


def test_half_a_column_lies_between_the_two_azimuth_conventions():
    center = range_image.column_azimuths(360)
    edge = range_image.column_azimuths(360, edge_azimuth=True)
    np.testing.assert_allclose(edge - center, math.radians(0.5))


MISTAKES = {
    "shape": (np.zeros(4), RING.rows, RING.azimuths, r"must be \[H, W\]"),
    "rows": (np.zeros((4, 120)), RING.rows, RING.azimuths, "4 rows, inclinations 16"),
    "columns": (np.zeros((16, 4)), RING.rows, RING.azimuths, "4 columns, azimuths 120"),
    "nan": (np.full((16, 120), np.nan), RING.rows, RING.azimuths, r"1920 values.*first at \(0, 0"),
    "negative": (np.full((16, 120), -1.0), RING.rows, RING.azimuths, "no_return=-1 accepts"),
    "far": (np.full((16, 120), 751.0), RING.rows, RING.azimuths, "above 750 m"),
    "degrees": (np.zeros((16, 120)), np.degrees(RING.rows), RING.azimuths, "radians"),
    "ascending": (np.zeros((16, 120)), RING.rows[::-1], RING.azimuths, "row 0 must be the top"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_bad_range_image_is_named(name):
    image, rows, columns, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        range_image.check_range_image(image, rows, columns)
    if name == "negative":
        assert (range_image.check_range_image(image, rows, columns, no_return=-1) == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": 6}, "smoothing window 6"),
        ({"smoothing": 13}, "smoothing window 13"),
        ({"min_points": 9, "max_points": 3}, "min_points 9"),
        ({"angle": 90.0}, "angle 90"),
        ({"ground_angle": 0.0}, "ground_angle 0"),
        ({"distance": 0.0}, "distance 0"),
        ({"criterion": "angel"}, "known are angle"),
        ({"max_clusters": 0}, "max_clusters 0"),
    ],
)
def test_bad_clustering_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ClusteringOptions(**options)


def test_bad_extrinsics_are_named():
    good = np.eye(4)
    good[:3, 3] = 1, 2, 3
    flipped, scaled, low = good.copy(), good.copy(), np.linalg.inv(good)
    flipped[1, 1] = -1
    scaled[0, 0] = 2
    for matrix, message in (
        (np.eye(3), r"must be \[4, 4\]"),
        (good.T, "looks transposed"),
        (flipped, "mirrors"),
        (scaled, "not orthonormal"),
        (low, "looks inverted"),
    ):
        with pytest.raises(ValueError, match=message):
            range_image.check_mounting(matrix)
