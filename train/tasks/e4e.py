"""Training pSp and e4e, the encoders of single images that a video encoder is compared with.

After `training/coach.py` of omertov/encoder4editing@99ea505. Image losses pull the codes towards
what reproduces the image; three things keep e4e's codes where edits are known to work: one code for
all layers to begin with and one delta more every so often, a penalty on the deltas' norms, and a
discriminator of single codes against mapped latents. Without them (`adversarial` 0, backbone
"ir_se50") the task is pSp's training.

A step is up to three updates: the discriminator's loss, every `r1_every` steps its R1, then the
encoder's loss against the new discriminator. What belongs to the discriminator (parameters, Adam,
pools of past codes) lives in the collection `adversary`; the encoder's optimizer is
`config.optimizer`. BatchNorm trains on the batch's statistics, noise maps are drawn anew, as there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels.layers.normalization import BatchNorm
from jaxmodels.video import stylegan2_losses, video_metrics
from jaxmodels.video.latent_editing import delta_loss, latent_norm
from jaxmodels.video.style_encoders import (
    LatentCodesDiscriminator,
    progressive_stage,
    query_pool,
)
from train.naming import ConfigError
from train.optimizers import make_optimizer, make_schedule
from train.tasks import video_inversion
from train.tasks.video_inversion import VideoInversion, encoder_variables

# Of the report: images edited and encoded again, mapped latents, length of the edit in deviations.
_IMAGES, _LATENTS, _EDIT = 64, 4096, 2.0


@dataclasses.dataclass(frozen=True)
class ImageEncoding(VideoInversion):
    """L = image terms + adversarial mean_i softplus(-D(w_i)) + delta_norm sum_i |w_i - w_0|_2
    + w_norm |w - w_avg|, over the codes i that are free at the present stage.

    Attributes:
      optimizer: of the encoder.
      adversarial: weight of the discriminator's judgment; 0 trains none.
      discriminator_rate: its Adam's rate. gamma, r1_every: R1 of mapped codes (gamma / 2 times the
        squared gradient, times r1_every at every r1_every-th step); 0 never.
      pool_size: past codes of either kind that the discriminator sees; 0 shows it the present w_0.
      delta_norm: weight of the deltas' norms.
      delta_start, delta_every: step at which the first delta is turned on, and steps between two;
        a negative start (and pSp) has all codes free and no norm of deltas.
      report_clips: 0 leaves out the report's edits.
    """

    optimizer: optax.GradientTransformation | None = None
    adversarial: float = 0.1
    discriminator_rate: float = 2e-5
    gamma: float = 10.0
    r1_every: int = 16
    pool_size: int = 50
    delta_norm: float = 2e-4
    delta_start: int = 20_000
    delta_every: int = 2000

    uses_step = False

    @property
    def staged(self) -> bool:
        """Whether deltas are turned on one after the other."""
        return self.model.backbone == "e4e" and self.delta_start >= 0

    @property
    def discriminator(self) -> LatentCodesDiscriminator:
        """Tells mapped codes from encoded ones, one code at a time, in float32."""
        return LatentCodesDiscriminator(self.model.w_dim)

    @property
    def _adam(self) -> optax.GradientTransformation:
        return optax.adam(self.discriminator_rate)

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """The encoder's parameters; its buffers and statistics, `generator`, `critics`,
        `adversary`."""
        params, extra = super().init(rng, batch)
        width = self.model.w_dim
        adversary: dict[str, Any] = {"stage": jnp.zeros((), jnp.int32)}
        if self.adversarial:
            key = jax.random.fold_in(rng, 3)
            critic = self.discriminator.init(key, jnp.zeros((1, width)))["params"]
            adversary |= {"params": critic, "optimizer": self._adam.init(critic)}
            if self.pool_size:
                pools = {k: jnp.zeros((self.pool_size, width)) for k in ("real", "fake")}
                adversary |= {**pools, "filled": jnp.zeros((), jnp.int32)}
        return params, {**extra, "adversary": adversary}

    def frames(self, extra, batch) -> dict[str, jax.Array]:
        """The images to encode, as `key`."""
        alone = {k: v for k, v in batch.items() if k not in ("frame", "frame_noise")}
        return super().frames(extra, alone)

    def stage(self, step: jax.Array) -> jax.Array | None:
        """Deltas that are on at a step; None: all of them, without stages."""
        if not self.staged:
            return None
        free = progressive_stage(step, self.delta_start, self.delta_every)
        return jnp.minimum(free, self.model.num_latents - 1)

    def encode(self, variables, frames) -> dict[str, jax.Array]:
        """W+ codes of `key` at the last step's stage, with running statistics."""
        stage = variables["adversary"]["stage"] if self.staged else None
        layers = self.model.num_latents
        return {
            "key": self.model.apply(
                encoder_variables(variables), frames["key"], layers, stage, method="codes"
            )
        }

    def update(self, state, batch, rng):
        """One step of both networks; the loss that is watched is the encoder's."""
        extra, adversary = dict(state.extra), dict(state.extra["adversary"])
        frozen = {k: extra[k] for k in ("generator", "critics")}
        own = encoder_variables(extra)
        critic_rng, noise_rng = jax.random.split(rng)
        frames, stage = self.frames(frozen, batch), self.stage(state.step)

        def encode(params):
            codes, moved = self.model.apply(
                {"params": params, **own}, frames["key"], self.model.num_latents, stage, True,
                method="codes", mutable=["batch_stats"],
            )  # fmt: skip
            return codes, moved["batch_stats"]

        # Both networks take their turn with the same codes: the encoder moves last.
        codes, pull, statistics = jax.vjp(encode, state.params, has_aux=True)
        told = {}
        if self.adversarial:
            adversary, told = self._train_discriminator(
                frozen, adversary, jax.lax.stop_gradient(codes), stage, state.step, critic_rng
            )
            # There the discriminator's turn encodes the batch in training mode as well, so that
            # running statistics move towards it twice.
            again = 1 - BatchNorm.momentum
            statistics = jax.tree.map(
                lambda new, old: new + again * (new - old), statistics, own["batch_stats"]
            )

        def objective(codes):
            terms = self.picture_terms(frozen, frames, {"key": codes}, noise_rng)
            terms |= self._code_terms(own, adversary, codes, stage)
            return sum(terms.values()), terms

        (loss, terms), slope = jax.value_and_grad(objective, has_aux=True)(codes)
        (grads,) = pull(slope)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        norm = optax.global_norm(grads)
        adversary["stage"] = jnp.int32(self.model.num_latents - 1 if stage is None else stage)
        state = state.replace(
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            extra={**extra, "batch_stats": statistics, "adversary": adversary},
        )
        metrics = {**terms, **told, "stage": adversary["stage"], "grad_norm": norm}
        return state, jnp.where(jnp.isfinite(norm), loss, jnp.nan), metrics

    def _logits(self, critic, codes: jax.Array) -> jax.Array:
        return self.discriminator.apply({"params": critic}, codes)[..., 0]

    def _code_terms(self, own, adversary, codes, stage) -> dict[str, jax.Array]:
        """Weighted terms of the codes alone."""
        terms, layers = {}, codes.shape[1]
        if self.adversarial:
            last = layers - 1 if stage is None else stage
            free = jnp.arange(layers) <= last
            fooled = jax.nn.softplus(-self._logits(adversary["params"], codes)).mean(0)
            judged = jnp.where(free, fooled, 0).sum() / (last + 1)
            terms["adversarial"] = self.adversarial * judged
        if self.staged and self.delta_norm:
            # Codes beyond the stage equal the first one and add nothing.
            terms["delta_norm"] = self.delta_norm * delta_loss(codes)
        if self.critics.weights["w_norm"]:
            norm = latent_norm(codes, own["buffers"]["w_avg"])
            terms["w_norm"] = self.critics.weights["w_norm"] * norm
        return terms

    def _train_discriminator(self, frozen, adversary, codes, stage, step, rng):
        """(the adversary after its turn, what to log): mapped codes against encoded ones."""
        keys, count = jax.random.split(rng, 4), len(codes)
        z = jax.random.normal(keys[0], (count, self.generator.z_dim))
        real = self.generator.apply(frozen["generator"], z, method="to_w").astype(jnp.float32)
        adversary = dict(adversary)
        if self.pool_size:
            # Of every image one of the codes that are free.
            last = codes.shape[1] - 1 if stage is None else stage
            rows = jax.random.randint(keys[1], (count,), 0, last + 1)
            fake = jnp.take_along_axis(codes, rows[:, None, None], 1)[:, 0]
            filled = adversary["filled"]
            real, adversary["real"], _ = query_pool(adversary["real"], filled, real, keys[2])
            fake, adversary["fake"], adversary["filled"] = query_pool(
                adversary["fake"], filled, fake, keys[3]
            )
        else:
            fake = codes[:, 0]

        def step_by(value_of, critic, optimizer):
            value, grads = jax.value_and_grad(value_of)(critic)
            updates, optimizer = self._adam.update(grads, optimizer, critic)
            return optax.apply_updates(critic, updates), optimizer, value

        def logistic(critic):
            return stylegan2_losses.discriminator_loss(
                self._logits(critic, real), self._logits(critic, fake)
            )

        def penalty(critic):
            squares, _ = stylegan2_losses.r1_penalty(lambda w: self._logits(critic, w), real)
            return squares.mean() * (self.gamma / 2) * self.r1_every

        critic, optimizer, loss = step_by(logistic, adversary["params"], adversary["optimizer"])
        told = {"discriminator": loss}
        if self.r1_every and self.gamma:
            critic, optimizer, told["r1"] = jax.lax.cond(
                step % self.r1_every == 0,
                lambda critic, optimizer: step_by(penalty, critic, optimizer),
                lambda critic, optimizer: (critic, optimizer, jnp.zeros(())),
                critic,
                optimizer,
            )
        return {**adversary, "params": critic, "optimizer": optimizer}, told

    def evaluate(self, variables, batch):
        """Squared errors beside the mean latent's, and how far apart an image's codes are: the mean
        over layers i > 0 of |w_i - w_0|_2."""
        codes = self.encode(variables, self.frames(variables, batch))["key"]
        apart = jnp.linalg.norm(codes[:, 1:] - codes[:, :1], axis=-1).mean(1)
        sums = super().evaluate(variables, batch)
        return {**sums, "delta": (apart * batch["mask"]).sum()}

    def report(self, variables, sums, config):
        """Latent editing consistency: images encoded, moved along the main direction of mapped
        latents, drawn, encoded again and moved back; beside it that of an encoder that always
        finds the mean latent."""
        del sums
        if not self.report_clips:
            return {}
        from train.data import pipeline

        variables = jax.device_put(variables)
        move = jnp.asarray(_EDIT * self._main_direction(variables))
        layers = self.model.num_latents

        @jax.jit
        def cycle(variables, batch):
            before = self.encode(variables, self.frames(variables, batch))["key"]
            edited = self.synthesize(variables, before + move)
            after = self.encode(variables, {"key": edited})["key"]
            return video_metrics.latent_editing_consistency(before, after - move)

        split = config.eval.split or pipeline.eval_split(config.data)
        size = config.eval.batch_size or config.batch_size
        found: list[float] = []
        for batch in pipeline.eval_batches(config.data, split, batch_size=size):
            kept = np.asarray(batch["mask"]) > 0
            found += list(np.asarray(cycle(variables, batch))[kept])
            if len(found) >= _IMAGES:
                break
        return {
            "lec": float(np.mean(found[:_IMAGES])),
            "lec_of_mean_latent": float(np.sqrt(layers) * np.linalg.norm(move)),
        }

    def _main_direction(self, variables) -> np.ndarray:
        """The first principal component of mapped latents [w_dim], one deviation long."""
        z = jax.random.normal(jax.random.key(0), (_LATENTS, self.generator.z_dim))
        to_w = jax.jit(lambda v, z: self.generator.apply(v, z, method="to_w"))
        w = np.asarray(to_w(variables["generator"], z), np.float64)
        _, sizes, rows = np.linalg.svd(w - w.mean(0), full_matrices=False)
        return rows[0] * sizes[0] / np.sqrt(len(w))


def from_config(config, say=print) -> ImageEncoding:
    """`task_args`: those of `video_inversion` and the fields of `ImageEncoding`."""
    if config.ema.decay:
        raise ConfigError("config.ema.decay: e4e's training keeps no average")
    if config.optimizer.accumulate != 1 or config.parallel.mode == "pmap":
        raise ConfigError("config: e4e runs under jit, without accumulation")
    optimizer = make_optimizer(config.optimizer, make_schedule(config.schedule, config.steps))
    task = ImageEncoding(optimizer=optimizer, **video_inversion.task_fields(config))
    if task.model.backbone not in ("e4e", "ir_se50"):
        raise ConfigError(
            f"config.model: e4e trains backbones e4e and ir_se50 (pSp), not {task.model.backbone}"
        )
    for name in ("adversarial", "gamma", "r1_every", "pool_size", "delta_norm"):
        if getattr(task, name) < 0:
            raise ConfigError(f"config.task_args.{name}: {getattr(task, name)} is negative")
    if task.delta_every < 1:
        raise ConfigError(f"config.task_args.delta_every: at least 1, got {task.delta_every}")
    last = task.delta_start + (task.model.num_latents - 2) * task.delta_every
    if task.staged and last >= config.steps:
        say(f"e4e: the last delta is turned on at step {last}, the run ends at {config.steps}")
    return task
