"""StyleGAN2's alternating step, on networks so small that nothing but its order is left."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp

from train.tasks import stylegan2


def test_the_mean_latent_moves_wherever_images_are_made():
    class Counting(stylegan2.StyleGAN2):
        """A generator of flat images that counts in place of averaging."""

        def _codes(self, variables, rng, batch):
            ws = jnp.full((batch, 2, 3), variables["params"]["level"])
            return ws, {"moves": variables["buffers"]["moves"] + 1}

        def _images(self, variables, ws, rng):
            return jnp.broadcast_to(ws.sum((1, 2))[:, None, None, None], (len(ws), 4, 4, 3))

    class Critic(nn.Module):
        @nn.compact
        def __call__(self, image):
            return nn.Dense(1)(jnp.tanh(image).reshape(len(image), -1))

    task = Counting(model=None, discriminator=Critic(), pl_every=2)
    image = jnp.ones((4, 4, 4, 3))
    level = {"level": jnp.ones(())}
    critic = task.discriminator.init(jax.random.key(0), image)["params"]
    gan = {
        "generator": task._adam(2).init(level),
        "discriminator": task._adam(16).init(critic),
        "average": level,
        "path_mean": jnp.zeros(()),
    }
    params = {"generator": level, "discriminator": critic}
    moves = []

    @jax.jit
    def step(number, params, extra):
        state = SimpleNamespace(params=params, extra=extra, step=number)
        state.replace = lambda **changes: changes
        new, _, _ = task.update(state, {"image": image}, jax.random.key(number))
        return new["params"], new["extra"]

    extra = {"buffers": {"moves": jnp.int32(0)}, "gan": gan}
    for number in range(3):
        params, extra = step(number, params, extra)
        moves.append(int(extra["buffers"]["moves"]))
    # Generator and discriminator each time, the path length at every second step.
    assert moves == [3, 5, 8]
