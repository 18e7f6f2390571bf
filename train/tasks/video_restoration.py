"""Super-resolution of compressed videos (AIM 2022, Track 2): BasicVSR++ and the IVL entry.

BasicVSR++ restores whole RGB clips. The IVL network restores the luma of one frame at a time from
its neighbors; chroma is enlarged by bicubic interpolation.
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

from jaxmodels.restoration import inference, ivl, losses, metrics
from train.building import build_model
from train.data import degradation, pipeline
from train.naming import ConfigError
from train.parallel import local_copy
from train.restoration_files import save_strip, write_picture


@dataclasses.dataclass(frozen=True)
class VideoRestoration:
    """Batches `lr` [B, T, p, p, 3], `hr` [B, T, s p, s p, 3] in [0, 1] -> Charbonnier loss.

    Attributes:
      eps: of the Charbonnier loss.
      self_ensemble: whether evaluation and prediction average over the eight symmetries.
      frames_at_once: longest clip given to a recurrent network in inference; 0 for all frames.
        Longer videos are cut into clips that share `frames_shared` frames at each end.
      reference: folder of originals by name, for strips and PSNR of predictions.
    """

    model: nn.Module
    eps: float = losses.CHARBONNIER_BASICVSR
    self_ensemble: bool = False
    frames_at_once: int = 0
    frames_shared: int = 5
    reference: str = ""

    @property
    def luma_only(self) -> bool:
        """Whether the network sees the luma of a few frames instead of RGB clips."""
        return isinstance(self.model, ivl.MFVQESRY)

    @property
    def scale(self) -> int:
        """Output pixels for an input pixel."""
        return 4 if getattr(self.model, "is_low_res_input", True) else 1

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Parameters, and the flow network's normalization as `buffers`."""
        example = batch["lr"][:1, :2]
        if self.luma_only:
            example = jnp.zeros((*batch["lr"].shape[2:4], self.model.tmp), jnp.float32)[None]
        variables = self.model.init(rng, example)
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss(self, params, extra, batch, rng):
        """Charbonnier loss of all frames, or of the middle frame's luma."""
        del rng
        variables = {"params": params, **extra}
        if self.luma_only:
            frames = batch["lr"].shape[1]
            lr = ivl.rgb_to_ycbcr(batch["lr"])[..., 0]
            x = jnp.moveaxis(lr, 1, -1)[..., ivl.frame_windows(frames, self.model.tmp)[frames // 2]]
            sr = self.model.apply(variables, x, train=True)
            hr = ivl.rgb_to_ycbcr(batch["hr"][:, frames // 2])[..., :1]
        else:
            sr, hr = self.model.apply(variables, batch["lr"], train=True), batch["hr"]
        loss = losses.charbonnier_loss(sr.astype(jnp.float32), hr, self.eps)
        mse = jnp.square(jnp.clip(sr, 0, 1).astype(jnp.float32) - hr).mean()
        return loss, (extra, {"train_psnr": -10 * jnp.log10(jnp.maximum(mse, 1e-10))})

    def measure(self, variables, config, mesh) -> dict[str, float]:
        """RGB PSNR of frames, averaged over frames, then videos; the gain over bicubic (dB)."""
        scores = self._scores(local_copy(variables, mesh), config, self.self_ensemble)
        return {k: metrics.mean_psnr(scores[k]) for k in ("psnr", "gain")}

    def report(self, variables, sums, config):
        """The baseline and the self-ensemble."""
        del sums
        scores = self._scores(variables, config, not self.self_ensemble)
        name = "ensemble" if not self.self_ensemble else "single"
        return {
            "bicubic_psnr": metrics.mean_psnr(scores["bicubic_psnr"]),
            f"{name}_psnr": metrics.mean_psnr(scores["psnr"]),
            f"{name}_gain": metrics.mean_psnr(scores["gain"]),
        }

    def _scores(self, variables, config, ensemble: bool) -> dict[str, list[float]]:
        family, options = pipeline.resolve(config.data)
        scores: dict[str, list[float]] = {"psnr": [], "bicubic_psnr": [], "gain": []}
        for _, lr, hr in family.eval_videos(options):
            sr = metrics.to_uint8(self.restore(variables, lr, ensemble))
            ours = metrics.mean_psnr(metrics.psnr(a, b) for a, b in zip(sr, hr))
            base = [self.enlarged(frame) for frame in lr]
            theirs = metrics.mean_psnr(metrics.psnr(a, b) for a, b in zip(base, hr))
            for key, value in zip(scores, (ours, theirs, metrics.gain(ours, theirs))):
                scores[key].append(value)
        return scores

    def enlarged(self, frame: np.ndarray) -> np.ndarray:
        """Pillow's bicubic of one frame, the baseline; the frame itself at scale 1."""
        return degradation.upsample(frame, self.scale) if self.scale > 1 else frame

    def restore(self, variables, lr: np.ndarray, ensemble: bool | None = None) -> np.ndarray:
        """uint8 [T, h, w, 3] -> float32 [T, s h, s w, 3]."""
        ensemble = self.self_ensemble if ensemble is None else ensemble
        apply = functools.partial(_compiled(self.model), variables)
        if ensemble:
            apply = inference.self_ensemble(apply)
        clip = lr.astype(np.float32) / np.float32(255)
        if self.luma_only:
            windows = ivl.frame_windows(len(clip), self.model.tmp)
            frames = [apply(jnp.asarray(clip[w])[None])[0, 0] for w in windows]
            return np.stack([np.asarray(frame, np.float32) for frame in frames])
        length = self.frames_at_once
        if not length or len(clip) <= length:
            return np.asarray(apply(jnp.asarray(clip)[None])[0], np.float32)
        shared = self.frames_shared
        starts = inference.tile_starts(len(clip), length, 2 * shared)
        whole = None
        for start in starts:
            part = np.asarray(apply(jnp.asarray(clip[start : start + length])[None])[0])
            if whole is None:
                whole = np.zeros((len(clip), *part.shape[1:]), np.float32)
            # Frames at a cut lack neighbors: the half nearer to the clip's middle is kept.
            first = shared if start else 0
            whole[start + first : start + length] = part[first:]
        return whole

    predicts_test = True

    def predict_files(self, variables, path, output, config) -> str:
        """A video file or a folder of frames restored, as `OUTPUT/001.png`, ...; folders of videos
        as `OUTPUT/VIDEO/001.png`.

        With `task_args.reference` (the originals in the same layout), or with `test` for `path`
        (the data's own test videos), also strips of middle frames, input enlarged | output |
        reference, and `OUTPUT/psnr.csv`.
        """
        folder, count = Path(output), 0
        rows: list[tuple] = [("video", "psnr", "bicubic_psnr")]
        for name, nested, lr, hr in self._inputs(Path(path), config):
            place = folder / name if nested else folder
            place.mkdir(parents=True, exist_ok=True)
            sr = metrics.to_uint8(self.restore(variables, lr))
            count += 1
            for number, frame in enumerate(sr, start=1):
                write_picture(place / f"{number:03d}.png", frame)
            if hr is None:
                continue
            hr = hr[: len(sr), : sr.shape[1], : sr.shape[2]]
            if hr.shape != sr.shape:
                raise ConfigError(
                    f"task_args.reference: {name} is {hr.shape}, the output {sr.shape}"
                )
            middle = len(sr) // 2
            base = [self.enlarged(frame) for frame in lr]
            scores = [metrics.psnr(x[middle], hr[middle]) for x in (base, sr)]
            strip = folder / f"strip_{Path(name).stem}.png"
            save_strip(strip, base[middle], sr[middle], hr[middle], scores)
            ours, theirs = (
                metrics.mean_psnr(metrics.psnr(a, b) for a, b in zip(clip, hr))
                for clip in (sr, base)
            )
            rows.append((name, ours, theirs))
        said = f"{count} videos in {folder}"
        if len(rows) == 1:
            return said
        with open(folder / "psnr.csv", "w", newline="") as table:
            csv.writer(table).writerows(rows)
        means = [metrics.mean_psnr(row[k] for row in rows[1:]) for k in (1, 2)]
        return f"{said}: PSNR {means[0]:.3f} dB, bicubic {means[1]:.3f} dB"

    def _inputs(self, path: Path, config):
        """(name, whether it has a folder of its own, low resolution, original or None)."""
        family, options = pipeline.resolve(config.data)
        if str(path) == "test" and not path.exists():
            for name, lr, hr in family.eval_videos(options):
                yield name, True, lr, hr
            return
        nested = path.is_dir() and any(f.is_dir() for f in path.iterdir())
        for video in sorted(f for f in path.iterdir() if f.is_dir()) if nested else [path]:
            hr = None
            if self.reference:
                original = Path(self.reference)
                hr = family.read_video(original / video.name if nested else original)
            yield video.name, nested, family.read_video(video), hr


@functools.lru_cache(maxsize=8)
def _compiled(model: nn.Module):
    if isinstance(model, ivl.MFVQESRY):
        return jax.jit(lambda variables, x: ivl.restore_rgb(model, variables, x)[:, None])
    return jax.jit(lambda variables, x: model.apply(variables, x))


def from_config(config) -> VideoRestoration:
    """The task of a config: its model and `task_args`.

    Raises ConfigError where model and data disagree about the scale or the frames.
    """
    task = VideoRestoration(model=build_model(config), **config.task_args)
    options = pipeline.resolve(config.data)[1]
    if options["scale"] != task.scale:
        raise ConfigError(
            f"config.data.options.scale: {options['scale']}, but the model's scale is {task.scale}"
        )
    if task.frames_at_once and task.frames_at_once <= 2 * task.frames_shared:
        raise ConfigError(
            f"config.task_args.frames_at_once: {task.frames_at_once} must be more than twice "
            f"frames_shared = {task.frames_shared}"
        )
    return task
