"""The LiDAR-first pipeline's claims on simulated streets: clusters, order, latency, accuracy.

    python -m benchmarks.lidar_camera_claims clusters [--scenes 200]
    python -m benchmarks.lidar_camera_claims pipeline --patches RUN --detector RUN [--frames 60]
    python -m benchmarks.lidar_camera_claims table

`RUN` are run directories of `configs/lidar_camera.py` and its preset `detector`. Rows are
appended to `benchmarks/results/lidar_camera_claims.jsonl`; `table` writes the tables beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np

from benchmarks import runs
from benchmarks.measure import RESULTS, markdown

ROWS = RESULTS / "lidar_camera_claims.jsonl"
NEAR_METERS, LEAST_RETURNS = 10.0, 30


def clusters(scenes: int) -> list[dict]:
    """Ground and clusters over flat scenes, with and without the product's limits of slope."""
    from jaxmodels.driving import (
        camera_renderer,
        depth_clustering,
        detection_metrics,
        driving_scene,
        lidar_simulator,
    )

    sensor = camera_renderer.default_sensor()
    choices = {
        "product defaults": depth_clustering.ClusteringOptions(),
        "published": depth_clustering.OFFICIAL,
    }
    sums = {name: {"iou": [], "called": [], "worst_near": 0.0} for name in choices}
    quality = {name: np.zeros(4) for name in choices}
    panoptic: dict[str, list[float]] = {name: [] for name in choices}
    for seed in range(scenes):
        scene = driving_scene.sample_scene(50_000 + seed)
        scan = lidar_simulator.scan(scene, sensor, seed=seed)
        returned = scan.range > 0
        for name, options in choices.items():
            found = depth_clustering.cluster(
                scan.range, sensor.rows, sensor.azimuths, wraps=False, options=options
            )
            ground = np.asarray(found.ground.ground) & returned
            total = sums[name]
            total["iou"].append(detection_metrics.mask_iou(ground, returned & (scan.surface == 0)))
            objects = returned & (scan.surface > 0)
            total["called"].append((ground & objects).sum() / max(objects.sum(), 1))
            for row, box in enumerate(scene.boxes):
                own = returned & (scan.surface == row + 1)
                if np.hypot(*box[:2]) < NEAR_METERS and own.sum() >= LEAST_RETURNS:
                    lost = (ground & own).sum() / own.sum()
                    total["worst_near"] = max(total["worst_near"], float(lost))
            # Objects within 40 m, as the specification counts them.
            near = np.where(scan.range < 40, np.maximum(scan.surface, 0), 0)
            counted = detection_metrics.cluster_quality(
                np.where(returned, found.kept, 0),
                np.where(returned, near, 0),
                min_returns=LEAST_RETURNS,
            )
            quality[name] += (counted.over, counted.under, counted.whole, counted.objects)
            panoptic[name].append(counted.panoptic)
    return [
        {
            "kind": "clusters",
            "options": name,
            "scenes": scenes,
            "ground_iou": float(np.mean(sums[name]["iou"])),
            "called_ground": float(np.mean(sums[name]["called"])),
            "worst_near": sums[name]["worst_near"],
            "over": int(quality[name][0]),
            "under": int(quality[name][1]),
            "whole": int(quality[name][2]),
            "objects": int(quality[name][3]),
            "panoptic": float(np.mean(panoptic[name])),
        }
        for name in choices
    ]


def load_run(run: Path):
    """(module, variables, config) of a run directory."""
    from ml_collections import ConfigDict

    from train.building import build_model
    from train.checkpoints import load_params

    config = ConfigDict(json.loads((run / "config.json").read_text()))
    return build_model(config), load_params(run), config


def _labels(frames) -> dict[str, np.ndarray]:
    parts = [f.labels2d for f in frames]
    return {
        "boxes": np.concatenate([p.boxes for p in parts]),
        "classes": np.concatenate([p.classes for p in parts]),
        "frames": np.concatenate([np.full(len(p.boxes), i) for i, p in enumerate(parts)]),
    }


def _ranks(frames) -> np.ndarray:
    """Risk of every labeled object, from the exact motion."""
    from jaxmodels.driving import detection_metrics

    return np.concatenate([detection_metrics.label_ranks(frame) for frame in frames])


def _scores(found: dict, truth: dict, ranks: np.ndarray) -> dict[str, float]:
    from jaxmodels.driving import detection_metrics
    from train.tasks.frame_detection import average_precisions

    numbers = average_precisions(found, truth)
    table = detection_metrics.recall_by_rank(
        found["boxes"], found["scores"], found["frames"], truth["boxes"], ranks, truth["frames"]
    )
    numbers |= {f"recall_rank_{r}": float(table[0, r]) for r in range(3)}
    return numbers


def _collected(rows: list[dict]) -> dict[str, np.ndarray]:
    keys = ("boxes", "scores", "classes", "frames")
    return {key: np.concatenate([row[key] for row in rows]) for key in keys}


def pipeline(patches: Path, detector: Path, count: int, crowd: float, size: int) -> list[dict]:
    """AP, recall by risk, latency and order of the pipeline beside the full-frame detector."""
    import jax

    from jaxmodels.driving import detection_metrics, lidar_camera, priority_schedule
    from train.data import driving_frames

    classifier, variables, config = load_run(patches)
    module, detector_variables, other = load_run(detector)
    if config.seed != other.seed:
        raise SystemExit(f"runs of different seeds: {config.seed} and {other.seed}")
    detect = lidar_camera.make_detector(module, detector_variables, size)
    settings = {**driving_frames.OPTIONS, **dict(config.data.options), "path": None}
    settings |= {"test_frames": count, "crowd": crowd, "frames_a_drive": 5, "frame_stride": 1}
    frames = list(
        driving_frames.simulated_drives("test", driving_frames.simulation_options(settings))
    )
    from jaxmodels.driving.frame import check_frame

    frames = [check_frame(frame) for frame in frames]
    truth, ranks = _labels(frames), _ranks(frames)
    buckets = tuple(config.task_args.pipeline.buckets)
    base = lidar_camera.PipelineOptions(buckets=buckets, risk="rank")
    arms = {
        "pipeline, no full frames": dataclasses.replace(base, detector_every=0),
        "pipeline": base,
    }
    made = {
        name: lidar_camera.Pipeline(classifier, variables, options=options, detector=detect)
        for name, options in arms.items()
    }
    states = {name: one.warm_up(frames[0]) for name, one in made.items()}
    compiled = {name: one.compiled() for name, one in made.items()}
    found: dict[str, list[dict]] = {name: [] for name in (*arms, "full frame")}
    times: dict[str, list[float]] = {name: [] for name in found}
    first: dict[str, list[float]] = {name: [] for name in found}
    lidar, inversions, seen = [], 0, []
    for i, frame in enumerate(frames):
        # One after the other on the same frame, so that a busy moment meets all.
        for name, one in made.items():
            if i % 5 == 0:
                states[name] = one.initial_state()._replace(index=states[name].index)
            result, states[name] = one(frame, states[name])
            d = result.detections
            known = d.classes >= 0
            found[name].append(
                {
                    "boxes": d.boxes[known],
                    "scores": d.scores[known],
                    "classes": d.classes[known],
                    "frames": np.full(int(known.sum()), i),
                }
            )
            times[name].append(result.total_ms)
            order = result.objects.order[result.objects.patches.valid[result.objects.order]]
            if len(order):
                first[name].append(
                    detection_metrics.time_to_riskiest(result.schedule.finish_ms, order)
                )
            if name == "pipeline":
                lidar.append(result.lidar_ms)
                seen.append(len(order))
                inversions += priority_schedule.priority_inversions(
                    result.schedule.finish_ms, order
                )
        start = time.perf_counter()
        answer = jax.device_get(detect(jax.device_put(frame.image)))
        elapsed = (time.perf_counter() - start) * 1e3
        times["full frame"].append(elapsed)
        first["full frame"].append(elapsed)
        kept = answer.valid
        found["full frame"].append(
            {
                "boxes": answer.boxes[kept],
                "scores": answer.scores[kept],
                "classes": answer.classes[kept],
                "frames": np.full(int(kept.sum()), i),
            }
        )
    rows = []
    for name in found:
        late = detection_metrics.latency(times[name])
        rows.append(
            {
                "kind": "pipeline",
                "arm": name,
                "backbone": config.model.rpartition("_")[2],
                "seed": config.seed,
                "frames": count,
                "crowd": crowd,
                "detector_size": size,
                "patches_a_frame": float(np.mean(seen)),
                "mean_ms": late.mean,
                "p50_ms": late.p50,
                "p99_ms": late.p99,
                "riskiest_ms": float(np.mean(first[name])),
                "lidar_ms": float(np.median(lidar)),
                "inversions": inversions,
                "recompiled": sum(made[n].compiled() - compiled[n] for n in made),
                **_scores(_collected(found[name]), truth, ranks),
            }
        )
    return rows


def latency(count: int, crowd: float, size: int, variant: str, scale: float) -> list[dict]:
    """Latency alone, fresh weights of a backbone: what is computed does not depend on them."""
    import jax

    import jaxmodels
    from jaxmodels.driving import detection_metrics, lidar_camera
    from jaxmodels.driving.frame import check_frame
    from train.data import driving_frames

    classifier, variables = jaxmodels.load(f"driving.patch_classifier:patch_{variant}")
    module, detector_variables = jaxmodels.load(f"driving.frame_detector:detector_{variant}")
    detect = lidar_camera.make_detector(module, detector_variables, size)
    settings = {**driving_frames.OPTIONS, "test_frames": count, "crowd": crowd}
    settings |= {"frames_a_drive": 1, "image_scale": scale}
    options = driving_frames.simulation_options(settings)
    frames = [check_frame(f) for f in driving_frames.simulated_drives("test", options)]
    buckets = (32, 64) if scale < 0.5 else (32, 64, 96, 128)
    options = lidar_camera.PipelineOptions(buckets=buckets, detector_every=0)
    made = lidar_camera.Pipeline(classifier, variables, options=options)
    made.warm_up(frames[0])
    jax.device_get(detect(jax.device_put(frames[0].image)))
    ours, theirs, first, seen = [], [], [], []
    for frame in frames:
        result, _ = made(frame)
        ours.append(result.total_ms)
        order = result.objects.order[result.objects.patches.valid[result.objects.order]]
        seen.append(len(order))
        if len(order):
            first.append(detection_metrics.time_to_riskiest(result.schedule.finish_ms, order))
        start = time.perf_counter()
        jax.device_get(detect(jax.device_put(frame.image)))
        theirs.append((time.perf_counter() - start) * 1e3)
    rows = []
    for name, values, early in (("pipeline", ours, first), ("full frame", theirs, theirs)):
        late = detection_metrics.latency(values)
        rows.append(
            {
                "kind": "latency",
                "arm": name,
                "backbone": variant,
                "image_scale": scale,
                "frames": count,
                "crowd": crowd,
                "detector_size": size,
                "patches_a_frame": float(np.mean(seen)),
                "mean_ms": late.mean,
                "p50_ms": late.p50,
                "p99_ms": late.p99,
                "riskiest_ms": float(np.mean(early)),
            }
        )
    return rows


OVER_SEEDS = (
    *("mean_ms", "p50_ms", "p99_ms", "riskiest_ms", "mAP", "ap_vehicle", "ap_pedestrian"),
    *("ap_cyclist", "ap_sign", "ap_vehicle_0.7", "recall_rank_0", "recall_rank_1"),
)


def over_seeds(rows: list[dict]) -> str:
    """Trained pipelines: means with Student's 95 % intervals over seeds, and paired differences."""
    cells, paired = [], []
    kinds = sorted({(r["backbone"], r["detector_size"]) for r in rows})
    for backbone, size in kinds:
        own = [r for r in rows if (r["backbone"], r["detector_size"]) == (backbone, size)]
        arms = list(dict.fromkeys(r["arm"] for r in own))
        for arm in arms:
            mine = [r for r in own if r["arm"] == arm]
            shown = [runs.mean([r[name] for r in mine], ".3g") for name in OVER_SEEDS]
            cells.append([backbone, size, arm, len(mine), *shown])
        full = {r["seed"]: r for r in own if r["arm"] == "full frame"}
        for arm in arms:
            mine = [r for r in own if r["arm"] == arm and r["seed"] in full]
            if arm != "full frame" and mine:
                lower = [100 * (1 - r["mean_ms"] / full[r["seed"]]["mean_ms"]) for r in mine]
                better = [r["mAP"] - full[r["seed"]]["mAP"] for r in mine]
                paired.append(
                    [backbone, size, arm, runs.mean(lower, ".3g"), runs.mean(better, ".3g")]
                )
    head = ["backbone", "detector pixels", "arm"]
    return (
        markdown([*head, "seeds", *OVER_SEEDS], cells)
        + "\nAgainst the full-frame detector of the same seed:\n\n"
        + markdown([*head, "mean latency lower by %", "mAP higher by"], paired)
    )


def table(rows: list[dict]) -> str:
    """All rows as Markdown, one table a kind; of trained pipelines means over seeds."""
    lines = []
    for kind in ("clusters", "pipeline", "latency"):
        own = [row for row in rows if row["kind"] == kind]
        if kind == "pipeline":
            own = [row for row in own if "seed" in row]
            if own:
                lines += ["## Pipeline", "", over_seeds(own)]
            continue
        if not own:
            continue
        keys = [key for key in own[-1] if key != "kind"]
        lines += [f"## {kind.capitalize()}", "", "| " + " | ".join(keys) + " |"]
        lines.append("|---" * len(keys) + "|")
        for row in own:
            cells = [row.get(key, "") for key in keys]
            cells = [f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("clusters", "pipeline", "latency", "table"))
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--crowd", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-scale", type=float, default=0.25)
    parser.add_argument("--patches", type=Path)
    parser.add_argument("--detector", type=Path)
    given = parser.parse_args()
    rows: list[dict] = []
    if given.what == "clusters":
        rows = clusters(given.scenes)
    elif given.what == "pipeline":
        rows = pipeline(given.patches, given.detector, given.frames, given.crowd, given.size)
    elif given.what == "latency":
        rows = latency(given.frames, given.crowd, given.size, given.backbone, given.image_scale)
    for row in rows:
        print(json.dumps(row))
    runs.append(ROWS, *rows)
    if given.what == "table":
        text = "# LiDAR first, camera later: what was measured\n\n" + table(runs.read(ROWS))
        (RESULTS / "lidar_camera_claims.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
