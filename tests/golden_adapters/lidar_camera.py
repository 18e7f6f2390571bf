"""Cases of the LiDAR-first pipeline: names, degrees to our option names, and layouts."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np

import jaxmodels
from jaxmodels.driving import (
    box_overlap,
    camera_projection,
    cluster_boxes,
    collision_risk,
    depth_clustering,
    detection_metrics,
    frame_detector,
    ground_removal,
    image_patches,
    point_clustering,
    priority_schedule,
    range_image,
)

# What a case says about its scene or input and not about the options.
CLUSTERING = {
    "angle_clustering_deg": "angle",
    "angle_ground_removal_deg": "ground_angle",
    "size_smooth_window": "smoothing",
    "size_cluster_min": "min_points",
    "size_cluster_max": "max_points",
    "elongation_threshold": "elongation",
    "start_angle_deg": "start_angle",
    "max_ground_angle_deg": "max_ground_angle",
    "repair_step": "repair_window",
    "repair_depth": "repair_step",
    "ground_dilation": "dilation",
    "criterion": "criterion",
}


def run(case):
    """Every output of the case, in the case's own layout."""
    return jax.device_get(OPERATIONS[case.model](case))


def run_clustering(case):
    config, inputs = case.config, case.inputs
    given = {CLUSTERING[key]: value for key, value in config.items() if key in CLUSTERING}
    published = {"start_angle": None, "max_ground_angle": None}
    window = given.get("smoothing", 5)
    published["dilation"] = max(window - 2, 3)
    if window not in ground_removal.SMOOTHING_WINDOWS:
        given["smoothing"] = 0  # the published code smooths with the windows it knows only
    options = depth_clustering.ClusteringOptions(**published | given)
    found = depth_clustering.cluster(
        inputs["range"],
        inputs["inclination"],
        inputs["azimuth"],
        wraps=config.get("wrap", False),
        options=options,
        elongation=inputs.get("elongation"),
    )
    ground = found.ground
    count = int(found.labels.max()) + 1
    return {
        "repaired": ground.repaired,
        "angle": ground.angle,
        "smoothed": ground.smoothed,
        "ground_seeded": ground.seeded,
        "ground": ground.ground,
        "no_ground": ground.remaining,
        "beta_row": found.beta_down,
        "beta_col": found.beta_right,
        "labels": found.labels,
        "counts": found.counts[:count],
        "labels_kept": found.kept,
    }


def run_dbscan(case):
    options = {key: case.config[key] for key in ("eps", "min_samples") if key in case.config}
    # scikit-learn compares in float64: of points on a grid all distances may be at the threshold.
    with jax.enable_x64(True):
        found = point_clustering.dbscan(case.inputs["points"].astype(np.float64), **options)
    # Which border points have a choice is a fact about the reference.
    given = {key: case.outputs[key] for key in ("ambiguous",) if key in case.outputs}
    return {**found._asdict(), **given}


def tolerances(case):
    """A border point of several clusters may belong to any of them."""
    if "ambiguous" not in case.outputs:
        return {}
    return {"out.labels": {"except_where": "ambiguous"}}


def run_points(case):
    inputs = case.inputs
    height, width = inputs["range"].shape
    extrinsic = inputs.get("extrinsic")
    edge = case.config.get("edge_azimuth", False)
    azimuth = range_image.column_azimuths(width, extrinsic, edge_azimuth=edge)
    points, valid = range_image.range_to_points(
        inputs["range"], inputs["inclination"], azimuth, extrinsic
    )
    out = {"points": points, "valid": valid, "azimuth": azimuth}
    if "inclination_range" in inputs:
        ends = inputs["inclination_range"]
        out["uniform_inclination"] = range_image.uniform_inclinations(*ends, height)
    return out


def run_projection(case):
    inputs, config = case.inputs, case.config
    camera = camera_projection.Camera(
        inputs["intrinsic"], inputs["extrinsic"], config["width"], config["height"]
    )
    distortion = config.get("correct_distortions", True)
    points = camera_projection.project_points(inputs["points"], camera, distortion=distortion)
    clusters, mask = inputs["clusters"], inputs["cluster_mask"]
    cubes = cluster_boxes.cubes(clusters, mask)
    polygons = cluster_boxes.polygons(clusters, mask)
    truncation = config.get("threshold_truncation", 0.7)
    options = dict(max_truncation=truncation, distortion=distortion)
    options |= {key: config[key] for key in ("partial", "drop_translation") if key in config}
    flat = functools.partial(camera_projection.flat_boxes, camera=camera, **options)
    corners = cluster_boxes.cube_corners(*cubes)
    cube = flat(corners, np.ones(corners.shape[:2], bool))
    polygon = flat(polygons.corners, polygons.mask)
    return {
        **points._asdict(),
        "cube_center": cubes.center,
        "cube_extent": cubes.extent,
        "hull_size": polygons.size,
        **{f"cube_{name}": getattr(cube, key) for name, key in FLAT.items()},
        **{f"polygon_{name}": getattr(polygon, key) for name, key in FLAT.items()},
    }


FLAT = {"flat": "boxes", "depth": "depth", "ok": "ok"}


def run_risk(case):
    inputs = case.inputs
    position, velocity, size = inputs["position"], inputs["velocity"], inputs["size"]
    ego = inputs["ego_velocity"]
    ranks = functools.partial(
        collision_risk.collision_ranks, position, velocity, size, inputs["yaw"], ego, **case.config
    )
    distance = collision_risk.distances(position)
    ttc = collision_risk.time_to_collision(position, velocity, size, ego)
    rank = ranks()
    return {
        "rank": rank,
        "rank_official": ranks(official=True),
        "ttc": ttc,
        "distance": distance,
        "order_distance": collision_risk.urgency_order(distance),
        "order_ttc": collision_risk.urgency_order(distance, ttc=ttc),
        "order_rank": collision_risk.urgency_order(distance, rank=rank),
    }


def run_metrics(case):
    inputs, config = case.inputs, case.config
    boxes, scores = inputs["det_box"], inputs["det_score"]
    classes, frames = inputs["det_class"], inputs["det_frame"]
    keep = {
        name: np.asarray(
            box_overlap.suppress(
                boxes, scores, config["nms_threshold"], classes=groups, frames=frames
            )
        )
        for name, groups in (("classwise", classes), ("agnostic", None))
    }
    matches = detection_metrics.match_detections(
        boxes,
        scores,
        classes,
        frames,
        inputs["gt_box"],
        inputs["gt_class"],
        inputs["gt_frame"],
        threshold=config["iou_threshold"],
        keep=keep["classwise"],
    )
    rows, columns = case.outputs["iou2d"].shape
    some, others = boxes[:rows], inputs["gt_box"][:columns]
    a, b = inputs["boxes3d_a"], inputs["boxes3d_b"]
    return {
        "iou2d": box_overlap.iou(some, others),
        "iog": box_overlap.over_second(some, others),
        "nms_keep_classwise": keep["classwise"],
        "nms_keep_agnostic": keep["agnostic"],
        "tp": matches.true_positive,
        "ap": detection_metrics.class_average_precisions(
            matches, scores, classes, inputs["gt_class"], config["classes"], keep["classwise"]
        ),
        "iou_bev": box_overlap.bev_iou(a, b),
        "iou_3d": box_overlap.iou_3d(a, b),
    }


def run_crops(case):
    inputs, config = case.inputs, case.config
    boxes = inputs["boxes"]
    if config.get("letterbox"):
        boxes = image_patches.letterboxed(boxes)
    crops = {
        f"crops_{size}": image_patches.crop_and_resize(inputs["image"], boxes, size)
        for size in config["sizes"]
    }
    return {**crops, "bucket": image_patches.bucket_of(inputs["boxes"], tuple(config["buckets"]))}


def run_schedule(case):
    inputs, config = case.inputs, case.config
    buckets = image_patches.bucket_of(inputs["boxes"], tuple(config["buckets"]))
    order = collision_risk.urgency_order(inputs["distance"], rank=inputs["rank"])
    costs = {int(size): cost for size, cost in config["per_crop_ms"].items()}
    cost = functools.partial(
        priority_schedule.batch_cost,
        batch=config["batch"],
        fixed_ms=config["fixed_ms"],
        per_crop_ms=costs,
    )
    deadline = config["deadline_ms"]
    planned = priority_schedule.plan(
        order,
        buckets,
        cost,
        batch=config["batch"],
        deadline_ms=math.inf if deadline is None else deadline,
    )
    return {
        "order": order,
        "bucket": buckets,
        "batch_id": planned.batch_id,
        "finish_ms": planned.finish_ms,
    }


def run_yolo(case):
    raw = np.transpose(case.inputs["raw"], (0, 2, 3, 1))
    decode = jax.jit(functools.partial(frame_detector.decode, stride=case.config["stride"]))
    boxes, score, _ = decode(raw, case.inputs["anchors"])
    return {"boxes": boxes, "score": score}


def run_classifier(case):
    arguments = {key: value for key, value in case.config.items() if key != "resolution"}
    module, variables = jaxmodels.load("driving.patch_classifier", case.weights, **arguments)
    x = np.transpose(case.inputs["pixel_values"], (0, 2, 3, 1))
    outputs = jax.jit(functools.partial(module.apply, method="intermediates"))(variables, x)
    return {key: np.transpose(y, (0, 3, 1, 2)) if y.ndim == 4 else y for key, y in outputs.items()}


OPERATIONS = {
    "depth_clustering": run_clustering,
    "DBSCAN": run_dbscan,
    "range_image_to_points": run_points,
    "projection": run_projection,
    "risk": run_risk,
    "detection_metrics": run_metrics,
    "crop_and_resize": run_crops,
    "schedule": run_schedule,
    "yolov3_head_decode": run_yolo,
    "ResNetForImageClassification": run_classifier,
}
