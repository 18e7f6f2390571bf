"""Segmentation by U-Nets: cross-entropy and Dice with deep supervision, nnU-Net's augmentation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.biomedical import augmentation, losses, metrics
from jaxmodels.biomedical.preprocessing import annotated, labels_of
from train.building import build_model
from train.data import pipeline
from train.naming import ConfigError
from train.segmentation_inference import Windows, predict_probabilities


@functools.partial(jax.jit, static_argnums=0)
def _overlaps(task: Segmentation, variables, batch) -> dict[str, jax.Array]:
    logits = task.logits(variables["params"], batch["image"])[0]
    reference = task.one_hot(jnp.maximum(batch["label"], 0))
    predicted = task.hard(logits)
    valid = batch["mask"].reshape(-1, *(1,) * (batch["label"].ndim - 1))
    if task.ignore_label is not None:
        valid = valid * (batch["label"] != task.ignore_label)
    valid = jnp.broadcast_to(valid, batch["label"].shape)[..., None]
    axes = tuple(range(logits.ndim - 1))
    return {
        "overlap": (reference * predicted * valid).sum(axes),
        "total": ((reference + predicted) * valid).sum(axes),
    }


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """`model(image [B, *S, C]) -> logits` of classes or regions, at one or more resolutions.

    Attributes:
      patch: what the network sees; batches may be larger (augmentation cuts them).
      batch_dice: whether Dice adds up the batch.
      regions: values of each region, () for exclusive classes; `region_order` what they write.
      ignore_label: value of voxels that do not count.
      voxel_loss: cross_entropy | topk | focal. overlap_loss: dice | tversky.
      augment: full | intensity | mirror | none.
      masked: image channels that are 0 where labels are -1, whatever augmentation made of them.
      prior_labels: trailing one-hot channels of a cascade's first stage.
      image_weight: of the auxiliary loss of an image-level head (which classes a patch holds).
      mirror: test-time mirroring. step: of inference windows, in tiles. context: slices beside.
      view: axis whose slices a flat network sees.
      report_cases: whether the report predicts whole held-out cases.
    """

    model: nn.Module
    patch: tuple[int, ...]
    batch_dice: bool = True
    regions: tuple[tuple[int, ...], ...] = ()
    region_order: tuple[int, ...] = ()
    ignore_label: int | None = None
    voxel_loss: str = "cross_entropy"
    overlap_loss: str = "dice"
    augment: str = "full"
    masked: tuple[int, ...] = ()
    prior_labels: int = 0
    image_weight: float = 0.0
    mirror: bool = True
    step: float = 0.5
    context: int = 0
    view: int = 0
    inference_batch: int = 4
    report_cases: bool = True

    def __post_init__(self) -> None:
        augmentation.Augmentation.named(self.augment)
        for name, known in (
            ("voxel_loss", losses.VOXEL_LOSSES),
            ("overlap_loss", losses.OVERLAP_LOSSES),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"config.task_args.{name}: {getattr(self, name)!r}; known: {', '.join(known)}"
                )
        if self.regions and (self.voxel_loss, self.overlap_loss) != ("cross_entropy", "dice"):
            raise ConfigError(
                "config.task_args: regions have binary cross-entropy and Dice; voxel_loss and "
                "overlap_loss are for exclusive classes"
            )
        heads = len(self.regions) or self.model.num_classes - 1
        if self.image_weight and self.model.image_classes != heads:
            raise ConfigError(
                f"config.model_args.image_classes: {self.model.image_classes}, image_weight needs "
                f"one for each of {heads} {'regions' if self.regions else 'foreground classes'}"
            )
        self.model.check_patch(self.patch)

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Parameters for images with the batch's channels."""
        image = jnp.zeros((1, *self.patch, batch["image"].shape[-1]), jnp.float32)
        return self.model.init(rng, image)["params"], {}

    def logits(self, params, image) -> tuple[jax.Array, ...]:
        """Logits of every resolution, full resolution first."""
        found = self.model.apply({"params": params}, image, train=False)
        return found if isinstance(found, tuple) else (found,)

    def one_hot(self, label: jax.Array) -> jax.Array:
        """Regions [*, R] or classes [*, K] of a label map; ignored voxels have none."""
        if self.regions:
            return jnp.stack(
                [jnp.isin(label, jnp.asarray(values)) for values in self.regions], -1
            ).astype(jnp.float32)
        return jax.nn.one_hot(label, self.model.num_classes)

    def hard(self, logits: jax.Array) -> jax.Array:
        """Decisions {0, 1} in the form of `one_hot`."""
        if self.regions:
            return (logits > 0).astype(jnp.float32)
        return jax.nn.one_hot(logits.argmax(-1), logits.shape[-1])

    def _one_loss(self, logits: jax.Array, label: jax.Array) -> jax.Array:
        if self.regions:
            mask = None
            if self.ignore_label is not None:
                mask = (label != self.ignore_label).astype(jnp.float32)
            return losses.region_loss(
                logits, self.one_hot(label), batch_dice=self.batch_dice, mask=mask
            )
        return losses.segmentation_loss(
            logits,
            label,
            batch_dice=self.batch_dice,
            ignore_label=self.ignore_label,
            voxel_loss=self.voxel_loss,
            overlap_loss=self.overlap_loss,
        )

    def prepare(self, rng: jax.Array, image: jax.Array, label: jax.Array):
        """Augmented patches of a batch; labels of -1 are background then."""
        settings = augmentation.Augmentation.named(self.augment)
        channels = image.shape[-1] - self.prior_labels
        keys = jax.random.split(rng, 3)
        if settings is None:
            return image, jnp.maximum(label, 0)
        image, label = augmentation.augment(keys[0], image, label, self.patch, settings, channels)
        if self.masked:
            masked = np.isin(np.arange(image.shape[-1]), self.masked)
            image = jnp.where((label < 0)[..., None] & masked, 0, image)
        label = jnp.maximum(label, 0)
        if self.prior_labels:
            prior = augmentation.random_morphology(keys[1], image[..., channels:])
            prior = augmentation.remove_random_components(keys[2], prior)
            image = jnp.concatenate([image[..., :channels], prior], -1)
        return image, label

    def loss(self, params, extra, batch, rng):
        """The weighted loss of all resolutions."""
        image, label = self.prepare(rng, batch["image"], batch["label"])
        metrics_ = {}
        if self.image_weight:
            maps = self.model.apply({"params": params}, image, method="intermediates")
            levels = [maps[f"ds{i}"] for i in range(len(maps)) if f"ds{i}" in maps]
        else:
            levels = self.logits(params, image)
        targets = [losses.nearest_downsample(label, y.shape[1:-1]) for y in levels]
        loss = losses.deep_supervision_loss(self._one_loss, levels, targets)
        if self.image_weight:
            present = self.one_hot(label).max(tuple(range(1, label.ndim)))
            present = present if self.regions else present[..., 1:]
            score = maps["image_logits"]
            image_loss = (jax.nn.softplus(score) - score * present).mean()
            metrics_["image_loss"] = image_loss
            loss = loss + self.image_weight * image_loss
        return loss, (extra, metrics_)

    # -- evaluation --------------------------------------------------------------------------------

    def measure(self, variables, config, mesh) -> dict[str, float]:
        """Dice of the evaluation patches pooled, per class and as their mean (`pseudo_dice`)."""
        del mesh
        overlap = total = 0.0
        split = config.eval.split or pipeline.eval_split(config.data)
        size = config.eval.batch_size or config.batch_size
        for batch in pipeline.eval_batches(config.data, split, batch_size=size):
            found = jax.device_get(_overlaps(self, variables, batch))
            overlap, total = overlap + found["overlap"], total + found["total"]
        values = np.where(total > 0, 2 * overlap / np.maximum(total, 1), np.nan)
        values = values if self.regions else values[1:]
        named = {f"dice_{i + 1}": float(v) for i, v in enumerate(values)}
        mean = float(np.nanmean(values)) if np.isfinite(values).any() else 0.0
        return {"pseudo_dice": mean, **(named if len(named) > 1 else {})}

    def windows(self) -> Windows:
        """How inference slides the network."""
        return Windows(
            tile=self.patch,
            classes=self.model.num_classes,
            regions=bool(self.regions),
            step=self.step,
            mirror_axes=tuple(range(len(self.patch))) if self.mirror else (),
            context=self.context,
            view=self.view,
            batch=self.inference_batch,
        )

    def report(self, variables, sums, config) -> dict[str, float]:
        """Baselines of the data, and the Dice of whole held-out cases by sliding window."""
        family, options = pipeline.resolve(config.data)
        numbers = dict(family.baselines(config.data)) if hasattr(family, "baselines") else {}
        if self.report_cases and hasattr(family, "held_out"):
            targets = list(family.dataset(options)["targets"].values())
            order = self.region_order or None
            rows = []
            for _, image, label, _ in family.held_out(options):
                p = predict_probabilities(self.model, [variables], image, self.windows())
                label = np.maximum(np.asarray(label), 0)
                pair = annotated(labels_of(p, order), label, self.ignore_label)
                rows.append(case_dice(*pair, targets))
            per_class, mean = metrics.mean_over_cases(np.asarray(rows), warn=False)
            numbers["held_out_dice"] = mean
            if len(per_class) > 1:
                numbers |= {f"held_out_dice_{i + 1}": float(v) for i, v in enumerate(per_class)}
        return numbers

    def predict_files(self, variables, path, output, config):
        """Label maps of every case of a folder of images, written into the folder `output`."""
        family, options = pipeline.resolve(config.data)
        if not hasattr(family, "prediction_cases"):
            raise ConfigError(f"config.data.name: {config.data.name} cannot read single images")
        folder, count = Path(output), 0
        folder.mkdir(parents=True, exist_ok=True)
        for _, image, write in family.prediction_cases(path, options):
            write(predict_probabilities(self.model, [variables], image, self.windows()), folder)
            count += 1
        return f"{count} label maps in {folder}"


def case_dice(prediction: np.ndarray, reference: np.ndarray, targets) -> list[float]:
    """Dice of every target (a list of label values) in one case."""
    return [metrics.dice(np.isin(reference, v), np.isin(prediction, v)) for v in targets]


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def from_config(config) -> Segmentation:
    """The task of a config: its model and `task_args`; patch and channels follow the data."""
    arguments: Mapping[str, Any] = {k: _tuples(v) for k, v in config.task_args.items()}
    family, options = pipeline.resolve(config.data)
    if options.get("batch_size", config.batch_size) != config.batch_size:
        raise ConfigError(
            f"data.options.batch_size {options['batch_size']} differs from config.batch_size "
            f"{config.batch_size}: it decides which patches hold foreground"
        )
    # Training batches may be enlarged for augmentation; the family knows what remains of them.
    specs = getattr(family, "network_spec", family.element_spec)(options)
    model = build_model(config)
    channels = specs["image"].shape[-1]
    if model.input_channels != channels:
        raise ConfigError(
            f"config.model_args.input_channels: {model.input_channels}, the data have {channels}"
        )
    arguments = {"patch": tuple(specs["label"].shape), **arguments}
    try:
        # Mistakes that need no data first: preparing these may take long.
        task = Segmentation(model=model, **{**arguments, "image_weight": 0.0})
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.task_args: {error}") from None
    if hasattr(family, "task_arguments") and options["path"]:
        # What the data say of themselves, unless the config says otherwise.
        arguments = {**family.task_arguments(options), **arguments}
        outputs = int(family.dataset(options)["outputs"])
        if model.num_classes != outputs:
            raise ConfigError(
                f"config.model_args.num_classes: {model.num_classes}, the data have {outputs}"
            )
    return dataclasses.replace(task, **arguments)
