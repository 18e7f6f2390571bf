"""Cluster the LiDAR first, inspect the camera later: detections in the order of their danger.

S. Chen et al., "LiDAR Cluster First and Camera Inference Later: A New Perspective Towards
Autonomous Driving", arXiv 2111.09799. Of the paper only the abstract and the beginning could be
read: the LiDAR stage is a co-author's code (cpsintegrationlab/depth_clustering@3f30c545), the ranks
another's (CPS-IL/risk-ranked-recall@21f8fd48); network, batching, recovery of what LiDAR misses and
fusion are ours.

    pipeline = Pipeline(classifier, variables, options=PipelineOptions(), detector=detector)
    state = pipeline.warm_up(frame)
    result, state = pipeline(frame, state)
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.driving import box_overlap, frame_detector, image_patches, priority_schedule
from jaxmodels.driving.collision_risk import Tracks
from jaxmodels.driving.frame import FRAME_INTERVAL, Frame, check_frame
from jaxmodels.driving.frame_detector import Candidates
from jaxmodels.driving.lidar_objects import (
    Objects,
    PipelineOptions,
    check_elongation,
    find_objects,
    frame_arrays,
    no_tracks,
)
from jaxmodels.driving.patch_classifier import refine_boxes
from jaxmodels.driving.priority_schedule import Schedule

__all__ = ["Detections", "FrameResult", "Pipeline", "PipelineOptions", "make_detector"]

UNKNOWN = -1  # class of an object that was not inspected
FROM_PATCH, FROM_FRAME, FROM_LIDAR = 0, 1, 2
_MOST_FRAME_BOXES = 64


class Detections(NamedTuple):
    """What is known of a frame, K rows in the order in which it became known.

    Attributes:
      boxes: [K, 4] pixels, zeros where the camera does not see the object.
      classes: int32 [K] of `patch_classifier.CLASSES`, `UNKNOWN` for what was not inspected.
      scores: [K] in 0..1. source: int32 [K], `FROM_PATCH`, `FROM_FRAME` or `FROM_LIDAR` (not
        inspected).
      boxes3d: [K, 7], NaN without LiDAR. depth: meters [K], NaN without LiDAR.
      rank: int32 [K], risk 0..2, -1 without LiDAR. finish_ms: [K], -1 if not inspected.
      row: int32 [K], of `Objects`, -1 without LiDAR.
    """

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    source: np.ndarray
    boxes3d: np.ndarray
    depth: np.ndarray
    rank: np.ndarray
    finish_ms: np.ndarray
    row: np.ndarray


class FrameResult(NamedTuple):
    """Detections of a frame and how they came about.

    Attributes:
      detections: see there. objects: clusters, as NumPy arrays.
      schedule: of the patches, by row of `objects`.
      lidar_ms: when the objects were known. total_ms: when everything was.
      detector_ran: whether the full-frame detector did.
    """

    detections: Detections
    objects: Objects
    schedule: Schedule
    lidar_ms: float
    total_ms: float
    detector_ran: bool


class PipelineState(NamedTuple):
    """Between frames: tracks, number of the next frame, time of the last one in seconds."""

    tracks: Tracks
    index: int
    timestamp: float | None


def make_detector(
    module: nn.Module, variables: Any, size: int = frame_detector.SIZES[0], **options: Any
) -> Callable[[jax.Array], Candidates]:
    """A full-frame detector as the pipeline takes it: image uint8 [H, W, 3] -> candidates.

    The image is resized to `size` x `size` with antialiasing; boxes are in its own pixels.
    `options` go to `frame_detector.candidates`.
    """

    @jax.jit
    def detect(variables, image):
        height, width = image.shape[:2]
        small = frame_detector.resize_image(image, size)
        heads = module.apply(variables, small[None])
        found = frame_detector.candidates(heads, module.anchors, **options)
        scale = jnp.asarray([width, height, width, height], jnp.float32) / size
        limit = jnp.asarray([width, height, width, height], jnp.float32)
        return found._replace(boxes=jnp.clip(found.boxes * scale, 0, limit))

    return functools.partial(detect, variables)


class Pipeline:
    """The whole procedure, frame by frame.

    Args:
      classifier: a `PatchClassifier`. variables: its variables.
      options: see `PipelineOptions`.
      detector: image uint8 [H, W, 3] -> `Candidates`, or None to do without.
      costs: predicted milliseconds of a batch of each bucket; `warm_up` measures them if None.
      clock: seconds.
    """

    def __init__(
        self,
        classifier: nn.Module,
        variables: Any,
        *,
        options: PipelineOptions = PipelineOptions(),  # noqa: B008 (frozen)
        detector: Callable[[jax.Array], Candidates] | None = None,
        costs: dict[int, float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.classifier, self.options, self.detector = classifier, options, detector
        self.variables = jax.device_put(variables)
        self.costs, self.detector_ms, self.clock = costs, 0.0, clock

        @functools.partial(jax.jit, static_argnames=("size",))
        def inspect(variables, image, boxes, size):
            taken = image_patches.letterboxed(boxes) if options.letterbox else boxes
            crops = image_patches.crop_and_resize(image, taken, size)
            outputs = classifier.apply(variables, crops, method="intermediates")
            probabilities = jax.nn.softmax(outputs["logits"].astype(jnp.float32))
            refined = taken
            if "deltas" in outputs:
                refined = refine_boxes(taken, outputs["deltas"].astype(jnp.float32))
            return probabilities, refined

        self._inspect = inspect
        self._suppress = jax.jit(functools.partial(box_overlap.suppress))

    def initial_state(self) -> PipelineState:
        """Before the first frame."""
        return PipelineState(no_tracks(self.options), 0, None)

    def warm_up(self, frame: Frame, repeats: int = 3) -> PipelineState:
        """Compile everything for frames of this size and measure what a batch costs."""
        frame = check_frame(frame)
        image = jax.device_put(frame.image)
        box = jnp.tile(jnp.asarray([[0.0, 0.0, 32.0, 32.0]]), (self.options.batch, 1))
        measured = {}
        for size in self.options.buckets:
            times = []
            for _ in range(repeats + 1):
                start = self.clock()
                jax.device_get(self._inspect(self.variables, image, box, size))
                times.append((self.clock() - start) * 1e3)
            measured[size] = float(np.median(times[1:]))
        if self.costs is None:
            self.costs = measured
        if self.detector is not None:
            for _ in range(2):
                start = self.clock()
                jax.device_get(self.detector(image))
                self.detector_ms = (self.clock() - start) * 1e3
        self._kept(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int32))
        state = self.initial_state()
        for _ in range(2):
            _, state = self(frame, state)
        return self.initial_state()

    def compiled(self) -> int:
        """Number of programs compiled so far for the functions that frames go through."""
        functions = [find_objects, self._inspect, self._suppress]
        return sum(function._cache_size() for function in functions)

    def __call__(
        self, frame: Frame, state: PipelineState | None = None
    ) -> tuple[FrameResult, PipelineState]:
        """Detections of one frame; a checked frame is assumed (`check_frame`).

        Raises ValueError before `warm_up`, or where the options want an elongation that is not
        there.
        """
        check_elongation(frame, self.options)
        state = self.initial_state() if state is None else state
        options, started = self.options, self.clock()
        if self.costs is None:
            raise ValueError("the pipeline has no costs: call warm_up(frame) first, or pass costs")
        height, width = frame.image.shape[:2]
        interval = FRAME_INTERVAL
        if state.timestamp is not None and frame.timestamp > state.timestamp:
            interval = frame.timestamp - state.timestamp
        image = jax.device_put(frame.image)
        found = find_objects(
            frame_arrays(frame, interval),
            state.tracks,
            options=options,
            wraps=frame.wraps,
            width=width,
            height=height,
        )
        tracks = found.tracks
        objects: Objects = jax.device_get(found)
        lidar_ms = self._elapsed(started)
        if objects.overflow:
            warnings.warn(
                f"{int(objects.overflow)} clusters beyond max_clusters "
                f"{options.clustering.max_clusters}: the nearest were kept",
                stacklevel=2,
            )
        order = objects.order[objects.patches.valid[objects.order]]
        schedule, answers = priority_schedule.run(
            order,
            objects.bucket,
            functools.partial(self._run_batch, image, objects.patches.boxes),
            lambda bucket: self.costs[bucket],
            batch=options.batch,
            deadline_ms=options.deadline_ms,
            clock=self.clock,
            started=started,
        )
        frame_boxes = None
        if self._detector_due(state.index, started):
            frame_boxes = jax.device_get(self.detector(image))
        detections = self._fuse(objects, schedule, answers, order, frame_boxes, started)
        result = FrameResult(
            detections,
            objects,
            schedule,
            lidar_ms,
            self._elapsed(started),
            frame_boxes is not None,
        )
        return result, PipelineState(tracks, state.index + 1, frame.timestamp)

    def _elapsed(self, started: float) -> float:
        return (self.clock() - started) * 1e3

    def _run_batch(self, image, boxes, bucket: int, rows: np.ndarray):
        padded = np.zeros((self.options.batch, 4), np.float32)
        padded[: len(rows)] = boxes[rows]
        answers = jax.device_get(self._inspect(self.variables, image, padded, bucket))
        return list(zip(*(part[: len(rows)] for part in answers)))

    def _detector_due(self, index: int, started: float) -> bool:
        if self.detector is None or not self.options.detector_every:
            return False
        if index % self.options.detector_every == 0:
            return True
        limit = self.options.deadline_ms
        return np.isfinite(limit) and self._elapsed(started) + self.detector_ms <= limit

    def _kept(self, boxes, scores, classes) -> np.ndarray:
        """Class-wise suppression of at most a fixed number of boxes, bool [K]."""
        count = len(boxes)
        size = self.options.max_patches + _MOST_FRAME_BOXES
        padded = np.zeros((size, 4), np.float32), np.zeros(size, np.float32), np.zeros(size, int)
        for whole, part in zip(padded, (boxes, scores, classes)):
            whole[:count] = part
        valid = np.arange(size) < count
        kept = self._suppress(padded[0], padded[1], self.options.suppression, padded[2], valid)
        return np.asarray(kept)[:count]

    def _fuse(self, objects, schedule, answers, order, frame_boxes, started) -> Detections:
        rows: list[tuple] = []
        patches, background = objects.patches, self.classifier.num_labels - 1
        inspected = [int(i) for i in order if int(i) in answers]
        inspected.sort(key=lambda i: schedule.batch_id[i])
        refined = getattr(self.classifier, "box_head", False)
        covered = np.zeros(len(objects.valid), bool)
        for i in inspected:
            probabilities, box = answers[i]
            members = patches.members[i]
            covered |= members
            if probabilities[background] > self.options.background_confidence:
                continue
            best = int(probabilities[:background].argmax())
            if not refined:
                flat = objects.flat.boxes[members]
                box = np.concatenate([flat[:, :2].min(0), flat[:, 2:].max(0)])
            rank = int(objects.rank[members].max())
            rows.append(
                (box, best, probabilities[best], FROM_PATCH, i, rank, schedule.finish_ms[i])
            )
        if frame_boxes is not None:
            rows += self._missed(patches, frame_boxes, self._elapsed(started))
        if rows:
            kept = self._kept(
                np.stack([r[0] for r in rows]), [r[2] for r in rows], [r[1] for r in rows]
            )
            rows = [row for row, keep in zip(rows, kept) if keep]
        for i in np.flatnonzero(objects.valid & ~covered):
            box = objects.flat.boxes[i]
            rows.append((box, UNKNOWN, 0.0, FROM_LIDAR, int(i), int(objects.rank[i]), -1.0))
        return _as_detections(rows, objects)

    def _missed(self, patches, found: Candidates, now: float) -> list[tuple]:
        """Full-frame boxes that overlap no patch, the surest first."""
        valid = np.flatnonzero(found.valid)[:_MOST_FRAME_BOXES]
        seen = patches.boxes[patches.valid]
        if len(seen):
            apart = box_overlap.iou(found.boxes[valid], seen).max(1) < self.options.least_overlap
            valid = valid[apart]
        return [
            (found.boxes[i], int(found.classes[i]), found.scores[i], FROM_FRAME, -1, -1, now)
            for i in valid
        ]


def _as_detections(rows: list[tuple], objects: Objects) -> Detections:
    boxes, classes, scores, source, row, rank, finish = zip(*rows) if rows else ((),) * 7
    row = np.asarray(row, np.int32)
    at = np.maximum(row, 0)
    known = row >= 0
    depth = objects.distance[at]
    return Detections(
        np.asarray(boxes, np.float32).reshape(-1, 4),
        np.asarray(classes, np.int32),
        np.asarray(scores, np.float32),
        np.asarray(source, np.int32),
        np.where(known[:, None], objects.boxes[at], np.nan).astype(np.float32),
        np.where(known, depth, np.nan).astype(np.float32),
        np.asarray(rank, np.int32),
        np.asarray(finish, np.float64),
        row,
    )
