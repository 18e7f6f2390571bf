"""Training a video encoder on pairs of frames: a frame's low codes beside its key's high ones.

The generator and the critics are frozen and travel as collections. Batches are

- `key` and `frame` [B, S, S, 3] in [-1, 1], of one clip each: the second stage;
- `image` (or `key`) alone: the first stage, the key path only;
- `z`, `key_noise`, `frame_noise`: the generator makes both frames (`train.data.latent_walks`), or
  the key alone without `frame_noise`.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.interop import catalog
from jaxmodels.video import video_metrics
from jaxmodels.video.latent_editing import latent_norm
from jaxmodels.video.query_decoder import frozen_mapping
from jaxmodels.video.stylegan2 import truncate
from jaxmodels.video.video_encoder import VideoEncoder, check_range, encode_clip, join_codes
from train.building import build_model, build_named
from train.checkpoints import load_params
from train.naming import ConfigError
from train.video_critics import Critics, build_critics, pool, read_state, require

CLIP_FRAMES = 8
INPUT_NOISE = 0.1


@dataclasses.dataclass(frozen=True)
class VideoInversion:
    """An encoder learns to reproduce frames through a frozen generator.

    L = sum over key and frame of [l2 |y_hat - y|^2 + lpips LPIPS + identity (1 - cos)]
    + landmarks L_lmk + mesh L_mesh (of the frame) + w_norm |w - w_avg|, whose weight falls linearly
    to zero over the run.

    Attributes:
      model, generator: the encoder and the generator it inverts. critics: terms and networks.
      generator_from: a StyleGAN2 checkpoint of either naming, or a run directory of the task
        `stylegan2`. encoder_from: a ViT, pSp, e4e or style-transformer
        file to begin with, or "".
      psi: how far latents of made-up clips keep from the mean (1: no truncation).
      steps: length of the run. report_clips: clips on which flicker is reported; 0: none.
    """

    model: VideoEncoder
    generator: nn.Module
    critics: Critics
    generator_from: str = ""
    encoder_from: str = ""
    model_name: str = "video.video_encoder"
    psi: float = 0.8
    steps: int = 1
    report_clips: int = 12

    uses_step = True
    frozen = ("generator", "critics")

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """The encoder's parameters; `buffers`, `generator`, `critics`."""
        own, other, third = jax.random.split(rng, 3)
        size = self.model.image_size
        encoder = dict(self.model.init(own, jnp.zeros((1, size, size, 3))))
        generator = dict(self.generator.init(other, jnp.zeros((1, self.generator.z_dim))))
        params = encoder.pop("params")
        del batch
        return params, {**encoder, "generator": generator, "critics": self.critics.init(third)}

    def start(self, params, extra):
        """Generator, critics and a pre-trained encoder from their files; the mean latent."""
        extra = dict(extra)
        if self.generator_from:
            extra["generator"] = load_generator(
                self.generator_from, self.generator, extra["generator"]
            )
        else:
            print("config.task_args.generator_from is empty: the generator has random weights")
        extra["critics"] = self.critics.load(extra["critics"])
        if self.encoder_from:
            given = self._pretrained({"params": params, **encoder_variables(extra)})
            params = given.pop("params")
            extra |= given
        average = extra["generator"]["buffers"]["mapping"]["w_avg"]
        extra["buffers"] = {**extra["buffers"], "w_avg": jnp.copy(average)}
        if "decoder" in extra["buffers"]:
            own = frozen_mapping(extra["generator"]["params"]["mapping"])
            extra["buffers"]["decoder"] = own
        return params, extra

    def _pretrained(self, own):
        """The encoder's collections with what the file has in place of the fresh ones."""
        key = "config.task_args.encoder_from"
        require(self.encoder_from, f"{key}=''")
        state = read_state(self.encoder_from)
        # Queries and heads are ours; published files end with the backbone. ArcFace's network is
        # what pSp and e4e begin their trunk with.
        vit = self.model.backbone == "vit"
        skip = ("queries", "layer_embeddings", "heads", "w_avg") if vit else ()
        if not vit and any(k.startswith("output_layer.") for k in state):
            state = {k: v for k, v in state.items() if not k.startswith("output_layer.")}
            skip = (r"encoder\.styles", r"encoder(\.module)?\.latlayer[12]", "w_avg")
            skip += (r"encoder\.module\.(z|transformerlayer_\w+)", r"decoder\.module")
        given, done = catalog.import_state(
            catalog.find(self.model_name), self.model, state, skip, source=self.encoder_from
        )
        catalog.log_what_was_taken(self.encoder_from, "", done)
        taken = {
            name: jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), given[name], tree)
            for name, tree in own.items()
            if name != "buffers"
        }
        # What no published file has begins as this run's seed drew it.
        for name in ("queries", "layer_embeddings", "heads") if vit else ():
            taken["params"][name] = own["params"][name]
        if skip and not vit:
            mine = own["params"]["encoder"]
            fresh = ("styles.", "latlayer", "transformerlayer_", "z")
            heads = {k: v for k, v in mine.items() if k.startswith(fresh)}
            taken["params"]["encoder"] |= heads
        return taken

    # Frames.

    def draw(self, extra, codes: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Images of W+ codes as large as the generator makes them; noise maps constant, or drawn
        from the key `noise`."""
        mode = "const" if noise is None else "random"
        rngs = {} if noise is None else {"noise": noise}
        return self.generator.apply(extra["generator"], codes, mode, method="synthesize", rngs=rngs)

    def synthesize(self, extra, codes: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """The same images averaged down to at most 256 pixels, as losses and measures see them."""
        return pool(self.draw(extra, codes, noise))

    def frames(self, extra, batch) -> dict[str, jax.Array]:
        """`key` and perhaps `frame`, from images or made by the generator."""
        names = ("key", "frame")
        if "z" not in batch:
            return {k: batch[k] for k in names if k in batch} or {"key": batch["image"]}
        split = self.model.split
        average = extra["generator"]["buffers"]["mapping"]["w_avg"]
        w = self.generator.apply(extra["generator"], batch["z"], method="to_w")
        w = truncate(w, average, self.psi)[:, None]
        codes = jnp.broadcast_to(w, (len(w), self.model.num_latents, w.shape[-1]))

        def moved(noise):
            return join_codes(codes[:, :split] + noise, codes[:, split:])

        made = {k: moved(batch[f"{k}_noise"]) for k in names if f"{k}_noise" in batch}
        images = jax.lax.stop_gradient(self.synthesize(extra, jnp.concatenate(list(made.values()))))
        return dict(zip(made, jnp.split(images, len(made))))

    def encode(self, variables, frames) -> dict[str, jax.Array]:
        """W+ codes of `key` and, with its high codes, of `frame`."""
        own = encoder_variables(variables)
        codes = {"key": self.model.apply(own, frames["key"], method="encode_key")}
        if "frame" in frames:
            low = self.model.apply(own, frames["frame"], method="encode_frame")
            codes["frame"] = join_codes(low, codes["key"][:, self.model.split :])
        return codes

    def loss(self, params, extra, batch, rng, step):
        """The weighted terms, each logged under its name."""
        del rng
        frozen = jax.lax.stop_gradient({k: extra[k] for k in ("generator", "critics")})
        frames = self.frames(frozen, batch)
        codes = self.encode({"params": params, **extra}, frames)
        total = self.picture_terms(frozen, frames, codes)
        fading = self.critics.weights["w_norm"] * jnp.maximum(1 - step / self.steps, 0)
        if self.critics.weights["w_norm"]:
            last = codes[list(frames)[-1]]
            total["w_norm"] = fading * latent_norm(last, extra["buffers"]["w_avg"])
        return sum(total.values()), (extra, total)

    def picture_terms(
        self, frozen, frames, codes, noise: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """The weighted terms of what codes {name: [B, n, D]} draw against {name: frames}: image
        terms of all, landmarks and mesh of the last."""
        names = list(frames)
        made = self.synthesize(frozen, jnp.concatenate([codes[n] for n in names]), noise)
        pictures = dict(zip(names, jnp.split(made.astype(jnp.float32), len(names))))
        total: dict[str, jax.Array] = {}
        for name in names:
            target = pool(frames[name])
            for term, value in self.critics.image_terms(
                frozen["critics"], pictures[name], target
            ).items():
                total[term] = total.get(term, 0) + value
        last = names[-1]
        return total | self.critics.geometry_terms(
            frozen["critics"], pictures[last], pool(frames[last])
        )

    def evaluate(self, variables, batch):
        """Squared error of the frame (or key) with the clip's high codes, beside the mean latent's,
        and of the key itself."""
        frames = self.frames(variables, batch)
        codes = self.encode(variables, frames)
        last = list(frames)[-1]
        made = self.synthesize(variables, codes[last])
        mask, average = batch["mask"], variables["generator"]["buffers"]["mapping"]["w_avg"]
        mean = self.synthesize(variables, jnp.broadcast_to(average, codes[last][:1].shape))

        def error(picture, name):
            return jnp.square(picture - pool(frames[name])).mean((1, 2, 3)) * mask

        key = made if last == "key" else self.synthesize(variables, codes["key"])
        found = error(made, last)
        measures = self.critics.measures(variables["critics"], made, pool(frames[last]))
        return {
            **{name: (value * mask).sum() for name, value in measures.items()},
            "mse": found.sum(),
            "key_mse": error(key, "key").sum(),
            "mean_latent_mse": error(mean, last).sum(),
            "relative_mse|mean_latent_mse": found.sum(),
            "count": mask.sum(),
        }

    def report(self, variables, sums, config):
        """Flicker of static noisy clips and of moving ones, with reused and with all new codes."""
        del sums
        if not self.report_clips:
            return {}
        if not config.data.name.startswith("latent_walks"):
            return self._report_clips(variables, config)
        variables = jax.device_put(variables)
        static, moving = self._flickers(variables)
        return {
            "flicker_static_reuse": float(static[:, 0].mean()),
            "flicker_static_full": float(static[:, 1].mean()),
            "static_clips_steadier": f"{int((static[:, 0] < static[:, 1]).sum())} of {len(static)}",
            "flicker_moving_reuse": float(moving[:, 0].mean()),
            "flicker_moving_full": float(moving[:, 1].mean()),
        }

    def _flickers(self, variables) -> np.ndarray:
        """[2, clips, 2]: of static noisy and of moving clips, flicker with reused codes and with
        all codes of every frame."""

        @jax.jit
        def one(variables, seed, std, noise):
            rng = jax.random.split(jax.random.key(seed), 3)
            z = jax.random.normal(rng[0], (1, self.generator.z_dim))
            low = (CLIP_FRAMES, self.model.split, self.model.w_dim)
            walk = std * smooth_walk(jax.random.normal(rng[1], low))
            shared = jnp.broadcast_to(z, (CLIP_FRAMES, z.shape[1]))
            batch = {"z": shared, "key_noise": walk, "frame_noise": walk}
            clean = self.frames(variables, batch)["frame"]
            seen = clean + noise * jax.random.normal(rng[2], clean.shape)
            return self._both_modes(variables, seen, clean)

        return np.asarray(
            [
                [one(variables, 1000 + i, *study) for i in range(self.report_clips)]
                for study in _STUDIES
            ]
        )

    def _both_modes(self, variables, seen, clean):
        """Flicker [2] of a clip [T, S, S, 3] in reuse and in full mode against the clean one."""
        own = encoder_variables(variables)
        reuse = encode_clip(self.model, own, seen)
        full = self.model.apply(own, seen, method="encode_key")
        images = [self.synthesize(variables, codes) for codes in (reuse, full)]
        return jnp.stack([video_metrics.flicker(image, pool(clean)) for image in images])

    def _report_clips(self, variables, config):
        from train.data import pipeline

        family, options = pipeline.resolve(config.data)
        if not hasattr(family, "read_clip"):
            return {}
        clips = family.source(family.SPLITS[1], options)
        one = jax.jit(self._both_modes)
        found, noisy = [], []
        rng = np.random.default_rng(0)
        for i in range(min(len(clips), self.report_clips)):
            count = min(family.clip_length(clips[i], options), CLIP_FRAMES)
            frames = family.read_clip(clips[i], options, range(count))[0]
            check_range(frames)
            found.append(one(variables, frames, frames))
            seen = frames[:1] + INPUT_NOISE * rng.standard_normal(frames.shape).astype(np.float32)
            noisy.append(one(variables, seen, np.broadcast_to(frames[:1], frames.shape)))
        found, noisy = np.mean(found, 0), np.mean(noisy, 0)
        return {
            "flicker_clips_reuse": float(found[0]),
            "flicker_clips_full": float(found[1]),
            "flicker_static_reuse": float(noisy[0]),
            "flicker_static_full": float(noisy[1]),
        }

    def predict(self, variables, path, config):
        """Reconstruction of an aligned clip: rows (frame, mse, psnr, change beyond the input's)."""
        from jaxmodels.video.video_encoder import stream
        from train import video_files

        del config
        variables = jax.device_put(variables)
        draw = jax.jit(lambda v, codes: self.synthesize(v, codes)[0])
        frames = (video_files.to_unit(f) for f in video_files.read_frames(path))
        rows, before = [("frame", "mse", "psnr", "flicker")], None
        clip = stream(self.model, encoder_variables(variables), frames, warn=print)
        for t, (frame, codes) in enumerate(clip):
            made = np.asarray(draw(variables, codes))
            target = np.asarray(pool(jnp.asarray(frame)[None])[0])
            error = float(np.square(made - target).mean())
            change = ""
            if before is not None:
                change = float(np.abs((made - before[0]) - (target - before[1])).mean())
            rows.append((t, error, 10 * np.log10(4 / max(error, 1e-12)), change))
            before = made, target
        return rows


# (standard deviation of the low codes' noise from frame to frame, noise on the input frames).
_STUDIES = ((0.0, INPUT_NOISE), (0.35, 0.0))


def smooth_walk(noise: jax.Array, memory: float = 0.9) -> jax.Array:
    """Independent normal steps [T, ...] -> a stationary walk of the same variance."""
    fresh = jnp.sqrt(1 - memory**2)

    def step(before, new):
        now = memory * before + fresh * new
        return now, now

    _, rest = jax.lax.scan(step, noise[0], noise[1:])
    return jnp.concatenate([noise[:1], rest])


def encoder_variables(variables) -> dict[str, Any]:
    """The encoder's own collections."""
    return {k: variables[k] for k in ("params", "buffers", "batch_stats") if k in variables}


def load_generator(path: str, module: nn.Module, like) -> Any:
    """A generator's variables from a StyleGAN2 file or a run directory of the task `stylegan2`."""

    if os.path.isdir(path):
        tree = load_params(path)
        if "gan" not in tree:
            raise ConfigError(f"config.task_args.generator_from: {path} is no run of stylegan2")
        given = {"params": tree["gan"]["average"], "buffers": tree["buffers"]}
    else:
        require(path, "config.task_args.generator_from=''")
        given, done = catalog.import_state(
            catalog.find("video.stylegan2"), module, read_state(path), source=path
        )
        catalog.log_what_was_taken(path, "", done)
    # Buffers that travel along (resampling filters) are no part of the model.
    return jax.tree_util.tree_map_with_path(lambda p, x: _taken(given, p, x), like)


def _taken(given, path, like):
    node = given
    for key in path:
        node = node[key.key]
    if np.shape(node) != like.shape:
        raise ConfigError(f"config.task_args.generator_from: {path} is {np.shape(node)}")
    return jnp.asarray(node, like.dtype)


def from_config(config) -> VideoInversion:
    """`task_args`: `generator_args`, the keys of `build_critics`, the fields of the task."""
    return VideoInversion(**task_fields(config))


def task_fields(config) -> dict[str, Any]:
    """The fields of a task that inverts a frozen generator, from its config."""
    args = dict(config.task_args)
    generator_args = dict(args.pop("generator_args", {}))
    critics = build_critics(args)
    model = build_model(config)
    generator = build_named(
        config, "video.stylegan2", generator_args, "config.task_args.generator_args"
    )
    wanted = (model.w_dim, model.mapping_layers)
    if model.backbone == "style_transformer" and wanted != (
        generator.z_dim,
        generator.mapping_layers,
    ):
        raise ConfigError(
            f"config.model_args: queries pass through the generator's mapping network, of "
            f"{generator.mapping_layers} layers for latents of {generator.z_dim}; the encoder has "
            f"mapping_layers {model.mapping_layers} and codes of {model.w_dim}"
        )
    if generator.num_latents != model.num_latents or generator.w_dim != model.w_dim:
        raise ConfigError(
            f"config.model_args: codes [{model.num_latents}, {model.w_dim}] "
            f"(stylegan_size {model.stylegan_size}), the generator of "
            f"{generator.img_resolution} pixels takes [{generator.num_latents}, {generator.w_dim}]"
        )
    return dict(
        model=model,
        generator=generator,
        critics=critics,
        model_name=config.model,
        steps=config.steps,
        **args,
    )
