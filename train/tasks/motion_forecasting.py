"""Motion forecasting: the target's future from polylines (VectorNet) or rasters (ConvNet)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.driving import forecast_objective, vectorization
from jaxmodels.driving.forecasting_metrics import MISS_THRESHOLD, steps_at_seconds
from train.building import build_model
from train.naming import ConfigError

STEP_SECONDS = 0.1
BUCKETS = (32, 64, 128, 256)
# Constant velocity takes the mean of the last second.
_VELOCITY_STEPS = 10
_SCENE = ("vectors", "vector_mask", "target_index")


@dataclasses.dataclass(frozen=True)
class MotionForecasting:
    """Gaussian likelihood of the future and, for VectorNet, completion of hidden polylines.

    Attributes:
      model: `VectorNet` (inputs "vectors") or `RasterConvNet` (inputs "raster"; its coordinates
        are absolute, so that its likelihood is that of positions).
      completion: hide polylines in training and add `alpha` times the loss of recovering them.
      mask_rate: share of polylines hidden. exactly_one: hide one instead.
      space: "offset" or "position". delta: Huber threshold.

    Under `pmap` and with micro-batches the completion loss is averaged over each part's hidden
    nodes first; under `jit` over all of the global batch.
    """

    model: nn.Module
    inputs: str = "vectors"
    completion: bool = True
    alpha: float = 1.0
    mask_rate: float = 0.15
    exactly_one: bool = False
    space: str = "offset"
    delta: float = 1.0

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Parameters and batch statistics; they do not depend on the batch's sizes."""
        if self.inputs == "raster":
            arguments = (jnp.zeros((1, 32, 32, self.model.in_ch)), batch["cells"][:1])
        else:
            arguments = [jnp.zeros(s.shape, s.dtype) for s in self.model.example_inputs()]
        variables = self.model.init(rng, *arguments)
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss(self, params, extra, batch, rng):
        """The objective with its parts, and the mean final error on the training batch."""
        future, valid = batch["future_offsets"], batch["future_valid"]
        if self.inputs == "raster":
            coords, updated = self.model.apply(
                {"params": params, **extra},
                batch["image"],
                batch["cells"],
                train=True,
                mutable=["batch_stats"],
            )
            positions = coords - batch["start"][:, None]
            truth, known = forecast_objective.positions_of(future), _known(valid)
            loss = forecast_objective.gaussian_nll(positions, truth, known)
            return loss, ({**extra, **updated}, {"final_error": _final_error(positions, batch)})
        scene = [batch[name] for name in _SCENE]
        node_mask = None
        if self.completion:
            present = batch["vector_mask"].any(-1)
            node_mask = forecast_objective.sample_node_mask(
                rng, present, batch["target_index"], self.mask_rate, self.exactly_one
            )
        outputs = self.model.apply(
            {"params": params},
            *scene,
            node_mask,
            target_only=not self.completion,
            method="intermediates",
        )
        losses = forecast_objective.objective(
            outputs,
            future,
            valid,
            node_mask,
            alpha=self.alpha,
            space=self.space,
            delta=self.delta,
        )
        metrics = {"final_error": _final_error(outputs["positions"], batch)}
        if self.completion:
            metrics |= {"loss_traj": losses.trajectory, "loss_node": losses.node}
        return losses.total, (extra, metrics)

    def positions(self, variables, batch) -> jax.Array:
        """Predicted positions [b, T, 2] from the target's last observed place."""
        if self.inputs == "raster":
            coords = self.model.apply(variables, batch["image"], batch["cells"])
            return coords - batch["start"][:, None]
        return self.model.apply(variables, *(batch[name] for name in _SCENE)).positions

    def evaluate(self, variables, batch):
        """Sums of displacement errors and misses, of the model and of constant velocity."""
        valid = batch["future_valid"] * batch["mask"][:, None]
        truth = forecast_objective.positions_of(batch["future_offsets"])
        known = _known(valid).astype(jnp.float32)
        steps = truth.shape[1]
        at = steps_at_seconds(steps, max(round(steps * STEP_SECONDS), 1))
        sums = {"count": batch["mask"].sum(), "known_steps": known.sum()}
        sums |= {f"known_{t}": known[:, step - 1].sum() for t, step in at.items()}
        sums["known_last"] = known[:, -1].sum()
        for prefix, positions in (
            ("", self.positions(variables, batch)),
            ("constant_velocity_", constant_velocity(batch, steps)),
        ):
            errors = jnp.linalg.norm(positions - truth, axis=-1) * known
            for t, step in at.items():
                sums[f"{prefix}DE@{t}s|known_{t}"] = errors[:, step - 1].sum()
            sums[f"{prefix}ADE|known_steps"] = errors.sum()
            missed = (errors[:, -1] > MISS_THRESHOLD).sum().astype(jnp.float32)
            sums[f"{prefix}miss_rate|known_last"] = missed
        return sums

    def report(self, variables, sums, config) -> dict[str, float]:
        """The final error as a share of constant velocity's; held-out completion loss."""
        last = max((k for k in sums if k.startswith("DE@")), key=lambda k: int(k[3:-1]))
        share = sums[last] / max(sums[f"constant_velocity_{last}"], 1e-9)
        numbers = {f"{last}_over_constant_velocity": share}
        if self.inputs == "vectors" and self.completion:
            numbers |= self.completion_report(variables, config)
        return numbers

    def completion_report(self, variables, config) -> dict[str, float]:
        """Held-out completion loss beside that of always predicting the mean node.

        Hidden nodes are drawn from a fixed key; the mean is that of the hidden nodes themselves,
        the best constant there is.
        """
        from train.data import pipeline

        @jax.jit
        def hidden_nodes(variables, batch, rng):
            present = batch["vector_mask"].any(-1) & (batch["mask"][:, None] > 0)
            mask = forecast_objective.sample_node_mask(
                rng, present, batch["target_index"], self.mask_rate, self.exactly_one
            )
            scene = [batch[name] for name in _SCENE]
            found = self.model.apply(variables, *scene, mask, method="intermediates")
            return found["node_pred"], found["polyline_norm"], mask

        size = config.eval.batch_size or config.batch_size
        split = config.eval.split or pipeline.eval_split(config.data)
        predicted, nodes = [], []
        for i, batch in enumerate(pipeline.eval_batches(config.data, split, batch_size=size)):
            rng = jax.random.fold_in(jax.random.key(0), i)
            a, b, mask = jax.device_get(hidden_nodes(variables, batch, rng))
            predicted.append(a[mask])
            nodes.append(b[mask])
        predicted, nodes = np.concatenate(predicted), np.concatenate(nodes)
        everything = np.ones((1, len(nodes)), bool)
        mean = np.broadcast_to(nodes.mean(0), nodes.shape)

        def loss(guess):
            return float(
                forecast_objective.node_loss(guess[None], nodes[None], everything, self.delta)
            )

        return {"node_loss": loss(predicted), "node_loss_of_mean": loss(mean)}

    def predict(self, variables, path, config):
        """Forecasts in city coordinates: rows (sequence, step, seconds, x, y).

        `path` is a CSV of Argoverse 1 or a folder of them (Argoverse 2: of scenarios); the lanes
        are the city's map below `data.options.map_path`, or stand beside each sequence.
        """
        rows = [("sequence", "step", "seconds", "x", "y")]
        for name, positions in self.forecasts(variables, path, config):
            for step, (x, y) in enumerate(positions.tolist(), start=1):
                rows.append((name, step, round(step * STEP_SECONDS, 3), x, y))
        return rows

    def forecasts(self, variables, path, config):
        """Yields (sequence, positions float64 [T, 2] in city coordinates)."""
        from train.data import motion_scenes, pipeline

        _, options = pipeline.resolve(config.data)
        # No polyline that training and evaluation would have cut; few shapes all the same.
        most = options["max_polylines"]
        buckets = (*(bucket for bucket in BUCKETS if bucket < most), most)
        apply = jax.jit(self.positions)
        size = config.eval.batch_size or config.batch_size
        files = motion_scenes.sequences_below(path, options)
        for first in range(0, len(files), size):
            scenes = [motion_scenes.read_scene(f, options) for f in files[first : first + size]]
            if self.inputs == "raster":
                frames = [motion_scenes.raster_frame(scene, options) for scene in scenes]
                examples = [motion_scenes.raster_example(scene, options) for scene in scenes]
                batch = {k: np.stack([e[k] for e in examples]) for k in examples[0]}
                places = [(f.origin, f.heading - np.pi / 2) for f in frames]
                moved = batch["start"][:, None]
            else:
                found = [motion_scenes.vector_scene(scene, options) for scene in scenes]
                batch = vectorization.collate(found, buckets)
                places = [(scene.origin, scene.heading) for scene in found]
                moved = 0.0
            missing = size - len(scenes)
            if first:
                # A last, smaller batch takes the others' shape.
                batch = {k: np.concatenate([v, np.repeat(v[:1], missing, 0)])
                         for k, v in batch.items()}  # fmt: skip
            positions = np.asarray(apply(variables, batch))[: len(scenes)] + moved
            for scene, place, track in zip(scenes, places, positions):
                yield scene.name, vectorization.to_city(track, *place)


def _known(valid: jax.Array) -> jax.Array:
    return forecast_objective.reachable(valid)


def _final_error(positions: jax.Array, batch) -> jax.Array:
    """Mean error (metres) at the last step over the scenes where it is known."""
    known = _known(batch["future_valid"])[:, -1]
    truth = batch["future_offsets"].sum(1)
    errors = jnp.linalg.norm(jax.lax.stop_gradient(positions[:, -1]) - truth, axis=-1)
    return jnp.where(known, errors, 0).sum() / jnp.maximum(known.sum(), 1)


def constant_velocity(batch, steps: int) -> jax.Array:
    """Positions [b, T, 2] at the mean velocity of the last second observed (or less).

    `history` [b, To, 2] is relative to the last observed place.
    """
    history, valid = batch["history"], batch["history_valid"] > 0
    obs = history.shape[1]
    window = valid & (jnp.arange(obs) >= obs - 1 - _VELOCITY_STEPS)
    first = jnp.argmax(window, axis=1)
    start = jnp.take_along_axis(history, first[:, None, None], axis=1)[:, 0]
    spent = jnp.maximum(obs - 1 - first, 1)
    velocity = (history[:, -1] - start) / spent[:, None]
    return velocity[:, None] * jnp.arange(1, steps + 1)[:, None]


def from_config(config) -> MotionForecasting:
    """The task of a config; the model must fit what the data gives."""
    from train.data import motion_scenes, pipeline

    if config.data.name and pipeline.load(config.data.name) is not motion_scenes:
        raise ConfigError(
            f"config.data.name: {config.data.name!r}; the task motion_forecasting takes "
            "motion_scenes"
        )
    _, options = pipeline.resolve(config.data)
    if config.eval.split == "test" and options["kind"] != "simulator":
        # Errors of nothing would be reported as 0 m.
        raise ConfigError(
            f"config.eval.split: the test split of {options['kind']} has no futures to compare "
            "with; write forecasts with train.predict"
        )
    model, inputs = build_model(config), options["inputs"]
    if (inputs == "raster") != hasattr(model, "in_ch") or not hasattr(model, "horizon"):
        wanted = "driving.raster_convnet" if inputs == "raster" else "driving.vectornet"
        raise ConfigError(
            f"config.model: {config.model!r} does not take data.options.inputs={inputs!r}; "
            f"use {wanted}"
        )
    spec = motion_scenes.element_spec(options)
    pairs = [("horizon", options["horizon"])]
    if inputs == "raster":
        pairs.append(("in_ch", spec["image"].shape[-1]))
    else:
        pairs += [("in_dim", spec["vectors"].shape[-1]), ("coord_dim", 2)]
    for name, wanted in pairs:
        if getattr(model, name) != wanted:
            raise ConfigError(
                f"config.model_args.{name}: {getattr(model, name)}, but the data gives {wanted}"
            )
    return MotionForecasting(model=model, inputs=inputs, **config.task_args)
