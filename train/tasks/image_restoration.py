"""Super-resolution and artifact removal of compressed pictures (AIM 2022, Track 1).

The objective is Swin2SR's: a pixel loss, the same picture after bicubic downsampling, and high
frequencies; the low-resolution picture that the `pixelshuffle_aux` head also emits is compared
with the downsampled target. A weight of 0 leaves its term out.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.restoration import inference, losses, metrics
from jaxmodels.restoration.swin2sr import sr_of
from train.building import build_model, build_named
from train.data import pipeline
from train.naming import ConfigError
from train.parallel import local_copy
from train.restoration_files import save_strip, write_picture

PIXEL_LOSSES = ("l1", "charbonnier")
_SSIM_WINDOW = 11  # pixels a side that the report's SSIM needs


@dataclasses.dataclass(frozen=True)
class ImageRestoration:
    """Batches `lr` [B, p, p, C], `hr` [B, s p, s p, C] in [0, 1] -> a weighted sum of means.

    Attributes:
      pixel, eps: "l1", or "charbonnier" with this eps.
      aux_weight: of |D(hr) - D(sr)|. aux_image_weight: of the aux head's picture against D(hr).
      hf_weight: of the high frequencies. D is antialiased bicubic downsampling by the scale.
      tile, tile_overlap: of inference, in input pixels; tile 0 is the whole picture.
      tile_blend: how overlaps are averaged, "taper" or "mean" (officially).
      self_ensemble: whether evaluation and prediction average over the eight symmetries.
      border: pixels left out of the reported metrics at each side (the challenge: 0).
      first: a model of artifact removal that prediction runs before this one (the entry "CI2").
    """

    model: nn.Module
    pixel: str = "l1"
    eps: float = losses.CHARBONNIER_KAIR
    aux_weight: float = 1.0
    aux_image_weight: float = 1.0
    hf_weight: float = 1.0
    tile: int = 0
    tile_overlap: int = 32
    tile_blend: str = "taper"
    self_ensemble: bool = False
    border: int = 0
    reference: str = ""
    first: nn.Module | None = None
    first_name: str = ""
    first_checkpoint: str = ""

    @property
    def scale(self) -> int:
        """Output pixels for an input pixel."""
        return self.model.upscale

    @property
    def window(self) -> int:
        """The multiple to which inputs are padded."""
        return self.model.window_size

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Parameters; there are no other collections."""
        return self.model.init(rng, batch["lr"][:1])["params"], {}

    def loss(self, params, extra, batch, rng):
        """The weighted sum, and its terms to log."""
        output = self.model.apply(
            {"params": params}, batch["lr"], train=True, rngs={"dropout": rng}
        )
        sr, hr = sr_of(output).astype(jnp.float32), batch["hr"]
        if self.pixel == "l1":
            total = losses.l1_loss(sr, hr)
        else:
            total = losses.charbonnier_loss(sr, hr, self.eps)
        terms = {"pixel": total}
        if self.aux_weight and self.scale > 1:
            terms["aux"] = losses.auxiliary_loss(sr, hr, self.scale)
            total = total + self.aux_weight * terms["aux"]
        if self.aux_image_weight and isinstance(output, tuple) and len(output) == 2:
            wanted = losses.downsample_bicubic(hr, self.scale)
            aux = output[1][:, : wanted.shape[1], : wanted.shape[2]].astype(jnp.float32)
            terms["aux_image"] = losses.l1_loss(aux, wanted)
            total = total + self.aux_image_weight * terms["aux_image"]
        if self.hf_weight:
            terms["hf"] = losses.high_frequency_loss(sr, hr)
            total = total + self.hf_weight * terms["hf"]
        return total, (extra, terms)

    def measure(self, variables, config, mesh) -> dict[str, float]:
        """PSNR of the test pictures, and what it gains over Pillow's bicubic (dB)."""
        scores = self._scores(local_copy(variables, mesh), config, self.self_ensemble)
        return {k: metrics.mean_psnr(scores[k]) for k in ("psnr", "gain")}

    def report(self, variables, sums, config):
        """The baseline, SSIM, PSNR-B, luma PSNR as the Swin2SR script has it, the ensemble's."""
        del sums
        full = self._scores(variables, config, self.self_ensemble, full=True)
        numbers = {k: metrics.mean_psnr(v) for k, v in full.items() if k not in ("psnr", "gain")}
        if not self.self_ensemble:
            turned = self._scores(variables, config, True)
            numbers["ensemble_psnr"] = metrics.mean_psnr(turned["psnr"])
            numbers["ensemble_gain"] = metrics.mean_psnr(turned["gain"])
        return numbers

    def _scores(self, variables, config, ensemble: bool, full: bool = False):
        """Lists of metrics, one number a test picture."""
        family, options = pipeline.resolve(config.data)
        scores: dict[str, list[float]] = {}
        crop = self.border
        for _, lr, hr in family.eval_images(options):
            sr = metrics.to_uint8(self.restore(variables, lr / np.float32(255), ensemble))
            base = family.upsample(lr, self.scale)
            row = {"psnr": metrics.psnr(sr, hr, crop), "bicubic_psnr": metrics.psnr(base, hr, crop)}
            row["gain"] = metrics.gain(row["psnr"], row["bicubic_psnr"])
            if full:
                row["ssim"] = metrics.ssim(sr, hr, crop)
                row["psnr_b"] = metrics.psnr_b(sr, hr, crop)
                if hr.shape[-1] == 3:
                    # The Swin2SR script crops what a larger picture's border has, JPEG's nothing.
                    border = self.scale if self.scale > 1 else 0
                    row["psnr_y_cropped"] = metrics.psnr(sr, hr, border, y_channel=True)
                    row["ssim_y_cropped"] = metrics.ssim(sr, hr, border, y_channel=True)
            for key, value in row.items():
                scores.setdefault(key, []).append(value)
        return scores

    def restore(self, variables, image: np.ndarray, ensemble: bool | None = None) -> np.ndarray:
        """float32 [h, w, C] in [0, 1] -> [s h, s w, C], by tiles and the ensemble as configured."""
        apply = functools.partial(_compiled(self.model), variables)
        if self.self_ensemble if ensemble is None else ensemble:
            apply = inference.self_ensemble(apply)
        height, width = image.shape[:2]
        window = self.window
        # The official script's padding: mirrored to the next multiple, a whole one if need be.
        more = [(0, window - n % window) for n in (height, width)]
        padded = np.pad(np.asarray(image, np.float32), [*more, (0, 0)], mode="symmetric")
        if self.tile:
            whole = inference.tiled(
                apply,
                padded,
                tile=self.tile,
                scale=self.scale,
                window=window,
                overlap=self.tile_overlap,
                blend=self.tile_blend,
            )
        else:
            whole = np.asarray(apply(jnp.asarray(padded)[None])[0], np.float32)
        return whole[: height * self.scale, : width * self.scale]

    predicts_test = True

    def predict_files(self, variables, path, output, config) -> str:
        """Every picture below `path` restored, as `OUTPUT/NAME.png`.

        With `task_args.reference` (a folder of the originals, by stem), or with `test` for `path`
        (the data's own test pictures), also `OUTPUT/strips/`: input enlarged | output | reference
        as a whole and at the most textured place; and `OUTPUT/psnr.csv`.
        """
        path, folder = Path(path), Path(output)
        restore = self._two_stage(variables)
        strips = folder / "strips"
        count, rows = 0, [("file", "psnr", "bicubic_psnr")]
        family, _ = pipeline.resolve(config.data)
        for stem, lr, hr in self._inputs(path, config):
            folder.mkdir(parents=True, exist_ok=True)
            sr = metrics.to_uint8(restore(lr / np.float32(255)))
            write_picture(folder / f"{stem}.png", sr)
            count += 1
            if hr is None:
                continue
            hr = hr[: sr.shape[0], : sr.shape[1]]
            base = family.upsample(lr, self.scale)
            strips.mkdir(exist_ok=True)
            ours, theirs = (metrics.psnr(x, hr, self.border) for x in (sr, base))
            save_strip(strips / f"{stem}.png", base, sr, hr, (theirs, ours))
            rows.append((stem, ours, theirs))
        said = f"{count} pictures in {folder}"
        if len(rows) == 1:
            return said
        with open(folder / "psnr.csv", "w", newline="") as table:
            csv.writer(table).writerows(rows)
        means = [metrics.mean_psnr(row[k] for row in rows[1:]) for k in (1, 2)]
        return f"{said}: PSNR {means[0]:.3f} dB, bicubic {means[1]:.3f} dB"

    def _inputs(self, path: Path, config):
        """(stem, low resolution, original or None) of what is to be restored."""
        from train.data import image_pairs

        family, options = pipeline.resolve(config.data)
        if str(path) == "test" and not path.exists():
            yield from family.eval_images(options)
            return
        files = (
            list(image_pairs.files_by_stem(path, "--input").values()) if path.is_dir() else [path]
        )
        references = {}
        if self.reference:
            references = image_pairs.files_by_stem(Path(self.reference), "task_args.reference")
        for file in files:
            lr, hr = family.read_image(file, options), None
            if file.stem in references:
                hr = image_pairs.read_rgb(references[file.stem], bool(options["gray"]))
                cropped = hr[: lr.shape[0] * self.scale, : lr.shape[1] * self.scale]
                image_pairs.check_pair(lr, cropped, self.scale, file.stem)
            yield file.stem, lr, hr

    def _two_stage(self, variables):
        if self.first is None:
            return functools.partial(self.restore, variables)
        from jaxmodels.interop import catalog, checkpoint

        state = checkpoint.read(self.first_checkpoint).tensors
        found = catalog.find(self.first_name)
        loaded, done = catalog.import_state(found, self.first, state, source=self.first_checkpoint)
        catalog.log_what_was_taken(self.first_checkpoint, "", done)
        window = self.first.window_size
        before = dataclasses.replace(
            self, model=self.first, first=None, tile=self.tile // window * window
        )
        return lambda image: self.restore(
            variables, np.clip(before.restore(loaded, image), 0.0, 1.0)
        )


@functools.lru_cache(maxsize=8)
def _compiled(model: nn.Module):
    return jax.jit(lambda variables, x: sr_of(model.apply(variables, x)))


def from_config(config) -> ImageRestoration:
    """The task of a config: its model and `task_args`.

    Raises ConfigError where model and data disagree about the scale or the channels.
    """
    model = build_model(config)
    arguments = dict(config.task_args)
    first = arguments.pop("first", "")
    if first:
        if not arguments.get("first_checkpoint"):
            raise ConfigError(
                "config.task_args.first_checkpoint: the first stage needs its weights"
            )
        built = build_named(
            config, first, arguments.pop("first_args", {}), "config.task_args.first"
        )
        if built.upscale != 1:
            raise ConfigError(
                f"config.task_args.first: {first} enlarges by {built.upscale}; the first stage "
                "removes artifacts and has upscale 1 (jpeg_color, jpeg_gray)"
            )
        arguments.update(first=built, first_name=first)
    task = ImageRestoration(model=model, **arguments)
    if task.pixel not in PIXEL_LOSSES:
        raise ConfigError(f"config.task_args.pixel: {task.pixel!r}; known: {PIXEL_LOSSES}")
    if task.tile_blend not in inference.BLENDS:
        known = ", ".join(inference.BLENDS)
        raise ConfigError(f"config.task_args.tile_blend: {task.tile_blend!r}; known: {known}")
    if task.tile % task.window:
        raise ConfigError(
            f"config.task_args.tile: {task.tile} must be a multiple of the window {task.window}"
        )
    if task.tile and not 0 <= task.tile_overlap < task.tile:
        raise ConfigError(
            f"config.task_args.tile_overlap: {task.tile_overlap} must be at least 0 and less than "
            f"tile {task.tile}"
        )
    family, options = pipeline.resolve(config.data)
    _check_border(task.border, family, options)
    if options["scale"] != task.scale:
        raise ConfigError(
            f"config.data.options.scale: {options['scale']}, but the model has upscale {task.scale}"
        )
    channels = 1 if options["gray"] else 3
    if model.in_chans != channels:
        raise ConfigError(
            f"config.data.options.gray: {options['gray']}, but the model has in_chans "
            f"{model.in_chans}"
        )
    return task


def _check_border(border, family, options) -> None:
    """Refuse a border that leaves less of a test picture than SSIM's window."""
    if not isinstance(border, int) or border < 0:
        raise ConfigError(f"config.task_args.border: {border!r} is no number of pixels")
    side = family.shortest_side(options)
    if border and side is not None and side - 2 * border < _SSIM_WINDOW:
        raise ConfigError(
            f"config.task_args.border: {border} leaves no {_SSIM_WINDOW}x"
            f"{_SSIM_WINDOW} pixels of a test picture whose shorter side has {side}"
        )
