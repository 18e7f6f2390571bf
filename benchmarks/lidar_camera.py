"""Ground removal and clustering on the device against scikit-learn's DBSCAN and a NumPy queue."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Contender, markdown, measure, ratio, write_report

# name -> (columns of a whole turn, half angle of view in degrees)
SHAPES = {"front, 64 x 382": (2650, 26.0), "whole turn, 64 x 2650": (2650, 180.0)}
EPS, MIN_SAMPLES = 0.7, 6


def _scan(shape: str):
    from jaxmodels.driving import camera_renderer, driving_scene, lidar_simulator

    columns, half = SHAPES[shape]
    sensor = camera_renderer.default_sensor(half, columns)
    options = driving_scene.SceneOptions(around=half >= 180)
    scene = driving_scene.sample_scene(0, options)
    return sensor, lidar_simulator.scan(scene, sensor, seed=0).range


def ours(shape: str) -> Callable[[], None]:
    """The jitted stage: repair, ground, components, size filter."""
    import jax
    import numpy as np

    from jaxmodels.driving import depth_clustering

    sensor, image = _scan(shape)
    down, right = depth_clustering.beam_angles(sensor.rows, sensor.azimuths)
    arrays = [jax.device_put(np.float32(a)) for a in (image, sensor.rows, down, right)]

    def run() -> None:
        found = depth_clustering.cluster_range_image(*arrays, wraps=sensor.wraps)
        jax.block_until_ready(found.kept)

    return run


def ours_clusters(shape: str) -> Callable[[], None]:
    """Our clustering alone, ground given, as the others."""
    import functools

    import jax
    import numpy as np

    from jaxmodels.driving import depth_clustering

    sensor, image = _scan(shape)
    found = depth_clustering.cluster(image, sensor.rows, sensor.azimuths, wraps=sensor.wraps)
    down, right = depth_clustering.beam_angles(sensor.rows, sensor.azimuths)
    arrays = [jax.device_put(np.float32(a)) for a in (found.ground.remaining, down, right)]
    options = depth_clustering.ClusteringOptions()
    clustering = functools.partial(
        depth_clustering.cluster_depth, wraps=sensor.wraps, options=options
    )
    compiled = jax.jit(clustering)
    return lambda: jax.block_until_ready(compiled(*arrays))


def numpy_queue(shape: str) -> Callable[[], None]:
    """The same labels by a queue over pixels, ground given: clustering alone, in Python."""
    import numpy as np

    from jaxmodels.driving import depth_clustering

    sensor, image = _scan(shape)
    found = depth_clustering.cluster(image, sensor.rows, sensor.azimuths, wraps=sensor.wraps)
    depth = np.asarray(found.ground.remaining)
    threshold = np.radians(10.0)
    right = np.asarray(found.beta_right) > threshold
    down = np.asarray(found.beta_down) > threshold
    expected = int(found.labels.max())

    def run() -> None:
        width = depth.shape[1]
        labels = np.zeros(depth.shape, np.int32)
        label = 0
        for start in zip(*np.nonzero(depth > 0)):
            if labels[start]:
                continue
            label += 1
            labels[start] = label
            queue = [start]
            while queue:
                r, c = queue.pop()
                left, below = (c - 1) % width, r + 1
                nearby = (
                    ((r, (c + 1) % width), right[r, c]),
                    ((r, left), right[r, left]),
                    ((below, c), down[r, c]),  # the last row has no link below
                    ((r - 1, c), r > 0 and down[r - 1, c]),
                )
                for place, linked in nearby:
                    if linked and not labels[place]:
                        labels[place] = label
                        queue.append(place)
        assert label == expected

    return run


def sklearn_dbscan(shape: str) -> Callable[[], None]:
    """DBSCAN of the points above the ground, ground given."""
    import numpy as np
    from sklearn.cluster import DBSCAN

    from jaxmodels.driving import depth_clustering, range_image

    sensor, image = _scan(shape)
    found = depth_clustering.cluster(image, sensor.rows, sensor.azimuths, wraps=sensor.wraps)
    points, valid = range_image.range_to_points(image, sensor.rows, sensor.azimuths)
    kept = np.asarray(points)[np.asarray(valid) & ~np.asarray(found.ground.ground)]

    def run() -> None:
        DBSCAN(eps=EPS, min_samples=MIN_SAMPLES).fit(kept)

    return run


def run(quick: bool = False) -> Path:
    """Write `results/lidar_camera.md`."""
    rounds, steps = (3, 1) if quick else (8, 2)
    names = ("ours", "ours_clusters", "sklearn_dbscan", "numpy_queue")
    rows = []
    for threads in (1, 2):
        if threads > len(os.sched_getaffinity(0)):
            continue
        for shape in SHAPES:
            contenders = [
                Contender(name, f"benchmarks.lidar_camera:{name}", {"shape": shape})
                for name in names
            ]
            samples = measure(contenders, threads, rounds, steps)
            cells = [samples[name].cell() for name in names]
            ratios = [ratio(samples[names[1]], [samples[n]], "wall") for n in names[2:]]
            rate = f"{1 / min(samples['ours'].wall):.0f}"
            rows.append([str(threads), shape, *cells, *ratios, rate])
    head = ["threads", "range image", "ours with ground", "ours, clusters alone"]
    head += ["scikit-learn DBSCAN", "NumPy queue"]
    body = (
        "Milliseconds of wall time a frame: minimum / median (quartiles). The first column removes "
        "the ground and clusters; all others get the ground for free and only cluster. Ratios: our "
        "clusters alone over theirs, of minima / of medians; below 1 ours is faster.\n\n"
        + markdown([*head, "ratio to DBSCAN", "ratio to queue", "frames/s, ours with ground"], rows)
    )
    return write_report("lidar_camera", "Clustering of LiDAR range images", body)
