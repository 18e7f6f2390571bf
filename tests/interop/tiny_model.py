"""A small Linen model with every leaf kind, laid out as a model module of the package is."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class TinyNorm(nn.Module):
    """Normalization by running statistics; the counter travels."""

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (c,))
        var = self.variable("batch_stats", "var", jnp.ones, (c,))
        return (x - mean.value) / jnp.sqrt(var.value + 1e-5) * scale + bias


class TinyConv(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param(
            "kernel", nn.initializers.normal(0.5), (3, 3, x.shape[-1], self.features)
        )
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=dims
        )


class TinyHead(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(0.5), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return x @ kernel + bias


class TinyNet(nn.Module):
    width: int = 4
    num_classes: int = 3
    param_dtype: object = jnp.float32

    def example_inputs(self):
        return (jax.ShapeDtypeStruct((1, 5, 5, 2), jnp.float32),)

    @nn.compact
    def __call__(self, x, train: bool = False):
        self.variable("buffers", "grid", jnp.arange, 3)
        x = TinyConv(self.width, name="stem.0")(x)
        x = nn.relu(TinyNorm(name="stem.1")(x))
        tower = TinyNorm(name="tower")
        x = tower(tower(x))
        gamma = self.param("gamma", nn.initializers.ones, (self.width,))
        return TinyHead(self.num_classes, name="classifier")((x * gamma).mean((1, 2)))


class TinyStack(nn.Module):
    """Two scanned layers, one child `layer.*` stacked on axis 0."""

    def example_inputs(self):
        return (jax.ShapeDtypeStruct((1, 4), jnp.float32),)

    @nn.compact
    def __call__(self, x, train: bool = False):
        layer = nn.scan(
            lambda m, x, _: (m(x), None), variable_axes={"params": 0}, split_rngs={"params": True},
            length=2,
        )  # fmt: skip
        return layer(TinyHead(4, name="encoder.layer.*"), x, None)[0]


MODEL = TinyNet
VARIANTS = {"tiny_wide": {"width": 6}, "tiny_stack": {"cls": "TinyStack"}}


def check_checkpoint(keys, module):
    if any(key.endswith("folded.weight") for key in keys):
        raise ValueError("a folded checkpoint: construct the model with deploy=True")
