"""StyleGAN2's training: generator and discriminator in turn, each with its lazy regularizer.

After NVlabs/stylegan2-ada-pytorch@d72cc7d (`training/loss.py`, `training/training_loop.py`). A step
is up to four updates: the generator's loss, every `pl_every` steps its path-length penalty, the
discriminator's loss, every `r1_every` steps R1. Both optimizers are Adam with the lazy correction;
they live in the task's own collection `gan`, beside the moving average that evaluation uses, and
`config.optimizer` is not consulted.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels.layers.partitioning import over_rows
from jaxmodels.video import stylegan2_losses as losses
from jaxmodels.video.stylegan2 import truncate
from train.building import build_model, build_named
from train.naming import ConfigError
from train.parallel import local_copy
from train.restoration_files import write_picture
from train.video_files import to_bytes

_PROJECTIONS, _SAMPLES, _COLUMNS = 128, 256, 8


@dataclasses.dataclass(frozen=True)
class StyleGAN2:
    """Batches `image` [B, S, S, 3] in [-1, 1].

    Attributes:
      model, discriminator: the networks.
      rate, beta1, beta2: of Adam, before the lazy correction.
      gamma: R1 weight (gamma / 2 times the squared gradient). r1_every: steps between; 0 never.
      pl_weight, pl_every: likewise of the path length; pl_decay of its running mean; pl_shrink
        divides the batch it is measured on.
      style_mixing: probability that the later layers take a second style.
      ema_images: images after which the generator's moving average has half forgotten.
      truncation: psi of the pictures that prediction draws.
    """

    model: nn.Module
    discriminator: nn.Module
    rate: float = 0.002
    beta1: float = 0.0
    beta2: float = 0.99
    gamma: float = 10.0
    r1_every: int = 16
    pl_weight: float = 2.0
    pl_every: int = 4
    pl_decay: float = 0.01
    pl_shrink: int = 2
    style_mixing: float = 0.9
    ema_images: float = 10000.0
    truncation: float = 1.0

    predicts_test = True

    def _adam(self, every: int) -> optax.GradientTransformation:
        c = losses.lazy(every)
        return optax.adam(self.rate * c, b1=self.beta1**c, b2=self.beta2**c, eps=1e-8)

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Both networks' parameters; buffers, optimizers, average and path-length mean."""
        own, other = jax.random.split(rng)
        generator = self.model.init(own, jnp.zeros((1, self.model.z_dim)))
        critic = self.discriminator.init(other, batch["image"][:1])["params"]
        params = {"generator": generator["params"], "discriminator": critic}
        gan = {
            "generator": self._adam(self.pl_every).init(params["generator"]),
            "discriminator": self._adam(self.r1_every).init(critic),
            "average": jax.tree.map(jnp.copy, params["generator"]),
            "path_mean": jnp.zeros(()),
        }
        return params, {"buffers": generator["buffers"], "gan": gan}

    def _codes(self, variables, rng, batch: int):
        """(W+ of two mixed styles, new buffers)."""
        first, second, cut = jax.random.split(rng, 3)
        z = over_rows(jax.random.normal(first, (batch, self.model.z_dim)))
        z2 = over_rows(jax.random.normal(second, (batch, self.model.z_dim)))
        layers = self.model.num_latents
        w, moved = self.model.apply(variables, z, True, method="to_w", mutable=["buffers"])
        w2 = self.model.apply(variables, z2, method="to_w")
        cutoff = losses.mixing_cutoff(cut, batch, layers, self.style_mixing)
        late = (jnp.arange(layers) >= cutoff)[:, None]
        return jnp.where(late, w2[:, None], w[:, None]), moved["buffers"]

    def _images(self, variables, ws, rng):
        return self.model.apply(variables, ws, "random", method="synthesize", rngs={"noise": rng})

    def update(self, state, batch, rng):
        """One step of both networks; the loss that is watched is their sum."""
        real, count = batch["image"], len(batch["image"])
        if count // self.pl_shrink < 1:
            raise ConfigError(f"config.batch_size: {count} leaves no path-length batch")
        keys = jax.random.split(rng, 8)
        params, gan, buffers = dict(state.params), dict(state.extra["gan"]), state.extra["buffers"]
        step = state.step

        def move(name, grads, every):
            updates, gan[name] = self._adam(every).update(grads, gan[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)

        def logits(critic, images):
            return self.discriminator.apply({"params": critic}, images)

        # Generator.
        def generator_loss(generator):
            variables = {"params": generator, "buffers": buffers}
            ws, moved = self._codes(variables, keys[0], count)
            images = self._images(variables, ws, keys[1])
            return losses.generator_loss(logits(params["discriminator"], images)), moved

        (loss_g, new_buffers), grads = jax.value_and_grad(generator_loss, has_aux=True)(
            params["generator"]
        )
        move("generator", grads, self.pl_every)

        def kept(new):
            return jax.tree.map(lambda new, old: new.astype(old.dtype), new, buffers)

        # The mean latent moves wherever images are made, as there.
        buffers = kept(new_buffers)
        path = jnp.zeros(())
        if self.pl_every and self.pl_weight:
            size = count // self.pl_shrink

            def path_loss(generator, mean):
                variables = {"params": generator, "buffers": buffers}
                ws, moved = self._codes(variables, keys[2], size)
                shape = (size, *real.shape[1:])
                noise = jax.random.normal(keys[3], shape)
                lengths, _ = losses.path_lengths(
                    lambda ws: self._images(variables, ws, keys[4]), ws, noise
                )
                penalty, new = losses.path_length_penalty(lengths, mean, self.pl_decay)
                return penalty.mean() * self.pl_weight * self.pl_every, (new, kept(moved))

            def regularize(generator, optimizer, mean):
                (value, (new, moved)), grads = jax.value_and_grad(path_loss, has_aux=True)(
                    generator, mean
                )
                updates, optimizer = self._adam(self.pl_every).update(grads, optimizer, generator)
                return optax.apply_updates(generator, updates), optimizer, new, moved, value

            def leave(generator, optimizer, mean):
                return generator, optimizer, mean, buffers, jnp.zeros(())

            params["generator"], gan["generator"], gan["path_mean"], buffers, path = jax.lax.cond(
                step % self.pl_every == 0,
                regularize,
                leave,
                params["generator"],
                gan["generator"],
                gan["path_mean"],
            )

        # Discriminator.
        variables = {"params": params["generator"], "buffers": buffers}
        ws, moved = self._codes(variables, keys[5], count)
        buffers = kept(moved)
        fake = jax.lax.stop_gradient(self._images(variables, ws, keys[6]))

        def discriminator_loss(critic):
            return losses.discriminator_loss(logits(critic, real), logits(critic, fake))

        loss_d, grads = jax.value_and_grad(discriminator_loss)(params["discriminator"])
        move("discriminator", grads, self.r1_every)
        r1 = jnp.zeros(())
        if self.r1_every and self.gamma:

            def penalty(critic):
                squares, _ = losses.r1_penalty(lambda x: logits(critic, x), real)
                return squares.mean() * (self.gamma / 2) * self.r1_every

            def regularize_critic(critic, optimizer):
                value, grads = jax.value_and_grad(penalty)(critic)
                updates, optimizer = self._adam(self.r1_every).update(grads, optimizer, critic)
                return optax.apply_updates(critic, updates), optimizer, value

            params["discriminator"], gan["discriminator"], r1 = jax.lax.cond(
                step % self.r1_every == 0,
                regularize_critic,
                lambda critic, optimizer: (critic, optimizer, jnp.zeros(())),
                params["discriminator"],
                gan["discriminator"],
            )

        decay = 0.5 ** (count / self.ema_images)
        gan["average"] = jax.tree.map(
            lambda a, p: decay * a + (1 - decay) * p, gan["average"], params["generator"]
        )
        metrics = {"generator": loss_g, "discriminator": loss_d, "r1": r1, "path_length": path}
        state = state.replace(params=params, extra={"buffers": buffers, "gan": gan})
        return state, loss_g + loss_d, metrics

    def measure(self, variables, config, mesh):
        """Sliced Wasserstein distance of the average generator's images to the training images."""
        variables = {"params": variables["gan"]["average"], "buffers": variables["buffers"]}
        variables = local_copy(variables, mesh)
        return {"sliced_wasserstein": self._distance(variables, self._real(config))}

    def report(self, variables, sums, config):
        """The same distance of an untrained generator, of noise, and of held-out real images."""
        del sums
        from train.data import pipeline

        real = self._real(config)
        fresh = self.model.init(jax.random.key(config.seed + 1), jnp.zeros((1, self.model.z_dim)))
        rng = np.random.default_rng(0)
        noise = rng.normal(real.mean(), real.std(), real.shape)
        held = self._real(config, pipeline.eval_split(config.data))
        return {
            "sliced_wasserstein_untrained": self._distance(fresh, real),
            "sliced_wasserstein_noise": sliced_wasserstein(noise, real),
            "sliced_wasserstein_held_out": sliced_wasserstein(held, real),
        }

    def predict_files(self, variables, source, output: Path, config) -> str:
        """Pictures of the averaged generator, `seedNNNN.png`, and `grid.png`, eight in a row; their
        latents `codes.npy` [N, w_dim], for `train.edit_direction`.

        `source` is a text file of seeds; "test" stands for 0 to 31. A seed's latent is that of
        the official `generate.py`, noise maps are the constant ones.
        """
        seeds = list(range(32))
        if source != "test":
            words = Path(source).read_text(encoding="utf-8").split()
            wrong = next((w for w in words if not (w.isascii() and w.isdigit())), None)
            if wrong is not None or not words:
                raise ValueError(f"{source}: wanted seeds, whole numbers, not {wrong or 'nothing'}")
            seeds = [int(w) for w in words]
        output.mkdir(parents=True, exist_ok=True)
        variables = {"params": variables["gan"]["average"], "buffers": variables["buffers"]}

        @jax.jit
        def draw(v, z):
            w = self.model.apply(v, z, method="to_w")
            w = truncate(w, v["buffers"]["mapping"]["w_avg"], self.truncation)
            return self.model.apply(v, z, self.truncation), w

        pictures, codes = [], []
        for seed in seeds:
            z = np.random.RandomState(seed).randn(1, self.model.z_dim).astype(np.float32)
            image, w = draw(variables, z)
            picture = to_bytes(image[0])
            codes.append(np.asarray(w[0]))
            write_picture(output / f"seed{seed:04d}.png", picture)
            pictures.append(picture)
        np.save(output / "codes.npy", np.stack(codes))
        width = min(_COLUMNS, len(pictures))
        pictures += [np.full_like(pictures[0], 255)] * (-len(pictures) % width)
        rows = np.stack(pictures).reshape(-1, width, *pictures[0].shape)
        write_picture(output / "grid.png", np.concatenate(np.concatenate(rows, 1), 1))
        return f"{len(seeds)} pictures, grid.png and codes.npy in {output}"

    def _real(self, config, split: str = "") -> np.ndarray:
        from train.data import pipeline

        family, options = pipeline.resolve(config.data)
        images = family.source(split or family.SPLITS[0], options)
        return np.stack([images[i]["image"] for i in range(min(len(images), _SAMPLES))])

    def _distance(self, variables, real: np.ndarray) -> float:
        z = jax.random.normal(jax.random.key(0), (_SAMPLES, self.model.z_dim))
        variables = jax.device_put(variables)
        sample = jax.jit(lambda v, z: self.model.apply(v, z))
        size = min(_SAMPLES, 16 if self.model.img_resolution > 64 else _SAMPLES)
        images = [np.asarray(sample(variables, z[i : i + size])) for i in range(0, len(z), size)]
        return sliced_wasserstein(np.concatenate(images), real)


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, projections: int = _PROJECTIONS) -> float:
    """Root mean squared 2-Wasserstein distance over random directions of images [N, ...].

    Images are averaged down to 16 pixels; quantiles make different numbers of images comparable.
    """

    def pixels(x):
        step = max(x.shape[1] // 16, 1)
        size = x.shape[1] // step
        x = x[:, : size * step, : size * step]
        x = x.reshape(len(x), size, step, size, step, x.shape[3]).mean((2, 4))
        return x.reshape(len(x), -1).astype(np.float64)

    a, b = pixels(a), pixels(b)
    directions = np.random.default_rng(0).standard_normal((a.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    levels = (np.arange(64) + 0.5) / 64
    gap = np.quantile(a @ directions, levels, 0) - np.quantile(b @ directions, levels, 0)
    return float(np.sqrt(np.mean(gap**2)))


def from_config(config) -> StyleGAN2:
    """`task_args`: `discriminator_args` and the fields of `StyleGAN2`."""
    if config.ema.decay:
        raise ConfigError("config.ema.decay: this task keeps its own average (ema_images)")
    if config.optimizer.accumulate != 1 or config.parallel.mode == "pmap":
        raise ConfigError("config: stylegan2 runs under jit, without accumulation")
    args = dict(config.task_args)
    own = args.pop("discriminator_args", {})
    critic = build_named(
        config, "video.stylegan2:Discriminator", own, "config.task_args.discriminator_args"
    )
    model = build_model(config)
    if critic.img_resolution != model.img_resolution:
        raise ConfigError(
            f"config.task_args.discriminator_args: images of {critic.img_resolution} pixels, the "
            f"generator makes {model.img_resolution}"
        )
    return StyleGAN2(model=model, discriminator=critic, **args)
